"""Paired differences: by how much one model is better than another on the same draws."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from contrast.core.registry import InputError
from contrast.evaluation.results import Result


@dataclass(frozen=True)
class Difference:
    """The mean difference of two models over the same draws.

    Args:
        mean: of the n differences.
        standard_error: their standard deviation / sqrt(n).
        n: draws.
    """

    mean: float
    standard_error: float
    n: int

    @property
    def clear(self) -> bool:
        """True if the mean, of either sign, exceeds twice the standard error."""
        return abs(self.mean) > 2 * self.standard_error

    def __str__(self) -> str:
        """Return the numbers and whether the difference is more than twice its standard error."""
        verdict = "more" if self.clear else "not more"
        numbers = f"{self.mean:+.3f} ± {self.standard_error:.3f} (standard error over {self.n} draws)"
        return f"{numbers}: {verdict} than twice its standard error"


def comparable(a: Result, b: Result) -> bool:
    """True if both results come from the same protocol, split, metric and draws."""
    return not _unequal_settings(a, b)


def paired_difference(a: Result, b: Result) -> Difference:
    """Return the mean difference a - b over their common draws.

    Raises:
        InputError: where the two differ in protocol, settings, split, metric or draws, or have fewer than two draws.
    """
    if unequal := _unequal_settings(a, b):
        key = unequal[0]
        raise InputError(
            f"only results of the same protocol and draws can be compared; {a.model} has the {key} {getattr(a, key)}, "
            f"{b.model} has {getattr(b, key)}."
        )
    if a.n < 2:
        raise InputError(f"a standard error needs at least two draws; {a.protocol} has {a.n} here.")
    differences = [ours - theirs for ours, theirs in zip(a.values, b.values, strict=True)]
    return Difference(statistics.fmean(differences), statistics.stdev(differences) / a.n**0.5, a.n)


def _unequal_settings(a: Result, b: Result) -> list[str]:
    keys = ("protocol", "protocol_hash", "split", "metric", "seeds")
    return [key for key in keys if getattr(a, key) != getattr(b, key)]
