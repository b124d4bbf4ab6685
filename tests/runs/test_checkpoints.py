"""Native checkpoints: precisions, devices, damage."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import cm_jax
from cm_jax.checkpoints import native
from cm_jax.checkpoints.model_config import ModelConfig
from cm_jax.diffusion.preconditioning import ConsistencyPreconditioning
from cm_jax.errors import InputError
from cm_jax.types import leaves
from tests.support import SMALL, random_params

CONFIG = ModelConfig(
    SMALL, ConsistencyPreconditioning(), num_levels=18, class_names=tuple("abcdefghij"), tuned_timesteps=((8, 0),)
)


@pytest.fixture
def saved(tmp_path):
    params = random_params(SMALL)
    native.save(tmp_path / "model", CONFIG, params)
    return tmp_path / "model", params


def test_config_and_parameters_round_trip(saved):
    path, params = saved
    config, restored = native.restore(path)
    assert config == CONFIG
    assert all(isinstance(leaf, np.ndarray) for _, leaf in leaves(restored))
    jax.tree.map(np.testing.assert_array_equal, restored, params)
    assert json.loads((path / "config.json").read_text())["format"] == 1


def test_restore_in_another_precision_on_other_devices(saved):
    path, params = saved
    devices = NamedSharding(Mesh(np.array(jax.devices()), ("devices",)), PartitionSpec())
    _, restored = native.restore(path, dtype=jnp.bfloat16, sharding=devices)
    kernel = restored["stem"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    assert len(kernel.sharding.device_set) == 8
    np.testing.assert_array_equal(kernel, params["stem"]["kernel"].astype(jnp.bfloat16))


def test_a_model_is_saved_and_loaded(saved, tmp_path):
    path, _ = saved
    model = cm_jax.load(path)
    model.save(tmp_path / "again")
    model.save(str(tmp_path / "file.safetensors"))
    assert native.restore_file(tmp_path / "file.safetensors")[0] == model.config
    again = cm_jax.load(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    assert again.plan(steps=2).levels == model.plan(timesteps=(8, 0)).levels


def test_images_of_a_bfloat16_model_are_close(saved):
    path, _ = saved
    images = [cm_jax.load(path, precision=name).sample(0, 2) for name in ("float32", "bfloat16")]
    assert 0 < np.abs(images[0] - images[1]).max() < 0.1


def test_a_folder_with_files_in_it_is_not_overwritten(saved):
    path, params = saved
    with pytest.raises(InputError, match="files in it"):
        native.save(path, CONFIG, params)


def test_failed_writing_leaves_no_files(tmp_path):
    with pytest.raises(Exception):  # noqa: B017  the kind is that of Orbax
        native.save(tmp_path / "model", CONFIG, {"leaf": object()})
    assert not list(tmp_path.iterdir())


def damage_config(path, edit):
    fields = json.loads((path / "config.json").read_text())
    edit(fields)
    (path / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda fields: fields["network"].update(base_channels=64), "contradicts"),
        (lambda fields: fields["network"].update(classes=None), "10 class names for None classes"),
        (lambda fields: fields["network"].update(head_dim=24), "cannot be built"),
        (lambda fields: fields["network"].update(wings=2), "no field 'wings'"),
        (lambda fields: fields["network"].update(kind="Dragon"), "whose kind is ADMUNet"),
        (lambda fields: fields.pop("preconditioning"), "preconditioning must be an object"),
        (
            lambda fields: fields["preconditioning"].update(sigma_data="0.5"),
            'sigma_data must be a finite number, got "0.5"',
        ),
        (lambda fields: fields["network"].update(image_size=16.0), "image_size must be a whole number"),
        (lambda fields: fields["network"].update(attention="foo"), "attention must be one of auto, plain, cudnn"),
        (lambda fields: fields["network"].update(head_dim=0), "must be positive"),
        (lambda fields: fields["network"].update(blocks_per_level=10**7), r"blocks_per_level must lie in \[1, 64\]"),
        (lambda fields: fields["schedule"].update(rho=1e-300), "rho from 0.1"),
        (lambda fields: fields.update(tuned_timesteps=[[99, 0]]), "descend from below num_levels=18"),
        (lambda fields: fields.update(format="1"), "damaged, or of another program"),
        (lambda fields: fields.update(format=99), "upgrade cm_jax"),
        (lambda fields: fields.update(num_levels=0), "num_levels must be a whole number from 2"),
        (lambda fields: fields.update(class_names=["a"]), "1 class names for 10 classes"),
    ],
)
def test_configs_that_contradict_the_parameters_or_themselves(saved, edit, message):
    path, _ = saved
    damage_config(path, edit)
    with pytest.raises(InputError, match=message):
        cm_jax.load(path)


def test_a_config_that_is_not_json(saved):
    path, _ = saved
    (path / "config.json").write_bytes(b"\xff{")
    with pytest.raises(InputError, match="not the config"):
        cm_jax.load(path)


def test_missing_and_truncated_arrays(saved):
    path, _ = saved
    largest = max(
        (file for file in (path / "params").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size
    )
    largest.write_bytes(largest.read_bytes()[:100])
    with pytest.raises(InputError, match="damaged or incomplete"):
        cm_jax.load(path)
    shutil.rmtree(path / "params")
    (path / "params").mkdir()
    with pytest.raises(InputError, match="damaged or incomplete"):
        cm_jax.load(path)
