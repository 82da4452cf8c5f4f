"""What every loss over pairs shares: identities, the gather, valid rows and the global mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from contrast.core import distributed
from contrast.core.embeddings import (
    PADDING,
    REMEMBERED,
    Embeddings,
    concatenate,
    full_precision,
    gather_all,
    normalise,
    normalise_many,
    of_view,
    unknown_samples,
)
from contrast.core.pairs import Pairs, Rule, all_pairs
from contrast.core.reductions import Relation
from contrast.core.registry import Registry

LOSSES = Registry("loss")
"""Every loss by name."""

BLOCK = 1024
"""Anchors at a time for a loss that reads the similarities themselves."""


@runtime_checkable
class Source(Protocol):
    """Where more candidates come from: a queue, a bank, retrieved negatives."""

    def candidates(self, anchor: Embeddings) -> Embeddings:
        """Give the candidates for these anchors; the same on every process."""


Extra = Tensor | Embeddings | Source


class PairLoss(nn.Module):
    """A loss that is one pure function of each anchor's row.

    A subclass writes `per_anchor`; identities, gathering over processes, valid rows and the mean are done here.
    `loss(z_a, z_b)` takes two or more views; on every process it returns the mean over the valid anchors of all
    processes, and its gradient is the share that DistributedDataParallel's averaging completes.

    Attributes:
        needs_positive: an anchor without a positive is left out of the mean.
        needs_negative: an anchor without a negative is left out of the mean.
        normalise: whether embeddings are given unit length first.
        reads_similarity: whether `per_anchor` reads `pairs.similarity`; it is then called for blocks of anchors, and
            again in the backward pass.
        reference_of: what a training loop hands over as `reference`: a frozen tower's vectors of each "sample", or of
            each "view".
        traced: whether torch.compile looks inside; else it calls the loss as it is, as it must where a PairFunction or
            a rule is asked about pairs.
    """

    needs_positive: ClassVar[bool] = True
    needs_negative: ClassVar[bool] = False
    normalise: ClassVar[bool] = True
    reads_similarity: ClassVar[bool] = False
    reference_of: Literal["sample", "view"] = "sample"
    traced: bool = True

    def __init__(self) -> None:
        super().__init__()
        self._last: list[Pairs] = []

    def per_anchor(self, pairs: Pairs) -> Tensor:
        """Give each anchor's loss: (N,), or (N, R) or (H, N), of which the mean over R or H is taken.

        It must be pure, let row i depend on anchor i and the candidates only, and be finite for every input.
        """
        raise NotImplementedError(f"{type(self).__name__} must say what it is per anchor: def per_anchor(self, pairs).")

    def forward(
        self,
        *views: Tensor,
        targets: Sequence[Tensor | None] | None = None,
        sample: Tensor | None = None,
        group: Tensor | None = None,
        reference: Tensor | Sequence[Tensor] | None = None,
        extra: Extra | Sequence[Extra] | None = (),
        reduction: Literal["mean", "none"] = "mean",
    ) -> Tensor:
        """Give the loss of these views.

        Args:
            *views: (N, D) each, or (H, N, D) for H heads, any floating type; row i of every view is the same sample.
            targets: momentum keys or stop-gradient projections, (N, D) each: targets[v] is view v's twin, None where
                there is none. They become the candidates, and never those of their own view.
            sample: (N,) int64 >= 0, indices in the data set; without them every row is a new sample.
            group: (N,) int64, equal = positives (labels); without it only the views of one sample are positives.
            reference: (N, R), a frozen tower's embeddings of the samples; or one (N, R) a view, of the views, which the
                targets share.
            extra: more candidates, the same on every process: memories, `Embeddings`, or plain (K, D) negatives.
            reduction: "mean", or "none" for the local anchors' rows, view after view (with one softmax a target view:
                as many rows for each anchor).

        Returns:
            The mean over the valid anchors of all processes, (); or this process's rows, (V N,).

        Raises:
            ValueError: where shapes or lengths do not fit, or (on the CPU) an embedding is not finite.
            RuntimeError: by the backward pass, where a memory in `extra` was updated since.
        """
        if not self.traced and torch.compiler.is_compiling():
            given = {"targets": targets, "sample": sample, "group": group, "reference": reference, "extra": extra}
            return _untraced(self, *views, **given, reduction=reduction)
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction is 'mean' or 'none'; got {reduction!r}.")
        self._check(views, targets)
        extras = list(extra) if isinstance(extra, list | tuple) else self._listed(extra)
        with full_precision(views[0]):
            prepared = self.pairs(
                *views,
                targets=targets,
                sample=sample,
                group=group,
                reference=self._references(reference, views, targets),
                extra=extras,
            )
            anchors = [pairs.anchor for pairs in prepared]
            rows = self.combine([self.rows(pairs) for pairs in prepared], anchors)
            # Not by setattr: torch's looks for parameters and modules, which takes longer than a small reduction.
            self.__dict__["_last"] = [_detached(pairs) for pairs in prepared]
            row = _joined(rows)
            if all(self._all_valid(pairs) for pairs in prepared):
                return _watched(row.mean() if reduction == "mean" else row, extras)
            valid = _joined([self._valid(pairs) for pairs in prepared])
            row = torch.where(valid, row, 0)
            return _watched(global_mean(row, valid) if reduction == "mean" else row, extras)

    def pairs(
        self,
        *views: Tensor,
        targets: Sequence[Tensor | None] | None = None,
        sample: Tensor | None = None,
        group: Tensor | None = None,
        reference: Tensor | None = None,
        extra: Sequence[Extra] = (),
    ) -> Sequence[Pairs]:
        """Say who meets whom; by default every view meets every view, or every target of another view."""
        own, twins = self.embed(views, targets, sample, group, reference)
        extras = self.extras(extra, own)
        if not twins:
            return [all_pairs(*own, extra=extras)]
        return [Pairs(concatenate(own), (*gather_all(twins), *extras), across=True, views=len(twins))]

    def narrowed(self, prepared: Sequence[Pairs]) -> None:
        """Be told, by a wrapper that ignores some negatives, what becomes of the pairs that this loss has made."""

    def embed(
        self,
        views: Sequence[Tensor],
        targets: Sequence[Tensor | None] | None = None,
        sample: Tensor | None = None,
        group: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> tuple[list[Embeddings], list[Embeddings]]:
        """Give the views and the targets as embeddings with identities, of unit length where the loss wants that.

        Args:
            views: (N, D) or (H, N, D) each.
            targets: their twins.
            sample: (N,) int64.
            group: (N,) int64.
            reference: (N, R), or (V, N, R) of V views.
        """
        count, device = views[0].shape[-2], views[0].device
        fresh = sample is None
        sample = unknown_samples(count, device) if sample is None else _identity("sample", sample, count, device)
        group = sample if group is None else _identity("group", group, count, device)
        if reference is not None:
            reference = normalise(reference.detach()).to(torch.promote_types(views[0].dtype, torch.float32))
            if reference.device.type == "cpu" and not _finite(reference):
                raise ValueError(
                    f"{type(self).__name__}: reference holds values that are not finite (NaN or inf); look at the "
                    "frozen tower."
                )

        def seen(view: int) -> Tensor | None:
            return reference if reference is None or reference.ndim == 2 else reference[view]

        distinct = fresh or _distinct(sample)

        def made(what: str, views: Mapping[int, Tensor]) -> list[Embeddings]:
            whole = torch.cat(list(views.values()), dim=-2) if len(views) > 1 else next(iter(views.values()))
            finite, direct = False, None
            if self.normalise:
                whole, finite, direct = normalise_many(whole)
            else:
                whole = whole.to(torch.promote_types(whole.dtype, torch.float32))
            if whole.device.type == "cpu" and not (finite or _finite(whole)):
                self._name_not_finite(what, views)
            parts = [
                of_view(z, sample, group, view, seen(view), fresh=fresh if distinct else None, unit=self.normalise)
                for view, z in zip(views, _slices(whole, len(views)), strict=True)
            ]
            for part, view in zip(parts, views.values(), strict=True):
                part.__dict__.update(direct=direct, fixed=whole.requires_grad and not view.requires_grad)
            return parts

        kept = {view: z for view, z in enumerate(targets or ()) if z is not None}
        return made("view", dict(enumerate(views))), made("target", kept) if kept else []

    def extras(self, extra: Sequence[Extra], own: Sequence[Embeddings]) -> list[Embeddings]:
        """Give further candidates as embeddings: what memories hold, plain (K, D) tensors as remembered strangers."""
        return [self._extra(source, own, place) for place, source in enumerate(extra)]

    def _extra(self, source: Extra, own: Sequence[Embeddings], place: int) -> Embeddings:
        if isinstance(source, Tensor):
            if source.ndim not in (2, 3) or not source.is_floating_point():
                raise ValueError(f"a plain extra is a floating (K, D) tensor; got {_described(source)}.")
            sample = unknown_samples(source.shape[-2], source.device, 1 + place)
            z = normalise(source) if self.normalise else source
            made = of_view(z, sample, sample, REMEMBERED, None, fresh=True, unit=self.normalise)
        elif isinstance(source, Embeddings):
            made = source
        elif isinstance(source, Source):
            made = source.candidates(concatenate(own))
        else:
            raise ValueError(
                f"extra takes (K, D) tensors, Embeddings and memories, which have candidates(anchor); "
                f"got {_described(source)}."
            )
        if made.z.shape[-1] != own[0].z.shape[-1]:
            raise ValueError(
                f"extra candidates have as many dimensions as the views, {own[0].z.shape[-1]}; got {made.z.shape[-1]}."
            )
        if made.z.device.type == "cpu" and not _finite(made.z):
            raise ValueError("extra candidates hold values that are not finite (NaN or inf).")
        dtype, heads = own[0].z.dtype, own[0].z.shape[:-2]
        if made.z.ndim == 3 and made.z.shape[:-2] != heads:
            raise ValueError(
                f"extra candidates of heads have as many as the views, {heads[0] if heads else 'which have none'}; "
                f"got {_described(made.z)}."
            )
        if made.z.dtype == dtype and (made.reference is None or made.reference.dtype == dtype):
            return made
        return replace(made, z=made.z.to(dtype), reference=None if made.reference is None else made.reference.to(dtype))

    def rows(self, pairs: Pairs) -> Tensor:
        """Give each anchor's loss, (N,): `per_anchor` once, or block by block where it reads similarities."""
        if not self.reads_similarity or len(pairs) <= BLOCK:
            return self._row(pairs)
        blocks = (pairs.block(slice(start, start + BLOCK)) for start in range(0, len(pairs), BLOCK))
        return torch.cat(
            [checkpoint(self._row, block, use_reentrant=False, preserve_rng_state=False) for block in blocks]
        )

    def _row(self, pairs: Pairs) -> Tensor:
        row = self.per_anchor(pairs)
        if row.ndim == 1:
            return row
        return row.mean(dim=0) if pairs.anchor.z.ndim == 3 and row.shape[-1] == len(pairs) else row.mean(dim=1)

    def combine(self, rows: Sequence[Tensor], anchors: Sequence[Embeddings]) -> Sequence[Tensor]:  # noqa: ARG002
        """Change the rows by statistics over anchors, once a call; (N,) for each Pairs. Here: as they are."""
        return rows

    @torch.no_grad()
    def measure(self, pairs: Pairs) -> dict[str, Tensor]:
        """Give what is worth logging about these pairs; it fills `metrics` when that is read."""
        valid = self._valid(pairs)
        mass = valid.sum().clamp(min=1)
        measured = {"anchors": valid.sum().to(pairs.anchor.z.dtype)}
        for over in ("positive", "negative"):
            mean, count = pairs.mean(over), pairs.count(over)
            if mean.ndim == 2:
                mean = mean.mean(dim=0)
            measured[f"{over}_similarity"] = torch.where(valid, mean, 0).sum() / mass
            measured[f"{over}s"] = torch.where(valid, count if count.ndim == 1 else count[0], 0).sum() / mass
        return measured

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Detached measurements of the last call on this process, averaged over its `Pairs`; {} before the first."""
        measured = [self.measure(pairs) for pairs in self._last]
        return {name: torch.stack([one[name] for one in measured]).mean() for name in (measured[0] if measured else ())}

    @torch.no_grad()
    def false_negative_rates(self, labels: Tensor) -> dict[str, Tensor]:
        """Give how many of the last call's negatives on this process were false by labels that it never used.

        "false_negatives" is the share of the negatives, before any rule, that have the anchor's label;
        "false_negatives_removed" the share of these that a rule left out; "true_negatives_removed" the share of the
        others, both the mean over heads. Negatives without a label count nowhere; of nothing the share is 0. {} before
        the first call.

        Args:
            labels: (samples,) int64 by sample index, -1 for none.
        """
        met = torch.zeros(2, 2, dtype=torch.float64, device=labels.device)
        for pairs in self._last:
            plain = _false_and_true(replace(pairs, rules=()), labels)
            met += torch.stack([plain, _false_and_true(pairs, labels) if pairs.rules else plain])
        if not self._last:
            return {}
        (false, true), (false_kept, true_kept) = met
        return {
            "false_negatives": false / (false + true).clamp(min=1),
            "false_negatives_removed": (false - false_kept) / false.clamp(min=1),
            "true_negatives_removed": (true - true_kept) / true.clamp(min=1),
        }

    def end_epoch(self) -> None:
        """Close an epoch; a loss that keeps statistics by epoch turns them over here."""

    def _references(
        self, reference: Tensor | Sequence[Tensor] | None, views: Sequence[Tensor], targets: Sequence[Any] | None
    ) -> Tensor | None:
        """Give (N, R), or (V, N, R) where there is one a view."""
        if reference is None:
            return None
        several = not isinstance(reference, Tensor)
        parts = [reference] if isinstance(reference, Tensor) else list(reference)
        count, wanted = views[0].shape[-2], max(len(views), len(targets or ()))
        if not all(isinstance(one, Tensor) and one.ndim == 2 and len(one) == count for one in parts) or (
            several and (len(parts) != wanted or len({one.shape[1] for one in parts}) != 1)
        ):
            raise ValueError(
                f"{type(self).__name__}: reference is ({count}, R), or one ({count}, R) for each of the {wanted} "
                f"views; got {', '.join(map(_described, parts)) or 'none'}."
            )
        return torch.stack(parts) if several else parts[0]

    @staticmethod
    def _listed(extra: Any) -> list[Extra]:
        if extra is None:
            return []
        # What is nothing of the kind is refused where candidates are made of it.
        alone = isinstance(extra, Tensor | Embeddings | Source) or not isinstance(extra, Iterable)
        return [extra] if alone else list(extra)

    def _all_valid(self, pairs: Pairs) -> bool:
        """Say whether every anchor is known to be valid, on this process that works alone."""
        if pairs.rules or distributed.world_size() > 1 or torch.compiler.is_compiling():
            return False
        needed: list[Relation] = []
        if self.needs_positive:
            needed.append("positive")
        if self.needs_negative:
            needed.append("negative")
        return pairs.identity.nobody_lacks(*needed)

    def _valid(self, pairs: Pairs) -> Tensor:
        valid = pairs.anchor.view != PADDING
        for needed, over in ((self.needs_positive, "positive"), (self.needs_negative, "negative")):
            if needed:
                count = pairs.count(over)  # type: ignore[arg-type]
                valid = valid & ((count if count.ndim == 1 else count.amax(dim=0)) > 0)
        return valid

    def _name_not_finite(self, what: str, views: Mapping[int, Tensor]) -> None:
        for number, z in views.items():
            if not _finite(z):
                raise ValueError(
                    f"{type(self).__name__}: {what} {number} holds values that are not finite (NaN or inf); "
                    "look at the encoder."
                )

    def _check(self, views: Sequence[Tensor], targets: Sequence[Tensor | None] | None) -> None:
        name = type(self).__name__
        if not views:
            raise ValueError(f"{name} takes one tensor a view: loss(z_a, z_b).")
        if isinstance(targets, Tensor):
            raise ValueError(f"{name}: targets is a sequence, one for each view: targets=(k_a, k_b); got one tensor.")
        if len(views) == 1 and not targets:
            raise ValueError(f"{name} got one view and no targets; give it two views, loss(z_a, z_b), or targets=.")
        if len(views) == 1 and all(target is None for target in (targets or ())[1:]):
            raise ValueError(
                f"{name}: targets[v] is the twin of view v and never its candidate; the only view needs the target of "
                "another one: targets=(None, k_b)."
            )
        shape, given = getattr(views[0], "shape", ()), [*views, *(z for z in targets or () if z is not None)]
        alike = all(isinstance(z, Tensor) and z.shape == shape and z.is_floating_point() for z in given)
        if alike and len(shape) in (2, 3):
            return
        named = [(f"view {index}", z) for index, z in enumerate(views)]
        named += [(f"target {index}", z) for index, z in enumerate(targets or ()) if z is not None]
        for what, z in named:
            if not isinstance(z, Tensor) or not z.is_floating_point() or z.ndim not in (2, 3):
                raise ValueError(f"{name}: {what} must be a floating (N, D) or (H, N, D) tensor; got {_described(z)}.")
            if z.shape != views[0].shape:
                raise ValueError(
                    f"{name}: every view and target has the same shape, row i the same sample; "
                    f"{named[0][0]} is {tuple(views[0].shape)} and {what} is {tuple(z.shape)}."
                )


def _untraced(loss: PairLoss, *views: Tensor, **given: Any) -> Tensor:
    """Call a loss behind the compiler's back; the compiler is imported only where it is at work."""
    call: Callable[..., Tensor] = torch.compiler.disable(loss.forward)  # type: ignore[no-untyped-call]
    return call(*views, **given)


