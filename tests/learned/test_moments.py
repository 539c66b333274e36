"""The moments of a live LoRA, and the best cut: against the m × n problem in float64."""

from __future__ import annotations

import copy
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

from lrlora.adapters import Factors
from lrlora.learned import LossCurve, model_loss
from lrlora.learned.directions import directions
from lrlora.learned.held_out import LiveLosses
from lrlora.learned.live_cut import loss_curve
from lrlora.learned.moments import RIDGE, Loss, Moments, watch_layer, with_sampled_labels
from lrlora.lora.factors import Layout
from lrlora.lora.live import lora_factors, lora_layers, lora_weights, put

from ..conftest import TinyModel, save_quantizable
from ..processes import run

TOKENS, DAMPINGS = 40, (0.0, 0.1)


def moments_of(model: Any, whole: list[Factors], batches: list[Any], loss: Loss = model_loss) -> dict[str, Moments]:
    """Moments of a live LoRA's modules, from the sum of the loss terms."""
    layers, moments = lora_layers(model, "default"), {part.module: Moments.zeros(part) for part in whole}
    watchers = [watch_layer(layers[path], "default", each) for path, each in moments.items()]
    for batch in batches:
        loss(model, batch)[0].sum().backward()
    for watcher in watchers:
        watcher.remove()
    return moments


def curve_of(model: Any, batches: list[Any], loss: Loss = model_loss) -> LossCurve:
    """Directions of a live LoRA, by the loss of batches."""
    return loss_curve(model, "default", LiveLosses.of_batches(model, 3 * batches, loss, batches))


def loss_with(model: Any, factors: list[Factors], batches: list[Any], loss: Loss = model_loss) -> float:
    """Mean loss with these factors in place of the adapter's, which are there again afterwards."""
    before = lora_factors(model, "default")
    put(model, "default", factors)
    with torch.no_grad():
        sums, numbers = (torch.cat(parts).sum() for parts in zip(*(loss(model, b) for b in batches), strict=True))
    put(model, "default", before)
    return (sums / numbers).item()


