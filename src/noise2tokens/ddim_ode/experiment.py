"""The table of the DDIM paper: one network, sampled with few and many steps, and with more and less noise."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from noise2tokens.ddim_ode.sampling import as_eps, chain_of, ddim_sample, sub_sequence
from noise2tokens.distribution_transforms.distances import frechet_distance
from noise2tokens.flow_vs_diffusion.diffusion import Network, NoiseSchedule, draw_steps, eps_loss
from noise2tokens.flow_vs_diffusion.paths import VariancePreservingPath
from noise2tokens.images import pad_to_32
from noise2tokens.networks import UNet, train_classifier
from noise2tokens.training import History, running_average, train

# The columns of the table: how much noise each step adds.
NOISES = {
    "η = 0": dict(eta=0.0),
    "η = 0.5": dict(eta=0.5),
    "η = 1": dict(eta=1.0),
    "σ̂": dict(eta=1.0, wide=True),
}


def train_denoiser(
    network: nn.Module,
    schedule: NoiseSchedule,
    data: Float[Tensor, "n *event"],
    *,
    steps: int,
    batch_size: int = 256,
    learning_rate: float = 2e-3,
    memory: int = 200,
) -> tuple[AveragedModel, History]:
    """Train a network by the loss of DDPM, while it puts out v: ε = √ᾱ v + √(1-ᾱ) x is what enters the loss.

    Where there is nothing but noise, ε is x itself. A network that has to put out ε must learn to copy its input first;
    one that puts out v gets the copy for nothing.

    Args:
        network: Takes x_n and n/T.
        schedule: The chain.
        data: Samples, on the device of the network.
        steps: Optimizer steps, over which the learning rate falls to zero along a cosine.
        batch_size: Samples a step.
        learning_rate: Adam's.
        memory: Over how many steps the weights are averaged.

    Returns:
        The averaged network, to be asked through `as_eps(..., "v")`, and the curve.
    """
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate, fused=True)
    average = running_average(network, 1 - 1 / memory)
    eps = as_eps(network, schedule, "v")
    history = train(
        network,
        lambda x: eps_loss(eps, schedule, x, torch.randn_like(x), draw_steps(schedule, x)),
        data,
        steps=steps,
        batch_size=batch_size,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        average=average,
        label="denoiser",
    )
    return average.eval(), history


def sampling_table(
    eps: Network,
    schedule: NoiseSchedule,
    start: Float[Tensor, "n *event"],
    counts: Sequence[int],
    score: Callable[[Float[Tensor, "n *event"]], Any],
    seed: int = 1,
) -> dict[str, list]:
    """Sample from the same starting noise with each number of steps and each amount of noise, and score the samples.

    The steps are evenly spaced, "leading", as in the paper for all data sets but CIFAR-10.

    Args:
        eps: Predicts the noise.
        schedule: The chain.
        start: Standard normal.
        counts: Numbers of evaluations.
        score: Returns what is to be kept of a set of samples.
        seed: Of the noise added on the way; not the one that `start` was drawn with, or both are the same numbers.

    Returns:
        For each key of `NOISES` the scores, in the order of `counts`.
    """
    table = {name: [] for name in NOISES}
    for count in counts:
        steps = sub_sequence(schedule.steps, count, "leading")
        for name, noise in NOISES.items():
            generator = torch.Generator(start.device).manual_seed(seed)
            samples = ddim_sample(eps, schedule, start, steps, generator=generator, **noise)
            table[name].append(score(samples))
    return table


def mnist_experiment(
    images: UInt8[Tensor, "n 28 28"],
    labels: Int[Tensor, "n"],
    test_images: UInt8[Tensor, "m 28 28"],
    device: torch.device,
    *,
    steps: int = 10_000,
    classifier_steps: int = 3000,
    batch_size: int = 256,
    width: int = 64,
    samples: int = 5000,
    counts: Sequence[int] = (10, 20, 50, 100, 1000),
    chunk: int = 1000,
) -> tuple[dict[str, list[float]], float, Float[Tensor, "k 1 32 32"]]:
    """Train a U-Net on MNIST, padded to 32×32, and fill the table with Fréchet distances of a classifier's features.

    Args:
        images: Training pixels, 0 to 255; the reference of all distances.
        labels: Their classes, for the classifier.
        test_images: Test pixels: their distance to the training images is the floor, for as many of them as `samples`.
        device: Where to run.
        steps: Optimizer steps of the U-Net.
        classifier_steps: Optimizer steps of the classifier.
        batch_size: Images a step.
        width: Of the U-Net.
        samples: Images drawn for each distance.
        counts: Numbers of evaluations.
        chunk: Images that go through the network at a time.

    Returns:
        The table, the floor, and up to 40 samples of DDIM with the first number of evaluations.

    Source: Song et al. 2021 (DDIM), section 5.1 and appendix D.2 (linear steps); data, network and features are
        others.
    """

    def scaled(pixels: Tensor) -> Tensor:
        return pad_to_32(pixels.to(device)) / 127.5 - 1

    data = scaled(images)
    schedule = chain_of(VariancePreservingPath(), 1000)
    classifier = train_classifier(
        data, labels.to(device), steps=classifier_steps, batch_size=batch_size
    )
    network, _ = train_denoiser(
        UNet(1, width).to(device),
        schedule,
        data,
        steps=steps,
        batch_size=batch_size,
        learning_rate=5e-4,
        memory=1000,
    )
    whole = as_eps(network, schedule, "v")

    def eps(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat(
            [whole(*part) for part in zip(x.split(chunk), t.split(chunk), strict=True)]
        )

    real = classifier.features(data)

    def distance(x: Tensor) -> float:
        return frechet_distance(classifier.features(x), real)

    generator = torch.Generator(device).manual_seed(0)
    start = torch.randn(samples, 1, 32, 32, generator=generator, device=device)
    table = sampling_table(eps, schedule, start, counts, distance)
    shown = ddim_sample(eps, schedule, start[:40], sub_sequence(1000, counts[0], "leading"))
    return table, distance(scaled(test_images[:samples])), shown
