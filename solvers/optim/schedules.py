"""Learning rates as a formula of the update, after Audiocraft's `optim/*_lr_scheduler.py`.

The state of a schedule is numbers only, under Audiocraft's keys: each can read the other's.
"""

import inspect
import logging
import math
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

logger = logging.getLogger(__name__)

Rate = float | torch.Tensor


class FormulaLR(LRScheduler):
    """A rate that is a function of the update; the numbers that a class annotates are its state."""

    def __init__(self, optimizer: Optimizer, **numbers: float) -> None:
        self.__dict__.update(numbers)
        super().__init__(optimizer)

    def rate(self, lr: Rate, step: int) -> Rate:
        """Give the rate of update `step`, from 0, where the base rate is `lr`."""
        raise NotImplementedError

    def get_lr(self) -> list[Rate]:
        """Give the rate of each parameter group."""
        return [self.rate(lr, self.last_epoch) for lr in self.base_lrs]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as saved, with a warning where the configuration says something else now."""
        for name in inspect.get_annotations(type(self)):
            mine = getattr(self, name)
            saved = state_dict.get(name, mine)
            # Or else a training made longer would go on in silence at a rate of 0. A total of 0
            # is that of a stage alone, which trains nothing.
            if saved != mine and (name, mine) != ("total_steps", 0):
                logger.warning(
                    "the schedule was saved with %s=%s and is %s now: it goes on with %s",
                    *(name, saved, mine, saved),
                )
        super().load_state_dict(state_dict)


class Cosine(FormulaLR):
    """Half a cosine from the base rate down to a share of it, after a linear warm-up."""

    warmup_steps: float
    total_steps: int
    lr_min_ratio: float
    cycle_length: float

    def rate(self, lr: Rate, step: int) -> Rate:  # noqa: D102
        if step < self.warmup_steps:
            return lr * (step / self.warmup_steps)
        if step > self.total_steps:
            return lr * self.lr_min_ratio
        length = self.total_steps - self.warmup_steps
        share = (step - self.warmup_steps) / length if length else 0.0
        wave = 1.0 + math.cos(math.pi * share / self.cycle_length)
        return lr * (self.lr_min_ratio + 0.5 * (1 - self.lr_min_ratio) * wave)


class PolynomialDecay(FormulaLR):
    """A power of the share that is left, down to `end_lr`, after a linear warm-up."""

    warmup_steps: float
    total_steps: int
    end_lr: float
    zero_lr_warmup_steps: float
    power: float

    def rate(self, lr: Rate, step: int) -> Rate:  # noqa: D102
        start = self.zero_lr_warmup_steps + self.warmup_steps
        if self.zero_lr_warmup_steps > 0 and step <= self.zero_lr_warmup_steps:
            return 0.0
        if self.warmup_steps > 0 and step <= start:
            return lr * ((step - self.zero_lr_warmup_steps) / self.warmup_steps)
        if step >= self.total_steps:
            return self.end_lr
        left = 1 - (step - start) / (self.total_steps - start)
        return (lr - self.end_lr) * math.pow(left, self.power) + self.end_lr


class LinearWarmup(FormulaLR):
    """A line from `warmup_init_lr` to the base rate, which then stays."""

    warmup_steps: float
    warmup_init_lr: float

    def rate(self, lr: Rate, step: int) -> Rate:  # noqa: D102
        if step >= self.warmup_steps:
            return lr
        return self.warmup_init_lr + step * ((lr - self.warmup_init_lr) / self.warmup_steps)


class InverseSquareRoot(LinearWarmup):
    """A linear warm-up, then down with the square root of the update (Transformer, 2017)."""

    warmup_steps: float
    warmup_init_lr: float

    def rate(self, lr: Rate, step: int) -> Rate:  # noqa: D102
        if step + 1 < self.warmup_steps:
            return super().rate(lr, step + 1)
        return lr * math.pow(self.warmup_steps, 0.5) * math.pow(step + 1, -0.5)
