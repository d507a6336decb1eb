"""Learn a velocity along straight lines, then train again on the pairs that the flow itself makes.

A velocity is learned from pairs (x_0, x_1) of points of two distributions, by regression on x_1 - x_0 along the line
between them. Its flow joins each x_1 to another x_0 than it was paired with. Such pairs cost less to carry from end to
end, and the flow that is learned from them is straighter: that is reflow. A flow of straight lines needs one step.

Time is that of the book: the target (data) is x_0 at t = 0, the source (noise, or other data) is x_1 at t = 1, and
sampling runs from 1 down to 0. The paper has both the other way round.

Pairs are one tensor (n, 2, ...), x_0 first: whoever shuffles them cannot part them.
"""

import copy
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from noise2tokens import training
from noise2tokens.distribution_transforms.distances import optimal_pairs
from noise2tokens.flow_vs_diffusion.integrators import Velocity, dormand_prince, integrate
from noise2tokens.flow_vs_diffusion.paths import per_sample
from noise2tokens.training import History

# times(n, device) -> n times in [0, 1]
Times = Callable[[int, torch.device], Tensor]


def interpolate(
    x0: Float[Tensor, "batch *event"], x1: Float[Tensor, "batch *event"], t: Float[Tensor, "batch"]
) -> Float[Tensor, "batch *event"]:
    """Return the point x_t = (1 - t) x_0 + t x_1 on the line between each pair.

    Args:
        x0: Points of the target.
        x1: Points of the source, each row the partner of the same row of x0.
        t: Times in [0, 1].

    Source: Liu et al. 2023, section 2.1 (time reversed).
    """
    return x0 + per_sample(t, x0) * (x1 - x0)


def rf_loss(
    velocity: Velocity,
    x0: Float[Tensor, "batch *event"],
    x1: Float[Tensor, "batch *event"],
    t: Float[Tensor, "batch"],
) -> Float[Tensor, ""]:
    """Return the mean squared error of a velocity against x_1 - x_0, at one time on each pair's line.

    Args:
        velocity: A network v(x, t).
        x0: Points of the target.
        x1: Their partners in the source.
        t: Times in [0, 1].

    Returns:
        The mean over samples and elements.

    Raises:
        ValueError: If the velocity has another shape than the points: it would be broadcast.

    Source: Liu et al. 2023, equation 1.
    """
    v = velocity(interpolate(x0, x1, t), t)
    if v.shape != x1.shape:
        raise ValueError(f"velocity has shape {tuple(v.shape)} at points of {tuple(x1.shape)}")
    return (v - (x1 - x0)).square().mean()


def uniform_times(n: int, device: torch.device) -> Float[Tensor, "{n}"]:
    """Draw times uniformly on [0, 1)."""
    return torch.rand(n, device=device)


def logit_normal_times(n: int, device: torch.device) -> Float[Tensor, "{n}"]:
    """Draw times whose log(t / (1 - t)) is standard normal: most in the middle, few at the ends.

    Source: Esser et al. 2024, equation 19, with m = 0 and s = 1.
    """
    return torch.randn(n, device=device).sigmoid()


def source_times(n: int, device: torch.device) -> Float[Tensor, "{n}"]:
    """Return t = 1 for all: where a single step starts."""
    return torch.ones(n, device=device)


def shift_times(t: Float[Tensor, "*n"], shift: float | int) -> Float[Tensor, "*n"]:
    """Move times towards t = 1: t / (1 - t) grows by the factor `shift`.

    Args:
        t: Times in [0, 1].
        shift: Positive; 1 changes nothing.

    Raises:
        ValueError: If the shift is not positive.

    Source: Esser et al. 2024, equation 23.
    """
    if not shift > 0:
        raise ValueError(f"shift must be positive, got {shift}")
    return shift * t / (1 + (shift - 1) * t)


def independent_pairs(
    x0: Float[Tensor, "n *event"], x1: Float[Tensor, "n *event"]
) -> Float[Tensor, "n 2 *event"]:
    """Lay two sets of points of one shape side by side, row by row."""
    return torch.stack([x0, x1], 1)


