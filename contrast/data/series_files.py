"""Files of series: CSV with one row a series or one row a step, and .ts; a train file finds its test file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from contrast.core.registry import InputError
from contrast.data.collection import LABEL_WORDS, SPLIT_WORDS, Collection, as_text, number_members
from contrast.data.dataset import Array, ArrayItems
from contrast.data.series import describe_gaps, stack_series
from contrast.data.tables import read_values

ID_WORDS = (
    "id", "item", "series", "series_id", "case", "case_id", "unique_id", "uid", "sample", "sample_id", "instance",
    "record", "record_id", "recording", "recording_id", "name",
)  # fmt: skip
TIME_WORDS = (
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
CHANNEL_WORDS = ("channel", "dim", "dim_id", "dimension", "variable", "feature", "sensor", "lead")
VALUE_WORDS = ("value", "values", "reading")

_SPLIT_NAME = re.compile(r"(?P<stem>.*?)(?P<mark>[_\-. ]?)(?P<word>train|test|val|valid|validation)", re.IGNORECASE)
_NUMBERED = re.compile(r"(.*?)-?\d+(?:\.\d+)?")


def find_parts(path: Path) -> dict[str, Path]:
    """Give a set's files by split: X_TRAIN.ts finds X_TEST.ts beside it, and the reverse; {"": path} = one file."""
    own = _SPLIT_NAME.fullmatch(path.stem)
    if own is None:
        return {"": path}
    parts = {SPLIT_WORDS[own["word"].lower()]: path}
    for other in sorted(path.parent.iterdir()):
        found = _SPLIT_NAME.fullmatch(other.stem)
        if (
            found is not None
            and other.suffix.lower() == path.suffix.lower()
            and (found["stem"].lower(), found["mark"]) == (own["stem"].lower(), own["mark"])
        ):
            parts.setdefault(SPLIT_WORDS[found["word"].lower()], other)
    if "train" not in parts or len(parts) == 1:
        return {"": path}
    return {word: parts[word] for word in ("train", "validation", "test") if word in parts}


def read_ts(path: Path) -> Collection:
    """Give the series of a .ts file and of the files that belong to it."""
    return join_ts(find_parts(path))


def join_ts(parts: dict[str, Path]) -> Collection:
    """Give the series of .ts files, by split."""
    try:
        from aeon.datasets import load_from_ts_file
    except ImportError as error:
        raise InputError('.ts files are read by aeon; install it: pip install "contrast-learning[series]".') from error

    series: list[Array] = []
    labels: list[object] = []
    names: list[str] = []
    split: list[str] = []
    for word, path in parts.items():
        try:
            found, target, meta = load_from_ts_file(str(path), return_meta_data=True)
        except (
            Exception
        ) as error:  # aeon raises OSError, ValueError, IndexError or UnicodeDecodeError for a broken file
            raise InputError(f"{path}: expected series in the .ts format; {str(error).rstrip('.')}.") from error
        if not len(found):
            raise InputError(f"{path}: expected series below @data; there are none.")
        series += [np.asarray(one, dtype=np.float64) for one in found]
        labels += list(target) if meta.get("classlabel") or meta.get("targetlabel") else [""] * len(found)
        names += [f"{path.name}[{row}]" for row in range(len(found))]
        split += [word] * len(found)
    shown = next(iter(parts.values()))
    x = stack_series(series, names, where=str(shown))
    columns = {"label": _from_ts(labels)} if any(str(label) for label in labels) else {}
    return _collection(x, names, columns, "label" if columns else None, split, parts, [])


def read_csv(path: Path, *, target: str | None, reserved: Sequence[str | None]) -> Collection:
    """Give the series of a table and of the tables that belong to it.

    Wide: one row a series; value columns, and where there are any a label and more. Long: one row a step, where an id
    and a time column are there and ids repeat; one column of values a channel, or one beside a column of channels.

    Args:
        path: comma, tab, semicolon or space separated.
        target: the label column, where the person names it.
        reserved: columns that the person needs for something else.
    """
    parts = find_parts(path)
    tables = {word: read_values(part) for word, part in parts.items()}
    columns, header = next(iter(tables.values()))
    for part, (other, _) in zip(parts.values(), tables.values(), strict=True):
        if list(other) != list(columns):
            strange = sorted(set(other) ^ set(columns)) or list(other)
            raise InputError(
                f"{part}: expected the columns of {path.name}; they differ, for instance in '{strange[0]}'. "
                "Give both files the same columns in the same order."
            )
    sizes = {word: len(next(iter(table.values()))) for word, (table, _) in tables.items()}
    joined = {name: _join([table[name] for table, _ in tables.values()]) for name in columns}
    split = np.repeat(list(sizes), list(sizes.values()))
    identity, time = _named(joined, ID_WORDS), _named(joined, TIME_WORDS)
    if header and identity and time and len(np.unique(joined[identity])) < len(joined[identity]):
        return _long(path, joined, split, parts, identity=identity, time=time, target=target, reserved=reserved)
    names = [
        f"{part.name}[{row}]" for part, size in zip(parts.values(), sizes.values(), strict=True) for row in range(size)
    ]
    return _wide(path, joined, split, parts, names, header=header, target=target, reserved=reserved)


