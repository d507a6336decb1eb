"""From a vector to one of C, and a gradient through the choice.

Names of tensors end in their axes: N vectors, d their dimension, C codes. A quantizer is called with vectors along the
last axis of a tensor of any shape, and returns `Quantized`. `VectorQuantizer` learns its codes by gradient or follows
the data with a moving average; `FSQ` has no codes to learn.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Int64
from sklearn.cluster import KMeans
from torch import Generator, Tensor, nn
from torch.nn import functional as F

# Added to counts, so that a code that nothing uses keeps a place (van den Oord's code; vector-quantize-pytorch).
SMOOTHING = 1e-5
# How slowly the use of codes is forgotten where the codes are learned by gradient.
USE_DECAY = 0.99


class Quantized(NamedTuple):
    """What a quantizer returns.

    Attributes:
        values: The chosen codes in the place of the vectors; gradients pass to the vectors.
        indices: Which codes, 0 to C - 1.
        loss: What is to be added to the loss of the reconstruction.
    """

    values: Float[Tensor, "*B d"]
    indices: Int64[Tensor, "*B"]
    loss: Float[Tensor, ""]


def nearest(z: Float[Tensor, "*B d"], codebook_Cd: Float[Tensor, "C d"]) -> Int64[Tensor, "*B"]:
    """Return the index of the nearest code, in Euclidean distance.

    ‖z - e‖² = ‖z‖² - 2 z·e + ‖e‖², and ‖z‖² is the same for all codes. Computed in single precision or better, under
    autocast too. Codes whose squared distances differ by less than the rounding error of ‖e‖² are not told apart.
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    with torch.autocast(z.device.type, enabled=False):
        z_Nd, e_Cd = z.reshape(-1, z.shape[-1]).to(dtype), codebook_Cd.to(dtype)
        distance_NC = torch.addmm(e_Cd.square().sum(1), z_Nd, e_Cd.T, alpha=-2)
    return distance_NC.argmin(1).view(z.shape[:-1])


def k_means(vectors_Nd: Float[Tensor, "N d"], codes: int, seed: int) -> Float[Tensor, "{codes} d"]:
    """Return the means that k-means finds, on the vectors' device.

    Raises:
        ValueError: If there are fewer vectors than codes, or one is not finite.
    """
    if len(vectors_Nd) < codes or not vectors_Nd.isfinite().all():
        raise ValueError(f"need {codes} finite vectors or more, got {tuple(vectors_Nd.shape)}")
    fitted = KMeans(codes, n_init=1, random_state=seed).fit(vectors_Nd.float().cpu().numpy())
    return torch.from_numpy(fitted.cluster_centers_).to(vectors_Nd)


def straight_through(
    z: Float[Tensor, "*B d"], values: Float[Tensor, "*B d"]
) -> Float[Tensor, "*B d"]:
    """Return the values forward (up to rounding), and hand the gradient to z as if nothing had happened.

    Source: Bengio et al. 2013, section 3; van den Oord et al. 2017, section 3.2.
    """
    return z + (values - z).detach()


def rotate_through(
    z: Float[Tensor, "*B d"], values: Float[Tensor, "*B d"]
) -> Float[Tensor, "*B d"]:
    """Return the values forward, and turn and scale the gradient as one turns and scales z to reach them.

    The map z ↦ λ R z with the rotation R from z's direction to the value's, both held fixed, has the value at z.

    Source: Fifty et al. 2024, section 4.2.
    """
    from_, to = F.normalize(z, dim=-1).detach(), F.normalize(values, dim=-1).detach()
    half_way = F.normalize(from_ + to, dim=-1)
    turned = z - 2 * (z * half_way).sum(-1, keepdim=True) * half_way
    turned = turned + 2 * (z * from_).sum(-1, keepdim=True) * to
    scale = values.norm(dim=-1, keepdim=True) / z.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    turned = scale.detach() * turned
    return turned + (values - turned).detach()


def perplexity(indices: Int[Tensor, "*B"], codes: int) -> Float[Tensor, ""]:
    """Return the exponential of the entropy of the codes' shares: how many codes are used, if all were used equally.

    Raises:
        ValueError: If there is no index.
    """
    if indices.numel() == 0:
        raise ValueError("the perplexity of no index is not defined")
    shares = torch.bincount(indices.flatten(), minlength=codes) / indices.numel()
    return torch.special.entr(shares).sum().exp()


