"""tools/prove_exact names each kind of mistake, and its exit status depends on the losses of contrast only."""

import math
from unittest.mock import patch

import pytest
import torch

import contrast
from contrast.losses import LOSSES, InfoNCE
from tools import prove_exact
from tools.prove_exact import Case, NoResult, Row, compare

OURS, PEER = Case("contrast", "info_nce"), Case("lightly", "NTXentLoss")


@pytest.mark.parametrize(
    ("values", "gradient", "verdict", "numbers"),
    [
        ([2.0, 2.0], [3.0, 4.0], "exact", (1, 1, 1)),
        ([2.0, 2.0], [3.0, 4.0 + 4e-10], "exact", (1, 1, 1)),
        ([2.0, 2.0], [1.5, 2.0], "scaled x0.50", (1, 0.5, 1)),
        ([2.0, 2.0], [-3.0, -4.0], "scaled x-1.00", (1, 1, -1)),
        ([2.0, 2.0], [0.0, 0.0], "scaled x0.00", (1, 0, math.nan)),
        ([4.0, 4.0], [3.0, 4.0], "value x2.00", (2, 1, 1)),
        ([4.0, 4.0], [6.0, 8.0], "scaled x2.00", (2, 2, 1)),
        # Right on average is not right on each process.
        ([1.0, 3.0], [3.0, 4.0], "value x1.00", (1, 1, 1)),
        ([2.0, 2.0], [3.0, 4.0 + 1e-8], "differs", (1, 1, 1)),
        # (4, 3) and (3, 4) are equally long, and their cosine is 24 / 25.
        ([2.0, 2.0], [4.0, 3.0], "differs", (1, 1, 0.96)),
        ([2.0, 2.0], [math.nan, 4.0], "NaN", (1, math.nan, math.nan)),
        ([2.0, math.nan], [3.0, 4.0], "NaN", (math.nan, 1, 1)),
    ],
)
def test_each_kind_of_difference_has_its_name(values, gradient, verdict, numbers):
    found = compare(values, gradient, 2.0, [3.0, 4.0])
    assert found.verdict == verdict
    assert (found.value, found.length, found.cosine) == pytest.approx(numbers, abs=1e-8, nan_ok=True)


@pytest.mark.parametrize(("value", "gradient"), [(0.0, [1.0]), (math.nan, [1.0]), (1.0, [0.0]), (1.0, [math.inf])])
def test_a_zero_or_infinite_reference_proves_nothing(value, gradient):
    assert compare([value], gradient, value, gradient) == NoResult("undefined", "the reference is zero or not finite")


def build_of(loss):
    """Return a build function for a loss that is called with two views only."""
    return lambda case, rank, world: (loss, lambda views, given, start: loss(*views))


class Local(InfoNCE):
    def forward(self, *views):
        with contrast.local():
            return super().forward(*views)


class Halved(InfoNCE):
    def forward(self, *views):
        value = super().forward(*views)
        return value.detach() + (value - value.detach()) / 2


class Doubled(InfoNCE):
    def forward(self, *views):
        value = super().forward(*views)
        return value + value.detach()


def outcome_of(rank, world, loss, sizes):
    with patch.object(prove_exact, "build", build_of(loss)):
        return prove_exact.value_and_gradient(OURS, sizes, rank)


@pytest.mark.parametrize(
    ("loss", "verdict"), [(InfoNCE, "exact"), (Local, "differs"), (Halved, "scaled x0.50"), (Doubled, "value x2.00")]
)
@pytest.mark.parametrize("split", list(prove_exact.SIZES))
def test_a_loss_that_is_wrong_on_several_processes_is_found(processes, loss, verdict, split):
    sizes = prove_exact.SIZES[split][processes.world]
    answers = processes.run(outcome_of, loss(), sizes)
    reference = prove_exact.value_and_gradient(OURS, (sum(sizes),), 0)
    found = compare([value for value, _ in answers], answers[0][1], *reference)
    if loss is Local and sizes == (9, 0):
        verdict = "scaled x0.50"  # one process has everything, the other adds nothing to the average
    assert found.verdict == verdict


def test_every_registered_loss_has_a_row():
    cases = prove_exact.ours()
    assert {case.name for case in cases} == set(LOSSES)
    assert {"contrast"} == {case.library for case in cases}


@pytest.mark.parametrize("case", prove_exact.ours(), ids=str)
def test_every_row_of_ours_can_be_built(case):
    loss, _ = prove_exact.build(case, 0, 1)
    assert isinstance(loss, torch.nn.Module)


