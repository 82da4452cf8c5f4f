"""What every memory can do: its state in a checkpoint, and its tensors under casts and moves."""

import copy
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn

from contrast.core.embeddings import REMEMBERED, Embeddings, normalise
from contrast.losses import InfoNCE
from contrast.memory import MEMORIES, Memory, NearestPositives, Queue
from tests.memory.model import DIM, anchor, rows_of, saved_and_loaded
from tests.memory.plugin import RunningMeans

SAMPLES = 12
ARGUMENTS = {"queue": {"size": 9}, "hard_negatives": {"bank": "bank"}, "nearest_positives": {"store": "bank"}}


def new_memory(name):
    part = {"name": name, **ARGUMENTS.get(name, {})}
    return MEMORIES.build(part, samples=SAMPLES, dim=DIM, means=4, neighbours=3)


class Model(nn.Module):
    """An encoder with a memory, trained as in a user's own loop."""

    def __init__(self, memory):
        super().__init__()
        self.encoder, self.memory = nn.Linear(DIM, DIM), memory
        self.optimizer = torch.optim.SGD(self.encoder.parameters(), lr=0.5, momentum=0.9)

    def train_steps(self, steps):
        """Return the value of every step; an epoch has three."""
        values = []
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(2, 4, DIM, generator=generator)
            index = torch.randperm(SAMPLES, generator=generator)[:4]
            z_a, z_b = self.encoder(x).unbind()
            own = Embeddings(normalise(z_b.detach()), index, index, torch.ones_like(index))
            replaced = self.memory.positives(own)
            views = (z_a, z_b) if replaced is None else (z_a, replaced.z)
            loss = InfoNCE(0.2)(*views, sample=index, extra=[self.memory])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.memory.update(own)
            if step % 3 == 2:
                self.memory.end_epoch()
            values.append(loss.item())
        return values


@pytest.mark.parametrize("name", MEMORIES)
@pytest.mark.parametrize("interrupted_at", [0, 1, 5, 7])
def test_a_resumed_run_equals_one_without_interruption_bit_for_bit(name, interrupted_at):
    torch.manual_seed(0)
    uninterrupted = Model(new_memory(name))
    start = copy.deepcopy(uninterrupted.state_dict())
    expected = uninterrupted.train_steps(range(12))
    interrupted, resumed = Model(new_memory(name)), Model(new_memory(name))
    interrupted.load_state_dict(start)
    interrupted.train_steps(range(interrupted_at))
    resumed.load_state_dict(saved_and_loaded(interrupted.state_dict()))
    resumed.optimizer.load_state_dict(saved_and_loaded(interrupted.optimizer.state_dict()))
    assert resumed.train_steps(range(interrupted_at, 12)) == expected[interrupted_at:]
    assert_same_state(resumed.state_dict(), uninterrupted.state_dict())


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, dict):
            assert_same_state(value, other[key])
        else:
            assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key], key


def test_a_run_that_resumes_with_an_empty_memory_differs():
    """Otherwise the test above would pass with a state that is lost."""
    torch.manual_seed(0)
    model = Model(new_memory("running_means"))
    state, memory = copy.deepcopy(model.state_dict()), new_memory("running_means")
    values = model.train_steps(range(3))
    forgetful = Model(memory)
    forgetful.load_state_dict(state)
    forgetful.train_steps(range(2))
    forgetful.memory = new_memory("running_means")
    assert forgetful.train_steps([2]) != values[2:]


@pytest.mark.parametrize("name", MEMORIES)
def test_the_state_is_a_copy_of_plain_values(name):
    memory = new_memory(name)
    state = memory.state_dict()
    for inner in state.values():
        assert inner.keys() == {"counters", "fixed", "tensors"}
    before = copy.deepcopy(state)
    memory.update(rows_of([0, 1], 1))
    if name not in ("bank", "hard_negatives", "nearest_positives"):  # whose bank may be too large to copy
        assert_same_state(state, before)


class Other(RunningMeans):
    """The same memory with a counter more."""

    counters = ("steps",)
    steps = 0


class OtherType(RunningMeans):
    """The same memory with means in float64."""

    def __init__(self, means, dim):
        super().__init__(means, dim)
        self.tensors["mean"] = self.tensors["mean"].double()


class OtherTensor(RunningMeans):
    """The same memory with a tensor more."""

    def __init__(self, means, dim):
        super().__init__(means, dim)
        self.tensors["variance"] = torch.ones(means)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: RunningMeans(4, DIM, momentum=0.9),
            "RunningMeans has momentum 0.9 and the checkpoint's has 0.5; make",
        ),
        (
            lambda: RunningMeans(5, DIM),
            r"has mean torch.float32 of shape \(5, 3\) and the .* \(4, 3\); make",
        ),
        (lambda: OtherType(4, DIM), r"has mean torch.float64 of shape \(4, 3\) and the checkpoint's has torch.float32"),
        (
            lambda: OtherTensor(4, DIM),
            r"has variance torch.float32 of shape \(4,\) and the checkpoint's has none",
        ),
        (lambda: Other(4, DIM), r"has counters \['updates', 'rows', 'last', 'steps'\] and the checkpoint's has"),
        (lambda: Queue(4, DIM), "this Queue has dim 3 and the checkpoint's has None"),
    ],
)
def test_a_checkpoint_of_a_memory_made_with_other_arguments_is_refused_and_changes_nothing(make, message):
    saved = new_memory("running_means")
    saved.update(rows_of([1, 2], 0))
    memory = make()
    before = copy.deepcopy(memory.state_dict())
    with pytest.raises(ValueError, match=message) as caught:
        memory.load_state_dict(saved_and_loaded(saved.state_dict()))
    assert "\n" not in str(caught.value)
    assert_same_state(memory.state_dict(), before)


