"""Run folders: states are restored bitwise identical, and no checkpoint is lost when a process ends."""

import logging
import os
import resource
import socket
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import cm_jax
from cm_jax.checkpoints import native
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.checkpoints.resolve import resolve
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning
from cm_jax.errors import InputError
from cm_jax.networks import ADMUNet
from cm_jax.training.run import state_io
from cm_jax.training.run.folder import Retention, RunFolder
from tests.support import ROOT

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


def test_a_flipped_bit_is_found_out(tmp_path):
    save(tmp_path, 1)
    file = tmp_path / "checkpoints" / "00000001" / "state" / "state.npz"
    content = bytearray(file.read_bytes())
    content[content.find(np.asarray(state(1).params["stem"]["kernel"]).tobytes()) + 100] ^= 4
    file.write_bytes(content)
    with RunFolder(tmp_path) as folder, pytest.raises(InputError, match="CRC"):
        folder.restore(1, state())


def test_a_damaged_checkpoint_is_passed_over_and_kept(tmp_path, caplog):
    save(tmp_path, 1, 2, 3)
    file = damage(tmp_path, 3)
    with RunFolder(tmp_path, Retention(keep_last=1)) as folder:
        with caplog.at_level(logging.WARNING):
            batches, restored = folder.resume(state())
        assert batches == 2
        same(restored, state(2))
        (line,) = caplog.messages
        assert str(file) in line
        assert "after 2 batches" in line
        assert folder.steps() == [1, 2, 3]
        damage(tmp_path, 2)
        damage(tmp_path, 1)
        with pytest.raises(InputError, match=r"All checkpoints in .* are damaged"):
            folder.resume(state())


def test_a_damaged_checkpoint_is_replaced_when_the_run_comes_there_again(tmp_path):
    save(tmp_path, 1, 2)
    damage(tmp_path, 2)
    with RunFolder(tmp_path, Retention(keep_last=1)) as folder:
        assert folder.resume(state())[0] == 1
        folder.save(2, CONFIG, PARAMS, state(2))
        folder.wait()
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000002"]
        same(folder.restore(2, state()), state(2))


def test_killed_between_the_two_renames_of_a_replacement(tmp_path):
    save(tmp_path, 1, 2)
    place = tmp_path / "checkpoints" / "00000002"
    place.rename(place.with_name(".cm_jax-replaced-00000002"))
    (place.with_name(".cm_jax-00000002") / "params").mkdir(parents=True)
    with RunFolder(tmp_path) as folder:
        same(folder.resume(state())[1], state(2))
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["00000001", "00000002"]


def test_a_checkpoint_after_a_damaged_one_is_kept(tmp_path):
    save(tmp_path, 1, 4)
    damage(tmp_path, 4)
    with RunFolder(tmp_path, Retention(keep_last=1)) as folder:
        folder.resume(state())
        folder.save(3, CONFIG, PARAMS, state(3))
        folder.wait()
        assert folder.resume(state())[0] == 3


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


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.save(1, CONFIG, PARAMS, state(1))
        folder.wait()
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        try:
            folder.save(2, CONFIG, PARAMS, state(2))
            with pytest.raises(InputError, match=r"after 2 batches could not be saved.*after 1 batches is kept"):
                folder.save(3, CONFIG, PARAMS, state(3))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000001"]
        folder.save(2, CONFIG, PARAMS, state(2))
        folder.wait()
        same(folder.resume(state())[1], state(2))


@pytest.mark.parametrize("at", ["write", "fsync", "rename"])
def test_a_failure_at_any_point_leaves_the_old_ones(tmp_path, monkeypatch, at):
    import cm_jax.training.run.folder as module

    def fail(*_):
        raise OSError(28, "No space left on device")

    with RunFolder(tmp_path) as folder:
        folder.save(1, CONFIG, PARAMS, state(1))
        folder.wait()
        where = {"write": (state_io, "write"), "fsync": (module, "fsync_tree"), "rename": (module, "fsync_path")}[at]
        monkeypatch.setattr(*where, fail)
        folder.save(2, CONFIG, PARAMS, state(2))
        with pytest.raises(InputError, match="No space left on device"):
            folder.close()
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == ({"00000001"} if at != "rename" else {"00000001", "00000002"})


def test_an_error_of_the_loop_is_not_hidden_and_the_save_is_finished(tmp_path):
    def loop():
        with RunFolder(tmp_path) as folder:
            folder.save(1, CONFIG, PARAMS, state(1))
            raise KeyError

    with pytest.raises(KeyError):
        loop()
    with RunFolder(tmp_path) as folder:
        same(folder.restore(1, state()), state(1))


