"""Oracles: torchdiffeq, SciPy, torchcfm, diffusers, POT and zuko; autograd; Gaussian mixtures, where all is known."""

import itertools
import math

import diffusers
import numpy as np
import ot
import pytest
import torch
import torchcfm
import torchdiffeq
import zuko
from matplotlib.figure import Figure
from scipy.integrate._ivp.rk import RK45
from torch import nn

pytest.register_assert_rewrite("flow_contract")
from flow_contract import *  # noqa: E402, F403
from flow_contract import Case  # noqa: E402

from noise2tokens.flow_vs_diffusion import experiment  # noqa: E402
from noise2tokens.flow_vs_diffusion.cnf import (  # noqa: E402
    ContinuousFlow,
    draw_probe,
    exact_divergence,
    hutchinson_divergence,
    log_likelihood,
    with_log_det,
)
from noise2tokens.flow_vs_diffusion.diffusion import (  # noqa: E402
    NoiseSchedule,
    ancestral_sample,
    ancestral_step,
    draw_steps,
    eps_loss,
    posterior,
    q_sample,
)
from noise2tokens.flow_vs_diffusion.experiment import score_images  # noqa: E402
from noise2tokens.flow_vs_diffusion.flow_matching import (  # noqa: E402
    cfm_loss,
    draw_times,
    pair_by_transport,
    predicted_velocity,
)
from noise2tokens.flow_vs_diffusion.integrators import (  # noqa: E402
    FIFTH,
    FOURTH,
    NODES,
    STAGES,
    dormand_prince,
    euler_step,
    heun_step,
    integrate,
    rk4_step,
)
from noise2tokens.flow_vs_diffusion.mixture import GaussianMixture  # noqa: E402
from noise2tokens.flow_vs_diffusion.paths import (  # noqa: E402
    KINDS,
    LinearPath,
    VarianceExplodingPath,
    VariancePreservingPath,
    per_sample,
)
from noise2tokens.networks import TimeMLP, UNet, time_features  # noqa: E402
from noise2tokens.toys import EightGaussians  # noqa: E402
from noise2tokens.training import fit  # noqa: E402

PATHS = [LinearPath(), VariancePreservingPath(), VarianceExplodingPath(0.05, 8.0)]


def samples(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def times(n, low=0.05, high=0.95):
    return torch.linspace(low, high, n, dtype=torch.float64)


def same(ours, theirs, atol=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.fixture(params=PATHS, ids=lambda path: type(path).__name__)
def path(request):
    return request.param


def lopsided():
    """A mixture without symmetry: three centers, unequal weights."""
    centers = torch.tensor([[1.5, 0.2], [-1.0, 1.0], [0.3, -1.7]], dtype=torch.float64)
    return GaussianMixture(centers, 0.4, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))


# Integrators


def swinging(x, t):
    """Nonlinear, and different for every sample and time."""
    return torch.stack([x[:, 1] + t.cos(), -x[:, 0].sin() - 0.3 * x[:, 1] * t], 1)


def test_formulas_on_a_linear_equation_are_taylor_sums():
    matrix, x, h = samples(3, 3, seed=1), samples(4, 3), 0.3
    for step, order in ((euler_step, 1), (heun_step, 2), (rk4_step, 4)):
        powers = [torch.linalg.matrix_power(h * matrix, k) for k in range(order + 1)]
        taylor = sum(power / math.factorial(k) for k, power in enumerate(powers))
        same(step(lambda y, t: y @ matrix.T, x, 0, h), x @ taylor.T, atol=1e-12)


def test_formulas_in_pure_time_are_quadratures():
    t, h, x = 0.7, 0.4, samples(2, 3)

    def only_time(y, s):
        return per_sample(s.exp(), y).expand_as(y)

    a, m, b = (math.exp(s) for s in (t, t + h / 2, t + h))
    same(euler_step(only_time, x, t, h), x + h * a)
    same(heun_step(only_time, x, t, h), x + h / 2 * (a + b))
    same(rk4_step(only_time, x, t, h), x + h / 6 * (a + 4 * m + b))


@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_orders(method, order):
    x = samples(3, 2)
    exact = torchdiffeq.odeint(
        lambda t, y: swinging(y, t.expand(3)),
        x,
        torch.tensor([1.0, 0.0], dtype=torch.float64),
        rtol=1e-12,
        atol=1e-12,
    )[-1]
    errors = [
        (
            integrate(swinging, x, torch.linspace(1, 0, n + 1, dtype=torch.float64), method)[-1]
            - exact
        )
        .abs()
        .max()
        .item()
        for n in (20, 40)
    ]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)
    assert errors[1] < 0.05


def test_fixed_steps_are_those_of_torchdiffeq():
    x, grid = samples(3, 2), torch.tensor([0.0, 0.1, 0.4, 1.0], dtype=torch.float64)
    theirs = torchdiffeq.odeint(lambda t, y: swinging(y, t.expand(3)), x, grid, method="euler")
    same(integrate(swinging, x, grid), theirs)
    classic = integrate(swinging, x, torch.linspace(0, 1, 11, dtype=torch.float64), "rk4")[-1]
    options = {
        "method": "rk4",
        "options": {"step_size": 0.1},
    }  # the 3/8 rule: same order, other formula
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    other = torchdiffeq.odeint(lambda t, y: swinging(y, t.expand(3)), x, ends, **options)[-1]
    assert 0 < (classic - other).abs().max() < 1e-5


def test_integrate_keeps_the_way_and_its_gradient():
    x = samples(3, 2).requires_grad_()
    way = integrate(swinging, x, [1.0, 0.6, 0.1], "heun")
    assert way.shape == (3, 3, 2) and torch.equal(way[0], x)
    same(way[1], heun_step(swinging, x, 1.0, -0.4))
    same(way[2], heun_step(swinging, way[1], 0.6, -0.5))
    assert torch.autograd.gradcheck(lambda y: integrate(swinging, y, [1.0, 0.6, 0.1], "rk4")[-1], x)


