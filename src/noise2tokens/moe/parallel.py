"""Experts on several processes: each token's row travels to its experts and the result back, by two all-to-alls.

Process r of W holds experts r L to (r + 1) L - 1, and its own share of the batch. What is no routed expert (router,
shared experts, attention) is the same on all processes, and its gradients are added up as in data parallelism. Those of
the experts are complete where they are, since all tokens came by.

    T tokens here   K experts of a token   N = T K rows to send   M rows received   W processes   L experts of each
"""

import copy
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor, nn

from noise2tokens.moe.balancing import load
from noise2tokens.moe.experts import by_expert, combine, grouped_swiglu
from noise2tokens.moe.layer import Experts, mixtures


class _AllToAll(torch.autograd.Function):
    """Rows to other processes and rows from them; their gradients go the same way back."""

    @staticmethod
    def forward(ctx, x: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _AllToAll.apply(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def all_to_all(
    x: Float[Tensor, "N *rest"], sent: list[int], received: list[int], group: Any = None
) -> Float[Tensor, "M *rest"]:
    """Send the first rows to process 0, the next to process 1 and so on; return what they sent, in their order.

    Args:
        x: Rows, sorted by where they go.
        sent: How many go to each process.
        received: How many come from each.
        group: The processes; all of them if not given.
    """
    return _AllToAll.apply(x, sent, received, group)


def expert_parallel(
    x_TD: Float[Tensor, "T D"],
    weights_TK: Float[Tensor, "T K"],
    experts_TK: Int64[Tensor, "T K"],
    gate_LFD: Float[Tensor, "L F D"],
    up_LFD: Float[Tensor, "L F D"],
    down_LDF: Float[Tensor, "L D F"],
    group: Any = None,
) -> Float[Tensor, "T D"]:
    """Return what `experts.grouped` does with all experts, where each process holds L of them.

    All processes of the group have to call it, with tokens or without.
    """
    world, local = dist.get_world_size(group), len(gate_LFD)
    rows_ND, order_N = by_expert(x_TD, experts_TK)
    sent_WL = load(experts_TK, world * local).view(world, local)
    received_WL = torch.empty_like(sent_WL)
    dist.all_to_all_single(received_WL, sent_WL, group=group)
    sent, received = sent_WL.sum(1).tolist(), received_WL.sum(1).tolist()

    rows_MD = all_to_all(rows_ND, sent, received, group)
    # They come sorted by process, and by expert within; what computes wants them sorted by expert.
    expert_M = torch.arange(local, device=x_TD.device).repeat(world)
    expert_M = expert_M.repeat_interleave(received_WL.flatten())
    sorted_M = expert_M.argsort(stable=True)
    rows_MD = rows_MD.index_select(0, sorted_M)
    y_MD = grouped_swiglu(rows_MD, received_WL.sum(0), gate_LFD, up_LFD, down_LDF)
    y_MD = torch.empty_like(y_MD).index_copy(0, sorted_M, y_MD)

    y_ND = all_to_all(y_MD, received, sent, group)
    return combine(y_ND, order_N, weights_TK).to(x_TD.dtype)


def shard_experts(model: nn.Module, group: Any = None) -> nn.Module:
    """Return a copy of a model that keeps this process's share of the experts and meets the others by all-to-all.

    Raises:
        ValueError: If the processes do not divide the experts.
    """
    model = copy.deepcopy(model)
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    for layer in mixtures(model):
        if layer.sizes.experts % world:
            raise ValueError(f"{world} processes do not divide {layer.sizes.experts} experts")
        own = slice(*(layer.sizes.experts // world * i for i in (rank, rank + 1)))
        for name in ("gate", "up", "down"):
            weight = getattr(layer.experts, name).detach()[own].clone()
            setattr(layer.experts, name, nn.Parameter(weight))
        layer.experts.compute = partial(expert_parallel, group=group)
    return model


def add_gradients(model: nn.Module, group: Any = None) -> None:
    """Add up, over the processes, the gradients of all parameters that are not experts."""
    experts = {p for m in model.modules() if isinstance(m, Experts) for p in m.parameters()}
    for parameter in model.parameters():
        if parameter not in experts:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=group)
