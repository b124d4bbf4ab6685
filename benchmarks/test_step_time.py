"""Both training steps of step_time compute the same losses, and its table is correct."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import pytest
import torch

from benchmarks.step_time import HEADER, METHODS, gpu_rows, lines, train_config
from benchmarks.training_rows import (
    BOUND,
    CHANNELS_LAST,
    CHECKED_STEPS,
    CM_JAX,
    COMPILED,
    EAGER,
    NCHW,
    Measurement,
    Row,
    build_step,
    measure,
    step_noise,
)
from cm_jax.networks import ADMUNet

TINY = ADMUNet(
    image_size=8, base_channels=32, channel_mult=(1,), blocks_per_level=1, attention_factors=(), head_dim=32, classes=3
)


@pytest.fixture(autouse=True)
def fast_compilation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few optimizations in JAX and none in torch.compile, because compilation takes most of the time."""
    torch.set_num_threads(1)
    compile_with: Any = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **_: compile_with(module, backend="aot_eager", dynamic=False))
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def row(method: str, step: str) -> Row:
    return Row(
        "tiny", method, step, train_config("imagenet64", method, 2, dataclasses.replace(TINY, attention="plain"))
    )


@pytest.mark.parametrize(("method", "rivals"), [("EDM", (EAGER, NCHW)), ("CD", (CHANNELS_LAST, COMPILED))])
def test_first_losses_agree(method: str, rivals: tuple[str, ...]) -> None:
    samples = [step_noise(row(method, CM_JAX).config, batch) for batch in range(CHECKED_STEPS)]
    jax_step, *torch_steps = (build_step(row(method, name)) for name in (CM_JAX, *rivals))
    losses = [jax_step(sample) for sample in samples]
    assert len(set(losses)) == CHECKED_STEPS
    for step in torch_steps:
        measured = Measurement([step(sample) for sample in samples])
        assert measured.difference(Measurement(losses)) < BOUND / 2
        assert step(None) > 0


def test_table() -> None:
    measured = {
        row("EDM", CM_JAX): Measurement([1.0, 2.0], first=3.0, seconds=[0.3, 0.2, 0.4], peak=2e9),
        row("EDM", NCHW): Measurement([1.0, 2.002], first=0.5, seconds=[0.6, 0.5, 0.7], peak=3e9),
        row("EDM", EAGER): Measurement(failure="out of memory"),
    }
    cm_jax, pytorch, failed = lines(measured)
    assert cm_jax == "| tiny | EDM | float32 | 2 | cm_jax | 300 | 0.50 | 200 | 0.40 | 6.7 | 2.00 | 2.7 |  |"
    assert (
        pytorch == "| tiny | EDM | float32 | 2 | PyTorch, NCHW | 600 | 1.00 | 500 | 1.00 | 3.3 | 3.00 | 0.0 | 1.0e-03 |"
    )
    assert "| out of memory |" in failed
    assert {line.count("|") for line in (cm_jax, pytorch, failed)} == {HEADER.splitlines()[0].count("|")}


def test_all_gpu_rows_are_built() -> None:
    groups = list(gpu_rows(["imagenet64", "cifar10"], list(METHODS), ["bfloat16", "float32"], 0))
    assert len(groups) == 16
    assert sum(map(len, groups)) == 24


@pytest.mark.parametrize("method", ["ECT", "sCM"])
def test_other_methods_are_built(method: str) -> None:
    config = row(method, CM_JAX).config
    half = dataclasses.replace(config, network=config.network.at_precision("bfloat16"))
    assert callable(build_step(Row("tiny", method, CM_JAX, half)))


def test_row_in_a_subprocess() -> None:
    ((_, measured),) = measure([row("EDM", EAGER)], 1, limit=300).items()
    assert not measured.failure
    assert len(measured.losses) == CHECKED_STEPS
    assert len(measured.seconds) == 1
    assert measured.peak > 0


def test_row_reports_a_timeout() -> None:
    ((_, measured),) = measure([row("EDM", CM_JAX)], 9, limit=0.2).items()
    assert measured.failure == "time limit exceeded"
