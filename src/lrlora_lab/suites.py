"""Suites, each with the protocol of its field and the sources."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from lrlora.checks import require_known
from lrlora.train.commonsense import ALL, COMMONSENSE
from lrlora.train.yaml import read_yaml

from .capacity import CapacityTask
from .suite import Suite, Task

# A new classification head needs a much higher rate than an adapter. With a common rate, a method that merely tolerates
# high rates looks like a better adapter (docs/phi.md), so the head has its own rate, the same for all methods.
_HEAD: dict[str, Any] = {"head_learning_rate": 16e-3}
# A language model that continues to predict tokens needs lower rates than one with a new head.
_CHOICES: dict[str, Any] = {"task": "multiple-choice", "rate_scale": 0.25}


def _glue(name: str, steps: int, test: str = "validation", metric: str | None = None, **columns: str) -> Task:
    # The test labels of GLUE are withheld: its validation split serves as the test, and part of training as validation.
    return Task(
        f"nyu-mll/glue:{name}",
        "regress" if name == "stsb" else "classify",
        steps,
        32,
        test=test,
        metric=metric,
        columns=columns,
        max_length=128,
        rate_scale=0.5,
    )


def _vision(data: str, test: str = "test", **columns: str) -> Task:
    return Task(data, "image-classify", 1_600, 64, test=test, columns=columns, train_examples=1_000)


def _pictures(data: str) -> Task:
    return Task(
        f"embedded:{data}",
        "image-classify",
        100,
        validation_examples=400,
        test_examples=1_000,
        head_learning_rate=4e-3,
    )


_PAIR = {"text": "sentence1", "text_pair": "sentence2"}
_LORA = tuple(f"lora+r={r}" for r in (1, 2, 4, 8, 16))
_SIZES = ((1, 32), (2, 16), (4, 8))  # r and Q
_EXPANSION = tuple(f"expansion+r={r}+num_terms={q}" for r, q in _SIZES)
_PHI = tuple(f"{form}+r={r}" for form in ("paper", "lr-lora") for r in (1, 4))
# Other methods, at one or two informative ranks.
_PEERS = ("loha+r=1", "hira+r=1", "hira+r=4", "dora+r=1", "vera+r=256")
# Nearly the full sign matrix, and LoRA's parameters in a single module.
_CONTROLS = (
    "expansion+r=1+num_terms=128",
    "lora+r=2+target_modules=intermediate",
    "lora+r=2+target_modules=output",
)
_PAPER_SCALED = "paper+r=1+lora_alpha=0.25"
_CAPACITY = {
    "labels": CapacityTask("labels", 800, 64, methods=(*_LORA, *_EXPANSION, *_PHI, *_PEERS, *_CONTROLS)),
    "german": CapacityTask(
        "transfer",
        500,
        8,
        corpus="german",
        methods=(
            *_LORA,
            *_EXPANSION,
            "expansion+r=8+num_terms=4",
            *_PHI,
            "paper+r=4+sharing=global",
            "hira+r=1",
        ),
    ),
    "source-code": CapacityTask("transfer", 500, 8, corpus="source-code", methods=(*_LORA[:3], *_EXPANSION[:2])),
    # Four times the steps: does a small loss mean capacity or only speed?
    "labels-long": CapacityTask("labels", 3_200, 64, methods=(*_LORA[:3], _EXPANSION[0])),
    "picture-labels": CapacityTask(
        "picture-labels",
        400,
        64,
        texts=512,
        rates=(2.5e-3, 5e-3, 1e-2),
        scales=(4.0, 0.25, 1.0, 16.0, 64.0, 256.0),
        climbs_diagonally=True,
        methods=(*_LORA, *_EXPANSION[::2], *_PHI[2:]),
    ),
    # A pretrained decoder, with the scales found on the tasks above.
    "phone-book": CapacityTask(
        "phone-book", 600, 32, texts=250, scales=(4.0,), methods=(*_LORA[:3], _EXPANSION[0], _PAPER_SCALED)
    ),
    "smollm2-german": CapacityTask(
        "language", 300, 4, corpus="german", scales=(4.0,), methods=(_LORA[0], _LORA[2], _EXPANSION[0], _PAPER_SCALED)
    ),
    # Demand that grows with the number of texts.
    **{
        f"labels-{texts}": CapacityTask("labels", 800, 64, texts=texts, methods=(_LORA[3], _EXPANSION[2]))
        for texts in (512, 1_024, 4_096)
    },
    # Equal bits from a growing number of classes.
    **{
        f"classes-{classes}": CapacityTask(
            "labels",
            800,
            64,
            texts=round(6_144 / math.log2(classes)),
            classes=classes,
            methods=(*_LORA[:3], _EXPANSION[0]),
        )
        for classes in (2, 8, 64, 512)
    },
}
SUITES = {
    "capacity": Suite("embedded:minilm", dict(_CAPACITY)),
    # All methods on all tasks, for a few steps.
    "smoke": Suite(
        "embedded:minilm",
        {
            "r8": Task(
                "embedded:r8",
                "classify",
                steps=4,
                batch_size=4,
                max_length=16,
                train_examples=64,
                validation_examples=64,
                test_examples=64,
                **_HEAD,
            ),
        },
    ),
    "offline-nlu": Suite(
        "embedded:minilm",
        {
            "movie-reviews": Task("embedded:movie-reviews", "classify", 200, **_HEAD),
            "ratings": Task("embedded:ratings", "regress", 200, **_HEAD),
            "r8": Task("embedded:r8", "classify", 200, max_length=64, **_HEAD),
            "20-newsgroups": Task("embedded:20-newsgroups", "classify", 300, max_length=48, **_HEAD),
            "vitaminc": Task(
                "embedded:vitaminc",
                "classify",
                1_000,
                max_length=64,
                train_examples=10_000,
                test_examples=2_000,
                **_HEAD,
            ),
        },
    ),
    # Choices by likelihood.
    "offline-commonsense": Suite(
        "embedded:smollm2",
        {
            name: Task(f"embedded:{name}", steps=200, batch_size=8, validation_examples=300, **_CHOICES)
            for name in ("social-iqa", "goal-step", "strategy-qa", "winowhy")
        },
    ),
    # Digits and animals.
    "offline-vision": Suite("embedded:vit", {name: _pictures(name) for name in ("digits", "animals")}),
    # Separate training on each; for joint training, use the preset llama-3-8b.
    "commonsense": Suite(
        "meta-llama/Llama-3.2-1B",
        {
            name: Task(f"commonsense:{name}", steps=steps, max_length=256, test_examples=2_000, **_CHOICES)
            for name, steps in (
                ("boolq", 600),
                ("piqa", 1_000),
                ("social-iqa", 2_000),
                ("hellaswag", 2_000),
                ("winogrande", 2_000),
                ("arc-easy", 300),
                ("arc-challenge", 200),
                ("openbookqa", 500),
            )
        },
        protocol="Prompts and scores follow lm-evaluation-harness; each set is trained on separately.",
    ),
    "glue": Suite(
        "FacebookAI/roberta-base",
        {
            "cola": _glue("cola", 6_010, metric="matthews", text="sentence"),
            "mrpc": _glue("mrpc", 3_100, **_PAIR),
            "qnli": _glue("qnli", 14_730, text="question", text_pair="sentence"),
            "rte": _glue("rte", 3_500, **_PAIR),
            "sst2": _glue("sst2", 45_460, text="sentence"),
            "stsb": _glue("stsb", 4_040, **_PAIR),
            "mnli": _glue("mnli", 77_310, "validation_matched", text="premise", text_pair="hypothesis"),
            "qqp": _glue("qqp", 51_170, text="question1", text_pair="question2"),
        },
        training={"weight_decay": 0.01},
        protocol="Epochs, batch size, weight decay and the range of learning rates (5e-4 to 4e-3) follow AdaLoRA's "
        "scripts for DeBERTaV3-base (arXiv:2303.10512): 25 epochs for CoLA and STS-B, 30 for MRPC, 5 for QNLI "
        "and QQP, 50 for RTE, 24 for SST-2, 7 for MNLI, on nine tenths of the training set. Up to 1,000 examples "
        "of the last tenth select the learning rate. Texts are truncated to 128 tokens. GLUE's validation splits "
        "are the test.",
    ),
    "vision": Suite(
        "google/vit-base-patch16-224-in21k",
        {
            "cifar100": _vision("uoft-cs/cifar100", image="img", label="fine_label"),
            "dtd": _vision("tanganke/dtd"),
            "eurosat": _vision("tanganke/eurosat"),
            "food101": _vision("ethz/food101", "validation"),
            "pets": _vision("timm/oxford-iiit-pet"),
        },
        methods=("full", "lora", "lr-lora", "dora"),
        training={"lr_scheduler_type": "cosine", "warmup_steps": 0.1, "weight_decay": 1e-4},
        protocol="1,000 training examples, as in VTAB-1k (arXiv:1910.04867). 100 epochs with batch size 64, 10 warm-up "
        "epochs, a cosine schedule and no augmentation, as in comparisons of adapters on it.",
    ),
}
_CHOICE_SETS = tuple(f"commonsense:{name}" for name in COMMONSENSE)
# Suites as run on GPUs.
PRESETS = {
    "roberta-base": replace(
        SUITES["glue"], methods=("lora", "lr-lora"), rank=8, training={**SUITES["glue"].training, "bf16": True}
    ),
    "llama-3-8b": Suite(
        "meta-llama/Meta-Llama-3-8B",
        {
            "commonsense": Task(
                f"commonsense:{ALL}",
                "multiple-choice",
                24_900,
                test_data=_CHOICE_SETS,
                max_length=256,
                rate_scale=0.1,
            )
        },
        methods=("lora", "lr-lora"),
        rank=32,
        scale=2.0,
        adapter={"target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]},
        training={"warmup_steps": 100, "gradient_checkpointing": True},
        protocol="Targets, r = 32, α = 64, 3 epochs, batch size 16, 256 tokens and 100 warm-up steps follow DoRA's "
        "scripts for Llama 3 8B (arXiv:2402.09353), after LLM-Adapters (arXiv:2304.01933), whose training set "
        "has 23,000 more questions of WinoGrande. A tenth of the 148,000 here is held out for validation. These "
        "papers score generated answers; here, as in lm-evaluation-harness, the likelihoods of the choices are "
        "compared.",
    ),
    "vit-base": replace(
        SUITES["vision"], rank=8, training={**SUITES["vision"].training, "bf16": True, "dataloader_num_workers": 4}
    ),
}


def load_suite(name: str) -> Suite:
    """A suite of `SUITES` or `PRESETS`, or a user's from a YAML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such suite, or the file does not hold one.

    """
    if name.endswith((".yaml", ".yml")):
        return Suite.from_dict(read_yaml(Path(name)))
    known = {**SUITES, **PRESETS}
    require_known("suite", name, known)
    return known[name]
