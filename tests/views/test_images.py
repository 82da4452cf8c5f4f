"""The operations on images, each against torchvision's functional form applied to one image at a time."""

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as torchvision
from torchvision.transforms.v2 import functional as reference

from contrast.core.registry import InputError
from contrast.views import VIEWS
from contrast.views import images as ops

IMAGE_OPERATIONS = [name for name, operation in VIEWS.items() if "image" in operation.kinds]
ALWAYS = {"p": 1.0}
ALL_CHANGED = {
    "random_resized_crop": {},
    "horizontal_flip": ALWAYS,
    "vertical_flip": ALWAYS,
    "colour_jitter": ALWAYS,
    "greyscale": ALWAYS,
    "gaussian_blur": ALWAYS,
    "solarise": ALWAYS,
    "affine": ALWAYS,
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def some_images(samples=6, channels=3, height=20, width=24, seed=1):
    return torch.rand(samples, channels, height, width, generator=seeded(seed))


def one_by_one(function, x, *arguments):
    return torch.cat([function(x[i : i + 1], *(a[i] for a in arguments)) for i in range(len(x))])


def test_this_file_lists_every_operation_on_images():
    assert set(IMAGE_OPERATIONS) == set(ALL_CHANGED)


# --- each deterministic function against torchvision -----------------------------------------------------------------


@pytest.mark.parametrize("size", [(7, 9), (20, 24), (16, 16), (40, 30)])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_crop_equals_torchvisions_antialiased_resized_crop(size, channels):
    x = some_images(channels=channels)
    boxes = torch.tensor([[0, 0, 20, 24], [3, 5, 10, 12], [19, 23, 1, 1], [0, 4, 20, 3], [2, 0, 5, 24], [9, 9, 7, 9]])

    def expected(image, box):
        return reference.resized_crop(image, *box.tolist(), size=list(size), antialias=True)

    torch.testing.assert_close(ops.crop(x, boxes, size), one_by_one(expected, x, boxes), atol=2e-6, rtol=0)


def test_a_crop_of_the_full_image_is_the_image():
    x = some_images()
    boxes = torch.tensor([[0, 0, 20, 24]]).expand(6, 4)
    assert torch.equal(ops.crop(x, boxes, (20, 24)), x)


FACTORS = torch.tensor([0.0, 0.3, 0.9, 1.0, 1.4, 2.5])


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("brightness", 1e-6), ("contrast", 3e-4), ("saturation", 3e-4)],  # torchvision rounds the weight of red to 0.2989
)
def test_each_factor_has_torchvisions_effect(name, tolerance):
    x = some_images()

    def expected(image, factor):
        return getattr(reference, f"adjust_{name}")(image, factor.item())

    adjusted = ops.adjust(x, **{name: FACTORS})
    torch.testing.assert_close(adjusted, one_by_one(expected, x, FACTORS), atol=tolerance, rtol=0)


def test_saturation_and_contrast_are_blends_with_grey_and_with_its_mean():
    x = some_images(samples=2).double()
    grey = (0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])[:, None]
    factor = torch.tensor([0.5, 1.7]).double()
    f = factor.view(2, 1, 1, 1)
    saturated = (f * x + (1 - f) * grey).clamp(0, 1)
    contrasted = (f * x + (1 - f) * grey.mean((1, 2, 3), keepdim=True)).clamp(0, 1)
    torch.testing.assert_close(ops.adjust(x, saturation=factor), saturated, atol=1e-12, rtol=0)
    torch.testing.assert_close(ops.adjust(x, contrast=factor), contrasted, atol=1e-12, rtol=0)


def test_hue_equals_torchvisions_also_for_grey_black_white_and_pure_colours():
    x = some_images(samples=7)
    x[:, :, 0, :8] = torch.tensor(
        [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1], [1, 1, 1], [0, 0, 0]]
    ).T.float()
    x[:, :, 1] = 0.4
    turns = torch.tensor([-0.5, -0.2, -1 / 6, 0.0, 0.1, 1 / 3, 0.5])

    def expected(image, turn):
        return reference.adjust_hue(image, turn.item())

    torch.testing.assert_close(ops.adjust(x, hue=turns), one_by_one(expected, x, turns), atol=5e-6, rtol=0)


