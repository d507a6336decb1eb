"""Models of a map of codes, one code after the other in reading order: P(k) = ∏ P(k_i | k_1, ..., k_{i-1}).

Each is called with whole maps and returns logits for every place, computed from the codes before it; `log_prob` and
`sample` work with any of them. `PixelCNN` masks its kernels and has a blind spot; `GatedPixelCNN` has none;
`TransformerPrior` reads the map as a sequence.
"""

import math

import torch
from jaxtyping import Float, Int, Int64
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from noise2tokens.transformer import Config, Decoder, generate
from noise2tokens.vq_vae.quantizers import check_indices


class MaskedConv2d(nn.Conv2d):
    """A convolution that sees, in reading order, what is before a place, and the place itself if told so."""

    def __init__(self, inputs: int, outputs: int, size: int, itself: bool):
        super().__init__(inputs, outputs, size, padding=size // 2)
        mask = torch.zeros(size, size)
        mask[: size // 2] = 1
        mask[size // 2, : size // 2 + itself] = 1
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Float[Tensor, "B c m n"]) -> Float[Tensor, "B e m n"]:
        """Convolve with what is left of the kernel."""
        return F.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


class PixelCNN(nn.Module):
    """Masked convolutions on top of one another. It never sees some of the places to the upper right.

    Source: van den Oord et al. 2016a (pixel recurrent neural networks), section 3.4, without residual connections.
    """

    def __init__(self, codes: int, width: int = 64, layers: int = 4, size: int = 3):
        super().__init__()
        self.codes = codes
        self.embedding = nn.Embedding(codes, width)
        self.body = nn.Sequential(
            MaskedConv2d(width, width, size, itself=False),
            *(
                part
                for _ in range(layers - 1)
                for part in (nn.ReLU(), MaskedConv2d(width, width, size, itself=True))
            ),
            nn.ReLU(),
            nn.Conv2d(width, codes, 1),
        )

    def forward(self, indices: Int[Tensor, "B m n"]) -> Float[Tensor, "B m n C"]:
        """Return logits for every place, from codes before it."""
        check_indices(indices, self.codes)
        return self.body(self.embedding(indices).movedim(-1, 1)).movedim(1, -1)


def gate(x: Float[Tensor, "B twice m n"]) -> Float[Tensor, "B half m n"]:
    """Return tanh of one half of the channels times sigmoid of the other."""
    value, opening = x.chunk(2, 1)
    return value.tanh() * opening.sigmoid()


class GatedLayer(nn.Module):
    """A layer of both stacks. `above` at a place knows the rows above; `here` knows those and what is to the left.

    Source: van den Oord et al. 2016b (conditional image generation), section 2.2 and figure 2.
    """

    def __init__(self, width: int, size: int):
        super().__init__()
        self.reach = size // 2
        self.vertical = nn.Conv2d(width, 2 * width, (self.reach + 1, size))
        self.horizontal = nn.Conv2d(width, 2 * width, (1, self.reach + 1))
        self.join = nn.Conv2d(2 * width, 2 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(
        self, above: Float[Tensor, "B c m n"], here: Float[Tensor, "B c m n"]
    ) -> tuple[Float[Tensor, "B c m n"], Float[Tensor, "B c m n"]]:
        """Return both stacks, one layer on."""
        r = self.reach
        rows = self.vertical(F.pad(above, (r, r, r, 0)))
        row = self.horizontal(F.pad(here, (r, 0, 0, 0))) + self.join(rows)
        return gate(rows), here + self.out(gate(row))


class GatedPixelCNN(nn.Module):
    """Two stacks of convolutions that together see every place before, and none after.

    The map enters the vertical stack moved down by a row, and the horizontal one moved right by a place: after that, no
    layer needs a mask.

    Args:
        codes: C.
        width: Channels.
        layers: Number of layers.
        size: Of the kernels, odd.
        dropout: Share of features that are dropped before the output.

    Raises:
        ValueError: If the size is even.
    """

    def __init__(
        self,
        codes: int,
        width: int = 64,
        layers: int = 4,
        size: int = 3,
        dropout: float | int = 0.0,
    ):
        super().__init__()
        if size % 2 == 0:
            raise ValueError(f"need kernels of odd size, got {size}")
        self.codes = codes
        self.embedding = nn.Embedding(codes, width)
        self.layers = nn.ModuleList(GatedLayer(width, size) for _ in range(layers))
        self.head = nn.Sequential(
            nn.ReLU(), nn.Dropout(dropout), nn.Conv2d(width, width, 1), nn.ReLU(),
            nn.Conv2d(width, codes, 1),
        )  # fmt: skip

    def forward(self, indices: Int[Tensor, "B m n"]) -> Float[Tensor, "B m n C"]:
        """Return logits for every place, from all codes before it."""
        check_indices(indices, self.codes)
        x = self.embedding(indices).movedim(-1, 1)
        above, here = F.pad(x, (0, 0, 1, -1)), F.pad(x, (1, -1, 0, 0))
        for layer in self.layers:
            above, here = layer(above, here)
        return self.head(here).movedim(1, -1)


class TransformerPrior(nn.Module):
    """The book's decoder on the map in reading order; a learned vector stands before the first code."""

    def __init__(self, config: Config):
        super().__init__()
        self.codes = config.vocab_size
        self.decoder = Decoder(config)
        self.begin = nn.Parameter(torch.randn(config.width) * 0.02)

    def forward(self, indices: Int[Tensor, "B m n"]) -> Float[Tensor, "B m n C"]:
        """Return logits for every place, from all codes before it."""
        check_indices(indices, self.codes)
        x = self.decoder.embedding(indices.flatten(1)[:, :-1])
        x = torch.cat([self.begin.expand(len(x), 1, -1), x], 1)
        return self.decoder.logits(self.decoder.hidden(x)).unflatten(1, indices.shape[1:])

    def sample(
        self, n: int, shape: tuple[int, int], generator: Generator | None = None
    ) -> Int64[Tensor, "n m k"]:
        """Draw maps, keeping keys and values: one token of work a step."""
        prompt = torch.zeros(n, 1, dtype=torch.long, device=self.begin.device)
        begin = self.begin.expand(n, 1, -1)
        drawn = generate(
            self.decoder, prompt, math.prod(shape), temperature=1.0, generator=generator,
            embeddings=begin,
        )  # fmt: skip
        return drawn[:, 1:].unflatten(1, shape)


def log_prob(prior: nn.Module, indices: Int[Tensor, "B m n"]) -> Float[Tensor, "B"]:
    """Return log P(k) of each map, in nats."""
    logits = prior(indices).flatten(1, 2).transpose(1, 2)
    return -F.cross_entropy(logits, indices.flatten(1), reduction="none").sum(1)


def prior_loss(prior: nn.Module, indices: Int[Tensor, "B m n"]) -> Float[Tensor, ""]:
    """Return the mean number of nats a code."""
    return F.cross_entropy(prior(indices).flatten(0, 2), indices.flatten())


@torch.no_grad()
def sample(
    prior: nn.Module, n: int, shape: tuple[int, int], generator: Generator | None = None
) -> Int64[Tensor, "n m k"]:
    """Draw maps place by place, with a pass over the whole map for each place: right for any prior.

    Args:
        prior: In `eval` mode.
        n: Number of maps.
        shape: Height and width of a map.
        generator: Source of the draws, on the prior's device.

    Raises:
        ValueError: If n or a side is below 1.
    """
    if min(n, *shape) < 1:
        raise ValueError(f"need at least one map of at least one code, got {n} of {shape}")
    device = next(prior.parameters()).device
    indices = torch.zeros(n, *shape, dtype=torch.long, device=device)
    for row in range(shape[0]):
        for column in range(shape[1]):
            chances = prior(indices)[:, row, column].softmax(-1)
            indices[:, row, column] = torch.multinomial(chances, 1, generator=generator)[:, 0]
    return indices


def receptive_field(
    prior: nn.Module, shape: tuple[int, int], place: tuple[int, int]
) -> Float[Tensor, "m n"]:
    """Return how much the logits at one place change with the embedding at every place: the norm of the gradient.

    Args:
        prior: With an `embedding` of codes; its weights as they are.
        shape: Height and width of the map.
        place: Row and column of the place that is asked about.
    """
    seen = []
    embedding = prior.embedding if hasattr(prior, "embedding") else prior.decoder.embedding
    hook = embedding.register_forward_hook(lambda _, __, x: seen.append(x.requires_grad_()) or x)
    indices = torch.randint(prior.codes, (1, *shape), generator=Generator().manual_seed(0))
    logits = prior(indices)
    hook.remove()
    chosen = logits[0, place[0], place[1]].double()
    weights = torch.randn(len(chosen), generator=Generator().manual_seed(1), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(chosen @ weights, seen[0])
    strength = gradient[0].norm(dim=-1).flatten()
    strength = F.pad(strength, (0, math.prod(shape) - len(strength)))  # a sequence lacks its last
    return strength.view(shape)
