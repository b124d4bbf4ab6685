"""Reading a checkpoint of any kind: ours, the original's .pt, a diffusers folder, or the CIFAR-10 original's file."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from cm_jax import checkpoints, settings
from cm_jax.arrays import Params
from cm_jax.checked import read_json
from cm_jax.config import ModelConfig
from cm_jax.conversion import jcm, single_file
from cm_jax.conversion.diffusers_configs import Told, check_agreement, told_by
from cm_jax.conversion.files import is_msgpack, read_msgpack, read_safetensors
from cm_jax.conversion.formats import DIFFUSERS, OPENAI, Format
from cm_jax.conversion.pickles import read_torch
from cm_jax.conversion.rules import Tensors, to_ours
from cm_jax.errors import InputError, bounded
from cm_jax.networks import ADMUNet
from cm_jax.networks.fir import Filter
from cm_jax.noise_levels import EDM_TIME, KarrasGrid
from cm_jax.preconditioning import BoundaryScaling, EDMScaling
from cm_jax.published import recognise, recognise_cifar10

_ALIKE = 2e-3
"""Share of its parameters that a file with a published name may lack or have besides: it is damaged then, and what
differs is told; beyond that it holds another network."""

ScalingName = Literal["consistency", "edm"]


@dataclasses.dataclass(frozen=True)
class Untold:
    """What a file's tensors cannot tell. None: as its config or its published name says."""

    head_width: int | None = None
    heads: int | None = None
    scalings: ScalingName | None = None
    levels: int | None = None
    image_size: int | None = None
    attention_factors: tuple[int, ...] | None = None
    """For the CIFAR-10 original's files, where levels are equally wide: factors of down-sampling with attention."""
    resampling: Filter | None = None
    """For the CIFAR-10 original's files, where there is no pyramid of inputs."""

    def __post_init__(self) -> None:
        limits = {"head_width": (1, 4096), "heads": (1, 4096), "levels": (2, 2**20), "image_size": (1, 2**13)}
        for name, (least, most) in limits.items():
            if getattr(self, name) is not None:
                bounded(f"--{name.replace('_', '-')}", getattr(self, name), least, most)


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint as it was read."""

    path: Path
    config: ModelConfig
    params: Params
    """NumPy arrays in the file's precision."""
    format: Format | None = None
    """The PyTorch spelling of its tensors; None for others."""
    tensors: Tensors = dataclasses.field(default_factory=dict)
    """Its tensors under their own names; empty where they are not PyTorch's."""
    overridden: tuple[str, ...] = ()
    """What the user says and it says otherwise, a line for every value."""


def read(path: Path, untold: Untold = Untold()) -> Source:
    """Read a checkpoint of any kind.

    Raises InputError where there is none, where it is damaged or contradicts itself, or where `untold` must say more.
    """
    try:
        return _read(path, untold)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error


