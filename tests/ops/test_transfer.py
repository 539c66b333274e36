"""φ: its start, its table and its bounds."""

from __future__ import annotations

import pytest
import torch

from lrlora.ops.phi import TransferSpec
from lrlora.ops.phi_forms import FORMS, SincSeries
from lrlora.ops.table import MAX_CELLS, PhiGradient, TransferTable
from lrlora.ops.transfer import INPUT_RMS, Transfer, input_gain

from ..processes import run

UNCLIPPED = [name for name, form in FORMS.items() if not form.is_clipped]


def make_transfer(form: str, num_basis: int = 50, *, scale: float = 1.0, lr_multiplier: float = 1.0) -> Transfer:
    """φ with random amplitudes, and bandwidths spread over their whole range."""
    transfer = Transfer(TransferSpec(form, num_basis, 3.0, lr_multiplier))
    with torch.no_grad():
        for parameter in transfer.parameters():
            parameter.normal_(0, scale, generator=torch.Generator().manual_seed(num_basis))
    return transfer


def points(*, reach: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    random = (2 * torch.rand(20_000, generator=generator, dtype=torch.float64) - 1) * reach
    return torch.cat([random, torch.tensor([0.0, 3.0, -3.0, 6.0, -6.0, 1e-9], dtype=torch.float64)])


@pytest.mark.parametrize("largest", [0.0, 6.0, 12.0])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_basis", [2, 8, 50])
@pytest.mark.parametrize("extreme", [-100.0, 100.0])
def test_table_agrees_with_the_formula_up_to_the_band_limit(
    form: str, num_basis: int, largest: float, extreme: float
) -> None:
    transfer = make_transfer(form, num_basis)
    with torch.no_grad():
        for parameter in list(transfer.parameters())[1:]:
            parameter.fill_(extreme)
    z = points(reach=12.0).requires_grad_()
    phi = transfer(z)
    slope = torch.autograd.grad(phi.sum(), z)[0]
    table = TransferTable(transfer.spec, transfer.learned, torch.float64, largest)
    assert (table.value(z.detach()) - phi).abs().max() <= 1e-6
    assert (table.slope(z.detach()) - slope).abs().max() <= 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_float32_table_agrees_to_float32_precision(form: str) -> None:
    transfer = make_transfer(form, scale=0.3)
    z = points(reach=5.0).float().requires_grad_()
    phi = transfer(z)
    # What rounding z itself to float32 may change φ(z) by, twice over, and the rounding of φ(z).
    allowed = 1e-6 + 2 * torch.finfo(torch.float32).eps * (torch.autograd.grad(phi.sum(), z)[0] * z).abs()
    table = TransferTable(transfer.spec, transfer.learned, torch.float32)
    assert ((table.value(z.detach()) - phi).abs() <= allowed).all()


@pytest.mark.parametrize("form", FORMS)
def test_starts_odd_with_phi_of_zero_exactly_zero(form: str) -> None:
    transfer = Transfer(TransferSpec(form))
    z = points(reach=9.0)
    torch.testing.assert_close(transfer(-z), -transfer(z), rtol=0, atol=1e-12)
    for dtype in (torch.float32, torch.float64):
        table = TransferTable(transfer.spec, transfer.learned, dtype)
        assert table.value(torch.zeros(3, dtype=dtype)).abs().max() == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_basis", [8, 9, 50, 51])
def test_starts_with_slope_one_at_zero(form: str, num_basis: int) -> None:
    transfer = Transfer(TransferSpec(form, num_basis))
    z = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(transfer(z).sum(), z)[0].item()
    assert slope == pytest.approx(1, abs=1e-12 if FORMS[form].backbone else 0.05)


@pytest.mark.parametrize("num_basis", [8, 9, 50, 51])
def test_literal_form_starts_as_the_identity_on_the_inner_half(num_basis: int) -> None:
    z = torch.linspace(-1.5, 1.5, 501, dtype=torch.float64)
    phi = Transfer(TransferSpec("sinc", num_basis))(z).detach()
    assert (phi - z).abs().max() < 0.04


def test_residual_form_is_the_identity_at_the_start_and_continuous_outside() -> None:
    z = points(reach=9.0)
    torch.testing.assert_close(Transfer(TransferSpec("residual"))(z), z)
    learned = make_transfer("residual", scale=0.3)
    z = torch.tensor([3.0 - 1e-9, 3.0 + 1e-9, 7.0, 8.0], dtype=torch.float64)
    phi = learned(z)
    assert phi[0].item() == pytest.approx(phi[1].item(), abs=1e-6)
    assert (phi[3] - phi[2]).item() == pytest.approx(1.0)


def test_literal_form_keeps_its_tails_outside_the_interval() -> None:
    transfer = make_transfer("sinc", scale=0.3)
    far = torch.tensor([20.0, -35.0], dtype=torch.float64)
    a, omega = transfer.spec.amplitudes(transfer.learned), bandwidths(transfer.spec, transfer.learned[1:])
    u = omega * (far.unsqueeze(-1) - torch.linspace(-3, 3, 50, dtype=torch.float64))
    expected = (a * torch.sin(u) / u).sum(-1)
    table = TransferTable(transfer.spec, transfer.learned, torch.float64)
    torch.testing.assert_close(table.value(far), expected.detach())
    assert expected.abs().max() > 0


@pytest.mark.parametrize("form", UNCLIPPED)
@pytest.mark.parametrize("num_basis", [2, 50])
@pytest.mark.parametrize("largest", [0.0, 2.9, 3.1, 7.0, 40.0])
def test_the_table_of_natural_tails_reaches_as_far_as_asked_and_little_further(
    form: str, num_basis: int, largest: float
) -> None:
    transfer = Transfer(TransferSpec(form, num_basis))
    table = TransferTable(transfer.spec, transfer.learned, torch.float64, largest)
    assert table.is_complete
    assert max(largest, 3.0) <= table.reach + 1e-12
    assert table.reach <= largest + 3 * 6.0 + 3.0
    assert table.value(torch.zeros(1, dtype=torch.float64)).item() == 0


@pytest.mark.parametrize("form", UNCLIPPED)
def test_the_largest_table_is_bounded(form: str) -> None:
    transfer = Transfer(TransferSpec(form, 50))
    for largest in (1e6, float("inf")):
        table = TransferTable(transfer.spec, transfer.learned, torch.float64, largest)
        assert not table.is_complete
        assert 2 * table.cells_per_side <= MAX_CELLS


def bandwidths(spec: TransferSpec, shape: torch.Tensor) -> torch.Tensor:
    form = spec.phi_form
    assert isinstance(form, SincSeries)
    return form.bandwidths(shape.double())


def test_bandwidths_start_at_the_shannon_rate_and_stay_bounded() -> None:
    spec = TransferSpec("residual", 50, 3.0)
    step = 6.0 / 49
    torch.testing.assert_close(bandwidths(spec, torch.zeros(1, 50)), torch.full((50,), torch.pi / step).double())
    extreme = bandwidths(spec, torch.tensor([[-1e4, 1e4]]))
    assert extreme.min() >= 0
    assert extreme.max() <= 2 * torch.pi / step


@pytest.mark.parametrize("form", FORMS)
def test_learning_rate_multiplier_scales_the_step_of_phi_under_adam(form: str) -> None:
    moved = {}
    for multiplier in (1.0, 5.0):
        transfer = Transfer(TransferSpec(form, lr_multiplier=multiplier))
        before = transfer.spec.amplitudes(transfer.learned).detach()
        optimizer = torch.optim.Adam(transfer.parameters(), lr=1e-3)
        transfer(torch.linspace(-2, 2, 100)).square().sum().backward()
        optimizer.step()
        moved[multiplier] = (transfer.spec.amplitudes(transfer.learned) - before).abs().mean().item()
    assert moved[5.0] == pytest.approx(5 * moved[1.0], rel=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_weight_decay_alone_pulls_back_to_the_start(form: str) -> None:
    transfer = make_transfer(form)
    start = Transfer(transfer.spec)
    optimizer = torch.optim.SGD(transfer.parameters(), lr=0.1, weight_decay=1.0)
    for _ in range(200):
        for parameter in transfer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    z = points(reach=9.0)
    torch.testing.assert_close(transfer(z), start(z), rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_that_a_form_names_is_stored_and_moves_phi(form: str) -> None:
    transfer = make_transfer(form, 8, scale=0.3)
    assert list(transfer.state_dict()) == list(FORMS[form].parameters)
    transfer(points(reach=3.0)).square().sum().backward()
    for parameter in transfer.parameters():
        assert parameter.shape == (8,)
        assert parameter.grad.all()


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float16)])
def test_parameters_stay_float32_and_exact_under_casts(cast) -> None:  # type: ignore[no-untyped-def]
    transfer = make_transfer("residual")
    before = {name: p.detach().clone() for name, p in transfer.named_parameters()}
    cast(torch.nn.Sequential(transfer))
    for name, parameter in transfer.named_parameters():
        assert torch.equal(parameter, before[name])


