"""Images a second of the data pipelines alone, before any training step: python -m benchmarks.data_time

A folder of 64-pixel PNG files is made from the bundled emoji, enlarged. Read at 64 pixels it is decoded once and served
from memory, and streamed by grain, by threads and by processes; the first batch, with which processes start, is not
counted in their rate. Batches are numpy uint8 on the host: conversion to float and flips are part of the training step.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from cm_jax.data import Dataset, EmojiData, ImageFolder, InMemory, NpzData

Row = tuple[str, float, float]
"""(what, images a second, seconds until the first batch)."""


def rate(name: str, data: Dataset, batch_size: int, seconds: float) -> Row:
    """The rate of batches after the first, for about `seconds`."""
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
    """A PNG file of 64 pixels for every image."""
    folder.mkdir()
    for index, image in enumerate(data.images):
        Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{index:05d}.png")


def measured(folder: Path, batch_size: int, seconds: float) -> list[Row]:
    emoji = EmojiData("all").open(32)
    assert isinstance(emoji, InMemory)
    write_folder(folder / "png", emoji)
    rows = [rate("bundled emoji, 32 pixels, in memory", emoji, batch_size, seconds)]

    began = time.perf_counter()
    decoded = ImageFolder(str(folder / "png")).open(64)
    elapsed = time.perf_counter() - began
    assert isinstance(decoded, InMemory)
    rows.append(("folder of 64-pixel PNG: decoding it at the start", decoded.size / elapsed, elapsed))
    rows.append(rate("the same, then in memory", decoded, batch_size, seconds))
    for workers in (0, 2):
        streamed = ImageFolder(str(folder / "png"), in_memory_gib=0, workers=workers).open(64)
        how = f"{workers} processes" if workers else "threads"
        rows.append(rate(f"the same, streamed by {how}", streamed, batch_size, seconds))

    np.savez(folder / "data.npz", images=decoded.images)
    rows.append(rate("npz, 64 pixels", NpzData(str(folder / "data.npz")).open(64), batch_size, seconds))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each row")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(Path(folder), arguments.batch_size, arguments.seconds)
    print(f"Load average of the last minutes: {', '.join(f'{load:.1f}' for load in os.getloadavg())}.\n")
    print("| pipeline | images a second | first batch s |\n|---|---|---|")
    for name, images_per_second, first in rows:
        print(f"| {name} | {images_per_second:,.0f} | {first:.2f} |")


if __name__ == "__main__":
    main()
