"""Conversion and sampling of published-size networks, compared with diffusers: python -m benchmarks.published_size

Builds a network of the published size with random weights, writes it as OpenAI's .pt and as a diffusers folder,
converts both with `python -m convert`, samples images from the same noise with diffusers and with cm_jax, and converts
back. Each phase runs in its own process, so that only one model is in memory. Exits with 1 if a bound is exceeded.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import cm_jax
from benchmarks.common import ROOT, header, parser, row
from cm_jax.conversion.diffusers import unet_config
from cm_jax.networks import ADMUNet
from cm_jax.networks.adm_unet import IMAGENET64, LSUN256

MEMORY_BOUND = 3.0
"""Peak resident memory of a conversion / size of the tensor file."""
CHECK_BOUND = 1e-5
"""Maximum difference of network outputs reported by --check, relative to the largest output."""
IMAGE_BOUND = 1e-4
"""Maximum difference of images in [0, 1]."""
TIMESTEPS = (22, 0)
SEED = 1


@dataclasses.dataclass(frozen=True)
class Case:
    """A published network."""

    name: str
    network: ADMUNet
    label: int | None


CASES = {
    "imagenet64": Case("cd_imagenet64_lpips", IMAGENET64, 145),
    "lsun256": Case("cd_bedroom256_lpips", LSUN256, None),
}

ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
LAYERS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "group_norm": "norm",
    "to_q": "qkv",
    "to_out.0": "proj_out",
}


def openai_state(state: dict[str, Any], network: ADMUNet) -> dict[str, Any]:
    """OpenAI's names and shapes for the tensors of a UNet2DModel, independent of the tables in cm_jax."""
    import torch

    result = {}
    for name, tensor in state.items():
        module, kind = name.rsplit(".", 1)
        if module.endswith((".to_k", ".to_v")):
            continue
        if module.endswith(".to_q"):
            tensor = torch.cat([state[f"{module[:-1]}{part}.{kind}"] for part in "qkv"])
        if kind == "weight" and module.endswith((".to_q", ".to_out.0")):
            tensor = tensor[:, :, None, None]
        result[f"{_openai_module(module, network)}.{kind}"] = tensor
    return result


def _openai_module(module: str, network: ADMUNet) -> str:
    if module in ENDS:
        return ENDS[module]
    found = re.fullmatch(
        r"(down|mid|up)_block(?:s\.(\d+))?\.(resnet|attention|downsampler|upsampler)s\.(\d+)\.(.+)", module
    )
    assert found, module
    stage, level, kind, index = found[1], int(found[2] or 0), found[3], int(found[4])
    layer = LAYERS[found[5]]
    if stage == "mid":
        return f"middle_block.{1 if kind == 'attention' else 2 * index}.{layer}"
    factor = 2 ** (level if stage == "down" else len(network.channel_mult) - 1 - level)
    position = {
        "resnet": 0,
        "attention": 1,
        "downsampler": 0,
        "upsampler": 2 if factor in network.attention_factors else 1,
    }
    block = level * (network.blocks_per_level + 1) + (network.blocks_per_level if "sampler" in kind else index)
    prefix = f"input_blocks.{block + 1}" if stage == "down" else f"output_blocks.{block}"
    return f"{prefix}.{position[kind]}.{layer}"


def build(case: Case, folder: Path) -> int:
    """Write both source formats with the same random weights; no layer is zero, and outputs are of order 1."""
    import torch
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.pipelines.consistency_models.pipeline_consistency_models import ConsistencyModelPipeline
    from diffusers.schedulers.scheduling_consistency_models import CMStochasticIterativeScheduler

    torch.manual_seed(0)
    unet: Any = UNet2DModel.from_config(unet_config(case.network))
    with torch.no_grad():
        for module in unet.modules():
            if isinstance(module, torch.nn.GroupNorm):
                for leaf in (module.weight, module.bias):
                    leaf.add_(torch.randn_like(leaf), alpha=0.1)
        unet.conv_out.weight.mul_(3)
    pipeline = ConsistencyModelPipeline(unet, CMStochasticIterativeScheduler(num_train_timesteps=40))
    pipeline.save_pretrained(folder / f"diffusers-{case.name}")
    torch.save(openai_state(unet.state_dict(), case.network), folder / f"{case.name}.pt")
    return sum(parameter.numel() for parameter in unet.parameters())


def diffusers_images(case: Case, source: Path) -> np.ndarray:
    """Two-step images of the diffusers pipeline, NHWC in [0, 1]."""
    import torch
    from diffusers.pipelines.consistency_models.pipeline_consistency_models import ConsistencyModelPipeline
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()
    pipeline: Any = ConsistencyModelPipeline.from_pretrained(source)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        class_labels=case.label,
        num_inference_steps=None,
        timesteps=list(TIMESTEPS),
        generator=torch.Generator().manual_seed(SEED),
        output_type="np",
    ).images


