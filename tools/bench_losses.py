"""Measures every loss against its plain dense form and against other libraries' losses, cell by cell."""

from __future__ import annotations

import argparse
import ctypes
import fnmatch
import gc
import importlib
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrast.losses.amcl import AMCL
from contrast.losses.bad_pairs import BadPairs
from contrast.losses.cacr import CACR
from contrast.losses.cwcl import CWCL
from contrast.losses.decoupled import DecoupledInfoNCE
from contrast.losses.hard_contrastive import HardContrastive
from contrast.losses.hard_negative import HardNegative
from contrast.losses.info_nce import InfoNCE
from contrast.losses.siglip import SigLIP

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks" / "losses.md"
CELLS = ROOT / "runs" / "bench_losses"

DIMS, HEADS, CLASSES = 128, 4, 10
SMALL = (64, 128, 256)
SIZES = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
"""How many embeddings."""

DTYPES = {
    "float32": "float32 inputs, float32 products (PyTorch's default)",
    "bf16": 'bfloat16 inputs, and `torch.set_float32_matmul_precision("medium")` for everyone: embeddings are made '
    "float32 at the door, and products may round their operands to bfloat16",
}

ROOM = 12 * 2**30
"""Bytes that a contender may take on the CPU."""

EAGER = 16384
"""Beyond this many embeddings the eager dense form, half a minute a call, is not timed on the CPU; nor are peers."""

ROUNDS, FEWEST, MOST = 3, 5, 41
"""Rounds where one call takes over a minute; otherwise at least, and at most."""

LIMIT = 3600
"""Seconds until a child is given up."""

LONGEST = {"time": 120, "memory": 1800}
"""Seconds that one call of ours may take; a cell that would take longer, by a smaller one, is left out: missing."""

MIB = 2**20

# ------------------------------------------------------------------------------ the losses, as one writes them in torch


def unit(z: Tensor) -> Tensor:
    return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)


