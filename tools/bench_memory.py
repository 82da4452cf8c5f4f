"""Trains with candidates from the batch, a queue, retrieval and the like on two real sets, and probes the features."""

from __future__ import annotations

import argparse
import fnmatch
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from contrast.evaluation.compare import Difference
from contrast.evaluation.features import Encode
from contrast.experiment import config as configuration
from contrast.experiment import run as runs
from contrast.experiment.build import build, read_data
from contrast.experiment.folder import RunFolder
from contrast.experiment.named_models import encode_with, load
from tools import cells
from tools.cells import ROOT, SETS, Cells

PAGE = ROOT / "docs" / "benchmarks" / "memory.md"
FOLDER = ROOT / "runs" / "bench_memory"
SEEDS = (0, 1, 2)
STEPS = {"fashion_mnist": 276, "bonn_eeg": 210}
"""The budget, six epochs: the same for every method of a set."""


UNTRAINED, BASE, TO_COME = "untrained", "in_batch", "the best"
"""The encoder as it starts; InfoNCE's own source; a source that is not known yet."""
RATES = ("false_negatives", "false_negatives_removed", "true_negatives_removed")


@dataclass(frozen=True)
class Part:
    """A loss, or where its candidates, positives or weights come from, as a change of the config.

    Args:
        about: in words.
        words: of the config, as on the command line.
        around: the loss itself; of a source, what the LOSS goes into, after a WARMUP in epochs.
        more: further arguments of InfoNCE with this source.
    """

    about: str
    words: tuple[str, ...] = ()
    around: str = "LOSS"
    more: str = ""


_HARD = ("memory=[{name: hard_negatives, neighbours: 8, refresh: 1 epochs}]",)
SOURCES = {
    "in_batch": Part("the other samples of the batch alone"),
    "queue": Part(
        "a momentum twin's keys, a queue of 4,096 of them (MoCo v2)",
        ("encoder.joint=false", "encoder.momentum=0.99", "memory=[{name: queue, size: 4096}]"),
        more=", candidates: memory",
    ),
    "hard": Part("the batch, and each anchor's 8 nearest strangers of all samples, found anew every epoch", _HARD),
    "hard_margin": Part(
        "the same, without negatives above 95 % of the positive's similarity",
        _HARD,
        "{name: false_negatives, relative_margin: 0.05, loss: LOSS}",
    ),
    "hard_top": Part(
        "the same, without each anchor's 8 most similar negatives",
        _HARD,
        "{name: false_negatives, top: 8, loss: LOSS}",
    ),
    "neighbour_batches": Part(
        "batches in which each sample's 3 nearest follow it, found anew every epoch",
        ("sampler={name: neighbours, neighbours: 3, refresh: 1 epochs}",),
    ),
    "nnclr": Part(
        "the nearest in a queue of 4,096 is the positive, with a predictor (NNCLR)",
        (
            "encoder.head={name: mlp, layers: 3, last_batch_norm: true}",
            "encoder.predictor={name: mlp, layers: 2}",
            "memory=[{name: nearest_positives, store: {name: queue, size: 4096}}]",
        ),
        more=", candidates: across",
    ),
    "bad_pairs": Part(
        "the batch; samples that were always too easy or too hard weigh less after 60 % of the epochs (DBPM)",
        around="{name: bad_pairs, warmup_epochs: WARMUP, weight: peak_one, loss: LOSS}",
    ),
}
LOSSES = {
    "info_nce": Part("InfoNCE, tau 0.2", around="name: info_nce, temperature: 0.2"),
    "cacr": Part("CACR", around="name: cacr"),
    "cwcl": Part(
        "CWCL, tau 0.2; the frozen network is that of in-batch InfoNCE of the same seed",
        around="name: cwcl, temperature: 0.2",
    ),
    "amcl": Part(
        "AMCL with 2 heads of width 64, form logsumexp, network inner_product; with NNCLR without a predictor",
        ("encoder.head={name: multi_head, heads: 2, out: 64}", "encoder.predictor=null"),
        "name: amcl, form: logsumexp, network: inner_product",
    ),
}
OTHERS = [name for name in SOURCES if name != BASE]
WITH_BEST = [loss for loss in LOSSES if loss != "info_nce"]


