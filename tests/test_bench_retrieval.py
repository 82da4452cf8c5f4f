"""What tools/bench_retrieval draws is as it says, and its page says what the cells say: misses and gaps too."""

import json
import re
import statistics

import pytest
import torch

from contrast.retrieval import auto_index, default_lists, default_probes
from contrast.retrieval.indices import AUTO_EXACT
from tests.test_docs import ROOT
from tools import bench_retrieval
from tools.bench_retrieval import NEIGHBOURS, SIZES, clustered, clusters_for, page, share_found, structure, taken

FACTS = {
    "processor": "a chip", "cores": 2, "threads": 1, "system": "Linux", "python": "3.11", "versions": {"torch": "2"},
    "commit": "abc", "dirty": False, "day": "2026-01-01",
}  # fmt: skip


def test_drawn_clusters_have_the_cosines_and_the_spectrum_that_were_asked_for():
    spectrum = [0.5, 0.3, 0.2, *[0.0] * 125]
    z, label = clustered(2000, 5, {"within": 0.6, "spectrum": spectrum})
    made = structure(z, label)
    assert z.norm(dim=1).tolist() == pytest.approx([1] * 2000, abs=1e-5)
    # Vectors of unit length bend the cluster: its cosine is that of the tails too.
    assert made["within"] == pytest.approx(0.6, abs=0.05)
    assert abs(made["between"]) < 0.1
    assert made["spectrum"][:2] == pytest.approx(spectrum[:2], abs=0.06)
    assert sum(made["spectrum"][:4]) > 0.98
    sizes = label.bincount()
    assert sizes.max() <= 9 * sizes.min() and clusters_for(10_000) == 100


def test_the_share_found_is_counted_of_the_right_ones():
    right, found = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[2, 9], [4, 3]])
    assert share_found(found, right) == 3 / 4


def cell(size, exact, ivf, recall=0.999):
    """A cell as its child would leave it: medians of search, of exact search and by the lists of "auto"."""
    lists = default_lists(size)
    turns = {
        "exact 0": {"name": "exact", "probes": 0, "search": [exact, exact * 2, exact / 2], "recall": 1.0},
        "ivf few": {"name": f"IVF{lists},Flat", "probes": 1, "search": [ivf / 9] * 3, "recall": 0.5},
        "ivf": {"name": f"IVF{lists},Flat", "probes": default_probes(lists), "search": [ivf] * 3, "recall": recall},
        "HNSW32 0": {"name": "HNSW32", "probes": 0, "search": [ivf / 99] * 3, "recall": 0.98},
    }
    for row in turns.values():
        row["peak"] = [2**20] * 3
    built = {name: {"build": 1.0, "held": 3 * 2**20, "peak": 5 * 2**20} for name in {r["name"] for r in turns.values()}}
    built["exact"] |= {"build": 0.0, "refresh": 0.25}
    return {"size": size, "device": "cpu", "built": built, "turns": turns, "threads": 1, "facts": FACTS}


def test_exact_search_is_taken_until_it_is_several_times_slower():
    # All vectors are 5 times the queries: 5 s against 1 + 5 s.
    assert taken(cell(10_000, 1.0, 1.0)) == "exact"
    # 30 s against 6 s, and against 26 s.
    assert taken(cell(10_000, 6.0, 1.0)) == "IVF512,Flat"
    assert taken(cell(10_000, 6.0, 5.0)) == "exact"
    # What finds too little is not taken, however quick.
    assert taken(cell(10_000, 6.0, 1.0, recall=0.9)) == "exact"


def test_the_page_says_what_was_measured_and_what_is_missing():
    text = page({"cpu-10000": cell(10_000, 1.0, 1.0)})
    assert "| exact | 0 | 0.25 | 1 [0.5-2] | 1.00 [1.00-1.00] | 1.0000 | 5 | 3 | 5 |" in text
    assert "| HNSW32 | 1 | as build | 0.0101 [0.0101-0.0101] | 0.01 [0.01-0.02] | 0.9800 | 1.05 | 3 | 5 |" in text
    assert "| 10,000 | `exact` | `exact` |" in text
    assert f"| 1,000,000 | missing | `{auto_index(1_000_000)}` |" in text
    assert text.count("**missing**") == 1 + (len(SIZES) - 1) + 1 + 1
    assert f"searches exactly up to {AUTO_EXACT['cpu']:,} vectors" in text
    assert "no cell has been measured" in page({})


def test_a_run_gives_the_share_of_its_mining():
    rows = [{"step": 9, "epoch": 3.0, "seconds": 200.0, "mining_seconds": 9.0}]
    # Two searches in three epochs: 4.5 s each, and (200 - 9) / 3 = 63.7 s for the rest of an epoch.
    text = page({"mining": {"rows": rows, "facts": FACTS}})
    assert "took 4.5 s, the epoch itself 63.7 s: searching is 6.6 % of an epoch" in text


def test_the_published_page_takes_what_auto_takes():
    """The default is what was measured: at each size of the page, and nothing there is left out."""
    text = (ROOT / "docs" / "benchmarks" / "retrieval.md").read_text()
    rows = re.findall(r"^\| ([\d,]+) \| (?:`([^`]+)`|missing) \| `([^`]+)` \|$", text, re.MULTILINE)
    assert [int(size.replace(",", "")) for size, *_ in rows] == list(SIZES)
    for size, measured, default in rows:
        assert default == auto_index(int(size.replace(",", "")))
        assert measured in ("", default)
    assert sum(bool(measured) for _, measured, _ in rows) >= 3
    assert (
        f"searches exactly up to {AUTO_EXACT['cpu']:,} vectors on a CPU and up to {AUTO_EXACT['cuda']:,} on a GPU"
        in text
    )


@pytest.mark.long
def test_a_size_is_measured_by_processes_that_take_turns(tmp_path, monkeypatch):
    """The whole way with few vectors: draw, build, search in turns, refresh, recall, page."""
    pytest.importorskip("faiss")
    known = {"within": 0.5, "between": 0.0, "spectrum": [0.6, 0.4], "vectors": 9, "clusters": 3, "first": 0, "last": 0}
    both = {name: {**known, "recall": dict.fromkeys(["1", "4", "16"], 1.0)} for name in ("real", "drawn")}
    (tmp_path / "known.json").write_text(json.dumps({**both, "facts": FACTS}))
    monkeypatch.setattr(bench_retrieval, "contenders", lambda size: {"exact": (0,), "IVF16,Flat": (1, 16)})
    monkeypatch.setattr(bench_retrieval, "ROUNDS", 2)
    bench_retrieval.make_size(tmp_path / "cpu-3000.json", 3000, "cpu")
    made = json.loads((tmp_path / "cpu-3000.json").read_text())
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    assert {name: row["recall"] for name, row in made["turns"].items()}["IVF16,Flat 16"] == 1
    assert made["turns"]["IVF16,Flat 1"]["recall"] <= 1
    assert all(len(row["search"]) == 2 and statistics.median(row["search"]) > 0 for row in made["turns"].values())
    assert made["built"]["IVF16,Flat"]["refresh"] > 0 and made["built"]["IVF16,Flat"]["held"] >= 0
    assert NEIGHBOURS == 16
