"""Corruption reaches exactly the chosen samples, and the page counts what was found: gaps and failures too."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from contrast.data.dataset import Batch
from contrast.views.views import build_views
from tools import bench_bad_pairs as bench
from tools import cells
from tools.bench_bad_pairs import KINDS, Cell, CorruptedViews, page, plan, precision, recall, tally

SHARES = {"noise_view": 0.1, "other_sample": 0.1, "noise_item": 0.1}
FACTS = {
    "processor": "a chip",
    "cores": 2,
    "threads": 2,
    "system": "Linux",
    "python": "3.11",
    "versions": {"torch": "2"},
    "commit": "abcdef",
    "dirty": False,
    "day": "2026-01-01",
}


def corrupted(shares, seed=0, items=40, views="none"):
    """Views of series whose values are their sample index, so that a view says whose it is."""
    x = torch.arange(items).float().repeat_interleave(16).view(items, 1, 16)
    train = SimpleNamespace(sample=np.arange(items), items=SimpleNamespace(read=lambda rows: x[rows].clone()))
    data = SimpleNamespace(kind="series", train=train)
    encoder = SimpleNamespace(prepare=lambda raw: raw.clone())
    made = CorruptedViews(build_views(views, (1, 16), "series"), data, encoder, shares, seed)
    whole = Batch(x, torch.arange(items), torch.zeros(items), torch.arange(items))
    return made, whole


def views_of(made, batch, seed=3):
    return made(batch, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("views", ["none", "series"])
def test_injection_touches_exactly_the_chosen_samples_in_the_chosen_view(views):
    clean, batch = corrupted({}, views=views)
    made, _ = corrupted(SHARES, views=views)
    before, after = views_of(clean, batch), views_of(made, batch)
    # A hidden span is NaN, which differs from itself.
    touched = [
        (one.nan_to_num() != other.nan_to_num()).flatten(1).any(dim=1) for one, other in zip(before, after, strict=True)
    ]
    kinds = [made.kind == number for number in range(len(KINDS))]
    assert [int(kind.sum()) for kind in kinds] == [28, 4, 4, 4]
    assert torch.equal(touched[0], kinds[3])
    assert torch.equal(touched[1], kinds[1] | kinds[2] | kinds[3])


def test_each_kind_is_what_its_name_says():
    made, batch = corrupted(SHARES)
    first, second = views_of(made, batch)
    again, second_again = views_of(made, batch, seed=4)
    for row, kind in enumerate(made.kind.tolist()):
        if KINDS[kind] == "other_sample":
            assert second[row].unique().tolist() == [float(made.partner[row])] != [float(row)]
            assert first[row].unique().tolist() == [float(row)]
        elif KINDS[kind] == "noise_view":
            assert len(second[row].unique()) == 16
            assert not torch.equal(second[row], second_again[row])
        elif KINDS[kind] == "noise_item":
            assert len(first[row].unique()) == 16
            assert torch.equal(first[row], second[row])
            assert torch.equal(first[row], again[row])
        else:
            assert second[row].unique().tolist() == [float(row)]


def test_who_is_corrupted_follows_from_the_seed_alone():
    one, same, other = (corrupted(SHARES, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(one.kind, same.kind)
    assert torch.equal(one.partner, same.partner)
    assert not torch.equal(one.kind, other.kind)
    assert sorted(one.partner.tolist()) == list(range(40))


def test_precision_and_recall_by_hand():
    kind = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])
    flag = torch.tensor([1, 0, 0, 0, 1, 1, 0, 1]).bool()
    found, injected = tally(flag, kind), tally(torch.ones(8).bool(), kind)
    assert found == {"clean": 1, "noise_view": 2, "other_sample": 0, "noise_item": 1}
    assert precision(found) == 3 / 4
    assert recall(found, injected) == 3 / 4
    assert recall(found, injected, ["noise_view"]) == 1
    assert recall(found, injected, ["clean"]) == 1 / 4
    assert precision(tally(~torch.ones(8).bool(), kind)) is None
    assert recall(found, {**injected, "other_sample": 0}, ["other_sample"]) is None


def test_the_history_ranks_either_way_round_among_clean_samples():
    # Large first: the kind, clean, the kind, clean: (1 + 2/3) / 2. Small first: clean, the kind, clean, the kind.
    found = bench.ranking(torch.tensor([4.0, 3.0, 2.0, 1.0, 9.0]), torch.tensor([1, 0, 1, 0, 2]))
    assert found["noise_view"]["as_faulty"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["noise_view"]["as_noisy"] == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert found["noise_view"]["by_chance"] == 1 / 2
    assert found["other_sample"]["as_faulty"] == 1
    assert "noise_item" not in found


def kept(cell, probe=0.5, noisy=0, faulty=0, clean=0):
    """A cell's file: of 10 of each injected kind so many are flagged at the end, of 100 clean ones `clean` a flag."""
    shares = bench.CORRUPTIONS[cell.corruption]
    counts = {kind: 100 if kind == "clean" else 10 * (kind in shares) for kind in KINDS}

    def flagged(count):
        return {kind: clean if kind == "clean" else count * (kind in shares) for kind in KINDS}

    curves = {"noisy": [flagged(0), flagged(noisy)], "faulty": [flagged(0), flagged(faulty)]}
    by_width = {flag: [flagged(number) for number in range(len(bench.WIDTHS))] for flag in bench.FLAGS}
    ranks = {kind: {"as_faulty": 0.9, "as_noisy": 0.1, "by_chance": 0.05} for kind in shares}
    return {
        **vars(cell),
        "epochs": 2,
        "warmup": 1,
        "steps": 70,
        "injected": counts,
        "curves": curves,
        "by_width": by_width,
        "ranking": ranks,
        "probe": {"1 %": probe, "100 %": probe + 0.2, "labels_per_class": 18, "warnings": []},
        "seconds": 60.0,
        "cpu_seconds": 100.0,
        "facts": FACTS,
    }


