"""Training one network by any of the losses, and the comparison of DDPM with flow matching on MNIST."""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn

from noise2tokens.distribution_transforms.distances import frechet_distance
from noise2tokens.flow_vs_diffusion.cnf import draw_probe, log_likelihood
from noise2tokens.flow_vs_diffusion.diffusion import (
    NoiseSchedule,
    ancestral_sample,
    draw_steps,
    eps_loss,
)
from noise2tokens.flow_vs_diffusion.flow_matching import cfm_loss, draw_times, predicted_velocity
from noise2tokens.flow_vs_diffusion.integrators import Velocity, dormand_prince, integrate
from noise2tokens.flow_vs_diffusion.paths import LinearPath, VariancePreservingPath
from noise2tokens.images import dequantize
from noise2tokens.networks import Classifier, UNet
from noise2tokens.nice import bits_per_dim
from noise2tokens.training import History, running_average, train


def fit(
    network: nn.Module,
    objective: Callable[[Tensor], Float[Tensor, ""]],
    draw: Callable[[int], Tensor],
    *,
    steps: int,
    batch_size: int = 256,
    learning_rate: float = 1e-2,
    average: nn.Module | None = None,
) -> History:
    """Train a network with Adam; the rate rises over the first twentieth and falls to zero along a cosine.

    Args:
        network: The network.
        objective: Maps a batch of data to the loss; it draws noise and times by itself.
        draw: Draws a batch of data.
        steps: Optimizer steps.
        batch_size: Samples a step.
        learning_rate: Adam's, at its highest.
        average: A running average of the weights, as for `train`.

    Returns:
        The curve.
    """
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps + 1, pct_start=0.05, cycle_momentum=False
    )
    return train(
        network,
        objective,
        draw,
        steps=steps,
        batch_size=batch_size,
        optimizer=optimizer,
        schedule=schedule,
        average=average,
        label=type(network).__name__,
    )


def mnist_experiment(
    images: Real[Tensor, "n height width"],
    test_images: Real[Tensor, "m height width"],
    classifier: Classifier,
    device: torch.device,
    *,
    kind: str,
    steps: int = 8000,
    batch_size: int = 256,
    width: int = 64,
    samples: int = 5000,
    scored: int = 1000,
    budgets: Sequence[int] = (2, 5, 10, 20, 50, 100),
) -> dict[str, Tensor | int | float | dict[int, float]]:
    """Train a U-Net on MNIST as DDPM or by flow matching, score test images, and sample with growing effort.

    Args:
        images: Training pixels, 0 to 255.
        test_images: Test pixels; the first `scored` are scored, all are what samples are compared with.
        classifier: Its features compare samples with test images; trained on pixels scaled to [-1, 1].
        device: Where to train.
        kind: "DDPM" (noise prediction, 1000 steps, linear schedule) or "flow matching" (linear path).
        steps: Optimizer steps.
        batch_size: Images a step.
        width: Of the U-Net.
        samples: Samples for each distance.
        scored: Test images whose likelihood is computed.
        budgets: Numbers of Euler steps.

    Returns:
        "bits" of each scored image; "evaluations" that one batch of likelihoods took; Fréchet "distances" of Euler
        samples by budget; "adaptive" distance and "adaptive evaluations" of dormand_prince; for DDPM the "ancestral"
        distance (as many evaluations as the chain has steps); "pictures", 40 samples of dormand_prince.

    Raises:
        ValueError: If the kind is unknown.
    """
    if kind not in ("DDPM", "flow matching"):
        raise ValueError(f'kind must be "DDPM" or "flow matching", got {kind!r}')
    ddpm, schedule = kind == "DDPM", NoiseSchedule.linear()
    path, start = (VariancePreservingPath(), 1 / schedule.steps) if ddpm else (LinearPath(), 0)
    pixels, test_pixels = images[:, None].to(device), test_images[:, None].to(device)
    network = UNet(1, width).to(device)
    average = running_average(network)

    def objective(x0: Tensor) -> Tensor:
        eps = torch.randn_like(x0)
        if ddpm:
            return eps_loss(network, schedule, x0, eps, draw_steps(schedule, x0))
        return cfm_loss(network, path, x0, eps, draw_times(x0))

    def draw(size: int) -> Tensor:
        rows = torch.randint(len(pixels), (size,), device=device)
        return 2 * dequantize(pixels[rows], 256, None) - 1

    fit(
        network,
        objective,
        draw,
        steps=steps,
        batch_size=batch_size,
        learning_rate=1e-3,
        average=average,
    )
    average.eval()
    velocity = predicted_velocity(average, path, "eps" if ddpm else "velocity")
    bits, evaluations = score_images(velocity, test_pixels[:scored], start)
    reference = classifier.features(2 * test_pixels / 255 - 1)

    def distance(drawn: Tensor) -> float:
        return frechet_distance(classifier.features(drawn.clamp(-1, 1)), reference)

    generator = torch.Generator(device).manual_seed(0)
    noise = torch.randn(samples, *pixels.shape[1:], generator=generator, device=device)
    with torch.no_grad():
        distances = {}
        for budget in budgets:
            times = torch.linspace(1, start, budget + 1)
            distances[budget] = distance(euler_end(velocity, noise, times))
        parts = [dormand_prince(velocity, part, 1, start) for part in noise.split(1000)]
        adaptive = torch.cat([part.x for part in parts])
    results = {
        "bits": bits,
        "evaluations": evaluations,
        "distances": distances,
        "adaptive": distance(adaptive),
        "adaptive evaluations": parts[0].evaluations,
        "pictures": adaptive[:40, 0],
    }
    if ddpm:
        chains = [ancestral_sample(average, schedule, part) for part in noise.split(1000)]
        results["ancestral"] = distance(torch.cat(chains))
    return results


def euler_end(
    velocity: Velocity, x: Float[Tensor, "batch *event"], times: Float[Tensor, "points"]
) -> Float[Tensor, "batch *event"]:
    """Follow a velocity with Euler's method, 1000 samples at a time, and keep only where they end."""
    return torch.cat([integrate(velocity, part, times)[-1] for part in x.split(1000)])


def score_images(
    velocity: Velocity,
    pixels: Real[Tensor, "n c h w"],
    start: float | int,
    batch_size: int = 500,
) -> tuple[Float[Tensor, "n"], int]:
    """Compute bits per dimension of dequantized images, with Hutchinson's estimate.

    Args:
        velocity: Of a model of pixels scaled to [-1, 1].
        pixels: 0 to 255.
        start: As in `log_likelihood`.
        batch_size: Images at a time.

    Returns:
        Bits per dimension of each image, from one draw of the dequantization noise and one probe; and the most
        evaluations that a batch took.
    """
    generator = torch.Generator(pixels.device).manual_seed(0)
    dim, bits, evaluations = pixels[0].numel(), [], []
    for part in pixels.split(batch_size):
        x = 2 * dequantize(part, 256, generator) - 1
        scored = log_likelihood(velocity, x, probe=draw_probe(x, generator), start=start)
        # The density of (v + u) / 256, on an interval half as long as [-1, 1], is twice as high in each dimension.
        bits.append(bits_per_dim(scored.log_prob + dim * math.log(2), dim, 256))
        evaluations.append(scored.evaluations)
    return torch.cat(bits), max(evaluations)
