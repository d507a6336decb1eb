"""A small DeepSeek-V3 that learns Python's standard library, with multi-token prediction and without; and drafting.

Three ways are compared on the same windows from the same main model: without prediction; with it; and without it, but
for so many more steps that both take the same number of operations.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt
import torch
from jaxtyping import Int, Int64
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from noise2tokens.benchmark import compare
from noise2tokens.deepseek_v3.config import Config, tiny
from noise2tokens.deepseek_v3.count import prediction_flops, training_flops
from noise2tokens.deepseek_v3.mtp import (
    MultiToken,
    agreement,
    expected_tokens,
    prediction_loss,
    speculate,
)
from noise2tokens.moe.balancing import Balancing
from noise2tokens.moe.layer import auxiliary_loss, balance
from noise2tokens.text import (
    Bytes,
    bits_per_byte,
    corpus,
    documents,
    split_files,
    validation_windows,
    windows,
)
from noise2tokens.training import fit, seed_everything
from noise2tokens.transformer import generate, next_token_loss

WAYS = ("without", "with", "without, equal operations")
LATER = 10 / 14.8  # share of the tokens after which the weight of prediction falls


def prediction_weight(share: float | int) -> float:
    """Return λ after a share of the training: 0.3, then 0.1.

    Source: DeepSeek-V3, 2024, section 4.2: 0.3 for the first 10T tokens of 14.8T.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"need a share between 0 and 1, got {share}")
    return 0.3 if share < LATER else 0.1


def code(device: torch.device) -> tuple[Int64[Tensor, "n"], Int64[Tensor, "m"]]:
    """Training and validation bytes of the corpus, on a device."""
    parts = split_files(corpus())
    return tuple(torch.cat(documents(part, Bytes())).to(device) for part in parts)


def equal_steps(config: Config, steps: int, length: int) -> int:
    """Return for how many steps the main model trains alone at the operations of `steps` with its modules."""
    main = training_flops(config, length)
    return round(steps * (1 + config.predictions * prediction_flops(config, length) / main))


def train(
    config: Config,
    stream: Int[Tensor, "n"],
    *,
    seed: int,
    steps: int,
    batch: int,
    length: int,
    learning_rate: float = 3e-3,
    alpha: float | int = 1e-4,
    speed: float | int = 0.005,
) -> tuple[MultiToken, float]:
    """Train a model on random windows; with modules of prediction if the config has them. Return it and its seconds.

    Args:
        config: Sizes. The main model starts from the same weights with and without prediction.
        stream: What to train on.
        seed: Of weights and windows.
        steps, batch, length: How much; length in tokens.
        learning_rate: Adam's, at its highest.
        alpha, speed: Of the sequence-wise balance loss and of the bias, as for `Balancing`.
    """
    seed_everything(seed)
    model = MultiToken(config, balancing=Balancing(alpha=alpha, speed=speed)).to(stream.device)
    draw = windows(stream, length, torch.Generator(stream.device).manual_seed(seed))
    done = 0

    def loss(rows: tuple[Tensor, Tensor]) -> Tensor:
        kind = stream.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            main, depths = model.losses(*rows)
        return (
            main + prediction_loss(depths, prediction_weight(done / steps)) + auxiliary_loss(model)
        )

    def after_step(step: int) -> None:
        nonlocal done
        done = step
        balance(model)

    history = fit(
        model,
        loss,
        draw,
        steps=steps,
        batch_size=batch,
        learning_rate=learning_rate,
        warmup=0.05,
        after_step=after_step,
    )
    return model, history.seconds


@torch.no_grad()
def held_out_bits(
    model: MultiToken, held_out: tuple[Int[Tensor, "N T"], Int[Tensor, "N T"]], batch: int
) -> float:
    """Return the main model's bits a byte."""
    values = []
    for inputs, targets in zip(*(part.split(batch) for part in held_out), strict=True):
        values += [next_token_loss(model.main(inputs), targets).item()] * len(inputs)
    return bits_per_byte(fmean(values), held_out[1], Bytes())


