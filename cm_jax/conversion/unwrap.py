"""The tensors of one network in a file of training code, which may hold several in dictionaries and wrappers.

`{"ema": ..., "model": ..., "step": 1000}` is a dictionary around state dicts; `_orig_mod.module.time_embed.0.weight`
has the prefixes of torch.compile and DistributedDataParallel. A network is recognized by a layer of its time embedding,
after any prefix.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cm_jax.conversion.pickles import Budget, Inert
from cm_jax.conversion.rules import Tensors
from cm_jax.conversion.shards import is_sharded, read_weights
from cm_jax.conversion.torch_files import check_bytes, not_tensors
from cm_jax.errors import InputError, indented_list, nearest
from cm_jax.io.atomic import read_errors
from cm_jax.io.safetensors import LazyTensor

Place = tuple[str, ...]
"""Keys of the dictionaries around a value."""

_TIME_EMBEDDING = re.compile(
    r"((?:.*\.)?)(?:time_embed\.0|time_embedding\.linear_1|map_layer0|emb_noise)\.weight", re.S
)
"""The prefix of a network, before its time embedding in the names of OpenAI, diffusers, EDM and EDM2."""
_LAYER = re.compile(
    r"((?:[^.]+\.)*?)(?:time_embed|label_emb|input_blocks|middle_block|output_blocks|out"
    r"|time_embedding|class_embedding|conv_in|down_blocks|mid_block|up_blocks|conv_norm_out|conv_out)\."
)
"""The prefix of a layer in the names of OpenAI and diffusers."""
_OLD_ATTENTION = re.compile(r"(.*\battentions\.\d+\.)(query|key|value|proj_attn)(\..*)", re.S)
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_DEEPEST = 8
"""Levels of nested dictionaries that are searched."""
_MOST_NETWORKS = 100
"""In a state dict."""


class Unwrapped(NamedTuple):
    """The tensors of a network under their own names, and what was chosen, removed and left out, one line each."""

    tensors: Tensors
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Network:
    """The tensors of a state dict that have the same prefix."""

    keys: Place
    """Keys of the state dict, and the parts of the prefix where the state dict has several networks."""
    prefix: str
    tensors: Tensors
    others: Sequence[str] = ()
    """Tensors of the state dict that belong to no network."""
    names_from: str = ""
    """The network with its names, for parameters in a list."""

    @property
    def label(self) -> str:
        return ".".join(self.keys)

    def has_key(self, key: str) -> bool:
        parts = self.prefix.split(".")
        return key in (*self.keys, *parts, self.prefix.strip("."))

    def notes(self) -> Iterator[str]:
        if self.keys:
            yield f"Read the network {self.label!r} of the file."
        if self.names_from:
            yield f"Its parameters are in a list; their names are those of {self.names_from!r}."
        if self.prefix:
            yield f"Removed the prefix {self.prefix!r} from the names of its tensors."
        if self.others:
            yield f"Not read, because they lack this prefix: {_shortened(self.others)}."


def read_network(path: Path, key: str | None = None) -> Unwrapped:
    """The tensors of one network in a weight file or in shards, under the names that its format has today.

    See `unwrap` for `key` and the errors raised.
    """
    content = read_weights(path)
    with read_errors(path, "checkpoint"):
        tensors, notes = unwrap(path, content, key)
        if not is_sharded(path):
            check_bytes(path, tensors)
    tensors, more_notes = _with_current_names(tensors)
    return Unwrapped(tensors, (*notes, *more_notes))


def unwrap(path: Path, content: Any, key: str | None = None) -> Unwrapped:
    """The tensors of one network in `content`: what torch.save or a safetensors file holds.

    key: the network to read: a key of its dictionary, or its prefix; may be omitted for files with one network. Raises
    InputError for files without a network, for several without a key, for an unknown key, and for a network of which
    some tensors lack the prefix.
    """
    state_dicts, lists = _containers(content)
    networks = [network for place, tensors in state_dicts.items() for network in _networks(path, place, tensors)]
    networks += [found for place, each in lists.items() if (found := _listed_network(place, each, networks))]
    if networks:
        network = _choose(path, networks, key)
        used = {network.keys[0]} if network.keys else set(state_dicts.get((), ()))
        return Unwrapped(network.tensors, (*network.notes(), *_not_read(content, used)))
    if () in state_dicts and state_dicts[()] == content and key is None:
        return Unwrapped(state_dicts[()], ())  # refused later, with the tensors that are missing
    dictionaries = [f"{'.'.join(place)}: {_summary(tensors)}" for place, tensors in state_dicts.items() if place]
    optimizer = isinstance(content, dict) and {"state", "param_groups"} <= content.keys()
    got = f"these:\n  {indented_list(dictionaries)}" if dictionaries and not optimizer else not_tensors(content)
    raise InputError(f"Expected one state dict (tensors by name) of a U-Net in {path}, got {got}")


def _with_current_names(tensors: Tensors) -> Unwrapped:
    """Tensors with the names of diffusers 0.15 and later, in which attention layers were renamed."""

    def current(name: str) -> str:
        match = _OLD_ATTENTION.fullmatch(name)
        return f"{match[1]}{_ATTENTION[match[2]]}{match[3]}" if match else name

    renamed = {current(name): tensor for name, tensor in tensors.items()}
    note = "Renamed attention layers (query, key, value, proj_attn), which have the names of diffusers before 0.15."
    return Unwrapped(renamed, () if renamed.keys() == tensors.keys() else (note,))


def _containers(content: Any) -> tuple[dict[Place, Tensors], dict[Place, list[LazyTensor]]]:
    """All state dicts and modules, and all lists of tensors, by their keys; each is searched once."""
    state_dicts, lists, budget = {}, {}, Budget()
    known: dict[int, Tensors] = {}
    level: list[tuple[Place, Any]] = [((), content)]
    for _ in range(_DEEPEST):
        inner: list[tuple[Place, Any]] = []
        for place, value in level:
            if id(value) not in known:
                entries, module = _entries(value), dict(_module_tensors(value, budget))
                known[id(value)] = module or {str(name): each for name, each in entries.items() if _is_tensor(each)}
                inner += [] if module else [((*place, str(name)), each) for name, each in entries.items()]
            if tensors := known[id(value)]:
                budget.spend(len(tensors))
                state_dicts[place] = tensors
            if isinstance(value, list) and value and all(map(_is_tensor, value)):
                budget.spend(len(value))
                lists[place] = value
        level = [(place, value) for place, value in inner if isinstance(value, dict | list | Inert)]
    return state_dicts, lists


def _is_tensor(value: Any) -> bool:
    return isinstance(value, LazyTensor)


def _entries(value: Any) -> dict[Any, Any]:
    """The entries of a dictionary, or the attributes and items of an object."""
    if isinstance(value, Inert):
        return (value.state if isinstance(value.state, dict) else {}) | value.items
    return value if isinstance(value, dict) else {}


def _module_tensors(module: Any, budget: Budget, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, LazyTensor]]:
    """Parameters and buffers of a pickled torch.nn.Module by name."""
    parts = _entries(module) if isinstance(module, Inert) and depth < _DEEPEST**2 else {}
    if "_parameters" in parts and "_modules" in parts:
        budget.spend()
        for name, tensor in (_entries(parts["_parameters"]) | _entries(parts.get("_buffers"))).items():
            if _is_tensor(tensor):
                budget.spend()
                yield f"{prefix}{name}", tensor
        for name, inner in _entries(parts["_modules"]).items():
            yield from _module_tensors(inner, budget, f"{prefix}{name}.", depth + 1)


def _networks(path: Path, place: Place, tensors: Tensors) -> Iterator[_Network]:
    """The networks of one state dict. Raises InputError where some tensors of a network lack its prefix."""
    prefixes = {_whole_prefix(match[1], tensors) for name in tensors if (match := _TIME_EMBEDDING.fullmatch(name))}
    if len(prefixes) > _MOST_NETWORKS:
        raise ValueError(f"it holds {len(prefixes):,} networks")
    members: dict[str | None, dict[str, LazyTensor]] = {prefix: {} for prefix in (*prefixes, None)}
    for name, tensor in tensors.items():
        prefix = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default=None)
        members[prefix][name.removeprefix(prefix or "")] = tensor
    others = list(members[None])
    for prefix in sorted(prefixes):
        bare = [name for name in others if (match := _LAYER.match(name)) and prefix.startswith(match[1])]
        if bare:
            raise InputError(
                f"Expected the prefix {prefix!r} in the names of all tensors of the network in {path}, but it is "
                f"missing in {_shortened(bare)}. Save the state dict of the network again."
            )
        keys = place if len(prefixes) == 1 else (*place, *prefix.split(".")[:-1])
        yield _Network(keys, prefix, members[prefix], others)


def _whole_prefix(prefix: str, tensors: Tensors) -> str:
    """A prefix without the "model." or "unet." inside of EDM's preconditioning, if that has tensors of its own."""
    outer = re.sub(r"(?<![^.])(model|unet)\.$", "", prefix)
    return outer if f"{outer}logvar_linear.weight" in tensors else prefix


