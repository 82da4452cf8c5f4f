"""What training calls of a loss: defaults, wrappers, plain modules, and the findings of bad-pair mining."""

import io

import pytest
import torch
from torch import Tensor, nn

from contrast.core.embeddings import Embeddings
from contrast.losses import LOSSES, BadPairs, FalseNegatives, InfoNCE, Loss, ModuleLoss, PairLoss, as_loss
from contrast.losses.inputs import Source, UpdatedSource
from contrast.losses.wrapper import LossWrapper
from contrast.memory import Queue

NAMES = ["a", "b", "c", "d", "e", "f"]


class Distance(nn.Module):
    def forward(self, z_a, z_b, sample=None):
        self.sample = sample
        return (z_a - z_b).square().sum(dim=1).mean()


class Recording(InfoNCE):
    """A loss that notes which parts of the protocol are called."""

    normalise = False
    reference_of = "view"

    def __init__(self):
        super().__init__()
        self.calls = []

    def update(self):
        self.calls.append("update")

    def end_epoch(self):
        self.calls.append("end_epoch")

    def findings(self, names):
        return {"Recorded": [{"sample": 1, "name": names[1]}]}


def test_every_registered_loss_follows_the_protocol():
    assert all(issubclass(loss, Loss) for loss in LOSSES.values())
    assert {name for name, loss in LOSSES.items() if not loss.takes_extra} == {"amcl_barlow"}


def test_a_loss_needs_only_forward():
    class Sum(Loss):
        def forward(self, *views, **_):
            return sum(z.sum() for z in views)

    loss = Sum()
    assert loss.update() is None
    assert loss.end_epoch() is None
    assert (loss.metrics, loss.findings(NAMES), loss.false_negative_rates(torch.zeros(3))) == ({}, {}, {})
    assert (loss.takes_extra, loss.normalise, loss.reference_of) == (False, True, "sample")
    assert as_loss(loss) is loss
    with pytest.raises(NotImplementedError, match=r"Loss must define forward\(\*views, ...\)"):
        Loss()(torch.ones(2, 3))


@pytest.mark.parametrize(
    "wrap",
    [LossWrapper, lambda loss: BadPairs(loss, 6), lambda loss: FalseNegatives(BadPairs(loss, 6), top=1)],
    ids=["wrapper", "bad_pairs", "false_negatives"],
)
def test_a_wrapper_delegates_the_protocol(wrap):
    inner = Recording()
    loss = wrap(inner)
    loss.update()
    loss.end_epoch()
    assert {"update", "end_epoch"} == set(inner.calls)
    assert loss.findings(NAMES)["Recorded"] == [{"sample": 1, "name": "b"}]
    assert (loss.normalise, loss.reference_of, loss.takes_extra) == (False, "view", True)


def test_a_plain_module_gets_the_arguments_that_it_accepts():
    module, sample = Distance(), torch.arange(4)
    loss, (z_a, z_b) = as_loss(module), torch.randn(2, 4, 3)
    value = loss(z_a, z_b, targets=None, sample=sample, group=sample, reference=None, extra=[])
    assert value == module(z_a, z_b)
    loss(z_a, z_b, sample=sample, group=sample)
    assert module.sample is sample
    assert not loss.takes_extra


def test_a_plain_module_with_keyword_arguments_gets_all():
    class All(nn.Module):
        def forward(self, *views, **arguments):
            self.arguments = arguments
            return views[0].sum()

    module = All()
    loss = as_loss(module)
    loss(torch.ones(2, 3), targets=None, extra=[torch.ones(1, 3)])
    assert module.arguments.keys() == {"targets", "extra"}
    assert loss.takes_extra


def test_a_plain_module_trains_its_parameters_and_has_a_state():
    loss = as_loss(nn.Linear(3, 1))
    assert set(loss.state_dict()) == {"module.weight", "module.bias"}


@pytest.mark.parametrize(
    ("argument", "value"),
    [("targets", [torch.ones(2, 3)] * 2), ("reference", torch.ones(2, 3)), ("extra", [torch.ones(2, 3)])],
)
def test_what_a_plain_module_does_not_accept_is_not_dropped(argument, value):
    with pytest.raises(ValueError, match=f"Distance got {argument}, which its forward does not accept"):
        as_loss(Distance())(torch.ones(2, 3), torch.ones(2, 3), **{argument: value})


