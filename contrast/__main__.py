"""`python -m contrast` is the command `contrast`."""

from contrast.cli import entry

if __name__ == "__main__":
    entry()
