"""The sweep for a PairFunction that writes its own derivative: a log-sum-exp of it, tile by tile, without autograd.

A PairFunction that is walked tile by tile costs a graph of small operations for every tile. One that is `Closed` says
what it needs of each embedding (its `sides`, found once), gives a tile in memory that is written again and again, and
turns the gradient of a tile into that of similarities and sides.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from contrast.reductions.asked import LogSumExp
from contrast.reductions.identity import Run, by_tile, cut
from contrast.reductions.work import WIDEST, Gradients, Work, learned, nothing

SIDES = 2**13
"""Candidates, over all heads, whose sides are held at a time."""


@runtime_checkable
class Closed(Protocol):
    """A PairFunction of the similarity s_ij and of two sides, a_i of the anchor and b_j of the candidate."""

    def reach(self) -> float:
        """Give a bound of its absolute value for unit vectors; inf where there is none."""

    def anchor_side(self, z: Tensor) -> Tensor:
        """Give a, (H, n, h), with history."""

    def candidate_side(self, z: Tensor) -> Tensor:
        """Give b, (H, m, h), with history."""

    def tile(self, s: Tensor, a: Tensor, b: Tensor, room: list[Tensor]) -> Tensor:
        """Give the values, (H, n, m), in one of four tiles of room; the others keep what `gradients` needs."""

    def gradients(
        self, given: Tensor, s: Tensor, a: Tensor, b: Tensor, room: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Give dL/ds, dL/da, dL/db and those of parameters, from dL/d(value), which may be written to."""


