"""Embeddings that know who they are: which sample, which group, which view."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contrast.core import distributed

REMEMBERED = -1
"""The view of a candidate that comes from a queue or a bank."""
PADDING = -2
"""The view of a row that is nothing at all: never a candidate, never a valid anchor."""


class Known(NamedTuple):
    """All of one view, every sample once; a sample's group is the same in every view.

    Args:
        sample: the very tensor of the samples.
        view: the view.
        fresh: whether no other embeddings can have these samples, but for those that share the tensor.
        grouped: whether a group may hold several samples; else each is its own.
    """

    sample: Tensor
    view: int
    fresh: bool
    grouped: bool


class Direct(NamedTuple):
    """Unit vectors whose gradient is sent straight to what they were made of.

    Whoever uses `z` turns its gradient by `turn_gradient` first, in place, which saves a copy of (N, D).

    Args:
        z: (..., N, D) of unit length.
        inverse: (..., N, 1), 1 / the length before.
    """

    z: Tensor
    inverse: Tensor


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
    known: Known | None = field(default=None, init=False, repr=False)
    """What is known of the identities without looking, which saves looking."""
    unit: bool = field(default=False, init=False, repr=False)
    """Whether no vector is longer than 1, but for rounding; known without looking."""
    fixed: bool = field(default=False, init=False, repr=False)
    """Whether nobody asks for the gradient of these vectors, though the tensor they are a slice of has one."""
    direct: Direct | None = field(default=None, init=False, repr=False)
    """The same vectors with a shorter way back, where they are many."""

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
            self.references(index),
        )

    @property
    def refers(self) -> bool:
        """Whether these have the vectors of a frozen tower."""
        return self.reference is not None

    def references(self, index: slice | Tensor) -> Tensor | None:
        """Give the vectors of a frozen tower at `index`, (n, R), without more of them where that can be had."""
        return None if self.reference is None else self.reference[index]

    def detach(self) -> Embeddings:
        """Give the same embeddings without their history."""
        return self.holding(self.z.detach(), parts=(), direct=None)

    def holding(self, z: Tensor, **others: Any) -> Embeddings:
        """Give other vectors with the same identities.

        Args:
            z: as many.
            **others: fields that are to be others too.
        """
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__, z=z, **others)
        return made

    def referring(self, reference: Tensor) -> Embeddings:
        """Give the same embeddings with the vectors of a frozen tower, (N, R) unit vectors."""
        return self.holding(self.z, reference=reference)

    def gathered(self) -> Embeddings:
        """Give every process's embeddings in rank order, with gradient; local sizes may differ, also 0."""
        return gather_all([self])[0]


class _OfView(Embeddings):
    """Embeddings of one view, which is written out only when somebody asks for it."""

    number: int

    @cached_property
    def view(self) -> Tensor:
        """The view of each."""
        return torch.full_like(self.sample, self.number)


class _Piece(NamedTuple):
    """What embeddings are but for their vectors; the view is a number where it is that of all."""

    sample: Tensor
    group: Tensor
    view: Tensor | int
    reference: Tensor | None


class _Joined(Embeddings):
    """Embeddings put after one another; identities and references are put together only when somebody asks for all."""

    pieces: tuple[_Piece, ...]

    @cached_property
    def sample(self) -> Tensor:
        """The samples of all parts."""
        return torch.cat([piece.sample for piece in self.pieces])

    @cached_property
    def group(self) -> Tensor:
        """The groups of all parts; the very samples where each sample is its own."""
        if all(piece.group is piece.sample for piece in self.pieces):
            return self.sample
        return torch.cat([piece.group for piece in self.pieces])

    @cached_property
    def view(self) -> Tensor:
        """The views of all parts."""
        written = [
            piece.view if isinstance(piece.view, Tensor) else torch.full_like(piece.sample, piece.view)
            for piece in self.pieces
        ]
        return torch.cat(written)

    @cached_property
    def reference(self) -> Tensor | None:
        """The references of all parts, if each has some."""
        return _if_all([piece.reference for piece in self.pieces])

    @property
    def refers(self) -> bool:
        return all(piece.reference is not None for piece in self.pieces)

    def references(self, index: slice | Tensor) -> Tensor | None:
        if not self.refers or not isinstance(index, slice):
            return super().references(index)
        start, stop, step = index.indices(len(self))
        before = 0
        for piece in self.pieces:
            assert piece.reference is not None
            if before <= start and stop <= before + len(piece.reference):
                return piece.reference[start - before : stop - before : step]
            before += len(piece.reference)
        return super().references(index)


