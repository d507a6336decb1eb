"""AdamW and Muon at equal budgets, the learning rate of each swept, on a small decoder of source code."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from noise2tokens.display import COLORS, INK
from noise2tokens.muon.cost import step_flops
from noise2tokens.muon.optimizer import (
    Muon,
    adamw_update,
    matched,
    momentum_direction,
    split_parameters,
)
from noise2tokens.muon.orthogonalize import newton_schulz, polar
from noise2tokens.scaling_laws.experiment import (
    LENGTH,
    Text,
    bits_per_byte,
    by_law,
    scale_of,
    sizes,
    source_code,
)
from noise2tokens.scaling_laws.fits import fit_power_law
from noise2tokens.scaling_laws.flops import PowerLaw
from noise2tokens.text import windows
from noise2tokens.training import fit, seed_everything
from noise2tokens.transformer import Decoder, next_token_loss

WARMUP = 0.1  # share of the steps; then the rate falls to zero along a half cosine
DECAY = 0.1
Rates = tuple[float | int, float | int]  # of hidden matrices; of embedding, head and norms


def normalized(g: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
    """Return a matrix scaled to the Frobenius norm that its polar factor has: Muon's size, without its directions."""
    norm = torch.linalg.matrix_norm(g, keepdim=True).clamp(min=1e-7)
    return g * math.sqrt(min(g.shape[-2:])) / norm


def adamw(model: nn.Module, rate: float | int, outer: float | int) -> Optimizer:
    """Make PyTorch's AdamW with Moonlight's numbers: one rate for hidden matrices, another for all else."""
    return torch.optim.AdamW(
        _with_rates(split_parameters(model), rate, outer),
        betas=(0.9, 0.95),
        weight_decay=DECAY,
        fused=True,
    )


def muon(
    model: nn.Module,
    rate: float | int,
    outer: float | int,
    plain: Sequence[str] = ("embedding", "head"),
    weight_decay: float = DECAY,
    **options: Any,
) -> Optimizer:
    """Make our Muon with Moonlight's numbers; what is named has AdamW, as vectors have, and the outer rate."""
    groups = _with_rates(split_parameters(model, plain), rate, outer)
    return Muon(groups, weight_decay=weight_decay, **options)


def _with_rates(groups: list[dict], rate: float | int, outer: float | int) -> list[dict]:
    return [group | {"lr": rate if group["muon"] else outer} for group in groups]


WAYS: dict[str, Callable[[nn.Module, float, float], Optimizer]] = {
    "AdamW": adamw,
    "Muon": muon,
    "Muon, exact polar factor": partial(muon, orthogonalize=polar),
    "momentum of Muon's size": partial(muon, orthogonalize=normalized),
    "Muon, head too": partial(muon, plain=("embedding",)),
    "Muon, embedding and head too": partial(muon, plain=()),
    "Muon, no decay": partial(muon, weight_decay=0.0),
}


def train_one(
    way: str,
    rates: Rates,
    text: Text,
    *,
    seed: int,
    width: int,
    layers: int,
    steps: int,
    batch_size: int,
    keep: dict[str, Decoder] | None = None,
) -> float:
    """Train a decoder of bytes and return held-out bits a byte; infinity if the loss became so.

    Of one seed, all ways and rates have the same weights at first and see the same windows.

    Args:
        way: One of WAYS.
        rates: The highest learning rates: of hidden matrices, and of embedding, head and norms.
        text: To learn from and to validate on.
        seed: Of weights and windows.
        width, layers: Of the decoder.
        steps, batch_size: Of the training.
        keep: Where the model is put, by its way.

    Raises:
        ValueError: If the way is none of WAYS.
    """
    if way not in WAYS:
        raise ValueError(f"need one of {list(WAYS)}, got {way!r}")
    seed_everything(seed)
    device = text.train.device
    model = Decoder(sizes(width, layers)).to(device)
    try:
        fit(
            model,
            lambda batch: next_token_loss(model(batch[0]), batch[1]),
            windows(text.train, LENGTH, Generator(device).manual_seed(seed)),
            steps=steps,
            batch_size=batch_size,
            optimizer=WAYS[way](model, *rates),
            warmup=WARMUP,
            label=f"{way}, {rates}",
        )
    except (FloatingPointError, torch.linalg.LinAlgError):  # the latter from a polar factor
        return math.inf
    if keep is not None:
        keep[way] = model
    loss = bits_per_byte(model, text)
    return loss if math.isfinite(loss) else math.inf


def sweep(
    way: str, grid: Sequence[Rates], text: Text, seeds: Sequence[int], **budget: Any
) -> dict[Rates, list[float]]:
    """Train with each pair of rates and each seed; losses of the seeds by rates."""
    return {
        rates: [train_one(way, rates, text, seed=seed, **budget) for seed in seeds]
        for rates in grid
    }


