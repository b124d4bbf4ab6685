"""Both training steps of step_time compute the same losses, and its tables come out: python -m pytest benchmarks"""

import dataclasses
from collections.abc import Iterator

import jax
import pytest
import torch

from benchmarks.step_time import HEADER, METHODS, gpu_rows, lines, setting
from benchmarks.training_rows import (
    BOUND,
    CHANNELS_LAST,
    CHECKED_STEPS,
    COMPILED,
    EAGER,
    NCHW,
    OURS,
    Measured,
    Row,
    begin,
    draws_of_ours,
    measure,
)
from cm_jax.networks import ADMUNet

TINY = ADMUNet(
    image_size=8, base_channels=32, channel_mult=(1,), blocks_per_level=1, attention_factors=(), head_dim=32, classes=3
)


@pytest.fixture(autouse=True)
def in_a_hurry() -> Iterator[None]:
    """Compilation is nearly all that these tests do."""
    torch.set_num_threads(1)
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def row(method: str, step: str) -> Row:
    return Row("tiny", method, step, setting("imagenet64", method, 2, dataclasses.replace(TINY, attention="plain")))


@pytest.mark.parametrize(("method", "rivals"), [("EDM", (EAGER, NCHW)), ("CD", (CHANNELS_LAST, COMPILED))])
def test_first_losses_agree(method: str, rivals: tuple[str, ...]) -> None:
    drawn = [draws_of_ours(row(method, OURS).chosen, batch) for batch in range(CHECKED_STEPS)]
    ours, *theirs = (begin(row(method, name)) for name in (OURS, *rivals))
    losses = [ours(values) for values in drawn]
    assert len(set(losses)) == CHECKED_STEPS
    for step in theirs:
        measured = Measured([step(values) for values in drawn])
        assert measured.difference(Measured(losses)) < BOUND / 2
        assert step(None) > 0


def test_the_table() -> None:
    measured = {
        row("EDM", OURS): Measured([1.0, 2.0], first=3.0, seconds=[0.3, 0.2, 0.4], peak=2e9),
        row("EDM", NCHW): Measured([1.0, 2.002], first=0.5, seconds=[0.6, 0.5, 0.7], peak=3e9),
        row("EDM", EAGER): Measured(failure="out of memory"),
    }
    ours, theirs, failed = lines(measured)
    assert ours == "| tiny | EDM | float32 | 2 | ours | 300 | 0.50 | 200 | 0.40 | 6.7 | 2.00 | 2.7 |  |"
    assert (
        theirs == "| tiny | EDM | float32 | 2 | PyTorch, NCHW | 600 | 1.00 | 500 | 1.00 | 3.3 | 3.00 | 0.0 | 1.0e-03 |"
    )
    assert "| out of memory |" in failed
    assert {line.count("|") for line in (ours, theirs, failed)} == {HEADER.splitlines()[0].count("|")}


def test_every_row_of_a_gpu_can_be_made() -> None:
    groups = list(gpu_rows(["imagenet64", "cifar10"], list(METHODS), ["bfloat16", "float32"], 0))
    assert len(groups) == 16
    assert sum(map(len, groups)) == 24


@pytest.mark.parametrize("method", ["ECT", "sCM"])
def test_other_methods_are_made_ready(method: str) -> None:
    chosen = row(method, OURS).chosen
    half = dataclasses.replace(chosen, network=chosen.network.at_precision("bfloat16"))
    assert callable(begin(Row("tiny", method, OURS, half)))


def test_a_row_in_a_process_of_its_own() -> None:
    ((_, measured),) = measure([row("EDM", EAGER)], 1, limit=300).items()
    assert not measured.failure
    assert len(measured.losses) == CHECKED_STEPS
    assert len(measured.seconds) == 1
    assert measured.peak > 0


def test_a_row_that_takes_too_long_says_so() -> None:
    ((_, measured),) = measure([row("EDM", OURS)], 9, limit=0.2).items()
    assert measured.failure == "it took too long"
