"""Neighbour tables that a batch sampler reads: it looks ahead, so each table waits until its epoch has come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from contrast.memory.hard_negatives import HardNegatives
from contrast.memory.memory import Memory


class NeighbourTables(Memory):
    """Each sample's nearest strangers as they were known at the end of earlier epochs; it gives no candidates.

    Loaders read ahead over the end of an epoch. A sampler that asks only for what was known an epoch earlier draws the
    same batches however far it reads ahead, and also after resuming, since the two newest tables are kept and stand in
    the checkpoint.

    Args:
        miner: searches the neighbours; only at the end of an epoch, also where its refresh is in steps.
    """

    def __init__(self, miner: HardNegatives) -> None:
        super().__init__()
        self.miner = miner
        self.epochs = 0
        self.found: list[tuple[int, Tensor]] = []

    def known_before(self, epoch: int) -> Tensor | None:
        """Give the newest (samples, K) int64 table that was found at the end of an epoch before this one, from 0."""
        return next((table for after, table in reversed(self.found) if after < epoch), None)

    def end_epoch(self) -> None:
        """Search where it is time, and keep what was found."""
        before = self.miner.found_at
        self.miner.end_epoch()
        if self.miner.found_at != before:
            self.found = [*self.found[-1:], (self.epochs, self.miner.table)]
        self.epochs += 1

    def stores(self) -> Sequence[Memory]:
        """Give the bank."""
        return self.miner.stores()

    @property
    def metrics(self) -> dict[str, Tensor | float]:
        """The seconds spent searching so far."""
        return {"mining_seconds": self.miner.seconds}

    def get_extra_state(self) -> dict[str, Any]:
        """Give the tables and when each was found."""
        return {"epochs": self.epochs, "found": list(self.found)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take them up again."""
        self.epochs = state["epochs"]
        self.found = [(after, table) for after, table in state["found"]]
