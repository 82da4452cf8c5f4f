"""A few timed steps on copies before a run: all parts fit together, and how much time and memory a step takes."""

from __future__ import annotations

import copy
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from contrast.core.registry import InputError
from contrast.core.seeding import derived
from contrast.data.dataset import Batch, Data
from contrast.data.loader import StepSampler
from contrast.memory import Memory
from contrast.train.optimizers import Optimizer
from contrast.train.step import Step


@dataclass(frozen=True)
class DryRun:
    """What a few steps measured.

    Args:
        seconds_per_step: the median, after the first.
        peak_bytes: memory of the process (CPU) or of the device (CUDA) at its peak.
        loss: the last loss.
        originals: (n, ...) the first prepared items of a batch.
        views: their views.
        names: the names of these items.
    """

    seconds_per_step: float
    peak_bytes: int
    loss: float
    originals: Tensor
    views: list[Tensor]
    names: list[str]


def dry_run(
    step: Step,
    optimizer: Optimizer,
    data: Data,
    sampler: StepSampler,
    *,
    steps: int = 3,
    shown: int = 8,
    device: torch.device | None = None,
) -> DryRun:
    """Train copies of the parts for some steps and discard them; random state and originals do not change.

    Args:
        step: the parts of a training step.
        optimizer: how to step.
        data: the training set.
        sampler: the batches.
        steps: how many, at least 1.
        shown: items whose views are returned.
        device: the accelerator where there is one, if not given.

    Raises:
        InputError: where views, encoder, loss and memories do not fit together, the loss is not finite, or no
            checkpoint can contain a memory.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    copied = _copied(step, device)
    torch_optimizer = optimizer.build([copied.encoder, copied.loss])
    for group in torch_optimizer.param_groups:
        group["lr"] = 0.0  # as at the start of training; the full rate without its warm-up could diverge
    seconds, value = [], float("nan")
    batches = iter(sampler)
    originals, drawn, positions = torch.empty(0), [], [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with torch.random.fork_rng():
        torch.manual_seed(derived(sampler.seed, "dry_run"))
        for number in range(steps):
            start = time.perf_counter()
            positions = next(batches)
            batch = Batch(*(field.to(device) for field in data.train.__getitems__(positions)))
            generator = torch.Generator(device).manual_seed(derived(sampler.seed, "dry_run", number))
            try:
                output = copied.compute(batch, generator)
            except InputError:
                raise
            except ValueError as error:
                raise InputError(f"loss: {error}") from error
            originals, drawn = output.prepared, output.views
            torch_optimizer.zero_grad()
            output.loss.backward()  # type: ignore[no-untyped-call]
            torch_optimizer.step()
            copied.update_memories([output.keys])
            value = output.loss.item()
            seconds.append(time.perf_counter() - start)
    _check_states(copied.memories)
    if value != value:
        raise InputError("the loss is NaN on the first batches of this data; check it for extreme values.")
    return DryRun(
        statistics.median(seconds[1:] or seconds),
        peak_bytes(device),
        value,
        originals[:shown].cpu(),
        [view[:shown].cpu() for view in drawn],
        [data.train.names[position] for position in positions[:shown]],
    )


def _check_states(memories: Sequence[Memory]) -> None:
    """Refuse before training what the first checkpoint would refuse, when training is lost."""
    for memory in memories:
        try:
            memory.state_dict()
        except TypeError as error:
            raise InputError(f"memory: {error}") from error


def _copied(step: Step, device: torch.device) -> Step:
    """Return the step with copies of all that it changes, on the device."""
    parts = (step.encoder, step.loss, step.memory, step.sampler_memory)
    encoder, loss, memory, sampler_memory = copy.deepcopy(parts)
    for part in (encoder, loss, *memory, *sampler_memory):
        part.to(device).train()
    if isinstance(step.reference, nn.Module):
        step.reference.to(device)
    return replace(step, encoder=encoder, loss=loss, memory=memory, sampler_memory=sampler_memory)


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory of this process (CPU) or of the device (CUDA) so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
