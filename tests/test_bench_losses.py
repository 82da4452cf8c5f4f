"""What tools/bench_losses compares is the same loss, and its page says what the cells say: misses and gaps too."""

import inspect
import json
import sys

import pytest
import torch

from contrast.losses import InfoNCE
from contrast.losses.bad_pairs import BadPairs
from tools import bench_losses
from tools.bench_losses import MIB, SUBJECTS, Cell, contender, contenders, gates, inputs, page, plan, ratio, spread

MACHINE = {"processor": "a chip", "cores": "2"}


@pytest.mark.parametrize("name", [name for name, subject in SUBJECTS.items() if subject.dense])
def test_the_dense_form_has_our_value_and_our_gradients(name):
    """The reference is written independently, with the whole matrix and autograd."""
    subject = SUBJECTS[name]
    found = [contender(who, subject, inputs(subject, 26, torch.float64, dims=6), 6)() for who in ("ours", "eager")]
    given = inputs(subject, 26, torch.float64, dims=6)
    parameters = dict(subject.make(6).named_parameters())
    assert len(found[0]) == len(found[1]) == 1 + len(subject.learned) + len(parameters)
    assert set(inspect.signature(subject.dense).parameters) >= {*given, *(key.rsplit(".")[-1] for key in parameters)}
    for ours, eager in zip(*found, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-9, atol=1e-12)
        assert eager.abs().max() > 0


def test_bad_pairs_stand_beside_the_loss_inside_them_and_have_a_history():
    subject = SUBJECTS["bad_pairs"]
    given = inputs(subject, 26, torch.float64)
    loss = subject.make(128).double()
    assert isinstance(loss, BadPairs)
    assert isinstance(loss.loss, InfoNCE)
    value, *_ = contender("info_nce", subject, given)()
    torch.testing.assert_close(subject.call(loss, **given).detach(), value)
    assert contenders("bad_pairs", 4096, "cpu") == ["ours", "info_nce"]
    assert not loss.warmup_epochs


def test_everyone_gets_bfloat16_inputs_and_makes_them_float32():
    subject = SUBJECTS["nt_xent"]
    given = inputs(subject, 8, torch.bfloat16)
    assert {tensor.dtype for tensor in given.values()} == {torch.bfloat16}
    for who in ("ours", "eager"):
        value, *gradients = contender(who, subject, given)()
        assert value.dtype == torch.float32
        assert [gradient.dtype for gradient in gradients] == [torch.bfloat16] * 2


def made(cell, **more):
    """A cell's file as a child would leave it."""
    commit = {"commit": "abc", "changed": "no"}
    return {**vars(cell), "threads": 2, "machine": MACHINE, "commit": commit, "made": "2026-01-01", **more}


def timed(loss, size, dtype="float32", absent=None, **times):
    cell = Cell("time", loss, size, dtype)
    times = {name: [float(one) for one in values] for name, values in times.items()}
    return cell, made(cell, times=times, calls=dict.fromkeys(times, 3), absent=absent or {}, other_work=0.0)


def whole_plan():
    return plan(list(SUBJECTS), [*bench_losses.SMALL, *bench_losses.SIZES], list(bench_losses.DTYPES), "cpu")


def verdicts(found):
    """The rows of the gates by the start of their words, float32 only."""
    judged = [gate.judge(whole_plan(), dict(found)) for gate in gates()]
    return {row[0].replace(", float32", ""): row for row in judged if "bf16" not in row[0]}


def test_a_ratio_is_of_medians_of_the_rounds_that_both_took_part_in():
    _, kept = timed("nt_xent", 512, ours=[2, 4, 6, 100, 100], slow=[8, 8, 4])
    assert ratio(kept, "slow") == 4 / 8
    assert spread(kept, "slow") == (2 / 8, 6 / 4)
    assert ratio(kept, "eager") is None


def test_a_gate_is_met_missed_or_missing_and_names_the_worst_cell():
    eager = "NT-Xent, CLIP, queue, from 4,096: time, of eager dense"
    assert verdicts([])[eager][2:5] == ["-", "-", "**missing**"]
    good = timed("clip", 4096, ours=[1, 1, 1], eager=[4, 4, 4])
    assert verdicts([good])[eager][2:5] == ["0.25", "`time-clip-4096-float32-cpu`", "met so far"]
    bad = timed("queue", 8192, ours=[2, 2, 2], eager=[4, 4, 4])
    row = verdicts([good, bad])[eager]
    assert row[2:5] == ["0.5", "`time-queue-8192-float32-cpu`", "**missed**"]
    assert row[5] == "2, 1 above, 13 missing"
    every = [
        timed(loss, size, ours=[1], eager=[4])
        for loss in ("nt_xent", "clip", "queue")
        for size in (4096, 8192, 16384, 32768, 65536)
    ]
    assert verdicts(every)[eager][4] == "met"
    # On the bound is not above it.
    assert verdicts([timed("clip", 4096, ours=[0.35], eager=[1])])[eager][4] == "met so far"


