"""The row reductions of `Pairs`, computed by one of three backends with the same results.

* `dense`: all similarities as one matrix, in plain autograd operations: the reference, for tests and for reading.
* `tiled`: the default. No matrix and O(N + M) memory, on any device; `streamed` chooses how a reduction is computed.
* `triton`: the same, with CUDA kernels for the reductions that these support; the default on CUDA.

One call, `pairs.reduce(LogSumExp(...), Mean("positive"))`, in the order of its files:

1. `layout` derives from the identities: blocks of one view, listed positives, group sizes.
2. `streamed` makes each reduction part of a *term*: `listed` pairs, `means` from sums, `strips`, tiles (`tiled`).
3. `terms` runs them as one autograd function, whose inputs are the vectors and the tensors among the arguments.
4. For each tile (`tile`) the `formulas` of the reductions compute sums in the forward pass and dL/ds in the backward
   pass, from which the term computes the gradients of vectors and arguments (also those of `pair_functions`).

A row without candidates reduces to 0 (a log-sum-exp: `finfo.min / 2`), without gradient. To add a reduction: its class
and arguments in `kinds`, its formula for all pairs in `dense`, its class in `formulas`, its method in `Pairs`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from contrast.core.autograd import full_precision
from contrast.core.reductions import dense, streamed, strips
from contrast.core.reductions.kinds import (
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
from contrast.core.reductions.layout import Layout, Rule
from contrast.core.reductions.pair_functions import SidedFunction
from contrast.core.reductions.tiled import TILE
from contrast.core.reductions.validation import check

__all__ = [
    "Count",
    "Kth",
    "LogSumExp",
    "Mean",
    "PairValue",
    "Reduction",
    "Relation",
    "Rule",
    "SidedFunction",
    "SoftMean",
    "SoftplusSum",
    "backend",
    "dense",
    "reduce",
    "topk",
]

Name = Literal["dense", "tiled", "triton"]


class _Backend(NamedTuple):
    name: Name
    tile: int


_backend: ContextVar[_Backend | None] = ContextVar("contrast_backend", default=None)
_DEFAULT = _Backend("tiled", TILE)


@contextmanager
def backend(name: Name, *, tile: int = TILE) -> Iterator[None]:
    """Compute all reductions inside the block with one backend, for tests and measurements.

    Args:
        name: "dense", "tiled" or "triton".
        tile: rows and columns of a tile; the Triton kernels have their own size.

    Raises:
        ValueError: for another name or a size below 1.

    Example:
        >>> with backend("dense"):
        ...     value = loss(z_a, z_b)
    """
    if name not in ("dense", "tiled", "triton"):
        raise ValueError(f"the backends are 'dense', 'tiled' and 'triton'; got {name!r}.")
    if tile < 1:
        raise ValueError(f"a tile has 1 row and column or more; got {tile}.")
    token = _backend.set(_Backend(name, tile))
    try:
        yield
    finally:
        _backend.reset(token)


def reduce(layout: Layout, reductions: Sequence[Reduction]) -> tuple[Tensor, ...]:
    """Compute each reduction of each anchor's row, (N,) or (H, N).

    Raises:
        ValueError: for arguments of a wrong type or shape.

    Example:
        >>> per_anchor, number = reduce(pairs.layout, [LogSumExp(10.0, "all"), Count("all")])
    """
    for reduction in reductions:
        check(reduction, layout)
    name, tile = _backend.get() or _DEFAULT
    with full_precision(layout.anchors[0].z):
        if name == "dense":
            return dense.reduce(layout, reductions)
        if torch.compiler.is_compiling():
            from contrast.core.reductions import compiled  # registers operators for compiled graphs

            return compiled.reduce(layout, reductions, tile, name == "triton")
        return streamed.reduce(layout, reductions, tile, name == "triton")


def topk(layout: Layout, k: int, over: Relation, among: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the k largest similarities of each row, with gradient, and the indices of their candidates.

    Where a row has fewer than k, its last values are 0 and their indices -1.

    Example:
        >>> values, indices = topk(pairs.layout, 3, "negative", None)
        >>> indices.shape
        torch.Size([8, 3])
    """
    check(Kth(k, over, among), layout)
    name, tile = _backend.get() or _DEFAULT
    with full_precision(layout.anchors[0].z):
        if name == "dense":
            return dense.topk(layout, k, over, among)
        return strips.topk(layout, k, over, among, tile)
