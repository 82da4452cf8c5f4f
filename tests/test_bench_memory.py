"""The best source is chosen by validation accuracy only, and every method is a config that differs by its method."""

import json
from types import SimpleNamespace

import memory as bench
import numpy as np
import pytest
import real_sets
import torch
from harness import Results
from memory import BASE, LOSSES, OTHER_LOSSES, SEEDS, SOURCES, UNTRAINED

from contrast.experiment import config as configuration
from contrast.experiment.folder import RunFolder

SET = "bonn_eeg"


def results(validation, probe=lambda key: 0.5):
    """Return the results of all cells that are known at the start."""
    found = Results(None)
    found.cells = [
        {"key": key, "result": {"validation": validation(key), "probe": {"1_percent": probe(key)}}}
        for key in bench.plan([SET], found)
    ]
    return found


def test_the_best_source_is_chosen_on_validation_and_never_on_test():
    found = results(
        lambda key: {"hard": 0.7, "nnclr": 0.6, BASE: 0.8}.get(key["source"], 0.5) + 0.01 * key["seed"],
        lambda key: 0.9 if key["source"] == "nnclr" else 0.5,
    )
    assert bench.best_source(SET, found) == "hard"
    found.cells = [cell for cell in found.cells if (cell["key"]["source"], cell["key"]["seed"]) != ("queue", 2)]
    assert bench.best_source(SET, found) is None


def test_cells_with_the_best_source_are_planned_once_it_is_known():
    first = bench.plan([SET], Results(None))
    assert len(first) == len(SEEDS) * (1 + len(SOURCES) + len(OTHER_LOSSES))
    then = bench.plan([SET], results(lambda key: 0.9 if key["source"] == "hard_top" else 0.5))
    assert then[: len(first)] == first
    assert {(key["loss"], key["source"]) for key in then[len(first) :]} == {(one, "hard_top") for one in OTHER_LOSSES}
    # The frozen network of CWCL is trained before it.
    order = [(key["loss"], key["source"], key["seed"]) for key in first]
    assert all(order.index(("info_nce", BASE, seed)) < order.index(("cwcl", BASE, seed)) for seed in SEEDS)


METHODS = [("info_nce", source) for source in SOURCES] + [(loss, source) for loss in OTHER_LOSSES for source in SOURCES]


@pytest.mark.parametrize("method", METHODS, ids="-".join)
@pytest.mark.parametrize("name", list(bench.STEPS))
def test_every_method_is_a_config_that_differs_by_its_method_only(name, method, tmp_path):
    def config(loss, source):
        key = {"set": name, "loss": loss, "source": source, "seed": 1}
        return configuration.load(None, bench.settings(key, tmp_path / "x.npz", tmp_path, 70, 10)).config

    ours, base = config(*method), config("info_nce", BASE)
    assert (ours.seed, ours.budget, ours.batch_size) == (1, "70 steps", 256)
    assert (ours.views, ours.encoder.backbone, ours.optimizer) == (base.views, base.encoder.backbone, base.optimizer)
    loss = ours.loss
    if loss["name"] in ("false_negatives", "bad_pairs"):
        assert loss.get("warmup_epochs", 6) == 6
        loss = loss["loss"]
    assert loss["name"] == method[0]
    assert (ours.encoder.reference is not None) == (method[0] == "cwcl")
    assert ("multi_head" in str(ours.encoder.head)) == (method[0] == "amcl")
    assert ours != base or method == ("info_nce", BASE)


def test_the_records_of_a_run_give_validation_rates_and_seconds(tmp_path):
    run = RunFolder(tmp_path)
    run.append_metrics({"step": 1, "loss": 3.0, "false_negatives": 0.1, "mining_seconds": 0.5})
    run.append_metrics({"step": 2, "loss": 2.0, "false_negatives": 0.3, "mining_seconds": 1.5})
    run.append_metrics({"step": 2, "probe_accuracy": 0.7})
    run.write_json("results.json", {"run": {"seconds": 20.0}})
    assert bench.records(run) == {
        "validation": 0.7,
        "train_seconds": 20.0,
        "searching_share": 1.5 / 20,
        "rates": {"false_negatives": pytest.approx(0.2)},
    }


