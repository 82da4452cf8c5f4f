"""Which similarities stand in the one matrix of a small call, and what each reduction reads of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from contrast.core.reductions.identity import Identity, Run
from contrast.core.reductions.work import Gradients, Work

Product = Callable[[Tensor, Tensor], Tensor]
"""(..., n, D) and (..., m, D) -> (..., n, m), the inner products."""


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Give a b^T."""
    return a @ b.mT


@dataclass(frozen=True)
class Spot:
    """Neighbouring anchors and candidates that a reduction is about.

    Args:
        start: the first anchor.
        stop: the anchor after the last.
        left: the first candidate.
        right: the candidate after the last.
        exact: whether what `rows` and `among` say is this, so that no mask need say it.
    """

    start: int
    stop: int
    left: int
    right: int
    exact: bool

    @property
    def rows(self) -> slice:
        """The anchors."""
        return slice(self.start, self.stop)

    @property
    def columns(self) -> slice:
        """The candidates."""
        return slice(self.left, self.right)


@dataclass(eq=False)
class Block:
    """What a reduction reads of the matrix.

    Args:
        rows: the rows; None for all.
        columns: the columns; None for all.
        turned: whether it reads the transposed matrix.
        both: whether it reads rows and columns, each anchor's row being one or the other.
        counts: bool, as the block or to be broadcast: who counts; None where everyone does.
        lacking: whether an anchor may have no candidate.
        anchors: whose rows these are; None for all anchors.
        made: what follows from this, by name.
        places: of thresholds asked for: which of an anchor's candidates, and the number where it is one for all.
    """

    rows: slice | None = None
    columns: slice | None = None
    turned: bool = False
    both: bool = False
    counts: Tensor | None = None
    lacking: bool = True
    anchors: slice | None = None
    made: dict[Any, Tensor] = field(default_factory=dict)
    places: dict[Any, tuple[Tensor, int | None]] = field(default_factory=dict)

    def of(self, matrix: Tensor) -> Tensor:
        """Give the block of a matrix."""
        if self.turned:
            matrix = matrix.mT
        if self.rows is not None:
            matrix = matrix[..., self.rows, :]
        return matrix if self.columns is None else matrix[..., self.columns]

    def ones(self, s: Tensor) -> Tensor | None:
        """Give 1 where a pair counts and 0 where not; None where all do."""
        if self.counts is None:
            return None
        if s.dtype not in self.made:
            self.made[s.dtype] = self.counts.to(s.dtype)
        return self.made[s.dtype]

    def far(self, s: Tensor) -> Tensor | None:
        """Give 0 where a pair counts and -inf where not; None where all do."""
        if self.counts is None:
            return None
        key = ("far", s.dtype)
        if key not in self.made:
            self.made[key] = s.new_zeros(self.counts.shape).masked_fill_(~self.counts, -torch.inf)
        return self.made[key]

    def counted(self) -> Tensor:
        """Give how many pairs of each anchor count, where some do not."""
        assert self.counts is not None
        if "counted" not in self.made:
            self.made["counted"] = self.counts.sum(dim=-1)
        return self.made["counted"]

    def share(self, s: Tensor) -> Tensor:
        """Give what each candidate has of a plain mean, by anchor."""
        key = ("share", s.dtype)
        if key not in self.made:
            ones = self.ones(s)
            counted = self.sum(s.new_ones(s.shape[-2:]) if ones is None else ones)
            self.made[key] = counted.clamp_(min=1).reciprocal_()
        return self.made[key]

    def sum(self, t: Tensor) -> Tensor:
        """Sum (..., n, m) for each anchor."""
        return torch.cat([t.sum(dim=-1), t.sum(dim=-2)], dim=-1) if self.both else t.sum(dim=-1)

    def spread(self, of_anchors: Tensor) -> Tensor:
        """Give what each pair has of its anchor, or the sum of its two anchors, to be broadcast."""
        if not self.both:
            return of_anchors.unsqueeze(-1)
        count = of_anchors.shape[-1] // 2
        return of_anchors[..., :count].unsqueeze(-1) + of_anchors[..., count:].unsqueeze(-2)


