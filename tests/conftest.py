"""Shared by all tests: where things are, and Triton's interpreter where there is no GPU."""

import os
import sys
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


@pytest.fixture
def fake_mnist(monkeypatch):
    """Give a chapter's module, and those beside it, real digits in place of MNIST: 1797 of 8x8 pixels, enlarged."""

    def replace(module) -> None:
        from noise2tokens import images as images_of
        from noise2tokens.images import digits

        images, labels = digits()
        images = torch.nn.functional.interpolate(images[:, None] * 255 / 16, 28, mode="bilinear")
        images = images[:, 0].round().to(torch.uint8)

        def mnist(train: bool):
            part = slice(None, 1400) if train else slice(1400, None)
            return images[part], labels[part]

        package = module.__name__.rpartition(".")[0]
        for name, one in list(sys.modules.items()):
            if name.rpartition(".")[0] == package and "mnist" in vars(one) and one is not images_of:
                monkeypatch.setattr(one, "mnist", mnist)

    return replace
