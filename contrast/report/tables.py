"""What the page says about the results: a summary sentence and the recall per class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from contrast.evaluation.results import subject
from contrast.evaluation.tables import Column, Table, join_with_and


def summary(table: Table, kind: str) -> str:
    """Return a sentence that compares the pretrained encoder with the other models; "" where it has no result.

    Args:
        table: the results of one metric.
        kind: "image", "series" or "" where it is unknown.
    """
    column = table.main
    shown = _shortest_distinct({model: result.value for model, result in table.results(column).items()})
    if "pretrained" not in shown:
        return ""
    items = {"image": "test images", "series": "test series"}.get(kind, "test samples")
    how = "by k-NN" if column.protocol == "knn" else f"by a probe with {column.given}"
    ours = shown.pop("pretrained")
    if table.metric == "accuracy":
        sentence = f"From the features of the pretrained encoder, {ours} of the {items} are classified correctly {how}"
    else:
        sentence = f"The features of the pretrained encoder reach a {table.metric} of {ours} on the {items} {how}"
    raw = {"image": "raw pixels", "series": "raw series"}.get(kind, "raw input")
    others = [f"{value} for {raw if model == 'raw' else subject(model)}" for model, value in shown.items()]
    return f"{sentence}, compared with {join_with_and(others)}." if others else f"{sentence}."


@dataclass(frozen=True)
class RecallTable:
    """The recall of each class by each model.

    Args:
        column: the protocol and its labels.
        models: the columns.
        rows: a class, its test samples (None where unknown) and its recalls, None where a model has none.
    """

    column: Column
    models: list[str]
    rows: list[tuple[str, int | None, list[float | None]]]


def recall_table(table: Table) -> RecallTable | None:
    """Return the recalls of the main column, or of the first that has some; None where no result has them."""
    for column in sorted(table.columns, key=lambda column: column != table.main):
        found = {model: result.per_class for model, result in table.results(column).items() if result.per_class}
        if not found:
            continue
        support = {name: scores.get("support") for classes in found.values() for name, scores in classes.items()}
        rows = [
            (
                name,
                None if count is None else int(count),
                [classes.get(name, {}).get("recall") for classes in found.values()],
            )
            for name, count in support.items()
        ]
        return RecallTable(column, list(found), rows)
    return None


def _shortest_distinct(values: Mapping[str, float]) -> dict[str, str]:
    """Return values with two decimals, or with three where two would make different values look equal."""
    short = {model: f"{value:.2f}" for model, value in values.items()}
    longer = {model: f"{value:.3f}" for model, value in values.items()}
    return short if len(set(short.values())) == len(set(longer.values())) else longer
