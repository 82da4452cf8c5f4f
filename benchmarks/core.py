"""Measure forward and backward of the losses, next to dense code, another checkout and other libraries.

    python benchmarks/core.py [--sizes 512 4096] [--losses info_nce clip] [--base CHECKOUT] [--libraries lightly]
    python benchmarks/core.py --memory --sizes 65536 [--no-dense]

The size M is the number of embeddings along a side of the similarity matrix. The losses that compare every view with
every view (info_nce, supcon_*, decoupled, hard_*, amcl*) have M / 2 samples per view and M embeddings; those that
compare one view with the other (clip, cacr, cwcl, siglip) have M samples per view and 2 M embeddings; queue has M
anchors, M keys and, at every M, 65,536 remembered candidates. D = 128, float32, one thread.

Time is CPU time of the process. Each contender (this checkout, the base, dense, a library) is a process of its own;
only one computes at a time, in turns of rotating order. Per round each has one measurement of about 0.1 seconds,
at least one call. A result has the median and the quartiles over the rounds of the seconds per call, and of the ratios
of this checkout to each other contender per round: below 1 this checkout is faster. Freed memory below 32 MiB per block
stays with the process: with glibc's defaults it depends on chance whether a process returns and maps it again at each
call, and two processes with the same code differ by up to 25 %.

Memory is the largest resident size during one forward and backward minus the resident size before, minus the unit
copies and the gradients (one float32 tensor per input, and one more per input with a gradient). It is measured once, in
a fresh process per contender, after two calls at M = 256, and needs Linux.

All contenders get the same inputs and parameters. `same_result` is false where their values or the norms of their
gradients differ by more than 0.1 %. `absent` names who was not measured, and why. The exit status is 1 where results
differ or a checkout fails.
"""

import argparse
import ctypes
import gc
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from harness import MIB, ROOT, Key, Results, Worker
from loss_cases import CASES, LIBRARIES, Case, Step

DENSE_LIMIT = 8 * 2**30
"""Bytes above which dense code is not tried."""
KEEP_FREED = {"MALLOC_MMAP_THRESHOLD_": str(32 * MIB), "MALLOC_TRIM_THRESHOLD_": str(2**40)}
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""Settings of glibc: for times, and for memory, where the resident size is to be the size in use."""

# ----------------------------------------------------------------------------------------- what a worker process does


def work(contender: str, checkout: str) -> None:
    """Answer jobs about one contender, whose `contrast` is the one of `checkout`."""
    torch.set_num_threads(1)
    prepared: list[Step] = []

    def answer(job: dict[str, Any]) -> dict[str, Any]:
        if "calls" in job:
            gc.collect()
            return {"seconds": harness.cpu_seconds(prepared[0], job["calls"])}
        case = CASES[job["loss"]]
        if job["kind"] == "memory":
            return {"mib": measure_memory(case, contender, job["size"])}
        prepared.clear()  # Frees the inputs of the case before.
        run, _ = case.step(contender, job["size"])
        module = sys.modules.get("contrast")
        assert module is None or Path(str(module.__file__)).is_relative_to(checkout), f"{module} is not of {checkout}"
        prepared[:] = [run]
        value, *gradients = run()
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        return {"check": [float(value), norm], "seconds": harness.cpu_seconds(run)}

    harness.serve(answer)


def measure_memory(case: Case, contender: str, size: int) -> float:
    """Return the MiB by which the process grows beyond inputs, unit copies and gradients."""
    small, _ = case.step(contender, 256)
    small(), small()  # What libraries load and keep at their first call is not memory of the loss.
    run, given = case.step(contender, size)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = harness.process_bytes("VmRSS")
    harness.reset_peak()
    result = run()
    grown = harness.process_bytes("VmHWM") - before
    del result
    floats = [tensor for tensor in given.values() if tensor.is_floating_point()]
    allowance = sum(4 * tensor.numel() * (1 + tensor.requires_grad) for tensor in floats)
    return max(0, grown - allowance) / MIB


# ------------------------------------------------------------------------------------------ what the parent does


def too_large(contender: str, case: Case, size: int) -> bool:
    """True if dense code would need more than DENSE_LIMIT."""
    return contender == "dense" and 4 * case.matrices * case.pairs(size) > DENSE_LIMIT


def expected_seconds(results: Results, key: Key, contender: str) -> float:
    """Return the seconds per call by the largest smaller size of the loss that has been measured; 0 without any."""
    smaller = [
        (cell["key"]["size"], cell["result"]["seconds"][contender]["median"])
        for cell in results.cells
        if cell["key"]["size"] < key["size"]
        and {**cell["key"], "size": key["size"]} == key
        and contender in cell["result"].get("seconds", {})
    ]
    if not smaller:
        return 0.0
    size, seconds = max(smaller)
    case = CASES[key["loss"]]
    return seconds * case.pairs(key["size"]) / case.pairs(size)


def reason_for_absence(contender: str, key: Key, results: Results, longest: float) -> str:
    """Return why a contender is not tried; "" where it is."""
    case = CASES[key["loss"]]
    if too_large(contender, case, key["size"]):
        return "does not fit"
    if contender in LIBRARIES and contender not in case.libraries:
        return "has no such loss"
    return "too long" if expected_seconds(results, key, contender) > longest else ""


def measure(key: Key, results: Results, workers: dict[str, Worker], given: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured of each contender, and who is absent.

    Args:
        key: of the cell.
        results: of smaller sizes.
        workers: the processes; missing ones are started.
        given: the command line.
    """
    absent: dict[str, str] = {}
    first: dict[str, dict[str, Any]] = {}
    for contender in contenders(given):
        if reason := reason_for_absence(contender, key, results, given.longest):
            absent[contender] = reason
            continue
        if contender not in workers:
            checkout = str(given.base if contender == "base" else ROOT)
            words = [str(Path(__file__).resolve()), "--worker", contender, checkout]
            workers[contender] = Worker(*words, PYTHONPATH=checkout, **(RETURN_FREED if given.memory else KEEP_FREED))
        try:
            first[contender] = workers[contender].ask(**key)
        except ChildProcessError as error:
            absent[contender] = f"fails: {error}"
        if given.memory:
            workers.pop(contender).close()
    if given.memory:
        found = {"mib": {contender: answer["mib"] for contender, answer in first.items()}}
    else:
        found = measure_times({contender: workers[contender] for contender in first}, first, given)
    base = {"base": harness.revision(given.base)} if given.base else {}
    return {**found, **base, "absent": absent}


