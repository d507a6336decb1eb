"""Flow matching: learn the velocity of a path from data to noise by regression, without solving an equation."""

import torch
from jaxtyping import Float
from torch import Tensor

from noise2tokens.distribution_transforms.distances import optimal_pairs
from noise2tokens.flow_vs_diffusion.diffusion import Network
from noise2tokens.flow_vs_diffusion.integrators import Velocity
from noise2tokens.flow_vs_diffusion.paths import ProbabilityPath


def cfm_loss(
    network: Network,
    path: ProbabilityPath,
    x0: Float[Tensor, "batch *event"],
    eps: Float[Tensor, "batch *event"],
    t: Float[Tensor, "batch"],
) -> Float[Tensor, ""]:
    """Return the mean squared error of the predicted velocity, given both ends of each path.

    Args:
        network: Predicts dx_t/dt from x_t and t.
        path: How data and noise are joined.
        x0: Data.
        eps: Noise, each row the other end of the path of the same row of x0.
        t: Times in [0, 1].

    Returns:
        The mean over samples and elements. Its gradient is that of the regression on the marginal velocity.

    Source: Lipman et al. 2023, equation 9 (time reversed).
    """
    return (network(path.sample(x0, eps, t), t) - path.velocity(x0, eps, t)).square().mean()


def pair_by_transport(
    x0: Float[Tensor, "batch *event"], eps: Float[Tensor, "batch *event"]
) -> Float[Tensor, "batch *event"]:
    """Reorder a batch of noise so that the sum of squared distances to the data is least (minibatch optimal transport).

    Source: Tong et al. 2024, section 3.3; Pooladian et al. 2023.
    """
    return eps[optimal_pairs(x0, eps)]


def draw_times(
    x0: Float[Tensor, "batch *event"], earliest: float | int = 0
) -> Float[Tensor, "batch"]:
    """Draw a time for each sample, uniformly between `earliest` and 1.

    Args:
        x0: Gives number, dtype and device.
        earliest: Above 0 for a path whose velocity is infinite at 0.

    Raises:
        ValueError: If `earliest` is not in [0, 1).
    """
    if not 0 <= earliest < 1:
        raise ValueError(f"earliest must lie in [0, 1), got {earliest}")
    return earliest + (1 - earliest) * torch.rand(len(x0), dtype=x0.dtype, device=x0.device)


def predicted_velocity(network: Network, path: ProbabilityPath, source: str) -> Velocity:
    """Read a network that was trained on any kind of prediction as a velocity.

    Args:
        network: Its prediction about x_t, from x_t and t.
        path: The path that it was trained on.
        source: What it predicts: "x0", "eps", "velocity" or "score".

    Returns:
        v(x, t), for integrators and likelihoods.
    """
    return lambda x, t: path.convert(network(x, t), x, t, source, "velocity")
