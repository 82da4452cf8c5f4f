"""A training step: its views, targets and candidates, and what it stores in memories."""

import pytest
import torch
from torch import nn

from contrast.core.embeddings import normalise
from contrast.data.dataset import Batch
from contrast.losses import CWCL, InfoNCE, Loss, NegativeCosine
from contrast.memory import Bank, HardNegatives, NearestPositives, Queue
from contrast.models import Encoder
from contrast.models.heads import mlp
from contrast.models.inputs import SeriesInputs
from contrast.train.step import Step
from contrast.views.recipes import series
from contrast.views.views import Views


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 6)

    def forward(self, x):
        return self.linear(x.flatten(1))


def encoder(**parts):
    torch.manual_seed(0)
    return Encoder(Flat(), mlp(6, out=4, batch_norm=False), inputs=SeriesInputs([0.5], [2.0]), width=6, **parts)


def views():
    return series()


def batch(rows=5, start=0):
    generator = torch.Generator().manual_seed(start)
    sample = torch.arange(start, start + rows)
    return Batch(torch.randn(rows, 1, 8, generator=generator), sample, sample % 2, sample)


def compute(step, number=0, rows=5):
    return step.compute(batch(rows, rows * number), torch.Generator().manual_seed(number))


def test_without_memory_a_step_is_the_loss_of_the_views():
    step = Step(encoder(), InfoNCE(), views())
    output = compute(step)
    out = step.encoder(output.views)
    torch.testing.assert_close(output.loss, InfoNCE()(*out.z))


def test_a_step_stores_the_last_view_without_gradient_and_its_samples():
    queue = Queue(8, dim=4)
    step = Step(encoder(), InfoNCE(), views(), [queue])
    output = compute(step)
    assert queue.filled == 0, "the backward pass is still to come"
    output.loss.backward()
    step.update_memories([output.keys])
    stored = queue.candidates(output.keys)
    torch.testing.assert_close(stored.z, normalise(step.encoder(output.views).z[-1]).detach())
    assert stored.sample.tolist() == [0, 1, 2, 3, 4]
    assert not stored.z.requires_grad


def test_a_step_with_a_twin_stores_the_momentum_keys():
    queue = Queue(8, dim=4)
    step = Step(encoder(momentum=0.9), InfoNCE(candidates="memory"), views(), [queue])
    output = compute(step)
    step.update_memories([output.keys])
    torch.testing.assert_close(queue.candidates(output.keys).z, normalise(step.encoder(output.views).targets[-1]))


def test_stored_embeddings_are_candidates_of_the_next_step():
    queue = Queue(8, dim=4)
    loss = InfoNCE()
    step = Step(encoder(), loss, views(), [queue])
    step.update_memories([compute(step, 0).keys])
    output = compute(step, 1)
    out = step.encoder(output.views)
    expected = InfoNCE()(*out.z, sample=batch(5, 5).sample, extra=[queue])
    torch.testing.assert_close(output.loss, expected)
    assert loss.metrics["negatives"] == 8 + 5


def test_neighbours_become_the_views_and_the_embeddings_their_targets():
    queue = Queue(8, dim=4)
    nearest = NearestPositives(queue)
    step = Step(encoder(predictor=mlp(4, out=4, batch_norm=False)), InfoNCE(candidates="across"), views(), [nearest])
    first = compute(step, 0)
    first.loss.backward()
    assert not queue.filled
    step.update_memories([first.keys])
    output = compute(step, 1)
    out = step.encoder(output.views)
    stored = queue.candidates(output.keys).z
    near = [stored[(normalise(key) @ stored.T).argmax(dim=1)] for key in out.targets]
    expected = InfoNCE(candidates="across")(*near, targets=out.z, sample=batch(5, 5).sample)
    torch.testing.assert_close(output.loss, expected)
    step.encoder.zero_grad()
    output.loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in step.encoder.parameters())


def test_a_bank_of_several_memories_is_updated_once_per_step():
    bank = Bank(20, dim=4)
    step = Step(encoder(), InfoNCE(), views(), [bank, HardNegatives(bank, 2), NearestPositives(bank)])
    step.update_memories([compute(step).keys])
    assert bank.updates == 1


def test_memories_of_the_sampler_are_no_candidates():
    bank, loss = Bank(20, dim=4), InfoNCE()
    step = Step(encoder(), loss, views(), sampler_memory=[bank])
    step.update_memories([compute(step, 0).keys])
    compute(step, 1)
    assert loss.metrics["negatives"] == 8
    assert (bank.age >= 0).sum() == 5


def test_a_loss_without_rows_trains_without_memories():
    output = compute(Step(encoder(predictor=mlp(4, out=4)), NegativeCosine(), views()))
    assert torch.isfinite(output.loss)


def test_the_frozen_features_reach_the_loss_and_the_queue():
    def reference(raw):
        return raw.flatten(1)[:, :3]

    queue = Queue(8, dim=4, reference_dim=3)
    step = Step(encoder(), CWCL(), views(), [queue], reference=reference)
    output = compute(step, 0)
    out = step.encoder(output.views)
    torch.testing.assert_close(output.loss, CWCL()(*out.z, reference=reference(batch().x)))
    step.update_memories([output.keys])
    torch.testing.assert_close(queue.candidates(output.keys).reference, normalise(reference(batch().x)))


def test_a_loss_with_references_per_view_gets_the_frozen_features_of_each_view():
    seen = []

    def reference(raw):
        seen.append(raw)
        return raw.flatten(1)

    given = {}

    class ReferenceOfViews(Loss):
        reference_of = "view"

        def forward(self, *z, reference, **_):
            given["reference"] = reference
            return z[0].sum()

    step = Step(encoder(), ReferenceOfViews(), Views(views().views), reference=reference)
    output = compute(step)
    assert len(given["reference"]) == 2
    for raw, view in zip(seen, output.views, strict=True):
        torch.testing.assert_close(step.encoder.prepare(raw), view, equal_nan=True)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(*given["reference"])


def test_the_frozen_network_has_no_gradient():
    network = nn.Linear(8, 3)
    step = Step(encoder(), CWCL(), views(), reference=lambda raw: network(raw.flatten(1)))
    compute(step).loss.backward()
    assert network.weight.grad is None


def test_a_loss_of_raw_embeddings_stores_raw_embeddings():
    class Raw(InfoNCE):
        normalise = False

    queue = Queue(8, dim=4)
    step = Step(encoder(), Raw(), views(), [queue])
    output = compute(step)
    step.update_memories([output.keys])
    torch.testing.assert_close(queue.candidates(output.keys).z, step.encoder(output.views).z[-1].detach())
