"""What processes do together where each stores the rows of its share of the samples: sample % W == rank."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from contrast.core import distributed
from contrast.retrieval import Found, merge

GATHERED_ROWS = 65536
"""Rows that are gathered at a time for a checkpoint."""
GIB = 2**30


class Requested(NamedTuple):
    """The samples that any process requests, each once, sorted by the process that stores them.

    Args:
        sample: (m,) int64, the same on every process.
        sizes: how many of them each process stores.
        position: (n,) int64, the positions among them of this process's own requests.
    """

    sample: Tensor
    sizes: list[int]
    position: Tensor

    def stored_by(self, rank: int) -> Tensor:
        """Return the samples that a process stores."""
        return self.sample[self.sample % len(self.sizes) == rank]

    def gather(self, rows: Tensor) -> Tensor:
        """Return (n, ...), what this process requested, from the rows of `stored_by` of every process."""
        return distributed.gather(rows, self.sizes)[self.position]


def request(sample: Tensor, world: int) -> Requested:
    """Exchange requests: every process calls it with the (n,) samples that it needs."""
    requested = torch.unique(distributed.gather_rows(sample))
    requested = requested[torch.argsort(requested % world, stable=True)]
    ordered, order = requested.sort()
    sizes = torch.bincount(requested % world, minlength=world).tolist()
    return Requested(requested, sizes, order[torch.searchsorted(ordered, sample)])


def merge_shards(found: Found, count: int, k: int) -> Found:
    """Return the k nearest of this process's anchors, from what each process found in its shard for all anchors.

    Args:
        found: for the anchors of all processes, in rank order.
        count: how many of these anchors are this process's.
        k: how many to return.
    """
    sizes = distributed.sizes_of(count, found.position.device)
    rank, world, total = distributed.rank(), distributed.world_size(), sum(sizes)
    parts = [distributed.gather(x, [total] * world).chunk(world) for x in found]
    best = merge([Found(*part) for part in zip(*parts, strict=True)], k) if total else found
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    return Found(best.similarity[own], best.position[own])


def gather_on_first(shard: Tensor, samples: int, rank: int, world: int) -> Tensor:
    """Return all rows on process 0's host, gathered from the shards (..., n, D); on the others their own shard."""
    shard = shard.movedim(-2, 0)
    sizes = [len(range(other, samples, world)) for other in range(world)]
    complete = torch.empty(samples, *shard.shape[1:]) if rank == 0 else None
    for start in range(0, max(sizes), GATHERED_ROWS):
        counts = [min(max(size - start, 0), GATHERED_ROWS) for size in sizes]
        gathered = distributed.gather(shard[start : start + GATHERED_ROWS], counts)
        if complete is not None:
            for other, rows in enumerate(torch.split(gathered, counts)):
                first = start * world + other
                complete[first : first + world * len(rows) : world] = rows.cpu()
    return (shard if complete is None else complete).movedim(0, -2)


def check_free_memory(samples: int, bytes_per_row: int, bytes_per_process: int) -> None:
    """Check that a bank fits into the free memory of the machine.

    Args:
        samples: how many embeddings it stores.
        bytes_per_row: of one embedding.
        bytes_per_process: above this, each process stores a share of the samples.

    Raises:
        ValueError: with the bytes that it needs and those that are free.
    """
    needed = samples * bytes_per_row
    processes = distributed.expected_world_size()
    share = needed // processes if needed > bytes_per_process else needed
    free = free_bytes()
    if free is not None and share > free:
        shared = f", {share / GIB:.1f} GiB on each of {processes} processes" if share < needed else ""
        raise ValueError(
            f"a bank of {samples} samples at {bytes_per_row} bytes needs {needed / GIB:.1f} GiB{shared}, and "
            f"{free / GIB:.1f} GiB of memory are free: take a queue, a smaller dim, or more processes."
        )


def free_bytes() -> int | None:
    """Return how much memory is free or can be freed; None where the system does not report it."""
    figures = Path("/proc/meminfo")
    if figures.exists():
        for line in figures.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
