"""benchmarks/core.py measures every loss in miniature, and its dense losses are the package's losses."""

import json
import sys
from pathlib import Path

import core
import harness
import pytest
import torch
from loss_cases import CASES

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", CASES)
def test_the_dense_losses_have_the_values_and_gradients_of_the_package(name):
    (ours, inputs), (dense, _) = (CASES[name].step(contender, 32, torch.float64) for contender in ("this", "dense"))
    found, expected = ours(), dense()
    assert len(found) == len(expected) == 1 + len(CASES[name].learned) + len(CASES[name].parameters)
    assert {tensor.dtype for tensor in inputs.values() if tensor.is_floating_point()} == {torch.float64}
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float64
        assert other.abs().sum() > 0
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_this_checkout_has_the_results_and_about_the_time_of_itself(tmp_path, capsys):
    out = tmp_path / "cells.json"
    words = ["--sizes", "32", "--rounds", "2", "--seconds", "0.01", "--losses", "info_nce", "siglip", "--out", str(out)]
    assert core.main([*words, "--base", str(ROOT), "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)
    commit = harness.revision(ROOT)["commit"]
    assert [cell["key"] for cell in cells] == [
        {"kind": "time", "loss": loss, "size": 32, "against": f"{commit[:7]}+dense"} for loss in ("info_nce", "siglip")
    ]
    for cell in cells:
        result = cell["result"]
        assert result["same_result"] is True
        assert result["absent"] == {}
        assert result["base"]["commit"] == cell["commit"] == commit
        assert set(result["seconds"]) == {"this", "base", "dense"}
        assert all(1e-5 < seconds["low"] <= seconds["median"] < 10 for seconds in result["seconds"].values())
        assert set(result["ratio"]) == {"base", "dense"}
        assert 0.1 < result["ratio"]["base"]["median"] < 10
        assert cell["machine"]["threads"] >= 1
    assert str(ROOT) not in out.read_text()


def test_results_that_differ_are_an_error(tmp_path, monkeypatch, capsys):
    answers = {"this": [1.0, 2.0], "dense": [1.0, 2.01]}

    class Fixed:
        def __init__(self, *words, **environment):
            self.contender = words[2]

        def ask(self, **job):
            return {"check": answers[self.contender], "seconds": 0.1}

        def close(self):
            pass

    monkeypatch.setattr(core, "Worker", Fixed)
    words = ["--sizes", "32", "--losses", "clip", "--out", str(tmp_path / "cells.json"), "--json"]
    assert core.main(words) == 1
    assert json.loads(capsys.readouterr().out)[0]["result"]["same_result"] is False
    answers["dense"] = [1.0, 2.001]
    assert core.main([*words, "--again"]) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_dense_code_needs_its_matrices(tmp_path, capsys):
    words = ["--memory", "--sizes", "2048", "--losses", "info_nce", "--json", "--out", str(tmp_path / "cells.json")]
    assert core.main(words) == 0
    (cell,) = json.loads(capsys.readouterr().out)
    matrix = 4 * 2048**2 / 2**20
    assert 2 * matrix < cell["result"]["mib"]["dense"] < 6 * matrix
    assert cell["result"]["mib"]["this"] < matrix


def test_what_does_not_fit_or_takes_too_long_is_not_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "Worker", lambda *words, **environment: pytest.fail("a process was started"))
    words = ["--sizes", "65536", "--losses", "info_nce", "--longest", "1", "--out", str(tmp_path / "cells.json")]
    results = harness.Results(tmp_path / "cells.json")
    key = {"kind": "time", "loss": "info_nce", "size": 4096, "against": "dense"}
    results.add(key, {"seconds": {"this": {"median": 0.5}}})
    core.main(words)
    (_, cell) = harness.Results(tmp_path / "cells.json").cells
    # 16 times the size are 256 times the pairs.
    assert cell["result"]["absent"] == {"this": "too long", "dense": "does not fit"}
