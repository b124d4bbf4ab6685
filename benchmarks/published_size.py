"""Conversion and sampling at the size that people use, against diffusers: python -m benchmarks.published_size

Builds a network of the published size with random weights, writes it as the original's .pt and as diffusers' own
folder, converts both on the command line, draws images from the same noise with diffusers and with ours, and converts
back.
Every phase runs in a process of its own, so that only one holds a model. Exits with 1 where a bound is exceeded.
"""

import argparse
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
from cm_jax.conversion.diffusers import unet_config
from cm_jax.networks import ADMUNet
from cm_jax.networks.adm_unet import IMAGENET64, LSUN256

REPOSITORY = Path(__file__).resolve().parent.parent
MEMORY_BOUND = 3.0
"""Peak resident memory of a conversion over the size of the file of tensors."""
CHECK_BOUND = 1e-5
"""Difference of the networks' outputs that --check allows, relative to the largest output."""
IMAGE_BOUND = 1e-4
"""Largest difference of two images, in the pipeline's scale of [0, 1]."""
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


def original_state(state: dict[str, Any], network: ADMUNet) -> dict[str, Any]:
    """The original's names and shapes for the tensors of UNet2DModel, spelt out apart from cm_jax's own tables."""
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
        result[f"{_original_module(module, network)}.{kind}"] = tensor
    return result


def _original_module(module: str, network: ADMUNet) -> str:
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
    """Write both sources with the same random weights: no layer is zero, and outputs are of order one."""
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
    torch.save(original_state(unet.state_dict(), case.network), folder / f"{case.name}.pt")
    return sum(parameter.numel() for parameter in unet.parameters())


def their_images(case: Case, source: Path) -> np.ndarray:
    """diffusers' images, NHWC in [0, 1]."""
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


def our_images(case: Case, checkpoint: Path) -> np.ndarray:
    """Our images from the normals that the pipeline's generator gives, in the pipeline's scale."""
    import torch

    height, width, channels = case.network.image_shape
    generator = torch.Generator().manual_seed(SEED)
    draws = [torch.randn((1, channels, height, width), generator=generator) for _ in range(1 + len(TIMESTEPS))]
    noise = torch.stack(draws).numpy().transpose(0, 1, 3, 4, 2)
    images = cm_jax.load(checkpoint).sample(0, 1, labels=case.label, timesteps=TIMESTEPS, noise=noise)
    return np.clip(images / 2 + 0.5, 0, 1)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What one run of `python -m convert` took."""

    said: str
    peak: int
    """Largest resident memory in bytes."""


def convert(source: Path, destination: Path, *flags: str) -> Conversion:
    """Run `python -m convert` and wait for it. Raises RuntimeError where it fails.

    The peak that Linux reports includes what this process held when it started the other: some 0.2 GB, far below it.
    """
    began = time.perf_counter()
    command = [sys.executable, "-m", "convert", str(source), str(destination), *flags]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{said}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{said}  {time.perf_counter() - began:.0f} s, peak memory {peak / 1e9:.2f} GB", flush=True)
    return Conversion(said, peak)


def apart(phase: Callable[..., Any], *arguments: Any) -> Any:
    """phase(*arguments) in a process of its own, which gives its memory back."""
    began = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        result = pool.submit(phase, *arguments).result()
    print(f"{phase.__name__}: {time.perf_counter() - began:.0f} s", flush=True)
    return result


def differing_tensors(first: Path, second: Path) -> int:
    """Number of tensors that are not the same, bit for bit, in two .pt or two safetensors files."""
    import safetensors.torch
    import torch

    def read(path: Path) -> dict[str, torch.Tensor]:
        return torch.load(path, weights_only=True) if path.suffix == ".pt" else safetensors.torch.load_file(path)

    ones, others = read(first), read(second)
    same = (name in ones and name in others and torch.equal(ones[name], others[name]) for name in ones | others)
    return sum(not equal for equal in same)


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: what was measured must be at most the bound."""

    what: str
    measured: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.measured <= self.bound

    def __str__(self) -> str:
        return f"| {self.what} | {self.measured:.3g} | {self.bound:g} | {'PASS' if self.passed else 'FAIL'} |"


def prove(case: Case, folder: Path) -> Iterator[Row]:
    """Every phase in turn."""
    print(f"{case.name}: {apart(build, case, folder):,} parameters", flush=True)
    pt, pipeline = folder / f"{case.name}.pt", folder / f"diffusers-{case.name}"
    theirs = apart(their_images, case, pipeline)
    yield Row("share of pixels that the pipeline clips", float(((theirs <= 0) | (theirs >= 1)).mean()), 0.5)

    for kind, source in {"openai": pt, "diffusers": pipeline}.items():
        ours, checked = folder / "converted", folder / "checked"
        back = folder / ("back.pt" if kind == "openai" else "back")
        weights, weights_back = (
            path if kind == "openai" else path / "unet" / "diffusion_pytorch_model.safetensors"
            for path in (source, back)
        )
        size = weights.stat().st_size
        yield Row(f"{kind} to ours: peak memory / file size", convert(source, ours).peak / size, MEMORY_BOUND)
        found = re.search(r"relative difference (\S+),", convert(source, checked, "--check").said)
        assert found
        yield Row(f"{kind} to ours with --check: relative difference of outputs", float(found[1]), CHECK_BOUND)
        images = apart(our_images, case, ours)
        yield Row(f"{kind} to ours: difference of two-step images", float(np.abs(images - theirs).max()), IMAGE_BOUND)
        yield Row(
            f"ours to {kind}: peak memory / file size", convert(ours, back, "--to", kind).peak / size, MEMORY_BOUND
        )
        yield Row(f"{kind} to ours and back: tensors that differ", apart(differing_tensors, weights, weights_back), 0)
        for done in (ours, checked):
            shutil.rmtree(done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=CASES, default="imagenet64")
    parser.add_argument("--folder", type=Path, help="empty or new, for some GB of weights; default: a temporary one")
    arguments = parser.parse_args()
    if arguments.folder and arguments.folder.exists() and any(arguments.folder.iterdir()):
        parser.error(f"{arguments.folder} is not empty")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = list(prove(CASES[arguments.network], folder.resolve()))
    print(f"\n| {arguments.network} | measured | at most | |\n|---|---|---|---|", *rows, sep="\n")
    sys.exit(not all(row.passed for row in rows))


if __name__ == "__main__":
    main()
