"""What every room after this one sees of the data: batches, samples of one split, the whole set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]


class Batch(NamedTuple):
    """Raw input with its identity.

    x: (N, C, H, W) uint8, uint16 or float32 for images; (N, C, L) float32 for series, NaN where nothing was observed.
    sample: (N,) int64, index in the whole data set, unique over its splits.
    target: (N,) int64, the class, or -1 for no label.
    group: (N,) int64, equal = positives.
    """

    x: Tensor
    sample: Tensor
    target: Tensor
    group: Tensor


class Items(Protocol):
    """How the raw input of items is read, by their position: from memory or from files."""

    def read(self, rows: Array) -> Tensor:
        """Give the raw batch of the items at `rows`."""
        ...

    def identity(self, row: int) -> bytes:
        """Give bytes that change when the item changes: its values, or the name and size of its file."""
        ...

    def content(self, row: int) -> bytes:
        """Give bytes that two items share when they are the same."""
        ...


@dataclass(frozen=True, eq=False)
class ArrayItems:
    """Items in memory.

    Args:
        array: (N, C, H, W) uint8, uint16 or float32, or (N, C, L) float32.
    """

    array: Array

    def read(self, rows: Array) -> Tensor:
        """Give the raw batch of the items at `rows`, a copy."""
        return torch.from_numpy(self.array[rows])

    def identity(self, row: int) -> bytes:
        """Give the item's values."""
        values: bytes = self.array[row].tobytes()
        return values

    def content(self, row: int) -> bytes:
        """Give the item's values."""
        return self.identity(row)


class Samples(torch.utils.data.Dataset[Batch]):
    """One split: items with their identity.

    Args:
        items: how the raw input is read; position = `sample`.
        sample: (N,) int64, index in the whole data set.
        target: (N,) int64, the class, -1 for no label.
        group: (N,) int64, equal = positives.
        columns: what else is known, by name, one (N,) array each.
        names: what each item is called, its file or its place in an array.
        classes: names of the classes, by target.
    """

    def __init__(
        self,
        items: Items,
        sample: Array,
        *,
        target: Array,
        group: Array,
        columns: dict[str, Array],
        names: Sequence[str],
        classes: tuple[str, ...],
    ) -> None:
        self.items = items
        self.sample = sample
        self.target = target
        self.group = group
        self.columns = columns
        self.names = names
        self.classes = classes

    def __len__(self) -> int:
        return len(self.sample)

    def __getitem__(self, index: int) -> Batch:
        """Give one item without the batch axis."""
        return Batch(*(field[0] for field in self.__getitems__([index])))

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Give a batch, already stacked: a DataLoader calls this and needs no collating."""
        rows = np.asarray(indices, dtype=np.int64)
        identity = (torch.from_numpy(field[rows]) for field in (self.sample, self.target, self.group))
        return Batch(self.x(rows), *identity)

    def x(self, indices: Array | None = None) -> Tensor:
        """Give the raw batch of the items at `indices` of this split, or of all of them."""
        return self.items.read(self.sample if indices is None else self.sample[indices])

    def subset(self, indices: Array) -> Samples:
        """Give the samples at `indices` (whole numbers, or one true or false an item)."""
        rows = np.arange(len(self))[np.asarray(indices)]
        return Samples(
            self.items,
            self.sample[rows],
            target=self.target[rows],
            group=self.group[rows],
            columns={name: column[rows] for name, column in self.columns.items()},
            names=[self.names[row] for row in rows],
            classes=self.classes,
        )

    def fingerprint(self) -> str:
        """Give a digest of inputs, targets and their order."""
        digest = hashlib.blake2b(digest_size=16)
        for row in self.sample:
            digest.update(self.items.identity(int(row)))
        digest.update(np.ascontiguousarray(self.target).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Data:
    """A whole data set, checked and split.

    kind: what an item is.
    source: what the person typed.
    shape: of one item, (C, H, W) or (C, L).
    classes: names of the classes, by target; empty without labels.
    train: all that is not test, labelled or not.
    validation: bool over `train`, True = a labelled item held out from fitting wherever something is chosen; all False
        where there are no labels, or nothing could be held out without splitting a group.
    test: may be empty.
    value_range: what becomes 0 and 1 (images).
    mean, std: (C,) float32 over at most 2,000 items of `train`; images after scaling to [0, 1], series in raw units
        over what was observed. A constant channel has std 1.
    fingerprint: a digest for each of train, validation and test that is not empty.
    notes: sentences for the person: what was picked, what was skipped.
    split_by: the column whose members stay on one side.
    """

    kind: Literal["image", "series"]
    source: str
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    train: Samples
    validation: NDArray[np.bool_]
    test: Samples
    value_range: tuple[float, float]
    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    fingerprint: dict[str, str]
    notes: tuple[str, ...]
    split_by: str | None


def leaks(data: Data) -> list[tuple[str, str]]:
    """Give the names of exact duplicates of which one lies in train and the other in test."""
    return [(train.name, test.name) for train, test in _copies(data) if train.split != test.split]


def duplicates(data: Data) -> list[tuple[str, str]]:
    """Give the names of exact duplicates, each with the first of its kind; those across the splits come first."""
    pairs = sorted(_copies(data), key=lambda pair: pair[0].split == pair[1].split)
    return [(first.name, other.name) for first, other in pairs]


class _Place(NamedTuple):
    split: str
    name: str


def _copies(data: Data) -> Iterator[tuple[_Place, _Place]]:
    seen: dict[bytes, _Place] = {}
    splits: Iterable[tuple[str, Samples]] = (("train", data.train), ("test", data.test))
    for split, samples in splits:
        for row, name in zip(samples.sample, samples.names, strict=True):
            key = hashlib.blake2b(samples.items.content(int(row)), digest_size=16).digest()
            place = _Place(split, name)
            first = seen.setdefault(key, place)
            if first is not place:
                yield first, place


def file_identity(path: Path, name: str) -> bytes:
    """Give a file's name and size in bytes: its fingerprint where reading it all would take too long."""
    return f"{name}\0{path.stat().st_size}\0".encode()
