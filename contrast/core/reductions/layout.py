"""Which anchors have which candidates, from the integer identities: once per call, never as an (N, M) mask.

The N anchors and M candidates are cut into *blocks* of consecutive rows with one view, so that the views of two blocks
mostly decide whether their pairs count. The exceptions (itself, the positives) are *listed*: the candidates' numbers
are sorted and those of the anchors searched, in O((N + M) log M). Lists read numbers on the host, so they are made on
the CPU only; on another device, and where groups are large, each tile compares the identities (`relation`).
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

MAX_LISTED = 16
"""Pairs are listed if no sample, or no group, occurs more often than this among the candidates: enough for crops of an
image and small classes. Longer lists cost more than the sums of `means` and comparing in tiles."""
MAX_RUNS = 64
"""Embeddings with more runs of equal views than this are one block of mixed views."""

Rule = Callable[..., Tensor]
"""rule(anchor, candidate, similarity, *rows of per_anchor) -> bool tile, True = exclude this negative."""


def relation(
    anchor: Embeddings,
    candidate: Embeddings,
    over: Relation,
    across: bool,
    rules: Sequence[tuple[Rule, Sequence[Tensor]]] = (),
    s: Tensor | None = None,
) -> Tensor:
    """Return (n, m) or (H, n, m) bool: True where a candidate is in the relation `over` to an anchor.

    Args:
        anchor: n embeddings.
        candidate: m embeddings.
        over: the relation.
        across: True if candidates of the anchor's own view do not count.
        rules: (rule, its values for these n anchors), which exclude negatives.
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
    """Consecutive anchors, or consecutive candidates.

    Args:
        start: the first, among all anchors or all candidates.
        stop: the one after the last.
        source: the index in `Layout.sources` of the `Embeddings` that they are part of.
        first: where these `Embeddings` start, among all anchors or all candidates.
        view: the view of all of them; None where views are mixed or were not read.
    """

    start: int
    stop: int
    source: int
    first: int
    view: int | None

    @property
    def all(self) -> slice:
        """Their positions among all anchors or all candidates."""
        return slice(self.start, self.stop)

    @property
    def own(self) -> slice:
        """Their positions in their `Embeddings`."""
        return slice(self.start - self.first, self.stop - self.first)

    def cut(self, size: int) -> list[Block]:
        """Return blocks of at most `size` rows."""
        starts = range(self.start, self.stop, size)
        return [Block(start, min(start + size, self.stop), self.source, self.first, self.view) for start in starts]


class Identities(NamedTuple):
    """The identities of all anchors, or of all candidates: int64 vectors of one length."""

    sample: Tensor
    group: Tensor
    view: Tensor


class ListedPairs(NamedTuple):
    """P pairs in any order: the indices of the anchors and of the candidates among all, (P,) int64 each."""

    anchors: Tensor
    candidates: Tensor

    def where(self, mask: Tensor) -> ListedPairs:
        """Return the pairs where a (P,) bool mask is True."""
        return ListedPairs(self.anchors[mask], self.candidates[mask])


