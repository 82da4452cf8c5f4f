"""The drawn vectors have the requested structure, and "auto" is the index that was measured to be best."""

import json
import re

import pytest
import retrieval
import torch
from harness import Results
from retrieval import SIZES, best_index, clustered, clusters_for, share_found, structure

from contrast.retrieval import auto_index, default_lists, default_probes
from contrast.retrieval.indices import AUTO_EXACT
from tests.test_docs import ROOT


def test_drawn_clusters_have_the_requested_cosines_and_spectrum():
    spectrum = [0.5, 0.3, 0.2, *[0.0] * 125]
    z, label = clustered(2000, 5, {"within": 0.6, "spectrum": spectrum})
    found = structure(z, label)
    assert z.norm(dim=1).tolist() == pytest.approx([1] * 2000, abs=1e-5)
    # Vectors of unit length bend the cluster: its cosine includes that of the tails.
    assert found["within"] == pytest.approx(0.6, abs=0.05)
    assert abs(found["between"]) < 0.1
    assert found["spectrum"][:2] == pytest.approx(spectrum[:2], abs=0.06)
    assert sum(found["spectrum"][:4]) > 0.98
    # 1 / (0.5^2 + 0.3^2 + 0.2^2)
    assert found["axes"] == pytest.approx(2.63, abs=0.4)
    sizes = label.bincount()
    assert sizes.max() <= 9 * sizes.min()
    assert clusters_for(10_000) == 100


def test_the_share_found_is_of_the_right_ones():
    right, found = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[2, 9], [4, 3]])
    assert share_found(found, right) == 3 / 4


def test_exact_search_is_chosen_until_it_is_several_times_slower():
    lists = default_lists(10_000)

    def choice(exact, ivf, recall=0.999):
        others = {f"IVF{lists},Flat, 4 probes": {"all": 0.1, "recall": 0.5}, "HNSW32": {"all": 0.1, "recall": 1.0}}
        default = {f"IVF{lists},Flat, {default_probes(lists)} probes": {"all": ivf, "recall": recall}}
        return best_index(10_000, {"exact": {"all": exact, "recall": 1.0}, **others, **default})

    assert choice(5.0, 6.0) == "exact"
    assert choice(30.0, 6.0) == "IVF512,Flat"
    assert choice(30.0, 26.0) == "exact"
    # What finds too little is not chosen, even if it is quick.
    assert choice(30.0, 6.0, recall=0.9) == "exact"


def test_searching_takes_a_share_of_an_epoch():
    # Two searches in three epochs: 4.5 s each, and (200 - 9) / 3 = 63.7 s for the rest of an epoch.
    found = retrieval.mining_share([{"step": 9, "epoch": 3.0, "seconds": 200.0, "mining_seconds": 9.0}])
    assert found == pytest.approx({"search": 4.5, "epoch": 191 / 3, "share": 4.5 / (4.5 + 191 / 3)})


def test_auto_is_the_choice_of_the_published_page():
    """At each size of the page, and no size is missing there."""
    text = (ROOT / "docs" / "benchmarks" / "retrieval.md").read_text()
    rows = re.findall(r"^\| ([\d,]+) \| `([^`]+)` \| `([^`]+)` \|$", text, re.MULTILINE)
    assert [int(size.replace(",", "")) for size, *_ in rows] == list(SIZES)
    for size, measured, default in rows:
        assert measured == default == auto_index(int(size.replace(",", "")))
    assert f"up to {AUTO_EXACT['cpu']:,} vectors on a CPU and up to {AUTO_EXACT['cuda']:,} on a GPU" in text


@pytest.mark.long
def test_a_size_is_measured_by_processes_that_take_turns(tmp_path, monkeypatch, capsys):
    """Few vectors: draw, build, search in turns, refresh, recall; the vectors cell is given."""
    pytest.importorskip("faiss")
    monkeypatch.setattr(retrieval, "contenders", lambda size: {"exact": (0,), "IVF16,Flat": (1, 16)})
    monkeypatch.setattr(retrieval, "default_lists", lambda size: 16)
    monkeypatch.setattr(retrieval, "default_probes", lambda lists: 16)
    monkeypatch.setattr(retrieval, "ROUNDS", 2)
    out = tmp_path / "cells.json"
    Results(out).add({"kind": "vectors"}, {"digits": {"within": 0.5, "spectrum": [0.6, 0.4]}})
    retrieval.main(["--sizes", "3000", "--out", str(out), "--json", "--cells", "search-*"])
    (cell,) = json.loads(capsys.readouterr().out)
    assert cell["key"] == {"kind": "search", "device": "cpu", "size": 3000}
    assert cell["result"]["choice"] in ("exact", "IVF16,Flat")
    index = cell["result"]["index"]
    assert set(index) == {"exact", "IVF16,Flat, 1 probes", "IVF16,Flat, 16 probes"}
    assert [index[name]["recall"] for name in ("exact", "IVF16,Flat, 16 probes")] == [1, 1]
    assert index["IVF16,Flat, 1 probes"]["recall"] <= 1
    for row in index.values():
        assert row["search"]["median"] > 0
        assert row["all"] == pytest.approx(row["build"] + row["search"]["median"] * 3000 / retrieval.QUERIES)
        assert row["built_mib"] <= row["peak_mib"]
        assert row["refresh"] > 0
