"""Which table of neighbours a batch sampler reads in which epoch."""

import copy

import pytest
import torch

from contrast.memory import Bank, HardNegatives, NeighbourTables
from tests.memory.model import saved_and_loaded


def new_tables(refresh="1 epochs", samples=12):
    return NeighbourTables(HardNegatives(Bank(samples, dim=4), neighbours=3, refresh=refresh))


def run_epoch(tables, seed):
    """Return the table of the miner after an epoch of random embeddings."""
    generator = torch.Generator().manual_seed(seed)
    for rows in torch.randperm(12, generator=generator).split(4):
        tables.update(torch.randn(4, 4, generator=generator), sample=rows)
    tables.end_epoch()
    return tables.miner.table.clone()


def test_a_table_is_used_from_the_epoch_after_the_one_that_found_it():
    tables = new_tables()
    first, second, third = (run_epoch(tables, seed) for seed in range(3))
    assert not torch.equal(first, second)
    assert tables.known_before(0) is None
    assert torch.equal(tables.known_before(3), third)
    assert torch.equal(tables.known_before(2), second)
    assert tables.known_before(1) is None, "two are stored: for the epoch that is read now and for the next one"


def test_the_older_table_is_used_until_a_refresh_in_several_epochs():
    tables = new_tables("2 epochs")
    assert not (run_epoch(tables, 0) >= 0).any()
    found = run_epoch(tables, 1)
    run_epoch(tables, 2)
    assert torch.equal(tables.known_before(2), found)
    assert tables.known_before(1) is None


def test_a_refresh_in_steps_waits_for_the_end_of_the_epoch():
    tables = new_tables("4 steps")
    run_epoch(tables, 0)
    assert tables.known_before(9) is None, "three updates so far"
    found = run_epoch(tables, 1)
    assert torch.equal(tables.known_before(2), found)


def test_it_gives_no_candidates_and_stores_in_the_bank():
    tables = new_tables()
    assert tables.stores() == [tables.miner.bank]
    run_epoch(tables, 0)
    assert (tables.miner.bank.age >= 0).all()


@pytest.mark.parametrize("epochs", range(4))
def test_a_checkpoint_contains_both_tables(epochs):
    uninterrupted, resumed = new_tables(), new_tables()
    for epoch in range(epochs):
        run_epoch(uninterrupted, epoch)
    resumed.load_state_dict(saved_and_loaded(copy.deepcopy(uninterrupted.state_dict())))
    for tables in (uninterrupted, resumed):
        run_epoch(tables, epochs)
    for epoch in range(epochs + 3):
        expected, actual = uninterrupted.known_before(epoch), resumed.known_before(epoch)
        assert (expected is None) == (actual is None)
        assert expected is None or torch.equal(expected, actual)
