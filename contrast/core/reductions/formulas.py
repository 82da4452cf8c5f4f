r"""How a reduction is computed from tiles of similarities: its base for each pair, its sums per row, its derivative.

For every reduction R_i of the row s_i1, ..., s_iM, with upstream gradient g_i = dL/dR_i, the gradient of a pair is

.. math:: \frac{\partial L}{\partial s_{ij}} = b_{ij} \, (c_i + d_i s_{ij})

with a *base* b that depends on the pair, and two *coefficients* c, d that depend on the row:

=========== =============================== ========================= ============================= =============
reduction   base b                          sums per row              c                             d
=========== =============================== ========================= ============================= =============
LogSumExp   e^(scale s + log_weight)        B = sum b                 scale g / B
SoftMean    e^(scale s)                     B, T = sum b s            (1 - scale T / B) g / B       scale g / B
SoftplusSum sigmoid(scale s + bias)         sum log(1 + e^(...))      scale g
Mean        weight                          B, T                      g / B
=========== =============================== ========================= ============================= =============

(LogSumExp is log B, SoftMean and Mean are T / B.) Where the anchors are the candidates, s_ij = s_ji and the base is
symmetric. Then one tile serves the rows of its anchors and those of its candidates: its column sums are added to the
sums of the candidates, and its gradient is b_ij (c_i + c_j + (d_i + d_j) s_ij).

**Range.** e^x must neither overflow nor vanish. |s_ij| is at most the product of the longest vectors, so that where the
scale is a number, |scale s_ij| <= reach is known before any tile. Up to WIDEST nothing needs to be done. Beyond it the
*fixed shift* reach - WIDEST is subtracted from all exponents: sums cannot overflow, and the base stays symmetric. A row
whose sum is smaller than e^FAINT may have lost terms; then everything is computed again with *running maxima*: each row
carries its largest exponent so far, and its sums are scaled down when a larger one comes (one direction only).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from contrast.core.reductions.kinds import Count, LogSumExp, Mean, SoftMean, SoftplusSum, is_number
from contrast.core.reductions.tile import Tile

WIDEST = {torch.float32: 75.0, torch.float64: 650.0}
"""e^x, and sums of a hundred thousand of them, are normal numbers for |x| up to this."""
FAINT = -60.0
"""A shifted sum below e^FAINT may have lost terms."""


def shift_of(asked: Any, longest: float, dtype: torch.dtype) -> float | None:
    """Return what is subtracted from a reduction's exponents; None where they have no known bound.

    Args:
        asked: the reduction.
        longest: the length of the longest anchor times that of the longest candidate, inf for unknown.
        dtype: float32 or float64.
    """
    if isinstance(asked, Mean | Count):
        return 0.0
    if not (math.isfinite(longest) and is_number(asked.scale)) or getattr(asked, "log_weight", None) is not None:
        return None
    beyond = longest * float(torch.as_tensor(asked.scale).abs().max()) - WIDEST[dtype]
    if isinstance(asked, SoftplusSum):
        bias = torch.as_tensor(asked.bias)
        return 0.0 if beyond + (float(bias.max()) if bias.numel() else 0.0) <= 0 else None
    return max(0.0, beyond)


class Sums:
    """The sums per row of one reduction, to which tiles are added.

    Args:
        asked: the reduction.
        shift: what is subtracted from its exponents; None for running maxima.
        zeros: (N,) or (H, N).
    """

    def __init__(self, asked: Any, shift: float | None, zeros: Tensor) -> None:
        self.asked, self.shift = asked, shift
        self.mass = zeros.to(torch.int64 if isinstance(asked, Count) else zeros.dtype, copy=True)
        self.total = zeros.clone() if isinstance(asked, SoftMean | Mean) else None
        running = shift is None and isinstance(asked, LogSumExp | SoftMean)
        self.largest = zeros - torch.inf if running else None
        self.heads_agree = isinstance(asked, Count) and asked.above is None
        """True if a count is the same for all heads."""

    def add(self, tile: Tile, out: Tensor, rows: slice | None, columns: slice | None = None) -> Tensor:
        """Add a tile to the sums of its anchors, of its candidates, or of both, and return its base.

        Args:
            tile: the tile.
            out: a tensor like the similarities, which is overwritten.
            rows: the anchors, among all, whose sums the tile's rows belong to; None for none.
            columns: the anchors whose sums the tile's columns belong to.
        """
        asked = self.asked
        if isinstance(asked, Count):
            base = tile.counts(asked)
            self.heads_agree = self.heads_agree and base.ndim == 2
        elif isinstance(asked, SoftplusSum) and self.shift is None:
            base = tile.zero(softplus(tile.exponents(asked, out)), asked)
        elif isinstance(asked, Mean):
            base = tile.zero(tile.weights(asked, out), asked)
        elif self.largest is None:
            exponents = tile.exponents(asked, out)
            base = tile.zero((exponents.sub_(self.shift) if self.shift else exponents).exp_(), asked)
        else:
            base = self._relative_to_largest(tile.minus_infinity(tile.exponents(asked, out), asked), tile.rows)
        for anchors, dim in ((rows, -1), (columns, -2)):
            if anchors is not None:
                reached = None if isinstance(asked, Count) else tile.reached(asked, anchors, dim)
                own = base if reached is None else reached.mul_(base)
                as_product = isinstance(asked, SoftplusSum) and self.shift is not None
                self.mass[..., anchors] += sum_of_log1p(own, dim) if as_product else own.sum(dim)
                if self.total is not None:
                    self.total[..., anchors] += (own * tile.s).sum(dim)
        return base

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

    def faint(self) -> Tensor | None:
        """Return the rows that may have lost terms which were too small beside the shift; None for none."""
        return self.mass < math.exp(FAINT) if self.shift else None

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return the reduction, and its normaliser for the backward pass: log B, inf for an empty row; a mean's B."""
        asked, mass = self.asked, self.mass
        if isinstance(asked, Count):
            return mass[0] if self.heads_agree and mass.ndim == 2 else mass, mass.new_empty(0)
        if isinstance(asked, SoftplusSum):
            return mass, mass.new_empty(0)
        empty = mass == 0
        mass = mass.masked_fill(empty, 1)
        if isinstance(asked, Mean):
            assert self.total is not None
            return self.total / mass, mass
        value = mass.log() + (self.shift or 0.0 if self.largest is None else self.largest.masked_fill(empty, 0))
        normaliser = value.masked_fill(empty, torch.inf)
        if self.total is not None:
            return self.total / mass, normaliser
        return value.masked_fill(empty, empty_logsumexp(value.dtype)), normaliser


