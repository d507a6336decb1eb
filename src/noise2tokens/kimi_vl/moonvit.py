"""MoonViT: a vision transformer for pictures of any size, packed end to end.

N pictures   T patches of all of them   R x C grid of one, rows and columns   D width   H heads   K head dimension
M merged patches, R C / merge²   P numbers in a patch, channels · patch²
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor, nn
from torch.nn import functional as F

from noise2tokens.flash_attention import flash_attention_varlen, kernel_runs_on
from noise2tokens.sequence_packing.layout import offsets
from noise2tokens.transformer import INITIAL_STD, rotate

Grid = tuple[int, int]  # rows and columns of patches


@dataclass(frozen=True)
class VisionConfig:
    """The sizes of the encoder; ValueError if they do not fit together. Defaults are those of Kimi-VL-A3B."""

    width: int = 1152
    layers: int = 27
    heads: int = 16
    hidden: int = 4304  # of the feed-forward network
    patch: int = 14  # pixels a side
    table: int = 64  # learned positions a side
    merge: int = 2  # patches a side that become one token
    channels: int = 3
    rope_base: float | int = 10_000
    norm_eps: float | int = 1e-5

    def __post_init__(self):
        for name in ("width", "layers", "heads", "hidden", "patch", "table", "merge", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"need {name} >= 1, got {getattr(self, name)}")
        if self.width % (4 * self.heads):
            got = f"{self.width} and {self.heads}"
            raise ValueError(f"width / heads must be a multiple of 4, got {got}")
        if not self.rope_base > 0 or not self.norm_eps >= 0:
            raise ValueError(f"need rope_base > 0 and norm_eps >= 0 in {self}")

    @property
    def head_dim(self) -> int:
        """K."""
        return self.width // self.heads


# Source: config.json of moonshotai/Kimi-VL-A3B-Instruct, vision_config.
MOONVIT = VisionConfig()


def check_grids(grids: Sequence[Grid], merge: int, patches: int) -> None:
    """Raise ValueError if grids do not describe so many patches, or the merge does not divide their sides."""
    if not grids:
        raise ValueError("need at least one picture")
    for rows, columns in grids:
        if rows < 1 or columns < 1 or rows % merge or columns % merge:
            got = f"{rows} x {columns}"
            raise ValueError(f"need rows and columns of patches in multiples of {merge}, got {got}")
    described = sum(rows * columns for rows, columns in grids)
    if described != patches:
        raise ValueError(f"the grids {list(grids)} hold {described} patches, got {patches}")


def positions_in(grids: Sequence[Grid], device: torch.device | None = None) -> Int[Tensor, "T 2"]:
    """Return row and column of each patch in its own picture; pictures lie row by row, one after the other."""
    parts = []
    for rows, columns in grids:
        row = torch.arange(rows, device=device).repeat_interleave(columns)
        column = torch.arange(columns, device=device).repeat(rows)
        parts.append(torch.stack([row, column], 1))
    return torch.cat(parts)


def cubic(x: Float[Tensor, "*shape"], a: float = -0.75) -> Float[Tensor, "*shape"]:
    """Return the weight that bicubic interpolation gives a point at distance x: 1 at 0, 0 from 2 on, smooth between.

    Source: Keys, Cubic convolution interpolation for digital image processing, 1981, equation 8; PyTorch's a is -0.75.
    """
    x = x.abs()
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def bicubic_matrix(old: int, new: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the weights of old points in each new one: `bicubic_matrix(n, r) @ table @ bicubic_matrix(n, c).T`.

    New point i lies at (i + 1/2) old / new - 1/2 among the old ones, and reads the four around it; beyond an end the
    last point stands for the missing ones. This is `F.interpolate` in mode "bicubic", written as a matrix.

    Returns:
        (new, old); each row sums to 1.

    Raises:
        ValueError: If there is no old or no new point.
    """
    if old < 1 or new < 1:
        raise ValueError(f"need one point or more, got {old} and {new}")
    place = (torch.arange(new, dtype=dtype) + 0.5) * old / new - 0.5
    around = place.floor()[:, None] + torch.arange(-1, 3)
    weights = cubic(place[:, None] - around)
    matrix = torch.zeros(new, old, dtype=dtype)
    return matrix.scatter_add_(1, around.long().clamp(0, old - 1), weights)


