"""What is done to good files: to their bytes, to what zip archives hold, to values in JSON."""

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
"""Names that files, members, tensors and classes should not have."""
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**53, 2**63, -(2**63), 10**30, 10**400, 0.1, -0.0, 1e-320, 1e39),
    *(1e308, float("nan"), float("inf"), float("-inf"), "", "0", "nan", [], {}, [[]], [0], [-1, 2**40], [None] * 3),
    *({"kind": "os.system"}, {"kind": "object", "__class__": "str"}, "__import__('os').system('touch CANARY')"),
    *("ADMUNet", "float32", "a" * 5000, "\ud800", "\x1b]0;owned\x07", [1e300] * 20, list(range(3000))),
)
"""Values that JSON can hold and that should be where they are not wanted."""
_NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1)


def damaged(content: bytes, dice: random.Random) -> bytes:
    """One to four blind injuries, anywhere, and more often at the beginning or at the end."""
    for _ in range(dice.choice([1, 1, 2, 4])):
        content = dice.choice(_INJURIES)(bytearray(content), dice)
    return content


def _place(content: bytearray, dice: random.Random) -> int:
    """Headers are at the beginning of most formats, and at the end of zip archives."""
    size = len(content)
    return min(
        max(0, size - 1),
        dice.choice([dice.randrange(size + 1), dice.randrange(200), size - dice.randrange(200)]) % (size + 1),
    )


def _scattered(content: bytearray, dice: random.Random) -> bytes:
    for _ in range(dice.choice([1, 3, 30]) if content else 0):
        content[_place(content, dice)] = dice.randrange(256)
    return bytes(content)


def _flipped(content: bytearray, dice: random.Random) -> bytes:
    if content:
        content[_place(content, dice)] ^= 1 << dice.randrange(8)
    return bytes(content)


def _cut(content: bytearray, dice: random.Random) -> bytes:
    return bytes(content[: _place(content, dice)])


def _longer(content: bytearray, dice: random.Random) -> bytes:
    return bytes(content) + dice.randbytes(dice.choice([1, 8, 1000]))


def _range(content: bytearray, dice: random.Random) -> slice:
    first = _place(content, dice)
    return slice(first, first + dice.choice([1, 4, 8, 64, 4096]))


def _zeros(content: bytearray, dice: random.Random) -> bytes:
    where = _range(content, dice)
    content[where] = bytes(len(content[where]))
    return bytes(content)


def _twice(content: bytearray, dice: random.Random) -> bytes:
    where = _range(content, dice)
    content[where] = content[where] * 2
    return bytes(content)


def _removed(content: bytearray, dice: random.Random) -> bytes:
    del content[_range(content, dice)]
    return bytes(content)


def _exchanged(content: bytearray, dice: random.Random) -> bytes:
    first, second = _range(content, dice), _range(content, dice)
    content[first], content[second] = content[second], content[first]
    return bytes(content)


def _length(content: bytearray, dice: random.Random) -> bytes:
    """A number of 1, 2, 4 or 8 bytes, as lengths are: zero, the largest, the largest with a sign."""
    width, first = dice.choice([1, 2, 4, 8]), _place(content, dice)
    number = dice.choice(_NUMBERS) % 256**width
    content[first : first + width] = number.to_bytes(width, dice.choice(["little", "big"]))
    return bytes(content)


def _other(content: bytearray, dice: random.Random) -> bytes:
    """Another file altogether."""
    return dice.choice([b"", b"\0" * 1000, dice.randbytes(500), b"<html>not found</html>", b"PK\x05\x06" + bytes(18)])


_INJURIES = (*(_scattered, _flipped, _cut, _zeros, _twice, _removed, _exchanged, _length) * 3, _longer, _other)


