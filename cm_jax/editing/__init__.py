"""Editing without training: a consistency model inpaints, colours, sharpens, denoises, blends (CM, section 6).

What is known of an image is an operator, an orthogonal projection of image space; the rest is the model's to invent.
"""

from cm_jax.editing.editor import EDIT_STEPS, checked_images, edit, edit_all, edited, variant_keys
from cm_jax.editing.interpolation import blends, slerp, slerp_all
from cm_jax.editing.operators import STROKES, Luma, Mask, Noisy, Operator, PatchMean, Strokes

__all__ = [
    "EDIT_STEPS",
    "STROKES",
    "Luma",
    "Mask",
    "Noisy",
    "Operator",
    "PatchMean",
    "Strokes",
    "blends",
    "checked_images",
    "edit",
    "edit_all",
    "edited",
    "slerp",
    "slerp_all",
    "variant_keys",
]
