"""How fast attention is, and how far it goes: our kernel beside PyTorch's three, in one run.

All backends see the same tensors. Speed is given in operations of the algorithm, 4 N^2 d forward and 2.5 times that
backward, so that a backend which computes more than it must is not rewarded for it. Times are medians over repeated
runs after a warm-up, by the GPU's own clock. As in the papers, batch times length and heads times dimension are held
fixed, so that every length has the same number of tokens.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from noise2tokens.flash_attention import flash_attention
from noise2tokens.flash_attention.cost import attention_flops, peak_bytes
from noise2tokens.flash_attention.tiled import plain_attention

Attention = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """PyTorch's attention by one of its backends; queries and keys are equally many, so the mask has one meaning."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


ATTENTIONS: dict[str, Attention] = {
    "ours": flash_attention,
    "SDPA flash": partial(sdpa, SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
    "SDPA math": partial(sdpa, SDPBackend.MATH),
}


def median_seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median time of one call, after three that do not count.

    Args:
        run: what to time.
        device: where it computes; on CUDA the device's events are the clock.
        repeats: timed calls.

    Returns:
        Seconds.
    """
    for _ in range(3):
        run()
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(repeats):
            run()
            marks.append(time.perf_counter())
        return median(after - before for before, after in zip(marks, marks[1:], strict=False))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize(device)
    return median(a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)) / 1e3


def qkv_and_grad(
    batch: int, heads: int, length: int, dim: int, device: torch.device
) -> list[Float[Tensor, "batch heads length dim"]]:
    """Random q, k, v that want gradients, and a gradient of the output; bfloat16 on a GPU, else single precision."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = (batch, heads, length, dim)
    q, k, v, grad = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    return [*(x.requires_grad_() for x in (q, k, v)), grad]


def speed(
    lengths: Iterable[int],
    dims: Iterable[int],
    device: torch.device,
    tokens: int = 16384,
    width: int = 2048,
    repeats: int = 20,
) -> list[dict[str, Any]]:
    """Operations per second of every backend, forward and backward, with and without causal mask.

    Args:
        lengths: sequence lengths N.
        dims: head dimensions d.
        device: where to measure.
        tokens: batch times length.
        width: heads times head dimension.
        repeats: timed calls of each.

    Returns:
        One row for each length, dimension, mask and backend, with TFLOP/s "forward" and "backward" and "peak_bytes"
        of both passes; a backend that does not run there has None in their place.

    Source: setting of Dao 2023, section 4.1.
    """
    rows = []
    for dim in dims:
        for length in lengths:
            batch, heads = max(1, tokens // length), width // dim
            inputs = qkv_and_grad(batch, heads, length, dim, device)
            for causal in (False, True):
                flops = partial(attention_flops, batch, heads, length, dim, causal)
                for name, attention in ATTENTIONS.items():
                    row = dict(length=length, dim=dim, causal=causal, backend=name)
                    measured = _measure(attention, *inputs, causal, repeats)
                    if measured is None:
                        rows.append({**row, "forward": None, "backward": None, "peak_bytes": None})
                        continue
                    forward, backward, peak = measured
                    row["forward"] = flops() / forward / 1e12
                    row["backward"] = flops(backward=True) / backward / 1e12
                    rows.append({**row, "peak_bytes": peak})
    return rows


def _measure(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, causal: bool, repeats: int
) -> tuple[float, float, int] | None:
    """Seconds forward, seconds backward and peak bytes; None if the backend is missing or runs out of memory."""

    def both():
        torch.autograd.grad(attention(q, k, v, causal), (q, k, v), grad)

    try:
        o = attention(q, k, v, causal)
        forward = median_seconds(lambda: attention(q, k, v, causal), q.device, repeats)
        backward = median_seconds(
            lambda: torch.autograd.grad(o, (q, k, v), grad, retain_graph=True), q.device, repeats
        )
        return forward, backward, peak_bytes(both)
    except torch.OutOfMemoryError:
        return None
    except RuntimeError as error:
        if "No available kernel" in str(error) or "No viable backend" in str(error):  # CUDA, CPU
            return None
        raise


@contextmanager
def memory_limit(device: torch.device, limit: float) -> Iterator[None]:
    """Let a GPU run out of memory as if it had no more than this.

    Args:
        device: a CUDA device.
        limit: bytes.

    Raises:
        ValueError: if the device is not a CUDA device.
    """
    if device.type != "cuda":
        raise ValueError(f"memory can be limited on a CUDA device only, got {device}")
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def longest(
    attention: Attention, lengths: Iterable[int], dim: int, device: torch.device
) -> int | None:
    """The longest of some growing lengths at which one head's forward and backward pass fit in memory.

    Args:
        attention: the backend.
        lengths: lengths to try, in growing order.
        dim: the head dimension.
        device: where to try; see `memory_limit`.

    Returns:
        The last length before memory ran out; None if the first was too long.
    """
    reached = None
    for length in lengths:
        try:
            q, k, v, grad = qkv_and_grad(1, 1, length, dim, device)
            torch.autograd.grad(attention(q, k, v, False), (q, k, v), grad)
        except torch.OutOfMemoryError:
            break
        reached = length
    return reached


def plain_against_ours(
    batch: int, heads: int, length: int, dim: int, device: torch.device, repeats: int = 20
) -> dict[str, float]:
    """Forward and backward together, the plain way and ours, without mask.

    Args:
        batch, heads, length, dim: the shape of the queries.
        device: where to measure.
        repeats: timed calls of each.

    Returns:
        Milliseconds and peak bytes of both: "plain_ms", "ours_ms", "plain_bytes", "ours_bytes".

    Source: setting of Dao et al. 2022, Figure 2, left.
    """
    q, k, v, grad = qkv_and_grad(batch, heads, length, dim, device)
    found = {}
    for name, attention in (("plain", plain_attention), ("ours", flash_attention)):

        def both(attention=attention):
            torch.autograd.grad(attention(q, k, v), (q, k, v), grad)

        found[f"{name}_ms"] = 1e3 * median_seconds(both, device, repeats)
        found[f"{name}_bytes"] = peak_bytes(both)
    return found
