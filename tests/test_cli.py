"""The command as a person uses it: complete small runs, and one sentence for every wrong input."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

import contrast
from contrast import LOSSES, cli
from contrast.experiment.parts import KINDS
from contrast.memory import MEMORIES as REGISTERED_MEMORIES
from contrast.train.callbacks import Checkpoints, MetricsLogger
from contrast.train.online_probe import OnlineProbe
from tests.tiny import QUICK, QUICK_SERIES, images, series

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CONTRAST_RUN", raising=False)


@pytest.fixture
def run_command(capfd):
    """Run the command; return its exit status, standard output and standard error."""

    def run(*words):
        status = cli.main([str(word) for word in words])
        out, err = capfd.readouterr()
        return status, out, err

    return run


def weights(run):
    """Return all tensors and numbers of the last checkpoint, also those inside the state of a memory."""
    return dict(flat(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]))


def flat(state, above=""):
    for key, value in state.items() if isinstance(state, dict) else enumerate(state):
        if isinstance(value, dict | list | tuple):
            yield from flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def numbers(run):
    rows = json.loads((run / "results.json").read_text())["results"]
    return {(row["model"], row["protocol"], row["metric"]): row["values"] for row in rows}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key], key


def test_pretrain_leaves_everything_that_a_run_promises(tmp_path, run_command):
    images(tmp_path / "bars.npz")
    status, out, err = run_command("pretrain", "bars.npz", "budget=6 steps", "logger=tensorboard", *QUICK[:-1])
    assert status == 0, err
    run = tmp_path / "runs" / "bars-info_nce-001"
    names = "config.yaml command.txt environment.json state.json metrics.jsonl log.txt views.png results.json"
    for name in [*names.split(), "report.html", "backbone.safetensors", "backbone.json", "checkpoints/last.ckpt"]:
        assert (run / name).is_file(), name
    assert any((run / "tensorboard").iterdir())
    assert json.loads((run / "state.json").read_text())["state"] == "done"
    for row in ("raw input", "untrained", "pretrained"):
        assert row in out
    assert "report: runs/bars-info_nce-001/report.html" in out
    assert "pretraining" in err
    assert "pretraining" not in out
    predictions = pandas.read_parquet(next((run / "evaluations").glob("knn-v1-bars-*/predictions.parquet")))
    assert set(predictions["model"]) == {"raw", "untrained", "pretrained"}
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 6


def test_results_json_has_the_promised_schema(tmp_path, run_command):
    images(tmp_path / "bars.npz")
    assert run_command("pretrain", "bars.npz", "budget=2 steps", *QUICK)[0] == 0
    results = json.loads((tmp_path / "runs/bars-info_nce-001/results.json").read_text())
    assert results["schema"] == 1
    about = (
        "command config_hash commit dirty seed status device processes precision batch_size steps seconds peak_bytes"
    )
    assert set(about.split()) <= set(results["run"])
    assert set(results["data"]) == {"train", "validation", "test"}
    assert {"source", "fingerprint", "samples", "split_by"} == set(results["data"]["train"])
    row = "model protocol split labels metric value spread spread_kind n values seeds selected_on saw_test settings"
    for result in results["results"]:
        assert set(row.split()) <= set(result)
        assert 0 <= result["value"] <= 1
        assert result["saw_test"] is False
    few = [result for result in results["results"] if result["protocol"] == "few_labels"]
    assert {result["n"] for result in few} == {5}


def test_the_same_seed_gives_the_same_weights_and_numbers_and_another_does_not(tmp_path, run_command):
    images(tmp_path / "bars.npz")
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run_command("pretrain", "bars.npz", "budget=4 steps", f"seed={seed}", "--out", out, *QUICK)[0] == 0
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    assert not torch.equal(*(weights(tmp_path / run)["encoder.head.0.weight"] for run in "ac"))


MEMORIES = {
    "a queue": ["moco_v2", "memory=[{name: queue, size: 40}]"],
    "positives from a queue": ["nnclr"],
    "hard negatives": ["hard_negatives"],
    "mutual neighbours": ["memory=[{name: nearest_positives, mutual: 5}]"],
    "batches of neighbours": ["neighbour_batches"],
    "two that share a bank": ["memory=[bank, {name: hard_negatives, neighbours: 3, refresh: 2 steps}]"],
    "one of a plugin": ["plugins=[tests.memory.plugin]", "memory=[{name: running_means, means: 5}]"],
}


@pytest.mark.parametrize(
    "words",
    [["simclr"], ["moco_v3"], ["cacr"], *MEMORIES.values()],
    ids=["simclr", "moco_v3", "cacr", *MEMORIES],
)
def test_a_stopped_and_resumed_run_equals_an_unbroken_one_bit_for_bit(words, tmp_path, run_command, monkeypatch):
    images(tmp_path / "bars.npz")
    settings = ["bars.npz", *words, "budget=9 steps", "probe.every=2", *QUICK]
    assert run_command("pretrain", *settings, "--out", "whole")[0] == 0
    record = MetricsLogger.on_train_batch_end

    def stop_in_the_middle(self, trainer, module, *rest):
        record(self, trainer, module, *rest)
        if module.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsLogger, "on_train_batch_end", stop_in_the_middle)
    status, _, err = run_command("pretrain", *settings, "--out", "broken")
    assert status == 130
    assert "contrast resume broken" in err
    assert json.loads((tmp_path / "broken/state.json").read_text())["state"] == "stopped"
    assert not (tmp_path / "broken/results.json").exists()
    monkeypatch.setattr(MetricsLogger, "on_train_batch_end", record)
    assert run_command("resume", "broken")[0] == 0
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "broken")
    losses = [
        [json.loads(line).get("loss") for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "broken")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("step", [5, 6], ids=["within an epoch", "at an epoch's end"])
def test_a_run_killed_after_a_checkpoint_resumes_bit_for_bit(step, tmp_path, run_command, monkeypatch):
    """The checkpoint has the finished step: momentum encoder and statistics of the loss updated, its epoch ended."""
    images(tmp_path / "bars.npz")
    inner = "{name: info_nce, candidates: across}"
    loss = f"loss={{name: bad_pairs, loss: {inner}, warmup_epochs: 1, noisy_width: 0.5, faulty_width: 0.5}}"
    settings = ["moco_v3", "bars.npz", "budget=12 steps", loss, *QUICK, "evaluate.protocols=[]"]
    assert run_command("pretrain", *settings, "--out", "whole")[0] == 0
    save = Checkpoints.on_train_batch_end

    def save_and_raise(self, trainer, module, *rest):
        assert module.steps_per_epoch == 3
        if module.global_step == step:
            self.save(trainer)
            raise OSError("no more power")

    monkeypatch.setattr(Checkpoints, "on_train_batch_end", save_and_raise)
    status, _, err = run_command("pretrain", *settings, "--out", "broken")
    assert (status, "no more power" in err) == (1, True)
    remembered = torch.load(tmp_path / "broken/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert remembered["loss.epoch"] == step // 3
    assert remembered["loss.counts"].sum() + remembered["loss.epoch_counts"].sum() == 16 * step
    monkeypatch.setattr(Checkpoints, "on_train_batch_end", save)
    assert run_command("resume", "broken")[0] == 0
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    assert weights(tmp_path / "whole")["loss.kind"].any()


BAD_PAIRS = "{name: bad_pairs, loss: info_nce, warmup_epochs: 0, noisy_width: 0.8, faulty_width: 0.8}"


@pytest.mark.parametrize(
    "more_words",
    [
        ["memory=[{name: queue, size: 48}, {name: hard_negatives, neighbours: 3, refresh: 2 steps}]"],
        pytest.param([f"loss={BAD_PAIRS}"], marks=pytest.mark.long),
        pytest.param(["nnclr", "encoder.predictor.batch_norm=false"], marks=pytest.mark.long),
        pytest.param(
            ["memory=[{name: hard_negatives, neighbours: 3, bank: {name: bank, bytes_per_process: 64}}]"],
            marks=pytest.mark.long,
        ),
        pytest.param(["neighbour_batches", "budget=8 steps"], marks=pytest.mark.long),
    ],
    ids=["queue and hard negatives", "bad pairs", "nnclr", "sharded bank", "batches of neighbours"],
)
def test_two_processes_train_as_one(more_words, tmp_path):
    """The whole model: gathered losses, averaged gradients, synchronised batch norm; random views are switched off."""
    images(tmp_path / "bars.npz")
    words = ["bars.npz", "budget=4 steps", "views=none", "trainer.accelerator=cpu", *QUICK, "evaluate.protocols=[knn]"]
    words += more_words
    for out, more in (("one", []), ("two", ["trainer.devices=2", "trainer.strategy=ddp"])):
        command = [sys.executable, "-m", "contrast.cli", "pretrain", *words, *more, "--out", out]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("training for") == 1
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for key, value in one.items():
        if key in ("loss.sums", "loss.epoch_sums"):
            value, two[key] = value / 2**24, two[key] / 2**24  # BadPairs counts in these units
        if f"{key.partition('.tensors.')[0]}.counters.position" in one:
            # The processes take turns in a batch, and the queue has the rows of one after those of the other.
            value, two[key] = (torch.as_tensor(rows, dtype=torch.float).sort(0)[0] for rows in (value, two[key]))
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    assert json.loads((tmp_path / "two/results.json").read_text())["run"]["processes"] == 2


def test_a_run_with_bad_pairs_shows_the_noisy_and_faulty_samples(tmp_path, run_command):
    series(tmp_path / "waves.csv")
    loss = "loss={name: bad_pairs, loss: info_nce, warmup_epochs: 2, noisy_width: 0.5, faulty_width: 0.5}"
    words = ["waves.csv", loss, "budget=12 steps", *QUICK_SERIES, "evaluate.protocols=[]"]
    assert run_command("pretrain", *words, "--out", "run")[0] == 0
    findings = json.loads((tmp_path / "run/results.json").read_text())["findings"]
    epochs = findings["Samples flagged by epoch"]
    assert [(row["epoch"], row["weights applied"]) for row in epochs] == [(1, 0), (2, 1), (3, 1), (4, 1)]
    state = weights(tmp_path / "run")
    share = (state["loss.kind"] == 1).sum() / (state["loss.counts"] > 0).sum()
    assert epochs[-1]["noisy"] == pytest.approx(float(share))
    assert 0 < share < 1
    (noisy,) = (rows for title, rows in findings.items() if title.startswith("Noisy"))
    assert len(noisy) == min(6, int((state["loss.kind"] == 1).sum()))
    page = (tmp_path / "run/report.html").read_text()
    section = page.split('title">Noisy')[1].split("</section>")[0]
    assert section.count('<img src="data:image/png') == len(noisy)
    assert all(row["name"] in section for row in noisy)
    assert all(title.split("'")[0] in page for title in findings)
    assert all(title in (tmp_path / "run/log.txt").read_text() for title in findings)
    assert run_command("pretrain", *words, "report.samples=false", "--out", "private")[0] == 0
    text = (tmp_path / "private/results.json").read_text()
    assert list(json.loads(text)["findings"]) == ["Samples flagged by epoch"]
    assert not any(row["name"] in text for row in noisy)
    assert "Noisy" not in (tmp_path / "private/report.html").read_text()
    assert run_command("pretrain", *words[:1], "budget=3 steps", *words[3:], "--out", "plain")[0] == 0
    assert json.loads((tmp_path / "plain/results.json").read_text())["findings"] == {}


PLAIN_LOSS = """
from torch import nn
from contrast import LOSSES

