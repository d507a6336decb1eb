"""Generative adversarial networks: a map from noise to data, trained against a distance that is itself learned.

A generator g turns noise into samples. A second network looks at real and generated samples, and what it can tell apart
is the loss of the first. With a classifier that is a Jensen-Shannon divergence, at the classifier's optimum; with a
function of bounded slope it is a Wasserstein distance. The losses are pure functions of the second network's outputs.

The discriminator puts out logits a(x): its probability that x is real is sigmoid(a(x)). A critic puts out any number.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Real
from torch import Generator, Tensor, nn
from torch.nn.functional import softplus
from tqdm import tqdm

from noise2tokens.networks import mlp
from noise2tokens.training import live


def discriminator_loss(real: Float[Tensor, "n"], fake: Float[Tensor, "m"]) -> Float[Tensor, ""]:
    """Compute -E log c(x) - E log(1 - c(g(z))) from logits: what the discriminator minimizes.

    Args:
        real: Logits of real samples.
        fake: Logits of generated ones.

    Source: Goodfellow et al. 2014, equation 1, with the sign turned.
    """
    return softplus(-real).mean() + softplus(fake).mean()


def minimax_loss(fake: Float[Tensor, "m"]) -> Float[Tensor, ""]:
    """Compute E log(1 - c(g(z))) from logits: the generator's loss in the game as it is stated.

    Args:
        fake: Logits of generated samples.

    Source: Goodfellow et al. 2014, equation 1.
    """
    return -softplus(fake).mean()


def non_saturating_loss(fake: Float[Tensor, "m"]) -> Float[Tensor, ""]:
    """Compute -E log c(g(z)) from logits: the generator's loss that is used.

    Args:
        fake: Logits of generated samples.

    Source: Goodfellow et al. 2014, section 3.
    """
    return softplus(-fake).mean()


def critic_loss(real: Float[Tensor, "n"], fake: Float[Tensor, "m"]) -> Float[Tensor, ""]:
    """Compute E φ(g(z)) - E φ(x): the critic minimizes it, and its negative is the estimated Wasserstein distance.

    Args:
        real: The critic's values at real samples.
        fake: Its values at generated ones.

    Source: Arjovsky et al. 2017, equation 2, with the sign turned.
    """
    return fake.mean() - real.mean()


def gradient_penalty(
    critic: Callable[[Tensor], Tensor],
    real: Float[Tensor, "n *event"],
    fake: Float[Tensor, "n *event"],
    generator: Generator | None = None,
) -> Float[Tensor, ""]:
    """Compute E (|∇φ(x̂)| - 1)² at points x̂ between real and generated samples.

    Args:
        critic: Maps a batch to one value a sample.
        real: Real samples.
        fake: As many generated ones.
        generator: Source of the positions between them, on the samples' device.

    Returns:
        The mean over the batch, through which gradients reach the critic's weights.

    Raises:
        ValueError: If the shapes differ.

    Source: Gulrajani et al. 2017, equation 3.
    """
    if real.shape != fake.shape:
        raise ValueError(
            f"need two sets of one shape, got {tuple(real.shape)}, {tuple(fake.shape)}"
        )
    where = torch.rand(len(real), device=real.device, generator=generator)
    where = where.view(-1, *[1] * (real.dim() - 1))
    between = torch.lerp(real, fake, where).detach().requires_grad_()
    # One number a sample, so the gradient of the sum holds each sample's own gradient.
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


class GAN(nn.Module):
    """A generator, and the network that critics it.

    Args:
        latent: Number of dimensions of the noise.
        dim: Number of dimensions of a sample.
        width: Units of the two hidden layers of either network.
        unit_interval: Whether samples lie in [0, 1], as pixels do.
    """

    def __init__(self, latent: int, dim: int, width: int, unit_interval: bool = False):
        super().__init__()
        self.latent = latent
        self.generator = mlp(latent, (width, width), dim)
        if unit_interval:
            self.generator.append(nn.Sigmoid())
        self.critic = mlp(dim, (width, width), 1, lambda: nn.LeakyReLU(0.2))

    def forward(self, z: Float[Tensor, "n latent"]) -> Float[Tensor, "n dim"]:
        """Map noise to samples."""
        return self.generator(z)

    def score(self, x: Float[Tensor, "n dim"]) -> Float[Tensor, "n"]:
        """Return the discriminator's logits, or the critic's values."""
        return self.critic(x)[:, 0]

    def noise(self, n: int, generator: Generator | None = None) -> Float[Tensor, "{n} latent"]:
        """Draw standard normal latents."""
        device = next(self.parameters()).device
        return torch.randn(n, self.latent, device=device, generator=generator)

    @torch.no_grad()
    def sample(self, n: int, generator: Generator | None = None) -> Float[Tensor, "{n} dim"]:
        """Draw n samples."""
        return self(self.noise(n, generator))


LOSSES = {"minimax": minimax_loss, "non_saturating": non_saturating_loss}


def fit_gan(
    gan: GAN,
    draw: Callable[[int], Tensor],
    *,
    loss: str,
    steps: int,
    batch_size: int,
    learning_rate: float,
    critic_steps: int = 1,
    penalty: float | int = 10,
    watch: Callable[[int], None] | None = None,
    watch_every: int = 100,
) -> list[float]:
    """Train generator and critic in turns. The common loop has one loss and one optimizer; a game has two of both.

    Args:
        gan: The two networks.
        draw: Returns that many real samples, on the model's device.
        loss: "minimax" or "non_saturating", or "wasserstein" for a critic with gradient penalty.
        steps: Generator steps.
        batch_size: Real, and generated, samples a step.
        learning_rate: Adam's, for both.
        critic_steps: Steps of the critic before each step of the generator.
        penalty: Weight λ of the gradient penalty; of no effect for the other losses.
        watch: Called with the number of steps done: before the first, every `watch_every`, and after the last.
        watch_every: Steps between two calls.

    Returns:
        The critic's loss before each generator step, without the penalty.

    Raises:
        ValueError: If the loss is unknown or a number is below 1.

    Source: Gulrajani et al. 2017, algorithm 1; betas of Adam from their released code.
    """
    if loss not in (*LOSSES, "wasserstein") or min(steps, batch_size, critic_steps) < 1:
        raise ValueError(
            f"need a loss of {[*LOSSES, 'wasserstein']} and at least 1 step, sample and critic step; got "
            f"{loss!r}, {steps}, {batch_size} and {critic_steps}"
        )
    generator, critic = (
        torch.optim.Adam(part.parameters(), lr=learning_rate, betas=(0.5, 0.9), fused=True)
        for part in (gan.generator, gan.critic)
    )
    losses = []
    for step in tqdm(range(steps), desc="GAN", disable=not live(), leave=False):
        if watch is not None and step % watch_every == 0:
            watch(step)
        for _ in range(critic_steps):
            real, fake = draw(batch_size), gan.sample(batch_size)
            value = {"wasserstein": critic_loss}.get(loss, discriminator_loss)(
                gan.score(real), gan.score(fake)
            )
            extra = (
                penalty * gradient_penalty(gan.score, real, fake) if loss == "wasserstein" else 0
            )
            critic.zero_grad(set_to_none=True)
            (value + extra).backward()
            critic.step()
        losses.append(value.detach())
        scores = gan.score(gan(gan.noise(batch_size)))
        generator.zero_grad(set_to_none=True)
        (-scores.mean() if loss == "wasserstein" else LOSSES[loss](scores)).backward()
        generator.step()
    if watch is not None:
        watch(steps)
    return torch.stack(losses).tolist()


def mnist_experiment(
    images: Real[Tensor, "n height width"],
    device: torch.device,
    *,
    steps: int = 10_000,
    batch_size: int = 250,
    width: int = 512,
) -> tuple[GAN, list[float]]:
    """Train a WGAN-GP of two perceptrons on MNIST.

    Args:
        images: Training pixels, 0 to 255.
        device: Where to train.
        steps: Generator steps, with five critic steps each.
        batch_size: Images a step.
        width: Units of each hidden layer.

    Returns:
        The model, and the critic's loss at each generator step.

    Source: Gulrajani et al. 2017, algorithm 1; their networks for MNIST are convolutional.
    """
    pixels = images.flatten(1).to(device).float() / 255
    gan = GAN(64, pixels.shape[1], width, unit_interval=True).to(device)

    def draw(n: int) -> Tensor:
        return pixels[torch.randint(len(pixels), (n,), device=device)]

    losses = fit_gan(
        gan,
        draw,
        loss="wasserstein",
        steps=steps,
        batch_size=batch_size,
        learning_rate=1e-4,
        critic_steps=5,
    )
    return gan, losses
