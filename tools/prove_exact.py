"""Compare every loss on several processes with the same loss on one process, next to other libraries; print a table."""

from __future__ import annotations

import contextlib
import importlib
import math
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from contrast.losses import LOSSES
from tests.gloo import Failure, Processes

SIZES = {
    "even": {2: (8, 8), 4: (8, 8, 8, 8)},
    "unequal": {2: (11, 5), 4: (11, 5, 9, 7)},
    "empty": {2: (9, 0), 4: (9, 0, 7, 0)},
}
"""How many samples each process has."""
WORLDS = tuple(SIZES["even"])

EXACT = 1e-10
"""Two results are the same where they differ by no more than this, relative to the reference."""

WIDTH, DIMS, QUEUE, TOWER, CLASSES = 12, 6, 7, 5, 3
"""Of an input, of an embedding; rows of the queue; of a frozen tower's embedding; labels."""

PATIENCE = 20
"""Seconds after which processes count as hanging."""

VERDICTS = ("exact", "value", "scaled", "differs", "undefined", "NaN", "error", "hangs", "crashes")
"""What can come out, from good to bad."""


@dataclass(frozen=True)
class Case:
    """One loss and its inputs.

    Args:
        library: "contrast" or a peer.
        name: of the loss there.
        inputs: in words, separated by commas: "3 views", "2 heads", "labels", "targets", "queue", "reference",
            "samples", "1 epoch" (a complete pass over the batch before the measurement, for a loss with a history).
        arguments: the constructor's; a mapping with a name is a loss inside.
        wrapper: arguments of pytorch-metric-learning's DistributedLossWrapper; without any it is not used.
    """

    library: str
    name: str
    inputs: str = "2 views"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    wrapper: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        plain = f"{self.name}({choices(self.arguments)})".removesuffix("()")
        return f"DistributedLossWrapper({plain}, {choices(self.wrapper)})" if self.wrapper else plain

    def counts(self) -> dict[str, int]:
        """Return each word of `inputs`, in the singular, with its number."""
        parts = [part.split() for part in self.inputs.split(",")]
        return {part[-1].removesuffix("s"): int(part[0]) if len(part) > 1 else 1 for part in parts}


def choices(arguments: Mapping[str, Any]) -> str:
    """Return the arguments that are names or flags; numbers do not make another case."""
    words = {key: value["name"] if isinstance(value, Mapping) else value for key, value in arguments.items()}
    return ", ".join(f"{key}={word}" for key, word in words.items() if isinstance(word, str | bool))


# ---------------------------------------------------------------------------------------------------------- the losses

Form = tuple[str, Mapping[str, Any]]
"""Inputs and arguments, see `Case`."""

_BAD_PAIRS = {"samples": 64, "warmup_epochs": 1, "noisy_width": 0.5, "faulty_width": 0.5}
FORMS: dict[str, Sequence[Form]] = {
    "amcl": [("2 views, 2 heads", {"dim": DIMS, "form": form}) for form in ("max", "logsumexp")],
    "amcl_barlow": [("2 views, 2 heads", {"dim": DIMS})],
    "amcl_cosine": [("2 views, 2 heads, targets", {"dim": DIMS})],
    "bad_pairs": [
        ("2 views, samples, 1 epoch", {"loss": {"name": loss}, **_BAD_PAIRS}) for loss in ("info_nce", "cacr")
    ],
    "cacr": [
        ("2 views", {}),
        ("3 views, labels, queue", {"repulsion": "all"}),
        ("3 views, targets", {"detach_weights": True}),
    ],
    "cacr_multi_crop": [("3 views, targets", {"cost": cost}) for cost in ("rbf", "euclidean")],
    "cacr_queue": [("2 views, targets, queue", {}), ("3 views, labels, targets", {"constant_weights": "none"})],
    "cwcl": [("2 views, reference", {}), ("2 views, labels, reference", {"learn_temperature": True})],
    "decoupled": [("2 views", {}), ("3 views, queue", {"weighting": "von_mises_fisher"})],
    "false_negatives": [
        ("2 views", {"loss": {"name": "info_nce"}, "relative_margin": 0.3}),
        ("3 views, labels, queue", {"loss": {"name": "decoupled"}, "top": 1}),
    ],
    "hard_contrastive": [("2 views", {}), ("3 views, queue", {"form": "simple", "hardest": 5})],
    "info_nce": [
        ("2 views", {}),
        ("3 views, labels, queue", {}),
        ("3 views, 2 heads", {"positives": "alone"}),
        ("2 views", {"candidates": "across", "learn_temperature": True}),
        ("2 views, targets, queue", {"candidates": "memory"}),
    ],
    "negative_cosine": [("2 views, targets", {})],
    "siglip": [("2 views", {}), ("2 views, labels, queue", {})],
}
"""What is measured of a loss of `contrast`; of a loss without an entry the forms of `ANY`."""
ANY: Sequence[Form] = [("2 views", {}), ("3 views, labels, queue", {})]