@LOSSES.register("plain_module")
class Distance(nn.Module):
    def forward(self, z_a, z_b):
        return (z_a - z_b).square().sum(dim=1).mean()
"""


def test_a_plain_module_with_forward_only_trains(tmp_path, run_command):
    images(tmp_path / "bars.npz")
    (tmp_path / "distance.py").write_text(PLAIN_LOSS)
    words = ["bars.npz", "plugins=[distance.py]", "loss=plain_module", *QUICK, "evaluate.protocols=[]"]
    try:
        assert run_command("pretrain", *words, "budget=6 steps", "--out", "run")[0] == 0
        lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["epoch"] == 2
        for part, sentence in [
            ("memory=[{name: queue, size: 8}]", "memory: this loss takes no further candidates"),
            ("encoder.momentum=0.9", "Distance got targets, which its forward does not accept"),
        ]:
            status, _, err = run_command("pretrain", *words, "budget=2 steps", part)
            assert (status, sentence in err) == (2, True), err
    finally:
        LOSSES._parts.pop("plain_module", None)


def test_a_run_counts_false_negatives_by_labels_it_never_uses(tmp_path, run_command):
    images(tmp_path / "bars.npz")
    loss = "loss={name: false_negatives, top: 1, loss: info_nce}"
    words = ["bars.npz", "budget=6 steps", *QUICK, "evaluate.protocols=[]"]
    assert run_command("pretrain", *words, loss, "--out", "run")[0] == 0
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert 0.1 < line["false_negatives"] < 0.6, "of three classes"
    assert 0 <= line["false_negatives_removed"] <= 1
    with np.load(tmp_path / "bars.npz") as arrays:
        np.savez(tmp_path / "unnamed.npz", x=arrays["x"])
    assert run_command("pretrain", "unnamed.npz", *words[1:], loss, "--out", "blind")[0] == 0
    assert "false_negatives" not in (tmp_path / "blind/metrics.jsonl").read_text()


FILLED_MEMORY = """
from contrast.memory import MEMORIES, Memory


