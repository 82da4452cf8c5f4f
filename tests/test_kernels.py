"""The Triton kernels give what the tiles give. They run in Triton's interpreter, and are compiled for a GPU not here.

Triton reads TRITON_INTERPRET when it is imported, so the facts are checked in a process of their own, which the one
test of this process starts.
"""

import os
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from contrast.core import reductions
from contrast.core.embeddings import PADDING, REMEMBERED, Embeddings
from contrast.core.pairs import Pairs, all_pairs, two_sided
from contrast.core.reductions import Count, Kth, LogSumExp, Mean, SoftMean, SoftplusSum, kernels, terms
from contrast.core.reductions.tiled import TiledReductions
from contrast.core.reductions.triton_backend import KernelReductions

pytest.importorskip("triton", reason="Triton is not installed")
OVER = ("positive", "negative", "remembered", "all")
FORMS = ("number", "learned", "anchor", "candidate", "head")
here = pytest.mark.skipif(not kernels.INTERPRETED, reason="runs in a process with TRITON_INTERPRET=1")


@pytest.mark.skipif(kernels.INTERPRETED, reason="is that process")
def test_the_tests_below_pass_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def reduce(term, pairs, *asked):
    """Compute all reductions with one kind of term."""
    (outputs,) = terms.compute(pairs.layout, [term(pairs.layout, asked, 16)])
    return outputs


def both_ways(pairs, asked, leaves):
    """Return values and gradients by the kernels and by the tiles."""
    made = []
    for term in (KernelReductions, TiledReductions):
        outputs = reduce(term, pairs, *asked)
        total = 0.0
        for output in outputs:
            if output.is_floating_point():
                mix = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view(output.shape)
                total = total + torch.where(output > torch.finfo(output.dtype).min / 4, output * mix, 0).sum()
        leaf = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = torch.autograd.grad(total, leaf, materialize_grads=True, allow_unused=True)
        made.append([*outputs, *gradients])
    return made


def assert_same(pairs, asked, leaves, dtype):
    rtol, atol = (1e-10, 1e-11) if dtype == torch.float64 else (2e-5, 2e-5)
    for ours, theirs in zip(*both_ways(pairs, asked, leaves), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours.expand(theirs.shape), theirs, rtol=rtol, atol=atol)


def a_scene(dice, dtype, dims=5, layout=None):
    """Return pairs of random identities, and the leaves that have a gradient."""
    generator = torch.Generator().manual_seed(dice.randrange(10**9))
    heads = dice.choice([None, None, 2])
    leaves = []

    def part(count, views, alone=False, graded=True):
        def some(options):
            return torch.tensor(dice.choices(options, k=count)).long()

        shape = (count, dims) if heads is None or alone else (heads, count, dims)
        leaves.append(torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(graded))
        return Embeddings(leaves[-1], some(range(30)), some([0, 1, 2]), some(views))

    own = [0, 1, 0, 1, 0, 1, PADDING]
    queue = part(
        dice.choice([0, 1, 17, 33]), [REMEMBERED] * 4 + [0, 2, PADDING], dice.random() < 0.3, dice.random() < 0.5
    )
    layout = layout or dice.choice(["free", "free", "all pairs", "two sided"])
    if layout == "free":
        anchor = part(dice.choice([0, 1, 4, 18, 35]), own, graded=dice.random() < 0.8)
        other = part(dice.choice([0, 3, 16, 37]), own, dice.random() < 0.3, dice.random() < 0.8)
        pairs = Pairs(anchor, (other, queue), across=dice.random() < 0.3)
    else:
        a, b = part(dice.choice([1, 9, 20]), own), part(dice.choice([3, 19]), own)
        pairs = (all_pairs if layout == "all pairs" else two_sided)(a, b, extra=[queue])
    return pairs, leaves, generator


