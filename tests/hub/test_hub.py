"""Reading from the stand-in hub with unchanged `datasets` and `transformers`, and uploading to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from ..train.small import reviews, save_encoder
from .running import caches
from .server import TOKEN

_SETS = """
from datasets import load_dataset
from tests.hub.data import DATA, SCRIPTS

for repository, configurations in DATA.items():
    for name, made in configurations.items():
        revision = "refs/convert/parquet" if repository in SCRIPTS else None
        # The branch of parquet files has no card: what is of one configuration is all that can be asked for.
        loaded = load_dataset(repository, None if revision else name, revision=revision)
        # Without a card, the order of the splits is not the set's own.
        assert list(loaded) == list(made) or (revision and set(loaded) == set(made)), (repository, name, list(loaded))
        for split in made:
            assert loaded[split].features == made[split].features, (repository, name, loaded[split].features)
            assert list(loaded[split].features) == list(made[split].features), (repository, name)
            assert loaded[split].to_list() == made[split].to_list(), (repository, name, split)
for repository in ("google/boolq", "Rowan/hellaswag", "uoft-cs/cifar10", "uoft-cs/cifar100", "baber/piqa"):
    (made,) = DATA[repository].values()
    assert load_dataset(repository).num_rows == made.num_rows, repository
streamed = next(iter(load_dataset("google/boolq", split="train", streaming=True)))
assert streamed == DATA["google/boolq"]["default"]["train"][0], streamed
"""

_MODELS = """
import torch
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

names = {
    "FacebookAI/roberta-base": ("<s>", "</s>"),
    "microsoft/deberta-v3-base": ("[CLS]", "[SEP]"),
    "meta-llama/Llama-3.2-1B": ("<|begin_of_text|>", None),
    "meta-llama/Meta-Llama-3-8B": ("<|begin_of_text|>", None),
    "Qwen/Qwen3-0.6B": (None, None),
}
for name, (first, last) in names.items():
    tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name)
    vectors = []
    for text in ("The red dog finds the ball.", "The blue cat hides the book."):
        ids = tokenizer(text)["input_ids"]
        tokens = tokenizer.convert_ids_to_tokens(ids)
        assert (first is None or tokens[0] == first) and (last is None or tokens[-1] == last), tokens
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text, (name, tokens)
        assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids, (name, tokens)
        vectors.append(model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1].float())
    assert torch.linalg.norm(vectors[0] - vectors[1]) > 0.1, name
    assert model(input_ids=torch.full((1, 300), 5)).last_hidden_state.isfinite().all(), name
assert AutoTokenizer.from_pretrained("meta-llama/Llama-3.2-1B").pad_token is None
assert AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B").pad_token == "<|endoftext|>"

name = "google/vit-base-patch16-224-in21k"
image = torch.zeros(3, 40, 48, dtype=torch.uint8).numpy()
pixels = AutoImageProcessor.from_pretrained(name)(image, return_tensors="pt")["pixel_values"]
assert pixels.shape == (1, 3, 32, 32), pixels.shape
assert AutoModel.from_pretrained(name)(pixels).last_hidden_state.shape == (1, 17, 32)
"""

_REFUSED = """
import pytest
from datasets import load_dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoConfig

with pytest.raises(DatasetNotFoundError, match="'nobody/nothing' doesn't exist on the Hub"):
    load_dataset("nobody/nothing")
with pytest.raises(DatasetNotFoundError, match="Revision 'older' doesn't exist"):
    load_dataset("google/boolq", revision="older")
with pytest.raises(ValueError, match="BuilderConfig 'colla' not found"):
    load_dataset("nyu-mll/glue", "colla")
for script in ("ybisk/piqa", "allenai/social_i_qa"):
    with pytest.raises(RuntimeError, match="Dataset scripts are no longer supported"):
        load_dataset(script)
with pytest.raises(OSError, match="nobody/nothing is not a local folder and is not a valid model identifier"):
    AutoConfig.from_pretrained("nobody/nothing")
with pytest.raises(RepositoryNotFoundError):
    HfApi().model_info("nobody/nothing")
with pytest.raises(RevisionNotFoundError):
    HfApi().model_info("Qwen/Qwen3-0.6B", revision="older")
with pytest.raises(EntryNotFoundError):
    hf_hub_download("Qwen/Qwen3-0.6B", "absent.json")
assert len(HfApi().dataset_info("google/boolq").sha) == 40
"""


@pytest.mark.parametrize("script", [_SETS, _MODELS, _REFUSED], ids=["sets", "models", "refused"])
def test_libraries_take_the_stand_in_for_the_hub(script: str, hub: dict[str, str], tmp_path: Path) -> None:
    # `datasets` takes what is in the cache where the hub refuses, so that each test has a cache of its own.
    environment = {**os.environ, **hub, **caches(tmp_path)}
    command, root = [sys.executable, "-c", script], Path(__file__).parents[2]
    ran = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr[-4000:]


def test_a_run_is_pushed_and_so_is_an_export(hub: dict[str, str], tmp_path: Path) -> None:
    save_encoder(tmp_path / "base")
    reviews().to_csv(tmp_path / "reviews.csv", index=False)

    def command(text: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
        program, *arguments = text.split()
        return subprocess.run(
            [str(Path(sys.executable).with_name(program)), *arguments],
            env={**os.environ, **hub, **caches(tmp_path / "cache"), "COLUMNS": "300", "HF_TOKEN": token},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    def pushing(output: str) -> str:
        columns = "--column text=review --column label=verdict"
        train = f"lrlora train --model base --data reviews.csv --task classify {columns} --steps 3 --output {output}"
        settings = {"push_to_hub": "true", "hub_model_id": "me/films", "hub_private_repo": "true"}
        return train + "".join(f" --training {name}={value}" for name, value in settings.items())

    refused = command(pushing("refused"), token="wrong")
    assert "push_to_hub=True, but the hub does not take me/films: Client error '401" in refused.stderr
    assert not (tmp_path / "refused").exists()
    assert command(f"{pushing('planned')} --dry-run", token="wrong").returncode == 0
    pushed = command(pushing("films"))
    assert "Pushed: me/films" in pushed.stdout, pushed.stderr
    assert Path(hub["LRLORA_TEST_HUB"], "models", "me", "films.visibility").read_text() == "private"
    assert command("lrlora export films --max-rank 2 --output small").returncode == 0
    uploaded = command("hf upload me/small small")
    assert uploaded.returncode == 0, uploaded.stderr

    for name in ("films", "small"):
        local = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.is_file()}
        code = f"from huggingface_hub import snapshot_download; print(snapshot_download('me/{name}'))"
        there = Path(command_of_python(code, {**hub, **caches(tmp_path / "cache")}).splitlines()[-1])
        found = {path.name: path.read_bytes() for path in there.iterdir() if path.is_file()}
        assert found == local
    # The base model, downloaded while the run begins, is part of its record.
    columns = "--column text=review --column label=verdict"
    first = "lrlora train --model FacebookAI/roberta-base --data reviews.csv --task classify --steps 1 --output first"
    assert command(f"{first} {columns}").returncode == 0
    record = json.loads((tmp_path / "first" / "run.json").read_text())
    assert "the weights of the base model" in record["fingerprints"]
    metadata = ModelCard.load(tmp_path / "films" / "README.md").data
    assert metadata.pipeline_tag == "text-classification"
    assert {result.metric_type for result in metadata.eval_results} >= {"accuracy", "loss"}


def command_of_python(code: str, environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True).stdout
