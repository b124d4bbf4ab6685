"""`export`: write a sampler as an artifact that runs without this package."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from cm_jax.checkpoints.published import resolve
from cm_jax.cli.options import Sampling, WhichWeights
from cm_jax.cli.parsing import parse
from cm_jax.cli.running import say
from cm_jax.exporting import check_export, write_artifact
from cm_jax.progress import activity
from cm_jax.types import Precision, in_pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export(Sampling, WhichWeights):
    """Export a sampler with jax.export: a folder that runs with jax, numpy, safetensors and flatbuffers alone.

    Its example.py samples images. A consistency model samples in one step unless --steps, --timesteps, --indices or
    --sigmas is given.
    """

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A checkpoint, run folder, id of the Hugging Face Hub or name of a model, as for `sample`."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder to write."""
    platforms: str = "cpu,cuda,tpu"
    """Platforms that can run the program."""
    precision: Precision = "float32"
    """Precision of matrix products and convolutions in the network."""


def main(prog: str, words: Sequence[str]) -> None:
    """Load the model, and write the artifact."""
    args = parse(Export, prog, words)
    platforms = check_export(args.output, args.platforms.split(","))
    model = args.load(resolve(args.checkpoint), args.precision)
    with activity("Exporting the sampler"):
        write_artifact(args.output, model, args.plan(model), platforms)
    shape = in_pixels(model.config.network.image_shape)
    say(f"Exported a sampler of images of {shape} for {', '.join(platforms)}: {args.output}.")
    say(f"Run it without cm_jax: python {shlex.quote(str(args.output / 'example.py'))}")
