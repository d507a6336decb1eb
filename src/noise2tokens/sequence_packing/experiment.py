"""What packing is worth: packers on a million lengths, and a decoder that learns from padded and from packed text."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float, Int64
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from noise2tokens.benchmark import compare
from noise2tokens.sequence_packing.layout import IGNORED, attend_each, pack, pad_batch
from noise2tokens.sequence_packing.packers import PACKERS, best_fit_decreasing, efficiency
from noise2tokens.text import Bytes, corpus, documents
from noise2tokens.transformer import Attention, Config, Decoder

# A batch for `mean_loss`: tokens, labels, and the offsets of packed sequences.
Batch = tuple[Tensor, Tensor, Tensor | None]


def functions(longest: int) -> list[Int64[Tensor, "_"]]:
    """The functions of the corpus as bytes, without those that are longer."""
    return [tokens for tokens in documents(corpus(), Bytes()) if 2 <= len(tokens) <= longest]


def decoder(vocab_size: int, width: int, layers: int, heads: int) -> Decoder:
    """A decoder that takes padded batches and packed rows alike."""
    config = Config(vocab_size, width, layers, heads)
    return Decoder(config, attention=partial(Attention, core=attend_each))


def arrange(parts: Sequence[Int64[Tensor, "_"]], capacity: int) -> dict[str, list[Batch]]:
    """Lay the same documents out in three ways.

    Args:
        parts: The documents of a batch.
        capacity: Tokens of a packed row, at most.

    Returns:
        "padded": one rectangle. "unpadded": its real tokens end to end. "packed": rows of nearly the capacity.
    """
    tokens, mask = pad_batch(parts, 0)
    labels = F.pad(tokens[:, 1:].masked_fill(~mask[:, 1:], IGNORED), (0, 1), value=IGNORED)
    bins = best_fit_decreasing([len(part) for part in parts], capacity)
    rows = {"unpadded": [pack(parts)], "packed": [pack([parts[i] for i in b]) for b in bins]}
    return {"padded": [(tokens, labels, None)]} | {
        name: [(row.tokens, row.labels, row.cu_seqlens) for row in packed]
        for name, packed in rows.items()
    }


def mean_loss(model: Decoder, batches: Sequence[Batch]) -> Float[Tensor, ""]:
    """Return the mean loss over all labels of all parts of a batch, however it is laid out."""
    count = sum(int((labels != IGNORED).sum()) for _, labels, _ in batches)
    total = 0
    for tokens, labels, cu in batches:
        logits = model(tokens, cu_seqlens=cu).flatten(0, -2)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = total + F.cross_entropy(logits, labels.flatten(), reduction="sum")
    return total / count


def places(batches: Sequence[Batch]) -> int:
    """Count the places that are computed, real or not."""
    return sum(tokens.numel() for tokens, *_ in batches)


BUDGETS = {
    "long": {
        "million": 1_000_000,
        "capacity": 1024,
        "batch": 16,
        "width": 128,
        "layers": 2,
        "heads": 4,
        "seeds": 3,
        "steps": 40,
        "seconds": 15.0,
    },
    "full": {
        "million": 1_000_000,
        "capacity": 8192,
        "batch": 128,
        "width": 1024,
        "layers": 12,
        "heads": 16,
        "seeds": 3,
        "steps": 300,
        "seconds": 10.0,
    },
}


def full_scale(
    device: torch.device,
    *,
    seed: int,
    million: int,
    capacity: int,
    batch: int,
    width: int,
    layers: int,
    heads: int,
    seeds: int,
    steps: int,
    seconds: float,
) -> tuple[dict[str, Any], dict[str, Figure]]:
    """Measure packers on many lengths; then time and train a decoder on padded, unpadded and packed documents.

    Args:
        device: A GPU computes in bfloat16.
        seed: Of lengths, documents and the first training.
        million: Lengths to pack, drawn from those of the corpus.
        capacity: Tokens of a row.
        batch: Documents of a batch.
        width, layers, heads: Of the decoder.
        seeds: Trainings of each way.
        steps: Of each training.
        seconds: How long a step of each way is timed, about.

    Returns:
        "packers": for each, "efficiency" and "seconds". "ways": for each, "time" of a step relative to the padded one's
        (median over alternating rounds), real "tokens a second", and "work", its places relative to the padded ones'.
        "losses": for each way and seed the mean loss of the last quarter of the steps. A picture of the packers.
    """
    generator = torch.Generator().manual_seed(seed)
    data = functions(capacity)
    drawn = torch.randint(len(data), (million,), generator=generator).tolist()
    lengths = [len(data[i]) for i in drawn]
    found: dict[str, dict[str, float]] = {}
    for name, packer in PACKERS.items():
        start = time.perf_counter()
        bins = packer(lengths, capacity)
        took = time.perf_counter() - start
        found[name] = {"efficiency": efficiency(lengths, bins, capacity), "seconds": took}

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def model_of(number: int) -> Decoder:
        torch.manual_seed(number)
        return decoder(256, width, layers, heads).to(device, dtype)

    def batch_of(number: int) -> dict[str, list[Batch]]:
        generator = torch.Generator().manual_seed(number)
        chosen = torch.randint(len(data), (batch,), generator=generator).tolist()
        return arrange([data[i].clamp_max(255).to(device) for i in chosen], capacity)

    ways, model = batch_of(seed), model_of(seed)
    real = sum(int((labels != IGNORED).sum()) for _, labels, _ in ways["packed"])
    calls = {name: partial(_step, model, batches) for name, batches in ways.items()}
    timings = compare(calls, device=device, seconds=seconds, rounds=9)
    timed = {
        name: {
            "time": timing.ratio,
            "tokens a second": real / timing.seconds,
            "work": places(ways[name]) / places(ways["padded"]),
        }
        for name, timing in timings.items()
    }
    losses = {
        name: [_train(model_of(seed + i), name, batch_of, steps, seed + i) for i in range(seeds)]
        for name in ways
    }
    caption = f"Packers on {million} lengths: places that stay empty, and seconds"
    return {"packers": found, "ways": timed, "losses": losses}, {caption: draw_packers(found)}


def _step(model: Decoder, batches: Sequence[Batch]) -> None:
    mean_loss(model, batches).backward()
    model.zero_grad()


def _train(
    model: Decoder, way: str, batch_of: Callable[[int], dict], steps: int, seed: int
) -> float:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    curve = []
    for step in range(steps):
        loss = mean_loss(model, batch_of(1000 * seed + step)[way])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.detach())
    return torch.stack(curve[-max(1, steps // 4) :]).mean().item()


def draw_packers(found: dict[str, dict[str, float]]) -> Figure:
    """Draw for each packer the share of empty places, and its time."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.4), sharey=True)
    names = list(found)
    left.barh(names, [100 * (1 - found[name]["efficiency"]) for name in names])
    left.set(xlabel="empty places in %", xscale="symlog")
    left.invert_yaxis()
    right.barh(names, [found[name]["seconds"] for name in names])
    right.set(xlabel="seconds")
    return figure
