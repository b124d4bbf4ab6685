"""Programs of `benchmarks.compiled`: sampling, forward pass and gradient of a network, and training steps."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp

from benchmarks.targets import TARGETS, placed
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.diffusion.preconditioning import (
    ConsistencyPreconditioning,
    EDMPreconditioning,
    LogSigmaPreconditioning,
    MeanFlowPreconditioning,
)
from cm_jax.networks.adm_unet import IMAGENET64, LSUN256
from cm_jax.objectives import MeanFlow
from cm_jax.parallelism import DataMesh, OneDevice, Parallelism, Pmap, Sharded
from cm_jax.presets import PRESETS
from cm_jax.samplers.generation import sample
from cm_jax.samplers.plan import make_plan
from cm_jax.training.config import TrainConfig
from cm_jax.training.setup import make_step
from cm_jax.training.step import Constants, StepBatch
from cm_jax.types import Precision

NETWORKS: dict[str, Any] = {"imagenet64": IMAGENET64, "lsun256": LSUN256}
"""Networks of the programs NETWORK-forward, NETWORK-gradient, NETWORK-sample-1 and NETWORK-sample-2."""
PARALLEL = ("one", "pmap", "mesh", "sharded", "replicas")
"""Parallelism of training steps; replicas: sharded over 8 devices each."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A program and a target."""

    target: str
    program: str
    """NETWORK-forward, NETWORK-gradient, NETWORK-sample-STEPS, or a training step by the name of its preset."""
    batch: int
    """Images per device."""
    precision: Precision = "bfloat16"
    parallel: str = "one"
    rematerialize: bool = False


METHODS = ("cd", "edm", "ect", "sct", "scd", "meanflow")
_BATCHES = {"imagenet64": (256, 32), "lsun256": (16, 1), "cifar10": (0, 128)}
"""Images per device of sampling and of training steps with 80 GB or more; with less, a quarter."""


def program_names() -> list[str]:
    kinds = ("forward", "gradient", "sample-1", "sample-2")
    return [*(f"{name}-{kind}" for name in NETWORKS for kind in kinds), *PRESETS, "imagenet64-meanflow"]


def main_programs(name: str) -> Iterator[Job]:
    """The main programs of a target: sampling and training on one device, training on several."""
    target = TARGETS[name]
    sampling, training = (
        {family: max(1, sizes[index] // (1 if target.memory > 8e10 else 4)) for family, sizes in _BATCHES.items()}
        for index in (0, 1)
    )
    one = target.count == 1
    if one:
        for kind in ("forward", "sample-1", "sample-2"):
            for family, precision in itertools.product(NETWORKS, get_args(Precision)[:2][::-1]):
                yield Job(name, f"{family}-{kind}", sampling[family], precision)
        yield Job(name, "imagenet64-forward", 1)
        yield Job(name, "imagenet64-gradient", training["imagenet64"])
        yield Job(name, "imagenet64-cd", training["imagenet64"], rematerialize=True)
    for method, family in itertools.product(METHODS, ("imagenet64", "cifar10")):
        for parallel in ("one",) if one else ("pmap", "mesh", "sharded"):
            yield Job(name, f"{family}-{method}", training[family], parallel=parallel)


def train_config(name: str) -> TrainConfig:
    """A preset, or imagenet64-meanflow: MeanFlow with the ADM network."""
    if name != "imagenet64-meanflow":
        return PRESETS[name]()
    return dataclasses.replace(
        PRESETS["imagenet64-edm"](),
        network=dataclasses.replace(IMAGENET64, attention="plain", interval_embedding=True),
        preconditioning=MeanFlowPreconditioning(),
        objective=MeanFlow(),
        num_levels=18,
    )


def lowered(job: Job) -> jax.stages.Lowered:
    """The program of a job, for its target. The caller is inside `target.active()`."""
    family, _, kind = job.program.partition("-")
    across = parallelism(job.parallel, TARGETS[job.target].count)
    changes: dict[str, Any] = {"precision": job.precision, "rematerialize": job.rematerialize}
    if kind in ("forward", "gradient") or kind.startswith("sample-"):
        program, arguments = network_program(dataclasses.replace(NETWORKS[family], **changes), kind, job.batch)
    else:
        config, usual = train_config(job.program), train_config(job.program).network
        config = dataclasses.replace(config, network=dataclasses.replace(usual, **changes))  # type: ignore[type-var]
        program, arguments = step_program(config, job.batch, across)
    return program.lower(*(placed(arguments, across.replicated) if job.parallel == "one" else arguments))


def parallelism(name: str, count: int) -> Parallelism:
    """One of PARALLEL over `count` devices."""
    found = {"one": OneDevice(), "pmap": Pmap(count), "mesh": DataMesh(count), "sharded": Sharded(count)}
    return found[name] if name in found else Sharded(count, shards=8)


def step_program(config: TrainConfig, batch: int, across: Parallelism) -> tuple[Any, tuple[Any, ...]]:
    """The compiled function of a training step with `batch` images on each device, and the shapes of its arguments."""
    teacher, network, count = None, config.network, len(across.devices)
    if config.objective.has_teacher:
        log_sigma = isinstance(config.preconditioning, LogSigmaPreconditioning)
        factor = {"time_factor": config.preconditioning.time_factor} if log_sigma else {}  # type: ignore[union-attr]
        teacher = ConsistencyFunction(network, EDMPreconditioning(**factor))
    step = make_step(config, teacher)
    params = network.shapes()
    state = jax.eval_shape(step.initial_state, params, params if step.objective.replaces_teacher else None)
    fixed = teacher is not None and not step.objective.replaces_teacher
    constants = Constants(teacher=jax.eval_shape(network.prepare, params) if fixed else None)
    split = (count, 1, batch) if isinstance(across, Pmap) else (1, count * batch)
    images: Any = jax.ShapeDtypeStruct((*split, *network.image_shape), jnp.uint8)
    labels: Any = jax.ShapeDtypeStruct(split, jnp.int32) if network.classes else None
    program = across.compile(functools.partial(step.run_steps, across), state)
    return program, (state, constants, StepBatch(images, labels), _key())


def _key(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jax.random.key(0).dtype)


def network_program(network: Any, kind: str, batch: int) -> tuple[Any, tuple[Any, ...]]:
    """forward, gradient (of the mean squared output) or sample-STEPS (images of a consistency model, from keys)."""
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32) if network.classes else None
    params, prepared = network.shapes(), jax.eval_shape(network.prepare, network.shapes())
    if not kind.startswith("sample-"):
        x, times = (jax.ShapeDtypeStruct((batch, *rest), jnp.float32) for rest in (network.image_shape, ()))
        if kind == "forward":
            return jax.jit(network.predict), (prepared, x, times, labels)
        gradient = jax.grad(lambda *given: jnp.mean(network.predict(*given) ** 2))
        return jax.jit(gradient), (params, x, times, labels)
    config = ModelConfig(network, ConsistencyPreconditioning(), num_levels=40)
    plan = make_plan(config, None, steps=int(kind.removeprefix("sample-")))

    def program(params: Any, keys: Any, labels: Any) -> jax.Array:
        return sample(config.function, plan.sampler, params, plan.levels, keys, labels)

    return jax.jit(program), (prepared, _key(batch), labels)
