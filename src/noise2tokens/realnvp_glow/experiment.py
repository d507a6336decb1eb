"""Training flows on images, walking between classes in their latents, and Glow on MNIST."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Real
from matplotlib.figure import Figure
from torch import Tensor

from noise2tokens.display import image_rows
from noise2tokens.images import dequantize, digits, mnist, pad_to_32, split
from noise2tokens.networks import confidence, train_classifier
from noise2tokens.nice import Flow, bits_per_dim, evaluate
from noise2tokens.realnvp_glow.multiscale import Glow, ImageRealNVP, initialize
from noise2tokens.training import History, fit, seed_everything


def fit_images(
    flow: Flow,
    images: Real[Tensor, "n c h w"],
    validation: Real[Tensor, "m c h w"],
    levels: int,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float = 1e-3,
    validate_every: int = 100,
) -> History:
    """Initialize a flow from data, then train it by maximum likelihood; keep the weights that validate best.

    Args:
        flow: The model, on the device of the images.
        images: Integer pixel values.
        validation: Held-out pixel values.
        levels: Number of values a pixel can take.
        steps: Optimizer steps; the rate rises over the first twentieth and falls to zero along a cosine.
        batch_size: Images a step.
        learning_rate: Adam's, at its highest.
        validate_every: Steps between validations.

    Returns:
        The curve, in nats a sample.
    """
    generator = torch.Generator(images.device).manual_seed(0)
    initialize(flow, dequantize(images[:512], levels, generator))
    return fit(
        flow,
        lambda v: -flow.log_prob(dequantize(v, levels)).mean(),
        images,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup=0.05,
        # The same noise at every validation, so that its values differ by the weights alone.
        validate=lambda: -evaluate(flow, validation, levels, draws=1).mean().item(),
        validate_every=validate_every,
        label=type(flow).__name__,
    )


@torch.no_grad()
def class_walk(
    flow: Flow,
    x: Float[Tensor, "n *event"],
    labels: Int[Tensor, "n"],
    source: int,
    target: int,
    amounts: Float[Tensor, "k"],
) -> Float[Tensor, "m k *event"]:
    """Move the samples of one class along the difference of two classes' mean latents, and decode them.

    Args:
        flow: A trained flow.
        x: Samples of several classes.
        labels: Their classes.
        source: The class to move.
        target: The class to move towards.
        amounts: How far: 0 gives the samples back, 1 moves their mean latent to that of the target.

    Returns:
        For each of the m samples of the source class, one sample for each amount.

    Raises:
        ValueError: If a class has no sample.

    Source: Kingma and Dhariwal 2018, section 6 (there with attributes of faces).
    """
    missing = [c for c in (source, target) if not (labels == c).any()]
    if missing:
        raise ValueError(f"no sample has the label {missing[0]}")
    z, _ = flow(x)
    moved = z[labels == source]
    direction = z[labels == target].mean(0) - moved.mean(0)
    return torch.stack([flow.inverse(moved + amount * direction) for amount in amounts], 1)


# Flows of 8×8 digits that are compared at equal steps; RealNVP has a few more parameters than the others.
DIGIT_FLOWS: dict[str, Callable[[], Flow]] = {
    "RealNVP": lambda: ImageRealNVP((1, 8, 8), levels=2, width=24),
    "Glow, reverse": lambda: Glow((1, 8, 8), 2, 4, 16, permutation="reverse"),
    "Glow, shuffle": lambda: Glow((1, 8, 8), 2, 4, 16, permutation="shuffle"),
    "Glow, 1×1": lambda: Glow((1, 8, 8), 2, 4, 16),
    "Glow, 1×1, tanh": lambda: Glow((1, 8, 8), 2, 4, 16, scale="tanh"),
}


def compare_on_digits(
    seed: int, *, steps: int, batch_size: int = 64
) -> tuple[dict[str, Flow], dict[str, History], dict[str, Float[Tensor, "360"]]]:
    """Train the flows of `DIGIT_FLOWS` with the same steps, and score the test digits.

    Args:
        seed: Of the split, and of each training.
        steps: Optimizer steps of each.
        batch_size: Images a step.

    Returns:
        The flows, their curves, and bits per dimension of the 360 test digits, by name.
    """
    pixels = digits()[0][:, None].long()
    training, held_out, testing = (
        pixels[part] for part in split(len(pixels), (1293, 144, 360), seed)
    )
    flows, curves, bits = {}, {}, {}
    for name, build in DIGIT_FLOWS.items():
        torch.manual_seed(seed)
        flows[name] = build()
        curves[name] = fit_images(
            flows[name],
            training,
            held_out,
            17,
            steps=steps,
            batch_size=batch_size,
            learning_rate=1e-2,
            validate_every=60,
        )
        bits[name] = bits_per_dim(evaluate(flows[name], testing, 17), 64, 17)
    return flows, curves, bits


BUDGETS = {
    "long": {
        "digit_seeds": 3,
        "digit_steps": 300,
        "permutations": ("conv",),
        "steps": 1500,
        "batch_size": 64,
        "depth": 4,
        "width": 64,
        "held_out": 1000,
        "test_images": 1000,
        "samples": 500,
        "classifier_steps": 1000,
    },
    "full": {
        "digit_seeds": 5,
        "digit_steps": 1000,
        "permutations": ("reverse", "shuffle", "conv"),
        "steps": 6000,
        "batch_size": 256,
        "depth": 8,
        "width": 256,
        "held_out": 10_000,
        "test_images": 10_000,
        "samples": 5000,
        "classifier_steps": 3000,
    },
}


def full_scale(
    device: torch.device,
    *,
    seed: int,
    digit_seeds: int,
    digit_steps: int,
    permutations: Sequence[str],
    steps: int,
    batch_size: int,
    depth: int,
    width: int,
    held_out: int,
    test_images: int,
    samples: int,
    classifier_steps: int,
) -> tuple[dict[str, Any], dict[str, Figure]]:
    """Compare flows of digits over seeds; train a Glow of three levels on MNIST, padded to 32×32, and score it.

    Args:
        device: Where to train on MNIST; the digits stay on the CPU.
        seed: The first seed of the digits, and the seed of each training on MNIST.
        digit_seeds: Seeds of the comparison on digits.
        digit_steps: Its optimizer steps, for each model.
        permutations: As in `glow_step`; a model for each. The last one is sampled from.
        steps: Optimizer steps of each model.
        batch_size: Images a step.
        depth: Steps of flow between two squeezes.
        width: Channels of the hidden layers.
        held_out: The last training images, which choose the weights and are not trained on.
        test_images: Test images that are scored.
        samples: Samples at each temperature for a classifier to read.
        classifier_steps: Steps of the classifier's own training.

    Returns:
        "digits": for each of `DIGIT_FLOWS` the mean "bits" per dimension and the last training "loss" in bits, lists
        over seeds. For each permutation "bits" per dimension of the test images of MNIST with "standard error", and the
        curve of "validation bits". The border is paid for as if it had to be coded too, and the bits are shared among
        an image's own 784 pixels. By temperature, the share of samples that "overflow" on the way back, and the mean
        "confidence" of the classifier in the others and in test images.
        Pictures of samples and of fours that become nines.

    Source: Kingma and Dhariwal 2018, section 3; the padding is that of the released code.
    """
    (images, labels), (unseen, _) = mnist(train=True), mnist(train=False)
    labels, unseen = labels.to(device), unseen[:test_images].to(device)
    pixels, test = pad_to_32(images.to(device)), pad_to_32(unseen)
    own, border = images[0].numel(), pixels[0].numel() - images[0].numel()

    def bits(log_prob: Tensor) -> Tensor:
        return bits_per_dim(log_prob - border * math.log(256), own, 256)

    results: dict[str, Any] = {"digits": _digits_over_seeds(seed, digit_seeds, digit_steps)}
    for permutation in permutations:
        seed_everything(seed)
        flow = Glow((1, 32, 32), 3, depth, width, permutation=permutation).to(device)
        history = fit_images(
            flow,
            pixels[:-held_out],
            pixels[-held_out:],
            256,
            steps=steps,
            batch_size=batch_size,
            validate_every=max(1, steps // 15),
        )
        scores = bits(evaluate(flow, test, 256, draws=2, seed=seed))
        results[permutation] = {
            "bits": scores.mean(),
            "standard error": scores.std() / len(scores) ** 0.5,
            "validation bits": bits(-torch.tensor(history.validation)),
        }
    classifier = train_classifier(
        images[:, None].to(device) / 255, labels, steps=classifier_steps, batch_size=64
    )
    drawn = {t: flow.sample(samples, t)[:, :, 2:-2, 2:-2].clamp(0, 1) for t in (1.0, 0.7)}
    read = {f"T = {t:g}": x for t, x in drawn.items()} | {"test images": unseen[:, None] / 255}
    # The inverse of a deep flow can overflow; such samples are counted, and cannot be read.
    finite = {name: x.flatten(1).isfinite().all(1) for name, x in read.items()}
    results["overflow"] = {name: 1 - kept.double().mean() for name, kept in finite.items()}
    results["confidence"] = {
        name: confidence(classifier, x[finite[name]]).mean()
        for name, x in read.items()
        if finite[name].any()
    }
    rows = {"test images": read["test images"][:10, 0]}
    for t, x in drawn.items():
        shown = x[:20, 0].nan_to_num()
        rows |= {f"samples at T = {t:g}": shown[:10], f"more at T = {t:g}": shown[10:]}
    some = dequantize(pixels[:2000], 256)
    walked = class_walk(flow, some, labels[:2000], 4, 9, torch.linspace(0, 1, 10))[:4]
    ways = {
        f"from 4 to 9, {i + 1}": way[:, 0, 2:-2, 2:-2].nan_to_num() for i, way in enumerate(walked)
    }
    return results, {
        "MNIST: test images above, samples of Glow below": image_rows(rows),
        "Fours of MNIST move along the difference of two classes' mean latents": image_rows(ways),
    }


def _digits_over_seeds(seed: int, seeds: int, steps: int) -> dict[str, dict[str, list[float]]]:
    runs = [compare_on_digits(each, steps=steps) for each in range(seed, seed + seeds)]
    tail = max(1, steps // 6)
    return {
        name: {
            "bits": [bits[name].mean().item() for _, _, bits in runs],
            "loss": [
                bits_per_dim(-torch.tensor(curves[name].losses[-tail:]), 64, 17).mean().item()
                for _, curves, _ in runs
            ],
        }
        for name in DIGIT_FLOWS
    }
