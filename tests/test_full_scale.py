"""Every chapter's run at long and full scale keeps one contract, and its code runs: here, on a slice of it.

What the values of a slice must be is tested in each chapter's own tests.
"""

import inspect

import matplotlib.pyplot as plt
import pytest
import torch

from noise2tokens import records
from tools import inputs
from tools.records import experiment

# A budget that takes seconds, for each chapter.
SLICES: dict[str, dict] = {
    "01_distribution_transforms": dict(
        steps={1: 2, 5: 2}, batch_size=8, test_images=40, test_draws=4, class_steps=2, gan_steps=2, samples=31,
        classifier_steps=2,
    ),
    "02_nice": dict(
        steps=3, batch_size=8, hidden=[16] * 2, held_out=1380, test_images=30, samples=25, classifier_steps=3
    ),
    "03_realnvp_glow": dict(
        digit_seeds=1, digit_steps=2, permutations=("conv",), steps=2, batch_size=8, depth=1, width=8, held_out=1380,
        test_images=30, samples=25, classifier_steps=2,
    ),
    "04_flow_vs_diffusion": dict(
        steps=2, batch_size=8, width=8, samples=31, scored=6, test_images=40, classifier_steps=2, counts=(1, 2),
        chain_samples=0, tolerance=1e-3,
    ),
    "05_ddim_ode": dict(
        steps=2, batch_size=8, width=8, samples=31, counts=(2, 3), test_images=40, classifier_steps=2
    ),
    "06_rectified_flow": dict(
        seeds=1, plane=dict(steps=2, more=2, student_steps=2, pairs=512), steps=2, reflow_steps=2,
        student_steps=2, batch_size=8, width=8, pairs=12, samples=41,
        test_images=60, classifier_steps=3, counts=(1, 2), tolerance=0.1,
    ),
    "07_vq_vae": dict(
        seeds=1, digit_steps=2, steps=2, batch_size=8, width=8, prior_steps=2, prior_width=16,
        prior_layers=1, samples=41, test_images=40, classifier_steps=2,
    ),
    "08_flash_attention": dict(
        lengths=(16,), dims=(8,), tokens=32, width=16, seconds=0.005, gpt2=(1, 2, 64, 16), memory_lengths=(64,),
        doubling=(16, 32), limit=1e9, sweep=(),
    ),
    "09_gradient_checkpointing": dict(
        depths=(2, 3), depth=2, width=16, heads=2, length=16, batch=1, limit=1e6, seconds=0.01
    ),
    "10_sequence_packing": dict(
        million=2000, capacity=64, batch=4, width=16, layers=1, heads=2, seeds=1, steps=2, seconds=0.01
    ),
    "11_scaling_laws": dict(
        seeds=2, layers=1, plan=((2e8, (8, 12, 16)), (3e8, (8, 12, 16)), (4e8, (8, 12, 16))), predicted=6e8,
        spoiled=0.2, grid_at=(2e8, 12), factors=(0.5, 1.0),
        held_out=20,
    ),
    "12_mla": dict(
        seeds=1, width=16, layers=1, heads=4, length=8, batch=2, steps=2, learning_rate=1e-3, windows_held_out=4,
        decode_width=16, decode_heads=4, keys=(4, 8, 16), decode_batch=1, queries=(1, 2), seconds=0.01,
    ),
    "13_moe": dict(
        width=16, layers=2, heads=2, experts=8, top_k=2, hidden=8, seeds=1, steps=2, batch=2, length=16,
        learning_rate=0.01, alpha=0.01, speed=0.01, tokens=64, seconds=0.01,
    ),
    "14_fp8": dict(
        seeds=1, steps=2, batch_size=2, length=16, width=16, layers=1, heads=2, windows_held_out=4, lengths=(64,),
    ),
    "15_deepseek_v3": dict(
        width=32, layers=2, predictions=2, seeds=1, steps=2, batch=2, length=16, count=4, prompts=1, new=4,
        seconds=0.01, learning_rate=1e-2,
    ),
    "16_muon": dict(
        seeds=2, layers=1, plan=((1e7, 8), (2e7, 8)), rates={"AdamW": (0.01,), "Muon": (0.01, 0.02)},
        batches=(1.0, 3.0), outer_rates=(0.02,), tuning_seeds=1, held_out=4, resamples=20,
    ),
    "17_kimi_vl": dict(
        seeds=1, steps=2, batch=2, rates={"Muon": ((0.01, 0.01),), "AdamW": ((0.003, 0.001),)},
        reader_steps=2,
        digits=(1, 2), heights=(42, 64), widths=(42, 64), widest=100, mnist_steps=2,
        mnist_batch=2, width=32, layers=1, n=8,
    ),
    "part1_synthesis": dict(seeds=1, steps=3, batch_size=16, pairs=64, test_points=20, samples=50),
}  # fmt: skip


@pytest.fixture(params=inputs.chapters())
def chapter(request):
    return request.param


@pytest.fixture
def module(chapter, fake_mnist):
    module = experiment(chapter)
    fake_mnist(module)
    plt.close("all")
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