def test_tableau_is_scipys():
    for row, ours in zip(RK45.A[1:], STAGES[1:6], strict=True):
        np.testing.assert_allclose(row[: len(ours)], ours, rtol=1e-14)
        assert not row[len(ours) :].any()
    np.testing.assert_allclose(RK45.C, NODES[:6], rtol=1e-14)
    np.testing.assert_allclose(RK45.B, FIFTH[:6], rtol=1e-14)
    np.testing.assert_allclose(RK45.E, np.subtract(FOURTH, FIFTH), rtol=1e-12, atol=1e-16)
    assert NODES[6] == 1 and STAGES[6] == FIFTH[:6] and FIFTH[6] == 0


@pytest.mark.parametrize("start, end", [(0, 1), (1, 0), (0.25, 3.0)])
def test_dormand_prince_solves_like_torchdiffeq(start, end):
    x = samples(5, 2)
    ours = dormand_prince(swinging, x, start, end, 1e-10, 1e-10)
    span = torch.tensor([start, end], dtype=torch.float64)
    exact = torchdiffeq.odeint(
        lambda t, y: swinging(y, t.expand(5)), x, span, rtol=1e-13, atol=1e-13
    )[-1]
    same(ours.x, exact, atol=1e-8)
    assert ours.times[0] == start and ours.times[-1] == end
    gaps = np.diff(ours.times) * (1 if end > start else -1)
    assert (gaps > 0).all()


def test_dormand_prince_counts_and_keeps_its_tolerance():
    calls = []

    def counted(x, t):
        calls.append(t)
        return swinging(x, t)

    x = samples(5, 2)
    exact = dormand_prince(swinging, x, 0, 4, 1e-12, 1e-12).x
    before = 0
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9):
        calls.clear()
        found = dormand_prince(counted, x, 0, 4, tolerance, tolerance)
        assert found.evaluations == len(calls) > before
        before = found.evaluations
        error = (found.x - exact).square().mean().sqrt()
        assert 1e-3 * tolerance < error < 10 * tolerance
        assert found.evaluations >= 1 + 6 * (len(found.times) - 1)


def test_dormand_prince_takes_the_step_it_should():
    """Every step by hand: scipy's formula, the error norm and the next step's length."""
    x, rtol, atol = samples(4, 2), 1e-7, 1e-9
    found = dormand_prince(swinging, x, 0.5, 2.0, rtol, atol)
    assert found.evaluations == 1 + 6 * (len(found.times) - 1), "this case has no rejected step"
    y, steps = x, np.diff(found.times)
    for i, (t, h) in enumerate(zip(found.times, steps, strict=False)):
        slopes = []
        for c, row in zip(RK45.C, RK45.A, strict=True):
            inner = y + h * sum(a * k for a, k in zip(row, slopes, strict=False)) if slopes else y
            slopes.append(swinging(inner, torch.full((4,), t + c * h, dtype=torch.float64)))
        new = y + h * sum(b * k for b, k in zip(RK45.B, slopes, strict=True))
        slopes.append(swinging(new, torch.full((4,), t + h, dtype=torch.float64)))
        difference = h * sum(e * k for e, k in zip(RK45.E, slopes, strict=True))
        norm = (
            (difference / (atol + rtol * torch.maximum(y.abs(), new.abs()))).square().mean().sqrt()
        )
        assert norm <= 1
        if i + 2 < len(steps):  # the last step is cut at the end
            assert steps[i + 1] / h == pytest.approx(min(10, 0.9 * norm.item() ** -0.2), rel=1e-9)
        y = new
    same(found.x, y)


def test_dormand_prince_rejects_and_recovers():
    def kicked(x, t):
        return x * 0 + 1 / (1e-4 + (t[:, None] - 0.5) ** 2)

    x = torch.zeros(1, 1, dtype=torch.float64)
    found = dormand_prince(kicked, x, 0, 1, 1e-8, 1e-8)
    assert found.evaluations > 1 + 6 * (len(found.times) - 1)
    assert found.x.item() == pytest.approx(200 * math.atan(50), rel=1e-7)


def test_dormand_prince_on_what_it_cannot_solve():
    x = torch.ones(2, 1)
    with pytest.raises(FloatingPointError, match="the step at t = "):
        dormand_prince(lambda y, t: 1 / (t[:, None] - 0.5).abs() ** 1.5, x, 0, 1)
    with pytest.raises(FloatingPointError, match="gave up"):
        dormand_prince(lambda y, t: -1e4 * (y - t[:, None].cos()), x, 0, 1, max_evaluations=500)
    with pytest.raises(FloatingPointError, match="not finite"):
        dormand_prince(lambda y, t: y * math.nan, x, 0, 1)
    few = dormand_prince(lambda y, t: -y, x, 0, 1)
    again = dormand_prince(lambda y, t: -y, x, 0, 1, max_evaluations=few.evaluations - 1)
    assert torch.equal(few.x, again.x), "what was reached with the last evaluations is an answer"


def test_integrators_refuse(unchecked):
    x = samples(2, 2)
    with pytest.raises(ValueError, match="method must be one of"):
        integrate(swinging, x, [0.0, 1.0], "midpoint")
    for bad in ([0.0], [0.0, 0.0], [0.0, 1.0, 0.5], []):
        with pytest.raises(ValueError, match="rise or fall"):
            integrate(swinging, x, bad)
    for bad in (
        dict(start=1, end=1),
        dict(start=0, end=1, rtol=0.0),
        dict(start=0, end=1, atol=-1.0),
    ):
        with pytest.raises(ValueError, match="start != end and positive"):
            dormand_prince(swinging, x, **bad)


# Paths


def test_derivatives_are_autograds(path):
    t = times(9).requires_grad_()
    for value, claimed in (
        (path.alpha(t), path.alpha_dot(t)),
        (path.sigma(t), path.sigma_dot(t)),
        (path.sigma(t) ** 2, path.sigma_squared_dot(t)),
    ):
        # A constant has no graph: add one whose slope is 0.
        (slope,) = torch.autograd.grad((value + 0 * t).sum(), t)
        same(claimed, slope)


