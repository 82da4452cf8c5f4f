r"""How each reduction and its gradient are computed from tiles: one class per reduction.

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
is a factor of B too, and cancels.) The gradients of arguments are linear in them too: b c for a log_weight or bias,
b c s for a scale, c s - d for a weight.

**Symmetric tiles.** Where the anchors are the candidates, s_ij = s_ji, and the base is the same for both. Then one tile
serves the rows of its anchors and those of its candidates: its column sums are added to the sums of the candidates, and
its gradient is the formula above with c_i + c_j and d_i + d_j.

**Range.** e^x must neither overflow nor vanish. |s_ij| is at most the product of the longest vectors, so that for a
scale that is a number a bound |scale s_ij| <= reach is known before any tile. If reach <= WIDEST, no shift is needed.
Otherwise the *fixed shift* reach - WIDEST is subtracted from all exponents: sums cannot overflow, and the base stays
symmetric. A row whose sum is smaller than e^UNDERFLOW may have lost terms; then everything is computed again with
*running maxima*: each row has its largest exponent so far, and a larger one scales its sums down. Their tiles serve
their rows only.
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
"""A shifted sum below e^UNDERFLOW may have lost terms; in float64 that is rare."""

PerPair = Callable[[Tensor], Tensor]
"""Broadcasts a number per anchor over a tile: that of the pair's anchor, of its candidate, or the sum of both."""


def shift_of(reduction: Any, longest: float, dtype: torch.dtype) -> float | None:
    """Return the fixed shift of a reduction's exponents; None if these have no known bound.

    Args:
        reduction: the reduction.
        longest: the length of the longest anchor times that of the longest candidate, inf if unknown.
        dtype: float32 or float64.
    """
    if isinstance(reduction, Mean | Count):
        return 0.0  # no exponents
    if not math.isfinite(longest) or not is_number(reduction.scale):
        return None
    if getattr(reduction, "log_weight", None) is not None:
        return None
    beyond = longest * float(torch.as_tensor(reduction.scale).abs().max()) - WIDEST[dtype]
    if isinstance(reduction, SoftplusSum):
        # log(1 + e^x) has no shift: e^x is in range, or is not computed.
        bias = torch.as_tensor(reduction.bias)
        return 0.0 if beyond + (float(bias.max()) if bias.numel() else 0.0) <= 0 else None
    return max(0.0, beyond)


class Formula(ABC):
    """The sums of a reduction over tiles, and its gradient.

    The forward pass calls `add` for every tile, then `finish`; the backward pass calls `prepare`, then `gradient` for
    every tile.

    Args:
        reduction: the reduction.
        shift: what is subtracted from its exponents; None for running maxima.
        zeros: (N,) or (H, N).
    """

    def __init__(self, reduction: Any, shift: float | None, zeros: Tensor) -> None:
        self.reduction, self.shift = reduction, shift
        self.mass = zeros.clone()
        """B, with the base as it is computed (see Range); the only sum of a SoftplusSum or a Count."""
        self.c = self.d = zeros

    @abstractmethod
    def base(self, tile: Tile, out: Tensor) -> Tensor:
        """Write the base of each pair into `out`, 0 where a pair does not count."""

    def add(self, tile: Tile, out: Tensor, rows: slice | None, columns: slice | None = None) -> Tensor:
        """Add a tile to the sums of its anchors, of its candidates, or of both; return the base.

        Args:
            tile: the tile.
            out: a tensor like the similarities, which is overwritten.
            rows: the anchors, among all, to whose sums the tile's rows are added; None for none.
            columns: the anchors to whose sums the tile's columns are added; None for none.
        """
        base = self.base(tile, out)
        for anchors, dim in ((rows, -1), (columns, -2)):
            if anchors is not None:
                reached = tile.reached(self.reduction, anchors, dim)
                self.add_sums(base if reached is None else reached.mul_(base), tile.s, anchors, dim)
        return base

    def add_sums(self, base: Tensor, s: Tensor, anchors: slice, dim: int) -> None:  # noqa: ARG002
        """Add the sums over one dimension of a tile to those of its anchors."""
        self.mass[..., anchors] += base.sum(dim)

    def underflowed(self) -> Tensor | None:
        """Return the rows that may have lost terms which were too small after the shift; None for none."""
        return self.mass < math.exp(UNDERFLOW) if self.shift else None

    @abstractmethod
    def finish(self) -> tuple[Tensor, Tensor]:
        """Return the reduction, and a normaliser for `prepare`."""

    def prepare(self, output: Tensor, normaliser: Tensor, upstream: Tensor) -> None:  # noqa: ARG002
        """Compute the coefficients c and d of each row.

        Args:
            output: the reduction.
            normaliser: the second result of `finish`.
            upstream: g, the gradient of the reduction.
        """
        self.c = upstream

    @abstractmethod
    def gradient(self, tile: Tile, out: Tensor, per_pair: PerPair) -> Tensor:
        """Return dL/ds of a tile, which may be `out`, and add the gradients of the arguments to the tile's."""


