"""Six methods of the first six chapters on one target with one budget, and what is measured of each.

All get the eight Gaussians, whose density is known, about 24,000 parameters, and the same number of training steps on
fresh points. `train_models` trains them, `compare_models` fills one row for each, and `full_scale` does both for
several seeds, because one seed cannot tell a difference between methods from one between runs.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
from noise2tokens.flow_vs_diffusion.diffusion import (
    Network,
    ancestral_sample,
    draw_steps,
    eps_loss,
)
from noise2tokens.flow_vs_diffusion.flow_matching import cfm_loss, predicted_velocity
from noise2tokens.flow_vs_diffusion.integrators import Velocity, dormand_prince
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
BANDWIDTH = 0.08
# The rows, in the order of the book. One network serves several: "ODE" is its equation, solved adaptively.
METHODS = (
    "VAE",
    "GAN",
    "NICE",
    "RealNVP",
    "Diffusion, DDPM",
    "Diffusion, DDIM",
    "Diffusion, ODE",
    "Flow matching, ODE",
    "Flow matching, 20 steps",
    "Flow matching, one step",
    "Rectified flow, ODE",
    "Rectified flow, one step",
)
HIDDEN = (
    "Diffusion, ODE",
    "Flow matching, 20 steps",
    "Rectified flow, ODE",
)  # look like their neighbors
PICTURED = tuple(name for name in METHODS if name not in HIDDEN)
BUDGETS = {
    "long": {
        "seeds": 5,
        "steps": 2000,
        "batch_size": 128,
        "pairs": 20_000,
        "test_points": 1000,
        "samples": 5000,
    },
}


class PointVAE(nn.Module):
    """A variational autoencoder whose decoder puts out a mean; one learned variance serves all latents.

    Args:
        dim: Number of coordinates of a point, and of its latent.
        width: Units of the two hidden layers of encoder and decoder.

    Raises:
        ValueError: If a size is not positive.

    Source: Rybkin et al., Simple and effective VAE training with calibrated decoders, 2021, section 3 (the variance).
    """

    def __init__(self, dim: int, width: int):
        super().__init__()
        if dim < 1 or width < 1:
            raise ValueError(f"need dim and width of at least 1, got {dim} and {width}")
        self.dim = dim
        self.encoder = mlp(dim, (width, width), 2 * dim)
        self.decoder = mlp(dim, (width, width), dim)
        self.log_var = nn.Parameter(torch.zeros(1))

    def decode(
        self, z: Float[Tensor, "*batch dim"]
    ) -> tuple[Float[Tensor, "*batch dim"], Float[Tensor, "*batch dim"]]:
        """Return the mean and the log-variance of x given z."""
        mean = self.decoder(z)
        return mean, self.log_var.expand_as(mean)

    def elbo(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch"]:
        """Return log p(x|z) - KL(q(z|x) ‖ N(0, I)) with one draw of z, in nats."""
        mean, log_var = self.encoder(x).chunk(2, -1)
        z = reparameterize(mean, log_var, torch.randn_like(mean))
        return normal_log_prob(x, *self.decode(z)) - gaussian_kl(mean, log_var)

    @torch.no_grad()
    def bound(self, x: Float[Tensor, "batch dim"], draws: int) -> Float[Tensor, "batch"]:
        """Return the importance-weighted lower bound on log p(x) from at least one draw, in nats."""
        if draws < 1:
            raise ValueError(f"need at least one draw, got {draws}")
        mean, log_var = self.encoder(x).chunk(2, -1)
        z = reparameterize(mean, log_var, torch.randn(draws, *mean.shape, device=x.device))
        prior = normal_log_prob(z, torch.zeros_like(mean), torch.zeros_like(mean))
        joint = normal_log_prob(x, *self.decode(z)) + prior
        return iwae_bound(joint - normal_log_prob(z, mean, log_var))

    @torch.no_grad()
    def sample(self, n: int, generator: Generator | None = None) -> Float[Tensor, "{n} dim"]:
        """Draw latents from the prior, and points from the Gaussians that they decode to."""
        z, noise = torch.randn(2, n, self.dim, generator=generator)
        return reparameterize(*self.decode(z), noise)


def on_spots(x: Float[Tensor, "n 2"]) -> float:
    """Return the share of points within two standard deviations of a center: 1 - e⁻² = 0.865 of the target's own."""
    target = EightGaussians()
    nearest = torch.cdist(x.double(), target.means).amin(1)
    return (nearest < 2 * target.std).double().mean().item()


