"""PairFunctions in a pass over tiles: how they are evaluated, and how gradients reach what they read and learn.

A PairFunction is a module whose value belongs to a pair, such as a learned temperature. What it reads of the vectors
and what it learns are arguments of the pass, so that the backward pass evaluates it on the tensors of the forward pass,
whatever the module holds by then (`torch.func.functional_call` puts other parameters in for a call).

On a tile it is evaluated with autograd on *leaves*, detached parts of these tensors; in the backward pass the gradient
of its values goes to the leaves, and from there is added to the gradients of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from contrast.core import distributed
from contrast.core.embeddings import Embeddings
from contrast.core.reductions.layout import Block, Layout
from contrast.core.reductions.terms import Gradients


@runtime_checkable
class SidedFunction(Protocol):
    """A PairFunction that reads one vector of each anchor and one of each candidate, its *sides*.

    The sides are computed once for all vectors, and not again for every tile. Parameters that they read have been
    passed through `distributed.shared`.

    Example:
        >>> class ScaleOfAnchor(torch.nn.Module):
        ...     def anchor_side(self, z):
        ...         return z[..., :1].exp()
        ...     def candidate_side(self, z):
        ...         return z[..., :0]
        ...     def of_sides(self, s, a, b):
        ...         return a.expand_as(s)
        >>> isinstance(ScaleOfAnchor(), SidedFunction)
        True
        >>> per_anchor = pairs.logsumexp(ScaleOfAnchor(), over="all")
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
        s: the leaf of the similarities, where the function reads these.
        leaves: the leaves of what else it reads, and of what it learns.
        targets: the places to which the gradients of `leaves` are added; None where one is not needed.
    """

    values: Tensor
    s: Tensor | None
    leaves: list[Tensor]
    targets: list[Tensor | None]


class PairFunctions:
    """The PairFunctions of one pass, with the tensors that they read and learn.

    Args:
        functions: the functions.
        layout: whose vectors they read.

    Attributes:
        tensors: their sides and what they learn: arguments of the pass, with history.
    """

    def __init__(self, functions: Sequence[nn.Module], layout: Layout) -> None:
        self.tensors: list[Tensor] = []
        self._sides: dict[tuple[nn.Module, int, int], int] = {}
        """(function, role, source) -> the place of that side among `tensors`; roles: 0 anchor, 1 candidate."""
        self._learned: dict[nn.Module, dict[str, int]] = {}
        """function -> name of a parameter -> its place among `tensors`."""
        self._held: dict[nn.Module, list[int]] = {}
        """function -> the places of tensors with a gradient that it holds as attributes."""
        roles = [{block.source for block in blocks} for blocks in (layout.anchor_blocks, layout.candidate_blocks)]
        for function in functions:
            if isinstance(function, SidedFunction):
                for role, side in enumerate((function.anchor_side, function.candidate_side)):
                    for source in roles[role]:
                        self._sides[function, role, source] = self._add(side(layout.vectors[source]))
            self._learned[function] = {
                name: self._add(averaged(parameter)) for name, parameter in function.named_parameters()
            }
            self._held[function] = [self._add(tensor) for tensor in held(function)]

    def _add(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return len(self.tensors) - 1

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
        to_z, to_tensors = gradients or ((), ())
        if isinstance(function, SidedFunction):
            places = [self._sides[function, role, block.source] for role, block in enumerate(blocks)]
            read = [tensors[place][..., block.own, :] for place, block in zip(places, blocks, strict=True)]
            to = [to_tensors[place] for place in places] if gradients else []
        else:
            read = [part.z for part in embeddings]
            to = [to_z[block.source] for block in blocks] if gradients else []
        targets = [None if one is None else one[..., block.own, :] for one, block in zip(to, blocks, strict=False)]

        def values(call: Callable[..., Tensor], s: Tensor, x: Tensor, y: Tensor) -> Tensor:
            if isinstance(function, SidedFunction):
                return call(s, x, y)
            anchor, candidate = embeddings
            return call(replace(anchor, z=x), replace(candidate, z=y))

        return self._evaluate(function, values, s, read, targets, tensors, to_tensors if gradients else None)

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
        number = {id(part): place for place, part in enumerate(layout.sources)}
        of_parts = [
            [self._sides[function, role, number[id(part)]] for part in parts]
            for role, parts in enumerate((layout.anchors, layout.candidates))
        ]
        used = list(dict.fromkeys(place for of_role in of_parts for place in of_role))
        targets = [to_tensors[place] for place in used] if to_tensors is not None else []

        def values(call: Callable[..., Tensor], s: Tensor, *sides: Tensor) -> Tensor:
            side = {place: one.expand(*layout.heads, -1, -1) for place, one in zip(used, sides, strict=True)}
            a, b = (torch.cat([side[place] for place in of_role], dim=-2) for of_role in of_parts)
            # Each anchor is a tile of its own: one row beside its k candidates, (..., N, 1, k).
            beside = b[..., places.clamp(min=0), :]
            return call(s.unsqueeze(-2), a.unsqueeze(-2), beside).squeeze(-2)

        return self._evaluate(function, values, s, [tensors[place] for place in used], targets, tensors, to_tensors)

    def _evaluate(
        self,
        function: nn.Module,
        values: Callable[..., Tensor],
        s: Tensor,
        read: Sequence[Tensor],
        targets: Sequence[Tensor | None],
        tensors: Sequence[Tensor],
        to_tensors: Gradients | None,
    ) -> Evaluated:
        """Evaluate a function with the parameters that are among `tensors`; with history in the backward pass."""
        backward = to_tensors is not None
        parameters = self._learned[function]
        leaves = [
            one.detach().requires_grad_(backward)
            for one in (s, *read, *(tensors[place] for place in parameters.values()))
        ]
        learned = dict(zip(parameters, leaves[1 + len(read) :], strict=True))
        sided = isinstance(function, SidedFunction)
        module = _OfSides(function) if sided else function
        given = {f"function.{name}": leaf for name, leaf in learned.items()} if sided else learned

        def call(*arguments: object) -> Tensor:
            called: Tensor = functional_call(module, given, arguments)
            return called

        with torch.enable_grad():
            found = values(call, *leaves[: 1 + len(read)])
        kept = held(function)
        if not backward and found.requires_grad and not kept:
            raise ValueError(
                f"{type(function).__name__} reads a tensor that has a gradient and is neither its parameter nor its "
                "attribute, so that its gradient would be lost: self.weight = nn.Parameter(...)."
            )
        places = [*parameters.values(), *self._held[function]]
        to_learned = [to_tensors[place] for place in places] if to_tensors is not None else []
        return Evaluated(found, leaves[0] if sided else None, [*leaves[1:], *kept], [*targets, *to_learned])

    @staticmethod
    def backward(evaluated: Evaluated, to_values: Tensor, to_s: Tensor) -> None:
        """Add the gradient of a function's values to those of similarities, vectors, sides and learned tensors."""
        values, s, leaves, targets = evaluated
        if not values.requires_grad:
            return
        given = to_values.sum_to_size(values.shape).to(values.dtype)
        inputs = leaves if s is None else [s, *leaves]
        found = list(torch.autograd.grad(values, inputs, given, allow_unused=True))
        of_s = None if s is None else found.pop(0)
        if of_s is not None:
            to_s += of_s
        for target, gradient in zip(targets, found, strict=True):
            if target is not None and gradient is not None:
                target += gradient.sum_to_size(target.shape)


class _OfSides(nn.Module):
    """The method `of_sides` as a module of its own, for `functional_call`."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, s: Tensor, a: Tensor, b: Tensor) -> Tensor:
        assert isinstance(self.function, SidedFunction)
        return self.function.of_sides(s, a, b)


def held(function: nn.Module) -> list[Tensor]:
    """Return the tensors with a gradient that a module and its parts hold as attributes, beside their parameters."""
    attributes = (value for part in function.modules() for value in vars(part).values())
    return [value for value in attributes if isinstance(value, Tensor) and value.requires_grad]


def averaged(tensor: Tensor) -> Tensor:
    """Average a learned tensor's gradient over the processes, if it is a parameter."""
    return distributed.shared(tensor) if isinstance(tensor, nn.Parameter) else tensor