class Layout:
    """N anchors and M candidates as blocks of a few `Embeddings`, with lists of the pairs that are exceptions.

    Args:
        anchors: the anchors, part by part.
        candidates: the candidates, part by part; parts may be the same objects as those of the anchors.
        across: True if only candidates of another view than the anchor's count.
        rules: (rule, its values for all anchors), which exclude negatives.
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
        """The distinct `Embeddings` among anchors and candidates; each has one gradient."""
        return list({id(part): part for part in (*self.anchors, *self.candidates)}.values())

    @property
    def vectors(self) -> list[Tensor]:
        """The vectors of the sources, with autograd history, all in the same type: float32 or better."""
        dtype = torch.float32
        for part in self.sources:
            dtype = torch.promote_types(dtype, part.z.dtype)
        return [part.z.to(dtype) for part in self.sources]

    @property
    def heads(self) -> tuple[int, ...]:
        """(H,), or () without heads; candidates without heads are shared by all heads."""
        return max((tuple(part.z.shape[:-2]) for part in (*self.anchors, *self.candidates)), key=len)

    @property
    def on_host(self) -> bool:
        """True on the CPU, where reading a number does not wait for a device."""
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
        number = {id(part): index for index, part in enumerate(self.sources)}
        blocks, first = [], 0
        for part in parts:
            views: list[int | None] = [None]
            lengths = [len(part)]
            if self.on_host and len(part):
                runs, counts = torch.unique_consecutive(part.view, return_counts=True)
                if len(runs) <= MAX_RUNS:
                    views, lengths = runs.tolist(), counts.tolist()
            start = first
            for view, length in zip(views, lengths, strict=True):
                blocks.append(Block(start, start + length, number[id(part)], first, view))
                start += length
            first += len(part)
        return blocks

    @property
    def anchors_are_candidates(self) -> bool:
        """True if the first candidates are the same objects as the anchors, as on one process."""
        same = (own is other for own, other in zip(self.anchors, self.candidates, strict=False))
        return len(self.anchors) <= len(self.candidates) and all(same)

    @cached_property
    def symmetric(self) -> bool:
        """True if both s and the relation are the same for (i, j) and (j, i), so that one tile serves i and j.

        False where anchors are remembered entries: a remembered candidate of the anchor's sample is ignored, so that
        the relation differs between the two directions. False on other devices than the CPU, where views are not read.
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
        """Check that all embeddings have reference vectors.

        Raises:
            ValueError: if an anchor or a candidate has none.
        """
        if any(part.reference is None for part in (*self.anchors, *self.candidates)):
            raise ValueError(
                "weight 'reference' needs the vectors of a frozen network: pass reference=(N, R) to the loss."
            )

    @cached_property
    def itself(self) -> ListedPairs | None:
        """The pairs of one sample that are excluded: the anchor itself, and remembered entries of its sample.

        None where samples are repeated too often to list them.
        """
        pairs = self._equal(self.anchor.sample, self.candidate.sample)
        return None if pairs is None else pairs.where(self._is_itself(pairs))

    @cached_property
    def positive(self) -> ListedPairs | None:
        """The positives, as in `relation`; None where groups are too large to list them."""
        pairs = self._equal(self.anchor.group, self.candidate.group)
        if pairs is None:
            return None
        view, other_view = self.anchor.view[pairs.anchors], self.candidate.view[pairs.candidates]
        counts = ~self._is_itself(pairs) & (view != PADDING) & (other_view != PADDING)
        return pairs.where(counts & (view != other_view) if self.across else counts)

    @cached_property
    def positive_indices(self) -> Tensor:
        """The listed positives as (N, k) indices among all candidates, -1 where an anchor has fewer than k."""
        assert self.positive is not None
        return self.padded_indices(self.positive)

    def _equal(self, own: Tensor, others: Tensor) -> ListedPairs | None:
        """List the pairs with equal numbers.

        Only the candidates decide whether that is too many: these are the same on all processes, which must choose the
        same computation.
        """
        if not self.on_host:
            return None
        present = (self.candidate.view != PADDING).nonzero().squeeze(1)
        ordered, order = others[present].sort()
        if len(ordered) > MAX_LISTED and bool((ordered[MAX_LISTED:] == ordered[:-MAX_LISTED]).any()):
            return None
        first, last = (torch.searchsorted(ordered, own, right=right) for right in (False, True))
        counts = last - first
        rows = torch.repeat_interleave(torch.arange(len(own)), counts)
        within = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
        return ListedPairs(rows, present[order[first[rows] + within]])

    def _is_itself(self, pairs: ListedPairs) -> Tensor:
        other_view = self.candidate.view[pairs.candidates]
        same_view = (other_view == self.anchor.view[pairs.anchors]) | (other_view == REMEMBERED)
        return same_view & (self.candidate.sample[pairs.candidates] == self.anchor.sample[pairs.anchors])

    def padded_indices(self, pairs: ListedPairs) -> Tensor:
        """Return (N, k): the indices of each anchor's candidates in listed pairs, -1 where it has fewer than k."""
        counts = torch.bincount(pairs.anchors, minlength=self.anchor_count)
        order = pairs.anchors.argsort(stable=True)
        rows, columns = pairs.anchors[order], pairs.candidates[order]
        indices = torch.full((self.anchor_count, int(counts.max()) if len(rows) else 0), -1)
        indices[rows, torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]] = columns
        return indices

    @cached_property
    def groups(self) -> tuple[Tensor, Tensor, int]:
        """The groups of the anchors and of the candidates, numbered from 0, and the number of groups."""
        values, numbers = torch.unique(torch.cat([self.anchor.group, self.candidate.group]), return_inverse=True)
        return *numbers.split([self.anchor_count, self.candidate_count]), len(values)

    def same_count_per_head(self, over: Relation, above: object | None) -> bool:
        """True if a count is the same for all heads: no threshold and no rule reads their similarities."""
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
            reachable, anchors = self._candidates_of(view, over, among), self.anchor.view == view
            of_group = torch.bincount(others[reachable], minlength=total)[own[anchors]]
            # These numbers include the pairs of an anchor with itself, which are subtracted.
            if over == "positive":
                counts[anchors], included = of_group, own[i] == others[j]
            elif over == "all":
                counts[anchors], included = reachable.sum(), torch.ones_like(i, dtype=torch.bool)
            else:
                counts[anchors], included = reachable.sum() - of_group, own[i] != others[j]
            counts -= torch.bincount(i[included & anchors[i] & reachable[j]], minlength=self.anchor_count)
        return counts if rows is None else counts * rows

    def _candidates_of(self, view: int, over: Relation, among: Tensor | None) -> Tensor:
        """Return (M,) bool: the candidates of the anchors of one view, by views only."""
        other_view = self.candidate.view
        reached = other_view != PADDING if over != "remembered" else other_view == REMEMBERED
        reached = reached & (other_view != view) if self.across else reached
        return reached if among is None else reached & among


def _identities(parts: Sequence[Embeddings]) -> Identities:
    return Identities(*(torch.cat([getattr(part, name) for part in parts]) for name in Identities._fields))
