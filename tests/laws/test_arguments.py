"""Arguments of the Python API: every value gives images or one clear line, and equal values give equal images."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cm_jax
from cm_jax.checkpoints import serialization
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning
from cm_jax.editing import Luma, Mask, Strokes
from cm_jax.errors import InputError
from cm_jax.model import Model
from cm_jax.samplers import Consistency, NoiseLevelArgs
from cm_jax.training.config import PeriodicEvaluation, TrainConfig
from tests.support import random_params
from tests.toy import ToyNetwork

TOY = ToyNetwork(image_size=8, dropout=0.0)
MODEL = Model(ModelConfig(TOY, ConsistencyPreconditioning(), num_levels=18), TOY.prepare(random_params(TOY)))
LEVELS = tuple(NoiseLevelArgs.__annotations__)
IMAGES = np.linspace(-1, 1, 2 * 8 * 8 * 3, dtype=np.float32).reshape(2, 8, 8, 3)
KEY = jax.random.key(3)

CALLS = {
    "denoise": {"images": IMAGES, "sigma": 1.0, "labels": 1},
    "sample": {"key": 3, "count": 2, "labels": 1, "sampler": None, "batch_size": 8, "noise": None, "sigmas": (80, 1.5)},
    "edit": {"key": 3, "images": IMAGES, "operator": Luma(), "labels": 1, "variants": 1, "batch_size": 8, "steps": 2},
    "interpolate_images": {
        "key": 3, "first": IMAGES[0], "second": IMAGES[1], "frames": 2, "labels": 1, "batch_size": 8, "sigmas": None,
    },
    "interpolate_noise": {
        "first": 3, "second": 4, "frames": 2, "labels": 1, "sampler": None, "batch_size": 8, "sigmas": (80, 1.5),
    },
}  # fmt: skip
"""Valid arguments of every method."""

ARRAYS = [
    make(np.zeros(shape), dtype)
    for shape in [(), (0,), (1,), (3,), (2, 2), (8, 8, 3), (1, 8, 8, 3), (0, 8, 8, 3), (2, 8, 8, 1), (3, 1, 8, 8, 3)]
    for make, dtype in [
        *((np.asarray, dtype) for dtype in (np.float64, np.float16, np.int64, np.uint8, bool, complex, object, "S1")),
        *((jnp.asarray, dtype) for dtype in (jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint32, bool)),
    ]
]
VALUES = [
    *(None, True, 0, 1, 2, -1, 2**33, 2**70, 10**400, 0.5, 1.0, 80.0, -0.0, float("nan"), float("inf"), 1j),
    *("", "1", "x", "heun", "a\nb", "x" * 500, b"1", bytearray(b"1"), object(), int, Luma, lambda: 0, iter([1])),
    *((), [], (1,), [2, 0], (8, 0), [0, 17], (80.0, 1.5), [80, 1, 0], [80, [1]], [80, None], ["80"], [[1, 2], [3]]),
    *([True], [float("nan")], {1: 2}, {3}, range(2), range(17, -1, -1), Luma(), Strokes(), Consistency(), IMAGES[:1]),
    *(np.int8(1), np.float32(1), np.bool_(True), np.str_("1"), np.datetime64(1, "s"), np.geomspace(80, 0.5, 4)),
    *(np.array(["1", "2"]), np.array([1, None]), np.arange(17, -1, -1), jnp.geomspace(80, 0.5, 4), jnp.arange(2)),
    *(KEY, jax.random.split(KEY, 2), jax.random.PRNGKey(0), jax.random.split(jax.random.PRNGKey(0), 2)),
    *ARRAYS,
]


def call(name, **changed):
    """Images of a method with its valid arguments, some of them changed."""
    base = CALLS[name]
    if changed.keys() & set(LEVELS):
        base = {key: value for key, value in base.items() if key not in LEVELS}
    if "seeds" in changed:
        base = {key: value for key, value in base.items() if key not in ("key", "count")}
    return getattr(MODEL, name)(**{**base, **changed})


def arguments():
    for name in CALLS:
        parameters = inspect.signature(getattr(MODEL, name)).parameters
        for parameter in (each for each in parameters if each != "progress"):
            yield from ((name, each) for each in (LEVELS if parameter == "levels" else (parameter,)))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(("name", "argument"), list(arguments()))
def test_any_value_gives_images_or_one_line(name, argument):
    accepted, refused = 0, []
    for value in VALUES:
        try:
            images = call(name, **{argument: value})
        except InputError as error:
            refused.append(str(error))
        else:
            accepted += 1
            assert images.dtype == np.float32, value
            assert len(images) >= 1
            assert images.shape[1:] == (8, 8, 3)
            assert np.isfinite(images).all()
    assert not [message for message in refused if "\n" in message or len(message) > 400]
    assert accepted or argument == "noise" or (name, argument) in {("denoise", "labels")}


EQUAL = [
    (
        "sample",
        "key",
        [3, np.int64(3), np.uint8(3), np.array(3), jnp.int32(3), jnp.uint32(3), KEY, jax.random.PRNGKey(3)],
    ),
    (
        "sample",
        "seeds",
        [
            *([3, 8], (3, 8), np.array([3, 8]), jnp.array([3, 8]), [KEY, np.int8(8)], [jax.random.PRNGKey(3), 8]),
            *(jnp.stack([KEY, jax.random.key(8)]), jnp.stack([jax.random.PRNGKey(3), jax.random.PRNGKey(8)])),
        ],
    ),
    ("sample", "count", [2, np.int16(2), np.array(2), jnp.int32(2)]),
    ("sample", "labels", [1, "1", [1, 1], (1, 1), np.int8(1), np.array([1]), jnp.ones(2, int), np.str_("1"), ["1", 1]]),
    (
        "sample",
        "sigmas",
        [
            *((80, 1.5), [80.0, 1.5], np.array([80, 1.5]), jnp.array([80, 1.5]), np.array([80, 1.5], np.float16)),
            *(
                [jnp.float32(80), np.float64(1.5)],
                (80, 1.5, 0),
                (80, 1.5, 0.0),
                (80, 1.5, 0.002),
                np.array([80, 1.5, 0]),
            ),
        ],
    ),
    (
        "sample",
        "timesteps",
        [(8, 0), [8, 0], np.array([8, 0]), jnp.array([8, 0], jnp.uint8), [np.int8(8), jnp.int32(0)]],
    ),
    ("sample", "indices", [(0, 8, 17), np.array([0, 8, 17]), jnp.array([0, 8, 17])]),
    ("sample", "steps", [2, np.int8(2), np.array(2), jnp.int32(2)]),
    ("sample", "batch_size", [8, np.int64(8), jnp.int32(8)]),
    ("edit", "images", [IMAGES, jnp.asarray(IMAGES), IMAGES.tolist(), IMAGES.astype(np.float64), list(IMAGES)]),
    ("interpolate_images", "first", [IMAGES[0], jnp.asarray(IMAGES[0]), IMAGES[0].tolist()]),
    ("interpolate_images", "sigmas", [(2.0, 0.5), np.array([2, 0.5]), jnp.array([2, 0.5]), (2, 0.5, 0)]),
    ("interpolate_noise", "first", [3, np.int64(3), KEY]),
    ("denoise", "images", [IMAGES, jnp.asarray(IMAGES), IMAGES.tolist(), IMAGES.astype(np.float64)]),
    ("denoise", "sigma", [2, 2.0, np.float64(2), np.array([2, 2]), jnp.float32(2), [2, 2.0]]),
]


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("name", "argument", "values"), EQUAL, ids=[f"{name}-{argument}" for name, argument, _ in EQUAL]
)
def test_equal_values_of_other_types_give_the_same_images(name, argument, values):
    expected, *others = (np.asarray(call(name, **{argument: value})) for value in values)
    for value, images in zip(values[1:], others, strict=True):
        np.testing.assert_array_equal(images, expected, err_msg=repr(value))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("denoise", {"images": (IMAGES * 127).astype(np.uint8)}, "got uint8; use images / 127.5 - 1"),
        ("denoise", {"images": IMAGES.astype(int)}, "got int64"),
        ("edit", {"images": jnp.zeros((1, 8, 8, 3), jnp.uint8)}, "got uint8; use images / 127.5 - 1"),
        ("denoise", {"images": IMAGES[:0]}, r"at least one image, got shape \[0, 8, 8, 3\]"),
        ("edit", {"images": IMAGES[:0]}, r"at least one image, got shape \[0, 8, 8, 3\]"),
        ("sample", {"count": 0}, "count must be a whole number from 1"),
        ("sample", {"key": jax.random.split(KEY, 2)}, r"one seed or one key, got key<fry> \[2\]"),
        ("interpolate_noise", {"second": jax.random.split(KEY, 2)}, "one seed or one key"),
        ("sample", {"steps": (2,)}, r"steps must be a whole number from 1 to 10000, got \(2,\)"),
        ("sample", {"sigmas": (0,)}, "greater than 0.002"),
        ("sample", {"sigmas": (80, 0, 0)}, "greater than 0.002"),
        ("sample", {"sigmas": "80,1"}, "sigmas must be an array of numbers, got '80,1'"),
        ("sample", {"step": 2}, "no argument 'step'. Did you mean 'steps'"),
        ("edit", {"operator": "inpaint"}, "an operator of cm_jax.editing"),
        ("interpolate_images", {"first": IMAGES[0, :4]}, r"the same shape, got \[4, 8, 3\] and \[8, 8, 3\]"),
    ],
)
def test_what_is_refused_is_named(name, changed, message):
    with pytest.raises(InputError, match=message):
        call(name, **changed)


@pytest.mark.usefixtures("unchecked_types")
def test_a_mask_that_is_no_array_is_refused():
    with pytest.raises(InputError, match="Expected a bool mask"):
        Mask([[True]])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TrainConfig(ema_decay=0.999), "ema_decay must be a list, got 0.999"),
        (lambda: TrainConfig(flip="no"), 'flip must be true or false, got "no"'),
        (lambda: TrainConfig(data="emoji"), "data must be EmojiData or .*, got 'emoji'"),
        (lambda: PeriodicEvaluation(steps=2), "steps must be a list, got 2"),
        (lambda: PeriodicEvaluation(metrics="fid"), 'metrics must be a list, got "fid"'),
        (lambda: cm_jax.load(None), "the path or the name of a checkpoint, got None"),
        (lambda: cm_jax.load(5), "the path or the name of a checkpoint, got 5"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_settings_of_the_wrong_type_are_named(build, message):
    with pytest.raises(InputError, match=message):
        build()


def test_numbers_of_numpy_are_settings():
    config = TrainConfig(batch_size=np.int64(4), ema_decay=(np.float64(0.9),))
    assert serialization.encode(config)["batch_size"] == 4
