"""The operations on series, each against plain loops over samples, channels and steps."""

import math

import numpy as np
import pytest
import torch

from contrast.core.registry import InputError
from contrast.views import VIEWS
from contrast.views import series as ops

NAN = float("nan")
SERIES_OPERATIONS = [name for name, operation in VIEWS.items() if "series" in operation.kinds]
LENGTHS = [12, 7, 1, 2, 12, 5]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def some_series(lengths=LENGTHS, channels=3, steps=12, gaps=True):
    """Return series of these lengths, padded with NaN; the first has two missing values, the second an empty one."""
    x = torch.randn(len(lengths), channels, steps, generator=seeded(1))
    for sample, length in enumerate(lengths):
        x[sample, :, length:] = NAN
    if gaps:
        x[0, 0, 4] = x[0, 1, 8] = NAN
        if len(lengths) > 1 and channels > 1:
            x[1, 1] = NAN
    return x


def same(a, b):
    return torch.equal(a.nan_to_num(nan=1e9), b.nan_to_num(nan=1e9))


def test_the_length_is_the_last_step_with_any_channel_plus_one():
    assert ops.lengths(some_series()).tolist() == LENGTHS
    assert ops.lengths(torch.tensor([[[1, NAN, NAN, NAN], [NAN, NAN, 2, NAN]]])).tolist() == [3]
    assert ops.lengths(torch.full((2, 1, 3), NAN)).tolist() == [0, 0]


# --- each deterministic core against loops ---------------------------------------------------------------------------


def test_permute_cuts_and_sorts_the_observed_steps_only():
    x = some_series()
    cuts = torch.tensor([[4, 8, 2], [3, 3, 12], [1, 1, 1], [1, 12, 12], [12, 12, 12], [4, 2, 3]])
    ranks = torch.rand(6, 4, generator=seeded())
    permuted = ops.permute(x, cuts, ranks).numpy()
    for i, length in enumerate(LENGTHS):
        segments = np.split(x[i].numpy()[:, :length], sorted(min(cut, length) for cut in cuts[i].tolist()), axis=1)
        expected = np.concatenate([segments[k] for k in np.argsort(ranks[i].numpy())], axis=1)
        np.testing.assert_array_equal(permuted[i][:, :length], expected)
        assert np.isnan(permuted[i][:, length:]).all()


def test_resample_interpolates_between_neighbours_and_ignores_a_gap_next_to_a_whole_position():
    x = some_series()
    positions = torch.rand(6, 12, generator=seeded()) * 13 - 0.5
    positions[:, ::3] = positions[:, ::3].round()
    resampled = ops.resample(x, positions).numpy()
    for i, length in enumerate(LENGTHS):
        for c in range(3):
            series = x[i, c].double().numpy()
            for t in range(12):
                position = min(max(positions[i, t].item(), 0), length - 1)
                left = math.floor(position)
                share = position - left
                expected = series[left] if share == 0 else (1 - share) * series[left] + share * series[left + 1]
                np.testing.assert_allclose(resampled[i, c, t], expected if t < length else NAN, atol=1e-5)


def test_mask_span_masks_the_span_in_all_channels():
    x = some_series()
    start, width = torch.tensor([2, 0, 0, 1, 11, 3]), torch.tensor([3, 4, 0, 1, 1, 0])
    masked = ops.mask_span(x, start, width)
    for i in range(6):
        expected = x[i].clone()
        for t in range(start[i], start[i] + width[i]):
            expected[:, t] = NAN
        assert same(masked[i], expected)


def test_knots_are_interpolated_linearly_over_each_length():
    knots = torch.randn(4, 3, 5, generator=seeded())
    curve = ops.interpolate_knots(knots, torch.tensor([9, 5, 2, 1]), 9).numpy()
    for i, length in enumerate([9, 5, 2, 1]):
        for c in range(3):
            positions = np.arange(length) * 4 / max(length - 1, 1)
            np.testing.assert_allclose(curve[i, c, :length], np.interp(positions, range(5), knots[i, c]), atol=1e-5)


# --- distributions of the random numbers -----------------------------------------------------------------------------


def test_jitter_has_the_given_deviation_and_scaling_one_factor_per_channel():
    x = torch.ones(200, 3, 20)
    noise = ops.Jitter(0.5)(x, seeded()) - 1
    assert abs(noise.std() - 0.5) < 0.02
    factors = ops.Scaling(0.3)(x, seeded())
    assert torch.equal(factors, factors[:, :, :1].expand_as(x))
    assert abs(factors[:, :, 0].std() - 0.3) < 4 * 0.3 / math.sqrt(2 * 600)
    assert abs(factors.mean() - 1) < 4 * 0.3 / math.sqrt(600)
    assert len(factors[:, :, 0].unique()) == 600