def a_value(form, pairs, generator, leaves, dtype):
    """Return an argument of that form, which may be learned."""
    if form == "number":
        return 1.3
    width, heads = sum(len(part) for part in pairs.candidates), pairs.anchor.z.shape[:-2]
    shape = {
        "learned": (),
        "anchor": (len(pairs), 1),
        "candidate": (1, width),
        "head": (*heads, 1, 1),
        "head and anchor": (*heads, len(pairs), 1),
        "bias": (len(pairs),),
        "bias of head": (*heads, len(pairs)),
    }[form]
    leaves.append((torch.rand(shape, generator=generator, dtype=dtype) + 0.3).requires_grad_())
    return leaves[-1]


def a_reduction(dice, kind, over, pairs, generator, leaves, dtype):
    """Return a reduction of that kind with random arguments."""
    count, width = len(pairs), sum(len(part) for part in pairs.candidates)
    form = dice.choice([*FORMS, "head and anchor"])
    value = a_value(form, pairs, generator, leaves, dtype)
    given = {
        "among": torch.rand(width, generator=generator) < 0.8 if dice.random() < 0.3 else None,
        "rows": torch.rand(count, generator=generator) < 0.8 if dice.random() < 0.3 else None,
    }
    if kind is not SoftplusSum and dice.random() < 0.3:
        shape = (count,) if dice.random() < 0.5 else pairs.anchor.z.shape[:-1]
        given["above"] = torch.randn(shape, generator=generator, dtype=dtype) - 1
    if kind is LogSumExp:
        weight = None if dice.random() < 0.4 else a_value(dice.choice(FORMS), pairs, generator, leaves, dtype)
        return LogSumExp(value, over, log_weight=weight, **given)
    if kind is SoftMean:
        return SoftMean(value, over, detach=dice.random() < 0.5, **given)
    if kind is SoftplusSum:
        bias = a_value(dice.choice(["number", "learned", "bias", "bias of head"]), pairs, generator, leaves, dtype)
        return SoftplusSum(value, bias, over, **given)
    if kind is Mean:
        return Mean(over, weight=None if dice.random() < 0.3 else value, **given)
    return Count(over, **given)


@here
@pytest.mark.parametrize("kind", [LogSumExp, Mean, SoftMean, SoftplusSum, Count])
@pytest.mark.parametrize("over", OVER)
def test_a_reduction_and_its_gradients_are_those_of_the_tiles(kind, over):
    for seed in range(2):
        dice = random.Random(f"{seed} {kind.__name__} {over}")
        dtype = dice.choice([torch.float64, torch.float64, torch.float32])
        pairs, leaves, generator = a_scene(dice, dtype)
        asked = [a_reduction(dice, kind, over, pairs, generator, leaves, dtype)]
        if kind is Count:
            asked.append(LogSumExp(1.0, over))
        assert_same(pairs, asked, leaves, dtype)


@here
@pytest.mark.parametrize("layout", ["free", "all pairs", "two sided"])
def test_more_reductions_than_share_a_sweep_are_those_of_the_tiles(layout):
    dice = random.Random(layout)
    pairs, leaves, generator = a_scene(dice, torch.float64, layout=layout)
    kinds = [LogSumExp, Mean, Count, SoftMean, SoftplusSum, LogSumExp]
    asked = [a_reduction(dice, kind, dice.choice(OVER), pairs, generator, leaves, torch.float64) for kind in kinds]
    assert_same(pairs, asked, leaves, torch.float64)


