"""Conversion is a bijection: every tensor is used once, and a round trip is bitwise identical."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.checkpoints.published import BUNDLED, imagenet_classes, published, recognize
from cm_jax.conversion import CheckpointHints, read, write
from cm_jax.conversion.diffusers import scheduler_config, unet_config
from cm_jax.conversion.rules import from_source, source_shapes, to_source
from cm_jax.conversion.unet_format import DIFFUSERS, OPENAI
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, EDMPreconditioning
from cm_jax.errors import InputError
from cm_jax.networks import ADMUNet
from cm_jax.networks.adm_unet import IMAGENET64, LSUN256
from cm_jax.types import leaves, nested
from tests.support import DATA, ROOT, SMALL, assert_bitwise_equal, integer_tensors, lazy, random_params

PUBLISHED = {"imagenet64": IMAGENET64, "lsun256": LSUN256}
KEYS = DATA / "keys"


def shapes_of(format, network):
    """Name and shape of every source tensor, without creating any."""
    return source_shapes(format.rules(network), network.shapes())


@pytest.mark.parametrize(("name", "parameters"), [("imagenet64", 295_899_267), ("lsun256", 526_304_771)])
def test_parameter_counts_of_the_published_networks(name, parameters):
    assert PUBLISHED[name].parameter_count() == parameters


@pytest.mark.parametrize(("name", "tensors"), [("imagenet64", 541), ("lsun256", 566)])
def test_all_tensors_of_openai_files_in_order(name, tensors):
    lines = (KEYS / f"openai_keys_{name}.tsv").read_text().splitlines()
    recorded = {
        key: tuple(json.loads(f"[{shape.strip('(),')}]")) for key, shape in (line.split("\t") for line in lines)
    }
    shapes = shapes_of(OPENAI, PUBLISHED[name])
    assert len(shapes) == tensors
    assert list(shapes.items()) == list(recorded.items())


@pytest.mark.parametrize(("name", "tensors"), [("imagenet64", 629), ("lsun256", 630)])
def test_all_tensors_of_diffusers_files(name, tensors):
    recorded = json.loads((KEYS / f"diffusers_unet_{name}_keys.json").read_text())
    expected = next(value for value in recorded.values() if isinstance(value, dict) and "conv_in.weight" in value)
    shapes = shapes_of(DIFFUSERS, PUBLISHED[name])
    assert len(shapes) == tensors
    assert shapes == {key: tuple(shape) for key, shape in expected.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_formats_agree_with_the_conversion_script_of_diffusers(name):
    """The composed rules are the recorded map of the conversion script of diffusers."""
    recorded = json.loads((KEYS / f"diffusers_unet_{name}_openai_map.json").read_text())
    openai = {rule.path: rule.sources for rule in OPENAI.rules(PUBLISHED[name])}
    for rule in DIFFUSERS.rules(PUBLISHED[name]):
        for part, tensor in enumerate(rule.sources):
            (expected,) = openai[rule.path]
            source = recorded[tensor]["openai"]
            assert source.split("[")[0].split("|")[0] == expected
            if len(rule.sources) == 3:
                assert f"[{part}/3 of dim0]" in source


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("format", [OPENAI, DIFFUSERS], ids=["openai", "diffusers"])
def test_published_architectures_are_inferred(name, format):
    network = PUBLISHED[name]
    inferred = format.infer(shapes_of(format, network), "a file", image_size=network.image_size, head_dim=64)
    assert inferred == network


@st.composite
def fields(draw):
    channel_mult = draw(st.lists(st.sampled_from([0.5, 1, 1.5, 2, 3]), min_size=1, max_size=4))
    levels = len(channel_mult)
    return {  # the network is created in the test, outside of hypothesis
        "image_size": 2 ** (levels + 1),
        "image_channels": draw(st.sampled_from([1, 3])),
        "base_channels": 64,
        "channel_mult": tuple(channel_mult),
        "blocks_per_level": draw(st.integers(1, 3)),
        "attention_factors": tuple(sorted(draw(st.sets(st.sampled_from([2**level for level in range(levels)]))))),
        "head_dim": draw(st.sampled_from([16, 32])),
        "classes": draw(st.sampled_from([None, 1, 10])),
        "modulation": draw(st.sampled_from(["scale_shift", "additive"])),
        "resampling": draw(st.sampled_from(["residual", "convolution"] if levels > 1 else ["residual"])),
    }


@settings(max_examples=25, deadline=None, derandomize=True)
@given(fields(), st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]))
def test_any_network_is_inferred_and_round_trips_bitwise(chosen, dtype):
    network = ADMUNet(**chosen)
    for format in (OPENAI, DIFFUSERS):
        shapes = shapes_of(format, network)
        arrays = integer_tensors(shapes, dtype)
        inferred = format.infer(shapes, "a file", image_size=network.image_size, head_dim=network.head_dim)
        assert inferred == network
        rules = format.rules(network)
        back = to_source(rules, from_source(rules, network.shapes(), lazy(arrays), source="a file"))
        assert list(back) == list(arrays)
        assert_bitwise_equal(back, arrays)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kind", ["native", "openai", "diffusers"])
@pytest.mark.parametrize(
    "preconditioning", [ConsistencyPreconditioning(), EDMPreconditioning()], ids=["consistency", "edm"]
)
def test_files_round_trip_bitwise(tmp_path, dtype, kind, preconditioning):
    if kind == "openai":
        pytest.importorskip("torch", reason="PyTorch writes the files")
    params = {path: np.asarray(leaf).astype(dtype) for path, leaf in leaves(random_params(SMALL))}
    config = ModelConfig(SMALL, preconditioning, num_levels=18)
    destination = tmp_path / ("model.pt" if kind == "openai" else "model")
    write(destination, kind, config, nested(params))
    edm = "edm" if isinstance(preconditioning, EDMPreconditioning) else "consistency"
    source = read(destination, CheckpointHints(16, None, edm, 18, 16) if kind != "native" else CheckpointHints())
    assert source.config == config
    assert_bitwise_equal(dict(leaves(source.params)), params)
    assert [entry.name for entry in tmp_path.iterdir()] == [destination.name]


@pytest.mark.parametrize(
    ("folder", "network", "levels"),
    [
        ("cd_imagenet64", IMAGENET64, 40),
        ("ct_imagenet64", IMAGENET64, 201),
        ("cd_lsun256", LSUN256, 40),
        ("ct_lsun256", LSUN256, 151),
    ],
)
def test_configs_equal_those_written_by_diffusers(folder, network, levels):
    folder = DATA / "diffusers" / "configs" / folder
    recorded = json.loads((folder / "unet" / "config.json").read_text())
    config = unet_config(network)
    # In additive networks, the norm of the middle attention is on by default and the key is unset.
    assert recorded.pop("attn_norm_num_groups", None) in (32, None)
    assert config.pop("attn_norm_num_groups") == 32
    assert config == recorded
    recorded = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler_config(ModelConfig(network, ConsistencyPreconditioning(), num_levels=levels)) == recorded


def test_all_errors_are_in_one_message():
    arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes_of(OPENAI, SMALL).items()}
    del arrays["middle_block.0.in_layers.2.weight"], arrays["out.0.bias"]
    arrays["out.0.weight"] = np.zeros(7, np.float32)
    arrays["time_embed.2.bias"] = np.zeros(128, np.int64)
    arrays["extra.weight"] = np.zeros(3, np.float32)
    with pytest.raises(InputError) as caught:
        from_source(OPENAI.rules(SMALL), SMALL.shapes(), lazy(arrays), source="model.pt")
    message = str(caught.value)
    assert message.startswith("model.pt")
    for line in (
        "missing: middle_block.0.in_layers.2.weight [64, 64, 3, 3]",
        "missing: out.0.bias [32]",
        "wrong shape: out.0.weight is [7], the architecture needs [32]",
        "not part of the network: extra.weight [3]",
        "not floating point: time_embed.2.bias is int64",
    ):
        assert line in message


def test_networks_that_diffusers_cannot_represent():
    with pytest.raises(InputError, match="ties the embedding"):
        unet_config(dataclasses.replace(SMALL, base_channels=64, channel_mult=(0.5, 1)))
    with pytest.raises(InputError, match="one head_dim"):
        unet_config(dataclasses.replace(SMALL, attention_factors=(1, 2), heads=4, head_dim=None))


def test_published_checkpoints_are_recognized_by_name(tmp_path):
    assert len(set(published()) - set(BUNDLED)) == 12
    for name, entry in published().items():
        for format in (f"{name}.pt", f"diffusers-{name}", name):
            assert recognize(tmp_path / format) is entry
    assert recognize(tmp_path / "my_model.pt") is None
    assert published()["ct_cat256"].timesteps == (62, 0)
    assert published()["edm_cat256_ema"].preconditioning == "edm"


def test_class_names_of_imagenet():
    names = imagenet_classes()
    assert len(names) == 1000
    expected = ["tench", "king penguin", "golden retriever", "toilet tissue"]
    assert [names[i].split(",")[0] for i in (0, 145, 207, 999)] == expected


def test_the_top_level_convert_only_calls_the_package():
    code = [path.read_text() for path in (ROOT / "convert").glob("*.py")]
    assert sum(len(text.splitlines()) for text in code) < 15
