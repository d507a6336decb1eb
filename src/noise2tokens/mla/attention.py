"""Multi-head latent attention: a drop-in attention for the ground floor's decoder.

    latent_decoder(config, sizes)             Decoder with latent attention in all layers
    LatentAttention(config, linear, sizes)    one layer; called with (x_BTD, layout, cache)

Names of tensors end in their axes, as in `transformer`, and

    N coordinates of a head without position   R rotary ones   V values of a head   C latent   L = C + R, as cached
"""

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from noise2tokens.mla.rope import mscale, to_halves, to_interleaved, yarn
from noise2tokens.transformer import Config, Decoder, KVCache, Layout, attend, rotary, rotate


@dataclass(frozen=True)
class Sizes:
    """The dimensions of latent attention; ValueError if one is not positive, or rope_dim odd."""

    kv_rank: int  # C: of the latent that keys and values are made from (the papers' d_c)
    nope_dim: int  # N: of a head's query and key, without position (d_h)
    rope_dim: int  # R: of a head's rotary query, and of the rotary key that all heads share (d_h^R)
    value_dim: int  # V: of a head's value
    query_rank: int | None = None  # of the queries' latent (d_c'); no such latent if not given

    def __post_init__(self):
        if min(size for size in astuple(self) if size is not None) < 1 or self.rope_dim % 2:
            raise ValueError(f"need positive sizes and an even rope_dim, got {self}")


V3 = Sizes(kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128, query_rank=1536)


def operations(sizes: Sizes, heads: int, queries: int, keys: int, absorbed: bool) -> int:
    """Count floating-point operations between the projections that both forms share.

    Expanded: keys and values from all latents, then scores and sums over N + R and V. Absorbed: queries and sums
    through the same matrices, then scores and sums over C + R and C. A mask saves nothing here, and columns of
    sums that the layer drops are not counted.

    Args:
        sizes: Dimensions.
        heads: Number of heads.
        queries: Tokens of this step.
        keys: Tokens that are attended to.
        absorbed: Which form.
    """
    through = sizes.kv_rank * (sizes.nope_dim + sizes.value_dim)
    if absorbed:
        return 2 * heads * queries * (through + keys * (2 * sizes.kv_rank + sizes.rope_dim))
    pair = sizes.nope_dim + sizes.rope_dim + sizes.value_dim
    return 2 * heads * keys * (through + queries * pair)


