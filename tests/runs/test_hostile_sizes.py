"""Small files that name endless much: tensors without numbers, modules that hold each other twice, numbered blocks."""

import collections
import os
import pickle
import zipfile
from pathlib import Path

import flax.serialization
import numpy as np
import pytest
import torch

from cm_jax.conversion import CheckpointHints, edm, jcm, read
from cm_jax.conversion.edm_names import infer
from cm_jax.conversion.pickles import read_arrays
from cm_jax.conversion.torch_files import read_content, read_torch
from cm_jax.data import NpzData
from cm_jax.errors import InputError, one_line
from cm_jax.io.npz import read_npz

DEPTH = 40
"""Objects that hold the next one twice have 2^40 names."""


def twice(innermost, hold):
    for _ in range(DEPTH):
        innermost = hold(innermost)
    return innermost


def lists():
    return twice([], lambda inner: [inner, inner])


def save(path, content):
    torch.save(content, path)
    assert path.stat().st_size < 50_000
    return path


@pytest.mark.parametrize("legacy", [False, True])
def test_repeated_and_shared_numbers_are_limited(tmp_path, legacy):
    """70 kB that would load as 100 GB; small expanded tensors are read."""
    one, shared = torch.zeros(1), torch.zeros(10_000)
    bombs = (
        {"time_embed.0.weight": one.expand(64, 64), "x": one.expand(1000, 1000, 1000)},
        {"time_embed.0.weight": shared[:10], **{f"x{i}": shared for i in range(5000)}},
    )
    for content in bombs:
        path = tmp_path / "x.pt"
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(InputError, match=r"got tensors that need .*; save a copy of each tensor"):
            read_torch(path)
        with pytest.raises(InputError, match="got tensors that need"):
            read(path)
    torch.save({"x": one.expand(1000)}, tmp_path / "y.pt", _use_new_zipfile_serialization=not legacy)
    np.testing.assert_array_equal(read_torch(tmp_path / "y.pt")["x"].read(), np.zeros(1000))


def module(parts):
    made = torch.nn.Module()
    made._modules.update(parts)
    return made


def test_modules_that_hold_each_other_twice_are_counted(tmp_path):
    path = save(tmp_path / "x.pt", twice(torch.nn.Linear(1, 1), lambda inner: module({"a": inner, "b": inner})))
    with pytest.raises(InputError, match="more than 100,000 modules and tensors"):
        read(path)


def test_scripted_modules_that_hold_each_other_twice_are_counted(tmp_path):
    """Written by hand: PyTorch cannot script them in reasonable time."""
    new = b"c__torch__.m\nM\n)\x81"
    inner = b"}"
    for depth in range(DEPTH):
        number = bytes([depth])
        inner = b"}(X\x01\x00\x00\x00a" + new + inner + b"bq" + number + b"X\x01\x00\x00\x00bh" + number + b"u"
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + new + inner + b"b.")
    with pytest.raises(InputError, match="more than 100,000 modules and tensors"):
        read(tmp_path / "x.pt")


def test_the_same_state_dict_in_many_places(tmp_path):
    tensors = {f"x{i}": torch.zeros(1) for i in range(300)}
    torch.save({f"d{i}": tensors for i in range(2000)}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="more than 100,000 modules and tensors"):
        read(tmp_path / "x.pt")
    torch.save({f"{i}.time_embed.0.weight": torch.zeros(1) for i in range(300)}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="it holds 300 networks"):
        read(tmp_path / "x.pt")


def test_values_that_hold_each_other_twice_are_named_in_short():
    assert len(one_line(lists())) <= 40
    ordered = twice(0, lambda inner: collections.OrderedDict(a=inner, b=inner))
    assert len(one_line(ordered)) <= 40
    with pytest.raises(InputError, match=r"Expected dropout from 0 to 1 in x.pkl, got \[\[\["):
        edm._number(Path("x.pkl"), {"dropout": lists()}, "dropout", 0, 0, 1)


@pytest.mark.parametrize("kind", ["key", "element", "frozenset", "ordered"])
def test_nested_tuples_are_not_hashed(tmp_path, kind):
    nested = twice((), lambda inner: (inner, inner))
    place = {
        "key": lambda key: b"}" + key + b"K\x01s",
        "element": lambda key: b"\x8f(" + key + b"\x90",
        "frozenset": lambda key: b"(" + key + b"\x91",
        "ordered": lambda key: b"ccollections\nOrderedDict\n](" + key + b"K\x01\x86e\x85R",
    }[kind]
    tuples = pickle.dumps(nested, 2)[2:-1]
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x04" + place(tuples) + b".")
    with pytest.raises(InputError, match="a key that is a nested tuple"):
        read_content(tmp_path / "x.pt")


def test_dictionaries_of_arrays_that_hold_each_other_twice(tmp_path):
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps(twice({}, lambda inner: {"a": inner, "b": inner})))
    with pytest.raises(InputError, match="a dictionary in several places"):
        read_arrays(tmp_path / "x.ckpt")


def test_numbers_of_blocks_are_compared_with_the_tensors(tmp_path):
    tree = {"ResnetBlockBigGANpp_99999999999": {"x": np.zeros(1, np.float32)}}
    (tmp_path / "x").write_bytes(flax.serialization.msgpack_serialize({"params_ema": tree}))
    with pytest.raises(InputError, match=r"at most one block for each of the 1 tensors .* 100000000000 blocks"):
        read(tmp_path / "x", CheckpointHints(image_size=8, preconditioning="edm"))
    shapes = {"enc.8x8_conv.weight": (8, 3, 3, 3), "enc.8x8_block99999.conv0.weight": (8, 8, 3, 3)}
    with pytest.raises(InputError, match="Expected 100000 blocks at each resolution in a file, got 2 tensors"):
        infer(shapes, "a file")


def test_choices_of_levels_with_attention_are_limited():
    """40 levels of which 20 have attention would be 10^11 networks."""
    shapes = {"Conv_0/bias": (8,), "Conv_1/bias": (3,), "AttnBlockpp_40/x": (1,)}
    shapes |= {f"ResnetBlockBigGANpp_{block}/Conv_1/bias": (8,) for block in range(200)}
    with pytest.raises(InputError, match="with 200 blocks"):
        jcm.candidates(shapes, "a file", image_size=2**10)


def test_npz_files_that_unpack_to_more_than_the_memory_are_refused(tmp_path, monkeypatch):
    """Its 30 kB unpack to 25 MB; a machine with 16 MB stands for one with 16 GB."""
    path = tmp_path / "x.npz"
    np.savez_compressed(path, images=np.zeros((2000, 64, 64, 3), np.uint8), others=np.zeros(10, np.uint8))
    assert len(NpzData(str(path)).open(64).images) == 2000
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 2**12, "SC_PHYS_PAGES": 2**12}.get)
    with pytest.raises(InputError, match=r"its arrays unpack to 0\.0 GiB, and this machine has 0\.0 GiB"):
        NpzData(str(path)).open(64)
    assert len(read_npz(path, lambda names: ["others"])["others"]) == 10
