"""One training loop for every chapter.

A chapter brings a model, a loss and data; the loop brings what is the same everywhere: minibatches drawn on the
data's own device, validation that decides which weights are kept, a curve, a progress bar in a live session. What a
batch is, the loop need not know: it hands on whatever the data gives. `fit` is the loop with the optimizer and the
learning rates that nearly all chapters share.

Nothing in the loop waits for the device between two validations (losses stay tensors until then), so small models on
a GPU are limited by kernel launches and not by the loop.
"""

import copy
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from IPython import get_ipython
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (all devices).

    Args:
        seed: Any non-negative integer.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def pick_device() -> torch.device:
    """Return the CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def live() -> bool:
    """Say whether someone is watching: a terminal, or a notebook front end that could be asked for input.

    Progress bars are drawn only then, so that the outputs a build stores hold results and nothing else. Builds
    (papermill, nbval, nbconvert) send their cells with `allow_stdin` off, which no front end with a person does.
    """
    shell = get_ipython()
    if shell is None or not hasattr(shell, "kernel"):
        return sys.stderr.isatty()
    return bool(shell.kernel.get_parent("shell").get("content", {}).get("allow_stdin"))


@dataclass
class History:
    """What a call of `train` saw.

    Attributes:
        steps: Step numbers at which `losses` were taken (every step).
        losses: Training loss at those steps.
        validation_steps: Step numbers at which `validation` was computed.
        validation: Validation values; empty where no `validate` was given.
        best_step: The step whose weights the model holds now.
        seconds: Wall-clock time of the loop, validation included.
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    validation_steps: list[int] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    best_step: int = 0
    seconds: float = 0.0


def train(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    data: Shaped[Tensor, "n *shape"] | Callable[[int], Any],
    *,
    steps: int,
    batch_size: int,
    optimizer: torch.optim.Optimizer,
    validate: Callable[[], float] | None = None,
    validate_every: int = 100,
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None,
    average: AveragedModel | None = None,
    after_step: Callable[[int], None] | None = None,
    label: str = "training",
) -> History:
    """Minimize a loss over minibatches; keep the weights that validate best.

    Args:
        model: The module whose parameters `optimizer` holds.
        loss: Maps a batch, whatever `data` gives, to a scalar tensor.
        data: Samples along the first axis, on the model's device; every epoch is a fresh permutation and the last,
            smaller batch is dropped. Or a function of the batch size that draws a new batch of any kind.
        steps: Number of optimizer steps.
        batch_size: Samples a step.
        optimizer: Any torch optimizer.
        validate: Returns a number, lower is better. Called before the first step, every `validate_every` steps and
            after the last, in `eval` mode without gradients. The model ends with the weights of the best call.
        validate_every: Steps between two calls of `validate`.
        schedule: Learning-rate schedule, stepped once a step.
        average: A running average of the weights, updated once a step; see `running_average`.
        after_step: Called with the number of each step, from 1, after it: for what belongs to a step and is no
            gradient, such as moving a codebook or a bias. Runs without gradients.
        label: Name on the progress bar.

    Returns:
        The curve. Without `validate` the model ends with the weights of the last step.

    Raises:
        ValueError: If `steps`, `batch_size` or `validate_every` is below 1, or the batch exceeds the data.
        FloatingPointError: If the loss or the validation value is not finite.
    """
    for name, number in {
        "steps": steps,
        "batch_size": batch_size,
        "validate_every": validate_every,
    }.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if isinstance(data, Tensor) and batch_size > len(data):
        raise ValueError(f"batch_size {batch_size} exceeds the {len(data)} samples of the data")

    draw = _epochs(data, batch_size) if isinstance(data, Tensor) else data
    history = History()
    pending: list[Tensor] = []
    best, best_state = float("inf"), None
    start = time.perf_counter()

    def settle(step: int) -> None:
        nonlocal best, best_state
        values = torch.stack(pending).tolist() if pending else []
        pending.clear()
        history.steps += range(len(history.losses) + 1, len(history.losses) + len(values) + 1)
        history.losses += values
        for i, value in enumerate(values, start=len(history.losses) - len(values) + 1):
            if not np.isfinite(value):
                raise FloatingPointError(f"{label}: the loss is {value} at step {i}")
        if validate is None:
            history.best_step = step
            return
        model.eval()
        with torch.no_grad():
            value = float(validate())
        model.train()
        if not np.isfinite(value):
            raise FloatingPointError(f"{label}: the validation value is {value} after step {step}")
        history.validation_steps.append(step)
        history.validation.append(value)
        if value < best:
            best, history.best_step = value, step
            best_state = copy.deepcopy(model.state_dict())

    model.train()
    settle(0)
    with tqdm(total=steps, desc=label, disable=not live(), leave=False) as bar:
        for step in range(1, steps + 1):
            value = loss(draw(batch_size))
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            if average is not None:
                average.update_parameters(model)
            if after_step is not None:
                with torch.no_grad():
                    after_step(step)
            pending.append(value.detach())
            if step % validate_every == 0 or step == steps:
                settle(step)
                bar.update(step - bar.n)
    if best_state is not None:
        model.load_state_dict(best_state)
    model.eval()
    history.seconds = time.perf_counter() - start
    return history


def fit(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    data: Shaped[Tensor, "n *shape"] | Callable[[int], Any],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float = 1e-3,
    warmup: float = 0.0,
    optimizer: torch.optim.Optimizer | None = None,
    **options: Any,
) -> History:
    """Train with rates that rise linearly over a share of the steps, and then fall to zero along a half cosine.

    Args:
        model: The module to train.
        loss: As for `train`.
        data: As for `train`.
        steps: Number of optimizer steps.
        batch_size: Samples a step.
        learning_rate: Adam's, at its highest.
        warmup: Share of the steps over which the rate rises, in [0, 1).
        optimizer: Another optimizer than Adam; the rates that its groups have now are their highest.
        options: `validate`, `validate_every`, `average`, `after_step` and `label`, as for `train`.

    Returns:
        The curve.

    Raises:
        ValueError: If `warmup` is not in [0, 1), or `train` refuses a size.
    """
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup must lie in [0, 1), got {warmup}")
    if optimizer is None:
        optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
    rising = round(warmup * steps)

    def share_of_rate(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising))) / 2

    return train(
        model,
        loss,
        data,
        steps=steps,
        batch_size=batch_size,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_rate),
        **options,
    )


def running_average(model: nn.Module, decay: float = 0.999) -> AveragedModel:
    """Make a copy of a model that follows it slowly, for `train` to update and for the caller to sample from.

    Args:
        model: Whose weights to follow; buffers are followed too.
        decay: Share of the old average that a step keeps; 1 / (1 - decay) steps is its memory.

    Returns:
        A module called like the model. It starts as a copy of the weights at the first update.

    Raises:
        ValueError: If the decay is not in [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must lie in [0, 1), got {decay}")
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def _epochs(data: Tensor, batch_size: int) -> Callable[[int], Tensor]:
    """Draw batches without replacement, epoch after epoch, shuffling on the data's device."""

    def batches():
        while True:
            order = torch.randperm(len(data), device=data.device)
            for first in range(0, len(data) - batch_size + 1, batch_size):
                yield data[order[first : first + batch_size]]

    stream = batches()
    return lambda _: next(stream)