class LatentAttention(nn.Module):
    """Causal attention whose keys and values are linear maps of one latent a token.

    Args:
        config: Width, heads and norm_eps; head_dim and kv_heads are not used.
        linear: Called with (inputs, outputs, bias=False).
        sizes: Dimensions.
        core: Attention on expanded queries, keys and values, called as `attend`; values narrower than keys are padded.
        absorbed: Which form to compute; the one with fewer operations if not given.
        score_factor: Multiplies all scores beside 1 / sqrt(N + R): mscale squared, under YaRN.

    Source: DeepSeek-V2, 2024, section 2.1 and appendix C; the norms of the latents, section 3.1.2.
    """

    def __init__(
        self,
        config: Config,
        linear: Callable[..., nn.Module] = nn.Linear,
        *,
        sizes: Sizes,
        core: Callable[..., Tensor] = attend,
        absorbed: bool | None = None,
        score_factor: float | int = 1,
    ):
        super().__init__()
        self.heads, self.sizes, self.core = config.heads, sizes, core
        self.absorbed, self.score_factor = absorbed, score_factor
        query_inputs = config.width
        if sizes.query_rank is not None:
            self.query_down = linear(config.width, sizes.query_rank, bias=False)
            self.query_norm = nn.RMSNorm(sizes.query_rank, config.norm_eps)
            query_inputs = sizes.query_rank
        self.query = linear(
            query_inputs, self.heads * (sizes.nope_dim + sizes.rope_dim), bias=False
        )
        self.kv_down = linear(config.width, sizes.kv_rank + sizes.rope_dim, bias=False)
        self.kv_norm = nn.RMSNorm(sizes.kv_rank, config.norm_eps)
        self.kv_up = linear(
            sizes.kv_rank, self.heads * (sizes.nope_dim + sizes.value_dim), bias=False
        )
        self.out = linear(self.heads * sizes.value_dim, config.width, bias=False)

    def forward(
        self, x_BTD: Float[Tensor, "B T D"], layout: Layout, cache: KVCache | None = None
    ) -> Float[Tensor, "B T D"]:
        """Return what the tokens read from one another; the cache holds a latent and a rotary key for each token."""
        q_BHTN, q_BHTR = self.queries(x_BTD, layout)
        latents_B1SL = self.latents(x_BTD, layout)
        if cache is not None:
            (latents_B1SL,) = cache.append(latents_B1SL)
        absorbed = self.absorbed
        if absorbed is None:
            count = partial(operations, self.sizes, self.heads, x_BTD.shape[1], layout.keys)
            absorbed = count(True) < count(False)
        form = self.attend_absorbed if absorbed else self.attend_expanded
        o_BHTV = form(q_BHTN, q_BHTR, latents_B1SL, layout)
        return self.out(o_BHTV.transpose(1, 2).flatten(2))

    def queries(self, x_BTD: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Make the two parts of all queries, times the score factor (DeepSeek-V2, equations 37 to 40)."""
        if self.sizes.query_rank is not None:
            x_BTD = self.query_norm(self.query_down(x_BTD))
        q_BHTK = self.query(x_BTD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q_BHTK = q_BHTK * self.score_factor
        q_BHTN, q_BHTR = q_BHTK.split([self.sizes.nope_dim, self.sizes.rope_dim], -1)
        return q_BHTN, rotate(q_BHTR, layout.cos, layout.sin)

    def latents(self, x_BTD: Tensor, layout: Layout) -> Float[Tensor, "B 1 T L"]:
        """Make what the cache holds: the normalized latent, then the rotary key (equations 41 and 43)."""
        c_BTC, k_BTR = self.kv_down(x_BTD).split([self.sizes.kv_rank, self.sizes.rope_dim], -1)
        k_B1TR = rotate(k_BTR.unsqueeze(1), layout.cos, layout.sin)
        return torch.cat([self.kv_norm(c_BTC).unsqueeze(1), k_B1TR], -1)

    def attend_expanded(
        self, q_BHTN: Tensor, q_BHTR: Tensor, latents_B1SL: Tensor, layout: Layout
    ) -> Float[Tensor, "B H T V"]:
        """Make keys and values of all heads from the latents, then attend as always (equations 42 and 44 to 46).

        Values are padded to the width of keys, and the sums of zeros are dropped, for the reason in `attend_absorbed`.
        """
        c_B1SC, k_B1SR = latents_B1SL.split([self.sizes.kv_rank, self.sizes.rope_dim], -1)
        kv_BHSK = self.kv_up(c_B1SC[:, 0]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_BHSN, v_BHSV = kv_BHSK.split([self.sizes.nope_dim, self.sizes.value_dim], -1)
        k_BHSR = k_B1SR.expand(-1, self.heads, -1, -1)
        q, k = torch.cat([q_BHTN, q_BHTR], -1), torch.cat([k_BHSN, k_BHSR], -1)
        narrower = max(0, k.shape[-1] - self.sizes.value_dim)
        o_BHTK = self.core(q, k, F.pad(v_BHSV, (0, narrower)), layout)
        return o_BHTK[..., : self.sizes.value_dim]

    def attend_absorbed(
        self, q_BHTN: Tensor, q_BHTR: Tensor, latents_B1SL: Tensor, layout: Layout
    ) -> Float[Tensor, "B H T V"]:
        """Bring queries to the latents and sums of latents back to values: no key or value is ever made.

        All heads read one key, [c, k_R], and one value, c. So they are rows of one attention with one head. It gets
        the whole key as value too, and the sums of k_R are dropped: PyTorch's fused kernel on a CPU wants one width.

        Source: DeepSeek-V2, 2024, appendix C, the paragraph below equation 47.
        """
        up_HKC = self.kv_up.weight.unflatten(0, (self.heads, -1))
        up_HNC, up_HVC = up_HKC.split([self.sizes.nope_dim, self.sizes.value_dim], 1)
        q_BHTL = torch.cat([q_BHTN @ up_HNC, q_BHTR], -1)
        tokens = q_BHTL.shape[2]
        scale = (self.sizes.nope_dim + self.sizes.rope_dim) ** -0.5
        mask = None if tokens == 1 else layout.mask.repeat(self.heads, 1)
        q_B1XL = q_BHTL.flatten(1, 2).unsqueeze(1)
        o_B1XL = F.scaled_dot_product_attention(
            q_B1XL, latents_B1SL, latents_B1SL, attn_mask=mask, scale=scale
        )
        o_BHTC = o_B1XL[:, 0, :, : self.sizes.kv_rank].unflatten(1, (self.heads, tokens))
        return o_BHTC @ up_HVC.transpose(1, 2)


def latent_decoder(
    config: Config,
    sizes: Sizes,
    *,
    factor: float | int = 1,
    trained_length: int = 4096,
    fast: float | int = 32,
    slow: float | int = 1,
    **parts,
) -> Decoder:
    """Make a decoder with latent attention in all layers.

    Args:
        config: Sizes of the rest.
        sizes: Of the attention.
        factor: By how much YaRN stretches the context; 1 for plain rotary positions.
        trained_length, fast, slow: As for `yarn`.
        parts: `feed_forward` and `linear`, as for `Decoder`.
    """
    rope = partial(rotary, dim=sizes.rope_dim, base=config.rope_base)
    if factor != 1:
        settings = dict(factor=factor, trained_length=trained_length, fast=fast, slow=slow)
        rope = partial(yarn, dim=sizes.rope_dim, base=config.rope_base, **settings)
    attention = partial(LatentAttention, sizes=sizes, score_factor=mscale(factor) ** 2)
    return Decoder(config, attention=attention, rope=rope, **parts)


NAMES = {
    "q_proj": "query",
    "q_a_proj": "query_down",
    "q_a_layernorm": "query_norm",
    "q_b_proj": "query",
    "kv_a_proj_with_mqa": "kv_down",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "kv_up",
    "o_proj": "out",
}


def from_transformers(
    state: Mapping[str, Tensor], sizes: Sizes, interleaved: bool = True
) -> dict[str, Tensor]:
    """Convert the weights of one DeepseekV3Attention to ours.

    Args:
        state: Its state dict.
        sizes: Dimensions.
        interleaved: Whether its rotary coordinates are stored as pairs, as in DeepSeek's checkpoints
            (`rope_interleave`); ours are stored as halves.

    Raises:
        ValueError: If names are not those of such an attention without biases.
    """
    names = {theirs: ours for theirs, ours in NAMES.items() if theirs in _theirs(sizes)}
    ours = _renamed(state, names)
    return _reordered(ours, sizes, to_halves) if interleaved else ours


def to_transformers(
    state: Mapping[str, Tensor], sizes: Sizes, interleaved: bool = True
) -> dict[str, Tensor]:
    """Undo `from_transformers`."""
    if interleaved:
        state = _reordered(dict(state), sizes, to_interleaved)
    return _renamed(state, {NAMES[theirs]: theirs for theirs in _theirs(sizes)})


def _theirs(sizes: Sizes) -> set[str]:
    return set(NAMES) - (
        {"q_a_proj", "q_a_layernorm", "q_b_proj"} if sizes.query_rank is None else {"q_proj"}
    )


def _renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    need = {f"{name}.weight" for name in names}
    if set(state) != need:
        raise ValueError(f"need the weights {sorted(need)}, got {sorted(state)}")
    return {f"{names[name.removesuffix('.weight')]}.weight": w for name, w in state.items()}


def _reordered(
    state: dict[str, Tensor], sizes: Sizes, order: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Reorder the rows of the matrices that make rotary coordinates."""

    def rows(
        weight: Tensor, plain: int
    ) -> Tensor:  # of each of the blocks of plain + rope_dim rows
        blocks = weight.unflatten(0, (-1, plain + sizes.rope_dim)).transpose(1, 2)
        parts = blocks[..., :plain], order(blocks[..., plain:])
        return torch.cat(parts, -1).transpose(1, 2).flatten(0, 1)

    for name, plain in (("query.weight", sizes.nope_dim), ("kv_down.weight", sizes.kv_rank)):
        if name not in state:
            raise ValueError(f"need the weight {name}, got {sorted(state)}")
        state[name] = rows(state[name], plain)
    return state
