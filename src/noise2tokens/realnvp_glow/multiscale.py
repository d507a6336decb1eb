"""What a flow of images needs: masks, squeezes and splits, normalization, mixed channels; RealNVP and Glow of them."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from noise2tokens.nice import Chain, Flow
from noise2tokens.realnvp_glow.coupling import SCALES, AffineCoupling, log_scale, start_at_zero


def checkerboard(shape: Sequence[int]) -> Bool[Tensor, "c h w"]:
    """Return the mask of the fields where row plus column is even, the same in every channel.

    Args:
        shape: Channels, height, width.

    Source: Dinh et al. 2017, section 3.4 and figure 3.
    """
    c, h, w = shape
    return ((torch.arange(h)[:, None] + torch.arange(w)) % 2 == 0).repeat(c, 1, 1)


def channel_mask(shape: Sequence[int]) -> Bool[Tensor, "c h w"]:
    """Return the mask of the first half of the channels.

    Args:
        shape: Channels, height, width.

    Source: Dinh et al. 2017, section 3.4 and figure 3.
    """
    c, h, w = shape
    return (torch.arange(c) < c // 2)[:, None, None].repeat(1, h, w)


def convnet(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Build the network of an image coupling; its last convolution starts at zero.

    Args:
        inputs: Channels in.
        width: Channels of the two hidden layers.
        outputs: Channels out.

    Source: Kingma and Dhariwal 2018, sections 3.3 and 5 (3×3, 1×1, 3×3).
    """
    first, middle = nn.Conv2d(inputs, width, 3, padding=1), nn.Conv2d(width, width, 1)
    last = nn.Conv2d(width, outputs, 3, padding=1)
    return start_at_zero(nn.Sequential(first, nn.ReLU(), middle, nn.ReLU(), last))


