r"""How each reduction is computed from tiles, and its gradient: one class per reduction.

With the upstream gradient g_i = dL/dR_i of a reduction R_i of the row s_i1, ..., s_iM:

=========== =========================== ============================== ======================= =========================
reduction   base b of a pair            sums of a row                  R                       dL/ds of a pair
=========== =========================== ============================== ======================= =========================
LogSumExp   e^(scale s + log_weight)    B = sum b                      log B                   scale b c
SoftMean    e^(scale s)                 B = sum b, T = sum b s         T / B                   b (c + scale (c s - d))
SoftplusSum sigmoid(scale s + bias)     sum log(1 + e^(scale s + bias))  that sum              scale b c
Mean        weight                      B = sum b, T = sum b s         T / B                   b c
=========== =========================== ============================== ======================= =========================

with two *coefficients* of the row: c_i = g_i / B_i (SoftplusSum: g_i) and d_i = c_i R_i. (A factor e^-shift of the base
goes into B too, and so cancels.) The gradients of arguments are
linear in them too: b c of a log_weight or bias, b c s of a scale, c s - d of a weight.

**Symmetric tiles.** Where the anchors are the candidates, s_ij = s_ji, and the base is the same for both. Then one tile
serves the rows of its anchors and those of its candidates: its column sums are added to the sums of the candidates, and
its gradient is the formula above with c_i + c_j and d_i + d_j.

**Range.** e^x must neither overflow nor vanish. |s_ij| is at most the product of the longest vectors, so that where the
scale is a number, |scale s_ij| <= reach is known before any tile. Up to WIDEST nothing needs to be done. Beyond it the
*fixed shift* reach - WIDEST is subtracted from all exponents: sums cannot overflow, and the base stays symmetric. A row
whose sum is smaller than e^UNDERFLOW may have lost terms; then everything is computed again with *running maxima*: each
row carries its largest exponent so far, and its sums are scaled down when a larger one comes (in one direction only).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from contrast.core.reductions.kinds import Count, LogSumExp, Mean, SoftMean, SoftplusSum, is_number
from contrast.core.reductions.tile import Tile

WIDEST = {torch.float32: 75.0, torch.float64: 650.0}
"""e^x, and sums of a hundred thousand of them, are normal numbers for |x| up to this."""
UNDERFLOW = -60.0
"""A shifted sum below e^UNDERFLOW may have lost terms; with float64's range it is rarely met."""

PerPair = Callable[[Tensor], Tensor]
"""Spreads a number per anchor over a tile: that of the pair's anchor, of its candidate, or the sum of both."""


def shift_of(asked: Any, longest: float, dtype: torch.dtype) -> float | None:
    """Return the fixed shift of a reduction's exponents; None where these have no known bound.

    Args:
        asked: the reduction.
        longest: the length of the longest anchor times that of the longest candidate, inf for unknown.
        dtype: float32 or float64.
    """
    if isinstance(asked, Mean | Count):
        return 0.0  # no exponents
    if not (math.isfinite(longest) and is_number(asked.scale)) or getattr(asked, "log_weight", None) is not None:
        return None
    beyond = longest * float(torch.as_tensor(asked.scale).abs().max()) - WIDEST[dtype]
    if isinstance(asked, SoftplusSum):
        # log(1 + e^x) has no shift: it is in range, or it is computed without e^x.
        bias = torch.as_tensor(asked.bias)
        return 0.0 if beyond + (float(bias.max()) if bias.numel() else 0.0) <= 0 else None
    return max(0.0, beyond)


