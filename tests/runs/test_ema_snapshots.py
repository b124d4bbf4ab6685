"""Snapshots of power-function EMAs in runs, and EMAs of other widths that are reconstructed from them."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import cm_jax
from cm_jax.checkpoints.post_hoc_ema import SNAPSHOTS, reconstruct, snapshots
from cm_jax.checkpoints.published import resolve
from cm_jax.checkpoints.state_archive import STATE
from cm_jax.diffusion.curricula import Halving
from cm_jax.errors import InputError
from cm_jax.objectives import ProgressiveDistillation
from cm_jax.training.config import TrainConfig
from cm_jax.training.ema import PowerEMA
from cm_jax.training.run.folder import Retention, RunFolder
from cm_jax.training.step import TrainState
from tests.runs.test_weights_of_checkpoints import CONFIG, full, outputs, value

STEPS, EVERY, SKIPPED = 60, 10, 2
WIDTHS = (0.05, 0.1, 0.07)


def trajectory():
    """{step: (parameters, {width: EMA})} of a scalar."""
    emas, found = dict.fromkeys(WIDTHS, 0.0), {}
    for step in range(STEPS):
        params = 5 * np.exp(-step / 20) + np.sin(step / 7)
        for width in WIDTHS:
            beta = 1 - float(PowerEMA(width).weight_at(step))
            emas[width] = beta * emas[width] + (1 - beta) * params
        found[step + 1] = (params, dict(emas))
    return found


PATH = trajectory()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with snapshots and its last two checkpoints; two of the first batches were skipped."""
    path, zero = tmp_path_factory.mktemp("runs") / "run", jnp.int32(0)
    with RunFolder(path, Retention(keep_last=2)) as folder:
        for step in range(EVERY, STEPS + 1, EVERY):
            params, emas = PATH[step]
            trees = {f"power_{width}": full(emas[width]) for width in (0.05, 0.1)} | {"exponential_0.9": full(0.0)}
            batches = jnp.int32(step + SKIPPED)
            state = TrainState(batches, jnp.int32(SKIPPED), zero, full(params), full(0.0), None, None, trees)
            folder.save(step + SKIPPED, CONFIG, full(0.0), state, snapshot=step < STEPS)
    return path


def test_snapshots_hold_the_power_emas_alone(run):
    files = sorted(file.name for file in (run / SNAPSHOTS).iterdir())
    assert files == [f"{step + SKIPPED:08d}.npz" for step in range(EVERY, STEPS, EVERY)]
    with np.load(run / SNAPSHOTS / files[0]) as file:
        tops = {"/".join(name.split("/")[:2]) for name in file.files}
    assert tops == {"leaves.json", "batches", "skipped", "ema/power_0.05", "ema/power_0.1"}
    assert len(snapshots(resolve(run))) == 2 * STEPS // EVERY  # also of the checkpoints


def test_load_reconstructs_another_width(run, caplog):
    with caplog.at_level("INFO", "cm_jax"):
        model = cm_jax.load(run, ema="power_0.07")
    assert value(model.params) == pytest.approx(PATH[STEPS][1][0.07], abs=0.01)
    assert "reconstructed after 62 batches from power_0.05, power_0.1 at 6 times; relative residual" in caplog.text
    assert "Warning" not in caplog.text
    assert value(cm_jax.load(run, ema="power_0.1").params) == pytest.approx(PATH[STEPS][1][0.1], rel=1e-6)


@pytest.mark.parametrize(("width", "step"), [(0.05, 60), (0.1, 60), (0.05, 40), (0.1, 30), (0.07, 40)])
def test_reconstruction_at_each_snapshot(run, width, step):
    found = reconstruct(resolve(run), width, step + SKIPPED)
    tolerance = 0.02 if width == 0.07 else 2e-6
    assert value(found.params) == pytest.approx(PATH[step][1][width], abs=tolerance)
    assert sum(found.combination.weights) == pytest.approx(1)


def test_a_width_beyond_the_snapshots_has_a_warning(run):
    *_, warning = reconstruct(resolve(run), 0.01).notes
    assert "Warning: the residual is above 5%" in warning
    assert "express widths between 0.0" in warning


def test_the_command_writes_checkpoints(run, tmp_path, capsys):
    found = outputs(capsys, "reconstruct-ema", run, "--width", "0.07", "--at", "42", "--output", tmp_path / "one")
    assert "relative residual" in found.out
    assert "cm-jax sample" in found.out
    assert value(cm_jax.load(tmp_path / "one").params) == pytest.approx(PATH[40][1][0.07], abs=0.02)
    outputs(capsys, "reconstruct-ema", run, "--width", "0.05,0.07", "--output", tmp_path / "two")
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["power_0.05", "power_0.07"]
    assert value(cm_jax.load(tmp_path / "two" / "power_0.05").params) == pytest.approx(PATH[STEPS][1][0.05], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--width", "0.3"), "Expected a relative width in"),
        (("--width", "x"), "--width must be numbers"),
        (("--width", ""), "Expected relative widths"),
        (("--width", "0.07", "--at", "41"), "has some after these numbers of batches: 12, 22, 32, 42, 52, 62."),
        (("--width", "0.05,0.5"), "Expected a relative width in"),
    ],
)
def test_impossible_reconstructions_leave_nothing(run, tmp_path, capsys, options, message):
    assert message in outputs(capsys, "reconstruct-ema", run, *options, "--output", tmp_path / "out").err
    assert not list(tmp_path.iterdir())


def test_checkpoints_without_snapshots(run, tmp_path, capsys):
    """One checkpoint has two widths at one time. Checkpoints without a state, and damaged files, are named."""
    shutil.copytree(resolve(run), tmp_path / "alone")
    *_, warning = reconstruct(tmp_path / "alone", 0.07).notes
    assert "Warning" in warning
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    file = damaged / SNAPSHOTS / "00000032.npz"
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(InputError, match=r"00000032.npz is damaged"):
        cm_jax.load(damaged, ema="power_0.07")
    with pytest.raises(InputError, match=r"power_0.1, .*or power_WIDTH of any width, reconstructed from snapshots"):
        cm_jax.load(run, ema="0.5")
    shutil.rmtree(tmp_path / "alone" / STATE.parent)
    said = outputs(capsys, "reconstruct-ema", tmp_path / "alone", "--width", "0.1", "--output", tmp_path / "out").err
    assert "Expected a training run or one of its checkpoints" in said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ema_snapshot_every": 10}, "needs two power-function EMAs, such as 0.05 and 0.1, got none"),
        ({"ema_snapshot_every": 10, "power_ema": (0.1, 0.1)}, "needs two power-function EMAs"),
        ({"ema_snapshot_every": -1}, "ema_snapshot_every must be"),
        (
            {"ema_snapshot_every": 9, "power_ema": (0.05, 0.1), "objective": ProgressiveDistillation(Halving(64, 100))},
            "restarts the EMAs in each stage",
        ),
    ],
)
def test_settings_without_use_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**settings)
    assert "--ema-snapshot-every N" in TrainConfig(power_ema=(0.05, 0.1)).snapshot_note