def test_path_goes_from_data_to_noise():
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for path in PATHS[:2]:
        assert path.alpha(zero) == 1 and path.sigma(zero) == 0
        assert path.sigma(one) > 0.9999 and path.alpha(one) < 0.01
    assert (PATHS[2].sigma(zero) - 0.05).abs() < 1e-12 and (PATHS[2].sigma(one) - 8).abs() < 1e-12
    assert torch.equal(PATHS[2].alpha(one), one)


def test_variance_preserving_path_is_what_its_rate_says():
    path = VariancePreservingPath(0.3, 7.0)
    t = times(5)
    same(path.beta(torch.tensor([0.0, 1.0])), torch.tensor([0.3, 7.0]), atol=1e-6)
    integral = torch.stack(
        [torch.trapezoid(path.beta(s := torch.linspace(0, end, 10_001).double()), s) for end in t]
    )
    same(path.alpha(t), (-integral / 2).exp(), atol=1e-7)
    same(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones_like(t))
    # Little noise must not be lost to rounding: at t = 1e-8 the variance is β_min t.
    tiny = torch.tensor([1e-8])
    assert path.sigma(tiny).item() == pytest.approx((0.3e-8) ** 0.5, rel=1e-5)


def test_variance_exploding_path_is_geometric():
    path = VarianceExplodingPath(0.05, 8.0)
    same(path.sigma(torch.tensor([0.5])), torch.tensor([(0.05 * 8) ** 0.5]), atol=1e-6)


def test_linear_path_is_torchcfms_reversed():
    x0, eps, t = samples(6, 3), samples(6, 3, seed=1), times(6)
    peer = torchcfm.ConditionalFlowMatcher(sigma=0.0)
    _, x_t, u_t = peer.sample_location_and_conditional_flow(eps, x0, 1 - t)
    same(LinearPath().sample(x0, eps, t), x_t)
    same(LinearPath().velocity(x0, eps, t), -u_t)
    lipman = torchcfm.TargetConditionalFlowMatcher(sigma=0.0)
    x_t = LinearPath().sample(x0, eps, t)
    same(LinearPath().velocity(x0, eps, t), -lipman.compute_conditional_flow(eps, x0, 1 - t, x_t))


def test_torchcfms_variance_preserving_is_another_path():
    x0, eps, t = samples(6, 3), samples(6, 3, seed=1), times(6)
    peer = torchcfm.VariancePreservingConditionalFlowMatcher(sigma=0.0)
    _, x_t, _ = peer.sample_location_and_conditional_flow(eps, x0, 1 - t)
    angle = math.pi / 2 * t[:, None]
    same(x_t, angle.cos() * x0 + angle.sin() * eps)
    assert (VariancePreservingPath().sample(x0, eps, t) - x_t).abs().max() > 0.1


def test_velocity_is_the_derivative_along_the_path(path):
    x0, eps, t = samples(4, 2, 3), samples(4, 2, 3, seed=1), times(4)
    _, slope = torch.func.jvp(lambda s: path.sample(x0, eps, s), (t,), (torch.ones_like(t),))
    same(path.velocity(x0, eps, t), slope)


def test_conversions_agree_with_the_ends(path):
    x0, eps, t = samples(4, 2, 3), samples(4, 2, 3, seed=1), times(4)
    x = path.sample(x0, eps, t)
    values = {
        "x0": x0,
        "eps": eps,
        "velocity": path.velocity(x0, eps, t),
        "score": -eps / per_sample(path.sigma(t), x),
    }
    assert set(values) == set(KINDS)
    for source, target in itertools.product(KINDS, KINDS):
        same(path.convert(values[source], x, t, source, target), values[target], atol=1e-9)


def test_paths_refuse(path, unchecked):
    x, t = samples(2, 2), times(2)
    for source, target in (("v", "eps"), ("eps", "noise")):
        with pytest.raises(ValueError, match="kinds are"):
            path.convert(x, x, t, source, target)
    for bad in ((0.0, 1.0), (2.0, 1.0), (-1.0, 1.0)):
        with pytest.raises(ValueError, match="beta_min"):
            VariancePreservingPath(*bad)
    for bad in ((0.0, 1.0), (1.0, 1.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match="sigma_min"):
            VarianceExplodingPath(*bad)


# Mixtures


def test_density_is_that_of_torch_distributions(path):
    mixture, x, t = lopsided(), 2 * samples(7, 2), times(7)
    for point, time, ours in zip(x, t, mixture.log_density(x, t, path), strict=True):
        alpha, sigma = path.alpha(time).item(), path.sigma(time).item()
        std = (alpha**2 * 0.4**2 + sigma**2) ** 0.5
        components = torch.distributions.Independent(
            torch.distributions.Normal(alpha * mixture.centers, std), 1
        )
        theirs = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(mixture.weights), components
        )
        same(ours, theirs.log_prob(point))


def test_density_of_the_toy_at_time_zero():
    x = EightGaussians().sample(500, torch.Generator().manual_seed(0)).double()
    mixture = GaussianMixture(EightGaussians().means, 0.15)
    ours = mixture.log_density(x, x.new_zeros(500), LinearPath())
    same(ours, EightGaussians().log_prob(x))


def test_score_is_autograds_and_conversions_hold_for_conditional_means(path):
    mixture, x, t = lopsided(), samples(7, 2).requires_grad_(), times(7)
    (score,) = torch.autograd.grad(mixture.log_density(x, t, path).sum(), x)
    x = x.detach()
    values = {
        "score": score,
        "x0": mixture.x0(x, t, path),
        "velocity": mixture.velocity(x, t, path),
    }
    same(mixture.score(x, t, path), score)
    for (source, value), target in itertools.product(values.items(), values):
        same(path.convert(value, x, t, source, target), values[target], atol=1e-9)


