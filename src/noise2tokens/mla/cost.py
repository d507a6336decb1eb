"""What caches hold for each token, and what the two forms of latent attention compute."""

from fractions import Fraction

from torch import Tensor

from noise2tokens.mla.attention import Sizes
from noise2tokens.transformer import KVCache

# From the published configurations: (layers, groups, head dimension), or (layers, kv_rank, rope_dim).
GROUPED = {
    "Llama 2 7B, MHA": (32, 32, 128),
    "DeepSeek 67B, GQA": (95, 8, 128),
    "Llama 3 70B, GQA": (80, 8, 128),
    "Llama 3.1 405B, GQA": (126, 8, 128),
}
LATENT = {"DeepSeek-V2, MLA": (60, 512, 64), "DeepSeek-V3, MLA": (61, 512, 64)}


def grouped_elements(layers: int, groups: int, head_dim: int) -> int:
    """Count what keys and values of one token take: 2 groups head_dim layers. MHA: groups = heads, MQA: groups = 1."""
    _positive(layers=layers, groups=groups, head_dim=head_dim)
    return 2 * groups * head_dim * layers


def latent_elements(layers: int, kv_rank: int, rope_dim: int) -> int:
    """Count what latent and rotary key of one token take: (kv_rank + rope_dim) layers.

    Source: DeepSeek-V2, 2024, table 1.
    """
    _positive(layers=layers, kv_rank=kv_rank, rope_dim=rope_dim)
    return (kv_rank + rope_dim) * layers


def grouped_intensity(heads: int, groups: int, bits: int = 16) -> float:
    """Return the operations for each byte read, of one query of each head that attends to a long cache.

    MHA: groups = heads, MQA: groups = 1. Scores and values: 4 heads head_dim; read are 2 groups head_dim numbers.
    """
    _positive(heads=heads, groups=groups, bits=bits)
    return 2 * heads / groups * 8 / bits


def latent_intensity(heads: int, kv_rank: int, rope_dim: int, bits: int = 16) -> float:
    """Return the same for absorbed latent attention, whose heads all read the same latents."""
    _positive(heads=heads, kv_rank=kv_rank, rope_dim=rope_dim, bits=bits)
    return 2 * heads * (2 * kv_rank + rope_dim) / (kv_rank + rope_dim) * 8 / bits


class WeighedCache(KVCache):
    """A cache that says how many bytes it holds."""

    def __init__(self, capacity: int = 0):
        super().__init__(capacity)
        self._kept: tuple[Tensor, ...] = ()

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Add what belongs to new tokens, as `KVCache` does."""
        self._kept = super().append(*new)
        return self._kept

    @property
    def nbytes(self) -> int:
        """Bytes of the kept tokens, all sequences of the batch together; reserved room is not counted."""
        return sum(x[..., : self.length, :].nbytes for x in self._kept)


def crossover(sizes: Sizes, keys: int) -> Fraction | None:
    """Return the number of queries a step at which both forms cost the same; the absorbed one is cheaper below it.

    Args:
        sizes: Dimensions.
        keys: Tokens that are attended to.

    Returns:
        None if the absorbed form is cheaper for any number. It always is, too, where the result exceeds `keys`: no step
        has more queries than keys. So it is wherever 2 kv_rank < nope_dim + value_dim.

    Raises:
        ValueError: If there are no keys.
    """
    _positive(keys=keys)
    expand = sizes.kv_rank * (sizes.nope_dim + sizes.value_dim)
    wider = 2 * sizes.kv_rank - sizes.nope_dim - sizes.value_dim
    each = expand + wider * keys
    return Fraction(expand * keys, each) if each > 0 else None


def _positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"need {name} > 0, got {number}")
