"""The nearest orthogonal matrix: exactly, by singular values, and nearly, by a few products of matrices.

Any matrix is G = U S Vᵀ with singular values S. What is wanted is U Vᵀ, its polar factor: the same directions, all
stretched alike. An odd polynomial of a matrix, such as a X + b X XᵀX + c X (XᵀX)², leaves U and V alone and acts on
each singular value as a σ + b σ³ + c σ⁵. So a polynomial that drives numbers toward one, applied a few times,
orthogonalizes a matrix without its singular values being known.
"""

from functools import reduce

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: steep at zero, and not convergent
CLASSICAL = (15 / 8, -10 / 8, 3 / 8)  # the quintic of Newton and Schulz, which converges to one
STEPS = 5
EPS = 1e-7  # a matrix of a smaller norm is not brought to norm one


def polar(g: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
    """Return U Vᵀ, in the precision given; singular values that are zero up to rounding stay zero.

    Raises:
        ValueError: If it is no real matrix, or no batch of them.
    """
    _check(g, 0)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    rounding = max(g.shape[-2:]) * torch.finfo(g.dtype).eps
    kept = s > rounding * s[..., :1]
    return (u * kept[..., None, :]) @ vh


def newton_schulz(
    g: Float[Tensor, "*batch m n"],
    steps: int = STEPS,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*batch m n"]:
    """Return U p(p(...(S / ‖G‖_F))) Vᵀ with p(σ) = a σ + b σ³ + c σ⁵: about U Vᵀ.

    Args:
        g: A matrix, or a batch of them, each for itself.
        steps: How often the polynomial is applied.
        coefficients: (a, b, c).
        dtype: Precision of the products; that of `g` where left out. bfloat16 is the practice on GPUs.

    Returns:
        In the precision of `g`. A matrix whose norm is below 1e-7 is divided by 1e-7 instead.

    Raises:
        ValueError: If it is no real matrix, or `steps` is negative.

    Source: Jordan et al. 2024; Liu et al. 2025, section 2.1.
    """
    _check(g, steps)
    a, b, c = coefficients
    wide = g.shape[-2] <= g.shape[-1]
    x = g if wide else g.mT  # so that the product of x with itself is the smaller one
    x = (x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPS)).to(dtype or g.dtype)
    x = x.reshape(-1, *x.shape[-2:])
    for _ in range(steps):
        # baddbmm adds a product to a matrix, and rounds once.
        gram = x @ x.mT
        mixed = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, mixed, x, beta=a)
    return (x if wide else x.mT).reshape(g.shape).to(g.dtype)


def quintic(s, coefficients: tuple[float, float, float] = COEFFICIENTS):
    """Return a s + b s³ + c s⁵, what a step makes of a singular value: for a number, an array or a tensor."""
    a, b, c = coefficients
    return s * (a + s**2 * (b + s**2 * c))


def on_singular_values(s, steps: int = STEPS, coefficients: tuple = COEFFICIENTS):
    """Return what becomes of singular values of a matrix of norm one after some steps."""
    return reduce(lambda x, _: quintic(x, coefficients), range(steps), s)


def trapping_interval(coefficients: tuple = COEFFICIENTS) -> tuple[float, float]:
    """Return [low, high] around one that the quintic maps into itself: its minimum, and its value there.

    Raises:
        ValueError: If the quintic has no such minimum, or does not map the interval into itself.
    """
    _, valley = _extrema(coefficients)
    low = float(quintic(valley, coefficients))
    high = float(quintic(low, coefficients))
    inside = quintic(np.linspace(low, high, 10_001), coefficients)
    if not (low < 1 < high and low - 1e-9 <= inside.min() and inside.max() <= high + 1e-9):
        raise ValueError(f"{coefficients} map [{low:.3f}, {high:.3f}] out of itself")
    return low, high


def reach(steps: int = STEPS, coefficients: tuple = COEFFICIENTS) -> float:
    """Return the smallest singular value, over the Frobenius norm, that has grown to `low` after some steps.

    From there up to where the quintic has its maximum it is increasing, so its inverse is followed from `low` down.

    Raises:
        ValueError: As for `trapping_interval`, or if `steps` is negative.
    """
    if steps < 0:
        raise ValueError(f"need steps >= 0, got {steps}")
    peak, _ = _extrema(coefficients)
    s = trapping_interval(coefficients)[0]
    grid = np.linspace(0, peak, 200_001)
    values = quintic(grid, coefficients)
    for _ in range(steps):
        s = float(np.interp(s, values, grid))
    return s


def _extrema(coefficients: tuple) -> tuple[float, float]:
    """Return where a quintic with a > 0 has its maximum and minimum on the positive side."""
    a, b, c = coefficients
    squares = np.roots([5 * c, 3 * b, a])
    if not (np.isreal(squares).all() and (squares.real > 0).all() and a > 0 and c > 0):
        raise ValueError(
            f"a s + b s³ + c s⁵ has no maximum and minimum with s > 0 for {coefficients}"
        )
    low, high = sorted(np.sqrt(squares.real))
    return float(low), float(high)


def _check(g: Tensor, steps: int) -> None:
    if g.dim() < 2 or 0 in g.shape:
        raise ValueError(f"need a matrix or a batch of them, got the shape {tuple(g.shape)}")
    if not g.is_floating_point():
        raise ValueError(f"need real numbers in floating point, got {g.dtype}")
    if steps < 0:
        raise ValueError(f"need steps >= 0, got {steps}")
