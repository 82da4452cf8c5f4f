"""No loss waits for its device: on meta tensors, which have no values, reading a value raises an error."""

import pytest
import torch
from torch.utils._pytree import tree_map_only

from contrast.losses import InfoNCE
from tests.losses.cases import CASES


def on_meta(given):
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("meta"), given)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_reads_no_number_from_the_device(case, labelled):
    views, given = case.inputs(samples=6)
    if labelled and case.pairs:
        given["group"] = torch.tensor([0, 1, -1, 0, 2, 1])
    views = [z.requires_grad_() for z in on_meta(list(views))]
    case.make().double().to("meta")(*views, **on_meta(given)).backward()
    assert any(z.grad is not None and z.grad.is_meta for z in views)


def test_reading_a_number_raises_on_meta_tensors():
    class Reads(InfoNCE):
        def per_anchor(self, pairs):
            return pairs.mean("positive") * float(pairs.count("negative").max())

    with pytest.raises(RuntimeError, match="meta"):
        Reads()(*torch.randn(2, 4, 3, device="meta"))
