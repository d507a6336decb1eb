"""How fast attention is, and how far it goes: our kernel beside PyTorch's three, in one run.

All backends see the same tensors, and are timed in alternating rounds by `noise2tokens.benchmark`. Speed is given in
operations of the algorithm, 4 N^2 d forward and 2.5 times that backward, so that a backend which computes more than it
must is not rewarded for it. As in the papers, batch times length and heads times dimension are held fixed, so that
every length has the same number of tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from noise2tokens.benchmark import compare, peak_memory
from noise2tokens.flash_attention import flash_attention, kernel_runs_on
from noise2tokens.flash_attention.cost import attention_flops, peak_bytes
from noise2tokens.flash_attention.pictures import draw_speed
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


def peak(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that a call holds at once: by the GPU's own account, or by counting tensors on a CPU."""
    return peak_memory(run, device) if device.type == "cuda" else peak_bytes(run)


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
    seconds: float = 0.2,
) -> list[dict[str, Any]]:
    """Operations per second of every backend, forward and backward, with and without causal mask.

    Args:
        lengths: sequence lengths N.
        dims: head dimensions d.
        device: where to measure.
        tokens: batch times length.
        width: heads times head dimension.
        seconds: how long each pass of each backend is measured, about.

    Returns:
        One row for each length, dimension, mask and backend, with TFLOP/s "forward" and "backward" and "peak_bytes"
        of both passes; a backend that does not run there has a "reason" in their place.

    Raises:
        ValueError: If the width is not a multiple of a dimension.

    Source: setting of Dao 2023, section 4.1.
    """
    rows = []
    for dim in dims:
        if width < dim or width % dim:
            raise ValueError(f"width must be a multiple of each dimension, got {width} and {dim}")
        for length in lengths:
            batch, heads = max(1, tokens // length), width // dim
            q, k, v, grad = qkv_and_grad(batch, heads, length, dim, device)
            for causal in (False, True):
                flops = partial(attention_flops, batch, heads, length, dim, causal)
                outputs, reasons = _try_all(q, k, v, causal)
                forward = compare(
                    {name: partial(ATTENTIONS[name], q, k, v, causal) for name in outputs},
                    device=device,
                    seconds=seconds,
                )
                backward = compare(
                    {
                        name: partial(torch.autograd.grad, o, (q, k, v), grad, retain_graph=True)
                        for name, o in outputs.items()
                    },
                    device=device,
                    seconds=seconds,
                )
                for name, attention in ATTENTIONS.items():
                    row = dict(length=length, dim=dim, causal=causal, backend=name)
                    if name in reasons:
                        rows.append({**row, "reason": reasons[name]})
                        continue

                    row["forward"] = flops() / forward[name].seconds / 1e12
                    row["backward"] = flops(backward=True) / backward[name].seconds / 1e12
                    both = partial(_both_passes, attention, q, k, v, grad, causal)
                    rows.append({**row, "peak_bytes": peak(both, device)})
                outputs.clear()
    return rows


def _both_passes(
    attention: Attention, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, causal: bool
) -> None:
    torch.autograd.grad(attention(q, k, v, causal), (q, k, v), grad)


def _try_all(
    q: Tensor, k: Tensor, v: Tensor, causal: bool
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Run every backend once, forward and backward; keep outputs, or the reason why there is none.

    An error of our own that is not the memory's is no reason, but a defect, and is raised.
    """
    outputs, reasons = {}, {}
    for name, attention in ATTENTIONS.items():
        try:
            o = attention(q, k, v, causal)
            torch.autograd.grad(o.sum(), (q, k, v), retain_graph=True)
        except torch.OutOfMemoryError:
            reasons[name] = "out of memory"
        except RuntimeError as error:
            if name == "ours":
                raise
            reasons[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
        else:
            outputs[name] = o
    return outputs, reasons


@contextmanager
def memory_limit(device: torch.device, limit: float) -> Iterator[None]:
    """Let a GPU run out of memory as if it had no more than this.

    Args:
        device: where.
        limit: bytes.

    On a CPU there is nothing to limit, and nothing happens.
    """
    if device.type != "cuda":
        yield
        return
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
    batch: int, heads: int, length: int, dim: int, device: torch.device, seconds: float = 1.0
) -> dict[str, float]:
    """Forward and backward together, the plain way and ours, without mask.

    Args:
        batch, heads, length, dim: the shape of the queries.
        device: where to measure.
        seconds: how long each is measured, about.

    Returns:
        Milliseconds and peak bytes (inputs included) of both: "plain_ms", "ours_ms", "plain_bytes", "ours_bytes", and
        "speedup", the median over alternating rounds of the plain way's time over ours.

    Source: setting of Dao et al. 2022, Figure 2, left.
    """
    q, k, v, grad = qkv_and_grad(batch, heads, length, dim, device)
    calls = {
        name: partial(_both_passes, attention, q, k, v, grad, False)
        for name, attention in (("ours", flash_attention), ("plain", plain_attention))
    }
    timings = compare(calls, device=device, seconds=seconds)
    found = {f"{name}_ms": 1e3 * timing.seconds for name, timing in timings.items()}
    # A GPU's account begins after the inputs were allocated, and the other one before.
    inputs = sum(x.nbytes for x in (q, k, v, grad)) if device.type == "cuda" else 0
    found |= {f"{name}_bytes": inputs + peak(call, device) for name, call in calls.items()}
    return found | {"speedup": timings["plain"].ratio}


def fastest_tile(
    tiles: Sequence[Any], seconds_of: Callable[[Any], float]
) -> tuple[Any, dict[str, float | str]]:
    """Time some ways to cut a kernel's work, and name the fastest.

    Args:
        tiles: what to try, about eight for a kernel.
        seconds_of: times one of them; it may fail, as where a tile needs more shared memory than there is.

    Returns:
        The fastest, and for each tile its seconds or the reason of its failure.

    Raises:
        RuntimeError: if none runs.
    """
    found: dict[str, float | str] = {}
    best, least = None, float("inf")
    for tile in tiles:
        try:
            seconds = seconds_of(tile)
        # Triton's own classes, which may be missing here, or a wrong result.
        except Exception as error:
            found[str(tile)] = (str(error).strip() or type(error).__name__).splitlines()[0]
            continue
        found[str(tile)] = seconds
        if seconds < least:
            best, least = tile, seconds
    if best is None:
        raise RuntimeError(f"no tile runs: {found}")
    return best, found


# What to try for each kernel, as (queries, keys, warps, stages): the entries of the table and their neighbors.
CANDIDATES: dict[str, list[tuple[int, int, int, int]]] = {
    "forward": [
        (128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (128, 64, 4, 4), (64, 128, 4, 3),
        (64, 64, 4, 3), (128, 32, 4, 4),
    ],
    "backward over keys": [
        (64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 3), (32, 128, 4, 3), (64, 64, 8, 3), (64, 64, 4, 2),
        (128, 128, 8, 2), (32, 64, 4, 3),
    ],
    "backward over queries": [
        (128, 64, 8, 3), (128, 64, 4, 3), (128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 8, 2),
        (128, 32, 4, 3), (128, 128, 8, 2),
    ],
}  # fmt: skip


def sweep_tiles(
    candidates: Mapping[str, Sequence[Sequence[int]]],
    shape: tuple[int, int, int, int],
    device: torch.device,
    seconds: float,
) -> dict[str, dict[str, Any]]:
    """Time the three kernels with one tile after another, under a causal mask.

    Args:
        candidates: tiles to try, as `CANDIDATES`.
        shape: batch, heads, length and dimension.
        device: where; the kernels must run there.
        seconds: how long each is measured, about.

    Returns:
        For each kernel the "fastest" tile, the one in the "table", and "seconds" (or a reason) for each tried: of the
        forward pass, or of a whole backward pass in which one of the two kernels has that tile.
    """
    from noise2tokens.flash_attention import kernel

    q, k, v, grad = qkv_and_grad(*shape, device)
    attention = partial(kernel.kernel_attention, q, k, v, True, shape[-1] ** -0.5)

    def results() -> list[Tensor]:
        o, _ = attention()
        return [o.detach(), *torch.autograd.grad(o, (q, k, v), grad)]

    expected, found = results(), {}
    for which, (name, tiles) in enumerate(candidates.items()):

        def seconds_of(tile: Sequence[int], which: int = which) -> float:
            with kernel.tried(q, v, which, kernel.Tile(*tile)):
                for ours, right in zip(results(), expected, strict=True):
                    torch.testing.assert_close(
                        ours, right, rtol=0.02, atol=0.02 * right.abs().max().item()
                    )
                if which == 0:
                    run = attention
                else:
                    o, _ = attention()
                    run = partial(torch.autograd.grad, o, (q, k, v), grad, retain_graph=True)
                return compare({"run": run}, device=device, seconds=seconds, rounds=5)[
                    "run"
                ].seconds

        best, times = fastest_tile([tuple(tile) for tile in tiles], seconds_of)
        table = list(kernel._tiles(q, v)[which])
        found[name] = {"fastest": list(best), "table": table, "seconds": times}
    return found


BUDGETS = {
    "full": {
        "lengths": (512, 1024, 2048, 4096, 8192, 16_384),
        "dims": (64, 128),
        "tokens": 16_384,
        "width": 2048,
        "seconds": 0.2,
        "gpt2": (64, 16, 1024, 64),
        "memory_lengths": (2048, 4096),
        "doubling": tuple(2**i for i in range(10, 19)),
        "limit": 15e9,
        "sweep": ((4, 32, 4096, 64), (4, 16, 4096, 128)),
    },
}


def full_scale(
    device: torch.device,
    *,
    seed: int,
    lengths: Sequence[int],
    dims: Sequence[int],
    tokens: int,
    width: int,
    seconds: float,
    gpt2: Sequence[int],
    memory_lengths: Sequence[int],
    doubling: Sequence[int],
    limit: float,
    sweep: Sequence[Sequence[int]],
) -> tuple[dict[str, Any], dict[str, Figure]]:
    """Time our kernel beside PyTorch's, and find how long a sequence fits into memory.

    Args:
        device: where to measure; on a GPU it has to be one that the kernel runs on.
        seed: of the random inputs.
        lengths, dims, tokens, width, seconds: as for `speed`.
        gpt2: batch, heads, length and dimension of the setting of Dao et al. 2022, Figure 2.
        memory_lengths: lengths at which both ways' memory is compared.
        doubling: lengths to try until memory runs out.
        limit: bytes of GPU memory that may be used; of no effect on a CPU.
        sweep: shapes at which to try tiles, where the kernel runs; see `sweep_tiles`.

    Returns:
        "tiles" by dimension, "speed", "gpt2", "memory" by length, and "longest" sequences of both ways. A picture of
        the speeds for each dimension.

    Raises:
        RuntimeError: if the device is a GPU that the kernel does not run on.
    """
    if device.type == "cuda" and not kernel_runs_on(device):
        raise RuntimeError("the kernel needs a GPU of compute capability 8.0 or more, and Triton")
    torch.manual_seed(seed)
    with memory_limit(device, limit):
        tiles = {}
        if kernel_runs_on(device):
            for shape in sweep:
                tiles[str(shape[-1])] = sweep_tiles(CANDIDATES, tuple(shape), device, seconds)
        rows = speed(lengths, dims, device, tokens, width, seconds)
        results = {
            "tiles": tiles,
            "speed": rows,
            "gpt2": plain_against_ours(*gpt2, device, 5 * seconds),
            "memory": {
                str(n): plain_against_ours(2, 16, n, 64, device, seconds) for n in memory_lengths
            },
            "longest": {
                name: longest(attention, doubling, 64, device)
                for name, attention in (("plain", plain_attention), ("ours", flash_attention))
            },
        }
    figures = {}
    for dim in dims:
        figure = plt.figure(figsize=(9, 3))
        draw_speed(rows, dim, figure)
        figures[f"Operations of the algorithm per second, head dimension {dim}"] = figure
    return results, figures