def acceptance(model: MultiToken, inputs: Int[Tensor, "N T"], batch: int) -> list[float]:
    """Return for each depth how often its draft after given text is accepted, where those before it are.

    The last depth's tokens decide where to look, so that all depths are asked after the same text.
    """
    found = [agreement(model, rows) for rows in inputs.split(batch)]
    depth = len(found[0])
    kept = torch.ones((), dtype=torch.bool, device=inputs.device)
    shares = []
    for k in range(depth):
        agrees = torch.cat([rows[k] for rows in found])[:, : inputs.shape[1] - depth]
        before, kept = kept.expand_as(agrees), agrees & kept
        shares.append((kept.sum() / before.sum().clamp(min=1)).item())
    return shares


def pair_acceptance(model: MultiToken, stream: Tensor, inputs: Int[Tensor, "N T"]) -> float:
    """Return how often a table would be right in the first depth's place: the likeliest token after the last one.

    Args:
        model: Whose main model decides.
        stream: What pairs are counted in.
        inputs: Text to draft after.
    """
    size = model.config.vocab_size
    counts = (stream[:-1] * size + stream[1:]).bincount(minlength=size * size).view(size, size)
    with torch.no_grad():
        own = model.main(inputs).argmax(-1)
    return (counts.argmax(1)[inputs] == own)[:, 1:].double().mean().item()


def drafting(
    model: MultiToken, prompts: Int[Tensor, "N T"], n: int, seconds: float | int
) -> dict[str, float]:
    """Continue prompts with drafts and without.

    Returns:
        "tokens": given by a step of the main model, on average. "identical": share of the prompts that get the same
        tokens either way. "speed": by how much drafting is faster, timed on the first prompt.
    """
    steps = given = same = 0
    for row in prompts.split(1):
        tokens, accepted = speculate(model, row, n + 1)
        same += torch.equal(tokens, generate(model.main, row, n + 1))
        steps += len(accepted)
        given += len(accepted) + sum(accepted)
    calls = {
        "plain": partial(generate, model.main, prompts[:1], n + 1),
        "drafts": partial(speculate, model, prompts[:1], n + 1),
    }
    ratio = compare(calls, device=prompts.device, seconds=seconds, rounds=5)["drafts"].ratio
    return {
        "tokens": given / steps,
        "identical": same / len(prompts),
        "speed": 1 / ratio,
    }


