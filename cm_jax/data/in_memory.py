"""Decoded images in memory."""

import itertools

import numpy as np
from jaxtyping import Integer, UInt8

from cm_jax.data.base import Batches, Dataset, RawBatch, batch_indices, describe
from cm_jax.errors import InputError, check_int

MAX_CLASSES = 100_000


class InMemory(Dataset):
    """uint8 images [n, h, w, c] and int32 labels [n]. Raises InputError for inconsistent arrays."""

    def __init__(
        self,
        images: UInt8[np.ndarray, "n h w c"],
        labels: Integer[np.ndarray, " m"] | None = None,
        *,
        class_names: tuple[str, ...] = (),
        classes: int | None = None,
        place: str = "an array",
    ) -> None:
        if not images.size:
            raise InputError(f"{place} has no images: its shape is {list(images.shape)}.")
        if labels is not None:
            if len(labels) != len(images):
                raise InputError(
                    f"{place}: expected one label per image, got {len(labels)} labels for {len(images)} images."
                )
            lowest, highest = int(labels.min()), int(labels.max())
            classes = classes or len(class_names) or check_int("The highest label", highest, 0, MAX_CLASSES - 1) + 1
            if lowest < 0 or highest >= classes:
                raise InputError(
                    f"{place}: expected labels in [0, {classes - 1}], got labels from {lowest} to {highest}. Correct "
                    "them or load the images without labels."
                )
        self.images = images
        self.labels = None if labels is None else labels.astype(np.int32)
        self.size = len(images)
        self.image_shape = images.shape[1:]
        self.classes = None if labels is None else classes
        self.class_names = () if labels is None else tuple(class_names)
        how = f"in memory ({images.nbytes / 1e6:,.0f} MB)"
        self.description = describe(place, self.size, self.image_shape[0], self.classes, how)

    def _batches(self, batch_size: int, seed: int, start: int, rows: slice) -> Batches:
        for number in itertools.count(start):
            indices = batch_indices(self.size, batch_size, seed, number)[rows]
            yield RawBatch(self.images[indices], None if self.labels is None else self.labels[indices])
