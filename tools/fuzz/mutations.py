"""Mutations of the files in a folder, and of file formats that can contain pickles or false sizes."""

import functools
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from cm_jax.conversion.torch_files import LEGACY
from tools.fuzz import payloads
from tools.fuzz.damage import Damage, damaged, json_damaged, npy_damaged, safetensors_damaged, zip_damaged

Mutation = Callable[[Path, random.Random], None]
"""Changes files in a folder."""


def in_file(name: str, *ways: Damage) -> Mutation:
    """Damages the file `name` in one of these ways."""

    def mutate(folder: Path, rng: random.Random) -> None:
        file = folder / name
        file.write_bytes(rng.choice(ways)(file.read_bytes(), rng))

    return mutate


def one_of(*mutations: Mutation) -> Mutation:
    return lambda folder, rng: rng.choice(mutations)(folder, rng)


def in_folder(top: str) -> Mutation:
    """Damages a file in a folder according to its suffix, removes it, or replaces it by a folder or another file."""

    def mutate(folder: Path, rng: random.Random) -> None:
        files = sorted(path for path in (folder / top).rglob("*") if path.is_file())
        file = rng.choice(files)
        what = rng.randrange(12)
        if what == 0:
            file.unlink()
        elif what == 1:
            file.unlink()
            file.mkdir()
        elif what == 2:
            shutil.copyfile(rng.choice(files), folder / "copied")
            (folder / "copied").replace(file)
        elif what == 3:
            shutil.rmtree(file.parent)
        else:
            kinds = {".json": json_damaged, ".safetensors": safetensors_damaged, ".npz": npz}
            file.write_bytes(kinds.get(file.suffix, damaged)(file.read_bytes(), rng))

    return mutate


@functools.cache
def _pickles() -> list[bytes]:
    return payloads.pickles()


@functools.cache
def _bomb() -> bytes:
    return payloads.bomb("archive", 2**28)


def injected(content: bytes, rng: random.Random) -> bytes:
    return payloads.injected(content, rng, _pickles())


def zipped_pickle(content: bytes, rng: random.Random) -> bytes:
    """A zip archive with a pickle that would execute code."""
    way = rng.choice([injected, injected, damaged])
    return zip_damaged(content, rng, lambda data, rng: way(data, rng) if data[:1] == b"\x80" else damaged(data, rng))


def legacy_pickle(content: bytes, rng: random.Random) -> bytes:
    """A payload instead of one of the five pickles at the beginning."""
    end = content.index(b".", rng.choice([0, 30, 40, 60, 200])) + 1
    return content[:end] + rng.choice(_pickles()) + content[end:] if rng.random() < 0.5 else injected(content, rng)


def persistence_pickle(content: bytes, rng: random.Random) -> bytes:
    """A pickle of the EDM family with a payload in place of a storage, which is a pickle in itself, or with a cut."""
    starts = [place for place in range(len(content)) if content.startswith(LEGACY, place)]
    place = rng.choice(starts)
    if rng.random() < 0.3:
        return content[: rng.randrange(len(content))]
    payload = rng.choice(_pickles())[: rng.choice([40, 200, 2000])]
    return content[:place] + payload + content[place + len(payload) :]


def bomb(content: bytes, rng: random.Random) -> bytes:
    return _bomb() if rng.random() < 0.05 else damaged(content, rng)


def npz(content: bytes, rng: random.Random) -> bytes:
    def member(data: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.2:  # an object array is a header and a pickle
            head = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
            return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + rng.choice(_pickles())
        return npy_damaged(data, rng)

    return zip_damaged(content, rng, member)


def png(content: bytes, rng: random.Random) -> bytes:
    """A PNG with another size, depth or color type in its header, and a matching checksum."""
    sizes = [0, 1, 7, 20, 8000, 8192, 2**16, 2**24, 2**31 - 1, 2**32 - 1]
    header = struct.pack(
        ">IIBBBBB",
        rng.choice(sizes),
        rng.choice(sizes),
        *(rng.choice([0, 1, 2, 3, 4, 8, 16, 255]) for _ in range(5)),
    )
    header = header[:8] + rng.choice([bytes([8, 2, 0, 0, 0]), header[8:]])
    return content[:12] + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + content[33:]


def csv(content: bytes, rng: random.Random) -> bytes:
    lines = content.decode().splitlines()
    place = rng.randrange(len(lines))
    cells = lines[place].split(",")
    cells[rng.randrange(len(cells))] = rng.choice(
        ["", "nan", "-1", "1e999", "x", '"', "9" * 5000, "=cmd()", "\0", "\x1b[2J", "5.5", "batches", "٣", "1_0"]
    )
    lines[place] = ",".join(cells)
    return ("\n".join(lines) + rng.choice(["", "\n", "\r", "\n\n"])).encode()
