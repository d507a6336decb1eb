"""Two ways to tell autograd that what a function computes is not kept but computed again.

`checkpoint` is a function of its own to autograd: the forward pass runs without a graph, the backward pass runs the
function once more with one, and backward within backward fills the parameters' `.grad`. Everything that must be the
same the second time is kept beside the inputs: random generators and autocast.

`checkpoint_by_hooks` leaves the graph alone and replaces what its nodes save by a number. The first node that asks for
its tensor makes the function run again, and all get what they would have saved. So it goes with `torch.autograd.grad`,
and it can stop as soon as the last saved tensor is there.

PyTorch has both, as `torch.utils.checkpoint.checkpoint` with use_reentrant=True and =False.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten, tree_unflatten

from noise2tokens.gradient_checkpointing.schedules import Segment, check_cover


class Surroundings:
    """What a function's result depends on beside its arguments: random generators and autocast, as they are now."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.devices = sorted({x.get_device() for x in tensors if x.is_cuda})
        self.random = torch.get_rng_state(), [torch.cuda.get_rng_state(i) for i in self.devices]
        kinds = ["cpu", "cuda"] if self.devices else ["cpu"]
        self.autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in kinds
        ]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Have them back for a while; afterwards the generators go on as if nothing had been drawn."""
        now = self._draw_from(*self.random)
        try:
            with ExitStack() as stack:
                for kind, dtype, enabled in self.autocast:
                    stack.enter_context(torch.autocast(kind, dtype, enabled))
                yield
        finally:
            self._draw_from(*now)

    def _draw_from(self, state: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Set the generators, and return how they stood."""
        now = torch.get_rng_state(), [torch.cuda.get_rng_state(i) for i in self.devices]
        torch.set_rng_state(state)
        for i, other in zip(self.devices, states, strict=True):
            torch.cuda.set_rng_state(other, i)
        return now


class _Call:
    """A call of a function as one of tensors only: whatever else it was given keeps its place."""

    def __init__(self, function: Callable, args: tuple, kwargs: dict[str, Any]):
        if not callable(function):
            raise TypeError(f"need a function to call again, got {type(function).__name__}")
        leaves, self.spec = tree_flatten((args, kwargs))
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.tensors = [leaves[i] for i in self.places]
        self.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.function = function

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        leaves = list(self.others)
        for i, x in zip(self.places, tensors, strict=True):
            leaves[i] = x
        args, kwargs = tree_unflatten(leaves, self.spec)
        return self.function(*args, **kwargs)

    def release(self) -> "_Call":
        """Let go of the tensors, which autograd keeps."""
        self.tensors = []
        return self


