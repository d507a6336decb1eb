"""How fast things are, compared: one protocol for the book.

Seconds on a shared machine say little, and a ratio of two medians that were taken one after the other says hardly
more, since the machine changes in between. So what is compared runs in alternating rounds in one process, after a
warm-up that is measured in time and not in calls, and the ratio is taken round by round: a slow second then slows both.
On a GPU the device's own clock counts, and the calls of one round are queued before the first of them ends, so that
the time to launch a kernel is hidden as it is in a real program.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch

# bf16 or fp16 matrix multiplication on tensor cores without sparsity, in FLOP/s, from NVIDIA's data sheets.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "RTX 4090": 165e12}


@dataclass(frozen=True)
class Timing:
    """What one of the compared calls took.

    Attributes:
        seconds: Median over the rounds, for one call.
        low: First quartile.
        high: Third quartile.
        ratio: Median over the rounds of its time over that of the first call in the same round.
        rounds: How many.
    """

    seconds: float
    low: float
    high: float
    ratio: float
    rounds: int


def compare(
    calls: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | None = None,
    seconds: float = 2.0,
    rounds: int = 15,
) -> dict[str, Timing]:
    """Time calls against each other, alternating.

    Args:
        calls: What to time, by name; the first is the one that ratios refer to.
        device: Where they compute; the CPU where left out.
        seconds: About how long to measure each in all; half as long again goes to the warm-up.
        rounds: Alternations, at least 3.

    Returns:
        A timing for each name.

    Raises:
        ValueError: If there is nothing to time, or too few rounds or no time to do it in.
    """
    if not calls or rounds < 3 or not seconds > 0:
        raise ValueError(
            f"need calls, rounds >= 3, seconds > 0; got {len(calls)}, {rounds}, {seconds}"
        )
    device = torch.device("cpu") if device is None else device
    repeats = {name: _warm_up(call, device, seconds, rounds) for name, call in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        # Every other round runs backwards, so that none always follows the same neighbor.
        for name in list(calls)[:: 1 if i % 2 == 0 else -1]:
            taken[name].append(_seconds(calls[name], repeats[name], device))
    first = taken[next(iter(calls))]
    return {
        name: Timing(
            seconds=median(times),
            low=sorted(times)[rounds // 4],
            high=sorted(times)[-1 - rounds // 4],
            ratio=median(a / b for a, b in zip(times, first, strict=True)),
            rounds=rounds,
        )
        for name, times in taken.items()
    }


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Return the most GPU memory that a call holds at once beyond what was held before it, in bytes.

    Raises:
        ValueError: If the device is not a CUDA device: the CPU's allocator keeps no such account.
    """
    if device.type != "cuda":
        raise ValueError(f"memory is accounted for on a CUDA device only, got {device}")
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def mfu(flops: float, seconds: float, peak: float) -> float:
    """Return the model FLOPs utilization: the share of a device's peak that an algorithm's own operations use.

    Args:
        flops: Operations that the algorithm needs, recomputation not counted.
        seconds: What it took.
        peak: Of the device, in FLOP/s, at the precision used; see `PEAK_FLOPS`.

    Raises:
        ValueError: If a number is not positive.

    Source: Chowdhery et al., PaLM, 2022, appendix B.
    """
    if not (flops > 0 and seconds > 0 and peak > 0):
        raise ValueError(f"need positive numbers, got {flops}, {seconds} and {peak}")
    return flops / seconds / peak


def _warm_up(call: Callable[[], object], device: torch.device, seconds: float, rounds: int) -> int:
    """Run a call for half of its time; return how often it fits into one round."""
    calls, start = 0, time.perf_counter()
    while calls < 2 or time.perf_counter() - start < seconds / 2:
        call()
        calls += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    each = (time.perf_counter() - start) / calls
    return max(1, round(seconds / rounds / each))


def _seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Seconds for one call, averaged over a number of them."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3 / repeats
