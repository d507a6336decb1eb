"""A mixture of round Gaussians on its way to noise: density, score and velocity in closed form at every time.

If x_0 is drawn from the mixture and x_t = α x_0 + σ ε, then x_t is drawn from a mixture with centers α μ_k and variance
α² s² + σ². Nothing has to be learned, so whatever a sampler gets wrong here is the sampler's own error.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from noise2tokens.flow_vs_diffusion.paths import ProbabilityPath, per_sample


class GaussianMixture:
    """Round Gaussians of one width, in any number of dimensions.

    Args:
        centers: One center a row.
        std: Standard deviation s of each, positive.
        weights: Probability of each; equal where left out.

    Raises:
        ValueError: If the width is not positive, or the weights are not positive numbers that add up to 1.
    """

    def __init__(
        self,
        centers: Float[Tensor, "k dim"],
        std: float | int,
        weights: Float[Tensor, "k"] | None = None,
    ):
        weights = (
            centers.new_full((len(centers),), 1 / len(centers)) if weights is None else weights
        )
        if not std > 0 or not bool((weights > 0).all()) or abs(weights.sum().item() - 1) > 1e-5:
            raise ValueError(
                f"need std > 0 and positive weights of sum 1, got {std} and {weights.tolist()}"
            )
        self.centers, self.std, self.weights = centers, std, weights

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n dim"]:
        """Draw n points of the data, t = 0."""
        of: Int[Tensor, "n"] = torch.multinomial(self.weights, n, True, generator=generator)
        noise = torch.randn(n, self.centers.shape[1], generator=generator, dtype=self.centers.dtype)
        return self.centers[of] + self.std * noise

    def log_density(
        self, x: Float[Tensor, "batch dim"], t: Float[Tensor, "batch"], path: ProbabilityPath
    ) -> Float[Tensor, "batch"]:
        """Evaluate log p_t(x), in nats."""
        logits, variance = self._logits(x, t, path)
        return logits.logsumexp(1) - x.shape[1] / 2 * (2 * math.pi * variance).log()

    def x0(
        self, x: Float[Tensor, "batch dim"], t: Float[Tensor, "batch"], path: ProbabilityPath
    ) -> Float[Tensor, "batch dim"]:
        """Evaluate E[x_0 | x_t = x]: for each center the Gaussian answer, weighted by how likely x came from there."""
        logits, variance = self._logits(x, t, path)
        alpha = per_sample(path.alpha(t), x)
        gain = alpha * self.std**2 / per_sample(variance, x)
        center = logits.softmax(1) @ self.centers.to(x)
        return center + gain * (x - alpha * center)

    def velocity(
        self, x: Float[Tensor, "batch dim"], t: Float[Tensor, "batch"], path: ProbabilityPath
    ) -> Float[Tensor, "batch dim"]:
        """Evaluate E[dx_t/dt | x_t = x] = α' E[x_0 | x] + σ' E[ε | x]; t = 0 included."""
        logits, variance = self._logits(x, t, path)
        alpha, alpha_dot, sigma_squared_dot = (
            per_sample(c(t), x) for c in (path.alpha, path.alpha_dot, path.sigma_squared_dot)
        )
        center = logits.softmax(1) @ self.centers.to(x)
        residual = (x - alpha * center) / per_sample(variance, x)
        # Given the center, (x_0, ε) is Gaussian; both conditional means are multiples of one residual.
        growth = alpha_dot * alpha * self.std**2 + sigma_squared_dot / 2
        return alpha_dot * center + growth * residual

    def score(
        self, x: Float[Tensor, "batch dim"], t: Float[Tensor, "batch"], path: ProbabilityPath
    ) -> Float[Tensor, "batch dim"]:
        """Evaluate ∇ log p_t(x)."""
        logits, variance = self._logits(x, t, path)
        center = logits.softmax(1) @ self.centers.to(x)
        return (per_sample(path.alpha(t), x) * center - x) / per_sample(variance, x)

    def _logits(
        self, x: Tensor, t: Tensor, path: ProbabilityPath
    ) -> tuple[Float[Tensor, "batch k"], Float[Tensor, "batch"]]:
        """Log-weight of each center at x, without the normalizer that all share, and the variance at t."""
        alpha, sigma = path.alpha(t), path.sigma(t)
        variance = alpha**2 * self.std**2 + sigma**2
        squared = (x[:, None] - alpha[:, None, None] * self.centers.to(x)).square().sum(-1)
        return self.weights.to(x).log() - squared / (2 * variance[:, None]), variance
