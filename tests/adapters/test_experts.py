"""Adapters of experts that are stacked in one parameter."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from lrlora import rank_report
from lrlora.adapters import factorize, read_updates, save_as_lora
from lrlora.adapters.servers import SERVERS
from lrlora.cli import app

from ..conftest import EXPERTS

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
SIZES |= {"vocab_size": 100, "head_dim": 16, "num_experts_per_tok": 2}
CONFIGS = {
    "mixtral": lambda: transformers.MixtralConfig(intermediate_size=48, num_local_experts=4, **SIZES),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(moe_intermediate_size=24, num_experts=6, **SIZES),
    # Its parameters are (experts, inputs, outputs), those of the others (experts, outputs, inputs).
    "gpt-oss": lambda: transformers.GptOssConfig(intermediate_size=40, num_local_experts=4, **SIZES),
}
TOKENS = torch.arange(64).view(2, 32)
R = 4


class Mixture:
    """A model in a folder, and a trained adapter of its experts and queries."""

    def __init__(self, kind: str, folder: Path) -> None:
        torch.manual_seed(0)
        self.base, self.folder = folder / "base", folder / "adapter"
        transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]()).save_pretrained(self.base)
        config = LoraConfig(r=R, lora_alpha=8, target_modules=["q_proj"], target_parameters=EXPERTS)
        config.task_type = "CAUSAL_LM"
        self.model: Any = get_peft_model(self.load(), config)
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=2e-2)
        for _ in range(5):
            self.model(input_ids=TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        self.save()

    def load(self) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(self.base)

    def save(self) -> None:
        self.model.save_pretrained(self.folder)

    def outputs(self, folder: Path | None = None) -> Tensor:
        """Logits with an adapter that PEFT alone loads, by default the trained one."""
        with torch.no_grad():
            model = self.model if folder is None else PeftModel.from_pretrained(self.load(), str(folder))
            return model.eval()(input_ids=TOKENS).logits

    def stacks(self) -> dict[str, Any]:
        """Wrappers by the path of their parameter."""
        wrappers = {path: m for path, m in self.model.named_modules() if hasattr(m, "parameter_name")}
        return {
            f"{path.removeprefix('base_model.model.').replace('.base_layer', '')}.{wrapper.parameter_name}": wrapper
            for path, wrapper in wrappers.items()
        }

    def deltas(self) -> dict[str, Tensor]:
        """ΔW of each parameter, (experts, outputs, inputs)."""
        deltas = {path: wrapper.get_delta_weight("default").detach() for path, wrapper in self.stacks().items()}
        is_transposed = self.model.config.model_type == "gpt_oss"
        return {path: delta.mT if is_transposed else delta for path, delta in deltas.items()}


@pytest.fixture(params=[*CONFIGS])
def mixture(request: pytest.FixtureRequest, tmp_path: Path) -> Mixture:
    return Mixture(request.param, tmp_path)


@pytest.fixture
def mixtral(tmp_path: Path) -> Mixture:
    return Mixture("mixtral", tmp_path)


def test_updates_are_those_of_the_model_and_need_its_configuration_alone(mixture: Mixture) -> None:
    deltas, live = mixture.deltas(), {row.module: row for row in rank_report(mixture.model).rows}
    (mixture.base / "model.safetensors").unlink()
    updates = {update.module: update for update in read_updates(mixture.folder, base=mixture.base)}
    for path, experts in deltas.items():
        for index, delta in enumerate(experts):
            assert updates[f"{path}.{index}"].shape == delta.shape
            assert torch.allclose(updates[f"{path}.{index}"].matrix(), delta, atol=1e-6)
    rows = {row.module: row for row in rank_report(read_updates(mixture.folder)).rows}
    assert rows.keys() == live.keys() == updates.keys()
    for module, row in rows.items():
        assert row.stable_rank == pytest.approx(live[module].stable_rank, rel=1e-4)
        assert row.r == live[module].r == R


def test_an_export_without_loss_has_the_outputs_of_the_adapter(mixture: Mixture, tmp_path: Path) -> None:
    updates = read_updates(mixture.folder)
    save_as_lora(factorize(updates, energy=1.0), updates, tmp_path / "export")
    expected = mixture.outputs()
    assert not torch.allclose(mixture.load()(TOKENS).logits, expected, atol=1e-2)
    assert torch.allclose(mixture.outputs(tmp_path / "export"), expected, atol=1e-4)


def test_a_cut_keeps_the_leading_directions_of_each_expert_and_reloads(mixture: Mixture, tmp_path: Path) -> None:
    updates, energy = read_updates(mixture.folder), 0.9
    pairs = {pair.module: pair for pair in factorize(updates, energy=energy)}
    save_as_lora([*pairs.values()], updates, tmp_path / "export")
    again = {update.module: update.matrix() for update in read_updates(tmp_path / "export")}
    assert min(pair.rank for pair in pairs.values()) < R
    for path, experts in mixture.deltas().items():
        U, sigma, Vh = torch.linalg.svd(experts.double(), full_matrices=False)
        kept = sigma.square().sum(0).cumsum(0) / sigma.square().sum()
        rank = int((kept < energy).sum()) + 1
        assert pairs[path].rank == rank
        assert pairs[path].kept == pytest.approx(kept[rank - 1].item(), rel=1e-4)
        assert pairs[path].parameters == rank * len(experts) * sum(experts.shape[1:])
        cut = (U[..., :rank] * sigma[:, None, :rank]) @ Vh[:, :rank]
        stored = torch.stack([again[f"{path}.{index}"] for index in range(len(experts))])
        assert torch.allclose(stored.double(), cut, atol=1e-5)
    # PEFT computes with what was cut.
    for path, layer in mixture.model.named_modules():
        if "default" in getattr(layer, "lora_A", {}):
            stack = next((name for name, wrapper in mixture.stacks().items() if wrapper is layer), None)
            pair = pairs[stack or path.removeprefix("base_model.model.")]
            layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = pair.weights
            layer.scaling["default"] = 1.0
    assert torch.allclose(mixture.outputs(tmp_path / "export"), mixture.outputs(), atol=1e-5)


def test_ranks_do_not_depend_on_the_split_of_a_product(mixtral: Mixture) -> None:
    before = factorize(read_updates(mixtral.folder), energy=0.9)
    for wrapper in mixtral.stacks().values():
        A, B = (factor["default"].weight.data for factor in (wrapper.lora_A, wrapper.lora_B))
        for expert in range(4):
            mix = torch.randn(R, R) + 3 * torch.eye(R)
            A[expert * R : (expert + 1) * R] = mix @ A[expert * R : (expert + 1) * R]
            B[:, expert::4] = B[:, expert::4] @ torch.linalg.inv(mix)
    mixtral.save()
    after = factorize(read_updates(mixtral.folder), energy=0.9)
    for one, other in zip(before, after, strict=True):
        assert one.rank == other.rank
        assert torch.allclose(one.B[:, :1], other.B[:, :1], atol=1e-4) or torch.allclose(
            one.B[:, :1], -other.B[:, :1], atol=1e-4
        )


def test_experts_and_parameters_without_an_update_keep_their_place(mixtral: Mixture, tmp_path: Path) -> None:
    """Files name parameters by position, so one that is left out would give its name to another."""
    wrappers = mixtral.stacks()
    for path, wrapper in wrappers.items():
        B = wrapper.lora_B["default"].weight.data
        if "gate_up_proj" in path:
            B.zero_()
        else:
            B[:, 1::4] = 0
    mixtral.save()
    updates = read_updates(mixtral.folder)
    for options in ({"energy": 0.9}, {"budget": 4_000}):
        pairs = factorize(updates, **options)
        assert sum(pair.parameters for pair in pairs) <= options.get("budget", 1e9)
        assert {pair.rank for pair in pairs if "gate_up_proj" in pair.module} == {1}
        folder = tmp_path / "-".join(options)
        save_as_lora(pairs, updates, folder)
        effect = mixtral.outputs() - mixtral.load()(TOKENS).logits
        assert (mixtral.outputs(folder) - mixtral.outputs()).norm() < 0.5 * effect.norm()


def test_a_budget_is_kept(mixture: Mixture) -> None:
    updates = read_updates(mixture.folder)
    smallest = sum(pair.parameters_per_rank for pair in factorize(updates, max_rank=1) if "experts" in pair.module)
    for budget in (smallest, 2 * smallest):
        pairs = factorize(updates, budget=budget)
        assert 0.7 * budget < sum(pair.parameters for pair in pairs) <= budget
        assert min(pair.rank for pair in pairs if "experts" in pair.module) == 1
    with pytest.raises(ValueError, match=f"{smallest:,}"):
        factorize(updates, budget=smallest - 1)


def test_inputs_and_outputs_that_are_exchanged_are_refused(mixtral: Mixture) -> None:
    file = mixtral.folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "experts.base_layer" in key and "lora_A" in key)
    A, B = tensors[key], tensors[key.replace("lora_A", "lora_B")]
    tensors |= {key: torch.zeros(len(A), len(B)), key.replace("lora_A", "lora_B"): torch.zeros(A.shape[1], B.shape[1])}
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"gate_up_proj.*\b16 × 32.*\b16 × 96.*0\.18"):
        read_updates(mixtral.folder)


@pytest.mark.parametrize("change", ["no name", "no folder", "another model", "another rank"])
def test_a_base_model_that_does_not_fit_is_named(mixtral: Mixture, change: str, tmp_path: Path) -> None:
    config = json.loads((mixtral.folder / "adapter_config.json").read_text())
    if change == "another model":
        shutil.rmtree(mixtral.base)
        sizes = {"vocab_size": 50, "n_embd": 8, "n_layer": 1, "n_head": 1}
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(mixtral.base)
    elif change == "another rank":
        config["r"] = 3
    else:
        config["base_model_name_or_path"] = None if change == "no name" else str(tmp_path / "nowhere")
    (mixtral.folder / "adapter_config.json").write_text(json.dumps(config))
    messages = {"no name": "--base", "no folder": "nowhere.*--base", "another model": str(mixtral.base)}
    with pytest.raises(ValueError, match=messages.get(change, "r = 3")):
        read_updates(mixtral.folder)
    if change == "no name":
        assert len(read_updates(mixtral.folder, base=mixtral.base)) == 18


def test_norms_are_relative_to_the_weights_where_these_are_stacked_too(tmp_path: Path) -> None:
    mixture = Mixture("gpt-oss", tmp_path)
    live = {row.module: row.relative_norm for row in rank_report(mixture.model).rows}
    for row in rank_report(read_updates(mixture.folder, base=mixture.base)).rows:
        assert row.relative_norm == pytest.approx(live[row.module], rel=1e-4)


@pytest.mark.parametrize("base", ["AutoModel", "AutoModelForSequenceClassification"])
def test_a_base_model_of_another_class_than_the_adapter_s(base: str, mixtral: Mixture, tmp_path: Path) -> None:
    model: Any = getattr(transformers, base).from_pretrained(mixtral.base)
    model.config.pad_token_id = 0
    task = "SEQ_CLS" if "Sequence" in base else "FEATURE_EXTRACTION"
    config = LoraConfig(r=R, target_modules=[], target_parameters=EXPERTS, init_lora_weights=False, task_type=task)
    adapted: Any = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "other")
    updates = read_updates(tmp_path / "other", base=mixtral.base)
    save_as_lora(factorize(updates, energy=1.0), updates, tmp_path / "export")
    again: Any = getattr(transformers, base).from_pretrained(mixtral.base)
    again.config.pad_token_id = 0
    again.load_state_dict(model.state_dict(), strict=False)  # the new head
    with torch.no_grad():
        outputs = [
            m.eval()(input_ids=TOKENS)[0] for m in (adapted, PeftModel.from_pretrained(again, tmp_path / "export"))
        ]
    assert torch.allclose(*outputs, atol=1e-4)


def test_a_start_that_changes_the_base_is_refused(mixtral: Mixture) -> None:
    config = json.loads((mixtral.folder / "adapter_config.json").read_text())
    (mixtral.folder / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    with pytest.raises(ValueError, match="init_lora_weights"):
        read_updates(mixtral.folder)


def test_factors_of_all_parameters_are_needed(mixtral: Mixture, tmp_path: Path) -> None:
    updates = read_updates(mixtral.folder)
    inner = [pair for pair in factorize(updates, energy=0.9) if "down_proj" not in pair.module]
    with pytest.raises(ValueError, match=r"layers\.\d\.mlp\.experts are missing"):
        save_as_lora(inner, updates, tmp_path / "export")


@pytest.mark.parametrize("server", SERVERS)
def test_servers_get_one_rank_where_they_divide_by_one(mixtral: Mixture, server: str, tmp_path: Path) -> None:
    for path, wrapper in mixtral.stacks().items():
        if "layers.1" in path:  # one direction
            wrapper.lora_B["default"].weight.data[:, 4:] = 0
    mixtral.save()
    updates = read_updates(mixtral.folder)
    pairs = factorize(updates, energy=0.9)
    if server == "llama.cpp":
        with pytest.raises(ValueError, match="experts"):
            save_as_lora(pairs, updates, tmp_path / "export", server=server)
        return
    save_as_lora(pairs, updates, tmp_path / "export", server=server)
    config = json.loads((tmp_path / "export" / "adapter_config.json").read_text())
    ranks = {
        len(A) // 4
        for key, A in load_file(tmp_path / "export" / "adapter_model.safetensors").items()
        if "experts.lora_A" in key
    }
    assert bool(config["rank_pattern"]) == (server == "peft")
    assert ranks == {config["r"]} or server == "peft"
    effect = (mixtral.outputs() - mixtral.load()(TOKENS).logits).norm()
    assert (mixtral.outputs(tmp_path / "export") - mixtral.outputs()).norm() < 0.5 * effect


def test_commands(mixtral: Mixture, tmp_path: Path) -> None:
    def run(*arguments: Any) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "140"})

    shutil.copytree(mixtral.base, tmp_path / "configuration", ignore=shutil.ignore_patterns("*.safetensors"))
    result = run("ranks", mixtral.folder, "--base", tmp_path / "configuration", "--json", tmp_path / "ranks.json")
    assert result.exit_code == 0, result.output
    assert re.search(r"layers\.1\.mlp\.experts\.down_proj ×4 +4 +\d\.\d \(\d\.\d–\d\.\d\)", result.output)
    rows = json.loads((tmp_path / "ranks.json").read_text())["rows"]
    assert sorted(
        row["expert"] for row in rows if row["module"].startswith("model.layers.0.mlp.experts.down_proj")
    ) == [0, 1, 2, 3]
    assert run("report", mixtral.folder, "--output", tmp_path / "page.html").exit_code == 0
    refused = run("export", mixtral.folder, "--keep", 0.9, "--data", "embedded:chats", "--output", tmp_path / "kept")
    assert refused.exit_code != 0
    assert "--energy" in refused.output
    assert not (tmp_path / "kept").exists()
    for number, options in enumerate((["--energy", 0.9], ["--size", "r2"], ["--max-rank", 2, "--dtype", "bfloat16"])):
        written = run("export", mixtral.folder, *options, "--output", tmp_path / str(number))
        assert written.exit_code == 0, written.output
        assert "did not match" not in written.output
        assert re.search(r"\d% of the adapter's effect", written.output.replace("\n", " "))
    assert mixtral.outputs(tmp_path / "2").isfinite().all()
