"""The command line: `cm-jax sample` and `cm-jax convert`, also as `python sample.py` and `python -m convert`."""

import contextlib
import dataclasses
import io
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import jax
import numpy as np
import tyro

from cm_jax import conversion
from cm_jax.conversion.sources import ScalingName
from cm_jax.errors import InputError
from cm_jax.files import check_writable
from cm_jax.images import Quantisation, grid, quantise, save_folder, save_grid, save_npz
from cm_jax.model import Model, Plan, find, load
from cm_jax.networks.fir import Filter
from cm_jax.networks.precision import Precision
from cm_jax.published import DEFAULT
from cm_jax.samplers import SAMPLERS

_LARGEST_GRID = 4096


@dataclasses.dataclass(frozen=True)
class Sample:
    """Draw images from a consistency model, or from an EDM teacher.

    One step by default; --steps, --timesteps, --indices and --sigmas ask for more, each in its own way.
    """

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")] = DEFAULT
    """A cm_jax checkpoint, the original's .pt file, a diffusers folder, or the name of a bundled model."""
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
    quantisation: Quantisation = "round"
    """To 8 bits by rounding, or by truncating as the original does."""
    compilation_cache: str = ""
    """Folder in which compiled programs are kept from run to run, or "off". Default: in the user's cache folder."""


@dataclasses.dataclass(frozen=True)
class Convert:
    """Convert a checkpoint between PyTorch and JAX: the original's .pt, a diffusers folder, ours; in every direction.

    The Flax checkpoints of openai/consistency_models_cifar10 are read too, and become ours.

    The architecture is read off the tensors. The flags say what tensors cannot tell; the published checkpoints are
    recognised by name and need none of them.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A .pt file, a diffusers folder, a CIFAR-10 original's file, a cm_jax checkpoint, or a bundled model's name."""
    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")]
    """What to write. It must not exist yet, unless it is a .pt file."""
    to: Literal["", "ours", "openai", "diffusers", "lpips", "inception"] = ""
    """Default: openai for a destination that ends in .pt, else ours. lpips, inception: a .safetensors file with the
    weights of the distance or of the metrics; docs/conversion.md tells where SOURCE comes from."""
    head_width: int | None = None
    """Channels of an attention head (64 in the published networks)."""
    heads: int | None = None
    """Number of attention heads, where that is what all levels share."""
    scalings: ScalingName | None = None
    """consistency: f with f(x, sigma_min) = x; edm: a denoiser, such as a teacher."""
    levels: int | None = None
    """Number of levels of the grid that timesteps and indices count (40 for CD; 201 or 151 for CT)."""
    image_size: int | None = None
    """Height and width of the images."""
    attention_factors: str = ""
    """Of a CIFAR-10 original: factors of down-sampling with attention, as "2" or "2,4"."""
    resampling: Filter | None = None
    """Of a CIFAR-10 original: the filter before halving and after doubling."""
    lpips_heads: Path | None = None
    """Of LPIPS: the heads (lpips/weights/v0.1/vgg.pth in the package lpips), where SOURCE is torchvision's VGG16."""
    check: bool = False
    """Run PyTorch's network and ours on the same inputs first; write only if they agree."""


def sample(arguments: Sample) -> None:
    """Load, draw, write, and say what was done."""
    _use_compilation_cache(arguments.compilation_cache)
    path = find(arguments.checkpoint)
    _check_output(arguments.output, arguments.count)
    began = time.perf_counter()
    model = load(path, precision=arguments.precision)
    network = model.config.network
    plan = model.plan(
        steps=arguments.steps,
        timesteps=_numbers("timesteps", arguments.timesteps, int),
        indices=_numbers("indices", arguments.indices, int),
        sigmas=_numbers("sigmas", arguments.sigmas, float),
        sampler=arguments.sampler or None,
    )
    labels, count, columns = _shared_out(model, arguments)
    _check_output(arguments.output, count)
    kind = "consistency model" if model.config.distilled else "EDM denoiser"
    classes = f", {network.classes} classes" if network.classes else ""
    _say(
        f"{arguments.checkpoint}: {kind}, {network.image_shape[0]} pixels{classes}, {arguments.precision}, on "
        f"{_devices()}; read in {time.perf_counter() - began:.1f} s."
    )
    _say(f"Drawing {count} images, {_described(plan)}, seed {arguments.seed}.")

    began = time.perf_counter()
    with _compilation_time() as compiled:
        batches = model.batches(arguments.seed, count, plan, labels=labels, batch_size=arguments.batch_size)
        images = np.concatenate([quantise(batch, arguments.quantisation) for batch in _progress(batches, count)])
    elapsed = time.perf_counter() - began

    suffix = arguments.output.suffix.lower()
    if suffix == ".png":
        names = _row_names(model, labels, columns) if arguments.labels else ()
        save_grid(arguments.output, grid(images, columns, names))
    else:
        (save_npz if suffix == ".npz" else save_folder)(arguments.output, images, labels)
    compilation = compiled()
    _say(
        f"Drew {count} images in {elapsed:.1f} s, {compilation:.1f} s of it compiling. They are in {arguments.output}."
    )