def measure_times(
    workers: dict[str, Worker], first: dict[str, dict[str, Any]], given: argparse.Namespace
) -> dict[str, Any]:
    """Return the seconds of each worker, its ratios, and whether the results of the first calls agree."""
    calls = {name: max(1, min(1000, round(given.seconds / first[name]["seconds"]))) for name in workers}
    seconds = harness.take_turns(
        {name: lambda name=name: workers[name].ask(calls=calls[name])["seconds"] for name in workers}, given.rounds
    )
    ours = seconds.get("this", [])
    checks = list(zip(*(answer["check"] for answer in first.values()), strict=True))
    return {
        "calls": calls,
        "seconds": {name: harness.quartiles(values) for name, values in seconds.items()},
        "ratio": {name: harness.ratios(ours, values) for name, values in seconds.items() if ours and name != "this"},
        "same_result": all(math.isclose(one, of_all[0], rel_tol=1e-3) for of_all in checks for one in of_all),
    }


def contenders(given: argparse.Namespace) -> list[str]:
    """Return who is measured, this checkout first."""
    return ["this", *(["base"] if given.base else []), *([] if given.no_dense else ["dense"]), *given.libraries]


def plan(given: argparse.Namespace) -> list[Key]:
    """Return the keys of all cells; what this checkout is compared with is a part of each."""
    against = "+".join(contenders(given)[1:])
    if given.base:
        against = against.replace("base", harness.revision(given.base)["commit"][:7])
    kind = "memory" if given.memory else "time"
    sizes = given.sizes or ([65536] if given.memory else [512, 1024, 4096, 8192])
    return [{"kind": kind, "loss": loss, "size": size, "against": against} for loss in given.losses for size in sizes]


def main(words: Sequence[str] | None = None) -> int:
    """Measure and print; 1 where a checkout fails or results differ."""
    parser = harness.parser("core", __doc__)
    parser.add_argument("--base", type=Path, help="the checkout to compare with")
    parser.add_argument("--libraries", nargs="+", choices=list(LIBRARIES), default=[], help="those that are installed")
    parser.add_argument("--no-dense", action="store_true")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--sizes", nargs="+", type=int, metavar="M", help="512 1024 4096 8192; with --memory 65536")
    parser.add_argument("--losses", nargs="+", choices=list(CASES), default=list(CASES), metavar="LOSS")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each contender, at least 2")
    parser.add_argument("--seconds", type=float, default=0.1, help="about how long each measurement takes")
    parser.add_argument("--longest", type=float, default=60, help="seconds per call above which nothing is measured")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.worker:
        work(*given.worker)
        return 0
    if given.rounds < 2:
        parser.error(f"--rounds is at least 2, quartiles need them; got {given.rounds}.")
    given.base = given.base and given.base.resolve()
    keys, workers = plan(given), dict[str, Worker]()
    cells = harness.run(given, lambda _: keys, lambda key, results: measure(key, results, workers, given))
    for worker in workers.values():
        worker.close()
    results = [cell["result"] for cell in cells]
    failed = any(result["absent"].get(name, "").startswith("fails") for result in results for name in ("this", "base"))
    return int(failed or not all(result.get("same_result", True) for result in results))


if __name__ == "__main__":
    sys.exit(main())
