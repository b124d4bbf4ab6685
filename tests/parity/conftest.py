"""Parity tests compile with all optimizations."""

import pytest


@pytest.fixture(autouse=True)
def _all_optimizations(optimized):
    """See tests/conftest.py."""
