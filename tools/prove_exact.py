"""Compares every loss on several processes with the same loss on one, beside other libraries, and prints the table."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import math
import multiprocessing
import os
import pickle
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from contrast.losses import LOSSES

SIZES = {
    "even": {2: (8, 8), 4: (8, 8, 8, 8)},
    "unequal": {2: (11, 5), 4: (11, 5, 9, 7)},
    "empty": {2: (9, 0), 4: (9, 0, 7, 0)},
}
"""How many pairs each process holds."""

EXACT = 1e-10
"""Two results are the same where they differ by no more than this, relative to the reference."""

WIDTH, DIMS, QUEUE, TOWER, CLASSES = 12, 6, 7, 5, 3
"""Of an input, of an embedding; rows of the queue; of a frozen tower's embedding; labels."""

PATIENCE, GRACE, START = 20, 2, 60
"""Seconds: until processes that all wait count as hanging; that the others get once one has failed; to start in."""

TEAMS = 3
"""Groups of each size that work side by side, so that one that hangs keeps nobody else waiting."""

GLOSSARY = ("exact", "value", "scaled", "differs", "nothing", "NaN", "error", "hangs", "crashes")
"""What can come out, from good to bad."""


@dataclass(frozen=True)
class Case:
    """One loss and what it is given.

    Args:
        library: "contrast" or a peer.
        name: of the loss there.
        inputs: in words, parted by commas: "3 views", "2 heads", "labels", "targets", "queue", "reference", "samples",
            "1 epoch" (a whole pass over the batch that comes before what is measured, for a loss with a memory).
        arguments: the constructor's; a mapping with a name is a loss inside.
        wrapper: arguments of pytorch-metric-learning's DistributedLossWrapper; without any it is not used.
    """

    library: str
    name: str
    inputs: str = "2 views"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    wrapper: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        plain = f"{self.name}({_listed(self.arguments)})".removesuffix("()")
        return f"DistributedLossWrapper({plain}, {_listed(self.wrapper)})" if self.wrapper else plain

    def asked(self) -> dict[str, int]:
        """Give each word of `inputs`, in the singular, with its number."""
        parts = [part.split() for part in self.inputs.split(",")]
        return {part[-1].removesuffix("s"): int(part[0]) if len(part) > 1 else 1 for part in parts}


def _listed(arguments: Mapping[str, Any]) -> str:
    """Say the choices; numbers make no other case."""
    words = {key: value["name"] if isinstance(value, Mapping) else value for key, value in arguments.items()}
    return ", ".join(f"{key}={word}" for key, word in words.items() if isinstance(word, str | bool))


# ---------------------------------------------------------------------------------------------------------- the losses

Form = tuple[str, Mapping[str, Any]]
"""Inputs and arguments, see `Case`."""

