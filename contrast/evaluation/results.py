"""One number with everything that is needed to trust it: a row of results.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from contrast.core.registry import InputError


@dataclass(frozen=True)
class Result:
    """One number of one model by one protocol.

    Args:
        model: raw | untrained | pretrained | off_the_shelf | supervised, or a name of the user's.
        protocol: knn | linear | few_labels.
        protocol_version: "v1"; a protocol that gives other numbers gets another version.
        protocol_hash: of name, version and settings: equal hashes were measured alike.
        split: whose items were judged.
        labels: how many labels the classifier was given, "all" or "10 a class".
        metric: accuracy | balanced_accuracy | macro_f1 | auroc, in [0, 1].
        value: the mean of `values`.
        spread: how far another measurement may be off, in the meaning of `spread_kind`; None where nobody knows.
        spread_kind: "standard deviation over draws" | "standard error over test items" | "none".
        n: how many values.
        values: one a draw.
        seeds: one a value.
        selected_on: what the classifier's free choice was made on.
        saw_test: whether test items took part in any choice.
        settings: of the protocol, and what was chosen.
        per_class: class -> recall, precision, f1, support; in the rows of the accuracy, None elsewhere.
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
        """Give the row as plain numbers, texts, lists and dictionaries, for JSON."""
        return asdict(self)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Result:
        """Give the result back from its row.

        Raises:
            InputError: where the row has other keys.
        """
        known = {each.name for each in fields(cls)}
        if known != set(row):
            odd = ", ".join(sorted(known.symmetric_difference(row)))
            raise InputError(
                f"a row of results.json must have the keys {', '.join(sorted(known))}; these differ: {odd}."
            )
        return cls(**row)


TITLES = {
    "raw": "raw input",
    "untrained": "untrained",
    "pretrained": "pretrained",
    "off_the_shelf": "off the shelf",
    "supervised": "supervised",
}
"""How tables call the models, in the order of their rows; models of other names follow under these."""


def title(model: str) -> str:
    """Give the name of a model as a table shows it."""
    return TITLES.get(model, model)


def subject(model: str) -> str:
    """Give a model as the subject of a sentence: "the pretrained encoder"."""
    return "raw input" if model == "raw" else f"the {title(model)} encoder"