def best_rates(found: Mapping[Rates, Sequence[float]]) -> Rates:
    """Return the rates with the lowest mean loss."""
    return min(found, key=lambda rates: fmean(found[rates]))


def at_edge(found: Mapping[Rates, Sequence[float]]) -> bool:
    """Say whether the best rate of hidden matrices is the least or largest of those tried: a better may lie outside."""
    tried = [rate for rate, _ in found]
    return best_rates(found)[0] in (min(tried), max(tried))


def gradients(
    model: Decoder, text: Text, count: int, batch_size: int, seed: int
) -> list[dict[str, Tensor]]:
    """Return the gradients of hidden matrices over random windows, by name, the weights being held.

    Args:
        model: Its weights stay as they are.
        text: Windows are drawn from its stream.
        count: Batches.
        batch_size: Windows a batch.
        seed: Of the windows.
    """
    draw = windows(text.train, LENGTH, Generator(text.train.device).manual_seed(seed))
    names = {name: p for name, p in model.blocks.named_parameters() if p.dim() > 1}
    found = []
    for _ in range(count):
        tokens, targets = draw(batch_size)
        loss = next_token_loss(model(tokens), targets)
        grads = torch.autograd.grad(loss, list(names.values()))
        found.append(dict(zip(names, grads, strict=True)))
    return found


def updates(
    history: Sequence[dict[str, Tensor]], orthogonalize: Callable[[Tensor], Tensor] = newton_schulz
) -> dict[str, dict[str, Tensor]]:
    """Return what each optimizer would make of one history of gradients, by way and by name of the matrix.

    Args:
        history: From `gradients`, at least one.
        orthogonalize: Of Muon.

    Returns:
        "AdamW" and "Muon", of Moonlight's numbers; "momentum", the direction that Muon orthogonalizes.

    Raises:
        ValueError: If there are no gradients.
    """
    if not history:
        raise ValueError("need gradients of a batch or more, got none")
    group = dict(momentum=0.95, nesterov=True, betas=(0.9, 0.95), eps=1e-8)
    found: dict[str, dict[str, Tensor]] = {"AdamW": {}, "momentum": {}, "Muon": {}}
    for name in history[0]:
        states: tuple[dict, dict] = {}, {}
        for grads in history:
            element = adamw_update(grads[name], states[0], group)
            direction = momentum_direction(grads[name], states[1], group)
        found["AdamW"][name], found["momentum"][name] = element, direction
        found["Muon"][name] = matched(orthogonalize(direction))
    return found


def rms(x: Tensor) -> float:
    """Return the root mean square of the entries."""
    return x.square().mean().sqrt().item()


def stable_rank(x: Float[Tensor, "m n"]) -> float:
    """Return ‖x‖_F² / ‖x‖₂²: how many directions share the size of the largest one."""
    s = torch.linalg.svdvals(x)
    return (s.square().sum() / s[0] ** 2).item()


def equal_loss_ratio(better: PowerLaw, other: PowerLaw, compute: float | int) -> float:
    """Return the share of a compute that `better` needs for the loss that `other` reaches with all of it.

    Raises:
        ValueError: If a law does not fall.
    """
    if better.exponent >= 0 or other.exponent >= 0:
        raise ValueError(f"need laws that fall with compute, got {better} and {other}")
    return (other(compute) / better.coefficient) ** (1 / better.exponent) / compute


def ratio_band(
    compute: Mapping[str, Sequence[float]],
    losses: Mapping[str, Sequence[Sequence[float]]],
    at: float,
    resamples: int,
    seed: int,
) -> dict[str, float]:
    """Fit a law to each of two ways, compare them, and say how far noise of the losses moves the ratio.

    Each resample adds normal noise to the mean losses: of the standard deviation over seeds, pooled over the budgets of
    a way, over the root of the number of seeds.

    Args:
        compute: C of each budget, by way: "AdamW" and "Muon".
        losses: For each budget the losses of all seeds, by way; two seeds or more.
        at: C of AdamW to compare at.
        resamples: Number of draws.
        seed: Of the draws.

    Returns:
        "ratio", and 80 % of the draws from "low" to "high".

    Raises:
        ValueError: If there are too few seeds or draws, or a law does not fall.
    """
    fewest = min(len(x) for of_way in losses.values() for x in of_way)
    if fewest < 2 or resamples < 1:
        raise ValueError(f"need two seeds and one draw or more, got {fewest} and {resamples}")
    generator, drawn = np.random.default_rng(seed), []
    means = {way: np.mean(of_way, 1) for way, of_way in losses.items()}
    noise = {
        way: math.sqrt(np.var(of_way, 1, ddof=1).mean() / len(of_way[0]))
        for way, of_way in losses.items()
    }
    for i in range(resamples + 1):
        moved = {
            way: mean + (i > 0) * noise[way] * generator.standard_normal(len(mean))
            for way, mean in means.items()
        }
        laws = {way: fit_power_law(compute[way], moved[way]) for way in moved}
        drawn.append(equal_loss_ratio(laws["Muon"], laws["AdamW"], at))
    low, high = np.quantile(drawn[1:], [0.1, 0.9])
    return {"ratio": drawn[0], "low": float(low), "high": float(high)}


