import copy
import math

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn
from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
from torchcfm.optimal_transport import OTPlanSampler
from torchdiffeq import odeint

from noise2tokens import rectified_flow
from noise2tokens.flow_vs_diffusion.flow_matching import cfm_loss
from noise2tokens.flow_vs_diffusion.integrators import dormand_prince
from noise2tokens.flow_vs_diffusion.mixture import GaussianMixture
from noise2tokens.flow_vs_diffusion.paths import LinearPath
from noise2tokens.networks import TimeMLP
from noise2tokens.rectified_flow import (
    crossing,
    distill,
    fit,
    independent_pairs,
    interpolate,
    logit_normal_times,
    mnist_experiment,
    reflow,
    rf_loss,
    sample,
    shift_times,
    source_times,
    straightness,
    transport_cost,
    transport_pairs,
    uniform_times,
)
from noise2tokens.toys import EightGaussians
from noise2tokens.training import running_average

MIXTURE = GaussianMixture(EightGaussians().means, 0.15)
M, STD = 1.0, 0.3
CPU = torch.device("cpu")


def exact(x, t):
    """The velocity from noise to eight Gaussians."""
    return MIXTURE.velocity(x, t, LinearPath())


def gauss(x, t):
    """The velocity between independent N(0, 1) at t = 1 and N(M, STD²) at t = 0, coordinate by coordinate."""
    t = t.reshape(-1, *[1] * (x.dim() - 1))
    variance = (1 - t) ** 2 * STD**2 + t**2
    return -M + (t - (1 - t) * STD**2) / variance * (x - (1 - t) * M)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def stratified(n, dim=2, seed=0):
    u = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed).draw(n).double()
    return torch.distributions.Normal(0.0, 1.0).icdf(u.clamp(1e-6, 1 - 1e-6))


def same(ours, theirs, atol=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


# The line, and the loss on it


@pytest.mark.parametrize("event", [(3,), (1, 4, 4)])
def test_interpolation_and_target_are_those_of_torchcfm(event):
    # Its x0 is the end at t = 0 as well; that it calls that end the source changes no formula.
    x0, x1, t = normal(5, *event), normal(5, *event, seed=1), torch.rand(5).double()
    _, x_t, target = ConditionalFlowMatcher(sigma=0).sample_location_and_conditional_flow(x0, x1, t)
    same(interpolate(x0, x1, t), x_t)
    seen = []

    def velocity(x, at):
        seen.append((x, at))
        return target

    assert rf_loss(velocity, x0, x1, t).item() < 1e-24
    same(seen[0][0], x_t)
    same(seen[0][1], t)


def test_data_is_at_0_and_the_source_at_1():
    x0, x1 = normal(4, 2), normal(4, 2, seed=1)
    same(interpolate(x0, x1, torch.zeros(4).double()), x0)
    same(interpolate(x0, x1, torch.ones(4).double()), x1)


def test_loss_is_conditional_flow_matching_on_the_linear_path():
    x0, x1, t = normal(50, 2), normal(50, 2, seed=1), torch.rand(50).double()
    same(rf_loss(exact, x0, x1, t), cfm_loss(exact, LinearPath(), x0, x1, t))


def test_gradient_of_the_loss_vanishes_at_the_exact_velocity():
    x0 = M + STD * normal(200_000, 1)
    x1, t = normal(200_000, 1, seed=1), torch.rand(200_000).double()
    for direction in (lambda x, t: 1.0, lambda x, t: x, lambda x, t: t[:, None]):
        up, down = (
            rf_loss(lambda x, t, h=h, f=direction: gauss(x, t) + h * f(x, t), x0, x1, t)
            for h in (0.1, -0.1)
        )
        assert abs(up - down).item() / 0.2 < 0.02


def test_a_velocity_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="velocity has shape"):
        rf_loss(lambda x, t: x[:, :1], normal(5, 2), normal(5, 2), torch.rand(5).double())


# Times


def test_uniform_and_source_times():
    torch.manual_seed(0)
    t = uniform_times(20_000, CPU)
    assert scipy.stats.kstest(t.numpy(), "uniform").pvalue > 1e-3
    assert torch.equal(source_times(3, CPU), torch.ones(3))