def ours() -> list[Case]:
    """Return a case for every form of every registered loss."""
    return [Case("contrast", name, *form) for name in LOSSES for form in FORMS.get(name, ANY)]


def peers(library: str) -> list[Case]:
    """Return the cases of another library: with its defaults, then with its options for several processes."""
    if library == "lightly":
        names = ("NTXentLoss", "DCLLoss", "VICRegLoss", "BarlowTwinsLoss")
        flags: Sequence[Mapping[str, Any]] = ({}, {"gather_distributed": True})
        return [Case(library, name, "2 views", given) for name in names for given in flags]
    if library == "open_clip":
        flags = ({}, {"local_loss": True}, {"gather_with_grad": True}, {"local_loss": True, "gather_with_grad": True})
        clip = [Case(library, "ClipLoss", "2 views", given) for given in flags]
        return [*clip, *(Case(library, "SigLipLoss", "2 views", given) for given in ({}, {"dist_impl": "gather"}))]
    flags = ({}, {"efficient": False}, {"efficient": True})
    named = (("NTXentLoss", "2 views"), ("SupConLoss", "2 views, labels"))
    return [Case(library, name, inputs, {}, wrapper) for name, inputs in named for wrapper in flags]


PEERS = {
    "lightly": ("lightly", "lightly.loss"),
    "open_clip": ("open_clip_torch", "open_clip.loss"),
    "pytorch-metric-learning": ("pytorch-metric-learning", "pytorch_metric_learning.losses"),
}
"""Library -> its name for pip, and the module of its losses."""

Call = Callable[[Sequence[Tensor], Mapping[str, Any], int], Tensor]
"""(views, other inputs, position of this process's first sample in the complete batch) -> the loss."""


def build(case: Case, rank: int, world: int) -> tuple[Any, Call]:
    """Return the loss, and a function that calls it."""
    if case.library == "contrast":
        torch.manual_seed(0)
        parts = {
            key: LOSSES.build(value) if isinstance(value, Mapping) else value for key, value in case.arguments.items()
        }
        loss = LOSSES.build({"name": case.name, **parts}).double()
        return loss, lambda views, given, start: loss(*views, **given)  # noqa: ARG005
    module = importlib.import_module(PEERS[case.library][1])
    if case.library == "lightly":
        loss = getattr(module, case.name)(**case.arguments)
        return loss, lambda views, given, start: loss(*views)  # noqa: ARG005
    if case.library == "open_clip":
        loss = getattr(module, case.name)(rank=rank, world_size=world, **case.arguments)
        scale_and_bias = (10.0,) if case.name == "ClipLoss" else (10.0, -10.0)
        return loss, lambda views, given, start: loss(*map(nn.functional.normalize, views), *scale_and_bias)  # noqa: ARG005
    loss = getattr(module, case.name)()
    if case.wrapper:
        distributed = importlib.import_module("pytorch_metric_learning.utils.distributed")
        loss = distributed.DistributedLossWrapper(loss, **case.wrapper)

    def call(views: Sequence[Tensor], given: Mapping[str, Any], start: int) -> Tensor:
        labels = given.get("group", start + torch.arange(len(views[0])))
        value: Tensor = loss(torch.cat(list(views)), labels.repeat(len(views)))
        return value

    return loss, call


