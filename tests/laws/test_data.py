"""Data: every image once an epoch, batches by number, shares of hosts, and OpenAI's center crop."""

import hashlib
import io
import itertools
import zlib

import numpy as np
import pytest
from PIL import Image

from cm_jax.data import EmojiData, Encoded, InMemory, Streamed, center_crop, decode, permutation
from cm_jax.data.encoded import decode_all
from cm_jax.data.npz import bundled_emoji
from cm_jax.errors import InputError
from tools import build_emoji32


def png(pixels, format="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


class Files(Encoded):
    """PNG files in memory, image i all of gray level i; some of them may be damaged."""

    place = "files"
    classes = 3
    class_names = ("a", "b", "c")

    def __init__(self, count, damaged=()):
        self.files = [png(np.full((6, 6, 3), index, np.uint8)) for index in range(count)]
        for index in damaged:
            self.files[index] = self.files[index][:40]

    def __len__(self):
        return len(self.files)

    def name(self, index):
        return f"file {index}"

    def read(self, index):
        return self.files[index], index % 3


def in_memory(count):
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 6, 6, 3)).copy()
    return InMemory(images, np.arange(count, dtype=np.int32) % 3, class_names=("a", "b", "c"))


KINDS = [in_memory, lambda count: Streamed(Files(count), 6)]
kinds = pytest.mark.parametrize("kind", KINDS, ids=["in memory", "streamed"])


def taken(batches, count):
    """The numbers of the images in `count` batches."""
    rows = [batch.images[:, 0, 0, 0] for batch in itertools.islice(batches, count)]
    batches.close()
    return np.stack(rows)


@pytest.mark.parametrize(("size", "batch_size"), [(12, 5), (7, 7), (7, 16), (5, 1), (1, 4), (100, 64)])
def test_every_image_comes_once_an_epoch(size, batch_size):
    data = in_memory(size)
    epochs = 5
    count = -(-epochs * size // batch_size)
    row = np.concatenate([data.indices(batch_size, 3, number) for number in range(count)])
    epochs = row[: epochs * size].reshape(epochs, size)
    assert (np.sort(epochs) == np.arange(size)).all()
    if size > 5:
        assert len({tuple(epoch) for epoch in epochs}) == 5
        assert not (row[:size] == data.indices(size, 4, 0)).all()


def test_the_order_of_an_epoch_is_near_uniform():
    """Each image in each place equally often: chi-squared of 8 x 8 counts, 49 degrees of freedom."""
    counts = np.zeros((8, 8))
    for epoch in range(4000):
        counts[np.arange(8), permutation(8, 0, epoch)] += 1
    chi_squared = ((counts - 500) ** 2 / 500).sum()
    assert 20 < chi_squared < 95


def test_the_order_never_changes():
    """Saved runs resume with other versions of cm_jax and NumPy."""
    assert permutation(10, 0, 0).tolist() == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]
    assert permutation(10, 7, 123).tolist() == [5, 0, 4, 2, 7, 3, 8, 1, 6, 9]


@kinds
def test_batches_hold_the_images_of_their_indices(kind):
    data = kind(10)
    batches = data.batches(4, seed=5, start=1)
    for number in range(1, 7):
        images, labels = next(batches)
        chosen = data.indices(4, 5, number)
        np.testing.assert_array_equal(images, np.broadcast_to(chosen[:, None, None, None], images.shape))
        np.testing.assert_array_equal(labels, chosen % 3)
        assert images.dtype == np.uint8
        assert labels.dtype == np.int32
    batches.close()


@kinds
def test_a_batch_is_the_same_wherever_one_starts(kind):
    data = kind(10)
    through = taken(data.batches(4, seed=1), 9)
    for start in (1, 2, 5, 8):
        np.testing.assert_array_equal(taken(data.batches(4, seed=1, start=start), 9 - start), through[start:])


@kinds
@pytest.mark.parametrize("hosts", [1, 2, 3, 6])
def test_shares_of_hosts_make_up_the_batch(kind, hosts):
    data = kind(10)
    whole = taken(data.batches(6, seed=2, start=3), 4)
    shares = [taken(data.batches(6, seed=2, start=3, host=host, hosts=hosts), 4) for host in range(hosts)]
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), whole)