class _OfExponentials(Formula):
    """Shared by LogSumExp and SoftMean: a base e^exponent, whose sum must stay in range."""

    def __init__(self, reduction: Any, shift: float | None, zeros: Tensor) -> None:
        super().__init__(reduction, shift, zeros)
        self.largest = zeros - torch.inf if shift is None else None
        self.total: Tensor | None = None
        self.subtracted: Tensor | float = 0.0

    def base(self, tile: Tile, out: Tensor) -> Tensor:
        exponents = tile.exponents(self.reduction, out)
        if self.shift is None:
            return self._relative_to_largest(tile.minus_infinity(exponents, self.reduction), tile.rows)
        if self.shift:
            exponents.sub_(self.shift)
        return tile.zero(exponents.exp_(), self.reduction)

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
        # b / B = e^(exponent - shift) e^(shift - log B): one factor per pair and one per row. If the forward pass had
        # running maxima, log B is subtracted from the exponents, and the second factor is 1.
        self.subtracted = normaliser if self.shift is None else self.shift
        self.c = upstream if self.shift is None else upstream * (self.shift - normaliser).exp()
        self.d = self.c * output

    def base_again(self, tile: Tile, out: Tensor) -> Tensor:
        """Return e^(exponent - subtracted), the base in the backward pass; the coefficients contain the rest."""
        exponents = tile.exponents(self.reduction, out)
        if isinstance(self.subtracted, Tensor):
            exponents = tile.minus_infinity(exponents, self.reduction)
            return exponents.sub_(self.subtracted[..., tile.rows].unsqueeze(-1)).exp_()
        if self.subtracted:
            exponents.sub_(self.subtracted)
        return tile.zero(exponents.exp_(), self.reduction)


class _LogSumExp(_OfExponentials):
    def finish(self) -> tuple[Tensor, Tensor]:
        log_mass, empty = self.log_mass()
        return log_mass.masked_fill(empty, empty_logsumexp(log_mass.dtype)), log_mass.masked_fill(empty, torch.inf)

    def gradient(self, tile: Tile, out: Tensor, per_pair: PerPair) -> Tensor:
        to_exponent = self.base_again(tile, out).mul_(per_pair(self.c))
        tile.add_argument(self.reduction, "scale", to_exponent, tile.s)
        tile.add_argument(self.reduction, "log_weight", to_exponent)
        return to_exponent.mul_(tile.value(self.reduction.scale))


class _SoftMean(_OfExponentials):
    def __init__(self, reduction: Any, shift: float | None, zeros: Tensor) -> None:
        super().__init__(reduction, shift, zeros)
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
        if self.reduction.detach:
            return base.mul_(c)
        to_exponent = (tile.s * c).sub_(per_pair(self.d)).mul_(base)
        tile.add_argument(self.reduction, "scale", to_exponent, tile.s)
        return base.mul_(c).add_(to_exponent.mul_(tile.value(self.reduction.scale)))


class _SoftplusSum(Formula):
    def base(self, tile: Tile, out: Tensor) -> Tensor:
        exponents = tile.exponents(self.reduction, out)
        return tile.zero(softplus(exponents) if self.shift is None else exponents.exp_(), self.reduction)

    def add_sums(self, base: Tensor, s: Tensor, anchors: slice, dim: int) -> None:  # noqa: ARG002
        self.mass[..., anchors] += base.sum(dim) if self.shift is None else sum_of_log1p(base, dim)

    def finish(self) -> tuple[Tensor, Tensor]:
        return self.mass, self.mass.new_empty(0)

    def gradient(self, tile: Tile, out: Tensor, per_pair: PerPair) -> Tensor:
        to_exponent = tile.zero(tile.exponents(self.reduction, out).sigmoid_(), self.reduction).mul_(per_pair(self.c))
        tile.add_argument(self.reduction, "scale", to_exponent, tile.s)
        tile.add_argument(self.reduction, "bias", to_exponent)
        return to_exponent.mul_(tile.value(self.reduction.scale))


class _Mean(Formula):
    def __init__(self, reduction: Any, shift: float | None, zeros: Tensor) -> None:
        super().__init__(reduction, shift, zeros)
        self.total = zeros.clone()

    def base(self, tile: Tile, out: Tensor) -> Tensor:
        return tile.zero(tile.weights(self.reduction, out), self.reduction)

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
        if self.reduction.weight is not None:
            tile.add_argument(self.reduction, "weight", tile.zero((tile.s * c).sub_(per_pair(self.d)), self.reduction))
        return self.base(tile, out).mul_(c)


class _Count(Formula):
    def __init__(self, reduction: Any, shift: float | None, zeros: Tensor) -> None:
        super().__init__(reduction, shift, zeros.to(torch.int64))

    def base(self, tile: Tile, out: Tensor) -> Tensor:  # noqa: ARG002
        return tile.counts(self.reduction)

    def add(self, tile: Tile, out: Tensor, rows: slice | None, columns: slice | None = None) -> Tensor:
        # `tile.counts` includes the thresholds.
        counts = self.base(tile, out)
        for anchors, dim in ((rows, -1), (columns, -2)):
            if anchors is not None:
                self.add_sums(counts, tile.s, anchors, dim)
        return counts

    def finish(self) -> tuple[Tensor, Tensor]:
        return self.mass, self.mass.new_empty(0)

    def gradient(self, tile: Tile, out: Tensor, per_pair: PerPair) -> Tensor:
        raise NotImplementedError("a count has no gradient")


_FORMULAS: dict[type, type[Formula]] = {
    LogSumExp: _LogSumExp,
    SoftMean: _SoftMean,
    SoftplusSum: _SoftplusSum,
    Mean: _Mean,
    Count: _Count,
}


def formula(reduction: Any, shift: float | None, zeros: Tensor) -> Formula:
    """Return the formula of a reduction, with sums of 0."""
    return _FORMULAS[type(reduction)](reduction, shift, zeros)


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
    """Compute log(1 + e^x); torch returns x above a threshold, whose default of 20 loses digits in float64."""
    return F.softplus(x, threshold=40)


def empty_logsumexp(dtype: torch.dtype) -> float:
    """Return the log-sum-exp over no candidates: finite, so that differences are finite too."""
    return torch.finfo(dtype).min / 2
