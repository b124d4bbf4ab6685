"""Networks: frozen dataclasses whose `predict` is a pure function. `BaseNetwork` is for your own."""

from cm_jax.networks.adm_unet import ADMUNet
from cm_jax.networks.base import BaseNetwork
from cm_jax.networks.edm2_unet import EDM2UNet
from cm_jax.networks.song_unet import SongUNet
from cm_jax.types import Network

BuiltInNetwork = ADMUNet | EDM2UNet | SongUNet
AnyNetwork = ADMUNet | EDM2UNet | SongUNet | Network
"""`Network` admits those of other packages; files hold registered ones."""
