"""Embeddings with the sample, the group and the view of each row."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from contrast.core import distributed
from contrast.core.autograd import full_precision

REMEMBERED = -1
"""The view of a candidate that comes from a queue or a bank."""
PADDING = -2
"""The view of an empty row: never a candidate, never a valid anchor."""
UNLABELLED = -(2**62)
"""The group of a row without a label is this minus its sample index, which equals no label."""


@dataclass(frozen=True, eq=False)
class Embeddings:
    """N embeddings, each with its identity: three integer vectors, which replace (N, M) masks.

    Args:
        z: (N, D), or (H, N, D) for H heads; unit length unless a loss takes raw vectors.
        sample: (N,) int64, the index in the data set; the same sample has the same number on every process.
        group: (N,) int64, equal = positives: the sample index, or the label.
        view: (N,) int64, which view; `REMEMBERED` for an entry of a queue or bank, `PADDING` for an empty row.
        reference: (N, R), unit vectors of a frozen network.

    Raises:
        ValueError: for lengths that differ, or an identity that does not consist of whole numbers.

    Example:
        >>> index = torch.arange(4)
        >>> embeddings = Embeddings(torch.randn(4, 8), sample=index, group=index, view=torch.zeros_like(index))
        >>> len(embeddings[:2])
        2
    """

    z: Tensor
    sample: Tensor
    group: Tensor
    view: Tensor
    reference: Tensor | None = None

    def __post_init__(self) -> None:
        if self.z.ndim not in (2, 3):
            raise ValueError(f"embeddings are (N, D), or (H, N, D) for H heads; got the shape {tuple(self.z.shape)}.")
        for name in ("sample", "group", "view"):
            identity = getattr(self, name)
            if identity.shape != (len(self),) or identity.is_floating_point():
                raise ValueError(
                    f"{name} must be ({len(self)},) whole numbers, one per embedding; "
                    f"got the shape {tuple(identity.shape)} of {identity.dtype}."
                )
        if self.reference is not None and (self.reference.ndim != 2 or len(self.reference) != len(self)):
            raise ValueError(f"reference must be ({len(self)}, R); got the shape {tuple(self.reference.shape)}.")

    def __len__(self) -> int:
        return self.z.shape[-2]

    def __getitem__(self, index: slice | Tensor) -> Embeddings:
        """Return the embeddings at `index`: a slice, (n,) positions or an (N,) bool mask."""
        reference = None if self.reference is None else self.reference[index]
        return Embeddings(self.z[..., index, :], self.sample[index], self.group[index], self.view[index], reference)

    def detach(self) -> Embeddings:
        """Return the same embeddings without their autograd history."""
        return replace(self, z=self.z.detach())

    def gathered(self) -> Embeddings:
        """Return every process's embeddings in rank order, with gradient; local sizes may differ and may be 0."""
        return gather_all([self])[0]


def concatenate(parts: Sequence[Embeddings]) -> Embeddings:
    """Concatenate embeddings in the given order; the result has references if every part has them.

    Example:
        >>> index = torch.arange(4)
        >>> a, b = (Embeddings(torch.randn(4, 8), index, index, torch.full_like(index, view)) for view in (0, 1))
        >>> concatenate([a, b]).view
        tensor([0, 0, 0, 0, 1, 1, 1, 1])
    """
    if len(parts) == 1:
        return parts[0]
    references = [part.reference for part in parts if part.reference is not None]
    return Embeddings(
        torch.cat([part.z for part in parts], dim=-2),
        torch.cat([part.sample for part in parts]),
        torch.cat([part.group for part in parts]),
        torch.cat([part.view for part in parts]),
        torch.cat(references) if len(references) == len(parts) else None,
    )


def normalise(z: Tensor) -> Tensor:
    """Scale the rows of `z` to unit length, in float32 or better; a zero row stays zero, with zero gradient.

    Args:
        z: (..., D) in any floating type.

    Example:
        >>> normalise(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """
    unit: Tensor = _Normalise.apply(z.to(torch.promote_types(z.dtype, torch.float32)))[0]
    return unit


