"""Conversion between native checkpoints and third-party formats: OpenAI's .pt, diffusers, and others."""

from cm_jax.conversion.dictionaries import params_from_flax, state_dict
from cm_jax.conversion.hints import CheckpointHints, PreconditioningName
from cm_jax.conversion.push import PushOptions, UploadOptions, check_repo_id, push, upload
from cm_jax.conversion.read import Source, read
from cm_jax.conversion.restoring import unstated
from cm_jax.conversion.write import Kind, check_suffix, write
