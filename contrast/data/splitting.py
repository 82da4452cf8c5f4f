"""Who is held out: stratified by class, whole groups where a column must not be split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from contrast.core.registry import InputError
from contrast.data.dataset import Array

Mask = NDArray[np.bool_]


def hold_out(target: Array, group: Array | None, share: float, generator: np.random.Generator) -> Mask:
    """Give a (N,) mask of about `share` of the labelled items, each class as evenly as possible.

    Every class keeps at least one item that is not held out. With `group`, whole groups are held out, and with them
    their unlabelled members; nothing is, where that would empty a class.

    Args:
        target: (N,) int64, -1 = no label, never drawn for itself.
        group: (N,) int64, -1 = alone.
        share: in [0, 1).
        generator: what draws.
    """
    if group is None:
        return _hold_out_items(target, share, generator)
    return _hold_out_groups(target, group, share, generator)


def refuse_leak(group: Array, members: Sequence[str], side: Array, *, column: str, sides: str, source: str) -> None:
    """Raise an InputError where members of a group lie on both sides of an official split.

    Args:
        group: (N,) int64, -1 = alone.
        members: what each group is called.
        side: (N,) bool.
        column: where the groups come from.
        sides: what the two sides are called, for the message.
        source: what the person typed.
    """
    both = np.intersect1d(group[side & (group >= 0)], group[~side & (group >= 0)])
    if len(both):
        raise InputError(
            f"{source}: split_by={column} must keep each of its members on one side, but its own split has "
            f"{len(both)} on both ({sides}), the first '{members[both[0]]}'. Correct the split, or leave split_by out."
        )


def _hold_out_items(target: Array, share: float, generator: np.random.Generator) -> Mask:
    held_out = np.zeros(len(target), dtype=bool)
    classes, sizes = np.unique(target[target >= 0], return_counts=True)
    wanted = share * sizes
    counts = np.minimum(np.floor(wanted).astype(np.int64), sizes - 1)
    # The largest remainders fill what rounding down left over; classes of equal remainder are drawn in random order.
    order = generator.permutation(len(classes))
    order = order[np.argsort(-(wanted - counts)[order], kind="stable")]
    for index in order:
        if counts.sum() >= round(float(wanted.sum())):
            break
        if counts[index] < sizes[index] - 1 and wanted[index] > counts[index]:
            counts[index] += 1
    for label, count in zip(classes, counts, strict=True):
        members = np.flatnonzero(target == label)
        held_out[generator.permutation(members)[:count]] = True
    return held_out


def _hold_out_groups(target: Array, group: Array, share: float, generator: np.random.Generator) -> Mask:
    alone = group < 0
    own = np.where(alone, group.max(initial=-1) + 1 + np.arange(len(group)), group)
    _, own = np.unique(own, return_inverse=True)
    labelled = target >= 0
    classes, label = np.unique(target[labelled], return_inverse=True)
    sizes = np.zeros((own.max(initial=-1) + 1, len(classes)), dtype=np.int64)
    np.add.at(sizes, (own[labelled], label), 1)
    total = sizes.sum(axis=0)
    wanted, drawn = share * total, np.zeros(len(classes), dtype=np.int64)

    def miss(counts: Array) -> float:
        return float((((counts - wanted) ** 2) / np.maximum(total, 1)).sum())

    # Greedy: a group is held out where that brings the classes' counts nearer to what is wanted. One that would leave
    # a class without an item to fit on never is.
    chosen: list[int] = []
    candidates = generator.permutation(np.flatnonzero(sizes.sum(axis=1) > 0))
    for index in candidates:
        after = drawn + sizes[index]
        if np.all(after < total) and miss(after) < miss(drawn):
            drawn = after
            chosen.append(int(index))
    if not chosen and share > 0:
        allowed = [int(index) for index in candidates if np.all((sizes[index] < total) | (sizes[index] == 0))]
        chosen = sorted(allowed, key=lambda index: miss(sizes[index]))[:1]
    return np.isin(own, chosen)
