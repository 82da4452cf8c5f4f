"""Several processes equal one process on their samples in rank order: value, gradient, the loss's own parameters."""

import pytest
import torch

from tests.losses import split_batches
from tests.losses.cases import CASES, Case
from tests.losses.split_batches import SplitBatch

every_loss = pytest.mark.parametrize("case", CASES, ids=str)
every_loss_of_rows = pytest.mark.parametrize("case", [case for case in CASES if case.rows], ids=str)

GIVEN = [(), ("labels",), ("extra",), ("targets",), ("heads",), ("samples",), ("labels", "extra", "targets", "heads")]


def unequal(world):
    return (5, 3, 1, 4)[:world]


def with_an_empty_process(world):
    return (4, 0, 3, 0)[:world]


def assert_one_process_agrees(processes, batches):
    answers = processes.run(split_batches.outcomes, batches)
    for number, batch in enumerate(batches):
        value, gradient, parameters = split_batches.outcome(batch)
        for answer in answers:
            found, its_gradient, its_parameters = answer[number]
            where = lambda text, batch=batch: f"{batch}: {text}"  # noqa: E731
            torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-13, msg=where)
            torch.testing.assert_close(its_gradient, gradient, rtol=1e-10, atol=1e-12, msg=where)
            torch.testing.assert_close(its_parameters, parameters, rtol=1e-10, atol=1e-12, msg=where)


@every_loss
def test_value_and_gradient_equal_one_process(processes, case):
    world = processes.world
    accepted = [
        frozenset(given)
        for given in GIVEN
        if (case.pairs or not {"extra", "targets"} & set(given)) and (case.plain_extra or "extra" not in given)
    ]
    batches = [
        SplitBatch(case, sizes, given=given)
        for sizes in (unequal(world), with_an_empty_process(world))
        for given in accepted
    ]
    for given in (accepted[0], accepted[-1]):
        batches.append(SplitBatch(case, (3,) * world, given=given))
        batches.append(SplitBatch(case, unequal(world), 2 if case.two_views else 3, given))
    assert_one_process_agrees(processes, batches)


@every_loss
def test_inside_distributed_data_parallel_they_equal_one_process(processes, case):
    sizes, views = unequal(processes.world), 2 if case.two_views else 3
    batches = [SplitBatch(case, sizes, views, frozenset(["labels"]), wrap) for wrap in ("encoder", "both")]
    assert_one_process_agrees(processes, batches)


@every_loss
def test_no_sample_anywhere_gives_zero(processes, case):
    batch = SplitBatch(case, (0,) * processes.world)
    for ((value, gradient, _),) in processes.run(split_batches.outcomes, [batch]):
        assert value == 0
        assert not gradient.any()


@every_loss
def test_local_communicates_with_no_process(processes, case):
    value, gradient = processes.run(split_batches.local_on_one_process, case)[0]
    views, given = case.inputs(seed=0)
    expected = case.make()(*views, **given)
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, views[0])[0], rtol=1e-13, atol=1e-15)


@every_loss_of_rows
def test_rows_are_the_local_anchors_view_after_view(processes, case):
    batch = SplitBatch(case, unequal(processes.world), 2, frozenset(["labels"]))
    answers = processes.run(split_batches.rows_of, batch)
    (expected, _), sizes = split_batches.rows_of(None, 1, batch), batch.sizes
    views = [
        torch.cat([rows.view(2, size)[view] for (rows, _), size in zip(answers, sizes, strict=True)]) for view in (0, 1)
    ]
    torch.testing.assert_close(torch.cat(views), expected, rtol=1e-11, atol=1e-13)
    for (rows, metrics), size in zip(answers, sizes, strict=True):
        assert len(rows) == 2 * size
        assert metrics["anchors"] in (size, 2 * size)


def test_a_backward_pass_inside_local_has_the_same_gradient(processes):
    batch = SplitBatch(Case("info_nce", {"learn_temperature": True}), unequal(processes.world))
    _, gradient, _ = split_batches.outcome(batch)
    for found in processes.run(split_batches.backward_inside_local, batch):
        torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-12)