class Functions:
    """One log-sum-exp whose logarithm of a weight is a `Closed`.

    Args:
        work: the whole call.
        numbers: which of its reductions; one.
        size: rows and columns of a tile of one head.
    """

    def __init__(self, work: Work, numbers: list[int], size: int) -> None:
        self.work, self.numbers = work, numbers
        self.asked: list[Any] = [work.asked[number] for number in numbers]
        self.function: Closed = self.asked[0].log_weight
        self.heads = work.heads[0] if work.heads else 1
        identity = work.identity
        self.side = side = max(1, int(size / math.sqrt(self.heads)))
        self.rows = [block for run in identity.anchor_runs for block in cut(run, side)]
        self.columns = [block for run in identity.candidate_runs for block in cut(run, side)]
        key = ("closed", side, self.asked[0].over)
        blank = identity.excluded if self.asked[0].over == "all" else identity.strangers
        assert blank is not None
        if key not in identity.kept:
            identity.kept[key] = by_tile(blank, self.rows, self.columns)
        self.blank: dict[tuple[int, int], Tensor] = identity.kept[key]
        self._flat = work.x.new_empty(5, self.heads * side * side)

    @staticmethod
    def accepts(work: Work, number: int) -> bool:
        """Say whether this is such a log-sum-exp, over all or over negatives that lists leave out."""
        asked = work.asked[number]
        if not isinstance(asked, LogSumExp) or not isinstance(asked.log_weight, Closed) or work.rules:
            return False
        if isinstance(asked.scale, Tensor) or asked.scale != 0 or asked.over == "positive":
            return False
        if asked.among is not None or asked.rows is not None or asked.above is not None or not work.unit:
            return False
        bounded = asked.log_weight.reach() <= WIDEST[work.x.dtype]
        return bounded and (asked.over == "all" or work.identity.strangers is not None)

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """Give the log-sum-exp, (N,) or (H, N), and the normaliser of each row."""
        work, function = self.work, self.function
        mass = work.x.new_zeros(self.heads, work.x.shape[-2])
        for group in self._groups():
            b = _batched(function.candidate_side(self._candidates(group)))
            for i, rows in self._meeting(group):
                a = _batched(function.anchor_side(work.x[..., rows.start : rows.stop, :]))
                for j in self._columns_of(group):
                    e, *_ = self._exponentials(i, j, a, b[:, self._inside(group, j)])
                    mass[:, rows.start : rows.stop] += e.sum(dim=-1)
        empty = mass == 0
        value = mass.masked_fill_(empty, 1).log_()
        normaliser = value.masked_fill(empty, torch.inf)
        value.masked_fill_(empty, nothing(value.dtype))
        return [value if work.heads else value[0]], [normaliser]

    def backward(self, outputs: list[Tensor], saved: list[Tensor], upstream: list[Tensor], into: Gradients) -> None:  # noqa: ARG002
        """Add the gradients of the vectors and of what the function learns."""
        work, function = self.work, self.function
        # p g = e^value e^-normaliser g; an empty row has an infinite normaliser.
        factor = ((-saved[0]).exp() * upstream[0]).unsqueeze(-1)
        for group in self._groups():
            with torch.enable_grad():
                y = self._candidates(group).detach().requires_grad_(work.wants_part[group.part])
                b = _batched(function.candidate_side(y))
            to_b = torch.zeros_like(b)
            to_part = into.parts[group.part]
            for i, rows in self._meeting(group):
                of_rows = slice(rows.start, rows.stop)
                with torch.enable_grad():
                    x = work.x[..., of_rows, :].detach().requires_grad_(work.wants_anchor)
                    a = _batched(function.anchor_side(x))
                to_a = torch.zeros_like(a)
                for j in self._columns_of(group):
                    inside, within = self._inside(group, j), self._within(self.columns[j])
                    e, s, room = self._exponentials(i, j, a.detach(), b.detach()[:, inside])
                    e.mul_(factor[:, of_rows])
                    of_tile = (e, s, a.detach(), b.detach()[:, inside].expand(self.heads, -1, -1), room)
                    to_s, of_a, of_b, parameters = function.gradients(*of_tile)
                    to_a += of_a
                    to_b[:, inside] += of_b.sum_to_size(to_b[:, inside].shape)
                    for parameter, gradient in parameters:
                        into.add_parameter(parameter, gradient)
                    if into.anchor is not None:
                        share = to_s @ work.parts[group.part][..., within, :]
                        into.anchor[..., of_rows, :] += share if work.heads else share[0]
                    if to_part is not None:
                        place = to_part[..., within, :]
                        place += (to_s.mT @ work.x[..., of_rows, :]).sum_to_size(place.shape)
                self._send(a, to_a, x, None if into.anchor is None else into.anchor[..., of_rows, :], into)
            self._send(b, to_b, y, None if to_part is None else to_part[..., self._within(group), :], into)

    def _send(self, side: Tensor, gradient: Tensor, z: Tensor, to_z: Tensor | None, into: Gradients) -> None:
        """Send the gradient of a side back to the vectors and to the parameters it is made of."""
        wanted = [tensor for tensor in (z, *learned(self.asked[0].log_weight)) if tensor.requires_grad]
        if not side.requires_grad:
            return
        for tensor, found in zip(wanted, torch.autograd.grad(side, wanted, gradient, allow_unused=True), strict=True):
            if found is None:
                continue
            if tensor is not z:
                into.add_parameter(tensor, found)
            elif to_z is not None:
                to_z += found

    def _groups(self) -> list[Run]:
        """Give runs of candidates whose sides are held at a time."""
        length = max(self.side, SIDES // (self.heads * self.side) * self.side)
        return [group for run in self.work.identity.candidate_runs for group in cut(run, length)]

    def _meeting(self, group: Run) -> list[tuple[int, Run]]:
        """Give the blocks of anchors that meet these candidates, numbered."""
        meets = self.work.identity.meets
        return [(i, rows) for i, rows in enumerate(self.rows) if meets(rows, group, self.asked[0].over)]

    def _columns_of(self, group: Run) -> list[int]:
        """Give the blocks of candidates of a group, by number."""
        return [j for j, run in enumerate(self.columns) if group.start <= run.start < group.stop]

    def _candidates(self, group: Run) -> Tensor:
        return self.work.parts[group.part][..., self._within(group), :]

    def _inside(self, group: Run, j: int) -> slice:
        return slice(self.columns[j].start - group.start, self.columns[j].stop - group.start)

    def _exponentials(self, i: int, j: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Give e^value of a tile, 0 where a pair does not count, with the similarities and the room."""
        rows, columns, work = self.rows[i], self.columns[j], self.work
        shape = (self.heads, rows.stop - rows.start, columns.stop - columns.start)
        s, *room = (flat[: math.prod(shape)].view(shape) for flat in self._flat)
        x = _batched(work.x)[:, rows.start : rows.stop]
        y = _batched(work.parts[columns.part])[:, self._within(columns)]
        torch.bmm(x, y.mT.expand(self.heads, -1, -1), out=s)
        e = self.function.tile(s, a, b.expand(self.heads, -1, -1), room).exp_()
        entries = self.blank.get((i, j))
        if entries is not None:
            e.view(self.heads, -1).index_fill_(1, entries, 0)
        return e, s, room

    def _within(self, columns: Run) -> slice:
        start = self.work.starts[columns.part]
        return slice(columns.start - start, columns.stop - start)


def _batched(z: Tensor) -> Tensor:
    return z if z.ndim == 3 else z.unsqueeze(0)
