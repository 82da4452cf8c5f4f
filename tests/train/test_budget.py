import pytest

from contrast.core.registry import InputError
from contrast.train.budget import Budget


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("3 epochs", Budget(steps=21)),
        ("1 epoch", Budget(steps=7)),
        ("0.5 epochs", Budget(steps=4)),
        ("50000 steps", Budget(steps=50000)),
        ("1,000 steps", Budget(steps=1000)),
        ("8h", Budget(seconds=28800)),
        ("90 minutes", Budget(seconds=5400)),
        ("1h30m", Budget(seconds=5400)),
        ("45 s", Budget(seconds=45)),
    ],
)
def test_epochs_steps_and_times_are_parsed(text, budget):
    assert Budget.parse(text, steps_per_epoch=7) == budget


@pytest.mark.parametrize("text", ["", "200", "many epochs", "0 steps", "8 parsecs", "-3 epochs", "epochs"])
def test_anything_else_is_refused_with_an_example(text):
    with pytest.raises(InputError, match="200 epochs"):
        Budget.parse(text, steps_per_epoch=7)


def test_progress_ends_at_one():
    assert Budget(steps=10).progress(5, 1e9) == 0.5
    assert Budget(steps=10).progress(50, 0) == 1
    assert Budget(seconds=100).progress(10**9, 25) == 0.25
