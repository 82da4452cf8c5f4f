"""What losses accept as views, identities, references and extra candidates, and the errors for everything else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from contrast.core.embeddings import REMEMBERED, UNLABELLED, Embeddings, concatenate, normalise, unknown_samples

LABEL_ARGUMENTS = ("label", "labels", "y", "classes")
"""Names of the labels in other libraries."""


@runtime_checkable
class Source(Protocol):
    """A source of further candidates: a queue, a bank, retrieved negatives.

    Example:
        >>> class Noise:
        ...     def candidates(self, anchor):
        ...         unknown = torch.arange(-100, -92)
        ...         z = normalise(torch.randn(8, anchor.z.shape[-1]))
        ...         return Embeddings(z, unknown, unknown, torch.full_like(unknown, -1))
        >>> isinstance(Noise(), Source)
        True
        >>> value = InfoNCE()(z_a, z_b, extra=[Noise()])
    """

    def candidates(self, anchor: Embeddings) -> Embeddings:
        """Return the candidates for these anchors, the same on every process."""


@runtime_checkable
class UpdatedSource(Source, Protocol):
    """A source whose candidates change with its updates: the backward pass must come before the next one.

    Attributes:
        updates: how often it was updated.
    """

    updates: int


Extra = Tensor | Embeddings | Source


def check_views(name: str, views: Sequence[Tensor], targets: Sequence[Tensor | None] | None, *, one_view: bool) -> None:
    """Check that views and targets fit together.

    Args:
        name: of the loss, for messages.
        views: one tensor per view.
        targets: their twins.
        one_view: True if one view is enough, since positives come from `group`.

    Raises:
        TypeError: for labels in the place of a view.
        ValueError: for everything else.
    """
    if not views:
        raise ValueError(f"{name} takes one tensor per view: loss(z_a, z_b).")
    for z in views[1:]:
        if isinstance(z, Tensor) and not z.is_floating_point() and z.ndim == 1:
            raise TypeError(
                f"{name} takes views as positional arguments, which a tensor of {tuple(z.shape)} whole numbers is not; "
                "labels are a keyword argument: loss(z_a, z_b, group=labels)."
            )
    if isinstance(targets, Tensor):
        raise ValueError(f"{name}: targets is a sequence, one per view: targets=(k_a, k_b); got one tensor.")
    if targets and len(targets) < len(views):
        raise ValueError(
            f"{name}: targets[v] is the twin of view v, None where there is none; "
            f"got {len(targets)} targets for {len(views)} views."
        )
    if len(views) == 1 and not targets and not one_view:
        raise ValueError(f"{name} got one view and no targets; pass two views, loss(z_a, z_b), or targets=.")
    if len(views) == 1 and targets and all(target is None for target in targets[1:]):
        raise ValueError(
            f"{name}: targets[v] is the twin of view v and never its candidate; the only view needs the target of "
            "another one: targets=(None, k_b)."
        )
    named = [(f"view {index}", z) for index, z in enumerate(views)]
    named += [(f"target {index}", z) for index, z in enumerate(targets or ()) if z is not None]
    for what, z in named:
        if not isinstance(z, Tensor) or not z.is_floating_point() or z.ndim not in (2, 3):
            raise ValueError(f"{name}: {what} must be a floating (N, D) or (H, N, D) tensor; got {description(z)}.")
        if z.shape != views[0].shape:
            raise ValueError(
                f"{name}: every view and target has the same shape, row i the same sample; "
                f"{named[0][0]} is {tuple(views[0].shape)} and {what} is {tuple(z.shape)}."
            )


def refuse_unknown(name: str, unknown: Iterable[str]) -> None:
    """Check that there is no keyword argument that no loss has; labels are called `group`.

    Raises:
        TypeError: for the first.
    """
    for argument in unknown:
        if argument in LABEL_ARGUMENTS:
            raise TypeError(f"{name}: labels are passed as group: loss(z_a, z_b, group={argument}); got {argument}=.")
        raise TypeError(
            f"{name} has no argument {argument}=; it takes targets, sample, group, reference, extra and reduction."
        )


def identities(views: Sequence[Tensor], sample: Tensor | None, group: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return samples and groups, (N,) int64 each; a row without a label has its sample's own group.

    Args:
        views: (N, D) or (H, N, D) each.
        sample: (N,) int64; None for new samples.
        group: (N,) int64, negative for unlabelled; None for the samples.
    """
    count, device = views[0].shape[-2], views[0].device
    sample = unknown_samples(count, device) if sample is None else _checked_identity("sample", sample, count, device)
    if group is None:
        return sample, sample
    group = _checked_identity("group", group, count, device)
    return sample, torch.where(group < 0, UNLABELLED - sample, group)


