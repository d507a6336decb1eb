import math
import os

import numpy as np
import ot
import pytest
import scipy.stats
import torch
from jaxtyping import config
from matplotlib.figure import Figure
from scipy.spatial.distance import cdist
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.distributions import Bernoulli, Independent, MultivariateNormal, Normal, kl_divergence

from noise2tokens.distribution_transforms import experiment
from noise2tokens.distribution_transforms.distances import (
    classifier_two_sample_test,
    donsker_varadhan,
    energy_distance,
    frechet_distance,
    median_bandwidth,
    mmd,
    optimal_pairs,
    sliced_wasserstein,
    wasserstein,
    wasserstein_1d,
)
from noise2tokens.distribution_transforms.gan import (
    GAN,
    critic_loss,
    discriminator_loss,
    fit_gan,
    gradient_penalty,
    minimax_loss,
    non_saturating_loss,
)
from noise2tokens.distribution_transforms.gan import mnist_experiment as gan_experiment
from noise2tokens.distribution_transforms.quantile import knothe_rosenblatt, quantile_transform
from noise2tokens.distribution_transforms.vae import (
    VAE,
    ConditionalVAE,
    bernoulli_log_prob,
    binarize,
    elbo_bound,
    evaluate,
    gaussian_kl,
    iwae_bound,
    mnist_classes_experiment,
    mnist_experiment,
    normal_log_prob,
    reparameterize,
)
from noise2tokens.images import digits, mnist
from noise2tokens.networks import mlp
from noise2tokens.toys import Moons


