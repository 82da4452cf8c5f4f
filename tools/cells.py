"""What the benchmarks on real data share: the sets, the probe, cells kept one by one, and tables of them."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from contrast.core.registry import InputError
from contrast.data import Data
from contrast.evaluation.compare import Difference
from contrast.evaluation.features import Encode, extract
from contrast.evaluation.protocols import evaluate
from contrast.experiment.folder import environment
from contrast.retrieval import exact_search

ROOT = Path(__file__).resolve().parents[1]
METRIC = "balanced_accuracy"
"""The accuracy, where every class has as many test items."""
DRAWS = 5
LABELS = ("1 %", "100 %")

Cells = dict[str, dict[str, Any]]
"""Name -> what was measured."""


@dataclass(frozen=True)
class RealSet:
    """A data set and the config that its cells share.

    Args:
        file: where it lies in the data folder.
        items: how many training items are drawn from it; None: it stays as it is.
        words: the config, as on the command line.
    """

    file: str
    items: int | None
    words: tuple[str, ...]


_SERIES = (
    "views={name: series, jitter: 0.2, mask: 0.3, smallest_crop: 0.5}",
    "encoder.backbone={name: resnet1d, width: 16}",
)
_COMMON = ("optimizer={name: adamw, lr: 2.0e-3, weight_decay: 1.0e-4}", "batch_size=256", "logger=none")
SETS = {
    "fashion_mnist": RealSet(
        "fashion_mnist/fashion_mnist.npz",
        12_000,
        ("views={name: simclr}", "encoder.backbone={name: small_conv, width: 16, blocks: [1, 1, 1, 1]}", *_COMMON),
    ),
    "bonn_eeg": RealSet("bonn_eeg/epilepsy_178.npz", None, (*_SERIES, *_COMMON)),
    "mitbih_beats": RealSet("mitbih_beats/mitbih_beats_180hz.npz", 12_000, (*_SERIES, *_COMMON)),
}


def source_of(name: str, data: Path, folder: Path) -> Path:
    """Give the file of a set: its own, or one with the training items that are drawn, written to `folder` once.

    Raises:
        InputError: where the data folder does not hold the set.
    """
    chosen = SETS[name]
    file = data / chosen.file
    if not file.is_file():
        raise InputError(f"{data} should hold {chosen.file}, and does not; name the folder that holds the real sets.")
    if chosen.items is None:
        return file
    drawn = folder / f"{name}-{chosen.items}.npz"
    if not drawn.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = drawn.with_name(f".{os.getpid()}-{drawn.name}")
        with np.load(file) as arrays:
            np.savez(unfinished, **draw_items({key: arrays[key] for key in arrays}, chosen.items))
        unfinished.replace(drawn)
    return drawn


def draw_items(arrays: Mapping[str, Any], items: int) -> dict[str, Any]:
    """Give the arrays with so many training items, drawn with seed 0 and in their order; test items all stay."""
    count = len(arrays["x_train"])
    rows = np.sort(np.random.default_rng(0).permutation(count)[:items])
    return {key: array[rows] if key.endswith("_train") else array for key, array in arrays.items()}


# ----------------------------------------------------------------------------------------------------- what is measured


def one_per_cent(data: Data) -> int:
    """Give how many labels of each class make a hundredth of all labels, one at least."""
    labelled = int((data.train.target >= 0).sum())
    return max(1, round(labelled / 100 / len(data.classes)))


def probe(encode: Encode, data: Data, seed: int) -> dict[str, Any]:
    """Measure frozen features by linear probes on 1 % and on 100 % of the labels, by the package's own protocols.

    Args:
        encode: raw batch to (N, F).
        data: with labels.
        seed: of the label draws, so that every cell of one seed has the same ones.
    """
    few = {"name": "few_labels", "labels_per_class": one_per_cent(data), "draws": DRAWS}
    found = evaluate({"pretrained": encode}, data, protocols=["linear", few], seed=seed)
    values = {row.protocol: row.value for row in found.results if row.metric == METRIC}
    return {
        "1 %": values["few_labels"],
        "100 %": values["linear"],
        "labels_per_class": few["labels_per_class"],
        "warnings": found.warnings,
    }


def nearest_false(encode: Encode, data: Data, neighbours: int = 8) -> float:
    """Give the share of the training items' nearest strangers, by cosine of their features, that have their label."""
    features, target = extract(encode, data.train)
    unit, item = F.normalize(features), torch.arange(len(features))
    found = exact_search(unit, unit, neighbours, exclude=[(item, item)])
    return float((target[found.position] == target[:, None]).double().mean())


