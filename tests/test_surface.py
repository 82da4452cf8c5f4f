"""What users type: the lines, names and arguments of the losses that later versions must keep."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import contrast
from contrast import losses
from contrast.core.registry import InputError, schema
from contrast.losses import CACR, LOSSES, BadPairs, FalseNegatives, HardNegative, InfoNCE, PairLoss
from contrast.memory import MEMORIES, Bank, HardNegatives, NearestPositives, Queue, nearest_views

ROOT = Path(__file__).parents[1]
HEAVY = [
    "lightning",
    "pytorch_lightning",
    "torchvision",
    "timm",
    "omegaconf",
    "sklearn",
    "scipy",
    "pandas",
    "matplotlib",
    "faiss",
    "tensorboard",
    "PIL",
    "jinja2",
    "aeon",
]


@pytest.mark.parametrize("line", ["import contrast.losses", "import contrast"])
def test_a_bare_import_needs_only_torch_and_numpy(line):
    code = f"{line}; import sys, json; print(json.dumps(sorted(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in json.loads(answer.stdout)}
    assert "contrast" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_a_loss_works_where_every_extra_is_missing():
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r}))\n"
        "import torch, contrast\n"
        "from contrast.losses import CACR, InfoNCE\n"
        "z = torch.randn(2, 4, 3, requires_grad=True)\n"
        "(CACR()(*z) + InfoNCE()(*z)).backward()\n"
        "try:\n    contrast.pretrain\nexcept ImportError as error:\n    print(error)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "contrast.pretrain needs the package" in answer.stdout
    assert 'pip install "contrast-learning[train]"' in answer.stdout


def views(count=2):
    return torch.randn(count, 6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_().unbind()


def test_the_everyday_lines_work():
    z_a, z_b = views()
    labels = torch.tensor([0, 1, 0, 1, 2, 2])
    index = torch.arange(6)
    queue = torch.randn(9, 4)
    (q_a, q_b), (k_a, k_b) = views(), torch.randn(2, 6, 4)
    criterion = InfoNCE()
    values = [
        CACR()(z_a, z_b),
        InfoNCE(temperature=0.1)(z_a, z_b, group=labels),
        criterion(z_a, z_b, sample=index),
        InfoNCE()(q_a, q_b, targets=(k_a, k_b), sample=index, extra=[queue]),
        InfoNCE()(q_a, targets=(None, k_b), sample=index, extra=[queue]),
        InfoNCE(candidates="memory")(q_a, targets=(None, k_b), sample=index, extra=[queue]),
        HardNegative()(z_a, z_b),
        BadPairs(InfoNCE(), samples=6)(z_a, z_b, sample=index),
        FalseNegatives(InfoNCE(), relative_margin=0.05)(z_a, z_b, sample=index),
        FalseNegatives(InfoNCE(), guide=True)(z_a, z_b, reference=(k_a, k_b)),
    ]
    with contrast.local():
        values.append(criterion(z_a, z_b, sample=index))
    assert all(value.shape == () and value.requires_grad and torch.isfinite(value) for value in values)
    assert torch.equal(values[2], values[-1])
    assert criterion(z_a, z_b, reduction="none").shape == (12,)
    criterion.end_epoch()
    assert all(not value.requires_grad for value in criterion.metrics.values())


def test_a_loss_of_the_user_is_one_method(monkeypatch):
    monkeypatch.setattr(LOSSES, "_parts", dict(LOSSES._parts))
    monkeypatch.setattr(LOSSES, "_aliases", dict(LOSSES._aliases))

    @LOSSES.register("mine")
    class Mine(PairLoss):
        def per_anchor(self, pairs):
            return pairs.logsumexp(1.0, over="negative") - pairs.mean(over="positive")

    value = LOSSES.build("mine")(*views())
    assert value.requires_grad


@pytest.mark.parametrize(
    "name",
    [
        "Embeddings",
        "Pairs",
        "PairLoss",
        "LOSSES",
        "Registry",
        "InputError",
        "local",
        "process_group",
        "set_process_group",
    ],
)
def test_what_authors_of_losses_need_is_importable_from_contrast(name):
    assert hasattr(contrast, name)
    assert name in contrast.__all__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'contrast' has no attribute 'pretrian'"):
        _ = contrast.pretrian


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("info_nce", {"temperature": 0.1, "learn_temperature": False, "candidates": "all", "positives": "outside"}),
        (
            "cacr",
            {"attraction_scale": 1.0, "repulsion_scale": 1.0, "attraction_weight": 1.0, "repulsion_weight": 1.0},
        ),
        ("negative_cosine", {}),
        ("decoupled", {"temperature": 0.1, "weighting": "none", "sigma": 0.5}),
        ("hard_negative", {"temperature": 0.5, "hardness": 1.0, "positive_prior": 0.1}),
        ("hard_contrastive", {"temperature": 0.3, "hardest": 0.1, "form": "softmax", "negative_weight": 1.0}),
        ("siglip", {"scale": 10.0, "bias": -10.0, "learn": True}),
        (
            "cacr_queue",
            {"attraction_scale": 1.0, "repulsion_scale": 2.0, "attraction_weight": 1.0, "repulsion_weight": 1.0},
        ),
        ("cacr_multi_crop", {"temperature": 1.0, "cost": "rbf"}),
        ("cacr_rbf", {"attraction_scale": 1.0, "repulsion_scale": 1.0, "cost_scale": 2.0}),
        ("cwcl", {"temperature": 0.07, "learn_temperature": False}),
        ("amcl", {"dim": None, "form": "max", "network": "mlp", "temperature": 0.5, "regulariser_weight": 0.1}),
        ("amcl_cosine", {"dim": None, "network": "mlp", "temperature": 0.5, "regulariser_weight": 0.1}),
        ("amcl_barlow", {"dim": None, "off_diagonal_weight": 5e-3, "network": "mlp", "temperature": 1.0}),
        (
            "bad_pairs",
            {
                "loss": inspect.Parameter.empty,
                "samples": inspect.Parameter.empty,
                "warmup_epochs": 50,
                "noisy_width": 2.0,
                "faulty_width": 3.0,
                "statistics": "paper",
                "weight": "density",
            },
        ),
        (
            "false_negatives",
            {
                "loss": inspect.Parameter.empty,
                "above": None,
                "margin": None,
                "relative_margin": None,
                "top": None,
                "guide": False,
            },
        ),
    ],
)
def test_losses_keep_their_arguments_and_defaults(name, arguments):
    known = {key: default for key, (_, default) in schema(LOSSES[name]).items()}
    assert arguments.items() <= known.items()


CLASSES = {
    "amcl": "AMCL",
    "amcl_barlow": "AMCLBarlow",
    "amcl_cosine": "AMCLCosine",
    "bad_pairs": "BadPairs",
    "cacr": "CACR",
    "cacr_multi_crop": "CACRMultiCrop",
    "cacr_queue": "CACRQueue",
    "cacr_rbf": "CACRRBF",
    "cwcl": "CWCL",
    "decoupled": "DecoupledInfoNCE",
    "false_negatives": "FalseNegatives",
    "hard_contrastive": "HardContrastive",
    "hard_negative": "HardNegative",
    "info_nce": "InfoNCE",
    "negative_cosine": "NegativeCosine",
    "siglip": "SigLIP",
}


def test_losses_keep_their_names_and_classes():
    assert {name: loss.__name__ for name, loss in LOSSES.items()} == CLASSES
    assert all(getattr(losses, name) in LOSSES.values() for name in CLASSES.values())
    assert set(losses.__all__) == {*CLASSES.values(), "LOSSES", "Loss", "ModuleLoss", "PairLoss", "Source", "as_loss"}


def test_the_lines_with_memories_work():
    index = torch.arange(6)
    queue, bank = Queue(8, dim=4), Bank(samples=6, dim=4)
    hard, nearest = HardNegatives(bank, neighbours=2, refresh="1 steps"), NearestPositives(Queue(8, dim=4))
    criterion = InfoNCE()
    for _ in range(2):
        z_a, z_b = views()
        criterion(z_a, z_b, sample=index, extra=[queue, bank, hard]).backward()
        near = nearest_views(nearest, (z_a, z_b), sample=index)
        criterion(*(near or (z_a, z_b)), targets=(z_a, z_b), sample=index).backward()
        for memory in (queue, hard, nearest):
            memory.update(z_b, sample=index)
            memory.end_epoch()
            memory.load_state_dict(memory.state_dict())
    assert queue.filled == 8
    assert (bank.age == 0).all()
    assert (hard.table >= 0).all()
    assert {"false_negatives", "false_negatives_removed", "true_negatives_removed"} == set(
        criterion.false_negative_rates(index % 2)
    )


@pytest.mark.parametrize(
    ("name", "made", "arguments"),
    [
        ("queue", "Queue", {"heads": None, "reference_dim": None}),
        ("bank", "Bank", {"heads": None, "bytes_per_process": 2**30, "reference_dim": None}),
        ("hard_negatives", "HardNegatives", {"neighbours": 16, "refresh": "1 epochs", "index": "auto", "seed": 0}),
        ("nearest_positives", "NearestPositives", {"mutual": 0}),
    ],
)
def test_memories_keep_their_names_arguments_and_defaults(name, made, arguments):
    memory = MEMORIES[name]
    assert memory.__name__ == made
    known = {key: default for key, (_, default) in schema(memory).items()}
    assert arguments.items() <= known.items()
    assert all(f"{argument}: " in memory.__doc__ for argument in known)


@pytest.mark.parametrize("name", LOSSES)
def test_every_argument_of_a_loss_can_come_from_a_config_and_is_documented(name):
    for argument, (annotation, _) in schema(LOSSES[name]).items():
        assert f"{argument}: " in LOSSES[name].__doc__
        assert annotation is not None


@pytest.mark.parametrize("name", LOSSES)
def test_temperature_divides_and_scale_multiplies(name):
    for argument in schema(LOSSES[name]):
        assert argument not in {"tau", "t", "T", "temp", "beta", "alpha"}


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("NT-Xent", "info_nce"),
        ("nt_xent", "info_nce"),
        ("SimCLR", "info_nce"),
        ("SupCon", "info_nce"),
        ("MoCo", "info_nce"),
        ("CLIP", "info_nce"),
        ("InfoNCE", "info_nce"),
        ("CACR", "cacr"),
        ("SimSiam", "negative_cosine"),
        ("NegativeCosine", "negative_cosine"),
        ("DCL", "decoupled"),
        ("HCL", "hard_negative"),
        ("debiased", "hard_negative"),
        ("DBPM", "bad_pairs"),
        ("BadPairs", "bad_pairs"),
        ("SigLIP", "siglip"),
        ("AMCL", "amcl"),
        ("CACR-Queue", "cacr_queue"),
        ("GISTEmbed", "false_negatives"),
        ("FalseNegatives", "false_negatives"),
    ],
)
def test_an_alias_is_answered_with_the_right_name_and_never_accepted(alias, name):
    assert alias not in LOSSES
    with pytest.raises(InputError, match=f"the loss '{alias}' is called '{name}' here"):
        LOSSES.build(alias)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_says_its_source_and_its_formula(name):
    assert "Source: " in LOSSES[name].__doc__
    assert ".. math::" in LOSSES[name].__doc__
    assert callable(LOSSES[name].end_epoch)
    assert hasattr(LOSSES[name], "metrics")


def test_the_distribution_has_its_own_name_and_brings_its_types():
    assert 'name = "contrast-learning"' in (ROOT / "pyproject.toml").read_text()
    assert (ROOT / "contrast" / "py.typed").exists()


def test_the_functions_keep_their_names_whatever_was_imported_before():
    code = (
        "import contrast.evaluation.protocols, contrast.api, contrast\n"
        "print(all(callable(f) for f in (contrast.pretrain, contrast.evaluate, contrast.load, contrast.local)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout == "True\n"
