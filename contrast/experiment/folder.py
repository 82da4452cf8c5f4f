"""The folder of a run: its file names, how each file is read, and writing that never leaves half a file."""

from __future__ import annotations

import io
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from contrast.core.registry import InputError

CONFIG = "config.yaml"
COMMAND = "command.txt"
ENVIRONMENT = "environment.json"
DATA = "data.json"
"""The fingerprint of each split, which `resume` compares."""
STATE = "state.json"
METRICS = "metrics.jsonl"
LOG = "log.txt"
TENSORBOARD = "tensorboard"
CHECKPOINT = "checkpoints/last.ckpt"
VIEWS = "views.png"
EVALUATIONS = "evaluations"
RESULT = "result.json"
"""The results of one protocol; it and the predictions are in a folder of `evaluations/`."""
PREDICTIONS = "predictions.parquet"
RESULTS = "results.json"
SAMPLES = "report.npz"
"""Features, and the samples that the page shows."""
REPORT = "report.html"

State = Literal["running", "stopped", "failed", "done"]


class RunFolder:
    """The folder of one run.

    Args:
        path: the folder; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, base: str, *, out: Path | None = None) -> RunFolder:
        """Create a new folder: `out`, or the next free `runs/<base>-NNN`.

        Raises:
            InputError: where `out` exists and is not empty.
        """
        if out is not None:
            cls.refuse_used(out)
            out.mkdir(parents=True, exist_ok=True)
            return cls(out)
        stem = re.sub(r"[^\w.-]+", "-", base).strip("-.") or "run"
        parent = Path("runs")
        parent.mkdir(exist_ok=True)
        for number in range(1, 10_000):
            try:
                (parent / f"{stem}-{number:03d}").mkdir()
            except FileExistsError:
                continue
            return cls(parent / f"{stem}-{number:03d}")
        raise InputError(f"{parent} contains 9,999 runs called {stem}; remove some, or name a folder with --out.")

    @staticmethod
    def refuse_used(out: Path) -> None:
        """Raise an InputError where a new run's folder exists and is not empty."""
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"--out {out}: it exists and is not empty; name a new folder, or `contrast resume` it.")

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open an existing run.

        Raises:
            InputError: where there is none.
        """
        folder = cls(Path(path))
        if not folder.path.is_dir():
            raise InputError(f"there is no run {path}; give the folder that `contrast pretrain` printed.")
        if not folder.config.is_file():
            raise InputError(f"{path} is not a run: it has no {CONFIG}.")
        return folder

    @property
    def config(self) -> Path:
        """The resolved config; a folder with this file is a run."""
        return self.path / CONFIG

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint."""
        return self.path / CHECKPOINT

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's event files."""
        return self.path / TENSORBOARD

    @property
    def log(self) -> Path:
        """The log."""
        return self.path / LOG

    def describe(self, command: str | None = None) -> None:
        """Write the command that repeats this run, by default this process's own, and the environment."""
        self.write(COMMAND, (command or shlex.join(["contrast", *sys.argv[1:]])) + "\n")
        self.write_json(ENVIRONMENT, environment())

    def write(self, name: str, content: str | bytes) -> Path:
        """Write a file under a temporary name, move it to `name`, and return its path."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.{os.getpid()}")
        draft.write_bytes(content.encode(errors="replace") if isinstance(content, str) else content)
        draft.replace(target)
        return target

    def write_json(self, name: str, content: Any) -> Path:
        """Write a JSON file and return its path."""
        return self.write(name, json.dumps(content, indent=1, allow_nan=False, default=str) + "\n")

    def write_arrays(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> Path:
        """Write arrays as .npz, none of them pickled, and return the file's path."""
        file = io.BytesIO()
        np.savez_compressed(file, allow_pickle=False, **dict(arrays))
        return self.write(name, file.getvalue())

    def read_text(self, name: str) -> str:
        """Return a file's text; "" where the file is missing."""
        file = self.path / name
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the object of a JSON file; {} where the file is missing.

        Raises:
            InputError: where the file is damaged.
        """
        try:
            content = json.loads(self.read_text(name) or "{}")
        except ValueError as error:
            raise self._damaged(name, "JSON", error) from error
        return self._mapping(name, content)

    def read_config(self) -> dict[str, Any]:
        """Return the config as nested mappings; {} where the file is missing.

        Raises:
            InputError: where the file is damaged.
        """
        try:
            content = yaml.safe_load(self.read_text(CONFIG))
        except yaml.YAMLError as error:
            raise self._damaged(CONFIG, "YAML", error) from error
        return self._mapping(CONFIG, content or {})

    def read_arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """Return the arrays of an .npz file; {} where the file is missing.

        Raises:
            InputError: where the file is damaged or contains pickled objects.
        """
        if not (self.path / name).is_file():
            return {}
        try:
            with np.load(self.path / name, allow_pickle=False) as content:
                return {key: content[key] for key in content.files}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise self._damaged(name, ".npz without pickled objects", error) from error

    def _mapping(self, name: str, content: object) -> dict[str, Any]:
        if not isinstance(content, dict):
            raise self._damaged(name, "a mapping", f"got {type(content).__name__}")
        return content

    def _damaged(self, name: str, expected: str, reason: object) -> InputError:
        cause = " ".join(str(reason).split())
        return InputError(
            f"{self.path / name} should be {expected}, but cannot be read: {cause}. Restore or remove it."
        )

    def set_state(self, state: State, step: int, **more: Any) -> None:
        """Write how the run is doing, with the time as its heartbeat."""
        self.write_json(STATE, {"state": state, "step": step, "heartbeat": time.time(), **more})

    def append_metrics(self, row: Mapping[str, float | int]) -> None:
        """Append one line to the metrics."""
        with (self.path / METRICS).open("a") as file:
            file.write(json.dumps(dict(row)) + "\n")

    def metrics(self) -> Iterator[dict[str, float]]:
        """Iterate over the lines of the metrics; a line that a killed process left unfinished is skipped."""
        for line in self.read_text(METRICS).splitlines():
            try:
                content = json.loads(line)
            except ValueError:
                continue
            if isinstance(content, dict):
                yield content

    def drop_metrics_after(self, step: int) -> None:
        """Remove the metrics of steps that a resumed run repeats."""
        given = ((row.get("step", 0), row) for row in self.metrics())
        rows = [row for at, row in given if isinstance(at, int | float) and at <= step]
        self.write(METRICS, "".join(json.dumps(row) + "\n" for row in rows))

    def checkpoint_step(self) -> int:
        """Return the step of the newest checkpoint.

        Raises:
            InputError: where the file is damaged or not the checkpoint of a run.
        """
        try:
            if not zipfile.is_zipfile(self.checkpoint):
                raise ValueError("it is empty, truncated or not a file of torch.save")
            content = torch.load(self.checkpoint, map_location="cpu", weights_only=True, mmap=True)
            if missing := {"global_step", "state_dict", "optimizer_states", "loops"} - set(content):
                raise ValueError(f"it has no {', '.join(sorted(missing))}")
            return int(content["global_step"])
        except Exception as error:
            # torch.load raises almost any type, depending on where the file is damaged.
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            raise InputError(
                f"{self.checkpoint} is damaged ({reason}); restore it, or start again with `contrast pretrain`."
            ) from error


def is_run(path: str | Path) -> bool:
    """True if `path` is the folder of a run."""
    return RunFolder(Path(path)).config.is_file()


def environment() -> dict[str, Any]:
    """Return what the numbers of a run may depend on: versions, device, threads, commit."""
    versions = {}
    for name in ("contrast-learning", "torch", "torchvision", "lightning", "timm", "numpy", "scikit-learn", "aeon"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    commit, dirty = _package_commit()
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": commit,
        "dirty": dirty,
    }


def _package_commit() -> tuple[str | None, bool | None]:
    """Return the commit of the package's own checkout and True if it was changed; (None, None) for a wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None, None
    try:
        head, status = (
            subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
            for command in (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None, None
    return head, bool(status)
