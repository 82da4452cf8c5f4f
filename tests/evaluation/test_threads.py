import pytest
import torch

from contrast.evaluation.threads import SMALL, threads_for


@pytest.fixture
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize(("multiplications", "threads"), [(1, 1), (SMALL, 2)])
def test_only_large_work_uses_all_threads_and_their_number_is_restored_after_an_error(multiplications, threads):
    with pytest.raises(RuntimeError, match=f"{threads} threads"), threads_for(multiplications):
        raise RuntimeError(f"{torch.get_num_threads()} threads")
    assert torch.get_num_threads() == 2
