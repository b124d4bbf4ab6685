"""Parity with recorded outputs of the networks of EDM, EDM2, ECT, TCM and sCM, read from their pickles."""

import ast
import dataclasses
import functools
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm_jax.checkpoints.published import usual_classes
from cm_jax.conversion import CheckpointHints, edm_names, read
from cm_jax.conversion.edm import read_pickle, read_state_dict
from cm_jax.conversion.edm_parity import Inputs, Reference, preconditioning
from cm_jax.conversion.edm_writing import write_state_dict
from cm_jax.conversion.persistence import read_persistent
from cm_jax.conversion.read import Source, _from_edm
from cm_jax.conversion.rules import source_shapes
from cm_jax.errors import InputError
from tests.support import DATA, compiled, nhwc, relative

BOUND = 1e-5
FOLDER = DATA / "edm"
NAMES = sorted(path.stem for path in FOLDER.glob("*.pkl"))
SEGMENTS = "mscd_edm2_cond"
"""The only network with a second time input, which the denoiser does not use."""
KEYS = sorted((DATA / "keys").glob("edm_*.tsv"))
PARAMETERS = {
    "edm_cifar10_cond_vp": 55_735_299,
    "edm_cifar10_uncond_ve": 56_397_827,
    "edm_cifar10_uncond_vp": 55_733_891,
    "edm_ect_img64_s": 280_209_253,
    "edm_edm2_img512_s": 280_212_837,
    "edm_edm2_img64_s": 280_209_381,
    "edm_ffhq64_uncond_ve": 62_761_091,
    "edm_ffhq64_uncond_vp": 61_805_571,
    "edm_imagenet64_cond_adm": 295_899_267,
    "edm_scm_cifar10": 60_067_844,
    "edm_tcm_img64_s": 280_209_253,
}
"""Published numbers of parameters, without buffers."""
HOSTILE = {
    "class_unknown": "Backdoor",
    "class_unknown_inner": "BackdoorConv",
    "getattr_chain": "not callable",
    "inner_stream_exec": "not a file of torch.save",
    "outside_storage": "does not fit its storage",
    "reduce_exec": "builtins.exec",
    "reduce_print": "builtins.print",
    "stride_bomb": "does not fit its storage",
    "truncated": "exhausted",
}


@functools.cache
def golden(name):
    with np.load(FOLDER / f"{name}.npz") as recorded:
        return dict(recorded)


@functools.cache
def checkpoint(name):
    return read_pickle(FOLDER / f"{name}.pkl")


@functools.cache
def function(name):
    """The function of a checkpoint with a jitted network, and its parameters: all tests share one program."""
    found = checkpoint(name).config.function
    found = dataclasses.replace(found, network=compiled(found.network))
    return found, found.network.prepare(checkpoint(name).params)


def levels(name):
    """(images, sigma, labels, recorded denoised images) of every recorded noise level, in this project's terms."""
    recorded = golden(name)
    for level, images in enumerate(nhwc(recorded["x"])):
        if "t" in recorded:
            time = float(recorded["t"][level])
            sigma, images = 0.5 * np.tan(time), images / np.float32(np.cos(time))
        else:
            sigma = float(recorded["sigma"][level])
        labels = jnp.asarray(recorded["labels"], jnp.int32) if "labels" in recorded else None
        yield images, jnp.full(len(images), sigma, jnp.float32), labels, nhwc(recorded["D"][level])


@pytest.mark.parametrize("name", [name for name in NAMES if name != SEGMENTS])
def test_denoised_images_match(name):
    denoise, params = function(name)
    for images, sigma, labels, expected in levels(name):
        assert relative(denoise(params, jnp.asarray(images), sigma, labels), expected) < BOUND