class VectorQuantizer(nn.Module):
    """C code vectors; the nearest one replaces a vector.

    The loss is β ‖z - sg[e]‖², which keeps vectors near their codes, and, where the codes are learned by gradient,
    ‖sg[z] - e‖². Both are means over vectors and dimensions; the paper writes sums over dimensions.

    Args:
        codes: C.
        dim: d.
        decay: Codes are moving averages of the vectors that chose them, with this decay, once `move` is called after
            every step; None: codes are parameters, and the loss moves them.
        beta: Weight β of the commitment.
        revive_below: A code that is chosen less often than this, in a batch and on a moving average, is put in the
            place of a random vector of the last batch when `move` is called; 0 revives none.
        estimator: How the gradient gets past the choice: `straight_through` or `rotate_through`.

    Raises:
        ValueError: If a number is out of range.

    Source: van den Oord et al. 2017, equations 1 to 3 and appendix A.1; Razavi et al. 2019, section 2.1.
    """

    def __init__(
        self,
        codes: int,
        dim: int,
        *,
        decay: float | int | None = 0.99,
        beta: float | int = 0.25,
        revive_below: float | int = 0.0,
        estimator: Callable[[Tensor, Tensor], Tensor] = straight_through,
    ):
        super().__init__()
        if codes < 1 or dim < 1:
            raise ValueError(f"need at least one code and one dimension, got {codes} and {dim}")
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        if beta < 0 or revive_below < 0:
            raise ValueError(f"need beta and revive_below >= 0, got {beta} and {revive_below}")
        self.codes, self.dim, self.decay, self.beta = codes, dim, decay, beta
        self.revive_below, self.estimator = revive_below, estimator
        codebook_Cd = torch.randn(codes, dim)
        if decay is None:
            self.codebook = nn.Parameter(codebook_Cd)
        else:
            self.register_buffer("codebook", codebook_Cd)
            self.register_buffer("sums_Cd", codebook_Cd.clone())
        self.register_buffer("counts_C", torch.ones(codes))
        self._chosen: tuple[Tensor, Tensor] | None = None

    def forward(self, z: Float[Tensor, "*B d"]) -> Quantized:
        """Quantize vectors; in `train` mode remember them for `move`.

        Raises:
            ValueError: If the vectors are not of the codes' dimension.
        """
        if z.shape[-1] != self.dim:
            raise ValueError(f"need vectors of {self.dim} dimensions, got {tuple(z.shape)}")
        indices = nearest(z, self.codebook)
        values = self.codebook[indices].to(z.dtype)
        loss = self.beta * F.mse_loss(z, values.detach())
        if self.decay is None:
            loss = loss + F.mse_loss(values, z.detach())
        if self.training:
            self._chosen = z.detach().reshape(-1, self.dim), indices.flatten()
        return Quantized(self.estimator(z, values.detach()), indices, loss)

    def look_up(self, indices: Int[Tensor, "*B"]) -> Float[Tensor, "*B d"]:
        """Return the codes of indices.

        Raises:
            ValueError: If an index is none. Not checked on a GPU, which asserts by itself.
        """
        check_indices(indices, self.codes)
        return self.codebook[indices]

    @torch.no_grad()
    def start(self, z: Float[Tensor, "*B d"], seed: int, batch: int) -> None:
        """Put the codes where k-means puts them for these vectors, with the weight of one batch.

        Args:
            z: Vectors, at least as many as codes; some thousands are enough.
            seed: Of the k-means.
            batch: How many vectors a batch will have. Counts that add up to more would outvote the batches for
                log(total / batch) / log(1 / decay) steps, and no code would be seen to die.

        Raises:
            ValueError: If there are fewer vectors than codes, one is not finite, or a batch has none.
        """
        if batch < 1:
            raise ValueError(f"a batch has at least one vector, got {batch}")
        z_Nd = z.reshape(-1, self.dim)
        self.codebook.copy_(k_means(z_Nd, self.codes, seed))
        counts_C = nearest(z_Nd, self.codebook).bincount(minlength=self.codes)
        self.counts_C.copy_(counts_C * (batch / len(z_Nd)))
        if self.decay is not None:
            self.sums_Cd.copy_(self.codebook * self.counts_C[:, None])

    @torch.no_grad()
    def move(self, generator: Generator | None = None) -> None:
        """After a step: average the batch into the codes (with a decay), and revive codes that died.

        Args:
            generator: Draws the vectors that dead codes are put at; PyTorch's own where left out.

        Raises:
            RuntimeError: If no batch was quantized in `train` mode since the last call.
        """
        if self._chosen is None:
            raise RuntimeError("nothing to move to: quantize a batch in train mode first")
        (z_Nd, indices_N), self._chosen = self._chosen, None
        z_Nd = z_Nd.to(self.codebook.dtype)
        counts_C = torch.zeros_like(self.counts_C).index_add_(
            0, indices_N, torch.ones_like(z_Nd[:, 0])
        )
        decay = USE_DECAY if self.decay is None else self.decay
        self.counts_C.lerp_(counts_C, 1 - decay)
        if self.decay is not None:
            sums_Cd = torch.zeros_like(self.sums_Cd).index_add_(0, indices_N, z_Nd)
            self.sums_Cd.lerp_(sums_Cd, 1 - decay)
            self.codebook.copy_(self.sums_Cd / smoothed(self.counts_C)[:, None])
        if self.revive_below > 0:
            self._revive(z_Nd, generator)

    def _revive(self, z_Nd: Tensor, generator: Generator | None) -> None:
        dead_C = self.counts_C < self.revive_below
        rows = torch.randint(len(z_Nd), (self.codes,), generator=generator, device=z_Nd.device)
        self.codebook.copy_(torch.where(dead_C[:, None], z_Nd[rows], self.codebook))
        self.counts_C.masked_fill_(dead_C, self.revive_below)
        if self.decay is not None:
            born_Cd = self.codebook * self.revive_below
            self.sums_Cd.copy_(torch.where(dead_C[:, None], born_Cd, self.sums_Cd))


