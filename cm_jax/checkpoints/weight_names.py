"""Names of the weight files of PyTorch networks in a folder: one file, or shards with an index."""

import re
from collections.abc import Collection

INDEX = ".index.json"
SHARD = re.compile(r"(.+)-(\d{1,6})-of-(\d{1,6})(\.safetensors|\.bin|\.pt|\.pth)")
"""(stem, number, count, suffix): diffusion_pytorch_model-00001-of-00002.safetensors"""
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
"""Usual names of weights in a folder, the first ones preferred."""
_NO_WEIGHTS = ("optimizer", "scheduler", "scaler", "training_args", "random_states", "rng_state", "sampler")
"""Starts of the names of other files in the folders of training programs."""


def has_weights(name: str) -> bool:
    """Whether a file is not one of the other files of training programs, by its name."""
    return not name.startswith(_NO_WEIGHTS)


def choices(names: Collection[str]) -> list[str]:
    """The weights among the files of a folder: an index of shards, a file, or a shard without an index.

    As in diffusers, safetensors files are preferred to pickles. Several where several files may be meant.
    """
    for suffix in (".safetensors", ".bin"):
        indexes = sorted(name for name in names if name.endswith(f"{suffix}{INDEX}"))
        files = sorted(name for name in names if name.endswith(suffix) and has_weights(name))
        shards = {match.group(1, 3, 4): name for name in files if (match := SHARD.fullmatch(name))}
        single = [name for name in files if not SHARD.fullmatch(name)]
        for found in (indexes, single, list(shards.values())):
            stems = [_stem(name) for name in found]
            usual = next((stem for stem in _STEMS if stem in stems), None)
            if choice := [name for name, stem in zip(found, stems, strict=True) if usual in (None, stem)]:
                return choice
    return []


def parts(weights: str, names: Collection[str]) -> list[str]:
    """All files of these weights among those of their folder: an index and its shards, all shards, or one file."""
    match = SHARD.fullmatch(weights)
    if weights.endswith(INDEX):
        stem, dot, suffix = weights.removesuffix(INDEX).rpartition(".")
        wanted, first = (stem, dot + suffix), [weights]
        shards = [name for name in names if (each := SHARD.fullmatch(name)) and each.group(1, 4) == wanted]
    elif match:
        wanted, first = match.group(1, 3, 4), []
        shards = [name for name in names if (each := SHARD.fullmatch(name)) and each.group(1, 3, 4) == wanted]
    else:
        return [weights]
    return [*first, *sorted(shards)]


def _stem(name: str) -> str:
    """The name of a weight file without number and suffixes."""
    match = SHARD.fullmatch(name)
    return match[1] if match else name.removesuffix(INDEX).rpartition(".")[0]
