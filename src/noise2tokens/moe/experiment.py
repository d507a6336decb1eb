"""Ways to balance experts, compared: small decoders that learn the source of Python's standard library."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt
import torch
from jaxtyping import Int64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from noise2tokens.benchmark import Timing, compare
from noise2tokens.display import COLORS, INK
from noise2tokens.moe.balancing import Balancing, max_violation
from noise2tokens.moe.experts import looped, one_by_one
from noise2tokens.moe.layer import (
    MixtureOfExperts,
    MoEConfig,
    auxiliary_loss,
    balance,
    expert_loads,
    mixtures,
)
from noise2tokens.text import Bytes, corpus, documents, split_files, validation_windows, windows
from noise2tokens.training import fit
from noise2tokens.transformer import Config, Decoder, SwiGLU, next_token_loss

VOCABULARY = 257
MEASURES = ("loss", "max_violation", "batch_violation")


def strategies(alpha: float | int, speed: float | int) -> dict[str, Balancing]:
    """The five ways that are compared, with the weight of an auxiliary loss and the speed of a bias.

    Where an auxiliary loss complements the bias, it is a hundred times as weak.
    """
    return {
        "none": Balancing(),
        "sequence-wise loss": Balancing(alpha=alpha, scope="sequence"),
        "batch-wise loss": Balancing(alpha=alpha, scope="batch"),
        "bias": Balancing(speed=speed),
        "bias and weak loss": Balancing(alpha=alpha / 100, scope="sequence", speed=speed),
    }


def decoder(config: Config, sizes: MoEConfig, balancing: Balancing | None) -> Decoder:
    """A decoder whose first layer is dense, as in DeepSeek-V3, and the others mixtures; all dense without a balancing.

    Dense networks are as wide as the experts that a token goes to, so the operations for a token are the same.
    """
    config = replace(config, hidden=(sizes.top_k + sizes.shared) * sizes.hidden)
    if balancing is None:
        return Decoder(config)
    moe = partial(MixtureOfExperts, sizes=sizes, balancing=balancing)
    return Decoder(config, feed_forward=[SwiGLU] + [moe] * (config.layers - 1))


def text(device: torch.device) -> tuple[Int64[Tensor, "n"], Int64[Tensor, "m"]]:
    """Training and validation bytes of the corpus, on a device."""
    parts = split_files(corpus())
    return tuple(torch.cat(documents(part, Bytes())).to(device) for part in parts)


def train(
    model: Decoder,
    data: tuple[Tensor, Tensor],
    *,
    seed: int,
    steps: int,
    batch: int,
    length: int,
    learning_rate: float | int,
    count: int | None = 64,
) -> dict[str, Any]:
    """Train a decoder, balancing after each step, and validate it at the end.

    Returns:
        "loss": validation loss in nats a byte. For a mixture also "max_violation": of the validation set, mean over the
        layers; "batch_violation": of the batches of the last tenth, mean; "loads": (steps, layers, E), tokens of each.
    """
    device = data[0].device
    generator = torch.Generator(device).manual_seed(seed)
    draw = windows(data[0], length, generator)
    inputs, targets = validation_windows(data[1], length, count)
    mixed, loads = bool(mixtures(model)), []

    def loss(rows: tuple[Tensor, Tensor]) -> Tensor:
        return next_token_loss(model(rows[0]), rows[1]) + auxiliary_loss(model)

    fit(
        model,
        loss,
        draw,
        steps=steps,
        batch_size=batch,
        learning_rate=learning_rate,
        warmup=0.05,
        after_step=(lambda _: loads.append(balance(model))) if mixed else None,
    )
    values: list[float] = []

    @torch.no_grad()
    def validate() -> None:
        for x, y in zip(inputs.split(batch), targets.split(batch), strict=True):
            values.extend([next_token_loss(model(x), y).item()] * len(x))

    if not mixed:
        validate()
        return {"loss": fmean(values)}
    counts = expert_loads(model, validate)
    history = torch.stack(loads).cpu()
    return {
        "loss": fmean(values),
        "max_violation": max_violation(counts).mean().item(),
        "batch_violation": max_violation(history[-max(1, steps // 10) :]).mean().item(),
        "loads": history,
    }


def compare_ways(
    ways: Mapping[str, Balancing | None],
    config: Config,
    sizes: MoEConfig,
    data: tuple[Tensor, Tensor],
    seeds: Iterable[int],
    **options: Any,
) -> tuple[dict[str, dict[str, list[float]]], dict[str, Tensor], dict[str, list[Decoder]]]:
    """Train a decoder each way and for each seed, all on the same batches.

    All mixtures start from the same weights, a dense decoder from others.

    Returns:
        "loss", "max_violation" and "batch_violation" as of `train`, for each way the values of the seeds; for the
        first seed the loads of the last layer, (steps, E); and the trained models.
    """
    results: dict[str, dict[str, list[float]]] = {name: {} for name in MEASURES}
    loads: dict[str, Tensor] = {}
    models: dict[str, list[Decoder]] = {}
    for seed in seeds:
        for name, balancing in ways.items():
            torch.manual_seed(seed)
            model = decoder(config, sizes, balancing).to(data[0].device)
            models.setdefault(name, []).append(model)
            found = train(model, data, seed=seed, **options)
            for measure in MEASURES:
                if measure in found:
                    results[measure].setdefault(name, []).append(found[measure])
            if "loads" in found:
                loads.setdefault(name, found["loads"][:, -1])
    return results, loads, models


def speeds(
    config: Config, sizes: MoEConfig, tokens: int, device: torch.device, seconds: float | int
) -> dict[str, Timing]:
    """Time a mixture forward and backward, computed in three ways, beside dense networks.

    "dense" has as many parameters as a token uses, "dense, equal parameters" as many as there are, without the router.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(tokens, config.width, device=device, dtype=dtype)
    active, held = ((n + sizes.shared) * sizes.hidden for n in (sizes.top_k, sizes.experts))
    layers = {
        "grouped": MixtureOfExperts(config, sizes=sizes),
        "sorted, one by one": MixtureOfExperts(config, sizes=sizes, compute=one_by_one),
        "loop": MixtureOfExperts(config, sizes=sizes, compute=looped),
        "dense": SwiGLU(replace(config, hidden=active)),
        "dense, equal parameters": SwiGLU(replace(config, hidden=held)),
    }

    def step(layer: nn.Module) -> None:
        layer(x).backward(x)
        layer.zero_grad()

    calls = {name: partial(step, layer.to(device, dtype)) for name, layer in layers.items()}
    return compare(calls, device=device, seconds=seconds, rounds=9)


