"""Reductions over positives that are few enough to list: pair by pair, never through tiles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from contrast.core.embeddings import Embeddings
from contrast.core.reductions.asked import Count, Kth, LogSumExp, Mean, Reduction, SoftMean, SoftplusSum, arguments
from contrast.core.reductions.identity import Matches
from contrast.core.reductions.shares import Arguments, logits, scalar, shares, softplus
from contrast.core.reductions.work import Gradients, Work, learned, nothing


def dots(work: Work, pairs: Matches) -> Tensor:
    """Give the similarities of listed pairs, (P,) or (H, P)."""
    made = work.x.new_empty(*work.heads, len(pairs))
    for where, rows, part, columns in pairs.pieces(work.starts):
        made[..., where] = (work.x[..., rows, :] * work.parts[part][..., columns, :]).sum(dim=-1)
    return made


def add_dots(work: Work, pairs: Matches, gradient: Tensor, into: Gradients) -> None:
    """Add what the gradient of listed similarities, (P,) or (H, P), gives the vectors."""
    for where, rows, part, columns in pairs.pieces(work.starts):
        g = gradient[..., where].unsqueeze(-1)
        asked_for = not (isinstance(rows, slice) and work.fixed(rows.start, rows.stop))
        if into.anchor is not None and asked_for:
            _add_product(into.anchor, rows, g, work.parts[part][..., columns, :])
        to_part = into.parts[part]
        if to_part is not None:
            if work.x.ndim == to_part.ndim:
                _add_product(to_part, columns, g, work.x[..., rows, :])
            else:
                _add(to_part, columns, (g * work.x[..., rows, :]).sum(dim=0))


def _add_product(into: Tensor, places: Any, factor: Tensor, vectors: Tensor) -> None:
    if isinstance(places, slice):
        into[..., places, :].addcmul_(factor, vectors)
    else:
        into.index_add_(-2, places, factor * vectors)


def _add(into: Tensor, places: Any, share: Tensor) -> None:
    if isinstance(places, slice):
        into[..., places, :] += share
    else:
        into.index_add_(-2, places, share)


_TRUE = torch.ones((), dtype=torch.bool)


@runtime_checkable
class RowByRow(Protocol):
    """A PairFunction that can be had of listed pairs."""

    def row_by_row(self, anchor: Embeddings, candidate: Embeddings) -> Tensor:
        """Give the value of each anchor and the candidate in the same row, (n,) or (H, n)."""


class Listed:
    """Some reductions over listed positives.

    Args:
        work: the whole call.
        numbers: which of its reductions.
    """

    def __init__(self, work: Work, numbers: list[int]) -> None:
        assert work.identity.positive is not None
        self.work, self.numbers, self.pairs = work, numbers, work.identity.positive
        self.asked = [work.asked[number] for number in numbers]
        self.single = self.pairs.one_each(work.x.shape[-2])

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """Give the reductions, (N,) or (H, N) each, and what the backward pass needs."""
        s = dots(self.work, self.pairs)
        outputs, saved = [], [s]
        for asked in self.asked:
            if self._is_itself(asked):
                outputs.append(s * self._factor(asked))
                saved.append(s.new_zeros(0))
                continue
            output, normaliser = self._reduce(asked, s, self._counts(asked, s))
            outputs.append(output)
            saved.append(normaliser)
        return outputs, saved

    def _is_itself(self, asked: Any) -> bool:
        """Say whether this is a mean or a log-sum-exp of one similarity a row, with numbers for arguments."""
        if not self.single or not isinstance(asked, Mean | LogSumExp):
            return False
        if asked.among is not None or asked.rows is not None or asked.above is not None:
            return False
        if isinstance(asked, Mean):
            return asked.weight is None
        return asked.log_weight is None and isinstance(asked.scale, float | int)

    @staticmethod
    def _factor(asked: Any) -> Any:
        return asked.scale if isinstance(asked, LogSumExp) else 1.0

    def _counts(self, asked: Any, s: Tensor) -> Tensor:
        rows, columns = self.pairs.rows, self.pairs.columns
        counts = _TRUE if asked.among is None else asked.among[columns]
        if getattr(asked, "rows", None) is not None:
            counts = counts & asked.rows[rows]
        if getattr(asked, "above", None) is not None:
            counts = counts & (s >= self._spread(asked.above))
        return counts.expand(s.shape)

    def _given(self, asked: Reduction) -> Arguments:
        given = {name: value for name, value in arguments(asked).items() if value is not None}
        of_rows = isinstance(given.get("bias"), Tensor) and given["bias"].numel() > 1
        return Arguments(
            **{
                name: self._spread(value) if name == "bias" and of_rows else self._at(value)
                for name, value in given.items()
            }
        )

    def _at(self, value: Any) -> Any:
        """Give an argument at the listed pairs."""
        if isinstance(value, nn.Module):
            return self._evaluate(value)
        if not isinstance(value, Tensor) or value.numel() == 1:
            return scalar(value)
        if not len(self.pairs):
            return value.new_zeros(0)
        if value.ndim == 1:
            return value[self.pairs.columns]
        if value.shape[-1] > 1:
            return value[..., 0, :][..., self.pairs.columns]
        return value[..., 0][..., self.pairs.rows] if value.shape[-2] > 1 else value[..., 0]

    def _evaluate(self, function: Any) -> Tensor:
        """Give a PairFunction at the listed pairs, (P,) or (H, P), without history."""
        work = self.work
        made = work.x.new_empty(*work.heads, len(self.pairs))
        for where, rows, part, columns in self.pairs.pieces(work.starts):
            made[..., where] = function.row_by_row(work.anchor[rows], work.candidates[part][columns])
        return made

    def _into_function(self, function: Any, share: Tensor, into: Gradients) -> None:
        """Send the gradient at the listed pairs back through a PairFunction: to the vectors and the parameters."""
        work, parameters = self.work, learned(function)
        for where, rows, part, columns in self.pairs.pieces(work.starts):
            anchor, candidate = work.anchor[rows], work.candidates[part][columns]
            with torch.enable_grad():
                x, y = anchor.z.detach().requires_grad_(), candidate.z.detach().requires_grad_()
                values = function.row_by_row(replace(anchor, z=x), replace(candidate, z=y))
            if not values.requires_grad:
                continue
            to_x, to_y, *found = torch.autograd.grad(
                values, [x, y, *parameters], share[..., where], allow_unused=True, materialize_grads=True
            )
            if into.anchor is not None:
                _add(into.anchor, rows, to_x)
            to_part = into.parts[part]
            if to_part is not None:
                _add(to_part, columns, to_y)
            for parameter, gradient in zip(parameters, found, strict=True):
                into.add_parameter(parameter, gradient)

    def _spread(self, of_rows: Tensor) -> Tensor:
        return of_rows if self.single else of_rows[..., self.pairs.rows]

    def _collect(self, of_pairs: Tensor) -> Tensor:
        if self.single:
            return of_pairs
        return self.work.new_rows().index_add_(-1, self.pairs.rows, of_pairs.expand(*self.work.heads, -1))

    def _reduce(self, asked: Reduction, s: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Give a reduction, and what its derivative needs: a normaliser of each row."""
        if isinstance(asked, Count):
            return torch.zeros((*counts.shape[:-1], self.work.x.shape[-2]), dtype=torch.int64).index_add_(
                -1, self.pairs.rows, counts.to(torch.int64)
            ), s.new_zeros(0)
        if isinstance(asked, Kth):
            return self._kth(asked, s, counts), s.new_zeros(0)
        given = self._given(asked)
        if isinstance(asked, Mean):
            weight = torch.where(counts, torch.as_tensor(given.weight, dtype=s.dtype), 0)
            mass = self._collect(weight)
            mass = mass.where(mass != 0, 1)
            return self._collect(weight * s) / mass, mass
        exponent = logits(s, given)
        if isinstance(asked, SoftplusSum):
            return self._collect(torch.where(counts, softplus(exponent), 0)), s.new_zeros(0)
        exponent = exponent.masked_fill(~counts, -torch.inf)
        if self.single:
            largest = exponent
        else:
            largest = self.work.new_rows().fill_(-torch.inf)
            largest = largest.scatter_reduce_(-1, self.pairs.rows.expand(exponent.shape), exponent, "amax")
        empty = largest == -torch.inf
        largest = largest.masked_fill(empty, 0)
        total = self._collect((exponent - self._spread(largest)).exp()).masked_fill(empty, 1).log() + largest
        normaliser = total.masked_fill(empty, torch.inf)
        if isinstance(asked, LogSumExp):
            return total.masked_fill(empty, nothing(s.dtype)), normaliser
        assert isinstance(asked, SoftMean)
        p = (exponent - self._spread(normaliser)).exp()
        return self._collect(torch.where(counts, p * s, 0)), normaliser

    def _kth(self, asked: Kth, s: Tensor, counts: Tensor) -> Tensor:
        order = s.masked_fill(~counts, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        rows = self.pairs.rows.expand(s.shape).gather(-1, order)
        order = order.gather(-1, rows.argsort(dim=-1, stable=True))
        ordered = s.gather(-1, order)
        listed = torch.bincount(self.pairs.rows, minlength=self.work.x.shape[-2])
        found = torch.zeros_like(self.work.new_rows(), dtype=torch.int64).index_add_(
            -1, self.pairs.rows, counts.to(torch.int64)
        )
        k = torch.minimum(torch.as_tensor(asked.k), found).clamp(min=1)
        place = (listed.cumsum(0) - listed + k - 1).clamp(max=max(len(self.pairs) - 1, 0))
        if not len(self.pairs):
            return self.work.new_rows()
        return ordered.gather(-1, place).masked_fill(found == 0, 0)

    def backward(self, outputs: list[Tensor], saved: list[Tensor], upstream: list[Tensor], into: Gradients) -> None:
        """Add the gradients of the vectors and of the arguments."""
        s, *normalisers = saved
        gradient = torch.zeros_like(s)
        for number, asked, output, g, normaliser in zip(
            self.numbers, self.asked, outputs, upstream, normalisers, strict=True
        ):
            if isinstance(asked, Count | Kth):
                continue
            if self._is_itself(asked):
                gradient.add_(g, alpha=self._factor(asked))
                continue
            to_s, to_arguments = shares(
                asked, s, self._counts(asked, s), self._given(asked), self._spread, g, output, normaliser
            )
            gradient += to_s
            for name, share in to_arguments.items():
                function = getattr(asked, name)
                if isinstance(function, nn.Module):
                    self._into_function(function, share.expand(s.shape), into)
                elif (number, name) in into.arguments:
                    self._add_argument(into.arguments[number, name], share.expand(s.shape), name == "bias")
        add_dots(self.work, self.pairs, gradient, into)

    def _add_argument(self, to_argument: Tensor, share: Tensor, of_rows: bool) -> None:
        """Add the gradient of an argument at each pair to the place it was read from."""
        if not len(self.pairs):
            return
        if to_argument.numel() == 1:
            to_argument += share.sum().reshape(to_argument.shape)
        elif of_rows:
            to_argument.index_add_(-1, self.pairs.rows, share.sum_to_size(*to_argument.shape[:-1], share.shape[-1]))
        elif to_argument.ndim == 1 or to_argument.shape[-1] > 1:
            flat = to_argument if to_argument.ndim == 1 else to_argument[..., 0, :]
            flat.index_add_(-1, self.pairs.columns, share.sum_to_size(*flat.shape[:-1], share.shape[-1]))
        elif to_argument.shape[-2] > 1:
            flat = to_argument[..., 0]
            flat.index_add_(-1, self.pairs.rows, share.sum_to_size(*flat.shape[:-1], share.shape[-1]))
        else:
            to_argument += share.sum(-1)[..., None, None]


class Places:
    """The similarities at given places, in order, 0 where the place is -1.

    Args:
        work: the whole call.
        places: (N, k) or (H, N, k) positions among all candidates.
    """

    def __init__(self, work: Work, places: Tensor) -> None:
        self.work, self.numbers, self.places = work, [0], places
        count, k = places.shape[-2:]
        self.rows = torch.arange(count, device=places.device).repeat_interleave(k)

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """Give them, (N, k) or (H, N, k)."""
        values = self.work.x.new_zeros(self.places.shape)
        for head, places in self._heads():
            found = places >= 0
            s = dots(_of_head(self.work, head), Matches(self.rows[found], places[found]))
            (values if head is None else values[head]).view(-1)[found] = s
        return [values], []

    def backward(self, outputs: list[Tensor], saved: list[Tensor], upstream: list[Tensor], into: Gradients) -> None:  # noqa: ARG002
        """Add the gradients of the vectors."""
        for head, places in self._heads():
            found = places >= 0
            g = (upstream[0] if head is None else upstream[0][head]).reshape(-1)[found]
            add_dots(_of_head(self.work, head), Matches(self.rows[found], places[found]), g, into.of_head(head))

    def _heads(self) -> list[tuple[int | None, Tensor]]:
        if not self.work.heads:
            return [(None, self.places.reshape(-1))]
        return [(head, self.places[head].reshape(-1)) for head in range(self.work.heads[0])]


def _of_head(work: Work, head: int | None) -> Work:
    """Give the work of one head alone."""
    if head is None:
        return work
    parts = [part[head] if part.ndim == 3 else part for part in work.parts]
    return Work(work.pairs, [], work.x[head], parts, [work.wants_anchor, *work.wants_part], set())