def test_what_is_no_loss_is_refused():
    class Partial(Distance):
        def end_epoch(self):
            pass

    with pytest.raises(TypeError, match=r"Partial defines end_epoch, .* derive Partial from it"):
        as_loss(Partial())
    with pytest.raises(TypeError, match=r"a loss is a torch\.nn\.Module; got function"):
        as_loss(lambda *z: z)


def test_the_backward_pass_refuses_only_sources_that_count_their_updates():
    class Fixed:
        def candidates(self, anchor: Embeddings) -> Embeddings:
            return anchor[:1].detach()

    queue = Queue(4, dim=3)
    assert isinstance(Fixed(), Source) and not isinstance(Fixed(), UpdatedSource)
    assert isinstance(queue, UpdatedSource)
    z_a, z_b = torch.randn(2, 4, 3, requires_grad=True).unbind()
    sample = torch.arange(4)
    loss = InfoNCE()
    loss(z_a, z_b, sample=sample, extra=[Fixed()]).backward()
    value = loss(z_a, z_b, sample=sample, extra=[Fixed(), queue])
    queue.update(z_b.detach(), sample=sample)
    with pytest.raises(RuntimeError, match="updated"):
        value.backward()


class ByNumber(PairLoss):
    """Each row's loss is read from a table by sample, so that the statistics are known."""

    table = torch.tensor([0.0, 5.0, 5.0, 5.0, 5.0, 13.0])

    def per_anchor(self, pairs) -> Tensor:
        return self.table[pairs.anchor.sample] + 0 * pairs.mean("positive")


def mined(epochs, samples=6, first=0):
    """Bad-pair mining after some epochs: mean 5.5, deviation 3.8, so that 0 is noisy and 13 is faulty."""
    loss = BadPairs(ByNumber(), samples, warmup_epochs=2, noisy_width=1.0, faulty_width=1.5)
    for _ in range(epochs):
        loss(*torch.randn(2, 6, 3, requires_grad=True).unbind(), sample=torch.arange(6))
        loss.end_epoch()
    return loss


def test_bad_pair_mining_reports_shares_by_epoch_and_the_furthest_samples():
    found = mined(3, samples=8).findings([*NAMES, "unseen", "unseen"])
    assert list(found) == [
        "Samples flagged by epoch",
        "Noisy pairs: mean loss far below the others'",
        "Faulty pairs: mean loss far above the others'",
    ]
    epochs, noisy, faulty = found.values()
    assert epochs == [
        {"epoch": epoch, "noisy": pytest.approx(1 / 6), "faulty": pytest.approx(1 / 6), "weights applied": applied}
        for epoch, applied in [(1, 0), (2, 1), (3, 1)]
    ]
    assert noisy == [{"sample": 0, "name": "a", "mean loss": 0.0}]
    assert faulty == [{"sample": 5, "name": "f", "mean loss": 13.0}]
    assert all(type(value) in (str, int, float) for rows in found.values() for row in rows for value in row.values())


def test_the_samples_furthest_from_the_mean_come_first():
    loss = BadPairs(InfoNCE(), 20, noisy_width=0.01, faulty_width=0.01)
    loss.counts += 1
    loss.sums += (torch.arange(20) + 1) * 2**24
    loss.end_epoch()
    _, noisy, faulty = loss.findings([str(sample) for sample in range(20)]).values()
    assert [row["sample"] for row in noisy] == [0, 1, 2, 3, 4, 5]
    assert [row["sample"] for row in faulty] == [19, 18, 17, 16, 15, 14]


def test_findings_survive_a_checkpoint():
    file = io.BytesIO()
    torch.save(mined(2).state_dict(), file)
    file.seek(0)
    resumed = mined(0)
    assert resumed.findings(NAMES) == {}
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.findings(NAMES) == mined(2).findings(NAMES)
    resumed(*torch.randn(2, 6, 3, requires_grad=True).unbind(), sample=torch.arange(6))
    resumed.end_epoch()
    assert resumed.findings(NAMES) == mined(3).findings(NAMES)


def test_module_loss_is_what_a_plain_module_becomes():
    assert isinstance(as_loss(Distance()), ModuleLoss)