def interpolate_table(
    table: Float[Tensor, "rows columns D"], grid: Grid
) -> Float[Tensor, "patches D"]:
    """Stretch or shrink a table of learned positions to a grid, row by row: one vector for each patch.

    Source: Kimi-VL technical report, 2025, section 2.1; released code, `Learnable2DInterpPosEmb`.
    """
    channels_first = table.permute(2, 0, 1)[None]
    return F.interpolate(channels_first, size=grid, mode="bicubic")[0].flatten(1).T


def rotary_2d(
    positions_T2: Int[Tensor, "T 2"], dim: int, base: float | int = 10_000
) -> tuple[Float[Tensor, "T half"], Float[Tensor, "T half"]]:
    """Return cosine and sine for `rotate`: even pairs turn with the column, odd ones with the row.

    Pairs 2i and 2i + 1 turn by base^(-4i/dim) for each column and each row: every frequency is there for both. So the
    score of two patches depends on how many rows and how many columns lie between them.

    Args:
        positions_T2: Row and column of each patch.
        dim: Of a head, a multiple of 4.
        base: Of the angles.

    Returns:
        In float64, as the ground floor's `rotary`.

    Raises:
        ValueError: If `dim` is no multiple of 4.

    Source: Kimi-VL technical report, 2025, section 2.1; released code, `Rope2DPosEmb`.
    """
    if dim < 4 or dim % 4:
        raise ValueError(f"need a multiple of 4 as dim, got {dim}")
    i = torch.arange(dim // 4, dtype=torch.float64, device=positions_T2.device)
    angles_TF2 = positions_T2.flip(1)[:, None] * (base ** (-4 * i / dim))[:, None]
    angles_TX = angles_TF2.flatten(1)
    return angles_TX.cos(), angles_TX.sin()


def attend_pictures(
    q_HTK: Float[Tensor, "H T K"],
    k_HTK: Float[Tensor, "H T K"],
    v_HTK: Float[Tensor, "H T K"],
    cu_seqlens: Int32[Tensor, "_"],
    max_seqlen: int,
) -> Float[Tensor, "H T K"]:
    """Let all patches of a picture see one another, and none of another picture.

    On a GPU by the kernel of chapter 8, elsewhere by PyTorch's attention on one picture after another.
    """
    if kernel_runs_on(q_HTK.device):
        rows = (x.transpose(0, 1) for x in (q_HTK, k_HTK, v_HTK))
        out = flash_attention_varlen(*rows, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        return out.transpose(0, 1)
    sizes = cu_seqlens.diff().tolist()
    parts = zip(*(x[None].split(sizes, 2) for x in (q_HTK, k_HTK, v_HTK)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part) for part in parts], 2)[0]


def space_to_depth(x_RCD: Float[Tensor, "R C D"], factor: int) -> Float[Tensor, "M parts D"]:
    """Put neighbours of a block of factor x factor side by side: one row for each block, its patches in order (dy, dx).

    Flattened, the channel that moves fastest is the patch's own: (dy, dx, c). PyTorch's `pixel_unshuffle` has
    (c, dy, dx), and a projector trained on the one reads noise from the other.

    Raises:
        ValueError: If the factor does not divide rows and columns.

    Source: Kimi-VL technical report, 2025, section 2.1, "pixel shuffle"; released code, `patch_merger`.
    """
    rows, columns, _ = x_RCD.shape
    if factor < 1 or rows % factor or columns % factor:
        raise ValueError(f"need rows and columns in multiples of {factor}, got {rows} x {columns}")
    blocks = x_RCD.unflatten(1, (-1, factor)).unflatten(0, (-1, factor)).transpose(1, 2)
    return blocks.flatten(2, 3).flatten(0, 1)


def merge(
    x_TD: Float[Tensor, "T D"], grids: Sequence[Grid], factor: int
) -> Float[Tensor, "M parts D"]:
    """Apply `space_to_depth` to each of the packed pictures."""
    pictures = x_TD.split([rows * columns for rows, columns in grids])
    pairs = zip(pictures, grids, strict=True)
    return torch.cat([space_to_depth(x.unflatten(0, grid), factor) for x, grid in pairs])


def draw_weights(layer: nn.Linear, scale: float | int = 1) -> None:
    """Draw a matrix anew, so that outputs are `scale` times as large as inputs; set the bias to 0."""
    nn.init.normal_(layer.weight, std=scale / math.sqrt(layer.in_features))
    nn.init.zeros_(layer.bias)


class VisionAttention(nn.Module):
    """Attention within each picture; biases everywhere. One matrix makes queries, keys and values."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(
        self,
        x_TD: Float[Tensor, "T D"],
        turns: tuple[Tensor, Tensor],
        cu_seqlens: Int32[Tensor, "_"],
        max_seqlen: int,
    ) -> Float[Tensor, "T D"]:
        """Return what patches read from their picture; `turns` are cosine and sine of their positions."""
        q, k, v = self.qkv(x_TD).unflatten(1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        q, k = rotate(q, *turns), rotate(k, *turns)
        return self.out(attend_pictures(q, k, v, cu_seqlens, max_seqlen).transpose(0, 1).flatten(1))


class VisionBlock(nn.Module):
    """Attention, then a network of two layers with a GELU; each reads a normalized copy and adds to the stream."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.attention = VisionAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.up = nn.Linear(config.width, config.hidden)
        self.down = nn.Linear(config.hidden, config.width)

    def forward(self, x_TD: Float[Tensor, "T D"], *layout) -> Float[Tensor, "T D"]:
        """Return the stream after this block; `layout` as for `VisionAttention`."""
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), *layout)
        inner = F.gelu(self.up(self.feed_forward_norm(x_TD)), approximate="tanh")
        return x_TD + self.down(inner)


