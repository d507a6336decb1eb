"""DDIM: every process with the marginals of a diffusion model is as good as its own chain for a trained network.

Letters: n is the step that x is at, s the step to go to; both count from 0, the data, to T, noise. The step need not
be s = n - 1, and it may even go up: without noise the sampler runs in both directions.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from noise2tokens.flow_vs_diffusion.diffusion import Network, NoiseSchedule
from noise2tokens.flow_vs_diffusion.paths import ProbabilityPath

SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("eps", "x0", "score", "v")


def sub_sequence(total: int, count: int, spacing: str = "trailing") -> list[int]:
    """Choose which of the steps of a chain a sampler visits.

    Args:
        total: Number T of steps of the chain.
        count: Number K of evaluations of the network.
        spacing: "trailing" starts at T, and its last evaluation is at about T/K. "leading" ends with an evaluation
            at 1, and starts at T - T/K + 1, below the noise. "linspace" has both ends, and no step of size T/K.

    Returns:
        K + 1 falling steps. The last is 0, where nothing is evaluated.

    Raises:
        ValueError: If the spacing is unknown, or count is not in 1..T (2..T for linspace).

    Source: Lin et al. 2024, table 2 (the names are those of the diffusers library, whose time step i is n = i + 1).
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing must be one of {SPACINGS}, got {spacing!r}")
    least = 2 if spacing == "linspace" else 1
    if not least <= count <= total:
        raise ValueError(f"{spacing} needs a count in {least}..{total}, got {count}")
    k = torch.arange(count, dtype=torch.float64)
    if spacing == "leading":
        steps = 1 + total // count * k.flip(0)
    elif spacing == "trailing":
        steps = total - total / count * k
    else:
        steps = total - (total - 1) / (count - 1) * k
    return [*steps.round().int().tolist(), 0]


def chain_of(path: ProbabilityPath, steps: int) -> NoiseSchedule:
    """Make the chain of T steps whose step n has exactly the noise of a variance-preserving path at t = n/T.

    Args:
        path: With α² + σ² = 1, and α = 1 at t = 0.
        steps: T.

    Returns:
        The chain: ᾱ_n = α(n/T)².

    Raises:
        ValueError: If the path does not preserve variance.
    """
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    alpha_bar = path.alpha(t) ** 2
    if not torch.allclose(alpha_bar + path.sigma(t) ** 2, torch.ones_like(t)) or alpha_bar[0] != 1:
        raise ValueError("need a path with α² + σ² = 1 that starts at α = 1")
    return NoiseSchedule(1 - alpha_bar[1:] / alpha_bar[:-1])


def posterior_std(schedule: NoiseSchedule, n: int, s: int) -> float:
    """Return the standard deviation of x_s given x_n and x_0, in the chain of which n and s are neighbors.

    Args:
        schedule: The chain.
        n: A step.
        s: A step below n.

    Source: Song et al. 2021 (DDIM), equation 16 with η = 1.
    """
    bar_n, bar_s = schedule.alpha_bar[n].item(), schedule.alpha_bar[s].item()
    return ((1 - bar_s) / (1 - bar_n) * (1 - bar_n / bar_s)) ** 0.5


def ddim_step(
    schedule: NoiseSchedule,
    x: Float[Tensor, "batch *event"],
    eps: Float[Tensor, "batch *event"],
    n: int,
    s: int,
    *,
    eta: float | int = 0.0,
    wide: bool = False,
    clip: bool = False,
    noise: Float[Tensor, "batch *event"] | None = None,
) -> Float[Tensor, "batch *event"]:
    """Go from x_n to x_s: guess x_0, point at it, and replace part of the predicted noise by fresh noise.

    Args:
        schedule: The chain.
        x: x_n.
        eps: The noise that the network sees in x_n.
        n: The step of x; at n = 0 there is no noise to be seen.
        s: The step to go to, below n; without noise any step.
        eta: Fresh noise relative to that of the posterior: 0 is DDIM, 1 is DDPM.
        wide: Add noise of variance 1 - ᾱ_n/ᾱ_s instead, the larger choice of DDPM; the mean remains that of eta = 1.
            The step to the data, s = 0, adds none.
        clip: Clamp the guess of x_0 to [-1, 1]; the predicted noise stays as it is.
        noise: Standard normal; needed where eta > 0.

    Returns:
        x_s.

    Raises:
        ValueError: If a step is outside 0..T, eta outside [0, 1], noise is missing, or noise is asked for on a way
            that does not lead down, or `wide` for another eta than 1.

    Source: Song et al. 2021 (DDIM), equation 12; σ̂ (`wide`): section 5 and appendix D.3; without noise at
        the end as in Ho et al. 2020, algorithm 2.
    """
    if not (0 <= n <= schedule.steps and 0 <= s <= schedule.steps):
        raise ValueError(f"steps must lie in 0..{schedule.steps}, got {n} and {s}")
    if not 0 <= eta <= 1 or (wide and eta != 1):
        raise ValueError(f"eta must lie in [0, 1], and be 1 for wide noise, got {eta}")
    if eta > 0 and (noise is None or s > n):
        raise ValueError(f"eta > 0 needs noise and a way down, got steps {n} and {s}")
    bar_n, bar_s = schedule.alpha_bar[n].item(), schedule.alpha_bar[s].item()
    x0 = (x - (1 - bar_n) ** 0.5 * eps) / bar_n**0.5
    if clip:
        x0 = x0.clamp(-1, 1)
    sigma = eta * posterior_std(schedule, n, s) if eta > 0 else 0.0
    mean = bar_s**0.5 * x0 + (1 - bar_s - sigma**2) ** 0.5 * eps
    if wide and s > 0:
        sigma = (1 - bar_n / bar_s) ** 0.5
    return mean + sigma * noise if eta > 0 else mean


