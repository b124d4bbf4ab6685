"""Files with the queries, keys and values of each head together: --qkv-order, and how trained weights reveal it."""

import dataclasses

import numpy as np
import pytest
import torch

from cm_jax.cli import main_convert
from cm_jax.conversion import CheckpointHints, read
from cm_jax.conversion.attention_order import order_evidence
from cm_jax.errors import InputError
from cm_jax.types import leaves
from tests.runs.test_commands import failed, succeeded
from tests.support import EMOJI, SMALL, assert_bitwise_equal, random_params

HEAD_DIM = 32
"""Of the bundled model, whose attention layers have two heads."""


def rewritten(path, *, swap=True, three_dimensional=False):
    """The bundled model with q, k and v head by head, in PyTorch alone; or with the kernels of guided-diffusion."""
    tensors = torch.load(EMOJI, weights_only=True)
    for name, tensor in tensors.items():
        if ".qkv." in name and swap:
            thirds = tensor.unflatten(0, (3, -1, HEAD_DIM))
            tensors[name] = thirds.transpose(0, 1).flatten(0, 2).contiguous()
        if three_dimensional and (".qkv.weight" in name or ".proj_out.weight" in name):
            tensors[name] = tensors[name].squeeze(-1)
    torch.save(tensors, path)
    return path


def warnings(source):
    return [note for note in source.notes if "--qkv-order" in note]


def test_trained_weights_reveal_their_order(tmp_path, capsys):
    path, expected, out = rewritten(tmp_path / "emoji16_cd.pt"), read(EMOJI), tmp_path / "out.safetensors"
    assert "--qkv-order heads" in succeeded(capsys, main_convert, path, tmp_path / "wrong.safetensors")
    said = failed(capsys, main_convert, path, out, "--check")
    assert "Convert the original file with --qkv-order heads." in said
    assert not (out).exists()
    said = succeeded(capsys, main_convert, path, out, "--qkv-order", "heads")
    assert "seem to be" not in said
    assert_bitwise_equal(dict(leaves(read(out).params)), dict(leaves(expected.params)))
    assert read(out).config == expected.config


def test_the_right_order_is_confirmed_and_the_wrong_one_refused(tmp_path, capsys):
    source = read(EMOJI)
    assert warnings(source) == []
    evidence = order_evidence(source.config.network, source.params, "thirds")
    assert evidence is not None
    assert "the weights were trained as thirds" in evidence.report()
    (note,) = warnings(read(EMOJI, CheckpointHints(qkv_order="heads")))
    assert "--qkv-order thirds" in note
    said = failed(capsys, main_convert, EMOJI, tmp_path / "out", "--check", "--qkv-order", "heads")
    assert "--qkv-order thirds" in said


@pytest.mark.parametrize("order", ["heads", "thirds"])
def test_kernels_of_guided_diffusion_need_the_order(tmp_path, order):
    path = rewritten(tmp_path / "emoji16_cd.pt", swap=order == "heads", three_dimensional=True)
    with pytest.raises(InputError, match="--qkv-order heads"):
        read(path)
    found = read(path, CheckpointHints(qkv_order=order))
    assert warnings(found) == []
    assert_bitwise_equal(dict(leaves(found.params)), dict(leaves(read(EMOJI).params)))


def test_untrained_weights_give_no_indication_and_one_head_has_no_order():
    two = dataclasses.replace(SMALL, head_dim=32)
    for seed in range(5):
        evidence = order_evidence(two, random_params(two, seed), "thirds")
        assert evidence is not None
        assert abs(evidence.deviations) < 3
        assert "the weights give no indication" in evidence.report()
    one = dataclasses.replace(SMALL, head_dim=64)
    assert order_evidence(one, random_params(one), "thirds") is None
    assert order_evidence(two, {"middle": {"attention": {"qkv": {"kernel": np.zeros((64, 192))}}}}, "thirds") is None


def test_formats_without_an_order_refuse_the_option(tmp_path):
    with pytest.raises(InputError, match="--qkv-order is for files with the names of OpenAI's code"):
        read(EMOJI.with_name("emoji32.safetensors"), CheckpointHints(qkv_order="heads"))
