"""Held-out items: stratified by class, or complete groups if a column must not be split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from contrast.core.registry import InputError
from contrast.data.dataset import Array

Mask = NDArray[np.bool_]


def hold_out(target: Array, group: Array | None, share: float, generator: np.random.Generator) -> Mask:
    """Return a (N,) mask of about `share` of the labelled items, stratified by class.

    At least one item per class is not held out. With `group`, complete groups are held out, including their unlabelled
    members, but none that would remove a class from the rest.

    Args:
        target: (N,) int64, -1 = no label, held out only as a member of a group.
        group: (N,) int64, -1 = in no group; None: single items are held out.
        share: in [0, 1).
        generator: of the random draw.
    """
    if group is None:
        return _hold_out_items(target, share, generator)
    return _hold_out_groups(target, group, share, generator)


def check_no_leak(
    group: Array, members: Sequence[str], second: Array, *, column: str, splits: str, source: str
) -> None:
    """Check that no group has items in both of two official splits, else raise an InputError.

    Args:
        group: (N,) int64, -1 = in no group.
        members: the name of each group.
        second: (N,) bool, True = in the second of the two splits.
        column: the column of the groups.
        splits: names of the two splits, for the message.
        source: as the user wrote it.
    """
    both = np.intersect1d(group[second & (group >= 0)], group[~second & (group >= 0)])
    if len(both):
        raise InputError(
            f"{source}: split_by={column} must have each of its members in one split, but the official split has "
            f"{len(both)} in both ({splits}), the first '{members[both[0]]}'. Correct the split, or remove split_by."
        )


def _hold_out_items(target: Array, share: float, generator: np.random.Generator) -> Mask:
    held_out = np.zeros(len(target), dtype=bool)
    classes, sizes = np.unique(target[target >= 0], return_counts=True)
    exact = share * sizes
    counts = np.minimum(np.floor(exact).astype(np.int64), sizes - 1)
    # Largest remainders: the classes that lost most by rounding down get one more item, ties in random order.
    order = generator.permutation(len(classes))
    order = order[np.argsort(-(exact - counts)[order], kind="stable")]
    for index in order:
        if counts.sum() >= round(float(exact.sum())):
            break
        if counts[index] < sizes[index] - 1 and exact[index] > counts[index]:
            counts[index] += 1
    for label, count in zip(classes, counts, strict=True):
        members = np.flatnonzero(target == label)
        held_out[generator.permutation(members)[:count]] = True
    return held_out


def _hold_out_groups(target: Array, group: Array, share: float, generator: np.random.Generator) -> Mask:
    # An item without a group is a group of its own.
    own = np.where(group < 0, group.max(initial=-1) + 1 + np.arange(len(group)), group)
    _, own = np.unique(own, return_inverse=True)
    labelled = target >= 0
    classes, label = np.unique(target[labelled], return_inverse=True)
    sizes = np.zeros((own.max(initial=-1) + 1, len(classes)), dtype=np.int64)
    np.add.at(sizes, (own[labelled], label), 1)
    total = sizes.sum(axis=0)
    exact, drawn = share * total, np.zeros(len(classes), dtype=np.int64)

    def error(counts: Array) -> float:
        return float((((counts - exact) ** 2) / np.maximum(total, 1)).sum())

    # Greedy: a group is held out if that reduces the error of the counts per class, and no class loses all its items.
    chosen: list[int] = []
    candidates = generator.permutation(np.flatnonzero(sizes.sum(axis=1) > 0))
    for index in candidates:
        after = drawn + sizes[index]
        if np.all(after < total) and error(after) < error(drawn):
            drawn = after
            chosen.append(int(index))
    if not chosen and share > 0:
        allowed = [int(index) for index in candidates if np.all((sizes[index] < total) | (sizes[index] == 0))]
        chosen = sorted(allowed, key=lambda index: error(sizes[index]))[:1]
    return np.isin(own, chosen)
