"""Training from checkpoints of the EDM family, their conversion, and samples of latents."""

import ast
import dataclasses
import shutil

import jax
import numpy as np
import pytest

import cm_jax
from cm_jax.checkpoints import native, published
from cm_jax.checkpoints.published import resolve
from cm_jax.cli import main
from cm_jax.conversion import edm_names, read
from cm_jax.data import NpzData
from cm_jax.diffusion.preconditioning import TrigFlowPreconditioning
from cm_jax.errors import InputError
from cm_jax.evaluation.image_sets import of_model
from cm_jax.presets import PRESETS
from cm_jax.training.initial_weights import RUNTIME_FIELDS
from cm_jax.training.loop import train
from cm_jax.training.setup import prepare
from cm_jax.types import leaves
from tests.runs.test_commands import succeeded
from tests.support import DATA

FOLDER = DATA / "edm"
CIFAR = FOLDER / "edm_ddpmpp_cond.pkl"
EDM2 = FOLDER / "edm2_guide_cond.pkl"
LATENTS = FOLDER / "edm2_latent_uncond.pkl"
FILES = {
    "cifar10-cd": "edm_cifar10_uncond_vp",
    "cifar10-ect": "edm_cifar10_uncond_vp",
    "imagenet64-ect": "edm_edm2_img64_s",
    "imagenet64-sct": "edm_edm2_img64_s",
    "imagenet64-scd": "edm_edm2_img64_s",
}
"""Presets, and the tensors of the published files that they start from."""


def short(preset, file, folder, **changes):
    """A preset with this file and a few synthetic images of its size."""
    settings, network = PRESETS[preset](), read(file).config.network
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, *network.image_shape), dtype=np.uint8)
    np.savez(folder / "data.npz", images=images, labels=np.arange(20) % (network.classes or 1))
    start = {"teacher" if settings.teacher else "init_from": str(file)}
    small = {"data": NpzData(str(folder / "data.npz")), "batch_size": 4, "parallel": "one", "log_every": 5} | start
    return dataclasses.replace(settings, **(small | changes))


def test_cifar10_ect_starts_from_a_pickle_resumes_without_it_and_samples(tmp_path):
    """The network is the file's, with the preset's dropout."""
    file = shutil.copy(CIFAR, tmp_path / "edm.pkl")
    settings, said = short("cifar10-ect", file, tmp_path, images=4 * 10), []
    train(settings, tmp_path / "run", said.append)
    expected = read(CIFAR)
    config, params = native.restore(tmp_path / "run" / "checkpoints" / "00000010")
    assert config.network == dataclasses.replace(expected.config.network, dropout=0.2)
    assert config.distilled
    change = jax.tree.map(lambda new, old: float(np.abs(new - old).max()), params, expected.params)
    assert 0 < max(jax.tree.leaves(change)) < 0.01
    assert any("network.base_channels: 128 in the preset, 8 now" in line for line in said)
    assert any("CC BY-NC-SA 4.0" in line for line in said)

    file.unlink()
    train(dataclasses.replace(settings, images=4 * 20), tmp_path / "run", said.append)
    model = cm_jax.load(tmp_path / "run")
    assert model.config.network == config.network
    images = model.sample(0, 2, labels=[3, 4], sigmas=(80, 0.821))
    assert images.shape == (2, 32, 32, 3)
    assert np.isfinite(images).all()


def test_an_edm2_pickle_is_a_teacher_of_scd(tmp_path):
    settings = short("imagenet64-scd", EDM2, tmp_path, images=4 * 3, power_ema=(), ema_decay=())
    train(settings, tmp_path / "run", lambda line: None)
    model = cm_jax.load(tmp_path / "run")
    assert model.config.distilled
    assert model.config.network.attention == "plain"
    assert model.config.network.classes == read(EDM2).config.network.classes
    for path, leaf in leaves(model.params):
        if path.endswith("/kernel"):  # one step of Adam from normalized kernels
            assert np.sqrt(np.square(leaf).mean(tuple(range(leaf.ndim - 1)))) == pytest.approx(1, abs=1e-3)


def test_a_network_with_another_c_noise_is_refused_until_the_preconditioning_fits(tmp_path):
    teacher = FOLDER / "scm_edm2_cond.pkl"
    settings = short("imagenet64-sct", teacher, tmp_path)
    with pytest.raises(InputError, match=r"(?s)c_noise\(sigma\): that of TrigFlow.*--preconditioning"):
        prepare(settings).initial_state()
    fitting = dataclasses.replace(settings, preconditioning=TrigFlowPreconditioning())
    params = prepare(fitting).initial_state().params
    assert params.keys() == {*read(teacher).params, "adaptive_weight"}


def test_a_fresh_student_has_its_own_network(tmp_path):
    network = dataclasses.replace(read(CIFAR).config.network, base_channels=4, augment_dim=0)
    setup = prepare(short("cifar10-cd", CIFAR, tmp_path, init_from="fresh", network=network))
    assert setup.config.network == network
    assert not any("The network is that of" in note for note in setup.notes)