def _anew(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same values as leaves of a new graph."""
    return [x.detach().requires_grad_(x.requires_grad) for x in tensors]


# First way


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: _Call, out: list, anchor: Tensor, *tensors: Tensor):
        ctx.call, ctx.surroundings = call, Surroundings(tensors)
        ctx.save_for_backward(*tensors)
        leaves, spec = tree_flatten(call(tensors))  # autograd is off in here
        out.append(spec)
        return tuple(leaves)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        if torch.is_grad_enabled():
            raise RuntimeError("checkpoint has no second derivative: use checkpoint_by_hooks")
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError(
                "checkpoint fills .grad and returns no gradient of parameters: call .backward() without inputs, "
                "or use checkpoint_by_hooks"
            )
        inputs = _anew(ctx.saved_tensors)
        with torch.enable_grad(), ctx.surroundings.restored():
            outputs = tree_flatten(ctx.call(inputs))[0]
        pairs = [
            (y, grad)
            for y, grad in zip(outputs, grads, strict=True)
            if grad is not None and isinstance(y, Tensor) and y.requires_grad
        ]
        if pairs:
            torch.autograd.backward(*zip(*pairs, strict=True))
        return None, None, None, *(x.grad for x in inputs)


def checkpoint(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call a function, forget all but its inputs and outputs, and run it again in the backward pass.

    Args:
        function: Has to compute the same when it is called again. Parameters that it uses get their gradients whether
            or not an input wants one. The output wants a gradient in any case, so what is frozen from its input on
            is run again for nothing.
        args, kwargs: What it is called with: tensors, also within lists, tuples and dictionaries, and anything else.

    Returns:
        What the function returns.

    Raises:
        TypeError: If the function cannot be called.
        RuntimeError: In the backward pass, if gradients are asked for by `torch.autograd.grad` or with `inputs`, twice
            differentiated, or an input was changed in place meanwhile.

    Source: Chen et al. 2016, section 4.1, algorithm 1; `torch.utils.checkpoint.checkpoint(use_reentrant=True)`.
    """
    call = _Call(function, args, kwargs)
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    spec: list = []
    # Without an input that wants a gradient, autograd would not look back at this call, nor at its parameters.
    anchor = torch.empty(0, requires_grad=True)
    tensors = call.tensors
    leaves = _Recompute.apply(call.release(), spec, anchor, *tensors)
    return tree_unflatten(leaves, spec[0])


# Second way


class _Keep(torch.autograd.Function):
    """Saves tensors as any node does, so that an enclosing checkpoint can forget them too."""

    @staticmethod
    def forward(ctx, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx, grad):
        raise AssertionError("nothing depends on this output")


class _Enough(Exception):
    """All that was saved the first time has been computed again."""


def _kind(x: Tensor) -> str:
    return f"{tuple(x.shape)} of {x.dtype}"


class _Saved:
    """What the nodes of one call have saved: tensors of which kinds, and for a while the tensors themselves."""

    def __init__(self, call: _Call):
        self.surroundings = Surroundings(call.tensors)
        anchor = torch.empty(0, requires_grad=True)
        self.inputs = _Keep.apply(anchor, *call.tensors)
        self.call, self.kinds = call.release(), []
        self.again: dict[int, Tensor] = {}

    def pack(self, x: Tensor) -> int:
        self.kinds.append(_kind(x))
        return len(self.kinds) - 1

    def unpack(self, number: int) -> Tensor:
        if number not in self.again:
            self.recompute()
        return self.again.pop(number)

    def recompute(self) -> None:
        found: list[Tensor] = []

        def keep(x: Tensor) -> None:
            found.append(x.detach())
            if len(found) == len(self.kinds):
                raise _Enough

        inputs = _anew(self.inputs.grad_fn.saved_tensors)
        hooks = saved_tensors_hooks(keep, lambda _: None)
        with torch.enable_grad(), self.surroundings.restored():
            try:
                with hooks:
                    self.call(inputs)
            except _Enough:
                pass
        for first, second in zip_longest(self.kinds, map(_kind, found), fillvalue="nothing"):
            if first != second:
                raise RuntimeError(
                    f"the function saved {first} the first time and {second} when it was called again"
                )
        self.again = dict(enumerate(found))


def checkpoint_by_hooks(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Do as `checkpoint`, by hooks on what autograd saves: for `torch.autograd.grad` and second derivatives too.

    Args:
        function: Has to compute the same, in the same order, when it is called again.
        args, kwargs: As for `checkpoint`.

    Returns:
        What the function returns.

    Raises:
        TypeError: If the function cannot be called.
        RuntimeError: In the backward pass, if the second call saves fewer tensors than the first or tensors of other
            shapes or types, or an input was changed in place meanwhile.

    Source: `torch.utils.checkpoint.checkpoint(use_reentrant=False)`.
    """
    call = _Call(function, args, kwargs)
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    saved = _Saved(call)
    with saved_tensors_hooks(saved.pack, saved.unpack):
        return function(*args, **kwargs)


def run_segments(
    layers: Sequence[nn.Module] | nn.Sequential,
    segments: Sequence[Segment],
    x: Tensor,
    how: Callable = checkpoint,
) -> Tensor:
    """Run a chain of layers of which some segments are recomputed.

    Args:
        layers: Each maps a tensor to the next layer's input.
        segments: Cover the layers in order, as from `optimal_segments`.
        x: Input of the first layer.
        how: `checkpoint`, `checkpoint_by_hooks`, or another function that is called as they are.

    Raises:
        ValueError: If the segments leave a gap or layers over.
    """
    check_cover(segments, len(layers))

    def run(x: Tensor, start: int, stop: int) -> Tensor:
        for layer in layers[start:stop]:
            x = layer(x)
        return x

    for segment in segments:
        if segment.recompute:
            x = how(run, x, segment.start, segment.stop)
        else:
            x = run(x, segment.start, segment.stop)
    return x