def test_velocity_and_density_solve_the_continuity_equation(path):
    mixture, x, t = lopsided(), samples(6, 2), times(6)
    for point, time in zip(x, t, strict=True):

        def density(p, s):
            return mixture.log_density(p[None], s[None], path)[0].exp()

        def flux(p, time=time):
            return density(p, time) * mixture.velocity(p[None], time[None], path)[0]

        change = torch.func.grad(density, argnums=1)(point, time)
        outflow = torch.func.jacrev(flux)(point).trace()
        assert abs(change + outflow) < 1e-12


def test_mixture_at_time_zero_is_finite():
    mixture, x = lopsided(), samples(5, 2)
    for path in PATHS[:2]:
        at_zero = mixture.velocity(x, x.new_zeros(5), path)
        near = mixture.velocity(x, x.new_full((5,), 1e-7), path)
        same(at_zero, near, atol=1e-4)
        same(mixture.x0(x, x.new_zeros(5), path), x)


def test_sample_of_the_mixture():
    mixture = lopsided()
    x = mixture.sample(40_000, torch.Generator().manual_seed(0))
    mean = mixture.weights @ mixture.centers
    centered = mixture.centers - mean
    spread = (mixture.weights[:, None, None] * centered[:, :, None] * centered[:, None]).sum(0)
    same(x.mean(0), mean, atol=0.02)
    same(torch.cov(x.T), spread + 0.16 * torch.eye(2), atol=0.04)
    assert torch.equal(x, mixture.sample(40_000, torch.Generator().manual_seed(0)))


def test_mixture_refuses(unchecked):
    centers = torch.zeros(2, 2)
    for std, weights in ((0.0, None), (1.0, torch.tensor([0.5, 0.6])), (1.0, torch.tensor([1, 0]))):
        with pytest.raises(ValueError, match="std > 0"):
            GaussianMixture(centers, std, weights)


# DDPM


def scheduler(**options):
    peer = diffusers.DDPMScheduler(clip_sample=False, variance_type="fixed_small", **options)
    peer.one = peer.one.double()
    return doubled(peer)


def doubled(peer):
    """diffusers keeps its coefficients in float32: compute them again in float64."""
    peer.betas = peer.betas.double()
    peer.alphas_cumprod = (1 - peer.betas).cumprod(0)
    return peer


@pytest.mark.parametrize(
    "ours, name",
    [(NoiseSchedule.linear(), "linear"), (NoiseSchedule.cosine(), "squaredcos_cap_v2")],
)
def test_schedules_are_those_of_diffusers(ours, name):
    peer = diffusers.DDPMScheduler(beta_schedule=name)
    assert ours.steps == 1000 and ours.alpha_bar[0] == 1 and ours.beta[0] == 0
    same(ours.beta[1:].float(), peer.betas, atol=2e-6)
    same(ours.alpha_bar[1:].float(), peer.alphas_cumprod, atol=2e-6)
    assert ours.beta[-1] == (0.999 if name != "linear" else 0.02)


def test_schedule_shapes_to_the_sample():
    schedule = NoiseSchedule(torch.tensor([0.1, 0.2, 0.5]))
    at = schedule.at(torch.tensor([0, 1, 2, 3]), torch.zeros(4, 1, 2, 2))
    assert at.shape == (4, 1, 1, 1) and at.dtype == torch.float32
    same(at.flatten(), torch.tensor([1, 0.9, 0.72, 0.36]), atol=1e-6)
    for bad in (-1, 4):
        with pytest.raises(ValueError, match="steps must lie in 0..3"):
            schedule.at(torch.tensor([bad]), torch.zeros(1, 2))
    for bad in ([0.0, 0.1], [0.1, 1.0]):
        with pytest.raises(ValueError, match="variances must lie"):
            NoiseSchedule(torch.tensor(bad))


def test_jump_is_that_of_diffusers_and_of_many_steps():
    schedule, x0, eps = NoiseSchedule.linear(), samples(3, 2, 2), samples(3, 2, 2, seed=1)
    n = torch.tensor([1, 400, 1000])
    peer = doubled(diffusers.DDPMScheduler(beta_end=0.02, beta_start=1e-4))
    peer.alphas_cumprod = schedule.alpha_bar[1:]
    same(q_sample(schedule, x0, eps, n), peer.add_noise(x0, eps, n - 1))
    # Noise added step by step: variance v -> (1 - β) v + β, starting from 0.
    variance, signal = 0.0, 1.0
    for beta in schedule.beta[1:401].tolist():
        variance, signal = (1 - beta) * variance + beta, signal * (1 - beta) ** 0.5
    assert signal**2 == pytest.approx(schedule.alpha_bar[400].item(), rel=1e-12)
    assert variance == pytest.approx(1 - schedule.alpha_bar[400].item(), rel=1e-12)


