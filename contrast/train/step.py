"""One training step, whoever takes it: views, embeddings, more candidates from memories, loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from contrast.core.embeddings import Embeddings, normalise
from contrast.data.dataset import Batch
from contrast.losses import Loss
from contrast.memory import Memory
from contrast.models.encoder import Encoder, Projections
from contrast.views.views import Views


class StepOutput(NamedTuple):
    """What a step gives.

    loss: ().
    keys: what memories shall remember of it, the last view's targets, or its embeddings without gradient.
    prepared: (N, ...) the prepared batch.
    views: its views.
    """

    loss: Tensor
    keys: Embeddings
    prepared: Tensor
    views: list[Tensor]


@dataclass(frozen=True)
class Step:
    """What a step is made of.

    Args:
        encoder: backbone and head, with its momentum twin and predictor where the method has them.
        loss: the loss; `as_loss` makes one of a plain module.
        views: makes the views of a batch on its device.
        memory: where more candidates come from, in this order; what `positives` gives takes the views' place.
        watching: memories that remember as well, but give no candidates.
        reference: raw batch -> (N, R), a frozen network's features, for the losses that read them.
    """

    encoder: Encoder
    loss: Loss
    views: Views
    memory: Sequence[Memory] = ()
    watching: Sequence[Memory] = ()
    reference: Callable[[Tensor], Tensor] | None = None

    def take(self, batch: Batch, generator: torch.Generator) -> StepOutput:
        """Give the loss of one batch, and what to remember of it."""
        prepared = self.encoder.prepare(batch.x)
        views = self.views(prepared, generator)
        out = self.encoder(views)
        given = self._references(batch, views)
        keys = self._keys(out, batch, given)
        anchors, targets = self._anchors(out, keys)
        loss: Tensor = self.loss(
            *anchors,
            targets=targets,
            sample=batch.sample,
            group=batch.group,
            reference=given,
            extra=list(self.memory),
        )
        return StepOutput(loss, keys[-1], prepared, views)

    def remember(self, keys: Sequence[Embeddings]) -> None:
        """Let every store take the keys of the steps behind it; after the optimiser's step."""
        stores = {id(store): store for memory in (*self.memory, *self.watching) for store in memory.stores()}
        for store in stores.values():
            for one in keys:
                store.update(one)

    @torch.no_grad()
    def _references(self, batch: Batch, views: Sequence[Tensor]) -> Tensor | list[Tensor] | None:
        """Give what the frozen network sees in each sample, or in each view where the loss asks for that."""
        if self.reference is None:
            return None
        if self.loss.reference_of == "view":
            return [self.reference(self.encoder.inputs.restore(view)).float() for view in views]
        return self.reference(batch.x).float()

    @torch.no_grad()
    def _keys(self, out: Projections, batch: Batch, given: Tensor | list[Tensor] | None) -> list[Embeddings]:
        """Give what there is without gradient of each view, with its identity."""
        made = []
        for view, z in enumerate(out.targets or out.z):
            z = normalise(z.detach()) if self.loss.normalise else z.detach().float()
            of_view = given[view] if isinstance(given, list) else given
            reference = None if of_view is None else normalise(of_view)
            made.append(Embeddings(z, batch.sample, batch.group, torch.full_like(batch.sample, view), reference))
        return made

    def _anchors(self, out: Projections, keys: Sequence[Embeddings]) -> tuple[list[Tensor], list[Tensor] | None]:
        """Give the loss's views and targets: where a memory gives positives, these and the embeddings (NNCLR)."""
        for memory in self.memory:
            found = [memory.positives(one) for one in keys]
            if all(one is not None for one in found):
                return [one.z for one in found if one is not None], out.z
        return out.z, out.targets