def test_a_folder_that_cannot_be_one(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Cannot train in"):
        RunFolder(tmp_path / "file")
    with pytest.raises(InputError, match="Cannot train in"):
        RunFolder("/proc/nothing")


LOOP = """
import os, random, signal, sys, time
import numpy as np, jax
import orbax.checkpoint
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.networks import ADMUNet
from cm_jax.diffusion.noise_schedule import KarrasSchedule
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning
from cm_jax.training.run.folder import Retention, RunFolder

SIZE = 300_000
CONFIG = ModelConfig(ADMUNet(), ConsistencyPreconditioning(), num_levels=18)

def train(run, say):
    template = {"a": np.zeros(SIZE, np.float32), "b": {"c": np.zeros((), np.int32)}}
    with RunFolder(run, Retention(keep_last=2)) as folder:
        left = [path.name for path in (folder.path / "checkpoints").iterdir() if path.name.startswith(".")]
        done, state = folder.resume(template) or (0, template)
        assert not left and np.all(state["a"] == done) and state["b"]["c"] == done, (left, done, state)
        assert folder.latest() in (None, done)
        say(f"ready {done}")
        while True:
            done += 1
            state = {"a": np.full(SIZE, done, np.float32), "b": {"c": np.int32(done)}}
            folder.save(done, CONFIG, {"w": state["a"][:1000]}, state)
            if done > 1:
                say(f"saved {done - 1}")
"""


def child(script, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    process = child(LOOP + "train(sys.argv[1], lambda line: print(line, flush=True))", str(tmp_path))
    try:
        assert process.stdout.readline().startswith("ready")
        with pytest.raises(InputError, match=rf"Another process \(pid {process.pid} on .*, since .* UTC\) trains in"):
            RunFolder(tmp_path)
    finally:
        process.kill()
        process.communicate()
    with RunFolder(tmp_path), pytest.raises(InputError, match=f"pid {os.getpid()}"):
        RunFolder(tmp_path)
    RunFolder(tmp_path).close()


KILLER = r"""
moments = random.Random(int(sys.argv[2]))
sure = 0
for _ in range(13):
    here, there = os.pipe()
    pid = os.fork()  # nothing has used a device or a thread yet
    if pid == 0:
        try:
            train(sys.argv[1], lambda line: os.write(there, (line + "\n").encode()))
        except BaseException as error:
            os.write(there, f"failed {error!r}\n".encode())
        os._exit(1)
    os.close(there)
    with os.fdopen(here) as lines:
        while not (line := lines.readline()).startswith(("ready", "failed")):
            pass
        assert line.startswith("ready"), line
        done = int(line.split()[1])
        assert sure <= done <= sure + 1, (sure, done)
        time.sleep(moments.uniform(0, 0.6))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        half = any(name.startswith(".") for name in os.listdir(sys.argv[1] + "/checkpoints"))
        rest = lines.read().split("\n")
    assert not any(line.startswith("failed") for line in rest), rest
    sure = max([done, *(int(line.split()[1]) for line in rest if line.startswith("saved") and line in rest[:-1])])
    print("killed", done, sure, half, flush=True)
"""


def test_killed_at_random_moments_the_newest_checkpoint_is_whole(tmp_path):
    process = child(LOOP + KILLER, str(tmp_path), "0")
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    kills = [line.split() for line in output.splitlines()]
    assert len(kills) == 13
    assert int(kills[-1][1]) > 3
    assert sum(half == "True" for *_, half in kills) > 3, "too few died while they wrote"


PROCESS = """
import sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
me, port, run = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=me)
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from cm_jax.errors import InputError
from cm_jax.training.run import state_io
from cm_jax.training.run.metrics_log import MetricsLog
from cm_jax.training.run.folder import Retention, RunFolder
from tests.runs.test_run_folder import CONFIG, PARAMS
mesh = Mesh(np.array(jax.devices()), ("data",))
numbers = np.arange(32, dtype=np.float32).reshape(8, 4)

def put(array, *spec):
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, P(*spec)), lambda index: array[index])

tree = {"rows": put(numbers, "data"), "columns": put(numbers + 1, None, "data"), "all": put(numbers + 2)}
tree |= {"half": put(numbers.astype(jnp.bfloat16), "data"), "here": jnp.int32(5)}
params = jax.tree.map(put, PARAMS)
with RunFolder(run) as folder:
    MetricsLog(folder.path, tensorboard=False).metrics(1, {"loss": 1.0})
    folder.save(1, CONFIG, params, tree)
    folder.save(2, CONFIG, params, tree)
    folder.wait()
    wanted = dict(tree, rows=put(0 * numbers, None, "data"), all=put(0 * numbers, "data"))
    batches, restored = folder.resume(wanted)
    assert batches == 2
    for name in tree:
        assert restored[name].sharding == wanted[name].sharding
        for shard in restored[name].addressable_shards:
            expected = {"rows": numbers, "columns": numbers + 1, "all": numbers + 2, "half": numbers}.get(name)
            expected = np.int32(5) if expected is None else expected[shard.index]
            np.testing.assert_array_equal(np.asarray(shard.data), expected)

    def fail(*_):
        raise OSError(28, "No space left on device")

    write, state_io.write = state_io.write, fail
    folder.save(3, CONFIG, params, tree)
    try:
        folder.save(4, CONFIG, params, tree)
        raise SystemExit("it ran ahead of a failed save")
    except InputError as error:
        assert "No space left" in str(error), error
        assert str(error).startswith("process 0: ") == (me == 1)
    state_io.write = write
    folder.save(3, CONFIG, params, tree)
    folder.wait()
    assert folder.latest() == 3
try:
    RunFolder("/proc/nothing")
except InputError as error:
    print("refused", me, error)
"""


def test_two_processes_save_and_restore_together(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = [child(PROCESS, str(me), port, str(tmp_path)) for me in (0, 1)]
    try:
        done = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (output, errors) in zip(processes, done, strict=True):
        assert process.returncode == 0, errors
        assert "Cannot train in /proc/nothing" in output
    assert (tmp_path / "metrics.csv").read_text() == "batches,loss\n1,1\n"
    with RunFolder(tmp_path) as folder:
        assert folder.steps() == [1, 2, 3]
    jax.tree.map(np.testing.assert_array_equal, native.restore(tmp_path / "checkpoints" / "00000003")[1], PARAMS)
