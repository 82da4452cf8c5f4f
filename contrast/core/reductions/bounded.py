"""The sweep for the CPU where exponents are bounded: constants for arguments, no mask, no running maximum.

Unit vectors keep |scale * s| small, so exp(scale * s) needs no maximum, its sums have no order, and a tile serves the
rows of its anchors and, where the anchors are the candidates, the rows of its candidates too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from contrast.core.reductions.asked import LogSumExp, SoftMean, SoftplusSum
from contrast.core.reductions.grid import alike, blocks, low_tiles
from contrast.core.reductions.identity import Matches, Run, by_tile, cut
from contrast.core.reductions.shares import sum_of_log1p
from contrast.core.reductions.work import WIDEST, Gradients, Work, nothing

KEPT = 2**21
"""Exponentials that the forward pass leaves to the backward pass, which saves it a product."""
WORTH_KEEPING = 16
"""Where there are more than so many times as many, keeping some would save little."""
BY_ROWS, BY_COLUMNS = -1, -2
"""The buffers of what is at or above the thresholds of the anchors, and of the candidates."""
SLICE = 2048
"""Vectors worked on at a time, so that their copies stay small."""
FAINT = -60.0
"""A shifted sum below exp of this may have lost terms."""


class NotBoundedError(Exception):
    """An exponent left the range; the general tiles take over."""


@dataclass
class _Term:
    """One reduction in numbers, for one head.

    Args:
        number: its place among all that is asked.
        asked: the reduction.
        scale: multiplies the similarity.
        shift: is taken from the exponent.
        bias: is added to it; a number or (N,).
        blank: the pairs that do not count.
    """

    number: int
    asked: LogSumExp | SoftMean | SoftplusSum
    scale: float
    shift: float
    bias: float | Tensor
    blank: Matches | None


@dataclass(slots=True)
class _Tile:
    """A block of anchors and a block of candidates.

    Args:
        i: the block of anchors.
        j: the block of candidates.
        mirror: whether the candidates are anchors too.
        serves: for each reduction, whether the tile serves the rows of its anchors, and those of its candidates.
    """

    i: int
    j: int
    mirror: bool
    serves: tuple[tuple[bool, bool], ...]


_Plan = tuple[list[Run], list[Run], list[_Tile], dict[int, dict[tuple[int, int], Tensor]]]


class Bounded:
    """One sweep over the tiles for some of the reductions.

    Args:
        work: the whole call.
        numbers: which of its reductions.
        size: rows and columns of a tile.
    """

    def __init__(self, work: Work, numbers: list[int], size: int) -> None:
        self.work, self.numbers, self.size = work, numbers, size
        self.asked: list[Any] = [work.asked[number] for number in numbers]
        self.mirrored = work.mirrored if self._may_mirror() else 0
        above = any(getattr(asked, "above", None) is not None for asked in self.asked)
        self._lay_out(size, size)
        if above and not (self.mirrored and alike(work, self._shapes(), size)):
            self.mirrored = 0
            self._lay_out(*low_tiles(work, size))
        # What a softmax of the anchors over candidates without gradient gives back is known in the forward pass.
        alone = len(self.asked) == 1 and isinstance(self.asked[0], LogSumExp)
        wanted = work.wants_anchor or (numbers[0], "scale") in work.wants_argument
        # The sum of dL/ds * s over all pairs is that of the anchors against their gradient, once or, mirrored, twice.
        self.fixed = [part.fixed for part in work.pairs.candidates[: self.mirrored]]
        one_kind = self.mirrored in (0, len(work.parts)) and work.wants_anchor and all(work.wants_part)
        one_kind = one_kind and not any(self.fixed)
        self.by_anchor = alone and not above and one_kind and (numbers[0], "scale") in work.wants_argument
        self.learns = any(number in numbers for number, _ in work.wants_argument) and not self.by_anchor
        # What the forward pass leaves to the backward pass: exponentials where they are all it takes, or similarities.
        self.keeps_exponentials = alone and not self.learns and not above
        similarities = work.x.shape[-2] * work.starts[-1] * math.prod(work.heads)
        self.most_kept = KEPT if similarities <= WORTH_KEEPING * KEPT else 0
        self.at_once = [
            alone and wanted and not wants and part >= self.mirrored for part, wants in enumerate(work.wants_part)
        ]

    def _lay_out(self, height: int, width: int) -> None:
        """Cut the pairs into tiles of so many rows and columns, or find how that was done before."""
        self.height, self.width, identity = height, width, self.work.identity
        whole = tuple(
            (
                asked.over,
                *(identity.whole(asked.rows, run) for run in identity.anchor_runs),
                *(identity.whole(asked.among, run) for run in identity.candidate_runs),
            )
            for asked in self.asked
        )
        key = ("tiles", height, width, self.mirrored, whole)
        plan: _Plan | None = identity.kept.get(key)
        if plan is None:
            plan = identity.kept[key] = self._plan()
        self.rows, self.columns, self.tiles, self._blanks = plan

    def _shapes(self) -> set[tuple[int, int]]:
        """Give the shapes of these tiles, and of those that thresholds are found in."""
        low = blocks(self.work, *low_tiles(self.work, self.size))
        return {
            (row, column)
            for rows, columns in (low, (self.rows, self.columns))
            for row in {run.stop - run.start for run in rows}
            for column in {run.stop - run.start for run in columns}
        }

    @staticmethod
    def accepts(work: Work, number: int) -> bool:
        """Say whether this reduction has numbers for arguments, and whole runs for `among` and `rows`."""
        asked = work.asked[number]
        if not isinstance(asked, LogSumExp | SoftMean | SoftplusSum):
            return False
        if getattr(asked, "above", None) is not None and (work.heads or isinstance(asked, SoftMean)):
            return False
        if getattr(asked, "log_weight", None) is not None or (work.rules and asked.over != "positive"):
            return False
        if not _is_number(asked.scale, work.heads):
            return False
        learned = (number, "scale") in work.wants_argument
        if learned and (isinstance(asked, SoftMean) or not bool(torch.as_tensor(asked.scale).all())):
            return False
        if isinstance(asked, SoftplusSum) and isinstance(asked.bias, Tensor) and asked.bias.ndim > 1:
            return False
        identity = work.identity
        runs = ((asked.rows, identity.anchor_runs), (asked.among, identity.candidate_runs))
        return all(identity.whole(which, run) is not None for which, of in runs for run in of)

    def _may_mirror(self) -> bool:
        per_row = any(_spans(getattr(asked, "bias", None)) for asked in self.asked)
        runs = self.work.identity.candidate_runs if self.work.mirrored else []
        views = [run.view for run in runs if run.part < self.work.mirrored]
        return not per_row and all(view is not None and view >= 0 for view in views)

    def _plan(self) -> _Plan:
        """Give the blocks of anchors and of candidates, the tiles that serve anyone, and a place for what is blank."""
        identity = self.work.identity
        candidates, anchors = identity.candidate_runs, identity.anchor_runs
        if self.mirrored:
            own = [run for run in candidates if run.part < self.mirrored]
            if not identity.across and all(asked.rows is None and asked.among is None for asked in self.asked):
                # Views make no difference then, so that blocks may span them.
                own = [Run(own[0].start, own[-1].stop, own[0].view, 0)] if own else []
            anchors, candidates = own, [*own, *(run for run in candidates if run.part >= self.mirrored)]
        rows = [block for run in anchors for block in cut(run, self.height)]
        columns = [block for run in candidates for block in cut(run, self.width)]
        meets = [
            [
                [
                    identity.whole(asked.rows, i)
                    and identity.whole(asked.among, j)
                    and identity.meets(i, j, asked.over)
                    for j in columns
                ]
                for i in rows
            ]
            for asked in self.asked
        ]
        tiles = []
        kinds: dict[tuple[tuple[bool, bool], ...], tuple[tuple[bool, bool], ...]] = {}
        for i, j in itertools.product(range(len(rows)), range(len(columns))):
            mirror = columns[j].part < self.mirrored
            if mirror and j < i:
                continue
            serves = tuple((bool(met[i][j]), bool(mirror and i != j and met[j][i])) for met in meets)
            if any(row or column for row, column in serves):
                tiles.append(_Tile(i, j, mirror, kinds.setdefault(serves, serves)))
        return rows, columns, tiles, {}

    def _terms(self, head: int) -> list[_Term]:
        terms, identity = [], self.work.identity
        for number, asked in zip(self.numbers, self.asked, strict=True):
            scale = _of_head(asked.scale, head)
            bias: float | Tensor = 0.0
            if isinstance(asked, SoftplusSum):
                bias = asked.bias if isinstance(asked.bias, Tensor) and _spans(asked.bias) else _number(asked.bias)
            reach = abs(scale) * self.reach
            widest = WIDEST[self.work.x.dtype]
            shift = 0.0 if isinstance(asked, SoftplusSum) else max(0.0, reach - widest)
            highest = float(bias.max()) if isinstance(bias, Tensor) else bias
            if not math.isfinite(reach) or (isinstance(asked, SoftplusSum) and not reach + highest <= widest):
                raise NotBoundedError
            blank = identity.excluded if asked.over == "all" or identity.strangers is None else identity.strangers
            terms.append(_Term(number, asked, scale, shift, bias, blank))
        return terms

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """Give the reductions, (N,) or (H, N) each, and what the backward pass needs of this one.

        Raises:
            NotBoundedError: where an exponent may have left the range.
        """
        work = self.work
        self._measure()
        heads = work.heads[0] if work.heads else 1
        sums = work.x.new_zeros(len(self.asked), heads, work.x.shape[-2])
        moments = torch.zeros_like(sums) if any(isinstance(asked, SoftMean) for asked in self.asked) else None
        weighted = work.x.new_zeros(heads, *work.x.shape[-2:]) if any(self.at_once) else None
        self.kept: list[Tensor] = []
        self.room = self.most_kept
        for head in range(heads):
            self._forward(head, sums[:, head], moments if moments is None else moments[:, head], weighted)
        outputs, saved = [], []
        for place, asked in enumerate(self.asked):
            total = sums[place]
            if isinstance(asked, SoftplusSum):
                outputs.append(total)
                continue
            value, normaliser = self.finish(place, total)
            saved.append(normaliser)
            if isinstance(asked, SoftMean):
                assert moments is not None
                value = moments[place] / total.masked_fill(total == 0, 1)
            outputs.append(value)
        if weighted is not None:
            saved.append(weighted)
        saved += self.kept
        return [output if work.heads else output[0] for output in outputs], saved

    def _measure(self) -> None:
        """Find how large a similarity can be."""
        pairs = self.work.pairs
        longest = [
            1.001 if known.unit else _longest(z)
            for known, z in zip((pairs.anchor, *pairs.candidates), (self.work.x, *self.work.parts), strict=True)
        ]
        self.reach = longest[0] * max(longest[1:], default=0.0)

    def finish(self, place: int, total: Tensor) -> tuple[Tensor, Tensor]:
        """Give the log-sum-exp that shifted sums of exponentials stand for, and the same for the backward pass.

        Args:
            place: which of the reductions.
            total: the sums, (H, N) or (1, N).

        Raises:
            NotBoundedError: where a sum may have lost terms.
        """
        asked, heads = self.asked[place], range(len(total))
        shift = total.new_tensor([self._terms(head)[place].shift for head in heads]).unsqueeze(-1)
        faint = (total < math.exp(FAINT)) & (shift > 0)
        counts = self.work.identity.count
        if bool(faint.any()) and bool((faint & (counts(asked.over, asked.among, asked.rows) > 0)).any()):
            raise NotBoundedError
        empty = total == 0
        value = total.masked_fill(empty, 1).log_().add_(shift)
        return value.masked_fill(empty, nothing(value.dtype)), value.masked_fill(empty, math.inf)

    def leave(self, rows: list[Run]) -> None:
        """Leave the forward pass of a single log-sum-exp to somebody who goes by strips of whole rows."""
        self.at_once = [False] * len(self.at_once)
        self.kept = []
        seen = self.rows == rows and not self.learns and all(spot.serves[0][0] for spot in self.tiles)
        self.room = self.most_kept = self.most_kept if seen else 0

    def keep(self, i: int, strip: Tensor) -> None:
        """Keep what there is room for of a strip, of which the backward pass would compute the similarities again."""
        for spot in self.tiles if self.room > 0 else ():
            if spot.i == i and self._returns(spot):
                columns = self.columns[spot.j]
                self.room -= len(strip) * (columns.stop - columns.start)
                if self.room >= 0:
                    self.kept.append(strip[:, columns.start : columns.stop].clone())

    def exponent(self) -> tuple[float, float]:
        """Give the scale and the shift of a single log-sum-exp.

        Raises:
            NotBoundedError: where exponents have no bound.
        """
        self._measure()
        (term,) = self._terms(0)
        return term.scale, term.shift

    def _forward(self, head: int, sums: Tensor, moments: Tensor | None, weighted: Tensor | None) -> None:
        terms, x, parts = self._terms(head), _head(self.work.x, head), self._parts(head)
        fold = _common_scale(terms)
        buffers = _Buffers(x, 4)
        scaled, block = x, -1
        for spot in self.tiles:
            i, j = spot.i, spot.j
            rows, columns = self.rows[i], self.columns[j]
            if i != block:
                scaled, block = x[rows.start : rows.stop], i
                # Without a scale these very numbers, where they stand: a copy elsewhere may give another last digit.
                scaled = scaled if fold is None else scaled * fold
            others = self._others(x, parts, spot)
            tile = torch.mm(scaled, others.T, out=self._place(buffers, spot))
            for place, (term, (row, column)) in enumerate(zip(terms, spot.serves, strict=True)):
                if not (row or column):
                    continue
                # The tile itself may be overwritten where nobody reads it again.
                keep = place + 1 < len(terms) or isinstance(term.asked, SoftMean) or fold is None
                keep = keep or not self.keeps_exponentials
                e = buffers.tile(1, rows, columns) if keep else tile
                self._exponential(term, tile, e, fold, i, j)
                if isinstance(term.asked, SoftplusSum):
                    self._add_softplus(sums[place], e, i, j, row, column)
                    continue
                if getattr(term.asked, "above", None) is not None:
                    if column:
                        kept = self._kept_by_columns(term, tile, i, j, buffers)
                        self._add(sums[place], kept.mul_(e), i, j, row=False, column=True)
                    if not row:
                        continue
                    column, e = False, self._kept_by_rows(term, tile, i, j, buffers).mul_(e)
                self._add(sums[place], e, i, j, row, column)
                if weighted is not None and self.at_once[columns.part]:
                    weighted[head, rows.start : rows.stop].addmm_(e, others)
                if isinstance(term.asked, SoftMean) and moments is not None:
                    e.mul_(tile)
                    if fold is not None:
                        e.div_(fold)
                    self._add(moments[place], e, i, j, row, column)

    def _fixed(self, run: Run) -> bool:
        """Say whether nobody asks for the gradient of these anchors."""
        return any(self.fixed) and self.work.fixed(run.start, run.stop)

    def _place(self, buffers: _Buffers, spot: _Tile) -> Tensor:
        """Give room for a tile: of its own while there is room to keep it, else the one that all share."""
        rows, columns = self.rows[spot.i], self.columns[spot.j]
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if not self._returns(spot):
            return buffers.tile(0, rows, columns)
        self.room -= height * width
        if self.room < 0:
            return buffers.tile(0, rows, columns)
        self.kept.append(self.work.x.new_empty(height, width))
        return self.kept[-1]

    def _returns(self, spot: _Tile) -> bool:
        """Say whether the backward pass visits a tile."""
        part = self.columns[spot.j].part
        if spot.mirror and self._fixed(self.rows[spot.i]) and self._fixed(self.columns[spot.j]) and not self.learns:
            return False
        return not self.at_once[part] and (self.learns or self.work.wants_anchor or self.work.wants_part[part])

    def _exponential(
        self, term: _Term, tile: Tensor, out: Tensor, fold: float | None, i: int, j: int, share: bool = False
    ) -> None:
        """Write exp(scale * s + bias - shift), 0 where a pair does not count; with `share` softplus's."""
        logits = tile if fold is not None else torch.mul(tile, term.scale, out=out)
        if isinstance(term.bias, Tensor):
            logits = torch.add(logits, term.bias[self.rows[i].start : self.rows[i].stop].unsqueeze(1), out=out)
        elif term.bias - term.shift:
            logits = torch.add(logits, term.bias - term.shift, out=out)
        if share and isinstance(term.asked, SoftplusSum):
            torch.sigmoid(logits, out=out)
        else:
            torch.exp(logits, out=out)
        self._blank(term, out, i, j)

    def _kept_by_rows(self, term: _Term, tile: Tensor, i: int, j: int, buffers: _Buffers) -> Tensor:
        """Write 1 for similarities at or above their anchors' thresholds, and 0.

        They are numbers: filling by a mask of bool takes several times longer.
        """
        rows, columns = self.rows[i], self.columns[j]
        above = term.asked.above[rows.start : rows.stop].unsqueeze(1)  # type: ignore[union-attr, index]
        return torch.ge(tile, above, out=buffers.tile(BY_ROWS, rows, columns))

    def _kept_by_columns(self, term: _Term, tile: Tensor, i: int, j: int, buffers: _Buffers) -> Tensor:
        """Write the same for the thresholds of the candidates, which are anchors too."""
        rows, columns = self.rows[i], self.columns[j]
        above = term.asked.above[columns.start : columns.stop]  # type: ignore[union-attr, index]
        return torch.ge(tile, above, out=buffers.tile(BY_COLUMNS, rows, columns))

    def _blank(self, term: _Term, e: Tensor, i: int, j: int) -> None:
        """Set to 0 what does not count: the pairs listed for this tile, or whole groups where they are many."""
        entries = self._entries(term.blank).get((i, j))
        if entries is not None:
            e.view(-1).index_fill_(0, entries, 0)
        if term.asked.over != "all" and self.work.identity.strangers is None:
            anchors, candidates, _ = self.work.identity.groups
            rows, columns = self.rows[i], self.columns[j]
            same = anchors[rows.start : rows.stop, None] == candidates[columns.start : columns.stop]
            e.masked_fill_(~same if term.asked.over == "positive" else same, 0)

    def _entries(self, pairs: Matches | None) -> dict[tuple[int, int], Tensor]:
        assert pairs is not None
        known = self._blanks.get(id(pairs))
        if known is None:
            known = self._blanks[id(pairs)] = by_tile(pairs, self.rows, self.columns)
        return known

    def _add(self, into: Tensor, e: Tensor, i: int, j: int, row: bool, column: bool) -> None:
        if row:
            into[self.rows[i].start : self.rows[i].stop] += e.sum(1)
        if column:
            into[self.columns[j].start : self.columns[j].stop] += e.sum(0)

    def _add_softplus(self, into: Tensor, e: Tensor, i: int, j: int, row: bool, column: bool) -> None:
        for serves, run, dim in ((row, self.rows[i], 1), (column, self.columns[j], 0)):
            if serves:
                into[run.start : run.stop] += sum_of_log1p(e, dim)

    def backward(self, outputs: list[Tensor], saved: list[Tensor], upstream: list[Tensor], into: Gradients) -> None:
        """Add the gradients, tile by tile, from the similarities computed again."""
        work = self.work
        count = sum(not isinstance(asked, SoftplusSum) for asked in self.asked)
        weighted = saved[count] if any(self.at_once) else None
        kept = iter(saved[count + (weighted is not None) :])
        self.room = self.most_kept
        for head in range(work.heads[0] if work.heads else 1):
            terms, normalisers = self._terms(head), iter(saved)
            factors: list[tuple[Tensor, Tensor | None]] = []
            for term, output, given in zip(terms, outputs, upstream, strict=True):
                g = given[head] if work.heads else given
                if isinstance(term.asked, SoftplusSum):
                    factors.append((g * term.scale, None))
                    continue
                p = g * (term.shift - next(normalisers)[head]).exp()
                if isinstance(term.asked, LogSumExp):
                    factors.append((p * term.scale, None))
                elif term.asked.detach:
                    factors.append((p, None))
                else:
                    value = output[head] if work.heads else output
                    factors.append((p * (1 - term.scale * value), p * term.scale))
            self._backward(head, terms, factors, kept, into)
            if weighted is not None:
                self._add_at_once(head, terms[0], factors[0][0].unsqueeze(1), weighted[head], into)

    def _add_at_once(self, head: int, term: _Term, factor: Tensor, weighted: Tensor, into: Gradients) -> None:
        """Add the gradient of the anchors, factor * weighted, and of the scale by it."""
        if into.anchor is not None:
            _head(into.anchor, head).addcmul_(factor, weighted)
        if (term.number, "scale") in into.arguments:
            slices = zip(*(torch.split(z, SLICE) for z in (factor, weighted, _head(self.work.x, head))), strict=True)
            share = torch.stack([(f * w * z).sum() for f, w, z in slices]).sum() / term.scale
            _add_to_head(into.arguments[term.number, "scale"], head, share)

    def _backward(
        self,
        head: int,
        terms: list[_Term],
        factors: list[tuple[Tensor, Tensor | None]],
        kept: Iterator[Tensor],
        into: Gradients,
    ) -> None:
        x, parts = _head(self.work.x, head), self._parts(head)
        to_x = None if into.anchor is None else _head(into.anchor, head)
        to_parts = [None if gradient is None else _head(gradient, head) for gradient in into.parts]
        fold = _common_scale(terms)
        before = _dot(x, to_x) if self.by_anchor else None
        buffers = _Buffers(x, 5)
        scaled, block = x, -1
        for spot in self.tiles:
            i, j = spot.i, spot.j
            rows, columns = self.rows[i], self.columns[j]
            to_y = to_x if spot.mirror else to_parts[columns.part]
            if not self._returns(spot):
                continue
            anchors, others = x[rows.start : rows.stop], self._others(x, parts, spot)
            self.room -= (rows.stop - rows.start) * (columns.stop - columns.start)
            here = self.room >= 0
            if here and self.keeps_exponentials:
                diagonal, (row, column) = spot.mirror and i == j, spot.serves[0]
                factor = self._factor(factors[0][0], i, j, row, column or diagonal)
                gradient = torch.mul(next(kept), factor, out=buffers.tile(0, rows, columns))
                self._send(spot, gradient, anchors, others, to_x, to_y)
                continue
            if here:
                tile = next(kept)
            else:
                if i != block:
                    scaled, block = anchors if fold is None else anchors * fold, i
                tile = torch.mm(scaled, others.T, out=buffers.tile(0, rows, columns))
            total: Tensor | None = None
            diagonal = spot.mirror and i == j
            for place, (term, (row, column)) in enumerate(zip(terms, spot.serves, strict=True)):
                if not (row or column):
                    continue
                spare = place + 1 == len(terms) and factors[place][1] is None and not self.learns and fold is not None
                spare = spare and not here
                e = tile if spare else buffers.tile(1 if total is None else 2, rows, columns)
                self._exponential(term, tile, e, fold, i, j, share=True)
                if getattr(term.asked, "above", None) is None:
                    self._times(e, tile, factors[place], fold, i, j, row, column or diagonal)
                else:
                    self._times_kept(term, e, tile, factors[place][0], i, j, row, column or diagonal, buffers)
                if self.learns:
                    self._learn(term, e, tile, fold, i, 0.5 if diagonal else 1.0, head, into)
                total = e if total is None else total.add_(e)
            assert total is not None
            self._send(spot, total, anchors, others, to_x, to_y)
        if before is not None:
            sides = 2 if self.mirrored else 1
            share = (_dot(x, to_x) - before) / (sides * terms[0].scale)
            _add_to_head(into.arguments[terms[0].number, "scale"], head, share)

    def _send(
        self, spot: _Tile, gradient: Tensor, anchors: Tensor, others: Tensor, to_x: Tensor | None, to_y: Tensor | None
    ) -> None:
        """Add what a tile of dL/ds gives its anchors and its candidates."""
        rows, columns = self.rows[spot.i], self.columns[spot.j]
        if to_x is not None and not self._fixed(rows):
            to_x[rows.start : rows.stop].addmm_(gradient, others)
        if to_y is not None and not (spot.mirror and (spot.i == spot.j or self._fixed(columns))):
            own = slice(columns.start, columns.stop) if spot.mirror else self._within(columns)
            to_y[own].addmm_(gradient.T, anchors)

    def _times(
        self,
        e: Tensor,
        tile: Tensor,
        factors: tuple[Tensor, Tensor | None],
        fold: float | None,
        i: int,
        j: int,
        row: bool,
        column: bool,
    ) -> None:
        """Multiply by the anchors' factors, those of the rows and, where the tile serves them, of the columns."""
        constant, slope = (self._factor(one, i, j, row, column) for one in factors)
        if slope is None:
            e.mul_(constant)
        else:
            e.mul_(torch.addcmul(constant, tile, slope, value=1.0 if fold is None else 1 / fold))

    def _times_kept(
        self,
        term: _Term,
        e: Tensor,
        tile: Tensor,
        factor: Tensor,
        i: int,
        j: int,
        row: bool,
        column: bool,
        buffers: _Buffers,
    ) -> None:
        """Multiply by the factor of whoever's threshold is reached: the anchor's, the candidate's, or both."""
        kept = []
        if row:
            own = self._factor(factor, i, j, row=True, column=False)
            kept.append(self._kept_by_rows(term, tile, i, j, buffers).mul_(own))
        if column:
            other = self._factor(factor, i, j, row=False, column=True)
            kept.append(self._kept_by_columns(term, tile, i, j, buffers).mul_(other))
        e.mul_(kept[0].add_(kept[1]) if len(kept) == 2 else kept[0])

    def _factor(self, factor: Tensor | None, i: int, j: int, row: bool, column: bool) -> Any:
        if factor is None:
            return None
        rows = factor[self.rows[i].start : self.rows[i].stop].unsqueeze(1)
        columns = factor[self.columns[j].start : self.columns[j].stop] if column else None
        if columns is None:
            return rows
        return rows + columns if row else columns.unsqueeze(0)

    def _learn(
        self, term: _Term, e: Tensor, tile: Tensor, fold: float | None, i: int, share: float, head: int, into: Gradients
    ) -> None:
        """Add the gradient of the scale, sum of dL/dlogit * s, and of the bias, sum of dL/dlogit; e is dL/ds."""
        if (term.number, "scale") in into.arguments:
            total = torch.dot(e.view(-1), tile.view(-1)) * (share / (term.scale * (fold or 1.0)))
            _add_to_head(into.arguments[term.number, "scale"], head, total)
        if (term.number, "bias") in into.arguments:
            to_bias = into.arguments[term.number, "bias"]
            if _spans(to_bias):
                to_bias[self.rows[i].start : self.rows[i].stop] += e.sum(1) / term.scale
            else:
                to_bias += (e.sum() * (share / term.scale)).reshape(to_bias.shape)

    def _parts(self, head: int) -> list[Tensor]:
        return [_head(part, head) for part in self.work.parts]

    def _others(self, x: Tensor, parts: list[Tensor], spot: _Tile) -> Tensor:
        """Give the candidates of a tile."""
        columns = self.columns[spot.j]
        return x[columns.start : columns.stop] if spot.mirror else parts[columns.part][self._within(columns)]

    def _within(self, columns: Run) -> slice:
        start = self.work.starts[columns.part]
        return slice(columns.start - start, columns.stop - start)