@MEMORIES.register("filled")
class Filled(Memory):
    def __init__(self):
        super().__init__()
        self.history = []

    def update(self, embeddings, **_):
        self.history.append(embeddings)
"""


def test_a_memory_that_no_checkpoint_can_contain_is_refused_before_training(tmp_path, run_command):
    images(tmp_path / "bars.npz")
    (tmp_path / "filled.py").write_text(FILLED_MEMORY)
    try:
        words = ["bars.npz", "plugins=[filled.py]", "memory=filled", "budget=2 steps", *QUICK]
        status, _, err = run_command("pretrain", *words, "--out", "run")
    finally:
        REGISTERED_MEMORIES._parts.pop("filled", None)
    assert (status, len(err.strip().splitlines())) == (2, 1), err
    assert "memory: Filled.history contains a tensor" in err
    assert not (tmp_path / "run").exists()


def test_a_frozen_network_weighs_the_pairs(tmp_path, run_command):
    images(tmp_path / "bars.npz")
    words = ["bars.npz", *QUICK, "evaluate.protocols=[]", "budget=4 steps"]
    assert run_command("pretrain", *words, "--out", "first")[0] == 0
    queue = "memory={name: queue, size: 32}"
    for out, more in (("with", ["encoder.reference=first"]), ("without", [])):
        assert run_command("pretrain", *words, "loss=cwcl", *more, queue if more else "seed=0", "--out", out)[0] == 0
    assert str(tmp_path / "first") in (tmp_path / "with/config.yaml").read_text(), (
        "so that it is resumed from any folder"
    )
    assert not any("reference" in key and "memory" not in key for key in weights(tmp_path / "with"))
    guided = "loss={name: false_negatives, guide: true, loss: info_nce}"
    assert run_command("pretrain", *words, guided, "encoder.reference=first", "--out", "guided")[0] == 0
    status, _, err = run_command("pretrain", *words, guided)
    assert status == 2
    assert "loss: guide compares a frozen network's vectors of every view" in err


def test_resume_goes_beyond_a_finished_budget_and_changes_nothing_else(tmp_path, run_command, monkeypatch):
    images(tmp_path / "bars.npz")
    (tmp_path / "own.py").touch()
    assert run_command("pretrain", "bars.npz", "budget=3 steps", "plugins=[own.py]", *QUICK, "--out", "run")[0] == 0
    status, _, err = run_command("resume", "run", "loss.temperature=1")
    assert status == 2
    assert "loss.temperature: a resumed run continues as it was" in err
    status, _, err = run_command("resume", "run", "budget=2 steps")
    assert status == 2
    assert "run has taken 3 steps" in err
    whole = (tmp_path / "run/config.yaml").read_text()
    (tmp_path / "run/config.yaml").write_text(whole.partition("evaluate:")[0])
    status, _, err = run_command("resume", "run", "budget=5 steps")
    assert (status, len(err.strip().splitlines())) == (2, 1)
    assert "config.yaml is damaged (it has no evaluate, " in err
    (tmp_path / "run/config.yaml").write_text(whole)
    monkeypatch.chdir("/")  # data and plugins are found from any folder
    assert run_command("resume", tmp_path / "run", "budget=5 steps")[0] == 0
    assert json.loads((tmp_path / "run/state.json").read_text())["step"] == 5


def test_the_online_probe_cannot_influence_training(tmp_path, run_command, monkeypatch):
    images(tmp_path / "bars.npz")
    asked = []
    accuracy = OnlineProbe.accuracy
    monkeypatch.setattr(OnlineProbe, "accuracy", lambda *given: asked.append(accuracy(*given)) or asked[-1])
    for out, items in (("with", 1000), ("without", 0)):
        words = ["bars.npz", "budget=5 steps", f"probe.items={items}", "probe.every=1", *QUICK]
        assert run_command("pretrain", *words, "--out", out)[0] == 0
    assert len(asked) == 5
    assert_same(weights(tmp_path / "with"), weights(tmp_path / "without"))


@pytest.mark.parametrize(
    "config",
    ["simclr", "supcon", "cacr", "moco_v2", "moco_v3", "simsiam", "nnclr", "hard_negatives", "neighbour_batches"],
)
def test_every_method_trains_on_series_as_on_images(config, tmp_path, run_command):
    series(tmp_path / "waves.csv")
    status, out, err = run_command("pretrain", config, "waves.csv", "budget=3 steps", *QUICK_SERIES)
    assert status == 0, err
    assert "pretrained" in out


@pytest.mark.parametrize(
    "words",
    [
        ["loss={name: bad_pairs, loss: cacr}", "loss.loss.repulsion_scale=2"],
        ["loss={name: bad_pairs, statistics: published_code, loss: {name: amcl, hidden: 4}}", "loss.warmup_epochs=0"],
        ["loss=amcl_barlow", "loss.hidden=4"],
    ],
    ids=lambda words: words[0],
)
def test_a_loss_gets_the_facts_of_the_run(words, tmp_path, run_command):
    """Samples, the embeddings' width and the epochs; a loss inside a loss gets them too."""
    series(tmp_path / "waves.csv")
    settings = ["demo_osuleaf", "waves.csv", *words, "budget=4 steps", *QUICK_SERIES, "evaluate.protocols=[]"]
    status, _, err = run_command("pretrain", *settings, "--out", "run")
    assert status == 0, err
    status, out, _ = run_command("show", "run")
    assert status == 0
    shown = {line.split()[0]: line.split()[1] for line in out.splitlines()}
    assert {"loss.samples", "loss.dim", "loss.epochs", "loss.loss.dim"}.isdisjoint(shown)
    if "cacr" in words[0]:
        assert (shown["loss.loss.name"], shown["loss.loss.repulsion_scale"]) == ("cacr", "2.0")
        assert (shown["loss.loss.attraction_scale"], shown["loss.warmup_epochs"]) == ("1.0", "50")
    assert run_command("check", *settings)[0] == 0


