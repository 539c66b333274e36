"""Scores of the commonsense sets, beside those of EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ..processes import run

pytest.importorskip("lm_eval")

# Its name of a set → ours.
SETS = {
    "piqa": "piqa",
    "social_iqa": "social-iqa",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc_easy": "arc-easy",
    "openbookqa": "openbookqa",
}
# A small Llama with a tokenizer like the real one's: pairs of bytes, a first token, and none for padding.
SCRIPT = """
import datasets, json, sys, torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments
from lrlora.train.tasks import ChoiceByLikelihood
from lrlora_lab import hub_data
from tests.lab.test_hub_data import EXAMPLES, load_dataset
from tests.train.small import SIZES, WORDS

datasets.load_dataset = hub_data.load_dataset = load_dataset
pairs, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=sorted(alphabet))
pairs.train_from_iterator([*map(str, EXAMPLES), " ".join(WORDS)], trainer)
pairs.post_processor = processors.TemplateProcessing(
    single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 0)]
)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=pairs, bos_token="<s>", eos_token="</s>")
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1)).eval()
sets = json.loads(sys.argv[1])
theirs = simple_evaluate(HFLM(model, tokenizer=tokenizer, batch_size=8), tasks=list(sets), log_samples=True)
arguments = TrainingArguments("out", use_cpu=True, report_to="none", per_device_eval_batch_size=4)
kind, found = ChoiceByLikelihood(), {}
trainer = kind.trainer(tokenizer, model=model, args=arguments)
for task, ours in sets.items():
    data = hub_data.load_hub_data(f"commonsense:{ours}")["test"]
    result = trainer.predict(kind.encode(data, tokenizer, None))
    rows = zip(result.predictions[0].tolist(), data["choices"])
    samples = sorted(theirs["samples"][task], key=lambda sample: sample["doc_id"])
    found[task] = {
        "ours": [row[: len(choices)] for row, choices in rows],
        "theirs": [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples],
        "accuracy": [result.metrics["test_accuracy"], theirs["results"][task]["acc,none"]],
        "normalised": [result.metrics["test_accuracy_norm"], theirs["results"][task].get("acc_norm,none")],
    }
with open(sys.argv[2], "w") as file:
    json.dump(found, file)
"""


@pytest.mark.integration
def test_likelihoods_and_accuracies_are_those_of_the_harness(tmp_path: Path) -> None:
    run(SCRIPT, json.dumps(SETS), "found.json", cwd=tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found) == set(SETS)
    for task, each in found.items():
        assert len(each["ours"]) == len(each["theirs"]) == 32
        for ours, theirs in zip(each["ours"], each["theirs"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4), task
        assert each["accuracy"][0] == pytest.approx(each["accuracy"][1]), task
        if each["normalised"][1] is not None:
            assert each["normalised"][0] == pytest.approx(each["normalised"][1]), task
    assert len({each["accuracy"][0] for each in found.values()}) > 1  # a constant would agree with anything
