"""Reading a checkpoint of any format: native, OpenAI's .pt, diffusers, consistency_models_cifar10, the EDM family."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

from cm_jax.checkpoints import hub, native, serialization
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.checkpoints.published import Published, recognize, recognize_cifar10
from cm_jax.checkpoints.run_emas import read_ema
from cm_jax.conversion import edm, edm_names, jcm, persistence
from cm_jax.conversion.attention_order import QKVOrder, as_convolutions, in_thirds, order_evidence
from cm_jax.conversion.diffusers import check_agreement, network_folder, pipeline_folder, settings_of
from cm_jax.conversion.hints import PRECONDITIONING, CheckpointHints, is_consistency, of_other_steps
from cm_jax.conversion.rules import Tensors, from_source
from cm_jax.conversion.shards import find_weights
from cm_jax.conversion.unet_format import DIFFUSERS, OPENAI, UNetFormat
from cm_jax.conversion.unwrap import read_network
from cm_jax.diffusion.noise_schedule import ADM_TIME, EDM_TIME, NUM_LEVELS, KarrasSchedule
from cm_jax.errors import InputError
from cm_jax.networks import ADMUNet, SongUNet
from cm_jax.progress import activity
from cm_jax.types import Params

_STORED = ("clip_denoised", "label_dropout", "default_sampler", "default_steps")
_TOLERANCE = 2e-3
"""Share of its parameters by which a file with a published name may differ, as a damaged copy: it is reported."""
_RUN_FILE = re.compile(r"(?P<kind>(target_|teacher_)?model|opt|ema_(?P<rate>0\.[0-9]+)_)(?P<step>[0-9]{6,})\.pt")
"""Checkpoints of OpenAI's training code."""


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
    """Its tensors under their source names, for PyTorch checkpoints and the EDM family."""
    notes: tuple[str, ...] = ()
    """What was chosen, removed or left out while reading the file, and what else its user should know: a line each."""
    overridden: tuple[str, ...] = ()
    """A line for each setting of a native checkpoint that the hints change."""
    record: persistence.Record | None = None
    """What a pickle of the EDM family states of its network."""
    qkv_order: QKVOrder = "thirds"
    """The order of q, k and v in the file; `params` are in the order thirds."""


def read(path: Path, hints: CheckpointHints | None = None) -> Source:
    """Read a checkpoint of any format.

    Raises InputError for a missing, damaged or contradictory checkpoint, and where `hints` must give more settings.
    """
    hints = hints or CheckpointHints()
    try:
        with activity(f"Reading {path}"):
            source = _read(path, hints)
        if hints.qkv_order is not None and source.format is not OPENAI:
            raise InputError(f"--qkv-order is for files with the names of OpenAI's code; leave it out for {path}.")
        config = hints.apply(source.config)
        return dataclasses.replace(source, config=config, notes=(*source.notes, *_dropped(source.config, config)))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error


def _read(path: Path, hints: CheckpointHints) -> Source:
    if not path.exists():
        raise InputError(f"Expected a checkpoint, but there is no file or folder {path}.")
    if hints.ema is not None and not native.is_checkpoint(path):
        raise InputError(
            f"--ema {hints.ema} applies to the checkpoints of training runs, and {path} is none: leave it out. --key "
            "chooses among the networks of a file."
        )
    safetensors = path.is_file() and path.suffix.lower() == ".safetensors"
    if path.is_file() and not safetensors and jcm.is_msgpack(path):
        return _read_jcm(path, hints)
    if hints.attention_factors is not None or hints.resampling is not None:
        raise InputError(
            "--attention-factors and --resampling are for checkpoints of openai/consistency_models_cifar10 only; "
            f"leave out --attention-factors and --resampling for {path}."
        )
    if path.is_file() and persistence.is_persistent(path):
        found = edm.read_pickle(path, key=hints.key, preconditioning=hints.preconditioning)
        return _from_edm(path, found, hints)
    if safetensors and native.is_single_file(path):
        return _read_native(path, native.restore_file(path), hints)
    if path.is_file():
        return _read_pytorch(path, path, hints)
    if native.is_checkpoint(path):
        if hints.ema is None:
            return _read_native(path, native.restore(path), hints)
        config, params, notes = read_ema(path, hints.ema)
        return _read_native(path, (config, params), hints, notes)
    folder, notes = network_folder(path, hints.key)
    weights = find_weights(folder)
    if weights is None:
        _refuse_openai_run(path)
        content = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise InputError(
            f"{path} holds no weights. Expected a native checkpoint (config.json and params/) or a diffusers folder "
            f"(unet/diffusion_pytorch_model.safetensors or .bin), got {content}."
        )
    by_key = folder != path and folder.name == hints.key
    source = _read_pytorch(path, weights, dataclasses.replace(hints, key=None) if by_key else hints)
    return dataclasses.replace(source, notes=(*notes, *source.notes))