def test_a_folder_without_labels_is_pretrained_and_reported(tmp_path, run_command):
    random = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for number in range(20):
        Image.fromarray(random.integers(0, 255, (12, 12, 3), dtype=np.uint8)).save(f"pictures/{number}.png")
    words = ["pictures", "budget=2 steps", *QUICK, "batch_size=8"]
    status, out, err = run_command("pretrain", *words)
    assert status == 0, err
    assert "no protocol is evaluated" in err
    assert (tmp_path / "runs/pictures-info_nce-001/report.html").is_file()
    assert "report:" in out


def test_a_flat_folder_with_a_table_keeps_slides_together_and_takes_patients_as_positives(tmp_path, run_command):
    random = np.random.default_rng(0)
    (tmp_path / "cells").mkdir()
    lines = ["item,target,slide,patient"]
    for number in range(48):
        bright = 60 + 60 * (number % 2)
        pixels = random.integers(0, bright, (14, 14), dtype=np.uint16) * 200
        Image.fromarray(pixels).save(f"cells/{number}.png")
        if number < 40:
            lines.append(f"{number}.png,{'ab'[number % 2]},slide{number // 4},patient{number // 8}")
    (tmp_path / "cells/labels.csv").write_text("\n".join(lines) + "\n")
    words = ["cells", "data.split_by=slide", "data.positives=patient", "budget=3 steps", *QUICK, "batch_size=8"]
    status, out, err = run_command("pretrain", *words, "evaluate.labels_per_class=2")
    assert status == 0, err
    assert "pretrained" in out
    assert "no 'slide' in both train and test" in err
    data = json.loads((tmp_path / "runs/cells-info_nce-001/results.json").read_text())["data"]
    assert data["test"]["split_by"] == "slide"
    rows = [json.loads(line) for line in (tmp_path / "runs/cells-info_nce-001/metrics.jsonl").read_text().splitlines()]
    assert max(row.get("positives", 0) for row in rows) > 1


def test_a_weights_file_adds_the_row_off_the_shelf(tmp_path, run_command):
    images(tmp_path / "bars.npz")
    assert run_command("pretrain", "bars.npz", "budget=3 steps", *QUICK, "--out", "first")[0] == 0
    part = "encoder.backbone={name: small_conv, width: 4, blocks: [1], pretrained: first/backbone.safetensors}"
    status, out, err = run_command("pretrain", "bars.npz", "budget=2 steps", *QUICK, part, "--out", "second")
    assert status == 0, err
    first, second = numbers(tmp_path / "first"), numbers(tmp_path / "second")
    assert second["off_the_shelf", "knn", "accuracy"] == first["pretrained", "knn", "accuracy"]
    assert second["untrained", "knn", "accuracy"] == first["untrained", "knn", "accuracy"]
    assert "off the shelf" in out


