"""Networks of other shapes than square RGB images, from training to edited pictures."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

import cm_jax
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.checkpoints.serialization import decode, encode
from cm_jax.cli import main_convert, main_edit, main_sample
from cm_jax.cli.parsing import parse_preset
from cm_jax.cli.train import Options
from cm_jax.data import ImageFolder, InMemory, NpzData
from cm_jax.diffusion.noise_schedule import EDM_TIME
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning
from cm_jax.editing import Luma, Mask, PatchMean
from cm_jax.errors import InputError
from cm_jax.feature_networks.lpips import LPIPS, TAPS
from cm_jax.model import Model
from cm_jax.networks import ADMUNet, SongUNet
from cm_jax.objectives import ConsistencyTraining
from cm_jax.presets import PRESETS
from cm_jax.training import loop
from cm_jax.training.config import TrainConfig
from cm_jax.training.optimizers import Adam, ConstantRate
from tests.runs.test_commands import failed, succeeded
from tests.support import random_params
from tests.toy import ToyNetwork

SHAPES = [(4, 8, 3), (4, 4, 1), (4, 4, 2), (4, 4, 4), (4, 4, 6)]
TINY = SongUNet(
    base_channels=8,
    channel_mult=(1,),
    blocks_per_level=1,
    attention_factors=(),
    embedding="positional",
    resampling="plain",
    pyramid=False,
)


def pictures(folder, mode, count=6):
    """Picture files of several sizes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = rng.integers(0, 256, (20 + number, 33 - number, len(mode)), np.uint8)
        Image.fromarray(pixels, mode).save(folder / f"{number}.png")
    return str(folder)


def settings(shape, folder):
    """A run of 20 batches: image files where they exist for the channels, else an .npz file."""
    height, width, channels = shape
    size = height if height == width else (height, width)
    network = TINY if channels in (1, 3) else ToyNetwork(classes=None)
    if channels in (1, 3, 4):
        data = ImageFolder(pictures(folder / "images", "RGBA" if channels == 4 else "RGB"))
    else:
        images = np.random.default_rng(0).integers(0, 256, (6, *shape), np.uint8)
        np.savez(folder / "images.npz", images=images)
        data = NpzData(str(folder / "images.npz"))
    return TrainConfig(
        data=data,
        network=dataclasses.replace(network, image_size=size, image_channels=channels),
        preconditioning=ConsistencyPreconditioning(time_factor=EDM_TIME),
        objective=ConsistencyTraining(),
        optimizer=Adam(ConstantRate(1e-3)),
        batch_size=4,
        images=4 * 20,
        parallel="one",
    )


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def trained(request, tmp_path_factory, sampled_runs):
    """(shape, run folder, printed lines) of a run that was resumed after 12 of 20 batches."""
    folder, said = tmp_path_factory.mktemp("shape"), []
    config = settings(request.param, folder)
    for images in (4 * 12, 4 * 20):
        loop.train(dataclasses.replace(config, images=images), folder / "run", said.append)
    return request.param, folder / "run", said


def test_a_run_resumes_and_writes_samples(trained):
    (height, width, channels), run, said = trained
    assert "Resuming after batch 12: 20 batches of 4 images." in said
    stored = json.loads((run / "config.json").read_text())["network"]
    assert stored["image_size"] == (height if height == width else [height, width])
    files = [path.name for path in sorted((run / "samples").iterdir())]
    suffix = "png" if channels in (1, 3) else "npz"
    assert files == [f"00000012.{suffix}", f"00000020.{suffix}"]
    assert any("written as .npz" in line for line in said) == (suffix == "npz")


