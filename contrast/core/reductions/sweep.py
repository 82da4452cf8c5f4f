"""One call of `reduce` without a matrix: each reduction goes the cheapest way; the rest share one sweep of tiles."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from contrast.core.embeddings import full_precision, turn_gradient
from contrast.core.reductions import dense, near, operator, ordinary
from contrast.core.reductions.asked import Count, Kth, Reduction, Relation, arguments
from contrast.core.reductions.bounded import Bounded, NotBoundedError
from contrast.core.reductions.closed import Functions
from contrast.core.reductions.hardest import Hardest
from contrast.core.reductions.linear import Linear
from contrast.core.reductions.listed import Listed, Places, RowByRow
from contrast.core.reductions.thresholds import Thresholds
from contrast.core.reductions.tiles import Tiles
from contrast.core.reductions.whole import Whole
from contrast.core.reductions.work import Gradients, Once, Work, first_only, learned, saved, shared

if TYPE_CHECKING:
    from contrast.core.pairs import Pairs

TILE = 512
"""Rows and columns of a tile: with its few copies it stays in the processor's cache."""


ORDINARY = 2**16
"""Up to this many similarities ordinary operations serve: starting them takes longer than they do."""
ONE_TRIANGLE = 4
"""So many times more similarities may stand in one matrix where tiles would compute each pair's only once."""
LOOKED_UP = 16
"""So many times more elsewhere: where nothing is known of identities, masks are had sooner than lists, and a row that
is ordered would be needed a third time."""
LARGE = 4 * LOOKED_UP
"""So many times more anchors times candidates, of which only some similarities may be asked."""


class Way(Protocol):
    """How some reductions are computed."""

    numbers: list[int]
    """Which."""

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """Give the reductions, and what the backward pass needs."""

    def backward(self, outputs: list[Tensor], saved: list[Tensor], upstream: list[Tensor], into: Gradients) -> None:
        """Add the gradients."""


def reduce(pairs: Pairs, asked: Sequence[Reduction], size: int, small: int, kernels: bool) -> tuple[Tensor, ...]:
    """Give each reduction, without holding more than `small` similarities together."""
    for reduction in asked:
        dense.check(reduction, pairs)
    if torch.compiler.is_compiling():
        if operator.can_travel(pairs, asked):
            return operator.reduce(pairs, asked, size, small, kernels)
        return _uncompiled()(pairs, asked, size, small, kernels)
    return _reduce(pairs, asked, size, small, kernels)


@cache
def _uncompiled() -> Callable[..., tuple[Tensor, ...]]:
    """Give `_reduce` behind the compiler's back; made at its first use, since the compiler takes a second to import."""
    made: Callable[..., tuple[Tensor, ...]] = torch.compiler.disable(_reduce)  # type: ignore[no-untyped-call]
    return made


def _reduce(pairs: Pairs, asked: Sequence[Reduction], size: int, small: int, kernels: bool) -> tuple[Tensor, ...]:
    identity, without = pairs.identity, all(isinstance(one, Count | Kth) for one in asked)
    if without and pairs.anchor.z.device.type == "cpu" and all(_by_identity(one, pairs) for one in asked):
        lists = identity.canonical or identity.rows * identity.columns > LOOKED_UP * small
        if lists and identity.plain:
            counts: list[Any] = list(asked)
            return tuple(identity.count(one.over, one.among, one.rows) for one in counts)
    alone = [near.only(one, pairs) for one in asked]
    known = near.known(pairs) if all(alone) else None
    if known is not None:
        return tuple(near.of_one(one, known) for one in asked)
    if pairs.anchor.z.device.type == "cpu" and not kernels:
        found = ordinary.reduce(pairs, asked, min(4 * small, ORDINARY))
        if found is not None:
            return found
    whole = [*asked, *([near.NEAR] if near.wanted(pairs, asked, alone) else [])]
    call = prepared(near.bare(pairs), whole, size, small, kernels)
    if not any(call.wants) or (without and not torch._C._are_functorch_transforms_active()):
        return tuple(call.forward(call.inputs)[0])
    found = _apply(call)
    near.remember(pairs, whole, [*alone, True], found, call.once)
    return found[: len(asked)]


