"""What a loss accepts as views, identities, references and extra candidates, and what it says of all else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from contrast.core.embeddings import REMEMBERED, Embeddings, concatenate, normalise, unknown_samples

UNLABELLED = -(2**62)
"""The group of an unlabelled row is this minus its sample index, which is no label's number."""

LABEL_WORDS = ("label", "labels", "y", "classes")
"""Names under which other libraries take labels."""


@runtime_checkable
class Source(Protocol):
    """Where more candidates come from: a queue, a bank, retrieved negatives."""

    def candidates(self, anchor: Embeddings) -> Embeddings:
        """Return the candidates for these anchors; the same on every process."""


@runtime_checkable
class UpdatedSource(Source, Protocol):
    """A source whose candidates change with its updates: the backward pass must come before the next one.

    Attributes:
        updates: how often it was updated.
    """

    updates: int


Extra = Tensor | Embeddings | Source


def check_views(name: str, views: Sequence[Tensor], targets: Sequence[Tensor | None] | None, *, one_view: bool) -> None:
    """Refuse views and targets that do not fit together.

    Args:
        name: the loss.
        views: one tensor per view.
        targets: their twins.
        one_view: whether one view alone is enough, since positives come from `group`.

    Raises:
        TypeError: for labels in the place of a view.
        ValueError: for all else.
    """
    if not views:
        raise ValueError(f"{name} takes one tensor per view: loss(z_a, z_b).")
    for z in views[1:]:
        if isinstance(z, Tensor) and not z.is_floating_point() and z.ndim == 1:
            raise TypeError(
                f"{name} takes views as positional arguments, and a tensor of {tuple(z.shape)} whole numbers is none; "
                "labels are given by name: loss(z_a, z_b, group=labels)."
            )
    if isinstance(targets, Tensor):
        raise ValueError(f"{name}: targets is a sequence, one per view: targets=(k_a, k_b); got one tensor.")
    if targets and len(targets) < len(views):
        raise ValueError(
            f"{name}: targets[v] is the twin of view v, None where there is none; "
            f"got {len(targets)} targets for {len(views)} views."
        )
    if len(views) == 1 and not targets and not one_view:
        raise ValueError(f"{name} got one view and no targets; give it two views, loss(z_a, z_b), or targets=.")
    if len(views) == 1 and targets and all(target is None for target in targets[1:]):
        raise ValueError(
            f"{name}: targets[v] is the twin of view v and never its candidate; the only view needs the target of "
            "another one: targets=(None, k_b)."
        )
    named = [(f"view {index}", z) for index, z in enumerate(views)]
    named += [(f"target {index}", z) for index, z in enumerate(targets or ()) if z is not None]
    for what, z in named:
        if not isinstance(z, Tensor) or not z.is_floating_point() or z.ndim not in (2, 3):
            raise ValueError(f"{name}: {what} must be a floating (N, D) or (H, N, D) tensor; got {described(z)}.")
        if z.shape != views[0].shape:
            raise ValueError(
                f"{name}: every view and target has the same shape, row i the same sample; "
                f"{named[0][0]} is {tuple(views[0].shape)} and {what} is {tuple(z.shape)}."
            )


def refuse_unknown(name: str, unknown: Iterable[str]) -> None:
    """Refuse keyword arguments that no loss has; labels are called `group`.

    Raises:
        TypeError: with the sentence.
    """
    for word in unknown:
        if word in LABEL_WORDS:
            raise TypeError(f"{name}: labels are given as group: loss(z_a, z_b, group={word}); got {word}=.")
        raise TypeError(
            f"{name} has no argument {word}=; it takes targets, sample, group, reference, extra and reduction."
        )


