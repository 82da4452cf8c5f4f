"""Means by associativity: sums of whole runs and of classes, so that no similarity is computed at all.

sum_j <x_i, y_j> = <x_i, sum_j y_j>, and with the weights (<u_i, u_j> + 1) / 2 of reference vectors
sum_j w_ij <x_i, y_j> = (<x_i, (sum_j y_j u_j^T) u_i> + <x_i, sum_j y_j>) / 2. What a run holds too much is listed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contrast.core.embeddings import PADDING, REMEMBERED
from contrast.core.reductions.asked import Mean
from contrast.core.reductions.identity import Matches, Run
from contrast.core.reductions.listed import add_dots, dots
from contrast.core.reductions.work import Gradients, Work

ROWS = 1024
"""Rows worked on at a time, so that their copies stay small."""


class Linear:
    """One mean, over positives that are too many to list or over negatives or all.

    Args:
        work: the whole call.
        number: which of its reductions.
    """

    def __init__(self, work: Work, number: int) -> None:
        self.work, self.numbers, identity = work, [number], work.identity
        asked = work.asked[number]
        assert isinstance(asked, Mean)
        self.asked = asked
        self.by_class = asked.over == "positive"
        # The mean over negatives in classes is that over all less that over positives.
        self.less_classes = asked.over in ("negative", "remembered") and identity.strangers is None
        self.over: Any = "all" if self.by_class else asked.over
        listed = identity.excluded if asked.over in ("all", "positive") or self.less_classes else identity.strangers
        assert listed is not None
        self.listed = self._kept(listed)

    @staticmethod
    def accepts(work: Work, number: int) -> bool:
        """Say whether this is a mean of plain similarities, or weighted by references over all or listed negatives."""
        asked = work.asked[number]
        if not isinstance(asked, Mean) or asked.above is not None or (work.rules and asked.over != "positive"):
            return False
        if asked.weight is None:
            return True
        return isinstance(asked.weight, str) and (
            asked.over == "all" or (asked.over != "positive" and work.identity.strangers is not None)
        )

    def _kept(self, pairs: Matches) -> Matches:
        """Keep the listed pairs that the sums of runs hold."""
        identity, asked = self.work.identity, self.asked
        view, anchor_view = identity.view[pairs.columns], identity.anchor_view[pairs.rows]
        kept = (view != PADDING) & (anchor_view != PADDING)
        if identity.across:
            kept &= view != anchor_view
        if asked.over == "remembered":
            kept &= view == REMEMBERED
        if asked.among is not None:
            kept &= asked.among[pairs.columns]
        if self.by_class or self.less_classes:
            # What is taken away with its class is not taken away again.
            same = identity.group[pairs.columns] == identity.anchor_group[pairs.rows]
            kept &= same if self.by_class else ~same
        return pairs[kept]

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """Give the mean, (N,) or (H, N), and the mass of each row."""
        work, asked = self.work, self.asked
        total, mass = work.new_rows(), self._mass()
        for rows, columns in self._met():
            for sign, by_class in self._sums():
                read = self._summed(columns, by_class)
                for block in rows:
                    total[..., block] += sign * (work.x[..., block, :] * read(block)).sum(dim=-1)
        if len(self.listed):
            total.index_add_(-1, self.listed.rows, -self._listed_weight() * dots(work, self.listed))
        # What is left of nothing after subtraction is rounding.
        counts = work.identity.count(asked.over, asked.among, asked.rows)
        empty = (counts == 0) | (mass <= counts * (16 * torch.finfo(mass.dtype).eps))
        mass = mass.masked_fill(empty, torch.inf)
        return [total / mass], [mass]

    def backward(self, outputs: list[Tensor], saved: list[Tensor], upstream: list[Tensor], into: Gradients) -> None:  # noqa: ARG002
        """Add the gradients: every anchor gives its candidates' sum, every candidate its anchors' sum."""
        g = upstream[0] / saved[0]
        for rows, columns in self._met():
            for sign, by_class in self._sums():
                wanted = [block for block in rows if not self.work.fixed(block.start, block.stop)]
                if into.anchor is not None and wanted:
                    read = self._summed(columns, by_class)
                    for block in wanted:
                        into.anchor[..., block, :] += sign * g[..., block].unsqueeze(-1) * read(block)
                if any(into.parts[run.part] is not None for run in columns):
                    self._add_to_parts(rows, columns, sign * g, by_class, into)
        if len(self.listed):
            add_dots(self.work, self.listed, -self._listed_weight() * g[..., self.listed.rows], into)

    def _sums(self) -> list[tuple[int, bool]]:
        """Give the sums that make the numerator: (sign, whether by class)."""
        return [(1, self.by_class), *([(-1, True)] if self.less_classes else [])]

    def _met(self) -> list[tuple[list[slice], list[Run]]]:
        """Give the anchors of each view, in slices, and the runs of candidates that they meet."""
        identity = self.work.identity
        by_view: dict[int | None, list[slice]] = {}
        first: dict[int | None, Run] = {}
        for run in identity.anchor_runs:
            if identity.whole(self.asked.rows, run) is False:
                continue
            first.setdefault(run.view, run)
            starts = range(run.start, run.stop, ROWS)
            by_view.setdefault(run.view, []).extend(slice(start, min(start + ROWS, run.stop)) for start in starts)
        made = []
        for view, rows in by_view.items():
            met = [run for run in identity.candidate_runs if identity.meets(first[view], run, self.over)]
            if met:
                made.append((rows, met))
        return made

    def _blocks(self, run: Run) -> Any:
        """Give (z, u, positions among all candidates, positions in the part) of a run's candidates, block by block."""
        work, among = self.work, self.asked.among
        part, offset = work.candidates[run.part], work.starts[run.part]
        for start in range(run.start, run.stop, ROWS):
            stop = min(start + ROWS, run.stop)
            places = torch.arange(start, stop) if among is None else among[start:stop].nonzero().squeeze(1) + start
            within: Any = slice(start - offset, stop - offset) if among is None else places - offset
            u = None if self.asked.weight is None else part.reference[within]  # type: ignore[index]
            yield part.z[..., within, :], u, places, within

    def _summed(self, columns: list[Run], by_class: bool) -> Any:
        """Give a function of a block of anchors: the weighted sum of these candidates, (..., n, D)."""
        x, identity = self.work.x, self.work.identity
        if by_class:
            anchor_group, group, kinds = identity.groups
            table = _table(x, self.work.heads, kinds)
            for run in columns:
                for z, _, places, _ in self._blocks(run):
                    table.index_add_(-2, group[places], z.to(table.dtype).expand(*self.work.heads, -1, -1))
            return lambda block: table[..., anchor_group[block].long(), :].to(x.dtype)
        total: Any = 0.0
        outer: Any = 0.0
        for run in columns:
            for z, u, _, _ in self._blocks(run):
                total = total + z.sum(dim=-2, keepdim=True)
                if u is not None:
                    outer = outer + u.mT @ z
        if self.asked.weight is None:
            return lambda block: total  # noqa: ARG005
        return lambda block: (self._u(block) @ outer + total) / 2

    def _u(self, rows: slice) -> Tensor:
        """Give the anchors' references at neighbouring rows."""
        u = self.work.anchor.references(rows)
        assert u is not None
        return u

    def _add_to_parts(self, rows: list[slice], columns: list[Run], g: Tensor, by_class: bool, into: Gradients) -> None:
        x, identity = self.work.x, self.work.identity
        table: Any = None
        total: Any = 0.0
        outer: Any = 0.0
        if by_class:
            anchor_group, group, kinds = identity.groups
            table = _table(x, self.work.heads, kinds)
        for block in rows:
            weighted = g[..., block].unsqueeze(-1) * x[..., block, :]
            if by_class:
                table.index_add_(-2, anchor_group[block], weighted.to(table.dtype))
                continue
            total = total + weighted.sum(dim=-2, keepdim=True)
            if self.asked.weight is not None:
                outer = outer + self._u(block).mT @ weighted
        for run in columns:
            to_part = into.parts[run.part]
            if to_part is None:
                continue
            for z, u, places, within in self._blocks(run):
                if by_class:
                    share = table[..., group[places].long(), :].to(x.dtype)
                else:
                    share = total if u is None else (u @ outer + total) / 2
                to_part[..., within, :] += share.expand(*self.work.heads, *z.shape[-2:]).sum_to_size(z.shape)

    def _mass(self) -> Tensor:
        """Give the sum of the weights of each row."""
        work, asked = self.work, self.asked
        if asked.weight is None:
            return work.identity.count(asked.over, asked.among, asked.rows).to(work.x.dtype).expand(*work.heads, -1)
        mass = work.x.new_zeros(work.x.shape[-2])
        for rows, columns in self._met():
            total: Any = 0.0
            count = 0
            for run in columns:
                for _, u, places, _ in self._blocks(run):
                    total, count = total + u.sum(dim=0), count + len(places)
            for block in rows:
                mass[block] = (self._u(block) @ total + count) / 2
        if len(self.listed):
            mass.index_add_(0, self.listed.rows, -self._listed_weight())
        return (mass if asked.rows is None else mass * asked.rows).expand(*work.heads, -1)

    def _listed_weight(self) -> Tensor:
        if self.asked.weight is None:
            return self.work.x.new_ones(len(self.listed))
        u_anchor, joined = self.work.anchor.reference, [part.reference for part in self.work.candidates]
        assert u_anchor is not None
        weight = u_anchor.new_empty(len(self.listed))
        for part, (start, stop) in enumerate(zip(self.work.starts, self.work.starts[1:], strict=False)):
            inside = ((self.listed.columns >= start) & (self.listed.columns < stop)).nonzero().squeeze(1)
            for where in torch.split(inside, ROWS):
                u = joined[part][self.listed.columns[where] - start]  # type: ignore[index]
                weight[where] = ((u_anchor[self.listed.rows[where]] * u).sum(dim=-1) + 1) / 2
        return weight.to(self.work.x.dtype)


def _table(x: Tensor, heads: tuple[int, ...], kinds: int) -> Tensor:
    """Give zeros for a vector of each class, in float64 where that is small: a large class sums many vectors."""
    small = kinds * x.shape[-1] <= 2**20
    return x.new_zeros(*heads, kinds, x.shape[-1], dtype=torch.float64 if small else x.dtype)
