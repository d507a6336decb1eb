"""The variational autoencoder: noise to data by a decoder, and an encoder that says which noise belongs to which data.

A latent z from N(0, I) is decoded to the parameters of p(x|z). The likelihood p(x) = ∫ p(z) p(x|z) dz cannot be
computed, and is bounded from below with the help of an encoder q(z|x) = N(μ(x), σ(x)²). The losses are pure functions;
the networks are small perceptrons.

Conventions: pixels lie in [0, 1] and are the mean of a Bernoulli variable; the decoder puts out logits, the encoder the
*logarithm of the variance*. Everything is in nats for a whole sample, summed over dimensions and never averaged.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int, Real
from torch import Generator, Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from noise2tokens.networks import mlp
from noise2tokens.training import History, train


def gaussian_kl(
    mean: Float[Tensor, "*batch latent"],
    log_var: Float[Tensor, "*batch latent"],
    prior_mean: Float[Tensor, "*batch latent"] | Float[Tensor, "latent"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Compute KL(N(mean, exp(log_var)) ‖ N(prior_mean, I)), summed over the dimensions.

    Args:
        mean: Of the encoder.
        log_var: Logarithm of the encoder's variance (not of its standard deviation).
        prior_mean: Center of the prior; 0 where left out.

    Returns:
        ½ Σ (μ² + σ² - log σ² - 1), in nats, with μ measured from the center of the prior.

    Source: Kingma and Welling 2014, appendix B.
    """
    distance = mean if prior_mean is None else mean - prior_mean
    return 0.5 * (distance.square() + log_var.exp() - log_var - 1).sum(-1)


def reparameterize(
    mean: Float[Tensor, "*batch latent"],
    log_var: Float[Tensor, "*batch latent"],
    noise: Float[Tensor, "*draws latent"],
) -> Float[Tensor, "*draws latent"]:
    """Return mean + exp(log_var / 2) · noise: a draw through which gradients reach mean and log_var.

    Args:
        mean: Of the encoder.
        log_var: Logarithm of its variance.
        noise: Standard normal, of a shape that mean and log_var broadcast to.

    Source: Kingma and Welling 2014, section 2.4.
    """
    return mean + (0.5 * log_var).exp() * noise


def normal_log_prob(z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """Evaluate the log-density of N(mean, exp(log_var)), summed over the last axis; the arguments broadcast."""
    quadratic = (z - mean).square() * (-log_var).exp()
    return -0.5 * (quadratic + log_var + math.log(2 * math.pi)).sum(-1)


def bernoulli_log_prob(
    logits: Float[Tensor, "*draws dim"], x: Float[Tensor, "*batch dim"]
) -> Float[Tensor, "*draws"]:
    """Evaluate Σ x log p + (1 - x) log(1 - p) with p = sigmoid(logits), the log-probability of pixels.

    For x between 0 and 1 it is the mean log-probability of a binary image whose pixels are 1 with probability x.

    Args:
        logits: Of the decoder.
        x: Pixels in [0, 1], of a shape that broadcasts to that of the logits.

    Returns:
        One value for each draw, in nats.
    """
    target = x.expand_as(logits)
    return -binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)


def elbo_bound(log_weights: Float[Tensor, "draws batch"]) -> Float[Tensor, "batch"]:
    """Average log p(x, z_k) - log q(z_k|x) over the draws: the evidence lower bound, estimated."""
    return log_weights.mean(0)


def iwae_bound(log_weights: Float[Tensor, "draws batch"]) -> Float[Tensor, "batch"]:
    """Average the weights p(x, z_k) / q(z_k|x) over the draws, and take the logarithm after.

    Args:
        log_weights: log p(x, z_k) - log q(z_k|x), with z_k drawn from q.

    Returns:
        log (1/K) Σ exp(log_weights), in nats: a lower bound of log p(x) in expectation, tighter for more draws.

    Source: Burda et al. 2016, equation 8.
    """
    return log_weights.logsumexp(0) - math.log(len(log_weights))


