"""Recipes: established sequences of operations by name; their arguments are the schema of `views:` in a config.

Images of at most 64 pixels are small here: their crops are larger shares of the image, and they are not blurred.

Example:
    >>> from contrast.views import recipes
    >>> [type(operation).__name__ for operation in recipes.series_weak(scaling=0.2).views[0].operations]
    ['Scaling', 'Jitter']
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

SMALL_PIXELS = 64
"""The largest height and width, in pixels, of a small image."""

LARGE_PIXELS = 224
"""Height and width, in pixels, to which larger images are cropped if no size is given."""


@recipe("simclr", "image", aliases=("supcon", "simsiam"))
def simclr(
    shape: tuple[int, ...],
    count: int = 2,
    size: int | None = None,
    smallest_crop: float | None = None,
    strength: float | None = None,
    flip: float = 0.5,
) -> Views:
    """Return views by crop, flip, colour jitter, greyscale and, for large images, blur.

    Args:
        shape: (C, H, W) of the data.
        count: number of views.
        size: height and width of the views in pixels; by default those of the data, at most 224.
        smallest_crop: the smallest share of the image's area; by default 0.2 for small images, else 0.08.
        strength: s of the jitter (0.8 s, 0.8 s, 0.8 s, 0.2 s); by default 0.5 for small images, else 1.
        flip: the probability of a horizontal flip; 0 if left and right differ in meaning.

    Source: Chen et al. 2020, A Simple Framework for Contrastive Learning of Visual Representations, arXiv:2002.05709,
        appendix A (and B.9 for small images).
    """
    small = _is_small(shape, size)
    s = strength if strength is not None else (0.5 if small else 1.0)
    check_amount(strength=s)
    operations: list[Operation] = [
        _crop(shape, size, smallest_crop),
        HorizontalFlip(flip),
        ColourJitter(0.8 * s, 0.8 * s, 0.8 * s, min(0.2 * s, 0.5), p=0.8),
        *_greyscale(shape),
    ]
    if not small:
        operations.append(GaussianBlur(p=0.5))
    return _cycle([operations], count)


@recipe("moco_v3", "image", aliases=("byol",))
def moco_v3(
    shape: tuple[int, ...],
    count: int = 2,
    size: int | None = None,
    smallest_crop: float = 0.2,
    flip: float = 0.5,
) -> Views:
    """Return views by two different sequences: the first always blurred; the second rarely, but sometimes solarised.

    Small images are not blurred in either. More than two views alternate between the sequences.

    Args:
        shape: (C, H, W) of the data.
        count: number of views.
        size: height and width of the views in pixels; by default those of the data, at most 224.
        smallest_crop: the smallest share of the image's area.
        flip: the probability of a horizontal flip.

    Source: Chen et al. 2021, An Empirical Study of Training Self-Supervised Vision Transformers, arXiv:2104.02057;
        the sequences are those of Grill et al. 2020, Bootstrap Your Own Latent, arXiv:2006.07733.
    """

    def sequence(blur: float, solarise: float) -> list[Operation]:
        operations: list[Operation] = [
            _crop(shape, size, smallest_crop),
            ColourJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
            *_greyscale(shape),
        ]
        if not _is_small(shape, size):
            operations.append(GaussianBlur(p=blur))
        if solarise:
            operations.append(Solarise(p=solarise))
        return [*operations, HorizontalFlip(flip)]

    return _cycle([sequence(blur=1.0, solarise=0.0), sequence(blur=0.1, solarise=0.2)], count)


@recipe("cacr", "image")
def cacr(
    shape: tuple[int, ...],
    count: int = 2,
    size: int | None = None,
    smallest_crop: float | None = None,
    flip: float = 0.5,
) -> Views:
    """Return views as simclr does, but always with a colour jitter of (0.4, 0.4, 0.4, 0.4) and never blurred.

    Args:
        shape: (C, H, W) of the data.
        count: number of views; the paper's best results use 5.
        size: height and width of the views in pixels; by default those of the data, at most 224.
        smallest_crop: the smallest share of the image's area; by default 0.2 for small images, else 0.08.
        flip: the probability of a horizontal flip.

    Source: Zheng et al. 2021, Contrastive Attraction and Contrastive Repulsion for Representation Learning,
        arXiv:2105.03746, and its released code.
    """
    operations: list[Operation] = [
        _crop(shape, size, smallest_crop),
        HorizontalFlip(flip),
        ColourJitter(0.4, 0.4, 0.4, 0.4, p=1.0),
        *_greyscale(shape),
    ]
    return _cycle([operations], count)


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
    """Return views by small rotations, shifts and zooms, a mild crop, brightness and contrast: for images of digits.

    There is no flip by default, since a mirrored digit or letter is another character or none.

    Args:
        shape: (C, H, W) of the data.
        count: number of views.
        size: height and width of the views in pixels; by default those of the data, at most 224.
        smallest_crop: the smallest share of the image's area.
        degrees: the largest rotation in either direction, in degrees.
        translate: the largest shift in either direction, as a share of the width and height.
        zoom: the largest change of size in either direction, as a share in [0, 1).
        strength: the largest change of brightness and contrast in either direction.
        flip: the probability of a horizontal flip.
    """
    check_amount(strength=strength)
    if not 0 <= zoom < 1:
        raise ValueError(f"zoom is a share of the size in [0, 1); got {zoom}.")
    operations: list[Operation] = [
        Affine(degrees, translate, (1 - zoom, 1 + zoom)),
        _crop(shape, size, smallest_crop),
        ColourJitter(strength, strength, 0.0, 0.0, p=1.0),
    ]
    if flip:
        operations.append(HorizontalFlip(flip))
    return _cycle([operations], count)


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
    """Return views by a stretched window, scaling, jitter and a masked span; permutation and dropped channels optional.

    Args:
        count: number of views.
        strength: factor of the cropped share, scaling, jitter, mask and drop; with 0 only `segments` has an effect.
        smallest_crop: the smallest window, as a share of the length, at strength 1.
        scaling: the standard deviation of each channel's factor.
        jitter: the standard deviation of the noise, in standard deviations of the channel.
        segments: the largest number of segments that are permuted; 1: no permutation. It destroys slow shapes.
        mask: the widest masked span, as a share of the length; half of the samples have one.
        drop: the probability that a channel is set to zero.
    """
    check_amount(strength=strength)
    if not 0 < smallest_crop <= 1:
        raise ValueError(f"smallest_crop is a share of the length in (0, 1]; got {smallest_crop}.")
    # At any strength the window is at least a twentieth of the series, and a tenth is not masked.
    operations: list[Operation] = [CropResize((max(0.05, 1 - strength * (1 - smallest_crop)), 1.0))]
    if segments != 1:
        operations.append(Permutation(segments))
    operations += [Scaling(strength * scaling), Jitter(strength * jitter)]
    if drop:
        operations.append(ChannelDrop(min(0.9, strength * drop)))
    operations.append(TimeMask(min(0.9, strength * mask), p=0.5))
    return _cycle([operations], count)


@recipe("series_weak", "series")
def series_weak(count: int = 2, scaling: float = 0.1, jitter: float = 0.05) -> Views:
    """Return views by scaling and jitter only, without changes in time.

    Args:
        count: number of views.
        scaling: the standard deviation of each channel's factor.
        jitter: the standard deviation of the noise, in standard deviations of the channel.
    """
    return _cycle([[Scaling(scaling), Jitter(jitter)]], count)


@recipe("none", "image", "series")
def none(count: int = 2) -> Views:
    """Return equal copies of the input.

    Args:
        count: number of views.
    """
    return _cycle([[]], count)


def _cycle(sequences: list[list[Operation]], count: int) -> Views:
    """Return `count` views that cycle through the sequences of operations."""
    if count < 1:
        raise ValueError(f"count is the number of views, at least 1; got {count}.")
    views = [Compose(operations) for operations in sequences]
    return Views([views[index % len(views)] for index in range(count)])


def _view_size(shape: tuple[int, ...], size: int | None) -> int | None:
    """Return the views' height and width in pixels, or None if those of the data do not change."""
    if size is not None or max(shape[1:]) <= LARGE_PIXELS:
        return size
    return min(LARGE_PIXELS, *shape[1:])


def _is_small(shape: tuple[int, ...], size: int | None) -> bool:
    return (_view_size(shape, size) or max(shape[1:])) <= SMALL_PIXELS


def _crop(shape: tuple[int, ...], size: int | None, smallest: float | None) -> RandomResizedCrop:
    if smallest is None:
        smallest = 0.2 if _is_small(shape, size) else 0.08
    if not 0 < smallest <= 1:
        raise ValueError(f"smallest_crop is a share of the image's area in (0, 1]; got {smallest}.")
    return RandomResizedCrop(_view_size(shape, size), scale=(smallest, 1.0))


def _greyscale(shape: tuple[int, ...]) -> list[Operation]:
    """Return the greyscale operation for images with colours; other channels are measurements and are not mixed."""
    return [Greyscale(0.2)] if shape[0] == 3 else []