def _read(path: Path, untold: Untold) -> Source:
    if not path.exists():
        raise InputError(f"There is no file or folder {path}.")
    archive = path.is_file() and path.suffix.lower() == ".safetensors"
    if path.is_file() and not archive and is_msgpack(path):
        return _read_jcm(path, untold)
    if untold.attention_factors is not None or untold.resampling is not None:
        raise InputError(
            f"{path} tells itself where attention stands and how images are halved: leave out --attention-factors and "
            "--resampling, which are for checkpoints of openai/consistency_models_cifar10."
        )
    if archive and single_file.is_single_file(path):
        config, params = single_file.read(path)
        return _overridden(Source(path, config, params), untold)
    if path.is_file():
        return _read_tensors(path, path, Told(), untold)
    if checkpoints.is_checkpoint(path):
        config, params = checkpoints.restore(path)
        return _overridden(Source(path, config, params), untold)
    folder = path / "unet" if (path / "unet").is_dir() else path
    candidates = [*sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*.bin"))]
    if not candidates:
        content = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise InputError(
            f"{path} holds no weights: wanted a cm_jax checkpoint (config.json and params/) or a diffusers folder "
            f"(unet/diffusion_pytorch_model.safetensors or .bin); found {content}."
        )
    plain = [file for file in candidates if file.stem == "diffusion_pytorch_model"]
    told = told_by(folder / "config.json", path / "scheduler" / "scheduler_config.json")
    return _read_tensors(path, (plain or candidates)[0], told, untold)


def _read_tensors(path: Path, file: Path, told: Told, untold: Untold) -> Source:
    """Tensors of one file, with what a diffusers config, a published name and the user say of them."""
    tensors = read_safetensors(file) if file.suffix.lower() == ".safetensors" else read_torch(file)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    spelling = DIFFUSERS if any(name.startswith(("conv_in.", "down_blocks.")) for name in shapes) else OPENAI
    named, total = recognise(path), sum(math.prod(shape) for shape in shapes.values())
    known = named if named and math.isclose(total, named.parameters, rel_tol=_ALIKE) else None

    head_width, heads = untold.head_width, untold.heads
    if head_width is None and heads is None:
        head_width, heads = told.head_width, told.heads
    if head_width is None and heads is None and known:
        head_width = known.head_width
    image_size = _first(untold.image_size, told.image_size, known and known.image_size)
    levels = _first(untold.levels, told.grid and told.grid.levels, known and known.levels)
    scalings = _first(untold.scalings, "consistency" if told.grid else None, known and known.scalings)
    if scalings == "edm":
        levels = _first(levels, KarrasGrid().levels)
    unanswered = {
        "--image-size N (height of its images)": image_size,
        "--head-width N (64 in the published networks) or --heads N": _first(head_width, heads),
        "--scalings consistency (or edm, for a teacher)": scalings,
        "--levels N (40 for CD, 201 or 151 for CT in the published ones)": levels,
    }
    missing = [question for question, answer in unanswered.items() if answer is None]
    if missing:
        spelling.infer(shapes, str(file), image_size=2**10, heads=1, head_width=None)
        raise InputError(_unanswered(path, missing, named and f"it has {total:,} parameters, not {named.parameters:,}"))

    network = spelling.infer(shapes, str(file), image_size=image_size, head_width=head_width, heads=heads)
    rules = spelling.rules(network)
    params = to_ours(rules, network.shapes(), tensors, source=str(file))
    if (file.parent / "config.json").exists() and spelling is DIFFUSERS:
        check_agreement(file.parent / "config.json", read_json(file.parent / "config.json"), network)
    grid = dataclasses.replace(told.grid or KarrasGrid(), levels=levels)
    tuned = known.timesteps if known and known.levels == levels and scalings == "consistency" else ()
    edm, boundary = EDMScaling(told.sigma_data), BoundaryScaling(told.sigma_data, sigma_min=grid.sigma_min)
    config = ModelConfig(
        network=network,
        scaling=edm if scalings == "edm" else boundary,
        grid=grid,
        class_names=known.class_names if known and len(known.class_names) == network.classes else (),
        tuned_timesteps=(tuned,) if tuned else (),
    )
    return Source(path, config, params, spelling, tensors)


def _read_jcm(path: Path, untold: Untold) -> Source:
    """A checkpoint of openai/consistency_models_cifar10, with what its published name and the user say of it."""
    if untold.head_width or untold.heads:
        raise InputError(f"{path} is of a network whose attention has one head: leave out --head-width and --heads.")
    tensors = read_msgpack(path, jcm.BRANCH)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    known = recognise_cifar10(path)
    image_size = _first(untold.image_size, 32 if known else None)
    scalings = _first(untold.scalings, known and known.scalings)
    levels = _first(untold.levels, known and known.levels)
    if scalings == "edm":
        levels = _first(levels, KarrasGrid().levels)
    unanswered = {
        "--image-size N (32 for CIFAR-10)": image_size,
        "--scalings consistency (or edm, for a teacher)": scalings,
        "--levels N (18 for CD, 151 for CT in the published ones)": levels,
    }
    found = jcm.candidates(shapes, str(path), image_size=image_size or 2**10)
    factors = tuple(sorted(untold.attention_factors or ())) or ((2,) if known else None)
    for field, told in (("attention_factors", factors), ("resampling", untold.resampling)):
        options = {getattr(network, field) for network in found}
        shown = " or ".join(sorted(each if isinstance(each, str) else ",".join(map(str, each)) for each in options))
        if told is not None and told not in options:
            raise InputError(f"{path} cannot have {field} {told}: its tensors allow only {shown}.")
        found = [network for network in found if told in (None, getattr(network, field))]
        unanswered[f"--{field.replace('_', '-')} {shown}"] = told or (options.pop() if len(options) == 1 else None)
    missing = [question for question, answer in unanswered.items() if answer is None]
    if missing:
        raise InputError(_unanswered(path, missing))

    (network,) = found
    params = to_ours(jcm.rules(network), network.shapes(), tensors, source=str(path))
    grid = dataclasses.replace(KarrasGrid(), levels=levels)
    tuned = known.timesteps if known and known.levels == levels and scalings == "consistency" else ()
    scaling = BoundaryScaling(time_factor=EDM_TIME, sigma_min=grid.sigma_min)
    config = ModelConfig(
        network=network,
        scaling=EDMScaling(time_factor=EDM_TIME) if scalings == "edm" else scaling,
        grid=grid,
        tuned_timesteps=(tuned,) if tuned else (),
    )
    return Source(path, config, params)


def _first(*choices: Any) -> Any:
    """The first that is not None."""
    return next((choice for choice in choices if choice is not None), None)


def _unanswered(path: Path, questions: list[str], otherwise: str | None = None) -> str:
    """`otherwise`: why it is not the published checkpoint that it is named as."""
    listing = "\n  ".join(questions)
    known = "is not the published checkpoint of this name" if otherwise else "is not the name of a published checkpoint"
    return (
        f"{path.name} {known}{f' ({otherwise})' if otherwise else ''}, and its tensors cannot tell everything. "
        f"Convert it with cm-jax convert, and say also:\n  {listing}"
    )


def _heads(network: ADMUNet) -> str:
    return f"heads of width {network.head_width}" if network.heads is None else f"{network.heads} heads"


def _overridden(source: Source, untold: Untold) -> Source:
    """Our checkpoint with what the user says instead."""
    path, config = source.path, source.config
    network, grid, scaling = config.network, config.grid, config.scaling
    if untold.head_width or untold.heads:
        network = dataclasses.replace(config.adm, head_width=untold.head_width, heads=untold.heads)
        if network != config.adm:
            raise InputError(
                f"{path} says itself that its attention has {_heads(config.adm)}, not {_heads(network)}: leave out "
                "--head-width and --heads."
            )
    if untold.image_size:
        network = dataclasses.replace(network, image_size=untold.image_size)  # type: ignore[type-var]
    if untold.levels:
        grid = dataclasses.replace(grid, levels=untold.levels)
    if untold.scalings:
        shared = {"sigma_data": config.log_scaling.sigma_data, "time_factor": config.log_scaling.time_factor}
        boundary = BoundaryScaling(sigma_min=grid.sigma_min, **shared)
        scaling = EDMScaling(**shared) if untold.scalings == "edm" else boundary
    same = grid == config.grid and scaling == config.scaling
    tuned = config.tuned_timesteps if same else ()
    consistency = None if untold.scalings else config.consistency
    new = ModelConfig(network, scaling, grid, config.class_names, tuned, consistency)
    changes = settings.differences(settings.encode(config), settings.encode(new), there="in the checkpoint")
    return dataclasses.replace(source, config=new, overridden=tuple(changes))