def test_each_sample_is_adjusted_in_its_own_order():
    x = some_images(samples=6)
    factors = dict(
        zip(("brightness", "contrast", "saturation"), (FACTORS + 0.2, FACTORS.flip(0), FACTORS), strict=True)
    )
    orders = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
    turns = torch.linspace(-0.4, 0.4, 6)
    adjusted = ops.adjust(x, **factors, hue=turns, order=orders)
    for i, order in enumerate(orders.tolist()):
        single = x[i : i + 1]
        for kind in order:
            name = list(factors)[kind]
            single = ops.adjust(single, **{name: factors[name][i : i + 1]})
        single = ops.adjust(single, hue=turns[i : i + 1])
        torch.testing.assert_close(adjusted[i : i + 1], single)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_contrast_of_images_without_colours_blends_with_the_mean_of_all_channels(channels):
    x = some_images(samples=2, channels=channels)
    mean = x.mean((1, 2, 3), keepdim=True)
    expected = (1.5 * x - 0.5 * mean).clamp(0, 1)
    torch.testing.assert_close(ops.adjust(x, contrast=torch.full((2,), 1.5)), expected)


def test_grey_equals_torchvisions_up_to_the_rounding_of_its_weights():
    x = some_images()
    torch.testing.assert_close(ops.grey(x), reference.rgb_to_grayscale(x), atol=1.1e-4, rtol=0)
    torch.testing.assert_close(ops.grey(torch.ones(1, 3, 2, 2)), torch.ones(1, 1, 2, 2))


@pytest.mark.parametrize("kernel", [3, 5, 11])
@pytest.mark.parametrize("size", [(20, 24), (16, 16), (6, 9)])
def test_blur_equals_torchvisions(kernel, size):
    x = some_images(height=size[0], width=size[1])
    sigma = torch.tensor([0.1, 0.4, 0.8, 1.0, 2.0, 5.0])

    def expected(image, width):
        return reference.gaussian_blur(image, [kernel, kernel], [width.item(), width.item()])

    torch.testing.assert_close(ops.blur(x, sigma, kernel), one_by_one(expected, x, sigma), atol=2e-6, rtol=0)


def test_solarise_equals_torchvisions():
    x = some_images()
    x[0, 0, 0, 0] = 0.25
    assert torch.equal(ops.Solarise(0.25, p=1)(x, seeded()), reference.solarize(x, 0.25))


@pytest.mark.parametrize("size", [(20, 24), (16, 16)])
def test_transform_equals_torchvisions_affine(size):
    x = some_images(height=size[0], width=size[1])
    degrees = torch.tensor([0.0, 30.0, -15.0, 90.0, 0.0, 77.0])
    translate = torch.tensor([[0.0, 0.0], [3.0, -2.0], [0.0, 0.0], [1.0, 1.0], [-4.0, 6.0], [2.0, 5.0]])
    scale = torch.tensor([1.0, 0.7, 1.3, 1.0, 1.0, 2.0])
    shear = torch.tensor([0.0, 10.0, 0.0, -20.0, 30.0, 5.0])

    def expected(image, angle, shift, zoom, slope):
        return reference.affine(
            image, angle.item(), shift.tolist(), zoom.item(), [slope.item(), 0.0], InterpolationMode.BILINEAR
        )

    transformed = ops.transform(x, degrees, translate, scale, shear)
    torch.testing.assert_close(
        transformed, one_by_one(expected, x, degrees, translate, scale, shear), atol=3e-5, rtol=0
    )


def test_flips_equal_torchvisions():
    x = some_images()
    assert torch.equal(ops.HorizontalFlip(1)(x, seeded()), reference.horizontal_flip(x))
    assert torch.equal(ops.VerticalFlip(1)(x, seeded()), reference.vertical_flip(x))


