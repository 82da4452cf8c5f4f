"""What the page of a run is made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

Findings = Mapping[str, Sequence[Mapping[str, Any]]]
"""What the loss found: title -> rows; rows with the key "sample" are about single items."""


@dataclass(frozen=True)
class RunRecord:
    """The content of a run's folder; what is missing is empty.

    Args:
        name: the run's name.
        config: the resolved config, as nested mappings.
        config_text: the same as it is written.
        command: the command that repeats the run.
        environment: versions, device, commit.
        state: {"state": running | stopped | failed | done, "step": ..., "heartbeat": seconds since 1970, "why": ...}.
        metrics: one mapping per measurement, with its "step".
        results: `results.json`, schema 1.
        views: a PNG of some samples and their views, None where there is none.
        arrays: as `page_arrays` returns them.

    Example:
        >>> from contrast.report import RunRecord
        >>> record = RunRecord("a", metrics=[{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0}])
        >>> record.series("loss")[1].tolist()
        [5.0, 4.0]
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    config_text: str = ""
    command: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()
    results: Mapping[str, Any] = field(default_factory=dict)
    views: bytes | None = None
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def run(self) -> Mapping[str, Any]:
        """The entries of the results about the run: device, precision, steps, seconds."""
        return self.results.get("run") or {}

    @property
    def splits(self) -> dict[str, Mapping[str, Any]]:
        """Each split's source, fingerprint and number of samples."""
        return dict(self.results.get("data") or {})

    @property
    def kind(self) -> str:
        """What the samples are: "image", "series", or "" where it is unknown."""
        return str(self.arrays.get("kind", ""))

    def series(self, key: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the steps and values (n,) of a metric, by ascending step; of equal steps the last."""
        values = {
            float(row["step"]): float(row[key])
            for row in self.metrics
            if is_number(row.get("step")) and is_number(row.get(key))
        }
        steps = sorted(values)
        return np.array(steps), np.array([values[step] for step in steps])

    def findings(self, *, samples: bool) -> Findings:
        """Return what the loss found, without rows and names of single items where `samples` is False."""
        found: Findings = self.results.get("findings") or {}
        return found if samples else without_items(found)


def without_items(findings: Findings) -> Findings:
    """Return the findings without rows about single items, and without names.

    Example:
        >>> from contrast.report import without_items
        >>> without_items({"noisy": [{"sample": 7, "name": "a.png"}], "shares": [{"epoch": 1, "noisy": 0.1}]})
        {'shares': [{'epoch': 1, 'noisy': 0.1}]}
    """
    remaining = {
        title: [{key: value for key, value in row.items() if key != "name"} for row in rows if "sample" not in row]
        for title, rows in findings.items()
    }
    return {title: rows for title, rows in remaining.items() if rows}


def dotted_texts(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Iterate over nested mappings as pairs of a dotted key and its value as text; None is left out."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from dotted_texts(value, f"{above}{key}.")
        elif isinstance(value, list | tuple):
            yield f"{above}{key}", ", ".join(str(item) for item in value)
        elif value is not None:
            yield f"{above}{key}", str(value)


def format_time(time: object) -> str:
    """Return seconds since 1970 as a date and time in UTC, any other value as text, "" for None."""
    if is_number(time):
        return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return str(time or "")


def is_number(value: object) -> TypeGuard[int | float]:
    """True for int and float, but not for bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)
