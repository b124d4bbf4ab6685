"""Which files of a Hub repository are the checkpoint."""

import pytest

from cm_jax.checkpoints import hub

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (
            ["unet/config.json", "unet/diffusion_pytorch_model.bin"],
            ["unet/config.json", "unet/diffusion_pytorch_model.bin"],
        ),
        (
            ["config.json", "diffusion_pytorch_model.safetensors"],
            ["config.json", "diffusion_pytorch_model.safetensors"],
        ),
        (["unet/diffusion_pytorch_model.fp16.safetensors", WEIGHTS], [WEIGHTS]),
        ([WEIGHTS, WEIGHTS.replace("unet", "unet_ema")], [WEIGHTS.replace("unet", "unet_ema")]),
        (
            shards := [
                f"{WEIGHTS}.index.json",
                *(WEIGHTS.replace("model.", f"model-0000{i}-of-00002.") for i in (1, 2)),
            ],
            shards,
        ),
        (["checkpoint.pkl", "samples/grid.png", "logs/a.pt"], ["checkpoint.pkl"]),
        (["model.safetensors", "optimizer.bin", "pytorch_model.bin", "rng_state.pth"], ["model.safetensors"]),
        (["config.json", "pytorch_model.bin", "optimizer.bin"], ["config.json", "pytorch_model.bin"]),
        (["checkpoint.pt", "optimizer.pt"], ["checkpoint.pt"]),
        (
            shards := ["model.safetensors.index.json", *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2))],
            shards,
        ),
        (
            ["unet/diffusion_pytorch_model.safetensors.index.fp16.json"]
            + (shards := [WEIGHTS.replace("model.", f"model.fp16-0000{i}-of-00002.") for i in (1, 2)]),
            shards,
        ),
        (["unet/model.safetensors", "vae/model.safetensors"], ["unet/model.safetensors"]),
    ],
)
def test_the_files_of_a_checkpoint(files, chosen):
    assert hub.select([*files, ".gitattributes", "README.md"], "me/tiny") == chosen
