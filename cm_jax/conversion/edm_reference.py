"""The networks of the EDM family in PyTorch, for the parity check: functions of a file's tensors under their own names.

They follow from the names and shapes of the tensors and from what a pickle states (`Facts`), not from the plan, the
rules or the layers of this package. Images are [n, c, h, w]. PyTorch is imported when a network runs.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

_PLACE = re.compile(r"(enc|dec)\.(\d+)x\2_(conv|down|up|in[01]|aux_residual|block(\d+))\.")
_FIRST, _LAST = ("conv", "down", "up", "in0"), ("aux_residual", "in1")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What tensors do not determine. The defaults are those of EDM2's constructors."""

    heads: Mapping[str, int]
    """Attention heads by name of the block ("enc.16x16_block0")."""
    label_balance: float = 0.5
    concat_balance: float = 0.5
    res_balance: float = 0.3
    attn_balance: float = 0.3
    clip_act: float = 256.0


class EDMReference:
    """F(x, c_noise, one-hot labels) of SongUNet, DhariwalUNet, EDM2's U-Net and their TrigFlow variants."""

    def __init__(self, tensors: Mapping[str, Any], facts: Facts) -> None:
        """tensors: float32 torch tensors by name, without the prefix of the preconditioning."""
        self.tensors, self.facts = tensors, facts
        self.edm2 = "emb_noise.weight" in tensors
        self.adm = "out_conv.weight" in tensors and not self.edm2
        places = {match[0][:-1]: match for name in tensors if (match := _PLACE.match(name))}

        def order(name: str) -> tuple[int, int, int]:
            match = places[name]
            kind, number = match[3], int(match[4] or 0)
            rank = 0 if kind in _FIRST else 1 if kind in _LAST else 2
            return -int(match[2]) if match[1] == "enc" else int(match[2]), rank, number

        self.encoder = sorted((name for name in places if name.startswith("enc.")), key=order)
        self.decoder = sorted((name for name in places if name.startswith("dec.")), key=order)
        self.outputs: dict[str, Any] = {}
        """Output of every block by name, after a call."""

    def __call__(self, x: Any, c_noise: Any, one_hot: Any, augmentation: Any = None, segment: Any = None) -> Any:
        """The network's output. segment: c_noise at the lower end of the segment (multi-segment sCD)."""
        import torch

        embedding = self._embedding(c_noise, one_hot, augmentation, segment)
        self.outputs = {}
        skips, pyramid = [], x
        h = torch.cat([x, torch.ones_like(x[:, :1])], dim=1) if self.edm2 else x
        for name in self.encoder:
            if name.endswith("_conv"):
                h = self._conv(h, name)
            elif name.endswith("_aux_residual"):
                pyramid = skips[-1] = h = (h + self._conv(pyramid, name, "fused")) / math.sqrt(2)
                continue
            else:
                h = self.outputs[name] = self._block(h, name, embedding)
            skips.append(h)
        for name in self.decoder:
            if "_block" in name:
                h = self._concatenated(h, skips.pop())
            h = self.outputs[name] = self._block(h, name, embedding)
        if self.edm2:
            return self._conv(h, "out_conv", gain=self.tensors["out_gain"])
        last = "out" if self.adm else f"{self.decoder[-1].rsplit('_', 1)[0]}_aux"
        return self._conv(torch.nn.functional.silu(self._group_norm(h, f"{last}_norm")), f"{last}_conv")

    def log_variance(self, c_noise: Any) -> Any:
        """The head for the uncertainty of every noise level."""
        weight = self.tensors["logvar_linear.weight"]
        if self.edm2:
            return self._linear(self._features("logvar", c_noise), "logvar_linear")[:, 0]
        return (_waves(c_noise, weight.shape[1], last=False) @ weight.T + self.tensors["logvar_linear.bias"])[:, 0]

    def _embedding(self, c_noise: Any, one_hot: Any, augmentation: Any, segment: Any) -> Any:
        import torch

        silu, tensors = torch.nn.functional.silu, self.tensors
        if self.edm2:
            h = self._linear(self._features("emb", c_noise), "emb_noise")
            if segment is not None:
                h = h + self._features("emb", segment) @ tensors["emb_t_k.weight"].T
            if one_hot is not None:
                label = self._linear(one_hot * math.sqrt(one_hot.shape[1]), "emb_label")
                h = _mp_sum(h, label, self.facts.label_balance)
            return silu(h) / 0.596
        width = tensors["map_layer0.weight"].shape[1]
        if self.adm:
            h = _waves(c_noise, width, last=False)
        elif "map_noise.freqs" in tensors:
            angles = torch.outer(c_noise, tensors["map_noise.freqs"]) * (2 * np.pi)  # rounded as in SongUNet
            h = torch.cat([angles.sin(), angles.cos()], dim=1)
        else:
            h = _waves(c_noise, width, last=True).roll(width // 2, dims=1)
        if one_hot is not None and not self.adm:
            h = h + self._linear(one_hot * math.sqrt(one_hot.shape[1]), "map_label")
        if augmentation is not None:
            h = h + augmentation @ tensors["map_augment.weight"].T
        h = self._linear(silu(self._linear(h, "map_layer0")), "map_layer1")
        if one_hot is not None and self.adm:
            h = h + one_hot @ tensors["map_label.weight"].T
        return silu(h)

    def _features(self, kind: str, time: Any) -> Any:
        """EDM2's random Fourier features, or the sinusoids of its TrigFlow variant."""
        import torch

        phases = self.tensors.get(f"{kind}_fourier.phases")
        if phases is not None:
            return math.sqrt(2) * (torch.outer(time, self.tensors[f"{kind}_fourier.freqs"]) + phases).cos()
        angles = torch.outer(time, self.tensors[f"{kind}_pos.freqs"])
        return math.sqrt(2) * torch.cat([angles.cos(), angles.sin()], dim=1)

    def _block(self, x: Any, name: str, embedding: Any) -> Any:
        return self._edm2_block(x, name, embedding) if self.edm2 else self._edm_block(x, name, embedding)

    def _edm_block(self, x: Any, name: str, embedding: Any) -> Any:
        import torch

        silu, mode = torch.nn.functional.silu, _resampling(name)
        h = self._conv(silu(self._group_norm(x, f"{name}.norm0")), f"{name}.conv0", mode)
        modulation = self._linear(embedding, f"{name}.affine")[:, :, None, None]
        if self.adm:
            scale, shift = modulation.chunk(2, dim=1)
            h = silu(self._group_norm(h, f"{name}.norm1") * (1 + scale) + shift)
        elif modulation.shape[1] == 2 * h.shape[1]:
            parts = modulation.chunk(2, dim=1)
            scale, shift = (part / (part.square().mean(dim=1, keepdim=True) + 1e-8).sqrt() for part in parts)
            h = silu(self._group_norm(h, f"{name}.norm1") * scale + shift)
        else:
            h = silu(self._group_norm(h + modulation, f"{name}.norm1"))
        h = self._conv(h, f"{name}.conv1")
        skip = self._conv(x, f"{name}.skip", mode)
        scale = 1.0 if self.adm else math.sqrt(0.5)
        h = (h + skip) * scale
        if f"{name}.qkv.weight" in self.tensors:
            qkv = self._conv(self._group_norm(h, f"{name}.norm2"), f"{name}.qkv")
            h = (h + self._conv(_attention(qkv, self.facts.heads[name]), f"{name}.proj")) * scale
        return h

    def _edm2_block(self, x: Any, name: str, embedding: Any) -> Any:
        import torch

        facts, encoder = self.facts, name.startswith("enc.")
        x = _resampled(x, _resampling(name), None)
        if encoder:
            x = _normalized(self._conv(x, f"{name}.conv_skip"), 1)
        h = self._conv(torch.nn.functional.silu(x) / 0.596, f"{name}.conv_res0")
        gain = self.tensors.get(f"{name}.emb_gain", 1.0)
        modulation = self._linear(embedding, f"{name}.emb_linear", gain)[:, :, None, None]
        if f"{name}.emb_gain" in self.tensors:
            h = h * (1 + modulation)
        else:
            scale, shift = (_normalized(part, 1) for part in modulation.chunk(2, dim=1))
            h = _normalized(h, 1) * scale + shift
        h = self._conv(torch.nn.functional.silu(h) / 0.596, f"{name}.conv_res1")
        x = _mp_sum(x if encoder else self._conv(x, f"{name}.conv_skip"), h, facts.res_balance)
        if f"{name}.attn_qkv.weight" in self.tensors:
            mixed = _attention(self._conv(x, f"{name}.attn_qkv"), facts.heads[name], normalize=True)
            x = _mp_sum(x, self._conv(mixed, f"{name}.attn_proj"), facts.attn_balance)
        return x.clip(-facts.clip_act, facts.clip_act)

    def _concatenated(self, a: Any, b: Any) -> Any:
        import torch

        if self.edm2:
            t, total = self.facts.concat_balance, a.shape[1] + b.shape[1]
            scale = math.sqrt(total / ((1 - t) ** 2 + t**2))
            a, b = a * (scale * (1 - t) / math.sqrt(a.shape[1])), b * (scale * t / math.sqrt(b.shape[1]))
        return torch.cat([a, b], dim=1)

    def _weight(self, name: str, gain: Any = 1.0) -> Any:
        weight = self.tensors[f"{name}.weight"]
        if not self.edm2:
            return weight
        flat = weight.flatten(1)
        norms = 1e-4 * math.sqrt(flat.shape[1]) + flat.norm(dim=1)
        return weight * (gain / norms).reshape(-1, *[1] * (weight.ndim - 1))

    def _linear(self, x: Any, name: str, gain: Any = 1.0) -> Any:
        y = x @ self._weight(name, gain).T
        return y + self.tensors[f"{name}.bias"] if f"{name}.bias" in self.tensors else y

    def _conv(self, x: Any, name: str, mode: str | None = None, gain: Any = 1.0) -> Any:
        """Resampling, then the convolution, each where it exists; "fused" pads once for both."""
        import torch

        taps: Any = self.tensors.get(f"{name}.resample_filter")
        bias: Any = self.tensors.get(f"{name}.bias")
        if mode == "fused":
            y = torch.nn.functional.conv2d(x, self._weight(name), padding=2)
            width = taps.shape[-1]
            y = torch.nn.functional.conv2d(y, taps.expand(y.shape[1], 1, width, width), stride=2, groups=y.shape[1])
            return y + bias[:, None, None]
        x = _resampled(x, mode, taps)
        if f"{name}.weight" not in self.tensors:
            return x
        weight = self._weight(name, gain)
        return torch.nn.functional.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    def _group_norm(self, x: Any, name: str) -> Any:
        import torch

        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        groups = min(32, x.shape[1] // 4)
        return torch.nn.functional.group_norm(x, groups, weight, bias, 1e-5 if self.adm else 1e-6)


def _resampling(name: str) -> str | None:
    return {"up": "up", "down": "down"}.get(name.rpartition("_")[2])


def _waves(time: Any, width: int, *, last: bool) -> Any:
    """[cos(t w), sin(t w)], w from 1 to 1/10000, of which the last is included or not."""
    import torch

    half = width // 2
    frequencies = torch.from_numpy((1e-4 ** (np.arange(half) / (half - last))).astype(np.float32))
    angles = torch.outer(time, frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _normalized(x: Any, dim: int) -> Any:
    return x / (1e-4 + x.square().mean(dim=dim, keepdim=True).sqrt())


def _mp_sum(a: Any, b: Any, t: float) -> Any:
    return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)


def _resampled(x: Any, mode: str | None, taps: Any) -> Any:
    """Half or double size by a depthwise convolution; taps None: the mean of 2x2 pixels."""
    import torch

    if mode is None:
        return x
    channels = x.shape[1]
    taps = torch.full((1, 1, 2, 2), 0.25) if taps is None else taps
    kernel, padding = taps.expand(channels, 1, *taps.shape[2:]), (taps.shape[-1] - 1) // 2
    if mode == "down":
        return torch.nn.functional.conv2d(x, kernel, stride=2, padding=padding, groups=channels)
    return torch.nn.functional.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=channels)


def _attention(qkv: Any, heads: int, *, normalize: bool = False) -> Any:
    """Attention with channels in the order (head, channel, three)."""
    import torch

    count, channels, height, width = qkv.shape
    parts = qkv.reshape(count * heads, channels // heads // 3, 3, height * width)
    q, k, v = (_normalized(parts, 1) if normalize else parts).unbind(2)
    scores = torch.einsum("ncq,nck->nqk", q, k / math.sqrt(k.shape[1])).softmax(dim=2)
    return torch.einsum("nqk,nck->ncq", scores, v).reshape(count, channels // 3, height, width)
