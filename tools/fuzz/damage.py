"""Mutations of valid files: bytes, members of zip archives, JSON values."""

import copy
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

Damage = Callable[[bytes, random.Random], bytes]

NAMES = (
    *("../../escaped", "/tmp/escaped", "..\\escaped", "", ".", "..", "a/../../b", "C:\\escaped", "\u202egnp.exe"),
    *("\x1b[2J", "new\nline", "e\u0301\u0000", "x" * 300, "data.pkl", "archive/data.pkl", "__torch__", "'; DROP TABLE"),
)
"""Invalid names of files, members, tensors and classes."""
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**53, 2**63, -(2**63), 10**30, 10**400, 0.1, -0.0, 1e-320, 1e39),
    *(1e308, float("nan"), float("inf"), float("-inf"), "", "0", "nan", [], {}, [[]], [0], [-1, 2**40], [None] * 3),
    *({"kind": "os.system"}, {"kind": "object", "__class__": "str"}, "__import__('os').system('touch CANARY')"),
    *("ADMUNet", "float32", "a" * 5000, "\ud800", "\x1b]0;owned\x07", [1e300] * 20, list(range(3000))),
)
"""Unexpected JSON values."""
_NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """One to four random mutations, more often near the beginning or the end."""
    for _ in range(rng.choice([1, 1, 2, 4])):
        content = rng.choice(_MUTATIONS)(bytearray(content), rng)
    return content


def _position(content: bytearray, rng: random.Random) -> int:
    """A random position, more often near the beginning or the end, where headers are."""
    size = len(content)
    return min(
        max(0, size - 1),
        rng.choice([rng.randrange(size + 1), rng.randrange(200), size - rng.randrange(200)]) % (size + 1),
    )


def _scattered(content: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.choice([1, 3, 30]) if content else 0):
        content[_position(content, rng)] = rng.randrange(256)
    return bytes(content)


def _flipped(content: bytearray, rng: random.Random) -> bytes:
    if content:
        content[_position(content, rng)] ^= 1 << rng.randrange(8)
    return bytes(content)


def _cut(content: bytearray, rng: random.Random) -> bytes:
    return bytes(content[: _position(content, rng)])


def _extended(content: bytearray, rng: random.Random) -> bytes:
    return bytes(content) + rng.randbytes(rng.choice([1, 8, 1000]))


def _range(content: bytearray, rng: random.Random) -> slice:
    first = _position(content, rng)
    return slice(first, first + rng.choice([1, 4, 8, 64, 4096]))


def _zeros(content: bytearray, rng: random.Random) -> bytes:
    where = _range(content, rng)
    content[where] = bytes(len(content[where]))
    return bytes(content)


def _repeated(content: bytearray, rng: random.Random) -> bytes:
    where = _range(content, rng)
    content[where] = content[where] * 2
    return bytes(content)


def _removed(content: bytearray, rng: random.Random) -> bytes:
    del content[_range(content, rng)]
    return bytes(content)


def _swapped(content: bytearray, rng: random.Random) -> bytes:
    first, second = _range(content, rng), _range(content, rng)
    content[first], content[second] = content[second], content[first]
    return bytes(content)


def _length(content: bytearray, rng: random.Random) -> bytes:
    """Overwrite a length field: an integer of 1, 2, 4 or 8 bytes with an extreme value."""
    width, first = rng.choice([1, 2, 4, 8]), _position(content, rng)
    number = rng.choice(_NUMBERS) % 256**width
    content[first : first + width] = number.to_bytes(width, rng.choice(["little", "big"]))
    return bytes(content)


def _other(content: bytearray, rng: random.Random) -> bytes:
    """A different file."""
    return rng.choice([b"", b"\0" * 1000, rng.randbytes(500), b"<html>not found</html>", b"PK\x05\x06" + bytes(18)])


_MUTATIONS = (*(_scattered, _flipped, _cut, _zeros, _repeated, _removed, _swapped, _length) * 3, _extended, _other)


