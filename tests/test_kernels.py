"""The Triton kernels equal the tiles in Triton's interpreter, and can be compiled for a GPU.

Triton reads TRITON_INTERPRET when it is imported, so that most tests run in a process of their own, which one test of
this process starts.
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
in_interpreter = pytest.mark.skipif(not kernels.INTERPRETED, reason="runs in a process with TRITON_INTERPRET=1")


@pytest.mark.skipif(kernels.INTERPRETED, reason="this is that process")
def test_the_tests_below_pass_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def reduce(term, pairs, *requested):
    """Compute all reductions with one kind of term."""
    (outputs,) = terms.compute(pairs.layout, [term(pairs.layout, requested, 16)])
    return outputs


def by_kernels_and_tiles(pairs, requested, leaves):
    """Return values and gradients by the kernels and by the tiles."""
    results = []
    for term in (KernelReductions, TiledReductions):
        outputs = reduce(term, pairs, *requested)
        total = 0.0
        for output in outputs:
            if output.is_floating_point():
                mix = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view(output.shape)
                total = total + torch.where(output > torch.finfo(output.dtype).min / 4, output * mix, 0).sum()
        leaf = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = torch.autograd.grad(total, leaf, materialize_grads=True, allow_unused=True)
        results.append([*outputs, *gradients])
    return results


def assert_same(pairs, requested, leaves):
    rtol, atol = (1e-10, 1e-11) if pairs.anchor.z.dtype == torch.float64 else (2e-5, 2e-5)
    for ours, theirs in zip(*by_kernels_and_tiles(pairs, requested, leaves), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours.expand(theirs.shape), theirs, rtol=rtol, atol=atol)


class RandomCase:
    """Pairs of random identities, with random reductions of them; the same for the same seed.

    Attributes:
        leaves: the tensors that may have a gradient.
    """

    def __init__(self, seed, dtype=None, *, dims=5, layout=None):
        self.choices = choices = random.Random(seed)
        self.dtype = dtype or choices.choice([torch.float64, torch.float64, torch.float32])
        self.generator = torch.Generator().manual_seed(choices.randrange(10**9))
        self.dims, self.heads, self.leaves = dims, choices.choice([(), (), (2,)]), []
        views = [0, 1, 0, 1, 0, 1, PADDING]
        queue = self.part([0, 1, 17], [REMEMBERED] * 4 + [0, 2, PADDING], shared=0.3, learned=0.5)
        layout = layout or choices.choice(["free", "free", "all pairs", "two sided"])
        if layout == "free":
            anchor = self.part([0, 1, 4, 17, 18], views, learned=0.8)
            other = self.part([0, 3, 16, 19], views, shared=0.3, learned=0.8)
            self.pairs = Pairs(anchor, (other, queue), across=choices.random() < 0.3)
        else:
            a, b = self.part([1, 9, 11], views), self.part([3, 8], views)
            self.pairs = (all_pairs if layout == "all pairs" else two_sided)(a, b, extra=[queue])

    def part(self, sizes, views, *, shared=0.0, learned=1.0):
        """Return embeddings; with these probabilities all heads share the vectors, and these have a gradient."""
        count = self.choices.choice(sizes)
        heads = () if self.choices.random() < shared else self.heads
        z = torch.randn(*heads, count, self.dims, generator=self.generator, dtype=self.dtype)
        self.leaves.append(z.requires_grad_(self.choices.random() < learned))
        identity = (self.choices.choices(options, k=count) for options in (range(30), [0, 1, 2], views))
        return Embeddings(z, *(torch.tensor(numbers).long() for numbers in identity))

    def random(self, *shape):
        return torch.rand(shape, generator=self.generator, dtype=self.dtype)

    def argument(self, form):
        """Return an argument of that form, with a gradient unless it is a number."""
        if form == "number":
            return 1.3
        shape = {
            "learned": (),
            "anchor": (len(self.pairs), 1),
            "candidate": (1, sum(map(len, self.pairs.candidates))),
            "head": (*self.heads, 1, 1),
            "head and anchor": (*self.heads, len(self.pairs), 1),
            "bias": (len(self.pairs),),
            "bias of head": (*self.heads, len(self.pairs)),
        }[form]
        self.leaves.append((self.random(*shape) + 0.3).requires_grad_())
        return self.leaves[-1]

    def reduction(self, kind, over):
        """Return a reduction of that kind with random arguments."""
        choices, count, width = self.choices, len(self.pairs), sum(map(len, self.pairs.candidates))
        value = self.argument(choices.choice([*FORMS, "head and anchor"]))
        masks = {
            "among": self.random(width) < 0.8 if choices.random() < 0.3 else None,
            "rows": self.random(count) < 0.8 if choices.random() < 0.3 else None,
        }
        if kind is SoftplusSum:
            bias = self.argument(choices.choice(["number", "learned", "bias", "bias of head"]))
            return SoftplusSum(value, bias, over, **masks)
        shape = (count,) if choices.random() < 0.5 else (*self.heads, count)
        masks["above"] = 2 * self.random(*shape) - 2 if choices.random() < 0.3 else None
        if kind is LogSumExp:
            weight = None if choices.random() < 0.4 else self.argument(choices.choice(FORMS))
            return LogSumExp(value, over, log_weight=weight, **masks)
        if kind is SoftMean:
            return SoftMean(value, over, detach=choices.random() < 0.5, **masks)
        if kind is Mean:
            return Mean(over, weight=None if choices.random() < 0.3 else value, **masks)
        return Count(over, **masks)


@in_interpreter
@pytest.mark.parametrize("kind", [LogSumExp, Mean, SoftMean, SoftplusSum, Count])
@pytest.mark.parametrize("over", OVER)
def test_a_reduction_and_its_gradients_are_those_of_the_tiles(kind, over):
    for seed in range(2):
        case = RandomCase(f"{seed} {kind.__name__} {over}")
        differentiable = [LogSumExp(1.0, over)] if kind is Count else []
        assert_same(case.pairs, [case.reduction(kind, over), *differentiable], case.leaves)


@in_interpreter
@pytest.mark.parametrize("layout", ["free", "all pairs", "two sided"])
def test_more_reductions_than_share_a_sweep_are_those_of_the_tiles(layout):
    case = RandomCase(layout, torch.float64, layout=layout)
    kinds = [LogSumExp, Mean, Count, SoftMean, SoftplusSum, LogSumExp]
    assert_same(case.pairs, [case.reduction(kind, case.choices.choice(OVER)) for kind in kinds], case.leaves)


@in_interpreter
@pytest.mark.parametrize("form", [*FORMS, "head and anchor"])
def test_every_form_of_argument_is_learned_as_on_the_tiles(form):
    case = RandomCase(1, torch.float64, layout="all pairs")
    first, second = case.argument(form), case.argument(form)
    requested = [LogSumExp(first, "all", log_weight=second), SoftMean(second, "negative"), Mean("all", weight=first)]
    assert_same(case.pairs, [*requested, SoftplusSum(second, 0.2, "positive")], case.leaves)


@in_interpreter
def test_vectors_longer_than_a_chunk_are_computed_in_chunks(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 16)
    case = RandomCase(5, torch.float64, dims=37, layout="all pairs")
    assert_same(case.pairs, [LogSumExp(case.argument("learned"), "all")], case.leaves)


@in_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_over_no_candidates_there_is_no_gradient(dtype):
    index = torch.tensor([5, 5])
    z = torch.randn(2, 3, dtype=dtype, requires_grad=True)
    pairs = Pairs(Embeddings(z, index, index, index * 0), (Embeddings(z, index, index, index * 0),))
    scale = torch.tensor(2.0, dtype=dtype, requires_grad=True)
    requested = [LogSumExp(scale, "all"), Mean("all"), SoftMean(scale, "all"), SoftplusSum(scale, scale, "all")]
    rows = reduce(KernelReductions, pairs, *requested)
    gradients = torch.autograd.grad(sum(row.sum() for row in rows), [z, scale])
    assert rows[0].tolist() == [torch.finfo(dtype).min / 2] * 2
    assert not any(row.any() for row in rows[1:])
    assert not any(gradient.any() for gradient in gradients)


@in_interpreter
def test_a_sum_of_small_softplus_terms_keeps_its_digits():
    index = torch.arange(3)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        z = torch.zeros(3, 4, dtype=dtype)
        pairs = Pairs(Embeddings(z, index, index, index * 0), (Embeddings(z, index, index, index * 0 + 1),))
        for bias in (-30.0, -10.0, -1.0, 0.0, 2.0, 25.0):
            (found,) = reduce(KernelReductions, pairs, SoftplusSum(1.0, bias, "negative"))
            expected = 2 * torch.log1p(torch.tensor(bias, dtype=torch.float64).exp())
            torch.testing.assert_close(found.double(), expected.expand(3), rtol=tolerance, atol=0)


@in_interpreter
def test_a_second_run_gives_the_same_bits():
    case = RandomCase(3, torch.float32, layout="two sided")
    requested = [case.reduction(LogSumExp, "all"), Mean("positive")]
    first, second = (by_kernels_and_tiles(case.pairs, requested, case.leaves)[0] for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@in_interpreter
def test_bfloat16_products_see_the_vectors_with_three_digits(monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    generator, index = torch.Generator().manual_seed(2), torch.arange(20)
    z = torch.nn.functional.normalize(torch.randn(2, 20, 64, generator=generator), dim=-1)
    for vectors, least, most in ((z.bfloat16().float(), -1, 1e-5), (z, 1e-5, 3e-3)):
        leaves = [one.clone().requires_grad_() for one in vectors]
        pairs = all_pairs(*(Embeddings(leaves[v], index, index, index * 0 + v) for v in range(2)))
        for ours, theirs in zip(*by_kernels_and_tiles(pairs, [LogSumExp(10.0, "all")], leaves), strict=True):
            assert least < (ours - theirs).norm() / theirs.norm() < most


@in_interpreter
def test_reductions_that_the_kernels_do_not_support_use_the_tiles():
    index = torch.arange(3)
    side = Embeddings(torch.randn(3, 2), index, index, index * 0, torch.ones(3, 1))
    requested = [Kth(1, "all"), Mean("all", weight="reference"), Mean("all"), Count("negative"), Mean("positive")]
    pairs = Pairs(side, (replace(side, z=side.z + 0),))
    ruled = pairs.ignoring(lambda anchor, candidate, s: s > 0)
    accepted = [kernels.Kernels.accepts(pairs.layout, each) for each in requested]
    accepted += [kernels.Kernels.accepts(ruled.layout, each) for each in requested[2:]]
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
    compiled = kernel.warmup(*given, grid=grid, code=code, num_warps=8, num_stages=2)
    assert compiled.asm["cubin"]
    print(kernel.__name__, compiled.metadata.shared)

triton.runtime.driver.set_active(Absent())
kernels.Kernels._launch = launch
n, index = 128, torch.arange(128)
def learned(*shape): return torch.rand(shape, requires_grad=True)
def compile(make, heads, *requested):
    z = [torch.randn(*heads, n, 128, requires_grad=True) for _ in range(3)]
    a, b, q = (Embeddings(z[v], index, index, index * 0 + v) for v in range(3))
    layout = make(a, b, extra=[q]).layout
    (found,) = terms.compute(layout, [KernelReductions(layout, requested)])
    found = [one.sum() for one in found if one.requires_grad]
    sum(found).backward() if found else None
for precision in ("highest", "high", "medium"):
    torch.set_float32_matmul_precision(precision)
    compile(all_pairs, (), LogSumExp(10.0, "all"))
two = SoftMean(learned(n * 2, 1), "negative", detach=True, above=torch.zeros(2, n * 2)), Count("negative")
one = LogSumExp(learned(2, 1, 1), "remembered", log_weight=learned(1, n * 3))
compile(two_sided, (2,), one, *two, SoftplusSum(learned(), learned(n * 2), "all"))
compile(all_pairs, (), SoftMean(learned(), "all"), Mean("positive", weight=learned(1, n * 3)))
"""


