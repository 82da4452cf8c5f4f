"""Files of series: CSV with one row per series or per step, and .ts; a train file is read with its test file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from contrast.core.registry import InputError
from contrast.data.collection import LABEL_NAMES, SPLIT_NAMES, Collection, as_text, number_members
from contrast.data.dataset import Array, ArrayItems
from contrast.data.series import describe_gaps, stack_series
from contrast.data.tables import read_values

ID_NAMES = (
    "id", "item", "series", "series_id", "case", "case_id", "unique_id", "uid", "sample", "sample_id", "instance",
    "record", "record_id", "recording", "recording_id", "name",
)  # fmt: skip
TIME_NAMES = (
    "time",
    "t",
    "timestamp",
    "timestep",
    "time_step",
    "step",
    "timepoint",
    "reading_id",
    "date",
    "datetime",
    "ds",
)
CHANNEL_NAMES = ("channel", "dim", "dim_id", "dimension", "variable", "feature", "sensor", "lead")
VALUE_NAMES = ("value", "values", "reading")

_SPLIT_NAME = re.compile(r"(?P<stem>.*?)(?P<mark>[_\-. ]?)(?P<split>train|test|val|valid|validation)", re.IGNORECASE)
_NUMBERED = re.compile(r"(.*?)-?\d+(?:\.\d+)?")


def find_parts(path: Path) -> dict[str, Path]:
    """Return a set's files by split: X_TRAIN.ts and X_TEST.ts for either of them; {"": path} = one file."""
    own = _SPLIT_NAME.fullmatch(path.stem)
    if own is None:
        return {"": path}
    parts = {SPLIT_NAMES[own["split"].lower()]: path}
    for other in sorted(path.parent.iterdir()):
        found = _SPLIT_NAME.fullmatch(other.stem)
        if (
            found is not None
            and other.suffix.lower() == path.suffix.lower()
            and (found["stem"].lower(), found["mark"]) == (own["stem"].lower(), own["mark"])
        ):
            parts.setdefault(SPLIT_NAMES[found["split"].lower()], other)
    if "train" not in parts or len(parts) == 1:
        return {"": path}
    return {split: parts[split] for split in ("train", "validation", "test") if split in parts}


def read_ts(path: Path) -> Collection:
    """Return the series of a .ts file and of the other files of its set."""
    return join_ts(find_parts(path))


def join_ts(parts: dict[str, Path]) -> Collection:
    """Return the series of .ts files, by split."""
    try:
        from aeon.datasets import load_from_ts_file
    except ImportError as error:
        raise InputError('.ts files are read by aeon; install it: pip install "contrast-learning[series]".') from error

    series: list[Array] = []
    labels: list[object] = []
    names: list[str] = []
    split: list[str] = []
    for split_name, path in parts.items():
        try:
            found, target, meta = load_from_ts_file(str(path), return_meta_data=True)
        # aeon raises OSError, ValueError, IndexError or UnicodeDecodeError for a broken file.
        except Exception as error:
            raise InputError(f"{path}: expected series in the .ts format; {str(error).rstrip('.')}.") from error
        if not len(found):
            raise InputError(f"{path}: expected series below @data; there are none.")
        series += [np.asarray(one, dtype=np.float64) for one in found]
        labels += list(target) if meta.get("classlabel") or meta.get("targetlabel") else [""] * len(found)
        names += [f"{path.name}[{row}]" for row in range(len(found))]
        split += [split_name] * len(found)
    x = stack_series(series, names, where=str(next(iter(parts.values()))))
    columns = {"label": _ts_labels(labels)} if any(str(label) for label in labels) else {}
    return _series_collection(x, names, columns, "label" if columns else None, split, parts, [])