def json_damaged(content: bytes, dice: random.Random) -> bytes:
    """One to three values, keys or entries of a JSON file made something else; now and then its bytes are."""
    if dice.random() < 0.15:
        return damaged(content, dice)
    if dice.random() < 0.03:
        return dice.choice([b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe{}", b"nul", b"9" * 5000])
    tree = json.loads(content)
    for _ in range(dice.choice([1, 1, 2, 3])):
        tree = _tree_damaged(tree, dice)
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def _tree_damaged(tree: Any, dice: random.Random) -> Any:
    tree = copy.deepcopy(tree)
    places = list(_places(tree))
    if not places:
        return dice.choice(VALUES)
    holder, key = dice.choice(places)
    what = dice.randrange(10)
    if what < 6:
        holder[key] = dice.choice(VALUES)
    elif what == 6:
        del holder[key]
    elif what == 7:
        other, there = dice.choice(places)
        holder[key] = copy.deepcopy(other[there]) if other is not holder[key] else None
    elif what == 8 and isinstance(holder, dict):
        holder[dice.choice(NAMES)] = holder.pop(key)
    elif isinstance(holder, list):
        holder.extend([holder[key]] * dice.choice([1, 50]))
    else:
        holder[key] = [holder[key]]
    return tree


def _places(tree: Any) -> Any:
    """(holder, key) of every value inside."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        yield tree, key
        yield from _places(value)


def zip_damaged(content: bytes, dice: random.Random, member: Damage = damaged) -> bytes:
    """A zip archive whose members are damaged by `member`, renamed, missing, doubled, or lie about their size.

    Checksums fit what is there, so that readers get to see it; now and then the archive's own bytes are damaged.
    """
    if dice.random() < 0.3:
        return damaged(content, dice)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    for _ in range(dice.choice([1, 1, 2])):
        index = dice.choice([0, dice.randrange(len(entries))]) if entries else 0
        what = dice.randrange(8) if entries else 8
        name, data = entries[index] if entries else ("", b"")
        if what < 4:
            entries[index] = (name, member(data, dice))
        elif what == 4:
            entries[index] = (dice.choice(NAMES).replace("\0", ""), data)
        elif what == 5:
            del entries[index]
        elif what == 6:
            entries.append((name, dice.choice([data, dice.randbytes(50)])))
        elif what == 7:
            entries[index] = (name, entries[dice.randrange(len(entries))][1])
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", dice.choice([zipfile.ZIP_STORED] * 4 + [zipfile.ZIP_DEFLATED])) as archive:
        for name, data in entries:
            archive.writestr(zipfile.ZipInfo(name), data)
    content = stream.getvalue()
    return _lying(content, dice) if dice.random() < 0.15 else content


def _lying(content: bytes, dice: random.Random) -> bytes:
    """An entry of the central directory with another checksum, size, packed size, method or place."""
    found, start = [], 0
    while (start := content.find(b"PK\x01\x02", start)) >= 0:
        found.append(start)
        start += 4
    if not found:
        return content
    told, place = bytearray(content), dice.choice(found)
    offset, width = dice.choice([(8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (42, 4)])
    told[place + offset : place + offset + width] = (dice.choice(_NUMBERS) % 256**width).to_bytes(width, "little")
    return bytes(told)


def safetensors_damaged(content: bytes, dice: random.Random) -> bytes:
    """A safetensors file whose header (JSON behind its length) names other shapes, types, places or lengths."""
    if dice.random() < 0.3:
        return damaged(content, dice)
    (size,) = struct.unpack("<Q", content[:8])
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
    for _ in range(dice.choice([1, 1, 2])):
        tensors = [name for name, entry in header.items() if name != "__metadata__" and isinstance(entry, dict)]
        what = dice.randrange(6) if tensors else 5
        entry = header[dice.choice(tensors)] if tensors else {}
        if what == 0:
            entry["dtype"] = dice.choice(["F16", "F64", "BF16", "I8", "BOOL", "F8_E4M3", "C64", "X", "", 3, None])
        elif what == 1:
            entry["shape"] = dice.choice([[2**60], [-1], [], [0], [1.5], ["2"], None, [2**31, 2**31, 2**31], [1] * 100])
        elif what == 2:
            entry["data_offsets"] = dice.choice([[0, 2**62], [5, 1], [0], [-1, 4], None, [2**64, 2**64], [0, 4]])
        elif what == 3:
            header[dice.choice(NAMES)] = header.pop(dice.choice(tensors))
        else:
            header = _tree_damaged(header, dice)
            header = header if isinstance(header, dict) else {"x": header}
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    told = dice.choice([len(text)] * 9 + [0, 2**62, 2**64 - 1, len(text) - 1, len(text) + 1])
    return struct.pack("<Q", told) + text + rest


def npy_damaged(content: bytes, dice: random.Random) -> bytes:
    """A .npy file whose header names another type, order or shape: an array of petabytes, of objects, of nothing."""
    if dice.random() < 0.5 or not content.startswith(b"\x93NUMPY"):
        return damaged(content, dice)
    shape = dice.choice(
        [f"({2**50},)", "(0,)", "(-1,)", "()", "(2,)", "'x'", "(1e9,)", f"({2**40}, {2**40})", "(7, 5, 5)"]
    )
    kind = dice.choice(["'<f4'", "'|u1'", "'|O'", "'>i8'", "'<U9'", "'|V2'", "[('a','<f4')]", "'M8'", "None", "'<f2'"])
    text = f"{{'descr': {kind}, 'fortran_order': {dice.choice(['True', 'False', '3'])}, 'shape': {shape}, }}"
    text = dice.choice([text] * 6 + ["{" * 9000, "__import__('os').system('touch CANARY')", "(" * 200 + ")" * 200])
    header = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content[128:]
