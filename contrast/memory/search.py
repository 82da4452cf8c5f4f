"""From a memory's embeddings to a search and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from contrast import retrieval
from contrast.core.embeddings import Embeddings
from contrast.retrieval import Found


class SearchIndex(NamedTuple):
    """Embeddings to search.

    Args:
        stored: M of them.
        finder: an index of their `vectors`; None to search exactly.
    """

    stored: Embeddings
    finder: retrieval.Index | None = None

    def nearest(self, anchor: Embeddings, k: int, *, own_group: bool = True) -> Found:
        """Give the k nearest that are not of the anchor's sample, nor of its group unless `own_group`.

        Where there are fewer, similarities are -inf and positions -1.
        """
        stored = self.stored
        exclude = [(anchor.sample, stored.sample)]
        if not own_group:
            exclude.append((anchor.group, stored.group))
        count = min(k, len(stored)) if len(anchor) else 0
        if count and self.finder is not None:
            found = self.finder.search(vectors(anchor), count, exclude=exclude)
        elif count:
            found = retrieval.exact_search(vectors(anchor), vectors(stored), count, exclude=exclude)
        else:
            nothing = torch.zeros(len(anchor), 0, device=anchor.z.device)
            found = Found(nothing, nothing.long())
        lacking = (0, k - count)
        return Found(F.pad(found.similarity, lacking, value=-torch.inf), F.pad(found.position, lacking, value=-1))


def vectors(embeddings: Embeddings) -> Tensor:
    """Give one vector an embedding, (N, D) or (N, H D): heads are near where the sum of their similarities is large."""
    z = embeddings.z.detach().float()
    return z if z.ndim == 2 else z.movedim(0, -2).flatten(start_dim=1)
