"""Measure exact search and FAISS's indices in turns: time, memory and recall; and what mining costs in a run.

    python benchmarks/retrieval.py [--sizes 10000 30000] [--device cuda]
    python benchmarks/retrieval.py --data DATA_FOLDER

The vectors are unit vectors of 128 numbers, drawn like the embeddings of an encoder: a network of three linear layers,
trained by InfoNCE (tau 0.2) on the 1,797 digits of scikit-learn. Its classes give the mean cosine inside a cluster and
the spectrum inside a cluster; a drawn cluster has both, around a random direction and along random axes. There are
sqrt(N) clusters, whose sizes differ up to sevenfold. The cell `vectors` compares the digits with as many drawn vectors.

Each index is in a process of its own; they build one after another, then search in turns. The queries are 2,000 of the
stored vectors; each query requests its 16 nearest, itself excluded. `recall` is the share of the exact answer; `all` is
build + search x N / 2,000, which one refresh of hard negatives costs; `refresh` replaces the vectors by ones that have
moved by 0.3 of their length, without training the index again. Times are CPU seconds, on CUDA seconds on the clock;
`built_mib` is the growth of the process once the index is built, `peak_mib` the largest growth during building or
searching, both without the vectors themselves. `choice` is the index that "auto" should take, see `best_index`.

With a data folder the cell `mining` trains on Fashion-MNIST with hard negatives, searched every epoch.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
import torch.nn.functional as F
from harness import MIB, Key, Results, Worker
from torch import Tensor, nn

from contrast.losses import InfoNCE
from contrast.retrieval import build_index, default_lists, default_probes, exact_search

DIMS, NEIGHBOURS, QUERIES, ROUNDS = 128, 16, 2000, 5
SIZES = (10_000, 30_000, 100_000, 1_000_000)
RECALL, SLOWER = 0.99, 3.0
MOVED = 0.3
"""How far a vector has moved at a refresh, as a share of its length."""
PARTS = ("stored", "moved", "own")


def contenders(size: int) -> dict[str, tuple[int, ...]]:
    """Return index -> the numbers of probes that are tried, for one size."""
    lists = default_lists(size)
    probes = sorted({4, 8, default_probes(lists), 64})
    return {"exact": (0,), "Flat": (0,), f"IVF{lists},Flat": tuple(probes), "HNSW32": (0,)}


# -------------------------------------------------------------------------------------------------------- the vectors


def trained_embeddings(steps: int = 600) -> tuple[Tensor, Tensor]:
    """Train a small encoder on scikit-learn's digits by InfoNCE; return its unit embeddings (N, D) and labels (N,)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    generator = torch.Generator().manual_seed(0)

    def view(x: Tensor) -> Tensor:
        n = len(x)
        down, right = (torch.randint(0, 3, (n, 1), generator=generator) + torch.arange(8) for _ in range(2))
        moved = F.pad(x, (1, 1, 1, 1))[torch.arange(n)[:, None, None], down[:, :, None], right[:, None, :]]
        scale = 0.7 + 0.6 * torch.rand(n, 1, 1, generator=generator)
        return moved * scale + 0.15 * torch.randn(moved.shape, generator=generator)

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
    """Return mean cosines inside and between clusters, the spectrum inside, and the cosines of nearest neighbours."""
    cosine = z @ z.T
    cosine.fill_diagonal_(-2)
    same = label[:, None] == label
    spectra = []
    for index in label.unique():
        values = torch.linalg.eigvalsh(torch.cov(z[label == index].T)).flip(0).clamp(min=0)
        spectra.append(values / values.sum())
    spectrum = torch.stack(spectra).mean(0)[:DIMS]
    nearest = cosine.topk(NEIGHBOURS, dim=1).values.mean(0)
    return {
        "vectors": len(z),
        "clusters": len(spectra),
        "within": float(cosine[same & (cosine > -2)].mean()),
        "between": float(cosine[~same].mean()),
        "axes": float(spectrum.sum() ** 2 / spectrum.square().sum()),
        "nearest": float(nearest[0]),
        f"nearest_{NEIGHBOURS}": float(nearest[-1]),
        "spectrum": spectrum.tolist(),
    }


def ivf_recall(z: Tensor) -> dict[str, float]:
    """Return the share of each vector's neighbours that an IVF index of 4 sqrt(N) lists finds, by probes."""
    own = torch.arange(len(z))
    right = exact_search(z, z, NEIGHBOURS, exclude=[(own, own)]).position
    name, found = f"IVF{default_lists(len(z))},Flat", {}
    for probes in (1, 4, 16):
        answer = build_index(z, name, probes=probes).search(z, NEIGHBOURS, exclude=[(own, own)])
        found[f"{name}, {probes} probes"] = share_found(answer.position, right)
    return found


