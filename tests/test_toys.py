"""Toys: the density is right, and the samples follow it."""

import math

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import chi2
from sklearn.datasets import make_moons

from noise2tokens.toys import EightGaussians, Moons

TOYS = {"moons": Moons(), "eight_gaussians": EightGaussians()}
STEP = 0.02


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=sorted(TOYS))
def plane(request):
    """A toy's name, a fine grid over the plane and the log density there."""
    axis = torch.arange(-3, 3, STEP, dtype=torch.float64) + STEP / 2
    grid = torch.cartesian_prod(axis, axis)
    log_density = torch.cat([TOYS[request.param].log_prob(part) for part in grid.split(10_000)])
    return request.param, grid, log_density


def test_density_integrates_to_one_and_has_the_stated_moments_and_entropy(plane):
    name, grid, log_density = plane
    mass = log_density.exp() * STEP**2
    assert mass.sum().item() == pytest.approx(1, abs=1e-9)
    variance = {"moons": 1.0, "eight_gaussians": 2.0**2 / 2 + 0.15**2}[name]
    assert torch.allclose(mass @ grid, torch.zeros(2).double(), atol=1e-9)
    assert torch.allclose(mass @ grid**2, torch.full((2,), variance).double(), atol=1e-9)
    assert -(mass * log_density).sum().item() == pytest.approx(TOYS[name].entropy, abs=5e-5)


def cell_counts_test(points, grid, log_density):
    """p-value of the counts of points in cells of side 0.2 (where over 20 are expected)."""

    def cells(x):
        return (((x + 3) / 0.2).long() * torch.tensor([30, 1])).sum(-1)

    expected = torch.zeros(900, dtype=torch.float64).index_add_(
        0, cells(grid), log_density.exp() * STEP**2
    )
    expected *= len(points)
    observed = cells(points.double()).bincount(minlength=900)
    enough = expected > 20
    assert enough.sum() > 80 and expected[enough].sum() > 0.98 * len(points)
    statistic = ((observed - expected)[enough] ** 2 / expected[enough]).sum().item()
    return chi2.sf(statistic, enough.sum().item() - 1)


def test_samples_follow_the_density(plane):
    name, grid, log_density = plane
    points = TOYS[name].sample(100_000, generator())
    assert points.dtype == torch.float32
    assert cell_counts_test(points, grid, log_density) > 0.01
    negative = -torch.cat([TOYS[name].log_prob(part) for part in points.split(10_000)])
    assert abs(negative.mean().item() - TOYS[name].entropy) < 3 * negative.std().item() / math.sqrt(
        100_000
    )
    # and the test can tell: a quarter of a noise width of shift is found out
    assert cell_counts_test(points + 0.015, grid, log_density) < 1e-6


@pytest.mark.parametrize("plane", ["moons"], indirect=True)
def test_our_moons_are_those_of_scikit_learn(plane):
    _, grid, log_density = plane
    points = torch.tensor(make_moons(100_000, noise=0.05, random_state=0)[0])
    points = (points - torch.tensor([0.5, 0.25])) / points.std(0)
    assert cell_counts_test(points, grid, log_density) > 0.01


@pytest.mark.parametrize(
    "x, y", [(1, 0), (0.5, 0.9), (2.05, 0.4), (0, 0.5), (0.3, -0.2), (-2, -1), (3, 2.5)]
)
def test_moons_density_against_adaptive_quadrature(x, y):
    def integrand(t):
        upper = (x - math.cos(t)) ** 2 + (y - math.sin(t)) ** 2
        lower = (x - 1 + math.cos(t)) ** 2 + (y - 0.5 + math.sin(t)) ** 2
        return math.exp((nearest - upper) / 0.005) + math.exp((nearest - lower) / 0.005)

    near = [math.pi * i / 400 for i in range(401)]
    distance = [((x - math.cos(t)) ** 2 + (y - math.sin(t)) ** 2, t) for t in near]
    distance += [((x - 1 + math.cos(t)) ** 2 + (y - 0.5 + math.sin(t)) ** 2, t) for t in near]
    nearest = min(distance)[0]
    peaks = sorted({t for d, t in distance if d - nearest < 0.02})
    integral = quad(
        integrand,
        0,
        math.pi,
        points=peaks[:: max(1, len(peaks) // 40)],
        limit=500,
        epsabs=0,
        epsrel=1e-12,
    )[0]
    density = math.log(integral / (2 * math.pi) / (2 * math.pi * 0.0025)) - nearest / 0.005
    std = torch.tensor([0.7525, 0.5625 - 1 / math.pi + 0.0025], dtype=torch.float64).sqrt()
    point = (torch.tensor([[x, y]], dtype=torch.float64) - torch.tensor([0.5, 0.25])) / std
    assert Moons().log_prob(point).item() == pytest.approx(
        density + std.log().sum().item(), abs=1e-8
    )


def test_eight_gaussians_against_torch_distributions():
    turn = torch.arange(8, dtype=torch.float64) / 4
    centers = 2 * torch.stack([torch.cos(math.pi * turn), torch.sin(math.pi * turn)], -1)
    peer = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(8, dtype=torch.float64)),
        torch.distributions.Independent(torch.distributions.Normal(centers, 0.15), 1),
    )
    x = 2 * torch.randn(100, 2, generator=generator(), dtype=torch.float64)
    assert torch.allclose(EightGaussians().log_prob(x), peer.log_prob(x), rtol=1e-12)


@pytest.mark.parametrize("name", TOYS)
def test_densities_keep_the_dtype_and_carry_gradients(name):
    x = TOYS[name].sample(5, generator()).double().requires_grad_()
    assert TOYS[name].log_prob(x.detach().float()).dtype == torch.float32
    assert torch.autograd.gradcheck(TOYS[name].log_prob, (x,))


def test_toys_repeat_with_their_seed_and_refuse_what_they_are_not():
    for name in TOYS:
        assert torch.equal(TOYS[name].sample(10, generator(3)), TOYS[name].sample(10, generator(3)))
        assert not torch.equal(
            TOYS[name].sample(10, generator(3)), TOYS[name].sample(10, generator(4))
        )
        assert TOYS[name].sample(0, generator()).shape == (0, 2)
        with pytest.raises(ValueError, match="-1 points"):
            TOYS[name].sample(-1, generator())
