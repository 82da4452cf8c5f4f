"""The reductions of an anchor's row: one small class each, and what their arguments mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

Relation = Literal["positive", "negative", "remembered", "all"]
"""Which candidates count; "remembered" are the negatives that come from a memory, "all" = positive + negative."""

PairValue = float | Tensor | nn.Module
"""A number; a tensor that spans at most one of N and M: (N, 1), (1, M) or (H, 1, 1); or a PairFunction, a module
`(anchor, candidate) -> (n, m)` or `(H, n, m)` on two `Embeddings`, evaluated one tile at a time.

A PairFunction whose value depends on one vector of the anchor and one of the candidate is faster as a
`SidedFunction`, with the methods `anchor_side`, `candidate_side` and `of_sides`."""


@dataclass(frozen=True, eq=False)
class LogSumExp:
    """log sum_j exp(scale * s_ij + log_weight_ij).

    Example:
        >>> (per_anchor,) = pairs.reduce(LogSumExp(scale=10.0, over="all"))
        >>> per_anchor.shape
        torch.Size([8])
    """

    scale: PairValue
    over: Relation
    among: Tensor | None = None
    log_weight: PairValue | None = None
    above: Tensor | Kth | None = None
    rows: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Mean:
    """sum_j w_ij s_ij / sum_j w_ij; w = 1, or (<u_i, u_j> + 1) / 2 of the reference vectors for "reference".

    Example:
        >>> attract, repel = pairs.reduce(Mean("positive"), Mean("negative"))
    """

    over: Relation
    among: Tensor | None = None
    weight: PairValue | str | None = None
    above: Tensor | Kth | None = None
    rows: Tensor | None = None


@dataclass(frozen=True, eq=False)
class SoftMean:
    """sum_j p_ij s_ij with p = softmax_j(scale * s_ij), a constant to the gradient with `detach`.

    Example:
        >>> (hard_negatives,) = pairs.reduce(SoftMean(scale=10.0, over="negative", detach=True))
    """

    scale: PairValue
    over: Relation
    among: Tensor | None = None
    detach: bool = False
    above: Tensor | Kth | None = None
    rows: Tensor | None = None


@dataclass(frozen=True, eq=False)
class SoftplusSum:
    """sum_j log(1 + exp(scale * s_ij + bias_i)).

    Example:
        >>> (repel,) = pairs.reduce(SoftplusSum(scale=10.0, bias=-5.0, over="negative"))
    """

    scale: PairValue
    bias: float | Tensor
    over: Relation
    among: Tensor | None = None
    rows: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Kth:
    """The k-th largest s_ij (the smallest where there are fewer), without gradient; k: a number, (N,) or (H, N).

    As a threshold it lies a few units in the last place below the similarity it names, so that the candidate reaches it
    also where the product is computed in another order.

    Example:
        >>> pairs.reduce(Count("negative", above=Kth(3, "negative")))  # each anchor's three hardest negatives
        (tensor([3, 3, 3, 3, 3, 3, 3, 3]),)
    """

    k: int | Tensor
    over: Relation
    among: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Count:
    """The number of candidates, int64.

    Example:
        >>> pairs.reduce(Count("negative"))
        (tensor([6, 6, 6, 6, 6, 6, 6, 6]),)
    """

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


def below(similarity: Tensor, reach: Tensor) -> Tensor:
    """Lower a threshold by 8 units in the last place, so that the same product computed in another order reaches it.

    Args:
        similarity: (N,) or (H, N).
        reach: the length of each anchor times that of the longest candidate, whose rounding a product has.
    """
    return similarity - 8 * torch.finfo(similarity.dtype).eps * torch.maximum(similarity.abs(), reach / 8)


def arguments(asked: Reduction) -> dict[str, Any]:
    """Return the arguments of a reduction that may be learned, by name."""
    return {name: getattr(asked, name) for name in _LEARNABLE[type(asked)]}


def tensor_arguments(asked: Sequence[Reduction]) -> dict[tuple[int, str], Tensor]:
    """Return the tensors among the arguments and thresholds of some reductions, by (number, name)."""
    return {
        (number, name): value
        for number, one in enumerate(asked)
        for name, value in (*arguments(one).items(), ("above", getattr(one, "above", None)))
        if isinstance(value, Tensor)
    }


def with_tensors(asked: Sequence[Reduction], places: Iterable[tuple[int, str]], tensors: Sequence[Tensor]) -> list[Any]:
    """Return the same reductions with other tensors at the places that `tensor_arguments` returned."""
    replaced: list[Any] = list(asked)
    for (number, name), tensor in zip(places, tensors, strict=False):  # further tensors belong to PairFunctions
        replaced[number] = replace(replaced[number], **{name: tensor})
    return replaced


def pair_functions(asked: Sequence[Reduction]) -> list[nn.Module]:
    """Return the distinct PairFunctions among the arguments of some reductions."""
    values = (value for one in asked for value in arguments(one).values())
    return list(dict.fromkeys(value for value in values if isinstance(value, nn.Module)))


def is_number(value: Any) -> bool:
    """True if an argument is one number for all pairs, or one per head."""
    if isinstance(value, Tensor):
        return value.numel() == 1 or (value.ndim == 3 and value.shape[1:] == (1, 1))
    return isinstance(value, int | float)


def with_thresholds(asked: Sequence[Reduction], compute: Callable[[list[Kth]], Sequence[Tensor]]) -> list[Reduction]:
    """Replace every `above=Kth(...)` by its threshold; `compute` is called with the distinct ones."""
    wanted = {id(above): above for one in asked if isinstance(above := getattr(one, "above", None), Kth)}
    if not wanted:
        return list(asked)
    found = dict(zip(wanted, compute(list(wanted.values())), strict=True))
    settled: list[Any] = list(asked)
    for number, one in enumerate(settled):
        if isinstance(getattr(one, "above", None), Kth):
            settled[number] = replace(one, above=found[id(one.above)])
    return settled
