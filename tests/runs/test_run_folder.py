"""Run folders: states are restored bitwise identical, and checkpoints are kept as configured."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import cm_jax
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.checkpoints.published import resolve
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning
from cm_jax.errors import InputError
from cm_jax.networks import ADMUNet
from cm_jax.training.run import state_io
from cm_jax.training.run.folder import Retention, RunFolder

NETWORK = ADMUNet(
    image_size=8,
    base_channels=32,
    channel_mult=(1,),
    blocks_per_level=1,
    attention_factors=(),
    head_dim=16,
    classes=None,
)
CONFIG = ModelConfig(NETWORK, ConsistencyPreconditioning(), num_levels=18)
PARAMS = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.01, np.float32), NETWORK.shapes())


class Inner(NamedTuple):
    count: Any
    nothing: Any
    keys: Any


class State(NamedTuple):
    batches: Any
    params: Any
    optimizer: Any
    target: Any
    ema: Any
    inner: Inner


def state(seed=0):
    """A bit of everything that a state may hold."""
    draws = jax.random.normal(jax.random.key(seed), (3, 16, 8))
    params = {"stem": {"kernel": draws[0], "bias": draws[1, 0]}, "half": draws[2].astype(jnp.bfloat16)}
    return State(
        batches=jnp.int32(seed),
        params=params,
        optimizer=optax.adam(1e-3).init(params),
        target=None,
        ema={"0.99": params, "0.9": jax.tree.map(lambda a: a * 2, params)},
        inner=Inner(np.arange(3, dtype=np.int64), None, jax.random.split(jax.random.key(seed), 4)),
    )


def bits(tree):
    leaves = jax.tree.leaves(jax.tree.map(lambda a: jax.random.key_data(a) if state_io._is_key(a) else a, tree))
    return [(str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()) for leaf in leaves]


def same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert bits(ours) == bits(theirs)


def spread(tree, spec):
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("devices",)), spec)
    whole = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.tree.map(
        lambda a: jax.device_put(a, sharding if a.ndim and a.shape[0] % 8 == 0 and len(spec) <= a.ndim else whole), tree
    )


def save(run, *numbers):
    with RunFolder(run, Retention(keep_last=10)) as folder:
        for number in numbers:
            folder.save(number, CONFIG, PARAMS, state(number))


def damage(run, batches):
    file = run / "checkpoints" / f"{batches:08d}" / "state" / "state.npz"
    file.write_bytes(file.read_bytes()[:-300])
    return file


def test_a_state_comes_back_bit_for_bit_in_its_own_structure(tmp_path):
    save(tmp_path, 3)
    with RunFolder(tmp_path) as folder:
        assert folder.resume(state())[0] == 3
        restored = folder.restore(3, state())
        shapes = jax.eval_shape(state)
        by_shapes = folder.restore(3, shapes._replace(inner=shapes.inner._replace(count=np.zeros(3, int))))
    same(restored, state(3))
    assert isinstance(restored.inner.count, np.ndarray)
    same(by_shapes, state(3))
    assert jax.random.key_impl(by_shapes.inner.keys) == "threefry2x32"
    assert not restored.batches.committed  # as the template's


@pytest.mark.parametrize(("there", "here"), [(("devices",), (None, "devices")), ((), ("devices",)), (("devices",), ())])
def test_a_sharded_state_comes_back_in_another_sharding(tmp_path, there, here):
    template = spread(state()._replace(inner=None), PartitionSpec(*here))
    with RunFolder(tmp_path) as folder:
        folder.save(1, CONFIG, PARAMS, spread(state(1)._replace(inner=None), PartitionSpec(*there)))
        folder.wait()
        restored = folder.restore(1, template)
    same(restored, state(1)._replace(inner=None))
    assert [a.sharding for a in jax.tree.leaves(restored)] == [a.sharding for a in jax.tree.leaves(template)]


def test_saved_state_is_that_of_the_call(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda a: a + 1, tree), donate_argnums=0)
    tree = {"a": jnp.arange(200_000.0), "b": np.zeros(5, np.float32)}
    template = jax.tree.map(np.zeros_like, tree)
    with RunFolder(tmp_path) as folder:
        folder.save(1, CONFIG, PARAMS, tree)
        tree["b"] += 7
        for _ in range(5):
            tree = step(tree)
        folder.wait()
        restored = folder.restore(1, template)
    np.testing.assert_array_equal(restored["a"], np.arange(200_000, dtype=np.float32))
    np.testing.assert_array_equal(restored["b"], np.zeros(5))


def test_a_restored_state_may_be_donated(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.save(1, CONFIG, PARAMS, {"a": jnp.arange(1e5)})
        folder.wait()
        restored = folder.restore(1, {"a": jnp.zeros(100_000)})
        again = folder.restore(1, {"a": jnp.zeros(100_000)})
    for _ in range(4):
        restored = jax.jit(lambda tree: jax.tree.map(lambda a: a * 2, tree), donate_argnums=0)(restored)
    np.testing.assert_array_equal(again["a"], np.arange(1e5, dtype=np.float32))
    np.testing.assert_array_equal(restored["a"], 16 * np.arange(1e5, dtype=np.float32))


def test_a_checkpoint_of_a_run_loads_as_a_model(tmp_path):
    save(tmp_path, 5, 20)
    with RunFolder(tmp_path) as folder:
        folder.mark_best(5, 1.5)
    assert resolve(tmp_path) == tmp_path / "checkpoints" / "00000020"
    model = cm_jax.load(str(tmp_path / "checkpoints" / "00000005"))
    assert model.config == cm_jax.load(tmp_path).config == CONFIG
    assert jax.tree.all(jax.tree.map(np.array_equal, model.params, PARAMS))


def test_a_run_without_checkpoints_is_no_model(tmp_path):
    RunFolder(tmp_path).close()
    with pytest.raises(InputError, match="no checkpoint yet"):
        cm_jax.load(tmp_path)


def test_another_state_is_refused_with_all_that_differs(tmp_path):
    save(tmp_path, 1)
    other = state()
    other.params["stem"] |= {"kernel": jnp.zeros((16, 9)), "extra": jnp.zeros(2)}
    other = other._replace(batches=jnp.float32(0), target={"w": jnp.zeros(1)}, ema={})
    with RunFolder(tmp_path) as folder, pytest.raises(InputError) as caught:
        folder.resume(other)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "checkpoints"))
    assert "params/stem/kernel: float32 [16, 8] in the file, float32 [16, 9] in this run" in message
    assert "batches: int32 [] in the file, float32 [] in this run" in message
    assert "missing: params/stem/extra float32 [2]" in message
    assert "missing: target/w" in message
    assert "unknown: ema/0.99/half bfloat16 [16, 8]" in message


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.float8_e4m3fn, bool, np.uint8, np.float64])
def test_arrays_of_every_type_and_of_no_size(tmp_path, dtype):
    tree = [np.arange(6).astype(dtype).reshape(2, 3).T, np.zeros((0, 3), dtype), np.ones((), dtype)]
    state_io.write(tmp_path / "s", state_io.named_arrays(tree, state_io.to_host(tree)))
    same(state_io.read(tmp_path / "s", tree), tree)


def test_retention_keeps_the_configured_checkpoints(tmp_path):
    hours = {batches: 3600.0 * batches / 100 for batches in range(100, 1300, 100)}

    def kept(retention, best=None):
        return sorted(set(hours) - set(retention.to_remove(hours, 1200, best)))

    assert kept(Retention(2)) == [1100, 1200]
    assert kept(Retention(1, keep_every=500)) == [500, 1000, 1200]
    assert kept(Retention(1, keep_hours=4)) == [100, 500, 900, 1200]
    assert kept(Retention(1), best=300) == [300, 1200]
    assert Retention(2).to_remove(hours, 600, None) == [100, 200, 300, 400]
    for bad in ({"keep_last": 0}, {"keep_every": -1}, {"keep_hours": -1.0}):
        with pytest.raises(InputError):
            Retention(**bad)


def test_old_checkpoints_are_removed_except_the_best(tmp_path):
    with RunFolder(tmp_path, Retention(keep_last=2, keep_every=30)) as folder:
        for number in (10, 20, 30, 40, 50, 60, 70):
            folder.save(number, CONFIG, PARAMS, {"a": np.float32(number)})
            if number == 20:
                folder.mark_best(20, 3.0)
        with pytest.raises(InputError, match="no checkpoint after 40"):
            folder.mark_best(40, 2.0)
        assert folder.steps() == [20, 30, 60, 70]
        assert folder.latest() == 70
        assert folder.best() == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "best.json", "checkpoints"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4
