"""`sample`: sample images from a checkpoint."""

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.checkpoints.published import DEFAULT, resolve
from cm_jax.cli.distributed import Devices
from cm_jax.cli.labels import LabelTexts, read_labels
from cm_jax.cli.options import Network, Sampling, WhichWeights
from cm_jax.cli.parsing import numbers, parse
from cm_jax.cli.running import described, say, stopwatch, use_compilation_cache
from cm_jax.errors import InputError, check_int
from cm_jax.io.images import Quantization, check_output, output_path, quantize, save_images
from cm_jax.model import Model, SamplingPlan
from cm_jax.parallelism.processes import from_all, raised_in_all, share_of_process
from cm_jax.progress import counted
from cm_jax.samplers import SAMPLERS
from cm_jax.types import in_pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(Sampling, WhichWeights, Devices, Network):
    """Sample images from a consistency model or a denoiser.

    A consistency model samples in one step unless --steps, --timesteps, --indices or --sigmas is given.
    """

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")] = DEFAULT
    """A checkpoint in any format that `convert` reads (native, .pt, .pkl, a diffusers folder, ...), a run folder (its
    latest checkpoint; RUN/best is the best one), an id of the Hugging Face Hub (OWNER/NAME or OWNER/NAME@REVISION), or
    the name of a bundled or downloaded model."""
    count: int | None = None
    """Number of images. Default: 16, or 8 per label."""
    seeds: str = ""
    """Several seeds, "3,8": the first image of each, for every label, in place of --seed and --count."""
    labels: LabelTexts = ()
    """Classes by index or name, separated by commas ("145,king penguin"), as a JSON list, or by several --labels; or
    "all". A name may be a whole ImageNet name with commas or a synonym. Each class gets the same number of images.
    Default: random classes."""
    output: Path = Path("samples.png")
    """NAME.png: a grid of all images. NAME.npz: arr_0 (images) and arr_1 (labels), as evaluators read them. Any other
    name: a folder of PNG files. Images of other than 1 or 3 channels, and latents, are written as .npz."""
    rgba: bool = False
    """Write images of 4 channels as RGBA PNG files."""
    quantization: Quantization = "round"
    """Conversion to 8 bits: rounding, or truncation as in OpenAI's implementation."""


def main(prog: str, words: Sequence[str]) -> None:
    """Load the model, sample, and write the images."""
    args = parse(Sample, prog, words)
    use_compilation_cache(args.compilation_cache)
    args.connect()
    path = resolve(args.checkpoint)
    check_output(args.output, args.count)
    began = time.perf_counter()
    model = dataclasses.replace(args.load(path, args.precision), parallelism=args.parallelism)
    network = model.config.network
    plan = args.plan(model)
    seeds = numbers("seeds", args.seeds, int)
    labels, count, columns = _labels_and_count(model, args, seeds)
    output = _output_for(args, model.config)
    check_output(output, count)
    kind = "consistency model" if model.config.distilled else "EDM denoiser"
    classes = f", {network.classes} classes" if network.classes else ""
    named = path if Path(args.checkpoint) in path.parents else args.checkpoint
    about = f"{named}: {kind}, {in_pixels(network.image_shape)}{classes}, {args.precision}"
    say(f"{about}, on {described(args.parallelism)}; loaded in {time.perf_counter() - began:.1f} s.")

    with stopwatch() as elapsed:
        batches = _share(model, args, seeds, plan, labels, count)
        say(f"Sampling {count} images: {_described(plan)}, seed{f's {args.seeds}' if seeds else f' {args.seed}'}.")
        convert = model.vae_latents if model.config.latents else functools.partial(quantize, how=args.quantization)
        with raised_in_all():
            own = [convert(batch) for batch in batches]
        shares = from_all({"images": np.concatenate(own)} if own else {})
        images = np.concatenate([share["images"] for share in shares if share])
    took = elapsed()

    known = model.config.class_names
    rows = labels[::columns] if any(args.labels) and labels is not None else ()
    names = [known[label].split(",")[0] if known else f"class {label}" for label in rows]
    exact = {"quantization": None} if model.config.latents else {}
    if jax.process_index() == 0:
        save_images(images, output, labels=labels, columns=columns, row_names=names, rgba=args.rgba, **exact)
    say(f"Sampled {count} images in {took}. Wrote {output}.")


def _share(
    model: Model,
    args: Sample,
    seeds: tuple[int, ...] | None,
    plan: SamplingPlan,
    labels: np.ndarray | None,
    count: int,
) -> Iterator[np.ndarray]:
    """This process's share of the images, in batches."""
    first, last = share_of_process(count)
    if first == last:
        return iter(())
    options = {"labels": None if labels is None else labels[:last], "batch_size": args.batch_size, "first": first}
    if seeds:
        batches = model.batches(None, 1, plan, seeds=(seeds * (count // len(seeds)))[:last], **options)
    else:
        batches = model.batches(args.seed, last, plan, **options)
    return counted(batches, last - first, "Sampling")


def _output_for(args: Sample, config: ModelConfig) -> Path:
    """The output, or an .npz file in its place if PNG files cannot hold the images, which is printed."""
    channels = config.network.image_shape[2]
    if args.rgba and (channels != 4 or config.latents):
        found = "latents" if config.latents else channels
        raise InputError(f"--rgba applies to models with 4 channels, this one has {found}: leave it out.")
    output = output_path(args.output, 0 if config.latents else channels, args.rgba)
    if config.latents:
        decoder = config.latents.autoencoder
        say(f"The samples are latents of {decoder}: they are written to {output}, in float32, for its decoder.")
    elif output != args.output:
        advice = " (if they are RGBA, give --rgba)" if channels == 4 else ""
        say(f"The images have {channels} channels, which PNG files do not hold{advice}: they are written to {output}.")
    return output


def _labels_and_count(model: Model, args: Sample, seeds: Sequence[int] | None) -> tuple[np.ndarray | None, int, int]:
    """(labels, number of images, columns of the grid)."""
    if seeds and args.count is not None:
        raise InputError("--seeds samples one image per seed and label: leave out --count.")
    if not any(args.labels) and seeds:
        return model.sample_labels(seeds=seeds), len(seeds), len(seeds)
    if not any(args.labels):
        count = 16 if args.count is None else check_int("count", args.count, 1, 10**9)
        return model.sample_labels(args.seed, count), count, max(1, round(count**0.5))
    classes = model.config.network.classes
    every = [text.strip().lower() for text in args.labels] == ["all"] and classes is not None
    wanted = list(range(classes or 0)) if every else read_labels(args.labels, model.config.class_names)
    numbers = model.class_numbers(wanted, len(wanted))
    assert numbers is not None
    count = len(seeds or range(8)) * len(numbers) if args.count is None else args.count
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
