import sys

import pytest
import torch
from torch import nn

from contrast.core.registry import InputError
from contrast.models.backbones import BACKBONES, build_backbone, feature_width

SHAPES = {"image": [(1, 8, 8), (3, 28, 28), (5, 40, 24)], "series": [(1, 1), (3, 29), (2, 400)]}
SMALL_ARGUMENTS = {
    "small_conv": {"width": 4},
    "resnet1d": {"width": 4},
    "dilated": {"width": 4, "out": 8, "depth": 3},
    "transformer1d": {"width": 8, "depth": 1, "heads": 2},
}
CASES = [(name, kind, shape) for name in BACKBONES for kind in sorted(BACKBONES[name].kinds) for shape in SHAPES[kind]]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("name", "kind", "shape"), CASES)
def test_every_backbone_returns_one_finite_vector_per_sample(name, kind, shape):
    backbone = build_backbone({"name": name, **SMALL_ARGUMENTS[name]}, shape, kind)
    features = backbone(torch.randn(3, *shape))
    assert features.shape == (3, feature_width(backbone, shape))
    assert features.isfinite().all()
    features.square().sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_the_dry_run_changes_nothing():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    backbone = nn.Sequential(nn.Flatten(), Noise(), nn.Linear(64, 6), nn.BatchNorm1d(6))
    backbone[3].eval()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    random = torch.random.get_rng_state()
    assert feature_width(backbone, (1, 8, 8)) == 6
    assert torch.equal(random, torch.random.get_rng_state())
    assert [module.training for module in backbone] == [True, True, True, False]
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize(
    ("backbone", "found"), [(nn.Conv2d(1, 4, 3), r"\(2, 4, 6, 6\)"), (nn.Linear(5, 4), r"cannot read inputs of \(1, 8")]
)
def test_a_network_that_returns_no_vectors_is_refused(backbone, found):
    with pytest.raises(InputError, match=found):
        build_backbone(backbone, (1, 8, 8), "image")


@pytest.mark.parametrize("name", ["timm:resnet10t", "timm:test_vit", "torchvision:squeezenet1_1", "test_efficientnet"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (5, 28, 28), (3, 64, 64)])
def test_library_networks_work_for_any_number_of_channels_and_for_small_images(name, shape):
    if name == "torchvision:squeezenet1_1" and shape[1] == 8:
        pytest.skip("its poolings reduce 8 pixels to none")
    backbone = build_backbone(name, shape, "image").eval()
    with torch.no_grad():
        assert backbone(torch.randn(2, *shape)).shape == (2, feature_width(backbone, shape))


def test_a_resnet_does_not_downsample_small_images_in_its_stem():
    def size_after_stem(part, size):
        backbone = build_backbone(part, (3, size, size), "image")
        sizes = []
        backbone.layer1.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[-1]))
        backbone.eval()(torch.zeros(1, 3, size, size))
        return sizes[0]

    assert size_after_stem("torchvision:resnet18", 32) == 32
    assert size_after_stem("timm:resnet10t", 32) == 32
    assert size_after_stem({"name": "timm:resnet10t", "stem": "original"}, 32) == 8
    assert size_after_stem("timm:resnet10t", 40) == 10
    assert size_after_stem({"name": "timm:resnet10t", "stem": "small"}, 40) == 40


def test_a_small_stem_has_the_response_of_the_large_one_to_a_constant_image():
    """The 7x7 kernels are averaged down to 3x3, so that the response of pretrained ones to constant areas is kept."""
    torch.manual_seed(3)
    large = build_backbone({"name": "torchvision:resnet18", "stem": "original"}, (3, 32, 32), "image").conv1
    large.weight.data.fill_(0.5)
    torch.manual_seed(3)
    from contrast.models.libraries import LibraryNetwork, _replace_stem

    network = nn.Module()
    network.conv1, network.maxpool = large, nn.MaxPool2d(2)
    _replace_stem(LibraryNetwork(network, ()))
    torch.testing.assert_close(network.conv1.weight.sum((1, 2, 3)), large.weight.sum((1, 2, 3)))


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ("timm:resnt18", "Did you mean 'resnet18'"),
        ("torchvision:resnet19", "torchvision has no network"),
        ("smal_conv", "Did you mean 'small_conv'"),
        ("ts2vec", "called 'dilated' here"),
        ("resnet18.nonsense", "Invalid pretrained tag"),
        ({"name": "timm:test_resnet", "deph": 3}, "deph"),
        ({"name": "small_conv", "widht": 3}, r"encoder\.backbone\.widht.*'width'"),
        ({"name": "small_conv", "width": 0}, r"encoder\.backbone 'small_conv'.*width 0"),
        ({"name": "small_conv", "pretrained": True}, "has no published weights"),
        ({"name": "small_conv", "pretrained": 3}, "true, false or the path"),
        ({"name": "small_conv", "pretrained": "nowhere.pt"}, "nowhere.pt does not exist"),
        ({"name": "timm:test_vit", "stem": "small"}, "no ResNet-like stem"),
        ({"name": "timm:test_resnet", "stem": "tiny"}, "one of auto, small, original"),
        ({"name": "timm:test_resnet", "checkpoint_path": "x"}, "cannot be set"),
        ("resnet1d", "the data are images; choose for example small_conv"),
        ("no_such_module:f", "could not be imported"),
        ("math:pii", "Did you mean 'pi'"),
        ("math:pi", "function or class"),
        ({"width": 3}, "must be a name"),
    ],
)
def test_a_backbone_that_cannot_be_built_is_an_error_of_one_line(part, found):
    with pytest.raises(InputError, match=found) as caught:
        build_backbone(part, (1, 28, 28), "image")
    assert "\n" not in str(caught.value)


def test_a_size_that_is_no_multiple_of_the_patch_is_refused():
    with pytest.raises(InputError, match=r"65x65 pixels are no multiple of the patch; set data\.size"):
        build_backbone("timm:test_vit", (1, 65, 65), "image")


def test_images_too_small_for_a_network_are_refused():
    with pytest.raises(InputError, match=r"cannot read inputs of \(1, 8, 8\)"):
        build_backbone("timm:test_convnext", (1, 8, 8), "image")


@pytest.mark.parametrize("name", ["torchvision:squeezenet1_1", "timm:test_resnet"])
def test_pretrained_weights_without_internet_are_an_error_of_one_line(name, monkeypatch, tmp_path):
    import huggingface_hub.constants

    def offline(*arguments, **options):
        raise OSError("Network is unreachable")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("socket.getaddrinfo", offline)
    monkeypatch.setattr("socket.socket.connect", offline)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=f"weights of {name} are not on this machine") as caught:
        build_backbone({"name": name, "pretrained": True}, (3, 64, 64), "image")
    assert "\n" not in str(caught.value)


def test_a_function_in_the_current_folder_is_a_backbone(monkeypatch, tmp_path):
    (tmp_path / "my_networks.py").write_text(
        "from torch import nn\n"
        "def build(channels, width=3):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 64, width))\n"
        "def wrong():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    try:
        backbone = build_backbone({"name": "my_networks:build", "width": 7}, (2, 8, 8), "image")
        assert feature_width(backbone, (2, 8, 8)) == 7
        with pytest.raises(InputError, match="Did you mean 'width'"):
            build_backbone({"name": "my_networks:build", "widht": 7}, (2, 8, 8), "image")
        with pytest.raises(InputError, match=r"must return an nn\.Module"):
            build_backbone("my_networks:wrong", (2, 8, 8), "image")
    finally:
        sys.modules.pop("my_networks", None)
    assert sys.path == path