@pytest.mark.parametrize("name", NAMES)
def test_network_outputs_match(name, optimized):
    """Where angles reach 999 rad (VP), float32 itself deviates by more than 1e-5; its recorded error is the bound."""
    recorded, (found, params) = golden(name), function(name)
    network, coefficients, sign = found.network, found.preconditioning, -1 if "t" in recorded else 1
    bound = max(BOUND, 2 * float(recorded["error_F"]))
    for level, (images, sigma, labels, _) in enumerate(levels(name)):
        x = np.asarray(coefficients.c_in(sigma))[:, None, None, None] * images
        time = jnp.full(len(images), recorded["c_noise"][level], jnp.float32)
        length = jnp.full(len(images), recorded["t_k"][level], jnp.float32) if "t_k" in recorded else None
        output = sign * network.predict(params, jnp.asarray(x), time, labels, None, length)
        assert relative(output, nhwc(recorded["F"][level])[..., : images.shape[-1]]) < bound


def source_of(name):
    """A checkpoint as `read` returns it, shared with the other tests of the family."""
    found = checkpoint(name)
    return Source(FOLDER / f"{name}.pkl", found.config, found.params, tensors=found.tensors, record=found.record)


def one_hot(source, labels):
    return None if labels is None else np.eye(source.config.network.classes, dtype=np.float32)[np.asarray(labels)]


def inputs_of(source, level):
    """Recorded network inputs of a noise level, with random parameters of augmentation."""
    recorded, network = golden(source.path.stem), source.config.network
    images, sigma, labels, _ = list(levels(source.path.stem))[level]
    c_in = preconditioning(source, np.asarray(sigma))["c_in"].astype(np.float32)
    time = np.full(len(images), recorded["c_noise"][level], np.float32)
    augmentation = np.ones((len(images), network.augment_dim), np.float32) if network.augment_dim else None
    segment = np.full(len(images), recorded["t_k"][level], np.float32) if "t_k" in recorded else None
    return Inputs(c_in[:, None, None, None] * images, time, one_hot(source, labels), augmentation, segment)


@pytest.mark.parametrize("name", NAMES)
def test_pytorch_networks_of_the_parity_check_match(name):
    """Also the preconditioning that a pickle names. The recorded float32 error is the bound."""
    source, recorded = source_of(name), golden(name)
    reference, bound = Reference(source), max(BOUND, 2 * float(recorded["error_F"]))
    sign = -1 if "t" in recorded else 1
    for level, (images, sigma, _, expected) in enumerate(levels(name)):
        inputs = dataclasses.replace(inputs_of(source, level), augmentation=None)
        output = reference.run(inputs)
        assert relative(sign * output, nhwc(recorded["F"][level])[..., : images.shape[-1]]) < bound
        found = {key: value[:, None, None, None] for key, value in preconditioning(source, np.asarray(sigma)).items()}
        if name != SEGMENTS:
            assert relative(found["c_skip"] * images + found["c_out"] * output, expected) < BOUND
            assert found["c_noise"].ravel() == pytest.approx(recorded["c_noise"][level], rel=1e-3)
        if "logvar" in recorded:
            assert reference.log_variance(inputs.c_noise) == pytest.approx(recorded["logvar"][level], abs=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if "D_no_label" in golden(name) and name != SEGMENTS])
def test_label_beyond_the_classes_stands_for_no_label(name):
    denoise, params = function(name)
    images, sigma, _, _ = list(levels(name))[1]
    none = jnp.full(len(images), denoise.network.classes or 0, jnp.int32)
    output = denoise(params, jnp.asarray(images), sigma, none)
    assert relative(output, nhwc(golden(name)["D_no_label"])) < BOUND


@pytest.mark.parametrize("name", ["edm_ddpmpp_cond", "edm_ncsnpp_uncond"])
def test_augmentation_parameters_enter_the_network(name):
    recorded, found = golden(name), checkpoint(name)
    network, coefficients = found.config.network, found.config.preconditioning
    images, sigma, labels, _ = list(levels(name))[1]
    x = np.asarray(coefficients.c_in(sigma))[:, None, None, None] * images
    augmentation = jnp.asarray(recorded["augment_labels"], jnp.float32)
    inputs = (jnp.asarray(x), coefficients.c_noise(sigma), labels, None, None, augmentation)
    output = jax.jit(network.predict)(network.prepare(found.params), *inputs)
    assert relative(coefficients.blend(jnp.asarray(images), sigma, output, 0.0), nhwc(recorded["D_augmented"])) < BOUND


