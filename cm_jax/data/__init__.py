"""Training images: sources, and batches by number."""

from cm_jax.data.base import Batches, Data, Dataset, Generated, InMemory, RawBatch, permutation
from cm_jax.data.decoding import center_crop, decode, on_white, open_image, with_channels
from cm_jax.data.encoded import Encoded, EncodedData, Streamed
from cm_jax.data.image_folder import ImageFolder
from cm_jax.data.npz import EmojiData, NpzData
from cm_jax.data.tfds import TFDSData

AnyData = EmojiData | ImageFolder | NpzData | TFDSData | Data
