"""`reduce` without a matrix: each reduction is part of the cheapest possible term, and all terms are one function.

========================================== ========================================================
a count without thresholds                 lists and group sizes (`layout`)
over few positives                         listed pairs (`listed`)
a threshold                                strips of complete rows (`strips`)
a mean over all, or over large groups      sums (`means`)
others                                     tiles in one pass (`tiled`); on CUDA Triton kernels
========================================== ========================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from contrast.core.reductions import listed, means, strips, terms, triton_backend
from contrast.core.reductions.kinds import Count, Kth, Reduction, with_thresholds
from contrast.core.reductions.layout import Layout
from contrast.core.reductions.listed import ListedReductions
from contrast.core.reductions.means import SummedMean
from contrast.core.reductions.terms import Term
from contrast.core.reductions.tiled import TiledReductions
from contrast.core.reductions.triton_backend import KernelReductions


def reduce(layout: Layout, reductions: Sequence[Reduction], size: int, triton: bool = False) -> tuple[Tensor, ...]:
    """Compute each reduction of each anchor's row, (N,) or (H, N).

    Args:
        layout: anchors and candidates.
        reductions: the reductions.
        size: rows and columns of a tile.
        triton: True to use kernels on the CPU too, in Triton's interpreter; on CUDA they are always used.
    """
    results: dict[int, Tensor] = {}
    over_lists: list[int] = []
    summed: list[int] = []
    kernels: list[int] = []
    tiled: list[int] = []
    for number, reduction in enumerate(reductions):
        if (count := _count_from_identities(layout, reduction)) is not None:
            results[number] = count
        elif isinstance(reduction, Kth):
            (results[number],) = strips.thresholds(layout, [reduction], size)
        elif listed.accepts(layout, reduction):
            over_lists.append(number)
        elif means.accepts(layout, reduction):
            summed.append(number)
        else:
            (kernels if _on_kernels(layout, reduction, triton) else tiled).append(number)

    resolved: list[Any] = with_thresholds(reductions, lambda kths: strips.thresholds(layout, kths, size))
    parts: list[tuple[Term, list[int]]] = [(SummedMean(layout, resolved[number]), [number]) for number in summed]
    if over_lists:
        parts.append((ListedReductions(layout, [resolved[number] for number in over_lists]), over_lists))
    if kernels:
        parts.append((KernelReductions(layout, [resolved[number] for number in kernels]), kernels))
    if tiled:
        parts.append((TiledReductions(layout, [resolved[number] for number in tiled], size), tiled))
    if parts:
        outputs = terms.compute(layout, [term for term, _ in parts])
        for (_, numbers), of_term in zip(parts, outputs, strict=True):
            results |= dict(zip(numbers, of_term, strict=True))
    for number, reduction in enumerate(reductions):
        if not isinstance(reduction, Count) or results[number].ndim == 1:
            continue
        if layout.same_count_per_head(reduction.over, reduction.above):
            results[number] = results[number][0]
    return tuple(results[number] for number in range(len(reductions)))


def _count_from_identities(layout: Layout, reduction: Reduction) -> Tensor | None:
    """Count without similarities; None where that is not possible."""
    if not isinstance(reduction, Count) or reduction.above is not None:
        return None
    return layout.count(reduction.over, reduction.among, reduction.rows)


def _on_kernels(layout: Layout, reduction: Reduction, triton: bool) -> bool:
    """True if Triton kernels compute a reduction; those with a `Kth` stay with the tiles that compute it."""
    enabled = triton or layout.anchors[0].z.device.type == "cuda"
    has_kth = isinstance(getattr(reduction, "above", None), Kth)
    return enabled and not has_kth and triton_backend.accepts(layout, reduction)
