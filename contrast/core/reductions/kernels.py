"""The row reductions as two Triton kernels, which read identities instead of masks and write a few numbers per row.

`_row_kernel` loops over all candidates for a block of anchors and updates three numbers per reduction: the largest
exponent m, the mass sum_j e^(x_ij - m) and the total sum_j e^(x_ij - m) s_ij. `_gradient_kernel` computes the
similarities again, forms G_ij = dL/ds_ij from the derivatives of `formulas`, and computes dX = G Y; with the roles
exchanged, dY = G^T X; where the anchors are the candidates it forms G + G^T at once, so that two sweeps cost 6 N^2 D
instead of 10 N^2 D. Each program writes different rows, so that it needs no atomics and every run has the same bits.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from contrast.core.embeddings import PADDING
from contrast.core.reductions.formulas import formula
from contrast.core.reductions.kernel_inputs import KernelCall, KernelGradients
from contrast.core.reductions.kinds import Count, LogSumExp, Mean, Reduction, SoftMean, SoftplusSum, arguments
from contrast.core.reductions.layout import Layout

try:
    import triton  # type: ignore[import-untyped]
    import triton.language as tl  # type: ignore[import-untyped]
except ImportError:  # CPUs need no Triton
    triton = None

INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)
"""True if TRITON_INTERPRET=1 was set when this was imported: the kernels then run on the CPU, for tests."""
PER_SWEEP = 4
"""Reductions per sweep: each has its own code in the kernel, and its own registers."""
SIZE = 64
"""Rows and columns of a tile."""
CHUNK = 128
"""Coordinates of a gradient per program: with 8 warps all of its state fits into registers."""


def _jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


class Vectors(NamedTuple):
    """Vectors in memory: the tensor, its strides over heads and over rows, and the number of rows."""

    z: Any
    head: int
    row: int
    size: int


class Side(NamedTuple):
    """The identities and arguments of the anchors, or of the candidates of one sweep.

    Args:
        identity: (4, total) int32: sample, group, view, and 1 for remembered entries.
        present: (K, total) bool, False for those that do not count in each of K reductions.
        numbers: (W, K, H, total), W: factor and addend of the exponent; for anchors also the threshold,
            dL/d(reduction), the normaliser, the reduction.
        heads: H.
        first: the first of this sweep.
        stop: the one after the last.
        total: the number of all anchors, or of all candidates.
    """

    identity: Any
    present: Any
    numbers: Any
    heads: int
    first: int
    stop: int
    total: int


class KernelTile(NamedTuple):
    """The anchors i and the candidates j of a tile of one head."""

    anchors: Any
    candidates: Any
    head: Any
    i: Any
    j: Any


class KernelReduction(NamedTuple):
    """The constants of one reduction at compile time; its numbers are in `Side`.

    Args:
        kind: the name of its class, or "SoftMean detached".
        over: the relation.
        above: True if it has a threshold.
        sides: of its factor (the scale; a mean's weight) and its addend (log_weight or bias): "anchor", also for a
            number, "candidate", or "none" for no addend.
        learns: True for the factor, for the addend, if its gradient is needed.
    """

    kind: str
    over: str
    above: bool
    sides: tuple[str, str]
    learns: tuple[bool, bool]


class Code(NamedTuple):
    """The constants for which a kernel is compiled.

    Args:
        reductions: the reductions.
        across: True if only candidates of another view count.
        skips: True to skip tiles in which nothing counts.
        reads: True if the similarities are needed.
        as_anchor: True if own vectors are anchors of the others.
        as_candidate: True if own vectors are candidates of the others.
        writes: True if vectors have a gradient; False if only arguments have one.
        dims: D.
        chunk: coordinates of the gradient per program.
        step: coordinates of a similarity that are multiplied at a time.
        size: rows and columns of a tile.
        precision: Triton's name for the precision of products.
    """

    reductions: tuple[KernelReduction, ...]
    across: bool
    skips: bool
    reads: bool
    as_anchor: bool
    as_candidate: bool
    writes: bool
    dims: int
    chunk: int
    step: int
    size: int
    precision: str


class Kernels:
    """The reductions of one call, forward and backward, by kernels.

    Args:
        call: the reductions, and the vectors in the form that the kernels read.
        size: rows and columns of a tile, a power of two from 16 on.
    """

    def __init__(self, call: KernelCall, size: int = SIZE) -> None:
        self.call, self.reductions = call, call.reductions
        self.heads, self.dims = math.prod(call.heads), call.x.shape[-1]
        # As in torch's own products: "highest" is float32, "high" tf32, "medium" bfloat16 with float32 sums.
        precision = torch.get_float32_matmul_precision() if call.x.dtype == torch.float32 else "highest"
        self.precision = "tf32" if precision == "high" else "ieee"
        self.dtype = torch.bfloat16 if precision == "medium" else call.x.dtype
        self.size = size

    @staticmethod
    def available(device: torch.device) -> bool:
        """True if Triton is installed and supports this device; the CPU only in Triton's interpreter."""
        if triton is None or INTERPRETED:
            return INTERPRETED
        return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)

    @staticmethod
    def accepts(layout: Layout, reduction: Reduction) -> bool:
        """True if a reduction's arguments are numbers and vectors, and its relation depends on identities only."""
        if not isinstance(reduction, LogSumExp | Mean | SoftMean | SoftplusSum | Count):
            return False
        if any(isinstance(value, nn.Module | str) for value in arguments(reduction).values()):
            return False
        if layout.rules and reduction.over != "positive":
            return False
        vectors, heads = layout.vectors, layout.heads
        # Triton (3.8) has no product of float64 whose operand was just computed.
        if vectors[0].dtype != torch.float32 and not INTERPRETED:
            return False
        # A kernel counts in floating point.
        exact = not isinstance(reduction, Count) or layout.candidate_count <= 2 / torch.finfo(vectors[0].dtype).eps
        return exact and all(len(part.z.shape[:-2]) == len(heads) for part in layout.anchors)

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the reductions, (N,) or (H, N) each, and a normaliser of each for the backward pass."""
        results: list[tuple[Tensor, Tensor]] = []
        x = self._vectors(self.call.x)
        for numbers in _sweep_batches(range(len(self.reductions))):
            anchors, candidates = self._sides(numbers)
            states = self.call.x.new_zeros(3, len(numbers), self.heads, x.size)
            states[0] = -torch.inf
            for y, swept, _ in self._sweeps(candidates):
                grid = (_block_count(x.size, self.size), self.heads)
                self._launch(_row_kernel, grid, (x, y, anchors, swept, states), self._code(numbers))
            results += [self._finish(self.reductions[number], states[:, k]) for k, number in enumerate(numbers)]
        return [output for output, _ in results], [normaliser for _, normaliser in results]

    def _finish(self, reduction: Any, of_state: Tensor) -> tuple[Tensor, Tensor]:
        sums: Any = formula(reduction, None, self.call.zeros)
        largest, mass, total = (values.reshape(self.call.zeros.shape) for values in of_state)
        sums.largest, sums.mass, sums.total = largest, mass, total
        if isinstance(reduction, Count | SoftplusSum):
            sums.mass = total.to(sums.mass.dtype if isinstance(reduction, SoftplusSum) else torch.int64)
        output, normaliser = sums.finish()
        return output, normaliser

    def backward(
        self, outputs: Sequence[Tensor], saved: Sequence[Tensor], upstream: Sequence[Tensor], targets: KernelGradients
    ) -> None:
        """Add the gradients, from the similarities computed again."""
        call, x = self.call, self._vectors(self.call.x)
        differentiable = [k for k, reduction in enumerate(self.reductions) if not isinstance(reduction, Count)]
        for numbers in _sweep_batches(differentiable):
            # A mean's upstream gradient is divided by its mass here, once for all pairs.
            mass = [saved[number] if isinstance(self.reductions[number], Mean) else 1 for number in numbers]
            given = [(upstream[number] / mass[k], saved[number], outputs[number]) for k, number in enumerate(numbers)]
            anchors, candidates = self._sides(numbers, given)
            sums = [call.x.new_zeros(2, len(numbers), self.heads, side.total) for side in (anchors, candidates)]
            code = self._code(numbers)
            learned = {side for each in code.reductions for side in itertools.compress(each.sides, each.learns)}
            for y, swept, part in self._sweeps(candidates):
                sides = (anchors, swept, *sums)
                if part is None:
                    self._add_gradient(targets.anchor, x, x, sides, code)
                    continue
                if targets.anchor is not None or "anchor" in learned:
                    self._add_gradient(targets.anchor, x, y, sides, code._replace(as_candidate=False))
                if targets.parts[part] is not None or "candidate" in learned:
                    self._add_gradient(targets.parts[part], y, x, sides, code._replace(as_anchor=False))
            for k, number in enumerate(numbers):
                self._add_arguments(number, code.reductions[k], [side[:, k] for side in sums], targets)

    def _add_gradient(
        self, to: Tensor | None, own: Vectors, other: Vectors, sides: tuple[Any, ...], code: Code
    ) -> None:
        """Add the gradient of own vectors, if it is needed, and those of arguments."""
        # Heads that share a gradient are computed one after the other.
        at_once = 1 if to is not None and to.ndim == 2 else self.heads
        gradient = None if to is None else to.new_zeros(at_once, *to.shape[-2:])
        chunks = 1 if gradient is None else max(1, _block_count(code.dims, code.chunk))
        grid = (_block_count(own.size, code.size), chunks, at_once)
        output = own if gradient is None else _strided(gradient)
        for head in range(0, self.heads, at_once):
            given = (own, other, output, *sides, head)
            self._launch(_gradient_kernel, grid, given, code._replace(writes=gradient is not None))
        if to is not None and gradient is not None:
            to += gradient.view(to.shape)

    def _add_arguments(
        self, number: int, reduction: KernelReduction, sums: list[Tensor], targets: KernelGradients
    ) -> None:
        for which, name in enumerate(_argument_names(self.reductions[number])):
            if not reduction.learns[which]:
                continue
            of_anchors = reduction.sides[which] == "anchor"
            gradient = sums[0][which].unsqueeze(-1) if of_anchors else sums[1][which].unsqueeze(-2)
            to_argument = targets.arguments[number, name]
            assert to_argument is not None
            gradient = gradient.squeeze(-1) if name == "bias" else gradient
            to_argument += gradient.sum_to_size(to_argument.shape) if gradient.ndim >= to_argument.ndim else gradient

    def _code(self, numbers: Sequence[int]) -> Code:
        reductions = tuple(self._kernel_reduction(number) for number in numbers)
        # To test whether any pair of a tile counts is faster only where many tiles are empty.
        sparse = all(reduction.over in ("positive", "remembered") for reduction in reductions)
        wide = max(16, triton.next_power_of_2(self.dims))
        return Code(
            reductions=reductions,
            across=self.call.layout.across,
            skips=sparse or self.call.layout.across,
            reads=any(reduction.kind != "Count" or reduction.above for reduction in reductions),
            as_anchor=True,
            as_candidate=True,
            writes=True,
            dims=self.dims,
            chunk=min(CHUNK, wide),
            # Products of float32 run outside the tensor cores, with a full step in registers.
            step=min(16 if self.precision == "ieee" and self.dtype == torch.float32 else 32, wide),
            size=self.size,
            precision=self.precision,
        )

    def _kernel_reduction(self, number: int) -> KernelReduction:
        reduction = self.reductions[number]
        detached = isinstance(reduction, SoftMean) and reduction.detach
        (factor, addend), names, learned = _factor_and_addend(reduction), _argument_names(reduction), self.call.learned
        return KernelReduction(
            kind="SoftMean detached" if detached else type(reduction).__name__,
            over=reduction.over,
            above=getattr(reduction, "above", None) is not None,
            sides=(_argument_side(factor), "none" if addend is None else _argument_side(addend)),
            learns=((number, names[0]) in learned, (number, names[1]) in learned),
        )

    def _sides(self, numbers: Sequence[int], given: Sequence[tuple[Tensor, ...]] | None = None) -> tuple[Side, Side]:
        """Return the anchors and all candidates, for the backward pass with its coefficients."""
        layout, new, count = self.call.layout, self.call.x.new_zeros, len(numbers)
        of_anchors, of_candidates = self.call.numbered
        rows, columns = of_anchors.shape[1], of_candidates.shape[1]
        of_rows, of_columns = new(6, count, self.heads, rows), new(2, count, self.heads, columns)
        present = (layout.anchor.view != PADDING).repeat(count, 1), (layout.candidate.view != PADDING).repeat(count, 1)
        for k, number in enumerate(numbers):
            reduction = self.reductions[number]
            for which, value in enumerate(_factor_and_addend(reduction)):
                if isinstance(value, Tensor) and _argument_side(value) == "candidate":
                    of_columns[which, k] = value.reshape(*value.shape[:-2], columns)
                elif isinstance(value, Tensor):
                    value = value.expand(self.heads, rows, 1) if value.ndim else value.expand(1, rows, 1)
                    of_rows[which, k] = value.squeeze(-1)
                elif value is not None:
                    of_rows[which, k] = value
            for which, values in enumerate((getattr(reduction, "above", None), *(given[k] if given else ())), start=2):
                if values is not None and values.numel():  # a sum of softplus has no normaliser
                    of_rows[which, k] = values
            if reduction.among is not None:
                present[1][k] &= reduction.among
            if reduction.rows is not None:
                present[0][k] &= reduction.rows
        return (
            Side(of_anchors, present[0], of_rows, self.heads, 0, rows, rows),
            Side(of_candidates, present[1], of_columns, self.heads, 0, columns, columns),
        )

    def _sweeps(self, candidates: Side) -> Iterator[tuple[Vectors, Side, int | None]]:
        """Iterate over the candidates by part: vectors, side, index of the part; None for the anchors themselves."""
        call = self.call
        parts: list[tuple[Tensor, int | None]] = [(call.x, None)] if call.mirrored else []
        parts += [(part, k) for k, part in enumerate(call.parts) if k >= call.mirrored]
        for z, k in parts:
            y = self._vectors(z)
            first = 0 if k is None else call.starts[k]
            if y.size and call.x.shape[-2] and self.heads:
                yield y, candidates._replace(first=first, stop=first + y.size), k

    def _vectors(self, z: Tensor) -> Vectors:
        z = z.to(self.dtype)
        if INTERPRETED and self.dtype == torch.bfloat16:
            # The interpreter multiplies the bits of bfloat16; rounded float32 are the same numbers.
            z = z.float()
        return _strided(z if z.stride(-1) == 1 else z.contiguous())

    def _launch(self, kernel: Any, grid: tuple[int, ...], given: tuple[Any, ...], code: Code) -> None:
        device = self.call.x.device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[grid](*given, code=code, num_warps=8 if code.size >= SIZE else 4, num_stages=2)


def _sweep_batches(numbers: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(numbers), PER_SWEEP):
        yield numbers[start : start + PER_SWEEP]


def _block_count(length: int, size: int) -> int:
    return -(-length // size)


def _strided(z: Tensor) -> Vectors:
    """Return (N, D) or (H, N, D) with their strides; all heads read the same (N, D)."""
    return Vectors(z, z.stride(0) if z.ndim == 3 and len(z) > 1 else 0, z.stride(-2), z.shape[-2])


def _factor_and_addend(reduction: Any) -> tuple[Any, Any]:
    """Return the factor and the addend of a reduction; a number, (..., N or 1, M or 1), or None for no addend."""
    if isinstance(reduction, Mean):
        return 1.0 if reduction.weight is None else reduction.weight, None
    if isinstance(reduction, SoftplusSum):
        bias = reduction.bias
        return reduction.scale, bias.unsqueeze(-1) if isinstance(bias, Tensor) and bias.ndim else bias
    return getattr(reduction, "scale", 1.0), getattr(reduction, "log_weight", None)


def _argument_names(reduction: Any) -> tuple[str, str]:
    """Return the names of the factor and of the addend."""
    factor = "weight" if isinstance(reduction, Mean) else "scale"
    return factor, "bias" if isinstance(reduction, SoftplusSum) else "log_weight"


def _argument_side(value: Any) -> str:
    """Return the side of an argument: "candidate" if it spans M, else "anchor", also for a number."""
    return "candidate" if isinstance(value, Tensor) and value.ndim and value.shape[-1] != 1 else "anchor"


@_jit
def _row_kernel(x: Vectors, y: Vectors, anchors: Side, candidates: Side, states: tl.tensor, code: tl.constexpr) -> None:
    """Update the states (3, K, H, N) of a block of anchors over the candidates of one sweep.

    A state is the largest exponent m, the mass sum_j e^(x_ij - m), and the total sum_j e^(x_ij - m) s_ij.
    """
    head, rows = tl.program_id(1), tl.program_id(0) * code.size + tl.arange(0, code.size)
    i = anchors.first + rows
    inside = i < anchors.stop
    state: tl.tuple = ()
    for k in tl.static_range(len(code.reductions)):
        largest = tl.load(states + _offset(anchors, head, i, k, 0, code), mask=inside, other=0)
        mass = tl.load(states + _offset(anchors, head, i, k, 1, code), mask=inside, other=0)
        total = tl.load(states + _offset(anchors, head, i, k, 2, code), mask=inside, other=0)
        state += ((largest, mass, total),)
    for start in range(0, y.size, code.size):
        columns = start + tl.arange(0, code.size)
        tile = KernelTile(anchors, candidates, head, i, candidates.first + columns)
        counted = _counted(tile, code, True)
        if code.skips:
            if _any(counted):
                state = _updated_states(state, _similarity_tile(x, y, tile, rows, columns, code), counted, tile, code)
        else:
            state = _updated_states(state, _similarity_tile(x, y, tile, rows, columns, code), counted, tile, code)
    for k in tl.static_range(len(code.reductions)):
        for which in tl.static_range(3):
            tl.store(states + _offset(anchors, head, i, k, which, code), state[k][which], mask=inside)


@_jit
def _updated_states(state: tl.tuple, s: tl.tensor, counted: tl.tuple, tile: KernelTile, code: tl.constexpr) -> Any:
    """Return the state of every reduction after a tile."""
    updated: tl.tuple = ()
    for k in tl.static_range(len(code.reductions)):
        largest, mass, total = state[k]
        counts = _reaching(counted[k], s, tile, k, code, True)
        if code.reductions[k].kind == "Count":
            total += tl.sum(counts.to(s.dtype), 1)
        elif code.reductions[k].kind == "Mean":
            weight = tl.where(counts, _argument(tile, 0, k, code, True), 0.0)
            mass += tl.sum(weight, 1)
            total += tl.sum(weight * s, 1)
        elif code.reductions[k].kind == "SoftplusSum":
            total += tl.sum(tl.where(counts, _softplus(_logit(s, tile, k, code, True)), 0.0), 1)
        else:
            logit = tl.where(counts, _logit(s, tile, k, code, True), -float("inf"))
            new_largest = tl.maximum(largest, tl.max(logit, 1))
            finite = tl.where(new_largest == -float("inf"), 0.0, new_largest)
            fade, e = tl.exp(largest - finite), tl.exp(logit - finite[:, None])
            mass = mass * fade + tl.sum(e, 1)
            if code.reductions[k].kind != "LogSumExp":
                total = total * fade + tl.sum(e * s, 1)
            largest = new_largest
        updated += ((largest, mass, total),)
    return updated


@_jit
def _gradient_kernel(
    own: Vectors,
    other: Vectors,
    output: Vectors,
    anchors: Side,
    candidates: Side,
    to_anchors: tl.tensor,
    to_candidates: tl.tensor,
    first_head: int,
    code: tl.constexpr,
) -> None:
    """Write the gradient of a block of own vectors, which are anchors of the others, their candidates, or both.

    (2, K, H, N) `to_anchors` and (2, K, H, M) `to_candidates` are the gradients of factors and addends, per row.
    """
    head, rows = first_head + tl.program_id(2), tl.program_id(0) * code.size + tl.arange(0, code.size)
    begin = tl.program_id(1) * code.chunk
    number = anchors.numbers.dtype.element_ty
    gradient = tl.zeros([code.size, code.chunk], number)
    sums: tl.tuple = ()
    for _ in tl.static_range(len(code.reductions)):
        sums += ((tl.zeros([code.size], number), tl.zeros([code.size], number)),)
    for start in range(0, other.size, code.size):
        columns = start + tl.arange(0, code.size)
        as_anchors = KernelTile(anchors, candidates, head, anchors.first + rows, candidates.first + columns)
        as_candidates = KernelTile(anchors, candidates, head, anchors.first + columns, candidates.first + rows)
        counts = not code.skips
        if code.skips and code.as_anchor:
            counts = _any(_counted(as_anchors, code, True))
        if code.skips and code.as_candidate:
            counts = counts | _any(_counted(as_candidates, code, False))
        if counts:
            s = _similarity_tile(own, other, as_anchors, rows, columns, code)
            g = tl.zeros_like(s)
            if code.as_anchor:
                g, sums = _add_derivatives(g, sums, s, as_anchors, code, True)
            if code.as_candidate:
                g, sums = _add_derivatives(g, sums, s, as_candidates, code, False)
            if code.writes:
                z = _load_vectors(other, head, columns, begin, code.chunk, code)
                gradient = tl.dot(g.to(z.dtype), z, gradient, input_precision=code.precision, out_dtype=number)
    if code.writes:
        d = begin + tl.arange(0, code.chunk)
        place = output.z + head * output.head + rows.to(tl.int64)[:, None] * output.row + d[None, :]
        _add_to(place, gradient, (rows < output.size)[:, None] & (d < code.dims)[None, :])
    # The sums are the same for all chunks of the coordinates.
    if tl.program_id(1) == 0:
        for k in tl.static_range(len(code.reductions)):
            for which in tl.static_range(2):
                if code.reductions[k].learns[which] and code.reductions[k].sides[which] == "anchor" and code.as_anchor:
                    _add_sum(to_anchors, sums[k][which], anchors, head, rows, k, which, code)
                if (
                    code.reductions[k].learns[which]
                    and code.reductions[k].sides[which] == "candidate"
                    and code.as_candidate
                ):
                    _add_sum(to_candidates, sums[k][which], candidates, head, rows, k, which, code)


@_jit
def _add_derivatives(
    g: tl.tensor, sums: tl.tuple, s: tl.tensor, tile: KernelTile, code: tl.constexpr, anchor_rows: tl.constexpr
) -> Any:
    """Add dL/ds of every reduction to a tile, and the sums of its rows to the gradients of the rows' arguments.

    The derivatives are those of `formulas`; `anchor_rows` is True if the tile's rows are anchors, False if its columns.
    """
    counted = _counted(tile, code, anchor_rows)
    updated: tl.tuple = ()
    for k in tl.static_range(len(code.reductions)):
        counts = _reaching(counted[k], s, tile, k, code, anchor_rows)
        upstream = _of_anchors(tile, 3, k, code, anchor_rows)
        if code.reductions[k].kind == "Mean":
            per_mass = tl.where(counts, upstream, 0.0)
            g += per_mass * _argument(tile, 0, k, code, anchor_rows)
            to_factor, to_addend = per_mass * (s - _of_anchors(tile, 5, k, code, anchor_rows)), per_mass
        else:
            logit = _logit(s, tile, k, code, anchor_rows)
            if code.reductions[k].kind == "SoftplusSum":
                to_logit = tl.where(counts, upstream * tl.sigmoid(logit), 0.0)
            else:
                normaliser = _of_anchors(tile, 4, k, code, anchor_rows)
                to_logit = upstream * tl.exp(tl.where(counts, logit - normaliser, -float("inf")))
            if code.reductions[k].kind == "SoftMean" or code.reductions[k].kind == "SoftMean detached":
                g += to_logit
                to_logit *= s - _of_anchors(tile, 5, k, code, anchor_rows)
            if code.reductions[k].kind == "SoftMean detached":
                to_logit *= 0.0
            g += to_logit * _argument(tile, 0, k, code, anchor_rows)
            to_factor, to_addend = to_logit * s, to_logit
        of_factor, of_addend = sums[k]
        if code.reductions[k].learns[0] and (code.reductions[k].sides[0] == "anchor") == anchor_rows:
            of_factor += tl.sum(to_factor, 1)
        if code.reductions[k].learns[1] and (code.reductions[k].sides[1] == "anchor") == anchor_rows:
            of_addend += tl.sum(to_addend, 1)
        updated += ((of_factor, of_addend),)
    return g, updated


@_jit
def _counted(tile: KernelTile, code: tl.constexpr, anchor_rows: tl.constexpr) -> Any:
    """Return for each reduction which pairs of a tile count by their identities, as in `layout.relation`."""
    same_sample = _load_identity(tile.anchors, 0, tile.i, anchor_rows) == _load_identity(
        tile.candidates, 0, tile.j, not anchor_rows
    )
    same_group = _load_identity(tile.anchors, 1, tile.i, anchor_rows) == _load_identity(
        tile.candidates, 1, tile.j, not anchor_rows
    )
    same_view = _load_identity(tile.anchors, 2, tile.i, anchor_rows) == _load_identity(
        tile.candidates, 2, tile.j, not anchor_rows
    )
    remembered = _load_identity(tile.candidates, 3, tile.j, not anchor_rows) != 0
    excluded = same_sample & (same_view | remembered)
    if code.across:
        excluded = excluded | same_view
    counted: tl.tuple = ()
    for k in tl.static_range(len(code.reductions)):
        counts = ~excluded
        if code.reductions[k].over == "positive":
            counts = counts & same_group
        if code.reductions[k].over == "negative" or code.reductions[k].over == "remembered":
            counts = counts & ~same_group
        if code.reductions[k].over == "remembered":
            counts = counts & remembered
        present = _load_present(tile.anchors, k, tile.i, anchor_rows) & _load_present(
            tile.candidates, k, tile.j, not anchor_rows
        )
        counted += (counts & present,)
    return counted


@_jit
def _any(counted: tl.tuple) -> Any:
    """True if any pair of a tile counts."""
    found = counted[0]
    for k in tl.static_range(1, len(counted)):
        found = found | counted[k]
    return tl.max(tl.max(found.to(tl.int32), 1), 0) > 0


@_jit
def _reaching(
    counts: tl.tensor, s: tl.tensor, tile: KernelTile, k: tl.constexpr, code: tl.constexpr, anchor_rows: tl.constexpr
) -> Any:
    """Return which of the counted pairs reach the threshold."""
    if code.reductions[k].above:
        counts = counts & (s >= _of_anchors(tile, 2, k, code, anchor_rows))
    return counts


@_jit
def _logit(s: tl.tensor, tile: KernelTile, k: tl.constexpr, code: tl.constexpr, anchor_rows: tl.constexpr) -> Any:
    """Return factor * s + addend."""
    logit = _argument(tile, 0, k, code, anchor_rows) * s
    if code.reductions[k].sides[1] != "none":
        logit += _argument(tile, 1, k, code, anchor_rows)
    return logit


@_jit
def _argument(
    tile: KernelTile, which: tl.constexpr, k: tl.constexpr, code: tl.constexpr, anchor_rows: tl.constexpr
) -> Any:
    """Return the factor (0) or the addend (1) of a reduction."""
    if code.reductions[k].sides[which] == "anchor":
        found = _of_anchors(tile, which, k, code, anchor_rows)
    else:
        place = tile.candidates.numbers + _offset(tile.candidates, tile.head, tile.j, k, which, code)
        found = _broadcast(tl.load(place, mask=tile.j < tile.candidates.stop, other=0), not anchor_rows)
    return found


@_jit
def _of_anchors(
    tile: KernelTile, which: tl.constexpr, k: tl.constexpr, code: tl.constexpr, anchor_rows: tl.constexpr
) -> Any:
    """Return a number per anchor."""
    place = tile.anchors.numbers + _offset(tile.anchors, tile.head, tile.i, k, which, code)
    return _broadcast(tl.load(place, mask=tile.i < tile.anchors.stop, other=0), anchor_rows)


@_jit
def _offset(
    side: Side, head: tl.tensor, at: tl.tensor, k: tl.constexpr, which: tl.constexpr, code: tl.constexpr
) -> Any:
    """Return the offset of [which, k, head, at] in (W, K, H, total)."""
    return ((which * len(code.reductions) + k) * side.heads + head) * side.total + at


@_jit
def _load_identity(side: Side, which: tl.constexpr, at: tl.tensor, of_rows: tl.constexpr) -> Any:
    return _broadcast(tl.load(side.identity + which * side.total + at, mask=at < side.stop, other=0), of_rows)


@_jit
def _load_present(side: Side, k: tl.constexpr, at: tl.tensor, of_rows: tl.constexpr) -> Any:
    return _broadcast(tl.load(side.present + k * side.total + at, mask=at < side.stop, other=0) != 0, of_rows)


@_jit
def _broadcast(values: tl.tensor, of_rows: tl.constexpr) -> Any:
    """Return numbers per row of a tile (`of_rows`) or per column, to be broadcast over it."""
    if of_rows:  # noqa: SIM108 - Triton evaluates only an `if` statement at compile time
        broadcast = values[:, None]
    else:
        broadcast = values[None, :]
    return broadcast


@_jit
def _similarity_tile(
    own: Vectors, other: Vectors, tile: KernelTile, rows: tl.tensor, columns: tl.tensor, code: tl.constexpr
) -> Any:
    """Return a tile of inner products."""
    number = tile.anchors.numbers.dtype.element_ty
    s = tl.zeros([code.size, code.size], number)
    if code.reads:
        for begin in range(0, code.dims, code.step):
            a = _load_vectors(own, tile.head, rows, begin, code.step, code)
            b = _load_vectors(other, tile.head, columns, begin, code.step, code)
            s = tl.dot(a, tl.trans(b), s, input_precision=code.precision, out_dtype=number)
    return s


@_jit
def _load_vectors(
    of: Vectors, head: tl.tensor, rows: tl.tensor, begin: tl.tensor, width: tl.constexpr, code: tl.constexpr
) -> Any:
    """Return a chunk of the coordinates of some vectors, 0 beyond the last row or coordinate."""
    d = begin + tl.arange(0, width)
    place = of.z + head * of.head + rows.to(tl.int64)[:, None] * of.row + d[None, :]
    return tl.load(place, mask=(rows < of.size)[:, None] & (d < code.dims)[None, :], other=0)


@_jit
def _add_to(place: tl.tensor, values: tl.tensor, inside: tl.tensor) -> None:
    tl.store(place, tl.load(place, mask=inside, other=0) + values, mask=inside)


@_jit
def _add_sum(
    to: tl.tensor,
    values: tl.tensor,
    side: Side,
    head: tl.tensor,
    rows: tl.tensor,
    k: tl.constexpr,
    which: tl.constexpr,
    code: tl.constexpr,
) -> None:
    """Add the gradients of an argument for a block of rows."""
    at = side.first + rows
    _add_to(to + _offset(side, head, at, k, which, code), values, at < side.stop)


@_jit
def _softplus(x: tl.tensor) -> Any:
    """Return max(x, 0) + log(1 + e^-|x|); log(1 + e) = 2 artanh(w) with w = e / (2 + e) <= 1/3 keeps a small e."""
    e = tl.exp(-tl.abs(x))
    w = e / (2.0 + e)
    terms: tl.constexpr = 17 if x.dtype == tl.float64 else 8
    series = tl.zeros_like(w)
    for n in tl.static_range(terms):
        series = series * (w * w) + 1.0 / (2 * (terms - n) - 1)
    return tl.maximum(x, 0.0) + 2.0 * w * series
