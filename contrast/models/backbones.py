"""Backbones by name: those registered here, timm's, torchvision's, and functions of the user's.

A network of this package is added with one line below, `BACKBONES.register(name)(Class)`; a user's own needs no entry:
`backbone: "module:function"`.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from contrast.core.registry import InputError, Registry, check_arguments, did_you_mean
from contrast.models.checkpoints import load_weights
from contrast.models.image_networks import SmallConv
from contrast.models.libraries import LIBRARIES, Library, build_network, has_network, network_names
from contrast.models.series_networks import Dilated, ResNet1d, Transformer1d

Kind = Literal["image", "series"]
Part = str | Mapping[str, Any]

BACKBONES = Registry("backbone")
"""The networks of this package by name; timm's and torchvision's are found by `build_backbone`."""
BACKBONES.register("small_conv")(SmallConv)
BACKBONES.register("resnet1d", aliases=["resnet_1d"])(ResNet1d)
BACKBONES.register("dilated", aliases=["ts2vec"])(Dilated)
BACKBONES.register("transformer1d", aliases=["transformer", "tst"])(Transformer1d)


def build_backbone(
    part: Part | nn.Module, shape: Sequence[int], kind: Kind, *, where: str = "encoder.backbone"
) -> nn.Module:
    """Return the network that turns a batch of the data into features (N, F).

    Args:
        part: a name, or {name, pretrained: false | true | PATH, arguments of the network}. The name is one of
            BACKBONES, "timm:NAME", "torchvision:NAME", "module:function" (a function or class of the user's that
            returns an nn.Module; it is called with `channels` and `shape` if it has arguments of these names), or a
            name without prefix, which is looked up in BACKBONES, timm and torchvision in this order. A network is
            used as it is.
        shape: (C, H, W) of images, (C, L) of series.
        kind: image or series. A network for series takes (x (N, C, L), mask (N, L) bool or None), or x only.
        where: the key of the config, for messages.

    Raises:
        InputError: for an unknown name or argument, weights that are not available or belong to another network, and
            a network that does not turn data of this shape into (N, F).

    Example:
        >>> backbone = build_backbone({"name": "small_conv", "width": 16}, shape=(1, 28, 28), kind="image")
        >>> backbone(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 64])
    """
    if isinstance(part, nn.Module):
        feature_width(part, shape, where=where)
        return part
    name, pretrained, arguments = parse_part(part, where)
    library, bare = library_of(name, where)
    classifier: tuple[str, ...] = ()
    if library is not None:
        _check_backbone_kind(name, frozenset({"image"}), kind, where)
        built = build_network(library, bare, arguments, shape, pretrained=pretrained is True, where=where)
        backbone, classifier = built.network, built.classifier
    else:
        if pretrained is True:
            raise InputError(f"{where}.pretrained: '{name}' has no published weights; set it to false or to a file.")
        build = _build_imported if ":" in name else _build_registered
        backbone = build(name, arguments, shape, kind, where)
    feature_width(backbone, shape, where=where)
    if isinstance(pretrained, str):
        load_weights(backbone, pretrained, classifier=classifier)
    return backbone


def feature_width(backbone: nn.Module, shape: Sequence[int], *, where: str = "encoder.backbone") -> int:
    """Return F, found by a dry run on zeros in evaluation mode; no buffer, flag or random state changes.

    Args:
        backbone: a network, (N, *shape) to (N, F).
        shape: (C, H, W) of images, (C, L) of series.
        where: the key of the config, for messages.

    Raises:
        InputError: if the network cannot read data of this shape, or returns anything but (N, F).

    Example:
        >>> feature_width(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), shape=(1, 8, 8))
        10
    """
    features = output_of_zeros(backbone, (2, *shape), where)
    if features.dim() != 2 or len(features) != 2:
        raise InputError(
            f"{where}: {type(backbone).__name__} must return one vector per sample, (N, F); for an input of "
            f"{(2, *shape)} it returned {tuple(features.shape)}. Pool or flatten its output."
        )
    return features.shape[1]


@torch.no_grad()
def output_of_zeros(module: nn.Module, shape: Sequence[int], where: str) -> Tensor:
    """Return the module's output for zeros of this shape in evaluation mode; its state does not change."""
    parameter = next(module.parameters(), torch.zeros(()))
    training = {part: part.training for part in module.modules()}
    devices = [parameter.device] if parameter.is_cuda else []
    try:
        with torch.random.fork_rng(devices=devices):
            output = module.eval()(torch.zeros(*shape, dtype=parameter.dtype, device=parameter.device))
    except Exception as error:
        # A network may refuse a size in any way: a failed assertion, an index, a convolution larger than its input.
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"{where}: {type(module).__name__} cannot read inputs of {tuple(shape[1:])} "
            f"({reason}); choose another one, or another size of the data."
        ) from error
    finally:
        for part, flag in training.items():
            part.training = flag
    if not isinstance(output, Tensor):
        raise InputError(f"{where}: {type(module).__name__} must return a tensor; got a {type(output).__name__}.")
    return output


