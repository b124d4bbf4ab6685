"""Image editing without training (CM, section 6): inpainting, colorization, super-resolution, SDEdit, interpolation.

An operator, an orthogonal projection of image space, defines the known part of an image; the model generates the rest.
"""

from cm_jax.editing.algorithm import EDIT_STEPS, check_images, edit, edit_batches, edited_denoiser, variant_keys
from cm_jax.editing.interpolation import blend, slerp, slerp_batches
from cm_jax.editing.operators import Luma, Mask, Noisy, Operator, PatchMean, Strokes, stroke_sigmas

__all__ = [
    "EDIT_STEPS",
    "Luma",
    "Mask",
    "Noisy",
    "Operator",
    "PatchMean",
    "Strokes",
    "blend",
    "check_images",
    "edit",
    "edit_batches",
    "edited_denoiser",
    "slerp",
    "slerp_batches",
    "stroke_sigmas",
    "variant_keys",
]
