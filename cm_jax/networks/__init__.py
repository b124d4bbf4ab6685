"""Networks: frozen dataclasses whose `predict` is a pure function."""

from cm_jax.networks.adm_unet import ADMUNet
from cm_jax.networks.song_unet import SongUNet