@dataclass(frozen=True)
class Cell:
    """One training: a set, a loss, a source, a seed; `untrained` is the encoder as it starts."""

    set: str
    loss: str
    source: str
    seed: int

    def __str__(self) -> str:
        return f"{self.set}-{self.loss}-{self.source}-{self.seed}"


def plan(names: Sequence[str], found: Cells) -> list[Cell]:
    """Give all cells that are defined so far, whole seeds first; those with the best source last."""
    methods = [(UNTRAINED, "-"), *(("info_nce", source) for source in SOURCES), *((loss, BASE) for loss in WITH_BEST)]
    made = [Cell(name, *method, seed) for name in names for seed in SEEDS for method in methods]
    for name in names:
        chosen = best_source(found, name)
        if chosen is not None:
            made += [Cell(name, loss, chosen, seed) for loss in WITH_BEST for seed in SEEDS]
    return made


def best_source(found: Cells, name: str) -> str | None:
    """Give the source with which InfoNCE has the highest validation accuracy; None until every seed of all exists."""
    means = {}
    for source in OTHERS:
        values = value_of(found, Cell(name, "info_nce", source, 0), lambda kept: kept["validation"])
        if len(values) < len(SEEDS):
            return None
        means[source] = statistics.fmean(values.values())
    return max(means, key=means.__getitem__)


# ------------------------------------------------------------------------------------------------------------ one cell


def settings(cell: Cell, source: Path, folder: Path, steps: int, epochs: int) -> list[str]:
    """Give a cell's config, as on the command line; what stands later wins."""
    words = [*SETS[cell.set].words, f"data.source={source}", f"seed={cell.seed}", f"budget={steps} steps"]
    if cell.loss == UNTRAINED:
        return words
    chosen, loss = SOURCES[cell.source], LOSSES[cell.loss]
    more = chosen.more if cell.loss == "info_nce" else ""
    inner = "{" + loss.around + more + "}"
    words += [
        *chosen.words,
        *loss.words,
        f"loss={chosen.around.replace('LOSS', inner).replace('WARMUP', str(max(1, round(0.6 * epochs))))}",
        "evaluate.protocols=[]",
        "report.samples=false",
        # By the online probe a source is chosen: a ridge classifier, judged by validation items.
        f"probe.every={steps}",
        "probe.items=5000",
    ]
    if cell.loss == "cwcl":
        words.append(f"encoder.reference={run_of(replace(cell, loss='info_nce', source=BASE), folder)}")
    return words


def run_of(cell: Cell, folder: Path) -> Path:
    """Give the folder of a cell's run."""
    return (folder / "runs" / str(cell)).resolve()


def measure(cell: Cell, data: Path, folder: Path, steps: int) -> None:
    """Train and probe a cell, and write it."""
    began = time.monotonic()
    source = cells.source_of(cell.set, data, folder / "data")
    plain = configuration.load(None, settings(replace(cell, loss=UNTRAINED), source, folder, steps, 0)).config
    opened = read_data(plain)
    experiment = build(plain, opened)
    epochs = steps / experiment.sampler().steps_per_epoch
    kept: dict[str, Any] = {}
    encode: Encode = encode_with(experiment.encoder)
    if cell.loss != UNTRAINED:
        path = run_of(cell, folder)
        shutil.rmtree(path, ignore_errors=True)
        words = settings(cell, source, folder, steps, round(epochs))
        runs.start(configuration.load(None, words), out=path, command=f"a cell of tools/bench_memory: {cell}")
        kept = of_run(RunFolder(path))
        encode = load(path).features
        shutil.rmtree(path / "checkpoints")
    trained = time.monotonic() - began
    kept |= {
        **vars(cell),
        "steps": steps,
        "epochs": round(epochs, 1),
        "items": len(opened.train),
        "probe": cells.probe(encode, opened, cell.seed),
        "nearest_false": cells.nearest_false(encode, opened),
        "probe_seconds": round(time.monotonic() - began - trained, 1),
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(cells.cpu_seconds(), 1),
    }
    cells.keep(folder / f"{cell}.json", kept)


