import json
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

from contrast.core.registry import InputError
from contrast.models.backbones import build_backbone
from contrast.models.encoder import Encoder, ImageInputs, SeriesInputs, build_encoder
from contrast.models.weights import load_backbone, load_weights, read_description, save_backbone


def image_encoder(part, shape, **options):
    torch.manual_seed(0)
    inputs = ImageInputs((0, 255), [0.1] * shape[0], [0.7] * shape[0])
    model = build_encoder(part, shape=shape, kind="image", inputs=inputs, **options)
    model.prepare(torch.zeros(1, *shape))
    model([torch.rand(4, *shape)])  # running statistics that are not 0 and 1
    return model.eval()


@pytest.mark.parametrize(
    ("part", "shape"),
    [
        ({"name": "small_conv", "width": 4}, (1, 8, 8)),
        ("timm:test_resnet", (1, 28, 28)),
        ({"name": "timm:test_vit", "pretrained": False}, (4, 28, 28)),
        ("torchvision:squeezenet1_1", (2, 40, 40)),
    ],
)
def test_a_loaded_backbone_encodes_as_the_saved_one(part, shape, tmp_path):
    model = image_encoder(part, shape, momentum=0.9)
    raw = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    file = save_backbone(model, tmp_path, {"backbone": part, "kind": "image", "shape": shape, "classes": ("a", "b")})
    for path in (tmp_path, file, tmp_path / "backbone.json"):
        assert torch.equal(load_backbone(path).encode(raw), model.encode(raw))
    about = read_description(tmp_path)
    assert about["classes"] == ["a", "b"]
    assert about["features"] == model.width
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backbone.json", "backbone.safetensors"]


def test_a_loaded_series_backbone_encodes_as_the_saved_one(tmp_path):
    model = build_encoder("transformer1d", shape=(2, 300), kind="series", inputs=SeriesInputs([1.0, 2.0], [3.0, 0.1]))
    save_backbone(model, tmp_path, {"backbone": "transformer1d", "kind": "series", "shape": (2, 300)})
    raw = torch.randn(3, 2, 200)
    raw[1, :, 100:] = float("nan")
    assert torch.equal(load_backbone(tmp_path).encode(raw), model.eval().encode(raw))


def test_timm_loads_a_saved_backbone_strictly(tmp_path):
    import timm

    model = image_encoder("timm:test_vit", (1, 160, 160))
    save_backbone(model, tmp_path, {"backbone": "timm:test_vit", "kind": "image", "shape": (1, 160, 160)})
    loaded = timm.create_model("test_vit", num_classes=0, in_chans=1)
    loaded.load_state_dict(safetensors.torch.load_file(tmp_path / "backbone.safetensors"))
    x = torch.rand(2, 1, 160, 160)
    assert torch.equal(loaded.eval()((x - 0.1) / 0.7), model.features(x))


@pytest.mark.parametrize(
    "part", ["timm:test_resnet", "timm:test_vit", "torchvision:resnet18", {"name": "resnet10t", "act_layer": "gelu"}]
)
def test_the_python_lines_in_the_description_load_the_weights(part, tmp_path, monkeypatch):
    model = image_encoder(part, (2, 28, 28))
    save_backbone(model, tmp_path, {"backbone": part, "kind": "image", "shape": (2, 28, 28)})
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(read_description(tmp_path)["elsewhere"], names)
    x = torch.rand(2, 2, 28, 28)
    assert torch.equal(names["network"].eval()((x - 0.1) / 0.7), model.features(x))


def test_weights_of_another_backbone_are_refused_by_file_name(tmp_path):
    save_backbone(
        image_encoder({"name": "small_conv", "width": 4}, (1, 8, 8)),
        tmp_path,
        {"backbone": {"name": "small_conv", "width": 4}, "kind": "image", "shape": (1, 8, 8)},
    )
    for part, found in [
        ({"name": "small_conv", "width": 8}, "have another shape"),
        ({"name": "small_conv", "width": 4, "blocks": [1, 2, 3]}, r"6 keys are missing|keys are missing \(such as"),
        ({"name": "small_conv", "width": 4, "blocks": [1]}, r"are unexpected \(such as"),
    ]:
        with pytest.raises(InputError, match=found) as caught:
            build_backbone({**part, "pretrained": str(tmp_path)}, (1, 8, 8), "image")
        assert str(tmp_path / "backbone.safetensors") in str(caught.value)


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


