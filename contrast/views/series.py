"""Operations on batches of series, (N, C, L) float32 with NaN where nothing was observed, random per sample.

NaN is the mask and travels: padding at the end stays at the end, a missing value moves with its neighbours. A series'
length is its last step with any observed channel, plus one; only so many steps are cropped, warped or permuted.
No operation takes a series' last observation. Each class draws its numbers and hands them to a function above it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from contrast.views.draws import chance, check_amount, check_range, check_share, normal, uniform
from contrast.views.views import SERIES, VIEWS, Operation


def lengths(x: Tensor) -> Tensor:
    """Give (N,) int64: the last step with any observed channel, plus one; 0 where nothing was observed."""
    observed = x.isnan().logical_not_().any(1)
    return (observed * torch.arange(1, x.shape[2] + 1, device=x.device)).amax(1)


def _keep_observed(changed: Tensor, x: Tensor) -> Tensor:
    """Give the changed series, and the original one where no observation is left."""
    return torch.where(changed.isnan().all(2).all(1)[:, None, None], x, changed)


@VIEWS.register("jitter")
class Jitter(Operation):
    """Normal noise on every value.

    Args:
        sigma: its standard deviation, in standard deviations of the channel.
    """

    kinds = SERIES

    def __init__(self, sigma: float = 0.1) -> None:
        super().__init__()
        check_amount(sigma=sigma)
        self.sigma = sigma

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Give the noisy batch."""
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
        """Give the scaled batch."""
        return x * normal(x, 1, self.sigma, generator, *x.shape[:2], 1)


def permute(x: Tensor, cuts: Tensor, ranks: Tensor) -> Tensor:
    """Give the series cut into segments that stand in a new order, the same for all channels of a series.

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
    """The series cut at random steps, its segments in random order; all channels move together.

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
        """Give the permuted batch."""
        samples, most = len(x), self.max_segments
        inside = (lengths(x) - 1).clamp_(min=0)[:, None]
        cuts = (uniform(x, 0, 1, generator, samples, most - 1) * inside).floor_() + 1
        segments = (uniform(x, 0, 1, generator, samples, 1) * most).floor_() + 1
        unused = torch.arange(1, most, device=x.device) >= segments
        # A cut past the end cuts nothing.
        cuts = cuts.masked_fill_(unused, x.shape[2])
        return permute(x, cuts, uniform(x, 0, 1, generator, samples, most))


def resample(x: Tensor, positions: Tensor) -> Tensor:
    """Give the series read at other positions, by linear interpolation; between a value and NaN lies NaN.

    Args:
        x: (N, C, L).
        positions: (N, L), where to read, in steps from 0 to the series' length - 1; past that length nothing is read.
    """
    end = lengths(x)[:, None]
    positions = torch.minimum(positions.clamp(min=0), (end - 1).clamp(min=0))
    left = positions.floor()
    before = x.gather(2, left.long()[:, None].expand_as(x))
    # On a step itself both are that step, so that a gap beside it does not matter.
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
        """Give the stretched windows; a series too full of gaps to be interpolated at all stays as it is."""
        last = (lengths(x) - 1).clamp_(min=0).to(x.dtype)[:, None]
        window = last * uniform(x, *self.scale, generator, len(x), 1)
        start = (last - window) * uniform(x, 0, 1, generator, len(x), 1)
        step = torch.arange(x.shape[2], device=x.device, dtype=x.dtype)
        return _keep_observed(resample(x, start + step * window / last.clamp(min=1)), x)


