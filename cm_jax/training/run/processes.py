"""Coordination of several processes (jax.distributed). Every function must be called by all of them."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from cm_jax.errors import InputError

_MAX_MESSAGE_BYTES = 2000


class DamagedError(InputError):
    """A file is damaged or incomplete; an older checkpoint may be readable."""


@contextlib.contextmanager
def raised_in_all() -> Iterator[None]:
    """An InputError raised in the block by one process is raised in all, so that none waits for the others."""
    failure: InputError | None = None
    try:
        yield
    except InputError as error:
        failure = error
    if jax.process_count() > 1:
        own = np.zeros(_MAX_MESSAGE_BYTES, np.uint8)
        text = str(failure or "").encode()[:_MAX_MESSAGE_BYTES]
        own[: len(text)] = np.frombuffer(text, np.uint8)
        damaged = np.asarray([isinstance(failure, DamagedError)])
        messages, kinds = multihost_utils.process_allgather((own, damaged))
        for process, (message, kind) in enumerate(zip(messages, kinds, strict=True)):
            if message.any() and failure is None:
                text = f"process {process}: {bytes(message[message > 0]).decode(errors='replace')}"
                failure = DamagedError(text) if kind.any() else InputError(text)
    if failure is not None:
        raise failure


def from_first(number: int) -> int:
    """The number that process 0 gives."""
    return number if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def in_any(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return flag if jax.process_count() == 1 else bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))
