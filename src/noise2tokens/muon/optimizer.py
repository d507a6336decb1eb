"""One optimizer for a whole model: Muon for the matrices of hidden layers, AdamW for everything else.

    optimizer = Muon(split_parameters(model), lr=1e-3)

Both kinds share learning rate and weight decay. Moonlight's rules make that possible: an update of either kind has
entries of about the same size, so that a rate that was found for AdamW may be kept.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from noise2tokens.muon.orthogonalize import newton_schulz

RMS = 0.2  # of the entries of U Vᵀ once it is scaled


class Muon(Optimizer):
    """W ← (1 - η λ) W - η U, with Muon's update U for groups that say `muon=True`, and AdamW's for the others.

    Args:
        params: Parameters, or groups of them as from `split_parameters`. A group without "muon" is of matrices.
        lr: η, of both kinds.
        weight_decay: λ, of both kinds.
        momentum: μ of Muon.
        nesterov: Whether Muon adds the gradient once more to its momentum.
        betas, eps: Of AdamW.
        orthogonalize: Of a matrix or a batch of them: `newton_schulz`, or `polar`.
        batched: Whether matrices of one shape are orthogonalized in one call, for which they are copied.

    Raises:
        ValueError: If a number is out of range, or Muon is given what is neither a matrix nor a batch of matrices.

    Source: Liu et al. 2025, equation 4; AdamW, Loshchilov and Hutter 2019, algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        orthogonalize: Callable[[Tensor], Tensor] = newton_schulz,
        batched: bool = True,
    ):
        self.orthogonalize, self.batched = orthogonalize, batched
        defaults = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov)
        super().__init__(params, defaults | dict(betas=betas, eps=eps, muon=True))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; ValueError if its numbers or shapes make no sense."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Make a step with the gradients that there are; return the loss of `closure`, if it is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            updates = self._muon(params, group) if group["muon"] else self._adamw(params, group)
            for p, update in zip(params, updates, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"])
        return loss

    def _muon(self, params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        directions = [momentum_direction(p.grad, self.state[p], group) for p in params]
        if self.batched:
            return list(map(matched, together(self.orthogonalize, directions)))
        return [matched(self.orthogonalize(direction)) for direction in directions]

    def _adamw(self, params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        return [adamw_update(p.grad, self.state[p], group) for p in params]


def momentum_direction(
    grad: Float[Tensor, "*shape"], state: dict[str, Any], group: dict[str, Any]
) -> Float[Tensor, "*shape"]:
    """Move the momentum on, M ← μ M + G, and return G + μ M; or M, without Nesterov.

    Args:
        grad: G.
        state: Holds the "momentum"; zero where it is missing.
        group: With "momentum", μ, and "nesterov".
    """
    if "momentum" not in state:
        state["momentum"] = torch.zeros_like(grad)
    momentum = state["momentum"].mul_(group["momentum"]).add_(grad)
    return grad.add(momentum, alpha=group["momentum"]) if group["nesterov"] else momentum


def matched(update: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
    """Return 0.2 √max(m, n) times an orthogonal matrix: its entries are then of the size of AdamW's.

    Source: Liu et al. 2025, equation 4 and lemma 1.
    """
    return RMS * math.sqrt(max(update.shape[-2:])) * update


def adamw_update(
    grad: Float[Tensor, "*shape"], state: dict[str, Any], group: dict[str, Any]
) -> Float[Tensor, "*shape"]:
    """Move both moments on, and return m̂ / (√v̂ + ε).

    Args:
        grad: Of a tensor.
        state: Holds "step", "mean" and "square"; zero where they are missing.
        group: With "betas" and "eps".
    """
    if "step" not in state:
        state |= {"step": 0, "mean": torch.zeros_like(grad), "square": torch.zeros_like(grad)}
    state["step"] += 1
    first, second = group["betas"]
    mean = state["mean"].lerp_(grad, 1 - first) / (1 - first ** state["step"])
    square = state["square"].mul_(second).addcmul_(grad, grad, value=1 - second)
    return mean / ((square / (1 - second ** state["step"])).sqrt() + group["eps"])


def together(orthogonalize: Callable[[Tensor], Tensor], matrices: Sequence[Tensor]) -> list[Tensor]:
    """Orthogonalize matrices, those of one shape in one call; the result is that of one call for each."""
    alike: dict[Any, list[int]] = {}
    for i, x in enumerate(matrices):
        alike.setdefault((x.shape, x.dtype, x.device), []).append(i)
    found: list[Tensor] = list(matrices)
    for places in alike.values():
        stack = orthogonalize(torch.stack([matrices[i] for i in places]))
        for i, x in zip(places, stack, strict=True):
            found[i] = x
    return found


def split_parameters(
    model: nn.Module, adamw: Sequence[str] = ("embedding", "head")
) -> list[dict[str, Any]]:
    """Divide a model's parameters as Moonlight does: matrices to Muon; vectors, embedding and head to AdamW.

    A router's matrix goes to Muon like any other, and stacked experts (E, m, n) go there as a batch.

    Args:
        model: Parameters that need no gradient are left out.
        adamw: Names of modules whose matrices go to AdamW all the same.

    Returns:
        Two groups for `Muon`; one of them alone where the other is empty.

    Raises:
        ValueError: If nothing is left to train, or `adamw` is one name and no sequence of them.

    Source: Liu et al. 2025, section 3.1, and the released examples/toy_train.py.
    """
    if isinstance(adamw, str):  # a sequence too, of letters
        raise ValueError(f"need a sequence of names, got {adamw!r}")
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[p.dim() > 1 and not set(name.split(".")) & set(adamw)].append(p)
    if not (groups[True] or groups[False]):
        raise ValueError("need a model with parameters to train, got none")
    return [{"params": params, "muon": muon} for muon, params in groups.items() if params]


def _check_group(group: dict[str, Any]) -> None:
    for name in ("lr", "weight_decay", "eps"):
        if not 0 <= group[name] < math.inf:
            raise ValueError(f"need {name} >= 0, got {group[name]}")
    for name, share in [("momentum", group["momentum"]), *(("betas", b) for b in group["betas"])]:
        if not 0 <= share < 1:
            raise ValueError(f"need {name} in [0, 1), got {share}")
    for p in group["params"]:
        if group["muon"] and (p.dim() not in (2, 3) or p.is_complex()):
            raise ValueError(
                f"Muon takes real matrices, and batches of them such as stacked experts, got {p.dtype} of the shape "
                f"{tuple(p.shape)}: flatten a convolution's kernel to a matrix, give vectors to AdamW (muon=False)"
            )
