"""Injects corruption into known samples of a real set, trains with and without mining, and says what was found."""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contrast.core.seeding import derived
from contrast.data import Data
from contrast.data.dataset import Batch
from contrast.evaluation.compare import Difference
from contrast.experiment import config as configuration
from contrast.experiment.build import Experiment, build, read_data
from contrast.losses import BadPairs
from contrast.models import Encoder
from contrast.views.views import Views
from tools import cells
from tools.cells import ROOT, SETS, Cells

PAGE = ROOT / "docs" / "benchmarks" / "bad_pairs.md"
FOLDER = ROOT / "runs" / "bench_bad_pairs"

KINDS = ("clean", "noise_view", "other_sample", "noise_item")
"""What a sample can be; `clean` is 0."""
GLOSSARY = {
    "clean": "nothing is done to it",
    "noise_view": "its second view is pure noise, drawn anew in each step",
    "other_sample": "its second view is a view of another sample, always the same one",
    "noise_item": "the item itself is pure noise, always the same, and both views are made of it",
}
CORRUPTIONS: dict[str, dict[str, float]] = {
    "none": {},
    "views": {"noise_view": 0.025, "other_sample": 0.025},
    "items": {"noise_item": 0.05},
}
"""Name -> kind -> its share of the training items."""
MINING = ("off", "on")
SEEDS = (0, 1, 2)
EPOCHS, WARMUP = 20, 12
"""The authors train 80 epochs, 50 of them as warm-up: about the same share."""
NOISY_WIDTH, FAULTY_WIDTH = 2.0, 3.0
WIDTHS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
FLAGS = ("noisy", "faulty")


@dataclass(frozen=True)
class Cell:
    """One training: a set, what is injected, with or without mining, a seed."""

    set: str
    corruption: str
    mining: str
    seed: int

    def __str__(self) -> str:
        return f"{self.set}-{self.corruption}-{self.mining}-{self.seed}"


# ---------------------------------------------------------------------------------------------------------- corruption


