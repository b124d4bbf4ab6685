"""What a run leaves to look at, and how it is asked to stop."""

import json
import logging
import math
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

import cm_jax
from cm_jax.errors import InputError
from cm_jax.training.run import plots, progress
from cm_jax.training.run.metrics_log import MetricsLog, read_metrics
from cm_jax.training.run.plots import plot, smoothed
from cm_jax.training.run.progress import Progress
from cm_jax.training.run.provenance import record_start
from cm_jax.training.run.signals import StopSignal
from tests.support import ROOT


def values(batches):
    return {"loss": np.float32(1 / batches), "learning_rate": 1e-4, "seen": np.int32(64 * batches)}


def write(run, start, end):
    with MetricsLog(run, start) as log:
        for batches in range(start + 1, end + 1):
            log.metrics(batches, values(batches) | ({"late": 0.5} if batches > 4 else {}))
            if batches % 2 == 0:
                log.samples(batches, Image.new("RGB", (8, 8), "red"))


def records(path):
    """Contents of a TFRecord file, without an incomplete last one: 8 bytes length, checksum, content, checksum."""
    with path.open("rb") as file:
        while len(head := file.read(12)) == 12:
            (length,) = struct.unpack("<Q", head[:8])
            rest = file.read(length + 4)
            if len(rest) < length + 4:
                return
            yield rest[:-4]


