"""Operations on batches of images, (N, C, H, W) float32 in [0, 1], random per sample.

Each class draws its numbers and hands them to a function above it that does the same to the same numbers every time:
that function is what torchvision's functional form does to one image.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from contrast.core.registry import InputError
from contrast.views.draws import chance, check_amount, check_range, check_share, uniform
from contrast.views.views import IMAGE, VIEWS, Operation

GREY = (0.299, 0.587, 0.114)
"""The weights of red, green and blue in grey (ITU-R BT.601); torchvision's first is 0.2989, which darkens white."""

CANDIDATES = 10
"""How many boxes are tried for each sample before the centre is taken, as torchvision does."""

ALMOST_NO_BLUR = 1e-3
"""A blur this narrow (pixels) is exactly the identity: every other weight underflows to zero in float32."""


def crop(x: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Give each sample's own box, resized to `size` by antialiased linear interpolation.

    Both axes are products with a matrix of interpolation weights for each sample: (h, H) @ (H, W) @ (W, w).

    Args:
        x: (N, C, H, W).
        boxes: (N, 4), top, left, height and width in whole pixels, inside the image.
        size: height and width of the output, in pixels.
    """
    height, width = x.shape[2:]
    top, left, tall, wide = boxes.to(x.dtype).unbind(1)
    rows = _interpolation(top, tall, height, size[0])
    columns = _interpolation(left, wide, width, size[1])
    return _between(rows, x, columns).clamp_(0, 1)


def _interpolation(start: Tensor, length: Tensor, source: int, target: int) -> Tensor:
    """Give (N, target, source) weights: a triangle about each target's centre, widened where the box shrinks."""
    step = (length / target)[:, None, None]
    centre = step * (torch.arange(target, device=start.device, dtype=start.dtype) + 0.5)[:, None]
    pixel = torch.arange(source, device=start.device, dtype=start.dtype) + 0.5 - start[:, None, None]
    weight = (pixel - centre).abs_().div_(step.clamp(min=1)).neg_().add_(1).clamp_(min=0)
    # What lies outside the box is not read, also where the triangle reaches over its edge.
    weight = weight.mul_((pixel > 0) & (pixel < length[:, None, None]))
    return weight.div_(weight.sum(2, keepdim=True))


def _between(rows: Tensor, x: Tensor, columns: Tensor) -> Tensor:
    """Give rows @ x @ columns^T for every sample and channel: (N, h, H), (N, C, H, W), (N, w, W) -> (N, C, h, w)."""
    samples, channels, height, width = x.shape
    narrow = torch.bmm(x.reshape(samples, channels * height, width), columns.transpose(1, 2))
    return torch.matmul(rows[:, None], narrow.view(samples, channels, height, columns.shape[1]))


@VIEWS.register("random_resized_crop")
class RandomResizedCrop(Operation):
    """A random box of the image, resized; the boxes are distributed as torchvision's RandomResizedCrop draws them.

    Args:
        size: height and width of the output in pixels; nothing keeps the input's own.
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
        """Draw a box for each sample: (N, 4) top, left, height, width in whole pixels."""
        samples, _, height, width = x.shape
        area = uniform(x, *self.scale, generator, samples, CANDIDATES).mul_(height * width)
        low, high = self.ratio
        ratio = uniform(x, math.log(low), math.log(high), generator, samples, CANDIDATES).exp_()
        wide, tall = (area * ratio).sqrt_().round_(), (area / ratio).sqrt_().round_()
        fits = (wide >= 1) & (wide <= width) & (tall >= 1) & (tall <= height)
        first = fits.int().argmax(1, keepdim=True)
        wide, tall = wide.gather(1, first), tall.gather(1, first)

        any_fits = fits.any(1, keepdim=True)
        # The largest box of an allowed ratio, where no candidate fits.
        widest, tallest = min(width, max(1, round(height * high))), min(height, max(1, round(width / low)))
        wide, tall = torch.where(any_fits, wide, widest), torch.where(any_fits, tall, tallest)
        place = uniform(x, 0, 1, generator, samples, 2)
        room = torch.cat([height - tall, width - wide], 1)
        # The product may round up to room + 1; the minimum takes that back.
        corner = torch.where(any_fits, torch.minimum((place * (room + 1)).floor_(), room), (room / 2).floor_())
        return torch.cat([corner, tall, wide], 1)

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Give the crops."""
        _, height, width = self.output_shape(tuple(x.shape[1:]))
        return crop(x, self.boxes(x, generator), (height, width))

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Give (C, size, size); an output larger than the input raises an InputError."""
        channels, height, width = shape
        if self.size is None:
            return shape
        if self.size > min(height, width):
            raise InputError(
                f"views.size must be at most {min(height, width)}, since the images are {height} x {width} pixels and "
                f"views are not larger than their image; got {self.size}. Give a smaller views.size or a larger "
                "data.size."
            )
        return channels, self.size, self.size


@VIEWS.register("horizontal_flip")
class HorizontalFlip(Operation):
    """The image with left and right exchanged.

    Args:
        p: the probability for each sample.
    """

    kinds = IMAGE

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        check_share(p=p)
        self.p = p

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Give the batch with the picked samples flipped."""
        return torch.where(chance(x, self.p, generator), x.flip(-1), x)


@VIEWS.register("vertical_flip")
class VerticalFlip(Operation):
    """The image with top and bottom exchanged.

    Args:
        p: the probability for each sample.
    """

    kinds = IMAGE

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        check_share(p=p)
        self.p = p

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Give the batch with the picked samples flipped."""
        return torch.where(chance(x, self.p, generator), x.flip(-2), x)


def grey(x: Tensor) -> Tensor:
    """Give (N, 1, H, W): the weighted sum of red, green and blue; of other than three channels, the mean."""
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
    """Give the images with brightness, contrast and saturation scaled in each sample's own order, then hue turned.

    The first three are one formula, clamp(f x + (1 - f) other), where other is black, the mean of the grey image, or
    the grey image. That allows an order for each sample in three passes.

    Args:
        x: (N, C, H, W); saturation and hue need C = 3.
        brightness: (N,) factors f >= 0; nothing leaves it out. Contrast and saturation likewise.
        contrast: (N,).
        saturation: (N,).
        hue: (N,) in turns of the colour circle, [-0.5, 0.5].
        order: (N, 3), each row a permutation of 0 brightness, 1 contrast, 2 saturation; by default in this order.
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
    return x if hue is None else _turn_hue(x, hue)


def _mean_grey(x: Tensor) -> Tensor:
    # The mean of the weighted sum is the weighted sum of the means, one number a channel.
    return grey(x.mean((2, 3), keepdim=True)).view(-1)


def _turn_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Give the colours turned about the circle, each pixel's largest and smallest channel kept (HSV's hue).

    With red, green and blue stretched to [0, 1] the hue is, in sixths of a turn, 1 + green + blue - red, taken
    clockwise where blue is above green: on each half of the circle that sum runs straight through its three pieces.
    """
    red, green, blue = x.unbind(1)
    largest, smallest = x.amax(1), x.amin(1)
    hue = torch.sub(largest, smallest, alpha=2).add_(green).add_(blue).sub_(red)
    chroma = largest.sub_(smallest)
    # A grey pixel has no hue; any will do, since its chroma is zero.
    hue.div_(chroma.clamp(min=torch.finfo(x.dtype).tiny)).copysign_(green - blue)
    hue.div_(6).add_(turns[:, None, None])
    hue.sub_(hue.floor()).mul_(6)
    shares = torch.stack([(hue - 3).abs_() - 1, 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()], 1)
    return shares.clamp_(0, 1).mul_(chroma[:, None]).add_(smallest[:, None]).clamp_(0, 1)


@VIEWS.register("colour_jitter", aliases=("color_jitter",))
class ColourJitter(Operation):
    """Brightness, contrast, saturation and hue, changed at random.

    Images of three channels are taken as red, green and blue. All others have no colours: only brightness and contrast
    change, and the mean over the channels stands for grey. torchvision draws the order of all four for each image;
    here the first three have an order of their own for each sample and hue comes last.

    Args:
        brightness: a; the factor is drawn from [max(0, 1 - a), 1 + a]. Contrast and saturation likewise.
        contrast: a.
        saturation: a.
        hue: the largest turn either way, as a share of the colour circle, in [0, 0.5].
        p: the probability for each sample.
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
        """Give the batch with the picked samples adjusted."""
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
        return torch.where(chance(x, self.p, generator), adjusted, x)


