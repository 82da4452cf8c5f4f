"""Embeddings: normalisation, slicing, concatenation, and errors."""

import math

import pytest
import torch

from contrast.core.embeddings import REMEMBERED, Embeddings, concatenate, gather_all, normalise, unknown_samples


def embeddings(count=4, dims=3, heads=None, start=0, reference=False):
    generator = torch.Generator().manual_seed(count + start)
    shape = (count, dims) if heads is None else (heads, count, dims)
    index = torch.arange(start, start + count)
    return Embeddings(
        torch.randn(shape, generator=generator, dtype=torch.float64),
        index,
        index + 10,
        index + 20,
        torch.randn(count, 2, generator=generator) if reference else None,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_normalised_rows_have_unit_length_in_float32_or_better(dtype):
    z = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    unit = normalise(z)
    assert unit.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for row, original in zip(unit.tolist(), z.tolist(), strict=True):
        length = math.sqrt(math.fsum(value * value for value in original))
        assert row == pytest.approx(
            [value / length for value in original], rel=3e-7 if dtype != torch.float64 else 1e-15
        )


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_huge_and_tiny_rows_have_unit_length_and_a_finite_gradient(size):
    z = (torch.tensor([[3.0, 4.0], [-1.0, 0.0]]) * size).requires_grad_()
    unit = normalise(z)
    torch.testing.assert_close(unit, torch.tensor([[0.6, 0.8], [-1.0, 0.0]]))
    (gradient,) = torch.autograd.grad((unit * torch.tensor([[1.0, 0.0], [0.0, 1.0]])).sum(), z)
    # (g - (g . u) u) / |z|, by hand.
    torch.testing.assert_close(gradient * size, torch.tensor([[0.64 / 5, -0.48 / 5], [0.0, 1.0]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_zero_row_stays_zero_with_zero_gradient(dtype):
    z = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=dtype, requires_grad=True)
    unit = normalise(z)
    assert unit[0].tolist() == [0, 0]
    (gradient,) = torch.autograd.grad(unit[:, 0].sum(), z)
    assert gradient[0].tolist() == [0, 0]
    assert gradient[1].abs().sum() > 0


def test_nan_stays_nan_and_changes_no_other_row():
    unit = normalise(torch.tensor([[float("nan"), 1.0], [0.0, 2.0]]))
    assert unit[0].isnan().all()
    assert unit[1].tolist() == [0, 1]


def test_the_gradient_of_normalise_is_its_derivative():
    z = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(normalise, z)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (3, 0)])
def test_empty_tensors_can_be_normalised(shape):
    assert normalise(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("index", [slice(1, 3), torch.tensor([2, 0]), torch.tensor([False, True, True, False])])
@pytest.mark.parametrize("heads", [None, 2])
def test_slicing_applies_to_z_and_identity(index, heads):
    full = embeddings(heads=heads, reference=True)
    part = full[index]
    positions = torch.arange(4)[index].tolist()
    assert len(part) == 2
    for i, original in enumerate(positions):
        assert torch.equal(part.z[..., i, :], full.z[..., original, :])
        assert torch.equal(part.reference[i], full.reference[original])
        assert [part.sample[i], part.group[i], part.view[i]] == [original, original + 10, original + 20]


@pytest.mark.parametrize("heads", [None, 2])
def test_concatenate_preserves_the_order(heads):
    parts = [
        embeddings(3, heads=heads, start=0),
        embeddings(0, heads=heads, start=7),
        embeddings(2, heads=heads, start=5),
    ]
    full = concatenate(parts)
    assert full.sample.tolist() == [0, 1, 2, 5, 6]
    assert full.view.tolist() == [20, 21, 22, 25, 26]
    assert torch.equal(full.z[..., 3:, :], parts[2].z)


def test_concatenate_has_references_only_if_all_parts_have():
    assert len(concatenate([embeddings(reference=True), embeddings(2, reference=True)]).reference) == 6
    assert concatenate([embeddings(reference=True), embeddings(2)]).reference is None


def test_detach_removes_the_history_only():
    z = torch.ones(2, 3, requires_grad=True)
    index = torch.arange(2)
    detached = Embeddings(z, index, index, index).detach()
    assert not detached.z.requires_grad
    assert detached.sample is index


def test_without_processes_gathering_gives_the_same_embeddings():
    own = embeddings()
    assert own.gathered() is own
    assert gather_all([own, own]) == [own, own]
    assert gather_all([]) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(4)}, r"embeddings are \(N, D\), or \(H, N, D\) for H heads; got the shape \(4,\)"),
        ({"z": torch.zeros(1, 2, 4, 3)}, r"got the shape \(1, 2, 4, 3\)"),
        ({"sample": torch.arange(3)}, r"sample must be \(4,\) whole numbers"),
        ({"group": torch.zeros(4)}, r"group must be \(4,\) whole numbers.*torch.float32"),
        ({"view": torch.zeros(4, 1, dtype=torch.int64)}, r"view must be \(4,\) whole numbers.*\(4, 1\)"),
        ({"reference": torch.zeros(3, 2)}, r"reference must be \(4, R\); got the shape \(3, 2\)"),
        ({"reference": torch.zeros(4)}, r"reference must be \(4, R\)"),
    ],
)
def test_lengths_that_differ_raise(change, message):
    index = torch.arange(4)
    fields = {"z": torch.zeros(4, 3), "sample": index, "group": index, "view": index, **change}
    with pytest.raises(ValueError, match=message):
        Embeddings(**fields)


def test_unknown_samples_are_negative_and_unique():
    calls = torch.cat([unknown_samples(5, torch.device("cpu")) for _ in range(3)])
    assert (calls < 0).all()
    assert (calls != REMEMBERED).sum() >= 14
    assert len(set(calls.tolist())) == 15