def test_bfloat16_is_near_the_recorded_outputs(each_implementation):
    """The bound of the other networks (test_networks.py)."""
    found = checkpoint("edm2_guide_cond")
    network = found.config.network.at_precision("bfloat16")
    denoise = dataclasses.replace(found.config.function, network=network)
    params, errors = network.prepare(found.params), []
    for images, sigma, labels, expected in levels("edm2_guide_cond"):
        output = jax.jit(denoise)(params, jnp.asarray(images), sigma, labels)
        assert output.dtype == jnp.float32
        errors.append(relative(output, expected))
    assert 4e-4 < max(errors) < 4e-2


@pytest.mark.parametrize("name", [name for name in NAMES if "logvar" in golden(name)])
def test_uncertainty_matches(name):
    recorded, found = golden(name), checkpoint(name)
    network = found.config.network
    for level, expected in enumerate(recorded["logvar"]):
        time = jnp.full(1, recorded["c_noise"][level], jnp.float32)
        assert network.log_variance(network.prepare(found.params), time) == pytest.approx(expected[0], abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_survive_conversion_and_back(name):
    """Bitwise, apart from iDDPM's table of levels, which is computed."""
    found = checkpoint(name)
    source = read_persistent(FOLDER / f"{name}.pkl")["ema"].tensors()
    written = write_state_dict(found.config, found.params)
    expected = {edm_prefix(key): tensor.read() for key, tensor in source.items() if key != "u"}
    written = {edm_prefix(key): array for key, array in written.items()}
    assert written.keys() == expected.keys()
    for key, array in written.items():
        np.testing.assert_array_equal(array, expected[key], err_msg=key)
        assert array.shape == expected[key].shape


def edm_prefix(name):
    """The name without the prefix of the preconditioning, which differs between the programs."""
    return name.removeprefix("model.").removeprefix("unet.")


@pytest.mark.parametrize("path", KEYS, ids=lambda path: path.stem)
def test_rules_cover_the_published_networks(path):
    """All names and shapes of the published files follow from the network that is inferred from them."""
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    shapes = {edm_prefix(name): ast.literal_eval(shape) for name, shape, _ in rows}
    network = edm_names.infer(shapes, path.name)
    buffers = {name: array.shape for name, array in edm_names.buffers(network).items()}
    assert source_shapes(edm_names.rules(network), network.shapes()) | buffers == shapes
    parameters = sum(int(np.prod(ast.literal_eval(shape))) for _, shape, kind in rows if kind == "parameter")
    assert parameters == PARAMETERS.get(path.stem, parameters)


@pytest.mark.parametrize("name", ["ect_ddpmpp_uncond", "edm2_guide_cond"])
def test_state_dict_is_the_same_model_as_its_pickle(name):
    found = checkpoint(name)
    tensors = read_persistent(FOLDER / f"{name}.pkl")["ema"].tensors()
    kind = "consistency" if name.startswith("ect") else "edm"
    head_dim = getattr(found.config.network, "head_dim", None)
    again = read_state_dict(FOLDER / f"{name}.pth", tensors, head_dim=head_dim, preconditioning=kind)
    assert again.config.preconditioning == found.config.preconditioning
    assert again.config.schedule == found.config.schedule
    assert again.config.network.shapes() == found.config.network.shapes()
    assert not any("--head-dim" in note for note in again.notes)
    with pytest.raises(InputError, match="--preconditioning"):
        read_state_dict(FOLDER / f"{name}.pth", tensors)


def test_assumed_heads_are_noted():
    tensors = read_persistent(FOLDER / "edm_adm_cond.pkl")["ema"].tensors()
    found = read_state_dict(FOLDER / "edm_adm_cond.pth", tensors, preconditioning="edm")
    assert "Attention heads are assumed to have 64 channels" in found.notes[-1]


def test_ect_is_the_identity_at_its_sigma_min():
    denoise, params = function("ect_ddpmpp_uncond")
    images = jnp.asarray(nhwc(golden("ect_ddpmpp_uncond")["x"])[0])
    output = denoise(params, images, jnp.full(len(images), 0.003, jnp.float32), None)
    assert relative(output, images) < 1e-6


def test_ect_and_tcm_are_told_apart():
    assert type(checkpoint("ect_ddpmpp_uncond").config.preconditioning).__name__ == "ConsistencyPreconditioning"
    assert type(checkpoint("tcm_ddpmpp_uncond").config.preconditioning).__name__ == "EDMPreconditioning"
    assert checkpoint("tcm_ddpmpp_uncond").config.distilled


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_and_run_nothing(name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        read(FOLDER / "hostile" / f"{name}.pkl")
    assert HOSTILE[name] in str(caught.value)
    assert os.listdir(tmp_path) == []
    assert capfd.readouterr().out == ""


def test_source_text_in_a_pickle_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(FOLDER / "hostile" / "module_src_canary.pkl", tmp_path / "model.pkl")
    found = read(tmp_path / "model.pkl")
    assert os.listdir(tmp_path) == ["model.pkl"]
    expected = checkpoint("edm2_guide_uncond")
    assert found.config == expected.config
    np.testing.assert_array_equal(found.params["stem"]["kernel"], expected.params["stem"]["kernel"])


def test_missing_key_lists_the_networks():
    with pytest.raises(InputError, match="--key: ema"):
        read_pickle(FOLDER / "edm2_guide_cond.pkl", key="net")


@pytest.mark.parametrize(
    ("name", "hints", "message"),
    [
        (
            "edm_adm_cond",
            {"preconditioning": "consistency"},
            "edm or edm-consistency for the EDMPrecond of .*, got cons",
        ),
        ("edm2_guide_cond", {"preconditioning": "consistency"}, "edm or edm-consistency for the Precond of"),
        ("scm_edm2_cond", {"preconditioning": "consistency"}, "edm or edm-consistency for the TrigFlowPrecond of"),
        ("edm_adm_cond", {"head_dim": 7}, "leave out --head-dim"),
        ("edm_ddpmpp_cond", {"head_dim": 7}, "leave out --head-dim"),
        ("edm_ddpmpp_cond", {"attention_factors": (2,)}, "leave out --attention-factors"),
        ("edm_ddpmpp_cond", {"resampling": "fir"}, "leave out .* --resampling"),
    ],
)
def test_options_that_do_not_apply_to_a_pickle_are_refused(name, hints, message):
    with pytest.raises(InputError, match=message):
        read(FOLDER / f"{name}.pkl", CheckpointHints(**hints))


def test_the_heads_of_a_song_unet_are_not_an_option():
    tensors = read_persistent(FOLDER / "edm_ddpmpp_cond.pkl")["ema"].tensors()
    found = read_state_dict(FOLDER / "edm_ddpmpp_cond.pth", tensors, preconditioning="edm")
    with pytest.raises(InputError, match="leave out --head-dim"):
        _from_edm(FOLDER / "edm_ddpmpp_cond.pth", found, CheckpointHints(head_dim=7))


@pytest.mark.parametrize(
    ("classes", "stem", "data", "first"),
    [
        (1000, "snapshot", None, "tench"),
        (1000, "snapshot", "datasets/imagenet-64x64.zip", "tench"),
        (1000, "snapshot", "img512-sd.zip", "tench"),
        (1000, "edm2-img64-s-1073741-0.075", "/data/x", "tench"),
        (1000, "snapshot", "datasets/birds1000.zip", None),
        (1000, "birds-img64", "datasets/birds-img64.zip", None),
        (10, "snapshot", "datasets/cifar10-32x32.zip", "airplane"),
        (10, "snapshot", None, None),
        (10, "snapshot", "datasets/digits.zip", None),
    ],
)
def test_class_names_are_those_of_the_data_set(classes, stem, data, first):
    names = usual_classes(classes, stem, data)
    assert len(names) == (classes if first else 0)
    assert not first or names[0].startswith(first)
