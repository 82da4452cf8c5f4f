"""From a reader's items to a data set: labels numbered, sides split, groups formed, values measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from contrast.core.registry import InputError, did_you_mean
from contrast.data.collection import Collection, number_labels, number_members, official_split, pick_column
from contrast.data.dataset import Array, ArrayItems, Data, Samples
from contrast.data.images import value_range
from contrast.data.splitting import Mask, hold_out, refuse_leak

TEST_SHARE, VALIDATION_SHARE = 0.2, 0.2
MEASURED_ITEMS = 2_000

_SPLIT_COLUMNS = ("split", "set", "subset", "partition")
_CHUNK = 256


def assemble(
    collection: Collection,
    *,
    source: str,
    target: str | None,
    split_by: str | None,
    positives: str,
    splits: Mapping[str, float] | None,
    seed: int,
) -> Data:
    """Give the data set of a reader's items; the arguments are those of `open_data`."""
    notes = list(collection.notes)
    codes, classes = _labels(collection, target, source, notes)
    official = _official(collection, notes)
    generator = np.random.default_rng(seed)
    sides = _split(codes, official, _members(collection, split_by, source), _shares(splits), generator, source, notes)
    group = _group(collection, codes, len(classes), positives, source)

    def samples(rows: Array) -> Samples:
        return Samples(
            collection.items,
            rows.astype(np.int64),
            target=codes[rows],
            group=group[rows],
            columns={name: column[rows] for name, column in collection.columns.items()},
            names=[collection.names[row] for row in rows],
            classes=classes,
        )

    train, test = samples(np.flatnonzero(sides.train)), samples(np.flatnonzero(sides.test))
    validation = sides.validation[sides.train]
    absent = sorted(set(test.target) - set(train.target) - {-1})
    if absent:
        shown = ", ".join(classes[label] for label in absent[:5])
        notes.append(
            f"{len(absent)} classes of test do not occur in train: {shown}{', ...' if len(absent) > 5 else ''}."
        )
    notes.append(_counts(train, validation, test, classes))
    measured_range = _range(collection, train)
    mean, std = _statistics(collection, train, measured_range)
    parts = {"train": train, "validation": train.subset(validation), "test": test}
    return Data(
        kind=collection.kind,
        source=source,
        shape=tuple(collection.shape),
        classes=classes,
        train=train,
        validation=validation,
        test=test,
        value_range=measured_range,
        mean=mean,
        std=std,
        fingerprint={name: part.fingerprint() for name, part in parts.items() if len(part)},
        notes=tuple(notes),
        split_by=split_by,
    )


@dataclass
class _Sides:
    train: Mask
    validation: Mask
    test: Mask


@dataclass
class _Members:
    """Who must stay together, by the column that says so; without one, nobody."""

    column: str | None
    codes: Array | None
    names: list[str]


