"""The plan's table of kept tensors for our kernels, beside what autograd keeps of them."""

import pytest

from kernels import choice
from pretrain.plan_activations import Kept, activations
from tests.pretrain.test_plan_activations import TRITON, kept_by_autograd, micro_batch


@pytest.mark.parametrize("dtype, dropout", [("fp32", "none"), ("bf16", "hidden")])
def test_the_table_is_what_autograd_keeps(dtype, dropout):
    model, arguments, size = micro_batch((256, 64, 2, 1, 96, 2, 32), dtype, dropout)
    planned = activations(model.config, dtype, Kept(TRITON), **size).kept
    with choice.using(**TRITON):
        assert planned == pytest.approx(kept_by_autograd(model, arguments), rel=0.03)
