"""Thresholds and the nearest candidates, which need complete rows: from strips of rows.

A strip contains the similarities of a few anchors and all candidates. It is computed tile by tile, like the reductions,
and overwritten by the next strip. A selection has no gradient; the similarities that `topk` returns are computed again
with gradient, as listed pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from contrast.core.reductions import terms
from contrast.core.reductions.kinds import Count, Kth, Relation, below
from contrast.core.reductions.layout import Block, Layout
from contrast.core.reductions.listed import Similarities
from contrast.core.reductions.terms import Gradients, Saved
from contrast.core.reductions.tiled import BlockTile, Buffers, Grid

STRIP = 2**21
"""Numbers in a strip."""
PER_SELECTION = 2**18
"""Numbers per selection, so that copies of them fit into the processor's cache."""
SAMPLED = 16
"""One number in so many is in the sample from which a bound is estimated."""


class Thresholds:
    """The k-th largest similarity of each row, slightly lowered (`Kth`): a term of `terms.compute`."""

    def __init__(self, layout: Layout, reduction: Kth, size: int) -> None:
        self.layout, self.reduction, self.size = layout, reduction, size
        self.arguments: list[Tensor] = []

    def forward(self, z: Sequence[Tensor], given: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:  # noqa: ARG002
        """Return the thresholds, (N,) or (H, N); 0 for a row without candidates."""
        thresholds = z[0].new_zeros(*self.layout.heads, self.layout.anchor_count)
        sources = {block.source for block in self.layout.candidate_blocks if block.start < block.stop}
        longest = torch.stack(
            [thresholds.new_zeros(()), *(torch.linalg.vector_norm(z[k], dim=-1).max() for k in sources)]
        ).max()
        for block, strip in _strips(self.layout, self.reduction, self.size, z):
            number = (strip > -torch.inf).sum(dim=-1)
            k = torch.as_tensor(self.reduction.k, device=strip.device)
            k = torch.minimum(k[..., block.all] if k.ndim else k, number).clamp(min=1)
            reach = torch.linalg.vector_norm(z[block.source][..., block.own, :], dim=-1) * longest
            thresholds[..., block.all] = below(kth_largest(strip, k), reach).masked_fill(number == 0, 0)
        return [thresholds], []

    def backward(self, saved: Saved, upstream: Sequence[Tensor], to_z: Gradients, to_arguments: Gradients) -> None:
        """Add nothing: a selection has no gradient."""


class Nearest:
    """The indices of the k nearest candidates of each row, -1 for none: a term of `terms.compute`."""

    def __init__(self, layout: Layout, k: int, reduction: Count, size: int) -> None:
        self.layout, self.k, self.reduction, self.size = layout, k, reduction, size
        self.arguments: list[Tensor] = []

    def forward(self, z: Sequence[Tensor], given: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:  # noqa: ARG002
        """Return the indices among all candidates, (N, k) or (H, N, k)."""
        nearest = torch.full((*self.layout.heads, self.layout.anchor_count, self.k), -1, device=z[0].device)
        for block, strip in _strips(self.layout, self.reduction, self.size, z):
            padded = F.pad(strip, (0, max(self.k - strip.shape[-1], 0)), value=-torch.inf)
            values, indices = padded.topk(self.k, dim=-1)
            nearest[..., block.all, :] = indices.masked_fill(values == -torch.inf, -1)
        return [nearest], []

    def backward(self, saved: Saved, upstream: Sequence[Tensor], to_z: Gradients, to_arguments: Gradients) -> None:
        """Add nothing: a selection has no gradient."""


@torch.no_grad()
def thresholds(layout: Layout, kths: Sequence[Kth], size: int) -> list[Tensor]:
    """Return the k-th largest similarity of each row, (N,) or (H, N), or the smallest if there are fewer than k."""
    outputs = terms.compute(layout, [Thresholds(layout, kth, size) for kth in kths])
    return [threshold for (threshold,) in outputs]


def topk(layout: Layout, k: int, over: Relation, among: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """Return the k largest similarities of each row, with gradient, and their candidates' indices, -1 for none."""
    # The `Count` defines the candidates.
    with torch.no_grad():
        ((indices,),) = terms.compute(layout, [Nearest(layout, k, Count(over, among), size)])
    ((similarities,),) = terms.compute(layout, [Similarities(layout, indices)])
    return similarities, indices


def _strips(layout: Layout, reduction: Kth | Count, size: int, z: Sequence[Tensor]) -> Iterator[tuple[Block, Tensor]]:
    """Compute the similarities of complete rows, block by block in one buffer, -inf where a pair does not count."""
    heads = math.prod(layout.heads)
    area = max(1, size**2 // heads)
    height = max(1, min(math.isqrt(area), max(16, STRIP // max(1, heads * layout.candidate_count))))
    grid = Grid(layout, [reduction], [None], height, max(1, area // height))
    tallest = max((block.stop - block.start for block in grid.row_blocks), default=0)
    buffer, buffers, steps = z[0].new_empty(heads * tallest * layout.candidate_count), Buffers(z[0]), iter(grid.steps)
    step = next(steps, None)
    for i, rows in enumerate(grid.row_blocks):
        shape = (*layout.heads, rows.stop - rows.start, layout.candidate_count)
        strip = buffer[: math.prod(shape)].view(shape).fill_(-torch.inf)
        while step is not None and step.i == i:
            columns = grid.column_blocks[step.j]
            s = buffers.product(z[rows.source][..., rows.own, :], z[columns.source][..., columns.own, :])
            strip[..., columns.all] = BlockTile(grid, step, z, s).minus_infinity(s, reduction)
            step = next(steps, None)
        yield rows, strip


def kth_largest(s: Tensor, k: Tensor) -> Tensor:
    """Return the k-th largest of each row of (..., M), which may be reordered; k: (...) from 1 to M."""
    if not s.shape[-1]:
        return s.sum(dim=-1)
    if s.device.type != "cpu":
        return s.sort(dim=-1, descending=True).values.gather(-1, (k - 1).unsqueeze(-1)).squeeze(-1)
    # numpy selects several times faster than torch.
    rows, ranks = s.view(-1, s.shape[-1]).numpy(), k.expand(s.shape[:-1]).reshape(-1).numpy()
    step = max(1, PER_SELECTION // rows.shape[1])
    selected = [_select(rows[at : at + step], ranks[at : at + step]) for at in range(0, len(rows), step)]
    return torch.from_numpy(np.concatenate(selected) if selected else rows[:, 0]).view(s.shape[:-1])


def _select(rows: Any, k: Any) -> Any:
    """Return the k-th largest of each row, from the numbers above a bound estimated from a sample of the row."""
    length, share = rows.shape[1], int(k.max()) / SAMPLED
    # Four standard deviations below the sample's own k-th: rows with fewer than k numbers above that are rare.
    rank = math.ceil(share + 4 * math.sqrt(share)) + 1
    if 2 * rank * SAMPLED <= length:
        bound = np.partition(rows[:, ::SAMPLED], -rank, axis=1)[:, -rank, None]
        high = np.flatnonzero(rows >= bound)
        counts = np.diff(np.searchsorted(high, np.arange(len(rows) + 1) * length))
        width = int(counts.max())
        if bool((counts >= k).all()) and 2 * width <= length:
            packed = np.full((len(rows), width), -np.inf, rows.dtype)
            packed[np.arange(width) < counts[:, None]] = rows.reshape(-1)[high]
            rows = packed
    index = rows.shape[1] - k
    rows.partition(np.unique(index), axis=1)
    return rows[np.arange(len(rows)), index]
