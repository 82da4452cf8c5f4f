"""The sweep for a PairFunction that writes its own derivative: a log-sum-exp of it, tile by tile, without autograd.

A PairFunction that is walked tile by tile costs a graph of small operations for every tile. One that is `Closed` says
what it needs of each embedding (its `sides`, found once), gives a tile in memory that is written again and again, and
turns the gradient of a tile into that of similarities and sides. Where the anchors are the candidates, two blocks meet
once for both ways round, over the same similarities.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from contrast.core.reductions.asked import LogSumExp, Relation
from contrast.core.reductions.identity import Run, by_tile, cut
from contrast.core.reductions.work import WIDEST, Gradients, Work, nothing

if TYPE_CHECKING:
    from contrast.core.pairs import Pairs

SIDES = 2**13
"""Candidates, over all heads, whose sides are held at a time."""
KEPT = 2**22
"""Up to this many numbers are left to the backward pass, which need not find them again: three for each pair."""

Shares = list[tuple[Tensor, Tensor]]
"""Parameters, and the gradient of each."""


@runtime_checkable
class Closed(Protocol):
    """A PairFunction of the similarity s_ij and of two sides, a_i of the anchor and b_j of the candidate.

    Of the sides a tile knows that of its rows and that of its columns. With b and a in place of a and b it is the tile
    of the pairs turned round, transposed.
    """

    def reach(self) -> float:
        """Give a bound of its absolute value for unit vectors; inf where there is none."""

    def anchor_side(self, z: Tensor) -> Tensor:
        """Give a, (..., n, h)."""

    def candidate_side(self, z: Tensor) -> Tensor:
        """Give b, (..., m, h)."""

    def from_anchor_side(self, to_a: Tensor, z: Tensor) -> tuple[Tensor, Shares]:
        """Give dL/dz and the gradients of parameters, from that of a."""

    def from_candidate_side(self, to_b: Tensor, z: Tensor) -> tuple[Tensor, Shares]:
        """Give dL/dz and the gradients of parameters, from that of b."""

    def exponential(self, s: Tensor, rows: Tensor, columns: Tensor, room: list[Tensor], *, graded: bool) -> Tensor:
        """Give e^value, (H, n, m), in the first of four tiles of room.

        Where it is `graded` the second and the third keep what `gradients` needs.
        """

    def gradients(
        self, to_value: Tensor, rows: Tensor, columns: Tensor, room: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Shares]:
        """Give dL/ds, in place of dL/d(value), and the gradients of the sides and of parameters."""

    def at(self, s: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Give the values of pairs in the same row, (n,), and what `gradients_at` needs."""

    def gradients_at(
        self, to_value: Tensor, a: Tensor, b: Tensor, kept: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Shares]:
        """Give dL/ds, dL/da, dL/db and the gradients of parameters, of pairs in the same row."""


_closed: dict[type, bool] = {}


def _is_closed(value: object) -> bool:
    """Say whether something is `Closed`; a look at each of the names is worth doing once a class."""
    kind = type(value)
    if kind not in _closed:
        _closed[kind] = isinstance(value, Closed)
    return _closed[kind]


@dataclass
class _Block:
    """Neighbouring vectors, (H, n, D), and their sides; a and b are there where they are anchors and candidates."""

    run: Run
    z: Tensor
    a: Tensor | None
    b: Tensor | None
    to_a: Tensor | None = None
    to_b: Tensor | None = None

    def part(self, run: Run) -> _Block:
        """Give a run inside this one, whose gradients are added to this one's."""
        if run == self.run:
            return self
        inside = slice(run.start - self.run.start, run.stop - self.run.start)
        views = (one if one is None else one[:, inside] for one in (self.a, self.b, self.to_a, self.to_b))
        return _Block(run, self.z[:, inside], *views)


@dataclass
class _Found:
    """Single positives that stand in a tile: their places in it, and their anchors either way round, over all heads."""

    places: Tensor
    rows: Tensor
    columns: Tensor


