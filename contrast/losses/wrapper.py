"""The base class of losses that wrap another one: bad-pair mining and false-negative control."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from contrast.core.pairs import Pairs
from contrast.losses.loss import Row
from contrast.losses.pair_loss import Extra, PairLoss


class LossWrapper(PairLoss):
    """Delegates everything to an inner loss; a subclass changes the pairs before its rows, or the rows after.

    Args:
        loss: the inner loss.

    Attributes:
        purpose: what a subclass does, for the message that refuses a loss that is one number per batch.

    Raises:
        ValueError: for a loss that is one number per batch.
    """

    purpose: ClassVar[str] = "needs the values per anchor of a PairLoss"

    def __init__(self, loss: PairLoss) -> None:
        super().__init__()
        if not isinstance(loss, PairLoss):
            raise ValueError(
                f"{type(self).__name__} {self.purpose}; {type(loss).__name__} has none, it is one number per batch."
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
        """Return the pairs of the inner loss."""
        return self.loss.pairs(*views, targets=targets, sample=sample, group=group, reference=reference, extra=extra)

    def per_anchor(self, pairs: Pairs) -> Tensor:
        """Return each anchor's inner loss."""
        return self.loss.per_anchor(pairs)

    def rows(self, pairs: Pairs) -> Tensor:
        """Return the rows of the inner loss."""
        return self.loss.rows(pairs)

    def combine(self, rows: Sequence[Tensor], prepared: Sequence[Pairs]) -> Sequence[Tensor]:
        """Return the rows as the inner loss combines them."""
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
        """Compute the metrics of the inner loss."""
        return self.loss.measure(pairs)
