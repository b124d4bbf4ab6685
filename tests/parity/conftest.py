"""Numbers are compared as users compute them: by programs compiled with all optimizations."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def optimised():
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
