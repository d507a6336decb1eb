"""Distributions in the plane whose density is known, so that a model's likelihood has a truth to be held against.

Each is an object with `sample` and `log_prob`, and knows its `entropy`: no model's mean negative log density can be
lower.
"""

import math

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Generator, Tensor


class Moons:
    """Two half circles of radius 1 with Gaussian noise, standardized by the distribution's mean and deviation.

    Attributes:
        noise: Standard deviation of the noise, before standardization.
        mean: Of both coordinates, before standardization.
        std: Likewise.
        entropy: In nats, after standardization.
    """

    noise = 0.05
    # Over both arcs: E x = 1/2, E y = 1/4, Var x = 1/2 + 1/4, Var y = E (sin t - 1/4)^2, which is 1/2 - 1/pi + 1/16.
    mean = (0.5, 0.25)
    std = (math.sqrt(3 / 4 + noise**2), math.sqrt(9 / 16 - 1 / math.pi + noise**2))
    entropy = 1.1312

    def sample(self, n: int, generator: Generator) -> Float32[Tensor, "{n} 2"]:
        """Draw n independent points with a generator on the CPU.

        Raises:
            ValueError: If n is negative.
        """
        _check_count(n)
        arcs = self._arcs(math.pi * torch.rand(n, generator=generator))
        centers = arcs[torch.randint(2, (n,), generator=generator), torch.arange(n)]
        points = centers + self.noise * torch.randn(n, 2, generator=generator)
        return (points - torch.tensor(self.mean)) / torch.tensor(self.std)

    def log_prob(self, x: Float[Tensor, "n 2"]) -> Float[Tensor, "n"]:
        """Return the log density in nats.

        Each arc's density is the mean of a Gaussian whose center runs along the arc: an integral over the angle, done
        with Gauss-Legendre nodes so dense (at most 0.8 noise widths apart) that the error is one of rounding.
        """
        nodes, weights = np.polynomial.legendre.leggauss(128)
        arcs = self._arcs(torch.tensor(math.pi / 2 * (nodes + 1))).flatten(0, 1)
        scale = torch.tensor(self.std, dtype=torch.float64, device=x.device)
        points = x.double() * scale + torch.tensor(self.mean, dtype=torch.float64, device=x.device)
        log_density = _mixture(points, arcs, torch.tensor(weights / 4).repeat(2), self.noise)
        return (log_density + scale.log().sum()).to(x.dtype)

    @staticmethod
    def _arcs(angle: Float[Tensor, "n"]) -> Float[Tensor, "2 n 2"]:
        x, y = angle.cos(), angle.sin()
        return torch.stack([torch.stack([x, y], -1), torch.stack([1 - x, 0.5 - y], -1)])


class EightGaussians:
    """A mixture of eight equal Gaussians with means evenly on a circle around the origin.

    Attributes:
        radius: Of the circle.
        std: Standard deviation of each Gaussian.
        entropy: In nats.
    """

    radius = 2.0
    std = 0.15
    entropy = 1.1231

    @property
    def means(self) -> Float[Tensor, "8 2"]:
        """The means, in float64."""
        angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
        return self.radius * torch.stack([angle.cos(), angle.sin()], -1)

    def sample(self, n: int, generator: Generator) -> Float32[Tensor, "{n} 2"]:
        """Draw n independent points with a generator on the CPU.

        Raises:
            ValueError: If n is negative.
        """
        _check_count(n)
        means = self.means.float()[torch.randint(8, (n,), generator=generator)]
        return means + self.std * torch.randn(n, 2, generator=generator)

    def log_prob(self, x: Float[Tensor, "n 2"]) -> Float[Tensor, "n"]:
        """Return the log density in nats."""
        weights = torch.full((8,), 1 / 8, dtype=torch.float64)
        return _mixture(x.double(), self.means, weights, self.std).to(x.dtype)


def _check_count(n: int) -> None:
    if n < 0:
        raise ValueError(f"cannot draw {n} points")


def _mixture(
    x: Float[Tensor, "n 2"], means: Float[Tensor, "k 2"], weights: Float[Tensor, "k"], std: float
) -> Float[Tensor, "n"]:
    """Log density of a mixture of round Gaussians."""
    exponent = -(x[:, None] - means.to(x.device)).square().sum(-1) / (2 * std**2)
    return torch.logsumexp(exponent + weights.to(x.device).log(), -1) - math.log(
        2 * math.pi * std**2
    )
