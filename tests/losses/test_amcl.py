"""AMCL against loops from the paper's table, with the network as one perceptron on both vectors concatenated."""

import math

import pytest
import torch

from contrast.core import reductions
from contrast.core.embeddings import Embeddings
from contrast.losses import LOSSES
from contrast.losses import temperatures as module
from contrast.losses.amcl import AMCL
from contrast.losses.temperatures import PairTemperature, omega
from tests.losses.reference import anchors, assert_same, pair_temperature, random, regulariser, unit

LOW, HIGH, BETA = 0.1, 1.5, 0.3


def amcl(dim=3, **arguments):
    settings = {"hidden": 5, "lowest_temperature": LOW, "highest_temperature": HIGH, "regulariser_weight": BETA}
    return AMCL(dim, **{**settings, **arguments}).double()


def temperature(loss, a, b):
    return pair_temperature(loss.temperatures, a, b, LOW, HIGH)


def by_loops(loss, views, group, *, targets=None, extra=(), over="negative", weight=BETA):
    """Return the mean over all anchors of the row in table 2, one pair at a time."""

    def score(z, u):
        tau = temperature(loss, z, u)
        return z @ u / tau - weight * regulariser(tau, len(z))

    rows = []
    for z, positives, negatives in anchors(views, group, targets=targets, extra=extra):
        if not positives or not negatives:
            continue
        denominator = negatives + (positives if over == "all" else [])
        if loss.form == "max":
            repel = score(z, max(denominator, key=lambda u: (z @ u).item()))
        else:
            repel = sum(score(z, u).exp() for u in denominator).log()
        rows.append(repel - sum(score(z, u) for u in positives) / len(positives))
    return sum(rows) / len(rows)


@pytest.mark.parametrize("form", ["max", "logsumexp"])
@pytest.mark.parametrize("network", ["mlp", "inner_product", "constant"])
@pytest.mark.parametrize("over", ["negative", "all"])
@pytest.mark.parametrize(("views", "labels", "extras"), [(2, False, False), (3, True, False), (2, True, True)])
def test_every_form_equals_loops(form, network, over, views, labels, extras):
    tensors = [random(4, 3, seed=seed) for seed in range(views)]
    group = [0, 1, 0, 2] if labels else [0, 1, 2, 3]
    queue = random(5, 3, seed=9)
    loss = amcl(form=form, network=network, positive_in_denominator=over == "all")
    found = loss(*tensors, group=torch.tensor(group) if labels else None, extra=[queue] if extras else [])
    expected = by_loops(loss, tensors, group, extra=list(unit(queue)) if extras else [], over=over)
    assert_same(found, expected, *tensors, *loss.parameters(), *([queue] if extras else []))


@pytest.mark.parametrize("over", ["negative", "all"])
@pytest.mark.parametrize("heads", [(), (2,)], ids=["no heads", "heads"])
@pytest.mark.parametrize(
    ("form", "network", "hidden"),
    [
        ("max", "mlp", 5),
        ("max", "inner_product", 5),
        ("logsumexp", "mlp", 5),
        ("logsumexp", "inner_product", 5),
        ("logsumexp", "inner_product", 2),
    ],
)
def test_tiles_of_any_size_change_nothing(form, network, hidden, heads, over):
    views = [random(*heads, 5, 3, seed=seed) for seed in range(3)]
    for group, given in ((None, views), (torch.tensor([0, 0, 1, 2, 2]), views[:2])):
        loss = amcl(form=form, network=network, hidden=hidden, positive_in_denominator=over == "all")
        weight = random(5 * len(given), seed=8).detach()
        with reductions.backend("dense"):
            expected = loss(*given, group=group, reduction="none") @ weight
        for size in (2, 512):
            with reductions.backend("tiled", tile=size):
                found = loss(*given, group=group, reduction="none") @ weight
            assert_same(found, expected, *given, *loss.parameters())


@pytest.mark.parametrize("form", ["max", "logsumexp"])
def test_momentum_keys_and_a_queue_equal_loops(form):
    query, key, queue = random(4, 3), random(4, 3, seed=1), random(6, 3, seed=2)
    loss = amcl(form=form)
    found = loss(query, targets=(None, key), extra=[queue])
    assert_same(found, by_loops(loss, [query], range(4), targets=[None, key], extra=unit(queue)), query, key, queue)


@pytest.mark.parametrize("form", ["max", "logsumexp"])
def test_heads_share_one_network_and_are_averaged(form):
    a, b = random(3, 4, 3), random(3, 4, 3, seed=1)
    queue = random(5, 3, seed=2)
    loss = amcl(form=form)
    heads = [by_loops(loss, [a[head], b[head]], range(4), extra=unit(queue)) for head in range(3)]
    assert_same(loss(a, b, extra=[queue]), sum(heads) / 3, a, b, queue, *loss.parameters())
    one_head = loss(a[:1], b[:1])
    torch.testing.assert_close(loss(a[0], b[0]), one_head)
    torch.testing.assert_close(loss(a[:1].expand(3, 4, 3), b[:1].expand(3, 4, 3)), one_head)


