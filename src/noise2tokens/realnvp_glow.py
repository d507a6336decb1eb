"""RealNVP and Glow: flows that stretch space differently at different points.

NICE shifts half of the coordinates by a function of the other half, so its volume never changes along the way. Here the
coupling also scales, and everything that a coupling needs in order to work on images is built around it: masks that
follow an image's grid, squeezing (space into channels), splitting (half of the coordinates leave early, as Gaussians
given the rest), activation normalization, and a learned linear map of the channels where NICE took turns.

Everything is a `Flow` of the last chapter and keeps its contract: latents have the shape of the data. For that,
`Squeeze` and `Split` are wrappers: each holds the flow that goes on inside, and puts its output back where it belongs.
A multi-scale model is a nest of them. `ActNorm` keeps no flag that says whether it has seen data: it starts as the
identity, and `initialize` sets all of them from one batch, when it is told to and never by itself.

Letters: c, h, w are channels, height and width; h is also what a network puts out before it becomes a log-scale.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int, Real
from torch import Tensor, nn
from torch.nn import functional as F

from noise2tokens.images import dequantize
from noise2tokens.nice import Chain, Flow, evaluate, mlp
from noise2tokens.training import History, train

BOUND = 3.0
SCALES = ("exp", "tanh", "sigmoid")


def log_scale(h: Float[Tensor, "*shape"], kind: str) -> Float[Tensor, "*shape"]:
    """Turn a network's output into the logarithm of a positive scale.

    Args:
        h: Any numbers; 0 where a network starts.
        kind: "exp": log s = h, without bound. "tanh": |log s| < 3, with slope 1 at 0. "sigmoid": s = sigmoid(h + 2),
            so s < 1, and 0.88 at the start.

    Raises:
        ValueError: If the kind is unknown.

    Source: Dinh et al. 2017, section 4.1 (tanh, there times a learned factor); released code of Kingma and Dhariwal
        2018 (sigmoid).
    """
    if kind == "exp":
        return h
    if kind == "tanh":
        return BOUND * torch.tanh(h / BOUND)
    if kind == "sigmoid":
        return F.logsigmoid(h + 2)
    raise ValueError(f"scale must be one of {SCALES}, got {kind!r}")


class AffineCoupling(Flow):
    """Scale and shift the coordinates outside a mask by functions of those inside.

    Args:
        keep: True for the coordinates that stay as they are; its shape is that of a sample.
        network: Maps a batch of samples, with zeros outside the mask, to twice as many channels: h, then the shift.
        scale: As `kind` in `log_scale`.

    Raises:
        ValueError: If the mask keeps everything or nothing, or the scale is unknown.

    Source: Dinh et al. 2017, section 3.4, equation 9.
    """

    def __init__(self, keep: Bool[Tensor, "*event"], network: nn.Module, scale: str = "tanh"):
        super().__init__(keep.shape)
        if keep.all() or not keep.any():
            raise ValueError(f"the mask must keep some coordinates and move some, got {keep}")
        if scale not in SCALES:
            raise ValueError(f"scale must be one of {SCALES}, got {scale!r}")
        self.register_buffer("keep", keep, persistent=False)
        self.network, self.scale = network, scale

    def forward(
        self, x: Float[Tensor, "batch *event"]
    ) -> tuple[Float[Tensor, "batch *event"], Float[Tensor, "batch"]]:
        """Return y and the sum of log s over the moved: y_kept = x_kept, y_moved = s · x_moved + t."""
        self.check_input(x)
        h, shift = self.network(torch.where(self.keep, x, 0)).chunk(2, dim=1)
        log_s = torch.where(self.keep, 0, log_scale(h, self.scale))
        return torch.where(self.keep, x, x * log_s.exp() + shift), log_s.flatten(1).sum(1)

    def inverse(self, y: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """Subtract the shift and divide by the scale: the kept part is there to compute both again."""
        self.check_input(y)
        h, shift = self.network(torch.where(self.keep, y, 0)).chunk(2, dim=1)
        log_s = log_scale(h, self.scale)
        return torch.where(self.keep, y, (y - shift) * (-log_s).exp())


class RealNVP(Chain):
    """Affine couplings that take turns on the even and the odd coordinates of a vector.

    Args:
        dim: Number of coordinates, at least 2.
        hidden: Widths of the hidden layers of each coupling's network.
        couplings: Number of couplings; the first keeps the even coordinates.
        scale: As in `AffineCoupling`.

    Source: Dinh et al. 2017, section 3.5.
    """

    def __init__(self, dim: int, hidden: Sequence[int], couplings: int = 8, scale: str = "tanh"):
        even = torch.arange(dim) % 2 == 0
        masks = [(even, ~even)[i % 2] for i in range(couplings)]
        super().__init__(
            [AffineCoupling(m, start_at_zero(mlp(dim, hidden, 2 * dim)), scale) for m in masks]
        )


def start_at_zero(network: nn.Sequential) -> nn.Sequential:
    """Set the last layer of a network to zero, so that a coupling starts as the identity, or close to it.

    Args:
        network: Its last layer has a weight and a bias.

    Returns:
        The same network.

    Source: Kingma and Dhariwal 2018, section 3.3.
    """
    nn.init.zeros_(network[-1].weight)
    nn.init.zeros_(network[-1].bias)
    return network


def fit_points(
    flow: Flow,
    draw: Callable[[int], Float[Tensor, "n dim"]],
    *,
    steps: int,
    learning_rate: float = 5e-3,
) -> History:
    """Train a flow by maximum likelihood on a source of points that never runs dry, 256 a step.

    Args:
        flow: The model.
        draw: Draws a number of points.
        steps: Optimizer steps, over which the learning rate falls to zero along a cosine.
        learning_rate: Adam's.

    Returns:
        The curve, in nats a point.
    """
    optimizer = torch.optim.Adam(flow.parameters(), lr=learning_rate, fused=True)
    return train(
        flow,
        lambda x: -flow.log_prob(x).mean(),
        draw,
        steps=steps,
        batch_size=256,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        label=type(flow).__name__,
    )


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
    optimizer = torch.optim.Adam(flow.parameters(), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps + 1, pct_start=0.05, cycle_momentum=False
    )
    generator = torch.Generator(images.device).manual_seed(0)
    initialize(flow, dequantize(images[:512], levels, generator))
    return train(
        flow,
        lambda v: -flow.log_prob(dequantize(v, levels, None)).mean(),
        images,
        steps=steps,
        batch_size=batch_size,
        optimizer=optimizer,
        # The same noise at every validation, so that its values differ by the weights alone.
        validate=lambda: -evaluate(flow, validation, levels, draws=1).mean().item(),
        validate_every=validate_every,
        schedule=schedule,
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


def mnist_experiment(
    images: Real[Tensor, "n height width"],
    test_images: Real[Tensor, "m height width"],
    device: torch.device,
    *,
    permutation: str,
    steps: int = 6000,
    batch_size: int = 256,
    held_out: int = 10_000,
    depth: int = 8,
    width: int = 256,
) -> tuple[Glow, History, Float[Tensor, "m"]]:
    """Train a Glow of three levels on MNIST, padded to 32×32 with zeros, and score the test images.

    Args:
        images: Training pixels, 0 to 255; the last `held_out` choose the weights and are not trained on.
        test_images: Test pixels.
        device: Where to train.
        permutation: As in `glow_step`.
        steps: Optimizer steps.
        batch_size: Images a step.
        held_out: Size of the validation part.
        depth: Steps of flow between two squeezes.
        width: Channels of the hidden layers.

    Returns:
        The model, its curve, and for each test image a log-likelihood in nats for its own 784 pixels: the border is
        paid for as if it had to be coded too, so that bits per dimension divide by 784.

    Source: Kingma and Dhariwal 2018, section 3; the padding is that of the released code.
    """
    flow = Glow((1, 32, 32), 3, depth, width, permutation=permutation).to(device)
    pixels, test_pixels = (pad_to_32(part.to(device)) for part in (images, test_images))
    history = fit_images(
        flow,
        pixels[:-held_out],
        pixels[-held_out:],
        256,
        steps=steps,
        batch_size=batch_size,
        validate_every=max(1, steps // 25),
    )
    border = 32 * 32 - test_images[0].numel()
    scores = evaluate(flow, test_pixels, 256) - border * math.log(256)
    return flow, history, scores