class Formula(ABC):
    """The sums of a reduction over tiles, and its gradient.

    In the forward pass every tile is added, then `finish` is called; in the backward pass `prepare` is called, then
    `gradient` for every tile.

    Args:
        asked: the reduction.
        shift: what is subtracted from its exponents; None for running maxima.
        zeros: (N,) or (H, N).
    """

    def __init__(self, asked: Any, shift: float | None, zeros: Tensor) -> None:
        self.asked, self.shift = asked, shift
        self.mass = zeros.clone()
        """B, with the base as it is computed (see Range); a SoftplusSum or a Count has its own sum here."""
        self.c = self.d = zeros

    @abstractmethod
    def base(self, tile: Tile, out: Tensor) -> Tensor:
        """Write what is summed over each pair into `out`, 0 where a pair does not count."""

    def add(self, tile: Tile, out: Tensor, rows: slice | None, columns: slice | None = None) -> Tensor:
        """Add a tile to the sums of its anchors, of its candidates, or of both; return what `base` does.

        Args:
            tile: the tile.
            out: a tensor like the similarities, which is overwritten.
            rows: the anchors, among all, whose sums the tile's rows belong to; None for none.
            columns: the anchors whose sums the tile's columns belong to.
        """
        base = self.base(tile, out)
        for anchors, dim in ((rows, -1), (columns, -2)):
            if anchors is not None:
                reached = tile.reached(self.asked, anchors, dim)
                self.add_sums(base if reached is None else reached.mul_(base), tile.s, anchors, dim)
        return base

    def add_sums(self, base: Tensor, s: Tensor, anchors: slice, dim: int) -> None:  # noqa: ARG002
        """Add the sums over a dimension of a tile to those of some anchors."""
        self.mass[..., anchors] += base.sum(dim)

    def underflowed(self) -> Tensor | None:
        """Return the rows that may have lost terms which were too small beside the shift; None for none."""
        return self.mass < math.exp(UNDERFLOW) if self.shift else None

    @abstractmethod
    def finish(self) -> tuple[Tensor, Tensor]:
        """Return the reduction, and a normaliser that `prepare` needs."""

    def prepare(self, output: Tensor, normaliser: Tensor, upstream: Tensor) -> None:  # noqa: ARG002
        """Compute the coefficients c and d of each row.

        Args:
            output: the reduction.
            normaliser: what `finish` returned with it.
            upstream: g, the gradient of the reduction.
        """
        self.c = upstream

    @abstractmethod
    def gradient(self, tile: Tile, out: Tensor, per_pair: PerPair) -> Tensor:
        """Return dL/ds of a tile, which may be `out`, and add the gradients of the arguments to the tile's."""


class _OfExponentials(Formula):
    """What LogSumExp and SoftMean share: a base e^exponent, whose sum must stay in range."""

    def __init__(self, asked: Any, shift: float | None, zeros: Tensor) -> None:
        super().__init__(asked, shift, zeros)
        self.largest = zeros - torch.inf if shift is None else None
        self.total: Tensor | None = None
        self.subtracted: Tensor | float = 0.0

    def base(self, tile: Tile, out: Tensor) -> Tensor:
        exponents = tile.exponents(self.asked, out)
        if self.shift is None:
            return self._relative_to_largest(tile.minus_infinity(exponents, self.asked), tile.rows)
        return tile.zero(exponents.sub_(self.shift).exp_() if self.shift else exponents.exp_(), self.asked)

    def _relative_to_largest(self, exponents: Tensor, rows: slice) -> Tensor:
        """Return e^(exponent - largest) for the rows' largest exponents so far, and scale their sums to these."""
        if not exponents.shape[-1]:
            return exponents
        assert self.largest is not None
        before = self.largest[..., rows]
        largest = torch.maximum(before, exponents.amax(dim=-1))
        finite = largest.masked_fill(largest == -torch.inf, 0)
        for sums in (self.mass, self.total):
            if sums is not None:
                sums[..., rows] *= (before - finite).exp()
        self.largest[..., rows] = largest
        return exponents.sub_(finite.unsqueeze(-1)).exp_()

    def log_mass(self) -> tuple[Tensor, Tensor]:
        """Return log B, 0 for an empty row, and which rows are empty."""
        empty = self.mass == 0
        added = torch.as_tensor(self.shift, dtype=self.mass.dtype) if self.largest is None else self.largest
        return (self.mass.masked_fill(empty, 1).log() + added).masked_fill(empty, 0), empty

    def prepare(self, output: Tensor, normaliser: Tensor, upstream: Tensor) -> None:
        # b / B = e^(exponent - shift) e^(shift - log B): the first factor belongs to the pair, the second to the row.
        # Where the forward pass had running maxima, log B itself is subtracted here, and the second factor is 1.
        self.subtracted = normaliser if self.shift is None else self.shift
        self.c = upstream if self.shift is None else upstream * (self.shift - normaliser).exp()
        self.d = self.c * output

    def base_again(self, tile: Tile, out: Tensor) -> Tensor:
        """Return the base in the backward pass, where the coefficients hold what `subtracted` takes from it."""
        exponents = tile.exponents(self.asked, out)
        if isinstance(self.subtracted, Tensor):
            exponents = tile.minus_infinity(exponents, self.asked)
            return exponents.sub_(self.subtracted[..., tile.rows].unsqueeze(-1)).exp_()
        return tile.zero(exponents.sub_(self.subtracted).exp_() if self.subtracted else exponents.exp_(), self.asked)