def test_logit_normal_times_are_those_of_scipy():
    torch.manual_seed(0)
    t = logit_normal_times(20_000, CPU).double()
    assert 0 <= t.min() and t.max() <= 1
    assert scipy.stats.kstest(scipy.special.logit(t.numpy()), "norm").pvalue > 1e-3


def test_shift_multiplies_the_odds_and_composes():
    t = torch.linspace(0, 1, 11).double()
    shifted = shift_times(t, 3)
    assert shifted[0] == 0 and shifted[-1] == 1
    same((shifted / (1 - shifted))[1:-1], 3 * (t / (1 - t))[1:-1])
    same(shift_times(shifted, 1 / 3), t)
    same(shift_times(t, 1), t)
    for shift in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="shift must be positive"):
            shift_times(t, shift)


# Sampling


@pytest.mark.parametrize("steps, shift", [(1, 1), (7, 1), (7, 3.0)])
def test_sampler_is_the_euler_scheduler_of_diffusers(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=float(shift))
    # Its default range of times has been shifted once already; so give it the unshifted ones.
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    x1 = normal(6, 2)
    x = x1
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        velocity = exact(x, sigma.double().expand(6))
        x = scheduler.step(velocity, timestep, x, return_dict=False)[0].double()
    same(sample(exact, x1, steps, shift), x, atol=5e-6)  # the scheduler works in float32


def test_one_step_from_independent_pairs_is_the_mean():
    same(sample(exact, normal(50, 2), 1), torch.zeros(50, 2).double())
    same(sample(gauss, normal(50, 2), 1), torch.full((50, 2), M).double())


def test_many_steps_reach_the_target_and_no_gradient_is_kept():
    x1 = stratified(512, 1)
    same(sample(gauss, x1, 2000), M + STD * x1, atol=2e-3)
    network = TimeMLP(2, 8)
    assert not sample(network, torch.randn(3, 2), 2).requires_grad
    assert not reflow(network, torch.randn(3, 2)).requires_grad


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_refused(steps):
    with pytest.raises(ValueError, match="at least one step"):
        sample(exact, normal(3, 2), steps)


def test_bumpy_path_one_step_is_exact_and_two_are_not():
    d, w = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 4.0]).double()

    def bumpy(x, t):
        return d + ((1 - t) * (1 - 3 * t))[:, None] * w

    x1 = normal(5, 2)
    same(sample(bumpy, x1, 1), x1 - d)
    same(reflow(bumpy, x1)[:, 0], x1 - d, atol=1e-9)
    same(sample(bumpy, x1, 2), x1 - d + w / 8)
    # ∫ (1-t)² (1-3t)² dt = 2/15
    assert straightness(bumpy, x1, 400) == pytest.approx(16 * 2 / 15, rel=1e-4)


# Pairs


def test_independent_pairs_lie_side_by_side():
    x0, x1 = normal(4, 2, 3), normal(4, 2, 3, seed=1)
    pairs = independent_pairs(x0, x1)
    assert pairs.shape == (4, 2, 2, 3)
    same(pairs[:, 0], x0)
    same(pairs[:, 1], x1)


def test_transport_pairs_are_the_optimal_plan_of_torchcfm_in_each_batch():
    x0, x1 = EightGaussians().sample(96, torch.Generator().manual_seed(0)).double(), normal(96, 2)
    pairs = transport_pairs(x0, x1, 32)
    same(pairs[:, 0], x0)
    for k in range(3):
        rows = slice(32 * k, 32 * k + 32)
        plan = OTPlanSampler("exact").get_map(x0[rows], x1[rows])
        j = torch.as_tensor(plan.argmax(1))
        assert np.allclose(plan.max(1), 1 / 32)
        same(pairs[rows, 1], x1[rows][j])
    assert transport_cost(pairs) < 0.4 * transport_cost(independent_pairs(x0, x1))
    for size in (0, 33):
        with pytest.raises(ValueError, match="cannot be cut"):
            transport_pairs(x0, x1, size)