class Derivative:
    """The derivative of one reduction: its coefficients c and d for each row, without the scale.

    Args:
        asked: the reduction.
        shift: that of its sums.
        output: the reduction.
        normaliser: what `Sums.finish` returned with it.
        upstream: g = dL/d(reduction).
    """

    def __init__(self, asked: Any, shift: float | None, output: Tensor, normaliser: Tensor, upstream: Tensor) -> None:
        self.asked, self.output, self.c = asked, output, upstream
        self.d: Tensor | None = None
        self.minus: Tensor | float = 0.0
        if isinstance(asked, Mean):
            self.c = upstream / normaliser
        elif isinstance(asked, LogSumExp | SoftMean):
            # b / B = e^(exponent - shift) e^(shift - log B): the first belongs to the pair, the second to the row.
            self.minus = normaliser if shift is None else shift
            self.c = upstream if shift is None else upstream * (shift - normaliser).exp()
            self.d = self.c * output if isinstance(asked, SoftMean) and not asked.detach else None

    def of_tile(self, tile: Tile, out: Tensor, per_pair: Callable[[Tensor], Tensor]) -> Tensor:
        """Return dL/ds of a tile, and add dL/d(argument) to the tile's.

        Args:
            tile: the tile.
            out: a tensor like the similarities, which is overwritten.
            per_pair: spreads a number per row over the tile: of its anchor, its candidate, or their sum.
        """
        asked, s, c = self.asked, tile.s, per_pair(self.c)
        if isinstance(asked, Mean):
            base = tile.weights(asked, out)
            if asked.weight is not None:
                tile.add_argument(asked, "weight", tile.zero(s - per_pair(self.output), asked), c)
            return tile.zero(base, asked).mul_(c)
        base = tile.exponents(asked, out)
        if isinstance(asked, SoftplusSum):
            base = tile.zero(base.sigmoid_(), asked)
        elif isinstance(self.minus, Tensor):
            base = tile.minus_infinity(base, asked).sub_(self.minus[..., tile.rows].unsqueeze(-1)).exp_()
        else:
            base = tile.zero((base.sub_(self.minus) if self.minus else base).exp_(), asked)
        scale = tile.value(asked.scale)
        if isinstance(asked, SoftMean) and asked.detach:
            return base.mul_(c)
        if self.d is None:
            to_exponent = base.mul_(c)
            tile.add_argument(asked, "scale", to_exponent, s)
            tile.add_argument(asked, "bias" if isinstance(asked, SoftplusSum) else "log_weight", to_exponent)
            return to_exponent.mul_(scale)
        # b (c + scale (c s - d)): the first part is that of s_ij itself, the second that of its softmax weight.
        around = (s * c).sub_(per_pair(self.d)).mul_(base)
        tile.add_argument(asked, "scale", around, s)
        return base.mul_(c).add_(around.mul_(scale))


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
