"""Sample in one step with PyTorch: python torch_process.py NETWORK.pt INPUTS.npz OUTPUT.npz

Imports only PyTorch and NumPy; `benchmarks.whole_process` times the whole process. NETWORK.pt is the consistency
function in TorchScript, so that no time is spent on building layers. INPUTS.npz holds `noise` (standard normal, NHWC)
and `labels`.
"""

import sys

import numpy as np
import torch


def main(network: str, inputs: str, output: str) -> None:
    arrays = np.load(inputs)
    function = torch.jit.load(network)
    with torch.inference_mode():
        noise = torch.from_numpy(arrays["noise"]).permute(0, 3, 1, 2).contiguous()
        images = function(noise, torch.from_numpy(arrays["labels"])).clamp(-1, 1)
        pixels = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    np.savez(output, pixels.numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
