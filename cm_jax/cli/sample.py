"""`sample`: sample images from a checkpoint."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from cm_jax import conversion
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.checkpoints.published import DEFAULT, resolve
from cm_jax.cli.labels import LabelTexts, read_labels
from cm_jax.cli.options import LARGEST_GRID, Network, Sampling
from cm_jax.cli.parsing import parse
from cm_jax.cli.running import devices, progress, say, stopwatch, use_compilation_cache
from cm_jax.errors import InputError, check_int
from cm_jax.io.atomic import check_writable
from cm_jax.io.images import Quantization, fits_png, grid, quantize, save_folder, save_grid, save_npz
from cm_jax.loading import from_source
from cm_jax.model import Model, SamplingPlan
from cm_jax.samplers import SAMPLERS
from cm_jax.types import in_pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(Sampling, Network):
    """Sample images from a consistency model or a denoiser.

    A consistency model samples in one step unless --steps, --timesteps, --indices or --sigmas is given.
    """

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")] = DEFAULT
    """A checkpoint (native, an OpenAI .pt file or a diffusers folder), a run folder (its latest checkpoint; RUN/best
    is the best one), an id of the Hugging Face Hub (OWNER/NAME or OWNER/NAME@REVISION), or the name of a bundled or
    downloaded model."""
    count: int | None = None
    """Number of images. Default: 16, or 8 per label."""
    labels: LabelTexts = ()
    """Classes by index or name, separated by commas ("145,king penguin"), as a JSON list, or by several --labels; or
    "all". A name may be a whole ImageNet name with commas or a synonym. Each class gets the same number of images.
    Default: random classes."""
    output: Path = Path("samples.png")
    """NAME.png: a grid of all images. NAME.npz: arr_0 (images) and arr_1 (labels), as evaluators read them. Any other
    name: a folder of PNG files. Images of other than 1 or 3 channels, and latents, are written as .npz."""
    rgba: bool = False
    """Write images of 4 channels as RGBA PNG files."""
    key: str | None = None
    """The network to sample from, for files with several: "ema". `convert` lists them."""
    quantization: Quantization = "round"
    """Conversion to 8 bits: rounding, or truncation as in OpenAI's implementation."""


def main(prog: str, words: Sequence[str]) -> None:
    """Load the model, sample, and write the images."""
    args = parse(Sample, prog, words)
    use_compilation_cache(args.compilation_cache)
    path = resolve(args.checkpoint)
    _check_output(args.output, args.count)
    began = time.perf_counter()
    source = conversion.read(path, conversion.CheckpointHints(key=args.key))
    for note in source.notes:
        say(note)
    model = from_source(source, args.precision)
    network = model.config.network
    plan = args.plan(model)
    labels, count, columns = _labels_and_count(model, args)
    output = _output_for(args, model.config)
    _check_output(output, count)
    kind = "consistency model" if model.config.distilled else "EDM denoiser"
    classes = f", {network.classes} classes" if network.classes else ""
    named = path if Path(args.checkpoint) in path.parents else args.checkpoint
    about = f"{named}: {kind}, {in_pixels(network.image_shape)}{classes}, {args.precision}, on {devices()}"
    say(f"{about}; loaded in {time.perf_counter() - began:.1f} s.")

    with stopwatch() as elapsed:
        batches = model.batches(args.seed, count, plan, labels=labels, batch_size=args.batch_size)
        say(f"Sampling {count} images: {_described(plan)}, seed {args.seed}.")
        convert = model.vae_latents if model.config.latents else functools.partial(quantize, how=args.quantization)
        images = np.concatenate([convert(batch) for batch in progress(batches, count)])
    took = elapsed()

    suffix = output.suffix.lower()
    if suffix == ".png":
        known = model.config.class_names
        rows = labels[::columns] if any(args.labels) and labels is not None else ()
        names = [known[label].split(",")[0] if known else f"class {label}" for label in rows]
        save_grid(output, grid(images, columns, names))
    else:
        (save_npz if suffix == ".npz" else save_folder)(output, images, labels)
    say(f"Sampled {count} images in {took}. Wrote {output}.")


def _output_for(args: Sample, config: ModelConfig) -> Path:
    """The output, or an .npz file in its place if PNG files cannot hold the images, which is printed."""
    output, suffix, channels = args.output, args.output.suffix.lower(), config.network.image_channels
    if args.rgba and (channels != 4 or config.latents):
        found = "latents" if config.latents else channels
        raise InputError(f"--rgba applies to models with 4 channels, this one has {found}: leave it out.")
    if config.latents:
        output = output.with_name(output.name.removesuffix(".png").removesuffix(".npz") + ".npz")
        decoder = config.latents.autoencoder
        say(f"The samples are latents of {decoder}: they are written to {output}, in float32, for its decoder.")
        return output
    if suffix == ".npz" or fits_png(channels, args.rgba):
        return output
    output = output.with_suffix(".npz") if suffix == ".png" else output.with_name(f"{output.name}.npz")
    advice = " (if they are RGBA, give --rgba)" if channels == 4 else ""
    say(f"The images have {channels} channels, which PNG files do not hold{advice}: they are written to {output}.")
    return output


def _check_output(output: Path, count: int | None) -> None:
    """Raise InputError for an output that cannot be written or whose format is not supported."""
    suffix = output.suffix.lower()
    if suffix in (".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".npy"):
        raise InputError(f"{output}: {suffix} files are not supported; use a .png file, an .npz file or a folder.")
    if suffix == ".png" and (count or 0) > LARGEST_GRID:
        raise InputError(
            f"A grid of {count} images is too large, at most {LARGEST_GRID}: use an .npz file or a folder as --output."
        )
    check_writable(output, folder=suffix not in (".png", ".npz"))


def _labels_and_count(model: Model, args: Sample) -> tuple[np.ndarray | None, int, int]:
    """(labels, number of images, columns of the grid)."""
    if not any(args.labels):
        count = 16 if args.count is None else check_int("count", args.count, 1, 10**9)
        return model.sample_labels(args.seed, count), count, max(1, round(count**0.5))
    classes = model.config.network.classes
    every = [text.strip().lower() for text in args.labels] == ["all"] and classes is not None
    wanted = list(range(classes or 0)) if every else read_labels(args.labels, model.config.class_names)
    numbers = model.class_numbers(wanted, len(wanted))
    assert numbers is not None
    count = 8 * len(numbers) if args.count is None else args.count
    if count % len(numbers) or count < 1:
        nearest = max(1, round(count / len(numbers))) * len(numbers)
        problem = f"--count {count} is not divisible by the number of labels, {len(numbers)}"
        raise InputError(f"{problem}: use --count {nearest}.")
    each = count // len(numbers)
    return np.repeat(numbers, each), count, each if len(numbers) > 1 else max(1, round(each**0.5))


def _described(plan: SamplingPlan) -> str:
    steps = len(plan.levels) - 1
    kind = type(plan.sampler)
    name = next((name for name, sampler in SAMPLERS.items() if type(sampler) is kind), kind.__name__)
    shown = ", ".join(f"{level:.4g}" for level in plan.levels[:-1][:4]) + (", ..." if steps > 4 else "")
    guidance = f", guidance {plan.guidance.strength:g}" if plan.guidance else ""
    return f"{name} sampler in {steps} step{'s' if steps > 1 else ''} (sigma {shown}){guidance}"
