"""torch.compile with Inductor, the backend that users have. The behaviour tests stop at tracing, which is fast."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from lrlora import LrLoraConfig

from ..conftest import TinyModel


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_inductor_trains_and_infers_as_eager_does(tiny: TinyModel, dynamic: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(1)
    model = get_peft_model(tiny.build(), LrLoraConfig(r=4, **tiny.targets)).eval()
    tiny.train(model, 3)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(tiny.logits(compiled), tiny.logits(model), rtol=1e-4, atol=1e-5)
    trainable = [p for p in model.parameters() if p.requires_grad]
    pairs = zip(*(torch.autograd.grad(tiny.loss(each), trainable) for each in (compiled, model)), strict=True)
    for actual, expected in pairs:
        assert (actual - expected).norm() <= 1e-3 * expected.norm()