def of_run(run: RunFolder) -> dict[str, Any]:
    """Give what a run's records say: validation accuracy, seconds, and the mean rates of false negatives."""
    rows = list(run.metrics())
    last: dict[str, float] = {}
    for row in rows:
        last |= row
    rates = {key: [row[key] for row in rows if key in row] for key in RATES}
    return {
        "validation": last["probe_accuracy"],
        "train_seconds": run.read_json("results.json")["run"]["seconds"],
        "mining_seconds": last.get("mining_seconds", 0.0),
        "rates": {key: statistics.fmean(values) for key, values in rates.items() if values},
    }


# -------------------------------------------------------------------------------------------------------- what is said


def value_of(found: Cells, cell: Cell, read: Callable[[Mapping[str, Any]], float | None]) -> dict[int, float]:
    """Give a value of a cell by seed, of the seeds that exist and have one."""
    values = {seed: read(found[name]) for seed in SEEDS if (name := str(replace(cell, seed=seed))) in found}
    return {seed: value for seed, value in values.items() if value is not None}


def said(found: Cells, cell: Cell, read: Callable[[Mapping[str, Any]], float | None], digits: int = 3) -> str:
    """Give mean and spread over the seeds; "-" where every cell exists and none has a value."""
    values = value_of(found, cell, read)
    if not values and all(str(replace(cell, seed=seed)) in found for seed in SEEDS):
        return "-"
    return cells.mean_and_spread(list(values.values()), len(SEEDS), digits)


def against(found: Cells, ours: Cell, theirs: Cell, labels: str) -> Difference | None:
    """Give the paired difference of two cells' probes."""
    return cells.difference(*(value_of(found, cell, lambda kept: kept["probe"][labels]) for cell in (ours, theirs)))


def methods(found: Cells, name: str) -> list[Cell]:
    """Give the cells of seed 0 that a table has a row for; the source of those to come is not known yet."""
    known = [cell for cell in plan([name], found) if cell.seed == SEEDS[0]]
    if best_source(found, name) is None:
        known += [Cell(name, loss, TO_COME, SEEDS[0]) for loss in WITH_BEST]
    order = [UNTRAINED, *LOSSES]
    return sorted(known, key=lambda cell: order.index(cell.loss))


def probe_rows(found: Cells, name: str) -> Iterator[list[str]]:
    """Give the rows on the probe."""
    base = Cell(name, "info_nce", BASE, SEEDS[0])
    for cell in methods(found, name):
        row = [cell.loss, cell.source]
        for labels in cells.LABELS:
            row.append(said(found, cell, lambda kept, labels=labels: kept["probe"][labels]))  # type: ignore[misc]
            row.append("" if cell == base else cells.in_figures(against(found, cell, base, labels)))
        row.append(said(found, cell, lambda kept: kept.get("validation")))
        yield row


def cost_rows(found: Cells, name: str) -> Iterator[list[str]]:
    """Give the rows on false negatives and time."""
    for cell in methods(found, name):
        if cell.loss == UNTRAINED:
            continue
        yield [
            cell.loss,
            cell.source,
            *(said(found, cell, lambda kept, key=key: kept["rates"].get(key)) for key in RATES),  # type: ignore[misc]
            said(found, cell, lambda kept: kept.get("nearest_false")),
            said(found, cell, lambda kept: kept["train_seconds"], 1),
            said(found, cell, mining_share),
            said(found, cell, lambda kept: kept["cpu_seconds"], 1),
        ]


def mining_share(kept: Mapping[str, Any]) -> float | None:
    """Give the share of training that went into searching; None where nothing is searched for."""
    return kept["mining_seconds"] / kept["train_seconds"] if kept["mining_seconds"] else None