class Box:
    """Neighbouring anchors against neighbouring candidates.

    Args:
        work: the whole call.
        spot: which.
    """

    def __init__(self, work: Work, spot: Spot) -> None:
        self.work, self.spot = work, spot
        self.key = ("box", spot.start, spot.stop, spot.left, spot.right)
        self.size = (spot.stop - spot.start) * (spot.right - spot.left)
        self.square = spot.stop - spot.start == spot.right - spot.left == work.x.shape[-2]
        self.square = self.square and work.mirrored == len(work.parts)

    def similarities(self, product: Product = inner) -> Tensor:
        """Give the matrix, (n, m) or (H, n, m)."""
        x = self.work.x
        return product(x, x) if self.square else product(self._anchors(), self._candidates())

    def block(self, spot: Spot) -> Block:
        """Give what a reduction about `spot` reads."""
        whole = self.spot
        rows = None if (spot.start, spot.stop) == (whole.start, whole.stop) else spot.rows
        columns = None if (spot.left, spot.right) == (whole.left, whole.right) else spot.columns
        return Block(moved(rows, whole.start), moved(columns, whole.left))

    def of_mask(self, mask: Tensor, spot: Spot) -> Tensor:
        """Give what a reduction about `spot` reads of an (N, M) mask."""
        return mask[spot.rows, spot.columns]

    def flat(self, rows: Tensor, columns: Tensor) -> Tensor | None:
        """Give where pairs (anchor, candidate) stand in the flat matrix; None where one does not."""
        spot = self.spot
        inside = (rows >= spot.start) & (rows < spot.stop) & (columns >= spot.left) & (columns < spot.right)
        if self.work.mirrored == len(self.work.parts):
            # A similarity is that of the pair turned round, too.
            rows, columns = torch.where(inside, rows, columns), torch.where(inside, columns, rows)
            inside = (rows >= spot.start) & (rows < spot.stop) & (columns >= spot.left) & (columns < spot.right)
        width = spot.right - spot.left
        return (rows - spot.start) * width + columns - spot.left if bool(inside.all()) else None

    def send(self, total: Tensor, into: Gradients) -> None:
        """Add what dL/ds gives the anchors and the candidates."""
        work, spot = self.work, self.spot
        if into.anchor is not None and self.square:
            # A transposed copy is quicker than a sum with a transposed view.
            into.anchor += total.mT.contiguous().add_(total) @ work.x
            return
        if into.anchor is not None:
            into.anchor[..., spot.rows, :] += total @ self._candidates()
        x = self._anchors()
        for part, to_part in enumerate(into.parts):
            start = work.starts[part]
            left, right = max(start, spot.left), min(work.starts[part + 1], spot.right)
            if to_part is not None and left < right:
                place = to_part[..., left - start : right - start, :]
                place += (total[..., left - spot.left : right - spot.left].mT @ x).sum_to_size(place.shape)

    def _anchors(self) -> Tensor:
        return self.work.x[..., self.spot.rows, :]

    def _candidates(self) -> Tensor:
        work, spot = self.work, self.spot
        if spot.right <= work.starts[work.mirrored]:
            return work.x[..., spot.columns, :]
        parts = [
            part[..., max(spot.left - start, 0) : spot.right - start, :]
            for part, start in zip(work.parts, work.starts, strict=False)
            if start < spot.right and start + part.shape[-2] > spot.left
        ]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([part.expand(*work.heads, *part.shape[-2:]) for part in parts], dim=-2)


class Facing:
    """Two views of n samples that meet only another view's candidates, each its own: (2 n, n).

    Args:
        work: the whole call.
        met: the candidates that each view's anchors meet.
    """

    def __init__(self, work: Work, met: tuple[Run, Run]) -> None:
        self.work, self.met = work, met
        self.key: tuple[Any, ...] = ("facing",)
        self.count = met[0].stop - met[0].start
        self.size = 2 * self.count**2
        self.halves = (slice(0, self.count), slice(self.count, 2 * self.count))

    def similarities(self, product: Product = inner) -> Tensor:
        """Give the matrix, (2 n, n) or (H, 2 n, n)."""
        return torch.cat([self._half(0, product), self._half(1, product)], dim=-2)

    def block(self, spot: Spot) -> Block:
        """Give what a reduction about `spot` reads."""
        return Block(None if spot.stop - spot.start == 2 * self.count else spot.rows)

    def of_mask(self, mask: Tensor, spot: Spot) -> Tensor:
        """Give what a reduction about `spot` reads of an (N, M) mask."""
        halves = [mask[rows, run.start : run.stop] for rows, run in zip(self.halves, self.met, strict=True)]
        return torch.cat(halves)[spot.rows]

    def flat(self, rows: Tensor, columns: Tensor) -> Tensor | None:
        """Give where pairs (anchor, candidate) stand in the flat matrix; None where one does not."""
        within = columns - torch.where(rows < self.count, self.met[0].start, self.met[1].start)
        return rows * self.count + within if bool(((within >= 0) & (within < self.count)).all()) else None

    def send(self, total: Tensor, into: Gradients) -> None:
        """Add what dL/ds gives the anchors and the candidates."""
        for rows, run in zip(self.halves, self.met, strict=True):
            share, to_part = total[..., rows, :], into.parts[run.part]
            if into.anchor is not None:
                into.anchor[..., rows, :] += share @ self.work.parts[run.part]
            if to_part is not None:
                to_part += (share.mT @ self.work.x[..., rows, :]).sum_to_size(to_part.shape)

    def _half(self, view: int, product: Product) -> Tensor:
        work, part = self.work, self.met[view].part
        own = work.parts[1 - part] if work.mirrored == 2 else work.x[..., self.halves[view], :]
        return product(own, work.parts[part])


