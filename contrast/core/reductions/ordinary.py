"""The way of the smallest sizes: ordinary operations on one matrix, which keep their own history.

Here a loss takes as long as Python takes to start its operations, and torch goes back through them without Python. Only
the product is a function of its own: autocast must not touch it on the way back, and a second derivative is refused
there, as on every other way.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from contrast.core.embeddings import full_precision
from contrast.core.reductions.asked import Count, Kth, LogSumExp, Mean, Reduction, SoftMean, SoftplusSum
from contrast.core.reductions.frames import Block
from contrast.core.reductions.matrix import ALONE, Matrix
from contrast.core.reductions.shares import logits, scalar, softplus
from contrast.core.reductions.work import Once, Work, first_only, nothing, saved

if TYPE_CHECKING:
    from contrast.core.pairs import Pairs


PASSES = 4
"""So many times fewer similarities where there are thresholds or weights."""


def reduce(pairs: Pairs, asked: Sequence[Reduction], size: int) -> tuple[Tensor, ...] | None:
    """Give each reduction, (N,) or (H, N); None where more than `size` similarities would stand in the matrix.

    Args:
        pairs: anchors and candidates.
        asked: the reductions.
        size: how many similarities at most.
    """
    z = [pairs.anchor.z, *(part.z.detach() if part.fixed else part.z for part in pairs.candidates)]
    if torch._C._are_functorch_transforms_active() or len(pairs) * sum(part.shape[-2] for part in z[1:]) > 4 * size:
        return None
    with full_precision(z[0]):
        wide = [part if part.dtype in (torch.float32, torch.float64) else part.float() for part in z]
        work = Work(pairs, list(asked), wide[0], wide[1:], [part.requires_grad for part in wide], set())
        if not Ordinary.accepts(work):
            return None
        # Thresholds and weights go through the matrix more often, and less often by hand.
        size //= PASSES if any(map(_passes_often, asked)) else 1
        made = Ordinary(work, list(range(len(asked))))
        return made.reduce() if made.size <= size else None


class Ordinary(Matrix):
    """All reductions of a very small call.

    Args:
        work: the whole call, with history.
        numbers: which of its reductions.
    """

    any_exponent = True

    def reduce(self) -> tuple[Tensor, ...] | None:
        """Give the reductions; None where an anchor of a folded matrix may have no candidate."""
        self._read()
        if any(block.both and block.lacking for block in self.blocks):
            return None
        s = self._similarities() if self.frame is not None else self.work.x
        near = self._near(s) if any(self.alone) else s
        self._settle(s.detach())
        found = []
        for place, (asked, block) in enumerate(zip(self.asked, self.blocks, strict=True)):
            if block is ALONE:
                found.append(self._of_one(asked, near))
            else:
                found.append(self._widened(place, self._reduce(place, asked, block.of(s), block), block))
        return tuple(found)

    def _similarities(self) -> Tensor:
        """Give the matrix; the next call about the same pairs finds it."""
        assert self.frame is not None
        work = self.work
        history = torch.is_grad_enabled() and (work.wants_anchor or any(work.wants_part))
        kept: dict[Any, tuple[Tensor, Once]] = work.pairs.__dict__.setdefault("live", {})
        known, once = kept.get(self.frame.key, (None, None))
        if known is None or once is None or (history and (once.used or not known.requires_grad)):
            # What is put together here is a copy: the numbers would stay right, but only in small calls.
            once = Once(work.parts[work.mirrored :] if history else ())
            known = self.frame.similarities(partial(_similarity, once))
            kept[self.frame.key] = known, once
        return known if history or not known.requires_grad else known.detach()

    def _near(self, s: Tensor) -> Tensor:
        """Give the similarities of single positives, (N,) or (H, N)."""
        if self.flat is not None:
            return s.flatten(-2).index_select(-1, self.flat)
        work, positive = self.work, self._positive()
        assert positive is not None
        pieces = positive.pieces(work.starts)
        if all(isinstance(where, slice) for where, *_ in pieces):
            pieces = sorted(pieces, key=lambda piece: piece[0].start)
            order = None
        else:
            order = torch.cat([torch.arange(len(positive))[where] for where, *_ in pieces]).argsort()
        found = [_dots(work.x[..., rows, :], work.parts[part][..., columns, :]) for _, rows, part, columns in pieces]
        near = found[0] if len(found) == 1 else torch.cat(found or [work.x.sum(dim=-1)], dim=-1)
        return near if order is None else near[..., order]

    def _of_one(self, asked: Any, near: Tensor) -> Tensor:
        """Give a reduction of one similarity a row."""
        if isinstance(asked, Mean):
            value = near
        elif isinstance(asked, SoftMean):
            value = near + 0 * scalar(asked.scale) if isinstance(asked.scale, Tensor) else near
        else:
            value = near * scalar(asked.scale)
        if isinstance(asked, SoftplusSum):
            value = softplus(value + asked.bias)
        if asked.rows is None:
            return value
        return torch.where(asked.rows, value, nothing(value.dtype) if isinstance(asked, LogSumExp) else 0)

    def _reduce(self, place: int, asked: Any, s: Tensor, block: Block) -> Tensor:
        if isinstance(asked, Count | Kth):
            return self._ordered(place, s.detach(), block)
        if isinstance(asked, SoftplusSum):
            given = self._given(asked)
            if isinstance(given.scale, Tensor) and isinstance(given.bias, Tensor):
                exponent = torch.addcmul(given.bias, s, given.scale)
            else:
                exponent = logits(s, given)
            each, ones = softplus(exponent), block.ones(s)
            return block.sum(each if ones is None else each * ones)
        if isinstance(asked, Mean):
            return self._mean(place, asked, s, block)
        if isinstance(asked, LogSumExp) and self._is_plain(place) and self._in_range(place):
            return self._log_of_sum(asked, s, block)
        exponent, empty = self._exponent(place, asked, s, block)
        if isinstance(asked, LogSumExp):
            value = torch.logsumexp(exponent, dim=-1)
            if block.both:
                return torch.cat([value, torch.logsumexp(exponent, dim=-2)], dim=-1)
            return value if empty is None else value.masked_fill(empty, nothing(value.dtype))
        found = [self._soft_mean(asked, exponent, s, dim, empty) for dim in ((-1, -2) if block.both else (-1,))]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)

    def _log_of_sum(self, asked: LogSumExp, s: Tensor, block: Block) -> Tensor:
        """Give a log-sum-exp whose exponentials need no maximum."""
        e = self._scaled(asked, s, block).exp()
        if isinstance(asked.above, Tensor):
            e = e * torch.ge(s.detach(), asked.above.unsqueeze(-1), out=torch.empty_like(s))
        mass = block.sum(e)
        if not block.lacking and asked.above is None:
            return mass.log()
        value = mass.clamp(min=torch.finfo(s.dtype).tiny).log()
        return value.masked_fill(mass.detach() == 0, nothing(s.dtype))

    def _scaled(self, asked: Any, s: Tensor, block: Block) -> Tensor:
        """Give scale * s + log_weight, -inf where a pair does not count."""
        far = block.far(s)
        if far is not None and isinstance(asked.scale, float) and getattr(asked, "log_weight", None) is None:
            return torch.add(far, s, alpha=asked.scale)
        exponent = logits(s, self._given(asked))
        return exponent if far is None else exponent + far

    @staticmethod
    def _soft_mean(asked: SoftMean, exponent: Tensor, s: Tensor, dim: int, empty: Tensor | None) -> Tensor:
        p = torch.softmax(exponent.detach() if asked.detach else exponent, dim=dim)
        value = (p * s).sum(dim=dim)
        return value if empty is None else torch.where(empty, 0, value)

    def _exponent(self, place: int, asked: Any, s: Tensor, block: Block) -> tuple[Tensor, Tensor | None]:
        """Give scale * s + log_weight, -inf where a pair does not count, and which rows are empty (theirs is 0)."""
        if getattr(asked, "above", None) is None:
            exponent = self._scaled(asked, s, block)
            blank = None if block.counts is None else ~block.counts if block.lacking else None
        else:
            counts = self._counting(place, s.detach(), block)
            assert counts is not None
            blank = ~counts
            exponent = logits(s, self._given(asked)).masked_fill(blank, -torch.inf)
        if blank is None:
            return exponent, None
        empty = blank.all(dim=-1)
        return exponent.masked_fill(empty.unsqueeze(-1), 0), empty.expand(exponent.shape[:-1])

    def _mean(self, place: int, asked: Mean, s: Tensor, block: Block) -> Tensor:
        if asked.weight is None and asked.above is None:
            ones = block.ones(s)
            total: Tensor = block.sum(s if ones is None else ones * s) * block.share(s)
            return total
        counts = self._counting(place, s.detach(), block)
        weight = torch.as_tensor(self._weight(place), dtype=s.dtype, device=s.device)
        weight = weight + s.new_zeros(s.shape[-2:]) if counts is None else torch.where(counts, weight, 0)
        mass = weight.sum(dim=-1)
        return (weight * s).sum(dim=-1) / mass.where(mass != 0, 1)

    def _widened(self, place: int, output: Tensor, block: Block) -> Tensor:
        """Give a reduction of some anchors for all of them."""
        if block.anchors is None:
            return output
        nobody = nothing(output.dtype) if isinstance(self.asked[place], LogSumExp) else 0.0
        return F.pad(output, (block.anchors.start, self.work.x.shape[-2] - block.anchors.stop), value=nobody)


def _passes_often(asked: Any) -> bool:
    weighed = getattr(asked, "weight", None) is not None
    return weighed or isinstance(asked, Kth) or getattr(asked, "above", None) is not None


def _dots(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=-1)


def _similarity(once: Once, a: Tensor, b: Tensor) -> Tensor:
    found: Tensor = _Square.apply(once, a) if a is b else _Similarity.apply(once, a, b)
    return found


class _Similarity(torch.autograd.Function):
    """a b^T."""

    @staticmethod
    def forward(ctx: Any, once: Once, a: Tensor, b: Tensor) -> Tensor:
        ctx.once = once
        ctx.save_for_backward(a, b)
        return a @ b.mT

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        a, b = saved(ctx)
        _, of_a, of_b = ctx.needs_input_grad
        ctx.once.use()

        def gradients(g: Tensor) -> tuple[Tensor | None, ...]:
            with full_precision(g):
                to_a = (g @ b).sum_to_size(a.shape) if of_a else None
                return to_a, (g.mT @ a).sum_to_size(b.shape) if of_b else None

        return (None, *first_only(gradients, [a, b], *upstream))


class _Square(torch.autograd.Function):
    """x x^T."""

    @staticmethod
    def forward(ctx: Any, once: Once, x: Tensor) -> Tensor:
        ctx.once = once
        ctx.save_for_backward(x)
        return x @ x.mT

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = saved(ctx)
        ctx.once.use()

        def gradients(g: Tensor) -> tuple[Tensor | None, ...]:
            with full_precision(g):
                return ((g + g.mT) @ x,)

        return (None, *first_only(gradients, [x], *upstream))
