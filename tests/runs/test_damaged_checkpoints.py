"""`cm-jax convert` of damaged files and files that are no checkpoints: one message, nothing is executed or written."""

import io
import pickle
import random
import zipfile

import pytest
import torch

from cm_jax.cli import main_convert
from cm_jax.conversion import CheckpointHints, read
from cm_jax.errors import InputError
from tests.runs.test_commands import failed
from tests.support import DATA, EMOJI, ROOT, Payload

GOLDEN = DATA / "openai" / "adm_unconditional.pt"


def poisoned(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"x": Payload()}))


def nested(path):
    torch.save({"model": {"a": torch.zeros(2)}, "step": 3}, path)


def with_a_number(path):
    torch.save({"fc.weight": torch.zeros(2, 2), "fc.bias": torch.zeros(2), "step": 3}, path)


def optimizer(path):
    network = torch.nn.Linear(2, 2)
    state = torch.optim.RAdam(network.parameters())
    network(torch.ones(1, 2)).sum().backward()
    state.step()
    torch.save(state.state_dict(), path)


def lfs_pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n")


def other_network(path):
    torch.save({"fc.weight": torch.zeros(2, 2)}, path)


def outside(path):
    """A tensor whose strides reach outside of its storage."""
    good = io.BytesIO()
    torch.save({"fc.weight": torch.zeros(2, 2)}, good)
    with zipfile.ZipFile(good) as archive, zipfile.ZipFile(path, "w") as damaged:
        for entry in archive.infolist():
            content = archive.read(entry)
            if entry.filename.endswith("data.pkl"):
                content = content.replace(b"K\x02K\x02\x86", b"K\x09K\x09\x86", 1)
            damaged.writestr(entry.filename, content)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_bytes(GOLDEN.read_bytes()[:100_000]), "not a complete file"),
        (lambda path: path.write_bytes(b"<html>not found</html>"), "not a complete file"),
        (lambda path: path.write_bytes(pickle.dumps({"x": Payload()})), "runs posix.system when it is read"),
        (poisoned, r"runs posix.system when it is read"),
        (nested, "Expected one state dict"),
        (with_a_number, "got 2 tensors and also step (int 3); remove what is not a tensor"),
        (optimizer, "got the state of an optimizer; give the file with the weights"),
        (lfs_pointer, "is a Git LFS pointer, not the file itself; run `git lfs pull`"),
        (other_network, "an ADM U-Net in the"),
        (outside, "outside its storage"),
    ],
    ids=(
        "empty truncated html bare_pickle poisoned nested number optimizer lfs other_network outside".split()  # noqa: SIM905
    ),
)
def test_files_that_are_no_checkpoints(tmp_path, capsys, make, message):
    make(tmp_path / "cd_imagenet64_l2.pt")
    said = failed(capsys, main_convert, tmp_path / "cd_imagenet64_l2.pt", tmp_path / "out")
    assert message in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cd_imagenet64_l2.pt"]
    assert not (ROOT / "PWNED").exists()


@pytest.mark.parametrize(
    "name", ["a.pt", "a.pkl", "a.safetensors", "unet/diffusion_pytorch_model.bin", "params.msgpack"]
)
def test_git_lfs_pointers_are_named_whatever_the_format(tmp_path, capsys, name):
    (tmp_path / "unet").mkdir()
    lfs_pointer(tmp_path / name)
    source = tmp_path if "/" in name else tmp_path / name
    assert "run `git lfs pull`" in failed(capsys, main_convert, source, tmp_path / "out")
    assert "run `git lfs pull`" in failed(
        capsys, main_convert, tmp_path / name, tmp_path / "out.safetensors", "--to", "inception"
    )


def test_a_training_run_of_openai_is_refused_with_the_file_to_take(tmp_path, capsys):
    for name in (
        *("model005000.pt", "ema_0.9999_005000.pt", "model010000.pt", "ema_0.999_010000.pt", "ema_0.9999_010000.pt"),
        *("opt010000.pt", "target_model010000.pt", "log.txt", "progress.csv"),
    ):
        (tmp_path / name).touch()
    said = failed(capsys, main_convert, tmp_path, tmp_path / "out")
    listed = "ema_0.9999_010000.pt, ema_0.999_010000.pt, model010000.pt, target_model010000.pt"
    assert f"After 10,000 steps these are {listed} (" in said
    assert f"For example {tmp_path}/ema_0.9999_010000.pt." in said


def test_files_damaged_at_random_are_read_or_refused(tmp_path):
    """A hundred copies, each cut off or with bytes of its archive or of its pickle replaced: never any other error."""
    content, dice = (DATA / "openai" / "adm_class_cond.pt").read_bytes(), random.Random(0)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    description = next(name for name in entries if name.endswith("data.pkl"))

    def scattered(data):
        damaged = bytearray(data)
        for _ in range(dice.choice([1, 3, 30])):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        return bytes(damaged)

    path, refused = tmp_path / "model.pt", 0
    for attempt in range(100):
        if attempt % 3 == 0:
            path.write_bytes(content[: dice.randrange(len(content))])
        elif attempt % 3 == 1:
            path.write_bytes(scattered(content))
        else:
            with zipfile.ZipFile(path, "w") as archive:
                for name, data in entries.items():
                    archive.writestr(name, scattered(data) if name == description else data)
        try:
            read(path, CheckpointHints(16, None, "consistency", 40, 16))
        except InputError:
            refused += 1
    assert refused > 80


def test_a_flipped_bit_in_the_weights_is_noticed(tmp_path, capsys):
    content = bytearray(EMOJI.read_bytes())
    content[2_000_000] ^= 1
    (tmp_path / "emoji16_cd.pt").write_bytes(content)
    assert "is damaged" in failed(capsys, main_convert, tmp_path / "emoji16_cd.pt", tmp_path / "out")