def test_posterior_is_bayes():
    """The product of two Gaussians in x_{n-1}: one given x_0, one through x_n."""
    schedule, x0, x = NoiseSchedule.cosine(50), samples(3, 4), samples(3, 4, seed=1)
    n = torch.tensor([2, 20, 50])
    mean, variance = posterior(schedule, x0, x, n)
    before, beta = schedule.alpha_bar[n - 1][:, None], schedule.beta[n][:, None]
    precision = 1 / (1 - before) + (1 - beta) / beta
    same(variance, 1 / precision)
    same(mean, (before.sqrt() * x0 / (1 - before) + (1 - beta).sqrt() * x / beta) / precision)
    mean, variance = posterior(schedule, x0, x, torch.ones(3, dtype=torch.long))
    same(mean, x0)
    assert not variance.any()
    with pytest.raises(ValueError, match="steps must lie"):
        posterior(schedule, x0, x, torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("n", [1, 2, 500, 1000])
def test_ancestral_step_is_that_of_diffusers(n):
    schedule, peer = NoiseSchedule.linear(), scheduler()
    x, eps = samples(4, 3), samples(4, 3, seed=1)
    peer.alphas_cumprod = schedule.alpha_bar[1:]
    noise = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    theirs = peer.step(eps, n - 1, x, generator=torch.Generator().manual_seed(5)).prev_sample
    seen = []
    ours = ancestral_step(lambda y, t: seen.append(t) or eps, schedule, x, n, noise)
    same(ours, theirs, atol=1e-9)
    assert torch.equal(seen[0], torch.full((4,), n / 1000, dtype=torch.float64))


def test_ancestral_step_is_ddim_with_eta_one():
    schedule = NoiseSchedule.linear()
    peer = doubled(diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True))
    peer.alphas_cumprod = schedule.alpha_bar[1:]
    peer.set_timesteps(1000)
    x, eps, noise = samples(4, 3), samples(4, 3, seed=1), samples(4, 3, seed=2)
    for n in (2, 500, 1000):
        theirs = peer.step(eps, n - 1, x, eta=1.0, variance_noise=noise).prev_sample
        same(ancestral_step(lambda y, t: eps, schedule, x, n, noise), theirs, atol=1e-9)


def test_chain_samples_a_gaussian_when_the_noise_is_known():
    """For data N(m, s²) the best guess of ε is known; a long chain must end at m and s."""
    schedule, m, s = NoiseSchedule.linear(), 1.5, 0.5

    def best(x, t):
        alpha_bar = schedule.alpha_bar[(t * 1000).round().long()].to(x)[:, None]
        residual = (x - alpha_bar.sqrt() * m) / (alpha_bar * s**2 + 1 - alpha_bar)
        return (1 - alpha_bar).sqrt() * residual

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(8000, 1, generator=generator)
    x = ancestral_sample(best, schedule, start, generator)
    assert x.mean().item() == pytest.approx(m, abs=0.02)
    assert x.std().item() == pytest.approx(s, abs=0.02)
    again = torch.Generator().manual_seed(0)
    start = torch.randn(8000, 1, generator=again)
    assert torch.equal(x, ancestral_sample(best, schedule, start, again))


def test_chain_visits_every_step():
    seen = []
    ancestral_sample(
        lambda x, t: seen.append(t[0].item()) or x, NoiseSchedule.cosine(4), samples(2, 1)
    )
    assert seen == [1.0, 0.75, 0.5, 0.25]


def test_eps_loss_asks_for_the_noise():
    schedule, x0, eps = NoiseSchedule.linear(10), samples(3, 2), samples(3, 2, seed=1)
    n, seen = torch.tensor([1, 5, 10]), []
    loss = eps_loss(lambda x, t: seen.append((x, t)) or 0 * x + 0.5, schedule, x0, eps, n)
    same(loss, ((eps - 0.5) ** 2).mean())
    same(seen[0][0], q_sample(schedule, x0, eps, n))
    same(seen[0][1], n.double() / 10)
    steps = draw_steps(NoiseSchedule.linear(4), torch.zeros(4000, 1))
    assert torch.bincount(steps)[0] == 0 and (torch.bincount(steps)[1:] > 850).all()
    assert len(torch.bincount(steps)) == 5


def test_linear_schedule_is_the_variance_preserving_path():
    schedule, path = NoiseSchedule.linear(), VariancePreservingPath()
    t = torch.arange(1001, dtype=torch.float64) / 1000
    same(schedule.alpha_bar.sqrt(), path.alpha(t), atol=5e-3)


# Flow matching


def test_cfm_loss_is_torchcfms(path):
    network = TimeMLP(3, 8, 1).double()
    x0, eps, t = samples(6, 3), samples(6, 3, seed=1), times(6)
    loss = cfm_loss(network, path, x0, eps, t)
    x = path.sample(x0, eps, t)
    same(loss, (network(x, t) - path.velocity(x0, eps, t)).square().mean())
    if isinstance(path, LinearPath):
        peer = torchcfm.ConditionalFlowMatcher(sigma=0.0)
        _, x_t, u_t = peer.sample_location_and_conditional_flow(eps, x0, 1 - t)
        same(loss, (network(x_t, t) + u_t).square().mean())


def test_transport_pairs_are_those_of_pot():
    x0, eps = samples(40, 3), samples(40, 3, seed=1)
    cost = torch.cdist(x0, eps).square()
    uniform = np.full(40, 1 / 40)
    plan = torch.as_tensor(ot.emd(uniform, uniform, cost.numpy()))
    same(pair_by_transport(x0, eps), eps[plan.argmax(1)])
    few, noise = samples(6, 2), samples(6, 2, seed=1)
    best = min(
        itertools.permutations(range(6)),
        key=lambda order: (few - noise[list(order)]).square().sum().item(),
    )
    same(pair_by_transport(few, noise), noise[list(best)])
    pictures = samples(6, 1, 2, 2)
    assert pair_by_transport(pictures, pictures.flip(0)).equal(pictures)


def test_times():
    t = draw_times(torch.zeros(5000, 2, dtype=torch.float64), 0.2)
    assert t.dtype == torch.float64 and t.min() >= 0.2 and t.max() < 1
    assert t.mean().item() == pytest.approx(0.6, abs=0.02)
    assert t.min() < 0.21
    for bad in (-0.1, 1.0):
        with pytest.raises(ValueError, match="earliest"):
            draw_times(torch.zeros(2, 2), bad)


def test_any_prediction_is_a_velocity(path):
    mixture, x, t = lopsided(), samples(5, 2), times(5)
    exact = mixture.velocity(x, t, path)
    for source, network in (("x0", mixture.x0), ("score", mixture.score)):
        velocity = predicted_velocity(lambda y, s, f=network: f(y, s, path), path, source)
        same(velocity(x, t), exact, atol=1e-9)


