"""One decoder-only transformer of the Llama type, whose parts chapters exchange.

Pre-norm blocks with RMSNorm, rotary positions, grouped-query attention and a SwiGLU feed-forward network; no biases, no
dropout. A chapter that is about one of these plugs in its own and leaves the rest alone:

    Decoder(config, linear=Float8Linear)                             every matrix between embedding and head
    Decoder(config, attention=LatentAttention)                       called with (config, linear), once a layer
    Decoder(config, feed_forward=[SwiGLU] + [MixtureOfExperts] * 5)  one for each layer, where layers differ
    Decoder(config, attention=partial(Attention, core=flash))        what makes an output of q, k and v

An attention is called with (x_BTD, layout, cache), a feed-forward network with (x_BTD), a core with (q, k, v, layout).
`Layout` holds what all layers share: rotary angles, which tokens belong together, and a mask for cores that want one.
Sequences of different lengths are packed: laid end to end, with their offsets in `cu_seqlens`. Padding on the right
needs no mask either, since in a causal model real tokens never see it.

Names of tensors end in their axes:

    B batch (1 where sequences are packed)   T tokens of this call   S keys, those of earlier calls included
    D width                                  H query heads           G key and value heads, a divisor of H
    K dimension of a head                    F hidden width          V vocabulary
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from jaxtyping import Bool, Float, Int, Int32, Shaped
from torch import Generator, Tensor, nn
from torch.nn import functional as F

INITIAL_STD = 0.02


@dataclass(frozen=True)
class Config:
    """The sizes of a decoder; ValueError if they do not fit together."""

    vocab_size: int
    width: int  # of the residual stream
    layers: int
    heads: int  # for queries, each of dimension width / heads, which must be even
    kv_heads: int | None = None  # a divisor of heads; as many as heads if not given
    hidden: int | None = None  # of the feed-forward network; 8/3 width, up to a multiple of 16
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False  # whether the output matrix is the embedding

    def __post_init__(self):
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.heads)
        if self.hidden is None:
            object.__setattr__(self, "hidden", 16 * math.ceil(self.width / 6))
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "hidden"):
            _require(getattr(self, name) > 0, f"need {name} > 0, got {getattr(self, name)}")
        _require(self.heads % self.kv_heads == 0, f"kv_heads must divide heads in {self}")
        _require(self.width % (2 * self.heads) == 0, f"width / heads must be even in {self}")
        _require(self.rope_base > 0, f"need rope_base > 0, got {self.rope_base}")
        _require(self.norm_eps >= 0, f"need norm_eps >= 0, got {self.norm_eps}")

    @property
    def head_dim(self) -> int:
        """K."""
        return self.width // self.heads


@dataclass(frozen=True)
class Layout:
    """Where the tokens of one call stand: computed once, shared by all layers."""

    positions: Int[Tensor, "*b T"]  # of each token in its sequence
    cos: Float[Tensor, "*b 1 T half"]  # of the rotary angles, with an axis for the heads
    sin: Float[Tensor, "*b 1 T half"]
    keys: int  # S
    cu_seqlens: Int32[Tensor, "_"] | None = None  # offsets of packed sequences
    max_seqlen: int | None = None  # the longest of them

    @cached_property
    def mask(self) -> Bool[Tensor, "T S"]:
        """Whether token t sees key s, the last token being the last key: not after itself, not in another sequence."""
        tokens = self.positions.shape[-1]
        mask_TS = torch.ones(tokens, self.keys, dtype=torch.bool, device=self.positions.device)
        mask_TS = mask_TS.tril(self.keys - tokens)
        if self.cu_seqlens is None:
            return mask_TS
        ids_T = sequence_ids(self.cu_seqlens, tokens)
        return mask_TS & (ids_T[:, None] == ids_T)


def sequence_ids(cu_seqlens: Int32[Tensor, "_"], tokens: int) -> Int[Tensor, "{tokens}"]:
    """Number each packed token by its sequence, from 0; empty sequences keep their number."""
    index_T = torch.arange(tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), index_T, right=True)


class KVCache:
    """What one layer remembers: tensors that grow along their last axis but one, that of tokens.

    Which tensors, the attention decides: keys and values, or a latent and a rotary key. Memory for `capacity` tokens is
    reserved at the first call; where they become more, twice as much.
    """

    def __init__(self, capacity: int = 0):
        _require(capacity >= 0, f"need capacity >= 0, got {capacity}")
        self.capacity, self.length = capacity, 0
        self._reserve: list[Tensor] = []

    def append(self, *new: Shaped[Tensor, "*_ tokens _"]) -> tuple[Tensor, ...]:
        """Add what belongs to new tokens; return all that is kept, as views of the cache's memory.

        Raises:
            ValueError: If the tensors do not continue those that are kept.
            RuntimeError: If a gradient is asked for, which would need what a later call overwrites.
        """
        kept, given = (
            [(x.shape[:-2], x.shape[-1], x.dtype, x.device) for x in tensors]
            for tensors in (self._reserve, new)
        )
        _require(kept in ([], given), f"the cache holds {kept}, got {given}")
        _require(len({x.shape[-2] for x in new}) == 1, "need tensors of the same number of tokens")
        if any(x.requires_grad for x in new):
            raise RuntimeError("a cache keeps no gradients: call the model under torch.no_grad()")
        start, self.length = self.length, self.length + new[0].shape[-2]
        if self.length > self.capacity:
            self.capacity = max(self.length, 2 * self.capacity)
        if not self._reserve or self.capacity > self._reserve[0].shape[-2]:
            old = self._reserve
            self._reserve = [x.new_empty(*x.shape[:-2], self.capacity, x.shape[-1]) for x in new]
            for x, reserve in zip(old, self._reserve, strict=False):
                reserve[..., :start, :] = x[..., :start, :]
        for x, reserve in zip(new, self._reserve, strict=True):
            reserve[..., start : self.length, :] = x
        return tuple(x[..., : self.length, :] for x in self._reserve)

    def crop(self, length: int) -> None:
        """Forget all but the first tokens, as when drafted tokens are rejected."""
        _require(0 <= length <= self.length, f"can keep 0 to {self.length} tokens, got {length}")
        self.length = length


def rotary(
    positions: Int[Tensor, "*B T"], dim: int, base: float
) -> tuple[Float[Tensor, "*B T half"], Float[Tensor, "*B T half"]]:
    """Return cosine and sine of the rotary angles, position times base^(-2i/dim) for pair i.

    They are few numbers, so they come in float64: single precision is off by 0.002 radians at position 100,000.

    Source: Su et al. 2021, section 3.2.2.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    angles = positions[..., None] * base**-exponents
    return angles.cos(), angles.sin()