SCRIPT = """
import torch
from lrlora.ops.table import PhiGradient, TransferTable
from lrlora.ops.phi import TransferSpec
from lrlora.ops.transfer import Transfer
phi = Transfer(TransferSpec("sinc"))
with {context}:
    TransferTable(phi.spec, phi.learned, torch.float32)
z = torch.randn(10)
table = TransferTable(phi.spec, phi.learned, torch.float32)
gradient = PhiGradient(table)
gradient.add(z, torch.ones_like(z))
print(gradient.parameter_gradient().isfinite().all().item())
"""


@pytest.mark.parametrize("context", ["torch.inference_mode()", "torch.no_grad()", "torch.autocast('cpu')"])
def test_training_works_after_a_first_use_in_any_context(context: str) -> None:
    assert run(SCRIPT.format(context=context)).splitlines()[-1] == "True"


def test_nan_entries_stay_nan() -> None:
    for form in FORMS:
        transfer = make_transfer(form)
        table = TransferTable(transfer.spec, transfer.learned, torch.float32)
        assert table.value(torch.tensor([float("nan"), 1.0])).isnan().tolist() == [True, False]


def test_a_vanishing_bandwidth_gives_no_nan() -> None:
    spec = TransferSpec("residual", 8)
    transfer = Transfer(spec)
    with torch.no_grad():
        transfer.amplitude.fill_(0.1)
        transfer.bandwidth.fill_(-800.0)
    table = TransferTable(spec, transfer.learned, torch.float64)
    z = torch.linspace(-4, 4, 50, dtype=torch.float64)
    gradient = PhiGradient(table)
    gradient.add(z, torch.ones_like(z))
    assert gradient.parameter_gradient().isfinite().all()