def test_conditional_loss_has_the_gradient_of_the_marginal_loss():
    """Theorem 2, with the expectation over everything done by quadrature: one dimension, two data points."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    eps = torch.tensor(nodes)[:, None]
    weights = torch.tensor(weights / weights.sum())
    centers = torch.tensor([[-1.0], [0.7]], dtype=torch.float64)
    path, t = LinearPath(), torch.full((60,), 0.6, dtype=torch.float64)
    torch.manual_seed(0)
    network = TimeMLP(1, 8, 1).double()

    def gradient(loss):
        return torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(loss, network.parameters(), retain_graph=True)
            ]
        )

    conditional = marginal = 0
    for center in centers:
        x0 = center.expand(60, 1)
        x = path.sample(x0, eps, t)
        odds = torch.stack([-((x - 0.4 * c) ** 2) / (2 * 0.36) for c in centers]).softmax(0)
        ends = [(c.expand(60, 1), (x - 0.4 * c) / 0.6) for c in centers]
        mean = sum(o * path.velocity(*end, t) for o, end in zip(odds, ends, strict=True))
        v = network(x, t)
        conditional += (weights @ (v - path.velocity(x0, eps, t)).square()).sum() / 2
        marginal += (weights @ (v - mean).square()).sum() / 2
    difference = gradient(conditional) - gradient(marginal)
    assert conditional - marginal > 0.1
    assert difference.abs().max() < 1e-6 * gradient(marginal).abs().max()


# Continuous flows


class Bend(nn.Module):
    """A smooth velocity with a dependence on time, for vectors or images."""

    def __init__(self, *shape):
        super().__init__()
        size = math.prod(shape)
        self.shape, self.mix, self.out = shape, nn.Linear(size, size), nn.Linear(size, size)
        self.time = nn.Parameter(torch.randn(size))

    def forward(self, x, t):
        h = self.mix(x.flatten(1)) + t[:, None] * self.time
        return 0.25 * self.out(h.tanh()).view_as(x)


CASES = [
    Case("continuous-vector", lambda: ContinuousFlow((2,), Bend(2), 8), tolerance=1e-8),
    Case("continuous-image", lambda: ContinuousFlow((1, 1, 2), Bend(1, 1, 2), 8), tolerance=1e-8),
]


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return request.param


def bend(dim=3, seed=0):
    torch.manual_seed(seed)
    return Bend(dim).double()


def test_divergences_are_traces_of_autograds_jacobian():
    network, x, t = bend(), samples(4, 3), times(4)
    v, exact = exact_divergence(network, x, t)
    same(v, network(x, t))
    for i in range(4):
        jacobian = torch.autograd.functional.jacobian(
            lambda y, i=i: network(y[None], t[i : i + 1])[0], x[i]
        )
        same(exact[i], jacobian.trace())
    # The mean over all sign vectors is the expectation over random signs.
    signs = [torch.tensor(s, dtype=torch.float64) for s in itertools.product((-1, 1), repeat=3)]
    estimates = [hutchinson_divergence(network, x, t, s.expand(4, 3)) for s in signs]
    same(estimates[0][0], v)
    same(torch.stack([e for _, e in estimates]).mean(0), exact)
    assert torch.stack([e for _, e in estimates]).std(0).min() > 1e-3
    probe = samples(4, 3, seed=3)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda y, s: network(y[None], s[None])[0]))(x, t)
    _, estimate = hutchinson_divergence(network, x, t, probe)
    same(estimate, torch.einsum("bi,bij,bj->b", probe, jacobians, probe))


def test_probe():
    x = torch.zeros(500, 2, 3, dtype=torch.float64)
    probe = draw_probe(x, torch.Generator().manual_seed(0))
    assert probe.shape == x.shape and probe.dtype == x.dtype
    assert set(probe.unique().tolist()) == {-1.0, 1.0}
    assert probe.mean().abs() < 0.06
    assert torch.equal(probe, draw_probe(x, torch.Generator().manual_seed(0)))


def test_divergence_of_the_unet_needs_no_graph():
    torch.manual_seed(0)
    network = UNet(1, 8).double()
    nn.init.normal_(network.end[-1].weight)
    x, t = samples(2, 1, 8, 8), times(2)
    probe = draw_probe(x, torch.Generator().manual_seed(0))
    y = x.clone().requires_grad_()
    (backward,) = torch.autograd.grad((network(y, t) * probe).sum(), y)
    with torch.no_grad():
        _, estimate = hutchinson_divergence(network, x, t, probe)
    same(estimate, (backward * probe).flatten(1).sum(1), atol=1e-10)


def test_linear_equation_is_the_matrix_exponential():
    matrix = samples(3, 3, seed=4) / 2
    layer = nn.Module()
    layer.forward = lambda x, t: x @ matrix.T
    flow = ContinuousFlow((3,), layer, 30).double()
    x = samples(5, 3)
    z, log_det = flow(x)
    same(z, x @ torch.linalg.matrix_exp(matrix).T, atol=1e-6)
    same(log_det, matrix.trace().expand(5))
    assert isinstance(flow.times, list) and len(flow.times) == 31


def test_forward_with_a_probe_is_unbiased_for_a_linear_equation():
    matrix = samples(3, 3, seed=4) / 2
    layer = nn.Module()
    layer.forward = lambda x, t: x @ matrix.T
    flow, x = ContinuousFlow((3,), layer, 4).double(), samples(1, 3)
    signs = [torch.tensor([s], dtype=torch.float64) for s in itertools.product((-1, 1), repeat=3)]
    found = [flow(x, probe) for probe in signs]
    same(torch.stack([log_det for _, log_det in found]).mean(0), matrix.trace()[None])
    assert torch.stack([log_det for _, log_det in found]).std() > 0.1
    assert all(torch.equal(z, flow(x)[0]) for z, _ in found)


def test_flow_and_likelihood_agree_with_zuko():
    network, x = bend(), samples(4, 3)
    flow = ContinuousFlow((3,), network, 40).double()

    def field(t, y):
        return network(y, t.expand(y.shape[:-1]))

    peer = zuko.transforms.FreeFormJacobianTransform(
        field, t0=0.0, t1=1.0, phi=tuple(network.parameters()), atol=1e-9, rtol=1e-9, exact=True
    )
    z, ladj = peer.call_and_ladj(x)
    ours, log_det = flow(x)
    same(ours, z, atol=1e-6)
    same(log_det, ladj, atol=1e-6)
    scored = log_likelihood(network, x, rtol=1e-9, atol=1e-9)
    same(scored.z, z, atol=1e-6)
    same(scored.log_prob, flow.prior.log_prob(z) + ladj, atol=1e-6)
    assert scored.evaluations > 1 and not scored.log_prob.requires_grad


def test_extended_equation():
    network, x, t = bend(4), samples(3, 1, 2, 2), times(3)
    shaped = lambda y, s: network(y.flatten(1), s).view_as(y)  # noqa: E731
    state = torch.cat([x.flatten(1), samples(3, 1, seed=2)], 1)
    v, divergence = exact_divergence(shaped, x, t)
    same(
        with_log_det(shaped, (1, 2, 2))(state, t), torch.cat([v.flatten(1), divergence[:, None]], 1)
    )
    probe = draw_probe(x, torch.Generator().manual_seed(0))
    _, estimate = hutchinson_divergence(shaped, x, t, probe)
    same(with_log_det(shaped, (1, 2, 2), probe)(state, t)[:, -1], estimate)


def test_likelihood_of_the_exact_velocity_is_the_exact_density(path):
    """The noise at t = 1 is exactly normal on the linear path only: on the others, put the exact density there."""
    mixture, x, std = lopsided(), samples(6, 2), 1.7
    scored = log_likelihood(
        lambda y, t: mixture.velocity(y, t, path), x, prior_std=std, rtol=1e-6, atol=1e-6
    )
    prior = torch.distributions.Normal(0.0, std).log_prob(scored.z).sum(1)
    at_noise = mixture.log_density(scored.z, x.new_ones(6), path)
    exact = mixture.log_density(x, x.new_zeros(6), path)
    same(scored.log_prob - prior + at_noise, exact, atol=1e-4)
    if isinstance(path, LinearPath):
        standard = log_likelihood(lambda y, t: mixture.velocity(y, t, path), x)
        same(standard.log_prob, exact, atol=1e-3)
        later = log_likelihood(lambda y, t: mixture.velocity(y, t, path), x, start=0.3)
        same(later.log_prob, mixture.log_density(x, x.new_full((6,), 0.3), path), atol=1e-3)


def test_cnf_refuses(unchecked):
    with pytest.raises(ValueError, match="at least one step"):
        ContinuousFlow((3,), Bend(3), 0)
    for bad in (dict(start=1), dict(start=-0.1), dict(prior_std=0)):
        with pytest.raises(ValueError, match="need 0 <= start < 1"):
            log_likelihood(bend(), samples(2, 3), **bad)


# Networks, classifier, experiment


def test_time_features_are_smooth_and_tell_times_apart():
    t = torch.linspace(0, 1, 200, dtype=torch.float64)
    features = time_features(t, 8)
    assert features.shape == (200, 8)
    same(features[:, 0], t.cos())
    same(features[:, 7], (30 * t).sin(), atol=1e-5)
    same(features[:, :4] ** 2 + features[:, 4:] ** 2, torch.ones(200, 4, dtype=torch.float64))
    assert torch.cdist(features, features).add(torch.eye(200)).min() > 0.05


def test_flow_matching_learns_a_mixture():
    torch.manual_seed(0)
    mixture, path = lopsided(), LinearPath()
    generator = torch.Generator().manual_seed(0)
    network = TimeMLP(2, 32, 2)
    history = fit(
        network,
        lambda x: cfm_loss(network, path, x, torch.randn_like(x), draw_times(x)),
        lambda n: mixture.sample(n, generator).float(),
        steps=300,
        batch_size=256,
        learning_rate=1e-2,
        warmup=0.05,
    )
    x = mixture.sample(1000, generator)
    t = draw_times(x)
    x_t = path.sample(x, torch.randn_like(x), t)
    exact = mixture.velocity(x_t, t, path)
    with torch.no_grad():
        error = (network(x_t.float(), t.float()) - exact).square().mean() / exact.square().mean()
    assert error < 0.2 and len(history.losses) == 300


def test_bits_of_images_of_a_known_model():
    """A velocity that scales pixels: the density of an image is known, and so are its bits."""
    pixels = torch.randint(256, (30, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    bits, evaluations = score_images(lambda x, t: 0.7 * x, pixels, 0, batch_size=12)
    assert bits.shape == (30,) and evaluations > 1
    # x = 2 (v + u) / 256 - 1 is N(0, e^-1.4); averaged over u, with its variance added.
    x = (2 * (pixels.flatten(1) + 0.5) / 256 - 1).double()
    nats = 0.5 * (x**2 + (2 / 256) ** 2 / 12) * math.exp(1.4) + 0.5 * math.log(2 * math.pi) - 0.7
    exact = 7 + nats.mean(1) / math.log(2)
    assert (bits - exact).mean().abs() < 1e-3 and (bits - exact).abs().max() < 0.01
    assert (bits - exact).abs().max() > 1e-4, "every image has its own dequantization noise"


SLICE = dict(
    steps=2, batch_size=8, width=8, samples=31, scored=6, test_images=40, classifier_steps=2,
    counts=(1, 3), chain_samples=5, tolerance=1e-4,
)  # fmt: skip


@pytest.fixture
def experiment_on_digits(fake_mnist, monkeypatch):
    fake_mnist(experiment)
    torch.manual_seed(0)
    return experiment


@pytest.mark.parametrize("kind", experiment.KINDS)
def test_each_kind_is_trained_on_its_own_target(kind, monkeypatch):
    """With a network that knows the one image, loss and velocity are those of that image's path."""
    pixels = torch.full((5, 1, 4, 4), 200, dtype=torch.uint8)
    seen = {}
    path = LinearPath() if kind == "flow matching" else VariancePreservingPath()

    class Knows(nn.Module):
        """The best prediction if all data is x0 = 2 (v + 1/2) / 256 - 1."""

        def __init__(self, *_):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, x, t):
            x0 = torch.full_like(x, 2 * 200.5 / 256 - 1)
            alpha, sigma = per_sample(path.alpha(t), x), per_sample(path.sigma(t), x)
            eps = (x - alpha * x0) / sigma
            wanted = {
                "DDPM": eps,
                "DDPM, v output": alpha * eps - sigma * x0,
                "flow matching": eps - x0,
            }
            return wanted[kind] + 0 * self.unused

    def spy(network, objective, draw, **options):
        seen.update(options)
        batch = draw(64)
        assert batch.shape == (64, 1, 4, 4) and batch.unique().numel() > 500, "no dequantization"
        assert 2 * 200 / 256 - 1 <= batch.min() and batch.max() <= 2 * 201 / 256 - 1 + 1e-6
        seen["loss"] = objective(batch).item()

    monkeypatch.setattr(experiment, "UNet", Knows)
    monkeypatch.setattr(experiment, "fit", spy)
    torch.manual_seed(0)
    eps, velocity, start = experiment.train_kind(kind, pixels, steps=7, batch_size=3, width=8)
    assert seen["steps"] == 7 and seen["batch_size"] == 3 and seen["average"] is not None
    assert seen["loss"] < 2e-2
    assert (eps is None) == (kind == "flow matching")
    assert start == (0 if kind == "flow matching" else 1e-3)
    x, t = torch.randn(4, 1, 4, 4), torch.full((4,), 0.6)
    x0 = torch.full_like(x, 2 * 200.5 / 256 - 1)
    noise = (x - path.alpha(t)[0] * x0) / path.sigma(t)[0]
    expected = path.alpha_dot(t)[0] * x0 + path.sigma_dot(t)[0] * noise
    same(velocity(x, t), expected, atol=1e-4)
    if eps is not None:
        same(eps(x, t), noise, atol=1e-4)


