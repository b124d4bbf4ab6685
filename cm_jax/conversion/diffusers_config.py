"""The JSON files of a diffusers pipeline folder: read with gaps and old spellings, written as diffusers 0.42 does."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.diffusion.noise_schedule import KarrasGrid
from cm_jax.errors import InputError
from cm_jax.io.validation import check_value, read_json
from cm_jax.networks import ADMUNet
from cm_jax.networks.layers import NORM_EPSILON, NORM_GROUPS

_WRITTEN_BY = "0.42.1"

_FIXED = {
    "act_fn": "silu",
    "add_attention": True,
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": NORM_EPSILON,
    "norm_num_groups": NORM_GROUPS,
    "time_embedding_type": "positional",
}
"""Settings of UNet2DModel that the ADM U-Net needs to be so."""


def unet_config(network: ADMUNet) -> dict[str, Any]:
    """unet/config.json for a network. Raises InputError where UNet2DModel has no such setting."""
    if network.level_channels[0] != network.base_channels:
        raise InputError(
            f"diffusers' UNet2DModel ties the embedding to the first level's {network.level_channels[0]} channels, and "
            f"this network's width is {network.base_channels}: it can be written as ours or --to openai only."
        )
    residual = network.resampling == "residual"
    attends = [2**level in network.attention_factors for level in range(len(network.channel_mult))]
    attending = {channels for channels, here in zip(network.level_channels, attends, strict=True) if here} | {
        network.level_channels[-1]
    }
    head_widths = {channels // network.heads_for(channels) for channels in attending}
    if len(head_widths) > 1:
        raise InputError(
            f"diffusers' UNet2DModel has one head width for all levels, and {network.heads} heads here mean widths "
            f"{sorted(head_widths)}: this network can be written as ours or --to openai only."
        )
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if residual else ("DownBlock2D", "UpBlock2D")
    kind = "resnet" if residual else "conv"
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": _WRITTEN_BY,
        **_FIXED,
        "attention_head_dim": head_widths.pop(),
        "attn_norm_num_groups": NORM_GROUPS,
        "block_out_channels": list(network.level_channels),
        "down_block_types": ["AttnDownBlock2D" if here else plain[0] for here in attends],
        "downsample_type": kind,
        "dropout": network.dropout,
        "in_channels": network.image_channels,
        "layers_per_block": network.blocks_per_level,
        "mid_block_type": "UNetMidBlock2D",
        "num_class_embeds": network.classes,
        "num_train_timesteps": None,
        "out_channels": network.image_channels,
        "resnet_time_scale_shift": "scale_shift" if network.modulation == "scale_shift" else "default",
        "sample_size": network.image_size,
        "time_embedding_dim": None,
        "up_block_types": ["AttnUpBlock2D" if here else plain[1] for here in reversed(attends)],
        "upsample_type": kind,
    }


def scheduler_config(config: ModelConfig) -> dict[str, Any]:
    """scheduler/scheduler_config.json: the levels of a consistency model."""
    return {
        "_class_name": "CMStochasticIterativeScheduler",
        "_diffusers_version": _WRITTEN_BY,
        "clip_denoised": True,
        "num_train_timesteps": config.grid.levels,
        "rho": config.grid.rho,
        "s_noise": 1.0,
        "sigma_data": config.log_sigma_preconditioning.sigma_data,
        "sigma_max": config.grid.sigma_max,
        "sigma_min": config.grid.sigma_min,
    }


def model_index() -> dict[str, Any]:
    """model_index.json of a ConsistencyModelPipeline."""
    return {
        "_class_name": "ConsistencyModelPipeline",
        "_diffusers_version": _WRITTEN_BY,
        "scheduler": ["diffusers", "CMStochasticIterativeScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }


@dataclasses.dataclass(frozen=True)
class DiffusersMetadata:
    """What the configs of a diffusers folder tell beside the tensors; None where they do not."""

    head_dim: int | None = None
    heads: int | None = None
    image_size: int | None = None
    grid: KarrasGrid | None = None
    sigma_data: float = 0.5


def told_by(unet: Path, scheduler: Path) -> DiffusersMetadata:
    """Read both configs, of which either may be missing and keys in them too: those have diffusers' defaults.

    Raises InputError for values of the wrong type, and for another network or scheduler than consistency models have.
    """
    fields: dict[str, Any] = {}
    if unet.exists():
        config = read_json(unet)
        _require(unet, config, {"_class_name": "UNet2DModel"})
        width = check_value(config.get("attention_head_dim", 8), int | None, f"{unet}: attention_head_dim")
        fields |= {"head_dim": width, "heads": 1 if width is None else None}
        fields["image_size"] = check_value(config.get("sample_size"), int | None, f"{unet}: sample_size")
    if scheduler.exists():
        config = read_json(scheduler)
        fixed = {"_class_name": "CMStochasticIterativeScheduler", "clip_denoised": True, "s_noise": 1.0}
        _require(scheduler, config, fixed)
        known = {
            "levels": check_value(config.get("num_train_timesteps", 40), int, f"{scheduler}: num_train_timesteps"),
            "sigma_min": check_value(config.get("sigma_min", 0.002), float, f"{scheduler}: sigma_min"),
            "sigma_max": check_value(config.get("sigma_max", 80.0), float, f"{scheduler}: sigma_max"),
            "rho": check_value(config.get("rho", 7.0), float, f"{scheduler}: rho"),
        }
        try:
            fields["grid"] = KarrasGrid(**known)
        except InputError as error:
            raise InputError(f"{scheduler}: {error}") from error
        fields["sigma_data"] = check_value(config.get("sigma_data", 0.5), float, f"{scheduler}: sigma_data")
    return DiffusersMetadata(**fields)


def _require(path: Path, config: dict[str, Any], fixed: dict[str, Any]) -> None:
    wrong = [name for name, value in fixed.items() if name in config and config[name] != value]
    if wrong:
        raise InputError(
            f"{path}: {wrong[0]} is {json.dumps(config[wrong[0]])[:60]}; a consistency model's is "
            f"{json.dumps(fixed[wrong[0]])}."
        )


def check_agreement(path: Path, config: dict[str, Any], network: ADMUNet) -> None:
    """Raise InputError where a unet/config.json contradicts the network of its tensors, or asks for another kind.

    Keys that are not there (old configs lack many) are not held against it. The norm of the middle attention is one of
    these: it is used because its tensors exist, whatever attn_norm_num_groups says (diffusers issue 4414).
    """
    ignored = {"_class_name", "_diffusers_version", "attn_norm_num_groups", "dropout", "num_train_timesteps"}
    ignored |= {"sample_size", "attention_head_dim"}
    try:
        expected = unet_config(network)
    except InputError:
        expected = dict(_FIXED)
    implied = {"time_embedding_dim": 4 * network.base_channels}
    complaints = [
        f"{name} is {json.dumps(config[name])[:60]}, the network of the tensors has {json.dumps(value)}"
        for name, value in expected.items()
        if name in config and name not in ignored and config[name] not in (value, implied.get(name, value))
    ]
    if complaints:
        lines = "\n  ".join(complaints)
        raise InputError(
            f"{path} contradicts the weights beside it:\n  {lines}\nUse the config that came with the weights."
        )
