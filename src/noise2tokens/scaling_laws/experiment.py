"""Small decoders of source code at equal compute: runs to fit laws to, and a loss predicted before it is seen."""

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from numpy import ndarray
from torch import Generator, Tensor

from noise2tokens.display import COLORS, INK
from noise2tokens.scaling_laws.fits import (
    Allocation,
    fit_allocation,
    fit_isoflop,
    fit_loss_law,
    fit_power_law,
    fit_saturating_law,
    resampled_allocations,
)
from noise2tokens.scaling_laws.flops import BATCH_TOKENS, LEARNING_RATE, MODEL_SCALE, exact_flops
from noise2tokens.scaling_laws.schedule import cosine_schedule, multi_step_schedule
from noise2tokens.text import Bytes, corpus, documents, split_files, validation_windows, windows
from noise2tokens.training import seed_everything, train
from noise2tokens.transformer import Config, Decoder, next_token_loss

LENGTH = 64
WARMUP = 20  # steps, the same in every run, so that runs of one rate and batch begin alike
RATE = 0.5  # of the learning rate by the paper's law, which the chapter's grid compares


class Text(NamedTuple):
    """Streams of bytes to train on, and windows to validate on."""

    train: Int[Tensor, "_"]
    inputs: Int[Tensor, "n T"]
    targets: Int[Tensor, "n T"]


class Run(NamedTuple):
    """What one training cost and reached: C as asked for, M, D as trained, and bits a byte on held-out files."""

    compute: float
    scale: float
    tokens: float
    loss: float


def source_code(device: torch.device, validation_count: int | None = None) -> Text:
    """Load the standard library's files as bytes, a tenth of them held out.

    Args:
        device: Where the tokens are to lie.
        validation_count: Windows to validate on, spread evenly; all where left out.
    """
    kept, held_out = split_files(corpus())
    train_stream, other = (
        torch.cat(documents(files, Bytes(), "file")).to(device) for files in (kept, held_out)
    )
    return Text(train_stream, *validation_windows(other, LENGTH, validation_count))


