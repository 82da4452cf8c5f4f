"""What processes do together that each hold the rows of some samples: sample % W == rank."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from contrast.core import distributed
from contrast.retrieval import Found, merge

BLOCK = 65536
"""Rows that are brought together at a time."""


class Asked(NamedTuple):
    """Samples that some process asks for, each once, owner after owner.

    Args:
        sample: (m,) int64, the same on every process.
        sizes: how many of them each process owns.
        which: (n,) int64, where this process's own (n,) samples stand among them.
    """

    sample: Tensor
    sizes: list[int]
    which: Tensor

    def mine(self, rank: int) -> Tensor:
        """Give those that a process owns."""
        return self.sample[self.sample % len(self.sizes) == rank]

    def gathered(self, rows: Tensor) -> Tensor:
        """Give (n, ...), what this process asked for, from every owner's rows of `mine`."""
        return distributed.gather(rows, self.sizes)[self.which]


def from_owners(sample: Tensor, world: int) -> Asked:
    """Say who gives what: every process calls it with the (n,) samples that it asks for."""
    asked = torch.unique(distributed.gather_rows(sample))
    asked = asked[torch.argsort(asked % world, stable=True)]
    ordered, order = asked.sort()
    sizes = torch.bincount(asked % world, minlength=world).tolist()
    return Asked(asked, sizes, order[torch.searchsorted(ordered, sample)])


def merged(found: Found, count: int, k: int) -> Found:
    """Give the k nearest of this process's anchors, from what each process found in its share for those of all.

    Args:
        found: for the anchors of all processes, in rank order.
        count: how many of them are this process's.
        k: how many to keep.
    """
    sizes = distributed.sizes_of(count, found.position.device)
    rank, world, everyone = distributed.rank(), distributed.world_size(), sum(sizes)
    parts = [distributed.gather(x, [everyone] * world).chunk(world) for x in found]
    best = merge([Found(*part) for part in zip(*parts, strict=True)], k) if everyone else found
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    return Found(best.similarity[own], best.position[own])


def whole_on_first(share: Tensor, samples: int, rank: int, world: int) -> Tensor:
    """Bring the shares (..., n, D) of all together on process 0's host, some rows at a time; others get their own."""
    share = share.movedim(-2, 0)
    sizes = [len(range(other, samples, world)) for other in range(world)]
    whole = torch.empty(samples, *share.shape[1:]) if rank == 0 else None
    for start in range(0, max(sizes), BLOCK):
        counts = [min(max(size - start, 0), BLOCK) for size in sizes]
        everyone = distributed.gather(share[start : start + BLOCK], counts)
        if whole is not None:
            for other, rows in enumerate(torch.split(everyone, counts)):
                first = start * world + other
                whole[first : first + world * len(rows) : world] = rows.cpu()
    return (share if whole is None else whole).movedim(0, -2)
