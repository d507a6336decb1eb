"""How evenly experts are loaded, and what keeps them so.

B sequences   T tokens of each, or of all   E experts   K experts of a token
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from noise2tokens.moe.router import TINY

SCOPES = ("sequence", "batch")


@dataclass(frozen=True)
class Balancing:
    """What keeps a layer's experts evenly loaded: an auxiliary loss, a bias, both, or nothing.

    Attributes:
        alpha: Weight of the auxiliary loss.
        scope: What the auxiliary loss wants to be even: each "sequence", or the "batch".
        speed: How far the bias of an expert moves in a step (γ in DeepSeek-V3, u in Wang et al.).
        centered: Whether the biases' steps are shifted to a sum of 0, as in Moonlight.
    """

    alpha: float | int = 0.0
    scope: str = "sequence"
    speed: float | int = 0.0
    centered: bool = False

    def __post_init__(self):
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {SCOPES}, got {self.scope!r}")
        if not (self.alpha >= 0 and self.speed >= 0):
            raise ValueError(f"need alpha >= 0 and speed >= 0, got {self.alpha} and {self.speed}")


def load(experts_TK: Int64[Tensor, "T K"], experts: int) -> Int64[Tensor, "E"]:
    """Count the tokens of each expert."""
    return experts_TK.flatten().bincount(minlength=experts)


def max_violation(counts_E: Int64[Tensor, "*L E"]) -> Float[Tensor, "*L"]:
    """Return MaxVio, by how much the fullest expert exceeds the mean: 0 where even, E/K - 1 at worst; NaN of nothing.

    Source: Wang et al. 2024, equation 4.
    """
    counts_E = counts_E.double()
    return counts_E.amax(-1) / counts_E.mean(-1) - 1


def balance_loss(
    scores_BTE: Float[Tensor, "B T E"], top_k: int, scope: str = "sequence"
) -> Float[Tensor, ""]:
    """Return the mean over sequences of Σ f P, an expert's share of tokens times its share of affinity.

    Where the counts are even, f is 1 for each expert and the loss is 1, which is not its minimum. The counts are of the
    K highest affinities, without bias and groups, and have no gradient. Over the "batch", all tokens are one sequence,
    as packed sequences are in any case.

    Source: DeepSeek-V3, equations 17 to 20, without α.
    """
    if scope == "batch":
        scores_BTE = scores_BTE.flatten(0, 1)[None]
    tokens, experts = scores_BTE.shape[1:]
    best_BTK = scores_BTE.topk(top_k, sorted=False).indices
    counts_BE = torch.zeros_like(scores_BTE).scatter_(2, best_BTK, 1.0).sum(1)
    f_BE = counts_BE * experts / (top_k * tokens)
    p_BE = (scores_BTE / (scores_BTE.sum(2, keepdim=True) + TINY)).mean(1)
    return (f_BE * p_BE).sum(1).mean()


def bias_step(
    counts_E: Int64[Tensor, "E"], speed: float | int, centered: bool = False
) -> Float[Tensor, "E"]:
    """Return what is added to the biases: up for an expert with fewer tokens than the mean, down for one with more.

    Source: Wang et al. 2024, algorithm 1; centered, Liu et al. (Moonlight) 2025, who subtract the mean of the signs.
    """
    counts_E = counts_E.double()
    sign_E = (counts_E.mean() - counts_E).sign()
    if centered:
        sign_E = sign_E - sign_E.mean()
    return speed * sign_E
