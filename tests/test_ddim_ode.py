import math

import pytest
import torch
from diffusers import DDIMScheduler
from matplotlib.figure import Figure

from noise2tokens.ddim_ode import experiment as module
from noise2tokens.ddim_ode.experiment import (
    NOISES,
    full_scale,
    sampling_table,
    train_denoiser,
)
from noise2tokens.ddim_ode.ode import (
    HeatPath,
    exponential_sample,
    heat_equation,
    probability_flow,
    reverse_sde_sample,
    sde_coefficients,
    time_at,
)
from noise2tokens.ddim_ode.sampling import (
    as_eps,
    chain_of,
    ddim_sample,
    ddim_step,
    posterior_std,
    slerp,
    sub_sequence,
)
from noise2tokens.distribution_transforms.distances import energy_distance
from noise2tokens.flow_vs_diffusion.cnf import exact_divergence, log_likelihood
from noise2tokens.flow_vs_diffusion.diffusion import NoiseSchedule, posterior
from noise2tokens.flow_vs_diffusion.integrators import integrate
from noise2tokens.flow_vs_diffusion.mixture import GaussianMixture
from noise2tokens.flow_vs_diffusion.paths import (
    LinearPath,
    VarianceExplodingPath,
    VariancePreservingPath,
    per_sample,
)
from noise2tokens.images import digits
from noise2tokens.networks import TimeMLP
from noise2tokens.toys import EightGaussians

VP = VariancePreservingPath()
MIXTURE = GaussianMixture(EightGaussians().means, 0.15)
LINEAR = NoiseSchedule.linear()


