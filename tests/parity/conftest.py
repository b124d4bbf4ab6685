"""Numbers are compared as users compute them."""

import pytest


@pytest.fixture(autouse=True)
def _as_users_do(optimized):
    """See tests/conftest.py."""
