"""The moments, the factors in place of an adapter, and the best cut: against the m × n problem in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lrlora.adapters import Factors, factorize
from lrlora.learned import loss_curve, mean_loss
from lrlora.learned.directions import directions
from lrlora.learned.moments import RIDGE, collect_moments, thin_updates
from lrlora.lora.factors import Layout

from ..conftest import TinyModel, save_quantizable

TOKENS, DAMPINGS = 40, (0.0, 0.1)


class OneLayer(nn.Module):
    """A layer, and eight logits for each token that it gives."""

    def __init__(self, layer: nn.Module, outputs: int) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("head", torch.randn(8, outputs, dtype=torch.float64) / outputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return (y.movedim(1, -1) if isinstance(self.layer, nn.Conv2d) else y) @ self.head.T


def cross_entropy(model: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    logits = model(batch[0]).flatten(0, -2)
    return F.cross_entropy(logits, batch[1], reduction="none"), torch.ones(len(batch[1]))


KINDS: dict[str, Any] = {
    "linear": (lambda: nn.Linear(9, 7), 7, Layout(), lambda: torch.randn(TOKENS, 9, dtype=torch.float64), TOKENS),
    "convolution": (
        lambda: nn.Conv2d(3, 7, 3, stride=2, padding=1, padding_mode="reflect"),
        7,
        Layout((3, 3)),
        lambda: torch.randn(4, 3, 8, 8, dtype=torch.float64),
        4 * 16,
    ),
    "embedding": (
        lambda: nn.Embedding(11, 7),
        7,
        Layout(is_embedding=True),
        lambda: torch.randint(11, (TOKENS,)),
        TOKENS,
    ),
}


def a_layer(kind: str) -> tuple[OneLayer, Factors, list[Any], Tensor, Tensor]:
    """A layer with an update of rank 5, batches, and the whole moments of its inputs and of its output's gradients."""
    torch.manual_seed(0)
    build, outputs, layout, draw, tokens = KINDS[kind]
    model = OneLayer(build().double(), outputs)
    shape = model.layer.weight.flatten(1).shape
    B, A = torch.randn(shape[0], 5).double() / 3, torch.randn(5, shape[1]).double() / 3
    energy = (B @ A).square().sum().item()
    part = Factors("layer", A, B, 5, 1.0, layout, energy, 1.0, 1.0)
    batches = [(draw(), torch.randint(8, (tokens,))) for _ in range(2)]
    inputs, outs = [], []
    with torch.enable_grad():
        twin = OneLayer(build().double(), outputs)
        twin.load_state_dict(model.state_dict())
        delta = B @ A
        twin.layer.weight.data += delta.view_as(model.layer.weight)
        for x, labels in batches:
            y = twin.layer(x).detach().requires_grad_()
            logits = (y.movedim(1, -1) if kind == "convolution" else y) @ twin.head.T
            F.cross_entropy(logits.flatten(0, -2), labels, reduction="sum").backward()
            gradient = y.grad
            assert gradient is not None
            if kind == "embedding":
                inputs.append(F.one_hot(x, 11).double())
                outs.append(gradient)
            elif kind == "convolution":
                padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
                inputs.append(F.unfold(padded, 3, stride=2).mT.flatten(0, 1))
                outs.append(gradient.flatten(2).mT.flatten(0, 1))
            else:
                inputs.append(x)
                outs.append(gradient)
    X, G = torch.cat(inputs), torch.cat(outs)
    # An embedding's matrix is (tokens, width): its inputs are rows.
    into, out = (B.T, A.T) if kind == "embedding" else (A, B)
    z, h, inner, outer = X @ into.T, G @ out, into @ into.T, out.T @ out
    ridge = RIDGE * energy / 5
    w_h = (h * (h @ torch.linalg.inv(outer + ridge * torch.linalg.inv(inner)))).sum(1)
    w_z = (z * (z @ torch.linalg.inv(inner + ridge * torch.linalg.inv(outer)))).sum(1)
    terms = sum(len(labels) for _, labels in batches)
    return model, part, batches, (X.T * w_h) @ X / (w_h * w_z).sum(), (G.T * w_z) @ G / terms


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


