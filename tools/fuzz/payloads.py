"""Pickles that would execute code, which creates the file CANARY in the working folder."""

import functools
import io
import operator
import os
import pathlib
import pickle
import random
import runpy
import shutil
import struct
import subprocess
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

CANARY = "CANARY"


class _Calls:
    """An object that is pickled as a call of `function`."""

    def __init__(self, function: Callable, *arguments: Any, state: Any = None) -> None:
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.call


def _calls() -> list[Any]:
    """Ways to run code, or to touch a file, in Python, NumPy and PyTorch."""
    import torch

    touch = f"open({CANARY!r}, 'w')"
    return [
        _Calls(os.system, f"touch {CANARY}"),
        _Calls(eval, touch),
        _Calls(exec, touch),
        _Calls(open, CANARY, "w"),
        _Calls(io.open, CANARY, "w"),
        _Calls(getattr, _Calls(__import__, "os"), "system"),
        _Calls(_Calls(getattr, _Calls(__import__, "os"), "system"), f"touch {CANARY}"),  # type: ignore[arg-type]
        _Calls(subprocess.Popen, ["touch", CANARY]),
        _Calls(subprocess.check_output, ["touch", CANARY]),
        _Calls(functools.partial(os.system, f"touch {CANARY}")),
        _Calls(operator.methodcaller("touch"), pathlib.Path(CANARY)),
        _Calls(pathlib.Path.touch, pathlib.Path(CANARY)),
        _Calls(shutil.copy, "/dev/null", CANARY),
        _Calls(runpy.run_path, CANARY),
        _Calls(pickle.loads, pickle.dumps(_Calls(os.system, f"touch {CANARY}"))),
        _Calls(np.save, CANARY, 0),
        _Calls(np.memmap, CANARY, "uint8", "w+", 0, (1,)),
        _Calls(np.load, "/dev/null", None, True),
        _Calls(np.fromfile, "/dev/null"),
        _Calls(torch.save, 0, CANARY),
        _Calls(torch.load, "/dev/null"),
        _Calls(torch.hub.load, "someone/something", "x"),
        _Calls(zipfile.ZipFile, CANARY, "w"),
        _Calls(dict, state={"__class__": os.system}),
    ]


def pickles() -> list[bytes]:
    """Each of the calls in every protocol that can express it, and some handwritten pickles."""
    found = [
        f"cposix\nsystem\n(S'touch {CANARY}'\ntR.".encode(),
        f"(S'touch {CANARY}'\niposix\nsystem\n.".encode(),
        f"cbuiltins\ngetattr\n(c__builtin__\n__import__\n(S'os'\ntRS'system'\ntR(S'touch {CANARY}'\ntR.".encode(),
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\x00(cposix\nsystem\nK\x00\x85)tR.",
        b"\x80\x02ctorch._utils\n_rebuild_parameter\n(cposix\nsystem\ntR(X\x0c\x00\x00\x00touch CANARYtR.",
        b"\x80\x02ccollections\nOrderedDict\n)Rcposix\nsystem\nb.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0ctouch CANARY\x85R.",
        b"\x80\x02\x82\x01.",
        b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".",
        b"\x80\x02X\xff\xff\xff\xff.",
        b"\x80\x05\x96" + struct.pack("<Q", 2**50) + b".",
        b"\x80\x02r\xff\xff\xff\x7f.",
        b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b".",
        b"\x80\x02" + b"(" * 100_000 + b"l" * 10,
    ]
    for call in _calls():
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            try:
                found.append(pickle.dumps(call, protocol))
            except Exception:  # an old protocol cannot express it
                continue
    return found


def injected(content: bytes, rng: random.Random, choices: list[bytes]) -> bytes:
    """A payload instead of a valid pickle, or inside it, where its result is dropped and the valid one continues."""
    payload = rng.choice(choices)
    if rng.random() < 0.5 or not content.endswith(b"."):
        return payload
    bare = payload[2:] if payload[:1] == b"\x80" else payload
    return content[:-1] + bare[:-1] + b"0."


def bomb(folder: str, count: int) -> bytes:
    """A .pt file of some kilobytes with one storage that unpacks to `count` numbers of 4 bytes, all of them zero."""
    instructions = (
        b"\x80\x02ccollections\nOrderedDict\n)RX\x01\x00\x00\x00xctorch._utils\n_rebuild_tensor_v2\n("
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        b"\x8a\x08" + struct.pack("<q", count) + b"tQK\x00K\x02\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtRs."
    )
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{folder}/data.pkl", instructions)
        with archive.open(f"{folder}/data/0", "w", force_zip64=True) as entry:
            for _ in range(4 * count // 2**24):
                entry.write(bytes(2**24))
    return stream.getvalue()
