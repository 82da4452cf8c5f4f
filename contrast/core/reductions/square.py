"""A `Closed` function of few anchors that are the candidates: one square matrix, and nothing is computed twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from contrast.core.reductions import sweep
from contrast.core.reductions.asked import LogSumExp, Relation
from contrast.core.reductions.closed import Closed, Functions, Shares
from contrast.core.reductions.work import Gradients, Work

if TYPE_CHECKING:
    from contrast.core.pairs import Pairs

MATRIX = 2**18
"""Up to this many similarities, over all heads, stand in one matrix."""


def every(pairs: Pairs, function: Closed, over: Relation) -> tuple[Tensor, Tensor] | None:
    """Give the log-sum-exp of a function of each pair, and its value for each anchor's only positive.

    Args:
        pairs: anchors that are the candidates, on the CPU.
        function: of a pair; a module.
        over: which candidates the log-sum-exp is over.

    Returns:
        (N,) or (H, N) each, with gradient; None where pairs are many, or someone may lack a candidate.
    """
    dtype = torch.promote_types(pairs.anchor.z.dtype, torch.float32)
    suits = _suits(pairs, over) and Functions.suits(pairs, function, over, dtype)
    return _called(pairs, function, over, Every) if suits else None


def nearest(pairs: Pairs, function: Closed, over: Relation) -> tuple[Tensor, Tensor] | None:
    """Give a function of each anchor and its nearest candidate, and of each anchor and its only positive.

    Arguments and results are those of `every`.
    """
    return _called(pairs, function, over, Nearest) if _suits(pairs, over) else None


def _suits(pairs: Pairs, over: Relation) -> bool:
    """Say whether pairs are few, and known to be a positive and some more of each anchor."""
    identity, shape = pairs.identity, pairs.anchor.z.shape
    few = shape[:-1].numel() * shape[-2] <= MATRIX
    if not few or pairs.rules or identity.across or not identity.nobody_lacks(over, "positive"):
        return False
    listed = identity.plain and identity.positive is not None and identity.strangers is not None
    return listed and identity.positive is not None and identity.positive.one_each(len(pairs))


def _called(
    pairs: Pairs, function: Closed, over: Relation, way: Callable[[Work, Closed, Relation], sweep.Way]
) -> tuple[Tensor, Tensor]:
    # The second, over one, is what the first is of many.
    asked = [LogSumExp(0.0, over, log_weight=cast(nn.Module, function)), LogSumExp(0.0, "positive")]
    call = sweep._Call(pairs, asked, lambda work: [way(work, function, over)])
    found = sweep._apply(call) if any(call.wants) else call.forward(call.inputs)[0]
    return found[0], found[1]


@dataclass
class _Places:
    """Where pairs stand, over all heads: in the flat matrix, and their candidates among the vectors.

    Args:
        blank: the pairs that do not count.
        positive: the positives, in the order of their anchors.
        positive_candidate: their candidates.
        row: the first pair of each anchor.
        first_candidate: its candidate.
    """

    blank: Tensor
    positive: Tensor
    positive_candidate: Tensor
    row: Tensor
    first_candidate: Tensor


class _Square:
    """What both ways share.

    Args:
        work: the whole call; its candidates are the anchors, each with one positive and more.
        function: of a pair.
        over: which candidates count.
    """

    def __init__(self, work: Work, function: Closed, over: Relation) -> None:
        self.work, self.numbers, self.function, self.over = work, [0, 1], function, over
        self.x = work.x if work.heads else work.x.unsqueeze(0)

    def _places(self) -> _Places:
        identity, (heads, count, _) = self.work.identity, self.x.shape
        key = ("places", heads, self.over)
        if key not in identity.kept:
            blank, positive = identity.excluded if self.over == "all" else identity.strangers, identity.positive
            assert blank is not None
            assert positive is not None
            head = torch.arange(heads).unsqueeze(-1)
            row = torch.arange(heads * count) * count
            first = (head * count).expand(heads, count).reshape(-1)
            columns = positive.columns.repeat(heads)
            blanks = (head * count**2 + blank.rows * count + blank.columns).view(-1)
            identity.kept[key] = _Places(blanks, row + columns, first + columns, row, first)
        known: _Places = identity.kept[key]
        return known

    def _shaped(self, values: Tensor) -> Tensor:
        return values.view(self.work.x.shape[:-1])

    def _send(self, to_matrix: Tensor, to_a: Tensor, to_b: Tensor, parameters: Shares, into: Gradients) -> None:
        """Send on the gradients of the similarities, (H, N, N), of the sides, and of parameters."""
        of_anchor, more = self.function.from_anchor_side(to_a, self.x)
        of_candidate, even_more = self.function.from_candidate_side(to_b, self.x)
        for parameter, gradient in (*parameters, *more, *even_more):
            into.add_parameter(parameter, gradient)
        if into.anchor is not None:
            of_both = of_anchor.add_(of_candidate).baddbmm_(to_matrix + to_matrix.mT, self.x)
            into.anchor += of_both.view_as(into.anchor)


class Every(_Square):
    """The log-sum-exp of a `Closed`, and its value for single positives."""

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """Give them, (N,) or (H, N) each; kept are tiles, sums and sides."""
        places, s = self._places(), torch.bmm(self.x, self.x.mT)
        a, b = self.function.anchor_side(self.x), self.function.candidate_side(self.x)
        room = [torch.empty_like(s) for _ in range(4)]
        e = self.function.exponential(s, a, b, room, graded=True)
        positive = e.view(-1).index_select(0, places.positive).log_()
        e.view(-1).index_fill_(0, places.blank, 0)
        mass = e.sum(dim=-1)
        return [self._shaped(mass.log()), self._shaped(positive)], [*room[:3], mass, a, b]

    def backward(self, outputs: list[Tensor], saved: list[Tensor], upstream: list[Tensor], into: Gradients) -> None:  # noqa: ARG002
        """Add the gradients of the vectors and of what the function learns."""
        e, inverse, slope, mass, a, b = saved
        to_value = e * (upstream[0].view_as(mass) / mass).unsqueeze(-1)
        to_value.view(-1).index_add_(0, self._places().positive, upstream[1].reshape(-1))
        self._send(*self.function.gradients(to_value, a, b, [e, inverse, slope, torch.empty_like(e)]), into)


class Nearest(_Square):
    """The values of a `Closed` at each anchor's nearest candidate and at its only positive."""

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """Give the values, (N,) or (H, N) each; kept are places, the sides, and what the function keeps."""
        places, s = self._places(), torch.bmm(self.x, self.x.mT)
        of_positive = s.view(-1).index_select(0, places.positive)
        s.view(-1).index_fill_(0, places.blank, -torch.inf)
        of_nearest, nearest = s.flatten(0, 1).max(dim=-1)
        where = torch.cat([places.row + nearest, places.positive])
        candidates = torch.cat([places.first_candidate + nearest, places.positive_candidate])
        a, b = self.function.anchor_side(self.x).flatten(0, 1), self.function.candidate_side(self.x).flatten(0, 1)
        chosen = b.index_select(0, candidates).view(2, *b.shape)
        values, kept = self.function.at(torch.stack([of_nearest, of_positive]), a, chosen)
        return [self._shaped(value) for value in values.unbind()], [where, candidates, a, chosen, *kept]

    def backward(self, outputs: list[Tensor], saved: list[Tensor], upstream: list[Tensor], into: Gradients) -> None:  # noqa: ARG002
        """Add the gradients of the vectors and of what the function learns."""
        where, candidates, a, chosen, *kept = saved
        given = torch.stack(upstream).view(2, -1)
        to_s, to_a, to_chosen, parameters = self.function.gradients_at(given, a, chosen, kept)
        to_b = torch.zeros_like(a).index_add_(0, candidates, to_chosen.flatten(0, 1))
        heads, count, _ = self.x.shape
        to_matrix = self.x.new_zeros(heads, count, count)
        to_matrix.view(-1).index_add_(0, where, to_s.flatten())
        self._send(to_matrix, to_a.sum(dim=0).view(heads, count, -1), to_b.view(heads, count, -1), parameters, into)
