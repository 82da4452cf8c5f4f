"""The six reductions of an anchor's row: one small class each, what their arguments mean, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from contrast.core.reductions.layout import Layout

Relation = Literal["positive", "negative", "remembered", "all"]
"""Which candidates count; "remembered" are the negatives that come from a memory, "all" = positive + negative."""

PairValue = float | Tensor | nn.Module
"""A number; a tensor that spans at most one of N and M: (N, 1), (1, M) or (H, 1, 1); or a PairFunction, a module
`(anchor, candidate) -> (n, m)` or `(H, n, m)` on two `Embeddings`, evaluated one tile at a time.

A PairFunction whose value depends on one vector of the anchor and one of the candidate is faster as a
`SidedFunction`, with the methods `anchor_side`, `candidate_side` and `of_sides`."""


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
    weight: PairValue | str | None = None
    above: Tensor | Kth | None = None
    rows: Tensor | None = None


@dataclass(frozen=True, eq=False)
class SoftMean:
    """sum_j p_ij s_ij with p = softmax_j(scale * s_ij), a constant to the gradient with `detach`."""

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
    """The k-th largest s_ij (the smallest where there are fewer), without gradient; k: a number, (N,) or (H, N).

    As a threshold it lies a few units in the last place below the similarity it names, so that the candidate reaches it
    also where the product is computed in another order.
    """

    k: int | Tensor
    over: Relation
    among: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Count:
    """The number of candidates, int64."""

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
    for (number, name), tensor in zip(places, tensors, strict=False):
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


def check(asked: Reduction, layout: Layout) -> None:
    """Refuse an unknown relation, masks of a wrong shape, missing references, an argument that spans both N and M.

    Raises:
        ValueError: with the sentence.
    """
    if asked.over not in ("positive", "negative", "remembered", "all"):
        raise ValueError(f"over is 'positive', 'negative', 'remembered' or 'all'; got {asked.over!r}.")
    for name, size in (("among", layout.columns), ("rows", layout.rows)):
        mask = getattr(asked, name, None)
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (size,)):
            raise ValueError(f"{name} is ({size},) bool; got {mask.dtype} of shape {tuple(mask.shape)}.")
    if isinstance(asked, Kth):
        _check_k(asked.k, layout)
    above = getattr(asked, "above", None)
    if isinstance(above, Kth):
        check(above, layout)
    elif above is not None and not isinstance(above, Tensor):
        raise ValueError(f"above is a tensor of thresholds, (N,) or (H, N), or a Kth; got {above!r}.")
    for name, value in arguments(asked).items():
        if isinstance(value, Tensor):
            if name != "bias" and value.ndim >= 2 and value.shape[-2] > 1 and value.shape[-1] > 1:
                raise ValueError(
                    "a scale, weight or log_weight spans at most one of N and M: (N, 1), (1, M) or (H, 1, 1); got the "
                    f"shape {tuple(value.shape)}. For a value of each pair give a PairFunction, a module "
                    "(anchor, candidate) -> tile."
                )
        elif isinstance(value, str):
            if value != "reference":
                raise ValueError(f"weight is 'reference', a number, a tensor or a PairFunction; got {value!r}.")
            layout.check_references()


def _check_k(k: int | Tensor, layout: Layout) -> None:
    """Refuse a k that is not a number of candidates, for all anchors or for each."""
    if isinstance(k, Tensor):
        shape = (*layout.heads, layout.rows)
        if k.dtype != torch.int64 or k.shape not in ((), shape, shape[-1:]):
            raise ValueError(f"k is a number, or {tuple(shape)} int64; got {k.dtype} of shape {tuple(k.shape)}.")
    elif not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k is a whole number, 1 or more; got {k!r}.")
