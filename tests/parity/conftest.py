"""Numbers are compared as users compute them."""

import pytest


@pytest.fixture(autouse=True)
def _as_users_do(optimised):
    """See tests/conftest.py."""
