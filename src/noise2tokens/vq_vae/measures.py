"""What a description of pictures costs and loses, and what simple descriptions cost and lose."""

import io
import math

import torch
from jaxtyping import Float, Float64, Int, Int64, Real
from PIL import Image
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from noise2tokens.training import fit
from noise2tokens.vq_vae.autoencoder import VQVAE, discretized_logistic, fit_scale
from noise2tokens.vq_vae.priors import log_prob
from noise2tokens.vq_vae.quantizers import k_means, nearest

# Intervals of a reconstruction's value in which distributions of pixels are counted.
BINS = 33


def shares(
    indices: Int[Tensor, "n m k"], codes: int, *, by_place: bool = False
) -> Float64[Tensor, "m k {codes}"]:
    """Return the simplest models of maps: how often each code occurs, with one count added.

    Args:
        indices: Maps to count.
        codes: C.
        by_place: Whether each place has shares of its own; else all have those of the whole map.
    """
    shape = indices.shape[1:]
    first = codes * torch.arange(shape.numel(), device=indices.device).view(shape)
    counts = (indices + first).flatten().bincount(minlength=shape.numel() * codes)
    counts = counts.view(*shape, codes)
    if not by_place:
        counts = counts.sum((0, 1)).expand_as(counts)
    return (counts + 1).double() / (counts + 1).sum(-1, keepdim=True)


def shares_nats(p: Float64[Tensor, "m k C"], indices: Int[Tensor, "n m k"]) -> float:
    """Return the nats that a code of these maps costs, given the shares at each place."""
    logs = p.log().expand(len(indices), *p.shape)
    return -logs.gather(-1, indices[..., None]).mean().item()


def draw_shares(
    p: Float64[Tensor, "m k C"], n: int, generator: Generator
) -> Int64[Tensor, "{n} m k"]:
    """Draw maps in which no code knows of another."""
    drawn = torch.multinomial(p.flatten(0, 1), n, replacement=True, generator=generator)
    return drawn.T.view(n, *p.shape[:2])


def block_k_means(
    images: Float[Tensor, "n 1 h w"], held_out: Float[Tensor, "k 1 h w"], codes: int, seed: int
) -> Float[Tensor, "k 1 h w"]:
    """Return what is left of images whose blocks of 2 × 2 pixels are replaced by the nearest of so many blocks.

    Vector quantization without a network (Linde, Buzo and Gray 1980).
    """

    def blocks(x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, 2).movedim(1, -1)

    codebook = k_means(blocks(images).flatten(0, 2), codes, seed)
    return F.pixel_shuffle(codebook[nearest(blocks(held_out), codebook)].movedim(-1, 1), 2)


@torch.no_grad()
def quantize_afterwards(
    model: VQVAE,
    images: Float[Tensor, "n c h w"],
    held_out: Float[Tensor, "k c h w"],
    codes: int,
    seed: int,
) -> Float[Tensor, "k c h w"]:
    """Return reconstructions of a trained autoencoder whose vectors are replaced by means of k-means.

    The quantizer that the autoencoder was trained with, if any, is passed by.
    """
    codebook = k_means(model.vectors(images).flatten(0, 2), codes, seed)
    z = model.vectors(held_out)
    return model.decoder(codebook[nearest(z, codebook)].movedim(-1, 1))


