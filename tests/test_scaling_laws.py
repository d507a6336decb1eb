"""Chapter 11: counts held against PyTorch's counter and the paper's table; fits against known laws and SciPy."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import curve_fit, minimize
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from noise2tokens.scaling_laws import experiment, fits, flops, schedule
from noise2tokens.scaling_laws.fits import LossLaw
from noise2tokens.scaling_laws.flops import DEEPSEEK
from noise2tokens.transformer import Config, Decoder

# What a token costs

# Bi et al. 2024, table 3: layers, width, N1, N2, M, 6 N1 / M, 6 N2 / M.
TABLE_3 = [
    (8, 512, "25.2M", "77.6M", "352M", 0.43, 1.32),
    (12, 768, "84.9M", "164M", "963M", 0.53, 1.02),
    (24, 1024, "302M", "407M", "3.02B", 0.60, 0.81),
    (24, 2048, "1.21B", "1.42B", "9.66B", 0.75, 0.88),
    (32, 4096, "6.44B", "6.86B", "45.1B", 0.85, 0.91),
    (40, 5120, "12.6B", "13.1B", "85.6B", 0.88, 0.92),
    (80, 8192, "64.4B", "65.3B", "419B", 0.92, 0.94),
]


def rounded(number: float) -> str:
    unit = "B" if number >= 1e9 else "M"
    value = number / {"B": 1e9, "M": 1e6}[unit]
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}{unit}"


@pytest.mark.parametrize("row", TABLE_3, ids=lambda row: f"{row[0]}x{row[1]}")
def test_the_papers_table_is_what_the_formulas_give(row):
    layers, width, n1, n2, m, share1, share2 = row
    found = flops.flops_per_token(layers, width, 102_400, 4096)
    assert rounded(found.without_vocabulary / 6) == n1
    assert rounded(found.with_vocabulary / 6) == n2
    assert rounded(found.non_embedding) == m
    # One share, 0.857, is printed as 0.85.
    slack = 0.0075 if (layers, width) == (32, 4096) else 0.005
    assert found.without_vocabulary / found.non_embedding == pytest.approx(share1, abs=slack)
    assert found.with_vocabulary / found.non_embedding == pytest.approx(share2, abs=0.005)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_exact_counts_are_those_of_pytorchs_counter(kv_heads):
    """Forward and backward; the counter sees the head too, and grants every key to every query, as M does."""
    config = Config(50, 32, 3, 4, kv_heads=kv_heads, hidden=48)
    model, length, batch = Decoder(config), 24, 2
    tokens = torch.randint(50, (batch, length))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        x = model.embedding(tokens).requires_grad_()
        model.hidden(x).sum().backward()
    per_token = counter.get_total_flops() / (batch * length)
    assert per_token == flops.exact_flops(config, length)


def test_the_formula_is_exact_where_a_layer_has_twelve_width_squared():
    config = Config(10, 96, 2, 4, hidden=256)  # 8/3 of the width
    assert flops.exact_flops(config, 64) == flops.flops_per_token(2, 96, 10, 64).non_embedding


def test_counts_of_the_published_models():
    small, large = (flops.exact_flops(DEEPSEEK[name], 4096) for name in ("7B", "67B"))
    assert small == 6 * 30 * (4 * 4096**2 + 3 * 4096 * 11_008) + 12 * 30 * 4096 * 4096
    attention = 2 * 8192**2 + 2 * 8192 * 1024  # eight heads of keys and values
    assert large == 6 * 95 * (attention + 3 * 8192 * 22_016) + 12 * 95 * 8192 * 4096
    # 12 width² a layer is 15 % too many for the larger one, whose key heads are shared.
    assert flops.flops_per_token(95, 8192, 102_400, 4096).non_embedding / large == pytest.approx(
        1.15, abs=0.005
    )


def test_the_published_hyperparameters_follow_from_the_laws():
    for name, rate, batch in (("7B", 4.24e-4, 9.24e6), ("67B", 3.17e-4, 19.74e6)):
        compute = flops.exact_flops(DEEPSEEK[name], 4096) * 2e12
        assert flops.LEARNING_RATE(compute) == pytest.approx(rate, rel=0.003)
        assert flops.BATCH_TOKENS(compute) == pytest.approx(batch, rel=0.003)


def test_the_published_laws_share_a_budget_out():
    assert flops.MODEL_SCALE.exponent + flops.DATA_SCALE.exponent == pytest.approx(1, abs=1e-9)
    assert flops.MODEL_SCALE.coefficient * flops.DATA_SCALE.coefficient == pytest.approx(
        1, abs=2e-4
    )


def test_counting_says_what_is_wrong():
    with pytest.raises(ValueError, match="positive sizes"):
        flops.flops_per_token(0, 8, 10, 4)
    with pytest.raises(ValueError, match="one token or more"):
        flops.exact_flops(Config(10, 8, 1, 1), 0)


# The learning rate


def test_the_rate_rises_stays_and_falls_twice():
    values = [schedule.multi_step(step, 100, 10) for step in range(100)]
    assert values[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert values[10:80] == [1.0] * 70
    assert values[80:90] == pytest.approx([math.sqrt(0.1)] * 10)
    assert values[90:] == pytest.approx([0.1] * 10)


def test_the_schedule_is_pytorchs_own_put_together():
    def rates(make):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
        scheduler = make(optimizer)
        found = []
        for _ in range(60):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return found

    def theirs(optimizer):
        return torch.optim.lr_scheduler.ChainedScheduler(
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 5, total_iters=4),
                torch.optim.lr_scheduler.MultiStepLR(optimizer, [48, 54], gamma=math.sqrt(0.1)),
            ]
        )

    assert rates(lambda o: schedule.multi_step_schedule(o, 60, 5)) == pytest.approx(rates(theirs))


def test_a_warmup_that_is_too_long_is_refused():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    for warmup in (-1, 81):
        with pytest.raises(ValueError, match="at most 80% of 100 steps"):
            schedule.multi_step_schedule(optimizer, 100, warmup)


# Fits


def test_a_power_law_is_found_again_and_noise_is_averaged():
    x = np.geomspace(1e3, 1e9, 7)
    law = fits.fit_power_law(x, 0.3 * x**-0.125)
    assert law == pytest.approx((0.3, -0.125))
    assert law(1e12) == pytest.approx(0.3 * 1e12**-0.125)
    noisy = 2 * x**0.5 * np.exp(0.1 * np.random.default_rng(0).standard_normal(7))
    found = fits.fit_power_law(x, noisy)
    peer, _ = curve_fit(lambda u, a, b: a + b * u, np.log(x), np.log(noisy))
    assert (math.log(found.coefficient), found.exponent) == pytest.approx(tuple(peer), rel=1e-6)


def test_a_saturating_law_is_found_again_where_a_plain_one_bends():
    x = np.geomspace(1e2, 1e7, 9)
    y = 1.7 + 40 * x**-0.4
    law = fits.fit_saturating_law(x, y)
    assert law == pytest.approx((1.7, 40, -0.4), rel=1e-3)
    assert law(1e10) == pytest.approx(1.7 + 40 * 1e10**-0.4, rel=1e-3)
    plain = fits.fit_power_law(x, y)
    assert plain(1e10) < 0.8 * law(1e10)


def test_the_lowest_point_of_a_parabola():
    scales = np.geomspace(1e4, 1e6, 5)
    losses = 2.5 + 0.2 * (np.log(scales) - math.log(7e4)) ** 2
    assert fits.fit_isoflop(scales, losses) == pytest.approx((7e4, 2.5, 0.2))
    for wrong in (losses[:2], -losses + 9, 2.5 + 0.2 * (np.log(scales) - math.log(7e6)) ** 2):
        with pytest.raises(ValueError, match="three different|no optimum"):
            fits.fit_isoflop(scales[: len(wrong)], wrong)


LAW = LossLaw(0.8, 60.0, 0.34, 90.0, 0.28)


def runs(budgets=(1e10, 1e11, 1e12), count=9):
    """Runs of a known law, around its optimum."""
    found = []
    for compute in budgets:
        middle = LAW.allocation().model(compute)
        for scale in middle * np.geomspace(0.25, 4, count):
            found.append((compute, scale, compute / scale, LAW(scale, compute / scale)))
    return np.array(found).T


def test_the_optimum_of_a_law_is_where_a_minimizer_finds_it():
    for compute in (1e9, 1e15):
        law = LAW.allocation()
        found = minimize(
            lambda m, c=compute: LAW(math.exp(m[0]), c / math.exp(m[0])),
            math.log(law.model(compute)) + 0.5,
            method="Nelder-Mead",
            options=dict(xatol=1e-9, fatol=1e-15),
        )
        assert law.model(compute) == pytest.approx(math.exp(found.x[0]), rel=1e-4)
        assert law.model(compute) * law.data(compute) == pytest.approx(compute)
    # G of Hoffmann et al. is that of parameters, with 6 N D = C.
    assert LAW.allocation().model.exponent == pytest.approx(0.28 / 0.62)


def test_equal_compute_finds_the_exponents_of_the_law():
    compute, scales, _, losses = runs()
    model, data = fits.fit_allocation(compute, scales, losses)
    expected = LAW.allocation()
    assert model.exponent == pytest.approx(expected.model.exponent, abs=0.01)
    assert model.exponent + data.exponent == pytest.approx(1)
    assert model(1e11) == pytest.approx(expected.model(1e11), rel=0.05)


def test_all_runs_at_once_find_the_law():
    _, scales, tokens, losses = runs(count=5)
    found = fits.fit_loss_law(scales, tokens, losses)
    assert found == pytest.approx(LAW, rel=0.02)
    assert np.abs(found(scales, tokens) / losses - 1).max() < 1e-5
    with pytest.raises(ValueError, match="five runs"):
        fits.fit_loss_law(scales[:4], tokens[:4], losses[:4])


def test_a_band_holds_the_truth_as_often_as_it_says():
    compute, scales, _, losses = runs(count=5)
    truth = fits.fit_allocation(compute, scales, losses).model.exponent
    generator, inside = np.random.default_rng(0), 0
    for trial in range(60):
        moved = losses * (1 + 0 * losses) + 0.01 * generator.standard_normal(len(losses))
        found = fits.resampled_allocations(compute, scales, moved, 0.01, 80, trial)
        low, high = np.quantile([fit.model.exponent for fit in found], [0.1, 0.9])
        inside += low <= truth <= high
    assert 0.65 <= inside / 60 <= 0.95
    none = fits.resampled_allocations(compute, scales, losses, 0.0, 3, 0)
    assert [fit.model.exponent for fit in none] == pytest.approx([truth] * 3)


def test_fits_say_what_is_wrong():
    for wrong in (([1, 2], [1]), ([1, 2], [1, -1]), ([1, 2], [1, math.nan]), ([2, 2], [1, 3])):
        with pytest.raises(ValueError, match="need|two different"):
            fits.fit_power_law(*wrong)
    with pytest.raises(ValueError, match="three different"):
        fits.fit_saturating_law([1, 2, 2], [3, 2, 2])
    compute, scales, _, losses = runs(count=3)
    for noise, resamples in ((-1.0, 5), (0.1, 0)):
        with pytest.raises(ValueError, match="noise >= 0"):
            fits.resampled_allocations(compute, scales, losses, noise, resamples, 0)
    with pytest.raises(ValueError, match="no draw"):
        fits.resampled_allocations(compute, scales, np.full_like(losses, 2.0), 1e-12, 2, 1)


def test_a_cosine_ends_at_a_tenth():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = schedule.cosine_schedule(optimizer, 40, 4)
    rates = []
    for _ in range(41):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[22] == pytest.approx(0.2 + 1.8 / 2) and rates[40] == pytest.approx(0.2)
    assert all(b <= a for a, b in zip(rates[4:], rates[5:], strict=False))


# Runs


@pytest.fixture(scope="module")
def text():
    return experiment.source_code(torch.device("cpu"), 20)


def test_held_out_files_are_not_trained_on(text):
    assert text.inputs.shape == text.targets.shape == (20, experiment.LENGTH)
    assert torch.equal(text.inputs[:, 1:], text.targets[:, :-1])
    window = bytes(text.inputs[7].tolist())
    assert window not in bytes(text.train.clamp_max(255).tolist())


def test_a_run_costs_what_it_should_and_its_seed_decides(text):
    config = experiment.sizes(16, 2)
    made = [
        experiment.train_at(config, 1e9, text, batch_size=4, learning_rate=0.01, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert made[0] == made[1] != made[2]
    run = made[0]
    assert run.scale == flops.exact_flops(config, experiment.LENGTH)
    assert run.scale * run.tokens == pytest.approx(1e9, rel=0.02) and run.compute == 1e9
    # Less than eight bits, which bytes at random take, and more than any model of code gets in a minute.
    assert 2 < run.loss < 7
    other = experiment.train_at(
        config, 1e9, text, batch_size=4, learning_rate=0.01, seed=0, cosine=True
    )
    assert other.loss != run.loss and other.tokens == run.tokens
    for compute, planned in ((1e6, None), (1e9, 5e8)):
        with pytest.raises(ValueError, match="of which there must be 40 to"):
            experiment.train_at(
                config, compute, text, batch_size=4, learning_rate=0.01, seed=0, planned=planned
            )


@pytest.mark.parametrize("cosine", [False, True])
def test_a_longer_training_begins_with_the_first_stage_of_a_shorter_one(text, cosine):
    """In steps, to the last bit; along a cosine, whose rates depend on where it ends, not."""
    config = experiment.sizes(8, 1)
    first, again = (
        experiment.train_at(
            config, 4e8, text, batch_size=4, learning_rate=0.01, seed=0, cosine=cosine, planned=c
        ).loss
        for c in (5e8, 1e9)
    )
    assert (first == again) != cosine


def test_more_compute_lowers_the_loss(text):
    few, many = (
        experiment.train_at(
            experiment.sizes(16, 1), c, text, batch_size=4, learning_rate=0.01, seed=0
        )
        for c in (4e8, 4e9)
    )
    assert many.loss < few.loss - 0.3


def test_the_laws_give_batch_and_rate():
    law = experiment.by_law(1e11)
    assert law["learning_rate"] == pytest.approx(0.5 * 0.3118 * 1e11**-0.125)
    assert law["batch_size"] == round(0.2920 * 1e11**0.3271 / 64)
    scaled = experiment.by_law(1e11, rate=2, batch=3)
    assert scaled["learning_rate"] == pytest.approx(4 * law["learning_rate"])
    assert scaled["batch_size"] == round(3 * 0.2920 * 1e11**0.3271 / 64)
    assert experiment.by_law(1e3)["batch_size"] == 1


def test_spoiled_bytes_are_as_many_as_asked_for(text):
    spoiled = experiment.degraded(text, 0.2, seed=0)
    # One in 95 random bytes is what it was, and a few in the text are not printable.
    share = (spoiled.train != text.train).float().mean().item()
    assert share == pytest.approx(0.2 * 94 / 95, abs=0.004)
    assert torch.equal(spoiled.inputs[:, 1:], spoiled.targets[:, :-1])
    assert (spoiled.targets != text.targets).any()
    assert torch.equal(experiment.degraded(text, 0.0, 0).train, text.train)
    with pytest.raises(ValueError, match="between 0 and 1"):
        experiment.degraded(text, 1.5, 0)


def test_the_noise_is_that_of_a_mean_over_seeds():
    generator = np.random.default_rng(0)
    made = [
        [
            experiment.Run(1e10, float(m), 1e10 / m, 3 + 0.05 * generator.standard_normal())
            for m in (1, 2)
        ]
        for _ in range(2000)
    ]
    compute, scales, losses, noise = experiment.mean_losses(made)
    assert noise == pytest.approx(0.05 / math.sqrt(2000), rel=0.05)
    assert losses == pytest.approx([3, 3], abs=0.01) and scales.tolist() == [1, 2]
    assert compute.tolist() == [1e10, 1e10]
    with pytest.raises(ValueError, match="two seeds"):
        experiment.mean_losses(made[:1])


def test_two_seeds_make_a_noise():
    made = [[experiment.Run(1e10, 1.0, 1e10, loss)] for loss in (3.0, 5.0)]
    assert experiment.mean_losses(made)[3] == pytest.approx(1)  # variance 2 of a run, 1 of a mean


def test_a_model_that_knows_nothing_needs_the_bits_of_the_vocabulary(text):
    model = experiment.Decoder(experiment.sizes(8, 1))
    torch.nn.init.zeros_(model.head.weight)
    assert experiment.bits_per_byte(model, text) == pytest.approx(math.log2(257), abs=1e-5)


def test_a_layer_has_twelve_times_the_square_of_its_width():
    counted = flops.flops_per_token(2, 48, 257, experiment.LENGTH).non_embedding
    assert experiment.scale_of(experiment.sizes(48, 2)) == counted


def test_optimal_losses_and_pictures():
    compute, scales, _, losses = runs(count=5)
    budgets, best = experiment.optimal_losses(compute, scales, losses)
    expected = [LAW(m, c / m) for c in budgets for m in [LAW.allocation().model(c)]]
    assert best == pytest.approx(expected, rel=0.01)
    drawn = fits.resampled_allocations(compute, scales, losses, 0.001, 20, 0)
    figure, axes = experiment.plt.subplots(1, 2)
    experiment.draw_isoflop(axes[0], compute, scales, losses)
    experiment.draw_allocation(axes[1], compute, scales, losses, drawn, 1e13)
    assert len(axes[0].lines) == 9 and len(axes[1].lines) == 3
    experiment.plt.close(figure)


def test_a_prediction_follows_the_laws_of_the_runs(text, monkeypatch):
    compute, scales, _, losses = runs(count=5)
    asked = []

    def trained(budget, width, layers, *rest):
        asked.append((budget, width, layers))
        return [experiment.Run(budget, 1.0, 2 * len(text.train), 1.23)]

    monkeypatch.setattr(experiment, "isoflop_seeds", trained)
    found = experiment.predict_and_train((compute, scales, losses, 1e-4), 1e13, 2, text, 0, 1)
    assert found["scale"] == pytest.approx(fits.fit_allocation(compute, scales, losses).model(1e13))
    (_, width, layers) = asked[0]
    apart = {
        w: abs(math.log(experiment.scale_of(experiment.sizes(w, layers)) / found["scale"]))
        for w in range(4, 256, 2)
        if w % (2 * max(1, w // 16)) == 0
    }
    assert width == min(apart, key=apart.get) and apart[width] < math.log(1.4)
    best = LAW(LAW.allocation().model(1e13), LAW.allocation().data(1e13))
    assert found["with a floor"] == pytest.approx(best, rel=0.05)
    assert found["low"] < found["with a floor"] < found["high"]
    assert found["measured"] == [1.23] and found["epochs"] == 2


def test_the_band_of_a_prediction_holds_the_noise_of_what_is_measured(text, monkeypatch):
    compute, scales, _, losses = runs(count=5)
    known = experiment.optimal_losses(compute, scales, losses)
    monkeypatch.setattr(
        experiment, "isoflop_seeds", lambda *_: [experiment.Run(1.0, 1.0, 1.0, 1.0)]
    )
    monkeypatch.setattr(experiment, "optimal_losses", lambda *_: known)  # fits without noise
    found = experiment.predict_and_train((compute, scales, losses, 0.1), 1e13, 2, text, 0, 1)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.2816 * 0.1, rel=0.15)


SLICE = dict(
    seeds=2, layers=1, plan=((2e8, (8, 16, 32)), (5e8, (8, 16, 48)), (1e9, (8, 16, 48))),
    predicted=2e9, spoiled=0.5, grid_at=(2e8, 8), factors=(0.5, 1.0), held_out=20,
)  # fmt: skip


def trainer(curvature):
    """Stands for `train_at`: so few steps show no optimum, and what is held here is what is done with runs that do."""

    def trained(config, compute, text, *, seed, **_):
        scale = experiment.scale_of(config)
        bend = curvature * math.log(scale / (0.2 * compute**0.6)) ** 2
        return experiment.Run(
            compute, scale, compute / scale, 2 + bend + 1e2 * compute**-0.3 + 1e-4 * seed
        )

    return trained


def test_a_slice_of_the_long_run(monkeypatch):
    monkeypatch.setattr(experiment, "train_at", trainer(0.3))
    results, pictures = experiment.full_scale(torch.device("cpu"), seed=0, **SLICE)
    assert results["allocation"]["a"] == pytest.approx(0.6, abs=0.01)
    assert results["allocation"]["low"] <= 0.61 and results["allocation"]["high"] >= 0.59
    assert results["allocation"]["noise"] == pytest.approx(1e-4 / math.sqrt(2) / math.sqrt(2))
    assert set(results["grid"]) == {"rate × 0.5", "rate × 1"}
    kept = results["allocation"]["runs"]
    assert len(kept) == 9 and [row["C"] for row in kept[::3]] == [2e8, 5e8, 1e9]
    assert kept[0]["losses"][1] - kept[0]["losses"][0] == pytest.approx(1e-4)
    assert kept[4]["M"] * kept[4]["D"] == pytest.approx(5e8)
    assert results["prediction"]["last"] > results["prediction"]["with a floor"]
    assert len(results["schedules"]["cosine"]) == 2 and len(pictures) == 1
    for figure in pictures.values():
        experiment.plt.close(figure)


def test_a_long_run_without_an_optimum_says_so_and_goes_on(monkeypatch):
    monkeypatch.setattr(experiment, "train_at", trainer(-0.01))
    results, pictures = experiment.full_scale(torch.device("cpu"), seed=0, **SLICE)
    assert "no optimum between the scales" in results["allocation"]["a"]
    assert set(results["allocation"]) == {"noise", "runs", "a"} and "prediction" not in results
    assert len(results["schedules"]["cosine"]) == 2
    for figure in pictures.values():
        (left, right) = figure.axes
        assert len(left.lines) == 3 and not right.lines  # dots, and no parabolas
        experiment.plt.close(figure)