@pytest.mark.parametrize("wrapping", ["plain", "module.", "backbone.", "encoder.backbone.", "module.encoder_q."])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".safetensors"])
def test_wrappings_are_removed(wrapping, suffix, tmp_path):
    source, target = network(), network()
    prefix = "" if wrapping == "plain" else wrapping
    state = {prefix + key: value for key, value in source.state_dict().items()}
    if wrapping.count(".") == 2:
        state["encoder.twin.backbone.0.weight"] = torch.zeros(4, 3)
        state["projector.weight"] = torch.zeros(2, 4)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if suffix != ".pth" else state, path)
    load_weights(target, path)
    assert all(torch.equal(value, target.state_dict()[key]) for key, value in source.state_dict().items())


def test_the_weights_of_a_removed_classifier_are_ignored(tmp_path):
    import timm

    full = timm.create_model("test_resnet")
    torch.save(full.state_dict(), tmp_path / "full.pth")
    part = {"name": "timm:test_resnet", "pretrained": str(tmp_path / "full.pth")}
    backbone = build_backbone(part, (3, 64, 64), "image")
    assert torch.equal(backbone.layer1[0].conv1.weight, full.layer1[0].conv1.weight)


class OpensFileWhenLoaded:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_that_executes_code_is_not_read(tmp_path):
    torch.save(
        {"state_dict": network().state_dict(), "evil": OpensFileWhenLoaded(str(tmp_path / "done"))}, tmp_path / "a.pt"
    )
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps(OpensFileWhenLoaded(str(tmp_path / "done")), protocol=2))
    for name in ("a.pt", "b.ckpt"):
        with pytest.raises(InputError, match="could execute code"):
            load_weights(network(), tmp_path / name)
    assert not (tmp_path / "done").exists()


def test_a_description_that_names_a_python_function_is_refused(tmp_path):
    model = Encoder(nn.Flatten(), nn.Identity(), inputs=ImageInputs((0, 1), [0.0], [1.0]))
    save_backbone(model, tmp_path, {"backbone": None, "kind": "image", "shape": (1, 8, 8)})
    about = json.loads((tmp_path / "backbone.json").read_text())
    for backbone in (None, {"name": "os:mkdir", "path": str(tmp_path / "done")}):
        (tmp_path / "backbone.json").write_text(json.dumps({**about, "backbone": backbone}))
        with pytest.raises(InputError, match="build it and pass it"):
            load_backbone(tmp_path)
    assert not (tmp_path / "done").exists()
    assert load_backbone(tmp_path, backbone=nn.Flatten()).encode(torch.ones(2, 1, 8, 8)).shape == (2, 64)


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.safetensors", b"junk", "no complete safetensors file"),
        ("a.pt", b"", "could not be read"),
        ("a.onnx", b"x", "unknown ending"),
        ("backbone.json", b"{", "does not exist|folder without"),
    ],
)
def test_broken_files_are_named(name, content, found, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=found) as caught:
        load_backbone(tmp_path / name) if name.endswith("json") else load_weights(network(), tmp_path / name)
    assert str(tmp_path) in str(caught.value)


def test_a_file_without_tensors_is_named(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="contains no weights"):
        load_weights(network(), tmp_path / "a.pt")


def test_a_newer_description_is_refused(tmp_path):
    model = image_encoder("small_conv", (1, 8, 8))
    save_backbone(model, tmp_path, {"backbone": "small_conv", "kind": "image", "shape": (1, 8, 8)})
    file = tmp_path / "backbone.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 2}))
    with pytest.raises(InputError, match="version 2"):
        load_backbone(tmp_path)
