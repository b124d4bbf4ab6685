"""Every program can be lowered for NVIDIA GPUs and TPUs, on a machine with neither and without their compilers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.compiled_programs import network_program, step_program
from benchmarks.targets import tracing_for
from cm_jax.diffusion.curricula import Halving
from cm_jax.diffusion.preconditioning import EDMPreconditioning
from cm_jax.networks import ADMUNet, EDM2UNet, SongUNet, operations
from cm_jax.objectives import ProgressiveDistillation
from cm_jax.parallelism import DataMesh, OneDevice, Sharded
from cm_jax.presets import PRESETS
from tests.toy import ToyNetwork

TINY: Any = {
    "image_size": 8,
    "base_channels": 32,
    "channel_mult": (1,),
    "blocks_per_level": 1,
    "attention_factors": (1,),
    "precision": "bfloat16",
}
ADM: Any = ADMUNet(**TINY, head_dim=32, classes=9)
SONG: Any = SongUNet(**TINY)
EDM2: Any = EDM2UNet(**TINY, head_dim=32, classes=9)
ATTENTION = "__cudnn$fmhaSoftmax"


def with_network(config, network):
    """A training configuration with another network, and what its method needs of it."""
    needs = {field: getattr(config.network, field) for field in ("attention", "interval_embedding")}
    return dataclasses.replace(config, network=dataclasses.replace(network, **needs))


STEPS = {name: with_network(preset(), ADM) for name, preset in PRESETS.items() if name.startswith("emoji32-")}
STEPS["progressive distillation"] = dataclasses.replace(
    STEPS["emoji32-cd"],
    objective=ProgressiveDistillation(Halving(64, 100)),
    preconditioning=EDMPreconditioning(),
    target_ema=None,
)


@pytest.fixture(scope="module")
def on_gpu():
    """All tests share what was traced. A TPU gets the same program, but for the attention in half precision."""
    with tracing_for("cuda"):
        yield


@pytest.fixture
def on_tpu():
    with tracing_for("tpu"):
        yield


def lowered(program, arguments, *platforms):
    """The program as text."""
    text = program.trace(*arguments).lower(lowering_platforms=platforms).as_text()
    assert "cm_jax_" not in text  # the CPU kernels
    return text


def plain(config):
    return dataclasses.replace(config, network=dataclasses.replace(config.network, attention="plain"))


@pytest.mark.parametrize("name", STEPS)
def test_training_steps_can_be_lowered(name, on_gpu):
    lowered(*step_program(plain(STEPS[name]), 2, OneDevice()), "cuda", "tpu")


@pytest.mark.parametrize("across", [DataMesh(8), Sharded(8), Sharded(8, shards=4)], ids=str)
def test_steps_on_meshes_can_be_lowered(across, on_gpu):
    lowered(*step_program(with_network(STEPS["emoji32-cd"], ToyNetwork(classes=9)), 2, across), "cuda", "tpu")


@pytest.mark.parametrize("network", [SONG, EDM2], ids=lambda network: type(network).__name__)
def test_sampling_can_be_lowered(network, on_gpu):
    assert ATTENTION in lowered(*network_program(network, "sample-1", 2), "cuda")
    full = network_program(network.at_precision("float32"), "sample-2", 2)
    assert ATTENTION not in lowered(*full, "cuda", "tpu")


def test_fused_attention_on_gpus_alone(on_gpu, on_tpu):
    assert ATTENTION not in lowered(*network_program(ADM, "sample-1", 2), "tpu")


def test_fused_attention_in_training(on_gpu):
    text = lowered(*step_program(STEPS["emoji32-cd"], 2, OneDevice()), "cuda")
    assert ATTENTION in text
    assert f"{ATTENTION}Backward" in text


@pytest.mark.parametrize(
    ("head_dim", "capability", "fused"), [(128, 8.0, True), (136, 8.0, False), (256, 9.0, True), (264, 9.0, False)]
)
def test_fused_attention_up_to_the_widest_heads_of_the_gpu(monkeypatch, head_dim, capability, fused):
    qkv = jax.ShapeDtypeStruct((1, 64, 3 * head_dim), jnp.bfloat16)
    with tracing_for("cuda"):
        monkeypatch.setattr(operations, "_cuda_capability", lambda: capability)
        monkeypatch.setattr(
            "jax._src.cudnn.fused_attention_stablehlo.check_compute_capability",
            lambda wanted: float(wanted) <= capability,
        )
        program = jax.jit(lambda qkv: operations.attend(qkv, 1)).trace(qkv).lower(lowering_platforms=("cuda",))
        monkeypatch.undo()
    assert (ATTENTION in program.as_text()) == fused
