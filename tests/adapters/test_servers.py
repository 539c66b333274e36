"""Exports for servers: each reads the files by its own rule (docs/servers.md), and must get ΔW.

A new server is an entry of `READERS`.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from typer.testing import CliRunner

from lrlora.adapters import factorize, save_as_lora
from lrlora.adapters.servers import SERVERS
from lrlora.cli import app
from lrlora.train.embedded import EmbeddedInput, fetch

from ..conftest import TinyModel

BASE = "base_model.model."
Rule = Callable[[dict[str, Any], str, Tensor, Tensor], Tensor]


def by_peft(config: dict[str, Any], module: str, A: Tensor, B: Tensor) -> Tensor:
    """PEFT, transformers, and vLLM since 0.32: α and r by module; the shapes must agree with them."""
    rank = config["rank_pattern"].get(module, config["r"])
    assert A.shape[0] == B.shape[1] == rank
    return config["alpha_pattern"].get(module, config["lora_alpha"]) / rank * B @ A


def by_config(config: dict[str, Any], module: str, A: Tensor, B: Tensor) -> Tensor:
    """vLLM before 0.32: shapes of the file, but one α/r."""
    return config["lora_alpha"] / config["r"] * B @ A


def by_shape(config: dict[str, Any], module: str, A: Tensor, B: Tensor) -> Tensor:
    """llama.cpp: α of the configuration by each matrix's own rank."""
    return config["lora_alpha"] / B.shape[1] * B @ A


def by_one_rank(config: dict[str, Any], module: str, A: Tensor, B: Tensor) -> Tensor:
    """SGLang stacks matrices of the shape that r gives."""
    assert A.shape[0] == B.shape[1] == config["r"]
    return config["lora_alpha"] / config["r"] * B @ A


@dataclass(frozen=True)
class Reader:
    """What docs/servers.md says of a server.

    Args:
        rules: how its versions compute the update of a module.
        dtype: of a value that it holds.
        reserves: rank that it reserves in all modules for an adapter whose largest is 7; None: own ranks.
        is_padded: whether it takes one rank alone.
        reads: what it reads besides the factors, of `BESIDES`.

    """

    rules: tuple[Rule, ...]
    dtype: str = "bfloat16"
    reserves: int | None = None
    is_padded: bool = False
    reads: tuple[str, ...] = ()


