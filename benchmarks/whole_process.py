"""Time of one-step sampling as a whole process, compared with PyTorch: python -m benchmarks.whole_process

Compares `python sample.py --count 64` with a warm compilation cache with torch_process.py, which loads its network
from TorchScript and has noise and labels prepared. Both use the bundled model and write 8-bit images into an .npz file.
Processes alternate. Exits with 1 if pixels differ by more than 1 of 255.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import torch

from benchmarks.common import ROOT, header, load_average, parser, row
from benchmarks.torch_unet import OneStep
from cm_jax import load
from cm_jax.samplers.generation import image_keys, noise_from

SEED = 0


def prepare(count: int, folder: Path) -> tuple[Path, Path]:
    """Write the PyTorch network and the noise and labels that `sample.py` uses; returns both paths."""
    model, key = load(), jax.random.key(SEED)
    noise = np.asarray(noise_from(image_keys(key, np.arange(count)), model.config.network.image_shape)(0))
    labels = np.asarray(model.sample_labels(key, count), np.int64)
    function = OneStep(model.config.function, model.params, float(model.plan(steps=1).levels[0])).eval()
    network, inputs = folder / "network.pt", folder / "inputs.npz"
    np.savez(inputs, noise=noise, labels=labels)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        example = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels)
        torch.jit.save(torch.jit.trace(function, example, check_trace=False), network)
    return network, inputs


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--count", type=int, default=64, help="Number of images.")
    options.add_argument("--repeats", type=int, default=7, help="Number of timed processes per row.")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        network, inputs = prepare(args.count, folder)
        outputs = {"cm_jax": folder / "cm_jax.npz", "PyTorch": folder / "torch.npz"}
        sample = ["sample.py", "--count", str(args.count), "--seed", str(SEED), "--output", str(outputs["cm_jax"])]
        commands = {
            "cm_jax": [*sample, "--compilation-cache", str(folder / "compiled")],
            "PyTorch": ["benchmarks/torch_process.py", str(network), str(inputs), str(outputs["PyTorch"])],
        }
        for command in commands.values():
            seconds(command)  # compiles, and loads files into the page cache
        images = [np.load(path)["arr_0"].astype(int) for path in outputs.values()]
        difference = np.abs(images[0] - images[1]).max()
        times: dict[str, list[float]] = {process: [] for process in commands}
        for _ in range(args.repeats):
            outputs["cm_jax"].unlink()  # sample.py does not overwrite files
            for process, command in commands.items():
                times[process].append(seconds(command))
    print(f"{os.cpu_count()} cores; jax {jax.__version__}, torch {torch.__version__}; {args.count} images.")
    print(header("Process", "Median s", "Fastest s", "Time / PyTorch"))
    reference = statistics.median(times["PyTorch"])
    for process, measured in times.items():
        median = statistics.median(measured)
        print(row(process, f"{median:.2f}", f"{min(measured):.2f}", f"{median / reference:.2f}"))
    print(f"{load_average()} Largest difference: {difference} of 255.")
    if difference > 1:
        sys.exit(f"Expected images that differ by at most 1 of 255, got {difference}: the times are not comparable.")


if __name__ == "__main__":
    main()
