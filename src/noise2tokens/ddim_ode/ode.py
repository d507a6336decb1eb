"""The differential equations behind DDIM, for any path x_t = α x_0 + σ ε.

A diffusion dx = f x dt + g dw has the same densities at all times as an ordinary equation without noise, the
probability flow. It can be followed by any solver, in both directions, and knows the likelihood. Here are solvers made
for it, which treat its linear part exactly; one of them is DDIM.

`score(x, t)` is ∇ log p_t(x), `eps(x, t)` the expected noise, -σ times the score; both get one time for each sample.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from noise2tokens.flow_vs_diffusion.integrators import Velocity
from noise2tokens.flow_vs_diffusion.paths import ProbabilityPath, per_sample

METHODS = ("euler", "heun", "dpm2")
Field = Callable[[Tensor, Tensor], Tensor]


class HeatPath(ProbabilityPath):
    """α = 1, σ² = 2 D t: nothing but diffusion, the solution of the heat equation.

    Args:
        diffusivity: D, in squared units of x per unit of time, positive.

    Raises:
        ValueError: If D is not positive.
    """

    def __init__(self, diffusivity: float | int = 1.0):
        if not diffusivity > 0:
            raise ValueError(f"diffusivity must be positive, got {diffusivity}")
        self.diffusivity = diffusivity

    def alpha(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """1."""
        return torch.ones_like(t)

    def sigma(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """(2 D t)^½."""
        return (2 * self.diffusivity * t).sqrt()

    def alpha_dot(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """0."""
        return torch.zeros_like(t)

    def sigma_dot(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """D / σ, infinite at t = 0."""
        return self.diffusivity / self.sigma(t)


def heat_equation(
    density: Float[Tensor, "n"], spacing: float, diffusivity: float | int, time: float | int
) -> Float[Tensor, "n"]:
    """Solve ∂p/∂t = D ∂²p/∂x² on a periodic grid: each wave of number k fades by exp(-D k² t).

    Args:
        density: p at time 0, on evenly spaced points.
        spacing: Distance of two points.
        diffusivity: D.
        time: How long; below 0 the waves grow instead, the shortest most.

    Returns:
        p at that time.

    Source: Fourier 1822.
    """
    k = 2 * math.pi * torch.fft.rfftfreq(len(density), spacing, dtype=density.dtype)
    waves = torch.fft.rfft(density) * torch.exp(-diffusivity * k**2 * time)
    return torch.fft.irfft(waves, len(density))


def sde_coefficients(
    path: ProbabilityPath, t: Float[Tensor, "*n"]
) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
    """Return f and g² of the diffusion dx = f x dt + g dw whose conditional densities are N(α x_0, σ² I).

    Args:
        path: Gives α and σ.
        t: Times above 0, where σ is not 0.

    Returns:
        f = α'/α and g² = 2 σ σ' - 2 f σ².

    Source: Kingma et al. 2021, equation 9 and appendix; Song et al. 2021, equations 29 and 30.
    """
    alpha, sigma = path.alpha(t), path.sigma(t)
    f = path.alpha_dot(t) / alpha
    return f, 2 * sigma * (path.sigma_dot(t) - f * sigma)


def probability_flow(score: Field, path: ProbabilityPath) -> Velocity:
    """Return the velocity f x - ½ g² ∇ log p_t(x), which moves samples as the diffusion moves the density.

    Source: Song et al. 2021, equation 13.
    """

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        f, g2 = (per_sample(value, x) for value in sde_coefficients(path, t))
        return f * x - g2 / 2 * score(x, t)

    return velocity


@torch.no_grad()
def reverse_sde_sample(
    score: Field,
    path: ProbabilityPath,
    x: Float[Tensor, "batch *event"],
    times: Sequence[float] | Float[Tensor, "points"],
    *,
    eta: float | int = 1.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch *event"]:
    """Run the diffusion backwards in steps of Euler and Maruyama.

    Args:
        score: ∇ log p_t(x).
        path: Gives f and g.
        x: Samples at the first time.
        times: Falling, all but the last above 0.
        eta: 1 is the reverse of the diffusion, 0 the probability flow; others share the densities of both.
        generator: Source of the noise, on the device of x.

    Returns:
        Samples at the last time.

    Raises:
        ValueError: If the times do not fall, or eta is negative.

    Source: Song et al. 2021, equation 6 (eta = 1); Zhang and Chen 2023, equation 6 (any eta).
    """
    times = torch.as_tensor(times, dtype=torch.float64)
    if len(times) < 2 or not bool((times.diff() < 0).all()) or eta < 0:
        raise ValueError(f"need falling times and eta >= 0, got {times.tolist()} and {eta}")
    for t, dt in zip(times[:-1], times.diff().tolist(), strict=True):
        f, g2 = (value.item() for value in sde_coefficients(path, t))
        drift = f * x - (1 + eta**2) / 2 * g2 * score(x, t.to(x).expand(len(x)))
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        x = x + dt * drift + eta * (g2 * -dt) ** 0.5 * noise
    return x


def time_at(path: ProbabilityPath, log_snr: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Find the times at which log(α/σ) has given values, by halving the interval [0, 1].

    Args:
        path: With log(α/σ) falling in time.
        log_snr: λ, half the logarithm of the signal-to-noise ratio, in float64.

    Raises:
        ValueError: If a value is not reached in [0, 1].
    """
    low, high = torch.zeros_like(log_snr), torch.ones_like(log_snr)

    def excess(t: Tensor) -> Tensor:
        return (path.alpha(t) / path.sigma(t)).log() - log_snr

    if not bool(((excess(low) > -1e-9) & (excess(high) < 1e-9)).all()):
        raise ValueError(f"log(α/σ) must be reached in [0, 1], got {log_snr.tolist()}")
    for _ in range(52):
        middle = (low + high) / 2
        noisy = excess(middle) < 0
        low, high = torch.where(noisy, low, middle), torch.where(noisy, middle, high)
    return low


