import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from contrast.core.registry import InputError
from contrast.models.batch_norm import MaskedBatchNorm1d, SynchronisedBatchNorm, synchronise

# How many of six samples each of the two processes has.
SPLITS = [(3, 3), (5, 1), (6, 0)]


def inputs(case):
    generator = torch.Generator().manual_seed(7)
    shape = {"rows": (6, 4), "images": (6, 4, 3, 3)}.get(case, (6, 4, 5))
    x = 100 + 3 * torch.randn(shape, dtype=torch.float64, generator=generator)
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 4, 2, 0])[:, None] if case == "masked" else None
    return x, mask, torch.randn(shape, dtype=torch.float64, generator=generator)


def layer(kind):
    torch.manual_seed(0)
    norm = kind(4).double()
    norm.weight.data.uniform_(0.5, 2)
    norm.bias.data.uniform_(-1, 1)
    return norm


def run(norm, x, mask, direction):
    x = x.clone().requires_grad_()
    y = norm(x) if mask is None else norm(x, mask)
    if mask is not None:
        y = y * mask[:, None]
    (y * direction).sum().backward()
    return y.detach(), x.grad, norm


def process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {}
    for case in ("rows", "series", "images", "masked"):
        for split in SPLITS:
            x, mask, direction = inputs(case)
            own = slice(0, split[0]) if rank == 0 else slice(split[0], None)
            norm = layer(SynchronisedBatchNorm)
            y, gradient, norm = run(norm, x[own], None if mask is None else mask[own], direction[own])
            dist.all_reduce(norm.weight.grad)
            state = (norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.weight.grad)
            results[case, split] = (y, gradient, *state)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_result_of_one(tmp_path):
    """Value, gradient and running statistics, with unequal and empty local batches, with and without a mask."""
    mp.spawn(process, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    kinds = {"rows": nn.BatchNorm1d, "series": nn.BatchNorm1d, "images": nn.BatchNorm2d, "masked": MaskedBatchNorm1d}
    for (case, split), (y, gradient, *state) in first.items():
        x, mask, direction = inputs(case)
        expected, expected_gradient, norm = run(layer(kinds[case]), x, mask, direction)
        other = second[case, split]
        torch.testing.assert_close(torch.cat([y, other[0]]), expected)
        torch.testing.assert_close(torch.cat([gradient, other[1]]), expected_gradient)
        torch.testing.assert_close(
            state, [norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.weight.grad]
        )
        torch.testing.assert_close(list(other[2:]), state)


def test_masked_statistics_are_those_of_the_observed_steps():
    x, mask, _ = inputs("masked")
    norm = layer(MaskedBatchNorm1d)
    y = norm(x, mask)
    plain = layer(nn.BatchNorm1d)
    observed = x.transpose(1, 2)[mask]
    torch.testing.assert_close(y.transpose(1, 2)[mask], plain(observed))
    torch.testing.assert_close(norm.running_var, plain.running_var)
    torch.testing.assert_close(norm.running_mean, plain.running_mean)


def test_without_observed_steps_the_running_statistics_do_not_change():
    norm = MaskedBatchNorm1d(4)
    y = norm(torch.randn(2, 4, 3), torch.zeros(2, 3, dtype=torch.bool))
    assert y.isfinite().all()
    assert norm.running_mean.tolist() == [0.0] * 4
    assert norm.running_var.tolist() == [1.0] * 4


def test_a_plain_and_a_masked_call_share_one_backward_pass():
    """Two views are encoded one by one (SimSiam), and only one of them has padding."""
    x, mask, _ = inputs("masked")
    norm, separate = layer(MaskedBatchNorm1d), layer(MaskedBatchNorm1d)
    (norm(x) + norm(x, mask) * mask[:, None]).sum().backward()
    separate(x).sum().backward()
    (separate(x, mask) * mask[:, None]).sum().backward()
    torch.testing.assert_close(norm.weight.grad, separate.weight.grad)
    torch.testing.assert_close(norm.running_mean, separate.running_mean)


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("affine", [True, False])
def test_on_one_process_it_equals_pytorchs_batch_normalisation(momentum, affine):
    plain = nn.BatchNorm2d(4, momentum=momentum, affine=affine)
    converted = synchronise(nn.Sequential(nn.BatchNorm2d(4, momentum=momentum, affine=affine)))
    for _ in range(3):
        x = torch.randn(5, 4, 2, 2) * 2 + 1
        torch.testing.assert_close(converted(x), plain(x))
    torch.testing.assert_close(converted.eval()(x), plain.eval()(x))


def test_synchronising_does_not_change_parameters_names_and_activations():
    import timm

    torch.manual_seed(0)
    network = timm.create_model("test_efficientnet", num_classes=0)
    x = torch.randn(2, 3, 64, 64)
    expected = network.eval()(x)
    parameters = dict(network.named_parameters())
    keys = list(network.state_dict())
    converted = synchronise(network)
    torch.testing.assert_close(converted.eval()(x), expected)
    assert list(converted.state_dict()) == keys
    assert all(parameter is parameters[name] for name, parameter in converted.named_parameters())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in converted.modules())


def test_a_subclass_with_its_own_computation_is_refused():
    class Odd(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x) + 1

    with pytest.raises(InputError, match="Odd"):
        synchronise(nn.Sequential(Odd(3)))
