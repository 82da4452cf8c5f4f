"""PairFunctions: their parameters are those of the call, also inside torch.func, and no gradient is lost silently."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad

from contrast.core import reductions
from contrast.core.embeddings import Embeddings
from contrast.core.pairs import Pairs
from contrast.core.reductions import Count, Kth, Mean
from contrast.losses import AMCL, PairLoss


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, anchor, candidate):
        return self.weight * (1 + anchor.z[..., :1] * candidate.z[..., :1].mT)


class Scaled(PairLoss):
    traced = False

    def __init__(self):
        super().__init__()
        self.scale = Scale()

    def per_anchor(self, pairs):
        return pairs.logsumexp(self.scale, "all") - pairs.mean("positive")


def views(dims=4):
    return torch.randn(2, 5, dims, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_a_call_with_other_parameters_has_their_gradients():
    """`functional_call` replaces the parameters only during the forward pass."""
    weight = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    z = views().requires_grad_()

    def outcome():
        value = functional_call(Scaled(), {"scale.weight": weight}, tuple(z))
        return value, torch.autograd.grad(value, (weight, z))

    with reductions.backend("dense"):
        expected = outcome()
    torch.testing.assert_close(outcome(), expected)
    assert expected[1][0].abs() > 0.01


LOSSES = [Scaled(), *(AMCL(4, form=form, hidden=3).double() for form in ("max", "logsumexp"))]


@pytest.mark.parametrize("loss", LOSSES, ids=["function", "amcl max", "amcl logsumexp"])
def test_torch_func_differentiates_what_a_function_learns(loss):
    parameters = {name: parameter.detach().clone() for name, parameter in loss.named_parameters()}
    found = grad(lambda given: functional_call(loss, given, tuple(views())))(parameters)
    expected = torch.autograd.grad(loss(*views()), list(loss.parameters()))
    torch.testing.assert_close(list(found.values()), list(expected))
    assert all(gradient.abs().sum() > 0 for gradient in expected)


def test_a_tensor_that_follows_from_a_parameter_has_its_gradient():
    """As an attribute, it has its own backward pass."""
    loss = Scaled()
    loss.scale.power = loss.scale.weight.exp()
    loss.scale.forward = lambda anchor, candidate: loss.scale.power * (1 + anchor.z[:, :1] * candidate.z[:, :1].mT)
    (found,) = torch.autograd.grad(loss(*views()), loss.scale.weight)
    with reductions.backend("dense"):
        loss.scale.power = loss.scale.weight.exp()
        (expected,) = torch.autograd.grad(loss(*views()), loss.scale.weight)
    torch.testing.assert_close(found, expected)


def test_a_learned_tensor_that_is_no_attribute_raises():
    loss = Scaled()
    hidden = [torch.tensor(3.0, dtype=torch.float64, requires_grad=True)]
    loss.scale.forward = lambda anchor, candidate: hidden[0] * torch.ones(len(anchor), len(candidate))
    with pytest.raises(ValueError, match="Scale reads a tensor that has a gradient and is neither its parameter nor"):
        loss(*views())


@pytest.mark.parametrize("dims", [2, 32, 128])
@pytest.mark.parametrize("over", ["positive", "negative"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_threshold_includes_its_own_candidate_also_for_raw_vectors(dims, over, dtype):
    """The rounding error of a product is relative to the lengths of the vectors, not to the product."""
    index = torch.arange(64)
    for seed in range(3):
        x, y = torch.randn(2, 64, dims, dtype=dtype, generator=torch.Generator().manual_seed(seed)) * 3
        pairs = Pairs(
            Embeddings(x, index, index // 4, index * 0), [Embeddings(y, index + 64, index // 4, index * 0 + 1)]
        )
        for k in (1, 3):
            above = Kth(k, over)
            count, _ = pairs.reduce(Count(over, above=above), Mean(over, above=above))
            assert (count >= k).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda pairs: pairs.logsumexp(torch.ones(1, 13), "all"),
        lambda pairs: pairs.logsumexp(torch.ones(13), "positive"),
        lambda pairs: pairs.logsumexp(torch.ones(12, 1), "all"),
        lambda pairs: pairs.logsumexp(torch.ones(3, 1, 1), "all"),
        lambda pairs: pairs.softplus_sum(1.0, torch.ones(12), "all"),
        lambda pairs: pairs.softplus_sum(1.0, torch.ones(5, 1), "all"),
        lambda pairs: pairs.mean("all", weight=torch.ones(1, 7)),
    ],
)
@pytest.mark.parametrize("name", ["dense", "tiled"])
def test_an_argument_of_another_length_raises(call, name):
    index = torch.arange(5)
    a, b = (Embeddings(z.float(), index, index, index * 0 + view) for view, z in enumerate(views()))
    with reductions.backend(name), pytest.raises(ValueError, match="got the shape"):
        call(Pairs(a, [b]))


def test_the_dense_backend_takes_embeddings_of_two_types():
    a, b = views()
    with reductions.backend("dense"):
        torch.testing.assert_close(Scaled()(a.float(), b), Scaled()(a, b), rtol=1e-6, atol=1e-6)