# ------------------------------------------------------------------------------------------- what one process computes


def batch(case: Case, count: int) -> tuple[list[Tensor], dict[str, Any]]:
    """Return the inputs of the complete batch: views that resemble each other, and what else the loss gets."""
    counts, generator = case.counts(), torch.Generator().manual_seed(3)
    heads = (counts["head"],) if "head" in counts else ()

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    samples = random(*heads, count, WIDTH)
    views = [samples + random(*heads, count, WIDTH) for _ in range(counts["view"])]
    given: dict[str, Any] = {}
    if "target" in counts:
        given["targets"] = [random(*heads, count, DIMS) for _ in views]
    if "queue" in counts:
        given["extra"] = [random(QUEUE, DIMS)]
    if "reference" in counts:
        given["reference"] = random(count, TOWER)
    if "label" in counts:
        given["group"] = torch.arange(count) % CLASSES
    if "sample" in counts:
        given["sample"] = torch.arange(count)
    return views, given


def shard(views: list[Tensor], given: Mapping[str, Any], rows: slice) -> tuple[list[Tensor], dict[str, Any]]:
    """Return the rows of one process."""

    def cut(name: str, value: Any) -> Any:
        if name == "extra":
            return value
        return [one[..., rows, :] for one in value] if name == "targets" else value[rows]

    return [view[..., rows, :] for view in views], {name: cut(name, value) for name, value in given.items()}


def value_and_gradient(case: Case, sizes: Sequence[int], rank: int) -> tuple[float, list[float]]:
    """Return the loss and its gradient, averaged over the processes as DistributedDataParallel does.

    Args:
        case: what to compute.
        sizes: the number of samples of each process.
        rank: of this process.
    """
    start, world = sum(sizes[:rank]), len(sizes)
    encoder = torch.randn(WIDTH, DIMS, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).requires_grad_()
    views, given = shard(*batch(case, sum(sizes)), slice(start, start + sizes[rank]))
    loss, call = build(case, rank, world)
    parameters = [encoder, *(loss.parameters() if case.library == "contrast" else ())]
    for _ in range(case.counts().get("epoch", 0)):
        call([view @ encoder for view in views], given, start)
        loss.end_epoch()
    value = call([view @ encoder for view in views], given, start)
    torch.autograd.backward(value)
    gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
    gradient = torch.cat([one.flatten() for one in gradients])
    if world > 1:
        dist.all_reduce(gradient)
        gradient /= world
    return float(value.detach()), gradient.tolist()


@dataclass(frozen=True)
class NoResult:
    """A case without a result.

    Args:
        verdict: one of `VERDICTS`.
        sentence: what is known about it.
    """

    verdict: str
    sentence: str


def outcome(rank: int, world: int, case: Case, sizes: Sequence[int]) -> tuple[float, list[float]]:  # noqa: ARG001
    """Return value and gradient on one of several processes, without messages of libraries."""
    warnings.simplefilter("ignore")
    with Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), sys.stderr.fileno())
    return value_and_gradient(case, sizes, rank)


def compute(processes: Processes, case: Case, sizes: Sequence[int]) -> list[tuple[float, list[float]]] | NoResult:
    """Return value and gradient of every process."""
    try:
        found: list[tuple[float, list[float]]] = processes.run(outcome, case, sizes, patience=PATIENCE)
    except Failure as failure:
        processes.close()
        return NoResult(failure.kind, failure.text.strip().splitlines()[-1])
    return found


# ----------------------------------------------------------------------------------------------------------- comparison