# What is trained besides the factors, and its name in messages.
BESIDES = {
    "head": ({"modules_to_save": ["lm_head"]}, "lm_head"),
    "classifier": ({"task_type": "SEQ_CLS"}, "score"),
    "tokens": ({"trainable_token_indices": {"embed_tokens": [3, 5]}}, "token embeddings"),
    "biases": ({"bias": "lora_only"}, "biases"),
    "DoRA": ({"use_dora": True}, "DoRA"),
    "resized embeddings": ({}, "embed_tokens"),  # which no configuration names
}
READERS = {
    "peft": Reader((by_peft,), "float32", reads=(*BESIDES,)),
    "vllm": Reader((by_peft, by_config), reserves=8, reads=("classifier",)),
    "sglang": Reader((by_one_rank,), reserves=7, is_padded=True),
    "llama.cpp": Reader((by_peft, by_shape), "float32"),
    "hot-swap": Reader((by_peft, by_config), "float32", reserves=7, is_padded=True, reads=(*BESIDES,)),
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of a Llama with α = 8 and unlike ranks; one of its modules does nothing."""
    folder, tiny = tmp_path_factory.mktemp("servers"), TinyModel("llama")
    base = tiny.build()
    base.save_pretrained(folder / "base")
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False,
        rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 7}, alpha_pattern={"v_proj": 3},
    )  # fmt: skip
    model = get_peft_model(type(base).from_pretrained(folder / "base"), config)
    with torch.no_grad():
        model.get_submodule(f"{BASE}model.layers.1.self_attn.k_proj").lora_B["default"].weight.zero_()
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def test_each_server_has_its_reader() -> None:
    assert READERS.keys() == SERVERS.keys()


@pytest.mark.parametrize("server", SERVERS)
def test_each_server_reads_the_update(adapter: Path, server: str, tmp_path: Path) -> None:
    tiny = TinyModel("llama")
    trained = PeftModel.from_pretrained(type(tiny.build()).from_pretrained(adapter.parent / "base"), adapter)
    wanted = {
        name.removeprefix(BASE): module.get_delta_weight("default")
        for name, module in trained.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    factors = factorize(trained, energy=1.0)
    save_as_lora(factors, adapter, tmp_path / "out", server=server)
    config, tensors = json.loads((tmp_path / "out" / "adapter_config.json").read_text()), {}
    for key, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        tensors[key.removeprefix(BASE).removesuffix(".weight")] = tensor
    modules = {key.rpartition(".lora_")[0] for key in tensors}
    for rule in READERS[server].rules:
        for module, delta in wanted.items():
            if module not in modules:
                assert not delta.any()
                continue
            found = rule(config, module, tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"])
            torch.testing.assert_close(found, delta, rtol=1e-4, atol=1e-5)
    if READERS[server].is_padded:
        assert modules == set(wanted)  # SGLang wants all modules of a type
        assert config["r"] == 7
    else:
        assert len({tensors[f"{module}.lora_A"].shape[0] for module in modules}) > 1
    again = PeftModel.from_pretrained(type(tiny.build()).from_pretrained(adapter.parent / "base"), tmp_path / "out")
    torch.testing.assert_close(tiny.logits(again), tiny.logits(trained), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("server", SERVERS)
def test_the_command_says_what_is_reserved(adapter: Path, server: str, tmp_path: Path) -> None:
    command = ["export", str(adapter), "--energy", "1", "--output", str(tmp_path / "out"), "--no-check"]
    done = CliRunner().invoke(app, [*command, "--for", server], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    per_rank = sum(
        sum(module.weight.shape)
        for name, module in TinyModel("llama").build().named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name
    )
    reader, title = READERS[server], SERVERS[server].title
    if reader.reserves is None:
        assert re.search(rf"{title} holds each module at its own rank: 0\.\d MiB in {reader.dtype}\.", said)
    else:
        size = f"{reader.reserves * per_rank * (2 if reader.dtype == 'bfloat16' else 4) / 2**20:.1f} MiB"
        assert f"{title} reserves r = {reader.reserves} in 14 modules: {size} a slot in {reader.dtype}" in said


@pytest.mark.parametrize("beside", BESIDES)
@pytest.mark.parametrize("server", SERVERS)
def test_what_is_trained_besides_the_factors_is_written_or_refused(beside: str, server: str, tmp_path: Path) -> None:
    fields, name = BESIDES[beside]
    tiny = TinyModel("llama")
    kind = LlamaForSequenceClassification if beside == "classifier" else LlamaForCausalLM
    torch.manual_seed(0)
    kind(tiny.build().config).save_pretrained(tmp_path / "base")
    common = {"r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    model = get_peft_model(kind.from_pretrained(tmp_path / "base"), LoraConfig(**{**common, **fields}))
    with torch.no_grad():
        resized = [model.get_input_embeddings().weight] if beside == "resized embeddings" else []
        for parameter in (*(p for p in model.parameters() if p.requires_grad), *resized):
            parameter.add_(0.1)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=bool(resized))
    write = partial(save_as_lora, factorize(model, energy=1.0), tmp_path / "adapter", tmp_path / "out", server=server)
    if beside in READERS[server].reads:
        write()
        loaded = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "out").eval()
        torch.testing.assert_close(tiny.logits(loaded), tiny.logits(model.eval()), rtol=1e-3, atol=1e-4)
        assert server != "peft" or "vLLM reserves" not in (tmp_path / "out" / "README.md").read_text()
    else:
        with pytest.raises(ValueError, match=rf"{SERVERS[server].title} .*\b{name}\b.*merge_and_unload"):
            write()
        assert not (tmp_path / "out").exists()


def test_the_parameters_of_a_dora_are_those_of_its_file(tmp_path: Path) -> None:
    base = TinyModel("llama").build()
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules="all-linear", use_dora=True, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(type(base).from_pretrained(tmp_path / "base"), config).save_pretrained(tmp_path / "adapter")
    arguments = ["export", str(tmp_path / "adapter"), "--energy", "1", "--no-check", "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    stored = sum(tensor.numel() for tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").values())
    assert f"{stored:,} as trained, {stored:,} as exported" in result.output, result.output


@pytest.mark.refused
def test_a_server_that_is_none_and_a_rank_that_is_too_large(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'vlm'.*\bvllm\b"):
        save_as_lora([], adapter, tmp_path / "out", server="vlm")
    with pytest.raises(ValueError, match=r"vLLM .*\b512\b.*\b600\b.*--max-rank"):
        SERVERS["vllm"].rank(600)


def test_an_interruption_ends_an_export_of_several(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        begun.append(arguments)
        raise KeyboardInterrupt

    begun: list[Any] = []
    monkeypatch.setattr("lrlora.train.exporting.read_updates", interrupt)
    (tmp_path / "other").symlink_to(adapter)
    command = ["export", str(adapter), str(tmp_path / "other"), "--energy", "1", "--output", str(tmp_path / "out")]
    assert CliRunner().invoke(app, command).exit_code == 130
    assert len(begun) == 1


def test_many_adapters_at_once(adapter: Path, tmp_path: Path) -> None:
    """Those that fail stop none of the others, and a second call writes only what is missing."""
    torch.manual_seed(0)
    for name in ("one", "two"):
        save_file(
            {"up.lora_down.weight": torch.randn(4, 8), "up.lora_up.weight": torch.randn(8, 4)},
            tmp_path / f"{name}.safetensors",
        )
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    sources = [tmp_path / "one.safetensors", tmp_path / "broken.safetensors", tmp_path / "two.safetensors", adapter]
    command = ["export", *map(str, sources), "--max-rank", "2", "--no-check", "--output", str(tmp_path / "small")]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert done.exit_code == 1
    said = done.output.splitlines()
    assert sum("failed" in line for line in said) == 1
    written = tmp_path / "small"
    assert sorted(path.name for path in written.iterdir()) == ["adapter", "one.safetensors", "two.safetensors"]
    assert load_file(written / "two.safetensors")["up.lora_down.weight"].shape == (2, 8)
    before = (written / "one.safetensors").stat().st_mtime_ns
    (tmp_path / "broken.safetensors").unlink()
    again = CliRunner().invoke(app, [word for word in command if "broken" not in word], env={"COLUMNS": "200"})
    assert again.exit_code == 0, again.output
    assert sum("was there" in line for line in again.output.splitlines()) == 3
    assert (written / "one.safetensors").stat().st_mtime_ns == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "one.safetensors").write_bytes(b"")
    same = ["export", str(sources[0]), str(tmp_path / "other" / "one.safetensors"), "--output", str(tmp_path / "new")]
    refused = CliRunner().invoke(app, same, env={"COLUMNS": "200"})
    assert "same name" in refused.output


def test_a_folder_that_is_named_by_a_dot_is_exported(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(adapter, tmp_path / "one"))
    shutil.copytree(adapter, tmp_path / "two")
    command = ["export", ".", "../two", "--max-rank", "2", "--no-check", "--output", "../small"]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "was there" not in done.output
    for name in ("one", "two"):
        assert PeftConfig.from_pretrained(tmp_path / "small" / name).r <= 2
    shutil.rmtree(tmp_path / "small" / "one")
    (tmp_path / "small" / "one").mkdir()  # empty: no export
    again = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert again.output.count("was there") == 1
    assert (tmp_path / "small" / "one" / "adapter_config.json").exists()


VLLM = EmbeddedInput(
    requirement="vllm==0.33.0",
    sha256="4b6bdec4ab269990bf70d45a3c1e94c3760a27064513760193b26d6f0da883aa",
    member="vllm/lora/peft_helper.py",
)
SGLANG = EmbeddedInput(
    requirement="sglang==0.5.23",
    sha256="00b3cd5b265ac76c64185fbb6b95424f324ddd9f428d0306b77bc9db9d859937",
    member="sglang/srt/lora/lora_config.py",
)


def loaded(path: Path, monkeypatch: pytest.MonkeyPatch, **stubs: dict[str, Any]) -> Any:
    """A module of a server alone, with stand-ins for those that need a GPU."""
    for name, content in stubs.items():
        stub = types.ModuleType(name.replace("__", "."))
        vars(stub).update(content)
        monkeypatch.setitem(sys.modules, stub.__name__, stub)
    spec = importlib.util.spec_from_file_location(f"server_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(platform.machine() != "x86_64" or sys.version_info[:2] != (3, 11), reason="other wheels")
def test_the_readers_of_vllm_and_sglang(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their own code for adapter folders, from their packages, which are large to download."""
    trained = PeftModel.from_pretrained(TinyModel("llama").build(), adapter)
    factors = factorize(trained, energy=1.0)
    for server in ("vllm", "sglang"):
        save_as_lora(factors, adapter, tmp_path / server, server=server)
    logger = types.SimpleNamespace(info_once=print, warning=print, info=print)
    of_vllm = loaded(
        fetch(VLLM), monkeypatch, regex=vars(re), vllm={}, vllm__config={},
        vllm__config__lora={"LoRAConfig": object}, vllm__logger={"init_logger": lambda name: logger},
    )  # fmt: skip
    helper = of_vllm.PEFTHelper.from_local_dir(str(tmp_path / "vllm"), 4096)
    helper.validate_legal(types.SimpleNamespace(max_lora_rank=8))
    with pytest.raises(ValueError, match=r"rank 7 .*max_lora_rank"):
        helper.validate_legal(types.SimpleNamespace(max_lora_rank=4))
    ranks = {part.module: part.rank for part in factors if part.rank}
    for module, rank in ranks.items():
        assert helper.get_rank_and_scaling(module) == (rank, 1.0)
    of_sglang = loaded(fetch(SGLANG), monkeypatch)
    config = of_sglang.LoRAConfig(path=str(tmp_path / "sglang"))
    assert (config.r, config.lora_alpha) == (7, 7)
