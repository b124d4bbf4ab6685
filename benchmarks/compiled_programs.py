"""Programs of `benchmarks.compiled`: sampling, forward pass and gradient of a network, and training steps."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.targets import TARGETS, Target, placed
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
    target = TARGETS[job.target]
    family, _, kind = job.program.partition("-")
    if kind in ("forward", "gradient") or kind.startswith("sample-"):
        network = dataclasses.replace(NETWORKS[family], precision=job.precision, rematerialize=job.rematerialize)
        function, arguments = (_sampling if kind.startswith("sample-") else _pass)(network, kind, job.batch)
        return function.lower(*placed(arguments, OneDevice().replicated))
    config = train_config(job.program)
    network = dataclasses.replace(config.network, precision=job.precision, rematerialize=job.rematerialize)  # type: ignore[arg-type]
    return lowered_step(dataclasses.replace(config, network=network), job.batch, parallelism(job.parallel, target))


def parallelism(name: str, target: Target) -> Parallelism:
    count = target.count
    found = {"one": OneDevice(), "pmap": Pmap(count), "mesh": DataMesh(count), "sharded": Sharded(count)}
    return found[name] if name in found else Sharded(count, shards=8)


def lowered_step(config: TrainConfig, batch: int, across: Parallelism) -> jax.stages.Lowered:
    """A training step with `batch` images on each device, from the shapes of its arguments."""
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
    arguments = state, constants, StepBatch(images, labels), _key()
    if isinstance(across, OneDevice):
        arguments = placed(arguments, across.replicated)
    program: Any = across.compile(functools.partial(step.run_steps, across), state)
    return program.lower(*arguments)


def _key(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jax.random.key(0).dtype)


def _pass(network: Any, kind: str, batch: int) -> tuple[Any, Any]:
    """The network alone, or the gradient of its mean squared output."""
    x, times = (jax.ShapeDtypeStruct((batch, *rest), jnp.float32) for rest in (network.image_shape, ()))
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32) if network.classes else None
    if kind == "forward":
        return jax.jit(network.predict), (_prepared(network), x, times, labels)
    return jax.jit(jax.grad(lambda *given: jnp.mean(network.predict(*given) ** 2))), (
        *(network.shapes(), x, times, labels),
    )


def _sampling(network: Any, kind: str, batch: int) -> tuple[Any, Any]:
    """Images of a consistency model, from keys."""
    config = ModelConfig(network, ConsistencyPreconditioning(), num_levels=40)
    plan = make_plan(config, None, steps=int(kind.removeprefix("sample-")))

    def program(params: Any, keys: Any, labels: Any) -> jax.Array:
        return sample(config.function, plan.sampler, params, plan.levels, keys, labels)

    labels = jax.ShapeDtypeStruct((batch,), jnp.int32) if network.classes else None
    return jax.jit(program), (_prepared(network), _key(batch), labels)


def _prepared(network: Any) -> Any:
    return jax.eval_shape(network.prepare, network.shapes())
