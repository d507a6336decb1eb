"""DDPM: data is drowned in noise in T small steps, and a network learns to undo one step at a time.

Steps are numbered as in the paper: n = 0 is the data and n = T is noise, so `alpha_bar` has T + 1 entries and starts
with 1. (Libraries often number the noisy states from 0: their time step i is n = i + 1 here.) A network gets the time
n / T in (0, 1].
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from noise2tokens.flow_vs_diffusion.paths import per_sample

# network(x, t) -> prediction, with x (batch, ...), t (batch,) in [0, 1]
Network = Callable[[Tensor, Tensor], Tensor]


class NoiseSchedule:
    """How much noise each step of the chain adds.

    Args:
        beta: Variance that step n adds, for n = 1..T, in (0, 1).

    Attributes:
        beta: β_n at index n; β_0 = 0. Float64, as all of them.
        alpha_bar: ᾱ_n = ∏ (1 - β_i) over i up to n; ᾱ_0 = 1.
        steps: T.

    Raises:
        ValueError: If a variance is outside (0, 1).

    Source: Ho et al. 2020, section 2.
    """

    def __init__(self, beta: Float[Tensor, "steps"]):
        if not bool(((beta > 0) & (beta < 1)).all()):
            raise ValueError(
                f"variances must lie in (0, 1), got {beta.min().item()} to {beta.max().item()}"
            )
        self.steps = len(beta)
        self.beta = torch.cat([beta.new_zeros(1), beta]).double()
        self.alpha_bar = (1 - self.beta).cumprod(0)

    @classmethod
    def linear(
        cls, steps: int = 1000, first: float | int = 1e-4, last: float | int = 0.02
    ) -> "NoiseSchedule":
        """β rises linearly from `first` to `last` (Ho et al. 2020, section 4)."""
        return cls(torch.linspace(first, last, steps, dtype=torch.float64))

    @classmethod
    def cosine(cls, steps: int = 1000) -> "NoiseSchedule":
        """ᾱ falls as a squared cosine; no β above 0.999 (Nichol and Dhariwal 2021, equation 17)."""
        n = torch.arange(steps + 1, dtype=torch.float64)
        f = torch.cos((n / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        return cls((1 - f[1:] / f[:-1]).clamp(max=0.999))

    def at(
        self, n: Int[Tensor, "batch"], like: Float[Tensor, "batch *event"]
    ) -> Float[Tensor, "batch ..."]:
        """Return ᾱ_n for each sample, in the dtype and on the device of `like`, and shaped to multiply it.

        Raises:
            ValueError: If a step is outside 0..T.
        """
        if n.numel() and not 0 <= n.min() <= n.max() <= self.steps:
            raise ValueError(
                f"steps must lie in 0..{self.steps}, got {n.min().item()} to {n.max().item()}"
            )
        return per_sample(self.alpha_bar.to(n.device)[n].to(like), like)


def q_sample(
    schedule: NoiseSchedule,
    x0: Float[Tensor, "batch *event"],
    eps: Float[Tensor, "batch *event"],
    n: Int[Tensor, "batch"],
) -> Float[Tensor, "batch *event"]:
    """Jump from the data to step n at once: √ᾱ x_0 + √(1-ᾱ) ε (Ho et al. 2020, equation 4)."""
    alpha_bar = schedule.at(n, x0)
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps


def posterior(
    schedule: NoiseSchedule,
    x0: Float[Tensor, "batch *event"],
    x: Float[Tensor, "batch *event"],
    n: Int[Tensor, "batch"],
) -> tuple[Float[Tensor, "batch *event"], Float[Tensor, "batch ..."]]:
    """Return mean and variance of x_{n-1} given x_n and x_0.

    Args:
        schedule: The chain.
        x0: Data.
        x: x_n.
        n: Steps, from 1 to T; at n = 1 the answer is x_0 with variance 0.

    Raises:
        ValueError: If a step is outside 1..T.

    Source: Ho et al. 2020, equations 6 and 7.
    """
    bar_n, bar_s = schedule.at(n, x0), schedule.at(n - 1, x0)
    alpha = bar_n / bar_s
    mean = (bar_s.sqrt() * (1 - alpha) * x0 + alpha.sqrt() * (1 - bar_s) * x) / (1 - bar_n)
    return mean, (1 - bar_s) / (1 - bar_n) * (1 - alpha)


def eps_loss(
    network: Network,
    schedule: NoiseSchedule,
    x0: Float[Tensor, "batch *event"],
    eps: Float[Tensor, "batch *event"],
    n: Int[Tensor, "batch"],
) -> Float[Tensor, ""]:
    """Return the mean squared error of the predicted noise (Ho et al. 2020, equation 14), a mean over all elements."""
    predicted = network(q_sample(schedule, x0, eps, n), n.to(x0) / schedule.steps)
    return (predicted - eps).square().mean()


def draw_steps(schedule: NoiseSchedule, x0: Float[Tensor, "batch *event"]) -> Int[Tensor, "batch"]:
    """Draw a step in 1..T for each sample, uniformly."""
    return torch.randint(1, schedule.steps + 1, (len(x0),), device=x0.device)


def ancestral_step(
    network: Network,
    schedule: NoiseSchedule,
    x: Float[Tensor, "batch *event"],
    n: int,
    noise: Float[Tensor, "batch *event"],
) -> Float[Tensor, "batch *event"]:
    """Go from x_n to x_{n-1}: guess x_0, then draw from the posterior given the guess.

    Args:
        network: Predicts ε.
        schedule: The chain.
        x: x_n.
        n: From 1 to T; the last step, n = 1, adds no noise.
        noise: Standard normal.

    Source: Ho et al. 2020, algorithm 2, with σ² the variance of the posterior.
    """
    step = torch.full((len(x),), n, device=x.device)
    eps = network(x, step.to(x) / schedule.steps)
    alpha_bar = schedule.at(step, x)
    x0 = (x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    mean, variance = posterior(schedule, x0, x, step)
    return mean + variance.sqrt() * noise


@torch.no_grad()
def ancestral_sample(
    network: Network,
    schedule: NoiseSchedule,
    x: Float[Tensor, "batch *event"],
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch *event"]:
    """Run the chain from noise x_T to data, T evaluations of the network.

    Args:
        network: Predicts ε.
        schedule: The chain.
        x: Standard normal.
        generator: Source of the noise, on the device of x; the global one where left out.

    Returns:
        x_0.
    """
    for n in range(schedule.steps, 0, -1):
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        x = ancestral_step(network, schedule, x, n, noise)
    return x