@pytest.mark.parametrize("setting", ["trainer.precision=bf16-mixed", "optimizer=lars", "budget=2s"])
def test_precision_optimizer_and_a_budget_in_seconds(setting, tmp_path, run_command):
    images(tmp_path / "bars.npz")
    status, _, err = run_command("pretrain", "bars.npz", "budget=3 steps", *QUICK, setting)
    assert status == 0, err
    results = json.loads((tmp_path / "runs/bars-info_nce-001/results.json").read_text())["run"]
    if setting == "budget=2s":
        assert results["steps"] > 3
        assert 2 <= results["seconds"] < 20


def test_a_diverging_run_fails_with_one_sentence(tmp_path, run_command):
    images(tmp_path / "bars.npz")
    words = ["bars.npz", "budget=300 steps", *QUICK, "optimizer={name: sgd, lr: 1e25, warmup: 0.9}"]
    status, out, err = run_command("pretrain", *words)
    assert (status, out) == (1, "")
    assert "Traceback" not in err
    assert "not finite" in err or "diverged" in err
    state = json.loads((tmp_path / "runs/bars-info_nce-001/state.json").read_text())
    assert state["state"] == "failed"
    assert state["why"] in err


def test_no_config_at_all_prints_what_was_chosen_and_writes_it(tmp_path, run_command, monkeypatch):
    images(tmp_path / "bars.npz", items=24)
    monkeypatch.setattr("contrast.experiment.run.auto_steps", lambda *_: 2)
    status, _, err = run_command("pretrain", "bars.npz", "evaluate.protocols=[knn]", "logger=none")
    assert status == 0, err
    for line in ("chosen views: small_images", "chosen encoder.backbone: small_conv", "chosen budget: 2 steps"):
        assert line in err
    assert "auto" not in (tmp_path / "runs/bars-info_nce-001/config.yaml").read_text()


