"""The data as all other packages see them: batches, samples of one split, the complete data set."""

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

    Args:
        x: (N, C, H, W) uint8, uint16 or float32 for images; (N, C, L) float32 for series, NaN = not observed.
        sample: (N,) int64, index in the complete data set, unique over its splits.
        target: (N,) int64, the class, or -1 for no label.
        group: (N,) int64, equal = positives.

    Example:
        >>> from contrast.data import open_data
        >>> batch = open_data("digits").train.__getitems__([0, 1, 2])
        >>> batch.x.shape, batch.sample.shape
        (torch.Size([3, 1, 8, 8]), torch.Size([3]))
    """

    x: Tensor
    sample: Tensor
    target: Tensor
    group: Tensor


class Items(Protocol):
    """The raw inputs of items by position, in memory or in files."""

    def read(self, rows: Array) -> Tensor:
        """Return the raw batch of the items at `rows`."""
        ...

    def identity(self, row: int) -> bytes:
        """Return bytes that change if the item changes: its values, or the name and size of its file."""
        ...

    def content(self, row: int) -> bytes:
        """Return bytes that are equal for duplicates."""
        ...


@dataclass(frozen=True, eq=False)
class ArrayItems:
    """Items in memory.

    Args:
        array: (N, C, H, W) uint8, uint16 or float32, or (N, C, L) float32.
    """

    array: Array

    def read(self, rows: Array) -> Tensor:
        """Return the raw batch of the items at `rows`, a copy."""
        return torch.from_numpy(self.array[rows])

    def identity(self, row: int) -> bytes:
        """Return the item's values."""
        values: bytes = self.array[row].tobytes()
        return values

    def content(self, row: int) -> bytes:
        """Return the item's values."""
        return self.identity(row)


class Samples(torch.utils.data.Dataset[Batch]):
    """One split: items with their identity.

    Args:
        items: the raw inputs; position = `sample`.
        sample: (N,) int64, index in the complete data set.
        target: (N,) int64, the class, -1 for no label.
        group: (N,) int64, equal = positives.
        columns: further values by column name, one (N,) array each.
        names: the name of each item, its file or its position in an array.
        classes: names of the classes, by target.

    Example:
        >>> from contrast.data import open_data
        >>> test = open_data("digits").test
        >>> zeros = test.subset(test.target == 0)
        >>> set(zeros.target.tolist()), zeros.x().shape[1:]
        ({0}, torch.Size([1, 8, 8]))
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
        """Return one item without the batch axis."""
        return Batch(*(field[0] for field in self.__getitems__([index])))

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return a stacked batch: a DataLoader calls this, so that no collation is necessary."""
        rows = np.asarray(indices, dtype=np.int64)
        identity = (torch.from_numpy(field[rows]) for field in (self.sample, self.target, self.group))
        return Batch(self.x(rows), *identity)

    def x(self, indices: Array | None = None) -> Tensor:
        """Return the raw batch of the items at `indices` of this split, or of all of them."""
        return self.items.read(self.sample if indices is None else self.sample[indices])

    def subset(self, indices: Array) -> Samples:
        """Return the samples at `indices` (integers, or one bool per item)."""
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
        """Return a digest of inputs, targets and their order."""
        digest = hashlib.blake2b(digest_size=16)
        for row in self.sample:
            digest.update(self.items.identity(int(row)))
        digest.update(np.ascontiguousarray(self.target).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Data:
    """A complete data set, checked and split.

    Args:
        kind: of the items.
        source: as the user wrote it.
        shape: of one item, (C, H, W) or (C, L).
        classes: names of the classes, by target; empty without labels.
        train: all items that are not test, labelled or not.
        validation: bool over `train`, True = a labelled item held out from fitting for model selection; all False
            without labels, or if nothing could be held out without splitting a group.
        test: may be empty.
        value_range: the raw values that become 0 and 1 (images).
        mean, std: (C,) float32 over at most 2,000 items of `train`; images after scaling to [0, 1], series in raw
            units over observed values. A constant channel has std 1.
        fingerprint: a digest for each of train, validation and test that is not empty.
        notes: sentences for the user: what was chosen, what was skipped.
        split_by: the column whose members are all in the same split.

    Example:
        >>> from contrast.data import open_data
        >>> data = open_data("digits")
        >>> data.kind, data.shape, len(data.classes), len(data.train) + len(data.test)
        ('image', (1, 8, 8), 10, 1797)
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
    """Return the names of exact duplicates of which one is in train and the other in test.

    Example:
        >>> import tempfile
        >>> from contrast.data import open_data
        >>> path = Path(tempfile.mkdtemp()) / "series.npz"
        >>> np.savez(path, x_train=np.arange(12.0).reshape(3, 4), x_test=np.arange(4.0).reshape(1, 4))
        >>> leaks(open_data(str(path)))
        [('x_train[0]', 'x_test[0]')]
    """
    return [(train.name, test.name) for train, test in _duplicate_pairs(data) if train.split != test.split]


def duplicates(data: Data) -> list[tuple[str, str]]:
    """Return the names of exact duplicates, each with its first occurrence; pairs across the splits come first.

    Example:
        >>> import tempfile
        >>> from contrast.data import open_data
        >>> path = Path(tempfile.mkdtemp()) / "series.npz"
        >>> np.savez(path, x=np.array([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]]))
        >>> duplicates(open_data(str(path)))
        [('x[0]', 'x[2]')]
    """
    pairs = sorted(_duplicate_pairs(data), key=lambda pair: pair[0].split == pair[1].split)
    return [(first.name, other.name) for first, other in pairs]


class _Occurrence(NamedTuple):
    split: str
    name: str


def _duplicate_pairs(data: Data) -> Iterator[tuple[_Occurrence, _Occurrence]]:
    seen: dict[bytes, _Occurrence] = {}
    splits: Iterable[tuple[str, Samples]] = (("train", data.train), ("test", data.test))
    for split, samples in splits:
        for row, name in zip(samples.sample, samples.names, strict=True):
            key = hashlib.blake2b(samples.items.content(int(row)), digest_size=16).digest()
            occurrence = _Occurrence(split, name)
            first = seen.setdefault(key, occurrence)
            if first is not occurrence:
                yield first, occurrence


def file_identity(path: Path, name: str) -> bytes:
    """Return a file's name and size as bytes: its fingerprint if reading all files would take too long."""
    return f"{name}\0{path.stat().st_size}\0".encode()
