"""The network that every model of this chapter is made of."""

from collections.abc import Callable, Sequence

from torch import nn


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