@torch.no_grad()
def ddim_sample(
    network: Network,
    schedule: NoiseSchedule,
    x: Float[Tensor, "batch *event"],
    steps: Sequence[int],
    *,
    eta: float | int = 0.0,
    wide: bool = False,
    clip: bool = False,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch *event"]:
    """Visit the given steps, one evaluation of the network for each but the last.

    Args:
        network: Predicts ε, given x_n and n/T.
        schedule: The chain.
        x: x at the first step: standard normal if that is T.
        steps: From noise to data they fall, as `sub_sequence` makes them. From data to noise they rise, and eta is 0.
        eta: As for `ddim_step`; so are `wide` and `clip`.
        wide: More noise.
        clip: Clamp the guesses of x_0.
        generator: Source of the fresh noise, on the device of x; the global one where left out.

    Returns:
        x at the last step.

    Raises:
        ValueError: If there are fewer than two steps, or they go up and down.
    """
    moves = list(zip(steps, steps[1:], strict=False))
    if not moves or (any(n < s for n, s in moves) and any(n > s for n, s in moves)):
        raise ValueError(f"steps must go one way, two at least, got {list(steps)}")
    for n, s in moves:
        eps = network(x, torch.full((len(x),), n / schedule.steps, dtype=x.dtype, device=x.device))
        noise = None
        if eta > 0:
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        x = ddim_step(schedule, x, eps, n, s, eta=eta, wide=wide, clip=clip, noise=noise)
    return x


def as_eps(network: Network, schedule: NoiseSchedule, predicts: str) -> Network:
    """Let a network that predicts something else be asked for the noise.

    Args:
        network: Called as network(x, n/T).
        schedule: The chain.
        predicts: "eps", "x0", "score" (∇ log p), or "v" (√ᾱ ε - √(1-ᾱ) x_0, the velocity along the arc from x_0 to
            ε; not the velocity in time of chapter 4).

    Returns:
        A network that predicts ε.

    Raises:
        ValueError: If the kind is unknown.

    Source: Salimans and Ho 2022, section 4 and appendix D (v).
    """
    if predicts not in PREDICTIONS:
        raise ValueError(f"a network predicts one of {PREDICTIONS}, got {predicts!r}")

    def eps(x: Tensor, t: Tensor) -> Tensor:
        value = network(x, t)
        alpha_bar = schedule.at((t * schedule.steps).round().long(), x)
        signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        if predicts == "x0":
            return (x - signal * value) / noise
        if predicts == "score":
            return -noise * value
        return signal * value + noise * x if predicts == "v" else value

    return eps


def slerp(
    start: Float[Tensor, "batch *event"],
    end: Float[Tensor, "batch *event"],
    share: float | int,
) -> Float[Tensor, "batch *event"]:
    """Go from one vector to another along the arc between them, at constant angular speed.

    Args:
        start: Vectors, one a sample, not zero.
        end: As many, not parallel to the first.
        share: 0 returns the start, 1 the end.

    Returns:
        sin((1-w) θ)/sin θ · start + sin(w θ)/sin θ · end, θ the angle between them.

    Source: Shoemake 1985; Song et al. 2021 (DDIM), appendix D.5.
    """
    a, b = start.flatten(1), end.flatten(1)
    angle = torch.cosine_similarity(a, b, dim=1).clamp(-1, 1).acos()[:, None]
    blend = (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()
    return blend.view_as(start)
