"""The folder of a run: what stands where, and how it is written so that a crash leaves whole files."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from contrast.core.registry import InputError

State = Literal["running", "stopped", "failed", "done"]


class RunFolder:
    """A run's folder: `config.yaml`, `metrics.jsonl`, `checkpoints/`, `results.json`, `report.html` and the rest.

    Args:
        path: the folder; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, base: str, *, out: Path | None = None) -> RunFolder:
        """Make a new folder: `out`, or the next free `runs/<base>-NNN`.

        Raises:
            InputError: where `out` holds something already.
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
        raise InputError(f"{parent} holds 9,999 runs called {stem}; clear it up, or name a folder with --out.")

    @staticmethod
    def refuse_used(out: Path) -> None:
        """Raise an InputError where a new run's folder holds something already."""
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"--out {out}: it exists and is not empty; name a new folder, or `contrast resume` it.")

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open an existing run.

        Raises:
            InputError: where there is none.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise InputError(f"there is no run {folder}; give the folder that `contrast pretrain` named.")
        if not (folder / "config.yaml").is_file():
            raise InputError(f"{folder} is not a run: it has no config.yaml.")
        return cls(folder)

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint."""
        return self.path / "checkpoints" / "last.ckpt"

    def describe(self, command: str | None = None) -> None:
        """Write `command.txt` and `environment.json`."""
        self.write("command.txt", (command or shlex.join(["contrast", *sys.argv[1:]])) + "\n")
        self.write_json("environment.json", environment())

    def write(self, name: str, content: str | bytes) -> Path:
        """Write a file whole: beside it first, then moved into its place."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        beside.replace(target)
        return target

    def write_json(self, name: str, content: Any) -> Path:
        """Write a JSON file whole."""
        return self.write(name, json.dumps(content, indent=1, allow_nan=False, default=str) + "\n")

    def read_json(self, name: str) -> Any:
        """Read a JSON file; {} where there is none."""
        file = self.path / name
        return json.loads(file.read_text()) if file.is_file() else {}

    def set_state(self, state: State, step: int, **more: Any) -> None:
        """Write `state.json`: how the run stands, and when it last said so."""
        self.write_json("state.json", {"state": state, "step": step, "heartbeat": time.time(), **more})

    def append_metrics(self, row: Mapping[str, float | int]) -> None:
        """Add a line to `metrics.jsonl`."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(dict(row)) + "\n")

    def metrics(self) -> Iterator[dict[str, float]]:
        """Walk over the lines of `metrics.jsonl`."""
        file = self.path / "metrics.jsonl"
        if file.is_file():
            for line in file.read_text().splitlines():
                yield json.loads(line)

    def forget_after(self, step: int) -> None:
        """Drop the metrics of steps that a resumed run will take again."""
        kept = [row for row in self.metrics() if row.get("step", 0) <= step]
        self.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))


def latest_step(checkpoint: Path) -> int:
    """Read at which step a checkpoint was taken."""
    return int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"])


def environment() -> dict[str, Any]:
    """Give what the numbers of a run may depend on: versions, device, threads, commit."""
    versions = {}
    for name in ("contrast-learning", "torch", "torchvision", "lightning", "timm", "numpy", "scikit-learn", "aeon"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    commit, dirty = _commit()
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


def _commit() -> tuple[str | None, bool | None]:
    """Give the commit of the package's own checkout and whether it was changed; nothing for an installed wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None, None
    try:
        asked = [["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"]]
        head, status = (
            subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
            for command in asked
        )
    except (OSError, subprocess.SubprocessError):
        return None, None
    return head, bool(status)
