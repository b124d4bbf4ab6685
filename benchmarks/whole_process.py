"""One-step images by a whole process, start-up included, ours beside PyTorch's: python -m benchmarks.whole_process

Ours is `python sample.py --count 64` with compiled programs at hand, PyTorch's the program in torch_process.py, which
has the network ready in TorchScript, labels and noise. Both draw from the bundled model, in turn, and write 8-bit
images into an .npz file; the program ends with status 1 where these are more than one level apart.
"""

import argparse
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

from benchmarks.torch_unet import OneStep
from cm_jax import load
from cm_jax.samplers.generation import image_keys, noise_from

REPOSITORY = Path(__file__).resolve().parent.parent
SEED = 0


def prepare(count: int, folder: Path) -> tuple[Path, Path]:
    """PyTorch's network and its inputs, which are those that `sample.py` will draw."""
    model, key = load(), jax.random.key(SEED)
    noise = np.asarray(noise_from(image_keys(key, np.arange(count)), model.config.network.image_shape)(0))
    labels = np.asarray(model.draw_labels(key, count), np.int64)
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
    subprocess.run([sys.executable, *command], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        network, inputs = prepare(asked.count, folder)
        ours, theirs = folder / "ours.npz", folder / "theirs.npz"
        cache = ["--compilation-cache", str(folder / "compiled")]
        commands = {
            "ours": ["sample.py", "--count", str(asked.count), "--seed", str(SEED), "--output", str(ours), *cache],
            "PyTorch": ["benchmarks/torch_process.py", str(network), str(inputs), str(theirs)],
        }
        for command in commands.values():
            seconds(command)  # compiles, and brings files into memory
        apart = np.abs(np.load(ours)["arr_0"].astype(int) - np.load(theirs)["arr_0"]).max()
        times: dict[str, list[float]] = {row: [] for row in commands}
        for _ in range(asked.repeats):
            ours.unlink()  # sample.py writes over nothing
            for row, command in commands.items():
                times[row].append(seconds(command))
    print(f"{os.cpu_count()} cores; jax {jax.__version__}, torch {torch.__version__}; {asked.count} images.")
    print("| process | median s | fastest s | ratio of medians |\n|---|---|---|---|")
    best = statistics.median(times["PyTorch"])
    for row, measured in times.items():
        median = statistics.median(measured)
        print(f"| {row} | {median:.2f} | {min(measured):.2f} | {median / best:.2f} |")
    print(f"Load average {os.getloadavg()[0]:.1f}. Largest difference: {apart} of 255 levels.")
    if apart > 1:
        sys.exit("The images differ: the times are not of the same work.")


if __name__ == "__main__":
    main()