def test_large_images_are_read_smaller_where_nothing_else_was_chosen(tmp_path, run_command, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("contrast.experiment.run.auto_steps", lambda *_: 1)
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(6):
            pixels = np.random.default_rng(number).integers(0, 255, (110, 120, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"pets/{name}/{number}.png")
    status, _, err = run_command("pretrain", "pets", "evaluate.protocols=[knn]", "logger=none")
    assert status == 0, err
    assert "chosen data.size: 64" in err
    assert "size: 64" in (tmp_path / "runs/pets-info_nce-001/config.yaml").read_text()
    status, out, _ = run_command("check", "pets", "data.size=100", *QUICK, "batch_size=4")
    assert status == 0
    assert "3x100x100" in out


def test_evaluate_measures_a_run_on_its_own_and_on_other_data(tmp_path, run_command):
    images(tmp_path / "bars.npz")
    images(tmp_path / "others.npz", seed=5)
    assert run_command("pretrain", "bars.npz", "budget=3 steps", *QUICK, "--out", "run")[0] == 0
    status, out, _ = run_command("evaluate", "run", "evaluate.protocols=[linear]")
    assert status == 0
    assert "pretrained" in out
    status, _, err = run_command("evaluate", "run", "evaluate.protocols=[{name: knn, neighbours: 5}]", "--out", "five")
    assert status == 0, err
    (result,) = (tmp_path / "five/evaluations").glob("knn-v1-bars-*/result.json")
    assert {row["settings"]["neighbours"] for row in json.loads(result.read_text())["results"]} == {5}
    status, _, err = run_command("evaluate", "run", "others.npz", "report.samples=false")
    assert status == 0
    (folder,) = (tmp_path / "run/evaluations").glob("knn-v1-others-*")
    assert (folder / "result.json").is_file()
    assert "item" not in pandas.read_parquet(folder / "predictions.parquet")
    series(tmp_path / "waves.csv")
    status, _, err = run_command("evaluate", "run", "waves.csv")
    assert (status, len(err.strip().splitlines())) == (2, 1)
    assert "reads images of 1x8x8" in err


def test_other_data_need_not_have_the_columns_of_the_runs_own(tmp_path, run_command):
    random = np.random.default_rng(0)
    x, y = random.integers(0, 255, (60, 8, 8), dtype=np.uint8), np.arange(60) % 3
    np.savez(tmp_path / "own.npz", x=x, y=y, patient=np.arange(60) // 4)
    words = ["own.npz", "budget=2 steps", "data.positives=patient", "data.split_by=patient", *QUICK]
    assert run_command("pretrain", *words, "evaluate.labels_per_class=1", "--out", "run")[0] == 0
    images(tmp_path / "bars.npz")
    status, out, err = run_command("evaluate", "run", "bars.npz")
    assert status == 0, err
    assert "pretrained" in out


def test_evaluate_takes_a_function_of_the_user(tmp_path, run_command):
    images(tmp_path / "bars.npz")
    (tmp_path / "my_encoder.py").write_text("def encode(x):\n    return x.float().mean(2).flatten(1)\n")
    status, out, err = run_command("evaluate", "my_encoder:encode", "bars.npz", "evaluate.protocols=[knn]")
    assert status == 0, err
    assert "my_encoder:encode" in out
    assert run_command("evaluate", "my_encoder:decode", "bars.npz")[0] == 2


def test_python_does_what_the_command_does(tmp_path):
    images(tmp_path / "bars.npz")
    run = contrast.pretrain(
        "bars.npz",
        loss={"name": "cacr", "repulsion_scale": 2.0},
        budget="2 steps",
        batch_size=16,
        encoder={"backbone": {"name": "small_conv", "width": 4, "blocks": [1]}},
        evaluate={"protocols": ["knn"]},
        logger="none",
    )
    assert (
        "pretrain data.source=bars.npz 'loss={name: cacr, repulsion_scale: 2.0}'"
        in (run.path / "command.txt").read_text()
    )
    again = contrast.pretrain(
        "bars.npz",
        splits={"test": 0.5},
        budget="2 steps",
        batch_size=8,
        probe={"items": 0},
        evaluate={"protocols": []},
        report={"samples": False},
        logger="none",
        encoder={"backbone": {"name": "small_conv", "width": 4, "blocks": [1]}},
    )
    assert "data.splits={test: 0.5}" in (again.path / "command.txt").read_text()
    model = contrast.load(run.path)
    features = model.features(torch.from_numpy(np.load("bars.npz")["x"][:, None]))
    assert features.shape == (60, 4)


def test_check_writes_a_picture_and_no_run(tmp_path, run_command):
    images(tmp_path / "bars.npz")
    status, out, err = run_command("check", "bars.npz", "budget=100 steps", *QUICK)
    assert status == 0, err
    for word in ("splits", "classes", "copies", "leaks", "views.png", "ms per step", "memory", "100 steps"):
        assert word in out
    assert Image.open(tmp_path / "views.png").width > 100
    assert not (tmp_path / "runs").exists()


def test_check_names_the_file_of_a_value_that_does_not_fit_the_data(tmp_path, run_command):
    images(tmp_path / "bars.npz")
    (tmp_path / "mine.yaml").write_text("views: {name: simclr, size: 32}\n")
    status, out, err = run_command("check", "mine.yaml", "bars.npz")
    assert (status, out) == (2, "")
    assert err.startswith("contrast: mine.yaml: views")


def test_check_finds_copies_across_the_splits(tmp_path, run_command):
    random = np.random.default_rng(0)
    x, y = random.integers(0, 255, (40, 8, 8), dtype=np.uint8), np.arange(40) % 2
    np.savez(tmp_path / "leaky.npz", x_train=x, y_train=y, x_test=x[:7], y_test=y[:7])
    status, out, _ = run_command("check", "leaky.npz", *QUICK)
    assert status == 0
    assert "7 x item of train that is also in test: x_train[0] = x_test[0]" in out


def test_show_prints_every_value_and_where_it_came_from(run_command):
    status, out, _ = run_command("show", "cacr", "seed=4")
    assert status == 0
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert "command line" in lines["seed"]
    assert lines["loss.repulsion_scale"].split()[1:] == ["2.0", "cacr"]
    assert lines["loss.attraction_weight"].split()[1:] == ["1.0", "default"]
    assert lines["budget"].split()[1:] == ["auto", "default"]


def test_list_names_every_part_with_a_line_each(run_command):
    status, out, _ = run_command("list", "losses")
    assert status == 0
    assert {line.split()[0] for line in out.splitlines()} == set(contrast.LOSSES)
    status, out, _ = run_command("list")
    assert status == 0
    for kind in KINDS.values():
        assert f"\n{kind.title}:\n" in f"\n{out}"
        for name in kind.registry:
            assert f"\n  {name} " in out
    for other in ("- jitter", "timm:NAME", "demo_digits", "torchvision:NAME"):
        assert f"\n  {other} " in out
    status, _, err = run_command("list", "loses")
    assert status == 2
    assert "Did you mean 'losses'?" in err


def test_list_shows_the_parts_of_a_plugin(tmp_path, run_command):
    (tmp_path / "mine.py").write_text(
        "from contrast import LOSSES, PairLoss\n"
        "from contrast.models.heads import HEADS\n"
        "@LOSSES.register('loss_of_a_plugin')\n"
        "class Mine(PairLoss):\n"
        "    'A loss of my own.'\n"
        "@HEADS.register('head_of_a_plugin')\n"
        "def head(width: int):\n"
        "    'A head of my own.'\n"
    )
    try:
        for words in (["list", "losses", "plugins=mine.py"], ["list", "plugins=[mine.py]", "losses"]):
            status, out, err = run_command(*words)
            assert status == 0, err
            assert "  loss_of_a_plugin  A loss of my own.\n" in out
            assert "head_of_a_plugin" not in out
        assert "  head_of_a_plugin  A head of my own.\n" in run_command("list", "heads", "plugins=mine.py")[1]
    finally:
        contrast.LOSSES._parts.pop("loss_of_a_plugin", None)
        KINDS["encoder.head"].registry._parts.pop("head_of_a_plugin", None)
    status, _, err = run_command("list", "losses", "plugins=elsewhere.py")
    assert (status, err.strip()[:60]) == (2, "contrast: on the command line: plugins: elsewhere.py cannot be"[:60])
    status, _, err = run_command("list", "losses", "seed=3")
    assert (status, err) == (2, "contrast: `contrast list` takes plugins=FILE only; got seed=3.\n")


def test_show_explains_a_key_with_and_without_a_config(run_command):
    status, out, err = run_command("show", "cacr", "--explain", "loss.repulsion_scale")
    assert status == 0, err
    assert out.startswith("loss.repulsion_scale = 2.0  (cacr)\n  ")
    assert run_command("show", "--explain", "batch_size")[1].startswith(
        "batch_size = auto  (default)\n  items per step"
    )
    status, _, err = run_command("show", "--explain", "bach_size")
    assert (status, "Did you mean 'batch_size'?" in err) == (2, True)
    assert run_command("show")[0] == 2


def test_the_version_is_printed_and_python_m_contrast_is_the_same_command():
    outputs = []
    for program in ([Path(sys.executable).parent / "contrast"], [sys.executable, "-m", "contrast"]):
        done = subprocess.run([*program, "--version"], capture_output=True, text=True, check=True, cwd=ROOT)
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith(f"contrast {contrast.__version__} (torch {torch.__version__.partition('+')[0]}")


QUICK_COMMANDS = {
    "list": ["list"],
    "show": ["show", "moco_v2"],
    "explain": ["show", "cacr", "--explain", "loss.repulsion_scale"],
    "unknown config": ["pretrain", "simcrl"],
    "unknown loss": ["check", "digits", "loss=info_nec"],
    "unknown key": ["pretrain", "simclr", "digits", "lss=cacr"],
    "unknown model": ["evaluate", "nowhere", "digits"],
    "unknown run": ["resume", "nowhere"],
}
SLOW_LIBRARIES = (
    "lightning",
    "torchvision",
    "timm",
    "sklearn",
    "scipy",
    "pandas",
    "aeon",
    "matplotlib",
    "torch._dynamo",
)


def test_what_needs_no_training_imports_no_slow_library(tmp_path):
    """These libraries take seconds to import; without cached bytecode more than ten."""
    code = (
        "import sys\nfrom contrast import cli\n"
        f"for words in {list(QUICK_COMMANDS.values())!r}:\n"
        "    status = cli.main(words)\n"
        f"    slow = [name for name in {SLOW_LIBRARIES!r} if name in sys.modules]\n"
        "    print('RAN', status, slow)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    ran = [line for line in done.stdout.splitlines() if line.startswith("RAN")]
    assert ran == ["RAN 0 []"] * 3 + ["RAN 2 []"] * 5, done.stderr


def folder_with_a_truncated_image(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(5):
            Image.fromarray(np.full((9, 9, 3), number * 9, np.uint8)).save(tmp_path / "pets" / name / f"{number}.png")
    broken = tmp_path / "pets" / "dog" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    return ["pretrain", "pets"], ["3.png"]


def folder_with_a_table_of_files_that_do_not_exist(tmp_path):
    (tmp_path / "flat").mkdir()
    for number in range(6):
        Image.fromarray(np.full((9, 9, 3), number * 9, np.uint8)).save(tmp_path / "flat" / f"{number}.png")
    (tmp_path / "flat" / "labels.csv").write_text("item,target\n0.png,a\n1.png,b\n77.png,a\n")
    return ["pretrain", "flat"], ["labels.csv", "77.png"]


def empty_folder(tmp_path):
    (tmp_path / "nothing").mkdir()
    return ["pretrain", "nothing"], ["nothing"]


def arrays_of_different_lengths(tmp_path):
    np.savez(tmp_path / "odd.npz", x=np.zeros((9, 8, 8), np.uint8), y=np.zeros(7, np.int64))
    return ["pretrain", "odd.npz"], ["odd.npz", "9", "7"]


def one_class_only(tmp_path):
    np.savez(tmp_path / "one.npz", x=np.zeros((9, 8, 8), np.uint8), y=np.zeros(9, np.int64))
    return ["pretrain", "one.npz"], ["one.npz", "class"]


def a_series_of_nan_only(tmp_path):
    x = np.random.default_rng(0).normal(size=(9, 1, 20)).astype(np.float32)
    x[4] = np.nan
    np.savez(tmp_path / "gaps.npz", x=x, y=np.arange(9) % 3)
    return ["pretrain", "gaps.npz"], ["gaps.npz", "4"]


def fewer_samples_than_the_batch(tmp_path):
    images(tmp_path / "few.npz", items=12)
    return ["pretrain", "few.npz", "batch_size=64"], ["batch_size", "64"]


def an_input_smaller_than_the_crop(tmp_path):
    images(tmp_path / "bars.npz")
    return ["pretrain", "bars.npz", "views={name: simclr, size: 32}"], ["views", "32"]


def a_checkpoint_of_another_backbone(tmp_path):
    images(tmp_path / "bars.npz")
    torch.save(torch.nn.Linear(3, 3).state_dict(), tmp_path / "other.pt")
    return ["pretrain", "bars.npz", "encoder.backbone={name: small_conv, pretrained: other.pt}"], ["other.pt"]


def a_pickle_with_code(tmp_path):
    images(tmp_path / "bars.npz")
    torch.save({"state_dict": os.system}, tmp_path / "evil.pt")
    return ["pretrain", "bars.npz", "encoder.backbone={name: small_conv, pretrained: evil.pt}"], ["evil.pt"]


def targets_that_a_loss_lacks(tmp_path):
    images(tmp_path / "bars.npz")
    return ["pretrain", "bars.npz", "loss=negative_cosine", *QUICK], ["loss", "targets"]


def a_device_that_does_not_exist(tmp_path):
    images(tmp_path / "bars.npz")
    return ["pretrain", "bars.npz", *QUICK, "budget=2 steps", "trainer.accelerator=tpu"], ["trainer.accelerator=tpu"]


def a_misspelt_config_next_to_data(tmp_path):
    images(tmp_path / "bars.npz")
    return ["pretrain", "simcrl", "bars.npz"], ["simcrl", "Did you mean 'simclr'?"]


def supervised_without_labels(tmp_path):
    np.savez(tmp_path / "bare.npz", x=np.random.default_rng(0).integers(0, 255, (30, 8, 8), np.uint8))
    return ["pretrain", "supcon", "bare.npz", *QUICK], ["positives", "label"]


WRONG = [
    lambda _: (
        ["pretrain", "digits", "loss={name: bad_pairs, loss: amcl_barlow}", *QUICK],
        ["loss 'bad_pairs'", "AMCLBarlow has none"],
    ),
    folder_with_a_truncated_image,
    folder_with_a_table_of_files_that_do_not_exist,
    empty_folder,
    arrays_of_different_lengths,
    one_class_only,
    a_series_of_nan_only,
    fewer_samples_than_the_batch,
    an_input_smaller_than_the_crop,
    a_checkpoint_of_another_backbone,
    a_pickle_with_code,
    targets_that_a_loss_lacks,
    a_device_that_does_not_exist,
    a_misspelt_config_next_to_data,
    supervised_without_labels,
    lambda _: (["pretrain", "simcrl"], ["simcrl", "simclr"]),
    lambda _: (["pretrain", "nowhere/at/all"], ["nowhere/at/all"]),
    lambda _: (["pretrain"], ["data.source"]),
    lambda _: (["pretrain", "digits", "loss.temprature=1"], ["loss.temprature", "temperature"]),
    lambda _: (
        ["pretrain", "digits", "loss={name: bad_pairs, loss: cacr}", "loss.loss.repulsion_scael=1"],
        ["on the command line: loss.loss.repulsion_scael", "repulsion_scale"],
    ),
    lambda _: (["pretrain", "digits", "loss=dcl"], ["loss", "decoupled"]),
    lambda _: (["pretrain", "digits", "memory=moco"], ["on the command line: memory[0]", "'moco' is called 'queue'"]),
    lambda _: (["pretrain", "digits", "memory=[{name: queue, sise: 4}]"], ["memory[0].sise", "size"]),
    lambda _: (
        ["pretrain", "digits", "moco_v2", "memory.size=4"],
        ["memory.size: memory is a list; write all of it, memory=[{name: queue, size: 4096}]"],
    ),
    lambda _: (["pretrain", "digits", "memory=3"], ["memory must be a list, each a memory", "got 3"]),
    lambda _: (["pretrain", "digits", "memory=queue", *QUICK], ["memory[0] 'queue'", "size is missing"]),
    lambda _: (
        ["pretrain", "digits", "memory={name: queue, size: 0}", *QUICK],
        ["memory[0] 'queue'", "size must be 1"],
    ),
    lambda _: (
        ["pretrain", "digits", "memory=[bank, {name: hard_negatives, neighbours: 5000}]", *QUICK],
        ["memory[1] 'hard_negatives'", "1796", "5000"],
    ),
    lambda _: (
        ["pretrain", "digits", "memory={name: hard_negatives, refresh: often}", *QUICK],
        ["memory[0] 'hard_negatives'", "'often'", "1 epochs"],
    ),
    lambda _: (
        ["pretrain", "digits", "memory={name: hard_negatives, index: Flatt}", *QUICK],
        ["memory[0] 'hard_negatives'", "Flatt", "IVF256,Flat"],
    ),
    lambda _: (
        ["pretrain", "digits", "memory={name: hard_negatives, index: 'IVF4096,Flat'}", *QUICK],
        ["memory[0] 'hard_negatives'", "4,096", "1,796"],
    ),
    lambda _: (
        ["pretrain", "digits", "memory={name: bank, samples: 100000000000}", *QUICK],
        ["memory[0] 'bank'", "GiB"],
    ),
    lambda _: (
        ["pretrain", "digits", "memory=[nearest_positives, nearest_positives]", *QUICK],
        ["memory", "leave one nearest_positives out"],
    ),
    lambda _: (
        ["pretrain", "digits", "memory=bank", "loss=amcl_barlow", *QUICK],
        ["memory: this loss takes no further candidates"],
    ),
    lambda _: (["pretrain", "digits", "sampler=nearest"], ["sampler", "'nearest' is called 'neighbours'"]),
    lambda _: (
        ["pretrain", "digits", "sampler={name: neighbours, refresh: 0 epochs}", *QUICK],
        ["sampler", "0 epochs"],
    ),
    lambda _: (["pretrain", "digits", "encoder.reference=no/run", *QUICK], ["encoder.reference", "no/run"]),
    lambda _: (["pretrain", "digits", "encoder.backbone=resnet81"], ["encoder.backbone", "resnet81"]),
    lambda _: (["pretrain", "digits", "budget=soon", *QUICK], ["budget", "soon"]),
    lambda _: (["pretrain", "digits", "data.split_by=patient"], ["split_by", "patient"]),
    lambda _: (["evaluate", "nothing/here", "digits"], ["nothing/here"]),
    lambda _: (["resume", "nothing/here"], ["nothing/here"]),
    lambda _: (["pretend", "digits"], ["pretend"]),
]


@pytest.mark.parametrize("case", WRONG, ids=[getattr(case, "__name__", "case") for case in WRONG])
def test_wrong_input_is_one_sentence_and_leaves_nothing_behind(case, tmp_path, run_command):
    words, named = case(tmp_path)
    status, out, err = run_command(*words)
    sentence = err.strip().splitlines()[-1]
    assert status == 2, err
    assert out == ""
    assert "Traceback" not in err
    assert sentence.startswith("contrast: ")
    for name in named:
        assert name in sentence
    assert not (tmp_path / "runs").exists()
