"""One call of `reduce` without a matrix: each reduction goes the cheapest way; the rest share one sweep of tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from contrast.embeddings import Embeddings
from contrast.reductions import dense
from contrast.reductions.asked import Count, Kth, Reduction, Relation, arguments
from contrast.reductions.bounded import Bounded, NotBoundedError
from contrast.reductions.identity import Matches
from contrast.reductions.linear import Linear
from contrast.reductions.listed import Listed, add_dots, dots
from contrast.reductions.tiles import Tiles
from contrast.reductions.work import Gradients, Work, learned, shared

if TYPE_CHECKING:
    from contrast.pairs import Pairs

TILE = 512
"""Rows and columns of a tile: with its few copies it stays in the processor's cache."""


class Way(Protocol):
    """How some reductions are computed."""

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """Give the reductions, and what the backward pass needs."""

    def backward(self, outputs: list[Tensor], saved: list[Tensor], upstream: list[Tensor], into: Gradients) -> None:
        """Add the gradients."""


def reduce(pairs: Pairs, asked: Sequence[Reduction], size: int) -> tuple[Tensor, ...]:
    """Give each reduction, without holding the similarities."""
    for reduction in asked:
        dense.check(reduction, pairs)
    if all(isinstance(reduction, Count) for reduction in asked):
        with torch.no_grad():
            return tuple(_run(_work(pairs, asked), size)[0])
    call = _Call(pairs, asked, size)
    found: tuple[Tensor, ...] = _Reduce.apply(call, *call.inputs)
    return found