def references(
    name: str, reference: Tensor | Sequence[Tensor] | None, views: Sequence[Tensor], targets: Sequence[Any] | None
) -> Tensor | None:
    """Return the references, (N, R), or (V, N, R) where there is one per view; None without any.

    Raises:
        ValueError: for other shapes.
    """
    if reference is None:
        return None
    per_view = not isinstance(reference, Tensor)
    parts = [reference] if isinstance(reference, Tensor) else list(reference)
    count, expected = views[0].shape[-2], max(len(views), len(targets or ()))
    if not all(isinstance(one, Tensor) and one.ndim == 2 and len(one) == count for one in parts) or (
        per_view and (len(parts) != expected or len({one.shape[1] for one in parts}) != 1)
    ):
        raise ValueError(
            f"{name}: reference is ({count}, R), or one ({count}, R) for each of the {expected} views; "
            f"got {', '.join(map(description, parts)) or 'none'}."
        )
    return torch.stack(parts) if per_view else parts[0]


def as_list(extra: Any) -> list[Extra]:
    """Return extra candidates, which may be None, one or several, as a list."""
    if extra is None:
        return []
    single = isinstance(extra, Tensor | Embeddings | Source) or not isinstance(extra, Iterable)
    return [extra] if single else list(extra)


def as_embeddings(source: Extra, own: Sequence[Embeddings], position: int, *, unit: bool) -> Embeddings:
    """Return extra candidates as embeddings of the views' type: a plain (K, D) tensor is remembered negatives.

    Args:
        source: the candidates, or their source.
        own: the views.
        position: of the source among all extras.
        unit: True if a plain tensor is scaled to unit length.

    Raises:
        ValueError: for another kind, width or number of heads, and (on the CPU) for values that are not finite.
    """
    if isinstance(source, Tensor):
        if source.ndim not in (2, 3) or not source.is_floating_point():
            raise ValueError(f"a plain extra is a floating (K, D) tensor; got {description(source)}.")
        sample = unknown_samples(source.shape[-2], source.device, 1 + position)
        z = normalise(source) if unit else source
        candidates = Embeddings(z, sample, sample, torch.full_like(sample, REMEMBERED))
    elif isinstance(source, Embeddings):
        candidates = source
    elif isinstance(source, Source):
        candidates = source.candidates(concatenate(own))
    else:
        raise ValueError(
            f"extra takes (K, D) tensors, Embeddings and memories, which have candidates(anchor); "
            f"got {description(source)}."
        )
    if candidates.z.shape[-1] != own[0].z.shape[-1]:
        raise ValueError(
            f"extra candidates have as many dimensions as the views, {own[0].z.shape[-1]}; "
            f"got {candidates.z.shape[-1]}."
        )
    if candidates.z.device.type == "cpu" and not all_finite(candidates.z):
        raise ValueError("extra candidates contain values that are not finite (NaN or inf).")
    dtype, heads = own[0].z.dtype, own[0].z.shape[:-2]
    if candidates.z.ndim == 3 and candidates.z.shape[:-2] != heads:
        raise ValueError(
            f"extra candidates of heads have as many as the views, {heads[0] if heads else 'which have none'}; "
            f"got {description(candidates.z)}."
        )
    reference = candidates.reference
    if candidates.z.dtype == dtype and (reference is None or reference.dtype == dtype):
        return candidates
    return replace(candidates, z=candidates.z.to(dtype), reference=None if reference is None else reference.to(dtype))


def check_finite(what: str, z: Tensor, origin: str) -> None:
    """Check on the CPU, where this needs no synchronisation, that there is no NaN or inf.

    Raises:
        ValueError: with what contains them, and their likely origin.
    """
    if z.device.type == "cpu" and not all_finite(z):
        raise ValueError(f"{what} contains values that are not finite (NaN or inf); look at {origin}.")


def all_finite(z: Tensor) -> bool:
    """True if all numbers are finite; a compiled graph does not check."""
    if torch.compiler.is_compiling():
        return True
    # A sum may overflow although no number does; only then is a mask needed.
    return math.isfinite(float(z.detach().sum())) or bool(torch.isfinite(z).all())


def description(z: object) -> str:
    """Return the type, and of a tensor the shape, for a message."""
    return f"{z.dtype} of shape {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__


def _checked_identity(name: str, values: Tensor, count: int, device: torch.device) -> Tensor:
    if not isinstance(values, Tensor) or values.shape != (count,) or values.is_floating_point() or values.is_complex():
        raise ValueError(
            f"{name} must be a tensor of ({count},) whole numbers, one per row of a view; got {description(values)}."
        )
    return values.to(device=device, dtype=torch.int64)
