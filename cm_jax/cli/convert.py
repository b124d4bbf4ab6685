"""`convert`: convert checkpoints between PyTorch, diffusers and native formats."""

import dataclasses
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from cm_jax import conversion
from cm_jax.checkpoints.native import to_float16
from cm_jax.checkpoints.published import resolve
from cm_jax.cli.options import WhichWeights
from cm_jax.cli.parsing import numbers, parse
from cm_jax.cli.running import say
from cm_jax.conversion import PreconditioningName
from cm_jax.conversion.attention_order import QKVOrder, order_evidence
from cm_jax.errors import InputError, indented_list
from cm_jax.io.atomic import check_writable, user_path
from cm_jax.networks.layers import Filter
from cm_jax.progress import activity
from cm_jax.types import ImageSize, in_pixels


@dataclasses.dataclass(frozen=True)
class Convert(WhichWeights):
    """Convert a checkpoint between OpenAI's .pt format, diffusers, EDM's names and the native format.

    The Flax checkpoints of openai/consistency_models_cifar10 and the pickles of EDM, EDM2, ECT, TCM and sCM can be read
    as well.

    The architecture is inferred from the tensors. Options provide what tensors do not contain; published checkpoints
    are recognized by name and need none.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A .pt file, a diffusers folder, a checkpoint of consistency_models_cifar10, a .pkl file of the EDM family, a
    native checkpoint, a run folder (its latest checkpoint), an id of the Hugging Face Hub (OWNER/NAME or
    OWNER/NAME@REVISION), or the name of a bundled or downloaded model."""
    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")]
    """File or folder to write. Only files are overwritten."""
    to: Literal["native", "openai", "diffusers", "edm", "lpips", "inception"] | None = None
    """Format to write. native: a folder, or a single file if DESTINATION ends in .safetensors. openai: a state dict as
    .pt, .pth or .bin. edm: a state dict of EDM's classes (SongUNet, DhariwalUNet, EDM2), as .pt, .pth, .bin or
    .safetensors. lpips, inception: a .safetensors file with the weights of a metric network (sources:
    docs/conversion.md). Default: openai if DESTINATION ends in .pt, otherwise native."""
    head_dim: int | None = None
    """Channels per attention head (64 in the published networks). Default: from the checkpoint."""
    heads: int | None = None
    """Number of attention heads, if it is the same at all levels. Default: from the checkpoint."""
    preconditioning: PreconditioningName | None = None
    """consistency: f with f(x, sigma_min) = x; edm: a denoiser, such as a teacher; edm-consistency: a consistency
    function with the coefficients of a denoiser (ECT, TCM, sCM). Default: from the checkpoint."""
    num_levels: int | None = None
    """Number of discretization steps N (CD: 40; CT: 201 or 151). Default: from the checkpoint."""
    image_size: ImageSize | None = None
    """Height and width of the images: 64, or 16,32. Default: from the checkpoint."""
    attention_factors: str = ""
    """For consistency_models_cifar10: downsampling factors with attention, "2" or "2,4". Default: from the
    checkpoint."""
    resampling: Filter | None = None
    """For consistency_models_cifar10: filter for downsampling and upsampling. Default: from the checkpoint."""
    sigma_min: float | None = None
    """Lowest noise level of the training. Default: from the checkpoint, or 0.002; 0.003 for a consistency model in the
    names of EDM (ECT)."""
    sigma_max: float | None = None
    """Highest noise level of the training. Default: from the checkpoint, or 80."""
    rho: float | None = None
    """Exponent of the noise schedule. Default: from the checkpoint, or 7."""
    sigma_data: float | None = None
    """Standard deviation of the training data. Default: from the checkpoint, or 0.5."""
    time_factor: float | None = None
    """c_noise / ln sigma. Default: from the checkpoint; 250 for the names of OpenAI and diffusers."""
    class_names: Path | None = None
    """Text file with the name of each class on a line. Default: from the checkpoint."""
    tuned_timesteps: str = ""
    """Noise levels of several steps as timesteps, such as "22,0", for `sample --steps`. Default: from the
    checkpoint."""
    qkv_order: QKVOrder | None = None
    """Order of q, k and v in the attention layers of a .pt file of OpenAI's code. heads: head by head, as in
    guided-diffusion by default, and in consistency_models without flash attention before June 2023. Default: thirds."""
    lpips_heads: Path | None = None
    """For --to lpips: the heads (lpips/weights/v0.1/vgg.pth of the lpips package) if SOURCE is torchvision's VGG16.
    Default: from SOURCE."""
    fp16: bool = False
    """Store parameters in float16. Models loaded from it still compute in float32."""
    check: bool = False
    """Compare the PyTorch and JAX networks on the same inputs first; write only if they agree."""
    push: str = ""
    """Repository of the Hugging Face Hub, OWNER/NAME, to which the result is uploaded with a model card. Needs
    HF_TOKEN. Default: no upload."""
    private: tyro.conf.DisallowNone[bool | None] = None
    """For --push: visibility of a new repository. Default: as the account is configured."""
    license: str = ""
    """For --push: license of the model, such as apache-2.0. Default: none in the model card."""


