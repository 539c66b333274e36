"""What a PEFT user relies on, for every family of models. Each docstring is a row of docs/compatibility.md.

A test that is skipped for a family does not apply to it; `refused` marks those that assert a clear error.
`pytest tests/tuner/test_behaviours.py --behaviours docs/compatibility.json` writes what the table is made from.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, convert_to_lora, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lrlora import LrLoraConfig
from lrlora.tuner import LrLoraLayer

from ..conftest import TinyModel, relative
from ..processes import run

CAUSAL = ("gpt2", "llama", "mixtral")
GENERATING = (*CAUSAL, "t5")
TEXT = (*GENERATING, "bert", "roberta", "features")
TRANSFORMERS = (*TEXT, "vit")
TIED = ("gpt2", "t5")  # of the tiny models, those whose embedding and head share their weight
# One layer that is trained in full beside the adapter.
HEADS = {"bert": "classifier", "roberta": "classifier", "vit": "classifier", "mlp": "last"}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True, params=["phi", pytest.param("expansion", marks=pytest.mark.slow)])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every behaviour is that of φ(BA) and of the form that forms no m×n matrix."""
    if request.param == "expansion":
        monkeypatch.setitem(globals(), "LrLoraConfig", partial(LrLoraConfig, form="expansion", num_terms=4))
    return request.param


def only_for(tiny: TinyModel, families: tuple[str, ...], why: str) -> None:
    if tiny.family not in families:
        pytest.skip(f"does not apply: {why}")


def adapt(tiny: TinyModel, **fields: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(tiny.build(), LrLoraConfig(**{"r": 4, **tiny.targets, **fields})).eval()


def copied(make: Callable[..., Any]) -> Callable[..., Any]:
    """Make a thing once for the same arguments, and give a copy of it each time."""
    made: dict[str, Any] = {}

    def copy_of(tiny: TinyModel, *arguments: Any, **fields: Any) -> Any:
        key = f"{tiny.family} {LrLoraConfig} {arguments} {fields}"
        if key not in made:
            made[key] = make(tiny, *arguments, **fields)
        torch.manual_seed(2)  # as it would be after the training
        return copy.deepcopy(made[key])

    return copy_of


@copied
def trained(tiny: TinyModel, steps: int = 3, **fields: Any) -> Any:
    model = adapt(tiny, **fields)
    tiny.train(model, steps)
    return model


@copied
def with_two_adapters(tiny: TinyModel) -> tuple[Any, dict[str, Tensor]]:
    """A model whose active adapter is "default", and the output with each adapter and with none."""
    model = trained(tiny)
    model.add_adapter("other", LrLoraConfig(r=2, **tiny.targets, form="sinc"))
    model.set_adapter("other")
    tiny.train(model, 3)
    outputs = {"other": tiny.logits(model), "__base__": tiny.logits(tiny.build())}
    model.set_adapter("default")
    outputs["default"] = tiny.logits(model)
    assert not torch.allclose(outputs["default"], outputs["other"])
    return model, outputs


def without_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def base_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lrlora_" not in name}


def test_start(tiny: TinyModel) -> None:
    """starts as the base model, to the bit"""
    assert torch.equal(tiny.logits(adapt(tiny)), tiny.logits(tiny.build()))


def test_training_moves_everything(tiny: TinyModel) -> None:
    """every trainable tensor trains, the base model does not"""
    model = adapt(tiny)
    base, before = base_state(model), {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert all("lrlora_" in name and ".default." in name for name in before)
    tiny.train(model, 10)
    assert [name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])] == []
    assert all(torch.equal(tensor, base[name]) for name, tensor in base_state(model).items())


RELOAD = """
import sys, torch
from peft import PeftModel
import lrlora
from tests.conftest import TinyModel
family, adapter, out = sys.argv[1:]
tiny = TinyModel(family)
torch.save(tiny.logits(PeftModel.from_pretrained(tiny.build(), adapter).eval()), out)
"""


def test_new_process(tiny: TinyModel, tmp_path: Path) -> None:
    """saved as safetensors, loaded in a new process: identical output"""
    model = trained(tiny)
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    run(RELOAD, tiny.family, tmp_path / "adapter", tmp_path / "logits.pt", cwd=Path(__file__).parents[2])
    assert torch.equal(torch.load(tmp_path / "logits.pt"), tiny.logits(model))


