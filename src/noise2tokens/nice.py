"""NICE: a density model made of maps that can be undone.

A flow is an invertible map f from data x to latents z = f(x), with a fixed, simple prior on z. The change of variables
gives the density of the data exactly, log p(x) = log prior(f(x)) + log |det df/dx|, so training is plain maximum
likelihood. What must be cheap is the inverse, for sampling, and the determinant, for the likelihood. NICE gets both
from the additive coupling layer: half of the coordinates stay as they are and shift the other half.

This module holds the `Flow` contract that later chapters build on, the layers of NICE in the order of the chapter,
and the yardsticks a likelihood needs: bits per dimension and baselines. A layer is itself a flow, so that one set of
contract tests serves layers and models. The affine coupling, which also rescales, belongs to the next chapter.

Conventions: `forward` goes from data to latents, `log_det` is log |det d forward / dx| for each sample, in nats, and
every log-likelihood is in nats for a whole sample, summed over dimensions.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Real
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import softplus

from noise2tokens import training
from noise2tokens.display import image_rows
from noise2tokens.images import dequantize, mnist
from noise2tokens.networks import confidence, mlp, train_classifier
from noise2tokens.training import History


class GaussianPrior:
    """Independent standard normals."""

    def log_prob(self, z: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch"]:
        """Return -(z² + log 2π)/2, summed over each sample."""
        return (-0.5 * (z**2 + math.log(2 * math.pi))).flatten(1).sum(1)

    def sample(
        self, n: int, like: Float[Tensor, "*event"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "n *event"]:
        """Draw n samples of the shape, dtype and device of `like`."""
        return torch.randn(
            n, *like.shape, dtype=like.dtype, device=like.device, generator=generator
        )


class LogisticPrior:
    """Independent standard logistics: heavier tails, and a gradient that never exceeds 1 per coordinate."""

    def log_prob(self, z: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch"]:
        """Return -log(1 + e^z) - log(1 + e^-z), summed over each sample.

        Source: Dinh et al. 2015, section 3.4.
        """
        return -(softplus(z) + softplus(-z)).flatten(1).sum(1)

    def sample(
        self, n: int, like: Float[Tensor, "*event"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "n *event"]:
        """Draw n samples of the shape, dtype and device of `like`, by the quantile function log(u/(1-u))."""
        # In float32 a uniform draw is 0 once in 2^24, and its logit infinite.
        u = torch.rand(n, *like.shape, dtype=torch.float64, device=like.device, generator=generator)
        return torch.logit(u, eps=1e-12).to(like.dtype)


PRIORS = {"gaussian": GaussianPrior(), "logistic": LogisticPrior()}


class Flow(nn.Module):
    """The contract of every flow: an invertible map and the density that it gives to its input.

    A subclass defines `forward` and `inverse`; `log_prob` and `sample` follow from them.

    Args:
        event_shape: Shape of one sample, the same for data and latents.
        prior: Distribution of the latents, "gaussian" or "logistic".

    Raises:
        ValueError: If the prior is unknown.
    """

    def __init__(self, event_shape: Sequence[int], prior: str = "gaussian"):
        super().__init__()
        if prior not in PRIORS:
            raise ValueError(f"prior must be one of {sorted(PRIORS)}, got {prior!r}")
        self.prior = PRIORS[prior]
        # The point z = 0: it knows the shape of a sample and follows the module's dtype and device.
        self.register_buffer("origin", torch.zeros(*event_shape), persistent=False)

    def check_input(self, x: Tensor) -> None:
        """Refuse anything but a batch of floating-point samples of this flow's shape.

        Raises:
            TypeError: If `x` is not floating-point.
            ValueError: If its shape is another.
        """
        if not x.is_floating_point():
            raise TypeError(
                f"a flow needs floating-point samples, got {x.dtype}: dequantize discrete data first"
            )
        if x.shape[1:] != self.origin.shape or x.dim() == 0:
            raise ValueError(
                f"expected samples of shape (batch, {', '.join(map(str, self.origin.shape))}), "
                f"got {tuple(x.shape)}"
            )

    def forward(
        self, x: Float[Tensor, "batch *event"]
    ) -> tuple[Float[Tensor, "batch *event"], Float[Tensor, "batch"]]:
        """Map data to latents: return z and log |det dz/dx| in nats."""
        raise NotImplementedError

    def inverse(self, z: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """Map latents back to data."""
        raise NotImplementedError

    def log_prob(self, x: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch"]:
        """Return the log-density of each sample, in nats (change of variables)."""
        z, log_det = self(x)
        return self.prior.log_prob(z) + log_det

    @torch.no_grad()
    def sample(
        self, n: int, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Float[Tensor, "n *event"]:
        """Draw from the model: latents from the prior, scaled, then inverted.

        Args:
            n: Number of samples.
            temperature: Factor on the latents; 1 draws from the model itself, 0 gives the image of the origin.
            generator: Source of randomness on the flow's device; the global one where left out.

        Raises:
            ValueError: If `n` is below 1 or the temperature is negative.
        """
        if n < 1 or not temperature >= 0:
            raise ValueError(
                f"need n >= 1 and temperature >= 0, got n={n} and temperature={temperature}"
            )
        return self.inverse(temperature * self.prior.sample(n, self.origin, generator))


class AdditiveCoupling(Flow):
    """Shift half of the coordinates by a function of the other half.

    Args:
        dim: Number of coordinates, at least 2.
        keep: Which coordinates stay as they are, "even" (0, 2, ...) or "odd".
        hidden: Widths of the hidden layers of the shifting network.

    Raises:
        ValueError: If there are fewer than 2 coordinates, or `keep` is neither.

    Source: Dinh et al. 2015, section 3.2.
    """

    def __init__(self, dim: int, keep: str, hidden: Sequence[int]):
        super().__init__((dim,))
        if dim < 2 or keep not in ("even", "odd"):
            raise ValueError(
                f'need dim >= 2 and keep "even" or "odd", got dim={dim} and keep={keep!r}'
            )
        even, odd = slice(0, None, 2), slice(1, None, 2)
        self.kept, self.moved = (even, odd) if keep == "even" else (odd, even)
        sizes = {"even": (dim + 1) // 2, "odd": dim // 2}
        self.shift = mlp(sizes[keep], hidden, dim - sizes[keep])

    def forward(
        self, x: Float[Tensor, "batch dim"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch"]]:
        """Return y and log_det = 0: y_kept = x_kept, y_moved = x_moved + shift(x_kept)."""
        self.check_input(x)
        y = x.clone()
        y[:, self.moved] += self.shift(x[:, self.kept])
        return y, x.new_zeros(len(x))

    def inverse(self, y: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Subtract what `forward` added: the kept half is there to compute it again."""
        self.check_input(y)
        x = y.clone()
        x[:, self.moved] -= self.shift(y[:, self.kept])
        return x