class _Normalise(torch.autograd.Function):
    """Compute u = z / |z| and 1 / |z|, both 0 where z is 0; the gradient of z is (g - (g . u) u) / |z|."""

    @staticmethod
    def forward(z: Tensor) -> tuple[Tensor, Tensor]:
        if not z.shape[-1]:
            return z.clone(), z.new_zeros(*z.shape[:-1], 1)
        # Divided by its largest coordinate first, so that squares stay in range; the length is then 1 or more.
        largest = torch.linalg.vector_norm(z, ord=torch.inf, dim=-1, keepdim=True)
        largest = largest.clamp_(min=torch.finfo(z.dtype).tiny)
        unit = z / largest
        length = torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
        unit /= length.clamp(min=0.5)
        # 1 / length overflows for a row of subnormal numbers; its gradient is 0, as for a row of zeros.
        return unit, torch.where(length >= 0.5, 1 / (length * largest), 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:  # noqa: ARG004
        ctx.save_for_backward(*output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Tensor | None:
        (unit, inverse), (g, to_inverse) = ctx.saved_tensors, gradients
        if g is None:
            return None if to_inverse is None else -to_inverse * inverse.square() * unit
        with full_precision(g):
            # A matrix product needs no third (N, D) tensor.
            along = (g.unsqueeze(-2) @ unit.unsqueeze(-1)).squeeze(-1)
            # Only a second derivative has a gradient of 1 / |z|.
            along = along if to_inverse is None else along + to_inverse * inverse
            to_z: Tensor = torch.addcmul(g, unit, along, value=-1).mul_(inverse)
            return to_z


def gather_all(parts: Sequence[Embeddings]) -> list[Embeddings]:
    """Gather every process's embeddings in rank order, part by part, with gradient and in one exchange.

    Every process calls it with the same number of parts; their sizes may differ and may be 0.

    Example:
        >>> index = torch.arange(4)
        >>> own = Embeddings(torch.randn(4, 8), sample=index, group=index, view=torch.zeros_like(index))
        >>> [len(part) for part in gather_all([own])]  # on one process
        [4]
    """
    if distributed.world_size() == 1 or not parts:
        return list(parts)
    own = concatenate(parts)
    sizes = distributed.exchange_sizes([len(part) for part in parts], own.z.device)
    rows = [sum(row) for row in sizes]
    identity = distributed.gather(torch.stack([own.sample, own.group, own.view], dim=1), rows)
    z = distributed.gather(own.z.movedim(-2, 0), rows).movedim(0, -2)
    reference = None if own.reference is None else distributed.gather(own.reference, rows)
    gathered = Embeddings(z, identity[:, 0], identity[:, 1], identity[:, 2], reference)
    starts = list(itertools.accumulate((size for row in sizes for size in row), initial=0))
    blocks = [gathered[start : start + size] for start, size in zip(starts, itertools.chain(*sizes), strict=False)]
    return [concatenate(blocks[index :: len(parts)]) for index in range(len(parts))]


_call_numbers = itertools.count()


def unknown_samples(count: int, device: torch.device, offset: int = 0) -> Tensor:
    """Return sample indices for embeddings without: (count,) int64, negative, unique over calls and processes.

    Args:
        count: how many.
        device: the device of the indices.
        offset: distinguishes the sets of one call in a compiled graph, where calls cannot be counted.

    Example:
        >>> bool((unknown_samples(4, torch.device("cpu")) < 0).all())
        True
    """
    # Below all indices that a user may write; 2**24 rows per call and 2**10 processes leave 2**28 calls.
    world, rank = distributed.world_size(), distributed.rank()
    call = offset if torch.compiler.is_compiling() else next(_call_numbers)
    first = -(2**32) - (call * 2**24 * world + rank)
    return torch.arange(first, first - count * world, -world, device=device)
