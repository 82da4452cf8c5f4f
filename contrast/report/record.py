"""What a run's folder says, read without knowing how it was made."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from contrast.core.registry import InputError


@dataclass(frozen=True)
class RunRecord:
    """The files of a run's folder; what is missing is empty.

    Args:
        name: the folder's name.
        config: the text of config.yaml.
        command: the text of command.txt.
        environment: environment.json.
        state: state.json, {"state": running | stopped | failed | done, "step": ..., "heartbeat": seconds since 1970,
            "why": what went wrong}.
        metrics: metrics.jsonl, an object a line.
        results: results.json, schema 1.
        views: the bytes of views.png, None where there is none.
        arrays: report.npz, as `contrast.report.samples.save_samples` describes it.
    """

    name: str
    config: str
    command: str
    environment: Mapping[str, Any]
    state: Mapping[str, Any]
    metrics: list[dict[str, Any]]
    results: Mapping[str, Any]
    views: bytes | None
    arrays: Mapping[str, NDArray[Any]]

    def series(self, key: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Give the steps and values (n,) of a measured number, in the order of steps; the latest of a step counts."""
        found = {
            float(line["step"]): float(line[key])
            for line in self.metrics
            if _is_number(line.get("step")) and _is_number(line.get(key))
        }
        steps = sorted(found)
        return np.array(steps), np.array([found[step] for step in steps])


def read_run(run: Path) -> RunRecord:
    """Give what the folder of a run holds.

    Raises:
        InputError: where there is no such folder or no file of a run in it, or a file is damaged.
    """
    if not run.is_dir():
        raise InputError(f"a run's folder was expected at {run}; there is none. Give the folder that pretrain printed.")
    files = ("config.yaml", "command.txt", "state.json", "metrics.jsonl", "results.json")
    if not any((run / name).is_file() for name in files):
        raise InputError(
            f"{run} is no run's folder: it holds none of {', '.join(files)}. Give the one pretrain printed."
        )
    views = run / "views.png"
    return RunRecord(
        name=run.resolve().name,
        config=_text(run / "config.yaml"),
        command=_text(run / "command.txt").strip(),
        environment=_mapping(run / "environment.json"),
        state=_mapping(run / "state.json"),
        metrics=list(_lines(run / "metrics.jsonl")),
        results=_mapping(run / "results.json"),
        views=views.read_bytes() if views.is_file() else None,
        arrays=_arrays(run / "report.npz"),
    )


def flat(tree: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, str]]:
    """Walk over nested mappings as pairs of a dotted key and its value as text."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{key}.")
        elif isinstance(value, list | tuple):
            yield f"{above}{key}", ", ".join(str(item) for item in value)
        elif value is not None:
            yield f"{above}{key}", str(value)


def moment(heartbeat: object) -> str:
    """Say when: seconds since 1970 become a date in UTC, text stays."""
    if isinstance(heartbeat, int | float) and not isinstance(heartbeat, bool):
        return datetime.fromtimestamp(heartbeat, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return str(heartbeat or "")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _mapping(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} should be JSON, but cannot be read: {error}. Evaluate the run again.") from error
    if not isinstance(content, Mapping):
        raise InputError(f"{path} should hold a JSON object; got {type(content).__name__}. Evaluate the run again.")
    return content


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    for line in _text(path).splitlines():
        try:
            content = json.loads(line)
        except ValueError:
            continue  # a run that was killed while it wrote leaves half a line
        if isinstance(content, dict):
            yield content


def _arrays(path: Path) -> Mapping[str, NDArray[Any]]:
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} should be an .npz without pickled objects; {error}. Remove it or train again."
        ) from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
