"""The experts' own computation, as a loop over experts and as one grouped multiplication.

Both are called with (x_TD, weights_TK, experts_TK, gate_EFD, up_EFD, down_EDF), as is `parallel.expert_parallel`.

    T tokens   D width   E experts   K experts of a token   F hidden width of an expert   N = T K rows
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from noise2tokens.moe.balancing import load


def looped(
    x_TD: Float[Tensor, "T D"],
    weights_TK: Float[Tensor, "T K"],
    experts_TK: Int64[Tensor, "T K"],
    gate_EFD: Float[Tensor, "E F D"],
    up_EFD: Float[Tensor, "E F D"],
    down_EDF: Float[Tensor, "E D F"],
) -> Float[Tensor, "T D"]:
    """Return for each token the weighted sum of its experts, one expert after another: the reference."""
    y_TD = torch.zeros_like(x_TD, dtype=weights_TK.dtype)
    for e, (gate_FD, up_FD, down_DF) in enumerate(zip(gate_EFD, up_EFD, down_EDF, strict=True)):
        token, place = (experts_TK == e).nonzero(as_tuple=True)
        h = F.silu(F.linear(x_TD[token], gate_FD)) * F.linear(x_TD[token], up_FD)
        y = F.linear(h, down_DF)
        y_TD = y_TD.index_add(0, token, y.to(y_TD.dtype) * weights_TK[token, place, None])
    return y_TD.to(x_TD.dtype)


def grouped(
    x_TD: Float[Tensor, "T D"],
    weights_TK: Float[Tensor, "T K"],
    experts_TK: Int64[Tensor, "T K"],
    gate_EFD: Float[Tensor, "E F D"],
    up_EFD: Float[Tensor, "E F D"],
    down_EDF: Float[Tensor, "E D F"],
) -> Float[Tensor, "T D"]:
    """Return the same: tokens sorted by expert, so that each expert's are consecutive rows, and one call for all."""
    rows_ND, order_N = by_expert(x_TD, experts_TK)
    counts_E = load(experts_TK, len(gate_EFD))
    y_ND = grouped_swiglu(rows_ND, counts_E, gate_EFD, up_EFD, down_EDF)
    return combine(y_ND, order_N, weights_TK).to(x_TD.dtype)


def one_by_one(
    x_TD: Float[Tensor, "T D"],
    weights_TK: Float[Tensor, "T K"],
    experts_TK: Int64[Tensor, "T K"],
    gate_EFD: Float[Tensor, "E F D"],
    up_EFD: Float[Tensor, "E F D"],
    down_EDF: Float[Tensor, "E D F"],
) -> Float[Tensor, "T D"]:
    """Return the same: tokens sorted by expert, but one expert after another, to see what sorting alone saves."""
    rows_ND, order_N = by_expert(x_TD, experts_TK)
    blocks = rows_ND.split(load(experts_TK, len(gate_EFD)).tolist())
    parts = []
    for x, gate_FD, up_FD, down_DF in zip(blocks, gate_EFD, up_EFD, down_EDF, strict=True):
        parts.append(F.linear(F.silu(F.linear(x, gate_FD)) * F.linear(x, up_FD), down_DF))
    return combine(torch.cat(parts), order_N, weights_TK).to(x_TD.dtype)


def by_expert(
    x_TD: Float[Tensor, "T D"], experts_TK: Int64[Tensor, "T K"]
) -> tuple[Float[Tensor, "N D"], Int64[Tensor, "N"]]:
    """Copy each token K times, sorted by expert; return also which of the T K choices each row is."""
    order_N = experts_TK.flatten().argsort(stable=True)
    return x_TD.index_select(0, order_N // experts_TK.shape[1]), order_N


def combine(
    y_ND: Float[Tensor, "N D"], order_N: Int64[Tensor, "N"], weights_TK: Float[Tensor, "T K"]
) -> Float[Tensor, "T D"]:
    """Put rows back to the tokens that they are of, and add them up by weight."""
    y_ND = torch.empty_like(y_ND).index_copy(0, order_N, y_ND)
    y_TKD = y_ND.unflatten(0, weights_TK.shape)
    # Products and a sum, since autocast would compute an einsum in low precision.
    return (weights_TK[..., None] * y_TKD).sum(1)


def grouped_swiglu(
    x_ND: Float[Tensor, "N D"],
    counts_E: Int64[Tensor, "E"],
    gate_EFD: Float[Tensor, "E F D"],
    up_EFD: Float[Tensor, "E F D"],
    down_EDF: Float[Tensor, "E D F"],
) -> Float[Tensor, "N D"]:
    """Return down(silu(gate x) · up x) of each row, with the matrices of its expert; rows are sorted by expert."""
    h_NF = F.silu(multiply(x_ND, gate_EFD, counts_E)) * multiply(x_ND, up_EFD, counts_E)
    return multiply(h_NF, down_EDF, counts_E)


def multiply(
    x_NI: Float[Tensor, "N I"], weight_EOI: Float[Tensor, "E O I"], counts_E: Int64[Tensor, "E"]
) -> Float[Tensor, "N O"]:
    """Multiply the first rows by the first matrix, the next by the second and so on, as many as counted.

    By PyTorch's `grouped_mm` where that can, which wants rows of a multiple of 16 bytes in at most single precision;
    else by one multiplication for each expert. Under autocast in its type.
    """
    kind = x_NI.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x_NI, weight_EOI = x_NI.to(dtype), weight_EOI.to(dtype)
    narrow = (torch.bfloat16,) if kind == "cuda" else (torch.bfloat16, torch.float16, torch.float32)
    aligned = all(n * x_NI.element_size() % 16 == 0 for n in weight_EOI.shape[1:])
    if x_NI.dtype in narrow and aligned and len(x_NI):
        ends_E = counts_E.cumsum(0).to(torch.int32)
        return F.grouped_mm(x_NI, weight_EOI.transpose(1, 2), offs=ends_E)
    parts = zip(x_NI.split(counts_E.tolist()), weight_EOI, strict=True)
    return torch.cat([F.linear(rows, weight) for rows, weight in parts])
