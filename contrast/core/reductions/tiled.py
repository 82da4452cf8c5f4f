"""Reductions without the (N, M) matrix: a tile of similarities at a time, computed again in the backward pass.

A tile is x y^T for a block of anchors x and a block of candidates y, at most TILE rows and columns, which fits into the
processor's cache. The forward pass adds each tile to the sums of its rows, and the backward pass computes it again,
forms G_ij = dL/ds_ij (both by `formulas`), and adds G y to the gradient of the anchors and G^T x to that of the
candidates. Memory is O(N + M).

**Symmetric tiles.** Where the anchors are the first candidates, tile (j, i) is the transpose of tile (i, j). If every
argument is a number, only the tiles with i <= j are computed: row sums are those of the anchors i, column sums those of
the anchors j, and the backward pass uses G_ij + G_ji. That halves the products.

**Candidates without gradient** (a queue, momentum keys, a frozen network). For a single log-sum-exp over such ones
G y = c_i sum_j b_ij y_j, where only c_i depends on the upstream gradient. The sum is computed in the forward pass, so
that the backward pass needs no tiles.
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
from contrast.core.reductions.formulas import Formula, formula, shift_of
from contrast.core.reductions.kinds import (
    Count,
    LogSumExp,
    Reduction,
    Relation,
    arguments,
    is_number,
)
from contrast.core.reductions.layout import Block, Layout, ListedPairs, relation
from contrast.core.reductions.pair_functions import Evaluated, PairFunctions
from contrast.core.reductions.terms import Gradients, Saved
from contrast.core.reductions.tile import GradientTargets, ReductionTerm, Tile

TILE = 512
"""Rows and columns of a tile: it fits into the processor's cache together with its few copies."""
ROWS = 4096
"""Vectors per copy."""


class TileStep(NamedTuple):
    """A tile to be computed: its block of anchors, its block of candidates, and the reductions that it serves.

    Args:
        i: the index of the block of anchors.
        j: the index of the block of candidates.
        serves: (index of the reduction, True if the rows are its anchors, True if the columns are).
    """

    i: int
    j: int
    serves: list[tuple[int, bool, bool]]