def events(run):
    """(tag, step) of everything that TensorBoard shows: the start of a session discards events from its step on."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = []
    for path in sorted((run / "tensorboard").iterdir()):
        for content in records(path):
            event = Event.FromString(content)
            if event.session_log.status == SessionLog.START:
                found = [(tag, step) for tag, step in found if step < event.step]
            found += [(value.tag, event.step) for value in event.summary.value]
    return sorted(found)


def test_an_interrupted_run_leaves_the_files_of_an_unbroken_one(tmp_path):
    write(tmp_path / "unbroken", 0, 8)
    write(tmp_path / "broken", 0, 7)
    with (tmp_path / "broken" / "metrics.csv").open("a") as file:
        file.write("8,0.12")  # killed within the line
    (event_file,) = (tmp_path / "broken" / "tensorboard").iterdir()
    torn = bytes([40, *[0] * 11, 9, *[0] * 12])
    event_file.write_bytes(event_file.read_bytes() + torn)
    write(tmp_path / "broken", 3, 5)
    write(tmp_path / "broken", 4, 8)
    ours, theirs = tmp_path / "broken", tmp_path / "unbroken"
    assert (ours / "metrics.csv").read_bytes() == (theirs / "metrics.csv").read_bytes()
    assert sorted(path.name for path in (ours / "samples").iterdir()) == [f"0000000{i}.png" for i in (2, 4, 6, 8)]
    assert events(ours) == events(theirs)
    assert ("late", 5) in events(ours)
    assert ("samples", 8) in events(ours)
    assert len(events(ours)) == 8 * 3 + 4 + 4


def test_rows_hold_the_measured_values(tmp_path):
    write(tmp_path, 0, 5)
    columns, rows = read_metrics(tmp_path / "metrics.csv")
    assert columns == ["batches", "loss", "learning_rate", "seen", "late"]
    assert rows[2] == ["3", "0.333333343", "0.0001", "192", ""]
    assert [np.float32(row[1]) for row in rows] == [np.float32(1 / batches) for batches in range(1, 6)]
    assert (tmp_path / "metrics.csv").read_text().endswith("0.5\n")
    with MetricsLog(tmp_path, 5) as log:
        log.metrics(6, {"late": math.nan})
    assert read_metrics(tmp_path / "metrics.csv")[1][-1] == ["6", "", "", "", "nan"]


def test_a_new_run_has_no_old_rows(tmp_path):
    write(tmp_path, 0, 3)
    with MetricsLog(tmp_path, 0, tensorboard=False) as log:
        log.metrics(1, {"other": 1})
    assert not list((tmp_path / "samples").iterdir())
    assert (tmp_path / "metrics.csv").read_text() == "batches,other\n1,1\n"


@pytest.mark.parametrize(
    "text", ["name,age\nx,3\n", "batches,loss\n1,2,3\n", "batches\nmany\n", "batches,loss\n1,low\n"]
)
def test_a_csv_that_is_not_ours_is_not_touched(tmp_path, text):
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(InputError, match=r"metrics\.csv is not the"):
        MetricsLog(tmp_path)
    assert (tmp_path / "metrics.csv").read_text() == text


def test_without_tensorboardx_and_matplotlib_a_line_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING), MetricsLog(tmp_path) as log:
        log.metrics(1, {"loss": 1.0})
        plot(tmp_path)
    assert [re.findall(r"pip install \w+", message) for message in caplog.messages] == [
        ["pip install tensorboardX"],
        ["pip install matplotlib"],
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv"]


def test_before_the_first_row_there_is_nothing_to_plot(tmp_path):
    """A checkpoint may come before `log_every` batches."""
    plot(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("names", [("loss",), ("loss", "loss_sigma_0", "loss_sigma_1", "gradient_norm"), ("other",)])
def test_plot_of_the_available_columns(tmp_path, names):
    with MetricsLog(tmp_path, tensorboard=False) as log:
        for batches in range(1, 30):
            log.metrics(batches, dict.fromkeys(names, math.nan if batches == 7 else 1 / batches))
    plot(tmp_path)
    assert (tmp_path / "loss.png").exists() == (names != ("other",))
    if names != ("other",):
        width, height = Image.open(tmp_path / "loss.png").size
        assert width == plots._WIDTH * plots._DPI
        assert height > 400
    assert "matplotlib.pyplot" not in sys.modules


def test_a_plot_of_one_row_and_of_none(tmp_path):
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.metrics(1, {"loss": -1.0})
    plot(tmp_path)
    pixels = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB"))
    assert (pixels == (31, 119, 180)).all(-1).sum() > 50  # a point in the color of the loss
    (tmp_path / "loss.png").unlink()
    (tmp_path / "metrics.csv").write_text("")
    plot(tmp_path)
    assert not (tmp_path / "loss.png").exists()


def test_smoothing_keeps_constants_and_straight_lines_and_bridges_gaps():
    line = np.arange(1000.0)
    np.testing.assert_allclose(smoothed(line)[20:-20], line[20:-20])
    gaps = np.where(np.arange(1000) % 7 == 0, np.nan, 3.0)
    np.testing.assert_allclose(smoothed(gaps), 3.0)
    noise = np.random.default_rng(0).normal(size=1000)
    assert np.std(smoothed(noise)[20:-20]) < 0.3


def test_lines_of_progress_come_now_and_then(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress(1000, 1100, batch_size=8, every=10) as shown:
        for done in range(1001, 1101):
            shown.update(done, loss=0.25)
            assert (shown.images_per_second is None) == (done == 1001)
            now[0] += 0.5
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "batch 1,001 of 1,100, loss 0.25"
    assert lines[1] == "batch 1,021 of 1,100, loss 0.25, 16 images/s, 0:00:40 left"
    assert lines[-1] == "batch 1,100 of 1,100, loss 0.25, 16 images/s, 0:00:00 left"
    assert len(lines) == 6


def test_every_start_is_recorded(tmp_path):
    record_start(tmp_path, 0, ["train.py", "emoji32-edm", "--name", "two words"])
    record_start(tmp_path, 300)
    first, second = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert shlex.split(first["command"])[-1] == "two words"
    assert second["command"] == shlex.join(sys.argv)
    assert [first["batches"], second["batches"]] == [0, 300]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", first["time"])
    assert first["versions"]["cm_jax"] == cm_jax.__version__
    assert {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"} <= set(first["versions"])
    assert first["devices"] == {"cpu": 8}
    assert first["environment"]["JAX_NUM_CPU_DEVICES"] == "8"
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    assert (first["commit"] or "").startswith(head.stdout.strip())
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.json cannot be read"):
        record_start(tmp_path, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_raises_the_flag_and_nothing_else(number):
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.signal == number.name
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_interrupt_kills_at_once():
    script = """
import os, signal, time
from cm_jax.training.run.signals import StopSignal
with StopSignal() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    print(stop.signal, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("alive", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGINT
    assert done.stdout == "SIGINT\n"
    assert "again to kill" in done.stderr


def test_in_another_thread_signals_are_left_alone():
    seen = []

    def work():
        with StopSignal() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def test_two_updates_at_once_do_not_shake_the_speed(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress(0, 100, batch_size=8) as shown:
        for done in range(1, 101):
            shown.update(done)
            now[0] += 1e-4 if done % 50 == 49 else 2 - 1e-4 if done % 50 == 0 else 1.0
            assert shown.images_per_second is None or 7 < shown.images_per_second < 9