def samples(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(ours, theirs, atol=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def exact_eps(mixture, path):
    return lambda x, t: -per_sample(path.sigma(t), x) * mixture.score(x, t, path)


def exact_score(mixture, path):
    return lambda x, t: mixture.score(x, t, path)


def gaussian(mean=2.0, std=0.5):
    return GaussianMixture(torch.tensor([[mean]], dtype=torch.float64), std)


def gaussian_map(x, path, start, end, mean=2.0, std=0.5):
    """The probability flow of a Gaussian in closed form: it keeps the number of standard deviations from the mean."""
    t = torch.tensor([start, end], dtype=torch.float64)
    alpha, sigma = path.alpha(t), path.sigma(t)
    spread = (alpha**2 * std**2 + sigma**2).sqrt()
    return alpha[1] * mean + spread[1] / spread[0] * (x - alpha[0] * mean)


# Peers


def scheduler(**options):
    peer = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=options.pop("clip", False),
        **options,
    )
    # Its products are float32; the formulas are compared at float64.
    peer.alphas_cumprod = LINEAR.alpha_bar[1:]
    peer.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    return peer


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_step_is_that_of_diffusers(eta, clip, spacing):
    peer = scheduler(clip=clip, timestep_spacing=spacing)
    peer.set_timesteps(50)
    steps = sub_sequence(1000, 50, spacing)
    x, eps, noise = (samples(4, 3, seed=i) for i in range(3))
    for timestep, n, s in zip(peer.timesteps, steps, steps[1:], strict=False):
        theirs = peer.step(eps, timestep, x, eta=eta, variance_noise=noise).prev_sample
        ours = ddim_step(LINEAR, x, eps, n, s, eta=eta, clip=clip, noise=noise if eta else None)
        close(ours, theirs)


def test_sampler_is_that_of_diffusers_and_one_off_by_one_is_not():
    chain, peer, start = chain_of(VP, 1000), scheduler(), samples(50, 2)
    peer.alphas_cumprod = chain.alpha_bar[1:]
    peer.set_timesteps(20)
    eps, x = exact_eps(MIXTURE, VP), start
    for timestep in peer.timesteps:
        n = torch.full((50,), timestep.item() + 1, dtype=torch.float64)
        x = peer.step(eps(x, n / 1000), timestep, x).prev_sample
    steps = sub_sequence(1000, 20, "leading")
    close(ddim_sample(eps, chain, start, steps), x, atol=1e-10)
    off = ddim_sample(lambda x, t: eps(x, t + 1e-3), chain, start, steps)
    assert (off - x).abs().max() > 1e-3


@pytest.mark.parametrize(
    "spacing, counts", [("leading", [1, 3, 10, 50, 1000]), ("trailing", [1, 3, 10, 50, 1000])]
)
def test_sub_sequences_are_those_of_diffusers(spacing, counts):
    peer = scheduler(timestep_spacing=spacing)
    for count in counts:
        peer.set_timesteps(count)
        assert sub_sequence(1000, count, spacing) == [*(peer.timesteps + 1).tolist(), 0]


def test_trailing_differs_from_diffusers_by_rounding_alone():
    """Where T - kT/K lies halfway between two steps, rounding errors decide; and they may add a step at the end."""
    peer, longer = scheduler(timestep_spacing="trailing"), []
    for count in range(1, 1001):
        peer.set_timesteps(count)
        theirs, ours = (peer.timesteps + 1).tolist(), sub_sequence(1000, count)
        if len(theirs) > count:
            longer.append(count)
        for k, (a, b) in enumerate(zip(theirs, ours[:-1], strict=False)):
            halfway = (2000 * (count - k)) % (2 * count) == count
            assert a == b or (abs(a - b) == 1 and halfway)
    assert 61 in longer and len(longer) < 100


def test_the_trailing_steps_of_diffusers_do_not_end_where_it_goes_on():
    peer = scheduler(timestep_spacing="trailing")
    peer.set_timesteps(7)
    steps, reached = sub_sequence(1000, 7), [858, 715, 572, 429, 287, 144, 1]
    assert steps == [1000, 857, 714, 571, 429, 286, 143, 0] == [*(peer.timesteps + 1).tolist(), 0]
    x, eps = samples(4, 3), samples(4, 3, seed=1)
    for timestep, n, level in zip(peer.timesteps, steps, reached, strict=False):
        close(peer.step(eps, timestep, x).prev_sample, ddim_step(LINEAR, x, eps, n, level))


def test_linspace_visits_what_diffusers_visits_but_goes_to_where_it_is_next():
    peer = scheduler(timestep_spacing="linspace")
    peer.set_timesteps(10)
    steps = sub_sequence(1000, 10, "linspace")
    assert steps == [*(peer.timesteps + 1).tolist(), 0]
    x, eps = samples(4, 3), samples(4, 3, seed=1)
    theirs = peer.step(eps, peer.timesteps[0], x).prev_sample
    # The library steps by T/S, to 900; the next evaluation is at 889.
    close(theirs, ddim_step(LINEAR, x, eps, 1000, 900))
    assert steps[1] == 889
    assert (theirs - ddim_step(LINEAR, x, eps, 1000, 889)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "first, predicts, last, golden",
    [
        (1e-4, "eps", 0, 172.0067),
        (1e-4, "v", 0, 52.5302),
        (0.01, "eps", 0, 149.8295),
        (0.01, "eps", 1, 149.0784),
    ],
)
def test_the_golden_sums_of_diffusers_come_out(first, predicts, last, golden):
    """Set-up of its test suite (tests/schedulers/test_scheduler_ddim.py, full loops)."""
    size = 4 * 3 * 8 * 8
    ramp = (torch.arange(size) / size).reshape(3, 8, 8, 4).permute(3, 0, 1, 2).double()
    schedule = NoiseSchedule.linear(1000, first, 0.02)

    def model(x, t):
        timestep = (1000 * t).round() - 1
        return x * per_sample(timestep / (timestep + 1), x)

    steps = [*sub_sequence(1000, 10, "leading")[:-1], last]
    final = ddim_sample(as_eps(model, schedule, predicts), schedule, ramp, steps, clip=True)
    assert final.abs().sum().item() == pytest.approx(golden, abs=5e-4)


def test_with_eta_one_neighbors_are_the_posterior_of_chapter_4():
    x0, x, noise = (samples(5, 3, seed=i) for i in range(3))
    for n in (1, 2, 500, 1000):
        alpha_bar = LINEAR.alpha_bar[n]
        eps = (x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
        mean, variance = posterior(LINEAR, x0, x, torch.full((5,), n))
        ours = ddim_step(LINEAR, x, eps, n, n - 1, eta=1, noise=noise)
        close(ours, mean + variance.sqrt() * noise, atol=1e-9)
        assert posterior_std(LINEAR, n, n - 1) ** 2 == pytest.approx(variance[0].item(), abs=1e-12)


# The step


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("n, s", [(1000, 700), (400, 399), (20, 1), (20, 0)])
def test_step_keeps_the_marginals(eta, n, s):
    """x_s is linear in x_0, ε and fresh noise: probe the three coefficients."""
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    alpha_bar = LINEAR.alpha_bar

    def coefficient(x0, eps, noise):
        x = alpha_bar[n].sqrt() * x0 + (1 - alpha_bar[n]).sqrt() * eps
        return ddim_step(LINEAR, x, eps, n, s, eta=eta, noise=noise)

    data = coefficient(one, zero, zero)
    kept, fresh = coefficient(zero, one, zero), coefficient(zero, zero, one)
    close(data**2, alpha_bar[s].view(1, 1))
    assert data > 0 and kept >= 0
    close(kept**2 + fresh**2, 1 - alpha_bar[s].view(1, 1))
    if s:
        assert bool(fresh > 0) == (eta > 0)
        assert fresh.item() == pytest.approx(eta * posterior_std(LINEAR, n, s))


def test_wide_noise_changes_the_noise_and_not_the_mean():
    x, eps, noise = (samples(4, 3, seed=i) for i in range(3))
    mean = ddim_step(LINEAR, x, eps, 500, 300, eta=1, noise=torch.zeros_like(x))
    wide = ddim_step(LINEAR, x, eps, 500, 300, eta=1, wide=True, noise=noise)
    variance = 1 - (LINEAR.alpha_bar[500] / LINEAR.alpha_bar[300])
    close(wide, mean + variance.sqrt() * noise)
    assert variance > posterior_std(LINEAR, 500, 300) ** 2
    last = [ddim_step(LINEAR, x, eps, 50, 0, eta=1, wide=True, noise=z) for z in (noise, -noise)]
    assert torch.equal(*last)


def test_sampler_asks_the_network_at_each_step_but_the_last():
    asked = []

    def network(x, t):
        asked.append(t.tolist())
        return torch.zeros_like(x)

    x = samples(2, 3)
    out = ddim_sample(network, LINEAR, x, [1000, 600, 0])
    assert asked == [[1.0, 1.0], [0.6, 0.6]]
    close(out, x / LINEAR.alpha_bar[1000].sqrt(), atol=1e-9)


@pytest.mark.parametrize("options", [dict(clip=True), dict(eta=0.5), dict(eta=1, wide=True)])
def test_sampler_hands_its_options_on(options):
    x = 3 * samples(4, 3)
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    ours = ddim_sample(
        lambda x, t: torch.zeros_like(x), LINEAR, x, [400, 200], generator=generators[0], **options
    )
    noise = torch.randn(x.shape, generator=generators[1], dtype=x.dtype)
    extra = dict(noise=noise) if "eta" in options else {}
    step = ddim_step(LINEAR, x, torch.zeros_like(x), 400, 200, **options, **extra)
    assert torch.equal(ours, step)
    assert not torch.equal(step, ddim_step(LINEAR, x, torch.zeros_like(x), 400, 200))


def test_sampler_draws_from_its_generator():
    def run(seed, eta=1.0):
        generator = torch.Generator().manual_seed(seed)
        eps = exact_eps(MIXTURE, VP)
        return ddim_sample(eps, LINEAR, samples(4, 2), [1000, 500, 9], eta=eta, generator=generator)

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    assert torch.equal(run(0, 0.0), run(1, 0.0))
    assert not torch.allclose(run(0, 0.5), run(0, 1.0))


def test_without_noise_the_sampler_runs_back_to_where_it_came_from():
    chain = chain_of(VP, 1000)
    x = MIXTURE.sample(200, torch.Generator().manual_seed(0))
    eps = exact_eps(MIXTURE, VP)
    errors = []
    for stride in (10, 5):
        up = list(range(stride, 1001, stride))
        code = ddim_sample(eps, chain, x, up)
        errors.append((ddim_sample(eps, chain, code, up[::-1]) - x).norm(dim=1).mean().item())
    assert errors[1] < 0.65 * errors[0] < 0.1
    assert code.std().item() == pytest.approx(1, abs=0.1)


def test_chain_has_the_noise_of_its_path():
    chain = chain_of(VP, 1000)
    t = torch.arange(1001, dtype=torch.float64) / 1000
    close(chain.alpha_bar, VP.alpha(t) ** 2)
    # The continuous path is the limit of the chain of the DDPM paper.
    close(chain.beta[1:], LINEAR.beta[1:], atol=3e-4)
    with pytest.raises(ValueError, match="α² \\+ σ² = 1"):
        chain_of(LinearPath(), 10)
    with pytest.raises(ValueError, match="starts at α = 1"):
        chain_of(VarianceExplodingPath(0.01, 50), 10)


@pytest.mark.parametrize("predicts", ["eps", "x0", "score", "v"])
def test_every_prediction_leads_to_the_same_noise(predicts):
    x0, eps, n = samples(6, 2), samples(6, 2, seed=1), torch.tensor([1, 10, 100, 500, 999, 1000])
    alpha_bar = LINEAR.alpha_bar[n][:, None]
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    said = {"eps": eps, "x0": x0, "score": -eps / noise, "v": signal * eps - noise * x0}
    network = as_eps(lambda x, t: said[predicts], LINEAR, predicts)
    close(network(signal * x0 + noise * eps, n.double() / 1000), eps, atol=1e-9)


def test_slerp_keeps_lengths_and_turns_evenly():
    a, b = samples(5, 2, 3), samples(5, 2, 3, seed=1)
    a, b = a / a.flatten(1).norm(dim=1)[:, None, None], b / b.flatten(1).norm(dim=1)[:, None, None]
    angle = (a * b).flatten(1).sum(1).acos()
    close(slerp(a, b, 0), a)
    close(slerp(a, b, 1), b)
    for share in (0.25, 0.5, 0.9):
        between = slerp(a, b, share)
        close(between.flatten(1).norm(dim=1), torch.ones(5, dtype=torch.float64))
        close((between * a).flatten(1).sum(1).acos(), share * angle, atol=1e-7)
    right = torch.eye(2, dtype=torch.float64)
    close(
        slerp(2 * right[:1], 3 * right[1:], 1 / 3),
        torch.tensor([[3**0.5, 1.5]], dtype=torch.float64),
    )


# The equations


def test_coefficients_of_the_known_diffusions():
    t = torch.linspace(0.05, 1, 20, dtype=torch.float64)
    f, g2 = sde_coefficients(VP, t)
    close(f, -VP.beta(t) / 2)
    close(g2, VP.beta(t), atol=1e-9)
    f, g2 = sde_coefficients(VarianceExplodingPath(), t)
    close(f, torch.zeros_like(t))
    close(g2, 2 * VarianceExplodingPath().sigma(t) ** 2 * math.log(5000), atol=1e-9)
    f, g2 = sde_coefficients(HeatPath(0.3), t)
    close(g2, torch.full_like(t, 0.6))


@pytest.mark.parametrize("path", [VP, VarianceExplodingPath(0.01, 3), LinearPath(), HeatPath(0.7)])
def test_density_solves_fokker_planck_and_continuity(path):
    x, t = samples(50, 2), torch.linspace(0.1, 0.9, 50, dtype=torch.float64)
    x.requires_grad_()
    t.requires_grad_()
    log_p = MIXTURE.log_density(x, t, path)
    (rate,) = torch.autograd.grad(log_p.sum(), t, create_graph=True)
    (score,) = torch.autograd.grad(log_p.sum(), x, create_graph=True)
    laplacian = sum(
        torch.autograd.grad(score[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2)
    )
    f, g2 = sde_coefficients(path, t)
    # Divided by p: the Laplacian of p is p (tr ∇² log p + |∇ log p|²).
    drift = -2 * f - f * (x * score).sum(1)
    close(rate, drift + g2 / 2 * (laplacian + score.square().sum(1)), atol=1e-8)
    velocity = probability_flow(exact_score(MIXTURE, path), path)
    v, spread = exact_divergence(velocity, x, t)
    close(rate, -spread - (v * score).sum(1), atol=1e-8)
    close(v, MIXTURE.velocity(x, t, path), atol=1e-8)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("path", [VP, HeatPath(1.5)])
def test_every_reverse_equation_has_the_same_densities(eta, path):
    data = gaussian()
    one = torch.ones(1, dtype=torch.float64)
    x = path.alpha(one) * 2.0 + (path.alpha(one) ** 2 * 0.25 + path.sigma(one) ** 2).sqrt() * (
        samples(10_000, 1)
    )
    times = torch.linspace(1, 1e-3**0.5, 200, dtype=torch.float64) ** 2
    generator = torch.Generator().manual_seed(1)
    out = reverse_sde_sample(exact_score(data, path), path, x, times, eta=eta, generator=generator)
    assert out.mean().item() == pytest.approx(2.0, abs=0.03)
    assert out.std().item() == pytest.approx(0.5, abs=0.02)


def test_reverse_sde_step_by_hand():
    path, x = HeatPath(0.5), torch.tensor([[2.0]], dtype=torch.float64)
    noise = torch.randn(1, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    out = reverse_sde_sample(
        lambda x, t: -x / (2 * t)[:, None],
        path,
        x,
        [1.0, 0.75],
        eta=2.0,
        generator=torch.Generator().manual_seed(3),
    )
    # g² = 2D = 1, score = -1; the step back of 0.25 adds (1 + 4)/2 · 1 · score · 0.25 and noise of variance 4 · 0.25.
    close(out, 2.0 - 2.5 * 0.25 + 1.0 * noise)


def test_times_of_log_snr_have_a_closed_form_on_the_variance_preserving_path():
    log_snr = torch.linspace(-4, 3, 15, dtype=torch.float64)
    integral = torch.log1p(torch.exp(-2 * log_snr))
    a, b = (20 - 0.1) / 2, 0.1
    close(time_at(VP, log_snr), (-b + (b * b + 4 * a * integral).sqrt()) / (2 * a))
    with pytest.raises(ValueError, match="reached in"):
        time_at(VP, torch.tensor([-20.0], dtype=torch.float64))


@pytest.mark.parametrize("path", [VP, LinearPath(), VarianceExplodingPath(0.01, 5)])
@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2), ("dpm2", 2)])
def test_solvers_converge_to_the_exact_map_of_a_gaussian_with_their_order(path, method, order):
    eps, x = exact_eps(gaussian(), path), samples(50, 1)
    start, end = 0.9, 0.1
    exact = gaussian_map(x, path, start, end)
    errors = []
    for count in (40, 80):
        times = torch.linspace(start, end, count + 1, dtype=torch.float64)
        out = exponential_sample(eps, path, x, times, method)
        assert out.shape == (count + 1, 50, 1) and torch.equal(out[0], x)
        errors.append((out[-1] - exact).abs().max().item())
    assert errors[1] < 0.02
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


def test_solvers_by_their_formulas():
    """One step of each, written in λ = log(α/σ) as in the DPM-Solver paper."""
    eps, x = exact_eps(MIXTURE, VP), samples(9, 2)
    t, s = (torch.full((9,), value, dtype=torch.float64) for value in (0.8, 0.5))

    def lam(t):
        return (VP.alpha(t) / VP.sigma(t)).log()[:, None]

    def formula(x, noise, t, s):
        h = lam(s) - lam(t)
        ratio = (VP.alpha(s) / VP.alpha(t))[:, None]
        return ratio * x - VP.sigma(s)[:, None] * torch.expm1(h) * noise

    first = formula(x, eps(x, t), t, s)
    middle = time_at(VP, (lam(t) + lam(s)).flatten() / 2)
    second = formula(x, eps(formula(x, eps(x, t), t, middle), middle), t, s)
    heun = formula(x, (eps(x, t) + eps(first, s)) / 2, t, s)
    for method, result in {"euler": first, "heun": heun, "dpm2": second}.items():
        close(exponential_sample(eps, VP, x, [0.8, 0.5], method)[-1], result, atol=1e-10)


def test_ddim_is_euler_of_the_equation_without_noise():
    chain, x, eps = chain_of(VP, 1000), samples(20, 2), exact_eps(MIXTURE, VP)
    steps = sub_sequence(1000, 25)
    ours = ddim_sample(eps, chain, x, steps)
    times = torch.tensor(steps, dtype=torch.float64) / 1000
    close(exponential_sample(eps, VP, x, times)[-1], ours, atol=1e-10)

    def slope(y, ratio):
        """Chapter 4's integrator, with σ/α for time and x/α for position."""
        alpha = (1 + ratio**2) ** -0.5
        t = time_at(VP, -ratio.log())
        return eps(per_sample(alpha, y) * y, t)

    ratios = (VP.sigma(times) / VP.alpha(times)).tolist()
    y = integrate(slope, x / VP.alpha(times[:1]), ratios)[-1]
    close(y, ours, atol=1e-8)


def test_second_order_methods_leave_the_end_at_the_data_to_euler():
    asked = []

    def eps(x, t):
        asked.append(t[0].item())
        return x

    for method in ("heun", "dpm2"):
        asked.clear()
        exponential_sample(eps, VP, samples(2, 2), [1.0, 0.5, 0.0], method)
        assert len(asked) == 3 and min(asked) == 0.5
        asked.clear()
        exponential_sample(eps, VP, samples(2, 2), [0.0, 0.5, 1.0], method)
        assert len(asked) == 3 and asked[0] == 0.0


@pytest.fixture(scope="module")
def reference():
    x = samples(100, 2)

    def velocity(x, t):
        return per_sample(-VP.beta(t) / 2, x) * (x + MIXTURE.score(x, t, VP))

    times = torch.linspace(1, 0, 301, dtype=torch.float64) ** 2
    return x, integrate(velocity, x, times, "rk4")[-1]


def test_ddim_on_the_mixture_has_the_error_of_an_euler_method(reference):
    x, exact = reference
    eps, errors = exact_eps(MIXTURE, VP), {}
    for count, expected in {20: 0.055, 50: 0.024, 100: 0.013, 200: 0.0066}.items():
        times = torch.linspace(1, 0, count + 1, dtype=torch.float64)
        error = (exponential_sample(eps, VP, x, times)[-1] - exact).norm(dim=1).mean().item()
        assert error == pytest.approx(expected, rel=0.12)
        errors[count] = error
    assert math.log2(errors[100] / errors[200]) == pytest.approx(1, abs=0.12)


def test_second_order_needs_times_that_are_dense_at_the_data(reference):
    x, exact = reference
    eps, orders = exact_eps(MIXTURE, VP), {}
    for power in (1, 2):
        error = []
        for count in (50, 100):
            times = torch.linspace(1, 0, count + 1, dtype=torch.float64) ** power
            end = exponential_sample(eps, VP, x, times, "dpm2")[-1]
            error.append((end - exact).norm(dim=1).mean().item())
        orders[power] = math.log2(error[0] / error[1])
    assert orders[1] < 1.6 and orders[2] == pytest.approx(2, abs=0.3)


def test_likelihood_of_the_flow_is_the_exact_one():
    x = MIXTURE.sample(40, torch.Generator().manual_seed(0))
    flow = probability_flow(exact_score(MIXTURE, VP), VP)
    ours = log_likelihood(flow, x, start=1e-6, rtol=1e-6, atol=1e-6).log_prob
    exact = MIXTURE.log_density(x, torch.full((40,), 1e-6, dtype=torch.float64), VP)
    # What remains is p_1, which is standard normal up to the signal that is left.
    close(ours, exact, atol=2e-3)


# The heat equation


def test_heat_equation_has_its_closed_form():
    axis = torch.linspace(-10, 10, 401, dtype=torch.float64)[:-1]
    mixture = GaussianMixture(
        torch.tensor([[-1.0], [1.5]]).double(), 0.3, torch.tensor([0.3, 0.7], dtype=torch.float64)
    )
    path = HeatPath(0.4)

    def density(t):
        return mixture.log_density(
            axis[:, None], torch.full((400,), t, dtype=torch.float64), path
        ).exp()

    close(heat_equation(density(0.0), 0.05, 0.4, 1.3), density(1.3), atol=1e-12)
    close(heat_equation(density(0.0), 0.05, 0.4, 0), density(0.0))
    # One small step of finite differences, the equation itself.
    p, dt = density(0.5), 1e-5
    curvature = (p.roll(1) - 2 * p + p.roll(-1)) / 0.05**2
    close((heat_equation(p, 0.05, 0.4, dt) - p) / dt, 0.4 * curvature, atol=2e-3)
    odd = heat_equation(density(0.0)[:399], 0.05, 0.4, 0.1)
    assert odd.shape == (399,)


def test_samples_follow_the_heat_equation_and_back():
    mixture = GaussianMixture(torch.tensor([[-1.0], [1.5]]).double(), 0.3)
    path = HeatPath(0.5)
    x = mixture.sample(300, torch.Generator().manual_seed(0))
    flow = probability_flow(exact_score(mixture, path), path)
    times = torch.linspace(1e-3, 1, 100, dtype=torch.float64) ** 2
    there = integrate(flow, x, times, "rk4")[-1]
    one = torch.ones(1, dtype=torch.float64)
    fresh = mixture.sample(300, torch.Generator().manual_seed(1)) + path.sigma(one) * samples(
        300, 1
    )
    assert energy_distance(there, fresh) < 0.03
    close(integrate(flow, there, times.flip(0), "rk4")[-1], x, atol=1e-4)
    # In one dimension the flow cannot change the order of the points.
    assert torch.equal(there.flatten().argsort(), x.flatten().argsort())


# What a training run gives


def test_a_trained_network_samples_better_with_more_steps_and_with_less_noise():
    centers = EightGaussians().means.float()
    data = GaussianMixture(centers, 0.15).sample(4000, torch.Generator().manual_seed(0))
    chain = chain_of(VP, 1000)
    torch.manual_seed(0)
    network, history = train_denoiser(TimeMLP(2, 64, 3), chain, data, steps=700)
    assert len(history.losses) == 700
    eps = as_eps(network, chain, "v")
    start = torch.randn(1000, 2, generator=torch.Generator().manual_seed(1))
    table = sampling_table(
        eps,
        chain,
        start,
        [5, 20],
        lambda x: energy_distance(x, data[:1000]).item(),
        spacing="leading",
    )
    assert list(table) == list(NOISES) and all(len(column) == 2 for column in table.values())
    assert table["η = 0"][1] < table["η = 0"][0] < 0.08
    assert table["η = 0.5"][0] < table["η = 1"][0] > 1.6 * table["η = 0"][0]


def test_the_table_draws_from_its_seed():
    chain, start = chain_of(VP, 1000), samples(5, 2)
    tables = [
        sampling_table(
            exact_eps(MIXTURE, VP), chain, start, [3], lambda x: x, spacing="leading", seed=seed
        )
        for seed in (1, 1, 2)
    ]
    for name in NOISES:
        first, again, other = (table[name][0] for table in tables)
        assert torch.equal(first, again)
        assert torch.equal(first, other) == (name == "η = 0")
    by_hand = ddim_sample(exact_eps(MIXTURE, VP), chain, start, [667, 334, 1, 0])
    assert torch.equal(tables[0]["η = 0"][0], by_hand)
    trailing = sampling_table(
        exact_eps(MIXTURE, VP), chain, start, [3], lambda x: x, spacing="trailing"
    )
    by_hand = ddim_sample(exact_eps(MIXTURE, VP), chain, start, [1000, 667, 333, 0])
    assert torch.equal(trailing["η = 0"][0], by_hand)
    draws = torch.Generator().manual_seed(1)
    by_hand = ddim_sample(
        exact_eps(MIXTURE, VP), chain, start, [1000, 667, 333, 0], eta=0.5, generator=draws
    )
    assert torch.equal(trailing["η = 0.5"][0], by_hand)


def test_the_average_and_not_the_last_weights_come_back():
    images = digits()[0][:256].flatten(1) / 8 - 1
    chain = chain_of(VP, 100)
    torch.manual_seed(0)
    network = TimeMLP(64, 32, 2)
    average, _ = train_denoiser(network, chain, images, steps=20, batch_size=64, memory=10)
    last, mean = next(network.parameters()), next(average.parameters())
    assert not average.training and not torch.equal(last, mean)
    assert (last - mean).abs().max() < 0.1


SLICE = dict(
    steps=2, batch_size=16, width=8, samples=31, counts=(2, 3), test_images=40, classifier_steps=2
)  # fmt: skip


def test_what_full_scale_trains_judges_and_shows(fake_mnist, monkeypatch):
    fake_mnist(module)
    seen = {"tables": [], "judged": []}

    def training(network, schedule, data, **options):
        seen.update(data=data, schedule=schedule, network=network, **options)
        return lambda x, t: torch.zeros_like(x), None  # v = 0 everywhere

    def distance(features, real):
        seen["judged"].append(len(features))
        seen["real"] = real
        return float(len(seen["judged"]))

    def table(eps, schedule, start, counts, score, **options):
        seen["tables"].append((start, tuple(counts), options))
        return sampling_table(eps, schedule, start, counts, score, **options)

    monkeypatch.setattr(module, "train_denoiser", training)
    monkeypatch.setattr(module, "frechet_distance", distance)
    monkeypatch.setattr(module, "sampling_table", table)
    monkeypatch.setattr(module, "image_rows", lambda rows: seen.update(rows=rows) or Figure())
    torch.manual_seed(0)
    results, pictures = full_scale(torch.device("cpu"), seed=3, **SLICE)
    images, tests = module.mnist(train=True)[0], module.mnist(train=False)[0][:40]
    assert seen["data"].shape == (1400, 1, 32, 32)
    close(seen["data"][:, 0, 2:-2, 2:-2], images / 127.5 - 1, atol=1e-6)
    assert (seen["data"][:, :, :2] == -1).all(), "the border is black"
    assert seen["steps"] == 2 and seen["batch_size"] == 16
    assert len(seen["real"]) == 40 and set(seen["judged"]) == {31}
    (first, counts, options), (second, _, others) = seen["tables"]
    assert torch.equal(first, second) and counts == (2, 3) and first.shape == (31, 1, 32, 32)
    assert options == {"spacing": "leading", "seed": 4} and others["spacing"] == "trailing"
    start = torch.randn(31, 1, 32, 32, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first, start)
    assert results["counts"] == [2, 3] and list(results["leading"]) == list(NOISES)
    # Distances are numbered in the order in which they were asked for: by count, then by noise.
    assert results["leading"]["η = 0.5"]["distance"] == [2.0, 6.0]
    assert results["trailing"]["σ̂"]["distance"] == [12.0, 16.0]
    assert results["training images"]["distance"] == 17.0
    # v = 0 means ε = σ x: DDIM only shrinks, and every row of the picture is that of its own noise.
    rows = seen["rows"]
    assert list(rows)[0] == "test images" and len(rows) == 5
    close(rows["test images"], tests[:10] / 255, atol=1e-6)
    eps = as_eps(lambda x, t: torch.zeros_like(x), seen["schedule"], "v")
    for noise, row in zip(NOISES.values(), list(rows.values())[1:], strict=True):
        draws = torch.Generator().manual_seed(4)
        made = ddim_sample(
            eps, seen["schedule"], start[:10], [1000, 667, 333, 0], generator=draws, **noise
        )
        close(row, (made[:, 0, 2:-2, 2:-2] + 1) / 2, atol=1e-6)
    assert "test images above" in next(iter(pictures))


def test_parts_are_the_whole():
    x, t = samples(7, 2), torch.rand(7).double()

    def network(x, t):
        assert len(x) <= 3
        return x * t[:, None]

    assert torch.equal(module.in_parts(network, 3)(x, t), x * t[:, None])


# Bad input


def test_bad_arguments_are_named():
    x, eps = samples(3, 2), exact_eps(MIXTURE, VP)
    with pytest.raises(ValueError, match="got 'even'"):
        sub_sequence(1000, 10, "even")
    for spacing, count in (("leading", 0), ("trailing", 1001), ("linspace", 1)):
        with pytest.raises(ValueError, match=f"got {count}"):
            sub_sequence(1000, count, spacing)
    for n, s in ((1001, 3), (3, -1)):
        with pytest.raises(ValueError, match=f"got {n} and {s}"):
            ddim_step(LINEAR, x, x, n, s)
    for eta in (-0.1, 1.1):
        with pytest.raises(ValueError, match="eta must lie in"):
            ddim_step(LINEAR, x, x, 9, 8, eta=eta, noise=x)
    with pytest.raises(ValueError, match="be 1 for wide noise"):
        ddim_step(LINEAR, x, x, 9, 8, eta=0.5, wide=True, noise=x)
    with pytest.raises(ValueError, match="needs noise"):
        ddim_step(LINEAR, x, x, 9, 8, eta=0.5)
    with pytest.raises(ValueError, match="a way down"):
        ddim_step(LINEAR, x, x, 8, 9, eta=0.5, noise=x)
    for steps in ([5], [5, 3, 4], [3, 5, 4]):
        with pytest.raises(ValueError, match="steps must go one way"):
            ddim_sample(eps, LINEAR, x, steps)
    with pytest.raises(ValueError, match="got 'velocity'"):
        as_eps(eps, LINEAR, "velocity")
    with pytest.raises(ValueError, match="got 'rk4'"):
        exponential_sample(eps, VP, x, [1.0, 0.5], "rk4")
    with pytest.raises(ValueError, match="α > 0"):
        exponential_sample(eps, LinearPath(), x, [1.0, 0.5])
    for times, eta in (([0.5, 0.5], 1), ([0.5], 1), ([0.5, 0.6], 1), ([0.5, 0.4], -1)):
        with pytest.raises(ValueError, match="falling times and eta"):
            reverse_sde_sample(eps, VP, x, times, eta=eta)
    with pytest.raises(ValueError, match="diffusivity must be positive, got 0"):
        HeatPath(0)