def test_permutation_draws_every_number_of_segments():
    """The number of segments is that of changed successors plus one, unless segments stay next to each other."""
    x = torch.arange(100.0).expand(2000, 1, 100)
    permuted = ops.Permutation(4)(x, seeded())
    segments = 1 + (permuted.diff(dim=2) != 1).sum(2).flatten()
    assert segments.unique().tolist() == [1, 2, 3, 4]
    assert torch.equal(permuted.sort(2).values, x)
    # P(order unchanged): 1 for one segment, 1/2 for two, 1/6 for three, 1/24 for four; equal cuts neglected.
    expected = (1 + 1 / 2 + 1 / 6 + 1 / 24) / 4
    assert abs((segments == 1).float().mean() - expected) < 0.05


def test_permutation_is_the_same_for_all_channels_of_a_series():
    """A well-known library permutes one channel and writes it over all others."""
    step = torch.arange(12.0)
    x = torch.stack([step, step + 100, step + 200]).expand(50, 3, 12)
    permuted = ops.Permutation(5)(x, seeded())
    assert torch.equal(permuted[:, 1], permuted[:, 0] + 100)
    assert torch.equal(permuted[:, 2], permuted[:, 0] + 200)
    assert not torch.equal(permuted, x)


def test_missing_values_move_with_their_step():
    x = torch.arange(12.0).expand(20, 2, 12).clone()
    x[:, 1, 6] = NAN
    permuted = ops.Permutation(5)(x, seeded())
    assert torch.equal(permuted[:, 1].isnan(), permuted[:, 0] == 6)


def test_crop_resize_returns_a_window_of_the_given_share_from_end_to_end():
    x = torch.arange(101.0).expand(500, 1, 101)
    cropped = ops.CropResize((0.4, 0.7))(x, seeded())[:, 0]
    share = (cropped[:, -1] - cropped[:, 0]) / 100
    assert 0.4 <= share.min() < 0.41
    assert 0.69 < share.max() <= 0.7 + 1e-4
    assert cropped.min() >= 0
    assert cropped.max() <= 100
    assert cropped[:, 0].min() < 2
    assert cropped[:, -1].max() > 98
    even = torch.lerp(cropped[:, :1], cropped[:, -1:], torch.linspace(0, 1, 101))
    torch.testing.assert_close(cropped, even)


def test_time_mask_masks_one_span_up_to_the_given_share_of_each_length():
    x = torch.ones(1000, 2, 40)
    x[500:, :, 20:] = NAN
    masked = ops.TimeMask(0.25, p=0.5)(x, seeded())
    assert torch.equal(masked[:, 0].isnan(), masked[:, 1].isnan())
    span = masked[:, 0].isnan() & ~x[:, 0].isnan()
    width = span.sum(1)
    edges = span.int().diff(dim=1, prepend=torch.zeros(1000, 1), append=torch.zeros(1000, 1)).abs().sum(1)
    assert set(edges.tolist()) == {0, 2}
    assert width[:500].unique().tolist() == list(range(11))
    assert width[500:].unique().tolist() == list(range(6))
    # Half of the samples are masked, of which 1 in 11 (1 in 6) draws the width 0.
    assert abs((width[:500] > 0).float().mean() - 10 / 22) < 4 * math.sqrt(0.25 / 500)
    assert span[:500, 0].any()
    assert span[:500, 39].any()


def test_channel_drop_drops_the_given_share_and_never_all():
    x = some_series([12] * 500, channels=4, gaps=False)
    dropped = (ops.ChannelDrop(0.3)(x, seeded()) == 0).all(2)
    assert not dropped.all(1).any()
    # 0.3, less one channel where all four would be dropped.
    assert abs(dropped.float().mean() - (0.3 - 0.3**4 / 4)) < 4 * math.sqrt(0.21 / 2000)
    all_but_one = (ops.ChannelDrop(1.0)(x, seeded()) == 0).all(2)
    assert (all_but_one.sum(1) == 3).all()
    assert all_but_one.float().mean(0).max() < 0.85


def test_channel_drop_never_drops_the_only_observed_channel():
    x = torch.full((200, 3, 5), NAN)
    x[:, 1] = 2.0
    assert same(ops.ChannelDrop(1.0)(x, seeded()), x)


def test_time_warp_is_increasing_from_the_first_to_the_last_step():
    x = torch.arange(50.0).expand(100, 1, 50).clone()
    x[50:, :, 30:] = NAN
    warped = ops.TimeWarp(0.5)(x, seeded())[:, 0]
    assert warped[:, 0].abs().max() == 0
    torch.testing.assert_close(warped[:50, 49], torch.full((50,), 49.0))
    torch.testing.assert_close(warped[50:, 29], torch.full((50,), 29.0))
    assert (warped[:50].diff(dim=1) > 0).all()
    assert (warped[:50] - x[:50, 0]).abs().max() > 2


def test_magnitude_warp_multiplies_by_a_piecewise_linear_curve():
    factors = ops.MagnitudeWarp(0.3, knots=3)(torch.ones(500, 2, 41), seeded())
    assert abs(factors[:, :, 20].std() - 0.3) < 0.03
    bends = factors.diff(dim=2).diff(dim=2).abs() > 1e-5
    assert not bends[:, :, :19].any()
    assert bends[:, :, 19].float().mean() > 0.99


