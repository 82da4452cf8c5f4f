"""The reductions as one operator for torch.compile, so that it sees no loop over tiles.

A compiled graph knows tensors, numbers and strings: who meets whom travels as integer vectors, what is asked as text.
The backward operator computes the forward pass once more, since nothing but its outputs crosses the graph.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from contrast.core.embeddings import Embeddings
from contrast.core.reductions import asked as kinds
from contrast.core.reductions.asked import Count, Kth, Reduction, arguments
from contrast.core.reductions.work import saved

if TYPE_CHECKING:
    from contrast.core.pairs import Pairs


SEPARATOR = ";"


def can_travel(pairs: Pairs, asked: Sequence[Reduction]) -> bool:
    """Say whether everything is tensors and numbers: no PairFunction, no rule."""
    modules = (isinstance(value, nn.Module) for one in asked for value in arguments(one).values())
    return not pairs.rules and not any(modules)


def reduce(pairs: Pairs, asked: Sequence[Reduction], size: int, small: int, kernels: bool) -> tuple[Tensor, ...]:
    """Give each reduction, by one operator."""
    tensors: list[Tensor] = []
    texts = [_written(one, tensors) for one in asked]
    everyone = (pairs.anchor, *pairs.candidates)
    parts = pairs.anchor.parts
    mirrored = bool(parts) and len(parts) <= len(pairs.candidates)
    mirrored = mirrored and all(one is other for one, other in zip(parts, pairs.candidates, strict=False))
    units = [one.unit for one in everyone]
    refer = [one.reference is not None for one in everyone]
    facts = f"({pairs.across}, {len(parts) if mirrored else 0}, {units}, {refer}, {size}, {small}, {kernels})"
    found = torch.ops.contrast.reduce(
        [one.z for one in everyone],
        [torch.stack([one.sample, one.group, one.view]) for one in everyone],
        [one.reference for one in everyone if one.reference is not None],
        tensors,
        SEPARATOR.join([facts, *texts]),
    )
    return tuple(found)


def _written(asked: Reduction, tensors: list[Tensor]) -> str:
    """Write a reduction as a literal; its tensors join the list and are named by their place."""
    made = []
    for field in fields(asked):
        value = getattr(asked, field.name)
        if isinstance(value, Tensor):
            made.append(f"'{field.name}': ({len(tensors)},)")
            tensors.append(value)
        elif isinstance(value, Kth):
            made.append(f"'{field.name}': {_written(value, tensors)}")
        elif isinstance(value, str):
            made.append(f"'{field.name}': '{value}'")
        else:
            made.append(f"'{field.name}': {value}")
    return f"('{type(asked).__name__}', {{{', '.join(made)}}})"


@dataclass
class _Text:
    """What `reduce` wrote, read again.

    Args:
        text: the literals.
    """

    text: str

    def __post_init__(self) -> None:
        facts, *asked = map(ast.literal_eval, self.text.split(SEPARATOR))
        self.across, self.mirrored, self.unit, self.refer, self.size, self.small, self.kernels = facts
        self.asked: list[tuple[str, dict[str, Any]]] = asked

    def reductions(self, tensors: Sequence[Tensor]) -> list[Reduction]:
        """Give what is asked."""
        return [_read(kind, given, tensors) for kind, given in self.asked]


def _read(kind: str, given: dict[str, Any], tensors: Sequence[Tensor]) -> Any:
    """Give a reduction; an argument is the place of a tensor, a threshold's kind and arguments, or itself."""
    made = dict(given)
    for name, value in given.items():
        if isinstance(value, tuple):
            made[name] = tensors[value[0]] if len(value) == 1 else _read(value[0], value[1], tensors)
    return getattr(kinds, kind)(**made)


def _embeddings(
    vectors: Sequence[Tensor], identities: Sequence[Tensor], references: Sequence[Tensor], text: _Text
) -> tuple[Embeddings, list[Embeddings]]:
    """Give the anchors and the parts of the candidates."""
    known, made = iter(references), []
    for z, identity, refers, unit in zip(vectors, identities, text.refer, text.unit, strict=True):
        made.append(Embeddings(z, identity[0], identity[1], identity[2], next(known) if refers else None))
        made[-1].__dict__["unit"] = unit
    anchor, *parts = made
    anchor.__dict__["parts"] = tuple(parts[: text.mirrored])
    return anchor, parts