def normalise(z: Tensor) -> Tensor:
    """Give the rows of `z` unit length, in float32 or better; a zero row stays zero, with zero gradient.

    Args:
        z: (..., D) in any floating type.
    """
    return _normalised(z)[0]


def _normalised(z: Tensor) -> tuple[Tensor, bool]:
    """Give unit vectors, and whether every number is known to be finite."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    transforms = torch._C._are_functorch_transforms_active()
    if not transforms and z.device.type == "cpu" and 0 < z.numel() <= FEW and not torch.compiler.is_compiling():
        # Of few vectors torch goes back sooner without Python.
        length: Tensor = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
        least, most = length.detach().aminmax()
        if float(least) > _SAFE[0] and float(most) < _SAFE[1]:
            return z / length, True
    if not (transforms or (z.requires_grad and torch.is_grad_enabled())):
        return _unit(z)[0], False
    function = _UnitOfTransforms if transforms else _Unit
    unit: Tensor = function.apply(z)[0]
    return unit, False


def normalise_many(z: Tensor) -> tuple[Tensor, bool, Direct | None]:
    """Give the rows of `z` unit length, whether they are known to be finite, and many with a shorter way back too.

    Args:
        z: (..., D) in any floating type.
    """
    many = z.device.type == "cpu" and z.shape[-2] > AT_ONCE and z.requires_grad and torch.is_grad_enabled()
    if not many or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return *_normalised(z), None
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    unit, inverse = _Unit.apply(z)
    return unit, False, Direct(_Straight.apply(z, unit.detach()), inverse.detach())


class _Straight(torch.autograd.Function):
    """Values that are given; their gradient is already that of z."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, values: Tensor) -> Tensor:  # noqa: ARG004
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradients[0], None


class _Unit(torch.autograd.Function):
    """z / |z| and 1 / |z|; both 0 where z is 0."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        output = _unit(z)
        ctx.save_for_backward(*output)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Tensor | None:
        (unit, inverse), (g, to_inverse) = ctx.saved_tensors, gradients
        if g is None:
            return None if to_inverse is None else -to_inverse * inverse.square() * unit
        if not torch.is_grad_enabled() and g.ndim == 2 and len(g) > AT_ONCE:
            return _unit_gradient(g, unit, inverse)
        with full_precision(g):
            along = (g * unit).sum(dim=-1, keepdim=True)
            # Only a second derivative asks for that of 1 / |z|.
            along = along if to_inverse is None else along + to_inverse * inverse
            found: Tensor = torch.addcmul(g, unit, along, value=-1) * inverse
            return found


class _UnitOfTransforms(_Unit):
    """The same inside torch.func, which wants the context apart."""

    @staticmethod
    def forward(z: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return _unit(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:  # noqa: ARG004
        ctx.save_for_backward(*output)
        ctx.set_materialize_grads(False)


def _unit_gradient(g: Tensor, unit: Tensor, inverse: Tensor, out: Tensor | None = None) -> Tensor:
    """Give the gradient of z from that of z / |z|, in slices, whose intermediate results stay small."""
    found = torch.empty_like(g) if out is None else out
    step = AT_ONCE // 4
    for start in range(0, g.shape[-2], step):
        rows = (..., slice(start, start + step), slice(None))
        along = (g[rows] * unit[rows]).sum(dim=-1, keepdim=True)
        torch.addcmul(g[rows], unit[rows], along, value=-1, out=found[rows]).mul_(inverse[rows])
    return found


def turn_gradient(g: Tensor, direct: Direct, asked_for: Sequence[slice]) -> None:
    """Turn the gradient of unit vectors into that of what they were made of, in place, of those rows."""
    for rows in asked_for:
        share = g[..., rows, :]
        _unit_gradient(share, direct.z.detach()[..., rows, :], direct.inverse[..., rows, :], out=share)


FEW = 2**16
"""Numbers in vectors of which Python would take longer than torch."""
AT_ONCE = 8192
"""Vectors worked on at a time where there are many."""
_SAFE = (1e-12, 1e12)
"""Lengths between these have squares far from the ends of float32."""


def _unit(z: Tensor) -> tuple[Tensor, Tensor]:
    if not z.shape[-1]:
        return z.clone(), z.new_zeros(*z.shape[:-1], 1)
    if z.device.type == "cpu" and z.numel() and not torch.compiler.is_compiling():
        many = z.numel() > 64 * AT_ONCE
        # One is the quicker for few vectors, the other needs no room.
        squared = (
            torch.linalg.vector_norm(z, dim=-1, keepdim=True).square_()
            if many
            else z.square().sum(dim=-1, keepdim=True)
        )
        least, most = squared.aminmax()
        if float(least) > _SAFE[0] ** 2 and float(most) < _SAFE[1] ** 2:
            inverse = squared.sqrt_().reciprocal_()
            return z * inverse, inverse
    # The largest coordinate becomes 1, so that squares stay in range; a row that is not 0 is then 1 or longer.
    largest = torch.linalg.vector_norm(z, ord=torch.inf, dim=-1, keepdim=True).clamp_(min=torch.finfo(z.dtype).tiny)
    unit = z / largest
    length = torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
    unit /= length.clamp(min=0.5)
    return unit, torch.where(length > 0, 1 / (length * largest), 0)


_NOTHING = nullcontext()


def full_precision(z: Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off inside the block, on the device of `z`, if it is on."""
    device = z.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _NOTHING


