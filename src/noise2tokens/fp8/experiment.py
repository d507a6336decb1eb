"""What FP8 costs in accuracy: outliers, long sums in a narrow register, and trainings at equal budget."""

from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn

from noise2tokens.fp8.codec import E4M3, E5M2, rounded
from noise2tokens.fp8.gemm import accumulate
from noise2tokens.fp8.linear import Float8Linear, Recipe, RoundedLinear, cast, to_bfloat16
from noise2tokens.fp8.scaling import (
    BLOCK,
    COLUMN_TILE,
    ROW,
    TENSOR,
    TILE,
    Block,
    quantize,
    relative_error,
)
from noise2tokens.text import Bytes, corpus, documents, split_files, validation_windows, windows
from noise2tokens.training import fit, seed_everything
from noise2tokens.transformer import Config, Decoder, next_token_loss

VOCABULARY = 257  # bytes, and the token that ends a text
BLOCKS = {"tensor": TENSOR, "block 128×128": BLOCK, "row": ROW, "tile 1×128": TILE}
LEARNING_RATE = 1e-3
WAYS: dict[str, Callable[..., nn.Module]] = {
    "float32": nn.Linear,
    "bfloat16": partial(
        RoundedLinear, operand=to_bfloat16, gradient=to_bfloat16, result=to_bfloat16
    ),
    "float8": Float8Linear,
    "cast": partial(RoundedLinear, operand=cast, gradient=cast),
    "cast, no gradient": partial(RoundedLinear, operand=cast, gradient=torch.zeros_like),
    "cast, loss times 2¹⁴": partial(
        RoundedLinear, operand=cast, gradient=partial(cast, multiplier=2.0**14)
    ),
    "float8, a scale a tensor": partial(
        Float8Linear, recipe=Recipe(activation=TENSOR, weight=TENSOR, gradient=TENSOR)
    ),
    "float8, gradients in E5M2": partial(Float8Linear, recipe=Recipe(gradient_format=E5M2)),
    "float8, gradients by blocks": partial(Float8Linear, recipe=Recipe(gradient=BLOCK)),
}


class Text(NamedTuple):
    """A stream of bytes to train on, and windows to validate on."""

    train: Int[Tensor, "_"]
    inputs: Int[Tensor, "n T"]
    targets: Int[Tensor, "n T"]


def linear_of(way: str) -> Callable[..., nn.Module]:
    """Return what makes the linear maps; ValueError if the way is none of WAYS."""
    if way not in WAYS:
        raise ValueError(f"need one of {list(WAYS)}, got {way!r}")
    return WAYS[way]


def source_code(device: torch.device, length: int, count: int | None = None) -> Text:
    """Load the standard library's files as bytes, a tenth of them held out.

    Args:
        device: Where the tokens are to lie.
        length: Bytes of a window to validate on.
        count: Such windows, spread evenly; all where left out.
    """
    kept, held_out = split_files(corpus())
    train_stream, other = (
        torch.cat(documents(files, Bytes(), "file")).to(device) for files in (kept, held_out)
    )
    return Text(train_stream, *validation_windows(other, length, count))


def make_model(way: str, *, seed: int, width: int, layers: int, heads: int) -> Decoder:
    """Make a decoder whose initial weights the seed decides, whatever the way."""
    seed_everything(seed)
    return Decoder(Config(VOCABULARY, width, layers, heads), linear=linear_of(way))


@torch.no_grad()
def validation_loss(model: Decoder, text: Text, batch_size: int = 64) -> float:
    """Return the mean loss on the held-out windows, in nats a token."""
    parts = zip(text.inputs.split(batch_size), text.targets.split(batch_size), strict=True)
    total = sum(next_token_loss(model(x), y).item() * y.numel() for x, y in parts)
    return total / text.targets.numel()


def train_one(
    way: str,
    text: Text,
    *,
    seed: int,
    steps: int,
    batch_size: int,
    length: int,
    keep: dict[str, Decoder] | None = None,
    **sizes: int,
) -> float:
    """Train a decoder and return its held-out loss, in nats a byte.

    Of one seed, all ways have the same weights at first and see the same windows.

    Args:
        way: One of WAYS.
        text: To learn from and to validate on.
        seed: Of weights and windows.
        steps, batch_size, length: Of the training.
        keep: Where the model is put, by its way.
        sizes: `width`, `layers` and `heads`.
    """
    device = text.train.device
    model = make_model(way, seed=seed, **sizes).to(device)
    fit(
        model,
        lambda batch: next_token_loss(model(batch[0]), batch[1]),
        windows(text.train, length, Generator(device).manual_seed(seed)),
        steps=steps,
        batch_size=batch_size,
        learning_rate=LEARNING_RATE,
        warmup=0.1,
        label=way,
    )
    if keep is not None:
        keep[way] = model
    return validation_loss(model, text)


