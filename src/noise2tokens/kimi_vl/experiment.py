"""A tiny Kimi-VL learns to read: with a curriculum and without, at native resolution and from resized squares.

target = Task(glyphs(train=True), (12, 32), (24, 32), digits=(2, 2), step=4)
model, history = train(tiny(), curriculum(target), seed=0, steps=220, batch=32)
share_right(model, samples(held_out(target), model.vision.config, 400, seed=1))
read(model, "a_picture.png", digit=40)
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from noise2tokens.kimi_vl.batch import Batch, Sample, collate
from noise2tokens.kimi_vl.model import Config, KimiVL, kimi_vl, tiny
from noise2tokens.kimi_vl.moonvit import VisionConfig
from noise2tokens.kimi_vl.preprocess import as_pixels, preprocess, shrink, to_square
from noise2tokens.kimi_vl.reading import QUESTIONS, Glyphs, Task, glyphs, mnist_glyphs
from noise2tokens.moe.balancing import Balancing
from noise2tokens.moe.layer import balance, mixtures
from noise2tokens.muon.optimizer import Muon, split_parameters
from noise2tokens.training import History, fit, seed_everything
from noise2tokens.transformer import next_token_loss

LONGEST = 12  # bytes of an answer
Rates = tuple[float, float]  # of hidden matrices; of embedding, head, table and vectors


@dataclass(frozen=True)
class Stage:
    """What is read during a share of the training."""

    task: Task
    share: float | int


def direct(target: Task) -> list[Stage]:
    """Return the target alone, from the first step to the last."""
    return [Stage(target, 1)]


def curriculum(target: Task) -> list[Stage]:
    """Return three stages: one digit that fills its canvas, one digit somewhere, and the target."""
    side, cell = target.glyphs.side, target.cell
    alone = replace(target, heights=(side, side), widths=(side, side), digits=(1, 1), room=0)
    somewhere = replace(target, heights=(cell, 2 * cell), widths=(cell, 2 * cell), digits=(1, 1))
    return [Stage(alone, 0.1), Stage(somewhere, 0.25), Stage(target, 0.65)]


def sample(
    task: Task, config: VisionConfig, generator: Random, square: int | None = None
) -> Sample:
    """Draw a question, the picture after it, and the answer; the picture resized to a square of a side, if given."""
    canvas, question, answer = task.draw(generator)
    if square is not None:
        canvas = to_square(canvas, square, 1)
    return Sample((question, preprocess(canvas, config)), answer)


def samples(
    task: Task, config: VisionConfig, n: int, *, seed: int, square: int | None = None
) -> list[Sample]:
    """Draw n samples."""
    generator = Random(seed)
    return [sample(task, config, generator, square) for _ in range(n)]


def train(
    config: Config,
    stages: Sequence[Stage],
    *,
    seed: int,
    steps: int,
    batch: int,
    rates: Rates = (1e-2, 1e-2),
    muon: bool = True,
    square: int | None = None,
    device: torch.device | None = None,
) -> tuple[KimiVL, History]:
    """Train a model on fresh samples, stage by stage; return it in evaluation mode, and its curve.

    Args:
        config: Sizes.
        stages: Their shares add up to 1.
        seed: Of weights and samples.
        steps, batch: How many, of how many samples.
        rates: Learning rates at their highest. Half a cosine falls over all stages.
        muon: Whether matrices get Muon's updates, or AdamW's too.
        square: Resize all pictures to a square of this side.
        device: Where; a CPU if not given.

    Raises:
        ValueError: If a share is negative, or they do not add up to 1.
    """
    shares = [stage.share for stage in stages]
    if abs(sum(shares) - 1) > 1e-9 or min(shares) < 0:
        raise ValueError(f"shares must be 0 or more and add up to 1, got {shares}")
    seed_everything(seed)
    model = kimi_vl(config, balancing=Balancing(speed=0.01)).to(device or torch.device("cpu"))
    generator, done = Random(seed), 0

    def draw(count: int) -> Batch:
        task = stage_at(stages, done / steps).task
        drawn = [sample(task, config.vision, generator, square) for _ in range(count)]
        return collated(model, drawn)

    def loss(batch: Batch) -> Tensor:
        return next_token_loss(model(batch.tokens, batch.patches, batch.grids), batch.labels)

    def after_step(step: int) -> None:
        nonlocal done
        done = step
        if mixtures(model):
            balance(model)

    groups = [
        group | {"muon": group["muon"] and muon, "lr": rates[0 if group["muon"] else 1]}
        for group in split_parameters(model, ("embedding", "head", "table"))
    ]
    optimizer = Muon(groups, weight_decay=0.01, momentum=0.9)
    history = fit(
        model,
        loss,
        draw,
        steps=steps,
        batch_size=batch,
        optimizer=optimizer,
        warmup=0.05,
        after_step=after_step,
    )
    return model.eval(), history


def stage_at(stages: Sequence[Stage], share: float | int) -> Stage:
    """Return the stage in which a share of the training falls."""
    end = 0.0
    for stage in stages:
        end += stage.share
        if share < end - 1e-9:
            return stage
    return stages[-1]


def collated(model: KimiVL, drawn: Sequence[Sample]) -> Batch:
    """Make a batch for a model, on its device."""
    batch = collate(drawn, model.image_token, model.vision.config.merge)
    return batch.to(model.language.embedding.weight.device)


@torch.no_grad()
def right(model: KimiVL, drawn: Sequence[Sample], batch: int = 100) -> Bool[Tensor, "n"]:
    """Say for each sample whether the model would answer it to the last byte.

    One pass instead of a generation: the likeliest token is the right one at every place of the right answer, its end
    included, exactly if greedy generation gives that answer.

    Raises:
        ValueError: If there is no sample.
    """
    if not drawn:
        raise ValueError("need one sample or more")
    found = []
    for first in range(0, len(drawn), batch):
        part = collated(model, drawn[first : first + batch])
        likeliest = model(part.tokens, part.patches, part.grids).argmax(-1)
        found.append(((likeliest == part.labels) | (part.labels < 0)).all(1))
    return torch.cat(found).cpu()


def share_right(model: KimiVL, drawn: Sequence[Sample]) -> float:
    """Return the share of samples that are answered to the last byte: exact match."""
    return right(model, drawn).double().mean().item()


def by_size(
    model: KimiVL,
    task: Task,
    sizes: Iterable[tuple[int, int]],
    *,
    n: int,
    seed: int,
    square: int | None = None,
) -> dict[str, float]:
    """Return exact match on canvases of given heights and widths, by "height x width"."""
    found = {}
    for height, width in sizes:
        fixed = replace(task, heights=(height, height), widths=(width, width))
        drawn = samples(fixed, model.vision.config, n, seed=seed, square=square)
        found[f"{height} x {width}"] = share_right(model, drawn)
    return found


def read(
    model: KimiVL,
    picture: Any,
    question: str = QUESTIONS[0],
    *,
    digit: int | None = None,
    square: int | None = None,
) -> str:
    """Answer a question about a picture of your own.

    Args:
        model: A trained one.
        picture: As for `preprocess`: an array, a PIL picture or a file's path. Bright paper is inverted, as the model
            has seen bright digits on black.
        question: As it has learned them.
        digit: Height of the picture's digits in pixels, if not that of the digits it has learned.
        square: As for `train`, for a model that was trained so.

    Raises:
        ValueError: If `digit` is below 1, or as `preprocess`.
    """
    config = model.vision.config
    pixels = as_pixels(picture, 1)
    if np.median(pixels) > 127:
        pixels = 255 - pixels
    if digit is not None:
        if digit < 1:
            raise ValueError(f"need digits of one pixel or more, got {digit}")
        factor = config.patch * config.merge / digit
        pixels = shrink(pixels, tuple(max(1, round(factor * side)) for side in pixels.shape[:2]))
    if square is not None:
        pixels = to_square(pixels, square, 1)
    return model.answer((question, preprocess(pixels, config)), LONGEST)


@torch.no_grad()
def occlusion(model: KimiVL, one: Sample) -> Float[Tensor, "tokens rows columns"]:
    """Return by how many nats each patch, painted black, makes each byte of the answer less likely.

    Args:
        model: A trained one.
        one: A sample with one picture.

    Returns:
        For each byte of the answer, without its end: one number for each patch.

    Raises:
        ValueError: If the sample has not one picture, or no answer.
    """
    if len(one.pictures) != 1 or not one.answer:
        raise ValueError(f"need one picture and an answer, got {len(one.pictures)}, {one.answer!r}")
    (picture,) = one.pictures
    count = len(picture.patches)
    covered = picture.patches.repeat(count + 1, 1, 1)
    covered[torch.arange(count), torch.arange(count)] = -1.0  # the last stays whole
    row = collated(model, [one])
    tokens = row.tokens.expand(count + 1, -1)
    logits = model(tokens, covered.flatten(0, 1).to(tokens.device), [picture.grid] * (count + 1))
    places = (row.labels[0] >= 0).nonzero()[:-1, 0]
    scores = logits.log_softmax(-1)[:, places].gather(
        -1, row.labels[0, places].expand(count + 1, -1)[..., None]
    )[..., 0]
    return (scores[-1] - scores[:-1]).T.unflatten(1, picture.grid).cpu()


def held_out(task: Task, glyphs: Glyphs) -> Task:
    """Return the same task with other digits."""
    return replace(task, glyphs=glyphs)


def equal_squares(task: Task, config: VisionConfig, n: int = 2000) -> tuple[list[int], float]:
    """Return squares that cost about as many tokens as the task's pictures on average: at most and at least as many.

    Returns:
        Their sides in pixels, multiples of patch · merge, and the mean tokens of a picture.
    """
    block = config.patch * config.merge
    generator = Random(0)
    sides = ((generator.randint(*task.heights), generator.randint(*task.widths)) for _ in range(n))
    mean = fmean(-(-height // block) * -(-width // block) for height, width in sides)
    return sorted({block * math.floor(mean**0.5), block * math.ceil(mean**0.5)}), mean


WAYS = {
    "Muon, curriculum": ("Muon", curriculum),
    "Muon, direct": ("Muon", direct),
    "AdamW, curriculum": ("AdamW", curriculum),
    "AdamW, direct": ("AdamW", direct),
}


def compare_ways(
    target: Task,
    test: Task,
    config: Config,
    seeds: Iterable[int],
    *,
    rates: Mapping[str, Rates],
    steps: int,
    batch: int,
    n: int,
    ways: Iterable[str] = WAYS,
    device: torch.device | None = None,
) -> dict[str, list[float]]:
    """Train with each optimizer, with and without a curriculum, for equally many steps; exact match on the target.

    Args:
        target, test: What to learn, and the same with held-out digits.
        config: Sizes.
        seeds: One training of each way for each.
        rates: Learning rates by optimizer.
        steps, batch: As for `train`.
        n: Samples to test on.
        ways: Which of `WAYS`.
        device: Where.

    Returns:
        Exact match of each way and seed.
    """
    ways, found = list(ways), {}
    for seed in seeds:
        for way in ways:
            optimizer, stages = WAYS[way]
            model, _ = train(
                config,
                stages(target),
                seed=seed,
                steps=steps,
                batch=batch,
                muon=optimizer == "Muon",
                rates=rates[optimizer],
                device=device,
            )
            drawn = samples(test, config.vision, n, seed=seed + 1)
            found.setdefault(way, []).append(share_right(model, drawn))
    return found


def tune(
    target: Task,
    test: Task,
    config: Config,
    seeds: Sequence[int],
    rates: Mapping[str, Sequence[Rates]],
    **budget: Any,
) -> dict[str, dict[Rates, float]]:
    """Train each optimizer on the target alone at each of its rates; mean exact match of the seeds, by both.

    Args:
        target, test, config, seeds: As for `compare_ways`.
        rates: To try, by optimizer.
        budget: "steps", "batch", "n" and "device" as for `compare_ways`.
    """
    found: dict[str, dict[Rates, float]] = {optimizer: {} for optimizer in rates}
    for optimizer, tried in rates.items():
        way = f"{optimizer}, direct"
        for pair in tried:
            exact = compare_ways(
                target, test, config, seeds, rates={optimizer: pair}, ways=[way], **budget
            )
            found[optimizer][pair] = fmean(exact[way])
    return found


def anywhere(target: Task) -> list[Stage]:
    """Return two stages for digits that stand anywhere: first on the target's grid, then at any pixel."""
    return [Stage(target, 0.3), Stage(replace(target, step=1), 0.7)]


