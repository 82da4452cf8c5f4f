"""Operations on batches of series, (N, C, L) float32 with NaN where nothing was observed, random per sample.

NaN is the mask and is transformed with the values: padding stays at the end, a missing value moves with its
neighbours. A series' length is its last step with any observed channel, plus one; cropping, warping and permutation
are limited to these steps. No operation removes a series' last observation. Each class draws random numbers and passes
them to a deterministic function above it.

Example:
    >>> from contrast.views.series import ChannelDrop
    >>> ChannelDrop(p=1)(torch.ones(1, 2, 3), torch.Generator().manual_seed(0)).sum()
    tensor(3.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from contrast.views.draws import bernoulli, check_amount, check_range, check_share, normal, uniform
from contrast.views.views import SERIES, VIEWS, Operation


def lengths(x: Tensor) -> Tensor:
    """Return the lengths (N,) int64: the last step with any observed channel, plus one; 0 without observations."""
    observed = x.isnan().logical_not_().any(1)
    return (observed * torch.arange(1, x.shape[2] + 1, device=x.device)).amax(1)


def _keep_observed(changed: Tensor, x: Tensor) -> Tensor:
    """Return the changed series, or the original one if the changed one has no observation."""
    return torch.where(changed.isnan().all(2).all(1)[:, None, None], x, changed)


@VIEWS.register("jitter")
class Jitter(Operation):
    """Normally distributed noise added to every value.

    Args:
        sigma: its standard deviation, in standard deviations of the channel.
    """

    kinds = SERIES

    def __init__(self, sigma: float = 0.1) -> None:
        super().__init__()
        check_amount(sigma=sigma)
        self.sigma = sigma

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the noisy batch."""
        return x + normal(x, 0, self.sigma, generator, *x.shape)


@VIEWS.register("scaling")
class Scaling(Operation):
    """Every channel of every series multiplied by one factor.

    Args:
        sigma: the factor is drawn from a normal distribution with mean 1 and this standard deviation.
    """

    kinds = SERIES

    def __init__(self, sigma: float = 0.2) -> None:
        super().__init__()
        check_amount(sigma=sigma)
        self.sigma = sigma

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the scaled batch."""
        return x * normal(x, 1, self.sigma, generator, *x.shape[:2], 1)


def permute(x: Tensor, cuts: Tensor, ranks: Tensor) -> Tensor:
    """Return the series cut into segments in a new order, the same for all channels of a series.

    Args:
        x: (N, C, L).
        cuts: (N, S - 1), the steps before which a series is cut, in any order; S segments, empty ones allowed.
        ranks: (N, S) in [0, 1); segments are sorted by their rank.
    """
    step = torch.arange(x.shape[2], device=x.device)
    segment = (step[:, None] >= cuts[:, None, :]).sum(2)
    rank = ranks.gather(1, segment).masked_fill_(step >= lengths(x)[:, None], 2.0)
    source = rank.argsort(dim=1, stable=True)
    return x.gather(2, source[:, None].expand_as(x))


@VIEWS.register("permutation")
class Permutation(Operation):
    """The series cut at random steps, its segments in random order, the same for all channels.

    Args:
        max_segments: the number of segments is drawn from 1 to this; a short series may have fewer.
    """

    kinds = SERIES

    def __init__(self, max_segments: int = 5) -> None:
        super().__init__()
        if max_segments < 1:
            raise ValueError(f"max_segments must be at least 1; got {max_segments}.")
        self.max_segments = max_segments

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the permuted batch."""
        samples, most = len(x), self.max_segments
        inside = (lengths(x) - 1).clamp_(min=0)[:, None]
        cuts = (uniform(x, 0, 1, generator, samples, most - 1) * inside).floor_() + 1
        segments = (uniform(x, 0, 1, generator, samples, 1) * most).floor_() + 1
        unused = torch.arange(1, most, device=x.device) >= segments
        # A cut past the end has no effect.
        cuts = cuts.masked_fill_(unused, x.shape[2])
        return permute(x, cuts, uniform(x, 0, 1, generator, samples, most))


def resample(x: Tensor, positions: Tensor) -> Tensor:
    """Return the series at other positions, by linear interpolation; between a value and NaN the result is NaN.

    Args:
        x: (N, C, L).
        positions: (N, L), in steps from 0 to the series' length - 1; output steps past that length are NaN.
    """
    end = lengths(x)[:, None]
    positions = torch.minimum(positions.clamp(min=0), (end - 1).clamp(min=0))
    left = positions.floor()
    before = x.gather(2, left.long()[:, None].expand_as(x))
    # At a whole position both are that step, so that a gap next to it does not matter.
    after = x.gather(2, positions.ceil().long()[:, None].expand_as(x))
    past = torch.arange(x.shape[2], device=x.device) >= end
    return before.lerp_(after, (positions - left).masked_fill_(past, torch.nan)[:, None])


