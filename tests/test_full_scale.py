"""Every chapter's run at long and full scale keeps one contract, and its code runs: here, on a slice of it.

What the values of a slice must be is tested in each chapter's own tests.
"""

import inspect

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure

from noise2tokens import records
from tools import inputs
from tools.records import experiment

# A budget that takes seconds, for each chapter.
SLICES: dict[str, dict] = {}


@pytest.fixture(params=inputs.chapters())
def chapter(request):
    return request.param


@pytest.fixture
def module(chapter, fake_mnist):
    module = experiment(chapter)
    fake_mnist(module)
    return module


def test_budgets_fit_the_signature(chapter, module):
    assert module.BUDGETS and set(module.BUDGETS) <= {"long", "full"}
    signature = inspect.signature(module.full_scale)
    for budget in [*module.BUDGETS.values(), SLICES[chapter]]:
        signature.bind(torch.device("cpu"), seed=0, **budget)
    sizes = [set(budget) for budget in module.BUDGETS.values()]
    assert all(names == sizes[0] for names in sizes), "long and full differ in size, not in kind"


def test_a_slice_leaves_a_record_that_its_seed_decides(chapter, module, tmp_path, monkeypatch):
    monkeypatch.setenv("NOISE2TOKENS_RECORDS", str(tmp_path))
    found = [
        records.measured(chapter, module.full_scale, {"long": SLICES[chapter]}, "long", seed)
        for seed in (0, 1)
    ]
    assert found[0].results and set(found[0].results) == set(found[1].results)
    assert all(isinstance(caption, str) and len(caption) > 10 for caption in found[0].pictures)
    if "long" in module.BUDGETS:
        assert found[0].pictures, "a generative chapter shows samples"
        assert found[0].results != found[1].results, "the seed is not used"
    assert not plt.get_fignums(), "figures were left open"


def test_pictures_are_figures(chapter, module):
    results, pictures = module.full_scale(torch.device("cpu"), seed=0, **SLICES[chapter])
    assert all(isinstance(figure, Figure) for figure in pictures.values())
    plt.close("all")
