"""What is kept for the backward pass: by autograd's own hooks, and over time, operation by operation."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def saved_bytes(run: Callable[[], Any], apart_from: Iterable[Tensor] = ()) -> int:
    """Count the bytes that autograd keeps for the backward pass of a computation, each memory once.

    Args:
        run: The forward pass.
        apart_from: Tensors that exist anyway, such as parameters.

    Returns:
        Bytes.
    """
    known = {x.untyped_storage().data_ptr() for x in apart_from}
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        memory = x.untyped_storage()
        if memory.data_ptr() not in known:
            found[memory.data_ptr()] = memory.nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(found.values())


class Timeline(TorchDispatchMode):
    """Record, after every operation within it, how many bytes the tensors made within it hold.

    Args:
        limit: Bytes that may be held at once; the operation that exceeds them fails as it would on a GPU.

    Attributes:
        live: Bytes held now.
        history: Bytes held after each operation.

    Raises:
        torch.OutOfMemoryError: From an operation, if the limit is exceeded.
    """

    def __init__(self, limit: float | int | None = None):
        super().__init__()
        self.limit, self.live, self.history = limit, 0, []
        self._known: set[int] = set()

    @property
    def peak(self) -> int:
        """The most bytes held at once."""
        return max(self.history, default=0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {
            x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        }
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given | self._known:
                memory = x.untyped_storage()
                self._known.add(memory._cdata)
                self.live += memory.nbytes()
                weakref.finalize(memory, self._free, memory._cdata, memory.nbytes())
        self.history.append(self.live)
        if self.limit is not None and self.live > self.limit:
            raise torch.OutOfMemoryError(
                f"{self.live / 1e6:.1f} MB are held, and the limit is {self.limit / 1e6:.1f} MB"
            )
        return out

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
