"""Who is whose: what the integer identities say, found once for all tiles by sorting, never as an N x M mask.

Everything here looks at numbers on the host, so it serves the CPU; elsewhere a tile compares the identities itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from contrast.core.embeddings import PADDING, REMEMBERED, Embeddings, concatenate
from contrast.core.reductions.asked import Relation

FEW = 24
"""Matches are listed pair by pair up to this many for each anchor and candidate."""
GATHERED = 2048
"""Listed pairs whose vectors are put side by side at a time."""
MANY = 2**16
"""Lists of more pairs than this are not kept once what is asked of them is known."""
RUNS = 64
"""More runs of one view than this are not told apart."""


@dataclass(frozen=True)
class Run:
    """Neighbouring rows of one view: [start, stop), and the part of the candidates that they stand in.

    `view` is None where views are mixed.
    """

    start: int
    stop: int
    view: int | None
    part: int = 0


@dataclass(frozen=True, eq=False)
class Matches:
    """Pairs (anchor, candidate) one by one, (P,) int64 each, in any order; candidates count over all parts."""

    rows: Tensor
    columns: Tensor
    kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __getitem__(self, which: Tensor) -> Matches:
        return Matches(self.rows[which], self.columns[which])

    def __len__(self) -> int:
        return len(self.rows)

    def one_each(self, count: int) -> bool:
        """Say whether these are one pair for each of `count` anchors, in order."""
        if "one each" not in self.kept:
            same = len(self) == count and bool(torch.equal(self.rows, torch.arange(count)))
            self.kept["one each"] = same
        known: bool = self.kept["one each"]
        return known

    def pieces(self, starts: Sequence[int]) -> list[tuple[Any, Any, int, Any]]:
        """Cut the list into pieces gathered at once: (where in the list, rows, part, columns of the part).

        Each is a slice where the pairs are neighbours.

        Args:
            starts: where each part starts among all candidates, and where the last one ends.
        """
        if "pieces" not in self.kept:
            self.kept["pieces"] = [
                piece for part in range(len(starts) - 1) for piece in self._pieces(part, starts[part], starts[part + 1])
            ]
        known: list[tuple[Any, Any, int, Any]] = self.kept["pieces"]
        return known

    def _pieces(self, part: int, start: int, stop: int) -> Iterator[tuple[Any, Any, int, Any]]:
        where = ((self.columns >= start) & (self.columns < stop)).nonzero().squeeze(1)
        rows, columns = self.rows[where], self.columns[where] - start
        steps = [value[1:] - value[:-1] != 1 for value in (where, rows, columns)]
        breaks = (steps[0] | steps[1] | steps[2]).nonzero().squeeze(1)
        if len(breaks) > FEW:
            for at in torch.split(torch.arange(len(where)), GATHERED):
                yield where[at], rows[at], part, columns[at]
        elif len(where):
            edges = [0, *(breaks + 1).tolist(), len(where)]
            for first, last in itertools.pairwise(edges):
                for begin in range(first, last, GATHERED):
                    firsts = [int(value[begin]) for value in (where, rows, columns)]
                    length = min(begin + GATHERED, last) - begin
                    made = [slice(value, value + length) for value in firsts]
                    yield made[0], made[1], part, made[2]


def identify(anchor: Embeddings, candidates: Sequence[Embeddings], across: bool) -> Identity:
    """Give what the identities say; what is known of it without looking is kept from call to call."""
    own = anchor.parts or (anchor,)
    known = [part.known for part in (*own, *candidates)]
    first = known[0]
    if anchor.z.device.type != "cpu" or first is None:
        return Identity(anchor, candidates, across)
    layout = []
    for part, what in zip((*own, *candidates), known, strict=True):
        if what is None or (what.sample is not first.sample and not what.fresh):
            return Identity(anchor, candidates, across)
        layout.append((len(part), what.view, what.sample is first.sample))
    if any(view < 0 or not same for _, view, same in layout[: len(own)]):
        return Identity(anchor, candidates, across)
    # What inference mode makes may take part in no later training, so that it is not kept.
    known_of = _known.__wrapped__ if torch.is_inference_mode_enabled() else _known
    base = known_of(tuple(layout), len(own), across)
    return Identity(anchor, candidates, across, base) if any(what.grouped for what in known if what) else base


@lru_cache(maxsize=16)
def _known(layout: tuple[tuple[int, int, bool], ...], anchors: int, across: bool) -> Identity:
    """Give the identity of parts of (size, view, whether of the anchors' samples), every sample once in each."""
    made, strangers = [], 0
    for size, view, same in layout:
        sample = torch.arange(size)
        if not same:
            sample = -1 - strangers - sample
            strangers += size
        made.append(Embeddings(torch.empty(size, 0), sample, sample, torch.full((size,), view)))
    identity = Identity(concatenate(made[:anchors]), made[anchors:], across)
    identity.canonical = True
    return identity


class Identity:
    """What the identities of these anchors and candidates say of each pair.

    Args:
        anchor: N embeddings.
        candidates: the parts, M embeddings together.
        across: whether candidates of the anchor's own view do not count.
        base: what is known of the same samples and views, each sample being its own group.
    """

    def __init__(
        self, anchor: Embeddings, candidates: Sequence[Embeddings], across: bool, base: Identity | None = None
    ) -> None:
        self.across, self.base = across, base
        self.rows, self.columns = len(anchor), sum(len(part) for part in candidates)
        self.anchor_sample, self.anchor_group, self.anchor_view = anchor.sample, anchor.group, anchor.view
        self.sample = _joined([part.sample for part in candidates], anchor.sample)
        same = anchor.group is anchor.sample and all(part.group is part.sample for part in candidates)
        self.group = self.sample if same else _joined([part.group for part in candidates], anchor.group)
        self.view = _joined([part.view for part in candidates], anchor.view)
        self.sizes = [len(part) for part in candidates]
        self.kept: dict[Any, Any] = {}
        self.canonical = False

    @cached_property
    def anchor_runs(self) -> list[Run]:
        """The anchors' runs of one view, in order."""
        return self.base.anchor_runs if self.base else _runs(self.anchor_view, 0, 0)

    @cached_property
    def candidate_runs(self) -> list[Run]:
        """The candidates' runs of one view, none beyond its part, counted over all parts."""
        if self.base:
            return self.base.candidate_runs
        runs, start = [], 0
        for part, size in enumerate(self.sizes):
            runs += _runs(self.view[start : start + size], start, part)
            start += size
        return runs

    @cached_property
    def plain(self) -> bool:
        """Whether every run is of one known view and the pairs that need care are few enough to list."""
        runs = [*self.anchor_runs, *self.candidate_runs]
        return all(run.view is not None for run in runs) and self.excluded is not None

    @cached_property
    def _same_group(self) -> Matches | None:
        return _matches(self.anchor_group, self.group)

    @cached_property
    def _same_sample(self) -> Matches | None:
        if self.base:
            return self.base._same_sample
        if torch.equal(self.anchor_sample, self.anchor_group) and torch.equal(self.sample, self.group):
            return self._same_group
        return _matches(self.anchor_sample, self.sample)

    def _itself(self, pairs: Matches) -> Tensor:
        """Give (P,) bool: which of the pairs are an anchor and itself, or its own remembered sample."""
        view = self.view[pairs.columns]
        same = (view == self.anchor_view[pairs.rows]) | (view == REMEMBERED)
        if self._same_sample is not pairs:
            same &= self.sample[pairs.columns] == self.anchor_sample[pairs.rows]
        return same

    @cached_property
    def excluded(self) -> Matches | None:
        """Pairs that are neither positive nor negative because they are one sample; None where they are too many."""
        if self.base:
            return self.base.excluded
        return None if self._same_sample is None else self._same_sample[self._itself(self._same_sample)]

    @cached_property
    def positive(self) -> Matches | None:
        """The positives one by one; None where they are too many (labels)."""
        if self._same_group is None or self.excluded is None:
            return None
        eligible = ~self._itself(self._same_group)
        view, anchor_view = self.view[self._same_group.columns], self.anchor_view[self._same_group.rows]
        eligible &= (view != PADDING) & (anchor_view != PADDING)
        if self.across:
            eligible &= view != anchor_view
        found = self._same_group[eligible]
        if len(self._same_group) > MANY:
            # Both lists are made of these, and nothing more.
            for name in ("_same_group", "_same_sample"):
                self.__dict__.pop(name, None)
        return found

    @cached_property
    def strangers(self) -> Matches | None:
        """The pairs that `negative` leaves out, one by one: excluded and positive; None where they are too many."""
        if self.excluded is None or self.positive is None:
            return None
        rows = torch.cat([self.excluded.rows, self.positive.rows])
        return Matches(rows, torch.cat([self.excluded.columns, self.positive.columns]))

    @cached_property
    def groups(self) -> tuple[Tensor, Tensor, int]:
        """The groups numbered from 0: (N,) and (M,) int32, and how many there are."""
        values, numbers = torch.unique(torch.cat([self.anchor_group, self.group]), return_inverse=True)
        numbers = numbers.to(torch.int32)
        return numbers[: self.rows], numbers[self.rows :], len(values)

    def meets(self, anchors: Run, candidates: Run, over: Relation) -> bool:
        """Say whether anchors of one run may have candidates of the other at all; both of a known view."""
        if PADDING in (anchors.view, candidates.view):
            return False
        if over == "remembered" and candidates.view != REMEMBERED:
            return False
        return not (self.across and anchors.view == candidates.view)

    def count(self, over: Relation, among: Tensor | None, rows: Tensor | None) -> Tensor:
        """Count each anchor's candidates, (N,) int64; for a plain identity."""
        if not (self.owns(among) and self.owns(rows)):
            return self._count(over, among, rows)
        key = (over, id(among), id(rows))
        if key not in self.kept:
            self.kept[key] = self._count(over, among, rows)
        counts: Tensor = self.kept[key]
        return counts

    def once(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Give a tensor that the identities alone decide, made once for as long as they are kept."""
        if ("own", key) not in self.kept:
            made = self.kept["own", key] = make()
            self.kept["owned", id(made)] = made
        known: Tensor = self.kept["own", key]
        return known

    def owns(self, which: Tensor | None) -> bool:
        """Say whether this is nothing, or a tensor of `once`: what follows from it may be kept too."""
        return which is None or ("owned", id(which)) in self.kept

    def whole(self, which: Tensor | None, run: Run) -> bool | None:
        """Say whether all (True) or none (False) of a run are among `which`; None for some."""
        if which is None:
            return True
        key = ("whole", id(which), run)
        if key in self.kept:
            known: bool | None = self.kept[key]
            return known
        asked = int(which[run.start : run.stop].sum())
        found = True if asked == run.stop - run.start else None if asked else False
        if self.owns(which):
            self.kept[key] = found
        return found

    def nobody_lacks(self, *relations: Relation) -> bool:
        """Say whether there are anchors and each is known to have candidates in each of these relations.

        It is said only where it is known from call to call; elsewhere looking would cost more than it saves.
        """
        if self.base:
            # A group holds its sample's other views, and "all" does not ask for groups.
            return set(relations) <= {"positive", "all"} and self.base.nobody_lacks(*relations)
        if not self.canonical:
            return False
        if relations not in self.kept:
            least = [int(self.count(over, None, None).min()) if self.rows else 0 for over in relations]
            self.kept[relations] = self.rows > 0 and all(count > 0 for count in least)
        known: bool = self.kept[relations]
        return known

    def _count(self, over: Relation, among: Tensor | None, rows: Tensor | None) -> Tensor:
        counts = torch.zeros(self.rows, dtype=torch.int64)
        if over != "positive":
            for anchors in self.anchor_runs:
                met = [run for run in self.candidate_runs if self.meets(anchors, run, over)]
                counts[anchors.start : anchors.stop] = sum(
                    run.stop - run.start if among is None else int(among[run.start : run.stop].sum()) for run in met
                )
        if over in ("positive", "negative", "remembered"):
            sign = 1 if over == "positive" else -1
            counts += sign * self._count_positive(among, remembered=over == "remembered")
        if over in ("negative", "remembered", "all"):
            counts -= self._count_listed(self.excluded, among, remembered=over == "remembered")
        return counts if rows is None else counts * rows

    def _count_listed(self, pairs: Matches | None, among: Tensor | None, remembered: bool) -> Tensor:
        """Count listed pairs by anchor, those that a run could meet."""
        assert pairs is not None
        view, anchor_view = self.view[pairs.columns], self.anchor_view[pairs.rows]
        kept = (view != PADDING) & (anchor_view != PADDING)
        if self.across:
            kept &= view != anchor_view
        if among is not None:
            kept &= among[pairs.columns]
        if remembered:
            kept &= view == REMEMBERED
        return torch.bincount(pairs.rows[kept], minlength=self.rows)

    def _count_positive(self, among: Tensor | None, remembered: bool) -> Tensor:
        if self.positive is not None:
            return self._count_listed(self.positive, among, remembered)
        anchor_group, group, kinds = self.groups
        counts = torch.zeros(self.rows, dtype=torch.int64)
        for anchors in self.anchor_runs:
            if anchors.view == PADDING:
                continue
            table = torch.zeros(kinds, dtype=torch.int64)
            for run in self.candidate_runs:
                if self.meets(anchors, run, "remembered" if remembered else "all"):
                    weights = None if among is None else among[run.start : run.stop].double()
                    found = torch.bincount(group[run.start : run.stop], weights, minlength=kinds)
                    table += found.to(torch.int64)
            counts[anchors.start : anchors.stop] = table[anchor_group[anchors.start : anchors.stop].long()]
        assert self.excluded is not None
        same_group = self.group[self.excluded.columns] == self.anchor_group[self.excluded.rows]
        return counts - self._count_listed(self.excluded[same_group], among, remembered)


def _joined(values: list[Tensor], like: Tensor) -> Tensor:
    return values[0] if len(values) == 1 else torch.cat(values) if values else like[:0]


def _runs(view: Tensor, offset: int, part: int) -> list[Run]:
    if not len(view):
        return []
    if bool((view == view[0]).all()):
        return [Run(offset, offset + len(view), int(view[0]), part)]
    views, lengths = torch.unique_consecutive(view, return_counts=True)
    if len(views) > RUNS:
        return [Run(offset, offset + len(view), None, part)]
    runs, start = [], offset
    for value, length in zip(views.tolist(), lengths.tolist(), strict=True):
        runs.append(Run(start, start + length, value, part))
        start += length
    return runs


def _matches(anchor: Tensor, candidate: Tensor) -> Matches | None:
    """List the pairs of equal numbers; None where there are too many."""
    if len(anchor) < len(candidate):
        # The shorter list is the cheaper to sort: a queue may be long.
        turned = _matches(candidate, anchor)
        return None if turned is None else Matches(turned.columns, turned.rows)
    ordered, order = candidate.sort(stable=True)
    first = torch.searchsorted(ordered, anchor, out_int32=True)
    counts = torch.searchsorted(ordered, anchor, right=True, out_int32=True).sub_(first)
    del ordered
    total = int(counts.sum())
    if total > FEW * (len(anchor) + len(candidate)):
        return None
    rows = torch.repeat_interleave(torch.arange(len(anchor)), counts, output_size=total)
    # Where in the order a row's matches start, less how many matches stand before them.
    first += counts
    first -= counts.cumsum(0, dtype=torch.int32)
    return Matches(rows, order[torch.arange(total).add_(first[rows])])


def cut(run: Run, size: int) -> list[Run]:
    """Cut a run into blocks of at most `size`."""
    starts = range(run.start, run.stop, size)
    return [Run(start, min(start + size, run.stop), run.view, run.part) for start in starts]


def by_tile(pairs: Matches, rows: list[Run], columns: list[Run]) -> dict[tuple[int, int], Tensor]:
    """Sort listed pairs into the tiles: (block of anchors, block of candidates) -> positions in the flat tile."""
    row_start = torch.tensor([run.start for run in rows])
    column_start = torch.tensor([run.start for run in columns])
    width = torch.tensor([run.stop - run.start for run in columns])
    i = torch.bucketize(pairs.rows, row_start, right=True) - 1
    j = torch.bucketize(pairs.columns, column_start, right=True) - 1
    flat = (pairs.rows - row_start[i]) * width[j] + pairs.columns - column_start[j]
    tile, order = (i * len(columns) + j).sort(stable=True)
    tiles, counts = torch.unique_consecutive(tile, return_counts=True)
    parts = torch.split(flat[order], counts.tolist())
    return {divmod(key, len(columns)): part for key, part in zip(tiles.tolist(), parts, strict=True)}
