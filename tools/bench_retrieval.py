"""Measures exact search and FAISS's indices side by side: time, memory and recall; and what mining costs in a run."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrast.losses import InfoNCE
from contrast.retrieval import auto_index, build_index, default_lists, default_probes, exact_search
from contrast.retrieval.indices import AUTO_EXACT
from tools import cells
from tools.cells import ROOT, Cells

PAGE = ROOT / "docs" / "benchmarks" / "retrieval.md"
FOLDER = ROOT / "runs" / "bench_retrieval"

DIMS, NEIGHBOURS, QUERIES, ROUNDS = 128, 16, 2000, 5
SIZES = (10_000, 30_000, 100_000, 1_000_000)
DEVICES = ("cpu", "cuda")
RECALL, SLOWER = 0.99, 3.0
"""An approximate index must find so much; exact search is taken where it takes no longer than so many times as long."""
MOVED = 0.3
"""How far a vector has moved at a refresh, as a share of its length."""
MIB = 2**20


def contenders(size: int) -> dict[str, tuple[int, ...]]:
    """Give index -> the probes that are tried, for one size."""
    lists = default_lists(size)
    few = sorted({4, 8, default_probes(lists), 64})
    return {"exact": (0,), "Flat": (0,), f"IVF{lists},Flat": tuple(few), "HNSW32": (0,)}


# -------------------------------------------------------------------------------------------------------- the vectors


def trained_embeddings(steps: int = 600) -> tuple[Tensor, Tensor]:
    """Train a small encoder on scikit-learn's digits by InfoNCE; give its unit embeddings (N, D) and labels (N,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    generator = torch.Generator().manual_seed(0)

    def view(x: Tensor) -> Tensor:
        n = len(x)
        down, right = (torch.randint(0, 3, (n, 1), generator=generator) + torch.arange(8) for _ in range(2))
        moved = F.pad(x, (1, 1, 1, 1))[torch.arange(n)[:, None, None], down[:, :, None], right[:, None, :]]
        return moved * (0.7 + 0.6 * torch.rand(n, 1, 1, generator=generator)) + 0.15 * torch.randn(
            moved.shape, generator=generator
        )

    torch.manual_seed(0)
    hidden = [part for wide in (64, 256) for part in (nn.Linear(wide, 256), nn.BatchNorm1d(256), nn.ReLU())]
    encoder = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(256, DIMS))
    optimizer, loss = torch.optim.AdamW(encoder.parameters(), 2e-3), InfoNCE(temperature=0.2)
    for _ in range(steps):
        batch = images[torch.randint(0, len(images), (256,), generator=generator)]
        value = loss(encoder(view(batch)), encoder(view(batch)))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    encoder.eval()
    with torch.no_grad():
        return F.normalize(encoder(images)), torch.tensor(digits.target)


def structure(z: Tensor, label: Tensor) -> dict[str, Any]:
    """Measure clusters of unit vectors: mean cosines inside and between, spectrum inside, how near neighbours are."""
    cosine = z @ z.T
    cosine.fill_diagonal_(-2)
    same = label[:, None] == label
    spectra = []
    for number in label.unique():
        values = torch.linalg.eigvalsh(torch.cov(z[label == number].T)).flip(0).clamp(min=0)
        spectra.append(values / values.sum())
    near = cosine.topk(NEIGHBOURS, dim=1).values.mean(0)
    return {
        "vectors": len(z),
        "clusters": len(spectra),
        "within": float(cosine[same & (cosine > -2)].mean()),
        "between": float(cosine[~same].mean()),
        "spectrum": torch.stack(spectra).mean(0)[:DIMS].tolist(),
        "first": float(near[0]),
        "last": float(near[-1]),
    }


def ivf_recall(z: Tensor) -> dict[str, float]:
    """Measure what an IVF index of 4 sqrt(N) lists finds of each vector's neighbours, by probes."""
    own = torch.arange(len(z))
    right = exact_search(z, z, NEIGHBOURS, exclude=[(own, own)]).position
    lists = default_lists(len(z))
    made = {}
    for probes in (1, 2, 4, 8, 16):
        found = build_index(z, f"IVF{lists},Flat", probes=probes).search(z, NEIGHBOURS, exclude=[(own, own)])
        made[str(probes)] = share_found(found.position, right)
    return made


