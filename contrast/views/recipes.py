"""Recipes: rows of operations that are known to go together, by name; their arguments are the config's schema.

Images of at most 64 pixels are small here: they keep more of themselves in a crop, and are not blurred.
"""

from __future__ import annotations

from contrast.views.draws import check_amount
from contrast.views.images import (
    Affine,
    ColourJitter,
    GaussianBlur,
    Greyscale,
    HorizontalFlip,
    RandomResizedCrop,
    Solarise,
)
from contrast.views.series import ChannelDrop, CropResize, Jitter, Permutation, Scaling, TimeMask
from contrast.views.views import Compose, Operation, Views, recipe

SMALL = 64
"""The largest height and width, in pixels, of a small image."""

LARGE = 224
"""What larger images are cropped to where no size is given, in pixels."""


@recipe("simclr", "image", aliases=("supcon", "simsiam"))
def simclr(
    shape: tuple[int, ...],
    count: int = 2,
    size: int | None = None,
    smallest_crop: float | None = None,
    strength: float | None = None,
    flip: float = 0.5,
) -> Views:
    """Crop, flip, colour jitter, greyscale and, for large images, blur.

    Args:
        shape: (C, H, W) of the data.
        count: how many views.
        size: their height and width in pixels; by default the data's own, at most 224.
        smallest_crop: the smallest share of the image's area; by default 0.2 for small images, else 0.08.
        strength: s of the jitter (0.8 s, 0.8 s, 0.8 s, 0.2 s); by default 0.5 for small images, else 1.
        flip: the probability of a horizontal flip; 0 where left and right mean something.

    Source: Chen et al. 2020, A Simple Framework for Contrastive Learning of Visual Representations, arXiv:2002.05709,
        appendix A (and B.9 for small images).
    """
    small = _is_small(shape, size)
    s = strength if strength is not None else (0.5 if small else 1.0)
    check_amount(strength=s)
    row: list[Operation] = [
        _crop(shape, size, smallest_crop),
        HorizontalFlip(flip),
        ColourJitter(0.8 * s, 0.8 * s, 0.8 * s, min(0.2 * s, 0.5), p=0.8),
        *_grey(shape),
    ]
    if not small:
        row.append(GaussianBlur(p=0.5))
    return _repeat([row], count)


@recipe("moco_v3", "image", aliases=("byol",))
def moco_v3(
    shape: tuple[int, ...],
    count: int = 2,
    size: int | None = None,
    smallest_crop: float = 0.2,
    flip: float = 0.5,
) -> Views:
    """Two different rows: the first always blurred; the second seldom, but solarised at times.

    Small images are not blurred in either. With more than two views the rows take turns.

    Args:
        shape: (C, H, W) of the data.
        count: how many views.
        size: their height and width in pixels; by default the data's own, at most 224.
        smallest_crop: the smallest share of the image's area.
        flip: the probability of a horizontal flip.

    Source: Chen et al. 2021, An Empirical Study of Training Self-Supervised Vision Transformers, arXiv:2104.02057;
        the rows are those of Grill et al. 2020, Bootstrap Your Own Latent, arXiv:2006.07733.
    """

    def row(blur: float, solarise: float) -> list[Operation]:
        operations: list[Operation] = [
            _crop(shape, size, smallest_crop),
            ColourJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
            *_grey(shape),
        ]
        if not _is_small(shape, size):
            operations.append(GaussianBlur(p=blur))
        if solarise:
            operations.append(Solarise(p=solarise))
        return [*operations, HorizontalFlip(flip)]

    return _repeat([row(blur=1.0, solarise=0.0), row(blur=0.1, solarise=0.2)], count)


@recipe("cacr", "image")
def cacr(
    shape: tuple[int, ...],
    count: int = 2,
    size: int | None = None,
    smallest_crop: float | None = None,
    flip: float = 0.5,
) -> Views:
    """As simclr, but the colour jitter of (0.4, 0.4, 0.4, 0.4) is always applied and nothing is blurred.

    Args:
        shape: (C, H, W) of the data.
        count: how many views; the paper's best results have 5.
        size: their height and width in pixels; by default the data's own, at most 224.
        smallest_crop: the smallest share of the image's area; by default 0.2 for small images, else 0.08.
        flip: the probability of a horizontal flip.

    Source: Zheng et al. 2021, Contrastive Attraction and Contrastive Repulsion for Representation Learning,
        arXiv:2105.03746, and its released code.
    """
    row: list[Operation] = [
        _crop(shape, size, smallest_crop),
        HorizontalFlip(flip),
        ColourJitter(0.4, 0.4, 0.4, 0.4, p=1.0),
        *_grey(shape),
    ]
    return _repeat([row], count)