def decoder_afterwards(
    model: VQVAE,
    train: Float[Tensor, "n c h w"],
    held_out: Float[Tensor, "l c h w"],
    test: Float[Tensor, "k c h w"],
    codes: int,
    *,
    steps: int,
    seed: int,
) -> Float[Tensor, "k c h w"]:
    """Replace a trained autoencoder's vectors by means of k-means, and train its decoder, in place, to read the means.

    Args:
        model: A trained autoencoder; its decoder is changed.
        train: Images for the k-means and the training.
        held_out: Images to choose the weights by.
        test: Images to reconstruct.
        codes: Number of means.
        steps: Steps of the decoder's training.
        seed: Of the k-means.

    Returns:
        The reconstructions.
    """
    with torch.no_grad():
        codebook = k_means(model.vectors(train).flatten(0, 2), codes, seed)
        means, kept, new = (
            codebook[nearest(model.vectors(x), codebook)].movedim(-1, 1)
            for x in (train, held_out, test)
        )
    fit(
        model.decoder,
        lambda rows: F.mse_loss(model.decoder(means[rows]), train[rows]),
        torch.arange(len(train), device=train.device),
        steps=steps,
        batch_size=64,
        learning_rate=3e-3,
        validate=lambda: F.mse_loss(model.decoder(kept), held_out),
        validate_every=max(1, steps // 8),
        label="decoder",
    )
    with torch.no_grad():
        return model.decoder(new)


def counted_bits(
    seen: tuple[Int[Tensor, "n"], Int[Tensor, "n"]],
    new: tuple[Int[Tensor, "k"], Int[Tensor, "k"]],
    contexts: int,
    levels: int,
) -> float:
    """Return the bits that a value costs where its distribution in each context was counted, with one count added.

    Args:
        seen: Contexts, 0 to contexts - 1, and values, 0 to levels - 1, to count.
        new: Contexts and values to score.
        contexts: How many contexts there are.
        levels: How many values there are.
    """
    context, value = seen
    counts = (context * levels + value).bincount(minlength=contexts * levels).view(contexts, levels)
    p = (counts + 1).double() / (counts + 1).sum(1, keepdim=True)
    return -p[new].log2().mean().item()


def histogram_bits(
    fit_on: Real[Tensor, "n c h w"], values: Real[Tensor, "k c h w"], levels: int
) -> float:
    """Return the bits a pixel where each has a histogram of its own over training images: no model at all."""
    pixel = torch.arange(fit_on[0].numel(), device=fit_on.device)
    seen, new = ((pixel.repeat(len(x)), x.long().flatten()) for x in (fit_on, values))
    return counted_bits(seen, new, len(pixel), levels)


@torch.no_grad()
def bits_per_dim(
    model: VQVAE,
    prior: nn.Module,
    fit_on: Real[Tensor, "n c h w"],
    values: Real[Tensor, "k c h w"],
    levels: int,
) -> dict[str, float]:
    """Return what it costs to send integer images as codes and, given those, pixels.

    -log p(x) ≤ -log P(k) - log p(x | k) for the codes k that the encoder chooses. The pixels of an image are
    independent given its codes, with a logistic distribution around the reconstruction whose scale, one for each pixel,
    is fitted on training images.

    Args:
        model: Trained on values / (levels - 1).
        prior: Trained on its maps of codes.
        fit_on: Training images, integers, to fit the scales on.
        values: Images to score, integers.
        levels: How many values a pixel takes.

    Returns:
        Bits for each pixel and channel: "codes", "pixels" and their sum, "total"; and "counted", what the pixels cost
        if the distribution of a value is not a logistic one but is counted on training images, in `BINS` intervals of
        the reconstruction.
    """

    def reconstruction(x: Tensor) -> Tensor:
        return model.decode(model.encode(x / (levels - 1)))

    def by_bin(x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        return (mean.clamp(0, 1) * (BINS - 1)).round().long().flatten(), x.long().flatten()

    fitted = reconstruction(fit_on)
    log_scale = fit_scale(fit_on, fitted, levels)
    indices = model.encode(values / (levels - 1))
    mean = model.decode(indices)
    dim = values[0].numel() * math.log(2)
    codes = torch.cat([-log_prob(prior, part) for part in indices.split(500)]).mean().item() / dim
    log_pixels = discretized_logistic(values, mean, log_scale[None], levels)
    pixels = -log_pixels.flatten(1).sum(1).mean().item() / dim
    counted = counted_bits(by_bin(fit_on, fitted), by_bin(values, mean), BINS, levels)
    return {"codes": codes, "pixels": pixels, "total": codes + pixels, "counted": counted}


def resized(x: Float[Tensor, "n 1 h w"], factor: int, bits: int) -> Float[Tensor, "n 1 h w"]:
    """Describe pictures by smaller ones, and enlarge those: means of blocks, rounded to so many bits, then bicubic.

    Args:
        x: Pictures in [0, 1] whose sides are divisible by the factor.
        factor: Side of the blocks; the description takes bits / factor² for each pixel.
        bits: For each mean.
    """
    small = (F.avg_pool2d(x, factor) * (2**bits - 1)).round() / (2**bits - 1)
    return F.interpolate(small, scale_factor=factor, mode="bicubic").clamp(0, 1)


def psnr(reconstruction: Float[Tensor, "*shape"], x: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Return the peak signal-to-noise ratio of images in [0, 1], in decibels: -10 log₁₀ of the mean squared error."""
    return -10 * F.mse_loss(reconstruction, x).log10()


def jpeg(x: Float[Tensor, "1 h w"], bits: float) -> tuple[Float[Tensor, "1 h w"], float]:
    """Compress a gray picture by JPEG to at most so many bits a pixel.

    Returns:
        The picture after it, and the bits a pixel that it took: at the best quality that fits, or, where none does, at
        the lowest.
    """
    image = Image.fromarray((x[0].clamp(0, 1) * 255).round().byte().numpy())
    for quality in range(95, -1, -1):
        file = io.BytesIO()
        image.save(file, "jpeg", quality=quality, optimize=True)
        taken = 8 * file.tell() / x.numel()
        if taken <= bits:
            break
    shown = torch.frombuffer(bytearray(Image.open(file).tobytes()), dtype=torch.uint8)
    return shown.view(x.shape) / 255, taken
