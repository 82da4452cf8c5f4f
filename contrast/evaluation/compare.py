"""Models side by side: the table that a person reads, and whether a difference is one."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from contrast.core.registry import InputError
from contrast.evaluation.results import TITLES, Result, title

Column = tuple[str, str]


@dataclass(frozen=True)
class Difference:
    """How much better `a` is than `b`, on the same draws.

    Args:
        mean: of the n differences, a - b.
        standard_error: their standard deviation / sqrt(n).
        n: draws.
    """

    mean: float
    standard_error: float
    n: int

    @property
    def clear(self) -> bool:
        """Tell whether `a` is better by more than twice the standard error."""
        return self.mean > 2 * self.standard_error

    def __str__(self) -> str:
        """Say number and verdict."""
        number = f"{self.mean:+.4f} ± {self.standard_error:.4f} (standard error over {self.n} draws)"
        if self.clear:
            return f"{number}: clear, more than twice its standard error"
        if -self.mean > 2 * self.standard_error:
            return f"{number}: clear, but the other way round"
        return f"{number}: not clear, within twice its standard error"


def paired_difference(a: Result, b: Result) -> Difference:
    """Give the mean difference a - b over the draws that both share.

    Raises:
        InputError: where the two were not measured alike, on the same draws, at least two.
    """
    for what in ("protocol", "protocol_hash", "split", "metric", "seeds"):
        if getattr(a, what) != getattr(b, what):
            raise InputError(
                f"only results measured alike can be compared; {a.model} has the {what} {getattr(a, what)}, "
                f"{b.model} has {getattr(b, what)}."
            )
    if a.n < 2:
        raise InputError(f"a standard error needs at least two draws; {a.protocol} has {a.n} here.")
    differences = [ours - theirs for ours, theirs in zip(a.values, b.values, strict=True)]
    return Difference(statistics.fmean(differences), statistics.stdev(differences) / a.n**0.5, a.n)


def table(results: Sequence[Result], notes: Sequence[str] = ()) -> str:
    """Give the accuracies as an aligned plain text: a row a model, a column a protocol, then what follows from them."""
    rows = _cells(results)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, "", *_below(results, notes)]).rstrip()


def markdown(results: Sequence[Result], notes: Sequence[str] = ()) -> str:
    """Give the same table in Markdown."""
    rows = [f"| {' | '.join(row)} |" for row in _cells(results)]
    rows.insert(1, "|" + "---|" * len(_cells(results)[0]))
    return "\n".join([*rows, "", *(f"- {line}" for line in _below(results, notes))]).rstrip()


def comparisons(results: Sequence[Result]) -> list[str]:
    """Give a sentence about the pretrained encoder against each other model, for every protocol with several draws."""
    sentences = []
    for column in _columns(results):
        cells = {row.model: row for row in _accuracies(results) if (row.protocol, row.labels) == column}
        ours = cells.get("pretrained")
        if ours is None or ours.n < 2:
            continue
        sentences += [
            f"{_words(column)}, same draws: pretrained - {title(model)} = {paired_difference(ours, cells[model])}."
            for model in _models(results)
            if model in cells and model != "pretrained"
        ]
    return sentences


def _below(results: Sequence[Result], notes: Sequence[str]) -> list[str]:
    spread = [row for row in _accuracies(results) if row.n > 1]
    legend = ["± is the standard deviation over label draws; every model gets the same draws."] if spread else []
    return ["accuracy on the test split, which no choice has seen.", *legend, *comparisons(results), *notes]


def _cells(results: Sequence[Result]) -> list[list[str]]:
    """Give the table's cells, the heads first."""
    found = {(row.model, row.protocol, row.labels): row for row in _accuracies(results)}
    columns = _columns(results)
    head = ["features", *(_head(column) for column in columns)]
    body = [[title(model), *(_number(found.get((model, *column))) for column in columns)] for model in _models(results)]
    return [head, *body]


def _accuracies(results: Sequence[Result]) -> list[Result]:
    return [row for row in results if row.metric == "accuracy"]


def _columns(results: Sequence[Result]) -> list[Column]:
    return list(dict.fromkeys((row.protocol, row.labels) for row in _accuracies(results)))


def _models(results: Sequence[Result]) -> list[str]:
    given = list(dict.fromkeys(row.model for row in results))
    return [model for model in TITLES if model in given] + [model for model in given if model not in TITLES]


def _words(column: Column) -> str:
    labels = column[1]
    return "all labels" if labels == "all" else labels.replace(" a class", " labels a class")


def _head(column: Column) -> str:
    names = {"knn": "k-NN", "linear": "linear", "few_labels": "linear"}
    name = names.get(column[0], column[0])
    return name if column[0] == "knn" else f"{name}, {_words(column)}"


def _number(row: Result | None) -> str:
    if row is None:
        return "-"
    if row.n > 1 and row.spread is not None:
        return f"{row.value:.4f} ± {row.spread:.4f} ({row.n} draws)"
    return f"{row.value:.4f}"