def test_reflow_follows_each_point_to_its_own_end():
    x1 = stratified(64)
    pairs = reflow(exact, x1, tolerance=1e-8, batch_size=24)
    same(pairs[:, 1], x1)
    times = torch.tensor([1.0, 0.0]).double()
    theirs = odeint(
        lambda t, x: exact(x, t.expand(len(x))), x1, times, method="dopri5", rtol=1e-9, atol=1e-9
    )
    same(pairs[:, 0], theirs[-1], atol=1e-5)
    same(reflow(gauss, x1)[:, 0], M + STD * x1, atol=1e-3)
    loose = reflow(exact, x1, tolerance=1e-2)[:, 0] - theirs[-1]
    assert loose.abs().max() > 1e-5


def test_adaptive_solver_counts_like_torchdiffeq():
    calls = []

    def velocity(t, x):
        calls.append(t)
        return exact(x, t.expand(len(x)))

    x1, times = stratified(256), torch.tensor([1.0, 0.0]).double()
    odeint(velocity, x1, times, method="dopri5", rtol=1e-5, atol=1e-5)
    assert dormand_prince(exact, x1, 1, 0).evaluations == pytest.approx(len(calls), rel=0.3)


def test_transport_cost_is_the_mean_squared_distance():
    pairs = independent_pairs(torch.tensor([[0.0, 0], [1, 1]]), torch.tensor([[3.0, 4], [1, 1]]))
    assert transport_cost(pairs) == 12.5
    assert transport_cost(pairs[:, :, None, :, None]) == 12.5


@pytest.mark.parametrize(
    "cost",
    [
        lambda d: d.norm(dim=1),
        lambda d: d.norm(dim=1) ** 4,
        lambda d: d.abs().amax(1),
        lambda d: (d[:, 0] - 1).exp(),
    ],
)
def test_no_convex_cost_grows(cost):
    x1 = stratified(2048)
    x0 = MIXTURE.sample(2048, torch.Generator().manual_seed(0))
    before, after = (
        cost(p[:, 1] - p[:, 0]).mean() for p in (torch.stack([x0, x1], 1), reflow(exact, x1))
    )
    assert after < before


# Straightness, crossing, and the budget


def gauss_integrals(n=100_001):
    t = torch.linspace(0, 1, n).double()
    variance = (1 - t) ** 2 * STD**2 + t**2
    covariance = t - (1 - t) * STD**2  # of x_1 - x_0 with x_t
    s = torch.trapezoid((1 - STD - covariance / variance.sqrt()) ** 2, t)
    v = torch.trapezoid(1 + STD**2 - covariance**2 / variance, t)
    return s.item(), v.item()


@pytest.mark.parametrize("event", [(1,), (1, 2, 2)])
def test_straightness_and_crossing_of_a_gaussian_are_their_integrals(event):
    dim = math.prod(event)
    x1 = stratified(4096, dim).view(-1, *event)
    s, v = gauss_integrals()
    assert straightness(gauss, x1, 400) == pytest.approx(dim * s, rel=0.01)
    x0 = M + STD * stratified(4096, dim, seed=1)[torch.randperm(4096)].view(-1, *event)
    assert crossing(gauss, independent_pairs(x0, x1)) == pytest.approx(dim * v, rel=0.04)


def test_straightness_of_the_eight_gaussians():
    # 1.44: found with 40,000 points and 100 steps.
    assert straightness(exact, stratified(2048)) == pytest.approx(1.44, abs=0.02)


def test_budget():
    x1 = stratified(4096)
    x0 = MIXTURE.sample(4096, torch.Generator().manual_seed(0))
    pairs = independent_pairs(x0, x1)
    spent = transport_cost(reflow(exact, x1)) + straightness(exact, x1) + crossing(exact, pairs)
    assert spent == pytest.approx(transport_cost(pairs), abs=0.12)
    assert transport_cost(pairs) == pytest.approx(6.045, abs=0.15)