def main(prog: str, words: Sequence[str]) -> None:
    """Read, check and write a checkpoint."""
    from cm_jax.conversion.parity import compare

    args = parse(Convert, prog, words)
    if args.to in ("lpips", "inception"):
        _convert_weights(args)
        return
    if args.lpips_heads is not None:
        raise InputError("--lpips-heads applies to --to lpips only: add it, or omit --lpips-heads.")
    destination, suffix = args.destination, args.destination.suffix.lower()
    kind = args.to or ("openai" if suffix == ".pt" else "native")
    file = kind in ("openai", "edm") or (kind == "native" and suffix == ".safetensors")
    if not file and user_path(destination).exists():
        raise InputError(f"{destination} exists already: choose another destination, or remove it first.")
    if not file and suffix in (".pt", ".pth", ".bin", ".pkl", ".safetensors", ".npz", ".ckpt", ".msgpack"):
        advice = "give the name of a folder."
        raise InputError(f"{destination} looks like a file, and --to {kind} writes a folder: {advice}")
    check_writable(destination, folder=not file)
    _check_push(args, kind)
    conversion.check_suffix(destination, kind)
    names = {field.name for field in dataclasses.fields(conversion.CheckpointHints)} - {"key", "ema"}
    given = {name: getattr(args, name) for name in names}
    given["attention_factors"] = numbers("attention-factors", args.attention_factors, int)
    timesteps = numbers("tuned-timesteps", args.tuned_timesteps, int)
    given["tuned_timesteps"] = timesteps and (timesteps,)
    given["class_names"] = args.class_names and _read_lines(user_path(args.class_names))
    began = time.perf_counter()
    source = args.read(resolve(args.source), **given)
    config, network = source.config, source.config.network
    parameters = sum(leaf.size for leaf in jax.tree.leaves(source.params))
    model = "consistency model" if config.distilled else "EDM denoiser"
    classes = f"{network.classes} classes" if network.classes else "unconditional"
    about = f"{model}, {in_pixels(network.image_shape)}, {classes}, {config.num_levels} levels"
    say(f"Read {args.source}: {about}; {parameters:,} parameters.")
    if source.overridden:
        say(f"Overridden by options:\n  {indented_list(source.overridden)}")
    if args.check:
        if evidence := order_evidence(network, source.params, source.qkv_order):
            say(evidence.report())
            if evidence.contradicted:
                raise InputError(f"{evidence.warning()} {destination} was not written.")
        with activity("Comparing with PyTorch", "usually 10 to 60 s"):
            parity = compare(source)
        say(parity.report())
        if not parity.passed:
            raise InputError(f"The two networks disagree; {destination} was not written.")
    params = to_float16(source.params, args.source) if args.fp16 else source.params
    with activity(f"Writing {destination}"):
        conversion.write(destination, kind, config, params)
    say(f"Wrote {destination} ({kind}) in {time.perf_counter() - began:.1f} s.")
    if report := conversion.unstated(kind, config).report():
        say(report)
    if args.push:
        options = conversion.UploadOptions(private=args.private, license=args.license)
        with activity(f"Uploading to {args.push}", own_bar=True):
            address = conversion.upload(args.push, destination, config, params, **options)
        say(f"Uploaded it: {address}")
    if kind == "diffusers" and not config.distilled:
        say("It contains the network without a pipeline, because ConsistencyModelPipeline does not support denoisers.")
    if kind == "native":
        labels = " --labels 0" if network.classes else ""
        say(f"Sample from it: cm-jax sample {shlex.quote(str(destination))}{labels}")


def _check_push(args: Convert, kind: str) -> None:
    """Raise InputError for an upload that cannot be loaded by its id, and for options without one."""
    if not args.push:
        if args.private is not None or args.license:
            raise InputError("--private and --license apply to an upload: add --push OWNER/NAME, or omit them.")
        return
    conversion.check_repo_id(args.push)
    if kind not in ("diffusers", "native"):
        raise InputError(f"--push needs --to diffusers or --to native: {kind} files do not contain all settings.")


def _read_lines(path: Path) -> tuple[str, ...]:
    try:
        return tuple(line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as text with a class name on each line: {error}.") from error


def _convert_weights(args: Convert) -> None:
    """Convert the weights of LPIPS or Inception-V3."""
    from cm_jax.conversion import metric_networks
    from cm_jax.feature_networks import inception_v3, lpips

    used = ("source", "destination", "to") + (("lpips_heads",) if args.to == "lpips" else ())
    flags = [field for field in dataclasses.fields(Convert) if field.name not in used]
    given = ["--" + field.name.replace("_", "-") for field in flags if getattr(args, field.name) != field.default]
    if given:
        raise InputError(f"--to {args.to} does not support {' and '.join(given)}: omit them.")
    if args.destination.suffix.lower() != ".safetensors":
        raise InputError(f"--to {args.to} writes a single file: use {args.destination.stem}.safetensors.")
    check_writable(args.destination, folder=False)
    source = user_path(args.source)
    if args.to == "lpips":
        with activity(f"Reading {args.source}"):
            params = metric_networks.read_lpips(source, args.lpips_heads and user_path(args.lpips_heads))
        what, file, published = "VGG16 and the heads of LPIPS", lpips.FILE, metric_networks.LPIPS_DIGEST
    else:
        with activity(f"Reading {args.source}"):
            params = metric_networks.read_inception(source)
        what = f"Inception-V3 {'with' if 'logits' in params else 'without'} classes"
        file, published = inception_v3.FILE, metric_networks.INCEPTION_DIGEST
    same = metric_networks.digest(params) == published
    known = "the published ones" if same else "NOT the published ones (retrained or damaged)"
    say(f"Read {args.source}: {what}; its weights are {known}.")
    file.save(args.destination, params)
    say(f"Wrote {args.destination}. To use it: export {file.variable}={shlex.quote(str(args.destination.absolute()))}")
