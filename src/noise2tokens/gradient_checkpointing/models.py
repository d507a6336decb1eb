"""A transformer layer whose activations can be counted by hand, and decoders that recompute.

The layer is the one of the published count: GPT's, with LayerNorm, attention that stores its matrix, and a GELU network
four times as wide. Without dropout it keeps 16 B N w + H B N² numbers for batch B, length N, width w and H heads.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from noise2tokens.gradient_checkpointing.checkpoint import checkpoint
from noise2tokens.gradient_checkpointing.schedules import Span
from noise2tokens.transformer import Decoder, KVCache, Layout


def stored_attention(
    q: Float[Tensor, "batch heads length dim"],
    k: Float[Tensor, "batch heads length dim"],
    v: Float[Tensor, "batch heads length dim"],
    layout: Layout | None = None,
) -> Float[Tensor, "batch heads length dim"]:
    """Causal attention that keeps its matrix of probabilities for the backward pass.

    Raises:
        ValueError: If the layout has packed sequences, which would see each other.
    """
    if layout is not None and layout.cu_seqlens is not None:
        raise ValueError(f"need sequences apart, got packed ones at {layout.cu_seqlens.tolist()}")
    length = q.shape[-2]
    hidden = torch.full((length, length), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]) + hidden, -1) @ v


class GPTLayer(nn.Module):
    """A pre-norm transformer layer as GPT-2's, without dropout.

    Args:
        width: Of the stream, a multiple of `heads`.
        heads: Heads of the attention.
        attend: Makes an output of q, k and v; `stored_attention` by default.

    Raises:
        ValueError: If the heads do not divide the width.

    Source: Radford et al. 2019, section 2.3; Korthikanti et al. 2022, figure 2.
    """

    def __init__(self, width: int, heads: int, attend: Callable[..., Tensor] = stored_attention):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"the heads must divide the width, got {width} and {heads}")
        self.heads, self.attend = heads, attend
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(
        self, x: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch length width"]:
        """Return the stream after this layer."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norms[0](x)).chunk(3, -1)
        )
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


def kept_numbers(
    batch: int, length: int, width: int, heads: int, recompute: str = "nothing"
) -> int:
    """Count the numbers that `GPTLayer` keeps for its backward pass, its input included.

    Args:
        batch, length, width, heads: B, N, w and H.
        recompute: "nothing", "attention" (its matrix is not kept) or "layer" (nothing but the input is kept).

    Returns:
        B N w (16 + H N / w), without the last term, or B N w. Means and deviations of the norms, 4 B N, are left out.

    Raises:
        ValueError: If `recompute` is something else.

    Source: Korthikanti et al. 2022, section 4.1, for numbers instead of bytes and without dropout.
    """
    stream = batch * length * width
    if recompute == "layer":
        return stream
    if recompute not in ("nothing", "attention"):
        raise ValueError(f'recompute is "nothing", "attention" or "layer", got {recompute!r}')
    return 16 * stream + (recompute == "nothing") * heads * batch * length**2


def published_bytes(batch: int, length: int, width: int, heads: int) -> int:
    """The published count of a layer's bytes: B N w (34 + 5 H N / w), at 16 bit with dropout and its masks of a byte.

    Source: Korthikanti et al. 2022, equation 1.
    """
    return 34 * batch * length * width + 5 * heads * batch * length**2


class Recomputed(nn.Module):
    """Consecutive blocks of a decoder as one block, which forgets what happens within it.

    Args:
        blocks: The blocks, which are shared and not copied.
        how: `checkpoint`, or a function that is called as it is.
    """

    def __init__(self, blocks: Sequence[nn.Module], how: Callable = checkpoint):
        super().__init__()
        self.blocks, self.how = nn.ModuleList(blocks), how

    def forward(
        self, x: Float[Tensor, "B T D"], layout: Layout, cache: KVCache | None = None
    ) -> Float[Tensor, "B T D"]:
        """Return the stream after the last of them.

        Raises:
            ValueError: If there is a cache: it would be filled twice, and has a part for each block.
        """
        if cache is not None:
            raise ValueError("recomputed blocks take no cache: generate outside of `recomputing`")
        return self.how(self._run, x, layout)

    def _run(self, x: Tensor, layout: Layout) -> Tensor:
        for block in self.blocks:
            x = block(x, layout)
        return x


@contextmanager
def recomputing(
    model: Decoder, spans: Sequence[Span], how: Callable = checkpoint
) -> Iterator[Decoder]:
    """Let a decoder recompute some of its blocks for a while; parameters and their names are as before afterwards.

    Args:
        model: The decoder.
        spans: (start, stop) of each segment, in order; blocks between segments are kept as they are.
        how: `checkpoint`, or a function that is called as it is.

    Raises:
        ValueError: If a segment is empty, overlaps another or ends after the last block.
    """
    blocks, made, done = list(model.blocks), [], 0
    for start, stop in spans:
        if not done <= start < stop <= len(blocks):
            raise ValueError(f"segments must lie in order within {len(blocks)} blocks, got {spans}")
        made += [*blocks[done:start], Recomputed(blocks[start:stop], how)]
        done = stop
    before, model.blocks = model.blocks, nn.ModuleList([*made, *blocks[done:]])
    try:
        yield model
    finally:
        model.blocks = before


@contextmanager
def attending(model: Decoder, core: Callable[..., Tensor]) -> Iterator[Decoder]:
    """Let all layers of a decoder attend by another core for a while, which begins before that of `recomputing`."""
    before = [block.attention.core for block in model.blocks]
    for block in model.blocks:
        block.attention.core = core
    try:
        yield model
    finally:
        for block, old in zip(model.blocks, before, strict=True):
            block.attention.core = old


def recomputed_attention(
    q: Float[Tensor, "batch heads length dim"],
    k: Float[Tensor, "batch heads length dim"],
    v: Float[Tensor, "batch heads length dim"],
    layout: Layout | None = None,
) -> Float[Tensor, "batch heads length dim"]:
    """`stored_attention` that forgets its matrix: selective recomputation.

    Source: Korthikanti et al. 2022, section 5.
    """
    return checkpoint(stored_attention, q, k, v, layout)
