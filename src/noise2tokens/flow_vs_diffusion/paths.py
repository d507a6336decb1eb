"""Paths from data to noise, x_t = α(t) x_0 + σ(t) ε, and the four things a network may predict about one.

A path fixes α and σ. Given x_t, each of x_0, ε, the velocity v = α' x_0 + σ' ε and the score -ε/σ determines the others
(in expectation, which is all that a network can know), so a network trained on one can be sampled by a method written
for another.

Time: data at t = 0, noise at t = 1. All coefficients are functions of a tensor of times, element by element.
"""

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

KINDS = ("x0", "eps", "velocity", "score")


def per_sample(values: Float[Tensor, "batch"], x: Float[Tensor, "batch *event"]) -> Tensor:
    """Shape one number a sample so that it multiplies x."""
    return values.reshape(-1, *[1] * (x.dim() - 1))


class ProbabilityPath(ABC):
    """A path x_t = α(t) x_0 + σ(t) ε with ε standard normal; subclasses say what α and σ are."""

    @abstractmethod
    def alpha(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """What is left of the data."""

    @abstractmethod
    def sigma(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """How much noise there is."""

    @abstractmethod
    def alpha_dot(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """dα/dt."""

    @abstractmethod
    def sigma_dot(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """dσ/dt."""

    def sigma_squared_dot(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """dσ²/dt = 2 σ σ', the rate at which variance is added."""
        return 2 * self.sigma(t) * self.sigma_dot(t)

    def sample(
        self,
        x0: Float[Tensor, "batch *event"],
        eps: Float[Tensor, "batch *event"],
        t: Float[Tensor, "batch"],
    ) -> Float[Tensor, "batch *event"]:
        """Return x_t = α x_0 + σ ε."""
        return per_sample(self.alpha(t), x0) * x0 + per_sample(self.sigma(t), x0) * eps

    def velocity(
        self,
        x0: Float[Tensor, "batch *event"],
        eps: Float[Tensor, "batch *event"],
        t: Float[Tensor, "batch"],
    ) -> Float[Tensor, "batch *event"]:
        """Return dx_t/dt = α' x_0 + σ' ε, the speed along the path between this x_0 and this ε."""
        return per_sample(self.alpha_dot(t), x0) * x0 + per_sample(self.sigma_dot(t), x0) * eps

    def convert(
        self,
        value: Float[Tensor, "batch *event"],
        x: Float[Tensor, "batch *event"],
        t: Float[Tensor, "batch"],
        source: str,
        target: str,
    ) -> Float[Tensor, "batch *event"]:
        """Turn one prediction about x_t into another.

        Args:
            value: The prediction.
            x: x_t.
            t: Times, where the path has both data and noise left: at its ends a conversion may divide by zero.
            source: What `value` is: "x0", "eps", "velocity" or "score".
            target: What to return.

        Raises:
            ValueError: If a kind is unknown.
        """
        if source not in KINDS or target not in KINDS:
            raise ValueError(f"kinds are {KINDS}, got {source!r} and {target!r}")
        if source == target:
            return value
        a, s, a_dot, s_dot = (
            per_sample(c(t), x) for c in (self.alpha, self.sigma, self.alpha_dot, self.sigma_dot)
        )
        # Two linear equations, for x_t and for the value, in the two unknowns x_0 and ε.
        if source == "velocity":
            determinant = a * s_dot - s * a_dot
            x0, eps = (s_dot * x - s * value) / determinant, (a * value - a_dot * x) / determinant
        elif source == "x0":
            x0, eps = value, (x - a * value) / s
        else:
            eps = value if source == "eps" else -s * value
            x0 = (x - s * eps) / a
        if target == "velocity":
            return a_dot * x0 + s_dot * eps
        return {"x0": x0, "eps": eps, "score": -eps / s}[target]


class LinearPath(ProbabilityPath):
    """α = 1 - t, σ = t: straight lines at constant speed, the path that the book takes by default.

    Source: Lipman et al. 2023, example II ("OT", there with a smallest width; time reversed); Liu et al. 2023.
    """

    def alpha(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """1 - t."""
        return 1 - t

    def sigma(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """t."""
        return t

    def alpha_dot(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """-1."""
        return -torch.ones_like(t)

    def sigma_dot(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """1."""
        return torch.ones_like(t)


class VariancePreservingPath(ProbabilityPath):
    """α = exp(-½ ∫β), σ² = 1 - α², with β rising linearly from β_min to β_max: DDPM in continuous time.

    Args:
        beta_min: Rate at t = 0, positive.
        beta_max: Rate at t = 1, not below beta_min.

    Raises:
        ValueError: If the rates are not in that order.

    Source: Song et al. 2021, equation 33; Lipman et al. 2023, example I (time reversed).
    """

    def __init__(self, beta_min: float | int = 0.1, beta_max: float | int = 20.0):
        if not 0 < beta_min <= beta_max:
            raise ValueError(f"need 0 < beta_min <= beta_max, got {beta_min} and {beta_max}")
        self.beta_min, self.beta_max = beta_min, beta_max

    def beta(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return the rate β(t) at which signal is lost."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def _integral(self, t: Tensor) -> Tensor:
        return self.beta_min * t + t**2 / 2 * (self.beta_max - self.beta_min)

    def alpha(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """exp(-½ ∫β)."""
        return torch.exp(-self._integral(t) / 2)

    def sigma(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """(1 - exp(-∫β))^½, without cancellation near t = 0."""
        return (-torch.expm1(-self._integral(t))).sqrt()

    def alpha_dot(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """-½ β α."""
        return -self.beta(t) / 2 * self.alpha(t)

    def sigma_dot(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """½ β α² / σ, infinite at t = 0."""
        return self.sigma_squared_dot(t) / (2 * self.sigma(t))

    def sigma_squared_dot(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """β α², finite at t = 0 where σ' is not."""
        return self.beta(t) * self.alpha(t) ** 2


class VarianceExplodingPath(ProbabilityPath):
    """α = 1, σ = σ_min (σ_max / σ_min)^t: the data stays, the noise grows by a constant factor.

    Args:
        sigma_min: Noise at t = 0: the path ends that far from the data.
        sigma_max: Noise at t = 1, large against the data; sampling starts from N(0, σ_max²).

    Raises:
        ValueError: If not 0 < sigma_min < sigma_max.

    Source: Song et al. 2021, equation 31.
    """

    def __init__(self, sigma_min: float | int = 0.01, sigma_max: float | int = 50.0):
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def alpha(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """1."""
        return torch.ones_like(t)

    def sigma(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """σ_min (σ_max / σ_min)^t."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def alpha_dot(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """0."""
        return torch.zeros_like(t)

    def sigma_dot(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """σ log(σ_max / σ_min)."""
        return self.sigma(t) * math.log(self.sigma_max / self.sigma_min)