def test_inputs_are_read_from_their_words():
    case = Case("contrast", "cacr", "3 views, 2 heads, labels, targets, queue, reference, samples, 1 epoch")
    once = dict.fromkeys(["label", "target", "queue", "reference", "sample", "epoch"], 1)
    assert case.counts() == {"view": 3, "head": 2, **once}
    views, given = prove_exact.batch(case, 5)
    assert [tuple(view.shape) for view in views] == [(2, 5, prove_exact.WIDTH)] * 3
    assert set(given) == {"targets", "extra", "reference", "group", "sample"}
    shards = [prove_exact.shard(views, given, rows) for rows in (slice(0, 2), slice(2, 2), slice(2, 5))]
    for number, view in enumerate(views):
        assert torch.equal(torch.cat([part[number] for part, _ in shards], dim=1), view)
    for name in ("reference", "group", "sample"):
        assert torch.equal(torch.cat([some[name] for _, some in shards]), given[name])
    for number, target in enumerate(given["targets"]):
        assert torch.equal(torch.cat([some["targets"][number] for _, some in shards], dim=1), target)
    assert all(torch.equal(some["extra"][0], given["extra"][0]) for _, some in shards)


def row(case, **kinds):
    """Return a row that is exact except for the splits in `kinds`, with one kind for two and one for four processes."""
    results = {
        "exact": compare([2.0], [1.0], 2.0, [1.0]),
        "half": compare([2.0], [0.5], 2.0, [1.0]),
        "quarter": compare([2.0], [0.25], 2.0, [1.0]),
        "twice": compare([4.0], [1.0], 2.0, [1.0]),
        "error": NoResult("error", "why"),
        "hangs": NoResult("hangs", "why"),
    }
    return Row(
        case,
        {
            (split, world): results[kinds.get(split, ("exact", "exact"))[number]]
            for split in prove_exact.SIZES
            for number, world in enumerate((2, 4))
        },
    )


@pytest.mark.parametrize(
    ("kinds", "ours", "peers"),
    [
        ({}, "exact", "exact"),
        ({"unequal": ("half", "exact")}, "scaled x0.50", "exact"),
        ({"empty": ("exact", "hangs")}, "hangs", "exact"),
        ({"even": ("half", "quarter")}, "scaled x0.50, x0.25", "scaled x0.50, x0.25"),
        ({"even": ("half", "half")}, "scaled x0.50", "scaled x0.50"),
        ({"even": ("twice", "exact")}, "value x2.00", "value x2.00"),
        ({"even": ("twice", "half")}, "scaled x0.50", "scaled x0.50"),
        ({"even": ("half", "error"), "empty": ("hangs", "error")}, "hangs", "error"),
    ],
)
def test_the_worst_decides_and_peers_are_judged_on_equal_sizes_only(kinds, ours, peers):
    assert row(OURS, **kinds).verdict == ours
    assert row(OURS, **kinds).exact == (ours == "exact")
    assert row(PEER, **kinds).verdict == peers


def test_the_table_shows_what_has_no_result():
    head, _, good, bad = prove_exact.table([row(OURS), row(OURS, even=("half", "error"))])
    assert {line.count("|") for line in (head, good, bad)} == {len(prove_exact.HEAD) + 1}
    assert good == "| `info_nce` | 2 views | " + "1.0000 | " * 6 + "exact | exact | 0e+00 | exact |"
    assert bad == "| `info_nce` | 2 views | 1.0000 | 0.5000 | 1.0000 | error | - | - | exact | exact | - | error |"


@pytest.mark.parametrize(
    ("measured", "status", "sentence"),
    [
        ([row(OURS), row(PEER, even=("half", "half"))], 0, "All losses of contrast are exact."),
        ([row(OURS), row(OURS, empty=("error", "exact"))], 1, "1 of 2 rows of contrast are not exact."),
    ],
)
def test_the_status_is_whether_ours_are_exact(monkeypatch, capsys, measured, status, sentence):
    monkeypatch.setattr(prove_exact, "PEERS", {"absent": ("absent-learn", "absent.loss")})
    monkeypatch.setattr(prove_exact, "measure", lambda cases, report: measured)
    assert prove_exact.main() == status
    printed = capsys.readouterr().out
    assert sentence in printed
    assert "absent is not installed; its rows come with: .venv/bin/pip install absent-learn\n" in printed
    assert ("info_nce, 2 views; empty sizes on 2 processes: error: why" in printed) == bool(status)


@pytest.mark.long
def test_cases_that_fail_have_no_result_and_others_are_measured():
    rows = prove_exact.measure([Case("contrast", "no such loss"), OURS], lambda sentence: None)
    assert [result.verdict for row in rows for result in row.results.values()] == ["error"] * 6 + ["exact"] * 6
    assert "no such loss" in rows[0].results["even", 2].sentence
