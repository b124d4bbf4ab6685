"""A PyTorch program that draws in one step: python torch_process.py NETWORK.pt INPUTS.npz OUTPUT.npz

It imports PyTorch and NumPy alone; whole_process times it from its start to its end. NETWORK.pt is the consistency
function in TorchScript, so that no time goes to building layers; INPUTS.npz has `noise` (normals, NHWC) and `labels`.
"""

import sys

import numpy as np
import torch


def main(network: str, inputs: str, output: str) -> None:
    given = np.load(inputs)
    function = torch.jit.load(network)
    with torch.inference_mode():
        noise = torch.from_numpy(given["noise"]).permute(0, 3, 1, 2).contiguous()
        images = function(noise, torch.from_numpy(given["labels"])).clamp(-1, 1)
        pixels = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    np.savez(output, pixels.numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
