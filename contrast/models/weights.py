"""A pretrained backbone on disk: its weights under the library's own names, and the description to rebuild it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from contrast.core.registry import InputError
from contrast.models.backbones import build_backbone, feature_width, library_of, parse_part
from contrast.models.checkpoints import WEIGHTS, load_weights, weights_file
from contrast.models.encoder import Encoder
from contrast.models.inputs import ImageInputs, SeriesInputs
from contrast.models.libraries import build_network, require

__all__ = ["load_backbone", "load_weights", "read_description", "save_backbone"]

DESCRIPTION = "backbone.json"
FORMAT, VERSION = "contrast-backbone", 1


def save_backbone(encoder: Encoder, folder: str | Path, description: Mapping[str, Any]) -> Path:
    """Write backbone.safetensors and backbone.json into `folder`, and return the path of the first.

    The weights have the names that timm or torchvision uses, without prefix. `elsewhere` in the JSON contains the
    lines of Python that load them without this package.

    Args:
        encoder: its backbone and input statistics are saved; head, predictor and twin are not.
        folder: an existing folder.
        description: backbone (the part it was built from; None for a network built in Python), kind, shape, and any
            other entries (classes, ...) of JSON types.

    Example:
        >>> import tempfile
        >>> backbone = build_backbone("small_conv", shape=(1, 8, 8), kind="image")
        >>> encoder = Encoder(backbone, nn.Identity(), inputs=ImageInputs((0, 255), mean=[0.5], std=[0.25]))
        >>> about = {"backbone": "small_conv", "kind": "image", "shape": (1, 8, 8)}
        >>> save_backbone(encoder, tempfile.mkdtemp(), about).name
        'backbone.safetensors'
    """
    folder = Path(folder)
    safetensors = require("safetensors.torch")
    part, shape = description.get("backbone"), [int(size) for size in description["shape"]]
    if part is not None:
        name, _, arguments = parse_part(part, "backbone")
        part = {"name": name, "pretrained": False, **arguments}
    contents = {
        **description,
        "format": FORMAT,
        "version": VERSION,
        "backbone": part,
        "shape": shape,
        "features": feature_width(encoder.backbone, shape),
        "inputs": encoder.inputs.statistics(),
        "torch": str(torch.__version__),
        "elsewhere": _loading_lines(part, shape),
    }
    text = json.dumps(contents, indent=2, default=_json_value)
    # Tied weights share memory, which the format does not support: each name gets its own copy.
    weights = {key: value.detach().cpu().contiguous().clone() for key, value in encoder.backbone.state_dict().items()}
    # Atomic, so that no reader sees an incomplete file: both are written under another name and renamed, the
    # description last.
    for name in (WEIGHTS, DESCRIPTION):
        temporary = folder / f".{name}.part"
        if name == WEIGHTS:
            safetensors.save_file(weights, temporary, metadata={"format": "pt"})
        else:
            temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / name)
    return folder / WEIGHTS


def load_backbone(path: str | Path, *, backbone: nn.Module | None = None) -> Encoder:
    """Return the saved encoder without a head, in evaluation mode, for `encode(raw)` and `features(prepared)`.

    Args:
        path: a run's folder, its backbone.safetensors or its backbone.json.
        backbone: the network itself, if it was the user's own.

    Raises:
        InputError: if either file is missing or broken, or they do not fit each other. A file that names a function
            of a Python module is refused, since loading weights must not execute code: pass `backbone`.

    Example:
        >>> import tempfile
        >>> folder, inputs = tempfile.mkdtemp(), ImageInputs((0, 255), mean=[0.5], std=[0.25])
        >>> own = Encoder(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), nn.Identity(), inputs=inputs)
        >>> path = save_backbone(own, folder, {"backbone": None, "kind": "image", "shape": (1, 8, 8)})
        >>> load_backbone(folder, backbone=nn.Sequential(nn.Flatten(), nn.Linear(64, 5))).width
        5
    """
    about = read_description(path)
    file = _description_file(path)
    shape, kind = about["shape"], about["kind"]
    if backbone is None:
        part = about["backbone"]
        name = parse_part(part, str(file))[0] if part is not None else None
        if name is None or (":" in name and library_of(name, str(file))[0] is None):
            raise InputError(
                f"{file} was trained with a network of your own{f' ({name})' if name else ''}; build it and pass it: "
                "load_backbone(path, backbone=network)."
            )
        backbone = build_backbone({**part, "pretrained": False}, shape, kind, where=f"{file}, backbone")
    load_weights(backbone, file.with_name(WEIGHTS))
    try:
        inputs = (ImageInputs if kind == "image" else SeriesInputs)(**about["inputs"])
    except TypeError as error:
        raise InputError(f"{file}, inputs: {error}.") from error
    return Encoder(backbone, nn.Identity(), inputs=inputs, width=feature_width(backbone, shape)).eval()


def read_description(path: str | Path) -> dict[str, Any]:
    """Return the contents of backbone.json: format, version, kind, shape, backbone, features, inputs, elsewhere, ...

    Args:
        path: a run's folder, its backbone.safetensors or its backbone.json.

    Raises:
        InputError: if the file is missing, broken, or of another format or version.

    Example:
        >>> import tempfile
        >>> folder, inputs = tempfile.mkdtemp(), ImageInputs((0, 255), mean=[0.5], std=[0.25])
        >>> encoder = Encoder(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), nn.Identity(), inputs=inputs)
        >>> path = save_backbone(encoder, folder, {"backbone": None, "kind": "image", "shape": (1, 8, 8)})
        >>> read_description(folder)["features"]
        5
    """
    file = _description_file(path)
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} could not be read as JSON ({error}).") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise InputError(f"{file} is not the description of a backbone that contrast wrote.")
    if about.get("version") != VERSION:
        raise InputError(
            f"{file} has version {about.get('version')}; this contrast reads version {VERSION} only; update contrast."
        )
    missing = [key for key in ("kind", "shape", "backbone", "inputs") if key not in about]
    if missing or about["kind"] not in ("image", "series"):
        raise InputError(f"{file} is incomplete: {', '.join(missing) or 'kind must be image or series'}.")
    return about


def _description_file(path: str | Path) -> Path:
    path = Path(path)
    if path.name == DESCRIPTION:
        path = path.parent
    file = weights_file(path).with_name(DESCRIPTION)
    if not file.is_file():
        raise InputError(
            f"{file} does not exist, and weights do not say which network they belong to; name it, "
            "{name: ..., pretrained: PATH}."
        )
    return file


def _loading_lines(part: Mapping[str, Any] | None, shape: list[int]) -> str | None:
    """Return the Python lines that load the weights without this package; None for networks of no library."""
    if part is None:
        return None
    name, _, arguments = parse_part(part, "backbone")
    library, bare = library_of(name, "backbone")
    if library is None:
        return None
    with torch.random.fork_rng(devices=[]):
        lines = build_network(library, bare, arguments, shape, pretrained=False, where="backbone").lines
    imports = ["import safetensors.torch", f"import {library}", "import torch"]
    return "\n".join([*imports, *lines, f"network.load_state_dict(safetensors.torch.load_file({WEIGHTS!r}))"])


def _json_value(value: Any) -> Any:
    """Return an array, tensor, path or number of NumPy as a value of JSON."""
    return value.tolist() if hasattr(value, "tolist") else list(value) if isinstance(value, tuple | set) else str(value)
