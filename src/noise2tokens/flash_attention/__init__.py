"""FlashAttention: exact attention that never writes its N x N matrices to slow memory.

`softmax` takes the softmax apart until attention is one pass with a state of three parts, `tiled` computes attention
and its gradients with that state tile by tile in plain PyTorch, `kernel` is the same in Triton for GPUs, and `cost`
counts operations and bytes. The two functions here are what the rest of the package calls: they check their input,
and take the kernel where it can run and the tiled version elsewhere. Triton is imported only in the first case.

Layout: `(batch, heads, length, dim)`, as in `torch.nn.functional.scaled_dot_product_attention`; packed sequences
are `(tokens, heads, dim)`. Fewer key heads than query heads means grouped-query attention.
"""

from importlib.util import find_spec
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from noise2tokens.flash_attention.tiled import tiled_attention

__all__ = ["flash_attention", "flash_attention_varlen", "kernel_runs_on"]

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DTYPES = (*KERNEL_DTYPES, torch.float64)
KERNEL_MAX_DIM = 256


def flash_attention(
    q: Float[Tensor, "batch heads query dim"],
    k: Float[Tensor, "batch kv_heads key dim"],
    v: Float[Tensor, "batch kv_heads key value_dim"],
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> (
    Float[Tensor, "batch heads query value_dim"]
    | tuple[Float[Tensor, "batch heads query value_dim"], Float[Tensor, "batch heads query"]]
):
    """softmax(scale Q K^T) V, exact and differentiable, in memory linear in the length.

    Args:
        q: queries.
        k: keys; query head h reads key head h // (heads / kv_heads).
        v: values; their dimension may differ from that of the keys.
        causal: let a query see only keys up to its own position, the last query being aligned with the last key.
        scale: what the scores are multiplied by; 1 / sqrt(dim) if not given.
        return_lse: also return the log-sum-exp of each row of scaled scores. It is differentiable.

    Returns:
        The output in the dtype of q, 0 where a query sees no key; with `return_lse` also LSE, in single precision or
        better, -inf there.

    Raises:
        ValueError: if shapes, head counts, dtypes or devices do not fit together, or scale is not positive.
        TypeError: if an input is not a tensor of half, bfloat16, single or double precision.

    Scores are computed again in the backward pass and compared with LSE, so a weight is off by about ε max|s|: in
    single precision half a thousandth where scores reach thousands.

    Source: Dao et al. 2022; Dao 2023, Algorithms 1 and 2.
    """
    scale = check_inputs(q, k, v, causal, scale, batch_axes=1)
    if _kernel_takes(q, k, v):
        from noise2tokens.flash_attention.kernel import kernel_attention

        o, lse = kernel_attention(q, k, v, causal, scale)
    else:
        o, lse = tiled_attention(q, k, v, causal, scale)
    return (o, lse) if return_lse else o


def flash_attention_varlen(
    q: Float[Tensor, "query_tokens heads dim"],
    k: Float[Tensor, "key_tokens kv_heads dim"],
    v: Float[Tensor, "key_tokens kv_heads value_dim"],
    cu_seqlens_q: Int[Tensor, " offsets"],
    cu_seqlens_k: Int[Tensor, " offsets"],
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> (
    Float[Tensor, "query_tokens heads value_dim"]
    | tuple[Float[Tensor, "query_tokens heads value_dim"], Float[Tensor, "query_tokens heads"]]
):
    """Attention within each of several sequences that lie end to end, without padding.

    Args:
        q, k, v: the tokens of all sequences; sequence i is rows `cu_seqlens[i]` to `cu_seqlens[i + 1]`.
        cu_seqlens_q, cu_seqlens_k: offsets, not lengths: 0, then the running sum of the lengths; int32.
        max_seqlen_q, max_seqlen_k: the longest sequence, known to the caller, so that the GPU need not be asked.
        causal, scale, return_lse: as in `flash_attention`, for each sequence by itself.

    Returns:
        The output for each query token, and with `return_lse` its log-sum-exp.

    Raises:
        ValueError: as `flash_attention`, and if the offsets do not start at 0, decrease, do not end at the number of
            tokens, or enclose a sequence longer than the maximum. On a GPU these are device-side assertions.
        TypeError: if an input is not of one of these precisions, or the offsets are not int32.

    Source: Dao 2023 (the `varlen` interface of flash-attention).
    """
    scale = check_inputs(q, k, v, causal, scale, batch_axes=0)
    check_offsets(cu_seqlens_q, q.shape[0], max_seqlen_q, "cu_seqlens_q", q.device)
    check_offsets(cu_seqlens_k, k.shape[0], max_seqlen_k, "cu_seqlens_k", q.device)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must describe as many sequences as each other, "
            f"got {cu_seqlens_q.numel() - 1} and {cu_seqlens_k.numel() - 1}"
        )
    if _kernel_takes(q, k, v):
        from noise2tokens.flash_attention.kernel import kernel_attention_varlen

        o, lse = kernel_attention_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale
        )
    else:
        o, lse = _tiled_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, scale)
    return (o, lse) if return_lse else o