class Squeeze(Flow):
    """Hand each 2×2 square of pixels to a flow as four channels of one pixel, and lay its output out again.

    Args:
        inner: The flow inside, for samples of shape (4c, h/2, w/2); this one is for (c, h, w).

    Raises:
        ValueError: If the inner flow's channels cannot be divided by 4.

    Source: Dinh et al. 2017, section 3.6; the order of the channels is that of Glow's released code.
    """

    def __init__(self, inner: Flow):
        channels, height, width = inner.origin.shape
        if channels % 4:
            raise ValueError(f"a squeezed image has a multiple of 4 channels, got {channels}")
        super().__init__((channels // 4, 2 * height, 2 * width))
        self.inner = inner

    def forward(
        self, x: Float[Tensor, "batch c h w"]
    ) -> tuple[Float[Tensor, "batch c h w"], Float[Tensor, "batch"]]:
        """Squeeze, apply the inner flow, and unsqueeze; moving numbers about has determinant ±1."""
        self.check_input(x)
        z, log_det = self.inner(F.pixel_unshuffle(x, 2))
        return F.pixel_shuffle(z, 2), log_det

    def inverse(self, z: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch c h w"]:
        """Squeeze the latents, undo the inner flow, and unsqueeze."""
        self.check_input(z)
        return F.pixel_shuffle(self.inner.inverse(F.pixel_unshuffle(z, 2)), 2)


class Split(Flow):
    """Let the second half of the channels leave as Gaussians given the first half, which goes on.

    Args:
        inner: The flow that the first half goes on through, for samples of shape (c, h, w); this one is for (2c, h, w).
        network: Maps the first half to 2c channels, the mean and log σ of the second; without it they are 0.

    Source: Kingma and Dhariwal 2018, released code (`split2d_prior`); without the network, Dinh et al. 2017,
        section 3.6.
    """

    def __init__(self, inner: Flow, network: nn.Module | None):
        channels, height, width = inner.origin.shape
        super().__init__((2 * channels, height, width))
        self.inner, self.network = inner, network

    def conditional(
        self, first: Float[Tensor, "batch c h w"]
    ) -> tuple[Float[Tensor, "batch c h w"], Float[Tensor, "batch c h w"]]:
        """Return mean and log σ of the half that leaves, given the half that goes on."""
        if self.network is None:
            return torch.zeros_like(first), torch.zeros_like(first)
        mean, log_sigma = self.network(first).chunk(2, dim=1)
        return mean, log_sigma

    def forward(
        self, x: Float[Tensor, "batch channels h w"]
    ) -> tuple[Float[Tensor, "batch channels h w"], Float[Tensor, "batch"]]:
        """Return the latents of the half that goes on beside the standardized half that leaves."""
        self.check_input(x)
        first, second = x.chunk(2, dim=1)
        mean, log_sigma = self.conditional(first)
        z, log_det = self.inner(first)
        standardized = (second - mean) * (-log_sigma).exp()
        return torch.cat([z, standardized], 1), log_det - log_sigma.flatten(1).sum(1)

    def inverse(
        self, z: Float[Tensor, "batch channels h w"]
    ) -> Float[Tensor, "batch channels h w"]:
        """Undo the half that went on first; it tells where the other half came from."""
        self.check_input(z)
        first, standardized = z.chunk(2, dim=1)
        first = self.inner.inverse(first)
        mean, log_sigma = self.conditional(first)
        return torch.cat([first, mean + log_sigma.exp() * standardized], 1)


class ActNorm(Flow):
    """Shift and scale every channel by learned numbers, the same at all positions.

    It starts as the identity; `initialize` sets it from data.

    Args:
        shape: Shape of a sample, channels first.

    Source: Kingma and Dhariwal 2018, section 3.1.
    """

    def __init__(self, shape: Sequence[int]):
        super().__init__(shape)
        channels, *self.positions = shape
        self.shift = nn.Parameter(torch.zeros(channels, *(1 for _ in self.positions)))
        self.log_s = nn.Parameter(torch.zeros_like(self.shift))

    @torch.no_grad()
    def standardize(self, x: Float[Tensor, "batch *event"]) -> None:
        """Set the parameters such that every channel of this batch comes out with mean 0 and standard deviation 1."""
        self.check_input(x)
        by_channel = x.transpose(0, 1).flatten(1)
        std, mean = torch.std_mean(by_channel, dim=1, correction=0)
        self.shift.copy_(-mean.view_as(self.shift))
        self.log_s.copy_(-(std + 1e-6).log().view_as(self.log_s))

    def forward(
        self, x: Float[Tensor, "batch *event"]
    ) -> tuple[Float[Tensor, "batch *event"], Float[Tensor, "batch"]]:
        """Return s · (x + shift) and the sum of log s over channels, times the number of positions."""
        self.check_input(x)
        log_det = math.prod(self.positions) * self.log_s.sum()
        return (x + self.shift) * self.log_s.exp(), log_det.expand(len(x))

    def inverse(self, y: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """Divide by s and subtract the shift."""
        self.check_input(y)
        return y * (-self.log_s).exp() - self.shift


@torch.no_grad()
def initialize(flow: Flow, x: Float[Tensor, "batch *event"]) -> None:
    """Send one batch of data through a flow; each ActNorm that it reaches first standardizes what arrives.

    Args:
        flow: Any flow with `ActNorm` layers.
        x: A batch of data, the larger the better.

    Source: Kingma and Dhariwal 2018, section 3.1.
    """
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs: layer.standardize(*inputs))
        for layer in flow.modules()
        if isinstance(layer, ActNorm)
    ]
    flow(x)
    for hook in hooks:
        hook.remove()


class PermuteChannels(Flow):
    """Reorder the channels of an image.

    Args:
        order: A permutation of 0, ..., c - 1; channel `i` of the output is channel `order[i]` of the input.
        shape: Channels, height, width.

    Raises:
        ValueError: If `order` is no permutation of the channels.
    """

    def __init__(self, order: Int[Tensor, "c"], shape: Sequence[int]):
        super().__init__(shape)
        if not torch.equal(order.sort().values, torch.arange(shape[0])):
            raise ValueError(
                f"order must be a permutation of 0..{shape[0] - 1}, got {order.tolist()}"
            )
        self.register_buffer("order", order)

    def forward(
        self, x: Float[Tensor, "batch c h w"]
    ) -> tuple[Float[Tensor, "batch c h w"], Float[Tensor, "batch"]]:
        """Return the reordered channels and log_det = 0."""
        self.check_input(x)
        return x[:, self.order], x.new_zeros(len(x))

    def inverse(self, y: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch c h w"]:
        """Put the channels back."""
        self.check_input(y)
        return y[:, self.order.argsort()]


class Invertible1x1Conv(Flow):
    """Multiply the channels of every pixel by one learned matrix W, which starts as a random rotation.

    Args:
        shape: Channels, height, width.

    Source: Kingma and Dhariwal 2018, section 3.2, equation 9.
    """

    def __init__(self, shape: Sequence[int]):
        super().__init__(shape)
        self.weight = nn.Parameter(random_orthogonal(shape[0]))

    def forward(
        self, x: Float[Tensor, "batch c h w"]
    ) -> tuple[Float[Tensor, "batch c h w"], Float[Tensor, "batch"]]:
        """Return W x at every pixel, and h · w · log|det W|."""
        self.check_input(x)
        log_det = x[0, 0].numel() * torch.linalg.slogdet(self.weight).logabsdet
        return (self.weight @ x.flatten(2)).view_as(x), log_det.expand(len(x))

    def inverse(self, y: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch c h w"]:
        """Solve W x = y at every pixel."""
        self.check_input(y)
        return torch.linalg.solve(self.weight, y.flatten(2)).view_as(y)


def random_orthogonal(n: int) -> Float[Tensor, "n n"]:
    """Draw an n by n orthogonal matrix."""
    return torch.linalg.qr(torch.randn(n, n)).Q


class Invertible1x1ConvLU(Flow):
    """The same layer with W = P L U held in factors, so that its determinant can be read off.

    P, a permutation, and the signs of U's diagonal stay as they start; L has ones on its diagonal.

    Args:
        shape: Channels, height, width.

    Source: Kingma and Dhariwal 2018, section 3.2, equations 10 and 11.
    """

    def __init__(self, shape: Sequence[int]):
        super().__init__(shape)
        permutation, lower, upper = torch.linalg.lu(random_orthogonal(shape[0]))
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign", upper.diagonal().sign())
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))
        self.log_s = nn.Parameter(upper.diagonal().abs().log())

    def factors(self) -> tuple[Float[Tensor, "c c"], Float[Tensor, "c c"]]:
        """Return L and U."""
        lower = self.lower.tril(-1) + torch.diag(torch.ones_like(self.log_s))
        return lower, self.upper.triu(1) + torch.diag(self.sign * self.log_s.exp())

    def forward(
        self, x: Float[Tensor, "batch c h w"]
    ) -> tuple[Float[Tensor, "batch c h w"], Float[Tensor, "batch"]]:
        """Return P L U x at every pixel, and h · w times the sum of log|U_ii|."""
        self.check_input(x)
        lower, upper = self.factors()
        weight = self.permutation @ lower @ upper
        log_det = x[0, 0].numel() * self.log_s.sum()
        return (weight @ x.flatten(2)).view_as(x), log_det.expand(len(x))

    def inverse(self, y: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch c h w"]:
        """Undo P by its transpose, then L and U by substitution."""
        self.check_input(y)
        lower, upper = self.factors()
        x = self.permutation.T @ y.flatten(2)
        x = torch.linalg.solve_triangular(lower, x, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, x, upper=True).view_as(y)


class ChannelCoupling(Flow):
    """`AffineCoupling` for the channel mask, without computing what the mask would throw away.

    Args:
        shape: Channels, height, width; the number of channels is even.
        network: Maps the first half of the channels to c channels: h, then the shift.
        scale: As in `AffineCoupling`.

    Raises:
        ValueError: If the number of channels is odd or the scale unknown.

    Source: Kingma and Dhariwal 2018, section 3.3.
    """

    def __init__(self, shape: Sequence[int], network: nn.Module, scale: str = "sigmoid"):
        super().__init__(shape)
        if shape[0] % 2:
            raise ValueError(f"need an even number of channels, got {shape[0]}")
        if scale not in SCALES:
            raise ValueError(f"scale must be one of {SCALES}, got {scale!r}")
        self.network, self.scale = network, scale

    def forward(
        self, x: Float[Tensor, "batch c h w"]
    ) -> tuple[Float[Tensor, "batch c h w"], Float[Tensor, "batch"]]:
        """Return y and the sum of log s: the first half stays, the second becomes s · x + t."""
        self.check_input(x)
        first, second = x.chunk(2, dim=1)
        h, shift = self.network(first).chunk(2, dim=1)
        log_s = log_scale(h, self.scale)
        return torch.cat([first, second * log_s.exp() + shift], 1), log_s.flatten(1).sum(1)

    def inverse(self, y: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch c h w"]:
        """Subtract the shift and divide by the scale."""
        self.check_input(y)
        first, second = y.chunk(2, dim=1)
        h, shift = self.network(first).chunk(2, dim=1)
        return torch.cat([first, (second - shift) * (-log_scale(h, self.scale)).exp()], 1)


class ImageRealNVP(Chain):
    """RealNVP for images: checkerboard masks, squeeze, channel masks, and half of the channels leaves; then again.

    Between couplings stands `ActNorm`, where the paper has batch normalization; the networks are Glow's, not residual.

    Args:
        shape: Channels, height, width; the sides must be divisible by 2^(levels - 1).
        levels: Number of scales.
        width: Channels of the hidden layers.

    Raises:
        ValueError: If the sides do not divide.

    Source: Dinh et al. 2017, section 3.6.
    """

    def __init__(self, shape: Sequence[int], levels: int, width: int):
        check_divisible(shape, levels - 1)
        super().__init__(realnvp_scale(tuple(shape), levels, width))


def realnvp_scale(shape: tuple[int, ...], levels: int, width: int) -> list[Flow]:
    """Build one scale of `ImageRealNVP` with all that lies inside it; the arguments are the same."""

    def couplings(mask: Tensor, number: int) -> list[Flow]:
        channels = len(mask)
        layers: list[Flow] = []
        for i in range(number):
            network = convnet(channels, width, 2 * channels)
            layers += [ActNorm(mask.shape), AffineCoupling((mask, ~mask)[i % 2], network)]
        return layers

    if levels == 1:
        return couplings(checkerboard(shape), 4)
    c, h, w = shape
    rest = Chain(realnvp_scale((2 * c, h // 2, w // 2), levels - 1, width))
    squeezed = Chain([*couplings(channel_mask((4 * c, h // 2, w // 2)), 3), Split(rest, None)])
    return [*couplings(checkerboard(shape), 3), Squeeze(squeezed)]


PERMUTATIONS = ("reverse", "shuffle", "conv")


def glow_step(
    shape: Sequence[int], width: int, permutation: str = "conv", scale: str = "sigmoid"
) -> list[Flow]:
    """Build one step of Glow: normalize, mix the channels, couple.

    Args:
        shape: Channels, height, width.
        width: Channels of the hidden layers of the coupling's network.
        permutation: How channels are mixed: "reverse" their order, "shuffle" them once for all, or "conv", learned.
        scale: As in `AffineCoupling`.

    Raises:
        ValueError: If the permutation is unknown.

    Source: Kingma and Dhariwal 2018, section 3 and table 1.
    """
    if permutation not in PERMUTATIONS:
        raise ValueError(f"permutation must be one of {PERMUTATIONS}, got {permutation!r}")
    c = shape[0]
    mix = {
        "reverse": lambda: PermuteChannels(torch.arange(c).flip(0), shape),
        "shuffle": lambda: PermuteChannels(torch.randperm(c), shape),
        "conv": lambda: Invertible1x1ConvLU(shape),
    }[permutation]()
    return [ActNorm(shape), mix, ChannelCoupling(shape, convnet(c // 2, width, c), scale)]


class Glow(Chain):
    """Squeeze, some steps, and half of the channels leaves; then again with the other half.

    Args:
        shape: Channels, height, width; the sides must be divisible by 2^levels.
        levels: Number of squeezes (L in the paper).
        depth: Steps between two squeezes (K in the paper).
        width: Channels of the hidden layers.
        permutation: As in `glow_step`.
        scale: As in `AffineCoupling`.

    Raises:
        ValueError: If the sides do not divide, or the permutation is unknown.

    Source: Kingma and Dhariwal 2018, section 3 and figure 2.
    """

    def __init__(
        self,
        shape: Sequence[int],
        levels: int,
        depth: int,
        width: int,
        *,
        permutation: str = "conv",
        scale: str = "sigmoid",
    ):
        check_divisible(shape, levels)
        c, h, w = shape
        squeezed = (4 * c, h // 2, w // 2)
        options = {"permutation": permutation, "scale": scale}
        layers = [part for _ in range(depth) for part in glow_step(squeezed, width, **options)]
        if levels > 1:
            rest = Glow((2 * c, h // 2, w // 2), levels - 1, depth, width, **options)
            layers.append(Split(rest, convnet(2 * c, width, 4 * c)))
        super().__init__([Squeeze(Chain(layers))])


def check_divisible(shape: Sequence[int], times: int) -> None:
    """Refuse an image that cannot be halved so many times.

    Args:
        shape: Channels, height, width.
        times: How often the sides are to be halved.

    Raises:
        ValueError: If they cannot.
    """
    if times < 0 or shape[1] % 2**times or shape[2] % 2**times:
        raise ValueError(
            f"cannot halve the sides of an image of shape {tuple(shape)} {times} times"
        )
