"""Memories: sources of further candidates and of other positives; needs torch and numpy only."""

from contrast.memory.bank import Bank
from contrast.memory.hard_negatives import HardNegatives, NeighbourTables
from contrast.memory.memory import MEMORIES, Memory
from contrast.memory.nearest_positives import NearestPositives, nearest_views
from contrast.memory.queue import Queue

__all__ = [
    "MEMORIES",
    "Bank",
    "HardNegatives",
    "Memory",
    "NearestPositives",
    "NeighbourTables",
    "Queue",
    "nearest_views",
]
