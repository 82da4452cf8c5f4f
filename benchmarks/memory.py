"""Train with negatives from the batch, a queue, retrieval and others on real sets, and probe the features.

    python benchmarks/memory.py DATA_FOLDER [--sets bonn_eeg] [--cells '*-info_nce-*-0']
    python benchmarks/memory.py DATA_FOLDER --over seed [--minus loss=info_nce source=in_batch]

A cell is one training: a set, a loss, a source of candidates, positives or weights, a seed; `untrained` is the encoder
at its start. Each is a change of one config per set, with the same steps. Seeds determine weights, views, order and
label draws in the same way for all, so differences are paired by seed. The second command prints means over the seeds,
or paired differences to InfoNCE with the batch only.

`validation` is the accuracy of a ridge classifier on at most 5,000 training items, on validation items. The source with
which InfoNCE has the highest one is then combined with the other losses. The probes are linear, on frozen features,
balanced accuracy on the test split. `rates` are the share of an anchor's negatives that have its label, and the shares
of those and of the others that a rule removed, means over the recorded steps. `nearest_same_class` is the share of each
training item's 8 nearest other items, by frozen features, that have its label. Labels are used for nothing else.
"""

import shutil
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
from harness import Key, Results
from real_sets import SETS, nearest_same_class, probe, source_of

from contrast.cli import answer
from contrast.evaluation.features import Encode
from contrast.experiment import config as configuration
from contrast.experiment import run as runs
from contrast.experiment.build import build, read_data
from contrast.experiment.folder import RunFolder
from contrast.experiment.named_models import encode_with, load

SEEDS = (0, 1, 2)
STEPS = {"fashion_mnist": 276, "bonn_eeg": 210}
"""Six epochs: the same for every method of a set."""
UNTRAINED, BASE = "untrained", "in_batch"
RATES = ("false_negatives", "false_negatives_removed", "true_negatives_removed")


@dataclass(frozen=True)
class Part:
    """A loss, or the source of its candidates, positives or weights, as a change of the config.

    Args:
        overrides: of the config, as on the command line.
        loss: the loss itself; of a source, what the LOSS goes into, after a WARMUP in epochs.
        arguments: further arguments of InfoNCE with this source.
    """

    overrides: tuple[str, ...] = ()
    loss: str = "LOSS"
    arguments: str = ""


_HARD = ("memory=[{name: hard_negatives, neighbours: 8, refresh: 1 epochs}]",)
SOURCES = {
    # The other samples of the batch only.
    BASE: Part(),
    # A momentum twin's keys, a queue of 4,096 of them (MoCo v2).
    "queue": Part(
        ("encoder.joint=false", "encoder.momentum=0.99", "memory=[{name: queue, size: 4096}]"),
        arguments=", candidates: memory",
    ),
    # The batch, and each anchor's 8 nearest other samples of the set, searched every epoch.
    "hard": Part(_HARD),
    # The same, without negatives above 95 % of the positive's similarity.
    "hard_margin": Part(_HARD, "{name: false_negatives, relative_margin: 0.05, loss: LOSS}"),
    # The same, without each anchor's 8 most similar negatives.
    "hard_top": Part(_HARD, "{name: false_negatives, top: 8, loss: LOSS}"),
    # Batches in which each sample is followed by its 3 nearest, searched every epoch.
    "neighbour_batches": Part(("sampler={name: neighbours, neighbours: 3, refresh: 1 epochs}",)),
    # The nearest in a queue of 4,096 is the positive, with a predictor (NNCLR).
    "nnclr": Part(
        (
            "encoder.head={name: mlp, layers: 3, last_batch_norm: true}",
            "encoder.predictor={name: mlp, layers: 2}",
            "memory=[{name: nearest_positives, store: {name: queue, size: 4096}}]",
        ),
        arguments=", candidates: across",
    ),
    # The batch; samples that were always too easy or too hard have less weight after 60 % of the epochs (DBPM).
    "bad_pairs": Part(loss="{name: bad_pairs, warmup_epochs: WARMUP, weight: peak_one, loss: LOSS}"),
}
LOSSES = {
    "info_nce": Part(loss="name: info_nce, temperature: 0.2"),
    "cacr": Part(loss="name: cacr"),
    # The frozen network is that of InfoNCE in the batch, of the same seed.
    "cwcl": Part(loss="name: cwcl, temperature: 0.2"),
    # With NNCLR without a predictor.
    "amcl": Part(
        ("encoder.head={name: multi_head, heads: 2, out: 64}", "encoder.predictor=null"),
        "name: amcl, form: logsumexp, network: inner_product",
    ),
}
OTHER_LOSSES = [name for name in LOSSES if name != "info_nce"]


