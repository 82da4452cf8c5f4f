"""`open_data`: from a path or a name to a checked and split data set."""

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
    "FOLDER": "images in class folders, next to a table labels.csv, or without labels; train/ and test/ are a split",
    "FILE.npz": "arrays x and y, or x_train, y_train, x_test, y_test; further arrays are columns",
    "FILE.npy": "one array, without labels",
    "FILE.csv": "series, one row per series or per step; or a label table of the images next to it; also .tsv and .txt",
    "FILE.ts": "series; X_TRAIN.ts finds X_TEST.ts",
}
"""The forms of a data source, and what each is."""

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
    """Return the data set of a path or a name, every item checked.

    Args:
        source: one of the forms in `SOURCES`.
        labels: the label table of an image folder; for other sources the same as `target`.
        target: the column or array with the labels; "none" = without labels.
        split_by: a column (slide, patient, recording) whose members are never in two splits.
        positives: "sample", "label" or a column: items of equal value are positives of each other.
        splits: shares of the labelled items, if the source has no split of its own, {"test": 0.2, "validation": 0.2};
            validation is a share of the labelled train items.
        size: height and width to which images are resized and cropped, in pixels; None = chosen from the images.
        channels: 1, 3 or 4, the channels to which images are converted; None = chosen from the images.
        seed: of the random splits.

    Raises:
        InputError: for a source or argument that cannot be used.

    Example:
        >>> data = open_data("digits", splits={"test": 0.5})
        >>> len(data.train), len(data.test), data.train.x().shape
        (899, 898, torch.Size([899, 1, 8, 8]))
    """
    for key, value in (("size", size), ("channels", channels)):
        if value is not None and (isinstance(value, bool) or value < 1):
            raise InputError(f"data.{key} must be a whole number of 1 or more; got {value!r}.")
    path = _path_of(source)
    if path is not None and path.is_dir() and (file := _data_file(path)) is not None:
        path = file
    if path is not None and path.suffix.lower() in _TABLES and labels is None and _names_images(path):
        path, labels = path.parent, path.name
    if path is None or not path.is_dir():
        if labels is not None and target not in (None, labels):
            raise InputError(f"data.labels and data.target name two columns of {source}: {labels}, {target}. Keep one.")
        target, labels = target or labels, None
    collection = _read_source(
        source, path, labels=labels, target=target, reserved=(split_by, positives), size=size, channels=channels
    )
    if collection.kind == "series" and (size is not None or channels is not None):
        key = "size" if size is not None else "channels"
        raise InputError(f"data.{key} is for images; {source} contains series. Remove the key.")
    return assemble(
        collection, source=source, target=target, split_by=split_by, positives=positives, splits=splits, seed=seed
    )


def _path_of(source: str) -> Path | None:
    """Return `source` as an existing path, or None for a name."""
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
    suggestion = did_you_mean(source, ["digits"])
    if not suggestion and path.parent.is_dir():
        suggestion = did_you_mean(path.name, [other.name for other in path.parent.iterdir()])
    raise InputError(
        f"data.source: there is no file or folder '{source}'.{suggestion} Name a path that exists, or a set."
    )


def _read_source(
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
        raise InputError(f"{path}: expected many images; this is one. Name the folder that contains them.")
    known = ", ".join((*_ARRAYS, *_TABLES, ".ts"))
    raise InputError(f"{path}: files of the type '{ending}' are not read; expected {known} or a folder of images.")


def _data_file(folder: Path) -> Path | None:
    """Return the data file (the first of its parts) of a folder without images; None if there is none."""
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
    """True if the first row below a table's header names an image file."""
    with table.open(encoding="utf-8-sig", errors="replace") as file:
        file.readline()
        cells = re.split(r"[,;\t|]", file.readline().strip())
    return any(cell.strip(' "').lower().endswith(IMAGE_ENDINGS) for cell in cells)