def parse_part(part: Part, where: str) -> tuple[str, bool | str, dict[str, Any]]:
    """Return a part's name, `pretrained` and the other arguments."""
    mapping = {"name": part} if isinstance(part, str) else part
    if not isinstance(mapping, Mapping) or not isinstance(mapping.get("name"), str):
        raise InputError(f"{where} must be a name or a mapping with a name, {{name: ..., ...}}; got {part!r}.")
    arguments = {str(key): value for key, value in mapping.items() if key not in ("name", "pretrained")}
    pretrained = mapping.get("pretrained", False)
    if isinstance(pretrained, Path):
        pretrained = str(pretrained)
    if not isinstance(pretrained, bool | str):
        raise InputError(f"{where}.pretrained must be true, false or the path of a weights file; got {pretrained!r}.")
    return mapping["name"], pretrained, arguments


def library_of(name: str, where: str) -> tuple[Library | None, str]:
    """Return the library that has the network `name` (None: it is this package's or the user's) and its name there."""
    prefix, colon, rest = name.partition(":")
    for library in LIBRARIES:
        if colon and prefix == library:
            return library, rest
    if colon or name in BACKBONES:
        return None, name
    for library in LIBRARIES:
        if has_network(library, name):
            return library, name
    try:
        BACKBONES[name]
    except InputError as error:
        # For an alias the registry's message has the right name; for other names, suggest one of all libraries.
        if " is called " in str(error):
            raise InputError(f"{where}: {error}") from None
    everything = [*BACKBONES, *(known for library in LIBRARIES for known in network_names(library))]
    raise InputError(
        f"{where}: there is no backbone '{name}', here or in timm or torchvision.{did_you_mean(name, everything)} "
        f"Ours: {', '.join(BACKBONES)}."
    )


def _build_registered(name: str, arguments: dict[str, Any], shape: Sequence[int], kind: Kind, where: str) -> nn.Module:
    _check_backbone_kind(name, getattr(BACKBONES[name], "kinds", frozenset({kind})), kind, where)
    facts = {"channels": shape[0], "shape": tuple(shape)}
    return _check_module(BACKBONES.build({"name": name, **arguments}, where=where, **facts), name, where)


def _build_imported(name: str, arguments: dict[str, Any], shape: Sequence[int], kind: Kind, where: str) -> nn.Module:
    build = _import_attribute(name, where)
    if isinstance(build, nn.Module):
        return build
    if not callable(build):
        raise InputError(f"{where}: '{name}' must be a function or class that returns an nn.Module; got {build!r}.")
    checked = check_arguments(build, arguments, where=where, owner=f"'{name}'")
    known = inspect.signature(build).parameters
    facts = {"channels": shape[0], "shape": tuple(shape)}
    filled = {key: value for key, value in facts.items() if key in known and key not in checked}
    try:
        network = build(**filled, **checked)
    except (ValueError, TypeError) as error:
        raise InputError(f"{where}: '{name}' could not be called: {error}") from error
    _check_backbone_kind(name, getattr(type(network), "kinds", frozenset({kind})), kind, where)
    return _check_module(network, name, where)


def _import_attribute(name: str, where: str) -> Any:
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)  # the path of a console script lacks the current folder
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise InputError(
            f"{where}: '{name}' means the function {attribute} of the Python module {module_name}, which could not be "
            f"imported ({type(error).__name__}: {error}); the module must be in the current folder or be installed."
        ) from error
    finally:
        sys.path.remove(here)
    if not hasattr(module, attribute):
        raise InputError(
            f"{where}: the module {module_name} has no '{attribute}'.{did_you_mean(attribute, dir(module))}"
        )
    return cast(Callable[..., Any], getattr(module, attribute))


def _check_module(network: Any, name: str, where: str) -> nn.Module:
    if not isinstance(network, nn.Module):
        raise InputError(f"{where}: '{name}' must return an nn.Module; it returned a {type(network).__name__}.")
    return network


def _check_backbone_kind(name: str, kinds: frozenset[str], kind: Kind, where: str) -> None:
    if kind not in kinds:
        fitting = [known for known in BACKBONES if kind in getattr(BACKBONES[known], "kinds", ())]
        reads = {"image": "images", "series": "series"}
        raise InputError(
            f"{where}: '{name}' reads {' and '.join(reads.get(k, k) for k in sorted(kinds))}, and the data are "
            f"{reads[kind]}; choose for example {', '.join(fitting)}."
        )
