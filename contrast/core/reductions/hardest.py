"""A log-sum-exp above thresholds that it asks for itself: both come from one strip of whole rows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from contrast.core.reductions.asked import Kth, LogSumExp
from contrast.core.reductions.bounded import Bounded, NotBoundedError
from contrast.core.reductions.thresholds import Thresholds, lists
from contrast.core.reductions.work import Gradients, Work


class Hardest:
    """One log-sum-exp above its own `Kth`.

    Args:
        work: the whole call.
        number: which of its reductions; its thresholds become numbers in the forward pass.
        size: rows and columns of a tile.
    """

    def __init__(self, work: Work, number: int, size: int) -> None:
        self.work, self.numbers, self.size = work, [number], size
        self.sweep, self.strips = Bounded(work, [number], size), Thresholds(work, [], size)
        self.sweep.leave(self.strips.rows)

    @staticmethod
    def accepts(work: Work, number: int) -> bool:
        """Say whether a reduction is that, over candidates of which lists say who does not count."""
        asked = work.asked[number]
        if not isinstance(asked, LogSumExp) or not isinstance(asked.above, Kth) or work.heads:
            return False
        same = asked.over == asked.above.over and asked.among is None and asked.above.among is None
        return same and lists(work.identity, asked.above) and Bounded.accepts(work, number)

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """Give the log-sum-exp, (N,), and what the backward pass needs.

        Raises:
            NotBoundedError: where an exponent may have left the range; the thresholds are numbers then.
        """
        asked: Any = self.work.asked[self.numbers[0]]
        try:
            scale, shift = self.sweep.exponent()
        except NotBoundedError:
            scale, shift = 0.0, math.nan
        above, total = self.strips.find_and_sum(asked.above, scale, shift, self.sweep.keep)
        self.work.asked[self.numbers[0]] = self.sweep.asked[0] = replace(asked, above=above)
        if math.isnan(shift):
            raise NotBoundedError
        output, normaliser = self.sweep.finish(0, total.unsqueeze(0))
        return [output[0]], [normaliser, *self.sweep.kept]

    def backward(self, outputs: list[Tensor], saved: list[Tensor], upstream: list[Tensor], into: Gradients) -> None:
        """Add the gradients, tile by tile."""
        self.sweep.backward(outputs, saved, upstream, into)
