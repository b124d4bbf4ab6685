"""Reading a checkpoint of any kind: ours, the original's .pt, a diffusers folder, or the CIFAR-10 original's file."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from cm_jax.checkpoints import native, serialization, single_file
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.checkpoints.published import recognize, recognize_cifar10
from cm_jax.conversion import jcm
from cm_jax.conversion.diffusers_config import DiffusersMetadata, check_agreement, told_by
from cm_jax.conversion.pickles import read_torch
from cm_jax.conversion.rules import Tensors, to_ours
from cm_jax.conversion.tensor_files import is_msgpack, read_msgpack
from cm_jax.conversion.unet_formats import DIFFUSERS, OPENAI, Format
from cm_jax.diffusion.noise_schedule import EDM_TIME, KarrasGrid
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, EDMPreconditioning
from cm_jax.errors import InputError, check_int
from cm_jax.io.safetensors import read_safetensors
from cm_jax.io.validation import read_json
from cm_jax.networks import ADMUNet
from cm_jax.networks.fir import Filter
from cm_jax.types import Params

_ALIKE = 2e-3
"""Share of its parameters that a file with a published name may lack or have besides: it is damaged then, and what
differs is told; beyond that it holds another network."""

PreconditioningName = Literal["consistency", "edm"]


@dataclasses.dataclass(frozen=True)
class CheckpointHints:
    """What a file's tensors cannot tell. None: as its config or its published name says."""

    head_dim: int | None = None
    heads: int | None = None
    preconditioning: PreconditioningName | None = None
    levels: int | None = None
    image_size: int | None = None
    attention_factors: tuple[int, ...] | None = None
    """For the CIFAR-10 original's files, where levels are equally wide: factors of down-sampling with attention."""
    resampling: Filter | None = None
    """For the CIFAR-10 original's files, where there is no pyramid of inputs."""

    def __post_init__(self) -> None:
        limits = {"head_dim": (1, 4096), "heads": (1, 4096), "levels": (2, 2**20), "image_size": (1, 2**13)}
        for name, (least, most) in limits.items():
            if getattr(self, name) is not None:
                check_int(f"--{name.replace('_', '-')}", getattr(self, name), least, most)


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


def read(path: Path, hints: CheckpointHints = CheckpointHints()) -> Source:
    """Read a checkpoint of any kind.

    Raises InputError where there is none, where it is damaged or contradicts itself, or where `untold` must say more.
    """
    try:
        return _read(path, hints)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error


def _read(path: Path, hints: CheckpointHints) -> Source:
    if not path.exists():
        raise InputError(f"There is no file or folder {path}.")
    archive = path.is_file() and path.suffix.lower() == ".safetensors"
    if path.is_file() and not archive and is_msgpack(path):
        return _read_jcm(path, hints)
    if hints.attention_factors is not None or hints.resampling is not None:
        raise InputError(
            f"{path} tells itself where attention stands and how images are halved: leave out --attention-factors and "
            "--resampling, which are for checkpoints of openai/consistency_models_cifar10."
        )
    if archive and single_file.is_single_file(path):
        config, params = single_file.read(path)
        return _overridden(Source(path, config, params), hints)
    if path.is_file():
        return _read_tensors(path, path, DiffusersMetadata(), hints)
    if native.is_checkpoint(path):
        config, params = native.restore(path)
        return _overridden(Source(path, config, params), hints)
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
    return _read_tensors(path, (plain or candidates)[0], told, hints)