def of_view(
    z: Tensor,
    sample: Tensor,
    group: Tensor,
    view: int,
    reference: Tensor | None,
    *,
    fresh: bool | None,
    unit: bool,
) -> Embeddings:
    """Give embeddings of one view; `fresh` says what is known of samples that are all distinct, None that nothing is.

    Args:
        z: (N, D) or (H, N, D).
        sample: (N,) int64.
        group: (N,) int64.
        view: the view of all.
        reference: (N, R), or None.
        fresh: True where no other embeddings but those that share the tensor `sample` can have these samples, False
            where others may; None where samples may repeat.
        unit: whether the vectors are of unit length, or 0.
    """
    known = None if fresh is None else Known(sample, view, fresh, grouped=group is not sample)
    given = {"z": z, "sample": sample, "group": group, "reference": reference, "known": known, "unit": unit}
    # The compiler does not know of what is made later.
    if torch.compiler.is_compiling():
        return _made(Embeddings, view=torch.full_like(sample, view), **given)
    return _made(_OfView, number=view, **given)


def _made(kind: type[Embeddings], **fields: Any) -> Embeddings:
    """Give embeddings of tensors that are known to fit together."""
    made = object.__new__(kind)
    made.__dict__.update(fields)
    return made


def _view_of(part: Embeddings) -> Tensor | int:
    """Give the views, or the number while they are not written out."""
    return part.number if isinstance(part, _OfView) and "view" not in part.__dict__ else part.view


def concatenate(parts: Sequence[Embeddings]) -> Embeddings:
    """Put embeddings after one another, in the order given."""
    if len(parts) == 1:
        return parts[0]
    given = {"z": _joined([part.z for part in parts]), "parts": tuple(parts), "unit": all(part.unit for part in parts)}
    if torch.compiler.is_compiling():
        sample = torch.cat([part.sample for part in parts])
        same = all(part.group is part.sample for part in parts)
        given |= {"sample": sample, "group": sample if same else torch.cat([part.group for part in parts])}
        given |= {"view": torch.cat([part.view for part in parts]), "reference": _if_all([p.reference for p in parts])}
        return _made(Embeddings, **given)
    pieces = tuple(_Piece(part.sample, part.group, _view_of(part), part.reference) for part in parts)
    made = _made(_Joined, pieces=pieces, **given)
    direct = parts[0].direct
    if direct is not None and all(part.direct is direct for part in parts) and len(made) == direct.z.shape[-2]:
        made.__dict__["direct"] = direct
    return made


def _joined(vectors: Sequence[Tensor]) -> Tensor:
    """Put vectors after one another; those that are neighbouring slices of a tensor give that tensor."""
    base, start = None if torch.compiler.is_compiling() else vectors[0]._base, 0
    if base is None or base.ndim != vectors[0].ndim:
        return torch.cat(list(vectors), dim=-2)
    for z in vectors:
        if z._base is not base or z.stride() != base.stride() or z.storage_offset() != start * base.stride(-2):
            return torch.cat(list(vectors), dim=-2)
        start += z.shape[-2]
    return base if start == base.shape[-2] else torch.cat(list(vectors), dim=-2)


def _if_all(references: Sequence[Tensor | None]) -> Tensor | None:
    """Put references after one another; None where some have none."""
    found = [reference for reference in references if reference is not None]
    return torch.cat(found) if len(found) == len(references) else None


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


def unknown_samples(count: int, device: torch.device, place: int = 0) -> Tensor:
    """Give (count,) sample indices for embeddings that came without: negative, new on every process and every call.

    Args:
        count: how many.
        device: where.
        place: distinguishes several of one call where calls cannot be counted, in a compiled graph.
    """
    # 2**24 rows a call, 2**10 processes: 2**29 calls before int64 ends.
    world, rank = distributed.world_size(), distributed.rank()
    call = place if torch.compiler.is_compiling() else next(_calls)
    first = -1 - (call * 2**24 * world + rank)
    return torch.arange(first, first - count * world, -world, device=device)
