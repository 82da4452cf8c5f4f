"""AMCLBarlow against loops over the correlation matrix, and against plain Barlow Twins."""

import pytest
import torch
import torch.distributed as dist

from contrast.losses.amcl_barlow import AMCLBarlow
from tests.losses.reference import assert_same, random, regulariser
from tests.losses.test_amcl import HIGH, LOW, temperature


def amcl_barlow(dim=3, **arguments):
    settings = {"hidden": 5, "lowest_temperature": LOW, "highest_temperature": HIGH, "off_diagonal_weight": 0.05}
    return AMCLBarlow(dim, **{**settings, **arguments}).double()


def correlations(a, b):
    """Return C entry by entry, with the biased standard deviation."""
    count, dim = a.shape
    one, other = [
        [[(z[n, column] - z[:, column].mean()) / z[:, column].var(correction=0).sqrt() for n in range(count)]
         for column in range(dim)]
        for z in (a, b)
    ]  # fmt: skip
    return torch.stack(
        [
            torch.stack([sum(x * y for x, y in zip(one[row], other[column], strict=True)) / count
                         for column in range(dim)])
            for row in range(dim)
        ]
    )  # fmt: skip


def by_loops(loss, a, b, off, beta):
    c, dim, total = correlations(a, b), a.shape[1], 0
    for row in range(dim):
        for column in range(dim):
            tau = temperature(loss, c[row], c[:, column])
            if row == column:
                total = total + (1 - c[row, row] / tau) ** 2 + beta * regulariser(tau, dim)
            else:
                total = total + off * c[row, column] ** 2 / tau - beta * regulariser(tau, dim)
    return total


@pytest.mark.parametrize("network", ["mlp", "inner_product"])
def test_it_equals_loops(network):
    a, b = random(6, 3), random(6, 3, seed=1)
    loss = amcl_barlow(network=network, regulariser_weight=0.3)
    assert_same(loss(a, b), by_loops(loss, a, b, 0.05, 0.3), a, b, *loss.parameters())


def test_temperature_one_without_regulariser_is_barlow_twins():
    a, b = random(6, 3), random(6, 3, seed=1)
    loss = amcl_barlow(None, network="constant", temperature=1.0, regulariser_weight=0.0, off_diagonal_weight=5e-3)
    c = correlations(a, b)
    plain = sum((1 - c[i, i]) ** 2 for i in range(3)) + 5e-3 * sum(
        c[i, j] ** 2 for i in range(3) for j in range(3) if i != j
    )
    assert_same(loss(a, b), plain, a, b)
    normalised = [torch.nn.functional.batch_norm(z, None, None, training=True, eps=1e-30) for z in (a, b)]
    torch.testing.assert_close(correlations(a, b), normalised[0].T @ normalised[1] / 6)


def test_it_is_the_derivative():
    loss = amcl_barlow(hidden=3)
    assert torch.autograd.gradcheck(loss, (random(4, 3), random(4, 3, seed=1)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_constant_dimensions_single_samples_and_empty_batches_are_finite(dtype):
    loss = AMCLBarlow(3, hidden=4)
    for size in (0, 1, 5):
        a, b = (random(size, 3, seed=seed).detach().to(dtype) for seed in range(2))
        a[:, 0] = 0.1
        a.requires_grad_()
        value = loss(a, b)
        (gradient,) = torch.autograd.grad(value, a)
        assert torch.isfinite(value) and torch.isfinite(gradient).all()
        assert value.dtype == torch.float32
        assert not gradient[:, 0].any()
        assert size or value == 0


def test_autocast_changes_nothing_forward_or_backward():
    loss = AMCLBarlow(3, hidden=4)
    a, b = (random(6, 3, seed=seed).detach().float().requires_grad_() for seed in range(2))
    outside = [loss(a, b), *torch.autograd.grad(loss(a, b), [a, b, *loss.parameters()])]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = [loss(a, b), *torch.autograd.grad(loss(a, b), [a, b, *loss.parameters()])]
    assert all(torch.equal(one, other) for one, other in zip(inside, outside, strict=True))


def test_metrics_describe_the_last_call():
    loss, (a, b) = amcl_barlow(), (random(6, 3), random(6, 3, seed=1))
    assert loss.metrics == {}
    loss(a, b)
    c = correlations(a, b)
    assert float(loss.metrics["diagonal_correlation"]) == pytest.approx(c.diagonal().mean().item())
    off = c[~torch.eye(3, dtype=torch.bool)]
    assert float(loss.metrics["off_diagonal_correlation"]) == pytest.approx((off**2).mean().sqrt().item())
    assert all(value.shape == () and not value.requires_grad for value in loss.metrics.values())
    assert loss.end_epoch() is None


def train_on_part(rank, world, sizes):
    """Return value, and gradients as DistributedDataParallel averages them, of one process's rows."""
    views = [random(7, 3), random(7, 3, seed=1)]
    if rank is not None:
        start = sum(sizes[:rank])
        views = [z[start : start + sizes[rank]].detach() for z in views]
    weight = random(3, 3, seed=2)
    loss = amcl_barlow()
    value = loss(*[z @ weight for z in views], sample=torch.arange(len(views[0])))
    value.backward()
    if rank is not None:
        dist.all_reduce(weight.grad)
        weight.grad /= world
    return value.detach(), [weight.grad, *(parameter.grad for parameter in loss.parameters())]


@pytest.mark.parametrize("sizes", [(4, 3, 0, 0), (7, 0, 0, 0), (2, 1, 2, 2)])
def test_processes_equal_one(processes, sizes):
    sizes = (*sizes[: processes.world - 1], 7 - sum(sizes[: processes.world - 1]))
    value, gradients = train_on_part(None, 1, sizes)
    for found, its_gradients in processes.run(train_on_part, sizes):
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-13)
        for one, other in zip(its_gradients, gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("views", "given", "message"),
    [
        ((torch.ones(4, 3),), {}, r"takes two views of one shape.*got \(4, 3\)"),
        ((torch.ones(4, 3),) * 3, {}, "takes two views of one shape"),
        ((torch.ones(4, 3), torch.ones(3, 3)), {}, r"got \(4, 3\), \(3, 3\)"),
        ((torch.ones(4, 3),) * 2, {"targets": (None, torch.ones(4, 3))}, "takes no targets, reference or extra"),
        ((torch.ones(4, 3),) * 2, {"extra": [torch.ones(4, 3)]}, "takes no targets, reference or extra"),
        ((torch.ones(4, 3),) * 2, {"reference": torch.ones(4, 3)}, "takes no targets, reference or extra"),
        ((torch.ones(4, 3), torch.full((4, 3), torch.nan)), {}, "view 1 contains values that are not finite"),
        ((torch.ones(4, 2),) * 2, {}, "made for embeddings of dim=3; these have 2"),
    ],
)
def test_wrong_inputs_raise(views, given, message):
    with pytest.raises(ValueError, match=message):
        amcl_barlow()(*views, **given)


def test_wrong_arguments_raise():
    for name in ("off_diagonal_weight", "regulariser_weight"):
        with pytest.raises(ValueError, match=f"{name} must be a number of 0 or more; got -1"):
            AMCLBarlow(4, **{name: -1})
