"""Which experts a token goes to, and how much each of them counts: DeepSeek-V3, equations 12 to 16.

T tokens   D width   E experts   K experts of a token   G groups   S experts of a group, E / G
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

TINY = 1e-20  # in the sum of weights, as in transformers, so that affinities which are all 0 give 0 and not NaN


def affinities(x_TD: Float[Tensor, "T D"], router_ED: Float[Tensor, "E D"]) -> Float[Tensor, "T E"]:
    """Return s = sigmoid(x · u) for each expert's vector u, in single precision or better, also under autocast.

    Source: DeepSeek-V3, equation 15.
    """
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    with torch.autocast(x_TD.device.type, enabled=False):
        return F.linear(x_TD.to(dtype), router_ED.to(dtype)).sigmoid()


def route(
    scores_TE: Float[Tensor, "T E"],
    bias_E: Float[Tensor, "E"],
    top_k: int,
    *,
    groups: int = 1,
    top_groups: int = 1,
    scale: float | int = 1.0,
) -> tuple[Float[Tensor, "T K"], Int64[Tensor, "T K"]]:
    """Choose experts by affinity and bias; weigh them by affinity alone.

    Args:
        scores_TE: Affinities, not negative.
        bias_E: Added for the choice, and for nothing else.
        top_k: K, experts of a token.
        groups: G, such as one for each node; expert e is in group e // (E / G).
        top_groups: Groups that a token may go to.
        scale: What the weights of a token add up to.

    Returns:
        Weights, and the experts that they belong to, in no particular order. Gradients go through the weights.

    Raises:
        ValueError: If the groups do not divide the experts, or hold too few of them for K.

    Source: DeepSeek-V3, equations 13, 14 and 16, and section 2.1.2, node-limited routing; `scale` is
    `routed_scaling_factor` in the released configuration, 2.5.
    """
    check_sizes(scores_TE.shape[1], top_k, groups, top_groups)
    preference_TE = scores_TE.detach() + bias_E
    if top_groups < groups:
        preference_TE = keep_groups(preference_TE, groups, top_groups)
    experts_TK = preference_TE.topk(top_k, sorted=False).indices
    weights_TK = scores_TE.gather(1, experts_TK)
    return scale * weights_TK / (weights_TK.sum(1, keepdim=True) + TINY), experts_TK


def keep_groups(
    preference_TE: Float[Tensor, "T E"], groups: int, top_groups: int
) -> Float[Tensor, "T E"]:
    """Leave each token its best groups and put minus infinity in the others.

    A group is as good as the sum of its two best experts; of its one expert, if it has no more.
    """
    preference_TGS = preference_TE.unflatten(1, (groups, -1))
    group_TG = preference_TGS.topk(min(2, preference_TGS.shape[2])).values.sum(2)
    kept_TG = torch.zeros_like(group_TG, dtype=torch.bool)
    kept_TG.scatter_(1, group_TG.topk(top_groups).indices, True)
    return preference_TGS.masked_fill(~kept_TG[..., None], -torch.inf).flatten(1)


def check_sizes(experts: int, top_k: int, groups: int, top_groups: int) -> None:
    """Raise ValueError if K experts of so many groups cannot be chosen."""
    if not (1 <= top_groups <= groups <= experts) or experts % groups:
        raise ValueError(
            f"groups must divide {experts} experts and be at least top_groups >= 1, got {groups} and {top_groups}"
        )
    if not 1 <= top_k <= top_groups * (experts // groups):
        raise ValueError(
            f"top_k must be 1 to {top_groups * (experts // groups)}, the experts of {top_groups} groups, got {top_k}"
        )