def compare_prediction(
    config: Config,
    data: tuple[Int[Tensor, "n"], Int[Tensor, "m"]],
    seeds: Iterable[int],
    *,
    steps: int,
    batch: int,
    length: int,
    count: int,
    prompts: int,
    new: int,
    seconds: float | int,
    **options: Any,
) -> tuple[dict[str, Any], MultiToken]:
    """Train all three ways with each seed, and draft with the one that has learned to.

    Args:
        config: Sizes, with at least one module of prediction.
        data: Training and validation tokens.
        seeds: One training of each way for each.
        steps, batch, length: As for `train`, with prediction.
        count: Windows to validate on.
        prompts: How many of them, by their first half, are continued.
        new: Tokens to continue with.
        seconds: To time each way of decoding, about.
        options: Further ones of `train`.

    Returns:
        "bits": for each way those of the seeds. "steps" and "operations" of each way. For each seed: "acceptance" by
        depth after given text, "table" for that of a table of pairs, "expected" tokens a step from it, and "tokens",
        "identical" and "speed" of `drafting`. "tokens a second" of training, with prediction. And the last model.

    Raises:
        ValueError: If there is nothing to compare.
    """
    seeds = list(seeds)
    if not config.predictions or not seeds:
        raise ValueError(f"need predictions and seeds, got {config.predictions} and {seeds}")
    held_out = validation_windows(data[1], length, count)
    more = equal_steps(config, steps, length)
    main, module = training_flops(config, length), prediction_flops(config, length)
    with_modules = main + config.predictions * module
    alone = replace(config, predictions=0)
    ways = {name: (alone, steps, main) for name in WAYS}
    ways["with"] = config, steps, with_modules
    ways[WAYS[2]] = alone, more, main
    results: dict[str, Any] = {"bits": {name: [] for name in WAYS}}
    results["steps"] = {name: way[1] for name, way in ways.items()}
    tokens = batch * length
    results["operations"] = {name: way[1] * way[2] * tokens for name, way in ways.items()}
    drafts: dict[str, list] = {}
    for seed in seeds:
        for name, (sizes, number, _) in ways.items():
            model, took = train(
                sizes, data[0], seed=seed, steps=number, batch=batch, length=length, **options
            )
            results["bits"][name].append(held_out_bits(model, held_out, batch))
            if name != "with":
                continue
            drafter = model
            shares = acceptance(model, held_out[0], batch)
            found = {"acceptance": shares, "expected": expected_tokens(shares)}
            found["table"] = pair_acceptance(model, data[0], held_out[0])
            found |= drafting(model, held_out[0][:prompts, : length // 2], new, seconds)
            found["tokens a second"] = steps * tokens / took
            for what, value in found.items():
                drafts.setdefault(what, []).append(value)
    return results | drafts, drafter


BUDGETS = {
    "long": {
        "width": 64,
        "layers": 3,
        "predictions": 2,
        "seeds": 3,
        "steps": 600,
        "batch": 8,
        "length": 128,
        "count": 64,
        "prompts": 8,
        "new": 64,
        "seconds": 5.0,
        "learning_rate": 5e-3,
    },
    "full": {
        "width": 384,
        "layers": 6,
        "predictions": 1,
        "seeds": 3,
        "steps": 1000,
        "batch": 32,
        "length": 512,
        "count": 64,
        "prompts": 8,
        "new": 128,
        "seconds": 5.0,
        "learning_rate": 1e-3,
    },
}


def full_scale(
    device: torch.device,
    *,
    seed: int,
    width: int,
    layers: int,
    predictions: int,
    seeds: int,
    **training: Any,
) -> tuple[dict[str, Any], dict[str, Figure]]:
    """Compare the three ways at this size.

    Args:
        device: Where.
        seed: Of the first training.
        width, layers, predictions: As for `tiny`.
        seeds: Trainings of each way.
        training: The rest, as for `compare_prediction`.

    Returns:
        What it finds, and "sample", what the last model with prediction writes. Pictures of bits and of acceptance.
    """
    config = tiny(Bytes().vocab_size, predictions, width, layers)
    results, model = compare_prediction(config, code(device), range(seed, seed + seeds), **training)
    start = Bytes().encode("def ").to(device)[None]
    results["sample"] = Bytes().decode(generate(model.main, start, training["new"])[0].cpu())
    bits, share = plt.figure(figsize=(5.0, 3.2)), plt.figure(figsize=(5.0, 3.2))
    draw_bits(bits.subplots(), results)
    draw_acceptance(share.subplots(), results)
    return results, {
        "Bits a byte of held-out code against training operations, a dot for each seed": bits,
        "Share of drafts that are accepted, by depth, a dot for each seed": share,
    }


def draw_bits(ax: Axes, results: dict[str, Any]) -> None:
    """Draw bits a byte against operations, a dot for each seed."""
    for name, values in results["bits"].items():
        ax.plot([results["operations"][name]] * len(values), values, "o", label=name)
    ax.set(xlabel="operations of training", ylabel="bits a byte")
    ax.legend(fontsize="small")


def draw_acceptance(ax: Axes, results: dict[str, Any]) -> None:
    """Draw the share of accepted drafts by depth, and that of a table of pairs at the first."""
    for i, shares in enumerate(results["acceptance"]):
        depths = range(1, len(shares) + 1)
        ax.plot(depths, shares, "oC0", label=None if i else "modules")
        ax.plot([1], [results["table"][i]], "sC1", label=None if i else "table of pairs")
    ax.set(xlabel="depth", ylabel="accepted", ylim=(0, 1), xticks=list(depths))
    ax.legend(fontsize="small")
