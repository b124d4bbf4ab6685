"""Checkpoints of the Hugging Face Hub: its real client against a local server."""

import dataclasses
import errno
import json
import os
import shutil
import sys
import time

import huggingface_hub.constants
import jax
import numpy as np
import pytest
import safetensors.numpy

import cm_jax
from cm_jax import conversion
from cm_jax.checkpoints import hub
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.checkpoints.published import resolve
from cm_jax.cli import main
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning
from cm_jax.errors import InputError
from cm_jax.model import Model
from tests.hub_server import TOKEN, Repository, folder_files, serve
from tests.runs.test_commands import failed, succeeded
from tests.support import EMOJI, SMALL, announced, random_params, run

TINY = dataclasses.replace(SMALL, image_size=8, channel_mult=(1,), attention_factors=(), classes=3)
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model():
    """A small consistency model with 3 classes, N = 18."""
    return Model(ModelConfig(TINY, ConsistencyPreconditioning(), num_levels=18), random_params(TINY))


@pytest.fixture(scope="module")
def pipeline(model, tmp_path_factory):
    """Its files as a diffusers pipeline."""
    folder = tmp_path_factory.mktemp("pipeline") / "tiny"
    conversion.write(folder, "diffusers", model.config, model.params)
    return folder_files(folder)


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The Hub, without repositories; an empty cache; an empty working directory."""
    with serve() as started:
        monkeypatch.setenv("HF_ENDPOINT", started.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        yield started


def snapshots(tmp_path, name="me--tiny"):
    return sorted((tmp_path / "cache" / f"models--{name}" / "snapshots").iterdir())


def assert_same(found: Model, expected: Model) -> None:
    assert found.config == expected.config
    assert jax.tree.all(jax.tree.map(np.array_equal, found.params, expected.params))


def test_an_id_loads_the_model_and_only_its_files_are_downloaded(server, pipeline, model, tmp_path):
    others = {"README.md": b"# Tiny", "unet/diffusion_pytorch_model.bin": b"no", "vae/model.safetensors": b"no"}
    server.repositories["me/tiny"] = Repository({"main": pipeline | others})
    assert_same(cm_jax.load("me/tiny"), model)
    (snapshot,) = snapshots(tmp_path)
    assert folder_files(snapshot) == pipeline


def test_a_second_load_downloads_nothing_and_a_new_version_is_downloaded(server, pipeline, capsys, monkeypatch):
    server.repositories["me/tiny"] = Repository({"main": pipeline})
    with announced() as activities, monkeypatch.context() as patch:
        patch.setattr(sys.stderr, "isatty", lambda: True)
        first = resolve("me/tiny")
    assert activities == ["Downloading me/tiny (1 MB)"]
    downloads = server.count("^GET .*/resolve/")
    assert "Fetching" in capsys.readouterr().err
    assert resolve("me/tiny") == first
    assert not capsys.readouterr().err
    assert server.count("^GET .*/resolve/") == downloads
    server.repositories["me/tiny"].revisions["main"] = pipeline | {
        "unet/config.json": pipeline["unet/config.json"] + b" "
    }
    assert resolve("me/tiny") != first
    assert server.count("^GET .*/resolve/") == downloads + 1


@pytest.mark.parametrize("written", ["argument", "suffix"])
def test_a_revision_is_a_branch_a_tag_or_a_commit(server, pipeline, model, written):
    old = pipeline | {"scheduler/scheduler_config.json": json.dumps({"num_train_timesteps": 40}).encode()}
    repository = server.repositories["me/tiny"] = Repository({"main": pipeline, "refs/pr/1": old, "v1.0": old})
    commit, _ = repository.find("v1.0")
    for revision in ("v1.0", "refs/pr/1", commit, commit[:40]):
        loaded = (
            cm_jax.load(f"me/tiny@{revision}") if written == "suffix" else cm_jax.load("me/tiny", revision=revision)
        )
        assert loaded.config.num_levels == 40
    assert cm_jax.load("me/tiny").config.num_levels == 18
    with pytest.raises(InputError, match="me/tiny has no revision 'v2'"):
        cm_jax.load("me/tiny@v2")
    with pytest.raises(InputError, match="Expected one revision"):
        cm_jax.load("me/tiny@v1.0", revision="main")


def test_the_cache_alone_is_used_offline_and_when_asked(server, pipeline, model, monkeypatch, tmp_path):
    server.repositories["me/tiny"] = Repository({"main": pipeline})
    with pytest.raises(InputError, match=r"me/tiny is not in the Hub cache .* offline mode is on"):
        cm_jax.load("me/tiny", local_files_only=True)
    cm_jax.load("me/tiny")
    server.requests.clear()
    assert_same(cm_jax.load("me/tiny", local_files_only=True), model)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_same(cm_jax.load("me/tiny"), model)
    assert not server.requests
    (snapshot,) = snapshots(tmp_path)
    (snapshot / WEIGHTS).unlink()
    with pytest.raises(InputError, match="me/tiny is incomplete in the Hub cache"):
        cm_jax.load("me/tiny")


def test_offline_mode_and_the_cache_of_the_environment(server, pipeline, tmp_path):
    """In processes of their own: huggingface_hub reads the environment when it is imported."""
    server.repositories["me/tiny"] = Repository({"main": pipeline}, private=True)
    script = "import cm_jax; print(cm_jax.load('me/tiny').config.num_levels)"
    home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.url}
    online = run("-c", script, **home, HF_TOKEN=TOKEN)
    assert online.stdout == "18\n", online.stderr
    assert (tmp_path / "home" / "hub" / "models--me--tiny").is_dir()
    server.requests.clear()
    assert run("-c", script, **home, HF_HUB_OFFLINE="1").stdout == "18\n"
    assert not server.requests


def test_a_cached_version_is_used_while_the_hub_cannot_be_reached(server, pipeline, model, monkeypatch, caplog):
    server.repositories["me/tiny"] = Repository({"main": pipeline})
    cm_jax.load("me/tiny")
    server.failing = 503
    with caplog.at_level("INFO", "cm_jax"):
        assert_same(cm_jax.load("me/tiny"), model)
    assert "cached revision" in caplog.text
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert_same(cm_jax.load("me/tiny"), model)
    with pytest.raises(InputError, match=r"me/other is not in the Hub cache .*http://127.0.0.1:9 cannot be reached"):
        cm_jax.load("me/other")


def test_a_broken_transfer_is_resumed_where_it_broke(server, pipeline, model, monkeypatch):
    server.repositories["me/tiny"] = Repository({"main": pipeline})
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # incomplete chunks are lost
    server.breaks = 1
    assert_same(cm_jax.load("me/tiny"), model)
    assert server.count(rf"GET /me/tiny/resolve/.*{WEIGHTS} bytes={len(pipeline[WEIGHTS]) // 2000 * 1000}-") == 1


def test_an_interrupted_download_keeps_the_complete_files(server, pipeline, model, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts
    server.repositories["me/tiny"] = Repository({"main": pipeline})
    server.breaks = 10**6
    with pytest.raises(InputError, match=r"The download of me/tiny was interrupted: .* load it again"):
        cm_jax.load("me/tiny")
    server.breaks = 0
    server.requests.clear()
    assert_same(cm_jax.load("me/tiny"), model)
    assert server.count("GET .*/resolve/") == 1  # the weights


@pytest.mark.parametrize(
    ("repository", "message"),
    [
        (None, "There is no file or folder me/tiny, and no public repository"),
        (Repository({"main": {}}, private=True), "if the repository is private, set HF_TOKEN"),
        (Repository({"main": {"README.md": b"x"}}), "me/tiny has no checkpoint. Expected a diffusers folder"),
        (Repository({"main": {"a.pt": b"x", "b.safetensors": b"y"}}), "has 2 checkpoints: a.pt, b.safetensors"),
    ],
)
def test_repositories_that_cannot_be_loaded_give_one_message(server, repository, message, capsys):
    if repository:
        server.repositories["me/tiny"] = repository
    assert message in failed(capsys, main, "sample", "me/tiny")


@pytest.mark.parametrize("token", ["", "hf_other"], ids=["401", "403"])
def test_a_gated_repository_needs_a_token_with_access(server, pipeline, model, token, monkeypatch):
    server.repositories["me/tiny"] = Repository({"main": pipeline}, gated=True)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError, match=r"me/tiny is gated: accept its conditions at .*/me/tiny, and set HF_TOKEN"):
        cm_jax.load("me/tiny")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert_same(cm_jax.load("me/tiny"), model)


def test_a_full_disk_gives_one_message(server, pipeline, monkeypatch):
    server.repositories["me/tiny"] = Repository({"main": pipeline})
    usage = shutil.disk_usage(".")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(InputError, match=r"me/tiny cannot be stored in .*0\.0 GB are free.*HF_HOME"):
            cm_jax.load("me/tiny")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "blob")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(InputError, match=r"me/tiny cannot be stored in blob: the disk is full\. Free some space"):
        cm_jax.load("me/tiny")


def test_other_layouts_of_repositories(server, model, tmp_path):
    """A network without a pipeline, a native folder, one native file; weights as .bin or in two shards."""
    model.save(tmp_path / "native")
    conversion.write(tmp_path / "model.safetensors", "native", model.config, model.params)
    layouts = {
        "me/folder": folder_files(tmp_path / "native"),
        "me/file": {"model.safetensors": (tmp_path / "model.safetensors").read_bytes(), "README.md": b"x"},
    }
    for name, files in layouts.items():
        server.repositories[name] = Repository({"main": files})
        assert_same(cm_jax.load(name), model)
        assert_same(cm_jax.load(name, local_files_only=True), model)


def test_repositories_load_as_their_folders_do(server, model, tmp_path):
    """A safetensors file beside other files, and shards with and without an index."""
    conversion.write(tmp_path / "pipeline", "diffusers", model.config, model.params)
    files = folder_files(tmp_path / "pipeline")
    tensors = safetensors.numpy.load(files.pop(WEIGHTS))
    parts = [{name: tensors[name] for name in list(tensors)[first::2]} for first in range(2)]
    shards = {f"-0000{i + 1}-of-00002.safetensors": safetensors.numpy.save(part) for i, part in enumerate(parts)}
    places = {name: f"model{end}" for end, part in zip(shards, parts, strict=True) for name in part}
    index = {"unet/model.safetensors.index.json": json.dumps({"weight_map": places}).encode()}
    conversion.write(tmp_path / "model.safetensors", "native", model.config, model.params)
    native = {"model.safetensors": (tmp_path / "model.safetensors").read_bytes(), "config.json": b"{}"}
    layouts = {
        "me/indexed": files | index | {f"unet/model{end}": content for end, content in shards.items()},
        "me/variant": files | {f"unet/diffusion_pytorch_model.fp16{end}": shards[end] for end in shards},
        "me/trained": native | {"optimizer.bin": b"x", "pytorch_model.bin": b"x", "training_args.bin": b"x"},
    }
    for name, content in layouts.items():
        server.repositories[name] = Repository({"main": content})
        assert_same(cm_jax.load(name), model)
        assert_same(cm_jax.load(name, local_files_only=True), model)


def test_a_path_has_precedence_over_an_id(server, pipeline, tmp_path):
    server.repositories["me/tiny"] = Repository({"main": pipeline})
    shutil.copytree(resolve("me/tiny"), "me/tiny")
    assert str(resolve("me/tiny")) == "me/tiny"
    server.requests.clear()
    with pytest.raises(InputError, match=r"There is no checkpoint me/tinny, and it is not an id .* because me exists"):
        resolve("me/tinny")
    assert not server.requests


@pytest.mark.parametrize(
    "name",
    [
        "emoji3",
        "cd_imagenet64_lpip",
        "me/tiny.pt",
        "me/a/b",
        "./me/tiny",
        "/me/tiny",
        "me/",
        "me//tiny",
        "me/ti ny",
        "me/tiny@",
        "runs/emoji32-edm",
        "anything/best",
        "me--you/x",
    ],
)
def test_misspelled_names_and_missing_paths_ask_no_server(server, name):
    with pytest.raises(InputError, match="There is no checkpoint"):
        resolve(name)
    assert not server.requests


def test_a_misspelled_folder_is_suggested_instead_of_a_repository(server, tmp_path):
    (tmp_path / "work" / "my_runs" / "first").mkdir(parents=True)
    with pytest.raises(InputError, match="Did you mean my_runs/first"):
        resolve("my_run/first")
    assert not server.requests


def test_hub_options_apply_to_ids_only(server, tmp_path):
    with pytest.raises(InputError, match="apply to ids of the Hugging Face Hub"):
        cm_jax.load("emoji32", revision="main")


def test_a_folder_of_the_hub_cache_has_the_name_of_its_id(server, tmp_path, caplog):
    """The bundled checkpoint under a published name, in a repository of that name."""
    source = conversion.read(EMOJI)
    conversion.write(tmp_path / "folder", "diffusers", source.config, source.params)
    (tmp_path / "folder" / "cm_jax.json").unlink()
    server.repositories["openai/diffusers-emoji16_cd"] = Repository({"main": folder_files(tmp_path / "folder")})
    with caplog.at_level("INFO", "cm_jax"):
        assert cm_jax.load("openai/diffusers-emoji16_cd").config == source.config
    assert "Taken from the name of the published checkpoint emoji16_cd: class names, tuned timesteps." in caplog.text
    root = tmp_path / "cache" / "models--openai--diffusers-emoji16_cd"
    (snapshot,) = (root / "snapshots").iterdir()
    for path in (root, snapshot, snapshot / WEIGHTS):
        assert conversion.read(
            resolve(path), conversion.CheckpointHints(preconditioning="consistency")
        ).config.tuned_timesteps
        assert hub.cached_id(path) == ("openai/diffusers-emoji16_cd" if path != root else None)
    (root / "refs" / "main").unlink()
    assert resolve(root) == snapshot
    shutil.copytree(snapshot, root / "snapshots" / "other")
    with pytest.raises(InputError, match="Expected one snapshot"):
        resolve(root)


def test_commands_take_ids(server, pipeline, tmp_path, capsys):
    server.repositories["me/tiny"] = Repository({"main": pipeline, "v1": pipeline})
    output = tmp_path / "samples.npz"
    succeeded(capsys, main, "sample", "me/tiny@v1", "--count", 2, "--output", output)
    assert np.load(output)["arr_0"].shape == (2, 8, 8, 3)
    succeeded(capsys, main, "convert", "me/tiny", tmp_path / "native")
    assert "is at" in succeeded(capsys, main, "download", "me/tiny")
    unlabeled = failed(capsys, main, "edit", "interpolate", "--checkpoint", "me/tiny", "--seeds", "0,1")
    assert "Expected labels in [0, 2]" in unlabeled
    assert "convert it to a native checkpoint first" in failed(capsys, main, "tune", "me/tiny", "emoji")
    bits = failed(capsys, main, "evaluate", "me/tiny", "emoji", "--metrics", "bpd")
    assert "denoiser" in bits
    teacher = failed(capsys, main, "train", "emoji32-cd", "--teacher", "me/tiny", "--dry-run")
    assert "Expected a denoiser as teacher, got the consistency model me/tiny" in teacher
    absent = failed(capsys, main, "train", "emoji32-cd")
    assert "There is no checkpoint runs/emoji32-edm" in absent
    assert absent.rstrip().endswith("train emoji32-edm, or use the bundled one: --teacher emoji32_edm.")
    assert server.count("runs/emoji32-edm") == 0


def test_a_run_is_initialized_from_an_id(server, pipeline, tmp_path, capsys):
    server.repositories["me/tiny"] = Repository({"main": pipeline})
    words = ("train", "emoji32-ect", "--init-from", "me/tiny", "--run", tmp_path / "run", "--evaluation", "none")
    assert "The network in" in failed(capsys, main, *words)  # it differs from that of the preset
    assert server.count("^GET /me/tiny/resolve/")


def test_a_pushed_model_loads_by_its_id_and_has_a_card(server, model, monkeypatch):
    names = ("red", "a|b", "green: dark")
    config = dataclasses.replace(model.config, class_names=names, tuned_timesteps=((8, 0),))
    named = Model(config, model.params)
    with pytest.raises(InputError, match=r"refuses access \(status 401\): set HF_TOKEN"):
        named.push_to_hub("me/pushed")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert named.push_to_hub("me/pushed", private=True, license="apache-2.0").startswith(server.url)
    assert server.repositories["me/pushed"].private
    assert_same(cm_jax.load("me/pushed"), named)
    card = server.repositories["me/pushed"].revisions["main"]["README.md"].decode()
    metadata, _, text = card.removeprefix("---\n").partition("\n---\n")
    assert {"license: apache-2.0", "library_name: diffusers"} <= set(metadata.splitlines())
    for part in ("| Conditioning | 3 classes: red; a\\|b; green: dark |", "8,0 (2 steps)", 'cm_jax.load("me/pushed")'):
        assert part in text
    assert "timesteps=[8, 0], class_labels=0" in text
    server.repositories["me/pushed"].revisions["main"]["README.md"] = b"mine"
    named.push_to_hub("me/pushed")
    assert server.repositories["me/pushed"].revisions["main"]["README.md"] == b"mine"


def test_models_that_diffusers_cannot_represent_are_pushed_in_the_native_format(server, monkeypatch):
    emoji = cm_jax.load("emoji32")
    emoji.push_to_hub("me/emoji", token=TOKEN)
    files = server.repositories["me/emoji"].revisions["main"]
    assert sorted(files) == ["README.md", "model.safetensors"]
    assert b"diffusers" not in files["README.md"]
    assert b"library_name: cm_jax" in files["README.md"]
    assert cm_jax.load("me/emoji").config == emoji.config
    with pytest.raises(InputError, match="diffusers hold ADM U-Nets"):
        emoji.push_to_hub("me/emoji", to="diffusers", token=TOKEN)


def test_convert_pushes_what_it_writes(server, pipeline, model, capsys, monkeypatch, tmp_path):
    server.repositories["me/tiny"] = Repository({"main": pipeline})
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    options = ("--push", "me/copy", "--license", "mit")
    said = succeeded(capsys, main, "convert", "me/tiny", tmp_path / "out", "--to", "diffusers", *options)
    assert f"{server.url}/me/copy/commit/" in said
    assert server.repositories["me/copy"].revisions["main"].keys() == pipeline.keys() | {"README.md"}
    assert_same(cm_jax.load("me/copy"), model)
    for words, message in [
        (("--to", "native", "--license", "mit"), "add --push OWNER/NAME"),
        (("--to", "native", "--push", "copy"), "Expected the id of a repository"),
        (("--to", "openai", "--push", "me/copy"), "--push needs --to diffusers or --to native"),
    ]:
        assert message in failed(capsys, main, "convert", "me/tiny", tmp_path / "other", *words)