def rotate(
    x: Float[Tensor, "*B T K"], cos: Float[Tensor, "*b T half"], sin: Float[Tensor, "*b T half"]
) -> Float[Tensor, "*B T K"]:
    """Turn pairs of coordinates by the rotary angles; pair i is coordinates i and i + K/2.

    This half-split order is that of transformers. Meta's Llama code pairs 2i and 2i + 1 (interleaved): the same up to
    the order of the rows of the query and key matrices, which the conversion of a checkpoint permutes.
    """
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def attend(
    q_BHTK: Float[Tensor, "B H T K"],
    k_BGSK: Float[Tensor, "B G S K"],
    v_BGSV: Float[Tensor, "B G S V"],
    layout: Layout,
    scale: float | None = None,
) -> Float[Tensor, "B H T V"]:
    """Return softmax(scale q kᵀ) v over what each token may see, by PyTorch's own attention.

    Query head h reads key head h // (H / G). The scale is 1 / sqrt(K) if not given.
    """
    tokens = q_BHTK.shape[2]
    # `is_causal` aligns the first token with the first key, so it is right only where there are as many of each.
    causal = layout.cu_seqlens is None and tokens == layout.keys
    return F.scaled_dot_product_attention(
        q_BHTK,
        k_BGSK,
        v_BGSV,
        attn_mask=None if causal or tokens == 1 else layout.mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q_BHTK.shape[1] != k_BGSK.shape[1],
    )


