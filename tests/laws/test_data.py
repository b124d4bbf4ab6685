"""Data: every image once an epoch, batches by number, shares of hosts."""

import contextlib
import itertools

import numpy as np
import pytest

from cm_jax.data import Encoded, InMemory, Streamed, permutation
from cm_jax.data.encoded import content_hash, decode_all
from cm_jax.errors import InputError
from tests.laws.test_decoding import png


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


KINDS = [in_memory, lambda count: Streamed(Files(count), (6, 6, 3))]
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


def test_another_batch_size_continues_where_the_last_batch_ended():
    """Three batches of 8, then batches of 5 from number 3 on."""
    data = in_memory(12)
    sequence = np.concatenate([data.indices(12, 3, number) for number in range(4)])
    shifted = data.shifted(3 * 8 - 3 * 5)
    found = np.concatenate([data.indices(8, 3, k) for k in range(3)] + [shifted.indices(5, 3, k) for k in range(3, 7)])
    np.testing.assert_array_equal(found, sequence[: 24 + 20])
    np.testing.assert_array_equal(taken(shifted.batches(5, 3, start=3), 4).ravel(), sequence[24:44])


def test_the_content_hash_tells_images_and_labels_apart():
    hashes = [in_memory(count).content_hash for count in (10, 10, 11)]
    assert hashes[0] == hashes[1] != hashes[2]
    images = in_memory(10).images
    assert len({InMemory(images, labels).content_hash for labels in (None, np.arange(10) % 2, np.arange(10) % 5)}) == 3
    streamed, decoded = Streamed(Files(10), (6, 6, 3)), decode_all(Files(10), (6, 6, 3), 0)
    assert streamed.content_hash == decoded.content_hash == content_hash(Files(10))
    assert content_hash(Files(10, damaged=[9])) != content_hash(Files(10)) != content_hash(Files(9))


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


class Numbered(Files):
    """Files that record who reads them; the label is the number of the image."""

    classes = 5000
    class_names = ()

    def __init__(self):
        super().__init__(1)
        self.reads = []

    def __len__(self):
        return self.classes

    def read(self, index):
        self.reads.append(index)
        return self.files[0], index


def test_64_hosts_read_every_image_once_an_epoch():
    """256 chips: a batch of 2048 images, 32 for each host, of a data set that batches do not divide."""
    hosts, batch_size, count = 64, 2048, 5
    seen = np.zeros((count, hosts, batch_size // hosts), int)
    for host in range(hosts):
        files = Numbered()
        data = Streamed(files, (6, 6, 3))
        files.reads.clear()  # every host reads up to 1,000 images for the content hash
        with contextlib.closing(data.batches(batch_size, 7, host=host, hosts=hosts)) as batches:
            for number in range(count):
                seen[number, host] = next(batches).labels
        own = [data.indices(batch_size, 7, number).reshape(hosts, -1)[host] for number in range(count + 64)]
        assert set(files.reads) <= set(np.concatenate(own).tolist())  # its share, some of it in advance
        assert len(files.reads) <= batch_size // hosts * (count + 40)
    first, second = seen.ravel()[:5000], seen.ravel()[5000:10_000]
    for epoch in (first, second):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(5000))
    assert (first != second).any()


def test_an_image_that_cannot_be_read_is_replaced_by_the_next_wherever_one_starts(caplog):
    data = Streamed(Files(10, damaged=[3, 4, 9]), (6, 6, 3))
    substitute = np.array([0, 1, 2, 5, 5, 5, 6, 7, 8, 0])
    expected = substitute[np.stack([data.indices(4, 0, number) for number in range(8)])]
    np.testing.assert_array_equal(taken(data.batches(4), 8), expected)
    np.testing.assert_array_equal(taken(data.batches(4, start=5), 3), expected[5:])
    assert {record.args[0].split(":")[0] for record in caplog.records} == {"file 3", "file 4", "file 9"}
    assert len(caplog.records) <= 6  # named once in each run through the data


def test_too_many_unreadable_images_end_the_stream():
    batches = Streamed(Files(10, damaged=[1, 2, 3, 8]), (6, 6, 3), max_corrupt=3).batches(10)
    with pytest.raises(
        InputError, match=r"(?s)4 images cannot be read, more than max_corrupt = 3.*file 1:.*file 8:|file 8:"
    ):
        next(batches)
    few = Streamed(Files(10, damaged=[1, 2, 3]), (6, 6, 3), max_corrupt=3).batches(10)
    assert sorted(next(few).images[:, 0, 0, 0]) == [0, 4, 4, 4, 4, 5, 6, 7, 8, 9]
    few.close()
    with pytest.raises(InputError, match="no image can be read"):
        next(Streamed(Files(2, damaged=[0, 1]), (6, 6, 3), max_corrupt=3).batches(2))


def test_an_image_of_no_class_cannot_be_used():
    class Unlabeled(Files):
        def read(self, index):
            return self.files[index], -1 if index == 2 else index % 3

    data = decode_all(Unlabeled(5), (6, 6, 3), max_corrupt=1)
    assert data.images[:, 0, 0, 0].tolist() == [0, 1, 3, 3, 4]
    with pytest.raises(InputError, match=r"file 2: expected a label in \[0, 2\], got -1"):
        decode_all(Unlabeled(5), (6, 6, 3), max_corrupt=0)


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