def global_mean(rows: Tensor, valid: Tensor) -> Tensor:
    """Give the mean of the valid rows of all processes, () ; 0 where there is none anywhere.

    Each process sends back W / N_valid times the sum of its own rows, which the averaging of gradients over W
    processes turns into the gradient of the global mean.

    Args:
        rows: (n,) this process's rows, 0 where invalid.
        valid: (n,) bool.
    """
    world = distributed.world_size()
    if world == 1:
        return rows.sum() / valid.sum().clamp(min=1)
    own = rows.sum()
    sums = distributed.total(torch.stack([own.detach().double(), valid.sum().double()]))
    count = sums[1].clamp(min=1)
    share = own * (world / count).to(own.dtype)
    return (sums[0] / count).to(own.dtype) + (share - share.detach())


def _watched(value: Tensor, extras: Sequence[Extra]) -> Tensor:
    """Let the backward pass refuse memories that were updated since the loss was computed."""
    counts = [(source, source.updates) for source in extras if hasattr(source, "updates")]
    if not counts or not value.requires_grad or torch.compiler.is_compiling():
        return value

    def look(gradient: Tensor) -> None:  # noqa: ARG001
        if any(source.updates != count for source, count in counts):
            raise RuntimeError(
                "a memory was updated between the loss and its backward pass: call a memory's update(...) after "
                "loss.backward()."
            )

    if not torch._C._are_functorch_transforms_active():
        value.register_hook(look)  # type: ignore[no-untyped-call]
    return value


