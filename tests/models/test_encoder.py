import math

import pytest
import torch
from torch import nn

from contrast.core.registry import InputError
from contrast.models.encoder import Encoder, ImageInputs, SeriesInputs, build_encoder

SHAPE = (1, 8, 8)
INPUTS = {"value_range": (0, 16), "mean": [0.3], "std": [0.4]}


def encoder(head="mlp", **options):
    torch.manual_seed(0)
    backbone = {"name": "small_conv", "width": 4, "blocks": [1, 1]}
    return build_encoder(backbone, head, shape=SHAPE, kind="image", inputs=ImageInputs(**INPUTS), **options)


def views(count=2, samples=5):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(samples, *SHAPE, generator=generator) for _ in range(count)]


def test_an_encoder_projects_every_view():
    out = encoder()(views(3))
    assert [z.shape for z in out.z] == [(5, 128)] * 3
    assert [features.shape for features in out.features] == [(5, 8)] * 3
    assert out.targets is None


def test_features_do_not_depend_on_the_head():
    model = encoder().eval()
    before = model.features(views()[0])
    for parameter in model.head.parameters():
        parameter.data.fill_(float("nan"))
    assert torch.equal(model.features(views()[0]), before)
    assert before.shape == (5, model.width)


def test_raw_data_is_prepared_then_encoded():
    model = encoder().eval()
    raw = torch.randint(0, 17, (5, *SHAPE), dtype=torch.uint8)
    torch.testing.assert_close(model.encode(raw), model.backbone((raw.float() / 16 - 0.3) / 0.4))


def test_joint_encoding_is_one_batch_of_all_views():
    model = encoder()
    joint = model(views())
    concatenated = model(torch.cat(views())[None].unbind())
    torch.testing.assert_close(torch.cat(joint.z), concatenated.z[0])
    model.joint = False
    first_only = model([views()[0]])
    separate = model(views())
    torch.testing.assert_close(separate.z[0], first_only.z[0])
    assert not torch.allclose(separate.z[0], joint.z[0])


def test_views_of_different_size_keep_their_order():
    model = encoder().eval()
    large = views(2)
    small = torch.rand(3, 1, 6, 6)
    out = model([large[0], small, large[1]])
    for z, view in zip(out.z, [large[0], small, large[1]], strict=True):
        torch.testing.assert_close(z, model.head(model.features(view)))


def test_many_heads_are_split_along_their_samples():
    model = encoder({"name": "multi_head", "heads": 3, "out": 4}).eval()
    out = model(views())
    assert [z.shape for z in out.z] == [(3, 5, 4)] * 2
    torch.testing.assert_close(out.z[1], model.head(model.features(views()[1])))


def test_with_a_predictor_only_the_targets_are_projections_without_gradient():
    model = encoder(predictor={"name": "mlp", "hidden": 3}).eval()
    out = model(views())
    projection = model.head(model.features(views()[1]))
    torch.testing.assert_close(out.targets[1], projection)
    torch.testing.assert_close(out.z[1], model.predictor(projection))
    assert not any(target.requires_grad for target in out.targets)


def test_a_twin_is_initially_equal_and_has_no_gradient():
    model = encoder(momentum=0.9, predictor="mlp").eval()
    out = model(views())
    torch.testing.assert_close(out.targets[0], model.head(model.features(views()[0])))
    torch.testing.assert_close(out.z[0], model.predictor(out.targets[0]))
    sum(z.sum() for z in out.z).backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.twin.parameters())
    assert all(parameter.grad is not None for parameter in model.backbone.parameters())


@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
def test_the_twin_is_a_moving_average_with_a_cosine_momentum(progress):
    model = encoder(momentum=0.6)
    before = [parameter.clone() for parameter in model.twin.parameters()]
    model(views())
    with torch.no_grad():
        for value in (*model.backbone.parameters(), *model.backbone.buffers()):
            value += 1
    model.update_twin(progress)
    momentum = 1 - 0.5 * (1 + math.cos(math.pi * progress)) * (1 - 0.6)  # as in the code of MoCo v3
    online = [*model.backbone.parameters(), *model.head.parameters()]
    for twin, old, new in zip(model.twin.parameters(), before, online, strict=True):
        torch.testing.assert_close(twin, momentum * old + (1 - momentum) * new)
    for twin, new in zip(model.twin["backbone"].buffers(), model.backbone.buffers(), strict=True):
        assert torch.equal(twin, new)


def test_the_twin_is_saved_with_the_encoder():
    model, other = encoder(momentum=0.9), encoder(momentum=0.9)
    for parameter in model.twin.parameters():
        parameter.data += 1
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.eval()(views()).targets, model.eval()(views()).targets)


def test_the_twin_is_in_training_mode_with_the_rest():
    model = encoder(momentum=0.9).train()
    assert all(module.training for module in model.twin.modules())


def test_a_momentum_above_one_is_refused():
    with pytest.raises(InputError, match=r"encoder\.momentum.*got 1\.5"):
        encoder(momentum=1.5)


def test_a_predictor_must_fit_the_head():
    with pytest.raises(InputError, match="as many output dimensions as the head, 128; got 64"):
        encoder(predictor={"name": "mlp", "out": 64})
    with pytest.raises(InputError, match="follows one head"):
        encoder("multi_head", predictor="mlp")


def test_features_of_a_series_do_not_depend_on_padding_and_gaps_are_the_training_mean():
    torch.manual_seed(0)
    model = build_encoder(
        {"name": "resnet1d", "width": 4}, shape=(2, 30), kind="series", inputs=SeriesInputs([1.0, 2.0], [3.0, 4.0])
    ).eval()
    raw = torch.randn(3, 2, 20)
    padded = torch.nn.functional.pad(raw, (0, 10), value=float("nan"))
    torch.testing.assert_close(model.encode(padded), model.encode(raw))
    gap = raw.clone()
    gap[0, 0, 4] = float("nan")
    filled = raw.clone()
    filled[0, 0, 4] = 1.0  # the training mean
    torch.testing.assert_close(model.encode(gap), model.encode(filled))


def test_a_series_network_of_the_user_needs_no_mask():
    class Pooled(nn.Module):
        def forward(self, x):
            return x.mean(-1)

    model = Encoder(Pooled(), nn.Identity(), inputs=SeriesInputs([0.0], [1.0]))
    assert model.encode(torch.tensor([[[2.0, 4.0, float("nan"), float("nan")]]])).tolist() == [[1.5]]
    with pytest.raises(InputError, match="width"):
        model.width  # noqa: B018