@dataclass(frozen=True)
class Comparison:
    """Several processes compared with one.

    Args:
        value: the loss, divided by the reference's.
        length: of the gradient, divided by the reference's.
        cosine: of the angle between the two gradients.
        scale: the multiple of the reference's gradient that is closest.
        residual: the part of the gradient that is no multiple of the reference's, relative to it.
        error: largest relative difference in value and gradient.
    """

    value: float
    length: float
    cosine: float
    scale: float
    residual: float
    error: float

    @property
    def verdict(self) -> str:
        """ "exact", "scaled x0.50" (the complete gradient), "value x2.00" (the value only), "differs" or "NaN"."""
        if not math.isfinite(self.error):
            return "NaN"
        if self.error <= EXACT:
            return "exact"
        if self.residual > EXACT:
            return "differs"
        return f"value x{self.value:.2f}" if abs(self.scale - 1) <= EXACT else f"scaled x{self.scale:.2f}"


Result = Comparison | NoResult


def compare(values: Sequence[float], gradient: Sequence[float], value: float, reference: Sequence[float]) -> Result:
    """Compare values (each must be the reference's; their mean is shown) and a gradient with one process's."""
    found, expected = (torch.tensor(vector, dtype=torch.float64) for vector in (gradient, reference))
    length, size = float(expected.norm()), float(found.norm())
    if not (math.isfinite(length) and math.isfinite(value) and length > 0 and value != 0):
        return NoResult("undefined", "the reference is zero or not finite")
    scale = float(found @ expected) / length**2
    differences = [*(abs(one / value - 1) for one in values), float((found - expected).norm()) / length]
    return Comparison(
        value=sum(values) / len(values) / value,
        length=size / length,
        cosine=scale * length / size if size else math.nan,
        scale=scale,
        residual=float((found - scale * expected).norm()) / length,
        error=float(torch.tensor(differences, dtype=torch.float64).max()),
    )


def worst(verdicts: Iterable[str]) -> str:
    """Return the first word of the worst verdict."""
    return max((verdict.split()[0] for verdict in verdicts), key=VERDICTS.index)


@dataclass(frozen=True)
class Row:
    """The results of a case per kind of split and number of processes."""

    case: Case
    results: Mapping[tuple[str, int], Result]

    @property
    def judged(self) -> list[Result]:
        """The results that the verdict is about: all of `contrast`, those of equal sizes of peers."""
        return [one for (split, _), one in self.results.items() if self.case.library == "contrast" or split == "even"]

    @property
    def exact(self) -> bool:
        return all(result.verdict == "exact" for result in self.judged)

    @property
    def verdict(self) -> str:
        """The worst verdict, with all its factors where it has any: "scaled x0.50, x0.25"."""
        verdicts = list(dict.fromkeys(result.verdict for result in self.judged))
        kind = worst(verdicts)
        factors = ", ".join(verdict.split()[1] for verdict in verdicts if verdict.startswith(f"{kind} "))
        return f"{kind} {factors}".rstrip()

    def cells(self) -> list[str]:
        """Return the row of the table."""
        numbers = []
        for world in WORLDS:
            result = self.results["even", world]
            if isinstance(result, NoResult):
                numbers += [result.verdict, "-", "-"]
            else:
                numbers += [f"{result.value:.4f}", f"{result.length:.4f}", f"{result.cosine:.4f}"]
        errors = [result.error for result in self.judged if isinstance(result, Comparison)]
        error = f"{max(errors):.0e}" if errors and len(errors) == len(self.judged) else "-"
        others = [worst(self.results[split, world].verdict for world in WORLDS) for split in SIZES if split != "even"]
        return [f"`{self.case}`", self.case.inputs, *numbers, *others, error, self.verdict]