@recipe("small_images", "image", aliases=("digits", "mnist"))
def small_images(
    shape: tuple[int, ...],
    count: int = 2,
    size: int | None = None,
    smallest_crop: float = 0.6,
    degrees: float = 15.0,
    translate: float = 0.1,
    zoom: float = 0.15,
    strength: float = 0.4,
    flip: float = 0.0,
) -> Views:
    """Small rotations, shifts and zooms, a mild crop, brightness and contrast: for tiny images such as digits.

    Nothing is mirrored unless asked for, since a mirrored digit or letter is another sign or none.

    Args:
        shape: (C, H, W) of the data.
        count: how many views.
        size: their height and width in pixels; by default the data's own, at most 224.
        smallest_crop: the smallest share of the image's area.
        degrees: the largest rotation either way.
        translate: the largest shift either way, as a share of the width and height.
        zoom: the largest change of size either way, as a share in [0, 1).
        strength: the largest change of brightness and contrast either way.
        flip: the probability of a horizontal flip.
    """
    check_amount(strength=strength)
    if not 0 <= zoom < 1:
        raise ValueError(f"zoom is a share of the size in [0, 1); got {zoom}.")
    row: list[Operation] = [
        Affine(degrees, translate, (1 - zoom, 1 + zoom)),
        _crop(shape, size, smallest_crop),
        ColourJitter(strength, strength, 0.0, 0.0, p=1.0),
    ]
    if flip:
        row.append(HorizontalFlip(flip))
    return _repeat([row], count)


@recipe("series", "series")
def series(
    count: int = 2,
    strength: float = 1.0,
    smallest_crop: float = 0.5,
    scaling: float = 0.2,
    jitter: float = 0.1,
    segments: int = 1,
    mask: float = 0.3,
    drop: float = 0.0,
) -> Views:
    """A stretched window, scaling, jitter and a hidden span; permutation and dropped channels where asked for.

    Args:
        count: how many views.
        strength: multiplies the cropped-away share, scaling, jitter, mask and drop; 0 changes nothing but `segments`.
        smallest_crop: the smallest window, as a share of the length, at strength 1.
        scaling: the standard deviation of each channel's factor.
        jitter: the standard deviation of the noise, in standard deviations of the channel.
        segments: the largest number of segments that are permuted; 1 is none. It destroys slow shapes.
        mask: the widest hidden span, as a share of the length; half of the samples have one.
        drop: the probability of each channel to be set to zero.
    """
    check_amount(strength=strength)
    if not 0 < smallest_crop <= 1:
        raise ValueError(f"smallest_crop is a share of the length in (0, 1]; got {smallest_crop}.")
    # However strong, a twentieth of the series stays in the window and a tenth in sight.
    row: list[Operation] = [CropResize((max(0.05, 1 - strength * (1 - smallest_crop)), 1.0))]
    if segments != 1:
        row.append(Permutation(segments))
    row += [Scaling(strength * scaling), Jitter(strength * jitter)]
    if drop:
        row.append(ChannelDrop(min(0.9, strength * drop)))
    row.append(TimeMask(min(0.9, strength * mask), p=0.5))
    return _repeat([row], count)


@recipe("series_weak", "series")
def series_weak(count: int = 2, scaling: float = 0.1, jitter: float = 0.05) -> Views:
    """Scaling and jitter only: nothing moves in time.

    Args:
        count: how many views.
        scaling: the standard deviation of each channel's factor.
        jitter: the standard deviation of the noise, in standard deviations of the channel.
    """
    return _repeat([[Scaling(scaling), Jitter(jitter)]], count)


@recipe("none", "image", "series")
def none(count: int = 2) -> Views:
    """Equal copies of the input.

    Args:
        count: how many views.
    """
    return _repeat([[]], count)


def _repeat(rows: list[list[Operation]], count: int) -> Views:
    """Give `count` views that take turns with the rows."""
    if count < 1:
        raise ValueError(f"count is the number of views, at least 1; got {count}.")
    views = [Compose(row) for row in rows]
    return Views([views[index % len(views)] for index in range(count)])


def _side(shape: tuple[int, ...], size: int | None) -> int | None:
    """Give the views' height and width in pixels, or nothing where the data's own are kept."""
    if size is not None or max(shape[1:]) <= LARGE:
        return size
    return min(LARGE, *shape[1:])


def _is_small(shape: tuple[int, ...], size: int | None) -> bool:
    return (_side(shape, size) or max(shape[1:])) <= SMALL


def _crop(shape: tuple[int, ...], size: int | None, smallest: float | None) -> RandomResizedCrop:
    if smallest is None:
        smallest = 0.2 if _is_small(shape, size) else 0.08
    if not 0 < smallest <= 1:
        raise ValueError(f"smallest_crop is a share of the image's area in (0, 1]; got {smallest}.")
    return RandomResizedCrop(_side(shape, size), scale=(smallest, 1.0))


def _grey(shape: tuple[int, ...]) -> list[Operation]:
    """Give the greyscale operation for images with colours; other channels are measurements and stay apart."""
    return [Greyscale(0.2)] if shape[0] == 3 else []
