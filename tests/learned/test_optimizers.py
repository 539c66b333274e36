"""Fitted ranks with optimizers of torch, transformers, bitsandbytes, pytorch_optimizer and schedulefree."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytorch_optimizer
import schedulefree
import torch
from packaging.version import Version
from peft import PeftModel
from torch import Tensor, nn
from transformers.optimization import Adafactor

from lrlora import FittedRanks
from lrlora.lora.live import lora_layers

from ..conftest import TinyModel
from .test_fitted_ranks import trained, with_lora

STEPS = 24  # cut after 7
PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
Build = Callable[[list[nn.Parameter]], Any]


class Case(NamedTuple):
    """An optimizer, and when it is refused: with fitted ranks, "at the start", or after the cut; "" if never."""

    build: Build
    refused: str = ""
    takes_closure: bool = False


def _of(module: Any, name: str, **options: Any) -> Build:
    return partial(getattr(module, name), **{"lr": 5e-3, **options})


def _bitsandbytes(name: str, **options: Any) -> Build:
    return lambda parameters: _of(pytest.importorskip("bitsandbytes").optim, name, **options)(parameters)


def _around_adamw(wrapper: Callable[..., Any], **options: Any) -> Build:
    return lambda parameters: wrapper(torch.optim.AdamW(parameters, lr=5e-3), **options)


START, CUT = "at the start", "after the cut"
_HAS_LAZY_ADAGRAD = Version(torch.__version__) >= Version("2.13")  # before, its state is made with the optimizer alone
CASES = {
    **{f"torch {name}": Case(_of(torch.optim, name)) for name in ("AdamW", "Adam", "Adamax", "NAdam", "RAdam", "SGD")},
    **{f"torch {name}": Case(_of(torch.optim, name)) for name in ("Adadelta", "Adafactor", "RMSprop", "ASGD", "Rprop")},
    "torch Adagrad": Case(_of(torch.optim, "Adagrad"), "" if _HAS_LAZY_ADAGRAD else START),
    "torch AdamW, amsgrad=True": Case(_of(torch.optim, "AdamW", amsgrad=True)),
    "torch SGD, nesterov=True": Case(_of(torch.optim, "SGD", momentum=0.9, nesterov=True)),
    "torch Muon": Case(_of(torch.optim, "Muon")),
    "torch AdamW, eps=0": Case(_of(torch.optim, "AdamW", eps=0.0), START),
    "torch LBFGS": Case(_of(torch.optim, "LBFGS"), START, takes_closure=True),
    "torch SparseAdam": Case(_of(torch.optim, "SparseAdam"), START),
    "transformers Adafactor": Case(partial(Adafactor, lr=5e-3, relative_step=False, scale_parameter=False)),
    "transformers Adafactor, lr=None": Case(Adafactor, START),
    "bitsandbytes AdamW": Case(_bitsandbytes("AdamW")),
    # On a CPU.
    **{
        f"bitsandbytes {name}": Case(_bitsandbytes(name), START) for name in ("AdamW8bit", "PagedAdamW8bit", "Lion8bit")
    },
    **{f"schedulefree {name}": Case(_of(schedulefree, name)) for name in ("AdamWScheduleFree", "SGDScheduleFree")},
    "schedulefree AdamWScheduleFreeClosure": Case(_of(schedulefree, "AdamWScheduleFreeClosure"), takes_closure=True),
    "schedulefree ScheduleFreeWrapper": Case(_around_adamw(schedulefree.ScheduleFreeWrapper, momentum=0.9), START),
    **{f"pytorch_optimizer {name}": Case(_of(pytorch_optimizer, name)) for name in ("Lion", "Prodigy", "SOAP")},
    **{f"pytorch_optimizer {name}": Case(_of(pytorch_optimizer, name)) for name in ("AdEMAMix", "StableAdamW", "Adan")},
    **{f"pytorch_optimizer {name}": Case(_of(pytorch_optimizer, name), START) for name in ("Ranger", "Yogi", "Nero")},
    "pytorch_optimizer Gravity": Case(_of(pytorch_optimizer, "Gravity"), START),
    "pytorch_optimizer SAM": Case(
        lambda parameters: pytorch_optimizer.SAM(parameters, torch.optim.AdamW, lr=5e-3), takes_closure=True
    ),
    "pytorch_optimizer OrthoGrad": Case(_around_adamw(pytorch_optimizer.OrthoGrad)),
    "pytorch_optimizer Lookahead": Case(_around_adamw(pytorch_optimizer.Lookahead), CUT),
    "pytorch_optimizer Lookahead, k=20": Case(_around_adamw(pytorch_optimizer.Lookahead, k=20), CUT),
    "pytorch_optimizer TRAC": Case(_around_adamw(pytorch_optimizer.TRAC), CUT),
}


def fitted(tiny: TinyModel, model: Any, case: Case) -> tuple[FittedRanks, Any]:
    """Train as the optimizer asks for: with a closure, in training mode, and in evaluation mode at the end."""
    optimizer = case.build(trained(model))
    learned = FittedRanks(model, optimizer, size="r2", steps=STEPS)
    for mode in ("train", "eval"):
        getattr(model, mode)()
        getattr(optimizer, mode, lambda: None)()
        for _ in range(STEPS if mode == "train" else 0):

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = tiny.loss(model)
                loss.backward()
                return loss

            closure()
            optimizer.step(*[closure] * case.takes_closure)
    return learned, optimizer


@pytest.mark.filterwarnings(r"ignore:Paged optimizers are not supported on CPU:UserWarning:bitsandbytes\.")
@pytest.mark.parametrize("name", CASES)
def test_an_optimizer_ends_right_or_is_refused(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    tiny, model = with_lora("mlp")
    if case.refused:
        with pytest.raises(ValueError, match=r"cut from \S+ .*zero" if case.refused == CUT else "Fitted ranks"):
            fitted(tiny, model, case)
        return
    before = tiny.loss(model).item()
    learned, _ = fitted(tiny, model, case)
    assert learned.ranks is not None
    assert sum(parameter.numel() for parameter in trained(model)) <= 2 * (16 + 32 + 32 + 8)
    assert tiny.loss(model).item() < before
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.build(), tmp_path).eval()
    assert torch.equal(tiny.logits(again), tiny.logits(model))


def test_the_page_has_what_is_tested() -> None:
    rows = re.findall(r"^\| (\w+) `([^`]+)` \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    said = {f"{library} {name}": "refused" in result for library, name, result in rows}
    known = {name: bool(case.refused) for name, case in CASES.items()}
    assert said == known | {"torch Adagrad": False}


def test_schedule_free_weights_are_averaged_after_the_last_step() -> None:
    tiny, model = with_lora("llama")
    _, optimizer = fitted(tiny, model, Case(_of(schedulefree, "AdamWScheduleFree", lr=0.05)))
    averaged = tiny.loss(model).item()
    optimizer.train()
    assert abs(tiny.loss(model).item() - averaged) > 1e-4


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Adafactor"])
def test_an_optimizer_goes_on_after_the_last_step(optimizer: str) -> None:
    tiny, model = with_lora("llama")
    _, same = fitted(tiny, model, Case(_of(torch.optim, optimizer)))
    before = tiny.loss(model).item()
    for _ in range(3):
        tiny.loss(model).backward()
        same.step()
        same.zero_grad()
    assert tiny.loss(model).item() < before


class Counting(torch.optim.SGD):
    """Remembers its steps in what a copy shares, and takes no closure."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, lr=1e-2)
        self.steps, self.count = [], torch.zeros(())

    def step(self) -> None:  # type: ignore[override]
        self.steps.append(1)
        self.count += 1
        super().step()