def test_an_image_that_cannot_be_read_is_replaced_by_the_next_wherever_one_starts(caplog):
    data = Streamed(Files(10, damaged=[3, 4, 9]), 6)
    substitute = np.array([0, 1, 2, 5, 5, 5, 6, 7, 8, 0])
    expected = substitute[np.stack([data.indices(4, 0, number) for number in range(8)])]
    np.testing.assert_array_equal(taken(data.batches(4), 8), expected)
    np.testing.assert_array_equal(taken(data.batches(4, start=5), 3), expected[5:])
    assert {record.args[0].split(":")[0] for record in caplog.records} == {"file 3", "file 4", "file 9"}
    assert len(caplog.records) <= 6  # named once in each run through the data


def test_too_many_unreadable_images_end_the_stream():
    batches = Streamed(Files(10, damaged=[1, 2, 3, 8]), 6, max_corrupt=3).batches(10)
    with pytest.raises(
        InputError, match=r"(?s)4 images cannot be read, more than max_corrupt = 3.*file 1:.*file 8:|file 8:"
    ):
        next(batches)
    few = Streamed(Files(10, damaged=[1, 2, 3]), 6, max_corrupt=3).batches(10)
    assert sorted(next(few).images[:, 0, 0, 0]) == [0, 4, 4, 4, 4, 5, 6, 7, 8, 9]
    few.close()
    with pytest.raises(InputError, match="no image can be read"):
        next(Streamed(Files(2, damaged=[0, 1]), 6, max_corrupt=3).batches(2))


def test_an_image_of_no_class_cannot_be_used():
    class Unlabeled(Files):
        def read(self, index):
            return self.files[index], -1 if index == 2 else index % 3

    data = decode_all(Unlabeled(5), 6, max_corrupt=1)
    assert data.images[:, 0, 0, 0].tolist() == [0, 1, 3, 4]
    with pytest.raises(InputError, match=r"file 2: expected a label in \[0, 2\], got -1"):
        decode_all(Unlabeled(5), 6, max_corrupt=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch size must be"),
        ({"batch_size": 6, "hosts": 4}, "Batch size 6 is not divisible by 4 hosts; use 8"),
        ({"batch_size": 6, "seed": -1}, "seed must be"),
        ({"batch_size": 6, "start": -1}, "first batch must be"),
        ({"batch_size": 6, "host": 2, "hosts": 2}, "this host must be"),
    ],
)
def test_batches_that_cannot_be(arguments, message):
    with pytest.raises(InputError, match=message):
        in_memory(3).batches(**arguments)


@pytest.mark.parametrize(
    ("images", "labels", "options", "message"),
    [
        (np.zeros((0, 4, 4, 3), np.uint8), None, {}, "no images"),
        (np.zeros((3, 4, 4, 3), np.uint8), np.zeros(2, int), {}, "got 2 labels for 3 images"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.array([0, -1]), {}, "from -1 to 0"),
        (
            np.zeros((2, 4, 4, 3), np.uint8),
            np.array([0, 2]),
            {"class_names": ("a", "b")},
            r"expected labels in \[0, 1\]",
        ),
        (np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 10**9]), {}, "highest label must be"),
    ],
)
def test_arrays_that_do_not_belong_together(images, labels, options, message):
    with pytest.raises(InputError, match=message):
        InMemory(images, labels, **options)


def test_what_a_data_set_says_of_itself():
    data = InMemory(np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 4]))
    assert (data.size, data.image_shape, data.classes, data.class_names) == (2, (4, 4, 3), 5, ())
    assert data.description == "an array: 2 images of 4 pixels, 5 classes, in memory (0 MB)"
    assert InMemory(np.zeros((2, 4, 4, 3), np.uint8)).classes is None


# The bundled emoji


def test_the_bundled_emoji_are_those_that_were_built():
    arrays = bundled_emoji()
    assert hashlib.sha256(arrays["images"].tobytes()).hexdigest() == (
        "d1ae8c1b3ec4bfa3523d6ad420b1ea9be3504fdcca8ff39e21615a53638d2388"
    )
    assert arrays["images"].shape == (3765, 32, 32, 3)
    assert np.bincount(arrays["labels"]).tolist() == [338, 741, 318, 262, 436, 170, 528, 448, 524]
    assert np.bincount(arrays["vendor"]).tolist() == [1892, 1873]
    assert len(arrays["class_names"]) == 9
    assert len(np.unique(arrays["images"].reshape(3765, -1), axis=0)) == 3765


