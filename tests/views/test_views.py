"""Views from recipes and from lists, and the error messages for what does not fit."""

import pytest
import torch

from contrast.core.registry import InputError
from contrast.views import RECIPES, VIEWS, Views, build_views
from contrast.views.views import RECIPE_KINDS

SHAPES = {"image": (3, 32, 32), "series": (2, 40)}
FITTING = [(name, kind) for name in RECIPES for kind in sorted(RECIPE_KINDS[name])]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def a_batch(kind, samples=8):
    return torch.rand(samples, *SHAPES[kind], generator=seeded(1))


@pytest.mark.parametrize(("name", "kind"), FITTING)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_recipe_returns_the_requested_number_of_views(name, kind, count):
    x = a_batch(kind)
    before = x.clone()
    views = build_views({"name": name, "count": count}, SHAPES[kind], kind)
    assert isinstance(views, Views)
    drawn = views(x, seeded())
    assert len(views) == len(drawn) == count
    assert torch.equal(x, before)
    for view in drawn:
        assert view.dtype == torch.float32
        assert view.shape == x.shape
        assert view.data_ptr() != x.data_ptr()
    assert views.output_shapes(SHAPES[kind]) == [SHAPES[kind]] * count
    if name != "none":
        assert all(not torch.equal(drawn[i], drawn[j]) for i in range(count) for j in range(i))
        assert all(not torch.equal(view, x) for view in drawn)


@pytest.mark.parametrize("kind", ["image", "series"])
def test_none_returns_equal_copies(kind):
    x = a_batch(kind)
    first, second = build_views("none", SHAPES[kind], kind)(x, seeded())
    assert torch.equal(first, x)
    assert torch.equal(second, x)
    first.zero_()
    assert torch.equal(second, x)


@pytest.mark.parametrize(("name", "kind"), FITTING)
def test_all_views_are_a_function_of_the_seed(name, kind):
    views = build_views(name, SHAPES[kind], kind)
    x = a_batch(kind)

    def draw(seed):
        return torch.stack(views(x, seeded(seed))).nan_to_num(nan=1e9)

    assert torch.equal(draw(3), draw(3))
    assert (name == "none") == torch.equal(draw(3), draw(4))


def names_of(view):
    return [type(operation).__name__ for operation in view.operations]


def test_simclr_blurs_and_crops_more_strongly_above_64_pixels():
    small, large = (build_views("simclr", (3, side, side), "image").views[0] for side in (64, 65))
    assert "GaussianBlur" not in names_of(small)
    assert "GaussianBlur" in names_of(large)
    assert small.operations[0].scale == (0.2, 1.0)
    assert large.operations[0].scale == (0.08, 1.0)
    assert (small.operations[2].brightness, small.operations[2].hue) == (0.4, 0.1)
    assert (large.operations[2].brightness, large.operations[2].hue) == (0.8, 0.2)


def test_moco_v3_alternates_between_two_sequences():
    views = build_views({"name": "moco_v3", "count": 3}, (3, 96, 96), "image").views
    assert "Solarise" not in names_of(views[0])
    assert "Solarise" in names_of(views[1])
    assert names_of(views[2]) == names_of(views[0])
    blurs = [next(op for op in view.operations if type(op).__name__ == "GaussianBlur").p for view in views]
    assert blurs == [1.0, 0.1, 1.0]


def test_cacr_always_jitters_and_never_blurs():
    view = build_views("cacr", (3, 96, 96), "image").views[0]
    jitter = next(op for op in view.operations if type(op).__name__ == "ColourJitter")
    assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue, jitter.p) == (0.4, 0.4, 0.4, 0.4, 1.0)
    assert "GaussianBlur" not in names_of(view)


def test_small_images_are_not_flipped_by_default():
    """An image that is dark on the left and bright on the right stays so."""
    x = torch.linspace(0, 1, 28).expand(200, 1, 28, 28)

    def flipped_share(part):
        (view, _) = build_views(part, (1, 28, 28), "image")(x, seeded())
        return (view[:, :, 7:21, 4:14].mean((1, 2, 3)) > view[:, :, 7:21, 14:24].mean((1, 2, 3))).float().mean().item()

    assert flipped_share("small_images") == 0
    assert 0.3 < flipped_share({"name": "small_images", "flip": 0.5}) < 0.7


def test_images_without_colours_are_not_made_grey():
    for channels in (1, 2, 5):
        assert "Greyscale" not in names_of(build_views("simclr", (channels, 32, 32), "image").views[0])


