"""The loss over the hardest negatives against loops that sort them, and the gradient given by Wang and Liu."""

import math

import pytest
import torch

from contrast.core.embeddings import Embeddings
from contrast.core.pairs import Pairs
from contrast.losses.hard_contrastive import HardContrastive
from contrast.losses.info_nce import InfoNCE
from contrast.losses.pair_loss import LOSSES
from tests.losses.reference import anchors, assert_same, random, unit


def by_loops(views, group, hardest, form, temperature=0.3, weight=1.0, *, targets=None, extra=()):
    """Return the mean over the anchors with positives: sort the negatives, use the first."""
    rows = []
    for z, positives, negatives in anchors(views, group, targets=targets, extra=extra):
        if not positives:
            continue
        count = hardest if isinstance(hardest, int) else max(1, round(hardest * len(negatives)))
        attract = [z @ u for u in positives]
        hard = sorted((z @ u for u in negatives), key=lambda s: s.item(), reverse=True)[:count]
        if form == "simple":
            rows.append(weight * sum(hard) - sum(attract) / len(attract))
        else:
            mass = sum((s / temperature).exp() for s in hard)
            logs = [((p / temperature).exp() + mass).log() - p / temperature for p in attract]
            rows.append(sum(logs) / len(logs))
    return sum(rows) / len(rows)


@pytest.mark.parametrize("form", ["softmax", "simple"])
@pytest.mark.parametrize("hardest", [1, 2, 100, 0.01, 0.3, 0.6, 1.0])
@pytest.mark.parametrize(("views", "labels", "extras"), [(2, False, False), (3, True, False), (2, True, True)])
def test_it_equals_loops(form, hardest, views, labels, extras):
    tensors, queue = [random(4, 3, seed=seed) for seed in range(views)], random(5, 3, seed=9)
    group = [0, 1, 0, 2] if labels else [0, 1, 2, 3]
    found = HardContrastive(0.2, hardest, form, negative_weight=0.7)(
        *tensors, group=torch.tensor(group) if labels else None, extra=[queue] if extras else []
    )
    extra = list(unit(queue)) if extras else []
    assert_same(found, by_loops(tensors, group, hardest, form, 0.2, 0.7, extra=extra), *tensors)


