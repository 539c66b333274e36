"""The command line as a user types it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftConfig, get_peft_model

from lrlora import LrLoraConfig, RankReport, __version__, rank_report
from lrlora.train.settings import TrainConfig

from .cli import run
from .conftest import EXPERTS, TinyModel


@pytest.fixture(params=["bert", "gpt2", "t5"])
def adapter(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A trained adapter of each family, saved beside its base model."""
    tiny = TinyModel(request.param)
    base = tiny.build()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LrLoraConfig(r=3, target_modules="all-linear"))
    tiny.train(model, 5)
    model.save_pretrained(tmp_path / "adapter")
    rank_report(model).to_json(tmp_path / "expected.json")
    return tmp_path / "adapter"


def test_version() -> None:
    assert run("--version").output.strip() == f"lrlora {__version__}"


def test_help_says_what_the_setting_says() -> None:
    shown = " ".join(run("train", "--help").output.replace("│", " ").split())
    assert TrainConfig.__dataclass_fields__["start_from"].metadata["help"] in shown


def test_what_was_not_foreseen_is_one_message_or_a_traceback_on_demand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("lrlora.adapters.read_updates", fail)
    (tmp_path / "adapter_config.json").write_text("{}")
    result = run("ranks", tmp_path)
    assert result.exit_code == 1
    assert re.search(r"KeyError: 'surprise'\..* LRLORA_DEBUG=1 ", " ".join(result.output.split()))
    monkeypatch.setenv("LRLORA_DEBUG", "1")
    assert isinstance(run("ranks", tmp_path).exception, KeyError)


