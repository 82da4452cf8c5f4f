import pytest
import torch
from torch import nn

from contrast.core.registry import InputError
from contrast.models.heads import HEADS


@pytest.mark.parametrize("name", HEADS)
def test_every_head_returns_one_embedding_per_sample(name):
    head = HEADS.build({"name": name, **({"heads": 3} if name == "multi_head" else {})}, width=10)
    shape = head(torch.randn(4, 10)).shape
    assert shape == {"none": (4, 10), "multi_head": (3, 4, 128)}.get(name, (4, 128))


def test_the_heads_of_a_multi_head_are_separate_networks():
    head = HEADS.build({"name": "multi_head", "heads": 2, "out": 5}, width=6).eval()
    x = torch.randn(3, 6)
    torch.testing.assert_close(head(x)[1], head.heads[1](x))
    assert not torch.allclose(head(x)[0], head(x)[1])


def test_an_mlp_has_the_requested_layers():
    head = HEADS.build({"name": "mlp", "hidden": 7, "out": 5, "layers": 3, "last_batch_norm": True}, width=6)
    linears = [module for module in head if isinstance(module, nn.Linear)]
    assert [(module.in_features, module.out_features) for module in linears] == [(6, 7), (7, 7), (7, 5)]
    assert [type(module) for module in head].count(nn.BatchNorm1d) == 3
    assert head[-1].weight is None
    assert isinstance(HEADS.build({"name": "mlp", "layers": 1}, width=6)[0], nn.Linear)


def test_a_head_of_output_width_zero_is_refused():
    with pytest.raises(InputError, match="out of a head must be 1 or more"):
        HEADS.build({"name": "mlp", "out": 0}, where="encoder.head", width=6)
