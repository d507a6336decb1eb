"""From padded batches to tokens end to end and back, and what a packed row needs beside its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Int32, Int64, Shaped
from torch import Tensor
from torch.nn import functional as F

from noise2tokens.flash_attention import flash_attention_varlen, kernel_runs_on
from noise2tokens.transformer import Layout, attend, sequence_ids

IGNORED = -100  # a label that no loss counts


def offsets(lengths: Sequence[int] | Int[Tensor, "n"]) -> Int32[Tensor, "n1"]:
    """0 and the running sum of the lengths: `cu_seqlens`."""
    return F.pad(torch.as_tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)


@dataclass(frozen=True)
class Packed:
    """A row of sequences laid end to end.

    Attributes:
        tokens: All of them.
        labels: The token that follows each; `IGNORED` at the end of each sequence.
        positions: Of each token in its own sequence.
        cu_seqlens: Offsets of the sequences.
        max_seqlen: The longest.
    """

    tokens: Int64[Tensor, "T"]
    labels: Int64[Tensor, "T"]
    positions: Int64[Tensor, "T"]
    cu_seqlens: Int32[Tensor, "_"]
    max_seqlen: int


def pack(sequences: Sequence[Int64[Tensor, "_"]]) -> Packed:
    """Lay sequences end to end, with labels that never cross from one to the next.

    Raises:
        ValueError: If there is no sequence, or one is empty.
    """
    if not sequences or not all(len(tokens) for tokens in sequences):
        raise ValueError(f"need sequences of one token or more, got {[len(s) for s in sequences]}")
    labels = [F.pad(tokens[1:], (0, 1), value=IGNORED) for tokens in sequences]
    lengths = [len(tokens) for tokens in sequences]
    positions = [torch.arange(length, device=sequences[0].device) for length in lengths]
    return Packed(
        torch.cat(list(sequences)),
        torch.cat(labels),
        torch.cat(positions),
        offsets(lengths).to(sequences[0].device),
        max(lengths),
    )


def pad_batch(
    sequences: Sequence[Int64[Tensor, "_"]], value: int
) -> tuple[Int64[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Pad sequences on the right to the longest: tokens, and which of them are real.

    Raises:
        ValueError: If there is no sequence.
    """
    if not sequences:
        raise ValueError("need at least one sequence to pad")
    lengths = torch.tensor([len(tokens) for tokens in sequences], device=sequences[0].device)
    tokens = torch.nn.utils.rnn.pad_sequence(list(sequences), True, value)
    return tokens, torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]


def unpad(
    x: Shaped[Tensor, "B T *rest"], mask: Bool[Tensor, "B T"]
) -> tuple[Shaped[Tensor, "n *rest"], Int64[Tensor, "n"], Int32[Tensor, "_"], int]:
    """Take the real tokens out of a padded batch.

    Args:
        x: Anything with a batch and a length.
        mask: True for real tokens; which side the padding is on does not matter.

    Returns:
        The tokens end to end, their places in the flattened batch, the offsets, and the longest length.

    Raises:
        ValueError: If no token is real, or the mask is not of the batch's shape.
    """
    if x.shape[:2] != mask.shape:
        raise ValueError(f"need a mask of {tuple(x.shape[:2])}, got {tuple(mask.shape)}")
    lengths = mask.sum(1, dtype=torch.int32)
    places = mask.flatten().nonzero().flatten()
    if not len(places):
        raise ValueError(f"no token of {tuple(mask.shape)} is real")
    return x.flatten(0, 1)[places], places, offsets(lengths), int(lengths.max())


def pad(
    x: Shaped[Tensor, "n *rest"], places: Int64[Tensor, "n"], batch: int, length: int
) -> Shaped[Tensor, "{batch} {length} *rest"]:
    """Put tokens back to their places, and zeros where padding was: the inverse of `unpad`."""
    full = x.new_zeros(batch * length, *x.shape[1:])
    return full.index_copy(0, places, x).unflatten(0, (batch, length))


def block_diagonal_mask(cu_seqlens: Int32[Tensor, "_"]) -> Bool[Tensor, "T T"]:
    """Whether token i may see token j: in the same sequence, and not after it."""
    tokens = int(cu_seqlens[-1])
    ids = sequence_ids(cu_seqlens, tokens)
    same = ids[:, None] == ids
    return same & torch.ones_like(same).tril()


def varlen_attention(
    q: Float[Tensor, "heads T dim"],
    k: Float[Tensor, "kv_heads T dim"],
    v: Float[Tensor, "kv_heads T dim"],
    cu_seqlens: Int32[Tensor, "_"],
    max_seqlen: int,
    scale: float | None = None,
) -> Float[Tensor, "heads T dim"]:
    """Causal attention of packed sequences: each by itself, and nothing else.

    On a GPU the kernel of chapter 8 walks along the offsets. On a CPU PyTorch's attention is called for one sequence
    after another. Either way the work is the sum of the squares of the lengths, and not the square of their sum.

    Args:
        q, k, v: All tokens; keys and values of as many or fewer heads.
        cu_seqlens: Offsets of the sequences.
        max_seqlen: The longest.
        scale: Of the scores; 1 / sqrt(dim) if not given.

    Raises:
        ValueError: If the offsets do not lead from 0 to the number of tokens (on a CPU, where asking does not wait).
    """
    if kernel_runs_on(q.device):
        rows = (x.transpose(0, 1) for x in (q, k, v))
        out = flash_attention_varlen(
            *rows, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True, scale=scale
        )
        return out.transpose(0, 1)
    if cu_seqlens[:1].tolist() + cu_seqlens[-1:].tolist() != [0, q.shape[1]]:
        raise ValueError(f"offsets must lead from 0 to {q.shape[1]}, got {cu_seqlens.tolist()}")
    sizes = cu_seqlens.diff().tolist()
    grouped = q.shape[0] != k.shape[0]
    parts = zip(*(x[None].split(sizes, 2) for x in (q, k, v)), strict=True)
    return torch.cat(
        [
            F.scaled_dot_product_attention(*part, is_causal=True, scale=scale, enable_gqa=grouped)
            for part in parts
        ],
        2,
    )[0]


def attend_each(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    v: Float[Tensor, "B G S K"],
    layout: Layout,
    scale: float | None = None,
) -> Float[Tensor, "B H T K"]:
    """A core for `transformer.Attention`: packed rows by `varlen_attention`, padded batches as usual."""
    if layout.cu_seqlens is None:
        return attend(q, k, v, layout, scale)
    return varlen_attention(q[0], k[0], v[0], layout.cu_seqlens, layout.max_seqlen, scale)[None]
