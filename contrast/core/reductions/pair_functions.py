"""PairFunctions in a pass over tiles: how they are evaluated, and how gradients reach what they read and learn.

A PairFunction is a module whose value belongs to a pair, such as a learned temperature. On a tile it is evaluated with
autograd on copies of what it reads, its *leaves*; in the backward pass the gradient of its values goes to these, and
from there is added to the gradients of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from contrast.core import distributed
from contrast.core.embeddings import Embeddings
from contrast.core.reductions.layout import Block, Layout
from contrast.core.reductions.terms import Gradients


@runtime_checkable
class SidedFunction(Protocol):
    """A PairFunction that reads one vector of each anchor and one of each candidate, its *sides*.

    The sides are computed once for all vectors, and not again for every tile. Parameters that they read have been
    passed through `distributed.shared`.
    """

    def anchor_side(self, z: Tensor) -> Tensor:
        """Return (..., n, A): what it reads of vectors (..., n, D) that are anchors."""

    def candidate_side(self, z: Tensor) -> Tensor:
        """Return (..., m, B): what it reads of vectors (..., m, D) that are candidates."""

    def of_sides(self, s: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return the values (..., n, m) of similarities (..., n, m) and sides (..., n, A) and (..., m, B)."""


class Evaluated(NamedTuple):
    """The values of a PairFunction on a tile.

    Args:
        values: (n, m) or (H, n, m), with history in the backward pass.
        leaves: what they depend on: the similarities first, where the function reads these.
        targets: where the gradient of each leaf is added; None where it is not needed.
        reads_s: whether the first leaf is the similarities.
    """

    values: Tensor
    leaves: list[Tensor]
    targets: list[Tensor | None]
    reads_s: bool


class PairFunctions:
    """The PairFunctions of one pass, with the tensors that they read and learn.

    Args:
        functions: the functions.
        layout: whose vectors they read.
    """

    def __init__(self, functions: Sequence[nn.Module], layout: Layout) -> None:
        self.tensors: list[Tensor] = []
        """The sides of the functions, then what they learn: arguments of the pass, with history."""
        self._places: dict[tuple[nn.Module, int, int], int] = {}
        """(function, role, source) -> the place of that side among `tensors`; roles: 0 anchor, 1 candidate."""
        roles = [{block.source for block in blocks} for blocks in (layout.anchor_blocks, layout.candidate_blocks)]
        for function in functions:
            if isinstance(function, SidedFunction):
                for role, side in enumerate((function.anchor_side, function.candidate_side)):
                    for source in roles[role]:
                        self._places[function, role, source] = len(self.tensors)
                        self.tensors.append(side(layout.vectors[source]))
        self._first_learned = len(self.tensors)
        self._learned = list({id(tensor): tensor for function in functions for tensor in learned(function)}.values())
        self.tensors += [shared(tensor) for tensor in self._learned]

    def on_blocks(
        self,
        function: nn.Module,
        s: Tensor,
        embeddings: tuple[Embeddings, Embeddings],
        blocks: tuple[Block, Block],
        tensors: Sequence[Tensor],
        gradients: tuple[Gradients, Gradients] | None,
    ) -> Evaluated:
        """Evaluate a function on a block of anchors and a block of candidates.

        Args:
            function: the function.
            s: (n, m) or (H, n, m), the similarities.
            embeddings: the anchors and the candidates, without history.
            blocks: the blocks.
            tensors: `tensors` without history.
            gradients: in the backward pass, those of the sources' vectors and of `tensors`; None in the forward pass.
        """
        differentiable = gradients is not None
        if isinstance(function, SidedFunction):
            places = [self._places[function, role, block.source] for role, block in enumerate(blocks)]
            leaves = [tensors[place][..., block.own, :] for place, block in zip(places, blocks, strict=True)]
            to = [gradients[1][place] for place in places] if gradients is not None else []
        else:
            leaves = [part.z for part in embeddings]
            to = [gradients[0][block.source] for block in blocks] if gradients is not None else []
        targets = [None if one is None else one[..., block.own, :] for one, block in zip(to, blocks, strict=False)]
        leaves = [leaf.detach().requires_grad_(differentiable) for leaf in leaves]
        with torch.set_grad_enabled(differentiable):
            if isinstance(function, SidedFunction):
                of_s = s.detach().requires_grad_(differentiable)
                return Evaluated(function.of_sides(of_s, *leaves), [of_s, *leaves], [None, *targets], reads_s=True)
            anchor, candidate = (replace(part, z=z) for part, z in zip(embeddings, leaves, strict=True))
            return Evaluated(function(anchor, candidate), leaves, targets, reads_s=False)

    def on_listed(
        self,
        function: nn.Module,
        layout: Layout,
        places: Tensor,
        s: Tensor,
        tensors: Sequence[Tensor],
        to_tensors: Gradients | None,
    ) -> Evaluated:
        """Evaluate a `SidedFunction` on each anchor and k candidates.

        Args:
            function: the function.
            layout: anchors and candidates.
            places: (N, k), the candidates among all.
            s: (N, k) or (H, N, k), their similarities.
            tensors: `tensors` without history.
            to_tensors: in the backward pass, the gradients of `tensors`; None in the forward pass.
        """
        assert isinstance(function, SidedFunction)
        number = {id(part): place for place, part in enumerate(layout.sources)}
        of_parts = [
            [self._places[function, role, number[id(part)]] for part in parts]
            for role, parts in enumerate((layout.anchors, layout.candidates))
        ]
        used = list(dict.fromkeys(place for of_role in of_parts for place in of_role))
        differentiable = to_tensors is not None
        leaves = [one.detach().requires_grad_(differentiable) for one in (s, *(tensors[place] for place in used))]
        targets = [None, *(to_tensors[place] for place in used)] if to_tensors is not None else []
        with torch.set_grad_enabled(differentiable):
            side = {place: leaf.expand(*layout.heads, -1, -1) for place, leaf in zip(used, leaves[1:], strict=True)}
            a, b = (torch.cat([side[place] for place in of_role], dim=-2) for of_role in of_parts)
            # Each anchor is a tile of its own: one row beside its k candidates, (..., N, 1, k).
            beside = b[..., places.clamp(min=0), :]
            values = function.of_sides(leaves[0].unsqueeze(-2), a.unsqueeze(-2), beside).squeeze(-2)
        return Evaluated(values, leaves, targets, reads_s=True)

    def backward(self, evaluated: Evaluated, to_values: Tensor, to_s: Tensor, to_tensors: Gradients) -> None:
        """Add the gradient of a function's values to those of similarities, vectors, sides and learned tensors."""
        values, leaves, targets, reads_s = evaluated
        if not values.requires_grad:
            return
        given = to_values.sum_to_size(values.shape).to(values.dtype)
        found = torch.autograd.grad(values, [*leaves, *self._learned], given, allow_unused=True)
        if reads_s and found[0] is not None:
            to_s += found[0]
        for target, gradient in zip((*targets, *to_tensors[self._first_learned :]), found, strict=True):
            if target is not None and gradient is not None:
                target += gradient.sum_to_size(target.shape)


def learned(function: nn.Module) -> list[Tensor]:
    """Return what a PairFunction learns: its parameters, and tensors it holds that have a gradient of their own."""
    held = (value for part in function.modules() for value in vars(part).values() if isinstance(value, Tensor))
    return [tensor for tensor in (*function.parameters(), *held) if tensor.requires_grad]


def shared(tensor: Tensor) -> Tensor:
    """Average a learned tensor's gradient over the processes, if it is a parameter."""
    return distributed.shared(tensor) if isinstance(tensor, nn.Parameter) else tensor
