"""Several processes give what one gives on their samples in rank order: value, gradient, the loss's own parameters."""

from dataclasses import replace

import pytest
import torch

from tests.losses import shares
from tests.losses.cases import CASES, Case
from tests.losses.shares import Scene

every_loss = pytest.mark.parametrize("case", CASES, ids=str)
every_loss_of_rows = pytest.mark.parametrize("case", [case for case in CASES if case.rows], ids=str)

ASKED = [(), ("labels",), ("extra",), ("targets",), ("heads",), ("samples",), ("labels", "extra", "targets", "heads")]


def unequal(world):
    return (5, 3, 1, 4)[:world]


def with_an_empty_one(world):
    return (4, 0, 3, 0)[:world]


def assert_one_process_agrees(processes, scenes):
    answers = processes.run(shares.outcomes, scenes)
    for number, scene in enumerate(scenes):
        value, gradient, parameters = shares.outcome(scene)
        for answer in answers:
            found, its_gradient, its_parameters = answer[number]
            where = lambda text, scene=scene: f"{scene}: {text}"  # noqa: E731
            torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-13, msg=where)
            torch.testing.assert_close(its_gradient, gradient, rtol=1e-10, atol=1e-12, msg=where)
            torch.testing.assert_close(its_parameters, parameters, rtol=1e-10, atol=1e-12, msg=where)


@every_loss
def test_value_and_gradient_equal_one_process(processes, case):
    world = processes.world
    # Networks for each pair take longest; further sizes and views of theirs are left to four processes, and --all.
    few = case.name.startswith("amcl") and world == 2
    scenes = [
        Scene(case, sizes, views, frozenset(asked))
        for sizes in (unequal(world), with_an_empty_one(world), *([] if few else [(3,) * world]))
        for views in ((2,) if case.two_views or few else (2, 3))
        for asked in ASKED
        if (case.pairs or not {"extra", "targets"} & set(asked)) and (case.plain_extra or "extra" not in asked)
    ]
    assert_one_process_agrees(processes, scenes)


@every_loss
def test_inside_distributed_data_parallel_they_equal_one_process(processes, case):
    sizes, views = unequal(processes.world), 2 if case.two_views else 3
    scenes = [Scene(case, sizes, views, frozenset(["labels"]), wrap) for wrap in ("encoder", "both")]
    assert_one_process_agrees(processes, scenes)


@every_loss
def test_no_sample_anywhere_gives_zero(processes, case):
    scene = Scene(case, (0,) * processes.world)
    for ((value, gradient, _),) in processes.run(shares.outcomes, [scene]):
        assert value == 0
        assert not gradient.any()


@every_loss
def test_local_needs_nobody_else(processes, case):
    value, gradient = processes.run(shares.alone_on_one_process, case)[0]
    views, given = case.inputs(seed=0)
    expected = case.make()(*views, **given)
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, views[0])[0], rtol=1e-13, atol=1e-15)


@every_loss_of_rows
def test_rows_are_the_local_anchors_view_after_view(processes, case):
    scene = Scene(case, unequal(processes.world), 2, frozenset(["labels"]))
    answers = processes.run(shares.rows_of, scene)
    (whole, _), sizes = shares.rows_of(0, 1, replace(scene, sizes=(sum(scene.sizes),))), scene.sizes
    views = [
        torch.cat([rows.view(2, size)[view] for (rows, _), size in zip(answers, sizes, strict=True)]) for view in (0, 1)
    ]
    torch.testing.assert_close(torch.cat(views), whole, rtol=1e-11, atol=1e-13)
    for (rows, metrics), size in zip(answers, sizes, strict=True):
        assert len(rows) == 2 * size
        assert metrics["anchors"] in (size, 2 * size)


def test_going_back_inside_local_keeps_the_gradient(processes):
    scene = Scene(Case("info_nce", {"learn_temperature": True}), unequal(processes.world))
    _, gradient, _ = shares.outcome(scene)
    for found in processes.run(shares.backward_inside_local, scene):
        torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-12)
