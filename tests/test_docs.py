"""What the README promises runs, and its table is what was stored."""

from __future__ import annotations

import doctest
import importlib
import json
import re
import runpy
import shlex
import shutil
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save
from transformers import AutoModelForCausalLM
from trl import SFTConfig
from typer.testing import CliRunner

import lrlora
from lrlora import LrLoraConfig
from lrlora.adapters import read_updates
from lrlora.cli import app
from lrlora.ops.phi_forms import FORMS
from lrlora.shrunk import Kept, Shrunk
from lrlora.train.settings import TrainConfig
from lrlora.tuner.config import EXPANSION
from lrlora_lab import fleet
from lrlora_lab.jobs import read_comparison
from lrlora_lab.measure import NAMES, card_speed, measurement, stored_records, updated
from lrlora_lab.report import write_report
from lrlora_lab.sections import table, with_section
from lrlora_lab.suite import Suite

from .adapters.small_diffusion import save_as_kohya, with_lora
from .conftest import FAMILIES, TinyModel
from .train.small import reviews, save_decoder, save_encoder

ROOT = Path(__file__).parents[1]
SUITES = [path.stem for path in (ROOT / "lab" / "lrlora_lab" / "suites").glob("*.yaml")]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_of_lr_lora_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (train,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    encoder = save_encoder(tmp_path / "encoder")
    rows = [{"sentence1": text, "sentence2": text, "label": i % 2} for i, text in enumerate(reviews(16)["review"])]
    Dataset.from_list(rows).to_json("rte.jsonl")
    for name, local in {
        '"sentence-transformers/all-MiniLM-L6-v2"': repr(str(encoder)),
        '"nyu-mll/glue", "rte"': '"json", data_files="rte.jsonl"',
        "max_steps=300": 'max_steps=2, report_to="none", use_cpu=True',
    }.items():
        assert name in train
        train = train.replace(name, local)
    names: dict[str, Any] = {}
    exec(train, names)
    loaded = AutoPeftModelForSequenceClassification.from_pretrained("adapter").eval()
    tokens = names["tokenizer"]("a film", return_tensors="pt")
    assert torch.equal(loaded(**tokens).logits, names["model"].eval()(**tokens).logits)
    assert str(lrlora.rank_report(names["model"])) in capsys.readouterr().out


def test_training_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
    (settings,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    TrainConfig.from_dict(yaml.safe_load(settings))
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    reviews().rename(columns={"review": "text", "verdict": "label"}).to_csv("reviews.csv", index=False)
    exec(example, {"model_folder": save_encoder(tmp_path / "model")})
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_the_suite_of_the_comparison_page_is_one() -> None:
    (suite,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "compare.md").read_text(encoding="utf-8"), re.DOTALL)
    assert set(Suite.from_dict(yaml.safe_load(suite)).tasks) == {"reviews", "notes"}


def test_export_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(encoding="utf-8"), re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    tiny = TinyModel("llama")
    tiny.build().save_pretrained("base")
    model = get_peft_model(
        type(tiny.build()).from_pretrained("base"), LrLoraConfig(task_type="CAUSAL_LM", **tiny.targets)
    )
    tiny.train(model, 3)
    model.save_pretrained("adapter")
    names: dict[str, Any] = {"model": model}
    exec(example, names)
    assert names["config"].r == 4
    assert (tmp_path / "my-lora" / "adapter_config.json").exists()


def test_the_example_of_compressing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "compress.md").read_text(encoding="utf-8"), re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    save_as_kohya(with_lora(), tmp_path / "my-lora.safetensors", alpha=2.0)
    exec(example, {})
    assert len(capsys.readouterr().out.splitlines()) == len(read_updates("my-lora.safetensors"))
    assert (tmp_path / "smaller.safetensors").stat().st_size < (tmp_path / "my-lora.safetensors").stat().st_size


def test_the_example_of_a_cut_by_loss_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "loss.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    tiny = TinyModel("llama")
    model = get_peft_model(tiny.build(), LoraConfig(r=2, target_modules="all-linear"))
    tokens = tiny.inputs()["input_ids"]
    batch = {"input_ids": tokens, "labels": tokens}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(20):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    exec(example, {"model": model, "batches": [batch], "held_out": 45 * [dict(batch)]})
    served = PeftModel.from_pretrained(tiny.build(), "my-lora")
    assert served.peft_config["default"].peft_type.value == "LORA"


