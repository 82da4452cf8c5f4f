"""The sweep for any device and any argument: every tile asks the identities, with a running maximum for each row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrast.core.embeddings import PADDING, REMEMBERED, Embeddings
from contrast.core.reductions.asked import Count, Kth, Mean, Reduction, Relation, SoftMean, SoftplusSum, arguments
from contrast.core.reductions.grid import blocks, low_tiles
from contrast.core.reductions.shares import Arguments, logits, shares, softplus
from contrast.core.reductions.thresholds import kth_largest
from contrast.core.reductions.work import Gradients, Work, learned, nothing, spanned


class Tiles:
    """One sweep over the tiles for some of the reductions.

    Args:
        work: the whole call.
        numbers: which of its reductions.
        size: rows and columns of a tile.
    """

    def __init__(self, work: Work, numbers: list[int], size: int) -> None:
        self.work, self.numbers = work, numbers
        self.asked: list[Any] = [work.asked[number] for number in numbers]
        self.height, self.width = low_tiles(work, size)
        self.row_blocks, self.column_blocks = blocks(work, self.height, self.width)
        self.spots = [self._spots(asked) for asked in self.asked]

    def _spots(self, asked: Any) -> set[tuple[int, int]] | None:
        """Give the first row and column of each tile with a listed positive, where only positives are asked for."""
        plain = self.work.x.device.type == "cpu" and self.work.identity.plain
        if asked.over != "positive" or not plain or self.work.identity.positive is None:
            return None
        pairs, width = self.work.identity.positive, self.work.starts[-1] + 1
        firsts = []
        for where, runs in ((pairs.rows, self.row_blocks), (pairs.columns, self.column_blocks)):
            starts = torch.tensor([run.start for run in runs])
            firsts.append(starts[torch.bucketize(where, starts, right=True) - 1])
        return {divmod(tile, width) for tile in set((firsts[0] * width + firsts[1]).tolist())}

    def _asked_of(self, rows: slice, columns: slice) -> list[int]:
        """Say which reductions a tile may matter to."""
        tile = (rows.start, columns.start)
        return [place for place, spots in enumerate(self.spots) if spots is None or tile in spots]

    def rows(self) -> Iterator[slice]:
        """Walk the anchors block by block."""
        for run in self.row_blocks:
            yield slice(run.start, run.stop)

    def columns(self) -> Iterator[tuple[int, slice, slice]]:
        """Walk the candidates block by block: (part, place in the part, place among all)."""
        for run in self.column_blocks:
            start = self.work.starts[run.part]
            yield run.part, slice(run.start - start, run.stop - start), slice(run.start, run.stop)

    def similarity(self, rows: slice, part: int, within: slice) -> Tensor:
        """Give a tile of similarities, (n, m) or (H, n, m)."""
        return self.work.x[..., rows, :] @ self.work.parts[part][..., within, :].mT

    def counting(
        self, asked: Any, s: Tensor, rows: slice, part: int, within: slice, columns: slice, known: dict[Any, Tensor]
    ) -> Tensor:
        """Give (n, m) or (H, n, m) bool: the candidates of a tile that count."""
        if asked.over not in known:
            known[asked.over] = relation(self.work, asked.over, s, rows, part, within)
        counts = known[asked.over]
        if asked.among is not None:
            counts = counts & asked.among[columns]
        if getattr(asked, "rows", None) is not None:
            counts = counts & asked.rows[rows].unsqueeze(-1)
        if getattr(asked, "above", None) is not None:
            counts = counts & (s >= asked.above[..., rows].unsqueeze(-1))
        return counts

    def given(
        self, asked: Reduction, rows: slice, part: int, within: slice, columns: slice, known: dict[Any, Tensor]
    ) -> Arguments:
        """Give the arguments of a reduction on a tile."""
        made: dict[str, Any] = {}
        for name, value in arguments(asked).items():
            if value is None:
                continue
            if isinstance(value, nn.Module):
                if id(value) not in known:
                    known[id(value)] = self._evaluate(value, rows, part, within, known)
                made[name] = known[id(value)].detach()
            elif isinstance(value, str):
                u, v = self.work.anchor.references(rows), self.work.candidates[part].references(within)
                assert u is not None
                assert v is not None
                made[name] = ((u @ v.T + 1) / 2).to(self.work.x.dtype)
            elif isinstance(value, Tensor) and name == "bias":
                made[name] = value[..., rows].unsqueeze(-1) if value.ndim else value
            else:
                made[name] = spanned(value, rows, columns) if isinstance(value, Tensor) else value
        return Arguments(**made)

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """Give the reductions, (N,) or (H, N) each, and a normaliser of each for the backward pass."""
        kept = {place: self._room() for place, asked in enumerate(self.asked) if isinstance(asked, Kth)}
        found = {place: self.work.new_rows() for place in kept}
        outputs: list[list[Tensor]] = [[] for _ in self.asked]
        saved: list[list[Tensor]] = [[] for _ in self.asked]
        for rows in self.rows():
            states = [State(asked, self.work.x, rows) for asked in self.asked]
            strips = {place: self._strip(room, rows) for place, room in kept.items()}
            for part, within, columns in self.columns():
                wanted = self._asked_of(rows, columns)
                if not wanted:
                    continue
                known: dict[Any, Tensor] = {}
                s = self.similarity(rows, part, within)
                for place in wanted:
                    asked = self.asked[place]
                    counts = self.counting(asked, s, rows, part, within, columns, known)
                    if isinstance(asked, Kth):
                        strips[place][..., columns] = torch.where(counts, s, -torch.inf)
                    else:
                        states[place].add(s, counts, self.given(asked, rows, part, within, columns, known))
            for place, (state, asked) in enumerate(zip(states, self.asked, strict=True)):
                if isinstance(asked, Kth):
                    found[place][..., rows] = self._kth(asked, rows, strips[place])
                    continue
                output, normaliser = state.close()
                outputs[place].append(output)
                saved[place].append(normaliser)
        if not self.work.x.shape[-2]:
            kinds = [torch.int64 if isinstance(asked, Count) else self.work.x.dtype for asked in self.asked]
            return [self.work.new_rows().to(kind) for kind in kinds], [s_like(self.work.x) for _ in self.asked]
        made = [found[place] if place in found else torch.cat(rows, dim=-1) for place, rows in enumerate(outputs)]
        return made, [torch.cat(rows, dim=-1) if rows else s_like(self.work.x) for rows in saved]

    def _room(self) -> Tensor:
        """Give room for the whole rows of a block, which is written again and again.

        Made anew for each block, with what is kept of every block between, it would be found nowhere but further on.
        """
        most = max((rows.stop - rows.start for rows in self.rows()), default=0)
        return self.work.x.new_empty(math.prod(self.work.heads) * most * self.work.starts[-1])

    def _strip(self, room: Tensor, rows: slice) -> Tensor:
        """Give whole rows of -inf in this room, (n, M) or (H, n, M)."""
        shape = (*self.work.heads, rows.stop - rows.start, self.work.starts[-1])
        return room[: math.prod(shape)].view(shape).fill_(-torch.inf)

    def _kth(self, asked: Kth, rows: slice, strip: Tensor) -> Tensor:
        found = (strip > -torch.inf).sum(dim=-1)
        k = torch.as_tensor(asked.k, device=strip.device)
        k = torch.minimum(k[..., rows] if k.ndim else k, found).clamp(min=1)
        return kth_largest(strip, k).masked_fill(found == 0, 0)

    def topk(self, k: int, over: Relation, among: Tensor | None) -> Tensor:
        """Give the places of the k largest similarities, (N, k) or (H, N, k), -1 where there are fewer."""
        asked, made, room = Count(over, among), [], self._room()
        for rows in self.rows():
            strip = self._strip(room, rows)
            for part, within, columns in self.columns():
                s = self.similarity(rows, part, within)
                counts = self.counting(asked, s, rows, part, within, columns, {})
                strip[..., columns] = torch.where(counts, s, -torch.inf)
            short = max(k - strip.shape[-1], 0)
            values, places = F.pad(strip, (0, short), value=-torch.inf).topk(k, dim=-1)
            made.append(places.masked_fill(values == -torch.inf, -1))
        shape = (*self.work.heads, self.work.x.shape[-2], k)
        return torch.cat(made, dim=-2) if made else torch.empty(shape, dtype=torch.int64, device=self.work.x.device)

    def backward(self, outputs: list[Tensor], saved: list[Tensor], upstream: list[Tensor], into: Gradients) -> None:
        """Add the gradients, tile by tile, from the similarities computed again."""
        work = self.work
        active = [place for place, asked in enumerate(self.asked) if not isinstance(asked, Count | Kth)]
        for rows in self.rows() if active else ():
            x = work.x[..., rows, :]
            for part, within, columns in self.columns():
                wanted = [place for place in self._asked_of(rows, columns) if place in active]
                if not wanted:
                    continue
                known: dict[Any, Any] = {"history": True}
                s = self.similarity(rows, part, within)
                gradient = torch.zeros_like(s)
                to_modules: dict[int, tuple[nn.Module, Tensor]] = {}
                for place in wanted:
                    asked = self.asked[place]
                    counts = self.counting(asked, s, rows, part, within, columns, known)
                    given = self.given(asked, rows, part, within, columns, known)
                    to_s, to_arguments = shares(
                        asked,
                        s,
                        counts,
                        given,
                        _spread,
                        upstream[place][..., rows],
                        outputs[place][..., rows],
                        saved[place][..., rows] if saved[place].numel() else None,
                    )
                    gradient += to_s
                    for name, share in to_arguments.items():
                        value = getattr(asked, name)
                        if isinstance(value, nn.Module):
                            _, sofar = to_modules.get(id(value), (value, 0.0))
                            to_modules[id(value)] = (value, sofar + share)
                        elif (self.numbers[place], name) in into.arguments:
                            self._add_argument(into, place, name, share, rows, columns)
                if to_modules:
                    self._into_modules(to_modules, known, rows, part, within, into)
                if into.anchor is not None:
                    into.anchor[..., rows, :] += gradient @ work.parts[part][..., within, :]
                to_part = into.parts[part]
                if to_part is not None:
                    place_of = to_part[..., within, :]
                    place_of += (gradient.mT @ x).sum_to_size(place_of.shape)

    def _add_argument(self, into: Gradients, place: int, name: str, share: Tensor, rows: slice, columns: slice) -> None:
        number = self.numbers[place]
        if name != "bias":
            into.add_argument(number, name, share, rows, columns)
            return
        to_bias = into.arguments[number, name]
        part = to_bias[..., rows] if to_bias.ndim and to_bias.shape[-1] > 1 else to_bias
        part += share.sum(dim=-1).sum_to_size(part.shape)

    def _evaluate(self, module: nn.Module, rows: slice, part: int, within: slice, known: dict[Any, Any]) -> Tensor:
        """Give a tile of a PairFunction; for the backward pass with its history, from vectors kept in `known`."""
        if "history" not in known:
            tile: Tensor = module(self.work.anchor[rows], self.work.candidates[part][within])
            return tile
        if "vectors" not in known:
            anchor, candidate = self.work.anchor[rows], self.work.candidates[part][within]
            x, y = anchor.z.detach(), candidate.z.detach()
            x.requires_grad_(self.work.wants_anchor)
            y.requires_grad_(self.work.wants_part[part])
            known["vectors"] = (_with(anchor, x), _with(candidate, y))
        with torch.enable_grad():
            tile = module(*known["vectors"])
        return tile  # noqa: RET504

    def _into_modules(
        self,
        shares: dict[int, tuple[nn.Module, Tensor]],
        known: dict[Any, Any],
        rows: slice,
        part: int,
        within: slice,
        into: Gradients,
    ) -> None:
        """Send a tile's gradients back through its PairFunctions: to their parameters, and to the vectors they read."""
        tiles = [known[number] for number in shares]
        given = [
            share.sum_to_size(tile.shape).to(tile.dtype)
            for tile, (_, share) in zip(tiles, shares.values(), strict=True)
        ]
        history = [number for number, tile in enumerate(tiles) if tile.requires_grad]
        if not history:
            return
        x, y = (embeddings.z for embeddings in known["vectors"])
        parameters = {id(tensor): tensor for module, _ in shares.values() for tensor in learned(module)}
        wanted = [tensor for tensor in (x, y, *parameters.values()) if tensor.requires_grad]
        found = torch.autograd.grad(
            [tiles[n] for n in history], wanted, [given[n] for n in history], allow_unused=True, materialize_grads=True
        )
        gradients = dict(zip(map(id, wanted), found, strict=True))
        if id(x) in gradients and into.anchor is not None:
            into.anchor[..., rows, :] += gradients[id(x)]
        to_part = into.parts[part]
        if id(y) in gradients and to_part is not None:
            to_part[..., within, :] += gradients[id(y)]
        for number, tensor in parameters.items():
            into.add_parameter(tensor, gradients[number])