class Grid:
    """The tiles of one pass.

    Args:
        layout: anchors and candidates.
        reductions: the reductions.
        shifts: what is subtracted from the exponents of each reduction; None if these have no known bound.
        height: the rows of a tile.
        width: the columns of a tile.
    """

    def __init__(
        self, layout: Layout, reductions: Sequence[Any], shifts: Sequence[float | None], height: int, width: int
    ) -> None:
        self.layout, self.reductions, self.shifts = layout, reductions, shifts
        self.row_blocks = [block for run in layout.anchor_blocks for block in run.cut(height)]
        self.column_blocks = [block for run in layout.candidate_blocks for block in run.cut(width)]
        masked = [
            (_covered(getattr(reduction, "rows", None), self.row_blocks), _covered(reduction.among, self.column_blocks))
            for reduction in reductions
        ]
        self.masks_cut_blocks = any(None in side for sides in masked for side in sides)
        """True if `rows` or `among` of a reduction select only a part of a block."""
        # A base is symmetric if its arguments are numbers and its exponents have a fixed shift. Rules, masks that cut a
        # block, and the thresholds of a count are applied to rows only. Blocks of anchors must be blocks of candidates.
        # The reductions share their tiles, so that all of them must allow it.
        numbers = all(value is None or is_number(value) for each in reductions for value in arguments(each).values())
        thresholds = any(isinstance(each, Count) and each.above is not None for each in reductions)
        self.symmetric = (
            layout.symmetric and numbers and not thresholds and not self.masks_cut_blocks
            and height == width and None not in shifts and not layout.rules
        )  # fmt: skip
        self.steps = list(self._needed_tiles(masked))

    def _needed_tiles(self, masked: Sequence[tuple[list[bool | None], list[bool | None]]]) -> Iterator[TileStep]:
        for i, j in itertools.product(range(len(self.row_blocks)), range(len(self.column_blocks))):
            both = self.symmetric and j < len(self.row_blocks)
            if both and j < i:
                continue
            serves = []
            for number, (reduction, (rows, columns)) in enumerate(zip(self.reductions, masked, strict=True)):
                counts = self._may_count(i, j, reduction.over)
                to_rows = counts and rows[i] is not False and columns[j] is not False
                to_columns = counts and both and i != j and bool(rows[j]) and bool(columns[i])
                if to_rows or to_columns:
                    serves.append((number, to_rows, to_columns))
            if serves:
                yield TileStep(i, j, serves)

    def _may_count(self, i: int, j: int, over: Relation) -> bool:
        if not self.layout.may_count(self.row_blocks[i], self.column_blocks[j], over):
            return False
        positives = self.positives if over == "positive" else None
        return positives is None or (i, j) in positives

    @cached_property
    def itself(self) -> dict[tuple[int, int], Tensor] | None:
        """`Layout.itself` by tile, as positions in the flat tile; None if they are too many to list."""
        return self._by_tile(self.layout.itself)

    @cached_property
    def positives(self) -> dict[tuple[int, int], Tensor] | None:
        """`Layout.positive` by tile, as positions in the flat tile; None if they are too many to list."""
        return self._by_tile(self.layout.positive)

    def _by_tile(self, pairs: ListedPairs | None) -> dict[tuple[int, int], Tensor] | None:
        if pairs is None:
            return None
        starts = [torch.tensor([block.start for block in blocks]) for blocks in (self.row_blocks, self.column_blocks)]
        width = torch.tensor([block.stop - block.start for block in self.column_blocks])
        i, j = (torch.bucketize(index, start, right=True) - 1 for index, start in zip(pairs, starts, strict=True))
        flat = (pairs.anchors - starts[0][i]) * width[j] + pairs.candidates - starts[1][j]
        tile, order = (i * len(self.column_blocks) + j).sort(stable=True)
        tiles, counts = torch.unique_consecutive(tile, return_counts=True)
        pieces = torch.split(flat[order], counts.tolist())
        return {divmod(key, len(self.column_blocks)): piece for key, piece in zip(tiles.tolist(), pieces, strict=True)}


