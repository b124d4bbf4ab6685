"""JSON files of diffusers' ConsistencyModelPipeline folders.

Missing keys and old spellings are read; files are written as diffusers 0.42 writes them.
"""

import json
from pathlib import Path
from typing import Any

from cm_jax.checkpoints import serialization
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.diffusion.noise_schedule import NUM_LEVELS, KarrasSchedule
from cm_jax.errors import InputError, check_int
from cm_jax.io.validation import check_value, read_json
from cm_jax.networks import ADMUNet
from cm_jax.networks.layers import NORM_EPSILON, NORM_GROUPS
from cm_jax.types import ImageSize

EXTRAS = "cm_jax.json"
"""File of this package in a diffusers folder; diffusers ignores it."""
NETWORK_FOLDERS = ("unet_ema", "unet")
"""Folders with a network in a pipeline or in a checkpoint of a training program, the preferred one first."""
_EXTRA = ("class_names", "tuned_timesteps", "tuned_sigmas", "label_dropout")
"""Fields of ModelConfig in this file."""
_WITHOUT_SCHEDULER = ("num_levels", "clip_denoised", "default_sampler", "default_steps")
"""Further ones for a denoiser, whose folder has no scheduler."""
_VERSION = "0.42.1"
_FIXED = {
    "act_fn": "silu",
    "add_attention": True,
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "time_embedding_type": "positional",
}
"""Fields of UNet2DModel with the same value in every ADM U-Net."""


def unet_config(network: ADMUNet) -> dict[str, Any]:
    """unet/config.json for a network. Raises InputError for a network that UNet2DModel cannot represent."""
    if network.level_channels[0] != network.base_channels:
        raise InputError(
            f"Expected base_channels {network.level_channels[0]} for diffusers, whose UNet2DModel ties the embedding "
            f"to the channels of the first level; got {network.base_channels}. Use --to native or --to openai."
        )
    residual = network.resampling == "residual"
    attends = [2**level in network.attention_factors for level in range(len(network.channel_mult))]
    attending = {channels for channels, here in zip(network.level_channels, attends, strict=True) if here}
    head_dims = {channels // network.heads_for(channels) for channels in attending | {network.level_channels[-1]}}
    if len(head_dims) > 1:
        raise InputError(
            f"Expected one head_dim for all levels, as diffusers' UNet2DModel has; got {sorted(head_dims)} from "
            f"{network.heads} heads. Use --to native or --to openai."
        )
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if residual else ("DownBlock2D", "UpBlock2D")
    kind = "resnet" if residual else "conv"
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": _VERSION,
        **_FIXED,
        "attention_head_dim": head_dims.pop(),
        "attn_norm_num_groups": network.norm_groups,
        "block_out_channels": list(network.level_channels),
        "down_block_types": ["AttnDownBlock2D" if here else plain[0] for here in attends],
        "downsample_type": kind,
        "dropout": network.dropout,
        "in_channels": network.image_channels,
        "layers_per_block": network.blocks_per_level,
        "mid_block_type": "UNetMidBlock2D",
        "norm_eps": network.norm_epsilon,
        "norm_num_groups": network.norm_groups,
        "num_class_embeds": network.classes,
        "num_train_timesteps": None,
        "out_channels": network.image_channels,
        "resnet_time_scale_shift": "scale_shift" if network.modulation == "scale_shift" else "default",
        "sample_size": network.image_size if isinstance(network.image_size, int) else list(network.image_size),
        "time_embedding_dim": None,
        "up_block_types": ["AttnUpBlock2D" if here else plain[1] for here in reversed(attends)],
        "upsample_type": kind,
    }


def scheduler_config(config: ModelConfig) -> dict[str, Any]:
    """scheduler/scheduler_config.json: the noise schedule of a consistency model."""
    return {
        "_class_name": "CMStochasticIterativeScheduler",
        "_diffusers_version": _VERSION,
        "clip_denoised": config.clip_denoised,
        "num_train_timesteps": config.num_levels,
        "rho": config.schedule.rho,
        "s_noise": 1.0,
        "sigma_data": config.log_sigma_preconditioning.sigma_data,
        "sigma_max": config.schedule.sigma_max,
        "sigma_min": config.schedule.sigma_min,
    }


