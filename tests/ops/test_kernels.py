"""All kernels against the formula in float64; Triton's in its interpreter."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch
from torch import Tensor

from lrlora.ops import cpu
from lrlora.ops.phi import TransferSpec
from lrlora.ops.phi_forms import FORMS
from lrlora.ops.reference import reference_delta_weight
from lrlora.ops.transfer import Transfer

from ..conftest import relative
from .test_fused_linear import GAIN, SCALING, Case, assert_agrees, formula, fused, gradients, make_case

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    HAS_COMPILER = cpu._library() is not None
HAS_TRITON = importlib.util.find_spec("triton") is not None
PATHS = [
    pytest.param("native", marks=pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")),
    pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="no Triton")),
    "0",
]


@pytest.fixture(params=PATHS, ids=lambda value: {"0": "blocks"}.get(value, value), autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("LRLORA_KERNELS", request.param)
    return request.param


def update_error(case: Case) -> float:
    delta = case.transfer.delta(case.A, case.B, scaling=SCALING, gain=GAIN)
    return relative(delta, reference_delta_weight(*case[3:6], scaling=SCALING, input_gain=GAIN))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("shape", "num_basis"), [((300, 700), 50), ((5, 3), 2), ((5, 3), 8), ((5, 3), 50), ((1, 257), 50)]
)
def test_float32_against_the_formula(form: str, num_basis: int, shape: tuple[int, int], path: str) -> None:
    # The interpreter takes as long for each block of 64 × 64: here, 2 × 4 of them, the last ones smaller.
    rows, columns = (100, 200) if path == "triton" and shape[0] > 100 else shape
    case = make_case(form, num_basis, dtype=torch.float32, shape=(max(rows, 3), columns))
    assert_agrees(case, y=1e-6, gradient=1e-4)
    assert update_error(case) <= 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_unit_input_against_the_formula(form: str, size: float) -> None:
    case = make_case(form, 8, dtype=torch.float32, bias=False)
    case.B.data.mul_(size)
    case = case._replace(weight=torch.zeros_like(case.weight))
    y, expected = fused(case, gain=None), formula(case, gain=None)
    assert relative(y, expected) <= 1e-5
    for got, want in zip(gradients(y, case), gradients(expected, case), strict=True):
        assert relative(got, want) <= 1e-4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("with_weight", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_against_the_formula(
    dtype: torch.dtype, with_weight: bool, transposed: bool, form: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the integers that hold the bits of bfloat16")
    tolerance = torch.finfo(dtype).eps  # weights and sums are rounded to half of it each
    monkeypatch.setattr(cpu, "_CONVERTED_ENTRIES", 500)  # several blocks of rows, the last one smaller
    case = make_case(form, dtype=torch.float32, transposed=transposed)
    x = case.x.detach().to(dtype).requires_grad_()
    half = case._replace(x=x, weight=case.weight.to(dtype), bias=None, grad_y=case.grad_y.to(dtype))
    half = half if with_weight else half._replace(weight=None)
    y = fused(half)
    exact = formula(half if with_weight else half._replace(weight=torch.zeros_like(case.weight)))
    assert y.dtype == dtype
    assert relative(y, exact) <= tolerance
    for got, expected in zip(gradients(y, half), gradients(exact, half), strict=True):
        assert relative(got, expected) <= tolerance


@pytest.mark.parametrize("transposed", [True, False])
def test_every_element_is_written(transposed: bool) -> None:
    case = make_case(dtype=torch.float32, shape=(65, 130), transposed=transposed)
    expected = [fused(case), *gradients(fused(case), case)]
    torch.use_deterministic_algorithms(True)  # memory that PyTorch does not initialise is then full of NaN
    try:
        assert torch.empty(1).isnan()
        actual = [fused(case), *gradients(fused(case), case)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1e-4, 30.0])
def test_every_scale_of_the_entries(form: str, scale: float) -> None:
    case = make_case(form, dtype=torch.float32)
    case = case._replace(B=case.B * (scale / (GAIN * (case.B @ case.A).abs().max().item())), transfer=case.transfer)
    assert update_error(case) <= 1e-5


@pytest.mark.parametrize("transposed", [True, False])
def test_thread_count_changes_rounding_only_and_repeats_are_equal(transposed: bool) -> None:
    case = make_case(dtype=torch.float32, shape=(64, 48), transposed=transposed)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            results.append([fused(case), *gradients(fused(case), case)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(results[1], results[2], strict=True))
    for other in (results[0], results[3]):
        for got, expected in zip(other, results[1], strict=True):
            assert relative(got, expected) <= 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_delta_is_differentiable(form: str) -> None:
    case = make_case(form, dtype=torch.float32)
    trainable = case.trainable()[1:]
    weight = torch.randn(37, 53)

    def loss(delta: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((delta * weight).sum(), trainable))

    actual = loss(case.transfer.delta(case.A, case.B, scaling=SCALING, gain=GAIN))
    expected = loss(reference_delta_weight(*case[3:6], scaling=SCALING, input_gain=GAIN))
    for got, want in zip(actual, expected, strict=True):
        assert relative(got, want) <= 1e-4


@pytest.mark.parametrize(("dtype", "update", "gradient"), [(torch.float32, 1e-5, 1e-4), (torch.float64, 1e-9, 1e-6)])
@pytest.mark.parametrize("largest", [2.0, 40.0, 1000.0])
@pytest.mark.parametrize("form", FORMS)
def test_tails_at_any_distance(form: str, largest: float, dtype: torch.dtype, update: float, gradient: float) -> None:
    """Within the smallest table, within several panels, and beyond the largest one."""
    case = make_case(form, dtype=dtype, shape=(64, 48))
    with torch.no_grad():
        case.B[:3] = 0  # else an end of the interval, which says nothing here
        case.B.mul_(largest / (GAIN * (case.B @ case.A).abs().max()))
    # Far out, where φ swings 50 radians in a unit, the rounding of z itself counts.
    rounding = largest * torch.finfo(dtype).eps * case.transfer.spec.phi_form.band_limit
    assert update_error(case) <= update + rounding
    for got, want in zip(gradients(fused(case), case), gradients(formula(case), case), strict=True):
        assert relative(got, want) <= gradient + rounding


@pytest.mark.parametrize("form", FORMS)
def test_the_slope_at_the_ends_of_the_interval_is_the_inner_one(form: str) -> None:
    transfer = Transfer(TransferSpec(form, 9, 3.3, 10.0))  # in float32, 3.3 is 504.00003 cells of 504
    with torch.no_grad():
        for parameter in transfer.parameters():
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    A, B = torch.tensor([[3.3, -3.3, 1.0]], requires_grad=True), torch.ones(2, 1)
    delta = transfer.delta(A, B, scaling=SCALING, gain=1.0)
    expected = reference_delta_weight(A, B, transfer, scaling=SCALING, input_gain=1.0)
    (got,), (want,) = (torch.autograd.grad(each.sum(), A) for each in (delta, expected))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_nan_is_passed_on(form: str) -> None:
    case = make_case(form, dtype=torch.float32)
    B = case.B.detach().clone()
    B[7, 1] = float("nan")
    delta = case.transfer.delta(case.A, B, scaling=SCALING, gain=GAIN)
    assert delta[7].isnan().all()
    assert delta[:7].isfinite().all()
    y = fused(case._replace(B=B))
    assert torch.equal(y.isnan(), (torch.arange(37) == 7).expand_as(y))


def test_trainable_base_weight_and_bias() -> None:
    case = make_case(dtype=torch.float32)
    inputs = [case.weight.requires_grad_(), case.bias.requires_grad_(), *case.trainable()]
    actual = torch.autograd.grad(fused(case), inputs, case.grad_y)
    expected = torch.autograd.grad(formula(case), inputs, case.grad_y.double())
    for got, want in zip(actual, expected, strict=True):
        assert relative(got, want) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torch_s_default_dtype_and_device_do_not_matter(dtype: torch.dtype) -> None:
    case = make_case(dtype=torch.float32)
    half = case._replace(x=case.x.detach().half().requires_grad_(), weight=case.weight.half(), bias=None)
    expected = [result for c in (case, half) for result in (fused(c), *gradients(fused(c), c))]
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            actual = [result for c in (case, half) for result in (fused(c), *gradients(fused(c), c))]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [True, False])
def test_the_start_leaves_every_bit(form: str, dtype: torch.dtype, transposed: bool) -> None:
    case = make_case(form, dtype=dtype, transposed=transposed)
    start = case._replace(B=torch.zeros(37, 3, dtype=dtype), transfer=Transfer(TransferSpec(form)))
    assert torch.equal(fused(start), torch.nn.functional.linear(case.x, case.weight, case.bias))


def test_an_unknown_choice_of_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRLORA_KERNELS", "1")
    with pytest.raises(ValueError, match=r"LRLORA_KERNELS .*native.*\b0, got '1'"):
        fused(make_case(dtype=torch.float32))