class _LogSumExp(_OfExponentials):
    def finish(self) -> tuple[Tensor, Tensor]:
        log_mass, empty = self.log_mass()
        return log_mass.masked_fill(empty, empty_logsumexp(log_mass.dtype)), log_mass.masked_fill(empty, torch.inf)

    def gradient(self, tile: Tile, out: Tensor, per_pair: PerPair) -> Tensor:
        to_exponent = self.base_again(tile, out).mul_(per_pair(self.c))
        tile.add_argument(self.asked, "scale", to_exponent, tile.s)
        tile.add_argument(self.asked, "log_weight", to_exponent)
        return to_exponent.mul_(tile.value(self.asked.scale))


class _SoftMean(_OfExponentials):
    def __init__(self, asked: Any, shift: float | None, zeros: Tensor) -> None:
        super().__init__(asked, shift, zeros)
        self.total = zeros.clone()

    def add_sums(self, base: Tensor, s: Tensor, anchors: slice, dim: int) -> None:
        super().add_sums(base, s, anchors, dim)
        assert self.total is not None
        self.total[..., anchors] += (base * s).sum(dim)

    def finish(self) -> tuple[Tensor, Tensor]:
        log_mass, empty = self.log_mass()
        assert self.total is not None
        return self.total / self.mass.masked_fill(empty, 1), log_mass.masked_fill(empty, torch.inf)

    def gradient(self, tile: Tile, out: Tensor, per_pair: PerPair) -> Tensor:
        base, c = self.base_again(tile, out), per_pair(self.c)
        if self.asked.detach:
            return base.mul_(c)
        to_exponent = (tile.s * c).sub_(per_pair(self.d)).mul_(base)
        tile.add_argument(self.asked, "scale", to_exponent, tile.s)
        return base.mul_(c).add_(to_exponent.mul_(tile.value(self.asked.scale)))


class _SoftplusSum(Formula):
    def base(self, tile: Tile, out: Tensor) -> Tensor:
        exponents = tile.exponents(self.asked, out)
        return tile.zero(softplus(exponents) if self.shift is None else exponents.exp_(), self.asked)

    def add_sums(self, base: Tensor, s: Tensor, anchors: slice, dim: int) -> None:  # noqa: ARG002
        self.mass[..., anchors] += base.sum(dim) if self.shift is None else sum_of_log1p(base, dim)

    def finish(self) -> tuple[Tensor, Tensor]:
        return self.mass, self.mass.new_empty(0)

    def gradient(self, tile: Tile, out: Tensor, per_pair: PerPair) -> Tensor:
        to_exponent = tile.zero(tile.exponents(self.asked, out).sigmoid_(), self.asked).mul_(per_pair(self.c))
        tile.add_argument(self.asked, "scale", to_exponent, tile.s)
        tile.add_argument(self.asked, "bias", to_exponent)
        return to_exponent.mul_(tile.value(self.asked.scale))