def hide(x: Tensor, start: Tensor, width: Tensor) -> Tensor:
    """Give the series with a span of steps unobserved (NaN) in all channels.

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
    """A random span of the series, hidden in all channels.

    Hidden is unobserved (NaN), not zero: zero is a value, and pooling has to know that there is none. It belongs at
    the end of a row of operations, since whoever comes later takes a hidden end for padding. A series whose every
    observation would be hidden stays as it is.

    Args:
        share: the widest span, as a share of the length in [0, 1); its width is drawn uniformly from 0 to this.
        p: the probability for each sample.
    """

    kinds = SERIES

    def __init__(self, share: float = 0.3, p: float = 0.5) -> None:
        super().__init__()
        check_share(p=p)
        if not 0 <= share < 1:
            raise ValueError(f"share is the hidden share of a series, in [0, 1); got {share}.")
        self.share, self.p = share, p

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Give the batch with a span of each picked sample hidden."""
        length = lengths(x)
        widest = (self.share * length).floor_()
        width = (uniform(x, 0, 1, generator) * (widest + 1)).floor_() * chance(x, self.p, generator).view(-1)
        start = (uniform(x, 0, 1, generator) * (length - width + 1)).floor_()
        return _keep_observed(hide(x, start, width), x)


@VIEWS.register("channel_drop")
class ChannelDrop(Operation):
    """Whole channels set to zero, their mean, but never all of those that were observed; NaN stays NaN.

    Args:
        p: the probability for each channel of each series.
    """

    kinds = SERIES

    def __init__(self, p: float = 0.1) -> None:
        super().__init__()
        check_share(p=p)
        self.p = p

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Give the batch without the drawn channels."""
        observed = x.isnan().logical_not_()
        drawn = uniform(x, 0, 1, generator, *x.shape[:2], 1)
        # The observed channel with the largest number stays, which matters only where all would go.
        drawn = drawn.masked_fill_(~observed.any(2, keepdim=True), -1.0)
        drop = (drawn < self.p) & (drawn < drawn.amax(1, keepdim=True))
        return x.masked_fill(drop & observed, 0.0)


def curve(knots: Tensor, length: Tensor, steps: int) -> Tensor:
    """Give (N, ..., steps): the knots (N, ..., K) spread evenly over each sample's length, joined by straight lines."""
    between = knots.shape[-1] - 1
    step = torch.arange(steps, device=knots.device, dtype=knots.dtype)
    place = (step * between / (length - 1).clamp(min=1)[:, None]).clamp_(max=between)
    place = place.view(len(knots), *(1,) * (knots.dim() - 2), steps).expand(*knots.shape[:-1], steps)
    left = place.floor()
    return torch.lerp(knots.gather(-1, left.long()), knots.gather(-1, place.ceil().long()), place - left)


@VIEWS.register("magnitude_warp")
class MagnitudeWarp(Operation):
    """Every channel multiplied by a slow random curve about 1.

    Args:
        sigma: the standard deviation of the curve's knots.
        knots: how many knots are spread over the length, at least 2; straight lines join them.
    """

    kinds = SERIES

    def __init__(self, sigma: float = 0.2, knots: int = 4) -> None:
        super().__init__()
        check_amount(sigma=sigma)
        if knots < 2:
            raise ValueError(f"knots must be at least 2; got {knots}.")
        self.sigma, self.knots = sigma, knots

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Give the warped batch."""
        knots = normal(x, 1, self.sigma, generator, *x.shape[:2], self.knots)
        return x * curve(knots, lengths(x), x.shape[2])


@VIEWS.register("time_warp")
class TimeWarp(Operation):
    """The series played at a slowly changing speed, from its first to its last step.

    Args:
        sigma: the standard deviation of the logarithm of the speed at the knots.
        knots: how many knots are spread over the length, at least 2; straight lines join them.
    """

    kinds = SERIES

    def __init__(self, sigma: float = 0.2, knots: int = 4) -> None:
        super().__init__()
        check_amount(sigma=sigma)
        if knots < 2:
            raise ValueError(f"knots must be at least 2; got {knots}.")
        self.sigma, self.knots = sigma, knots

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Give the warped batch; a series too full of gaps to be interpolated at all stays as it is."""
        length, steps = lengths(x), x.shape[2]
        speed = curve(normal(x, 0, self.sigma, generator, len(x), self.knots).exp_(), length, steps)
        last = (length - 1).clamp_(min=0)[:, None]
        elapsed = torch.cat([torch.zeros_like(speed[:, :1]), speed[:, :-1].cumsum(1)], 1)
        return _keep_observed(resample(x, elapsed * (last / elapsed.gather(1, last).clamp(min=1e-30))), x)