def write_base_and_chats(folder: Path) -> None:
    """Inputs of the examples with TRL."""
    save_decoder(folder / "base")
    chat = {"messages": [{"role": "user", "content": "is it good ?"}, {"role": "assistant", "content": "good film"}]}
    (folder / "chats.jsonl").write_text("\n".join([json.dumps(chat)] * 240))


def test_the_examples_of_fitted_ranks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_base_and_chats(tmp_path)
    page = (ROOT / "docs" / "fitted_ranks.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    on_cpu = 'SFTConfig(use_cpu=True, bf16=False, report_to="none", '
    trl, loop, served, shrunk = (example.replace("SFTConfig(", on_cpu) for example in examples)
    exec(shrunk, {})
    assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "small").peft_config
    for example in (trl, loop):
        names: dict[str, Any] = {}
        exec(example + served, names)
        served_size = sum(p.numel() for n, p in names["model"].named_parameters() if "lora_" in n)
        wide = get_peft_model(
            AutoModelForCausalLM.from_pretrained("base"), LoraConfig(r=4, target_modules="all-linear")
        )
        assert 0.9 < served_size / sum(p.numel() for p in wide.parameters() if p.requires_grad) <= 1
        shutil.rmtree("adapter")


def test_the_example_of_finding_a_rate_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_base_and_chats(tmp_path)
    page = (ROOT / "docs" / "learning_rate.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(example.replace("SFTConfig(", 'SFTConfig(use_cpu=True, bf16=False, report_to="none", '), names)
    assert names["trainer"].state.global_step == 40
    assert names["trainer"].args.learning_rate > SFTConfig.learning_rate


def test_the_commands_of_the_overview_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    models = {
        "FacebookAI/roberta-base": save_encoder(tmp_path / "encoder"),
    }
    reviews(400).rename(columns={"review": "text", "verdict": "label"}).to_csv("reviews.csv", index=False)
    Path("loras").mkdir()
    files = ["loras/hat.safetensors", "loras/coat.safetensors"]
    save_as_kohya(with_lora(), Path(files[0]), alpha=2.0)
    shutil.copy(*files)
    page = (ROOT / "docs" / "overview.md").read_text(encoding="utf-8")
    commands = re.findall(r"^\$ lrlora (.*)", page, re.MULTILINE)
    assert {command.split()[0] for command in commands} == {"train", "predict", "ranks", "report", "export"}
    for command in commands:
        words = [
            models.get(word, word) for word in shlex.split(command.replace("loras/*.safetensors", " ".join(files)))
        ]
        if words[0] == "train":
            words += ["--steps", "60", "--validation-share", "0.25"]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
    assert Path("lrlora-report.html").exists()
    assert Path("served/adapter_config.json").exists()
    assert Path("small-loras/coat.safetensors").exists()


def test_every_equation_has_its_code() -> None:
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    section = page.partition("### From equation to code")[2].partition("\n## ")[0]
    rows = re.findall(r"\| `([\w/]+)\.py`: `([\w.]+)` \|", section)
    assert len(rows) == len(re.findall(r"^\| .* \|$", section, re.MULTILINE)) - 1
    for module, name in rows:
        found: Any = importlib.import_module(f"lrlora.{module.replace('/', '.')}")
        for part in name.split("."):
            found = getattr(found, part)
        found = getattr(found, "_init_fn", found)  # of an operator
        assert getattr(found, "__module__", f"lrlora.{module.replace('/', '.')}").endswith(module.replace("/", "."))


def test_the_conformance_vectors_are_those_of_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = runpy.run_path(str(ROOT / "docs" / "update_conformance.py"))
    check = runpy.run_path(str(ROOT / "docs" / "conformance" / "check.py"))
    cases, tensors = made["vectors"]()
    stored_cases, stored = check["read"](made["FILE"])
    assert stored_cases == cases
    assert stored.keys() == tensors.keys()
    assert all((stored[name] - value).norm() <= 1e-12 * value.norm() for name, value in tensors.items())
    with pytest.raises(SystemExit) as ended:
        check["main"](made["FILE"])
    assert ended.value.code == 0
    wrong = {name: value * (1 + 1e-6) if name == "sinc/d_bandwidth" else value for name, value in tensors.items()}
    (tmp_path / "wrong.safetensors").write_bytes(save(wrong, metadata={"cases": json.dumps(cases)}))
    with pytest.raises(SystemExit) as ended:
        check["main"](tmp_path / "wrong.safetensors")
    assert ended.value.code == 1


@pytest.mark.parametrize("form", [*FORMS, EXPANSION])
def test_every_form_is_described(form: str) -> None:
    settings = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert f'"{form}"' in (LrLoraConfig.__doc__ or "")
    assert f"`{form}`" in settings or f'`form="{form}"`' in settings


@pytest.mark.parametrize("form", [*FORMS, EXPANSION])
def test_the_files_of_an_adapter_are_the_documented_ones(form: str, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    rows = text.partition("## Files of an adapter, format 2")[2].split("|\n\n")[0].splitlines()[5:]
    keys = [key for row in rows for key in re.findall("`(.lrlora_.+?)`", row)]
    parameters = {name: [f".lrlora_phi.{each}" for each in known.parameters] for name, known in FORMS.items()}
    assert keys == [".lrlora_A.weight", ".lrlora_B.weight", *parameters["residual"]]
    base = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8, 2))
    config = LrLoraConfig(r=2, target_modules=["0", "2"], form=form, num_basis=5)
    get_peft_model(base, config).save_pretrained(tmp_path)
    shapes = {".lrlora_A.weight": [(2, 27), (2, 8)], ".lrlora_B.weight": [(8, 2), (2, 2)]}
    shapes |= {key: [(5,), (5,)] for key in parameters.get(form, [])}
    found = {key: tuple(value.shape) for key, value in load_file(tmp_path / "adapter_model.safetensors").items()}
    wanted = {
        f"base_model.model.{i}{key}": shape for key, both in shapes.items() for i, shape in zip("02", both, strict=True)
    }
    assert found == wanted
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (stored["peft_type"], stored["format_version"]) == ("LRLORA", 2)


def test_there_are_exactly_two_setup_commands() -> None:
    commands = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    assert len(commands) == 2
    assert commands[0].strip().endswith("lrlora demo")
    assert commands[1].strip().endswith("pytest -n auto --dist worksteal")
    assert all("pip install -c constraints.txt " in command for command in commands)


def test_where_fitted_ranks_are_not_worth_it_is_what_the_study_found() -> None:
    study = (ROOT / "lab" / "studies" / "evidence.md").read_text(encoding="utf-8")
    behind = re.search(r"\| mean \|.*\| -(\d\.\d)\d \(", study.partition("<!-- ordinary -->")[2])
    assert behind is not None
    assert f"[{behind[1]} % worse]" in README
    untuned = study.partition("<!-- users -->")[2]
    for size, of in ((16, 5), (4, 6)):  # the interval of each difference from LoRA of the same size contains zero
        row = next(line for line in untuned.splitlines() if f"ranks of the size of r = {size} |" in line).split("|")
        low, high = map(float, re.findall(r"[+-][\d.]+", row[of + 1])[1:])
        assert low <= 0 <= high


def test_what_is_said_of_fitted_ranks_is_what_the_study_found() -> None:
    study = (ROOT / "lab" / "studies" / "learned_ranks.md").read_text(encoding="utf-8")
    guide = (ROOT / "docs" / "fitted_ranks.md").read_text(encoding="utf-8")
    lines = study.partition("<!-- study -->")[2].partition("<!-- /study -->")[0].splitlines()
    heads, *rows = ([cell.strip() for cell in line.split("|")] for line in lines if line.startswith("| "))
    found = {row["task"]: row for cells in rows if (row := dict(zip(heads, cells, strict=True)))["size"] == "r = 4"}
    assert found.keys() == {"german", "source-code", "news", "labels", "smollm2"}
    assert all(float(row["p"]) < 0.05 and row["difference"].startswith("-") for row in found.values())  # five of five
    guide = " ".join(guide.split())
    for row in found.values():
        assert row["difference"].split()[0].removeprefix("-") in guide
    rates = [tuple(map(float, row["rates"].split(" / "))) for row in found.values()]
    assert sorted(learned / lora for lora, learned in rates) == [1, 1, 1, 2, 2]
    speed = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    table = speed.partition("### Fitted ranks")[2].partition("###")[0]
    costs = [row.split(" | ")[1:] for row in table.splitlines() if " × " in row]
    assert len(costs) == 2
    for time, _, memory in costs:
        assert f"{time} times LoRA's processor time and {memory.removesuffix(' |')} times its memory" in guide


def test_the_benchmark_of_a_gpu_measures_what_the_formula_says() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    whole = card_speed.measure_model("cpu", sizes | {"num_attention_heads": 2}, (2, 66), new_tokens=2, rounds=1)
    records = card_speed.measure("cpu", ((48, 32),), 16, 1)
    table = card_speed.render(records + whole)
    assert len(re.findall("^\\| .*LR-LoRA \\|", table, re.MULTILINE)) == 3
    assert "2 new tokens | LoRA, r = 64 |" in table
    errors = {record["method"]: record["error"] for record in records}
    assert all(record["seconds"] > 0 for record in records)
    assert max(errors.values()) < 0.1  # of outputs that are rounded to bfloat16
    assert errors["LR-LoRA"] < 2 * errors["LoRA"]


def test_the_tables_of_the_demo_are_the_stored_ones() -> None:
    text = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(ROOT / "docs" / "update_demo.py"))["updated"](text) == text