def test_selected_adapters(tiny: TinyModel, tmp_path: Path) -> None:
    """saves selected adapters only"""
    model, outputs = with_two_adapters(tiny)
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert not (tmp_path / "adapter_model.safetensors").exists()
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path / "other").eval()
    assert torch.equal(tiny.logits(loaded), outputs["other"])


def test_nested_names(tiny: TinyModel, tmp_path: Path) -> None:
    """adapter names that contain each other"""
    names = ["adapter", "adapter_2", "my_adapter"]
    model = get_peft_model(tiny.build(), LrLoraConfig(r=2, **tiny.targets), adapter_name=names[0]).eval()
    outputs = {}
    for name in names:
        if name != names[0]:
            model.add_adapter(name, LrLoraConfig(r=2, **tiny.targets))
        model.set_adapter(name)
        tiny.train(model, 2)
        outputs[name] = tiny.logits(model)
    model.save_pretrained(tmp_path)
    for name in names:
        loaded = PeftModel.from_pretrained(tiny.build(), tmp_path / name).eval()
        assert torch.equal(tiny.logits(loaded), outputs[name])


def test_low_cpu_mem_usage(tiny: TinyModel, tmp_path: Path) -> None:
    """`low_cpu_mem_usage`"""
    model = trained(tiny)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)], ids=str
)
def test_merge(tiny: TinyModel, dtype: torch.dtype, tolerance: float) -> None:
    """merge and unload in float32, bfloat16, float16"""
    model = trained(tiny).to(dtype)
    inputs = {k: v.to(dtype) for k, v in tiny.inputs().items() if v.is_floating_point()}
    expected = tiny.logits(model, **inputs)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, LrLoraLayer) for module in merged.modules())
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in tiny.build().named_parameters()}
    assert tiny.logits(merged, **inputs).dtype == dtype
    assert relative(tiny.logits(merged, **inputs), expected) <= tolerance


def test_safe_merge(tiny: TinyModel) -> None:
    """a safe merge that would give NaN is refused, base weights untouched; any other merges, and warns"""
    model = trained(tiny)
    [*(p for name, p in model.named_parameters() if "lrlora_B" in name)][-1].data[0, 0] = float("nan")
    base = base_state(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"non-finite.*nothing"):
            merge(safe_merge=True)
    assert all(torch.equal(tensor, base[name]) for name, tensor in base_state(model).items())
    with pytest.warns(UserWarning, match="safe_merge=True"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert all(torch.equal(tensor, base[name]) for name, tensor in base_state(model).items())


def test_merge_several(tiny: TinyModel) -> None:
    """merging several adapters: one by one as at once; twice changes nothing; unmerge restores every bit"""
    model, _ = with_two_adapters(tiny)
    base = base_state(model)
    model.base_model.set_adapter(["default", "other"])
    both = tiny.logits(model)
    model.merge_adapter(["default", "other"])
    at_once = tiny.logits(model)
    assert relative(at_once, both) <= 1e-4
    model.merge_adapter(["default", "other"])
    assert torch.equal(tiny.logits(model), at_once)
    model.unmerge_adapter()
    assert all(torch.equal(tensor, base[name]) for name, tensor in base_state(model).items())
    model.merge_adapter(["default"])
    model.merge_adapter(["other"])
    assert relative(tiny.logits(model), at_once) <= 1e-5


def test_disable(tiny: TinyModel) -> None:
    """disabling: plain, nested, and while merged"""
    model, base = trained(tiny), tiny.logits(tiny.build())
    adapted = tiny.logits(model)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), base)
        with model.disable_adapter():
            assert torch.equal(tiny.logits(model), base)
    assert torch.equal(tiny.logits(model), adapted)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), base)


def test_delete(tiny: TinyModel) -> None:
    """deleting: an inactive, the active, a merged, an unknown adapter"""
    model, outputs = with_two_adapters(tiny)
    with pytest.raises(ValueError, match="nobody"):
        model.delete_adapter("nobody")
    model.delete_adapter("other")
    assert torch.equal(tiny.logits(model), outputs["default"])
    assert not any(".other." in name for name, _ in model.named_parameters())
    model, outputs = with_two_adapters(tiny)
    model.delete_adapter("default")
    assert torch.equal(tiny.logits(model), outputs["other"])
    model.merge_adapter(["other"])
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("other")


