"""What is particular to Triton's kernels, in its interpreter."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

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


class Changed:
    """A kernel whose results are changed after its launch, by its arguments."""

    def __init__(self, kernel: Any, change: Callable[..., None]) -> None:
        self.kernel, self.change, self.launched = kernel, change, 0

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self.launched += 1
            self.kernel[grid](*arguments, **options)
            self.change(*arguments)

        return launch


def _raise(*arguments: Any) -> None:
    raise RuntimeError("out of resource: shared memory")


WRONG: dict[str, tuple[str, Callable[..., Any]]] = {
    "a weight that is off by a twentieth": ("_weight_kernel", lambda out, *others: out.mul_(1.05)),
    "a gradient of A with the other sign": ("_gradient_kernel", lambda of_A, *others: of_A.neg_()),
    "moments of φ that are not finite": (
        "_gradient_kernel",
        lambda of_A, of_B, of_phi, *others: of_phi.fill_(math.nan),
    ),
    "a kernel that cannot be launched": ("_gradient_kernel", _raise),
}


@pytest.fixture
def untested(gpu: ModuleType) -> Iterator[None]:
    def forget() -> None:
        gpu.is_sound.cache_clear()
        gpu._FAILED.clear()

    forget()
    yield
    forget()


@pytest.mark.parametrize("way", WRONG)
@pytest.mark.usefixtures("untested")
def test_wrong_kernels_are_found_before_their_first_use(
    way: str, gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, change = WRONG[way]
    changed = Changed(getattr(gpu, name), change)
    monkeypatch.setattr(gpu, name, changed)
    with pytest.warns(UserWarning, match="Triton") as caught:
        assert_agrees(make_case(dtype=torch.float32), y=1e-6, gradient=1e-4)
    assert len([warning for warning in caught if "Triton" in str(warning.message)]) == 1
    launched = changed.launched
    assert_agrees(make_case(dtype=torch.float32), y=1e-6, gradient=1e-4)
    assert changed.launched == launched


@pytest.mark.parametrize("name", ["_weight_kernel", "_gradient_kernel"])
@pytest.mark.usefixtures("untested")
def test_a_kernel_that_fails_later_hands_over_to_pytorch(
    name: str, gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(dtype=torch.float32)
    assert_agrees(case, y=1e-6, gradient=1e-4)  # passes the self-test
    monkeypatch.setattr(gpu, name, Changed(getattr(gpu, name), _raise))
    function = "write_weight" if name == "_weight_kernel" else "product_gradients"
    with pytest.warns(UserWarning, match=function) as caught:
        assert_agrees(case, y=1e-6, gradient=1e-4)
    assert_agrees(case, y=1e-6, gradient=1e-4)
    assert len([w for w in caught if "Triton" in str(w.message)]) == 1
