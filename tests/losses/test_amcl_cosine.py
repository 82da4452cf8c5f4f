"""AMCLCosine against the lines of table 2 and against plain SimSiam."""

import pytest
import torch
import torch.nn.functional as F

from contrast.losses import NegativeCosine
from contrast.losses.amcl_cosine import AMCLCosine
from tests.losses.reference import assert_same, random, regulariser, unit
from tests.losses.test_amcl import HIGH, LOW, temperature


def amcl_cosine(dim=3, **arguments):
    settings = {"hidden": 5, "lowest_temperature": LOW, "highest_temperature": HIGH, "regulariser_weight": 0.3}
    return AMCLCosine(dim, **{**settings, **arguments}).double()


def as_printed(loss, p_a, p_b, z_a, z_b, beta):
    """Return row 2 of table 2 for one head: the mean over samples of both directions, each with its temperatures."""
    rows = []
    for i in range(len(p_a)):
        sample = 0
        for p, z in ((unit(p_a)[i], unit(z_b)[i]), (unit(p_b)[i], unit(z_a)[i])):
            tau = temperature(loss, p, z)
            sample = sample - (p @ z) / (2 * tau) + beta * regulariser(tau, len(p))
        rows.append(sample)
    return sum(rows) / len(rows)


@pytest.mark.parametrize("network", ["mlp", "inner_product"])
def test_it_equals_the_printed_loss_and_the_mean_over_heads(network):
    (p_a, p_b), (z_a, z_b) = random(2, 4, 3).unbind(), random(2, 4, 3, seed=1).unbind()
    z_a, z_b = z_a.detach(), z_b.detach()
    loss = amcl_cosine(network=network)
    expected = as_printed(loss, p_a, p_b, z_a, z_b, 0.3)
    assert_same(loss(p_a, p_b, targets=(z_a, z_b)), expected, p_a, p_b, *loss.parameters())
    heads = [torch.stack([one, one.flip(0)]) for one in (p_a, p_b, z_a, z_b)]
    total = sum(as_printed(loss, *[one[head] for one in heads], 0.3) for head in range(2))
    torch.testing.assert_close(2 * loss(*heads[:2], targets=heads[2:]), total)


def test_several_positives_are_averaged():
    (p_a, p_b), (z_a, z_b) = random(2, 3, 3).unbind(), random(2, 3, 3, seed=1).unbind()
    loss = amcl_cosine()
    found = loss(p_a, p_b, targets=(z_a, z_b), group=torch.tensor([0, 0, 1]), reduction="none")
    terms = []
    for j in (0, 1):
        p, z = unit(p_a)[0], unit(z_b)[j]
        tau = temperature(loss, p, z)
        terms.append(-(p @ z) / tau + 2 * 0.3 * regulariser(tau, 3))
    torch.testing.assert_close(found[0], sum(terms) / 2)


def test_a_constant_temperature_without_regulariser_is_simsiam_divided_by_it():
    (p_a, p_b), (z_a, z_b) = random(2, 4, 3).unbind(), random(2, 4, 3, seed=1).unbind()
    loss = amcl_cosine(None, network="constant", temperature=0.4, regulariser_weight=0.0)
    found = loss(p_a, p_b, targets=(z_a, z_b))
    assert_same(found, NegativeCosine()(p_a, p_b, targets=(z_a, z_b)) / 0.4, p_a, p_b, z_a, z_b)
    plain = -(F.cosine_similarity(p_a, z_b).mean() + F.cosine_similarity(p_b, z_a).mean()) / 2
    torch.testing.assert_close(found, plain / 0.4)


def test_negatives_and_extras_do_not_matter():
    (p_a, p_b), targets = random(2, 4, 3).unbind(), random(2, 4, 3, seed=1).unbind()
    loss = amcl_cosine()
    torch.testing.assert_close(loss(p_a, p_b, targets=targets, extra=random(6, 3)), loss(p_a, p_b, targets=targets))
    assert set(loss.metrics) >= {"positive_temperature"}


@pytest.mark.parametrize("targets", [None, (), (None, None)])
def test_without_targets_it_raises(targets):
    with pytest.raises(ValueError, match=r"AMCLCosine needs targets=\(z_a, z_b\).*become equal"):
        amcl_cosine()(random(3, 3), random(3, 3), targets=targets)


def test_wrong_arguments_raise():
    with pytest.raises(ValueError, match="regulariser_weight must be a number of 0 or more; got -1"):
        AMCLCosine(4, regulariser_weight=-1)
    with pytest.raises(ValueError, match="needs the embeddings' width"):
        AMCLCosine()
