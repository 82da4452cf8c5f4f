"""AMCLCosine against the lines of table 2 and against plain SimSiam."""

import pytest
import torch
import torch.nn.functional as F

from contrast.losses import NegativeCosine
from contrast.losses.amcl_cosine import AMCLCosine
from tests.losses.reference import assert_same, random, regulariser, unit
from tests.losses.test_amcl import HIGH, LOW, temperature


def made(dim=3, **arguments):
    settings = {"hidden": 5, "lowest_temperature": LOW, "highest_temperature": HIGH, "regulariser_weight": 0.3}
    return AMCLCosine(dim, **{**settings, **arguments}).double()


def printed(loss, p_a, p_b, z_a, z_b, beta):
    """Give table 2's row 2 for one head: the mean over the samples of both directions with their own temperatures."""
    rows = []
    for i in range(len(p_a)):
        sample = 0
        for p, z in ((unit(p_a)[i], unit(z_b)[i]), (unit(p_b)[i], unit(z_a)[i])):
            tau = temperature(loss, p, z)
            sample = sample - (p @ z) / (2 * tau) + beta * regulariser(tau, len(p))
        rows.append(sample)
    return sum(rows) / len(rows)


@pytest.mark.parametrize("network", ["mlp", "inner_product"])
def test_it_equals_the_printed_loss_and_the_sum_over_heads_by_their_number(network):
    (p_a, p_b), (z_a, z_b) = random(2, 4, 3).unbind(), random(2, 4, 3, seed=1).unbind()
    z_a, z_b = z_a.detach(), z_b.detach()
    loss = made(network=network)
    expected = printed(loss, p_a, p_b, z_a, z_b, 0.3)
    assert_same(loss(p_a, p_b, targets=(z_a, z_b)), expected, p_a, p_b, *loss.parameters())
    heads = [torch.stack([one, one.flip(0)]) for one in (p_a, p_b, z_a, z_b)]
    total = sum(printed(loss, *[one[head] for one in heads], 0.3) for head in range(2))
    torch.testing.assert_close(2 * loss(*heads[:2], targets=heads[2:]), total)


def test_several_positives_take_their_mean():
    (p_a, p_b), (z_a, z_b) = random(2, 3, 3).unbind(), random(2, 3, 3, seed=1).unbind()
    loss = made()
    found = loss(p_a, p_b, targets=(z_a, z_b), group=torch.tensor([0, 0, 1]), reduction="none")
    terms = []
    for j in (0, 1):
        p, z = unit(p_a)[0], unit(z_b)[j]
        tau = temperature(loss, p, z)
        terms.append(-(p @ z) / tau + 2 * 0.3 * regulariser(tau, 3))
    torch.testing.assert_close(found[0], sum(terms) / 2)


def test_one_constant_temperature_without_regulariser_is_simsiam_over_it():
    (p_a, p_b), (z_a, z_b) = random(2, 4, 3).unbind(), random(2, 4, 3, seed=1).unbind()
    loss = made(None, network="constant", temperature=0.4, regulariser_weight=0.0)
    found = loss(p_a, p_b, targets=(z_a, z_b))
    assert_same(found, NegativeCosine()(p_a, p_b, targets=(z_a, z_b)) / 0.4, p_a, p_b, z_a, z_b)
    plain = -(F.cosine_similarity(p_a, z_b).mean() + F.cosine_similarity(p_b, z_a).mean()) / 2
    torch.testing.assert_close(found, plain / 0.4)


def test_negatives_and_extras_do_not_matter():
    (p_a, p_b), targets = random(2, 4, 3).unbind(), random(2, 4, 3, seed=1).unbind()
    loss = made()
    torch.testing.assert_close(loss(p_a, p_b, targets=targets, extra=random(6, 3)), loss(p_a, p_b, targets=targets))
    assert set(loss.metrics) >= {"positive_temperature"}


@pytest.mark.parametrize("targets", [None, (), (None, None)])
def test_without_targets_it_is_refused(targets):
    with pytest.raises(ValueError, match=r"AMCLCosine needs targets=\(z_a, z_b\).*become equal"):
        made()(random(3, 3), random(3, 3), targets=targets)


def test_wrong_arguments_are_answered_in_a_sentence():
    with pytest.raises(ValueError, match="regulariser_weight must be a number of 0 or more; got -1"):
        AMCLCosine(4, regulariser_weight=-1)
    with pytest.raises(ValueError, match="needs the embeddings' width"):
        AMCLCosine()
