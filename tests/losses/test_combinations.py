"""The table of docs/combinations.md: which loss can be combined with what, and the error of each that cannot.

`python -m tests.losses.test_combinations` writes the page.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from contrast.losses import LOSSES, BadPairs, FalseNegatives, PairLoss
from contrast.memory import Bank, HardNegatives, Memory, Queue
from tests.losses.cases import DIMS, Case
from tests.losses.reference import random

PAGE = Path(__file__).parents[2] / "docs" / "combinations.md"

FIRST_NINE = [
    "info_nce",
    "decoupled",
    "hard_negative",
    "hard_contrastive",
    "cacr",
    "cwcl",
    "siglip",
    "amcl",
    "bad_pairs",
]
NEEDS = {
    "amcl": {"dim": DIMS},
    "amcl_cosine": {"dim": DIMS},
    "amcl_barlow": {"dim": DIMS},
    "bad_pairs": {"loss": {"name": "info_nce"}, "samples": 64},
    "false_negatives": {"loss": {"name": "info_nce"}, "above": 0.5},
}
"""Required arguments of a loss."""
TARGETS = {"cacr_queue", "cacr_multi_crop", "amcl_cosine", "negative_cosine"}
SAMPLE = {"bad_pairs"}
SUBJECTS = [
    Case(name, NEEDS.get(name, {}), targets=name in TARGETS, sample=name in SAMPLE)
    for name in [*FIRST_NINE, *(name for name in sorted(LOSSES) if name not in FIRST_NINE)]
]
SUBJECTS[1:1] = [
    Case("info_nce", {"candidates": "across"}),
    Case("info_nce", {"candidates": "memory"}, extra=True),
]

NO_NEGATIVES = "Nothing changes: there are no negatives."
NOTHING = "Nothing changes."

SAMPLES = 6
LABELS = torch.tensor([0, 1, 0, 2, 1, 1])


@dataclass(frozen=True)
class Works:
    """Value and gradient are finite, and the option changes the value.

    Args:
        given: a further argument that this needs.
        without: what happens without it.
    """

    given: str = ""
    without: str = ""


@dataclass(frozen=True)
class Fails:
    """The call raises a ValueError with this sentence, or has no effect for this reason."""

    sentence: str


class NoEffect:
    """The option does not change the value."""


Outcome = Works | Fails | NoEffect


def value_of(loss, views, given):
    """Return the value of a call, after a check that value and gradient are finite."""
    value = loss(*views, **given)
    leaves = [*views, *loss.parameters()]
    gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    assert torch.isfinite(value)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    return float(value.detach())


def outcome(call: Callable[..., float], first, second) -> Outcome:
    """Return the outcome of a call with each of two values of an option."""
    try:
        one, other = call(first), call(second)
    except ValueError as error:
        return Fails(str(error))
    return Works() if abs(one - other) > 1e-9 else NoEffect()


def queue(seed, *, labels=False, reference=None):
    """Return a queue of nine samples, two of which are in the batch."""
    sample = torch.tensor([0, 3, *range(40, 47)])
    filled = Queue(9, DIMS, reference_dim=None if reference is None else reference.shape[1])
    group = torch.arange(9) % 3 if labels else sample
    filled.update(random(9, DIMS, seed=seed), sample=sample, group=group, reference=reference)
    return filled


def hard_negatives(seed, *, labels=False, reference=None):
    """Return the two hardest negatives per sample of the batch, from a bank of nine with the batch."""
    sample = torch.arange(9)
    bank = Bank(9, DIMS, reference_dim=None if reference is None else reference.shape[1])
    bank.update(
        random(9, DIMS, seed=seed), sample=sample, group=LABELS.repeat(2)[:9] if labels else sample, reference=reference
    )
    found = HardNegatives(bank, neighbours=2)
    found.refresh()
    return found


def two_views(case: Case) -> Outcome:
    views, _ = case.inputs(SAMPLES)

    def call(factor):
        return value_of(case.make(), [views[0], (views[1].detach() + factor).requires_grad_()], {})

    return outcome(call, 0, random(SAMPLES, DIMS, seed=3))


def with_a_queue(case: Case) -> Outcome:
    return with_a_memory(case, queue)


def with_hard_negatives(case: Case) -> Outcome:
    return with_a_memory(case, hard_negatives)


def with_a_memory(case: Case, memory: Callable[..., Memory]) -> Outcome:
    """Return the outcome of candidates from a memory, if necessary with labels or references."""
    views, given = case.inputs(SAMPLES)
    given["sample"] = torch.arange(SAMPLES)

    def call(extra, **more):
        return value_of(case.make(), views, {**given, **more, "extra": [extra]})

    found = outcome(call, memory(5), memory(6))
    if isinstance(found, NoEffect):
        again = outcome(lambda extra: call(extra, group=LABELS), *(memory(seed, labels=True) for seed in (5, 6)))
        return Works("with labels", NO_NEGATIVES) if isinstance(again, Works) else found
    if isinstance(found, Fails) and "reference" in found.sentence:
        memories = (memory(seed, reference=random(9, 3, seed=8)) for seed in (5, 6))
        again = outcome(lambda extra: call(extra, reference=random(SAMPLES, 3, seed=9)), *memories)
        return Works("with `reference=`", found.sentence) if isinstance(again, Works) else found
    return found


def with_labels(case: Case) -> Outcome:
    views, given = case.inputs(SAMPLES)
    return outcome(lambda group: value_of(case.make(), views, {**given, "group": group}), None, LABELS)


def of_three_views(case: Case) -> Outcome:
    (a, b), given = case.inputs(SAMPLES)
    if case.targets:
        given["targets"] = (*given["targets"], random(SAMPLES, DIMS, seed=4))
    seeds = (11, 12)
    return outcome(
        lambda seed: value_of(case.make(), [a, b, random(SAMPLES, DIMS, seed=seed).requires_grad_()], given), *seeds
    )


def of_heads(case: Case) -> Outcome:
    views, given = case.inputs(SAMPLES, heads=3)
    if case.extra:
        given["extra"] = [random(3, 6, DIMS, seed=7)]

    def call(head):
        changed = views[0].detach().clone()
        if head is not None:
            changed[head] = random(SAMPLES, DIMS, seed=13)
        return value_of(case.make(), [changed.requires_grad_(), views[1]], given)

    every = [outcome(call, None, head) for head in range(3)]
    assert len({type(one) for one in every}) == 1
    return every[0]


def inside_bad_pairs(case: Case) -> Outcome:
    views, given = case.inputs(SAMPLES)
    given["sample"] = torch.arange(SAMPLES)

    def call(width):
        inner = case.make()
        criterion = BadPairs(inner, samples=SAMPLES, warmup_epochs=0, noisy_width=width, faulty_width=width)
        criterion(*views, **given)
        criterion.end_epoch()
        value = value_of(criterion, views, given)
        assert width < float("inf") or value == value_of(inner, views, given)
        return value

    return outcome(call, float("inf"), 0.1)


def ignoring(loss: PairLoss, rule) -> PairLoss:
    """Return the loss, made to ignore the negatives that the rule names."""
    if not isinstance(loss, PairLoss):
        raise ValueError(f"{type(loss).__name__} has no pairs of samples.")
    plain = loss.pairs
    loss.pairs = lambda *views, **given: [pairs.ignoring(rule) for pairs in plain(*views, **given)]
    return loss


def with_ignoring(case: Case) -> Outcome:
    views, given = case.inputs(SAMPLES)

    def call(bound):
        rule = lambda anchor, candidate, similarity: similarity > bound  # noqa: E731
        return value_of(ignoring(case.make(), rule), views, given)

    found = outcome(call, 2.0, 0.2)
    if isinstance(found, NoEffect) and with_a_queue(case) == Works("with labels", NO_NEGATIVES):
        return Fails(NO_NEGATIVES)
    if isinstance(found, Works):
        assert call(2.0) == pytest.approx(value_of(case.make(), views, given), rel=1e-12)
        call(-2.0)  # no negative remains
    return found


def inside_false_negatives(case: Case) -> Outcome:
    views, given = case.inputs(SAMPLES)
    found = outcome(lambda bound: value_of(FalseNegatives(case.make(), above=bound), views, given), 2.0, 0.2)
    return with_ignoring(case) if isinstance(found, NoEffect) else found


COLUMNS: dict[str, Callable[[Case], Outcome]] = {
    "`loss(z_a, z_b)`": two_views,
    "queue": with_a_queue,
    "hard negatives": with_hard_negatives,
    "labels": with_labels,
    "three views": of_three_views,
    "heads": of_heads,
    "bad pairs": inside_bad_pairs,
    "false negatives": inside_false_negatives,
    "ignoring": with_ignoring,
}


GLOSSARY = """# Combinations

