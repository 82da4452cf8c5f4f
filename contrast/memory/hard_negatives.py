"""Hard negatives: the nearest samples of other groups, searched in a bank at intervals."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from contrast.core import distributed
from contrast.core.embeddings import PADDING, Embeddings
from contrast.core.registry import InputError
from contrast.memory.bank import Bank
from contrast.memory.memory import MEMORIES, Memory, check_anchors
from contrast.retrieval import least_vectors

QUERIES_AT_ONCE = 65536
"""Samples whose neighbours are searched at a time."""


@MEMORIES.register("hard_negatives", aliases=("mined_negatives", "retrieved_negatives"))
class HardNegatives(Memory):
    """The nearest samples of other groups, of every sample of the batch: one part of candidates for all anchors.

    At every refresh the nearest samples of each sample are searched in the bank, without itself and its group, and
    written into a table. A step looks up its samples in the table, gathers what all processes found, each sample once
    and sorted, and reads their newest embeddings from the bank. Until the first refresh there are none. Refreshes by
    steps count the updates of the bank. The number of candidates depends on what is looked up, so a GPU is waited for.

    Args:
        bank: the bank that is searched; `update` writes to it.
        neighbours: how many are searched per sample, fewer than there are samples.
        refresh: how often they are searched: "1 epochs", "200 steps".
        index: of `contrast.retrieval`: "auto", "exact", or a factory string of FAISS; the search is exact as long as
            fewer samples have an embedding than the index trains on.
        seed: of the training of an index.

    Attributes:
        table: (samples, neighbours) int64, nearest first, -1 for none.
        search_seconds: spent searching, in this process.

    Raises:
        ValueError: for a number of neighbours or a refresh that does not fit, and for an index that faiss refuses or
            that trains on more vectors than there are samples.

    Example:
        >>> from contrast.memory import Bank
        >>> hard, index = HardNegatives(Bank(samples=4, dim=8), neighbours=2), torch.arange(4)
        >>> value = loss(z_a, z_b, sample=index, extra=[hard])  # in every step; then backward() and step()
        >>> hard.update(z_b, sample=index)  # after backward()
        >>> hard.end_epoch()
        >>> hard.table.shape
        torch.Size([4, 2])
    """

    counters = ("epochs", "refreshed_at")
    fixed = ("neighbours",)

    def __init__(
        self, bank: Bank, neighbours: int = 16, refresh: str = "1 epochs", index: str = "auto", seed: int = 0
    ) -> None:
        super().__init__()
        if not 1 <= neighbours < bank.samples:
            raise ValueError(
                f"neighbours must be from 1 to {bank.samples - 1}, fewer than the bank's {bank.samples} samples; "
                f"got {neighbours}."
            )
        try:
            self._least = least_vectors(index, bank.dim * (bank.heads or 1))
        except InputError as error:
            raise ValueError(str(error)) from None  # so that the key of a config precedes the message
        if self._least > bank.samples:
            raise ValueError(
                f"the index {index!r} trains on {self._least:,} vectors or more, and the bank has {bank.samples:,} "
                "samples; take fewer lists or codes, or 'auto'."
            )
        self.bank = bank
        self.neighbours = neighbours
        self.interval, self.unit = parse_refresh(refresh)
        self.index = index
        self.seed = seed
        self.tensors["table"] = torch.full((bank.samples, neighbours), -1)
        self.epochs = 0
        self.refreshed_at = 0
        self.search_seconds = 0.0
        self._mined = 0

    @property
    def table(self) -> Tensor:
        """(samples, neighbours) int64, the nearest samples of other groups, nearest first; -1 for none."""
        return self.tensors["table"]

    def candidates(self, anchor: Embeddings) -> Embeddings:
        """Return the neighbours of all processes' anchors, each once, sorted by sample."""
        check_anchors(anchor, first=self.bank.updates == 0)
        self.move_to(anchor.z.device)
        self.bank.move_to(anchor.z.device)
        if not distributed.is_local():
            self._refresh_if_due()
        sample = torch.unique(anchor.sample[anchor.view != PADDING])
        if sample.device.type == "cpu" and len(sample) and sample[-1] >= self.bank.samples:
            raise ValueError(
                f"sample indices must be in [0, {self.bank.samples}), the bank's samples; got {int(sample[-1])}."
            )
        neighbours = self.table[sample].flatten()
        neighbours = torch.unique(neighbours[neighbours >= 0])
        if distributed.world_size() > 1:
            neighbours = torch.unique(distributed.gather_rows(neighbours))
        self._mined = len(neighbours)
        return self.bank.at(neighbours)

    def end_epoch(self) -> None:
        """Refresh the table where it is due."""
        self.epochs += 1
        self._refresh_if_due()

    def stores(self) -> Sequence[Memory]:
        """Return the bank."""
        return [self.bank]

    @property
    def metrics(self) -> dict[str, Tensor | float]:
        """The number of candidates in the last step, and the seconds spent searching so far."""
        return {"mined": float(self._mined), "mining_seconds": self.search_seconds}

    @torch.no_grad()
    def refresh(self) -> None:
        """Search the neighbours of every sample that has an embedding; all processes call it together."""
        start = time.perf_counter()
        world, rank = distributed.world_size(), distributed.rank()
        share = len(self.bank.known) // (world if self.bank.sharded else 1)
        index = self.bank.search_index(self.index if share >= self._least else "exact", seed=self.seed)
        stored = index.stored
        own = stored if world == 1 else stored[stored.sample % world == rank]
        counts = torch.bincount(self.bank.known % world, minlength=world).tolist()
        sample, neighbours = [own.sample[:0]], [self.table[:0]]
        for first in range(0, max(counts), QUERIES_AT_ONCE):
            queries = own[first : first + QUERIES_AT_ONCE]
            sample.append(queries.sample)
            neighbours.append(self.bank.search(queries, self.neighbours, own_group=False, index=index).position)
        table = torch.full_like(self.table, -1)
        table[distributed.gather(torch.cat(sample), counts)] = distributed.gather(torch.cat(neighbours), counts)
        self.tensors["table"] = table
        self.refreshed_at = self.bank.updates
        self.epochs = 0
        self.search_seconds += time.perf_counter() - start

    def _refresh_if_due(self) -> None:
        passed = self.epochs if self.unit == "epoch" else self.bank.updates - self.refreshed_at
        if passed >= self.interval:
            self.bank.move_to(self.table.device)
            self.refresh()


