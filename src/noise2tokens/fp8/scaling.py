"""One scale for many numbers: x ≈ values · scale, with values in eight bits.

Which numbers share a scale, a block says: so many rows by so many columns, None for all of them.
"""

from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from noise2tokens.fp8.codec import E4M3, E5M2, Format

TENSOR, ROW, TILE, COLUMN_TILE, BLOCK = (None, None), (1, None), (1, 128), (128, 1), (128, 128)
Block = tuple[int | None, int | None]
DTYPES = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}


class Quantized(NamedTuple):
    """A matrix in eight bits: entry (i, j) is values[i, j] · scales[i // rows, j // columns]."""

    values: Shaped[Tensor, "m n"]  # of an FP8 type
    scales: Float[Tensor, "mb nb"]
    block: tuple[int, int]  # rows and columns that share a scale

    @property
    def T(self) -> "Quantized":
        """The transposed matrix, with nothing rounded anew."""
        return Quantized(self.values.T, self.scales.T, self.block[::-1])

    def dequantize(self) -> Float[Tensor, "m n"]:
        """Return the numbers that are stood for, in float32."""
        return unpack(self.values) * spread(self.scales, self.block, self.values.shape)


def unpack(values: Shaped[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Return FP8 values in float32, looked up by their codes: PyTorch's own cast back is slow on a CPU."""
    codes = values.view(torch.uint8).flatten().int()
    return _numbers(values.dtype, values.device).index_select(0, codes).view(values.shape)


@cache
def _numbers(dtype: torch.dtype, device: torch.device) -> Float[Tensor, "256"]:
    return torch.arange(256, dtype=torch.uint8, device=device).view(dtype).float()


def spread(
    scales: Float[Tensor, "mb nb"], block: tuple[int, int], shape: tuple[int, ...]
) -> Float[Tensor, "m n"]:
    """Repeat each scale over its block; blocks at the end may be cut off by the shape."""
    tiles = scales[:, None, :, None].expand(-1, block[0], -1, block[1])
    return tiles.flatten(2).flatten(0, 1)[: shape[0], : shape[1]]


def quantize(
    x: Float[Tensor, "m n"], block: Block, format: Format = E4M3, *, power_of_two: bool = False
) -> Quantized:
    """Bring the largest number of each block to the largest of the format, and round: nothing overflows.

    Args:
        x: A matrix. A block that holds an infinity or NaN gets a scale that is none, and becomes NaN.
        block: Rows and columns that share a scale, None for all; blocks at the end may be smaller.
        format: E4M3 or E5M2.
        power_of_two: Round scales up to powers of two, so that dividing by one is exact.

    Returns:
        Values and scales; scales in float32, at least its smallest normal number, so that zeros do not divide by zero.

    Raises:
        ValueError: If the matrix is empty, a block's side is below 1, or PyTorch has no type for the format.

    Source: DeepSeek-V3 report, section 3.3.2.
    """
    if x.numel() == 0:
        raise ValueError(f"need a matrix with numbers, got shape {tuple(x.shape)}")
    if format not in DTYPES:
        raise ValueError(f"need E4M3 or E5M2, got {format}")
    if any(side is not None and side < 1 for side in block):
        raise ValueError(f"a block has sides of at least 1, got {block}")
    x = x.float()
    rows, columns = (min(side or size, size) for side, size in zip(block, x.shape, strict=True))
    down, right = -x.shape[0] % rows, -x.shape[1] % columns
    padded = F.pad(x, (0, right, 0, down)) if down or right else x
    tiles = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    scales = tiles.abs().amax((1, 3)) / format.largest
    if power_of_two:
        mantissa, exponent = torch.frexp(scales)  # scale = mantissa · 2^exponent, mantissa ≥ 1/2
        up = torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).int())
        scales = torch.where(scales.isfinite(), up, torch.nan)
    scales = scales.clamp_min(torch.finfo(torch.float32).tiny)
    ratio = (tiles / scales[:, None, :, None]).flatten(2).flatten(0, 1)[: x.shape[0], : x.shape[1]]
    return Quantized(ratio.to(DTYPES[format]), scales, (rows, columns))


def requantize(
    x: Quantized, block: Block, format: Format = E4M3, *, power_of_two: bool = False
) -> Quantized:
    """Quantize anew what has been rounded already, into other blocks; the options are those of `quantize`."""
    return quantize(x.dequantize(), block, format, power_of_two=power_of_two)


def relative_error(found: Float[Tensor, "*n"], exact: Float[Tensor, "*n"]) -> float:
    """Return |found - exact| / |exact| with lengths of vectors; ValueError if all that is exact is zero."""
    size = exact.double().norm()
    if size == 0:
        raise ValueError("nothing is relative to zero")
    return ((found.double() - exact.double()).norm() / size).item()
