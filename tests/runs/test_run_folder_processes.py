"""Run folders of several processes: locked, killed while they write, and written together."""

import dataclasses
import functools
import itertools
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import cm_jax
from benchmarks.hlo import collectives_with_groups
from cm_jax.checkpoints import native
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.data import NpzData
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning
from cm_jax.errors import InputError
from cm_jax.evaluation.evaluate import EvalConfig, evaluate
from cm_jax.evaluation.image_sets import of_model
from cm_jax.io.images import quantize
from cm_jax.model import Model
from cm_jax.parallelism import OneDevice, Sharded
from cm_jax.parallelism.processes import from_all
from cm_jax.training import loop
from cm_jax.training.config import TrainConfig
from cm_jax.training.loop import train
from cm_jax.training.run.folder import RunFolder
from cm_jax.training.run.metrics_log import MetricsLog
from cm_jax.training.setup import TrainingSetup, prepare
from tests.laws.test_evaluation import image_set, toy_extractor
from tests.laws.test_training_devices import compiled
from tests.runs.test_run_folder import PARAMS
from tests.support import ROOT
from tests.tiny import PARAMS as TINY_PARAMS
from tests.tiny import Tiny
from tests.toy import ToyNetwork

LOOP = """
import os, random, signal, sys, time
from pathlib import Path
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
names = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")

def kill_before(operation):
    left = operation

    def hook(name, arguments):
        nonlocal left
        if name in names and sys.argv[1] in str(arguments[0]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)

sure = 0
for operation in range(1, 130, 3):
    here, there = os.pipe()
    pid = os.fork()  # nothing has used a device or a thread yet
    if pid == 0:
        try:
            kill_before(operation)
            train(sys.argv[1], lambda line: os.write(there, (line + "\n").encode()))
        except BaseException as error:
            os.write(there, f"failed {error!r}\n".encode())
        os._exit(1)
    os.close(there)
    with os.fdopen(here) as lines:
        said = [line.split() for line in lines]
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert all(kind in ("ready", "saved") for kind, _ in said), said
    done = [int(number) for _, number in said]
    assert not done or sure <= done[0] <= sure + 1, (sure, done)
    sure = max([sure, *done])
    half = any(Path(sys.argv[1]).glob("checkpoints/.*"))
    print("killed", sure, half, flush=True)
"""


def test_killed_before_any_file_operation_the_newest_checkpoint_is_whole(tmp_path):
    process = child(LOOP + KILLER, str(tmp_path))
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    kills = [line.split() for line in output.splitlines()]
    assert len(kills) == 43
    assert int(kills[-1][1]) > 30, "too few checkpoints were completed"
    assert sum(half == "True" for *_, half in kills) > 10, "too few died while they wrote"


PROCESS = """
import sys
from pathlib import Path
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
me, port, run = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=me)
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from cm_jax.cli import sample
from cm_jax.errors import InputError
from cm_jax.parallelism import DataMesh
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
assert len(jax.tree.leaves(state_io.to_host(tree, needed=me == 0))) == (len(tree) if me == 0 else 0)
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
from tests.runs.test_run_folder_processes import check_exchange, check_sharded_program, check_training, scores
check_exchange(me)
check_sharded_program()
check_training(me, Path(f"{run}-training"))
arguments = ["emoji16_cd", "--count", "5", "--seed", "3", "--output", f"{run}/samples.npz", "--parallel", "mesh"]
sample.main("sample", [*arguments, "--compilation-cache", "off"])
print("scores", scores(DataMesh(local=True), shared=True))
try:
    RunFolder("/proc/nothing")
except InputError as error:
    print("refused", me, error)
"""


def scores(parallelism, *, shared):
    """FID, KID and IS of 200 samples, computed by this process or by all together."""
    model = Model(ModelConfig(Tiny(), ConsistencyPreconditioning(), num_levels=18), TINY_PARAMS, parallelism)
    extractor = dataclasses.replace(toy_extractor(), parallelism=parallelism, shared=shared, batch_size=32)
    calls = []
    samples = of_model(model, model.plan(steps=2), 200, batch_size=16)

    def read(first, last):
        calls.append((first, last))
        return samples.read(first, last)

    config = EvalConfig(("fid", "kid", "is"), kid_subset_size=50)
    report, _ = evaluate(extractor, dataclasses.replace(samples, read=read), image_set(0, 100)[0], config)
    me = jax.process_index()
    assert calls == ([[(0, 128)], [(128, 200)]][me] if shared else [(0, 200)])
    return list(report.values.values())


