"""How far apart are two distributions, when all you have is samples of both?

A density would allow a likelihood or a Kullback-Leibler divergence. These functions need none: each turns two sets of
samples into one number that is 0, up to sampling noise, when both sets come from one distribution. None is the truth;
each looks at something else, so two of them may rank two models differently.

Two independent sets of one distribution are not at distance 0 either. Whoever reports a distance reports that floor
with it: the same function on two sets of real data of the same sizes.

Shapes: x is (n, ...) and y is (m, ...); whatever follows the first axis is flattened into one vector a sample.
"""

import math

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from sklearn.base import ClassifierMixin
from sklearn.neighbors import KNeighborsClassifier
from torch import Generator, Tensor

# By differences, not by |a|² + |b|² - 2ab, which loses what is small.
EXACT = "donot_use_mm_for_euclid_dist"


def _vectors(x: Tensor, y: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Flatten each sample, and refuse two sets that cannot be compared."""
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(
            f"samples must have one shape, got {tuple(x.shape[1:])} and {tuple(y.shape[1:])}"
        )
    if min(len(x), len(y)) < least:
        raise ValueError(f"each set needs at least {least} samples, got {len(x)} and {len(y)}")
    return x.reshape(len(x), -1), y.reshape(len(y), -1)


def median_bandwidth(x: Float[Tensor, "n *event"], y: Float[Tensor, "m *event"]) -> float:
    """Return the median distance between two different samples of the pooled sets.

    Args:
        x: Samples of one distribution.
        y: Samples of the other.

    Returns:
        A length, in the units of the samples: the usual choice for the width of a kernel.

    Raises:
        ValueError: If the shapes differ or a set is empty.
    """
    return torch.pdist(torch.cat(_vectors(x, y, 1))).median().item()


def mmd(
    x: Float[Tensor, "n *event"],
    y: Float[Tensor, "m *event"],
    bandwidth: float | int | None = None,
) -> Float[Tensor, ""]:
    """Estimate the squared maximum mean discrepancy, without bias, for a sum of five Gaussian kernels.

    Args:
        x: Samples of one distribution, two at least.
        y: Samples of the other, two at least.
        bandwidth: Width b of the middle kernel; the others are b/4, b/2, 2b and 4b wide. The median distance of the
            pooled samples where left out; then the estimate is no longer exactly unbiased.

    Returns:
        The estimate, differentiable in x and y. Its mean is 0 for equal distributions, so it is often below 0 then.

    Raises:
        ValueError: If shapes do not match, a set has fewer than two samples, or the bandwidth is not positive.

    Source: Gretton et al. 2012, equation 3.
    """
    x, y = _vectors(x, y, 2)
    bandwidth = median_bandwidth(x, y) if bandwidth is None else bandwidth
    if not bandwidth > 0:
        raise ValueError(f"bandwidth must be positive, got {bandwidth}")
    n, m = len(x), len(y)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        squared = torch.cdist(a, b, compute_mode=EXACT).square()
        widths = [bandwidth * factor for factor in (0.25, 0.5, 1, 2, 4)]
        return sum(torch.exp(-squared / (2 * width**2)) for width in widths)

    # A sample against itself says nothing about the distribution: leave the diagonals out.
    within_x = (kernel(x, x).sum() - 5 * n) / (n * (n - 1))
    within_y = (kernel(y, y).sum() - 5 * m) / (m * (m - 1))
    return within_x + within_y - 2 * kernel(x, y).mean()


def energy_distance(
    x: Float[Tensor, "n *event"], y: Float[Tensor, "m *event"]
) -> Float[Tensor, ""]:
    """Estimate 2 E|X - Y| - E|X - X'| - E|Y - Y'| by the means over all pairs (a V-statistic).

    Args:
        x: Samples of one distribution.
        y: Samples of the other.

    Returns:
        A non-negative number in the units of the samples, differentiable. The pairs of a sample with itself count as
        0 in the means, so the estimate is too large by E|X - X'| / n + E|Y - Y'| / m on average: its floor.
        `scipy.stats.energy_distance` is its square root, in one dimension.

    Raises:
        ValueError: If shapes do not match or a set is empty.

    Source: Székely and Rizzo 2013.
    """
    x, y = _vectors(x, y, 1)
    between, within_x, within_y = (
        torch.cdist(a, b, compute_mode=EXACT).mean() for a, b in ((x, y), (x, x), (y, y))
    )
    return 2 * between - within_x - within_y


def wasserstein_1d(x: Float[Tensor, "n"], y: Float[Tensor, "m"], p: int = 1) -> Float[Tensor, ""]:
    """Compute the p-Wasserstein distance of two samples on the line: match them in order.

    Args:
        x: Samples of one distribution.
        y: Samples of the other; their number may differ.
        p: 1 or 2.

    Returns:
        (∫ |F⁻¹(u) - G⁻¹(u)|^p du)^(1/p) of the two empirical quantile functions, exactly.

    Raises:
        ValueError: If a set is empty or p is neither 1 nor 2.
    """
    if p not in (1, 2) or min(len(x), len(y)) < 1:
        raise ValueError(f"need samples and p of 1 or 2, got {len(x)} and {len(y)}, p={p}")
    return _quantile_gap(x[:, None], y[:, None], p).pow(1 / p)[0]


def _quantile_gap(x: Tensor, y: Tensor, p: int) -> Tensor:
    """∫ |F⁻¹ - G⁻¹|^p du for each column. Both quantile functions are steps: the integral is a sum over all jumps."""
    n, m = len(x), len(y)
    x, y = x.sort(0).values, y.sort(0).values
    if n == m:
        return (x - y).abs().pow(p).mean(0)
    # In units of 1 / (n m), jumps are integers: no rounding decides which step a quantile belongs to.
    jumps = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    starts = torch.cat([jumps.new_zeros(1), jumps[:-1]])
    weights = ((jumps - starts).double() / (n * m)).to(x)[:, None]
    i, j = (starts // m).to(x.device), (starts // n).to(x.device)
    return (weights * (x[i] - y[j]).abs().pow(p)).sum(0)


def sliced_wasserstein(
    x: Float[Tensor, "n *event"],
    y: Float[Tensor, "m *event"],
    projections: int = 200,
    p: int = 2,
    generator: Generator | None = None,
) -> Float[Tensor, ""]:
    """Average the Wasserstein distance over random lines that both sets are projected on.

    Args:
        x: Samples of one distribution.
        y: Samples of the other.
        projections: Number of directions, uniform on the sphere.
        p: 1 or 2.
        generator: Source of the directions, on the CPU; a fixed seed where left out, so that two calls look along
            the same lines.

    Returns:
        (mean over the lines of W_p^p)^(1/p). For p = 2 it is, over many lines, at most W_2 / √dim, which a shift
        attains.

    Raises:
        ValueError: If shapes do not match, a set is empty, p is neither 1 nor 2, or there is no projection.

    Source: Bonneel et al. 2015.
    """
    x, y = _vectors(x, y, 1)
    if p not in (1, 2) or projections < 1:
        raise ValueError(f"need projections >= 1 and p of 1 or 2, got {projections} and p={p}")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    directions = torch.randn(x.shape[1], projections, generator=generator, dtype=torch.float64)
    directions = (directions / directions.norm(dim=0)).to(x)
    return _quantile_gap(x @ directions, y @ directions, p).mean().pow(1 / p)


def wasserstein(x: Float[Tensor, "n *event"], y: Float[Tensor, "n *event"]) -> float:
    """Compute the 2-Wasserstein distance of two samples of one size: the cheapest way to pair them.

    Args:
        x: Samples of one distribution.
        y: As many of the other. Time grows as n³: 2000 take a second or so.

    Returns:
        (min over pairings of the mean of |x_i - y_π(i)|²)^(1/2), in the units of the samples.

    Raises:
        ValueError: If the shapes differ or the sets are empty.
    """
    if x.shape != y.shape or len(x) < 1:
        raise ValueError(f"need two sets of one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    return (x - y[optimal_pairs(x, y)]).flatten(1).square().sum(1).mean().sqrt().item()


def optimal_pairs(x: Float[Tensor, "n *event"], y: Float[Tensor, "n *event"]) -> Tensor:
    """Pair each x with one y so that the sum of squared distances is least.

    Args:
        x: Points.
        y: As many points.

    Returns:
        Indices (n,) into y: x[i] belongs with y[indices[i]].

    Raises:
        ValueError: If the shapes differ.
    """
    if x.shape != y.shape:
        raise ValueError(f"need two sets of one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    a, b = x.detach().flatten(1).double(), y.detach().flatten(1).double()
    costs = torch.cdist(a, b).square()
    # What is taken from a row or column is taken from every pairing. With a zero in each, the searches are short.
    costs -= costs.amin(1, keepdim=True)
    costs -= costs.amin(0, keepdim=True)
    _, columns = linear_sum_assignment(costs.cpu().numpy())
    return torch.as_tensor(columns, device=x.device)


def frechet_distance(x: Float[Tensor, "n dim"], y: Float[Tensor, "m dim"]) -> float:
    """Compute the squared 2-Wasserstein distance of two Gaussians fitted to the samples.

    On features of an Inception network this is the Fréchet inception distance; on those of another classifier it is
    not comparable with published values.

    Args:
        x: Features of one set, at least two.
        y: Features of the other, at least two.

    Returns:
        |μ_x - μ_y|² + tr(C_x + C_y - 2 (C_x C_y)^½).

    Raises:
        ValueError: If the number of features differs or a set has fewer than two samples.

    Source: Heusel et al. 2017, equation 6.
    """
    x, y = _vectors(x, y, 2)
    x, y = x.double(), y.double()
    mean = (x.mean(0) - y.mean(0)).square().sum()
    c_x, c_y = torch.cov(x.T).reshape(2 * x.shape[1:]), torch.cov(y.T).reshape(2 * y.shape[1:])
    # C_x C_y is similar to the symmetric A C_y A with A = C_x^½: real eigenvalues, none below 0 but for rounding.
    values, vectors = torch.linalg.eigh(c_x)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c_y @ root).clamp_min(0).sqrt().sum()
    return (mean + c_x.trace() + c_y.trace() - 2 * cross).item()


def classifier_two_sample_test(
    x: Float[Tensor, "n *event"],
    y: Float[Tensor, "m *event"],
    classifier: ClassifierMixin | None = None,
    seed: int = 0,
) -> float:
    """Train a classifier to tell the sets apart on half of the samples, and return its accuracy on the other half.

    Args:
        x: Samples of one distribution, two at least.
        y: As many samples of the other.
        classifier: Anything with scikit-learn's `fit` and `predict`; the k nearest neighbors where left out, with
            k the square root of the number of training samples, made odd.
        seed: Of the division into halves.

    Returns:
        Around 0.5 for equal distributions, with standard deviation 0.5 / √(2 (n - n // 2)); 1 where the sets can be
        told apart.

    Raises:
        ValueError: If the shapes or the sizes differ, or a set has fewer than two samples.

    Source: Lopez-Paz and Oquab 2017, section 3.
    """
    x, y = _vectors(x, y, 2)
    if len(x) != len(y):
        raise ValueError(f"each set needs as many samples as the other, got {len(x)} and {len(y)}")
    order = torch.stack(
        [torch.randperm(len(x), generator=Generator().manual_seed(seed + side)) for side in (0, 1)]
    )
    half = len(x) // 2
    seen, held_out = (
        torch.cat([x[rows[0]], y[rows[1]]]).detach().cpu().numpy()
        for rows in (order[:, :half].to(x.device), order[:, half:].to(x.device))
    )
    seen_label, held_out_label = (
        [0] * (len(part) // 2) + [1] * (len(part) // 2) for part in (seen, held_out)
    )
    if classifier is None:
        classifier = KNeighborsClassifier(int(len(seen) ** 0.5) | 1)
    return float(classifier.fit(seen, seen_label).score(held_out, held_out_label))


def donsker_varadhan(at_x: Float[Tensor, "n"], at_y: Float[Tensor, "m"]) -> Float[Tensor, ""]:
    """Estimate E T(X) - log E exp(T(Y)), which is at most KL(p_X ‖ p_Y) for any function T, but for sampling noise.

    Args:
        at_x: Values of T at samples of one distribution.
        at_y: Values of T at samples of the other.

    Returns:
        The bound in nats; T = log p_X/p_Y + a constant attains it.

    Source: Donsker and Varadhan 1983.
    """
    return at_x.mean() - (at_y.logsumexp(0) - math.log(len(at_y)))
