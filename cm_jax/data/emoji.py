"""The bundled emoji."""

import dataclasses
import functools
import importlib.resources
from typing import Literal

import numpy as np

from cm_jax.data.base import Data, Dataset, InMemory, Progress, check_image_size
from cm_jax.data.npz import resized

Split = Literal["train", "held_out", "all"]


@dataclasses.dataclass(frozen=True)
class EmojiData(Data):
    """Bundled Noto and Twemoji images at 32 pixels, in 9 classes.

    The held-out split is selected by a hash of the code point, so it has the same emoji of both vendors.
    """

    split: Split = "train"
    """train: 3,334 images; held_out: 431 images for evaluation; all: both."""

    def open(self, image_size: int = 32, progress: Progress | None = None) -> Dataset:
        check_image_size(image_size, most=32)
        arrays = bundled()
        selected = np.ones(len(arrays["images"]), bool)
        if self.split != "all":
            selected = arrays["held_out"] == (self.split == "held_out")
        return InMemory(
            resized(arrays["images"][selected], image_size, progress),
            arrays["labels"][selected].astype(np.int32),
            class_names=tuple(arrays["class_names"].tolist()),
            place=f"bundled emoji, {self.split.replace('_', ' ')}",
        )


@functools.cache
def bundled() -> dict[str, np.ndarray]:
    """Arrays of tools/build_emoji32.py: images uint8 [3765, 32, 32, 3]; per image labels, held_out, vendor (0 Google,
    1 Twitter) and unified (code points); class_names.
    """
    path = importlib.resources.files("cm_jax.assets").joinpath("emoji32.npz")
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
