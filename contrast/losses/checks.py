"""Checks of the numbers that losses are constructed with."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any


def check_positive(**arguments: Any) -> None:
    """Check that every argument is a positive, finite number.

    Raises:
        ValueError: with the name and the value of the first that is not.
    """
    for name, value in arguments.items():
        if not 0 < _as_float(value) < math.inf:
            raise ValueError(f"{name} must be a positive number; got {value!r}.")


def check_not_negative(**arguments: Any) -> None:
    """Check that every argument is a finite number of 0 or more.

    Raises:
        ValueError: with the name and the value of the first that is not.
    """
    for name, value in arguments.items():
        if not 0 <= _as_float(value) < math.inf:
            raise ValueError(f"{name} must be a number of 0 or more; got {value!r}.")


def _as_float(value: Any) -> float:
    return float(value) if isinstance(value, Real) else math.nan
