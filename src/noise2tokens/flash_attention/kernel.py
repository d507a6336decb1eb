"""FlashAttention as Triton kernels: what `tiled` does, with one program for each block of rows.

A program is one thread block of the GPU; all of them run at the same time, so the outer loop of `tiled_forward`
becomes the grid, and only the sweep over the keys is left as a loop. What the readable version calls fast memory is
registers and shared memory here: a program loads tiles, and stores its rows once, at the end.

- `_forward`: one program for each block of queries.
- `_row_dot`: D, the row sums of dO * O, before the backward.
- `_backward_keys`: one program for each block of keys; sums dK and dV over all queries of all heads of the group.
- `_backward_queries`: one program for each block of queries; sums dQ over all keys.

The last two each compute the weights again: seven matrix products where the algorithm needs five. In return no two
programs add to the same memory, so the gradients are the same in every run.

Three details that only speed asks for. Scores are multiplied by scale * log2(e) so that the cheap exp2 can stand for
exp; m is kept in those units, and LSE is stored in natural ones. Loops are split in two, tiles that lie wholly below
the diagonal and inside the sequence, which need no mask, and the few that do; tiles above the diagonal are never
visited. And under a causal mask the longest rows start first, so that the short ones fill the gaps at the end.

Dense and packed tensors share the code: sequence s starts at s * stride of the batch in the one, and at
cu_seqlens[s] * stride of the length in the other, where the batch stride is zero.

Shapes: head dimensions are padded to a power of two, at least 16, since matrix units work on such tiles. The last axis
must have stride 1. This module imports Triton; only `flash_attention` imports this module, and only where it runs.
`no_type_check` keeps the run-time checker of the tests away from functions that are compiled and never called.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from noise2tokens.flash_attention.tiled import refuse_second_derivative, wanted

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
NEVER = tl.constexpr(float("-inf"))


class Tile(NamedTuple):
    """How one kernel cuts its work: queries and keys of a tile, warps, and stages of the load pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


@triton.jit
@no_type_check
def _span(cu_seqlens, sequence, length, PACKED: tl.constexpr):
    """Where a sequence starts in the packed tensor, and how long it is."""
    start = sequence * 0
    if PACKED:
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        length = (tl.load(cu_seqlens + sequence + 1) - start).to(tl.int32)
    return start, length


@triton.jit
@no_type_check
def _pointers(base, row, stride, ROWS: tl.constexpr, PAD: tl.constexpr):
    """Addresses of a tile of rows: 64 bits for its first row, which may lie far away, 32 within the tile."""
    first = base + tl.cast(row, tl.int64) * stride
    return first + (tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, PAD)[None, :])