class State:
    """What a reduction knows of a block of rows so far.

    Args:
        asked: the reduction.
        x: all anchors.
        rows: the block.
    """

    def __init__(self, asked: Any, x: Tensor, rows: slice) -> None:
        self.asked = asked
        shape = (*x.shape[:-2], rows.stop - rows.start)
        self.largest = x.new_full(shape, -torch.inf)
        self.mass, self.total = x.new_zeros(shape), x.new_zeros(shape)
        self.number = torch.zeros(shape[-1:], dtype=torch.int64, device=x.device)

    def add(self, s: Tensor, counts: Tensor, given: Arguments) -> None:
        """Take in a tile."""
        if isinstance(self.asked, Count):
            self.number = self.number + counts.sum(dim=-1)
        elif isinstance(self.asked, Mean):
            weight = torch.where(counts, torch.as_tensor(given.weight, dtype=s.dtype, device=s.device), 0)
            self.mass = self.mass + weight.sum(dim=-1)
            self.total = self.total + (weight * s).sum(dim=-1)
        elif isinstance(self.asked, SoftplusSum):
            self.total = self.total + torch.where(counts, softplus(logits(s, given)), 0).sum(dim=-1)
        elif s.shape[-1]:
            exponent = torch.where(counts, logits(s, given), -torch.inf)
            largest = torch.maximum(self.largest, exponent.amax(dim=-1))
            reach = largest.masked_fill(largest == -torch.inf, 0)
            fade = (self.largest - reach).exp()
            e = (exponent - reach.unsqueeze(-1)).exp()
            self.mass = self.mass * fade + e.sum(dim=-1)
            if isinstance(self.asked, SoftMean):
                self.total = self.total * fade + (e * s).sum(dim=-1)
            self.largest = largest

    def close(self) -> tuple[Tensor, Tensor]:
        """Give the reduction, and the normaliser that its derivative needs."""
        if isinstance(self.asked, Count):
            return self.number, self.mass
        if isinstance(self.asked, SoftplusSum):
            return self.total, self.mass
        if isinstance(self.asked, Mean):
            mass = self.mass.where(self.mass != 0, 1)
            return self.total / mass, mass
        empty = self.largest == -torch.inf
        mass = self.mass.masked_fill(empty, 1)
        value = mass.log() + self.largest.masked_fill(empty, 0)
        normaliser = value.masked_fill(empty, torch.inf)
        if isinstance(self.asked, SoftMean):
            return self.total / mass, normaliser
        return value.masked_fill(empty, nothing(value.dtype)), normaliser