def share_found(position: Tensor, right: Tensor) -> float:
    """Give recall@k: the share of the right neighbours that were found."""
    return float((right[:, :, None] == position[:, None]).any(2).float().mean())


def clustered(size: int, clusters: int, known: Mapping[str, Any], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw unit vectors (size, D) in clusters like those of a trained encoder, in random order, and their clusters.

    Args:
        size: how many.
        clusters: how many; their sizes differ up to sevenfold.
        known: as `structure` gives it: the mean cosine inside a cluster and the shares of the variance along its axes,
            which point anywhere.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.tensor(known["spectrum"])
    spectrum = spectrum[: int((spectrum.cumsum(0) < 0.995 * spectrum.sum()).sum()) + 1]
    centres = F.normalize(torch.randn(clusters, DIMS, generator=generator))
    share = torch.rand(clusters, generator=generator) * 1.5 + 0.25
    label = torch.multinomial(share, size, replacement=True, generator=generator).sort().values
    # Unit centre plus noise of variance v in all: two of a cluster then have the cosine 1 / (1 + v).
    axes = (spectrum / spectrum.sum() * (1 / known["within"] - 1)).sqrt()
    z = torch.empty(size, DIMS)
    bounds = [0, *torch.bincount(label, minlength=clusters).cumsum(0).tolist()]
    for number, (start, end) in enumerate(itertools.pairwise(bounds)):
        turned = torch.linalg.qr(torch.randn(DIMS, len(axes), generator=generator)).Q
        z[start:end] = centres[number] + (torch.randn(end - start, len(axes), generator=generator) * axes) @ turned.T
    order = torch.randperm(size, generator=generator)
    return F.normalize(z)[order], label[order]


def clusters_for(size: int) -> int:
    return round(math.sqrt(size))


def make_known(file: Path) -> None:
    """Measure the digits' encoder, and vectors drawn like its, beside one another."""
    z, label = trained_embeddings()
    real = structure(z, label)
    drawn, cluster = clustered(len(z), real["clusters"], real)
    made = structure(drawn, cluster)
    cells.keep(file, {"real": {**real, "recall": ivf_recall(z)}, "drawn": {**made, "recall": ivf_recall(drawn)}})


# ------------------------------------------------------------------------------- one contender, in a process of its own


def status(field: str) -> int:
    """Give bytes from /proc/self/status: VmRSS, or VmHWM, the most since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def serve(folder: Path, size: int, name: str, device: str) -> None:
    """Build an index, then search when told to; every answer is a line of JSON."""
    stored, moved, own = (torch.from_numpy(np.load(folder / f"{part}.npy")).to(device) for part in PARTS)
    queries, numbers = stored[own], torch.arange(size, device=device)

    def say(**answer: Any) -> None:
        print(json.dumps(answer), flush=True)

    def timed(work: Any) -> float:
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def held() -> int:
        if device == "cuda":
            free, whole = torch.cuda.mem_get_info()
            return whole - free
        return status("VmRSS")

    # Loads the libraries and starts their threads.
    build_index(stored[:256].clone(), "exact" if name == "exact" else "Flat").search(queries[:64], NEIGHBOURS)
    before = held()
    reset_peak()
    made: list[Any] = []
    seconds = timed(lambda: made.append(build_index(stored, name)))
    index = made[0]
    say(build=seconds, held=held() - before, peak=status("VmHWM") - before if device == "cpu" else None)
    for line in sys.stdin:
        word, *rest = line.split()
        if word == "search":
            if probes := int(rest[0]):
                index.probes = probes
            index.search(queries[:100], NEIGHBOURS, exclude=[(own[:100], numbers)])
            reset_peak()
            before_search = held()
            seconds = timed(lambda: made.append(index.search(queries, NEIGHBOURS, exclude=[(own, numbers)])))
            found = made.pop()
            np.save(folder / f"found-{name}-{rest[0]}.npy", found.position.cpu().numpy())
            say(search=seconds, peak=status("VmHWM") - before_search if device == "cpu" else None)
        if word == "refresh":
            say(refresh=timed(lambda: index.refill(moved)))


PARTS = ("stored", "moved", "own")


class Contender:
    """A process that holds one index."""

    def __init__(self, folder: Path, size: int, name: str, device: str) -> None:
        words = ["--serve", name, "--size", str(size), "--device", device, "--cells", str(folder)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tools.bench_retrieval", *words],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.built = self._answer()

    def ask(self, *words: object) -> dict[str, Any]:
        pipe: IO[str] = self._process.stdin  # type: ignore[assignment]
        pipe.write(" ".join(map(str, words)) + "\n")
        pipe.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        pipe: IO[str] = self._process.stdout  # type: ignore[assignment]
        line = pipe.readline()
        if not line:
            raise RuntimeError(f"the contender ended with status {self._process.wait()}")
        return dict(json.loads(line))

    def close(self) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait()


def make_size(file: Path, size: int, device: str) -> None:
    """Let the contenders of one size build one after another, then search in turns; keep the cell."""
    known = cells.read(file.parent)["known"]["real"]
    folder = file.parent / f"{file.stem}-vectors"
    folder.mkdir(exist_ok=True)
    stored, _ = clustered(size, clusters_for(size), known)
    generator = torch.Generator().manual_seed(1)
    step = torch.randn(stored.shape, generator=generator).mul_(MOVED / math.sqrt(DIMS))
    own = torch.randperm(size, generator=generator)[:QUERIES]
    for part, values in zip(PARTS, (stored, F.normalize(step.add_(stored)), own), strict=True):
        np.save(folder / f"{part}.npy", values.numpy())
    del stored, step
    began, running = time.perf_counter(), {}
    for name in contenders(size):
        running[name] = Contender(folder, size, name, device)
        print(f"{name} built, {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    turns: dict[str, dict[str, Any]] = {}
    for _ in range(ROUNDS):
        for name, all_probes in contenders(size).items():
            for probes in all_probes:
                answer = running[name].ask("search", probes)
                row = turns.setdefault(f"{name} {probes}", {"name": name, "probes": probes, "search": [], "peak": []})
                row["search"].append(answer["search"])
                row["peak"].append(answer["peak"])
    right = torch.from_numpy(np.load(folder / "found-exact-0.npy"))
    for row in turns.values():
        found = torch.from_numpy(np.load(folder / f"found-{row['name']}-{row['probes']}.npy"))
        row["recall"] = share_found(found, right)
    built = {}
    for name, contender in running.items():
        # A graph is not refilled but built anew: at the largest size that is not waited for twice.
        again = {} if name.startswith("HNSW") and size > 100_000 else contender.ask("refresh")
        built[name] = {**contender.built, **again}
        contender.close()
    for left in folder.iterdir():
        left.unlink()
    folder.rmdir()
    cells.keep(
        file, {"size": size, "device": device, "built": built, "turns": turns, "threads": torch.get_num_threads()}
    )


# ---------------------------------------------------------------------------------------------------- mining in a run


def mining_share(file: Path, data: Path) -> None:
    """Train on Fashion-MNIST with hard negatives, searched anew every epoch; keep how long that took of the run."""
    import contrast

    out = file.parent / "mining-run"
    run = contrast.pretrain(
        str(data / "fashion_mnist" / "fashion_mnist.npz"),
        config="fashion_mnist",
        out=out,
        memory=[{"name": "hard_negatives", "neighbours": 8, "refresh": "1 epochs"}],
        budget="2 epochs",
        evaluate={"protocols": []},
        logger="none",
    )
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "mining_seconds" in row]
    cells.keep(
        file, {"rows": [{key: row[key] for key in ("step", "epoch", "seconds", "mining_seconds")} for row in rows]}
    )


# ------------------------------------------------------------------------------------------------------------ the page


def named(size: int, device: str) -> str:
    return f"{device}-{size}"


def rows_of(cell: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give the contenders of a cell with what was measured of each: medians, and the whole of a refresh of all."""
    for row in cell["turns"].values():
        built = cell["built"][row["name"]]
        search = statistics.median(row["search"])
        label = row["name"] + (f", {row['probes']} probes" if row["probes"] else "")
        peaks = [peak for peak in (built["peak"], *row["peak"]) if peak is not None]
        yield (
            label,
            {
                **row,
                "median": search,
                "built": built,
                "whole": built["build"] + search * cell["size"] / QUERIES,
                "peak": max(peaks) if peaks else None,
            },
        )


def taken(cell: Mapping[str, Any]) -> str:
    """Say which index the measurement tells to take: the quickest for all neighbours of all vectors, once.

    Exact search where it is at most `SLOWER` times slower, since it is exact; of the approximate ones, those with a
    recall of at least `RECALL` whose answer is the same every time, which a graph built on several cores is not.
    """
    rows = dict(rows_of(cell))
    exact = rows["exact"]["whole"]
    others = {
        row["name"]: row["whole"]
        for row in rows.values()
        if row["name"].startswith("IVF") and row["recall"] >= RECALL and row["probes"] == default_probes(lists_of(row))
    }
    best = min(others, key=others.__getitem__, default="exact")
    return "exact" if best == "exact" or exact <= SLOWER * others[best] else best


def lists_of(row: Mapping[str, Any]) -> int:
    return int(str(row["name"]).split(",")[0].removeprefix("IVF"))


def seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def size_table(cell: Mapping[str, Any]) -> Iterator[str]:
    """Give all that was measured at one size."""
    rows = []
    exact = None
    for label, row in rows_of(cell):
        exact = exact or row["search"]
        built = row["built"]
        ratios = [one / other for one, other in zip(row["search"], exact, strict=True)]
        again = seconds(built["refresh"]) if "refresh" in built else "as build"
        peak = "-" if row["peak"] is None else f"{row['peak'] / MIB:,.0f}"
        rows.append(
            [
                label,
                seconds(built["build"]),
                again,
                f"{seconds(row['median'])} [{seconds(min(row['search']))}-{seconds(max(row['search']))}]",
                f"{statistics.median(ratios):.2f} [{min(ratios):.2f}-{max(ratios):.2f}]",
                f"{row['recall']:.4f}",
                seconds(row["whole"]),
                f"{built['held'] / MIB:,.0f}",
                peak,
            ]
        )
    head = ["index", "build, s", "refresh, s", f"search of {QUERIES:,}, s", "of exact", f"recall@{NEIGHBOURS}"]
    yield from cells.table([*head, "build and search of all, s", "held, MiB", "most, MiB"], rows)


def page(found: Cells) -> str:
    """Give docs/benchmarks/retrieval.md."""
    lines = [
        "# What it costs to find nearest vectors",
        "",
        "Written by `tools/bench_retrieval` from its measurements; not by hand.",
        "",
    ]
    if not found:
        return "\n".join([*lines, "**missing**: no cell has been measured.", ""])
    lines += [*cells.made_on(found.values()), *vectors_section(found.get("known"))]
    for device in DEVICES:
        lines += device_section(found, device)
    lines += [*mining_section(found.get("mining")), *choice_section(found)]
    return "\n".join(lines)


def vectors_section(known: Mapping[str, Any] | None) -> Iterator[str]:
    """Say how the vectors are made."""
    yield "## The vectors"
    yield ""
    if known is None:
        yield "**missing**: the encoder that they are drawn like has not been trained."
        yield ""
        return
    yield (
        f"Unit vectors of {DIMS} numbers, drawn like the embeddings of an encoder that was trained for this: a small "
        "network of three linear layers, by InfoNCE (temperature 0.2), on the 1,797 handwritten digits of "
        "scikit-learn. Its "
        "classes give the mean cosine inside a cluster and the share of the variance along each axis; a drawn "
        "cluster has "
        "both, around a random direction and along random axes. There are sqrt(N) clusters, whose sizes differ up to "
        "sevenfold. Beside the digits stand as many vectors drawn so, in as many clusters:"
    )
    yield ""
    rows = []
    for name, words in (("real", "digits, encoded"), ("drawn", "drawn")):
        one = known[name]
        spectrum = torch.tensor(one["spectrum"])
        rows.append(
            [
                words,
                f"{one['within']:.2f}",
                f"{one['between']:.2f}",
                f"{float(spectrum.sum() ** 2 / spectrum.square().sum()):.1f}",
                f"{one['first']:.2f}",
                f"{one['last']:.2f}",
                *(f"{one['recall'][probes]:.3f}" for probes in ("1", "4", "16")),
            ]
        )
    head = ["", "cosine within", "between", "axes used", "to the nearest", f"to the {NEIGHBOURS}th"]
    lists = default_lists(known["real"]["vectors"])
    yield from cells.table([*head, *(f"recall, IVF{lists}, {probes} probes" for probes in (1, 4, 16))], rows)
    yield "*Axes used* is the participation ratio of the spectrum inside a cluster."
    yield ""


def device_section(found: Cells, device: str) -> Iterator[str]:
    """Give the tables of one device."""
    yield {"cpu": "## On the CPU", "cuda": "## On a GPU"}[device]
    yield ""
    if device == "cuda" and not any(named(size, device) in found for size in SIZES):
        yield "**missing**: no GPU was at hand; `tools/bench_retrieval --device cuda` measures there."
        yield ""
        return
    yield (
        f"Each index lives in a process of its own, all of one size at once; they build one after another and then "
        f"search in "
        f"turns, {ROUNDS} rounds: medians, least and most, and the ratio to exact search in the same round. The "
        f"queries are "
        f"{QUERIES:,} of the stored vectors, drawn; each asks for its {NEIGHBOURS} nearest, itself excluded. "
        f"*Recall* is the share "
        "of the exact answer. *Build and search of all* is build + search x N / 2,000: what one refresh of hard "
        "negatives "
        f"costs. *Refresh* puts vectors into the index that have moved by {MOVED} of their length, by what it has "
        f"been trained on. "
        "*Held* is by what the process has grown once the index is built, *most* by how much it grew while building or "
        "searching, both beyond the vectors themselves; libraries are loaded before."
    )
    yield ""
    for size in SIZES:
        cell = found.get(named(size, device))
        threads = "" if cell is None else f" ({cell['threads']} thread{'s' if cell['threads'] > 1 else ''})"
        yield f"### {size:,} vectors{threads}"
        yield ""
        if cell is None:
            yield "**missing**"
            yield ""
        else:
            yield from size_table(cell)


def mining_section(cell: Mapping[str, Any] | None) -> Iterator[str]:
    """Say what share of a run mining takes."""
    yield "## What mining costs in a run"
    yield ""
    if cell is None or not cell["rows"]:
        yield "**missing**: `tools/bench_retrieval DATA_FOLDER` measures it."
    else:
        last = cell["rows"][-1]
        epochs = round(last["epoch"])
        # The last row was written before the search at the end of its epoch.
        search = last["mining_seconds"] / (epochs - 1)
        rest = (last["seconds"] - last["mining_seconds"]) / epochs
        yield (
            "`configs/fashion_mnist.yaml` on 60,000 images with `memory: [{name: hard_negatives, neighbours: 8, "
            f"refresh: 1 epochs}}]`, {epochs} epochs in one run: a search at the end of an epoch took {search:.1f} s, "
            f"the epoch itself {rest:.1f} s: searching is {100 * search / (search + rest):.1f} % of an epoch."
        )
    yield ""


def choice_section(found: Cells) -> Iterator[str]:
    """Say which index to take when, and what "auto" takes."""
    yield "## Which index to take"
    yield ""
    yield (
        f"StepOutput is what finds the {NEIGHBOURS} nearest of all vectors soonest, building included: exact search as "
        f"long as it takes at "
        f"most {SLOWER:g} times as long as the best IVF index with a recall of at least {RECALL} (and "
        f"`default_probes`). A graph (HNSW) is "
        'not chosen, since it is built in another order each time and must be built anew for each refresh. "auto" is '
        "that:"
    )
    yield ""
    rows = []
    for size in SIZES:
        cell = found.get(named(size, "cpu"))
        rows.append([f"{size:,}", "missing" if cell is None else f"`{taken(cell)}`", f"`{auto_index(size)}`"])
    yield from cells.table(["vectors", "taken, as measured", '"auto" on the CPU'], rows)
    gpu = "as measured above" if any(named(size, "cuda") in found for size in SIZES) else "by arithmetic, not measured"
    yield (
        f'"auto" searches exactly up to {AUTO_EXACT["cpu"]:,} vectors on a CPU and up to '
        f"{AUTO_EXACT['cuda']:,} on a GPU ({gpu}); beyond, "
        f"it takes IVF with the power of two nearest to 4 sqrt(N) lists ({default_lists(100_000):,} for 100,000 "
        f"vectors, of which a "
        f"query looks into {default_probes(default_lists(100_000))}; {default_lists(1_000_000):,} for 1,000,000, "
        f"{default_probes(default_lists(1_000_000))}). Without faiss it searches exactly."
    )
    yield ""


# --------------------------------------------------------------------------------------------------------- the command


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="tools/bench_retrieval", description=__doc__, allow_abbrev=False)
    made.add_argument(
        "data", type=Path, nargs="?", help="the folder of the real sets, for the share of mining in a run"
    )
    made.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), metavar="N", help="vectors")
    made.add_argument("--device", choices=DEVICES, default="cpu")
    made.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process")
    made.add_argument("--again", action="store_true", help="measure these cells again, though they exist")
    made.add_argument("--write", action="store_true", help="measure nothing, write the page from the cells that exist")
    made.add_argument("--cells", type=Path, default=FOLDER, help="the folder of the cells; runs/bench_retrieval")
    made.add_argument("--page", type=Path, default=PAGE, help="where the page goes; docs/benchmarks/retrieval.md")
    made.add_argument("--child", help=argparse.SUPPRESS)
    made.add_argument("--serve", help=argparse.SUPPRESS)
    made.add_argument("--size", type=int, help=argparse.SUPPRESS)
    return made


