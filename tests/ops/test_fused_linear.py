"""The fused path against the formula in float64: values, gradients, memory, low precision."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lrlora import LrLoraConfig
from lrlora.ops.phi import TransferSpec
from lrlora.ops.phi_forms import FORMS
from lrlora.ops.reference import reference_delta_weight
from lrlora.ops.table import TransferTable
from lrlora.ops.transfer import Transfer

from ..conftest import relative

SCALING, GAIN = 2.0, 100.0


class Case(NamedTuple):
    """A layer with entries of g·BA well inside, at and outside ±I."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    transfer: Transfer
    grad_y: Tensor

    def trainable(self) -> list[Tensor]:
        return [self.x, self.A, self.B, *self.transfer.parameters()]


def make_case(
    form: str = "residual",
    num_basis: int = 50,
    *,
    dtype: torch.dtype = torch.float64,
    shape: tuple[int, int] = (37, 53),
    batch: tuple[int, ...] = (2, 5),
    bias: bool = True,
    transposed: bool = False,
) -> Case:
    torch.manual_seed(0)
    (m, n), r = shape, 3
    transfer = Transfer(TransferSpec(form, num_basis, 3.0, 10.0))
    with torch.no_grad():
        amplitudes, *shapes = transfer.parameters()
        amplitudes.normal_(0, 0.03)
        for (
            shape
        ) in shapes:  # ten times as large after the multiplier: bandwidths are then spread over their whole range
            shape.normal_(0, 0.3)
    A, B = torch.randn(r, n, dtype=dtype), torch.randn(m, r, dtype=dtype) * 0.012
    # One entry of g·BA exactly on each end of the interval, and one exactly 0.
    A[:, 0], B[0], B[1], B[2] = torch.tensor([1.0, 0, 0]), A.new_zeros(3), A.new_zeros(3), A.new_zeros(3)
    B[0, 0], B[1, 0] = 3.0 / GAIN, -3.0 / GAIN
    weight = torch.randn(n, m, dtype=dtype).T if transposed else torch.randn(m, n, dtype=dtype)
    return Case(
        x=torch.randn(*batch, n, dtype=dtype, requires_grad=True),
        weight=weight,
        bias=torch.randn(m, dtype=dtype) if bias else None,
        A=A.requires_grad_(),
        B=B.requires_grad_(),
        transfer=transfer,
        grad_y=torch.randn(*batch, m, dtype=dtype),
    )


def fused(case: Case, gain: float | None = GAIN) -> Tensor:
    return case.transfer.fused_linear(*case[:5], scaling=SCALING, gain=gain)


def formula(case: Case, gain: float | None = GAIN) -> Tensor:
    delta = reference_delta_weight(*case[3:6], scaling=SCALING, input_gain=gain)
    return F.linear(case.x.double(), case.weight.double() + delta, None if case.bias is None else case.bias.double())


def interpolated(case: Case) -> Tensor:
    """The formula with φ replaced by its interpolant, everything left to autograd."""
    transfer, z = case.transfer, GAIN * (case.B @ case.A)
    spec, learned = transfer.spec, transfer.learned
    table = TransferTable(spec, learned, torch.float64, z.abs().max().item())
    coefficients = table.interpolate(spec.series(table.points, learned))
    u = torch.where(z.abs() <= table.reach, z, table.reach * z.sign()) / table.spacing
    cell = u.detach().floor().clamp(max=table.cells_per_side - 1)
    psi = sum(coefficients[(cell + table.cells_per_side).long(), p] * (u - cell) ** p for p in range(6))
    if not spec.phi_form.is_clipped:
        psi = torch.where(z.abs() > table.reach, spec.series(z, learned), psi)
    phi = spec.phi_form.backbone * z + psi
    return F.linear(case.x, case.weight + (SCALING / GAIN) * phi, case.bias)


def gradients(output: Tensor, case: Case) -> list[Tensor]:
    return list(torch.autograd.grad(output, case.trainable(), case.grad_y.to(output.dtype)))


