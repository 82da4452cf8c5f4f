"""The backend `triton`: the kernels' inputs and gradients as a term of the one function.

The kernels (`kernels.py`) want the anchors as one tensor and write gradients per part of the candidates. Triton itself
is imported with them, when they are first asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from contrast.core.embeddings import REMEMBERED
from contrast.core.reductions.function import Gradients, Saved
from contrast.core.reductions.kinds import Reduction, tensor_arguments, with_tensors
from contrast.core.reductions.layout import Layout


def accepts(layout: Layout, asked: Reduction) -> bool:
    """True if Triton is installed, serves the device, and the kernels know the reduction."""
    from contrast.core.reductions.kernels import Kernels

    return Kernels.available(layout.anchors[0].z.device) and Kernels.accepts(layout, asked)


class KernelCall:
    """Reductions, and the vectors as the kernels want them.

    Args:
        layout: anchors and candidates.
        asked: the reductions.
        z: the vectors of each source.
        learned: the (reduction, argument) whose gradient is needed.
    """

    def __init__(self, layout: Layout, asked: list[Any], z: Sequence[Tensor], learned: set[tuple[int, str]]) -> None:
        vectors = dict(zip(map(id, layout.sources), z, strict=True))
        self.layout, self.asked, self.learned = layout, asked, learned
        own = [vectors[id(part)] for part in layout.anchors]
        self.x = own[0] if len(own) == 1 else torch.cat(own, dim=-2)
        self.parts = [vectors[id(part)] for part in layout.candidates]
        self.heads = layout.heads
        self.mirrored = len(layout.anchors) if layout.anchors_are_candidates else 0
        self.starts = list(itertools.accumulate(map(len, layout.candidates), initial=0))
        self.zeros = self.x.new_zeros(*self.heads, layout.rows)

    @cached_property
    def numbered(self) -> tuple[Tensor, Tensor]:
        """(4, N) and (4, M) int32: sample, group and view by their rank among all, and whether remembered."""
        both = torch.cat([torch.stack(self.layout.anchor), torch.stack(self.layout.candidate)], dim=1)
        ranks = torch.searchsorted(both.sort(dim=1).values, both, out_int32=True)
        numbered = torch.cat([ranks, (both[2:] == REMEMBERED).int()])
        return numbered[:, : self.layout.rows].contiguous(), numbered[:, self.layout.rows :].contiguous()


class KernelGradients:
    """Where the kernels add gradients.

    Args:
        call: the reductions and vectors.
        to_z: the gradients of the sources.
        arguments: the gradients of the arguments by (number of the reduction, name).
    """

    def __init__(self, call: KernelCall, to_z: Gradients, arguments: dict[tuple[int, str], Tensor | None]) -> None:
        self.arguments = arguments
        sources = dict(zip(map(id, call.layout.sources), to_z, strict=True))
        self._own = [(sources[id(part)], len(part)) for part in call.layout.anchors]
        self.anchor = None if all(to is None for to, _ in self._own) else torch.zeros_like(call.x)
        self.parts = [sources[id(part)] for part in call.layout.candidates]

    def finish(self) -> None:
        """Add the gradient of the anchors to those of their sources."""
        if self.anchor is not None:
            start = 0
            for to, length in self._own:
                if to is not None:
                    to += self.anchor[..., start : start + length, :]
                start += length


class KernelReductions:
    """Reductions of each anchor's row by Triton kernels: a term of `function.apply`.

    Args:
        layout: anchors and candidates.
        asked: the reductions, which `accepts` accepted.
        size: rows and columns of a tile, a power of two from 16 on; None for the kernels' own.
    """

    def __init__(self, layout: Layout, asked: Sequence[Reduction], size: int | None = None) -> None:
        self.layout, self.asked, self.size = layout, asked, size
        tensors = tensor_arguments(asked)
        self.slots, self.arguments = list(tensors), list(tensors.values())

    def forward(self, z: Sequence[Tensor], given: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the reductions, (N,) or (H, N) each, and a normaliser of each."""
        outputs, normalisers = self._kernels(z, given, set()).forward()
        return outputs, normalisers

    def backward(self, saved: Saved, upstream: Sequence[Tensor], to_z: Gradients, to_arguments: Gradients) -> None:
        """Add the gradients, from the similarities computed again."""
        into = dict(zip(self.slots, to_arguments, strict=True))
        learned = {slot for slot, gradient in into.items() if gradient is not None}
        kernels = self._kernels(saved.z, saved.arguments, learned)
        gradients = KernelGradients(kernels.work, to_z, into)
        kernels.backward(saved.outputs, saved.kept, upstream, gradients)
        gradients.finish()

    def _kernels(self, z: Sequence[Tensor], given: Sequence[Tensor], learned: set[tuple[int, str]]) -> Any:
        from contrast.core.reductions.kernels import SIZE, Kernels

        call = KernelCall(self.layout, with_tensors(self.asked, self.slots, given), z, learned)
        return Kernels(call, self.size or SIZE)
