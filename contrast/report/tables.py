"""The rows of results.json as tables and sentences."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from contrast.evaluation.compare import Difference, paired_difference
from contrast.evaluation.metrics import METRICS
from contrast.evaluation.results import TITLES, Result, subject

PROTOCOLS = ("knn", "linear", "few_labels")
SPOKEN = {"macro_f1": "macro-F1", "auroc": "AUROC"}


@dataclass(frozen=True)
class Column:
    """One way to read a model's features: a protocol and the labels it was given.

    Args:
        protocol: "knn", "linear", "few_labels" or another protocol's name.
        labels: how many labels a class; None for all of them.
    """

    protocol: str
    labels: int | None

    @property
    def given(self) -> str:
        """The labels in words."""
        return "all labels" if self.labels is None else f"{self.labels} labels a class"

    @property
    def title(self) -> str:
        """What the column is called."""
        if self.protocol in ("linear", "few_labels"):
            return f"linear probe, {self.given}"
        name = "k-NN" if self.protocol == "knn" else self.protocol.replace("_", " ")
        return name if self.labels is None else f"{name}, {self.given}"


@dataclass(frozen=True)
class Table:
    """Results of one metric: a row a model, a column a way to read it.

    Args:
        metric: the metric as people say it.
        columns: in the order of the page.
        rows: for each model its result, or None, under each column.
    """

    metric: str
    columns: list[Column]
    rows: dict[str, list[Result | None]]

    def under(self, column: Column) -> dict[str, Result]:
        """Give the models that have a result in a column."""
        place = self.columns.index(column)
        return {model: cell for model, row in self.rows.items() if (cell := row[place]) is not None}

    @property
    def main(self) -> Column:
        """The column that the summary speaks about: few labels, else all labels, else k-NN, else the first."""
        return max(self.columns, key=lambda column: _place(PROTOCOLS, missing=-1)(column.protocol))


def read_results(rows: Iterable[Mapping[str, Any]]) -> list[Result]:
    """Give the rows of results.json, schema 1; keys that are not known here are passed over.

    Raises:
        InputError: where a row lacks a key.
    """
    known = {field.name for field in fields(Result)}
    return [Result.from_row({key: value for key, value in row.items() if key in known}) for row in rows]


def results_tables(results: Sequence[Result]) -> list[Table]:
    """Give one table a metric, accuracy first; of test results where there are any."""
    finite = [result for result in results if math.isfinite(result.value)]
    shown = [result for result in finite if result.split == "test"] or finite
    metrics = sorted({result.metric for result in shown}, key=_place(METRICS))
    return [_table(metric, [result for result in shown if result.metric == metric]) for metric in metrics]


def summary(table: Table, kind: str) -> str:
    """Say in a sentence how the pretrained encoder stands to the others; nothing where it has no result.

    Args:
        table: the results of one metric.
        kind: "image", "series" or "" where it is not known.
    """
    column = table.main
    values = {model: result.value for model, result in table.under(column).items()}
    if "pretrained" not in values:
        return ""
    shown = _digits(values)
    things = {"image": "test images", "series": "test series"}.get(kind, "test samples")
    how = "by its nearest neighbours" if column.protocol == "knn" else f"from {column.given}"
    ours = shown.pop("pretrained")
    if table.metric == "accuracy":
        sentence = f"The pretrained encoder reads {ours} of the {things} right {how}"
    else:
        sentence = f"The pretrained encoder reaches a {table.metric} of {ours} on the {things} {how}"
    raw = {"image": "raw pixels reach", "series": "the raw series reach"}.get(kind, "raw input reaches")
    others = [f"{raw if model == 'raw' else subject(model) + ' reaches'} {value}" for model, value in shown.items()]
    return f"{sentence}; {_and(others)}." if others else f"{sentence}."


def paired_sentences(table: Table) -> list[str]:
    """Say for each other model how far pretrained stands from it over the same draws of labels."""
    sentences = []
    for column in table.columns:
        others = table.under(column)
        ours = others.pop("pretrained", None)
        for model, other in others.items():
            if ours is not None and _same_draws(ours, other):
                sentences.append(_sentence(paired_difference(ours, other), model, column, table.metric))
    return sentences


def spread_sentence(table: Table) -> str:
    """Say what the numbers behind ± are; nothing where no cell has one."""
    kinds: dict[str, list[str]] = {}
    for column in table.columns:
        for result in table.under(column).values():
            columns = kinds.setdefault(result.spread_kind, [])
            draws = f" ({result.n} draws)" if result.n > 1 else ""
            if result.spread is not None and column.title + draws not in columns:
                columns.append(column.title + draws)
    said = [f"the {kind} for {_and(columns)}" for kind, columns in kinds.items() if columns]
    return f"± is {'; '.join(said)}." if said else ""


@dataclass(frozen=True)
class PerClass:
    """What each model reaches on each class: the recall.

    Args:
        column: how it was read.
        models: the columns.
        rows: a class, its test samples (None where that is not on record) and its recalls, None where a model has none.
    """

    column: Column
    models: list[str]
    rows: list[tuple[str, int | None, list[float | None]]]


def per_class_table(table: Table) -> PerClass | None:
    """Give the classes of the main column, or of the first that has some; None where no result tells them apart."""
    for column in sorted(table.columns, key=lambda column: column != table.main):
        found = {model: result.per_class for model, result in table.under(column).items() if result.per_class}
        if not found:
            continue
        names = dict.fromkeys(name for classes in found.values() for name in classes)
        support = {name: numbers.get("support") for classes in found.values() for name, numbers in classes.items()}
        rows = [
            (
                name,
                None if (count := support[name]) is None else int(count),
                [classes.get(name, {}).get("recall") for classes in found.values()],
            )
            for name in names
        ]
        return PerClass(column, list(found), rows)
    return None


def number(value: float | None) -> str:
    """Say a fraction with three decimals, or a dash for none."""
    return "\N{EN DASH}" if value is None else f"{value:.3f}"


def _table(metric: str, results: Sequence[Result]) -> Table:
    cells = {(result.model, _column(result)): result for result in results}
    place = _place(PROTOCOLS)
    columns = sorted(
        {column for _, column in cells}, key=lambda column: (place(column.protocol), -(column.labels or math.inf))
    )
    models = sorted({model for model, _ in cells}, key=_place(list(TITLES)))
    rows = {model: [cells.get((model, column)) for column in columns] for model in models}
    return Table(SPOKEN.get(metric, metric.replace("_", " ")), columns, rows)


def _column(result: Result) -> Column:
    given = re.search(r"\d+", result.labels)
    return Column(result.protocol, int(given.group()) if given else None)


def _same_draws(a: Result, b: Result) -> bool:
    return a.n > 1 and a.protocol_hash == b.protocol_hash and a.split == b.split and a.seeds == b.seeds


def _sentence(difference: Difference, model: str, column: Column, metric: str) -> str:
    side = "above" if difference.mean >= 0 else "below"
    start = (
        f"From {column.given}, over the same {difference.n} draws, the pretrained encoder stands "
        f"{abs(difference.mean):.3f} {side} {subject(model)} in {metric} "
        f"(standard error {difference.standard_error:.3f}): "
    )
    if abs(difference.mean) > 2 * difference.standard_error:
        return f"{start}more than twice the standard error."
    return f"{start}not more than twice the standard error, so it stays open which is better."


def _digits(values: Mapping[str, float]) -> dict[str, str]:
    """Say values with two decimals, or with three where two would make different values look the same."""
    short = {model: f"{value:.2f}" for model, value in values.items()}
    longer = {model: f"{value:.3f}" for model, value in values.items()}
    return short if len(set(short.values())) == len(set(longer.values())) else longer


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _place(order: Sequence[str], missing: int | None = None) -> Callable[[str], int]:
    """Give the key that sorts as `order` does; a name that is not in it comes at `missing`, by default the end."""
    return lambda name: order.index(name) if name in order else len(order) if missing is None else missing
