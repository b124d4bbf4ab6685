"""A program that draws one image: python cold_start.py CHECKPOINT PRECISION IMAGE.png FOLDER

`gpu` times it from its start to its end. It does what `python sample.py --count 1` does, without the command line, for
machines that lack tyro. FOLDER is where compiled programs are kept.
"""

import sys
from pathlib import Path

import jax

from cm_jax import load
from cm_jax.io.images import grid, quantize, save_grid


def main(checkpoint: str, precision: str, image: str, folder: str) -> None:
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    model = load(checkpoint, precision=precision)  # type: ignore[arg-type]
    save_grid(Path(image), grid(quantize(model.sample(0, 1)), 1))


if __name__ == "__main__":
    main(*sys.argv[1:])