class Folded(Facing):
    """The same where the candidates are the anchors: one view against the other, (n, n), read by rows and columns."""

    def __init__(self, work: Work, met: tuple[Run, Run]) -> None:
        super().__init__(work, met)
        self.key, self.size = ("folded",), self.count**2

    def similarities(self, product: Product = inner) -> Tensor:
        """Give the matrix, (n, n) or (H, n, n)."""
        return self._half(0, product)

    def block(self, spot: Spot) -> Block:
        """Give what a reduction about `spot` reads."""
        both = spot.stop - spot.start == 2 * self.count
        return Block(turned=not both and spot.start > 0, both=both)

    def of_mask(self, mask: Tensor, spot: Spot) -> Tensor:
        """Give what a reduction about `spot` reads of an (N, M) mask."""
        second = spot.start > 0
        return mask[self.halves[second], self.met[second].start : self.met[second].stop]

    def flat(self, rows: Tensor, columns: Tensor) -> Tensor | None:
        """Give where pairs (anchor, candidate) stand in the flat matrix."""
        first = rows * self.count + columns - self.met[0].start
        return torch.where(rows < self.count, first, (columns - self.met[1].start) * self.count + rows - self.count)

    def send(self, total: Tensor, into: Gradients) -> None:
        """Add what dL/ds gives the anchors, which are the candidates."""
        if into.anchor is not None:
            first, second = self.halves
            if not self.work.fixed(0, self.count):
                into.anchor[..., first, :] += total @ self.work.x[..., second, :]
            if not self.work.fixed(self.count, 2 * self.count):
                into.anchor[..., second, :] += total.mT @ self.work.x[..., first, :]


Frame = Box | Facing


def spot(identity: Identity, asked: Any, cut: bool) -> Spot:
    """Give the anchors and candidates that a reduction is about; all of them where less is known.

    Args:
        identity: of the anchors and the candidates.
        asked: the reduction.
        cut: whether it may be given less than all.
    """
    rows, among = getattr(asked, "rows", None), asked.among
    layout = identity if identity.canonical else identity.base
    everything = Spot(0, identity.rows, 0, identity.columns, rows is None and among is None)
    if layout is None or not cut:
        return everything
    anchors = _named(identity, rows, layout.anchor_runs)
    if not anchors:
        return everything
    met = [run for run in layout.candidate_runs if any(layout.meets(one, run, asked.over) for one in anchors)]
    named = _named(identity, among, met)
    if not named:
        return everything
    return Spot(anchors[0].start, anchors[-1].stop, named[0].start, named[-1].stop, exact=True)


def _named(identity: Identity, which: Tensor | None, runs: Sequence[Run]) -> list[Run]:
    """Give the runs that a mask names whole; none where it names less of one, or where gaps are between them."""
    whole = [identity.whole(which, run) for run in runs]
    named = [run for run, is_whole in zip(runs, whole, strict=True) if is_whole]
    if None in whole or (which is not None and named and not _together(named)):
        return []
    return named


def _together(runs: Sequence[Run]) -> bool:
    return sum(run.stop - run.start for run in runs) == runs[-1].stop - runs[0].start


def facing(identity: Identity) -> tuple[Run, Run] | None:
    """Give the candidates that each of two views meets, where they are parts of that view's size."""
    layout = identity if identity.canonical else identity.base
    if layout is None or not layout.across:
        return None
    if "facing" not in layout.kept:
        layout.kept["facing"] = _facing(layout)
    known: tuple[Run, Run] | None = layout.kept["facing"]
    return known


def _facing(layout: Identity) -> tuple[Run, Run] | None:
    anchors, candidates = layout.anchor_runs, layout.candidate_runs
    if len(anchors) != 2 or len(candidates) != len(layout.sizes):
        return None
    met = [[run for run in candidates if layout.meets(one, run, "all")] for one in anchors]
    sizes = {run.stop - run.start for runs in (anchors, *met) for run in runs}
    return (met[0][0], met[1][0]) if len(sizes) == 1 and all(len(runs) == 1 for runs in met) else None


def moved(where: slice | None, by: int) -> slice | None:
    """Give a slice counted from another start."""
    return None if where is None else slice(where.start - by, where.stop - by)
