"""The page says what the cells say, gaps too, and the best source is chosen by validation accuracy alone."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from contrast.experiment import config as configuration
from contrast.experiment.folder import RunFolder
from tests.test_bench_bad_pairs import FACTS, row_of
from tools import bench_memory as bench
from tools import cells
from tools.bench_memory import BASE, LOSSES, OTHERS, SEEDS, SOURCES, UNTRAINED, WITH_BEST, Cell, best_source, page, plan

SET = "bonn_eeg"


def kept(cell, probe=0.5, validation=0.5, **more):
    """A cell's file."""
    made = {
        **vars(cell),
        "steps": 350,
        "epochs": 10.0,
        "items": 9200,
        "probe": {"1 %": probe, "100 %": probe + 0.2, "labels_per_class": 18, "warnings": []},
        "seconds": 50.0,
        "cpu_seconds": 80.0,
        "facts": FACTS,
    }
    if cell.loss != UNTRAINED:
        made |= {"validation": validation, "train_seconds": 30.0, "mining_seconds": 0.0, "rates": {}, **more}
    return made


def whole(probe=lambda cell: 0.5, validation=lambda cell: 0.5, **more):
    """Every cell of a set, those with the best source too."""
    found = {}
    for _ in range(2):
        for cell in plan([SET], found):
            found.setdefault(str(cell), kept(cell, probe(cell), validation(cell), **more))
    return found


def test_the_best_source_is_chosen_on_validation_and_never_on_test():
    found = whole(
        probe=lambda cell: 0.9 if cell.source == "nnclr" else 0.5,
        validation=lambda cell: {"hard": 0.7, "nnclr": 0.6, BASE: 0.8}.get(cell.source, 0.5) + 0.01 * cell.seed,
    )
    assert best_source(found, SET) == "hard"
    del found[f"{SET}-info_nce-queue-2"]
    assert best_source(found, SET) is None


def test_cells_with_the_best_source_are_defined_once_it_is_known():
    first = plan([SET], {})
    assert len(first) == len(SEEDS) * (1 + len(SOURCES) + len(WITH_BEST))
    found = {str(cell): kept(cell, validation=0.9 if cell.source == "hard_top" else 0.5) for cell in first}
    then = plan([SET], found)
    assert then[: len(first)] == first
    assert {(cell.loss, cell.source) for cell in then[len(first) :]} == {(loss, "hard_top") for loss in WITH_BEST}
    # The frozen network of CWCL is trained before it.
    names = [str(cell) for cell in first]
    assert all(names.index(f"{SET}-info_nce-{BASE}-{s}") < names.index(f"{SET}-cwcl-{BASE}-{s}") for s in SEEDS)


def every_method():
    return [("info_nce", source) for source in SOURCES] + [(loss, one) for loss in WITH_BEST for one in (BASE, *OTHERS)]


@pytest.mark.parametrize("method", every_method(), ids="-".join)
@pytest.mark.parametrize("name", list(bench.STEPS))
def test_every_method_is_a_config_that_differs_by_its_method_alone(name, method, tmp_path):
    def config(loss, source):
        words = bench.settings(Cell(name, loss, source, 1), tmp_path / "x.npz", tmp_path, 70, 10)
        return configuration.load(None, words).config

    ours, base = config(*method), config("info_nce", BASE)
    assert (ours.seed, ours.budget, ours.batch_size) == (1, "70 steps", 256)
    assert (ours.views, ours.encoder.backbone, ours.optimizer) == (base.views, base.encoder.backbone, base.optimizer)
    loss = ours.loss
    if loss["name"] in ("false_negatives", "bad_pairs"):
        assert loss.get("warmup_epochs", 6) == 6
        loss = loss["loss"]
    assert loss["name"] == method[0]
    assert (ours.encoder.reference is not None) == (method[0] == "cwcl")
    assert ours != base or method == ("info_nce", BASE)


