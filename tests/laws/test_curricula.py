"""Curricula: exact whole numbers at every step, one compilation for all of them, and the edges of the formulas."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax.diffusion.curricula import (
    AdaptiveTargetEMA,
    Constant,
    ConstantTargetEMA,
    Doubling,
    Halving,
    Progressive,
    ShrinkingGap,
    WarmUp,
)
from cm_jax.errors import InputError


@pytest.mark.parametrize(("start", "end", "total"), [(2, 200, 800_000), (2, 150, 1_000_000), (2, 150, 800_000)])
def test_progressive_levels_are_those_of_double_precision_at_every_step(start, end, total):
    steps = np.arange(800_001)
    roots = np.sqrt(steps / total * ((end + 1) ** 2 - start**2) + start**2)
    levels = np.maximum(np.ceil(roots - 1), 1) + 1
    np.testing.assert_array_equal(jax.jit(jax.vmap(Progressive(start, end, total)))(jnp.asarray(steps)), levels)


@pytest.mark.parametrize("curriculum", [Progressive(), Progressive(10, 1280, 4_000), Progressive(1, 1, 10)])
def test_progressive_levels_end_with_one_more_than_the_last_number_and_stay(curriculum):
    assert curriculum(curriculum.steps) == curriculum.end + 1
    assert curriculum(10 * curriculum.steps) == curriculum.end + 1
    assert curriculum(0) == max(curriculum.start, 2)
    levels = jax.vmap(curriculum)(jnp.arange(curriculum.steps + 1)[:: max(1, curriculum.steps // 5_000)])
    assert (jnp.diff(levels) >= 0).all()


def test_progressive_levels_as_the_cifar_program_recorded_them():
    curriculum, rate = Progressive(2, 150, 800_000), AdaptiveTargetEMA(0.9)
    recorded = {0: 2, 1: 3, 1_000: 6, 10_000: 17, 50_000: 38, 100_000: 54, 200_000: 76, 400_000: 107, 740_000: 146}
    assert {step: int(curriculum(step)) for step in recorded} == recorded
    assert [round(float(rate(step, curriculum)), 5) for step in (0, 1, 1_000, 400_000)] == [0.81, 0.9, 0.95873, 0.99801]


@pytest.mark.parametrize(
    "curriculum",
    [
        Doubling(10, 1280, 4_000),
        Doubling(10, 100, 4_000),
        Doubling(7, 7, 10),
        Halving(64, 100),
        Halving(2, 7),
        WarmUp(50),
    ],
)
def test_a_curriculum_changes_until_its_last_step_and_then_no_more(curriculum):
    values = np.asarray(jax.vmap(curriculum)(jnp.arange(8_000)))
    assert curriculum.duration == np.argmax(values == values[-1])


def test_levels_and_gaps_are_at_their_end_when_they_say_so():
    progressive, gap = Progressive(2, 150, 1_000), ShrinkingGap(steps_per_stage=10, stages=3)
    assert progressive(progressive.duration) == progressive(10**6) == 151 > progressive(progressive.duration // 2)
    t = jnp.full(1, 40.0)
    assert gap(t, gap.duration) == gap(t, 10**6) > gap(t, gap.duration - 1)


def test_doubling_has_eight_equal_stages():
    curriculum = Doubling()
    assert curriculum.steps_per_stage == 50_000
    steps = np.arange(0, 400_000, 25_000)
    expected = np.repeat([11, 21, 41, 81, 161, 321, 641, 1281], 2)
    np.testing.assert_array_equal(jax.vmap(curriculum)(jnp.asarray(steps)), expected)
    assert [int(curriculum(step)) for step in (49_999, 50_000, 349_999, 350_000, 10**9)] == [11, 21, 641, 1281, 1281]


def test_halving_rests_at_two_for_two_stages():
    curriculum = Halving(4096, 50_000)
    assert [int(curriculum(step)) for step in (0, 49_999, 50_000, 549_999, 550_000)] == [4096, 4096, 2048, 4, 2]
    assert [int(curriculum(step)) for step in (649_999, 650_000, 10**9)] == [2, 1, 1]


def test_the_two_adaptive_rates_divide_by_intervals_and_by_levels():
    curriculum = Progressive(2, 200, 800_000)
    for step in (0, 100, 400_000, 800_000):
        levels = int(curriculum(step))
        released, printed = (AdaptiveTargetEMA(over=over)(step, curriculum) for over in ("intervals", "levels"))
        assert released == pytest.approx(0.95 ** (2 / (levels - 1)), rel=2e-7)
        assert printed == pytest.approx(0.95 ** (2 / levels), rel=2e-7)
        assert released < printed


@pytest.mark.parametrize(
    "schedule",
    [
        Constant(),
        Progressive(),
        Doubling(),
        Halving(),
        WarmUp(),
        functools.partial(ConstantTargetEMA(), curriculum=None),
        functools.partial(AdaptiveTargetEMA(), curriculum=Progressive()),
    ],
    ids=lambda schedule: type(getattr(schedule, "func", schedule)).__name__,
)
def test_a_schedule_compiles_once(schedule):
    compiled = jax.jit(schedule)
    for step in (0, 1, 999, 50_000, 799_999):
        assert compiled(step) == schedule(step)
    assert compiled._cache_size() == 1


def test_the_gap_shrinks_as_ect_published_it():
    t = jnp.array([0.1, 1.0, 10.0])
    gap = ShrinkingGap()
    ratios = {stage: gap(t, stage * 25_000) / t for stage in (0, 3, 7)}
    np.testing.assert_allclose(ratios[0], [0, 0, 0.50], atol=0.005)
    np.testing.assert_allclose(ratios[3], [0.70, 0.80, 0.94], atol=0.005)
    np.testing.assert_allclose(ratios[7], [0.981, 0.988, 0.996], atol=0.001)
    np.testing.assert_array_equal(gap(t, 10**8), gap(t, 7 * 25_000))
    compiled = jax.jit(gap)
    for step in (0, 24_999, 25_000, 199_999):
        assert (compiled(t, step) < t).all()
    assert compiled._cache_size() == 1
    assert jnp.isfinite(gap(jnp.array([1e-6, 1e4]), 0)).all()


def test_the_warm_up_rises_to_one_and_stays():
    assert [float(WarmUp(10)(step)) for step in (0, 5, 10, 1_000)] == [0, 0.5, 1, 1]


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: Constant(1), "num_levels >= 2"),
        (lambda: Progressive(200, 2), "start <= end"),
        (lambda: Doubling(10, 1280, 5), "one step per stage"),
        (lambda: Halving(40), "power of 2"),
        (lambda: ConstantTargetEMA(1.5), "0 <= decay <= 1"),
        (lambda: AdaptiveTargetEMA(start=0.0), "0 < start < 1"),
        (lambda: ShrinkingGap(ratio=1.0), "ratio > 1"),
        (lambda: WarmUp(0), "steps >= 1"),
    ],
)
def test_impossible_schedules_are_refused(make, wanted):
    with pytest.raises(InputError, match=wanted):
        make()


@pytest.mark.parametrize(
    ("curriculum", "final"), [(Constant(18), 18), (Progressive(2, 150, 100), 151), (Doubling(10, 1280, 100), 1281)]
)
def test_the_final_number_of_levels_is_that_after_the_last_step(curriculum, final):
    assert curriculum.final == int(curriculum(curriculum.duration)) == int(curriculum(10**6)) == final


@pytest.mark.parametrize("curriculum", [None, Constant(40), Doubling()])
def test_an_adaptive_target_needs_a_progressive_curriculum(curriculum):
    with pytest.raises(InputError, match="follows a Progressive curriculum"):
        AdaptiveTargetEMA().check(curriculum)
    ConstantTargetEMA().check(curriculum)


def test_the_number_of_stages_of_a_doubling_curriculum_reaches_its_end():
    for start, end in ((10, 1280), (3, 100), (7, 7), (1, 1023)):
        curriculum = Doubling(start, end, 10_000)
        stage = 10_000 // curriculum.steps_per_stage
        expected = min(start * 2**stage, end) + 1
        assert int(curriculum(10_000)) == expected
        assert int(curriculum(10**9)) == end + 1
        assert curriculum.steps_per_stage == math.floor(10_000 / (math.log2(end // start) + 1))
