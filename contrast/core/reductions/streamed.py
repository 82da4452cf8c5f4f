"""A call of `reduce` without a matrix: each reduction becomes the cheapest term, and all terms are one function.

========================================== ========================================================
a count without thresholds                 lists and group sizes (`layout`)
over few positives                         listed pairs (`listed`)
a threshold                                strips of whole rows (`strips`)
a mean over all, or over large groups      sums (`means`)
all else                                   tiles in one pass (`tiled`); on CUDA Triton kernels
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


def reduce(layout: Layout, asked: Sequence[Reduction], size: int, triton: bool = False) -> tuple[Tensor, ...]:
    """Compute each reduction of each anchor's row, (N,) or (H, N).

    Args:
        layout: anchors and candidates.
        asked: the reductions.
        size: rows and columns of a tile.
        triton: whether kernels take what they can; on CUDA they do anyhow.
    """
    found: dict[int, Tensor] = {}
    few: list[int] = []
    summed: list[int] = []
    kernels: list[int] = []
    tiled: list[int] = []
    for number, one in enumerate(asked):
        if (count := _count(layout, one)) is not None:
            found[number] = count
        elif isinstance(one, Kth):
            (found[number],) = strips.thresholds(layout, [one], size)
        elif listed.accepts(layout, one):
            few.append(number)
        elif means.accepts(layout, one):
            summed.append(number)
        else:
            (kernels if _on_kernels(layout, one, triton) else tiled).append(number)

    resolved: list[Any] = with_thresholds(asked, lambda wanted: strips.thresholds(layout, wanted, size))
    parts: list[tuple[Term, list[int]]] = [(SummedMean(layout, resolved[number]), [number]) for number in summed]
    if few:
        parts.append((ListedReductions(layout, [resolved[number] for number in few]), few))
    if kernels:
        parts.append((KernelReductions(layout, [resolved[number] for number in kernels]), kernels))
    if tiled:
        parts.append((TiledReductions(layout, [resolved[number] for number in tiled], size), tiled))
    if parts:
        outputs = terms.compute(layout, [term for term, _ in parts])
        for (_, numbers), of_term in zip(parts, outputs, strict=True):
            found |= dict(zip(numbers, of_term, strict=True))
    for number, one in enumerate(asked):
        if isinstance(one, Count) and found[number].ndim == 2 and layout.heads_count_alike(one.over, one.above):
            found[number] = found[number][0]
    return tuple(found[number] for number in range(len(asked)))


def _count(layout: Layout, asked: Reduction) -> Tensor | None:
    """Count without a similarity, where that is possible."""
    if not isinstance(asked, Count) or asked.above is not None:
        return None
    return layout.count(asked.over, asked.among, asked.rows)


def _on_kernels(layout: Layout, asked: Reduction, triton: bool) -> bool:
    """True if Triton kernels compute a reduction; what asks for a threshold stays with the tiles that find it."""
    wanted = triton or layout.anchors[0].z.device.type == "cuda"
    return wanted and not isinstance(getattr(asked, "above", None), Kth) and triton_backend.accepts(layout, asked)
