"""A tile: the similarities of some pairs, and what the formulas of reductions need to know about these pairs."""

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


class Backward(NamedTuple):
    """Where a backward pass adds gradients.

    Args:
        z: those of the sources' vectors.
        arguments: those of the reductions' arguments.
        tensors: those of what PairFunctions read and learn.
    """

    z: Gradients
    arguments: ArgumentGradients
    tensors: Gradients


class ReductionTerm:
    """What the terms share that compute reductions from tiles: their arguments and PairFunctions.

    Args:
        layout: anchors and candidates.
        asked: the reductions, with tensors for thresholds.

    Attributes:
        arguments: the tensors among the reductions' arguments, then those of the PairFunctions, with history.
    """

    def __init__(self, layout: Layout, asked: Sequence[Reduction]) -> None:
        self.layout, self._asked = layout, asked
        tensors = tensor_arguments(asked)
        self._places, self.functions = list(tensors), PairFunctions(pair_functions(asked), layout)
        self.arguments = [*tensors.values(), *self.functions.tensors]

    def given(self, arguments: Sequence[Tensor]) -> tuple[list[Any], Sequence[Tensor]]:
        """Return the reductions with these arguments, and the tensors of the PairFunctions."""
        return with_tensors(self._asked, self._places, arguments), arguments[len(self._places) :]

    def into(self, asked: Sequence[Any], to_z: Gradients, to_arguments: Gradients) -> Backward:
        """Return where the gradients of these reductions are added."""
        by_name = {
            (id(asked[number]), name): to for (number, name), to in zip(self._places, to_arguments, strict=False)
        }
        return Backward(to_z, by_name, to_arguments[len(self._places) :])


class Tile(ABC):
    """Similarities of some anchors, in rows, and some of their candidates.

    Three methods say which pairs count, for the three kinds of formulas: `zero` looks at identities and masks only,
    since thresholds belong to a side (`reached`, `spread`); `minus_infinity` and `counts`, which serve one side only,
    look at the thresholds of the rows too.

    Args:
        s: (n, m) or (H, n, m), the similarities.
        rows: the places of the anchors among all N.
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
        """Return an argument that spans at most one of N and M at these pairs, to be broadcast over them."""

    @abstractmethod
    def add_part(self, to_argument: Tensor, gradient: Tensor) -> None:
        """Add the gradient of each pair to that of an argument that `part_of` spread over them."""

    @abstractmethod
    def evaluate(self, function: nn.Module) -> Evaluated:
        """Evaluate a PairFunction on these pairs."""

    @abstractmethod
    def reference_weight(self) -> Tensor:
        """Return (<u_i, u_j> + 1) / 2 of the reference vectors."""

    @abstractmethod
    def excluded(self, asked: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Return which pairs do not count, whatever their similarity.

        Returns:
            Positions in the flat tile, int64, and masks to be broadcast over it, bool, False = does not count; both
            may be empty.
        """

    def exponents(self, asked: Any, out: Tensor) -> Tensor:
        """Write scale * s + log_weight, or scale * s + bias, into `out`."""
        torch.mul(self.s, self.value(asked.scale), out=out)
        for name in ("log_weight", "bias"):
            addend = getattr(asked, name, None)
            if addend is not None:
                out.add_(self.value(addend, name))
        return out

    def weights(self, asked: Mean, out: Tensor) -> Tensor:
        """Write the weights of a mean into `out`."""
        return out.copy_(torch.as_tensor(1.0 if asked.weight is None else self.value(asked.weight)))

    def value(self, value: Any, name: str = "") -> Any:
        """Return an argument at these pairs: a number, or a tensor to be broadcast over the tile."""
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

    def add_argument(self, asked: Any, name: str, gradient: Tensor, factor: Tensor | None = None) -> None:
        """Add gradient * factor, for each pair, to the gradient of an argument, if it is needed."""
        value = getattr(asked, name, None)
        to_argument = (self.to_arguments or {}).get((id(asked), name))
        if not isinstance(value, nn.Module) and to_argument is None:
            return
        share = gradient.clone() if factor is None else gradient * factor
        if isinstance(value, nn.Module):
            known = self.to_values.get(value)
            self.to_values[value] = share if known is None else known.add_(share)
        elif to_argument is not None and to_argument.numel() == 1:
            to_argument += share.sum().reshape(to_argument.shape)
        elif to_argument is not None and name == "bias":
            part = to_argument[..., self.rows]
            part += share.sum(dim=-1).sum_to_size(part.shape)
        elif to_argument is not None:
            self.add_part(to_argument, share)

    def spread(self, asked: Any, rows: slice | None, columns: slice | None, of_anchors: Tensor) -> Tensor:
        """Spread a number per anchor over the pairs: of the anchors in rows, of those in columns, or the sum of both.

        Where a similarity does not reach the threshold of its anchor, that anchor's number counts as 0.
        """
        sides = []
        for anchors, dim in ((rows, -1), (columns, -2)):
            if anchors is not None:
                own, reached = of_anchors[..., anchors].unsqueeze(dim), self.reached(asked, anchors, dim)
                sides.append(own if reached is None else reached.mul_(own))
        return sides[0] if len(sides) == 1 else sides[0] + sides[1]

    def reached(self, asked: Any, rows: slice, dim: int) -> Tensor | None:
        """Return 1 where a similarity reaches the threshold of its row, 0 elsewhere; None without thresholds."""
        above = getattr(asked, "above", None)
        if above is None:
            return None
        return torch.ge(self.s, above[..., rows].unsqueeze(dim), out=torch.empty_like(self.s))

    def zero(self, values: Tensor, asked: Any) -> Tensor:
        """Write 0 where pairs do not count, in finite values; thresholds are not looked at."""
        positions, mask = self._mask(asked)
        if positions is not None:
            values.view(*values.shape[:-2], -1).index_fill_(-1, positions, 0)
        # A product, since filling by a bool mask takes several times longer.
        return values if mask is None else values.mul_(mask)

    def minus_infinity(self, exponents: Tensor, asked: Any) -> Tensor:
        """Write -inf where pairs do not count or do not reach the threshold of their row."""
        positions, mask = self._mask(asked)
        if positions is not None:
            exponents.view(*exponents.shape[:-2], -1).index_fill_(-1, positions, -torch.inf)
        for one in (mask, self.reached(asked, self.rows, -1)):
            if one is not None:
                exponents.masked_fill_(one == 0, -torch.inf)
        return exponents

    def counts(self, asked: Any) -> Tensor:
        """Return bool, (n, m), or (H, n, m) where heads differ: the pairs that count and reach the threshold."""
        counts = torch.ones(self.s.shape[-2:], dtype=torch.bool, device=self.s.device)
        positions, mask = self._mask(asked)
        if positions is not None:
            counts.view(-1)[positions] = False
        for one in (mask, self.reached(asked, self.rows, -1)):
            counts = counts if one is None else counts & (one != 0)
        return counts

    def _mask(self, asked: Any) -> tuple[Tensor | None, Tensor | None]:
        """Return positions that do not count, and the product of the masks in the type of the similarities."""
        if id(asked) not in self._masks:
            positions, masks = self.excluded(asked)
            factors = [mask.to(self.s.dtype) for mask in masks]
            mask = math.prod(factors[1:], start=factors[0]) if factors else None
            self._masks[id(asked)] = torch.cat(positions) if positions else None, mask
        return self._masks[id(asked)]
