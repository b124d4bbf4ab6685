"""Damage to a file: in its bytes, or in the structure that its format has, with the rest intact."""

import copy
import functools
import io
import json
import random
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cm_jax.conversion.torch_files import LEGACY
from tools.fuzz import payloads

NAMES = (
    *("../../escaped", "/tmp/escaped", "..\\escaped", "", ".", "..", "a/../../b", "C:\\escaped", "\u202egnp.exe"),
    *("\x1b[2J", "new\nline", "e\u0301\u0000", "x" * 300, "data.pkl", "archive/data.pkl", "__torch__", "'; DROP TABLE"),
)
"""Invalid names of members, tensors and classes."""
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**53, 2**63, -(2**63), 10**30, 10**400, 0.1, -0.0, 1e-320, 1e39),
    *(1e308, float("nan"), float("inf"), float("-inf"), "", "0", "nan", [], {}, [[]], [0], [-1, 2**40], [None] * 3),
    *({"kind": "os.system"}, {"kind": "object", "__class__": "str"}, "__import__('os').system('touch CANARY')"),
    *("ADMUNet", "float32", "a" * 5000, "\ud800", "\x1b]0;owned\x07", [1e300] * 20, list(range(3000))),
    *("F16", "F64", "BF16", "BOOL", "F8_E4M3", [2**60], [2**31] * 3, [0, 2**62], [5, 1], [0, 4], [1] * 100),
)
"""Unexpected JSON values, data types, shapes and offsets."""
NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1)
CELLS = ("", "nan", "-1", "1e999", "x", '"', "9" * 5000, "=cmd()", "\0", "\x1b[2J", "5.5", "batches", "٣", "1_0")

pickles = functools.cache(payloads.pickles)


def damage(file: Path, rng: random.Random) -> None:
    """Damages a file of a folder; rarely removes it, or puts a folder or another file in its place."""
    what = rng.randrange(30)
    if what > 2:
        file.write_bytes(damaged(file.read_bytes(), rng))
    elif what == 0:
        shutil.copyfile(rng.choice(sorted(filter(Path.is_file, file.parent.iterdir()))), file.parent / "other")
        (file.parent / "other").replace(file)
    else:
        file.unlink()
        if what == 1:
            file.mkdir()


def damaged(content: bytes, rng: random.Random) -> bytes:
    """One to three faults, each in the bytes or in the structure."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        structure = next((way for begins, way in _STRUCTURES if begins(content)), _bytes)
        way = rng.choice([_bytes, structure, structure])
        try:
            content = way(content, rng)
        except Exception:  # any error of the format's reader: the structure is damaged too much already
            content = _bytes(content, rng)
    return content


def _bytes(content: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut, cleared, repeated or removed, more often near the beginning or the end."""
    data, size = bytearray(content), len(content)
    first = rng.choice([rng.randrange(size + 1), rng.randrange(200), size - rng.randrange(200)]) % (size + 1)
    part = slice(first, first + rng.choice([1, 4, 8, 64, 4096]))
    match rng.randrange(8):
        case 0:
            data[first : first + 1] = bytes(byte ^ 1 << rng.randrange(8) for byte in data[first : first + 1])
        case 1:
            del data[first:]
        case 2:
            data[part] = bytes(len(data[part]))
        case 3:
            data[part] *= 2
        case 4:
            del data[part]
        case 5:
            data[part] = rng.randbytes(len(data[part]))
        case 6:  # a length field
            width = rng.choice([1, 2, 4, 8])
            number = rng.choice(NUMBERS) % 256**width
            data[first : first + width] = number.to_bytes(width, rng.choice(["little", "big"]))
        case 7 if rng.random() < 0.3:
            return rng.choice([b"", bytes(1000), rng.randbytes(500), b"<html>not found</html>", b"PK\5\6" + bytes(18)])
        case 7:
            data += rng.randbytes(rng.choice([1, 8, 1000]))
    return bytes(data)