def draws(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def unchecked():
    """Without the checker of shapes, as readers run the code."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def same(ours, theirs, tolerance=1e-12):
    assert float(ours) == pytest.approx(float(theirs), rel=tolerance, abs=tolerance)


# Distances


def test_mmd_is_scikit_learns_kernels_without_the_diagonals():
    x, y = draws(7, 3), draws(9, 3, seed=1) + 0.5
    for bandwidth in (0.7, 2):
        expected = 0
        for width in (bandwidth / 4, bandwidth / 2, bandwidth, bandwidth * 2, bandwidth * 4):
            xx, yy, xy = (rbf_kernel(a, b, 1 / (2 * width**2)) for a, b in ((x, x), (y, y), (x, y)))
            expected += (xx.sum() - np.trace(xx)) / 42 + (yy.sum() - np.trace(yy)) / 72
            expected -= 2 * xy.mean()
        same(mmd(x, y, bandwidth), expected)
    pooled = torch.cat([x, y])
    distances = sorted(cdist(pooled, pooled)[np.triu_indices(16, 1)])
    same(median_bandwidth(x, y), distances[59])  # the lower of the two in the middle of 120
    same(mmd(x, y), mmd(x, y, distances[59]))


def test_mmd_is_unbiased(unchecked):
    """Over many small sets the mean is 0 for one distribution, and the known value for two."""
    generator = torch.Generator().manual_seed(0)

    def mean_and_error(shift):
        values = []
        for _ in range(1000):
            x, y = torch.randn(2, 6, 1, generator=generator, dtype=torch.float64)
            values.append(mmd(x, y + shift, 1.0).item())
        return np.mean(values), np.std(values) / len(values) ** 0.5

    mean, error = mean_and_error(0.0)
    assert abs(mean) < 3.5 * error and error < 0.03
    # E exp(-(X - Y)² / 2w²) with X - Y ~ N(m, 2) is w / √(w² + 2) · exp(-m² / 2(w² + 2)).
    true = sum(
        2 * w / math.sqrt(w**2 + 2) * (1 - math.exp(-(1.5**2) / (2 * (w**2 + 2))))
        for w in (0.25, 0.5, 1, 2, 4)
    )
    mean, error = mean_and_error(1.5)
    assert abs(mean - true) < 3.5 * error and true > 15 * error


def test_energy_distance_is_the_square_of_scipys():
    x, y = draws(50), 2 * draws(70, seed=1) + 1
    same(energy_distance(x[:, None], y[:, None]), scipy.stats.energy_distance(x, y) ** 2, 1e-10)


def test_energy_distance_in_the_plane_and_its_floor():
    x, y = draws(20, 2), draws(30, 2, seed=1) * 1.5
    expected = 2 * cdist(x, y).mean() - cdist(x, x).mean() - cdist(y, y).mean()
    same(energy_distance(x, y), expected)
    # On the line E|X - X'| = 2/√π for the standard normal, so that the floor is (1/5 + 1/8) 2/√π.
    generator = torch.Generator().manual_seed(0)
    sets = torch.randn(4000, 13, 1, generator=generator, dtype=torch.float64)
    values = [energy_distance(s[:5], s[5:]).item() for s in sets]
    error = np.std(values) / len(values) ** 0.5
    assert np.mean(values) == pytest.approx((1 / 5 + 1 / 8) * 2 / math.sqrt(math.pi), abs=4 * error)


@pytest.mark.parametrize(("n", "m"), [(40, 40), (30, 50), (1, 7), (12, 4)])
def test_wasserstein_on_the_line(n, m):
    x, y = draws(n), 2 * draws(m, seed=1) + 1
    same(wasserstein_1d(x, y), scipy.stats.wasserstein_distance(x, y), 1e-10)
    for p in (1, 2):
        same(wasserstein_1d(x, y, p) ** p, ot.wasserstein_1d(x, y, p=p), 1e-10)


def test_sliced_wasserstein_is_that_of_pot_on_the_same_lines():
    x, y = draws(30, 5), 2 * draws(20, 5, seed=1) + 1
    lines = draws(5, 40, seed=3)
    lines = lines / lines.norm(dim=0)
    for p in (1, 2):
        ours = sliced_wasserstein(x, y, 40, p, torch.Generator().manual_seed(3))
        same(ours, ot.sliced_wasserstein_distance(x, y, projections=lines, p=p), 1e-9)
    assert sliced_wasserstein(x, y) == sliced_wasserstein(x, y)
    other = sliced_wasserstein(x, y, generator=torch.Generator().manual_seed(1))
    assert sliced_wasserstein(x, y) != other
    default = sliced_wasserstein(x, y, 200, 2, torch.Generator().manual_seed(0))
    assert sliced_wasserstein(x, y) == default


def test_sliced_wasserstein_of_a_shift_and_its_bound():
    x = draws(50, 4)
    shift = torch.tensor([3.0, 0, 4, 0], dtype=torch.float64)
    assert sliced_wasserstein(x, x + shift, 20_000).item() == pytest.approx(5 / 2, rel=0.02)
    y = draws(50, 4, seed=1) ** 2
    assert sliced_wasserstein(x, y, 20_000).item() < 1.02 * wasserstein(x, y) / 2


def test_wasserstein_is_the_linear_program():
    x, y = draws(25, 2, 3), draws(25, 2, 3, seed=1) + 0.3
    cost = ot.dist(x.flatten(1).numpy(), y.flatten(1).numpy())
    same(wasserstein(x, y) ** 2, ot.emd2(ot.unif(25), ot.unif(25), cost), 1e-9)
    pairs = optimal_pairs(x, y)
    assert sorted(pairs.tolist()) == list(range(25))
    same((x - y[pairs]).flatten(1).square().sum(1).mean(), wasserstein(x, y) ** 2)
    shuffled = torch.randperm(25, generator=torch.Generator().manual_seed(0))
    assert torch.equal(x[shuffled][optimal_pairs(x, x[shuffled])], x)


def test_frechet_distance():
    x, y = draws(200, 3) @ draws(3, 3, seed=5), draws(90, 3, seed=1) * 2 + 1
    a, b = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(a @ b).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root)
    same(frechet_distance(x, y), expected, 1e-9)
    plane = x.clone()
    plane[:, 2] = plane[:, 0]  # a singular covariance
    same(frechet_distance(plane, plane), 0, 1e-6)
    one = draws(100, 1)
    same(frechet_distance(one, 3 * one + 2), 4 * one.std() ** 2 + (2 * one.mean() + 2) ** 2, 1e-9)


def test_distances_flatten_and_have_gradients():
    x, y = draws(6, 2, 3).requires_grad_(), draws(6, 2, 3, seed=1)
    for distance in (mmd, energy_distance, sliced_wasserstein):
        same(distance(x, y), distance(x.flatten(1), y.flatten(1)))
        (slope,) = torch.autograd.grad(distance(x, y), x)
        assert slope.isfinite().all() and slope.abs().sum() > 0


def test_classifier_two_sample_test_by_hand():
    x, y = draws(41, 3), draws(41, 3, seed=1) * 1.3 + 0.5
    first, second = (
        torch.randperm(41, generator=torch.Generator().manual_seed(7 + side)) for side in (0, 1)
    )
    train = np.concatenate([x[first[:20]], y[second[:20]]])
    test = np.concatenate([x[first[20:]], y[second[20:]]])
    labels = [0] * 20 + [1] * 20, [0] * 21 + [1] * 21
    model = LogisticRegression().fit(train, labels[0])
    same(classifier_two_sample_test(x, y, LogisticRegression(), 7), model.score(test, labels[1]))
    neighbors = KNeighborsClassifier(7).fit(train, labels[0])  # √40 = 6.3
    same(classifier_two_sample_test(x, y, seed=7), neighbors.score(test, labels[1]))


def test_classifier_two_sample_test_of_gaussians():
    """The best classifier of N(0, I) and N(m, I) is right with probability Φ(|m| / 2)."""
    x, y = draws(4000, 2), draws(4000, 2, seed=1)
    shift = torch.tensor([0.6, 0.8], dtype=torch.float64)
    error = 0.5 / math.sqrt(4000)
    for move, expected in ((0.0, 0.5), (1.0, scipy.stats.norm.cdf(0.5)), (30.0, 1.0)):
        accuracy = classifier_two_sample_test(x, y + move * shift, LogisticRegression())
        assert accuracy == pytest.approx(expected, abs=3.5 * error)
    assert abs(classifier_two_sample_test(x, y) - 0.5) < 3.5 * error


def test_donsker_varadhan_reaches_the_divergence_at_the_log_ratio():
    p, q = Normal(0.0, 1.0), Normal(0.5, 2.0)
    torch.manual_seed(0)
    x, y = p.sample((200_000,)), q.sample((400_000,))
    exact = kl_divergence(p, q).item()

    def ratio(v):
        return p.log_prob(v) - q.log_prob(v)

    best = donsker_varadhan(ratio(x) + 3, ratio(y) + 3)
    assert best.item() == pytest.approx(exact, abs=0.01)
    for factor in (0.0, 0.5, 1.3):
        assert donsker_varadhan(factor * ratio(x), factor * ratio(y)).item() < exact - 0.005


# Quantiles


def test_quantile_transform_is_numpys_quantile_of_the_empirical_distribution():
    z, samples = draws(10, 20), draws(33, seed=1)
    u = scipy.stats.norm.cdf(z)
    assert np.array_equal(
        quantile_transform(z, samples), np.quantile(samples, u, method="inverted_cdf")
    )
    ends = quantile_transform(torch.tensor([-40.0, 40.0]), samples)
    assert ends.tolist() == [samples.min(), samples.max()]


def test_quantile_transform_reaches_the_distribution():
    n = 999
    middle = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    samples = draws(n, seed=1).exp()
    assert torch.equal(quantile_transform(middle, samples), samples.sort().values)


GRID = torch.tensor([[1.0, 0, 3], [2, 1, 0], [0, 0, 0], [1, 1, 1]], dtype=torch.float64)
EDGES = (
    torch.tensor([-1.0, 0, 0.5, 2, 3], dtype=torch.float64),
    torch.tensor([0.0, 1, 1.5, 4], dtype=torch.float64),
)


def test_knothe_rosenblatt_fills_the_cells():
    x = knothe_rosenblatt(draws(20_000, 2), GRID, EDGES)
    counts, _, _ = np.histogram2d(x[:, 0], x[:, 1], bins=[e.numpy() for e in EDGES])
    assert counts.sum() == 20_000 and (counts[GRID == 0] == 0).all()
    expected = (GRID / GRID.sum() * 20_000)[GRID > 0]
    assert scipy.stats.chisquare(counts[GRID > 0], expected).pvalue > 0.001
    ends = torch.tensor([[-9.0, -9], [9, 9]], dtype=torch.float64)
    reached = knothe_rosenblatt(ends, GRID, EDGES)
    torch.testing.assert_close(reached, torch.tensor([[-1.0, 0], [3, 4]]).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_knothe_rosenblatt_never_enters_an_empty_cell(dtype):
    """Also where rounding has made u exactly 0 or 1."""
    mass = torch.tensor([[0, 0, 0, 0], [0, 1, 3, 0], [0, 0, 0, 0]], dtype=dtype)
    edges = torch.tensor([0, 1, 2, 3], dtype=dtype), torch.tensor([0, 1, 2, 3, 4], dtype=dtype)
    ends = torch.tensor([[-60.0, -60], [60, 60], [-60, 60]], dtype=dtype)
    reached = knothe_rosenblatt(ends, mass, edges)
    torch.testing.assert_close(reached, torch.tensor([[1, 1], [2, 3], [1, 3]], dtype=dtype))


def test_knothe_rosenblatt_has_the_grids_density_by_its_jacobian():
    """Change of variables with autograd's Jacobian, against the heights of the grid."""
    z = draws(30, 2)
    x = knothe_rosenblatt(z, GRID, EDGES)
    for point, image in zip(z, x, strict=True):
        jacobian = torch.autograd.functional.jacobian(
            lambda v: knothe_rosenblatt(v[None], GRID, EDGES)[0], point
        )
        assert jacobian[0, 1] == 0  # the first coordinate never sees the second
        density = Normal(0.0, 1.0).log_prob(point).sum().exp() / jacobian.det()
        i, j = (int((edge < v).sum()) - 1 for edge, v in zip(EDGES, image, strict=True))
        area = EDGES[0].diff()[i] * EDGES[1].diff()[j]
        same(density, GRID[i, j] / GRID.sum() / area, 1e-9)


def test_knothe_rosenblatt_makes_moons():
    edges = torch.linspace(-2.6, 2.6, 201)
    middle = (edges[1:] + edges[:-1]) / 2
    mass = Moons().log_prob(torch.cartesian_prod(middle, middle)).exp().view(200, 200)
    z = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    x = knothe_rosenblatt(z, mass, (edges, edges))
    real, other = (Moons().sample(1000, torch.Generator().manual_seed(s)) for s in (1, 2))
    assert energy_distance(x, real) < 0.01 + energy_distance(other, real)
    assert energy_distance(z, real) > 0.03


# The VAE's parts


def test_gaussian_kl_is_that_of_torch():
    mean, log_var, center = draws(5, 3), draws(5, 3, seed=1), draws(5, 3, seed=2)
    q = Independent(Normal(mean, (log_var / 2).exp()), 1)
    for middle, args in ((torch.zeros(5, 3), ()), (center, (center,))):
        expected = kl_divergence(q, Independent(Normal(middle.double(), 1.0), 1))
        torch.testing.assert_close(gaussian_kl(mean, log_var, *args), expected)
    assert gaussian_kl(torch.zeros(2, 3), torch.zeros(2, 3)).tolist() == [0, 0]


def test_densities_are_those_of_torch():
    z, mean, log_var = draws(4, 5, 3), draws(5, 3, seed=1), draws(5, 3, seed=2)
    normal = Normal(mean, (log_var / 2).exp()).log_prob(z).sum(-1)
    torch.testing.assert_close(normal_log_prob(z, mean, log_var), normal)
    x = torch.bernoulli(torch.full((5, 3), 0.5).double())
    torch.testing.assert_close(bernoulli_log_prob(z, x), Bernoulli(logits=z).log_prob(x).sum(-1))


def test_soft_targets_are_the_mean_over_binary_images():
    logits, x = draws(1, 3), torch.tensor([[0.2, 0.9, 0.5]], dtype=torch.float64)
    expected = 0
    for bits in torch.cartesian_prod(*[torch.tensor([0.0, 1]).double()] * 3):
        weight = Bernoulli(x[0]).log_prob(bits).sum().exp()
        expected += weight * Bernoulli(logits=logits[0]).log_prob(bits).sum()
    same(bernoulli_log_prob(logits, x)[0], expected)
    mean = binarize(x.expand(20_000, 3), torch.Generator().manual_seed(0)).mean(0)
    assert (mean - x[0]).abs().max() < 0.015


def test_reparameterized_draws_and_their_gradients():
    mean, log_std = torch.tensor([0.7, -1.0]).double(), torch.tensor([0.2, -0.5]).double()
    log_var = (2 * log_std).requires_grad_()
    mean.requires_grad_()
    z = reparameterize(mean, log_var, draws(400_000, 2))
    torch.testing.assert_close(z.mean(0), mean, atol=0.01, rtol=0)
    torch.testing.assert_close(z.std(0), log_std.exp(), atol=0.01, rtol=0)
    # E z² = μ² + σ², whose derivatives are 2μ, and σ² by log σ².
    slopes = torch.autograd.grad(z.square().mean(0).sum(), (mean, log_var))
    torch.testing.assert_close(slopes[0], 2 * mean, atol=0.02, rtol=0)
    torch.testing.assert_close(slopes[1], log_var.exp(), atol=0.02, rtol=0)


def test_bounds_are_ordered_on_every_set_of_draws():
    log_weights = 3 * draws(50, 20)
    assert (iwae_bound(log_weights) >= elbo_bound(log_weights)).all()
    expected = torch.tensor(np.log(np.exp(log_weights.numpy()).mean(0)))
    torch.testing.assert_close(iwae_bound(log_weights), expected)
    torch.testing.assert_close(elbo_bound(log_weights), torch.tensor(log_weights.numpy().mean(0)))
    assert torch.equal(iwae_bound(log_weights[:1]), log_weights[0])


@pytest.mark.parametrize("diagonal", [True, False])
def test_a_linear_vae_reaches_probabilistic_pca(diagonal):
    """With the exact posterior all weights are p(x): any number of draws gives the marginal likelihood.

    A diagonal encoder can do that if, and only if, W'W is diagonal.
    """
    weight, noise = draws(5, 2) @ torch.tensor([[1.0, 0.9], [0.0, 0.5]]).double(), 0.5
    if diagonal:
        weight = torch.linalg.qr(weight).Q * torch.tensor([2.0, 0.7])
    middle, x = draws(5, seed=1), draws(40, 5, seed=2)
    marginal = MultivariateNormal(middle, weight @ weight.T + noise**2 * torch.eye(5).double())
    m = weight.T @ weight + noise**2 * torch.eye(2).double()
    center = (x - middle) @ weight @ torch.linalg.inv(m)
    posterior = MultivariateNormal(center, noise**2 * torch.linalg.inv(m))
    torch.manual_seed(0)
    z = posterior.sample((8,))

    def joint(z):
        decoded = z @ weight.T + middle
        log_var = torch.full_like(decoded, 2 * math.log(noise))
        return normal_log_prob(x, decoded, log_var) + normal_log_prob(z, 0 * z, 0 * z)

    exact = marginal.log_prob(x)
    weights = joint(z) - posterior.log_prob(z)
    for bound in (elbo_bound, iwae_bound):
        torch.testing.assert_close(bound(weights), exact)

    # The best diagonal encoder: the same mean, and the inverse of the diagonal of the precision.
    log_var = (noise**2 / m.diagonal()).log().expand_as(center)
    z = reparameterize(center, log_var, draws(4000, 40, 2, seed=4))
    weights = joint(z) - normal_log_prob(z, center, log_var)
    gap = 0.5 * (m.diagonal().log().sum() - torch.logdet(m))
    torch.testing.assert_close(elbo_bound(weights).mean(), exact.mean() - gap, atol=0.01, rtol=0)
    assert (gap > 0.05) != diagonal
    # The same bound in its other form, with the KL term in closed form.
    decoded = z @ weight.T + middle
    fit = normal_log_prob(x, decoded, torch.full_like(decoded, 2 * math.log(noise))).mean(0)
    bound = (fit - gaussian_kl(center, log_var)).mean()
    torch.testing.assert_close(bound, exact.mean() - gap, atol=0.02, rtol=0)
    assert iwae_bound(weights).mean() > exact.mean() - gap / 2 - 1e-6


# The VAE


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return VAE(6, (8, 5), 2).double()


def pixels(n, dim, seed=0):
    return draws(n, dim, seed=seed).sigmoid()


def test_the_elbo_of_the_model_is_its_definition(vae):
    x = pixels(4, 6)
    mean, log_var = vae.encode(x)
    torch.manual_seed(1)
    reconstruction, kl = vae.terms(x)
    torch.manual_seed(1)
    noise = torch.randn_like(mean)
    p = torch.sigmoid(vae.decoder(mean + (log_var / 2).exp() * noise))
    torch.testing.assert_close(reconstruction, (x * p.log() + (1 - x) * (1 - p).log()).sum(1))
    q = Normal(mean, (log_var / 2).exp())
    torch.testing.assert_close(kl, kl_divergence(q, Normal(0.0, 1.0)).sum(1))
    torch.manual_seed(1)
    torch.testing.assert_close(vae.elbo(x), reconstruction - kl)


def exact_log_likelihood(vae, x, center=0.0):
    """Integrate over the two latents on a grid."""
    axis = torch.linspace(-8, 8, 321, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis) + center
    log_p = Bernoulli(logits=vae.decoder(z)).log_prob(x[:, None]).sum(-1)
    log_p = log_p + Normal(0.0, 1.0).log_prob(z - center).sum(-1)
    return log_p.logsumexp(-1) + 2 * math.log(axis[1] - axis[0])


def test_evaluate_bounds_the_integral_and_converges_to_it(vae):
    x = binarize(pixels(6, 6), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in vae.decoder.parameters():
            parameter.mul_(3)  # so that the latent matters
        exact = exact_log_likelihood(vae, x)
    torch.manual_seed(0)
    elbo, bound = evaluate(vae, x, 20_000, chunk=6000, batch_size=4)
    assert (elbo < exact - 1e-3).all()
    torch.testing.assert_close(bound, exact, atol=0.03, rtol=0)
    with torch.no_grad():
        closed = vae.elbo(x.repeat(2000, 1)).view(2000, 6)
    errors = (closed.mean(0) - elbo).abs() / (closed.std(0) / 2000**0.5)
    assert errors.max() < 4


def test_evaluate_takes_as_many_draws_and_images_as_it_is_asked_for(vae, monkeypatch):
    asked = []

    def log_weights(x, draws):
        asked.append((draws, len(x)))
        return torch.zeros(draws, len(x))

    monkeypatch.setattr(vae, "log_weights", log_weights)
    elbo, bound = evaluate(vae, pixels(5, 6), 70, chunk=30, batch_size=3)
    assert asked == [(30, 3), (30, 3), (10, 3), (30, 2), (30, 2), (10, 2)]
    assert not elbo.any() and elbo.shape == (5,) and bound.abs().max() < 1e-6


def test_a_conditional_vae_moves_only_the_prior():
    torch.manual_seed(0)
    model = ConditionalVAE(6, (8,), 2, 3).double()
    x, labels = pixels(5, 6), torch.tensor([0, 1, 2, 1, 0])
    mean, log_var = model.encode(x)
    _, kl = model.terms(x, labels)
    distance = mean - model.centers[labels]
    expected = 0.5 * (distance**2 + log_var.exp() - log_var - 1).sum(1)
    torch.testing.assert_close(kl, expected)
    (slope,) = torch.autograd.grad(kl.sum(), model.centers)
    torch.testing.assert_close(slope[2], -distance[2])
    with torch.no_grad():
        x = binarize(x, torch.Generator().manual_seed(0))
        exact = exact_log_likelihood(model, x[2:3], model.centers[2])
        weights = model.log_weights(x[2:3], 20_000, labels[2:3])
    torch.testing.assert_close(iwae_bound(weights), exact, atol=0.02, rtol=0)
    many = model.sample(2000, torch.full((2000,), 1), torch.Generator().manual_seed(0))
    noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    decoded = model.decoder(noise.double() + model.centers[1]).sigmoid()
    torch.testing.assert_close(many, decoded.detach(), atol=1e-5, rtol=0)


def test_samples_are_decoded_latents_of_the_prior(vae):
    vae = vae.float()
    first = vae.sample(7, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(7, 2, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(first, vae.decoder(noise).sigmoid().detach())
    assert not first.requires_grad


def test_the_networks_have_the_widths_asked_for():
    model = VAE(6, (8, 5), 2, nn.Tanh)
    widths = [layer.out_features for layer in model.encoder if isinstance(layer, nn.Linear)]
    assert widths == [8, 5, 4]
    widths = [layer.out_features for layer in model.decoder if isinstance(layer, nn.Linear)]
    assert widths == [5, 8, 6] and isinstance(model.decoder[3], nn.Tanh)
    assert isinstance(mlp(2, [3], 4)[1], nn.ReLU)


# The GAN


def test_losses_are_the_logarithms_of_the_classifiers_probabilities():
    real, fake = draws(7), draws(9, seed=1)
    p, q = real.sigmoid(), fake.sigmoid()
    same(discriminator_loss(real, fake), -p.log().mean() - (1 - q).log().mean())
    same(minimax_loss(fake), (1 - q).log().mean())
    same(non_saturating_loss(fake), -q.log().mean())
    same(critic_loss(real, fake), fake.mean() - real.mean())
    assert discriminator_loss(torch.tensor([-200.0]), torch.tensor([200.0])) == 400


def test_the_best_discriminator_gives_the_jensen_shannon_divergence():
    p, q = Normal(0.0, 1.0), Normal(1.0, 0.7)  # model and data
    axis = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    step = axis[1] - axis[0]
    a, b = q.log_prob(axis), p.log_prob(axis)
    middle = torch.logaddexp(a, b) - math.log(2)
    js = 0.5 * (a.exp() * (a - middle) + b.exp() * (b - middle)).sum() * step

    def expected(logits):
        real = (a.exp() * torch.nn.functional.softplus(-logits)).sum() * step
        return real + (b.exp() * torch.nn.functional.softplus(logits)).sum() * step

    same(expected(a - b), 2 * math.log(2) - 2 * js, 1e-7)
    for change in (0.1 * torch.sin(axis), torch.full_like(axis, 0.1)):
        assert expected(a - b + change) > expected(a - b) + 1e-4
    # And the library's loss is that expectation, on samples.
    torch.manual_seed(0)
    x, y = q.sample((200_000,)), p.sample((200_000,))
    ratio = [q.log_prob(v) - p.log_prob(v) for v in (x, y)]
    assert discriminator_loss(*ratio).item() == pytest.approx(expected(a - b).item(), abs=0.01)


def test_gradient_penalty_of_functions_with_known_slopes():
    real, fake = draws(50, 2, 3).float(), draws(50, 2, 3, seed=1).float()
    scale = torch.tensor(1.5, requires_grad=True)
    linear = gradient_penalty(lambda x: scale * x.flatten(1).sum(1), real, fake)
    same(linear, (1.5 * math.sqrt(6) - 1) ** 2, 1e-5)
    (slope,) = torch.autograd.grad(linear, scale)
    same(slope, 2 * (1.5 * math.sqrt(6) - 1) * math.sqrt(6), 1e-5)
    # ½|x|² has the slope |x|: that tells where it was evaluated.
    generator = torch.Generator().manual_seed(3)
    where = torch.rand(50, generator=torch.Generator().manual_seed(3))[:, None, None]
    between = (1 - where) * real + where * fake
    expected = (between.flatten(1).norm(dim=1) - 1).square().mean()
    ours = gradient_penalty(lambda x: x.flatten(1).square().sum(1) / 2, real, fake, generator)
    same(ours, expected, 1e-5)


def test_the_best_critic_on_the_line_gives_the_wasserstein_distance():
    """φ with φ' = sign(F_g - F_x), by Kantorovich and Rubinstein."""
    x, y = draws(300).sort().values, (1.5 * draws(300, seed=1) + 0.5).sort().values
    knots = torch.cat([x, y]).sort().values
    f_x = torch.searchsorted(x, knots, right=True) / 300
    f_y = torch.searchsorted(y, knots, right=True) / 300
    phi = torch.cat([torch.zeros(1), (torch.sign(f_y - f_x)[:-1] * knots.diff())]).cumsum(0)
    at_x, at_y = (phi[torch.searchsorted(knots, v)] for v in (x, y))
    same(-critic_loss(at_x, at_y), scipy.stats.wasserstein_distance(x, y), 1e-9)


@pytest.mark.parametrize("loss", ["minimax", "non_saturating", "wasserstein"])
def test_a_gan_moves_noise_to_data(loss):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    gan = GAN(2, 2, 32)

    def draw(n):
        return torch.tensor([2.0, -1.0]) + 0.5 * torch.randn(n, 2, generator=generator)

    start = wasserstein(gan.sample(500), draw(500))
    steps = 150 if loss == "wasserstein" else 400
    critic_steps = 3 if loss == "wasserstein" else 1
    options = dict(steps=steps, batch_size=64, learning_rate=2e-3, critic_steps=critic_steps)
    losses = fit_gan(gan, draw, loss=loss, **options)
    end = wasserstein(gan.sample(500), draw(500))
    assert end < 0.35 * start and len(losses) == steps


def test_fit_gan_takes_the_steps_it_says():
    torch.manual_seed(0)
    gan, asked, seen = GAN(2, 2, 4), [], []
    before = [p.clone() for p in gan.parameters()]

    def draw(n):
        asked.append(n)
        return torch.zeros(n, 2)

    options = dict(steps=5, batch_size=8, learning_rate=1e-3, critic_steps=3)
    fit_gan(gan, draw, loss="wasserstein", watch=seen.append, watch_every=2, **options)
    assert asked == [8] * 15 and seen == [0, 2, 4, 5]
    assert all(
        not torch.equal(a, b) for a, b in zip(before, gan.parameters(), strict=True) if b.dim() > 1
    )


def test_one_step_of_the_judge_and_of_the_generator():
    """The first step of Adam moves each weight against the sign of its gradient, by the learning rate."""
    for loss in ("minimax", "non_saturating", "wasserstein"):
        torch.manual_seed(0)
        gan = GAN(2, 2, 16)
        real = draws(16, 2).float()
        torch.manual_seed(1)
        fake = gan.sample(16)
        scores = gan.score(real), gan.score(fake)
        judged = critic_loss(*scores) if loss == "wasserstein" else discriminator_loss(*scores)
        penalty = gradient_penalty(gan.score, real, fake) if loss == "wasserstein" else 0
        slope = torch.autograd.grad(
            judged + 300 * penalty, gan.critic[0].weight, retain_graph=True
        )[0]
        if loss == "wasserstein":  # some signs depend on the weight of the penalty
            other = torch.autograd.grad(judged + penalty, gan.critic[0].weight)[0]
            assert (other.sign() != slope.sign()).any()
        first, second = gan.critic[0].weight.clone(), gan.generator[0].weight.clone()
        torch.manual_seed(1)
        options = dict(steps=1, batch_size=16, learning_rate=1e-3, penalty=300)
        (reported,) = fit_gan(gan, lambda n, real=real: real, loss=loss, **options)
        assert reported == pytest.approx(judged.item(), rel=1e-5)
        clear = slope.abs() > 1e-4
        moved = gan.critic[0].weight - first
        torch.testing.assert_close(moved[clear], -1e-3 * slope.sign()[clear], atol=2e-5, rtol=0)
        # The generator stepped after the judge: against the gradient of its own loss.
        torch.manual_seed(1)
        gan.sample(16)
        if loss == "wasserstein":
            torch.rand(16)
        z = gan.noise(16)
        moved = gan.generator[0].weight.detach() - second
        with torch.no_grad():
            gan.generator[0].weight.copy_(second)
        later = {"minimax": minimax_loss, "non_saturating": non_saturating_loss}
        value = later.get(loss, lambda s: -s.mean())(gan.score(gan(z)))
        slope = torch.autograd.grad(value, gan.generator[0].weight)[0]
        agree = (moved.sign() == -slope.sign())[slope.abs() > 1e-4]
        assert agree.float().mean() > 0.9 and len(agree) > 2


def test_a_gan_of_pixels_stays_between_0_and_1():
    torch.manual_seed(0)
    x = GAN(3, 10, 8, unit_interval=True).sample(100)
    assert x.shape == (100, 10) and x.min() > 0 and x.max() < 1
    assert GAN(3, 10, 8).sample(100).min() < 0
    gan = GAN(3, 10, 8)
    again = [gan.sample(4, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*again) and gan.noise(5).shape == (5, 3)


# Bad input


def test_bad_sets_are_named(unchecked):
    x, y = draws(5, 3), draws(5, 2)
    for distance in (mmd, energy_distance, sliced_wasserstein, frechet_distance, median_bandwidth):
        with pytest.raises(ValueError, match=r"one shape, got \(3,\) and \(2,\)"):
            distance(x, y)
    for distance in (wasserstein, optimal_pairs):
        with pytest.raises(ValueError, match=r"got \(5, 3\) and \(4, 3\)"):
            distance(x, x[:4])
    with pytest.raises(ValueError, match="one shape"):
        classifier_two_sample_test(x, y)
    with pytest.raises(ValueError, match="got 5 and 4"):
        classifier_two_sample_test(x, x[:4])
    for distance in (mmd, frechet_distance, classifier_two_sample_test):
        with pytest.raises(ValueError, match="at least 2 samples, got 1 and 1"):
            distance(x[:1], x[:1])
    for distance in (energy_distance, sliced_wasserstein, median_bandwidth):
        with pytest.raises(ValueError, match="at least 1 samples, got 5 and 0"):
            distance(x, x[:0])
    with pytest.raises(ValueError, match="of one shape"):
        wasserstein(x[:0], x[:0])
    for bandwidth in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="bandwidth must be positive"):
            mmd(x, x, bandwidth)
    with pytest.raises(ValueError, match="p=3"):
        wasserstein_1d(x[:, 0], x[:, 0], 3)
    with pytest.raises(ValueError, match="got 5 and 0"):
        wasserstein_1d(x[:, 0], x[:0, 0])
    with pytest.raises(ValueError, match="got 0 and p=2"):
        sliced_wasserstein(x, x, 0)
    with pytest.raises(ValueError, match="p=3"):
        sliced_wasserstein(x, x, p=3)


def test_bad_arguments_are_named(unchecked, vae):
    with pytest.raises(ValueError, match="got none"):
        quantile_transform(draws(3), draws(0))
    with pytest.raises(ValueError, match=r"grid of \(4, 3\) cells .* got 5 and 5"):
        knothe_rosenblatt(draws(3, 2), GRID, (EDGES[0], EDGES[0]))
    for mass in (-GRID, 0 * GRID):
        with pytest.raises(ValueError, match="non-negative, and not all 0"):
            knothe_rosenblatt(draws(3, 2), mass, EDGES)
    with pytest.raises(ValueError, match="expected 6 pixels, got 5"):
        vae.encode(pixels(3, 5))
    for bad in (17 * pixels(3, 6), pixels(3, 6) - 1):
        with pytest.raises(ValueError, match=r"pixels must lie in \[0, 1\]"):
            vae.elbo(bad)
    with pytest.raises(ValueError, match="at least one draw, got 0"):
        evaluate(vae, pixels(3, 6), 0)
    model = ConditionalVAE(6, (8,), 2, 3)
    with pytest.raises(ValueError, match="needs labels"):
        model.sample(3)
    for bad in (-1, 3):
        with pytest.raises(ValueError, match=r"labels must be 0\.\.2"):
            model.sample(1, torch.tensor([bad]))
    with pytest.raises(ValueError, match=r"one shape, got \(3, 2\), \(4, 2\)"):
        gradient_penalty(lambda x: x.sum(1), draws(3, 2), draws(4, 2))
    options = dict(loss="minimax", steps=1, batch_size=1, learning_rate=1e-3)
    changes = dict(loss="hinge"), dict(steps=0), dict(batch_size=0), dict(critic_steps=0)
    for change in changes:
        with pytest.raises(ValueError, match="need a loss of"):
            fit_gan(GAN(2, 2, 2), lambda n: torch.zeros(n, 2), **(options | change))
    with pytest.raises(ValueError, match="at least one draw, got 0"):
        mnist_experiment(
            torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), torch.device("cpu"), train_draws=0
        )


# Experiments


def test_metrics_rank_a_vae_and_a_diagonal_gaussian_oppositely():
    x = digits()[0].flatten(1) / 16
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    train_part, test = x[order[:1000]], x[order[1000:1400]]
    torch.manual_seed(0)
    model = VAE(64, (128,), 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(500):
        loss = -model.elbo(train_part[torch.randint(1000, (128,))]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    generator = torch.Generator().manual_seed(0)
    ours = model.sample(400, generator=generator)
    noise = torch.randn(400, 64, generator=generator)
    gauss = train_part.mean(0) + train_part.std(0) * noise
    for metric in (mmd, energy_distance):
        assert metric(ours, test) > 1.5 * metric(gauss, test)
    for metric in (wasserstein, frechet_distance, classifier_two_sample_test):
        assert metric(ours, test) < 0.9 * metric(gauss, test)


def test_full_scale_experiments_run_on_a_slice(monkeypatch):
    binarized = []

    def counted(x, generator=None):
        binarized.append(len(x))
        return binarize(x, generator)

    weighted, log_weights = [], VAE.log_weights

    def weigh(self, x, draws):
        weighted.append(draws)
        return log_weights(self, x, draws)

    monkeypatch.setattr("noise2tokens.distribution_transforms.vae.binarize", counted)
    monkeypatch.setattr(VAE, "log_weights", weigh)
    device = torch.device("cpu")
    images = torch.randint(0, 256, (30, 28, 28), generator=torch.Generator().manual_seed(0))
    images = images.to(torch.uint8)
    labels = torch.arange(30) % 10
    options = dict(steps=3, batch_size=8, test_draws=60)
    for train_draws in (1, 5):
        torch.manual_seed(0)
        model, history, elbo, bound = mnist_experiment(
            images, images[:7], device, train_draws=train_draws, **options
        )
        assert elbo.shape == bound.shape == (7,) and len(history.losses) == 3
        assert (bound >= elbo).all() and (bound < -300).all()
        assert [p.shape[0] for p in model.encoder.parameters()][::2] == [200, 200, 100]
    start = -history.losses[0]
    assert binarized == [7, 8, 8, 8] * 2  # the test images once, the training images at each look
    assert weighted == [50, 10] + [5, 5, 5, 50, 10]
    assert start == pytest.approx(-784 * math.log(2), rel=0.1)
    conditional = mnist_classes_experiment(images, labels, device, steps=3, batch_size=8)
    assert conditional.sample(10, torch.arange(10)).shape == (10, 784)
    gan, losses = gan_experiment(images, device, steps=2, batch_size=8, width=16)
    assert gan.sample(3).shape == (3, 784) and len(losses) == 2


@pytest.mark.skipif(
    "NOISE2TOKENS_DATA" not in os.environ, reason="NOISE2TOKENS_DATA names no folder with MNIST"
)
def test_full_scale_experiments_learn_on_mnist():
    images, test_images = mnist(train=True)[0][:2000], mnist(train=False)[0][:100]
    torch.manual_seed(0)
    options = dict(train_draws=1, steps=200, batch_size=100, test_draws=20)
    _, history, elbo, bound = mnist_experiment(images, test_images, torch.device("cpu"), **options)
    assert history.losses[-1] < 220 < history.losses[0]
    assert -220 < elbo.mean() < bound.mean() < -100


def test_what_full_scale_trains_scores_and_shows(fake_mnist, monkeypatch):
    fake_mnist(experiment)
    seen, rows = [], {}

    class Known:
        """A model whose samples are constant images of a known brightness."""

        def __init__(self, brightness):
            self.brightness = brightness

        def sample(self, n, labels=None):
            assert labels is None or torch.equal(labels, torch.arange(n) % 10)
            return torch.full((n, 784), self.brightness)

    def iwae(images, unseen, device, **options):
        seen.append(("iwae", len(images), len(unseen), options))
        k = options["train_draws"]
        return (
            Known(0.1 * (1 + (k > 1))),
            None,
            torch.tensor([-110.0, -90.0]),
            torch.tensor([-99.0, -97.0]) + k,
        )

    def by_class(images, labels, device, **options):
        seen.append(("class", len(images), len(labels), options))
        return Known(0.3)

    def adversarial(images, device, **options):
        seen.append(("gan", len(images), 0, options))
        return Known(0.4), []

    monkeypatch.setattr(experiment.vae, "mnist_experiment", iwae)
    monkeypatch.setattr(experiment.vae, "mnist_classes_experiment", by_class)
    monkeypatch.setattr(experiment.gan, "mnist_experiment", adversarial)
    monkeypatch.setattr(experiment, "image_rows", lambda found: rows.update(found) or Figure())
    sizes = dict(batch_size=7, test_images=40, test_draws=9, class_steps=4, gan_steps=5)
    results, pictures = experiment.full_scale(
        torch.device("cpu"), seed=6, steps={1: 2, 5: 3}, samples=31, classifier_steps=2, **sizes
    )
    assert [(name, n, m) for name, n, m, _ in seen] == [
        ("iwae", 1400, 40), ("iwae", 1400, 40), ("class", 1400, 1400), ("gan", 1400, 0),
    ]  # fmt: skip
    common = {"batch_size": 7, "test_draws": 9, "seed": 6}
    assert seen[0][3] == common | {"train_draws": 1, "steps": 2}
    assert seen[1][3] == common | {"train_draws": 5, "steps": 3}
    assert seen[2][3] == {"steps": 4, "batch_size": 7} and seen[3][3] == {
        "steps": 5,
        "batch_size": 7,
    }
    assert results["bounds"]["1"]["-ELBO"] == 100 and results["bounds"]["1"]["-L"] == 97
    assert results["bounds"]["5"]["-L"] == 93
    error = results["bounds"]["1"]["standard error"].item()
    assert error == pytest.approx(2**0.5 / 2**0.5)
    names = ["training images", "VAE", "IWAE, K = 5", "conditional VAE, 0 to 9", "WGAN-GP"]
    assert list(results["samples"]) == names
    distances = [found["distance"] for found in results["samples"].values()]
    assert min(distances) == distances[0] and len(set(distances)) == 5
    assert list(rows) == ["test images", *names[1:]]
    torch.testing.assert_close(rows["test images"], experiment.mnist(train=False)[0][:10] / 255)
    for name, brightness in zip(names[1:], (0.1, 0.2, 0.3, 0.4), strict=True):
        assert rows[name].shape == (10, 28, 28) and (rows[name] == brightness).all()
    assert "test images above" in next(iter(pictures))
