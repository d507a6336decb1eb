"""Six methods of the first six chapters on one target with one budget, and what is measured of each.

All get the eight Gaussians, whose density is known, about 24,000 parameters, and the same number of training steps on
fresh points. `train_models` trains them, `compare_models` fills one row for each, and `full_scale` does both for
several seeds, because one seed cannot tell a difference between methods from one between runs.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn

from noise2tokens.ddim_ode.sampling import chain_of, ddim_sample, sub_sequence
from noise2tokens.distribution_transforms.distances import sliced_wasserstein
from noise2tokens.distribution_transforms.gan import GAN, fit_gan
from noise2tokens.distribution_transforms.vae import (
    gaussian_kl,
    iwae_bound,
    normal_log_prob,
    reparameterize,
)
from noise2tokens.flow_vs_diffusion.cnf import log_likelihood
from noise2tokens.flow_vs_diffusion.diffusion import ancestral_sample, draw_steps, eps_loss
from noise2tokens.flow_vs_diffusion.flow_matching import cfm_loss, predicted_velocity
from noise2tokens.flow_vs_diffusion.integrators import dormand_prince
from noise2tokens.flow_vs_diffusion.paths import LinearPath, VariancePreservingPath, per_sample
from noise2tokens.networks import TimeMLP, mlp
from noise2tokens.nice import NICE
from noise2tokens.realnvp_glow.coupling import RealNVP
from noise2tokens.rectified_flow.reflow import reflow, rf_loss, sample, uniform_times
from noise2tokens.toys import EightGaussians
from noise2tokens.training import fit, seed_everything

LINE, DIFFUSION = LinearPath(), VariancePreservingPath()
CHAIN = chain_of(DIFFUSION, 1000)
FEW = 20
# The rows, in the order of the book.
METHODS = (
    "VAE",
    "GAN",
    "NICE",
    "RealNVP",
    "DDPM",
    "DDIM",
    "Flow matching",
    "Flow matching, one step",
    "Rectified flow, one step",
)
BUDGETS = {
    "long": {
        "seeds": 5,
        "steps": 2000,
        "batch_size": 128,
        "pairs": 20_000,
        "test_points": 1000,
        "samples": 3000,
    },
    "full": {
        "seeds": 5,
        "steps": 20_000,
        "batch_size": 128,
        "pairs": 20_000,
        "test_points": 1000,
        "samples": 3000,
    },
}


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


@dataclass(frozen=True)
class Models:
    """What `train_models` trained.

    Attributes:
        vae: Chapter 1, with a decoder for points.
        gan: Chapter 1.
        nice: Chapter 2.
        realnvp: Chapter 3.
        denoiser: Chapters 4 and 5; puts out v = α ε - σ x_0, see `noise_of`.
        velocity: Flow matching on straight lines, chapter 4.
        straight: Chapter 6: a copy of `velocity`, trained on the pairs that `velocity` makes.
    """

    vae: PointVAE
    gan: GAN
    nice: NICE
    realnvp: RealNVP
    denoiser: TimeMLP
    velocity: TimeMLP
    straight: TimeMLP

    def noise_of(
        self, x: Float[Tensor, "batch 2"], t: Float[Tensor, "batch"]
    ) -> Float[Tensor, "batch 2"]:
        """Return the noise that the denoiser predicts: ε = α v + σ x."""
        alpha, sigma = per_sample(DIFFUSION.alpha(t), x), per_sample(DIFFUSION.sigma(t), x)
        return alpha * self.denoiser(x, t) + sigma * x

    def sizes(self) -> dict[str, int]:
        """Count the numbers that training may change in each model."""
        return {
            name: sum(p.numel() for p in model.parameters()) for name, model in vars(self).items()
        }


def train_models(
    draw: Callable[[int], Tensor], *, steps: int, batch_size: int, pairs: int
) -> Models:
    """Train the six methods on points of the plane, each with the learning rate that suits it.

    Args:
        draw: Returns a number of points of the target.
        steps: Optimizer steps of each model; rectified flow has as many again.
        batch_size: Points a step.
        pairs: Pairs that flow matching makes for rectified flow.

    Returns:
        The models.
    """
    budget = {"steps": steps, "batch_size": batch_size}
    vae, gan = PointVAE(2, width=106), GAN(2, 2, width=107)
    nice = NICE(2, [61, 61], couplings=6, prior="gaussian")
    realnvp = RealNVP(2, [61, 61], couplings=6)
    denoiser, velocity = TimeMLP(2, width=104), TimeMLP(2, width=104)
    models = Models(vae, gan, nice, realnvp, denoiser, velocity, copy.deepcopy(velocity))

    fit(vae, lambda x: -vae.elbo(x).mean(), draw, **budget, warmup=0.05)
    fit_gan(gan, draw, loss="non_saturating", **budget, learning_rate=2e-3)
    for flow in (nice, realnvp):
        fit(
            flow,
            lambda x, flow=flow: -flow.log_prob(x).mean(),
            draw,
            **budget,
            learning_rate=5e-3,
            warmup=0.05,
        )

    def noise_loss(x: Tensor) -> Tensor:
        return eps_loss(models.noise_of, CHAIN, x, torch.randn_like(x), draw_steps(CHAIN, x))

    def velocity_loss(x: Tensor) -> Tensor:
        return cfm_loss(velocity, LINE, x, torch.randn_like(x), torch.rand(len(x)))

    def pair_loss(batch: Tensor) -> Tensor:
        return rf_loss(
            models.straight, batch[:, 0], batch[:, 1], uniform_times(len(batch), batch.device)
        )

    fit(denoiser, noise_loss, draw, **budget, learning_rate=1e-2, warmup=0.05)
    fit(velocity, velocity_loss, draw, **budget, learning_rate=1e-2, warmup=0.05)
    models.straight.load_state_dict(velocity.state_dict())
    reflowed = reflow(velocity, torch.randn(pairs, 2), tolerance=1e-4)
    fit(models.straight, pair_loss, reflowed, **budget, learning_rate=1e-2, warmup=0.05)
    return models


def compare_models(
    models: Models, data: Float[Tensor, "n 2"], test: Float[Tensor, "m 2"], samples: int
) -> list[Entry]:
    """Score and sample every model.

    Args:
        models: As trained.
        data: Points of the target that samples are compared with.
        test: Points of the target that are scored.
        samples: How many to draw from each.

    Returns:
        A row for each of `METHODS`.
    """
    truth = EightGaussians().log_prob(test)

    def by_ode(velocity: Callable, start: float = 0.0) -> Tensor:
        return log_likelihood(velocity, test, start=start, rtol=1e-4, atol=1e-4).log_prob

    m, noise = models, torch.randn(samples, 2)
    diffusion = predicted_velocity(m.noise_of, DIFFUSION, "eps")
    with torch.no_grad():
        exact = {
            name: truth - flow.log_prob(test)
            for name, flow in (("NICE", m.nice), ("RealNVP", m.realnvp))
        }
        bound = truth - m.vae.bound(test, draws=500)
    denoised = {
        "network": m.denoiser,
        "log_ratio": truth - by_ode(diffusion, 1e-3),
        "how": "by the ODE",
    }
    matched = {"network": m.velocity, "log_ratio": truth - by_ode(m.velocity), "how": "by the ODE"}
    once = {"network": m.straight, "log_ratio": truth - by_ode(m.straight), "how": "by the ODE"}
    ways = {
        "VAE": (lambda: m.vae.sample(samples), {"log_ratio": bound, "how": "bound"}),
        "GAN": (lambda: m.gan.sample(samples), {}),
        "NICE": (lambda: m.nice.sample(samples), {"log_ratio": exact["NICE"], "how": "exact"}),
        "RealNVP": (
            lambda: m.realnvp.sample(samples),
            {"log_ratio": exact["RealNVP"], "how": "exact"},
        ),
        "DDPM": (lambda: ancestral_sample(m.noise_of, CHAIN, noise), {"network": m.denoiser}),
        "DDIM": (lambda: ddim_sample(m.noise_of, CHAIN, noise, sub_sequence(1000, FEW)), denoised),
        "Flow matching": (lambda: dormand_prince(m.velocity, noise, 1, 0, 1e-3, 1e-3).x, matched),
        "Flow matching, one step": (lambda: sample(m.velocity, noise, 1), {"network": m.velocity}),
        "Rectified flow, one step": (lambda: sample(m.straight, noise, 1), once),
    }
    return [judge(method, *ways[method][:1], data, **ways[method][1]) for method in METHODS]


def run(
    seed: int, *, steps: int, batch_size: int, pairs: int, test_points: int, samples: int
) -> tuple[Models, list[Entry], Float[Tensor, "n 2"], float]:
    """Train and compare all methods once.

    Args:
        seed: Seeds everything.
        steps: Optimizer steps of each model.
        batch_size: Points a step.
        pairs: Pairs of rectified flow.
        test_points: Points whose likelihood is taken.
        samples: Points drawn from each model.

    Returns:
        The models, a row for each of `METHODS`, 20,000 points of data, and the floor: the mean distance of five sets
        of as many points of the target from the data.
    """
    seed_everything(seed)
    draws = Generator().manual_seed(seed)

    def draw(n: int) -> Tensor:
        return EightGaussians().sample(n, draws)

    models = train_models(draw, steps=steps, batch_size=batch_size, pairs=pairs)
    data, test = draw(20_000), draw(test_points)
    floor = sum(sliced_wasserstein(draw(samples), data).item() for _ in range(5)) / 5
    return models, compare_models(models, data, test, samples), data, floor


def draw_clouds(entries: list[Entry], data: Float[Tensor, "n 2"]) -> Figure:
    """Draw the data and the samples of each method."""
    figure, axes = plt.subplots(2, 5, figsize=(7.6, 3.4), sharex=True, sharey=True)
    clouds = {"data": data, **{entry.method: entry.samples for entry in entries}}
    for ax, (name, cloud) in zip(axes.flat, clouds.items(), strict=True):
        ax.scatter(*cloud[:2500].T, s=0.4)
        ax.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), aspect="equal")
        ax.set_title(name.replace(", one step", ",\none step"), fontsize="small")
    for ax in axes[1]:
        ax.set_xlabel("$x_1$")
    for ax in axes[:, 0]:
        ax.set_ylabel("$x_2$")
    return figure


def full_scale(
    device: torch.device, *, seed: int, seeds: int, **budget: int
) -> tuple[dict[str, Any], dict[str, Figure]]:
    """Repeat the comparison with several seeds; points of the plane need no GPU, so all of it runs on the CPU.

    Args:
        device: Of no effect.
        seed: The first seed; the others follow it.
        seeds: How many.
        budget: As for `run`.

    Returns:
        For each method, lists over seeds: "gap" (left out where there is no likelihood), "distance", "evaluations" and
        "seconds" to sample; the "floor" of each seed. A picture of the first seed's samples.
    """
    runs = [run(seed + i, **budget)[1:] for i in range(seeds)]
    results: dict[str, Any] = {"floor": [floor for *_, floor in runs]}
    for method, *entries in zip(METHODS, *(entries for entries, *_ in runs), strict=True):
        results[method] = {
            name: [getattr(entry, name) for entry in entries]
            for name in ("gap", "distance", "evaluations", "seconds")
            if getattr(entries[0], name) is not None
        }
    entries, data, _ = runs[0]
    return results, {"The data, and 2500 samples of each method": draw_clouds(entries, data)}
