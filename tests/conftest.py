"""Eight CPU devices, and the array shapes of public functions checked at run time."""

import os

from jaxtyping import install_import_hook

import tests.typechecker  # noqa: F401  so that the hook finds it by name

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
install_import_hook("cm_jax", "tests.typechecker.checked")
