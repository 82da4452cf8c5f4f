import numpy as np
import pytest
import torch

from contrast.core.registry import InputError
from contrast.models.inputs import ImageInputs, SeriesInputs

NAN = float("nan")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_raw_images_of_any_dtype_are_scaled_to_zero_to_one(dtype):
    inputs = ImageInputs((0, 200), [0.5], [0.25])
    raw = torch.tensor([0, 100, 200, 255]).to(dtype).view(1, 1, 2, 2)
    prepared = inputs.prepare(raw)
    assert prepared.dtype == torch.float32
    assert prepared.flatten().tolist() == [0.0, 0.5, 1.0, 1.0]
    assert inputs(prepared)[0].flatten().tolist() == [-2.0, 0.0, 2.0, 2.0]


def test_a_channel_that_never_varies_is_only_centred():
    inputs = ImageInputs((0, 1), np.array([0.25, 0.5]), np.array([0.0, 0.5]))
    assert inputs(torch.full((1, 2, 1, 1), 0.75))[0].flatten().tolist() == [0.5, 0.5]
    inputs = SeriesInputs([NAN, 2.0], [NAN, 4.0])
    assert inputs.prepare(torch.tensor([[[3.0], [4.0]]])).flatten().tolist() == [3.0, 0.5]


def test_other_channels_than_the_statistics_are_refused():
    """A grey image would be broadcast silently over three means."""
    with pytest.raises(InputError, match=r"3 channel.*\(2, 1, 4, 4\)"):
        ImageInputs((0, 1), [0.5] * 3, [1.0] * 3).prepare(torch.zeros(2, 1, 4, 4))


def test_series_are_standardised_and_gaps_stay_nan():
    prepared = SeriesInputs([1.0, 10.0], [2.0, 5.0]).prepare(torch.tensor([[[3.0, NAN, 1.0], [NAN, 20.0, 10.0]]]))
    torch.testing.assert_close(prepared, torch.tensor([[[1.0, NAN, 0.0], [NAN, 2.0, 0.0]]]), equal_nan=True)


def test_the_mask_ends_at_the_last_step_with_an_observed_channel():
    inputs = SeriesInputs([0.0, 0.0], [1.0, 1.0])
    x = torch.tensor([[[1.0, NAN, NAN, NAN], [2.0, NAN, 3.0, NAN]], [[NAN] * 4, [NAN] * 4]])
    values, mask = inputs(x)
    assert mask.tolist() == [[True, True, True, False], [False] * 4]
    assert values.tolist() == [[[1.0, 0.0, 0.0, 0.0], [2.0, 0.0, 3.0, 0.0]], [[0.0] * 4, [0.0] * 4]]


def test_series_without_padding_have_no_mask():
    assert SeriesInputs([0.0], [1.0])(torch.zeros(2, 1, 5))[1] is None


def test_a_range_that_does_not_rise_is_refused():
    with pytest.raises(InputError, match="rise"):
        ImageInputs((1, 1), [0.0], [1.0])