Written by `python -m tests.losses.test_combinations`; the tests compute every cell again. *Works* means that value and
gradient are finite and that the option of the column changes the value. A number refers to the error message, or to the
reason why nothing changes. Losses that need `targets`, `sample` or `dim` have them, except in the first column.

| column | the call |
|---|---|
| `loss(z_a, z_b)` | two views and nothing else |
| queue | `extra=[Queue(...)]`, remembered samples, two of them in the batch |
| hard negatives | `extra=[HardNegatives(bank)]`, the nearest other samples of each sample in the batch |
| labels | `group=labels` |
| three views | `loss(z_a, z_b, z_c)` |
| heads | views (H, N, D) |
| bad pairs | `BadPairs(loss, samples=...)` around it, after an epoch |
| false negatives | `FalseNegatives(loss, above=...)` around it |
| ignoring | its pairs with a rule that ignores similar negatives, [as in your own loss](your_own_loss.md) |
"""


def page() -> str:
    """Return the page."""
    notes: dict[str, int] = {}

    def note(sentence: str) -> str:
        return f"({notes.setdefault(sentence, len(notes) + 1)})"

    def cell(found: Outcome) -> str:
        match found:
            case Works(given="", without=""):
                return "works"
            case Works(given, without):
                return f"works {given} {note(without)}"
            case Fails(sentence):
                return note(sentence)
        return note(NOTHING)

    rows = []
    for subject in SUBJECTS:
        arguments = [f"{key}={value!r}" for key, value in subject.arguments.items() if key == "candidates"]
        cells = [" ".join(f"`{word}`" for word in (subject.name, *arguments))]
        rows.append([*cells, *(cell(column(subject)) for column in COLUMNS.values())])
    table = [["loss", *COLUMNS], ["---"] * (len(COLUMNS) + 1), *rows]
    lines = ["| " + " | ".join(cells) + " |" for cells in table]
    numbered = [f"{number}. {sentence}" for sentence, number in notes.items()]
    return "\n".join([GLOSSARY, *lines, "", *numbered, ""])


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(), "write it again: python -m tests.losses.test_combinations"


def test_every_registered_loss_is_in_the_table():
    assert {subject.name for subject in SUBJECTS} == set(LOSSES)
    assert [subject.name for subject in SUBJECTS if not subject.arguments.get("candidates")][:9] == FIRST_NINE


@pytest.mark.parametrize(
    "case", [case for case in SUBJECTS if not (case.targets or case.sample or case.extra)], ids=str
)
def test_a_loss_without_needs_takes_two_views_only(case):
    assert isinstance(two_views(case), Works)


@pytest.mark.parametrize("case", [case for case in SUBJECTS if case.targets or case.sample or case.extra], ids=str)
def test_a_loss_that_needs_more_names_it_in_its_error(case):
    found = two_views(case)
    assert isinstance(found, Fails)
    assert ("targets=" if case.targets else "sample=" if case.sample else "extra=") in found.sentence
    assert "\n" not in found.sentence


if __name__ == "__main__":
    PAGE.write_text(page())
