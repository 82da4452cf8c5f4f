"""Hard negatives: each anchor's nearest strangers, found in the bank now and then."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from contrast.core import distributed
from contrast.core.embeddings import PADDING, Embeddings
from contrast.core.registry import InputError
from contrast.memory.bank import Bank
from contrast.memory.door import refuse_other, refuse_unknown
from contrast.memory.memory import MEMORIES, Memory
from contrast.retrieval import least_vectors

QUERIES = 65536
"""Samples whose neighbours are searched at a time."""


@MEMORIES.register("hard_negatives", aliases=("mined_negatives", "retrieved_negatives"))
class HardNegatives(Memory):
    """The nearest strangers of the batch's samples, one part of candidates that all anchors share.

    At every refresh the nearest samples of every sample are searched in the bank, without itself and its group, and
    written into a table; a step looks its samples up, brings together what all processes found, each once and in order,
    and takes their newest embeddings from the bank. Until the first refresh there are none. A refresh by steps counts
    the bank's updates. What a step looks up decides the size of its part, for which a GPU is waited for.

        bank = Bank(len(dataset), dim=128)
        hard = HardNegatives(bank, neighbours=16)
        loss = criterion(z_a, z_b, sample=index, extra=[hard])
        ...
        hard.update(z_b, sample=index)      # writes to the bank, after the backward pass
        hard.end_epoch()

    Args:
        bank: where the embeddings are.
        neighbours: how many each anchor brings, below the number of samples.
        refresh: how often they are searched: "1 epochs", "200 steps".
        index: of `contrast.retrieval`: "auto", "exact", or a factory string of FAISS; the search is exact as long as
            fewer samples are known than it trains on.
        seed: of what an index trains.

    Attributes:
        table: (samples, neighbours) int64, nearest first, -1 for none.
        seconds: spent searching, in this process.

    Raises:
        ValueError: for as many neighbours as samples or more, a refresh that is none, and an index that faiss refuses
            or that trains on more vectors than there are samples.
    """

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
            self._least = least_vectors(index, bank.width.dim * (bank.width.heads or 1))
        except InputError as error:
            raise ValueError(str(error)) from None  # so that a config's key comes before it
        if self._least > bank.samples:
            raise ValueError(
                f"the index {index!r} trains on {self._least:,} vectors or more, and the bank has {bank.samples:,} "
                "samples; take fewer lists or codes, or 'auto'."
            )
        self.bank = bank
        self.neighbours = neighbours
        self.every, self.period = parse_refresh(refresh)
        self.index = index
        self.seed = seed
        self.held = {"table": torch.full((bank.samples, neighbours), -1)}
        self.epochs = 0
        self.found_at = 0
        self.seconds = 0.0
        self._mined = 0

    @property
    def table(self) -> Tensor:
        """(samples, neighbours) int64, each sample's nearest strangers, nearest first; -1 for none."""
        return self.held["table"]

    def candidates(self, anchor: Embeddings) -> Embeddings:
        """Give the neighbours of all processes' anchors, each once, by sample."""
        refuse_unknown(anchor, first=self.bank.updates == 0)
        self.follow(anchor.z.device)
        self.bank.follow(anchor.z.device)
        if not distributed.is_local():
            self._find_if_due()
        sample = torch.unique(anchor.sample[anchor.view != PADDING])
        if sample.device.type == "cpu" and len(sample) and sample[-1] >= self.bank.samples:
            raise ValueError(
                f"sample indices must lie in [0, {self.bank.samples}), the bank's samples; got {int(sample[-1])}."
            )
        wanted = self.table[sample].flatten()
        wanted = torch.unique(wanted[wanted >= 0])
        if distributed.world_size() > 1:
            wanted = torch.unique(distributed.gather_rows(wanted))
        self._mined = len(wanted)
        return self.bank.at(wanted)

    def end_epoch(self) -> None:
        """Search anew where it is time."""
        self.epochs += 1
        self._find_if_due()

    def stores(self) -> Sequence[Memory]:
        """Give the bank."""
        return [self.bank]

    @property
    def metrics(self) -> dict[str, Tensor | float]:
        """How many candidates the last step was given, and the seconds spent searching so far."""
        return {"mined": float(self._mined), "mining_seconds": self.seconds}

    @torch.no_grad()
    def find(self) -> None:
        """Search the neighbours of every sample that has an embedding; all processes call it together."""
        start = time.perf_counter()
        world, rank = distributed.world_size(), distributed.rank()
        share = len(self.bank.known) // (world if self.bank.sharded else 1)
        shelf = self.bank.shelf(self.index if share >= self._least else "exact", seed=self.seed)
        stored = shelf.stored
        mine = stored if world == 1 else stored[stored.sample % world == rank]
        counts = torch.bincount(self.bank.known % world, minlength=world).tolist()
        sample, near = [mine.sample[:0]], [self.table[:0]]
        for first in range(0, max(counts), QUERIES):
            queries = mine[first : first + QUERIES]
            sample.append(queries.sample)
            near.append(self.bank.nearest(queries, self.neighbours, own_group=False, shelf=shelf).position)
        table = torch.full_like(self.table, -1)
        table[distributed.gather(torch.cat(sample), counts)] = distributed.gather(torch.cat(near), counts)
        self.held["table"] = table
        self.found_at = self.bank.updates
        self.epochs = 0
        self.seconds += time.perf_counter() - start

    def get_extra_state(self) -> dict[str, Any]:
        """Give the table and when it was found; the bank has a state of its own."""
        return {"neighbours": self.neighbours, "epochs": self.epochs, "found_at": self.found_at, "table": self.table}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take it up again; a ValueError where there are other neighbours."""
        refuse_other({"neighbours": self.neighbours}, state, "memory of hard negatives")
        self.epochs, self.found_at = state["epochs"], state["found_at"]
        self.held["table"] = state["table"].to(self.table.device, copy=True)

    def _find_if_due(self) -> None:
        past = self.epochs if self.period == "epoch" else self.bank.updates - self.found_at
        if past >= self.every:
            self.bank.follow(self.table.device)
            self.find()


def parse_refresh(refresh: str) -> tuple[int, str]:
    """Give number and unit, "epoch" or "step", of "1 epochs", "200 steps"."""
    match = re.fullmatch(r"\s*(\d+)\s+(epoch|step)s?\s*", str(refresh))
    if match is None or not int(match[1]):
        raise ValueError(f"refresh is a number of epochs or steps, '1 epochs' or '200 steps'; got {refresh!r}.")
    return int(match[1]), match[2]
