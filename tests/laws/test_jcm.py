"""jcm checkpoints: every tensor is used once, and settings that tensors do not determine are requested."""

import dataclasses
import itertools
import json
import math

import flax.serialization
import ml_dtypes
import msgpack
import numpy as np
import pytest

import cm_jax
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.checkpoints.published import published_cifar10, recognize_cifar10, resolve
from cm_jax.conversion import CheckpointHints, jcm, read, write
from cm_jax.conversion.rules import from_source, source_shapes, to_source
from cm_jax.diffusion.noise_schedule import EDM_TIME, KarrasSchedule
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning, EDMPreconditioning
from cm_jax.errors import InputError
from cm_jax.networks import SongUNet
from cm_jax.networks.song_unet import DDPMPP, NCSNPP
from cm_jax.types import leaves, nested
from tests.support import DATA, assert_bitwise_equal, integer_tensors, lazy

SMALL = SongUNet(image_size=8, base_channels=8, channel_mult=(1, 2), blocks_per_level=1)
HINTS = CheckpointHints(image_size=8, preconditioning="consistency", num_levels=18)


def shapes_of(network):
    return source_shapes(jcm.rules(network), network.shapes())


def state(network, dtype=np.float32):
    """The state that a jcm run saves; online weights and optimizer differ from the EMA weights."""
    seeds = itertools.count()

    def numbers():
        return nested(dict(sorted(integer_tensors(shapes_of(network), dtype, next(seeds)).items())))

    return {
        "step": np.int32(800_000),
        "lr": 4e-4,
        "ema_rate": 0.9999,
        "params": numbers(),
        "target_params": numbers(),
        "params_ema": numbers(),
        "model_state": {},
        "opt_state": {"0": {"count": np.int32(1), "mu": numbers(), "nu": numbers()}, "1": {}, "2": {}},
        "rng_state": {"0": np.array([0, 42], np.uint32), "1": {}},
    }


