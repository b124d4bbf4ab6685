"""The training state of a run whose settings have changed."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from cm_jax.errors import InputError
from cm_jax.training.config import PARAMETERS, TrainConfig
from cm_jax.training.setup import TrainingSetup
from cm_jax.training.step import TrainingStep, TrainState


def former_step(setup: TrainingSetup, before: TrainConfig) -> TrainingStep:
    """The training step with the settings that a checkpoint was saved with, for its state."""
    parts = {"objective": before.objective, "optimizer": before.optimizer, "target_ema": before.target_ema}
    return dataclasses.replace(setup.step, emas=before.emas, **parts)


def template(setup: TrainingSetup, before: TrainConfig) -> Any:
    """What a checkpoint of these settings is read into: on the devices, or on the host if it must be adapted."""
    former = setup.state_shapes(former_step(setup, before))
    if _layout(former) == _layout(setup.state_shapes()):
        return setup.abstract_state()
    if before.objective.extras().keys() != setup.config.objective.extras().keys():
        raise InputError(
            "The objective's own parameters cannot change in a run (adaptive weighting): give the former objective, or "
            "start a new run with --init-from THIS_RUN."
        )
    return jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), former)


def adapted(
    setup: TrainingSetup, state: TrainState, before: TrainConfig, done: int
) -> tuple[TrainingSetup, TrainState, list[str]]:
    """The setup and the state of a run that resumes from a checkpoint, and notes for the user.

    before: the settings with which it was saved, after `done` batches.

    Images are counted and read without a gap if the batch size changes: the next batch begins where the last one ended.
    A new EMA is initialized from the EMA whose decay is nearest, or from the parameters; a new target network, from the
    parameters. The parts of the optimizer's state that both optimizers have are kept, among them the number of steps of
    the learning-rate schedule; others start anew.
    """
    former, now, notes = former_step(setup, before), setup.step, []
    offset = before.images_after(done) - done * setup.config.batch_size
    setup = dataclasses.replace(setup, config=dataclasses.replace(setup.config, image_offset=offset))
    if _layout(setup.state_shapes(former)) == _layout(setup.state_shapes()):
        return setup, state, []
    emas = dict(_emas(former, now, state, notes))
    target = now.initial_target(state.params)
    target = target if target is None or state.target is None else state.target
    fresh: Any = now.optimizer.transformation().init(state.params)
    kept = {type(part): part for part in state.optimizer}
    optimizer = tuple(kept.get(type(part), part) for part in fresh)
    if (target is None) != (state.target is None):
        notes.append(
            "The target network " + ("is the student now." if target is None else "is initialized from the student.")
        )
    if restarted := [type(part).__name__ for part in fresh if type(part) not in kept and jax.tree.leaves(part)]:
        notes.append(f"The optimizer's moments start anew ({', '.join(restarted)}).")
    state = state._replace(ema=emas, target=target, optimizer=optimizer)
    return setup, setup.parallelism.place_state(state), notes


def _emas(former: TrainingStep, now: TrainingStep, state: TrainState, notes: list[str]) -> Iterator[tuple[str, Any]]:
    """The EMAs of `now` by name. Adds to the notes."""
    step = int(state.batches) - int(state.skipped)
    names = {ema.name for ema in now.emas}
    rates = {PARAMETERS: 1.0} | {ema.name: float(ema.weight_at(step)) for ema in former.emas}
    for ema in now.emas:
        if ema.name in state.ema:
            yield ema.name, state.ema[ema.name]
            continue
        rate = float(ema.weight_at(step))
        nearest = min(rates, key=lambda name: abs(math.log(rates[name] / rate)))
        notes.append(
            f"The EMA {ema.name} is initialized from {'the' if nearest == PARAMETERS else 'the EMA'} {nearest}."
        )
        yield ema.name, state.ema.get(nearest, state.params)
    notes += [f"The EMA {name} is dropped." for name in state.ema if name not in names]


def _layout(shapes: TrainState) -> tuple[Any, list[Any]]:
    """For comparison: tuples of different types with equal shapes are equal."""
    return jax.tree.structure(shapes), jax.tree.leaves(shapes)
