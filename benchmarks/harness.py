"""What the benchmarks share: cells that are stored one by one, so that a stopped run resumes, and ways to measure.

A cell is one measured configuration, a dict:

    key       the configuration: names and numbers
    result    what was measured: numbers, or mappings and lists of them
    commit    of this checkout, and `dirty`: whether `contrast` or the benchmarks differ from it
    versions  of Python and packages
    machine   processor, cores, threads, system
    date      of the measurement

Results are a JSON list of cells in one file. A run measures the cells that the file lacks, writes the file after each
of them, and prints the selected cells as CSV or JSON. Times are CPU seconds of the process on one thread, unless a
script says otherwise.
"""

import argparse
import csv
import fnmatch
import io
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # read when torch and FAISS are imported, after this
MIB = 2**20
PACKAGES = (
    *("contrast-learning", "torch", "torchvision", "lightning", "timm", "numpy", "scikit-learn", "aeon", "faiss-cpu"),
    *("faiss-gpu", "lightly", "open_clip_torch", "pytorch-metric-learning"),
)
Key = dict[str, Any]
Cell = dict[str, Any]

# -------------------------------------------------------------------------------------------- what a result depends on


def revision(checkout: Path) -> dict[str, Any]:
    """Return the commit of a checkout, and whether `contrast` or the benchmarks differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    changed = git("status", "--porcelain", "--", "contrast", "benchmarks", ":!benchmarks/results")
    return {"commit": git("rev-parse", "HEAD"), "dirty": changed != ""}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages among PACKAGES."""
    installed = {distribution.metadata["Name"]: distribution.version for distribution in metadata.distributions()}
    return {"python": platform.python_version()} | {name: installed[name] for name in PACKAGES if name in installed}


def machine() -> dict[str, Any]:
    """Return the processor, cores, threads and system; no host name."""
    file = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.*)$", file.read_text() if file.exists() else "", re.MULTILINE)
    return {
        "processor": model[1] if model else platform.machine(),
        "cores": os.cpu_count(),
        "threads": 1,
        "system": f"{platform.system()} {platform.machine()}",
    }


# ------------------------------------------------------------------------------------------------------------ the cells


def named(key: Mapping[str, Any]) -> str:
    """Return the name of a cell: the values of its key that are not empty, joined by hyphens."""
    return "-".join(str(value) for value in key.values() if value != "")


