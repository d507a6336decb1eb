"""The table of the DDIM paper: one network, sampled with few and many steps, and with more and less noise."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from noise2tokens.ddim_ode.sampling import as_eps, chain_of, ddim_sample, sub_sequence
from noise2tokens.display import image_rows
from noise2tokens.distribution_transforms.distances import frechet_distance
from noise2tokens.flow_vs_diffusion.diffusion import Network, NoiseSchedule, draw_steps, eps_loss
from noise2tokens.flow_vs_diffusion.paths import VariancePreservingPath
from noise2tokens.images import mnist, pad_to_32
from noise2tokens.networks import UNet, confidence, train_classifier
from noise2tokens.training import History, fit, running_average

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
    average = running_average(network, 1 - 1 / memory)
    eps = as_eps(network, schedule, "v")
    history = fit(
        network,
        lambda x: eps_loss(eps, schedule, x, torch.randn_like(x), draw_steps(schedule, x)),
        data,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
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
    *,
    spacing: str,
    seed: int = 1,
) -> dict[str, list]:
    """Sample from the same starting noise with each number of steps and each amount of noise, and score the samples.

    Args:
        eps: Predicts the noise.
        schedule: The chain.
        start: Standard normal.
        counts: Numbers of evaluations.
        score: Returns what is to be kept of a set of samples.
        spacing: Of the steps, as for `sub_sequence`: the paper has "leading" for all data sets but CIFAR-10.
        seed: Of the noise added on the way; not the one that `start` was drawn with, or both are the same numbers.

    Returns:
        For each key of `NOISES` the scores, in the order of `counts`.
    """
    table = {name: [] for name in NOISES}
    for count in counts:
        steps = sub_sequence(schedule.steps, count, spacing)
        for name, noise in NOISES.items():
            generator = torch.Generator(start.device).manual_seed(seed)
            samples = ddim_sample(eps, schedule, start, steps, generator=generator, **noise)
            table[name].append(score(samples))
    return table


BUDGETS = {
    "long": {
        "steps": 1800,
        "batch_size": 64,
        "width": 16,
        "samples": 500,
        "counts": (5, 10, 20),
        "test_images": 10_000,
        "classifier_steps": 1000,
    },
    "full": {
        "steps": 10_000,
        "batch_size": 256,
        "width": 64,
        "samples": 5000,
        "counts": (5, 10, 20, 50, 100, 1000),
        "test_images": 10_000,
        "classifier_steps": 3000,
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
    counts: Sequence[int],
    test_images: int,
    classifier_steps: int,
) -> tuple[dict[str, Any], dict[str, Figure]]:
    """Train a U-Net on MNIST, padded to 32×32, and fill the paper's table on two grids of steps.

    Args:
        device: Where to run.
        seed: Of the noise.
        steps: Optimizer steps of the U-Net.
        batch_size: Images a step.
        width: Of the U-Net.
        samples: Images drawn for each entry of the table.
        counts: Numbers of evaluations.
        test_images: Test images, the reference of all distances.
        classifier_steps: Optimizer steps of the classifier.

    Returns:
        "counts"; for both spacings and each key of `NOISES`, lists over the counts: Fréchet "distance" of a
        classifier's features to the test images, and the classifier's mean "confidence"; the same two for as many
        training images as there are samples ("training images"). A picture of samples.

    Source: Song et al. 2021 (DDIM), section 5.1 and appendix D.2 (linear steps); data, network and features are
        others.
    """
    (images, labels), (unseen, _) = mnist(train=True), mnist(train=False)

    def scaled(pixels: Tensor) -> Tensor:
        return pad_to_32(pixels.to(device)) / 127.5 - 1

    data, test = scaled(images), scaled(unseen[:test_images])
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
        learning_rate=1e-3,
        memory=max(1, steps // 15),
    )
    eps = in_parts(as_eps(network, schedule, "v"))
    real = classifier.features(test)

    def judge(x: Tensor) -> dict[str, float]:
        x = x.clamp(-1, 1)
        return {
            "distance": frechet_distance(classifier.features(x), real),
            "confidence": confidence(classifier, x).mean().item(),
        }

    generator = torch.Generator(device).manual_seed(seed)
    start = torch.randn(samples, 1, 32, 32, generator=generator, device=device)
    results: dict[str, Any] = {"counts": list(counts)}
    for spacing in ("leading", "trailing"):
        table = sampling_table(eps, schedule, start, counts, judge, spacing=spacing, seed=seed + 1)
        results[spacing] = {
            name: {key: [entry[key] for entry in column] for key in ("distance", "confidence")}
            for name, column in table.items()
        }
    chosen = torch.randperm(len(data), device=device)[:samples]
    results["training images"] = judge(data[chosen])
    most = sub_sequence(schedule.steps, counts[-1])
    rows = {"test images": test[:10]}
    for name, noise in NOISES.items():
        generator = torch.Generator(device).manual_seed(seed + 1)
        drawn = ddim_sample(eps, schedule, start[:10], most, generator=generator, **noise)
        rows[f"{name}, {counts[-1]} trailing steps"] = drawn
    pixels = {name: (x[:, 0, 2:-2, 2:-2] + 1) / 2 for name, x in rows.items()}
    caption = (
        "MNIST: test images above; below, samples from the same noise, each row with its own η"
    )
    return results, {caption: image_rows(pixels)}


def in_parts(network: Network, size: int = 500) -> Network:
    """Let a network see no more than a number of samples at a time, for the memory's sake."""

    def parts(x: Tensor, t: Tensor) -> Tensor:
        pairs = zip(x.split(size), t.split(size), strict=True)
        return torch.cat([network(*pair) for pair in pairs])

    return parts
