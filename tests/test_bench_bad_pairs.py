"""Corruption reaches exactly the chosen samples, and what is flagged is counted per kind."""

import json
from types import SimpleNamespace

import bad_pairs as bench
import numpy as np
import pytest
import real_sets
import torch
from bad_pairs import KINDS, CorruptedViews

from contrast.data.dataset import Batch
from contrast.views.views import build_views

SHARES = {"noise_view": 0.1, "other_sample": 0.1, "noise_item": 0.1}


def corrupted(shares, seed=0, items=40, views="none"):
    """Return the views of series whose values are their sample index, so that a view shows its sample, and a batch."""
    x = torch.arange(items).float().repeat_interleave(16).view(items, 1, 16)
    train = SimpleNamespace(sample=np.arange(items), items=SimpleNamespace(read=lambda rows: x[rows].clone()))
    data = SimpleNamespace(kind="series", train=train)
    encoder = SimpleNamespace(prepare=lambda raw: raw.clone())
    batch = Batch(x, torch.arange(items), torch.zeros(items), torch.arange(items))
    return CorruptedViews(build_views(views, (1, 16), "series"), data, encoder, shares, seed), batch


def views_of(views, batch, seed=3):
    return views(batch, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("views", ["none", "series"])
def test_injection_changes_exactly_the_chosen_samples_in_the_chosen_view(views):
    clean, batch = corrupted({}, views=views)
    injected, _ = corrupted(SHARES, views=views)
    before, after = views_of(clean, batch), views_of(injected, batch)
    # A masked span is NaN, which differs from itself.
    changed = [
        (one.nan_to_num() != other.nan_to_num()).flatten(1).any(dim=1) for one, other in zip(before, after, strict=True)
    ]
    kinds = [injected.kind == index for index in range(len(KINDS))]
    assert [int(kind.sum()) for kind in kinds] == [28, 4, 4, 4]
    assert torch.equal(changed[0], kinds[3])
    assert torch.equal(changed[1], kinds[1] | kinds[2] | kinds[3])


def test_each_kind_is_what_its_name_says():
    injected, batch = corrupted(SHARES)
    first, second = views_of(injected, batch)
    again, second_again = views_of(injected, batch, seed=4)
    for row, kind in enumerate(injected.kind.tolist()):
        if KINDS[kind] == "other_sample":
            assert second[row].unique().tolist() == [float(injected.partner[row])] != [float(row)]
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


def test_the_corrupted_samples_follow_from_the_seed_only():
    one, same, other = (corrupted(SHARES, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(one.kind, same.kind)
    assert torch.equal(one.partner, same.partner)
    assert not torch.equal(one.kind, other.kind)
    assert sorted(one.partner.tolist()) == list(range(40))


def test_shares_precision_and_recall_by_hand():
    kind = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    flag = torch.tensor([1, 0, 0, 0, 1, 1, 0]).bool()
    assert bench.shares(flag, kind) == {"clean": 1 / 4, "noise_view": 1, "other_sample": 0}
    assert bench.precision(flag, kind) == pytest.approx(2 / 3)
    assert bench.recall(flag, kind) == pytest.approx(2 / 3)
    assert bench.precision(flag & (kind > 5), kind) is None
    assert bench.recall(flag[:4], kind[:4]) is None


def test_the_history_ranks_in_both_directions_among_clean_samples():
    # Large first: the kind, clean, the kind, clean: (1 + 2/3) / 2. Small first: clean, the kind, clean, the kind.
    found = bench.ranking(torch.tensor([4.0, 3.0, 2.0, 1.0, 9.0]), torch.tensor([1, 0, 1, 0, 2]))
    assert found["noise_view"]["as_faulty"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["noise_view"]["as_noisy"] == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert found["noise_view"]["by_chance"] == 1 / 2
    assert found["other_sample"]["as_faulty"] == 1
    assert "noise_item" not in found


def test_a_cell_is_measured_on_real_files(tmp_path, monkeypatch, capsys):
    random = np.random.default_rng(0)
    y = np.arange(120) % 3
    wave = np.sin(np.arange(32) * (1 + y[:, None]) + random.uniform(0, 6, (120, 1))) + random.normal(0, 0.1, (120, 32))
    x = wave[:, None].astype(np.float32)
    file = real_sets.SETS["bonn_eeg"].file
    (tmp_path / file).parent.mkdir()
    np.savez(tmp_path / file, x_train=x[:80], y_train=y[:80], x_test=x[80:], y_test=y[80:])
    quick = ("views=series", "encoder.backbone={name: resnet1d, width: 4, blocks: [1]}", "batch_size=16")
    monkeypatch.setitem(real_sets.SETS, "bonn_eeg", real_sets.RealSet(file, None, quick))
    words = [str(tmp_path), "--epochs", "3", "--out", str(tmp_path / "cells.json"), "--json"]
    bench.main([*words, "--cells", "*-views-on-1", "--picture", str(tmp_path / "picture.png")])
    (cell,) = json.loads(capsys.readouterr().out)
    result = cell["result"]
    assert cell["key"] == {"set": "bonn_eeg", "corruption": "views", "mining": "on", "seed": 1}
    assert (result["steps"], result["warmup"]) == (15, 1)
    assert result["corrupted"] == {"clean": 76, "noise_view": 2, "other_sample": 2, "noise_item": 0}
    assert all(len(result["curves"][flag]) == 3 for flag in bench.FLAGS)
    assert set(result["ranking"]) == {"noise_view", "other_sample"}
    for flag, width in (("noisy", bench.NOISY_WIDTH), ("faulty", bench.FAULTY_WIDTH)):
        at_end = result["flagged"][flag]
        assert at_end["precision"] == result["widths"][f"{flag}_{width:g}"]["precision"]
        assert {kind: at_end[kind] for kind in KINDS[:3]} == result["curves"][flag][-1]
    assert 0 <= result["probe"]["1_percent"] <= 1
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_a_plan_has_complete_seeds_first():
    keys = bench.plan(["bonn_eeg"])
    assert [key["seed"] for key in keys] == [0] * 6 + [1] * 6 + [2] * 6
    assert len({str(key) for key in keys}) == 18