def _dropped(before: ModelConfig, after: ModelConfig) -> tuple[str, ...]:
    """A note on the tuned noise levels of the checkpoint that the options replace or do not fit."""
    tuned = {*before.tuned_timesteps, *before.tuned_sigmas} - {*after.tuned_timesteps, *after.tuned_sigmas}
    levels = " and ".join(",".join(map(str, each)) for each in sorted(tuned))
    return (f"Dropped the tuned noise levels {levels}: the options replace them or do not fit them.",) if tuned else ()


def _refuse_openai_run(path: Path) -> None:
    """Raise InputError that names the files to choose from if `path` is the folder of a training run of OpenAI's code.

    Such a run writes model010000.pt, ema_0.9999_010000.pt, target_model010000.pt and opt010000.pt.
    """
    matches = [match for file in path.glob("*.pt") if (match := _RUN_FILE.fullmatch(file.name))]
    last = max((int(match["step"]) for match in matches), default=0)
    names = [
        match[0]
        for match in sorted(matches, key=lambda match: (-float(match["rate"] or 0), match["kind"]))
        if int(match["step"]) == last and match["kind"] != "opt"
    ]
    if names:
        raise InputError(
            f"{path} is the folder of a training run of OpenAI's code: give one of its files. After {last:,} steps "
            f"these are {', '.join(names)} (ema_RATE: exponential moving averages, for sampling; model: parameters "
            f"without EMA). For example {path / names[0]}."
        )


def _read_native(
    path: Path, content: tuple[ModelConfig, Params], hints: CheckpointHints, notes: tuple[str, ...] = ()
) -> Source:
    """A native checkpoint, with the hints in place of its own settings."""
    config, params = content
    hints.without_key(path)
    new = hints.override(config, path)
    changes = serialization.differences(
        serialization.encode(config), serialization.encode(new), there="in the checkpoint"
    )
    return Source(path, new, params, notes=notes, overridden=tuple(changes))


