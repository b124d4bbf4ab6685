"""Image editing without training (CM, section 6): inpainting, colorization, super-resolution, SDEdit, interpolation.

An operator, an orthogonal projection of image space, defines the known part of an image; the model generates the rest.
"""

from cm_jax.editing.algorithm import blend, edit, slerp
from cm_jax.editing.operators import Luma, Mask, Noisy, Operator, PatchMean, Strokes
