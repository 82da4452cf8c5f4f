"""The row reductions as two Triton kernels, which read identities instead of masks and write a few numbers per row.

`_rows` loops over all candidates for a block of anchors and keeps three running numbers for each reduction: the largest
exponent m, the mass sum_j e^(x_ij - m) and the total sum_j e^(x_ij - m) s_ij. `_gradient` computes the similarities
again, forms G_ij = dL/ds_ij from the derivatives of `formulas`, and computes dX = G Y; with the roles exchanged,
dY = G^T X; where the anchors are the candidates it forms G + G^T at once, so that two sweeps cost 6 N^2 D instead of
10 N^2 D. A program writes rows of its own only, hence no atomics and the same bits in every run.
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
except ImportError:  # the package serves CPUs without Triton
    triton = None

INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)
"""Whether TRITON_INTERPRET=1 stood when this was imported: the kernels then run on the CPU, for tests."""
AT_ONCE = 4
"""Reductions that share a sweep: each has its own code in the kernel, and its own registers."""
SIZE = 64
"""Rows and columns of a tile."""
CHUNK = 128
"""Coordinates of a gradient that a program makes: with 8 warps, all that it keeps finds room in registers."""


def _jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


class Vectors(NamedTuple):
    """Vectors in memory: where, the steps from head to head and from row to row, and how many rows."""

    z: Any
    head: int
    row: int
    size: int


class Known(NamedTuple):
    """What the anchors, or the candidates of one sweep, are known by.

    Args:
        identity: (4, total) int32: sample, group, view, and whether remembered.
        present: (K, total) bool, who takes part in each of K reductions.
        numbers: (W, K, H, total), W: factor and addend of the exponent; of anchors besides: the threshold,
            dL/d(reduction), the normaliser, the reduction.
        heads: H.
        first: where those of this sweep start.
        stop: where they end.
        total: how many there are in all.
    """

    identity: Any
    present: Any
    numbers: Any
    heads: int
    first: int
    stop: int
    total: int


class Tile(NamedTuple):
    """The anchors i and the candidates j that meet in a tile of one head."""

    anchors: Any
    candidates: Any
    head: Any
    i: Any
    j: Any


class Term(NamedTuple):
    """One reduction as far as it is code; its numbers stand in `Known`.

    Args:
        kind: the name of its class; "SoftMean detached" for that.
        over: the relation.
        above: whether it has a threshold.
        sides: whose its factor (the scale; a mean's weight) and its addend (log_weight or bias) are: "anchor", also
            for a number, "candidate", or "none" for no addend.
        learns: whether gradients of the two are wanted.
    """

    kind: str
    over: str
    above: bool
    sides: tuple[str, str]
    learns: tuple[bool, bool]


class Code(NamedTuple):
    """What a kernel is compiled for.

    Args:
        asked: the reductions.
        across: whether only candidates of another view count.
        skips: whether to pass over tiles in which nothing counts.
        reads: whether the forward pass needs the similarities.
        as_anchor: whether the gradient is that of anchors,
        as_candidate: that of candidates, or both.
        writes: whether vectors have a gradient, or arguments only.
        dims: D.
        chunk: how many coordinates of the gradient a program makes.
        step: how many coordinates of a similarity are multiplied at a time.
        size: rows and columns of a tile.
        precision: of the products, in Triton's words.
    """

    asked: tuple[Term, ...]
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
    """One sweep on CUDA for some of the reductions.

    Args:
        work: the reductions, and the vectors as the kernels want them.
        size: rows and columns of a tile, a power of two from 16 on.
    """

    def __init__(self, work: KernelCall, size: int = SIZE) -> None:
        self.work, self.asked = work, work.asked
        self.heads, self.dims = math.prod(work.heads), work.x.shape[-1]
        # As in torch's own products: "highest" is float32, "high" tf32, "medium" bfloat16 with float32 sums.
        knob = torch.get_float32_matmul_precision() if work.x.dtype == torch.float32 else "highest"
        self.precision = "tf32" if knob == "high" else "ieee"
        self.dtype = torch.bfloat16 if knob == "medium" else work.x.dtype
        self.size = size

    @staticmethod
    def available(device: torch.device) -> bool:
        """True if Triton is installed and serves this device; the CPU only in Triton's interpreter."""
        if triton is None or INTERPRETED:
            return INTERPRETED
        return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)

    @staticmethod
    def accepts(layout: Layout, asked: Reduction) -> bool:
        """True if a reduction has numbers and vectors for arguments, and identities alone for its relation."""
        if not isinstance(asked, LogSumExp | Mean | SoftMean | SoftplusSum | Count):
            return False
        if any(isinstance(value, nn.Module | str) for value in arguments(asked).values()):
            return False
        if layout.rules and asked.over != "positive":
            return False
        vectors, heads = layout.vectors, layout.heads
        # Triton (3.8) has no product of float64 whose operand was just computed.
        if vectors[0].dtype != torch.float32 and not INTERPRETED:
            return False
        # A kernel counts in floating point.
        exact = not isinstance(asked, Count) or layout.candidate_count <= 2 / torch.finfo(vectors[0].dtype).eps
        return exact and all(len(part.z.shape[:-2]) == len(heads) for part in layout.anchors)

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the reductions, (N,) or (H, N) each, and a normaliser of each for the backward pass."""
        closed: list[tuple[Tensor, Tensor]] = []
        x = self._vectors(self.work.x)
        for places in _batches(range(len(self.asked))):
            anchors, candidates = self._known(places)
            states = self.work.x.new_zeros(3, len(places), self.heads, x.size)
            states[0] = -torch.inf
            for y, met, _ in self._sweeps(candidates):
                grid = (_blocks(x.size, self.size), self.heads)
                self._launch(_rows, grid, (x, y, anchors, met, states), self._code(places))
            closed += [self._close(self.asked[place], states[:, k]) for k, place in enumerate(places)]
        return [output for output, _ in closed], [normaliser for _, normaliser in closed]

    def _close(self, asked: Any, of_state: Tensor) -> tuple[Tensor, Tensor]:
        sums: Any = formula(asked, None, self.work.zeros)
        largest, mass, total = (values.reshape(self.work.zeros.shape) for values in of_state)
        sums.largest, sums.mass, sums.total = largest, mass, total
        if isinstance(asked, Count | SoftplusSum):
            sums.mass = total.to(sums.mass.dtype if isinstance(asked, SoftplusSum) else torch.int64)
        output, normaliser = sums.finish()
        return output, normaliser

    def backward(
        self, outputs: Sequence[Tensor], saved: Sequence[Tensor], upstream: Sequence[Tensor], into: KernelGradients
    ) -> None:
        """Add the gradients, from the similarities computed again."""
        work, x = self.work, self._vectors(self.work.x)
        for places in _batches([place for place, asked in enumerate(self.asked) if not isinstance(asked, Count)]):
            # A mean's upstream gradient is divided by its mass here, once for all pairs.
            mass = [saved[place] if isinstance(self.asked[place], Mean) else 1 for place in places]
            given = [(upstream[place] / mass[k], saved[place], outputs[place]) for k, place in enumerate(places)]
            anchors, candidates = self._known(places, given)
            sums = [work.x.new_zeros(2, len(places), self.heads, known.total) for known in (anchors, candidates)]
            code = self._code(places)
            learned = {side for term in code.asked for side in itertools.compress(term.sides, term.learns)}
            for y, met, part in self._sweeps(candidates):
                known = (anchors, met, *sums)
                if part is None:
                    self._add(into.anchor, x, x, known, code)
                    continue
                if into.anchor is not None or "anchor" in learned:
                    self._add(into.anchor, x, y, known, code._replace(as_candidate=False))
                if into.parts[part] is not None or "candidate" in learned:
                    self._add(into.parts[part], y, x, known, code._replace(as_anchor=False))
            for k, place in enumerate(places):
                self._add_arguments(place, code.asked[k], [side[:, k] for side in sums], into)

    def _add(self, to: Tensor | None, own: Vectors, other: Vectors, known: tuple[Any, ...], code: Code) -> None:
        """Add the gradient of own vectors, if it is wanted, and those of arguments."""
        # Where heads share a gradient, they take turns.
        together = 1 if to is not None and to.ndim == 2 else self.heads
        made = None if to is None else to.new_zeros(together, *to.shape[-2:])
        chunks = 1 if made is None else max(1, _blocks(code.dims, code.chunk))
        grid = (_blocks(own.size, code.size), chunks, together)
        place = own if made is None else _strided(made)
        for head in range(0, self.heads, together):
            given = (own, other, place, *known, head)
            self._launch(_gradient, grid, given, code._replace(writes=made is not None))
        if to is not None and made is not None:
            to += made.view(to.shape)

    def _add_arguments(self, place: int, term: Term, sums: list[Tensor], into: KernelGradients) -> None:
        for which, name in enumerate(_names(self.asked[place])):
            if not term.learns[which]:
                continue
            gradient = sums[0][which].unsqueeze(-1) if term.sides[which] == "anchor" else sums[1][which].unsqueeze(-2)
            to_argument = into.arguments[place, name]
            assert to_argument is not None
            gradient = gradient.squeeze(-1) if name == "bias" else gradient
            to_argument += gradient.sum_to_size(to_argument.shape) if gradient.ndim >= to_argument.ndim else gradient

    def _code(self, places: Sequence[int]) -> Code:
        """Return what the kernels are compiled for."""
        asked = tuple(self._term(place) for place in places)
        # To ask whether anything in a tile counts pays where many tiles are empty.
        few = all(term.over in ("positive", "remembered") for term in asked)
        wide = max(16, triton.next_power_of_2(self.dims))
        return Code(
            asked=asked,
            across=self.work.layout.across,
            skips=few or self.work.layout.across,
            reads=any(term.kind != "Count" or term.above for term in asked),
            as_anchor=True,
            as_candidate=True,
            writes=True,
            dims=self.dims,
            chunk=min(CHUNK, wide),
            # Products of float32 run outside the tensor cores and hold a whole step in registers.
            step=min(16 if self.precision == "ieee" and self.dtype == torch.float32 else 32, wide),
            size=self.size,
            precision=self.precision,
        )

    def _term(self, place: int) -> Term:
        """Return what the code of the kernels depends on."""
        asked = self.asked[place]
        detached = isinstance(asked, SoftMean) and asked.detach
        (factor, addend), names, wanted = _arguments(asked), _names(asked), self.work.learned
        return Term(
            kind="SoftMean detached" if detached else type(asked).__name__,
            over=asked.over,
            above=getattr(asked, "above", None) is not None,
            sides=(_side(factor), "none" if addend is None else _side(addend)),
            learns=((place, names[0]) in wanted, (place, names[1]) in wanted),
        )

    def _known(self, places: Sequence[int], given: Sequence[tuple[Tensor, ...]] | None = None) -> tuple[Known, Known]:
        """Return what the anchors and all candidates are known by, with the coefficients of the backward pass."""
        layout, new, count = self.work.layout, self.work.x.new_zeros, len(places)
        of_anchors, of_candidates = self.work.numbered
        rows, columns = of_anchors.shape[1], of_candidates.shape[1]
        of_rows, of_columns = new(6, count, self.heads, rows), new(2, count, self.heads, columns)
        present = (layout.anchor.view != PADDING).repeat(count, 1), (layout.candidate.view != PADDING).repeat(count, 1)
        for k, place in enumerate(places):
            asked = self.asked[place]
            for which, value in enumerate(_arguments(asked)):
                if isinstance(value, Tensor) and _side(value) == "candidate":
                    of_columns[which, k] = value.reshape(*value.shape[:-2], columns)
                elif isinstance(value, Tensor):
                    value = value.expand(self.heads, rows, 1) if value.ndim else value.expand(1, rows, 1)
                    of_rows[which, k] = value.squeeze(-1)
                elif value is not None:
                    of_rows[which, k] = value
            for which, values in enumerate((getattr(asked, "above", None), *(given[k] if given else ())), start=2):
                if values is not None and values.numel():  # a sum of softplus has no normaliser
                    of_rows[which, k] = values
            if asked.among is not None:
                present[1][k] &= asked.among
            if asked.rows is not None:
                present[0][k] &= asked.rows
        return (
            Known(of_anchors, present[0], of_rows, self.heads, 0, rows, rows),
            Known(of_candidates, present[1], of_columns, self.heads, 0, columns, columns),
        )

    def _sweeps(self, candidates: Known) -> Iterator[tuple[Vectors, Known, int | None]]:
        """Loop over the parts: vectors, what they are known by, which part; None for the anchors themselves."""
        work = self.work
        parts: list[tuple[Tensor, int | None]] = [(work.x, None)] if work.mirrored else []
        parts += [(part, k) for k, part in enumerate(work.parts) if k >= work.mirrored]
        for z, k in parts:
            y = self._vectors(z)
            first = 0 if k is None else work.starts[k]
            if y.size and work.x.shape[-2] and self.heads:
                yield y, candidates._replace(first=first, stop=first + y.size), k

    def _vectors(self, z: Tensor) -> Vectors:
        z = z.to(self.dtype)
        if INTERPRETED and self.dtype == torch.bfloat16:
            # The interpreter multiplies the bits of bfloat16; rounded float32 are the same numbers.
            z = z.float()
        return _strided(z if z.stride(-1) == 1 else z.contiguous())

    def _launch(self, kernel: Any, grid: tuple[int, ...], given: tuple[Any, ...], code: Code) -> None:
        device = self.work.x.device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[grid](*given, code=code, num_warps=8 if code.size >= SIZE else 4, num_stages=2)


def _batches(places: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(places), AT_ONCE):
        yield places[start : start + AT_ONCE]


def _blocks(length: int, size: int) -> int:
    return -(-length // size)


def _strided(z: Tensor) -> Vectors:
    """Return (N, D) or (H, N, D) as they lie in memory; (N, D) serve all heads."""
    return Vectors(z, z.stride(0) if z.ndim == 3 and len(z) > 1 else 0, z.stride(-2), z.shape[-2])


def _arguments(asked: Any) -> tuple[Any, Any]:
    """Return the factor and the addend of a reduction; a number, (..., N or 1, M or 1), or None for no addend."""
    if isinstance(asked, Mean):
        return 1.0 if asked.weight is None else asked.weight, None
    if isinstance(asked, SoftplusSum):
        bias = asked.bias
        return asked.scale, bias.unsqueeze(-1) if isinstance(bias, Tensor) and bias.ndim else bias
    return getattr(asked, "scale", 1.0), getattr(asked, "log_weight", None)


def _names(asked: Any) -> tuple[str, str]:
    """Return the names of the two."""
    return "weight" if isinstance(asked, Mean) else "scale", "bias" if isinstance(asked, SoftplusSum) else "log_weight"


def _side(value: Any) -> str:
    """Return which side an argument belongs to: "candidate" where it spans M, else "anchor", also for a number."""
    return "candidate" if isinstance(value, Tensor) and value.ndim and value.shape[-1] != 1 else "anchor"


@_jit
def _rows(x: Vectors, y: Vectors, anchors: Known, candidates: Known, states: tl.tensor, code: tl.constexpr) -> None:
    """Carry the states (3, K, H, N) of a block of anchors on over the candidates of one sweep.

    A state is the largest exponent m, the mass sum_j e^(x_ij - m), and the total that belongs to the mass.
    """
    head, rows = tl.program_id(1), tl.program_id(0) * code.size + tl.arange(0, code.size)
    i = anchors.first + rows
    inside = i < anchors.stop
    state: tl.tuple = ()
    for k in tl.static_range(len(code.asked)):
        largest = tl.load(states + _place(anchors, head, i, k, 0, code), mask=inside, other=0)
        mass = tl.load(states + _place(anchors, head, i, k, 1, code), mask=inside, other=0)
        total = tl.load(states + _place(anchors, head, i, k, 2, code), mask=inside, other=0)
        state += ((largest, mass, total),)
    for start in range(0, y.size, code.size):
        columns = start + tl.arange(0, code.size)
        tile = Tile(anchors, candidates, head, i, candidates.first + columns)
        counted = _counted(tile, code, True)
        if code.skips:
            if _any(counted):
                state = _further(state, _similarity(x, y, tile, rows, columns, code), counted, tile, code)
        else:
            state = _further(state, _similarity(x, y, tile, rows, columns, code), counted, tile, code)
    for k in tl.static_range(len(code.asked)):
        for which in tl.static_range(3):
            tl.store(states + _place(anchors, head, i, k, which, code), state[k][which], mask=inside)


@_jit
def _further(state: tl.tuple, s: tl.tensor, counted: tl.tuple, tile: Tile, code: tl.constexpr) -> Any:
    """Take a tile into the state of every reduction."""
    made: tl.tuple = ()
    for k in tl.static_range(len(code.asked)):
        largest, mass, total = state[k]
        counts = _reaching(counted[k], s, tile, k, code, True)
        if code.asked[k].kind == "Count":
            total += tl.sum(counts.to(s.dtype), 1)
        elif code.asked[k].kind == "Mean":
            weight = tl.where(counts, _argument(tile, 0, k, code, True), 0.0)
            mass += tl.sum(weight, 1)
            total += tl.sum(weight * s, 1)
        elif code.asked[k].kind == "SoftplusSum":
            total += tl.sum(tl.where(counts, _softplus(_logit(s, tile, k, code, True)), 0.0), 1)
        else:
            logit = tl.where(counts, _logit(s, tile, k, code, True), -float("inf"))
            reached = tl.maximum(largest, tl.max(logit, 1))
            finite = tl.where(reached == -float("inf"), 0.0, reached)
            fade, e = tl.exp(largest - finite), tl.exp(logit - finite[:, None])
            mass = mass * fade + tl.sum(e, 1)
            if code.asked[k].kind != "LogSumExp":
                total = total * fade + tl.sum(e * s, 1)
            largest = reached
        made += ((largest, mass, total),)
    return made


@_jit
def _gradient(
    own: Vectors,
    other: Vectors,
    made: Vectors,
    anchors: Known,
    candidates: Known,
    to_anchors: tl.tensor,
    to_candidates: tl.tensor,
    first_head: int,
    code: tl.constexpr,
) -> None:
    """Add the gradient of a block of own vectors, which are anchors of the others, their candidates, or both.

    (2, K, H, N) `to_anchors` and (2, K, H, M) `to_candidates` are the gradients of factors and addends, row by row.
    """
    head, rows = first_head + tl.program_id(2), tl.program_id(0) * code.size + tl.arange(0, code.size)
    begin = tl.program_id(1) * code.chunk
    number = anchors.numbers.dtype.element_ty
    gradient = tl.zeros([code.size, code.chunk], number)
    sums: tl.tuple = ()
    for _ in tl.static_range(len(code.asked)):
        sums += ((tl.zeros([code.size], number), tl.zeros([code.size], number)),)
    for start in range(0, other.size, code.size):
        columns = start + tl.arange(0, code.size)
        down = Tile(anchors, candidates, head, anchors.first + rows, candidates.first + columns)
        along = Tile(anchors, candidates, head, anchors.first + columns, candidates.first + rows)
        wanted = not code.skips
        if code.skips and code.as_anchor:
            wanted = _any(_counted(down, code, True))
        if code.skips and code.as_candidate:
            wanted = wanted | _any(_counted(along, code, False))
        if wanted:
            s = _similarity(own, other, down, rows, columns, code)
            g = tl.zeros_like(s)
            if code.as_anchor:
                g, sums = _shares(g, sums, s, down, code, True)
            if code.as_candidate:
                g, sums = _shares(g, sums, s, along, code, False)
            if code.writes:
                z = _vectors(other, head, columns, begin, code.chunk, code)
                gradient = tl.dot(g.to(z.dtype), z, gradient, input_precision=code.precision, out_dtype=number)
    if code.writes:
        d = begin + tl.arange(0, code.chunk)
        place = made.z + head * made.head + rows.to(tl.int64)[:, None] * made.row + d[None, :]
        _add_to(place, gradient, (rows < made.size)[:, None] & (d < code.dims)[None, :])
    # Every chunk of the coordinates has the same sums.
    if tl.program_id(1) == 0:
        for k in tl.static_range(len(code.asked)):
            for which in tl.static_range(2):
                if code.asked[k].learns[which] and code.asked[k].sides[which] == "anchor" and code.as_anchor:
                    _add_sum(to_anchors, sums[k][which], anchors, head, rows, k, which, code)
                if code.asked[k].learns[which] and code.asked[k].sides[which] == "candidate" and code.as_candidate:
                    _add_sum(to_candidates, sums[k][which], candidates, head, rows, k, which, code)


@_jit
def _shares(g: tl.tensor, sums: tl.tuple, s: tl.tensor, tile: Tile, code: tl.constexpr, down: tl.constexpr) -> Any:
    """Add dL/ds of every reduction to a tile, and the sums of its rows to those of the arguments that are theirs.

    The derivatives are those of `formulas`; `down` says that the tile's rows are anchors, else its columns.
    """
    counted = _counted(tile, code, down)
    made: tl.tuple = ()
    for k in tl.static_range(len(code.asked)):
        counts = _reaching(counted[k], s, tile, k, code, down)
        upstream = _of_anchors(tile, 3, k, code, down)
        if code.asked[k].kind == "Mean":
            per_mass = tl.where(counts, upstream, 0.0)
            g += per_mass * _argument(tile, 0, k, code, down)
            to_factor, to_addend = per_mass * (s - _of_anchors(tile, 5, k, code, down)), per_mass
        else:
            logit = _logit(s, tile, k, code, down)
            if code.asked[k].kind == "SoftplusSum":
                to_logit = tl.where(counts, upstream * tl.sigmoid(logit), 0.0)
            else:
                normaliser = _of_anchors(tile, 4, k, code, down)
                to_logit = upstream * tl.exp(tl.where(counts, logit - normaliser, -float("inf")))
            if code.asked[k].kind == "SoftMean" or code.asked[k].kind == "SoftMean detached":
                g += to_logit
                to_logit *= s - _of_anchors(tile, 5, k, code, down)
            if code.asked[k].kind == "SoftMean detached":
                to_logit *= 0.0
            g += to_logit * _argument(tile, 0, k, code, down)
            to_factor, to_addend = to_logit * s, to_logit
        of_factor, of_addend = sums[k]
        if code.asked[k].learns[0] and (code.asked[k].sides[0] == "anchor") == down:
            of_factor += tl.sum(to_factor, 1)
        if code.asked[k].learns[1] and (code.asked[k].sides[1] == "anchor") == down:
            of_addend += tl.sum(to_addend, 1)
        made += ((of_factor, of_addend),)
    return g, made


@_jit
def _counted(tile: Tile, code: tl.constexpr, down: tl.constexpr) -> Any:
    """Return for each reduction which pairs of a tile count by their identities, as `layout.relation` does."""
    same_sample = _identity(tile.anchors, 0, tile.i, down) == _identity(tile.candidates, 0, tile.j, not down)
    same_group = _identity(tile.anchors, 1, tile.i, down) == _identity(tile.candidates, 1, tile.j, not down)
    same_view = _identity(tile.anchors, 2, tile.i, down) == _identity(tile.candidates, 2, tile.j, not down)
    remembered = _identity(tile.candidates, 3, tile.j, not down) != 0
    left_out = same_sample & (same_view | remembered)
    if code.across:
        left_out = left_out | same_view
    made: tl.tuple = ()
    for k in tl.static_range(len(code.asked)):
        counts = ~left_out
        if code.asked[k].over == "positive":
            counts = counts & same_group
        if code.asked[k].over == "negative" or code.asked[k].over == "remembered":
            counts = counts & ~same_group
        if code.asked[k].over == "remembered":
            counts = counts & remembered
        present = _present(tile.anchors, k, tile.i, down) & _present(tile.candidates, k, tile.j, not down)
        made += (counts & present,)
    return made


@_jit
def _any(counted: tl.tuple) -> Any:
    """True if any pair of a tile counts."""
    found = counted[0]
    for k in tl.static_range(1, len(counted)):
        found = found | counted[k]
    return tl.max(tl.max(found.to(tl.int32), 1), 0) > 0


@_jit
def _reaching(
    counts: tl.tensor, s: tl.tensor, tile: Tile, k: tl.constexpr, code: tl.constexpr, down: tl.constexpr
) -> Any:
    """Return those of the counting pairs whose similarity reaches the threshold."""
    if code.asked[k].above:
        counts = counts & (s >= _of_anchors(tile, 2, k, code, down))
    return counts


@_jit
def _logit(s: tl.tensor, tile: Tile, k: tl.constexpr, code: tl.constexpr, down: tl.constexpr) -> Any:
    """Return factor * s + addend."""
    logit = _argument(tile, 0, k, code, down) * s
    if code.asked[k].sides[1] != "none":
        logit += _argument(tile, 1, k, code, down)
    return logit


@_jit
def _argument(tile: Tile, which: tl.constexpr, k: tl.constexpr, code: tl.constexpr, down: tl.constexpr) -> Any:
    """Return the factor (0) or the addend (1) of a reduction."""
    if code.asked[k].sides[which] == "anchor":
        found = _of_anchors(tile, which, k, code, down)
    else:
        place = tile.candidates.numbers + _place(tile.candidates, tile.head, tile.j, k, which, code)
        found = _spread(tl.load(place, mask=tile.j < tile.candidates.stop, other=0), not down)
    return found


@_jit
def _of_anchors(tile: Tile, which: tl.constexpr, k: tl.constexpr, code: tl.constexpr, down: tl.constexpr) -> Any:
    """Return a number of each anchor."""
    place = tile.anchors.numbers + _place(tile.anchors, tile.head, tile.i, k, which, code)
    return _spread(tl.load(place, mask=tile.i < tile.anchors.stop, other=0), down)


@_jit
def _place(
    known: Known, head: tl.tensor, at: tl.tensor, k: tl.constexpr, which: tl.constexpr, code: tl.constexpr
) -> Any:
    """Return where [which, k, head, at] stands in (W, K, H, total)."""
    return ((which * len(code.asked) + k) * known.heads + head) * known.total + at


@_jit
def _identity(known: Known, which: tl.constexpr, at: tl.tensor, down: tl.constexpr) -> Any:
    return _spread(tl.load(known.identity + which * known.total + at, mask=at < known.stop, other=0), down)


@_jit
def _present(known: Known, k: tl.constexpr, at: tl.tensor, down: tl.constexpr) -> Any:
    return _spread(tl.load(known.present + k * known.total + at, mask=at < known.stop, other=0) != 0, down)


@_jit
def _spread(values: tl.tensor, down: tl.constexpr) -> Any:
    """Return numbers of the rows of a tile (`down`), or of its columns, for all of it."""
    if down:  # noqa: SIM108 - the code of a kernel is chosen by `if` alone
        spread = values[:, None]
    else:
        spread = values[None, :]
    return spread


@_jit
def _similarity(
    own: Vectors, other: Vectors, tile: Tile, rows: tl.tensor, columns: tl.tensor, code: tl.constexpr
) -> Any:
    """Return a tile of inner products."""
    number = tile.anchors.numbers.dtype.element_ty
    s = tl.zeros([code.size, code.size], number)
    if code.reads:
        for begin in range(0, code.dims, code.step):
            a = _vectors(own, tile.head, rows, begin, code.step, code)
            b = _vectors(other, tile.head, columns, begin, code.step, code)
            s = tl.dot(a, tl.trans(b), s, input_precision=code.precision, out_dtype=number)
    return s


@_jit
def _vectors(
    of: Vectors, head: tl.tensor, rows: tl.tensor, begin: tl.tensor, width: tl.constexpr, code: tl.constexpr
) -> Any:
    """Return a chunk of the coordinates of some vectors, 0 beyond them."""
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
    known: Known,
    head: tl.tensor,
    rows: tl.tensor,
    k: tl.constexpr,
    which: tl.constexpr,
    code: tl.constexpr,
) -> None:
    """Add the gradients of an argument that belong to a block of rows."""
    at = known.first + rows
    _add_to(to + _place(known, head, at, k, which, code), values, at < known.stop)


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