def test_large_images_are_cropped_to_224_pixels_and_others_are_not():
    assert build_views("simclr", (3, 300, 260), "image").output_shapes((3, 300, 260)) == [(3, 224, 224)] * 2
    assert build_views("simclr", (3, 100, 500), "image").output_shapes((3, 100, 500)) == [(3, 100, 100)] * 2
    assert build_views("simclr", (3, 96, 128), "image").output_shapes((3, 96, 128)) == [(3, 96, 128)] * 2
    views = build_views({"name": "simclr", "size": 16}, (3, 32, 32), "image")
    assert [view.shape for view in views(a_batch("image"), seeded())] == [(8, 3, 16, 16)] * 2


def test_strength_zero_changes_no_series():
    x = a_batch("series")
    for view in build_views({"name": "series", "strength": 0}, (2, 40), "series")(x, seeded()):
        torch.testing.assert_close(view, x)


def test_series_have_finite_observations_at_any_strength():
    x = a_batch("series")
    part = {"name": "series", "strength": 50.0, "segments": 5, "drop": 0.5}
    for view in build_views(part, (2, 40), "series")(x, seeded()):
        assert not view.flatten(1).isnan().all(1).any()
        assert not view.isinf().any()


def test_a_list_of_operations_makes_two_views_and_a_list_of_lists_one_each():
    x = a_batch("image")
    flip = {"name": "horizontal_flip", "p": 1.0}
    both = build_views([flip, "solarise"], (3, 32, 32), "image")
    assert [names_of(view) for view in both.views] == [["HorizontalFlip", "Solarise"]] * 2
    first, second, third = build_views([[flip], [], [flip, flip]], (3, 32, 32), "image")(x, seeded())
    assert torch.equal(first, x.flip(-1))
    assert torch.equal(second, x)
    assert torch.equal(third, x)


def test_views_ignore_autocast_and_have_no_gradient():
    x = a_batch("image").requires_grad_()
    views = build_views("simclr", (3, 32, 32), "image")
    plain = views(x, seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = views(x, seeded())
    assert all(view.dtype == torch.float32 and not view.requires_grad for view in cast)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_views_have_an_empty_state_dict():
    assert build_views("simclr", (3, 96, 96), "image").state_dict() == {}


@pytest.mark.parametrize("name", VIEWS)
def test_every_operation_names_its_kinds_of_data(name):
    assert VIEWS[name].kinds <= {"image", "series"}
    assert VIEWS[name].kinds


@pytest.mark.parametrize(
    ("part", "kind", "words"),
    [
        ("simclr", "series", ["views", "simclr", "for images", "data are series", "series, series_weak"]),
        ("series", "image", ["views", "for series", "data are images", "simclr"]),
        (["horizontal_flip", "jitter"], "image", ["views[1]", "'jitter' is for series", "data are images"]),
        ([["jitter"], ["affine"]], "series", ["views[1][0]", "'affine' is for images", "time_mask"]),
        ("simlcr", "image", ["views", "simlcr", "Did you mean 'simclr'"]),
        ("digits", "image", ["'small_images'"]),
        ("jitter", "series", ["'jitter' is an operation", "[jitter, ...]"]),
        ({"name": "simclr", "stregth": 1}, "image", ["views.stregth", "'strength'"]),
        ({"name": "simclr", "strength": "high"}, "image", ["views.strength", "a number", "'high'"]),
        ({"name": "simclr", "strength": -1.0}, "image", ["views", "strength", "-1.0"]),
        ({"name": "simclr", "count": 0}, "image", ["views", "count", "at least 1", "0"]),
        ({"name": "simclr", "smallest_crop": 0.0}, "image", ["smallest_crop", "0.0"]),
        ({"name": "small_images", "zoom": 1.0}, "image", ["views", "zoom", "1.0"]),
        ({"name": "small_images", "strength": -1}, "image", ["views", "strength", "-1"]),
        ({"name": "series", "strength": -1}, "series", ["strength", "-1"]),
        ({"name": "series", "smallest_crop": 0}, "series", ["smallest_crop"]),
        ({"name": "simclr", "size": 64}, "image", ["views.size", "at most 32", "got 64"]),
        ([{"name": "random_resized_crop", "size": 33}], "image", ["views.size", "at most 32", "got 33"]),
        ([{"name": "affine", "degree": 3}], "image", ["views[0].degree", "'degrees'"]),
        ([], "image", ["views", "at least one"]),
        (3, "image", ["views", "got 3"]),
        (["affine", ["affine"]], "image", ["views", "mixes"]),
        ({"count": 2}, "image", ["views", "name"]),
    ],
)
def test_views_that_do_not_fit_are_refused_in_one_line(part, kind, words):
    with pytest.raises(InputError) as refused:
        build_views(part, SHAPES[kind], kind)
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)


def test_the_second_of_two_crops_is_checked_against_the_size_after_the_first():
    crops = [{"name": "random_resized_crop", "size": 16}, {"name": "random_resized_crop", "size": 20}]
    with pytest.raises(InputError, match="at most 16"):
        build_views(crops, (3, 32, 32), "image")