def identities(views: Sequence[Tensor], sample: Tensor | None, group: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (N,) samples and groups; a row without a label is of its sample's own group.

    Args:
        views: (N, D) or (H, N, D) each.
        sample: (N,) int64; None for new samples.
        group: (N,) int64, negative for unlabelled; None for the samples.
    """
    count, device = views[0].shape[-2], views[0].device
    sample = unknown_samples(count, device) if sample is None else _identity("sample", sample, count, device)
    if group is None:
        return sample, sample
    group = _identity("group", group, count, device)
    return sample, torch.where(group < 0, UNLABELLED - sample, group)


def references(
    name: str, reference: Tensor | Sequence[Tensor] | None, views: Sequence[Tensor], targets: Sequence[Any] | None
) -> Tensor | None:
    """Return (N, R), or (V, N, R) where there is one per view.

    Raises:
        ValueError: for other shapes.
    """
    if reference is None:
        return None
    several = not isinstance(reference, Tensor)
    parts = [reference] if isinstance(reference, Tensor) else list(reference)
    count, wanted = views[0].shape[-2], max(len(views), len(targets or ()))
    if not all(isinstance(one, Tensor) and one.ndim == 2 and len(one) == count for one in parts) or (
        several and (len(parts) != wanted or len({one.shape[1] for one in parts}) != 1)
    ):
        raise ValueError(
            f"{name}: reference is ({count}, R), or one ({count}, R) for each of the {wanted} views; "
            f"got {', '.join(map(described, parts)) or 'none'}."
        )
    return torch.stack(parts) if several else parts[0]


def as_list(extra: Any) -> list[Extra]:
    """Return extra candidates as a list, whether they are none, one or several."""
    if extra is None:
        return []
    alone = isinstance(extra, Tensor | Embeddings | Source) or not isinstance(extra, Iterable)
    return [extra] if alone else list(extra)


def as_embeddings(source: Extra, own: Sequence[Embeddings], place: int, *, unit: bool) -> Embeddings:
    """Return extra candidates as embeddings of the views' type: a plain (K, D) tensor is remembered negatives.

    Args:
        source: the candidates, or where they come from.
        own: the views.
        place: the place of the source among all extras.
        unit: whether a plain tensor is scaled to unit length.

    Raises:
        ValueError: for another kind, width or number of heads, and (on the CPU) for values that are not finite.
    """
    if isinstance(source, Tensor):
        if source.ndim not in (2, 3) or not source.is_floating_point():
            raise ValueError(f"a plain extra is a floating (K, D) tensor; got {described(source)}.")
        sample = unknown_samples(source.shape[-2], source.device, 1 + place)
        z = normalise(source) if unit else source
        made = Embeddings(z, sample, sample, torch.full_like(sample, REMEMBERED))
    elif isinstance(source, Embeddings):
        made = source
    elif isinstance(source, Source):
        made = source.candidates(concatenate(own))
    else:
        raise ValueError(
            f"extra takes (K, D) tensors, Embeddings and memories, which have candidates(anchor); "
            f"got {described(source)}."
        )
    if made.z.shape[-1] != own[0].z.shape[-1]:
        raise ValueError(
            f"extra candidates have as many dimensions as the views, {own[0].z.shape[-1]}; got {made.z.shape[-1]}."
        )
    if made.z.device.type == "cpu" and not finite(made.z):
        raise ValueError("extra candidates hold values that are not finite (NaN or inf).")
    dtype, heads = own[0].z.dtype, own[0].z.shape[:-2]
    if made.z.ndim == 3 and made.z.shape[:-2] != heads:
        raise ValueError(
            f"extra candidates of heads have as many as the views, {heads[0] if heads else 'which have none'}; "
            f"got {described(made.z)}."
        )
    if made.z.dtype == dtype and (made.reference is None or made.reference.dtype == dtype):
        return made
    return replace(made, z=made.z.to(dtype), reference=None if made.reference is None else made.reference.to(dtype))


def check_finite(what: str, z: Tensor, origin: str) -> None:
    """Refuse NaN and inf on the CPU, where looking waits for no device.

    Raises:
        ValueError: with what holds them, and where to look.
    """
    if z.device.type == "cpu" and not finite(z):
        raise ValueError(f"{what} holds values that are not finite (NaN or inf); look at {origin}.")


def finite(z: Tensor) -> bool:
    """True if all numbers are finite; in a compiled graph this is not looked at."""
    if torch.compiler.is_compiling():
        return True
    # A sum may leave the range although no number does; only then a mask is made.
    return math.isfinite(float(z.detach().sum())) or bool(torch.isfinite(z).all())


def described(z: object) -> str:
    """Describe what was given, for an error."""
    return f"{z.dtype} of shape {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__


def _identity(name: str, values: Tensor, count: int, device: torch.device) -> Tensor:
    if not isinstance(values, Tensor) or values.shape != (count,) or values.is_floating_point() or values.is_complex():
        raise ValueError(
            f"{name} must be a tensor of ({count},) whole numbers, one for each row of a view; got {described(values)}."
        )
    return values.to(device=device, dtype=torch.int64)
