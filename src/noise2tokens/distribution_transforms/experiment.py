"""Autoencoders and a GAN on MNIST: the likelihood of the IWAE paper's model, and samples that a classifier reads."""

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from noise2tokens.display import image_rows
from noise2tokens.distribution_transforms import gan, vae
from noise2tokens.distribution_transforms.distances import frechet_distance
from noise2tokens.images import mnist
from noise2tokens.networks import confidence, train_classifier
from noise2tokens.training import seed_everything

BUDGETS = {
    "long": {
        "steps": {1: 12_000, 50: 1500},
        "batch_size": 50,
        "test_images": 1000,
        "test_draws": 500,
        "class_steps": 5000,
        "gan_steps": 2500,
        "samples": 1000,
        "classifier_steps": 1000,
    },
    "full": {
        "steps": {1: 100_000, 50: 100_000},
        "batch_size": 250,
        "test_images": 10_000,
        "test_draws": 5000,
        "class_steps": 20_000,
        "gan_steps": 10_000,
        "samples": 10_000,
        "classifier_steps": 3000,
    },
}


def full_scale(
    device: torch.device,
    *,
    seed: int,
    steps: dict[int, int],
    batch_size: int,
    test_images: int,
    test_draws: int,
    class_steps: int,
    gan_steps: int,
    samples: int,
    classifier_steps: int,
) -> tuple[dict[str, Any], dict[str, Figure]]:
    """Train the IWAE paper's model with several training bounds, a conditional VAE and a WGAN-GP on MNIST.

    Args:
        device: Where to train.
        seed: Of each training, and of the binarized test images.
        steps: Optimizer steps for each K of the training bound; K = 1 is a VAE.
        batch_size: Images a step.
        test_images: Test images that are scored; what samples are compared with.
        test_draws: K of the bound by which they are scored.
        class_steps: Steps of the conditional VAE.
        gan_steps: Generator steps of the WGAN-GP, with five critic steps each.
        samples: Samples of each model for the classifier to read.
        classifier_steps: Steps of the classifier's own training.

    Returns:
        "bounds": for each K mean "-ELBO" and "-L" (the bound with `test_draws` draws) in nats with the "standard error"
        of the latter. "samples": for each model and for training images Fréchet "distance" of features to the test
        images, and mean "confidence". A picture of samples: means of the decoder for autoencoders.
    """
    (images, labels), (unseen, _) = mnist(train=True), mnist(train=False)
    unseen = unseen[:test_images]
    results: dict[str, Any] = {"bounds": {}, "samples": {}}
    drawn: dict[str, Tensor] = {}
    for k, length in steps.items():
        seed_everything(seed)
        model, _, elbo, bound = vae.mnist_experiment(
            images,
            unseen,
            device,
            train_draws=k,
            steps=length,
            batch_size=batch_size,
            test_draws=test_draws,
            seed=seed,
        )
        results["bounds"][str(k)] = {
            "-ELBO": -elbo.mean(),
            "-L": -bound.mean(),
            "standard error": bound.std() / len(bound) ** 0.5,
        }
        drawn["VAE" if k == 1 else f"IWAE, K = {k}"] = model.sample(samples)
    seed_everything(seed)
    by_class = vae.mnist_classes_experiment(
        images, labels, device, steps=class_steps, batch_size=batch_size
    )
    classes = torch.arange(samples, device=device) % 10
    drawn["conditional VAE, 0 to 9"] = by_class.sample(samples, classes)
    seed_everything(seed)
    adversarial, _ = gan.mnist_experiment(images, device, steps=gan_steps, batch_size=batch_size)
    drawn["WGAN-GP"] = adversarial.sample(samples)
    classifier = train_classifier(
        images[:, None].to(device) / 255,
        labels.to(device),
        steps=classifier_steps,
        batch_size=64,
    )
    test = unseen[:, None].to(device) / 255
    real = classifier.features(test)
    chosen = images[torch.randperm(len(images))[:samples], None].to(device) / 255
    pictures = {"training images": chosen}
    pictures |= {name: x.detach().view(-1, 1, 28, 28) for name, x in drawn.items()}
    for name, x in pictures.items():
        results["samples"][name] = {
            "distance": frechet_distance(classifier.features(x), real),
            "confidence": confidence(classifier, x).mean(),
        }
    rows = {"test images": test[:10, 0]}
    rows |= {name: x[:10, 0] for name, x in pictures.items() if name != "training images"}
    return results, {"MNIST: test images above, samples below": image_rows(rows)}
