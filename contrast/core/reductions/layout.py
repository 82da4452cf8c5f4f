"""Which anchors have which candidates, as the integer identities say: found once per call, never as an (N, M) mask.

The N anchors and M candidates are cut into *blocks* of neighbours with one view, so that for two blocks it is mostly
known at once whether their pairs count. The few pairs that need care (itself, the positives) are *listed*: by sorting
the candidates' numbers and searching those of the anchors, in O((N + M) log M). Lists read numbers on the host, so they
serve the CPU; on another device, and where groups are large, a tile compares the identities itself (`relation`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from contrast.core.embeddings import PADDING, REMEMBERED, Embeddings
from contrast.core.reductions.kinds import Relation

FEW = 16
"""Pairs are listed where no sample, or no group, occurs more often than this among the candidates: enough for crops of
an image and small classes. Longer lists cost more than the sums of `means` and comparing in tiles."""
RUNS = 64
"""Embeddings with more runs of one view than this make one block of mixed views."""

Rule = Callable[..., Tensor]
"""rule(anchor, candidate, similarity, *rows of per_anchor) -> bool tile, True = leave this negative out."""


def relation(
    anchor: Embeddings,
    candidate: Embeddings,
    over: Relation,
    across: bool,
    rules: Sequence[tuple[Rule, Sequence[Tensor]]] = (),
    s: Tensor | None = None,
) -> Tensor:
    """Return (n, m) or (H, n, m) bool: which candidates stand in the relation `over` to which anchor.

    Args:
        anchor: n embeddings.
        candidate: m embeddings.
        over: the relation.
        across: whether candidates of the anchor's own view do not count.
        rules: (rule, its values for these n anchors), which leave out negatives.
        s: (n, m) or (H, n, m), their similarities, for the rules.
    """
    view, other_view = anchor.view[:, None], candidate.view
    remembered = other_view == REMEMBERED
    eligible = ~((anchor.sample[:, None] == candidate.sample) & ((view == other_view) | remembered))
    eligible &= (view != PADDING) & (other_view != PADDING)
    if across:
        eligible &= view != other_view
    same_group = anchor.group[:, None] == candidate.group
    if over == "positive":
        return eligible & same_group
    negative = eligible & ~same_group
    for rule, per_anchor in rules:
        with torch.no_grad():
            negative = negative & ~rule(anchor, candidate, s, *(values.unsqueeze(-1) for values in per_anchor))
    if over == "negative":
        return negative
    return negative & remembered if over == "remembered" else negative | (eligible & same_group)


@dataclass(frozen=True)
class Block:
    """Neighbouring anchors, or neighbouring candidates.

    Args:
        start: the first, among all anchors or all candidates.
        stop: the one after the last.
        source: the number of the `Embeddings` that they are part of, in `Layout.sources`.
        first: where these `Embeddings` start, among all anchors or all candidates.
        view: the view of all of them; None where views are mixed or were not looked at.
    """

    start: int
    stop: int
    source: int
    first: int
    view: int | None

    @property
    def all(self) -> slice:
        """Their places among all anchors or all candidates."""
        return slice(self.start, self.stop)

    @property
    def own(self) -> slice:
        """Their places in their `Embeddings`."""
        return slice(self.start - self.first, self.stop - self.first)

    def cut(self, size: int) -> list[Block]:
        """Cut into blocks of at most `size`."""
        starts = range(self.start, self.stop, size)
        return [Block(start, min(start + size, self.stop), self.source, self.first, self.view) for start in starts]


class Identities(NamedTuple):
    """The identities of all anchors, or of all candidates: int64 vectors of one length."""

    sample: Tensor
    group: Tensor
    view: Tensor


class Listed(NamedTuple):
    """Pairs one by one, (P,) int64 each: the places of the anchors and of the candidates among all, in any order."""

    anchors: Tensor
    candidates: Tensor

    def where(self, mask: Tensor) -> Listed:
        """Return the pairs at which a (P,) bool mask is True."""
        return Listed(self.anchors[mask], self.candidates[mask])


class Layout:
    """N anchors and M candidates as blocks of a few `Embeddings`, with the pairs that need care as lists.

    Args:
        anchors: the anchors, which follow one another.
        candidates: the candidates, which follow one another; a part of them may be a part of the anchors.
        across: whether only candidates of another view than the anchor's count.
        rules: (rule, its values for all anchors), which leave out negatives.
    """

    def __init__(
        self,
        anchors: Sequence[Embeddings],
        candidates: Sequence[Embeddings],
        across: bool = False,
        rules: Sequence[tuple[Rule, Sequence[Tensor]]] = (),
    ) -> None:
        self.anchors, self.candidates, self.across, self.rules = anchors, candidates, across, rules
        self.anchor_count, self.candidate_count = sum(map(len, anchors)), sum(map(len, candidates))

    @cached_property
    def sources(self) -> list[Embeddings]:
        """The distinct `Embeddings` among anchors and candidates: what gradients are computed for."""
        return list({id(part): part for part in (*self.anchors, *self.candidates)}.values())

    @property
    def vectors(self) -> list[Tensor]:
        """The vectors of the sources, with history, all in the same type: float32 or better."""
        dtype = torch.float32
        for part in self.sources:
            dtype = torch.promote_types(dtype, part.z.dtype)
        return [part.z.to(dtype) for part in self.sources]

    @property
    def heads(self) -> tuple[int, ...]:
        """(H,), or () without heads; candidates without heads are those of every head."""
        return max((tuple(part.z.shape[:-2]) for part in (*self.anchors, *self.candidates)), key=len)

    @property
    def on_host(self) -> bool:
        """True where numbers can be looked at without waiting for a device."""
        return self.anchors[0].z.device.type == "cpu"

    @cached_property
    def anchor_blocks(self) -> list[Block]:
        """The anchors in blocks of one view."""
        return self._blocks(self.anchors)

    @cached_property
    def candidate_blocks(self) -> list[Block]:
        """The candidates in blocks of one view."""
        return self._blocks(self.candidates)

    def _blocks(self, parts: Sequence[Embeddings]) -> list[Block]:
        number = {id(part): place for place, part in enumerate(self.sources)}
        blocks, first = [], 0
        for part in parts:
            views: list[int | None] = [None]
            lengths = [len(part)]
            if self.on_host and len(part):
                runs, counts = torch.unique_consecutive(part.view, return_counts=True)
                if len(runs) <= RUNS:
                    views, lengths = runs.tolist(), counts.tolist()
            start = first
            for view, length in zip(views, lengths, strict=True):
                blocks.append(Block(start, start + length, number[id(part)], first, view))
                start += length
            first += len(part)
        return blocks

    @property
    def anchors_are_candidates(self) -> bool:
        """True if the first candidates are the same objects as the anchors, as they are on one process."""
        same = (own is other for own, other in zip(self.anchors, self.candidates, strict=False))
        return len(self.anchors) <= len(self.candidates) and all(same)

    @cached_property
    def symmetric(self) -> bool:
        """True if s_ij = s_ji and the relation too is the same both ways, so that one tile serves i and j.

        Not where anchors are remembered entries: a remembered candidate of the anchor's sample is ignored, and the
        relation is not the same in the other direction. Not on another device, where views are not looked at.
        """
        views = [block.view for block in self.anchor_blocks]
        return self.anchors_are_candidates and all(view is not None and view >= 0 for view in views)

    def may_count(self, anchors: Block, candidates: Block, over: Relation) -> bool:
        """False if no pair of the two blocks can be in the relation, by their views."""
        view, other_view = anchors.view, candidates.view
        if view is None or other_view is None:
            return True
        if PADDING in (view, other_view) or (over == "remembered" and other_view != REMEMBERED):
            return False
        return not (self.across and view == other_view)

    @cached_property
    def anchor(self) -> Identities:
        """The identities of all N anchors."""
        return _identities(self.anchors)

    @cached_property
    def candidate(self) -> Identities:
        """The identities of all M candidates."""
        return _identities(self.candidates)

    def check_references(self) -> None:
        """Refuse embeddings without reference vectors.

        Raises:
            ValueError: where an anchor or a candidate has none.
        """
        if any(part.reference is None for part in (*self.anchors, *self.candidates)):
            raise ValueError("weight 'reference' needs the vectors of a frozen tower: give the loss reference=(N, R).")

    @cached_property
    def itself(self) -> Listed | None:
        """The pairs of one sample that are no candidates: the anchor itself, and remembered entries of its sample.

        None where samples are repeated too often to list them. The relation as a mask is `relation`.
        """
        pairs = self._equal(self.anchor.sample, self.candidate.sample)
        return None if pairs is None else pairs.where(self._is_itself(pairs))

    @cached_property
    def positive(self) -> Listed | None:
        """The positives, as `relation` has them; None where groups are too large to list them."""
        pairs = self._equal(self.anchor.group, self.candidate.group)
        if pairs is None:
            return None
        view, other_view = self.anchor.view[pairs.anchors], self.candidate.view[pairs.candidates]
        counts = ~self._is_itself(pairs) & (view != PADDING) & (other_view != PADDING)
        return pairs.where(counts & (view != other_view) if self.across else counts)

    @cached_property
    def positive_places(self) -> Tensor:
        """The listed positives as (N, k): the places of each anchor's among all candidates, -1 where it has fewer."""
        assert self.positive is not None
        return self.places(self.positive)

    def _equal(self, own: Tensor, others: Tensor) -> Listed | None:
        """List the pairs with equal numbers.

        The candidates alone decide whether that is too many: they are the same on every process, which must all
        compute the same way.
        """
        if not self.on_host:
            return None
        present = (self.candidate.view != PADDING).nonzero().squeeze(1)
        ordered, order = others[present].sort()
        if len(ordered) > FEW and bool((ordered[FEW:] == ordered[:-FEW]).any()):
            return None
        first, last = (torch.searchsorted(ordered, own, right=right) for right in (False, True))
        counts = last - first
        rows = torch.repeat_interleave(torch.arange(len(own)), counts)
        within = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
        return Listed(rows, present[order[first[rows] + within]])

    def _is_itself(self, pairs: Listed) -> Tensor:
        other_view = self.candidate.view[pairs.candidates]
        same_view = (other_view == self.anchor.view[pairs.anchors]) | (other_view == REMEMBERED)
        return same_view & (self.candidate.sample[pairs.candidates] == self.anchor.sample[pairs.anchors])

    def places(self, pairs: Listed) -> Tensor:
        """Arrange listed pairs as (N, k): the places of each anchor's candidates, -1 where it has fewer than k."""
        counts = torch.bincount(pairs.anchors, minlength=self.anchor_count)
        order = pairs.anchors.argsort(stable=True)
        rows, columns = pairs.anchors[order], pairs.candidates[order]
        places = torch.full((self.anchor_count, int(counts.max()) if len(rows) else 0), -1)
        places[rows, torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]] = columns
        return places

    @cached_property
    def groups(self) -> tuple[Tensor, Tensor, int]:
        """The groups of anchors and of candidates numbered from 0, and how many there are."""
        values, numbers = torch.unique(torch.cat([self.anchor.group, self.candidate.group]), return_inverse=True)
        return *numbers.split([self.anchor_count, self.candidate_count]), len(values)

    def heads_count_alike(self, over: Relation, above: object | None) -> bool:
        """True if a count is (N,) with heads too: neither a threshold nor a rule reads their similarities."""
        return above is None and (over == "positive" or not self.rules)

    def count(self, over: Relation, among: Tensor | None = None, rows: Tensor | None = None) -> Tensor | None:
        """Count each anchor's candidates, (N,) int64, from lists and group sizes; None where that is not possible."""
        if over == "positive" and among is None and self.positive is not None:
            counts = torch.bincount(self.positive.anchors, minlength=self.anchor_count)
            return counts if rows is None else counts * rows
        if self.itself is None or (self.rules and over != "positive"):
            return None
        own, others, total = self.groups
        i, j = self.itself
        counts = torch.zeros(self.anchor_count, dtype=torch.int64)
        for view in set(torch.unique(self.anchor.view).tolist()) - {PADDING}:
            reachable, mine = self._candidates_of(view, over, among), self.anchor.view == view
            of_group = torch.bincount(others[reachable], minlength=total)[own[mine]]
            # The pairs of an anchor with itself are among these numbers; they are counted apart and subtracted.
            if over == "positive":
                counts[mine], wrong = of_group, own[i] == others[j]
            elif over == "all":
                counts[mine], wrong = reachable.sum(), torch.ones_like(i, dtype=torch.bool)
            else:
                counts[mine], wrong = reachable.sum() - of_group, own[i] != others[j]
            counts -= torch.bincount(i[wrong & mine[i] & reachable[j]], minlength=self.anchor_count)
        return counts if rows is None else counts * rows

    def _candidates_of(self, view: int, over: Relation, among: Tensor | None) -> Tensor:
        """Return (M,) bool: the candidates of anchors of a view, before groups and samples are compared."""
        other_view = self.candidate.view
        reached = other_view != PADDING if over != "remembered" else other_view == REMEMBERED
        reached = reached & (other_view != view) if self.across else reached
        return reached if among is None else reached & among


def _identities(parts: Sequence[Embeddings]) -> Identities:
    return Identities(*(torch.cat([getattr(part, name) for part in parts]) for name in Identities._fields))