def sizes(width: int, layers: int) -> Config:
    """Return the sizes of a decoder of bytes, with heads of 16 dimensions or one, and 12 width² numbers a layer."""
    return Config(257, width, layers, max(1, width // 16), hidden=round(8 * width / 3))


def scale_of(config: Config) -> int:
    """Return M at the length of these runs."""
    return exact_flops(config, LENGTH)


@torch.no_grad()
def bits_per_byte(model: Decoder, text: Text, batch_size: int = 64) -> float:
    """Return the mean loss on the held-out windows in bits a token, which are bytes and a few ends of files."""
    parts = zip(text.inputs.split(batch_size), text.targets.split(batch_size), strict=True)
    total = sum(next_token_loss(model(x), y).item() * y.numel() for x, y in parts)
    return total / text.targets.numel() / math.log(2)


def train_at(
    config: Config,
    compute: float | int,
    text: Text,
    *,
    batch_size: int,
    learning_rate: float | int,
    seed: int,
    cosine: bool = False,
    planned: float | int | None = None,
) -> Run:
    """Train a decoder for as many tokens as a budget buys.

    Args:
        config: Its sizes.
        compute: C in FLOP, non-embedding; rounded to whole steps.
        text: To learn from and to validate on.
        batch_size: Windows a step.
        learning_rate: The highest.
        seed: Of weights and windows.
        cosine: Let the rate fall along a cosine, to a tenth, in place of the steps.
        planned: The budget that the schedule is laid out for, where training is to stop before its end.

    Raises:
        ValueError: If the budget buys fewer steps than twice the warm-up, or is larger than what was planned.
    """
    scale, tokens_a_step = scale_of(config), batch_size * LENGTH
    planned = compute if planned is None else planned
    steps, whole = (round(c / scale / tokens_a_step) for c in (compute, planned))
    if not 2 * WARMUP <= steps <= whole:
        raise ValueError(
            f"{compute:.1e} FLOP buy {steps} steps of {scale * tokens_a_step:.1e}, "
            f"of which there must be {2 * WARMUP} to {whole}"
        )
    seed_everything(seed)
    model = Decoder(config).to(text.train.device)
    draw = windows(text.train, LENGTH, Generator(text.train.device).manual_seed(seed))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    train(
        model,
        lambda batch: next_token_loss(model(batch[0]), batch[1]),
        draw,
        steps=steps,
        batch_size=batch_size,
        optimizer=optimizer,
        schedule=(cosine_schedule if cosine else multi_step_schedule)(optimizer, whole, WARMUP),
        label=f"width {config.width}, {config.layers} layers",
    )
    return Run(float(compute), scale, steps * tokens_a_step, bits_per_byte(model, text))


def by_law(
    compute: float | int, *, rate: float | int = RATE, batch: float | int = 1
) -> dict[str, Any]:
    """Return batch and learning rate by DeepSeek LLM's laws, which were fitted at budgets far above these.

    Args:
        compute: C in FLOP.
        rate: What the law's learning rate is multiplied with.
        batch: What its batch is multiplied with.
    """
    return {
        "batch_size": max(1, round(batch * BATCH_TOKENS(compute) / LENGTH)),
        "learning_rate": rate * LEARNING_RATE(compute),
    }


def isoflop_runs(
    plan: Sequence[tuple[float, Sequence[int]]], layers: int, text: Text, seed: int
) -> list[Run]:
    """Train models of several widths at several budgets, each with the batch and learning rate of its budget.

    Args:
        plan: Budgets in FLOP, and the widths to train at each.
        layers: Of every model.
        text: To learn from.
        seed: Of each run.
    """
    return [
        train_at(sizes(width, layers), compute, text, seed=seed, **by_law(compute))
        for compute, widths in plan
        for width in widths
    ]


def degraded(text: Text, share: float, seed: int) -> Text:
    """Replace a share of all bytes, those to be predicted too, by random printable ones: data of lower quality.

    Args:
        text: Streams and windows.
        share: Of bytes to replace, in [0, 1].
        seed: Decides which, and by what.

    Raises:
        ValueError: If the share is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"need a share between 0 and 1, got {share}")
    generator = Generator().manual_seed(seed)

    def spoil(x: Tensor) -> Tensor:
        noise = torch.randint(32, 127, x.shape, generator=generator)
        hit = torch.rand(x.shape, generator=generator) < share
        return torch.where(hit.to(x.device), noise.to(x), x)

    # Inputs and targets overlap, so the windows are spoiled as one.
    rows = spoil(torch.cat([text.inputs, text.targets[:, -1:]], 1))
    return Text(spoil(text.train), rows[:, :-1], rows[:, 1:])


def mean_losses(runs: Sequence[Sequence[Run]]) -> tuple[ndarray, ndarray, ndarray, float]:
    """Return C, M and mean loss of runs that were made with several seeds, and the noise of such a mean.

    The noise is the standard deviation over seeds, pooled over all runs, over the root of the number of seeds.

    Args:
        runs: For each seed the same runs in the same order; at least two seeds.

    Raises:
        ValueError: If there is one seed only.
    """
    if len(runs) < 2:
        raise ValueError(f"noise takes two seeds or more, got {len(runs)}")
    losses = np.array([[run.loss for run in of_seed] for of_seed in runs])
    noise = math.sqrt(losses.var(0, ddof=1).mean() / len(runs))
    compute, scales = (
        np.array([getattr(run, name) for run in runs[0]]) for name in ("compute", "scale")
    )
    return compute, scales, losses.mean(0), noise


def rows(runs: Sequence[Sequence[Run]]) -> list[dict[str, Any]]:
    """Return C, M, D and the losses over seeds, one row for each run of a seed."""
    return [
        {"C": run.compute, "M": run.scale, "D": run.tokens, "losses": [one.loss for one in same]}
        for run, same in zip(runs[0], zip(*runs, strict=True), strict=True)
    ]


def optimal_losses(compute: ndarray, scales: ndarray, losses: ndarray) -> tuple[ndarray, ndarray]:
    """Return the budgets, and the loss at the lowest point of the parabola of each."""
    budgets = np.unique(compute)
    return budgets, np.array(
        [fit_isoflop(scales[compute == c], losses[compute == c]).loss for c in budgets]
    )


def draw_isoflop(ax: Axes, compute: ndarray, scales: ndarray, losses: ndarray) -> None:
    """Draw loss over scale: runs as dots, and where a budget shows an optimum its parabola and lowest point."""
    for color, budget in zip(COLORS, np.unique(compute), strict=False):
        here = compute == budget
        ax.plot(scales[here], losses[here], "o", color=color, label=f"{budget:.0e} FLOP")
        with suppress(ValueError):
            best = fit_isoflop(scales[here], losses[here])
            line = np.geomspace(scales[here].min(), scales[here].max(), 60)
            ax.plot(line, best.loss + best.curvature * np.log(line / best.scale) ** 2, color=color)
            ax.plot(best.scale, best.loss, "*", color=INK, ms=11)
    ax.set(xscale="log", xlabel="M, non-embedding FLOP a token", ylabel="held-out bits a byte")
    ax.xaxis.set_minor_formatter(NullFormatter())  # labels between powers of ten would overlap
    ax.legend(fontsize="x-small", loc="lower left")  # larger budgets lie lower and further right


def draw_allocation(
    ax: Axes,
    compute: ndarray,
    scales: ndarray,
    losses: ndarray,
    drawn: Sequence[Allocation],
    until: float,
) -> None:
    """Draw the best scale of each budget, the law through them with its band of 80 %, and the paper's law."""
    budgets = np.unique(compute)
    best = [fit_isoflop(scales[compute == c], losses[compute == c]).scale for c in budgets]
    line = np.geomspace(budgets.min(), until, 40)
    low, high = np.quantile([fit.model(line) for fit in drawn], [0.1, 0.9], axis=0)
    ax.fill_between(line, low, high, color=COLORS[0], alpha=0.25, lw=0)
    ax.plot(
        line,
        fit_allocation(compute, scales, losses).model(line),
        color=COLORS[0],
        label="ours, 80 % band",
    )
    ax.plot(line, MODEL_SCALE(line), "--", color=COLORS[1], label="DeepSeek LLM's law")
    ax.plot(budgets, best, "*", color=INK, ms=11)
    ax.set(xscale="log", yscale="log", xlabel="C, FLOP", ylabel="best M")
    ax.legend(fontsize="x-small")


# Widths around the optimum of each budget, in windows about equally wide. There is no larger budget: the corpus has a
# megabyte, and at most four epochs of it are to be read.
BUDGETS = {
    "long": {
        "seeds": 3,
        "layers": 2,
        "plan": (
            (1e10, (6, 8, 12, 16, 22)),
            (2e10, (8, 10, 14, 18, 26)),
            (5e10, (8, 12, 16, 22, 30)),
            (1e11, (10, 14, 20, 26, 36)),
        ),
        "predicted": 5e11,
        "spoiled": 0.2,
        "grid_at": (5e10, 22),
        "factors": (0.25, 0.5, 1.0, 2.0),
        "held_out": 1800,
    },
}


def full_scale(
    device: torch.device,
    *,
    seed: int,
    seeds: int,
    layers: int,
    plan: Sequence[tuple[float, Sequence[int]]],
    predicted: float,
    spoiled: float,
    grid_at: tuple[float, int],
    factors: Sequence[float],
    held_out: int,
) -> tuple[dict[str, Any], dict[str, Figure]]:
    """Fit laws to runs of equal compute, predict a loss at a larger budget, and then train there.

    Args:
        device: Where to train.
        seed: The first; each run is made with `seeds` of them.
        seeds: Two or more.
        layers: Of every model.
        plan: Budgets in FLOP with widths to train at each.
        predicted: The larger budget.
        spoiled: Share of bytes that are replaced in the second corpus.
        grid_at: Budget and width at which batch and learning rate are varied.
        factors: What the laws' batch and rate are multiplied with there.
        held_out: Windows to validate on.

    Returns:
        "allocation" and "allocation, spoiled": the "runs" with the loss of each seed, "noise" of a mean, exponent "a",
        its 80 % band "low" to "high", and "a, all at once" by the loss law; where the runs enclose no optimum, "a" says
        so, and there is no prediction.
        "prediction": what was said and measured; "grid": loss by factors of rate and batch; "schedules": losses of
        both. A picture of the curves and of the law through them.
    """
    text = source_code(device, held_out)
    corpora = {"allocation": text, "allocation, spoiled": degraded(text, spoiled, seed)}
    results: dict[str, Any] = {}
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 3.2))
    for name, corpus_ in corpora.items():
        runs = [isoflop_runs(plan, layers, corpus_, seed + s) for s in range(seeds)]
        compute, scales, losses, noise = mean_losses(runs)
        results[name] = {"noise": noise, "runs": rows(runs)}
        if name == "allocation":
            draw_isoflop(axes[0], compute, scales, losses)
        try:
            a = fit_allocation(compute, scales, losses).model.exponent
            drawn = resampled_allocations(compute, scales, losses, noise, 1000, seed)
        except ValueError as error:
            results[name] |= {"a": str(error)}
            continue
        low, high = np.quantile([fit.model.exponent for fit in drawn], [0.1, 0.9])
        tokens = np.array([run.tokens for run in runs[0]])
        results[name] |= {
            "a": a,
            "low": low,
            "high": high,
            "draws that show all optima": len(drawn) / 1000,
            "a, all at once": fit_loss_law(scales, tokens, losses).allocation().model.exponent,
        }
        if name == "allocation":
            draw_allocation(axes[1], compute, scales, losses, drawn, predicted)
            results["prediction"] = predict_and_train(
                (compute, scales, losses, noise), predicted, layers, text, seed, seeds
            )
    results["grid"] = grid(grid_at, layers, factors, text, seed)
    results["schedules"] = schedules(grid_at, layers, text, seed, seeds)
    return results, {"Equal compute: loss over scale, and the best scale over compute": figure}