@pytest.mark.parametrize("kind", KINDS)
def test_the_cut_is_the_optimum_of_the_whole_problem(kind: str) -> None:
    model, part, batches, inputs, outputs = a_layer(kind)
    moments, terms = collect_moments(model, [part], batches, cross_entropy)
    found = directions(part, moments["layer"], terms, damping=0.0)
    delta = part.B @ part.A
    left, right = (root(inputs), root(outputs)) if kind == "embedding" else (root(outputs), root(inputs))
    exact = torch.linalg.svdvals(left @ delta @ right).square()[: part.rank]
    assert torch.allclose(2 * found.rises, exact, rtol=1e-8, atol=0)
    for rank in range(1, part.rank):
        cut = found.factors(rank)
        lost = (left @ (delta - cut.B @ cut.A) @ right).square().sum()
        assert (lost - exact[rank:].sum()).abs() <= 1e-8 * exact.sum()


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_how_an_update_is_split_makes_no_difference(kind: str, damping: float) -> None:
    model, part, batches, *_ = a_layer(kind)
    mix = torch.randn(5, 5, dtype=torch.float64) + 3 * torch.eye(5, dtype=torch.float64)
    other = replace(part, A=torch.linalg.solve(mix, part.A), B=part.B @ mix)
    found = []
    for each in (part, other):
        moments, terms = collect_moments(model, [each], batches, cross_entropy)
        found.append(directions(each, moments["layer"], terms, damping=damping))
    assert torch.allclose(found[0].rises, found[1].rises, rtol=1e-8, atol=1e-10 * found[0].rises[0].item())
    first, second = (of.factors(2).B @ of.factors(2).A for of in found)
    assert (first - second).norm() <= 1e-8 * first.norm()


def test_strong_damping_keeps_what_is_large() -> None:
    model, part, batches, *_ = a_layer("linear")
    moments, terms = collect_moments(model, [part], batches, cross_entropy)
    U, sigma, Vh = torch.linalg.svd(part.B @ part.A, full_matrices=False)
    best = U[:, :2] * sigma[:2] @ Vh[:2]
    cut = directions(part, moments["layer"], terms, damping=1e9).factors(2)
    assert (cut.B @ cut.A - best).norm() <= 1e-6 * best.norm()
    assert cut.kept == pytest.approx((sigma[:2].square().sum() / sigma.square().sum()).item(), abs=1e-9)


@contextmanager
def with_lora(family: str, **fields: Any) -> Iterator[tuple[TinyModel, Any]]:
    tiny = TinyModel(family)
    model = get_peft_model(tiny.build(), LoraConfig(r=4, lora_alpha=8, **{**tiny.targets, **fields}))
    tiny.train(model, 3)
    yield tiny, model


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "vit", "mlp"])
def test_factors_stand_for_the_adapter_and_leave_the_model_as_it_was(family: str) -> None:
    with with_lora(family) as (tiny, model):
        factors, expected = factorize(model, energy=1.0), tiny.logits(model)
        model.train()
        trained = [p.requires_grad for p in model.parameters()]
        with thin_updates(model, factors) as base:
            assert not any(p.requires_grad for p in model.parameters())
            got = tiny.logits(base)
        assert model.training
        assert trained == [p.requires_grad for p in model.parameters()]
        assert (got - expected).norm() <= 1e-5 * expected.norm()
        with thin_updates(model, []) as base:
            without = tiny.logits(base)
        with model.disable_adapter():
            assert torch.equal(without, tiny.logits(model.eval()))
        assert torch.equal(tiny.logits(model), expected)


def language_batches(tiny: TinyModel, padding: int = 0, side: str = "right") -> list[dict[str, Tensor]]:
    tokens = tiny.inputs()["input_ids"]
    labels = tokens.clone()
    labels[:, :2] = -100  # a prompt
    mask = torch.ones_like(tokens)
    sides = (0, padding) if side == "right" else (padding, 0)
    return [
        {
            "input_ids": F.pad(tokens, sides, value=5),
            "labels": F.pad(labels, sides, value=-100),
            "attention_mask": F.pad(mask, sides),
            "position_ids": F.pad(torch.arange(7).expand(2, 7), sides),
        }
    ]


def test_the_prompt_counts_where_it_reaches_the_loss() -> None:
    with with_lora("llama") as (tiny, model):
        factors, (batch,) = factorize(model, energy=1.0), language_batches(tiny)
        other = {**batch, "input_ids": batch["input_ids"].clone()}
        other["input_ids"][:, 0] += 1  # of the prompt
        found = [collect_moments(model, factors, [each])[0] for each in (batch, other)]
    # The first two tokens, of the prompt, reach the loss through keys and values, but not through the last MLP.
    first, second = (of["model.layers.0.self_attn.v_proj"].inputs for of in found)
    assert (first - second).norm() > 0.01 * first.norm()


class Checkpointed(nn.Module):
    """Two layers, whose activations are computed again in the backward pass."""

    def __init__(self, *, is_on: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.is_on = nn.Linear(6, 6), nn.Linear(6, 4), is_on

    def forward(self, x: Tensor) -> Tensor:
        def block(x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

        return checkpoint(block, x, use_reentrant=False) if self.is_on else block(x)


def loss_of_tokens(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long), reduction="none"), torch.ones(len(x))


def test_checkpointed_activations_give_the_same_moments() -> None:
    x, found = torch.randn(20, 6), []
    for is_on in (False, True):
        config = LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False)
        model = get_peft_model(Checkpointed(is_on=is_on), config)
        found.append(collect_moments(model, factorize(model, energy=1.0), [x], loss_of_tokens)[0])
    assert found[1]["first"].calls == 2  # computed again
    for module, moments in found[0].items():
        assert torch.allclose(found[1][module].sums[:-1], moments.sums[:-1])


