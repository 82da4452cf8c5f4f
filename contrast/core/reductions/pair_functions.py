"""PairFunctions in a pass over tiles: their evaluation, and the gradients of what they read and learn.

A PairFunction is a module with a value per pair, such as a learned temperature. The vectors that it reads and the
parameters that it learns are arguments of the pass, so that the backward pass evaluates it on the tensors of the
forward pass, also if the module has other parameters by then (as after `torch.func.functional_call`).

On a tile it is evaluated with autograd on *leaves*, detached parts of these tensors; the backward pass computes the
gradients of the leaves and adds them to those of the full tensors.
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
        """Return (..., n, A), computed from the vectors (..., n, D) of anchors."""

    def candidate_side(self, z: Tensor) -> Tensor:
        """Return (..., m, B), computed from the vectors (..., m, D) of candidates."""

    def of_sides(self, s: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return the values (..., n, m) of similarities (..., n, m) and sides (..., n, A) and (..., m, B)."""


class Evaluated(NamedTuple):
    """The values of a PairFunction on a tile.

    Args:
        values: (n, m) or (H, n, m), with autograd history in the backward pass.
        s: the leaf of the similarities, if the function reads these.
        leaves: the leaves of the other tensors that it reads and learns.
        targets: the tensors to which the gradients of `leaves` are added; None where one is not needed.
    """

    values: Tensor
    s: Tensor | None
    leaves: list[Tensor]
    targets: list[Tensor | None]