@here
@pytest.mark.parametrize("form", [*FORMS, "head and anchor"])
def test_every_form_of_argument_is_learned_as_on_the_tiles(form):
    heads = (2,)
    generator, index = torch.Generator().manual_seed(1), torch.arange(11)
    z = [torch.randn(*heads, 11, 5, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    pairs, leaves = all_pairs(*(Embeddings(z[v], index, index % 4, index * 0 + v) for v in range(2))), [*z]
    first, second = (a_value(form, pairs, generator, leaves, torch.float64) for _ in range(2))
    asked = [LogSumExp(first, "all", log_weight=second), SoftMean(second, "negative"), Mean("all", weight=first)]
    assert_same(pairs, [*asked, SoftplusSum(second, 0.2, "positive")], leaves, torch.float64)


@here
def test_vectors_longer_than_a_chunk_are_computed_in_chunks(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 16)
    dice = random.Random(5)
    pairs, leaves, generator = a_scene(dice, torch.float64, dims=37, layout="all pairs")
    leaves.append(torch.rand((), generator=generator, dtype=torch.float64).requires_grad_())
    assert_same(pairs, [LogSumExp(leaves[-1], "all")], leaves, torch.float64)


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_over_no_candidates_there_is_no_gradient(dtype):
    index = torch.tensor([5, 5])
    z = torch.randn(2, 3, dtype=dtype, requires_grad=True)
    pairs = Pairs(Embeddings(z, index, index, index * 0), (Embeddings(z, index, index, index * 0),))
    scale = torch.tensor(2.0, dtype=dtype, requires_grad=True)
    asked = [LogSumExp(scale, "all"), Mean("all"), SoftMean(scale, "all"), SoftplusSum(scale, scale, "all")]
    rows = reduce(KernelReductions, pairs, *asked)
    gradients = torch.autograd.grad(sum(row.sum() for row in rows), [z, scale])
    assert rows[0].tolist() == [torch.finfo(dtype).min / 2] * 2
    assert not any(row.any() for row in rows[1:])
    assert not any(gradient.any() for gradient in gradients)


@here
def test_a_sum_of_small_softplus_terms_keeps_its_digits():
    index = torch.arange(3)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        z = torch.zeros(3, 4, dtype=dtype)
        pairs = Pairs(Embeddings(z, index, index, index * 0), (Embeddings(z, index, index, index * 0 + 1),))
        for bias in (-30.0, -10.0, -1.0, 0.0, 2.0, 25.0):
            (found,) = reduce(KernelReductions, pairs, SoftplusSum(1.0, bias, "negative"))
            expected = 2 * torch.log1p(torch.tensor(bias, dtype=torch.float64).exp())
            torch.testing.assert_close(found.double(), expected.expand(3), rtol=tolerance, atol=0)


@here
def test_a_second_run_gives_the_same_bits():
    made = []
    for _ in range(2):
        dice = random.Random(3)
        pairs, leaves, generator = a_scene(dice, torch.float32, layout="two sided")
        asked = [a_reduction(dice, LogSumExp, "all", pairs, generator, leaves, torch.float32), Mean("positive")]
        made.append(both_ways(pairs, asked, leaves)[0])
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))


