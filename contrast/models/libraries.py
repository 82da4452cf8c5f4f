"""Networks of timm and torchvision by name: without classifier, for any size and number of channels."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch.nn.functional as F
from torch import nn

from contrast.core.registry import InputError, did_you_mean

Library = Literal["timm", "torchvision"]
Stem = Literal["auto", "small", "original"]
LIBRARIES: tuple[Library, ...] = ("timm", "torchvision")
SMALL_STEM_PIXELS = 32  # up to this size the stem of a ResNet would leave only a few pixels


@dataclass
class LibraryNetwork:
    """A network without its classifier, the names of the removed layers, and the Python lines that rebuild it."""

    network: nn.Module
    classifier: tuple[str, ...]
    lines: list[str] = field(default_factory=list)

    def replace(self, name: str, new: nn.Module) -> None:
        """Replace the submodule `name`, and record the line that does the same without this package."""
        self.network.set_submodule(name, new)
        self.lines.append(f"network.set_submodule({name!r}, torch.nn.{new!r})")


def require(module: str) -> Any:
    """Return a module of an optional package, or raise an InputError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise InputError(
            f"{error.name} is needed for this and is not installed; pip install 'contrast-learning[train]' brings it."
        ) from error


def network_names(library: Library) -> list[str]:
    """Return the names of a library's image networks."""
    if library == "timm":
        return list(require("timm").list_models())
    models = require("torchvision.models")
    return list(models.list_models(module=models))


def has_network(library: Library, name: str) -> bool:
    """True if a library has a network of this name (timm: with or without the tag of its weights)."""
    if library == "timm":
        return bool(require("timm").is_model(name))
    return name in network_names("torchvision")


def build_network(
    library: Library,
    name: str,
    arguments: Mapping[str, Any],
    shape: Sequence[int],
    *,
    pretrained: bool,
    where: str,
) -> LibraryNetwork:
    """Return the network `name` without classifier for images of `shape` (C, H, W).

    Images of 32 pixels or fewer get a small stem in ResNet-like networks (`stem`: auto, small, original): the first
    convolution is 3x3 with stride 1, there is no pooling after it, and pretrained kernels are averaged down to 3x3.

    Raises:
        InputError: for an unknown name or argument, a size the network cannot process, weights that are not available.
    """
    if not has_network(library, name):
        raise InputError(f"{where}: {library} has no network '{name}'.{did_you_mean(name, network_names(library))}")
    arguments = dict(arguments)
    stem = arguments.pop("stem", "auto")
    if stem not in ("auto", "small", "original"):
        raise InputError(f"{where}.stem must be one of auto, small, original; got {stem!r}.")
    fixed = {"in_chans", "num_classes", "checkpoint_path", "weights", "pretrained_cfg", "pretrained_cfg_overlay"}
    for key in sorted(fixed & set(arguments)):
        raise InputError(
            f"{where}.{key} cannot be set: the channels come from the data, there is no classifier, "
            "and `pretrained` names the initial weights."
        )
    build = _from_timm if library == "timm" else _from_torchvision
    built = build(name, arguments, shape, pretrained, where)
    if stem == "small" or (stem == "auto" and max(shape[1:]) <= SMALL_STEM_PIXELS):
        replaced = _replace_stem(built)
        if stem == "small" and not replaced:
            raise InputError(f"{where}.stem: {library}:{name} has no ResNet-like stem to replace; remove the key.")
    return built


def _from_timm(
    name: str, arguments: dict[str, Any], shape: Sequence[int], pretrained: bool, where: str
) -> LibraryNetwork:
    timm = require("timm")
    try:
        config = timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        raise InputError(f"{where}: {error}{did_you_mean(name, tags)}") from error
    if pretrained and not timm.models.is_model_pretrained(name):
        raise InputError(f"{where}.pretrained: timm:{name} has no published weights; set it to false or to a file.")
    options = {"num_classes": 0, "in_chans": shape[0], **arguments}
    if config is not None and config.fixed_input_size:
        options = _with_image_size(timm, name, options, shape, where)
    network = _create(timm.create_model, name, options, where)
    if pretrained:
        network = _download_weights(lambda: timm.create_model(name, pretrained=True, **options), f"timm:{name}", where)
    written = "".join(f", {key}={value!r}" for key, value in options.items())
    classifier = config.classifier if config is not None else None
    removed = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    return LibraryNetwork(network, removed, [f"network = timm.create_model({name!r}{written})"])