# --- properties of every operation -----------------------------------------------------------------------------------

NEVER_ADDS_GAPS = ["jitter", "scaling", "permutation", "channel_drop", "magnitude_warp"]


@pytest.mark.parametrize("name", SERIES_OPERATIONS)
def test_padding_stays_at_the_end_and_the_input_is_not_modified(name):
    x = some_series()
    before, state = x.clone(), torch.get_rng_state()
    view = VIEWS[name]()(x, seeded(4))
    assert view.dtype == torch.float32
    assert view.shape == x.shape
    for i, length in enumerate(LENGTHS):
        assert view[i, :, length:].isnan().all()
        assert not view[i].isnan().all()
    assert not view.isinf().any()
    assert same(x, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", NEVER_ADDS_GAPS)
def test_the_number_of_observations_does_not_change(name):
    x = some_series()
    view = VIEWS[name]()(x, seeded(4))
    assert torch.equal((~view.isnan()).sum((1, 2)), (~x.isnan()).sum((1, 2)))


@pytest.mark.parametrize("name", [name for name in SERIES_OPERATIONS if name != "jitter"])
def test_padding_changes_nothing(name):
    """A batch with more padding has the same views of the same steps, except for jitter's one number per step."""
    x = some_series()
    longer = torch.cat([x, torch.full((6, 3, 9), NAN)], 2)
    torch.testing.assert_close(
        VIEWS[name]()(longer, seeded(4))[:, :, :12], VIEWS[name]()(x, seeded(4)), equal_nan=True, atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("name", SERIES_OPERATIONS)
def test_the_result_is_a_function_of_the_seed(name):
    x = some_series([30] * 16, channels=6, steps=30)
    operation = VIEWS[name]()
    assert same(operation(x, seeded(5)), operation(x, seeded(5)))
    assert not same(operation(x, seeded(5)), operation(x, seeded(6)))


@pytest.mark.parametrize("name", SERIES_OPERATIONS)
def test_an_operation_never_synchronises_with_the_device(name):
    """A tensor on the meta device has no values: reading one, or mixing devices, raises an error."""
    x = torch.empty(4, 3, 16, device="meta")
    assert VIEWS[name]()(x, None).shape == x.shape


@pytest.mark.parametrize("name", [name for name in SERIES_OPERATIONS if name != "channel_drop"])
def test_equal_samples_are_changed_differently(name):
    x = torch.arange(60.0).add(1).expand(32, 2, 60)
    arguments = {"time_mask": {"p": 1.0}, "permutation": {"max_segments": 8}}.get(name, {})
    view = VIEWS[name](**arguments)(x, seeded()).nan_to_num(nan=1e9)
    assert len({tuple(sample.flatten().tolist()) for sample in view}) > 20


@pytest.mark.parametrize("name", SERIES_OPERATIONS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 30), (3, 1, 2)])
def test_the_smallest_batches_work(name, shape):
    view = VIEWS[name]()(torch.ones(shape), seeded())
    assert view.shape == shape
    assert not view.flatten(1).isnan().all(1).any()


@pytest.mark.parametrize("name", SERIES_OPERATIONS)
def test_a_series_with_every_second_value_missing_keeps_an_observation(name):
    x = torch.ones(20, 1, 21)
    x[:, :, 1::2] = NAN
    view = VIEWS[name]()(x, seeded())
    assert not view.isnan().all(2).any()


@pytest.mark.parametrize("name", SERIES_OPERATIONS)
def test_a_single_observation_among_gaps_is_never_removed(name):
    x = torch.full((500, 2, 20), NAN)
    x[:, 1, 13] = 1.0
    view = VIEWS[name]()(x, seeded())
    assert torch.equal((~view.isnan()).sum((1, 2)), torch.ones(500, dtype=torch.int64))


@pytest.mark.parametrize("name", SERIES_OPERATIONS)
def test_a_series_without_observations_does_not_change(name):
    assert VIEWS[name]()(torch.full((2, 2, 5), NAN), seeded()).isnan().all()


@pytest.mark.parametrize(
    ("name", "arguments", "word"),
    [
        ("jitter", {"sigma": -0.1}, "sigma"),
        ("scaling", {"sigma": float("inf")}, "sigma"),
        ("permutation", {"max_segments": 0}, "max_segments"),
        ("crop_resize", {"scale": [0.5, 1.5]}, "scale"),
        ("time_mask", {"share": 1.0}, "share"),
        ("channel_drop", {"p": -1}, "p is a share"),
        ("magnitude_warp", {"knots": 1}, "knots"),
        ("time_warp", {"knots": 1}, "knots"),
    ],
)
def test_impossible_arguments_are_refused_by_name(name, arguments, word):
    with pytest.raises(InputError, match=word):
        VIEWS.build({"name": name, **arguments}, where="views[0]")
