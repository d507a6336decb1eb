"""Shared by all tests: where things are, and Triton's interpreter where there is no GPU."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

# Read by Triton when a kernel is defined, so it must be set before any test imports one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


def pytest_collection_modifyitems(items):
    """Skip the tests of compiled kernels, and say why, where there is nothing to compile for."""
    capable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    for item in items:
        if item.get_closest_marker("cuda") and not capable:
            item.add_marker(
                pytest.mark.skip(reason="needs a CUDA GPU of compute capability 8.0 or newer")
            )