def share_found(position: Tensor, right: Tensor) -> float:
    """Return recall@k: the share of the right neighbours that were found."""
    return float((right[:, :, None] == position[:, None]).any(2).float().mean())


def clustered(size: int, clusters: int, known: Mapping[str, Any], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw unit vectors (size, D) in clusters like those of a trained encoder, in random order, and their clusters.

    Args:
        size: how many.
        clusters: how many; their sizes differ up to sevenfold.
        known: as `structure` returns it: the mean cosine inside a cluster and the shares of the variance along its
            axes, whose directions are random.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.tensor(known["spectrum"])
    spectrum = spectrum[: int((spectrum.cumsum(0) < 0.995 * spectrum.sum()).sum()) + 1]
    centres = F.normalize(torch.randn(clusters, DIMS, generator=generator))
    share = torch.rand(clusters, generator=generator) * 1.5 + 0.25
    label = torch.multinomial(share, size, replacement=True, generator=generator).sort().values
    # Unit centre plus noise of total variance v: two vectors of a cluster then have the cosine 1 / (1 + v).
    axes = (spectrum / spectrum.sum() * (1 / known["within"] - 1)).sqrt()
    z = torch.empty(size, DIMS)
    bounds = [0, *torch.bincount(label, minlength=clusters).cumsum(0).tolist()]
    for index, (start, end) in enumerate(itertools.pairwise(bounds)):
        turned = torch.linalg.qr(torch.randn(DIMS, len(axes), generator=generator)).Q
        z[start:end] = centres[index] + (torch.randn(end - start, len(axes), generator=generator) * axes) @ turned.T
    order = torch.randperm(size, generator=generator)
    return F.normalize(z)[order], label[order]


def clusters_for(size: int) -> int:
    return round(math.sqrt(size))


def measure_vectors() -> dict[str, Any]:
    """Compare the digits' encoder with vectors that are drawn like its embeddings."""
    z, label = trained_embeddings()
    real = structure(z, label)
    drawn, cluster = clustered(len(z), real["clusters"], real)
    return {
        "digits": {**real, "recall": ivf_recall(z)},
        "drawn": {**structure(drawn, cluster), "recall": ivf_recall(drawn)},
    }


# ------------------------------------------------------------------------------- one contender, in a process of its own


def work(name: str, folder: Path, device: str) -> None:
    """Answer jobs: build an index, then search or refresh."""
    stored, moved, own = (torch.from_numpy(np.load(folder / f"{part}.npy")).to(device) for part in PARTS)
    queries, exclude = stored[own], [(own, torch.arange(len(stored), device=device))]
    indices: list[Any] = []

    def timed(run: Callable[[], Any]) -> float:
        if device == "cpu":
            return harness.cpu_seconds(run)
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def used() -> int:
        if device == "cpu":
            return harness.process_bytes("VmRSS")
        free, total = torch.cuda.mem_get_info()
        return total - free

    def peak(before: int) -> float | None:
        return (harness.process_bytes("VmHWM") - before) / MIB if device == "cpu" else None

    # Loads the libraries.
    build_index(stored[:256].clone(), "exact" if name == "exact" else "Flat").search(queries[:64], NEIGHBOURS)

    def answer(job: dict[str, Any]) -> dict[str, Any]:
        before = used()
        harness.reset_peak()
        if job["do"] == "build":
            seconds = timed(lambda: indices.append(build_index(stored, name)))
            return {"seconds": seconds, "built_mib": (used() - before) / MIB, "peak_mib": peak(before)}
        (index,) = indices
        if job["do"] == "refresh":
            return {"seconds": timed(lambda: index.refill(moved))}
        if job["probes"]:
            index.probes = job["probes"]
        found: list[Any] = []
        index.search(queries[:100], NEIGHBOURS, exclude=[(own[:100], exclude[0][1])])
        seconds = timed(lambda: found.append(index.search(queries, NEIGHBOURS, exclude=exclude)))
        np.save(folder / f"found-{name}-{job['probes']}.npy", found[0].position.cpu().numpy())
        return {"seconds": seconds, "peak_mib": peak(before)}

    harness.serve(answer)


def measure_search(size: int, device: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """Build the contenders of one size one after another, then search in turns."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stored, _ = clustered(size, clusters_for(size), known)
        generator = torch.Generator().manual_seed(1)
        step = torch.randn(stored.shape, generator=generator).mul_(MOVED / math.sqrt(DIMS))
        own = torch.randperm(size, generator=generator)[:QUERIES]
        for part, values in zip(PARTS, (stored, F.normalize(step.add_(stored)), own), strict=True):
            np.save(folder / f"{part}.npy", values.numpy())
        del stored, step
        return measure_indices(size, device, folder)


def measure_indices(size: int, device: str, folder: Path) -> dict[str, Any]:
    """Return what was measured of each index on the vectors in a folder."""
    workers, built, peaks = {}, {}, {}
    for name in contenders(size):
        workers[name] = Worker(str(Path(__file__).resolve()), "--worker", name, str(folder), device)
        built[name] = workers[name].ask(do="build")

    def search(name: str, probes: int) -> float:
        answer = workers[name].ask(do="search", probes=probes)
        peaks.setdefault((name, probes), []).append(answer["peak_mib"])
        return float(answer["seconds"])

    every = [(name, probes) for name, several in contenders(size).items() for probes in several]
    seconds = harness.take_turns({one: lambda one=one: search(*one) for one in every}, ROUNDS)
    right = torch.from_numpy(np.load(folder / "found-exact-0.npy"))
    found: dict[str, Any] = {}
    for name, probes in every:
        position = torch.from_numpy(np.load(folder / f"found-{name}-{probes}.npy"))
        median = statistics.median(seconds[name, probes])
        most = [peak for peak in (built[name]["peak_mib"], *peaks[name, probes]) if peak is not None]
        found[f"{name}, {probes} probes" if probes else name] = {
            "build": built[name]["seconds"],
            "search": harness.quartiles(seconds[name, probes]),
            "of_exact": harness.ratios(seconds[name, probes], seconds["exact", 0]),
            "recall": share_found(position, right),
            "all": built[name]["seconds"] + median * size / QUERIES,
            "built_mib": built[name]["built_mib"],
            "peak_mib": max(most, default=None),
        }
    for name, worker in workers.items():
        # A graph is built again instead of refilled, which takes too long at the largest size.
        if not (name.startswith("HNSW") and size > 100_000):
            refresh = worker.ask(do="refresh")["seconds"]
            found |= {label: {**row, "refresh": refresh} for label, row in found.items() if label.startswith(name)}
        worker.close()
    return {"index": found, "choice": best_index(size, found)}


def best_index(size: int, found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the index that finds the neighbours of all vectors soonest, building included.

    Exact search where it takes at most `SLOWER` times as long as the best IVF index with a recall of at least `RECALL`
    and the default probes. A graph is not chosen: it is built in another order each time and again at each refresh.
    """
    lists = default_lists(size)
    name = f"IVF{lists},Flat"
    other = found[f"{name}, {default_probes(lists)} probes"]
    return "exact" if other["recall"] < RECALL or found["exact"]["all"] <= SLOWER * other["all"] else name


# ----------------------------------------------------------------------------------------- mining, and the command line


def measure_mining(data: Path) -> dict[str, Any]:
    """Train on Fashion-MNIST for two epochs with hard negatives, searched every epoch; return seconds of both."""
    import contrast

    with tempfile.TemporaryDirectory() as folder:
        run = contrast.pretrain(
            str(data / "fashion_mnist" / "fashion_mnist.npz"),
            config="fashion_mnist",
            out=Path(folder) / "run",
            memory=[{"name": "hard_negatives", "neighbours": 8, "refresh": "1 epochs"}],
            budget="2 epochs",
            evaluate={"protocols": []},
            logger="none",
        )
        rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return mining_share([row for row in rows if "mining_seconds" in row])


def mining_share(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the seconds of a search and of the rest of an epoch, and the share of searching, from a run's metrics."""
    last = rows[-1]
    epochs = round(last["epoch"])
    # The last row was written before the search at the end of its epoch.
    search = last["mining_seconds"] / (epochs - 1)
    epoch = (last["seconds"] - last["mining_seconds"]) / epochs
    return {"search": search, "epoch": epoch, "share": search / (search + epoch)}


def measure(key: Key, results: Results, data: Path) -> dict[str, Any]:
    if key["kind"] == "vectors":
        return measure_vectors()
    if key["kind"] == "mining":
        return measure_mining(data)
    known = results.find(kind="vectors")
    assert known, "the cell `vectors` is measured first"
    return measure_search(key["size"], key["device"], known["result"]["digits"])


def main(words: Sequence[str] | None = None) -> int:
    """Measure what is missing, and print."""
    parser = harness.parser("retrieval", __doc__)
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), metavar="N", help="vectors")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--data", type=Path, help="the folder of the real sets, for the cell `mining`")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.worker:
        name, folder, device = given.worker
        work(name, Path(folder), device)
        return 0
    keys: list[Key] = [{"kind": "vectors"}]
    keys += [{"kind": "search", "device": given.device, "size": size} for size in given.sizes]
    keys += [{"kind": "mining"}] if given.data else []
    harness.run(given, lambda _: keys, lambda key, results: measure(key, results, given.data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