class Attention(nn.Module):
    """Causal attention of H query heads that share G key and value heads (Ainslie et al., GQA, 2023).

    `linear` is called with (inputs, outputs, bias=False), `core` as `attend`.
    """

    def __init__(
        self,
        config: Config,
        linear: Callable[..., nn.Module] = nn.Linear,
        core: Callable[..., Tensor] = attend,
    ):
        super().__init__()
        self.head_dim, self.core = config.head_dim, core
        self.query = linear(config.width, config.heads * config.head_dim, bias=False)
        self.key = linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.value = linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.out = linear(config.heads * config.head_dim, config.width, bias=False)

    def forward(
        self, x_BTD: Float[Tensor, "B T D"], layout: Layout, cache: KVCache | None = None
    ) -> Float[Tensor, "B T D"]:
        """Return what the tokens read from one another."""
        q_BHTK, k_BGSK, v_BGSK = (
            project(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        q_BHTK = rotate(q_BHTK, layout.cos, layout.sin)
        k_BGSK = rotate(k_BGSK, layout.cos, layout.sin)
        if cache is not None:
            k_BGSK, v_BGSK = cache.append(k_BGSK, v_BGSK)
        o_BHTK = self.core(q_BHTK, k_BGSK, v_BGSK, layout)
        return self.out(o_BHTK.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """The feed-forward network down(silu(gate x) · up x) (Shazeer 2020, equation 6)."""

    def __init__(self, config: Config, linear: Callable[..., nn.Module] = nn.Linear):
        super().__init__()
        self.gate = linear(config.width, config.hidden, bias=False)
        self.up = linear(config.width, config.hidden, bias=False)
        self.down = linear(config.hidden, config.width, bias=False)

    def forward(self, x_BTD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Return what is computed for each token by itself."""
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nn.Module):
    """Attention, then a feed-forward network; each reads a normalized copy of the stream and adds to the stream."""

    def __init__(self, config: Config, attention: nn.Module, feed_forward: nn.Module):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, config.norm_eps)
        self.attention = attention
        self.feed_forward_norm = nn.RMSNorm(config.width, config.norm_eps)
        self.feed_forward = feed_forward

    def forward(
        self, x_BTD: Float[Tensor, "B T D"], layout: Layout, cache: KVCache | None = None
    ) -> Float[Tensor, "B T D"]:
        """Return the stream after this block."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), layout, cache)
        return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))


class Decoder(nn.Module):
    """Embedding, blocks, norm and head: logits of the next token at every token.

    `model(tokens)` is `model.logits(model.hidden(model.embedding(tokens)))`; call these one by one to put other
    vectors in the place of embeddings, or to read the stream before the last norm.

    Args:
        config: Sizes.
        attention: Makes a layer's attention from (config, linear), or a sequence with one such for each layer.
        feed_forward: Likewise.
        linear: Makes all linear maps of the layers from (inputs, outputs, bias=False). The head stays plain.
        rope: Maps positions to cosine and sine of the rotary angles; `rotary` with the config's values if not given.

    Source: Touvron et al., LLaMA, 2023, section 2.2. Initial weights as in GPT-2: N(0, 0.02²), and the maps that write
    to the stream (named `out` and `down`) divided by sqrt(2 layers), since so many of them add up (Radford et al.
    2019, section 2.3).
    """

    def __init__(
        self,
        config: Config,
        attention: Callable[..., nn.Module] | Sequence[Callable[..., nn.Module]] = Attention,
        feed_forward: Callable[..., nn.Module] | Sequence[Callable[..., nn.Module]] = SwiGLU,
        linear: Callable[..., nn.Module] = nn.Linear,
        rope: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    ):
        super().__init__()
        self.config = config
        self.rope = rope or partial(rotary, dim=config.head_dim, base=config.rope_base)
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(
            Block(config, make_attention(config, linear), make_feed_forward(config, linear))
            for make_attention, make_feed_forward in zip(
                _each_layer(attention, config), _each_layer(feed_forward, config), strict=True
            )
        )
        self.norm = nn.RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw all matrices anew; vectors, such as the norms' weights, keep their values."""
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                writes_to_stream = name.removesuffix(".weight").endswith((".out", ".down"))
                share = 2 * self.config.layers if writes_to_stream else 1
                weight.normal_(std=INITIAL_STD / math.sqrt(share))

    def new_cache(self, capacity: int = 0) -> list[KVCache]:
        """Return an empty cache for each layer, with memory for a number of tokens."""
        return [KVCache(capacity) for _ in self.blocks]

    def forward(
        self,
        tokens: Int[Tensor, "*B T"],
        positions: Int[Tensor, "*b T"] | None = None,
        cu_seqlens: Int[Tensor, "_"] | None = None,
        max_seqlen: int | None = None,
        cache: list[KVCache] | None = None,
    ) -> Float[Tensor, "*B T V"]:
        """Return logits for tokens (B, T), or (T): one sequence or several packed ones. The rest is as for `hidden`."""
        if tokens.device.type == "cpu" and tokens.numel():  # a GPU asserts by itself
            low, high = map(int, tokens.aminmax())
            size = self.config.vocab_size
            _require(0 <= low and high < size, f"{size} tokens, got {low} to {high}")
        x = self.embedding(tokens)
        return self.logits(self.hidden(x, positions, cu_seqlens, max_seqlen, cache))

    def hidden(
        self,
        x: Float[Tensor, "*B T D"],
        positions: Int[Tensor, "*b T"] | None = None,
        cu_seqlens: Int[Tensor, "_"] | None = None,
        max_seqlen: int | None = None,
        cache: list[KVCache] | None = None,
    ) -> Float[Tensor, "*B T D"]:
        """Return the stream after the last block, before the last norm.

        Args:
            x: Embeddings, (B, T, D), or (T, D) for one sequence or several packed ones.
            positions: (T) or (B, T). If not given, they count from 0 in each packed sequence, or from the cache's end.
            cu_seqlens: Packed sequences, each of which sees itself only: 0, then the running sum of the lengths, int32.
            max_seqlen: The longest packed sequence. If not given, it is read from the offsets, which a GPU waits for.
            cache: From `new_cache`: these tokens continue those that it holds, and are added to it. Under `no_grad`.

        Raises:
            ValueError: If shapes do not fit, or packed sequences come in a batch or with a cache.
            TypeError: If offsets are not int32.
        """
        _check(self.config, x, positions, cu_seqlens, max_seqlen, cache)
        tokens, past = x.shape[-2], cache[0].length if cache else 0
        if positions is None:
            positions = torch.arange(past, past + tokens, device=x.device)
            if cu_seqlens is not None:
                positions = positions - cu_seqlens[sequence_ids(cu_seqlens, tokens)]
        if cu_seqlens is not None and max_seqlen is None:
            max_seqlen = int(cu_seqlens.diff().max())
        at_least_single = torch.promote_types(x.dtype, torch.float32)
        cos, sin = (part.unsqueeze(-3).to(at_least_single) for part in self.rope(positions))
        layout = Layout(positions, cos, sin, past + tokens, cu_seqlens, max_seqlen)
        x_BTD = x if x.dim() == 3 else x[None]
        for i, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, layout, cache[i] if cache else None)
        return x_BTD.reshape(x.shape)

    def logits(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        """Return the head's reading of the normalized stream."""
        return self.head(self.norm(x))


def next_token_loss(
    logits: Float[Tensor, "*B T V"], targets: Int[Tensor, "*B T"]
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy in nats over all targets but those of -100, in single precision or better."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def sample(
    logits: Float[Tensor, "B V"],
    temperature: float = 0.0,
    top_k: int | None = None,
    generator: Generator | None = None,
) -> Int[Tensor, "B"]:
    """Draw a token from each row of logits: from softmax(logits / temperature), or the likeliest at temperature 0.

    `top_k` leaves only so many of the likeliest to draw from; the generator is on the logits' device.
    """
    size = logits.shape[-1]
    _require(0 <= temperature < math.inf, f"need a finite temperature >= 0, got {temperature}")
    _require(top_k is None or 1 <= top_k <= size, f"top_k must be 1 to {size}, got {top_k}")
    if temperature == 0:
        return logits.argmax(-1)
    values, tokens = logits.float().topk(top_k or size)
    choice = torch.multinomial((values / temperature).softmax(-1), 1, generator=generator)
    return tokens.gather(-1, choice)[:, 0]


@torch.no_grad()
def generate(
    model: Decoder,
    prompt: Int[Tensor, "B T"],
    n: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    stop: int | None = None,
    generator: Generator | None = None,
    embeddings: Float[Tensor, "B T D"] | None = None,
) -> Int[Tensor, "B _"]:
    """Continue prompts of equal length, with a cache; prompts of different lengths take several calls.

    Args:
        model: Put it in `eval` mode first where its parts care.
        prompt: One row each.
        n: Tokens to add.
        temperature, top_k, generator: As for `sample`.
        stop: A row that has drawn this token is filled up with it; when all have, generation ends.
        embeddings: What the model reads in place of the prompt's own embeddings.

    Returns:
        The prompts and at most n tokens after each.

    Raises:
        ValueError: If n is below 1, the prompt is empty, `stop` is no token, or as `sample` and `hidden`.
    """
    _require(n > 0, f"need n > 0, got {n}")
    size = model.config.vocab_size
    _require(stop is None or 0 <= stop < size, f"{size} tokens, got {stop} to stop at")
    cache = model.new_cache(prompt.shape[1] + n - 1)
    if embeddings is None:
        logits = model(prompt, cache=cache)
    else:
        got, need = tuple(embeddings.shape[:2]), tuple(prompt.shape)
        _require(got == need, f"need embeddings for a prompt of shape {need}, got {got}")
        logits = model.logits(model.hidden(embeddings, cache=cache))
    done = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
    drawn: list[Tensor] = []
    while True:
        token_B = sample(logits[:, -1], temperature, top_k, generator)
        if stop is not None:
            token_B = torch.where(done, stop, token_B)
            done = token_B == stop
        drawn.append(token_B)
        if len(drawn) == n or (stop is not None and done.all()):
            return torch.cat([prompt, torch.stack(drawn, 1)], 1)
        logits = model(token_B[:, None], cache=cache)


def count_parameters(model: Decoder) -> dict[str, int]:
    """Count a model's numbers: "embedding", "layers" (with the last norm), "head" (0 where it is the embedding).

    It need not be allocated: build it under `torch.device("meta")`.
    """
    total = sum(weight.numel() for weight in model.parameters())
    embedding = model.embedding.weight.numel()
    head = 0 if model.head.weight is model.embedding.weight else model.head.weight.numel()
    return {"embedding": embedding, "layers": total - embedding - head, "head": head}


def training_flops(model: Decoder, length: int) -> int:
    """Count the floating-point operations of one training step for each token, with plain parts.

    Each number of a matrix is one multiplication and one addition forward and twice that backward: 6. Scores and
    values of attention add 12 H K for each key, of which a token at every position is granted `length`, as is usual: a
    causal kernel that skips what is masked needs half of these.

    Source: Chowdhery et al., PaLM, 2022, appendix B.
    """
    config = model.config
    matrices = [weight for weight in model.blocks.parameters() if weight.dim() > 1]
    numbers = sum(weight.numel() for weight in [*matrices, model.head.weight])
    return 6 * numbers + 12 * config.layers * config.heads * config.head_dim * length


def _each_layer(part, config: Config) -> list[Callable[..., nn.Module]]:
    parts = [part] * config.layers if callable(part) else list(part)
    _require(len(parts) == config.layers, f"need {config.layers} parts, got {len(parts)}")
    return parts


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _check(config, x, positions, cu_seqlens, max_seqlen, cache) -> None:
    """Say what is wrong with a call of the model, before something further down says it less clearly."""
    shape, width = tuple(x.shape), config.width
    _require(
        len(shape) in (2, 3) and shape[-2] > 0 and shape[-1] == width,
        f"need embeddings (T, {width}) or (B, T, {width}) of one or more tokens, got {shape}",
    )
    batch, tokens = (1, *shape)[-3:-1]
    if positions is not None:
        got = tuple(positions.shape)
        fits = got in ((tokens,), (batch, tokens))
        _require(fits, f"positions must be ({tokens}) or ({batch}, {tokens}), got {got}")
    if cache is not None:
        kept = [layer.length for layer in cache]
        fits = len(kept) == config.layers and len(set(kept)) == 1
        _require(fits, f"need {config.layers} caches of as many tokens each, got {kept}")
    if cu_seqlens is None:
        return _require(max_seqlen is None, "max_seqlen belongs to cu_seqlens, which is missing")
    _require(batch == 1, f"packed sequences come in one row, got {batch}")
    _require(cache is None, "packed sequences cannot continue a cache")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must be int32, got {cu_seqlens.dtype}")
    got = tuple(cu_seqlens.shape)
    _require(len(got) == 1 and got[0] > 1, f"cu_seqlens must be two or more offsets, got {got}")
    fits = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens) & (cu_seqlens.diff() >= 0).all()
    if max_seqlen is not None:
        fits = fits & (cu_seqlens.diff() <= max_seqlen).all()
    if cu_seqlens.is_cuda:
        return torch._assert_async(fits)  # to look at the values here would make the CPU wait
    got = f"{cu_seqlens.tolist()} and {max_seqlen}"
    rule = f"run from 0 to {tokens}, never fall, and lie at most max_seqlen apart"
    _require(bool(fits), f"cu_seqlens must {rule}, got {got}")