def transport_pairs(
    x0: Float[Tensor, "n *event"], x1: Float[Tensor, "n *event"], batch_size: int
) -> Float[Tensor, "n 2 *event"]:
    """Pair two sets batch by batch, in each so that the sum of squared distances is least.

    Args:
        x0: Points of the target.
        x1: As many points of the source.
        batch_size: Points in each batch; the larger, the nearer to optimal transport. Time grows as its square, for
            a given n.

    Raises:
        ValueError: If n is not a multiple of the batch size.

    Source: Tong et al. 2024, section 3.3; Pooladian et al. 2023.
    """
    if batch_size < 1 or len(x0) % batch_size:
        raise ValueError(f"{len(x0)} points cannot be cut into batches of {batch_size}")
    pairs = independent_pairs(x0, x1)
    for batch in pairs.split(batch_size):
        batch[:, 1] = batch[optimal_pairs(batch[:, 0], batch[:, 1]), 1]
    return pairs


def fit(
    network: nn.Module,
    pairs: Float[Tensor, "n 2 *event"] | Callable[[int], Tensor],
    *,
    steps: int,
    batch_size: int = 256,
    learning_rate: float = 1e-2,
    times: Times = uniform_times,
    average: nn.Module | None = None,
) -> History:
    """Train a velocity on pairs.

    Args:
        network: Called as network(x, t).
        pairs: x_0 and x_1, side by side; or a function that draws a number of pairs.
        steps: Optimizer steps, over which the learning rate falls to zero along a cosine.
        batch_size: Pairs a step.
        learning_rate: Adam's, at its highest.
        times: Draws the times on the lines.
        average: As for `training.train`.

    Returns:
        The curve of `rf_loss`.
    """
    return training.fit(
        network,
        lambda batch: rf_loss(network, batch[:, 0], batch[:, 1], times(len(batch), batch.device)),
        pairs,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        average=average,
        label="velocity",
    )


@torch.no_grad()
def sample(
    velocity: Velocity, x1: Float[Tensor, "n *event"], steps: int, shift: float | int = 1
) -> Float[Tensor, "n *event"]:
    """Carry points of the source to the target with Euler steps.

    Args:
        velocity: v(x, t).
        x1: Points of the source, t = 1.
        steps: Number of steps, and of evaluations.
        shift: 1 for steps of equal length; above 1 they are short near t = 1, as in `shift_times`.

    Raises:
        ValueError: If there is no step, or the shift is not positive.

    Source: Liu et al. 2023, section 2.2; Esser et al. 2024, equation 23.
    """
    if steps < 1:
        raise ValueError(f"need at least one step, got {steps}")
    times = shift_times(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)
    return integrate(velocity, x1, times)[-1]


@torch.no_grad()
def reflow(
    velocity: Velocity,
    x1: Float[Tensor, "n *event"],
    *,
    tolerance: float = 1e-5,
    batch_size: int = 5000,
) -> Float[Tensor, "n 2 *event"]:
    """Pair each point of the source with the point that its own trajectory ends at.

    Args:
        velocity: v(x, t), as exact as it can be had: its errors become those of the next flow's data.
        x1: Points of the source.
        tolerance: Absolute and relative tolerance of each step of `dormand_prince`.
        batch_size: Points that are solved together.

    Returns:
        Pairs to train the next flow on.

    Source: Liu et al. 2023, algorithm 1.
    """
    ends = [
        dormand_prince(velocity, part, 1, 0, tolerance, tolerance).x
        for part in x1.split(batch_size)
    ]
    return independent_pairs(torch.cat(ends), x1)


def distill(
    network: nn.Module,
    pairs: Float[Tensor, "n 2 *event"],
    *,
    steps: int,
    batch_size: int = 256,
    learning_rate: float = 1e-2,
) -> nn.Module:
    """Train a copy of a network to make the step from t = 1 to t = 0 at once, for pairs of its own flow.

    Args:
        network: A trained velocity; it stays as it is.
        pairs: What `reflow` made with it.
        steps: Optimizer steps.
        batch_size: Pairs a step.
        learning_rate: As in `fit`.

    Returns:
        The student. It is good for `sample(student, x1, 1)` and for nothing else.

    Source: Liu et al. 2023, section 2.2 (distillation).
    """
    student = copy.deepcopy(network)
    options = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
    fit(student, pairs, times=source_times, **options)
    return student
