"""Listed pairs: the few positives of each anchor, and the candidates that `topk` found, as tiles of (N, k).

A reduction over few positives is the same formula on (N, k) similarities as on (N, M). The k vectors of each anchor are
copied, ROWS anchors at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from contrast.core.reductions.formulas import formula
from contrast.core.reductions.kinds import (
    Count,
    Kth,
    Reduction,
    arguments,
)
from contrast.core.reductions.layout import Block, Layout
from contrast.core.reductions.pair_functions import Evaluated, SidedFunction
from contrast.core.reductions.terms import Gradients, Saved
from contrast.core.reductions.tile import GradientTargets, ReductionTerm, Tile

ROWS = 1024
"""Anchors whose candidates are copied at a time."""


def accepts(layout: Layout, reduction: Reduction) -> bool:
    """True if a reduction is over listed positives, with arguments that can be evaluated per pair."""
    if isinstance(reduction, Kth) or reduction.over != "positive" or layout.positive is None:
        return False
    values = [value for value in arguments(reduction).values() if isinstance(value, str | nn.Module)]
    return all(isinstance(value, SidedFunction) for value in values)


class Similarities:
    """<x_i, y_j> for each anchor i and k candidates j: a term of `terms.compute`.

    Args:
        layout: anchors and candidates.
        indices: (N, k) or (H, N, k), among all candidates; -1 for none, whose similarity is 0.
    """

    def __init__(self, layout: Layout, indices: Tensor) -> None:
        self.layout, self.indices = layout, indices
        self.arguments: list[Tensor] = []

    def forward(self, z: Sequence[Tensor], given: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:  # noqa: ARG002
        """Return the similarities, (N, k) or (H, N, k)."""
        return [self.of(z)], []

    def backward(self, saved: Saved, upstream: Sequence[Tensor], to_z: Gradients, to_arguments: Gradients) -> None:  # noqa: ARG002
        """Add the gradients of the anchors and of the candidates."""
        self.add_gradients(saved.z, upstream[0], to_z)

    def of(self, z: Sequence[Tensor]) -> Tensor:
        """Compute the similarities from the vectors of the sources."""
        s = z[0].new_zeros(*self.layout.heads, *self.indices.shape[-2:])
        for piece in self._pieces(z):
            s[..., piece.anchors.all, :] += (piece.x.unsqueeze(-2) * piece.y).sum(dim=-1) * piece.present
        return s

    def add_gradients(self, z: Sequence[Tensor], to_s: Tensor, to_z: Gradients) -> None:
        """Add dL/ds to the gradients of the vectors."""
        for piece in self._pieces(z):
            share = (to_s[..., piece.anchors.all, :] * piece.present).unsqueeze(-1)
            to_x, to_y = to_z[piece.anchors.source], to_z[piece.candidates.source]
            if to_x is not None:
                part = to_x[..., piece.anchors.own, :]
                part += (share * piece.y).sum(dim=-2).sum_to_size(part.shape)
            if to_y is not None:
                scatter_add(to_y, piece.index, share * piece.x.unsqueeze(-2))

    def _pieces(self, z: Sequence[Tensor]) -> Iterator[_Piece]:
        for run in self.layout.anchor_blocks:
            for anchors in run.cut(ROWS):
                indices, x = self.indices[..., anchors.all, :], z[anchors.source][..., anchors.own, :]
                for part in self.layout.candidate_blocks:
                    present = (indices >= part.start) & (indices < part.stop)
                    if part.start < part.stop and (not self.layout.on_host or bool(present.any())):
                        index = (indices - part.first).clamp(part.own.start, part.own.stop - 1)
                        yield _Piece(anchors, x, part, gather(z[part.source], index), index, present)


@dataclass(frozen=True)
class _Piece:
    """A block of anchors with their candidates in one block of candidates.

    Args:
        anchors: the n anchors.
        x: (n, D) or (H, n, D), their vectors.
        candidates: the block of candidates.
        y: (n, k, D) or (H, n, k, D), the candidates' vectors.
        index: (n, k) or (H, n, k), the candidates' indices in their source.
        present: like `index`, True for candidates in this block.
    """

    anchors: Block
    x: Tensor
    candidates: Block
    y: Tensor
    index: Tensor
    present: Tensor


class ListedReductions(ReductionTerm):
    """Reductions over few positives: a term of `terms.compute`.

    Args:
        layout: anchors and candidates; positives can be listed.
        reductions: those that `accepts` accepted.
    """

    def __init__(self, layout: Layout, reductions: Sequence[Reduction]) -> None:
        super().__init__(layout, reductions)
        self.similarities = Similarities(layout, layout.positive_indices)

    def forward(self, z: Sequence[Tensor], arguments: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the reductions, (N,) or (H, N) each; save the similarities, and a normaliser of each."""
        reductions, tensors = self.with_arguments(arguments)
        s = self.similarities.of(z)
        tile, results = PositivesTile(self, s, tensors), []
        for reduction in reductions:
            sums = formula(reduction, None, s.new_zeros(s.shape[:-1]))
            sums.add(tile, torch.empty_like(s), tile.rows)
            results.append(sums.finish())
        outputs, normalisers = zip(*results, strict=True)
        return list(outputs), [s, *normalisers]

    def backward(self, saved: Saved, upstream: Sequence[Tensor], to_z: Gradients, to_arguments: Gradients) -> None:
        """Add the gradients of the vectors and of the arguments."""
        reductions, tensors = self.with_arguments(saved.arguments)
        s, *normalisers = saved.tensors
        targets, to_s = self.targets(reductions, to_z, to_arguments), torch.zeros_like(s)
        tile = PositivesTile(self, s, tensors, targets)
        for reduction, output, normaliser, g in zip(reductions, saved.outputs, normalisers, upstream, strict=True):
            if not isinstance(reduction, Count):
                sums = formula(reduction, None, s.new_zeros(()))
                sums.prepare(output, normaliser, g)
                to_s += sums.gradient(tile, torch.empty_like(s), partial(tile.per_pair, reduction, tile.rows, None))
        for function, to_values in tile.to_values.items():
            self.functions.backward(tile.evaluated[function], to_values, to_s)
        self.similarities.add_gradients(saved.z, to_s, to_z)