def plan(names: Sequence[str], results: Results) -> list[Key]:
    """Return all cells that are known so far, complete seeds first; those with the best source last."""
    methods = [(UNTRAINED, ""), *(("info_nce", source) for source in SOURCES), *((loss, BASE) for loss in OTHER_LOSSES)]
    keys = [(name, *method, seed) for name in names for seed in SEEDS for method in methods]
    for name in names:
        best = best_source(name, results)
        keys += [(name, loss, best, seed) for loss in OTHER_LOSSES for seed in SEEDS if best]
    return [dict(zip(("set", "loss", "source", "seed"), key, strict=True)) for key in keys]


def best_source(name: str, results: Results) -> str | None:
    """Return the source with which InfoNCE has the highest validation accuracy; None until all cells exist."""
    means = {}
    for source in SOURCES:
        cells = [results.find(set=name, loss="info_nce", source=source, seed=seed) for seed in SEEDS]
        if source != BASE:
            if None in cells:
                return None
            means[source] = statistics.fmean(cell["result"]["validation"] for cell in cells if cell)
    return max(means, key=means.__getitem__)


def settings(key: Key, source: Path, folder: Path, steps: int, epochs: int) -> list[str]:
    """Return the config of a cell, as on the command line; later words replace earlier ones.

    Args:
        key: of the cell.
        source: the file of its set.
        folder: of the runs.
        steps: the budget.
        epochs: about the same, for the warm-up.
    """
    words = [*SETS[key["set"]].overrides, f"data.source={source}", f"seed={key['seed']}", f"budget={steps} steps"]
    if key["loss"] == UNTRAINED:
        return words
    chosen, loss = SOURCES[key["source"]], LOSSES[key["loss"]]
    inner = "{" + loss.loss + (chosen.arguments if key["loss"] == "info_nce" else "") + "}"
    words += [
        *chosen.overrides,
        *loss.overrides,
        f"loss={chosen.loss.replace('LOSS', inner).replace('WARMUP', str(max(1, round(0.6 * epochs))))}",
        "evaluate.protocols=[]",
        "report.samples=false",
        # The online probe chooses the source: a ridge classifier, on validation items.
        f"probe.every={steps}",
        "probe.items=5000",
    ]
    if key["loss"] == "cwcl":
        words.append(f"encoder.reference={run_of({**key, 'loss': 'info_nce', 'source': BASE}, folder)}")
    return words


def run_of(key: Key, folder: Path) -> Path:
    """Return the folder of a cell's run."""
    return (folder / harness.named(key)).resolve()


def measure(key: Key, data: Path, folder: Path, steps: int) -> dict[str, Any]:
    """Train and probe a cell."""
    began, cpu = time.monotonic(), time.process_time()
    source = source_of(key["set"], data, folder / "data")
    plain = configuration.load(None, settings({**key, "loss": UNTRAINED}, source, folder, steps, 0)).config
    opened = read_data(plain)
    experiment = build(plain, opened)
    epochs = steps / experiment.sampler().steps_per_epoch
    found: dict[str, Any] = {}
    encode: Encode = encode_with(experiment.encoder)
    if key["loss"] != UNTRAINED:
        path = run_of(key, folder)
        shutil.rmtree(path, ignore_errors=True)
        loaded = configuration.load(None, settings(key, source, folder, steps, round(epochs)))
        runs.start(loaded, out=path, command=f"a cell of benchmarks/memory.py: {harness.named(key)}")
        found = records(RunFolder(path))
        encode = load(path).features
        shutil.rmtree(path / "checkpoints")
    return {
        **found,
        "steps": steps,
        "epochs": round(epochs, 1),
        "items": len(opened.train),
        "probe": probe(encode, opened, key["seed"]),
        "nearest_same_class": nearest_same_class(encode, opened),
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }


def records(run: RunFolder) -> dict[str, Any]:
    """Return validation accuracy, seconds, and the mean rates of false negatives from the records of a run."""
    rows = list(run.metrics())
    last: dict[str, float] = {}
    for row in rows:
        last |= row
    rates = {key: [row[key] for row in rows if key in row] for key in RATES}
    seconds, searching = run.read_json("results.json")["run"]["seconds"], last.get("mining_seconds", 0.0)
    return {
        "validation": last["probe_accuracy"],
        "train_seconds": seconds,
        "searching_share": searching / seconds,
        "rates": {key: statistics.fmean(values) for key, values in rates.items() if values},
    }


def main(words: Sequence[str] | None = None) -> int:
    """Train and probe what is missing, the cells with the best source as soon as it is known, and print."""
    parser = harness.parser("memory", __doc__)
    parser.add_argument("data", type=Path, metavar="DATA_FOLDER", help="contains bonn_eeg/epilepsy_178.npz and others")
    parser.add_argument("--sets", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--steps", type=int, help="for a trial; give --out too")
    given: Namespace = parser.parse_args(words)
    folder = given.out.with_suffix("")
    harness.run(
        given,
        lambda results: plan(given.sets, results),
        lambda key, _: measure(key, given.data, folder, given.steps or STEPS[key["set"]]),
    )
    return 0


if __name__ == "__main__":
    sys.exit(answer(main))
