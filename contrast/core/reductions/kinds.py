"""The reductions of an anchor's row: one small class each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

Relation = Literal["positive", "negative", "remembered", "all"]
"""Which candidates count; "remembered" are the negatives from a memory, "all" = positive + negative."""

PairValue = float | Tensor | nn.Module
"""A number; a tensor that spans at most one of N and M: (N, 1), (1, M) or (H, 1, 1); or a PairFunction, a module
`(anchor, candidate) -> (n, m)` or `(H, n, m)` on two `Embeddings`, evaluated one tile at a time.

A PairFunction whose values depend on one vector per anchor and one per candidate is faster as a `SidedFunction`."""


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
    """sum_j p_ij s_ij with p = softmax_j(scale * s_ij), with `detach` a constant in the gradient.

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

    It is lowered by a few units in the last place, so that as a threshold it includes the k-th candidate also where the
    product is computed in another order.

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
        reach: the length of each anchor times that of the longest candidate, which bounds the rounding of a product.
    """
    return similarity - 8 * torch.finfo(similarity.dtype).eps * torch.maximum(similarity.abs(), reach / 8)


def arguments(reduction: Reduction) -> dict[str, Any]:
    """Return the arguments of a reduction that can be learned, by name."""
    return {name: getattr(reduction, name) for name in _LEARNABLE[type(reduction)]}


def tensor_arguments(reductions: Sequence[Reduction]) -> dict[tuple[int, str], Tensor]:
    """Return the tensors among the arguments and thresholds of reductions, by (number of the reduction, name)."""
    return {
        (number, name): value
        for number, reduction in enumerate(reductions)
        for name, value in (*arguments(reduction).items(), ("above", getattr(reduction, "above", None)))
        if isinstance(value, Tensor)
    }


def with_tensors(
    reductions: Sequence[Reduction], keys: Iterable[tuple[int, str]], tensors: Sequence[Tensor]
) -> list[Any]:
    """Return the same reductions with other tensors under the keys of `tensor_arguments`."""
    replaced: list[Any] = list(reductions)
    for (number, name), tensor in zip(keys, tensors, strict=False):  # further tensors belong to PairFunctions
        replaced[number] = replace(replaced[number], **{name: tensor})
    return replaced


def pair_functions(reductions: Sequence[Reduction]) -> list[nn.Module]:
    """Return the distinct PairFunctions among the arguments of reductions."""
    values = (value for reduction in reductions for value in arguments(reduction).values())
    return list(dict.fromkeys(value for value in values if isinstance(value, nn.Module)))


def is_number(value: Any) -> bool:
    """True if an argument is one number for all pairs or one per head."""
    if isinstance(value, Tensor):
        return value.numel() == 1 or (value.ndim == 3 and value.shape[1:] == (1, 1))
    return isinstance(value, int | float)


def with_thresholds(
    reductions: Sequence[Reduction], compute: Callable[[list[Kth]], Sequence[Tensor]]
) -> list[Reduction]:
    """Replace every `above=Kth(...)` by its threshold; `compute` is called once, with the distinct `Kth`."""
    kths = {id(above): above for one in reductions if isinstance(above := getattr(one, "above", None), Kth)}
    if not kths:
        return list(reductions)
    thresholds = dict(zip(kths, compute(list(kths.values())), strict=True))
    resolved: list[Any] = list(reductions)
    for number, reduction in enumerate(resolved):
        if isinstance(getattr(reduction, "above", None), Kth):
            resolved[number] = replace(reduction, above=thresholds[id(reduction.above)])
    return resolved
