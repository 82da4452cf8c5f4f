"""Where more candidates come from; needs torch and numpy alone."""

from contrast.memory.bank import Bank
from contrast.memory.hard_negatives import HardNegatives
from contrast.memory.memory import MEMORIES, Memory
from contrast.memory.nearest_positives import NearestPositives, nearest_views
from contrast.memory.queue import Queue
from contrast.memory.tables import NeighbourTables

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
