"""Real processes: killed at any moment, and several that train together."""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.support import ROOT

SMALL = [
    *("--network", "toy-network", "--network.image-size", "8", "--network.classes", "9", "--network.width", "32"),
    *("--batch-size", "8", "--sample-every", "1000000", "--ema-decay", "0.99", "--keep-last", "2"),
]

BROKEN = ("--images", "280", "--checkpoint-every", "7", "--log-every", "2")
"""35 batches, with checkpoints after 7, 14, 21, 28 and 35, of which two are kept."""
KILLS = [
    # file operation, part of a path, which of them; batches after which the process began
    ("open", "metrics.csv", 5, 0),  # before the first checkpoint, with rows in the log
    ("open", "state.npz", 1, 0),  # while a checkpoint is written
    ("os.rename", "00000014", 1, 0),  # when the second one is complete, but has no name
    ("os.rename", "00000007", 1, 7),  # when the third one is complete, and the first is about to be removed
    ("shutil.rmtree", "00000007-removed", 2, 21),  # when the first one is renamed, but not removed
]
QUICK = """
import sys

class WithoutTorch:  # tensorboardX would import it
    def find_spec(self, name, *_):
        if name == "torch":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, WithoutTorch())
import cm_jax
from cm_jax.cli import main_train
from cm_jax.training import loop
from tests.toy import ToyNetwork
loop.plot = lambda run: None
cm_jax.register(ToyNetwork)
"""
"""Plots, PyTorch and compiling a U-Net take most of the time of such a short run."""
KILLED = """
import os, signal, sys
event, part, number = sys.argv[1], sys.argv[2], int(sys.argv[3])

def kill(name, arguments):
    global number
    if name == event and any(part in str(argument) for argument in arguments[:2]):
        number -= 1
        if number == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.argv[1:] = sys.argv[4:]
sys.addaudithook(kill)
main_train()
"""
"""Trains, and kills its own process before a file operation."""


def begin(folder, cache, *words, devices=1, launcher=(), program=("-c", QUICK + "main_train()")):
    environment = (
        os.environ
        | dict(launcher)
        | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
        }
    )
    command = [sys.executable, *program, "emoji32-edm", "--run", str(folder), *SMALL, *words]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder.parent
    )


def finish(child):
    output, _ = child.communicate(timeout=600)
    assert child.returncode == 0, output
    return output


def arrays(folder, batches):
    with np.load(folder / "checkpoints" / f"{batches:08d}" / "state" / "state.npz") as state:
        return {name: state[name] for name in state.files if name != "leaves.json"}


def rows(folder):
    """metrics.csv without the speed, which is the last column."""
    return [line.rsplit(",", 1)[0] for line in (folder / "metrics.csv").read_text().splitlines()]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


def test_a_killed_run_becomes_the_unbroken_one(tmp_path, cache):
    """SIGKILL at every kind of moment: the arrays of the last checkpoint and the log are the same to the last bit.

    What a killed process leaves are its files, so the moments are those between file operations.
    """
    folder, unbroken = tmp_path / "run", tmp_path / "unbroken"
    (tmp_path / "toys.py").write_text("import cm_jax, tests.toy\ncm_jax.register(tests.toy.ToyNetwork)\n")
    finish(begin(unbroken, cache, *BROKEN, program=(str(ROOT / "train.py"), "--import", "toys")))
    for event, part, number, reached in KILLS:
        child = begin(folder, cache, *BROKEN, program=("-c", QUICK + KILLED, event, part, str(number)))
        output, _ = child.communicate(timeout=600)
        assert child.returncode == -signal.SIGKILL, output
        assert (f"Resuming after batch {reached}:" if reached else "Starting:") in output
    last = finish(begin(folder, cache, *BROKEN))
    assert "Resuming after batch 28:" in last
    assert "Finished: 35 batches" in last
    ours, theirs = arrays(folder, 35), arrays(unbroken, 35)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert rows(folder) == rows(unbroken)
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["00000028", "00000035"]


def test_sigterm_saves_and_exits_0_and_a_second_process_is_refused(tmp_path, cache):
    folder = tmp_path / "run"
    child = begin(folder, cache, "--images", "100000000", "--checkpoint-every", "1000000")
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("batch "):
            break
    other = begin(folder, cache, "--images", "100000000", "--checkpoint-every", "1000000")
    refused, _ = other.communicate(timeout=600)
    assert other.returncode == 2
    assert re.search(rf"error: Another process \(pid {child.pid} on .*\) trains in ", refused)
    child.send_signal(signal.SIGTERM)
    output = finish(child)
    stopped = re.search(r"Stopped by SIGTERM after (\d+) of", output)
    assert stopped
    assert (folder / "checkpoints" / f"{int(stopped[1]):08d}" / "state").is_dir()


def free_port():
    """A free port among the last 4096, from which JAX chooses under Slurm and Open MPI."""
    for port in random.sample(range(61440, 65536), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise AssertionError("no free port")


def flags(process, port):
    return ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process", str(process)], {}


def slurm(process, port):
    """What `srun --nodes 1 --ntasks 2` sets; JAX derives the port from the job's number."""
    job = {"SLURM_JOB_ID": str(4096 * 5 + port - 61440), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    return ["--distributed", "auto"], job | {"SLURM_PROCID": str(process), "SLURM_LOCALID": str(process)}


def open_mpi(process, port):
    """What `mpirun -n 2` of Open MPI 4 sets; JAX derives the port from the job's number, a multiple of 4096."""
    job = {"OMPI_MCA_orte_hnp_uri": f"{4096 * (port - 61440)}.0;tcp://127.0.0.1,10.0.0.1:34911"}
    rank = {"OMPI_COMM_WORLD_RANK": str(process), "OMPI_COMM_WORLD_LOCAL_RANK": str(process)}
    return ["--distributed", "auto"], job | {"OMPI_COMM_WORLD_SIZE": "2"} | rank


TOGETHER = ("--images", "160", "--checkpoint-every", "20", "--log-every", "1")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, cache):
    """A run of one process on one device."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    finish(begin(folder, cache, *TOGETHER))
    return folder


@pytest.mark.parametrize(("parallel", "launch"), [("pmap", slurm), ("mesh", flags), ("sharded --shards 2", open_mpi)])
def test_two_processes_are_one(parallel, launch, tmp_path, cache, alone):
    """Two processes of two devices each, on loopback, and one process of one device: the same loss over 20 steps."""
    port = free_port()
    together = tmp_path / "two"
    children = []
    for process in range(2):
        how, launcher = launch(process, port)
        children.append(
            begin(together, cache, *TOGETHER, "--parallel", *parallel.split(), *how, devices=2, launcher=launcher)
        )
    outputs = [finish(child) for child in children]
    assert "4 x cpu" in outputs[0]
    losses = [np.array([float(line.split(",")[3]) for line in rows(folder)[1:]]) for folder in (together, alone)]
    assert (rows(alone)[0]).split(",")[3] == "loss"
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    ours, theirs = arrays(together, 20), arrays(alone, 20)
    assert max(np.abs(ours[name] - theirs[name]).max() for name in ours) < 1e-5