def same_sample(views: Tensor) -> Tensor:
    """(M, M) bool: the other view of the same sample, and the embedding itself; from (..., M, D) of two views."""
    sample = torch.arange(views.shape[-2] // 2, device=views.device).repeat(2)
    return sample[:, None] == sample


def other_view(z: Tensor) -> Tensor:
    return z.roll(z.shape[-2] // 2, dims=-2)


def nt_xent(a: Tensor, b: Tensor, temperature: float = 0.1) -> Tensor:
    z = unit(torch.cat([a, b]))
    logits = (z / temperature) @ z.T
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    target = torch.arange(len(z), device=z.device).roll(len(a))
    return F.cross_entropy(logits.masked_fill(itself, -math.inf), target)


def clip(a: Tensor, b: Tensor, log_scale: Tensor) -> Tensor:
    logits = log_scale.exp() * unit(a) @ unit(b).T
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def queue(a: Tensor, b: Tensor, memory: Tensor, temperature: float = 0.2) -> Tensor:
    anchor, key = unit(a), unit(b)
    positive = (anchor * key).sum(dim=1, keepdim=True)
    logits = torch.cat([positive, anchor @ memory.to(anchor.dtype).T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(a), dtype=torch.int64, device=a.device))


def supcon(a: Tensor, b: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    z, group = unit(torch.cat([a, b])), labels.repeat(2)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (group[:, None] == group) & ~itself
    log_share = ((z / temperature) @ z.T).masked_fill(itself, -math.inf).log_softmax(dim=1)
    return -(torch.where(positive, log_share, 0).sum(dim=1) / positive.sum(dim=1)).mean()


def decoupled(a: Tensor, b: Tensor, temperature: float = 0.1) -> Tensor:
    z = unit(torch.cat([a, b]))
    repel = ((z / temperature) @ z.T).masked_fill(same_sample(z), -math.inf).logsumexp(dim=1)
    return (repel - (z * other_view(z)).sum(dim=1) / temperature).mean()


def dclw(a: Tensor, b: Tensor, temperature: float = 0.1, sigma: float = 0.5) -> Tensor:
    z = unit(torch.cat([a, b]))
    repel = ((z / temperature) @ z.T).masked_fill(same_sample(z), -math.inf).logsumexp(dim=1)
    near = (z * other_view(z)).sum(dim=1)
    weight = 2 - len(z) * (near.detach() / sigma).softmax(dim=0)
    return (repel - weight * near / temperature).mean()


def hard_negative(a: Tensor, b: Tensor, temperature: float = 0.5, hardness: float = 1.0, prior: float = 0.1) -> Tensor:
    z = unit(torch.cat([a, b]))
    count = len(z) - 2
    logits = ((z / temperature) @ z.T).masked_fill(same_sample(z), -math.inf)
    hard = count * ((hardness * logits).softmax(dim=1) * logits.exp()).sum(dim=1)
    positive = ((z * other_view(z)).sum(dim=1) / temperature).exp()
    negative = ((hard - prior * count * positive) / (1 - prior)).clamp(min=count * math.exp(-1 / temperature))
    return ((positive + negative).log() - positive.log()).mean()


def hard_contrastive(a: Tensor, b: Tensor, temperature: float = 0.3, hardest: float = 0.1) -> Tensor:
    z = unit(torch.cat([a, b]))
    logits = ((z / temperature) @ z.T).masked_fill(same_sample(z), -math.inf)
    nearest = logits.topk(max(1, round(hardest * (len(z) - 2))), dim=1, sorted=False).values
    positive = (z * other_view(z)).sum(dim=1, keepdim=True) / temperature
    return (torch.cat([positive, nearest], dim=1).logsumexp(dim=1) - positive.squeeze(1)).mean()


def cacr(a: Tensor, b: Tensor) -> Tensor:
    distance = 2 - 2 * unit(a) @ unit(b).T
    itself = torch.eye(len(a), dtype=torch.bool, device=a.device)
    weight = (-distance).masked_fill(itself, -math.inf).softmax(dim=1)
    return distance.diagonal().mean() - (weight * distance).sum(dim=1).mean()


def cwcl(a: Tensor, b: Tensor, temperature: float = 0.07) -> Tensor:
    frozen, z = unit(a), unit(b)
    logits = (frozen / temperature) @ z.T
    weight = (frozen @ frozen.T + 1) / 2
    weighted = -((weight * logits.log_softmax(dim=1)).sum(dim=1) / weight.sum(dim=1)).mean()
    return weighted + F.cross_entropy(logits.T, torch.arange(len(a), device=a.device))


def siglip(a: Tensor, b: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    logits = log_scale.exp() * unit(a) @ unit(b).T + bias
    sign = 2 * torch.eye(len(a), dtype=logits.dtype, device=a.device) - 1
    return -F.logsigmoid(sign * logits).sum() / len(a)


def bounded(f: Tensor) -> Tensor:
    return 0.05 + (2 - 0.05) * f.sigmoid()


def all_negatives(z: Tensor, tau: Tensor, dims: int) -> Tensor:
    """AMCL with a log-sum-exp: (H, M, D) and the temperature of every pair, (H, M, M)."""
    score = z @ z.mT / tau - 0.1 * (dims / 2 * tau.log() + 1 / tau)
    positive = score.gather(2, other_view(torch.arange(z.shape[1], device=z.device)[:, None]).expand(len(z), -1, 1))
    return (score.masked_fill(same_sample(z), -math.inf).logsumexp(dim=2) - positive.squeeze(2)).mean()


def amcl(a: Tensor, b: Tensor, anchor_weight: Tensor, candidate_weight: Tensor, bias: Tensor) -> Tensor:
    z = unit(torch.cat([a, b], dim=1))
    f = (z @ anchor_weight.T) @ (z @ candidate_weight.T).mT / math.sqrt(len(anchor_weight))
    return all_negatives(z, bounded(f + bias), z.shape[2])


def amcl_mlp(
    a: Tensor,
    b: Tensor,
    anchor_weight: Tensor,
    candidate_weight: Tensor,
    hidden_bias: Tensor,
    out_weight: Tensor,
    bias: Tensor,
) -> Tensor:
    z = unit(torch.cat([a, b], dim=1))
    of_anchor, of_candidate = z @ anchor_weight.T + hidden_bias, z @ candidate_weight.T
    f = (of_anchor[:, :, None] + of_candidate[:, None]).relu() @ out_weight
    return all_negatives(z, bounded(f + bias), z.shape[2])


def amcl_max(
    a: Tensor,
    b: Tensor,
    anchor_weight: Tensor,
    candidate_weight: Tensor,
    hidden_bias: Tensor,
    out_weight: Tensor,
    bias: Tensor,
) -> Tensor:
    z = unit(torch.cat([a, b], dim=1))
    of_anchor, of_candidate = z @ anchor_weight.T + hidden_bias, z @ candidate_weight.T

    def score(similarity: Tensor, of_candidate: Tensor) -> Tensor:
        tau = bounded((of_anchor + of_candidate).relu() @ out_weight + bias)
        return similarity / tau - 0.1 * (z.shape[2] / 2 * tau.log() + 1 / tau)

    nearest, index = (z @ z.mT).masked_fill(same_sample(z), -math.inf).max(dim=2)
    chosen = of_candidate.gather(1, index[:, :, None].expand_as(of_candidate))
    return (score(nearest, chosen) - score((z * other_view(z)).sum(dim=2), other_view(of_candidate))).mean()


# --------------------------------------------------------------------------------------------------- what is compared


@dataclass(frozen=True)
class Peer:
    """Another library's loss: `call` gets its module and the inputs as float32; it is timed to `largest` embeddings."""

    library: str
    module: str
    name: str
    call: Callable[..., Tensor]
    largest: int = EAGER
    smallest: int = SMALL[0]

    def __str__(self) -> str:
        return f"{self.library} {self.name}"


PACKAGES = {
    "lightly": "lightly",
    "open_clip": "open_clip_torch",
    "pytorch-metric-learning": "pytorch-metric-learning",
}


def views_and_labels(loss: Any, a: Tensor, b: Tensor, labels: Tensor) -> Tensor:
    value: Tensor = loss(torch.cat([a, b]), labels.repeat(2))
    return value


LIGHTLY = Peer("lightly", "lightly.loss", "NTXentLoss", lambda made, a, b: made.NTXentLoss(0.1)(a, b))
LIGHTLY_DCL = Peer("lightly", "lightly.loss", "DCLLoss", lambda made, a, b: made.DCLLoss(0.1)(a, b))
LIGHTLY_DCLW = Peer("lightly", "lightly.loss", "DCLWLoss", lambda made, a, b: made.DCLWLoss(0.1)(a, b))
OPEN_CLIP = Peer(
    "open_clip",
    "open_clip.loss",
    "ClipLoss",
    lambda made, a, b, log_scale: made.ClipLoss()(unit(a), unit(b), log_scale.exp()),
)
OPEN_CLIP_SIGLIP = Peer(
    "open_clip",
    "open_clip.loss",
    "SigLipLoss",
    lambda made, a, b, log_scale, bias: made.SigLipLoss()(unit(a), unit(b), log_scale.exp(), bias),
)
PML = Peer(
    "pytorch-metric-learning",
    "pytorch_metric_learning.losses",
    "NTXentLoss",
    lambda made, a, b: views_and_labels(made.NTXentLoss(0.1), a, b, torch.arange(len(a), device=a.device)),
    largest=512,
    smallest=256,
)
PML_SUPCON = Peer(
    "pytorch-metric-learning",
    "pytorch_metric_learning.losses",
    "SupConLoss",
    lambda made, a, b, labels: views_and_labels(made.SupConLoss(0.1), a, b, labels),
    largest=8192,
)


@dataclass(frozen=True)
class Subject:
    """A loss, ours and dense.

    Args:
        words: how it is used here.
        make: ours, for embeddings of so many dimensions.
        call: ours with its inputs, by name.
        dense: the plain form, which takes the inputs and ours' parameters; None: it is compared with InfoNCE alone.
        inputs: "a", "b": the views; "memory": a queue; "labels"; "sample".
        learned: which inputs take a gradient.
        matrices: how many M x M matrices of float32 the eager form holds at its peak, about: whether it is tried.
        views: how many views stand along a side of the M x M matrix.
        heads: 0 where views are (N, D).
        peers: other libraries' losses.
        tight: whether it is NT-Xent, CLIP or the queue, of which more is asked.
        timed: to how many embeddings it is timed.
        largest: at how many its memory is judged.
    """

    words: str
    make: Callable[[int], nn.Module]
    call: Callable[..., Tensor]
    dense: Callable[..., Tensor] | None
    inputs: Sequence[str] = ("a", "b")
    learned: Sequence[str] = ("a", "b")
    matrices: float = 4
    views: int = 2
    heads: int = 0
    peers: Sequence[Peer] = ()
    tight: bool = False
    timed: int = SIZES[-1]
    largest: int = SIZES[-1]


def two_views(loss: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    value: Tensor = loss(a, b)
    return value


def with_samples(loss: nn.Module, a: Tensor, b: Tensor, sample: Tensor) -> Tensor:
    value: Tensor = loss(a, b, sample=sample)
    return value


_VIEWS = "M/2 samples in 2 views, every view against every view: M x M"
_PAIRS = "M pairs: M x M"

SUBJECTS: dict[str, Subject] = {
    "nt_xent": Subject(
        f"NT-Xent; {_VIEWS}",
        lambda dims: InfoNCE(0.1),  # noqa: ARG005
        two_views,
        nt_xent,
        matrices=3.5,
        peers=(LIGHTLY, PML),
        tight=True,
    ),
    "clip": Subject(
        f"CLIP, both directions, learned temperature; {_PAIRS}",
        lambda dims: InfoNCE(0.07, learn_temperature=True, candidates="across"),  # noqa: ARG005
        two_views,
        clip,
        matrices=4.4,
        views=1,
        peers=(OPEN_CLIP,),
        tight=True,
    ),
    "queue": Subject(
        "MoCo v2; M anchors, each with its own key, against a queue of M: M x M, gradient to the anchors",
        lambda dims: InfoNCE(0.2, candidates="memory"),  # noqa: ARG005
        lambda loss, a, b, memory: loss(a, targets=(None, b), extra=[memory]),
        queue,
        inputs=("a", "b", "memory"),
        learned=("a",),
        matrices=3,
        views=1,
        tight=True,
    ),
    "supcon": Subject(
        f"SupCon, {CLASSES} classes; {_VIEWS}",
        lambda dims: InfoNCE(0.1),  # noqa: ARG005
        lambda loss, a, b, labels: loss(a, b, group=labels),
        supcon,
        inputs=("a", "b", "labels"),
        matrices=3.75,
        peers=(PML_SUPCON,),
    ),
    "decoupled": Subject(
        f"DCL; {_VIEWS}",
        lambda dims: DecoupledInfoNCE(0.1),  # noqa: ARG005
        two_views,
        decoupled,
        peers=(LIGHTLY_DCL,),
        matrices=4.5,
    ),
    "dclw": Subject(
        f"DCLW; {_VIEWS}",
        lambda dims: DecoupledInfoNCE(0.1, weighting="von_mises_fisher"),  # noqa: ARG005
        two_views,
        dclw,
        peers=(LIGHTLY_DCLW,),
        matrices=4.5,
    ),
    "hard_negative": Subject(
        f"hardness-weighted and debiased; {_VIEWS}",
        lambda dims: HardNegative(),  # noqa: ARG005
        two_views,
        hard_negative,
        matrices=5.5,
    ),
    "hard_contrastive": Subject(
        f"the hardest tenth of the negatives; {_VIEWS}",
        lambda dims: HardContrastive(),  # noqa: ARG005
        two_views,
        hard_contrastive,
        matrices=2.5,
    ),
    "cacr": Subject(f"the small-scale form; {_PAIRS}", lambda dims: CACR(), two_views, cacr, matrices=4.4, views=1),  # noqa: ARG005
    "cwcl": Subject(
        f"weights from the frozen view itself; {_PAIRS}, gradient to the other view",
        lambda dims: CWCL(),  # noqa: ARG005
        two_views,
        cwcl,
        learned=("b",),
        matrices=5.4,
        views=1,
    ),
    "siglip": Subject(
        f"learned scale and bias; {_PAIRS}",
        lambda dims: SigLIP(),  # noqa: ARG005
        two_views,
        siglip,
        matrices=5.2,
        views=1,
        peers=(OPEN_CLIP_SIGLIP,),
    ),
    "amcl": Subject(
        f"{HEADS} heads, log-sum-exp, temperatures from an inner product; {HEADS} times M x M",
        lambda dims: AMCL(dims, form="logsumexp", network="inner_product"),
        two_views,
        amcl,
        matrices=41.5,
        heads=HEADS,
        timed=EAGER,
    ),
    "amcl_mlp": Subject(
        f"{HEADS} heads, log-sum-exp, temperatures from a perceptron with 128 hidden units; {HEADS} times M x M",
        lambda dims: AMCL(dims, form="logsumexp", network="mlp"),
        two_views,
        amcl_mlp,
        matrices=1540,
        heads=HEADS,
        timed=8192,
        largest=8192,
    ),
    "amcl_max": Subject(
        f"{HEADS} heads, the nearest negative alone, temperatures from a perceptron; {HEADS} times M x M",
        lambda dims: AMCL(dims, form="max", network="mlp"),
        two_views,
        amcl_max,
        matrices=10,
        heads=HEADS,
    ),
    "bad_pairs": Subject(
        f"around NT-Xent, with a history; {_VIEWS}; compared with NT-Xent alone",
        lambda dims: BadPairs(InfoNCE(0.1), samples=SIZES[-1], warmup_epochs=0),  # noqa: ARG005
        with_samples,
        None,
        inputs=("a", "b", "sample"),
    ),
}

OWN = ("ours", "eager", "compiled", "info_nce", "step")
"""Who is timed and is no other library."""

Step = Callable[[], Sequence[Tensor]]
"""Forward and backward: gives the loss, then the gradients."""


def inputs(subject: Subject, size: int, dtype: torch.dtype, device: str = "cpu", dims: int = DIMS) -> dict[str, Tensor]:
    """Give what the loss is called with: views that resemble each other, as after some training."""
    generator = torch.Generator().manual_seed(0)
    half = size // subject.views
    heads = (subject.heads,) if subject.heads else ()

    def random() -> Tensor:
        return torch.randn(*heads, half, dims, generator=generator)

    base = random()
    made = {name: (base + random()).to(device, dtype) for name in ("a", "b")}
    if "memory" in subject.inputs:
        made["memory"] = F.normalize(random().to(device, dtype), dim=-1)
    whole = torch.arange(half, device=device)
    made |= {"labels": whole % CLASSES, "sample": whole}
    return {name: made[name].requires_grad_() if name in subject.learned else made[name] for name in subject.inputs}


def step(call: Callable[..., Tensor], named: Mapping[str, Tensor], parameters: Sequence[Tensor] = ()) -> Step:
    """Give forward and backward of a call with named inputs, down to every tensor that takes a gradient."""
    leaves = [*(tensor for tensor in named.values() if tensor.requires_grad), *parameters]

    def run() -> Sequence[Tensor]:
        value = call(**named)
        return value.detach(), *torch.autograd.grad(value, leaves)

    return run


def contender(name: str, subject: Subject, given: Mapping[str, Tensor], dims: int = DIMS) -> Step:
    """Give forward and backward of one contender: "ours", "eager", "compiled", "info_nce" or a peer."""
    tensor = given["a"]
    exact = torch.promote_types(tensor.dtype, torch.float32)
    if name == "info_nce":
        plain = InfoNCE(0.1)
        return step(lambda **named: with_samples(plain, **named), given)
    ours = subject.make(dims).to(tensor.device, exact)
    if name == "ours":
        if isinstance(ours, BadPairs):
            subject.call(ours, **given)
            ours.end_epoch()
        return step(lambda **named: subject.call(ours, **named), given, list(ours.parameters()))
    named = {key.rsplit(".", 1)[-1]: parameter.detach() for key, parameter in ours.named_parameters()}
    learned = {key: parameter.clone().requires_grad_() for key, parameter in named.items()}
    if name in ("eager", "compiled"):
        assert subject.dense is not None
        dense = torch.compile(subject.dense, dynamic=False) if name == "compiled" else subject.dense
        return step(dense, {**given, **learned})
    peer = next(peer for peer in subject.peers if str(peer) == name)
    module = importlib.import_module(peer.module)

    def call(**named: Tensor) -> Tensor:
        at_door = {key: value.to(exact) if value.is_floating_point() else value for key, value in named.items()}
        return peer.call(module, **at_door)

    return step(call, {**given, **learned})


# ----------------------------------------------------------------------------------------------------------- the cells


@dataclass(frozen=True)
class Cell:
    """What one child process measures: times of all contenders in turn, the memory of one, or a training step."""

    kind: str
    loss: str = ""
    size: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    contender: str = ""

    def __str__(self) -> str:
        parts = (self.kind, self.loss, self.size or "", self.dtype, self.device, self.contender)
        return "-".join(str(part) for part in parts if part)

    @property
    def square(self) -> float:
        """Bytes of one float32 matrix of M x M."""
        return 4 * self.size**2

    @property
    def cost(self) -> float:
        """Say about how long it takes, in no unit."""
        subject = SUBJECTS.get(self.loss)
        weight = 1.0 if subject is None else min(subject.matrices, 100)
        return weight * max(self.size, 2048) ** 2 * (1 if self.kind == "time" else 0.3)


def contenders(loss: str, size: int, device: str) -> list[str]:
    """Say who is timed in turn at this size; who does not fit is among them, and is called so."""
    subject = SUBJECTS[loss]
    within = size <= EAGER or device == "cuda"
    if subject.dense is None:
        return ["ours", "info_nce"]
    dense = (["eager"] if within else []) + (["compiled"] if size >= SIZES[0] else [])
    peers = [str(peer) for peer in subject.peers if peer.smallest <= size <= peer.largest]
    return ["ours", *dense, *peers]


def plan(losses: Sequence[str], sizes: Sequence[int], dtypes: Sequence[str], device: str) -> list[Cell]:
    """Give all cells, those that decide a gate and are short first."""
    cells = [Cell("step", device=device)]
    for loss in losses:
        subject = SUBJECTS[loss]
        for dtype in dtypes:
            cells += [Cell("time", loss, size, dtype, device) for size in sizes if size <= subject.timed]
            for size in sorted({size for size in (8192, subject.largest) if size in sizes}):
                who = ["ours", *(["eager", "compiled"] if size == 8192 and subject.dense else [])]
                cells += [Cell("memory", loss, size, dtype, device, one) for one in who]
    decisive = (0, SIZES[0], 4096, 8192)
    return sorted(cells, key=lambda cell: (cell.dtype != "float32", cell.size not in decisive, cell.cost))


def too_large(cell: Cell, name: str) -> bool:
    """Say whether a contender is not even tried, as it takes more than there is room for: compiled, two matrices."""
    subject = SUBJECTS[cell.loss]
    if name not in ("eager", "compiled"):
        return False
    fewest = max(1, subject.heads) * 2
    matrices = subject.matrices if name == "eager" else min(subject.matrices, fewest)
    return matrices * cell.square > room(cell.device)


def room(device: str) -> float:
    return 0.9 * torch.cuda.get_device_properties(0).total_memory if device == "cuda" else ROOM


# -------------------------------------------------------------------------------------------- what a child process does


def status(field: str) -> int:
    """Give a line of /proc/self/status in bytes: "VmRSS", "VmHWM", "VmData"."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, field
    return 1024 * int(found[1])


def reason(error: BaseException) -> str:
    """Say why a contender is not measured."""
    text = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or re.search(r"alloc|not enough memory", text, re.I):
        return "does not fit"
    if isinstance(error, ModuleNotFoundError):
        return "not installed"
    return f"fails: {type(error).__name__}: {next(iter(text.splitlines()), '')}"[:200]


def other_work() -> Callable[[], float]:
    """Give what tells the share of all cores that other programs took since now."""

    def busy() -> float:
        fields = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")

    def own() -> float:
        return sum(os.times()[:4])

    began, was_busy, was_own = time.monotonic(), busy(), own()

    def share() -> float:
        elapsed = (time.monotonic() - began) * (os.cpu_count() or 1)
        return max(0.0, (busy() - was_busy - (own() - was_own)) / elapsed) if elapsed else 0.0

    return share


def clock(run: Step, calls: int, device: str) -> float:
    """Give milliseconds a call."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / calls
    began = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - began) * 1000 / calls


def rounds_for(slowest: float, seconds: float) -> int:
    """Say how often everyone has a turn, when the slowest takes so many milliseconds."""
    if slowest > 60_000:
        return ROUNDS
    return max(FEWEST, min(MOST, int(1000 * seconds / slowest)))


def take_turns(running: Mapping[str, Step], device: str, seconds: float) -> dict[str, Any]:
    """Time everyone in turn, round after round, once each is warm.

    Args:
        running: forward and backward of each.
        device: where.
        seconds: about how long each has.
    """
    lasts = {name: clock(run, 1, device) for name, run in running.items()}
    lasts |= {name: clock(run, 1, device) for name, run in running.items() if lasts[name] < 2000}
    # Another library, which may be a thousand times slower, has its turn in the first rounds only.
    rounds = dict.fromkeys(running, rounds_for(max(lasts[name] for name in running if name in OWN), seconds))
    rounds |= {name: min(rounds[name], rounds_for(lasts[name], seconds)) for name in running if name not in OWN}
    calls = {name: max(1, int(1000 * seconds / MOST / last)) for name, last in lasts.items()}
    times: dict[str, list[float]] = {name: [] for name in running}
    share = other_work()
    gc.disable()
    for number in range(max(rounds.values())):
        for name, run in running.items():
            if number < rounds[name]:
                times[name].append(round(clock(run, calls[name], device), 5))
        gc.collect(0)
    gc.enable()
    return {"times": times, "calls": calls, "other_work": round(share(), 3)}


def measure_times(cell: Cell, seconds: float) -> dict[str, Any]:
    """Warm everyone up, say who does not take part and why, and time the others."""
    subject = SUBJECTS[cell.loss]
    given = inputs(subject, cell.size, DTYPE[cell.dtype], cell.device)
    running: dict[str, Step] = {}
    absent: dict[str, str] = {}
    for name in contenders(cell.loss, cell.size, cell.device):
        if too_large(cell, name):
            absent[name] = "does not fit"
            continue
        try:
            running[name] = contender(name, subject, given)
            running[name]()
        except Exception as error:
            if name in ("ours", "info_nce"):
                raise
            running.pop(name, None)
            absent[name] = reason(error)
        gc.collect()
    return {**take_turns(running, cell.device, seconds), "absent": absent}


def allowance(given: Mapping[str, Tensor]) -> int:
    """Give the bytes of the unit copies and of the gradients, N D float32 each."""
    rows = [tensor.numel() * (1 + tensor.requires_grad) for tensor in given.values() if tensor.is_floating_point()]
    return 4 * sum(rows)


def measure_memory(cell: Cell) -> dict[str, Any]:
    """Measure how much larger the process gets in forward and backward than its inputs, unit copies and gradients."""
    subject, dtype = SUBJECTS[cell.loss], DTYPE[cell.dtype]
    if too_large(cell, cell.contender):
        return {"absent": "does not fit"}
    try:
        # What libraries load and keep at their first call is no memory of the loss.
        small = contender(cell.contender, subject, inputs(subject, 256, dtype, cell.device))
        for _ in range(2):
            small()
        given = inputs(subject, cell.size, dtype, cell.device)
        run = contender(cell.contender, subject, given)
        if cell.contender == "compiled":
            run()
        gc.collect()
        if cell.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            torch.cuda.synchronize()
            grown = torch.cuda.max_memory_allocated() - before
        else:
            if sys.platform == "linux":
                ctypes.CDLL(None).malloc_trim(0)
            before = status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the largest VmRSS so far, starts anew
            kept = run()
            grown = status("VmHWM") - before
            del kept
    except Exception as error:
        if cell.contender == "ours":
            raise
        return {"absent": reason(error)}
    return {"grown": grown, "beyond": max(0, grown - allowance(given))}


def measure_step(cell: Cell, images: int = 64) -> dict[str, Any]:
    """Time forward and backward of the encoder that the loss stands behind: ResNet-18 on images of 32 x 32."""
    import torchvision

    encoder = torchvision.models.resnet18(num_classes=DIMS)
    encoder.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    encoder.maxpool = nn.Identity()
    encoder = encoder.to(cell.device)
    batch = torch.randn(images, 3, 32, 32, device=cell.device)
    parameters = list(encoder.parameters())

    def run() -> Sequence[Tensor]:
        return torch.autograd.grad(encoder(batch).square().mean(), parameters)

    run()
    return {**take_turns({"step": run}, cell.device, 6), "images": images}


DTYPE = {"float32": torch.float32, "bf16": torch.bfloat16}


def child(cell: Cell, seconds: float, file: Path) -> None:
    """Measure a cell and write it, whole or not at all."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("medium" if cell.dtype == "bf16" else "highest")
    if cell.device == "cpu" and sys.platform == "linux":
        most = status("VmData") + ROOM
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    measure = {
        "time": lambda: measure_times(cell, seconds),
        "memory": lambda: measure_memory(cell),
        "step": lambda: measure_step(cell),
    }
    found = measure[cell.kind]()
    whole = {**vars(cell), **found, "threads": torch.get_num_threads(), "machine": machine(cell.device)}
    kept = {**whole, "commit": json.loads(os.environ.get("BENCH_COMMIT", "{}")), "made": time.strftime("%Y-%m-%d")}
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps(kept, indent=1) + "\n")
    unfinished.replace(file)


def machine(device: str) -> dict[str, str]:
    """Say what it is measured on, without a name."""
    names = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*:\s*(.*)$", names, re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    made = {
        "processor": model[1] if model else platform.processor(),
        "cores": str(os.cpu_count()),
        "memory": f"{memory:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "PyTorch": str(torch.__version__),
    }
    if device == "cuda":
        made["GPU"] = torch.cuda.get_device_name(0)
    for library, package in PACKAGES.items():
        try:
            made[library] = metadata.version(package)
        except metadata.PackageNotFoundError:
            made[library] = "not installed"
    return made


# ------------------------------------------------------------------------------------------------- what the parent does


def commit() -> dict[str, str]:
    """Give the commit, and whether what the figures depend on differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", "contrast", "tools", "pyproject.toml")
    return {"commit": git("rev-parse", "--short=12", "HEAD") or "unknown", "changed": "yes" if changed else "no"}


def environment(cell: Cell) -> dict[str, str]:
    """Give a child its variables."""
    made = dict(os.environ)
    made.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    made["GOMP_SPINCOUNT"] = "20000"  # spinning threads cost whole scheduler ticks wherever anything else runs
    made["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    made["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), made.get("PYTHONPATH", "")]))
    made["BENCH_COMMIT"] = json.dumps(commit())
    if cell.kind == "memory":
        # glibc otherwise raises this threshold up to 32 MiB as blocks are freed, and then keeps freed blocks: what is
        # resident would be what was once needed. From 64 KiB on, a freed block now goes back at once.
        made |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    return made


def run_child(cell: Cell, folder: Path, seconds: float) -> str:
    """Measure a cell in a process of its own; give "" or why there is no result."""
    words = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(vars(cell))]
    words += ["--seconds", str(seconds), "--cells", str(folder)]
    try:
        done = subprocess.run(
            words, cwd=ROOT, env=environment(cell), capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no result within {LIMIT} s"
    last = (done.stderr.strip().splitlines() or ["no word"])[-1]
    return "" if done.returncode == 0 else f"status {done.returncode}: {last}"


Found = dict[Cell, dict[str, Any]]


def expected(cell: Cell, found: Found) -> float:
    """Give the seconds that a call of ours will take, by the largest smaller cell that was timed; 0 where none was."""
    smaller = [
        other
        for other in found
        if (other.kind, other.loss, other.dtype, other.device) == ("time", cell.loss, cell.dtype, cell.device)
        and SIZES[0] <= other.size <= cell.size
    ]
    if cell.kind == "step" or not smaller:
        return 0.0
    known = max(smaller, key=lambda other: other.size)
    return (median(found[known], "ours") or 0) / 1000 * (cell.size / known.size) ** 2


def read(folder: Path) -> Found:
    """Give the cells that exist."""
    found: Found = {}
    for file in sorted(folder.glob("*.json")):
        kept = json.loads(file.read_text())
        found[Cell(**{name: kept[name] for name in Cell.__dataclass_fields__})] = kept
    return found


# -------------------------------------------------------------------------------------------------------- what is said


def median(found: Mapping[str, Any], name: str) -> float | None:
    """Give milliseconds, None where it was not measured."""
    times = found.get("times", {}).get(name)
    return statistics.median(times) if times else None


def ratio(found: Mapping[str, Any], name: str) -> float | None:
    """Give the median time of ours divided by that of another, of the rounds that both took part in."""
    times: Mapping[str, list[float]] = found.get("times", {})
    if not times.get(name):
        return None
    both = times["ours"][: len(times[name])]
    return statistics.median(both) / statistics.median(times[name])


def spread(found: Mapping[str, Any], name: str) -> tuple[float, float]:
    """Give the smallest and the largest ratio of any one round."""
    times = found["times"]
    ratios = [ours / other for ours, other in zip(times["ours"], times[name], strict=False)]
    return min(ratios), max(ratios)


@dataclass(frozen=True)
class Gate:
    """A bound that every cell of a kind must keep.

    Args:
        words: what is asked.
        bound: the number it must not be above.
        value: of a cell with its measurements, or None where it says nothing about this (what does not fit, say).
        cells: those it is about.
        unit: of the number.
    """

    words: str
    bound: float
    value: Callable[[Mapping[str, Any]], float | None]
    cells: Callable[[Cell], bool]
    unit: str = ""

    def judge(self, planned: Sequence[Cell], found: Found) -> list[str]:
        """Give the row: what is asked, the bound, the worst and where, the verdict, and of how many cells."""
        about = [cell for cell in planned if self.cells(cell)]
        values = [(self.value(found[cell]), str(cell)) for cell in about if cell in found]
        numbers = [(value, name) for value, name in values if value is not None]
        missing = sum(cell not in found for cell in about)
        of = f"{len(numbers)}" + (f", {missing} missing" if missing else "")
        bound = f"{self.bound:g}{self.unit}"
        if not numbers:
            return [self.words, bound, "-", "-", "**missing**" if missing or not about else "nothing to compare", of]
        worst, name = max(numbers)
        verdict = "**missed**" if worst > self.bound else "met so far" if missing else "met"
        missed = sum(value > self.bound for value, _ in numbers)
        if missed:
            of = f"{len(numbers)}, {missed} above" + (f", {missing} missing" if missing else "")
        return [self.words, bound, f"{worst:.3g}{self.unit}", f"`{name}`", verdict, of]


def of_time(*, tight: bool | None, smallest: int, dtype: str, beyond: int = 2**62) -> Callable[[Cell], bool]:
    """Give which timed cells a gate is about; "bad_pairs" has its own."""
    return lambda cell: (
        cell.kind == "time"
        and cell.loss != "bad_pairs"
        and (tight is None or SUBJECTS[cell.loss].tight == tight)
        and smallest <= cell.size < beyond
        and cell.dtype == dtype
    )


def slower(found: Mapping[str, Any]) -> float | None:
    """Give by how many milliseconds ours is slower than the eager form."""
    ours, eager = median(found, "ours"), median(found, "eager")
    return None if ours is None or eager is None else ours - eager


def beyond_mib(found: Mapping[str, Any]) -> float | None:
    return found["beyond"] / MIB if "beyond" in found else None


def gates() -> Iterator[Gate]:
    """Give what is asked of the CPU's cells."""
    for dtype in DTYPES:
        for tight, name, eager, compiled in (
            (True, "NT-Xent, CLIP, queue", 0.35, 0.6),
            (False, "the other losses", 0.6, 1.15),
        ):
            about = of_time(tight=tight, smallest=4096, dtype=dtype)
            said = f"{name}, from 4,096, {dtype}"
            yield Gate(f"{said}: time, of eager dense", eager, lambda found: ratio(found, "eager"), about)
            yield Gate(f"{said}: time, of compiled dense", compiled, lambda found: ratio(found, "compiled"), about)
        about = of_time(tight=None, smallest=SIZES[0], dtype=dtype)
        yield Gate(
            f"every loss, from 512, {dtype}: time, of eager dense", 1.15, lambda found: ratio(found, "eager"), about
        )
        about = of_time(tight=None, smallest=0, dtype=dtype, beyond=SIZES[0])
        yield Gate(f"every loss, below 512, {dtype}: slower than eager dense by", 0.3, slower, about, " ms")
        yield Gate(
            f"bad_pairs, from 4,096, {dtype}: time, of NT-Xent alone",
            1.05,
            lambda found: ratio(found, "info_nce"),
            lambda cell, dtype=dtype: (  # type: ignore[misc]
                cell.kind == "time" and cell.loss == "bad_pairs" and cell.size >= 4096 and cell.dtype == dtype
            ),
        )
        yield Gate(
            f"every loss, at 65,536 (amcl_mlp: 8,192), {dtype}: memory beyond inputs, unit copies and gradients",
            64,
            beyond_mib,
            lambda cell, dtype=dtype: (  # type: ignore[misc]
                cell.kind == "memory"
                and cell.contender == "ours"
                and cell.size == SUBJECTS[cell.loss].largest
                and cell.dtype == dtype
            ),
            " MiB",
        )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Give the lines of a Markdown table."""
    for row in (head, ["---"] * len(head), *rows):
        yield "| " + " | ".join(row) + " |"
    yield ""


def measured(head: Sequence[str], rows: Sequence[Sequence[str]], labels: int = 1) -> Iterator[str]:
    """Give the lines of a Markdown table without the rows and columns in which nothing has been measured.

    Args:
        head: of the columns.
        rows: under it.
        labels: how many columns name a row.
    """

    def some(entries: Sequence[str]) -> bool:
        return any(entry not in ("missing", "-", "") for entry in entries)

    rows = [row for row in rows if some(row[labels:])]
    columns = [k for k in range(len(head)) if k < labels or some([row[k] for row in rows])]
    if rows:
        yield from table([head[k] for k in columns], [[row[k] for k in columns] for row in rows])


def number(value: float) -> str:
    """Give three digits: 0.0123, 1.23, 12.3, 1,234."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def entry(found: Found, cell: Cell, name: str, value: Callable[[Mapping[str, Any]], float | None]) -> str:
    """Give a number, or why there is none; "-" where none is planned."""
    if cell not in found:
        return "missing"
    kept = found[cell]
    absent = kept.get("absent", {})
    if isinstance(absent, str):
        return absent
    if name in absent:
        return str(absent[name]).split(":")[0]
    given = value(kept)
    return "-" if given is None else number(given)


def ratio_table(found: Found, planned: Sequence[Cell], dtype: str, device: str, name: str) -> Iterator[str]:
    """Give ours divided by another, for every loss and size."""
    cells = {
        (cell.loss, cell.size): cell
        for cell in planned
        if cell.kind == "time"
        and (cell.dtype, cell.device) == (dtype, device)
        and cell.size >= SIZES[0]
        and name in contenders(cell.loss, cell.size, device)
    }
    sizes = sorted({size for _, size in cells})
    rows = [
        [f"`{loss}`"]
        + [
            entry(found, cells[loss, size], name, lambda kept: ratio(kept, name)) if (loss, size) in cells else "-"
            for size in sizes
        ]
        for loss in dict.fromkeys(loss for loss, _ in cells)
    ]
    if rows:
        yield from measured(["loss", *(f"{size:,}" for size in sizes)], sorted(rows, key=order_of))


def order_of(row: Sequence[str]) -> int:
    """Put rows in the order of `SUBJECTS`."""
    return list(SUBJECTS).index(row[0].strip("`"))


def range_of(times: Sequence[float]) -> str:
    return f"{number(statistics.median(times))} [{number(min(times))}-{number(max(times))}]"


def every_cell(found: Found, planned: Sequence[Cell], loss: str, device: str) -> Iterator[str]:
    """Give all timed cells of a loss, with the spread."""
    rows = []
    for cell in sorted(planned, key=lambda cell: (list(DTYPES).index(cell.dtype), cell.size)):
        if (cell.kind, cell.loss, cell.device) != ("time", loss, device):
            continue
        size = f"{cell.size:,}"
        kept = found.get(cell)
        for name in contenders(loss, cell.size, device) if kept else ():
            if name not in kept["times"]:
                rows.append([size, cell.dtype, name, str(kept["absent"].get(name, "missing")), "", "", ""])
            else:
                times = kept["times"][name]
                turns = f"{len(times)} x {kept['calls'][name]}"
                least, most = spread(kept, name)
                compared = ["", ""]
                if name != "ours":
                    compared = [number(ratio(kept, name) or 0), f"{number(least)}-{number(most)}"]
                rows.append([size, cell.dtype, name, range_of(times), *compared, turns])
    head = ["embeddings", "dtype", "who", "ms: median [min-max]", "ours / it", "of single rounds", "rounds x calls"]
    if rows:
        yield f"**`{loss}`**"
        yield ""
        yield from table(head, rows)


def memory_table(found: Found, planned: Sequence[Cell], device: str) -> Iterator[str]:
    """Give MiB beyond inputs, unit copies and gradients, and in brackets all that the process grew by."""

    def said(loss: str, dtype: str, size: int, who: str) -> str:
        cell = Cell("memory", loss, size, dtype, device, who)
        if cell not in planned:
            return "-"
        text = entry(found, cell, who, beyond_mib)
        return f"{text} ({number(found[cell]['grown'] / MIB)})" if "grown" in found.get(cell, {}) else text

    columns = [(8192, "ours"), (8192, "eager"), (8192, "compiled"), (SIZES[-1], "ours")]
    rows = [
        [f"`{loss}`", dtype, *(said(loss, dtype, *column) for column in columns)]
        for loss in SUBJECTS
        for dtype in DTYPES
        if any(cell.kind == "memory" and cell.loss == loss and cell.dtype == dtype for cell in planned)
    ]
    yield from measured(["loss", "dtype", *(f"{who}, {size:,}" for size, who in columns)], rows, labels=2)


def small_table(found: Found, planned: Sequence[Cell], dtype: str, device: str) -> Iterator[str]:
    """Give by how many milliseconds ours is slower than eager dense below 512."""
    rows = []
    for loss, subject in SUBJECTS.items():
        cells = [Cell("time", loss, size, dtype, device) for size in SMALL]
        if subject.dense is None or not any(cell in planned for cell in cells):
            continue
        row = [f"`{loss}`"]
        for cell in cells:
            kept = found.get(cell, {})
            ours, eager = median(kept, "ours"), median(kept, "eager")
            if ours is None or eager is None:
                row.append("missing")
            else:
                row.append(f"{ours - eager:+.2f} ({number(ours)}, {number(eager)})")
        rows.append(row)
    if rows:
        yield from measured(["loss", *(f"{size}" for size in SMALL)], rows)


def matters(found: Found, planned: Sequence[Cell], device: str) -> Iterator[str]:
    """Say from which size on it matters who wrote the loss."""
    yield "## From which size on it matters"
    yield ""
    a_step = found.get(Cell("step", device=device))
    if a_step is None:
        yield "**missing**: the cell of a training step has not been measured."
        yield ""
        return
    image = statistics.median(a_step["times"]["step"]) / a_step["images"]
    cells = [cell for cell in planned if (cell.kind, cell.loss, cell.dtype) == ("time", "nt_xent", "float32")]
    shares: dict[str, dict[int, float]] = {"ours": {}, "eager": {}}
    for cell in sorted(cells, key=lambda cell: cell.size):
        for name, by_size in shares.items():
            taken = median(found.get(cell, {}), name)
            if taken is not None:
                by_size[cell.size] = taken / (taken + image * cell.size)
    yield (
        f"A training step computes the encoder too: here forward and backward of a ResNet-18 on images of 32 x 32 took "
        f"{number(image)} ms for each view of a sample ({a_step['images']} at a time, float32). What NT-Xent takes of "
        "encoder and loss together, in percent:"
    )
    yield ""
    sizes = sorted({size for by_size in shares.values() for size in by_size})
    rows = [
        [name, *(f"{100 * by_size[size]:.2g}" if size in by_size else "-" for size in sizes)]
        for name, by_size in shares.items()
    ]
    yield from table(["", *(f"{size:,}" for size in sizes)], rows)
    said = {}
    for name, by_size in shares.items():
        below = [size for size, share in by_size.items() if share <= 0.01]
        said[name] = f"up to {max(below):,} embeddings" if below else "at no measured size"
    yield (
        f"The loss is one percent of the step or less {said['ours']} with ours and {said['eager']} with the eager "
        "dense form, among the sizes measured. Below a few thousand embeddings the loss is a percent of a training "
        "step at most, whoever wrote it: there one chooses it for what it computes, not for its speed. Its share grows "
        "with the batch, and sooner behind a smaller encoder. Memory matters first: where its matrices do not fit, the "
        "dense form cannot be computed at all."
    )
    yield ""


def measured_on(found: Found, device: str) -> Iterator[str]:
    """Say machine, versions and commit; all of them where cells were measured on several."""
    kept = [made for cell, made in found.items() if cell.device == device]
    machines: dict[str, int] = {}
    commits: dict[str, int] = {}
    for made in kept:
        said = ", ".join(f"{name} {value}" for name, value in made["machine"].items())
        said += f"; {made['threads']} threads"
        machines[said] = machines.get(said, 0) + 1
        changed = made["commit"].get("changed") == "yes"
        name = f"`{made['commit'].get('commit', 'unknown')}`" + (" with changes not committed" if changed else "")
        commits[name] = commits.get(name, 0) + 1

    def listed(counted: Mapping[str, int]) -> str:
        return "; ".join(f"{name} ({count} cells)" if len(counted) > 1 else name for name, count in counted.items())

    days = sorted({made["made"] for made in kept})
    yield f"- machine: {listed(machines)}"
    yield f"- commit: {listed(commits)}"
    yield f"- days: {days[0]}" + (f" to {days[-1]}" if len(days) > 1 else "")
    beside = [made["other_work"] for made in kept if "other_work" in made]
    if beside and device == "cpu":
        busy = sum(share > 0.05 for share in beside)
        yield (
            f"- other programs took more than 5 % of the cores in {busy} of {len(beside)} timed cells, "
            f"at most {100 * max(beside):.0f} %"
        )
    yield ""


CPU_WORDS = f"""\
Every comparison is a child process of its own, in which ours and the others take turns, round after round, forward and
backward together from embeddings that are not normalised yet; {MOST} rounds or, where they are long, at least {FEWEST}
({ROUNDS} where one call takes over a minute), after a warm-up. A ratio is that of the median times; below 1, ours is
faster. *Eager dense* is the same loss as one writes it in PyTorch today, with the whole matrix of similarities and
autograd; the tests compare its value and gradient with ours. *Compiled dense* is `torch.compile` of that function, its
compiling not counted. *Does not fit* is what takes more than {ROOM // 2**30} GiB. Above {EAGER:,} embeddings the eager
form and other libraries are not timed. D = {DIMS}. Rows and columns without any measured cell are left out of the
tables; how many cells are missing stands beside each demand above.

M, the size, is a side of the similarity matrix:"""

MEMORY_WORDS = """\
MiB by which the process grows in forward and backward beyond its inputs, their unit copies and their gradients (N x D
float32 each); in brackets all that it grows by, copies and gradients included. A child process measures one contender,
after a call at 256 embeddings that loads the libraries; the largest resident size of the call
(`VmHWM`, which `/proc/self/clear_refs` starts anew) minus the resident size before. So that this is what lives and not
what the allocator keeps, glibc gives freed blocks back from 64 KiB on (`MALLOC_MMAP_THRESHOLD_`); the timed processes
run with its defaults."""


def page(found: Found, planned: Sequence[Cell], command: str) -> str:
    """Give docs/benchmarks/losses.md.

    Args:
        found: the cells that exist.
        planned: those that should.
        command: that made them.
    """
    lines = ["# What the losses cost", "", f"Written by `{command}` from its measurements; not by hand.", ""]
    devices = [one for one in ("cpu", "cuda") if any(cell.device == one for cell in found)]
    if not devices:
        return "\n".join([*lines, "**missing**: no cell has been measured.", ""])
    if "cpu" in devices:
        on_cpu = [cell for cell in planned if cell.device == "cpu"]
        lines += ["## What was asked, and what came out", "", *measured_on(found, "cpu")]
        head = ["asked", "at most", "worst", "where", "verdict", "cells"]
        lines += table(head, [gate.judge(on_cpu, found) for gate in gates()])
    lines += matters(found, [cell for cell in planned if cell.device == devices[0]], devices[0])
    for device in devices:
        lines += section(found, [cell for cell in planned if cell.device == device], device)
    return "\n".join(lines)


def section(found: Found, planned: Sequence[Cell], device: str) -> Iterator[str]:
    """Give all that was measured on one device."""
    place = {"cpu": "On the CPU", "cuda": "On a GPU"}[device]
    used = {cell.loss for cell in planned if cell.loss}
    yield f"## {place}"
    yield ""
    if device == "cuda":
        yield from measured_on(found, device)
        yield "As on the CPU, timed by CUDA events; what fits is judged by this GPU's memory."
    yield CPU_WORDS
    yield ""
    words = [[f"`{loss}`", subject.words] for loss, subject in SUBJECTS.items() if loss in used]
    yield from table(["loss", "what it is here"], words)
    for dtype, meaning in DTYPES.items():
        if not any(cell.dtype == dtype and cell.loss for cell in planned):
            continue
        if not any(cell.kind == "time" and (cell.dtype, cell.device) == (dtype, device) for cell in found):
            yield f"### Time, {dtype}"
            yield ""
            yield "**missing**: no cell has been measured."
            yield ""
            continue
        yield f"### Time, {dtype}"
        yield ""
        yield f"{dtype}: {meaning}."
        yield ""
        names = ["eager", "compiled", "info_nce"]
        peers = [str(peer) for subject in SUBJECTS.values() for peer in subject.peers]
        for name in [*names, *peers]:
            rows = list(ratio_table(found, planned, dtype, device, name))
            if rows:
                yield f"Ours / {NAMES.get(name, name)}:"
                yield ""
                yield from rows
        rows = list(small_table(found, planned, dtype, device))
        if rows:
            yield "Below 512, by how many milliseconds ours is slower than eager dense (ours, eager):"
            yield ""
            yield from rows
    yield "### Memory"
    yield ""
    yield MEMORY_WORDS if device == "cpu" else "As on the CPU, of `torch.cuda.max_memory_allocated`."
    yield ""
    yield from memory_table(found, planned, device)
    yield "### Every cell"
    yield ""
    for loss in SUBJECTS:
        if loss in used:
            yield from every_cell(found, planned, loss, device)


NAMES = {"eager": "eager dense", "compiled": "compiled dense", "info_nce": "NT-Xent alone"}


# ---------------------------------------------------------------------------------------------------------- the command


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="tools/bench_losses", description=__doc__, allow_abbrev=False)
    made.add_argument("--losses", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS), metavar="LOSS")
    made.add_argument("--sizes", nargs="+", type=int, choices=[*SMALL, *SIZES], metavar="M", help="embeddings")
    made.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    made.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="of cells' names: 'time-clip-4096-*'")
    made.add_argument("--again", action="store_true", help="measure these cells again, though they exist")
    made.add_argument("--however-long", action="store_true", help="leave out no cell for its length")
    made.add_argument("--minutes", type=float, default=math.inf, help="start no cell after so many")
    made.add_argument("--seconds", type=float, help="about how long each contender has in a cell; 6, with --quick 1")
    made.add_argument("--quick", action="store_true", help="times in float32 at 512, 4,096 and 8,192, for ten minutes")
    made.add_argument("--list", action="store_true", help="name the cells, and whether they exist")
    made.add_argument("--write", action="store_true", help="measure nothing, write the page from the cells that exist")
    made.add_argument("--cells", type=Path, help="the folder of the cells; runs/bench_losses")
    made.add_argument("--page", type=Path, help="where the page goes; docs/benchmarks/losses.md, or beside quick cells")
    made.add_argument("--child", help=argparse.SUPPRESS)
    return made