@here
def test_bfloat16_products_see_the_vectors_with_three_digits(monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    generator, index = torch.Generator().manual_seed(2), torch.arange(40)
    z = torch.nn.functional.normalize(torch.randn(2, 40, 128, generator=generator), dim=-1)
    for vectors, least, most in ((z.bfloat16().float(), -1, 1e-5), (z, 1e-5, 3e-3)):
        leaves = [one.clone().requires_grad_() for one in vectors]
        pairs = all_pairs(*(Embeddings(leaves[v], index, index, index * 0 + v) for v in range(2)))
        for ours, theirs in zip(*both_ways(pairs, [LogSumExp(10.0, "all")], leaves), strict=True):
            assert least < (ours - theirs).norm() / theirs.norm() < most


@here
def test_reductions_that_the_kernels_do_not_support_use_the_tiles():
    index = torch.arange(3)
    side = Embeddings(torch.randn(3, 2), index, index, index * 0, torch.ones(3, 1))
    asked = [Kth(1, "all"), Mean("all", weight="reference"), Mean("all"), Count("negative"), Mean("positive")]
    pairs = Pairs(side, (replace(side, z=side.z + 0),))
    ruled = pairs.ignoring(lambda anchor, candidate, s: s > 0)
    accepted = [kernels.Kernels.accepts(pairs.layout, one) for one in asked]
    accepted += [kernels.Kernels.accepts(ruled.layout, one) for one in asked[2:]]
    assert accepted == [False, False, True, True, True, False, False, True]


COMPILE = """
import sys
import torch
import triton
from triton.backends.compiler import GPUTarget
from contrast.core.embeddings import Embeddings
from contrast.core.pairs import all_pairs, two_sided
from contrast.core.reductions import Count, LogSumExp, Mean, SoftMean, SoftplusSum, kernels, terms
from contrast.core.reductions.triton_backend import KernelReductions

class Absent:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0

def launch(self, kernel, grid, given, code):
    made = kernel.warmup(*given, grid=grid, code=code, num_warps=8, num_stages=2)
    assert made.asm["cubin"]
    print(kernel.__name__, made.metadata.shared)

triton.runtime.driver.set_active(Absent())
kernels.Kernels._launch = launch
n, index = 128, torch.arange(128)
def learned(*shape): return torch.rand(shape, requires_grad=True)
def compiled(make, heads, *asked):
    z = [torch.randn(*heads, n, 128, requires_grad=True) for _ in range(3)]
    a, b, q = (Embeddings(z[v], index, index, index * 0 + v) for v in range(3))
    layout = make(a, b, extra=[q]).layout
    (found,) = terms.compute(layout, [KernelReductions(layout, asked)])
    found = [one.sum() for one in found if one.requires_grad]
    sum(found).backward() if found else None
for precision in ("highest", "high", "medium"):
    torch.set_float32_matmul_precision(precision)
    compiled(all_pairs, (), LogSumExp(10.0, "all"))
two = SoftMean(learned(n * 2, 1), "negative", detach=True, above=torch.zeros(2, n * 2)), Count("negative")
one = LogSumExp(learned(2, 1, 1), "remembered", log_weight=learned(1, n * 3))
compiled(two_sided, (2,), one, *two, SoftplusSum(learned(), learned(n * 2), "all"))
compiled(all_pairs, (), SoftMean(learned(), "all"), Mean("positive", weight=learned(1, n * 3)))
"""


@pytest.mark.skipif(kernels.INTERPRETED, reason="compiles, in a process without the interpreter")
def test_the_kernels_compile_for_a_gpu_with_little_shared_memory():
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    used = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _ in used} == {"_row_kernel", "_gradient_kernel"}
    assert max(int(shared) for _, shared in used) <= 99 * 1024


@here
def test_the_triton_backend_uses_the_kernels(monkeypatch):
    """But for thresholds, and what asks for them itself."""
    computed = []
    forward = kernels.Kernels.forward
    monkeypatch.setattr(kernels.Kernels, "forward", lambda self: computed.append(self.reductions) or forward(self))
    z = torch.nn.functional.normalize(torch.randn(2, 20, 8), dim=-1).requires_grad_()
    index = torch.arange(20)
    pairs = all_pairs(*(Embeddings(one, index, index, index * 0 + view) for view, one in enumerate(z)))
    asked = (
        LogSumExp(5.0, "all"),
        SoftMean(5.0, "negative"),
        Kth(3, "negative"),
        LogSumExp(5.0, "negative", above=Kth(3, "negative")),
    )
    with reductions.backend("triton"):
        found = pairs.reduce(*asked)
    with reductions.backend("dense"):
        expected = pairs.reduce(*asked)
    assert [[type(one) for one in asked] for asked in computed] == [[LogSumExp, SoftMean]]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(kernels.INTERPRETED or torch.cuda.is_available(), reason="is about a machine without either")
def test_without_a_gpu_the_backend_falls_back_to_the_tiles():
    z = torch.randn(6, 4)
    index = torch.arange(6)
    pairs = Pairs(Embeddings(z, index, index, index * 0), (Embeddings(z, index, index, index * 0 + 1),))
    with reductions.backend("triton"):
        found = pairs.logsumexp(1.0, "all")
    torch.testing.assert_close(found, (z @ z.T).logsumexp(dim=1))