def _false_and_true(pairs: Pairs, labels: Tensor) -> Tensor:
    """Count the negatives that have the anchor's label, and the others: (2,) float64, the mean over heads."""
    found = []
    for same in (True, False):
        # (N,), or (H, N) where a rule reads the heads' similarities.
        count = torch.atleast_2d(pairs.ignoring(_labelled(labels, same=not same)).count("negative"))  # type: ignore[no-untyped-call]
        found.append(count.double().mean(dim=0).sum())
    return torch.stack(found).to(labels.device)


def _labelled(labels: Tensor, *, same: bool) -> Rule:
    """Give the rule that leaves out what has the anchor's label (or another one), and what has none."""

    def label(sample: Tensor) -> Tensor:
        known = (sample >= 0) & (sample < len(labels))
        return torch.where(known, labels.to(sample.device)[sample.clamp(0, len(labels) - 1)], -1)

    def rule(anchor: Embeddings, candidate: Embeddings, similarity: Tensor) -> Tensor:  # noqa: ARG001
        own, other = label(anchor.sample)[:, None], label(candidate.sample)
        return ((own == other) == same) | (own < 0) | (other < 0)

    return rule


def _joined(rows: Sequence[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))


def _identity(name: str, values: Tensor, count: int, device: torch.device) -> Tensor:
    if not isinstance(values, Tensor) or values.shape != (count,) or values.is_floating_point() or values.is_complex():
        raise ValueError(
            f"{name} must be a tensor of ({count},) whole numbers, one a row of a view; got {_described(values)}."
        )
    return values.to(device=device, dtype=torch.int64)


def _finite(z: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return True
    # A sum may leave the range although no number does; only then a mask is made.
    return math.isfinite(float(z.detach().sum())) or bool(torch.isfinite(z).all())


def _distinct(sample: Tensor) -> bool:
    """Say whether every sample occurs once; where looking would wait for the device, it is not known."""
    if sample.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    ordered = sample.sort().values
    return not bool((ordered[1:] == ordered[:-1]).any())


def _slices(whole: Tensor, count: int) -> list[Tensor]:
    """Cut vectors into `count` neighbouring slices of one size, which `concatenate` puts together without a copy."""
    if count == 1:
        return [whole]
    size = whole.shape[-2] // count
    if torch.compiler.is_compiling():
        # A compiled graph cannot give back several views of one split.
        return [whole[..., k * size : (k + 1) * size, :] for k in range(count)]
    return list(torch.split_with_sizes(whole, [size] * count, dim=-2))


def _detached(pairs: Pairs) -> Pairs:
    return Pairs(
        pairs.anchor.detach(), [part.detach() for part in pairs.candidates], pairs.across, pairs.views, pairs.rules
    )


def _described(z: object) -> str:
    return f"{z.dtype} of shape {tuple(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
