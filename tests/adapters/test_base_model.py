"""The base model of an adapter: where it is, and what is loaded of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from typer.testing import CliRunner

from lrlora import LrLoraConfig
from lrlora.adapters import read_updates
from lrlora.adapters.loading import load_adapted
from lrlora.adapters.peft_folder import SavedAdapter
from lrlora.cli import app
from lrlora.train.data import require_data_path
from lrlora.train.models import require_model_folder

from ..train.small import tokenizer

Train = Callable[..., tuple[Path, Any]]


def test_another_place_of_the_base_model(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, _ = train("llama")
    saved = {file.name: file.read_bytes() for file in adapter.iterdir()}
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    there, runner = ("--base", str(tmp_path / "elsewhere")), CliRunner()
    asked = ["export", str(adapter), "--output", str(tmp_path / "lora")]
    assert runner.invoke(app, asked).exit_code == 1
    found = runner.invoke(app, [*asked, *there])
    assert found.exit_code == 0, found.output
    assert re.search(r"random inputs \d+\.\d+% .*lost", " ".join(found.output.split()))
    assert str(tmp_path / "base") in (tmp_path / "lora" / "adapter_config.json").read_text()
    assert saved == {file.name: file.read_bytes() for file in adapter.iterdir()}


def test_a_path_that_is_mistyped_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for name in ("runs/first", "lrlora-run"):
        with pytest.raises(ValueError, match=rf"{name} .*folder .*not exist"):
            read_updates(name)
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
    assert load_adapted(SavedAdapter.read(tmp_path / "adapter")).config.num_labels == 3


def test_a_loaded_decoder_classifies_batches(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    transformers.GPT2Model(config).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    base = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LrLoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_adapted(SavedAdapter.read(tmp_path / "adapter"))
    assert loaded.config.pad_token_id == 0
    assert loaded(input_ids=torch.tensor([[5, 6, 0], [5, 6, 7]])).logits.shape == (2, 2)