class MoonViT(nn.Module):
    """The encoder: patches of pictures of any size in, one row for each block of merged patches out.

    Matrices start from N(0, 1 / inputs), those that write to the stream divided by sqrt(2 layers); the table from
    N(0, 0.02²). The released encoder started from SigLIP-SO-400M.

    Source: Kimi-VL technical report, 2025, section 2.1.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Linear(config.channels * config.patch**2, config.width)
        self.table = nn.Parameter(torch.empty(config.table, config.table, config.width))
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        nn.init.normal_(self.table, std=INITIAL_STD)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                writes = name.endswith((".out", ".down"))
                draw_weights(module, 1 / math.sqrt(2 * config.layers) if writes else 1)

    def forward(
        self, patches: Float[Tensor, "T P"], grids: Sequence[Grid]
    ) -> Float[Tensor, "M parts D"]:
        """Encode packed pictures.

        Args:
            patches: Of all pictures, one after the other, each row by row; numbers in the order (channel, y, x). They
                are brought to the type of the weights.
            grids: Rows and columns of each picture.

        Raises:
            ValueError: If patches and grids do not fit together, or sides are no multiples of the merge.
        """
        return merge(self.encode(patches, grids), grids, self.config.merge)

    def encode(self, patches: Float[Tensor, "T P"], grids: Sequence[Grid]) -> Float[Tensor, "T D"]:
        """Return a vector for each patch, before the merge."""
        config = self.config
        check_grids(grids, config.merge, len(patches))
        if patches.shape[1] != self.embedding.in_features:
            got = f"{self.embedding.in_features} numbers in a patch, got {patches.shape[1]}"
            raise ValueError(f"need {got}")
        patches = patches.to(self.embedding.weight.dtype)
        x_TD = self.embedding(patches) + self.learned_positions(grids)
        at_least_single = torch.promote_types(x_TD.dtype, torch.float32)
        turns = rotary_2d(positions_in(grids, x_TD.device), config.head_dim, config.rope_base)
        turns = tuple(part.to(at_least_single) for part in turns)
        sizes = [rows * columns for rows, columns in grids]
        cu_seqlens = offsets(sizes).to(x_TD.device)
        for block in self.blocks:
            x_TD = block(x_TD, turns, cu_seqlens, max(sizes))
        return self.norm(x_TD)

    def learned_positions(self, grids: Sequence[Grid]) -> Float[Tensor, "T D"]:
        """Return the table, interpolated to each picture's grid; once for grids that are the same."""
        made = {grid: interpolate_table(self.table, grid) for grid in dict.fromkeys(grids)}
        return torch.cat([made[grid] for grid in grids])


def vision_parameters(config: VisionConfig) -> dict[str, int]:
    """Count the encoder's parameters by component, in closed form; biases and norms included."""
    width, hidden = config.width, config.hidden
    return {
        "patch embedding": (config.channels * config.patch**2 + 1) * width,
        "table": config.table**2 * width,
        "attention": config.layers * (4 * width**2 + 4 * width),
        "feed-forward": config.layers * (2 * width * hidden + width + hidden),
        "norms": (4 * config.layers + 2) * width,
    }