@pytest.mark.parametrize("preset", FILES)
def test_presets_have_the_networks_of_the_published_files(preset):
    rows = [line.split("\t") for line in (DATA / "keys" / f"{FILES[preset]}.tsv").read_text().splitlines()]
    shapes = {name.removeprefix("model.").removeprefix("unet."): ast.literal_eval(shape) for name, shape, _ in rows}
    network = PRESETS[preset]().network
    found = edm_names.infer(shapes, preset)
    assert network == dataclasses.replace(found, **{name: getattr(network, name) for name in RUNTIME_FIELDS})


@pytest.mark.parametrize("preset", FILES)
def test_an_absent_file_is_named_with_its_address_and_license(preset, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        prepare(PRESETS[preset]())
    base = "https://nvlabs-fi-cdn.nvidia.com/edm"
    folder = "/pretrained/edm-cifar10" if preset.startswith("cifar10") else "2/posthoc-reconstructions/edm2-img64"
    for part in ("cm-jax download edm", base + folder, ".pkl", "CC BY-NC-SA 4.0"):
        assert part in str(caught.value)


def test_published_names_of_edm2_follow_a_pattern():
    guide = "edm2-img512-xs-uncond-2147483-0.025"
    with pytest.raises(InputError, match=f"posthoc-reconstructions/{guide}.pkl"):
        resolve(f"{guide}.pkl")
    with pytest.raises(InputError, match="There is no checkpoint"):
        resolve("edm2-img512-xs-2147483.pkl")
    assert {entry.name for entry in published.published_edm().values()} == set(published.published_edm())


@pytest.mark.parametrize("file", ["edm2_latent_uncond", "edm2_rgb_cond", "scm_ddpmpp_uncond"])
def test_models_survive_conversion_to_every_format_and_back(file, tmp_path, capsys):
    found = read(FOLDER / f"{file}.pkl")
    for name in ("folder", "file.safetensors"):
        succeeded(capsys, main, "convert", str(FOLDER / f"{file}.pkl"), str(tmp_path / name))
        again = read(tmp_path / name)
        assert again.config == found.config
        assert all(map(np.array_equal, jax.tree.leaves(again.params), jax.tree.leaves(found.params)))
    kind = "edm-consistency" if found.config.distilled else "edm"
    for name in ("edm.pt", "edm.safetensors"):
        said = succeeded(capsys, main, "convert", str(tmp_path / "folder"), str(tmp_path / name), "--to", "edm")
        heads = ("--head-dim", str(found.config.network.head_dim)) if "edm2" in file else ()
        assert f"To read it, give {' '.join(('--preconditioning', kind, *heads))}." in said
        assert ("It does not contain: latents." in said) == (found.config.latents is not None)
        target = str(tmp_path / f"{name}.safetensors")
        succeeded(capsys, main, "convert", str(tmp_path / name), target, "--preconditioning", kind, *heads)
        again = read(tmp_path / f"{name}.safetensors")
        assert again.config.distilled == found.config.distilled
        assert all(map(np.array_equal, jax.tree.leaves(again.params), jax.tree.leaves(found.params)))


def test_a_model_of_latents_samples_into_an_npz_file_for_the_decoder(tmp_path, capsys):
    said = succeeded(
        capsys, main, "sample", str(LATENTS), "--count", "2", "--steps", "1", "--output", str(tmp_path / "x.png")
    )
    assert "latents of stabilityai/sd-vae-ft-mse: they are written to" in said
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]
    model = cm_jax.load(LATENTS)
    with np.load(tmp_path / "x.npz") as written:
        np.testing.assert_allclose(written["arr_0"], model.vae_latents(model.sample(0, 2, steps=1)), rtol=1e-5)
    with pytest.raises(InputError, match="got one of latents"):
        of_model(model, model.plan(steps=1), 2)
    with pytest.raises(InputError, match="got one of images"):
        cm_jax.load(CIFAR).vae_latents(np.zeros((1, 32, 32, 3)))


def test_latents_match_the_recorded_ones():
    with np.load(FOLDER / "sampler_edm2_latent.npz") as recorded:
        x, expected = (np.moveaxis(recorded[name], 1, -1) for name in ("out", "vae_latents"))
    found = cm_jax.load(LATENTS).vae_latents(x)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_pickle_samples_and_edits_on_the_command_line(tmp_path, capsys):
    assert "EDM denoiser, 16 pixels" in succeeded(
        capsys,
        main,
        "sample",
        str(FOLDER / "edm2_guide_cond.pkl"),
        "--count",
        "2",
        "--labels",
        "1",
        "--steps",
        "1",
        "--output",
        str(tmp_path / "x.png"),
    )
    file = str(FOLDER / "tcm_ddpmpp_uncond.pkl")
    picture, edited = str(tmp_path / "x.png"), tmp_path / "edited.png"
    options = ("--sigmas", "80", "--variants", "1", "--output", str(edited))
    succeeded(capsys, main, "edit", "colorize", picture, "--checkpoint", file, *options)
    assert edited.is_file()
