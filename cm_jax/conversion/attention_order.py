"""Order of queries, keys and values in the attention layers of OpenAI's formats.

`thirds`: all queries, then all keys, then all values (openai/consistency_models, and guided-diffusion with
use_new_attention_order). `heads`: queries, keys and values of the first head, then of the next (guided-diffusion's
default, and openai/consistency_models with another attention_type than flash before June 2023). Names and shapes are
the same, so the user states the order. Trained weights show it, though: see `order_evidence`.
"""

import dataclasses
import functools
import math
from typing import Literal

import numpy as np

from cm_jax.conversion.rules import Tensors
from cm_jax.conversion.unet_format import OPENAI
from cm_jax.io.safetensors import LazyTensor
from cm_jax.networks import ADMUNet, AnyNetwork
from cm_jax.types import Params, leaves

QKVOrder = Literal["thirds", "heads"]
_DECISIVE = 4.0
"""Standard deviations of the difference of two correlations by which one order counts as better."""


def as_convolutions(tensors: Tensors) -> tuple[Tensors, bool]:
    """Tensors with 4-D attention kernels, and whether they were 3-D ([out, in, 1], as in guided-diffusion)."""
    linear = {
        name: dataclasses.replace(tensor, shape=(*tensor.shape, 1), read=lambda tensor=tensor: tensor.read()[..., None])
        for name, tensor in tensors.items()
        if name.endswith((".qkv.weight", ".proj_out.weight")) and len(tensor.shape) == 3
    }
    return {**tensors, **linear}, bool(linear)


def in_thirds(tensors: Tensors, network: ADMUNet) -> Tensors:
    """Tensors of a file in the order heads, in the order thirds. Values are preserved bitwise."""
    changed = {}
    for _, unit, prefix in OPENAI.units(network):
        for leaf in ("weight", "bias"):
            name = f"{prefix}.qkv.{leaf}"
            if unit.kind == "attention" and name in tensors:
                read = functools.partial(_read_in_thirds, tensors[name], network.heads_for(unit.channels_in))
                changed[name] = dataclasses.replace(tensors[name], read=read)
    return {**tensors, **changed}


def _read_in_thirds(tensor: LazyTensor, heads: int) -> np.ndarray:
    return _swapped(tensor.read(), heads, 3)


def _swapped(rows: np.ndarray, outer: int, inner: int) -> np.ndarray:
    """Rows [(outer, inner, width), ...] as [(inner, outer, width), ...]."""
    return rows.reshape(outer, inner, -1, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)


@dataclasses.dataclass(frozen=True)
class OrderEvidence:
    """What the weights say about the order of q, k and v in which they were read."""

    order: QKVOrder
    """As read."""
    correlation: float
    """Correlation of the norms of queries and keys in this order, mean over the layers."""
    other_correlation: float
    """The same in the other order."""
    deviations: float
    """Difference of the two in standard deviations; positive where the order as read is better."""

    @property
    def other(self) -> QKVOrder:
        return "heads" if self.order == "thirds" else "thirds"

    @property
    def contradicted(self) -> bool:
        """Whether the weights were clearly trained in the other order."""
        return self.deviations < -_DECISIVE

    def report(self) -> str:
        """One line."""
        verdict = "the weights give no indication"
        if abs(self.deviations) > _DECISIVE:
            verdict = f"the weights were trained as {self.other if self.contradicted else self.order}"
        return (
            f"Order of q, k and v: read as {self.order}; {verdict}. Correlation of the norms of queries and keys: "
            f"{self.correlation:.2f} as {self.order}, {self.other_correlation:.2f} as {self.other}."
        )

    def warning(self) -> str:
        """One line for a contradicted order."""
        return (
            f"q, k and v seem to be stored as {self.other}, and were read as {self.order}: images will be wrong. "
            f"Convert the original file with --qkv-order {self.other}."
        )


def order_evidence(network: AnyNetwork, params: Params, order: QKVOrder) -> OrderEvidence | None:
    """Compare the order in which `params` were read with the other one; None where no layer has several heads.

    An attention score is a sum over channels j of q_j k_j. Gradient descent on a product changes |q_j|^2 and |k_j|^2,
    the squared norms of the weights of channel j, by the same amount. In trained weights these norms therefore
    correlate over j, but only between the queries and keys that were trained together.
    """
    if not isinstance(network, ADMUNet):
        return None
    found = []
    for path, kernel in leaves(params):
        if not path.endswith("attention/qkv/kernel"):
            continue
        heads = network.heads_for(kernel.shape[0])
        norms = np.square(np.asarray(kernel, np.float32)).sum(axis=0)
        # as read, rows are [(3, head, channel)]; the file's rows in the other order
        other = _swapped(norms, heads, 3) if order == "thirds" else _swapped(norms, 3, heads)
        pairs = [rows.reshape(3, -1)[:2] for rows in (norms, other)]
        if heads > 1 and kernel.shape[0] > 3 and all(pair.std(axis=1).all() for pair in pairs):
            correlations = [float(np.corrcoef(pair)[0, 1]) for pair in pairs]
            fisher = [math.atanh(np.clip(value, -0.999, 0.999)) for value in correlations]
            found.append((*correlations, (fisher[0] - fisher[1]) * math.sqrt((kernel.shape[0] - 3) / 2)))
    if not found:
        return None
    own, other, deviations = np.sum(found, axis=0) / (len(found), len(found), math.sqrt(len(found)))
    return OrderEvidence(order, float(own), float(other), float(deviations))