def read_csv(path: Path, *, target: str | None, reserved: Sequence[str | None]) -> Collection:
    """Return the series of a table and of the other tables of its set.

    Wide: one row per series; columns of values, and optionally a label and others. Long: one row per step, if there
    are an id and a time column and ids repeat; one column of values per channel, or one and a column of channels.

    Args:
        path: comma, tab, semicolon or space separated.
        target: the label column, if the user names it.
        reserved: columns that the user needs for another purpose.
    """
    parts = find_parts(path)
    tables = {split_name: read_values(part) for split_name, part in parts.items()}
    columns, header = next(iter(tables.values()))
    for part, (other, _) in zip(parts.values(), tables.values(), strict=True):
        if list(other) != list(columns):
            differing = sorted(set(other) ^ set(columns)) or list(other)
            raise InputError(
                f"{part}: expected the columns of {path.name}; they differ, for instance in '{differing[0]}'. "
                "Write both files with the same columns in the same order."
            )
    sizes = {split_name: len(next(iter(table.values()))) for split_name, (table, _) in tables.items()}
    joined = {name: _concatenate([table[name] for table, _ in tables.values()]) for name in columns}
    split = np.repeat(list(sizes), list(sizes.values()))
    identity, time = _column_named(joined, ID_NAMES), _column_named(joined, TIME_NAMES)
    if header and identity and time and len(np.unique(joined[identity])) < len(joined[identity]):
        return _long_table(path, joined, split, parts, identity=identity, time=time, target=target, reserved=reserved)
    names = [
        f"{part.name}[{row}]" for part, size in zip(parts.values(), sizes.values(), strict=True) for row in range(size)
    ]
    return _wide_table(path, joined, split, parts, names, header=header, target=target, reserved=reserved)


def _wide_table(
    path: Path,
    columns: dict[str, Array],
    split: Array,
    parts: dict[str, Path],
    names: list[str],
    *,
    header: bool,
    target: str | None,
    reserved: Sequence[str | None],
) -> Collection:
    notes = []
    count = len(names)
    first = next(iter(columns))
    if header and first in ("", "Unnamed: 0", "index") and _is_index(columns[first]):
        columns.pop(first)
    others = {target, *reserved} & set(columns)
    item = _column_named(columns, ("item", "id", "name", "series", "series_id", "series_name", "case_id"))
    if header and item and item not in others and len(np.unique(columns[item])) == count:
        names = [str(name) for name in columns.pop(item)]
    label = target if target in columns else _column_named(columns, LABEL_NAMES) if header else None
    text_columns = [name for name, column in columns.items() if column.dtype.kind == "U" and name not in others]
    if label is None and target in (None, "none"):
        label = _guess_label(path, columns, text_columns, others, header=header, needed=target is None)
        if label is not None:
            notes.append(
                f"Labels are the {_ordinal(list(columns).index(label), len(columns))} column"
                + (f" '{label}'." if header else ".")
            )
    values = [name for name in columns if name not in text_columns and name not in others and name != label]
    if header:
        values = _numbered_columns(values)
    unused = [name for name in columns if name not in values and name != label and name not in others]
    if unused:
        notes.append(
            f"Columns that are not values of the series: {', '.join(unused[:5])}{', ...' if len(unused) > 5 else ''}."
        )
    if len(values) < 2:
        raise InputError(
            f"{path}: expected two or more columns of numbers, one row per series; got {len(values)} in the "
            f"columns {', '.join(list(columns)[:8])}. One row per step needs columns 'id' and 'time'."
        )
    x = np.stack([columns[name] for name in values], axis=1).astype(np.float64)[:, None]
    x = stack_series(list(x), names, where=str(path))
    further = {name: column for name, column in columns.items() if name not in values}
    notes.append(f"{path.name}: one row per series, {len(values)} steps.")
    return _series_collection(x, names, further, label, list(split), parts, notes)


