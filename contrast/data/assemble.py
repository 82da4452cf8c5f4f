"""From a reader's collection to a data set: class numbers, splits, groups of positives, mean and deviation."""

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
from contrast.data.splitting import Mask, check_no_leak, hold_out

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
    """Return the data set of a reader's collection; the arguments are those of `open_data`."""
    notes = list(collection.notes)
    codes, classes = _labels(collection, target, source, notes)
    official = _official_split(collection, notes)
    generator = np.random.default_rng(seed)
    members = _members(collection, split_by, source)
    masks = _split_items(codes, official, members, _split_shares(splits), generator, source, notes)
    group = _group_numbers(collection, codes, len(classes), positives, source)

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

    train, test = samples(np.flatnonzero(masks.train)), samples(np.flatnonzero(masks.test))
    validation = masks.validation[masks.train]
    absent = sorted(set(test.target) - set(train.target) - {-1})
    if absent:
        shown = ", ".join(classes[label] for label in absent[:5])
        notes.append(
            f"{len(absent)} classes of test do not occur in train: {shown}{', ...' if len(absent) > 5 else ''}."
        )
    notes.append(_counts(train, validation, test, classes))
    measured_range = _measure_range(collection, train)
    mean, std = _measure_statistics(collection, train, measured_range)
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
class _SplitMasks:
    train: Mask
    validation: Mask
    test: Mask


@dataclass
class _Members:
    """The members of the column `split_by`, which must not be split over train and test; without one, no codes."""

    column: str | None
    codes: Array | None
    names: list[str]