def _read_tensors(path: Path, file: Path, told: DiffusersMetadata, hints: CheckpointHints) -> Source:
    """Tensors of one file, with what a diffusers config, a published name and the user say of them."""
    tensors = read_safetensors(file) if file.suffix.lower() == ".safetensors" else read_torch(file)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    spelling = DIFFUSERS if any(name.startswith(("conv_in.", "down_blocks.")) for name in shapes) else OPENAI
    named, total = recognize(path), sum(math.prod(shape) for shape in shapes.values())
    known = named if named and math.isclose(total, named.parameters, rel_tol=_ALIKE) else None

    head_dim, heads = hints.head_dim, hints.heads
    if head_dim is None and heads is None:
        head_dim, heads = told.head_dim, told.heads
    if head_dim is None and heads is None and known:
        head_dim = known.head_dim
    image_size = _first(hints.image_size, told.image_size, known and known.image_size)
    levels = _first(hints.levels, told.grid and told.grid.levels, known and known.levels)
    preconditioning = _first(
        hints.preconditioning, "consistency" if told.grid else None, known and known.preconditioning
    )
    if preconditioning == "edm":
        levels = _first(levels, KarrasGrid().levels)
    unanswered = {
        "--image-size N (height of its images)": image_size,
        "--head-dim N (64 in the published networks) or --heads N": _first(head_dim, heads),
        "--scalings consistency (or edm, for a teacher)": preconditioning,
        "--levels N (40 for CD, 201 or 151 for CT in the published ones)": levels,
    }
    missing = [question for question, answer in unanswered.items() if answer is None]
    if missing:
        spelling.infer(shapes, str(file), image_size=2**10, heads=1, head_dim=None)
        raise InputError(_unanswered(path, missing, named and f"it has {total:,} parameters, not {named.parameters:,}"))

    network = spelling.infer(shapes, str(file), image_size=image_size, head_dim=head_dim, heads=heads)
    rules = spelling.rules(network)
    params = to_ours(rules, network.shapes(), tensors, source=str(file))
    if (file.parent / "config.json").exists() and spelling is DIFFUSERS:
        check_agreement(file.parent / "config.json", read_json(file.parent / "config.json"), network)
    grid = dataclasses.replace(told.grid or KarrasGrid(), levels=levels)
    tuned = known.timesteps if known and known.levels == levels and preconditioning == "consistency" else ()
    edm, boundary = (
        EDMPreconditioning(told.sigma_data),
        ConsistencyPreconditioning(told.sigma_data, sigma_min=grid.sigma_min),
    )
    config = ModelConfig(
        network=network,
        preconditioning=edm if preconditioning == "edm" else boundary,
        grid=grid,
        class_names=known.class_names if known and len(known.class_names) == network.classes else (),
        tuned_timesteps=(tuned,) if tuned else (),
    )
    return Source(path, config, params, spelling, tensors)


def _read_jcm(path: Path, hints: CheckpointHints) -> Source:
    """A checkpoint of openai/consistency_models_cifar10, with what its published name and the user say of it."""
    if hints.head_dim or hints.heads:
        raise InputError(f"{path} is of a network whose attention has one head: leave out --head-dim and --heads.")
    tensors = read_msgpack(path, jcm.BRANCH)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    known = recognize_cifar10(path)
    image_size = _first(hints.image_size, 32 if known else None)
    preconditioning = _first(hints.preconditioning, known and known.preconditioning)
    levels = _first(hints.levels, known and known.levels)
    if preconditioning == "edm":
        levels = _first(levels, KarrasGrid().levels)
    unanswered = {
        "--image-size N (32 for CIFAR-10)": image_size,
        "--scalings consistency (or edm, for a teacher)": preconditioning,
        "--levels N (18 for CD, 151 for CT in the published ones)": levels,
    }
    found = jcm.candidates(shapes, str(path), image_size=image_size or 2**10)
    factors = tuple(sorted(hints.attention_factors or ())) or ((2,) if known else None)
    for field, told in (("attention_factors", factors), ("resampling", hints.resampling)):
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
    tuned = known.timesteps if known and known.levels == levels and preconditioning == "consistency" else ()
    preconditioning = ConsistencyPreconditioning(time_factor=EDM_TIME, sigma_min=grid.sigma_min)
    config = ModelConfig(
        network=network,
        preconditioning=EDMPreconditioning(time_factor=EDM_TIME) if preconditioning == "edm" else preconditioning,
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
    return f"heads of width {network.head_dim}" if network.heads is None else f"{network.heads} heads"


def _overridden(source: Source, hints: CheckpointHints) -> Source:
    """Our checkpoint with what the user says instead."""
    path, config = source.path, source.config
    network, grid, preconditioning = config.network, config.grid, config.preconditioning
    if hints.head_dim or hints.heads:
        network = dataclasses.replace(config.adm, head_dim=hints.head_dim, heads=hints.heads)
        if network != config.adm:
            raise InputError(
                f"{path} says itself that its attention has {_heads(config.adm)}, not {_heads(network)}: leave out "
                "--head-dim and --heads."
            )
    if hints.image_size:
        network = dataclasses.replace(network, image_size=hints.image_size)  # type: ignore[type-var]
    if hints.levels:
        grid = dataclasses.replace(grid, levels=hints.levels)
    if hints.preconditioning:
        shared = {
            "sigma_data": config.log_sigma_preconditioning.sigma_data,
            "time_factor": config.log_sigma_preconditioning.time_factor,
        }
        boundary = ConsistencyPreconditioning(sigma_min=grid.sigma_min, **shared)
        preconditioning = EDMPreconditioning(**shared) if hints.preconditioning == "edm" else boundary
    same = grid == config.grid and preconditioning == config.preconditioning
    tuned = config.tuned_timesteps if same else ()
    consistency = None if hints.preconditioning else config.consistency
    new = ModelConfig(network, preconditioning, grid, config.class_names, tuned, consistency)
    changes = serialization.differences(
        serialization.encode(config), serialization.encode(new), there="in the checkpoint"
    )
    return dataclasses.replace(source, config=new, overridden=tuple(changes))