class Growing(Memory):
    """A memory that stores the embeddings of all steps."""

    def __init__(self, dim):
        super().__init__()
        self.tensors["z"] = torch.zeros(0, dim)


def test_a_tensor_without_rows_takes_those_of_the_checkpoint():
    saved, memory = Growing(DIM), Growing(DIM)
    saved.tensors["z"] = torch.randn(5, DIM)
    memory.load_state_dict(saved_and_loaded(saved.state_dict()))
    assert torch.equal(memory.tensors["z"], saved.tensors["z"])
    for other in (torch.zeros(0, DIM + 1), torch.zeros(0, DIM, 1), torch.zeros(0), torch.zeros(0, DIM).double()):
        memory.tensors["z"] = other
        with pytest.raises(ValueError, match=r"has z .* and the checkpoint's has torch.float32 of shape \(5, 3\)"):
            memory.load_state_dict(saved.state_dict())


def test_the_state_of_an_earlier_version_is_refused():
    with pytest.raises(ValueError, match="this Queue has dim 3 and the checkpoint's has None; make it with the same"):
        Queue(4, DIM).set_extra_state({"size": 4, "width": (3, None, None), "position": 0, "updates": 0})


def test_a_checkpoint_is_restored_on_the_device_of_the_memory():
    saved = new_memory("running_means")
    saved.update(rows_of([1, 2], 0))
    memory = new_memory("running_means").to("meta")
    memory.load_state_dict(saved.state_dict())
    assert {tensor.device.type for tensor in memory.tensors.values()} == {"meta"}
    assert memory.tensors.keys() == {"mean", "counts"}


@pytest.mark.parametrize("value", [np.int64(3), {1, 2}, [np.float32(1.0)], {"a": object()}])
def test_a_counter_that_could_not_be_read_back_is_refused_when_saving(value):
    memory = RunningMeans(4, DIM)
    memory.__dict__["rows"] = value
    with pytest.raises(TypeError, match=r"RunningMeans\.rows, which a checkpoint is to contain, must consist of num"):
        memory.state_dict()


def test_a_tensor_that_no_checkpoint_would_contain_is_refused():
    memory = Memory()
    z, index = torch.zeros(3, DIM), torch.arange(3)
    for value in (
        z,
        {"z": z},
        {z: 1},
        [(z, 1)],
        deque([z]),
        {z},
        frozenset([z]),
        np.zeros(3),
        [np.zeros(3)],
        Embeddings(z, index, index, index),
        {"found": [Embeddings(z, index, index, index)]},
        [Queue(4, DIM)],
        {"network": nn.Linear(DIM, DIM)},
    ):
        for name in ("z", "_z"):
            with pytest.raises(
                TypeError, match=rf"\.{name} contains a tensor, .* write self.tensors\['{name}'\]"
            ) as caught:
                setattr(memory, name, value)
            assert "\n" not in str(caught.value)
            assert not hasattr(memory, name)
    memory.history = []
    memory.history.append(torch.zeros(3))
    with pytest.raises(TypeError, match=r"Memory\.history contains a tensor"):
        memory.state_dict()
    memory.history.clear()
    memory.networks, memory.part, memory.type = nn.ModuleList([nn.Linear(DIM, 1)]), Memory(), Embeddings
    assert "networks.0.weight" in memory.state_dict()
    del memory.networks, memory.part, memory.type
    memory.weight = nn.Parameter(torch.zeros(3))
    memory.register_buffer("share", torch.zeros(()), persistent=False)
    memory.share = torch.ones(())
    assert memory.share == 1
    assert memory.state_dict().keys() == {"weight", "_extra_state"}


@pytest.mark.parametrize("name", MEMORIES)
def test_its_tensors_are_no_buffers_and_move_without_being_cast(name):
    memory = new_memory(name)
    types = {key: tensor.dtype for key, tensor in memory.tensors.items()}
    assert not list(memory.buffers()) and not list(memory.parameters())
    moved = memory.half().to("meta", torch.float64)
    for part in moved.modules():
        if isinstance(part, Memory):
            assert {tensor.device.type for tensor in part.tensors.values()} <= {"meta"}
    assert {key: tensor.dtype for key, tensor in moved.tensors.items()} == types


def test_a_memory_without_its_own_update_raises_an_error():
    with pytest.raises(NotImplementedError, match=r"Memory stores nothing: define update\(\), or stores\(\)"):
        Memory().update(torch.randn(2, DIM), sample=torch.arange(2))


def test_the_defaults_give_nothing():
    memory, rows = Memory(), anchor([1, 2])
    assert len(memory.candidates(rows)) == 0
    assert memory.positives(rows) is None
    assert memory.metrics == {}
    assert isinstance(NearestPositives(Queue(4, DIM)).candidates(rows), Embeddings)
    assert Queue(4, DIM).candidates(rows).view.tolist() == [] and REMEMBERED == -1