def test_a_folder_of_adapters_or_with_a_file_of_diffusers_names_them(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-30").mkdir()
    (tmp_path / "checkpoint-30" / "adapter_config.json").write_text("{}")
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    result = run("ranks", tmp_path)
    assert result.exit_code == 1
    said = "".join(result.output.split())
    assert all(str(path) in said for path in tmp_path.iterdir())


def test_a_reader_that_has_enough_ends_a_command_in_silence() -> None:
    command = "import sys; sys.argv = ['lrlora', '--version']; from lrlora_cli import app; app()"
    with subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert b"Broken pipe" not in process.stderr.read()
        assert process.wait() == 1


def test_ranks_of_a_saved_adapter_without_its_base_model_and_with_it(adapter: Path, tmp_path: Path) -> None:
    result = run("ranks", adapter, "--json", tmp_path / "out.json", "--all")
    assert result.exit_code == 0, result.output
    expected = {row.module: row for row in RankReport.from_json(tmp_path / "expected.json").rows}
    rows = RankReport.from_json(tmp_path / "out.json").rows
    assert {row.module for row in rows} == set(expected)
    for row in rows:
        assert row.module in result.output
        assert row.stable_rank == pytest.approx(expected[row.module].stable_rank, rel=1e-4)
        assert row.relative_norm is None
    result = run("ranks", adapter, "--base", tmp_path / "base", "--json", tmp_path / "based.json")
    assert result.exit_code == 0, result.output
    for row in RankReport.from_json(tmp_path / "based.json").rows:
        if not row.module.startswith(("classifier", "pooler")):  # not in every saved base model
            assert row.relative_norm == pytest.approx(expected[row.module].relative_norm, rel=1e-4)


@pytest.mark.parametrize("adapter", ["bert"], indirect=True)
def test_report_of_an_adapter(adapter: Path, tmp_path: Path) -> None:
    result = run("report", adapter, "--output", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    (run_shown,) = shown(tmp_path / "page.html")
    rows = RankReport.from_json(tmp_path / "expected.json").rows
    assert {row["module"] for row in run_shown["modules"]} == {row.module for row in rows}
    assert run_shown["curves"].keys() == {row.module for row in rows}
    assert run_shown["spectra"].keys() == {row.module for row in rows if row.stable_rank > 0}

    before = (tmp_path / "page.html").read_bytes()
    assert "already exists" in run("report", adapter, "--output", tmp_path / "page.html").output
    assert (tmp_path / "page.html").read_bytes() == before
    assert run("report", adapter, adapter, "--output", tmp_path / "page.html", "--overwrite").exit_code == 0
    assert len(shown(tmp_path / "page.html")) == 1
    many = run("report", *"abcdefg", "--output", tmp_path / "many.html").output
    assert re.search(r"at most 6 runs, got 7\b", many)


def test_a_report_replaces_reports_alone(tiny_bert: TinyModel, tmp_path: Path) -> None:
    model = get_peft_model(tiny_bert.build(), LoraConfig(r=3, target_modules=["query"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    table, page = (tmp_path / name for name in ("train.csv", "page.html"))
    table.write_text("text,label\na film,good\n")
    before = {path: path.read_bytes() for path in (table, *(tmp_path / "adapter").iterdir())}
    for output in (table, tmp_path / "adapter" / "adapter_model.safetensors"):
        result = run("report", tmp_path / "adapter", "--output", output, "--overwrite")
        assert result.exit_code == 1
        assert re.search(rf"{output.name} .*`lrlora report`.*--output", " ".join(result.output.split()))
    assert before == {path: path.read_bytes() for path in before}
    for options in ((), ("--overwrite",)):
        result = run("report", tmp_path / "adapter", "--output", page, *options)
        assert result.exit_code == 0, result.output


def test_report_of_what_a_trainer_left(tiny_bert: TinyModel, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from .test_rank_logger import RankLogger, make_trainer

    for name in ("first", "second"):
        saving = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 1}
        make_trainer(tiny_bert, tmp_path / name / "out", RankLogger(every=2), **saving).train()
    outputs = [tmp_path / name / "out" for name in ("first", "second")]
    result = run("report", *outputs, "--output", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    runs = shown(tmp_path / "page.html")
    assert [run_shown["name"] for run_shown in runs] == [str(tmp_path / name / "out") for name in ("first", "second")]
    for run_shown in runs:
        assert [record["step"] for record in run_shown["history"]] == [0, 2, 4, 6]
        assert {point["step"] for point in run_shown["log"] if point["which"] == "loss"} == {1, 2, 3, 4, 5, 6}


def test_report_says_what_it_cannot_show(tmp_path: Path) -> None:
    result = run("report", tmp_path, "--output", tmp_path / "page.html")
    assert result.exit_code == 1
    assert "Error" in result.output
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def shown(page: Path) -> list[dict[str, Any]]:
    """What the page holds of each run."""
    (content,) = re.findall(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"))
    return json.loads(content)["runs"]


def test_an_export_says_what_is_lost(adapter: Path, tmp_path: Path) -> None:
    result = run("export", adapter, "--output", tmp_path / "lora", "--all")
    assert result.exit_code == 0, result.output
    assert re.search(r"random inputs \d+\.\d+% .*lost", result.output)
    config = PeftConfig.from_pretrained(tmp_path / "lora")
    assert config.peft_type.value == "LORA"
    for module in config.target_modules:
        assert module in result.output


def test_interrupted_while_it_is_checked_an_export_is_there(
    tiny_bert: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_bert.build().save_pretrained(tmp_path / "base")
    model = get_peft_model(type(tiny_bert.build()).from_pretrained(tmp_path / "base"), LrLoraConfig(r=3))
    tiny_bert.train(model, 5)
    model.save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr("lrlora.train.exporting.output_difference", lambda *_: signal.raise_signal(signal.SIGINT))
    result = run("export", tmp_path / "adapter", "--output", tmp_path / "lora")
    assert result.exit_code == 130
    assert re.search(r"Interrupted\. .*LoRA .*written.* not compared", result.output)
    assert "Nothing was written" not in result.output
    assert PeftConfig.from_pretrained(tmp_path / "lora").peft_type.value == "LORA"
    assert not list(tmp_path.glob(".*"))


def test_what_an_expansion_takes_is_printed_before_and_after(tiny_bert: TinyModel, tmp_path: Path) -> None:
    tiny_bert.build().save_pretrained(tmp_path / "base")
    base = type(tiny_bert.build()).from_pretrained(tmp_path / "base")
    config = LrLoraConfig(r=1, form="expansion", num_terms=4, target_modules=["query", "value"])
    model = get_peft_model(base, config)
    tiny_bert.train(model, 5)
    model.save_pretrained(tmp_path / "adapter")
    assert " limit " in run("ranks", tmp_path / "adapter").output
    result = run("export", tmp_path / "adapter", "--energy", "1", "--output", tmp_path / "exact")
    assert result.exit_code == 0, result.output
    # Four modules of 32 × 32.
    assert re.search(r"Parameters: 256 .*trained, 1,024 .*LoRA .*, 1,024 .*exported", result.output)
    result = run("export", tmp_path / "adapter", "--max-rank", "2", "--output", tmp_path / "small")
    assert re.search(r"Parameters: 256 .*trained, 1,024 .*LoRA .*, 512 .*exported", result.output)


@pytest.mark.parametrize("adapter", ["bert"], indirect=True)
def test_a_size_without_data_is_cut_by_energy_and_says_so(adapter: Path, tmp_path: Path) -> None:
    result = run("export", adapter, "--size", "r1", "--output", tmp_path / "small")
    assert result.exit_code == 0, result.output
    assert re.search(r"energy.*--data", result.output)
    asked = run("export", adapter, "--size", "r1", "--by", "energy", "--output", tmp_path / "asked")
    assert asked.exit_code == 0
    assert "--data" not in asked.output


@pytest.mark.parametrize("adapter", ["bert"], indirect=True)
def test_an_export_that_cannot_be_is_one_clear_error(adapter: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((adapter, "--energy", "0.9", "--size", "r4"), r"energy, keep, size, .*max_rank .*got energy and size"),
        ((adapter, "--size", "many"), r"--size .*250000.*\br4, got 'many'"),
        ((adapter, "--energy", "2"), r"energy .*\(0, 1\], got 2"),
        ((adapter, "--energy", "0.9", "--dtype", "int8"), r"dtype 'int8'"),
        ((tmp_path / "nothing", "--energy", "0.9"), r"nothing .*readable adapter"),
    ):
        result = run("export", *arguments, "--output", tmp_path / "lora")
        assert result.exit_code == 1
        assert re.search(message, " ".join(result.output.split()))
        assert "Traceback" not in result.output
    assert not (tmp_path / "lora").exists()


def test_export_compares_with_the_base_model_first(tmp_path: Path) -> None:
    base = TinyModel("bert").build()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LrLoraConfig(r=3, target_modules=["word_embeddings"]))
    TinyModel("bert").train(model, 5)
    model.save_pretrained(tmp_path / "adapter")
    arguments = ("export", tmp_path / "adapter", "--energy", "0.9", "--output", tmp_path / "lora")
    result = run(*arguments)
    assert result.exit_code == 1
    assert re.search(r"word_embeddings .*\bEmbedding\b", " ".join(result.output.split()))
    result = run(*arguments, "--no-check")
    assert result.exit_code == 1
    assert re.search(r"word_embeddings .*linear .*without --no-check", " ".join(result.output.split()))
    (tmp_path / "base").rename(tmp_path / "moved")
    result = run(*arguments)
    assert result.exit_code == 1
    assert "--no-check" in result.output
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("adapter", ["bert"], indirect=True)
def test_without_a_check_the_base_model_is_not_read(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "base" / "config.json").write_text("{")
    arguments = ("export", adapter, "--energy", "0.9", "--output", tmp_path / "lora")
    assert run(*arguments).exit_code == 1
    assert run(*arguments, "--no-check").exit_code == 0
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()


def test_ranks_of_something_else_is_one_clear_error(tmp_path: Path) -> None:
    result = run("ranks", tmp_path / "nothing-here")
    assert result.exit_code == 1
    assert "Error: " in result.output
    assert "Traceback" not in result.output
    assert re.search(r"no file .*lora\.safetensors", run("ranks", "lora.safetensors").output)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    result = run("ranks", tmp_path)
    assert result.exit_code == 1
    assert re.search(r"adapter of IA3\b.*save_as_lora", " ".join(result.output.split()))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING"}))
    result = run("ranks", tmp_path)
    assert re.search(r"\bPROMPT_TUNING\b.*no rank", " ".join(result.output.split()))


@pytest.mark.parametrize("config", ["{}", "not json", '{"peft_type": "NOPE"}', '{"peft_type": "LRLORA"}'])
def test_ranks_of_a_damaged_adapter_is_one_clear_error(tmp_path: Path, config: str) -> None:
    (tmp_path / "adapter_config.json").write_text(config)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"cut off")
    result = run("ranks", tmp_path)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    said = " ".join(result.output.split())
    assert re.search(r"readable adapter|damaged", said)
    assert re.search(r"Expected .*adapter_config\.json .*adapter_model\.safetensors", said)


def test_ranks_checks_where_to_write_before_measuring(tmp_path: Path) -> None:
    result = run("ranks", tmp_path, "--json", tmp_path / "nowhere" / "out.json")
    assert result.exit_code == 1
    assert re.search(r"nowhere .*out\.json .*not exist", " ".join(result.output.split()))


@pytest.mark.parametrize("adapter", ["bert"], indirect=True)
def test_a_folder_is_not_called_like_a_file(adapter: Path, tmp_path: Path) -> None:
    result = run("export", adapter, "--output", tmp_path / "small.safetensors")
    assert result.exit_code == 1
    assert re.search(r"folder.*--output .*small\.safetensors", " ".join(result.output.split()))
    assert not (tmp_path / "small.safetensors").exists()


def test_demo_never_removes_what_it_did_not_write(tmp_path: Path) -> None:
    output = tmp_path / "mine[1]"
    for folder in (output, tmp_path / "mine[1].partial"):
        folder.mkdir()
        (folder / "letter.txt").write_text("dear")
        for options in ((), ("--overwrite",)):
            result = run("demo", "--output", output, *options)
            assert result.exit_code == 1
            assert "mine[1]" in result.output
            assert "Remove it yourself" in result.output if options else "--overwrite" in result.output
        assert (folder / "letter.txt").read_text() == "dear"
        (folder / "letter.txt").unlink()
        folder.rmdir()


@pytest.mark.parametrize("arguments", [("--steps", "0"), ("--seed", "-1")])
def test_demo_checks_its_numbers(arguments: tuple[str, str]) -> None:
    result = run("demo", *arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.output


def test_ranks_of_an_embedding_and_with_other_weights_in_the_file(tmp_path: Path) -> None:
    tiny = TinyModel("llama")
    for targets in (["embed_tokens", "q_proj"], ["lm_head", "q_proj"]):
        model = get_peft_model(tiny.build(), LrLoraConfig(r=3, target_modules=targets))
        tiny.train(model, 3)
        model.save_pretrained(tmp_path)
        result = run("ranks", tmp_path)
        assert result.exit_code == 0, result.output
        assert targets[0] in result.output
    model = get_peft_model(
        tiny.build(), LrLoraConfig(r=3, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 4]})
    )
    model.save_pretrained(tmp_path)
    assert run("ranks", tmp_path).exit_code == 0


def test_ranks_of_experts_need_the_base_model(tmp_path: Path) -> None:
    tiny = TinyModel("mixtral")
    get_peft_model(tiny.build(), LoraConfig(r=2, target_parameters=EXPERTS)).save_pretrained(tmp_path)
    result = run("ranks", tmp_path)
    assert result.exit_code != 0
    assert "--base" in result.output
