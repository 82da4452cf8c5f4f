import copy

import torch

from contrast.memory import Bank, HardNegatives, NeighbourTables


def tables(refresh="1 epochs", samples=12):
    return NeighbourTables(HardNegatives(Bank(samples, dim=4), neighbours=3, refresh=refresh))


def epoch_of(made, seed):
    generator = torch.Generator().manual_seed(seed)
    for rows in torch.randperm(12, generator=generator).split(4):
        for store in made.stores():
            store.update(torch.randn(4, 4, generator=generator), sample=rows)
    made.end_epoch()
    return made.miner.table.clone()


def test_a_table_is_known_from_the_epoch_after_the_one_that_found_it():
    made = tables()
    first, second, third = (epoch_of(made, seed) for seed in range(3))
    assert not torch.equal(first, second)
    assert made.known_before(0) is None
    assert torch.equal(made.known_before(3), third)
    assert torch.equal(made.known_before(2), second)
    assert made.known_before(1) is None, "two are kept: what an epoch reads that is still going on, and the next"


def test_a_refresh_in_several_epochs_keeps_the_older_table_until_then():
    made = tables("2 epochs")
    assert not (epoch_of(made, 0) >= 0).any()
    found = epoch_of(made, 1)
    epoch_of(made, 2)
    assert torch.equal(made.known_before(2), found)
    assert made.known_before(1) is None


def test_a_refresh_in_steps_waits_for_the_end_of_the_epoch():
    made = tables("4 steps")
    epoch_of(made, 0)
    assert made.known_before(9) is None, "three updates so far"
    found = epoch_of(made, 1)
    assert torch.equal(made.known_before(2), found)


def test_it_gives_no_candidates_and_remembers_in_the_bank():
    made = tables()
    assert made.stores() == [made.miner.bank]
    epoch_of(made, 0)
    assert (made.miner.bank.age >= 0).all()


def test_a_checkpoint_has_both_tables(tmp_path):
    whole = tables()
    epoch_of(whole, 0)
    epoch_of(whole, 1)
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    resumed = tables()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    unbroken = copy.deepcopy(whole)
    for made in (unbroken, resumed):
        epoch_of(made, 2)
    for epoch in range(5):
        one, other = unbroken.known_before(epoch), resumed.known_before(epoch)
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