def test_differences_are_paired_and_findings_follow_from_them():
    def probe(cell):
        more = {"queue": 0.1 + 0.01 * cell.seed, "nnclr": -0.1, "hard": 0.1 * (-1) ** cell.seed}
        return 0.5 + 0.05 * cell.seed + more.get(cell.source, 0) + (0.02 if cell.loss == "cacr" else 0)

    found = whole(probe, lambda cell: 0.9 if cell.source == "queue" else 0.5)
    text = page(found, [SET])
    assert "missing" not in text
    row = row_of(text, "info_nce", "queue", "0.660 ± 0.060")
    assert row[0] == "**+0.110 ± 0.006**"
    assert row_of(text, "cacr", BASE, "0.570 ± 0.050")[0] == "**+0.020 ± 0.000**"
    assert row_of(text, "info_nce", BASE, "0.550 ± 0.050") == ["", "0.750 ± 0.050", "", "0.500 ± 0.000"]
    assert row_of(text, UNTRAINED, "-")[-1] == "-"
    assert "InfoNCE, `queue`, against in the batch alone: 1 % of the labels better (**+0.110" in text
    assert "InfoNCE, `nnclr`, against in the batch alone: 1 % of the labels worse" in text
    assert "InfoNCE, `hard`, against in the batch alone: 1 % of the labels not clear" in text
    assert "`cacr`, `queue`, against `cacr` alone: 1 % of the labels better (**+0.110" in text
    assert "Best source by validation accuracy: `queue`, 0.900 ± 0.000; in the batch alone 0.500 ± 0.000" in text


def test_rates_and_the_share_of_searching_are_shown_where_there_are_any():
    rates = {"false_negatives": 0.25, "false_negatives_removed": 0.5}
    found = whole(mining_seconds=3.0, rates=rates, nearest_false=0.75)
    text = page(found, [SET])
    assert row_of(text, "info_nce", "hard", "0.250 ± 0.000") == [
        "0.500 ± 0.000",
        "-",
        "0.750 ± 0.000",
        "30.0 ± 0.0",
        "0.100 ± 0.000",
        "80.0 ± 0.0",
    ]
    assert "Searching took 10.0 to 10.0 % of training" in text
    assert "Searching took" not in page(whole(), [SET])


def test_missing_cells_are_shown_as_missing():
    found = whole()
    for seed in SEEDS:
        del found[f"{SET}-info_nce-queue-{seed}"]
    del found[f"{SET}-info_nce-nnclr-1"]
    found = {name: cell for name, cell in found.items() if cell["source"] in (BASE, "-") or cell["loss"] == "info_nce"}
    text = page(found, [SET])
    assert "**13 cells are missing.**" in text
    probes = text.split("### False negatives")[0]
    assert row_of(probes, "info_nce", "queue") == ["missing"] * 5
    assert row_of(text, "info_nce", "nnclr", "0.500 ± 0.000 (2 of 3)")[0] == "+0.000 ± 0.000"
    assert row_of(probes, "amcl", "the best") == ["missing"] * 5
    assert "The best source is not known yet" in text
    assert "no cell has been made" in page({}, [SET])


def test_the_records_of_a_run_give_validation_rates_and_seconds(tmp_path):
    run = RunFolder(tmp_path)
    run.append_metrics({"step": 1, "loss": 3.0, "false_negatives": 0.1, "mining_seconds": 0.5})
    run.append_metrics({"step": 2, "loss": 2.0, "false_negatives": 0.3, "mining_seconds": 1.5})
    run.append_metrics({"step": 2, "probe_accuracy": 0.7})
    run.write_json("results.json", {"run": {"seconds": 20.0}})
    assert bench.of_run(run) == {
        "validation": 0.7,
        "train_seconds": 20.0,
        "mining_seconds": 1.5,
        "rates": {"false_negatives": pytest.approx(0.2)},
    }


