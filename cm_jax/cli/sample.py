"""`sample`: draw images from a checkpoint."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from cm_jax.checkpoints.published import DEFAULT
from cm_jax.checkpoints.resolve import resolve
from cm_jax.cli.parsing import numbers
from cm_jax.cli.running import compilation_time, devices, progress, say, use_compilation_cache
from cm_jax.errors import InputError, check_int
from cm_jax.io.atomic import check_writable
from cm_jax.io.images import Quantization, grid, quantize, save_folder, save_grid, save_npz
from cm_jax.loading import load
from cm_jax.model import Model, SamplingPlan
from cm_jax.samplers import SAMPLERS
from cm_jax.types import Precision

_LARGEST_GRID = 4096


@dataclasses.dataclass(frozen=True)
class Sample:
    """Draw images from a consistency model, or from an EDM teacher.

    One step by default; --steps, --timesteps, --indices and --sigmas ask for more, each in its own way.
    """

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")] = DEFAULT
    """A cm_jax checkpoint, a run's folder (its newest checkpoint; RUN/best is its best), the original's .pt file, a
    diffusers folder, or the name of a bundled model."""
    count: int | None = None
    """Number of images. Default: 16, or 8 for each of the labels."""
    labels: str = ""
    """Classes by number or name: 145, or "145,207", or "king penguin", or "all"; images are shared out evenly among
    them. Default: drawn at random from the seed."""
    steps: int | None = None
    """Number of steps. Levels tuned for this checkpoint are used where they are known."""
    timesteps: str = ""
    """Grid indices as diffusers writes them, falling to 0: "22,0"."""
    indices: str = ""
    """Grid indices as the original writes them, rising from 0 to the last: "0,22,39"."""
    sigmas: str = ""
    """Noise levels, falling: "80,1.38"."""
    sampler: Literal["", "consistency", "heun", "euler", "dpm", "ancestral", "progdist"] = ""
    """Default: consistency, or heun for a model with EDM scalings."""
    seed: int = 0
    """The same seed gives the same images, whatever the batch size and the devices."""
    precision: Precision = "float32"
    """Of the products inside the network."""
    batch_size: int | None = None
    """Images drawn at once over all devices. Default: 64 a device, fewer above 64 pixels."""
    output: Path = Path("samples.png")
    """samples.png: all in a grid; samples.npz: arr_0 and arr_1, for evaluators; anything else: a folder of PNGs."""
    quantization: Quantization = "round"
    """To 8 bits by rounding, or by truncating as the original does."""
    compilation_cache: str = ""
    """Folder in which compiled programs are kept from run to run, or "off". Default: in the user's cache folder."""


def sample(arguments: Sample) -> None:
    """Load, draw, write, and say what was done."""
    use_compilation_cache(arguments.compilation_cache)
    path = resolve(arguments.checkpoint)
    _check_output(arguments.output, arguments.count)
    began = time.perf_counter()
    model = load(path, precision=arguments.precision)
    network = model.config.network
    plan = model.plan(
        steps=arguments.steps,
        timesteps=numbers("timesteps", arguments.timesteps, int),
        indices=numbers("indices", arguments.indices, int),
        sigmas=numbers("sigmas", arguments.sigmas, float),
        sampler=arguments.sampler or None,
    )
    labels, count, columns = _shared_out(model, arguments)
    _check_output(arguments.output, count)
    kind = "consistency model" if model.config.distilled else "EDM denoiser"
    classes = f", {network.classes} classes" if network.classes else ""
    named = path if Path(arguments.checkpoint) in path.parents else arguments.checkpoint
    say(
        f"{named}: {kind}, {network.image_shape[0]} pixels{classes}, {arguments.precision}, on "
        f"{devices()}; read in {time.perf_counter() - began:.1f} s."
    )

    began = time.perf_counter()
    with compilation_time() as compiled:
        batches = model.batches(arguments.seed, count, plan, labels=labels, batch_size=arguments.batch_size)
        say(f"Drawing {count} images, {_described(plan)}, seed {arguments.seed}.")
        images = np.concatenate([quantize(batch, arguments.quantization) for batch in progress(batches, count)])
    elapsed = time.perf_counter() - began

    suffix = arguments.output.suffix.lower()
    if suffix == ".png":
        names = _row_names(model, labels, columns) if arguments.labels else ()
        save_grid(arguments.output, grid(images, columns, names))
    else:
        (save_npz if suffix == ".npz" else save_folder)(arguments.output, images, labels)
    compilation = compiled()
    say(f"Drew {count} images in {elapsed:.1f} s, {compilation:.1f} s of it compiling. They are in {arguments.output}.")


def _check_output(output: Path, count: int | None) -> None:
    """Raise InputError for an output that could not be written, or that would not be what its name promises."""
    suffix = output.suffix.lower()
    if suffix in (".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".npy"):
        raise InputError(f"{output}: {suffix} files are not written; name a .png file, an .npz file or a folder.")
    if suffix == ".png" and (count or 0) > _LARGEST_GRID:
        raise InputError(
            f"A grid of {count} images is too large to look at: name an .npz file or a folder as --output."
        )
    check_writable(output, folder=suffix not in (".png", ".npz"))


def _shared_out(model: Model, arguments: Sample) -> tuple[np.ndarray | None, int, int]:
    """(class of every image, number of images, columns of a grid)."""
    if not arguments.labels:
        count = 16 if arguments.count is None else check_int("count", arguments.count, 1, 10**9)
        return model.sample_labels(arguments.seed, count), count, max(1, round(count**0.5))
    classes = model.config.network.classes
    every = arguments.labels.strip().lower() == "all" and classes is not None
    wanted = [str(i) for i in range(classes or 0)] if every else arguments.labels.split(",")
    numbers = model.class_numbers(wanted, len(wanted))
    assert numbers is not None
    count = 8 * len(numbers) if arguments.count is None else arguments.count
    if count % len(numbers) or count < 1:
        nearest = max(1, round(count / len(numbers))) * len(numbers)
        raise InputError(
            f"--count {count} cannot be shared out evenly among {len(numbers)} labels: try --count {nearest}."
        )
    each = count // len(numbers)
    return np.repeat(numbers, each), count, each if len(numbers) > 1 else max(1, round(each**0.5))


def _row_names(model: Model, labels: np.ndarray | None, columns: int) -> list[str]:
    """What stands at the left of each row of a grid: the name of the row's class, or its number."""
    names = model.config.class_names
    first = [] if labels is None else labels[::columns].tolist()
    return [names[label].split(",")[0] if names else f"class {label}" for label in first]


def _described(plan: SamplingPlan) -> str:
    steps = len(plan.levels) - 1
    name = next((name for name, sampler in SAMPLERS.items() if sampler == plan.sampler), type(plan.sampler).__name__)
    shown = ", ".join(f"{level:.4g}" for level in plan.levels[:-1][:4]) + (", ..." if steps > 4 else "")
    return f"{name} sampler in {steps} step{'s' if steps > 1 else ''} (sigma {shown})"
