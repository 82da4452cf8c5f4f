"""NegativeCosine against the formula of SimSiam."""

import pytest
import torch
import torch.nn.functional as F

from contrast.losses import NegativeCosine
from tests.losses.reference import random


def test_with_two_views_it_is_simsiam_in_value_and_gradient():
    (p_a, p_b), (z_a, z_b) = random(2, 5, 4).unbind(), random(2, 5, 4, seed=1).unbind()
    found = NegativeCosine()(p_a, p_b, targets=(z_a.detach(), z_b.detach()))
    expected = -(F.cosine_similarity(p_a, z_b.detach()).mean() + F.cosine_similarity(p_b, z_a.detach()).mean()) / 2
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    ours, theirs = (torch.autograd.grad(value, (p_a, p_b)) for value in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-14)


def test_more_views_are_averaged_over_the_targets_of_the_others():
    views, targets = random(3, 4, 2), random(3, 4, 2, seed=1)
    pairs = [F.cosine_similarity(views[x], targets[y]).mean() for x in range(3) for y in range(3) if x != y]
    torch.testing.assert_close(NegativeCosine()(*views, targets=tuple(targets)), -sum(pairs) / 6)


def test_labels_average_over_the_class():
    (p_a, p_b), (z_a, z_b) = random(2, 3, 4).unbind(), random(2, 3, 4, seed=1).unbind()
    found = NegativeCosine()(p_a, p_b, targets=(z_a, z_b), group=torch.tensor([0, 0, 1]), reduction="none")
    first = -(F.cosine_similarity(p_a[0], z_b[0], dim=0) + F.cosine_similarity(p_a[0], z_b[1], dim=0)) / 2
    torch.testing.assert_close(found[0], first)
    torch.testing.assert_close(found[2], -F.cosine_similarity(p_a[2], z_b[2], dim=0))


def test_negatives_and_extras_do_not_matter():
    (p_a, p_b), (z_a, z_b) = random(2, 5, 4).unbind(), random(2, 5, 4, seed=1).unbind()
    plain = NegativeCosine()(p_a, p_b, targets=(z_a, z_b))
    assert torch.equal(NegativeCosine()(p_a, p_b, targets=(z_a, z_b), extra=random(6, 4)), plain)


@pytest.mark.parametrize("targets", [None, (), (None, None)])
def test_without_targets_it_raises(targets):
    with pytest.raises(ValueError, match=r"NegativeCosine needs targets=\(z_a, z_b\).*become equal"):
        NegativeCosine()(random(3, 2), random(3, 2), targets=targets)
