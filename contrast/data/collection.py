"""The result of every reader: items with names and columns, not yet labelled, split or grouped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from contrast.core.registry import InputError, did_you_mean
from contrast.data.dataset import Array, Items

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "unlabelled": "unlabelled",
    "unlabeled": "unlabelled",
}
LABEL_NAMES = ("target", "label", "class", "targets", "labels", "y", "class_label", "category")


@dataclass
class Collection:
    """All N items of a source, over all its splits.

    Args:
        kind: of the items.
        items: the raw inputs.
        shape: of one item, (C, H, W) or (C, L).
        names: the name of each item.
        columns: by name, (N,) each, "" or NaN for missing values.
        label: the column of the labels, unless the user names another.
        classes: names for labels that are integers from 0.
        split: (N,) text, the official split: train, validation, test or unlabelled.
        notes: sentences for the user.
    """

    kind: Literal["image", "series"]
    items: Items
    shape: tuple[int, ...]
    names: Sequence[str]
    columns: dict[str, Array] = field(default_factory=dict)
    label: str | None = None
    classes: tuple[str, ...] = ()
    split: Array | None = None
    notes: list[str] = field(default_factory=list)


def pick_column(columns: dict[str, Array], name: str, *, key: str, source: str) -> Array:
    """Return the column called `name`, or raise an InputError that lists the columns."""
    if name in columns:
        return columns[name]
    known = f"It has: {', '.join(columns)}." if columns else "It has no columns."
    raise InputError(f"data.{key}: {source} has no column '{name}'.{did_you_mean(name, columns)} {known}")


def number_members(values: Array) -> tuple[Array, list[str]]:
    """Return codes (N,) int64, equal for equal values and -1 for missing ones, and the value of each code as text."""
    known = ~_missing(values)
    found, numbers = np.unique(values[known], return_inverse=True)
    order = _natural_order(found)
    rank = np.empty(len(found), dtype=np.int64)
    rank[order] = np.arange(len(found))
    codes = np.full(len(values), -1, dtype=np.int64)
    codes[known] = rank[numbers]
    return codes, [_value_text(found[index]) for index in order]


def number_labels(values: Array, classes: Sequence[str], *, where: str) -> tuple[Array, tuple[str, ...], str]:
    """Return targets (N,) int64 (-1 = none), the names of the classes and a note (or "").

    Integer labels are indices into `classes` if that is given. A label of -1 is no label if two other classes exist.
    """
    note = ""
    if np.issubdtype(values.dtype, np.floating):
        observed = values[np.isfinite(values)]
        if np.any(observed != np.floor(observed)):
            value = observed[observed != np.floor(observed)][0]
            raise InputError(
                f"{where} must be classes, whole numbers or words; got the number {value:g}. "
                "Convert a measured quantity to classes first, or name another column with target=."
            )
    if np.issubdtype(values.dtype, np.number) and np.any(values == -1):
        others = np.unique(values[~_missing(values) & (values != -1)])
        if len(others) >= 2 and np.all(others >= 0):
            note = f"{where}: {int(np.sum(values == -1))} items with the label -1 count as unlabelled."
            values = np.where(values == -1, np.nan, values.astype(np.float64))
    codes, found = number_members(values)
    if not classes:
        return codes, tuple(found), note
    if all(name.isdigit() and int(name) < len(classes) for name in found):
        numbers = np.array([int(name) for name in found] + [-1], dtype=np.int64)
        return numbers[codes], tuple(classes), note
    if set(found) <= set(classes):
        numbers = np.array([classes.index(name) for name in found] + [-1], dtype=np.int64)
        return numbers[codes], tuple(classes), note
    unknown = next(name for name in found if not (name.isdigit() and int(name) < len(classes)))
    raise InputError(
        f"{where}: 'classes' names {len(classes)} classes, so labels must be 0 to {len(classes) - 1} or those names; "
        f"got {unknown}. Correct one of the two arrays."
    )


def as_text(values: Iterable[object]) -> Array:
    """Return the values as text, "" for missing ones."""
    return np.array([_value_text(value) for value in values], dtype=str)


def official_split(values: Array) -> Array | None:
    """Return the split that a column's words name (missing = train), or None if they name no split."""
    words = [str(value).strip().lower() for value in values]
    named = {word for word in words if word}
    if not named or not named <= set(SPLIT_NAMES) or len({SPLIT_NAMES[word] for word in named}) < 2:
        return None
    return np.array([SPLIT_NAMES[word] if word else "train" for word in words], dtype=str)


def _missing(values: Array) -> Array:
    if np.issubdtype(values.dtype, np.floating):
        return np.asarray(np.isnan(values))
    if values.dtype.kind == "U":
        return np.asarray(values == "")
    return np.zeros(len(values), dtype=bool)


def _natural_order(found: Array) -> Array:
    """Return the sorting indices; "10" follows "9" if all values are numbers."""
    if found.dtype.kind == "U":
        try:
            return np.argsort(found.astype(np.float64), kind="stable")
        except ValueError:
            pass
    return np.arange(len(found))


def _value_text(value: object) -> str:
    if value is None or (isinstance(value, float | np.floating) and np.isnan(value)):
        return ""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value).strip()
