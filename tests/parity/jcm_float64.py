"""OpenAI's CIFAR-10 network in NumPy and float64: the reference without float32 rounding.

Written from a description of OpenAI's code, independent of `SongUNet`. Uses OpenAI's parameter names.
"""

import itertools

import numpy as np


def network(tensors, x, c_noise, *, blocks, channel_mult, attention, fir, pyramid):
    """F(x, c_noise). `tensors` are the parameters by path, `attention` the heights with attention blocks."""
    t = {path: array.astype(np.float64) for path, array in tensors.items()}
    residuals, attentions, pyramids = itertools.count(), itertools.count(), itertools.count()

    def norm(h, name):
        groups = min(h.shape[-1] // 4, 32)
        parts = h.reshape(len(h), -1, groups, h.shape[-1] // groups)
        parts = (parts - parts.mean((1, 3), keepdims=True)) / np.sqrt(parts.var((1, 3), keepdims=True) + 1e-6)
        return parts.reshape(h.shape) * t[f"{name}/scale"] + t[f"{name}/bias"]

    def dense(h, name, weight="kernel", bias="bias"):
        return h @ t[f"{name}/{weight}"] + t[f"{name}/{bias}"]

    def residual(h, resample=None):
        name = f"ResnetBlockBigGANpp_{next(residuals)}"
        work = swish(norm(h, f"{name}/GroupNorm_0"))
        if resample:
            work, h = resample(work, fir), resample(h, fir)
        work = convolution(work, t[f"{name}/Conv_0/kernel"]) + t[f"{name}/Conv_0/bias"]
        work = work + dense(swish(embedding), f"{name}/Dense_0")[:, None, None]
        work = swish(norm(work, f"{name}/GroupNorm_1"))
        work = convolution(work, t[f"{name}/Conv_1/kernel"]) + t[f"{name}/Conv_1/bias"]
        if f"{name}/Conv_2/kernel" in t:
            h = h @ t[f"{name}/Conv_2/kernel"][0, 0] + t[f"{name}/Conv_2/bias"]
        return (h + work) / np.sqrt(2)

    def attend(h):
        name = f"AttnBlockpp_{next(attentions)}"
        flat = norm(h, f"{name}/GroupNorm_0").reshape(len(h), -1, h.shape[-1])
        query, key, value = (dense(flat, f"{name}/NIN_{i}", "W", "b") for i in range(3))
        scores = np.einsum("bqc,bkc->bqk", query, key) / np.sqrt(h.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = weights / weights.sum(-1, keepdims=True) @ value
        return (h + dense(mixed, f"{name}/NIN_3", "W", "b").reshape(h.shape)) / np.sqrt(2)

    if "GaussianFourierProjection_0/W" in t:
        angles = 2 * np.pi * c_noise[:, None] * t["GaussianFourierProjection_0/W"]
    else:
        half = t["Dense_0/kernel"].shape[0] // 2
        angles = c_noise[:, None] * np.exp(-np.log(10000) * np.arange(half) / (half - 1))
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    embedding = dense(swish(dense(waves, "Dense_0")), "Dense_1")

    h, inputs = convolution(x, t["Conv_0/kernel"]) + t["Conv_0/bias"], x
    skips = [h]
    for level in range(len(channel_mult)):
        for _ in range(blocks):
            h = residual(h)
            h = attend(h) if h.shape[1] in attention else h
            skips.append(h)
        if level < len(channel_mult) - 1:
            h = residual(h, downsampled)
            if pyramid:
                name = f"Downsample_{next(pyramids)}/Conv2d_0"
                padded = np.pad(inputs, ((0, 0), (2, 2), (2, 2), (0, 0)))
                inputs = convolution(filtered(padded), t[f"{name}/weight"], padding=0)[:, ::2, ::2]
                inputs = h = (inputs + t[f"{name}/bias"] + h) / np.sqrt(2)
            skips.append(h)
    h = residual(attend(residual(h)))
    for level in reversed(range(len(channel_mult))):
        for _ in range(blocks + 1):
            h = residual(np.concatenate([h, skips.pop()], axis=-1))
        h = attend(h) if h.shape[1] in attention else h
        h = residual(h, upsampled) if level else h
    return convolution(swish(norm(h, "GroupNorm_0")), t["Conv_1/kernel"]) + t["Conv_1/bias"]


def swish(h):
    return h / (1 + np.exp(-h))


def convolution(h, kernel, padding=1):
    padded = np.pad(h, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[:2], axis=(1, 2))
    return np.einsum("bhwcij,ijco->bhwo", windows, kernel, optimize=True)


def filtered(h):
    """Filter with [1, 3, 3, 1] / 8 along both axes, without padding."""
    windows = np.lib.stride_tricks.sliding_window_view(h, (4, 4), axis=(1, 2))
    taps = np.array([1, 3, 3, 1]) / 8
    return np.einsum("bhwcij,i,j->bhwc", windows, taps, taps)


def downsampled(h, fir):
    if not fir:
        return (h[:, ::2, ::2] + h[:, 1::2, ::2] + h[:, ::2, 1::2] + h[:, 1::2, 1::2]) / 4
    return filtered(np.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0))))[:, ::2, ::2]


def upsampled(h, fir):
    if not fir:
        return h.repeat(2, 1).repeat(2, 2)
    b, height, width, c = h.shape
    spread = np.zeros((b, 2 * height, 2 * width, c))
    spread[:, ::2, ::2] = h
    return 4 * filtered(np.pad(spread, ((0, 0), (2, 1), (2, 1), (0, 0))))
