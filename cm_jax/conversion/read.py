"""Reading a checkpoint of any format: native, OpenAI's .pt, a diffusers folder, or a jcm checkpoint."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from cm_jax.checkpoints import native, serialization
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.checkpoints.published import Published, recognize, recognize_cifar10
from cm_jax.conversion import jcm
from cm_jax.conversion.diffusers import DIFFUSERS, DiffusersMetadata, check_agreement, read_metadata
from cm_jax.conversion.flax_files import is_msgpack, read_msgpack
from cm_jax.conversion.hints import PRECONDITIONING, CheckpointHints
from cm_jax.conversion.openai import OPENAI
from cm_jax.conversion.rules import Tensors, from_source
from cm_jax.conversion.torch_files import read_torch
from cm_jax.conversion.unet_format import UNetFormat
from cm_jax.diffusion.noise_schedule import ADM_TIME, EDM_TIME, NUM_LEVELS, KarrasSchedule
from cm_jax.errors import InputError
from cm_jax.io.safetensors import read_safetensors
from cm_jax.io.validation import read_json
from cm_jax.networks import ADMUNet, SongUNet
from cm_jax.types import Params

_TOLERANCE = 2e-3
"""Share of its parameters by which a file with a published name may differ: such a file counts as a damaged copy, and
the difference is reported. With a larger difference it counts as another checkpoint."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint as read from disk."""

    path: Path
    config: ModelConfig
    params: Params
    """NumPy arrays in the precision of the file."""
    format: UNetFormat | None = None
    """The format of its tensors, for PyTorch checkpoints."""
    tensors: Tensors = dataclasses.field(default_factory=dict)
    """Its tensors under their source names, for PyTorch checkpoints."""
    overridden: tuple[str, ...] = ()
    """A line for each setting of a native checkpoint that the hints change."""


def read(path: Path, hints: CheckpointHints = CheckpointHints()) -> Source:  # noqa: B008  immutable
    """Read a checkpoint of any format.

    Raises InputError for a missing, damaged or contradictory checkpoint, and where `hints` must give more settings.
    """
    try:
        return _read(path, hints)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error