class Experts(nn.Module):
    """Each token goes to one expert, by the sign of its first feature."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[x[:, 0] <= 0], x[x[:, 0] > 0]]
        return torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True) if len(part)])


def test_each_expert_has_the_moments_of_its_own_tokens() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["experts.0", "experts.1"], init_lora_weights=False)
    model = get_peft_model(Experts(), config)
    factors, x = factorize(model, energy=1.0), torch.randn(32, 6)
    is_first = x[:, :1] <= 0
    moments, terms = collect_moments(model, factors, [x], loss_of_tokens)
    assert terms == 32
    others, _ = collect_moments(model, factors, [torch.where(is_first, x, 2 * x)], loss_of_tokens)
    assert torch.allclose(others["experts.0"].sums, moments["experts.0"].sums)
    assert not torch.allclose(others["experts.1"].sums, moments["experts.1"].sums)
    with pytest.raises(ValueError, match=r"\bexperts\.0 \(1 of 2 modules\).*--by energy"):
        collect_moments(model, factors, [x[x[:, 0] > 0]], loss_of_tokens)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_terms_are_the_tokens_that_are_predicted(family: str) -> None:
    with with_lora(family) as (tiny, model):
        (batch,), factors = language_batches(tiny), factorize(model, energy=1.0)
        assert collect_moments(model, factors, [batch])[1] == 10
        nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
        expected = mean_loss(model, factors, [batch])
        assert mean_loss(model, factors, [nothing, batch]) == expected
        assert collect_moments(model, factors, [nothing, batch])[1] == 10


def test_a_module_that_no_gradient_reaches_is_kept_whole_where_all_is_kept() -> None:
    with with_lora("llama") as (tiny, model):
        (batch,), factors = language_batches(tiny), factorize(model, energy=1.0)
        short = {name: part[:, :2] for name, part in batch.items()} | {"labels": batch["input_ids"][:, :2]}
        curve = loss_curve(model, factors, [short])
        expected = mean_loss(model, factors, [batch])
        assert mean_loss(model, curve.within(curve.parameters), [batch]) == pytest.approx(expected, rel=1e-4)


def test_a_frozen_adapter_stays_frozen_and_every_module_in_its_mode() -> None:
    with with_lora("llama") as (tiny, model):
        model.requires_grad_(False)
        model.train()
        norm = model.get_base_model().model.norm.eval()
        mean_loss(model, factorize(model, energy=1.0), language_batches(tiny))
        assert not any(p.requires_grad for p in model.parameters())
        assert model.training
        assert not norm.training


@pytest.mark.refused
def test_a_loss_that_says_nothing_is_refused() -> None:
    with with_lora("llama") as (tiny, model):
        factors, (batch,) = factorize(model, energy=1.0), language_batches(tiny)
        with pytest.raises(ValueError, match=r"no batch .*label"):
            loss_curve(model, factors, [])
        with torch.no_grad():
            model.get_base_model().lm_head.weight[7] = torch.nan
        with pytest.raises(ValueError, match=r"loss .*\bis nan\b"):
            loss_curve(model, factors, [batch])
        with pytest.raises(ValueError, match="no module elsewhere"):
            mean_loss(model, [replace(factors[0], module="elsewhere")], [batch])
        model.merge_adapter()
        with pytest.raises(ValueError, match=r"merged .*unmerge_adapter\(\)"):
            mean_loss(model, factors, [batch])


def test_only_the_adapter_that_the_factors_are_of_counts() -> None:
    with with_lora("llama") as (tiny, model):
        model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        factors, batches = factorize(model, energy=1.0, adapter="default"), language_batches(tiny)
        expected = mean_loss(model, factors, batches)
        model.set_adapter("other")
        assert mean_loss(model, factors, batches) == expected
        assert model.active_adapter == "other"


@pytest.mark.filterwarnings(r"ignore:bitsandbytes.*an autograd kernel was not registered:UserWarning:torch\.")
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_base_is_cut_as_it_is(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny = TinyModel("llama")
    save_quantizable(tmp_path)
    quantised = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu", quantization_config=quantised)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    whole, batches = factorize(model, energy=1.0), language_batches(tiny)
    with torch.no_grad():
        expected = model(**batches[0]).loss.item()
    assert mean_loss(model, whole, batches) == pytest.approx(expected, rel=0.02)
    curve = loss_curve(model, whole, batches)
    assert mean_loss(model, curve.within(curve.parameters), batches) == pytest.approx(expected, rel=0.02)
    assert all(of.rises[0] > 0 for of in curve.modules)