def test_the_tables_of_comparisons_are_the_stored_ones() -> None:
    text = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(ROOT / "docs" / "update_compare.py"))["updated"](text) == text


@pytest.mark.parametrize("name", NAMES)
def test_the_tables_of_a_measurement_are_the_stored_ones(name: str) -> None:
    measured = measurement(name)
    page = ROOT / measured.page
    text = page.read_text(encoding="utf-8")
    assert updated(measured, text, stored_records(page)) == text


def test_the_first_table_is_what_the_study_has() -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").split("german -->")[1]
    arms = ("| LoRA ", "| the same")
    lines = [[cell.strip() for cell in line.split("|")] for line in page.splitlines() if line.startswith(arms)]
    rows = {
        (f"{float(loss):.3f}", f"{int(size.replace(',', '')) * 4 / 1e6:.1f}", rank.split(", ")[-1], seeds)
        for _, _, seeds, loss, _, _, size, rank, _ in lines
    }
    first = README.partition("| SmolLM2, German")[2].partition("\n\n")[0].splitlines()[2:]
    assert 4 <= len(first) <= 5
    assert {tuple(cell.strip(" ¹") for cell in line.split("|")[2:6]) for line in first} <= rows


def test_the_sentence_of_a_cut_is_printed_so() -> None:
    """With the numbers of a run of docs/results.md."""
    record = Shrunk(
        keep=0.99,
        kept=Kept(0.993, 0.990, 0.995),
        loss=3.164,
        base=4.172,
        ranks={"module": 16},
        parameters=2_591_616,
        whole=4_884_480,
        parameters_per_rank=4_884_480 // 16,
        units=150,
        unit="held-out examples",
        equal_rank=12,
        step=180,
    )
    rows = map(json.loads, (ROOT / "lab" / "studies" / "results.jsonl").read_text(encoding="utf-8").splitlines())
    printed = str(record).replace("adapter keeps", "adapter kept").replace("gain so far", "gain")  # as it was then
    assert printed in [row.get("sentence") for row in rows if row["arm"] == "cut"]
    assert " ".join(record.sentence.split()) in " ".join(README.split())