def saved(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(flax.serialization.msgpack_serialize(content))
    return path


@pytest.mark.parametrize(
    ("name", "network", "count", "parameters"),
    [("ve", NCSNPP, 445, 56_395_651), ("vp", DDPMPP, 440, 55_732_739)],
)
def test_all_tensors_of_recorded_trees(name, network, count, parameters):
    recorded = json.loads((DATA / "jcm" / f"tree_{name}.json").read_text())["keys"]
    shapes = shapes_of(network)
    assert len(shapes) == count
    assert shapes == {path: tuple(shape) for path, shape in recorded.items()}
    assert sum(map(math.prod, shapes.values())) == parameters
    found = jcm.candidates(shapes, "a file", image_size=32)
    assert network in found
    choices = {(n.attention_factors, n.resampling) for n in found}
    filters = ["fir"] if network.pyramid else ["fir", "plain"]
    assert choices == set(itertools.product([(1,), (2,), (4,)], filters))
    assert len(found) == len(choices)


@pytest.mark.parametrize(
    "network",
    [
        SMALL,
        dataclasses.replace(SMALL, embedding="positional", pyramid=False, resampling="plain"),
        dataclasses.replace(
            SMALL, image_channels=1, channel_mult=(2, 1.5, 1), blocks_per_level=2, attention_factors=()
        ),
        dataclasses.replace(SMALL, channel_mult=(1,), attention_factors=(1,), blocks_per_level=3, pyramid=False),
        dataclasses.replace(SMALL, channel_mult=(1, 2, 3), attention_factors=(2, 4), image_size=16),
    ],
)
def test_networks_are_inferred_and_round_trip_bitwise(network):
    shapes = shapes_of(network)
    source = integer_tensors(shapes)
    found = jcm.candidates(shapes, "a file", image_size=network.image_size)
    assert [n for n in found if n.resampling == network.resampling] == [network]
    rules = jcm.rules(network)
    back = to_source(rules, from_source(rules, network.shapes(), lazy(source), source="a file"))
    assert_bitwise_equal(back, source)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("preconditioning", ["consistency", "edm"])
def test_a_file_becomes_a_model_and_a_native_checkpoint(tmp_path, dtype, preconditioning):
    content = state(SMALL, dtype)
    path = saved(tmp_path / "checkpoint_80", content)
    source = read(path, dataclasses.replace(HINTS, preconditioning=preconditioning))
    kind = EDMPreconditioning if preconditioning == "edm" else ConsistencyPreconditioning
    assert source.config == ModelConfig(SMALL, kind(time_factor=EDM_TIME), num_levels=18)
    assert_bitwise_equal(to_source(jcm.rules(SMALL), source.params), dict(leaves(content["params_ema"])))
    write(tmp_path / "native", "native", source.config, source.params)
    again = read(tmp_path / "native")
    assert again.config == source.config
    assert_bitwise_equal(dict(leaves(again.params)), dict(leaves(source.params)))
    with pytest.raises(InputError, match="got a SongUNet"):
        write(tmp_path / "model.pt", "openai", source.config, source.params)


def test_published_files_need_no_hints(tmp_path):
    assert len(published_cifar10()) == 10
    network = dataclasses.replace(SMALL, image_size=32, channel_mult=(1, 1, 1))
    content = state(network)
    for inside in ("cd-lpips/checkpoints/checkpoint_80", "downloads/cd-lpips", "cd-lpips.msgpack"):
        path = saved(tmp_path / inside, content)
        config = read(path).config
        assert config.network == network
        assert config.tuned_timesteps == ((11, 0),)
        assert (config.schedule, config.num_levels) == (KarrasSchedule(), 18)
    model = cm_jax.load(path)
    assert model.plan(steps=2).levels[1] == pytest.approx(0.5853481)  # indices 0, 11, 17 of OpenAI's notebook
    teacher = read(saved(tmp_path / "edm_cifar10_ema", content)).config
    assert teacher.preconditioning == EDMPreconditioning(time_factor=EDM_TIME)
    assert read(saved(tmp_path / "ct-lpips", content)).config.num_levels == 151
    folder = tmp_path / "cd-lpips"
    assert resolve(folder) == folder / "checkpoints" / "checkpoint_80"
    assert cm_jax.load(folder).config.tuned_timesteps == ((11, 0),)
    saved(folder / "checkpoints" / "checkpoint_90", content)
    with pytest.raises(InputError, match=r"holds 2 checkpoints; give the path of one of them, for example .*_90"):
        resolve(folder)
    saved(folder / "model.safetensors", {})
    assert resolve(folder) == folder
    assert recognize_cifar10(tmp_path / "my-cd-l2-lsun") is None
    with pytest.raises(InputError, match=r"jcm_checkpoints/cd-l1/checkpoints/checkpoint_80"):
        resolve("cd-l1")


def test_missing_settings_are_requested_together(tmp_path):
    network = dataclasses.replace(SMALL, channel_mult=(1, 1), pyramid=False, resampling="plain")
    path = saved(tmp_path / "checkpoint_7", state(network))
    with pytest.raises(InputError) as caught:
        read(path)
    for question in (
        "--image-size N",
        "--preconditioning consistency",
        "--num-levels N",
        "--attention-factors 1 or 2",
        "--resampling fir or plain",
    ):
        assert question in str(caught.value)
    with pytest.raises(InputError, match="--attention-factors 1 or 2"):
        read(path, dataclasses.replace(HINTS, resampling="plain"))
    hints = dataclasses.replace(HINTS, resampling="plain", attention_factors=(2,))
    assert read(path, hints).config.network == network
    with pytest.raises(InputError, match=r"Expected attention_factors 1 or 2, .*; got \(4,\)"):
        read(path, dataclasses.replace(hints, attention_factors=(4,)))
    with pytest.raises(InputError, match="one head"):
        read(path, dataclasses.replace(hints, head_dim=64))
    with pytest.raises(InputError, match="leave out --attention-factors"):
        read(resolve("emoji16_cd"), hints)


def test_all_errors_are_in_one_message(tmp_path):
    content = state(SMALL)
    tree = content["params_ema"]
    del tree["ResnetBlockBigGANpp_3"]["Conv_1"]["bias"], tree["AttnBlockpp_0"]["NIN_1"]
    tree["Conv_1"]["kernel"] = np.zeros((3, 3, 8, 6), np.float32)
    tree["Dense_1"]["bias"] = np.zeros(32, np.int32)
    tree["Dense_7"] = {"bias": np.zeros(3, np.float32)}
    with pytest.raises(InputError) as caught:
        read(saved(tmp_path / "checkpoint_1", content), HINTS)
    for line in (
        "missing: ResnetBlockBigGANpp_3/Conv_1/bias [16]",
        "missing: AttnBlockpp_0/NIN_1/W [16, 16]",
        "wrong shape: Conv_1/kernel is [3, 3, 8, 6], the architecture needs [3, 3, 8, 3]",
        "not part of the network: Dense_7/bias [3]",
        "not floating point: Dense_1/bias is int32",
    ):
        assert line in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[: len(raw) // 2], "not a complete Flax checkpoint"),
        (lambda raw: raw[:1], "not a complete Flax checkpoint"),
        (lambda raw: msgpack.packb({"params": {}, "step": 3}), "Expected 'params_ema' in .*, got only params, step"),
        (lambda raw: msgpack.packb({"params_ema": {"Conv_0": {"kernel": 3}}}), "Expected arrays only"),
        (lambda raw: msgpack.packb({"params_ema": {}}), "Expected a checkpoint of the ncsnpp model"),
        (lambda raw: msgpack.packb({"params_ema": msgpack.ExtType(9, b"x")}), "got extension type 9"),
        (lambda raw: raw.replace(b"float32", b"float31"), "not a complete Flax checkpoint"),
        (lambda raw: b"\x80\x02" + raw, "torch.save"),
    ],
)
def test_damaged_and_other_files_are_refused(tmp_path, damage, message):
    raw = flax.serialization.msgpack_serialize(state(SMALL))
    path = tmp_path / "checkpoint_1"
    path.write_bytes(damage(raw))
    with pytest.raises(InputError, match=message):
        read(path, HINTS)
