"""Sets of 8-bit images to compare, from files, data sets and models, read batch by batch."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cm_jax.checkpoints import native
from cm_jax.data import Data, Dataset, EmojiData, ImageFolder, NpzData, TFDSData
from cm_jax.data.decoding import MODES
from cm_jax.data.image_folder import image_files
from cm_jax.errors import InputError, check_int, indented_list, nearest
from cm_jax.io.atomic import user_path
from cm_jax.io.images import check_finite, quantize
from cm_jax.model import Model, SamplingPlan
from cm_jax.types import ImageSize

UNIT = 64
"""Processes share the images of a set in multiples of this."""


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
    """8-bit images of one size, which can be read repeatedly."""

    name: str
    count: int
    shape: tuple[int, int, int]
    read: Callable[[int, int], Iterator[UInt8[np.ndarray, "b h w c"]]]
    """(first, last) -> images first ... last - 1 in batches; first is a multiple of UNIT."""
    how: dict[str, Any] = dataclasses.field(default_factory=dict)
    """How a model sampled them; empty for files and data sets."""

    def batches(self) -> Iterator[UInt8[np.ndarray, "b h w c"]]:
        """All images."""
        return self.read(0, self.count)

    def digest(self) -> str:
        """SHA-256 of all pixels in order."""
        total = hashlib.sha256(repr((self.count, self.shape)).encode())
        for images in self.batches():
            total.update(images.tobytes())
        return total.hexdigest()


def of_dataset(dataset: Dataset, name: str, count: int | None = None) -> ImageSet:
    """All images of a data set, or `count` of them, chosen by a fixed permutation."""
    if count is not None and not 1 <= count <= dataset.size:
        raise InputError(f"Expected a count in [1, {dataset.size}], the size of {name}, got {count}.")
    wanted = count or dataset.size

    def read(first: int, last: int) -> Iterator[np.ndarray]:
        return (batch.images for batch in dataset.first(last, UNIT, first))

    return ImageSet(name, wanted, dataset.image_shape, read)


def of_model(
    model: Model, plan: SamplingPlan, count: int, *, seed: int = 0, batch_size: int | None = None, name: str = "a model"
) -> ImageSet:
    """Samples of a model: images 0 ... count - 1 of `seed` with random classes, rounded to 8 bits."""
    check_int("The number of images", count, 1, 10**9)
    model.config.check_pixels()

    def read(first: int, last: int) -> Iterator[np.ndarray]:
        for images in model.batches(seed, last, plan, batch_size=batch_size, first=first):
            yield quantize(check_finite(images, name))

    how = plan.described() | {"seed": seed, "quantization": "round"}
    return ImageSet(name, count, model.config.network.image_shape, read, how)


def holds_images(name: str) -> bool:
    """Whether a name refers to images rather than a checkpoint."""
    path = user_path(name)
    if path.is_dir():
        inside = ("checkpoints", "model_index.json", "unet", "config.json")
        return not native.is_checkpoint(path) and not any((path / each).exists() for each in inside)
    known = name.partition(":")[0] in ("emoji", "tfds") and not path.is_file()
    return known or path.suffix.lower() in (".npz", ".npy")


def open_images(name: str, shape: tuple[int, int, int] | None = None) -> Dataset:
    """Open emoji, emoji:held_out, tfds:NAME, tfds:NAME:SPLIT, a folder or an .npz file.

    shape: center-crop and resize to this (h, w, c); .npz files keep their size. Without it, images keep their size,
    which must be the same for all images of a folder. Raises InputError for anything else.
    """
    path = user_path(name)
    if path.suffix.lower() == ".npz" and not path.is_dir():
        return NpzData(name).unchanged()
    channels = shape[2] if shape and shape[2] in MODES else None
    return _data(name).open(shape[:2] if shape else _own_size(name), channels=channels)


def _data(name: str) -> Data:
    kind, _, rest = name.partition(":")
    path = user_path(name)
    if path.is_file():
        suffix, new = path.suffix.lower(), f"{path.stem}.npz"
        advice = {
            ".npy": f" Save it as .npz: numpy.savez({new!r}, arr_0=numpy.load({path.name!r})).",
            ".pkl": f" If it holds mu and sigma, load it with its own program and call numpy.savez({new!r}, mu=..., "
            "sigma=...).",
        }
        raise InputError(
            f"{name} is a file{f' of type {suffix}' if suffix else ''}; expected an .npz file (images in arr_0, or mu "
            f"and sigma) or a folder of images.{advice.get(suffix, '')}"
        )
    if path.exists():
        return ImageFolder(name, labels="none")
    if kind == "emoji":
        if rest not in ("", "all", "train", "held_out"):
            raise InputError(f"There is no emoji split {rest!r}: use emoji:train, emoji:held_out or emoji:all.")
        return EmojiData(rest or "train")  # type: ignore[arg-type]
    if kind == "tfds" and rest:
        data, _, split = rest.partition(":")
        if split[:1].isdigit() or split.startswith("*"):  # a version of the data set
            version, _, split = split.partition(":")
            data = f"{data}:{version}"
        return TFDSData(name=data, split=split or "train")
    raise InputError(
        f"There are no images {name}: expected an .npz file, a folder, emoji, emoji:held_out or tfds:NAME."
        f"{nearest(name, ['emoji', 'emoji:held_out', 'emoji:all'])}"
    )


def _own_size(name: str) -> ImageSize:
    """The common height and width of all images. Raises InputError if sizes differ."""
    top = user_path(name)
    if not top.is_dir():
        if name.startswith("tfds:"):
            raise InputError("A TFDS data set has no image size and cannot be evaluated as samples: save it as .npz.")
        return 32
    sizes: dict[tuple[int, int], str] = {}
    for file in image_files(top)[0]:
        try:
            with Image.open(top.joinpath(*file)) as image:
                sizes.setdefault(image.size, "/".join(file))
        except Exception as error:  # every image format raises its own exceptions for damaged files
            raise InputError(f"{top.joinpath(*file)} cannot be read as an image: {error}.") from error
    if len(sizes) > 1:
        lines = [f"{width} x {height}: {file}" for (width, height), file in sizes.items()]
        raise InputError(f"Expected samples of one size; {name} has:\n  {indented_list(lines)}")
    ((width, height),) = sizes
    return height, width