def test_unload(tiny: TinyModel) -> None:
    """unload gives the base model back"""
    unloaded = trained(tiny).unload()
    assert torch.equal(tiny.logits(unloaded), tiny.logits(tiny.build()))
    assert unloaded.state_dict().keys() == tiny.build().state_dict().keys()


def test_switch(tiny: TinyModel) -> None:
    """several adapters: switching, and several active at once"""
    model, outputs = with_two_adapters(tiny)
    for name in ("other", "default"):
        model.set_adapter(name)
        assert torch.equal(tiny.logits(model), outputs[name])
    model.base_model.set_adapter(["default", "other"])
    both = tiny.logits(model)
    model.merge_adapter(["default", "other"])
    assert relative(tiny.logits(model), both) <= 1e-4


@pytest.mark.refused
def test_add_weighted_adapter(tiny: TinyModel) -> None:
    """`add_weighted_adapter`: names exports as plain LoRA, or merging, as the remedy"""
    model, _ = with_two_adapters(tiny)
    with pytest.raises(NotImplementedError, match=r"lrlora export.*merge_and_unload"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both")


def test_mixed_batch(tiny: TinyModel) -> None:
    """an adapter for each sample of a batch (`adapter_names=`)"""
    model, outputs = with_two_adapters(tiny)
    for names in (["default", "other"], ["__base__", "default"], ["other", "__base__"]):
        expected = torch.stack([outputs[name][i] for i, name in enumerate(names)])
        torch.testing.assert_close(tiny.logits(model, adapter_names=names), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(tiny.logits(model), outputs["default"])
    with pytest.raises(ValueError, match=r"nobody.*default, other"):
        tiny.logits(model, adapter_names=["default", "nobody"])
    with pytest.raises(ValueError, match="for a batch of 2"):
        tiny.logits(model, adapter_names=["default"])
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        tiny.logits(model.train(), adapter_names=["default", "other"])
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match=r"unmerge_adapter\(\)"):
        tiny.logits(model, adapter_names=["default", "other"])


@pytest.mark.parametrize("beams", [1, 2])
def test_mixed_generation(tiny: TinyModel, beams: int) -> None:
    """generate with an adapter for each sample, with and without beams"""
    only_for(tiny, GENERATING, "does not generate")
    model, _ = with_two_adapters(tiny)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lrlora_B" in name:
            parameter.data.normal_(0, 0.5)  # the two adapters now say very different things
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": beams, "do_sample": False}
    ids = tiny.inputs()["input_ids"]
    mixed = model.generate(input_ids=ids, adapter_names=["default", "other"], **options)
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = [model.generate(input_ids=ids[row : row + 1], **options)[0] for row in range(2)]
    assert not torch.equal(alone["default"][0], alone["other"][0])
    for row, name in enumerate(["default", "other"]):
        assert torch.equal(mixed[row], alone[name][row])


def test_requires_grad(tiny: TinyModel, form: str) -> None:
    """`requires_grad` follows the active adapter, disabling and `inference_mode`"""
    model, _ = with_two_adapters(tiny)
    for active, idle in (("other", "default"), ("default", "other")):
        model.set_adapter(active)
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trainable
        assert all(f".{active}." in name and f".{idle}." not in name for name in trainable)
        learned = ["lrlora_A", "lrlora_B"] + ["lrlora_phi"] * (form == "phi" or active == "other")
        assert all(any(part in name for name in trainable) for part in learned)
    with model.disable_adapter():
        assert not any(p.requires_grad for p in model.parameters())
    assert any(p.requires_grad for p in model.parameters())
    frozen = adapt(tiny, inference_mode=True)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_modules_to_save(tiny: TinyModel, tmp_path: Path) -> None:
    """`modules_to_save`"""
    only_for(tiny, tuple(HEADS), "no head of its own")
    targets = {"target_modules": ["first"]} if tiny.family == "mlp" else {}
    model = trained(tiny, **targets, modules_to_save=[HEADS[tiny.family]])
    model.save_pretrained(tmp_path)
    assert any(HEADS[tiny.family] in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path).eval()
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def test_trainable_tokens(tiny: TinyModel, tmp_path: Path) -> None:
    """`trainable_token_indices`"""
    only_for(tiny, TEXT, "no tokens")
    tokens = tiny.inputs()["input_ids"][0, :2].tolist()
    name = {"gpt2": "wte", "t5": "shared"}.get(
        tiny.family, "embed_tokens" if tiny.family in CAUSAL else "word_embeddings"
    )
    model = trained(tiny, trainable_token_indices={name: tokens})
    embedding = model.get_input_embeddings()
    before = tiny.build().get_input_embeddings().weight
    after = embedding(torch.arange(100))
    moved = [i for i in range(100) if not torch.equal(after[i], before[i])]
    assert set(moved) == set(tokens)
    model.save_pretrained(tmp_path)
    loaded, expected = PeftModel.from_pretrained(tiny.build(), tmp_path).eval(), tiny.logits(model)
    assert torch.equal(tiny.logits(loaded), expected)
    assert relative(tiny.logits(model.merge_and_unload()), expected) <= 1e-5
    assert torch.equal(tiny.logits(loaded.unload()), tiny.logits(tiny.build()))


def test_layer_indexing(tiny: TinyModel) -> None:
    """`layers_to_transform` and `exclude_modules`"""
    only_for(
        tiny, ("bert", "roberta", "gpt2", "llama", "mixtral", "vit", "features"), "no stack of layers of that name"
    )
    names = {"gpt2": ["c_attn", "c_proj"], "vit": ["query", "value"], "llama": ["q_proj", "v_proj"]}
    names["mixtral"] = names["llama"]
    targets = names.get(tiny.family, ["query", "value"])
    if tiny.family == "vit":
        linear = [n.rpartition(".")[2] for n, m in tiny.build().named_modules() if isinstance(m, nn.Linear)]
        targets = sorted(set(linear) & {"q_proj", "v_proj", "query", "value"})
    model = adapt(tiny, target_modules=targets, layers_to_transform=[1], exclude_modules=[targets[1]])
    adapted = [name for name, module in model.named_modules() if isinstance(module, LrLoraLayer)]
    assert adapted
    assert all(".1." in name and name.endswith(targets[0]) for name in adapted)


def test_bias(tiny: TinyModel, tmp_path: Path) -> None:
    """`bias`: none, all, lora_only, trained and saved"""
    if not any(name.endswith(".bias") for name, _ in tiny.build().named_parameters()):
        pytest.skip("does not apply: no biases")
    for bias in ("none", "all", "lora_only"):
        model = trained(tiny, bias=bias)
        trainable = {name for name, p in model.named_parameters() if p.requires_grad and "bias" in name}
        assert bool(trainable) == (bias != "none")
        if bias == "lora_only":
            assert all("base_layer" in name for name in trainable)
        model.save_pretrained(tmp_path / bias)
        loaded = PeftModel.from_pretrained(tiny.build(), tmp_path / bias).eval()
        assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def test_tied_weights(tiny: TinyModel) -> None:
    """tied embeddings: merging the head leaves the embedding alone"""
    only_for(tiny, TIED, "nothing tied")
    model = trained(tiny, target_modules=["lm_head", "c_attn", "q"])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    expected, embedding = tiny.logits(model), model.get_input_embeddings().weight.clone()
    model.merge_adapter()
    assert relative(tiny.logits(model), expected) <= 1e-5
    model.unmerge_adapter()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(tiny.logits(model), expected)
    merged = model.merge_and_unload()
    assert relative(tiny.logits(merged), expected) <= 1e-5
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    assert merged.config.tie_word_embeddings is False


@pytest.mark.parametrize("autocast", [True, False])
def test_adapter_dtype(tiny: TinyModel, autocast: bool, form: str) -> None:
    """`autocast_adapter_dtype` on and off, on a bfloat16 model: φ stays float32"""
    base = tiny.build().to(torch.bfloat16)
    model = get_peft_model(base, LrLoraConfig(r=4, **tiny.targets), autocast_adapter_dtype=autocast)
    dtypes = {name: p.dtype for name, p in model.named_parameters() if "lrlora_" in name}
    if form == "phi":
        assert {dtype for name, dtype in dtypes.items() if "lrlora_phi" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "lrlora_phi" not in name} == {
        torch.float32 if autocast else torch.bfloat16
    }
    inputs = {k: v.to(torch.bfloat16) for k, v in tiny.inputs().items() if v.is_floating_point()}
    assert tiny.output(model, **inputs).dtype == torch.bfloat16
    tiny.loss(model, **inputs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_autocast(tiny: TinyModel) -> None:
    """training under `torch.autocast`"""
    model = trained(tiny)
    expected = tiny.logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative(tiny.logits(model), expected) < 0.05
        loss = tiny.loss(model.train())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_grad_scaler(tiny: TinyModel) -> None:
    """float16 `torch.autocast` with `GradScaler`: a step that overflows is skipped, the next ones train"""
    model = trained(tiny).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)

    def step(scaler: torch.amp.GradScaler) -> list[Tensor]:
        """How far every parameter moved."""
        before = [p.detach().clone() for p in parameters]
        with torch.autocast("cpu", dtype=torch.float16):
            loss = tiny.loss(model)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return [p.detach() - old for p, old in zip(parameters, before, strict=True)]

    overflowing = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    assert not any(move.any() for move in step(overflowing))
    assert overflowing.get_scale() == 2.0**59
    tiny.loss(without_dropout(model)).backward()
    expected = torch.cat([-0.1 * p.grad.flatten() for p in parameters])
    optimizer.zero_grad()
    moved = torch.cat([move.flatten() for move in step(torch.amp.GradScaler("cpu", init_scale=2.0**8))])
    assert relative(moved, expected) <= 0.05


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(tiny: TinyModel, reentrant: bool) -> None:
    """gradient checkpointing, reentrant and not: the same gradients"""
    only_for(tiny, TRANSFORMERS, "the model has none")
    model = without_dropout(trained(tiny))
    if not model.supports_gradient_checkpointing:
        pytest.skip("does not apply: the model has none")
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        options = {"use_cache": False} if tiny.family in GENERATING else {}
        tiny.loss(model.train(), **options).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for without, with_checkpoints in zip(*gradients, strict=True):
        assert without.norm() > 0
        assert relative(with_checkpoints, without) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_generate(tiny: TinyModel, dtype: torch.dtype) -> None:
    """generate: greedy, beams, half precision"""
    only_for(tiny, GENERATING, "does not generate")
    model = trained(tiny).to(dtype)
    ids = tiny.inputs()["input_ids"]
    for beams in (1, 3):
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, "do_sample": False}
        tokens = model.generate(input_ids=ids, **options)
        assert tokens.shape[1] == (6 if tiny.family == "t5" else 12)
        assert torch.equal(model.generate(input_ids=ids, use_cache=False, **options), tokens)
    model = trained(tiny)
    expected = model.generate(input_ids=ids, **options)
    assert torch.equal(model.merge_and_unload().generate(input_ids=ids, **options), expected)