def test_straight_flows_have_no_straightness_and_their_pairs_do_not_cross():
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]]).double()

    def turning(x, t):
        a = (1 - t)[:, None, None] * turn + t[:, None, None] * torch.eye(2).double()
        return torch.linalg.solve(a, x[..., None])[..., 0] @ (torch.eye(2).double() - turn).T

    x1 = normal(200, 2)
    pairs = reflow(turning, x1)
    same(pairs[:, 0], x1 @ turn.T, atol=1e-8)
    assert straightness(turning, x1) < 1e-12 and crossing(turning, pairs) < 1e-9
    for steps in (1, 3, 10):
        same(sample(turning, x1, steps), x1 @ turn.T)


def test_crossing_takes_midpoints():
    seen = []

    def velocity(x, t):
        seen.append(t[0].item())
        return 0 * x

    crossing(velocity, independent_pairs(normal(3, 2), normal(3, 2)), points=4)
    assert seen == [0.125, 0.375, 0.625, 0.875]


# Training


def pairs_of_gaussians(n):
    return independent_pairs(M + STD * torch.randn(n, 1), torch.randn(n, 1))


def test_fit_finds_the_exact_velocity_from_fresh_pairs():
    torch.manual_seed(0)
    network = TimeMLP(1, 32)
    history = fit(network, pairs_of_gaussians, steps=500, learning_rate=5e-3)
    assert len(history.losses) == 500
    t = torch.rand(2000)
    x = interpolate(*pairs_of_gaussians(2000).unbind(1), t)
    assert (network(x, t) - gauss(x, t)).square().mean() < 0.08
    assert np.mean(history.losses[-50:]) == pytest.approx(gauss_integrals()[1], rel=0.1)


def test_fit_is_deterministic_and_takes_pairs_in_a_tensor():
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        network = TimeMLP(1, 8)
        fit(network, pairs_of_gaussians(64), steps=5, batch_size=16)
        states.append(copy.deepcopy(network.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))


def test_fit_anneals_the_learning_rate_to_zero(monkeypatch):
    kept = {}
    train = rectified_flow.train

    def spy(*args, **options):
        kept.update(options, start=options["optimizer"].param_groups[0]["lr"])
        return train(*args, **options)

    monkeypatch.setattr(rectified_flow, "train", spy)
    network = TimeMLP(1, 8)
    average = running_average(network)
    options = {"steps": 7, "batch_size": 4, "learning_rate": 0.5}
    fit(network, pairs_of_gaussians, average=average, **options)
    assert average.n_averaged == 7
    assert kept["start"] == 0.5 and kept["batch_size"] == 4
    assert kept["schedule"].get_last_lr()[0] < 1e-12


class Recorder(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.times, self.points = nn.Parameter(torch.zeros(1)), [], []

    def forward(self, x, t):
        self.times.append(t)
        self.points.append(x)
        return self.weight * x


def test_fit_draws_times_as_told():
    network = Recorder()
    fit(network, pairs_of_gaussians, steps=3, batch_size=8, times=source_times)
    assert all((t == 1).all() for t in network.times)
    network = Recorder()
    fit(network, pairs_of_gaussians, steps=3, batch_size=8)
    t = torch.cat(network.times)
    assert len(t) == 24 and len(t.unique()) == 24


def test_distilled_student_makes_the_step_at_once_and_the_teacher_is_untouched():
    torch.manual_seed(0)
    teacher = TimeMLP(1, 32)
    before = copy.deepcopy(teacher.state_dict())
    x1 = torch.randn(2048, 1)
    pairs = reflow(lambda x, t: gauss(x, t), x1)
    student = distill(teacher, pairs, steps=300)
    assert (sample(student, x1, 1) - pairs[:, 0]).square().mean().sqrt() < 0.05
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_distillation_happens_at_t_1_with_the_options_given(monkeypatch):
    kept = {}
    monkeypatch.setattr(rectified_flow, "fit", lambda *args, **options: kept.update(options))
    teacher = TimeMLP(1, 8)
    student = distill(teacher, pairs_of_gaussians(8), steps=3, batch_size=4, learning_rate=0.1)
    assert kept == {"steps": 3, "batch_size": 4, "learning_rate": 0.1, "times": source_times}
    assert student is not teacher


def test_reflow_straightens_a_learned_flow():
    torch.manual_seed(0)
    draws = torch.Generator().manual_seed(0)
    one = TimeMLP(2, 64)
    fit(
        one,
        lambda n: independent_pairs(EightGaussians().sample(n, draws), torch.randn(n, 2)),
        steps=600,
    )
    pairs = reflow(one, torch.randn(5000, 2), tolerance=1e-3)
    two = copy.deepcopy(one)
    fit(two, pairs, steps=400)
    x1 = stratified(512).float()
    before, after = straightness(one, x1), straightness(two, x1)
    assert before > 1 and after < 0.05
    one_step = [
        (sample(flow, x1, 1) - reflow(one, x1)[:, 0]).norm(dim=1).mean() for flow in (one, two)
    ]
    assert one_step[1] < 0.3 * one_step[0]


# The experiment at full scale, small


@pytest.fixture
def pixels():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (60, 28, 28), generator=generator).to(torch.uint8)


