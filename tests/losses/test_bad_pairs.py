"""BadPairs: its loss history and weights against a dictionary of lists, and the loss that it wraps, bit for bit."""

import copy
import io
import math
import statistics as plain

import pytest
import torch
from torch import nn

import contrast
from contrast.losses import CACR, LOSSES, InfoNCE, NegativeCosine
from contrast.losses.bad_pairs import BadPairs
from tests.losses.reference import random

SAMPLES = 6


def bad_pairs(loss=None, **arguments):
    settings = {"samples": SAMPLES, "warmup_epochs": 0, "noisy_width": 0.8, "faulty_width": 0.9}
    return BadPairs(loss or InfoNCE(0.3), **{**settings, **arguments})


def batch(seed, index, width=3):
    return random(len(index), width, seed=seed), random(len(index), width, seed=seed + 500), torch.tensor(index)


def epochs(criterion, count, *, first=0, step=None):
    """Train for some epochs of two batches each; return the inputs and results of every call."""
    calls = []
    for epoch in range(first, first + count):
        for part, index in enumerate(([0, 1, 2, 3], [4, 5])):
            a, b, sample = batch(10 * epoch + part, index)
            value = criterion(a, b, sample=sample)
            calls.append((epoch, a, b, sample, value, torch.autograd.grad(value, [a, b])))
            if step:
                step(criterion)
        criterion.end_epoch()
    return calls


class Dictionary:
    """The method as the authors describe it: sample -> list of its losses, read at the start of an epoch."""

    def __init__(self, inner, *, published, epochs=None, noisy_width=0.8, faulty_width=0.9, peak_one=False):
        self.inner, self.published, self.epochs, self.peak_one = inner, published, epochs, peak_one
        self.noisy_width, self.faulty_width = noisy_width, faulty_width
        self.losses = {}

    def start(self, epoch):
        """Find the bad samples from all epochs before this one."""
        self.mean = {}
        for sample, history in self.losses.items():
            past = [(e, value) for e, value in history if e < epoch]
            if past:
                weigh = (lambda e: (1 + e) / self.epochs) if self.published else (lambda e: 1)
                self.mean[sample] = sum(value * weigh(e) for e, value in past) / len(past)
        self.noisy, self.faulty = set(), set()
        if len(self.mean) > 1:
            self.mu, self.sigma = plain.fmean(self.mean.values()), plain.pstdev(self.mean.values())
            low, high = self.mu - self.noisy_width * self.sigma, self.mu + self.faulty_width * self.sigma
            self.noisy = {s for s, m in self.mean.items() if (m <= low if self.published else m < low)}
            self.faulty = {s for s, m in self.mean.items() if (m >= high if self.published else m > high)}

    def __call__(self, epoch, a, b, sample):
        rows = self.inner(a, b, reduction="none").view(2, len(a)).mean(dim=0)
        total = 0
        for row, index in zip(rows, sample.tolist(), strict=True):
            value = row.item()
            self.losses.setdefault(index, []).append((epoch, value))
            weight = 1.0
            if index in self.noisy | self.faulty:
                weight = math.exp(-((value - self.mu) ** 2) / (2 * self.sigma**2))
                weight /= 1 if self.peak_one else self.sigma * math.sqrt(2 * math.pi)
            total = total + weight * row
        return total / len(rows)


@pytest.mark.parametrize("statistics", ["paper", "published_code"])
@pytest.mark.parametrize("weight", ["density", "peak_one"])
def test_four_epochs_equal_a_dictionary_of_lists(statistics, weight):
    length = 8 if statistics == "published_code" else None
    criterion = bad_pairs(statistics=statistics, weight=weight, epochs=length)
    expected = Dictionary(
        InfoNCE(0.3), published=statistics == "published_code", epochs=length, peak_one=weight == "peak_one"
    )
    flagged, started = 0, -1
    for epoch, a, b, sample, value, gradients in epochs(criterion, 4):
        if epoch != started:
            expected.start(epoch)
            flagged, started = flagged + len(expected.noisy) + len(expected.faulty), epoch
        theirs = expected(epoch, a, b, sample)
        torch.testing.assert_close(value, theirs, rtol=1e-5, atol=1e-9)
        for one, other in zip(gradients, torch.autograd.grad(theirs, [a, b]), strict=True):
            torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-9)
    expected.start(4)
    assert flagged > 2
    assert set(criterion.noisy.nonzero().flatten().tolist()) == expected.noisy
    assert set(criterion.faulty.nonzero().flatten().tolist()) == expected.faulty
    history = torch.tensor([expected.mean[sample] for sample in range(SAMPLES)])
    torch.testing.assert_close(criterion.history, history, rtol=1e-6, atol=1e-7)
    assert float(criterion.center) == pytest.approx(expected.mu, rel=1e-6)
    assert float(criterion.spread) == pytest.approx(expected.sigma, rel=1e-5)


