"""What is particular to Triton's kernels, in its interpreter."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch

from ..conftest import relative
from ..processes import run
from .test_fused_linear import GAIN, SCALING, assert_agrees, formula, fused, gradients, make_case


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("triton")
    monkeypatch.setenv("LRLORA_KERNELS", "triton")
    return importlib.import_module("lrlora.ops.gpu")


TF32 = """
import torch
from torch.backends.cuda import matmul
from lrlora.ops.gpu import _precision
assert _precision() == "ieee"
matmul.fp32_precision = "tf32"  # as transformers does for TrainingArguments(tf32=True); allow_tf32 then raises
assert _precision() == "tf32"
"""


def test_tf32_by_the_newer_setting() -> None:
    run(TF32)


@pytest.mark.parametrize("transposed", [True, False])
def test_more_tokens_than_a_tile_takes_at_a_time(transposed: bool) -> None:
    assert_agrees(
        make_case(dtype=torch.float32, shape=(130, 70), batch=(3, 25), transposed=transposed), y=1e-6, gradient=1e-4
    )


def test_a_layer_walked_over_in_strips(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(dtype=torch.float32, shape=(40, 300))
    expected = gradients(fused(case), case)
    monkeypatch.setattr(gpu, "_SHARES", 8 * 40 * 3 * 2)  # two blocks of columns at a time, of five
    for got, want in zip(gradients(fused(case), case), expected, strict=True):
        assert relative(got, want) <= 1e-6


def test_gradients_of_half_precision_activations() -> None:
    # Float16 alone: of bfloat16 the interpreter multiplies the integers that hold its bits.
    case = make_case(dtype=torch.float32, shape=(40, 70), bias=False)
    case = case._replace(x=case.x.detach().half().requires_grad_(), weight=torch.zeros(40, 70))
    y = case.transfer.linear(case.x, case.A, case.B, scaling=SCALING, gain=GAIN)
    # No gradient of the weight's size is rounded on the way: only what comes in is.
    grad_y = case.grad_y.half()
    actual = torch.autograd.grad(y, case.trainable()[1:], grad_y)
    expected = torch.autograd.grad(formula(case), case.trainable()[1:], grad_y.double())
    for got, want in zip(actual, expected, strict=True):
        assert relative(got, want) <= 1e-4