class NeighbourTables(Memory):
    """The nearest samples of other groups, as found at the end of earlier epochs; it gives no candidates.

    Data loaders read ahead over the end of an epoch. A sampler that uses only what was found an epoch earlier draws the
    same batches however far it reads ahead, and after resuming, since the two newest tables are stored and saved.

    Args:
        miner: searches the neighbours; only at the end of an epoch, also where its refresh is in steps.

    Example:
        >>> from contrast.memory import Bank
        >>> tables = NeighbourTables(HardNegatives(Bank(samples=4, dim=8), neighbours=2))
        >>> tables.update(z_b, sample=torch.arange(4))  # after backward(), in every step
        >>> tables.end_epoch()
        >>> tables.known_before(0), tables.known_before(1).shape
        (None, torch.Size([4, 2]))
    """

    counters = ("epochs", "found_in")

    def __init__(self, miner: HardNegatives) -> None:
        super().__init__()
        self.miner = miner
        self.epochs = 0
        self.found_in: dict[str, int | None] = {"newest": None, "older": None}
        self.tensors = {name: torch.full_like(miner.table, -1) for name in self.found_in}

    def known_before(self, epoch: int) -> Tensor | None:
        """Return the newest (samples, K) int64 table that was found at the end of an epoch before this one, from 0."""
        for name, found_in in self.found_in.items():
            if found_in is not None and found_in < epoch:
                return self.tensors[name]
        return None

    def end_epoch(self) -> None:
        """Search where it is due, and store what was found."""
        before = self.miner.refreshed_at
        self.miner.end_epoch()
        if self.miner.refreshed_at != before:
            self.tensors = {"newest": self.miner.table, "older": self.tensors["newest"]}
            self.found_in = {"newest": self.epochs, "older": self.found_in["newest"]}
        self.epochs += 1

    def stores(self) -> Sequence[Memory]:
        """Return the bank."""
        return self.miner.stores()

    @property
    def metrics(self) -> dict[str, Tensor | float]:
        """The seconds spent searching so far."""
        return {"mining_seconds": self.miner.search_seconds}


def parse_refresh(refresh: str) -> tuple[int, str]:
    """Return number and unit, "epoch" or "step", of "1 epochs", "200 steps"; ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+)\s+(epoch|step)s?\s*", str(refresh))
    if match is None or not int(match[1]):
        raise ValueError(f"refresh is a number of epochs or steps, '1 epochs' or '200 steps'; got {refresh!r}.")
    return int(match[1]), match[2]
