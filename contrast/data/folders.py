"""Folders of images: the labels and splits of the files, by their folders and by a label table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from contrast.core.registry import InputError, did_you_mean
from contrast.data.collection import SPLIT_NAMES, Collection
from contrast.data.dataset import Array
from contrast.data.images import IMAGE_ENDINGS, open_files
from contrast.data.tables import match_table

TABLE_NAMES = ("labels.csv", "labels.tsv", "labels.txt")


def read_folder(
    folder: Path,
    *,
    labels: str | None,
    target: str | None,
    reserved: Sequence[str | None],
    size: int | None,
    channels: int | None,
) -> Collection:
    """Return the images of a folder: in class folders, with a label table, or without labels.

    Top folders called train, test and val are an official split. The table is `labels`, or a file `labels.csv` (or
    .tsv) at the top; without one the top folders name the classes, if there are several and every image is in one.

    Args:
        folder: searched recursively.
        labels: path of the label table, relative to the folder or to the current one.
        target: the label column, if the user names it.
        reserved: columns that the user needs for another purpose.
        size: height and width to which images are resized and cropped, in pixels; None = chosen from the images.
        channels: number of channels of the result; None = chosen from the images.
    """
    files, others, empty = list_images(folder)
    if not files:
        found = f"{len(others)} other files, the first '{others[0]}'" if others else "nothing"
        raise InputError(
            f"{folder}: expected image files ({', '.join(ending[1:] for ending in IMAGE_ENDINGS[:7])}, ...); "
            f"the folder contains {found}. Name the folder that contains the images."
        )
    table = _label_table(folder, labels)
    below, split, notes = _split_by_top_folder(files)
    columns, label = _folder_columns(below, folder=folder, labelled=table is not None or target is not None)
    if table is not None:
        others = [name for name in others if folder / name != table]
        from_table, table_label, table_notes = match_table(table, files, target=target)
        columns |= from_table
        label = target or table_label or _only_column(from_table, reserved, folder_label=label, table=table)
        notes += table_notes
    elif label is not None:
        notes.append(f"Labels are the names of the {len(set(columns[label]) - {''})} folders.")
        if empty:
            notes.append(f"{len(empty)} folders contain no image, the first '{empty[0]}'.")
    if others:
        notes.append(f"Skipped {len(others)} files that are not images, the first '{others[0]}'.")
    paths = [folder / name for name in files]
    items, shape, image_notes = open_files(paths, files, size=size, channels=channels, source=str(folder))
    return Collection("image", items, shape, files, columns, label, split=split, notes=[*notes, *image_notes])


def list_images(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """Return the images, the other files and the empty folders, as sorted paths relative to `folder`."""
    images: list[str] = []
    others: list[str] = []
    empty: list[str] = []
    for current, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        below = Path(current).relative_to(folder)
        visible = [name for name in files if not name.startswith(".")]
        if not visible and not folders:
            empty.append(below.as_posix())
        for name in visible:
            listed = images if name.lower().endswith(IMAGE_ENDINGS) else others
            listed.append((below / name).as_posix())
    return sorted(images), sorted(others), sorted(empty)


def _label_table(folder: Path, labels: str | None) -> Path | None:
    if labels is None:
        return next((folder / name for name in TABLE_NAMES if (folder / name).is_file()), None)
    for path in (folder / labels, Path(labels).expanduser()):
        if path.is_file():
            return path
    similar = did_you_mean(labels, [path.name for path in folder.iterdir() if path.is_file()][:10_000])
    raise InputError(f"data.labels: expected a table in {folder} or a path to one; there is no '{labels}'.{similar}")


def _split_by_top_folder(files: Sequence[str]) -> tuple[list[str], Array | None, list[str]]:
    """Return the paths relative to the folders train, test and val, the split by these, and notes."""
    tops = [PurePosixPath(name).parts[0].lower() if "/" in name else "" for name in files]
    if len({SPLIT_NAMES.get(top) for top in tops}) < 2 or not {"train"} <= {SPLIT_NAMES.get(top) for top in tops}:
        return list(files), None, []
    outside = [name for name, top in zip(files, tops, strict=True) if top not in SPLIT_NAMES]
    if outside:
        note = f"The folder 'train' is no official split, since '{outside[0]}' is next to it."
        return list(files), None, [note]
    below = [PurePosixPath(name).relative_to(PurePosixPath(name).parts[0]).as_posix() for name in files]
    return below, np.array([SPLIT_NAMES[top] for top in tops], dtype=str), []


def _folder_columns(files: Sequence[str], *, folder: Path, labelled: bool) -> tuple[dict[str, Array], str | None]:
    """Return the top folder and the parent folder of each file as columns, and the column that is the label."""
    paths = [PurePosixPath(name) for name in files]
    tops = np.array([path.parts[0] if len(path.parts) > 1 else "" for path in paths], dtype=str)
    columns = {} if np.all(tops == "") else {"folder": tops}
    if any(len(path.parts) > 2 for path in paths):
        columns["parent"] = np.array([path.parent.as_posix() for path in paths], dtype=str)
    if not columns or np.any(tops == ""):
        return columns, None
    unlabelled = np.array([SPLIT_NAMES.get(top.lower()) == "unlabelled" for top in tops])
    classes = sorted(set(tops[~unlabelled]))
    if len(classes) == 1 and not labelled:
        raise InputError(
            f"{folder}: expected two or more class folders; all {int((~unlabelled).sum())} images are in "
            f"the one folder '{classes[0]}'. Add the other classes, or name that folder itself to use no labels."
        )
    return columns | {"folder": np.where(unlabelled, "", tops)}, "folder" if len(classes) > 1 else None


def _only_column(
    columns: dict[str, Array], reserved: Sequence[str | None], *, folder_label: str | None, table: Path
) -> str | None:
    """Return the only column of a table that can be the label, or the label column from the folders."""
    free = [name for name in columns if name not in reserved]
    if len(free) == 1:
        return free[0]
    if not free or folder_label is not None:
        return folder_label
    raise InputError(
        f"{table}: expected a column 'target' for the labels; got {', '.join(columns)}. Name the label column: "
        "data.target=COLUMN, or data.target=none to use no labels."
    )
