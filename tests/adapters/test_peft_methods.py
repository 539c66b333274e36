"""Adapters of PEFT's methods, as their own library saves them: ranks as of an SVD of what merging adds."""

from __future__ import annotations

import re
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
    "PiSSA": peft.LoraConfig(r=4, init_lora_weights="pissa", **_ALL),
    "OLoRA": peft.LoraConfig(r=4, init_lora_weights="olora", **_ALL),
    "OLoRA, as the paper spells it": peft.LoraConfig(r=4, init_lora_weights="OLoRA", **_ALL),
    "DoRA": peft.LoraConfig(r=4, use_dora=True, **_ALL),
    "AdaLoRA": peft.AdaLoraConfig(init_r=6, target_r=4, total_step=20, **_ALL),
    "LoHa": peft.LoHaConfig(r=2, alpha=8, **_ALL),
    "LoHa, wide": peft.LoHaConfig(r=6, alpha=8, rank_pattern={"v_proj": 3}, **_ALL),
    "LoKr": peft.LoKrConfig(r=2, alpha=8, **_ALL),
    "LoKr, both sides": peft.LoKrConfig(r=2, alpha=8, decompose_both=True, decompose_factor=4, **_ALL),
    "HiRA": peft.HiraConfig(r=4, **_ALL),
    "VeRA": peft.VeraConfig(r=16, **_SQUARE),
    "RandLoRA": peft.RandLoraConfig(r=4, **_ALL),
    "FourierFT": peft.FourierFTConfig(n_frequency=50, **_ALL),
    "OFT": peft.OFTConfig(oft_block_size=8, **_ALL),
    "BOFT": peft.BOFTConfig(boft_block_size=4, **_ALL),
    "(IA)³": peft.IA3Config(target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"]),
    "HRA": peft.HRAConfig(r=4, **_ALL),
    "MiSS": peft.MissConfig(r=4, **_ALL),
    "SHiRA": peft.ShiraConfig(r=4, **_ALL),
    "C3A": peft.C3AConfig(block_size=8, **_ALL),
    "DeLoRA": peft.DeloraConfig(r=4, **_ALL),
    "WaveFT": peft.WaveFTConfig(n_frequency=50, **_ALL),
    "GraLoRA": peft.GraloraConfig(r=8, **_ALL),
    "VB-LoRA": peft.VBLoRAConfig(num_vectors=8, vector_length=8, topk=2, **_ALL),
    "TinyLoRA": peft.TinyLoraConfig(**_ALL),
    "GLoRA": peft.GloraConfig(**_ALL),
    "OSF": peft.OSFConfig(**_ALL),
    "PSOFT": peft.PsoftConfig(**_ALL),
    "PVeRA": peft.PveraConfig(**_SQUARE),
    "LR-LoRA": LrLoraConfig(r=4, **_ALL),
    "LR-LoRA, expansion": LrLoraConfig(r=2, form="expansion", num_terms=4, **_ALL),
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
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), r"\bPROMPT_TUNING\b.*no rank"),
        (peft.LNTuningConfig(target_modules=["norm"]), r"model\.norm\.weight, .*no rank"),
        (peft.UniLoraConfig(**_ALL), r"not name .*modules"),
        (peft.BeftConfig(**_ALL), "cannot merge beft"),
    ],
)
def test_what_has_no_rank_is_named(config: peft.PeftConfig, message: str, tmp_path: Path) -> None:
    adapter = save_trained(tmp_path, config)
    with pytest.raises(ValueError, match=message):
        rank_report(read_updates(adapter))


@pytest.mark.refused
def test_a_base_model_that_is_needed_and_not_there(tmp_path: Path) -> None:
    adapter = save_trained(tmp_path, METHODS["HiRA"])
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"HiRA adapter, .*base"):
        read_updates(adapter)
    assert len(read_updates(adapter, base=tmp_path / "moved")) == 6
    corda = peft.LoraConfig.from_pretrained(save_trained(tmp_path / "corda", METHODS["PiSSA"]))
    corda.init_lora_weights = "corda"
    corda.save_pretrained(tmp_path / "corda" / "adapter")
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion"):
        read_updates(tmp_path / "corda" / "adapter")


@pytest.mark.refused
def test_a_start_by_chance_is_not_read(tmp_path: Path) -> None:
    adapter = save_trained(tmp_path, peft.LoraConfig(r=4, init_lora_weights="pissa_niter_4", **_ALL))
    with pytest.raises(ValueError, match=r"init_lora_weights='pissa_niter_4'"):
        read_updates(adapter)
    result = CliRunner().invoke(app, ["export", str(adapter), "--output", str(tmp_path / "lora")])
    assert result.exit_code == 1
    assert not (tmp_path / "lora").exists()


def test_a_live_model_of_any_method() -> None:
    for method in ("LoHa", "OFT", "AdaLoRA"):
        model = get_peft_model(TINY.build(), METHODS[method])
        TINY.train(model, 3)
        report = rank_report(model)
        parameters = model.named_parameters()
        weights = {name: w.detach().clone() for name, w in parameters if name.endswith("base_layer.weight")}
        assert len(report.rows) == 6
        after = dict(model.named_parameters())
        assert all(torch.equal(after[name], weight) for name, weight in weights.items())


def test_a_start_that_changes_an_embedding(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=["embed_tokens", "q_proj"])
    adapter = save_trained(tmp_path, config)
    expected = merged_differences(tmp_path)
    for update in read_updates(adapter):
        torch.testing.assert_close(update.matrix().double(), expected[update.module], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        METHODS["PiSSA"],
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


def test_an_export_that_is_another_adapter_is_an_error(tmp_path: Path) -> None:
    tiny = TinyModel("bert")
    base = tiny.build()
    for name, parameter in base.named_parameters():
        if name.endswith("value.bias"):
            torch.nn.init.constant_(parameter, 5.0)  # whose change no LoRA has
    base.save_pretrained(tmp_path / "base")
    config = peft.IA3Config(target_modules=["value"], feedforward_modules=[], task_type="SEQ_CLS")
    model = get_peft_model(type(base).from_pretrained(tmp_path / "base"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3_l" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(tmp_path / "adapter")
    assert read_updates(tmp_path / "adapter").notes == (
        "This method also changes biases, which are included neither in the ranks nor in an exported LoRA.",
    )
    for options, code in (((), 1), (("--max-rank", "1"), 0)):
        output = tmp_path / f"lora-{code}"
        result = CliRunner().invoke(app, ["export", str(tmp_path / "adapter"), "--output", str(output), *options])
        said = "".join(result.output.split())
        assert result.exit_code == code, result.output
        assert ("Donotuseit;mergetheadapterinstead" in said) == code
        lost = re.search(r"Onrandominputs([\d.]+)%", said)
        assert lost
        assert float(lost[1]) > 50
        assert (output / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("method", ["HiRA", "(IA)³", "LoRA"])
def test_gpt2_s_layers_are_transposed(method: str, tmp_path: Path) -> None:
    tiny = TinyModel("gpt2")
    tiny.build().save_pretrained(tmp_path / "base")
    config = {
        "HiRA": peft.HiraConfig(r=4, target_modules=["c_attn"]),
        "(IA)³": peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[]),
        "LoRA": peft.LoraConfig(r=4, target_modules=["c_attn"]),
    }[method]
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
