"""The bank: the newest embedding of every sample."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from contrast import distributed
from contrast.embeddings import REMEMBERED, Embeddings
from contrast.memory.memory import MEMORIES, Memory, Width, refuse_other, refuse_unknown
from contrast.memory.room import check_room
from contrast.memory.search import Shelf, vectors
from contrast.retrieval import Found, build_index, merge

BLOCK = 65536
"""Rows that a sharded bank brings together at a time."""


@MEMORIES.register("bank", aliases=("memory_bank", "instance_discrimination"))
class Bank(Memory):
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
        super().__init__()
        if samples < 1:
            raise ValueError(f"samples must be 1 or more, the size of the data set; got {samples}.")
        self.samples = samples
        self.width = Width(dim, heads, reference_dim)
        self.width.check()
        self.bytes_per_process = bytes_per_process
        check_room(samples, self.width.bytes, bytes_per_process)
        never = torch.full((samples,), -1)
        self.held = {**self.width.zeros(samples), "group": never, "written": never.clone()}
        self.shard = (0, 1)
        self.unit = True
        self.pushed = 0
        self._complete = False
        self._wrong: Tensor | None = None
        self._seen: Tensor | None = None

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
        refuse_unknown(anchor)
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

    @torch.no_grad()
    def update(
        self,
        embeddings: Embeddings | Tensor,
        *,
        sample: Tensor | None = None,
        group: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> None:
        """Put every process's rows in their samples' places."""
        own = self.width.embeddings(embeddings, sample, group, reference)
        self.follow(own.z.device)
        self._settle()
        everyone = own.gathered()
        if own.z.device.type == "cpu":
            self._check(everyone.sample)
        else:
            everyone = self._checked_later(everyone)
        self.unit &= own.unit
        self.updates += 1
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

    def shelf(self, index: str | None = None, *, seed: int = 0) -> Shelf:
        """Give what this process holds, all or its share, ready to be searched by an index of `retrieval`."""
        self._settle()
        rank, world = self.shard
        known = self.known
        known = known[known % world == rank] if self.sharded else known
        stored = self._embeddings(known, *self._rows(known // world))
        return Shelf(stored, build_index(vectors(stored), index, seed=seed) if index and len(known) else None)

    def nearest(self, anchor: Embeddings, k: int, *, own_group: bool = True, shelf: Shelf | None = None) -> Found:
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
        rank, world = self.shard
        counts = [count for (count,) in distributed.exchange_sizes([len(anchor)], anchor.z.device)]
        parts = [distributed.gather(x, [len(everyone)] * world).chunk(world) for x in found]
        merged = merge([Found(*part) for part in zip(*parts, strict=True)], k) if len(everyone) else found
        own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        return Found(merged.similarity[own], merged.position[own])

    @torch.no_grad()
    def at(self, sample: Tensor) -> Embeddings:
        """Give the embeddings of (n,) samples that have one; where the bank is sharded, every process calls it."""
        self._settle()
        rank, world = self.shard
        if not self.sharded:
            return self._embeddings(sample, *self._rows(sample))
        asked = distributed.gather(sample, [n for (n,) in distributed.exchange_sizes([len(sample)], sample.device)])
        asked = torch.unique(asked)
        asked = asked[torch.argsort(asked % world, stable=True)]  # owner after owner
        sizes = torch.bincount(asked % world, minlength=world).tolist()
        z, reference = self._rows(asked[asked % world == rank] // world)
        z = distributed.gather(z.movedim(-2, 0), sizes).movedim(0, -2)
        reference = None if reference is None else distributed.gather(reference, sizes)
        ordered, order = asked.sort()
        which = order[torch.searchsorted(ordered, sample)]
        return self._embeddings(sample, z[..., which, :], None if reference is None else reference[which])

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
            "unit": self.unit,
            "process": self.shard[0],
            "group": self.held["group"],
            "written": self.held["written"],
        }
        vectors: dict[str, Any] = {name: x for name, x in self.held.items() if name in ("z", "reference")}
        if self.sharded:
            vectors = {name: self._whole(x) for name, x in vectors.items()}
        return {**made, **vectors}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take it up again, on any number of processes; a ValueError where size or width differ."""
        refuse_other({"samples": self.samples, "width": tuple(self.width)}, state, "bank")
        if state["process"] != 0:
            raise ValueError(
                f"this checkpoint of a sharded bank was written by process {state['process']}; load process 0's, which "
                "has all of it."
            )
        self.updates, self.pushed, self.unit = state["updates"], state["pushed"], state["unit"]
        self._complete = False
        device = self.held["z"].device
        rank, world = self.shard
        for name in self.held:
            given = state[name]
            if self.sharded and name in ("z", "reference"):
                given = given.movedim(-2, 0)[rank::world].movedim(0, -2)
            self.held[name] = given.detach().to(device, copy=True)

    def _check(self, sample: Tensor) -> None:
        """Refuse samples that the data set does not have, and the same one twice."""
        if not len(sample):
            return
        if sample.max() >= self.samples:
            raise ValueError(
                f"sample indices must lie in [0, {self.samples}), as samples={self.samples} says; "
                f"got {int(sample.max())}."
            )
        ordered = sample.sort().values
        if (again := ordered[1:][ordered[1:] == ordered[:-1]]).numel():
            raise ValueError(
                f"a bank keeps one embedding a sample, and sample {int(again[0])} stands twice in this update of all "
                "processes: update it with one view at a time, and with a sampler that does not repeat."
            )

    def _checked_later(self, everyone: Embeddings) -> Embeddings:
        """Look for wrong samples without waiting for the device: an update reads what those before it found."""
        if self._seen is not None and self._seen.any():
            raise ValueError(
                f"an earlier update of this bank had a sample twice, or one outside [0, {self.samples}): update it "
                "with one view at a time, and with a sampler that does not repeat."
            )
        if not len(everyone):
            return everyone
        sample = everyone.sample
        ordered = sample.sort().values
        wrong = (ordered[1:] == ordered[:-1]).any() | (ordered[0] < 0) | (ordered[-1] >= self.samples)
        self._wrong = wrong if self._wrong is None else self._wrong.to(wrong.device) | wrong
        if self._seen is None:
            self._seen = torch.zeros((), dtype=torch.bool, pin_memory=sample.is_cuda)
        self._seen.copy_(self._wrong, non_blocking=True)
        return replace(everyone, sample=sample.clamp(0, self.samples - 1))

    def _rows(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Give vectors and references at these rows of what this process holds."""
        reference = self.held.get("reference")
        return self.held["z"].index_select(-2, rows), None if reference is None else reference[rows]

    def _embeddings(self, sample: Tensor, z: Tensor, reference: Tensor | None) -> Embeddings:
        made = Embeddings(z, sample, self.held["group"][sample], torch.full_like(sample, REMEMBERED), reference)
        made.__dict__["unit"] = self.unit
        return made

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

    def _whole(self, share: Tensor) -> Tensor:
        """Bring all shares together on process 0, some rows at a time; the others give their own."""
        rank, world = self.shard
        share = share.movedim(-2, 0)
        sizes = [len(range(other, self.samples, world)) for other in range(world)]
        whole = torch.empty(self.samples, *share.shape[1:]) if rank == 0 else None
        for start in range(0, max(sizes), BLOCK):
            counts = [min(max(size - start, 0), BLOCK) for size in sizes]
            everyone = distributed.gather(share[start : start + BLOCK], counts)
            if whole is not None:
                for other, rows in enumerate(torch.split(everyone, counts)):
                    first = start * world + other
                    whole[first : first + world * len(rows) : world] = rows.cpu()
        return (share if whole is None else whole).movedim(0, -2)
