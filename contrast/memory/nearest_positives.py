"""Nearest-neighbour positives: the nearest embedding of another sample replaces the anchor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from contrast.core.embeddings import UNLABELLED, Embeddings, normalise
from contrast.memory.bank import Bank
from contrast.memory.memory import MEMORIES, Memory, check_anchors
from contrast.memory.queue import Queue


@MEMORIES.register("nearest_positives", aliases=("nnclr", "nearest_neighbours"))
class NearestPositives(Memory):
    r"""Each anchor is replaced by its nearest neighbour of another sample in a queue or a bank: NNCLR.

    .. math:: \ell_i = -\log \frac{\exp(\mathrm{NN}(z_i) \cdot z_i^+ / \tau)}{\sum_j \exp(\mathrm{NN}(z_i) \cdot z_j^+
              / \tau)}

    with any loss in place of this InfoNCE: neighbours have the anchor's sample, group and view, so they become the
    views, without gradient, and the views their targets. An anchor's own sample is never its neighbour. It gives no
    candidates of its own; the store may be in `extra` as well.

    Args:
        store: the queue or bank to search; `update` writes to it.
        mutual: k > 0 uses a neighbour only where the anchor's sample is among that neighbour's k nearest in the
            store, and leaves the anchor itself otherwise; 0 uses every neighbour.

    Raises:
        ValueError: for a mutual below 0, or not below what the store can contain.

    Source: Dwibedi et al. 2021 (NNCLR), arXiv:2104.14548, equation 2; `mutual` is ours.

    Example:
        >>> from contrast.memory import Queue, nearest_views
        >>> nearest, index = NearestPositives(Queue(4096, dim=8)), torch.arange(4)
        >>> anchors = nearest_views(nearest, (z_a, z_b), sample=index)  # None while the queue is empty
        >>> value = loss(*(anchors or (z_a, z_b)), targets=(z_a, z_b), sample=index)
        >>> nearest.update(z_b, sample=index)  # after backward()
    """

    def __init__(self, store: Queue | Bank, mutual: int = 0) -> None:
        super().__init__()
        size = store.size if isinstance(store, Queue) else store.samples
        if not 0 <= mutual < size:
            raise ValueError(f"mutual must be from 0 to {size - 1}, below the size of the store, {size}; got {mutual}.")
        self.store = store
        self.mutual = mutual
        self.tensors["replaced"] = torch.zeros(())

    @torch.no_grad()
    def positives(self, anchor: Embeddings) -> Embeddings | None:
        """Return each anchor's neighbour, or the anchor itself where there is none; None while the store is empty.

        On a sharded bank all processes call it together.
        """
        check_anchors(anchor, first=self.store.updates == 0)
        if self.store.empty:
            return None
        position = self.store.search(anchor, 1).position.squeeze(1)
        found = position >= 0
        neighbour = self.store.at(position.clamp(min=0))
        if self.mutual:
            nearest = self.store.sample_at(self.store.search(neighbour, self.mutual).position)
            found &= (nearest == anchor.sample[:, None]).any(dim=1)
        self.tensors["replaced"] = found.sum() / max(len(anchor), 1)
        z = torch.where(found[:, None], neighbour.z.to(anchor.z.dtype), anchor.z.detach())
        return Embeddings(z, anchor.sample, anchor.group, anchor.view, anchor.reference)

    def stores(self) -> Sequence[Memory]:
        """Return the store."""
        return [self.store]

    @property
    def metrics(self) -> dict[str, Tensor | float]:
        """The share of the last anchors that were replaced by a neighbour."""
        return {"neighbours": self.tensors["replaced"]}


def nearest_views(
    memory: Memory, views: Sequence[Tensor], sample: Tensor, group: Tensor | None = None
) -> list[Tensor] | None:
    """Return the `memory.positives` of each view, (N, D) and without gradient; None: keep the views.

    Args:
        memory: what gives positives.
        views: (N, D) or (H, N, D) each, any floating type; scaled to unit length first.
        sample: (N,) int64, indices in the data set.
        group: (N,) int64, labels; None for unlabelled rows.

    Example:
        >>> from contrast.memory import Queue
        >>> nearest, index = NearestPositives(Queue(4096, dim=8)), torch.arange(4)
        >>> nearest.update(z_b, sample=index)
        >>> [view.shape for view in nearest_views(nearest, (z_a, z_b), sample=index)]
        [torch.Size([4, 8]), torch.Size([4, 8])]
    """
    found = []
    for view, z in enumerate(views):
        own = sample.to(z.device)
        labels = UNLABELLED - own.long() if group is None else group.to(z.device)
        anchor = Embeddings(normalise(z.detach()), own, labels, torch.full_like(own, view))
        found.append(memory.positives(anchor))
    return None if any(one is None for one in found) else [one.z for one in found if one is not None]