SMALL = {
    "steps": 2,
    "batch_size": 8,
    "pairs": 12,
    "samples": 41,
    "width": 8,
    "counts": (1, 2),
    "tolerance": 0.1,
}


def test_the_full_scale_experiment_runs_on_a_slice(pixels):
    torch.manual_seed(0)
    labels = torch.arange(60) % 10
    results, pictures = mnist_experiment(pixels, labels, pixels[:20], CPU, **SMALL)
    assert list(results) == [
        "training images",
        "1-RF",
        "1-RF, distilled",
        "2-RF",
        "2-RF, distilled",
    ]
    assert set(results["1-RF"]) == set(results["2-RF"]) == {"1", "2", "RK45", "evaluations"}
    assert set(results["2-RF, distilled"]) == {"1"}
    values = [value for found in results.values() for value in found.values()]
    assert all(math.isfinite(value) and value > -1e-6 for value in values)
    assert results["1-RF"]["evaluations"] >= 7
    # Training and test pixels are noise of one kind here, and untrained samples are not.
    assert results["training images"]["floor"] < results["1-RF"]["1"]
    for block in pictures.values():
        assert block.shape == (40, 28, 28) and 0 <= block.min() < block.max() <= 1


def test_the_full_scale_experiment_trains_on_what_it_should(pixels, monkeypatch):
    calls = []

    def spy(network, source, **options):
        batch = source(5) if callable(source) else source
        calls.append((network, batch, options))
        network.end[-1].bias.data += 0.5  # the last layer starts at zero: a constant velocity
        if options.get("average") is not None:
            options["average"].module.end[-1].bias.data += 0.25

    monkeypatch.setattr(rectified_flow, "fit", spy)
    torch.manual_seed(0)
    mnist_experiment(pixels, torch.arange(60) % 10, pixels[:20], CPU, **SMALL)
    first, student, second, last = calls
    data = pixels[:, None] / 127.5 - 1
    assert first[1].shape == (5, 2, 1, 28, 28)
    distances = (first[1][:, 0, None] - data[None]).abs().flatten(2).amax(2).min(1).values
    assert distances.max() < 1e-6
    for call in (first, second):
        assert call[2]["average"] is not None and "times" not in call[2]
    for call in (student, last):
        assert call[2]["times"] is source_times
    assert len(student[1]) == len(second[1]) == len(last[1]) == 12
    assert torch.equal(student[1], second[1]) and not torch.equal(second[1], last[1])
    assert second[0] is not first[0] and second[0].end[-1].bias == 0.75
    # Samples come from the running average, and so do the weights that 2-RF starts from.
    for pairs, velocity in ((second[1], 0.25), (last[1], 0.5)):
        same(pairs[:, 1] - pairs[:, 0], torch.full_like(pairs[:, 0], velocity), atol=1e-5)
        assert abs(pairs[:, 1].std() - 1) < 0.05


def test_the_pictures_are_one_step_samples_as_pixels(pixels, monkeypatch):
    monkeypatch.setattr(
        rectified_flow, "sample", lambda velocity, x, count: torch.full_like(x, 0.2 * count - 1)
    )
    _, pictures = mnist_experiment(pixels, torch.arange(60) % 10, pixels[:20], CPU, **SMALL)
    assert len(pictures) == 4
    for block in pictures.values():
        same(block, torch.full((40, 28, 28), 0.1), atol=1e-6)
