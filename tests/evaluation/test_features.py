import math

import pytest
import torch
from torch import nn

from contrast.core.registry import InputError
from contrast.evaluation.features import effective_rank, extract, frozen, health, raw_features, raw_input


def test_features_come_in_sample_order_for_any_batch_size(make_data):
    samples = make_data().train
    whole, target = extract(lambda x: x.flatten(1) * 2, samples, batch_size=1000)
    pieces, _ = extract(lambda x: x.flatten(1) * 2, samples, batch_size=7)
    torch.testing.assert_close(whole, samples.x().flatten(1) * 2)
    assert torch.equal(whole, pieces)
    assert target.tolist() == samples.target.tolist()
    assert whole.dtype == torch.float32 and not whole.requires_grad


def test_extraction_freezes_a_module_and_restores_every_flag(make_data):
    encoder = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Dropout(0.5))
    encoder[1].eval()
    before = encoder[1].running_mean.clone()
    first, _ = extract(encoder, make_data().train)
    second, _ = extract(encoder.forward, make_data().train)
    assert torch.equal(first, second)
    assert torch.equal(encoder[1].running_mean, before)
    assert [part.training for part in encoder.modules()] == [True, True, False, True]


def test_frozen_restores_the_flags_after_an_error():
    module = nn.Sequential(nn.Linear(2, 2))
    seen = []

    def fail():
        seen.append(module[0].training)
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), frozen(module):
        fail()
    assert seen == [False]
    assert module.training and module[0].training


@pytest.mark.parametrize("encode", [lambda x: x, lambda x: x.flatten(1)[:2], lambda x: [x]])
def test_an_encoder_without_one_vector_per_item_is_refused(encode, make_data):
    with pytest.raises(InputError, match="an encoder must return"):
        extract(encode, make_data().train)


def test_varied_features_are_usable():
    verdict = health(torch.randn(200, 8, generator=torch.Generator().manual_seed(0)))
    assert verdict.usable and 7 < verdict.rank <= 8
    assert "effective rank" in verdict.sentence


def test_items_with_nan_features_are_counted():
    features = torch.randn(10, 4)
    features[3, 1], features[7, 2] = math.nan, math.inf
    verdict = health(features, "the pretrained encoder")
    assert not verdict.finite and verdict.broken == 2
    assert verdict.sentence.startswith("the pretrained encoder gives NaN or infinite features for 2 of 10 items")


@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_a_constant_encoder_has_collapsed_also_with_rounding_errors(noise):
    generator = torch.Generator().manual_seed(0)
    constant = torch.randn(1, 16, generator=generator)
    verdict = health(constant + noise * torch.randn(100, 16, generator=generator), "the pretrained encoder")
    assert verdict.collapsed and "has collapsed" in verdict.sentence
    assert verdict.rank < 1.01


def test_one_varied_feature_is_no_collapse():
    features = torch.ones(100, 16)
    features[:, 3] += 0.01 * torch.arange(100)
    assert health(features).usable


def test_all_zero_features_have_collapsed():
    assert health(torch.zeros(10, 3)).collapsed


def test_effective_rank_counts_equal_directions():
    assert effective_rank(torch.eye(6)) == pytest.approx(6)
    assert effective_rank(torch.eye(6)[:, :2].repeat(5, 1)) == pytest.approx(2)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_raw_images_are_scaled_by_their_type(dtype):
    top = torch.iinfo(dtype).max
    x = torch.tensor([[[[0, top]]]], dtype=torch.int64).to(dtype)
    assert raw_features(x).tolist() == [[0.0, 1.0]]


def test_wide_raw_input_is_pooled_below_the_limit():
    image = raw_features(torch.ones(2, 3, 100, 200))
    assert image.shape[0] == 2 and 3000 < image.shape[1] <= 4096
    torch.testing.assert_close(image, torch.ones_like(image))
    assert raw_features(torch.ones(2, 3, 5000)).shape == (2, 3 * 1365)
    assert raw_features(torch.ones(2, 1, 64, 64)).shape == (2, 4096)


def test_pooling_a_series_averages_observed_steps_only():
    x = torch.full((1, 1, 8192), torch.nan)
    x[0, 0, :4096] = 2.0
    x[0, 0, 1] = torch.nan
    features = raw_features(x)
    assert features.shape == (1, 4096)
    assert features[0, :2048].tolist() == [2.0] * 2048
    assert features[0, 2048:].tolist() == [0.0] * 2048


def test_raw_input_scales_images_with_the_value_range(make_data):
    data = make_data()
    features, _ = extract(raw_input(data), data.train)
    low, high = data.value_range
    torch.testing.assert_close(features, (data.train.x().flatten(1) - low) / (high - low))