BUDGETS = {
    "long": {
        "width": 64,
        "layers": 3,
        "heads": 4,
        "experts": 32,
        "top_k": 4,
        "hidden": 16,
        "seeds": 3,
        "steps": 600,
        "batch": 8,
        "length": 128,
        "learning_rate": 6e-3,
        "alpha": 0.1,
        "speed": 0.005,
        "tokens": 2048,
        "seconds": 10.0,
    },
    "full": {
        "width": 512,
        "layers": 6,
        "heads": 8,
        "experts": 64,
        "top_k": 6,
        "hidden": 256,
        "seeds": 3,
        "steps": 600,
        "batch": 32,
        "length": 512,
        "learning_rate": 1e-3,
        "alpha": 0.01,
        "speed": 0.002,
        "tokens": 16384,
        "seconds": 5.0,
    },
}


def full_scale(
    device: torch.device,
    *,
    seed: int,
    width: int,
    layers: int,
    heads: int,
    experts: int,
    top_k: int,
    hidden: int,
    seeds: int,
    steps: int,
    batch: int,
    length: int,
    learning_rate: float | int,
    alpha: float | int,
    speed: float | int,
    tokens: int,
    seconds: float | int,
) -> tuple[dict[str, Any], dict[str, Figure]]:
    """Train the same decoder with each way of balancing, and a dense one of equal active size; time a layer.

    Args:
        device: Where; a GPU times in bfloat16 and trains in single precision.
        seed: Of the first training; all ways see the same batches, and all mixtures start from the same weights.
        width, layers, heads: Of the decoder.
        experts, top_k, hidden: Routed experts, those of a token, and their hidden width; one is shared.
        seeds: Trainings of each way.
        steps, batch, length, learning_rate: Of each training.
        alpha: Weight of an auxiliary loss.
        speed: Of a bias.
        tokens: Of the layer that is timed.
        seconds: To time each way, about.

    Returns:
        What `compare_ways` measures, and "times" of a layer relative to the grouped one. Pictures of
        loads over training, and of losses against violations.
    """
    config = Config(VOCABULARY, width, layers, heads)
    sizes = MoEConfig(experts, top_k, hidden)
    ways: dict[str, Balancing | None] = {"dense": None} | strategies(alpha, speed)
    options = dict(steps=steps, batch=batch, length=length, learning_rate=learning_rate)
    numbers = range(seed, seed + seeds)
    results, loads, _ = compare_ways(ways, config, sizes, text(device), numbers, **options)
    timings = speeds(config, sizes, tokens, device, seconds)
    times = {name: timing.ratio for name, timing in timings.items()}
    heat, against = plt.figure(figsize=(8.6, 2.6)), plt.figure(figsize=(5.0, 3.2))
    draw_loads(heat, loads)
    draw_tradeoff(against.subplots(), results)
    return results | {"times": times}, {
        f"Load of each of {experts} experts of the last layer over {steps} steps, 1 where even": heat,
        "Validation loss against MaxVio, one dot a seed": against,
    }


def draw_loads(figure: Figure, loads: dict[str, Int64[Tensor, "steps E"]]) -> None:
    """Draw for each way the load of each expert over the steps, sorted in each picture by the load at the end."""
    most = max(
        (counts / counts.double().mean(1, keepdim=True)).max().item() for counts in loads.values()
    )
    axes = figure.subplots(1, len(loads), sharey=True, squeeze=False)[0]
    for ax, (name, counts) in zip(axes, loads.items(), strict=True):
        share = counts / counts.double().mean(1, keepdim=True)
        order = share[-max(1, len(share) // 4) :].mean(0).argsort(descending=True)
        picture = ax.imshow(
            share[:, order].T.numpy(),
            aspect="auto",
            cmap="magma",
            vmin=0,
            vmax=most,
            interpolation="nearest",
        )
        ax.set_title(name, fontsize="small")
        ax.set_xlabel("step")
    axes[0].set_ylabel("rank by final load")
    figure.colorbar(picture, ax=list(axes), label="load / mean")


def draw_tradeoff(ax: Axes, results: dict[str, dict[str, list[float]]]) -> None:
    """Draw the loss against the violation, a dot for each seed, and the dense losses as lines."""
    for color, (name, values) in zip(COLORS, results["max_violation"].items(), strict=False):
        ax.scatter(values, results["loss"][name], color=color, label=name)
    for value in results["loss"].get("dense", []):
        ax.axhline(value, color=INK, linewidth=1)
    ax.set(xlabel="MaxVio on validation text", ylabel="validation loss in nats a byte")
    ax.legend(fontsize="small")
