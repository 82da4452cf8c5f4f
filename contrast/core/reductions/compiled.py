"""The reductions as one operator for torch.compile, so that it traces no loop over tiles.

A compiled graph knows tensors, numbers and strings: identities travel as integer vectors, reductions as text. The
backward operator computes the forward pass once more, since nothing but its outputs crosses the graph.
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


def reduce(layout: Layout, asked: Sequence[Reduction], size: int, triton: bool) -> tuple[Tensor, ...]:
    """Compute each reduction: by the operator, or outside of the graph where functions take part."""
    modules = any(isinstance(value, nn.Module) for one in asked for value in arguments(one).values())
    if layout.rules or modules:
        uncompiled: Any = torch.compiler.disable(streamed.reduce)  # type: ignore[no-untyped-call]
        return tuple(uncompiled(layout, asked, size, triton))
    # As `layout.sources`, which the compiler cannot trace: it knows no id().
    sources: list[Embeddings] = []
    for part in (*layout.anchors, *layout.candidates):
        if not any(part is other for other in sources):
            sources.append(part)
    anchors, candidates = ([_place(part, sources) for part in parts] for parts in (layout.anchors, layout.candidates))
    tensors: list[Tensor] = []
    texts = [_written(one, tensors) for one in asked]
    referring = [source.reference is not None for source in sources]
    found = torch.ops.contrast.reduce(
        [source.z for source in sources],
        [torch.stack([source.sample, source.group, source.view]) for source in sources],
        [source.reference for source in sources if source.reference is not None],
        tensors,
        SEPARATOR.join([f"({anchors}, {candidates}, {layout.across}, {referring}, {size}, {triton})", *texts]),
    )
    return tuple(found)


def _place(part: Embeddings, sources: Sequence[Embeddings]) -> int:
    for place, source in enumerate(sources):
        if source is part:
            return place
    raise AssertionError


def _written(asked: Reduction, tensors: list[Tensor]) -> str:
    """Write a reduction as a literal; its tensors are added to the list and named by their place."""
    written = []
    for field in fields(asked):
        value = getattr(asked, field.name)
        if isinstance(value, Tensor):
            written.append(f"'{field.name}': ({len(tensors)},)")
            tensors.append(value)
        elif isinstance(value, Kth):
            written.append(f"'{field.name}': {_written(value, tensors)}")
        elif isinstance(value, str):
            written.append(f"'{field.name}': '{value}'")
        else:
            written.append(f"'{field.name}': {value}")
    return f"('{type(asked).__name__}', {{{', '.join(written)}}})"


def _read(kind: str, given: dict[str, Any], tensors: Sequence[Tensor]) -> Any:
    """Return a reduction; an argument is the place of a tensor, a threshold's kind and arguments, or itself."""
    made = dict(given)
    for name, value in given.items():
        if isinstance(value, tuple):
            made[name] = tensors[value[0]] if len(value) == 1 else _read(value[0], value[1], tensors)
    return getattr(kinds, kind)(**made)


def _kinds(text: str) -> list[tuple[str, dict[str, Any]]]:
    return [ast.literal_eval(literal) for literal in text.split(SEPARATOR)[1:]]


def _compute(
    vectors: Sequence[Tensor],
    identities: Sequence[Tensor],
    references: Sequence[Tensor],
    tensors: Sequence[Tensor],
    text: str,
) -> tuple[Tensor, ...]:
    """Compute what `reduce` wrote."""
    anchors, candidates, across, referring, size, triton = ast.literal_eval(text.split(SEPARATOR)[0])
    of_source = iter(references)
    sources = [
        Embeddings(z, identity[0], identity[1], identity[2], next(of_source) if has_reference else None)
        for z, identity, has_reference in zip(vectors, identities, referring, strict=True)
    ]
    layout = Layout([sources[place] for place in anchors], [sources[place] for place in candidates], across)
    return streamed.reduce(layout, [_read(kind, given, tensors) for kind, given in _kinds(text)], size, triton)


@torch.library.custom_op("contrast::reduce", mutates_args=())
def _forward(
    vectors: list[Tensor], identities: list[Tensor], references: list[Tensor], tensors: list[Tensor], text: str
) -> list[Tensor]:
    return [output.clone() for output in _compute(vectors, identities, references, tensors, text)]


@_forward.register_fake
def _(
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
    rows = sum(vectors[place].shape[-2] for place in anchors)
    heads = max((vectors[place].shape[:-2] for place in (*anchors, *candidates)), key=len)
    found = []
    for kind, given in _kinds(text):
        counts = kind == Count.__name__
        shape = (rows,) if counts and given["above"] is None else (*heads, rows)
        found.append(vectors[0].new_empty(shape, dtype=torch.int64 if counts else dtype))
    return found


@torch.library.custom_op("contrast::reduce_backward", mutates_args=())
def _backward(
    upstream: list[Tensor],
    vectors: list[Tensor],
    identities: list[Tensor],
    references: list[Tensor],
    tensors: list[Tensor],
    text: str,
    wants: list[bool],
) -> list[Tensor]:
    inputs = [tensor.detach() for tensor in (*vectors, *tensors)]
    wanted = [tensor.requires_grad_() for tensor, wants_gradient in zip(inputs, wants, strict=True) if wants_gradient]
    with torch.enable_grad():
        outputs = _compute(inputs[: len(vectors)], identities, references, inputs[len(vectors) :], text)
    of_outputs = [(out, g) for out, g in zip(outputs, upstream, strict=True) if out.requires_grad]
    gradients: Sequence[Tensor] = ()
    if of_outputs and wanted:
        differentiable, given = zip(*of_outputs, strict=True)
        gradients = torch.autograd.grad(differentiable, wanted, given, allow_unused=True, materialize_grads=True)
    of_input = dict(zip(map(id, wanted), gradients, strict=False))
    # Contiguous, as the fake operator below promises; and never an input or a kept tensor itself.
    return [of_input.get(id(t), torch.zeros_like(t)).clone(memory_format=torch.contiguous_format) for t in inputs]


@_backward.register_fake
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


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    vectors, identities, references, tensors, ctx.text = inputs
    ctx.sizes = [len(vectors), len(identities), len(references), len(tensors)]
    ctx.save_for_backward(*vectors, *identities, *references, *tensors)
    fixed = [kind in (Count.__name__, Kth.__name__) for kind, _ in _kinds(ctx.text)]
    ctx.mark_non_differentiable(*(out for out, is_fixed in zip(output, fixed, strict=True) if is_fixed))
    ctx.like = [(out.shape, out.dtype) for out in output]
    ctx.wants = [tensor.requires_grad for tensor in (*vectors, *tensors)]


def _differentiate(ctx: Any, gradients: list[Tensor | None]) -> Any:
    rest, lists = list(saved(ctx)), []
    for size in ctx.sizes:
        lists.append(rest[:size])
        rest = rest[size:]
    upstream = [
        lists[0][0].new_zeros(shape, dtype=dtype) if gradient is None else gradient
        for gradient, (shape, dtype) in zip(gradients, ctx.like, strict=True)
    ]
    found = torch.ops.contrast.reduce_backward(upstream, *lists, ctx.text, ctx.wants)
    wanted = [gradient if wants else None for gradient, wants in zip(found, ctx.wants, strict=True)]
    first = ctx.sizes[0]
    return wanted[:first], [None] * ctx.sizes[1], [None] * ctx.sizes[2], wanted[first:], None


_forward.register_autograd(_differentiate, setup_context=_save)