def prepared(pairs: Pairs, asked: Sequence[Reduction], size: int, small: int, kernels: bool) -> _Call:
    """Give a call that is ready to run."""
    return _Call(pairs, asked, lambda work: _ways(work, size, small, kernels))


def topk(pairs: Pairs, k: int, over: Relation, among: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """Give the k largest similarities of each row, with gradient, and the positions of their candidates."""
    dense.check(Count(over, among), pairs)
    with torch.no_grad():
        call = _Call(pairs, [], lambda work: _ways(work, size, 0, False))
        places = Tiles(call.work([z.detach() for z in call.inputs]), [], size).topk(k, over, among)
    call = _Call(pairs, [], lambda work: [Places(work, places)])
    if not any(call.wants):
        return call.forward(call.inputs)[0][0], places
    return _apply(call)[0], places


class _Call:
    """One call: what is asked, and the tensors that may want a gradient, in a fixed order.

    Args:
        pairs: anchors and candidates.
        asked: the reductions.
        ways: gives the ways to go, for the work.
    """

    def __init__(self, pairs: Pairs, asked: Sequence[Reduction], ways: Callable[[Work], list[Way]]) -> None:
        self.pairs, self.make_ways = pairs, ways
        self.slots: list[tuple[int, str]] = []
        self.learned: list[Tensor] = []
        self.mirrored = pairs.mirrored
        # Candidates that are the anchors themselves have their gradient there.
        parts = [part.z.detach() if k < self.mirrored else part.z for k, part in enumerate(pairs.candidates)]
        direct = pairs.anchor.direct
        self.direct = direct if direct is not None and len(pairs.anchor) == direct.z.shape[-2] else None
        self.inputs: list[Tensor] = [pairs.anchor.z if self.direct is None else self.direct.z, *parts]
        self.asked: list[Reduction] = []
        self.outputs, self.once = 0, Once()
        for number, reduction in enumerate(asked):
            given = {}
            for name, value in arguments(reduction).items():
                if isinstance(value, Tensor):
                    self.slots.append((number, name))
                    self.inputs.append(value)
                    given[name] = value.detach()
                elif value is not None and isinstance(value, nn.Module):
                    known = {id(tensor) for tensor in self.learned}
                    self.learned += [tensor for tensor in learned(value) if id(tensor) not in known]
            self.asked.append(replace(reduction, **given) if given else reduction)  # type: ignore[arg-type]
        self.inputs += [shared(tensor) for tensor in self.learned]
        graded = torch.is_grad_enabled()
        self.wants = [graded and tensor.requires_grad for tensor in self.inputs]

    def work(self, inputs: Sequence[Tensor]) -> Work:
        """Give the work on these tensors, which are the inputs without history."""
        count = 1 + len(self.pairs.candidates)
        wide = [z.to(torch.promote_types(z.dtype, torch.float32)) for z in inputs[:count]]
        wanted = {slot for slot, wants in zip(self.slots, self.wants[count:], strict=False) if wants}
        return Work(self.pairs, self.asked, wide[0], wide[1:], self.wants[:count], wanted)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Give the outputs, and what the backward pass needs."""
        outputs: dict[int, Tensor] = {}
        self.ways: list[tuple[Way, int]] = []
        kept: list[Tensor] = []
        with _quiet(inputs[0]):
            self.work_done = self.work(inputs)
            for way in self.make_ways(self.work_done):
                try:
                    found, saved = way.forward()
                except NotBoundedError:
                    way = Tiles(self.work_done, way.numbers, way.size)  # type: ignore[attr-defined]
                    found, saved = way.forward()
                outputs.update(zip(way.numbers, found, strict=True))
                self.ways.append((way, len(saved)))
                kept += saved
        return [outputs[number] for number in range(len(outputs))], kept

    def _asked_for(self) -> list[slice]:
        """Give the anchors whose gradient somebody asks for."""
        parts = self.pairs.anchor.parts or (self.pairs.anchor,)
        starts = list(itertools.accumulate(map(len, parts), initial=0))
        return [slice(*rows) for part, *rows in zip(parts, starts, starts[1:], strict=False) if not part.fixed]

    def whole(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Give those of the outputs that have no gradient."""
        return [output for output, asked in zip(outputs, self.asked, strict=False) if isinstance(asked, Count | Kth)]

    def backward(self, outputs: list[Tensor], kept: list[Tensor], upstream: Sequence[Tensor]) -> tuple[Any, ...]:
        """Give the gradients of the inputs, in their order, each in its input's dtype."""
        self.once.used = True
        with _quiet(outputs[0]):
            into = Gradients(self.work_done)
            for way, count in self.ways:
                saved, kept = kept[:count], kept[count:]
                way.backward([outputs[n] for n in way.numbers], saved, [upstream[n] for n in way.numbers], into)
            if self.direct is not None and into.anchor is not None:
                turn_gradient(into.anchor, self.direct, self._asked_for())
        # Candidates that are anchors have their gradient there.
        apart = into.parts[self.mirrored :] if self.mirrored < len(self.pairs.candidates) else []
        found = [into.anchor, *[None] * self.mirrored, *apart]
        found += [into.arguments.get(slot) for slot in self.slots]
        found += [into.parameters.get(id(tensor)) for tensor in self.learned]
        return tuple(
            None if gradient is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip(found, self.inputs, strict=True)
        )


@contextmanager
def _silent(z: Tensor) -> Iterator[None]:
    with torch.no_grad(), full_precision(z):
        yield


def _quiet(z: Tensor) -> AbstractContextManager[Any]:
    """Switch gradients and autocast off inside the block, if they are on."""
    on = torch.is_grad_enabled() or torch.is_autocast_enabled(z.device.type)
    return _silent(z) if on else nullcontext()


def _ways(work: Work, size: int, small: int, kernels: bool) -> list[Way]:
    """Send each reduction its way."""
    kernels = kernels or work.x.device.type == "cuda"
    if not kernels and work.x.shape[-2] * work.starts[-1] <= LARGE * small and Whole.accepts(work):
        whole = Whole(work, list(range(len(work.asked))))
        if whole.size <= small * _patience(work, whole.triangle):
            return [whole]
    ways: list[Way] = []
    counted, listed, tiled = [], [], []
    plain = work.x.device.type == "cpu" and not kernels and work.identity.plain
    by_tiles = _settle(work, size, plain)
    for number, asked in enumerate(work.asked):
        if not plain or number in by_tiles:
            tiled.append(number)
        elif _by_identity(asked, work.pairs):
            counted.append(number)
        elif _is_listed(work, asked):
            listed.append(number)
        elif isinstance(getattr(asked, "above", None), Kth):
            ways.append(Hardest(work, number, size))
        elif Linear.accepts(work, number):
            ways.append(Linear(work, number))
        elif Functions.accepts(work, number):
            ways.append(Functions(work, [number], size))
        elif Thresholds.accepts(work, number):
            ways.append(Thresholds(work, [number], size))
        else:
            tiled.append(number)
    if counted:
        ways.append(_Counted(work, counted))
    if listed:
        ways.append(Listed(work, listed))
    if tiled and kernels:
        from contrast.core.reductions.kernels import Kernels  # Triton is imported only where it serves

        # A threshold must meet the similarities it was found among, to the bit: those stay with the tiles.
        fit = [n for n in tiled if Kernels.accepts(work, n) and getattr(work.asked[n], "above", None) is None]
        if fit and Kernels.available(work.x.device):
            ways.append(Kernels(work, fit))
            tiled = [n for n in tiled if n not in fit]
    if tiled:
        bounded = plain and all(Bounded.accepts(work, number) for number in tiled)
        ways.append(Bounded(work, tiled, size) if bounded else Tiles(work, tiled, size))
    return ways


def _settle(work: Work, size: int, plain: bool) -> set[int]:
    """Find the thresholds that reductions ask for themselves, but those found on the way; say who must go by tiles.

    A similarity has the same bits where it is computed the same way: in tiles, or pair by pair.
    """
    found: dict[tuple[int, bool], Tensor] = {}
    by_tiles = set()
    for number, asked in enumerate(work.asked):
        above: Any = getattr(asked, "above", None)
        if not isinstance(above, Kth) or (plain and Hardest.accepts(work, number)):
            continue
        listed = plain and above.over == "positive" and _is_listed(work, asked)
        if (id(above), listed) not in found:
            alone = Work(work.pairs, [above], work.x, work.parts, [False] * (1 + len(work.parts)), set())
            tiles = Thresholds if plain and Thresholds.accepts(alone, 0) else Tiles
            way = Listed(alone, [0]) if listed else tiles(alone, [0], size)
            found[id(above), listed] = way.forward()[0][0]
        work.asked[number] = replace(asked, above=found[id(above), listed])  # type: ignore[arg-type]
        if not listed:
            by_tiles.add(number)
    return by_tiles


def _is_listed(work: Work, asked: Reduction) -> bool:
    """Say whether a reduction is over positives that are listed, with arguments that can be had of them."""
    functions = any(_must_meet_tiles(value) for value in arguments(asked).values())
    return asked.over == "positive" and work.identity.positive is not None and not functions


def _patience(work: Work, triangle: bool) -> int:
    """Say how many times `small` similarities may stand in one tile."""
    thresholds = any(isinstance(asked, Kth) or getattr(asked, "above", None) is not None for asked in work.asked)
    return ONE_TRIANGLE if triangle and work.identity.canonical and not thresholds else LOOKED_UP


def _must_meet_tiles(value: object) -> bool:
    """Say whether an argument has no values row by row."""
    return isinstance(value, str) or (isinstance(value, nn.Module) and not isinstance(value, RowByRow))


def _by_identity(asked: Reduction, pairs: Pairs) -> bool:
    """Say whether the identities alone answer."""
    return isinstance(asked, Count) and asked.above is None and (asked.over == "positive" or not pairs.rules)


class _Counted:
    """Counts, by the identities alone."""

    def __init__(self, work: Work, numbers: list[int]) -> None:
        self.work, self.numbers = work, numbers

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        asked: list[Any] = [self.work.asked[number] for number in self.numbers]
        return [self.work.identity.count(one.over, one.among, one.rows) for one in asked], []

    def backward(self, outputs: list[Tensor], saved: list[Tensor], upstream: list[Tensor], into: Gradients) -> None:
        """Counts have no gradient."""


class _Function(torch.autograd.Function):
    """A call and its gradients; outputs are those of the call, then what it keeps for the backward pass."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs, kept = call.forward(inputs)
        call.outputs = len(outputs)
        ctx.call = call
        ctx.save_for_backward(*inputs, *outputs, *kept)
        ctx.mark_non_differentiable(*call.whole(outputs))
        ctx.set_materialize_grads(True)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, upstream)


class _FunctionOfTransforms(torch.autograd.Function):
    """The same inside torch.func, which wants the context apart, and what is kept among the outputs."""

    @staticmethod
    def forward(call: _Call, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs, kept = call.forward(inputs)
        call.outputs = len(outputs)
        return (*outputs, *(tensor.clone() for tensor in kept))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(*ctx.call.whole(output), *output[ctx.call.outputs :])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, upstream)


def _gradients(ctx: Any, upstream: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    call: _Call = ctx.call
    tensors, count = list(saved(ctx)), len(call.inputs)
    inputs, outputs, kept = tensors[:count], tensors[count : count + call.outputs], tensors[count + call.outputs :]
    return (None, *first_only(lambda *given: call.backward(outputs, kept, given), inputs, *upstream[: call.outputs]))


def _apply(call: _Call) -> tuple[Tensor, ...]:
    function = _FunctionOfTransforms if torch._C._are_functorch_transforms_active() else _Function
    found: tuple[Tensor, ...] = function.apply(call, *call.inputs)
    return found
