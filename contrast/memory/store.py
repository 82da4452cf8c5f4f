"""A memory that holds embeddings itself, rather than standing on one that does."""

from __future__ import annotations

import torch
from torch import Tensor

from contrast.core.embeddings import REMEMBERED, Embeddings
from contrast.memory.door import Width
from contrast.memory.memory import Memory


class Store(Memory):
    """What a queue and a bank share: how embeddings come in, and with which identity they go out.

    Args:
        width: what one embedding is made of.
    """

    def __init__(self, width: Width) -> None:
        super().__init__()
        width.check()
        self.width = width

    def accepted(self, everyone: Embeddings) -> Embeddings:
        """Give what may be written of every process's rows, or refuse them; nothing was changed yet."""
        return everyone

    def write(self, everyone: Embeddings) -> None:
        """Put every process's rows, in rank order, where they belong."""
        raise NotImplementedError(f"{type(self).__name__} must say where embeddings belong: def write(self, everyone).")

    @torch.no_grad()
    def take(
        self,
        embeddings: Embeddings | Tensor,
        sample: Tensor | None,
        group: Tensor | None,
        reference: Tensor | None,
    ) -> None:
        """Check this process's rows, bring every process's together, and write them."""
        own = self.width.embeddings(embeddings, sample, group, reference)
        self.follow(own.z.device)
        everyone = self.accepted(own.gathered())
        self.updates += 1
        self.write(everyone)

    def remembered(self, z: Tensor, sample: Tensor, group: Tensor, reference: Tensor | None) -> Embeddings:
        """Give what it holds as candidates."""
        return Embeddings(z, sample, group, torch.full_like(sample, REMEMBERED), reference)
