"""Floating-point formats from their bits: decode every code, encode any number.

A code is, from its highest bit, a sign, E bits of exponent and M bits of mantissa. This is the reference, written for
reading: `scaling.quantize` casts with PyTorch, which is faster, and the tests hold the two together.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """A binary floating-point format; ValueError if it has no exponent or no mantissa, or more bits than float32.

    Attributes:
        exponent_bits: E. The bias is 2^(E-1) - 1.
        mantissa_bits: M.
        ieee: Whether the highest exponent is kept for infinity and NaN, as IEEE 754 has it. If not, it holds numbers
            like the others, there is no infinity, and only a mantissa of all ones there is NaN.

    Source: Micikevicius et al. 2022, table 1.
    """

    exponent_bits: int
    mantissa_bits: int
    ieee: bool = True

    def __post_init__(self):
        if not (2 <= self.exponent_bits <= 8 and 1 <= self.mantissa_bits <= 23):
            raise ValueError(f"need 2 to 8 bits of exponent and 1 to 23 of mantissa, got {self}")

    @property
    def bits(self) -> int:
        """Of a code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """What is subtracted from a stored exponent."""
        return 2 ** (self.exponent_bits - 1) - 1

    @cached_property
    def largest(self) -> float:
        """The largest number: the code below infinity, or below NaN where there is no infinity."""
        not_numbers = 2**self.mantissa_bits if self.ieee else 1
        code = 2 ** (self.bits - 1) - 1 - not_numbers
        return decode(torch.tensor(code), self).item()

    @property
    def smallest_normal(self) -> float:
        """The smallest number with all M bits of mantissa."""
        return 2.0 ** (1 - self.bias)

    @property
    def smallest(self) -> float:
        """The smallest number above zero, which is also the distance of all numbers below `smallest_normal`."""
        return self.smallest_normal * 2.0**-self.mantissa_bits


E4M3 = Format(4, 3, ieee=False)
E5M2 = Format(5, 2)
E5M6 = Format(
    5, 6
)  # 12 bits: read by IEEE's rule here, the DeepSeek-V3 report does not say by which


def decode(codes: Int[Tensor, "*n"], format: Format) -> Float64[Tensor, "*n"]:
    """Return the numbers that codes stand for.

    Args:
        codes: From 0 to 2^bits - 1.
        format: What the bits mean.

    Raises:
        ValueError: If a code has more bits.
    """
    codes = codes.long()
    if codes.numel() and not (codes.min() >= 0 and codes.max() < 2**format.bits):
        raise ValueError(f"codes of {format} are 0 to {2**format.bits - 1}, got {codes.aminmax()}")
    mantissa = codes % 2**format.mantissa_bits
    exponent = (codes >> format.mantissa_bits) % 2**format.exponent_bits
    sign = 1.0 - 2.0 * (codes >> (format.bits - 1)).double()
    fraction = mantissa.double() / 2**format.mantissa_bits
    normal = exponent > 0
    size = torch.ldexp(fraction + normal, exponent.clamp_min(1).double() - format.bias)
    highest = exponent == 2**format.exponent_bits - 1
    if format.ieee:
        size = torch.where(highest & (mantissa == 0), torch.inf, size)
        not_a_number = highest & (mantissa > 0)
    else:
        not_a_number = highest & (mantissa == 2**format.mantissa_bits - 1)
    return sign * torch.where(not_a_number, torch.nan, size)


def encode(x: Float[Tensor, "*n"], format: Format) -> Int64[Tensor, "*n"]:
    """Return the codes of the nearest numbers, of the even code where two are as near; what is too large saturates.

    Let 2^e be the power of two at or below |x|, or the smallest normal number where that is more. Numbers there lie
    2^(e-M) apart, so q = |x| / 2^(e-M), rounded to an integer, counts them. As a code, q numbers come on top of the
    (e + bias - 1) 2^M codes of smaller exponents; a q that rounds up to 2^(M+1) is then the first code of the next.

    Args:
        x: Any numbers. Infinities become the largest number of their sign; NaN is kept, as the highest code.
        format: What the bits mean.
    """
    x = x.double()
    size = x.abs().clamp_max(format.largest)
    exponent = torch.frexp(size.clamp_min(format.smallest_normal)).exponent.double() - 1
    count = torch.ldexp(size, format.mantissa_bits - exponent).round()  # half to even
    code = (exponent.long() + format.bias - 1) * 2**format.mantissa_bits + count.nan_to_num().long()
    code = torch.where(x.isnan(), 2 ** (format.bits - 1) - 1, code)
    return code + x.signbit() * 2 ** (format.bits - 1)


def rounded(x: Float[Tensor, "*n"], format: Format) -> Float64[Tensor, "*n"]:
    """Return the nearest numbers of a format."""
    return decode(encode(x, format), format)
