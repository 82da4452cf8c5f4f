import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from contrast.data import Batch, open_data
from tests.data.writing import waves


@pytest.fixture
def samples(tmp_path):
    np.savez(tmp_path / "x.npz", x=waves(10, 2), y=np.arange(10) % 2, age=np.arange(10) * 10)
    return open_data(str(tmp_path / "x.npz"), positives="label").train


def test_one_item_is_a_row_of_the_batch(samples):
    batch, one = samples.__getitems__([3, 5]), samples[5]
    assert [field.shape for field in batch] == [(2, 2, 12), (2,), (2,), (2,)]
    assert [field.dtype for field in batch] == [torch.float32, torch.int64, torch.int64, torch.int64]
    for field, single in zip(batch, one, strict=True):
        assert torch.equal(field[1], single)


def test_a_loader_returns_batches_without_collating(samples):
    batches = list(DataLoader(samples, batch_size=3, collate_fn=lambda batch: batch))
    assert all(isinstance(batch, Batch) for batch in batches)
    assert torch.cat([batch.sample for batch in batches]).tolist() == samples.sample.tolist()


@pytest.mark.parametrize("indices", [np.array([4, 1]), np.arange(8) % 2 == 0])
def test_a_subset_has_the_identity_and_columns_of_its_items(samples, indices):
    part, rows = samples.subset(indices), np.arange(len(samples))[indices]
    assert torch.equal(part.x(), samples.x(rows))
    assert part.sample.tolist() == samples.sample[rows].tolist()
    assert part.columns["age"].tolist() == (part.sample * 10).tolist()
    assert list(part.names) == [f"x[{row}]" for row in part.sample]


def test_samples_can_be_pickled_for_worker_processes(samples):
    assert torch.equal(pickle.loads(pickle.dumps(samples)).x(), samples.x())