@pytest.mark.parametrize("seed", range(5))
def test_the_printed_form_bounds_decoupled_nt_xent_from_below_within_log_n(seed):
    a, b = random(5, 3, seed=seed), random(5, 3, seed=seed + 10)
    settings = {"network": "constant", "temperature": 0.2, "regulariser_weight": 0.0}
    nearest, every = (amcl(form=form, **settings)(a, b, reduction="none") for form in ("max", "logsumexp"))
    assert (nearest <= every).all()
    assert (every <= nearest + math.log(8)).all()
    z = unit(torch.cat([a, b]))
    s = z @ z.T / 0.2
    positive = s[range(10), torch.arange(10).roll(5)]
    negative = s.masked_fill(torch.eye(10, dtype=torch.bool) | torch.eye(10, dtype=torch.bool).roll(5, 0), -torch.inf)
    torch.testing.assert_close(every, negative.logsumexp(dim=1) - positive)
    torch.testing.assert_close(nearest, negative.amax(dim=1) - positive)


def test_the_smooth_form_of_k_equal_negatives_is_the_printed_one_and_log_k():
    loss, printed = (amcl(form=form, network="mlp") for form in ("logsumexp", "max"))
    a, b, other = random(1, 3), random(1, 3, seed=1), random(1, 3, seed=2)
    for k in (1, 4):
        given = {"targets": (None, b), "extra": [other.expand(k, 3)]}
        torch.testing.assert_close(loss(a, **given), printed(a, **given) + math.log(k))


def test_the_regulariser_is_smallest_at_two_over_the_dimensions():
    for dim in (3, 64, 128):
        tau = torch.tensor(2 / dim, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(omega(tau, dim), tau)
        assert abs(slope) < 1e-10
        assert omega(tau, dim) < min(omega(tau * 0.9, dim), omega(tau * 1.1, dim))
        torch.testing.assert_close(omega(tau, dim), dim / 2 * torch.log(tau) + 1 / tau)


@pytest.mark.parametrize(("start", "sign"), [(0.3, 1), (1.2, -1)])
def test_the_regulariser_attracts_temperatures_of_positives_to_its_minimum_and_repels_those_of_negatives(start, sign):
    """With D = 4 the minimum is at 1/2. Similarities are 0, so that only the regulariser has a gradient."""
    a, b = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]]), torch.tensor([[0.0, 0, 1, 0], [0, 0, 0, 1]])
    loss = AMCL(4, network="inner_product", temperature=start, lowest_temperature=LOW, highest_temperature=HIGH)
    for weight in (loss.temperatures.anchor_weight, loss.temperatures.candidate_weight):
        torch.nn.init.zeros_(weight)
    tau = loss.temperatures.shared(a)
    pairs = loss.pairs(a, b)[0]
    (attract,) = torch.autograd.grad(-module.mean_score(pairs, tau, 1.0).sum(), loss.temperatures.bias)
    tau = loss.temperatures.shared(a)
    nearest = module.nearest_score(pairs, loss.over, module.Score(tau, 1.0, 4))
    (repel,) = torch.autograd.grad(nearest.sum(), loss.temperatures.bias)
    assert -attract * sign > 0  # down the gradient, towards 1/2
    assert -repel * sign < 0


@pytest.mark.parametrize("network", ["mlp", "inner_product"])
@pytest.mark.parametrize("bounds", [(1e-5, 2.0), (0.05, 0.5), (0.5, 0.50001)])
@pytest.mark.parametrize("size", [0.0, 1.0, 1e6, -1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_temperatures_stay_strictly_between_their_bounds(network, bounds, size, dtype):
    temperatures = PairTemperature(4, network, 6, *bounds, sum(bounds) / 2, 0).to(dtype)
    torch.nn.init.constant_(temperatures.bias, size)
    a, b = random(5, 4).detach().to(dtype) * abs(size), random(6, 4, seed=1).detach().to(dtype)
    index = torch.arange(6)
    tile = temperatures.shared(a)(Embeddings(a, index[:5], index[:5], index[:5]), Embeddings(b, index, index, index))
    assert tile.shape == (5, 6)
    assert (tile.double() > torch.tensor(bounds[0], dtype=dtype).double()).all()
    assert (tile.double() < torch.tensor(bounds[1], dtype=dtype).double()).all()


def test_the_temperature_of_a_pair_is_not_symmetric():
    temperatures = PairTemperature(3, "mlp", 6, LOW, HIGH, 0.5, 0).double()
    index = torch.zeros(2, dtype=torch.int64)
    a, b = (Embeddings(random(2, 3, seed=seed), index, index, index) for seed in (0, 1))
    assert (temperatures(a, b) - temperatures(b, a).mT).abs().min() > 1e-6


@pytest.mark.parametrize("heads", [(), (2,)])
@pytest.mark.parametrize("piece", [1, 13, 2**20])
def test_the_network_computes_a_tile_in_pieces_of_any_size(monkeypatch, heads, piece):
    monkeypatch.setattr(module, "CACHED_PAIRS", piece)
    a, b, w = random(*heads, 4, 7), random(5, 7, seed=1), random(7, seed=2)
    expected = (a.unsqueeze(-2) + b).relu() @ w
    assert_same(module._Perceptron.apply(a, b, w).sin().sum(), expected.sin().sum(), a, b, w)
    assert torch.autograd.gradcheck(module._Perceptron.apply, (a, b, w))


def test_the_row_by_row_score_is_the_diagonal_of_a_tile():
    for network in ("mlp", "inner_product", "constant"):
        score = module.Score(PairTemperature(3, network, 6, LOW, HIGH, 0.5, 0), 0.3, 3).double()
        a, b = random(2, 4, 3).detach(), random(2, 4, 3, seed=1).detach()
        index = torch.zeros(4, dtype=torch.int64)
        tile = score(Embeddings(a, index, index, index), Embeddings(b, index, index, index))
        torch.testing.assert_close(score.row_by_row(a, b), tile.diagonal(dim1=-2, dim2=-1))


def test_temperatures_start_equal_on_all_pairs_and_close_to_the_argument():
    torch.manual_seed(0)
    first = AMCL(16, temperature=0.3)
    torch.manual_seed(1)
    second = AMCL(16, temperature=0.3)
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(AMCL(16, seed=1).temperatures.anchor_weight, first.temperatures.anchor_weight)
    a, b = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0))
    first(a, b)
    assert first.metrics["positive_temperature"] == pytest.approx(0.3, abs=0.1)
    assert first.metrics["negative_temperature"] == pytest.approx(0.3, abs=0.1)


