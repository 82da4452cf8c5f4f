import math

import pytest
import torch
from torch import nn

from contrast.core.registry import InputError
from contrast.train.optimizers import OPTIMIZERS


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_a_simple_loss(name):
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    x = torch.randn(32, 4)
    optimizer = OPTIMIZERS.build({"name": name, "lr": 0.05, "weight_decay": 0.0}).build([model])
    before = model(x).square().mean()
    for _ in range(30):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert model(x).square().mean() < before


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_biases_and_norms_have_no_weight_decay_and_frozen_weights_no_group(name):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).requires_grad_(False))
    groups = OPTIMIZERS.build({"name": name, "weight_decay": 0.1}).build([model]).param_groups
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decay == {
        id(model[0].weight): 0.1,
        id(model[0].bias): 0.0,
        id(model[1].weight): 0.0,
        id(model[1].bias): 0.0,
    }


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    optimizer = OPTIMIZERS.build({"name": "adamw", "lr": 2.0, "warmup": 0.2})
    assert optimizer.learning_rate(0) == 0
    assert optimizer.learning_rate(0.1) == pytest.approx(1.0)
    assert optimizer.learning_rate(0.2) == pytest.approx(2.0)
    assert optimizer.learning_rate(0.6) == pytest.approx(1.0)
    assert optimizer.learning_rate(0.4) == pytest.approx(1 + math.cos(math.pi / 4))
    assert optimizer.learning_rate(1) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("wrong", [{"lr": 0}, {"weight_decay": -1}, {"warmup": 10}, {"momentum": 2}, {"momentum": -1}])
def test_the_message_of_an_impossible_value_names_its_key(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        OPTIMIZERS.build({"name": "sgd", **wrong}, where="optimizer")
