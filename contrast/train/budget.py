"""How long a run trains: epochs, steps or hours; the schedule ends where the budget does."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from contrast.core.registry import InputError
from contrast.core.text import format_duration

_SECONDS = {"s": 1, "sec": 1, "second": 1, "m": 60, "min": 60, "minute": 60, "h": 3600, "hour": 3600, "d": 86400}


@dataclass(frozen=True)
class Budget:
    """A number of steps or of seconds, one of the two.

    Args:
        steps: how many optimiser steps the run takes.
        seconds: how long the run takes, counted over all of its parts where it was resumed.
    """

    steps: int | None = None
    seconds: float | None = None

    @classmethod
    def parse(cls, text: str, *, steps_per_epoch: int) -> Budget:
        """Read "200 epochs", "50000 steps", "8h", "90 minutes" or "1h30m".

        Raises:
            InputError: for anything else, or a budget of nothing.
        """
        words = text.strip().lower().replace("_", "").replace(",", "")
        if counted := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(epoch|step)s?", words):
            number = float(counted[1]) * (steps_per_epoch if counted[2] == "epoch" else 1)
            budget = cls(steps=math.ceil(number))
        elif re.fullmatch(r"(\d+(?:\.\d+)?\s*[a-z]+\s*)+", words):
            parts = re.findall(r"(\d+(?:\.\d+)?)\s*([a-z]+)", words)
            units = [unit if unit in _SECONDS else unit.removesuffix("s") for _, unit in parts]
            if not all(unit in _SECONDS for unit in units):
                raise _refusal(text)
            budget = cls(
                seconds=sum(float(number) * _SECONDS[unit] for (number, _), unit in zip(parts, units, strict=True))
            )
        else:
            raise _refusal(text)
        if not (budget.steps or budget.seconds):
            raise _refusal(text)
        return budget

    def progress(self, step: float, seconds: float) -> float:
        """Give the share of the budget that is spent, in [0, 1]."""
        spent = step / self.steps if self.steps else seconds / (self.seconds or math.inf)
        return min(spent, 1.0)

    def __str__(self) -> str:
        """Return the budget in words: "1,200 steps", "2 h"."""
        return f"{self.steps:,} steps" if self.steps else format_duration(self.seconds or 0)


def _refusal(text: str) -> InputError:
    return InputError(
        f'budget must be epochs, steps or a time, like "200 epochs", "50000 steps", "8h" or "30m"; got {text!r}.'
    )
