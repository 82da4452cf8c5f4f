"""What tools/prove_exact says is what happened: each kind of mistake is called by its name, and only ours decide."""

import math
import re
from unittest.mock import patch

import pytest
import torch

import contrast
from contrast.losses import LOSSES, InfoNCE
from tools import prove_exact
from tools.prove_exact import Case, Failure, Group, Row, compare

OURS, PEER = Case("contrast", "info_nce"), Case("lightly", "NTXentLoss")


@pytest.mark.parametrize(
    ("values", "gradient", "word", "numbers"),
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
def test_what_differs_is_called_by_its_name(values, gradient, word, numbers):
    found = compare(values, gradient, 2.0, [3.0, 4.0])
    assert found.word == word
    assert (found.value, found.size, found.cosine) == pytest.approx(numbers, abs=1e-8, nan_ok=True)


@pytest.mark.parametrize(("value", "gradient"), [(0.0, [1.0]), (math.nan, [1.0]), (1.0, [0.0]), (1.0, [math.inf])])
def test_a_reference_that_tells_nothing_proves_nothing(value, gradient):
    with pytest.raises(Failure, match="nothing: the reference is zero or not finite"):
        compare([value], gradient, value, gradient)


def answered(loss):
    """Give a build function whose loss is asked with two views alone."""
    return lambda case, rank, world: (loss, lambda views, given, start: loss(*views))


class Forgetful(InfoNCE):
    def forward(self, *views):
        with contrast.local():
            return super().forward(*views)


class Shrunk(InfoNCE):
    def forward(self, *views):
        value = super().forward(*views)
        return value.detach() + (value - value.detach()) / 2


class Summed(InfoNCE):
    def forward(self, *views):
        value = super().forward(*views)
        return value + value.detach()


def outcome_of(rank, world, loss, sizes):
    with patch.object(prove_exact, "build", answered(loss)):
        return prove_exact.outcome(OURS, sizes, rank)


@pytest.mark.parametrize(
    ("loss", "word"), [(InfoNCE, "exact"), (Forgetful, "differs"), (Shrunk, "scaled x0.50"), (Summed, "value x2.00")]
)
@pytest.mark.parametrize("split", list(prove_exact.SIZES))
def test_a_loss_that_is_wrong_on_several_processes_is_found(processes, loss, word, split):
    sizes = prove_exact.SIZES[split][processes.world]
    answers = processes.run(outcome_of, loss(), sizes)
    reference = prove_exact.outcome(OURS, (sum(sizes),), 0)
    found = compare([value for value, _ in answers], answers[0][1], *reference)
    if loss is Forgetful and sizes == (9, 0):
        word = "scaled x0.50"  # one process has everything, the other adds nothing to the average
    assert found.word == word


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
    assert case.asked() == {"view": 3, "head": 2, **once}
    views, given = prove_exact.whole(case, 5)
    assert [tuple(view.shape) for view in views] == [(2, 5, prove_exact.WIDTH)] * 3
    assert set(given) == {"targets", "extra", "reference", "group", "sample"}
    parts = [prove_exact.part(views, given, rows) for rows in (slice(0, 2), slice(2, 2), slice(2, 5))]
    for number, view in enumerate(views):
        assert torch.equal(torch.cat([part[number] for part, _ in parts], dim=1), view)
    for name in ("reference", "group", "sample"):
        assert torch.equal(torch.cat([some[name] for _, some in parts]), given[name])
    for number, target in enumerate(given["targets"]):
        assert torch.equal(torch.cat([some["targets"][number] for _, some in parts], dim=1), target)
    assert all(torch.equal(some["extra"][0], given["extra"][0]) for _, some in parts)


def row(case, **words):
    """Give a row that is exact but where `words` says something else of a split, for two and for four processes."""
    made = {
        "exact": compare([2.0], [1.0], 2.0, [1.0]),
        "half": compare([2.0], [0.5], 2.0, [1.0]),
        "quarter": compare([2.0], [0.25], 2.0, [1.0]),
        "twice": compare([4.0], [1.0], 2.0, [1.0]),
        "error": Failure("error", "why"),
        "hangs": Failure("hangs", "why"),
    }
    return Row(
        case,
        {
            (split, world): made[words.get(split, ("exact", "exact"))[number]]
            for split in prove_exact.SIZES
            for number, world in enumerate((2, 4))
        },
    )


@pytest.mark.parametrize(
    ("words", "ours", "peers"),
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
def test_the_worst_decides_and_peers_are_asked_for_equal_shares_alone(words, ours, peers):
    assert row(OURS, **words).verdict == ours
    assert row(OURS, **words).exact == (ours == "exact")
    assert row(PEER, **words).verdict == peers


def test_a_table_is_aligned_and_names_what_did_not_come_to_an_end():
    sections = [("contrast 1", [row(OURS), row(OURS, even=("half", "error"))]), ("lightly is not installed", [])]
    above, head, _, title, good, bad, _, last = prove_exact.text(sections)
    assert [title, last] == ["contrast 1", "lightly is not installed"]
    assert good.split() == ["info_nce", "2", "views", *["1.0000"] * 6, "exact", "exact", "0e+00", "exact"]
    assert bad.split() == [
        *("info_nce", "2", "views", "1.0000", "0.5000", "1.0000", "error", "-", "-", "exact", "exact", "-", "error")
    ]
    assert above.index("2 processes") < head.index("value") + 5 < head.rindex("value")
    ends = [found.end() for found in re.finditer("value|gradient|cosine", head)]
    assert [found.end() for found in re.finditer("1.0000", good)] == ends
    assert good.index("exact") == bad.index("exact") == head.index("unequal")
    assert good.rindex("exact") == bad.rindex("error") == head.index("verdict")
    table = [line for line in prove_exact.markdown(sections) if line.startswith("|")]
    assert {line.count("|") for line in table} == {len(prove_exact.HEAD) + 1}


@pytest.mark.parametrize(
    ("measured", "status", "words"),
    [
        ([row(OURS), row(PEER, even=("half", "half"))], 0, "Every loss of contrast is exact"),
        ([row(OURS), row(OURS, empty=("error", "exact"))], 1, "1 of 2 rows of contrast are not exact"),
    ],
)
def test_the_status_says_whether_ours_are_exact(monkeypatch, capsys, measured, status, words):
    monkeypatch.setattr(prove_exact, "PEERS", {"nobody": ("nobody-learn", "nobody.loss")})
    monkeypatch.setattr(prove_exact, "rows", lambda cases, known, say: measured)
    assert prove_exact.prove([]) == status
    said = capsys.readouterr().out
    assert words in said
    assert "nobody is not installed; its rows come with: .venv/bin/pip install nobody-learn\n" in said
    assert ("info_nce, 2 views; empty shares on 2 processes: error: why" in said) == bool(status)


@pytest.mark.long
def test_a_group_outlives_what_fails_in_it():
    group = Group(2)
    try:
        for case, patience, word in ((Case("contrast", "no such loss"), 20, "error"), (OURS, 0, "hangs")):
            with pytest.raises(Failure) as failure:
                group.run(case, (3, 2), patience)
            assert failure.value.word == word
        group._start()
        group._workers[1][1].kill()
        with pytest.raises(Failure, match="crashes: a process ended"):
            group.run(OURS, (3, 2))
        (value, _), (again, _) = group.run(OURS, (3, 2))
        assert value == again == pytest.approx(prove_exact.outcome(OURS, (5,), 0)[0])
    finally:
        group.close()
