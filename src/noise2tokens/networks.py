"""Networks that several chapters use and none teaches: for points, for images, with and without a time beside them.

`TimeMLP` and `UNet` are called as network(x, t) with x (batch, ...) and t (batch,) in [0, 1], and return the shape of
x; what they predict (noise, velocity, ...) is decided by the loss they are trained with. `Classifier` judges what a
generative model draws: published Fréchet inception distances use a network trained on ImageNet, and here a network
trained on the very data takes its place. Its distances and confidences order models of this book, and cannot be
compared with published values.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from noise2tokens.training import fit

FASTEST = 30
POINT_FEATURES = 16


def mlp(
    inputs: int,
    hidden: Sequence[int],
    outputs: int,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Build a fully connected network with a linear output.

    Args:
        inputs: Size of the input.
        hidden: Widths of the hidden layers.
        outputs: Size of the output.
        activation: Makes the module that follows each hidden layer.

    Returns:
        The network.
    """
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), activation()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def time_features(t: Float[Tensor, "batch"], width: int) -> Float[Tensor, "batch width"]:
    """Describe a time by cosines and sines of several frequencies, so that a network can bend with it.

    DDPM's own features are made for a thousand separate steps: their fastest one turns through 1000 radians. A network
    that is handed to a solver of differential equations should be smooth in t, so here the fastest turns through 30.

    Args:
        t: Times in [0, 1].
        width: Number of features, even.

    Returns:
        Cosines and sines of ω t, ω rising geometrically from 1 to 30.

    Source: after Ho et al. 2020, appendix B, with other frequencies.
    """
    frequencies = torch.logspace(0, math.log10(FASTEST), width // 2, device=t.device)
    angles = t[:, None] * frequencies.to(t)
    return torch.cat([angles.cos(), angles.sin()], 1)


class TimeMLP(nn.Module):
    """A network for points.

    Args:
        dim: Number of coordinates.
        width: Width of the hidden layers.
        layers: Number of hidden layers.
    """

    def __init__(self, dim: int, width: int = 128, layers: int = 3):
        super().__init__()
        sizes = [dim + POINT_FEATURES] + [width] * layers
        hidden = [
            part
            for a, b in zip(sizes, sizes[1:], strict=False)
            for part in (nn.Linear(a, b), nn.SiLU())
        ]
        self.body = nn.Sequential(*hidden, nn.Linear(width, dim))

    def forward(
        self, x: Float[Tensor, "batch dim"], t: Float[Tensor, "batch"]
    ) -> Float[Tensor, "batch dim"]:
        """Return one vector for each point."""
        return self.body(torch.cat([x, time_features(t, POINT_FEATURES)], 1))


class ResidualBlock(nn.Module):
    """Two convolutions, with the time added in between, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, time_width: int):
        super().__init__()
        self.first = nn.Sequential(
            nn.GroupNorm(min(8, inputs), inputs),
            nn.SiLU(),
            nn.Conv2d(inputs, outputs, 3, padding=1),
        )
        self.time = nn.Linear(time_width, outputs)
        self.second = nn.Sequential(
            nn.GroupNorm(min(8, outputs), outputs),
            nn.SiLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(
        self, x: Float[Tensor, "batch c_in h w"], time: Float[Tensor, "batch time_width"]
    ) -> Float[Tensor, "batch c_out h w"]:
        """Return the shortcut plus what the convolutions add to it."""
        h = self.first(x) + self.time(time)[:, :, None, None]
        return self.shortcut(x) + self.second(h)


class UNet(nn.Module):
    """A small U-Net: down to half and a quarter of the size, up again, with what was seen on the way down at hand.

    Args:
        channels: Channels of the images, whose height and width are divisible by 4.
        width: Channels at full size; twice as many below, a multiple of 8.

    Source: Ronneberger et al. 2015; Ho et al. 2020, appendix B, smaller and without attention.
    """

    def __init__(self, channels: int, width: int = 32):
        super().__init__()
        self.width = width
        time_width = 4 * width
        self.time = nn.Sequential(
            nn.Linear(width, time_width), nn.SiLU(), nn.Linear(time_width, time_width)
        )
        self.start = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.ModuleList(
            ResidualBlock(a, b, time_width)
            for a, b in ((width, width), (width, 2 * width), (2 * width, 2 * width))
        )
        self.middle = ResidualBlock(2 * width, 2 * width, time_width)
        self.up = nn.ModuleList(
            ResidualBlock(a, b, time_width)
            for a, b in ((4 * width, 2 * width), (4 * width, width), (2 * width, width))
        )
        self.end = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1)
        )
        # The network starts by predicting 0, the mean of what it is asked for.
        nn.init.zeros_(self.end[-1].weight)
        nn.init.zeros_(self.end[-1].bias)

    def forward(
        self, x: Float[Tensor, "batch c h w"], t: Float[Tensor, "batch"]
    ) -> Float[Tensor, "batch c h w"]:
        """Return one image for each.

        Raises:
            ValueError: If height or width is not divisible by 4.
        """
        if x.shape[-1] % 4 or x.shape[-2] % 4:
            raise ValueError(f"height and width must be divisible by 4, got {tuple(x.shape[-2:])}")
        time = F.silu(self.time(time_features(t, self.width)))
        h = self.start(x)
        skips = []
        for block in self.down:
            h = block(h, time)
            skips.append(h)
            if block is not self.down[-1]:
                h = F.avg_pool2d(h, 2)
        h = self.middle(h, time)
        for block in self.up:
            h = block(torch.cat([h, skips.pop()], 1), time)
            if block is not self.up[-1]:
                h = F.interpolate(h, scale_factor=2)
        return self.end(h)


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
    """Train the classifier on labeled images.

    Args:
        images: As the generative model sees them, on the device to train on.
        labels: 0..classes-1.
        steps: Optimizer steps.
        batch_size: Images a step.

    Returns:
        The classifier, in `eval` mode.
    """
    classifier = Classifier(images.shape[1], int(labels.max()) + 1).to(images.device)

    def draw(size: int) -> Tensor:
        return torch.randint(len(images), (size,), device=images.device)

    fit(
        classifier,
        lambda rows: F.cross_entropy(classifier(images[rows]), labels[rows]),
        draw,
        steps=steps,
        batch_size=batch_size,
        label="classifier",
    )
    return classifier


@torch.no_grad()
def confidence(
    classifier: Classifier, images: Float[Tensor, "n c h w"], batch_size: int = 1000
) -> Float[Tensor, "n"]:
    """Return the probability of the likeliest class of each image: an independent judge of what is drawn.

    A distance of pixels or features is low for a cloud of the right shape; a classifier that was trained on real images
    is sure of an image only if it can read it. Real images set the level to be reached.

    Args:
        classifier: Trained on real images, in `eval` mode.
        images: As the classifier was trained on them.
        batch_size: Images at a time, for the memory's sake.

    Returns:
        Values from 1 / classes to 1.
    """
    return torch.cat([classifier(part).softmax(1).amax(1) for part in images.split(batch_size)])