@pytest.mark.parametrize("form", ["softmax", "simple"])
def test_targets_replace_the_candidates(form):
    views, keys = [random(4, 3, seed=seed) for seed in (0, 1)], [random(4, 3, seed=seed) for seed in (2, 3)]
    for targets in (tuple(keys), (None, keys[1])):
        found = HardContrastive(hardest=0.5, form=form)(*views, targets=targets)
        assert_same(found, by_loops(views, range(4), 0.5, form, targets=targets), views[0], keys[1])


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 0, 2, 1]), torch.zeros(5, dtype=torch.int64)])
@pytest.mark.parametrize("hardest", [1.0, 1000])
def test_all_negatives_are_info_nce(labels, hardest):
    views = [random(5, 3, seed=seed) for seed in range(3)]
    found = HardContrastive(0.3, hardest)(*views, group=labels)
    expected = InfoNCE(0.3, positives="alone")(*views, group=labels)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    for one, other in zip(*(torch.autograd.grad(value, views) for value in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_with_two_views_all_negatives_are_nt_xent():
    a, b = random(5, 3), random(5, 3, seed=1)
    assert_same(HardContrastive(0.3, 1.0)(a, b), InfoNCE(0.3)(a, b), a, b)


def test_all_negatives_need_no_threshold(monkeypatch):
    monkeypatch.setattr(Pairs, "kth", lambda *given, **more: pytest.fail("an unnecessary pass"))
    assert torch.isfinite(HardContrastive(hardest=1.0)(random(5, 3), random(5, 3, seed=1)))


def test_a_share_is_at_least_one_negative():
    views = random(5, 3), random(5, 3, seed=1)
    one, two = (HardContrastive(hardest=hardest)(*views, reduction="none") for hardest in (1, 2))
    torch.testing.assert_close(HardContrastive(hardest=1e-6)(*views, reduction="none"), one)
    assert (two > one).all()


def of_similarities(similarity):
    """Return pairs of anchors with these (n, m) similarities to unit vectors; sample i is positive to candidate i."""
    size = similarity.shape[1]

    def view_of(z, view):
        index = torch.arange(len(z))
        return Embeddings(z, index, index, torch.full_like(index, view))

    return Pairs(view_of(similarity, 0), [view_of(torch.eye(size, dtype=similarity.dtype), 1)], across=True)


@pytest.mark.parametrize("hardest", [2, 0.5, 1.0])
def test_the_gradient_of_a_row_sums_to_zero_and_is_zero_outside_the_selection(hardest):
    s = random(4, 9).detach().tanh().requires_grad_()
    (gradient,) = torch.autograd.grad(HardContrastive(0.3, hardest).rows(of_similarities(s)).sum(), s)
    torch.testing.assert_close(gradient.sum(dim=1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-13)
    count = hardest if isinstance(hardest, int) else round(8 * hardest)
    assert ((gradient > 0).sum(dim=1) == count).all()
    for i in range(4):
        negatives = [j for j in range(9) if j != i]
        hard = sorted(negatives, key=lambda j, i=i: float(s[i, j].detach()), reverse=True)[:count]
        mass = {j: math.exp(float(s[i, j].detach()) / 0.3) for j in [i, *hard]}
        for j in hard:
            assert float(gradient[i, j]) == pytest.approx(mass[j] / sum(mass.values()) / 0.3, rel=1e-10)


def test_a_temperature_near_zero_gives_a_triplet_loss_without_margin():
    s = random(6, 9).detach().tanh()
    s.diagonal().copy_(torch.linspace(0.2, 1.0, 6))
    rows = 1e-4 * HardContrastive(1e-4, 3).rows(of_similarities(s))
    others = s.masked_fill(torch.eye(6, 9, dtype=torch.bool), -2)
    expected = (others.amax(dim=1) - s.diagonal()).clamp(min=0)
    assert 0 < (expected > 0).sum() < 6
    torch.testing.assert_close(rows, expected, rtol=1e-9, atol=1e-9)


def test_negatives_that_tie_with_the_threshold_are_all_selected():
    s = torch.tensor([[0.1, 0.5, 0.5, 0.5, -0.2]], dtype=torch.float64)
    rows = HardContrastive(hardest=2, form="simple").rows(of_similarities(s))
    assert rows.item() == pytest.approx(3 * 0.5 - 0.1)


def test_the_positive_is_selected_at_any_distance():
    s = torch.tensor([[-0.9, 0.5, 0.2, 0.1]], dtype=torch.float64)
    row = HardContrastive(0.5, 1).rows(of_similarities(s))
    assert row.item() == pytest.approx(math.log(math.exp(-1.8) + math.exp(1.0)) + 1.8)


def test_a_share_is_of_each_anchors_own_negatives():
    # Classes of 3 and 1 samples, two views: 2 and 6 negatives; half of them are 1 and 3.
    views, group = [random(4, 3, seed=seed) for seed in (0, 1)], torch.tensor([0, 0, 0, 1])
    share, count = (HardContrastive(hardest=h)(*views, group=group, reduction="none") for h in (0.5, 1))
    torch.testing.assert_close(share[[0, 1, 2, 4, 5, 6]], count[[0, 1, 2, 4, 5, 6]])
    three = HardContrastive(hardest=3)(*views, group=group, reduction="none")
    torch.testing.assert_close(share[[3, 7]], three[[3, 7]])


def test_the_papers_share_of_fifty_thousand_is_4095():
    anchor, queue = torch.ones(1, 2), random(50_000, 2).detach().float()
    given = {"extra": queue, "reduction": "none"}
    share = HardContrastive(hardest=0.0819)(anchor, anchor, **given)
    assert torch.equal(share, HardContrastive(hardest=4095)(anchor, anchor, **given))
    assert not torch.equal(share, HardContrastive(hardest=4096)(anchor, anchor, **given))


def test_a_config_distinguishes_one_negative_from_all():
    one, every = (LOSSES.build({"name": "hard_contrastive", "hardest": hardest}) for hardest in (1, 1.0))
    views = [random(5, 3, seed=seed) for seed in (0, 1)]
    assert torch.equal(one(*views), HardContrastive(hardest=1)(*views))
    assert torch.equal(every(*views), HardContrastive(hardest=1.0)(*views))
    assert one(*views) < every(*views)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": 0}, "temperature must be a positive number; got 0"),
        ({"temperature": float("nan")}, "temperature must be a positive number; got nan"),
        *(
            ({"hardest": wrong}, rf"hardest is a number of negatives, 1 or more, or a share .* got {wrong}")
            for wrong in (0, -3, 0.0, 1.5, -0.1, float("nan"), True)
        ),
        ({"form": "some"}, "form is 'softmax' or 'simple'; got 'some'"),
        ({"negative_weight": -1.0}, "negative_weight must be a number of 0 or more; got -1.0"),
        ({"negative_weight": float("inf")}, "negative_weight must be a number of 0 or more; got inf"),
    ],
)
def test_impossible_values_raise(given, message):
    with pytest.raises(ValueError, match=message):
        HardContrastive(**given)
