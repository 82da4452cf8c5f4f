"""Arrays of .npz and .npy files: which one is the input, which the labels, which the columns."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from contrast.core.registry import InputError
from contrast.data.collection import SPLIT_NAMES, Collection, as_text
from contrast.data.dataset import Array, ArrayItems
from contrast.data.images import arrange_array
from contrast.data.series import arrange_series, check_series, describe_gaps, pad_series

INPUT_NAMES = ("x", "data", "images", "image", "series", "inputs", "features")
TARGET_NAMES = ("y", "label", "labels", "target", "targets")
SPLIT_ORDER = ("", "train", "unlabelled", "validation", "test")


def read_arrays(path: Path, *, size: int | None, channels: int | None) -> Collection:
    """Return the images or series of an .npz or .npy file.

    Input: x, data, images or series; labels: y, label(s) or target(s); the same with _train, _test, _val as prefix or
    suffix are the official split. Every other array of that length is a column; `classes` names the classes. 3-d
    arrays of 8 or 16 bits are grey images (N, H, W), other 3-d arrays series (N, C, L), 2-d ones series (N, L).

    Args:
        path: of the file.
        size: height and width of the images in pixels, None = unchanged.
        channels: number of channels of the images, None = unchanged.

    Raises:
        InputError: if the file or its arrays cannot be used.
    """
    arrays = _load_arrays(path)
    classes = _pop_class_names(arrays)
    named: dict[str, dict[str, Array]] = {}
    for key, array in arrays.items():
        name, split = _name_and_split(key)
        named.setdefault(name, {})[split] = array
    base, notes = _input_name(path, named)
    inputs = {split: named[base][split] for split in SPLIT_ORDER if split in named[base]}
    if "" in inputs and len(inputs) > 1:
        inputs = {"": inputs[""]}
    for split, array in inputs.items():
        _check_input(path, _key(base, split), array)

    columns: dict[str, Array] = {}
    label = None
    for name, by_split in named.items():
        if name == base:
            continue
        column = _column_of(path, name, by_split, inputs, base=base, is_label=name.lower() in TARGET_NAMES)
        if column is not None:
            columns[name] = column
            label = label or (name if name.lower() in TARGET_NAMES else None)
    names = [f"{_key(base, split)}[{row}]" for split, array in inputs.items() for row in range(len(array))]
    official = np.repeat(list(inputs), [len(array) for array in inputs.values()]) if "" not in inputs else None
    kind = _kind_of(next(iter(inputs.values())))
    shape_text = " x ".join(map(str, next(iter(inputs.values())).shape))
    if kind == "image":
        arranged = []
        for split, array in inputs.items():
            part, part_notes = arrange_array(array, size=size, channels=channels, where=f"{path}: {_key(base, split)}")
            arranged.append(part)
            if len(arranged) == 1:
                notes += [note.removeprefix(f"{path}: ") for note in part_notes]
        notes.append(
            f"{_key(base, next(iter(inputs)))} ({shape_text}, {next(iter(inputs.values())).dtype}) is read as images."
        )
    else:
        arranged = [arrange_series(array) for array in inputs.values()]
        length = max(array.shape[2] for array in arranged)
        arranged = [pad_series(array, length) for array in arranged] if _same_channels(arranged) else arranged
        notes.append(
            f"{_key(base, next(iter(inputs)))} ({shape_text}) is read as series of {arranged[0].shape[1]} channels."
        )
    shapes = {_key(base, split): array.shape[1:] for split, array in zip(inputs, arranged, strict=True)}
    if len(set(shapes.values())) > 1:
        found = " and ".join(f"{key} {shape}" for key, shape in shapes.items())
        raise InputError(f"{path}: expected items of one shape; got {found}. Make the shapes equal.")
    dtypes = {array.dtype for array in arranged}
    if len(dtypes) > 1:
        raise InputError(
            f"{path}: expected arrays of one type; got {' and '.join(sorted(map(str, dtypes)))}. Convert them."
        )
    x = arranged[0] if len(arranged) == 1 else np.concatenate(arranged)
    if kind == "series":
        check_series(x, names, where=str(path))
        notes += describe_gaps(x)
    return Collection(
        kind, ArrayItems(x), x.shape[1:], names, columns, label, classes=classes, split=official, notes=notes
    )


def _load_arrays(path: Path) -> dict[str, Array]:
    with path.open("rb") as file:
        start = file.read(6)
    if not start.startswith((b"PK", b"\x93NUMPY")):
        raise InputError(f"{path}: expected arrays that numpy saved; the file's first bytes differ. Save it again.")
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, Mapping):
            return {"x": loaded}
        arrays: dict[str, Array] = dict(loaded.items())
    except ValueError as error:
        if "pickle" in str(error) or "Object arrays" in str(error):
            raise InputError(
                f"{path}: expected arrays of numbers; it contains Python objects, which could run code. "
                "Save numbers: series of unequal length as one array, padded with NaN at the end."
            ) from error
        raise InputError(f"{path}: expected arrays of numpy; {str(error).rstrip('.')}.") from error
    except (OSError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"{path}: the file is broken or not a file of numpy ({str(error).rstrip('.')}).") from error
    if not arrays:
        raise InputError(f"{path}: expected arrays such as x and y; the file contains none.")
    return arrays


def _pop_class_names(arrays: dict[str, Array]) -> tuple[str, ...]:
    for key in ("classes", "class_names", "label_names"):
        if key in arrays and arrays[key].ndim == 1 and arrays[key].dtype.kind in "US":
            return tuple(str(name) for name in arrays.pop(key).astype(str))
    return ()


def _name_and_split(key: str) -> tuple[str, str]:
    """Return ("x", "train") for x_train and for train_x, ("x", "") for x."""
    parts = key.split("_")
    if len(parts) > 1 and parts[-1].lower() in SPLIT_NAMES:
        return "_".join(parts[:-1]), SPLIT_NAMES[parts[-1].lower()]
    if len(parts) > 1 and parts[0].lower() in SPLIT_NAMES:
        return "_".join(parts[1:]), SPLIT_NAMES[parts[0].lower()]
    return key, ""


def _key(base: str, split: str) -> str:
    return f"{base}_{'val' if split == 'validation' else split}" if split else base


def _input_name(path: Path, named: dict[str, dict[str, Array]]) -> tuple[str, list[str]]:
    by_lower_name = {name.lower(): name for name in named}
    for lower_name in INPUT_NAMES:
        if lower_name in by_lower_name:
            return by_lower_name[lower_name], []
    large = [name for name, by_split in named.items() if all(array.ndim >= 2 for array in by_split.values())]
    if len(large) == 1:
        return large[0], [f"The array '{large[0]}' is the input."]
    found = ", ".join(
        f"{_key(name, split)} {array.shape} {array.dtype}"
        for name, parts in named.items()
        for split, array in parts.items()
    )
    raise InputError(
        f"{path}: expected an array x (items, ...), or x_train and x_test, and y for labels; got {found}. "
        "Rename the input to x."
    )


def _check_input(path: Path, key: str, array: Array) -> None:
    if array.dtype.kind not in "biuf":
        raise InputError(f"{path}: expected numbers in {key}; got {array.dtype}. Convert them to uint8 or float32.")
    if array.ndim not in (2, 3, 4):
        raise InputError(
            f"{path}: expected {key} as (items, length), (items, channels, length), (items, height, width) or (items, "
            f"channels, height, width); got {array.ndim} axes, {array.shape}. Reshape it."
        )
    if 0 in array.shape:
        raise InputError(f"{path}: expected items in {key}; its shape is {array.shape}. Remove it or fill it.")


def _kind_of(x: Array) -> Literal["image", "series"]:
    return "image" if x.ndim == 4 or (x.ndim == 3 and x.dtype in (np.uint8, np.uint16, np.bool_)) else "series"


def _same_channels(arrays: list[Array]) -> bool:
    return len({array.shape[1] for array in arrays}) == 1


def _column_of(
    path: Path, name: str, by_split: dict[str, Array], inputs: dict[str, Array], *, base: str, is_label: bool
) -> Array | None:
    """Return one entry per item, missing for splits without the array; None for an array that is not a column."""
    parts: list[Array] = []
    for split, x in inputs.items():
        array = by_split.get(split)
        if array is None:
            parts.append(np.full(len(x), np.nan))
            continue
        if array.ndim == 2 and is_label and array.shape[1] > 1 and np.all(array.sum(axis=1) == 1):
            array = array.argmax(axis=1)
        if array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        if array.ndim == 1 and len(array) == len(x):
            parts.append(array)
        elif is_label:
            expected = f"{len(x)} labels in {_key(name, split)}, one per item of {_key(base, split)}"
            raise InputError(f"{path}: expected {expected}; got {array.shape}. Make the lengths equal.")
        else:
            return None
    if not any(split in by_split for split in inputs):
        return None
    if any(part.dtype.kind in "USO" for part in parts):
        return np.concatenate([as_text(part.astype(str) if part.dtype.kind == "S" else part) for part in parts])
    return np.concatenate(parts)
