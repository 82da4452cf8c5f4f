"""Measure forward and backward of the losses of one checkout beside another checkout and beside plain dense code.

    python benchmarks/core.py --base CHECKOUT [--sizes 512 4096] [--losses info_nce clip] [--out FILE.json]
    python benchmarks/core.py --memory --sizes 65536 [--base CHECKOUT]

The size M is what tools/bench_losses.py calls M: the number of embeddings along a side of the similarity matrix. The
losses that compare every view with every view (info_nce, supcon_*, decoupled, hard_*, amcl*) have M / 2 samples per
view and M embeddings; those that compare one view with the other (clip, cacr, cwcl, siglip) have M samples per view and
2 M embeddings; queue has M anchors, M keys and, at every M, 65,536 remembered candidates. The table shows M and the
samples per view. D = 128, float32, one thread.

Time is CPU time of the process. Each contender (this checkout, the base, dense) is a process of its own that lives for
the whole run; only one computes at a time, and they take turns, in rotating order. Per round each has one measurement
of about 0.1 seconds, at least one call. Shown are medians over the rounds, with quartiles for the ratios; a ratio is
taken per round, and below 1 this checkout is faster. Freed memory below 32 MiB per block stays with the process: with
glibc's defaults it depends on chance whether a process returns and maps it again at each call, and two processes with
the same code differ by up to 25 %. --default-malloc measures with the defaults nevertheless.

Memory is the largest resident size during one forward and backward minus the resident size before, minus the unit
copies and the gradients (one float32 tensor per input, and one more per input with a gradient). It is measured once, in
a fresh process per case, after two calls at M = 256, and needs Linux.

All contenders get the same inputs and parameters. Where their values or the norms of their gradients differ by more
than 0.1 %, or where a checkout fails, the table says so, and the exit status is 1.
"""

import argparse
import ctypes
import gc
import hashlib
import importlib
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from loss_cases import CASES, DIMS, Case, Step

ROOT = Path(__file__).resolve().parents[1]
DENSE_LIMIT = 8 * 2**30
"""Bytes above which dense code is not tried."""
MIB = 2**20
KEEP_FREED = {"MALLOC_MMAP_THRESHOLD_": str(32 * MIB), "MALLOC_TRIM_THRESHOLD_": str(2**40)}
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""Settings of glibc: for times, and for memory, where what is resident shall be what is in use."""
Answer = dict[str, Any]

# ----------------------------------------------------------------------------------------- what a worker process does


def losses_of(checkout: str) -> ModuleType | None:
    """Import `contrast.losses` and check that it is the checkout's; None for "dense"."""
    if checkout == "dense":
        return None
    losses = importlib.import_module("contrast.losses")
    found = Path(str(sys.modules["contrast"].__file__)).resolve()
    assert found.is_relative_to(Path(checkout).resolve() / "contrast"), f"{found} is not of {checkout}"
    return losses


def cpu_seconds(run: Callable[[], Any], calls: int) -> float:
    """Return the CPU seconds per call."""
    began = time.process_time()
    for _ in range(calls):
        run()
    return (time.process_time() - began) / calls