def convert(arguments: Convert) -> None:
    """Read, check, write, and say what was done."""
    from cm_jax.conversion.parity import compare

    if arguments.to in ("lpips", "inception"):
        _convert_weights(arguments)
        return
    if arguments.lpips_heads is not None:
        raise InputError("--lpips-heads belongs to --to lpips: say that too, or leave it out.")
    suffix = arguments.destination.suffix.lower()
    kind = arguments.to or ("openai" if suffix == ".pt" else "ours")
    if kind != "openai" and arguments.destination.exists():
        raise InputError(f"{arguments.destination} exists already: name another destination, or remove it first.")
    if kind != "openai" and suffix in (".pt", ".bin", ".safetensors", ".npz", ".ckpt", ".msgpack"):
        raise InputError(f"{arguments.destination} looks like a file, and --to {kind} writes a folder: name a folder.")
    check_writable(arguments.destination, folder=kind != "openai")
    untold = conversion.Untold(
        arguments.head_width,
        arguments.heads,
        arguments.scalings,
        arguments.levels,
        arguments.image_size,
        _numbers("attention-factors", arguments.attention_factors, int),
        arguments.resampling,
    )
    began = time.perf_counter()
    source = conversion.read(find(arguments.source), untold)
    network = source.config.network
    parameters = sum(leaf.size for leaf in jax.tree.leaves(source.params))
    _say(f"Read {arguments.source}: {_architecture(source)}; {parameters:,} parameters.")
    if arguments.check:
        parity = compare(source)
        _say(parity.report())
        if not parity.passed:
            raise InputError(f"The two networks disagree, so {arguments.destination} was not written.")
    conversion.write(arguments.destination, kind, source.config, source.params)
    _say(f"Wrote {arguments.destination} ({kind}) in {time.perf_counter() - began:.1f} s.")
    if kind == "diffusers" and not source.config.distilled:
        _say("It holds the network alone: ConsistencyModelPipeline would take a denoiser for a consistency function.")
    if kind == "ours":
        _say(
            f"Draw from it: python sample.py {shlex.quote(str(arguments.destination))}"
            + (" --labels 0" if network.classes else "")
        )


def _convert_weights(arguments: Convert) -> None:
    """The weights of LPIPS or of Inception, from others' files to ours."""
    from cm_jax import inception, perceptual
    from cm_jax.conversion import judges

    mine = ("source", "destination", "to") + (("lpips_heads",) if arguments.to == "lpips" else ())
    flags = [field for field in dataclasses.fields(Convert) if field.name not in mine]
    given = ["--" + field.name.replace("_", "-") for field in flags if getattr(arguments, field.name) != field.default]
    if given:
        raise InputError(f"--to {arguments.to} has no use for {' and '.join(given)}: these are about other files.")
    if arguments.destination.suffix.lower() != ".safetensors":
        raise InputError(f"--to {arguments.to} writes one file: name it {arguments.destination.stem}.safetensors.")
    check_writable(arguments.destination, folder=False)
    if arguments.to == "lpips":
        params = judges.read_lpips(Path(arguments.source), arguments.lpips_heads)
        what, file, published = "VGG16 and the heads of LPIPS", perceptual.FILE, judges.LPIPS_DIGEST
    else:
        params = judges.read_inception(Path(arguments.source))
        classifier = "with" if "logits" in params else "without"
        what, file, published = f"Inception-V3 {classifier} classes", inception.FILE, judges.INCEPTION_DIGEST
    known = "those published" if judges.digest(params) == published else "NOT those published: retrained, or damaged"
    _say(f"Read {arguments.source}: {what}; its numbers are {known}.")
    file.save(arguments.destination, params)
    _say(f"Wrote {arguments.destination}. To use it: export {file.variable}={shlex.quote(str(arguments.destination))}")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """`cm-jax sample ...`, `cm-jax convert ...`."""
    both = (
        Annotated[Sample, tyro.conf.subcommand("sample", description=Sample.__doc__)]
        | Annotated[Convert, tyro.conf.subcommand("convert", description=Convert.__doc__)]
    )
    chosen = tyro.cli(both, prog="cm-jax", args=arguments)  # type: ignore[arg-type]
    _run(lambda: sample(chosen) if isinstance(chosen, Sample) else convert(chosen))


