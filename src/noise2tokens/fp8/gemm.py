"""A product of two scaled matrices, with an accumulator as narrow as that of a tensor core.

Both operands have the summed axis last, as FP8 tensor cores of Hopper want it: `gemm(a, b)` is a bᵀ.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from noise2tokens.fp8.scaling import Quantized, spread


def chop(x: Float[Tensor, "*n"], bits: int, *, nearest: bool = False) -> Float64[Tensor, "*n"]:
    """Keep so many significant bits, the leading one included; cut off the rest, or round to the nearest."""
    if bits < 1:
        raise ValueError(f"need at least one bit, got {bits}")
    mantissa, exponent = torch.frexp(x.double())
    scaled = mantissa * 2.0**bits
    return torch.ldexp(scaled.round() if nearest else scaled.trunc(), exponent.double() - bits)


def aligned_sum(terms: Float[Tensor, "*n t"], bits: int) -> Float64[Tensor, "*n"]:
    """Add up as an adder does that shifts all terms to the exponent of the largest: what is below its bits is cut off.

    Args:
        terms: To be added along the last axis.
        bits: So many are kept of the largest term, its leading one included; of the others those at the same places.
    """
    terms = terms.double()
    exponent = torch.frexp(terms.abs().amax(-1, keepdim=True)).exponent
    step = torch.exp2(exponent.double() - bits)
    return ((terms / step).trunc() * step).sum(-1)


def accumulate(
    a: Float[Tensor, "m k"],
    b: Float[Tensor, "n k_b"],
    *,
    bits: int = 14,
    group: int = 32,
    promote: int | None = None,
    nearest: bool = False,
    align: str | None = None,
) -> Float64[Tensor, "m n"]:
    """Return a bᵀ as a tensor core might add it up: in groups, into a register of few bits.

    Args:
        a, b: Operands, the summed axis last.
        bits: Significant bits that the register keeps.
        group: How many products go into the register at once: k of one instruction.
        promote: After so many products the register is added to a sum in float32 and begins anew; None for never.
        nearest: Whether the register rounds to the nearest; else it cuts off.
        align: What `aligned_sum` cuts before the sum goes into the register: "products", those of the group;
            "register", the register's sum with them, as one more term; None, nothing: a group is added exactly.

    Raises:
        ValueError: If a number is below 1, the summed axes differ, `promote` is no multiple of the group, or `align` is
            none of these.

    Source: DeepSeek-V3 report, section 3.3.2 and figure 7b, for bits, group and promotion; DeepSeek-AI 2025
    (arXiv 2505.09343), section 3.1.1, for the alignment, which does not say whether the register takes part.
    """
    if align not in (None, "products", "register"):
        raise ValueError(f"align is 'products', 'register' or None, got {align!r}")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"both need the summed axis last, got {a.shape[1]} and {b.shape[1]}")
    if group < 1 or (promote is not None and (promote < 1 or promote % group)):
        raise ValueError(f"promote must be a multiple of the group, got {promote} and {group}")
    a, b = a.double(), b.double()
    total = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    register = torch.zeros_like(total)
    for start in range(0, a.shape[1], group):
        part = slice(start, start + group)
        if align is None:
            added = register + a[:, part] @ b[:, part].T
        else:
            terms = a[:, None, part] * b[None, :, part]
            if align == "register":
                added = aligned_sum(torch.cat([terms, register[..., None]], -1), bits)
            else:
                added = register + aligned_sum(terms, bits)
        register = chop(added, bits, nearest=nearest)
        if promote and (start + group) % promote == 0:
            total, register = (total + register).float().double(), torch.zeros_like(total)
    return (total + register).float().double() if promote else register


def gemm(a: Quantized, b: Quantized, **options) -> Float[Tensor, "m n"]:
    """Return a bᵀ of two quantized matrices, in float32, as a kernel does it: scales are applied where it promotes.

    The products of FP8 values are summed over the stretch of k that has one scale; the sum is multiplied with the
    scales of its row in a and in b, and added in float32.

    Args:
        a, b: Quantized along the summed axis, which is last, in equally long stretches; or with one scale a row.
        options: `bits`, `group`, `nearest` and `align` of `accumulate`; where none is given, stretches are summed in
            float64.

    Raises:
        ValueError: If the summed axes differ, or a stretch has more than one scale.
    """
    stretch = a.block[1]
    if a.values.shape[1] != b.values.shape[1] or b.block[1] != stretch:
        got = f"{tuple(a.values.shape)}, {a.block} and {tuple(b.values.shape)}, {b.block}"
        raise ValueError(f"need the summed axis last, in equal stretches; got {got}")
    rows = [spread(x.scales, (x.block[0], 1), (len(x.values), x.scales.shape[1])) for x in (a, b)]
    total = torch.zeros(len(a.values), len(b.values), device=a.values.device)
    pieces = (x.values.float().split(stretch, 1) for x in (a, b))
    for i, (left, right) in enumerate(zip(*pieces, strict=True)):
        product = left.double() @ right.double().T
        if options:
            product = accumulate(left, right, **options)
        total = total + (product * torch.outer(rows[0][:, i], rows[1][:, i])).float()
    return total


def fast_gemm(a: Quantized, b: Quantized) -> Float[Tensor, "m n"]:
    """Return the same to the last bits of float32: numbers are scaled first, and multiplied by PyTorch."""
    return a.dequantize() @ b.dequantize().T