def bench(words: Sequence[str] | None = None) -> int:
    """Measure what is missing, then write the page; 1 where a cell failed."""
    asked = parser().parse_args(words)
    if asked.serve:
        serve(asked.cells, asked.size, asked.serve, asked.device)
        return 0
    if asked.child:
        file = asked.cells / f"{asked.child}.json"
        if asked.child == "known":
            make_known(file)
        elif asked.child == "mining":
            mining_share(file, asked.data)
        else:
            make_size(file, asked.size, asked.device)
        return 0
    os.environ["OMP_NUM_THREADS"] = str(asked.threads)
    known = cells.read(asked.cells)
    planned = ["known", *(named(size, asked.device) for size in asked.sizes), *(["mining"] if asked.data else [])]
    todo = [] if asked.write else [name for name in planned if name == "known" or asked.again or name not in known]
    if "known" in known and "known" in todo:
        todo.remove("known")
    failed = 0
    for done, name in enumerate(todo, 1):
        print(f"[{done} of {len(todo)}] {name} ...", flush=True)
        order = ["tools.bench_retrieval", "--cells", str(asked.cells), "--device", asked.device, "--child", name]
        if name == "mining":
            order.insert(1, str(asked.data))
        elif name != "known":
            order += ["--size", name.split("-")[1]]
        why = cells.make(name, order, asked.cells)
        failed += bool(why)
        print(f"  {why or 'done'}", flush=True)
    asked.page.parent.mkdir(parents=True, exist_ok=True)
    asked.page.write_text(page(cells.read(asked.cells)))
    print(asked.page)
    return 1 if failed else 0


if __name__ == "__main__":
    from contrast.cli import answer

    sys.exit(answer(bench))
