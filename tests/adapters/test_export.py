"""A saved export, as PEFT without lrlora, and a server, would read it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lrlora import LrLoraConfig, files
from lrlora.adapters import factorize, lora_config, output_difference, read_updates, save_as_lora
from lrlora.adapters.factorize import parameters_of_rank
from lrlora.cli import app
from lrlora.tuner import LrLoraLayer

from ..conftest import TinyModel
from ..train.small import tokenizer

Train = Callable[..., tuple[Path, Any]]


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("server", ["peft", "hot-swap"])
def test_loads_with_peft_and_answers_the_same(train: Train, family: str, server: str, tmp_path: Path) -> None:
    adapter, model = train(family)
    save_as_lora(factorize(model, energy=1.0), adapter, tmp_path / "lora", server=server)
    tiny = TinyModel(family)
    base = type(tiny.build()).from_pretrained(tmp_path / "base")
    expected = tiny.logits(model)
    loaded = PeftModel.from_pretrained(base, tmp_path / "lora")
    torch.testing.assert_close(tiny.logits(loaded), expected, rtol=1e-4, atol=1e-5)
    assert output_difference(adapter, tmp_path / "lora") < 1e-3
    torch.testing.assert_close(tiny.logits(loaded.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


def test_padded_exports_of_other_ranks_are_swapped_into_a_prepared_model(train: Train, tmp_path: Path) -> None:
    adapter, model = train("llama")
    tiny = TinyModel("llama")
    ranks = {}
    for name, budget in (("large", 4_000), ("small", 2_000)):
        factors = factorize(model, budget=budget)
        save_as_lora(factors, adapter, tmp_path / name, server="hot-swap")
        ranks[name] = {part.rank for part in factors}

    def loaded(name: str) -> Any:
        base = type(tiny.build()).from_pretrained(tmp_path / "base")
        return PeftModel.from_pretrained(base, tmp_path / name)

    assert len(ranks["large"]) > 1
    served = loaded("large")
    prepare_model_for_compiled_hotswap(served, target_rank=max(ranks["large"]))
    for name in ("small", "large"):
        hotswap_adapter(served, str(tmp_path / name), "default", torch_device="cpu")
        torch.testing.assert_close(tiny.logits(served), tiny.logits(loaded(name)), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings(r"ignore:Could not find a config file in unsloth/:UserWarning:peft\.")
def test_target_modules_as_unsloth_writes_them(tmp_path: Path) -> None:
    projections = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    parts = r"self_attn|attention|attn|mlp|feed_forward|ffn|dense"
    pattern = (
        rf"(?:.*?(?:language|text).*?(?:{parts}).*?(?:{projections}).*?)"
        rf"|(?:\bmodel\.layers\.[\d]{{1,}}\.(?:{parts})\.(?:(?:{projections})))"
    )
    tiny = TinyModel("llama")
    torch.manual_seed(0)
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    model = get_peft_model(tiny.build(), LoraConfig(target_modules=pattern, **fields))
    model.peft_config["default"].base_model_name_or_path = "unsloth/llama-bnb-4bit"
    model.save_pretrained(tmp_path / "adapter")
    updates = read_updates(tmp_path / "adapter")
    assert len(updates) == 14
    save_as_lora(factorize(updates, energy=1.0), updates, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "unsloth/llama-bnb-4bit"
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path / "lora")
    torch.testing.assert_close(tiny.logits(loaded), tiny.logits(model), rtol=1e-4, atol=1e-5)


def test_needs_no_lrlora(train: Train, tmp_path: Path) -> None:
    adapter, model = train("llama")
    save_as_lora(factorize(model, energy=0.9), adapter, tmp_path / "lora")
    script = (
        "import sys; from peft import AutoPeftModelForCausalLM;"
        f"model = AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / 'lora')!r});"
        "assert 'lrlora' not in sys.modules; print(model.peft_config['default'].peft_type.value)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout.strip() == "LORA", run.stderr


def test_loads_through_transformers_itself(train: Train, tmp_path: Path) -> None:
    adapter, model = train("llama")
    save_as_lora(factorize(model, energy=1.0), adapter, tmp_path / "lora")
    tiny = TinyModel("llama")
    base = type(tiny.build()).from_pretrained(tmp_path / "base")
    base.load_adapter(str(tmp_path / "lora"))
    torch.testing.assert_close(tiny.logits(base), tiny.logits(model), rtol=1e-4, atol=1e-5)


def test_what_else_was_trained_comes_along(train: Train, tmp_path: Path) -> None:
    adapter, model = train("bert", modules_to_save=["classifier"], target_modules=["query", "value"], bias="lora_only")
    save_as_lora(factorize(model, energy=1.0), adapter, tmp_path / "lora")
    tiny = TinyModel("bert")
    base = type(tiny.build()).from_pretrained(tmp_path / "base")
    with torch.no_grad():
        base.classifier.weight.zero_()
        base.bert.encoder.layer[0].attention.self.query.bias.fill_(9.0)
    loaded = PeftModel.from_pretrained(base, tmp_path / "lora")
    torch.testing.assert_close(tiny.logits(loaded), tiny.logits(model), rtol=1e-4, atol=1e-5)


def test_modules_left_out_stay_the_base_model_s(train: Train, tmp_path: Path) -> None:
    adapter, model = train("llama")
    factors = factorize(model, budget=parameters_of_rank(model, 1) // 2)
    left_out = {part.module for part in factors if not part.rank}
    assert left_out
    save_as_lora(factors, adapter, tmp_path / "lora")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")
    adapted = {path.removeprefix("base_model.model.") for path, m in loaded.named_modules() if hasattr(m, "lora_A")}
    assert adapted == {part.module for part in factors} - left_out


@pytest.mark.refused
def test_another_weight_that_is_not_finite(train: Train, tmp_path: Path) -> None:
    adapter, model = train("bert", modules_to_save=["classifier"])
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.classifier.weight"][0] = torch.inf
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"classifier\S* .*NaN "):
        save_as_lora(factorize(model, energy=0.9), adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "target"), [("gpt2", "wpe"), ("t5", "relative_attention_bias"), ("vit", "projection")]
)
def test_embeddings_and_convolutions_of_lr_lora_are_refused(
    family: str, target: str, train: Train, tmp_path: Path
) -> None:
    adapter, _ = train(family, target_modules=[target])
    updates = read_updates(adapter)
    with pytest.raises(ValueError, match=rf"Only linear .*\b{target}"):
        save_as_lora(factorize(updates, energy=0.9), updates, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_servers_and_the_hub_need_to_know(tmp_path: Path) -> None:
    tiny = TinyModel("llama")
    tiny.build().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    fields = {"target_modules": ["up_proj"], "modules_to_save": ["lm_head"], "init_lora_weights": False}
    model = get_peft_model(base, LoraConfig(r=20, task_type="CAUSAL_LM", **fields))
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    command = ["export", str(tmp_path / "adapter"), "--energy", "1", "--output", str(tmp_path / "out")]
    said = " ".join(CliRunner().invoke(app, command).output.split())
    assert re.search(r"vLLM .*\blm_head\..*merge_and_unload", said)
    card = ModelCard.load(tmp_path / "out" / "README.md").data
    assert card.pipeline_tag == "text-generation"
    assert {"lora", "transformers"} <= set(card.tags)
    assert card.library_name == "peft"
    assert card.license == "apache-2.0"
    (tmp_path / "base" / "README.md").write_text("---\nlicense: [apache\n---\n")
    assert CliRunner().invoke(app, [*command[:-1], str(tmp_path / "other")]).exit_code == 0
    assert ModelCard.load(tmp_path / "other" / "README.md").data.license is None


def test_never_overwrites(train: Train, tmp_path: Path) -> None:
    adapter, model = train("llama")
    factors = factorize(model, energy=0.9)
    with pytest.raises(FileExistsError, match="is not empty"):
        save_as_lora(factors, adapter, adapter)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        save_as_lora(factors, adapter, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    save_as_lora(factors, adapter, tmp_path / "empty")


@pytest.mark.parametrize(
    ("saved", "failure"),
    [
        (peft.LoraConfig, OSError(28, "No space left on device")),
        (peft.LoraConfig, KeyboardInterrupt()),
        (transformers.PreTrainedTokenizerBase, OSError(28, "No space left on device")),
    ],
)
def test_nothing_is_left_of_a_failed_export(
    train: Train, tmp_path: Path, saved: type, failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, model = train("llama")
    tokenizer().save_pretrained(adapter)
    factors = factorize(model, energy=0.9)

    def fail(*arguments: Any, **options: Any) -> None:
        raise failure

    monkeypatch.setattr(saved, "save_pretrained", fail)
    with pytest.raises(type(failure), match=r"No space|^$"):
        save_as_lora(factors, adapter, tmp_path / "out" / "lora")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.refused
def test_a_base_model_that_is_missing_or_of_another_shape(train: Train, tmp_path: Path) -> None:
    adapter, model = train("llama")
    save_as_lora(factorize(model, energy=0.9), adapter, tmp_path / "lora")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"base model .*--base\b"):
        output_difference(adapter, tmp_path / "lora")
    TinyModel("bert").build().save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"not fit .*base"):
        output_difference(adapter, tmp_path / "lora")


def test_the_temporary_folder_is_on_the_same_disk(tmp_path: Path) -> None:
    with files.replacing_folder(tmp_path / "a" / "b") as partial:
        assert partial.parent == tmp_path / "a"
        (partial / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert [path.name for path in (tmp_path / "a").rglob("*")] == ["b", "file"]


def test_a_temporary_folder_of_a_killed_process_with_this_number_is_in_nobody_s_way(tmp_path: Path) -> None:
    left = tmp_path / f".out-{os.getpid()}.partial"
    left.mkdir()
    (left / "half").write_text("x")
    with files.replacing_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("x")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]


def test_a_trained_bias_of_a_module_that_is_left_out_stays(train: Train, tmp_path: Path) -> None:
    adapter, model = train("bert", target_modules=["query", "value"], bias="lora_only")
    factors = [
        dataclasses.replace(part, A=part.A[:0], B=part.B[:, :0]) if part.module.endswith("query") else part
        for part in factorize(model, energy=1.0)
    ]
    save_as_lora(factors, adapter, tmp_path / "lora")
    base = type(TinyModel("bert").build()).from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "lora")
    path = "base_model.model.bert.encoder.layer.0.attention.self.query"
    torch.testing.assert_close(loaded.get_submodule(path).bias, model.get_submodule(path).base_layer.bias)


@pytest.mark.parametrize("kind", ["gpt2", "t5", "choice"])
def test_outputs_of_heads_that_want_inputs_of_their_own(kind: str, tmp_path: Path) -> None:
    common: dict[str, Any] = {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}
    base: Any
    if kind == "gpt2":  # has no padding token
        base = transformers.GPT2ForSequenceClassification(
            transformers.GPT2Config(**common, n_embd=32, n_layer=1, n_head=2, num_labels=3)
        )
    elif kind == "t5":  # looks at the end of the sequence
        sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "pad_token_id": 0}
        config = transformers.T5Config(**{**common, "eos_token_id": 1}, **sizes, decoder_start_token_id=0, num_labels=3)
        base = transformers.T5ForSequenceClassification(config)
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        base = transformers.BertForMultipleChoice(transformers.BertConfig(vocab_size=100, pad_token_id=0, **sizes))
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    if kind == "gpt2":
        tokenizer().save_pretrained(tmp_path / "base")
    task = {} if kind == "choice" else {"task_type": "SEQ_CLS"}
    model = peft.get_peft_model(base, LrLoraConfig(r=2, target_modules="all-linear", **task))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lrlora_B" in name:
                parameter.normal_(0, 0.01)
    model.save_pretrained(tmp_path / "adapter")
    save_as_lora(factorize(model, energy=1.0), tmp_path / "adapter", tmp_path / "lora")
    assert output_difference(tmp_path / "adapter", tmp_path / "lora") < 1e-3


def test_the_folder_may_be_the_current_one_or_behind_a_link(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, model = train("llama")
    factors = factorize(model, max_rank=1)
    (tmp_path / "here").mkdir()
    (tmp_path / "behind").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "behind")
    save_as_lora(factors, adapter, tmp_path / "link")
    assert (tmp_path / "behind" / "adapter_config.json").exists()
    monkeypatch.chdir(tmp_path / "here")
    save_as_lora(factors, adapter, ".")
    assert (tmp_path / "here" / "adapter_config.json").exists()


def test_the_configuration_alone_keeps_what_each_module_was_trained_with(train: Train) -> None:
    options = {"alpha_pattern": {"q_proj": 32}, "rank_pattern": {"v_proj": 4}, "lora_dropout": 0.1}
    with pytest.warns(UserWarning, match="lora_dropout"):
        _, model = train("llama", lora_alpha=4, target_modules=["q_proj", "v_proj", "o_proj"], **options)
    config = lora_config(factorize(model, max_rank=2), model.peft_config["default"], keep_scaling=True)
    assert config.lora_dropout == 0.1
    plain = get_peft_model(TinyModel("llama").build(), config)
    for path, layer in model.named_modules():
        if isinstance(layer, LrLoraLayer):
            assert plain.get_submodule(path).scaling == layer.scaling  # 16, 1 and 2


class Named(torch.nn.Module):
    """Modules whose names end in one another: proj, a.proj, b.a.proj."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Module(), torch.nn.Module()
        self.a.proj, self.b.a = torch.nn.Linear(8, 8), torch.nn.Module()
        self.b.a.proj, self.b.proj = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b.proj(self.b.a.proj(torch.tanh(self.a.proj(torch.tanh(self.proj(x))))))