@torch.no_grad()
def exponential_sample(
    eps: Field,
    path: ProbabilityPath,
    x: Float[Tensor, "batch *event"],
    times: Sequence[float] | Float[Tensor, "points"],
    method: str = "euler",
) -> Float[Tensor, "points batch *event"]:
    """Solve the probability flow in the form d(x/α) = ε d(σ/α), in which only ε has to be approximated.

    Args:
        eps: Expected noise.
        path: Gives α, which is not 0 at any of the times, and σ.
        x: Where to start.
        times: From the time of x on, in one direction.
        method: "euler" holds ε constant over a step (DDIM). "heun" takes the mean of ε at both ends. "dpm2" holds it
            at its value in the middle of log(α/σ). The last two evaluate ε twice a step, but once in a step that
            starts or ends at σ = 0, where it is left to "euler".

    Returns:
        The positions at all times.

    Raises:
        ValueError: If there is no such method, or α is 0 at one of the times.

    Source: Song et al. 2021 (DDIM), equation 14; Karras et al. 2022, algorithm 1; Lu et al. 2022, algorithm 1.
    """
    times = torch.as_tensor(times, dtype=torch.float64)
    alpha, sigma = path.alpha(times), path.sigma(times)
    if method not in METHODS or not bool((alpha > 0).all()):
        raise ValueError(f"need a method of {METHODS} and α > 0, got {method!r}, {alpha.tolist()}")
    ratio = (alpha / sigma).log()
    middles = (ratio[1:] + ratio[:-1]) / 2  # infinite where a step touches σ = 0
    halfways = torch.full_like(middles, math.nan)
    if method == "dpm2":
        halfways[middles.isfinite()] = time_at(path, middles[middles.isfinite()])

    def at(x: Tensor, t: Tensor) -> Tensor:
        return eps(x, t.to(x).expand(len(x)))

    def advance(x: Tensor, noise: Tensor, t: Tensor, s: Tensor) -> Tensor:
        kept = (path.alpha(s) / path.alpha(t)).item()
        return kept * x + (path.sigma(s) - kept * path.sigma(t)).item() * noise

    positions = [x]
    for t, s, middle, halfway in zip(times, times[1:], middles, halfways, strict=False):
        noise = at(x, t)
        if method == "heun" and middle.isfinite():
            noise = (noise + at(advance(x, noise, t, s), s)) / 2
        elif method == "dpm2" and middle.isfinite():
            noise = at(advance(x, noise, t, halfway), halfway)
        x = advance(x, noise, t, s)
        positions.append(x)
    return torch.stack(positions)
