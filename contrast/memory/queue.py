"""The queue: the newest embeddings, first in, first out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contrast.core.embeddings import Embeddings
from contrast.memory.door import Width, refuse_other, refuse_unknown
from contrast.memory.memory import MEMORIES
from contrast.memory.search import SearchIndex
from contrast.memory.store import Store
from contrast.retrieval import Found


@MEMORIES.register("queue", aliases=("moco", "fifo", "xbm", "cross_batch_memory", "memory_queue"))
class Queue(Store):
    """The last `size` embeddings of all processes, the same on each, with their sample and group.

    It is filled with real embeddings only and holds fewer until it is full. One's own sample is never one's negative,
    nor one's positive; with labels its entries of the anchor's class are positives. A batch that does not divide `size`
    wraps around whole; of a batch larger than `size` the newest stay.

    Args:
        size: how many embeddings it holds.
        dim: D, their width.
        heads: H for (H, N, D) embeddings.
        reference_dim: R, where a frozen tower's vectors are remembered too (CWCL, a guide).

    Attributes:
        filled: how many it holds now.

    Raises:
        ValueError: for sizes below 1.

    Source: He et al. 2019 (MoCo), arXiv:1911.05722; Wang et al. 2019 (XBM), arXiv:1912.06798.
    """

    def __init__(self, size: int, dim: int, heads: int | None = None, reference_dim: int | None = None) -> None:
        if size < 1:
            raise ValueError(f"size must be 1 or more; got {size}.")
        super().__init__(Width(dim, heads, reference_dim))
        self.size = size
        identity = torch.zeros(size, dtype=torch.int64)
        self.held = {**self.width.zeros(size), "sample": identity, "group": identity.clone()}
        self.position = 0
        self.filled = 0

    def candidates(self, anchor: Embeddings) -> Embeddings:
        """Give all that it holds, without a copy."""
        refuse_unknown(anchor, first=self.updates == 0)
        self.follow(anchor.z.device)
        return self._all()

    def write(self, everyone: Embeddings) -> None:
        """Put the rows behind the newest; the oldest leave."""
        newest = everyone[max(len(everyone) - self.size, 0) :]
        count = len(newest)
        start = (self.position + len(everyone) - count) % self.size
        before = min(count, self.size - start)
        for name, tensor in self.held.items():
            rows = getattr(newest, name).movedim(-2, 0) if name == "z" else getattr(newest, name)
            room = tensor.movedim(-2, 0) if name == "z" else tensor
            room[start : start + before] = rows[:before]
            room[: count - before] = rows[before:]
        self.position = (self.position + len(everyone)) % self.size
        self.filled = min(self.filled + len(everyone), self.size)

    @property
    def metrics(self) -> dict[str, Tensor | float]:
        """How many embeddings it holds."""
        return {"queue": float(self.filled)}

    @property
    def empty(self) -> bool:
        """Whether nothing was ever put in."""
        return not self.filled

    def nearest(self, anchor: Embeddings, k: int) -> Found:
        """Give the positions of the k nearest entries that are not of the anchor's sample; -1 where there are fewer."""
        self.follow(anchor.z.device)
        return SearchIndex(self._all()).nearest(anchor, k)

    def at(self, position: Tensor) -> Embeddings:
        """Give the embeddings at (n,) positions."""
        return self._all()[position]

    def sample_at(self, position: Tensor) -> Tensor:
        """Give whose embeddings stand at these positions; -1 where the position is -1."""
        return torch.where(position < 0, -1, self.held["sample"][position.clamp(min=0)])

    def get_extra_state(self) -> dict[str, Any]:
        """Give a copy of all that it holds."""
        kept = {name: tensor.clone() for name, tensor in self._filled().items()}
        return {
            "size": self.size,
            "width": tuple(self.width),
            "position": self.position,
            "updates": self.updates,
            **kept,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take it up again; a ValueError where size or width differ."""
        refuse_other({"size": self.size, "width": tuple(self.width)}, state, "queue")
        self.position, self.updates = state["position"], state["updates"]
        self.filled = len(state["sample"])
        for name, room in self._filled().items():
            room.copy_(state[name])

    def _filled(self) -> dict[str, Tensor]:
        """Give what is filled of each tensor."""
        cut = {name: tensor.narrow(-2 if name == "z" else 0, 0, self.filled) for name, tensor in self.held.items()}
        return dict(self.held) if self.filled == self.size else cut

    def _all(self) -> Embeddings:
        held = self._filled()
        return self.remembered(held["z"], held["sample"], held["group"], held.get("reference"))
