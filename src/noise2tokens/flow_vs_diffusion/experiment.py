"""The comparison of DDPM with flow matching on MNIST: one network, one budget, three ways to train it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Real, UInt8
from matplotlib.figure import Figure
from torch import Tensor

from noise2tokens.display import image_rows
from noise2tokens.distribution_transforms.distances import frechet_distance
from noise2tokens.flow_vs_diffusion.cnf import draw_probe, log_likelihood
from noise2tokens.flow_vs_diffusion.diffusion import (
    Network,
    NoiseSchedule,
    ancestral_sample,
    draw_steps,
    eps_loss,
)
from noise2tokens.flow_vs_diffusion.flow_matching import cfm_loss, draw_times, predicted_velocity
from noise2tokens.flow_vs_diffusion.integrators import Velocity, dormand_prince, integrate
from noise2tokens.flow_vs_diffusion.paths import LinearPath, VariancePreservingPath, per_sample
from noise2tokens.images import dequantize, mnist
from noise2tokens.networks import UNet, confidence, train_classifier
from noise2tokens.nice import bits_per_dim
from noise2tokens.training import fit, running_average, seed_everything

CHAIN = NoiseSchedule.linear()
# What is trained on MNIST: the path, what the network puts out, and where its time starts.
KINDS = ("DDPM", "DDPM, v output", "flow matching")

BUDGETS = {
    "long": {
        "steps": 1000,
        "batch_size": 64,
        "width": 16,
        "samples": 500,
        "scored": 100,
        "test_images": 10_000,
        "classifier_steps": 1000,
        "counts": (5, 10, 20, 50),
        "chain_samples": 0,
        "tolerance": 1e-3,
    },
    "full": {
        "steps": 8000,
        "batch_size": 256,
        "width": 64,
        "samples": 5000,
        "scored": 1000,
        "test_images": 10_000,
        "classifier_steps": 3000,
        "counts": (2, 5, 10, 20, 50, 100),
        "chain_samples": 5000,
        "tolerance": 1e-4,
    },
}


def full_scale(
    device: torch.device,
    *,
    seed: int,
    steps: int,
    batch_size: int,
    width: int,
    samples: int,
    scored: int,
    test_images: int,
    classifier_steps: int,
    counts: Sequence[int],
    chain_samples: int,
    tolerance: float,
) -> tuple[dict[str, Any], dict[str, Figure]]:
    """Train one U-Net on MNIST in three ways with one budget, score test images, and sample with growing effort.

    Args:
        device: Where to train.
        seed: Of the noise that all samples start from, and of each training.
        steps: Optimizer steps of each network.
        batch_size: Images a step.
        width: Of the U-Net.
        samples: Samples for each distance.
        scored: The first test images, whose likelihood is computed.
        test_images: Test images, what samples are compared with.
        classifier_steps: Optimizer steps of the classifier.
        counts: Numbers of Euler steps.
        chain_samples: Samples of DDPM's own chain of 1000 steps; 0 leaves it out.
        tolerance: Relative and absolute, of the adaptive solver.

    Returns:
        For each of `KINDS` Fréchet "distances" of Euler samples to the test images, by number of steps; the distance of
        "adaptive" samples, with "adaptive evaluations"; "bits" per dimension with "standard error" and the number of
        "evaluations" that a batch of likelihoods took; where the solver gives up, the reason ("stiff") in place of what
        it could not find; the classifier's mean "confidence" in adaptive samples, or else in those of most Euler steps;
        where it was asked for, the distance of "ancestral" samples. For "training images" the floor of the distance and
        the confidence, of as many images as there are samples. A picture of samples.
    """
    (images, labels), (unseen, _) = mnist(train=True), mnist(train=False)
    pixels, test_pixels = images[:, None].to(device), unseen[:test_images, None].to(device)
    scaled, test = pixels / 127.5 - 1, test_pixels / 127.5 - 1
    classifier = train_classifier(
        scaled, labels.to(device), steps=classifier_steps, batch_size=batch_size
    )
    real = classifier.features(test)

    def distance(x: Tensor) -> float:
        return frechet_distance(classifier.features(x.clamp(-1, 1)), real)

    def read(x: Tensor) -> float:
        return confidence(classifier, x.clamp(-1, 1)).mean().item()

    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.randn(samples, *pixels.shape[1:], generator=generator, device=device)
    chosen = scaled[torch.randperm(len(scaled), device=device)[:samples]]
    results: dict[str, Any] = {
        "training images": {"distance": distance(chosen), "confidence": read(chosen)}
    }
    rows = {"test images": test[:10]}
    for kind in KINDS:
        seed_everything(seed)
        eps, velocity, start = train_kind(
            kind, pixels, steps=steps, batch_size=batch_size, width=width
        )
        with torch.no_grad():
            ends = {n: euler_end(velocity, noise, torch.linspace(1, start, n + 1)) for n in counts}
        results[kind] = {"distances": {str(n): distance(x) for n, x in ends.items()}}
        shown = ends[counts[-1]]
        # A network that puts out noise can be too rough near the data for an adaptive solver: that is a result, too.
        try:
            with torch.no_grad():
                parts = [
                    dormand_prince(velocity, part, 1, start, tolerance, tolerance)
                    for part in noise.split(500)
                ]
            shown = torch.cat([part.x for part in parts])
            results[kind] |= {
                "adaptive": distance(shown),
                "adaptive evaluations": parts[0].evaluations,
            }
            bits, evaluations = score_images(
                velocity, test_pixels[:scored], start, tolerance=tolerance, seed=seed
            )
            results[kind] |= {
                "bits": bits.mean(),
                "standard error": bits.std() / len(bits) ** 0.5,
                "evaluations": evaluations,
            }
        except FloatingPointError as error:
            results[kind]["stiff"] = str(error)
        results[kind]["confidence"] = read(shown)
        if chain_samples and eps is not None:
            parts = noise[:chain_samples].split(500)
            chained = torch.cat([ancestral_sample(eps, CHAIN, part) for part in parts])
            results[kind]["ancestral"] = distance(chained)
        way = "adaptive solver" if "adaptive" in results[kind] else f"{counts[-1]} Euler steps"
        rows[f"{kind}, {way}"] = shown[:10]
    pictures = {name: (x[:, 0] + 1) / 2 for name, x in rows.items()}
    caption = "MNIST: test images above, samples below, from the same noise"
    return results, {caption: image_rows(pictures)}


def train_kind(
    kind: str, pixels: UInt8[Tensor, "n 1 height width"], *, steps: int, batch_size: int, width: int
) -> tuple[Network | None, Velocity, float]:
    """Train a U-Net on dequantized pixels, scaled to [-1, 1].

    Args:
        kind: One of `KINDS`: DDPM with 1000 steps and a linear schedule, the same with a network that puts out v, or
            flow matching on the linear path.
        pixels: 0 to 255, on the device to train on.
        steps: Optimizer steps.
        batch_size: Images a step.
        width: Of the U-Net.

    Returns:
        The noise that the averaged network predicts (None for flow matching), the velocity of its flow, and the time at
        which that flow ends.

    Raises:
        ValueError: If the kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    path = LinearPath() if kind == "flow matching" else VariancePreservingPath()
    network = UNet(1, width).to(pixels.device)
    average = running_average(network, 1 - 15 / max(steps, 30))

    def noise_of(network: Network) -> Network:
        """ε, put out as it is or computed from v = α ε - σ x_0."""
        if kind == "DDPM":
            return network

        def eps(x: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = (per_sample(f(t), x) for f in (path.alpha, path.sigma))
            return alpha * network(x, t) + sigma * x

        return eps

    def objective(x0: Tensor) -> Tensor:
        noise = torch.randn_like(x0)
        if kind == "flow matching":
            return cfm_loss(network, path, x0, noise, draw_times(x0))
        return eps_loss(noise_of(network), CHAIN, x0, noise, draw_steps(CHAIN, x0))

    def draw(size: int) -> Tensor:
        rows = torch.randint(len(pixels), (size,), device=pixels.device)
        return 2 * dequantize(pixels[rows], 256) - 1

    options = {"steps": steps, "batch_size": batch_size, "learning_rate": 1e-3, "warmup": 0.05}
    fit(network, objective, draw, average=average, label=kind, **options)
    average.eval()
    if kind == "flow matching":
        return None, predicted_velocity(average, path, "velocity"), 0.0
    eps = noise_of(average)
    return eps, predicted_velocity(eps, path, "eps"), 1 / CHAIN.steps


def euler_end(
    velocity: Velocity, x: Float[Tensor, "batch *event"], times: Float[Tensor, "points"]
) -> Float[Tensor, "batch *event"]:
    """Follow a velocity with Euler's method, 500 samples at a time, and keep only where they end."""
    return torch.cat([integrate(velocity, part, times)[-1] for part in x.split(500)])


def score_images(
    velocity: Velocity,
    pixels: Real[Tensor, "n c h w"],
    start: float | int,
    *,
    tolerance: float = 1e-5,
    seed: int = 0,
    batch_size: int = 500,
) -> tuple[Float[Tensor, "n"], int]:
    """Compute bits per dimension of dequantized images, with Hutchinson's estimate.

    Args:
        velocity: Of a model of pixels scaled to [-1, 1].
        pixels: 0 to 255.
        start: As in `log_likelihood`.
        tolerance: Relative and absolute, of the solver.
        seed: Of the dequantization noise and the probes.
        batch_size: Images at a time.

    Returns:
        Bits per dimension of each image, from one draw of the dequantization noise and one probe; and the most
        evaluations that a batch took.
    """
    generator = torch.Generator(pixels.device).manual_seed(seed)
    dim, bits, evaluations = pixels[0].numel(), [], []
    for part in pixels.split(batch_size):
        x = 2 * dequantize(part, 256, generator) - 1
        probe = draw_probe(x, generator)
        scored = log_likelihood(
            velocity, x, probe=probe, start=start, rtol=tolerance, atol=tolerance
        )
        # The density of (v + u) / 256, on an interval half as long as [-1, 1], is twice as high in each dimension.
        bits.append(bits_per_dim(scored.log_prob + dim * math.log(2), dim, 256))
        evaluations.append(scored.evaluations)
    return torch.cat(bits), max(evaluations)
