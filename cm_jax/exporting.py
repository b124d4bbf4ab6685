"""`export`: a model with its sampler as an artifact of jax.export, which runs without this package."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack, get_args

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from cm_jax import kernels
from cm_jax.arguments import as_list
from cm_jax.errors import InputError, one_line
from cm_jax.io.atomic import atomic_write, check_writable, user_path, write_errors
from cm_jax.io.safetensors import write_safetensors
from cm_jax.model import Model, PlanArgs
from cm_jax.samplers import Sampler
from cm_jax.samplers.generation import image_keys, sample
from cm_jax.samplers.plan import SamplingPlan, guidance_text, sampler_text
from cm_jax.types import Images, Labels, Platform, leaves, nested

_PROGRAM, _PARAMS = "sampler.jax_export", "params.safetensors"
_EXAMPLE = '''"""Samples images: python example.py"""
import pathlib

import jax, jax.export, numpy as np
from safetensors.numpy import load_file

folder = pathlib.Path(__file__).parent
sampler = jax.export.deserialize(bytearray((folder / "sampler.jax_export").read_bytes()))
params = load_file(folder / "params.safetensors")
seeds = np.arange(4, dtype=np.uint32){labels}
images = jax.jit(sampler.call)(params, seeds{argument})  # float32 {shape}
np.save("images.npy", images)
'''
_LABELS = "\nlabels = np.zeros(4, np.int32)"


class Artifact(NamedTuple):
    """An exported sampler and the arrays that it needs."""

    program: jax.export.Exported
    """(params, seeds, labels) -> images; without labels for an unconditional model. Any number of images."""
    params: dict[str, np.ndarray]
    """The parameters by their paths, "down_0_0/residual/conv_1/kernel"."""


def export(
    model: Model,
    path: str | Path,
    *,
    platforms: Sequence[Platform] = get_args(Platform),
    sampler: str | Sampler | None = None,
    clip: bool | None = None,
    **levels: Unpack[PlanArgs],
) -> Path:
    """Write a folder with the model's sampler for other programs, and return its path.

    It contains the program for the given platforms (StableHLO, serialized by jax.export), the parameters in a
    safetensors file, a README.md, and an example.py, which needs jax, numpy, safetensors and flatbuffers alone.
    The program gives the images of model.sample(seeds=seeds, labels=labels) up to rounding, for any number of images.

    sampler, clip, levels: as in Model.sample, such as steps=2. Raises InputError, also if flatbuffers is not installed.
    """
    if not isinstance(model, Model):
        raise InputError(f"Expected a Model, as load returns it, got {one_line(model)}.")
    path = user_path(path)
    chosen = check_export(path, platforms)
    write_artifact(path, model, model.plan(sampler=sampler, clip=clip, **levels), chosen)
    return path


def check_export(path: Path, platforms: Sequence[Any]) -> list[Platform]:
    """The platforms. Raises InputError for unknown ones, for a folder that cannot be written, without flatbuffers."""
    check_writable(path, folder=True)
    chosen = as_list(platforms)
    if not chosen or not all(isinstance(each, str) and each in get_args(Platform) for each in chosen):
        raise InputError(f"Expected platforms among {', '.join(get_args(Platform))}, got {one_line(platforms)}.")
    if importlib.util.find_spec("flatbuffers") is None:  # jax.export needs it, and jax does not install it
        raise InputError("Exporting needs flatbuffers, which is not installed: pip install flatbuffers.")
    return chosen


def write_artifact(path: Path, model: Model, plan: SamplingPlan, platforms: Sequence[Platform]) -> None:
    """Write the folder of `export`. Raises InputError where it cannot be written."""
    program, params = exported(model, plan, platforms)
    shape, classes = [4, *model.config.network.image_shape], model.config.network.classes
    wanted = {"labels": _LABELS, "argument": ", labels"} if classes else {"labels": "", "argument": ""}
    with atomic_write(path) as beside, write_errors(path):
        beside.mkdir()
        (beside / _PROGRAM).write_bytes(program.serialize())
        write_safetensors(beside / _PARAMS, params, {})
        (beside / "example.py").write_text(_EXAMPLE.format(shape=shape, **wanted), "utf-8")
        (beside / "README.md").write_text(_readme(model, plan, program), "utf-8")


def exported(model: Model, plan: SamplingPlan, platforms: Sequence[Platform] = get_args(Platform)) -> Artifact:
    """The sampler of `model.plan(...)` as an exported function with its parameters.

    The CPU kernels and fused attention are replaced by operations of XLA, which can be exported.
    """
    function, tree = model.program(plan.guidance)
    params = {name: np.asarray(leaf) for name, leaf in leaves(tree) if leaf is not None}

    def program(params: dict[str, Array], seeds: UInt32[Array, " b"], labels: Labels | None = None) -> Images:
        keys = image_keys(jax.vmap(jax.random.key)(seeds), jnp.arange(seeds.shape[0]))
        return sample(function, plan.sampler, nested(params), plan.levels, keys, labels)

    (count,) = jax.export.symbolic_shape("b")
    rows = [jnp.uint32] if model.config.network.classes is None else [jnp.uint32, jnp.int32]
    shapes = [jax.ShapeDtypeStruct((count,), dtype) for dtype in rows]
    with kernels.off():
        return Artifact(jax.export.export(jax.jit(program), platforms=platforms)(params, *shapes), params)


def _readme(model: Model, plan: SamplingPlan, program: jax.export.Exported) -> str:
    network, latents = model.config.network, model.config.latents
    height, width, channels = network.image_shape
    values = f"latents of {latents.autoencoder}" if latents else "images in [-1, 1]"
    labels = f"- `labels`: int32 [b], class numbers from 0 to {network.classes - 1}\n" if network.classes else ""
    levels, described = ", ".join(f"{level:.6g}" for level in plan.levels), plan.described()
    clipped = "clipped to [-1, 1]" if described["clip"] else "not clipped"
    guidance = guidance_text(described)
    names = "".join(f"{number}. {' '.join(name.split())}\n" for number, name in enumerate(model.config.class_names))
    classes = names and f"\n## Classes\n{names}"
    return f"""# Sampler exported by cm_jax
`example.py` runs it with jax, numpy, safetensors and flatbuffers; cm_jax is not needed.

`{_PROGRAM}` is a function for `jax.export.deserialize`. Its arguments, for any number b of images:
- `params`: the arrays of `{_PARAMS}`
- `seeds`: uint32 [b], one seed for each image
{labels}
It returns float32 [b, {height}, {width}, {channels}], {values}: those of
`Model.sample(seeds=..., labels=...)`, up to rounding.

- Sampler: {sampler_text(described)}, noise levels {levels}
- Denoised images: {clipped}{f", {guidance}" if guidance else ""}
- Precision of the network: {network.precision}
- Platforms: {", ".join(program.platforms)}
- Exported by jax {jax.__version__}; JAX loads exported functions for at least six months
{classes}"""
