"""Finite values and gradients for extreme inputs: temperatures, unusual batches, precisions, 1e5 candidates."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from contrast.core import reductions
from contrast.core.registry import schema
from contrast.losses import LOSSES
from tests.losses.cases import CASES, DIMS, Case

SAMPLES = 36
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def plain(views):
    return views, {}


def zero_rows(views):
    return [view * (torch.arange(len(view)) % 3 > 0)[:, None] for view in views], {}


def duplicates(views):
    """Two different directions, so that all similarities are 1 or tie."""
    return [view[torch.arange(len(view)) % 2] for view in views], {}


def opposites(views):
    """Positives are as far apart as possible, and all negatives are equal."""
    return [torch.ones_like(view) * (-1) ** number for number, view in enumerate(views)], {}


def one_sample(views):
    return [view[:1] for view in views], {}


def one_class(views):
    return views, {"group": torch.zeros(SAMPLES, dtype=torch.int64)}


def one_of_each_class(views):
    return views, {"group": torch.arange(SAMPLES)}


def short_and_long(views):
    """The shortest and longest vectors for which 1 / length, a factor of the gradient, is in range."""
    shortest, longest = (1e-3, 1e4) if views[0].dtype == torch.float16 else (1e-30, 1e30)
    length = torch.tensor([shortest, longest])[torch.arange(len(views[0])) % 2][:, None].to(views[0])
    return [view * length for view in views], {}


BATCHES = (plain, zero_rows, duplicates, opposites, one_sample, one_class, one_of_each_class, short_and_long)
BACKENDS = {"default": nullcontext, "tiled": lambda: reductions.backend("tiled", tile=64)}


def at(case, temperature):
    """Return the case at a temperature, for AMCL with bounds around it."""
    bounds = {"lowest_temperature": temperature / 10, "highest_temperature": temperature * 10}
    bounds = bounds if "lowest_temperature" in schema(LOSSES[case.name]) else {}
    return replace(case, arguments={**case.arguments, "temperature": temperature, **bounds})


def has_temperature(case):
    return "temperature" in schema(LOSSES[case.name])


ALL = [case for case in CASES if not has_temperature(case)]
ALL += [at(case, temperature) for case in CASES if has_temperature(case) for temperature in (0.01, 1.0)]
EXTREMES = [
    at(case, temperature)
    for case in CASES
    if has_temperature(case)
    for temperature in (1e-4, 1e4)
    if temperature > 1 or not case.arguments.get("learn_temperature")
]
EXTREMES += [
    Case("hard_negative", {"temperature": temperature, "hardness": 100.0, "positive_prior": 0.999})
    for temperature in (1e-4, 0.1, 1e4)
]
EXTREMES += [Case("decoupled", {"weighting": "von_mises_fisher", "sigma": sigma}) for sigma in (1e-4, 1e3)]
EXTREMES += [Case("siglip", {"scale": scale, "bias": bias}) for scale in (1e-4, 1e4) for bias in (-1e4, 0.0, 1e4)]
for scale in (0.0, 1e-4, 1e4):
    scales = {"attraction_scale": scale, "repulsion_scale": scale}
    EXTREMES.append(Case("cacr", scales))
    EXTREMES += [Case("cacr_queue", {**scales, "constant_weights": which}, targets=True) for which in ("all", "none")]
    EXTREMES += [Case("cacr_rbf", {**scales, "cost_scale": cost}) for cost in (0.0, 500.0, 1e4)]


def batch(case, make, dtype):
    views, given = case.inputs(SAMPLES, views=3, dtype=dtype)
    changed, more = make([view.detach() for view in views])
    if case.targets:
        given["targets"] = make(given["targets"])[0]
    if case.sample:
        given["sample"] = given["sample"][: len(changed[0])]
    return [view.requires_grad_() for view in changed], {**given, **more}


def assert_finite(loss, views, given):
    value = loss(*views, **given)
    gradients = torch.autograd.grad(value, [*views, *loss.parameters()], allow_unused=True, materialize_grads=True)
    assert torch.isfinite(value)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_every_batch_in_every_precision_gives_finite_values_and_gradients(case, backend):
    loss = case.make()
    for make in BATCHES:
        for dtype in DTYPES if make is plain else (torch.float16, torch.float32):
            views, given = batch(case, make, dtype)
            with BACKENDS[backend]():
                assert_finite(loss, views, given)


@pytest.mark.parametrize("case", EXTREMES, ids=str)
def test_extreme_settings_give_finite_values_and_gradients(case):
    """In float32 only: in float16 some of these gradients are out of range."""
    for make in BATCHES:
        assert_finite(case.make(), *batch(case, make, torch.float32))


PEAK = Path("/proc/self/clear_refs")


def peak_bytes():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(not PEAK.exists(), reason="reads the peak of the memory from Linux")
@pytest.mark.parametrize("case", {case.name: case for case in reversed(CASES) if case.plain_extra}.values(), ids=str)
def test_a_hundred_thousand_candidates_need_no_matrix(case):
    views, given = case.inputs(256, dtype=torch.float32)
    if case.sample:
        given["sample"] = given["sample"] % 64
    given["extra"] = [torch.randn(100_000, DIMS, generator=torch.Generator().manual_seed(1))]
    loss = case.make()
    PEAK.write_text("5")  # reset the peak to the current use
    before = peak_bytes()
    assert_finite(loss, views, given)
    matrix = 512 * 100_000 * 4
    assert peak_bytes() - before < matrix / 2
