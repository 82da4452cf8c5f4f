"""Corrupt known samples of a real set, train with and without bad-pair mining, and count what it flags.

    python benchmarks/bad_pairs.py DATA_FOLDER [--sets bonn_eeg] [--picture FILE.png]
    python benchmarks/bad_pairs.py DATA_FOLDER --over seed [--minus mining=off]

A cell is one training: a set, what is corrupted, with or without mining, a seed. The loss is InfoNCE (tau 0.2) inside
`BadPairs` with its published widths. Of the training items, drawn by the seed, "views" corrupts two times 2.5 %,
"items" 5 %:

    noise_view    its second view is pure noise, drawn anew in each step
    other_sample  its second view is a view of another sample, always the same one
    noise_item    the item itself is pure noise, always the same, and both views are made of it

Mining "on" lowers the weights of flagged samples after the warm-up; with "off" the warm-up never ends: the loss is that
of InfoNCE, and the history is recorded as well. The test items are clean.

A result has, per flag at the end of training, the precision (share of the flagged that were corrupted) and the flagged
share of each kind; the same for other widths, where recall is of all corrupted samples; the average precision with
which the mean loss ranks a kind among the clean samples, where its large (as_faulty) or small (as_noisy) values are
bad; and linear probes of the frozen features. --picture draws the shares per epoch.
"""

import itertools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from harness import Cell, Key
from real_sets import SETS, probe, source_of
from torch import Tensor

from contrast.cli import answer
from contrast.core.seeding import derived
from contrast.data import Data
from contrast.data.dataset import Batch
from contrast.experiment import config as configuration
from contrast.experiment.build import Experiment, build, read_data
from contrast.losses import BadPairs
from contrast.models import Encoder
from contrast.views.views import Views

KINDS = ("clean", "noise_view", "other_sample", "noise_item")
"""What a sample can be; `clean` is 0."""
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

# ---------------------------------------------------------------------------------------------------------- corruption


