"""The queue: the newest embeddings, first in, first out."""

from __future__ import annotations

import torch
from torch import Tensor

from contrast.core.embeddings import Embeddings
from contrast.memory.memory import MEMORIES, EmbeddingStore, SearchIndex, check_anchors
from contrast.retrieval import Found


@MEMORIES.register("queue", aliases=("moco", "fifo", "xbm", "cross_batch_memory", "memory_queue"))
class Queue(EmbeddingStore):
    """The last `size` embeddings of all processes, the same on each, with their samples and groups.

    It contains real embeddings only, so fewer than `size` until it is full. An entry of the anchor's own sample is
    neither its negative nor its positive; with labels the entries of the anchor's class are positives. A batch that
    does not divide `size` is stored completely; of a batch larger than `size` the newest rows remain.

    Args:
        size: how many embeddings it stores.
        dim: D, their width.
        heads: H for (H, N, D) embeddings.
        reference_dim: R, where a frozen network's vectors are stored too (CWCL, `guide`).

    Attributes:
        filled: how many it contains now.

    Raises:
        ValueError: for sizes below 1.

    Source: He et al. 2019 (MoCo), arXiv:1911.05722; Wang et al. 2019 (XBM), arXiv:1912.06798.

    Example:
        >>> queue, index = Queue(4096, dim=8), torch.arange(4)
        >>> value = loss(z_a, z_b, sample=index, extra=[queue])  # in every step; then backward() and step()
        >>> queue.update(z_b, sample=index)  # after backward()
        >>> queue.filled
        4
    """

    counters = ("position", "filled")
    fixed = ("size",)

    def __init__(self, size: int, dim: int, heads: int | None = None, reference_dim: int | None = None) -> None:
        if size < 1:
            raise ValueError(f"size must be 1 or more; got {size}.")
        super().__init__(dim, heads, reference_dim)
        self.size = size
        identity = torch.zeros(size, dtype=torch.int64)
        self.tensors = {**self.zeros(size), "sample": identity, "group": identity.clone()}
        self.position = 0
        self.filled = 0

    def candidates(self, anchor: Embeddings) -> Embeddings:
        """Return all entries, without a copy."""
        check_anchors(anchor, first=self.updates == 0)
        self.move_to(anchor.z.device)
        return self._entries()

    def write(self, gathered: Embeddings) -> None:
        """Write the rows after the newest entry, over the oldest ones."""
        newest = gathered[max(len(gathered) - self.size, 0) :]
        count = len(newest)
        start = (self.position + len(gathered) - count) % self.size
        before_end = min(count, self.size - start)
        for name, tensor in self.tensors.items():
            rows = getattr(newest, name).movedim(-2, 0) if name == "z" else getattr(newest, name)
            stored = tensor.movedim(-2, 0) if name == "z" else tensor
            stored[start : start + before_end] = rows[:before_end]
            stored[: count - before_end] = rows[before_end:]
        self.position = (self.position + len(gathered)) % self.size
        self.filled = min(self.filled + len(gathered), self.size)

    @property
    def metrics(self) -> dict[str, Tensor | float]:
        """The number of entries."""
        return {"queue": float(self.filled)}

    @property
    def empty(self) -> bool:
        """True if nothing has been stored yet."""
        return not self.filled

    def search(self, anchor: Embeddings, k: int) -> Found:
        """Return the positions of the k nearest entries of other samples; -1 where there are fewer."""
        self.move_to(anchor.z.device)
        return SearchIndex(self._entries()).search(anchor, k)

    def at(self, position: Tensor) -> Embeddings:
        """Return the entries at (n,) positions."""
        return self._entries()[position]

    def sample_at(self, position: Tensor) -> Tensor:
        """Return the samples of the entries at these positions; -1 where the position is -1."""
        return torch.where(position < 0, -1, self.tensors["sample"][position.clamp(min=0)])

    def _entries(self) -> Embeddings:
        stored = self.tensors
        if self.filled < self.size:
            stored = {name: tensor.narrow(-2 if name == "z" else 0, 0, self.filled) for name, tensor in stored.items()}
        return self.remembered(stored["z"], stored["sample"], stored["group"], stored.get("reference"))
