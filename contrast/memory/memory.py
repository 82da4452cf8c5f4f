"""What every memory shares: its place in a loop, and its tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from contrast.core.embeddings import Embeddings
from contrast.core.registry import Registry

MEMORIES = Registry("memory")
"""Every memory by name."""


class Memory(nn.Module):
    """Where more candidates, or other positives, come from; `extra=` of a loss takes one, in any training loop.

        queue = Queue(4096, dim=128)
        loss = criterion(z_a, z_b, sample=index, extra=[queue])   # in every step
        loss.backward()
        optimizer.step()
        queue.update(z_b, sample=index)                           # never before backward()
        queue.end_epoch()                                         # after every epoch

    It lives on the device of the embeddings that it meets. Its tensors are no buffers, so neither a cast of the module
    nor DistributedDataParallel touches them; a checkpoint has all of them, as extra state.

    Attributes:
        held: its tensors by name.
        updates: how often it was updated, in steps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, Tensor] = {}
        self.updates = 0

    def candidates(self, anchor: Embeddings) -> Embeddings:
        """Give the candidates for these anchors, of view REMEMBERED, the same on every process; there may be none."""
        return anchor[:0].detach()

    def positives(self, anchor: Embeddings) -> Embeddings | None:  # noqa: ARG002
        """Give what takes the anchors' place, (N, D) with their sample, group and view; None for nothing."""
        return None

    def update(
        self,
        embeddings: Embeddings | Tensor,
        *,
        sample: Tensor | None = None,
        group: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> None:
        """Remember embeddings of one view; every process calls it, after the backward pass, with its own rows.

        Args:
            embeddings: (N, D) or (H, N, D), which are given unit length, as losses do; or `Embeddings`, which are taken
                as they are. N may differ between processes, also be 0.
            sample: (N,) int64 >= 0, indices in the data set; for plain tensors only.
            group: (N,) int64, labels; the sample where it is not given.
            reference: (N, R), a frozen tower's embeddings.

        Raises:
            ValueError: for another width, or without real sample indices.
        """
        for store in self.stores():
            store.take(embeddings, sample, group, reference)

    def take(
        self,
        embeddings: Embeddings | Tensor,
        sample: Tensor | None,
        group: Tensor | None,
        reference: Tensor | None,
    ) -> None:
        """Take in what `update` was given; for what holds embeddings itself."""
        raise NotImplementedError(f"{type(self).__name__} holds no embeddings; let stores() name what does.")

    def end_epoch(self) -> None:
        """Close an epoch; what is found anew by epochs is found here."""

    def stores(self) -> Sequence[Memory]:
        """Give the memories that `update` writes to: itself, or the bank that it stands on."""
        return [self]

    @property
    def metrics(self) -> dict[str, Tensor | float]:
        """What is worth logging of it, by name."""
        return {}

    def follow(self, device: torch.device) -> None:
        """Move to where the embeddings are."""
        if any(tensor.device != device for tensor in self.held.values()):
            self.held = {name: tensor.to(device) for name, tensor in self.held.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in self.held.items():
            self.held[name] = tensor.to(fn(tensor.new_empty(0)).device)
        return self