# --- distributions of the random numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 32), (8, 8), (20, 50)])
def test_boxes_have_the_distribution_of_torchvisions(shape):
    """Two samples of 4,000 boxes: each quantile of area, ratio and corner agrees within sampling error."""
    height, width = shape
    crop = ops.RandomResizedCrop(scale=(0.2, 1.0))
    ours = crop.boxes(torch.empty(4000, 1, height, width), seeded()).numpy()
    theirs = torchvision.RandomResizedCrop(8, scale=(0.2, 1.0))
    image = torch.empty(1, height, width)
    torch.manual_seed(0)
    drawn = [theirs.make_params([image]) for _ in range(4000)]
    theirs = np.array([[box[key] for key in ("top", "left", "height", "width")] for box in drawn])
    for column in range(4):
        levels = np.union1d(ours[:, column], theirs[:, column])
        shares = [(values[:, column, None] <= levels).mean(0) for values in (ours, theirs)]
        # Kolmogorov-Smirnov: 1.95 sqrt(2 / n) is exceeded once in a thousand draws.
        assert np.abs(shares[0] - shares[1]).max() < 1.95 * math.sqrt(2 / 4000)


def test_boxes_are_integer_pixels_inside_the_image_with_the_given_areas_and_ratios():
    boxes = ops.RandomResizedCrop(scale=(0.3, 0.6)).boxes(torch.empty(3000, 1, 60, 80), seeded())
    top, left, height, width = boxes.unbind(1)
    assert torch.equal(boxes, boxes.round())
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 60).all()
    assert (left + width <= 80).all()
    area = height * width / (60 * 80)
    assert 0.28 < area.min() < 0.32
    assert 0.57 < area.max() < 0.63
    assert abs(area.mean() - 0.45) < 0.01
    ratio = (width / height).log()
    assert ratio.abs().max() < math.log(4 / 3) + 0.05
    assert abs(ratio.mean()) < 0.01


def test_if_no_box_fits_the_centre_is_used():
    """A strip of 4 x 100 has no box of 90 % of its area with a ratio of at most 4/3: 4 x 5 in the middle is used."""
    boxes = ops.RandomResizedCrop(scale=(0.9, 1.0)).boxes(torch.empty(5, 1, 4, 100), seeded())
    assert boxes.tolist() == [[0, 47, 4, 5]] * 5
    boxes = ops.RandomResizedCrop(scale=(0.9, 1.0)).boxes(torch.empty(5, 1, 100, 4), seeded())
    assert boxes.tolist() == [[47, 0, 5, 4]] * 5


@pytest.mark.parametrize(
    "name", ["horizontal_flip", "vertical_flip", "colour_jitter", "greyscale", "gaussian_blur", "solarise", "affine"]
)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_a_share_p_is_changed_and_the_others_are_identical_bit_for_bit(name, p):
    x = some_images(samples=400, height=8, width=8)
    arguments = {"sigma": (1.0, 2.0)} if name == "gaussian_blur" else {}  # a smaller one may change no bit
    changed = (VIEWS[name](p=p, **arguments)(x, seeded()) != x).flatten(1).any(1).float().mean().item()
    # Four standard deviations of a share over 400 draws.
    assert abs(changed - p) <= 4 * math.sqrt(p * (1 - p) / 400)


def test_jitter_draws_factors_uniformly_from_the_given_range():
    x = torch.full((2000, 1, 2, 2), 0.5)
    factors = ops.ColourJitter(0.4, 0, 0, 0, p=1)(x, seeded())[:, 0, 0, 0] / 0.5
    assert 0.6 <= factors.min() < 0.61
    assert 1.39 < factors.max() <= 1.4
    assert abs(factors.mean() - 1) < 4 * 0.8 / math.sqrt(12 * 2000)


def test_jitter_adds_no_colour_to_a_grey_image_and_does_not_mix_channels_without_colours():
    grey = some_images(channels=1).expand(-1, 3, -1, -1)
    jittered = ops.ColourJitter(0.4, 0.4, 0.4, 0.5, p=1)(grey, seeded())
    torch.testing.assert_close(jittered[:, :1].expand(-1, 3, -1, -1), jittered)
    x = torch.zeros(50, 5, 4, 4)
    x[:, 2] = 0.5
    jittered = ops.ColourJitter(0.4, 0, 0.9, 0.5, p=1)(x, seeded())
    assert jittered[:, [0, 1, 3, 4]].abs().max() == 0