def test_inputs_embeds(tiny: TinyModel) -> None:
    """`inputs_embeds`"""
    only_for(tiny, TEXT, "no embeddings")
    model = trained(tiny)
    expected, inputs = tiny.logits(model), tiny.inputs()
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    with torch.no_grad():
        output = model(**inputs)
    assert torch.equal(getattr(output, "logits", getattr(output, "last_hidden_state", None)), expected)


@pytest.mark.parametrize("mode", ["training", pytest.param("inference", marks=pytest.mark.slow)])
def test_compile(tiny: TinyModel, mode: str) -> None:
    """`torch.compile` of the whole model, training and inference, without a graph break"""
    model = without_dropout(trained(tiny)).train(mode == "training")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    trainable = [p for p in model.parameters() if p.requires_grad]
    if mode == "inference":
        assert relative(tiny.logits(compiled), tiny.logits(model)) <= 1e-5
        return
    for actual, expected in zip(
        *(torch.autograd.grad(tiny.loss(candidate), trainable) for candidate in (compiled, model)), strict=True
    ):
        assert expected.norm() > 0
        assert relative(actual, expected) <= 1e-4


def test_embedding(tiny: TinyModel, tmp_path: Path) -> None:
    """embeddings"""
    only_for(tiny, TEXT, "no embedding")
    name = {"gpt2": "wte", "t5": "embed_tokens"}.get(
        tiny.family, "embed_tokens" if tiny.family in CAUSAL else "word_embeddings"
    )
    model = trained(tiny, target_modules=[name])
    expected = tiny.logits(model)
    assert not torch.allclose(expected, tiny.logits(tiny.build()))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert torch.equal(tiny.logits(PeftModel.from_pretrained(tiny.build(), tmp_path).eval()), expected)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), tiny.logits(tiny.build()))
    assert relative(tiny.logits(model.merge_and_unload()), expected) <= 1e-5