def seed_ratios(
    compute: Mapping[str, Sequence[float]],
    losses: Mapping[str, Sequence[Sequence[float]]],
    at: float,
) -> list[float]:
    """Return the ratio by laws that are fitted to one seed of each way, for each seed; the rest as for `ratio_band`."""
    found = []
    for i in range(len(losses["Muon"][0])):
        laws = {way: fit_power_law(compute[way], [x[i] for x in losses[way]]) for way in losses}
        found.append(equal_loss_ratio(laws["Muon"], laws["AdamW"], at))
    return found


def budget_of(compute: float | int, width: int, layers: int, batch: float | int = 1) -> dict:
    """Return sizes, steps and batch that a compute buys, the batch by chapter 11's law times a factor."""
    batch_size = by_law(compute, batch=batch)["batch_size"]
    a_step = scale_of(sizes(width, layers)) * batch_size * LENGTH
    steps = round(compute / a_step)
    return dict(width=width, layers=layers, batch_size=batch_size, steps=steps)


def surcharge(width: int, layers: int, batch_size: int) -> float:
    """Return what Newton-Schulz adds to the non-embedding FLOPs of a step, as a share of them."""
    with torch.device("meta"):
        groups = split_parameters(Decoder(sizes(width, layers)))
    shapes = [tuple(p.shape) for group in groups if group["muon"] for p in group["params"]]
    return step_flops(shapes) / (scale_of(sizes(width, layers)) * batch_size * LENGTH)


# Widths near the best of each budget by chapter 11's long run, which was made with AdamW.
BUDGETS = {
    "long": {
        "seeds": 3,
        "layers": 2,
        "plan": ((1e10, 12), (2e10, 16), (5e10, 18), (8e10, 20)),
        "rates": {"AdamW": (0.002, 0.006, 0.018, 0.054), "Muon": (0.006, 0.018, 0.054, 0.16)},
        "batches": (0.25, 0.5, 1.0, 4.0),
        "outer_rates": (0.03, 0.01, 0.09),
        "tuning_seeds": 2,
        "held_out": 1800,
        "resamples": 1000,
    },
}


def full_scale(
    device: torch.device,
    *,
    seed: int,
    seeds: int,
    layers: int,
    plan: Sequence[tuple[float, int]],
    rates: Mapping[str, Sequence[float]],
    batches: Sequence[float],
    outer_rates: Sequence[float],
    tuning_seeds: int,
    held_out: int,
    resamples: int,
) -> tuple[dict[str, Any], dict[str, Figure]]:
    """Tune both optimizers at the first of several budgets, train with each at all of them, and fit a law to each.

    The batch is tuned first, then the rate of embedding, head and norms, each time with the rate of hidden matrices
    swept anew, and so it is at each budget.

    Args:
        device: Where to train.
        seed: The first.
        seeds: Trainings at each point and pair of rates, two or more.
        layers: Of every model.
        plan: Two budgets or more, in non-embedding FLOP, and the width at each.
        rates: Learning rates of hidden matrices, by way: "AdamW" and "Muon".
        batches: What chapter 11's batch of each budget is multiplied with.
        outer_rates: Learning rates of all else; the batch is tuned at the first of them.
        tuning_seeds: Trainings at each point of the tuning, with seeds of its own.
        held_out: Windows to validate on.
        resamples: Draws for the band of the ratio.

    Returns:
        "tuning": for each way what `row` says of each "batch" and, at the best of them, of each "outer" rate. "runs":
        what `row` says of each budget, by way. "laws": coefficient and exponent. "ratio": what share of AdamW's compute
        Muon needs at the budget "C", with its band. "ratio, all counted": the same with Newton-Schulz in Muon's
        compute; "ratio of seeds": the first, from laws of one seed each. A picture.

    Raises:
        ValueError: Before any training, if there are too few seeds, budgets or draws.
    """
    if seeds < 2 or len(plan) < 2 or resamples < 1:
        got = f"{seeds}, {len(plan)} and {resamples}"
        raise ValueError(f"need two seeds, two budgets and a draw or more, got {got}")
    text = source_code(device, held_out)
    measured, tuning = range(seed, seed + seeds), range(seed + seeds, seed + seeds + tuning_seeds)
    results: dict[str, Any] = {"tuning": {}, "runs": {}}

    def run(way, compute, width, used, *, batch, outer):
        budget = budget_of(compute, width, layers, batch)
        grid = [(rate, outer) for rate in rates[way]]
        return row(compute, sweep(way, grid, text, used, **budget), **budget)

    for way in rates:
        best, found = {"batch": 1.0, "outer": outer_rates[0]}, {}
        for name, values in (("batch", batches), ("outer", outer_rates)):
            rows = {x: run(way, *plan[0], tuning, **best | {name: x}) for x in values}
            best[name] = min(rows, key=lambda x, rows=rows: fmean(rows[x]["losses"]))
            found[name] = {f"{x:g}": one for x, one in rows.items()}
        results["tuning"][way] = found
        results["runs"][way] = [run(way, *point, measured, **best) for point in plan]
    losses = {way: [one["losses"] for one in runs] for way, runs in results["runs"].items()}
    spent = {way: [one["C"] for one in runs] for way, runs in results["runs"].items()}
    dearer = [one["C"] * (1 + one["surcharge"]) for one in results["runs"]["Muon"]]
    at = plan[-1][0]
    results["laws"] = {
        way: list(fit_power_law(spent[way], [fmean(x) for x in losses[way]])) for way in rates
    }
    for name, compute in (("ratio", spent), ("ratio, all counted", spent | {"Muon": dearer})):
        results[name] = ratio_band(compute, losses, at, resamples, seed) | {"C": at}
    results["ratio of seeds"] = seed_ratios(spent, losses, at)
    figure, ax = plt.subplots(figsize=(6.4, 3.4))
    draw_laws(ax, results)
    return results, {"Held-out loss over compute, and a law fitted to each optimizer": figure}


