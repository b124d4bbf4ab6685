"""Sample one image in a new process: python -m benchmarks.cold_start CHECKPOINT PRECISION IMAGE.png CACHE

`benchmarks.gpu` times this program. It does the work of `python sample.py --count 1` without the command line, for
machines without tyro. CACHE is the folder of compiled programs.
"""

import sys
from pathlib import Path

import jax

from cm_jax import load
from cm_jax.io.images import grid, quantize, save_grid


def main(checkpoint: str, precision: str, image: str, cache: str) -> None:
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    model = load(checkpoint, precision=precision)  # type: ignore[arg-type]
    save_grid(Path(image), grid(quantize(model.sample(0, 1)), 1))


if __name__ == "__main__":
    main(*sys.argv[1:])