def relative_losses(losses: dict[str, list[float]], reference: str = "float32") -> dict:
    """Return for each way and seed the loss relative to the reference of the same seed, less one.

    A way may have fewer seeds than the reference; ValueError if it has more.
    """
    base = losses[reference]
    return {
        way: [found / one - 1 for found, one in zip(values, base[: len(values)], strict=True)]
        for way, values in losses.items()
    }


def seed_floor(losses: Sequence[float]) -> float:
    """Return the range of losses over seeds, relative to their mean: what other weights and windows change."""
    return (max(losses) - min(losses)) / fmean(losses)


def operands(model: Decoder, text: Text, rows: int = 512) -> dict[str, dict[str, Tensor]]:
    """Return what the linear maps of a model multiply on held-out text.

    Args:
        model: Of plain linear maps.
        text: Its windows are read, as many as give so many rows.
        rows: Tokens.

    Returns:
        By the map's name: "x" (tokens, inputs), "w" (outputs, inputs) and "dy" (tokens, outputs). A window's first
        token has a single key to attend to, so its query changes nothing: the query map is without these tokens, whose
        gradient is zero but for float32's noise.
    """
    found: dict[str, dict[str, Tensor]] = {}
    hooks = []
    for name, module in model.blocks.named_modules():
        if not isinstance(module, nn.Linear):
            continue

        def forward(module: nn.Linear, x: tuple[Tensor], y: Tensor, name: str = name) -> None:
            found[name] = {"x": x[0].detach().flatten(0, -2), "w": module.weight.detach()}
            y.register_hook(lambda dy: found[name].update(dy=dy.flatten(0, -2)))

        hooks.append(module.register_forward_hook(forward))
    count = -(-rows // text.inputs.shape[1])
    next_token_loss(model(text.inputs[:count]), text.targets[:count]).backward()
    model.zero_grad()
    for hook in hooks:
        hook.remove()
    first = torch.arange(text.inputs[:count].numel()) % text.inputs.shape[1] == 0
    for name in found:
        if name.endswith("query"):
            found[name] |= {key: found[name][key][~first] for key in ("x", "dy")}
    return found


def integers(x: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """Round to eight-bit integers with one scale for all, from -127 to 127 times it, and return what they stand for."""
    scale = x.abs().max() / 127
    return (x / scale).round() * scale


def outlier_errors(
    x: Float[Tensor, "m n"], factors: Sequence[float]
) -> dict[str, dict[str, list[float]]]:
    """Make a part of a matrix an outlier and measure how well the rest survives, under each kind of scale.

    Args:
        x: Numbers of ordinary size, tokens by channels.
        factors: Sizes of the outlier, in the largest of |x|.

    Returns:
        By what the outlier is (an entry, a channel, a token), by kind of scale, for each factor: the relative error of
        all entries outside of it.
    """
    kinds = {name: partial(_round_trip, block=block) for name, block in BLOCKS.items()}
    kinds["integers, tensor"] = integers
    places = {"an entry": (0, 0), "a channel": (slice(None), 0), "a token": (0, slice(None))}
    found: dict[str, dict[str, list[float]]] = {}
    for place, where in places.items():
        others = torch.ones_like(x, dtype=torch.bool)
        others[where] = False
        found[place] = {name: [] for name in kinds}
        for factor in factors:
            spoiled = x.clone()
            spoiled[where] = factor * x.abs().max()
            for name, kind in kinds.items():
                found[place][name].append(relative_error(kind(spoiled)[others], x[others]))
    return found


def _round_trip(x: Tensor, block: Block) -> Tensor:
    return quantize(x, block).dequantize()


REGISTERS: dict[str, dict[str, Any]] = {
    "14 bits": {},
    "to the nearest": {"nearest": True},
    "promoted": {"promote": 128},
    "products aligned": {"align": "products"},
    "products and register aligned": {"align": "register"},
    "the same, promoted": {"align": "register", "promote": 128},
}


def accumulation_errors(
    lengths: Sequence[int],
    *,
    seed: int,
    size: int = 32,
    draw: Callable[..., Tensor] = torch.rand,
) -> dict[str, dict[str, list[float]]]:
    """Measure what narrow registers lose of sums of products of random numbers, rounded to E4M3.

    Args:
        lengths: K, the number of products.
        seed: Of the matrices.
        size: Rows of each.
        draw: What draws them: `torch.rand` for U(0, 1), `torch.randn` for normal numbers.

    Returns:
        By register, for each K: "mean" and "largest" relative error of an entry, and "norm", of the whole matrix.
    """
    found: dict[str, dict[str, list[float]]] = {
        name: {"mean": [], "largest": [], "norm": []} for name in REGISTERS
    }
    generator = Generator().manual_seed(seed)
    for length in lengths:
        a, b = (rounded(draw(size, length, generator=generator), E4M3) for _ in range(2))
        exact = a @ b.T
        for name, options in REGISTERS.items():
            sums = accumulate(a, b, **options)
            relative = (sums / exact - 1).abs()
            found[name]["mean"].append(relative.mean().item())
            found[name]["largest"].append(relative.max().item())
            found[name]["norm"].append(relative_error(sums, exact))
    return found


def gradient_errors(found: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """Return how much quantizing dy alone, with powers of two for scales, changes; means over linear maps.

    Args:
        found: From `operands`.

    Returns:
        By what shares a scale: "dy", the error of the matrix; "median token" and "worst token", of its rows; "Dgrad"
        and "Wgrad", of the products; "lost", the share of numbers that become zero.
    """
    table: dict[str, dict[str, float]] = {}
    for name, block in (BLOCKS | {"column 128×1": COLUMN_TILE}).items():
        rows = []
        for one in found.values():
            dy, w, x = one["dy"], one["w"], one["x"]
            back = quantize(dy, block, power_of_two=True).dequantize()
            sizes = dy.norm(dim=1)
            by_token = ((back - dy).norm(dim=1) / sizes)[sizes > 0]
            rows.append(
                {
                    "dy": relative_error(back, dy),
                    "median token": by_token.median().item(),
                    "worst token": by_token.max().item(),
                    "Dgrad": relative_error(back @ w, dy @ w),
                    "Wgrad": relative_error(back.T @ x, dy.T @ x),
                    "lost": ((back == 0) & (dy != 0)).float().mean().item(),
                }
            )
        table[name] = {key: fmean(row[key] for row in rows) for key in rows[0]}
    return table


BUDGETS = {
    "long": {
        "seeds": 3,
        "steps": 600,
        "batch_size": 4,
        "length": 64,
        "width": 128,
        "layers": 2,
        "heads": 4,
        "windows_held_out": 256,
        "lengths": (512, 1024, 2048, 4096, 8192),
    },
    "full": {
        "seeds": 3,
        "steps": 2000,
        "batch_size": 32,
        "length": 256,
        "width": 512,
        "layers": 6,
        "heads": 8,
        "windows_held_out": 400,
        "lengths": (512, 1024, 2048, 4096, 8192, 16384),
    },
}


def full_scale(
    device: torch.device,
    *,
    seed: int,
    seeds: int,
    steps: int,
    batch_size: int,
    length: int,
    width: int,
    layers: int,
    heads: int,
    windows_held_out: int,
    lengths: tuple[int, ...],
) -> tuple[dict[str, Any], dict[str, Figure]]:
    """Train the same decoder in each way, with several seeds; measure long sums and gradients.

    Args:
        device: FP8 products are emulated on any.
        seed: Of the first training.
        seeds: Trainings of each way.
        steps, batch_size, length: Of each training.
        width, layers, heads: Of the decoder.
        windows_held_out: To validate on.
        lengths: K of the sums.

    Returns:
        "losses": for each way and seed, in nats a byte. "relative": the same relative to float32 of that seed, less
        one. "floor": the range of float32 over seeds. "sums": from `accumulation_errors`. "gradients": from
        `gradient_errors`, on the last model trained in float32. A picture of the differences.
    """
    text = source_code(device, length, windows_held_out)
    sizes = dict(width=width, layers=layers, heads=heads)
    budget = dict(steps=steps, batch_size=batch_size, length=length, **sizes)
    kept: dict[str, Decoder] = {}
    losses = {
        way: [train_one(way, text, seed=seed + i, keep=kept, **budget) for i in range(seeds)]
        for way in WAYS
    }
    results = {
        "losses": losses,
        "relative": relative_losses(losses),
        "floor": seed_floor(losses["float32"]),
        "sums": accumulation_errors(lengths, seed=seed),
        "gradients": gradient_errors(operands(kept["float32"], text)),
    }
    figure, ax = plt.subplots(figsize=(7.2, 3.2))
    draw_differences(ax, results["relative"], results["floor"])
    return results, {"Held-out loss relative to float32 of the same seed": figure}


def draw_differences(ax: Axes, relative: dict[str, list[float]], floor: float) -> None:
    """Draw the differences to float32 in percent, a dot for each seed, and the range of seeds as a band.

    The axis is logarithmic to both sides beyond 0.1 %, and linear between.
    """
    ways = [way for way in relative if way != "float32"]
    ax.axvspan(-100 * floor, 100 * floor, color="#7a7a7a", alpha=0.2, lw=0)
    ax.axvline(0, color="#7a7a7a", lw=0.8)
    for i, way in enumerate(ways):
        values = [100 * value for value in relative[way]]
        ax.plot(values, [i] * len(values), "o", ms=5, alpha=0.8)
    ax.set_xscale("symlog", linthresh=0.1)
    ticks = [-1, -0.1, 0, 0.1, 1, 10]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_yticks(range(len(ways)), ways)
    ax.invert_yaxis()
    ax.set_xlabel("held-out loss against float32 of the same seed, percent")
