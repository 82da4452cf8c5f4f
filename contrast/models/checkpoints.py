"""Weights of a file into a network: strictly, and without executing code that the file may hold."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from contrast.core.registry import InputError
from contrast.models.libraries import require

WEIGHTS = "backbone.safetensors"
PICKLED = (".pt", ".pth", ".ckpt", ".bin")
WRAPPINGS = ("state_dict", "model_state_dict", "model", "backbone", "encoder", "network", "net")


def load_weights(module: nn.Module, path: str | Path, *, classifier: Sequence[str] = ()) -> None:
    """Fill `module` with the weights of a file; every key and every shape must match.

    Wrappings are undone: a "state_dict" or "model" entry, and the prefix ("module.", "backbone.", "encoder.backbone.",
    ...) under which the most of the module's own keys stand; what stands outside it (heads, twins) is left out.

    Args:
        module: a network.
        path: .safetensors, .pt, .pth, .ckpt, .bin, or a run's folder.
        classifier: names of layers that the module lacks on purpose; their weights are left out.

    Raises:
        InputError: for a file that is missing, broken, of unknown format or wants to execute code, and for weights of
            another network.
    """
    path = weights_file(path)
    wanted = module.state_dict()
    given = {
        key: value
        for key, value in _unprefixed(read_weights(path), wanted).items()
        if not any(key.startswith(f"{layer}.") for layer in classifier if layer)
    }
    missing = [key for key in wanted if key not in given and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in given if key not in wanted]
    misshapen = [key for key in wanted if key in given and wanted[key].shape != given[key].shape]
    if missing or unexpected or misshapen:
        raise InputError(
            f"{path} holds the weights of another network than this {type(module).__name__}: "
            f"{_differences(missing, unexpected, misshapen, wanted, given)}. Name the network it was trained as, with "
            "the same arguments, image size and channels; or another file."
        )
    # BatchNorm's counter is younger than many checkpoints, and evaluation does not read it.
    module.load_state_dict({key: given.get(key, value) for key, value in wanted.items()})


def weights_file(path: str | Path) -> Path:
    """Give the file that is meant: `path` itself, or the backbone of the run whose folder it is."""
    path = Path(path)
    if path.is_dir():
        if not (path / WEIGHTS).is_file():
            raise InputError(
                f"{path} is a folder without {WEIGHTS}; give a weights file, or the folder of a finished run."
            )
        return path / WEIGHTS
    if not path.is_file():
        raise InputError(f"the weights file {path} does not exist.")
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """Give the tensors of a weights file by name, on the CPU, without executing code."""
    if path.suffix == ".safetensors":
        safetensors = require("safetensors.torch")
        try:
            return dict(safetensors.load_file(path))
        except Exception as error:
            raise InputError(f"{path} is not a whole safetensors file ({error}); copy or download it again.") from error
    if path.suffix not in PICKLED:
        raise InputError(f"{path} has an unknown ending; weights are read from .safetensors, {', '.join(PICKLED)}.")
    tensors = _tensors(_unpickled(path))
    if not tensors:
        raise InputError(f"{path} holds no weights; save them with torch.save(network.state_dict(), ...).")
    return tensors


def _unpickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds more than weights, and reading it could execute code, so it was not read; where you trust "
            "it, load it yourself and save torch.save(network.state_dict(), ...) or a .safetensors file."
        ) from error
    except Exception as error:
        raise InputError(f"{path} could not be read as a PyTorch file; copy or download it again.") from error


def _tensors(content: Any) -> dict[str, Tensor]:
    """Give the mapping of tensors inside a checkpoint, however deep it is wrapped."""
    if not isinstance(content, Mapping):
        return {}
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if tensors:
        return tensors
    return next((inner for key in WRAPPINGS if (inner := _tensors(content.get(key)))), {})


def _unprefixed(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give what stands under the prefix that holds the most wanted keys; the shortest such prefix."""
    prefixes = {""}
    for key in given:
        parts = key.split(".")
        prefixes.update(".".join(parts[:depth]) + "." for depth in range(1, min(len(parts), 5)))

    def matches(prefix: str) -> int:
        return sum(prefix + key in given for key in wanted)

    best = min(sorted(prefixes), key=lambda prefix: (-matches(prefix), prefix.count("."), len(prefix)))
    return {key.removeprefix(best): value for key, value in given.items() if key.startswith(best)}


def _differences(
    missing: Sequence[str],
    unexpected: Sequence[str],
    misshapen: Sequence[str],
    wanted: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} keys are missing (such as {missing[0]})")
    if unexpected:
        parts.append(f"{len(unexpected)} are unexpected (such as {unexpected[0]})")
    if misshapen:
        key = misshapen[0]
        shapes = f"{tuple(given[key].shape)} in the file, {tuple(wanted[key].shape)} here"
        parts.append(f"{len(misshapen)} have another shape (such as {key}: {shapes})")
    return ", ".join(parts)
