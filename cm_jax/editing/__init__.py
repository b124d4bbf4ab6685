"""Editing without training: a consistency model inpaints, colours, sharpens, denoises, blends (CM, section 6).

What is known of an image is an operator, an orthogonal projection of image space; the rest is the model's to invent.
"""

from cm_jax.editing.algorithm import EDIT_STEPS, checked_images, edit, edit_all, edited, variant_keys
from cm_jax.editing.interpolation import blends, slerp, slerp_all
from cm_jax.editing.operators import Luma, Mask, Noisy, Operator, PatchMean, Strokes, stroke_sigmas

__all__ = [
    "EDIT_STEPS",
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
    "stroke_sigmas",
    "variant_keys",
]