def _labels(collection: Collection, target: str | None, source: str, notes: list[str]) -> tuple[Array, tuple[str, ...]]:
    unlabelled = np.full(len(collection.names), -1, dtype=np.int64)
    without = target == "none" and target not in collection.columns
    label = None if without else target or collection.label
    if label is None:
        notes.append("Labels are left out." if without else "There are no labels.")
        return unlabelled, ()
    values = pick_column(collection.columns, label, key="target", source=source)
    names = collection.classes if label == collection.label else ()
    codes, classes, note = number_labels(values, names, where=f"{source}: the labels in '{label}'")
    notes += [note] if note else []
    present = np.unique(codes[codes >= 0])
    if len(present) == 0:
        raise InputError(
            f"{source}: expected labels in '{label}'; all of them are missing. Name another: data.target=."
        )
    if len(present) == 1:
        raise InputError(
            f"{source}: expected two or more classes in '{label}'; every label is '{classes[present[0]]}'. "
            "Add the other classes, or go without labels: data.target=none."
        )
    if len(present) > max(len(codes[codes >= 0]) // 2, 1) and len(present) > 2:
        notes.append(
            f"'{label}' has {len(present)} classes for {int((codes >= 0).sum())} labelled items: is it the label?"
        )
    return codes, classes


def _official(collection: Collection, notes: list[str]) -> Array | None:
    if collection.split is not None:
        return collection.split
    for name in _SPLIT_COLUMNS:
        if name in collection.columns and (split := official_split(collection.columns[name])) is not None:
            notes.append(f"The column '{name}' is the split.")
            return split
    return None


def _members(collection: Collection, split_by: str | None, source: str) -> _Members:
    if split_by is None:
        return _Members(None, None, [])
    return _Members(split_by, *number_members(pick_column(collection.columns, split_by, key="split_by", source=source)))


def _shares(splits: Mapping[str, float] | None) -> dict[str, float]:
    shares: dict[str, float] = {}
    for name, share in (splits or {}).items():
        if name not in ("test", "validation"):
            hint = (
                " Train is what the other two leave." if name == "train" else did_you_mean(name, ("test", "validation"))
            )
            raise InputError(
                f"data.splits.{name}: expected the shares 'test' (of all) and 'validation' (of train).{hint}"
            )
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise InputError(f"data.splits.{name} must be a share of the labelled items, in [0, 1); got {share!r}.")
        shares[name] = float(share)
    return shares


def _split(
    codes: Array,
    official: Array | None,
    members: _Members,
    shares: dict[str, float],
    generator: np.random.Generator,
    source: str,
    notes: list[str],
) -> _Sides:
    """Give who is train, held out of it, and test; an official split stands, the rest is drawn."""
    nobody = np.zeros(len(codes), dtype=bool)
    words = np.full(len(codes), "train") if official is None else official.copy()
    codes[words == "unlabelled"] = -1
    words[words == "unlabelled"] = "train"
    labelled = codes >= 0
    if "test" not in words and "validation" in words:
        words[words == "validation"] = "test"
        notes.append("There is a validation split and no test split; it serves as test.")
    test, validation = words == "test", (words == "validation") & labelled
    unused = test & ~labelled if labelled.any() else nobody
    if unused.any():
        rest = " No test label is left, so a test split is drawn from train." if np.all(unused == test) else ""
        notes.append(f"{int(unused.sum())} test items without a label are left out.{rest}")
        test = test & ~unused
    train = ~test & ~unused
    if not train.any():
        raise InputError(f"{source}: expected items to train on; all {len(codes)} are test. Correct the split.")
    if test.any():
        _refuse_leak(members, train | test, test, "train and test", source)
        if "test" in shares:
            raise InputError(f"data.splits.test: {source} has its own test split, which stands; leave the key out.")
    elif labelled.any() and (share := shares.get("test", TEST_SHARE)) > 0:
        drawn = _drawn(codes, train, members, share, generator)
        test, left_out = drawn & labelled, drawn & ~labelled
        train = ~drawn & ~unused
        validation = validation & train
        if not test.any() and members.column is not None:
            raise InputError(
                f"data.split_by: no member of '{members.column}' in {source} can be held out for test without taking a "
                "class from train. Leave split_by out, or add members."
            )
        by = f", no '{members.column}' on both sides" if members.column else ""
        notes.append(f"There is no test split: {int(test.sum())} labelled items are drawn for test{by}.")
        if left_out.any():
            notes.append(
                f"{int(left_out.sum())} unlabelled items share a '{members.column}' with test and are left out."
            )
    if validation.any():
        _refuse_leak(members, train, validation, "train and validation", source)
        if "validation" in shares:
            raise InputError(f"data.splits.validation: {source} has its own validation split; leave the key out.")
    elif labelled[train].any():
        share = shares.get("validation", VALIDATION_SHARE)
        validation = _drawn(codes, train, members, share, generator) & labelled
        if share > 0 and not validation.any():
            notes.append("Too few labelled items or members in train to hold a validation split out.")
    return _Sides(train, validation, test)


def _drawn(codes: Array, among: Mask, members: _Members, share: float, generator: np.random.Generator) -> Mask:
    drawn = np.zeros(len(codes), dtype=bool)
    drawn[among] = hold_out(codes[among], None if members.codes is None else members.codes[among], share, generator)
    return drawn


def _refuse_leak(members: _Members, among: Mask, side: Mask, sides: str, source: str) -> None:
    if members.codes is not None and members.column is not None:
        refuse_leak(members.codes[among], members.names, side[among], column=members.column, sides=sides, source=source)


def _group(collection: Collection, codes: Array, classes: int, positives: str, source: str) -> Array:
    """Give who is whose positive: (N,) int64; who has no label or member gets a number behind all others."""
    own = np.arange(len(codes), dtype=np.int64)
    if positives == "sample":
        return own
    if positives == "label":
        if not np.any(codes >= 0):
            raise InputError(f"data.positives: 'label' needs labels, and {source} is read without. Write sample.")
        return np.where(codes >= 0, codes, classes + own)
    known = pick_column(collection.columns, positives, key="positives", source=f"{source} (beside sample and label)")
    numbers, names = number_members(known)
    return np.where(numbers >= 0, numbers, len(names) + own)


def _counts(train: Samples, validation: Mask, test: Samples, classes: tuple[str, ...]) -> str:
    labelled = int((train.target >= 0).sum())
    of_classes = f", {len(classes)} classes" if classes else ""
    unlabelled = f" ({labelled} labelled)" if classes and labelled < len(train) else ""
    return (
        f"{len(train)} train items{unlabelled}, of which {int(validation.sum())} validate, and {len(test)} test items"
        f"{of_classes}."
    )


def _measured_rows(train: Samples) -> Array:
    """Give at most 2,000 places, evenly spread over train, or all of them."""
    return np.unique(np.linspace(0, len(train) - 1, min(len(train), MEASURED_ITEMS)).round().astype(np.int64))


def _range(collection: Collection, train: Samples) -> tuple[float, float]:
    if collection.kind == "series":
        return 0.0, 1.0
    rows = np.arange(len(train)) if isinstance(collection.items, ArrayItems) else _measured_rows(train)
    if train.x(rows[:1]).dtype == torch.uint8:
        return 0.0, 255.0
    # As numpy arrays, since torch reduces no uint16.
    chunks = [train.x(rows[start : start + _CHUNK]).numpy() for start in range(0, len(rows), _CHUNK)]
    return value_range(min(x.min() for x in chunks), max(x.max() for x in chunks))


def _statistics(
    collection: Collection, train: Samples, values: tuple[float, float]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Give mean and standard deviation a channel over what was observed, in float64 and in chunks."""
    rows = _measured_rows(train)
    low, high = values if collection.kind == "image" else (0.0, 1.0)

    def values_of(chunk: Array) -> Tensor:
        x = torch.from_numpy(train.x(chunk).numpy().astype(np.float64))
        return ((x - low) / (high - low)).transpose(0, 1).flatten(1)

    # Squares of values far from zero lose digits; those of differences to any value near the mean do not.
    near = values_of(rows[:_CHUNK]).nanmean(dim=1, keepdim=True).nan_to_num()
    count, total, squares = torch.zeros(3, len(near), dtype=torch.float64)
    for start in range(0, len(rows), _CHUNK):
        x = values_of(rows[start : start + _CHUNK]) - near
        count, total, squares = count + (~x.isnan()).sum(1), total + x.nansum(1), squares + (x * x).nansum(1)
    observed = count.clamp(min=1)
    offset = total / observed
    mean, std = offset + near[:, 0], (squares / observed - offset**2).clamp(min=0).sqrt()
    std[std <= torch.finfo(torch.float32).eps * mean.abs()] = 1.0
    return mean.float().numpy(), std.float().numpy()
