"""A tile: the similarities of some pairs, with the masks and arguments of reductions at these pairs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from contrast.core.reductions.kinds import Mean, Reduction, pair_functions, tensor_arguments, with_tensors
from contrast.core.reductions.layout import Layout
from contrast.core.reductions.pair_functions import Evaluated, PairFunctions
from contrast.core.reductions.terms import Gradients

ArgumentGradients = Mapping[tuple[int, str], Tensor | None]
"""The gradients of arguments by (id of the reduction, name of the argument); None where none is needed."""


class GradientTargets(NamedTuple):
    """The tensors to which a backward pass adds gradients.

    Args:
        z: of the sources' vectors.
        arguments: of the reductions' arguments.
        tensors: of the tensors that PairFunctions read and learn.
    """

    z: Gradients
    arguments: ArgumentGradients
    tensors: Gradients


class ReductionTerm:
    """Shared by the terms that compute reductions from tiles: their arguments and PairFunctions.

    Args:
        layout: anchors and candidates.
        reductions: the reductions, with tensors for thresholds.

    Attributes:
        arguments: the tensors among the reductions' arguments, then those of the PairFunctions, with autograd history.
    """

    def __init__(self, layout: Layout, reductions: Sequence[Reduction]) -> None:
        self.layout, self._reductions = layout, reductions
        tensors = tensor_arguments(reductions)
        self._keys, self.functions = list(tensors), PairFunctions(pair_functions(reductions), layout)
        self.arguments = [*tensors.values(), *self.functions.tensors]

    def with_arguments(self, arguments: Sequence[Tensor]) -> tuple[list[Any], Sequence[Tensor]]:
        """Return the reductions with these arguments, and the tensors of the PairFunctions."""
        return with_tensors(self._reductions, self._keys, arguments), arguments[len(self._keys) :]

    def targets(self, reductions: Sequence[Any], to_z: Gradients, to_arguments: Gradients) -> GradientTargets:
        """Return the tensors to which the gradients of these reductions are added."""
        by_name = {
            (id(reductions[number]), name): to for (number, name), to in zip(self._keys, to_arguments, strict=False)
        }
        return GradientTargets(to_z, by_name, to_arguments[len(self._keys) :])


class Tile(ABC):
    """Similarities of some anchors, in rows, and some of their candidates.

    Three methods exclude pairs, for the three kinds of formulas: `zero` uses identities and masks only, since
    thresholds differ between the two sides of a symmetric tile (`reached`, `per_pair`); `minus_infinity` and `counts`,
    for rows only, use the thresholds of the rows too.

    Args:
        s: (n, m) or (H, n, m), the similarities.
        rows: the positions of the anchors among all N.
        to_arguments: in the backward pass, the gradients of the arguments; None in the forward pass.

    Attributes:
        to_values: in the backward pass, dL/d(value) of each PairFunction.
    """

    def __init__(self, s: Tensor, rows: slice, to_arguments: ArgumentGradients | None) -> None:
        self.s, self.rows, self.to_arguments = s, rows, to_arguments
        self.to_values: dict[nn.Module, Tensor] = {}
        self.evaluated: dict[nn.Module, Evaluated] = {}
        self._masks: dict[int, tuple[Tensor | None, Tensor | None]] = {}

    @abstractmethod
    def part_of(self, argument: Tensor) -> Tensor:
        """Return the part of an argument that broadcasts over these pairs; it spans at most one of N and M."""

    @abstractmethod
    def add_part(self, to_argument: Tensor, gradient: Tensor) -> None:
        """Add the gradient of each pair to the gradient of an argument, the inverse of `part_of`."""

    @abstractmethod
    def evaluate(self, function: nn.Module) -> Evaluated:
        """Evaluate a PairFunction on these pairs."""

    @abstractmethod
    def reference_weight(self) -> Tensor:
        """Return (<u_i, u_j> + 1) / 2 of the reference vectors."""

    @abstractmethod
    def excluded(self, reduction: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Return which pairs do not count, for any similarity.

        Returns:
            Positions in the flat tile, int64, and masks that broadcast over it, bool, False = does not count; both may
            be empty.
        """

    def exponents(self, reduction: Any, out: Tensor) -> Tensor:
        """Write scale * s + log_weight, or scale * s + bias, into `out`."""
        torch.mul(self.s, self.value(reduction.scale), out=out)
        for name in ("log_weight", "bias"):
            addend = getattr(reduction, name, None)
            if addend is not None:
                out.add_(self.value(addend, name))
        return out

    def weights(self, reduction: Mean, out: Tensor) -> Tensor:
        """Write the weights of a mean into `out`."""
        return out.copy_(torch.as_tensor(1.0 if reduction.weight is None else self.value(reduction.weight)))

    def value(self, value: Any, name: str = "") -> Any:
        """Return an argument at these pairs: a number, or a tensor that broadcasts over the tile."""
        if isinstance(value, str):
            return self.reference_weight().to(self.s.dtype)
        if isinstance(value, nn.Module):
            if value not in self.evaluated:
                self.evaluated[value] = self.evaluate(value)
            return self.evaluated[value].values.detach().to(self.s.dtype)
        if not isinstance(value, Tensor):
            return value
        if value.numel() == 1:
            return value.reshape(())
        return value[..., self.rows].unsqueeze(-1) if name == "bias" else self.part_of(value)

    def add_argument(self, reduction: Any, name: str, gradient: Tensor, factor: Tensor | None = None) -> None:
        """Add gradient * factor, for each pair, to the gradient of an argument, if it is needed."""
        value = getattr(reduction, name, None)
        to_argument = (self.to_arguments or {}).get((id(reduction), name))
        if not isinstance(value, nn.Module) and to_argument is None:
            return
        share = gradient.clone() if factor is None else gradient * factor
        if isinstance(value, nn.Module):
            total = self.to_values.get(value)
            self.to_values[value] = share if total is None else total.add_(share)
        elif to_argument is not None and to_argument.numel() == 1:
            to_argument += share.sum().reshape(to_argument.shape)
        elif to_argument is not None and name == "bias":
            part = to_argument[..., self.rows]
            part += share.sum(dim=-1).sum_to_size(part.shape)
        elif to_argument is not None:
            self.add_part(to_argument, share)

    def per_pair(self, reduction: Any, rows: slice | None, columns: slice | None, of_anchors: Tensor) -> Tensor:
        """Broadcast a number per anchor: of the anchors in rows, of those in columns, or the sum of both.

        Where a similarity is below the threshold of its anchor, that anchor's number is 0.
        """
        sides = []
        for anchors, dim in ((rows, -1), (columns, -2)):
            if anchors is not None:
                own, reached = of_anchors[..., anchors].unsqueeze(dim), self.reached(reduction, anchors, dim)
                sides.append(own if reached is None else reached.mul_(own))
        return sides[0] if len(sides) == 1 else sides[0] + sides[1]

    def reached(self, reduction: Any, rows: slice, dim: int) -> Tensor | None:
        """Return 1 where a similarity reaches the threshold of its anchor, 0 elsewhere; None without thresholds."""
        above = getattr(reduction, "above", None)
        if above is None:
            return None
        return torch.ge(self.s, above[..., rows].unsqueeze(dim), out=torch.empty_like(self.s))

    def zero(self, values: Tensor, reduction: Any) -> Tensor:
        """Write 0 where pairs do not count, in finite values; thresholds are ignored."""
        positions, mask = self._mask(reduction)
        if positions is not None:
            values.view(*values.shape[:-2], -1).index_fill_(-1, positions, 0)
        # A product, since filling by a bool mask takes several times longer.
        return values if mask is None else values.mul_(mask)

    def minus_infinity(self, exponents: Tensor, reduction: Any) -> Tensor:
        """Write -inf where pairs do not count or do not reach the threshold of their row."""
        positions, mask = self._mask(reduction)
        if positions is not None:
            exponents.view(*exponents.shape[:-2], -1).index_fill_(-1, positions, -torch.inf)
        for factor in (mask, self.reached(reduction, self.rows, -1)):
            if factor is not None:
                exponents.masked_fill_(factor == 0, -torch.inf)
        return exponents

    def counts(self, reduction: Any) -> Tensor:
        """Return bool, (n, m), or (H, n, m) if heads differ: the pairs that count and reach the threshold."""
        counts = torch.ones(self.s.shape[-2:], dtype=torch.bool, device=self.s.device)
        positions, mask = self._mask(reduction)
        if positions is not None:
            counts.view(-1)[positions] = False
        for factor in (mask, self.reached(reduction, self.rows, -1)):
            counts = counts if factor is None else counts & (factor != 0)
        return counts

    def _mask(self, reduction: Any) -> tuple[Tensor | None, Tensor | None]:
        """Return the positions that do not count, and the product of the masks in the type of the similarities."""
        if id(reduction) not in self._masks:
            positions, masks = self.excluded(reduction)
            factors = [mask.to(self.s.dtype) for mask in masks]
            mask = math.prod(factors[1:], start=factors[0]) if factors else None
            self._masks[id(reduction)] = torch.cat(positions) if positions else None, mask
        return self._masks[id(reduction)]