def _labels(collection: Collection, target: str | None, source: str, notes: list[str]) -> tuple[Array, tuple[str, ...]]:
    unlabelled = np.full(len(collection.names), -1, dtype=np.int64)
    without = target == "none" and target not in collection.columns
    label = None if without else target or collection.label
    if label is None:
        notes.append("Labels are not used." if without else "There are no labels.")
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
            "Add the other classes, or use no labels: data.target=none."
        )
    if len(present) > max(len(codes[codes >= 0]) // 2, 1) and len(present) > 2:
        notes.append(
            f"'{label}' has {len(present)} classes for {int((codes >= 0).sum())} labelled items: is it the label?"
        )
    return codes, classes


def _official_split(collection: Collection, notes: list[str]) -> Array | None:
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


def _split_shares(splits: Mapping[str, float] | None) -> dict[str, float]:
    shares: dict[str, float] = {}
    for name, share in (splits or {}).items():
        if name not in ("test", "validation"):
            hint = " Train is the rest of the items." if name == "train" else did_you_mean(name, ("test", "validation"))
            raise InputError(
                f"data.splits.{name}: expected the shares 'test' (of all) and 'validation' (of train).{hint}"
            )
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise InputError(f"data.splits.{name} must be a share of the labelled items, in [0, 1); got {share!r}.")
        shares[name] = float(share)
    return shares


def _split_items(
    codes: Array,
    official: Array | None,
    members: _Members,
    shares: dict[str, float],
    generator: np.random.Generator,
    source: str,
    notes: list[str],
) -> _SplitMasks:
    """Return the masks of train, validation (a part of train) and test; a missing official split is drawn randomly."""
    none = np.zeros(len(codes), dtype=bool)
    split = np.full(len(codes), "train") if official is None else official.copy()
    codes[split == "unlabelled"] = -1
    split[split == "unlabelled"] = "train"
    labelled = codes >= 0
    if "test" not in split and "validation" in split:
        split[split == "validation"] = "test"
        notes.append("There is a validation split and no test split; it is used as test.")
    test, validation = split == "test", (split == "validation") & labelled
    unused = test & ~labelled if labelled.any() else none
    if unused.any():
        rest = " No test label is left, so a test split is drawn from train." if np.all(unused == test) else ""
        notes.append(f"{int(unused.sum())} test items without a label are not used.{rest}")
        test = test & ~unused
    train = ~test & ~unused
    if not train.any():
        raise InputError(f"{source}: expected items to train on; all {len(codes)} are test. Correct the split.")
    if test.any():
        _check_no_leak(members, train | test, test, "train and test", source)
        if "test" in shares:
            raise InputError(f"data.splits.test: {source} has its own test split, which is used; remove the key.")
    elif labelled.any() and (share := shares.get("test", TEST_SHARE)) > 0:
        drawn = _hold_out_among(codes, train, members, share, generator)
        test, excluded = drawn & labelled, drawn & ~labelled
        train = ~drawn & ~unused
        validation = validation & train
        if not test.any() and members.column is not None:
            raise InputError(
                f"data.split_by: no member of '{members.column}' in {source} can be held out for test without removing "
                "a class from train. Remove split_by, or add members."
            )
        by = f", no '{members.column}' in both train and test" if members.column else ""
        notes.append(f"There is no test split: {int(test.sum())} labelled items are drawn for test{by}.")
        if excluded.any():
            notes.append(
                f"{int(excluded.sum())} unlabelled items share a '{members.column}' with test and are not used."
            )
    if validation.any():
        _check_no_leak(members, train, validation, "train and validation", source)
        if "validation" in shares:
            raise InputError(f"data.splits.validation: {source} has its own validation split; remove the key.")
    elif labelled[train].any():
        share = shares.get("validation", VALIDATION_SHARE)
        validation = _hold_out_among(codes, train, members, share, generator) & labelled
        if share > 0 and not validation.any():
            notes.append("Too few labelled items or members in train to hold out a validation split.")
    return _SplitMasks(train, validation, test)


def _hold_out_among(codes: Array, among: Mask, members: _Members, share: float, generator: np.random.Generator) -> Mask:
    drawn = np.zeros(len(codes), dtype=bool)
    drawn[among] = hold_out(codes[among], None if members.codes is None else members.codes[among], share, generator)
    return drawn


def _check_no_leak(members: _Members, among: Mask, second: Mask, splits: str, source: str) -> None:
    if members.codes is not None and members.column is not None:
        check_no_leak(
            members.codes[among], members.names, second[among], column=members.column, splits=splits, source=source
        )


def _group_numbers(collection: Collection, codes: Array, classes: int, positives: str, source: str) -> Array:
    """Return groups (N,) int64, equal = positives; an item without label or member has a group of its own."""
    own = np.arange(len(codes), dtype=np.int64)
    if positives == "sample":
        return own
    if positives == "label":
        if not np.any(codes >= 0):
            raise InputError(f"data.positives: 'label' needs labels, and {source} is read without them. Write sample.")
        return np.where(codes >= 0, codes, classes + own)
    values = pick_column(collection.columns, positives, key="positives", source=f"{source} (next to sample and label)")
    numbers, names = number_members(values)
    return np.where(numbers >= 0, numbers, len(names) + own)


def _counts(train: Samples, validation: Mask, test: Samples, classes: tuple[str, ...]) -> str:
    labelled = int((train.target >= 0).sum())
    of_classes = f", {len(classes)} classes" if classes else ""
    labelled_note = f" ({labelled} labelled)" if classes and labelled < len(train) else ""
    return (
        f"{len(train)} train items{labelled_note}, of which {int(validation.sum())} are for validation, "
        f"and {len(test)} test items{of_classes}."
    )


def _measured_rows(train: Samples) -> Array:
    """Return at most 2,000 positions, evenly spread over train."""
    return np.unique(np.linspace(0, len(train) - 1, min(len(train), MEASURED_ITEMS)).round().astype(np.int64))


def _measure_range(collection: Collection, train: Samples) -> tuple[float, float]:
    if collection.kind == "series":
        return 0.0, 1.0
    rows = np.arange(len(train)) if isinstance(collection.items, ArrayItems) else _measured_rows(train)
    if train.x(rows[:1]).dtype == torch.uint8:
        return 0.0, 255.0
    # As numpy arrays, since torch cannot reduce uint16.
    chunks = [train.x(rows[start : start + _CHUNK]).numpy() for start in range(0, len(rows), _CHUNK)]
    return value_range(min(x.min() for x in chunks), max(x.max() for x in chunks))


def _measure_statistics(
    collection: Collection, train: Samples, values: tuple[float, float]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return mean and standard deviation per channel over observed values, computed in float64 and in chunks."""
    rows = _measured_rows(train)
    low, high = values if collection.kind == "image" else (0.0, 1.0)

    def values_of(chunk: Array) -> Tensor:
        x = torch.from_numpy(train.x(chunk).numpy().astype(np.float64))
        return ((x - low) / (high - low)).transpose(0, 1).flatten(1)

    # Squares of values far from zero lose precision; those of differences to any value close to the mean do not.
    origin = values_of(rows[:_CHUNK]).nanmean(dim=1, keepdim=True).nan_to_num()
    count, total, squares = torch.zeros(3, len(origin), dtype=torch.float64)
    for start in range(0, len(rows), _CHUNK):
        x = values_of(rows[start : start + _CHUNK]) - origin
        count, total, squares = count + (~x.isnan()).sum(1), total + x.nansum(1), squares + (x * x).nansum(1)
    observed = count.clamp(min=1)
    offset = total / observed
    mean, std = offset + origin[:, 0], (squares / observed - offset**2).clamp(min=0).sqrt()
    std[std <= torch.finfo(torch.float32).eps * mean.abs()] = 1.0
    return mean.float().numpy(), std.float().numpy()