def kernel_runs_on(device: torch.device) -> bool:
    """Whether the Triton kernel can run there: an NVIDIA GPU from compute capability 8.0 on, with Triton installed.

    Args:
        device: where the tensors lie.

    Returns:
        True if `flash_attention` takes the kernel on that device.
    """
    if device.type != "cuda" or torch.version.hip is not None or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, batch_axes: int
) -> float:
    """Say what is wrong with the input of attention, before something further down says it less clearly.

    Args:
        q, k, v: `(batch, heads, length, dim)` with one batch axis, `(tokens, heads, dim)` with none.
        causal: whether there is a causal mask.
        scale: what the scores are multiplied by, or None.
        batch_axes: 1 or 0.

    Returns:
        The scale, 1 / sqrt(dim) if None was given.

    Raises:
        ValueError, TypeError: see `flash_attention`.
    """
    layout, heads, length = (
        ("(batch, heads, length, dim)", 1, 2) if batch_axes else ("(tokens, heads, dim)", 1, 0)
    )
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be True or False, not a mask, got {type(causal).__name__}")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float)):
        raise TypeError(
            f"scale must be a number (no gradient reaches it), got {type(scale).__name__}"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dtype not in DTYPES:
            names = ", ".join(str(dtype) for dtype in DTYPES)
            raise TypeError(f"{name} must be one of {names}, got {x.dtype}")
        if x.dim() != 3 + batch_axes:
            raise ValueError(f"{name} must have axes {layout}, got shape {tuple(x.shape)}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q, k and v must lie on one device, got {q.device}, {k.device} and {v.device}"
        )
    if q.shape[-1] != k.shape[-1] or q.shape[-1] == 0:
        raise ValueError(
            f"q and k must have the same head dimension, got {q.shape[-1]} and {k.shape[-1]}"
        )
    if k.shape[heads] != v.shape[heads] or k.shape[length] != v.shape[length]:
        raise ValueError(
            f"k and v must have the same heads and length, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if batch_axes and not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(
            f"q, k and v must have one batch size, got {q.shape[0]}, {k.shape[0]} and {v.shape[0]}"
        )
    if k.shape[heads] == 0 or q.shape[heads] % k.shape[heads]:
        raise ValueError(
            f"the number of query heads must be a multiple of the number of key heads, "
            f"got {q.shape[heads]} and {k.shape[heads]}"
        )
    if v.shape[-1] == 0:
        raise ValueError("v must have a head dimension of at least 1, got 0")
    if max(q.shape[-1], v.shape[-1]) > KERNEL_MAX_DIM and kernel_runs_on(q.device):
        raise ValueError(
            f"on a GPU head dimensions may be at most {KERNEL_MAX_DIM}, "
            f"got {q.shape[-1]} and {v.shape[-1]}"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not 0 < scale < float("inf"):  # the kernel finds the largest score before it scales
        raise ValueError(f"scale must be positive and finite, got {scale}")
    return scale


def check_offsets(
    offsets: Tensor, tokens: int, longest: int, name: str, device: torch.device
) -> None:
    """Refuse what is not the running sum of lengths: a list of lengths most of all.

    Args:
        offsets: the cu_seqlens to check.
        tokens: rows of the packed tensor.
        longest: the length that no sequence may exceed.
        name: how the message calls the offsets.
        device: where they must lie.

    Raises:
        ValueError, TypeError: see `flash_attention_varlen`.
    """
    if not isinstance(offsets, Tensor):
        raise TypeError(f"{name} must be an int32 tensor, got {type(offsets).__name__}")
    if not isinstance(longest, int) or longest < 0:
        raise TypeError(f"the longest length for {name} must be an int from 0 on, got {longest!r}")
    if offsets.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {offsets.dtype}")
    if offsets.dim() != 1 or offsets.numel() < 2:
        raise ValueError(
            f"{name} must have one axis of at least two offsets, got shape {tuple(offsets.shape)}"
        )
    if offsets.device != device:
        raise ValueError(f"{name} must lie on {device} like the tokens, got {offsets.device}")
    lengths = offsets.diff()
    fits = (
        (offsets[0] == 0)
        & (offsets[-1] == tokens)
        & (lengths >= 0).all()
        & (lengths <= longest).all()
    )
    if offsets.is_cuda:
        torch._assert_async(fits)  # to look at the values here would make the CPU wait for the GPU
    elif not fits:
        raise ValueError(
            f"{name} must hold offsets that start at 0, never decrease, end at {tokens} and are at most {longest} "
            f"apart, got {offsets.tolist()}"
        )


def _kernel_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    fits = q.dtype in KERNEL_DTYPES and max(q.shape[-1], v.shape[-1]) <= KERNEL_MAX_DIM
    return fits and min(q.numel(), k.numel(), v.numel()) > 0 and kernel_runs_on(q.device)


def _tiled_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, scale):
    """One sequence after the other."""
    outputs = []
    for spans in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True):
        (q_start, q_stop), (k_start, k_stop) = spans
        one = (
            x.transpose(0, 1).unsqueeze(0)
            for x in (q[q_start:q_stop], k[k_start:k_stop], v[k_start:k_stop])
        )
        o, lse = tiled_attention(*one, causal, scale)
        outputs.append((o[0].transpose(0, 1), lse[0].transpose(0, 1)))
    return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))
