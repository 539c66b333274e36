"""Quantised bases, as far as they run on a CPU: bitsandbytes int8 and NF4, torchao int8 and int4 weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from torch import Tensor, nn

from lrlora import LrLoraConfig, rank_report
from lrlora.tuner import LrLoraLayer

from ..conftest import relative, save_quantizable
from ..processes import run

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")
pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ("bnb-int8", "bnb-nf4", "torchao-int8", "torchao-int4")
IDS = torch.arange(3, 17).view(2, 7)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_quantizable(folder)
    return folder


def load(checkpoint: Path, kind: str | None) -> Any:
    options: dict[str, Any] = {}
    if kind is not None:
        options = {"device_map": "cpu", "quantization_config": _quantization(kind)}
    return transformers.LlamaForCausalLM.from_pretrained(checkpoint, **options).eval()


def _quantization(kind: str) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    if kind == "bnb-int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    if kind == "bnb-nf4":
        return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    if kind == "torchao-int8":
        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    # Int4WeightOnlyConfig packs for GPUs only; this stores the same four bits unpacked.
    return transformers.TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))


def adapt(model: nn.Module, form: str = LrLoraConfig.form) -> Any:
    torch.manual_seed(1)
    config = LrLoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], form=form)
    return get_peft_model(model, config).eval()


def train(model: nn.Module, steps: int = 5) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS).logits.square().mean().backward()
        optimizer.step()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


@pytest.mark.parametrize(
    ("kind", "form"), [*((kind, LrLoraConfig.form) for kind in KINDS), (next(iter(KINDS)), "expansion")]
)
def test_trains_saves_reports_and_merges(checkpoint: Path, tmp_path: Path, kind: str, form: str) -> None:
    at_start = logits(load(checkpoint, kind))
    quantisation_error = relative(at_start, logits(load(checkpoint, None)))
    assert torch.equal(logits(adapt(load(checkpoint, kind), form)), at_start)
    # A model of its own: on some CPUs, inference makes bitsandbytes pack 4-bit weights for good, and no gradient passes
    # through them from then on, whatever the adapter.
    model = adapt(load(checkpoint, kind), form)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    train(model)
    assert [name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])] == []
    learned = {p.dtype for name, p in model.named_parameters() if "lrlora_phi" in name}
    assert learned == (set() if form == "expansion" else {torch.float32})
    trained = logits(model)
    assert relative(trained, at_start) > 3 * quantisation_error
    assert all(row.relative_norm is not None and row.relative_norm > 0 for row in rank_report(model).rows)

    # Merging quantises again: as much is lost as the quantisation of the base model lost.
    model.merge_adapter()
    assert relative(logits(model), trained) <= 2 * quantisation_error
    model.unmerge_adapter()
    assert torch.equal(logits(model), trained)

    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(checkpoint, kind), tmp_path).eval()), trained)
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    assert {*load_file(tmp_path / "merged" / "adapter_model.safetensors")} == {
        *load_file(tmp_path / "adapter_model.safetensors")
    }
    merged = model.merge_and_unload()
    assert not any(isinstance(module, LrLoraLayer) for module in merged.modules())
    assert relative(logits(merged), trained) <= 2 * quantisation_error


RELOAD = """
import sys, torch, lrlora
from pathlib import Path
from peft import PeftModel
from tests.tuner.test_quantized import load, logits
checkpoint, adapter, kind, out = sys.argv[1:]
base = load(Path(checkpoint), None if kind == "none" else kind)
torch.save(logits(PeftModel.from_pretrained(base, adapter).eval()), out)
"""


def test_an_adapter_of_a_4_bit_base_on_4_bit_and_on_full_precision(checkpoint: Path, tmp_path: Path) -> None:
    model = adapt(load(checkpoint, "bnb-nf4"))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    outputs = {}
    for kind in ("bnb-nf4", "none"):
        out = tmp_path / f"{kind}.pt"
        run(RELOAD, checkpoint, tmp_path / "adapter", kind, out, cwd=Path(__file__).parents[2])
        outputs[kind] = torch.load(out)
    # Not to the bit: on a busy machine, bitsandbytes' products on a CPU have differed in the last ones.
    torch.testing.assert_close(outputs["bnb-nf4"], logits(model), rtol=1e-4, atol=1e-5)
    own = relative(logits(load(checkpoint, "bnb-nf4")), logits(load(checkpoint, None)))
    assert relative(outputs["none"], outputs["bnb-nf4"]) <= 1.5 * own


def test_after_prepare_model_for_kbit_training(checkpoint: Path) -> None:
    model = adapt(prepare_model_for_kbit_training(load(checkpoint, "bnb-nf4")))
    model.train()
    model(IDS, use_cache=False).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_bias_goes_on_training_after_merge_and_unmerge() -> None:
    import bitsandbytes

    torch.manual_seed(0)
    base = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64, bias=True, quant_type="nf4")).to("cpu")
    model = get_peft_model(base, LrLoraConfig(r=2, target_modules=["0"], bias="lora_only"))
    (bias,) = (p for name, p in model.named_parameters() if name.endswith("bias") and p.requires_grad)
    model.merge_adapter()
    model.unmerge_adapter()
    assert any(p is bias for p in model.parameters())
    model(torch.randn(3, 64)).sum().backward()
    assert bias.grad is not None


def test_a_base_quantised_by_hand_trains_and_refuses_to_merge(checkpoint: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    base = load(checkpoint, None)
    quantize_(base, Int8WeightOnlyConfig())
    model = adapt(base)
    train(model, steps=1)
    trained = logits(model)
    with pytest.raises(NotImplementedError, match=r"torchao.*unquantized"):
        model.merge_adapter()
    assert torch.equal(logits(model), trained)