def measure(cases: Sequence[Case], report: Callable[[str], None]) -> list[Row]:
    """Compute every case on one process, then on several."""
    rows = []
    with contextlib.ExitStack() as stack:
        one, *several = (
            stack.enter_context(contextlib.closing(Processes(world, "forkserver"))) for world in (1, *WORLDS)
        )
        for number, case in enumerate(cases, 1):
            report(f"{number} of {len(cases)}: {case}")
            totals = {sum(sizes) for by_world in SIZES.values() for sizes in by_world.values()}
            references = {total: compute(one, case, (total,)) for total in totals}
            results = {
                (split, group.world): against(references[sum(sizes)], group, case, sizes)
                for split, by_world in SIZES.items()
                for group in several
                for sizes in [by_world[group.world]]
            }
            rows.append(Row(case, results))
    return rows


def against(
    reference: list[tuple[float, list[float]]] | NoResult, group: Processes, case: Case, sizes: Sequence[int]
) -> Result:
    """Compare one case on several processes with its reference on one."""
    if isinstance(reference, NoResult):
        return reference
    answers = compute(group, case, sizes)
    if isinstance(answers, NoResult):
        return answers
    values = [value for value, _ in answers]
    if case.library != "contrast":
        values = [sum(values) / len(values)]
    result = compare(values, answers[0][1], *reference[0])
    if result.verdict != "exact" and len(set(sizes)) > 1:
        # Unequal sizes that a collective does not expect can leave bytes behind that the next one would read.
        group.close()
    return result


# --------------------------------------------------------------------------------------------------------------- output

NUMBERS = [f"{name}, {world} processes" for world in WORLDS for name in ("value", "gradient", "cosine")]
HEAD = ["loss", "inputs", *NUMBERS, "unequal", "empty", "error", "verdict"]

_EVEN, _UNEQUAL, _EMPTY = (" or ".join(str(sizes) for sizes in split.values()) for split in SIZES.values())
LEGEND = f"""\
Value, gradient, cosine: the loss, the length of its gradient and its direction, compared with one process that has the
complete batch; float64, gradients averaged over the processes as DistributedDataParallel does. A peer's value is the
mean over the processes, ours must be right on each. Samples of each process: {_EVEN};
unequal: {_UNEQUAL}; empty: {_EMPTY}.
Error, verdict: the largest relative difference, and its kind; exact: at most {EXACT:g}. Ours are judged on all of these
and by the gradients of the losses' own parameters too, peers on equal sizes only."""


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    for cells in (HEAD, ["---"] * len(HEAD), *(row.cells() for row in rows)):
        yield f"| {' | '.join(cells)} |"


def main() -> int:
    """Measure and print; 1 where a loss of ours is not exact, else 0."""
    began = time.monotonic()
    titles, cases, modules = {"contrast": f"contrast {metadata.version('contrast-learning')}"}, ours(), []
    for library, (package, module) in PEERS.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == module.split(".")[0]
            reason = "is not installed" if missing else f"cannot be imported ({error})"
            titles[library] = f"{library} {reason}; its rows come with: .venv/bin/pip install {package}"
            continue
        titles[library] = f"{library} {metadata.version(package)}"
        modules.append(module)
        cases += peers(library)

    def report(sentence: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{sentence}", end="", file=sys.stderr, flush=True)

    # The processes fork from one that has imported these; torch imports sympy only at its first call of an operator.
    preloaded = ["tests.gloo", "contrast.losses", "sympy", *modules]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preloaded)
    rows = measure(cases, report)
    report("")
    for library, title in titles.items():
        print(title, "", sep="\n")
        if chosen := [row for row in rows if row.case.library == library]:
            print(*table(chosen), "", sep="\n")
    print(LEGEND, "", sep="\n")
    own = [row for row in rows if row.case.library == "contrast"]
    wrong = [row for row in own if not row.exact]
    for row in wrong:
        for (split, world), result in row.results.items():
            if isinstance(result, NoResult):
                where = f"{row.case}, {row.case.inputs}; {split} sizes on {world} processes"
                print(f"{where}: {result.verdict}: {result.sentence}")
    share = (
        f"{len(wrong)} of {len(own)} rows of contrast are not exact." if wrong else "All losses of contrast are exact."
    )
    print(share, f"torch {torch.__version__}, {time.monotonic() - began:.0f} s.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