def sample_gap(x: Float[Tensor, "n 2"], test: Float[Tensor, "m 2"]) -> float:
    """Return log p_true - log p̂ in nats, averaged over test points of the target, where p̂ is read off samples.

    Args:
        x: Samples of any method; each becomes a Gaussian of standard deviation `BANDWIDTH`.
        test: Points of the target.

    Returns:
        The gap. It is above 0 for samples of the target too, which have to be the row beside it.

    Source: Parzen 1962 (kernel density).
    """
    distance = torch.cdist(test.double(), x.double()).square()
    kernel = torch.logsumexp(-distance / (2 * BANDWIDTH**2), 1) - math.log(
        2 * math.pi * BANDWIDTH**2
    )
    return (EightGaussians().log_prob(test).double() - kernel + math.log(len(x))).mean().item()


@dataclass(frozen=True)
class Entry:
    """One method's row.

    Attributes:
        method: Its name, and how it was sampled.
        gap: Negative log-likelihood minus that of the true density on the same points, in nats; None without one.
        how: What the likelihood is: "exact", "bound", "by the ODE", or "none".
        sample_gap: The same read off the samples, by `sample_gap`.
        on_spots: Share of the samples that lie on a spot, by `on_spots`.
        distance: Sliced 2-Wasserstein distance of the samples to data.
        evaluations: Passes through a network for one sample.
        seconds: To draw all samples.
        samples: What was drawn.
    """

    method: str
    gap: float | None
    how: str
    sample_gap: float
    on_spots: float
    distance: float
    evaluations: int
    seconds: float
    samples: Tensor