def _wide(
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
    item = _named(columns, ("item", "id", "name", "series", "series_id", "series_name", "case_id"))
    if header and item and item not in others and len(np.unique(columns[item])) == count:
        names = [str(name) for name in columns.pop(item)]
    label = target if target in columns else _named(columns, LABEL_WORDS) if header else None
    words = [name for name, column in columns.items() if column.dtype.kind == "U" and name not in others]
    if label is None and target in (None, "none"):
        label = _guess_label(path, columns, words, others, header=header, needed=target is None)
        if label is not None:
            notes.append(
                f"Labels are the {_ordinal(list(columns).index(label), len(columns))} column"
                + (f" '{label}'." if header else ".")
            )
    values = [name for name in columns if name not in words and name not in others and name != label]
    if header:
        values = _one_run(values)
    aside = [name for name in columns if name not in values and name != label and name not in others]
    if aside:
        notes.append(
            f"Columns that are no values of the series: {', '.join(aside[:5])}{', ...' if len(aside) > 5 else ''}."
        )
    if len(values) < 2:
        raise InputError(
            f"{path}: expected two or more columns of numbers, the steps of one series a row; got {len(values)} in the "
            f"columns {', '.join(list(columns)[:8])}. One row a step needs columns 'id' and 'time'."
        )
    x = np.stack([columns[name] for name in values], axis=1).astype(np.float64)[:, None]
    x = stack_series(list(x), names, where=str(path))
    beside = {name: column for name, column in columns.items() if name not in values}
    return _collection(
        x, names, beside, label, list(split), parts, [*notes, f"{path.name}: one row a series, {len(values)} steps."]
    )


def _long(
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
    # The same id in the train and the test file means two series.
    ids = as_text(columns[identity])
    if np.any(ids == ""):
        raise InputError(
            f"{path}: expected an '{identity}' in every row; row {int(np.argmax(ids == '')) + 1} has none. Fill it in."
        )
    keys = np.char.add(np.char.add(split.astype(str), ":"), ids)
    codes, members = number_members(keys)
    _, first = np.unique(codes, return_index=True)
    order_found = np.argsort(first, kind="stable")
    rank = np.argsort(order_found, kind="stable")
    codes, first = rank[codes], first[order_found]
    members = [members[index].split(":", 1)[1] for index in order_found]
    label = target if target in columns else _named(columns, LABEL_WORDS) if target in (None, "none") else None
    channel = _named(columns, CHANNEL_WORDS)
    fixed = {name for name in (label, *reserved) if name in columns}
    free = {name: column for name, column in columns.items() if name not in (identity, time)}
    if channel not in fixed:
        free.pop(channel or "", None)
    beside, values = _sort_columns(path, free, codes, first, members, fixed)
    if identity in fixed:
        beside[identity] = columns[identity][first]
    if not values:
        raise InputError(
            f"{path}: expected a column of numbers, such as 'value', beside '{identity}' and '{time}'; got "
            f"{', '.join(columns)}. Add the values."
        )
    if channel is not None and channel not in fixed and len(values) == 1:
        channel_codes, channel_names = number_members(columns[channel])
    else:
        channel_codes, channel_names = np.zeros(len(codes), dtype=np.int64), [""]
    steps = _steps(path, columns[time], codes, time=time)
    place = (codes * len(channel_names) + channel_codes) * (int(steps.max()) + 1) + steps
    found, again = np.unique(place, return_counts=True)
    if np.any(again > 1):
        row = int(np.argmax(place == found[np.argmax(again > 1)]))
        raise InputError(
            f"{path}: expected one row for each '{identity}' and '{time}'; {int(np.sum(again > 1))} have several, the "
            f"first is '{members[codes[row]]}' at {columns[time][row]}. Keep one, or add a column 'channel'."
        )
    x = np.full((len(members), len(values) * len(channel_names), int(steps.max()) + 1), np.nan)
    for index, name in enumerate(values):
        x[codes, channel_codes + index, steps] = columns[name]
    x = stack_series(list(x), members, where=str(path))
    called = channel_names if len(channel_names) > 1 else values
    notes = [
        f"{path.name}: one row a step; series by '{identity}', steps by '{time}', channels: {', '.join(called[:8])}."
    ]
    return _collection(x, members, beside, label, list(split[first]), parts, notes)


def _sort_columns(
    path: Path, columns: dict[str, Array], codes: Array, first: Array, members: Sequence[str], fixed: set[str]
) -> tuple[dict[str, Array], list[str]]:
    """Give what is known once a series, and the names of the columns that hold its values.

    Numbers that never change inside a series are no measurement, unless nothing else is one.
    """
    beside: dict[str, Array] = {}
    numbers = []
    for name, column in columns.items():
        codes_of_values, _ = number_members(column)
        changed = codes_of_values != codes_of_values[first][codes]
        if name in fixed and changed.any():
            row = int(np.argmax(changed))
            raise InputError(
                f"{path}: expected one '{name}' a series; series '{members[codes[row]]}' has "
                f"'{column[first][codes[row]]}' and '{column[row]}'. Make it the same in all rows of a series."
            )
        is_number = column.dtype.kind != "U" and name not in fixed
        if not changed.any() and name.lower() not in VALUE_WORDS:
            beside[name] = column[first]
        elif is_number:
            numbers.append(name)
    if not numbers:
        numbers = [name for name in beside if beside[name].dtype.kind != "U" and name not in fixed]
    return {name: column for name, column in beside.items() if name not in numbers}, numbers


def _steps(path: Path, times: Array, codes: Array, *, time: str) -> Array:
    """Give each row's step inside its series; whole-numbered times keep their gaps, others only their order."""
    if times.dtype.kind == "U":
        import pandas

        try:
            times = pandas.to_datetime(times, format="ISO8601").to_numpy().astype(np.int64)
        except ValueError as error:
            raise InputError(
                f"{path}: expected numbers or dates such as 2024-01-31T12:00 in the column '{time}'; "
                f"{str(error).splitlines()[0].rstrip('.')}. Rewrite them so."
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


def _collection(
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


def _from_ts(labels: Sequence[object]) -> Array:
    """Give labels of a .ts file, numbers where all are."""
    text = as_text("" if str(label).strip() in ("?", "") else label for label in labels)
    try:
        return np.array([float(label) if label else np.nan for label in text])
    except ValueError:
        return text


def _join(columns: Sequence[Array]) -> Array:
    if len({column.dtype.kind == "U" for column in columns}) == 2:
        return np.concatenate([as_text(column) for column in columns])
    return np.concatenate(columns)


def _named(columns: dict[str, Array], words: Sequence[str]) -> str | None:
    lowered = {name.lower(): name for name in reversed(list(columns))}
    return next((lowered[word] for word in words if word in lowered), None)


def _is_index(column: Array) -> bool:
    return column.dtype.kind == "i" and np.array_equal(column, np.arange(len(column)))


def _one_run(names: list[str]) -> list[str]:
    """Give the columns that are numbered alike (t0, t1, ...; 0, 1, ...), where most are; else all."""
    stems: dict[str, list[str]] = {}
    for name in names:
        if (found := _NUMBERED.fullmatch(name)) is not None:
            stems.setdefault(found[1], []).append(name)
    largest = max(stems.values(), key=len, default=[])
    return largest if len(largest) >= 2 and 2 * len(largest) >= len(names) else names


def _guess_label(
    path: Path, columns: dict[str, Array], words: Sequence[str], others: set[str | None], *, header: bool, needed: bool
) -> str | None:
    """Give the column that must hold the labels: the only one of words, or the first or last of few whole numbers."""
    if len(words) == 1:
        return words[0]
    if words and not needed:
        return None
    if words:
        raise InputError(
            f"{path}: expected one column of labels beside the numbers; got {len(words)} columns of words: "
            f"{', '.join(words[:8])}. Name the one that holds the labels: data.target=COLUMN, or data.target=none."
        )
    names = [name for name in columns if name not in others]
    if header and len(_one_run(names)) == len(names):
        return None
    ends = [names[0], names[-1]] if path.suffix.lower() in (".tsv", ".txt", "") else [names[-1], names[0]]
    rest = [columns[name] for name in names[1:-1]]
    usual = float(np.median([len(np.unique(column)) for column in rest])) if rest else 0.0
    fractional = sum(not _whole(column) for column in rest) * 2 > len(rest)
    for name in ends:
        column, distinct = columns[name], len(np.unique(columns[name]))
        few = distinct <= max(2, len(column) // 2)
        if _whole(column) and few and (fractional or 4 * distinct <= usual):
            return name
    return None


def _whole(column: Array) -> bool:
    numbers = column.astype(np.float64)
    return bool(np.all(np.isfinite(numbers)) and np.all(numbers == np.floor(numbers)))


def _ordinal(index: int, count: int) -> str:
    return "first" if index == 0 else "last" if index == count - 1 else f"{index + 1}th"