def main_sample(arguments: Sequence[str] | None = None) -> NoReturn:
    """`python sample.py ...`."""
    chosen = tyro.cli(Sample, prog="sample.py", args=arguments)
    _run(lambda: sample(chosen))


def main_convert(arguments: Sequence[str] | None = None) -> NoReturn:
    """`python -m convert ...`."""
    chosen = tyro.cli(Convert, prog="python -m convert", args=arguments)
    _run(lambda: convert(chosen))


def _run(command: Callable[[], None]) -> NoReturn:
    """Exit with 0; or, for bad input, with 2 and one message; or with 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name may have letters that the terminal lacks
    try:
        command()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; nothing is half-written.", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _say(line: str) -> None:
    print(line, flush=True)


def _numbers(name: str, text: str, kind: Callable[[str], Any]) -> tuple[Any, ...] | None:
    """The numbers of a comma-separated list; None for an empty text."""
    if not text:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        wanted = "whole numbers" if kind is int else "numbers"
        raise InputError(f"--{name} wants {wanted} with commas between, got {text!r}.") from error


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
        count = 16 if arguments.count is None else arguments.count
        labels = model.draw_labels(arguments.seed, count) if count > 0 else None
        return labels, count, max(1, round(abs(count) ** 0.5))
    classes = model.config.network.classes
    every = arguments.labels.strip().lower() == "all" and classes is not None
    wanted = [str(i) for i in range(classes or 0)] if every else arguments.labels.split(",")
    numbers = model.labels(wanted, len(wanted))
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


def _described(plan: Plan) -> str:
    steps = len(plan.levels) - 1
    name = next((name for name, sampler in SAMPLERS.items() if sampler == plan.sampler), type(plan.sampler).__name__)
    shown = ", ".join(f"{level:.4g}" for level in plan.levels[:-1][:4]) + (", ..." if steps > 4 else "")
    return f"{name} sampler in {steps} step{'s' if steps > 1 else ''} (sigma {shown})"


def _architecture(source: conversion.Source) -> str:
    config, network = source.config, source.config.network
    kind = "consistency model" if config.distilled else "EDM denoiser"
    classes = f"{network.classes} classes" if network.classes else "unconditional"
    return f"{kind}, {network.image_shape[0]} pixels, {classes}, {config.grid.levels} levels"


def _devices() -> str:
    devices = jax.local_devices()
    return f"{len(devices)} x {devices[0].device_kind}"


def _progress(batches: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """The batches, with a bar on a terminal's standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("images", total=count)
        for batch in batches:
            yield batch
            bar.advance(task, len(batch))


@contextlib.contextmanager
def _compilation_time() -> Iterator[Callable[[], float]]:
    """A function that tells how many seconds went into tracing and compiling inside the block."""
    spent: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            spent.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield lambda: sum(spent)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _use_compilation_cache(folder: str) -> None:
    """Keep compiled programs between runs, unless JAX was already told where, or the user wants none."""
    if folder == "off" or (not folder and os.environ.get("JAX_COMPILATION_CACHE_DIR")):
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(folder) if folder else home / "cm_jax" / "compiled"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if folder:
            raise InputError(f"Cannot keep compiled programs in {path}: {error.strerror}.") from error
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
