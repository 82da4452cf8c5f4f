r"""Means by associativity: sums over all candidates, or over groups, without tiles.

Where the weight of a pair is a product of features, w_ij = <f_i, f_j>, the weighted sum of an anchor's row is

.. math:: \sum_j w_{ij} \langle x_i, y_j \rangle = \langle x_i, S_i \rangle, \qquad
          S_i = \sum_j \langle f_i, f_j \rangle y_j = (\sum_j f_j y_j^T)^T f_i

and the inner sum is the same for all anchors. Features are: 1 for the plain mean over all candidates; the vector
(u_i, 1) / sqrt 2 for the weights (<u_i, u_j> + 1) / 2 of a frozen network; the indicator of i's group for the mean over
positives.

With m_i = sum_j w_ij the mean is <x_i, S_i> / m_i, and with c_i = dL/d(mean_i) / m_i its gradients are c_i S_i for x_i
and sum_i w_ij c_i x_i for y_j, which is the same kind of sum. The sums include the pairs of an anchor with itself,
which are listed and subtracted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from contrast.core.embeddings import PADDING
from contrast.core.reductions.kinds import Mean
from contrast.core.reductions.layout import Block, Layout
from contrast.core.reductions.listed import Similarities
from contrast.core.reductions.terms import Gradients, Saved
from contrast.core.reductions.tiled import ROWS, add_rows

Role = Literal[0, 1]
"""0: anchors, 1: candidates."""


def accepts(layout: Layout, reduction: Any) -> bool:
    """True for a mean over all candidates, plain or weighted by references, or over the positives of large groups."""
    if not isinstance(reduction, Mean) or reduction.above is not None or layout.itself is None or layout.rules:
        return False
    if any(block.view is None for block in (*layout.anchor_blocks, *layout.candidate_blocks)):
        return False
    if reduction.over == "all":
        return reduction.weight is None or isinstance(reduction.weight, str)
    return reduction.over == "positive" and reduction.weight is None and layout.positive is None


class SummedMean:
    """The mean of each anchor's row from sums over candidates: a term of `terms.compute`.

    Args:
        layout: anchors and candidates.
        reduction: the mean.
    """

    def __init__(self, layout: Layout, reduction: Mean) -> None:
        self.layout, self.reduction = layout, reduction
        self.anchor_runs = [
            run for run in layout.anchor_blocks if reduction.rows is None or bool(reduction.rows[run.all].any())
        ]
        self.arguments: list[Tensor] = []

    def forward(self, z: Sequence[Tensor], given: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:  # noqa: ARG002
        """Return the mean, (N,) or (H, N), and its mass m, inf for an empty row."""
        layout, ones = self.layout, [vectors.new_ones(vectors.shape[-2], 1) for vectors in z]
        total, mass = z[0].new_zeros(2, *layout.heads, layout.anchor_count)
        for run in self.anchor_runs:
            of_y, of_1 = (self._feature_sum(1, self._candidate_vectors(run, vectors)) for vectors in (z, ones))
            if of_y is None or of_1 is None:
                continue
            for block in run.cut(ROWS):
                x = z[block.source][..., block.own, :]
                total[..., block.all] = (x * self._per_row(0, block, of_y)).sum(dim=-1)
                mass[..., block.all] = self._per_row(0, block, of_1).squeeze(-1)
        self._list_itself(z)
        if self.itself is not None:
            total -= (self.itself_weight * self.itself.of(z)).sum(dim=-1)
            mass -= self.itself_weight.sum(dim=-1)
        count = layout.count(self.reduction.over, self.reduction.among, self.reduction.rows)
        assert count is not None
        # An empty row is only approximately 0 after the subtraction.
        empty = (count == 0) | (mass <= count * (16 * torch.finfo(mass.dtype).eps))
        mass = mass.masked_fill(empty, torch.inf)
        return [total / mass], [mass]

    def backward(self, saved: Saved, upstream: Sequence[Tensor], to_z: Gradients, to_arguments: Gradients) -> None:  # noqa: ARG002
        """Add the gradients of the anchors and of the candidates."""
        z, c = saved.z, (upstream[0] / saved.tensors[0]).unsqueeze(-1)
        for run in self.anchor_runs:
            collected = self._feature_sum(1, self._candidate_vectors(run, z)) if to_z[run.source] is not None else None
            if collected is not None:
                for block in run.cut(ROWS):
                    add_rows(to_z[block.source], block, c[..., block.all, :] * self._per_row(0, block, collected))
        for run in self.layout.candidate_blocks:
            collected = self._feature_sum(0, self._anchor_vectors(run, z, c)) if to_z[run.source] is not None else None
            if collected is not None:
                for block in run.cut(ROWS):
                    add_rows(to_z[block.source], block, self._among(block, self._per_row(1, block, collected)))
        if self.itself is not None:
            self.itself.add_gradients(z, -c * self.itself_weight, to_z)

    def _feature_sum(self, role: Role, parts: Iterator[tuple[Block, Tensor]]) -> Tensor | None:
        """Compute sum_j f_j y_j^T, (..., F, D), over blocks of one role with their vectors; None for no blocks."""
        collected: Tensor | None = None
        for block, vectors in parts:
            if self.reduction.over == "positive":
                groups, total = self.layout.groups[role][block.all], self.layout.groups[2]
                sums = vectors.new_zeros(*vectors.shape[:-2], total, vectors.shape[-1]).index_add_(-2, groups, vectors)
            else:
                sums = self._row_features(block, vectors).mT @ vectors
            collected = sums if collected is None else collected + sums
        return collected

    def _per_row(self, role: Role, block: Block, collected: Tensor) -> Tensor:
        """Compute <f_i, collected>, (..., n, D), for each row of a block of one role."""
        if self.reduction.over == "positive":
            return collected[..., self.layout.groups[role][block.all], :]
        return self._row_features(block, collected) @ collected

    def _row_features(self, block: Block, like: Tensor) -> Tensor:
        """Return the features of a block's rows, (n, F), in the type of `like`."""
        ones = like.new_ones(block.stop - block.start, 1)
        if self.reduction.weight is None:
            return ones
        reference = self.layout.sources[block.source].reference
        assert reference is not None
        return torch.cat([reference[block.own].to(like.dtype), ones], dim=1) / math.sqrt(2)

    def _candidate_vectors(self, anchors: Block, z: Sequence[Tensor]) -> Iterator[tuple[Block, Tensor]]:
        """Iterate over the candidates that a block of anchors may have, with their vectors."""
        for run in self.layout.candidate_blocks:
            if self.layout.may_count(anchors, run, self.reduction.over):
                for block in run.cut(ROWS):
                    yield block, self._among(block, z[block.source][..., block.own, :])

    def _anchor_vectors(self, candidates: Block, z: Sequence[Tensor], c: Tensor) -> Iterator[tuple[Block, Tensor]]:
        """Iterate over the anchors that may have a block of candidates, with c_i x_i."""
        for run in self.anchor_runs:
            if self.layout.may_count(run, candidates, self.reduction.over):
                for block in run.cut(ROWS):
                    yield block, c[..., block.all, :] * z[block.source][..., block.own, :]

    def _among(self, block: Block, vectors: Tensor) -> Tensor:
        """Return the vectors of candidates, 0 for those that are not `among`."""
        among = self.reduction.among
        return vectors if among is None else vectors * among[block.all].unsqueeze(-1)

    def _list_itself(self, z: Sequence[Tensor]) -> None:
        """List the pairs of an anchor with itself that the sums include, as (N, k) pairs with their weights."""
        layout, itself = self.layout, self.layout.itself
        assert itself is not None
        view, other_view = layout.anchor.view[itself.anchors], layout.candidate.view[itself.candidates]
        included = (view != PADDING) & (other_view != PADDING)
        if layout.across:
            included &= view != other_view
        if self.reduction.among is not None:
            included &= self.reduction.among[itself.candidates]
        if self.reduction.over == "positive":
            included &= layout.anchor.group[itself.anchors] == layout.candidate.group[itself.candidates]
        indices = layout.padded_indices(itself.where(included))
        self.itself = Similarities(layout, indices) if indices.shape[1] else None
        self.itself_weight = (indices >= 0).to(z[0].dtype)
        if self.reduction.weight is not None and self.itself is not None:
            references = [source.reference.to(z[0].dtype) for source in layout.sources if source.reference is not None]
            self.itself_weight = self.itself_weight * (self.itself.of(references) + 1) / 2
