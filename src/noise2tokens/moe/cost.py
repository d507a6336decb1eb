"""What a mixture of experts costs: parameters in all and for a token, operations, and where its messages go."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor


@dataclass(frozen=True)
class Model:
    """The sizes of a published decoder with SwiGLU networks, dense in its first layers.

    Attributes:
        width, layers, vocabulary: As they are.
        attention: Parameters of a layer's attention.
        hidden: Of a dense layer.
        dense: Layers that are dense, first of all.
        experts, top_k, shared: Routed experts, those of a token, and shared ones, in the other layers.
        expert_hidden: Of one expert.
        score_dims: Dimensions of a head's query and value, times heads, halved: what a pair of tokens costs.
    """

    width: int
    layers: int
    vocabulary: int
    attention: int
    hidden: int | float
    dense: int
    score_dims: int
    experts: int = 0
    top_k: int = 0
    shared: int = 0
    expert_hidden: int | float = 0

    def parameters(self, *, active: bool = False) -> int | float:
        """Count the weights of all matrices, or of those that one token is multiplied with.

        Both hold the embedding, of which a token reads one row, as in Dai et al. 2024; DeepSeek-V3 leaves it out of the
        active ones.
        """
        routed = self.top_k if active else self.experts
        mixture = 3 * self.width * self.expert_hidden * (routed + self.shared)
        mixture += self.width * self.experts
        dense = 3 * self.width * self.hidden
        feed_forward = self.dense * dense + (self.layers - self.dense) * mixture
        return self.layers * self.attention + feed_forward + 2 * self.width * self.vocabulary

    def training_flops(self, tokens: int) -> int | float:
        """Count the operations of a training step on one sequence: two for a multiplication, and three passes.

        Attention is counted over the whole square of tokens, as papers do, although a causal one needs half of it.
        """
        multiplied = self.parameters(active=True) - self.width * self.vocabulary
        pairs = 2 * self.layers * self.score_dims * tokens
        return 6 * tokens * (multiplied + pairs)


LLAMA2_7B = Model(4096, 32, 32000, 4 * 4096**2, 11008, 32, 4096)
DEEPSEEK_MOE_16B = Model(2048, 28, 102400, 4 * 2048**2, 10944, 1, 2048, 64, 6, 2, 1408)
# Multi-head latent attention: down to 1536 for queries and to 512 + 64 for keys and values, up to 128 heads of
# 128 + 64 and of 128 + 128, and out.
MLA = 7168 * (1536 + 576) + 1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168
DEEPSEEK_V3 = Model(7168, 61, 129280, MLA, 18432, 3, 128 * 160, 256, 8, 1, 2048)


def groups_reached(experts_TK: Int64[Tensor, "T K"], experts: int, groups: int) -> float:
    """Return to how many groups (nodes) a token goes, on average: so often its row crosses the network."""
    group_TK = experts_TK // (experts // groups)
    reached = torch.zeros(len(experts_TK), groups, device=experts_TK.device)
    return reached.scatter_(1, group_TK, 1.0).sum(1).mean().item()


def expected_groups(experts: int, top_k: int, groups: int) -> float:
    """Return the same for K experts at random without a limit: G (1 - C(E - E/G, K) / C(E, K))."""
    others = experts - experts // groups
    return groups * (1 - math.comb(others, top_k) / math.comb(experts, top_k))