@VIEWS.register("crop_resize")
class CropResize(Operation):
    """A random window of the series, stretched to the series' length by linear interpolation.

    Args:
        scale: the window's share of the length, drawn uniformly from [low, high], in (0, 1].
    """

    kinds = SERIES

    def __init__(self, scale: tuple[float, float] = (0.5, 1.0)) -> None:
        super().__init__()
        check_range("scale", scale, most=1)
        self.scale = scale

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the stretched windows; a series with too many gaps for any interpolated value does not change."""
        last = (lengths(x) - 1).clamp_(min=0).to(x.dtype)[:, None]
        window = last * uniform(x, *self.scale, generator, len(x), 1)
        start = (last - window) * uniform(x, 0, 1, generator, len(x), 1)
        step = torch.arange(x.shape[2], device=x.device, dtype=x.dtype)
        return _keep_observed(resample(x, start + step * window / last.clamp(min=1)), x)


def mask_span(x: Tensor, start: Tensor, width: Tensor) -> Tensor:
    """Return the series with a span of steps unobserved (NaN) in all channels.

    Args:
        x: (N, C, L).
        start: (N,), the span's first step.
        width: (N,), its number of steps.
    """
    step = torch.arange(x.shape[2], device=x.device)
    inside = (step >= start[:, None]) & (step < (start + width)[:, None])
    return x.masked_fill(inside[:, None], torch.nan)


@VIEWS.register("time_mask")
class TimeMask(Operation):
    """A random span of the series, masked in all channels.

    Masked values become unobserved (NaN), not zero, which would be a value for the pooling. Use it last, since later
    operations treat a masked end as padding. A series whose every observation would be masked does not change.

    Args:
        share: the widest span, as a share of the length in [0, 1); its width is drawn uniformly from 0 to this.
        p: the probability per sample.
    """

    kinds = SERIES

    def __init__(self, share: float = 0.3, p: float = 0.5) -> None:
        super().__init__()
        check_share(p=p)
        if not 0 <= share < 1:
            raise ValueError(f"share is the largest masked share of a series, in [0, 1); got {share}.")
        self.share, self.p = share, p

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the batch with a span masked in a random subset of samples."""
        length = lengths(x)
        widest = (self.share * length).floor_()
        width = (uniform(x, 0, 1, generator) * (widest + 1)).floor_() * bernoulli(x, self.p, generator).view(-1)
        start = (uniform(x, 0, 1, generator) * (length - width + 1)).floor_()
        return _keep_observed(mask_span(x, start, width), x)


@VIEWS.register("channel_drop")
class ChannelDrop(Operation):
    """Random channels set to zero, their mean, but never all observed channels of a series; NaN stays NaN.

    Args:
        p: the probability per channel and series.
    """

    kinds = SERIES

    def __init__(self, p: float = 0.1) -> None:
        super().__init__()
        check_share(p=p)
        self.p = p

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the batch with random channels set to zero."""
        observed = x.isnan().logical_not_()
        drawn = uniform(x, 0, 1, generator, *x.shape[:2], 1)
        # The observed channel with the largest number is never dropped, so that one always remains.
        drawn = drawn.masked_fill_(~observed.any(2, keepdim=True), -1.0)
        drop = (drawn < self.p) & (drawn < drawn.amax(1, keepdim=True))
        return x.masked_fill(drop & observed, 0.0)


def interpolate_knots(knots: Tensor, length: Tensor, steps: int) -> Tensor:
    """Interpolate knots (N, ..., knots), evenly spaced over each sample's length, linearly to (N, ..., steps)."""
    intervals = knots.shape[-1] - 1
    step = torch.arange(steps, device=knots.device, dtype=knots.dtype)
    position = (step * intervals / (length - 1).clamp(min=1)[:, None]).clamp_(max=intervals)
    position = position.view(len(knots), *(1,) * (knots.dim() - 2), steps).expand(*knots.shape[:-1], steps)
    left = position.floor()
    return torch.lerp(knots.gather(-1, left.long()), knots.gather(-1, position.ceil().long()), position - left)


@VIEWS.register("magnitude_warp")
class MagnitudeWarp(Operation):
    """Every channel multiplied by a slowly varying random curve with mean 1.

    Args:
        sigma: the standard deviation of the curve's knots.
        knots: number of evenly spaced knots, at least 2, between which the curve is linear.
    """

    kinds = SERIES

    def __init__(self, sigma: float = 0.2, knots: int = 4) -> None:
        super().__init__()
        check_amount(sigma=sigma)
        if knots < 2:
            raise ValueError(f"knots must be at least 2; got {knots}.")
        self.sigma, self.knots = sigma, knots

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the warped batch."""
        knots = normal(x, 1, self.sigma, generator, *x.shape[:2], self.knots)
        return x * interpolate_knots(knots, lengths(x), x.shape[2])


@VIEWS.register("time_warp")
class TimeWarp(Operation):
    """The time axis warped by a slowly varying random speed; the first and the last step do not move.

    Args:
        sigma: the standard deviation of the logarithm of the speed at the knots.
        knots: number of evenly spaced knots, at least 2, between which the curve is linear.
    """

    kinds = SERIES

    def __init__(self, sigma: float = 0.2, knots: int = 4) -> None:
        super().__init__()
        check_amount(sigma=sigma)
        if knots < 2:
            raise ValueError(f"knots must be at least 2; got {knots}.")
        self.sigma, self.knots = sigma, knots

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the warped batch; a series with too many gaps for any interpolated value does not change."""
        length, steps = lengths(x), x.shape[2]
        speed = interpolate_knots(normal(x, 0, self.sigma, generator, len(x), self.knots).exp_(), length, steps)
        last = (length - 1).clamp_(min=0)[:, None]
        elapsed = torch.cat([torch.zeros_like(speed[:, :1]), speed[:, :-1].cumsum(1)], 1)
        return _keep_observed(resample(x, elapsed * (last / elapsed.gather(1, last).clamp(min=1e-30))), x)
