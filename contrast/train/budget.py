"""The budget of a run in epochs, steps or hours, at whose end the learning rate's schedule ends too."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from contrast.core.registry import InputError
from contrast.core.text import format_duration

_SECONDS = {"s": 1, "sec": 1, "second": 1, "m": 60, "min": 60, "minute": 60, "h": 3600, "hour": 3600, "d": 86400}


@dataclass(frozen=True)
class Budget:
    """A number of steps, or a number of seconds.

    Args:
        steps: optimiser steps of the run.
        seconds: of training, over all parts of a resumed run.
    """

    steps: int | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, text: str, *, steps_per_epoch: int) -> Budget:
        """Return the budget of "200 epochs", "50000 steps", "8h", "90 minutes" or "1h30m".

        Raises:
            InputError: for anything else, or a budget of 0.
        """
        words = text.strip().lower().replace("_", "").replace(",", "")
        if counted := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(epoch|step)s?", words):
            number = float(counted[1]) * (steps_per_epoch if counted[2] == "epoch" else 1)
            budget = cls(steps=math.ceil(number))
        elif re.fullmatch(r"(\d+(?:\.\d+)?\s*[a-z]+\s*)+", words):
            parts = re.findall(r"(\d+(?:\.\d+)?)\s*([a-z]+)", words)
            units = [unit if unit in _SECONDS else unit.removesuffix("s") for _, unit in parts]
            if not all(unit in _SECONDS for unit in units):
                raise _invalid_budget(text)
            budget = cls(
                seconds=sum(float(number) * _SECONDS[unit] for (number, _), unit in zip(parts, units, strict=True))
            )
        else:
            raise _invalid_budget(text)
        if not (budget.steps or budget.seconds):
            raise _invalid_budget(text)
        return budget

    def progress(self, step: float, seconds: float) -> float:
        """Return the share of the budget that is used, in [0, 1]."""
        used = step / self.steps if self.steps else seconds / (self.seconds or math.inf)
        return min(used, 1.0)

    def __str__(self) -> str:
        """Return the budget in words: "1,200 steps", "2 h"."""
        return f"{self.steps:,} steps" if self.steps else format_duration(self.seconds or 0)


def _invalid_budget(text: str) -> InputError:
    return InputError(
        f'budget must be epochs, steps or a time, like "200 epochs", "50000 steps", "8h" or "30m"; got {text!r}.'
    )