def test_cells_with_the_best_source_follow_in_the_same_call_and_a_failure_is_tried_once(tmp_path, monkeypatch):
    made = []

    def make(name, words, folder):
        made.append(name)
        *what, seed = words[-4:]
        cell = Cell(*what, int(seed))
        if cell.loss == "amcl" and cell.source != BASE:
            return "status 1: no"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(kept(cell)))
        return ""

    monkeypatch.setattr(cells, "make", make)
    words = ["data", "--set", SET, "--cells", str(tmp_path / "cells"), "--page", str(tmp_path / "page.md")]
    assert bench.bench([*words, "--only", "*-0", "*-1"]) == 0
    assert len(made) == 2 * (1 + len(SOURCES) + len(WITH_BEST))
    assert bench.bench(words) == 1
    assert len(made) == len(set(made)) == len(SEEDS) * (1 + len(SOURCES) + 2 * len(WITH_BEST))
    assert "**3 cells are missing.**" in (tmp_path / "page.md").read_text().split(f"## {SET}")[1]


def test_a_cell_that_fails_leaves_its_reason(tmp_path):
    why = cells.make("x", ["json.tool", str(tmp_path / "nowhere")], tmp_path)
    assert why.startswith("status ")
    assert "No such file" in why
    assert (tmp_path / "x.log").is_file()


@pytest.mark.parametrize("method", [(UNTRAINED, "-"), ("info_nce", BASE), ("cwcl", "hard_margin")], ids="-".join)
def test_a_cell_is_made_from_real_files(method, tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    y = np.arange(120) % 3
    x = (np.sin(np.arange(32) * (1 + y[:, None])) + random.normal(0, 0.1, (120, 32)))[:, None].astype(np.float32)
    (tmp_path / SET).mkdir()
    np.savez(tmp_path / cells.SETS[SET].file, x_train=x[:80], y_train=y[:80], x_test=x[80:], y_test=y[80:])
    quick = ("views=series", "encoder.backbone={name: resnet1d, width: 4, blocks: [1]}", "batch_size=16", "logger=none")
    monkeypatch.setitem(cells.SETS, SET, cells.RealSet(cells.SETS[SET].file, None, quick))
    folder = tmp_path / "cells"
    base, cell = Cell(SET, "info_nce", BASE, 0), Cell(SET, *method, 0)
    for one in dict.fromkeys([base, cell] if cell.loss == "cwcl" else [cell]):
        bench.measure(one, tmp_path, folder, steps=10)
    made = cells.read(folder)[str(cell)]
    assert (made["steps"], made["epochs"], made["items"]) == (10, 2.0, 80)
    assert 0 <= made["probe"]["1 %"] <= 1
    if cell.loss == UNTRAINED:
        assert "validation" not in made
        return
    assert 0 <= made["validation"] <= 1
    assert 0.3 < made["nearest_false"] <= 1
    assert 0 <= made["rates"]["false_negatives"] <= 1
    assert (made["mining_seconds"] > 0) == (cell.source == "hard_margin")
    assert (made["rates"]["false_negatives_removed"] > 0) == (cell.source == "hard_margin")
    assert f"{cell.loss}" in page({str(cell): made}, [SET])


def test_every_loss_and_source_is_explained_on_the_page():
    text = page({}, [SET])
    for name, part in {**SOURCES, **LOSSES}.items():
        assert f"| `{name}` | {part.about} |" in text


def test_the_nearest_strangers_are_counted_without_the_item_itself():
    # Two pairs of equal vectors: each item's nearest stranger is its twin; the first pair's labels differ.
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    target = torch.tensor([0, 1, 2, 2])

    class Train:
        def __len__(self):
            return 4

        def __getitems__(self, rows):
            return SimpleNamespace(x=x[rows], target=target[rows])

    assert cells.nearest_false(lambda raw: raw, SimpleNamespace(train=Train()), neighbours=1) == 0.5
