import pytest
import torch

from contrast.models.series_networks import Dilated, ResNet1d, Transformer1d, masked_max, masked_mean

NETWORKS = {
    "resnet1d": lambda: ResNet1d(2, width=4, kernel=5),
    "resnet1d, stride 3": lambda: ResNet1d(2, width=4, stride=3),
    "dilated, max": lambda: Dilated(2, width=4, out=6, depth=3),
    "dilated, mean": lambda: Dilated(2, width=4, out=6, depth=3, pooling="mean"),
    "transformer1d": lambda: Transformer1d(2, width=8, depth=2, heads=2, patch=4),
}


def network(name):
    torch.manual_seed(0)
    model = NETWORKS[name]().double()
    model(torch.randn(8, 2, 40, dtype=torch.float64))  # running statistics that are not 0 and 1
    return model.eval()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("length", [1, 2, 7, 16, 33])
def test_padding_changes_nothing(name, length):
    model = network(name)
    x = torch.randn(3, 2, length, dtype=torch.float64)
    padded = torch.cat([x, torch.full((3, 2, 50 - length), 9.0, dtype=torch.float64)], dim=2)
    mask = (torch.arange(50) < length).expand(3, 50)
    with torch.no_grad():
        torch.testing.assert_close(model(padded, mask), model(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_mask_that_is_true_everywhere_changes_nothing(name):
    model = network(name).train()
    x = torch.randn(3, 2, 21, dtype=torch.float64)
    torch.testing.assert_close(model(x, torch.ones(3, 21, dtype=torch.bool)), model(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_series_without_observations_has_finite_features_and_gradients(name):
    model = network(name).train()
    mask = torch.tensor([[False] * 12, [True] * 12])
    model(torch.zeros(2, 2, 12, dtype=torch.float64), mask).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    with torch.no_grad():
        assert model.eval()(torch.zeros(2, 2, 12, dtype=torch.float64), mask).isfinite().all()


@pytest.mark.parametrize("name", NETWORKS)
def test_thousands_of_steps_work(name):
    with torch.no_grad():
        assert network(name)(torch.randn(1, 2, 5000, dtype=torch.float64)).isfinite().all()


def test_in_training_features_do_not_depend_on_the_padding_of_the_batch():
    """BatchNorm uses observed steps only."""
    x = torch.randn(4, 2, 20, dtype=torch.float64)
    mask = torch.arange(20) < torch.tensor([20, 11, 5, 16])[:, None]
    more = torch.nn.functional.pad(mask, (0, 32))
    longer = torch.nn.functional.pad(x, (0, 32), value=5.0)
    torch.testing.assert_close(network("resnet1d").train()(longer, more), network("resnet1d").train()(x, mask))


def test_pooling_uses_observed_steps_only():
    x = torch.tensor([[[1.0, 5.0, 9.0]], [[-2.0, -4.0, 7.0]], [[1.0, 1.0, 1.0]]])
    mask = torch.tensor([[True, True, True], [True, True, False], [False, False, False]])
    assert masked_mean(x, mask).tolist() == [[5.0], [-3.0], [0.0]]
    assert masked_max(x, mask).tolist() == [[9.0], [-2.0], [0.0]]


def test_the_patch_depends_on_the_length():
    assert [Transformer1d(1, (1, length)).patch for length in (1, 29, 128, 427, 4097)] == [1, 1, 2, 4, 64]


def test_layers_of_the_transformer_are_initialised_differently():
    first, second, _ = Transformer1d(1).layers.layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


@pytest.mark.parametrize(
    "make", [lambda: ResNet1d(1, kernel=4), lambda: Dilated(1, depth=0), lambda: Transformer1d(1, width=12, heads=4)]
)
def test_impossible_numbers_are_refused(make):
    with pytest.raises(ValueError, match="need"):
        make()