class Permute(Flow):
    """Reorder the coordinates.

    Args:
        order: A permutation of 0, ..., dim - 1; coordinate `i` of the output is coordinate `order[i]` of the input.

    Raises:
        ValueError: If `order` is no permutation.
    """

    def __init__(self, order: Int[Tensor, "dim"]):
        super().__init__((len(order),))
        if not torch.equal(order.sort().values, torch.arange(len(order))):
            raise ValueError(
                f"order must be a permutation of 0..{len(order) - 1}, got {order.tolist()}"
            )
        self.register_buffer("order", order)

    def forward(
        self, x: Float[Tensor, "batch dim"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch"]]:
        """Return the reordered sample and log_det = 0: |det| of a permutation matrix is 1."""
        self.check_input(x)
        return x[:, self.order], x.new_zeros(len(x))

    def inverse(self, y: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Put the coordinates back."""
        self.check_input(y)
        return y[:, self.order.argsort()]


class DiagonalScale(Flow):
    """Stretch every coordinate by its own learned positive factor.

    Args:
        dim: Number of coordinates.

    Source: Dinh et al. 2015, section 3.3.
    """

    def __init__(self, dim: int):
        super().__init__((dim,))
        self.log_scale = nn.Parameter(torch.zeros(dim))

    def forward(
        self, x: Float[Tensor, "batch dim"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch"]]:
        """Return x · exp(log_scale) and the sum of the log-scales."""
        self.check_input(x)
        return x * self.log_scale.exp(), self.log_scale.sum().expand(len(x))

    def inverse(self, y: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Divide by the factors."""
        self.check_input(y)
        return y * (-self.log_scale).exp()


class Chain(Flow):
    """Flows one after the other; their log-determinants add up.

    Args:
        layers: The flows, first the one that meets the data.
        prior: As in `Flow`.
    """

    def __init__(self, layers: Sequence[Flow], prior: str = "gaussian"):
        super().__init__(layers[0].origin.shape, prior)
        self.layers = nn.ModuleList(layers)

    def forward(
        self, x: Float[Tensor, "batch *event"]
    ) -> tuple[Float[Tensor, "batch *event"], Float[Tensor, "batch"]]:
        """Apply the layers in order and add their log-determinants."""
        self.check_input(x)
        log_det = x.new_zeros(len(x))
        for layer in self.layers:
            x, step = layer(x)
            log_det = log_det + step
        return x, log_det

    def inverse(self, z: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """Undo the layers, last one first."""
        self.check_input(z)
        for layer in reversed(self.layers):
            z = layer.inverse(z)
        return z


class NICE(Chain):
    """Additive couplings that take turns, then one scale.

    Args:
        dim: Number of coordinates.
        hidden: Widths of the hidden layers of each coupling's network.
        couplings: Number of couplings; the first keeps the even coordinates.
        prior: As in `Flow`.

    Source: Dinh et al. 2015, section 5.1; for MNIST hidden = [1000] * 5, four couplings and the logistic prior.
    """

    def __init__(
        self, dim: int, hidden: Sequence[int], couplings: int = 4, prior: str = "logistic"
    ):
        turns = [AdditiveCoupling(dim, ("even", "odd")[i % 2], hidden) for i in range(couplings)]
        super().__init__([*turns, DiagonalScale(dim)], prior)


def bits_per_dim(log_prob: Float[Tensor, "batch"], dim: int, levels: int) -> Float[Tensor, "batch"]:
    """Turn a log-likelihood into bits for each dimension of data with `levels` values.

    Args:
        log_prob: Log-density of (v + u) / levels, in nats; or, with `levels` = 1, log-probability of v itself.
        dim: Number of dimensions.
        levels: Number of values a dimension can take.

    Returns:
        log2(levels) - log_prob / (dim · ln 2); lower is better.
    """
    return math.log2(levels) - log_prob / (dim * math.log(2))


def gaussian_log_prob(
    train: Float[Tensor, "n dim"], test: Float[Tensor, "m dim"], diagonal: bool
) -> Float[Tensor, "m"]:
    """Fit one Gaussian by maximum likelihood and return the log-density of the test samples, in nats.

    Args:
        train: Samples to fit, more than there are dimensions.
        test: Samples to judge.
        diagonal: Whether to ignore correlations.

    Returns:
        One value for each test sample.
    """
    centered = (train - train.mean(0)).double()
    covariance = centered.T @ centered / len(train)
    if diagonal:
        covariance = covariance.diagonal().diag()
    fitted = torch.distributions.MultivariateNormal(train.mean(0).double(), covariance)
    return fitted.log_prob(test.double()).to(test.dtype)


def categorical_log_prob(
    train: Int[Tensor, "n dim"], test: Int[Tensor, "m dim"], levels: int
) -> Float[Tensor, "m"]:
    """Fit one histogram for each dimension, and return the log-probability of the test samples, in nats.

    Every value is counted once more than it was seen (Laplace), so that no test value has probability 0.

    Args:
        train: Integers in 0..levels-1.
        test: Integers in 0..levels-1.
        levels: Number of values.

    Returns:
        One value for each test sample.
    """
    seen = torch.stack([(train == value).sum(0) for value in range(levels)]) + 1.0
    log_p = (seen / seen.sum(0)).log()
    return log_p.gather(0, test).sum(1)


def fit(
    flow: Flow,
    images: Real[Tensor, "n dim"],
    validation: Real[Tensor, "m dim"],
    levels: int,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float = 1e-3,
    scale_learning_rate: float = 2e-2,
    validate_every: int = 100,
) -> History:
    """Train a flow on discrete images by maximum likelihood; keep the weights that validate best.

    Args:
        flow: The model, on the device of the images.
        images: Integer pixel values, flattened.
        validation: Held-out pixel values.
        levels: Number of values a pixel can take.
        steps: Optimizer steps, over which the learning rates fall to zero along a cosine.
        batch_size: Images a step.
        learning_rate: Adam's, for the networks.
        scale_learning_rate: Adam's, for `log_scale`: the scales must travel far, from 1 to 1/σ of each coordinate.
        validate_every: Steps between validations.

    Returns:
        The curve, in nats a sample.
    """

    def negative_log_likelihood(x: Tensor) -> Tensor:
        return -flow.log_prob(x).mean()

    scales = [p for name, p in flow.named_parameters() if name.endswith("log_scale")]
    others = [p for name, p in flow.named_parameters() if not name.endswith("log_scale")]
    groups = [{"params": others}, {"params": scales, "lr": scale_learning_rate}]
    optimizer = torch.optim.Adam(groups, lr=learning_rate, fused=True)
    # The same noise at every validation, so that its values differ by the weights alone.
    fixed = dequantize(validation, levels, torch.Generator(images.device).manual_seed(0))
    return training.fit(
        flow,
        lambda v: negative_log_likelihood(dequantize(v, levels)),
        images,
        steps=steps,
        batch_size=batch_size,
        optimizer=optimizer,
        validate=lambda: negative_log_likelihood(fixed),
        validate_every=validate_every,
        label="NICE",
    )


@torch.no_grad()
def evaluate(
    flow: Flow,
    images: Real[Tensor, "n *event"],
    levels: int,
    *,
    draws: int = 10,
    batch_size: int = 1000,
    seed: int = 0,
) -> Float[Tensor, "n"]:
    """Return the log-density of each dequantized image, in nats, averaged over draws of the noise.

    Args:
        flow: The model, on the device of the images.
        images: Integer pixel values, in the shape of the flow's samples.
        levels: Number of values a pixel can take.
        draws: Noise draws for each image.
        batch_size: Images at a time, for the memory's sake.
        seed: Of the noise.

    Returns:
        One value for each image.
    """
    generator = torch.Generator(images.device).manual_seed(seed)
    return torch.cat(
        [
            sum(flow.log_prob(dequantize(part, levels, generator)) for _ in range(draws)) / draws
            for part in images.split(batch_size)
        ]
    )


BUDGETS = {
    "long": {
        "steps": 4000,
        "batch_size": 200,
        "hidden": (400,) * 4,
        "held_out": 10_000,
        "test_images": 10_000,
        "samples": 1000,
        "classifier_steps": 1000,
    },
    # The paper's architecture and split. A batch of 1000 costs a GPU hardly more time than one of 200, most of which
    # would go to launching kernels.
    "full": {
        "steps": 100_000,
        "batch_size": 1000,
        "hidden": (1000,) * 5,
        "held_out": 10_000,
        "test_images": 10_000,
        "samples": 10_000,
        "classifier_steps": 3000,
    },
}


def full_scale(
    device: torch.device,
    *,
    seed: int,
    steps: int,
    batch_size: int,
    hidden: Sequence[int],
    held_out: int,
    test_images: int,
    samples: int,
    classifier_steps: int,
) -> tuple[dict[str, Any], dict[str, Figure]]:
    """Train NICE on MNIST, score the test images, and let a classifier read the samples.

    Args:
        device: Where to train.
        seed: Of everything that is drawn.
        steps: Optimizer steps.
        batch_size: Images a step.
        hidden: Widths of the hidden layers of each coupling's network.
        held_out: The last training images, which choose the weights and are not trained on.
        test_images: Test images that are scored.
        samples: Samples at each temperature for the classifier to read.
        classifier_steps: Steps of the classifier's own training.

    Returns:
        "test nats" with its "standard error", "bits per dimension", "best step" and the curve of "validation nats"; the
        mean "confidence" of the classifier in test images and in samples by temperature. A picture of samples.

    Source: Dinh et al. 2015, section 5.1; the split is that of the authors' released configuration.
    """
    (images, labels), (unseen, _) = mnist(train=True), mnist(train=False)
    pixels, test = images.flatten(1).to(device), unseen[:test_images].flatten(1).to(device)
    flow = NICE(pixels.shape[1], hidden).to(device)
    history = fit(
        flow,
        pixels[:-held_out],
        pixels[-held_out:],
        256,
        steps=steps,
        batch_size=batch_size,
        validate_every=max(1, steps // 40),
    )
    scores = evaluate(flow, test, 256, draws=2, seed=seed)
    classifier = train_classifier(
        pixels.view(-1, 1, 28, 28) / 255, labels.to(device), steps=classifier_steps, batch_size=64
    )
    drawn = {t: flow.sample(samples, t).clamp(0, 1).view(-1, 28, 28) for t in (1.0, 0.8)}
    read = {f"T = {t:g}": x for t, x in drawn.items()} | {
        "test images": test.view(-1, 28, 28) / 255
    }
    results = {
        "test nats": scores.mean(),
        "standard error": scores.std() / len(scores) ** 0.5,
        "bits per dimension": bits_per_dim(scores, test.shape[1], 256).mean(),
        "best step": history.best_step,
        "validation nats": [-value for value in history.validation],
        "confidence": {name: confidence(classifier, x[:, None]).mean() for name, x in read.items()},
    }
    rows = {"test images": read["test images"][:10]}
    for t, x in drawn.items():
        rows |= {f"samples at T = {t:g}": x[:10], f"more at T = {t:g}": x[10:20]}
    return results, {"MNIST: test images above, samples of NICE below": image_rows(rows)}