class _Buffers:
    """Tiles that are written again and again.

    Args:
        like: their dtype and device.
        count: how many.
    """

    def __init__(self, like: Tensor, count: int) -> None:
        self._like = like
        self._flat: list[Tensor | None] = [None] * count

    def tile(self, number: int, rows: Run, columns: Run) -> Tensor:
        """Give a buffer of the shape of this tile."""
        height, width = rows.stop - rows.start, columns.stop - columns.start
        flat = self._flat[number]
        if flat is None or len(flat) < height * width:
            flat = self._flat[number] = self._like.new_empty(height * width)
        return flat[: height * width].view(height, width)


def _dot(x: Tensor, y: Any) -> Tensor:
    """Give the sum of x * y, slice by slice."""
    slices = zip(torch.split(x, SLICE), torch.split(y, SLICE), strict=True)
    return torch.stack([(a * b).sum() for a, b in slices]).sum()


def _head(z: Tensor, head: int) -> Tensor:
    return z[head] if z.ndim == 3 else z


def _longest(z: Tensor) -> float:
    return math.sqrt(float(z.square().sum(dim=-1).max())) if z.numel() else 0.0


def _spans(value: object) -> bool:
    return isinstance(value, Tensor) and value.numel() > 1


def _is_number(value: object, heads: tuple[int, ...]) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 or (bool(heads) and value.shape == (*heads, 1, 1))
    return isinstance(value, int | float)


def _number(value: float | Tensor) -> float:
    """Give a number, or a tensor of one; 0 of none, which is the bias of no anchor."""
    return float(value.sum()) if isinstance(value, Tensor) else float(value)


def _of_head(value: float | Tensor, head: int) -> float:
    if not isinstance(value, Tensor):
        return float(value)
    return float(value) if value.numel() == 1 else float(value[head])


def _add_to_head(gradient: Tensor, head: int, share: Tensor) -> None:
    place = gradient if gradient.numel() == 1 else gradient[head]
    place += share.reshape(place.shape)


def _common_scale(terms: list[_Term]) -> float | None:
    """Give the one scale of all terms, which then goes into the product; None where they differ or it is 0."""
    scales = {term.scale for term in terms}
    if any(getattr(term.asked, "above", None) is not None for term in terms):
        return None  # thresholds are compared with the similarities themselves
    return scales.pop() or None if len(scales) == 1 else None
