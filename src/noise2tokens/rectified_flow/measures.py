"""What pairs cost, how straight a flow is, and how much its lines cross: the three parts of one budget."""

import torch
from jaxtyping import Float
from torch import Tensor

from noise2tokens.flow_vs_diffusion.integrators import Velocity, integrate
from noise2tokens.rectified_flow.reflow import rf_loss


def transport_cost(pairs: Float[Tensor, "n 2 *event"]) -> float:
    """Return the mean of |x_1 - x_0|² over pairs."""
    return (pairs[:, 1] - pairs[:, 0]).flatten(1).square().sum(1).mean().item()


@torch.no_grad()
def straightness(velocity: Velocity, x1: Float[Tensor, "n *event"], steps: int = 50) -> float:
    """Measure how far trajectories are from straight lines: S = ∫ E|(Z_1 - Z_0) - v(Z_t, t)|² dt.

    Args:
        velocity: v(x, t).
        x1: Points of the source, from which the trajectories are followed down to t = 0.
        steps: Runge-Kutta steps; the integral is a trapezoidal sum over their ends.

    Returns:
        The mean over the points; 0 for straight lines at constant speed, in units of length squared.

    Source: Liu et al. 2023, section 2.2 (straight line flows).
    """
    times = torch.linspace(1, 0, steps + 1, dtype=x1.dtype, device=x1.device)
    path = integrate(velocity, x1, times, "rk4")
    chord = x1 - path[-1]
    off = [
        (chord - velocity(x, t.expand(len(x)))).flatten(1).square().sum(1).mean()
        for x, t in zip(path, times, strict=True)
    ]
    return torch.trapezoid(torch.stack(off), dx=1 / steps).item()


@torch.no_grad()
def crossing(velocity: Velocity, pairs: Float[Tensor, "n 2 *event"], points: int = 50) -> float:
    """Measure what a velocity cannot say about the line it is on: V = ∫ E|(X_1 - X_0) - v(X_t, t)|² dt.

    Args:
        velocity: v(x, t); V is least for the exact velocity of the pairs, and then 0 where no two lines cross.
        pairs: x_0 and x_1.
        points: Times, the midpoints of as many equal parts of [0, 1].

    Returns:
        The mean over pairs; the least loss that training can reach, times the number of elements.

    Source: Liu et al. 2023, section 3 (straight couplings).
    """
    x0, x1 = pairs.unbind(1)
    times = (torch.arange(points, dtype=x0.dtype, device=x0.device) + 0.5) / points
    losses = [rf_loss(velocity, x0, x1, t.expand(len(x0))) for t in times]
    return torch.stack(losses).mean().item() * x0[0].numel()
