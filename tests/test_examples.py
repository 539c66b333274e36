"""The scripts in examples/: LR-LoRA below the libraries that people put on top of PEFT, on real small models."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from lrlora.cli import app

from .processes import run as run_process
from .train.small import save_decoder

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    code = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    return run_process(code, EXAMPLES / name, *arguments)


@pytest.mark.real
@pytest.mark.integration
def test_trainer() -> None:
    output = run("trainer.py", "2")
    assert re.search(r"best evaluation loss: 0\.\d+", output)
    assert re.search(r"query +[1-9]\.\d+ +\d", output)


@pytest.mark.slow
@pytest.mark.real
def test_expansion() -> None:
    losses = re.findall(r"^(LoRA|expansion), r = 4: +loss (\d+\.\d+)$", run("expansion.py", "4"), re.MULTILINE)
    assert [method for method, _ in losses] == ["LoRA", "expansion"]
    assert all(2 < float(loss) < 20 for _, loss in losses)  # the head is random, and sure of itself


@pytest.mark.integration
def test_after_the_command_of_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    save_decoder(tmp_path / "base")
    chat = {"messages": [{"role": "user", "content": "is it good ?"}, {"role": "assistant", "content": "good film"}]}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join([json.dumps(chat)] * 200))
    page = (EXAMPLES.parent / "docs" / "cookbook.md").read_text(encoding="utf-8")
    trl, *ours = page.partition("## An adapter from `trl sft`")[2].split("```sh\n")[1].split("```")[0].splitlines()
    quick = "--max_steps 3 --report_to none --use_cpu true --bf16 false"
    command = [str(Path(sys.executable).with_name("trl")), *f"{trl} {quick}".split()[1:]]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    for line in ours:
        result = CliRunner().invoke(app, line.split()[1:])
        assert result.exit_code == 0, result.output
    assert (tmp_path / "small" / "adapter_config.json").exists()


AXOLOTL = ("axolotl==0.19.0", "addict", "backoff", "colorama", "distro", "posthog")
IN_AXOLOTL = """
import json, sys
import yaml
from axolotl.integrations.base import PluginManager
from axolotl.integrations.config import merge_input_args
from axolotl.loaders.adapter import load_adapter
from axolotl.utils.dict import DictDefault
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

given = yaml.safe_load(sys.argv[1]) | {"base_model": "base", "learning_rate": 1e-2, "micro_batch_size": 4,
    "max_steps": 12, "datasets": [{"path": "data.jsonl", "type": "completion"}]}
plugins = PluginManager.get_instance()
plugins.register(given["plugins"][0])
cfg = DictDefault(merge_input_args()[1](**given).model_dump(exclude_none=True))
model, config = load_adapter(AutoModelForCausalLM.from_pretrained("base"), cfg, cfg.adapter)
print("PEFT:", config.peft_type.value)
rows = [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}] * 48
arguments = TrainingArguments("trained", max_steps=12, use_cpu=True, report_to=[], save_strategy="no")
callbacks = plugins.add_callbacks_pre_trainer(cfg, model)
trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows * 3, callbacks=callbacks)
for callback in plugins.add_callbacks_post_trainer(cfg, trainer):
    trainer.add_callback(callback)