def json_damaged(content: bytes, rng: random.Random) -> bytes:
    """One to three changed values, keys or entries of a JSON file; sometimes random byte mutations."""
    if rng.random() < 0.15:
        return damaged(content, rng)
    if rng.random() < 0.03:
        return rng.choice([b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe{}", b"nul", b"9" * 5000])
    tree = json.loads(content)
    for _ in range(rng.choice([1, 1, 2, 3])):
        tree = _damage_tree(tree, rng)
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def _damage_tree(tree: Any, rng: random.Random) -> Any:
    tree = copy.deepcopy(tree)
    places = list(_entries(tree))
    if not places:
        return rng.choice(VALUES)
    holder, key = rng.choice(places)
    what = rng.randrange(10)
    if what < 6:
        holder[key] = rng.choice(VALUES)
    elif what == 6:
        del holder[key]
    elif what == 7:
        other, there = rng.choice(places)
        holder[key] = copy.deepcopy(other[there]) if other is not holder[key] else None
    elif what == 8 and isinstance(holder, dict):
        holder[rng.choice(NAMES)] = holder.pop(key)
    elif isinstance(holder, list):
        holder.extend([holder[key]] * rng.choice([1, 50]))
    else:
        holder[key] = [holder[key]]
    return tree


def _entries(tree: Any) -> Any:
    """(holder, key) of every nested value."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        yield tree, key
        yield from _entries(value)


def zip_damaged(content: bytes, rng: random.Random, member: Damage = damaged) -> bytes:
    """A zip archive with members damaged by `member`, renamed, missing, duplicated, or with false sizes.

    Checksums match, so that readers process the content; sometimes the bytes of the archive itself are damaged.
    """
    if rng.random() < 0.3:
        return damaged(content, rng)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    for _ in range(rng.choice([1, 1, 2])):
        index = rng.choice([0, rng.randrange(len(entries))]) if entries else 0
        what = rng.randrange(8) if entries else 8
        name, data = entries[index] if entries else ("", b"")
        if what < 4:
            entries[index] = (name, member(data, rng))
        elif what == 4:
            entries[index] = (rng.choice(NAMES).replace("\0", ""), data)
        elif what == 5:
            del entries[index]
        elif what == 6:
            entries.append((name, rng.choice([data, rng.randbytes(50)])))
        elif what == 7:
            entries[index] = (name, entries[rng.randrange(len(entries))][1])
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", rng.choice([zipfile.ZIP_STORED] * 4 + [zipfile.ZIP_DEFLATED])) as archive:
        for name, data in entries:
            archive.writestr(zipfile.ZipInfo(name), data)
    content = stream.getvalue()
    return _false_entry(content, rng) if rng.random() < 0.15 else content


def _false_entry(content: bytes, rng: random.Random) -> bytes:
    """An entry of the central directory with another checksum, size, compressed size, method or offset."""
    found, start = [], 0
    while (start := content.find(b"PK\x01\x02", start)) >= 0:
        found.append(start)
        start += 4
    if not found:
        return content
    told, place = bytearray(content), rng.choice(found)
    offset, width = rng.choice([(8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (42, 4)])
    told[place + offset : place + offset + width] = (rng.choice(_NUMBERS) % 256**width).to_bytes(width, "little")
    return bytes(told)


def safetensors_damaged(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header (JSON after its length) declares other shapes, types, offsets or lengths."""
    if rng.random() < 0.3:
        return damaged(content, rng)
    (size,) = struct.unpack("<Q", content[:8])
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
    for _ in range(rng.choice([1, 1, 2])):
        tensors = [name for name, entry in header.items() if name != "__metadata__" and isinstance(entry, dict)]
        what = rng.randrange(6) if tensors else 5
        entry = header[rng.choice(tensors)] if tensors else {}
        if what == 0:
            entry["dtype"] = rng.choice(["F16", "F64", "BF16", "I8", "BOOL", "F8_E4M3", "C64", "X", "", 3, None])
        elif what == 1:
            entry["shape"] = rng.choice([[2**60], [-1], [], [0], [1.5], ["2"], None, [2**31, 2**31, 2**31], [1] * 100])
        elif what == 2:
            entry["data_offsets"] = rng.choice([[0, 2**62], [5, 1], [0], [-1, 4], None, [2**64, 2**64], [0, 4]])
        elif what == 3:
            header[rng.choice(NAMES)] = header.pop(rng.choice(tensors))
        else:
            header = _damage_tree(header, rng)
            header = header if isinstance(header, dict) else {"x": header}
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    told = rng.choice([len(text)] * 9 + [0, 2**62, 2**64 - 1, len(text) - 1, len(text) + 1])
    return struct.pack("<Q", told) + text + rest


def npy_damaged(content: bytes, rng: random.Random) -> bytes:
    """A .npy file whose header declares another type, order or shape: petabytes, objects, empty."""
    if rng.random() < 0.5 or not content.startswith(b"\x93NUMPY"):
        return damaged(content, rng)
    shape = rng.choice(
        [f"({2**50},)", "(0,)", "(-1,)", "()", "(2,)", "'x'", "(1e9,)", f"({2**40}, {2**40})", "(7, 5, 5)"]
    )
    kind = rng.choice(["'<f4'", "'|u1'", "'|O'", "'>i8'", "'<U9'", "'|V2'", "[('a','<f4')]", "'M8'", "None", "'<f2'"])
    text = f"{{'descr': {kind}, 'fortran_order': {rng.choice(['True', 'False', '3'])}, 'shape': {shape}, }}"
    text = rng.choice([text] * 6 + ["{" * 9000, "__import__('os').system('touch CANARY')", "(" * 200 + ")" * 200])
    header = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content[128:]
