"""The backend `triton`: the kernels as a term of the one autograd function.

`kernels`, which imports Triton, is imported when it is first needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from contrast.core.reductions.kernel_inputs import KernelCall, KernelGradients
from contrast.core.reductions.kinds import Reduction, tensor_arguments, with_tensors
from contrast.core.reductions.layout import Layout
from contrast.core.reductions.terms import Gradients, Saved


def accepts(layout: Layout, reduction: Reduction) -> bool:
    """True if Triton is installed, supports the device, and the kernels support the reduction."""
    from contrast.core.reductions.kernels import Kernels

    return Kernels.available(layout.anchors[0].z.device) and Kernels.accepts(layout, reduction)


class KernelReductions:
    """Reductions of each anchor's row by Triton kernels: a term of `terms.compute`.

    Args:
        layout: anchors and candidates.
        reductions: those that `accepts` accepted.
        size: rows and columns of a tile, a power of two from 16 on; None for the default.
    """

    def __init__(self, layout: Layout, reductions: Sequence[Reduction], size: int | None = None) -> None:
        self.layout, self.reductions, self.size = layout, reductions, size
        tensors = tensor_arguments(reductions)
        self.keys, self.arguments = list(tensors), list(tensors.values())

    def forward(self, z: Sequence[Tensor], given: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the reductions, (N,) or (H, N) each, and a normaliser of each."""
        outputs, normalisers = self._kernels(z, given, set()).forward()
        return outputs, normalisers

    def backward(self, saved: Saved, upstream: Sequence[Tensor], to_z: Gradients, to_arguments: Gradients) -> None:
        """Add the gradients, from the similarities computed again."""
        to_argument = dict(zip(self.keys, to_arguments, strict=True))
        learned = {key for key, gradient in to_argument.items() if gradient is not None}
        kernels = self._kernels(saved.z, saved.arguments, learned)
        gradients = KernelGradients(kernels.call, to_z, to_argument)
        kernels.backward(saved.outputs, saved.tensors, upstream, gradients)
        gradients.finish()

    def _kernels(self, z: Sequence[Tensor], given: Sequence[Tensor], learned: set[tuple[int, str]]) -> Any:
        from contrast.core.reductions.kernels import SIZE, Kernels

        call = KernelCall(self.layout, with_tensors(self.reductions, self.keys, given), z, learned)
        return Kernels(call, self.size or SIZE)