def findings(found: Cells, name: str) -> Iterator[str]:
    """Say what helped and what did not, all from the figures."""
    base = Cell(name, "info_nce", BASE, SEEDS[0])
    best = best_source(found, name)
    compared = [(f"InfoNCE, `{source}`", replace(base, source=source), base, "in the batch alone") for source in OTHERS]
    for loss in WITH_BEST:
        alone = replace(base, loss=loss)
        compared.append((f"`{loss}` alone", alone, base, "in-batch InfoNCE"))
        if best is not None:
            compared.append((f"`{loss}`, `{best}`", replace(alone, source=best), alone, f"`{loss}` alone"))
    for words, ours, theirs, whom in compared:
        judged = []
        for labels in cells.LABELS:
            one = against(found, ours, theirs, labels)
            judged.append(f"{labels} of the labels {cells.verdict(one)} ({cells.in_figures(one)})")
        yield f"- {words}, against {whom}: {'; '.join(judged)}."
    if best is None:
        yield "- The best source is not known yet: cells are missing."
    else:
        by = [said(found, replace(base, source=source), lambda kept: kept["validation"]) for source in (best, BASE)]
        yield f"- Best source by validation accuracy: `{best}`, {by[0]}; in the batch alone {by[1]}."
    shares = [
        share
        for kept in found.values()
        if kept["set"] == name and kept["loss"] != UNTRAINED
        if (share := mining_share(kept)) is not None
    ]
    if shares:
        yield f"- Searching took {100 * min(shares):.1f} to {100 * max(shares):.1f} % of training where there was any."
    yield ""


HEAD = """\
# Where negatives come from, measured

Written by `tools/bench_memory DATA_FOLDER` from its cells; not by hand.

Every method is a change of one config a set, with the same steps; {seeds} seeds decide weights, views, order and label
draws alike for all methods, so differences are paired by seed: mean ± standard error, bold beyond twice that. Chance
alone puts 18 % of all differences of three seeds there: of fifty comparisons expect nine. Values are mean ± standard
deviation over seeds. The probe is linear, on frozen features, balanced accuracy on the test split; 1 % of the labels is
the mean of {draws} draws. *Validation* is the accuracy of a ridge classifier on at most 5,000 training items, judged by
validation items: by it alone the best source is chosen, also where it leads by less than the spread, and the other
losses are then trained with it. The budgets are small: a cell takes under 180 seconds of one core.

| with | what |
| --- | --- |
{sources}

| loss | what |
| --- | --- |
{losses}
"""

RATE_WORDS = """\
*False negatives*: the share of an anchor's negatives that have its label, mean over the steps recorded. *Removed*: the
share of those, and of the others (*true*), that a rule took out. *8 nearest false*: after training, the share of each
training item's 8 nearest strangers by frozen features that have its label: what retrieval meets. Labels are used for
nothing else. *Searching*: the share of training seconds spent finding neighbours. *Cell*: training, saving and probes,
seconds of all cores together; those of training are seconds on the clock, beside other work."""


def page(found: Cells, names: Sequence[str]) -> str:
    """Give docs/benchmarks/memory.md.

    Args:
        found: the cells that exist.
        names: the sets to show.
    """
    sources = "\n".join(f"| `{name}` | {source.about} |" for name, source in SOURCES.items())
    losses = "\n".join(f"| `{name}` | {loss.about} |" for name, loss in LOSSES.items())
    lines = [HEAD.format(seeds=len(SEEDS), draws=cells.DRAWS, sources=sources, losses=losses)]
    if not found:
        return "\n".join([*lines, "**missing**: no cell has been made.", ""])
    lines += cells.made_on(found.values())
    for name in names:
        lines += section(found, name)
    return "\n".join(lines)


