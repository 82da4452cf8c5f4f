"""`open_data`: from what a person types to a checked, split data set."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from contrast.core.registry import InputError, did_you_mean
from contrast.data.arrays import read_arrays
from contrast.data.assemble import assemble
from contrast.data.collection import Collection
from contrast.data.dataset import Data
from contrast.data.folders import TABLE_NAMES, list_images, read_folder
from contrast.data.images import IMAGE_ENDINGS
from contrast.data.named import read_aeon, read_digits, read_torchvision
from contrast.data.series_files import find_parts, read_csv, read_ts

SOURCES = {
    "digits": "scikit-learn's 1,797 handwritten digits",
    "aeon:NAME": "a set of the UCR or UEA archive; some ship with aeon, others are downloaded",
    "torchvision:NAME": "a set of torchvision, from ./data or $CONTRAST_DATA, else downloaded",
    "FOLDER": "images in class folders, beside a table labels.csv, or without labels; train/ and test/ are a split",
    "FILE.npz": "arrays x and y, or x_train, y_train, x_test, y_test; further arrays are columns",
    "FILE.npy": "one array, without labels",
    "FILE.csv": "series, one row a series or one row a step; or a label table of images beside it; .tsv and .txt too",
    "FILE.ts": "series; X_TRAIN.ts finds X_TEST.ts",
}

_TABLES, _ARRAYS = (".csv", ".tsv", ".txt"), (".npz", ".npy")


def open_data(
    source: str,
    *,
    labels: str | None = None,
    target: str | None = None,
    split_by: str | None = None,
    positives: str = "sample",
    splits: Mapping[str, float] | None = None,
    size: int | None = None,
    channels: int | None = None,
    seed: int = 0,
) -> Data:
    """Give the data set behind a path or a name, every item checked.

    Args:
        source: one of the forms in `SOURCES`.
        labels: the label table of an image folder; elsewhere the same as `target`.
        target: the column or array that holds the labels; "none" = go without.
        split_by: a column (slide, patient, recording) whose members never lie on two sides of a split.
        positives: "sample", "label" or a column: whose members are positives of each other.
        splits: shares of the labelled items where the source has no split of its own, {"test": 0.2, "validation": 0.2};
            validation is a share of the labelled train items.
        size: side of the square that images are resized and cropped to, in pixels; None = chosen from the images.
        channels: 1, 3 or 4, the channels that images are converted to; None = chosen from the images.
        seed: of the splits that are drawn.

    Raises:
        InputError: for everything about the source or the arguments that is not as expected.
    """
    for key, value in (("size", size), ("channels", channels)):
        if value is not None and (isinstance(value, bool) or value < 1):
            raise InputError(f"data.{key} must be a whole number of 1 or more; got {value!r}.")
    path = _find(source)
    if path is not None and path.is_dir() and (inside := _set_in(path)) is not None:
        path = inside
    if path is not None and path.suffix.lower() in _TABLES and labels is None and _names_images(path):
        path, labels = path.parent, path.name
    if path is None or not path.is_dir():
        if labels is not None and target not in (None, labels):
            raise InputError(f"data.labels and data.target name two columns of {source}: {labels}, {target}. Keep one.")
        target, labels = target or labels, None
    collection = _read(
        source, path, labels=labels, target=target, reserved=(split_by, positives), size=size, channels=channels
    )
    if collection.kind == "series" and (size is not None or channels is not None):
        key = "size" if size is not None else "channels"
        raise InputError(f"data.{key} is for images; {source} holds series. Leave it out.")
    return assemble(
        collection, source=source, target=target, split_by=split_by, positives=positives, splits=splits, seed=seed
    )


def _find(source: str) -> Path | None:
    """Give the path that `source` is, or None where it is a name."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if source == "digits" or source.startswith(("aeon:", "torchvision:")):
        return None
    if (scheme := re.match(r"(\w+):", source)) is not None and "/" not in scheme[1]:
        raise InputError(
            f"data.source: '{scheme[1]}:' is no known kind of source."
            f"{did_you_mean(scheme[1], ('aeon', 'torchvision'))} "
            f"Known: {', '.join(SOURCES)}."
        )
    near = did_you_mean(source, ["digits"])
    if not near and path.parent.is_dir():
        near = did_you_mean(path.name, [other.name for other in path.parent.iterdir()])
    raise InputError(
        f"data.source: there is no file or folder '{source}'.{near} Give a path that exists, or a set's name."
    )


def _read(
    source: str,
    path: Path | None,
    *,
    labels: str | None,
    target: str | None,
    reserved: tuple[str | None, ...],
    size: int | None,
    channels: int | None,
) -> Collection:
    if path is None:
        if source == "digits":
            return read_digits(size=size, channels=channels)
        library, name = source.split(":", 1)
        if library == "aeon":
            return read_aeon(name)
        return read_torchvision(name, size=size, channels=channels)
    if path.is_dir():
        return read_folder(path, labels=labels, target=target, reserved=reserved, size=size, channels=channels)
    ending = path.suffix.lower()
    if ending in _ARRAYS:
        return read_arrays(path, size=size, channels=channels)
    if ending == ".ts":
        return read_ts(path)
    if ending in _TABLES:
        return read_csv(path, target=target, reserved=reserved)
    if ending in IMAGE_ENDINGS:
        raise InputError(f"{path}: expected many images; this is one. Give the folder that holds them.")
    known = ", ".join((*_ARRAYS, *_TABLES, ".ts"))
    raise InputError(f"{path}: files of the type '{ending}' are not read; expected {known} or a folder of images.")


def _set_in(folder: Path) -> Path | None:
    """Give the data file (the first of its parts) of a folder without images; None where there is none."""
    names, others, _ = list_images(folder)
    if names:
        return None
    for ending in (".ts", *_ARRAYS, *_TABLES):
        files = [folder / name for name in others if name.lower().endswith(ending) and name not in TABLE_NAMES]
        files = [file for file in files if file.parent == folder]
        if not files:
            continue
        if len({frozenset(find_parts(file).values()) for file in files}) == 1:
            return files[0]
        shown = ", ".join(file.name for file in files[:5])
        raise InputError(
            f"{folder}: expected images or one data file; got {len(files)} ({shown}, ...). Name one of them."
        )
    return None


def _names_images(table: Path) -> bool:
    """Tell whether the first row below a table's header names an image file."""
    with table.open(encoding="utf-8-sig", errors="replace") as file:
        file.readline()
        cells = re.split(r"[,;\t|]", file.readline().strip())
    return any(cell.strip(' "').lower().endswith(IMAGE_ENDINGS) for cell in cells)
