"""Reductions without the (N, M) matrix: a tile of similarities at a time, computed again in the backward pass.

A tile is x y^T for a block of anchors x and a block of candidates y, at most TILE rows and columns, so that it stays in
the processor's cache. The forward pass adds each tile to the sums of its rows (`formulas.Sums`). The backward pass
computes the tile again, forms G_ij = dL/ds_ij (`formulas.Derivative`), and adds G y to the gradient of the anchors and
G^T x to that of the candidates. Memory is O(N + M).

**Symmetric tiles.** Where the anchors are the first candidates, tile (j, i) is the transpose of tile (i, j). If every
argument is a number, only the tiles with i <= j are computed: row sums belong to the anchors i, column sums to the
anchors j, and G_ij + G_ji goes back at once. That halves the products.

**Candidates without gradient** (a queue, momentum keys, a frozen tower). For a single log-sum-exp over such candidates
G y = c_i sum_j b_ij y_j, where only c_i depends on what follows. The sum is computed in the forward pass, so that the
backward pass needs no tiles.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from contrast.core.embeddings import Embeddings
from contrast.core.reductions.formulas import Derivative, Sums, shift_of
from contrast.core.reductions.function import Gradients, Saved
from contrast.core.reductions.kinds import (
    Count,
    LogSumExp,
    Reduction,
    Relation,
    arguments,
    is_number,
    pair_functions,
    tensor_arguments,
    with_tensors,
)
from contrast.core.reductions.layout import Block, Layout, Listed, relation
from contrast.core.reductions.pair_functions import Evaluated, PairFunctions
from contrast.core.reductions.tile import ArgumentGradients, Tile

TILE = 512
"""Rows and columns of a tile: with its few copies it stays in the processor's cache."""
KEPT = 2**21
"""Similarities that the forward pass keeps for the backward pass, which saves computing these again."""


class Step(NamedTuple):
    """A tile to be computed: its block of anchors, its block of candidates, and the reductions that it serves.

    Args:
        i: the number of the block of anchors.
        j: the number of the block of candidates.
        serves: (number of the reduction, whether the rows are its anchors, whether the columns are too).
    """

    i: int
    j: int
    serves: list[tuple[int, bool, bool]]


class Grid:
    """The tiles of one pass.

    Args:
        layout: anchors and candidates.
        asked: the reductions.
        shifts: for each reduction what is subtracted from its exponents; None where these have no known bound.
        height: the rows of a tile.
        width: the columns of a tile.
    """

    def __init__(
        self, layout: Layout, asked: Sequence[Any], shifts: Sequence[float | None], height: int, width: int
    ) -> None:
        self.layout, self.asked, self.shifts = layout, asked, shifts
        self.rows = [block for run in layout.anchor_blocks for block in run.cut(height)]
        self.columns = [block for run in layout.candidate_blocks for block in run.cut(width)]
        self._listed: dict[str, dict[tuple[int, int], Tensor] | None] = {}
        masked = [(_covered(getattr(one, "rows", None), self.rows), _covered(one.among, self.columns)) for one in asked]
        self.masks_cut_blocks = any(None in side for sides in masked for side in sides)
        """True if `rows` or `among` of a reduction name a part of a block only."""
        numbers = all(value is None or is_number(value) for one in asked for value in arguments(one).values())
        thresholds = any(isinstance(one, Count) and one.above is not None for one in asked)
        self.symmetric = (
            layout.symmetric and numbers and not thresholds and not self.masks_cut_blocks
            and height == width and None not in shifts and not layout.rules
        )  # fmt: skip
        self.steps = list(self._steps(masked))

    def _steps(self, masked: Sequence[tuple[list[bool | None], list[bool | None]]]) -> Iterator[Step]:
        for i, j in itertools.product(range(len(self.rows)), range(len(self.columns))):
            both = self.symmetric and j < len(self.rows)
            if both and j < i:
                continue
            serves = []
            for number, (one, (rows, columns)) in enumerate(zip(self.asked, masked, strict=True)):
                counts = self._may_count(i, j, one.over)
                to_rows = counts and rows[i] is not False and columns[j] is not False
                to_columns = counts and both and i != j and bool(rows[j]) and bool(columns[i])
                if to_rows or to_columns:
                    serves.append((number, to_rows, to_columns))
            if serves:
                yield Step(i, j, serves)

    def _may_count(self, i: int, j: int, over: Relation) -> bool:
        if not self.layout.may_count(self.rows[i], self.columns[j], over):
            return False
        positives = self.listed("positive") if over == "positive" else None
        return positives is None or (i, j) in positives

    def listed(self, name: str) -> dict[tuple[int, int], Tensor] | None:
        """Return the listed pairs of a name by tile, as positions in the flat tile; None where they are too many."""
        if name not in self._listed:
            pairs: Listed | None = getattr(self.layout, name)
            self._listed[name] = None if pairs is None else self._by_tile(pairs)
        return self._listed[name]

    def _by_tile(self, pairs: Listed) -> dict[tuple[int, int], Tensor]:
        starts = [torch.tensor([block.start for block in blocks]) for blocks in (self.rows, self.columns)]
        width = torch.tensor([block.stop - block.start for block in self.columns])
        i, j = (torch.bucketize(place, start, right=True) - 1 for place, start in zip(pairs, starts, strict=True))
        flat = (pairs.rows - starts[0][i]) * width[j] + pairs.columns - starts[1][j]
        tile, order = (i * len(self.columns) + j).sort(stable=True)
        tiles, counts = torch.unique_consecutive(tile, return_counts=True)
        pieces = torch.split(flat[order], counts.tolist())
        return {divmod(key, len(self.columns)): piece for key, piece in zip(tiles.tolist(), pieces, strict=True)}


