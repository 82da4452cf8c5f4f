"""Folders of images: which file is what, by its place and by a label table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from contrast.core.registry import InputError, did_you_mean
from contrast.data.collection import SPLIT_WORDS, Collection
from contrast.data.dataset import Array
from contrast.data.images import IMAGE_ENDINGS, open_files
from contrast.data.tables import attach

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
    """Give the images of a folder: in class folders, beside a label table, or without labels.

    Folders called train, test and val at the top are an official split. A table is `labels`, or a file `labels.csv`
    (or .tsv) at the top; without one the top folders name the classes, where there are several and every image lies
    in one.

    Args:
        folder: searched with all below it.
        labels: path of the label table, as it stands or below the folder.
        target: the label column, where the person names it.
        reserved: columns that the person needs for something else.
        size: side of the square that each image becomes; None = chosen from the images.
        channels: number of channels that each image becomes; None = chosen from the images.
    """
    files, others, empty = list_images(folder)
    if not files:
        found = f"{len(others)} other files, the first '{others[0]}'" if others else "nothing"
        raise InputError(
            f"{folder}: expected image files ({', '.join(ending[1:] for ending in IMAGE_ENDINGS[:7])}, ...); "
            f"the folder holds {found}. Give the folder that holds the images."
        )
    table = _table(folder, labels)
    below, split, notes = _official(files)
    columns, label = _by_place(below, folder=folder, labelled=table is not None or target is not None)
    if table is not None:
        others = [name for name in others if folder / name != table]
        from_table, table_label, table_notes = attach(table, files, target=target)
        columns |= from_table
        label = target or table_label or _only_column(from_table, reserved, place=label, table=table)
        notes += table_notes
    elif label is not None:
        notes.append(f"Labels are the names of the {len(set(columns[label]) - {''})} folders.")
        if empty:
            notes.append(f"{len(empty)} folders hold no image, the first '{empty[0]}'.")
    if others:
        notes.append(f"Skipped {len(others)} files that are no images, the first '{others[0]}'.")
    paths = [folder / name for name in files]
    items, shape, image_notes = open_files(paths, files, size=size, channels=channels, source=str(folder))
    return Collection("image", items, shape, files, columns, label, split=split, notes=[*notes, *image_notes])


def list_images(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """Give the images, the other files and the folders without files, as paths below `folder`, sorted."""
    images: list[str] = []
    others: list[str] = []
    empty: list[str] = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        below = Path(place).relative_to(folder)
        shown = [name for name in files if not name.startswith(".")]
        if not shown and not folders:
            empty.append(below.as_posix())
        for name in shown:
            listed = images if name.lower().endswith(IMAGE_ENDINGS) else others
            listed.append((below / name).as_posix())
    return sorted(images), sorted(others), sorted(empty)


def _table(folder: Path, labels: str | None) -> Path | None:
    if labels is None:
        return next((folder / name for name in TABLE_NAMES if (folder / name).is_file()), None)
    for place in (folder / labels, Path(labels).expanduser()):
        if place.is_file():
            return place
    near = did_you_mean(labels, [path.name for path in folder.iterdir() if path.is_file()][:10_000])
    raise InputError(f"data.labels: expected a table in {folder} or a path to one; there is no '{labels}'.{near}")


def _official(files: Sequence[str]) -> tuple[list[str], Array | None, list[str]]:
    """Give the paths below the folders called train, test and val, and the split that these say."""
    tops = [PurePosixPath(name).parts[0].lower() if "/" in name else "" for name in files]
    if len({SPLIT_WORDS.get(top) for top in tops}) < 2 or not {"train"} <= {SPLIT_WORDS.get(top) for top in tops}:
        return list(files), None, []
    strangers = [name for name, top in zip(files, tops, strict=True) if top not in SPLIT_WORDS]
    if strangers:
        note = f"The folder 'train' is no official split, since '{strangers[0]}' lies beside it."
        return list(files), None, [note]
    below = [PurePosixPath(name).relative_to(PurePosixPath(name).parts[0]).as_posix() for name in files]
    return below, np.array([SPLIT_WORDS[top] for top in tops], dtype=str), []


def _by_place(files: Sequence[str], *, folder: Path, labelled: bool) -> tuple[dict[str, Array], str | None]:
    """Give what the paths say: the top folder and the parent folder of each file, and whether those are labels."""
    paths = [PurePosixPath(name) for name in files]
    tops = np.array([path.parts[0] if len(path.parts) > 1 else "" for path in paths], dtype=str)
    columns = {} if np.all(tops == "") else {"folder": tops}
    if any(len(path.parts) > 2 for path in paths):
        columns["parent"] = np.array([path.parent.as_posix() for path in paths], dtype=str)
    if not columns or np.any(tops == ""):
        return columns, None
    unlabelled = np.array([SPLIT_WORDS.get(top.lower()) == "unlabelled" for top in tops])
    classes = sorted(set(tops[~unlabelled]))
    if len(classes) == 1 and not labelled:
        raise InputError(
            f"{folder}: expected two or more class folders; all {int((~unlabelled).sum())} images lie in "
            f"the one folder '{classes[0]}'. Add the other classes, or give that "
            "folder itself to go without labels."
        )
    return columns | {"folder": np.where(unlabelled, "", tops)}, "folder" if len(classes) > 1 else None


def _only_column(
    columns: dict[str, Array], reserved: Sequence[str | None], *, place: str | None, table: Path
) -> str | None:
    """Give the one column of a table that can be the label where no name says so, else the labels that places give."""
    free = [name for name in columns if name not in reserved]
    if len(free) == 1:
        return free[0]
    if not free or place is not None:
        return place
    raise InputError(
        f"{table}: expected a column 'target' for the labels; got {', '.join(columns)}. Name the one that holds them: "
        "data.target=COLUMN, or data.target=none to go without."
    )
