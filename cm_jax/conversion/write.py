"""Writing a checkpoint: native, OpenAI's .pt, a diffusers folder, or a state dict in EDM's names."""

import json
from pathlib import Path
from typing import Literal

from cm_jax.checkpoints import native
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.conversion.dictionaries import state_dict
from cm_jax.conversion.diffusers import EXTRAS, extras, model_index, scheduler_config, unet_config
from cm_jax.conversion.edm_writing import config_as_read, preconditioning_name
from cm_jax.conversion.torch_files import write_torch
from cm_jax.diffusion.noise_schedule import ADM_TIME, KarrasSchedule
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning
from cm_jax.errors import InputError
from cm_jax.io.atomic import atomic_write, write_errors
from cm_jax.io.safetensors import write_safetensors
from cm_jax.networks.layers import NORM_EPSILON, NORM_GROUPS
from cm_jax.types import Params

Kind = Literal["native", "openai", "diffusers", "edm"]
SUFFIXES = {"openai": (".pt", ".pth", ".bin"), "edm": (".pt", ".pth", ".bin", ".safetensors")}
"""Suffixes of the files of a format."""


def write(path: Path, kind: Kind, config: ModelConfig, params: Params) -> None:
    """Write a model at `path`: a file for openai, edm, and native where `path` ends in .safetensors; else a folder.

    openai, edm: a state dict in the names of OpenAI or of EDM's classes; SUFFIXES are those of its file. Values and
    precision of all parameters are preserved, except for a class-embedding table in EDM's names. The diffusers folder
    of a denoiser holds the network alone, because ConsistencyModelPipeline would sample from it as from a consistency
    model. Raises InputError where the format cannot represent the model, or `path` cannot be written.
    """
    if kind == "native":
        (native.save_file if path.suffix.lower() == ".safetensors" else native.save)(path, config, params)
        return
    if kind == "edm":
        config_as_read(config, preconditioning_name(config))
        check_suffix(path, kind)
        tensors = state_dict(kind, config, params)
        with atomic_write(path) as beside, write_errors(path):
            if path.suffix.lower() == ".safetensors":
                write_safetensors(beside, tensors, {"format": "pt"})
            else:
                write_torch(beside, tensors)
        return
    network = config.adm
    _check_representable(kind, config)
    check_suffix(path, kind)
    tensors = state_dict(kind, config, params)
    with atomic_write(path) as beside, write_errors(path):
        if kind == "openai":
            write_torch(beside, tensors)
            return
        files = {"unet/config.json": unet_config(network)}
        if config.distilled:
            files |= {"scheduler/scheduler_config.json": scheduler_config(config), "model_index.json": model_index()}
        if added := extras(config):
            files[EXTRAS] = added
        for name, content in files.items():
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            (beside / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        weights = beside / "unet" / "diffusion_pytorch_model.safetensors"
        write_safetensors(weights, tensors, {"format": "pt"})


def check_suffix(path: Path, kind: str) -> None:
    """Raise InputError for the name of a file in another format than the one to write."""
    expected = SUFFIXES.get(kind)
    if expected and path.suffix.lower() not in expected:
        named = f"{path.name} ends in {path.suffix}" if path.suffix else f"{path.name} has no suffix"
        raise InputError(
            f"Expected a file that ends in {' or '.join(expected)} for --to {kind}, but {named}: rename it."
        )


def _check_representable(kind: Kind, config: ModelConfig) -> None:
    """Raise InputError for settings that a third-party format would silently replace by its defaults."""
    preconditioning = config.log_sigma_preconditioning
    lost = []
    if preconditioning.time_factor != ADM_TIME:
        lost.append(f"c_noise = {preconditioning.time_factor:g} ln sigma (it is always {ADM_TIME:g} ln sigma)")
    if config.distilled and not isinstance(preconditioning, ConsistencyPreconditioning):
        lost.append("a consistency model with EDM preconditioning")
    scheduler = kind == "diffusers" and config.distilled
    if not scheduler and (preconditioning.sigma_data, config.schedule) != (0.5, KarrasSchedule()):
        lost.append("other sigma_data, sigma_min, sigma_max or rho than 0.5, 0.002, 80 and 7")
    if kind == "openai" and (config.adm.norm_groups, config.adm.norm_epsilon) != (NORM_GROUPS, NORM_EPSILON):
        lost.append(f"other group norms than of {NORM_GROUPS} groups with epsilon {NORM_EPSILON}")
    if isinstance(preconditioning, ConsistencyPreconditioning) and not config.distilled:
        lost.append("a denoiser with the preconditioning of a consistency model")
    if config.latents is not None:
        lost.append("a model of latents")
    if kind == "openai" and not config.clip_denoised:
        lost.append("samples that are not clipped (clip_denoised=False)")
    if kind == "openai" and config.tuned_sigmas:
        lost.append("tuned sigmas")
    if lost:
        raise InputError(f"The {kind} format cannot represent {' nor '.join(lost)}; use --to native.")