NEEDS: dict[str, Sequence[Form]] = {
    "amcl": [("2 views, 2 heads", {"dim": DIMS, "form": form}) for form in ("max", "logsumexp")],
    "amcl_barlow": [("2 views, 2 heads", {"dim": DIMS})],
    "amcl_cosine": [("2 views, 2 heads, targets", {"dim": DIMS})],
    "bad_pairs": [
        (
            "2 views, samples, 1 epoch",
            {"loss": {"name": loss}, "samples": 64, "warmup_epochs": 1, "noisy_width": 0.5, "faulty_width": 0.5},
        )
        for loss in ("info_nce", "cacr")
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
"""Of a loss of ours: what is tried."""

ANY: Sequence[Form] = [("2 views", {}), ("3 views, labels, queue", {})]
"""What is tried of a loss that `NEEDS` does not name."""


def ours() -> list[Case]:
    """Give a case for every form of every registered loss."""
    return [Case("contrast", name, *form) for name in LOSSES for form in NEEDS.get(name, ANY)]


def peers(library: str) -> list[Case]:
    """Give the cases of another library: as it comes, then at its best."""
    if library == "lightly":
        gathered = {"gather_distributed": True}
        names = ("NTXentLoss", "DCLLoss", "VICRegLoss", "BarlowTwinsLoss")
        return [Case(library, name, "2 views", given) for name in names for given in ({}, gathered)]
    if library == "open_clip":
        flags = [{}, {"local_loss": True}, {"gather_with_grad": True}, {"local_loss": True, "gather_with_grad": True}]
        clip = [Case(library, "ClipLoss", "2 views", given) for given in flags]
        return [*clip, *(Case(library, "SigLipLoss", "2 views", given) for given in ({}, {"dist_impl": "gather"}))]
    forms: Sequence[Mapping[str, Any]] = ({}, {"efficient": False}, {"efficient": True})
    named = (("NTXentLoss", "2 views"), ("SupConLoss", "2 views, labels"))
    return [Case(library, name, inputs, {}, wrapper) for name, inputs in named for wrapper in forms]


PEERS = {
    "lightly": ("lightly", "lightly.loss"),
    "open_clip": ("open_clip_torch", "open_clip.loss"),
    "pytorch-metric-learning": ("pytorch-metric-learning", "pytorch_metric_learning.losses"),
}
"""Of each other library: what pip calls it, and the module that holds its losses."""

Call = Callable[[Sequence[Tensor], Mapping[str, Any], int], Tensor]
"""(views, what else is given, place of this process's first sample in the whole batch) -> the loss."""


def build(case: Case, rank: int, world: int) -> tuple[Any, Call]:
    """Give the loss, and one way to call any."""
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
        numbers = (10.0,) if case.name == "ClipLoss" else (10.0, -10.0)  # scale, and bias
        return loss, lambda views, given, start: loss(*map(nn.functional.normalize, views), *numbers)  # noqa: ARG005
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


def whole(case: Case, count: int) -> tuple[list[Tensor], dict[str, Any]]:
    """Give the inputs of the whole batch: views that resemble each other, and what else the loss is given."""
    asked, generator = case.asked(), torch.Generator().manual_seed(3)
    heads = (asked["head"],) if "head" in asked else ()

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    samples = random(*heads, count, WIDTH)
    views = [samples + random(*heads, count, WIDTH) for _ in range(asked["view"])]
    given: dict[str, Any] = {}
    if "target" in asked:
        given["targets"] = [random(*heads, count, DIMS) for _ in views]
    if "queue" in asked:
        given["extra"] = [random(QUEUE, DIMS)]
    if "reference" in asked:
        given["reference"] = random(count, TOWER)
    if "label" in asked:
        given["group"] = torch.arange(count) % CLASSES
    if "sample" in asked:
        given["sample"] = torch.arange(count)
    return views, given


def part(views: list[Tensor], given: Mapping[str, Any], rows: slice) -> tuple[list[Tensor], dict[str, Any]]:
    """Give the rows of one process."""

    def cut(name: str, value: Any) -> Any:
        if name == "extra":
            return value
        return [one[..., rows, :] for one in value] if name == "targets" else value[rows]

    return [view[..., rows, :] for view in views], {name: cut(name, value) for name, value in given.items()}


def outcome(case: Case, sizes: Sequence[int], rank: int) -> tuple[float, list[float]]:
    """Give the loss and its gradient, averaged over the processes as DistributedDataParallel does.

    Args:
        case: what to compute.
        sizes: how many samples each process holds.
        rank: which of the processes this is.
    """
    start, world = sum(sizes[:rank]), len(sizes)
    shared = torch.randn(WIDTH, DIMS, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).requires_grad_()
    views, given = part(*whole(case, sum(sizes)), slice(start, start + sizes[rank]))
    loss, call = build(case, rank, world)
    parameters = [shared, *(loss.parameters() if case.library == "contrast" else ())]
    for _ in range(case.asked().get("epoch", 0)):
        call([view @ shared for view in views], given, start)
        loss.end_epoch()
    value = call([view @ shared for view in views], given, start)
    torch.autograd.backward(value)
    gradient = torch.cat([_gradient(parameter).flatten() for parameter in parameters])
    if world > 1:
        dist.all_reduce(gradient)
        gradient /= world
    return float(value.detach()), gradient.tolist()


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


# -------------------------------------------------------------------------------------------------------- the processes


class Failure(Exception):
    """A case did not come to an end.

    Args:
        word: one of `GLOSSARY`.
        sentence: what is known about it.
    """

    def __init__(self, word: str, sentence: str) -> None:
        super().__init__(f"{word}: {sentence}")
        self.word = word


class Group:
    """W processes that compute together. Whoever fails takes the group along; the next call starts a fresh one.

    Args:
        world: W, how many; one process has no process group.
    """

    def __init__(self, world: int) -> None:
        self.world = world
        self._context = multiprocessing.get_context("forkserver")
        self._workers: list[tuple[Any, Any]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, case: Case, sizes: Sequence[int], patience: float = PATIENCE) -> list[tuple[float, list[float]]]:
        """Give every process's outcome, in rank order."""
        try:
            if not self._workers:
                self._start()
            for pipe, _ in self._workers:
                pipe.send_bytes(pickle.dumps((case, sizes)))
            return self._answers(patience)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise Failure("crashes", "a process ended") from error
            raise

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        meeting = (Path(self._folder.name) / "meeting").as_uri()
        for rank in range(self.world):
            pipe, other = self._context.Pipe()
            worker = self._context.Process(target=_serve, args=(rank, self.world, meeting, other), daemon=True)
            worker.start()
            other.close()
            self._workers.append((pipe, worker))
        self._answers(START)

    def _answers(self, patience: float) -> list[Any]:
        """Collect one answer a process; the first failure gives the others only a moment more."""
        answers: dict[Any, Any] = {}
        failures: list[Failure] = []
        pipes = [pipe for pipe, _ in self._workers]
        until = time.monotonic() + patience
        while len(answers) < len(pipes):
            waiting = [pipe for pipe in pipes if pipe not in answers]
            ready = wait(waiting, max(0, until - time.monotonic()))
            if not ready:
                failures = failures or [Failure("hangs", f"no answer within {patience} seconds")]
                break
            for pipe in ready:
                try:
                    answers[pipe] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, OSError):
                    answers[pipe] = "crashes", "a process ended"
                word, answer = answers[pipe]
                if word != "fine":
                    failures.append(Failure(word, answer))
                    until = min(until, time.monotonic() + GRACE)
        if failures:
            # Where one process crashes, another may first tell that it lost the connection.
            raise max(failures, key=lambda failure: GLOSSARY.index(failure.word))
        return [answers[pipe][1] for pipe in pipes]

    def close(self) -> None:
        """End the processes."""
        for pipe, worker in self._workers:
            worker.kill()
            worker.join()
            pipe.close()
        self._workers = []
        if self._folder is not None:
            self._folder.cleanup()


def _serve(rank: int, world: int, meeting: str, pipe: Any) -> None:
    """Answer calls until the parent ends this process."""
    warnings.simplefilter("ignore")
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
    torch.set_num_threads(1)
    if world > 1:
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group(
            "gloo",
            init_method=meeting,
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=START),
        )
    pipe.send_bytes(pickle.dumps(("fine", None)))
    while True:
        try:
            case, sizes = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)
        try:
            answer: tuple[str, Any] = ("fine", outcome(case, sizes, rank))
        except Exception as error:
            answer = ("error", f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
        pipe.send_bytes(pickle.dumps(answer))


# -------------------------------------------------------------------------------------------------------- what is said


@dataclass(frozen=True)
class Compared:
    """Several processes beside one.

    Args:
        value: the loss, divided by the reference's.
        size: length of the gradient, divided by the reference's.
        cosine: of the angle between the two gradients.
        along: the multiple of the reference's gradient that comes nearest.
        apart: what of the gradient is no multiple of the reference's, relative to it.
        off: largest relative difference in value and gradient.
    """

    value: float
    size: float
    cosine: float
    along: float
    apart: float
    off: float

    @property
    def word(self) -> str:
        """Say "exact", "scaled x0.50" (the gradient, all of it), "value x2.00" (it alone), "differs" or "NaN"."""
        if not math.isfinite(self.off):
            return "NaN"
        if self.off <= EXACT:
            return "exact"
        if self.apart > EXACT:
            return "differs"
        if abs(self.along - 1) > EXACT:
            return f"scaled x{self.along:.2f}"
        return f"value x{self.value:.2f}"


def compare(values: Sequence[float], gradient: Sequence[float], value: float, reference: Sequence[float]) -> Compared:
    """Compare values (each must be the reference's; their mean is shown) and a gradient with one process's.

    Raises:
        Failure: where the reference is zero or not finite, so that nothing could be told from it.
    """
    found, expected = (torch.tensor(vector, dtype=torch.float64) for vector in (gradient, reference))
    length, size = float(expected.norm()), float(found.norm())
    if not (math.isfinite(length) and math.isfinite(value) and length > 0 and value != 0):
        raise Failure("nothing", "the reference is zero or not finite")
    along = float(found @ expected) / length**2
    differences = [*(abs(one / value - 1) for one in values), float((found - expected).norm()) / length]
    return Compared(
        value=sum(values) / len(values) / value,
        size=size / length,
        cosine=along * length / size if size else math.nan,
        along=along,
        apart=float((found - along * expected).norm()) / length,
        off=float(torch.tensor(differences, dtype=torch.float64).max()),
    )


Found = Compared | Failure


def worst(words: Sequence[str]) -> str:
    """Give the first word of the worst outcome."""
    return max((word.split()[0] for word in words), key=GLOSSARY.index)


@dataclass(frozen=True)
class Row:
    """What came out for a case: for each kind of split and number of processes a comparison or a failure."""

    case: Case
    found: Mapping[tuple[str, int], Found]

    @property
    def judged(self) -> list[Found]:
        """What the verdict is about: ours must be exact on every split, of peers only equal shares are asked."""
        return [found for (split, _), found in self.found.items() if self.case.library == "contrast" or split == "even"]

    @property
    def exact(self) -> bool:
        return all(found.word == "exact" for found in self.judged)

    @property
    def verdict(self) -> str:
        """Say the worst that came out, with all its factors where it is a factor: "scaled x0.50, x0.25"."""
        words = list(dict.fromkeys(found.word for found in self.judged))
        kind = worst(words)
        factors = ", ".join(word.split()[1] for word in words if word.startswith(f"{kind} "))
        return f"{kind} {factors}".rstrip()

    def came(self, split: str) -> str:
        """Say the worst that came of this split, without numbers."""
        return worst([self.found[split, world].word for world in SIZES[split]])

    def cells(self) -> list[str]:
        """Give the row of the table."""
        numbers = []
        for world in SIZES["even"]:
            found = self.found["even", world]
            numbers += (
                [found.word, "-", "-"]
                if isinstance(found, Failure)
                else [f"{found.value:.4f}", f"{found.size:.4f}", f"{found.cosine:.4f}"]
            )
        offs = [found.off for found in self.judged if isinstance(found, Compared)]
        off = f"{max(offs):.0e}" if offs and len(offs) == len(self.judged) else "-"
        words = [self.came(split) for split in SIZES if split != "even"]
        return [str(self.case), self.case.inputs, *numbers, *words, off, self.verdict]


HEAD = ["loss", "inputs", "value", "gradient", "cosine", "value", "gradient", "cosine", "unequal", "empty", "off by"]
HEAD += ["verdict"]

_EVEN, _UNEQUAL, _EMPTY = (" or ".join(str(sizes) for sizes in split.values()) for split in SIZES.values())
LEGEND = f"""\
value, gradient, cosine: the loss, the length of its gradient and its direction, against one process with the whole
batch; float64, gradients averaged over the processes as DistributedDataParallel does. A peer's value is the mean over
the processes, ours must be right on each. Pairs on each process: {_EVEN};
unequal: {_UNEQUAL}; empty: {_EMPTY}.
off by, verdict: the largest relative difference, and what that is; exact: at most {EXACT:g}. Ours are judged on all of
these and by the gradients of the losses' own parameters too, peers on equal shares alone."""


def rows(cases: Sequence[Case], known: Sequence[str], say: Callable[[str], None]) -> list[Row]:
    """Measure every case on one process, then on several.

    Args:
        cases: what to measure.
        known: modules that the processes need and shall not import again and again.
        say: is told how far it is.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "contrast.losses", *known])
    totals = {sum(sizes) for split in SIZES.values() for sizes in split.values()}
    references: dict[tuple[int, int], Any] = {}
    with contextlib.closing(Group(1)) as one:
        for number, case in enumerate(cases):
            say(f"one process: {number + 1} of {len(cases)}")
            for total in totals:
                try:
                    (references[number, total],) = one.run(case, (total,))
                except Failure as failure:
                    references[number, total] = failure

    found: dict[tuple[int, str, int], Found] = {}
    stopped = threading.Event()

    def measure(world: int, team: int) -> None:
        with contextlib.closing(Group(world)) as group:
            for number, case in list(enumerate(cases))[team::TEAMS]:
                for split, by_world in SIZES.items():
                    if stopped.is_set():
                        return
                    sizes = by_world[world]
                    found[number, split, world] = against(references[number, sum(sizes)], group, case, sizes)
                    say(f"several processes: {len(found)} of {len(cases) * len(SIZES) * len(SIZES['even'])}")

    with ThreadPoolExecutor(TEAMS * len(SIZES["even"])) as threads:
        try:
            running = [threads.submit(measure, world, team) for team in range(TEAMS) for world in SIZES["even"]]
            for one_team in running:
                one_team.result()
        finally:
            stopped.set()
    return [
        Row(case, {(split, world): found[number, split, world] for split in SIZES for world in SIZES[split]})
        for number, case in enumerate(cases)
    ]


def against(reference: Any, group: Group, case: Case, sizes: Sequence[int]) -> Found:
    """Compare one case on one group with its reference."""
    if isinstance(reference, Failure):
        return reference
    try:
        answers = group.run(case, sizes)
        values = [value for value, _ in answers]
        if case.library != "contrast":
            values = [sum(values) / len(values)]
        found = compare(values, answers[0][1], *reference)
    except Failure as failure:
        return failure
    if found.word != "exact" and len(set(sizes)) > 1:
        # Shares that a collective does not foresee can leave bytes behind that the next one would read.
        group.close()
    return found


def text(sections: Sequence[tuple[str, Sequence[Row]]]) -> Iterator[str]:
    """Give the lines of the table, aligned: numbers to the right, words to the left."""
    lines = [HEAD, *(row.cells() for _, found in sections for row in found)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numbers = (*range(2, 8), 10)

    def aligned(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    above = [f"{world} processes".ljust(sum(widths[2:5]) + 6) for world in SIZES["even"]]
    yield (" " * (sum(widths[:2]) + 4) + "".join(above)).rstrip()
    yield aligned(HEAD)
    for title, found in sections:
        yield ""
        yield title
        yield from (aligned(row.cells()) for row in found)


def markdown(sections: Sequence[tuple[str, Sequence[Row]]]) -> Iterator[str]:
    """Give the lines of the table in Markdown."""
    two, four = SIZES["even"]
    head = [*HEAD[:2], *(f"{name}, {two} processes" for name in HEAD[2:5]), *(f"{name}, {four}" for name in HEAD[5:8])]
    for title, found in sections:
        yield f"**{title}**" if found else title
        yield ""
        if found:
            yield "| " + " | ".join([*head, *HEAD[8:]]) + " |"
            yield "|" + "---|" * len(HEAD)
            for row in found:
                yield "| " + " | ".join([f"`{row.cells()[0]}`", *row.cells()[1:]]) + " |"
            yield ""


def prove(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 where a loss of ours is not exact, else 0."""
    parser = argparse.ArgumentParser(prog="tools/prove_exact", description=__doc__)
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    asked = parser.parse_args(arguments)
    began = time.monotonic()

    titles, cases, known = {"contrast": f"contrast {metadata.version('contrast-learning')}"}, ours(), []
    for library, (package, module) in PEERS.items():
        try:
            importlib.import_module(module)
        except Exception as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == module.split(".")[0]
            reason = "is not installed" if missing else f"cannot be imported ({error})"
            titles[library] = f"{library} {reason}; its rows come with: .venv/bin/pip install {package}"
            continue
        titles[library] = f"{library} {metadata.version(package)}"
        known.append(module)
        cases += peers(library)

    def say(sentence: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{sentence}", end="", file=sys.stderr, flush=True)

    measured = rows(cases, known, say)
    say("")
    sections = [(title, [row for row in measured if row.case.library == key]) for key, title in titles.items()]
    print("\n".join((markdown if asked.markdown else text)(sections)))
    print(f"\n{LEGEND}")
    wrong = [row for row in measured if row.case.library == "contrast" and not row.exact]
    print()
    for row in wrong:
        for (split, world), found in row.found.items():
            if isinstance(found, Failure):
                print(f"{row.case}, {row.case.inputs}; {split} shares on {world} processes: {found}")
    print(
        f"{len(wrong)} of {len(sections[0][1])} rows of contrast are not exact."
        if wrong
        else "Every loss of contrast is exact.",
        f"torch {torch.__version__}, {time.monotonic() - began:.0f} s.",
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    from contrast.cli import answer

    sys.exit(answer(prove))