def test_every_order_is_drawn_equally_often(monkeypatch):
    drawn = {}
    monkeypatch.setattr(ops, "adjust", lambda x, **arguments: drawn.update(arguments) or x)
    ops.ColourJitter()(torch.zeros(3000, 3, 1, 1), seeded())
    _, counts = drawn["order"].unique(dim=0, return_counts=True)
    assert len(counts) == 6
    # Four standard deviations of a count of 500 among 3,000.
    assert (counts - 500).abs().max() < 4 * math.sqrt(3000 * 5 / 36)


@pytest.mark.parametrize(("size", "kernel"), [(8, 3), (32, 3), (224, 23), (2, 3), (1, 1)])
def test_the_blur_kernel_is_about_a_tenth_of_the_image(size, kernel):
    x = torch.zeros(1, 1, size, size)
    x[:, :, size // 2, size // 2] = 1
    blurred = ops.GaussianBlur(sigma=(50, 50), p=1)(x, seeded())
    assert (blurred[0, 0, size // 2] > 0).sum() == min(kernel, size)


# --- properties of every operation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IMAGE_OPERATIONS)
@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (5, 1, 8, 8), (4, 3, 12, 20), (3, 4, 9, 7), (2, 1, 1, 1)])
def test_views_are_float32_finite_and_in_range_and_the_input_is_not_modified(name, shape):
    x = torch.rand(shape, generator=seeded())
    x[0].clamp_(0.9).round_()
    before, state = x.clone(), torch.get_rng_state()
    view = VIEWS[name](**ALL_CHANGED[name])(x, seeded(3))
    assert view.dtype == torch.float32
    assert view.shape == x.shape
    assert view.isfinite().all()
    assert view.min() >= 0
    assert view.max() <= 1
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", IMAGE_OPERATIONS)
def test_the_result_is_a_function_of_the_seed(name):
    x = some_images(samples=16)
    operation = VIEWS[name]()
    assert torch.equal(operation(x, seeded(5)), operation(x, seeded(5)))
    assert not torch.equal(operation(x, seeded(5)), operation(x, seeded(6)))


@pytest.mark.parametrize("name", IMAGE_OPERATIONS)
def test_an_operation_never_synchronises_with_the_device(name):
    """A tensor on the meta device has no values: reading one, or mixing devices, raises an error."""
    x = torch.empty(4, 3, 16, 16, device="meta")
    assert VIEWS[name]()(x, None).shape == x.shape


@pytest.mark.parametrize("name", ["random_resized_crop", "colour_jitter", "gaussian_blur", "affine"])
def test_equal_samples_are_changed_differently(name):
    x = some_images(samples=1).expand(8, -1, -1, -1)
    view = VIEWS[name](**ALL_CHANGED[name])(x, seeded())
    assert all(not torch.equal(view[i], view[j]) for i in range(8) for j in range(i))


@pytest.mark.parametrize(
    ("name", "arguments", "word"),
    [
        ("random_resized_crop", {"scale": [0.0, 1.0]}, "scale"),
        ("random_resized_crop", {"scale": [0.5, 1.2]}, "scale"),
        ("random_resized_crop", {"ratio": [2.0, 1.0]}, "ratio"),
        ("random_resized_crop", {"size": 0}, "size"),
        ("horizontal_flip", {"p": 1.1}, "p is a share"),
        ("colour_jitter", {"hue": 0.6}, "hue"),
        ("colour_jitter", {"contrast": -1}, "contrast"),
        ("gaussian_blur", {"sigma": [0.0, 1.0]}, "sigma"),
        ("solarise", {"threshold": 2.0}, "threshold"),
        ("affine", {"degrees": 400}, "degrees"),
        ("affine", {"translate": -0.1}, "translate"),
    ],
)
def test_impossible_arguments_are_refused_by_name(name, arguments, word):
    with pytest.raises(InputError, match=word):
        VIEWS.build({"name": name, **arguments}, where="views[0]")