@pytest.mark.parametrize("method", [(UNTRAINED, ""), ("info_nce", BASE), ("cwcl", "hard_margin")], ids="-".join)
def test_a_cell_is_measured_on_real_files(method, tmp_path, monkeypatch, capsys):
    random = np.random.default_rng(0)
    y = np.arange(120) % 3
    x = (np.sin(np.arange(32) * (1 + y[:, None])) + random.normal(0, 0.1, (120, 32)))[:, None].astype(np.float32)
    file = real_sets.SETS[SET].file
    (tmp_path / file).parent.mkdir()
    np.savez(tmp_path / file, x_train=x[:80], y_train=y[:80], x_test=x[80:], y_test=y[80:])
    quick = ("views=series", "encoder.backbone={name: resnet1d, width: 4, blocks: [1]}", "batch_size=16", "logger=none")
    monkeypatch.setitem(real_sets.SETS, SET, real_sets.RealSet(file, None, quick))
    loss, source = method
    key = {"set": SET, "loss": loss, "source": source, "seed": 0}
    frozen = [{**key, "loss": "info_nce", "source": BASE}] if loss == "cwcl" else []
    monkeypatch.setattr(bench, "plan", lambda names, results: [*frozen, key])
    bench.main([str(tmp_path), "--steps", "10", "--out", str(tmp_path / "cells.json"), "--json"])
    (*_, cell) = json.loads(capsys.readouterr().out)
    result = cell["result"]
    assert cell["key"] == key
    assert (result["steps"], result["epochs"], result["items"]) == (10, 2.0, 80)
    assert 0 <= result["probe"]["1_percent"] <= 1
    assert 0.3 < result["nearest_same_class"] <= 1
    if loss == UNTRAINED:
        assert "validation" not in result
        return
    assert 0 <= result["validation"] <= 1
    assert 0 <= result["rates"]["false_negatives"] <= 1
    assert (result["searching_share"] > 0) == (source == "hard_margin")
    assert (result["rates"]["false_negatives_removed"] > 0) == (source == "hard_margin")


def test_the_page_explains_every_loss_and_source():
    text = (bench.harness.ROOT / "docs" / "benchmarks" / "memory.md").read_text()
    for name in {**SOURCES, **LOSSES}:
        assert f"\n| `{name}` | " in text


def test_the_nearest_other_items_are_counted_without_the_item_itself():
    # Two pairs of equal vectors: the nearest other item is the twin; the labels of the first pair differ.
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    target = torch.tensor([0, 1, 2, 2])

    class Train:
        def __len__(self):
            return 4

        def __getitems__(self, rows):
            return SimpleNamespace(x=x[rows], target=target[rows])

    assert real_sets.nearest_same_class(lambda raw: raw, SimpleNamespace(train=Train()), neighbours=1) == 0.5


def test_drawn_training_items_keep_their_columns_and_all_test_items():
    arrays = {"x_train": np.arange(50)[:, None], "y_train": np.arange(50), "x_test": np.arange(9), "classes": "ab"}
    drawn = real_sets.draw_items(arrays, 20)
    assert len(drawn["x_train"]) == 20
    assert np.array_equal(drawn["x_train"][:, 0], drawn["y_train"])
    assert len(np.unique(drawn["y_train"])) == 20
    assert len(drawn["x_test"]) == 9
    assert np.array_equal(drawn["y_train"], real_sets.draw_items(arrays, 20)["y_train"])


def test_one_percent_of_the_labels_is_counted_per_class():
    def data(labelled, classes):
        target = np.concatenate([np.zeros(labelled, dtype=np.int64), [-1, -1]])
        return SimpleNamespace(train=SimpleNamespace(target=target), classes=["c"] * classes)

    assert real_sets.one_percent(data(9200, 5)) == 18
    assert real_sets.one_percent(data(12_000, 10)) == 12
    assert real_sets.one_percent(data(60, 5)) == 1