def _json(content: bytes, rng: random.Random) -> bytes:
    """A changed, missing, moved, renamed or repeated value; rarely a deep or incomplete document."""
    if rng.random() < 0.03:
        return rng.choice([b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe{}", b"nul", b"9" * 5000])
    tree = json.loads(content)
    places = list(_entries(tree))
    holder, key = rng.choice(places)
    match rng.randrange(9):
        case 0:
            del holder[key]
        case 1:
            other, there = rng.choice(places)
            holder[key] = copy.deepcopy(other[there])
        case 2 if isinstance(holder, dict):
            holder[rng.choice(NAMES)] = holder.pop(key)
        case 2:
            holder.extend([holder[key]] * rng.choice([1, 50]))
        case _:
            holder[key] = rng.choice(VALUES)
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def _entries(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key) of every nested value."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield tree, key
        yield from _entries(value)


def _safetensors(content: bytes, rng: random.Random) -> bytes:
    """Another header, which is JSON after its length, or another length."""
    (size,) = struct.unpack("<Q", content[:8])
    header = _json(content[8 : 8 + size], rng)
    told = rng.choice([len(header)] * 9 + [0, 2**62, 2**64 - 1, len(header) - 1, len(header) + 1])
    return struct.pack("<Q", told) + header + content[8 + size :]


def _zip(content: bytes, rng: random.Random) -> bytes:
    """Damaged, renamed, missing or repeated members whose checksums match; or a false entry; rarely a bomb."""
    if rng.random() < 0.02:
        return _bomb()
    if rng.random() < 0.1:
        return _false_entry(content, rng)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    index = rng.choice([0, rng.randrange(len(entries))])
    name, data = entries[index]
    match rng.randrange(7):
        case 0:
            entries[index] = (rng.choice(NAMES).replace("\0", ""), data)
        case 1:
            del entries[index]
        case 2:
            entries.append((name, rng.choice(entries)[1]))
        case _:
            entries[index] = (name, damaged(data, rng))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", rng.choice([zipfile.ZIP_STORED] * 4 + [zipfile.ZIP_DEFLATED])) as archive:
        for name, data in entries:
            archive.writestr(zipfile.ZipInfo(name), data)
    return stream.getvalue()


@functools.cache
def _bomb() -> bytes:
    return payloads.bomb("archive", 2**28)


def _false_entry(content: bytes, rng: random.Random) -> bytes:
    """An entry of the central directory with another flag, method, checksum, size or offset."""
    starts = [place for place in range(len(content)) if content.startswith(b"PK\1\2", place)]
    place, (offset, width) = rng.choice(starts), rng.choice([(8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (42, 4)])
    false = (rng.choice(NUMBERS) % 256**width).to_bytes(width, "little")
    return content[: place + offset] + false + content[place + offset + width :]


def _npy(content: bytes, rng: random.Random) -> bytes:
    """Another type, order or shape: petabytes, nothing, objects with a pickle that would execute code."""
    if rng.random() < 0.2:
        return _npy_header("'|O'", "False", "(1,)") + rng.choice(pickles())
    shape = rng.choice([f"({2**50},)", "(0,)", "(-1,)", "()", "(2,)", "'x'", "(1e9,)", f"({2**40}, {2**40})"])
    kind = rng.choice(["'<f4'", "'|u1'", "'|O'", "'>i8'", "'<U9'", "'|V2'", "[('a','<f4')]", "'M8'", "None", "'<f2'"])
    shape = rng.choice([shape] * 6 + ["{" * 9000, "__import__('os').system('touch CANARY')", "(" * 200 + ")" * 200])
    return _npy_header(kind, rng.choice(["True", "False", "3"]), shape) + content[128:]


def _npy_header(kind: str, order: str, shape: str) -> bytes:
    header = f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


def _pickle(content: bytes, rng: random.Random) -> bytes:
    """A payload instead of the pickle, before its end, or instead of one of the pickles that it contains."""
    payload = rng.choice(pickles())
    inner = [place for place in range(len(content)) if content.startswith(LEGACY, place)]
    if inner and rng.random() < 0.7:
        place = rng.choice(inner)
        return content[:place] + payload + content[place + rng.choice([len(LEGACY), len(payload)]) :]
    if rng.random() < 0.5:
        end = content.index(b".", rng.choice([0, 30, 40, 60, 200])) + 1  # files before PyTorch 1.6 hold five pickles
        return rng.choice([payload, content[:end] + payload + content[end:]])
    return content[:-1] + payload[2 if payload[:1] == b"\x80" else 0 : -1] + b"0."  # its result is dropped


def _png(content: bytes, rng: random.Random) -> bytes:
    """Another size, depth or color type, with a matching checksum."""
    size = struct.pack(">II", *rng.choices([0, 1, 7, 20, 8000, 8192, 2**16, 2**24, 2**31 - 1, 2**32 - 1], k=2))
    rest = rng.choice([bytes([8, 2, 0, 0, 0]), bytes(rng.choices([0, 1, 2, 3, 4, 8, 16, 255], k=5))])
    header = b"IHDR" + size + rest
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


def _csv(content: bytes, rng: random.Random) -> bytes:
    """Another value in one cell."""
    lines = [line.split(",") for line in content.decode().splitlines()]
    cells = rng.choice(lines)
    cells[rng.randrange(len(cells))] = rng.choice(CELLS)
    return ("\n".join(map(",".join, lines)) + rng.choice(["", "\n", "\r", "\n\n"])).encode()


_STRUCTURES: tuple[tuple[Callable[[bytes], bool], Callable[[bytes, random.Random], bytes]], ...] = (
    (lambda content: content[:2] == b"PK", _zip),
    (lambda content: content[:6] == b"\x93NUMPY", _npy),
    (lambda content: content[:1] == b"\x80", _pickle),
    (lambda content: content[:4] == b"\x89PNG", _png),
    (lambda content: content[:1] == b"{", _json),
    (lambda content: content[8:9] == b"{", _safetensors),
    (lambda content: content[:8] == b"batches,", _csv),
)
