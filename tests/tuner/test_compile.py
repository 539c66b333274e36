"""What the behaviour tests leave out: torch.compile with Inductor, and exported programs in another process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn

from lrlora import LrLoraConfig

from ..conftest import TinyModel
from ..processes import run


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


LOAD = """
import sys, torch, lrlora
x, expected = torch.load(sys.argv[1])
torch.testing.assert_close(torch.export.load(sys.argv[2]).module()(x), expected)
"""


def test_an_exported_program_runs_where_lrlora_is_imported(tmp_path: Path) -> None:
    config = LrLoraConfig(r=2, target_modules=["0"], init_weights=False, num_basis=13)
    model, x = get_peft_model(nn.Sequential(nn.Linear(16, 16)), config).eval(), torch.randn(3, 16)
    torch.save((x, model(x).detach()), tmp_path / "expected.pt")
    torch.export.save(torch.export.export(model, (x,), strict=False), tmp_path / "program.pt2")
    run(LOAD, tmp_path / "expected.pt", tmp_path / "program.pt2")