def bench(words: Sequence[str] | None = None) -> int:
    """Measure what is missing, then write the page; 1 where a cell failed or a gate is missed."""
    asked = parser().parse_args(words)
    folder = asked.cells or (CELLS / "quick" if asked.quick else CELLS)
    goes = asked.page or (folder / "losses.md" if asked.quick else PAGE)
    seconds = asked.seconds or (1.0 if asked.quick else 6.0)
    if asked.child:
        cell = Cell(**json.loads(asked.child))
        child(cell, seconds, folder / f"{cell}.json")
        return 0
    began, minutes = time.monotonic(), asked.minutes
    if asked.quick:
        asked.sizes, asked.dtypes = asked.sizes or [512, 4096, 8192], ["float32"]
        minutes = min(minutes, 10)
    planned = plan(asked.losses, asked.sizes or [*SMALL, *SIZES], asked.dtypes, asked.device)
    if asked.quick:
        planned = [cell for cell in planned if cell.kind != "memory"]
    planned = [cell for cell in planned if any(fnmatch.fnmatch(str(cell), pattern) for pattern in asked.only)]
    folder.mkdir(parents=True, exist_ok=True)
    known = read(folder)
    todo = [] if asked.write else [cell for cell in planned if asked.again or cell not in known]
    if asked.list:
        for cell in planned:
            print(f"{cell}{'' if cell not in known else ' (exists)'}")
        return 0
    failed = 0
    for done, cell in enumerate(todo):
        spent = (time.monotonic() - began) / 60
        if spent >= minutes:
            print(f"{len(todo) - done} cells are left after {spent:.0f} minutes; the same command goes on.")
            break
        print(f"[{done + 1} of {len(todo)}, {spent:.1f} min] {cell} ...", flush=True)
        call = 0.0 if asked.however_long else expected(cell, read(folder))
        if call > LONGEST.get(cell.kind, math.inf):
            print(
                f"  left out: one call would take about {call / 60:.0f} minutes; --however-long measures it", flush=True
            )
            continue
        why = run_child(cell, folder, seconds)
        failed += bool(why)
        print(f"  {why or said_of(read(folder)[cell])}", flush=True)
    found = read(folder)
    if not asked.quick:
        # However little was asked for now, the page shows the whole grid, of each device where there are cells of it.
        devices = sorted({asked.device, *(cell.device for cell in found)})
        planned = [cell for device in devices for cell in plan(list(SUBJECTS), [*SMALL, *SIZES], list(DTYPES), device)]
    text = page(found, planned, "tools/bench_losses --quick" if asked.quick else "tools/bench_losses")
    goes.parent.mkdir(parents=True, exist_ok=True)
    goes.write_text(text)
    on_cpu = [cell for cell in planned if cell.device == "cpu"]
    judged = [gate.judge(on_cpu, found) for gate in gates()]
    print()
    for row in judged:
        print(f"{row[4].strip('*'):12} {row[2]:>10} of {row[1]:<8} {row[0]} ({row[5]}) {row[3].strip('`')}")
    print(f"\n{goes}")
    return 1 if failed or any(row[4] == "**missed**" for row in judged) else 0


def said_of(kept: Mapping[str, Any]) -> str:
    """Say in a line what came of a cell."""
    if "beyond" in kept:
        return f"{number(kept['beyond'] / MIB)} MiB beyond, {number(kept['grown'] / MIB)} in all"
    if isinstance(kept.get("absent"), str):
        return str(kept["absent"])
    times = [f"{name} {range_of(times)} ms" for name, times in kept["times"].items()]
    return "; ".join([*times, *(f"{name}: {why}" for name, why in kept.get("absent", {}).items())])


if __name__ == "__main__":
    from contrast.cli import answer

    sys.exit(answer(bench))
