"""Two networks that take a time beside their input: one for points, one for images.

Both are called as network(x, t) with x (batch, ...) and t (batch,) in [0, 1], and return the shape of x. What they
predict (noise, velocity, ...) is decided by the loss they are trained with.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

FASTEST = 30
POINT_FEATURES = 16


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