def _read(path: Path, hints: CheckpointHints) -> Source:
    if not path.exists():
        raise InputError(f"Expected a checkpoint, but there is no file or folder {path}.")
    safetensors = path.is_file() and path.suffix.lower() == ".safetensors"
    if path.is_file() and not safetensors and is_msgpack(path):
        return _read_jcm(path, hints)
    if hints.attention_factors is not None or hints.resampling is not None:
        raise InputError(
            "--attention-factors and --resampling are for checkpoints of openai/consistency_models_cifar10 only; "
            f"leave out --attention-factors and --resampling for {path}."
        )
    if safetensors and native.is_single_file(path):
        return _read_native(path, native.restore_file(path), hints)
    if path.is_file():
        return _read_pytorch(path, path, DiffusersMetadata(), hints)
    if native.is_checkpoint(path):
        return _read_native(path, native.restore(path), hints)
    folder = path / "unet" if (path / "unet").is_dir() else path
    files = [*sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*.bin"))]
    if not files:
        content = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise InputError(
            f"{path} holds no weights. Expected a native checkpoint (config.json and params/) or a diffusers folder "
            f"(unet/diffusion_pytorch_model.safetensors or .bin), got {content}."
        )
    plain = [file for file in files if file.stem == "diffusion_pytorch_model"]
    metadata = read_metadata(folder / "config.json", path / "scheduler" / "scheduler_config.json")
    return _read_pytorch(path, (plain or files)[0], metadata, hints)


def _read_native(path: Path, content: tuple[ModelConfig, Params], hints: CheckpointHints) -> Source:
    """A native checkpoint, with the hints in place of its own settings."""
    config, params = content
    new = hints.override(config, path)
    changes = serialization.differences(
        serialization.encode(config), serialization.encode(new), there="in the checkpoint"
    )
    return Source(path, new, params, overridden=tuple(changes))


def _read_pytorch(path: Path, file: Path, metadata: DiffusersMetadata, hints: CheckpointHints) -> Source:
    """A PyTorch checkpoint; its settings come from the hints, else from diffusers' JSON, else from a published name."""
    tensors = read_safetensors(file) if file.suffix.lower() == ".safetensors" else read_torch(file)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    format = DIFFUSERS if any(name.startswith(("conv_in.", "down_blocks.")) for name in shapes) else OPENAI
    named, total = recognize(path), sum(math.prod(shape) for shape in shapes.values())
    known = named if named and math.isclose(total, named.parameters, rel_tol=_TOLERANCE) else None

    head_dim, heads = hints.head_dim, hints.heads
    if head_dim is None and heads is None:
        head_dim, heads = metadata.head_dim, metadata.heads
    if head_dim is None and heads is None and known:
        head_dim = known.head_dim
    image_size = _first(hints.image_size, metadata.image_size, known and known.image_size)
    consistency = "consistency" if metadata.schedule else None
    preconditioning = _first(hints.preconditioning, consistency, known and known.preconditioning)
    defaults = metadata.num_levels, known and known.num_levels, _default_levels(preconditioning)
    num_levels = _first(hints.num_levels, *defaults)
    missing = _missing(
        {
            "--image-size N (height of the images)": image_size,
            "--head-dim N (64 in the published networks) or --heads N": _first(head_dim, heads),
            "--preconditioning consistency (or edm, for a teacher)": preconditioning,
            "--num-levels N (40 for published CD checkpoints; 201 or 151 for CT)": num_levels,
        }
    )
    if missing:
        format.infer(shapes, str(file), image_size=2**10, heads=1, head_dim=None)
        count = named and f"it has {total:,} parameters, not {named.parameters:,}"
        raise InputError(_ask_for(path, missing, count))

    network = format.infer(shapes, str(file), image_size=image_size, head_dim=head_dim, heads=heads)
    params = from_source(format.rules(network), network.shapes(), tensors, source=str(file))
    if (file.parent / "config.json").exists() and format is DIFFUSERS:
        check_agreement(file.parent / "config.json", read_json(file.parent / "config.json"), network)
    schedule = metadata.schedule or KarrasSchedule()
    config = _config(network, preconditioning, schedule, num_levels, known, metadata.sigma_data, ADM_TIME)
    return Source(path, config, params, format, tensors)


def _read_jcm(path: Path, hints: CheckpointHints) -> Source:
    """A jcm checkpoint; its settings come from the hints, else from a published name."""
    if hints.head_dim or hints.heads:
        raise InputError(f"The attention of {path} has one head; leave out --head-dim and --heads.")
    tensors = read_msgpack(path, jcm.BRANCH)
    known = recognize_cifar10(path)
    image_size = _first(hints.image_size, known and known.image_size)
    preconditioning = _first(hints.preconditioning, known and known.preconditioning)
    num_levels = _first(hints.num_levels, known and known.num_levels, _default_levels(preconditioning))
    settings = {
        "--image-size N (32 for CIFAR-10)": image_size,
        "--preconditioning consistency (or edm, for a teacher)": preconditioning,
        "--num-levels N (18 for published CD checkpoints; 151 for CT)": num_levels,
    }
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    networks = jcm.candidates(shapes, str(path), image_size=image_size or 2**10)
    factors = tuple(sorted(hints.attention_factors or ())) or ((2,) if known else None)
    for field, given in (("attention_factors", factors), ("resampling", hints.resampling)):
        options = {getattr(network, field) for network in networks}
        shown = " or ".join(sorted(each if isinstance(each, str) else ",".join(map(str, each)) for each in options))
        if given is not None and given not in options:
            raise InputError(f"Expected {field} {shown}, which the tensors of {path} allow; got {given}.")
        networks = [network for network in networks if given in (None, getattr(network, field))]
        settings[f"--{field.replace('_', '-')} {shown}"] = given or (options.pop() if len(options) == 1 else None)
    if missing := _missing(settings):
        raise InputError(_ask_for(path, missing))

    (network,) = networks
    params = from_source(jcm.rules(network), network.shapes(), tensors, source=str(path))
    config = _config(network, preconditioning, KarrasSchedule(), num_levels, known, 0.5, EDM_TIME)
    return Source(path, config, params)


def _config(
    network: ADMUNet | SongUNet,
    preconditioning: str,
    schedule: KarrasSchedule,
    num_levels: int,
    known: Published | None,
    sigma_data: float,
    time_factor: float,
) -> ModelConfig:
    """The config of a third-party checkpoint, with the class names and tuned timesteps of the published one."""
    tuned = known.timesteps if known and known.num_levels == num_levels and preconditioning == "consistency" else ()
    return ModelConfig(
        network=network,
        preconditioning=PRECONDITIONING[preconditioning](sigma_data=sigma_data, time_factor=time_factor),
        schedule=schedule,
        num_levels=num_levels,
        class_names=known.class_names if known and len(known.class_names) == network.classes else (),
        tuned_timesteps=(tuned,) if tuned else (),
    )


def _default_levels(preconditioning: str | None) -> int | None:
    """N of a teacher, which its sampling does not depend on; None for a consistency model, whose N must be given."""
    return NUM_LEVELS if preconditioning == "edm" else None


def _first(*choices: Any) -> Any:
    """The first that is not None."""
    return next((choice for choice in choices if choice is not None), None)


def _missing(settings: dict[str, Any]) -> list[str]:
    return [flag for flag, value in settings.items() if value is None]


def _ask_for(path: Path, flags: list[str], difference: str | None = None) -> str:
    """`difference`: why the file is not the published checkpoint of its name."""
    listing = "\n  ".join(flags)
    reason = (
        f"is not the published checkpoint of this name ({difference})"
        if difference
        else "is not the name of a published checkpoint"
    )
    return (
        f"{path.name} {reason}, and its tensors do not determine all settings. Convert it with cm-jax convert and "
        f"these options:\n  {listing}"
    )