class _Mean(Formula):
    def __init__(self, asked: Any, shift: float | None, zeros: Tensor) -> None:
        super().__init__(asked, shift, zeros)
        self.total = zeros.clone()

    def base(self, tile: Tile, out: Tensor) -> Tensor:
        return tile.zero(tile.weights(self.asked, out), self.asked)

    def add_sums(self, base: Tensor, s: Tensor, anchors: slice, dim: int) -> None:
        super().add_sums(base, s, anchors, dim)
        self.total[..., anchors] += (base * s).sum(dim)

    def finish(self) -> tuple[Tensor, Tensor]:
        mass = self.mass.masked_fill(self.mass == 0, 1)
        return self.total / mass, mass

    def prepare(self, output: Tensor, normaliser: Tensor, upstream: Tensor) -> None:
        self.c = upstream / normaliser
        self.d = self.c * output

    def gradient(self, tile: Tile, out: Tensor, per_pair: PerPair) -> Tensor:
        c = per_pair(self.c)
        if self.asked.weight is not None:
            tile.add_argument(self.asked, "weight", tile.zero((tile.s * c).sub_(per_pair(self.d)), self.asked))
        return self.base(tile, out).mul_(c)


class _Count(Formula):
    def __init__(self, asked: Any, shift: float | None, zeros: Tensor) -> None:
        super().__init__(asked, shift, zeros.to(torch.int64))

    def base(self, tile: Tile, out: Tensor) -> Tensor:  # noqa: ARG002
        return tile.counts(self.asked)

    def add(self, tile: Tile, out: Tensor, rows: slice | None, columns: slice | None = None) -> Tensor:
        # `tile.counts` looks at the thresholds itself.
        counts = self.base(tile, out)
        for anchors, dim in ((rows, -1), (columns, -2)):
            if anchors is not None:
                self.add_sums(counts, tile.s, anchors, dim)
        return counts

    def finish(self) -> tuple[Tensor, Tensor]:
        return self.mass, self.mass.new_empty(0)

    def gradient(self, tile: Tile, out: Tensor, per_pair: PerPair) -> Tensor:
        raise NotImplementedError("a number of candidates has no gradient")


_FORMULAS: dict[type, type[Formula]] = {
    LogSumExp: _LogSumExp,
    SoftMean: _SoftMean,
    SoftplusSum: _SoftplusSum,
    Mean: _Mean,
    Count: _Count,
}


def formula(asked: Any, shift: float | None, zeros: Tensor) -> Formula:
    """Return the formula of a reduction, whose sums are still 0."""
    return _FORMULAS[type(asked)](asked, shift, zeros)


def sum_of_log1p(e: Tensor, dim: int) -> Tensor:
    """Compute sum log(1 + e) with an eighth of the logarithms: (1 + a)(1 + b) - 1 = a + b + ab."""
    product = e
    for _ in range(3):
        if product.shape[dim] % 2 or not product.shape[dim]:
            break
        first, second = product.chunk(2, dim)
        product = torch.addcmul(first + second, first, second)
    total = torch.log1p(product).sum(dim)
    return total if bool(torch.isfinite(total).all()) else torch.log1p(e).sum(dim)


def softplus(x: Tensor) -> Tensor:
    """Compute log(1 + e^x); above a threshold, whose default of 20 loses digits in float64, torch returns x."""
    return F.softplus(x, threshold=40)


def empty_logsumexp(dtype: torch.dtype) -> float:
    """Return the log-sum-exp over no candidates: finite, so that its differences are finite too."""
    return torch.finfo(dtype).min / 2
