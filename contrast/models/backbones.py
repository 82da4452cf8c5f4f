"""The backbone that a part names, for data of one shape: ours, timm's, torchvision's or the user's."""

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
from contrast.models.libraries import LIBRARIES, Library, build_network, knows, names
from contrast.models.series_networks import Dilated, ResNet1d, Transformer1d

Kind = Literal["image", "series"]
Part = str | Mapping[str, Any]

BACKBONES = Registry("backbone")
BACKBONES.register("small_conv")(SmallConv)
BACKBONES.register("resnet1d", aliases=["resnet_1d"])(ResNet1d)
BACKBONES.register("dilated", aliases=["ts2vec"])(Dilated)
BACKBONES.register("transformer1d", aliases=["transformer", "tst"])(Transformer1d)


def build_backbone(
    part: Part | nn.Module, shape: Sequence[int], kind: Kind, *, where: str = "encoder.backbone"
) -> nn.Module:
    """Give the network that turns a batch of the data into features (N, F).

    Args:
        part: a name, or {name, pretrained: false | true | PATH, arguments of the network}. The name is one of
            BACKBONES, "timm:NAME", "torchvision:NAME", "module:function" (a function or class of the user's that gives
            an nn.Module; `channels` and `shape` are handed over where it takes them), or bare: then BACKBONES, timm
            and torchvision are asked in this order. Or a network, which is taken as it is.
        shape: (C, H, W) of images, (C, L) of series.
        kind: image or series. A network for series reads (x (N, C, L), mask (N, L) bool or None), or x alone.
        where: the key of the config, for messages.

    Raises:
        InputError: for an unknown name or argument, weights that cannot be had or are another network's, and a
            network that does not turn data of this shape into (N, F).
    """
    if isinstance(part, nn.Module):
        feature_width(part, shape, where=where)
        return part
    name, pretrained, arguments = parse(part, where)
    library, bare = library_of(name, where)
    classifier: tuple[str, ...] = ()
    if library is not None:
        _check_kind(name, frozenset({"image"}), kind, where)
        built = build_network(library, bare, arguments, shape, pretrained=pretrained is True, where=where)
        backbone, classifier = built.network, built.classifier
    else:
        if pretrained is True:
            raise InputError(f"{where}.pretrained: nobody published weights of '{name}'; set it to false or to a file.")
        backbone = (_imported if ":" in name else _registered)(name, arguments, shape, kind, where)
    feature_width(backbone, shape, where=where)
    if isinstance(pretrained, str):
        load_weights(backbone, pretrained, classifier=classifier)
    return backbone


def feature_width(backbone: nn.Module, shape: Sequence[int], *, where: str = "encoder.backbone") -> int:
    """Give F, found by a dry run on zeros in evaluation mode; no buffer, flag or random state changes.

    Raises:
        InputError: where the network cannot read data of this shape (C, H, W) or (C, L), or gives anything but (N, F).
    """
    features = output_of_zeros(backbone, (2, *shape), where)
    if features.dim() != 2 or len(features) != 2:
        raise InputError(
            f"{where}: {type(backbone).__name__} must give one vector a sample, (N, F); for an input of "
            f"{(2, *shape)} it gave {tuple(features.shape)}. Pool or flatten its output."
        )
    return features.shape[1]


@torch.no_grad()
def output_of_zeros(module: nn.Module, shape: Sequence[int], where: str) -> Tensor:
    """Give what the module makes of zeros of this shape, in evaluation mode; leaves everything as it was."""
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
        raise InputError(f"{where}: {type(module).__name__} must give a tensor; it gave a {type(output).__name__}.")
    return output


def parse(part: Part, where: str) -> tuple[str, bool | str, dict[str, Any]]:
    """Give a part's name, `pretrained` and the other arguments."""
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
    """Give the library that has the network `name` (None: it is ours or the user's) and its name there."""
    prefix, colon, rest = name.partition(":")
    for library in LIBRARIES:
        if colon and prefix == library:
            return library, rest
    if colon or name in BACKBONES:
        return None, name
    for library in LIBRARIES:
        if knows(library, name):
            return library, name
    try:
        BACKBONES[name]
    except InputError as error:
        # An alias is answered with the right name; all else with the nearest of what there is anywhere.
        if " is called " in str(error):
            raise InputError(f"{where}: {error}") from None
    everything = [*BACKBONES, *(known for library in LIBRARIES for known in names(library))]
    raise InputError(
        f"{where}: there is no backbone '{name}', here or in timm or torchvision.{did_you_mean(name, everything)} "
        f"Ours: {', '.join(BACKBONES)}."
    )


def _registered(name: str, arguments: dict[str, Any], shape: Sequence[int], kind: Kind, where: str) -> nn.Module:
    _check_kind(name, getattr(BACKBONES[name], "kinds", frozenset({kind})), kind, where)
    facts = {"channels": shape[0], "shape": tuple(shape)}
    return _module(BACKBONES.build({"name": name, **arguments}, where=where, **facts), name, where)


def _imported(name: str, arguments: dict[str, Any], shape: Sequence[int], kind: Kind, where: str) -> nn.Module:
    build = _import(name, where)
    if isinstance(build, nn.Module):
        return build
    if not callable(build):
        raise InputError(f"{where}: '{name}' must be a function or class that gives an nn.Module; got {build!r}.")
    checked = check_arguments(build, arguments, where=where, owner=f"'{name}'")
    known = inspect.signature(build).parameters
    facts = {"channels": shape[0], "shape": tuple(shape)}
    filled = {key: value for key, value in facts.items() if key in known and key not in checked}
    try:
        made = build(**filled, **checked)
    except (ValueError, TypeError) as error:
        raise InputError(f"{where}: '{name}' could not be called: {error}") from error
    _check_kind(name, getattr(type(made), "kinds", frozenset({kind})), kind, where)
    return _module(made, name, where)


def _import(name: str, where: str) -> Any:
    module_name, _, attribute = name.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)  # a console script's path lacks the folder that it was started in
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise InputError(
            f"{where}: '{name}' means the function {attribute} of the Python module {module_name}, which could not be "
            f"imported ({type(error).__name__}: {error}); the module must lie in the current folder or be installed."
        ) from error
    finally:
        sys.path.remove(here)
    if not hasattr(module, attribute):
        raise InputError(
            f"{where}: the module {module_name} has no '{attribute}'.{did_you_mean(attribute, dir(module))}"
        )
    return cast(Callable[..., Any], getattr(module, attribute))


def _module(made: Any, name: str, where: str) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise InputError(f"{where}: '{name}' must give an nn.Module; it gave a {type(made).__name__}.")
    return made


def _check_kind(name: str, kinds: frozenset[str], kind: Kind, where: str) -> None:
    if kind not in kinds:
        fitting = [known for known in BACKBONES if kind in getattr(BACKBONES[known], "kinds", ())]
        reads = {"image": "images", "series": "series"}
        raise InputError(
            f"{where}: '{name}' reads {' and '.join(reads.get(k, k) for k in sorted(kinds))}, and the data are "
            f"{reads[kind]}; choose for example {', '.join(fitting)}."
        )