def _read_pytorch(path: Path, file: Path, hints: CheckpointHints) -> Source:
    """A PyTorch checkpoint with its weights in `file`."""
    tensors, notes = read_network(file, hints.key)
    tensors, guided_diffusion = as_convolutions(tensors)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if edm_names.is_edm(shapes):
        head_dim, preconditioning = hints.head_dim, hints.preconditioning
        found = edm.read_state_dict(path, tensors, head_dim=head_dim, preconditioning=preconditioning)
        source = _from_edm(path, found, hints)
        return dataclasses.replace(source, notes=(*notes, *source.notes))
    format = DIFFUSERS if any(name.startswith(("conv_in.", "down_blocks.")) for name in shapes) else OPENAI
    stored, more_notes = settings_of(file, only_diffusers=file == path) if format is DIFFUSERS else ({}, ())
    named, total = recognize(pipeline_folder(path)), sum(math.prod(shape) for shape in shapes.values())
    known = named if named and math.isclose(total, named.parameters, rel_tol=_TOLERANCE) else None
    settings = _settings(hints, stored, known)
    head_dim, heads = settings.get("head_dim"), settings.get("heads", None if "head_dim" in settings else 1)
    image_size = settings.get("image_size", 2**10)
    norms = {name: settings[name] for name in ("norm_groups", "norm_epsilon") if name in settings}
    network = format.infer(shapes, str(file), image_size=image_size, head_dim=head_dim, heads=heads, **norms)
    questions = {
        "--image-size N (or HEIGHT,WIDTH)": settings.get("image_size"),
        "--head-dim N (64 in the published networks) or --heads N": settings.get("head_dim", settings.get("heads")),
        "--preconditioning consistency (or edm, for a teacher)": settings.get("preconditioning"),
        "--num-levels N (40 for published CD checkpoints; 201 or 151 for CT)": settings.get("num_levels"),
    }
    if guided_diffusion:
        questions["--qkv-order heads (or thirds, if trained with use_new_attention_order)"] = hints.qkv_order
    _require(path, questions, named and f"it has {total:,} parameters, not {named.parameters:,}")
    if (order := hints.qkv_order or "thirds") == "heads":
        tensors = in_thirds(tensors, network)
    params = from_source(format.rules(network), network.shapes(), tensors, source=str(file))
    if format is DIFFUSERS:
        check_agreement(file.parent / "config.json", network)
    config = _config(network, settings, known, ADM_TIME)
    evidence = order_evidence(network, params, order) if format is OPENAI else None
    warnings = (evidence.warning(),) if evidence and evidence.contradicted else ()
    notes = (*notes, *more_notes, *_from_name(known, config, hints, stored), *warnings)
    return Source(path, config, params, format, tensors, notes, qkv_order=order)


def _from_edm(path: Path, found: edm.EDMCheckpoint, hints: CheckpointHints) -> Source:
    if hints.heads or hints.image_size:
        raise InputError(f"{path} determines its heads and image size; leave out --heads and --image-size.")
    if hints.head_dim and (found.record or isinstance(found.config.network, SongUNet)):
        raise InputError(f"{path} determines the channels of its attention heads; leave out --head-dim.")
    config = dataclasses.replace(found.config, num_levels=hints.num_levels or found.config.num_levels)
    return Source(path, config, found.params, tensors=found.tensors, notes=found.notes, record=found.record)


def _read_jcm(path: Path, hints: CheckpointHints) -> Source:
    if hints.head_dim or hints.heads:
        raise InputError(f"The attention of {path} has one head; leave out --head-dim and --heads.")
    hints.without_key(path)
    tensors = jcm.read_tensors(path)
    known = recognize_cifar10(path)
    settings = _settings(hints, {}, known)
    questions = {
        "--image-size N (32 for CIFAR-10)": settings.get("image_size"),
        "--preconditioning consistency (or edm, for a teacher)": settings.get("preconditioning"),
        "--num-levels N (18 for published CD checkpoints; 151 for CT)": settings.get("num_levels"),
    }
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    networks = jcm.candidates(shapes, str(path), image_size=settings.get("image_size", 2**10))
    factors = tuple(sorted(hints.attention_factors or ())) or ((2,) if known else None)
    for field, given in (("attention_factors", factors), ("resampling", hints.resampling)):
        options = {getattr(network, field) for network in networks}
        shown = " or ".join(sorted(each if isinstance(each, str) else ",".join(map(str, each)) for each in options))
        if given is not None and given not in options:
            raise InputError(f"Expected {field} {shown}, which the tensors of {path} allow; got {given}.")
        networks = [network for network in networks if given in (None, getattr(network, field))]
        questions[f"--{field.replace('_', '-')} {shown}"] = given or (options.pop() if len(options) == 1 else None)
    _require(path, questions)
    (network,) = networks
    params = from_source(jcm.rules(network), network.shapes(), tensors, source=str(path))
    config = _config(network, settings, known, EDM_TIME)
    return Source(path, config, params, notes=_from_name(known, config, hints, {}))


