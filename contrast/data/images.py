"""Pixels: files and arrays of any depth, size and number of channels to images of one format."""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from contrast.core.registry import InputError
from contrast.data.dataset import Array, ArrayItems, Items, file_identity

if TYPE_CHECKING:
    # Pillow is imported in the functions that decode, so that listing the data sources stays fast.
    from PIL import Image

IMAGE_ENDINGS = (
    ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".pgm", ".ppm", ".pbm", ".pnm", ".jp2",
)  # fmt: skip
CACHE_BYTES = 2 * 10**9
DEFAULT_SIZE, LARGEST_UNCHANGED = 224, 256

_ORIENTATION = 0x0112
_DEPTHS = {"I": "uint16", "I;16": "uint16", "I;16B": "uint16", "I;16L": "uint16", "I;16N": "uint16", "F": "float32"}
_GREY = ("1", "L", "LA", "La", *_DEPTHS)
_LUMA = (0.299, 0.587, 0.114)

Output = TypeVar("Output")


class ImageHeader(NamedTuple):
    """The properties of an image file that are known before its pixels are decoded."""

    width: int
    height: int
    channels: int
    depth: str
    pages: int


class ImageFormat(NamedTuple):
    """The common format of all images: (channels, height, width) of one depth; `pages` are stacked as channels."""

    channels: int
    height: int
    width: int
    depth: str
    pages: int


@dataclass(frozen=True, eq=False)
class FileItems:
    """Images that are decoded each time they are read, because they do not fit into memory.

    Args:
        paths: the files.
        names: of the files.
        image_format: to which each is converted.
    """

    paths: Sequence[Path]
    names: Sequence[str]
    image_format: ImageFormat

    def read(self, rows: Array) -> Tensor:
        """Return the raw batch of the files at `rows`."""
        return torch.from_numpy(np.stack([self._decode(int(row)) for row in rows]))

    def identity(self, row: int) -> bytes:
        """Return the file's name and size."""
        return file_identity(self.paths[row], self.names[row])

    def content(self, row: int) -> bytes:
        """Return the file's bytes."""
        return self.paths[row].read_bytes()

    def _decode(self, row: int) -> Array:
        from PIL import Image

        try:
            with Image.open(self.paths[row]) as image:
                return decode(image, self.image_format)
        except Exception as error:
            raise InputError(f"{self.paths[row]}: the image cannot be decoded ({error}).") from error


def open_files(
    paths: Sequence[Path], names: Sequence[str], *, size: int | None, channels: int | None, source: str
) -> tuple[Items, tuple[int, int, int], list[str]]:
    """Return the images of files, decoded into memory if they fit, their shape (C, H, W), and notes.

    Raises:
        InputError: for files that are broken or have no common format.
    """
    headers = _for_all(lambda row: read_header(paths[row]), len(paths), names, source=source, doing="opening images")
    image_format, notes = choose_format(headers, names, size=size, channels=channels, source=source)
    shape = (len(paths), image_format.channels, image_format.height, image_format.width)
    if math.prod(shape) * np.dtype(image_format.depth).itemsize > CACHE_BYTES:
        _for_all(lambda row: _check_complete(paths[row]), len(paths), names, source=source, doing="checking images")
        notes.append("The images are too many to keep in memory; they are read from their files in every epoch.")
        return FileItems(paths, names, image_format), image_format[:3], notes

    cache = np.empty(shape, dtype=image_format.depth)

    from PIL import Image

    def fill(row: int) -> None:
        with Image.open(paths[row]) as image:
            cache[row] = decode(image, image_format)

    _for_all(fill, len(paths), names, source=source, doing="reading images")
    return ArrayItems(cache), image_format[:3], notes


def open_images(
    open_image: Callable[[int], Image.Image],
    names: Sequence[str],
    *,
    size: int | None,
    channels: int | None,
    source: str,
) -> tuple[Items, tuple[int, int, int], list[str]]:
    """Return images that another library opens, decoded into memory, their shape (C, H, W), and notes."""
    headers = [_image_header(open_image(row)) for row in range(len(names))]
    image_format, notes = choose_format(headers, names, size=size, channels=channels, source=source)
    cache = np.empty((len(names), *image_format[:3]), dtype=image_format.depth)
    for row in range(len(names)):
        cache[row] = decode(open_image(row), image_format)
    return ArrayItems(cache), image_format[:3], notes


def read_header(path: Path) -> ImageHeader:
    """Return the header of an image file, without decoding its pixels."""
    from PIL import Image

    with warnings.catch_warnings(), Image.open(path) as image:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return _image_header(image)