def topk(pairs: Pairs, k: int, over: Relation, among: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """Give the k largest similarities of each row, with gradient, and the positions of their candidates."""
    dense.check(Count(over, among), pairs)
    with torch.no_grad():
        places = Tiles(_work(pairs, []), [], size).topk(k, over, among)
    call = _Call(pairs, [], size)
    values: Tensor = _At.apply(call, places, *call.inputs)
    return values, places


def _work(pairs: Pairs, asked: Sequence[Reduction]) -> Work:
    wide = [_wide(embeddings.detach()) for embeddings in (pairs.anchor, *pairs.candidates)]
    parts = pairs.anchor.parts
    mirrored = bool(parts) and len(parts) <= len(pairs.candidates)
    mirrored = mirrored and all(one is other for one, other in zip(parts, pairs.candidates, strict=False))
    return Work(
        anchor=wide[0],
        candidates=wide[1:],
        across=pairs.across,
        rules=pairs.rules,
        identity=pairs.identity,
        mirrored=len(parts) if mirrored else 0,
        asked=list(asked),
        wants_part=[False] * len(pairs.candidates),
    )


def _wide(embeddings: Embeddings) -> Embeddings:
    dtype = torch.promote_types(embeddings.z.dtype, torch.float32)
    return embeddings if embeddings.z.dtype == dtype else replace(embeddings, z=embeddings.z.to(dtype))


class _Call:
    """One call of `reduce`: what is asked, and the tensors that may want a gradient, in a fixed order.

    Args:
        pairs: anchors and candidates.
        asked: the reductions.
        size: rows and columns of a tile.
    """

    def __init__(self, pairs: Pairs, asked: Sequence[Reduction], size: int) -> None:
        self.size = size
        self.pairs = pairs
        self.slots: list[tuple[int, str]] = []
        self.inputs: list[Tensor] = [pairs.anchor.z, *(part.z for part in pairs.candidates)]
        self.learned: list[Tensor] = []
        plain: list[Reduction] = []
        for number, reduction in enumerate(asked):
            given = {}
            for name, value in arguments(reduction).items():
                if isinstance(value, Tensor):
                    self.slots.append((number, name))
                    self.inputs.append(value)
                    given[name] = value.detach()
                elif isinstance(value, nn.Module):
                    known = {id(tensor) for tensor in self.learned}
                    self.learned += [tensor for tensor in learned(value) if id(tensor) not in known]
            plain.append(replace(reduction, **given) if given else reduction)  # type: ignore[arg-type]
        self.inputs += [shared(tensor) for tensor in self.learned]
        self.asked = plain

    def in_order(self, into: Gradients) -> tuple[Tensor | None, ...]:
        """Give the gradients in the order of the inputs, each in its input's dtype."""
        found = [into.anchor, *into.parts, *(into.arguments.get(slot) for slot in self.slots)]
        found += [into.parameters.get(id(parameter)) for parameter in self.learned]
        return tuple(
            None if gradient is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip(found, self.inputs, strict=True)
        )

    def work(self, wanted: Sequence[bool]) -> Work:
        """Give the work, knowing of which inputs a gradient is wanted."""
        work = _work(self.pairs, self.asked)
        parts = len(self.pairs.candidates)
        work.wants_anchor, work.wants_part = wanted[0], list(wanted[1 : 1 + parts])
        work.wants_argument = {slot for slot, wants in zip(self.slots, wanted[1 + parts :], strict=False) if wants}
        return work


def _run(work: Work, size: int) -> tuple[list[Tensor], list[tuple[Way, list[int], list[Tensor]]]]:
    """Send each reduction its way; give the outputs, and each way with its reductions and what it saved."""
    outputs: dict[int, Tensor] = {}
    ways: list[tuple[Way, list[int], list[Tensor]]] = []

    def walk(way: Way, numbers: list[int]) -> None:
        found, saved = way.forward()
        outputs.update(zip(numbers, found, strict=True))
        ways.append((way, numbers, saved))

    listed, tiled = [], []
    plain = work.x.device.type == "cpu" and work.identity.plain
    for number, asked in enumerate(work.asked):
        modules = any(isinstance(value, nn.Module | str) for value in arguments(asked).values())
        if not plain:
            tiled.append(number)
        elif isinstance(asked, Count) and asked.above is None and (asked.over == "positive" or not work.rules):
            outputs[number] = work.identity.count(asked.over, asked.among, asked.rows)
        elif asked.over == "positive" and work.identity.positive is not None and not modules:
            listed.append(number)
        elif Linear.accepts(work, number):
            walk(Linear(work, number), [number])
        else:
            tiled.append(number)
    if listed:
        walk(Listed(work, listed), listed)
    if tiled:
        bounded = plain and all(Bounded.accepts(work, number) for number in tiled)
        try:
            walk(Bounded(work, tiled, size) if bounded else Tiles(work, tiled, size), tiled)
        except NotBoundedError:
            walk(Tiles(work, tiled, size), tiled)
    return [outputs[number] for number in range(len(work.asked))], ways


class _Reduce(torch.autograd.Function):
    """The reductions of one call, and their gradients from a second sweep."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(inputs[0].device.type, enabled=False):
            work = call.work(ctx.needs_input_grad[1:])
            outputs, ways = _run(work, call.size)
        ctx.call, ctx.work = call, work
        ctx.ways = [(way, numbers, len(saved)) for way, numbers, saved in ways]
        kept = (tensor for _, _, saved in ways for tensor in saved)
        ctx.save_for_backward(*inputs, *outputs, *kept)
        whole = [output for output, asked in zip(outputs, work.asked, strict=True) if isinstance(asked, Count | Kth)]
        ctx.mark_non_differentiable(*whole)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs, tensors = _split(ctx.saved_tensors, len(ctx.call.inputs))

        def gradients(*upstream: Tensor) -> tuple[Tensor | None, ...]:
            call, work, into = ctx.call, ctx.work, Gradients(ctx.work)
            outputs, kept = tensors[: len(work.asked)], tensors[len(work.asked) :]
            for way, numbers, count in ctx.ways:
                saved, kept = kept[:count], kept[count:]
                way.backward([outputs[n] for n in numbers], saved, [upstream[n] for n in numbers], into)
            found: tuple[Tensor | None, ...] = call.in_order(into)
            return found

        return (None, *first_only(gradients, inputs, *upstream))


class _At(torch.autograd.Function):
    """The similarities at given places, 0 where the place is -1."""

    @staticmethod
    def forward(ctx: Any, call: _Call, places: Tensor, *inputs: Tensor) -> Tensor:
        with torch.autocast(inputs[0].device.type, enabled=False):
            ctx.call, ctx.work = call, call.work(ctx.needs_input_grad[2:])
            ctx.save_for_backward(*inputs, places)
            return torch.stack([_at(work, places) for work, places in _by_head(ctx.work, places)]).view(places.shape)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs, (places,) = _split(ctx.saved_tensors, len(ctx.call.inputs))

        def gradients(upstream: Tensor) -> tuple[Tensor | None, ...]:
            into = Gradients(ctx.work)
            heads = _by_head(ctx.work, places)
            for head, (work, its_places) in enumerate(heads):
                g = upstream[head] if ctx.work.heads else upstream
                listed, found = _places(its_places)
                add_dots(work, listed, g[found], into.of_head(head, work))
            found: tuple[Tensor | None, ...] = ctx.call.in_order(into)
            return found

        return (None, None, *first_only(gradients, inputs, upstream[0]))


def _by_head(work: Work, places: Tensor) -> list[tuple[Work, Tensor]]:
    """Give the work of each head alone, and its places."""
    if not work.heads:
        return [(work, places)]

    def of_head(embeddings: Embeddings, head: int) -> Embeddings:
        return replace(embeddings, z=embeddings.z[head]) if embeddings.z.ndim == 3 else embeddings

    return [
        (
            replace(
                work, anchor=of_head(work.anchor, head), candidates=[of_head(part, head) for part in work.candidates]
            ),
            places[head],
        )
        for head in range(work.heads[0])
    ]


def _places(places: Tensor) -> tuple[Matches, Tensor]:
    """List the places that hold a candidate, and say which they are."""
    found = places >= 0
    rows = torch.arange(len(places), device=places.device).unsqueeze(1).expand_as(places)
    return Matches(rows[found], places[found]), found


def _at(work: Work, places: Tensor) -> Tensor:
    listed, found = _places(places)
    return work.x.new_zeros(places.shape).masked_scatter_(found, dots(work, listed))


def _split(tensors: Sequence[Tensor], count: int) -> tuple[list[Tensor], list[Tensor]]:
    return list(tensors[:count]), list(tensors[count:])


def first_only(
    function: Callable[..., tuple[Tensor | None, ...]], inputs: Sequence[Tensor], *upstream: Tensor
) -> tuple[Tensor | None, ...]:
    """Give the gradients that `function` makes of `upstream`; who asks for their derivative reads a sentence.

    Args:
        function: the gradients, from those of the outputs.
        inputs: what the gradients depend on besides.
        *upstream: the gradients of the outputs.
    """
    if not torch.is_grad_enabled():
        return function(*upstream)
    found: tuple[Tensor | None, ...] = _FirstOnly.apply(function, len(inputs), *inputs, *upstream)
    return found


class _FirstOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], count: int, *tensors: Tensor) -> Any:  # noqa: ARG004
        return function(*tensors[count:])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ARG004
        raise RuntimeError(
            "the reductions of Pairs have first derivatives only; for a second one (a gradient penalty, MAML) compute "
            "the loss inside `with contrast.reductions.road('dense'):`."
        )


def without_second(outputs: tuple[Tensor, ...], pairs: Pairs) -> tuple[Tensor, ...]:
    """Give the same outputs, whose gradients have no derivative."""
    parts = [pairs.anchor.z, *(part.z for part in pairs.candidates)]
    found: tuple[Tensor, ...] = _Same.apply(len(parts), *parts, *outputs)
    return found


class _Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.count = count
        ctx.save_for_backward(*tensors[:count])
        outputs = tuple(x.view_as(x) for x in tensors[count:])
        ctx.mark_non_differentiable(*(x for x in outputs if not x.is_floating_point()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (1 + ctx.count)
        return (*nothing, *first_only(lambda *given: given, ctx.saved_tensors, *upstream))