def test_unit_input_has_one_size_in_every_matrix() -> None:
    A = torch.randn(3, 2, 50)
    B = torch.randn(3, 40, 2) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    z = input_gain(A, B, None)[:, None, None] * (B @ A)
    torch.testing.assert_close(z.square().mean((1, 2)).sqrt(), torch.full((3,), INPUT_RMS))


def test_rows_of_tokens_that_were_not_seen_do_not_count() -> None:
    A, B = torch.randn(2, 50), torch.randn(40, 2)
    seen = torch.cat([B, torch.zeros(1000, 2)])
    torch.testing.assert_close(input_gain(A, seen, None), input_gain(A, B, None))


@pytest.mark.parametrize("form", FORMS)
def test_the_update_at_unit_input_grows_with_the_factors(form: str) -> None:
    transfer, A, B = make_transfer(form, 8, scale=0.3), torch.randn(2, 50), torch.randn(40, 2)
    once, thrice = (transfer.delta(A, factor * B, scaling=1.0, gain=None) for factor in (1, 3))
    torch.testing.assert_close(thrice, 3 * once)
    zeros = torch.zeros_like(B, requires_grad=True)
    update = transfer.delta(A, zeros, scaling=1.0, gain=None)
    (gradient,) = torch.autograd.grad(update.sum(), zeros)
    assert update.abs().max() < 1e-9
    assert gradient.isfinite().all()
    assert gradient.any()
