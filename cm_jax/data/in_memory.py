"""Images that lie decoded in memory."""

import itertools

import numpy as np
from jaxtyping import Integer, UInt8

from cm_jax.data.base import Batches, Dataset, RawBatch, batch_indices, described
from cm_jax.errors import InputError, check_int

MOST_CLASSES = 100_000


class InMemory(Dataset):
    """uint8 images [n, h, w, c] and int32 labels [n], gathered by index.

    A batch costs one copy of its images, and once an epoch the sorting of n numbers. Whoever has room for `images` on
    the device needs only `indices`. Raises InputError for arrays that do not belong together.
    """

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
            raise InputError(f"{place} has no images in it: its shape is {list(images.shape)}.")
        if labels is not None:
            if len(labels) != len(images):
                raise InputError(f"{place} has {len(labels)} labels for {len(images)} images: one for each is needed.")
            lowest, highest = int(labels.min()), int(labels.max())
            classes = classes or len(class_names) or check_int("The highest label", highest, 0, MOST_CLASSES - 1) + 1
            if lowest < 0 or highest >= classes:
                raise InputError(
                    f"{place} has labels from {lowest} to {highest}, and {classes} classes are numbered 0 to "
                    f"{classes - 1}: correct the labels, or go without them."
                )
        self.images = images
        self.labels = None if labels is None else labels.astype(np.int32)
        self.size = len(images)
        self.image_shape = images.shape[1:]
        self.classes = None if labels is None else classes
        self.class_names = () if labels is None else tuple(class_names)
        how = f"in memory ({images.nbytes / 1e6:,.0f} MB)"
        self.description = described(place, self.size, self.image_shape[0], self.classes, how)

    def _batches(self, batch_size: int, seed: int, start: int, rows: slice) -> Batches:
        for number in itertools.count(start):
            chosen = batch_indices(self.size, batch_size, seed, number)[rows]
            yield RawBatch(self.images[chosen], None if self.labels is None else self.labels[chosen])
