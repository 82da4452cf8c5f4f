"""Nearest-neighbour positives: another sample's embedding takes the anchor's place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from contrast.core.embeddings import Embeddings, normalise
from contrast.memory.bank import Bank
from contrast.memory.door import refuse_unknown
from contrast.memory.memory import MEMORIES, Memory
from contrast.memory.queue import Queue


@MEMORIES.register("nearest_positives", aliases=("nnclr", "nearest_neighbours"))
class NearestPositives(Memory):
    r"""Each anchor's nearest stranger in a store stands for it: NNCLR.

    .. math:: \ell_i = -\log \frac{\exp(\mathrm{NN}(z_i) \cdot z_i^+ / \tau)}{\sum_j \exp(\mathrm{NN}(z_i) \cdot z_j^+
              / \tau)}

    with any loss in place of this InfoNCE: neighbours carry the anchor's sample, group and view, so they become the
    views, without gradient, and the views their targets. An anchor's own sample is never its neighbour. It gives no
    candidates of its own; the store may stand beside it in `extra`.

        nearest = NearestPositives(Queue(4096, dim=128))
        near = nearest_views(nearest, (z_a, z_b), sample=index)    # None until there are any
        loss = criterion(*(near or (z_a, z_b)), targets=(p_a, p_b), sample=index)
        ...
        nearest.update(z_b, sample=index)                          # after the backward pass

    Args:
        store: the queue or bank to search; `update` writes to it.
        mutual: k > 0 takes a neighbour only where the anchor's sample is among that neighbour's k nearest in the
            store, and leaves the anchor itself where it is not; 0 takes every neighbour.

    Raises:
        ValueError: for a mutual below 0, or beyond what the store holds.

    Source: Dwibedi et al. 2021 (NNCLR), arXiv:2104.14548, equation 2; `mutual` is ours.
    """

    def __init__(self, store: Queue | Bank, mutual: int = 0) -> None:
        super().__init__()
        most = store.size if isinstance(store, Queue) else store.samples
        if not 0 <= mutual < most:
            raise ValueError(
                f"mutual must be from 0 to {most - 1}, fewer than the {most} that the store holds; got {mutual}."
            )
        self.store = store
        self.mutual = mutual
        self._kept = torch.zeros(())

    @torch.no_grad()
    def positives(self, anchor: Embeddings) -> Embeddings | None:
        """Give each anchor's neighbour, or the anchor itself where there is none; None while the store is empty.

        On a sharded bank all processes call it together.
        """
        refuse_unknown(anchor, first=self.store.updates == 0)
        if self.store.empty:
            return None
        position = self.store.nearest(anchor, 1).position.squeeze(1)
        found = position >= 0
        neighbour = self.store.at(position.clamp(min=0))
        if self.mutual:
            back = self.store.sample_at(self.store.nearest(neighbour, self.mutual).position)
            found &= (back == anchor.sample[:, None]).any(dim=1)
        self._kept = found.sum() / max(len(anchor), 1)
        z = torch.where(found[:, None], neighbour.z.to(anchor.z.dtype), anchor.z.detach())
        return Embeddings(z, anchor.sample, anchor.group, anchor.view, anchor.reference)

    def stores(self) -> Sequence[Memory]:
        """Give the store."""
        return [self.store]

    @property
    def metrics(self) -> dict[str, Tensor | float]:
        """The share of the last anchors that a neighbour stood for."""
        return {"neighbours": self._kept}


def nearest_views(
    memory: Memory, views: Sequence[Tensor], sample: Tensor, group: Tensor | None = None
) -> list[Tensor] | None:
    """Give what stands for the views, (N, D) each and without gradient, by `memory.positives`; None for nothing.

    Args:
        memory: what gives positives.
        views: (N, D) or (H, N, D) each, any floating type; given unit length first.
        sample: (N,) int64, indices in the data set.
        group: (N,) int64, labels; the sample where it is not given.
    """
    found = []
    for view, z in enumerate(views):
        own = sample.to(z.device)
        labels = own if group is None else group.to(z.device)
        anchor = Embeddings(normalise(z.detach()), own, labels, torch.full_like(own, view))
        found.append(memory.positives(anchor))
    return None if any(one is None for one in found) else [one.z for one in found if one is not None]