def smoothed(counts_C: Float[Tensor, "C"]) -> Float[Tensor, "C"]:
    """Return counts with a little added to each and the sum kept, so that none is zero."""
    total = counts_C.sum()
    return (counts_C + SMOOTHING) * total / (total + len(counts_C) * SMOOTHING)


class FSQ(nn.Module):
    """Finite scalar quantization: bound each of a few coordinates and round it. There is no codebook to learn.

    Coordinate i takes `levels[i]` values, evenly spaced, in [-1, 1]; the index counts them with the first fastest.

    Args:
        levels: Number of values of each coordinate, at least 3; their product is the number of codes.

    Raises:
        ValueError: If there is no coordinate, or one with fewer than three values.

    Source: Mentzer et al. 2024, section 3.1 and appendix A.1.
    """

    def __init__(self, levels: Sequence[int]):
        super().__init__()
        if not levels or min(levels) < 3:
            raise ValueError(f"need three values or more for each coordinate, got {levels}")
        levels_d = torch.tensor(levels)
        self.dim, self.codes = len(levels), int(levels_d.prod())
        self.register_buffer("levels_d", levels_d, persistent=False)
        self.register_buffer("steps_d", levels_d.cumprod(0) // levels_d, persistent=False)

    def forward(self, z: Float[Tensor, "*B d"]) -> Quantized:
        """Quantize vectors; the loss is 0.

        Raises:
            ValueError: If the vectors have another number of coordinates.
        """
        if z.shape[-1] != self.dim:
            raise ValueError(f"need vectors of {self.dim} dimensions, got {tuple(z.shape)}")
        half_d = (self.levels_d - 1) * (1 + 1e-3) / 2
        # An even number of values has none in the middle: the bounded range is moved by half a step.
        offset_d = torch.where(self.levels_d % 2 == 0, 0.5, 0.0)
        bounded = (z + (offset_d / half_d).atanh()).tanh() * half_d - offset_d
        rounded = straight_through(bounded, bounded.round())
        digits = bounded.detach().round().long() + self.levels_d // 2
        return Quantized(
            rounded / (self.levels_d // 2), (digits * self.steps_d).sum(-1), z.new_zeros(())
        )

    def look_up(self, indices: Int[Tensor, "*B"]) -> Float[Tensor, "*B d"]:
        """Return the codes of indices.

        Raises:
            ValueError: If an index is none. Not checked on a GPU.
        """
        check_indices(indices, self.codes)
        half_d = self.levels_d // 2
        return (indices[..., None] // self.steps_d % self.levels_d - half_d) / half_d


def residual(
    z: Float[Tensor, "*B d"], quantizers: Sequence[VectorQuantizer]
) -> tuple[Float[Tensor, "*B d"], Int64[Tensor, "*B depth"]]:
    """Quantize, then quantize what is left, and so on: C^depth sums of codes from depth · C stored ones.

    Returns:
        The sum of the chosen codes, through which the gradient passes, and the index at each depth.

    Raises:
        ValueError: If there is no quantizer.

    Source: Zeghidour et al., SoundStream, 2021, section III-C.
    """
    if not quantizers:
        raise ValueError("need at least one quantizer")
    rest, found = z.detach(), []
    for quantizer in quantizers:
        found.append(nearest(rest, quantizer.codebook))
        rest = rest - quantizer.codebook[found[-1]]
    return straight_through(z, z.detach() - rest), torch.stack(found, -1)


def check_indices(indices: Tensor, codes: int) -> None:
    """Raise ValueError if an index is none of the codes'. Not on a GPU, which asserts by itself."""
    if indices.device.type == "cpu" and indices.numel():
        low, high = map(int, indices.aminmax())
        if low < 0 or high >= codes:
            raise ValueError(f"need indices 0 to {codes - 1}, got {low} to {high}")