def test_how_the_bundled_emoji_were_built(tmp_path):
    """Skin tones and images that are the same when halved are left out; the mean of four pixels, halves up."""
    images = np.zeros((4, 64, 64, 3), np.uint8)
    images[0, :2, :2, 0] = [[1, 2], [3, 4]]
    images[1, :2, :2, 0] = [[4, 3], [2, 1]]
    images[3, 0, 0, 1] = 1
    source = tmp_path / "emoji64.npz"
    arrays = {"labels": np.arange(4), "vendor": np.arange(4) % 2, "label_names": np.array(["a", "b", "c", "d"])}
    arrays |= {"is_base": np.array([True, True, False, True]), "unified": np.array(["1F600"] * 4)}
    np.savez(source, images=images, **arrays)
    built = build_emoji32.build(source)
    assert built["labels"].tolist() == [0, 3]
    assert built["images"][:, 0, 0].tolist() == [[3, 0, 0], [0, 0, 0]]
    assert not built["images"][:, 1:].any()


def test_no_emoji_is_in_both_splits():
    arrays = bundled_emoji()
    held_out = set(arrays["unified"][arrays["held_out"]])
    trained = set(arrays["unified"][~arrays["held_out"]])
    assert not held_out & trained
    assert 0.08 < len(held_out) / len(held_out | trained) < 0.13
    last_digit = {code: int(hashlib.sha256(code.encode()).hexdigest(), 16) % 10 for code in held_out | trained}
    assert held_out == {code for code, digit in last_digit.items() if digit == 0}


def test_emoji_splits_open_at_their_sizes():
    train, held_out, every = (EmojiData(split).open(32) for split in ("train", "held_out", "all"))
    assert (train.size, held_out.size, every.size) == (3334, 431, 3765)
    assert set(held_out.labels) == set(range(9))
    rows = {image.tobytes() for image in train.images}
    assert not any(image.tobytes() in rows for image in held_out.images)
    assert train.class_names[8] == "Flags"
    small = EmojiData("held_out").open(16)
    assert small.images.shape == (431, 16, 16, 3)
    mean = held_out.images.reshape(431, 16, 2, 16, 2, 3).mean(axis=(2, 4))
    assert np.abs(small.images - mean).max() <= 1  # two roundings
    with pytest.raises(InputError, match="from 1 to 32, got 64"):
        EmojiData().open(64)


# Pixels


def resampled(pixels, shape, kernel, reach):
    """Rows of weights times the pixels, along the width and then along the height, 8 bits after each."""
    for axis in (1, 0):
        count = pixels.shape[axis]
        ratio = count / shape[axis]
        width = max(ratio, 1)
        center = (np.arange(shape[axis])[:, None] + 0.5) * ratio
        taps = np.arange(count)
        inside = (taps >= np.floor(center - reach * width + 0.5)) & (taps < np.floor(center + reach * width + 0.5))
        weights = np.where(inside, kernel((taps - center + 0.5) * (1 / width)), 0)
        weights /= weights.sum(axis=1, keepdims=True)
        product = np.moveaxis(np.tensordot(weights, pixels, (1, axis)), 0, axis)
        pixels = np.clip(np.floor(product + 0.5), 0, 255)
    return pixels


def box(x):
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def bicubic(x):
    """Keys' cubic with a = -1/2."""
    x = np.abs(x)
    inner = 1.5 * x**3 - 2.5 * x**2 + 1
    return np.where(x < 1, inner, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0.0))


