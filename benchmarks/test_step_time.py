"""Both training steps of step_time compute the same losses, and its tables come out: python -m pytest benchmarks"""

import dataclasses
import statistics
from collections.abc import Iterator

import jax
import pytest
import torch

from benchmarks.step_time import BOUND, HEADER, METHODS, SMALL, gpu_rows, lines, setting
from benchmarks.training_rows import (
    CHANNELS_LAST,
    CHECKED_STEPS,
    EAGER,
    NCHW,
    OURS,
    Row,
    alone,
    alone_in_a_process,
    begin,
)
from cm_jax.networks import ADMUNet

TINY = ADMUNet(
    image_size=8, width=32, multipliers=(1,), blocks_per_level=1, attention_factors=(), head_width=32, classes=3
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


@pytest.mark.parametrize(("method", "rivals"), [("EDM", (EAGER, NCHW)), ("CD", (CHANNELS_LAST,))])
def test_first_losses_agree_and_the_table_says_so(method: str, rivals: tuple[str, ...]) -> None:
    measured = {row(method, step): alone(row(method, step), 1) for step in (OURS, *rivals)}
    ours = measured[row(method, OURS)]
    assert len(set(ours.losses)) == CHECKED_STEPS
    for rival in rivals:
        assert measured[row(method, rival)].difference(ours) < BOUND / 2
    table = [line.split("|") for line in lines(measured)]
    assert [len(cells) for cells in table] == [HEADER.splitlines()[0].count("|") + 1] * len(measured)
    assert int(table[0][6]) == round(1000 * statistics.median(ours.seconds))


def test_every_row_of_a_gpu_can_be_made() -> None:
    groups = list(gpu_rows(["imagenet64", "cifar10"], list(METHODS), ["bfloat16", "float32"], 0))
    assert len(groups) == 16
    assert sum(map(len, groups)) == 20


@pytest.mark.parametrize("method", ["ECT", "sCM"])
def test_other_methods_are_made_ready(method: str) -> None:
    chosen = row(method, OURS).chosen
    half = dataclasses.replace(chosen, network=chosen.network.at_precision("bfloat16"))
    assert callable(begin(Row("tiny", method, OURS, half)))


def test_a_row_that_takes_too_long_is_ended_and_named() -> None:
    slow = Row("small", "EDM", OURS, setting("imagenet64", "EDM", 4096, SMALL))
    measured = alone_in_a_process(slow, 9, limit=0.2)
    assert measured.failure == "not done after 0 s"
    (line,) = lines({slow: measured})
    assert "not done" in line