def test_convolution(tiny: TinyModel, tmp_path: Path) -> None:
    """convolutions"""
    only_for(tiny, ("vit",), "no convolution")
    model = trained(tiny, target_modules=["projection"])
    expected = tiny.logits(model)
    assert not torch.allclose(expected, tiny.logits(tiny.build()))
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny.logits(PeftModel.from_pretrained(tiny.build(), tmp_path).eval()), expected)
    assert relative(tiny.logits(model.merge_and_unload()), expected) <= 1e-5


def test_copy(tiny: TinyModel) -> None:
    """`copy.deepcopy`, and `state_dict` into a new model"""
    model = trained(tiny)
    expected = tiny.logits(model)
    duplicate = copy.deepcopy(model)
    tiny.train(duplicate, 1)
    assert torch.equal(tiny.logits(model), expected)
    fresh = adapt(tiny)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(tiny.logits(fresh), expected)


def test_inject(tiny: TinyModel) -> None:
    """`inject_adapter_in_model`, without a PeftModel around"""
    model = inject_adapter_in_model(LrLoraConfig(r=2, **tiny.targets), tiny.build()).eval()
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.build()))
    tiny.train(model, 1)
    assert not torch.equal(tiny.logits(model), tiny.logits(tiny.build()))


def test_convert_to_lora(tiny: TinyModel) -> None:
    """PEFT's `convert_to_lora`"""
    model = trained(tiny)
    expected = tiny.logits(model)
    config, weights = convert_to_lora(model, rank=1.0)
    lora = get_peft_model(tiny.build(), config).eval()
    for name, weight in weights.items():
        path = name if name.startswith("base_model") else f"base_model.model.{name}"
        parameter = lora.get_parameter(path.replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default"))
        parameter.data.copy_(weight)
    assert relative(tiny.logits(lora), expected) <= 1e-3


def test_export(tiny: TinyModel) -> None:
    """`torch.export`"""
    model = trained(tiny, steps=1)
    inputs: dict[str, Any] = {**tiny.inputs(), **({"use_cache": False} if tiny.family in GENERATING else {})}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, strict=False)
        actual: Any = program.module()(**inputs)
    actual = actual if isinstance(actual, Tensor) else actual.get("logits", actual.get("last_hidden_state"))
    assert relative(actual, tiny.logits(model)) <= 1e-5


