"""Operations on batches of images, (N, C, H, W) float32 in [0, 1], random per sample.

Each class draws random numbers and passes them to the deterministic function above it, which applies torchvision's
functional form with each sample's own numbers.

Example:
    >>> from contrast.views.images import HorizontalFlip
    >>> HorizontalFlip(p=1)(torch.tensor([[[[0.0, 0.5, 1.0]]]]), torch.Generator())
    tensor([[[[1.0000, 0.5000, 0.0000]]]])
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from contrast.core.registry import InputError
from contrast.views.draws import bernoulli, check_amount, check_range, check_share, uniform
from contrast.views.views import IMAGE, VIEWS, Operation

GREY = (0.299, 0.587, 0.114)
"""The weights of red, green and blue in grey (ITU-R BT.601); torchvision's first is 0.2989, which darkens white."""

CANDIDATES = 10
"""Number of boxes drawn per sample before the centre is used, as in torchvision."""

ALMOST_NO_BLUR = 1e-3
"""A blur of this width (pixels) is exactly the identity: every other weight underflows to zero in float32."""


def crop(x: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return each sample's own box, resized to `size` by antialiased linear interpolation.

    Each axis is a product with a matrix of interpolation weights per sample: (h, H) @ (H, W) @ (W, w).

    Args:
        x: (N, C, H, W).
        boxes: (N, 4), top, left, height and width in whole pixels, inside the image.
        size: height and width of the output, in pixels.
    """
    height, width = x.shape[2:]
    top, left, tall, wide = boxes.to(x.dtype).unbind(1)
    rows = _interpolation(top, tall, height, size[0])
    columns = _interpolation(left, wide, width, size[1])
    return _apply_matrices(rows, x, columns).clamp_(0, 1)


def _interpolation(start: Tensor, length: Tensor, source: int, target: int) -> Tensor:
    """Return (N, target, source) weights: a triangle about each target pixel's centre, wider if the box shrinks."""
    step = (length / target)[:, None, None]
    centre = step * (torch.arange(target, device=start.device, dtype=start.dtype) + 0.5)[:, None]
    pixel = torch.arange(source, device=start.device, dtype=start.dtype) + 0.5 - start[:, None, None]
    weight = (pixel - centre).abs_().div_(step.clamp(min=1)).neg_().add_(1).clamp_(min=0)
    # Pixels outside the box have weight zero, also where the triangle extends beyond its edge.
    weight = weight.mul_((pixel > 0) & (pixel < length[:, None, None]))
    return weight.div_(weight.sum(2, keepdim=True))


def _apply_matrices(rows: Tensor, x: Tensor, columns: Tensor) -> Tensor:
    """Return rows @ x @ columns^T for every sample and channel: (N, h, H), (N, C, H, W), (N, w, W) -> (N, C, h, w)."""
    samples, channels, height, width = x.shape
    resized = torch.bmm(x.reshape(samples, channels * height, width), columns.transpose(1, 2))
    return torch.matmul(rows[:, None], resized.view(samples, channels, height, columns.shape[1]))


@VIEWS.register("random_resized_crop")
class RandomResizedCrop(Operation):
    """A random box of the image, resized; the boxes have the distribution of torchvision's RandomResizedCrop.

    Args:
        size: height and width of the output in pixels; None: those of the input.
        scale: the box's share of the image's area, drawn uniformly from [low, high], in (0, 1].
        ratio: the box's width / height, drawn log-uniformly from [low, high].
    """

    kinds = IMAGE

    def __init__(
        self,
        size: int | None = None,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ) -> None:
        super().__init__()
        if size is not None and size < 1:
            raise ValueError(f"size is the output's height and width in pixels, at least 1; got {size}.")
        check_range("scale", scale, most=1)
        check_range("ratio", ratio)
        self.size, self.scale, self.ratio = size, scale, ratio

    def boxes(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return a random box per sample: (N, 4) top, left, height, width in whole pixels."""
        samples, _, height, width = x.shape
        area = uniform(x, *self.scale, generator, samples, CANDIDATES).mul_(height * width)
        low, high = self.ratio
        ratio = uniform(x, math.log(low), math.log(high), generator, samples, CANDIDATES).exp_()
        wide, tall = (area * ratio).sqrt_().round_(), (area / ratio).sqrt_().round_()
        fits = (wide >= 1) & (wide <= width) & (tall >= 1) & (tall <= height)
        first = fits.int().argmax(1, keepdim=True)
        wide, tall = wide.gather(1, first), tall.gather(1, first)

        any_fits = fits.any(1, keepdim=True)
        # If no candidate fits: the largest box of an allowed ratio.
        widest, tallest = min(width, max(1, round(height * high))), min(height, max(1, round(width / low)))
        wide, tall = torch.where(any_fits, wide, widest), torch.where(any_fits, tall, tallest)
        position = uniform(x, 0, 1, generator, samples, 2)
        largest = torch.cat([height - tall, width - wide], 1)
        # The product may round up to largest + 1, hence the minimum.
        corner = torch.where(
            any_fits, torch.minimum((position * (largest + 1)).floor_(), largest), (largest / 2).floor_()
        )
        return torch.cat([corner, tall, wide], 1)

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the crops."""
        _, height, width = self.output_shape(tuple(x.shape[1:]))
        return crop(x, self.boxes(x, generator), (height, width))

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return (C, size, size), or raise an InputError if that is larger than the input."""
        channels, height, width = shape
        if self.size is None:
            return shape
        if self.size > min(height, width):
            raise InputError(
                f"views.size must be at most {min(height, width)}, since the images are {height} x {width} pixels and "
                f"views are not larger than their image; got {self.size}. Set a smaller views.size or a larger "
                "data.size."
            )
        return channels, self.size, self.size


@VIEWS.register("horizontal_flip")
class HorizontalFlip(Operation):
    """The image with left and right exchanged.

    Args:
        p: the probability per sample.
    """

    kinds = IMAGE

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        check_share(p=p)
        self.p = p

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the batch with a random subset of samples flipped."""
        return torch.where(bernoulli(x, self.p, generator), x.flip(-1), x)


@VIEWS.register("vertical_flip")
class VerticalFlip(Operation):
    """The image with top and bottom exchanged.

    Args:
        p: the probability per sample.
    """

    kinds = IMAGE

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        check_share(p=p)
        self.p = p

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the batch with a random subset of samples flipped."""
        return torch.where(bernoulli(x, self.p, generator), x.flip(-2), x)


def grey(x: Tensor) -> Tensor:
    """Return the grey images (N, 1, H, W): the weighted sum of three channels, the mean of any other number."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x[:, 0:1] * GREY[0]).add_(x[:, 1:2], alpha=GREY[1]).add_(x[:, 2:3], alpha=GREY[2])


def adjust(
    x: Tensor,
    *,
    brightness: Tensor | None = None,
    contrast: Tensor | None = None,
    saturation: Tensor | None = None,
    hue: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Return the images with brightness, contrast and saturation scaled in each sample's own order, then hue rotated.

    The first three are one formula, clamp(f x + (1 - f) other), where other is black, the mean of the grey image, or
    the grey image. Three passes therefore suffice for an order per sample.

    Args:
        x: (N, C, H, W); saturation and hue need C = 3.
        brightness: (N,) factors f >= 0; None: unchanged.
        contrast: (N,) factors, or None.
        saturation: (N,) factors, or None.
        hue: (N,) in turns of the colour circle, [-0.5, 0.5], or None.
        order: (N, 3), each row a permutation of 0 brightness, 1 contrast, 2 saturation; None: in this order.
    """
    given = [factor for factor in (brightness, contrast, saturation) if factor is not None]
    if given:
        one = torch.ones_like(given[0])
        factors = torch.stack([one if f is None else f for f in (brightness, contrast, saturation)], 1)
        if order is None:
            order = torch.arange(3, device=x.device).expand(len(x), 3)
        for kind, factor in zip(order.unbind(1), factors.gather(1, order).unbind(1), strict=True):
            rest = 1 - factor
            other = (_mean_grey(x) * rest * (kind == 1))[:, None, None, None]
            if saturation is not None:
                other = torch.addcmul(other, grey(x), (rest * (kind == 2))[:, None, None, None])
            x = torch.addcmul(other, x, factor[:, None, None, None]).clamp_(0, 1)
    return x if hue is None else _rotate_hue(x, hue)


def _mean_grey(x: Tensor) -> Tensor:
    # The mean of the weighted sum is the weighted sum of the means, one number per channel.
    return grey(x.mean((2, 3), keepdim=True)).view(-1)


def _rotate_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Return the images with HSV's hue rotated; each pixel's largest and smallest channel value do not change.

    With red, green and blue stretched to [0, 1] the hue is, in sixths of a turn, 1 + green + blue - red, clockwise if
    blue is above green: on each half of the circle that sum is linear over all three pieces of HSV's definition.
    """
    red, green, blue = x.unbind(1)
    largest, smallest = x.amax(1), x.amin(1)
    hue = torch.sub(largest, smallest, alpha=2).add_(green).add_(blue).sub_(red)
    chroma = largest.sub_(smallest)
    # A grey pixel has no hue; any value is right, since its chroma is zero.
    hue.div_(chroma.clamp(min=torch.finfo(x.dtype).tiny)).copysign_(green - blue)
    hue.div_(6).add_(turns[:, None, None])
    hue.sub_(hue.floor()).mul_(6)
    shares = torch.stack([(hue - 3).abs_() - 1, 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()], 1)
    return shares.clamp_(0, 1).mul_(chroma[:, None]).add_(smallest[:, None]).clamp_(0, 1)


@VIEWS.register("colour_jitter", aliases=("color_jitter",))
class ColourJitter(Operation):
    """Brightness, contrast, saturation and hue, changed at random.

    Images of three channels are red, green and blue. Others have no colours: only brightness and contrast change, and
    grey is the mean over the channels. torchvision draws the order of all four per image; here the order of the first
    three is drawn per sample and hue is last.

    Args:
        brightness: a; the factor is drawn from [max(0, 1 - a), 1 + a].
        contrast: a of its factor.
        saturation: a of its factor.
        hue: the largest rotation in either direction, as a share of the colour circle, in [0, 0.5].
        p: the probability per sample.
    """

    kinds = IMAGE

    def __init__(
        self,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.4,
        hue: float = 0.1,
        p: float = 0.8,
    ) -> None:
        super().__init__()
        check_amount(brightness=brightness, contrast=contrast, saturation=saturation)
        check_share(p=p)
        if not 0 <= hue <= 0.5:
            raise ValueError(f"hue is a share of the colour circle in [0, 0.5]; got {hue}.")
        self.brightness, self.contrast, self.saturation, self.hue, self.p = brightness, contrast, saturation, hue, p

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the batch with a random subset of samples adjusted."""
        coloured = x.shape[1] == 3

        def factor(amount: float) -> Tensor:
            return uniform(x, max(0.0, 1 - amount), 1 + amount, generator)

        adjusted = adjust(
            x,
            brightness=factor(self.brightness),
            contrast=factor(self.contrast),
            saturation=factor(self.saturation) if coloured and self.saturation else None,
            hue=uniform(x, -self.hue, self.hue, generator) if coloured and self.hue else None,
            order=uniform(x, 0, 1, generator, len(x), 3).argsort(1),
        )
        return torch.where(bernoulli(x, self.p, generator), adjusted, x)


@VIEWS.register("greyscale", aliases=("grayscale",))
class Greyscale(Operation):
    """Every channel replaced by the grey image (the channels' mean, unless there are three).

    Args:
        p: the probability per sample.
    """

    kinds = IMAGE

    def __init__(self, p: float = 0.2) -> None:
        super().__init__()
        check_share(p=p)
        self.p = p

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the batch with a random subset of samples grey."""
        return torch.where(bernoulli(x, self.p, generator), grey(x), x)


def blur(x: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Return the images blurred by a Gaussian of each sample's own width, with reflected edges.

    Args:
        x: (N, C, H, W).
        sigma: (N,), standard deviations in pixels, > 0.
        kernel: pixels of the Gaussian on each axis; odd, and at most 2 min(H, W) - 1.
    """
    distance = torch.arange(kernel, device=x.device, dtype=x.dtype) - kernel // 2
    weights = (distance / sigma[:, None]).square_().mul_(-0.5).softmax(1)
    height, width = x.shape[2:]
    rows = _convolution_matrix(weights, height)
    columns = rows if width == height else _convolution_matrix(weights, width)
    return _apply_matrices(rows, x, columns).clamp_(0, 1)


def _convolution_matrix(weights: Tensor, length: int) -> Tensor:
    """Return the convolution with each row of weights (N, kernel) as matrices (N, length, length), edges reflected."""
    samples, kernel = weights.shape
    position = torch.arange(length, device=weights.device) + torch.arange(kernel, device=weights.device)[:, None]
    source = (position - kernel // 2).abs()
    source = (length - 1) - ((length - 1) - source).abs()
    taps = (source[:, :, None] == torch.arange(length, device=weights.device)).to(weights.dtype)
    return (weights @ taps.view(kernel, length * length)).view(samples, length, length)


@VIEWS.register("gaussian_blur")
class GaussianBlur(Operation):
    """Blur by a Gaussian kernel of about a tenth of the image (an odd number of pixels, at least 3).

    Args:
        sigma: standard deviation in pixels, drawn uniformly from [low, high] per sample.
        p: the probability per sample.
    """

    kinds = IMAGE

    def __init__(self, sigma: tuple[float, float] = (0.1, 2.0), p: float = 0.5) -> None:
        super().__init__()
        check_range("sigma", sigma)
        check_share(p=p)
        self.sigma, self.p = sigma, p

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the batch with a random subset of samples blurred."""
        shorter = min(x.shape[2:])
        kernel = min(max(3, 2 * (shorter // 20) + 1), 2 * shorter - 1)
        sigma = uniform(x, *self.sigma, generator)
        return blur(x, torch.where(bernoulli(x, self.p, generator).view(-1), sigma, ALMOST_NO_BLUR), kernel)


@VIEWS.register("solarise", aliases=("solarize",))
class Solarise(Operation):
    """Every value at or above the threshold replaced by 1 - value.

    Args:
        threshold: in [0, 1].
        p: the probability per sample.
    """

    kinds = IMAGE

    def __init__(self, threshold: float = 0.5, p: float = 0.2) -> None:
        super().__init__()
        check_share(threshold=threshold, p=p)
        self.threshold, self.p = threshold, p

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the batch with a random subset of samples solarised."""
        return torch.where(bernoulli(x, self.p, generator) & (x >= self.threshold), 1 - x, x)


def transform(x: Tensor, degrees: Tensor, translate: Tensor, scale: Tensor, shear: Tensor) -> Tensor:
    """Return the images rotated, shifted, scaled and sheared about their centres; pixels from outside are black.

    Args:
        x: (N, C, H, W).
        degrees: (N,), clockwise.
        translate: (N, 2), to the right and downwards, in pixels.
        scale: (N,), > 0; 2 is twice as large.
        shear: (N,), degrees along the x axis.
    """
    height, width = x.shape[2:]
    angle, slope = degrees.deg2rad(), shear.deg2rad().tan()
    cosine, sine = angle.cos(), angle.sin()
    # The input position of each output pixel: the shift is undone, then scale * rotation @ [[1, -slope], [0, 1]].
    xx, xy = (cosine - slope * sine) / scale, (sine + slope * cosine) / scale
    yx, yy = -sine / scale, cosine / scale
    right, down = translate.unbind(1)
    # The units of affine_grid are half widths and half heights.
    to_x = torch.stack([xx, xy * (height / width), (xx * right + xy * down) * (-2 / width)], 1)
    to_y = torch.stack([yx * (width / height), yy, (yx * right + yy * down) * (-2 / height)], 1)
    grid = F.affine_grid(torch.stack([to_x, to_y], 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False).clamp_(0, 1)


@VIEWS.register("affine")
class Affine(Operation):
    """The image rotated, shifted, scaled and sheared about its centre; pixels from outside are black.

    Args:
        degrees: the largest rotation in either direction, in [0, 180].
        translate: the largest shift in either direction along each axis, as a share of the width and height.
        scale: the factor of size, drawn uniformly from [low, high].
        shear: the largest shear in either direction along the x axis, in degrees below 90.
        p: the probability per sample.
    """

    kinds = IMAGE

    def __init__(
        self,
        degrees: float = 15.0,
        translate: float = 0.1,
        scale: tuple[float, float] = (0.9, 1.1),
        shear: float = 0.0,
        p: float = 1.0,
    ) -> None:
        super().__init__()
        check_share(translate=translate, p=p)
        check_range("scale", scale)
        for name, value, most in (("degrees", degrees, 180), ("shear", shear, 89)):
            if not 0 <= value <= most:
                raise ValueError(f"{name} is an angle in [0, {most}]; got {value}.")
        self.degrees, self.translate, self.scale, self.shear, self.p = degrees, translate, scale, shear, p

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the batch with a random subset of samples transformed."""
        height, width = x.shape[2:]
        right = uniform(x, -self.translate * width, self.translate * width, generator)
        down = uniform(x, -self.translate * height, self.translate * height, generator)
        transformed = transform(
            x,
            degrees=uniform(x, -self.degrees, self.degrees, generator),
            translate=torch.stack([right, down], 1),
            scale=uniform(x, *self.scale, generator),
            shear=uniform(x, -self.shear, self.shear, generator),
        )
        return torch.where(bernoulli(x, self.p, generator), transformed, x)
