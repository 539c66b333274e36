"""Shared fixtures: tiny random models of each family, and inputs for them. Nothing is downloaded."""

from __future__ import annotations

import gc
import json
import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it as it is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from more

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_TOKENS = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 100}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0)
    return transformers.T5ForConditionalGeneration(config)


class Mlp(nn.Module):
    """A model of the user's own, which transformers knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)))


_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**_SMALL, **_TOKENS)),
    "roberta": lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**_SMALL, **_TOKENS)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **_TOKENS)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SMALL, **_TOKENS)),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**_SMALL, **_TOKENS, num_key_value_heads=2, num_local_experts=4)
    ),
    "t5": _t5,
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**_SMALL, image_size=32, patch_size=8)
    ),
    "features": lambda: transformers.BertModel(transformers.BertConfig(**_SMALL, **_TOKENS), add_pooling_layer=False),
    "mlp": Mlp,
}
FAMILIES = tuple(_BUILDERS)


def save_quantizable(folder: Path) -> None:
    """Save a Llama with rows of 64 values, a block of 4-bit weights: some CPUs take no shorter ones."""
    torch.manual_seed(0)
    sizes = {**_SMALL, "hidden_size": 64, "intermediate_size": 128}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **_TOKENS)).save_pretrained(folder)


@dataclass(frozen=True)
class TinyModel:
    """A recipe for a tiny model: every `build` gives the same weights."""

    family: str

    def build(self) -> Any:
        torch.manual_seed(0)
        return _BUILDERS[self.family]().eval()

    @property
    def targets(self) -> dict[str, Any]:
        """The fields of a configuration that adapts every linear layer."""
        special = {
            "mlp": {"target_modules": ["first", "last"]},
            "mixtral": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"]},
        }
        return special.get(self.family, {"target_modules": "all-linear"})

    def inputs(self) -> dict[str, Tensor]:
        """A batch of two samples."""
        generator = torch.Generator().manual_seed(1)
        if self.family == "mlp":
            return {"x": torch.randn(2, 16, generator=generator)}
        if self.family == "vit":
            return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
        tokens = torch.randint(3, 99, (2, 7), generator=generator)
        return {"input_ids": tokens, "decoder_input_ids": tokens} if self.family == "t5" else {"input_ids": tokens}

    def output(self, model: nn.Module, **inputs: Any) -> Tensor:
        """The model's main output, with a graph."""
        output: Any = model(**{**self.inputs(), **inputs})
        return getattr(output, "logits", getattr(output, "last_hidden_state", output))

    def logits(self, model: nn.Module, **inputs: Any) -> Tensor:
        with torch.no_grad():
            return self.output(model, **inputs)

    def loss(self, model: nn.Module, **inputs: Any) -> Tensor:
        """A loss that every module influences, also below a normalisation."""
        output = self.output(model, **inputs).float()
        target = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
        return (output - target).square().mean()

    def train(self, model: nn.Module, steps: int, lr: float = 1e-2) -> None:
        """AdamW steps on a loss that every module influences."""
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
        model.train()
        for _ in range(steps):
            optimizer.zero_grad()
            self.loss(model).backward()
            optimizer.step()
        model.eval()


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture(scope="session", autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A test that writes into the current folder does not write into the project."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("current"))
        yield


# Same structure as bert: slow, for the table of families alone, which runs with `-m ""`.
ALIKE = ("roberta", "features")
# Parameters of the experts of "mixtral", for PEFT's LoRA.
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in FAMILIES])
def tiny(request: pytest.FixtureRequest) -> TinyModel:
    """One tiny model of each family."""
    return TinyModel(request.param)


@pytest.fixture
def tiny_bert() -> TinyModel:
    return TinyModel("bert")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a browser is an integration test, also where its fixture was asked for by another."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()) and not item.get_closest_marker("quick"):
            item.add_marker("integration")


def pytest_collection_finish() -> None:
    # What was imported stays: no collection need look at its millions of objects again.
    gc.collect()
    gc.freeze()


_OUTCOMES = pytest.StashKey[dict[str, dict[str, str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--behaviours", metavar="FILE", help="write what the behaviour tests found, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's job in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[_OUTCOMES] = {}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    report = (yield).get_result()
    # The tests of tuner/test_behaviours.py are rows of the table in docs/compatibility.md.
    if item.path.name != "test_behaviours.py" or not (report.when == "call" or report.skipped or report.failed):
        return
    passed = "refused" if item.get_closest_marker("refused") else "yes"
    outcome = {"passed": passed, "skipped": "–", "failed": "FAILED"}[report.outcome]
    family = item.callspec.params["tiny"]  # type: ignore[attr-defined]
    row = item.config.stash[_OUTCOMES].setdefault(item.function.__doc__, {})  # type: ignore[attr-defined]
    # A behaviour may have several tests (dtypes, modes): the worst counts.
    order = ("FAILED", "refused", "yes", "–")
    row[family] = min(row.get(family, "–"), outcome, key=order.index)


def pytest_sessionfinish(session: pytest.Session) -> None:
    gc.unfreeze()
    file = session.config.getoption("--behaviours")
    if file:
        Path(file).write_text(json.dumps(session.config.stash[_OUTCOMES], indent=1, ensure_ascii=False) + "\n")