def status(name: str) -> int:
    """Return an entry of /proc/self/status in bytes: "VmRSS", "VmHWM"."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, name
    return 1024 * int(found[1])


def measure_memory(case: Case, losses: ModuleType | None, size: int) -> float:
    """Return the MiB by which the process grows beyond inputs, unit copies and gradients."""
    small, _ = case.step(losses, 256)
    small(), small()  # What libraries load and keep at their first call is not memory of the loss.
    run, given = case.step(losses, size)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the largest VmRSS so far, starts anew.
    kept = run()
    grown = status("VmHWM") - before
    del kept
    floats = [tensor for tensor in given.values() if tensor.is_floating_point()]
    allowance = sum(4 * tensor.numel() * (1 + tensor.requires_grad) for tensor in floats)
    return max(0, grown - allowance) / MIB


def work(checkout: str) -> None:
    """Answer jobs, one JSON object per line, until the input ends."""
    torch.set_num_threads(1)
    run: Step | None = None
    for line in sys.stdin:
        job = json.loads(line)
        try:
            if "calls" in job:
                assert run, "no case is prepared"
                gc.collect()
                answer = {"seconds": cpu_seconds(run, job["calls"])}
            else:
                case, losses = CASES[job["case"]], losses_of(checkout)
                if job["memory"]:
                    answer = {"mib": measure_memory(case, losses, job["size"])}
                else:
                    run = None  # Frees the inputs of the case before.
                    run, _ = case.step(losses, job["size"])
                    value, *gradients = run()
                    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
                    answer = {"check": [float(value), norm], "seconds": cpu_seconds(run, 1)}
        except Exception as error:
            text = next(iter(str(error).splitlines()), "")
            answer = {"absent": "fails: " + re.sub(r"(/[^\s/]+)+/", "", f"{type(error).__name__}: {text}")[:160]}
        print(json.dumps(answer), flush=True)


# ------------------------------------------------------------------------------------------ what the parent does


class Worker:
    """A process with one thread that measures one contender: "dense" or a checkout, whose `contrast` it imports."""

    def __init__(self, checkout: str, **environment: str) -> None:
        self.command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--worker", checkout]
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self.environment = {**os.environ, **threads, "PYTHONPATH": checkout, **environment}
        self.start()

    def start(self) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(self.command, env=self.environment, text=True, stdin=pipe, stdout=pipe)

    def ask(self, **job: Any) -> Answer:
        """Return the answer to a job; where the process ended, return how, and start another."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if line:
            return dict(json.loads(line))
        status = self.process.wait()
        self.start()
        return {"absent": f"fails: the process ended with status {status}"}

    def end(self) -> None:
        """Let the process end."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def quartiles(values: Sequence[float]) -> list[float]:
    """Return the first quartile, the median and the third quartile."""
    return statistics.quantiles(values, n=4, method="inclusive")


def too_large(contender: str, case: Case, size: int) -> bool:
    """True if dense code would need more than DENSE_LIMIT."""
    return contender == "dense" and 4 * case.matrices * case.pairs(size) > DENSE_LIMIT


def measure_times(
    workers: Mapping[str, Worker], name: str, size: int, given: argparse.Namespace, absent: Answer
) -> Answer:
    """Return quartiles of each contender's seconds per call and of its ratios per round; adds to who is absent."""
    first: dict[str, Answer] = {}
    for contender in workers.keys() - absent.keys():
        answer = workers[contender].ask(case=name, size=size, memory=False)
        (absent if "absent" in answer else first)[contender] = answer.get("absent", answer)
    calls = {
        contender: max(1, min(1000, round(given.seconds / answer["seconds"]))) for contender, answer in first.items()
    }
    seconds: dict[str, list[float]] = {contender: [] for contender in workers if contender in first}
    for number in range(given.rounds):
        order = list(seconds)
        start = number % max(1, len(order))
        for contender in order[start:] + order[:start]:
            answer = workers[contender].ask(calls=calls[contender])
            if "absent" in answer:
                absent[contender] = answer["absent"]
                del seconds[contender]
            else:
                seconds[contender].append(answer["seconds"])
    ours = seconds.get("this", [])
    per_round = {
        other: [a / b for a, b in zip(ours, theirs, strict=True)]
        for other, theirs in seconds.items()
        if ours and other != "this"
    }
    checks = [answer["check"] for answer in first.values()]
    same = all(math.isclose(a, b, rel_tol=1e-3) for one in checks for a, b in zip(one, checks[0], strict=True))
    return {
        "calls": calls,
        "seconds": {contender: quartiles(values) for contender, values in seconds.items()},
        "ratio": {other: quartiles(values) for other, values in per_round.items()},
        "same_result": same,
    }


def measure_growth(checkouts: Mapping[str, str], name: str, size: int, absent: Answer) -> Answer:
    """Return the MiB of each contender, each in a fresh process; adds to who is absent."""
    mib: dict[str, float] = {}
    for contender in [contender for contender in checkouts if contender not in absent]:
        worker = Worker(checkouts[contender], **RETURN_FREED)
        answer = worker.ask(case=name, size=size, memory=True)
        worker.end()
        (absent if "absent" in answer else mib)[contender] = answer.get("absent", answer.get("mib"))
    return {"mib": mib}


def row(result: Answer, contenders: Sequence[str]) -> list[str]:
    """Return the cells of a result's row in the table."""
    size, case = result["size"], CASES[result["loss"]]
    absent, cells = result["absent"], [f"`{result['loss']}`", f"{size:,}", f"{size // case.views:,}"]
    if "mib" in result:
        mib = result["mib"]
        return cells + [f"{mib[one]:.1f}" if one in mib else absent[one] for one in contenders]
    seconds, ratio = result["seconds"], result["ratio"]
    cells += [f"{1000 * seconds[one][1]:.4g}" if one in seconds else absent[one] for one in contenders]
    for other in contenders:
        if other != "this":
            cells.append("{1:.3f} [{0:.3f}-{2:.3f}]".format(*ratio[other]) if other in ratio else "-")
    return [*cells, "yes" if result["same_result"] else "**no**"]


