"""What a token costs to train on, counted in three ways, and the laws that DeepSeek LLM publishes.

A multiplication and an addition are two operations; the backward pass takes twice those of the forward pass. So each
number of a matrix costs 6 for each token that it is applied to.
"""

from typing import NamedTuple

import torch

from noise2tokens.transformer import Config, Decoder


class PowerLaw(NamedTuple):
    """y = coefficient · x^exponent."""

    coefficient: float
    exponent: float

    def __call__(self, x):
        """Return y, for a number, an array or a tensor."""
        return self.coefficient * x**self.exponent


# Bi et al. 2024, equations 1 and 4, of the compute budget C in FLOP: the highest learning rate; tokens in a batch;
# non-embedding FLOPs of a token; tokens.
LEARNING_RATE = PowerLaw(0.3118, -0.1250)
BATCH_TOKENS = PowerLaw(0.2920, 0.3271)
MODEL_SCALE = PowerLaw(0.1715, 0.5243)
DATA_SCALE = PowerLaw(5.8316, 0.4757)

# Bi et al. 2024, table 2; the hidden widths are those of the released weights.
DEEPSEEK = {
    "7B": Config(102_400, 4096, 30, 32, hidden=11_008),
    "67B": Config(102_400, 8192, 95, 64, kv_heads=8, hidden=22_016),
}


class TokenFlops(NamedTuple):
    """FLOPs of a token in training, by three definitions.

    Attributes:
        without_vocabulary: 6 N₁, N₁ being the numbers of all matrices of the layers.
        with_vocabulary: 6 N₂, which adds those of one matrix between width and vocabulary.
        non_embedding: M, which adds the scores and values of attention to the first.
    """

    without_vocabulary: int
    with_vocabulary: int
    non_embedding: int


def flops_per_token(layers: int, width: int, vocab_size: int, length: int) -> TokenFlops:
    """Count by the formulas, which take 12 width² numbers a layer.

    4 width² for attention with as many key heads as query heads, and 8 width² for a feed-forward network.

    Args:
        layers: n_layer.
        width: d_model.
        vocab_size: n_vocab.
        length: l_seq, tokens of a sequence. Each token is granted all of them as keys, though a causal mask hides half.

    Raises:
        ValueError: If a number is below 1.

    Source: Bi et al. 2024, equation 2.
    """
    if min(layers, width, vocab_size, length) < 1:
        raise ValueError(f"need positive sizes, got {layers=}, {width=}, {vocab_size=}, {length=}")
    matrices = 72 * layers * width**2
    return TokenFlops(
        matrices, matrices + 6 * vocab_size * width, matrices + 12 * layers * width * length
    )


def exact_flops(config: Config, length: int) -> int:
    """Count the non-embedding FLOPs of a token for a model as it is, whatever its heads and widths.

    Args:
        config: Sizes; nothing is allocated.
        length: Tokens of a sequence.

    Raises:
        ValueError: If the length is below 1.
    """
    if length < 1:
        raise ValueError(f"need a sequence of one token or more, got {length}")
    with torch.device("meta"):
        blocks = Decoder(config).blocks
    numbers = sum(weight.numel() for weight in blocks.parameters() if weight.dim() > 1)
    return 6 * numbers + 12 * config.layers * config.width * length