def test_the_metrics_contain_the_mean_temperatures():
    loss, (a, b) = amcl(), (random(3, 3), random(3, 3, seed=1))
    loss(a, b)
    z, positive, negative = unit(torch.cat([a, b])), [], []
    for i in range(6):
        for j in range(6):
            if i != j:
                (positive if i % 3 == j % 3 else negative).append(temperature(loss, z[i], z[j]).item())
    assert float(loss.metrics["positive_temperature"]) == pytest.approx(sum(positive) / len(positive), rel=1e-9)
    assert float(loss.metrics["negative_temperature"]) == pytest.approx(sum(negative) / len(negative), rel=1e-9)


@pytest.mark.parametrize("form", ["max", "logsumexp"])
@pytest.mark.parametrize("bounds", [(0.01, 10.0), (1e-5, 2.0)])
def test_temperatures_at_their_bounds_are_finite(form, bounds):
    for bias in (-1e4, 1e4):
        loss = AMCL(4, form=form, lowest_temperature=bounds[0], highest_temperature=bounds[1], hidden=3)
        torch.nn.init.constant_(loss.temperatures.bias, bias)
        a, b = random(5, 4).detach().half().requires_grad_(), random(5, 4, seed=1).detach().half()
        value = loss(a, b)
        gradients = torch.autograd.grad(value, [a, *loss.parameters()])
        assert all(torch.isfinite(x).all() for x in (value, *gradients))


def test_an_anchor_without_negatives_is_left_out():
    loss = amcl()
    a, b = random(1, 3), random(1, 3, seed=1)
    assert loss(a, b) == 0
    for form in ("max", "logsumexp"):
        loss = amcl(form=form)
        (pairs,) = loss.pairs(a, b)
        attract = module.mean_score(pairs, loss.temperatures.shared(pairs.anchor.z), BETA)
        torch.testing.assert_close(loss.rows(pairs), -attract)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": None}, "network='mlp' needs the embeddings' width, for example dim=128"),
        ({"dim": 0}, "dim and hidden must be 1 or more; got 0 and 128"),
        ({"hidden": 0}, "dim and hidden must be 1 or more; got 4 and 0"),
        ({"lowest_temperature": 0.0}, "0 < lowest_temperature < highest_temperature; got 0.0 and 2.0"),
        ({"lowest_temperature": 3.0}, "got 3.0 and 2.0"),
        ({"temperature": 2.5}, "temperature must be between its bounds, 0.05 and 2.0; got 2.5"),
        ({"regulariser_weight": -1.0}, "regulariser_weight must be a number of 0 or more; got -1.0"),
        ({"regulariser_weight": math.nan}, "regulariser_weight must be a number of 0 or more"),
        ({"form": "mean"}, "form is 'max' or 'logsumexp'; got 'mean'"),
        ({"network": "linear"}, "network is 'mlp', 'inner_product' or 'constant'; got 'linear'"),
    ],
)
def test_wrong_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        AMCL(**{"dim": 4, **arguments})


def test_embeddings_of_another_width_raise():
    with pytest.raises(ValueError, match=r"made for embeddings of dim=4; these have 3"):
        AMCL(4)(torch.ones(2, 3), torch.ones(2, 3))


def test_it_can_be_built_by_name():
    assert LOSSES.build({"name": "amcl", "form": "logsumexp"}, dim=8).temperatures.dim == 8
    with pytest.raises(ValueError, match="is called 'amcl' here"):
        LOSSES["adaptive_multi_head"]


def test_heads_without_samples_have_a_loss_of_zero():
    empty = torch.zeros(3, 0, 4, requires_grad=True)
    value = AMCL(dim=4)(empty, empty)
    assert value == 0
    value.backward()