class CorruptedViews:
    """The views of a batch, where chosen samples are corrupted and no other differs from what it would have been.

    Args:
        views: of the experiment.
        data: its training items are corrupted.
        encoder: prepares raw items.
        shares: kind -> its share of the training items.
        seed: determines which samples are corrupted, their partners, and the noise.

    Attributes:
        kind: (samples,) int64 by sample index, a position in KINDS.
    """

    def __init__(self, views: Views, data: Data, encoder: Encoder, shares: Mapping[str, float], seed: int) -> None:
        self.views, self.encoder, self.data, self.seed = views, encoder, data, seed
        sample = torch.from_numpy(data.train.sample)
        order = sample[torch.randperm(len(sample), generator=generator_of(seed, "corrupted"))]
        self.kind = torch.zeros(int(sample.max()) + 1, dtype=torch.int64)
        start = 0
        for name, share in shares.items():
            count = round(share * len(sample))
            self.kind[order[start : start + count]] = KINDS.index(name)
            start += count
        # A shift of the shuffled order gives every sample a partner that is not itself.
        self.partner = torch.full_like(self.kind, -1)
        self.partner[order] = order.roll(1)

    def __call__(self, batch: Batch, generator: torch.Generator) -> list[Tensor]:
        """Return the V views of a batch; of a corrupted pair of views the last one is corrupted."""
        x = self.encoder.prepare(batch.x)
        kind = self.kind[batch.sample]
        for row in (kind == KINDS.index("noise_item")).nonzero().flatten().tolist():
            x[row] = self.noise(x[row], generator_of(self.seed, "item", int(batch.sample[row])))
        views = self.views(x, generator)
        others = kind == KINDS.index("other_sample")
        if others.any():
            raw = self.data.train.items.read(self.partner[batch.sample[others]].numpy())
            views[-1][others] = self.views(self.encoder.prepare(raw), generator)[-1]
        noise = kind == KINDS.index("noise_view")
        views[-1][noise] = self.noise(views[-1][noise], generator)
        return views

    def noise(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Return noise: for series normal, with the mean and deviation of the set; for images uniform in [0, 1)."""
        draw = torch.rand if self.data.kind == "image" else torch.randn
        return draw(like.shape, generator=generator)


def generator_of(*parts: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(derived(*parts))


# ------------------------------------------------------------------------------------------------------------ one cell


def experiment_of(key: Key, source: Path, epochs: int, warmup: int) -> Experiment:
    """Build a cell's experiment; without mining the warm-up never ends, so that the history is recorded as well."""
    warmup = warmup if key["mining"] == "on" else epochs
    mining = f"warmup_epochs: {warmup}, noisy_width: {NOISY_WIDTH}, faulty_width: {FAULTY_WIDTH}, weight: peak_one"
    overrides = [
        *SETS[key["set"]].overrides,
        f"data.source={source}",
        f"seed={key['seed']}",
        f"loss={{name: bad_pairs, {mining}, loss: {{name: info_nce, temperature: 0.2}}}}",
        f"budget={epochs} epochs",
    ]
    config = configuration.load(None, overrides).config
    return build(config, read_data(config))


def train(experiment: Experiment, views: CorruptedViews, epochs: int) -> Iterator[int]:
    """Train with the parts of the package in a loop of our own; yields the number of each epoch after it."""
    encoder, loss, train = experiment.encoder.train(), experiment.loss, experiment.data.train
    optimizer = experiment.optimizer.build([encoder, loss])
    sampler = experiment.sampler()
    steps = epochs * sampler.steps_per_epoch
    for step, rows in enumerate(itertools.islice(sampler, steps)):
        batch = train.__getitems__(rows)
        z = encoder(views(batch, generator_of(views.seed, "views", step))).z
        value = loss(*z, sample=batch.sample)
        for group in optimizer.param_groups:
            group["lr"] = experiment.optimizer.learning_rate((step + 0.5) / steps)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if (step + 1) % sampler.steps_per_epoch == 0:
            loss.end_epoch()
            yield (step + 1) // sampler.steps_per_epoch


def shares(flag: Tensor, kind: Tensor) -> dict[str, float]:
    """Return the flagged share of each kind that occurs."""
    return {
        name: float(flag[kind == index].double().mean()) for index, name in enumerate(KINDS) if (kind == index).any()
    }


def precision(flag: Tensor, kind: Tensor) -> float | None:
    """Return the share of the flagged samples that are corrupted; None where none is flagged."""
    return float((kind[flag] > 0).double().mean()) if flag.any() else None


def recall(flag: Tensor, kind: Tensor) -> float | None:
    """Return the share of the corrupted samples that are flagged; None where none is corrupted."""
    return float(flag[kind > 0].double().mean()) if (kind > 0).any() else None


def ranking(history: Tensor, kind: Tensor) -> dict[str, dict[str, float]]:
    """Return per corrupted kind the average precision of the history among clean samples, in both directions.

    Args:
        history: (N,) mean losses.
        kind: (N,) positions in KINDS.
    """
    from sklearn.metrics import average_precision_score

    found = {}
    for index, name in enumerate(KINDS):
        among = (kind == index) | (kind == 0)
        truth, score = (kind == index)[among].numpy(), history[among].double().numpy()
        if index and truth.any():
            found[name] = {
                "as_faulty": float(average_precision_score(truth, score)),
                "as_noisy": float(average_precision_score(truth, -score)),
                "by_chance": float(truth.mean()),
            }
    return found


def measure(key: Key, data: Path, folder: Path, epochs: int) -> dict[str, Any]:
    """Train and probe a cell."""
    began, cpu, warmup = time.monotonic(), time.process_time(), epochs * WARMUP // EPOCHS
    experiment = experiment_of(key, source_of(key["set"], data, folder / "data"), epochs, warmup)
    loss = experiment.loss
    assert isinstance(loss, BadPairs)
    corruption = CORRUPTIONS[key["corruption"]]
    views = CorruptedViews(experiment.views, experiment.data, experiment.encoder, corruption, key["seed"])
    sample = torch.from_numpy(experiment.data.train.sample)
    kind = views.kind[sample]
    curves: dict[str, list[dict[str, float]]] = {flag: [] for flag in FLAGS}
    for _ in train(experiment, views, epochs):
        for flag in FLAGS:
            curves[flag].append(shares(getattr(loss, flag)[sample], kind))
    flags = {flag: getattr(loss, flag)[sample] for flag in FLAGS}
    flags["any"] = flags["noisy"] | flags["faulty"]
    history = loss.history[sample]
    beyond = (history - loss.center) / loss.spread
    at_width = {f"noisy_{width:g}": beyond < -width for width in WIDTHS}
    at_width |= {f"faulty_{width:g}": beyond > width for width in WIDTHS}
    return {
        "epochs": epochs,
        "warmup": warmup,
        "steps": epochs * experiment.sampler().steps_per_epoch,
        "corrupted": {name: int((kind == index).sum()) for index, name in enumerate(KINDS)},
        "flagged": {name: {"precision": precision(flag, kind), **shares(flag, kind)} for name, flag in flags.items()},
        "widths": {
            name: {"precision": precision(flag, kind), "recall": recall(flag, kind)} for name, flag in at_width.items()
        },
        "ranking": ranking(history, kind),
        "probe": probe(experiment.encoder.encode, experiment.data, key["seed"]),
        "curves": curves,
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }


# --------------------------------------------------------------------------------------------- picture and command line

COLORS = {"clean": "tab:gray", "noise_view": "tab:red", "other_sample": "tab:blue", "noise_item": "tab:green"}


def draw(cells: Sequence[Cell], file: Path) -> None:
    """Draw the flagged shares of each kind after each epoch, mean and range over the seeds, of one set."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    columns: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in cells:
        if cell["key"]["corruption"] != "none":
            columns.setdefault((cell["key"]["corruption"], cell["key"]["mining"]), []).append(cell["result"])
    figure, axes = pyplot.subplots(
        2, len(columns), figsize=(3.6 * len(columns), 5), sharex=True, sharey=True, squeeze=False
    )
    for (corruption, mining), results, column in zip(columns, columns.values(), axes.T, strict=True):
        for flag, axis in zip(FLAGS, column, strict=True):
            for kind in results[0]["curves"][flag][0]:
                curve = torch.tensor([[epoch[kind] for epoch in result["curves"][flag]] for result in results])
                epochs = range(1, curve.shape[1] + 1)
                axis.plot(epochs, curve.mean(dim=0), color=COLORS[kind], label=kind.replace("_", " "))
                axis.fill_between(epochs, curve.amin(dim=0), curve.amax(dim=0), color=COLORS[kind], alpha=0.2)
            if mining == "on":
                axis.axvline(results[0]["warmup"], color="black", linewidth=0.8, linestyle=":")
            axis.set_title(f"{corruption}, mining {mining}: {flag}", fontsize=9)
            axis.set_ylim(-0.02, 1.02)
            axis.set_ylabel("flagged share")
        column[0].legend(fontsize=8)
        column[1].set_xlabel("epoch")
    figure.tight_layout()
    figure.savefig(file, dpi=90, metadata={"Software": None})
    pyplot.close(figure)


def plan(names: Sequence[str]) -> list[Key]:
    """Return all cells, complete seeds first."""
    parts = ("set", "corruption", "mining", "seed")
    return [
        dict(zip(parts, (*method, seed), strict=True))
        for seed in SEEDS
        for method in itertools.product(names, CORRUPTIONS, MINING)
    ]


def main(words: Sequence[str] | None = None) -> int:
    """Train and probe what is missing, and print."""
    parser = harness.parser("bad_pairs", __doc__)
    parser.add_argument("data", type=Path, metavar="DATA_FOLDER", help="contains bonn_eeg/epilepsy_178.npz and others")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=["bonn_eeg"])
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="for a trial; give --out too")
    parser.add_argument("--picture", type=Path, help="the file for a picture of one set")
    given = parser.parse_args(words)
    keys, folder = plan(given.sets), given.out.with_suffix("")
    cells = harness.run(given, lambda _: keys, lambda key, _: measure(key, given.data, folder, given.epochs))
    if given.picture:
        draw(cells, given.picture)
    return 0


if __name__ == "__main__":
    sys.exit(answer(main))
