"""The U-Nets of cm_jax in PyTorch, built from the same plan and parameters; used by the benchmarks."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cm_jax.diffusion.consistency_function import ConsistencyFunction
from cm_jax.networks import ADMUNet, SongUNet
from cm_jax.networks.layers import Style
from cm_jax.networks.unet_config import Block, Unit
from cm_jax.types import Params


def _filled(layer: nn.Module, weight: np.ndarray, bias: np.ndarray) -> nn.Module:
    """Load the weights into a layer and freeze it."""
    state = {"weight": torch.from_numpy(np.array(weight)), "bias": torch.from_numpy(np.array(bias))}
    layer.load_state_dict(state, strict=True, assign=True)
    return layer.requires_grad_(False)


def _convolution(leaves: Params, stride: int = 1) -> nn.Module:
    """A 3x3 convolution."""
    kernel = np.asarray(leaves["kernel"])
    layer = nn.Conv2d(kernel.shape[2], kernel.shape[3], 3, stride, padding=1, device="meta")
    return _filled(layer, kernel.transpose(3, 2, 0, 1), leaves["bias"])


def _pointwise(leaves: Params) -> nn.Module:
    """A dense layer over channels, as a 1x1 convolution."""
    kernel = np.asarray(leaves["kernel"])
    layer = nn.Conv2d(kernel.shape[0], kernel.shape[1], 1, device="meta")
    return _filled(layer, kernel.T[:, :, None, None], leaves["bias"])


def _dense(leaves: Params) -> nn.Module:
    kernel = np.asarray(leaves["kernel"])
    return _filled(nn.Linear(*kernel.shape, device="meta"), kernel.T, leaves["bias"])


def _norm(leaves: Params, style: Style) -> nn.Module:
    channels = leaves["scale"].shape[0]
    layer = nn.GroupNorm(style.groups(channels), channels, style.epsilon, device="meta")
    return _filled(layer, leaves["scale"], leaves["bias"])


def _resampled(x: Tensor, resample: str | None) -> Tensor:
    if resample == "down":
        return functional.avg_pool2d(x, 2)
    return functional.interpolate(x, scale_factor=2.0, mode="nearest") if resample == "up" else x


class _Residual(nn.Module):
    def __init__(self, network: ADMUNet | SongUNet, unit: Unit, leaves: Params) -> None:
        super().__init__()
        style = network.style
        self.resample, self.modulation, self.scale = unit.resample, network.modulation, style.residual_scale
        self.norm_1, self.conv_1 = _norm(leaves["norm_1"], style), _convolution(leaves["conv_1"])
        self.embedding = _dense(leaves["embedding"])
        self.norm_2, self.conv_2 = _norm(leaves["norm_2"], style), _convolution(leaves["conv_2"])
        self.skip = _pointwise(leaves["skip"]) if "skip" in leaves else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv_1(_resampled(functional.silu(self.norm_1(x)), self.resample))
        modulation = self.embedding(functional.silu(embedding))[:, :, None, None]
        if self.modulation == "scale_shift":
            scale, shift = modulation.chunk(2, dim=1)
            h = self.norm_2(h) * (1 + scale) + shift
        else:
            h = self.norm_2(h + modulation)
        return self.scale * (self.skip(_resampled(x, self.resample)) + self.conv_2(functional.silu(h)))


class _Attention(nn.Module):
    def __init__(self, network: ADMUNet | SongUNet, unit: Unit, leaves: Params) -> None:
        super().__init__()
        self.heads, self.scale = network.heads_for(unit.channels_out), network.style.residual_scale
        self.norm = _norm(leaves["norm"], network.style)
        self.qkv, self.projection = _dense(leaves["qkv"]), _dense(leaves["projection"])

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        b, c, h, w = x.shape
        pixels = self.norm(x).flatten(2).transpose(1, 2)
        thirds = self.qkv(pixels).view(b, h * w, 3, self.heads, c // self.heads)
        query, key, value = thirds.permute(2, 0, 3, 1, 4).unbind()
        mixed = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(b, h * w, c)
        return self.scale * (x + self.projection(mixed).transpose(1, 2).view(b, c, h, w))


class _Resampling(nn.Module):
    def __init__(self, unit: Unit, leaves: Params) -> None:
        super().__init__()
        self.resample = "up" if unit.resample == "up" else None
        self.convolution = _convolution(leaves, stride=2 if unit.resample == "down" else 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.convolution(_resampled(x, self.resample))


class TorchUNet(nn.Module):
    """An ADMUNet or SongUNet in NCHW; `.to(torch.bfloat16)` converts all of it, including norms.

    A SongUNet must be DDPM++: positional embedding, plain resampling, no pyramid, additive modulation.
    """

    def __init__(self, network: ADMUNet | SongUNet, params: Params) -> None:
        super().__init__()
        plan = network.plan()
        embedding, head = params["embedding"], params["head"]
        self.song = isinstance(network, SongUNet)
        if isinstance(network, SongUNet):
            kind = (network.embedding, network.resampling, network.pyramid, network.modulation)
            assert kind == ("positional", "plain", False, "additive")
        self.half_width = network.base_channels // 2
        self.dense_1, self.dense_2 = _dense(embedding["dense_1"]), _dense(embedding["dense_2"])
        self.table = None
        if network.classes is not None:
            self.table = nn.Embedding.from_pretrained(torch.from_numpy(np.array(embedding["table"])))

        def block(description: Block) -> nn.ModuleList:
            return nn.ModuleList(unit(part, params[description.name][part.name]) for part in description.units)

        def unit(part: Unit, leaves: Params) -> nn.Module:
            match part.kind:
                case "residual":
                    return _Residual(network, part, leaves)
                case "attention":
                    return _Attention(network, part, leaves)
                case _:
                    return _Resampling(part, leaves)

        self.stem = _convolution(params["stem"])
        self.encoder = nn.ModuleList(map(block, plan.encoder))
        self.middle = block(plan.middle)
        self.decoder = nn.ModuleList(map(block, plan.decoder))
        self.norm, self.output = _norm(head["norm"], network.style), _convolution(head["output"])

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        exponents = torch.arange(self.half_width, device=x.device) / (self.half_width - self.song)
        angles = c_noise[:, None].float() * torch.exp(-math.log(10000) * exponents)
        waves = (angles.sin(), angles.cos()) if self.song else (angles.cos(), angles.sin())
        sinusoid = torch.cat(waves, dim=1).to(x.dtype)
        row = 0 if self.table is None else self.table(labels)
        if self.song:
            embedding = self.dense_2(functional.silu(self.dense_1(sinusoid + row)))
        else:
            embedding = self.dense_2(functional.silu(self.dense_1(sinusoid))) + row

        h = self.stem(x)
        skips = [h]
        for block in self.encoder:
            h = _applied(block, h, embedding)
            skips.append(h)
        h = _applied(self.middle, h, embedding)
        for block in self.decoder:
            h = _applied(block, torch.cat([h, skips.pop()], dim=1), embedding)
        return self.output(functional.silu(self.norm(h)))


def _applied(block: nn.Module, h: Tensor, embedding: Tensor) -> Tensor:
    for unit in block.children():
        h = unit(h, embedding)
    return h


class OneStep(nn.Module):
    """One-step sampling: standard normal noise [b, c, h, w] to images clipped to [-1, 1].

    `sigma` is the noise level. The network runs in `dtype`, preconditioning and clipping in float32.
    """

    def __init__(
        self, function: ConsistencyFunction, params: Params, sigma: float, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        network: Any = function.network
        self.network = TorchUNet(network, params)
        preconditioning, level = function.preconditioning, jnp.float32(sigma)
        sigma_min = function.schedule.sigma_min
        scales = (preconditioning.c_skip(level, sigma_min), preconditioning.c_out(level, sigma_min))
        coefficients = (*scales, preconditioning.c_in(level), preconditioning.c_noise(level))
        self.sigma, self.coefficients = sigma, [float(each) for each in coefficients]
        self.dtype = dtype
        self.network.to(dtype)

    def forward(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        c_skip, c_out, c_in, c_noise = self.coefficients
        x = self.sigma * noise
        times = torch.full((len(x),), c_noise, device=x.device)
        raw = self.network((c_in * x).to(self.dtype), times, labels)
        return (c_skip * x + c_out * raw.float()).clamp(-1, 1)
