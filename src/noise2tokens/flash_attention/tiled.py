"""Attention twice: the plain way, through the N x N matrices, and in tiles that never leave fast memory.

A GPU has a large, slow memory (HBM) and, beside the arithmetic, a small, fast one (SRAM). The two functions below
compute the same output, but `plain_forward` writes the scores and the weights to the slow memory and reads them
back, and `tiled_forward` does not. To make that visible on a machine that has neither, all traffic goes through a
`SlowMemory`: what is not loaded from it or stored to it is thought of as living in fast memory. It only adds up
bytes; the arithmetic is the same with and without it.

The tiled version is the one that the package runs where the compiled kernel cannot, and the reference that the
kernel is tested against. It is exact: the same sums in another order.

Letters: Q, K, V, O are `(batch, key heads, group, length, dim)` in here. Grouped-query attention lets `group` query
heads share one key head, so K and V have group = 1 and broadcast. S are scores, P weights, D the row sums of dO * O.
A causal mask is aligned at the bottom right: the last query sees every key (`causal_mask` says why).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from noise2tokens.flash_attention.softmax import (
    NEVER,
    SoftmaxState,
    block_state,
    finish,
    identity_like,
    merge,
)

# Queries and keys of a tile: enough to keep a CPU busy, and small beside any long sequence.
TILE = 128


@dataclass
class SlowMemory:
    """The bytes that have crossed between slow and fast memory, counted as they cross."""

    read: int = 0
    written: int = 0

    def load(
        self, tensor: Float[Tensor, "*shape"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "*shape"]:
        """Bring a tensor into fast memory, at the precision that it is computed with there."""
        self.read += tensor.numel() * tensor.element_size()
        return tensor if dtype is None else tensor.to(dtype)

    def store(self, target: Float[Tensor, "*shape"], values: Float[Tensor, "*#shape"]) -> None:
        """Write `values` over `target`, a view of a tensor in slow memory."""
        self.written += target.numel() * target.element_size()
        target.copy_(values)

    @property
    def moved(self) -> int:
        """Bytes in both directions."""
        return self.read + self.written


def causal_mask(
    queries: int, keys: int, device: torch.device | str = "cpu"
) -> Bool[Tensor, "queries keys"]:
    """True where a query may see a key, the last query being aligned with the last key.

    While decoding, one new query stands at the end of many cached keys and shall see all of them; alignment at the
    top left would show it the first key alone. With more queries than keys, the first rows see nothing.

    Args:
        queries: number of queries.
        keys: number of keys.
        device: where to make the mask.

    Returns:
        `mask[i, j]` is true where `j <= i + keys - queries`.

    Source: flash-attention's README, "2.1: Change behavior of causal flag".
    """
    rows, columns = torch.arange(queries, device=device), torch.arange(keys, device=device)
    return columns <= rows[:, None] + keys - queries


def plain_forward(
    q: Float[Tensor, "batch kv_heads group query dim"],
    k: Float[Tensor, "batch kv_heads 1 key dim"],
    v: Float[Tensor, "batch kv_heads 1 key value_dim"],
    causal: bool,
    scale: float,
    memory: SlowMemory,
) -> tuple[
    Float[Tensor, "batch kv_heads group query value_dim"],
    Float[Tensor, "batch kv_heads group query key"],
]:
    """Attention in three kernels: scores, softmax, product with the values. S and P go through slow memory.

    Args:
        q, k, v: queries, keys and values, grouped (see the module's letters).
        causal: whether a query sees only the keys up to its own position.
        scale: what the scores are multiplied by.
        memory: counts the traffic.

    Returns:
        The output, nan for a query that sees no key, and the weights P, which the backward pass needs.

    Source: Dao et al. 2022, Algorithm 0.
    """
    scores = q.new_empty(*q.shape[:-1], k.shape[-2])
    product = memory.load(q) @ memory.load(k).mT * scale
    if causal:
        product.masked_fill_(~causal_mask(*product.shape[-2:], device=q.device), NEVER)
    memory.store(scores, product)

    weights = torch.empty_like(scores)
    memory.store(weights, torch.softmax(memory.load(scores), dim=-1))

    o = q.new_empty(*q.shape[:-1], v.shape[-1])
    memory.store(o, memory.load(weights) @ memory.load(v))
    return o, weights


def plain_backward(
    q: Float[Tensor, "batch kv_heads group query dim"],
    k: Float[Tensor, "batch kv_heads 1 key dim"],
    v: Float[Tensor, "batch kv_heads 1 key value_dim"],
    weights: Float[Tensor, "batch kv_heads group query key"],
    grad_o: Float[Tensor, "batch kv_heads group query value_dim"],
    scale: float,
    memory: SlowMemory,
) -> tuple[
    Float[Tensor, "batch kv_heads group query dim"],
    Float[Tensor, "batch kv_heads 1 key dim"],
    Float[Tensor, "batch kv_heads 1 key value_dim"],
]:
    """Gradients in five kernels, one for each product and one for the softmax. dP and dS go through slow memory.

    Args:
        q, k, v: queries, keys and values, grouped (see the module's letters).
        weights: P, as `plain_forward` left it in slow memory.
        grad_o: the gradient of the loss with respect to the output.
        scale: what the scores are multiplied by.
        memory: counts the traffic.

    Returns:
        The gradients of q, k and v.

    Source: Dao et al. 2022, Algorithm 3.
    """
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    grad_weights, grad_scores = torch.empty_like(weights), torch.empty_like(weights)
    memory.store(grad_v, (memory.load(weights).mT @ memory.load(grad_o)).sum(2, keepdim=True))
    memory.store(grad_weights, memory.load(grad_o) @ memory.load(v).mT)
    p, grad_p = memory.load(weights), memory.load(grad_weights)
    memory.store(grad_scores, p * (grad_p - (p * grad_p).sum(-1, keepdim=True)) * scale)
    memory.store(grad_q, memory.load(grad_scores) @ memory.load(k))
    memory.store(grad_k, (memory.load(grad_scores).mT @ memory.load(q)).sum(2, keepdim=True))
    return grad_q, grad_k, grad_v


def tile_spans(length: int, tile: int) -> Iterator[tuple[int, int]]:
    """The spans [start, stop) that cut `length` into tiles of at most `tile`, which is at least 1."""
    if length < 0 or tile < 1:
        raise ValueError(f"need length >= 0 and tile >= 1, got {length} and {tile}")
    return ((start, min(start + tile, length)) for start in range(0, length, tile))


def tile_is_hidden(rows: tuple[int, int], columns: tuple[int, int], offset: int) -> bool:
    """Whether the causal mask hides a whole tile: its last query stands before its first key."""
    return columns[0] > rows[1] - 1 + offset


def tile_scores(
    q: Float[Tensor, "batch kv_heads group rows dim"],
    k: Float[Tensor, "batch kv_heads 1 columns dim"],
    rows: tuple[int, int],
    columns: tuple[int, int],
    offset: int | None,
    scale: float,
) -> Float[Tensor, "batch kv_heads group rows columns"]:
    """The scores of one tile, masked where the diagonal crosses it.

    Args:
        q, k: the queries and keys of the tile.
        rows, columns: where the tile lies, as [start, stop).
        offset: keys - queries of the whole attention if it is causal, else None.
        scale: what the scores are multiplied by.

    Returns:
        Scaled scores, -inf where the query may not see the key.
    """
    scores = q @ k.mT * scale
    if offset is not None and columns[1] - 1 > rows[0] + offset:
        position = torch.arange(*rows, device=q.device)[:, None] + offset
        scores = scores.masked_fill(torch.arange(*columns, device=q.device) > position, NEVER)
    return scores


def sweep(
    q_tile: Float[Tensor, "batch kv_heads group rows dim"],
    k: Float[Tensor, "batch kv_heads 1 key dim"],
    v: Float[Tensor, "batch kv_heads 1 key value_dim"],
    rows: tuple[int, int],
    offset: int | None,
    scale: float,
    memory: SlowMemory,
    tile: int,
) -> Iterator[tuple[tuple[int, int], SoftmaxState]]:
    """One block of queries meets the keys, tile by tile, from left to right.

    Args:
        q_tile: the queries, in fast memory.
        k, v: all keys and values, in slow memory.
        rows: where the queries stand, as [start, stop).
        offset: keys - queries of the whole attention if it is causal, else None.
        scale: what the scores are multiplied by.
        memory: counts the traffic.
        tile: keys of a tile.

    Yields:
        Before the first tile and after each, the keys that were merged last and the state of all keys so far.

    Source: Dao 2023, Algorithm 1, lines 6 to 11.
    """
    state = identity_like(q_tile.new_empty(*q_tile.shape[:-1], v.shape[-1]))
    yield (0, 0), state
    for columns in tile_spans(k.shape[-2], tile):
        if offset is not None and tile_is_hidden(rows, columns, offset):
            return
        k_tile = memory.load(k[..., slice(*columns), :], q_tile.dtype)
        v_tile = memory.load(v[..., slice(*columns), :], q_tile.dtype)
        scores = tile_scores(q_tile, k_tile, rows, columns, offset, scale)
        state = merge(state, block_state(scores, v_tile))
        yield columns, state


def tiled_forward(
    q: Float[Tensor, "batch kv_heads group query dim"],
    k: Float[Tensor, "batch kv_heads 1 key dim"],
    v: Float[Tensor, "batch kv_heads 1 key value_dim"],
    causal: bool,
    scale: float,
    memory: SlowMemory,
    tile: tuple[int, int] = (TILE, TILE),
) -> tuple[
    Float[Tensor, "batch kv_heads group query value_dim"],
    Float[Tensor, "batch kv_heads group query"],
]:
    """Attention tile by tile: for each block of queries, the state (m, ell, o) sweeps over the keys.

    Args:
        q, k, v: queries, keys and values, grouped (see the module's letters).
        causal: whether a query sees only the keys up to its own position.
        scale: what the scores are multiplied by.
        memory: counts the traffic.
        tile: queries and keys of a tile.

    Returns:
        The output in q's dtype, and the log-sum-exp of each row of scores at the precision of the computation.

    Source: Dao 2023, Algorithm 1.
    """
    offset = k.shape[-2] - q.shape[-2] if causal else None
    o = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = q.new_empty(q.shape[:-1], dtype=accumulator_dtype(q.dtype))
    for rows in tile_spans(q.shape[-2], tile[0]):
        q_tile = memory.load(q[..., slice(*rows), :], lse.dtype)
        for _, so_far in sweep(q_tile, k, v, rows, offset, scale, memory, tile[1]):
            state = so_far
        o_tile, lse_tile = finish(state)
        memory.store(o[..., slice(*rows), :], o_tile)
        memory.store(lse[..., slice(*rows)], lse_tile)
    return o, lse


def tiled_backward(
    q: Float[Tensor, "batch kv_heads group query dim"],
    k: Float[Tensor, "batch kv_heads 1 key dim"],
    v: Float[Tensor, "batch kv_heads 1 key value_dim"],
    o: Float[Tensor, "batch kv_heads group query value_dim"],
    lse: Float[Tensor, "batch kv_heads group query"],
    grad_o: Float[Tensor, "batch kv_heads group query value_dim"],
    grad_lse: Float[Tensor, "batch kv_heads group query"],
    causal: bool,
    scale: float,
    memory: SlowMemory,
    tile: tuple[int, int] = (TILE, TILE),
) -> tuple[
    Float[Tensor, "batch kv_heads group query dim"],
    Float[Tensor, "batch kv_heads 1 key dim"],
    Float[Tensor, "batch kv_heads 1 key value_dim"],
]:
    """Gradients tile by tile: the weights are computed again from the scores and the log-sum-exp.

    Args:
        q, k, v: queries, keys and values, grouped (see the module's letters).
        o, lse: what `tiled_forward` returned.
        grad_o, grad_lse: the gradients of the loss with respect to them.
        causal, scale, memory, tile: as in `tiled_forward`.

    Returns:
        The gradients of q, k and v; those of k and v are summed over the group that shares them.

    Source: Dao 2023, Algorithm 2, with the gradient of LSE added.
    """
    queries, keys = q.shape[-2], k.shape[-2]
    offset = keys - queries if causal else None
    exact = accumulator_dtype(q.dtype)
    grad_q = torch.zeros_like(q, dtype=exact)
    grad_k, grad_v = torch.empty_like(k), torch.empty_like(v)
    # D - dLSE: both are one number for each row that is taken from dP.
    delta = torch.empty_like(lse)
    for rows in tile_spans(queries, tile[0]):  # block by block: dO * O is as large as the output
        part = slice(*rows)
        products = memory.load(grad_o[..., part, :], exact) * memory.load(o[..., part, :], exact)
        memory.store(delta[..., part], products.sum(dim=-1) - memory.load(grad_lse[..., part]))
    for columns in tile_spans(keys, tile[1]):
        k_tile = memory.load(k[..., slice(*columns), :], exact)
        v_tile = memory.load(v[..., slice(*columns), :], exact)
        grad_k_tile, grad_v_tile = torch.zeros_like(k_tile), torch.zeros_like(v_tile)
        for rows in tile_spans(queries, tile[0]):
            if offset is not None and tile_is_hidden(rows, columns, offset):
                continue
            q_tile = memory.load(q[..., slice(*rows), :], exact)
            grad_o_tile = memory.load(grad_o[..., slice(*rows), :], exact)
            lse_tile = memory.load(lse[..., slice(*rows)])
            # A row that saw nothing has LSE = -inf; exp(-inf - (-inf)) is nan, exp(-inf - inf) is the 0 it should be.
            lse_tile = torch.where(lse_tile == NEVER, -NEVER, lse_tile)
            weights = torch.exp(
                tile_scores(q_tile, k_tile, rows, columns, offset, scale) - lse_tile[..., None]
            )
            grad_weights = grad_o_tile @ v_tile.mT
            grad_scores = weights * (
                grad_weights - memory.load(delta[..., slice(*rows)])[..., None]
            )
            grad_v_tile += (weights.mT @ grad_o_tile).sum(dim=2, keepdim=True)
            grad_k_tile += (grad_scores.mT @ q_tile).sum(dim=2, keepdim=True) * scale
            grad_q_rows = grad_q[..., slice(*rows), :]
            memory.store(grad_q_rows, memory.load(grad_q_rows) + grad_scores @ k_tile * scale)
        memory.store(grad_k[..., slice(*columns), :], grad_k_tile)
        memory.store(grad_v[..., slice(*columns), :], grad_v_tile)
    return grad_q.to(q.dtype), grad_k, grad_v


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision that sums are kept in: at least single."""
    return torch.promote_types(dtype, torch.float32)


class TiledAttention(torch.autograd.Function):
    """`tiled_forward` and `tiled_backward` joined for autograd; saves q, k, v, o and one number for each row."""

    @staticmethod
    def forward(ctx, q, k, v, causal: bool, scale: float):
        with without_autocast(q.device):
            o, lse = tiled_forward(q, k, v, causal, scale, SlowMemory())
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.causal, ctx.scale = causal, scale
        return o, lse

    @staticmethod
    def backward(ctx, grad_o, grad_lse):
        refuse_second_derivative()
        with without_autocast(grad_o.device):
            grads = tiled_backward(
                *ctx.saved_tensors, grad_o, grad_lse, ctx.causal, ctx.scale, SlowMemory()
            )
        return *wanted(ctx, grads), None, None


def without_autocast(device: torch.device) -> torch.autocast:
    """Keep autocast from lowering the precision of single products: sums here are in single precision on purpose."""
    return torch.autocast(device.type, enabled=False)


def refuse_second_derivative() -> None:
    """Raise where a graph of the backward pass is asked for, which the tiles do not record.

    Autograd's own `once_differentiable` says nothing if the incoming gradient needs none, as with `o.sum()`: the second
    derivative is then silently 0.

    Raises:
        RuntimeError: if called in a backward pass with `create_graph=True`.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "this attention has no second derivative: its backward pass cannot be run with create_graph=True"
        )


def wanted(ctx, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Let go of the gradients of q, k and v that nobody asked for."""
    asked = ctx.needs_input_grad[: len(grads)]
    return tuple(grad if needed else None for grad, needed in zip(grads, asked, strict=True))


def group_heads(
    q: Float[Tensor, "batch heads query dim"],
    k: Float[Tensor, "batch kv_heads key dim"],
    v: Float[Tensor, "batch kv_heads key value_dim"],
) -> tuple[
    Float[Tensor, "batch kv_heads group query dim"],
    Float[Tensor, "batch kv_heads 1 key dim"],
    Float[Tensor, "batch kv_heads 1 key value_dim"],
]:
    """Views in which the query heads that share a key head lie on an axis of their own.

    Query head h reads key head h // group, as in flash-attention and in SDPA with `enable_gqa=True`.
    """
    return q.unflatten(1, (k.shape[1], q.shape[1] // k.shape[1])), k.unsqueeze(2), v.unsqueeze(2)


def tiled_attention(
    q: Float[Tensor, "batch heads query dim"],
    k: Float[Tensor, "batch kv_heads key dim"],
    v: Float[Tensor, "batch kv_heads key value_dim"],
    causal: bool,
    scale: float,
) -> tuple[Float[Tensor, "batch heads query value_dim"], Float[Tensor, "batch heads query"]]:
    """Differentiable attention in tiles, on any device and in any floating-point type.

    Args:
        q, k, v: queries, keys and values; the number of query heads is a multiple of that of key heads.
        causal: whether a query sees only the keys up to its own position, aligned at the bottom right.
        scale: what the scores are multiplied by.

    Returns:
        The output, and the log-sum-exp of each row of scores in single precision or better.

    Source: Dao 2023, Algorithms 1 and 2.
    """
    o, lse = TiledAttention.apply(*group_heads(q, k, v), causal, scale)
    return o.flatten(1, 2), lse.flatten(1, 2)


def plain_attention(
    q: Float[Tensor, "batch heads query dim"],
    k: Float[Tensor, "batch kv_heads key dim"],
    v: Float[Tensor, "batch kv_heads key value_dim"],
    causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "batch heads query value_dim"]:
    """Differentiable attention as one would write it: softmax(Q K^T) V, with everything kept for the backward.

    Args:
        q, k, v: queries, keys and values; the number of query heads is a multiple of that of key heads.
        causal: whether a query sees only the keys up to its own position, aligned at the bottom right.
        scale: what the scores are multiplied by; 1 / sqrt(dim) if not given.

    Returns:
        The output; nan for a query that sees no key.

    Source: Vaswani et al. 2017, equation 1.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = group_heads(q, k, v)
    scores = q @ k.mT * scale
    if causal:
        scores = scores.masked_fill(~causal_mask(*scores.shape[-2:], device=q.device), NEVER)
    return (torch.softmax(scores, dim=-1) @ v).flatten(1, 2)
