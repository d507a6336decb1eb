"""The projector: from merged patches of the encoder to embeddings of the language model."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from noise2tokens.kimi_vl.moonvit import draw_weights

NORM_EPS = 1e-5


class Projector(nn.Module):
    """Normalize each patch, lay the patches of a block end to end, and map them by a network of two layers.

    Kimi-VL's: LayerNorm(1152), then 4 · 1152 = 4608 -> 4608, GELU, -> 2048.

    Args:
        width: Of the encoder.
        parts: Patches of a block, merge².
        outputs: Width of the language model.

    Source: Kimi-VL technical report, 2025, section 2.1; released code, `KimiVLMultiModalProjector`.
    """

    def __init__(self, width: int, parts: int, outputs: int):
        super().__init__()
        if min(width, parts, outputs) < 1:
            raise ValueError(f"need sizes of 1 or more, got {width}, {parts} and {outputs}")
        self.norm = nn.LayerNorm(width, NORM_EPS)
        self.inner = nn.Linear(parts * width, parts * width)
        self.out = nn.Linear(parts * width, outputs)
        draw_weights(self.inner)
        draw_weights(self.out)

    def forward(self, x_MPD: Float[Tensor, "M parts D"]) -> Float[Tensor, "M outputs"]:
        """Return one embedding for each block."""
        return self.out(F.gelu(self.inner(self.norm(x_MPD).flatten(1))))


def projector_parameters(width: int, parts: int, outputs: int) -> int:
    """Count its parameters: norm, and two matrices with biases."""
    inner = parts * width
    return 2 * width + (inner + 1) * inner + (inner + 1) * outputs