def register(
    call: Callable[[Pairs, list[Reduction], int, int, bool], Any],
    pair: Callable[[Embeddings, list[Embeddings], bool], Pairs],
) -> None:
    """Register the operators.

    Args:
        call: gives the call of some reductions, ready to run.
        pair: gives the pairs of anchors and candidates; the last argument is `across`.
    """

    def made(
        vectors: Sequence[Tensor],
        identities: Sequence[Tensor],
        references: Sequence[Tensor],
        tensors: Sequence[Tensor],
        text: str,
        wants: Sequence[bool] = (),
    ) -> Any:
        read = _Text(text)
        pairs = pair(*_embeddings(vectors, identities, references, read), read.across)
        prepared = call(pairs, read.reductions(tensors), read.size, read.small, read.kernels)
        if wants:
            slots = [read.asked[number][1][name][0] for number, name in prepared.slots]
            prepared.wants = [*wants[: len(vectors)], *(wants[len(vectors) + slot] for slot in slots)]
            prepared.places = slots
        return prepared

    @torch.library.custom_op("contrast::reduce", mutates_args=())
    def forward(
        vectors: list[Tensor], identities: list[Tensor], references: list[Tensor], tensors: list[Tensor], text: str
    ) -> list[Tensor]:
        prepared = made(vectors, identities, references, tensors, text)
        outputs = prepared.forward(prepared.inputs)[0]
        return [_own(output) for output in outputs]

    @forward.register_fake
    def _(
        vectors: list[Tensor],
        identities: list[Tensor],  # noqa: ARG001
        references: list[Tensor],  # noqa: ARG001
        tensors: list[Tensor],  # noqa: ARG001
        text: str,
    ) -> list[Tensor]:
        x = vectors[0]
        dtype = torch.promote_types(x.dtype, torch.float32)
        found = []
        for kind, given in _Text(text).asked:
            counts = kind == Count.__name__
            shape = x.shape[-2:-1] if counts and given["above"] is None else x.shape[:-1]
            found.append(x.new_empty(shape, dtype=torch.int64 if counts else dtype))
        return found

    @torch.library.custom_op("contrast::reduce_backward", mutates_args=())
    def backward(
        upstream: list[Tensor],
        vectors: list[Tensor],
        identities: list[Tensor],
        references: list[Tensor],
        tensors: list[Tensor],
        text: str,
        wants: list[bool],
    ) -> list[Tensor]:
        prepared = made(vectors, identities, references, tensors, text, wants)
        outputs, kept = prepared.forward(prepared.inputs)
        gradients = prepared.backward(outputs, kept, upstream)
        found = [torch.zeros_like(tensor) for tensor in (*vectors, *tensors)]
        places = [*range(len(vectors)), *(len(vectors) + place for place in prepared.places)]
        for place, gradient in zip(places, gradients, strict=True):
            if gradient is not None:
                found[place] = _own(gradient.contiguous())
        return found

    @backward.register_fake
    def _(
        upstream: list[Tensor],  # noqa: ARG001
        vectors: list[Tensor],
        identities: list[Tensor],  # noqa: ARG001
        references: list[Tensor],  # noqa: ARG001
        tensors: list[Tensor],
        text: str,  # noqa: ARG001
        wants: list[bool],  # noqa: ARG001
    ) -> list[Tensor]:
        return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (*vectors, *tensors)]

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        vectors, identities, references, tensors, ctx.text = inputs
        ctx.sizes = [len(vectors), len(identities), len(references), len(tensors)]
        ctx.save_for_backward(*vectors, *identities, *references, *tensors)
        whole = [kind in (Count.__name__, Kth.__name__) for kind, _ in _Text(ctx.text).asked]
        ctx.mark_non_differentiable(*(out for out, is_whole in zip(output, whole, strict=True) if is_whole))
        ctx.like = [(out.shape, out.dtype) for out in output]
        ctx.wants = [tensor.requires_grad for tensor in (*vectors, *tensors)]

    def differentiate(ctx: Any, gradients: list[Tensor | None]) -> Any:
        rest, lists = list(saved(ctx)), []
        for size in ctx.sizes:
            lists.append(rest[:size])
            rest = rest[size:]
        x = lists[0][0]
        upstream = [
            x.new_zeros(shape, dtype=dtype) if gradient is None else gradient
            for gradient, (shape, dtype) in zip(gradients, ctx.like, strict=True)
        ]
        found = torch.ops.contrast.reduce_backward(upstream, *lists, ctx.text, ctx.wants)
        wanted = [gradient if wants else None for gradient, wants in zip(found, ctx.wants, strict=True)]
        first = ctx.sizes[0]
        return wanted[:first], [None] * ctx.sizes[1], [None] * ctx.sizes[2], wanted[first:], None

    forward.register_autograd(differentiate, setup_context=setup)


def _own(tensor: Tensor) -> Tensor:
    """Give a tensor that is nobody else's: an operator may return no kept count and no view of its input."""
    return tensor.clone()
