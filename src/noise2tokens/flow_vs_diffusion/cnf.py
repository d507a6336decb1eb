"""Continuous normalizing flows: a flow described by how points move.

A velocity v(x, t) carries every point along dx/dt = v(x, t), from data at t = 0 to latents at t = 1. The network need
not be invertible: run the equation backwards and you are back. The log-determinant is the integral of the divergence of
v along the way, so it is solved for together with the point, as one more coordinate.

The divergence is exact, one derivative for each coordinate, or Hutchinson's estimate, one derivative in a random
direction. Each is one backward pass through the network, which all of them share one forward pass for; forward-mode
differentiation would do too, but takes two to three times as long on a CPU. A graph is kept only if the caller wants
to differentiate once more.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from noise2tokens.flow_vs_diffusion.integrators import Velocity, dormand_prince, integrate
from noise2tokens.nice import PRIORS, Flow


def exact_divergence(
    velocity: Velocity, x: Float[Tensor, "batch *event"], t: Float[Tensor, "batch"]
) -> tuple[Float[Tensor, "batch *event"], Float[Tensor, "batch"]]:
    """Evaluate the velocity and its divergence Σ ∂v_i/∂x_i, with one backward pass for each coordinate.

    Args:
        velocity: v(x, t); no sample may influence another.
        x: Points.
        t: Times.

    Returns:
        The velocity, and one divergence a sample.
    """
    points, v = _tracked(velocity, x, t)
    divergence = x.new_zeros(len(x))
    for i, direction in enumerate(torch.eye(x[0].numel(), dtype=x.dtype, device=x.device)):
        slope = _pull_back(v, points, direction.view(x.shape[1:]).expand_as(x))
        divergence = divergence + slope.flatten(1)[:, i]
    return (v if torch.is_grad_enabled() else v.detach()), divergence


def hutchinson_divergence(
    velocity: Velocity,
    x: Float[Tensor, "batch *event"],
    t: Float[Tensor, "batch"],
    probe: Float[Tensor, "batch *event"],
) -> tuple[Float[Tensor, "batch *event"], Float[Tensor, "batch"]]:
    """Evaluate the velocity and an unbiased estimate of its divergence, probeᵀ (∂v/∂x) probe, with one backward pass.

    Args:
        velocity: v(x, t); no sample may influence another.
        x: Points.
        t: Times.
        probe: Random directions with mean 0 and covariance I, such as those of `draw_probe`.

    Source: Grathwohl et al. 2019, section 3.1; Hutchinson 1990.
    """
    points, v = _tracked(velocity, x, t)
    slope = _pull_back(v, points, probe)
    return (v if torch.is_grad_enabled() else v.detach()), (slope * probe).flatten(1).sum(1)


@torch.enable_grad()
def _tracked(velocity: Velocity, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The points, able to receive a gradient, and the velocity there."""
    points = x if x.requires_grad else x.detach().requires_grad_()
    return points, velocity(points, t)


def _pull_back(v: Tensor, points: Tensor, direction: Tensor) -> Tensor:
    """(∂v/∂x)ᵀ direction."""
    return torch.autograd.grad(
        v, points, direction, retain_graph=True, create_graph=torch.is_grad_enabled()
    )[0]


def draw_probe(
    x: Float[Tensor, "batch *event"], generator: torch.Generator | None = None
) -> Float[Tensor, "batch *event"]:
    """Draw directions of independent signs, ±1: among all with covariance I, those whose estimate varies least.

    Args:
        x: Gives shape, dtype and device.
        generator: Source of randomness on that device; the global one where left out.
    """
    signs = torch.randint(2, x.shape, generator=generator, device=x.device)
    return (2 * signs - 1).to(x)


