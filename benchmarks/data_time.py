"""Throughput of the data pipelines without a training step: python -m benchmarks.data_time

Writes the bundled emoji, enlarged, as 64x64 PNG files, and reads them from memory and streamed by grain with threads
and with processes. The first batch, which includes starting the processes, is timed separately. Batches are numpy uint8
on the host: conversion to float and flips are part of the training step.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common import header, load_average, parser, row
from cm_jax.data import Dataset, EmojiData, ImageFolder, InMemory, NpzData

Row = tuple[str, float, float]
"""(pipeline, images per second, seconds to the first batch)."""


def rate(name: str, data: Dataset, batch_size: int, seconds: float) -> Row:
    """Read batches for about `seconds` after the first one."""
    batches = data.batches(batch_size)
    began = time.perf_counter()
    next(batches)
    first = time.perf_counter() - began
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        next(batches)
        count += batch_size
    images_per_second = count / (time.perf_counter() - began)
    batches.close()
    return name, images_per_second, first


def write_folder(folder: Path, data: InMemory) -> None:
    """Write each image as a 64x64 PNG file."""
    folder.mkdir()
    for index, image in enumerate(data.images):
        Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{index:05d}.png")


def measure(folder: Path, batch_size: int, seconds: float) -> list[Row]:
    emoji = EmojiData("all").open(32)
    assert isinstance(emoji, InMemory)
    write_folder(folder / "png", emoji)
    rows = [rate("bundled emoji, 32x32, in memory", emoji, batch_size, seconds)]

    began = time.perf_counter()
    decoded = ImageFolder(str(folder / "png")).open(64)
    elapsed = time.perf_counter() - began
    assert isinstance(decoded, InMemory)
    rows.append(("folder of 64x64 PNG: decoding into memory", decoded.size / elapsed, elapsed))
    rows.append(rate("the same folder, in memory", decoded, batch_size, seconds))
    for workers in (0, 2):
        streamed = ImageFolder(str(folder / "png"), in_memory_gib=0, workers=workers).open(64)
        how = f"{workers} processes" if workers else "threads"
        rows.append(rate(f"the same folder, streamed by {how}", streamed, batch_size, seconds))

    np.savez(folder / "data.npz", images=decoded.images)
    rows.append(rate("npz, 64x64", NpzData(str(folder / "data.npz")).open(64), batch_size, seconds))
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--batch-size", type=int, default=256)
    options.add_argument("--seconds", type=float, default=5.0, help="Duration of each row in seconds.")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), args.batch_size, args.seconds)
    print(f"{load_average()}\n")
    print(header("Pipeline", "Images/s", "First batch s"))
    for name, images_per_second, first in rows:
        print(row(name, f"{images_per_second:,.0f}", f"{first:.2f}"))


if __name__ == "__main__":
    main()
