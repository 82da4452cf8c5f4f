"""The one autograd function for all reductions without a matrix.

A call consists of *terms*: tiles, listed pairs, sums of groups. All read the vectors of the layout's sources, which are
the function's inputs, and the backward passes of all add to the same gradient of each source.
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

    An instance is used for one call: one forward pass, then any number of backward passes. The forward pass returns the
    tensors that the backward pass needs; plans without vectors may be stored in attributes.

    Attributes:
        arguments: the tensors that it reads apart from the vectors, with autograd history.
    """

    arguments: list[Tensor]

    def forward(self, z: Sequence[Tensor], arguments: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the outputs, and tensors to save for the backward pass.

        Args:
            z: the vectors of each source, without history.
            arguments: `arguments` without history.
        """

    def backward(self, saved: Saved, upstream: Sequence[Tensor], to_z: Gradients, to_arguments: Gradients) -> None:
        """Add the gradients of the vectors and of the arguments.

        Args:
            saved: the arguments and results of the forward pass.
            upstream: dL/d(output) of each output.
            to_z: where gradients of the vectors are added; None where none is needed.
            to_arguments: where gradients of the arguments are added; None where none is needed.
        """


class Saved(NamedTuple):
    """The arguments and results of a term's forward pass."""

    z: Sequence[Tensor]
    arguments: Sequence[Tensor]
    outputs: Sequence[Tensor]
    tensors: Sequence[Tensor]


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
        """The number of outputs of each term, then the number of saved tensors of each: the function returns all
        outputs, then all saved tensors. With outputs (a, b) and (c), and saved tensors (d) and (e, f), it returns
        a, b, c, d, e, f, and the sizes are 2, 1, 1, 2."""

    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        z, *arguments = _split([tensor.detach() for tensor in tensors], self.inputs)
        results = [term.forward(z, given) for term, given in zip(self.terms, arguments, strict=True)]
        parts = [outputs for outputs, _ in results] + [tensors for _, tensors in results]
        self.sizes = [len(part) for part in parts]
        return [tensor for part in parts for tensor in part]

    def backward(
        self, inputs: Sequence[Tensor], results: Sequence[Tensor], needed: Sequence[bool], upstream: Sequence[Tensor]
    ) -> list[Tensor | None]:
        gradients = [torch.zeros_like(x) if is_needed else None for x, is_needed in zip(inputs, needed, strict=True)]
        z, *arguments = _split(inputs, self.inputs)
        to_z, *to_arguments = _split(gradients, self.inputs)
        outputs, given, count = _split(results, self.sizes), _split(upstream, self.sizes), len(self.terms)
        for k, term in enumerate(self.terms):
            term.backward(Saved(z, arguments[k], outputs[k], outputs[count + k]), given[k], to_z, to_arguments[k])
        return gradients


class _Reduce(torch.autograd.Function):
    """The terms of a call; it returns their outputs, then the tensors that they save for the backward pass."""

    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        with full_precision(tensors[0]):
            return tuple(call.forward(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors, *output)
        saved_by_terms = output[sum(ctx.call.sizes[: len(ctx.call.terms)]) :]
        ctx.mark_non_differentiable(*saved_by_terms, *(tensor for tensor in output if not tensor.is_floating_point()))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        call, tensors, needed = ctx.call, saved(ctx), ctx.needs_input_grad[1:]
        inputs, results = tensors[: len(needed)], tensors[len(needed) :]

        def gradients(*given: Tensor) -> tuple[Tensor | None, ...]:
            with full_precision(inputs[0]), torch.no_grad():
                return tuple(call.backward(inputs, results, needed, given))

        return None, *first_derivative(gradients, inputs, *upstream)


def _split(values: Sequence[Any], sizes: Sequence[int]) -> list[Any]:
    parts, start = [], 0
    for size in sizes:
        parts.append(values[start : start + size])
        start += size
    return parts