def functional(model: Any, tiny: TinyModel) -> Callable[[dict[str, Tensor]], Tensor]:
    """A loss as a function of the trained parameters."""

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        output: Any = torch.func.functional_call(model, parameters, (), tiny.inputs())
        return getattr(output, "logits", getattr(output, "last_hidden_state", output)).square().mean()

    return loss


@pytest.mark.refused
def test_functorch(tiny: TinyModel, form: str) -> None:
    """`torch.func` transforms of φ(BA)"""
    if form != "phi":
        pytest.skip("does not apply: another row")
    model = trained(tiny, steps=1)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    with pytest.raises(NotImplementedError, match=r"torch\.func .*merge_and_unload"):
        torch.func.grad(functional(model, tiny))(parameters)


def test_functorch_of_an_expansion(tiny: TinyModel) -> None:
    """`torch.func` transforms of an expansion"""
    if tiny.family == "mixtral":
        pytest.skip("does not apply: PyTorch's grouped matmul of experts has no forward mode")
    model = trained(tiny, steps=1, form="expansion")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = functional(model, tiny)
    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}
    detached = {name: p.detach() for name, p in parameters.items()}
    for actual, wanted in zip(torch.func.grad(loss)(detached).values(), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)
    with sdpa_kernel(SDPBackend.MATH):  # of PyTorch's own attention, the others have no forward mode
        _, slope = torch.func.jvp(loss, (detached,), (direction,))
    along = sum((g * d).sum() for g, d in zip(expected, direction.values(), strict=True))
    torch.testing.assert_close(slope, along, rtol=1e-3, atol=1e-5)


@pytest.mark.refused
def test_beside_lora(tiny: TinyModel) -> None:
    """LR-LoRA and LoRA on one model"""
    lora = {"r": 2, **tiny.targets}
    model = adapt(tiny)
    with pytest.raises(ValueError, match=r"(?i)\bpeft types\b"):
        model.add_adapter("lora", LoraConfig(**lora))
    with pytest.raises(ValueError, match="LRLORA"):
        PeftMixedModel(tiny.build(), LrLoraConfig(**lora))
    with pytest.raises(ValueError, match=r"\blora .*merge_and_unload"):
        inject_adapter_in_model(LrLoraConfig(**lora), get_peft_model(tiny.build(), LoraConfig(**lora)).base_model.model)