def section(found: Cells, name: str) -> Iterator[str]:
    """Give what was measured on one set."""
    kept = [cell for cell in found.values() if cell["set"] == name]
    lacking = sum(str(cell) not in found for cell in plan([name], found))
    lacking += len(WITH_BEST) * len(SEEDS) if best_source(found, name) is None else 0
    yield f"## {name}"
    yield ""
    if kept:
        one = kept[0]
        drawn = "" if SETS[name].items is None else " drawn from the set's, the same for all"
        yield (
            f"{one['items']:,} training items{drawn}, validation items among them; {one['steps']:,} steps, "
            f"{one['epochs']:g} epochs; 1 % of the labels is {one['probe']['labels_per_class']} a class. "
            f"The config: `{'`, `'.join(SETS[name].words)}`."
        )
        yield ""
    if lacking:
        yield f"**{lacking} cells are missing.**"
        yield ""
    yield "### What helped and what did not, as measured"
    yield ""
    yield from findings(found, name)
    yield "### The probe"
    yield ""
    minus = "- InfoNCE in batch"
    head = ["loss", "with", "1 % of labels", minus, "100 % of labels", minus, "validation"]
    yield from cells.table(head, probe_rows(found, name))
    yield "### False negatives and time"
    yield ""
    yield RATE_WORDS
    yield ""
    head = ["loss", "with", "false negatives", "removed", "true removed", "8 nearest false"]
    head += ["training, s", "searching", "cell, core s"]
    yield from cells.table(head, cost_rows(found, name))


# ---------------------------------------------------------------------------------------------------------- the command


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="tools/bench_memory", description=__doc__, allow_abbrev=False)
    made.add_argument("data", type=Path, metavar="DATA_FOLDER", help="holds bonn_eeg/epilepsy_178.npz and the like")
    made.add_argument("--set", nargs="+", choices=list(STEPS), default=list(STEPS), dest="sets")
    made.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="of cells' names: '*-info_nce-*-0'")
    made.add_argument("--again", action="store_true", help="make these cells again, though they exist")
    made.add_argument("--minutes", type=float, default=float("inf"), help="start no cell after so many")
    made.add_argument("--list", action="store_true", help="name the cells, and whether they exist")
    made.add_argument("--write", action="store_true", help="make nothing, write the page from the cells that exist")
    made.add_argument("--cells", type=Path, default=FOLDER, help="the folder of the cells; runs/bench_memory")
    made.add_argument("--page", type=Path, default=PAGE, help="where the page goes")
    made.add_argument("--steps", type=int, help="for a trial; give --cells and --page too")
    made.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    return made


def bench(words: Sequence[str] | None = None) -> int:
    """Make what is missing, then write the page; 1 where a cell failed."""
    asked = parser().parse_args(words)
    if asked.child:
        name, loss, source, seed = asked.child
        measure(Cell(name, loss, source, int(seed)), asked.data, asked.cells, asked.steps)
        return 0
    if asked.list:
        found = cells.read(asked.cells)
        for cell in plan(asked.sets, found):
            print(f"{cell}{' (exists)' if str(cell) in found else ''}")
        return 0
    failed = 0 if asked.write else make_all(asked)
    found = cells.read(asked.cells)
    asked.page.parent.mkdir(parents=True, exist_ok=True)
    asked.page.write_text(page(found, list(STEPS)))
    print(asked.page)
    return 1 if failed else 0


def make_all(asked: argparse.Namespace) -> int:
    """Make what is missing, the cells with the best source as soon as that is known; count those that failed."""
    began = time.monotonic()
    tried: set[Cell] = set()
    failed = 0
    while True:
        found = cells.read(asked.cells)
        todo = [
            cell
            for cell in plan(asked.sets, found)
            if cell not in tried
            and (asked.again or str(cell) not in found)
            and any(fnmatch.fnmatch(str(cell), pattern) for pattern in asked.only)
        ]
        spent = (time.monotonic() - began) / 60
        if not todo or spent >= asked.minutes:
            if todo:
                print(f"{len(todo)} cells are left after {spent:.0f} minutes; the same command goes on.")
            return failed
        cell = todo[0]
        tried.add(cell)
        print(f"[{len(todo)} to go, {spent:.1f} min] {cell} ...", flush=True)
        order = ["tools.bench_memory", str(asked.data), "--cells", str(asked.cells)]
        order += ["--steps", str(asked.steps or STEPS[cell.set]), "--child", *(str(one) for one in vars(cell).values())]
        why = cells.make(str(cell), order, asked.cells)
        failed += bool(why)
        print(f"  {why or 'done'}", flush=True)


if __name__ == "__main__":
    from contrast.cli import answer

    sys.exit(answer(bench))
