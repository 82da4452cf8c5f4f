"""What a loss says of a number that it cannot take."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any


def positive(**given: Any) -> None:
    """Raise a ValueError for an argument that is not a positive, finite number."""
    for name, value in given.items():
        if not 0 < _number(value) < math.inf:
            raise ValueError(f"{name} must be a positive number; got {value!r}.")


def not_negative(**given: Any) -> None:
    """Raise a ValueError for an argument that is not a finite number of 0 or more."""
    for name, value in given.items():
        if not 0 <= _number(value) < math.inf:
            raise ValueError(f"{name} must be a number of 0 or more; got {value!r}.")


def _number(value: Any) -> float:
    return float(value) if isinstance(value, Real) else math.nan
