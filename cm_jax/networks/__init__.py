"""Networks: frozen dataclasses whose `predict` is a pure function."""

from cm_jax.networks.adm_unet import ADMUNet
from cm_jax.networks.edm2_unet import EDM2UNet
from cm_jax.networks.song_unet import SongUNet

AnyNetwork = ADMUNet | EDM2UNet | SongUNet