def with_log_det(
    velocity: Velocity, shape: Sequence[int], probe: Float[Tensor, "batch *event"] | None = None
) -> Callable[[Float[Tensor, "batch n"], Float[Tensor, "batch"]], Float[Tensor, "batch n"]]:
    """Extend an equation for points by one for log |det|, whose rate is the divergence.

    Args:
        velocity: v(x, t).
        shape: Shape of one sample; the extended state is its D numbers and the log-determinant, (batch, D + 1).
        probe: Directions for Hutchinson's estimate, the same at every evaluation; the exact divergence where left out.

    Returns:
        The velocity of the extended state.

    Source: Chen et al. 2018, theorem 1.
    """

    def extended(state: Tensor, t: Tensor) -> Tensor:
        x = state[:, :-1].view(-1, *shape)
        if probe is None:
            v, divergence = exact_divergence(velocity, x, t)
        else:
            v, divergence = hutchinson_divergence(velocity, x, t, probe)
        return torch.cat([v.flatten(1), divergence[:, None]], 1)

    return extended


def _extend(x: Tensor) -> Tensor:
    return torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], 1)


class ContinuousFlow(Flow):
    """A flow made of a velocity and a number of Runge-Kutta steps.

    The determinant is that of the equation, not of the steps: both agree to the order of the method, 4.

    Args:
        event_shape: Shape of one sample.
        network: v(x, t), with t (batch,) in [0, 1].
        steps: Steps from t = 0 to t = 1, each of four evaluations.
        prior: As in `Flow`.

    Raises:
        ValueError: If there is no step.

    Source: Chen et al. 2018, section 4; Grathwohl et al. 2019.
    """

    def __init__(
        self, event_shape: Sequence[int], network: nn.Module, steps: int, prior: str = "gaussian"
    ):
        super().__init__(event_shape, prior)
        if steps < 1:
            raise ValueError(f"need at least one step, got {steps}")
        self.network = network
        self.times = [k / steps for k in range(steps + 1)]

    def forward(
        self, x: Float[Tensor, "batch *event"], probe: Float[Tensor, "batch *event"] | None = None
    ) -> tuple[Float[Tensor, "batch *event"], Float[Tensor, "batch"]]:
        """Follow the equation from t = 0 to 1, collecting the divergence (estimated, where a probe is given)."""
        self.check_input(x)
        extended = with_log_det(self.network, x.shape[1:], probe)
        end = integrate(extended, _extend(x), self.times, "rk4")[-1]
        return end[:, :-1].view(x.shape), end[:, -1]

    def inverse(self, z: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """Follow the equation from t = 1 to 0."""
        self.check_input(z)
        return integrate(self.network, z, self.times[::-1], "rk4")[-1]


@dataclass(frozen=True)
class Likelihood:
    """What `log_likelihood` found.

    Attributes:
        log_prob: Log-density of each sample in nats.
        z: Where each sample ended, at t = 1.
        evaluations: How often the velocity and its divergence were evaluated.
    """

    log_prob: Tensor
    z: Tensor
    evaluations: int


@torch.no_grad()
def log_likelihood(
    velocity: Velocity,
    x: Float[Tensor, "batch *event"],
    *,
    probe: Float[Tensor, "batch *event"] | None = None,
    start: float | int = 0,
    prior_std: float | int = 1,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Likelihood:
    """Score samples with a velocity, however it was trained, by solving from data to noise with `dormand_prince`.

    Args:
        velocity: v(x, t).
        x: Data.
        probe: Directions for Hutchinson's estimate; the exact divergence where left out.
        start: The time that the data is taken to have, above 0 where the velocity is infinite at 0.
        prior_std: Standard deviation of the noise at t = 1.
        rtol: Relative tolerance for one step.
        atol: Absolute tolerance for one step.

    Returns:
        The log-densities, the latents, and the number of evaluations.

    Raises:
        ValueError: If the start is not in [0, 1), or the deviation is not positive.
    """
    if not 0 <= start < 1 or not prior_std > 0:
        raise ValueError(
            f"need 0 <= start < 1 and prior_std > 0, got start={start} and prior_std={prior_std}"
        )
    extended = with_log_det(velocity, x.shape[1:], probe)
    solution = dormand_prince(extended, _extend(x), start, 1, rtol, atol)
    z, log_det = solution.x[:, :-1].view(x.shape), solution.x[:, -1]
    scale = x[0].numel() * math.log(prior_std)
    log_prob = PRIORS["gaussian"].log_prob(z / prior_std) - scale + log_det
    return Likelihood(log_prob, z, solution.evaluations)