@pytest.mark.skipif(kernels.INTERPRETED, reason="compiles, in a process without the interpreter")
def test_the_kernels_compile_for_a_gpu_with_little_shared_memory():
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    used = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _ in used} == {"_row_kernel", "_gradient_kernel"}
    assert max(int(shared) for _, shared in used) <= 99 * 1024


@in_interpreter
def test_the_triton_backend_uses_the_kernels(monkeypatch):
    """Except for thresholds, and for reductions with a `Kth`."""
    computed = []
    forward = kernels.Kernels.forward
    monkeypatch.setattr(kernels.Kernels, "forward", lambda self: computed.append(self.reductions) or forward(self))
    z = torch.nn.functional.normalize(torch.randn(2, 20, 8), dim=-1).requires_grad_()
    index = torch.arange(20)
    pairs = all_pairs(*(Embeddings(one, index, index, index * 0 + view) for view, one in enumerate(z)))
    requested = (
        LogSumExp(5.0, "all"),
        SoftMean(5.0, "negative"),
        Kth(3, "negative"),
        LogSumExp(5.0, "negative", above=Kth(3, "negative")),
    )
    with reductions.backend("triton"):
        found = pairs.reduce(*requested)
    with reductions.backend("dense"):
        expected = pairs.reduce(*requested)
    assert [[type(each) for each in reductions] for reductions in computed] == [[LogSumExp, SoftMean]]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(
    kernels.INTERPRETED or torch.cuda.is_available(), reason="tests machines without Triton on its device"
)
def test_without_a_gpu_the_backend_falls_back_to_the_tiles():
    z = torch.randn(6, 4)
    index = torch.arange(6)
    pairs = Pairs(Embeddings(z, index, index, index * 0), (Embeddings(z, index, index, index * 0 + 1),))
    with reductions.backend("triton"):
        found = pairs.logsumexp(1.0, "all")
    torch.testing.assert_close(found, (z @ z.T).logsumexp(dim=1))
