"""Models by name: a run, a weights file, timm:NAME, torchvision:NAME, module:function."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contrast.core.registry import InputError
from contrast.data import Data
from contrast.experiment.build import inputs_of
from contrast.experiment.config import Config
from contrast.models import Encoder, build_backbone, load_backbone
from contrast.models.weights import DESCRIPTION, read_description

Encode = Callable[[Tensor], Tensor]


class Model(torch.nn.Module):
    """A frozen encoder that reads raw data.

    Args:
        encoder: with its input statistics.
        about: the content of `backbone.json`.

    Example:
        >>> model = contrast.load(run.path)
        >>> model.features(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 256])
    """

    def __init__(self, encoder: Encoder, about: Mapping[str, Any]) -> None:
        super().__init__()
        self.encoder = encoder
        self.kind = str(about["kind"])
        self.shape = tuple(about["shape"])
        self.classes = tuple(about.get("classes", ()))
        self.eval()

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Return (N, F) features of raw data.

        Args:
            x: (N, C, H, W) images, or (N, C, L) series with NaN where nothing was observed.
        """
        return self.encoder.encode(x)

    forward = features


def load(path: str | Path) -> Model:
    """Return the frozen encoder of a run, or of its `backbone.safetensors`; no code in the files is executed.

    Args:
        path: the run's folder, or the weights file with its description next to it.

    Raises:
        InputError: where there is none, or it is damaged.

    Example:
        >>> features = contrast.load(run.path).features(torch.rand(2, 1, 8, 8))
    """
    return Model(load_backbone(path), read_description(path))


def check_name(name: str) -> None:
    """Check that a name can be a model's, before any data is read.

    Raises:
        InputError: where it is neither a path nor one of the named kinds.
    """
    if not Path(name).exists() and ":" not in name:
        raise InputError(
            f"there is no model {name}: give a run's folder, a weights file, timm:NAME, torchvision:NAME "
            "or module:function."
        )


def find(name: str, config: Config, data: Data) -> tuple[str, Encode]:
    """Return the title of a model in tables, and the function raw batch -> (N, F) features.

    Args:
        name: MODEL of the command.
        config: its `encoder.backbone` says which network a weights file without a description is for.
        data: an off-the-shelf network reads its shape and statistics.

    Raises:
        InputError: where it cannot be loaded, or does not read this data.
    """
    title, model = _find(name, config.encoder.backbone, data)
    return title, encode_with(model.encoder) if isinstance(model, Model) else model


def reference_of(config: Config, data: Data) -> Encode | None:
    """Return the frozen network that `encoder.reference` names, raw batch -> (N, R); None where it names none.

    Raises:
        InputError: where it cannot be loaded, or does not read this data.
    """
    if config.encoder.reference is None:
        return None
    try:
        return _find(config.encoder.reference, "auto", data)[1]
    except InputError as error:
        raise InputError(f"encoder.reference: {error}") from None


def _find(name: str, part: Any, data: Data) -> tuple[str, Model | Encode]:
    check_name(name)
    if Path(name).exists():
        if Path(name).is_dir() or (Path(name).parent / DESCRIPTION).is_file():
            model = load(name)
            if (model.kind, model.shape[0]) != (data.kind, data.shape[0]):
                raise InputError(
                    f"{name} reads {_items(model.kind, model.shape)}; "
                    f"{data.source} has {_items(data.kind, data.shape)}."
                )
            return "pretrained", model
        if part == "auto":
            raise InputError(
                f"{name} does not say which network it is; name it: encoder.backbone=timm:resnet18, for example."
            )
        part = {**part, "pretrained": name} if isinstance(part, Mapping) else {"name": part, "pretrained": name}
        return "off_the_shelf", _off_the_shelf(part, data)
    if name.startswith(("timm:", "torchvision:")):
        return "off_the_shelf", _off_the_shelf({"name": name, "pretrained": True}, data)
    return name, _imported(name)


def encode_with(encoder: Encoder) -> Encode:
    """Return the function raw batch -> (N, F) features of a frozen encoder, on the accelerator where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = encoder.to(device).eval()

    def encode(raw: Tensor) -> Tensor:
        with torch.inference_mode():
            return encoder.encode(raw.to(device)).float()

    return encode


def _off_the_shelf(part: Mapping[str, Any], data: Data) -> Model:
    backbone = build_backbone(part, data.shape, data.kind)
    encoder = Encoder(backbone, torch.nn.Identity(), inputs=inputs_of(data))
    return Model(encoder, {"kind": data.kind, "shape": data.shape})


def _imported(name: str) -> Encode:
    module, _, function = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        encode: Encode = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{name} cannot be imported: {error}.") from None
    finally:
        sys.path.pop(0)
    return encode


def _items(kind: str, shape: tuple[int, ...]) -> str:
    return f"{'images' if kind == 'image' else kind} of {'x'.join(map(str, shape))}"
