"""Writing a checkpoint as ours, as the original's .pt, or as a diffusers folder."""

import json
from pathlib import Path
from typing import Literal

import safetensors.numpy

from cm_jax import checkpoints
from cm_jax.arrays import Params
from cm_jax.config import ModelConfig
from cm_jax.conversion.diffusers_configs import model_index, scheduler_config, unet_config
from cm_jax.conversion.files import write_torch
from cm_jax.conversion.formats import DIFFUSERS, OPENAI
from cm_jax.conversion.rules import to_theirs
from cm_jax.files import written_beside

Kind = Literal["ours", "openai", "diffusers"]


def write(path: Path, kind: Kind, config: ModelConfig, params: Params) -> None:
    """Write a model as `kind` at `path`: a folder for ours and diffusers, a file for openai.

    Every tensor keeps its numbers and precision. A denoiser with EDM scalings becomes a diffusers folder with the
    network alone, because ConsistencyModelPipeline would take it for a consistency function. Raises InputError where
    the format has no room for this network, or the destination cannot be written.
    """
    match kind:
        case "ours":
            checkpoints.save(path, config, params)
        case "openai":
            with written_beside(path) as beside:
                write_torch(beside, to_theirs(OPENAI.rules(config.adm), params))
        case "diffusers":
            files = {"unet/config.json": unet_config(config.adm)}
            if config.distilled:
                files |= {
                    "scheduler/scheduler_config.json": scheduler_config(config),
                    "model_index.json": model_index(),
                }
            with written_beside(path) as beside:
                for name, content in files.items():
                    (beside / name).parent.mkdir(parents=True, exist_ok=True)
                    (beside / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
                tensors = to_theirs(DIFFUSERS.rules(config.adm), params)
                weights = beside / "unet" / "diffusion_pytorch_model.safetensors"
                safetensors.numpy.save_file(tensors, weights, metadata={"format": "pt"})