def _long_table(
    path: Path,
    columns: dict[str, Array],
    split: Array,
    parts: dict[str, Path],
    *,
    identity: str,
    time: str,
    target: str | None,
    reserved: Sequence[str | None],
) -> Collection:
    # The same id in the train and in the test file is two series.
    ids = as_text(columns[identity])
    if np.any(ids == ""):
        raise InputError(
            f"{path}: expected an '{identity}' in every row; row {int(np.argmax(ids == '')) + 1} has none. Fill it in."
        )
    keys = np.char.add(np.char.add(split.astype(str), ":"), ids)
    codes, members = number_members(keys)
    _, first = np.unique(codes, return_index=True)
    by_first_row = np.argsort(first, kind="stable")
    rank = np.argsort(by_first_row, kind="stable")
    codes, first = rank[codes], first[by_first_row]
    members = [members[index].split(":", 1)[1] for index in by_first_row]
    label = target if target in columns else _column_named(columns, LABEL_NAMES) if target in (None, "none") else None
    channel = _column_named(columns, CHANNEL_NAMES)
    fixed = {name for name in (label, *reserved) if name in columns}
    others = {name: column for name, column in columns.items() if name not in (identity, time)}
    if channel not in fixed:
        others.pop(channel or "", None)
    constant, values = _constant_and_values(path, others, codes, first, members, fixed)
    if identity in fixed:
        constant[identity] = columns[identity][first]
    if not values:
        raise InputError(
            f"{path}: expected a column of numbers, such as 'value', next to '{identity}' and '{time}'; got "
            f"{', '.join(columns)}. Add the values."
        )
    if channel is not None and channel not in fixed and len(values) == 1:
        channel_codes, channel_names = number_members(columns[channel])
    else:
        channel_codes, channel_names = np.zeros(len(codes), dtype=np.int64), [""]
    steps = _steps(path, columns[time], codes, time=time)
    cell = (codes * len(channel_names) + channel_codes) * (int(steps.max()) + 1) + steps
    cells, rows = np.unique(cell, return_counts=True)
    if np.any(rows > 1):
        row = int(np.argmax(cell == cells[np.argmax(rows > 1)]))
        raise InputError(
            f"{path}: expected one row per '{identity}' and '{time}'; {int(np.sum(rows > 1))} have several, the "
            f"first is '{members[codes[row]]}' at {columns[time][row]}. Keep one, or add a column 'channel'."
        )
    x = np.full((len(members), len(values) * len(channel_names), int(steps.max()) + 1), np.nan)
    for index, name in enumerate(values):
        x[codes, channel_codes + index, steps] = columns[name]
    x = stack_series(list(x), members, where=str(path))
    called = channel_names if len(channel_names) > 1 else values
    notes = [
        f"{path.name}: one row per step; series by '{identity}', steps by '{time}', channels: {', '.join(called[:8])}."
    ]
    return _series_collection(x, members, constant, label, list(split[first]), parts, notes)


def _constant_and_values(
    path: Path, columns: dict[str, Array], codes: Array, first: Array, members: Sequence[str], fixed: set[str]
) -> tuple[dict[str, Array], list[str]]:
    """Return the columns that are constant per series, and the names of the columns of values.

    Numbers that are constant in every series are not values, unless there are no others.
    """
    constant: dict[str, Array] = {}
    numbers = []
    for name, column in columns.items():
        codes_of_values, _ = number_members(column)
        changed = codes_of_values != codes_of_values[first][codes]
        if name in fixed and changed.any():
            row = int(np.argmax(changed))
            raise InputError(
                f"{path}: expected one '{name}' per series; series '{members[codes[row]]}' has "
                f"'{column[first][codes[row]]}' and '{column[row]}'. Make it the same in all rows of a series."
            )
        is_number = column.dtype.kind != "U" and name not in fixed
        if not changed.any() and name.lower() not in VALUE_NAMES:
            constant[name] = column[first]
        elif is_number:
            numbers.append(name)
    if not numbers:
        numbers = [name for name in constant if constant[name].dtype.kind != "U" and name not in fixed]
    return {name: column for name, column in constant.items() if name not in numbers}, numbers


def _steps(path: Path, times: Array, codes: Array, *, time: str) -> Array:
    """Return each row's step in its series; integer times include their gaps, for others only the order matters."""
    if times.dtype.kind == "U":
        import pandas

        try:
            times = pandas.to_datetime(times, format="ISO8601").to_numpy().astype(np.int64)
        except ValueError as error:
            raise InputError(
                f"{path}: expected numbers or dates such as 2024-01-31T12:00 in the column '{time}'; "
                f"{str(error).splitlines()[0].rstrip('.')}. Rewrite them."
            ) from error
    elif np.any(np.isnan(times.astype(np.float64))):
        row = int(np.argmax(np.isnan(times.astype(np.float64))))
        raise InputError(f"{path}: expected a '{time}' in every row; row {row + 1} has none. Add it or remove the row.")
    start = np.full(codes.max() + 1, np.inf)
    np.minimum.at(start, codes, times)
    offset = times - start[codes]
    distinct = len(np.unique(offset))
    if np.all(offset == np.floor(offset)) and offset.max() < 2 * distinct:
        return offset.astype(np.int64)
    steps = np.empty(len(times), dtype=np.int64)
    order = np.lexsort((times, codes))
    sorted_codes, sorted_times = codes[order], times[order]
    new_series = np.r_[True, sorted_codes[1:] != sorted_codes[:-1]]
    new_time = new_series | np.r_[True, sorted_times[1:] != sorted_times[:-1]]
    count = np.cumsum(new_time) - 1
    steps[order] = count - count[new_series][np.cumsum(new_series) - 1]
    return steps