class Functions:
    """A log-sum-exp whose logarithm of a weight is a `Closed`, and the value of that for single positives.

    Args:
        work: the whole call.
        numbers: which of its reductions: the log-sum-exp, then maybe that over the only positive of each anchor.
        size: rows and columns of a tile of one head.
    """

    def __init__(self, work: Work, numbers: list[int], size: int) -> None:
        self.work, self.numbers = work, numbers
        asked: Any = work.asked[numbers[0]]
        self.asked, self.function = asked, cast(Closed, asked.log_weight)
        self.heads = work.heads[0] if work.heads else 1
        self.side = side = max(1, int(size / math.sqrt(self.heads)))
        self.x, self.parts, self.starts = _batched(work.x), [_batched(part) for part in work.parts], work.starts
        identity = work.identity
        anchors, candidates = identity.anchor_runs, identity.candidate_runs
        self.mirrored = work.mirrored == len(work.parts) and not work.across and self.asked.over != "remembered"
        self.mirrored = self.mirrored and all(run.view is not None and run.view >= 0 for run in anchors)
        if self.mirrored and anchors:
            # Views make no difference then, so that blocks may span them.
            anchors = candidates = [Run(0, anchors[-1].stop, anchors[0].view)]
            self.parts, self.starts = [self.x], [0, anchors[-1].stop]
        self.groups = [
            group for run in candidates for group in cut(run, max(side, SIDES // (self.heads * side) * side))
        ]
        self.rows = [block for run in anchors for block in cut(run, side)]
        self.columns = [block for run in candidates for block in cut(run, side)]
        key = ("closed", side, self.mirrored, self.asked.over)
        blank = identity.excluded if self.asked.over == "all" else identity.strangers
        assert blank is not None
        if key not in identity.kept:
            identity.kept[key] = by_tile(blank, self.rows, self.columns)
        self.blank: dict[tuple[int, int], Tensor] = identity.kept[key]
        few = 3 * self.heads * self.x.shape[-2] * work.starts[-1] <= KEPT
        self.keeps = few and (work.wants_anchor or any(work.wants_part))
        self.keeps_sides = self.keeps and self.mirrored and len(self.groups) == 1
        self.found: dict[tuple[int, int], _Found] = self._find() if len(numbers) > 1 else {}

    @staticmethod
    def accepts(work: Work, number: int) -> bool:
        """Say whether this is such a log-sum-exp, over all or over negatives that lists leave out."""
        asked: Any = work.asked[number]
        log_weight: Any = getattr(asked, "log_weight", None)
        if not isinstance(asked, LogSumExp) or not _is_closed(log_weight):
            return False
        if isinstance(asked.scale, Tensor) or asked.scale != 0 or asked.over == "positive":
            return False
        if asked.among is not None or asked.rows is not None or asked.above is not None:
            return False
        return Functions.suits(work.pairs, log_weight, asked.over, work.x.dtype)

    @staticmethod
    def suits(pairs: Pairs, function: Closed, over: Relation, dtype: torch.dtype) -> bool:
        """Say whether values are bounded, and lists say who does not count."""
        if pairs.rules or not pairs.anchor.unit or not all(part.unit for part in pairs.candidates):
            return False
        listed = over == "all" or pairs.identity.strangers is not None
        return listed and function.reach() <= WIDEST[dtype]

    def _find(self) -> dict[tuple[int, int], _Found]:
        """Sort the single positives into the tiles."""
        positive, kept = self.work.identity.positive, self.work.identity.kept
        assert positive is not None
        key = ("single", self.side, self.heads)
        if key not in kept:
            kept[key] = {}
            heads = torch.arange(self.heads).unsqueeze(-1)
            for (i, j), places in by_tile(positive, self.rows, self.columns).items():
                rows, columns = self.rows[i], self.columns[j]
                width = columns.stop - columns.start
                anchors = (places // width + rows.start, places % width + columns.start)
                kept[key][i, j] = _Found(
                    (heads * (rows.stop - rows.start) * width + places).view(-1),
                    *((heads * self.x.shape[-2] + of).view(-1) for of in anchors),
                )
        known: dict[tuple[int, int], _Found] = kept[key]
        return known

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """Give the log-sum-exp, (N,) or (H, N); kept are the normaliser of each row, and tiles."""
        mass = self.x.new_zeros(self.heads, self.x.shape[-2])
        positive = torch.zeros_like(mass) if len(self.numbers) > 1 else None
        kept: list[Tensor] = []
        room = _Room(self.x)
        sides: list[Tensor] = []
        for i, j, rows, columns in self._meetings(None, sides):
            s = self._similarities(rows, columns, room)
            for turned in self._ways_round(i, j):
                tiles = [torch.empty_like(s) if self.keeps else room.tile(place, s.shape) for place in (1, 2, 3)]
                tiles.append(room.tile(4, s.shape))
                e = self._exponential(turned, s, rows, columns, tiles, graded=self.keeps)
                found = self.found.get((i, j))
                if found is not None and positive is not None:
                    values = e.view(-1).index_select(0, found.places).log_()
                    positive.view(-1).index_copy_(0, found.columns if turned else found.rows, values)
                self._blank(e, i, j)
                mass[:, _slice(columns if turned else rows)] += e.sum(dim=-2 if turned else -1)
                kept += tiles[:3] if self.keeps else []
        empty = mass == 0
        value = mass.masked_fill_(empty, 1).log_()
        normaliser = value.masked_fill(empty, torch.inf)
        value.masked_fill_(empty, nothing(value.dtype))
        outputs = [value] if positive is None else [value, positive]
        return [one if self.work.heads else one[0] for one in outputs], [normaliser, *sides, *kept]

    def backward(self, outputs: list[Tensor], saved: list[Tensor], upstream: list[Tensor], into: Gradients) -> None:  # noqa: ARG002
        """Add the gradients of the vectors and of what the function learns."""
        normaliser, *kept = saved
        sides, kept = (kept[:2], kept[2:]) if self.keeps_sides else ([], kept)
        # p g = e^value e^-normaliser g; an empty row has an infinite normaliser.
        factor = (-normaliser).exp_() * upstream[0]
        room = _Room(self.x)
        for i, j, rows, columns in self._meetings(into, sides):
            shape = (self.heads, rows.z.shape[-2], columns.z.shape[-2])
            s: Tensor | None = None
            total: Tensor | None = None
            for turned in self._ways_round(i, j):
                if self.keeps:
                    tiles, kept = kept[:3], kept[3:]
                    tiles.append(room.tile(4, shape))
                else:
                    s = self._similarities(rows, columns, room) if s is None else s
                    tiles = [room.tile(place, shape) for place in (1, 2, 3, 4)]
                    self._blank(self._exponential(turned, s, rows, columns, tiles, graded=True), i, j)
                of_anchors = factor[:, _slice(columns if turned else rows)].unsqueeze(-2 if turned else -1)
                to_value = torch.mul(tiles[0], of_anchors, out=room.tile(1 if turned else 5, shape))
                found = self.found.get((i, j))
                if found is not None:
                    given = upstream[1].reshape(-1)[found.columns if turned else found.rows]
                    to_value.view(-1).index_add_(0, found.places, given)
                left, right = self._sides(rows, columns, turned)
                to_s, to_left, to_right, parameters = self.function.gradients(to_value, left, right, tiles)
                total = to_s if total is None else total.add_(to_s)
                _add(rows.to_b if turned else rows.to_a, to_left)
                _add(columns.to_a if turned else columns.to_b, to_right)
                _add_parameters(into, parameters)
            assert total is not None
            if self.mirrored and i == j:
                _add(self._place(into.anchor, rows.run, 0), total + total.mT, rows.z)
            else:
                _add(self._place(into.anchor, rows.run, 0), total, columns.z)
                _add(self._place_of_part(into, columns.run), total.mT, rows.z)

    def _meetings(self, into: Gradients | None, kept: list[Tensor]) -> Iterator[tuple[int, int, _Block, _Block]]:
        """Give the blocks that meet, numbered; gradients of their sides, if wanted, are sent on when all have met.

        Args:
            into: where gradients go.
            kept: the sides of all vectors, or an empty list, which is given those that the backward pass should have.
        """
        for group in self.groups:
            all_columns = self._block(group, kept, candidate=True, anchor=self.mirrored, graded=into is not None)
            if self.keeps_sides and not kept:
                kept += [side for side in (all_columns.a, all_columns.b) if side is not None]
            inside = [(j, run) for j, run in enumerate(self.columns) if group.start <= run.start < group.stop]
            for i, run in enumerate(self.rows):
                if self.mirrored and run.start >= group.stop:
                    break
                if not self.mirrored and not self.work.identity.meets(run, group, self.asked.over):
                    continue
                own = self.mirrored and run.start >= group.start
                rows = (
                    all_columns.part(run)
                    if own
                    else self._block(run, [], candidate=self.mirrored, anchor=True, graded=into is not None)
                )
                for j, columns in inside:
                    if not self.mirrored or j >= i:
                        yield i, j, rows, all_columns.part(columns)
                if into is not None and not own:
                    self._send(rows, into)
            if into is not None:
                self._send(all_columns, into)

    def _block(self, run: Run, sides: list[Tensor], *, candidate: bool, anchor: bool, graded: bool) -> _Block:
        start = self.starts[run.part] if candidate else 0
        z = (self.parts[run.part] if candidate else self.x)[:, run.start - start : run.stop - start]
        a, b = sides or (
            self.function.anchor_side(z) if anchor else None,
            self.function.candidate_side(z) if candidate else None,
        )
        to_sides = [torch.zeros_like(side) if graded and side is not None else None for side in (a, b)]
        return _Block(run, z, a, b, *to_sides)

    def _send(self, block: _Block, into: Gradients) -> None:
        """Send the gradients of sides on to the vectors and to the parameters that they are made of."""
        if block.to_a is not None:
            to_z, parameters = self.function.from_anchor_side(block.to_a, block.z)
            _add(self._place(into.anchor, block.run, 0), to_z)
            _add_parameters(into, parameters)
        if block.to_b is not None:
            to_z, parameters = self.function.from_candidate_side(block.to_b, block.z)
            _add(self._place_of_part(into, block.run), to_z)
            _add_parameters(into, parameters)

    def _place_of_part(self, into: Gradients, run: Run) -> Tensor | None:
        to_part = into.anchor if self.mirrored else into.parts[run.part]
        return self._place(to_part, run, self.starts[run.part])

    def _place(self, gradient: Tensor | None, run: Run, start: int) -> Tensor | None:
        return None if gradient is None else _batched(gradient)[:, run.start - start : run.stop - start]

    def _ways_round(self, i: int, j: int) -> tuple[bool, ...]:
        """Say whether the pairs of a tile count as they stand, and turned round."""
        return (False, True) if self.mirrored and i != j else (False,)

    def _similarities(self, rows: _Block, columns: _Block, room: _Room) -> Tensor:
        s = room.tile(0, (self.heads, rows.z.shape[-2], columns.z.shape[-2]))
        return torch.bmm(rows.z, columns.z.mT.expand(self.heads, -1, -1), out=s)

    def _sides(self, rows: _Block, columns: _Block, turned: bool) -> tuple[Tensor, Tensor]:
        left, right = (rows.b, columns.a) if turned else (rows.a, columns.b)
        assert left is not None
        assert right is not None
        return left, right.expand(self.heads, -1, -1)

    def _exponential(
        self, turned: bool, s: Tensor, rows: _Block, columns: _Block, room: list[Tensor], *, graded: bool
    ) -> Tensor:
        return self.function.exponential(s, *self._sides(rows, columns, turned), room, graded=graded)

    def _blank(self, e: Tensor, i: int, j: int) -> None:
        """Set to 0 what does not count; of anchors that are the candidates it is the same turned round."""
        entries = self.blank.get((i, j))
        if entries is not None:
            e.view(self.heads, -1).index_fill_(1, entries, 0)


class _Room:
    """Tiles that are written again and again.

    Args:
        like: whose dtype they have.
    """

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.flat: dict[int, Tensor] = {}

    def tile(self, place: int, shape: tuple[int, ...]) -> Tensor:
        """Give one of them."""
        size = math.prod(shape)
        known = self.flat.get(place)
        if known is None or known.numel() < size:
            known = self.flat[place] = self.like.new_empty(size)
        return known[:size].view(shape)


def _add(into: Tensor | None, left: Tensor, right: Tensor | None = None) -> None:
    """Add a matrix, or the product of two, of each head or of all heads together."""
    if into is None:
        return
    if right is None:
        into += left if left.shape == into.shape else left.sum_to_size(into.shape)
    elif into.shape[0] == left.shape[0] == right.shape[0]:
        into.baddbmm_(left, right)
    else:
        into += (left @ right).sum_to_size(into.shape)


def _add_parameters(into: Gradients, shares: Shares) -> None:
    for parameter, gradient in shares:
        into.add_parameter(parameter, gradient)


def _slice(block: _Block) -> slice:
    return slice(block.run.start, block.run.stop)


def _batched(z: Tensor) -> Tensor:
    return z if z.ndim == 3 else z.unsqueeze(0)
