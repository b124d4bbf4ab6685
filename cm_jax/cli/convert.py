"""`convert`: from PyTorch's checkpoints to ours and back."""

import dataclasses
import shlex
import time
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from cm_jax import conversion
from cm_jax.checkpoints.resolve import resolve
from cm_jax.checkpoints.single_file import to_float16
from cm_jax.cli.parsing import numbers
from cm_jax.cli.running import say
from cm_jax.conversion import PreconditioningName
from cm_jax.errors import InputError, indented_list
from cm_jax.io.atomic import check_writable, user_path
from cm_jax.networks.fir import Filter


@dataclasses.dataclass(frozen=True)
class Convert:
    """Convert a checkpoint between PyTorch and JAX: the original's .pt, a diffusers folder, ours; in every direction.

    The Flax checkpoints of openai/consistency_models_cifar10 are read too, and become ours.

    The architecture is read off the tensors. The flags say what tensors cannot tell; the published checkpoints are
    recognised by name and need none of them.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A .pt file, a diffusers folder, a CIFAR-10 original's file, a cm_jax checkpoint, a run's folder (its newest
    checkpoint), or a bundled model's name."""
    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")]
    """What to write. It must not exist yet, unless it is a .pt or .safetensors file."""
    to: Literal["", "native", "openai", "diffusers", "lpips", "inception"] = ""
    """Default: openai for a destination that ends in .pt, else ours: a folder, or one file where the destination ends
    in .safetensors. lpips, inception: a .safetensors file with the
    weights of the distance or of the metrics; docs/conversion.md tells where SOURCE comes from."""
    head_dim: int | None = None
    """Channels of an attention head (64 in the published networks)."""
    heads: int | None = None
    """Number of attention heads, where that is what all levels share."""
    preconditioning: PreconditioningName | None = None
    """consistency: f with f(x, sigma_min) = x; edm: a denoiser, such as a teacher."""
    levels: int | None = None
    """Number of levels of the grid that timesteps and indices count (40 for CD; 201 or 151 for CT)."""
    image_size: int | None = None
    """Height and width of the images."""
    attention_factors: str = ""
    """Of a CIFAR-10 original: factors of down-sampling with attention, as "2" or "2,4"."""
    resampling: Filter | None = None
    """Of a CIFAR-10 original: the filter before halving and after doubling."""
    lpips_heads: Path | None = None
    """Of LPIPS: the heads (lpips/weights/v0.1/vgg.pth in the package lpips), where SOURCE is torchvision's VGG16."""
    half: bool = False
    """Round parameters to float16: half the size, three digits. Models that are read from it compute in float32."""
    check: bool = False
    """Run PyTorch's network and ours on the same inputs first; write only if they agree."""


def convert(arguments: Convert) -> None:
    """Read, check, write, and say what was done."""
    from cm_jax.conversion.parity import compare

    if arguments.to in ("lpips", "inception"):
        _convert_weights(arguments)
        return
    if arguments.lpips_heads is not None:
        raise InputError("--lpips-heads belongs to --to lpips: say that too, or leave it out.")
    suffix = arguments.destination.suffix.lower()
    kind = arguments.to or ("openai" if suffix == ".pt" else "native")
    file = kind == "openai" or (kind == "native" and suffix == ".safetensors")
    if not file and user_path(arguments.destination).exists():
        raise InputError(f"{arguments.destination} exists already: name another destination, or remove it first.")
    if not file and suffix in (".pt", ".bin", ".safetensors", ".npz", ".ckpt", ".msgpack"):
        raise InputError(f"{arguments.destination} looks like a file, and --to {kind} writes a folder: name a folder.")
    check_writable(arguments.destination, folder=not file)
    hints = conversion.CheckpointHints(
        arguments.head_dim,
        arguments.heads,
        arguments.preconditioning,
        arguments.levels,
        arguments.image_size,
        numbers("attention-factors", arguments.attention_factors, int),
        arguments.resampling,
    )
    began = time.perf_counter()
    source = conversion.read(resolve(arguments.source), hints)
    network = source.config.network
    parameters = sum(leaf.size for leaf in jax.tree.leaves(source.params))
    say(f"Read {arguments.source}: {_architecture(source)}; {parameters:,} parameters.")
    if source.overridden:
        say(f"As you say, and not as it does:\n  {indented_list(source.overridden)}")
    if arguments.check:
        parity = compare(source)
        say(parity.report())
        if not parity.passed:
            raise InputError(f"The two networks disagree, so {arguments.destination} was not written.")
    params = to_float16(source.params, arguments.source) if arguments.half else source.params
    conversion.write(arguments.destination, kind, source.config, params)
    say(f"Wrote {arguments.destination} ({kind}) in {time.perf_counter() - began:.1f} s.")
    if kind == "diffusers" and not source.config.distilled:
        say("It holds the network alone: ConsistencyModelPipeline would take a denoiser for a consistency function.")
    if kind == "native":
        say(
            f"Draw from it: cm-jax sample {shlex.quote(str(arguments.destination))}"
            + (" --labels 0" if network.classes else "")
        )


def _convert_weights(arguments: Convert) -> None:
    """The weights of LPIPS or of Inception, from others' files to ours."""
    from cm_jax.conversion import metric_networks
    from cm_jax.feature_networks import inception, lpips

    mine = ("source", "destination", "to") + (("lpips_heads",) if arguments.to == "lpips" else ())
    flags = [field for field in dataclasses.fields(Convert) if field.name not in mine]
    given = ["--" + field.name.replace("_", "-") for field in flags if getattr(arguments, field.name) != field.default]
    if given:
        raise InputError(f"--to {arguments.to} has no use for {' and '.join(given)}: these are about other files.")
    if arguments.destination.suffix.lower() != ".safetensors":
        raise InputError(f"--to {arguments.to} writes one file: name it {arguments.destination.stem}.safetensors.")
    check_writable(arguments.destination, folder=False)
    if arguments.to == "lpips":
        params = metric_networks.read_lpips(
            user_path(arguments.source), arguments.lpips_heads and user_path(arguments.lpips_heads)
        )
        what, file, published = "VGG16 and the heads of LPIPS", lpips.FILE, metric_networks.LPIPS_DIGEST
    else:
        params = metric_networks.read_inception(user_path(arguments.source))
        classifier = "with" if "logits" in params else "without"
        what, file, published = f"Inception-V3 {classifier} classes", inception.FILE, metric_networks.INCEPTION_DIGEST
    known = (
        "those published"
        if metric_networks.digest(params) == published
        else "NOT those published: retrained, or damaged"
    )
    say(f"Read {arguments.source}: {what}; its numbers are {known}.")
    file.save(arguments.destination, params)
    say(f"Wrote {arguments.destination}. To use it: export {file.variable}={shlex.quote(str(arguments.destination))}")


def _architecture(source: conversion.Source) -> str:
    config, network = source.config, source.config.network
    kind = "consistency model" if config.distilled else "EDM denoiser"
    classes = f"{network.classes} classes" if network.classes else "unconditional"
    return f"{kind}, {network.image_shape[0]} pixels, {classes}, {config.num_levels} levels"