def test_the_test_of_an_optimizer_leaves_it_as_it_is() -> None:
    _, model = with_lora("mlp")
    optimizer = Counting(trained(model))
    FittedRanks(model, optimizer, size="r2", steps=STEPS)
    assert (optimizer.steps, optimizer.count.item(), len(optimizer.state)) == ([], 0, 0)
    for build in (_of(torch.optim, "AdamW", lr=torch.tensor(1e-3)), _of(pytorch_optimizer, "Prodigy")):
        prodigy = build(trained(model))
        before = [{k: v for k, v in group.items() if k != "params"} for group in prodigy.param_groups]
        FittedRanks(model, prodigy, size="r2", steps=STEPS)
        assert before == [{k: v for k, v in group.items() if k != "params"} for group in prodigy.param_groups]


@pytest.mark.parametrize(
    "build",
    [
        _of(torch.optim, "Adafactor"),
        _of(torch.optim, "SGD", momentum=0.9),
        _of(pytorch_optimizer, "SOAP"),
        _of(pytorch_optimizer, "Shampoo", lr=1e-3),
        _of(pytorch_optimizer, "Prodigy"),
    ],
)
def test_a_run_resumes_to_the_bit_and_goes_on_after_its_end(build: Build) -> None:
    states: list[Any] = []

    def run(begin: int) -> list[Tensor]:
        tiny, model = with_lora("llama")
        optimizer = build(trained(model))
        learned = FittedRanks(model, optimizer, size="r2", steps=STEPS)
        parts = {"model": model, "optimizer": optimizer, "ranks": learned}
        for name, part in parts.items() if begin else ():
            part.load_state_dict(states[0][name])
        for step in range(begin, STEPS):
            if step == 15 and not begin:
                states.append({name: copy.deepcopy(part.state_dict()) for name, part in parts.items()})
            tiny.loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()
        found = [parameter.detach().clone() for parameter in trained(model)]
        for _ in range(2):
            tiny.loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(parameter.isfinite().all() for parameter in trained(model))
        return found

    assert all(map(torch.equal, run(0), run(15)))


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (_of(torch.optim, "AdamW", betas=(0.0, 0.999)), "exp_avg"),
        (_of(torch.optim, "AdamW", betas=(0.0, 0.999), fused=True), "exp_avg"),
        (_of(torch.optim, "SGD", momentum=1e-9), "momentum_buffer"),
    ],
)
def test_moments_go_on_with_the_factors_after_the_cut(build: Build, name: str) -> None:
    tiny, model = with_lora("mlp")
    factors = [
        (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        for layer in lora_layers(model, "default").values()
    ]
    generator = torch.Generator().manual_seed(0)
    for A, B in factors:  # an update of rank 2, which a cut to rank 2 leaves as it is
        B.data = torch.randn(len(B), 2, generator=generator) @ torch.randn(2, len(A), generator=generator)
    optimizer = build(trained(model))
    optimizer.param_groups[0]["lr"] = 1e-12
    FittedRanks(
        model, optimizer, size="r2", steps=20, criterion=lambda curve, *_: [m.factors(2) for m in curve.modules]
    )
    for _ in range(7):
        optimizer.zero_grad()
        tiny.loss(model).backward()
        optimizer.step()
    moments = [optimizer.state[weight][name].clone() for pair in factors for weight in pair]
    optimizer.zero_grad()
    tiny.loss(model).backward()
    for weight, moment in zip((weight for pair in factors for weight in pair), moments, strict=True):
        torch.testing.assert_close(moment, weight.grad, rtol=1e-3, atol=1e-4 * float(weight.grad.abs().max()))
        assert not optimizer.state[weight].get("exp_avg_sq", moment.square())[moment == 0].any()


@pytest.mark.parametrize("name", ["AccSGD", "LaProp"])  # whose moments are of weights, or of normalized gradients
def test_an_optimizer_with_moments_of_another_kind_begins_anew(name: str) -> None:
    tiny, model = with_lora("mlp")
    optimizer = _of(pytorch_optimizer, name)(trained(model))
    FittedRanks(model, optimizer, size="r2", steps=STEPS)
    for _ in range(7):
        tiny.loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not any(optimizer.state[weight] for weight in trained(model))
