"""The bank: the newest embedding of every sample."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from contrast.core import distributed
from contrast.core.embeddings import Embeddings
from contrast.memory.door import Width, refuse_other, refuse_unknown
from contrast.memory.memory import MEMORIES
from contrast.memory.room import check_free_memory
from contrast.memory.search import SearchIndex, vectors
from contrast.memory.shards import from_owners, merged, whole_on_first
from contrast.memory.store import Store
from contrast.memory.wrong_samples import AsyncIndexCheck, refuse_wrong
from contrast.retrieval import Found, build_index


@MEMORIES.register("bank", aliases=("memory_bank", "instance_discrimination"))
class Bank(Store):
    """The newest embedding of every sample of the data set, with its group and its age.

    Samples that were never seen have none and are nobody's candidates. Every process holds all of it while it fits
    `bytes_per_process`; above that each holds the vectors of its share of the samples (sample % W == rank), and the
    bank only serves searches, in which all processes take part. A checkpoint of a sharded bank, which all processes
    make together and process 0 writes, holds all of it and loads on any number of processes.

    Args:
        samples: how many the data set has; sample indices are below it.
        dim: D, their width.
        heads: H for (H, N, D) embeddings.
        bytes_per_process: up to this size every process holds all vectors.
        reference_dim: R, where a frozen tower's vectors are remembered too (CWCL, a guide).

    Attributes:
        sharded: whether each process holds its share only; decided when the bank is first used.

    Raises:
        ValueError: for sizes below 1; where it does not fit into the free memory; for a repeated sample in one update
            of all processes together, or one outside [0, samples) (on CUDA, where looking would wait for the device,
            a later update says so).

    Source: Wu et al. 2018 (instance discrimination), arXiv:1805.01978.
    """

    def __init__(
        self,
        samples: int,
        dim: int,
        heads: int | None = None,
        bytes_per_process: int = 2**30,
        reference_dim: int | None = None,
    ) -> None:
        if samples < 1:
            raise ValueError(f"samples must be 1 or more, the size of the data set; got {samples}.")
        super().__init__(Width(dim, heads, reference_dim))
        self.samples = samples
        self.bytes_per_process = bytes_per_process
        check_free_memory(samples, self.width.bytes, bytes_per_process)
        never = torch.full((samples,), -1)
        self.held = {**self.width.zeros(samples), "group": never, "written": never.clone()}
        self.shard = (0, 1)
        self.pushed = 0
        self._complete = False
        self._watch = AsyncIndexCheck(samples)

    @property
    def sharded(self) -> bool:
        """Whether each process holds the vectors of its share of the samples only."""
        return self.shard[1] > 1

    @property
    def age(self) -> Tensor:
        """(samples,) int64, each embedding's age in steps: updates since it was written; -1 where there is none."""
        written = self.held["written"]
        return torch.where(written < 0, -1, self.updates - written)

    @property
    def known(self) -> Tensor:
        """(n,) int64, the samples that have an embedding, ascending."""
        return (self.held["written"] >= 0).nonzero().squeeze(1)

    def candidates(self, anchor: Embeddings) -> Embeddings:
        """Give all embeddings, once every sample has one without a copy; ValueError where the bank is sharded."""
        refuse_unknown(anchor, first=self.updates == 0)
        self.follow(anchor.z.device)
        self._settle()
        if self.sharded:
            raise ValueError(
                f"this bank is sharded over {self.shard[1]} processes, since its vectors need more than "
                f"bytes_per_process={self.bytes_per_process}: search it by hard_negatives or nearest_positives, or "
                "raise bytes_per_process."
            )
        if not self._complete:
            self._complete = bool((self.held["written"] >= 0).all())
        if not self._complete:
            return self.at(self.known)
        everyone = torch.arange(self.samples, device=self.held["z"].device)
        return self._embeddings(everyone, self.held["z"], self.held.get("reference"))

    def accepted(self, everyone: Embeddings) -> Embeddings:
        """Refuse samples that the data set does not have, and the same one twice."""
        self._settle()
        if everyone.z.device.type != "cpu":
            return replace(everyone, sample=self._watch.look(everyone.sample))
        refuse_wrong(everyone.sample, self.samples)
        return everyone

    def write(self, everyone: Embeddings) -> None:
        """Put the rows in their samples' places."""
        self.pushed += len(everyone)
        self.held["group"][everyone.sample] = everyone.group
        self.held["written"][everyone.sample] = self.updates
        rank, world = self.shard
        mine = everyone[everyone.sample % world == rank] if self.sharded else everyone
        rows = mine.sample // world
        self.held["z"][..., rows, :] = mine.z
        if mine.reference is not None:
            self.held["reference"][rows] = mine.reference

    @property
    def metrics(self) -> dict[str, Tensor | float]:
        """How many samples have an embedding, and its mean age in steps."""
        age = self.age
        some = (age >= 0).sum()
        return {"bank": some, "bank_age": age.clamp(min=0).sum() / some.clamp(min=1)}

    @property
    def empty(self) -> bool:
        """Whether nothing was ever put in."""
        return not self.pushed

    def shelf(self, index: str | None = None, *, seed: int = 0) -> SearchIndex:
        """Give what this process holds, all or its share, ready to be searched by an index of `retrieval`."""
        self._settle()
        rank, world = self.shard
        known = self.known
        known = known[known % world == rank] if self.sharded else known
        stored = self._embeddings(known, *self._rows(known // world))
        return SearchIndex(stored, build_index(vectors(stored), index, seed=seed) if index and len(known) else None)

    def nearest(self, anchor: Embeddings, k: int, *, own_group: bool = True, shelf: SearchIndex | None = None) -> Found:
        """Give the k nearest samples that are not the anchor's, nor of its group unless `own_group`; -1 for fewer.

        Where the bank is sharded every process calls it, with its own anchors, and searches its share for all.
        """
        self.follow(anchor.z.device)
        shelf = shelf or self.shelf()
        everyone = anchor.detach().gathered() if self.sharded else anchor
        found = shelf.nearest(everyone, k, own_group=own_group)
        if len(shelf.stored):
            found = found._replace(
                position=torch.where(found.position < 0, -1, shelf.stored.sample[found.position.clamp(min=0)])
            )
        if not self.sharded:
            return found
        return merged(found, len(anchor), k)

    @torch.no_grad()
    def at(self, sample: Tensor) -> Embeddings:
        """Give the embeddings of (n,) samples that have one; where the bank is sharded, every process calls it."""
        self._settle()
        rank, world = self.shard
        if not self.sharded:
            return self._embeddings(sample, *self._rows(sample))
        asked = from_owners(sample, world)
        z, reference = self._rows(asked.mine(rank) // world)
        z = asked.gathered(z.movedim(-2, 0)).movedim(0, -2)
        reference = None if reference is None else asked.gathered(reference)
        return self._embeddings(sample, z, reference)

    def sample_at(self, position: Tensor) -> Tensor:
        """Give whose embeddings these are: positions in a bank are samples."""
        return position

    def get_extra_state(self) -> dict[str, Any]:
        """Give all that it holds; where the bank is sharded, all processes call this and process 0 is given it."""
        made: dict[str, Any] = {
            "samples": self.samples,
            "width": tuple(self.width),
            "updates": self.updates,
            "pushed": self.pushed,
            "process": self.shard[0],
            "group": self.held["group"],
            "written": self.held["written"],
        }
        vectors: dict[str, Any] = {name: x for name, x in self.held.items() if name in ("z", "reference")}
        if self.sharded:
            vectors = {name: whole_on_first(x, self.samples, *self.shard) for name, x in vectors.items()}
        return {**made, **vectors}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take it up again, on any number of processes; a ValueError where size or width differ."""
        refuse_other({"samples": self.samples, "width": tuple(self.width)}, state, "bank")
        if state["process"] != 0:
            raise ValueError(
                f"this checkpoint of a sharded bank was written by process {state['process']}; load process 0's, which "
                "has all of it."
            )
        self.updates, self.pushed = state["updates"], state["pushed"]
        self._complete = False
        device = self.held["z"].device
        rank, world = self.shard
        for name in self.held:
            given = state[name]
            if self.sharded and name in ("z", "reference"):
                given = given.movedim(-2, 0)[rank::world].movedim(0, -2)
            self.held[name] = given.detach().to(device, copy=True)

    def _rows(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Give vectors and references at these rows of what this process holds."""
        reference = self.held.get("reference")
        return self.held["z"].index_select(-2, rows), None if reference is None else reference[rows]

    def _embeddings(self, sample: Tensor, z: Tensor, reference: Tensor | None) -> Embeddings:
        return self.remembered(z, sample, self.held["group"][sample], reference)

    def _settle(self) -> None:
        """Keep this process's share alone, where there are several and all of it is too much for one."""
        world = distributed.world_size()
        if self.sharded and world != self.shard[1]:
            raise ValueError(
                f"this bank is sharded over {self.shard[1]} processes, which use it together: not inside "
                "contrast.local(), nor on another number of processes without its checkpoint."
            )
        if self.sharded or world == 1 or self.samples * self.width.bytes <= self.bytes_per_process:
            return
        self.shard = (distributed.rank(), world)
        for name in ("z", "reference"):
            if name in self.held:
                rows = self.held[name].movedim(-2, 0)[self.shard[0] :: world]
                self.held[name] = rows.movedim(0, -2).clone(memory_format=torch.contiguous_format)
