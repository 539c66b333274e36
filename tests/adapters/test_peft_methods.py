"""Adapters of PEFT's methods, as their own library saves them: ranks as of an SVD of what merging adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lrlora import LrLoraConfig, rank_report
from lrlora.adapters import factorize, read_updates, save_as_lora
from lrlora.adapters.peft_folder import SavedAdapter
from lrlora.cli import app
from lrlora.ranks import MEASURES

from ..conftest import TinyModel

# PEFT says of some methods what they do not support, or lack on this machine.
pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:peft\.")

_ALL = {"target_modules": ["q_proj", "v_proj", "up_proj"]}
_SQUARE = {"target_modules": ["q_proj", "v_proj"]}
METHODS: dict[str, peft.PeftConfig] = {
    "LoRA": peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"),
    "LoRA with patterns": peft.LoraConfig(
        r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.self_attn.v_proj": 32}, **_ALL
    ),
    "rsLoRA": peft.LoraConfig(r=4, use_rslora=True, **_ALL),
    "LoRA on an embedding": peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    "DoRA": peft.LoraConfig(r=4, use_dora=True, **_ALL),
    "LoHa": peft.LoHaConfig(r=2, alpha=8, **_ALL),
    "LoHa, wide": peft.LoHaConfig(r=6, alpha=8, rank_pattern={"v_proj": 3}, **_ALL),
    "LoKr": peft.LoKrConfig(r=2, alpha=8, **_ALL),
    "LoKr, both sides": peft.LoKrConfig(r=2, alpha=8, decompose_both=True, decompose_factor=4, **_ALL),
    "LR-LoRA": LrLoraConfig(r=4, **_ALL),
    "LR-LoRA, expansion": LrLoraConfig(r=2, form="expansion", num_terms=4, **_ALL),
}
# Methods whose update is not in their file alone.
REFUSED: dict[str, peft.PeftConfig] = {
    "init_lora_weights='pissa'": peft.LoraConfig(r=4, init_lora_weights="pissa", **_ALL),
    "init_lora_weights='OLoRA'": peft.LoraConfig(r=4, init_lora_weights="OLoRA", **_ALL),
    "ADALORA": peft.AdaLoraConfig(init_r=6, target_r=4, total_step=20, **_ALL),
    "HIRA": peft.HiraConfig(r=4, **_ALL),
    "VERA": peft.VeraConfig(r=16, **_SQUARE),
    "OFT": peft.OFTConfig(oft_block_size=8, **_ALL),
    "IA3": peft.IA3Config(target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"]),
}
TINY = TinyModel("llama")


def save_trained(folder: Path, config: peft.PeftConfig) -> Path:
    """A base model, and an adapter trained on it for a few steps, in two folders."""
    TINY.build().save_pretrained(folder / "base")
    base = type(TINY.build()).from_pretrained(folder / "base")
    torch.manual_seed(0)
    model = get_peft_model(base, config)
    TINY.train(model, 6)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def merged_differences(folder: Path) -> dict[str, torch.Tensor]:
    """Module → what PEFT adds to its weight as it merges the saved adapter, in float64."""
    bases = [type(TINY.build()).from_pretrained(folder / "base") for _ in range(2)]
    merged = PeftModel.from_pretrained(bases[0], folder / "adapter").double().merge_and_unload()
    before, after = (dict(model.double().named_parameters()) for model in (bases[1], merged))
    changes = {key.removesuffix(".weight"): after[key] - before[key] for key in before}
    return {key: change.detach() for key, change in changes.items() if change.dim() == 2 and change.norm() > 1e-9}


@pytest.mark.parametrize("method", METHODS)
def test_ranks_are_those_of_what_merging_adds_and_a_plain_lora_does_the_same(method: str, tmp_path: Path) -> None:
    """DoRA keeps its magnitudes; all others load as LoRA, and change the base model as they did."""
    adapter = save_trained(tmp_path, METHODS[method])
    updates = read_updates(adapter)
    if method != "DoRA":
        require_ranks_of(updates, merged_differences(tmp_path))
    save_as_lora(factorize(updates, energy=1.0), updates, tmp_path / "lora")
    bases = [type(TINY.build()).from_pretrained(tmp_path / "base") for _ in range(3)]
    base = TINY.logits(bases[0])
    original = TINY.logits(PeftModel.from_pretrained(bases[1], adapter))
    exported = PeftModel.from_pretrained(bases[2], tmp_path / "lora")
    assert exported.peft_config["default"].peft_type.value == "LORA"
    assert (TINY.logits(exported) - original).norm() < 2e-3 * (original - base).norm()


def require_ranks_of(updates: Any, expected: dict[str, torch.Tensor]) -> None:
    assert {update.module for update in updates} >= set(expected)
    report = rank_report(updates)
    for row in report.rows:
        if row.module not in expected:
            assert row.stable_rank < 1e-6
            continue
        delta = expected[row.module]
        assert (row.m, row.n) == tuple(delta.shape)
        energies = torch.linalg.svdvals(delta).square()
        for name, measure in MEASURES.items():
            assert getattr(row, name) == pytest.approx(measure.compute(energies), rel=1e-6), name


def test_lokr_on_a_one_dimensional_convolution(tmp_path: Path) -> None:
    base = torch.nn.Sequential(torch.nn.Conv1d(4, 8, 3))
    state = {name: value.clone() for name, value in base.state_dict().items()}
    torch.manual_seed(0)
    model = get_peft_model(base, peft.LoKrConfig(r=2, alpha=4, target_modules=["0"], init_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    updates = read_updates(tmp_path / "adapter")
    save_as_lora(factorize(updates, energy=1.0), updates, tmp_path / "lora")
    again = torch.nn.Sequential(torch.nn.Conv1d(4, 8, 3))
    again.load_state_dict(state)
    x = torch.randn(2, 4, 7)
    torch.testing.assert_close(PeftModel.from_pretrained(again, tmp_path / "lora").eval()(x), model.eval()(x))


@pytest.mark.refused
@pytest.mark.parametrize("method", REFUSED)
def test_methods_whose_file_alone_is_no_update_are_refused_by_name(method: str, tmp_path: Path) -> None:
    adapter = save_trained(tmp_path, REFUSED[method])
    way = "path_initial_model" if "init" in method else "save_as_lora"
    with pytest.raises(ValueError, match=rf"{method}.*PEFT \({way}"):
        read_updates(adapter, base=tmp_path / "base")
    result = CliRunner().invoke(app, ["export", str(adapter), "--output", str(tmp_path / "lora")])
    assert result.exit_code == 1
    assert way in "".join(result.output.split())
    assert not (tmp_path / "lora").exists()


@pytest.mark.refused
def test_what_has_no_rank_is_named(tmp_path: Path) -> None:
    adapter = save_trained(tmp_path, peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"\bPROMPT_TUNING\b.*no rank"):
        read_updates(adapter)


def test_a_live_model_of_any_method() -> None:
    for config in (METHODS["LoHa"], REFUSED["OFT"], REFUSED["ADALORA"]):
        model = get_peft_model(TINY.build(), config)
        TINY.train(model, 3)
        report = rank_report(model)
        parameters = model.named_parameters()
        weights = {name: w.detach().clone() for name, w in parameters if name.endswith("base_layer.weight")}
        assert len(report.rows) == 6
        after = dict(model.named_parameters())
        assert all(torch.equal(after[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize(
    "config",
    [
        REFUSED["init_lora_weights='pissa'"],
        peft.LoraConfig(r=4, kasa_config=peft.tuners.lora.config.KasaConfig(), **_ALL),
        peft.LoraConfig(r=4, monteclora_config=peft.tuners.lora.config.MontecloraConfig(), **_ALL),
    ],
)
def test_a_live_model_whose_base_weights_were_changed_is_not_exported_wrongly(config: peft.LoraConfig) -> None:
    model = get_peft_model(TINY.build(), config)
    with pytest.raises(ValueError, match=r"=.* more than s·BA"):
        factorize(model, energy=1.0)


def test_dora_keeps_magnitudes_where_the_direction_has_not_moved(tmp_path: Path) -> None:
    adapter = save_trained(tmp_path, METHODS["DoRA"])
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    still = [key for key in weights if "v_proj.lora_B" in key]
    save_file(weights | {key: torch.zeros_like(weights[key]) for key in still}, file)
    updates = read_updates(adapter)
    save_as_lora(factorize(updates, energy=1.0), updates, tmp_path / "lora")
    loaded = [
        PeftModel.from_pretrained(type(TINY.build()).from_pretrained(tmp_path / "base"), folder).merge_and_unload()
        for folder in (adapter, tmp_path / "lora")
    ]
    for first, second in zip(*(model.parameters() for model in loaded), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_gpt2_s_layers_are_transposed(tmp_path: Path) -> None:
    tiny = TinyModel("gpt2")
    tiny.build().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["c_attn"])
    model = get_peft_model(type(tiny.build()).from_pretrained(tmp_path / "base"), config)
    tiny.train(model, 5)
    model.save_pretrained(tmp_path / "adapter")
    bases = [type(tiny.build()).from_pretrained(tmp_path / "base") for _ in range(2)]
    merged = dict(PeftModel.from_pretrained(bases[0], tmp_path / "adapter").merge_and_unload().named_parameters())
    before = dict(bases[1].named_parameters())
    for update in read_updates(tmp_path / "adapter", base=tmp_path / "base"):
        delta = (merged[f"{update.module}.weight"] - before[f"{update.module}.weight"]).T
        torch.testing.assert_close(update.matrix().float(), delta, rtol=1e-3, atol=1e-5)


def test_an_adapter_without_weights(tmp_path: Path) -> None:
    METHODS["LoRA"].save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"no weights: adapter_model\.safetensors "):
        read_updates(tmp_path)


def test_an_adapter_of_no_linear_layer(tmp_path: Path) -> None:
    file = save_trained(tmp_path, METHODS["LR-LoRA"]) / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if ".lrlora_A." not in key}, file)
    with pytest.raises(ValueError, match="no adapted linear"):
        read_updates(tmp_path / "adapter")


def test_an_adapter_of_another_base_model(tmp_path: Path) -> None:
    for method in ("LoRA", "LR-LoRA"):
        adapter = save_trained(tmp_path / method, METHODS[method])
        tensors = load_file(tmp_path / method / "base" / "model.safetensors")
        save_file(
            {key: torch.zeros(2 * len(tensor), *tensor.shape[1:]) for key, tensor in tensors.items()},
            tmp_path / "other.safetensors",
        )
        with pytest.raises(ValueError, match=r"other\.safetensors .*: .*shape"):
            read_updates(adapter, base=tmp_path / "other.safetensors")
    one_layer = {key: tensor for key, tensor in tensors.items() if "layers.1" not in key}
    save_file(one_layer, tmp_path / "short.safetensors")
    rows = rank_report(read_updates(adapter, base=tmp_path / "short.safetensors")).rows
    assert [row.relative_norm is None for row in rows] == [row.layer == 1 for row in rows]


@pytest.mark.parametrize(("sharing", "shared"), [("module", 6), ("global", 1)])
def test_a_shared_phi_is_counted_once(sharing: str, shared: int, tmp_path: Path) -> None:
    config = LrLoraConfig(r=4, sharing=sharing, num_basis=8, **_ALL)
    updates = read_updates(save_trained(tmp_path, config))
    assert updates.origin.parameters == sum(4 * sum(update.shape) for update in updates) + 16 * shared
    for file in tmp_path.rglob("adapter_model.safetensors"):  # before training, both parts of φ are zero
        weights = load_file(file)
        save_file({key: 0 * value if "_phi" in key else value for key, value in weights.items()}, file)
        assert SavedAdapter.read(file.parent).parameters == updates.origin.parameters