def _series_collection(
    x: Array,
    names: list[str],
    columns: dict[str, Array],
    label: str | None,
    split: Sequence[str],
    parts: dict[str, Path],
    notes: list[str],
) -> Collection:
    official = np.array(split, dtype=str) if "" not in parts else None
    if official is not None:
        notes.append(f"Read together: {', '.join(part.name for part in parts.values())}.")
    notes += describe_gaps(x)
    return Collection("series", ArrayItems(x), x.shape[1:], names, columns, label, split=official, notes=notes)


def _ts_labels(labels: Sequence[object]) -> Array:
    """Return labels of a .ts file, as numbers if all are numbers."""
    text = as_text("" if str(label).strip() in ("?", "") else label for label in labels)
    try:
        return np.array([float(label) if label else np.nan for label in text])
    except ValueError:
        return text


def _concatenate(columns: Sequence[Array]) -> Array:
    if len({column.dtype.kind == "U" for column in columns}) == 2:
        return np.concatenate([as_text(column) for column in columns])
    return np.concatenate(columns)


def _column_named(columns: dict[str, Array], words: Sequence[str]) -> str | None:
    lowered = {name.lower(): name for name in reversed(list(columns))}
    return next((lowered[word] for word in words if word in lowered), None)


def _is_index(column: Array) -> bool:
    return column.dtype.kind == "i" and np.array_equal(column, np.arange(len(column)))


def _numbered_columns(names: list[str]) -> list[str]:
    """Return the columns of one numbering (t0, t1, ...; 0, 1, ...) if most columns are, else all."""
    stems: dict[str, list[str]] = {}
    for name in names:
        if (found := _NUMBERED.fullmatch(name)) is not None:
            stems.setdefault(found[1], []).append(name)
    largest = max(stems.values(), key=len, default=[])
    return largest if len(largest) >= 2 and 2 * len(largest) >= len(names) else names


def _guess_label(
    path: Path,
    columns: dict[str, Array],
    text_columns: Sequence[str],
    others: set[str | None],
    *,
    header: bool,
    needed: bool,
) -> str | None:
    """Return the likely label column: the only one of text, or the first or last if it has few distinct integers."""
    if len(text_columns) == 1:
        return text_columns[0]
    if text_columns and not needed:
        return None
    if text_columns:
        raise InputError(
            f"{path}: expected one column of labels next to the numbers; got {len(text_columns)} columns of words: "
            f"{', '.join(text_columns[:8])}. Name the label column: data.target=COLUMN, or data.target=none."
        )
    names = [name for name in columns if name not in others]
    if header and len(_numbered_columns(names)) == len(names):
        return None
    ends = [names[0], names[-1]] if path.suffix.lower() in (".tsv", ".txt", "") else [names[-1], names[0]]
    rest = [columns[name] for name in names[1:-1]]
    median_distinct = float(np.median([len(np.unique(column)) for column in rest])) if rest else 0.0
    fractional = sum(not _is_integer(column) for column in rest) * 2 > len(rest)
    for name in ends:
        column, distinct = columns[name], len(np.unique(columns[name]))
        repeats = distinct <= max(2, len(column) // 2)
        if _is_integer(column) and repeats and (fractional or 4 * distinct <= median_distinct):
            return name
    return None


def _is_integer(column: Array) -> bool:
    numbers = column.astype(np.float64)
    return bool(np.all(np.isfinite(numbers)) and np.all(numbers == np.floor(numbers)))


def _ordinal(index: int, count: int) -> str:
    return "first" if index == 0 else "last" if index == count - 1 else f"{index + 1}th"
