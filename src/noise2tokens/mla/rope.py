"""Rotary positions beyond the trained length (YaRN), and the two orders in which rotary coordinates are stored."""

import math

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


def mscale(factor: float | int) -> float:
    """Return 0.1 ln(factor) + 1, or 1 for factors up to 1: queries and keys are each multiplied by it.

    Scores are thus multiplied by its square. DeepSeek writes sqrt(t) for what YaRN writes sqrt(1/t).

    Source: Peng et al., YaRN, 2023, section 3.4; DeepSeek-V3, 2024, section 4.3.
    """
    if not 0 < factor < math.inf:
        raise ValueError(f"need a finite factor > 0, got {factor}")
    return 0.1 * math.log(max(factor, 1)) + 1


def turning_pair(turns: float | int, dim: int, base: float | int, length: int) -> float:
    """Return the (fractional) pair of rotary coordinates that turns so often over a length.

    Source: Peng et al. 2023, section 3.2; pair j has the wavelength 2 pi base^(2j/dim).
    """
    return dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(base))


def yarn_frequencies(
    dim: int,
    base: float | int,
    factor: float | int,
    trained_length: int,
    fast: float | int = 32,
    slow: float | int = 1,
) -> Float[Tensor, "half"]:
    """Return the angle a token for each pair: kept where a pair turns fast, divided by the factor where slowly.

    Args:
        dim: Rotary coordinates, an even number.
        base: Of the rotary angles.
        factor: By how much the context grows (s).
        trained_length: Tokens of the context before.
        fast: Pairs that turn so often over the trained length, or more, are kept (beta).
        slow: Pairs that turn so often, or less, are divided by the factor (alpha).

    Returns:
        Radians, in float64. In between the share is linear in the pair's index, as in DeepSeek's code; YaRN's paper has
        it linear in the number of turns.

    Raises:
        ValueError: If a number is out of its range.

    Source: Peng et al. 2023, section 3.2; DeepSeek-V3's code, `precompute_freqs_cis`.
    """
    if dim < 2 or dim % 2 or base <= 1 or trained_length < 1:
        raise ValueError(
            f"need an even dim > 0, base > 1, length > 0; got {dim}, {base}, {trained_length}"
        )
    if not 1 <= factor < math.inf or not 0 < slow < fast:
        raise ValueError(f"need factor >= 1 and 0 < slow < fast, got {factor}, {slow}, {fast}")
    pairs = torch.arange(dim // 2, dtype=torch.float64)
    low = max(math.floor(turning_pair(fast, dim, base, trained_length)), 0)
    high = min(math.ceil(turning_pair(slow, dim, base, trained_length)), dim - 1)
    ramp = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    return base ** (-2 * pairs / dim) * (1 - ramp + ramp / factor)


def yarn(
    positions: Int[Tensor, "*B T"],
    dim: int,
    base: float | int,
    factor: float | int,
    trained_length: int,
    **ends: float | int,
) -> tuple[Float[Tensor, "*B T half"], Float[Tensor, "*B T half"]]:
    """Return cosine and sine for `rotate`, as the ground floor's `rotary` does, with YaRN's frequencies.

    Args:
        positions: Of the tokens.
        dim, base, factor, trained_length: As for `yarn_frequencies`.
        ends: Its `fast` and `slow`.
    """
    omega = yarn_frequencies(dim, base, factor, trained_length, **ends).to(positions.device)
    angles = positions[..., None] * omega
    return angles.cos(), angles.sin()


def rotate_interleaved(
    x: Float[Tensor, "*B T K"], cos: Float[Tensor, "*b T half"], sin: Float[Tensor, "*b T half"]
) -> Float[Tensor, "*B T K"]:
    """Turn pairs of coordinates, pair j being coordinates 2j and 2j + 1: the order of DeepSeek's and Meta's code."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.flatten(-2).to(x.dtype)


def to_halves(x: Shaped[Tensor, "*B K"]) -> Shaped[Tensor, "*B K"]:
    """Reorder coordinates 0, 1, 2, ... to 0, 2, ..., 1, 3, ...: from interleaved pairs to halves."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def to_interleaved(x: Shaped[Tensor, "*B K"]) -> Shaped[Tensor, "*B K"]:
    """Undo `to_halves`."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
