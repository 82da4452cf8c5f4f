"""Inputs and outputs of the Triton kernels: anchors as one tensor, identities as int32, gradients by part."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from contrast.core.embeddings import REMEMBERED
from contrast.core.reductions.layout import Layout
from contrast.core.reductions.terms import Gradients


class KernelCall:
    """Reductions, and the vectors in the form that the kernels read.

    Args:
        layout: anchors and candidates.
        reductions: the reductions.
        z: the vectors of each source.
        learned: the (reduction, argument) whose gradient is needed.
    """

    def __init__(
        self, layout: Layout, reductions: list[Any], z: Sequence[Tensor], learned: set[tuple[int, str]]
    ) -> None:
        vectors = dict(zip(map(id, layout.sources), z, strict=True))
        self.layout, self.reductions, self.learned = layout, reductions, learned
        own = [vectors[id(part)] for part in layout.anchors]
        self.x = own[0] if len(own) == 1 else torch.cat(own, dim=-2)
        self.parts = [vectors[id(part)] for part in layout.candidates]
        self.heads = layout.heads
        self.mirrored = len(layout.anchors) if layout.anchors_are_candidates else 0
        self.starts = list(itertools.accumulate(map(len, layout.candidates), initial=0))
        self.zeros = self.x.new_zeros(*self.heads, layout.anchor_count)

    @cached_property
    def numbered(self) -> tuple[Tensor, Tensor]:
        """(4, N) and (4, M) int32: sample, group and view by their rank among all, and 1 for remembered entries."""
        both = torch.cat([torch.stack(self.layout.anchor), torch.stack(self.layout.candidate)], dim=1)
        ranks = torch.searchsorted(both.sort(dim=1).values, both, out_int32=True)
        numbered = torch.cat([ranks, (both[2:] == REMEMBERED).int()])
        of_anchors, of_candidates = torch.tensor_split(numbered, [self.layout.anchor_count], dim=1)
        return of_anchors.contiguous(), of_candidates.contiguous()


class KernelGradients:
    """The tensors to which the kernels add gradients.

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
