"""How much memory checkpointing saves and how much time it takes, on decoders of several depths."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from noise2tokens.benchmark import compare, peak_memory
from noise2tokens.display import COLORS, INK
from noise2tokens.flash_attention.experiment import memory_limit
from noise2tokens.gradient_checkpointing.checkpoint import checkpoint_by_hooks
from noise2tokens.gradient_checkpointing.memory import Timeline
from noise2tokens.gradient_checkpointing.models import (
    attending,
    recomputed_attention,
    recomputing,
    stored_attention,
)
from noise2tokens.gradient_checkpointing.schedules import equal_spans
from noise2tokens.transformer import Config, Decoder, next_token_loss

VOCABULARY = 256


def root_spans(depth: int) -> list[tuple[int, int]]:
    """Segments of about the square root of the depth."""
    return equal_spans(depth, round(math.sqrt(depth)))


STRATEGIES: dict[str, Callable[[Decoder], AbstractContextManager]] = {
    "keep all": lambda model: nullcontext(),
    "every block": lambda model: recomputing(
        model, equal_spans(len(model.blocks), len(model.blocks))
    ),
    "segments of √n": lambda model: recomputing(model, root_spans(len(model.blocks))),
    "the same by hooks": lambda model: recomputing(
        model, root_spans(len(model.blocks)), checkpoint_by_hooks
    ),
    "every second block": lambda model: recomputing(
        model, equal_spans(len(model.blocks), len(model.blocks))[::2]
    ),
    "attention stored": lambda model: attending(model, stored_attention),
    "attention stored, recomputed": lambda model: attending(model, recomputed_attention),
}


def training_step(model: Decoder, tokens: Tensor) -> Callable[[], None]:
    """Make a call that goes forward and backward, and sets the gradients back to zero.

    The parameters' gradients get their memory here and keep it, as in training that adds up gradients. So a peak
    measured over the call alone is one of activations, and has no floor that grows with depth.
    """
    for p in model.parameters():
        if p.grad is None:
            p.grad = torch.zeros_like(p)

    def step() -> None:
        next_token_loss(model(tokens[:, :-1]), tokens[:, 1:]).backward()
        model.zero_grad(set_to_none=False)

    return step


def losses(
    strategy: Callable[[Decoder], AbstractContextManager], batches: Sequence[Tensor], seed: int
) -> list[float]:
    """Train a small decoder on given batches of tokens, and return the loss of each step in nats."""
    torch.manual_seed(seed)
    model = Decoder(Config(VOCABULARY, 64, 6, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    curve = []
    with strategy(model):
        for tokens in batches:
            loss = next_token_loss(model(tokens[:, :-1]), tokens[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
    return curve


def peak(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that a call holds at once beyond what was there before: by the GPU's account, or by `Timeline`."""
    if device.type == "cuda":
        return peak_memory(run, device)
    with Timeline() as timeline:
        run()
    return timeline.peak


def largest_batch(
    step: Callable[[int], object], device: torch.device, limit: float | int, most: int = 4096
) -> int:
    """Find the largest batch whose training step stays within a limit of memory.

    Args:
        step: Makes a training step with a batch of so many samples.
        device: A GPU's allocator holds the limit; on a CPU the tensors made by the step are counted.
        limit: Bytes.
        most: Where to stop looking.

    Returns:
        The batch; 0 if not even one sample fits.
    """

    def fits(batch: int) -> bool:
        try:
            with memory_limit(device, float(limit)):
                with nullcontext() if device.type == "cuda" else Timeline(limit):
                    step(batch)
        except torch.OutOfMemoryError:
            return False
        return True

    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


BUDGETS = {
    "long": {
        "depths": (4, 9, 16, 25, 36),
        "depth": 16,
        "width": 128,
        "heads": 4,
        "length": 256,
        "batch": 4,
        "limit": 256e6,
        "seconds": 20.0,
    },
    "full": {
        "depths": (4, 9, 16, 25, 36, 64),
        "depth": 36,
        "width": 1024,
        "heads": 16,
        "length": 2048,
        "batch": 4,
        "limit": 15e9,
        "seconds": 10.0,
    },
}


def full_scale(
    device: torch.device,
    *,
    seed: int,
    depths: Sequence[int],
    depth: int,
    width: int,
    heads: int,
    length: int,
    batch: int,
    limit: float,
    seconds: float,
) -> tuple[dict[str, Any], dict[str, Figure]]:
    """Measure peak memory by depth, the time of a step, and the largest batch within a limit, for each strategy.

    Args:
        device: A GPU computes in bfloat16.
        seed: Of weights and tokens.
        depths: Numbers of layers for the memory by depth.
        depth: Number of layers for time and batch.
        width, heads, length, batch: Of the decoder, and of what it is trained on.
        limit: Bytes for the largest batch.
        seconds: How long the steps of each strategy are timed, about.

    Returns:
        "peaks": for each strategy a list over `depths`, in bytes beyond parameters and their gradients. "steps": for
        each strategy its seconds, its share of the time of keeping all (median over alternating rounds), tokens a
        second, and the "largest batch". A picture of the first.
    """
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def decoder(layers: int) -> Decoder:
        return Decoder(Config(VOCABULARY, width, layers, heads)).to(device, dtype)

    def draw(count: int) -> Tensor:
        return torch.randint(VOCABULARY, (count, length + 1), device=device)

    peaks: dict[str, list[int]] = {name: [] for name in STRATEGIES}
    for layers in depths:
        model, tokens = decoder(layers), draw(batch)
        for name, strategy in STRATEGIES.items():
            with strategy(model):
                peaks[name].append(peak(training_step(model, tokens), device))
    model, tokens = decoder(depth), draw(batch)
    calls = {name: _within(strategy, model, tokens) for name, strategy in STRATEGIES.items()}
    timings = compare(calls, device=device, seconds=seconds, rounds=9)
    steps = {
        name: {
            "seconds": timing.seconds,
            "time": timing.ratio,
            "tokens a second": batch * length / timing.seconds,
            "largest batch": largest_batch(
                lambda count, name=name: _within(STRATEGIES[name], model, draw(count))(),
                device,
                limit,
            ),
        }
        for name, timing in timings.items()
    }
    caption = "Peak memory of a training step by depth, for each way to keep or recompute"
    return {"peaks": peaks, "steps": steps}, {caption: draw_peaks(depths, peaks)}


def _within(
    strategy: Callable[[Decoder], AbstractContextManager], model: Decoder, tokens: Tensor
) -> Callable[[], None]:
    step = training_step(model, tokens)

    def run() -> None:
        with strategy(model):
            step()

    return run


def draw_peaks(depths: Sequence[int], peaks: dict[str, list[int]]) -> Figure:
    """Draw peak memory against depth."""
    figure, ax = plt.subplots(figsize=(6.4, 3.6))
    colors = dict(zip(STRATEGIES, [COLORS[1], COLORS[0], *COLORS[2:], INK], strict=True))
    for name, marker in zip(peaks, "osv^D<>", strict=False):
        values = [value / 1e6 for value in peaks[name]]
        ax.plot(depths, values, f"{marker}-", color=colors[name], label=name, markersize=4)
    ax.set(xlabel="layers", ylabel="peak in MB", yscale="log")
    ax.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure
