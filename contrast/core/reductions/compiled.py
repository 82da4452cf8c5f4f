"""The reductions as one operator for torch.compile, so that it traces no loop over tiles.

The arguments of an operator are tensors, numbers and strings: identities are passed as integer vectors, reductions as
text. The backward operator computes the forward pass again, since the graph contains only the outputs of operators.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from contrast.core.autograd import saved
from contrast.core.embeddings import Embeddings
from contrast.core.reductions import kinds, streamed
from contrast.core.reductions.kinds import Count, Kth, Reduction, arguments
from contrast.core.reductions.layout import Layout

SEPARATOR = ";"


def reduce(layout: Layout, reductions: Sequence[Reduction], size: int, triton: bool) -> tuple[Tensor, ...]:
    """Compute each reduction: by the operator, or outside of the graph for rules and PairFunctions."""
    modules = any(isinstance(value, nn.Module) for each in reductions for value in arguments(each).values())
    if layout.rules or modules:
        uncompiled: Any = torch.compiler.disable(streamed.reduce)  # type: ignore[no-untyped-call]
        return tuple(uncompiled(layout, reductions, size, triton))
    # `layout.sources` again, without id(), which the compiler cannot trace.
    sources: list[Embeddings] = []
    for part in (*layout.anchors, *layout.candidates):
        if not any(part is other for other in sources):
            sources.append(part)
    anchors, candidates = ([_index(part, sources) for part in parts] for parts in (layout.anchors, layout.candidates))
    tensors: list[Tensor] = []
    texts = [_serialised(reduction, tensors) for reduction in reductions]
    has_reference = [source.reference is not None for source in sources]
    found = torch.ops.contrast.reduce(
        [source.z for source in sources],
        [torch.stack([source.sample, source.group, source.view]) for source in sources],
        [source.reference for source in sources if source.reference is not None],
        tensors,
        SEPARATOR.join([f"({anchors}, {candidates}, {layout.across}, {has_reference}, {size}, {triton})", *texts]),
    )
    return tuple(found)


def _index(part: Embeddings, sources: Sequence[Embeddings]) -> int:
    for index, source in enumerate(sources):
        if source is part:
            return index
    raise AssertionError


def _serialised(reduction: Reduction, tensors: list[Tensor]) -> str:
    """Return a reduction as a literal; its tensors are appended to the list and written as their index."""
    items = []
    for field in fields(reduction):
        value = getattr(reduction, field.name)
        if isinstance(value, Tensor):
            items.append(f"'{field.name}': ({len(tensors)},)")
            tensors.append(value)
        elif isinstance(value, Kth):
            items.append(f"'{field.name}': {_serialised(value, tensors)}")
        elif isinstance(value, str):
            items.append(f"'{field.name}': '{value}'")
        else:
            items.append(f"'{field.name}': {value}")
    return f"('{type(reduction).__name__}', {{{', '.join(items)}}})"


def _deserialised(kind: str, given: dict[str, Any], tensors: Sequence[Tensor]) -> Any:
    """Return a reduction; each argument is a value, (index of a tensor,), or (kind, arguments) of a threshold."""
    values = dict(given)
    for name, value in given.items():
        if isinstance(value, tuple):
            values[name] = tensors[value[0]] if len(value) == 1 else _deserialised(value[0], value[1], tensors)
    return getattr(kinds, kind)(**values)


def _parsed_kinds(text: str) -> list[tuple[str, dict[str, Any]]]:
    return [ast.literal_eval(literal) for literal in text.split(SEPARATOR)[1:]]


def _compute(
    vectors: Sequence[Tensor],
    identities: Sequence[Tensor],
    references: Sequence[Tensor],
    tensors: Sequence[Tensor],
    text: str,
) -> tuple[Tensor, ...]:
    """Compute the reductions that `reduce` wrote as text."""
    anchors, candidates, across, has_reference, size, triton = ast.literal_eval(text.split(SEPARATOR)[0])
    of_source = iter(references)
    sources = [
        Embeddings(z, identity[0], identity[1], identity[2], next(of_source) if referring else None)
        for z, identity, referring in zip(vectors, identities, has_reference, strict=True)
    ]
    layout = Layout([sources[index] for index in anchors], [sources[index] for index in candidates], across)
    reductions = [_deserialised(kind, given, tensors) for kind, given in _parsed_kinds(text)]
    return streamed.reduce(layout, reductions, size, triton)


@torch.library.custom_op("contrast::reduce", mutates_args=())
def _forward(
    vectors: list[Tensor], identities: list[Tensor], references: list[Tensor], tensors: list[Tensor], text: str
) -> list[Tensor]:
    return [output.clone() for output in _compute(vectors, identities, references, tensors, text)]


@_forward.register_fake
def _forward_shapes(
    vectors: list[Tensor],
    identities: list[Tensor],  # noqa: ARG001
    references: list[Tensor],  # noqa: ARG001
    tensors: list[Tensor],  # noqa: ARG001
    text: str,
) -> list[Tensor]:
    anchors, candidates, *_ = ast.literal_eval(text.split(SEPARATOR)[0])
    dtype = torch.float32
    for z in vectors:
        dtype = torch.promote_types(dtype, z.dtype)
    rows = sum(vectors[index].shape[-2] for index in anchors)
    heads = max((vectors[index].shape[:-2] for index in (*anchors, *candidates)), key=len)
    outputs = []
    for kind, given in _parsed_kinds(text):
        counts = kind == Count.__name__
        shape = (rows,) if counts and given["above"] is None else (*heads, rows)
        outputs.append(vectors[0].new_empty(shape, dtype=torch.int64 if counts else dtype))
    return outputs


@torch.library.custom_op("contrast::reduce_backward", mutates_args=())
def _backward(
    upstream: list[Tensor],
    vectors: list[Tensor],
    identities: list[Tensor],
    references: list[Tensor],
    tensors: list[Tensor],
    text: str,
    needed: list[bool],
) -> list[Tensor]:
    inputs = [tensor.detach() for tensor in (*vectors, *tensors)]
    leaves = [tensor.requires_grad_() for tensor, is_needed in zip(inputs, needed, strict=True) if is_needed]
    with torch.enable_grad():
        outputs = _compute(inputs[: len(vectors)], identities, references, inputs[len(vectors) :], text)
    of_outputs = [(out, g) for out, g in zip(outputs, upstream, strict=True) if out.requires_grad]
    gradients: Sequence[Tensor] = ()
    if of_outputs and leaves:
        differentiable, given = zip(*of_outputs, strict=True)
        gradients = torch.autograd.grad(differentiable, leaves, given, allow_unused=True, materialize_grads=True)
    of_input = dict(zip(map(id, leaves), gradients, strict=False))
    # Contiguous, as in the fake operator below; and copies, since an operator must not return its inputs.
    return [of_input.get(id(t), torch.zeros_like(t)).clone(memory_format=torch.contiguous_format) for t in inputs]


@_backward.register_fake
def _backward_shapes(
    upstream: list[Tensor],  # noqa: ARG001
    vectors: list[Tensor],
    identities: list[Tensor],  # noqa: ARG001
    references: list[Tensor],  # noqa: ARG001
    tensors: list[Tensor],
    text: str,  # noqa: ARG001
    needed: list[bool],  # noqa: ARG001
) -> list[Tensor]:
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (*vectors, *tensors)]


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    vectors, identities, references, tensors, ctx.text = inputs
    ctx.sizes = [len(vectors), len(identities), len(references), len(tensors)]
    ctx.save_for_backward(*vectors, *identities, *references, *tensors)
    fixed = [kind in (Count.__name__, Kth.__name__) for kind, _ in _parsed_kinds(ctx.text)]
    ctx.mark_non_differentiable(*(out for out, is_fixed in zip(output, fixed, strict=True) if is_fixed))
    ctx.like = [(out.shape, out.dtype) for out in output]
    ctx.needed = [tensor.requires_grad for tensor in (*vectors, *tensors)]


def _differentiate(ctx: Any, gradients: list[Tensor | None]) -> Any:
    rest, lists = list(saved(ctx)), []
    for size in ctx.sizes:
        lists.append(rest[:size])
        rest = rest[size:]
    upstream = [
        lists[0][0].new_zeros(shape, dtype=dtype) if gradient is None else gradient
        for gradient, (shape, dtype) in zip(gradients, ctx.like, strict=True)
    ]
    found = torch.ops.contrast.reduce_backward(upstream, *lists, ctx.text, ctx.needed)
    to_inputs = [gradient if is_needed else None for gradient, is_needed in zip(found, ctx.needed, strict=True)]
    count = ctx.sizes[0]
    return to_inputs[:count], [None] * ctx.sizes[1], [None] * ctx.sizes[2], to_inputs[count:], None


_forward.register_autograd(_differentiate, setup_context=_save)
