"""benchmarks/core.py measures every case in miniature, and this checkout beside itself is neither faster nor slower."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOSSES = {"info_nce", "clip", "cacr", "cwcl", "siglip", "supcon_10", "supcon_100", "decoupled", "hard_negative"}
LOSSES |= {"queue", "hard_contrastive", "amcl", "amcl_mlp", "amcl_max"}


def measure(out, *words):
    """The rows of the table, as lists of cells, and what the JSON file says."""
    command = [sys.executable, str(ROOT / "benchmarks" / "core.py"), "--base", str(ROOT), "--out", str(out), *words]
    done = subprocess.run(command, cwd=out.parent, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    return rows, out.read_text()


def test_each_case_has_the_same_result_and_about_the_same_time_as_itself(tmp_path):
    (head, _, *rows), text = measure(tmp_path / "found.json", "--sizes", "32", "--rounds", "2", "--seconds", "0.02")
    found = json.loads(text)
    assert {row[0] for row in rows} == {result["loss"] for result in found["results"]} == LOSSES
    assert len(rows) == len(LOSSES)
    assert head[3:6] == ["this ms", "base ms", "dense ms"]
    for row, result in zip(rows, found["results"], strict=True):
        assert row[0] == result["loss"]
        assert not result["absent"]
        assert row[-1] == "yes"
        low, middle, high = result["ratio"]["base"]
        assert 0.2 < low <= middle <= high < 5
        assert row[6] == f"{middle:.3f} [{low:.3f}-{high:.3f}]"
        assert all(1e-5 < seconds[1] < 10 for seconds in result["seconds"].values())
        assert set(result["seconds"]) == {"this", "base", "dense"}
    assert found["checkouts"]["this"] == found["checkouts"]["base"]
    assert found["arguments"]["sizes"] == [32]
    assert found["threads"] == 1
    assert str(ROOT) not in text


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_dense_code_needs_its_matrices(tmp_path):
    words = ["--memory", "--sizes", "2048", "--losses", "info_nce"]
    (_, _, row), text = measure(tmp_path / "found.json", *words)
    (result,) = json.loads(text)["results"]
    matrix = 4 * 2048**2 / 2**20
    assert 2 * matrix < result["mib"]["dense"] < 6 * matrix
    assert row[:3] == ["info_nce", "2,048", "1,024"]
    assert row[3:] == [f"{result['mib'][one]:.1f}" for one in ("this", "base", "dense")]