def row_of(text, *start):
    """The cells of the one row of the page's tables that starts so."""
    rows = [[word.strip() for word in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    (row,) = [row for row in rows if row[: len(start)] == list(start)]
    return row[len(start) :]


def test_the_page_counts_what_was_flagged_and_compares_probes_by_seed():
    found = {}
    for cell in plan(["bonn_eeg"]):
        better = 0.1 + 0.01 * cell.seed if cell.mining == "on" and cell.corruption == "views" else 0
        found[str(cell)] = kept(cell, probe=0.5 + 0.1 * cell.seed + better, faulty=8 + cell.seed % 2, clean=2)
    text = page(found, ["bonn_eeg"])
    assert "missing" not in text
    # Of 10 and 10 injected 8, 9, 8 each are faulty, with 2 clean ones: 16 / 18, 18 / 20, 16 / 18.
    assert row_of(text, "views", "on", "faulty") == [
        "0.893 ± 0.006",
        "0.020 ± 0.000",
        "0.833 ± 0.058",
        "0.833 ± 0.058",
        "",
    ]
    assert row_of(text, "views", "on", "noisy")[:3] == ["0.000 ± 0.000", "0.020 ± 0.000", "0.000 ± 0.000"]
    assert row_of(text, "none", "on", "any") == ["", "0.040 ± 0.000", "", "", ""]
    probe = row_of(text, "views", "on", "0.710 ± 0.110")
    assert probe[0] == "**+0.110 ± 0.006**"
    assert "`noise_view`, at the published widths: hardly any is held to be noisy, 0.0 % (of the clean 2.0 %" in text
    assert "most are held to be faulty, 83.3 % (of the clean 2.0 %; average precision 0.900, by chance 0.050)" in text
    assert "views injected, 1 % of the labels: mining better (**+0.110 ± 0.006**), the corruption itself not" in text
    assert "- probe, clean, 1 %: mining not clear (+0.000 ± 0.000)." in text
    assert "commit: `abcdef`" in text


def test_missing_cells_are_shown_as_missing():
    some = [cell for cell in plan(["bonn_eeg"]) if (cell.corruption, cell.mining) == ("views", "on") and cell.seed < 2]
    text = page({str(cell): kept(cell, faulty=8) for cell in some}, ["bonn_eeg"])
    assert "**16 cells are missing.**" in text
    assert row_of(text, "views", "on", "faulty")[2] == "0.800 ± 0.000 (2 of 3)"
    assert row_of(text, "items", "on", "faulty")[0] == "missing"
    assert "items injected, 1 % of the labels: mining missing, the corruption itself missing." in text
    assert "`noise_item`, at the published widths: as noisy: missing; as faulty: missing." in text
    assert "no cell has been made" in page({}, ["bonn_eeg"])


def test_a_precision_of_nobody_is_no_number():
    found = {str(cell): kept(cell, clean=0) for cell in plan(["bonn_eeg"])}
    assert row_of(page(found, ["bonn_eeg"]), "views", "on", "noisy")[0] == "-"


def test_only_missing_cells_are_made_and_the_picture_lies_beside_the_page(tmp_path, monkeypatch):
    made = []

    def make(name, words, folder):
        made.append(name)
        (cell,) = [cell for cell in plan(["bonn_eeg"]) if str(cell) == name]
        if cell.corruption == "none":
            return "status 1: no"
        (folder / f"{name}.json").write_text(json.dumps(kept(cell)))
        return ""

    monkeypatch.setattr(cells, "make", make)
    (tmp_path / "cells").mkdir()
    words = ["data", "--cells", str(tmp_path / "cells"), "--page", str(tmp_path / "page.md"), "--seeds", "0"]
    assert bench.bench(words) == 1
    assert len(made) == 6
    assert bench.bench(words) == 1
    assert made[6:] == ["bonn_eeg-none-off-0", "bonn_eeg-none-on-0"]
    assert bench.bench([*words, "--write"]) == 0
    assert "(page.png)" in (tmp_path / "page.md").read_text()
    assert (tmp_path / "page.png").stat().st_size > 1000


def test_a_cell_is_made_from_real_files(tmp_path):
    random = np.random.default_rng(0)
    y = np.arange(120) % 3
    wave = np.sin(np.arange(32) * (1 + y[:, None]) + random.uniform(0, 6, (120, 1))) + random.normal(0, 0.1, (120, 32))
    x = wave[:, None].astype(np.float32)
    (tmp_path / "bonn_eeg").mkdir()
    np.savez(tmp_path / cells.SETS["bonn_eeg"].file, x_train=x[:80], y_train=y[:80], x_test=x[80:], y_test=y[80:])
    monkey = cells.RealSet(
        cells.SETS["bonn_eeg"].file,
        None,
        ("views=series", "encoder.backbone={name: resnet1d, width: 4, blocks: [1]}", "batch_size=16"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cells.SETS, "bonn_eeg", monkey)
        cell = Cell("bonn_eeg", "views", "on", 1)
        bench.measure(cell, tmp_path, tmp_path / "cells", epochs=3, warmup=1)
    made = cells.read(tmp_path / "cells")[str(cell)]
    assert made["steps"] == 15
    assert made["injected"] == {"clean": 76, "noise_view": 2, "other_sample": 2, "noise_item": 0}
    assert all(len(made["curves"][flag]) == 3 for flag in bench.FLAGS)
    last = made["by_width"]["noisy"][bench.WIDTHS.index(bench.NOISY_WIDTH)]
    assert last == made["curves"]["noisy"][-1]
    assert set(made["ranking"]) == {"noise_view", "other_sample"}
    assert 0 <= made["probe"]["1 %"] <= 1
    assert made["facts"]["versions"]["torch"]


def test_drawn_training_items_keep_their_columns_and_all_test_items():
    arrays = {"x_train": np.arange(50)[:, None], "y_train": np.arange(50), "x_test": np.arange(9), "classes": "ab"}
    drawn = cells.draw_items(arrays, 20)
    assert len(drawn["x_train"]) == 20
    assert np.array_equal(drawn["x_train"][:, 0], drawn["y_train"])
    assert len(np.unique(drawn["y_train"])) == 20
    assert len(drawn["x_test"]) == 9
    again = cells.draw_items(arrays, 20)
    assert np.array_equal(drawn["y_train"], again["y_train"])


def test_a_difference_is_paired_by_seed_and_clear_beyond_two_standard_errors():
    found = cells.difference({0: 0.6, 1: 0.8, 2: 0.9}, {0: 0.5, 1: 0.6, 3: 0.1})
    assert found.mean == pytest.approx(0.15)
    assert found.standard_error == pytest.approx(0.05)
    assert found.n == 2
    assert cells.verdict(found) == "better"
    assert cells.verdict(cells.difference({0: 0.5, 1: 0.6}, {0: 0.6, 1: 0.8})) == "worse"
    assert cells.verdict(cells.difference({0: 0.5, 1: 0.6}, {0: 0.4, 1: 0.8})) == "not clear"
    assert cells.difference({0: 1.0}, {0: 0.0, 1: 0.0}) is None
    assert cells.verdict(None) == cells.in_figures(None) == "missing"


def test_one_per_cent_of_the_labels_is_counted_a_class():
    def data(labelled, classes):
        target = np.concatenate([np.zeros(labelled, dtype=np.int64), [-1, -1]])
        return SimpleNamespace(train=SimpleNamespace(target=target), classes=["c"] * classes)

    assert cells.one_per_cent(data(9200, 5)) == 18
    assert cells.one_per_cent(data(12_000, 10)) == 12
    assert cells.one_per_cent(data(60, 5)) == 1
