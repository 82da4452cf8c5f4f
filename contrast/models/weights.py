"""A pretrained backbone on disk: its weights under the library's own names, and what is needed to rebuild it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from contrast.core.registry import InputError
from contrast.models.backbones import build_backbone, feature_width, library_of, parse
from contrast.models.checkpoints import WEIGHTS, load_weights, weights_file
from contrast.models.encoder import Encoder
from contrast.models.inputs import ImageInputs, SeriesInputs
from contrast.models.libraries import build_network, require

__all__ = ["load_backbone", "load_weights", "read_description", "save_backbone"]

DESCRIPTION = "backbone.json"
FORMAT, VERSION = "contrast-backbone", 1


def save_backbone(encoder: Encoder, folder: str | Path, description: Mapping[str, Any]) -> Path:
    """Write backbone.safetensors and backbone.json into `folder`, and give the path of the first.

    The weights carry the names that timm or torchvision gives them, without prefix. `elsewhere` in the JSON holds the
    lines of Python that load them without this package.

    Args:
        encoder: whose backbone and input statistics are kept; head, predictor and twin are not.
        folder: must exist.
        description: backbone (the part it was built from; None for a network made in Python), kind, shape, and what
            else is worth knowing (classes, ...): anything that JSON holds.
    """
    folder = Path(folder)
    safetensors = require("safetensors.torch")
    part, shape = description.get("backbone"), [int(size) for size in description["shape"]]
    if part is not None:
        name, _, arguments = parse(part, "backbone")
        part = {"name": name, "pretrained": False, **arguments}
    about = {
        **description,
        "format": FORMAT,
        "version": VERSION,
        "backbone": part,
        "shape": shape,
        "features": feature_width(encoder.backbone, shape),
        "inputs": encoder.inputs.statistics(),
        "torch": str(torch.__version__),
        "elsewhere": _elsewhere(part, shape),
    }
    written = json.dumps(about, indent=2, default=_plain)
    # Tied weights share memory, which the format refuses: each name gets its own copy.
    weights = {key: value.detach().cpu().contiguous().clone() for key, value in encoder.backbone.state_dict().items()}
    # A reader never meets half a file: both are written beside their place and moved there, the description last.
    for name in (WEIGHTS, DESCRIPTION):
        beside = folder / f".{name}.part"
        if name == WEIGHTS:
            safetensors.save_file(weights, beside, metadata={"format": "pt"})
        else:
            beside.write_text(written, encoding="utf-8")
        beside.replace(folder / name)
    return folder / WEIGHTS


def load_backbone(path: str | Path, *, backbone: nn.Module | None = None) -> Encoder:
    """Give the saved encoder without a head, in evaluation mode, for `encode(raw)` and `features(prepared)`.

    Args:
        path: a run's folder, its backbone.safetensors or its backbone.json.
        backbone: the network itself, where it was the user's own.

    Raises:
        InputError: where either file is missing or broken, or they do not belong together. A file that asks for some
            function of a Python module is refused, since loading weights must not execute code: hand over `backbone`.
    """
    about = read_description(path)
    file = _description_file(path)
    shape, kind = about["shape"], about["kind"]
    if backbone is None:
        part = about["backbone"]
        name = parse(part, str(file))[0] if part is not None else None
        if name is None or (":" in name and library_of(name, str(file))[0] is None):
            raise InputError(
                f"{file} was trained with a network of your own{f' ({name})' if name else ''}; build it and hand it "
                "over: load_backbone(path, backbone=network)."
            )
        backbone = build_backbone({**part, "pretrained": False}, shape, kind, where=f"{file}, backbone")
    load_weights(backbone, file.with_name(WEIGHTS))
    try:
        inputs = (ImageInputs if kind == "image" else SeriesInputs)(**about["inputs"])
    except TypeError as error:
        raise InputError(f"{file}, inputs: {error}.") from error
    return Encoder(backbone, nn.Identity(), inputs=inputs, width=feature_width(backbone, shape)).eval()


def read_description(path: str | Path) -> dict[str, Any]:
    """Give what backbone.json says: format, version, kind, shape, backbone, features, inputs, elsewhere, the rest."""
    file = _description_file(path)
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} could not be read as JSON ({error}).") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise InputError(f"{file} is not the description of a backbone that contrast wrote.")
    if about.get("version") != VERSION:
        raise InputError(
            f"{file} has version {about.get('version')}, and this contrast reads version {VERSION}; update contrast."
        )
    lacking = [key for key in ("kind", "shape", "backbone", "inputs") if key not in about]
    if lacking or about["kind"] not in ("image", "series"):
        raise InputError(f"{file} is incomplete: {', '.join(lacking) or 'kind must be image or series'}.")
    return about


def _description_file(path: str | Path) -> Path:
    path = Path(path)
    if path.name == DESCRIPTION:
        path = path.parent
    file = weights_file(path).with_name(DESCRIPTION)
    if not file.is_file():
        raise InputError(
            f"{file} does not exist: weights alone do not say which network they are; name it, "
            "{name: ..., pretrained: PATH}."
        )
    return file


def _elsewhere(part: Mapping[str, Any] | None, shape: list[int]) -> str | None:
    """Give the Python lines that load the weights with the library alone; None for networks that no library has."""
    if part is None:
        return None
    name, _, arguments = parse(part, "backbone")
    library, bare = library_of(name, "backbone")
    if library is None:
        return None
    with torch.random.fork_rng(devices=[]):
        lines = build_network(library, bare, arguments, shape, pretrained=False, where="backbone").lines
    imports = ["import safetensors.torch", f"import {library}", "import torch"]
    return "\n".join([*imports, *lines, f"network.load_state_dict(safetensors.torch.load_file({WEIGHTS!r}))"])


def _plain(value: Any) -> Any:
    """Give arrays, tensors, paths and numbers of NumPy as what JSON holds."""
    return value.tolist() if hasattr(value, "tolist") else list(value) if isinstance(value, tuple | set) else str(value)