@pytest.mark.parametrize("arguments", [{"noisy_width": math.inf, "faulty_width": math.inf}, {"warmup_epochs": 3}])
def test_without_bad_pairs_and_in_the_warm_up_it_is_the_inner_loss_bit_for_bit(arguments):
    criterion = bad_pairs(**arguments)
    for _, a, b, sample, value, gradients in epochs(criterion, 3):
        inner = InfoNCE(0.3)(a, b, sample=sample)
        assert torch.equal(value, inner)
        for one, other in zip(gradients, torch.autograd.grad(inner, [a, b]), strict=True):
            assert torch.equal(one, other)
    assert criterion.metrics["weight"] == 1


def test_the_warm_up_ends_after_its_epochs():
    for warmup_epochs, first in ((0, 1), (2, 2)):  # epoch 0 has no history
        calls = epochs(bad_pairs(warmup_epochs=warmup_epochs), 4)
        weighted = [epoch for epoch, a, b, _, value, _ in calls if not torch.equal(value, InfoNCE(0.3)(a, b))]
        assert min(weighted) == first


def stored(criterion):
    criterion.update()
    return criterion.epoch_sums + criterion.sums, criterion.epoch_counts + criterion.counts


def test_the_order_of_a_batch_does_not_change_the_loss_history():
    first, second = bad_pairs(), bad_pairs()
    a, b, sample = batch(0, [5, 0, 3, 2])
    order = torch.tensor([2, 0, 3, 1])
    first(a, b, sample=sample)
    second(a[order], b[order], sample=sample[order])
    for one, other in zip(stored(first), stored(second), strict=True):
        assert (one - other).abs().max() <= 1  # one unit of rounding, for a sum in another order
    assert first.epoch_counts.tolist() == [1, 0, 1, 1, 0, 1]


def test_a_sample_twice_in_a_batch_is_stored_twice():
    criterion = bad_pairs()
    a, b, sample = batch(0, [4, 4, 1])
    rows = InfoNCE(0.3)(a, b, sample=sample, reduction="none").view(2, 3).mean(dim=0)
    criterion(a, b, sample=sample)
    criterion.end_epoch()
    assert criterion.counts.tolist() == [0, 1, 0, 0, 2, 0]
    torch.testing.assert_close(criterion.history[4].double(), (rows[0] + rows[1]) / 2, rtol=1e-6, atol=0)
    assert torch.isnan(criterion.history[0])


def filled(means, **arguments):
    """Return a criterion whose samples have these mean losses."""
    criterion = bad_pairs(samples=len(means), **arguments)
    criterion.epoch_sums += (torch.tensor(means, dtype=torch.float64) * 2**24).round().long()
    criterion.epoch_counts += 1
    criterion.end_epoch()
    return criterion


def test_samples_five_deviations_off_are_noisy_and_faulty():
    normal = [2.0 + 0.01 * (-1) ** i for i in range(200)]
    criterion = filled([*normal, 1.0, 3.0], noisy_width=2.0, faulty_width=3.0)
    assert criterion.noisy.nonzero().flatten().tolist() == [200]
    assert criterion.faulty.nonzero().flatten().tolist() == [201]
    assert criterion.noisy.dtype == criterion.faulty.dtype == torch.bool
    assert criterion.noisy.shape == (202,)


