"""The client of the Hugging Face Hub: address, token, progress bars, and errors as InputError."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cm_jax.errors import InputError


@contextlib.contextmanager
def progress_bars(*, shown: bool) -> Iterator[None]:
    """The progress bars of huggingface_hub if `shown` and standard error is a terminal, else none."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if (shown and sys.stderr.isatty()) or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


class UnreachableError(InputError):
    """The Hub did not answer."""


def endpoint() -> str:
    """The address of the Hub. HF_ENDPOINT is read at each call; huggingface_hub reads it only when it is imported."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def api(token: str | None = None) -> Any:
    """The client of `huggingface_hub`; its token is HF_TOKEN or that of `hf auth login` by default."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint(), token=token, library_name="cm_jax")


@contextlib.contextmanager
def hub_errors(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turn the exceptions of `huggingface_hub` into InputError."""
    from huggingface_hub import errors

    page = f"{endpoint()}/{repo}"
    login = "set HF_TOKEN to a token of an account that has access (or run `hf auth login`)"
    try:
        yield
    except InputError:
        raise
    except errors.GatedRepoError as error:
        raise InputError(f"{repo} is gated: accept its conditions at {page}, and {login}.") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(
            f"{repo} has no revision {revision!r}: expected a branch, a tag or a commit of {page}/commits."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"There is no file or folder {repo}, and no public repository {page}. Check the name; if the "
            f"repository is private, {login}."
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status is not None and (status >= 500 or status == 429):
            raise UnreachableError(f"{endpoint()} answers with status {status}: try again later") from error
        reason = str(error).strip().splitlines() or [type(error).__name__]
        if status in (401, 403):
            raise InputError(f"{page} refuses access (status {status}): {login}.") from error
        raise InputError(f"{page} refuses the request: {' '.join(reason)[:300]}.") from error
    except (
        errors.HTTPError,  # pyright: ignore[reportPrivateImportUsage]  of httpx or httpx2, by version
        OSError,
        RuntimeError,  # of hf_xet
    ) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(full_disk(repo, error.filename or "the Hub cache", "the disk is full")) from error
        if isinstance(error, PermissionError):
            raise InputError(
                f"{repo} cannot be stored in the Hub cache: {error}. Set HF_HOME to a folder that you can write."
            ) from error
        reason = f"{type(error).__name__}: {str(error).strip()[:200]}"
        raise UnreachableError(f"{endpoint()} cannot be reached ({reason}): check the connection") from error


def full_disk(name: str, cache: Path | str, reason: str) -> str:
    return f"{name} cannot be stored in {cache}: {reason}. Free some space, or set HF_HOME to a folder on another disk."