class BlockTile(Tile):
    """A block of anchors and a block of candidates, with their similarities.

    Args:
        grid: the tiles of the pass.
        step: one of them.
        z: the vectors of each source.
        s: (n, m) or (H, n, m), the similarities.
        functions: the PairFunctions.
        tensors: what these read, without autograd history.
        targets: in the backward pass, where gradients are added.
    """

    def __init__(
        self,
        grid: Grid,
        step: TileStep,
        z: Sequence[Tensor],
        s: Tensor,
        functions: PairFunctions | None = None,
        tensors: Sequence[Tensor] = (),
        targets: GradientTargets | None = None,
    ) -> None:
        self.grid, self.step, self.functions, self.tensors, self.targets = grid, step, functions, tensors, targets
        self.row_block, self.column_block = grid.row_blocks[step.i], grid.column_blocks[step.j]
        self.columns = self.column_block.all
        super().__init__(s, self.row_block.all, None if targets is None else targets.arguments)
        self.x, self.y = (z[block.source][..., block.own, :] for block in (self.row_block, self.column_block))

    def sides(self, to_rows: bool, to_columns: bool) -> tuple[slice | None, slice | None]:
        """Return the positions of the anchors in rows and in columns, None for those that the tile does not serve."""
        return self.rows if to_rows else None, self.columns if to_columns else None

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
        """Add the gradient of each pair to the rows or columns of the argument's gradient."""
        part = self.part_of(to_argument)
        part += gradient.sum_to_size(part.shape)

    def evaluate(self, function: nn.Module) -> Evaluated:
        """Evaluate a PairFunction on these pairs."""
        assert self.functions is not None
        blocks = self.row_block, self.column_block
        gradients = None if self.targets is None else (self.targets.z, self.targets.tensors)
        return self.functions.on_blocks(function, self.s, self.embeddings, blocks, self.tensors, gradients)

    def reference_weight(self) -> Tensor:
        """Return (<u_i, u_j> + 1) / 2 of the reference vectors, (n, m)."""
        anchor, candidate = self.embeddings
        assert anchor.reference is not None
        assert candidate.reference is not None
        return (anchor.reference @ candidate.reference.T + 1) / 2

    def excluded(self, reduction: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Return which pairs do not count: from lists if there are any, else from the identities."""
        positions, masks = self._by_relation(reduction.over)
        if self.grid.masks_cut_blocks:
            masks += [] if reduction.among is None else [reduction.among[self.columns]]
            rows = getattr(reduction, "rows", None)
            masks += [] if rows is None else [rows[self.rows].unsqueeze(-1)]
        return positions, masks

    def _by_relation(self, over: Relation) -> tuple[list[Tensor], list[Tensor]]:
        grid, layout, at = self.grid, self.grid.layout, (self.step.i, self.step.j)
        one_view_each = self.row_block.view is not None and self.column_block.view is not None
        itself = grid.itself if one_view_each else None
        if itself is None or (layout.rules and over != "positive"):
            rules = [(rule, [values[self.rows] for values in per_anchor]) for rule, per_anchor in layout.rules]
            return [], [relation(*self.embeddings, over, layout.across, rules, self.s)]
        positions = [itself[at]] if at in itself else []
        if over == "all":
            return positions, []
        positives = grid.positives
        if positives is None:
            own, others, _ = layout.groups
            same = own[self.rows, None] == others[self.columns]
            return positions, [same if over == "positive" else ~same]
        if over != "positive":
            return positions + ([positives[at]] if at in positives else []), []
        mask = torch.zeros(self.s.shape[-2:], dtype=torch.bool)
        mask.view(-1)[positives[at]] = True
        return [], [mask]


class TiledReductions(ReductionTerm):
    """Reductions of each anchor's row from tiles: a term of `terms.compute`.

    Args:
        layout: anchors and candidates.
        reductions: the reductions, with tensors for thresholds.
        size: rows and columns of a tile.
    """

    def __init__(self, layout: Layout, reductions: Sequence[Reduction], size: int) -> None:
        super().__init__(layout, reductions)
        # Fewer rows and columns for several heads.
        self.size = max(1, int(size / math.sqrt(math.prod(layout.heads))))

    def forward(self, z: Sequence[Tensor], arguments: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the reductions, (N,) or (H, N) each; save normalisers and the weighted sum of candidates."""
        reductions, tensors = self.with_arguments(arguments)
        longest = self._length_bound(z)
        shifts = [shift_of(reduction, longest, z[0].dtype) for reduction in reductions]
        formulas, weighted = self._pass(z, reductions, tensors, shifts)
        if any(map(self._lost_terms, formulas)):
            # All reductions again, even for one row of one of them: scales with so wide a range are rare.
            formulas, weighted = self._pass(z, reductions, tensors, [None for _ in reductions])
        outputs, normalisers = zip(*(sums.finish() for sums in formulas), strict=True)
        return list(outputs), [*normalisers, *weighted]

    def _length_bound(self, z: Sequence[Tensor]) -> float:
        """Return the length of the longest anchor times that of the longest candidate; inf on other devices."""
        if not self.layout.on_host:
            return math.inf
        lengths = {k: float(torch.linalg.vector_norm(x, dim=-1).max()) for k, x in enumerate(z) if x.numel()}
        sides = (self.layout.anchor_blocks, self.layout.candidate_blocks)
        return math.prod(max((lengths.get(block.source, 0.0) for block in blocks), default=0.0) for blocks in sides)

    def _pass(
        self, z: Sequence[Tensor], reductions: Sequence[Any], tensors: Sequence[Tensor], shifts: Sequence[float | None]
    ) -> tuple[list[Formula], list[Tensor]]:
        """Add all tiles to the sums of the reductions; return these, and the weighted sum of candidates, if any.

        The plan for the backward pass is stored in attributes: the grid, and which tiles it can skip.
        """
        self.grid = Grid(self.layout, reductions, shifts, self.size, self.size)
        zeros = z[0].new_zeros(*self.layout.heads, self.layout.anchor_count)
        formulas = [formula(reduction, shift, zeros) for reduction, shift in zip(reductions, shifts, strict=True)]
        differentiable = any(tensor.requires_grad for tensor in (*self.layout.vectors, *self.arguments))
        self.weighted = self._weighted_candidates(reductions, shifts) if differentiable else None
        buffers = Buffers(z[0])
        for step in self.grid.steps:
            tile = BlockTile(self.grid, step, z, self._product(step, z, buffers), self.functions, tensors)
            for number, to_rows, to_columns in step.serves:
                base = formulas[number].add(tile, buffers.like(1, tile.s), *tile.sides(to_rows, to_columns))
            if self.weighted is not None:
                self.weighted.add(tile, base, zeros)
        return formulas, [] if self.weighted is None else self.weighted.release()

    def _product(self, step: TileStep, z: Sequence[Tensor], buffers: Buffers) -> Tensor:
        rows, columns = self.grid.row_blocks[step.i], self.grid.column_blocks[step.j]
        return buffers.product(z[rows.source][..., rows.own, :], z[columns.source][..., columns.own, :])

    def _weighted_candidates(
        self, reductions: Sequence[Any], shifts: Sequence[float | None]
    ) -> WeightedCandidates | None:
        frozen = [not tensor.requires_grad for tensor in self.layout.vectors]
        if not any(frozen) or len(reductions) > 1 or shifts[0] is None:
            return None
        plain = isinstance(reductions[0], LogSumExp) and reductions[0].above is None
        return WeightedCandidates(self.layout.anchor_blocks, frozen) if plain else None

    def _lost_terms(self, sums: Formula) -> bool:
        """True if a row with candidates may have lost terms which were too small after the shift."""
        small = sums.underflowed()
        if small is None or not bool(small.any()):
            return False
        count = self.layout.count(sums.reduction.over, sums.reduction.among, sums.reduction.rows)
        return count is None or bool((small & (count > 0)).any())

    def backward(self, saved: Saved, upstream: Sequence[Tensor], to_z: Gradients, to_arguments: Gradients) -> None:
        """Add the gradients, from the tiles computed again."""
        reductions, tensors = self.with_arguments(saved.arguments)
        targets, zeros = self.targets(reductions, to_z, to_arguments), saved.z[0].new_zeros(())
        formulas = [formula(each, shift, zeros) for each, shift in zip(reductions, self.grid.shifts, strict=True)]
        for sums, output, normaliser, g in zip(formulas, saved.outputs, saved.tensors, upstream, strict=False):
            sums.prepare(output, normaliser, g)
        if self.weighted is not None and self.weighted.done:
            self.weighted.backward(saved.z, saved.tensors[-1], formulas[0], targets)
        needed = any(gradient is not None for gradient in to_arguments)
        buffers = Buffers(saved.z[0])
        for step in self.grid.steps:
            to_x, to_y = (
                to_z[block.source] for block in (self.grid.row_blocks[step.i], self.grid.column_blocks[step.j])
            )
            done = self.weighted is not None and (step.i, step.j) in self.weighted.done
            if done or (to_x is None and to_y is None and not needed):
                continue
            s = self._product(step, saved.z, buffers)
            tile = BlockTile(self.grid, step, saved.z, s, self.functions, tensors, targets)
            to_s: Tensor | None = None
            for number, to_rows, to_columns in step.serves:
                sums = formulas[number]
                if not isinstance(sums.reduction, Count):
                    per_pair = partial(tile.per_pair, sums.reduction, *tile.sides(to_rows, to_columns))
                    share = sums.gradient(tile, buffers.like(1 if to_s is None else 2, s), per_pair)
                    to_s = share if to_s is None else to_s.add_(share)
            if to_s is not None:
                for function, to_values in tile.to_values.items():
                    self.functions.backward(tile.evaluated[function], to_values, to_s)
                add_product(to_x, tile.row_block.own, to_s, tile.y)
                add_product(to_y, tile.column_block.own, to_s.mT, tile.x)


class WeightedCandidates:
    """sum_j b_ij y_j over candidates without gradient, from the forward pass of one log-sum-exp.

    Args:
        blocks: the anchors.
        frozen: True for each source without gradient.
    """

    def __init__(self, blocks: Sequence[Block], frozen: Sequence[bool]) -> None:
        self.blocks, self.frozen = blocks, frozen
        self.sums: list[Tensor] = []
        """One tensor, (N, D) or (H, N, D), after the first tile."""
        self.done: set[tuple[int, int]] = set()
        """The tiles that the backward pass can skip."""

    def add(self, tile: BlockTile, base: Tensor, zeros: Tensor) -> None:
        """Add a tile if its candidates have no gradient and it serves its rows only."""
        ((_, _, to_columns),) = tile.step.serves
        if to_columns or not self.frozen[tile.column_block.source]:
            return
        if not self.sums:
            self.sums.append(zeros.new_zeros(*zeros.shape, tile.y.shape[-1]))
        self.sums[0][..., tile.rows, :] += base @ tile.y
        self.done.add((tile.step.i, tile.step.j))

    def release(self) -> list[Tensor]:
        """Return the sum, if there is one, and drop it here, so that autograd frees it after the backward pass."""
        sums, self.sums = self.sums, []
        return sums

    def backward(self, z: Sequence[Tensor], weighted: Tensor, sums: Formula, targets: GradientTargets) -> None:
        """Add c_i scale sum_j b_ij y_j to the gradient of the anchors, and c_i <x_i, sum_j b_ij y_j> to the scale's."""
        scale, to_scale = sums.reduction.scale, targets.arguments.get((id(sums.reduction), "scale"))
        for block in (block for run in self.blocks for block in run.cut(ROWS)):
            share = sums.c[..., block.all].unsqueeze(-1) * weighted[..., block.all, :]
            add_rows(targets.z[block.source], block, share * scale)
            if to_scale is not None:
                along = (share * z[block.source][..., block.own, :]).sum(dim=(-2, -1), keepdim=True)
                to_scale += along.sum().reshape(to_scale.shape) if to_scale.numel() == 1 else along


class Buffers:
    """Tensors of the size of a tile, allocated once and overwritten for each tile.

    Args:
        like: a tensor of the same type and device.
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


def add_rows(to: Tensor | None, block: Block, gradient: Tensor) -> None:
    """Add a gradient to the rows of a block, summed over heads if these share the vectors."""
    if to is not None:
        part = to[..., block.own, :]
        part += gradient.sum_to_size(part.shape)


def add_product(to: Tensor | None, rows: slice, left: Tensor, right: Tensor) -> None:
    """Add a product to some rows, summed over heads if these share the vectors."""
    if to is not None:
        part = to[..., rows, :]
        part += (left @ right).sum_to_size(part.shape)


def _covered(mask: Tensor | None, blocks: Sequence[Block]) -> list[bool | None]:
    """Return for each block True if a mask selects all of it, False if nothing, None if a part."""
    if mask is None:
        return [True for _ in blocks]
    if mask.device.type != "cpu":
        return [None for _ in blocks]
    counts = [int(mask[block.all].sum()) for block in blocks]
    return [
        count > 0 if count in (0, block.stop - block.start) else None
        for count, block in zip(counts, blocks, strict=True)
    ]
