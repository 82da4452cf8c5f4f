"""Data sets by name: scikit-learn's digits, the archives of aeon, torchvision's data sets."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from contrast.core.registry import InputError, did_you_mean
from contrast.data.collection import Collection
from contrast.data.dataset import ArrayItems
from contrast.data.images import arrange_array, open_images
from contrast.data.series_files import join_ts


def data_root() -> Path:
    """Return the folder of downloaded sets: $CONTRAST_DATA, or ./data."""
    return Path(os.environ.get("CONTRAST_DATA", "data")).expanduser()


def read_digits(*, size: int | None, channels: int | None) -> Collection:
    """Return scikit-learn's 1,797 handwritten digits, grey, 8 x 8, values 0 to 16 as floats 0 to 1."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, notes = arrange_array((digits.images / 16).astype(np.float32), size=size, channels=channels, where="digits")
    names = [f"digits[{row}]" for row in range(len(x))]
    return Collection(
        "image", ArrayItems(x), x.shape[1:], names, {"label": digits.target.astype(np.int64)}, "label", notes=notes
    )


def read_aeon(name: str) -> Collection:
    """Return a set of the UCR or UEA archive, with its own split.

    Sets that ship with aeon are read without network; others are read from `data_root()` or downloaded there.
    """
    try:
        import aeon
        from aeon.datasets import load_classification
    except ImportError as error:
        raise InputError(
            f'aeon:{name} is read by aeon; install it: pip install "contrast-learning[series]".'
        ) from error

    shipped = Path(aeon.__file__).parent / "datasets" / "data"
    for folder in (shipped, data_root()):
        parts = {split: folder / name / f"{name}_{split.upper()}.ts" for split in ("train", "test")}
        if name and all(part.is_file() for part in parts.values()):
            return join_ts(parts)
    names = _archive_names()
    if name not in names:
        raise InputError(f"aeon: there is no set '{name}' in the UCR and UEA archives.{did_you_mean(name, names)}")
    _download(
        f"aeon:{name}",
        lambda: load_classification(name, extract_path=str(data_root())),
        f"Put {name}/{name}_TRAIN.ts and {name}/{name}_TEST.ts there",
    )
    return join_ts(parts)


def read_torchvision(name: str, *, size: int | None, channels: int | None) -> Collection:
    """Return a classification set of torchvision by its class name, with its own split if it has one.

    It is read from `data_root()`, or downloaded there if it is missing.
    """
    from torchvision import datasets

    known = [other for other in datasets.__all__ if inspect.isclass(getattr(datasets, other))]
    if name not in known:
        raise InputError(f"torchvision has no set '{name}'.{did_you_mean(name, known)} It has: {', '.join(known)}.")
    build = getattr(datasets, name)
    parameters = inspect.signature(build).parameters
    if "train" in parameters:
        options: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
    elif "split" in parameters:
        options = {split: {"split": split} for split in ("train", "test")}
    else:
        options = {"": {}}
    sets = {split: _build_dataset(build, name, parameters, option) for split, option in options.items()}
    classes = _class_names(next(iter(sets.values())))
    names = [f"{name}:{split or 'all'}[{row}]" for split, one in sets.items() for row in range(len(one))]
    split = np.repeat(list(sets), [len(one) for one in sets.values()]) if "" not in sets else None
    arrays = [_arrays_of(one) for one in sets.values()]
    if all(array is not None for array in arrays):
        x, notes = arrange_array(
            np.concatenate([array[0] for array in arrays if array is not None]),
            size=size,
            channels=channels,
            where=name,
        )
        target = np.concatenate([array[1] for array in arrays if array is not None])
        notes = [note for note in notes if "last axis" not in note]
        return Collection(
            "image",
            ArrayItems(x),
            x.shape[1:],
            names,
            {"label": target},
            "label",
            classes=classes,
            split=split,
            notes=notes,
        )
    positions = [(one, row) for one in sets.values() for row in range(len(one))]
    found = [one[row][1] for one, row in positions[:1]]
    if not all(isinstance(label, int) for label in found):
        raise InputError(f"torchvision:{name} does not have one class per image, so it cannot be read; name another.")
    target = np.array([_target(one, row) for one, row in positions], dtype=np.int64)
    items, shape, notes = open_images(
        lambda row: positions[row][0][positions[row][1]][0],
        names,
        size=size,
        channels=channels,
        source=f"torchvision:{name}",
    )
    return Collection(
        "image", items, shape, names, {"label": target}, "label", classes=classes, split=split, notes=notes
    )


def _build_dataset(build: Any, name: str, parameters: Any, option: dict[str, Any]) -> Any:
    root: dict[str, Any] = {"root": str(data_root())} if "root" in parameters else {}
    try:
        return build(**root, **option)
    except Exception as error:  # the sets raise different errors when their files are missing; the download decides
        reason = error
    if "download" not in parameters:
        raise InputError(
            f"torchvision:{name} could not be read from {data_root()} ({_error_summary(reason)})."
        ) from reason
    return _download(f"torchvision:{name}", lambda: build(**root, **option, download=True), "Put it there")


def _download(source: str, fetch: Callable[[], Any], otherwise: str) -> Any:
    """Return the result of `fetch`, which loads into `data_root()`; after a failure no new empty folder remains."""
    root = data_root()
    created = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        return fetch()
    except Exception as error:  # networks, servers and broken files raise many kinds of errors
        below = sorted((path for path in root.rglob("*") if path.is_dir()), reverse=True) if created else []
        for folder in [*below, *created]:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise InputError(
            f"{source} is not in the folder '{root}' and could not be downloaded ({_error_summary(error)}). "
            f"{otherwise} (or set CONTRAST_DATA to where it is), or check the network."
        ) from error


def _arrays_of(one: Any) -> tuple[Any, Any] | None:
    data, target = getattr(one, "data", None), getattr(one, "targets", getattr(one, "labels", None))
    if data is None or target is None or len(data) != len(one) or np.ndim(data) not in (3, 4):
        return None
    return np.asarray(data), np.asarray(target, dtype=np.int64)


def _target(one: Any, row: int) -> int:
    for attribute in ("targets", "_labels", "labels", "y"):
        if (labels := getattr(one, attribute, None)) is not None and len(labels) == len(one):
            return int(labels[row])
    for attribute in ("_samples", "samples", "imgs"):
        if (samples := getattr(one, attribute, None)) is not None and len(samples) == len(one):
            return int(samples[row][1])
    return int(one[row][1])


def _class_names(one: Any) -> tuple[str, ...]:
    names = getattr(one, "classes", None)
    return tuple(", ".join(name) if isinstance(name, tuple) else str(name) for name in names) if names else ()


def _archive_names() -> list[str]:
    from aeon.datasets import tsc_datasets

    lists = (getattr(tsc_datasets, name, ()) for name in ("univariate", "multivariate", "tsc_zenodo"))
    return sorted({name for names in lists for name in names})


def _error_summary(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
