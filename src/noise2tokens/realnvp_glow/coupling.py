"""The affine coupling, and RealNVP for points of the plane."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from noise2tokens.nice import Chain, Flow, mlp
from noise2tokens.training import History, fit

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


class HalfCoupling(Flow):
    """`AffineCoupling` for a vector whose even or odd coordinates are kept; its network sees nothing but these.

    Args:
        dim: Number of coordinates, at least 2.
        keep: Which coordinates stay as they are, "even" (0, 2, ...) or "odd".
        hidden: Widths of the hidden layers of the network, which starts at zero.
        scale: As `kind` in `log_scale`.

    Raises:
        ValueError: If there are fewer than 2 coordinates, `keep` is neither, or the scale is unknown.

    Source: Dinh et al. 2017, section 3.2, equations 4 and 5.
    """

    def __init__(self, dim: int, keep: str, hidden: Sequence[int], scale: str = "tanh"):
        super().__init__((dim,))
        if dim < 2 or keep not in ("even", "odd"):
            raise ValueError(
                f'need dim >= 2 and keep "even" or "odd", got dim={dim} and keep={keep!r}'
            )
        if scale not in SCALES:
            raise ValueError(f"scale must be one of {SCALES}, got {scale!r}")
        even, odd = slice(0, None, 2), slice(1, None, 2)
        self.kept, self.moved = (even, odd) if keep == "even" else (odd, even)
        kept = len(range(dim)[self.kept])
        self.network, self.scale = start_at_zero(mlp(kept, hidden, 2 * (dim - kept))), scale

    def forward(
        self, x: Float[Tensor, "batch dim"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch"]]:
        """Return y and the sum of log s: y_kept = x_kept, y_moved = s · x_moved + t."""
        self.check_input(x)
        h, shift = self.network(x[:, self.kept]).chunk(2, dim=1)
        log_s = log_scale(h, self.scale)
        y = x.clone()
        y[:, self.moved] = x[:, self.moved] * log_s.exp() + shift
        return y, log_s.sum(1)

    def inverse(self, y: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Subtract the shift and divide by the scale."""
        self.check_input(y)
        h, shift = self.network(y[:, self.kept]).chunk(2, dim=1)
        x = y.clone()
        x[:, self.moved] = (y[:, self.moved] - shift) * (-log_scale(h, self.scale)).exp()
        return x


class RealNVP(Chain):
    """Affine couplings that take turns on the even and the odd coordinates of a vector.

    Args:
        dim: Number of coordinates, at least 2.
        hidden: Widths of the hidden layers of each coupling's network.
        couplings: Number of couplings; the first keeps the even coordinates.
        scale: As in `HalfCoupling`.

    Source: Dinh et al. 2017, section 3.5.
    """

    def __init__(self, dim: int, hidden: Sequence[int], couplings: int = 8, scale: str = "tanh"):
        turns = [("even", "odd")[i % 2] for i in range(couplings)]
        super().__init__([HalfCoupling(dim, keep, hidden, scale) for keep in turns])


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
    return fit(
        flow,
        lambda x: -flow.log_prob(x).mean(),
        draw,
        steps=steps,
        batch_size=256,
        learning_rate=learning_rate,
        label=type(flow).__name__,
    )