@triton.jit
@no_type_check
def _load(
    base, row, stride, length,
    ROWS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """A tile of rows; zero beyond the sequence (only asked about with EDGE) and beyond the head dimension."""
    pointers = _pointers(base, row, stride, ROWS, PAD)
    mask = (tl.arange(0, PAD) < DIM)[None, :]
    if EDGE:
        mask = mask & (row + tl.arange(0, ROWS) < length)[:, None]
        return tl.load(pointers, mask=mask, other=0.0)
    elif DIM < PAD:
        return tl.load(pointers, mask=mask, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
@no_type_check
def _store(
    base, row, stride, length, tile, ROWS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr
):
    """Write a tile of rows, as far as the sequence and the head dimension go."""
    rows = row + tl.arange(0, ROWS)
    mask = (rows < length)[:, None] & (tl.arange(0, PAD) < DIM)[None, :]
    pointers = _pointers(base, row, stride, ROWS, PAD)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def _visible(rows, columns, offset, keys, CAUSAL: tl.constexpr):
    """Which pairs of a query and a key count; the two index vectors must broadcast."""
    visible = columns < keys
    if CAUSAL:
        visible = visible & (columns <= rows + offset)
    return visible


@triton.jit
@no_type_check
def _key_range(
    row, offset, keys, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr
):
    """For a block of queries: keys before `full` need no mask, keys from `stop` on are hidden from all of them."""
    full = keys
    stop = keys
    if CAUSAL:
        full = tl.minimum(tl.maximum(row + offset + 1, 0), keys)
        stop = tl.minimum(tl.maximum(row + offset + BLOCK_Q, 0), keys)
    return full // BLOCK_K * BLOCK_K, stop


@triton.jit
@no_type_check
def _sweep_forward(
    acc, m, ell, q_tile, k, v, stride_kl, stride_vl, row, offset, keys, first, last, scale_log2,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    DIM: tl.constexpr, PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
):  # fmt: skip
    """Merge the keys from `first` to `last` into the state (m, ell, acc) of a block of queries."""
    for start in range(first, last, BLOCK_K):
        k_tile = _load(k, start, stride_kl, keys, BLOCK_K, DIM, PAD, MASKED)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        if MASKED:
            rows = row + tl.arange(0, BLOCK_Q)
            columns = start + tl.arange(0, BLOCK_K)
            scores = tl.where(
                _visible(rows[:, None], columns[None, :], offset, keys, CAUSAL), scores, NEVER
            )
        m_new = tl.maximum(m, tl.max(scores, 1) * scale_log2)
        m_finite = m_new
        if MASKED:
            m_finite = tl.where(m_new == NEVER, 0.0, m_new)
        weights = tl.exp2(scores * scale_log2 - m_finite[:, None])
        rescale = tl.exp2(m - m_finite)
        ell = ell * rescale + tl.sum(weights, 1)
        v_tile = _load(v, start, stride_vl, keys, BLOCK_K, VALUE_DIM, VALUE_PAD, MASKED)
        acc = tl.dot(
            weights.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision="ieee"
        )
        m = m_new
    return acc, m, ell


@triton.jit
@no_type_check
def _forward(
    q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_ob, stride_oh, stride_ol, stride_rb, stride_rh,
    heads, group, queries, keys, blocks, scale_log2,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    DIM: tl.constexpr, PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
):  # fmt: skip
    """O and LSE for one block of queries of one head."""
    program = tl.program_id(0)
    row = (blocks - 1 - program % blocks) * BLOCK_Q
    head = (program // blocks % heads).to(tl.int64)
    sequence = (program // blocks // heads).to(tl.int64)
    q_start, queries = _span(cu_seqlens_q, sequence, queries, PACKED)
    k_start, keys = _span(cu_seqlens_k, sequence, keys, PACKED)
    if row >= queries:
        return
    q += sequence * stride_qb + q_start * stride_ql + head * stride_qh
    k += sequence * stride_kb + k_start * stride_kl + head // group * stride_kh
    v += sequence * stride_vb + k_start * stride_vl + head // group * stride_vh
    o += sequence * stride_ob + q_start * stride_ol + head * stride_oh
    lse += sequence * stride_rb + q_start + head * stride_rh

    offset = keys - queries
    full, stop = _key_range(row, offset, keys, BLOCK_Q, BLOCK_K, CAUSAL)
    q_tile = _load(q, row, stride_ql, queries, BLOCK_Q, DIM, PAD, True)
    m = tl.full([BLOCK_Q], NEVER, tl.float32)
    ell = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, VALUE_PAD], tl.float32)
    acc, m, ell = _sweep_forward(
        acc, m, ell, q_tile, k, v, stride_kl, stride_vl, row, offset, keys, 0, full, scale_log2,
        False, CAUSAL, BLOCK_Q, BLOCK_K, DIM, PAD, VALUE_DIM, VALUE_PAD,
    )  # fmt: skip
    acc, m, ell = _sweep_forward(
        acc, m, ell, q_tile, k, v, stride_kl, stride_vl, row, offset, keys, full, stop, scale_log2,
        True, CAUSAL, BLOCK_Q, BLOCK_K, DIM, PAD, VALUE_DIM, VALUE_PAD,
    )  # fmt: skip

    empty = ell == 0.0
    ell = tl.where(empty, 1.0, ell)
    rows = row + tl.arange(0, BLOCK_Q)
    tl.store(lse + rows, tl.where(empty, NEVER, (m + tl.log2(ell)) * LN_2), mask=rows < queries)
    _store(o, row, stride_ol, queries, acc / ell[:, None], BLOCK_Q, VALUE_DIM, VALUE_PAD)


@triton.jit
@no_type_check
def _row_dot(
    o, grad_o, delta, cu_seqlens_q,
    stride_ob, stride_oh, stride_ol, stride_gb, stride_gh, stride_gl, stride_rb, stride_rh,
    heads, queries, blocks,
    PACKED: tl.constexpr, BLOCK_Q: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
):  # fmt: skip
    """D = rowsum(dO * O) for one block of queries of one head."""
    program = tl.program_id(0)
    row = program % blocks * BLOCK_Q
    head = (program // blocks % heads).to(tl.int64)
    sequence = (program // blocks // heads).to(tl.int64)
    q_start, queries = _span(cu_seqlens_q, sequence, queries, PACKED)
    if row >= queries:
        return
    o += sequence * stride_ob + q_start * stride_ol + head * stride_oh
    grad_o += sequence * stride_gb + q_start * stride_gl + head * stride_gh
    o_tile = _load(o, row, stride_ol, queries, BLOCK_Q, VALUE_DIM, VALUE_PAD, True).to(tl.float32)
    grad_tile = _load(grad_o, row, stride_gl, queries, BLOCK_Q, VALUE_DIM, VALUE_PAD, True).to(
        tl.float32
    )
    rows = row + tl.arange(0, BLOCK_Q)
    delta += sequence * stride_rb + q_start + head * stride_rh
    tl.store(delta + rows, tl.sum(o_tile * grad_tile, 1), mask=rows < queries)


@triton.jit
@no_type_check
def _load_row_numbers(lse, delta, row, queries, BLOCK_Q: tl.constexpr):
    """LSE in units of log2, and D, for a block of queries.

    A row without keys has LSE = -inf, and its weights come out as +inf. All its tiles are masked ones, though, in which
    the mask then puts 0 in their place. Rows beyond the end are harmless: their queries and gradients are 0.
    """
    rows = row + tl.arange(0, BLOCK_Q)
    row_lse = tl.load(lse + rows, mask=rows < queries, other=0.0) * LOG2_E
    return row_lse, tl.load(delta + rows, mask=rows < queries, other=0.0)


@triton.jit
@no_type_check
def _sweep_queries(
    grad_k, grad_v, k_tile, v_tile, q, grad_o, lse, delta, stride_ql, stride_gl, column, offset, queries, keys,
    first, last, scale_log2,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    DIM: tl.constexpr, PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
):  # fmt: skip
    """Add what the queries from `first` to `last` contribute to dK / scale and dV of a block of keys.

    Scores and weights are held transposed, keys by queries, so that they enter the products as they are.
    """
    for row in range(first, last, BLOCK_Q):
        q_tile = _load(q, row, stride_ql, queries, BLOCK_Q, DIM, PAD, True)
        row_lse, row_delta = _load_row_numbers(lse, delta, row, queries, BLOCK_Q)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
        weights = tl.exp2(scores * scale_log2 - row_lse[None, :])
        if MASKED:
            rows = row + tl.arange(0, BLOCK_Q)
            columns = column + tl.arange(0, BLOCK_K)
            weights = tl.where(
                _visible(rows[None, :], columns[:, None], offset, keys, CAUSAL), weights, 0.0
            )
        grad_tile = _load(grad_o, row, stride_gl, queries, BLOCK_Q, VALUE_DIM, VALUE_PAD, True)
        grad_v = tl.dot(weights.to(grad_tile.dtype), grad_tile, grad_v, input_precision="ieee")
        grad_weights = tl.dot(v_tile, tl.trans(grad_tile), input_precision="ieee")
        grad_scores = weights * (grad_weights - row_delta[None, :])
        grad_k = tl.dot(grad_scores.to(q_tile.dtype), q_tile, grad_k, input_precision="ieee")
    return grad_k, grad_v


@triton.jit
@no_type_check
def _backward_keys(
    q, k, v, grad_o, lse, delta, grad_k, grad_v, cu_seqlens_q, cu_seqlens_k,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_gb, stride_gh, stride_gl, stride_rb, stride_rh,
    stride_dkb, stride_dkh, stride_dkl, stride_dvb, stride_dvh, stride_dvl,
    kv_heads, group, queries, keys, blocks, scale, scale_log2,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    DIM: tl.constexpr, PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
):  # fmt: skip
    """dK and dV for one block of keys of one key head, summed over the query heads that share it."""
    program = tl.program_id(0)
    column = (
        program % blocks * BLOCK_K
    )  # under a causal mask the first keys are seen by the most queries
    kv_head = (program // blocks % kv_heads).to(tl.int64)
    sequence = (program // blocks // kv_heads).to(tl.int64)
    q_start, queries = _span(cu_seqlens_q, sequence, queries, PACKED)
    k_start, keys = _span(cu_seqlens_k, sequence, keys, PACKED)
    if column >= keys:
        return
    k += sequence * stride_kb + k_start * stride_kl + kv_head * stride_kh
    v += sequence * stride_vb + k_start * stride_vl + kv_head * stride_vh
    grad_k += sequence * stride_dkb + k_start * stride_dkl + kv_head * stride_dkh
    grad_v += sequence * stride_dvb + k_start * stride_dvl + kv_head * stride_dvh
    q += sequence * stride_qb + q_start * stride_ql
    grad_o += sequence * stride_gb + q_start * stride_gl
    lse += sequence * stride_rb + q_start
    delta += sequence * stride_rb + q_start

    offset = keys - queries
    first = 0
    full = 0
    if CAUSAL:  # the first query that sees the first key of the block, and the first one that sees all of it
        first = tl.maximum(column - offset, 0) // BLOCK_Q * BLOCK_Q
        full = tl.minimum(
            (tl.maximum(column + BLOCK_K - 1 - offset, 0) + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q,
            queries,
        )
    k_tile = _load(k, column, stride_kl, keys, BLOCK_K, DIM, PAD, True)
    v_tile = _load(v, column, stride_vl, keys, BLOCK_K, VALUE_DIM, VALUE_PAD, True)
    sum_k = tl.zeros([BLOCK_K, PAD], tl.float32)
    sum_v = tl.zeros([BLOCK_K, VALUE_PAD], tl.float32)
    for head in range(kv_head * group, (kv_head + 1) * group):
        q_head = q + head * stride_qh
        grad_head = grad_o + head * stride_gh
        lse_head = lse + head * stride_rh
        delta_head = delta + head * stride_rh
        if CAUSAL:
            sum_k, sum_v = _sweep_queries(
                sum_k, sum_v, k_tile, v_tile, q_head, grad_head, lse_head, delta_head, stride_ql, stride_gl, column,
                offset, queries, keys, first, full, scale_log2,
                True, CAUSAL, BLOCK_Q, BLOCK_K, DIM, PAD, VALUE_DIM, VALUE_PAD,
            )  # fmt: skip
        sum_k, sum_v = _sweep_queries(
            sum_k, sum_v, k_tile, v_tile, q_head, grad_head, lse_head, delta_head, stride_ql, stride_gl, column,
            offset, queries, keys, full, queries, scale_log2,
            False, CAUSAL, BLOCK_Q, BLOCK_K, DIM, PAD, VALUE_DIM, VALUE_PAD,
        )  # fmt: skip
    _store(grad_k, column, stride_dkl, keys, sum_k * scale, BLOCK_K, DIM, PAD)
    _store(grad_v, column, stride_dvl, keys, sum_v, BLOCK_K, VALUE_DIM, VALUE_PAD)


@triton.jit
@no_type_check
def _sweep_keys(
    grad_q, q_tile, grad_tile, row_lse, row_delta, k, v, stride_kl, stride_vl, row, offset, keys, first, last,
    scale_log2,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    DIM: tl.constexpr, PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
):  # fmt: skip
    """Add what the keys from `first` to `last` contribute to dQ / scale of a block of queries."""
    for start in range(first, last, BLOCK_K):
        k_tile = _load(k, start, stride_kl, keys, BLOCK_K, DIM, PAD, MASKED)
        v_tile = _load(v, start, stride_vl, keys, BLOCK_K, VALUE_DIM, VALUE_PAD, MASKED)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        weights = tl.exp2(scores * scale_log2 - row_lse[:, None])
        if MASKED:  # also keeps the zeros loaded beyond the last key from becoming inf * 0
            rows = row + tl.arange(0, BLOCK_Q)
            columns = start + tl.arange(0, BLOCK_K)
            weights = tl.where(
                _visible(rows[:, None], columns[None, :], offset, keys, CAUSAL), weights, 0.0
            )
        grad_weights = tl.dot(grad_tile, tl.trans(v_tile), input_precision="ieee")
        grad_scores = weights * (grad_weights - row_delta[:, None])
        grad_q = tl.dot(grad_scores.to(k_tile.dtype), k_tile, grad_q, input_precision="ieee")
    return grad_q


@triton.jit
@no_type_check
def _backward_queries(
    q, k, v, grad_o, lse, delta, grad_q, cu_seqlens_q, cu_seqlens_k,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_gb, stride_gh, stride_gl, stride_rb, stride_rh, stride_dqb, stride_dqh, stride_dql,
    heads, group, queries, keys, blocks, scale, scale_log2,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    DIM: tl.constexpr, PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
):  # fmt: skip
    """dQ for one block of queries of one head."""
    program = tl.program_id(0)
    row = (blocks - 1 - program % blocks) * BLOCK_Q
    head = (program // blocks % heads).to(tl.int64)
    sequence = (program // blocks // heads).to(tl.int64)
    q_start, queries = _span(cu_seqlens_q, sequence, queries, PACKED)
    k_start, keys = _span(cu_seqlens_k, sequence, keys, PACKED)
    if row >= queries:
        return
    q += sequence * stride_qb + q_start * stride_ql + head * stride_qh
    k += sequence * stride_kb + k_start * stride_kl + head // group * stride_kh
    v += sequence * stride_vb + k_start * stride_vl + head // group * stride_vh
    grad_o += sequence * stride_gb + q_start * stride_gl + head * stride_gh
    grad_q += sequence * stride_dqb + q_start * stride_dql + head * stride_dqh
    lse += sequence * stride_rb + q_start + head * stride_rh
    delta += sequence * stride_rb + q_start + head * stride_rh

    offset = keys - queries
    full, stop = _key_range(row, offset, keys, BLOCK_Q, BLOCK_K, CAUSAL)
    q_tile = _load(q, row, stride_ql, queries, BLOCK_Q, DIM, PAD, True)
    grad_tile = _load(grad_o, row, stride_gl, queries, BLOCK_Q, VALUE_DIM, VALUE_PAD, True)
    row_lse, row_delta = _load_row_numbers(lse, delta, row, queries, BLOCK_Q)
    total = tl.zeros([BLOCK_Q, PAD], tl.float32)
    total = _sweep_keys(
        total, q_tile, grad_tile, row_lse, row_delta, k, v, stride_kl, stride_vl, row, offset, keys, 0, full,
        scale_log2, False, CAUSAL, BLOCK_Q, BLOCK_K, DIM, PAD, VALUE_DIM, VALUE_PAD,
    )  # fmt: skip
    total = _sweep_keys(
        total, q_tile, grad_tile, row_lse, row_delta, k, v, stride_kl, stride_vl, row, offset, keys, full, stop,
        scale_log2, True, CAUSAL, BLOCK_Q, BLOCK_K, DIM, PAD, VALUE_DIM, VALUE_PAD,
    )  # fmt: skip
    _store(grad_q, row, stride_dql, queries, total * scale, BLOCK_Q, DIM, PAD)


# Tiles of [forward, backward over keys, backward over queries] by padded head dimension, for 2-byte elements, by the
# shared memory that one program may use: the largest of those tried that compile with fewer than 100 bytes of spilled
# registers for each thread.
HOPPER = {  # 227 KiB: H100, H200
    64: [Tile(128, 64, 4, 3), Tile(64, 128, 8, 2), Tile(128, 64, 4, 3)],
    128: [Tile(128, 128, 8, 3), Tile(32, 128, 8, 3), Tile(128, 64, 8, 3)],
    256: [Tile(128, 64, 8, 2), Tile(32, 32, 8, 1), Tile(64, 32, 8, 2)],
}
AMPERE = {  # 163 KiB: A100
    64: [Tile(128, 64, 4, 3), Tile(32, 128, 8, 2), Tile(128, 64, 8, 3)],
    128: [Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)],
    256: [Tile(64, 64, 8, 2), Tile(32, 32, 8, 2), Tile(64, 32, 8, 1)],
}
SMALL = {  # 99 KiB: consumer GPUs
    64: [Tile(128, 64, 4, 3), Tile(32, 128, 8, 2), Tile(64, 64, 4, 2)],
    128: [Tile(128, 32, 8, 2), Tile(32, 64, 8, 2), Tile(64, 32, 8, 2)],
    256: [Tile(64, 32, 8, 1), Tile(16, 32, 4, 1), Tile(32, 16, 4, 1)],
}
# Products in full single precision use no matrix units; small tiles keep their operands in registers.
SINGLE = {
    64: [Tile(32, 32, 4, 2), Tile(16, 32, 4, 1), Tile(32, 32, 4, 2)],
    128: [Tile(32, 32, 8, 1), Tile(16, 16, 4, 1), Tile(32, 16, 4, 1)],
    256: [Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)],
}
INTERPRETED = [Tile(32, 16, 1, 1), Tile(16, 32, 1, 1), Tile(32, 16, 1, 1)]


def tiles_for(dim: int, itemsize: int, shared_memory: int | None) -> list[Tile]:
    """The tiles of the three kernels: forward, backward over keys, backward over queries.

    Args:
        dim: the larger of the two padded head dimensions.
        itemsize: bytes of an element.
        shared_memory: bytes of shared memory that a program may use; None in the interpreter.

    Returns:
        Three tiles, from a table, not from a search at run time.
    """
    if shared_memory is None:
        return INTERPRETED
    if itemsize == 4:
        table = SINGLE
    elif shared_memory >= 227 * 1024:
        table = HOPPER
    elif shared_memory >= 163 * 1024:
        table = AMPERE
    else:
        table = SMALL
    return table[max(dim, 64)]


@contextmanager
def tried(q: Tensor, v: Tensor, which: int, tile: Tile) -> Iterator[None]:
    """Put another tile into the table, for as long as it takes to measure it.

    Args:
        q, v: tensors whose dimensions, element type and device choose the entry.
        which: 0 forward, 1 backward over keys, 2 backward over queries.
        tile: what to use there.
    """
    tiles = _tiles(q, v)
    kept, tiles[which] = tiles[which], tile
    try:
        yield
    finally:
        tiles[which] = kept


class KernelAttention(torch.autograd.Function):
    """The kernels joined for autograd. Packed tensors come as a batch of one; dense ones have no cu_seqlens."""

    @staticmethod
    def forward(
        ctx,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_queries: int,
        max_keys: int,
        causal: bool,
        scale: float,
    ):
        q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
        o, lse = _empty_like(q, v.shape[-1]), q.new_empty(q.shape[:-1], dtype=torch.float32)
        sequences = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
        tile, packed = _tiles(q, v)[0], cu_seqlens_q is not None
        blocks = triton.cdiv(max_queries, tile.queries)
        with _device_of(q):
            _forward[(blocks * q.shape[1] * sequences,)](
                q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k,
                *_strides(packed, q, k, v, o, lse),
                q.shape[1], q.shape[1] // k.shape[1], max_queries, max_keys, blocks, scale * LOG2_E.value,
                CAUSAL=causal, PACKED=packed, **_dimensions(q, v), **_options(tile),
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k)
        ctx.numbers = sequences, max_queries, max_keys, causal, scale
        return o, lse

    @staticmethod
    def backward(ctx, grad_o, grad_lse):
        refuse_second_derivative()
        q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
        sequences, max_queries, max_keys, causal, scale = ctx.numbers
        heads, kv_heads, packed = q.shape[1], k.shape[1], cu_seqlens_q is not None
        grad_o = _unit_stride(grad_o)
        grad_q, grad_k, grad_v = (_empty_like(x, x.shape[-1]) for x in (q, k, v))
        delta = torch.empty_like(lse)
        _, over_keys, over_queries = _tiles(q, v)
        key_blocks = triton.cdiv(max_keys, over_keys.keys)
        query_blocks = triton.cdiv(max_queries, over_queries.queries)
        common = dict(CAUSAL=causal, PACKED=packed, **_dimensions(q, v))
        with _device_of(q):
            _row_dot[(query_blocks * heads * sequences,)](
                o, grad_o, delta, cu_seqlens_q, *_strides(packed, o, grad_o, lse), heads, max_queries, query_blocks,
                PACKED=packed, BLOCK_Q=over_queries.queries, VALUE_DIM=v.shape[-1], VALUE_PAD=_pad(v.shape[-1]),
            )  # fmt: skip
            delta -= grad_lse  # LSE's own gradient enters dS exactly where D does
            if any(ctx.needs_input_grad[1:3]):
                _backward_keys[(key_blocks * kv_heads * sequences,)](
                    q, k, v, grad_o, lse, delta, grad_k, grad_v, cu_seqlens_q, cu_seqlens_k,
                    *_strides(packed, q, k, v, grad_o, lse, grad_k, grad_v),
                    kv_heads, heads // kv_heads, max_queries, max_keys, key_blocks, scale, scale * LOG2_E.value,
                    **common, **_options(over_keys),
                )  # fmt: skip
            if ctx.needs_input_grad[0]:
                _backward_queries[(query_blocks * heads * sequences,)](
                    q, k, v, grad_o, lse, delta, grad_q, cu_seqlens_q, cu_seqlens_k,
                    *_strides(packed, q, k, v, grad_o, lse, grad_q),
                    heads, heads // kv_heads, max_queries, max_keys, query_blocks, scale, scale * LOG2_E.value,
                    **common, **_options(over_queries),
                )  # fmt: skip
        return *wanted(ctx, (grad_q, grad_k, grad_v)), *[None] * 6


def kernel_attention(
    q: Float[Tensor, "batch heads query dim"],
    k: Float[Tensor, "batch kv_heads key dim"],
    v: Float[Tensor, "batch kv_heads key value_dim"],
    causal: bool,
    scale: float,
) -> tuple[Float[Tensor, "batch heads query value_dim"], Float[Tensor, "batch heads query"]]:
    """Differentiable attention by the Triton kernels.

    Args:
        q, k, v: queries, keys and values in half, bfloat16 or single precision; none may be empty.
        causal: whether a query sees only the keys up to its own position, aligned at the bottom right.
        scale: what the scores are multiplied by; positive.

    Returns:
        The output, and the log-sum-exp of each row of scores in single precision.

    Source: Dao 2023, Algorithms 1 and 2.
    """
    return KernelAttention.apply(q, k, v, None, None, q.shape[2], k.shape[2], causal, scale)


def kernel_attention_varlen(
    q: Float[Tensor, "query_tokens heads dim"],
    k: Float[Tensor, "key_tokens kv_heads dim"],
    v: Float[Tensor, "key_tokens kv_heads value_dim"],
    cu_seqlens_q: Int[Tensor, " offsets"],
    cu_seqlens_k: Int[Tensor, " offsets"],
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
) -> tuple[Float[Tensor, "query_tokens heads value_dim"], Float[Tensor, "query_tokens heads"]]:
    """Differentiable attention within packed sequences by the Triton kernels.

    Args:
        q, k, v: the tokens of all sequences, end to end.
        cu_seqlens_q, cu_seqlens_k: offsets of the sequences.
        max_seqlen_q, max_seqlen_k: the longest sequence.
        causal, scale: as in `kernel_attention`.

    Returns:
        The output and the log-sum-exp of each query token.

    Source: Dao 2023, Algorithms 1 and 2.
    """
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    o, lse = KernelAttention.apply(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale
    )
    return o[0].transpose(0, 1), lse[0].transpose(0, 1)


def _tiles(q: Tensor, v: Tensor) -> list[Tile]:
    shared_memory = None
    if q.is_cuda:
        shared_memory = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin
    return tiles_for(max(_pad(q.shape[-1]), _pad(v.shape[-1])), q.element_size(), shared_memory)


def _options(tile: Tile) -> dict[str, int]:
    return dict(
        BLOCK_Q=tile.queries, BLOCK_K=tile.keys, num_warps=tile.warps, num_stages=tile.stages
    )


def _dimensions(q: Tensor, v: Tensor) -> dict[str, int]:
    dim, value_dim = q.shape[-1], v.shape[-1]
    return dict(DIM=dim, PAD=_pad(dim), VALUE_DIM=value_dim, VALUE_PAD=_pad(value_dim))


def _pad(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _strides(packed: bool, *tensors: Tensor) -> list[int]:
    """Batch, head and length strides of each tensor, the last of which is 1 for LSE and left out."""
    strides = []
    for x in tensors:
        strides += [0 if packed else x.stride(0), *x.stride()[1:-1]]
    return strides


def _empty_like(x: Tensor, dim: int) -> Tensor:
    """A tensor for results shaped like `x`, with heads and length in the same order in memory."""
    batch, heads, length, _ = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(batch, length, heads, dim).transpose(1, 2)
    return x.new_empty(batch, heads, length, dim)


def _unit_stride(x: Tensor) -> Tensor:
    """The kernels walk along the last axis without asking for its stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _device_of(x: Tensor):
    """Triton launches on the current device, which need not be the one that the tensors lie on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
