"""Tables: how a text file of rows and columns is read, and how a label table meets the files it names."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from contrast.core.registry import InputError, did_you_mean
from contrast.data.collection import LABEL_WORDS, as_text
from contrast.data.dataset import Array

MISSING_WORDS = ("", "nan", "NaN", "NAN", "NA", "N/A", "null", "NULL", "?", "-nan")
ITEM_WORDS = (
    "item",
    "file",
    "filename",
    "file_name",
    "path",
    "filepath",
    "image",
    "image_id",
    "image_path",
    "id",
    "name",
)

_DECIMAL_COMMA = re.compile(r"-?\d+,\d+")


class _Dialect(NamedTuple):
    separator: str
    decimal: str
    header: bool


def read_labels(path: Path) -> dict[str, Array]:
    """Give the columns of a table with a header row, all as text, "" where a cell is empty."""
    dialect = _look(path)._replace(header=True, decimal=".")
    return {name: as_text(column) for name, column in _read(path, dialect, text=True).items()}


def read_values(path: Path) -> tuple[dict[str, Array], bool]:
    """Give the columns of a table, numbers as numbers and the rest as text, and whether it has a header.

    Without a header the columns are called "0", "1" and so on.
    """
    dialect = _look(path)
    return {name: _plain(column) for name, column in _read(path, dialect, text=False).items()}, dialect.header


def _look(path: Path) -> _Dialect:
    """Find out from the first rows how a table is written."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = list(islice((line for line in file if line.strip()), 50))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected a table in UTF-8 text; got other bytes. Save it as UTF-8.") from error
    except OSError as error:
        raise InputError(f"{path}: expected a table; it cannot be read ({error.strerror}).") from error
    if not lines:
        raise InputError(f"{path}: expected a table with rows; the file is empty.")
    counts = {separator: lines[0].count(separator) for separator in ("\t", ";", ",", "|")}
    separator = max(counts, key=lambda mark: counts[mark])
    if counts[separator] == 0:
        separator = r"\s+" if len(lines[0].split()) > 1 and path.suffix.lower() != ".csv" else ","
    rows = [line.split() for line in lines] if separator == r"\s+" else list(csv.reader(lines, delimiter=separator))
    # A semicolon between cells is the mark of a locale that writes 0,5 for a half.
    comma = separator == ";" and any(_DECIMAL_COMMA.fullmatch(cell.strip()) for row in rows[1:] for cell in row)
    return _Dialect(separator, "," if comma else ".", _has_header(rows))


def _has_header(rows: Sequence[Sequence[str]]) -> bool:
    """Tell whether the first row names columns: words where numbers follow, a label's name, or 0, 1, 2, ..."""
    first, below = [cell.strip() for cell in rows[0]], rows[1:]
    numbers = [_is_number(cell) for cell in first]
    if not any(numbers):
        return True
    if any(cell.lower() in LABEL_WORDS for cell in first):
        return True
    if not all(numbers) and any(
        not number and below and all(_is_number(row[index]) for row in below if index < len(row))
        for index, number in enumerate(numbers)
        if first[index]
    ):
        return True
    counted = [cell for cell, number in zip(first, numbers, strict=True) if number]
    return len(counted) > 2 and counted == [str(int(float(counted[0])) + step) for step in range(len(counted))]


def _is_number(cell: str) -> bool:
    cell = cell.strip()
    if cell in MISSING_WORDS:
        return True
    try:
        float(cell.replace(",", "."))
    except ValueError:
        return False
    return True


def _read(path: Path, dialect: _Dialect, *, text: bool) -> dict[str, Any]:
    import pandas

    if dialect.header:
        mark = dialect.separator
        with path.open(encoding="utf-8-sig", newline="") as file:
            line = next(line for line in file if line.strip())
        names = line.split() if mark == r"\s+" else next(csv.reader([line.rstrip("\r\n")], delimiter=mark))
        check_header([name.strip() for name in names], path)
    options: dict[str, Any] = (
        {"dtype": str, "na_filter": False}
        if text
        else {"keep_default_na": False, "na_values": list(MISSING_WORDS), "low_memory": False}
    )
    if dialect.separator != r"\s+":
        options["skipinitialspace"] = True
    try:
        table = pandas.read_csv(
            path,
            sep=dialect.separator,
            decimal=dialect.decimal,
            header=0 if dialect.header else None,
            index_col=False,
            encoding="utf-8-sig",
            **options,
        )
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected a table in UTF-8 text; got other bytes. Save it as UTF-8.") from error
    except pandas.errors.ParserError as error:
        reason = str(error).strip().removeprefix("Error tokenizing data. C error: ").rstrip(".")
        raise InputError(
            f"{path}: expected the same columns in every row ({reason}). Fill short rows with empty cells."
        ) from error
    if not len(table):
        raise InputError(
            f"{path}: expected rows below the header {', '.join(map(str, table.columns))}; there are none."
        )
    return {str(name).strip(): table[name] for name in table.columns}


