"""torch.compile of a training step: the same numbers, and the reductions are one operator of its graph."""

import operator

import pytest
import torch
from torch import nn

from contrast.losses import AMCL, FalseNegatives, InfoNCE
from contrast.memory import Queue
from tests.losses.cases import CASES, DIMS, Case

ONE_GRAPH = ["info_nce", "cacr", "decoupled", "hard_negative", "siglip", "cwcl"]


def step(case, compiled, backward_inside=False):
    """Return the loss and the gradients of one training step, and the graphs that were compiled."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch.manual_seed(0)
    encoder, loss = nn.Linear(3, DIMS).double(), case.make().double()
    views, given = case.inputs(samples=9)
    inputs = torch.randn(len(views), 9, 3, dtype=torch.float64)

    def run(inputs):
        value = loss(*encoder(inputs).unbind(), **given)
        if backward_inside:
            value.backward()
        return value

    value = (torch.compile(run, backend=backend) if compiled else run)(inputs)
    if not backward_inside:
        value.backward()
    gradients = [parameter.grad for parameter in (*encoder.parameters(), *loss.parameters())]
    torch._dynamo.reset()
    return value.detach(), gradients, graphs


FIRST = {case.name: case for case in reversed(CASES)}.values()
"""One form of each loss, since tracing takes seconds."""


def long_if(condition, case):
    return pytest.param(case, marks=pytest.mark.long if condition else ())


def assert_compiled_step_is_the_same(case, **options):
    value, gradients, _ = step(case, compiled=False, **options)
    found, its_gradients, graphs = step(case, compiled=True, **options)
    assert graphs
    torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(its_gradients, gradients, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "case", [long_if(case not in FIRST or case.name.startswith("amcl"), case) for case in CASES], ids=str
)
def test_a_compiled_loss_has_the_same_numbers(case):
    assert_compiled_step_is_the_same(case)


@pytest.mark.parametrize("case", [long_if(case.name != "info_nce", case) for case in FIRST], ids=str)
def test_a_step_compiled_with_its_backward_pass_has_the_same_numbers(case):
    assert_compiled_step_is_the_same(case, backward_inside=True)


@pytest.mark.parametrize("case", [Case(name) for name in ONE_GRAPH], ids=str)
def test_the_forward_pass_is_one_graph_with_the_reductions_as_one_operator(case):
    loss = case.make()
    views, given = case.inputs(samples=40)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compile(loss, backend=backend, fullgraph=True)(*views, **given)
    torch._dynamo.reset()
    (graph,) = graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert any("contrast.reduce" in name for name in called)
    assert len(called) < 150
    assert not any("mm" in name for name in called)


def test_references_may_be_missing_from_some_embeddings():
    a, b = torch.randn(2, 6, DIMS)
    queue = Queue(8, dim=DIMS, reference_dim=3)
    queue.update(b, sample=torch.arange(6), reference=torch.randn(6, 3))
    loss = InfoNCE()
    for given in ({"sample": torch.arange(6), "extra": [queue]}, {"reference": torch.ones(6, 3), "extra": [b]}):
        step = torch.compile(lambda a, b, given=given: loss(a, b, **given), backend="eager")
        torch.testing.assert_close(step(a, b), loss(a, b, **given))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["amcl", "false_negatives"])
def test_a_loss_that_the_compiler_cannot_trace_runs_uncompiled(name):
    """Batches of different sizes, with and without labels and extras, compile nothing of the loss."""
    loss = AMCL(dim=DIMS, hidden=3) if name == "amcl" else FalseNegatives(InfoNCE(), above=0.9)
    loss, graphs = loss.double(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def run(a, b, group, extra):
        return loss(2 * a, b, group=group, extra=extra)

    step = torch.compile(run, backend=backend)
    for samples, labels, more in ((6, False, 4), (9, True, 0), (1, False, 0), (70, True, 5), (30, False, 0)):
        a, b = torch.randn(2, samples, DIMS, dtype=torch.float64)
        group = torch.arange(samples) % 3 if labels else None
        extra = [torch.randn(more, DIMS, dtype=torch.float64)] if more else []
        torch.testing.assert_close(step(a, b, group, extra), run(a, b, group, extra))
    torch._dynamo.reset()
    assert all(len(graph.graph.find_nodes(op="call_function", target=operator.mul)) == 1 for graph in graphs)
    assert all(len(list(graph.graph.nodes)) < 8 for graph in graphs)


@pytest.mark.parametrize("given", [{}, {"extra": torch.randn(6, DIMS, dtype=torch.float64)}], ids=["views", "extra"])
def test_further_calls_do_not_compile_again(given):
    loss, compiled = Case("info_nce").make(), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    step = torch.compile(loss, backend=backend)
    for seed in range(4):
        views, _ = Case("info_nce").inputs(seed=seed)
        torch.testing.assert_close(step(*views, **given), loss(*views, **given))
    torch._dynamo.reset()
    assert len(compiled) == 1