def cm_jax_images(case: Case, checkpoint: Path) -> np.ndarray:
    """Two-step images of cm_jax from the same noise, NHWC in [0, 1]."""
    import torch

    height, width, channels = case.network.image_shape
    generator = torch.Generator().manual_seed(SEED)
    noises = [torch.randn((1, channels, height, width), generator=generator) for _ in range(1 + len(TIMESTEPS))]
    noise = torch.stack(noises).numpy().transpose(0, 1, 3, 4, 2)
    images = cm_jax.load(checkpoint).sample(0, 1, labels=case.label, timesteps=TIMESTEPS, noise=noise)
    return np.clip(images / 2 + 0.5, 0, 1)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Output and memory of a run of `python -m convert`."""

    output: str
    peak: int
    """Peak resident memory in bytes."""


def convert(source: Path, destination: Path, *flags: str) -> Conversion:
    """Run `python -m convert`. Raises RuntimeError if it fails.

    The peak that Linux reports includes some 0.2 GB of this process.
    """
    began = time.perf_counter()
    command = [sys.executable, "-m", "convert", str(source), str(destination), *flags]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{output}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{output}  {time.perf_counter() - began:.0f} s, peak memory {peak / 1e9:.2f} GB", flush=True)
    return Conversion(output, peak)


def in_subprocess(phase: Callable[..., Any], *arguments: Any) -> Any:
    """Call phase(*arguments) in a new process, which frees its memory."""
    began = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        result = pool.submit(phase, *arguments).result()
    print(f"{phase.__name__}: {time.perf_counter() - began:.0f} s", flush=True)
    return result


def differing_tensors(first: Path, second: Path) -> int:
    """Number of tensors that are not bitwise identical in two .pt or two safetensors files."""
    import safetensors.torch
    import torch

    def read(path: Path) -> dict[str, torch.Tensor]:
        return torch.load(path, weights_only=True) if path.suffix == ".pt" else safetensors.torch.load_file(path)

    a, b = read(first), read(second)
    same = (name in a and name in b and torch.equal(a[name], b[name]) for name in a | b)
    return sum(not equal for equal in same)


@dataclasses.dataclass(frozen=True)
class Result:
    """A measured quantity and its upper bound."""

    name: str
    measured: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.measured <= self.bound

    def __str__(self) -> str:
        return row(self.name, f"{self.measured:.3g}", f"{self.bound:g}", "PASS" if self.passed else "FAIL")


def measure(case: Case, folder: Path) -> Iterator[Result]:
    """Run every phase."""
    print(f"{case.name}: {in_subprocess(build, case, folder):,} parameters", flush=True)
    pt, pipeline = folder / f"{case.name}.pt", folder / f"diffusers-{case.name}"
    reference = in_subprocess(diffusers_images, case, pipeline)
    clipped = float(((reference <= 0) | (reference >= 1)).mean())
    yield Result("fraction of pixels clipped by the pipeline", clipped, 0.5)

    for kind, source in {"openai": pt, "diffusers": pipeline}.items():
        native, checked = folder / "converted", folder / "checked"
        back = folder / ("back.pt" if kind == "openai" else "back")
        weights, weights_back = (
            path if kind == "openai" else path / "unet" / "diffusion_pytorch_model.safetensors"
            for path in (source, back)
        )
        size = weights.stat().st_size
        yield Result(f"{kind} to native: peak memory / file size", convert(source, native).peak / size, MEMORY_BOUND)
        found = re.search(r"relative difference (\S+),", convert(source, checked, "--check").output)
        assert found
        yield Result(f"{kind} to native with --check: output difference", float(found[1]), CHECK_BOUND)
        difference = float(np.abs(in_subprocess(cm_jax_images, case, native) - reference).max())
        yield Result(f"{kind} to native: difference of two-step images", difference, IMAGE_BOUND)
        peak = convert(native, back, "--to", kind).peak
        yield Result(f"native to {kind}: peak memory / file size", peak / size, MEMORY_BOUND)
        differing = in_subprocess(differing_tensors, weights, weights_back)
        yield Result(f"{kind} to native and back: differing tensors", differing, 0)
        for done in (native, checked):
            shutil.rmtree(done)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--network", choices=CASES, default="imagenet64", help="Published network.")
    options.add_argument(
        "--folder", type=Path, help="Empty or new folder for several GB of weights. Default: a temporary folder."
    )
    args = options.parse_args()
    if args.folder and args.folder.exists() and any(args.folder.iterdir()):
        options.error(f"Expected an empty or new folder, but {args.folder} contains files.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        results = list(measure(CASES[args.network], folder.resolve()))
    print("\n" + header(args.network, "Measured", "Bound", "Outcome"), *results, sep="\n")
    sys.exit(not all(result.passed for result in results))


if __name__ == "__main__":
    main()
