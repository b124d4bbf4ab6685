"""Pictures in, edits out: what is read, fitted, kept and refused."""

import struct
import zlib

import jax
import numpy as np
import pytest
from PIL import Image

from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.cli import main_edit
from cm_jax.data import on_white
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning
from cm_jax.editing import photos
from cm_jax.errors import InputError
from cm_jax.model import Model
from cm_jax.networks import ADMUNet
from tests.runs.test_commands import failed, succeeded

SMALL = ADMUNet(
    image_size=8,
    base_channels=32,
    channel_mult=(1,),
    blocks_per_level=1,
    attention_factors=(),
    head_dim=32,
    classes=None,
)

LUMA = np.array([0.2989, 0.587, 0.114])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small"
    config = ModelConfig(SMALL, ConsistencyPreconditioning(), num_levels=18)
    Model(config, SMALL.prepare(SMALL.initialize(jax.random.key(0)))).save(path)
    return path


def save(path, shape, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def test_inpainting_keeps_all_but_the_hole_to_the_bit(checkpoint, tmp_path, capsys):
    pixels = save(tmp_path / "a.png", (32, 40))
    hole = np.zeros((32, 40), np.uint8)
    hole[4:20, 8:30] = 255
    Image.fromarray(hole).save(tmp_path / "mask.png")
    said = succeeded(
        capsys, main_edit, "inpaint", tmp_path / "a.png", "--checkpoint", checkpoint, "--mask", tmp_path / "mask.png",
        "--variants", 2, "--steps", 3, "--output", tmp_path / "e.png", "--folder", tmp_path / "all",
    )  # fmt: skip
    assert "a.png: center 32 x 32 of 40 x 32 pixels, reduced from 32 to 8 pixels." in said
    assert "lie outside the center" not in said
    assert "input, known part, edits" in said
    with Image.open(tmp_path / "e.png") as sheet:
        assert sheet.size == (4 * 66 + 2, 66 + 2)
    names = sorted(path.name for path in (tmp_path / "all").iterdir())
    assert names == ["000_a_00.png", "000_a_01.png"]
    one, two = (np.asarray(Image.open(tmp_path / "all" / name)) for name in names)
    np.testing.assert_array_equal(one[hole == 0], pixels[hole == 0])
    assert (one != pixels)[hole > 0].mean() > 0.9
    assert (one != two)[hole > 0].mean() > 0.5

    succeeded(
        capsys, main_edit, "inpaint", tmp_path / "a.png", "--checkpoint", checkpoint, "--box", "8,4,30,20",
        "--variants", 1, "--steps", 3, "--output", tmp_path / "b.png", "--folder", tmp_path / "boxed",
    )  # fmt: skip
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "boxed" / names[0])), one)

    said = succeeded(
        capsys, main_edit, "inpaint", tmp_path / "a.png", "--checkpoint", checkpoint, "--box", "0,4,8,6",
        "--variants", 1, "--steps", 3, "--output", tmp_path / "b.png",
    )  # fmt: skip
    assert "a.png: 8 pixels to inpaint stay: they lie outside the center, which is edited." in said


def test_the_other_kinds_run(checkpoint, tmp_path, capsys):
    save(tmp_path / "a.png", (8, 8))
    save(tmp_path / "tiny.png", (2, 2), 1)
    told = ("--checkpoint", checkpoint, "--output", tmp_path / "e.png")
    for kind, *options in (
        ("colorize", "a.png", "--sigmas", "80"),
        ("superres", "tiny.png", "a.png", "--patch", 4, "--sigmas", "80"),
        ("stroke", "a.png", "--variants", 1),
        ("denoise", "a.png", "--sigma", 0.5, "--add"),
    ):
        paths = [tmp_path / word if str(word).endswith(".png") else word for word in options]
        assert "Each row: " in succeeded(capsys, main_edit, kind, *paths, *told)
    succeeded(
        capsys, main_edit, "superres", tmp_path / "tiny.png", *told, "--patch", 4, "--sigmas", "80",
        "--folder", tmp_path / "all",
    )  # fmt: skip
    with Image.open(tmp_path / "all" / "000_tiny_00.png") as edit:
        assert edit.size == (8, 8)
    assert "both ends" in succeeded(
        capsys, main_edit, "interpolate", tmp_path / "a.png", tmp_path / "tiny.png", *told, "--frames", 3
    )
    succeeded(capsys, main_edit, "interpolate", "--seeds", "3,8", *told, "--frames", 3)
    with Image.open(tmp_path / "e.png") as sheet:
        assert sheet.size == (3 * 66 + 2, 66 + 2)


