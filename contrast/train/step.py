"""One training step, independent of the trainer: views, embeddings, candidates from memories, loss."""

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
    """The result of a step.

    Args:
        loss: ().
        keys: the embeddings to store in memories: the last view's targets, or its embeddings without gradient.
        prepared: (N, ...), the prepared batch.
        views: its views.
    """

    loss: Tensor
    keys: Embeddings
    prepared: Tensor
    views: list[Tensor]


@dataclass(frozen=True)
class Step:
    """The parts of a training step.

    Args:
        encoder: backbone and head, with momentum twin and predictor where the method has them.
        loss: the loss; `as_loss` makes one from a plain module.
        views: draws the views of a batch on its device.
        memory: sources of further candidates, in this order; their `positives`, if any, replace the views.
        sampler_memory: memories that are updated too, but used by the sampler only.
        reference: raw batch -> (N, R), a frozen network's features, for the losses that use them.
    """

    encoder: Encoder
    loss: Loss
    views: Views
    memory: Sequence[Memory] = ()
    sampler_memory: Sequence[Memory] = ()
    reference: Callable[[Tensor], Tensor] | None = None

    def compute(self, batch: Batch, generator: torch.Generator) -> StepOutput:
        """Compute the loss of one batch, and the embeddings to store in memories."""
        prepared = self.encoder.prepare(batch.x)
        views = self.views(prepared, generator)
        projections = self.encoder(views)
        reference = self._references(batch, views)
        keys = self._keys(projections, batch, reference)
        anchors, targets = self._anchors(projections, keys)
        loss: Tensor = self.loss(
            *anchors,
            targets=targets,
            sample=batch.sample,
            group=batch.group,
            reference=reference,
            extra=list(self.memory),
        )
        return StepOutput(loss, keys[-1], prepared, views)

    @property
    def memories(self) -> tuple[Memory, ...]:
        """All memories."""
        return (*self.memory, *self.sampler_memory)

    def update_memories(self, keys: Sequence[Embeddings]) -> None:
        """Store the keys of the last batches in every memory, once where several use one bank; after the optimiser."""
        stores = {id(store): store for memory in self.memories for store in memory.stores()}
        for store in stores.values():
            for embeddings in keys:
                store.update(embeddings)

    @torch.no_grad()
    def _references(self, batch: Batch, views: Sequence[Tensor]) -> Tensor | list[Tensor] | None:
        """Return the frozen network's features of the samples, or of each view, as `loss.reference_of` says."""
        if self.reference is None:
            return None
        if self.loss.reference_of == "view":
            return [self.reference(self.encoder.inputs.restore(view)).float() for view in views]
        return self.reference(batch.x).float()

    @torch.no_grad()
    def _keys(
        self, projections: Projections, batch: Batch, reference: Tensor | list[Tensor] | None
    ) -> list[Embeddings]:
        """Return each view's targets, or its projections without gradient, with their identities."""
        keys = []
        for view, z in enumerate(projections.targets or projections.z):
            z = normalise(z.detach()) if self.loss.normalise else z.detach().float()
            features = reference[view] if isinstance(reference, list) else reference
            unit = None if features is None else normalise(features)
            keys.append(Embeddings(z, batch.sample, batch.group, torch.full_like(batch.sample, view), unit))
        return keys

    def _anchors(
        self, projections: Projections, keys: Sequence[Embeddings]
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Return the loss's views and targets: a memory's positives and the projections (NNCLR), if it has any."""
        for memory in self.memory:
            positives = [memory.positives(key) for key in keys]
            if all(positive is not None for positive in positives):
                return [positive.z for positive in positives if positive is not None], projections.z
        return projections.z, projections.targets