def test_edits_preserve_the_known_part(trained):
    shape, run, _ = trained
    model, rng = cm_jax.load(run), np.random.default_rng(1)
    images = rng.uniform(-1, 1, (2, *shape)).astype(np.float32)
    known = rng.random((2, *shape[:2], 1)) < 0.5
    inpainted = model.edit(0, images, Mask(known), steps=2)
    np.testing.assert_array_equal(np.where(known, images, 0), np.where(known, inpainted, 0))
    assert (inpainted != images)[np.broadcast_to(~known, images.shape)].mean() > 0.9
    means, edited = (
        each.reshape(2, shape[0] // 4, 4, shape[1] // 4, 4, shape[2]).mean((2, 4))
        for each in (images, model.edit(0, images, PatchMean(4), steps=2))
    )
    np.testing.assert_allclose(edited, means, atol=1e-5)
    if shape[2] != 3:
        with pytest.raises(InputError, match=f"Expected RGB images for colorization, got {shape[2]} channel"):
            model.edit(0, images, Luma(), steps=2)


def test_the_format_of_samples_is_announced_before_sampling(trained, tmp_path, capsys):
    (height, width, channels), run, _ = trained
    said = succeeded(capsys, main_sample, run, "--count", 3, "--output", tmp_path / "all.png")
    as_npz = succeeded(capsys, main_sample, run, "--count", 3, "--output", tmp_path / "all.npz")
    assert "channels" not in as_npz
    with np.load(tmp_path / "all.npz") as archive:
        images = archive["arr_0"]
    assert images.shape == (3, height, width, channels)
    if channels in (1, 3):
        succeeded(capsys, main_sample, run, "--count", 3, "--output", tmp_path / "folder")
        with Image.open(tmp_path / "folder" / "000001.png") as image:
            assert image.mode == {1: "L", 3: "RGB"}[channels]
            np.testing.assert_array_equal(np.asarray(image).reshape(images[1].shape), images[1])
        assert "channels" not in said
        with Image.open(tmp_path / "all.png") as sheet:  # two columns and rows of enlarged images
            assert sheet.size == (2 * 66 + 2, 2 * (64 * height // width + 2) + 2)
    else:
        lines = said.splitlines()
        announced = next(i for i, line in enumerate(lines) if f"have {channels} channels" in line)
        assert announced < next(i for i, line in enumerate(lines) if "Sampling" in line)
        assert not (tmp_path / "all.png").exists()
    if channels == 4:
        succeeded(capsys, main_sample, run, "--count", 3, "--rgba", "--output", tmp_path / "rgba")
        with Image.open(tmp_path / "rgba" / "000001.png") as image:
            assert image.mode == "RGBA"
            np.testing.assert_array_equal(image, images[1])
        succeeded(capsys, main_sample, run, "--count", 3, "--rgba", "--output", tmp_path / "all.png")
        assert Image.open(tmp_path / "all.png").mode == "RGBA"
    else:
        said = failed(capsys, main_sample, run, "--rgba", "--output", tmp_path / "x.png")
        assert f"models with 4 channels, this one has {channels}" in said


def test_images_that_a_distance_cannot_compare_are_refused_before_the_run(tmp_path, monkeypatch):
    weights = {"vgg16": {}, "heads": dict.fromkeys(TAPS, np.zeros(1))}
    monkeypatch.setattr(LPIPS, "load_weights", lambda self: weights)
    config = settings((4, 4, 4), tmp_path)
    config = dataclasses.replace(config, objective=ConsistencyTraining(distance=LPIPS()))
    with pytest.raises(InputError, match=r"expects RGB images .* with 4 channels"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_size_is_one_number_or_height_and_width():
    assert dataclasses.replace(TINY, image_size=(8, 8)) == dataclasses.replace(TINY, image_size=8)
    network = dataclasses.replace(TINY, image_size=(8, 16))
    assert network.image_shape == (8, 16, 3)
    assert decode(encode(network), SongUNet) == network
    assert encode(network)["image_size"] == [8, 16]
    deep = {"channel_mult": (1, 1, 1)}
    for size, message in (((8, 10), "multiple of 4"), ((8, 0), "image_size must lie in")):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(TINY, image_size=size, **deep)
    with pytest.raises(InputError, match=r"image_size must be a list of 2, got \[8\]"):
        decode({"kind": "SongUNet", "image_size": [8]}, SongUNet)


@pytest.mark.parametrize("words", [["16", "32"], ["16,32"]])
def test_the_command_line_accepts_a_height_and_a_width(words):
    arguments = ["emoji32-ect", "--network.image-size", *words, "--seed", "1"]
    _, config, _ = parse_preset(PRESETS, Options(), "train.py", arguments)
    assert config.network.image_shape == (16, 32, 3)


def opened(folder, size, channels=None):
    """All images of a folder."""
    dataset = ImageFolder(str(folder)).open(size, channels=channels)
    assert isinstance(dataset, InMemory)
    return dataset.images


def test_image_files_are_cropped_to_the_aspect_ratio_and_keep_gray_or_alpha(tmp_path):
    folder = tmp_path / "rgba"
    path, size = pictures(folder, "RGBA"), (8, 12)
    rgba, rgb, gray = (opened(path, size, channels) for channels in (4, None, 1))
    assert [each.shape for each in (rgba, rgb, gray)] == [(6, *size, 4), (6, *size, 3), (6, *size, 1)]
    opaque = tmp_path / "opaque"
    opaque.mkdir()
    pixels = np.arange(20 * 30 * 3, dtype=np.uint32).reshape(20, 30, 3).astype(np.uint8)
    Image.fromarray(pixels).save(opaque / "a.png")
    (cropped,) = opened(opaque, (20, 10))
    np.testing.assert_array_equal(cropped, pixels[:, 10:20])  # of full height, from the center
    (cropped,) = opened(opaque, (5, 15))
    halved = Image.fromarray(pixels).resize((15, 10), Image.Resampling.BOX)
    np.testing.assert_array_equal(cropped, np.asarray(halved)[2:7])
    (luma,) = opened(opaque, (20, 30), 1)
    np.testing.assert_array_equal(luma[..., 0], Image.fromarray(pixels).convert("L"))
    with pytest.raises(InputError, match=r"1 \(gray\), 3 \(RGB\) or 4 \(RGBA\) channels for image files, got 6"):
        ImageFolder(path).open(8, channels=6)
    streamed = ImageFolder(path, in_memory_gib=0).open(size, channels=4)
    images = next(streamed.batches(6)).images
    np.testing.assert_array_equal(images, rgba[streamed.indices(6, 0, 0)])


def test_npz_files_have_the_channels_of_the_network(tmp_path):
    np.savez(tmp_path / "six.npz", np.zeros((3, 8, 8, 6), np.uint8))
    data = NpzData(str(tmp_path / "six.npz"))
    assert data.open((4, 8), channels=6).image_shape == (4, 8, 6)
    with pytest.raises(InputError, match=r"height, width, 3\], got uint8 \[3, 8, 8, 6\]"):
        data.open(8, channels=3)


def test_conversion_preserves_a_rectangular_size(tmp_path, capsys):
    network = ADMUNet((8, 16), 3, 32, (1, 2), 1, (2,), head_dim=32, classes=None)
    saved(tmp_path / "native", network)
    succeeded(capsys, main_convert, tmp_path / "native", tmp_path / "folder", "--to", "diffusers")
    stored = json.loads((tmp_path / "folder" / "unet" / "config.json").read_text())
    assert stored["sample_size"] == [8, 16]
    assert cm_jax.load(tmp_path / "folder").config.network == network
    succeeded(capsys, main_convert, tmp_path / "folder", tmp_path / "file.pt")
    known = ("--head-dim", 32, "--preconditioning", "consistency", "--num-levels", 18)
    said = succeeded(capsys, main_convert, tmp_path / "file.pt", tmp_path / "back", *known, "--image-size", "8,16")
    assert "8 x 16 pixels (height x width)" in said
    assert cm_jax.load(tmp_path / "back").config.network == network
    said = failed(capsys, main_convert, tmp_path / "native", tmp_path / "edm.pt", "--to", "edm")
    assert "square networks only, got 8 x 16 pixels" in said


def test_pictures_are_cropped_to_the_aspect_ratio_of_the_model(tmp_path, capsys):
    saved(tmp_path / "model", dataclasses.replace(TINY, image_size=(4, 8)))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    told = ("--checkpoint", tmp_path / "model", "--variants", 1, "--steps", 2, "--output", tmp_path / "e.png")
    boxed = ("inpaint", tmp_path / "a.png", "--box", "4,6,9,10", "--folder", tmp_path / "all")
    said = succeeded(capsys, main_edit, *boxed, *told)
    assert "a.png: center 24 x 12 of 24 x 20 pixels, reduced from 24 x 12 to 8 x 4 pixels." in said
    changed = (np.asarray(Image.open(tmp_path / "all" / "000_a_00.png")) != pixels).any(-1)
    assert changed[6:10, 4:9].all()
    assert changed.sum() == 4 * 5
    said = failed(capsys, main_edit, "inpaint", tmp_path / "a.png", "--box", "0,0,24,4", *told)
    assert "inside the center 8 : 4" in said


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_pictures_have_the_channels_of_the_model(tmp_path, capsys, channels, mode):
    saved(tmp_path / "model", dataclasses.replace(TINY, image_size=8, image_channels=channels))
    pictures(tmp_path / "in", "RGB" if mode == "L" else mode, count=1)
    asked = ("superres", tmp_path / "in" / "0.png", "--checkpoint", tmp_path / "model", "--sigmas", "80")
    asked = (*asked, "--variants", 1, "--output", tmp_path / "e.png", "--folder", tmp_path / "all")
    if channels == 4:
        assert "if they are RGBA, give --rgba" in failed(capsys, main_edit, *asked)
    succeeded(capsys, main_edit, *asked, *(["--rgba"] if channels == 4 else []))
    with Image.open(tmp_path / "all" / "000_0_00.png") as image, Image.open(tmp_path / "e.png") as sheet:
        assert (image.mode, image.size) == (mode, (33, 20))
        assert sheet.mode == ("RGBA" if channels == 4 else "RGB")


def test_pictures_need_a_model_with_their_channels(tmp_path, capsys):
    saved(tmp_path / "model", dataclasses.replace(TINY, image_size=8, image_channels=6))
    pictures(tmp_path / "in", "RGB", count=1)
    said = failed(capsys, main_edit, "stroke", tmp_path / "in" / "0.png", "--checkpoint", tmp_path / "model")
    assert "got 6 channels: use Model.edit in Python" in said


def saved(path, network):
    """A native checkpoint with random weights."""
    Model(ModelConfig(network, ConsistencyPreconditioning(), num_levels=18), random_params(network)).save(path)
