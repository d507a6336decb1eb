"""The exact transform of a normal into any distribution: by quantiles on the line, coordinate by coordinate beyond.

On the line, F⁻¹(Φ(z)) has the distribution function F when z is standard normal. In the plane the same rule sets the
first coordinate, and then the second by its distribution *given* the first. The first needs samples alone; the second
needs conditional distributions, which samples do not give: here a density on a grid takes their place.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def quantile_transform(
    z: Float[Tensor, "*shape"], samples: Float[Tensor, "n"]
) -> Float[Tensor, "*shape"]:
    """Map standard normal numbers to the distribution of samples on the line.

    Args:
        z: Standard normal numbers.
        samples: One at least.

    Returns:
        F⁻¹(Φ(z)), with the empirical distribution function F and F⁻¹(u) = the smallest sample x with F(x) >= u.

    Raises:
        ValueError: If there is no sample.
    """
    n = len(samples)
    if n < 1:
        raise ValueError("need at least one sample, got none")
    u = torch.special.ndtr(z.double())
    rank = (u * n).ceil().long().clamp(1, n)  # 1 is the smallest sample
    return samples.sort().values[rank - 1]


def knothe_rosenblatt(
    z: Float[Tensor, "n 2"],
    mass: Float[Tensor, "rows columns"],
    edges: tuple[Float[Tensor, "_"], Float[Tensor, "_"]],
) -> Float[Tensor, "n 2"]:
    """Map standard normal points to a density on a grid: the first coordinate, then the second given the first.

    Within a cell the density is constant, so that the map is continuous along each coordinate and its density is
    exactly that of the grid.

    Args:
        z: Standard normal points.
        mass: Mass of each cell, up to a factor; rows go along the first coordinate.
        edges: Where cells begin and end, rising, for the first and the second coordinate.

    Returns:
        Points distributed as the grid says.

    Raises:
        ValueError: If the edges do not fit, a mass is negative, or all are 0.

    Source: Rosenblatt 1952, the inverse of the map of section 1.
    """
    if tuple(map(len, edges)) != (mass.shape[0] + 1, mass.shape[1] + 1):
        raise ValueError(
            f"a grid of {tuple(mass.shape)} cells needs one edge more each way, got "
            f"{len(edges[0])} and {len(edges[1])}"
        )
    if not (mass >= 0).all() or not mass.sum() > 0:
        raise ValueError("masses must be non-negative, and not all 0")
    u = torch.special.ndtr(z)
    first, row = _invert(mass.sum(1).expand(len(z), -1), edges[0], u[:, 0])
    second, _ = _invert(mass[row], edges[1], u[:, 1])
    return torch.stack([first, second], 1)


def _invert(mass: Tensor, edges: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Solve F(x) = u for each row of masses of cells; return x and the cell that it lies in."""
    rising = mass.cumsum(1) / mass.cumsum(1)[:, -1:]
    cdf = torch.cat([torch.zeros_like(rising[:, :1]), rising], 1)
    # The first edge above u closes the cell, so that no empty cell is ever chosen; no edge lies above u = 1.
    goal = u.detach().clamp(max=1 - torch.finfo(u.dtype).eps / 2)[:, None].contiguous()
    cell = torch.searchsorted(cdf, goal, right=True).clamp(1, mass.shape[1]) - 1
    below, above = cdf.gather(1, cell)[:, 0], cdf.gather(1, cell + 1)[:, 0]
    cell = cell[:, 0]
    share = (u - below) / (above - below)
    return edges[cell] + share * (edges[cell + 1] - edges[cell]), cell
