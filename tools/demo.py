"""Pretrains and evaluates on three real data sets that come inside packages, and prints what came out."""

from __future__ import annotations

import sys
import time

from contrast.cli import answer
from contrast.experiment import config as configuration
from contrast.experiment import run as runs

SETS = {
    "demo_digits": "scikit-learn's digits: 1,797 images of 8x8",
    "demo_osuleaf": "OSULeaf from the UCR archive: 442 series of 427 steps, the outlines of leaves",
    "demo_japanese_vowels": "JapaneseVowels from the UEA archive: 640 series of 12 channels and 7 to 29 steps",
}


def demo() -> int:
    """Run every set, then print every table with the path of its report."""
    began = time.monotonic()
    made: list[tuple[str, runs.Run]] = []
    for number, (config, words) in enumerate(SETS.items(), 1):
        print(f"\n[{number} of {len(SETS)}] {words}", file=sys.stderr)
        made.append((words, runs.start(configuration.load(config), name=config, command=f"contrast pretrain {config}")))
    for words, run in made:
        print(f"\n{words}\n\n{run.table()}\nreport: {run.report.resolve()}")
    print(f"\ndone in {(time.monotonic() - began) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(answer(demo))
