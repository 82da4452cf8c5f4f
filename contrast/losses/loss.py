"""The protocol between losses and training, with a default for everything but `forward`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from contrast.core.registry import Registry
from contrast.losses.inputs import Extra

LOSSES = Registry("loss")
"""Every loss by name."""

Row = Mapping[str, str | int | float]
"""One row of a table of findings: column -> value."""


class Loss(nn.Module):
    """What training calls of a loss; a subclass overrides `forward`, and the rest where its default does not fit.

    Attributes:
        takes_extra: True if `forward` uses `extra`, so that memories can be combined with the loss.
        normalise: True if the loss scales embeddings to unit length; memories then store unit vectors.
        reference_of: what training passes as `reference`: a frozen network's vectors of each "sample", or of each
            "view".

    Example:
        >>> class Distance(Loss):
        ...     def forward(self, *views, targets=None, sample=None, group=None, reference=None, extra=()):
        ...         return (views[0] - views[1]).square().sum(dim=1).mean()
        >>> value = Distance()(torch.randn(64, 128), torch.randn(64, 128))
    """

    takes_extra: bool = False
    normalise: bool = True
    reference_of: Literal["sample", "view"] = "sample"

    def forward(
        self,
        *views: Tensor,
        targets: Sequence[Tensor | None] | None = None,
        sample: Tensor | None = None,
        group: Tensor | None = None,
        reference: Tensor | Sequence[Tensor] | None = None,
        extra: Extra | Sequence[Extra] | None = (),
    ) -> Tensor:
        """Return the loss of these views, (); see `PairLoss.forward` for the arguments."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(*views, ...), which returns the loss.")

    def update(self) -> None:
        """Update the loss's own state after an optimiser step; by default there is none."""

    def end_epoch(self) -> None:
        """Update the loss's own state after an epoch; by default there is none."""

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Detached measurements of the last call, by name; {} before the first."""
        return {}

    def false_negative_rates(self, labels: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """Measure the last call's negatives by labels that the loss does not use; {} for a loss without negatives.

        Args:
            labels: (samples,) int64 by sample index, -1 for none.
        """
        return {}

    def findings(self, names: Sequence[str]) -> dict[str, list[Row]]:  # noqa: ARG002
        """Return what the loss found in the data set, for the page of a run: title -> rows; {} for nothing.

        Rows with "sample" are drawn as pictures of the items with captions, rows with "epoch" as curves, and others as
        a table.

        Args:
            names: the name of each item by sample index.
        """
        return {}


class ModuleLoss(Loss):
    """A plain module as a `Loss`: it is called with the views and those keyword arguments that its `forward` accepts.

    Args:
        module: its `forward` takes the views, (N, D) each, and returns the loss, ().

    Raises:
        TypeError: for a module that defines other parts of the protocol without deriving from `Loss`.

    Example:
        >>> class Distance(torch.nn.Module):
        ...     def forward(self, z_a, z_b):
        ...         return (z_a - z_b).square().sum(dim=1).mean()
        >>> value = ModuleLoss(Distance())(z_a, z_b, sample=torch.arange(4))
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        name = type(module).__name__
        if defined := sorted((set(dir(Loss)) - set(dir(nn.Module))) & set(dir(module))):
            raise TypeError(
                f"{name} defines {', '.join(defined)}, which training uses of a contrast.losses.Loss only; "
                f"derive {name} from it."
            )
        self.module = module
        parameters = inspect.signature(module.forward).parameters.values()
        self._accepts_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)
        self._accepted = {one.name for one in parameters if one.kind is not inspect.Parameter.POSITIONAL_ONLY}
        self.takes_extra = self._accepts_all or "extra" in self._accepted

    def forward(self, *views: Tensor, **arguments: Any) -> Tensor:
        """Return the module's loss of these views, ().

        Raises:
            ValueError: for targets, references or extra candidates that the module does not accept.
        """
        accepted = {key: value for key, value in arguments.items() if self._accepts_all or key in self._accepted}
        for key in ("targets", "reference", "extra"):
            if key not in accepted and arguments.get(key) is not None and len(arguments[key]):
                raise ValueError(
                    f"{type(self.module).__name__} got {key}, which its forward does not accept; "
                    f"add {key}=None to its arguments, or leave out of the config what makes them."
                )
        value: Tensor = self.module(*views, **accepted)
        return value


def as_loss(module: nn.Module) -> Loss:
    """Return a `Loss` as it is, and any other module as a `ModuleLoss`.

    Raises:
        TypeError: for what is no module, and as `ModuleLoss`.

    Example:
        >>> as_loss(InfoNCE())
        InfoNCE()
        >>> as_loss(torch.nn.PairwiseDistance())
        ModuleLoss(
          (module): PairwiseDistance()
        )
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"a loss is a torch.nn.Module; got {type(module).__name__}.")
    return module if isinstance(module, Loss) else ModuleLoss(module)