class PositivesTile(Tile):
    """All anchors with their own positives, (N, k).

    Args:
        term: the term with these anchors and positives.
        s: (N, k) or (H, N, k), the similarities.
        tensors: what PairFunctions read, without autograd history.
        targets: in the backward pass, where gradients are added.
    """

    def __init__(
        self, term: ListedReductions, s: Tensor, tensors: Sequence[Tensor], targets: GradientTargets | None = None
    ) -> None:
        super().__init__(s, slice(0, term.layout.anchor_count), None if targets is None else targets.arguments)
        self.term, self.indices, self.tensors = term, term.layout.positive_indices, tensors
        self.to_tensors = None if targets is None else targets.tensors

    def part_of(self, argument: Tensor) -> Tensor:
        """Return an argument of the anchors unchanged, and one of the candidates at their indices."""
        if argument.shape[-1] == 1:
            return argument
        # (M,), (1, M) or (H, 1, M)
        return (argument if argument.ndim == 1 else argument[..., 0, :])[..., self.indices]

    def add_part(self, to_argument: Tensor, gradient: Tensor) -> None:
        """Add the gradient of each pair to the gradient of an argument of the anchors or of the candidates."""
        if to_argument.shape[-1] == 1:
            to_argument += gradient.sum_to_size(to_argument.shape)
            return
        of_candidates = to_argument if to_argument.ndim == 1 else to_argument[..., 0, :]
        gradient = (gradient * (self.indices >= 0)).sum_to_size(*of_candidates.shape[:-1], *self.indices.shape)
        of_candidates.index_add_(-1, self.indices.clamp(min=0).reshape(-1), gradient.flatten(-2))

    def evaluate(self, function: nn.Module) -> Evaluated:
        """Evaluate a `SidedFunction` on these pairs."""
        layout, functions = self.term.layout, self.term.functions
        return functions.on_listed(function, layout, self.indices, self.s, self.tensors, self.to_tensors)

    def reference_weight(self) -> Tensor:
        """Raise: `accepts` accepts no reference weights."""
        raise NotImplementedError

    def excluded(self, reduction: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Return which of the (N, k) pairs do not count."""
        masks = [self.indices >= 0]
        masks += [] if reduction.among is None else [reduction.among[self.indices]]
        masks += [] if reduction.rows is None else [reduction.rows.unsqueeze(-1)]
        return [], masks


def gather(z: Tensor, index: Tensor) -> Tensor:
    """Return (n, k, D) or (H, n, k, D): the vectors of z, (M, D) or (H, M, D), at (n, k) or (H, n, k)."""
    if index.ndim == 2 or z.ndim == 2:
        return z[..., index, :] if index.ndim == 2 else z[index]
    return torch.stack([of_head[at] for of_head, at in zip(z, index, strict=True)])


def scatter_add(to: Tensor, index: Tensor, vectors: Tensor) -> None:
    """Add vectors at indices: the inverse of `gather`."""
    if to.ndim == 2:
        every = index.expand(vectors.shape[:-1]).reshape(-1)
        to.index_add_(0, every, vectors.reshape(-1, vectors.shape[-1]))
        return
    for head, own in enumerate(to):
        own.index_add_(0, (index if index.ndim == 2 else index[head]).reshape(-1), vectors[head].flatten(0, -2))