def row(compute: float, found: Mapping[Rates, Sequence[float]], **budget: int) -> dict[str, Any]:
    """Say what was found at a budget.

    Args:
        compute: C.
        found: Losses of the seeds, by rates.
        budget: As from `budget_of`.

    Returns:
        "C", "width", "steps", "tokens a step"; "surcharge", Newton-Schulz over C; "rates", the best, and whether that
        of hidden matrices lay at the "edge" of those tried; their "losses"; mean losses, "by rates" as text.
    """
    best = best_rates(found)
    means = {f"{rate:g}, {outer:g}": fmean(x) for (rate, outer), x in found.items()}
    return {
        "C": compute,
        "width": budget["width"],
        "steps": budget["steps"],
        "tokens a step": budget["batch_size"] * LENGTH,
        "surcharge": surcharge(budget["width"], budget["layers"], budget["batch_size"]),
        "rates": list(best),
        "edge": "yes" if at_edge(found) else "no",
        "losses": list(found[best]),
        "by rates": {name: x if math.isfinite(x) else "diverged" for name, x in means.items()},
    }


def draw_laws(ax: Axes, results: Mapping[str, Any]) -> None:
    """Draw the losses of each seed over compute, and the law of each optimizer."""
    for color, (way, runs) in zip(COLORS, results["runs"].items(), strict=False):
        compute = np.array([one["C"] for one in runs])
        for i in range(len(runs[0]["losses"])):
            ax.plot(compute, [one["losses"][i] for one in runs], "o", color=color, ms=4, alpha=0.7)
        law = PowerLaw(*results["laws"][way])
        ax.plot(compute, law(compute), color=color, label=way)
    ax.set(xscale="log", xlabel="C, non-embedding FLOP", ylabel="held-out bits a byte")
    ax.legend()


def draw_sweep(ax: Axes, found: Mapping[str, Mapping[Rates, Sequence[float]]]) -> None:
    """Draw the losses of each way over the rate of hidden matrices: a dot a seed, and a line through the means."""
    for color, (way, losses) in zip(COLORS, found.items(), strict=False):
        rates = sorted(losses)
        for rate in rates:
            ax.plot([rate[0]] * len(losses[rate]), losses[rate], "o", color=color, ms=3, alpha=0.6)
        means = [fmean(losses[rate]) for rate in rates]
        ax.plot([rate for rate, _ in rates], means, color=color, label=way)
    ax.set(xscale="log", xlabel="learning rate of hidden matrices", ylabel="held-out bits a byte")
    ax.legend(fontsize="x-small")


def draw_spectra(ax: Axes, spectra: Mapping[str, Tensor]) -> None:
    """Draw singular values over their rank, each set over its largest."""
    for color, (name, s) in zip([*COLORS[:2], INK], spectra.items(), strict=False):
        ax.semilogy(range(1, len(s) + 1), s / s[0], color=color, label=name)
    ax.set(xlabel="rank", ylabel="singular value over the largest")
    ax.legend()