def predict_and_train(
    measured: tuple[ndarray, ndarray, ndarray, float],
    compute: float,
    layers: int,
    text: Text,
    seed: int,
    seeds: int,
) -> dict[str, Any]:
    """Say what the loss will be at a larger budget, by laws with a floor and without; then train there.

    Args:
        measured: C, M and losses of runs, and the noise of a loss.
        compute: The larger budget.
        layers: Of the model.
        text: To learn from.
        seed: The first.
        seeds: How many trainings.

    Returns:
        "scale" that the law of allocation asks for, "width" that comes nearest, "epochs" of the corpus; bits a byte
        that a "power law" and a law "with a floor" say, for the latter with a band of 80 % over noise of the fit and of
        what is to be measured, "low" to "high"; the "last" budget's best; "measured" for each seed.
    """
    of_compute, scales, losses, noise = measured
    budgets, best = optimal_losses(of_compute, scales, losses)
    scale = fit_allocation(of_compute, scales, losses).model(compute)
    widths = (w for w in range(4, 2049, 2) if w % (2 * max(1, w // 16)) == 0)  # even heads
    width = min(widths, key=lambda w: abs(math.log(scale_of(sizes(w, layers)) / scale)))
    generator, said = np.random.default_rng(seed), []
    for _ in range(300):
        moved = losses + noise * generator.standard_normal(len(losses))
        with suppress(ValueError):
            law = fit_saturating_law(*optimal_losses(of_compute, scales, moved))
            said.append(law(compute) + noise * generator.standard_normal())
    low, high = np.quantile(said, [0.1, 0.9])
    runs = isoflop_seeds(compute, width, layers, text, seed, seeds)
    return {
        "compute": compute,
        "scale": scale,
        "width": width,
        "epochs": runs[0].tokens / len(text.train),
        "power law": fit_power_law(budgets, best)(compute),
        "with a floor": fit_saturating_law(budgets, best)(compute),
        "low": low,
        "high": high,
        "last": best[-1],
        "measured": [run.loss for run in runs],
    }


def isoflop_seeds(
    compute: float,
    width: int,
    layers: int,
    text: Text,
    seed: int,
    seeds: int,
    cosine: bool = False,
) -> list[Run]:
    """Train one model with several seeds at one budget, with the rate in steps or along a cosine."""
    return [
        train_at(
            sizes(width, layers), compute, text, seed=seed + s, cosine=cosine, **by_law(compute)
        )
        for s in range(seeds)
    ]


def grid(
    at: tuple[float, int], layers: int, factors: Sequence[float], text: Text, seed: int
) -> dict[str, dict[str, float]]:
    """Train one model at one budget with multiples of the laws' learning rate and batch.

    Args:
        at: Budget and width.
        layers: Of the model.
        factors: Of rate and batch.
        text: To learn from.
        seed: Of each run.

    Returns:
        Loss by "rate × factor", then by "batch × factor".
    """
    compute, width = at
    return {
        f"rate × {rate:g}": {
            f"batch × {batch:g}": train_at(
                sizes(width, layers), compute, text, seed=seed,
                **by_law(compute, rate=rate, batch=batch),
            ).loss
            for batch in factors
        }
        for rate in factors
    }  # fmt: skip


def schedules(
    at: tuple[float, int], layers: int, text: Text, seed: int, seeds: int
) -> dict[str, list[float]]:
    """Train one model at one budget with the rate in steps and along a cosine, with several seeds: losses of each."""
    compute, width = at
    return {
        name: [run.loss for run in isoflop_seeds(compute, width, layers, text, seed, seeds, cosine)]
        for name, cosine in (("multi-step", False), ("cosine", True))
    }