def test_what_full_scale_measures_is_what_it_says(experiment_on_digits, monkeypatch):
    asked, seen = [], {}

    def stand_in(kind, pixels, *, steps, batch_size, width):
        asked.append(
            (kind, tuple(pixels.shape), pixels.dtype, steps, batch_size, width, torch.rand(()))
        )
        eps = None if kind == "flow matching" else (lambda x, t: 0 * x)
        return eps, lambda x, t: x, 0.0 if eps is None else 1e-3

    monkeypatch.setattr(experiment, "train_kind", stand_in)
    monkeypatch.setattr(experiment, "image_rows", lambda rows: seen.update(rows) or Figure())
    monkeypatch.setattr(
        experiment, "ancestral_sample", lambda eps, chain, x: seen.update(chain=chain, part=x) or x
    )
    results, pictures = experiment.full_scale(torch.device("cpu"), seed=3, **SLICE)
    tests = experiment.mnist(train=False)[0][:40]
    assert [a[0] for a in asked] == list(experiment.KINDS)
    assert all(a[1:6] == ((1400, 1, 28, 28), torch.uint8, 2, 8, 8) for a in asked)
    assert len({a[6].item() for a in asked}) == 1, "each training starts from the same seed"
    assert list(results) == ["training images", *experiment.KINDS]
    first = results["DDPM"]
    bits, evaluations = score_images(lambda x, t: x, tests[:6, None], 1e-3, tolerance=1e-4, seed=3)
    assert first["bits"].item() == pytest.approx(bits.mean().item())
    assert first["standard error"].item() == pytest.approx((bits.std() / 6**0.5).item())
    assert first["evaluations"] == evaluations and set(first["distances"]) == {"1", "3"}
    assert "ancestral" in first and "ancestral" not in results["flow matching"]
    assert seen["chain"] is experiment.CHAIN and len(seen["part"]) == 5
    # dx/dt = x from 1 down to 0 divides by e; three Euler steps divide by (3/2)^3.
    noise = torch.randn(31, 1, 28, 28, generator=torch.Generator().manual_seed(3))
    same(seen["part"], noise[:5])
    same(seen["test images"], tests[:10] / 255, atol=1e-6)
    solved = seen["flow matching, adaptive solver"]
    same(solved, (noise[:10, 0] / math.e + 1) / 2, atol=1e-4)
    ends = experiment.euler_end(lambda x, t: x, noise, torch.linspace(1, 0, 4))
    same(ends, noise * (2 / 3) ** 3, atol=1e-5)
    assert first["distances"]["1"] != first["distances"]["3"] != first["adaptive"]
    assert 0.1 <= first["confidence"] <= 1 and "test images above" in next(iter(pictures))
    assert results["training images"]["distance"] < first["adaptive"]


def test_full_scale_says_where_the_solver_gave_up(experiment_on_digits, monkeypatch):
    def rough(kind, pixels, **_):
        def velocity(x, t):
            if kind == "DDPM" and isinstance(t, torch.Tensor) and (t < 0.2).any():
                return torch.full_like(x, math.nan)
            return x

        return None, velocity, 0.0

    monkeypatch.setattr(experiment, "train_kind", rough)
    monkeypatch.setattr(experiment, "frechet_distance", lambda features, real: 1.0)
    results, pictures = experiment.full_scale(
        torch.device("cpu"), seed=3, **SLICE | {"counts": (1,)}
    )
    assert "stiff" in results["DDPM"] and not {"bits", "adaptive"} & set(results["DDPM"])
    assert {"bits", "adaptive"} <= set(results["flow matching"]) and "stiff" not in results[
        "flow matching"
    ]
    assert results["DDPM"]["confidence"] > 0 and len(pictures) == 1


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind must be"):
        experiment.train_kind("GAN", torch.zeros(2, 1, 4, 4).byte(), steps=1, batch_size=1, width=8)