class VAE(nn.Module):
    """An encoder to Gaussians and a decoder to pixels.

    Args:
        dim: Number of pixels.
        hidden: Widths of the hidden layers of the encoder; the decoder has them in reverse.
        latent: Number of dimensions of z.
        activation: Makes the module after each hidden layer.
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int],
        latent: int,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ):
        super().__init__()
        self.dim, self.latent = dim, latent
        self.encoder = mlp(dim, hidden, 2 * latent, activation)
        self.decoder = mlp(latent, hidden[::-1], dim, activation)

    def encode(
        self, x: Float[Tensor, "batch dim"]
    ) -> tuple[Float[Tensor, "batch latent"], Float[Tensor, "batch latent"]]:
        """Return mean and log-variance of q(z|x).

        Raises:
            ValueError: If the images have another size, or pixels are not in [0, 1] (on a GPU not checked).
        """
        if x.shape[1] != self.dim:
            raise ValueError(f"expected {self.dim} pixels, got {x.shape[1]}")
        if x.device.type == "cpu" and not ((x >= 0) & (x <= 1)).all():
            raise ValueError(f"pixels must lie in [0, 1], got {x.min():g} to {x.max():g}")
        return self.encoder(x).chunk(2, -1)

    def prior_mean(self, labels: Int[Tensor, "batch"] | None) -> Tensor:
        """Return the center of the prior: 0, whatever the class."""
        return torch.zeros(self.latent, device=next(self.parameters()).device)

    def terms(
        self, x: Float[Tensor, "batch dim"], labels: Int[Tensor, "batch"] | None = None
    ) -> tuple[Float[Tensor, "batch"], Float[Tensor, "batch"]]:
        """Return the two parts of the bound, with one draw of z: log p(x|z), and KL(q(z|x) ‖ p(z)) exactly."""
        mean, log_var = self.encode(x)
        z = reparameterize(mean, log_var, torch.randn_like(mean))
        kl = gaussian_kl(mean, log_var, self.prior_mean(labels).expand_as(mean))
        return bernoulli_log_prob(self.decoder(z), x), kl

    def elbo(
        self, x: Float[Tensor, "batch dim"], labels: Int[Tensor, "batch"] | None = None
    ) -> Float[Tensor, "batch"]:
        """Return log p(x|z) - KL(q(z|x) ‖ p(z)), in nats."""
        reconstruction, kl = self.terms(x, labels)
        return reconstruction - kl

    def log_weights(
        self,
        x: Float[Tensor, "batch dim"],
        draws: int,
        labels: Int[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "{draws} batch"]:
        """Return log p(x|z_k) + log p(z_k) - log q(z_k|x) for draws z_k of q(z|x)."""
        mean, log_var = self.encode(x)
        z = reparameterize(mean, log_var, torch.randn(draws, *mean.shape, device=x.device))
        prior = normal_log_prob(z, self.prior_mean(labels), torch.zeros_like(mean))
        joint = bernoulli_log_prob(self.decoder(z), x) + prior
        return joint - normal_log_prob(z, mean, log_var)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        labels: Int[Tensor, "{n}"] | None = None,
        generator: Generator | None = None,
    ) -> Float[Tensor, "{n} dim"]:
        """Decode n latents of the prior to pixel *means* in [0, 1]; no pixel is drawn.

        Args:
            n: Number of images.
            labels: Their classes, for a conditional model.
            generator: Source of the latents, on the model's device.
        """
        center = self.prior_mean(labels)
        z = center + torch.randn(n, self.latent, device=center.device, generator=generator)
        return self.decoder(z).sigmoid()


class ConditionalVAE(VAE):
    """A VAE whose prior has its own learned center for each class: p(z|y) = N(μ_y, I).

    Encoder and decoder never see the class; it only moves the prior.

    Args:
        dim: Number of pixels.
        hidden: As in `VAE`.
        latent: As in `VAE`.
        classes: Number of classes.
        activation: As in `VAE`.
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int],
        latent: int,
        classes: int,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ):
        super().__init__(dim, hidden, latent, activation)
        self.centers = nn.Parameter(torch.randn(classes, latent))

    def prior_mean(self, labels: Int[Tensor, "batch"] | None) -> Tensor:
        """Return the center of each label's class.

        Raises:
            ValueError: If there are no labels, or one is no class (on a GPU not checked).
        """
        if labels is None:
            raise ValueError("a conditional model needs labels, got none")
        known = len(self.centers)
        if labels.device.type == "cpu" and not ((labels >= 0) & (labels < known)).all():
            raise ValueError(f"labels must be 0..{known - 1}, got {labels.tolist()[:10]}")
        return self.centers[labels]


