"""What orthogonalization costs beside the training of the layer that it is for."""

import math
from collections.abc import Iterable

from noise2tokens.muon.orthogonalize import STEPS


def newton_schulz_flops(rows: int, columns: int, steps: int = STEPS) -> int:
    """Count the FLOPs of the products in `newton_schulz`: for m the shorter side and n the longer, k (4 m² n + 2 m³).

    In each of k steps X Xᵀ takes 2 m² n, its square 2 m³, and that times X another 2 m² n.

    Raises:
        ValueError: If a side is below 1, or `steps` is negative.
    """
    if min(rows, columns) < 1 or steps < 0:
        raise ValueError(f"need sides >= 1 and steps >= 0, got {rows}, {columns}, {steps}")
    m, n = sorted((rows, columns))
    return steps * (4 * m**2 * n + 2 * m**3)


def overhead(rows: int, columns: int, tokens: int, steps: int = STEPS) -> float:
    """Return these over 6 m n for each token of a batch, which the layer's forward and backward passes take.

    Raises:
        ValueError: As above, or if there is no token.
    """
    if tokens < 1:
        raise ValueError(f"need a token or more, got {tokens}")
    return newton_schulz_flops(rows, columns, steps) / (6 * rows * columns * tokens)


def step_flops(shapes: Iterable[tuple[int, ...]], steps: int = STEPS) -> int:
    """Count the FLOPs of `newton_schulz` for all matrices of a model; (E, m, n) are E matrices."""
    return sum(
        math.prod(batch) * newton_schulz_flops(rows, columns, steps)
        for *batch, rows, columns in shapes
    )