def check_header(header: Sequence[str], path: Path) -> None:
    """Raise an InputError where two columns have one name."""
    twice = next((name for name, count in Counter(header).items() if count > 1 and name), None)
    if twice is not None:
        raise InputError(f"{path}: expected columns of different names; two are called '{twice}'. Rename one.")


def _plain(column: Any) -> Array:
    """Give a pandas column as whole numbers, floats or text."""
    if column.dtype.kind in "iu":
        return np.asarray(column, dtype=np.int64)
    if column.dtype.kind == "f":
        return np.asarray(column, dtype=np.float64)
    if column.dtype.kind == "b":
        return np.asarray(column, dtype=np.int64)
    return as_text(column)


def attach(table: Path, files: Sequence[str], *, target: str | None) -> tuple[dict[str, Array], str | None, list[str]]:
    """Give the columns of a label table for each file, "" where it has no row, the label column, and notes.

    An item is the file's path below the folder, or any end of that path that only one file has, with or without its
    ending.

    Args:
        table: a table with a header; its column `item` (or path, file, ..., else the first) names files.
        files: paths below the folder, "/" between the parts.
        target: the label column, where the person names it.
    """
    columns = read_labels(table)
    item = next((name for name in columns if name.lower() in ITEM_WORDS), next(iter(columns)))
    rows = _match(columns.pop(item), files, table=table, item=item)
    if not columns:
        raise InputError(
            f"{table}: expected a column '{item}' and others such as 'target'; got '{item}' alone. Add the labels."
        )
    placed = {}
    for name, column in columns.items():
        cells = np.full(len(files), "", dtype=column.dtype)
        cells[rows] = column
        placed[name] = cells
    notes = []
    if (bare := len(files) - len(rows)) > 0:
        notes.append(f"{table.name} says nothing about {bare} of {len(files)} files; they count as unlabelled.")
    label = target if target in placed else next((name for name in placed if name.lower() in LABEL_WORDS), None)
    return placed, label, notes


def _match(items: Array, files: Sequence[str], *, table: Path, item: str) -> Array:
    wanted = [PurePosixPath(str(name).replace("\\", "/").removeprefix("./")) for name in items]
    lengths = {len(path.parts) for path in wanted}
    places: dict[tuple[str, ...], int] = {}
    twice: set[tuple[str, ...]] = set()

    def enter(key: tuple[str, ...], place: int) -> None:
        if places.setdefault(key, place) != place:
            twice.add(key)

    for place, name in enumerate(files):
        path = PurePosixPath(name)
        for length in lengths:
            if length <= len(path.parts):
                enter(path.parts[-length:], place)
                enter((*path.parts[-length:-1], path.stem), place)
    # A whole path below the folder is never in doubt, whatever other paths end like it.
    whole = {PurePosixPath(name).parts: place for place, name in enumerate(files)}
    keys = [path.parts for path in wanted]
    absent = [str(path) for path, key in zip(wanted, keys, strict=True) if key not in places]
    if absent:
        near = did_you_mean(absent[0], [PurePosixPath(name).name for name in files[:10_000]])
        raise InputError(
            f"{table}: every '{item}' must be a file of the folder; {len(absent)} of {len(keys)} are not there, "
            f"the first '{absent[0]}'.{near} Correct or remove those rows."
        )
    doubtful = next((key for key in keys if key in twice and key not in whole), None)
    if doubtful is not None:
        raise InputError(
            f"{table}: '{'/'.join(doubtful)}' in the column '{item}' is the end of several paths; write the path "
            "below the folder, with its ending."
        )
    rows = np.array([whole.get(key, places[key]) for key in keys], dtype=np.int64)
    _, first, counts = np.unique(rows, return_index=True, return_counts=True)
    if np.any(counts > 1):
        again = int(np.sum(counts > 1))
        name = items[first[counts > 1][0]]
        raise InputError(
            f"{table}: expected one row an item; {again} items have several, the first '{name}'. Keep one."
        )
    return rows
