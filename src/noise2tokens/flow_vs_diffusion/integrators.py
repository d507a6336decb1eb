"""Solving dx/dt = v(x, t): three steps of fixed size, and one pair of formulas that chooses its own.

Everything here is written for a batch: x is (batch, ...), and v gets a time for each sample, (batch,), since that is
what networks take. Time may run in either direction; from noise to data it runs from 1 down to 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# velocity(x, t) -> dx/dt, with x (batch, ...), t (batch,)
Velocity = Callable[[Tensor, Tensor], Tensor]


def euler_step(
    velocity: Velocity, x: Float[Tensor, "batch *event"], t: float | int, dt: float | int
) -> Float[Tensor, "batch *event"]:
    """Advance x from t to t + dt along the tangent; one evaluation, order 1."""
    return x + dt * velocity(x, _times(x, t))


def heun_step(
    velocity: Velocity, x: Float[Tensor, "batch *event"], t: float | int, dt: float | int
) -> Float[Tensor, "batch *event"]:
    """Advance with the mean of the slopes at both ends, the second one guessed by Euler; two evaluations, order 2."""
    first = velocity(x, _times(x, t))
    second = velocity(x + dt * first, _times(x, t + dt))
    return x + dt / 2 * (first + second)


def rk4_step(
    velocity: Velocity, x: Float[Tensor, "batch *event"], t: float | int, dt: float | int
) -> Float[Tensor, "batch *event"]:
    """Advance with the classic Runge-Kutta formula; four evaluations, order 4."""
    k1 = velocity(x, _times(x, t))
    k2 = velocity(x + dt / 2 * k1, _times(x, t + dt / 2))
    k3 = velocity(x + dt / 2 * k2, _times(x, t + dt / 2))
    k4 = velocity(x + dt * k3, _times(x, t + dt))
    return x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


STEPS = {"euler": euler_step, "heun": heun_step, "rk4": rk4_step}


def _times(x: Tensor, t: float | int) -> Tensor:
    return torch.full((len(x),), t, dtype=x.dtype, device=x.device)


def integrate(
    velocity: Velocity,
    x: Float[Tensor, "batch *event"],
    times: Sequence[float] | Float[Tensor, "points"],
    method: str = "euler",
) -> Float[Tensor, "points batch *event"]:
    """Follow the equation through the given times, one step from each to the next.

    Args:
        velocity: v(x, t).
        x: Where to start.
        times: The first is the time of `x`; they rise or fall throughout.
        method: "euler", "heun" or "rk4".

    Returns:
        The positions at all times, the first being `x`. Differentiable, through every step.

    Raises:
        ValueError: If there is no such method, or the times are fewer than two or do not move in one direction.
    """
    times = [float(t) for t in times]
    if method not in STEPS:
        raise ValueError(f"method must be one of {sorted(STEPS)}, got {method!r}")
    gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    if not gaps or not (min(gaps) > 0 or max(gaps) < 0):
        raise ValueError(f"times must rise or fall throughout, got {times}")
    path = [x]
    for t, dt in zip(times, gaps, strict=False):
        path.append(STEPS[method](velocity, path[-1], t, dt))
    return torch.stack(path)


@dataclass(frozen=True)
class Solution:
    """What `dormand_prince` found.

    Attributes:
        x: The positions at the end, (batch, ...).
        times: The times between accepted steps, start and end included.
        evaluations: How often the velocity was evaluated, rejected steps included.
    """

    x: Tensor
    times: list[float]
    evaluations: int


# Dormand and Prince 1980, table 2: nodes, stages, and the weights of orders 5 and 4. The last stage is the fifth-order
# result itself, so its slope is the first of the next step.
NODES = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
FIFTH = (*STAGES[-1], 0)
FOURTH = (5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40)


def dormand_prince(
    velocity: Velocity,
    x: Float[Tensor, "batch *event"],
    start: float | int,
    end: float | int,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_evaluations: int = 10_000,
) -> Solution:
    """Solve from `start` to `end` with steps chosen so that each one's estimated error stays within tolerance.

    Two formulas share seven slopes; one is of order 5, the other of order 4, and their difference estimates the error.
    The error of a step is the root mean square, over the whole batch, of difference / (atol + rtol · |x|). A step is
    accepted where that is at most 1, and the next is 0.9 · error^(-1/5) times as long, within a factor of 0.2 to 10.

    Args:
        velocity: v(x, t).
        x: Where to start. Tolerances below 1e-6 need float64.
        start: Time of `x`.
        end: Time to reach, before or after `start`.
        rtol: Relative tolerance for one step.
        atol: Absolute tolerance for one step.
        max_evaluations: Give up beyond that.

    Returns:
        The end points, the accepted times and the number of evaluations.

    Raises:
        ValueError: If start is end, or a tolerance is not positive.
        FloatingPointError: If the steps become too small for the floating-point type, the evaluations exceed
            `max_evaluations`, or the velocity is not finite.

    Source: Dormand and Prince 1980; step control as in Hairer, Nørsett and Wanner 1993, section II.4.
    """
    if start == end or not (rtol > 0 and atol > 0):
        raise ValueError(
            f"need start != end and positive tolerances, got {start}, {end}, rtol={rtol}, atol={atol}"
        )

    def combine(slopes: list[Tensor], weights: Sequence[float | int]) -> Tensor:
        return sum(w * k for w, k in zip(weights, slopes, strict=True) if w)

    def size(y: Tensor, scale: Tensor) -> float:
        return (y / scale).square().mean().sqrt().item()

    t, times = float(start), [float(start)]
    direction = 1 if end > start else -1
    slopes = [velocity(x, _times(x, t))]
    evaluations = 1
    scale = atol + rtol * x.abs()
    # A first guess: a step over which x changes by a hundredth of its size.
    dt = min(abs(end - start), 0.01 * max(size(x, scale), 1.0) / max(size(slopes[0], scale), 1e-12))
    while t != end:
        if abs(end - t) <= dt * 1.01:
            dt = abs(end - t)
        h = direction * dt
        if t + h == t or dt < 10 * torch.finfo(x.dtype).eps * max(abs(start), abs(end)):
            raise FloatingPointError(
                f"the step at t = {t:.6g} fell to {dt:.1g}: the equation is stiff there, or the tolerance too tight "
                f"for {x.dtype}"
            )
        for node, weights in zip(NODES[1:], STAGES[1:], strict=True):
            y = x + h * combine(slopes, weights)
            slopes.append(velocity(y, _times(x, t + node * h)))
        evaluations += 6
        difference = h * combine(slopes, [a - b for a, b in zip(FIFTH, FOURTH, strict=True)])
        error = size(difference, atol + rtol * torch.maximum(x.abs(), y.abs()))
        if not error < float("inf"):
            raise FloatingPointError(f"the velocity is not finite near t = {t:.6g}")
        if error <= 1:
            t = float(end) if dt == abs(end - t) else t + h
            x, slopes = y, [slopes[-1]]
            times.append(t)
        else:
            slopes = slopes[:1]
        dt *= min(10.0, max(0.2, 0.9 * max(error, 1e-10) ** -0.2))
        if evaluations > max_evaluations and t != end:
            raise FloatingPointError(f"gave up at t = {t:.6g} after {evaluations} evaluations")
    return Solution(x, times, evaluations)
