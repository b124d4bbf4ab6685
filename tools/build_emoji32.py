"""Build cm_jax/assets/emoji32.npz: python -m tools.build_emoji32 EMOJI64.npz

EMOJI64.npz holds the 64-pixel images of the npm packages emoji-datasource-google and emoji-datasource-twitter 16.0.0 on
white: images, labels, label_names, vendor, unified (code points), is_base (no skin tone). The emoji without skin tones
are downsampled: the mean of each 2 x 2 pixels of the 8-bit values, halves rounded up. An emoji is held out if
the SHA-256 of its code points, as a number, is divisible by 10.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from cm_jax.io.atomic import atomic_write

DESTINATION = Path(__file__).resolve().parent.parent / "cm_jax" / "assets" / "emoji32.npz"


def downsampled(images: UInt8[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "n half_h half_w c"]:
    """The mean of each 2 x 2 pixels, halves rounded up."""
    x = images.astype(np.uint16)
    total = x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]
    return ((total + 2) // 4).astype(np.uint8)


def is_held_out(unified: str) -> bool:
    """Whether an emoji, by its code points as in "1F600" or "0023-FE0F-20E3", is held out."""
    return int.from_bytes(hashlib.sha256(unified.encode()).digest()) % 10 == 0


def build(source: Path) -> dict[str, np.ndarray]:
    """The arrays of the data set, without duplicates at 32 pixels (there are none)."""
    with np.load(source, allow_pickle=False) as file:
        base = file["is_base"]
        images = downsampled(file["images"][base])
        labels, vendor, unified = file["labels"][base], file["vendor"][base], file["unified"][base]
        names = file["label_names"]
    _, first = np.unique(images.reshape(len(images), -1), axis=0, return_index=True)
    kept = np.sort(first)
    return {
        "images": images[kept],
        "labels": labels[kept].astype(np.uint8),
        "held_out": np.array([is_held_out(str(code)) for code in unified[kept]]),
        "vendor": vendor[kept].astype(np.uint8),
        "unified": unified[kept],
        "class_names": names,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="EMOJI64.npz")
    source = parser.parse_args().source
    if not source.is_file():
        parser.error(f"there is no file {source}.")
    arrays = build(source)
    with atomic_write(DESTINATION) as beside, beside.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    held_out = int(arrays["held_out"].sum())
    print(f"{len(arrays['images'])} images, {held_out} held out, {DESTINATION.stat().st_size:,} bytes")
    print("SHA-256 of the images:", hashlib.sha256(arrays["images"].tobytes()).hexdigest())


if __name__ == "__main__":
    main()