def test_colorizing_keeps_the_brightness_of_every_pixel(checkpoint, tmp_path, capsys):
    pixels = save(tmp_path / "a.png", (24, 30))
    succeeded(
        capsys, main_edit, "colorize", tmp_path / "a.png", "--checkpoint", checkpoint, "--sigmas", "80",
        "--variants", 1, "--output", tmp_path / "e.png", "--folder", tmp_path / "all",
    )  # fmt: skip
    edit = np.asarray(Image.open(tmp_path / "all" / "000_a_00.png"))
    np.testing.assert_allclose(edit @ LUMA, pixels @ LUMA, atol=0.6)
    np.testing.assert_array_equal(edit[:, [0, 1, 2, 27, 28, 29]], pixels[:, [0, 1, 2, 27, 28, 29]])
    assert (edit != pixels)[:, 3:27].mean() > 0.9
    assert np.ptp(edit[:, 3:27], axis=-1).mean() > 1


def bomb(path, width, height):
    """A PNG of a few hundred bytes that claims its size, and has the beginning of its pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(100_000)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("width", "height"), [(141_422, 141_422), (12_000, 12_000), (9_000, 9_000)])
def test_a_picture_that_claims_gigapixels_is_refused(tmp_path, capsys, width, height):
    bomb(tmp_path / "bomb.png", width, height)
    said = failed(capsys, main_edit, "colorize", tmp_path / "bomb.png", "--output", tmp_path / "e.png")
    assert "bomb.png cannot be read as a picture" in said
    assert "pixels" in said


def test_pictures_are_turned_as_their_exif_says(tmp_path):
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    turned = photos.read(tmp_path / "a.png")
    assert turned.size == (4, 8)
    assert np.asarray(turned)[0, 0, 0] == 255
    assert np.asarray(turned)[7, 0, 0] == 0


@pytest.mark.parametrize("shape", [(8, 8), (24, 24), (20, 33), (5, 3)])
def test_there_and_back_changes_nothing_but_the_square(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    picture = Image.fromarray(pixels)
    fitted = photos.fit(picture, 8)
    assert fitted.shape == (8, 8, 3)
    left, top, right, bottom = photos.center_box(*picture.size)
    assert right - left == bottom - top == min(shape)
    black = np.asarray(photos.paste_back(picture, np.zeros((8, 8, 3), np.uint8)))
    outside = np.ones(shape, bool)
    outside[top:bottom, left:right] = False
    np.testing.assert_array_equal(black[outside], pixels[outside])
    assert not black[~outside].any()
    if shape == (8, 8):
        same = np.round((fitted + 1) * 127.5).astype(np.uint8)
        np.testing.assert_array_equal(np.asarray(photos.paste_back(picture, same)), pixels)


def test_a_hole_covers_every_pixel_that_it_touches():
    hole = np.zeros((32, 40), bool)
    hole[7, 4 + 13] = True
    touched = photos.fit_hole(hole, 8)
    assert np.argwhere(touched).tolist() == [[1, 3]]
    assert photos.fit_hole(np.ones((3, 3), bool), 8).all()


HOLE = np.zeros((12, 10), bool)
HOLE[2:7, 3:9] = True


def photo():
    return np.random.default_rng(1).integers(0, 256, (*HOLE.shape, 4), np.uint8)


def erased(value=0):
    """A copy of a picture whose hole is transparent."""
    return Image.fromarray(np.where(HOLE[..., None], [value] * 3 + [0], photo() | [0, 0, 0, 255]).astype(np.uint8))


def paint():
    return Image.fromarray(np.where(HOLE[..., None], [255] * 4, [0] * 4).astype(np.uint8))


def palette(colors, transparent=None):
    image = Image.fromarray(HOLE.astype(np.uint8))
    image.putpalette(np.ravel(colors).tolist())
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


def gray(dtype):
    """A gray copy of a picture in which one gray is transparent."""
    scale = np.iinfo(dtype).max // 255
    image = Image.fromarray(np.where(HOLE, 9, photo()[..., 0] | 16).astype(dtype) * scale)
    image.info["transparency"] = 9 * scale
    return image


MASKS = {
    "white": Image.fromarray((HOLE * 255).astype(np.uint8)),
    "0 and 1": Image.fromarray(HOLE.astype(np.uint8)),
    "one bit": Image.fromarray(HOLE),
    "two grays": Image.fromarray(np.where(HOLE, 100, 30).astype(np.uint8)),
    "16 bits": Image.fromarray((HOLE * 65535).astype(np.uint16)),
    "16 bits, 0 and 1": Image.fromarray(HOLE.astype(np.uint16)),
    "RGB": Image.fromarray(np.repeat(HOLE[..., None] * 255, 3, -1).astype(np.uint8)),
    "palette of segmentation": palette([[0, 0, 0], [128, 0, 0]]),
    "palette of black and white": palette([[0, 0, 0], [255, 255, 255]]),
    "transparent color of a palette": palette([[9, 99, 0], [99, 9, 0]], transparent=1),
    "erased, black below": erased(),
    "erased, white below": erased(255),
    "gray with transparency": erased().convert("LA"),
    "transparent gray": gray(np.uint8),
    "transparent gray of 16 bits": gray(np.uint16),
    "white paint on an empty layer": paint(),
    "black and white, opaque": Image.fromarray((HOLE * 255).astype(np.uint8)).convert("RGBA"),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_is_its_transparent_or_white_pixels_or_the_higher_of_two_values(tmp_path, name):
    MASKS[name].save(tmp_path / "mask.png", transparency=MASKS[name].info.get("transparency"))
    hole = photos.hole_from_mask(photos.read_mask(tmp_path / "mask.png"), 10, 12)
    np.testing.assert_array_equal(hole, HOLE)


def test_a_mask_with_soft_or_compressed_edges_is_cut_at_half(tmp_path):
    soft = Image.fromarray((HOLE * 255).astype(np.uint8)).resize((80, 96), Image.Resampling.BICUBIC)
    for name in ("soft.png", "soft.jpg"):
        soft.convert("RGB").save(tmp_path / name)
        hole = photos.hole_from_mask(photos.read_mask(tmp_path / name), 80, 96)
        assert (hole != HOLE.repeat(8, 0).repeat(8, 1)).mean() < 0.01
    np.testing.assert_array_equal(hole[4::8, 4::8], HOLE)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            Image.fromarray((np.arange(120).reshape(12, 10) % 4).astype(np.uint8)),
            "values 0, 1, 2, 3. Make",
        ),
        (Image.fromarray(photo()[..., :3]), "got colors of brightness"),
        (Image.fromarray(photo()[..., 0]), "got the gray values 0 to 25"),
        (Image.fromarray(np.full((12, 10), 7, np.uint8)), "got the gray values 7. Make"),
        (Image.new("RGBA", (10, 12)), "transparent everywhere"),
        (Image.new("I;16", (10, 12)), "got a black mask"),
    ],
)
def test_masks_with_other_values_are_refused_with_what_they_have(tmp_path, mask, message):
    mask.save(tmp_path / "mask.png")
    with pytest.raises(InputError, match=message):
        photos.hole_from_mask(photos.read_mask(tmp_path / "mask.png"), 10, 12)


def test_a_transparent_picture_keeps_its_transparency(tmp_path):
    pixels = photo()
    pixels[:2, :, 3], pixels[2:4, :, 3] = 0, 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    picture = photos.read(tmp_path / "a.png")
    edited = np.random.default_rng(2).integers(200, 256, (10, 10, 3), np.uint8)
    whole = photos.paste_back(picture, edited)
    after = np.asarray(whole)
    np.testing.assert_array_equal(after[..., 3], pixels[..., 3])
    np.testing.assert_array_equal(after[[0, 11]], pixels[[0, 11]])  # outside the square
    shown, alpha = np.asarray(on_white(whole))[1:11].astype(int), pixels[1:11, :, 3:].astype(int)
    reachable = 255 - edited.astype(int) <= alpha  # darker colors need more than this opacity
    assert np.abs(shown - edited)[reachable].max() <= 1

    inside = np.asarray(photos.paste_back(picture, edited, HOLE))
    np.testing.assert_array_equal(inside[~HOLE], pixels[~HOLE])
    np.testing.assert_array_equal(inside[HOLE][:, :3], edited[HOLE[1:11]])
    assert (inside[HOLE][:, 3] == 255).all()
    assert photos.decode((tmp_path / "a.png").read_bytes(), "a").mode == "RGB"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_transparent_gray_of_a_picture_stays_transparent(tmp_path, dtype):
    gray(dtype).save(tmp_path / "a.png", transparency=gray(dtype).info["transparency"])
    pixels = np.asarray(photos.read(tmp_path / "a.png"))
    np.testing.assert_array_equal(pixels[..., 3], np.where(HOLE, 0, 255))
    np.testing.assert_array_equal(pixels[~HOLE][:, 0], (photo()[..., 0] | 16)[~HOLE])


def test_an_erased_copy_is_a_mask_on_the_command_line(checkpoint, tmp_path, capsys):
    erased().save(tmp_path / "erased.png")
    said = succeeded(
        capsys, main_edit, "inpaint", tmp_path / "erased.png", "--checkpoint", checkpoint, "--mask",
        tmp_path / "erased.png", "--steps", 2, "--output", tmp_path / "e.png", "--folder", tmp_path / "all",
    )  # fmt: skip
    assert "erased.png: 30 of 120 pixels to inpaint." in said
    whole = np.asarray(Image.open(tmp_path / "all" / "000_erased_00.png"))
    np.testing.assert_array_equal(whole[~HOLE], np.asarray(erased())[~HOLE])
    assert (whole[..., 3] == 255).all()


def test_a_class_conditional_model_names_its_classes(tmp_path, capsys):
    save(tmp_path / "a.png", (8, 8))
    said = failed(capsys, main_edit, "inpaint", tmp_path / "a.png", "--box", "1,1,4,4", "--output", tmp_path / "e.png")
    assert "Expected labels in [0, 8]" in said
    assert "give labels (--labels), by number or name: 0 Smileys & Emotion; 1 People & Body; " in said
    assert said.endswith("; 8 Flags.\n")


def test_small_pictures_become_patches():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 2, 3), np.uint8)
    patches = photos.fit_patches(Image.fromarray(pixels), 8, 4)
    np.testing.assert_allclose(patches[::4, ::4], pixels / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(patches[:4, 4:], np.broadcast_to(patches[0, 7], (4, 4, 3)))


@pytest.mark.parametrize(
    ("box", "message"),
    [((0, 0, 9, 8), "left < right <= 8"), ((4, 4, 4, 8), "left < right"), ((-1, 0, 2, 2), "inside the picture")],
)
def test_boxes_outside_of_the_picture(box, message):
    with pytest.raises(InputError, match=message):
        photos.hole_from_box(box, 8, 8)


def test_requests_that_make_no_sense(checkpoint, tmp_path, capsys):
    save(tmp_path / "a.png", (8, 8))
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    Image.new("L", (9, 8)).save(tmp_path / "wide.png")
    (tmp_path / "no.png").write_bytes(b"no picture")
    (tmp_path / "half.png").write_bytes((tmp_path / "a.png").read_bytes()[:100])
    a, out = tmp_path / "a.png", ("--checkpoint", checkpoint, "--output", tmp_path / "e.png")
    for words, message in (
        ((), "Name a kind first: edit.py KIND IMAGE... [options]"),
        (("inpant", a), "Did you mean 'inpaint'?"),
        (("inpaint", a, *out), "--mask FILE or --box"),
        (("inpaint", a, "--box", "1,2,3", *out), "left,top,right,bottom"),
        (("inpaint", a, "--box", "1,2,3,x", *out), "whole numbers separated by commas"),
        (("inpaint", a, "--mask", tmp_path / "black.png", *out), "got a black mask"),
        (("inpaint", a, "--mask", tmp_path / "wide.png", *out), "8 x 8 pixels, the size of the picture; got 9 x 8"),
        (("colorize", tmp_path / "nothing.png", *out), "There is no picture"),
        (("colorize", tmp_path, *out), "There is no picture"),
        (("colorize", "/dev/zero", *out), "There is no picture"),
        (("colorize", tmp_path / "no.png", *out), "expected one of the formats"),
        (("colorize", tmp_path / "half.png", *out), "cannot be read as a picture"),
        (("colorize", a, "--labels", "1", *out), "unconditional"),
        (("colorize", a, "--variants", 0, *out), "variants must be"),
        (("colorize", a, "--output", tmp_path / "e.npz"), "must be a .png file"),
        (("superres", a, "--patch", 3, *out), "use one of 2, 4, 8"),
        (("denoise", a, *out), "--sigma FLOAT"),
        (("denoise", a, "--sigma", 0, *out), "greater than 0.002"),
        (("interpolate", a, *out), "Expected two images"),
        (("interpolate", a, a, "--seeds", "1,2", *out), "Expected two images"),
        (("colorize", *out), "Name the images to edit, 1 to 4096; got 0."),
    ):
        assert message in failed(capsys, main_edit, *words), words
    assert not (tmp_path / "e.png").exists()
