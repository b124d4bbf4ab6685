"""The training step on several devices: invariance of the results, and traffic between devices."""

import dataclasses
import functools
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.hlo import collectives, collectives_with_groups
from cm_jax.data import EmojiData
from cm_jax.errors import InputError
from cm_jax.parallelism import DataMesh, OneDevice, Pmap, Sharded, check_batch_size
from cm_jax.training.config import TrainConfig
from cm_jax.training.setup import prepare
from cm_jax.training.step import Constants
from tests.laws.test_training_step import KEY, TOY, UNET, distilling, farthest, raw_batches, run


@functools.cache
def on_one_device(network, size):
    """The run of 50 steps that the others are compared with."""
    return run(distilling(network), network, OneDevice(), raw_batches(network, 50, size))


WAYS = [Pmap(2), Pmap(8), DataMesh(8), Sharded(2), Sharded(8), Sharded(8, shards=4)]


@pytest.mark.parametrize("across", WAYS, ids=str)
def test_devices_do_not_change_the_result(across):
    batches = raw_batches(TOY, 50, 16)
    one, alone = on_one_device(TOY, 16)
    many, together = run(distilling(TOY), TOY, across, batches)
    np.testing.assert_allclose(together["loss"], alone["loss"], rtol=1e-5)
    np.testing.assert_allclose(together["loss_sigma"][:, 2], alone["loss_sigma"][:, 2], rtol=1e-5)
    assert farthest(one.params, TOY.initialize(jax.random.key(1))) > 0.01  # the parameters changed
    assert farthest(many, one) < 1e-5


@pytest.mark.parametrize("across", [Pmap(8)], ids=str)
def test_devices_do_not_change_the_result_of_a_unet(across):
    _, alone = on_one_device(UNET, 8)
    _, together = run(distilling(UNET), UNET, across, raw_batches(UNET, 50, 8))
    np.testing.assert_allclose(together["loss"], alone["loss"], atol=1e-5 * alone["loss"].max())


def traffic(across, size, network=TOY, **changes):
    """[(kind, bytes)] of every collective of the compiled step."""
    return collectives(compiled(across, size, network, **changes))


def compiled(across, size, network=TOY, **changes):
    """The text of the compiled step."""
    step = distilling(network, **changes)
    params = network.initialize(jax.random.key(1))
    state = across.place_state(step.initial_state(params))
    constants = across.place_constants(Constants(teacher=params))
    batches = across.place_batches(raw_batches(network, 1, size))
    program = across.compile(functools.partial(step.run_steps, across), state)
    return program.lower(state, constants, batches, KEY).compile().as_text()


def bytes_of(network):
    return 4 * sum(leaf.size for leaf in jax.tree.leaves(network.shapes()))


@pytest.mark.parametrize("across", [Pmap(8), DataMesh(8)], ids=str)
@pytest.mark.parametrize("grad_accum_steps", [1, 2])
def test_data_parallelism_sends_the_gradient_once_and_nothing_else(across, grad_accum_steps):
    for size in (32, 64):
        ((kind, sent),) = traffic(across, size, grad_accum_steps=grad_accum_steps)
        assert kind == "all-reduce"
        assert bytes_of(TOY) <= sent < bytes_of(TOY) + 100  # and a few scalars to log


@pytest.mark.parametrize("grad_accum_steps", [1, 2])
def test_sharding_sends_each_gradient_once_a_part_and_nothing_that_grows_with_the_batch(grad_accum_steps):
    small, large = (traffic(Sharded(8), size, grad_accum_steps=grad_accum_steps) for size in (32, 64))
    assert sorted(small) == sorted(large)
    reduced = sum(sent for kind, sent in small if kind in ("all-reduce", "reduce-scatter"))
    assert grad_accum_steps * bytes_of(TOY) <= reduced < grad_accum_steps * bytes_of(TOY) + 1000
    gathered = sum(sent for kind, sent in small if kind == "all-gather")
    assert gathered <= 2 * bytes_of(TOY)  # student and target; the teacher is on every device
    assert {kind for kind, _ in small} <= {"all-reduce", "reduce-scatter", "all-gather"}


HOSTS = frozenset({frozenset(range(4)), frozenset(range(4, 8))})


def test_a_shard_per_device_of_a_host_sends_only_its_own_gradient_to_other_hosts():
    """Eight devices as two hosts of four: parameters are gathered and gradients summed within a host first."""
    found = collectives_with_groups(compiled(Sharded(8, shards=4), 32))
    gathers = [each for each in found if each.kind == "all-gather"]
    assert gathers
    assert {each.groups for each in gathers} == {HOSTS}
    large = sum(4 * leaf.size for leaf in jax.tree.leaves(TOY.shapes()) if leaf.size >= 4096)
    abroad = sum(each.size for each in found if each.groups != HOSTS)
    assert large / 4 < abroad < large / 4 + bytes_of(TOY) - large + 100  # a quarter of the split arrays; small ones


def test_groups_of_devices_in_each_notation():
    rows = frozenset({frozenset({0, 2}), frozenset({1, 3})})
    for groups in (
        "{{0,2},{1,3}}",
        "[2,2]<=[2,2]T(1,0)",
        "mesh['a'=2,'b'=2] {'a'}",
        "mesh['a'=1,'b'=2,'c'=2], device_ids=([2,2]T(1,0)) {'c'}",
    ):
        line = f"%x = f32[3,2]{{1,0}} all-gather-start(%y), channel_id=4, replica_groups={groups}, dimensions={{0}}"
        assert collectives_with_groups(line) == [("all-gather", 24, rows)]


def test_sharding_splits_what_is_large():
    across = Sharded(8)
    state = across.place_state(distilling(TOY).initial_state(TOY.initialize(jax.random.key(1))))
    for tree in (state.params, state.target, state.ema["power_0.1"], state.optimizer[0].mean):
        own = tree["mlp"]
        assert own["in"].addressable_shards[0].data.shape == (48, 16)
        assert own["out"].addressable_shards[0].data.shape == (16, 48)
        assert own["bias"].addressable_shards[0].data.shape == (48,)


def test_a_state_is_placed_from_the_host_leaf_by_leaf(monkeypatch):
    """So that no device holds the whole state, and none holds its shares twice."""
    network = dataclasses.replace(TOY, image_size=8, classes=9)
    setup = prepare(TrainConfig(data=EmojiData(), network=network, batch_size=8, images=8, parallel="sharded"))
    state = setup.initial_state()
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(state))
    copy, sources, alive = jnp.copy, [], []

    def counting(leaf):
        sources.append(weakref.ref(leaf))
        alive.append(sum(source() is not None for source in sources))
        return copy(leaf)

    monkeypatch.setattr(jnp, "copy", counting)
    placed = setup.parallelism.place_state(state)
    assert alive == [1] * len(jax.tree.leaves(placed))
    jax.tree.map(np.testing.assert_array_equal, placed, state)


def test_a_batch_that_cannot_be_shared_out_names_the_nearest():
    check_batch_size(24, 8, 3)
    with pytest.raises(InputError, match="Batch size 30 is not divisible by 8 devices; use 32"):
        check_batch_size(30, 8, 1)
    with pytest.raises(InputError, match="not divisible by 8 devices x 4 microbatches; use 32"):
        check_batch_size(1, 8, 4)