def _settings(hints: CheckpointHints, stored: dict[str, Any], known: Published | None) -> dict[str, Any]:
    """Settings that tensors do not determine: from the hints, else as stored, else from the published checkpoint."""
    names = ("head_dim", "image_size", "preconditioning", "num_levels") if known else ()
    settings = {name: getattr(known, name) for name in names}
    for source in (stored, {name: value for name, value in vars(hints).items() if value is not None}):
        if source.keys() & {"head_dim", "heads"}:
            settings = {name: value for name, value in settings.items() if name not in ("head_dim", "heads")}
        settings |= source
    written = {"num_levels": NUM_LEVELS, "preconditioning": "edm", **stored}  # a denoiser's folder has no scheduler
    if settings.get("preconditioning") != written["preconditioning"]:
        settings = {name: value for name, value in settings.items() if name not in ("tuned_timesteps", "tuned_sigmas")}
    if settings.get("num_levels", NUM_LEVELS) != written["num_levels"]:
        settings.pop("tuned_timesteps", None)
    # The sampling of a teacher does not depend on N; a consistency model must give it.
    return {"num_levels": NUM_LEVELS, **settings} if settings.get("preconditioning") == "edm" else settings


def _config(
    network: ADMUNet | SongUNet, settings: dict[str, Any], known: Published | None, time_factor: float
) -> ModelConfig:
    """The config of a third-party checkpoint; class names and tuned timesteps as stored, else of the published one."""
    name, num_levels = settings["preconditioning"], settings["num_levels"]
    usual = known.class_names if known and len(known.class_names) == network.classes else ()
    names, tuned = settings.get("class_names", usual), settings.get("tuned_timesteps")
    if tuned is None and known and known.timesteps and known.num_levels == num_levels and name == "consistency":
        tuned = (known.timesteps,)
    options = {option: settings[option] for option in _STORED if option in settings}
    return ModelConfig(
        network=network,
        preconditioning=PRECONDITIONING[name](sigma_data=settings.get("sigma_data", 0.5), time_factor=time_factor),
        schedule=settings.get("schedule", KarrasSchedule()),
        num_levels=num_levels,
        class_names=names,
        tuned_timesteps=tuned or (),
        tuned_sigmas=of_other_steps(settings.get("tuned_sigmas", ()), tuned or ()),
        consistency=is_consistency(name),
        **options,
    )


def _from_name(
    known: Published | None, config: ModelConfig, hints: CheckpointHints, stored: dict[str, Any]
) -> tuple[str, ...]:
    """A note on what the name of a published checkpoint adds to its file."""
    given = {*stored, *(name for name, value in vars(hints).items() if value is not None)}
    if isinstance(config.network, SongUNet) or "heads" in given:
        given.add("head_dim")
    names = ("image_size", "head_dim", "preconditioning", "num_levels")
    added = [name for name in names if name not in given]
    added += [name for name in ("class_names", "tuned_timesteps") if getattr(config, name) and name not in given]
    if not (known and added):
        return ()
    return (f"Taken from the name of the published checkpoint {known.name}: {', '.join(added).replace('_', ' ')}.",)


def _require(path: Path, questions: dict[str, Any], difference: str | None = None) -> None:
    """Raise InputError that lists the flags whose values are unknown.

    `difference`: why the file is not the published checkpoint of its name.
    """
    unknown = "\n  ".join(flag for flag, value in questions.items() if value is None)
    named = f"not the published checkpoint of this name ({difference})"
    if unknown:
        name = hub.cached_id(path) or path.name
        raise InputError(
            f"{name} is {named if difference else 'not the name of a published checkpoint'}, and its tensors do "
            f"not determine all settings. Convert it with cm-jax convert and these options:\n  {unknown}"
        )
