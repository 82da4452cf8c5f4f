"""The row reductions of `Pairs`, behind which stand three roads with the same numbers; here one is chosen.

dense: the similarities as one matrix, the reference; tiles: any device, memory O(N + M), but that a small call on the
CPU holds one matrix, of the pairs it is about; kernels: Triton on CUDA. Whatever the road, a row without candidates
gives 0 (a log-sum-exp: `finfo.min / 2`) and no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from contrast.core.reductions import aligned, dense, nearest, square, sweep
from contrast.core.reductions.asked import (
    Count,
    Kth,
    LogSumExp,
    Mean,
    PairValue,
    Reduction,
    Relation,
    SoftMean,
    SoftplusSum,
)
from contrast.core.reductions.closed import Closed

if TYPE_CHECKING:
    from contrast.core.pairs import Pairs

__all__ = [
    "Count",
    "Kth",
    "LogSumExp",
    "Mean",
    "PairValue",
    "Reduction",
    "Relation",
    "SoftMean",
    "SoftplusSum",
    "at",
    "beside",
    "nearest_beside",
    "reduce",
    "road",
    "topk",
]

SMALL = 2**14
"""Up to this many similarities one tile holds them all: starting operations costs more there than the operations."""


@dataclass(frozen=True)
class _Road:
    name: Literal["dense", "tiles", "kernels"]
    size: int
    small: int = 0


_taken: ContextVar[_Road | None] = ContextVar("contrast_road", default=None)


@contextmanager
def road(name: Literal["dense", "tiles", "kernels"], *, size: int = sweep.TILE, small: int = 0) -> Iterator[None]:
    """Take this road for all reductions inside the block, for tests and measurements.

    Args:
        name: "dense", "tiles" or "kernels".
        size: rows and columns of a tile.
        small: up to this many similarities one tile holds them all.

    Raises:
        ValueError: for another name or a size below 1.
    """
    if name not in ("dense", "tiles", "kernels"):
        raise ValueError(f"the roads are 'dense', 'tiles' and 'kernels'; got {name!r}.")
    if size < 1:
        raise ValueError(f"a tile has 1 row and column or more; got {size}.")
    token = _taken.set(_Road(name, size, small))
    try:
        yield
    finally:
        _taken.reset(token)


def chosen() -> _Road:
    """Choose the road: the one that `road` names, else the one without a matrix."""
    taken = _taken.get()
    if taken is not None:
        return taken
    return _Road("tiles", sweep.TILE, SMALL)


def reduce(pairs: Pairs, asked: Sequence[Reduction]) -> tuple[Tensor, ...]:
    """Give each reduction of each anchor's row, (N,) or (H, N), from one walk over the similarities."""
    taken = chosen()
    return (
        dense.reduce(pairs, asked)
        if taken.name == "dense"
        else sweep.reduce(pairs, asked, taken.size, taken.small, taken.name == "kernels")
    )


def topk(pairs: Pairs, k: int, over: Relation, among: Tensor | None) -> tuple[Tensor, Tensor]:
    """Give the k largest similarities of each row, with gradient, and the positions of their candidates.

    Where a row has fewer than k, its last values are 0 and their positions -1.
    """
    taken = chosen()
    if taken.name == "dense":
        return dense.topk(pairs, k, over, among)
    return nearest.topk(pairs, k, over, among, taken.size)


def at(pairs: Pairs, function: Closed, positions: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """Give a function of each anchor and the candidates at its positions, (N,) or (H, N) each, 0 where one is -1.

    None where that is done as well by rows of candidates put together: elsewhere than on the CPU, or where candidates
    are not the anchors.
    """
    return aligned.aligned(pairs, function, positions) if chosen().name != "dense" and aligned.accepts(pairs) else None


def beside(pairs: Pairs, function: Closed, over: Relation) -> tuple[Tensor, Tensor] | None:
    """Give the log-sum-exp of a function of each pair, and its value for each anchor's only positive, with gradient.

    None where anchors have none or several, and elsewhere than on the CPU or where candidates are not the anchors.
    """
    taken = chosen()
    suits = taken.name == "tiles" and aligned.accepts(pairs)
    if not suits:
        return None
    return square.every(pairs, function, over) or aligned.beside(pairs, function, over, taken.size)


def nearest_beside(pairs: Pairs, function: Closed, over: Relation) -> tuple[Tensor, Tensor] | None:
    """Give a function of each anchor and its nearest candidate, and of each anchor and its only positive.

    None as for `beside`, and where the similarities are too many to stand in one matrix.
    """
    suits = chosen().name == "tiles" and aligned.accepts(pairs)
    return square.nearest(pairs, function, over) if suits else None
