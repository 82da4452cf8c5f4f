"""Tables: reading text files of rows and columns, and matching a label table to the files that it names."""

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
from contrast.data.collection import LABEL_NAMES, as_text
from contrast.data.dataset import Array

MISSING_VALUES = ("", "nan", "NaN", "NAN", "NA", "N/A", "null", "NULL", "?", "-nan")
ITEM_NAMES = (
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
    """Return the columns of a table with a header row, all as text, "" for empty cells."""
    dialect = _detect_dialect(path)._replace(header=True, decimal=".")
    return {name: as_text(column) for name, column in _read_columns(path, dialect, text=True).items()}


def read_values(path: Path) -> tuple[dict[str, Array], bool]:
    """Return the columns of a table, numbers as numbers and the rest as text, and True if it has a header.

    Without a header the columns are called "0", "1" and so on.
    """
    dialect = _detect_dialect(path)
    columns = _read_columns(path, dialect, text=False)
    return {name: _column_values(column) for name, column in columns.items()}, dialect.header


def _detect_dialect(path: Path) -> _Dialect:
    """Return the separator, the decimal mark and the header of a table, from its first rows."""
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
    # Locales that write 0,5 for a half separate cells by semicolons.
    comma = separator == ";" and any(_DECIMAL_COMMA.fullmatch(cell.strip()) for row in rows[1:] for cell in row)
    return _Dialect(separator, "," if comma else ".", _has_header(rows))


def _has_header(rows: Sequence[Sequence[str]]) -> bool:
    """True if the first row names columns: words above numbers, a label's name, or 0, 1, 2, ..."""
    first, below = [cell.strip() for cell in rows[0]], rows[1:]
    numbers = [_is_numeric(cell) for cell in first]
    if not any(numbers):
        return True
    if any(cell.lower() in LABEL_NAMES for cell in first):
        return True
    if not all(numbers) and any(
        not number and below and all(_is_numeric(row[index]) for row in below if index < len(row))
        for index, number in enumerate(numbers)
        if first[index]
    ):
        return True
    counted = [cell for cell, number in zip(first, numbers, strict=True) if number]
    return len(counted) > 2 and counted == [str(int(float(counted[0])) + step) for step in range(len(counted))]


def _is_numeric(cell: str) -> bool:
    cell = cell.strip()
    if cell in MISSING_VALUES:
        return True
    try:
        float(cell.replace(",", "."))
    except ValueError:
        return False
    return True


def _read_columns(path: Path, dialect: _Dialect, *, text: bool) -> dict[str, Any]:
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
        else {"keep_default_na": False, "na_values": list(MISSING_VALUES), "low_memory": False}
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
    """Check that no two columns have the same name, else raise an InputError."""
    repeated = next((name for name, count in Counter(header).items() if count > 1 and name), None)
    if repeated is not None:
        raise InputError(f"{path}: expected columns of different names; two are called '{repeated}'. Rename one.")


def _column_values(column: Any) -> Array:
    """Return a pandas column as integers, floats or text."""
    if column.dtype.kind in "iu":
        return np.asarray(column, dtype=np.int64)
    if column.dtype.kind == "f":
        return np.asarray(column, dtype=np.float64)
    if column.dtype.kind == "b":
        return np.asarray(column, dtype=np.int64)
    return as_text(column)


def match_table(
    table: Path, files: Sequence[str], *, target: str | None
) -> tuple[dict[str, Array], str | None, list[str]]:
    """Return the columns of a label table per file ("" for files without a row), the label column, and notes.

    An item is the file's path relative to the folder, or any end of that path that is unique among the files, with or
    without the file's ending.

    Args:
        table: a table with a header; its column `item` (or path, file, ..., else the first) names files.
        files: paths relative to the folder, "/" between the parts.
        target: the label column, if the user names it.
    """
    columns = read_labels(table)
    item = next((name for name in columns if name.lower() in ITEM_NAMES), next(iter(columns)))
    rows = _match_files(columns.pop(item), files, table=table, item=item)
    if not columns:
        raise InputError(
            f"{table}: expected a column '{item}' and others such as 'target'; got '{item}' only. Add the labels."
        )
    by_file = {}
    for name, column in columns.items():
        cells = np.full(len(files), "", dtype=column.dtype)
        cells[rows] = column
        by_file[name] = cells
    notes = []
    if (unlisted := len(files) - len(rows)) > 0:
        notes.append(f"{table.name} does not list {unlisted} of {len(files)} files; they are unlabelled.")
    label = target if target in by_file else next((name for name in by_file if name.lower() in LABEL_NAMES), None)
    return by_file, label, notes


def _match_files(items: Array, files: Sequence[str], *, table: Path, item: str) -> Array:
    """Return the file index of each item."""
    paths = [PurePosixPath(str(name).replace("\\", "/").removeprefix("./")) for name in items]
    lengths = {len(path.parts) for path in paths}
    by_end: dict[tuple[str, ...], int] = {}
    ambiguous: set[tuple[str, ...]] = set()

    def enter(key: tuple[str, ...], index: int) -> None:
        if by_end.setdefault(key, index) != index:
            ambiguous.add(key)

    for index, name in enumerate(files):
        path = PurePosixPath(name)
        for length in lengths:
            if length <= len(path.parts):
                enter(path.parts[-length:], index)
                enter((*path.parts[-length:-1], path.stem), index)
    # A complete path is never ambiguous, even if other paths end with it.
    by_path = {PurePosixPath(name).parts: index for index, name in enumerate(files)}
    keys = [path.parts for path in paths]
    absent = [str(path) for path, key in zip(paths, keys, strict=True) if key not in by_end]
    if absent:
        similar = did_you_mean(absent[0], [PurePosixPath(name).name for name in files[:10_000]])
        raise InputError(
            f"{table}: every '{item}' must be a file of the folder; {len(absent)} of {len(keys)} are not there, "
            f"the first '{absent[0]}'.{similar} Correct or remove those rows."
        )
    several = next((key for key in keys if key in ambiguous and key not in by_path), None)
    if several is not None:
        raise InputError(
            f"{table}: '{'/'.join(several)}' in the column '{item}' is the end of several paths; write the path "
            "relative to the folder, with its ending."
        )
    rows = np.array([by_path.get(key, by_end[key]) for key in keys], dtype=np.int64)
    _, first, counts = np.unique(rows, return_index=True, return_counts=True)
    if np.any(counts > 1):
        repeated = int(np.sum(counts > 1))
        name = items[first[counts > 1][0]]
        raise InputError(
            f"{table}: expected one row per item; {repeated} items have several, the first '{name}'. Keep one."
        )
    return rows