def _listed_network(place: Place, tensors: list[LazyTensor], networks: list[_Network]) -> _Network | None:
    """EMA parameters in a list (`shadow_params`), with the names of the network that has the same shapes in order."""
    for network in networks:
        names = [name for name in network.tensors if not name.endswith("resample_filter")]
        if [network.tensors[name].shape for name in names] == [tensor.shape for tensor in tensors]:
            named = dict(zip(names, tensors, strict=True))
            return _Network(place, "", named, names_from=network.label or "the file")
    return None


def _choose(path: Path, networks: list[_Network], key: str | None) -> _Network:
    if key is None and len(networks) == 1:
        return networks[0]
    labels = [network.label for network in networks]
    exact = [network for network in networks if network.label == key]
    found = exact or [network for network in networks if key is not None and network.has_key(key)]
    if len(found) == 1:
        return found[0]
    listed = "\n  ".join(f"{network.label or '(no key)'}: {_summary(network.tensors)}" for network in found or networks)
    if key is None:
        example = next((label for label in labels if "ema" in label.lower()), labels[-1])
        raise InputError(f"{path} holds {len(networks)} networks; choose one, e.g. --key {example}:\n  {listed}")
    if found:
        raise InputError(f"--key {key} matches {len(found)} networks of {path}; give the whole key:\n  {listed}")
    if labels == [""]:
        raise InputError(f"{path} holds one network without a key; leave out --key {key}.")
    raise InputError(f"{path} has no network {key!r}.{nearest(key, labels)} Expected one of its keys:\n  {listed}")


def _not_read(content: Any, used: set[str]) -> tuple[str, ...]:
    rest = [name for name in _entries(content) if str(name) not in used]
    return (f"Not read: {_shortened(rest)}.",) if rest else ()


def _summary(tensors: Tensors) -> str:
    total = sum(math.prod(tensor.shape) for tensor in tensors.values())
    shapes = [f"{_shortened([name])} {list(tensor.shape)}" for name, tensor in list(tensors.items())[:2]]
    return f"{len(tensors)} tensors, {total:,} parameters ({', '.join(shapes)}{', ...' if len(tensors) > 2 else ''})"


def _shortened(names: Sequence[Any]) -> str:
    shown = ", ".join(str(name)[:80] for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
