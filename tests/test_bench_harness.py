"""Cells are stored one by one, only missing ones are measured, and tables follow from them."""

import csv
import io
import json
import socket

import harness
import pytest
from harness import Results, Worker

KEYS = [{"loss": loss, "seed": seed} for loss in ("clip", "cacr") for seed in (0, 1)]


def run(words, keys=KEYS, measured=None, result=lambda key: {"value": key["seed"] + len(key["loss"])}):
    """Return the cells of a run whose results follow from their keys; `measured` collects the names."""
    measured = [] if measured is None else measured

    def measure(key, results):
        measured.append(harness.named(key))
        return result(key)

    return harness.run(harness.parser("trial", None).parse_args(words), lambda results: keys, measure)


def rows(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_a_run_measures_only_what_is_missing(tmp_path):
    measured, words = [], ["--out", str(tmp_path / "new" / "cells.json")]
    run([*words, "--cells", "*-0"], measured=measured)
    assert measured == ["clip-0", "cacr-0"]
    cells = run(words, measured=measured)
    assert measured[2:] == ["clip-1", "cacr-1"]
    assert [cell["key"] for cell in cells] == KEYS
    assert run(words, measured=measured) == cells
    assert len(measured) == 4
    run([*words, "--again", "--cells", "clip-*"], measured=measured)
    assert measured[4:] == ["clip-0", "clip-1"]
    assert len(Results(tmp_path / "new" / "cells.json").cells) == 4


def test_a_failure_keeps_the_cells_before_it(tmp_path):
    out = tmp_path / "cells.json"
    with pytest.raises(ZeroDivisionError):
        run(["--out", str(out)], result=lambda key: {"value": 1 / (key["seed"] - 1)})
    assert [cell["key"] for cell in Results(out).cells] == KEYS[:1]
    assert list(tmp_path.iterdir()) == [out]


def test_a_plan_may_depend_on_results(tmp_path):
    measured = []
    given = harness.parser("trial", None).parse_args(["--out", str(tmp_path / "cells.json")])
    harness.run(
        given,
        lambda results: [{"loss": "clip"}, *([{"loss": "best"}] if results.find(loss="clip") else [])],
        lambda key, results: measured.append(key["loss"]) or {},
    )
    assert measured == ["clip", "best"]


def test_a_cell_has_what_it_depends_on_and_no_host_name(tmp_path):
    (cell,) = run(["--out", str(tmp_path / "cells.json")], KEYS[:1])
    assert set(cell) == {"key", "result", "commit", "dirty", "versions", "machine", "date"}
    assert {"python", "torch", "contrast-learning"} <= set(cell["versions"])
    assert len(cell["commit"]) == 40
    assert socket.gethostname() not in (tmp_path / "cells.json").read_text()


def test_selected_cells_are_printed_as_csv_or_json(tmp_path, capsys):
    words = ["--out", str(tmp_path / "cells.json")]
    result = {"seconds": {"this": {"median": 0.5}, "dense": {}}, "rounds": [1, 2]}
    run([*words, "--cells", "cacr-1"], result=lambda key: result)
    (row,) = rows(capsys.readouterr().out)
    assert (row["loss"], row["seed"], row["seconds.this.median"], row["rounds"]) == ("cacr", "1", "0.5", "[1, 2]")
    run([*words, "--cells", "cacr-1", "--json"])
    assert [cell["result"] for cell in json.loads(capsys.readouterr().out)] == [result]
    run([*words, "--cells", "c*-1", "--list"])
    assert capsys.readouterr().out == "clip-1\ncacr-1\n"


def test_a_summary_has_mean_and_deviation_and_paired_differences(tmp_path, capsys):
    values = {"clip-0": 1.0, "clip-1": 3.0, "cacr-0": 2.0, "cacr-1": 5.0}
    words = ["--out", str(tmp_path / "cells.json"), "--over", "seed"]
    run(words, result=lambda key: {"probe": {"all": values[harness.named(key)]}, "same": True})
    clip, cacr = rows(capsys.readouterr().out)
    assert (clip["loss"], clip["count"], clip["probe.all.mean"]) == ("clip", "2", "2.0")
    # Half the difference of two values, times the square root of two.
    assert float(cacr["probe.all.deviation"]) == pytest.approx(1.5 * 2**0.5)
    assert "same.mean" not in cacr
    run([*words, "--minus", "loss=clip"])
    (difference,) = rows(capsys.readouterr().out)
    assert (difference["loss"], float(difference["probe.all.mean"])) == ("cacr", 1.5)
    # Differences 1 and 2: their deviation is 1 / sqrt(2), the standard error of the mean of two 1 / 2.
    assert float(difference["probe.all.error"]) == pytest.approx(0.5)


def test_contenders_take_turns_in_rotating_order():
    order = []
    found = harness.take_turns({name: lambda name=name: order.append(name) or len(order) for name in "abc"}, 3)
    assert "".join(order) == "abcbcacab"
    assert found == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}
    assert harness.ratios([2.0, 6.0], [1.0, 2.0]) == {"low": 2.25, "median": 2.5, "high": 2.75}


def test_a_worker_answers_and_says_why_it_does_not():
    code = "import harness, os; harness.serve(lambda job: {'sum': 1 / job['x']} if 'x' in job else os._exit(3))"
    worker = Worker("-c", code, PYTHONPATH=str(harness.ROOT / "benchmarks"))
    try:
        assert worker.ask(x=4) == {"sum": 0.25}
        with pytest.raises(ChildProcessError, match="ZeroDivisionError: division by zero"):
            worker.ask(x=0)
        with pytest.raises(ChildProcessError, match="the process ended with status 3"):
            worker.ask(y=0)
        assert worker.ask(x=2) == {"sum": 0.5}
    finally:
        worker.close()
