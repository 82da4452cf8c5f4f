"""Where more candidates come from; needs torch and numpy alone."""

from contrast.memory.bank import Bank
from contrast.memory.memory import MEMORIES, Memory
from contrast.memory.queue import Queue

__all__ = ["MEMORIES", "Bank", "Memory", "Queue"]
