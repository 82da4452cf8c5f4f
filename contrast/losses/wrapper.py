"""A loss around another one: what bad-pair mining and false-negative control share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from contrast.core.pairs import Pairs
from contrast.losses.loss import Row
from contrast.losses.pair_loss import Extra, PairLoss


class LossWrapper(PairLoss):
    """Leaves everything to the loss inside; a subclass changes the pairs before its rows, or the rows after.

    Args:
        loss: the loss inside.

    Attributes:
        does: what a subclass does, for the sentence that refuses a loss without rows.

    Raises:
        ValueError: for a loss without rows.
    """

    does: ClassVar[str] = "asks for the rows of a PairLoss"

    def __init__(self, loss: PairLoss) -> None:
        super().__init__()
        if not isinstance(loss, PairLoss):
            raise ValueError(
                f"{type(self).__name__} {self.does}; {type(loss).__name__} has none, it is one number for a batch."
            )
        self.loss = loss
        self.needs_positive = loss.needs_positive
        self.needs_negative = loss.needs_negative
        self.normalise = loss.normalise
        self.reads_similarity = loss.reads_similarity
        self.takes_one_view = loss.takes_one_view
        self.reference_of = loss.reference_of
        self.traced = self.traced and loss.traced

    def pairs(
        self,
        *views: Tensor,
        targets: Sequence[Tensor | None] | None = None,
        sample: Tensor | None = None,
        group: Tensor | None = None,
        reference: Tensor | None = None,
        extra: Sequence[Extra] = (),
    ) -> Sequence[Pairs]:
        """Pair as the loss inside does."""
        return self.loss.pairs(*views, targets=targets, sample=sample, group=group, reference=reference, extra=extra)

    def per_anchor(self, pairs: Pairs) -> Tensor:
        """Return the rows of the loss inside."""
        return self.loss.per_anchor(pairs)

    def rows(self, pairs: Pairs) -> Tensor:
        """Return the rows of the loss inside."""
        return self.loss.rows(pairs)

    def combine(self, rows: Sequence[Tensor], prepared: Sequence[Pairs]) -> Sequence[Tensor]:
        """Combine as the inner loss does."""
        return self.loss.combine(rows, prepared)

    def update(self) -> None:
        """Update the inner loss."""
        self.loss.update()

    def end_epoch(self) -> None:
        """End the epoch of the inner loss."""
        self.loss.end_epoch()

    def findings(self, names: Sequence[str]) -> dict[str, list[Row]]:
        """Return what the inner loss found."""
        return self.loss.findings(names)

    @torch.no_grad()
    def measure(self, pairs: Pairs) -> dict[str, Tensor]:
        """Return what the loss inside measures."""
        return self.loss.measure(pairs)
