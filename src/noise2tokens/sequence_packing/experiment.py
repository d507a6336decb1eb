"""What packing is worth: packers on a million lengths, and a decoder that learns from padded and from packed text."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float, Int64
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from noise2tokens.benchmark import compare
from noise2tokens.sequence_packing.layout import IGNORED, attend_each, pack, pad_batch
from noise2tokens.sequence_packing.packers import (
    PACKERS,
    best_fit_decreasing,
    efficiency,
    padded_efficiency,
)
from noise2tokens.text import Bytes, corpus, documents
from noise2tokens.transformer import Attention, Config, Decoder

VOCABULARY = 257  # bytes, and the token that ends a text
# A batch for `mean_loss`: tokens, labels, and the offsets of packed sequences.
Batch = tuple[Tensor, Tensor, Tensor | None]


def functions(longest: int, too_long: str = "drop") -> list[Int64[Tensor, "_"]]:
    """The functions of the corpus as bytes, each closed by an end token.

    Args:
        longest: Tokens of a document, at most.
        too_long: What to do with one that is longer: "drop" it, or "split" it into pieces.

    Raises:
        ValueError: If `too_long` is something else.
    """
    if too_long not in ("drop", "split"):
        raise ValueError(f'too_long must be "drop" or "split", got {too_long!r}')
    found = documents(corpus(), Bytes())
    if too_long == "split":
        found = [piece for tokens in found for piece in tokens.split(longest)]
    return [tokens for tokens in found if 2 <= len(tokens) <= longest]


def decoder(
    vocab_size: int, width: int, layers: int, heads: int, core: Callable[..., Tensor] = attend_each
) -> Decoder:
    """A decoder that takes padded batches and packed rows alike."""
    config = Config(vocab_size, width, layers, heads)
    return Decoder(config, attention=partial(Attention, core=core))


def no_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Any, scale: float | None = None
) -> Tensor:
    """A core in which every token reads itself alone: attention switched off, everything else computed."""
    return v


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
    if not count:
        raise ValueError("no token has a label, so there is no mean")
    total = 0
    for tokens, labels, cu in batches:
        logits = model(tokens, cu_seqlens=cu).flatten(0, -2)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = total + F.cross_entropy(logits, labels.flatten(), reduction="sum")
    return total / count


def places(batches: Sequence[Batch]) -> int:
    """Count the places that are computed, real or not."""
    return sum(tokens.numel() for tokens, *_ in batches)


def operations(model: Decoder, batches: Sequence[Batch], attention: bool = True) -> int:
    """Floating point operations of a forward pass; a backward pass takes twice as many.

    For each place two a weight of a matrix, the embedding not counted. For each layer and each N places that see one
    another 2 N² width: half a square of pairs, since a causal kernel skips the other half, times two sums over the
    width (q·k and the mean of values), times two. PaLM's formula (Chowdhery et al. 2022, appendix B) has the full
    square in its place, 4 N² width.

    Args:
        model: Of equally many heads for queries and keys.
        batches: In any of the ways of `arrange`; padding counts.
        attention: Whether to count the pairs.
    """
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    weights = matrices - model.embedding.weight.numel()
    squares = sum(n * n for batch in batches for n in _sizes(batch))
    pairs = 2 * model.config.layers * model.config.width * squares
    return 2 * weights * places(batches) + attention * pairs


def _sizes(batch: Batch) -> list[int]:
    """How many places see one another: those of a padded row, or of a packed sequence."""
    tokens, _, cu = batch
    return [tokens.shape[1]] * len(tokens) if cu is None else cu.diff().tolist()


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
        "packers": for each, "efficiency" and "seconds". "batch": the shares of tokens and of squared lengths that are
        real in the timed batch. "ways": for each, and again with attention switched off, what is computed and how long
        a step takes; see `compare_ways`. "losses": for each way and seed the mean loss of the last quarter of the
        steps. A picture of the packers.
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

    def model_of(number: int, core: Callable[..., Tensor] = attend_each) -> Decoder:
        torch.manual_seed(number)
        return decoder(VOCABULARY, width, layers, heads, core).to(device, dtype)

    def batch_of(number: int) -> dict[str, list[Batch]]:
        generator = torch.Generator().manual_seed(number)
        chosen = torch.randint(len(data), (batch,), generator=generator).tolist()
        return arrange([data[i].to(device) for i in chosen], capacity)

    ways = batch_of(seed)
    sizes = _sizes(ways["unpadded"][0])
    shares = {name: padded_efficiency(sizes, batch, p) for name, p in (("tokens", 1), ("pairs", 2))}
    timed = compare_ways(model_of(seed), ways, device, seconds)
    off = compare_ways(model_of(seed, no_attention), ways, device, seconds, attention=False)
    timed |= {f"{name}, attention off": row for name, row in off.items()}
    losses = {
        name: [_train(model_of(seed + i), name, batch_of, steps, seed + i) for i in range(seeds)]
        for name in ways
    }
    caption = f"Packers on {million} lengths: places that stay empty, and seconds"
    results = {"packers": found, "batch": shares, "ways": timed, "losses": losses}
    return results, {caption: draw_packers(found)}


def compare_ways(
    model: Decoder,
    ways: dict[str, list[Batch]],
    device: torch.device,
    seconds: float,
    *,
    attention: bool = True,
    comparisons: int = 9,
) -> dict[str, dict[str, float]]:
    """Time a training step without the optimizer on each layout of the same documents.

    Args:
        model: Computes all of them.
        ways: From `arrange`; times are relative to the first.
        device: Where they compute.
        seconds: About how long to time each in all.
        attention: Whether the model computes any; its pairs are counted then.
        comparisons: How often the ways are compared, each time in three alternating rounds.

    Returns:
        For each way, relative to the first: "work", its places; "FLOPs"; "time", a step's, as the median of the
        comparisons, between its quartiles "low" and "high"; and "time / FLOPs". "tokens a second": real ones.
    """
    real = places(ways["unpadded"])
    calls = {name: partial(_step, model, batches) for name, batches in ways.items()}
    once = partial(compare, calls, device=device, seconds=seconds / comparisons, rounds=3)
    found = [once() for _ in range(comparisons)]
    first = next(iter(ways))
    base = median(timings[first].seconds for timings in found)
    rows = {}
    for name, batches in ways.items():
        times = sorted(timings[name].ratio for timings in found)
        work = places(batches) / places(ways[first])
        flops = operations(model, batches, attention) / operations(model, ways[first], attention)
        rows[name] = {
            "work": work,
            "FLOPs": flops,
            "time": median(times),
            "low": times[comparisons // 4],
            "high": times[-1 - comparisons // 4],
            "time / FLOPs": median(times) / flops,
            "tokens a second": real / (base * median(times)),
        }
    return rows


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