def test_the_gradient_of_a_bad_sample_is_its_weight_times_the_inner_gradient():
    means = [1.5, 1.5, 1.5, 1.5, 1.5, 2.5]
    criterion = filled(means, loss=NegativeCosine(), faulty_width=1.0, noisy_width=9.0)
    mu, sigma = plain.fmean(means), plain.pstdev(means)
    a, b, sample = batch(0, [0, 5, 2])
    targets = (random(3, 3, seed=7).detach(), random(3, 3, seed=8).detach())
    rows = NegativeCosine()(a, b, targets=targets, reduction="none")
    value = rows.view(2, 3).mean(dim=0)[1].item()
    weight = math.exp(-((value - mu) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    (found,) = torch.autograd.grad(criterion(a, b, targets=targets, sample=sample), a)
    (inner,) = torch.autograd.grad(NegativeCosine()(a, b, targets=targets), a)
    torch.testing.assert_close(found, inner * torch.tensor([[1], [weight], [1]]), rtol=1e-5, atol=1e-12)
    assert float(criterion.metrics["faulty"]) == pytest.approx(1 / 3)
    assert criterion.metrics["noisy"] == 0
    assert float(criterion.metrics["weight"]) == pytest.approx((2 + weight) / 3, rel=1e-5)


@pytest.mark.parametrize("statistics", ["paper", "published_code"])
@pytest.mark.parametrize("value", [0.0, 0.1, 3.3, -7.7, 1e4])
def test_equal_histories_flag_no_sample(statistics, value):
    criterion = filled([value] * 7, statistics=statistics, epochs=3, noisy_width=1e-6, faulty_width=1e-6)
    for _ in range(2):
        criterion.epoch_sums[:5] += round(value * 2**24)
        criterion.epoch_counts[:5] += 1
        if statistics == "paper":
            criterion.end_epoch()
    assert not (criterion.noisy | criterion.faulty).any()
    a, b, _ = batch(0, [0, 1, 2])
    assert torch.equal(criterion(a, b, sample=torch.arange(3)), InfoNCE(0.3)(a, b))


def test_the_density_may_exceed_one_and_the_peak_may_not():
    means = [1.0, 1.0, 1.0, 1.0, 1.0, 1.3]
    a, b, sample = batch(0, [5])
    for weight, expected in (("density", 1 / (plain.pstdev(means) * math.sqrt(2 * math.pi))), ("peak_one", 1.0)):
        criterion = filled(means, weight=weight, faulty_width=1.0, noisy_width=9.0)
        criterion.center.zero_()  # the loss of a single sample
        criterion(a, b, sample=sample)
        assert float(criterion.metrics["weight"]) == pytest.approx(expected, rel=1e-5)


def test_only_a_call_in_training_is_stored():
    criterion = bad_pairs()
    a, b, sample = batch(0, [0, 1])
    with contrast.local():
        criterion(a, b, sample=sample)
    with torch.no_grad():
        criterion(a, b, sample=sample)
    criterion.eval()
    criterion(a, b, sample=sample)
    assert not stored(criterion)[1].any()
    criterion.train()
    criterion(a, b, sample=sample)
    assert not criterion.epoch_counts.any()
    criterion.eval()
    criterion(a, b, sample=sample)
    assert not criterion.epoch_counts.any()
    criterion.train()
    criterion(a, b, sample=sample)
    assert criterion.epoch_counts.sum() == 2
    criterion.update()
    criterion.update()
    assert criterion.epoch_counts.tolist() == [2, 2, 0, 0, 0, 0]


def test_within_an_epoch_the_weights_do_not_move():
    criterion = bad_pairs()
    epochs(criterion, 2)
    a, b, sample = batch(77, [0, 1, 2, 3, 4, 5])
    values = [criterion(a, b, sample=sample) for _ in range(4)]
    assert all(torch.equal(value, values[0]) for value in values)
    assert not torch.equal(values[0], InfoNCE(0.3)(a, b))


def test_a_checkpoint_contains_the_complete_loss_history():
    uninterrupted = epochs(bad_pairs(), 4, step=BadPairs.update)
    criterion = bad_pairs()
    epochs(criterion, 2, step=BadPairs.update)
    a, b, sample = batch(20, [0, 1, 2, 3])
    criterion(a, b, sample=sample)
    criterion.update()
    file = io.BytesIO()
    torch.save(criterion.state_dict(), file)
    file.seek(0)
    resumed = bad_pairs()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    a, b, sample = batch(21, [4, 5])
    assert torch.equal(resumed(a, b, sample=sample), uninterrupted[5][4])
    resumed.end_epoch()
    for one, other in zip(epochs(resumed, 1, first=3), uninterrupted[6:], strict=True):
        assert torch.equal(one[4], other[4])
    assert resumed.epoch == 4


def test_a_cast_of_the_module_does_not_change_the_loss_history():
    criterion = bad_pairs()
    epochs(criterion, 2)
    cast = copy.deepcopy(criterion).bfloat16()
    assert torch.equal(cast.history, criterion.history)
    assert torch.equal(cast.noisy, criterion.noisy)


def test_invalid_rows_are_not_stored():
    """The only target is view 1's, so view 1's anchors have no positive, and a sample's loss is that of view 0."""
    criterion = bad_pairs()
    a, b, sample = batch(0, [3, 1])
    targets = (None, random(2, 3, seed=5))
    criterion(a, b, targets=targets, sample=sample)
    criterion.end_epoch()
    rows = InfoNCE(0.3)(a, b, targets=targets, reduction="none")[:2]
    torch.testing.assert_close(criterion.history[[3, 1]], rows.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss", [InfoNCE(0.2, candidates="across"), CACR(), InfoNCE(positives="alone")], ids=str)
@pytest.mark.parametrize("targets", [False, True])
def test_any_loss_with_a_value_per_anchor_can_be_weighted(loss, targets):
    criterion = bad_pairs(loss)
    given = {"targets": tuple(random(3, 6, 3, seed=9))} if targets else {}
    sample = torch.arange(6)
    views = list(random(3, 6, 3))
    for _ in range(2):
        found = criterion(*views, sample=sample, reduction="none", **given)
        criterion.end_epoch()
    rows = loss(*views, reduction="none", **given)
    assert found.shape == rows.shape
    per_sample = rows.view(-1, 6).mean(dim=0)
    torch.testing.assert_close(criterion.history.double(), per_sample.detach(), rtol=1e-6, atol=1e-7)
    ratio = (found / rows).view(-1, 6)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    bad = criterion.noisy | criterion.faulty
    assert bad.any() and (ratio[0, ~bad] == 1).all() and (ratio[0, bad] != 1).all()


def test_the_needs_and_parameters_are_those_of_the_inner_loss():
    inner = InfoNCE(0.2, learn_temperature=True)
    criterion = bad_pairs(inner)
    assert [id(p) for p in criterion.parameters()] == [id(inner.log_scale)]
    assert not NegativeCosine().needs_negative and not bad_pairs(NegativeCosine()).needs_negative
    a, b, sample = batch(0, [0, 1])
    criterion(a, b, sample=sample)
    assert {"temperature", "anchors", "noisy", "faulty", "weight"} <= set(criterion.metrics)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": nn.Identity()}, "BadPairs weighs the values per anchor of a PairLoss; Identity has none"),
        ({"samples": 0}, "samples must be 1 or more, the size of the data set; got 0"),
        ({"warmup_epochs": -1}, "warmup_epochs must be 0 or more; got -1"),
        ({"noisy_width": 0.0}, "noisy_width must be a positive number, or inf; got 0.0"),
        ({"faulty_width": math.nan}, "faulty_width must be a positive number, or inf; got nan"),
        ({"statistics": "code"}, "statistics is 'paper' or 'published_code'; got 'code'"),
        ({"weight": "pdf"}, "weight is 'density' or 'peak_one'; got 'pdf'"),
        ({"statistics": "published_code"}, "needs epochs, the length of the training; got None"),
    ],
)
def test_wrong_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        bad_pairs(**arguments)


def test_wrong_samples_raise():
    a, b, _ = batch(0, [0, 1])
    with pytest.raises(ValueError, match=r"call loss\(z_a, z_b, sample=index\)"):
        bad_pairs()(a, b)
    for index in ([0, 6], [-1, 0]):
        with pytest.raises(ValueError, match=r"must be in \[0, 6\), since samples=6; got"):
            bad_pairs()(a, b, sample=torch.tensor(index))
    with pytest.raises(ValueError, match="sample must be a tensor of"):
        bad_pairs()(a, b, sample=torch.arange(3))


def test_aliases_name_it():
    with pytest.raises(ValueError, match="the loss 'dbpm' is called 'bad_pairs' here"):
        LOSSES["dbpm"]


def train_on_part(rank, world, sizes):
    """Train three epochs on one process's part of every batch; return values, gradients and the state."""
    criterion = BadPairs(InfoNCE(0.3), samples=9, warmup_epochs=0, noisy_width=0.8, faulty_width=0.9)
    values = []
    for epoch in range(3):
        a, b, sample = batch(epoch, [8, 1, 2, 3, 4, 1, 0])
        a, b = a.detach().requires_grad_(), b.detach()
        rows = slice(None)
        if rank is not None:
            rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        value = criterion(a[rows], b[rows], sample=sample[rows])
        value.backward()
        if rank is not None:
            torch.distributed.all_reduce(a.grad)
            a.grad /= world
        values.append((value.detach(), a.grad))
        with contrast.local():
            criterion(a, b, sample=sample)
        criterion.end_epoch()
    return values, dict(criterion.state_dict())


@pytest.mark.parametrize("sizes", [(4, 3, 0, 0), (5, 2, 0, 0), (7, 0, 0, 0)])
def test_processes_have_the_same_state_and_equal_one_process(processes, sizes):
    sizes = sizes[: processes.world]
    values, expected = train_on_part(None, 1, sizes)
    answers = processes.run(train_on_part, sizes)
    for found, state in answers:
        for (value, gradient), (one, its_gradient) in zip(found, values, strict=True):
            torch.testing.assert_close(value, one, rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(gradient, its_gradient, rtol=1e-6, atol=1e-9)
        for key, entry in state.items():
            assert torch.equal(entry, answers[0][1][key])
            units = 3 if key in ("sums", "epoch_sums") else 1e-7  # rounding of a sum in another order
            torch.testing.assert_close(entry.double(), expected[key].double(), rtol=1e-6, atol=units)
    assert expected["counts"].tolist() == [3, 6, 3, 3, 3, 0, 0, 0, 3]
    assert expected["kind"].any()
