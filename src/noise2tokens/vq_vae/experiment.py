"""Codes of digits, photographs and MNIST, and models of the codes, trained."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from noise2tokens.display import image_rows
from noise2tokens.distribution_transforms.distances import frechet_distance
from noise2tokens.images import digits, mnist, photographs, split
from noise2tokens.networks import confidence, train_classifier
from noise2tokens.training import History, fit, seed_everything
from noise2tokens.transformer import Config
from noise2tokens.vq_vae.autoencoder import VQVAE, vqvae_loss
from noise2tokens.vq_vae.measures import (
    bits_per_dim,
    block_k_means,
    decoder_afterwards,
    draw_shares,
    histogram_bits,
    psnr,
    quantize_afterwards,
    resized,
    shares,
    shares_nats,
)
from noise2tokens.vq_vae.priors import GatedPixelCNN, TransformerPrior, prior_loss, sample
from noise2tokens.vq_vae.quantizers import (
    FSQ,
    VectorQuantizer,
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
            vectors = model.vectors(images[:START_IMAGES])
            places = vectors[0, ..., 0].numel()
            quantizer.start(vectors, seed, min(batch_size, len(images)) * places)

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


# Short runs: the encoder moves fast, and an average over a hundred steps would come late.
DECAY = 0.9
# Ways to train a discrete code, for the comparison on the digits: 32 codes each, and whether they start by k-means.
VARIANTS: dict[str, tuple[Callable[[], VectorQuantizer | FSQ], bool]] = {
    "moving average": (lambda: VectorQuantizer(32, 4, decay=DECAY, revive_below=1.0), True),
    "its memory ten times as long": (
        lambda: VectorQuantizer(32, 4, decay=0.99, revive_below=1.0),
        True,
    ),
    "k-means start, no revival": (lambda: VectorQuantizer(32, 4, decay=DECAY), True),
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
        baselines have "MSE" only: k-means of blocks of 2 × 2 pixels, k-means of a plain autoencoder's vectors, and that
        with half as many steps again for the decoder alone, which then reads means.
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
            if dim == 2:
                anew = decoder_afterwards(
                    plain, train, held_out, test, 32, steps=steps // 2, seed=s
                )
                note("and its decoder trained on", MSE=F.mse_loss(anew, test))
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
        Of squares of a photograph that neither has seen: "PSNR, dB", the same of the squares "resized" at as many bits,
        "perplexity", "used"; nats a code of "shares of the codes" and of the "gated PixelCNN"; "bits a pixel" of codes
        by the latter. A picture of samples.
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
        "resized": psnr(resized(test, 4, 7), test).item(),
        "perplexity": perplexity(new, 128).item(),
        "used": len(new.unique()),
        "shares of the codes": shares_nats(shares(indices, 128), new),
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
        "prior_steps": 1200,
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
        "test_images": 5000,
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
        test_images: Test images that are scored; samples are compared with as many others.
        classifier_steps: Steps of the classifier's own training.

    Returns:
        "digits": as `compare_variants`. "codes": for each quantizer "MSE", "perplexity", "used" on the test images, and
        nats a code of "shares" and "shares by place". "priors": for each quantizer and prior "nats" a code and bits per
        dimension as `bits_per_dim`; "histogram": bits per dimension of `histogram_bits`. "samples": for each kind of
        picture Fréchet "distance" of features to other test images, mean "confidence". "accuracy": of that classifier
        on the test images. "photographs": as `photograph_codes`. Pictures of samples of both.
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
    (images, labels), (unseen, classes) = mnist(train=True), mnist(train=False)
    order = torch.randperm(len(unseen), generator=Generator().manual_seed(seed))[: 2 * test_images]
    others, classes = unseen[order[test_images:], None].to(device), classes[order[:test_images]]
    images, unseen = images[:, None].to(device), unseen[order[:test_images], None].to(device)
    results["histogram"] = histogram_bits(images[:20_000], unseen, 256)
    held_out = min(1000, len(images) // 10)
    train, validation = images[:-held_out] / 255, images[-held_out:] / 255
    test = unseen / 255
    pictures = {"test images": test}
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
        for kind, by_place in (("shares", False), ("shares by place", True)):
            p = shares(indices, quantizer.codes, by_place=by_place)
            results["codes"][name][kind] = shares_nats(p, new)
            pictures[f"{name}, {kind}"] = model.decode(draw_shares(p, samples, generator))
    classifier = train_classifier(
        images / 255, labels.to(device), steps=classifier_steps, batch_size=64
    )
    with torch.no_grad():
        right = classifier(test).argmax(1).cpu() == classes
    results["accuracy"] = right.double().mean()
    real = classifier.features(others / 255)
    for name, x in pictures.items():
        results["samples"][name] = {
            "confidence": confidence(classifier, x).mean(),
            "distance": frechet_distance(classifier.features(x), real),
        }
    shown = {name: x[:10, 0] for name, x in pictures.items()}
    return results, {
        "MNIST: test images, reconstructions and samples": image_rows(shown),
        "Squares of photographs: of the cat, which is held out; reconstructions; samples": drawn_squares,
    }
