"""The emoji that ship with the package."""

import dataclasses
import functools
import importlib.resources
from typing import Literal

import numpy as np

from cm_jax.data.base import Data, Dataset, Progress, checked_image_size
from cm_jax.data.in_memory import InMemory
from cm_jax.data.npz import resized

Split = Literal["train", "held_out", "all"]


@dataclasses.dataclass(frozen=True)
class EmojiData(Data):
    """The emoji of Noto and of Twemoji at 32 pixels, in 9 classes; nothing is downloaded.

    An emoji is held out, by a hash of its code point, from both vendors' images at once.
    """

    split: Split = "train"
    """train: 3334 images; held_out: the other 431, to judge a model by; all: both."""

    def open(self, image_size: int = 32, progress: Progress | None = None) -> Dataset:
        checked_image_size(image_size, most=32)
        arrays = bundled()
        chosen = np.ones(len(arrays["images"]), bool)
        if self.split != "all":
            chosen = arrays["held_out"] == (self.split == "held_out")
        return InMemory(
            resized(arrays["images"][chosen], image_size, progress),
            arrays["labels"][chosen].astype(np.int32),
            class_names=tuple(arrays["class_names"].tolist()),
            place=f"bundled emoji, {self.split.replace('_', ' ')}",
        )


@functools.cache
def bundled() -> dict[str, np.ndarray]:
    """What tools/build_emoji32.py wrote: images uint8 [3765, 32, 32, 3]; of each its label, whether it is held out, its
    vendor (0 google, 1 twitter) and its code points (unified); and the class_names.
    """
    path = importlib.resources.files("cm_jax.assets").joinpath("emoji32.npz")
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
