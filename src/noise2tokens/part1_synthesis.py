"""Six chapters on one target: what the comparison needs beside what they teach.

The chapter on autoencoders decodes to pixels; here the data are points, so the decoder puts out a Gaussian. The rest
is bookkeeping: one row of the table for each method.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from noise2tokens.distribution_transforms.distances import sliced_wasserstein
from noise2tokens.distribution_transforms.vae import (
    gaussian_kl,
    iwae_bound,
    normal_log_prob,
    reparameterize,
)
from noise2tokens.networks import mlp


class PointVAE(nn.Module):
    """A variational autoencoder whose decoder puts out a Gaussian: a mean and a log-variance for each coordinate.

    Args:
        dim: Number of coordinates of a point, and of its latent.
        width: Units of the two hidden layers of encoder and decoder.
    """

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.dim = dim
        self.encoder = mlp(dim, (width, width), 2 * dim)
        self.decoder = mlp(dim, (width, width), 2 * dim)

    def elbo(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch"]:
        """Return log p(x|z) - KL(q(z|x) ‖ N(0, I)) with one draw of z, in nats."""
        mean, log_var = self.encoder(x).chunk(2, -1)
        z = reparameterize(mean, log_var, torch.randn_like(mean))
        return normal_log_prob(x, *self.decoder(z).chunk(2, -1)) - gaussian_kl(mean, log_var)

    @torch.no_grad()
    def bound(self, x: Float[Tensor, "batch dim"], draws: int) -> Float[Tensor, "batch"]:
        """Return the importance-weighted lower bound on log p(x) from a number of draws, in nats."""
        mean, log_var = self.encoder(x).chunk(2, -1)
        z = reparameterize(mean, log_var, torch.randn(draws, *mean.shape, device=x.device))
        prior = normal_log_prob(z, torch.zeros_like(mean), torch.zeros_like(mean))
        joint = normal_log_prob(x, *self.decoder(z).chunk(2, -1)) + prior
        return iwae_bound(joint - normal_log_prob(z, mean, log_var))

    @torch.no_grad()
    def sample(self, n: int, generator: Generator | None = None) -> Float[Tensor, "{n} dim"]:
        """Draw latents from the prior, and points from the Gaussians that they decode to."""
        z, noise = torch.randn(2, n, self.dim, generator=generator)
        mean, log_var = self.decoder(z).chunk(2, -1)
        return reparameterize(mean, log_var, noise)


def parameters(model: nn.Module) -> int:
    """Count the numbers that training may change."""
    return sum(p.numel() for p in model.parameters())


@dataclass(frozen=True)
class Entry:
    """One method's row.

    Attributes:
        method: Its name, and how it was sampled.
        gap: Negative log-likelihood minus that of the true density on the same points, in nats; None without one.
        how: What the likelihood is: "exact", "bound", "by the ODE", or "none".
        distance: Sliced 2-Wasserstein distance of the samples to data.
        evaluations: Passes through a network for one sample.
        seconds: To draw all samples.
        samples: What was drawn.
    """

    method: str
    gap: float | None
    how: str
    distance: float
    evaluations: int
    seconds: float
    samples: Tensor


def judge(
    method: str,
    draw: Callable[[], Float[Tensor, "n dim"]],
    data: Float[Tensor, "m dim"],
    *,
    network: nn.Module | None = None,
    log_ratio: Float[Tensor, "test"] | None = None,
    how: str = "none",
) -> Entry:
    """Draw samples once, and fill a row from them.

    Args:
        method: Its name.
        draw: Draws the samples.
        data: What they are compared with.
        network: Whose calls are counted; a method without one makes a single pass.
        log_ratio: log p_true - log p_model of test points, where there is a likelihood.
        how: What the likelihood is.

    Returns:
        The row.
    """
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    hook = network.register_forward_hook(count) if network is not None else None
    start = time.perf_counter()
    with torch.no_grad():
        samples = draw()
    seconds = time.perf_counter() - start
    if hook is not None:
        hook.remove()
    return Entry(
        method,
        None if log_ratio is None else log_ratio.mean().item(),
        how,
        sliced_wasserstein(samples, data).item(),
        calls if network is not None else 1,
        seconds,
        samples,
    )


def table(entries: Iterable[Entry]) -> str:
    """Lay out the rows in Markdown; times are relative to the first row's."""
    entries = list(entries)
    lines = [
        "| Method | Nats above the truth | Likelihood | Distance | Evaluations | Time to sample |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for e in entries:
        gap = "–" if e.gap is None else f"{e.gap:.2f}"
        times = e.seconds / entries[0].seconds
        lines.append(
            f"| {e.method} | {gap} | {e.how} | {e.distance:.2f} | {e.evaluations} | "
            f"{times:.{0 if times >= 10 else 1}f}× |"
        )
    return "\n".join(lines)