@torch.no_grad()
def evaluate(
    model: VAE,
    images: Float[Tensor, "n dim"],
    draws: int,
    *,
    chunk: int = 50,
    batch_size: int = 200,
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
    """Estimate both bounds on the log-likelihood of each image, from the same draws.

    Args:
        model: The model, on the device of the images.
        images: Pixels, binary for a log-likelihood of binary images.
        draws: Number K of draws of z for each image.
        chunk: Draws at a time; memory grows with chunk · batch_size.
        batch_size: Images at a time.

    Returns:
        ELBO and importance-weighted bound, in nats.

    Raises:
        ValueError: If `draws` is below 1.
    """
    if draws < 1:
        raise ValueError(f"need at least one draw, got {draws}")
    elbos, bounds = [], []
    for batch in images.split(batch_size):
        sizes = [min(chunk, draws - done) for done in range(0, draws, chunk)]
        weights = torch.cat([model.log_weights(batch, size) for size in sizes])
        elbos.append(elbo_bound(weights))
        bounds.append(iwae_bound(weights))
    return torch.cat(elbos), torch.cat(bounds)


def binarize(x: Float[Tensor, "*shape"], generator: Generator | None = None) -> Tensor:
    """Draw each pixel as 0 or 1 with its brightness as the probability of 1: dynamic binarization."""
    return torch.bernoulli(x, generator=generator)


def mnist_experiment(
    images: Real[Tensor, "n height width"],
    test_images: Real[Tensor, "m height width"],
    device: torch.device,
    *,
    train_draws: int,
    steps: int = 100_000,
    batch_size: int = 250,
    test_draws: int = 5000,
    seed: int = 0,
) -> tuple[VAE, History, Float[Tensor, "m"], Float[Tensor, "m"]]:
    """Train the one-layer model of the IWAE paper on dynamically binarized MNIST, and score the test images.

    Args:
        images: Training pixels, 0 to 255.
        test_images: Test pixels; binarized once, from `seed`.
        device: Where to train.
        train_draws: K of the training bound; 1 trains a VAE (with the exact KL term).
        steps: Optimizer steps.
        batch_size: Images a step.
        test_draws: K of the bound at the end.
        seed: Of the binarized test images.

    Returns:
        The model, its curve, and for each test image the ELBO and the importance-weighted bound, in nats.

    Raises:
        ValueError: If `train_draws` is below 1.

    Source: Burda et al. 2016, section 5: two tanh layers of 200 units, 50 latents.
    """
    if train_draws < 1:
        raise ValueError(f"need at least one draw, got {train_draws}")
    pixels, test_pixels = (part.flatten(1).float() / 255 for part in (images, test_images))
    test_pixels = binarize(test_pixels.cpu(), Generator().manual_seed(seed)).to(device)
    model = VAE(pixels.shape[1], (200, 200), 50, nn.Tanh).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-4, fused=True)

    def loss(x: Tensor) -> Tensor:
        x = binarize(x)
        if train_draws == 1:
            return -model.elbo(x).mean()
        return -iwae_bound(model.log_weights(x, train_draws)).mean()

    history = train(
        model,
        loss,
        pixels.to(device),
        steps=steps,
        batch_size=batch_size,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        validate_every=max(1, steps // 100),
        label=f"VAE, K = {train_draws}",
    )
    return model, history, *evaluate(model, test_pixels, test_draws)


def mnist_classes_experiment(
    images: Real[Tensor, "n height width"],
    labels: Int[Tensor, "n"],
    device: torch.device,
    *,
    steps: int = 20_000,
    batch_size: int = 250,
) -> ConditionalVAE:
    """Train a conditional VAE with the same networks on MNIST.

    Args:
        images: Training pixels, 0 to 255.
        labels: Their digits.
        device: Where to train.
        steps: Optimizer steps.
        batch_size: Images a step.

    Returns:
        The model.
    """
    pixels, labels = images.flatten(1).to(device).float() / 255, labels.to(device)
    model = ConditionalVAE(pixels.shape[1], (200, 200), 50, 10, nn.Tanh).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    train(
        model,
        lambda i: -model.elbo(binarize(pixels[i]), labels[i]).mean(),
        torch.arange(len(pixels), device=device),
        steps=steps,
        batch_size=batch_size,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        validate_every=max(1, steps // 100),
        label="conditional VAE",
    )
    return model