def compare_resolution(
    target: Task,
    test: Task,
    config: Config,
    seeds: Iterable[int],
    sizes: Sequence[tuple[int, int]],
    *,
    steps: int,
    batch: int,
    n: int,
    device: torch.device | None = None,
) -> tuple[dict[str, Any], dict[str, KimiVL]]:
    """Train at native resolution and on squares of about as many tokens, for equally many steps of a curriculum.

    Returns:
        "exact": for "native" and each square, exact match on the target for each seed. "by size": for each, by size, a
        value for each seed. "tokens": of a picture on average. And the last models.
    """
    sides, mean = equal_squares(target, config.vision)
    block = config.vision.patch * config.vision.merge
    squares = {"native": None} | {f"square of {(x // block) ** 2} tokens": x for x in sides}
    found: dict[str, Any] = {
        "exact": {name: [] for name in squares},
        "by size": {name: {} for name in squares},
        "tokens": {name: (x // block) ** 2 if x else mean for name, x in squares.items()},
    }
    models = {}
    for seed in seeds:
        for name, square in squares.items():
            models[name], _ = train(
                config,
                curriculum(target),
                seed=seed,
                steps=steps,
                batch=batch,
                square=square,
                device=device,
            )
            drawn = samples(test, config.vision, n, seed=seed + 1, square=square)
            found["exact"][name].append(share_right(models[name], drawn))
            share = by_size(models[name], test, sizes, n=n, seed=seed + 2, square=square)
            for size, value in share.items():
                found["by size"][name].setdefault(size, []).append(value)
    return found, models


def small_target(train: bool = True) -> Task:
    """Return what is read at small scale: two of scikit-learn's digits on canvases of 12 x 24 to 32 x 32 pixels.

    They stand at multiples of a patch's four pixels, which spares the encoder most of what there is to learn about
    places.
    """
    return Task(glyphs(train), (12, 32), (24, 32), digits=(2, 2), room=4, step=4)


RATES = {
    "Muon": ((0.01, 0.01), (0.03, 0.01), (0.1, 0.01), (0.03, 0.003)),
    "AdamW": ((0.001, 0.001), (0.001, 0.003), (0.003, 0.003), (0.01, 0.003), (0.003, 0.01)),
}
BUDGETS = {
    "long": {
        "seeds": 3,
        "steps": 220,
        "batch": 32,
        "rates": RATES,
        "reader_steps": 1500,
        "digits": (1, 2),
        "heights": (42, 112),
        "widths": (42, 112),
        "widest": 160,
        "mnist_steps": 800,
        "mnist_batch": 32,
        "width": 64,
        "layers": 2,
        "n": 400,
    },
    "full": {
        "seeds": 3,
        "steps": 400,
        "batch": 64,
        "rates": RATES,
        "reader_steps": 6000,
        "digits": (1, 4),
        "heights": (42, 224),
        "widths": (42, 224),
        "widest": 448,
        "mnist_steps": 3000,
        "mnist_batch": 128,
        "width": 256,
        "layers": 4,
        "n": 1000,
    },
}


def full_scale(
    device: torch.device,
    *,
    seed: int,
    seeds: int,
    steps: int,
    batch: int,
    rates: Mapping[str, Sequence[Rates]],
    reader_steps: int,
    digits: tuple[int, int],
    heights: tuple[int, int],
    widths: tuple[int, int],
    widest: int,
    mnist_steps: int,
    mnist_batch: int,
    width: int,
    layers: int,
    n: int,
) -> tuple[dict[str, Any], dict[str, Figure]]:
    """Compare optimizers and curricula on the small target, and native resolution with squares on MNIST's digits.

    Args:
        device: Where.
        seed: Of the first training.
        seeds: Trainings of each kind.
        steps, batch: Of each training on the small target.
        rates: Learning rates to choose from, by optimizer: "Muon" and "AdamW".
        reader_steps: Of one training on the small target's digits at any pixel.
        digits, heights, widths: Of canvases with MNIST's digits.
        widest: Pixels of the longest side to test on, beyond those of the training.
        mnist_steps, mnist_batch: Of each training on them.
        width, layers: Of the language model there; the encoder is as wide and has as many.
        n: Samples of each test.

    Returns:
        "rates": exact match by optimizer and rates, with a seed of its own. "ways": that of each way to train on the
        small target, for each seed, at the best of these rates. "reader": of a long training on digits at any pixel,
        tested there and "on the grid". The rest as `compare_resolution` says of MNIST's digits. Pictures of these.
    """
    all_seeds, config = range(seed, seed + seeds), tiny()
    small, small_test = small_target(), small_target(False)
    budget = dict(steps=steps, batch=batch, n=n, device=device)
    tuned = tune(small, small_test, config, [seed + seeds], rates, **budget)
    best = {optimizer: max(found, key=found.get) for optimizer, found in tuned.items()}
    ways = compare_ways(small, small_test, config, all_seeds, rates=best, **budget)
    results: dict[str, Any] = {
        "rates": {
            optimizer: {f"{rate:g}, {outer:g}": exact for (rate, outer), exact in found.items()}
            for optimizer, found in tuned.items()
        },
        "ways": ways,
    }
    reader, _ = train(
        config, anywhere(small), seed=seed, steps=reader_steps, batch=batch, device=device
    )
    shifted = replace(small_test, step=1)
    results["reader"] = {
        name: share_right(reader, samples(task, config.vision, n, seed=seed + 1))
        for name, task in (("anywhere", shifted), ("on the grid", small_test))
    }
    config = tiny(width, width, layers, layers, patch=14)
    low, high = heights
    sizes = [
        (2 * low, 2 * low),
        (high, high),
        (low, high),
        (high, low),
        (low, widest),
        (widest, low),
    ]
    target = Task(mnist_glyphs(True), heights, widths, digits, room=config.vision.patch)
    test = held_out(target, mnist_glyphs(False))
    found, models = compare_resolution(
        target,
        test,
        config,
        all_seeds,
        sizes,
        steps=mnist_steps,
        batch=mnist_batch,
        n=n,
        device=device,
    )
    bars, lines, own, canvases = (
        plt.figure(figsize=size) for size in ((5, 2.6), (6, 3.2), (7, 4), (7, 4))
    )
    draw_ways(bars.subplots(), ways)
    draw_sizes(lines.subplots(), found["by size"])
    draw_gallery(own, reader, shifted, seed)
    draw_gallery(canvases, models["native"], test, seed)
    return results | found, {
        "Exact match on held-out digits by optimizer and curriculum, a dot for each seed": bars,
        "Canvases with digits at any pixel, and what a model reads that was trained longer": own,
        "Exact match by height and width, at native resolution and on squares": lines,
        "Canvases with MNIST's digits and what the model reads on them": canvases,
    }


def draw_ways(ax: Axes, ways: dict[str, list[float]]) -> None:
    """Draw exact match of each way, a dot for each seed."""
    for i, values in enumerate(ways.values()):
        ax.plot(values, [i] * len(values), "o")
    ax.set(yticks=range(len(ways)), yticklabels=list(ways), xlim=(-0.02, 1.02))
    ax.set(xlabel="exact match", ylim=(len(ways) - 0.5, -0.5))


def draw_sizes(ax: Axes, by_size: dict[str, dict[str, list[float]]]) -> None:
    """Draw exact match of both kinds by size, a dot for each seed."""
    for kind, (name, values) in enumerate(by_size.items()):
        for i, shares in enumerate(values.values()):
            label = name if i == 0 else None
            ax.plot([i + 0.2 * kind] * len(shares), shares, f"oC{kind}", label=label)
    ax.set(xticks=range(len(values)), xticklabels=list(values), ylim=(-0.02, 1.02))
    ax.set(xlabel="height x width in pixels", ylabel="exact match")
    ax.legend()


def draw_gallery(figure: Figure, model: KimiVL, task: Task, seed: int) -> None:
    """Draw twelve canvases, each with the model's answer, and the right one where that differs."""
    generator = Random(seed)
    for ax in figure.subplots(3, 4).flat:
        canvas, question, answer = task.draw(generator)
        said = read(model, canvas, question)
        ax.imshow(canvas, cmap="gray", vmin=0, vmax=255)
        ax.set_title(said if said == answer else f"{said}, not {answer}", fontsize="small")
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(True)
