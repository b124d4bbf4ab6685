"""Runs that start from the weights of another run: other classes, another image size, inherited network and data."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cm_jax
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.cli.train import inheriting
from cm_jax.conversion import Source
from cm_jax.data import EmojiData, NpzData
from cm_jax.diffusion.preconditioning import EDMPreconditioning
from cm_jax.errors import InputError
from cm_jax.networks import ADMUNet, EDM2UNet, SongUNet
from cm_jax.presets import PRESETS
from cm_jax.training.config import TrainConfig
from cm_jax.training.inheritance import inherited_network
from cm_jax.training.initial_weights import initial_params, transfer_notes
from cm_jax.training.loop import train
from cm_jax.training.optimizers import Adam, ConstantRate
from cm_jax.training.setup import prepare
from tests.runs.test_training import SMALL, UNET, arrays
from tests.runs.test_training_setup import STUDENT
from tests.support import random_params

pytestmark = pytest.mark.usefixtures("without_pictures")
SIZES = {"image_size": 8, "base_channels": 32, "channel_mult": (1,), "blocks_per_level": 1, "attention_factors": ()}
NETWORKS = {
    "table": SongUNet(**SIZES, classes=4),
    "linear": SongUNet(**SIZES, classes=4, label_embedding="linear"),
    "adm": ADMUNet(**SIZES, classes=4, head_dim=16),
    "edm2": EDM2UNet(**SIZES, classes=4),
}
NAMES = ("ant", "bee", "cat", "dog")
TIMES = jnp.linspace(-1, 1, 3)


def transferred(network, other, names):
    """(parameters of `network`, of `other` initialized from it, notes)."""
    config = ModelConfig(network, EDMPreconditioning(), class_names=NAMES if network.classes else ())
    source = Source(Path("checkpoint"), config, jax.tree.map(np.asarray, random_params(network)))
    params = initial_params(source, other, names, jax.random.key(0))
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, other.shapes())
    return source.params, params, transfer_notes(source, other, names)


def embedded(network, params, label):
    """Embeddings of three times and a label."""
    labels = None if label is None else jnp.full(3, label, jnp.int32)
    return network.embedder().apply({"params": jax.tree.map(jnp.asarray, params["embedding"])}, TIMES, labels, None)


@pytest.mark.parametrize("kind", NETWORKS)
def test_classes_with_the_same_name_keep_their_embedding(kind):
    network = NETWORKS[kind]
    other, names = dataclasses.replace(network, classes=3), ("dog", "cow", "bee")
    before, after, (note,) = transferred(network, other, names)
    bound = 0.3 if kind == "edm2" else 1e-5  # EDM2 divides by the norm over all classes
    for new, old in ((0, 3), (2, 1)):
        found, expected = embedded(other, after, new), embedded(network, before, old)
        assert np.abs(found - expected).max() < bound * np.abs(expected).max()
    assert "Of the embeddings of 3 classes, 2 are those of checkpoint (dog, bee)" in note
    assert np.abs(embedded(other, after, 1) - embedded(other, after, 0)).max() > 0.01
    exact, _, notes = transferred(network, network, NAMES)
    assert jax.tree.all(jax.tree.map(np.array_equal, exact, transferred(network, network, NAMES)[1]))
    assert not notes
    turned = transferred(network, network, NAMES[::-1])[1]
    np.testing.assert_allclose(embedded(network, turned, 0), embedded(network, exact, 3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["table", "linear", "adm"])
def test_without_classes_and_back_the_network_starts_as_the_unconditional_one(kind):
    network = NETWORKS[kind]
    unconditional = dataclasses.replace(network, classes=None)
    before, after, (note,) = transferred(network, unconditional, ())
    expected = embedded(network, before, 4)  # the label of no class
    np.testing.assert_allclose(embedded(unconditional, after, None), expected, rtol=1e-4, atol=1e-5)
    assert "4 classes is dropped" in note
    before, after, (note,) = transferred(unconditional, network, NAMES)
    for label in (0, 3):
        np.testing.assert_array_equal(embedded(network, after, label), embedded(unconditional, before, None))
    assert "was unconditional" in note


def test_edm2_networks_gain_and_lose_classes():
    network = NETWORKS["edm2"]
    unconditional = dataclasses.replace(network, classes=None)
    assert "dropped" in transferred(network, unconditional, ())[2][0]
    assert "at random" in transferred(unconditional, network, NAMES)[2][0]


def test_a_table_becomes_a_linear_embedding():
    before, after, _ = transferred(NETWORKS["linear"], NETWORKS["table"], NAMES)
    pairs = ((embedded(NETWORKS["table"], after, i), embedded(NETWORKS["linear"], before, i)) for i in range(4))
    for found, expected in pairs:
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def three_classes(folder):
    """An .npz file of emoji in two of the classes of EmojiData and in a new one, at 16 pixels."""
    data = EmojiData().open(16)
    chosen = np.flatnonzero(data.labels < 3)[:90]
    names = [data.class_names[1], "Something else", data.class_names[0]]
    labels = np.array([2, 0, 1])[data.labels[chosen]]
    np.savez(folder / "three.npz", images=data.images[chosen], labels=labels, class_names=names)
    return NpzData(str(folder / "three.npz"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a U-Net's run of one batch."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    train(dataclasses.replace(SMALL, network=UNET, images=8), folder, lambda line: None)
    return folder


def test_fine_tuning_on_other_classes_at_another_size(teacher, tmp_path):
    folder, said = teacher, []
    settings = dataclasses.replace(
        SMALL,
        network=dataclasses.replace(UNET, image_size=16, base_channels=64, dropout=0.0),
        data=three_classes(tmp_path),
        init_from=str(folder),
        inherit_network=True,
        network_fields=("image_size",),
        optimizer=Adam(ConstantRate(1e-9)),
        images=8,
    )
    train(settings, tmp_path / "run", said.append)
    assert any("2 are those of" in line and "1 start at random" in line for line in said)
    assert any("8x8 pixels and is trained on 16x16" in line for line in said)
    model = cm_jax.load(tmp_path / "run")
    assert model.config.class_names[1] == "Something else"
    assert model.config.network == dataclasses.replace(UNET, image_size=16, classes=3, dropout=0.0)
    table, before = (
        arrays(tmp_path / "run", 1)["params/embedding/table"],
        cm_jax.load(folder).params["embedding"]["table"],
    )
    np.testing.assert_allclose(table[[0, 2]], np.asarray(before)[[1, 0]], atol=1e-6)
    train(settings, tmp_path / "run", said.append)
    assert "is finished after 1 batches" in said[-1]


def test_what_is_not_of_the_data_must_fit(teacher, tmp_path):
    wide = dataclasses.replace(UNET, base_channels=32)
    with pytest.raises(InputError, match=r"base_channels: 16 in the checkpoint, 32 now"):
        prepare(dataclasses.replace(SMALL, network=wide, init_from=str(teacher)), initial=True)
    fewer = dataclasses.replace(STUDENT, teacher=str(teacher), data=three_classes(tmp_path))
    with pytest.raises(InputError, match="Student and teacher need the same images and classes"):
        prepare(dataclasses.replace(fewer, network=dataclasses.replace(UNET, dropout=0.0, classes=3)))


def test_a_student_inherits_network_and_data(teacher, tmp_path):
    folder = teacher
    preset = PRESETS["emoji32-cd"]()
    settings = inheriting(
        dataclasses.replace(preset, teacher=str(folder), data=NpzData("other.npz")), ["--teacher", "x"]
    )
    for name in (str(folder), f"{folder}/checkpoints/00000001"):
        setup = prepare(dataclasses.replace(settings, teacher=name, parallel="one"))
        assert setup.config.network == dataclasses.replace(UNET, dropout=0.0)
        assert setup.config.data == EmojiData()
        assert f"The data are those of {name}. To use others, give --data." in setup.notes


def test_a_network_of_another_family_is_noted():
    config = TrainConfig(network=NETWORKS["edm2"], init_from="run", inherit_network=True)
    config, (change, note) = inherited_network(config, NETWORKS["table"])
    assert config.network == NETWORKS["table"]
    assert "network: EDM2UNet in the preset, SongUNet now" in change
    assert "such as the learning rate, are those for EDM2UNet, and the network is SongUNet: " in note
    wider = dataclasses.replace(NETWORKS["table"], base_channels=64)
    assert len(inherited_network(config, wider)[1]) == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (True, (), True)),
        (["--network.dropout", "0.2", "--batch-size=8"], (True, (), True)),
        (["--network.channel-mult", "1", "2", "--network.no-pyramid"], (True, ("channel_mult", "pyramid"), True)),
        (["--network", "ADMUNet", "--network.head-dim=8"], (False, (), True)),
        (["--data.path=photos"], (True, (), False)),
        (["--no-inherit-network"], (False, (), True)),
    ],
)
def test_the_command_line_inherits_what_it_does_not_set(words, expected):
    found = inheriting(PRESETS["emoji32-ect"](), words)
    assert (found.inherit_network, found.network_fields, found.inherit_data) == expected
    assert inheriting(PRESETS["emoji32-edm"](), words) == PRESETS["emoji32-edm"]()