trainer.train()
model.save_pretrained("out")
"""


@pytest.mark.slow
@pytest.mark.real
def test_the_plugin_for_axolotl(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "packages")]
    subprocess.run([*command, *AXOLOTL], check=True)
    save_decoder(tmp_path / "base")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "packages"), "AXOLOTL_DO_NOT_TRACK": "1"}

    def axolotl(settings: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", IN_AXOLOTL, settings]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)

    page = (EXAMPLES.parent / "docs" / "cookbook.md").read_text(encoding="utf-8")
    settings = page.partition("## axolotl")[2].split("```yaml\n")[1].split("```")[0]
    done = axolotl(settings)
    assert "PEFT: LORA" in done.stdout, done.stderr
    learned = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert learned["peft_type"] == "LORA"
    assert len(set(learned["rank_pattern"].values())) > 1

    done = axolotl(settings.replace("lrlora_size: r4", "lrlora_keep: 0.5"))
    assert re.search(r"%\)\s+of\s+its\s+gain", done.stdout), done.stderr
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] < 16

    known = {"adapter": "lora", "lrlora_size": None}
    known |= {f"lora_{name}": learned[name] for name in ("rank_pattern", "alpha_pattern")}
    done = axolotl(json.dumps(yaml.safe_load(settings) | known))
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == learned["rank_pattern"]

    done = axolotl(settings.replace("lrlora_size: r4", "lrlora_config: {form: expansion}"))
    assert "PEFT: LRLORA" in done.stdout, done.stderr
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["form"] == "expansion"

    for wrong, said in (
        ("lrlora_sizes: r4", "Unknown setting 'lrlora_sizes'"),
        ("lrlora_size: 4x", "lrlora_size must be a size such as"),
        ("lrlora_config: {form: wave}", "form must be one of"),
        ("lrlora_size: r4\nlrlora_config: {form: sinc}", "got lrlora_size and lrlora_config"),
        ("lrlora_size: r4\nlora_mlp_kernel: true", "lora_mlp_kernel: true replaces LoRA's forward"),
        ("peft_use_dora: true", "does not support the LoRA-only field(s) use_dora"),
    ):
        assert said in axolotl(settings.replace("lrlora_size: r4", wrong)).stderr


@pytest.mark.integration
def test_lm_evaluation_harness_reads_an_export(tmp_path: Path) -> None:
    models = pytest.importorskip("lm_eval.models.huggingface")
    instances = pytest.importorskip("lm_eval.api.instance")
    save_decoder(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(tmp_path / "base")))  # the harness would
    model.save_pretrained(tmp_path / "base")
    fields = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    get_peft_model(model, LoraConfig(**fields)).save_pretrained(tmp_path / "adapter")
    output = str(tmp_path / "small")
    result = CliRunner().invoke(app, ["export", str(tmp_path / "adapter"), "--max-rank", "2", "--output", output])
    assert result.exit_code == 0, result.output
    pair = ("is it good ?", " good film")
    request = instances.Instance("loglikelihood", {}, pair, 0)
    harness = models.HFLM(pretrained=str(tmp_path / "base"), peft=output, dtype="float32", device="cpu", batch_size=1)
    ((found, _),) = harness.loglikelihood([request], disable_tqdm=True)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), output).eval()
    plain = models.HFLM(adapted, tokenizer=harness.tokenizer, batch_size=1)
    ((expected, _),) = plain.loglikelihood([request], disable_tqdm=True)
    assert found == pytest.approx(expected, abs=1e-4)
    without = models.HFLM(pretrained=str(tmp_path / "base"), dtype="float32", device="cpu", batch_size=1)
    assert abs(without.loglikelihood([request], disable_tqdm=True)[0][0] - found) > 1e-2


@pytest.mark.real
@pytest.mark.integration
def test_accelerate() -> None:
    output = run("accelerate_loop.py", "10")
    assert re.search(r"^0 0\.\d+$", output, re.MULTILINE)
    assert re.match(r"Ranks fitted at step 3: 675,840 to 1\d\d,\d{3} parameters", output.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.real
def test_trl_sft() -> None:
    pytest.importorskip("trl")
    assert "q_proj" in run("sft.py", "10")


@pytest.mark.slow
@pytest.mark.real
def test_trl_dpo_with_a_new_and_with_a_trained_adapter() -> None:
    pytest.importorskip("trl")
    output = run("dpo.py", "2")
    loss = re.search(r"second run: ([\d.]+)", output)
    # Only if the reference is the trained adapter itself is the first loss log 2.
    assert loss is not None
    assert float(loss[1]) == pytest.approx(0.6931, abs=1e-4)
    assert "adapters: default, ref" in output


@pytest.mark.slow
@pytest.mark.real
def test_sentence_transformers() -> None:
    pytest.importorskip("sentence_transformers")
    difference = re.search(r"after loading: ([\d.e-]+)", run("sentence_embeddings.py", "2"))
    assert difference is not None
    assert float(difference[1]) == 0


@pytest.mark.real
def test_adapters_of_transformers() -> None:
    output = run("transformers_adapters.py")
    assert output.count("True") == 3
    assert "False" not in output


@pytest.mark.slow
@pytest.mark.real
def test_a_4_bit_base() -> None:
    pytest.importorskip("trl")
    pytest.importorskip("bitsandbytes")
    output = run("quantized.py", "2")
    assert re.search(r"φ: \{torch\.float32\}", output)
    same, adapted, plain = (float(x) for x in re.findall(r": ([\d.e-]+)$", output, re.MULTILINE))
    assert same == 0
    assert adapted <= 1.5 * plain  # no more than quantising the base model costs by itself
