"""Run folders: damaged checkpoints are skipped, and a failed write loses no earlier checkpoint."""

import logging
import resource

import numpy as np
import pytest

from cm_jax.errors import InputError
from cm_jax.training.run import state_io
from cm_jax.training.run.folder import Retention, RunFolder
from tests.runs.test_run_folder import CONFIG, PARAMS, damage, same, save, state


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


def test_metrics_of_a_checkpoint_are_restored_or_found_damaged(tmp_path):
    metrics = {"loss": np.array([0.1, np.nan, np.inf])}
    with RunFolder(tmp_path) as folder:
        for number in (1, 2):
            folder.save(number, CONFIG, PARAMS, state(number), metrics)
    file = tmp_path / "checkpoints" / "00000002" / "state" / "unlogged.npz"
    file.write_bytes(file.read_bytes()[:-30])
    with RunFolder(tmp_path) as folder:
        assert folder.resume(state())[0] == 1
        np.testing.assert_equal(folder.unlogged, metrics)


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


@pytest.mark.parametrize("began", ["absent", "empty", "in use"])
def test_a_failed_start_leaves_the_folder_as_it_was(began, tmp_path):
    run = tmp_path / "runs" / "one"
    if began != "absent":
        run.mkdir(parents=True)
    if began == "in use":
        save(run, 1)
        (run / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))

    def fail(started):
        with RunFolder(run) as folder:
            (run / "config.json").write_text("{}")
            (run / "tensorboard").mkdir()
            folder.started = started
            raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"):
        fail(started=False)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(KeyError, match="on purpose"):
        fail(started=True)
    assert (run / "config.json").exists()


def test_a_folder_that_cannot_be_one(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Cannot train in"):
        RunFolder(tmp_path / "file")
    with pytest.raises(InputError, match="Cannot train in"):
        RunFolder("/proc/nothing")