@pytest.mark.parametrize("seed", range(12))
def test_centre_crop_is_halvings_a_bicubic_and_a_cut(seed):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(6, 20))
    height, width = rng.integers(size // 2, 7 * size, 2)
    pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    ours = np.asarray(center_crop(Image.fromarray(pixels), size))

    expected = pixels
    while min(expected.shape[:2]) >= 2 * size:
        expected = resampled(expected, (expected.shape[0] // 2, expected.shape[1] // 2), box, 0.5)
    height, width = expected.shape[:2]
    scale = size / min(height, width)
    expected = resampled(expected, (round(height * scale), round(width * scale)), bicubic, 2)
    top, left = (np.array(expected.shape[:2]) - size) // 2
    expected = expected[top : top + size, left : left + size]
    assert ours.shape == (size, size, 3)
    assert np.abs(ours - expected).max() <= 2  # a tie rounded otherwise, magnified by the next filter


def test_centre_crop_leaves_a_square_of_its_size_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3)).astype(np.uint8)
    np.testing.assert_array_equal(center_crop(Image.fromarray(pixels), 9), pixels)
    wide = np.concatenate([np.zeros((9, 3, 3), np.uint8), pixels, np.zeros((9, 4, 3), np.uint8)], axis=1)
    np.testing.assert_array_equal(center_crop(Image.fromarray(wide), 9), pixels)  # floor of 3.5 columns cut at the left


def test_decoding_turns_an_image_as_its_exif_says():
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0, 0] = 255
    for orientation, corner in [(1, (0, 0)), (2, (0, 5)), (3, (3, 5)), (4, (3, 0))]:
        exif = Image.Exif()
        exif[0x0112] = orientation
        image, _ = decode(png(pixels, exif=exif), 4)
        full = np.zeros((4, 6))
        full[corner] = 255
        np.testing.assert_array_equal(image[..., 0], full[:, 1:5])
    exif = Image.Exif()
    exif[0x0112] = 6
    image, _ = decode(png(pixels[:, :4], exif=exif), 4)
    assert image[0, 3, 0] == 255


def test_damaged_exif_does_not_make_a_bad_image():
    pixels = np.full((4, 4, 3), 7, np.uint8)
    image, _ = decode(png(pixels, exif=b"Exif\0\0nonsense"), 4)
    np.testing.assert_array_equal(image, pixels)


def test_decoding_puts_transparency_on_white():
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0] = (200, 100, 0, 255)
    pixels[0, 1] = (200, 100, 0, 51)  # a fifth
    image, _ = decode(png(pixels), 2)
    np.testing.assert_array_equal(image[1], 255)
    np.testing.assert_array_equal(image[0, 0], (200, 100, 0))
    np.testing.assert_allclose(image[0, 1], (244, 224, 204), atol=1)
    palette = Image.fromarray(np.array([[0, 1], [1, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=1)
    image, _ = decode(file.getvalue(), 2)
    assert image.tolist() == [[[10, 20, 30], [255] * 3], [[255] * 3, [255] * 3]]


def test_decoding_other_kinds_of_pixels():
    gray = np.array([[0, 1], [128, 255]], np.uint8)
    np.testing.assert_array_equal(decode(png(gray), 2)[0], np.repeat(gray[..., None], 3, axis=2))
    deep = gray.astype(np.uint16) * 257
    for offset in (0, 100, -100):  # nearest, of 257 numbers for each
        near = np.clip(deep.astype(int) + offset, 0, 65535).astype(np.uint16)
        np.testing.assert_array_equal(decode(png(near), 2)[0], np.repeat(gray[..., None], 3, axis=2))
    file = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(file, "JPEG", quality=100)
    np.testing.assert_allclose(decode(file.getvalue(), 8)[0], np.broadcast_to([255, 0, 0], (8, 8, 3)), atol=3)
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    for format in ("GIF", "WEBP", "PNG"):
        file = io.BytesIO()
        frames[0].save(file, format, save_all=True, append_images=frames[1:], lossless=True)
        np.testing.assert_allclose(decode(file.getvalue(), 4)[0], np.broadcast_to([255, 0, 0], (4, 4, 3)), atol=3)


def test_decoding_tells_of_enlargement():
    pixels = np.zeros((4, 9, 3), np.uint8)
    assert [decode(png(pixels), size)[1] for size in (3, 4, 5)] == [False, False, True]
    assert decode(png(pixels), 5)[0].shape == (5, 5, 3)


def test_a_small_file_that_claims_many_pixels_is_refused():
    chunks = png(np.zeros((1, 1, 3), np.uint8))
    huge = chunks[:16] + (9000).to_bytes(4) + (9000).to_bytes(4) + chunks[24:]
    huge = huge[:29] + zlib.crc32(huge[12:29]).to_bytes(4) + huge[33:]
    with pytest.raises(ValueError, match="9000 x 9000 pixels"):
        decode(huge, 8)


def test_only_image_formats_are_read_whatever_a_file_is_called():
    with pytest.raises(ValueError, match="expected one of the formats BMP, GIF, JPEG, PNG, WEBP"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", 8)
