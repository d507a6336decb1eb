"""A mixture of experts as the feed-forward network of a decoder.

sizes = MoEConfig(experts=64, top_k=6, hidden=32, shared=2)
moe = partial(MixtureOfExperts, sizes=sizes, balancing=Balancing(speed=1e-3))
model = Decoder(config, feed_forward=[SwiGLU] + [moe] * (config.layers - 1))
loss = next_token_loss(model(tokens), targets) + auxiliary_loss(model)      each step
balance(model)                                                             after the optimizer's step
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from noise2tokens.moe.balancing import Balancing, balance_loss, bias_step, load
from noise2tokens.moe.experts import grouped
from noise2tokens.moe.router import affinities, check_sizes, route
from noise2tokens.transformer import Config, SwiGLU


@dataclass(frozen=True)
class MoEConfig:
    """The sizes of a mixture of experts; ValueError if they do not fit together."""

    experts: int  # E, routed ones
    top_k: int  # K, of a token
    hidden: int  # F, of one expert
    shared: int = 1  # experts that every token goes to, computed as one network of shared · hidden
    groups: int = 1
    top_groups: int = 1  # of a token
    scale: float | int = 1.0  # what the weights of a token add up to

    def __post_init__(self):
        check_sizes(self.experts, self.top_k, self.groups, self.top_groups)
        if self.hidden < 1 or self.shared < 0 or not self.scale > 0:
            raise ValueError(f"need hidden >= 1, shared >= 0 and scale > 0 in {self}")


class Experts(nn.Module):
    """The matrices of the routed experts, and what computes with them; `compute` is called as `experts.grouped`."""

    def __init__(self, config: Config, sizes: MoEConfig, compute: Callable[..., Tensor] = grouped):
        super().__init__()
        self.compute = compute
        self.gate = nn.Parameter(torch.empty(sizes.experts, sizes.hidden, config.width))
        self.up = nn.Parameter(torch.empty(sizes.experts, sizes.hidden, config.width))
        self.down = nn.Parameter(torch.empty(sizes.experts, config.width, sizes.hidden))
        for weight in (self.gate, self.up, self.down):
            nn.init.normal_(weight, std=weight.shape[2] ** -0.5)

    def forward(
        self,
        x_TD: Float[Tensor, "T D"],
        weights_TK: Float[Tensor, "T K"],
        experts_TK: Int64[Tensor, "T K"],
    ) -> Float[Tensor, "T D"]:
        """Return for each token the weighted sum of its experts."""
        return self.compute(x_TD, weights_TK, experts_TK, self.gate, self.up, self.down)


class MixtureOfExperts(nn.Module):
    """Shared experts, and of many routed ones those that the router chooses for each token.

    Args:
        config: Of the decoder; only its width counts.
        linear: Makes the shared experts' maps, as in `Decoder`. The router stays plain.
        sizes: Of the mixture.
        balancing: What keeps it even, in training mode.
        compute: Of the routed experts: `experts.grouped`, `experts.looped`, or another that is called like them.

    Attributes:
        bias: Of each expert, for the choice only, in single precision or better whatever the model is converted to.
        counts: Tokens of each expert since the last call of `balance`, in training mode.
        auxiliary: The last batch's auxiliary loss times its weight, until `balance`; None in evaluation, or without
            such a loss.

    Source: Dai et al., DeepSeekMoE, 2024, equations 9 to 11; DeepSeek-V3, equations 12 to 16.
    """

    def __init__(
        self,
        config: Config,
        linear: Callable[..., nn.Module] = nn.Linear,
        *,
        sizes: MoEConfig,
        balancing: Balancing = Balancing(),  # noqa: B008 (it cannot be changed)
        compute: Callable[..., Tensor] = grouped,
    ):
        super().__init__()
        self.sizes, self.balancing = sizes, balancing
        self.router = nn.Parameter(torch.randn(sizes.experts, config.width) * config.width**-0.5)
        self.experts = Experts(config, sizes, compute)
        self.shared = None
        if sizes.shared:
            self.shared = SwiGLU(replace(config, hidden=sizes.shared * sizes.hidden), linear)
        self.register_buffer("bias", torch.zeros(sizes.experts))
        counts = torch.zeros(sizes.experts, dtype=torch.int64)
        self.register_buffer("counts", counts, persistent=False)
        self.auxiliary: Tensor | None = None

    def forward(self, x_BTD: Float[Tensor, "*B T D"]) -> Float[Tensor, "*B T D"]:
        """Return what is computed for each token by itself."""
        sizes, x_TD = self.sizes, x_BTD.flatten(0, -2)
        scores_TE = affinities(x_TD, self.router)
        weights_TK, experts_TK = route(
            scores_TE,
            self.bias,
            sizes.top_k,
            groups=sizes.groups,
            top_groups=sizes.top_groups,
            scale=sizes.scale,
        )
        self._watch(scores_TE, experts_TK, x_BTD.shape[-2])
        y_BTD = self.experts(x_TD, weights_TK, experts_TK).view_as(x_BTD)
        return y_BTD if self.shared is None else y_BTD + self.shared(x_BTD)

    def _watch(self, scores_TE: Tensor, experts_TK: Tensor, length: int) -> None:
        """In training, count loads and take the auxiliary loss, of sequences of that length."""
        self.auxiliary = None
        if self.training and len(experts_TK):
            self.counts += load(experts_TK, self.sizes.experts)
            if self.balancing.alpha:
                scores_BTE = scores_TE.unflatten(0, (-1, length))
                loss = balance_loss(scores_BTE, self.sizes.top_k, self.balancing.scope)
                self.auxiliary = self.balancing.alpha * loss

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # In bfloat16 steps of 0.001 are rounded, from 0.5 on to nothing, so a conversion to it leaves the bias out.
        bias = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype.itemsize < 4:
            self.bias = bias.to(self.bias.device, torch.float32)
        return self


def mixtures(model: nn.Module) -> list[MixtureOfExperts]:
    """The mixtures of experts of a model, from the first layer to the last."""
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


def auxiliary_loss(model: nn.Module) -> Tensor | float:
    """Return the sum of all layers' auxiliary losses of the last batch, with their weights; 0 where there is none.

    Raises:
        RuntimeError: If a layer's loss has lost its gradient, as where checkpointing runs the layer without one.
    """
    losses = [layer.auxiliary for layer in mixtures(model) if layer.auxiliary is not None]
    if torch.is_grad_enabled() and not all(loss.requires_grad for loss in losses):
        raise RuntimeError(
            "an auxiliary loss was computed without a gradient: do not checkpoint these layers"
        )
    return sum(losses) if losses else 0.0


@torch.no_grad()
def balance(model: nn.Module, group: Any = None) -> Int64[Tensor, "layers E"]:
    """Move the biases by the loads since the last call; return these loads and begin to count anew.

    Auxiliary losses are forgotten, since each holds the graph of its batch. Tokens of several batches add up where
    gradients do; a layer that is recomputed under checkpointing counts them twice, which moves no bias differently.

    Args:
        model: With one mixture of experts or more, all with as many experts.
        group: Processes that share the batch, whose loads are added up first; None for this one alone.

    Raises:
        ValueError: If the model has no mixture of experts.
    """
    layers = mixtures(model)
    if not layers:
        raise ValueError(f"there is no mixture of experts in this {type(model).__name__}")
    counts = torch.stack([layer.counts for layer in layers])
    if group is not None:
        torch.distributed.all_reduce(counts, group=group)
    for layer, counts_E in zip(layers, counts, strict=True):
        layer.bias += bias_step(counts_E, layer.balancing.speed, layer.balancing.centered)
        layer.counts.zero_()
        layer.auxiliary = None
    return counts


def expert_loads(model: nn.Module, run: Callable[[], object]) -> Int64[Tensor, "layers E"]:
    """Count the tokens of each expert while something runs, in whatever mode the model is."""
    layers = mixtures(model)
    counts = torch.stack([torch.zeros_like(layer.counts) for layer in layers])

    def hook(place: int) -> Callable:
        def count(module: Experts, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
            counts[place] += load(arguments[2], counts.shape[1])

        return count

    hooks = [layer.experts.register_forward_pre_hook(hook(i)) for i, layer in enumerate(layers)]
    try:
        run()
    finally:
        for one in hooks:
            one.remove()
    return counts


# Names: ours, and those of transformers' DeepseekV3MoE.
SHARED = {
    f"shared.{name}.weight": f"shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")
}
PLAIN = {"router": "gate.weight", "bias": "gate.e_score_correction_bias"} | SHARED


def to_transformers(state: Mapping[str, Tensor], *, separate: bool = False) -> dict[str, Tensor]:
    """Rename a mixture's state for transformers' `DeepseekV3MoE`.

    Args:
        state: From `MixtureOfExperts.state_dict`.
        separate: Three matrices for each expert, as in released checkpoints, in place of two tensors for all.

    Source: transformers 5, models/deepseek_v3; names in checkpoints of DeepSeek-V3 and Moonlight.
    """
    renamed = {theirs: state[ours] for ours, theirs in PLAIN.items() if ours in state}
    if separate:
        for name in ("gate", "up", "down"):
            for i, weight in enumerate(state[f"experts.{name}"]):
                renamed[f"experts.{i}.{name}_proj.weight"] = weight
        return renamed
    gate_up = torch.cat([state["experts.gate"], state["experts.up"]], 1)
    return renamed | {"experts.gate_up_proj": gate_up, "experts.down_proj": state["experts.down"]}


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the state of a `DeepseekV3MoE`, or of that layer in a checkpoint, for `MixtureOfExperts`.

    Raises:
        ValueError: If there are names that it does not know, or matrices of an expert are missing.
    """
    left = dict(state)
    renamed = {ours: left.pop(theirs) for ours, theirs in PLAIN.items() if theirs in left}
    if "experts.gate_up_proj" in left and "experts.down_proj" in left:
        gate, up = left.pop("experts.gate_up_proj").chunk(2, 1)
        renamed |= {
            "experts.gate": gate,
            "experts.up": up,
            "experts.down": left.pop("experts.down_proj"),
        }
    else:
        count = sum(name.startswith("experts.") for name in left) // 3
        for name in ("gate", "up", "down"):
            wanted = [f"experts.{i}.{name}_proj.weight" for i in range(count)]
            if not count or not all(key in left for key in wanted):
                raise ValueError(f"matrices of experts are missing: got {sorted(state)}")
            renamed[f"experts.{name}"] = torch.stack([left.pop(key) for key in wanted])
    if left:
        raise ValueError(f"unknown names: {sorted(left)}")
    return renamed