@pytest.mark.parametrize("pattern", [False, True])
def test_modules_whose_names_end_in_one_another_load_as_saved(pattern: bool, tmp_path: Path) -> None:
    build = lambda: (torch.manual_seed(0), Named())[1]  # noqa: E731
    torch.manual_seed(1)
    targets = r"(b\.a\.|a\.)?proj" if pattern else ["proj", "a.proj", "b.a.proj"]
    config = LoraConfig(r=2, target_modules=targets, exclude_modules=None if pattern else r"b\.proj")
    model = get_peft_model(build(), dataclasses.replace(config, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    factors = factorize(model, energy=1.0)
    assert len(factors) == 3
    ranks = {"proj": 1, "a.proj": 0, "b.a.proj": 2}
    kept = [dataclasses.replace(p, A=p.A[: ranks[p.module]], B=p.B[:, : ranks[p.module]]) for p in factors]
    save_as_lora(kept, tmp_path / "adapter", tmp_path / "lora")
    loaded = PeftModel.from_pretrained(build(), tmp_path / "lora")
    found = {
        path: layer.get_delta_weight("default")
        for path, layer in loaded.get_base_model().named_modules()
        if hasattr(layer, "lora_A")
    }
    assert found.keys() == {"proj", "b.a.proj"}
    for part in kept:
        if part.rank:
            torch.testing.assert_close(found[part.module], part.B @ part.A, rtol=1e-4, atol=1e-6)