def assert_agrees(case: Case, *, y: float, gradient: float) -> None:
    output = fused(case)
    actual = gradients(output, case)
    for reference in (formula(case), interpolated(case)) if case.x.dtype == torch.float64 else (formula(case),):
        assert relative(output, reference) <= y
        for got, expected in zip(actual, gradients(reference, case), strict=True):
            assert relative(got, expected) <= gradient


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_basis", [2, 8, 50])
@pytest.mark.parametrize(("dtype", "y", "gradient"), [(torch.float64, 1e-9, 1e-6), (torch.float32, 1e-6, 1e-4)])
def test_values_and_gradients(form: str, num_basis: int, dtype: torch.dtype, y: float, gradient: float) -> None:
    case = make_case(form, num_basis, dtype=dtype)
    inside = (GAIN * (case.B @ case.A)).abs()
    assert (inside < 3).any()
    assert (inside > 6).any()
    assert_agrees(case, y=y, gradient=gradient)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(3, 129), (129, 4), (31, 31)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_odd_shapes_layouts_and_bias(form: str, shape: tuple[int, int], bias: bool, transposed: bool) -> None:
    case = make_case(form, shape=shape, bias=bias, transposed=transposed, batch=(7,))
    assert_agrees(case, y=1e-9, gradient=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_against_finite_differences(form: str) -> None:
    case = make_case(form, 8, shape=(4, 5), batch=(3,))
    case.B.data += 0.001  # gradcheck cannot stand on the kinks at ±I

    def run(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return fused(case._replace(x=x, A=A, B=B))

    assert torch.autograd.gradcheck(run, (case.x, case.A, case.B), eps=1e-7, atol=1e-4)


def test_a_second_derivative_is_refused() -> None:
    case = make_case()
    (gradient,) = torch.autograd.grad(fused(case).square().sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivative.*form="):
        gradient.sum().backward()


def test_autocast_changes_nothing() -> None:
    case = make_case(dtype=torch.float32)
    y, expected = fused(case), gradients(fused(case), case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fused(case)
        actual = gradients(inside, case)
        delta = case.transfer.delta(case.A, case.B, scaling=SCALING, gain=GAIN)
    assert torch.equal(inside, y)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
    assert torch.equal(delta, case.transfer.delta(case.A, case.B, scaling=SCALING, gain=GAIN))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("transposed", [True, False])
def test_delta_is_what_the_layer_adds(form: str, transposed: bool) -> None:
    case = make_case(form, transposed=transposed)
    delta = case.transfer.delta(case.A, case.B, scaling=SCALING, gain=GAIN)
    expected = reference_delta_weight(case.A, case.B, case.transfer, scaling=SCALING, input_gain=GAIN)
    assert relative(delta, expected) <= 1e-8
    update = case.transfer.linear(case.x, case.A, case.B, scaling=SCALING, gain=GAIN)
    assert relative(update, F.linear(case.x, expected)) <= 1e-8


@pytest.mark.parametrize("form", FORMS)
def test_the_start_gives_a_usable_gradient(form: str) -> None:
    case = make_case(form)
    start = case._replace(B=torch.zeros_like(case.B).requires_grad_(), transfer=Transfer(TransferSpec(form)))
    grad_B = torch.autograd.grad(fused(start), start.B, start.grad_y)[0]
    lora_grad_B = SCALING * (start.grad_y.flatten(0, 1).T @ start.x.flatten(0, 1)) @ start.A.T
    assert relative(grad_B, lora_grad_B) <= 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_update(dtype: torch.dtype) -> None:
    """The layer's own update, before y is rounded to the dtype of the output, where ‖ΔW‖ is 1 % of ‖W0‖.

    The output grid of bfloat16 is coarser than such an update: rounding the exact y alone changes it by 16 %,
    for plain LoRA as for anything else. So the update is measured as it is added, and the sum to a half-step of its
    dtype.
    """
    torch.manual_seed(0)
    base = nn.Linear(256, 192)
    model = get_peft_model(nn.Sequential(base), LrLoraConfig(r=4, target_modules=["0"])).to(dtype)
    layer: Any = model.base_model.model[0]
    with torch.no_grad():
        layer.lrlora_B["default"].weight.normal_()
        layer.lrlora_phi["default"].amplitude.normal_(0, 0.002)
        gain, W0 = layer.input_gain["default"], base.weight.double()
        for _ in range(3):
            size = layer.get_delta_weight("default").double().norm()
            layer.lrlora_B["default"].weight.mul_(0.01 * W0.norm() / size)
        A, B, phi = layer.lrlora_A["default"].weight, layer.lrlora_B["default"].weight, layer.lrlora_phi["default"]
        delta = reference_delta_weight(A, B, phi, scaling=layer.scaling["default"], input_gain=gain)
        assert (delta.norm() / W0.norm()).item() == pytest.approx(0.01, rel=0.2)
        x = torch.randn(64, 256, dtype=dtype)
        exact = x.double() @ delta.T

        update = layer._adapter_output(x, "default")
        assert (update.double() - exact).norm() <= 2e-2 * exact.norm()

        y, y_base = layer(x), base(x)
        assert y.dtype == dtype
        y_exact = F.linear(x.double(), W0, base.bias.double()) + exact
        lost = (y.double() - y_base.double() - exact).norm()
        assert lost <= 1.1 * (y_exact.to(dtype).double() - y_base.double() - exact).norm()
        assert ((y.double() - (y_base.double() + exact)).abs() <= 0.51 * _step(y) + 2e-2 * exact.abs().max()).all()


def _step(y: Tensor) -> Tensor:
    """The distance between neighbouring numbers of y's dtype around y."""
    return 2.0 ** y.double().abs().log2().floor() * torch.finfo(y.dtype).eps


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward of one forward, every storage counted once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(storages.values())


@pytest.mark.parametrize("shape", [(64, 48), (512, 384)])
def test_saves_no_more_for_backward_than_lora_and_the_parameters(shape: tuple[int, int]) -> None:
    m, n = shape
    x = torch.randn(4, 16, n, requires_grad=True)
    layers = {}
    for config in (LoraConfig(r=8, target_modules=["0"]), LrLoraConfig(r=8, target_modules=["0"])):
        model = get_peft_model(nn.Sequential(nn.Linear(n, m)), config)
        layers[config.peft_type.value] = model.base_model.model[0]
    own = sum(p.numel() * p.element_size() for n, p in layers["LRLORA"].named_parameters() if "lrlora" in n)
    assert saved_bytes(layers["LRLORA"], x) <= saved_bytes(layers["LORA"], x) + own


def test_saved_bytes_do_not_grow_with_num_basis_beyond_its_parameters() -> None:
    x = torch.randn(8, 48, requires_grad=True)
    saved = []
    for num_basis in (2, 50):
        config = LrLoraConfig(r=8, target_modules=["0"], num_basis=num_basis)
        saved.append(saved_bytes(get_peft_model(nn.Sequential(nn.Linear(48, 64)), config).base_model.model[0], x))
    assert saved[1] - saved[0] == 2 * 48 * 4