def model_index() -> dict[str, Any]:
    """model_index.json of a ConsistencyModelPipeline."""
    return {
        "_class_name": "ConsistencyModelPipeline",
        "_diffusers_version": _VERSION,
        "scheduler": ["diffusers", "CMStochasticIterativeScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }


def extras(config: ModelConfig) -> dict[str, Any]:
    """cm_jax.json: what the files of diffusers cannot hold; empty if there is nothing."""
    names = _EXTRA if config.distilled else (*_EXTRA, *_WITHOUT_SCHEDULER)
    encoded, default = (
        serialization.encode(config),
        serialization.encode(ModelConfig(config.network, config.preconditioning)),
    )
    return {name: encoded[name] for name in names if encoded[name] != default[name]}


def network_folder(path: Path, key: str | None = None) -> tuple[Path, tuple[str, ...]]:
    """The folder of the network in the pipeline `path`, or `path` itself, with a note if it was chosen.

    key: unet or unet_ema, to choose one of them.
    """
    found = [name for name in NETWORK_FOLDERS if (path / name).is_dir()]
    if key in found:
        return path / key, ()
    if len(found) < 2:
        return path / (found[0] if found else ""), ()
    return path / found[0], (f"Read {found[0]}; the folder also holds {found[1]} (--key {found[1]}).",)


def pipeline_folder(path: Path) -> Path:
    """The pipeline around a network's folder or file; any other path itself."""
    path = path if path.name else path.absolute()
    return next((folder.absolute().parent for folder in (path, path.parent) if folder.name in NETWORK_FOLDERS), path)


def settings_of(file: Path, *, only_diffusers: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The settings (see `read_settings`) in the config next to a weight file and in its pipeline's scheduler.

    only_diffusers: ignore a config.json of another program, and note which files were read.
    """
    unet, pipeline = file.with_name("config.json"), pipeline_folder(file.absolute().parent)
    files = (unet, pipeline / "scheduler" / "scheduler_config.json", pipeline / EXTRAS)
    if not only_diffusers:
        return read_settings(*files), ()
    if not unet.exists() or not read_json(unet).keys() & {"_class_name", "block_out_channels"}:
        return {}, ()
    present = " and ".join(str(path) for path in files if path.exists())
    return read_settings(*files), (f"Read the settings in {present}.",)


def read_settings(unet: Path, scheduler: Path, extra: Path) -> dict[str, Any]:
    """Settings from the JSON files, by their names in CheckpointHints, with schedule, sigma_data and `extras`.

    Each file may be missing; missing keys take the defaults of diffusers. Raises InputError for values of the wrong
    type, and for networks or schedulers that consistency models do not use.
    """
    settings: dict[str, Any] = {}
    if unet.exists():
        config = read_json(unet)
        _require(unet, config, {"_class_name": "UNet2DModel"})
        groups = check_value(config.get("norm_num_groups", NORM_GROUPS), int, f"{unet}: norm_num_groups")
        epsilon = check_value(config.get("norm_eps", NORM_EPSILON), float, f"{unet}: norm_eps")
        settings |= {"norm_groups": groups, "norm_epsilon": epsilon}
        middle = {} if config.get("attn_norm_num_groups") is None else {"attn_norm_num_groups": groups}
        if unsupported := _differences(config, _FIXED | middle):
            lines = "\n  ".join(unsupported)
            raise InputError(f"{unet} has settings of UNet2DModel that are not supported:\n  {lines}")
        head_dim = check_value(config.get("attention_head_dim", 8), int | None, f"{unet}: attention_head_dim")
        settings |= {"heads": 1} if head_dim is None else {"head_dim": head_dim}
        image_size = check_value(config.get("sample_size"), ImageSize | None, f"{unet}: sample_size")
        settings |= {} if image_size is None else {"image_size": image_size}
    if scheduler.exists():
        config = read_json(scheduler)
        fixed = {"_class_name": "CMStochasticIterativeScheduler", "s_noise": 1.0}
        _require(scheduler, config, fixed)

        def value(name: str, default: float) -> Any:
            return check_value(config.get(name, default), type(default), f"{scheduler}: {name}")

        known = value("sigma_min", 0.002), value("sigma_max", 80.0), value("rho", 7.0)
        try:
            settings["schedule"] = KarrasSchedule(*known)
        except InputError as error:
            raise InputError(f"{scheduler}: {error}") from error
        levels = value("num_train_timesteps", NUM_LEVELS)
        settings["num_levels"] = check_int(f"{scheduler}: num_train_timesteps", levels, 2, 2**20)
        settings |= {"sigma_data": value("sigma_data", 0.5), "preconditioning": "consistency"}
        settings["clip_denoised"] = value("clip_denoised", True)
    if extra.exists():
        values, types = read_json(extra), serialization.hints(ModelConfig)
        names = [name for name in (*_EXTRA, *_WITHOUT_SCHEDULER) if name in values]
        settings |= {name: check_value(values[name], types[name], f"{extra}: {name}") for name in names}
    return settings


def _require(path: Path, config: dict[str, Any], fixed: dict[str, Any]) -> None:
    for name, value in fixed.items():
        if name in config and config[name] != value:
            got = json.dumps(config[name])[:60]
            raise InputError(
                f"{path}: expected {name} {json.dumps(value)}, got {got}; use the folder of a consistency model."
            )


def _differences(config: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """A line for every field of `config` that differs."""
    return [
        f"{name}: expected {json.dumps(value)}, got {json.dumps(config[name])[:60]}"
        for name, value in expected.items()
        if name in config and config[name] != value
    ]


def check_agreement(path: Path, network: ADMUNet) -> None:
    """Raise InputError where a unet/config.json, if there is one, contradicts the network that its tensors form.

    Missing keys are ignored, because old configs lack many. So is a missing attn_norm_num_groups: the norm of the
    middle attention is used wherever its tensors exist (diffusers issue 4414).
    """
    if not path.exists():
        return
    config = read_json(path)
    ignored = {"_class_name", "_diffusers_version", "attn_norm_num_groups", "dropout", "num_train_timesteps"}
    ignored |= {"sample_size", "attention_head_dim"}
    try:
        expected = unet_config(network)
    except InputError:
        expected = dict(_FIXED)
    if config.get("time_embedding_dim") == 4 * network.base_channels:
        ignored.add("time_embedding_dim")
    if complaints := _differences(config, {name: expected[name] for name in expected if name not in ignored}):
        lines = "\n  ".join(complaints)
        raise InputError(f"{path} contradicts the weights; use the config of the same checkpoint:\n  {lines}")