def choose_format(
    headers: Sequence[ImageHeader], names: Sequence[str], *, size: int | None, channels: int | None, source: str
) -> tuple[ImageFormat, list[str]]:
    """Return the common format for images of these headers, and notes on the changes."""
    notes = []
    depths = {header.depth for header in headers}
    if len(depths) > 1:
        first = {header.depth: name for header, name in reversed(list(zip(headers, names, strict=True)))}
        found = " and ".join(f"{depth} ({first[depth]})" for depth in sorted(depths))
        raise InputError(f"{source}: expected images of one depth; got {found}. Convert them to one.")
    pages = {header.pages for header in headers}
    if len(pages) > 1:
        raise InputError(
            f"{source}: expected the same number of pages in every image; got {sorted(pages)}. Separate them."
        )
    found_channels = Counter(header.channels for header in headers)
    most = max(found_channels)
    if len(found_channels) > 1:
        # Transparency is dropped if some images do not have it.
        most = min(most, 3)
        counts = ", ".join(f"{count} with {number}" for number, count in sorted(found_channels.items()))
        notes.append(f"Images differ in channels ({counts}); all become {channels or most}.")
    channels_out = channels or most
    if channels_out not in (1, 3, 4) and channels_out != most:
        raise InputError(f"data.channels: images of {source} have {most} channels; got {channels_out}. Remove the key.")
    if next(iter(pages)) > 1 and channels_out != most:
        raise InputError(f"data.channels: the {most} pages of each image are its channels; got {channels_out}.")

    sizes = Counter((header.height, header.width) for header in headers)
    height, width = next(iter(sizes))
    if size is None and len(sizes) == 1 and max(height, width) <= LARGEST_UNCHANGED:
        return ImageFormat(channels_out, height, width, *_depth(headers)), notes
    shorter = sorted(min(shape) for shape in sizes.elements())
    side = size or min(DEFAULT_SIZE, shorter[len(shorter) // 2])
    if set(sizes) != {(side, side)}:
        smallest, largest = min(sizes, key=min), max(sizes, key=max)
        found_sizes = f"{smallest[1]} x {smallest[0]}"
        found_sizes += f" to {largest[1]} x {largest[0]}" if smallest != largest else ""
        notes.append(
            f"Images of {found_sizes} pixels (width x height): each is "
            f"resized so that its shorter side is {side} and cropped in the centre to {side} x {side}."
        )
    return ImageFormat(channels_out, side, side, *_depth(headers)), notes


def decode(image: Image.Image, image_format: ImageFormat) -> Array:
    """Return the pixels of an opened image in `image_format`, (C, H, W)."""
    if image.format == "JPEG":
        # The decoder itself halves large images, down to twice the target size, which saves most of the time.
        image.draft(None, (2 * image_format.width, 2 * image_format.height))
    frames = []
    for page in range(image_format.pages):
        if image_format.pages > 1:
            image.seek(page)
        frames.append(_decode_page(image, image_format))
    return np.concatenate(frames)


def arrange_array(x: Array, *, size: int | None, channels: int | None, where: str) -> tuple[Array, list[str]]:
    """Return an array of images as (N, C, H, W) uint8, uint16 or float32, and notes.

    Args:
        x: (N, H, W), (N, C, H, W) or (N, H, W, C), integers, bool, or finite floats.
        size: height and width of the result in pixels, None = unchanged.
        channels: number of channels of the result, None = unchanged.
        where: name of the array, for messages.
    """
    notes = []
    if x.ndim == 3:
        x = x[:, None]
    elif _channels_last(x.shape[1:]):
        notes.append(f"{where}: the last axis is the {x.shape[-1]} channels.")
        x = x.transpose(0, 3, 1, 2)
    x = _supported_depth(x, where)
    if channels is not None and channels != x.shape[1]:
        x = _convert_channels(x, channels)
    if size is not None and x.shape[2:] != (size, size):
        notes.append(
            f"{where}: images of {x.shape[3]} x {x.shape[2]} pixels (width x height) are resized so that the shorter "
            f"side is {size} and cropped in the centre to {size} x {size}."
        )
        x = np.concatenate([_resize(x[start : start + 256], size) for start in range(0, len(x), 256)])
    return np.ascontiguousarray(x), notes


def value_range(least: Any, greatest: Any) -> tuple[float, float]:
    """Return the values that become 0 and 1, for the extremes of uint16 or float32 images.

    Integers: 0 and the smallest 2**b - 1 above all values, since cameras use 10, 12 or 14 of 16 bits. Floats: 0 and 1
    if all values are between them, else the extremes.
    """
    if isinstance(greatest, np.integer):
        return 0.0, float(2 ** max(int(greatest).bit_length(), 1) - 1)
    if least >= 0 and greatest <= 1:
        return 0.0, 1.0
    return float(least), float(greatest) if greatest > least else float(least) + 1.0


def _image_header(image: Image.Image) -> ImageHeader:
    width, height = image.size
    if image.getexif().get(_ORIENTATION, 1) >= 5:
        width, height = height, width
    pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
    if image.mode in _GREY:
        channels = pages
    elif image.mode == "RGBA" and pages == 1:
        channels = 4
    else:
        channels, pages = 3, 1
    return ImageHeader(width, height, channels, _DEPTHS.get(image.mode, "uint8"), pages)


def _depth(headers: Sequence[ImageHeader]) -> tuple[str, int]:
    return headers[0].depth, headers[0].pages


def _decode_page(image: Image.Image, image_format: ImageFormat) -> Array:
    from PIL import Image, ImageOps

    bands = 1 if image_format.pages > 1 else image_format.channels
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image_format.depth == "uint8":
        image = image.convert({1: "L", 3: "RGB", 4: "RGBA"}[bands])
    else:
        # Pillow resizes 16 bits only as floats.
        values = np.asarray(image)
        if image_format.depth == "uint16" and (values.min() < 0 or values.max() > 65535):
            raise ValueError(f"values from {values.min()} to {values.max()} exceed the range of 16 bits")
        image = Image.fromarray(values.astype(np.float32))
    if image.size != (image_format.width, image_format.height):
        image = ImageOps.fit(image, (image_format.width, image_format.height), method=Image.Resampling.BILINEAR)
    values = np.asarray(image)
    if image_format.depth == "uint16":
        values = np.clip(np.rint(values), 0, 65535).astype(np.uint16)
    if values.ndim == 2:
        return np.repeat(values[None], bands, axis=0)
    return values.transpose(2, 0, 1)


def _check_complete(path: Path) -> None:
    """Raise an error for a truncated file; PNG and JPEG are only decoded if their end marker is missing."""
    from PIL import Image

    with path.open("rb") as file:
        start = file.read(2)
        file.seek(max(path.stat().st_size - 64, 0))
        end = file.read()
    if (start == b"\x89P" and b"IEND" in end) or (start == b"\xff\xd8" and b"\xff\xd9" in end):
        return
    with Image.open(path) as image:
        image.load()


def _for_all(
    read: Callable[[int], Output], count: int, names: Sequence[str], *, source: str, doing: str
) -> list[Output]:
    """Return read(row) for all rows, by threads; one error names the number of failed rows and the first of them."""
    from tqdm import tqdm

    broken: list[tuple[str, Exception]] = []

    def attempt(row: int) -> Output | None:
        try:
            return read(row)
        except Exception as error:  # decoders raise many kinds of errors for broken files
            broken.append((names[row], error))
            return None

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        # The progress bar is for terminals only, and for more than two seconds of work.
        results = list(tqdm(pool.map(attempt, range(count)), total=count, desc=doing, disable=None, delay=2))
    if broken:
        name, error = min(broken, key=lambda pair: pair[0])
        files = "1 file is" if len(broken) == 1 else f"{len(broken)} files are"
        raise InputError(
            f"{source}: expected {count} complete images; {files} broken, {'' if len(broken) == 1 else 'the first '}"
            f"'{name}' ({_decoding_error(error)}). Replace or remove them."
        )
    return cast(list[Output], results)


def _decoding_error(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not a readable image"
    return str(error).strip().rstrip(".") or type(error).__name__


def _channels_last(shape: tuple[int, ...]) -> bool:
    first, middle, last = shape
    if first <= 4 < last:
        return False
    return last <= 4 or last < min(first, middle)


def _supported_depth(x: Array, where: str) -> Array:
    if x.dtype == bool:
        return x.astype(np.uint8) * np.uint8(255)
    if x.dtype in (np.uint8, np.uint16):
        return x
    if np.issubdtype(x.dtype, np.integer):
        if x.min() >= 0 and x.max() <= 65535:
            return x.astype(np.uint8 if x.max() <= 255 else np.uint16)
        return x.astype(np.float32)
    x = x.astype(np.float32)
    finite = np.isfinite(x).reshape(len(x), -1).all(axis=1)
    if not finite.all():
        raise InputError(
            f"{where}: expected finite pixels; {int((~finite).sum())} images contain NaN or infinite values, the first "
            f"is number {int(np.argmin(finite))}. Replace those values."
        )
    return x


def _convert_channels(x: Array, channels: int) -> Array:
    found = x.shape[1]
    if found == 1:
        return np.repeat(x, channels, axis=1)
    if channels == 1 and found in (3, 4):
        grey = np.tensordot(np.array(_LUMA, dtype=np.float32), x[:, :3], axes=(0, 1))[:, None]
        return grey if x.dtype == np.float32 else np.rint(grey).astype(x.dtype)
    if channels == 3 and found == 4:
        return x[:, :3]
    raise InputError(
        f"data.channels: {found} channels cannot be converted to {channels}; only grey and colour can be converted. "
        "Remove the key."
    )


def _resize(x: Array, size: int) -> Array:
    height, width = x.shape[2:]
    scale = size / min(height, width)
    resized_to = (max(round(height * scale), size), max(round(width * scale), size))
    values: Tensor = torch.nn.functional.interpolate(
        torch.from_numpy(x.astype(np.float32)), resized_to, mode="bilinear", antialias=True, align_corners=False
    )
    top, left = (resized_to[0] - size) // 2, (resized_to[1] - size) // 2
    resized: Array = values[:, :, top : top + size, left : left + size].numpy()
    if x.dtype == np.float32:
        return resized
    limit: Any = np.iinfo(x.dtype).max
    return np.clip(np.rint(resized), 0, limit).astype(x.dtype)
