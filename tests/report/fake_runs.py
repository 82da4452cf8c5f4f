"""Two simulated runs: digits with all files of a finished run, and synthetic series."""

import json
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

from contrast.data.dataset import ArrayItems, Samples
from contrast.experiment.folder import COMMAND, CONFIG, ENVIRONMENT, METRICS, RESULTS, SAMPLES, STATE, VIEWS, RunFolder
from contrast.report.pictures import views_picture
from contrast.report.samples import page_arrays

DRAWS = 5


def split(x, target, name):
    """Return samples in memory, as `contrast.data` reads them."""
    number, target = np.arange(len(x)), np.asarray(target, dtype=np.int64)
    names = [f"{name}[{i}]" for i in number]
    return Samples(
        ArrayItems(np.asarray(x)), number, target=target, group=number, columns={}, names=names, classes=()
    )  # fmt: skip


def row(model, protocol, labels, value, *, metric="accuracy", spread=None, per_class=None, offset=0.0):
    luck = np.random.default_rng(len(model)).normal(0, 0.006, DRAWS) if spread is not None else [0.0]
    values = [value + offset * (i - 2) + shift for i, shift in enumerate(luck)]
    return {
        "model": model, "protocol": protocol, "protocol_version": "v1", "protocol_hash": "0f", "split": "test",
        "labels": labels, "metric": metric, "value": value, "spread": spread if spread is not None else 0.011,
        "spread_kind": "standard deviation over draws" if spread is not None else "standard error over test items",
        "n": len(values), "values": values, "seeds": list(range(len(values))), "selected_on": "validation",
        "saw_test": False, "settings": {}, "per_class": per_class, "seconds": 1.0,
    }  # fmt: skip


def results(classes, numbers, source):
    rows = []
    for model, (knn, linear, few) in numbers.items():
        per_class = {name: {"recall": few - 0.013 * i, "support": 36 + i} for i, name in enumerate(classes)}
        rows += [
            row(model, "knn", "all", knn),
            row(model, "linear", "all", linear),
            row(model, "few_labels", "10 per class", few, spread=0.012, offset=0.008, per_class=per_class),
            row(model, "few_labels", "10 per class", few - 0.01, metric="macro_f1", spread=0.013, offset=0.008),
        ]
    about = {"source": source, "fingerprint": "9f86d081884c7d659a2feaa0c55ad015", "split_by": None}
    return {
        "schema": 1,
        "run": {
            "command": f"contrast pretrain simclr {source}", "config_hash": "1a2b3c4d", "commit": "abcdef0",
            "dirty": True, "seed": 0, "status": "done", "device": "cpu", "processes": 1, "precision": "32-true",
            "batch_size": 256, "steps": 700, "seconds": 84.2, "peak_bytes": 734003200,
        },
        "data": {"train": {**about, "samples": 1437}, "test": {**about, "samples": 360}},
        "results": rows,
    }  # fmt: skip


FINDINGS = {
    "Samples flagged by epoch": [
        {"epoch": epoch, "noisy": 0.01 * epoch, "applied": int(epoch > 2)} for epoch in (1, 2, 3)
    ],
    "Noisy samples: small loss": [
        {"sample": 3, "name": "x_train[3]", "mean loss": 0.25},
        {"sample": 5, "name": "x_train[5]", "mean loss": 0.5},
    ],
    "Clusters": [{"cluster": 0, "size": 1200, "purity": 0.75}, {"cluster": 1, "size": 237, "purity": 0.5}],
}


def write_run(folder, *, source, classes, numbers, views, findings=None, **arrays):
    """Write every file of a finished run."""
    run, random = RunFolder(folder), np.random.default_rng(0)
    config = f"version: 1\nseed: 0\nname: simclr\ndata:\n  source: {source}\nbatch_size: 256\nbudget: 100 epochs\n"
    run.write(CONFIG, config + "loss:\n  name: info_nce\n  temperature: 0.2\n")
    run.write(COMMAND, f"contrast pretrain simclr {source} --out runs\n")
    environment = {"python": "3.11.2", "torch": "2.14.1", "device": "cpu", "libraries": {"timm": "1.0.31"}}
    run.write_json(ENVIRONMENT, environment)
    run.write_json(STATE, {"state": "done", "step": 700, "heartbeat": 1790000000.0})
    lines = [
        {"step": step, "epoch": step // 7, "loss": 5.5 * np.exp(-step / 150) + 3.1 + 0.1 * random.normal()}
        for step in range(700)
    ]
    lines += [{"step": step, "probe_accuracy": 0.95 - 0.6 * np.exp(-step / 90)} for step in range(20, 700, 35)]
    run.write(METRICS, "\n".join(json.dumps(line) for line in lines) + '\n{"step": 700, "lo')
    run.write_json(RESULTS, results(classes, numbers, source) | {"findings": findings or {}})
    run.write(VIEWS, views)
    run.write_arrays(SAMPLES, page_arrays(classes=classes, **arrays))
    return folder


def image_run(folder: Path) -> Path:
    digits = load_digits()
    x = torch.from_numpy(digits.images[:, None]).float() / 16
    train, test = split(x[:800], digits.target[:800], "x_train"), split(x[800:1100], digits.target[800:1100], "x_test")
    changed = [(x[:6] + 0.2 * torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(i))) for i in (0, 1)]
    return write_run(
        folder, source="digits", classes=[str(i) for i in range(10)],
        numbers={"raw": (0.961, 0.952, 0.881), "untrained": (0.958, 0.971, 0.918), "pretrained": (0.986, 0.989, 0.972)},
        views=views_picture(x[:6], changed, "image", train.names[:6]),
        kind="image", test=test, test_features=test.x().flatten(1), train=train, train_features=train.x().flatten(1),
        prepare=lambda raw: raw, findings=FINDINGS, found=train.subset(np.array([3, 5])),
    )  # fmt: skip


def series_run(folder: Path) -> Path:
    random = np.random.default_rng(0)
    target = np.arange(160) % 4
    time = np.linspace(0, 1, 300)
    x = np.sin(2 * np.pi * (2 + target[:, None, None] + random.random((160, 3, 1))) * time) + 0.1 * random.normal(
        size=(160, 3, 300)
    )
    x = torch.from_numpy(x).float()
    for i, length in enumerate(random.integers(150, 301, 160)):
        x[i, :, length:] = torch.nan
    x[::7, 1, 40:60] = torch.nan
    features = torch.fft.rfft(x.nan_to_num()).abs()[..., :12].flatten(1)
    train, test = split(x[:100], target[:100], "train.ts"), split(x[100:], target[100:], "test.ts")
    jittered = [x[:5] + 0.2 * torch.randn(x[:5].shape, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    return write_run(
        folder, source="aeon:A_rather_long_name_of_an_archive_set",
        classes=["walking", "standing still", "<b>run</b>", "up & down $x$"],
        numbers={"raw": (0.36, 0.45, 0.36), "untrained": (0.7, 0.74, 0.67), "pretrained": (0.74, 0.79, 0.70),
                 "off_the_shelf": (0.5, 0.6, 0.4)},
        views=views_picture(x[:5], jittered, "series", train.names[:5]),
        kind="series", test=test, test_features=features[100:], train=train, train_features=features[:100],
        prepare=lambda raw: raw,
    )  # fmt: skip