class PairFunctions:
    """The PairFunctions of one pass, with the tensors that they read and learn.

    Args:
        functions: the functions.
        layout: the anchors and candidates whose vectors they read.

    Attributes:
        tensors: their sides and parameters: arguments of the pass, with autograd history.
    """

    def __init__(self, functions: Sequence[nn.Module], layout: Layout) -> None:
        self.tensors: list[Tensor] = []
        self._sides: dict[tuple[nn.Module, int, int], int] = {}
        """(function, role, source) -> the index of that side in `tensors`; roles: 0 anchor, 1 candidate."""
        self._learned: dict[nn.Module, dict[str, int]] = {}
        """function -> name of a parameter -> its index in `tensors`."""
        self._attributes: dict[nn.Module, list[int]] = {}
        """function -> the indices in `tensors` of its attributes that have a gradient."""
        roles = [{block.source for block in blocks} for blocks in (layout.anchor_blocks, layout.candidate_blocks)]
        for function in functions:
            if isinstance(function, SidedFunction):
                for role, side in enumerate((function.anchor_side, function.candidate_side)):
                    for source in roles[role]:
                        self._sides[function, role, source] = self._append(side(layout.vectors[source]))
            self._learned[function] = {
                name: self._append(averaged(parameter)) for name, parameter in function.named_parameters()
            }
            self._attributes[function] = [self._append(tensor) for tensor in attribute_tensors(function)]

    def _append(self, tensor: Tensor) -> int:
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
            embeddings: the anchors and the candidates, without autograd history.
            blocks: the blocks.
            tensors: `tensors` without autograd history.
            gradients: in the backward pass, those of the sources' vectors and of `tensors`; None in the forward pass.
        """
        to_z, to_tensors = gradients or ((), ())
        if isinstance(function, SidedFunction):
            indices = [self._sides[function, role, block.source] for role, block in enumerate(blocks)]
            read = [tensors[index][..., block.own, :] for index, block in zip(indices, blocks, strict=True)]
            to = [to_tensors[index] for index in indices] if gradients else []
        else:
            read = [part.z for part in embeddings]
            to = [to_z[block.source] for block in blocks] if gradients else []
        targets = [None if full is None else full[..., block.own, :] for full, block in zip(to, blocks, strict=False)]

        def values(call: Callable[..., Tensor], s: Tensor, x: Tensor, y: Tensor) -> Tensor:
            if isinstance(function, SidedFunction):
                return call(s, x, y)
            anchor, candidate = embeddings
            return call(replace(anchor, z=x), replace(candidate, z=y))

        return self._values_on_leaves(function, values, s, read, targets, tensors, to_tensors if gradients else None)

    def on_listed(
        self,
        function: nn.Module,
        layout: Layout,
        indices: Tensor,
        s: Tensor,
        tensors: Sequence[Tensor],
        to_tensors: Gradients | None,
    ) -> Evaluated:
        """Evaluate a `SidedFunction` on each anchor and k candidates.

        Args:
            function: the function.
            layout: anchors and candidates.
            indices: (N, k), the candidates among all.
            s: (N, k) or (H, N, k), their similarities.
            tensors: `tensors` without autograd history.
            to_tensors: in the backward pass, the gradients of `tensors`; None in the forward pass.
        """
        number = {id(part): index for index, part in enumerate(layout.sources)}
        of_parts = [
            [self._sides[function, role, number[id(part)]] for part in parts]
            for role, parts in enumerate((layout.anchors, layout.candidates))
        ]
        used = list(dict.fromkeys(index for of_role in of_parts for index in of_role))
        targets = [to_tensors[index] for index in used] if to_tensors is not None else []

        def values(call: Callable[..., Tensor], s: Tensor, *sides: Tensor) -> Tensor:
            side = {index: part.expand(*layout.heads, -1, -1) for index, part in zip(used, sides, strict=True)}
            a, b = (torch.cat([side[index] for index in of_role], dim=-2) for of_role in of_parts)
            # Each anchor is a tile of one row and its k candidates, (..., N, 1, k).
            return call(s.unsqueeze(-2), a.unsqueeze(-2), b[..., indices.clamp(min=0), :]).squeeze(-2)

        return self._values_on_leaves(
            function, values, s, [tensors[index] for index in used], targets, tensors, to_tensors
        )

    def _values_on_leaves(
        self,
        function: nn.Module,
        values: Callable[..., Tensor],
        s: Tensor,
        read: Sequence[Tensor],
        targets: Sequence[Tensor | None],
        tensors: Sequence[Tensor],
        to_tensors: Gradients | None,
    ) -> Evaluated:
        """Evaluate a function with its parameters in `tensors`; with autograd history in the backward pass."""
        backward = to_tensors is not None
        parameters = self._learned[function]
        leaves = [
            tensor.detach().requires_grad_(backward)
            for tensor in (s, *read, *(tensors[index] for index in parameters.values()))
        ]
        learned = dict(zip(parameters, leaves[1 + len(read) :], strict=True))
        sided = isinstance(function, SidedFunction)
        module = _OfSides(function) if sided else function
        given = {f"function.{name}": leaf for name, leaf in learned.items()} if sided else learned

        def call(*arguments: object) -> Tensor:
            result: Tensor = functional_call(module, given, arguments)
            return result

        with torch.enable_grad():
            result = values(call, *leaves[: 1 + len(read)])
        attributes = attribute_tensors(function)
        if not backward and result.requires_grad and not attributes:
            raise ValueError(
                f"{type(function).__name__} reads a tensor that has a gradient and is neither its parameter nor its "
                "attribute, so that its gradient would be lost: write self.weight = nn.Parameter(...)."
            )
        indices = [*parameters.values(), *self._attributes[function]]
        to_learned = [to_tensors[index] for index in indices] if to_tensors is not None else []
        return Evaluated(result, leaves[0] if sided else None, [*leaves[1:], *attributes], [*targets, *to_learned])

    @staticmethod
    def backward(evaluated: Evaluated, to_values: Tensor, to_s: Tensor) -> None:
        """Add the gradient of a function's values to those of similarities, vectors, sides and learned tensors."""
        values, s, leaves, targets = evaluated
        if not values.requires_grad:
            return
        upstream = to_values.sum_to_size(values.shape).to(values.dtype)
        inputs = leaves if s is None else [s, *leaves]
        gradients = list(torch.autograd.grad(values, inputs, upstream, allow_unused=True))
        of_s = None if s is None else gradients.pop(0)
        if of_s is not None:
            to_s += of_s
        for target, gradient in zip(targets, gradients, strict=True):
            if target is not None and gradient is not None:
                target += gradient.sum_to_size(target.shape)


class _OfSides(nn.Module):
    """The method `of_sides` as a module, for `functional_call`."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, s: Tensor, a: Tensor, b: Tensor) -> Tensor:
        assert isinstance(self.function, SidedFunction)
        return self.function.of_sides(s, a, b)


def attribute_tensors(function: nn.Module) -> list[Tensor]:
    """Return the attributes of a module and its submodules that are tensors with a gradient, except parameters."""
    attributes = (value for part in function.modules() for value in vars(part).values())
    return [value for value in attributes if isinstance(value, Tensor) and value.requires_grad]


def averaged(tensor: Tensor) -> Tensor:
    """Average a learned tensor's gradient over the processes, if it is a parameter."""
    return distributed.shared(tensor) if isinstance(tensor, nn.Parameter) else tensor
