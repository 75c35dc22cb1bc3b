"""A tiny llama checkpoint that several tests read."""

import pytest


@pytest.fixture
def llama(tiny_folder):
    """Its folder; read only."""
    return tiny_folder("llama")