class Results:
    """The cells of one file, or of this run only.

    Args:
        file: a JSON list of cells, which need not exist; None: nothing is stored.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.cells: list[Cell] = json.loads(file.read_text()) if file and file.is_file() else []

    def find(self, **key: Any) -> Cell | None:
        """Return the cell with exactly this key."""
        return next((cell for cell in self.cells if cell["key"] == key), None)

    def add(self, key: Key, result: Mapping[str, Any]) -> None:
        """Store a cell in place of one with its key, and write the file, completely or not at all."""
        about = {**revision(ROOT), "versions": versions(), "machine": machine(), "date": time.strftime("%Y-%m-%d")}
        cell: Cell = json.loads(json.dumps({"key": key, "result": result, **about}, allow_nan=False))
        self.cells = [other for other in self.cells if other["key"] != cell["key"]] + [cell]
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self.file.with_name(f".{os.getpid()}-{self.file.name}")
            unfinished.write_text(json.dumps(self.cells, indent=1) + "\n")
            unfinished.replace(self.file)


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark.

    Args:
        name: of the script; its cells go to runs/benchmarks/NAME.json by default.
        description: the docstring of the script.
    """
    found = argparse.ArgumentParser(
        prog=f"benchmarks/{name}.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    stored = ROOT / "runs" / "benchmarks" / f"{name}.json"
    found.add_argument("--cells", nargs="+", default=["*"], metavar="PATTERN", help="names as --list prints them")
    found.add_argument("--out", type=Path, default=stored, help=f"the file of cells; runs/benchmarks/{name}.json")
    found.add_argument("--again", action="store_true", help="measure the selected cells also where the file has them")
    found.add_argument("--list", action="store_true", help="print the names of the selected cells and measure nothing")
    found.add_argument("--json", action="store_true", help="print the cells as JSON")
    found.add_argument("--csv", dest="json", action="store_false", help="print the cells as CSV, the default")
    found.add_argument("--over", metavar="KEY", help="print mean and standard deviation over the values of this key")
    found.add_argument(
        "--minus",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="with --over: print the paired differences to the cells with these values, and their standard errors",
    )
    return found


def run(
    given: argparse.Namespace,
    plan: Callable[[Results], Sequence[Key]],
    measure: Callable[[Key, Results], Mapping[str, Any]],
) -> list[Cell]:
    """Measure what is missing, print the selected cells and return them.

    Args:
        given: the words that `parser` has read.
        plan: returns the keys of all cells; is called again after each cell, since keys can depend on results.
        measure: returns the result of a key; the results of other cells are its second argument.
    """
    results = Results(given.out)
    finished: list[Key] = []

    def selected() -> list[Key]:
        return [key for key in plan(results) if any(fnmatch.fnmatch(named(key), one) for one in given.cells)]

    def missing() -> list[Key]:
        keys = [key for key in selected() if key not in finished]
        return keys if given.again else [key for key in keys if results.find(**key) is None]

    if given.list:
        print("\n".join(named(key) for key in selected()))
        return []
    while keys := missing():
        key = keys[0]
        print(f"{named(key)} ({len(keys)} to measure) ...", file=sys.stderr, flush=True)
        results.add(key, measure(key, results))
        finished.append(key)
    cells = [cell for key in selected() if (cell := results.find(**key))]
    if given.json:
        print(json.dumps(cells, indent=1))
    else:
        print(table(summary(cells, given.over, given.minus) if given.over else map(columns, cells)), end="")
    return cells


# --------------------------------------------------------------------------------------------------------------- tables


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with names joined by dots; a list becomes JSON."""
    if isinstance(value, Mapping):
        return {key: leaf for part in value for key, leaf in flat(value[part], f"{name}.{part}".lstrip(".")).items()}
    return {name: json.dumps(value) if isinstance(value, list) else value}


def columns(cell: Cell) -> dict[str, Any]:
    """Return the row of a cell: its key, its result, the commit and the date."""
    return {**cell["key"], **flat(cell["result"]), **{name: cell[name] for name in ("commit", "dirty", "date")}}


def summary(cells: Sequence[Cell], over: str, minus: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return one row per value of a key's other parts: means and standard deviations, or paired differences.

    Args:
        cells: what to summarise.
        over: the part of the key whose values are repetitions, such as "seed".
        minus: "part=value" of the key: each cell is compared with the one that has these values and its repetition;
            the row then has the mean of the differences and its standard error.
    """
    base = dict(word.split("=", 1) for word in minus)
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(named({**cell["key"], over: ""}), []).append(cell)
    rows = []
    for group in groups.values():
        values = [flat(cell["result"]) for cell in group]
        if base:
            others = [one for cell in group if (one := partner(cells, cell, base))]
            if len(others) < len(group) or others == group:
                continue
            values = [
                {name: value - other[name] for name, value in one.items() if number(value) and number(other.get(name))}
                for one, other in zip(values, (flat(cell["result"]) for cell in others), strict=True)
            ]
        row = {name: value for name, value in group[0]["key"].items() if name != over} | {"count": len(group)}
        for name in values[0]:
            column = [one[name] for one in values if number(one.get(name))]
            if column:
                spread = statistics.stdev(column) if len(column) > 1 else 0.0
                kind, spread = ("error", spread / len(column) ** 0.5) if base else ("deviation", spread)
                row |= {f"{name}.mean": statistics.fmean(column), f"{name}.{kind}": spread}
        rows.append(row)
    return rows


def partner(cells: Sequence[Cell], cell: Cell, base: Mapping[str, str]) -> Cell | None:
    """Return the cell whose key differs from this cell's in the values of `base` only."""
    key = {name: base.get(name, str(value)) for name, value in cell["key"].items()}
    return next((one for one in cells if {name: str(part) for name, part in one["key"].items()} == key), None)


def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as CSV with the columns of all of them."""
    rows = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# ---------------------------------------------------------------------------------------------------------- measurement


def cpu_seconds(run: Callable[[], Any], calls: int = 1) -> float:
    """Return the CPU seconds per call of this process."""
    began = time.process_time()
    for _ in range(calls):
        run()
    return (time.process_time() - began) / calls


def take_turns(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return `rounds` measurements of each contender, taken in turns in rotating order."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for _ in range(rounds):
        for name in order:
            found[name].append(contenders[name]())
        order = order[1:] + order[:1]
    return found


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles of at least two values."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"low": low, "median": median, "high": high}


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles of the ratios per round."""
    return quartiles([a / b for a, b in zip(ours, theirs, strict=True)])


def process_bytes(name: str) -> int:
    """Return an entry of /proc/self/status: "VmRSS", or "VmHWM", the largest since `reset_peak`; Linux only."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, name
    return 1024 * int(found[1])


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class Worker:
    """A process of one thread that answers jobs, see `serve`.

    Args:
        words: the command line after the interpreter.
        environment: variables.
    """

    def __init__(self, *words: str, **environment: str) -> None:
        self.command, self.environment = [sys.executable, "-W", "ignore", *words], {**os.environ, **environment}
        self.start()

    def start(self) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(self.command, env=self.environment, text=True, stdin=pipe, stdout=pipe)

    def ask(self, **job: Any) -> dict[str, Any]:
        """Return the answer to a job.

        Raises:
            ChildProcessError: where the job fails or the process ends; another process is then started.
        """
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # The process has ended; its status follows.
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            self.start()
            raise ChildProcessError(f"the process ended with status {status}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ChildProcessError(answer["error"])
        return answer

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def serve(answer: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    """Answer the jobs of a `Worker`, one JSON object per line, until the input ends."""
    for line in sys.stdin:
        try:
            found = answer(json.loads(line))
        except Exception as error:  # The parent raises it.
            text = next(iter(str(error).splitlines()), "")
            found = {"error": re.sub(r"(/[^\s/]+)+/", "", f"{type(error).__name__}: {text}")[:160]}
        print(json.dumps(found), flush=True)