def header(memory: bool, contenders: Sequence[str]) -> list[str]:
    """Return the head of the table."""
    cells = ["loss", "M", "samples per view"]
    if memory:
        return cells + [f"{one} MiB" for one in contenders]
    ratios = [f"this / {one} [quartiles]" for one in contenders if one != "this"]
    return [*cells, *(f"{one} ms" for one in contenders), *ratios, "same result"]


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def revision(checkout: str) -> Answer:
    """Return the commit, whether `contrast` differs from it, and a hash of the files of `contrast` as they are now."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", checkout, *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    files = sorted(Path(checkout, "contrast").rglob("*.py"))
    source = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    dirty = git("status", "--porcelain", "--", "contrast") != ""
    return {"commit": git("rev-parse", "HEAD"), "dirty": dirty, "source": source}


def processor() -> str:
    names = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*:\s*(.*)$", names, re.MULTILINE)
    return model[1] if model else platform.processor()


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, default=ROOT, help="the checkout measured; the script's own")
    parser.add_argument("--base", type=Path, help="the checkout to compare with")
    parser.add_argument("--sizes", nargs="+", type=int, metavar="M", help="512 1024 4096 8192; with --memory 65536")
    parser.add_argument("--losses", nargs="+", choices=list(CASES), default=list(CASES), metavar="LOSS")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each contender, at least 2")
    parser.add_argument("--seconds", type=float, default=0.1, help="of a measurement, about")
    parser.add_argument("--longest", type=float, default=60, help="skip what would take more seconds per call")
    parser.add_argument("--no-dense", action="store_true", help="measure no dense code")
    parser.add_argument("--default-malloc", action="store_true", help="measure times with glibc's defaults")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    given.sizes = given.sizes or ([65536] if given.memory else [512, 1024, 4096, 8192])
    if given.rounds < 2:
        parser.error(f"--rounds is at least 2, quartiles need them; got {given.rounds}.")
    return given


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the JSON file; 1 where a checkout fails or results differ."""
    given = parse(words)
    if given.worker:
        work(given.worker)
        return 0
    paths = {"this": given.checkout, "base": given.base}
    checkouts = {name: str(path.resolve()) for name, path in paths.items() if path}
    revisions = {name: revision(checkout) for name, checkout in checkouts.items()}
    contenders = checkouts if given.no_dense else {**checkouts, "dense": "dense"}
    malloc = {} if given.default_malloc else KEEP_FREED
    workers = {} if given.memory else {name: Worker(checkout, **malloc) for name, checkout in contenders.items()}
    cells = header(given.memory, list(contenders))
    print(line(cells), line(["---"] * len(cells)), sep="\n", flush=True)
    results: list[Answer] = []
    for name in given.losses:
        case, last = CASES[name], dict.fromkeys(contenders, 0.0)  # seconds per entry of the similarity matrix
        for size in sorted(given.sizes):
            absent = {one: "does not fit" for one in contenders if too_large(one, case, size)}
            absent |= {one: "too long" for one in contenders if last[one] * case.pairs(size) > given.longest}
            if given.memory:
                found = measure_growth(contenders, name, size, absent)
            else:
                found = measure_times(workers, name, size, given, absent)
                last |= {one: seconds[1] / case.pairs(size) for one, seconds in found["seconds"].items()}
            results.append({"loss": name, "size": size, **found, "absent": absent})
            print(line(row(results[-1], list(contenders))), flush=True)
    for worker in workers.values():
        worker.end()
    arguments = {key: value for key, value in vars(given).items() if key not in ("checkout", "base", "out", "worker")}
    about = {"torch": torch.__version__, "python": platform.python_version(), "processor": processor(), "threads": 1}
    if given.out:
        whole = {"checkouts": revisions, **about, "dims": DIMS, "arguments": arguments, "results": results}
        given.out.write_text(json.dumps(whole, indent=1) + "\n")
    print(f"\n{json.dumps({**revisions, **about})}")
    failed = any(why.startswith("fails") for result in results for why in result["absent"].values())
    return int(failed or not all(result.get("same_result", True) for result in results))


if __name__ == "__main__":
    sys.exit(main())