class BlockTile(Tile):
    """A block of anchors and a block of candidates, with their similarities.

    Args:
        grid: the pass.
        step: which tile of it.
        z: the vectors of each source.
        s: (n, m) or (H, n, m), the similarities.
        functions: the PairFunctions.
        tensors: what these read, without history.
        backward: in the backward pass, where gradients are added.
    """

    def __init__(
        self,
        grid: Grid,
        step: Step,
        z: Sequence[Tensor],
        s: Tensor,
        functions: PairFunctions | None = None,
        tensors: Sequence[Tensor] = (),
        backward: Backward | None = None,
    ) -> None:
        self.grid, self.step, self.functions, self.tensors, self.backward = grid, step, functions, tensors, backward
        self.row_block, self.column_block = grid.rows[step.i], grid.columns[step.j]
        self.columns = self.column_block.all
        super().__init__(s, self.row_block.all, None if backward is None else backward.arguments)
        self.x, self.y = (z[block.source][..., block.own, :] for block in (self.row_block, self.column_block))

    @cached_property
    def embeddings(self) -> tuple[Embeddings, Embeddings]:
        """The anchors and the candidates with their identities."""
        sources = self.grid.layout.sources
        anchor, candidate = (sources[block.source][block.own] for block in (self.row_block, self.column_block))
        return replace(anchor, z=self.x), replace(candidate, z=self.y)

    def part_of(self, argument: Tensor) -> Tensor:
        """Return the rows and columns of an argument that spans at most one of N and M, as a view of it."""
        if argument.shape[-1] > 1:
            argument = argument[..., self.columns]
        return argument[..., self.rows, :] if argument.ndim > 1 and argument.shape[-2] > 1 else argument

    def add_part(self, to_argument: Tensor, gradient: Tensor) -> None:
        """Add the gradient of each pair to the rows or columns of an argument's."""
        part = self.part_of(to_argument)
        part += gradient.sum_to_size(part.shape)

    def evaluate(self, function: nn.Module) -> Evaluated:
        """Evaluate a PairFunction on these pairs."""
        assert self.functions is not None
        blocks, into = (self.row_block, self.column_block), self.backward
        gradients = None if into is None else (into.z, into.tensors)
        return self.functions.on_blocks(function, self.s, self.embeddings, blocks, self.tensors, gradients)

    def reference_weight(self) -> Tensor:
        """Return (<u_i, u_j> + 1) / 2 of the reference vectors, (n, m)."""
        anchor, candidate = self.embeddings
        assert anchor.reference is not None
        assert candidate.reference is not None
        return (anchor.reference @ candidate.reference.T + 1) / 2

    def excluded(self, asked: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Return which pairs do not count: by lists where there are, else by comparing identities."""
        positions, masks = self._by_relation(asked.over)
        if self.grid.masks_cut_blocks:
            masks += [] if asked.among is None else [asked.among[self.columns]]
            rows = getattr(asked, "rows", None)
            masks += [] if rows is None else [rows[self.rows].unsqueeze(-1)]
        return positions, masks

    def _by_relation(self, over: Relation) -> tuple[list[Tensor], list[Tensor]]:
        grid, layout, at = self.grid, self.grid.layout, (self.step.i, self.step.j)
        one_view_each = self.row_block.view is not None and self.column_block.view is not None
        itself = grid.listed("itself") if one_view_each else None
        if itself is None or (layout.rules and over != "positive"):
            rules = [(rule, [values[self.rows] for values in given]) for rule, given in layout.rules]
            return [], [relation(*self.embeddings, over, layout.across, rules, self.s)]
        positions = [itself[at]] if at in itself else []
        if over == "all":
            return positions, []
        positives = grid.listed("positive")
        if positives is None:
            own, others, _ = layout.groups
            same = own[self.rows, None] == others[self.columns]
            return positions, [same if over == "positive" else ~same]
        if over != "positive":
            return positions + ([positives[at]] if at in positives else []), []
        mask = torch.zeros(self.s.shape[-2:], dtype=torch.bool)
        mask.view(-1)[positives[at]] = True
        return [], [mask]


class Backward(NamedTuple):
    """Where a backward pass adds gradients.

    Args:
        z: those of the sources' vectors.
        arguments: those of the reductions' arguments.
        tensors: those of what PairFunctions read and learn.
    """

    z: Gradients
    arguments: ArgumentGradients
    tensors: Gradients


class TiledReductions:
    """Reductions of each anchor's row from tiles: a term of `function.apply`.

    Args:
        layout: anchors and candidates.
        asked: the reductions, with tensors for thresholds.
        size: rows and columns of a tile.
    """

    def __init__(self, layout: Layout, asked: Sequence[Reduction], size: int) -> None:
        self.layout, self.asked = layout, list(asked)
        # Fewer rows and columns for several heads.
        self.size = max(1, int(size / math.sqrt(math.prod(layout.heads))))
        tensors = tensor_arguments(asked)
        self.slots, self.functions = list(tensors), PairFunctions(pair_functions(asked), layout)
        self.arguments = [*tensors.values(), *self.functions.tensors]

    def forward(self, z: Sequence[Tensor], given: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the reductions, (N,) or (H, N) each, and a normaliser of each."""
        asked, longest = with_tensors(self.asked, self.slots, given), self._longest(z)
        sums = self._sums(z, given, asked, [shift_of(one, longest, z[0].dtype) for one in asked])
        if any(map(self._lost_terms, sums)):
            sums = self._sums(z, given, asked, [None for _ in asked])
        outputs, normalisers = zip(*(one.finish() for one in sums), strict=True)
        return list(outputs), list(normalisers)

    def _longest(self, z: Sequence[Tensor]) -> float:
        """Return the length of the longest anchor times that of the longest candidate; inf if not to be looked at."""
        if not self.layout.on_host:
            return math.inf
        lengths = {k: float(torch.linalg.vector_norm(one, dim=-1).max()) for k, one in enumerate(z) if one.numel()}
        sides = (self.layout.anchor_blocks, self.layout.candidate_blocks)
        return math.prod(max((lengths.get(block.source, 0.0) for block in blocks), default=0.0) for blocks in sides)

    def _sums(
        self, z: Sequence[Tensor], given: Sequence[Tensor], asked: Sequence[Any], shifts: Sequence[float | None]
    ) -> list[Sums]:
        """Add all tiles to the sums of the reductions; keep what the backward pass can use."""
        self.grid = Grid(self.layout, asked, shifts, self.size, self.size)
        zeros = z[0].new_zeros(*self.layout.heads, self.layout.rows)
        sums = [Sums(one, shift, zeros) for one, shift in zip(asked, shifts, strict=True)]
        differentiable = any(tensor.requires_grad for tensor in (*self.layout.vectors, *self.arguments))
        room = KEPT if differentiable and zeros.numel() * self.layout.columns <= 8 * KEPT else 0
        self.kept: dict[tuple[int, int], Tensor] = {}
        self.weighted = self._weighted_candidates(z, asked, shifts) if differentiable else None
        buffers = Buffers(z[0])
        for step in self.grid.steps:
            tile = self._tile(step, z, buffers, given)
            for number, to_rows, to_columns in step.serves:
                sides = tile.rows if to_rows else None, tile.columns if to_columns else None
                base = sums[number].add(tile, buffers.like(1, tile.s), *sides)
            if self.weighted is not None and self.weighted.take(tile, base):
                continue
            room -= tile.s.numel()
            if room >= 0:
                self.kept[step.i, step.j] = buffers.release(0, tile.s)
        return sums

    def _tile(
        self,
        step: Step,
        z: Sequence[Tensor],
        buffers: Buffers,
        given: Sequence[Tensor],
        backward: Backward | None = None,
    ) -> BlockTile:
        s = self.kept.get((step.i, step.j))
        if s is None:
            rows, columns = self.grid.rows[step.i], self.grid.columns[step.j]
            s = buffers.product(z[rows.source][..., rows.own, :], z[columns.source][..., columns.own, :])
        return BlockTile(self.grid, step, z, s, self.functions, given[len(self.slots) :], backward)

    def _weighted_candidates(
        self, z: Sequence[Tensor], asked: Sequence[Any], shifts: Sequence[float | None]
    ) -> WeightedCandidates | None:
        frozen = [not tensor.requires_grad for tensor in self.layout.vectors]
        suits = len(asked) == 1 and isinstance(asked[0], LogSumExp) and shifts[0] is not None and asked[0].above is None
        return WeightedCandidates(self.layout, z, frozen) if suits and any(frozen) else None

    def _lost_terms(self, sums: Sums) -> bool:
        """True if a row that has candidates may have lost terms which were too small beside the shift."""
        faint = sums.faint()
        if faint is None or not bool(faint.any()):
            return False
        count = self.layout.count(sums.asked.over, sums.asked.among, sums.asked.rows)
        return count is None or bool((faint & (count > 0)).any())

    def backward(self, saved: Saved, upstream: Sequence[Tensor], to_z: Gradients, to_arguments: Gradients) -> None:
        """Add the gradients, from the tiles computed again."""
        asked = with_tensors(self.asked, self.slots, saved.arguments)
        derivatives = [
            None if isinstance(one, Count) else Derivative(one, self.grid.shifts[k], saved.outputs[k], saved.kept[k], g)
            for k, (one, g) in enumerate(zip(asked, upstream, strict=True))
        ]
        by_name = {(id(asked[number]), name): to for (number, name), to in zip(self.slots, to_arguments, strict=False)}
        into = Backward(to_z, by_name, to_arguments[len(self.slots) :])
        if self.weighted is not None and derivatives[0] is not None:
            self.weighted.backward(saved.z, derivatives[0], to_z, by_name.get((id(asked[0]), "scale")))
        needed = any(gradient is not None for gradient in to_arguments)
        buffers = Buffers(saved.z[0])
        for step in self.grid.steps:
            to_x, to_y = (to_z[block.source] for block in (self.grid.rows[step.i], self.grid.columns[step.j]))
            done = self.weighted is not None and (step.i, step.j) in self.weighted.done
            if done or (to_x is None and to_y is None and not needed):
                continue
            tile = self._tile(step, saved.z, buffers, saved.arguments, into)
            gradient: Tensor | None = None
            for number, to_rows, to_columns in step.serves:
                derivative = derivatives[number]
                if derivative is not None:
                    per_pair = partial(_per_pair, tile, asked[number], to_rows, to_columns)
                    share = derivative.of_tile(tile, buffers.like(1 if gradient is None else 2, tile.s), per_pair)
                    gradient = share if gradient is None else gradient.add_(share)
            if gradient is not None:
                for function, to_values in tile.to_values.items():
                    self.functions.backward(tile.evaluated[function], to_values, gradient, into.tensors)
                add_product(to_x, tile.row_block.own, gradient, tile.y)
                add_product(to_y, tile.column_block.own, gradient.mT, tile.x)


class WeightedCandidates:
    """sum_j b_ij y_j over candidates without gradient, from the forward pass of one log-sum-exp.

    Args:
        layout: anchors and candidates.
        z: the vectors of each source.
        frozen: which sources have no gradient.
    """

    def __init__(self, layout: Layout, z: Sequence[Tensor], frozen: Sequence[bool]) -> None:
        self.blocks, self.frozen = layout.anchor_blocks, frozen
        self.sum = z[0].new_zeros(*layout.heads, layout.rows, z[0].shape[-1])
        self.done: set[tuple[int, int]] = set()
        """The tiles that the backward pass does not need."""

    def take(self, tile: BlockTile, base: Tensor) -> bool:
        """Add a tile, if its candidates have no gradient; return whether they have none."""
        ((_, _, to_columns),) = tile.step.serves
        if to_columns or not self.frozen[tile.column_block.source]:
            return False
        self.sum[..., tile.rows, :] += base @ tile.y
        self.done.add((tile.step.i, tile.step.j))
        return True

    def backward(self, z: Sequence[Tensor], derivative: Derivative, to_z: Gradients, to_scale: Tensor | None) -> None:
        """Add c_i scale sum_j b_ij y_j to the gradient of the anchors, and c_i <x_i, sum_j b_ij y_j> to the scale's."""
        scale = derivative.asked.scale
        for block in self.blocks:
            share = derivative.c[..., block.all].unsqueeze(-1) * self.sum[..., block.all, :]
            add_rows(to_z[block.source], block, share * scale)
            if to_scale is not None:
                along = (share * z[block.source][..., block.own, :]).sum(dim=(-2, -1), keepdim=True)
                to_scale += along.sum().reshape(to_scale.shape) if to_scale.numel() == 1 else along


class Buffers:
    """Tensors of the size of a tile that are written again and again, instead of allocated for each.

    Args:
        like: the type and device.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._flat: dict[int, Tensor] = {}

    def _tensor(self, number: int, shape: Sequence[int]) -> Tensor:
        size = math.prod(shape)
        if number not in self._flat or len(self._flat[number]) < size:
            self._flat[number] = self._like.new_empty(size)
        return self._flat[number][:size].view(*shape)

    def like(self, number: int, s: Tensor) -> Tensor:
        """Return buffer `number` in the shape of a tile."""
        return self._tensor(number, s.shape)

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute x y^T in buffer 0."""
        heads = max(x.shape[:-2], y.shape[:-2], key=len)
        return torch.matmul(x, y.mT, out=self._tensor(0, (*heads, x.shape[-2], y.shape[-2])))

    def release(self, number: int, tile: Tensor) -> Tensor:
        """Return a tile whose buffer is not written to again."""
        del self._flat[number]
        return tile


def add_rows(to: Tensor | None, block: Block, gradient: Tensor) -> None:
    """Add a gradient to the rows of a block, summed over heads where these share the vectors."""
    if to is not None:
        part = to[..., block.own, :]
        part += gradient.sum_to_size(part.shape)


def add_product(to: Tensor | None, rows: slice, left: Tensor, right: Tensor) -> None:
    """Add a product to some rows, summed over heads where these share the vectors."""
    if to is not None:
        part = to[..., rows, :]
        part += (left @ right).sum_to_size(part.shape)


def _per_pair(tile: BlockTile, asked: Any, to_rows: bool, to_columns: bool, of_rows: Tensor) -> Tensor:
    """Spread a number per anchor over a tile: of its rows, of its columns, or the sum of both."""
    sides = []
    for wanted, rows, dim in ((to_rows, tile.rows, -1), (to_columns, tile.columns, -2)):
        if wanted:
            own, reached = of_rows[..., rows].unsqueeze(dim), tile.reached(asked, rows, dim)
            sides.append(own if reached is None else reached.mul_(own))
    return sides[0] if len(sides) == 1 else sides[0] + sides[1]


def _covered(mask: Tensor | None, blocks: Sequence[Block]) -> list[bool | None]:
    """Return for each block whether a mask names all of it (True), nothing of it (False), or a part (None)."""
    if mask is None:
        return [True for _ in blocks]
    if mask.device.type != "cpu":
        return [None for _ in blocks]
    counts = [int(mask[block.all].sum()) for block in blocks]
    return [
        count > 0 if count in (0, block.stop - block.start) else None
        for count, block in zip(counts, blocks, strict=True)
    ]