class OneLayer(nn.Module):
    """A layer, and eight logits for each token that it gives."""

    def __init__(self, layer: nn.Module, outputs: int) -> None:
        super().__init__()
        self.layer, self.is_convolution = layer, isinstance(layer, nn.Conv2d)
        self.register_buffer("head", torch.randn(8, outputs, dtype=torch.float64) / outputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return (y.movedim(1, -1) if self.is_convolution else y) @ self.head.T


def cross_entropy(model: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    logits = model(batch[0]).flatten(0, -2)
    return F.cross_entropy(logits, batch[1], reduction="none"), torch.ones(len(batch[1]))


KINDS: dict[str, Any] = {
    "linear": (lambda: nn.Linear(9, 7), 7, Layout(), lambda: torch.randn(TOKENS, 9, dtype=torch.float64), TOKENS),
    "convolution": (
        lambda: nn.Conv2d(3, 7, 3, stride=2, padding=1),
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


def adapted(model: nn.Module, part: Factors) -> Any:
    """A copy of a model with a LoRA of these factors."""
    rank = part.rank
    lora = get_peft_model(copy.deepcopy(model), LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"])).double()
    (layer,) = lora_layers(lora, "default").values()
    for weight, value in zip(lora_weights(layer, "default"), part.weights, strict=True):
        weight.data.copy_(value)
    return lora


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
                inputs.append(F.unfold(x, 3, padding=1, stride=2).mT.flatten(0, 1))
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
    terms = terms_of(batches)
    return model, part, batches, (X.T * w_h) @ X / (w_h * w_z).sum(), (G.T * w_z) @ G / terms


def terms_of(batches: list[Any]) -> int:
    return sum(len(labels) for _, labels in batches)


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


@pytest.mark.parametrize("kind", KINDS)
def test_the_cut_is_the_optimum_of_the_whole_problem(kind: str) -> None:
    model, part, batches, inputs, outputs = a_layer(kind)
    moments = moments_of(adapted(model, part), [part], batches, cross_entropy)
    found = directions(part, moments["layer"], terms_of(batches), damping=0.0)
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
        moments = moments_of(adapted(model, each), [each], batches, cross_entropy)
        found.append(directions(each, moments["layer"], terms_of(batches), damping=damping))
    assert torch.allclose(found[0].rises, found[1].rises, rtol=1e-8, atol=1e-10 * found[0].rises[0].item())
    first, second = (of.factors(2).B @ of.factors(2).A for of in found)
    assert (first - second).norm() <= 1e-8 * first.norm()


def test_strong_damping_keeps_what_is_large() -> None:
    model, part, batches, *_ = a_layer("linear")
    moments = moments_of(adapted(model, part), [part], batches, cross_entropy)
    U, sigma, Vh = torch.linalg.svd(part.B @ part.A, full_matrices=False)
    best = U[:, :2] * sigma[:2] @ Vh[:2]
    cut = directions(part, moments["layer"], terms_of(batches), damping=1e9).factors(2)
    assert (cut.B @ cut.A - best).norm() <= 1e-6 * best.norm()
    assert cut.kept == pytest.approx((sigma[:2].square().sum() / sigma.square().sum()).item(), abs=1e-9)


@contextmanager
def with_lora(family: str, **fields: Any) -> Iterator[tuple[TinyModel, Any]]:
    tiny = TinyModel(family)
    model = get_peft_model(tiny.build(), LoraConfig(r=4, lora_alpha=8, **{**tiny.targets, **fields}))
    tiny.train(model, 3)
    yield tiny, model


@pytest.mark.parametrize("kind", KINDS)
def test_factors_are_put_in_place_of_those_that_were_there(kind: str) -> None:
    model, part, batches, *_ = a_layer(kind)
    lora, smaller = adapted(model, part), replace(part, A=part.A[:2], B=part.B[:, :2])
    put(lora, "default", [smaller])
    expected = copy.deepcopy(model)
    expected.layer.weight.data += (smaller.B @ smaller.A).view_as(model.layer.weight)
    for x, _ in batches:
        torch.testing.assert_close(lora(x), expected(x))


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
        factors, (batch,) = lora_factors(model, "default"), language_batches(tiny)
        other = {**batch, "input_ids": batch["input_ids"].clone()}
        other["input_ids"][:, 0] += 1  # of the prompt
        found = [moments_of(model, factors, [each]) for each in (batch, other)]
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
        found.append(moments_of(model, lora_factors(model, "default"), [x], loss_of_tokens))
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
    factors, x = lora_factors(model, "default"), torch.randn(32, 6)
    is_first = x[:, :1] <= 0
    moments = moments_of(model, factors, [x], loss_of_tokens)
    others = moments_of(model, factors, [torch.where(is_first, x, 2 * x)], loss_of_tokens)
    assert torch.allclose(others["experts.0"].sums, moments["experts.0"].sums)
    assert not torch.allclose(others["experts.1"].sums, moments["experts.1"].sums)
    with pytest.raises(ValueError, match=r"\bexperts\.0 \(1 of 2 modules\).*--energy"):
        curve_of(model, [x[x[:, 0] > 0]], loss_of_tokens)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_batches_without_labels_count_for_nothing(family: str) -> None:
    with with_lora(family) as (tiny, model):
        (batch,) = language_batches(tiny)
        assert model_loss(model, batch)[1].sum() == 10  # tokens that are predicted
        nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
        expected, found = (curve_of(model, batches) for batches in ([batch], [nothing, batch]))
        for one, two in zip(expected.modules, found.modules, strict=True):
            assert torch.equal(one.rises, two.rises)


def test_logits_of_a_large_vocabulary_are_not_copied_whole() -> None:
    """Of 77 million logits, 147 MiB in bfloat16 and 293 MiB in float32."""
    code = (
        "import resource, torch; from lrlora.learned.moments import loss_terms, with_sampled_labels; "
        "from types import SimpleNamespace as Namespace; torch.set_num_threads(1); "
        "logits = torch.randn(4, 128, 150_000, dtype=torch.bfloat16); labels = torch.randint(150_000, (4, 128)); "
        "model = lambda labels: Namespace(logits=logits); "
        "model.loss_type = 'ForTokenClassification'; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        "loss_terms(model, logits, labels); with_sampled_labels(model, {'labels': labels}); "
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    assert int(run(code)) < 293  # MiB


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_terms_in_slices_are_those_of_the_whole(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with with_lora(family) as (tiny, model):
        (batch,) = language_batches(tiny)
        expected = model_loss(model, batch)
        monkeypatch.setattr("lrlora.learned.moments._AT_ONCE", 1)
        assert all(map(torch.allclose, model_loss(model, batch), expected))
        drawn = with_sampled_labels(model, batch)["labels"]
        assert torch.equal(drawn == -100, batch["labels"] == -100)


def test_a_module_that_no_gradient_reaches_is_kept_whole_where_all_is_kept() -> None:
    with with_lora("llama") as (tiny, model):
        (batch,), factors = language_batches(tiny), lora_factors(model, "default")
        short = {name: part[:, :2] for name, part in batch.items()} | {"labels": batch["input_ids"][:, :2]}
        curve = curve_of(model, [short])
        expected = loss_with(model, factors, [batch])
        assert loss_with(model, curve.within(curve.parameters), [batch]) == pytest.approx(expected, rel=1e-4)


def test_what_is_frozen_or_trained_stays_so() -> None:
    with with_lora("llama") as (tiny, model):
        model.get_base_model().lm_head.requires_grad_(True)
        model.zero_grad()
        trained = [p.requires_grad for p in model.parameters()]
        curve_of(model, language_batches(tiny))
        assert trained == [p.requires_grad for p in model.parameters()]
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.refused
def test_a_loss_that_says_nothing_is_refused() -> None:
    with with_lora("llama") as (tiny, model):
        (batch,) = language_batches(tiny)
        with torch.no_grad():
            model.get_base_model().lm_head.weight[7] = torch.nan
        with pytest.raises(ValueError, match=r"loss .*\bnot finite\b"):
            curve_of(model, [batch])


@pytest.mark.filterwarnings(r"ignore:bitsandbytes.*an autograd kernel was not registered:UserWarning:torch\.")
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_base_is_cut_as_it_is(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny = TinyModel("llama")
    save_quantizable(tmp_path)
    quantised = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu", quantization_config=quantised)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    batches = language_batches(tiny)
    with torch.no_grad():
        expected = model(**batches[0]).loss.item()
    curve = curve_of(model, batches)
    assert loss_with(model, curve.within(curve.parameters), batches) == pytest.approx(expected, rel=0.02)
    assert all(of.rises[0] > 0 for of in curve.modules)
