"""Results as tables: one model of a table, which the terminal, Markdown and the page of a run print."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from contrast.evaluation.compare import comparable, paired_difference
from contrast.evaluation.metrics import METRICS
from contrast.evaluation.results import TITLES, Result, title

PROTOCOL_ORDER = ("knn", "linear", "few_labels")
"""The order of columns; other protocols follow."""

METRIC_TITLES = {"macro_f1": "macro-F1", "auroc": "AUROC"}


@dataclass(frozen=True)
class Column:
    """A protocol and the labels that its classifier was given.

    Args:
        protocol: "knn", "linear", "few_labels" or another protocol's name.
        labels: "all" or "10 per class".
    """

    protocol: str
    labels: str

    @property
    def given(self) -> str:
        """The labels in words: "10 labels per class"."""
        word = "label" if self.labels == "1 per class" else "labels"
        return "all labels" if self.labels == "all" else self.labels.replace(" per", f" {word} per")

    @property
    def title(self) -> str:
        """The heading: "linear probe, 10 labels per class"."""
        if self.protocol in ("linear", "few_labels"):
            return f"linear probe, {self.given}"
        name = "k-NN" if self.protocol == "knn" else self.protocol.replace("_", " ")
        return name if self.labels == "all" else f"{name}, {self.given}"


@dataclass(frozen=True)
class Table:
    """The results of one metric: one row per model, one column per protocol and labels.

    Args:
        metric: the metric's title.
        split: whose items were predicted.
        columns: in the order that is printed.
        rows: for each model its result, or None, in each column.
    """

    metric: str
    split: str
    columns: list[Column]
    rows: dict[str, list[Result | None]]

    def results(self, column: Column) -> dict[str, Result]:
        """Return the results in a column by model."""
        index = self.columns.index(column)
        return {model: cell for model, row in self.rows.items() if (cell := row[index]) is not None}

    @property
    def main(self) -> Column:
        """The column that the summary reports: few labels, else all labels, else k-NN, else the first."""
        return max(self.columns, key=lambda column: _position(PROTOCOL_ORDER, missing=-1)(column.protocol))

    @property
    def texts(self) -> list[list[str]]:
        """The table as text: headings, then one row per model."""
        body = [[title(model), *(_cell_text(cell) for cell in row)] for model, row in self.rows.items()]
        return [["model", *(column.title for column in self.columns)], *body]

    @property
    def caption(self) -> str:
        """What the table shows."""
        unused = ", which was used for no choice" if self.split == "test" else ""
        return f"{self.metric[:1].upper()}{self.metric[1:]} on the {self.split} split{unused}."

    @property
    def spread_sentence(self) -> str:
        """What the numbers after ± are; "" where no cell has one."""
        kinds: dict[str, dict[str, None]] = {}
        for column in self.columns:
            for result in self.results(column).values():
                if result.spread is not None:
                    draws = f" ({result.n} draws, the same for every model)" if result.n > 1 else ""
                    kinds.setdefault(result.spread_kind, {})[column.title + draws] = None
        parts = [f"the {kind} for {join_with_and(list(columns))}" for kind, columns in kinds.items()]
        return f"± is {'; '.join(parts)}." if parts else ""

    @property
    def comparisons(self) -> list[str]:
        """A sentence on the pretrained encoder against each other model with the same draws, at least two."""
        sentences = []
        for column in self.columns:
            others = self.results(column)
            ours = others.pop("pretrained", None)
            sentences += [
                f"{column.title}, same draws: pretrained - {title(model)} = {paired_difference(ours, other)}."
                for model, other in others.items()
                if ours is not None and ours.n > 1 and comparable(ours, other)
            ]
        return sentences


def results_tables(results: Sequence[Result]) -> list[Table]:
    """Return one table per metric, accuracy first; of test results where there are any, without NaN."""
    finite = [result for result in results if math.isfinite(result.value)]
    shown = [result for result in finite if result.split == "test"] or finite
    metrics = sorted({result.metric for result in shown}, key=_position(METRICS))
    return [_table(metric, [result for result in shown if result.metric == metric]) for metric in metrics]


def text_table(results: Sequence[Result], notes: Sequence[str] = ()) -> str:
    """Return the first metric's table as aligned plain text, with its caption, comparisons and `notes`."""
    lines: list[str] = []
    for table in results_tables(results)[:1]:
        widths = [max(map(len, column)) for column in zip(*table.texts, strict=True)]
        rows = [table.texts[0], ["-" * width for width in widths], *table.texts[1:]]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += ["", *_sentences(table)]
    return "\n".join([*lines, *notes])


def markdown_table(results: Sequence[Result], notes: Sequence[str] = ()) -> str:
    """Return the same in Markdown."""
    lines: list[str] = []
    for table in results_tables(results)[:1]:
        lines = [f"| {' | '.join(row)} |" for row in table.texts]
        lines.insert(1, "|" + "---|" * len(table.texts[0]))
        lines += ["", *(f"- {sentence}" for sentence in _sentences(table))]
    return "\n".join([*lines, *(f"- {note}" for note in notes)])


def format_score(value: float | None) -> str:
    """Return a value in [0, 1] with three decimals; a dash for None."""
    return "\N{EN DASH}" if value is None else f"{value:.3f}"


def join_with_and(parts: Sequence[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def _table(metric: str, results: Sequence[Result]) -> Table:
    cells = {(result.model, Column(result.protocol, result.labels)): result for result in results}
    position = _position(PROTOCOL_ORDER)
    columns = sorted(
        dict.fromkeys(column for _, column in cells),
        key=lambda column: (position(column.protocol), -_labels_count(column.labels)),
    )
    models = sorted(dict.fromkeys(model for model, _ in cells), key=_position(list(TITLES)))
    rows = {model: [cells.get((model, column)) for column in columns] for model in models}
    return Table(METRIC_TITLES.get(metric, metric.replace("_", " ")), results[0].split, columns, rows)


def _labels_count(labels: str) -> float:
    number = re.search(r"\d+", labels)
    return float(number.group()) if number else math.inf


def _cell_text(result: Result | None) -> str:
    if result is None or result.spread is None:
        return format_score(None if result is None else result.value)
    return f"{format_score(result.value)} ± {format_score(result.spread)}"


def _sentences(table: Table) -> list[str]:
    return [sentence for sentence in (table.caption, table.spread_sentence, *table.comparisons) if sentence]


def _position(order: Sequence[str], missing: int | None = None) -> Callable[[str], int]:
    """Return the key that sorts by `order`; other names get the key `missing`, by default after all of them."""
    return lambda name: order.index(name) if name in order else len(order) if missing is None else missing
