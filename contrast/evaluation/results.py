"""One measured number with its protocol, draws and spread: a row of results.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from contrast.core.registry import InputError


@dataclass(frozen=True)
class Result:
    """One number of one model by one protocol.

    Args:
        model: raw | untrained | pretrained | off_the_shelf | supervised, or another name.
        protocol: knn | linear | few_labels.
        protocol_version: "v1"; it changes with the numbers that the protocol gives.
        protocol_hash: of name, version and settings: equal hashes are comparable.
        split: whose items were predicted.
        labels: how many labels the classifier was given, "all" or "10 per class".
        metric: accuracy | balanced_accuracy | macro_f1 | auroc, in [0, 1].
        value: the mean of `values`.
        spread: the uncertainty of the value, of the kind `spread_kind`; None where it is unknown.
        spread_kind: "standard deviation over draws" | "standard error over test items" | "none".
        n: how many values.
        values: one per draw.
        seeds: one per value.
        selected_on: what the hyperparameters were selected on.
        saw_test: True if test items were used for any choice.
        settings: of the protocol, and what was chosen.
        per_class: class -> recall, precision, f1, support; None for other metrics than accuracy.
        seconds: to fit, predict and score this model by this protocol; its features not included.
    """

    model: str
    protocol: str
    protocol_version: str
    protocol_hash: str
    split: str
    labels: str
    metric: str
    value: float
    spread: float | None
    spread_kind: str
    n: int
    values: list[float]
    seeds: list[int]
    selected_on: str
    saw_test: bool
    settings: dict[str, Any] = field(default_factory=dict)
    per_class: dict[str, dict[str, float]] | None = None
    seconds: float = 0.0

    def row(self) -> dict[str, Any]:
        """Return the row as numbers, strings, lists and dictionaries, for JSON."""
        return asdict(self)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Result:
        """Return the result of a row; keys of a later version are ignored.

        Raises:
            InputError: where the row lacks a key.
        """
        keys = [each.name for each in fields(cls)]
        if missing := [key for key in keys if key not in row]:
            raise InputError(f"a row of results.json must have the keys {', '.join(keys)}; missing: {missing}.")
        return cls(**{key: row[key] for key in keys})


TITLES = {
    "raw": "raw input",
    "untrained": "untrained",
    "pretrained": "pretrained",
    "off_the_shelf": "off the shelf",
    "supervised": "supervised",
}
"""The models' titles in the order of the rows; models of other names follow."""


def title(model: str) -> str:
    """Return a model's title: "off the shelf"."""
    return TITLES.get(model, model)


def subject(model: str) -> str:
    """Return a model as the subject of a sentence: "the pretrained encoder"."""
    return "raw input" if model == "raw" else f"the {title(model)} encoder"
