"""The bank: the newest embedding of every sample."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from contrast.core import distributed
from contrast.core.embeddings import Embeddings
from contrast.memory.memory import MEMORIES, EmbeddingStore, SearchIndex, as_vectors, check_anchors
from contrast.memory.sharding import check_free_memory, gather_on_first, merge_shards, request
from contrast.retrieval import Found, build_index

SHARDED = ("z", "reference")
"""The tensors of which each process of a sharded bank stores its samples' rows only."""


@MEMORIES.register("bank", aliases=("memory_bank", "instance_discrimination"))
class Bank(EmbeddingStore):
    """The newest embedding of every sample of the data set, with its group and its age.

    Samples without an embedding yet are no candidates. Every process stores all embeddings up to `bytes_per_process`;
    above it each stores those of its share of the samples (sample % W == rank), and the bank can only be searched, by
    all processes together. A checkpoint of a sharded bank, which all processes make together and process 0 writes,
    contains all embeddings and loads on any number of processes.

    Args:
        samples: number of sample indices; all indices are below it.
        dim: D, the width of the embeddings.
        heads: H for (H, N, D) embeddings.
        bytes_per_process: up to this size every process stores all vectors.
        reference_dim: R, where a frozen network's vectors are stored too (CWCL, `guide`).

    Attributes:
        sharded: whether each process stores its share only; decided when the bank is first used.

    Raises:
        ValueError: for sizes below 1; where it does not fit into the free memory; for a repeated sample in one update
            of all processes together, or one outside [0, samples) (on CUDA, where reading them would wait for the
            device, a later update raises it).

    Source: Wu et al. 2018 (instance discrimination), arXiv:1805.01978.

    Example:
        >>> bank, index = Bank(samples=100, dim=8), torch.arange(4)
        >>> value = loss(z_a, z_b, sample=index, extra=[bank])  # in every step; then backward() and step()
        >>> bank.update(z_b, sample=index)  # after backward()
        >>> bank.known
        tensor([0, 1, 2, 3])
    """

    counters = ("rows_written",)
    fixed = ("samples",)

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
        super().__init__(dim, heads, reference_dim)
        self.samples = samples
        self.bytes_per_process = bytes_per_process
        check_free_memory(samples, self.bytes_per_row, bytes_per_process)
        never = torch.full((samples,), -1)
        self.tensors = {**self.zeros(samples), "group": never, "written": never.clone()}
        self.shard = (0, 1)
        self.rows_written = 0
        self._complete = False
        self._check = AsyncIndexCheck(samples)

    @property
    def sharded(self) -> bool:
        """True if each process stores the vectors of its share of the samples only."""
        return self.shard[1] > 1

    @property
    def age(self) -> Tensor:
        """(samples,) int64, the age of each embedding in steps: updates since it was written; -1 without one."""
        written = self.tensors["written"]
        return torch.where(written < 0, -1, self.updates - written)

    @property
    def known(self) -> Tensor:
        """(n,) int64, the samples that have an embedding, ascending."""
        return (self.tensors["written"] >= 0).nonzero().squeeze(1)

    def candidates(self, anchor: Embeddings) -> Embeddings:
        """Return all embeddings, without a copy once every sample has one; ValueError where the bank is sharded."""
        check_anchors(anchor, first=self.updates == 0)
        self.move_to(anchor.z.device)
        self._shard_if_too_large()
        if self.sharded:
            raise ValueError(
                f"this bank is sharded over {self.shard[1]} processes, since its vectors need more than "
                f"bytes_per_process={self.bytes_per_process}: search it by hard_negatives or nearest_positives, or "
                "raise bytes_per_process."
            )
        if not self._complete:
            self._complete = bool((self.tensors["written"] >= 0).all())
        if not self._complete:
            return self.at(self.known)
        every_sample = torch.arange(self.samples, device=self.tensors["z"].device)
        return self._embeddings(every_sample, self.tensors["z"], self.tensors.get("reference"))

    def check_rows(self, gathered: Embeddings) -> Embeddings:
        """Return the rows; ValueError for samples that the data set does not have, and for repeated ones."""
        self._shard_if_too_large()
        if gathered.z.device.type != "cpu":
            return replace(gathered, sample=self._check(gathered.sample))
        _check_samples(gathered.sample, self.samples)
        return gathered

    def write(self, gathered: Embeddings) -> None:
        """Write the rows of their samples."""
        self.rows_written += len(gathered)
        self.tensors["group"][gathered.sample] = gathered.group
        self.tensors["written"][gathered.sample] = self.updates
        rank, world = self.shard
        own = gathered[gathered.sample % world == rank] if self.sharded else gathered
        rows = own.sample // world
        self.tensors["z"][..., rows, :] = own.z
        if own.reference is not None:
            self.tensors["reference"][rows] = own.reference

    @property
    def metrics(self) -> dict[str, Tensor | float]:
        """How many samples have an embedding, and its mean age in steps."""
        age = self.age
        known = (age >= 0).sum()
        return {"bank": known, "bank_age": age.clamp(min=0).sum() / known.clamp(min=1)}

    @property
    def empty(self) -> bool:
        """True if nothing has been stored yet."""
        return not self.rows_written

    def search_index(self, index: str | None = None, *, seed: int = 0) -> SearchIndex:
        """Return what this process stores, prepared for searching by an index of `retrieval`; exactly if None."""
        self._shard_if_too_large()
        rank, world = self.shard
        known = self.known
        known = known[known % world == rank] if self.sharded else known
        stored = self._embeddings(known, *self._rows(known // world))
        return SearchIndex(stored, build_index(as_vectors(stored), index, seed=seed) if index and len(known) else None)

    def search(self, anchor: Embeddings, k: int, *, own_group: bool = True, index: SearchIndex | None = None) -> Found:
        """Return the samples of the k nearest embeddings of each of N anchors, (N, k); -1 where there are fewer.

        Excludes the anchor's own sample; with own_group=False also its group. Where the bank is sharded, every process
        calls it with its own anchors and searches its shard for all.
        """
        self.move_to(anchor.z.device)
        index = index or self.search_index()
        gathered = anchor.detach().gathered() if self.sharded else anchor
        found = index.search(gathered, k, own_group=own_group)
        if len(index.stored):
            sample = index.stored.sample[found.position.clamp(min=0)]
            found = found._replace(position=torch.where(found.position < 0, -1, sample))
        return merge_shards(found, len(anchor), k) if self.sharded else found

    @torch.no_grad()
    def at(self, sample: Tensor) -> Embeddings:
        """Return the embeddings of (n,) samples that have one; where the bank is sharded, every process calls it."""
        self._shard_if_too_large()
        rank, world = self.shard
        if not self.sharded:
            return self._embeddings(sample, *self._rows(sample))
        requested = request(sample, world)
        z, reference = self._rows(requested.stored_by(rank) // world)
        z = requested.gather(z.movedim(-2, 0)).movedim(0, -2)
        reference = None if reference is None else requested.gather(reference)
        return self._embeddings(sample, z, reference)

    def sample_at(self, position: Tensor) -> Tensor:
        """Return the samples at these positions: positions in a bank are samples."""
        return position

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore a checkpoint, on any number of processes."""
        super().set_extra_state(state)
        self._complete = False

    def _saved(self, name: str, tensor: Tensor) -> Tensor:
        # Not a copy: a bank may need more than half of the memory.
        return gather_on_first(tensor, self.samples, *self.shard) if self.sharded and name in SHARDED else tensor

    def _restored(self, name: str, tensor: Tensor) -> Tensor:
        if name not in SHARDED:
            return tensor
        rows, (rank, world) = tensor.movedim(-2, 0), self.shard
        if len(rows) != self.samples:
            raise ValueError(
                "this checkpoint of a sharded bank was not written by process 0; load process 0's, which contains all "
                "of it."
            )
        return rows[rank::world].movedim(0, -2)

    def _rows(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return vectors and references at these rows of what this process stores."""
        reference = self.tensors.get("reference")
        return self.tensors["z"].index_select(-2, rows), None if reference is None else reference[rows]

    def _embeddings(self, sample: Tensor, z: Tensor, reference: Tensor | None) -> Embeddings:
        return self.remembered(z, sample, self.tensors["group"][sample], reference)

    def _shard_if_too_large(self) -> None:
        """Keep this process's share only, where there are several and all of it is too much for one."""
        world = distributed.world_size()
        if self.sharded and world != self.shard[1]:
            raise ValueError(
                f"this bank is sharded over {self.shard[1]} processes, which use it together: not inside "
                "contrast.local(), nor on another number of processes without its checkpoint."
            )
        if self.sharded or world == 1 or self.samples * self.bytes_per_row <= self.bytes_per_process:
            return
        self.shard = (distributed.rank(), world)
        for name in SHARDED:
            if name in self.tensors:
                rows = self.tensors[name].movedim(-2, 0)[self.shard[0] :: world]
                self.tensors[name] = rows.movedim(0, -2).clone(memory_format=torch.contiguous_format)


def _check_samples(sample: Tensor, samples: int) -> None:
    """Check that no sample is >= `samples` or repeated; reading them waits for their device.

    Args:
        sample: (n,) int64 from 0, of all processes.
        samples: how many the data set has.
    """
    if not len(sample):
        return
    if sample.max() >= samples:
        raise ValueError(
            f"sample indices must be in [0, {samples}), since this bank has samples={samples}; got {int(sample.max())}."
        )
    ordered = sample.sort().values
    if (repeated := ordered[1:][ordered[1:] == ordered[:-1]]).numel():
        raise ValueError(
            f"a bank stores one embedding per sample, and sample {int(repeated[0])} occurs twice in this update of all "
            "processes: update it with one view at a time, and with a sampler that does not repeat."
        )


class AsyncIndexCheck:
    """The same check without waiting for the device: each call reads the result of the calls before it.

    Args:
        samples: how many the data set has.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self._wrong: Tensor | None = None
        self._on_host: Tensor | None = None

    def __call__(self, sample: Tensor) -> Tensor:
        """Return (n,) samples clamped to [0, samples); ValueError for what was wrong in an earlier call."""
        if self._on_host is not None and self._on_host.any():
            raise ValueError(
                f"an earlier update of this bank had a sample twice, or one outside [0, {self.samples}): update it "
                "with one view at a time, and with a sampler that does not repeat."
            )
        if not len(sample):
            return sample
        ordered = sample.sort().values
        wrong = (ordered[1:] == ordered[:-1]).any() | (ordered[0] < 0) | (ordered[-1] >= self.samples)
        self._wrong = wrong if self._wrong is None else self._wrong.to(wrong.device) | wrong
        if self._on_host is None:
            self._on_host = torch.zeros((), dtype=torch.bool, pin_memory=sample.is_cuda)
        self._on_host.copy_(self._wrong, non_blocking=True)
        return sample.clamp(0, self.samples - 1)
