import copy
import math

import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from matplotlib.figure import Figure
from torch import nn
from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
from torchcfm.optimal_transport import OTPlanSampler
from torchdiffeq import odeint

from noise2tokens.flow_vs_diffusion.flow_matching import cfm_loss
from noise2tokens.flow_vs_diffusion.integrators import dormand_prince
from noise2tokens.flow_vs_diffusion.mixture import GaussianMixture
from noise2tokens.flow_vs_diffusion.paths import LinearPath
from noise2tokens.networks import TimeMLP
from noise2tokens.rectified_flow import experiment
from noise2tokens.rectified_flow import reflow as module
from noise2tokens.rectified_flow.experiment import (
    full_scale,
    learn_eight_gaussians,
    score_eight_gaussians,
    stratified_noise,
    stratified_target,
)
from noise2tokens.rectified_flow.measures import crossing, straightness, transport_cost
from noise2tokens.rectified_flow.reflow import (
    distill,
    fit,
    independent_pairs,
    interpolate,
    logit_normal_times,
    reflow,
    rf_loss,
    sample,
    shift_times,
    source_times,
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


def test_fit_hands_its_options_to_the_common_loop(monkeypatch):
    kept = {}
    common = module.training.fit

    def spy(*args, **options):
        kept.update(options)
        return common(*args, **options)

    monkeypatch.setattr(module.training, "fit", spy)
    network = TimeMLP(1, 8)
    average = running_average(network)
    options = {"steps": 7, "batch_size": 4, "learning_rate": 0.5}
    fit(network, pairs_of_gaussians, average=average, **options)
    assert average.n_averaged == 7
    assert options.items() <= kept.items() and kept["average"] is average


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
    monkeypatch.setattr(module, "fit", lambda *args, **options: kept.update(options))
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


# The experiments


def test_stratified_sets_are_nearer_to_each_other_than_random_ones():
    target = EightGaussians()
    near = experiment.wasserstein(stratified_target(256, 0), stratified_target(256, 1))
    draws = torch.Generator().manual_seed(0)
    random = [target.sample(256, draws).double() for _ in range(2)]
    assert near < 0.4 * experiment.wasserstein(*random)
    x = stratified_target(4096, 0)
    nearest = torch.cdist(x, target.means)
    assert nearest.argmin(1).bincount().tolist() == [512] * 8
    assert nearest.amin(1).square().mean().item() == pytest.approx(2 * target.std**2, rel=0.02)
    assert stratified_noise(4096, 0).std().item() == pytest.approx(1, rel=0.01)
    with pytest.raises(ValueError, match="12 points"):
        stratified_target(12, 0)


@pytest.fixture(scope="module")
def learned():
    return learn_eight_gaussians(0, steps=300, more=250, student_steps=150, pairs=2048)


def test_flows_and_students_are_what_their_names_say(learned):
    x1 = stratified_noise(256, 0).float()
    target, test = stratified_target(256, 1), EightGaussians().sample(200, torch.Generator())
    found = score_eight_gaussians(learned, x1, target, test, (1, 16))
    assert list(found) == [*learned.flows, *learned.students]
    first, longer, second, paired = (found[name] for name in learned.flows)
    assert set(first) == {"1", "16", "solved", "evaluations", "S", "cost", "nll"}
    assert min(first["S"], longer["S"]) > 1 > 0.2 > max(second["S"], paired["S"])
    assert first["1"] > 4 * second["1"] and first["1"] > 4 * paired["1"]
    assert second["nll"] > longer["nll"] and first["cost"] < 1.2
    for name, teacher in (("1-RF, distilled", first), ("2-RF, distilled", second)):
        assert set(found[name]) == {"1"} and found[name]["1"] < max(0.6, 1.3 * teacher["solved"])
    # What is scored is what it is called: by hand for one flow.
    two = learned.flows["2-RF"]
    assert second["1"] == experiment.wasserstein(sample(two, x1, 1).double(), target)
    assert second["S"] == straightness(two, x1, 25)
    # A student repeats the ends of its own teacher.
    for name, teacher in (("1-RF, distilled", "1-RF"), ("2-RF, distilled", "2-RF")):
        ends = reflow(learned.flows[teacher], x1, tolerance=1e-4)[:, 0]
        gap = (sample(learned.students[name], x1, 1) - ends).square().mean().sqrt()
        assert gap < 0.25
    # The pairs are those of 1-RF, and it stays as it was while the others are trained.
    again = reflow(learned.flows["1-RF"], learned.pairs[:50, 1], tolerance=1e-4)
    torch.testing.assert_close(again, learned.pairs[:50], atol=1e-2, rtol=0)


SLICE = {
    "seeds": 1,
    "plane": {"steps": 2},
    "steps": 2,
    "reflow_steps": 3,
    "student_steps": 4,
    "batch_size": 8,
    "width": 8,
    "pairs": 12,
    "samples": 41,
    "test_images": 60,
    "classifier_steps": 3,
    "counts": (1, 2),
    "tolerance": 0.1,
}


@pytest.fixture
def images(fake_mnist, monkeypatch):
    """Real digits in place of MNIST, and nothing for the eight Gaussians, which have their own tests."""
    fake_mnist(experiment)
    monkeypatch.setattr(experiment, "_eight_gaussians_over_seeds", lambda *seeds: {"called": seeds})
    return experiment.mnist(train=True)[0]


def test_what_each_network_of_full_scale_is_trained_on(images, monkeypatch):
    calls = []

    def spy(network, source, **options):
        batch = source(5) if callable(source) else source
        calls.append((network, batch, options))
        network.end[-1].bias.data += 0.5  # the last layer starts at zero: a constant velocity
        if options.get("average") is not None:
            options["average"].module.end[-1].bias.data += 0.25

    monkeypatch.setattr(experiment, "fit", spy)
    monkeypatch.setattr(module, "fit", spy)
    torch.manual_seed(0)
    full_scale(CPU, seed=0, **SLICE)
    first, student, second, last = calls
    assert [call[2]["steps"] for call in calls] == [2, 4, 3, 4]
    data = images[:, None] / 127.5 - 1
    assert first[1].shape == (5, 2, 1, 28, 28)
    distances = (first[1][:, 0, None] - data[None]).abs().flatten(2).amax(2).min(1).values
    assert distances.max() < 1e-6
    for call in (first, second):
        assert call[2]["average"] is not None and "times" not in call[2]
    for call in (student, last):
        assert call[2]["times"] is source_times
    assert len(student[1]) == len(second[1]) == len(last[1]) == 12
    assert torch.equal(student[1], second[1]) and not torch.equal(second[1], last[1])
    # Samples come from the running average, and so do the weights that 2-RF and the students start from.
    assert second[0] is not first[0] and second[0].end[-1].bias == 0.75
    assert student[0].end[-1].bias == 0.75 and last[0].end[-1].bias == 1.0
    for pairs, velocity in ((second[1], 0.25), (last[1], 0.5)):
        same(pairs[:, 1] - pairs[:, 0], torch.full_like(pairs[:, 0], velocity), atol=1e-5)
        assert abs(pairs[:, 1].std() - 1) < 0.05


def test_what_full_scale_measures_is_what_it_says(images, monkeypatch):
    """With sampling replaced by known images, distances and confidences are those of these images."""
    judged, drawn, figure, asked = [], {}, Figure(), []

    def sample_known(velocity, x, count):
        asked.append(id(velocity))
        return torch.full_like(x, 0.2 * count - 1)

    class Known:
        evaluations = 13

        def __init__(self, x):
            self.x = torch.zeros_like(x)

    def distance(features, real):
        judged.append(features.mean().item())
        return float(len(judged))

    monkeypatch.setattr(experiment, "sample", sample_known)
    monkeypatch.setattr(experiment, "dormand_prince", lambda v, x, *_: Known(x))
    monkeypatch.setattr(experiment, "frechet_distance", distance)
    monkeypatch.setattr(experiment, "image_rows", lambda rows: drawn.update(rows) or figure)
    monkeypatch.setattr(experiment, "confidence", lambda c, x: x.flatten(1).mean(1))
    results, pictures = full_scale(CPU, seed=3, **SLICE)
    assert results["eight gaussians"] == {"called": (3, 1, {"steps": 2})}
    found = results["mnist"]
    assert list(found) == [
        "training images",
        *(n + s for n in ("1-RF", "2-RF") for s in ("", ", distilled")),
    ]
    assert found["training images"]["floor"] == 1 and found["training images"]["confidence"] < -0.3
    for name in ("1-RF", "2-RF"):
        assert set(found[name]) == {"1", "2", "solved", "evaluations", "confidence"}
        assert found[name]["evaluations"] == 13
        assert found[name]["confidence"] == pytest.approx(-0.8)  # of one-step samples
        assert set(found[f"{name}, distilled"]) == {"1", "confidence"}
    assert len({v for f in found.values() for k, v in f.items() if k in ("1", "2", "solved")}) == 8
    test_images = experiment.mnist(train=False)[0]
    same(drawn["test images"], test_images[:10] / 255, atol=1e-6)
    same(drawn["2-RF, one step"], torch.full((10, 28, 28), 0.1), atol=1e-6)
    same(drawn["1-RF, solved"], torch.full((10, 28, 28), 0.5))
    assert list(pictures.values()) == [figure] and "test images above" in next(iter(pictures))
    for flow, again, student, row, last in (asked[:5], asked[5:]):
        assert flow == again == row and student == last != flow


def test_what_the_networks_of_the_eight_gaussians_learn_from(monkeypatch):
    """1-RF, the same for longer, 2-RF from pairs of 1-RF, optimal pairs for both budgets; a student of each teacher."""
    fitted, students = [], []
    monkeypatch.setattr(experiment, "fit", lambda n, source, **o: fitted.append((n, source, o)))
    monkeypatch.setattr(
        experiment,
        "reflow",
        lambda network, noise, **_: torch.stack([noise + len(fitted), noise], 1),
    )
    monkeypatch.setattr(
        experiment, "distill", lambda n, pairs, **o: students.append((n, pairs, o)) or n
    )
    learned = learn_eight_gaussians(0, steps=5, more=3, student_steps=2, pairs=512)
    flows = learned.flows
    names = ("1-RF", "1-RF, trained on", "2-RF", "optimal pairs")
    assert [f[0] for f in fitted] == [flows[name] for name in names]
    assert [f[2]["steps"] for f in fitted] == [5, 3, 3, 8]
    assert torch.equal(fitted[2][1], learned.pairs)
    assert [s[0] for s in students] == [flows["1-RF"], flows["2-RF"]]
    assert torch.equal(students[0][1], learned.pairs) and students[0][2]["steps"] == 2
    noise = learned.pairs[:, 1]
    same(students[0][1], torch.stack([noise + 2, noise], 1))
    same(students[1][1], torch.stack([noise + 3, noise], 1))


def test_eight_gaussians_are_repeated_with_consecutive_seeds(monkeypatch):
    seen = []

    def learn(seed, *, steps):
        seen.append(seed)
        return seed

    monkeypatch.setattr(experiment, "learn_eight_gaussians", learn)
    monkeypatch.setattr(
        experiment,
        "score_eight_gaussians",
        lambda learned, source, target, test, counts: {
            "1-RF": {"S": learned + 0.5, "x": test.sum().item()}
        },
    )
    found = experiment._eight_gaussians_over_seeds(4, 3, {"steps": 2})
    assert seen == [4, 5, 6] and found["1-RF"]["S"] == [4.5, 5.5, 6.5]
    assert len(set(found["1-RF"]["x"])) == 3 and len(found["floor"]["1"]) == 3
    assert all(0 < floor < 0.12 for floor in found["floor"]["1"])
