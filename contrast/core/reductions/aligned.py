"""A `Closed` function of each anchor and single candidates, where the anchors are the candidates: rows, not tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from contrast.core.reductions import sweep
from contrast.core.reductions.asked import LogSumExp, Relation
from contrast.core.reductions.closed import Closed, Functions
from contrast.core.reductions.work import Gradients, Work

if TYPE_CHECKING:
    from contrast.core.pairs import Pairs

ROWS = 2**13
"""Up to this many anchors, over all heads, are worked on at once, and what is found is kept."""
PIECE = 2**12
"""Pairs at a time where anchors are more."""


def accepts(pairs: Pairs) -> bool:
    """Say whether the anchors are the candidates, on the CPU."""
    own = pairs.anchor.z.device.type == "cpu" and not torch.compiler.is_compiling()
    return own and pairs.mirrored == len(pairs.candidates)


def aligned(pairs: Pairs, function: Closed, positions: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Give the values of each anchor and some candidates, (N,) or (H, N) each, with gradient; 0 where there is none.

    Args:
        pairs: that `accepts` accepts.
        function: of a pair; a module.
        positions: (N,) or (H, N) each, one candidate of each anchor among all; -1 for none.
    """
    # A log-sum-exp over one is that one.
    asked = [LogSumExp(0.0, "positive") for _ in positions]
    asked[0] = LogSumExp(0.0, "positive", log_weight=cast(nn.Module, function))
    call = sweep._Call(pairs, asked, lambda work: [Aligned(work, function, positions)])
    return tuple(sweep._apply(call) if any(call.wants) else call.forward(call.inputs)[0])[: len(positions)]


def beside(pairs: Pairs, function: Closed, over: Relation, size: int) -> tuple[Tensor, Tensor] | None:
    """Give the log-sum-exp of a function of each pair, and its value for each anchor's only positive.

    Args:
        pairs: that `accepts` accepts.
        function: of a pair; a module.
        over: which candidates the log-sum-exp is over.
        size: rows and columns of a tile.

    Returns:
        (N,) or (H, N) each, with gradient; None where anchors have none or several positives, or rules hold.
    """
    positive, dtype = pairs.identity.positive, torch.promote_types(pairs.anchor.z.dtype, torch.float32)
    if pairs.across or not pairs.identity.plain or positive is None or not positive.one_each(len(pairs)):
        return None
    if not Functions.suits(pairs, function, over, dtype):
        return None
    # The second is what the first is, over one.
    asked = [LogSumExp(0.0, over, log_weight=cast(nn.Module, function)), LogSumExp(0.0, "positive")]
    call = sweep._Call(pairs, asked, lambda work: [Functions(work, [0, 1], size)])
    found = sweep._apply(call) if any(call.wants) else call.forward(call.inputs)[0]
    return found[0], found[1]


class Aligned:
    """The values of a `Closed` at some candidates of each anchor; 0 where there is none.

    Args:
        work: the whole call; its candidates are the anchors.
        function: of a pair.
        positions: (N,) or (H, N) each, the candidates among all; -1 for none.
    """

    def __init__(self, work: Work, function: Closed, positions: Sequence[Tensor]) -> None:
        self.work, self.numbers, self.function = work, list(range(len(positions))), function
        self.x = work.x.reshape(-1, work.x.shape[-1])
        # (P, H N): P candidates of each anchor of each head, among all vectors.
        together = torch.stack([one.expand(work.x.shape[:-1]) for one in positions])
        some_missing = together.numel() > 0 and int(together.min()) < 0
        self.missing = (together < 0).flatten(1) if some_missing else None
        if some_missing:
            together = together.clamp(min=0)
        if work.heads:
            heads, count = work.x.shape[:2]
            together = together + (torch.arange(heads) * count).unsqueeze(-1)
        self.positions = together.flatten(1)
        self.at_once = len(self.x) <= ROWS

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """Give the values, (N,) or (H, N) each; what few rows found on the way is kept."""
        values, kept = self.x.new_empty(self.positions.shape), []
        for rows in self._pieces():
            values[:, rows], *kept = self._values(rows)
        if self.missing is not None:
            values.masked_fill_(self.missing, 0)
        return list(values.view(len(values), *self.work.x.shape[:-1]).unbind()), kept if self.at_once else []

    def backward(self, outputs: list[Tensor], saved: list[Tensor], upstream: list[Tensor], into: Gradients) -> None:  # noqa: ARG002
        """Add the gradients of the vectors and of what the function learns."""
        given = torch.stack(upstream).flatten(1)
        if self.missing is not None:
            given = given.masked_fill(self.missing, 0)
        to_x = None if into.anchor is None else into.anchor.view(-1, into.anchor.shape[-1])
        for rows in self._pieces():
            y, a, b, *kept = saved or self._values(rows)[1:]
            x, places = self.x[rows], self.positions[:, rows].reshape(-1)
            to_s, to_a, to_b, parameters = self.function.gradients_at(given[:, rows], a, b, kept)
            of_anchor, more = self.function.from_anchor_side(to_a.sum(dim=0), x)
            # Candidates have one side, whoever met them; of many vectors it is found again for each.
            candidates = x if self.at_once else y.flatten(0, 1)
            to_side = to_b.flatten(0, 1)
            if self.at_once:
                to_side = torch.zeros_like(a).index_add_(0, places, to_side)
            of_candidate, even_more = self.function.from_candidate_side(to_side, candidates)
            for parameter, gradient in (*parameters, *more, *even_more):
                into.add_parameter(parameter, gradient)
            if to_x is None:
                continue
            share = to_s.unsqueeze(-1)
            for one, candidate in zip(share, y, strict=True):
                of_anchor.addcmul_(one, candidate)
            to_x[rows] += of_anchor
            of_product = (share * x).flatten(0, 1)
            if self.at_once:
                to_x += of_candidate
            else:
                of_product += of_candidate
            to_x.index_add_(0, places, of_product)

    def _values(self, rows: slice) -> tuple[Tensor, ...]:
        """Give the values of some rows, (P, n), the candidates, (P, n, D), both sides, and what the function keeps."""
        x, places = self.x[rows], self.positions[:, rows]
        y = self.x.index_select(0, places.reshape(-1)).view(*places.shape, -1)
        a = self.function.anchor_side(x)
        if self.at_once:
            b = self.function.candidate_side(x).index_select(0, places.reshape(-1)).view(*places.shape, -1)
        else:
            b = self.function.candidate_side(y)
        values, kept = self.function.at((x * y).sum(dim=-1), a, b)
        return values, y, a, b, *kept

    def _pieces(self) -> Iterator[slice]:
        step = max(1, len(self.x) if self.at_once else PIECE // len(self.positions))
        for start in range(0, len(self.x), step):
            yield slice(start, start + step)
