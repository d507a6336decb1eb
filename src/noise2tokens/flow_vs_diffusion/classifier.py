"""A small classifier whose features serve to compare sets of images.

Published Fréchet inception distances use a network trained on ImageNet. Here a network trained on the very data takes
its place: distances of its features order models of this book, and cannot be compared with published values.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from noise2tokens.training import train


class Classifier(nn.Module):
    """Three strided convolutions and a linear layer.

    Args:
        channels: Channels of the images.
        classes: Number of classes.
        width: Number of features.
    """

    def __init__(self, channels: int = 1, classes: int = 10, width: int = 64):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width // 2, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * width, width),
            nn.ReLU(),
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch classes"]:
        """Return logits."""
        return self.head(self.body(x))

    @torch.no_grad()
    def features(
        self, x: Float[Tensor, "n c h w"], batch_size: int = 1000
    ) -> Float[Tensor, "n width"]:
        """Return what the last layer sees, for any number of images."""
        return torch.cat([self.body(part) for part in x.split(batch_size)])


def train_classifier(
    images: Float[Tensor, "n c h w"],
    labels: Int[Tensor, "n"],
    *,
    steps: int = 3000,
    batch_size: int = 256,
) -> Classifier:
    """Train the classifier on labelled images.

    Args:
        images: As the generative model sees them, on the device to train on.
        labels: 0..classes-1.
        steps: Optimiser steps.
        batch_size: Images a step.

    Returns:
        The classifier, in `eval` mode.
    """
    classifier = Classifier(images.shape[1], int(labels.max()) + 1).to(images.device)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-3)

    def draw(size: int) -> Tensor:
        return torch.randint(len(images), (size,), device=images.device)

    train(
        classifier,
        lambda rows: F.cross_entropy(classifier(images[rows]), labels[rows]),
        draw,
        steps=steps,
        batch_size=batch_size,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        label="classifier",
    )
    return classifier
