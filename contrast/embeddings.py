"""Embeddings that know who they are: which sample, which group, which view."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from contrast import distributed

REMEMBERED = -1
"""The view of a candidate that comes from a queue or a bank."""
PADDING = -2
"""The view of a row that is nothing at all: never a candidate, never a valid anchor."""


@dataclass(frozen=True, eq=False)
class Embeddings:
    """N embeddings, each with its identity; what a mask would say, these three vectors say.

    Args:
        z: (N, D), or (H, N, D) for H heads; unit length unless a loss asks for raw ones.
        sample: (N,) int64, the index in the data set; the same sample has the same number on every process.
        group: (N,) int64, equal = positives: the sample index, or the label.
        view: (N,) int64, which view; `REMEMBERED` for a queue or bank entry, `PADDING` for nothing at all.
        reference: (N, R), unit vectors of a frozen tower.

    Raises:
        ValueError: where the lengths differ.
    """

    z: Tensor
    sample: Tensor
    group: Tensor
    view: Tensor
    reference: Tensor | None = None
    parts: tuple[Embeddings, ...] = field(default=(), init=False, repr=False)
    """What `concatenate` put together, by which `Pairs` knows that its anchors are its candidates."""

    def __post_init__(self) -> None:
        if self.z.ndim not in (2, 3):
            raise ValueError(f"embeddings are (N, D), or (H, N, D) for H heads; got the shape {tuple(self.z.shape)}.")
        for name in ("sample", "group", "view"):
            identity = getattr(self, name)
            if identity.shape != (len(self),) or identity.is_floating_point():
                raise ValueError(
                    f"{name} must be ({len(self)},) whole numbers, one for each embedding; "
                    f"got the shape {tuple(identity.shape)} of {identity.dtype}."
                )
        if self.reference is not None and (self.reference.ndim != 2 or len(self.reference) != len(self)):
            raise ValueError(f"reference must be ({len(self)}, R); got the shape {tuple(self.reference.shape)}.")

    def __len__(self) -> int:
        return self.z.shape[-2]

    def __getitem__(self, index: slice | Tensor) -> Embeddings:
        """Give the embeddings at `index`: a slice, (n,) positions or an (N,) bool mask."""
        return Embeddings(
            self.z[..., index, :],
            self.sample[index],
            self.group[index],
            self.view[index],
            None if self.reference is None else self.reference[index],
        )

    def detach(self) -> Embeddings:
        """Give the same embeddings without their history."""
        return replace(self, z=self.z.detach())

    def gathered(self) -> Embeddings:
        """Give every process's embeddings in rank order, with gradient; local sizes may differ, also 0."""
        return gather_all([self])[0]


def normalise(z: Tensor) -> Tensor:
    """Give the rows of `z` unit length, in float32 or better; a zero row stays zero, with zero gradient.

    Args:
        z: (..., D) in any floating type.
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    # The direction does not depend on this constant, so it carries no gradient; it keeps the squares in range.
    largest = z.detach().abs().amax(dim=-1, keepdim=True) if z.shape[-1] else z.new_ones(*z.shape[:-1], 1)
    z = z / torch.where(largest == 0, 1, largest)
    squared = z.square().sum(dim=-1, keepdim=True)
    zero = squared == 0
    return torch.where(zero, 0, z / torch.where(zero, 1, squared).sqrt())


def concatenate(parts: Sequence[Embeddings]) -> Embeddings:
    """Put embeddings after one another, in the order given."""
    if len(parts) == 1:
        return parts[0]
    references = [part.reference for part in parts if part.reference is not None]
    sample = torch.cat([part.sample for part in parts])
    same = all(part.group is part.sample for part in parts)
    made = Embeddings(
        torch.cat([part.z for part in parts], dim=-2),
        sample,
        sample if same else torch.cat([part.group for part in parts]),
        torch.cat([part.view for part in parts]),
        torch.cat(references) if len(references) == len(parts) else None,
    )
    object.__setattr__(made, "parts", tuple(parts))
    return made


def gather_all(parts: Sequence[Embeddings]) -> list[Embeddings]:
    """Give every process's embeddings in rank order, part by part, with gradient and in one exchange.

    Every process calls it with the same number of parts; their sizes may differ, also be 0.
    """
    if distributed.world_size() == 1 or not parts:
        return list(parts)
    own = concatenate(parts)
    sizes = distributed.exchange_sizes([len(part) for part in parts], own.z.device)
    rows = [sum(row) for row in sizes]
    identity = distributed.gather(torch.stack([own.sample, own.group, own.view], dim=1), rows)
    z = distributed.gather(own.z.movedim(-2, 0), rows).movedim(0, -2)
    reference = None if own.reference is None else distributed.gather(own.reference, rows)
    everyone = Embeddings(z, identity[:, 0], identity[:, 1], identity[:, 2], reference)
    starts = list(itertools.accumulate((size for row in sizes for size in row), initial=0))
    blocks = [everyone[start : start + size] for start, size in zip(starts, itertools.chain(*sizes), strict=False)]
    return [concatenate(blocks[index :: len(parts)]) for index in range(len(parts))]


_calls = itertools.count()


def unknown_samples(count: int, device: torch.device) -> Tensor:
    """Give (count,) sample indices for embeddings that came without: negative, new on every process and every call."""
    # 2**24 rows a call, 2**10 processes: 2**29 calls before int64 ends.
    world, rank = distributed.world_size(), distributed.rank()
    first = next(_calls) * 2**24
    return -1 - ((first + torch.arange(count, device=device)) * world + rank)