# ------------------------------------------------------------------------------------------------- cells, one file each


def facts() -> dict[str, Any]:
    """Say what the figures were made by and on, without a name."""
    file = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.*)$", file.read_text() if file.exists() else "", re.MULTILINE)
    made = environment()
    for package in ("faiss-cpu", "faiss-gpu"):
        try:
            made["versions"]["faiss"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    processor = model[1] if model else made["processor"]
    return {**made, "processor": processor, "cores": os.cpu_count(), "day": time.strftime("%Y-%m-%d")}


def keep(file: Path, content: Mapping[str, Any]) -> None:
    """Write a cell, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps({**content, "facts": facts()}, indent=1, allow_nan=False) + "\n")
    unfinished.replace(file)


def read(folder: Path) -> Cells:
    """Give the cells that exist."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}


def make(name: str, words: Sequence[str], folder: Path) -> str:
    """Make a cell in a process of its own; give "" or why there is none."""
    log = folder / f"{name}.log"
    folder.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, stdout=file, stderr=file, check=False)
    if done.returncode == 0 and (folder / f"{name}.json").is_file():
        log.unlink()
        return ""
    last = (log.read_text().strip().splitlines() or ["no word"])[-1]
    return f"status {done.returncode}: {last} (see {log})"


def cpu_seconds() -> float:
    """Give the seconds of all cores that this process has used."""
    return sum(os.times()[:4])


# ------------------------------------------------------------------------------------------------------- what is said


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Give the lines of a Markdown table."""
    for row in (head, ["---"] * len(head), *rows):
        yield "| " + " | ".join(row) + " |"
    yield ""


def mean_and_spread(values: Sequence[float], wanted: int, digits: int = 3) -> str:
    """Give the mean ± the standard deviation over seeds, and how many seeds there are where some are missing."""
    if not values:
        return "missing"
    said = f"{statistics.fmean(values):.{digits}f}"
    if len(values) > 1:
        said += f" ± {statistics.stdev(values):.{digits}f}"
    return said if len(values) == wanted else f"{said} ({len(values)} of {wanted})"


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Give ours - theirs over the seeds that both have; None where they share fewer than two."""
    both = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if len(both) < 2:
        return None
    return Difference(statistics.fmean(both), statistics.stdev(both) / len(both) ** 0.5, len(both))


def verdict(found: Difference | None) -> str:
    """Say "better", "worse" or "not clear" (within twice the standard error), or "missing"."""
    if found is None:
        return "missing"
    if abs(found.mean) <= 2 * found.standard_error:
        return "not clear"
    return "better" if found.mean > 0 else "worse"


def in_figures(found: Difference | None) -> str:
    """Give a difference and its standard error, bold where it is clear."""
    if found is None:
        return "missing"
    said = f"{found.mean:+.3f} ± {found.standard_error:.3f}"
    return f"**{said}**" if verdict(found) in ("better", "worse") else said


def made_on(cells: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Say which machines, versions, commits and days the cells come from."""
    kept = [cell["facts"] for cell in cells]
    machines, commits = [], []
    for one in kept:
        versions = ", ".join(f"{name} {version}" for name, version in sorted(one["versions"].items()))
        machines.append(
            f"{one['processor']}, {one['cores']} cores, threads: {one['threads']}, {one['system']}, "
            f"Python {one['python']}, {versions}"
        )
        changed = " with changes not committed" if one["dirty"] else ""
        commits.append(f"`{str(one['commit'])[:12]}`{changed}")
    days = sorted({one["day"] for one in kept})
    yield f"- machine: {_listed(machines)}"
    yield f"- commit: {_listed(commits)}"
    yield f"- days: {days[0]}" + (f" to {days[-1]}" if len(days) > 1 else "")
    yield ""


def _listed(said: Sequence[str]) -> str:
    different = list(dict.fromkeys(said))
    if len(different) == 1:
        return different[0]
    return "; ".join(f"{one} ({said.count(one)} cells)" for one in different)
