"""The backend `triton`: the kernels' inputs and gradients as a term of the one function.

Triton is imported with the kernels (`kernels.py`), when they are first asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from contrast.core.reductions.kernel_inputs import KernelCall, KernelGradients
from contrast.core.reductions.kinds import Reduction, tensor_arguments, with_tensors
from contrast.core.reductions.layout import Layout
from contrast.core.reductions.terms import Gradients, Saved


def accepts(layout: Layout, asked: Reduction) -> bool:
    """True if Triton is installed, serves the device, and the kernels know the reduction."""
    from contrast.core.reductions.kernels import Kernels

    return Kernels.available(layout.anchors[0].z.device) and Kernels.accepts(layout, asked)


class KernelReductions:
    """Reductions of each anchor's row by Triton kernels: a term of `terms.compute`.

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
