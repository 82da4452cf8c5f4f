"""What is asked of an anchor's row: one small class each, and what their arguments mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

Relation = Literal["positive", "negative", "remembered", "all"]
"""Which candidates count; "remembered" are the negatives that come from a memory, "all" = positive + negative."""

PairValue = float | Tensor | nn.Module
"""A number; a tensor that spans at most one of N and M: (N, 1), (1, M) or (H, 1, 1); or a PairFunction, a module
`(anchor, candidate) -> (n, m)` or `(H, n, m)` on two `Embeddings`, evaluated a tile at a time."""


@dataclass(frozen=True, eq=False)
class LogSumExp:
    """log sum_j exp(scale * s_ij + log_weight_ij)."""

    scale: PairValue
    over: Relation
    among: Tensor | None = None
    log_weight: PairValue | None = None
    above: Tensor | Kth | None = None
    rows: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Mean:
    """sum_j w_ij s_ij / sum_j w_ij; w = 1, or (<u_i, u_j> + 1) / 2 of the reference vectors for "reference"."""

    over: Relation
    among: Tensor | None = None
    weight: PairValue | Literal["reference"] | None = None
    above: Tensor | Kth | None = None
    rows: Tensor | None = None


@dataclass(frozen=True, eq=False)
class SoftMean:
    """sum_j p_ij s_ij with p = softmax_j(scale * s_ij), which takes no gradient where `detach` says so."""

    scale: PairValue
    over: Relation
    among: Tensor | None = None
    detach: bool = False
    above: Tensor | Kth | None = None
    rows: Tensor | None = None


@dataclass(frozen=True, eq=False)
class SoftplusSum:
    """sum_j log(1 + exp(scale * s_ij + bias_i))."""

    scale: PairValue
    bias: float | Tensor
    over: Relation
    among: Tensor | None = None
    rows: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Kth:
    """The k-th largest s_ij (the smallest where there are fewer), without gradient; k: a number, (N,) or (H, N)."""

    k: int | Tensor
    over: Relation
    among: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Count:
    """How many candidates count, int64."""

    over: Relation
    among: Tensor | None = None
    above: Tensor | Kth | None = None
    rows: Tensor | None = None


Reduction = LogSumExp | Mean | SoftMean | SoftplusSum | Kth | Count


_LEARNABLE: dict[type, tuple[str, ...]] = {
    LogSumExp: ("scale", "log_weight"),
    Mean: ("weight",),
    SoftMean: ("scale",),
    SoftplusSum: ("scale", "bias"),
    Kth: (),
    Count: (),
}


def arguments(asked: Reduction) -> dict[str, Any]:
    """Give the arguments of a reduction that may be learned, by name."""
    return {name: getattr(asked, name) for name in _LEARNABLE[type(asked)]}


def thresholds(asked: Sequence[Reduction]) -> list[Kth]:
    """Give the thresholds that reductions ask for themselves, each once."""
    found = {id(above): above for one in asked if isinstance(above := getattr(one, "above", None), Kth)}
    return list(found.values())


def settled(asked: Sequence[Reduction], find: Callable[[list[Kth]], Sequence[Tensor]]) -> list[Reduction]:
    """Give the same reductions with numbers for the thresholds that they ask for.

    Args:
        asked: the reductions.
        find: gives the thresholds.
    """
    wanted = thresholds(asked)
    known = dict(zip(map(id, wanted), find(wanted) if wanted else (), strict=True))
    made: list[Reduction] = []
    for one in asked:
        above = known.get(id(getattr(one, "above", None)))
        made.append(one if above is None else replace(one, above=above))  # type: ignore[arg-type]
    return made
