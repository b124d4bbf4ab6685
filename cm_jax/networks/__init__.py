"""Networks: frozen dataclasses whose `predict` is a pure function. The only folder that imports Flax."""

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Key

from cm_jax.arrays import Images, Keys, Labels, Params
from cm_jax.networks.adm_unet import ADMUNet
from cm_jax.networks.precision import Precision
from cm_jax.networks.song_unet import SongUNet

__all__ = ["ADMUNet", "Network", "SongUNet"]


@runtime_checkable
class Network(Protocol):
    """What the rest of the library sees of a network; hashable, so that it can be a static argument of jit."""

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    @property
    def classes(self) -> int | None: ...

    def predict(
        self,
        params: Params,
        x: Images,
        c_noise: Float[Array, " b"],
        labels: Labels | None = None,
        dropout_keys: Keys | None = None,
        length: Float[Array, " b"] | None = None,
    ) -> Images: ...

    def check_input(self, shape: tuple[int, ...], labelled: bool) -> None: ...

    def shapes(self) -> Params: ...

    def initialise(self, key: Key[Array, ""]) -> Params: ...

    def prepare(self, params: Params) -> Params: ...

    def at_precision(self, precision: Precision) -> "Network": ...
