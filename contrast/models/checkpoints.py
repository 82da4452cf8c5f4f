"""Loading weights from a file into a network: strictly, and without executing code from the file."""

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
    """Load the weights of a file into `module`; every key and every shape must match.

    Wrappings are removed: a "state_dict" or "model" entry, and the prefix ("module.", "backbone.",
    "encoder.backbone.", ...) with the most of the module's own keys; keys without it (heads, twins) are ignored.

    Args:
        module: a network.
        path: .safetensors, .pt, .pth, .ckpt, .bin, or a run's folder.
        classifier: names of layers that the module intentionally lacks; their weights are ignored.

    Raises:
        InputError: for a file that is missing, broken, of unknown format or would execute code, and for weights of
            another network.

    Example:
        >>> import tempfile
        >>> network, path = nn.Linear(3, 2), Path(tempfile.mkdtemp()) / "weights.pt"
        >>> torch.save(network.state_dict(), path)
        >>> load_weights(nn.Linear(3, 2), path)
    """
    path = weights_file(path)
    expected = module.state_dict()
    given = {
        key: value
        for key, value in _without_prefix(read_weights(path), expected).items()
        if not any(key.startswith(f"{layer}.") for layer in classifier if layer)
    }
    missing = [key for key in expected if key not in given and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in given if key not in expected]
    misshapen = [key for key in expected if key in given and expected[key].shape != given[key].shape]
    if missing or unexpected or misshapen:
        raise InputError(
            f"{path} contains the weights of another network than this {type(module).__name__}: "
            f"{_differences(missing, unexpected, misshapen, expected, given)}. Name the network it was trained as, "
            "with the same arguments, image size and channels; or another file."
        )
    # Older checkpoints lack BatchNorm's counter, and evaluation does not read it.
    module.load_state_dict({key: given.get(key, value) for key, value in expected.items()})


def weights_file(path: str | Path) -> Path:
    """Return `path` if it is a file, or the backbone file of the run's folder that it is."""
    path = Path(path)
    if path.is_dir():
        if not (path / WEIGHTS).is_file():
            raise InputError(
                f"{path} is a folder without {WEIGHTS}; name a weights file, or the folder of a finished run."
            )
        return path / WEIGHTS
    if not path.is_file():
        raise InputError(f"the weights file {path} does not exist.")
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a weights file by name, on the CPU, without executing code."""
    if path.suffix == ".safetensors":
        safetensors = require("safetensors.torch")
        try:
            return dict(safetensors.load_file(path))
        except Exception as error:
            raise InputError(f"{path} is no complete safetensors file ({error}); copy or download it again.") from error
    if path.suffix not in PICKLED:
        raise InputError(f"{path} has an unknown ending; weights are read from .safetensors, {', '.join(PICKLED)}.")
    tensors = _tensors(_load_pickle(path))
    if not tensors:
        raise InputError(f"{path} contains no weights; save them with torch.save(network.state_dict(), ...).")
    return tensors


def _load_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} contains more than weights, and reading it could execute code, so it was not read; if you trust "
            "it, load it yourself and save torch.save(network.state_dict(), ...) or a .safetensors file."
        ) from error
    except Exception as error:
        raise InputError(f"{path} could not be read as a PyTorch file; copy or download it again.") from error


def _tensors(content: Any) -> dict[str, Tensor]:
    """Return the mapping of tensors inside a checkpoint, at any depth of wrapping."""
    if not isinstance(content, Mapping):
        return {}
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if tensors:
        return tensors
    return next((inner for key in WRAPPINGS if (inner := _tensors(content.get(key)))), {})


def _without_prefix(given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries under the prefix with the most expected keys, the shortest such prefix removed."""
    prefixes = {""}
    for key in given:
        parts = key.split(".")
        prefixes.update(".".join(parts[:depth]) + "." for depth in range(1, min(len(parts), 5)))

    def matches(prefix: str) -> int:
        return sum(prefix + key in given for key in expected)

    best = min(sorted(prefixes), key=lambda prefix: (-matches(prefix), prefix.count("."), len(prefix)))
    return {key.removeprefix(best): value for key, value in given.items() if key.startswith(best)}


def _differences(
    missing: Sequence[str],
    unexpected: Sequence[str],
    misshapen: Sequence[str],
    expected: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} keys are missing (such as {missing[0]})")
    if unexpected:
        parts.append(f"{len(unexpected)} are unexpected (such as {unexpected[0]})")
    if misshapen:
        key = misshapen[0]
        shapes = f"{tuple(given[key].shape)} in the file, {tuple(expected[key].shape)} here"
        parts.append(f"{len(misshapen)} have another shape (such as {key}: {shapes})")
    return ", ".join(parts)
