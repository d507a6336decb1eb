"""The autoencoder around a quantizer, and the likelihood that its decoder gives to integer pixels."""

import math

import torch
from jaxtyping import Float, Int, Int64, Real
from torch import Tensor, nn
from torch.nn import functional as F

from noise2tokens.vq_vae.quantizers import FSQ, Quantized, VectorQuantizer


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Float[Tensor, "B c h w"]) -> Float[Tensor, "B c h w"]:
        """Return the input plus what the convolutions add to it."""
        return x + self.body(x)


class VQVAE(nn.Module):
    """Convolutions down to a map of vectors, a quantizer, convolutions up again.

    Args:
        quantizer: Replaces each vector of the map; None leaves the vectors as they are: a plain autoencoder.
        channels: Of the images.
        width: Channels of the hidden layers.
        halvings: How often height and width are halved.
        dim: Dimension of the vectors; the quantizer's where it has one.

    Raises:
        ValueError: If `dim` is not the quantizer's, or is missing where there is no quantizer.

    Source: after van den Oord et al. 2017, section 4.1, smaller.
    """

    def __init__(
        self,
        quantizer: VectorQuantizer | FSQ | None,
        *,
        channels: int = 1,
        width: int = 64,
        halvings: int = 1,
        dim: int | None = None,
    ):
        super().__init__()
        dim = quantizer.dim if dim is None and quantizer is not None else dim
        if dim is None or (quantizer is not None and dim != quantizer.dim):
            raise ValueError(f"vectors of {dim} dimensions do not fit the quantizer {quantizer}")
        self.halvings, self.quantizer = halvings, quantizer
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            *(
                layer
                for _ in range(halvings)
                for layer in (nn.ReLU(), nn.Conv2d(width, width, 4, stride=2, padding=1))
            ),
            Residual(width),
            nn.ReLU(),
            nn.Conv2d(width, dim, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(dim, width, 3, padding=1),
            Residual(width),
            *(
                layer
                for _ in range(halvings)
                for layer in (nn.ReLU(), nn.ConvTranspose2d(width, width, 4, stride=2, padding=1))
            ),
            nn.ReLU(),
            nn.Conv2d(width, channels, 3, padding=1),
        )

    def forward(
        self, x: Float[Tensor, "B c h w"]
    ) -> tuple[Float[Tensor, "B c h w"], Quantized | None]:
        """Return reconstructions and what the quantizer found; None where there is no quantizer."""
        z = self.vectors(x)
        if self.quantizer is None:
            return self.decoder(z.movedim(-1, 1)), None
        quantized = self.quantizer(z)
        return self.decoder(quantized.values.movedim(-1, 1)), quantized

    def vectors(self, x: Float[Tensor, "B c h w"]) -> Float[Tensor, "B m n d"]:
        """Return the map of vectors before they are quantized.

        Raises:
            ValueError: If height or width cannot be halved as often.
        """
        step = 2**self.halvings
        if x.shape[-2] % step or x.shape[-1] % step:
            raise ValueError(f"need sizes divisible by {step}, got {tuple(x.shape[-2:])}")
        return self.encoder(x).movedim(1, -1)

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "n c h w"], batch_size: int = 1000) -> Int64[Tensor, "n m k"]:
        """Return the map of codes of any number of images."""
        return torch.cat(
            [self.quantizer(self.vectors(part)).indices for part in x.split(batch_size)]
        )

    @torch.no_grad()
    def decode(
        self, indices: Int[Tensor, "n m k"], batch_size: int = 1000
    ) -> Float[Tensor, "n c h w"]:
        """Return the images of maps of codes."""
        return torch.cat(
            [
                self.decoder(self.quantizer.look_up(part).movedim(-1, 1))
                for part in indices.split(batch_size)
            ]
        )


def vqvae_loss(model: VQVAE, x: Float[Tensor, "B c h w"]) -> Float[Tensor, ""]:
    """Return the mean squared error of the reconstruction, plus the quantizer's loss."""
    reconstruction, quantized = model(x)
    loss = F.mse_loss(reconstruction, x)
    return loss if quantized is None else loss + quantized.loss


def discretized_logistic(
    values: Real[Tensor, "*B"],
    mean: Float[Tensor, "*B"],
    log_scale: Float[Tensor, "*#B"],
    levels: int,
) -> Float[Tensor, "*B"]:
    """Return the logarithm of the probability of integers under a logistic distribution cut into bins.

    Value v stands at v / (levels - 1) and owns the half step on either side; the lowest and the highest value own all
    that lies beyond them, so that the probabilities add up to 1.

    Args:
        values: Integers from 0 to levels - 1.
        mean: Of the logistic distribution, on the scale of [0, 1].
        log_scale: Logarithm of its scale.
        levels: How many values there are.

    Returns:
        Natural logarithms, one for each value.

    Raises:
        ValueError: If there are fewer than two levels.

    Source: Kingma et al. 2016, appendix A.1 (inverse autoregressive flow); Salimans et al. 2017, section 2.1.
    """
    if levels < 2:
        raise ValueError(f"need two levels or more, got {levels}")
    step, sharpness = 1 / (levels - 1), (-log_scale).exp()
    low, high = (
        (values.to(mean.dtype) * step + half - mean) * sharpness for half in (-step / 2, step / 2)
    )
    # log(σ(b) - σ(a)) = log σ(b) + log σ(-a) + log(1 - e^(a-b)), without a difference of numbers that are both near 1.
    inside = F.logsigmoid(high) + F.logsigmoid(-low) + (-(-step * sharpness).expm1()).log()
    outer = torch.where(values == 0, F.logsigmoid(high), F.logsigmoid(-low))
    return torch.where((values > 0) & (values < levels - 1), inside, outer)


@torch.no_grad()
def fit_scale(
    values: Real[Tensor, "n *shape"],
    mean: Float[Tensor, "n *shape"],
    levels: int,
    candidates: int = 61,
) -> Float[Tensor, "*shape"]:
    """Return for each pixel the logarithm of the scale that makes these images likeliest, out of a grid of scales.

    Args:
        values: Integers from 0 to levels - 1.
        mean: Their reconstructions.
        levels: How many values there are.
        candidates: Scales from 0.0005 to 1, in equal ratios.

    Raises:
        ValueError: If there are no images, or fewer than two candidates.
    """
    if len(values) == 0 or candidates < 2:
        raise ValueError(f"need images and two candidates, got {len(values)} and {candidates}")
    grid = torch.linspace(math.log(5e-4), 0, candidates, device=mean.device)
    score = torch.stack(
        [discretized_logistic(values, mean, s.expand(mean.shape), levels).mean(0) for s in grid]
    )
    return grid[score.argmax(0)]