def _with_image_size(timm: Any, name: str, options: dict[str, Any], shape: Sequence[int], where: str) -> dict[str, Any]:
    """Return the options with the image's size, and with a patch size that leaves at least 7 patches per side."""
    height, width = shape[1:]
    own = _create(timm.create_model, name, options, where)
    patch = getattr(getattr(own, "patch_embed", None), "patch_size", None)
    options = {"img_size": (height, width), **options}
    if patch is None or "patch_size" in options:
        return options
    own_patch = int(patch[0])
    sizes = [own_patch, *(size for size in (16, 8, 4, 2, 1) if size < own_patch)]
    fitting = [s for s in sizes if min(height, width) // s >= 7 and height % s == 0 and width % s == 0]
    if not fitting or height * width > 1024 * fitting[0] ** 2:
        raise InputError(
            f"{where}: timm:{name} cuts images into square patches, and {height}x{width} pixels are no multiple of "
            f"the patch; set data.size to a multiple of {own_patch}."
        )
    return options if fitting[0] == own_patch else {"patch_size": fitting[0], **options}


def _from_torchvision(
    name: str, arguments: dict[str, Any], shape: Sequence[int], pretrained: bool, where: str
) -> LibraryNetwork:
    models = require("torchvision.models")
    options = dict(arguments)
    if name.startswith(("vit_", "maxvit")):
        if shape[1] != shape[2]:
            raise InputError(f"{where}: torchvision:{name} takes square images; got {shape[1]}x{shape[2]} pixels.")
        options = (
            {"image_size": shape[1], **options} if name.startswith("vit_") else {"input_size": shape[1:], **options}
        )
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": False, **options}
    network = _create(models.get_model, name, {"weights": None, **options}, where)
    if pretrained:
        label = f"torchvision:{name}"
        network = _download_weights(lambda: models.get_model(name, weights="DEFAULT", **options), label, where)
    written = "".join(f", {key}={value!r}" for key, value in options.items())
    built = LibraryNetwork(network, (), [f"network = torchvision.models.get_model({name!r}{written})"])
    last, classes = _last_layer(network)
    built.classifier = (last,)
    if classes is not None:
        built.replace(last, nn.Identity())
    _set_channels(built, shape[0])
    return built


def _create(create: Any, name: str, options: Mapping[str, Any], where: str) -> nn.Module:
    try:
        return cast(nn.Module, create(name, **options))
    except Exception as error:
        # Networks raise TypeError, ValueError, AssertionError and others for arguments and sizes they do not accept.
        raise InputError(f"{where}: {name} cannot be built: {_first_error_line(error)}") from error


def _download_weights(create: Any, label: str, where: str) -> nn.Module:
    try:
        return cast(nn.Module, create())
    except Exception as error:
        # The same network was just built without weights, so only reading or downloading them can have failed.
        raise InputError(
            f"{where}.pretrained: the weights of {label} are not on this machine and could not be downloaded "
            f"({_first_error_line(error)}); connect to the network once, or set it to a file or to false."
        ) from error


def _first_error_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def _last_layer(network: nn.Module) -> tuple[str, int | None]:
    """Return the name and the classes of torchvision's classifier: its last layer with 1,000 outputs."""
    found: tuple[str, int | None] = ("", None)
    for name, module in network.named_modules():
        outputs = getattr(module, "out_features", getattr(module, "out_channels", None))
        if isinstance(module, nn.Linear | nn.Conv2d) and outputs == 1000:
            found = (name, outputs)
    return found


def _set_channels(built: LibraryNetwork, channels: int) -> None:
    """Replace the first convolution by one for `channels`; each kernel slice is the old mean, rescaled."""
    name, old = next((n, m) for n, m in built.network.named_modules() if isinstance(m, nn.Conv2d))
    if old.in_channels == channels:
        return
    new = _convolution_like(old, channels, old.kernel_size, old.stride, old.padding)
    mean = old.weight.detach().mean(1, keepdim=True) * (old.in_channels / channels)
    new.weight.data.copy_(mean.expand_as(new.weight))
    built.replace(name, new)


def _replace_stem(built: LibraryNetwork) -> bool:
    """Replace a ResNet-like stem by a 3x3 convolution of stride 1 without pooling; False if there is none."""
    modules = dict(built.network.named_modules())
    for first, pool in (("conv1", "maxpool"), ("features.conv0", "features.pool0")):
        if first not in modules or pool not in modules:
            continue
        if isinstance(modules[first], nn.Sequential):
            first += ".0"
        old = modules.get(first)
        if not isinstance(old, nn.Conv2d):
            continue
        new = _convolution_like(old, old.in_channels, 3, 1, 1)
        if old.kernel_size == (3, 3):
            kernel = old.weight.detach()
        else:
            area = old.kernel_size[0] * old.kernel_size[1] / 9
            kernel = F.adaptive_avg_pool2d(old.weight.detach(), 3) * area
        new.weight.data.copy_(kernel)
        built.replace(first, new)
        built.replace(pool, nn.Identity())
        return True
    return False


def _convolution_like(old: nn.Conv2d, channels: int, kernel: Any, stride: Any, padding: Any) -> nn.Conv2d:
    new = nn.Conv2d(channels, old.out_channels, kernel, stride, padding, bias=old.bias is not None)
    if new.bias is not None and old.bias is not None:
        new.bias.data.copy_(old.bias.detach())
    return new