def test_the_fleet_is_what_the_rules_of_the_servers_give() -> None:
    page = (ROOT / "docs" / "servers.md").read_text(encoding="utf-8")
    content = table(["server", "100 adapters", "GiB, own ranks", "GiB, equal ranks"], fleet.rows())
    assert with_section(page, "fleet", content) == page


# StrategyQA, whose suite is gone with its data, keeps its report.
@pytest.mark.parametrize(
    "suite", [path.parent.name for path in ROOT.glob("docs/compare/*/report.md") if path.parent.name in SUITES]
)
def test_the_report_of_the_stored_comparison_is_what_its_runs_give(
    suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("report", "capacity_report"):
        monkeypatch.setattr(f"lrlora_lab.{module}.save_figure", lambda figure, path: None)
    stored = ROOT / "docs" / "compare" / suite
    shutil.copytree(stored, tmp_path / "copy")
    (tmp_path / "copy" / "report.md").unlink()
    comparison = read_comparison(suite, tmp_path / "copy")
    again = write_report(comparison, tmp_path / "copy")
    assert again.read_text(encoding="utf-8") == (stored / "report.md").read_text(encoding="utf-8")


def test_what_the_study_found_is_what_its_tables_say() -> None:
    page = (ROOT / "docs" / "capacity.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = page.split("## Results")[0]
    tables = (ROOT / "docs" / "compare" / "capacity" / "report.md").read_text(encoding="utf-8")
    section = {name: text for name, _, text in (part.partition("\n") for part in tables.split("\n## "))}
    rows = [line for line in tables.splitlines() if line.startswith("| expansion | ")]
    claimed = re.findall(r"^ +\| ([1248]) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|", found, re.MULTILINE)
    assert len(claimed) == 4
    for r, *worths in claimed:
        for worth in worths:
            assert worth == "–" or any(f"| {r} | 32 |" in row and f"| {worth} |" in row for row in rows), worth
    part = re.search(r"then worth LoRA at r = ([\d.]+), no longer", found)[1]
    assert f"| {part} (" in section["labels-long"]
    assert len(readme.split()) <= 650
    rows = [line for line in section["phone-book"].splitlines() if re.match(r"\| (LoRA|expansion) \| 1 \|", line)]
    theirs, ours = (float(row.split("|")[-2].strip(" %")) for row in rows)
    assert f"recalls {ours} % of the numbers; LoRA recalls {theirs} % at r = 1" in " ".join(found.split())


def test_the_table_of_behaviours_is_what_the_tests_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    script = runpy.run_path(str(ROOT / "docs" / "update_compatibility.py"))
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    assert script["updated"](page) == page
    results = json.loads(script["RESULTS"].read_text(encoding="utf-8"))
    tests = vars(importlib.import_module("tests.tuner.test_behaviours"))
    assert list(results) == [test.__doc__ for name, test in tests.items() if name.startswith("test_")]
    assert tuple(script["FAMILIES"]) == FAMILIES
    assert {found for row in results.values() for found in row.values()} == {"yes", "refused", "–"}


@pytest.mark.parametrize(
    ("method", "title"), [("lora-6", "LoRA r = 6"), *((f"at-most-{most}", f", at most {most}") for most in (4, 6, 8))]
)
def test_the_table_of_reserved_ranks_is_that_of_the_stored_runs(method: str, title: str) -> None:
    study = ROOT / "lab" / "studies" / "learned_ranks.md"
    table = study.read_text(encoding="utf-8").partition("<!-- served -->")[2].partition("<!-- /served -->")[0]
    runs = [json.loads(line) for line in study.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]
    for task in ("german", "source-code"):
        losses = [run["test"] for run in runs if (run["task"], run["method"]) == (task, method)]
        (row,) = [row for row in table.splitlines() if row.startswith(f"| {task} |") and title in row]
        assert row.endswith(f"| {fmean(losses):.3f} ± {stdev(losses):.3f} |")


STUDIES = runpy.run_path(str(ROOT / "docs" / "update_studies.py"))


@pytest.mark.parametrize("page", STUDIES["SECTIONS"])
def test_the_tables_of_a_study_are_those_of_its_runs(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert STUDIES["updated"](page, text) == text


def test_differences_of_a_study_are_paired() -> None:
    ours, theirs = {1: 1.0, 2: 1.2}, {2: 1.5, 3: 9.0}
    assert STUDIES["difference"](ours, theirs) == "-0.300"
    theirs[1] = 1.5
    assert STUDIES["difference"](ours, theirs) == "-0.400 (-1.671 to +0.871)"  # t(1, 97.5 %) · 0.1 = 1.271


def test_the_page_on_cuts_says_what_the_study_measured() -> None:
    study = (ROOT / "lab" / "studies" / "loss.md").read_text(encoding="utf-8")
    page = " ".join((ROOT / "docs" / "loss.md").read_text(encoding="utf-8").split())
    ratios = re.findall(r"([\d.]+) times \(([\d.]+) to ([\d.]+)\)", page)
    assert len(ratios) == 4
    for size, (ratio, low, high) in zip((0.5, 0.5, 0.25, 0.5), ratios, strict=True):
        assert f"| {size} | {ratio} ({low} to {high}) |" in study
    sizes = re.findall(r"0\.(95|99) took (\d+) to (\d+) %", page)
    for share, *bounds in sizes:
        found = [int(size) for size in re.findall(rf"\| 0\.{share} \| 3 \| (\d+)% \|", study)]
        assert [min(found), max(found)] == [int(bound) for bound in bounds]
    assert len(sizes) == 2


PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md"]
PAGES += sorted(
    str(path.relative_to(ROOT)) for folder in ("docs", "lab/studies") for path in (ROOT / folder).glob("*.md")
)


@pytest.mark.parametrize("page", PAGES)
def test_links_within_the_repository_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    assert [target for target in targets if not (ROOT / page).parent.joinpath(target).exists()] == []


@pytest.mark.parametrize("module", ["lrlora.tuner.config", "lrlora.tuner.model", "lrlora.ranks.report"])
def test_the_examples_of_docstrings_run(module: str) -> None:
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted >= 3
    assert not found.failed
