"""CACR over crops against loops of the authors' form, and its special case without crops."""

import pytest
import torch
import torch.nn.functional as F

from contrast.losses import InfoNCE
from contrast.losses.cacr_multi_crop import CACRMultiCrop
from tests.losses.reference import assert_same, random, unit


def targets_of(views, keys):
    """Return one target per view: crops have none."""
    return (*keys, *[None] * (len(views) - len(keys)))


def by_loops(queries, keys, temperature, cost, group=None, extra=()):
    """Return the published form, one key view, one sample and one query at a time; keys may be None."""
    q, count = [unit(view) for view in queries], len(queries[0])
    group, values = list(range(count)) if group is None else group, []
    for y, key in enumerate(keys):
        others = [x for x in range(len(q)) if x != y]
        if key is None or not others:
            continue
        k, rows = unit(key), []
        for i in range(count):
            mates = [j for j in range(count) if group[j] == group[i]]
            negatives = [k[j] for j in range(count) if group[j] != group[i]] + list(extra)
            distances = [sum(((q[x][i] - k[j]) ** 2).sum() for j in mates).detach() / len(mates) for x in others]
            masses = [(d / temperature).exp() for d in distances]
            for x, mass in zip(others, masses, strict=True):
                near = [q[x][i] @ k[j] for j in mates]
                far = [q[x][i] @ u for u in negatives]
                if cost == "rbf":
                    denominator = sum((s / temperature).exp() for s in near + far)
                    row = sum(denominator.log() - s / temperature for s in near) / len(near) * 2 * temperature
                else:
                    row = sum(1 - s for s in near) / len(near)
                    if far:
                        shares = [(-(1 - s.detach()) / temperature).exp() for s in far]
                        row = row - sum(share * (1 - s) for share, s in zip(shares, far, strict=True)) / sum(shares)
                rows.append(mass / sum(masses) * row)
        values.append(sum(rows) / count)
    return sum(values) / len(values)


@pytest.mark.parametrize("cost", ["rbf", "euclidean"])
@pytest.mark.parametrize(("views", "keyed"), [(2, 2), (3, 2), (4, 2), (4, 4)])
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("extras", [False, True])
def test_it_equals_loops_of_the_authors_form(cost, views, keyed, labels, extras):
    queries = [random(4, 3, seed=seed) for seed in range(views)]
    keys = [random(4, 3, seed=10 + seed) for seed in range(keyed)]
    queue, group = random(5, 3, seed=20), [0, 1, 0, 2] if labels else None
    found = CACRMultiCrop(0.6, cost)(
        *queries,
        targets=targets_of(queries, keys),
        group=torch.tensor(group) if labels else None,
        extra=queue if extras else (),
    )
    expected = by_loops(queries, keys, 0.6, cost, group, unit(queue) if extras else ())
    assert_same(found, expected, *queries, *keys, *([queue] if extras else []))


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_two_views_without_crops_are_moco_v3_times_twice_the_temperature(temperature):
    queries, keys = random(2, 5, 4), random(2, 5, 4, seed=1)
    sides = [(queries[0], keys[1]), (queries[1], keys[0])]
    entropies = [F.cross_entropy(unit(q) @ unit(k).T / temperature, torch.arange(5)) for q, k in sides]
    found = CACRMultiCrop(temperature)(*queries, targets=targets_of(queries, keys))
    assert_same(found, 2 * temperature * sum(entropies) / 2, queries, keys)
    moco = InfoNCE(temperature, candidates="across")(*queries, targets=targets_of(queries, keys))
    torch.testing.assert_close(found, 2 * temperature * moco, rtol=1e-12, atol=0)


def test_the_defaults_are_the_published_ones():
    queries, keys = random(3, 4, 3), random(2, 4, 3, seed=1)
    assert_same(
        CACRMultiCrop()(*queries, targets=targets_of(queries, keys)), by_loops(queries, keys, 1.0, "rbf"), queries, keys
    )


def test_equal_queries_have_equal_weights():
    (query,), keys = random(1, 4, 3), random(2, 4, 3, seed=1)
    crops = CACRMultiCrop(0.3)(query, query, query, targets=targets_of(range(3), keys))
    none = CACRMultiCrop(0.3)(query, query, targets=tuple(keys))
    torch.testing.assert_close(crops, none, rtol=1e-12, atol=0)


def test_a_small_temperature_selects_the_farthest_query():
    queries, key = random(3, 4, 3), random(4, 3, seed=1)
    temperature, s = 1e-3, torch.stack([unit(q) @ unit(key).T for q in queries[1:]])
    rows = []
    for i in range(4):
        farthest = int(s[:, i, i].argmin())
        logits = s[farthest, i] / temperature
        rows.append(2 * temperature * (logits.logsumexp(0) - logits[i]))
    found = CACRMultiCrop(temperature)(*queries, targets=(key, None, None))
    torch.testing.assert_close(found, sum(rows) / 4, rtol=1e-9, atol=0)


def test_the_weights_take_no_gradient():
    """The gradient of sum_x p_x c_x with constant p is the sum of p_x times the gradient of each query's cost."""
    queries, key = random(3, 1, 3), random(1, 3, seed=1)
    queue = random(5, 3, seed=2)
    loss = CACRMultiCrop(0.5)
    found = torch.autograd.grad(loss(*queries, targets=(None, None, key), extra=queue), queries)[0]
    p = ((unit(queries[:2].detach()) - unit(key.detach())) ** 2).sum(-1).div(0.5).softmax(0)
    for x in range(2):
        single = loss(queries[x], targets=(None, key), extra=queue)
        torch.testing.assert_close(found[x], p[x] * torch.autograd.grad(single, queries)[0][x], rtol=1e-10, atol=1e-13)


def test_a_single_sample_has_no_repulsion():
    queries, keys = random(3, 1, 3), random(2, 1, 3, seed=1)
    found = CACRMultiCrop(0.5, "euclidean")(*queries, targets=targets_of(queries, keys))
    assert_same(found, by_loops(queries, keys, 0.5, "euclidean"), queries, keys)
    assert abs(CACRMultiCrop(0.5)(*queries, targets=targets_of(queries, keys))) < 1e-12


def test_a_row_is_one_sample_under_one_key_view():
    queries, keys = random(3, 4, 3), random(2, 4, 3, seed=1)
    rows = CACRMultiCrop(0.5)(*queries, targets=targets_of(queries, keys), reduction="none")
    assert rows.shape == (8,)
    torch.testing.assert_close(rows.mean(), by_loops(queries, keys, 0.5, "rbf"), rtol=1e-12, atol=0)


def test_wrong_arguments_raise():
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature must be a positive number"):
            CACRMultiCrop(wrong)
    with pytest.raises(ValueError, match="cost is 'rbf' or 'euclidean'; got 'some'"):
        CACRMultiCrop(cost="some")
    with pytest.raises(ValueError, match=r"CACRMultiCrop needs momentum keys: pass targets=\(k_a, k_b\)"):
        CACRMultiCrop()(torch.ones(2, 2), torch.ones(2, 2))
