"""Published checkpoints by name, downloaded from a local server."""

import base64
import errno
import hashlib
import os
import shutil
import threading

import pytest

import cm_jax
from cm_jax.checkpoints import download, published
from cm_jax.checkpoints.published import Published, resolve
from cm_jax.cli import main
from cm_jax.errors import InputError
from tests.hub_server import serve
from tests.runs.test_commands import failed, succeeded
from tests.support import EMOJI

NAME = "cd_imagenet64_l2"
FILE = f"{NAME}.pt"
CONTENT = EMOJI.read_bytes()


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server with one published file, which states its MD5; an empty cache."""
    with serve() as started:
        monkeypatch.setenv("CM_JAX_CHECKPOINT_URL", f"{started.url}/")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        started.files[FILE] = CONTENT
        started.md5[FILE] = base64.b64encode(hashlib.md5(CONTENT).digest()).decode()
        yield started


def parts():
    return [*download.stored(FILE).parent.glob("*.part")]


def test_without_download_the_message_names_the_command(server, capsys):
    with pytest.raises(InputError, match=f"run `cm-jax download {NAME}`, or cm_jax.load with download=True"):
        cm_jax.load(NAME)
    assert f"cm-jax download {NAME}" in failed(capsys, main, "sample", FILE)
    assert not server.requests


def test_a_downloaded_checkpoint_loads_by_its_name_alone(server, capsys, monkeypatch, tmp_path):
    known = Published(NAME, 18, (8, 0), 16, 1_923_907, head_dim=32)
    monkeypatch.setattr(published, "published", lambda: {NAME: known})
    assert "is at" in succeeded(capsys, main, "download", NAME)
    server.requests.clear()
    assert cm_jax.load(NAME).config.tuned_timesteps == ((8, 0),)
    assert resolve(FILE) == tmp_path / "cache" / "cm_jax" / "checkpoints" / FILE
    assert download.stored(FILE).read_bytes() == CONTENT
    assert not parts()
    assert not server.requests


def test_a_stored_file_is_replaced_when_asked(server, capsys):
    resolve(NAME, download=True).write_bytes(b"damaged")
    succeeded(capsys, main, "download", NAME)
    assert download.stored(FILE).read_bytes() == b"damaged"
    content = server.files.pop(FILE)
    assert "no such file" in failed(capsys, main, "download", NAME, "--force")
    assert download.stored(FILE).read_bytes() == b"damaged"  # kept until the new file is complete
    server.files[FILE] = content
    succeeded(capsys, main, "download", NAME, "--force")
    assert download.stored(FILE).read_bytes() == CONTENT


def test_a_web_page_is_not_stored(server):
    server.types[FILE] = "text/html; charset=utf-8"
    with pytest.raises(InputError, match=r"Expected a file at .*, got a web page"):
        download.download(FILE)
    assert not download.stored(FILE).exists()


def test_load_downloads_when_asked(server):
    assert resolve(NAME, download=True) == download.stored(FILE)
    with pytest.raises(InputError, match="has not been downloaded"):
        resolve("ct_cat256", download=True, local_files_only=True)


def test_files_of_cifar10_keep_their_folders(server):
    path = "jcm_checkpoints/cd-l2/checkpoints/checkpoint_80"
    server.files[path] = b"content"
    found = resolve("cd-l2", download=True)
    assert found == download.stored(path)
    assert published.recognize_cifar10(found).name == "cd-l2"


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no_ranges"])
def test_an_interrupted_download_is_resumed(server, ranges):
    server.breaks, server.ranges = 2, ranges
    for _ in range(2):
        with pytest.raises(InputError, match=r"interrupted after \d\.\d of \d\.\d MB: run it again to resume"):
            download.download(FILE)
        assert not download.stored(FILE).exists()
    assert download.download(FILE).read_bytes() == CONTENT
    assert not parts()
    half, quarter = len(CONTENT) // 2, (len(CONTENT) - len(CONTENT) // 2) // 2
    assert server.count(f"GET /{FILE} bytes={half}-") == (1 if ranges else 2)
    assert server.count(f"GET /{FILE} bytes={half + quarter}-") == (1 if ranges else 0)


def test_the_part_of_another_version_is_not_continued(server):
    server.breaks = 1
    with pytest.raises(InputError, match="interrupted"):
        download.download(FILE)
    server.files[FILE] = new = CONTENT[::-1]
    server.md5.clear()
    assert download.download(FILE).read_bytes() == new


@pytest.mark.parametrize("damage", ["checksum", "size"])
def test_a_damaged_download_is_deleted(server, damage):
    if damage == "checksum":
        server.md5[FILE] = base64.b64encode(b"0" * 16).decode()
    else:
        server.breaks = 1
        with pytest.raises(InputError, match="interrupted"):
            download.download(FILE)
        parts()[0].write_bytes(CONTENT + b"more")
    with pytest.raises(InputError, match=r"is damaged .* try again"):
        download.download(FILE)
    assert not parts()
    assert not download.stored(FILE).exists()


def test_files_that_cannot_be_downloaded_give_one_message(server, capsys, monkeypatch):
    assert "The server has no such file" in failed(capsys, main, "download", "ct_cat256")
    server.failing = 503
    assert "refuses the download" in failed(capsys, main, "download", NAME)
    monkeypatch.setenv("CM_JAX_CHECKPOINT_URL", "http://127.0.0.1:9")
    assert "cannot be reached" in failed(capsys, main, "download", NAME)
    assert "Did you mean 'cd_imagenet64_l2'?" in failed(capsys, main, "download", "cd_imagenet64_L2x")


def test_a_full_disk_gives_one_message_and_keeps_the_part(server, monkeypatch):
    usage = shutil.disk_usage(".")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(InputError, match=r"needs 0\.0 GB in .*XDG_CACHE_HOME"):
            download.download(FILE)
    with monkeypatch.context() as patch:

        def full(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(download, "fsync_path", full)
        with pytest.raises(InputError, match=r"No space left on device.*free some space and run it again to resume"):
            download.download(FILE)
    server.requests.clear()
    download.download(FILE)
    assert not server.count("^GET")


def test_two_downloads_at_once_transfer_the_file_once(server):
    threads = [threading.Thread(target=download.download, args=(FILE,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert download.stored(FILE).read_bytes() == CONTENT
    assert server.count("^GET") == 1


def test_the_list_has_names_sizes_and_what_is_downloaded(server, capsys):
    download.download(FILE)
    lines = succeeded(capsys, main, "download").splitlines()
    assert any(line.split() == [NAME, "0.0", "GB", "downloaded"] for line in lines)
    assert any(line.split() == ["ct_cat256", "2.1", "GB"] for line in lines)
    assert len(lines) == 1 + 12 + 10 + 26  # OpenAI's PyTorch and JAX files, and those of EDM and EDM2
