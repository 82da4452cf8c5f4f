import math

import pytest
import torch

from tests.retrieval.reference import clustered


@pytest.fixture(scope="session")
def many():
    """8,000 vectors with their clusters, the first 200 as queries, and by one sort what is nearest to these.

    Returns:
        stored (M, D), clusters (M,), exclude (each query itself), and the sorted similarities and positions (200, M).
    """
    stored, cluster = clustered()
    own = torch.arange(200)
    product = (stored[own].double() @ stored.double().T).float()
    product[own, own] = -math.inf
    return stored, cluster, [(own, torch.arange(len(stored)))], product.sort(dim=1, descending=True, stable=True)
