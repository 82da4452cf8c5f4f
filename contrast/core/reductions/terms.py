"""The one autograd function behind all reductions without a matrix.

A call consists of *terms*: tiles, listed pairs, sums of groups. All read the vectors of the layout's sources, which are
the function's inputs, and in the backward pass all add to the same gradient of each source.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from contrast.core.autograd import first_derivative, full_precision, saved
from contrast.core.reductions.layout import Layout


class Term(Protocol):
    """A part of a call: some outputs, and how their gradient is computed.

    An instance serves one call: one forward pass, then any number of backward passes. What the forward pass finds out
    and the backward pass needs is either a tensor, which is returned to be kept, or a plan that holds no vectors, which
    may stay in an attribute.

    Attributes:
        arguments: the tensors that it reads beside the vectors, with history.
    """

    arguments: list[Tensor]

    def forward(self, z: Sequence[Tensor], arguments: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the outputs, and tensors to keep for the backward pass.

        Args:
            z: the vectors of each source, without history.
            arguments: `arguments` without history.
        """

    def backward(self, saved: Saved, upstream: Sequence[Tensor], to_z: Gradients, to_arguments: Gradients) -> None:
        """Add the gradients of the vectors and of the arguments.

        Args:
            saved: what the forward pass was given and returned.
            upstream: dL/d(output) of each output.
            to_z: where gradients of the vectors are added; None where none is needed.
            to_arguments: where gradients of the arguments are added; None where none is needed.
        """


class Saved(NamedTuple):
    """What a term's forward pass was given and returned."""

    z: Sequence[Tensor]
    arguments: Sequence[Tensor]
    outputs: Sequence[Tensor]
    kept: Sequence[Tensor]


Gradients = Sequence[Tensor | None]


def compute(layout: Layout, terms: Sequence[Term]) -> list[list[Tensor]]:
    """Compute the outputs of each term, with gradient."""
    call = _Call(terms, len(layout.sources))
    flat = _Reduce.apply(call, *layout.vectors, *(tensor for term in terms for tensor in term.arguments))
    return _split(flat, call.sizes)[: len(terms)]


class _Call:
    def __init__(self, terms: Sequence[Term], sources: int) -> None:
        self.terms, self.sources = terms, sources
        self.inputs = [sources, *(len(term.arguments) for term in terms)]
        self.sizes: list[int] = []
        """How many outputs each term has, then how many tensors each keeps: the function returns the outputs of all
        terms, then what all keep. With outputs (a, b) and (c), and kept (d) and (e, f), these are a, b, c, d, e, f, and
        the sizes are 2, 1, 1, 2."""

    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        z, *arguments = _split([tensor.detach() for tensor in tensors], self.inputs)
        found = [term.forward(z, given) for term, given in zip(self.terms, arguments, strict=True)]
        parts = [outputs for outputs, _ in found] + [kept for _, kept in found]
        self.sizes = [len(part) for part in parts]
        return [tensor for part in parts for tensor in part]

    def backward(
        self, inputs: Sequence[Tensor], found: Sequence[Tensor], needed: Sequence[bool], upstream: Sequence[Tensor]
    ) -> list[Tensor | None]:
        gradients = [torch.zeros_like(one) if need else None for one, need in zip(inputs, needed, strict=True)]
        z, *arguments = _split(inputs, self.inputs)
        to_z, *to_arguments = _split(gradients, self.inputs)
        results, given, count = _split(found, self.sizes), _split(upstream, self.sizes), len(self.terms)
        for k, term in enumerate(self.terms):
            term.backward(Saved(z, arguments[k], results[k], results[count + k]), given[k], to_z, to_arguments[k])
        return gradients


class _Reduce(torch.autograd.Function):
    """The terms of a call; its outputs are theirs, then what they keep for the backward pass."""

    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        with full_precision(tensors[0]):
            return tuple(call.forward(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors, *output)
        kept = output[sum(ctx.call.sizes[: len(ctx.call.terms)]) :]
        ctx.mark_non_differentiable(*kept, *(tensor for tensor in output if not tensor.is_floating_point()))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        call, tensors, needed = ctx.call, saved(ctx), ctx.needs_input_grad[1:]
        inputs, found = tensors[: len(needed)], tensors[len(needed) :]

        def gradients(*given: Tensor) -> tuple[Tensor | None, ...]:
            with full_precision(inputs[0]), torch.no_grad():
                return tuple(call.backward(inputs, found, needed, given))

        return None, *first_derivative(gradients, inputs, *upstream)


def _split(values: Sequence[Any], sizes: Sequence[int]) -> list[Any]:
    parts, start = [], 0
    for size in sizes:
        parts.append(values[start : start + size])
        start += size
    return parts
