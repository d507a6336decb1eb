"""Codes of digits, photographs and MNIST, models of the codes, and what each of them is worth in bits."""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Real, UInt8
from matplotlib.figure import Figure
from PIL import Image
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from noise2tokens.display import image_rows
from noise2tokens.distribution_transforms.distances import frechet_distance
from noise2tokens.images import digits, mnist, photographs, split
from noise2tokens.networks import confidence, train_classifier
from noise2tokens.training import History, fit, seed_everything
from noise2tokens.transformer import Config
from noise2tokens.vq_vae.autoencoder import VQVAE, discretized_logistic, fit_scale, vqvae_loss
from noise2tokens.vq_vae.priors import (
    GatedPixelCNN,
    TransformerPrior,
    log_prob,
    prior_loss,
    sample,
)
from noise2tokens.vq_vae.quantizers import (
    FSQ,
    VectorQuantizer,
    k_means,
    nearest,
    perplexity,
    rotate_through,
)

# Vectors that k-means starts the codes from.
START_IMAGES = 500


def digit_images(seed: int) -> tuple[Float[Tensor, "n 1 8 8"], ...]:
    """The digits in [0, 1] as 1297 for training, 200 for validation, 300 for the test."""
    images, _ = digits()
    parts = split(len(images), (1297, 200, 300), seed)
    return tuple(images[part][:, None] / 16 for part in parts)