def check_exchange(me):
    """Arrays arrive bitwise in the order of processes; an error of one process is an error of all."""
    own = {"a": np.pi * np.arange(me + 2, dtype=np.float64)} | ({"b": np.int64([2**40])} if me else {})
    first, second = from_all(own)
    assert first.keys() == {"a"}
    np.testing.assert_array_equal(first["a"], np.pi * np.arange(2))
    np.testing.assert_array_equal(second["a"], np.pi * np.arange(3))
    assert second["a"].dtype == np.float64
    assert second["b"] == 2**40
    damaged = dataclasses.replace(toy_extractor(), shared=True)
    images = dataclasses.replace(image_set(0, 100)[0], read=fails if me else image_set(0, 100)[0].read)
    with pytest.raises(InputError, match="disk"):
        evaluate(damaged, images, image_set(1, 100)[0])
    cached = dataclasses.replace(damaged, cache=Path("/proc/nothing"))  # the reference is read for its name
    with pytest.raises(InputError, match="disk"):
        evaluate(cached, image_set(1, 100)[0], images)


def fails(first, last):
    raise InputError("The disk is broken.")


def check_training(me, folder):
    """An error in one process, and different settings or data, are errors in both."""
    cm_jax.register(ToyNetwork)
    folder.mkdir(exist_ok=True)
    same, own, absent = (NpzData(str(folder / f"{name}{me}.npz")) for name in ("same", "own", "absent"))
    for data, level in ((same, 0), (own, me), *([] if me else [(absent, 0)])):
        np.savez(data.path, arr_0=np.full((16, 4, 4, 3), level, np.uint8))
    config = TrainConfig(
        data=same,
        network=ToyNetwork(classes=None, width=8),
        parallel="mesh",
        batch_size=8,
        images=8 * 40,
    )
    differ = "  data: process 1\n  seed: process 1\n  initial parameters: process 1"
    for changes, message in (({"data": absent}, r"absent1\.npz"), ({"data": own, "seed": me}, differ)):
        with pytest.raises(InputError, match=message):
            train(dataclasses.replace(config, **changes), folder / "run")
        assert not (folder / "run").exists()

    dispatches, program = TrainingSetup.dispatches, prepare(config).compiled()

    def fails_in_the_third(setup, start, stop):
        yield from itertools.islice(dispatches(setup, start, stop), 2)
        fails(start, stop)

    TrainingSetup.compiled = lambda setup: program
    loop.MetricsLog = functools.partial(MetricsLog, tensorboard=False)  # it imports PyTorch
    with pytest.raises(InputError, match="disk"):
        train(config, folder / "run", log=fails)
    if me:
        TrainingSetup.dispatches = fails_in_the_third
    with pytest.raises(InputError, match="disk" if me else "process 1: .* disk"):
        train(dataclasses.replace(config, checkpoint_every=4), folder / "run")
    assert not native.run_checkpoints(folder / "run")


def check_sharded_program():
    """Two processes of two devices: parameters are gathered within each process."""
    found = collectives_with_groups(compiled(Sharded(shards=2), 8))
    gathers = {each.groups for each in found if each.kind == "all-gather"}
    assert gathers == {frozenset({frozenset({0, 1}), frozenset({2, 3})})}


def test_two_processes_save_restore_and_evaluate_together(tmp_path, unchecked_types):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = [child(PROCESS, str(me), port, str(tmp_path)) for me in (0, 1)]
    try:
        done = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (output, errors) in zip(processes, done, strict=True):
        assert process.returncode == 0, errors
        assert "Cannot train in /proc/nothing" in output
    together = [json.loads(re.search(r"scores (.*)", output)[1]) for output, _ in done]
    assert together[0] == together[1]
    np.testing.assert_allclose(together[0], scores(OneDevice(), shared=False), rtol=1e-5)
    images = quantize(cm_jax.load("emoji16_cd").sample(3, 5)).astype(int)
    np.testing.assert_allclose(np.load(tmp_path / "samples.npz")["arr_0"], images, atol=1)
    assert ["Wrote" in output for output, _ in done] == [True, False]
    assert (tmp_path / "metrics.csv").read_text() == "batches,loss\n1,1\n"
    with RunFolder(tmp_path) as folder:
        assert folder.steps() == [1, 2, 3]
    jax.tree.map(np.testing.assert_array_equal, native.restore(tmp_path / "checkpoints" / "00000003")[1], PARAMS)