class CorruptedViews:
    """The views of a batch, where chosen samples are corrupted and no other differs from what it would have been.

    Args:
        views: of the experiment.
        data: its training items are corrupted.
        encoder: prepares raw items.
        shares: kind -> its share of the training items.
        seed: decides who is corrupted, with whom, and the noise.

    Attributes:
        kind: (samples,) int64 by sample index, a position in KINDS.
    """

    def __init__(self, views: Views, data: Data, encoder: Encoder, shares: Mapping[str, float], seed: int) -> None:
        self.views, self.encoder, self.data, self.seed = views, encoder, data, seed
        sample = torch.from_numpy(data.train.sample)
        order = sample[torch.randperm(len(sample), generator=_generator(seed, "corrupted"))]
        self.kind = torch.zeros(int(sample.max()) + 1, dtype=torch.int64)
        start = 0
        for name, share in shares.items():
            count = round(share * len(sample))
            self.kind[order[start : start + count]] = KINDS.index(name)
            start += count
        # A shift of the shuffled order gives everyone a partner, and nobody oneself.
        self.partner = torch.full_like(self.kind, -1)
        self.partner[order] = order.roll(1)

    def __call__(self, batch: Batch, generator: torch.Generator) -> list[Tensor]:
        """Give the V views of a batch; the last one is what a corrupted pair of views is corrupted in."""
        x = self.encoder.prepare(batch.x)
        kind = self.kind[batch.sample]
        for row in (kind == KINDS.index("noise_item")).nonzero().flatten().tolist():
            x[row] = self.noise(x[row], _generator(self.seed, "item", int(batch.sample[row])))
        views = self.views(x, generator)
        others = kind == KINDS.index("other_sample")
        if others.any():
            raw = self.data.train.items.read(self.partner[batch.sample[others]].numpy())
            views[-1][others] = self.views(self.encoder.prepare(raw), generator)[-1]
        noise = kind == KINDS.index("noise_view")
        views[-1][noise] = self.noise(views[-1][noise], generator)
        return views

    def noise(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Give noise: for series normal, with the mean and deviation of the set; for images uniform in [0, 1)."""
        draw = torch.rand if self.data.kind == "image" else torch.randn
        return draw(like.shape, generator=generator)


def _generator(*parts: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(derived(*parts))


# ------------------------------------------------------------------------------------------------------------ one cell


def experiment_of(cell: Cell, source: Path, epochs: int, warmup: int) -> Experiment:
    """Build a cell's experiment; without mining the warm-up never ends, so that the history is kept all the same."""
    warmup = warmup if cell.mining == "on" else epochs
    mining = f"warmup_epochs: {warmup}, noisy_width: {NOISY_WIDTH}, faulty_width: {FAULTY_WIDTH}, weight: peak_one"
    words = [
        *SETS[cell.set].words,
        f"data.source={source}",
        f"seed={cell.seed}",
        f"loss={{name: bad_pairs, {mining}, loss: {{name: info_nce, temperature: 0.2}}}}",
        f"budget={epochs} epochs",
    ]
    config = configuration.load(None, words).config
    return build(config, read_data(config))


def train(experiment: Experiment, views: CorruptedViews, epochs: int) -> Iterator[int]:
    """Train by the package's parts in a loop of our own; pauses after each epoch and gives its number."""
    encoder, loss, train = experiment.encoder.train(), experiment.loss, experiment.data.train
    optimizer = experiment.optimizer.build([encoder, loss])
    sampler = experiment.sampler()
    steps = epochs * sampler.steps_per_epoch
    for step, rows in enumerate(itertools.islice(sampler, steps)):
        batch = train.__getitems__(rows)
        z = encoder(views(batch, _generator(views.seed, "views", step))).z
        value = loss(*z, sample=batch.sample)
        for group in optimizer.param_groups:
            group["lr"] = experiment.optimizer.learning_rate((step + 0.5) / steps)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if (step + 1) % sampler.steps_per_epoch == 0:
            loss.end_epoch()
            yield (step + 1) // sampler.steps_per_epoch


def tally(flag: Tensor, kind: Tensor) -> dict[str, int]:
    """Count the flagged samples of each kind."""
    return {name: int((flag & (kind == number)).sum()) for number, name in enumerate(KINDS)}


def ranking(history: Tensor, kind: Tensor) -> dict[str, dict[str, float]]:
    """Give for each kind that occurs the average precision of the history among clean samples, either way round.

    Args:
        history: (N,) mean losses.
        kind: (N,) positions in KINDS.
    """
    from sklearn.metrics import average_precision_score

    found = {}
    for number, name in enumerate(KINDS):
        among = (kind == number) | (kind == 0)
        truth, score = (kind == number)[among].numpy(), history[among].double().numpy()
        if number and truth.any():
            found[name] = {
                "as_faulty": float(average_precision_score(truth, score)),
                "as_noisy": float(average_precision_score(truth, -score)),
                "by_chance": float(truth.mean()),
            }
    return found


def measure(cell: Cell, data: Path, folder: Path, epochs: int, warmup: int) -> None:
    """Train and probe a cell, and write it."""
    began = time.monotonic()
    experiment = experiment_of(cell, cells.source_of(cell.set, data, folder / "data"), epochs, warmup)
    loss = experiment.loss
    assert isinstance(loss, BadPairs)
    views = CorruptedViews(
        experiment.views, experiment.data, experiment.encoder, CORRUPTIONS[cell.corruption], cell.seed
    )
    sample = torch.from_numpy(experiment.data.train.sample)
    kind = views.kind[sample]
    curves: dict[str, list[dict[str, int]]] = {flag: [] for flag in FLAGS}
    for _ in train(experiment, views, epochs):
        for flag in FLAGS:
            curves[flag].append(tally(getattr(loss, flag)[sample], kind))
    trained = time.monotonic() - began
    history = loss.history[sample]
    beyond = (history - loss.center) / loss.spread
    by_width = {
        "noisy": [tally(beyond < -width, kind) for width in WIDTHS],
        "faulty": [tally(beyond > width, kind) for width in WIDTHS],
    }
    kept = {
        **vars(cell),
        "epochs": epochs,
        "warmup": warmup,
        "steps": epochs * experiment.sampler().steps_per_epoch,
        "injected": tally(torch.ones_like(kind, dtype=torch.bool), kind),
        "curves": curves,
        "by_width": by_width,
        "ranking": ranking(history, kind),
        "probe": cells.probe(experiment.encoder.encode, experiment.data, cell.seed),
        "train_seconds": round(trained, 1),
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(cells.cpu_seconds(), 1),
    }
    cells.keep(folder / f"{cell}.json", kept)


# -------------------------------------------------------------------------------------------------------- what is said


def precision(flagged: Mapping[str, int]) -> float | None:
    """Give the share of the flagged samples that were injected; None where nobody is flagged."""
    total = sum(flagged.values())
    return (total - flagged["clean"]) / total if total else None


def recall(flagged: Mapping[str, int], injected: Mapping[str, int], kinds: Sequence[str] = KINDS[1:]) -> float | None:
    """Give the share of these kinds' samples that are flagged; None where there are none."""
    total = sum(injected[kind] for kind in kinds)
    return sum(flagged[kind] for kind in kinds) / total if total else None


def value_of(found: Cells, cell: Cell, read: Callable[[Mapping[str, Any]], float | None]) -> dict[int, float]:
    """Give a value of a cell by seed, of the seeds that exist and have one."""
    values = {seed: read(found[name]) for seed in SEEDS if (name := str(replace(cell, seed=seed))) in found}
    return {seed: value for seed, value in values.items() if value is not None}


def flagged(kept: Mapping[str, Any], flag: str) -> dict[str, int]:
    """Count by kind who was held to be so at the end of training; "any": noisy or faulty, nobody is both."""
    if flag == "any":
        both = [flagged(kept, one) for one in FLAGS]
        return {kind: sum(one[kind] for one in both) for kind in KINDS}
    counted: dict[str, int] = kept["curves"][flag][-1]
    return counted


def share_of(kind: str, flag: str) -> Callable[[Mapping[str, Any]], float | None]:
    """Give what reads the share of a kind that is flagged."""
    return lambda kept: recall(flagged(kept, flag), kept["injected"], [kind])


def said(found: Cells, cell: Cell, read: Callable[[Mapping[str, Any]], float | None]) -> str:
    """Give mean and spread over the seeds; "-" where every cell exists and none has a value."""
    values = value_of(found, cell, read)
    if not values and all(str(replace(cell, seed=seed)) in found for seed in SEEDS):
        return "-"
    return cells.mean_and_spread(list(values.values()), len(SEEDS))


def injected_cells(name: str) -> Iterator[Cell]:
    """Walk over a set's cells of seed 0 in which something is injected."""
    for corruption, mining in itertools.product(CORRUPTIONS, MINING):
        if CORRUPTIONS[corruption]:
            yield Cell(name, corruption, mining, 0)


def flag_rows(found: Cells, name: str) -> Iterator[list[str]]:
    """Give the rows on what is held to be bad at the published widths."""
    for corruption, mining, flag in itertools.product(CORRUPTIONS, MINING, (*FLAGS, "any")):
        cell = Cell(name, corruption, mining, 0)
        kinds = [said(found, cell, share_of(kind, flag)) if kind in CORRUPTIONS[corruption] else "" for kind in KINDS]
        judged = said(found, cell, lambda kept, flag=flag: precision(flagged(kept, flag)))  # type: ignore[misc]
        kinds[0] = said(found, cell, share_of("clean", flag))
        yield [corruption, mining, flag, judged if CORRUPTIONS[corruption] else "", *kinds]


def width_rows(found: Cells, name: str) -> Iterator[list[str]]:
    """Give the rows on other widths: precision and recall of each flag on its own."""
    for cell in injected_cells(name):
        for number, width in enumerate(WIDTHS):
            row = [cell.corruption, cell.mining, f"{width:g}"]
            for flag in FLAGS:

                def at(kept: Mapping[str, Any], flag: str = flag, number: int = number) -> dict[str, int]:
                    counted: dict[str, int] = kept["by_width"][flag][number]
                    return counted

                row.append(said(found, cell, lambda kept, at=at: precision(at(kept))))  # type: ignore[misc]
                row.append(said(found, cell, lambda kept, at=at: recall(at(kept), kept["injected"])))  # type: ignore[misc]
            yield row


def ranking_rows(found: Cells, name: str) -> Iterator[list[str]]:
    """Give the rows on how well the history ranks each kind, whatever the width."""
    for cell in injected_cells(name):
        for kind in CORRUPTIONS[cell.corruption]:
            columns = ("as_faulty", "as_noisy", "by_chance")
            yield [
                kind,
                cell.mining,
                *(said(found, cell, lambda kept, kind=kind, key=key: kept["ranking"][kind][key]) for key in columns),  # type: ignore[misc]
            ]


def probe_value(labels: str) -> Callable[[Mapping[str, Any]], float]:
    """Give what reads a probe."""
    return lambda kept: float(kept["probe"][labels])


def against(found: Cells, ours: Cell, theirs: Cell, labels: str) -> Difference | None:
    """Give the paired difference of two cells' probes."""
    return cells.difference(*(value_of(found, cell, probe_value(labels)) for cell in (ours, theirs)))


def probe_rows(found: Cells, name: str) -> Iterator[list[str]]:
    """Give the rows on the probe, with mining beside without, corrupted beside clean."""
    for corruption, mining in itertools.product(CORRUPTIONS, MINING):
        cell = Cell(name, corruption, mining, 0)
        row = [corruption, mining]
        for labels in cells.LABELS:
            row.append(said(found, cell, probe_value(labels)))
            off = against(found, cell, replace(cell, mining="off"), labels)
            row.append("" if mining == "off" else cells.in_figures(off))
            clean = against(found, cell, replace(cell, corruption="none"), labels)
            row.append("" if corruption == "none" else cells.in_figures(clean))
        yield row


def findings(found: Cells, name: str) -> Iterator[str]:
    """Say for each kind which flag finds it, and what corruption and mining do to the probe; all from the figures."""
    for cell in injected_cells(name):
        if cell.mining == "off":
            continue
        for kind in CORRUPTIONS[cell.corruption]:
            judged = [found_as(found, cell, kind, flag) for flag in FLAGS]
            yield f"- `{kind}`, at the published widths: {'; '.join(judged)}."
    for corruption, labels in itertools.product(CORRUPTIONS, cells.LABELS):
        on, off, clean = Cell(name, corruption, "on", 0), Cell(name, corruption, "off", 0), Cell(name, "none", "off", 0)
        what = f"{corruption} injected, {labels} of the labels" if CORRUPTIONS[corruption] else f"clean, {labels}"
        pairs = {"mining": (on, off)} | ({"the corruption itself": (off, clean)} if CORRUPTIONS[corruption] else {})
        judged = []
        for words, (ours, theirs) in pairs.items():
            one = against(found, ours, theirs, labels)
            judged.append(f"{words} {cells.verdict(one)}" + (f" ({cells.in_figures(one)})" if one else ""))
        yield f"- probe, {what}: {', '.join(judged)}."
    yield ""


def found_as(found: Cells, cell: Cell, kind: str, flag: str) -> str:
    """Say how many of a kind are held to be so, beside the clean, and how well its history ranks it."""
    of_kind, of_clean = (value_of(found, cell, share_of(one, flag)) for one in (kind, "clean"))
    beyond = cells.difference(of_kind, of_clean)
    if beyond is None:
        return f"as {flag}: missing"
    share, clean = (statistics.fmean(one.values()) for one in (of_kind, of_clean))
    clear = cells.verdict(beyond) == "better"
    word = "most are" if clear and share >= 0.5 else "some are" if clear and share >= 0.1 else "hardly any is"
    ranks = value_of(found, cell, lambda kept: kept["ranking"][kind][f"as_{flag}"])
    chance = value_of(found, cell, lambda kept: kept["ranking"][kind]["by_chance"])
    average, luck = (statistics.fmean(one.values()) for one in (ranks, chance))
    return (
        f"{word} held to be {flag}, {100 * share:.1f} % (of the clean {100 * clean:.1f} %; average precision "
        f"{average:.3f}, by chance {luck:.3f})"
    )


HEAD = """\
# Bad pairs, injected and found

Written by `tools/bench_bad_pairs DATA_FOLDER` from its cells; not by hand.

InfoNCE (tau 0.2) inside `BadPairs` with its published widths: *noisy* is a sample whose mean loss lies {noisy:g}
standard deviations below the mean of all, *faulty* one that lies {faulty:g} above. Into known training samples, drawn
by the seed, corruption is injected:

{kinds}

*views* has {view:g} % of the training items of each of the first two kinds, *items* {item:g} % of the last,
which is what the paper calls a noisy pair: two views that share their noise. Mining *on*
weighs them down after the warm-up, by a weight of at most 1 (`peak_one`, as in the config `bonn_eeg_bad_pairs`); *off*
is a warm-up that never ends: the loss is that of InfoNCE alone, and the history is kept all the same. Training items
include the validation items; the test items are clean. {epochs} epochs, of which {warmup} are warm-up; every run of a
set has the same steps. Mean ± standard deviation over {seeds} seeds; differences are paired by seed, ± their standard
error, bold beyond twice that, where chance alone puts 18 % of all differences of three seeds.
"""


def page(found: Cells, names: Sequence[str], stem: str = "bad_pairs") -> str:
    """Give docs/benchmarks/bad_pairs.md.

    Args:
        found: the cells that exist.
        names: the sets to show.
        stem: how the pictures beside the page are called.
    """
    some = next(iter(found.values()), {"epochs": EPOCHS, "warmup": WARMUP})
    kinds = [f"- `{kind}`: {GLOSSARY[kind]}." for kind in KINDS[1:]]
    view, item = (100 * next(iter(CORRUPTIONS[name].values())) for name in ("views", "items"))
    facts = {"epochs": some["epochs"], "warmup": some["warmup"], "seeds": len(SEEDS), "kinds": "\n".join(kinds)}
    lines = [HEAD.format(noisy=NOISY_WIDTH, faulty=FAULTY_WIDTH, view=view, item=item, **facts)]
    if not found:
        return "\n".join([*lines, "**missing**: no cell has been made.", ""])
    lines += cells.made_on(found.values())
    for name in names:
        lines += section(found, name, picture_of(stem, name))
    return "\n".join(lines)


def section(found: Cells, name: str, picture: str) -> Iterator[str]:
    """Give what was found on one set."""
    kept = [cell for cell in found.values() if cell["set"] == name]
    lacking = sum(str(cell) not in found for cell in plan([name]))
    yield f"## {name}"
    yield ""
    if kept:
        config = "`, `".join(SETS[name].words)
        seconds = [one["seconds"] for one in kept]
        yield (
            f"{sum(kept[0]['injected'].values()):,} training items, {kept[0]['steps']:,} steps, `{config}`. "
            f"A cell took {min(seconds):.0f} to {max(seconds):.0f} s with its probes, "
            f"{max(one['cpu_seconds'] for one in kept):.0f} s of processor time at most; other work ran beside."
        )
        yield ""
    if lacking:
        yield f"**{lacking} cells are missing.**"
        yield ""
    yield "### As measured"
    yield ""
    yield from findings(found, name)
    yield "### What it held to be bad, at the end of training"
    yield ""
    yield "Precision: the share of those held to be so that were injected. Then the share of each kind that was."
    yield ""
    yield from cells.table(["injected", "mining", "held to be", "precision", *KINDS], flag_rows(found, name))
    yield f"![Over epochs: who was held to be noisy and faulty]({picture})"
    yield ""
    yield "### How well the mean loss ranks a kind"
    yield ""
    yield "Average precision of the history among that kind and the clean, where its large, or its small, end is bad."
    yield ""
    yield from cells.table(["kind", "mining", "large is bad", "small is bad", "by chance"], ranking_rows(found, name))
    yield "### Other widths"
    yield ""
    yield "By the same histories, each flag alone; recall is of all that were injected."
    yield ""
    head = ["noisy: precision", "recall", "faulty: precision", "recall"]
    yield from cells.table(["injected", "mining", "width", *head], width_rows(found, name))
    yield "### The probe"
    yield ""
    few = kept[0]["probe"]["labels_per_class"] if kept else "-"
    yield (
        f"Linear, frozen features, balanced accuracy on the test split; 1 % is {few} labels a class, the mean of "
        f"{cells.DRAWS} draws, the same for every row of a seed."
    )
    yield ""
    head = [word for labels in cells.LABELS for word in (f"{labels} of labels", "on - off", "corrupted - clean")]
    yield from cells.table(["injected", "mining", *head], probe_rows(found, name))


COLORS = {"clean": "tab:gray", "noise_view": "tab:red", "other_sample": "tab:blue", "noise_item": "tab:green"}


def draw(found: Cells, name: str, file: Path) -> None:
    """Draw the shares of each kind held to be noisy and faulty after each epoch: mean, smallest and largest seed."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    chosen = [cell for cell in injected_cells(name) if any(str(replace(cell, seed=seed)) in found for seed in SEEDS)]
    if not chosen:
        return
    figure, axes = pyplot.subplots(
        2, len(chosen), figsize=(3.6 * len(chosen), 5), sharex=True, sharey=True, squeeze=False
    )
    for column, cell in enumerate(chosen):
        kept = [found[key] for seed in SEEDS if (key := str(replace(cell, seed=seed))) in found]
        for row, flag in enumerate(FLAGS):
            axis = axes[row, column]
            for kind in ("clean", *CORRUPTIONS[cell.corruption]):
                shares = torch.tensor(
                    [[one[kind] / each["injected"][kind] for one in each["curves"][flag]] for each in kept]
                )
                epochs = range(1, shares.shape[1] + 1)
                axis.plot(epochs, shares.mean(dim=0), color=COLORS[kind], label=kind.replace("_", " "))
                axis.fill_between(epochs, shares.amin(dim=0), shares.amax(dim=0), color=COLORS[kind], alpha=0.2)
            if cell.mining == "on":
                axis.axvline(kept[0]["warmup"], color="black", linewidth=0.8, linestyle=":")
            axis.set_title(f"{cell.corruption}, mining {cell.mining}: held to be {flag}", fontsize=9)
            axis.set_ylim(-0.02, 1.02)
        axes[0, column].legend(fontsize=8)
        axes[1, column].set_xlabel("epoch")
    axes[0, 0].set_ylabel("share")
    axes[1, 0].set_ylabel("share")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=90, metadata={"Software": None})
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------------------------- the command


def plan(names: Sequence[str], seeds: Sequence[int] = SEEDS) -> list[Cell]:
    """Give all cells, whole seeds first."""
    return [Cell(*one, seed) for seed in seeds for one in itertools.product(names, CORRUPTIONS, MINING)]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="tools/bench_bad_pairs", description=__doc__, allow_abbrev=False)
    made.add_argument("data", type=Path, metavar="DATA_FOLDER", help="holds bonn_eeg/epilepsy_178.npz and the like")
    made.add_argument("--sets", nargs="+", choices=list(SETS), default=["bonn_eeg"])
    made.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=list(SEEDS))
    made.add_argument("--again", action="store_true", help="make these cells again, though they exist")
    made.add_argument("--write", action="store_true", help="make nothing, write the page from the cells that exist")
    made.add_argument("--cells", type=Path, default=FOLDER, help="the folder of the cells; runs/bench_bad_pairs")
    made.add_argument("--page", type=Path, default=PAGE, help="where the page goes, and its picture beside it")
    made.add_argument("--epochs", type=int, default=EPOCHS, help="for a trial; give --cells and --page too")
    made.add_argument("--child", help=argparse.SUPPRESS)
    return made


def bench(words: Sequence[str] | None = None) -> int:
    """Make what is missing, then write the page; 1 where a cell failed."""
    asked = parser().parse_args(words)
    planned = plan(asked.sets, asked.seeds)
    if asked.child:
        (cell,) = [cell for cell in planned if str(cell) == asked.child]
        measure(cell, asked.data, asked.cells, asked.epochs, asked.epochs * WARMUP // EPOCHS)
        return 0
    known = cells.read(asked.cells)
    todo = [] if asked.write else [cell for cell in planned if asked.again or str(cell) not in known]
    failed = 0
    for done, cell in enumerate(todo, 1):
        print(f"[{done} of {len(todo)}] {cell} ...", flush=True)
        order = ["tools.bench_bad_pairs", str(asked.data), "--sets", cell.set, "--seeds", str(cell.seed)]
        order += ["--epochs", str(asked.epochs), "--cells", str(asked.cells), "--child", str(cell)]
        why = cells.make(str(cell), order, asked.cells)
        failed += bool(why)
        print(f"  {why or 'done'}", flush=True)
    found = cells.read(asked.cells)
    names = [name for name in SETS if any(cell["set"] == name for cell in found.values())] or asked.sets
    for name in names:
        draw(found, name, asked.page.with_name(picture_of(asked.page.stem, name)))
    asked.page.parent.mkdir(parents=True, exist_ok=True)
    asked.page.write_text(page(found, names, asked.page.stem))
    print(asked.page)
    return 1 if failed else 0


def picture_of(page: str, name: str) -> str:
    """Give the name of a set's picture beside the page."""
    return f"{page}.png" if name == "bonn_eeg" else f"{page}_{name}.png"


if __name__ == "__main__":
    from contrast.cli import answer

    sys.exit(answer(bench))
