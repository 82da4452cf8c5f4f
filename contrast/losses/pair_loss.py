"""The base class of losses over pairs: identities, gathering over processes, valid rows and the global mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from contrast.core import distributed
from contrast.core.autograd import CHANGED, full_precision
from contrast.core.embeddings import PADDING, Embeddings, gather_all, normalise
from contrast.core.pairs import Pairs, all_pairs
from contrast.losses import diagnostics, inputs
from contrast.losses.inputs import Extra, Source, UpdatedSource
from contrast.losses.loss import LOSSES, Loss

__all__ = ["LOSSES", "Extra", "PairLoss", "Source", "global_mean"]

BLOCK = 1024
"""Anchors per block for a loss that reads the similarity matrix."""


class PairLoss(Loss):
    """A loss that is one pure function of each anchor's row.

    A subclass defines `per_anchor`; identities, gathering over processes, valid rows and the mean are computed here.
    `loss(z_a, z_b)` takes two or more views. On every process it returns the mean over the valid anchors of all
    processes; DistributedDataParallel's average of the processes' gradients is the gradient of that mean.

    Attributes:
        needs_positive: True if an anchor without a positive is left out of the mean.
        needs_negative: True if an anchor without a negative is left out of the mean.
        reads_similarity: True if `per_anchor` reads `pairs.similarity`; it is then called for blocks of anchors, and
            again in the backward pass.
        takes_one_view: True if `loss(z, group=labels)` is valid, where positives are other rows of the same view.
        traced: True if torch.compile can trace it; False where a PairFunction or a rule is evaluated on pairs.

    Example:
        >>> class Decoupled(PairLoss):
        ...     needs_negative = True
        ...
        ...     def per_anchor(self, pairs):
        ...         return pairs.logsumexp(10.0, over="negative") - 10.0 * pairs.mean(over="positive")
        >>> value = Decoupled()(torch.randn(64, 128), torch.randn(64, 128))
    """

    takes_extra = True
    needs_positive: bool = True
    needs_negative: bool = False
    reads_similarity: bool = False
    takes_one_view: bool = True
    traced: bool = True

    def __init__(self) -> None:
        super().__init__()
        self._last: list[Pairs] = []

    def per_anchor(self, pairs: Pairs) -> Tensor:
        """Return each anchor's loss: (N,), or (N, R) or (H, N), which is averaged over R or H.

        It must be pure and finite for every input; row i may depend on anchor i and the candidates only.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define the loss per anchor: def per_anchor(self, pairs)."
        )

    def forward(
        self,
        *views: Tensor,
        targets: Sequence[Tensor | None] | None = None,
        sample: Tensor | None = None,
        group: Tensor | None = None,
        reference: Tensor | Sequence[Tensor] | None = None,
        extra: Extra | Sequence[Extra] | None = (),
        reduction: Literal["mean", "none"] = "mean",
        **unknown: Any,
    ) -> Tensor:
        """Compute the loss of these views.

        Args:
            *views: (N, D) each, or (H, N, D) for H heads, any floating type; row i of every view is the same sample.
                The positives of a single view come from `group`.
            targets: momentum keys or stop-gradient projections, (N, D) each: targets[v] is view v's twin, or None.
                They are the candidates of the other views' anchors.
            sample: (N,) int64 >= 0, indices in the data set; without them every row is a new sample.
            group: (N,) int64, equal = positives (labels), negative = unlabelled: only the views of such a sample are
                its positives. Without it every sample is unlabelled.
            reference: (N, R), a frozen network's embeddings of the samples; or (N, R) per view, which targets share.
            extra: more candidates, the same on every process: memories, `Embeddings`, or plain (K, D) negatives.
            reduction: "mean", or "none" for the rows of this process's anchors, view after view (a loss with one
                softmax per target view has as many rows per anchor).
            **unknown: raises a TypeError.

        Returns:
            The mean over the valid anchors of all processes, (); or this process's rows, (V N,).

        Raises:
            TypeError: for labels that are not passed as `group`, and unknown arguments.
            ValueError: where shapes or lengths do not fit, or (on the CPU) an embedding is not finite.
            RuntimeError: by the backward pass, where a memory in `extra` was updated since.
        """
        if not self.traced and torch.compiler.is_compiling():
            arguments = {"targets": targets, "sample": sample, "group": group, "reference": reference, "extra": extra}
            untraced: Callable[..., Tensor] = torch.compiler.disable(self.forward)  # type: ignore[no-untyped-call]
            return untraced(*views, **arguments, reduction=reduction, **unknown)
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction is 'mean' or 'none'; got {reduction!r}.")
        self._check_call(views, targets, group, unknown)
        extras = inputs.as_list(extra)
        with full_precision(views[0]):
            prepared = self.pairs(
                *views,
                targets=targets,
                sample=sample,
                group=group,
                reference=inputs.references(type(self).__name__, reference, views, targets),
                extra=extras,
            )
            rows = self.combine([self.rows(pairs) for pairs in prepared], prepared)
            self._last = [pairs.detach() for pairs in prepared]
            valid = torch.cat([self._valid(pairs) for pairs in prepared])
            row = torch.where(valid, torch.cat(list(rows)), 0)
            return _refuse_updated(global_mean(row, valid) if reduction == "mean" else row, extras)

    def pairs(
        self,
        *views: Tensor,
        targets: Sequence[Tensor | None] | None = None,
        sample: Tensor | None = None,
        group: Tensor | None = None,
        reference: Tensor | None = None,
        extra: Sequence[Extra] = (),
    ) -> Sequence[Pairs]:
        """Return the pairs: by default every view with every view, or with the targets of the other views."""
        own, twins = self.embed(views, targets, sample, group, reference)
        extras = self.extras(extra, own)
        if not twins:
            return [all_pairs(*own, extra=extras)]
        return [Pairs(own, (*gather_all(twins), *extras), across=True, views=len(twins))]

    def embed(
        self,
        views: Sequence[Tensor],
        targets: Sequence[Tensor | None] | None = None,
        sample: Tensor | None = None,
        group: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> tuple[list[Embeddings], list[Embeddings]]:
        """Return the views and the targets as embeddings with identities, of unit length if `normalise`.

        Args:
            views: (N, D) or (H, N, D) each.
            targets: their twins.
            sample: (N,) int64.
            group: (N,) int64.
            reference: (N, R), or (V, N, R) of V views.
        """
        name = type(self).__name__
        sample, group = inputs.identities(views, sample, group)
        if reference is not None:
            reference = normalise(reference.detach()).to(torch.promote_types(views[0].dtype, torch.float32))
            inputs.check_finite(f"{name}: reference", reference, "the frozen network")

        def as_view(what: str, number: int, z: Tensor) -> Embeddings:
            z = normalise(z) if self.normalise else z.to(torch.promote_types(z.dtype, torch.float32))
            inputs.check_finite(f"{name}: {what} {number}", z, "the encoder")
            of_view = reference if reference is None or reference.ndim == 2 else reference[number]
            return Embeddings(z, sample, group, torch.full_like(sample, number), of_view)

        own = [as_view("view", number, z) for number, z in enumerate(views)]
        return own, [as_view("target", number, z) for number, z in enumerate(targets or ()) if z is not None]

    def extras(self, extra: Sequence[Extra], own: Sequence[Embeddings]) -> list[Embeddings]:
        """Return the extra candidates as embeddings; plain (K, D) tensors become remembered negatives."""
        return [
            inputs.as_embeddings(source, own, position, unit=self.normalise) for position, source in enumerate(extra)
        ]

    def rows(self, pairs: Pairs) -> Tensor:
        """Return each anchor's loss, (N,), from one call of `per_anchor`, or one per block if it reads similarities."""
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
        return row.mean(dim=0) if pairs.anchor_parts[0].z.ndim == 3 and row.shape[-1] == len(pairs) else row.mean(dim=1)

    def combine(self, rows: Sequence[Tensor], prepared: Sequence[Pairs]) -> Sequence[Tensor]:  # noqa: ARG002
        """Return the rows that are averaged, once per call; here they are unchanged.

        Args:
            rows: (N,) for each of the `Pairs`.
            prepared: what the rows were computed from.
        """
        return rows

    @torch.no_grad()
    def measure(self, pairs: Pairs) -> dict[str, Tensor]:
        """Compute this loss's `metrics` on these pairs."""
        return diagnostics.similarities(pairs, self._valid(pairs))

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Detached measurements of the last call on this process, averaged over its `Pairs`; {} before any."""
        measured = [self.measure(pairs) for pairs in self._last]
        return {name: torch.stack([one[name] for one in measured]).mean() for name in (measured[0] if measured else ())}

    def false_negative_rates(self, labels: Tensor) -> dict[str, Tensor]:
        """Measure how many of the last call's negatives on this process are false; see `diagnostics`."""
        return diagnostics.false_negative_rates(self._last, labels)

    def _valid(self, pairs: Pairs) -> Tensor:
        """Return (N,) bool: the anchors that have what the loss needs."""
        valid = pairs.view != PADDING
        for needed, over in zip((self.needs_positive, self.needs_negative), diagnostics.SIDES, strict=True):
            if needed:
                count = pairs.count(over)
                valid = valid & ((count if count.ndim == 1 else count.amax(dim=0)) > 0)
        return valid

    def _check_call(
        self,
        views: Sequence[Tensor],
        targets: Sequence[Tensor | None] | None,
        group: Tensor | None,
        unknown: dict[str, Any],
    ) -> None:
        name = type(self).__name__
        inputs.refuse_unknown(name, unknown)
        inputs.check_views(name, views, targets, one_view=self.takes_one_view and group is not None)


def global_mean(rows: Tensor, valid: Tensor) -> Tensor:
    """Return the mean of the valid rows of all processes, (); 0 without any.

    Each process back-propagates W / N_valid times the sum of its own rows, so that the average of the gradients over W
    processes is the gradient of the global mean.

    Args:
        rows: (n,) this process's rows, 0 where invalid.
        valid: (n,) bool.

    Example:
        >>> global_mean(torch.tensor([1.0, 3.0, 0.0]), torch.tensor([True, True, False]))
        tensor(2.)
    """
    world = distributed.world_size()
    if world == 1:
        return rows.sum() / valid.sum().clamp(min=1)
    own = rows.sum()
    sums = distributed.total(torch.stack([own.detach().double(), valid.sum().double()]))
    count = sums[1].clamp(min=1)
    share = own * (world / count).to(own.dtype)
    return (sums[0] / count).to(own.dtype) + (share - share.detach())


def _refuse_updated(value: Tensor, extras: Sequence[Extra]) -> Tensor:
    """Return the value with a check in its backward pass: no memory was updated since the loss was computed."""
    if not value.requires_grad or torch.compiler.is_compiling():
        return value
    counts = [(source, source.updates) for source in extras if isinstance(source, UpdatedSource)]
    if not counts:
        return value

    def check(gradient: Tensor) -> None:  # noqa: ARG001
        if any(source.updates != count for source, count in counts):
            raise RuntimeError(CHANGED)

    if not torch._C._are_functorch_transforms_active():
        value.register_hook(check)  # type: ignore[no-untyped-call]
    return value