def relation(work: Work, over: Relation, s: Tensor, rows: slice, part: int, within: slice) -> Tensor:
    """Give (n, m) or (H, n, m) bool: which candidates of a tile stand in this relation."""
    anchor, candidate = work.anchor, work.candidates[part]
    view, its_view = anchor.view[rows, None], candidate.view[within]
    same_sample = anchor.sample[rows, None] == candidate.sample[within]
    same_group = anchor.group[rows, None] == candidate.group[within]
    remembered = its_view == REMEMBERED
    eligible = ~(same_sample & ((view == its_view) | remembered))
    eligible &= (view != PADDING) & (its_view != PADDING)
    if work.across:
        eligible &= view != its_view
    if over == "positive":
        return eligible & same_group
    negative = eligible & ~same_group
    for rule, per_anchor in work.rules:
        block = [values[rows].unsqueeze(-1) for values in per_anchor]
        negative = negative & ~rule(anchor[rows], candidate[within], s, *block)
    if over == "negative":
        return negative
    return negative & remembered if over == "remembered" else negative | (eligible & same_group)


def s_like(x: Tensor) -> Tensor:
    """Give nothing, where a reduction keeps no normaliser."""
    return x.new_zeros(0)


def _spread(of_rows: Tensor) -> Tensor:
    return of_rows.unsqueeze(-1)


def _with(embeddings: Embeddings, z: Tensor) -> Embeddings:
    return Embeddings(z, embeddings.sample, embeddings.group, embeddings.view, embeddings.reference)
