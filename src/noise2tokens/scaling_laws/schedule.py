"""A learning rate that stays, and then falls in two steps; and the usual one, which falls along a cosine."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

# Shares of the training at which the rate falls, and what is left of it from there on.
STEPS = {0.8: math.sqrt(0.1), 0.9: 0.1}


def multi_step(step: int, steps: int, warmup: int) -> float:
    """Return the share of the highest learning rate at a step, counted from 0.

    It rises linearly over the warm-up, stays, and is multiplied by 0.316 after 80 % of the steps and again after 90 %.

    Source: Bi et al. 2024, section 2.3.
    """
    if step < warmup:
        return (step + 1) / warmup
    return min((left for share, left in STEPS.items() if step >= share * steps), default=1.0)


def multi_step_schedule(optimizer: Optimizer, steps: int, warmup: int) -> LambdaLR:
    """Let an optimizer's learning rates follow `multi_step`; its rates now are the highest.

    Args:
        optimizer: Whose rates to set.
        steps: Of the whole training.
        warmup: Steps until the highest rate.

    Raises:
        ValueError: If the warm-up is not over before the rate falls.
    """
    _check(steps, warmup)
    return LambdaLR(optimizer, lambda step: multi_step(step, steps, warmup))


def cosine_schedule(optimizer: Optimizer, steps: int, warmup: int) -> LambdaLR:
    """Let an optimizer's learning rates rise as `multi_step` does, and fall along half a cosine to a tenth.

    Args:
        optimizer: Whose rates to set.
        steps: Of the whole training, at whose end a tenth is left.
        warmup: Steps until the highest rate.

    Raises:
        ValueError: If the warm-up takes more than 80 % of the steps.
    """
    _check(steps, warmup)

    def share(step: int) -> float:
        if step < warmup:
            return multi_step(step, steps, warmup)
        return 0.1 + 0.9 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

    return LambdaLR(optimizer, share)


def _check(steps: int, warmup: int) -> None:
    most = min(STEPS)
    if not 0 <= warmup <= most * steps:
        raise ValueError(f"need a warm-up of at most {most:.0%} of {steps} steps, got {warmup}")
