"""Layers that are not linear, against the formula: embeddings and convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from torch.func import functional_call

from lrlora import LrLoraConfig, rank_report
from lrlora.ops.form import Form
from lrlora.ops.reference import reference_delta_weight

LAYERS: dict[str, tuple[Any, Tensor]] = {
    "embedding": (nn.Embedding(11, 6, padding_idx=3), torch.randint(0, 11, (2, 5))),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), torch.randn(2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, stride=2, groups=2), torch.randn(2, 4, 9, 7)),
    "conv3d": (nn.Conv3d(2, 3, 2, dilation=2, bias=False), torch.randn(2, 2, 5, 5, 5)),
}


def adapt(layer: nn.Module, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = LrLoraConfig(**{"r": 3, "target_modules": ["0"], **fields})
    model = get_peft_model(nn.Sequential(layer), config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lrlora_B" in name:
                parameter.normal_(0, 0.01)
            if "lrlora_phi" in name:
                parameter.normal_(0, 0.3)
    return model


def reference(layer: Any) -> Tensor:
    A, B, phi = (part["default"] for part in (layer.lrlora_A, layer.lrlora_B, layer.lrlora_phi))
    gain = layer.input_gain["default"]
    return reference_delta_weight(A.weight, B.weight, phi, scaling=layer.scaling["default"], input_gain=gain)


def trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("hooked", [False, True])
def test_output_and_gradients_against_the_formula(kind: str, hooked: bool) -> None:
    base, x = LAYERS[kind]
    model = adapt(base)
    layer = model.base_model.model[0]
    weight = base.weight.double() + reference(layer).view(base.weight.shape)
    others = {name: p.double() for name, p in base.named_parameters() if name != "weight"}
    exact_x = x.double() if x.is_floating_point() else x
    expected = functional_call(base, {"weight": weight, **others}, (exact_x,))
    # A hook takes the layer to its slows down training, which calls the base layer.
    handle = base.register_forward_hook(lambda *_: None) if hooked else None
    actual = model(x)
    if handle is not None:
        handle.remove()
    torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-5)
    grad_y = torch.randn_like(actual)
    pairs = zip(
        torch.autograd.grad(actual, trainable(model), grad_y),
        torch.autograd.grad(expected, trainable(model), grad_y.double()),
        strict=True,
    )
    for got, want in pairs:
        assert (got - want).norm() <= 1e-3 * want.norm()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_update(kind: str, dtype: torch.dtype) -> None:
    base, x = LAYERS[kind]
    model = adapt(type(base)(**_arguments(base)), dtype)
    layer = model.base_model.model[0]
    x = x.to(dtype) if x.is_floating_point() else x
    update = layer._adapter_output(x, "default").double()
    delta = reference(layer).view(layer.base_layer.weight.shape)
    exact = type(base)(**{**_arguments(base), **({} if kind == "embedding" else {"bias": False})}).double()
    exact.weight.data = delta
    want = exact(x.double() if x.is_floating_point() else x)
    assert model(x).dtype == dtype
    assert (update - want).norm() <= 2e-2 * want.norm()


def _arguments(base: Any) -> dict[str, Any]:
    if isinstance(base, nn.Embedding):
        return {name: getattr(base, name) for name in ("num_embeddings", "embedding_dim", "padding_idx")}
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {**{name: getattr(base, name) for name in names}, "bias": base.bias is not None}


def test_the_padding_token_of_an_embedding_is_not_trained() -> None:
    base, _ = LAYERS["embedding"]
    model = adapt(base)
    model(torch.arange(11)).square().sum().backward()
    grad = model.base_model.model[0].lrlora_B["default"].weight.grad
    assert [i for i in range(11) if not grad[i].any()] == [3]


def test_a_scaled_embedding_scales_the_update_too() -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    base, tokens = Gemma3TextScaledWordEmbedding(11, 6, 0, embed_scale=5.0), torch.randint(1, 11, (2, 5))
    model = adapt(base)
    expected = model(tokens)
    torch.testing.assert_close(model.merge_and_unload()(tokens), expected)


def test_a_weight_that_is_shared_stays_as_it_is_for_its_other_user() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embedding(tokens))

    tokens = torch.arange(11)
    torch.manual_seed(0)
    model = get_peft_model(Tied(), LrLoraConfig(r=2, init_weights=False, target_modules=["head"]))
    expected, shared = model(tokens), model.base_model.model.embedding.weight.clone()
    model.merge_adapter()
    torch.testing.assert_close(model(tokens), expected)
    assert torch.equal(model.base_model.model.embedding.weight, shared)
    model.unmerge_adapter()
    layer = model.base_model.model.head.get_base_layer()
    assert layer.weight is model.base_model.model.embedding.weight
    torch.testing.assert_close(model.merge_and_unload()(tokens), expected)


def test_empty_batches() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        embedding = adapt(nn.Embedding(7, 6, dtype=dtype))
        assert embedding(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 6)
    assert adapt(nn.Linear(4, 3))(torch.zeros(0, 4)).shape == (0, 3)


def test_dropout_is_ignored_by_an_embedding() -> None:
    base, tokens = LAYERS["embedding"]
    with pytest.warns(UserWarning, match="slows down training"):
        model = adapt(base, lora_dropout=0.5)
    assert torch.equal(model.train()(tokens), model.eval()(tokens))


def test_dropout_acts_on_the_input_of_a_convolution() -> None:
    base, x = LAYERS["conv2d"]
    with pytest.warns(UserWarning, match="slows down training"):
        model = adapt(base, lora_dropout=0.5).train()
    assert not torch.equal(model(x), model(x))
    mean = model(x.repeat(3000, 1, 1, 1)).unflatten(0, (3000, -1)).mean(0)
    assert F.mse_loss(mean, model.eval()(x)).sqrt() < 0.02


class Squared(Form):
    """A form that lrlora does not have: ΔW = s·(BA)²."""

    def linear(self, x: Tensor, A: Tensor, B: Tensor, *, added_to: Tensor | None = None, **scales: float) -> Tensor:
        y = F.linear(x, self.delta(A, B, **scales))
        return y if added_to is None else added_to + y

    def delta(self, A: Tensor, B: Tensor, *, scaling: float, gain: float, rows: Tensor | None = None) -> Tensor:
        return scaling * ((B if rows is None else B[rows]) @ A).square()


def test_a_form_of_another_kind_needs_no_more_than_a_class() -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 5)
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    model = get_peft_model(nn.Sequential(base), LrLoraConfig(r=2, lora_alpha=4, target_modules=["0"]))
    layer: Any = model.base_model.model[0]
    layer.lrlora_phi["default"] = Squared()
    A, B = layer.lrlora_A["default"].weight, layer.lrlora_B["default"].weight
    B.data.normal_()
    x = torch.randn(3, 6)
    delta = 2 * (B @ A).square()
    torch.testing.assert_close(model(x), F.linear(x, weight + delta, bias))
    (row,) = rank_report(model).rows
    sigma = torch.linalg.svdvals(delta.detach().double())
    assert row.stable_rank == pytest.approx((sigma.square().sum() / sigma[0] ** 2).item(), rel=1e-4)
    torch.testing.assert_close(model.merge_and_unload()(x), F.linear(x, weight + delta, bias))