@VIEWS.register("greyscale", aliases=("grayscale",))
class Greyscale(Operation):
    """Every channel replaced by the grey image: of other than three channels, by their mean.

    Args:
        p: the probability for each sample.
    """

    kinds = IMAGE

    def __init__(self, p: float = 0.2) -> None:
        super().__init__()
        check_share(p=p)
        self.p = p

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Give the batch with the picked samples grey."""
        return torch.where(chance(x, self.p, generator), grey(x), x)


def blur(x: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Give the images under a Gaussian of each sample's own width, with reflected edges.

    Args:
        x: (N, C, H, W).
        sigma: (N,), standard deviations in pixels, > 0.
        kernel: how many pixels the Gaussian spans on each axis; odd, and at most 2 min(H, W) - 1.
    """
    distance = torch.arange(kernel, device=x.device, dtype=x.dtype) - kernel // 2
    weights = (distance / sigma[:, None]).square_().mul_(-0.5).softmax(1)
    height, width = x.shape[2:]
    rows = _convolution(weights, height)
    return _between(rows, x, rows if width == height else _convolution(weights, width)).clamp_(0, 1)


def _convolution(weights: Tensor, length: int) -> Tensor:
    """Give (N, length, length): the convolution with each row of weights (N, K) as a matrix, edges reflected."""
    samples, kernel = weights.shape
    reach = torch.arange(length, device=weights.device) + torch.arange(kernel, device=weights.device)[:, None]
    source = (reach - kernel // 2).abs()
    source = (length - 1) - ((length - 1) - source).abs()
    taps = (source[:, :, None] == torch.arange(length, device=weights.device)).to(weights.dtype)
    return (weights @ taps.view(kernel, length * length)).view(samples, length, length)


@VIEWS.register("gaussian_blur")
class GaussianBlur(Operation):
    """The image under a Gaussian that spans about a tenth of it (an odd number of pixels, at least 3).

    Args:
        sigma: standard deviation in pixels, drawn uniformly from [low, high] for each sample.
        p: the probability for each sample.
    """

    kinds = IMAGE

    def __init__(self, sigma: tuple[float, float] = (0.1, 2.0), p: float = 0.5) -> None:
        super().__init__()
        check_range("sigma", sigma)
        check_share(p=p)
        self.sigma, self.p = sigma, p

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Give the batch with the picked samples blurred."""
        shorter = min(x.shape[2:])
        kernel = min(max(3, 2 * (shorter // 20) + 1), 2 * shorter - 1)
        sigma = uniform(x, *self.sigma, generator)
        return blur(x, torch.where(chance(x, self.p, generator).view(-1), sigma, ALMOST_NO_BLUR), kernel)


@VIEWS.register("solarise", aliases=("solarize",))
class Solarise(Operation):
    """Every value from the threshold on replaced by 1 - value.

    Args:
        threshold: in [0, 1].
        p: the probability for each sample.
    """

    kinds = IMAGE

    def __init__(self, threshold: float = 0.5, p: float = 0.2) -> None:
        super().__init__()
        check_share(threshold=threshold, p=p)
        self.threshold, self.p = threshold, p

    def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Give the batch with the picked samples solarised."""
        return torch.where(chance(x, self.p, generator) & (x >= self.threshold), 1 - x, x)


def transform(x: Tensor, degrees: Tensor, translate: Tensor, scale: Tensor, shear: Tensor) -> Tensor:
    """Give the images rotated, shifted, scaled and sheared about their centres; what comes in from outside is black.

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
    # Each output pixel reads from the inverse of scale * rotation @ [[1, -slope], [0, 1]], after the shift is undone.
    xx, xy = (cosine - slope * sine) / scale, (sine + slope * cosine) / scale
    yx, yy = -sine / scale, cosine / scale
    right, down = translate.unbind(1)
    # affine_grid counts in half widths and half heights.
    to_x = torch.stack([xx, xy * (height / width), (xx * right + xy * down) * (-2 / width)], 1)
    to_y = torch.stack([yx * (width / height), yy, (yx * right + yy * down) * (-2 / height)], 1)
    grid = F.affine_grid(torch.stack([to_x, to_y], 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False).clamp_(0, 1)


@VIEWS.register("affine")
class Affine(Operation):
    """The image rotated, shifted, scaled and sheared a little about its centre; what comes in from outside is black.

    Args:
        degrees: the largest rotation either way, in [0, 180].
        translate: the largest shift either way along each axis, as a share of the width and height.
        scale: the factor of size, drawn uniformly from [low, high].
        shear: the largest shear either way along the x axis, in degrees below 90.
        p: the probability for each sample.
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
        """Give the batch with the picked samples transformed."""
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
        return torch.where(chance(x, self.p, generator), transformed, x)
