"""Sets by name: scikit-learn's digits, the archives of aeon, torchvision's sets."""

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
    """Give the folder where downloaded sets lie: $CONTRAST_DATA, or ./data."""
    return Path(os.environ.get("CONTRAST_DATA", "data")).expanduser()


def read_digits(*, size: int | None, channels: int | None) -> Collection:
    """Give scikit-learn's 1,797 handwritten digits, grey, 8 x 8, values 0 to 16 as floats 0 to 1."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, notes = arrange_array((digits.images / 16).astype(np.float32), size=size, channels=channels, where="digits")
    names = [f"digits[{row}]" for row in range(len(x))]
    return Collection(
        "image", ArrayItems(x), x.shape[1:], names, {"label": digits.target.astype(np.int64)}, "label", notes=notes
    )


def read_aeon(name: str) -> Collection:
    """Give a set of the UCR or UEA archive, with its own split.

    What ships with aeon is read without network; others are looked for below `data_root()` and then downloaded there.
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
        parts = {word: folder / name / f"{name}_{word.upper()}.ts" for word in ("train", "test")}
        if name and all(part.is_file() for part in parts.values()):
            return join_ts(parts)
    known = _archive_names()
    if name not in known:
        raise InputError(f"aeon: there is no set '{name}' in the UCR and UEA archives.{did_you_mean(name, known)}")
    _download(
        f"aeon:{name}",
        lambda: load_classification(name, extract_path=str(data_root())),
        f"Put {name}/{name}_TRAIN.ts and {name}/{name}_TEST.ts there",
    )
    return join_ts(parts)


def read_torchvision(name: str, *, size: int | None, channels: int | None) -> Collection:
    """Give a classification set of torchvision by its class name, with its own split where it has one.

    It is looked for below `data_root()` and downloaded there where it is missing.
    """
    from torchvision import datasets

    known = [known for known in datasets.__all__ if inspect.isclass(getattr(datasets, known))]
    if name not in known:
        raise InputError(f"torchvision has no set '{name}'.{did_you_mean(name, known)} It has: {', '.join(known)}.")
    build = getattr(datasets, name)
    takes = inspect.signature(build).parameters
    if "train" in takes:
        options: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
    elif "split" in takes:
        options = {word: {"split": word} for word in ("train", "test")}
    else:
        options = {"": {}}
    sets = {word: _build(build, name, takes, option) for word, option in options.items()}
    classes = _class_names(next(iter(sets.values())))
    names = [f"{name}:{word or 'all'}[{row}]" for word, one in sets.items() for row in range(len(one))]
    split = np.repeat(list(sets), [len(one) for one in sets.values()]) if "" not in sets else None
    arrays = [_arrays(one) for one in sets.values()]
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
    places = [(one, row) for one in sets.values() for row in range(len(one))]
    found = [one[row][1] for one, row in places[:1]]
    if not all(isinstance(label, int) for label in found):
        raise InputError(f"torchvision:{name} gives no class a picture, so it cannot be read here; name another set.")
    target = np.array([_target(one, row) for one, row in places], dtype=np.int64)
    items, shape, notes = open_images(
        lambda row: places[row][0][places[row][1]][0], names, size=size, channels=channels, source=f"torchvision:{name}"
    )
    return Collection(
        "image", items, shape, names, {"label": target}, "label", classes=classes, split=split, notes=notes
    )


def _build(build: Any, name: str, takes: Any, option: dict[str, Any]) -> Any:
    root: dict[str, Any] = {"root": str(data_root())} if "root" in takes else {}
    try:
        return build(**root, **option)
    except Exception as error:  # each set has its own way to say that it is not there; the download decides
        reason = error
    if "download" not in takes:
        raise InputError(
            f"torchvision:{name} could not be read from {data_root()} ({_first_line(reason)})."
        ) from reason
    return _download(f"torchvision:{name}", lambda: build(**root, **option, download=True), "Put it there")


def _download(source: str, fetch: Callable[[], Any], otherwise: str) -> Any:
    """Give what `fetch` loads into `data_root()`; a failure leaves no folder behind that was not there before."""
    root = data_root()
    above = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        return fetch()
    except Exception as error:  # the network, the servers and their files fail in many ways; all end here
        below = sorted((path for path in root.rglob("*") if path.is_dir()), reverse=True) if above else []
        for folder in [*below, *above]:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise InputError(
            f"{source} is not in the folder '{root}' and could not be downloaded ({_first_line(error)}). "
            f"{otherwise} (or set CONTRAST_DATA to where it is), or check the network."
        ) from error


def _arrays(one: Any) -> tuple[Any, Any] | None:
    data, target = getattr(one, "data", None), getattr(one, "targets", getattr(one, "labels", None))
    if data is None or target is None or len(data) != len(one) or np.ndim(data) not in (3, 4):
        return None
    return np.asarray(data), np.asarray(target, dtype=np.int64)


def _target(one: Any, row: int) -> int:
    for attribute in ("targets", "_labels", "labels", "y"):
        if (known := getattr(one, attribute, None)) is not None and len(known) == len(one):
            return int(known[row])
    for attribute in ("_samples", "samples", "imgs"):
        if (known := getattr(one, attribute, None)) is not None and len(known) == len(one):
            return int(known[row][1])
    return int(one[row][1])


def _class_names(one: Any) -> tuple[str, ...]:
    names = getattr(one, "classes", None)
    return tuple(", ".join(name) if isinstance(name, tuple) else str(name) for name in names) if names else ()


def _archive_names() -> list[str]:
    from aeon.datasets import tsc_datasets

    lists = (getattr(tsc_datasets, name, ()) for name in ("univariate", "multivariate", "tsc_zenodo"))
    return sorted({name for names in lists for name in names})


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