@pytest.mark.parametrize(
    ("words", "found", "worst", "verdict"),
    [
        (
            "the other losses, from 4,096: time, of compiled",
            timed("cacr", 4096, ours=[12], compiled=[10]),
            "1.2",
            "missed",
        ),
        ("every loss, from 512: time, of eager", timed("clip", 512, ours=[12], eager=[10]), "1.2", "missed"),
        ("every loss, below 512: slower", timed("clip", 64, ours=[0.5], eager=[0.3]), "0.2 ms", "met so far"),
        ("every loss, below 512: slower", timed("clip", 64, ours=[0.9], eager=[0.3]), "0.6 ms", "missed"),
        ("bad_pairs, from 4,096: time", timed("bad_pairs", 4096, ours=[106], info_nce=[100]), "1.06", "missed"),
    ],
)
def test_each_gate_asks_its_own_cells(words, found, worst, verdict):
    ((_, row),) = [(name, row) for name, row in verdicts([found]).items() if name.startswith(words)]
    assert row[2] == worst
    assert row[4].strip("*") == verdict
    touched = [name for name, row in verdicts([found]).items() if row[2] != "-"]
    assert len(touched) == 1


def test_memory_is_judged_at_the_largest_size_of_ours_alone():
    def kept(loss, size, who, beyond):
        cell = Cell("memory", loss, size, contender=who)
        return cell, made(cell, grown=200 * MIB, beyond=beyond * MIB)

    words = "every loss, at 65,536 (amcl_mlp: 8,192): memory beyond inputs, unit copies and gradients"
    fine = [kept("clip", 65536, "ours", 20), kept("amcl_mlp", 8192, "ours", 60), kept("clip", 8192, "eager", 500)]
    assert verdicts(fine)[words][2:5] == ["60 MiB", "`memory-amcl_mlp-8192-float32-cpu-ours`", "met so far"]
    assert verdicts([*fine, kept("cacr", 65536, "ours", 65)])[words][4] == "**missed**"


def test_a_contender_that_is_absent_decides_nothing_and_is_shown():
    cell, kept = timed("nt_xent", 32768, absent={"compiled": "does not fit"}, ours=[7])
    row = verdicts([(cell, kept)])["NT-Xent, CLIP, queue, from 4,096: time, of compiled dense"]
    assert row[2] == "-"
    text = page({cell: kept}, whole_plan(), "x")
    assert "Ours / compiled dense:\n\n| loss | 32,768 |\n| --- | --- |\n| `nt_xent` | does not fit |\n" in text


def test_the_page_of_made_up_cells_says_them_all():
    a_step = Cell("step")
    found = dict(
        [
            timed("nt_xent", 4096, ours=[20, 30, 40], eager=[110, 100, 120], **{"lightly NTXentLoss": [200, 210, 220]}),
            timed("nt_xent", 128, ours=[0.5], eager=[0.4]),
            timed("bad_pairs", 8192, ours=[101], info_nce=[100]),
        ]
    )
    found[a_step] = made(a_step, times={"step": [640.0]}, calls={"step": 1}, images=64, other_work=0.2)
    text = page(found, whole_plan(), "tools/bench_losses")
    head, asked, matters, on_cpu = text.split("\n## ")
    assert "not by hand" in head
    assert "machine: processor a chip, cores 2; 2 threads" in asked
    assert "commit: `abc`" in asked
    assert "in 1 of 4 timed cells, at most 20 %" in asked
    # 10 ms a view: 0.5 and 0.4 ms of loss beside 1,280 ms, then 30 and 110 ms beside 40,960 ms, in percent.
    assert "| ours | 0.039 | 0.073 |" in matters
    assert "| eager | 0.031 | 0.27 |" in matters
    assert "up to 4,096 embeddings with ours" in matters
    assert "| 4,096 | float32 | ours | 30 [20-40] |  |  | 3 x 3 |" in on_cpu
    assert "| 4,096 | float32 | eager | 110 [100-120] | 0.273 | 0.182-0.333 | 3 x 3 |" in on_cpu
    assert "| 4,096 | float32 | lightly NTXentLoss | 210 [200-220] | 0.143 | 0.1-0.182 | 3 x 3 |" in on_cpu
    assert "### Time, bf16\n\n**missing**" in on_cpu
    assert "| loss | 128 |\n| --- | --- |\n| `nt_xent` | +0.10 (0.5, 0.4) |" in on_cpu
    assert "| loss | 4,096 |\n| --- | --- |\n| `nt_xent` | 0.273 |" in on_cpu
    assert "On a GPU" not in text
    for block in text.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1, block


def test_without_any_cell_the_page_says_so():
    assert "no cell has been measured" in page({}, whole_plan(), "x")


def test_several_machines_and_uncommitted_changes_are_all_named():
    one, two = timed("clip", 512, ours=[1]), timed("clip", 1024, ours=[1])
    two[1].update(commit={"commit": "def", "changed": "yes"}, machine={"processor": "another"})
    text = page(dict([one, two]), whole_plan(), "x")
    assert "commit: `abc` (1 cells); `def` with changes not committed (1 cells)" in text
    assert "processor another; 2 threads (1 cells)" in text


