"""Download of published checkpoints into the user's cache: resumable, with size and checksum verified."""

import base64
import contextlib
import errno
import hashlib
import http.client
import os
import shutil
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cm_jax.errors import InputError
from cm_jax.io.atomic import fsync_path, user_cache
from cm_jax.progress import Activity, activity

URL = "https://openaipublic.blob.core.windows.net/consistency"
"""Address of the files of openai/consistency_models."""
_CHUNK = 2**20
_TIMEOUT = 30.0
"""Seconds without an answer or data after which a connection counts as interrupted."""


def url_of(file: str, address: str = URL) -> str:
    """The URL of a published file. The environment variable CM_JAX_CHECKPOINT_URL replaces all addresses."""
    return f"{os.environ.get('CM_JAX_CHECKPOINT_URL', address).rstrip('/')}/{file}"


def stored(file: str) -> Path:
    """Where a published file is stored, whether it has been downloaded or not."""
    return user_cache("checkpoints") / file


def download(file: str, address: str = URL, *, force: bool = False) -> Path:
    """Download a published file, the part of its URL after `address`, unless it is stored already; return its path.

    force: download it again. The stored file is replaced once the new one is complete.

    An interrupted download leaves a .part file and is resumed by the next call. The file gets its name only after its
    size, and its MD5 where the server states one, have been verified. Raises InputError if the server cannot be
    reached, has no such file or breaks the connection, for a wrong checksum, and for a full disk.
    """
    url, destination = url_of(file, address), stored(file)
    if destination.is_file() and not force:
        return destination
    with _errors(url, destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _lock(destination):
            if force or not destination.is_file():  # another process may have downloaded it meanwhile
                _download(url, destination)
    return destination


def _download(url: str, destination: Path) -> None:
    with _open(url, method="HEAD") as answer:
        headers = answer.headers
    if headers.get_content_type() == "text/html" or not headers["Content-Length"]:
        raise InputError(f"Expected a file at {url}, got a web page: check the address, or the login of your network.")
    size, version = int(headers["Content-Length"]), headers["ETag"] or headers["Last-Modified"] or ""
    # The name contains the version, because the part of another version must not be continued.
    part = destination.with_name(f"{destination.name}.{zlib.crc32(version.encode()):08x}.part")
    missing = size - (part.stat().st_size if part.exists() else 0)
    free = shutil.disk_usage(part.parent).free
    if missing > free:
        raise InputError(
            f"{destination.name} needs {missing / 1e9:.1f} GB in {part.parent}, and {free / 1e9:.1f} GB are free: free "
            "some space, or set XDG_CACHE_HOME to a folder on another disk."
        )
    with activity(f"Downloading {destination.name}", total=size / 1e6, unit="MB") as shown:
        _transfer(url, part, size, shown)
    if part.stat().st_size != size or not _has_md5(part, headers["Content-MD5"]):
        part.unlink()
        raise InputError(f"The download of {url} is damaged (wrong size or checksum) and was deleted: try again.")
    fsync_path(part)
    os.replace(part, destination)


@contextlib.contextmanager
def _lock(destination: Path) -> Iterator[None]:
    """Wait until no other process downloads the same file, where the system supports that."""
    with destination.with_name(f".{destination.name}.lock").open("a") as handle:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _transfer(url: str, part: Path, size: int, shown: Activity) -> None:
    """Append to `part` what it lacks of `size` bytes. Raises InputError if the connection breaks before the end."""
    present = part.stat().st_size if part.exists() else 0
    if present >= size:
        return
    with _open(url, headers={"Range": f"bytes={present}-"}) as answer:
        resumed = answer.status == http.HTTPStatus.PARTIAL_CONTENT  # else the server sends the file from its start
        with part.open("ab" if resumed else "wb") as out:
            shown.advance(out.tell() / 1e6)
            with contextlib.suppress(http.client.HTTPException, ConnectionError, TimeoutError):
                while chunk := answer.read(_CHUNK):
                    out.write(chunk)
                    shown.advance(len(chunk) / 1e6)
            done = out.tell()
    if done < size:
        raise InputError(
            f"The download of {url} was interrupted after {done / 1e6:,.1f} of {size / 1e6:,.1f} MB: run it again to "
            "resume."
        )


def _open(url: str, method: str = "GET", headers: dict[str, str] | None = None) -> Any:
    request = urllib.request.Request(url, method=method, headers={"User-Agent": "cm_jax", **(headers or {})})
    return urllib.request.urlopen(request, timeout=_TIMEOUT)


def _has_md5(path: Path, stated: str | None) -> bool:
    """Whether the MD5 of a file is the stated one (base64, as in the Content-MD5 header); True if none is stated."""
    if not stated:
        return True
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).digest()
    return base64.b64encode(digest).decode() == stated


@contextlib.contextmanager
def _errors(url: str, destination: Path) -> Iterator[None]:
    """Turn errors of the connection and of the disk into InputError."""
    try:
        yield
    except urllib.error.HTTPError as error:
        problem = "has no such file" if error.code == http.HTTPStatus.NOT_FOUND else "refuses the download"
        raise InputError(f"The server {problem}: {url} (status {error.code}). Try again later.") from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise InputError(
            f"{url} cannot be reached ({reason}): check the connection, or download it elsewhere and pass the path of "
            "the file."
        ) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space and run it again to resume" if full else "check the permissions"
        raise InputError(
            f"{destination} cannot be written ({error.strerror or error}): {advice}, or set XDG_CACHE_HOME to another "
            "folder."
        ) from error
