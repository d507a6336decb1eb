"""From measured losses to laws: lines in logarithms, parabolas of equal compute, and how sure one may be.

A run is a model of scale M (non-embedding FLOPs of a token) that has learned from D tokens, at the cost C = M D.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.optimize import least_squares, minimize_scalar

from noise2tokens.scaling_laws.flops import PowerLaw

Numbers = Sequence[float | int] | ndarray


def fit_power_law(x: Numbers, y: Numbers) -> PowerLaw:
    """Fit a straight line to the logarithms by least squares.

    Raises:
        ValueError: If there are not two different x, or a number is not positive and finite.
    """
    x, y = _positive(x=x, y=y)
    if len(np.unique(x)) < 2:
        raise ValueError(f"a line needs two different x, got {x}")
    exponent, intercept = np.polyfit(np.log(x), np.log(y), 1)
    return PowerLaw(math.exp(intercept), float(exponent))


class SaturatingLaw(NamedTuple):
    """y = floor + coefficient · x^exponent, the exponent being negative."""

    floor: float
    coefficient: float
    exponent: float

    def __call__(self, x):
        """Return y, for a number, an array or a tensor."""
        return self.floor + self.coefficient * x**self.exponent


def fit_saturating_law(x: Numbers, y: Numbers) -> SaturatingLaw:
    """Fit what falls as a power law towards a floor.

    For each floor the rest is a straight line in logarithms; the floor is the one whose line is straightest.

    Raises:
        ValueError: If there are not three different x, or a number is not positive and finite.
    """
    x, y = _positive(x=x, y=y)
    if len(np.unique(x)) < 3:
        raise ValueError(f"three unknowns need three different x, got {x}")

    def bend(share: float) -> float:
        rest = np.log(y - share * y.min())
        line = np.polyfit(np.log(x), rest, 1)
        return float(np.square(rest - np.polyval(line, np.log(x))).sum())

    # The bend has more than one valley: look everywhere, then closely.
    shares = np.append(1 - np.geomspace(1, 1e-6, 200), 1 - 1e-7)
    best = 1 + np.argmin([bend(share) for share in shares[1:-1]])
    around = (shares[best - 1], shares[best + 1])
    floor = minimize_scalar(bend, bounds=around, method="bounded").x * y.min()
    return SaturatingLaw(float(floor), *fit_power_law(x, y - floor))


class Optimum(NamedTuple):
    """Where a parabola of equal compute is lowest.

    Attributes:
        scale: M there.
        loss: Its height.
        curvature: Loss = height + curvature · (ln M - ln M there)².
    """

    scale: float
    loss: float
    curvature: float


def fit_isoflop(scales: Numbers, losses: Numbers) -> Optimum:
    """Fit a parabola in the logarithm of the scale to runs of equal compute, and return its lowest point.

    Args:
        scales: M of each run.
        losses: Loss of each run.

    Raises:
        ValueError: If there are fewer than three scales, or the lowest point does not lie between them: then the scales
            do not enclose an optimum.

    Source: Hoffmann et al. 2022, section 3.2.
    """
    scales, losses = _positive(scales=scales, losses=losses)
    if len(np.unique(scales)) < 3:
        raise ValueError(f"a parabola needs three different scales, got {scales}")
    curvature, slope, height = np.polyfit(np.log(scales), losses, 2)
    lowest = -slope / (2 * curvature)
    if curvature <= 0 or not math.log(scales.min()) <= lowest <= math.log(scales.max()):
        raise ValueError(f"no optimum between the scales {scales} with losses {losses}")
    return Optimum(math.exp(lowest), float(height + slope * lowest / 2), float(curvature))


class Allocation(NamedTuple):
    """M_opt and D_opt as laws of C."""

    model: PowerLaw
    data: PowerLaw


def fit_allocation(compute: Numbers, scales: Numbers, losses: Numbers) -> Allocation:
    """Fit a parabola for each budget, and laws to their lowest points.

    Args:
        compute: C of each run; runs of one budget share it exactly.
        scales: M of each run.
        losses: Loss of each run.

    Raises:
        ValueError: If there are not two budgets, or a budget shows no optimum.

    Source: Bi et al. 2024, section 3.2.
    """
    compute, scales, losses = _positive(compute=compute, scales=scales, losses=losses)
    budgets = np.unique(compute)
    best = [fit_isoflop(scales[compute == c], losses[compute == c]).scale for c in budgets]
    return Allocation(fit_power_law(budgets, best), fit_power_law(budgets, budgets / best))


def resampled_allocations(
    compute: Numbers,
    scales: Numbers,
    losses: Numbers,
    noise: float | int,
    resamples: int,
    seed: int,
) -> list[Allocation]:
    """Fit again and again, with noise added to the losses: how far the laws move tells how well they are known.

    Draws in which a budget loses its optimum are left out; where the noise is small beside the parabolas there are few.

    Args:
        compute, scales, losses: As for `fit_allocation`.
        noise: Standard deviation of a loss over seeds.
        resamples: Number of draws.
        seed: Of the draws.

    Raises:
        ValueError: If noise or resamples are negative, or no draw shows an optimum at each budget.
    """
    if noise < 0 or resamples < 1:
        raise ValueError(f"need noise >= 0 and a draw or more, got {noise} and {resamples}")
    generator, found = np.random.default_rng(seed), []
    losses = np.asarray(losses, dtype=float)
    for _ in range(resamples):
        moved = losses + noise * generator.standard_normal(len(losses))
        try:
            found.append(fit_allocation(compute, scales, moved))
        except ValueError:
            continue
    if not found:
        raise ValueError(f"with noise of {noise} no draw out of {resamples} shows all optima")
    return found


class LossLaw(NamedTuple):
    """L(M, D) = floor + of_model · M^-alpha + of_data · D^-beta."""

    floor: float
    of_model: float
    alpha: float
    of_data: float
    beta: float

    def __call__(self, scale, tokens):
        """Return the loss, for numbers, arrays or tensors."""
        return self.floor + self.of_model * scale**-self.alpha + self.of_data * tokens**-self.beta

    def allocation(self) -> Allocation:
        """Return what minimizes the loss at M D = C.

        There alpha · of_model · M^-alpha = beta · of_data · D^-beta, which with D = C / M gives
        M = G C^(beta / (alpha + beta)), G = (alpha of_model / (beta of_data))^(1 / (alpha + beta)).

        Source: Hoffmann et al. 2022, equation 4.
        """
        total = self.alpha + self.beta
        ratio = (self.alpha * self.of_model / (self.beta * self.of_data)) ** (1 / total)
        return Allocation(
            PowerLaw(ratio, self.beta / total), PowerLaw(1 / ratio, self.alpha / total)
        )


def fit_loss_law(scales: Numbers, tokens: Numbers, losses: Numbers) -> LossLaw:
    """Fit all runs at once, whatever they cost.

    The squared error of ln L is minimized, or its size where it is above 0.001 (Huber), from several starts.

    Args:
        scales: M of each run.
        tokens: D of each run.
        losses: Loss of each run.

    Raises:
        ValueError: If there are fewer than five runs, for five unknowns.

    Source: Hoffmann et al. 2022, section 3.3.
    """
    scales, tokens, losses = _positive(scales=scales, tokens=tokens, losses=losses)
    if len(losses) < 5:
        raise ValueError(f"five unknowns need five runs, got {len(losses)}")
    # Logarithms around the middle of the runs, so that terms and exponents do not trade places.
    m, d = (np.log(x) - np.log(x).mean() for x in (scales, tokens))
    centers = np.log(scales).mean(), np.log(tokens).mean()

    def residuals(p: Float[ndarray, "5"]) -> Float[ndarray, "runs"]:
        terms = np.stack([p[0] - p[1] * m, p[2] - p[3] * d, np.full_like(m, p[4])])
        return np.logaddexp.reduce(terms) - np.log(losses)

    size = math.log(losses.mean())
    starts = [
        (size + a, alpha, size + a, beta, size - 1)
        for a in (-2.0, -1.0)
        for alpha in (0.2, 0.6)
        for beta in (0.2, 0.6)
    ]
    fits = [least_squares(residuals, start, loss="huber", f_scale=1e-3) for start in starts]
    a, alpha, b, beta, floor = min(fits, key=lambda fit: fit.cost).x
    return LossLaw(
        math.exp(floor),
        math.exp(a + alpha * centers[0]),
        float(alpha),
        math.exp(b + beta * centers[1]),
        float(beta),
    )


def _positive(**arrays: Numbers) -> list[Float[ndarray, "_"]]:
    found = [np.asarray(x, dtype=float) for x in arrays.values()]
    if len({len(x) for x in found}) != 1:
        raise ValueError(f"need as many of each, got {[len(x) for x in found]}")
    for name, x in zip(arrays, found, strict=True):
        if not (np.isfinite(x).all() and (x > 0).all()):
            raise ValueError(f"need positive, finite {name}, got {x}")
    return found