def test_cells_of_a_gpu_get_a_section_of_their_own():
    cell = Cell("time", "clip", 65536, "bf16", "cuda")
    kept = made(cell, times={"ours": [8.0], "eager": [80.0]}, calls={"ours": 1, "eager": 1}, absent={})
    both = [*whole_plan(), *plan(["clip"], [65536], ["bf16"], "cuda")]
    text = page({cell: kept}, both, "x")
    assert "## On a GPU" in text
    assert "| 65,536 | bf16 | eager | 80 [80-80] | 0.1 | 0.1-0.1 | 1 x 1 |" in text
    assert "What was asked" not in text


def test_short_cells_that_decide_come_first_and_names_are_unique():
    cells = whole_plan()
    assert len({str(cell) for cell in cells}) == len(cells)
    assert cells[0].kind == "step"
    timed_sizes = [cell.size for cell in cells if cell.kind == "time" and cell.dtype == "float32"]
    decisive = 3 * len(SUBJECTS)
    assert set(timed_sizes[:decisive]) == {512, 4096, 8192}
    assert not {512, 4096, 8192} & set(timed_sizes[decisive:])
    assert [cell.size for cell in cells if str(cell).startswith("time-amcl_mlp-")][:3] == [512, 4096, 8192]
    half = len(cells) // 2
    assert {cell.dtype for cell in cells[: half - 1]} == {"float32"}


def test_what_does_not_fit_is_not_tried():
    assert bench_losses.too_large(Cell("time", "nt_xent", 65536), "compiled")
    assert bench_losses.too_large(Cell("time", "nt_xent", 32768), "eager")
    assert not bench_losses.too_large(Cell("time", "nt_xent", 16384), "eager")
    assert not bench_losses.too_large(Cell("time", "nt_xent", 65536), "ours")


def test_rounds_follow_the_time_a_call_takes():
    assert [bench_losses.rounds_for(slowest, 6) for slowest in (1, 600, 30_000, 61_000)] == [41, 10, 5, 3]


def test_cells_are_kept_one_by_one_and_only_missing_ones_are_measured(tmp_path, monkeypatch, capsys):
    measured = []

    def run_child(cell, folder, seconds):
        measured.append(str(cell))
        if cell.size == 1024:
            return "status -9: killed"
        _, kept = timed(cell.loss, cell.size, ours=[1], eager=[10], compiled=[5])
        (folder / f"{cell}.json").write_text(json.dumps(kept))
        return ""

    monkeypatch.setattr(bench_losses, "run_child", run_child)
    words = ["--cells", str(tmp_path / "cells"), "--page", str(tmp_path / "page.md"), "--device", "cpu"]
    asked = [*words, "--losses", "clip", "--sizes", "512", "1024", "--dtypes", "float32", "--only", "time-*"]
    assert bench_losses.bench(asked) == 1
    assert measured == ["time-clip-512-float32-cpu", "time-clip-1024-float32-cpu"]
    assert "killed" in capsys.readouterr().out
    assert bench_losses.bench(asked) == 1
    assert measured[2:] == ["time-clip-1024-float32-cpu"]
    assert bench_losses.bench([*words, "--write"]) == 0
    assert len(measured) == 3
    assert "| loss | 512 |\n| --- | --- |\n| `clip` | 0.1 |" in (tmp_path / "page.md").read_text()


def test_a_cell_that_would_take_too_long_is_left_out_and_missing(tmp_path, monkeypatch, capsys):
    cell, kept = timed("clip", 8192, ours=[40_000], eager=[1])
    (tmp_path / f"{cell}.json").write_text(json.dumps(kept))
    monkeypatch.setattr(bench_losses, "run_child", lambda *_: pytest.fail("it was measured"))
    words = ["--cells", str(tmp_path), "--page", str(tmp_path / "page.md"), "--device", "cpu"]
    bench_losses.bench([*words, "--losses", "clip", "--only", "time-clip-16384-float32-cpu"])
    assert "left out: one call would take about 3 minutes" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize("cell", [Cell("time", "clip", 64), Cell("memory", "clip", 512, contender="eager")], ids=str)
def test_a_child_measures_a_cell(tmp_path, cell):
    assert bench_losses.run_child(cell, tmp_path, 0.05) == ""
    kept = bench_losses.read(tmp_path)[cell]
    if cell.kind == "time":
        assert set(kept["times"]) | set(kept["absent"]) == {"ours", "eager", "open_clip ClipLoss"}
        assert all(one > 0 for times in kept["times"].values() for one in times)
    else:
        # Two unit copies and two gradients; 4 matrices of 256 x 256 are 1 MiB.
        assert kept["grown"] - kept["beyond"] in (0, 4 * 256 * 128 * 4)
        assert kept["grown"] < 20 * MIB