def learn(
    model: VQVAE,
    images: Float[Tensor, "n c h w"],
    held_out: Float[Tensor, "k c h w"],
    *,
    steps: int,
    seed: int = 0,
    batch_size: int = 64,
    learning_rate: float | int = 3e-3,
    fit_codes: bool = True,
    after_step: Callable[[int], None] = lambda _: None,
) -> History:
    """Train an autoencoder, with a quantizer that starts by k-means and moves after every step if it has codes.

    Args:
        model: The autoencoder.
        images: To train on.
        held_out: To choose the weights by, which have the lowest squared error there.
        steps: Optimizer steps.
        seed: Of the k-means.
        batch_size: Images a step.
        learning_rate: The highest.
        fit_codes: Whether codes start by k-means.
        after_step: Called with the number of the step, after the codes have moved.

    Returns:
        The curve.
    """
    quantizer = model.quantizer
    has_codes = isinstance(quantizer, VectorQuantizer)
    if has_codes and fit_codes:
        with torch.no_grad():
            quantizer.start(model.vectors(images[:START_IMAGES]), seed)

    def move(step: int) -> None:
        if has_codes:
            quantizer.move()
        after_step(step)

    return fit(
        model,
        lambda x: vqvae_loss(model, x),
        images,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        validate=lambda: F.mse_loss(model(held_out)[0], held_out),
        validate_every=max(1, steps // 8),
        after_step=move,
        label="autoencoder",
    )


def learn_prior(
    prior: nn.Module,
    indices: Int[Tensor, "n m k"],
    held_out: Int[Tensor, "l m k"],
    *,
    steps: int,
    batch_size: int = 64,
    learning_rate: float | int = 2e-3,
) -> History:
    """Train a model of maps of codes; keep the weights that give the held-out maps the fewest nats.

    Args:
        prior: The model.
        indices: Maps to train on.
        held_out: Maps to choose the weights by.
        steps: Optimizer steps.
        batch_size: Maps a step.
        learning_rate: The highest.

    Returns:
        The curve; its validation values are nats a code.
    """
    return fit(
        prior,
        lambda maps: prior_loss(prior, maps),
        indices,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup=0.1,
        validate=lambda: prior_loss(prior, held_out),
        validate_every=max(1, steps // 10),
        label="prior",
    )


def unigram(
    indices: Int[Tensor, "n m k"], held_out: Int[Tensor, "l m k"], codes: int
) -> Float[Tensor, ""]:
    """Return nats a code of the simplest model: every place draws from the same shares, learned with one count added.

    Args:
        indices: Maps to count.
        held_out: Maps to score.
        codes: C.
    """
    counts = indices.flatten().bincount(minlength=codes) + 1
    return -(counts / counts.sum()).log()[held_out].mean()


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
        Bits for each pixel and channel: "codes", "pixels" and their sum, "total".
    """

    def reconstruction(x: Tensor) -> Tensor:
        return model.decode(model.encode(x / (levels - 1)))

    log_scale = fit_scale(fit_on, reconstruction(fit_on), levels)
    indices = model.encode(values / (levels - 1))
    mean = model.decode(indices)
    dim = values[0].numel() * math.log(2)
    codes = torch.cat([-log_prob(prior, part) for part in indices.split(500)]).mean().item() / dim
    log_pixels = discretized_logistic(values, mean, log_scale[None], levels)
    pixels = -log_pixels.flatten(1).sum(1).mean().item() / dim
    return {"codes": codes, "pixels": pixels, "total": codes + pixels}


def gray(picture: UInt8[Tensor, "_ _ 3"], multiple: int = 4) -> Float[Tensor, "1 h w"]:
    """Return the mean of the colors in [0, 1], cut to sizes that are divisible by a number."""
    height, width = (side // multiple * multiple for side in picture.shape[:2])
    return picture[:height, :width].float().mean(-1)[None] / 255


def crops(
    pictures: Sequence[Float[Tensor, "1 _ _"]], n: int, size: int, generator: Generator
) -> Float[Tensor, "n 1 {size} {size}"]:
    """Cut squares out of gray pictures at random; half of them are made negatives, so that few pictures show more.

    Args:
        pictures: From which each square is drawn with equal chances.
        n: Number of squares.
        size: Of their sides.
        generator: Decides.

    Raises:
        ValueError: If there is no picture, or one is smaller than a square.
    """
    if not pictures or any(min(picture.shape[1:]) < size for picture in pictures):
        raise ValueError(
            f"need pictures of {size} pixels a side or more, got {[tuple(p.shape) for p in pictures]}"
        )

    def below(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=generator))

    squares = []
    for _ in range(n):
        picture = pictures[below(len(pictures))]
        top, left = (below(side - size + 1) for side in picture.shape[1:])
        square = picture[:, top : top + size, left : left + size]
        squares.append(1 - square if below(2) else square)
    return torch.stack(squares)


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


# Short runs: the encoder moves fast, and an average over a hundred steps would come late.
DECAY = 0.9
# Ways to train a discrete code, for the comparison on the digits: 32 codes each, and whether they start by k-means.
VARIANTS: dict[str, tuple[Callable[[], VectorQuantizer | FSQ], bool]] = {
    "moving average": (lambda: VectorQuantizer(32, 4, decay=DECAY, revive_below=1.0), True),
    "its memory ten times as long": (
        lambda: VectorQuantizer(32, 4, decay=0.99, revive_below=1.0),
        True,
    ),
    "random start, no revival": (lambda: VectorQuantizer(32, 4, decay=DECAY), False),
    "random start, revival": (
        lambda: VectorQuantizer(32, 4, decay=DECAY, revive_below=1.0),
        False,
    ),
    "gradient": (lambda: VectorQuantizer(32, 4, decay=None), True),
    "rotation": (
        lambda: VectorQuantizer(32, 4, decay=DECAY, revive_below=1.0, estimator=rotate_through),
        True,
    ),
    "FSQ, 8 × 4": (lambda: FSQ([8, 4]), False),
}


def compare_variants(seeds: int, steps: int, seed: int) -> dict[str, dict[str, list[float]]]:
    """Train each variant on the digits with each seed.

    Returns:
        By variant, lists over seeds: "MSE" and "perplexity" of the test images, "used": codes that occur there. The
        baselines, k-means of blocks of 2 × 2 pixels and of a plain autoencoder's vectors, have "MSE" only.
    """
    found: dict[str, dict[str, list[float]]] = {}

    def note(name: str, **values: Tensor | float | int) -> None:
        row = found.setdefault(name, {})
        for key, value in values.items():
            row.setdefault(key, []).append(float(value))

    for s in range(seed, seed + seeds):
        train, held_out, test = digit_images(s)
        note("k-means of blocks", MSE=F.mse_loss(block_k_means(train, test, 32, s), test))
        for dim in (2, 4):
            seed_everything(s)
            plain = VQVAE(None, width=32, dim=dim)
            learn(plain, train, held_out, steps=steps)
            afterwards = quantize_afterwards(plain, train, test, 32, s)
            note(f"k-means afterwards, {dim} coordinates", MSE=F.mse_loss(afterwards, test))
        for name, (make, fit_codes) in VARIANTS.items():
            seed_everything(s)
            quantizer = make()
            model = VQVAE(quantizer, width=32)
            learn(model, train, held_out, steps=steps, seed=s, fit_codes=fit_codes)
            indices = model.encode(test)
            note(
                name,
                MSE=F.mse_loss(model.decode(indices), test),
                perplexity=perplexity(indices, quantizer.codes),
                used=len(indices.unique()),
            )
    return found


# Photographs to learn from; one to stop by, and one to test on.
LEARNED, STOPPED_BY, TESTED = ("china", "flower", "astronaut", "rocket"), "coffee", "chelsea"


def photograph_codes(
    device: torch.device,
    *,
    seed: int,
    steps: int,
    batch_size: int,
    width: int,
    prior_steps: int,
    prior_width: int,
    prior_layers: int,
) -> tuple[dict[str, float], Figure]:
    """Describe squares of 32 × 32 gray pixels by 8 × 8 codes out of 128, and model the codes.

    Args:
        device: Where to train.
        seed: Of the squares and both trainings.
        steps: Steps of the autoencoder.
        batch_size: Squares or maps a step.
        width: Channels of the autoencoder.
        prior_steps: Steps of the prior.
        prior_width: Its channels.
        prior_layers: Its layers.

    Returns:
        Of squares of a photograph that neither has seen: "PSNR, dB", "perplexity", "used"; nats a code of "shares of
        the codes" and of the "gated PixelCNN"; "bits a pixel" of codes by the latter. A picture of samples.
    """
    pictures = {name: gray(picture) for name, picture in photographs().items()}
    generator = Generator().manual_seed(seed)
    train, held_out, test = (
        crops([pictures[name] for name in names], n, 32, generator).to(device)
        for names, n in ((LEARNED, 16_000), ([STOPPED_BY], 500), ([TESTED], 1000))
    )
    seed_everything(seed)
    model = VQVAE(VectorQuantizer(128, 8, decay=DECAY, revive_below=1.0), width=width, halvings=2)
    learn(model.to(device), train, held_out, steps=steps, seed=seed, batch_size=batch_size)
    indices, kept, new = (model.encode(x) for x in (train, held_out, test))
    prior = GatedPixelCNN(128, prior_width, prior_layers, dropout=0.1).to(device)
    learn_prior(prior, indices, kept, steps=prior_steps, batch_size=batch_size)
    with torch.no_grad():
        nats = prior_loss(prior, new).item()
    reconstruction = model.decode(new)
    found = {
        "PSNR, dB": psnr(reconstruction, test).item(),
        "perplexity": perplexity(new, 128).item(),
        "used": len(new.unique()),
        "shares of the codes": unigram(indices, new, 128).item(),
        "gated PixelCNN": nats,
        "bits a pixel": nats / math.log(2) * new[0].numel() / test[0].numel(),
    }
    drawn = model.decode(sample(prior, 12, (8, 8), Generator(device).manual_seed(seed)))
    rows = {"held out": test, "reconstructed": reconstruction, "gated PixelCNN": drawn}
    return found, image_rows({name: x[:12, 0].clamp(0, 1) for name, x in rows.items()})


BUDGETS = {
    "long": {
        "seeds": 3,
        "digit_steps": 600,
        "steps": 2500,
        "batch_size": 64,
        "width": 32,
        "prior_steps": 1500,
        "prior_width": 64,
        "prior_layers": 5,
        "samples": 1000,
        "test_images": 2000,
        "classifier_steps": 3000,
    },
    "full": {
        "seeds": 5,
        "digit_steps": 3000,
        "steps": 20_000,
        "batch_size": 128,
        "width": 128,
        "prior_steps": 20_000,
        "prior_width": 128,
        "prior_layers": 8,
        "samples": 10_000,
        "test_images": 10_000,
        "classifier_steps": 3000,
    },
}


def full_scale(
    device: torch.device,
    *,
    seed: int,
    seeds: int,
    digit_steps: int,
    steps: int,
    batch_size: int,
    width: int,
    prior_steps: int,
    prior_width: int,
    prior_layers: int,
    samples: int,
    test_images: int,
    classifier_steps: int,
) -> tuple[dict[str, Any], dict[str, Figure]]:
    """Compare ways to train a code on the digits; model MNIST in 7 × 7 codes out of 256, and squares of photographs.

    Args:
        device: Where to train on MNIST; the digits are trained on the CPU.
        seed: Of each training; the comparison counts on from it.
        seeds: Seeds of the comparison.
        digit_steps: Steps of each training of the comparison.
        steps: Steps of each autoencoder on MNIST and on photographs.
        batch_size: Images or maps a step on MNIST; half of it on photographs.
        width: Channels of the autoencoder.
        prior_steps: Steps of each prior.
        prior_width: Channels of each prior.
        prior_layers: Layers of each prior.
        samples: Samples of each for the classifier to read.
        test_images: Test images that are scored; what samples are compared with.
        classifier_steps: Steps of the classifier's own training.

    Returns:
        "digits": as `compare_variants`. "codes": for each quantizer "MSE", "perplexity", "used" on the test images.
        "priors": for each quantizer and prior "nats" a code and bits per dimension of "codes", "pixels", "total".
        "samples": for each kind of picture Fréchet "distance" of features to the test images, mean "confidence".
        "photographs": as `photograph_codes`. Pictures of samples of both.
    """
    squares, drawn_squares = photograph_codes(
        device, seed=seed, steps=steps, batch_size=batch_size // 2, width=width, prior_steps=prior_steps,
        prior_width=prior_width, prior_layers=prior_layers,
    )  # fmt: skip
    results: dict[str, Any] = {
        "digits": compare_variants(seeds, digit_steps, seed),
        "codes": {},
        "priors": {},
        "samples": {},
        "photographs": squares,
    }
    (images, labels), (unseen, _) = mnist(train=True), mnist(train=False)
    images, unseen = images[:, None].to(device), unseen[:test_images, None].to(device)
    held_out = min(1000, len(images) // 10)
    train, validation = images[:-held_out] / 255, images[-held_out:] / 255
    test = unseen / 255
    pictures = {"test images": test, "training images": _some(train, samples, seed)}
    quantizers = {
        "VQ": VectorQuantizer(256, 8, decay=DECAY, revive_below=1.0),
        "FSQ, 8 × 6 × 5": FSQ([8, 6, 5]),
    }
    generator = Generator(device).manual_seed(seed)
    for name, quantizer in quantizers.items():
        seed_everything(seed)
        model = VQVAE(quantizer, width=width, halvings=2).to(device)
        learn(model, train, validation, steps=steps, seed=seed, batch_size=batch_size)
        indices, kept, new = (model.encode(x) for x in (train, validation, test))
        reconstruction = model.decode(new)
        results["codes"][name] = {
            "MSE": F.mse_loss(reconstruction, test),
            "perplexity": perplexity(new, quantizer.codes),
            "used": len(new.unique()),
            "unigram": unigram(indices, new, quantizer.codes),
        }
        pictures[f"{name}, reconstructed"] = reconstruction
        kinds: dict[str, Callable[[], nn.Module]] = {
            "gated PixelCNN": lambda c=quantizer.codes: GatedPixelCNN(
                c, prior_width, prior_layers, dropout=0.1
            )
        }
        if name == "VQ":
            config = Config(quantizer.codes, prior_width, prior_layers, 4)
            kinds["transformer"] = lambda c=config: TransformerPrior(c)
        for kind, make in kinds.items():
            seed_everything(seed)
            prior = make().to(device)
            learn_prior(prior, indices, kept, steps=prior_steps, batch_size=batch_size)
            bits = bits_per_dim(model, prior, images[:2000], unseen, 256)
            nats = bits["codes"] * 784 * math.log(2) / new[0].numel()
            results["priors"][f"{name}, {kind}"] = {"nats": nats, **bits}
            shape = tuple(new.shape[1:])
            drawn = (
                prior.sample(samples, shape, generator)
                if kind == "transformer"
                else sample(prior, samples, shape, generator)
            )
            pictures[f"{name}, {kind}"] = model.decode(drawn)
        shares = indices.flatten().bincount(minlength=quantizer.codes).double()
        drawn = torch.multinomial(
            shares, samples * new[0].numel(), replacement=True, generator=generator
        )
        pictures[f"{name}, unigram"] = model.decode(drawn.view(samples, *new.shape[1:]))
    classifier = train_classifier(
        images / 255, labels.to(device), steps=classifier_steps, batch_size=64
    )
    real = classifier.features(test)
    for name, x in pictures.items():
        results["samples"][name] = {"confidence": confidence(classifier, x).mean()}
        if name != "test images":
            distance = frechet_distance(classifier.features(x), real)
            results["samples"][name]["distance"] = distance
    shown = {name: x[:10, 0] for name, x in pictures.items() if name != "training images"}
    return results, {
        "MNIST: test images, reconstructions and samples": image_rows(shown),
        "Squares of photographs: of the cat, which is held out; reconstructions; samples": drawn_squares,
    }


def _some(images: Float[Tensor, "n 1 h w"], n: int, seed: int) -> Float[Tensor, "_ 1 h w"]:
    order = torch.randperm(len(images), generator=Generator().manual_seed(seed))[:n]
    return images[order.to(images.device)]