def judge(
    method: str,
    draw: Callable[[], Float[Tensor, "n dim"]],
    data: Float[Tensor, "m dim"],
    test: Float[Tensor, "points dim"],
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
        test: Points of the target that are scored.
        network: Whose calls are counted; a method without one makes a single pass.
        log_ratio: log p_true - log p_model of test points, where there is a likelihood.
        how: What the likelihood is.

    Returns:
        The row.

    Raises:
        ValueError: If a likelihood comes without saying how it was found, or the other way round; if it, or a sample,
            is not finite.
    """
    if (log_ratio is None) != (how == "none"):
        raise ValueError(f"a likelihood says how it was found, got {how!r} for {log_ratio}")
    if log_ratio is not None and not (log_ratio.numel() and log_ratio.isfinite().all()):
        raise ValueError(f"{method}: log_ratio must be finite and not empty")
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    hook = network.register_forward_hook(count) if network is not None else None
    start = time.perf_counter()
    try:
        with torch.no_grad():
            samples = draw()
    finally:
        if hook is not None:
            hook.remove()
    seconds = time.perf_counter() - start
    if not (len(samples) and samples.isfinite().all()):
        raise ValueError(f"{method} drew no samples, or some that are not finite")
    return Entry(
        method,
        None if log_ratio is None else log_ratio.mean().item(),
        how,
        sample_gap(samples, test),
        on_spots(samples),
        sliced_wasserstein(samples, data).item(),
        calls if network is not None else 1,
        seconds,
        samples,
    )


def read_noise(
    denoiser: Network, x: Float[Tensor, "batch 2"], t: Float[Tensor, "batch"]
) -> Float[Tensor, "batch 2"]:
    """Return the noise that a network predicts which puts out v = α ε - σ x_0: ε = α v + σ x."""
    alpha, sigma = per_sample(DIFFUSION.alpha(t), x), per_sample(DIFFUSION.sigma(t), x)
    return alpha * denoiser(x, t) + sigma * x


@dataclass(frozen=True)
class Models:
    """What `train_models` trained.

    Attributes:
        vae: Chapter 1, with a decoder for points.
        gan: Chapter 1.
        nice: Chapter 2.
        realnvp: Chapter 3.
        denoiser: Chapters 4 and 5; puts out v = α ε - σ x_0, see `read_noise`.
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

    def sizes(self) -> dict[str, int]:
        """Count the numbers that training may change in each model."""
        return {
            name: sum(p.numel() for p in model.parameters()) for name, model in vars(self).items()
        }


def train_models(
    seed: int, draw: Callable[[int], Tensor], *, steps: int, batch_size: int, pairs: int
) -> Models:
    """Train the six methods on points of the plane, each with the learning rate that suits it.

    Args:
        seed: Where the random numbers of each model start, so that a change of one model leaves the others alone.
        draw: Returns a number of points of the target.
        steps: Optimizer steps of each model; rectified flow has as many again.
        batch_size: Points a step.
        pairs: Pairs that flow matching makes for rectified flow.

    Returns:
        The models.
    """
    budget = {"steps": steps, "batch_size": batch_size}
    fast = {**budget, "learning_rate": 1e-2, "warmup": 0.05}
    slow = {**budget, "learning_rate": 5e-3, "warmup": 0.05}

    torch.manual_seed(seed)
    vae = PointVAE(2, width=107)
    fit(vae, lambda x: -vae.elbo(x).mean(), draw, **fast)
    torch.manual_seed(seed)
    gan = GAN(2, 2, width=107)
    fit_gan(gan, draw, loss="non_saturating", **budget, learning_rate=2e-3)
    torch.manual_seed(seed)
    nice = NICE(2, [61, 61], couplings=6, prior="gaussian")
    fit(nice, lambda x: -nice.log_prob(x).mean(), draw, **slow)
    torch.manual_seed(seed)
    realnvp = RealNVP(2, [61, 61], couplings=6)
    fit(realnvp, lambda x: -realnvp.log_prob(x).mean(), draw, **slow)

    torch.manual_seed(seed)
    denoiser = TimeMLP(2, width=104)
    noise_of = partial(read_noise, denoiser)
    fit(
        denoiser,
        lambda x: eps_loss(noise_of, CHAIN, x, torch.randn_like(x), draw_steps(CHAIN, x)),
        draw,
        **fast,
    )
    torch.manual_seed(seed)
    velocity = TimeMLP(2, width=104)
    fit(
        velocity,
        lambda x: cfm_loss(velocity, LINE, x, torch.randn_like(x), torch.rand(len(x))),
        draw,
        **fast,
    )
    straight = copy.deepcopy(velocity)
    fit(
        straight,
        lambda pair: rf_loss(
            straight, pair[:, 0], pair[:, 1], uniform_times(len(pair), pair.device)
        ),
        reflow(velocity, torch.randn(pairs, 2), tolerance=1e-4),
        **fast,
    )
    return Models(vae, gan, nice, realnvp, denoiser, velocity, straight)


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
    truth, m, noise = EightGaussians().log_prob(test), models, torch.randn(samples, 2)
    noise_of = partial(read_noise, m.denoiser)
    diffusion = predicted_velocity(noise_of, DIFFUSION, "eps")

    def by_ode(velocity: Velocity, start: float = 0.0) -> Tensor:
        return truth - log_likelihood(velocity, test, start=start, rtol=1e-4, atol=1e-4).log_prob

    def solve(velocity: Velocity, end: float = 0.0) -> Tensor:
        return dormand_prince(velocity, noise, 1, end, 1e-3, 1e-3).x

    with torch.no_grad():
        bound = truth - m.vae.bound(test, draws=500)
        exact = {flow: truth - flow.log_prob(test) for flow in (m.nice, m.realnvp)}
    # Name: how to draw, the network whose calls count, log p_true - log p_model, how that was found.
    rows = {
        "VAE": (lambda: m.vae.sample(samples), None, bound, "bound"),
        "GAN": (lambda: m.gan.sample(samples), None, None, "none"),
        "NICE": (lambda: m.nice.sample(samples), None, exact[m.nice], "exact"),
        "RealNVP": (lambda: m.realnvp.sample(samples), None, exact[m.realnvp], "exact"),
        "Diffusion, DDPM": (
            lambda: ancestral_sample(noise_of, CHAIN, noise), m.denoiser, None, "none",
        ),
        "Diffusion, DDIM": (
            lambda: ddim_sample(noise_of, CHAIN, noise, sub_sequence(1000, FEW)), m.denoiser, None, "none",
        ),
        "Diffusion, ODE": (
            lambda: solve(diffusion, 1e-3), m.denoiser, by_ode(diffusion, 1e-3), "by the ODE",
        ),
        "Flow matching, ODE": (
            lambda: solve(m.velocity), m.velocity, by_ode(m.velocity), "by the ODE",
        ),
        "Flow matching, 20 steps": (lambda: sample(m.velocity, noise, FEW), m.velocity, None, "none"),
        "Flow matching, one step": (lambda: sample(m.velocity, noise, 1), m.velocity, None, "none"),
        "Rectified flow, ODE": (
            lambda: solve(m.straight), m.straight, by_ode(m.straight), "by the ODE",
        ),
        "Rectified flow, one step": (lambda: sample(m.straight, noise, 1), m.straight, None, "none"),
    }  # fmt: skip
    return [
        judge(method, draw, data, test, network=network, log_ratio=ratio, how=how)
        for method, (draw, network, ratio, how) in ((name, rows[name]) for name in METHODS)
    ]


def run(
    seed: int, *, steps: int, batch_size: int, pairs: int, test_points: int, samples: int
) -> tuple[Models, list[Entry], Float[Tensor, "n 2"], list[Entry]]:
    """Train and compare all methods once.

    Args:
        seed: Seeds everything.
        steps: Optimizer steps of each model.
        batch_size: Points a step.
        pairs: Pairs of rectified flow.
        test_points: Points whose likelihood is taken.
        samples: Points drawn from each model.

    Returns:
        The models, a row for each of `METHODS`, 20,000 points of data, and the floor: the rows of five draws of the
        target itself.

    Raises:
        ValueError: If a number is not positive.
    """
    if min(steps, batch_size, pairs, test_points, samples) < 1:
        raise ValueError(
            f"need numbers of at least 1, got {(steps, batch_size, pairs, test_points, samples)}"
        )
    seed_everything(seed)
    draws = Generator().manual_seed(seed)

    def draw(n: int) -> Tensor:
        return EightGaussians().sample(n, draws)

    models = train_models(seed, draw, steps=steps, batch_size=batch_size, pairs=pairs)
    data, test = draw(20_000), draw(test_points)
    floor = [judge("data", lambda: draw(samples), data, test) for _ in range(5)]
    return models, compare_models(models, data, test, samples), data, floor


def draw_clouds(entries: list[Entry], data: Float[Tensor, "n 2"]) -> Figure:
    """Draw the data and the samples of each pictured method, with the share that lies on a spot."""
    figure, axes = plt.subplots(2, 5, figsize=(7.6, 3.9), sharex=True, sharey=True)
    rows = {entry.method: entry for entry in entries}
    clouds = {"Data": (data, on_spots(data))}
    clouds |= {name: (rows[name].samples, rows[name].on_spots) for name in PICTURED}
    for ax, (name, (cloud, share)) in zip(axes.flat, clouds.items(), strict=True):
        ax.scatter(*cloud[:2500].T, s=0.4)
        ax.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), aspect="equal")
        title = name.replace(", ", "\n")
        ax.set_title(f"{title}\n{share:.0%} on a spot", fontsize="small")
    for ax in axes[1]:
        ax.set_xlabel("$x_1$")
    for ax in axes[:, 0]:
        ax.set_ylabel("$x_2$")
    return figure


QUANTITIES = ("gap", "sample_gap", "on_spots", "distance", "evaluations", "seconds")


def collect(runs: list[tuple[list[Entry], list[Entry]]]) -> dict[str, dict[str, list[float]]]:
    """Turn the rows and the floors of some runs into lists: by method (or "data"), then by quantity."""
    found = dict(zip(METHODS, zip(*(entries for entries, _ in runs), strict=True), strict=True))
    found["data"] = [entry for _, floor in runs for entry in floor]
    return {
        method: {
            name: [getattr(entry, name) for entry in entries]
            for name in QUANTITIES
            if getattr(entries[0], name) is not None
        }
        for method, entries in found.items()
    }


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
        For each method, lists over seeds of each of `QUANTITIES` ("gap" left out where there is no likelihood); for
        "data", lists over all draws of the floor. A picture of the first seed's samples.

    Raises:
        ValueError: If there is no seed.
    """
    if seeds < 1:
        raise ValueError(f"need at least one seed, got {seeds}")
    runs = [run(seed + i, **budget)[1:] for i in range(seeds)]
    results = collect([(entries, floor) for entries, _, floor in runs])
    entries, data, _ = runs[0]
    return results, {"The data, and 2500 samples of each method": draw_clouds(entries, data)}
