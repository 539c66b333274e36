"""Loss of compressed adapters: cut by loss and by other rules, compared with LoRA trained at that size.

Takes hours. Jobs: `cut--…` (all cuts of one adapter), `keep--…` (what `--keep` keeps of it on test data), `own--…`
(cuts without data), and `costs`.
"""

from __future__ import annotations

import functools
import pydoc_data.topics
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict, load_from_disk
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from lrlora.adapters import factorize, save_as_lora
from lrlora.adapters.factorize import parameters_of_rank
from lrlora.learned import example_losses, loss_curve, mean_loss, model_loss
from lrlora.learned.directions import LossCurve, directions
from lrlora.learned.gain import losses_of, mean_of
from lrlora.learned.moments import collect_moments
from lrlora.lora.factors import best_per_parameter
from lrlora.train.compression import EXAMPLES, TERMS, Compression, HeldOut, Subject
from lrlora.train.inference import evaluate
from lrlora.train.models import model_source
from lrlora.train.run import train
from lrlora.train.settings import TrainConfig
from lrlora.train.tasks.base import logits

from ..byte_model import CONTEXT, load_corpus, sample_batch
from ..capacity_tasks import TEST_WINDOWS, transfer
from ..inputs import load_chats, located
from ..pool import Record
from . import Job, Measurement
from .compress import cost_of
from .loss_tables import BYTES, KEEPS, SHARES, STAGES, sections

SEEDS = (0, 1, 2)
# Byte model, with α = 4r: learning rates by r, from docs/capacity.md.
BYTE_RATES = {16: 5e-3, 8: 5e-3, 4: 1e-2}
BYTE_SHARES = {0.5: 8, 0.25: 4}  # share of the size of r = 16 → r of that size
BYTE_STEPS = 500
BYTE_WINDOWS = 32  # windows of 128 bytes, 4,096 loss terms, for `byte_own`
FIXED_TEXTS, FIXED_LENGTH = 640, (80, 400)  # for a classifier; in characters


@dataclass(frozen=True)
class Task:
    """A run of `lrlora train`, and its test data.

    Args:
        settings: of the run, without rank, rate, seed and output; data: embedded, or a key of `DATA`.
        rate: peak learning rate; of *german*, the best of 1e-3 to 8e-3 on the first seed's validation data.
        method, like: method of the adapter to cut, and the task with the LoRAs for comparison.
        tests: number of examples.
        ranks: of the LoRAs trained at smaller sizes.
        stages: what is measured.

    """

    settings: dict[str, Any]
    rate: float
    method: str = "lora"
    like: str | None = None
    tests: int = 384
    ranks: tuple[int, ...] = (4, 2)
    stages: tuple[str, ...] = STAGES


_MINILM = {
    "model": "embedded:minilm", "task": "classify", "max_length": 48, "validation_examples": 512,
    "head_learning_rate": 1e-3, "training": {"eval_strategy": "no"},
}  # fmt: skip
_SMOLLM2 = {"model": "embedded:smollm2", "task": "causal-lm", "batch_size": 4, "max_length": 64, "steps": 40}
_SMOLLM2 |= {"training": {"eval_strategy": "no"}, "validation_examples": 128}
TASKS = {
    "news": Task(_MINILM | {"data": "embedded:20-newsgroups", "steps": 150}, 4e-3),
    "r8": Task(_MINILM | {"data": "embedded:r8", "steps": 100}, 2e-3, tests=256),
    "animals": Task(
        {
            "model": "embedded:vit", "task": "image-classify", "data": "embedded:animals", "steps": 150,
            "validation_examples": 512, "training": {"eval_strategy": "no"},
        },
        1e-3,
        tests=256,
    ),
    "german": Task(_SMOLLM2 | {"data": "german"}, 4e-3, tests=48, ranks=(4,)),
    "chat": Task(_SMOLLM2 | {"data": "chat"}, 2e-3, tests=48, ranks=()),
}  # fmt: skip
TASKS |= {
    "news-phi": replace(TASKS["news"], method="lr-lora", like="news", stages=("cut", "keep")),
    "news-full": replace(TASKS["news"], method="full", like="news", rate=1e-4, tests=256, stages=("cut", "keep")),
    "r8-nothing": replace(TASKS["r8"], rate=1e-8, stages=("keep",)),
    "r8-little": replace(TASKS["r8"], settings=TASKS["r8"].settings | {"steps": 40}, stages=("keep",)),
}


def german() -> DatasetDict:
    """Speeches in pieces of about 64 tokens, in disjoint splits."""
    parts = {}
    for name, data, count in zip(("train", "validation", "test"), load_corpus("german"), (800, 128, 200), strict=True):
        text, piece = data.numpy().tobytes().decode(errors="replace"), 200
        starts = [len(text) * i // count for i in range(count)]
        parts[name] = Dataset.from_dict({"text": [text[start : start + piece].strip() for start in starts]})
    return DatasetDict(parts)


DATA = {"german": german, "chat": load_chats}


def data(name: str, files: Path) -> Record:
    """Write a data set."""
    DATA[name]().save_to_disk(str(files / name))
    return {}


def data_of(name: str, files: Path) -> str:
    """Data of a task."""
    said: str = TASKS[name].settings["data"]
    return str(files / said) if said in DATA else located(said)


def run_name(name: str, rank: int, seed: int, *, rival: bool = False) -> str:
    """Folder of a run: of the adapter to cut, or of a LoRA trained at a smaller size."""
    task = TASKS[name]
    if rival and task.like:
        return run_name(task.like, rank, seed)
    rank = 0 if task.method == "full" else rank
    return f"{name}-{task.method}-{rank}-{task.rate:g}-{seed}"


def trained(name: str, rank: int, seed: int, files: Path) -> Record:
    """Train a run."""
    task, folder = TASKS[name], files / run_name(name, rank, seed)
    settings = task.settings | ({} if task.method == "full" else {"rank": rank})
    settings |= {"model": located(settings["model"]), "data": data_of(name, files)}
    config = TrainConfig(**settings, method=task.method, learning_rate=task.rate, seed=seed, output=str(folder))
    return train(config, overwrite=folder.exists(), announce=lambda line: None).metrics


@dataclass
class Case:
    """An adapter to cut: the inputs of `lrlora export`, and unseen examples."""

    model: Any
    whole: list[Any]
    updates: Any
    training: list[Any]
    unseen: list[Any]
    loss: Any
    as_it_is: float  # test loss

    @functools.cached_property
    def moments(self) -> tuple[dict[str, Any], int]:
        """Moments by module, and the number of loss terms."""
        return collect_moments(self.model, self.whole, self.training, self.loss)

    @functools.cached_property
    def curve(self) -> LossCurve:
        """Cuts by loss."""
        moments, terms = self.moments
        return LossCurve([directions(part, moments[part.module], terms) for part in self.whole])

    def test(self, factors: list[Any]) -> float:
        """Test loss of a cut."""
        return mean_loss(self.model, factors, self.unseen, self.loss)


def loaded(name: str, rank: int, seed: int, files: Path, *, rival: bool = False) -> tuple[Any, list[Any]]:
    """A run of `lrlora train` with its examples, and test batches."""
    task, folder = TASKS[name], files / run_name(name, rank, seed, rival=rival)
    base = model_source(located(task.settings["model"])) if task.method == "full" and not rival else None
    subject = Subject.read(str(folder), base=base, announce=lambda line: None)
    test = data_of(name, files)
    said = load_from_disk(test)["test"] if task.settings["data"] in DATA else test
    examples = subject.run.examples(said, "test", lambda line: None, with_label=True)
    examples = examples.shuffle(seed=1).select(range(min(task.tests, len(examples))))
    return subject, list(subject.run.trainer(subject.run.encoded(examples)).get_eval_dataloader())


def case_of(name: str, seed: int, files: Path) -> Case:
    """A run of `lrlora train`."""
    subject, test = loaded(name, 8, seed, files)
    training = subject.batches(subject.training, EXAMPLES, TERMS)
    unseen = HeldOut(subject, test, training)

    whole = [part for part in subject.whole if part.rank]
    as_it_is = mean_of(unseen.whole)
    return Case(subject.on_base, whole, subject.updates, training, test, subject.loss, as_it_is)


def byte_case(rank: int, seed: int, files: Path) -> Case:
    """Byte model on German, adapted by LoRA."""
    corpus, setting = load_corpus("german"), transfer("german", 16, seed)
    model = PeftModel.from_pretrained(setting.model, files / f"bytes-{rank}-{seed}")
    whole, generator = factorize(model, energy=1.0), torch.Generator().manual_seed(seed)
    held = len(corpus.test) // CONTEXT
    chosen = corpus.test[: held * CONTEXT].view(held, CONTEXT)[torch.arange(TEST_WINDOWS) * held // TEST_WINDOWS]
    test = [_bytes(some) for some in chosen.long().split(64)]
    training = [_bytes(sample_batch(corpus.train, generator, 16)) for _ in range(2)]
    as_it_is = mean_loss(model, whole, test)
    return Case(model, whole, model, training, test, model_loss, as_it_is)


def _bytes(windows: Any) -> dict[str, Any]:
    return {"input_ids": windows, "labels": windows}


def optimise(model: Any, setting: Any, rate: float, steps: int) -> None:
    """AdamW with warm-up over a twentieth of the steps and linear decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / warm) * (1 - i / steps))
    for _, loss in zip(range(steps), setting.losses(model), strict=False):
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()


def bytes_trained(rank: int, seed: int, files: Path) -> Record:
    """Train a LoRA on the byte model."""
    setting = transfer("german", 16, seed)
    torch.manual_seed(seed)
    model = get_peft_model(setting.model, LoraConfig(r=rank, lora_alpha=4 * rank, target_modules=setting.targets))
    optimise(model, setting, BYTE_RATES[rank], BYTE_STEPS)
    model.save_pretrained(str(files / f"bytes-{rank}-{seed}"))
    return {}


def by_scalar(case: Case, budget: int) -> list[Any]:
    """SVD directions, with energies scaled by one scalar per module: the product of the means of both moments."""
    worth = []
    by_module, terms = case.moments
    for part in case.whole:
        moments, sigma = by_module[part.module], part.A.double().square().sum(1)
        # In orthonormal bases of the update's span.
        inputs = (moments.inputs.diagonal() / sigma).mean() / moments.weight
        gradients = (moments.gradients.diagonal() / sigma).mean() / terms
        worth.append(sigma.square() * inputs * gradients)
    costs = [part.parameters_per_rank for part in case.whole]
    ranks = best_per_parameter(worth, costs, budget)
    return [replace(p, A=p.A[:rank], B=p.B[:, :rank]) for p, rank in zip(case.whole, ranks, strict=True)]


def by_share(case: Case, budget: int) -> list[Any]:
    """One share of ‖ΔW‖² for all modules, as kohya's `sv_fro`: the largest within the budget."""
    held = []  # share of its first directions, by module
    for part in case.whole:
        energy = part.A.double().square().sum(1).square()  # σ², as A and B are balanced
        held.append(energy.cumsum(0) / energy.sum())
    low, high, best = 0.0, 1.0, []
    for _ in range(50):
        share = (low + high) / 2
        ranks = [int((each < share).sum()) + 1 for each in held]
        if sum(rank * part.parameters_per_rank for rank, part in zip(ranks, case.whole, strict=True)) <= budget:
            low, best = share, ranks
        else:
            high = share
    return [replace(p, A=p.A[:rank], B=p.B[:, :rank]) for p, rank in zip(case.whole, best, strict=True)]


def keep(name: str, seed: int, files: Path) -> Record:
    """What `lrlora export --keep` keeps of a run on test data that it never saw."""
    task, folder = TASKS[name], files / run_name(name, 8, seed)
    subject, test = loaded(name, 8, seed, files)
    unseen = HeldOut(subject, test, subject.batches(subject.training, EXAMPLES, TERMS))
    compression = Compression(subject, announce=lambda line: None)
    metric = subject.run.kind.metrics[0]
    metric = "mean_token_accuracy" if metric == "loss" else metric
    whole = sum(part.parameters for part in subject.whole)
    rows = []
    for share in KEEPS:
        try:
            factors, _ = compression.smallest(share)
        except ValueError as error:
            rows.append({"keep": share, "refused": str(error)})
            continue
        with tempfile.TemporaryDirectory() as scratch:
            save_as_lora(factors, subject.updates, Path(scratch) / "lora")
            how: dict[str, Any] = {"split": "test", "limit": task.tests, "answers": False}
            scores = [
                evaluate(each, data_of(name, files), announce=lambda line: None, **how)[metric]
                for each in (folder, Path(scratch) / "lora")
            ]
        rows.append(
            {
                "keep": share, "size": sum(part.parameters for part in factors) / whole,
                "confirmed": compression.last.kept(factors).share, "test": unseen.kept(factors)._asdict(),
                "without": mean_of(unseen.without), "whole": mean_of(unseen.whole),
                "cut": mean_of(unseen.losses(factors)), "metric": metric, "before": scores[0], "after": scores[1],
            }
        )  # fmt: skip
    return {"task": name, "seed": seed, "cuts": rows}


def own(name: str, seed: int, files: Path) -> Record:
    """Cuts by text or labels of the adapted model, measured on real test data."""
    if name == BYTES:
        return byte_own(seed, files)
    subject, test = loaded(name, 8, seed, files)
    kind = subject.run.kind
    unseen = HeldOut(subject, test, subject.batches(subject.training, EXAMPLES, TERMS))
    row: dict[str, Any] = {
        "task": name,
        "seed": seed,
        "whole": mean_of(unseen.whole),
        "without": mean_of(unseen.without),
    }
    whole = sum(part.parameters for part in subject.whole)
    sources = {"real": (subject, subject.loss), "sampled": (subject, sampled(kind.generates))}
    if kind.generates:
        pieces = replace(subject, training=fixed_pieces(subject.run.processor))
        sources["fixed"] = pieces, sampled(causal=True)
    if TASKS[name].settings["task"] != "image-classify":
        alone = subject.on_own_text() if kind.generates else on_fixed_texts(subject)
        sources["own" if kind.generates else "fixed"] = alone, alone.loss
        factors, _ = Compression(alone, announce=lambda line: None).smallest(KEEPS[0])
        row |= {"size": sum(part.parameters for part in factors) / whole, "kept": unseen.kept(factors)._asdict()}
    for source, (examples, loss) in sources.items():
        batches = examples.batches(examples.training, EXAMPLES, TERMS)
        curve = loss_curve(subject.on_base, subject.whole, batches, loss)
        for share in SHARES:
            cut = curve.within(int(share * whole))
            row[f"{source}, {share}"] = mean_of(example_losses(subject.on_base, cut, test, subject.loss))
    return row


def on_fixed_texts(subject: Subject) -> Subject:
    """Copy with fixed texts, half of them held out, and labels sampled from the adapted classifier."""
    run, texts = subject.run, fixed_texts()[:FIXED_TEXTS]
    encoded = run.encoded(Dataset.from_dict({"text": texts}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        predicted = torch.tensor(logits(run.trainer(encoded).predict(encoded))).float()
        labels = torch.distributions.Categorical(logits=predicted).sample()
    labelled = Dataset.from_dict({"text": texts, "label": [run.record.labels[label] for label in labels.tolist()]})
    parts = run.examples(labelled, None, lambda line: None, with_label=True).train_test_split(0.5, seed=0)
    return replace(subject, training=parts["train"], held_out=parts["test"])


def fixed_texts() -> list[str]:
    """Sentences of Python's own documentation, in a fixed random order."""
    low, high = FIXED_LENGTH
    paragraphs = (" ".join(part.split()) for topic in pydoc_data.topics.topics.values() for part in topic.split("\n\n"))
    fitting = (text for text in paragraphs if low <= len(text) <= high and re.match(r"[A-Z][a-z]+ [a-z]", text))
    plain = list(dict.fromkeys(fitting))
    return [plain[place] for place in np.random.default_rng(0).permutation(len(plain))]


def byte_own(seed: int, files: Path) -> Record:
    """`own` for the byte model, whose own text begins with a random byte."""
    case, generator = byte_case(16, seed, files), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = case.updates
    real = sample_batch(load_corpus("german").train, generator, BYTE_WINDOWS)
    fixed = torch.tensor(list(" ".join(fixed_texts()).encode()), dtype=torch.uint8)
    own = torch.randint(256, (BYTE_WINDOWS, 1), generator=generator)
    with torch.no_grad():
        while own.shape[1] < CONTEXT:
            logits = model(input_ids=own).logits[:, -1].float()
            own = torch.cat([own, torch.distributions.Categorical(logits=logits).sample()[:, None]], dim=1)
    drawn = sampled(causal=True)
    sources = {
        "real": (real, model_loss), "sampled": (real, drawn), "own": (own, model_loss),
        "fixed": (sample_batch(fixed, generator, BYTE_WINDOWS), drawn),
    }  # fmt: skip
    row: dict[str, Any] = {"task": BYTES, "seed": seed, "whole": case.as_it_is}
    for source, (windows, loss) in sources.items():
        curve = loss_curve(model, case.whole, [_bytes(some) for some in windows.split(16)], loss)
        for share, rank in BYTE_SHARES.items():
            row[f"{source}, {share}"] = case.test(curve.within(parameters_of_rank(case.updates, rank)))
    return row


def fixed_pieces(tokenizer: Any) -> Any:
    """Python's documentation in pieces of 64 tokens."""
    tokens = tokenizer(" ".join(fixed_texts()))["input_ids"]
    rows = [tokens[start : start + 64] for start in range(0, len(tokens) - 64, 64)]
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * 64] * len(rows), "labels": rows})


METHODS: dict[str, Callable[[Case, int, int], list[Any]]] = {
    "by loss": lambda case, budget, rank: case.curve.within(budget),
    "by scalar": lambda case, budget, rank: by_scalar(case, budget),
    "by energy": lambda case, budget, rank: factorize(case.updates, budget=budget),
    "every k": lambda case, budget, rank: factorize(case.updates, max_rank=rank),
    "sv_fro": lambda case, budget, rank: by_share(case, budget),
}


def cut(name: str, seed: int, files: Path) -> Record:
    """All cuts of one adapter, with their test losses."""
    if name == BYTES:
        case = byte_case(16, seed, files)
        rivals = {rank: byte_case(rank, seed, files).as_it_is for rank in BYTE_SHARES.values()}
    else:
        case, rivals = case_of(name, seed, files), {}
        for rank in TASKS[name].ranks:
            subject, test = loaded(name, rank, seed, files, rival=True)
            rivals[rank] = mean_of(losses_of(subject.run.model.get_base_model(), test, subject.loss))
    found: dict[str, Any] = {"task": name, "seed": seed, "test": case.as_it_is}
    for share, rank in (BYTE_SHARES if name == BYTES else SHARES).items():
        budget = parameters_of_rank(case.updates, rank)
        for method, choose in METHODS.items():
            factors = choose(case, budget, rank)
            found[f"{method}, {share}"] = case.test(factors)
            if method == "by loss":
                found[f"predicted, {share}"] = case.curve.predicted_rise(factors)
        found[f"trained, {share}"] = rivals.get(rank)
        found[f"parameters, {share}"] = budget
    return found


def costs(files: Path) -> Record:
    """Time and memory of the command, and of the moments in one layer with Llama 2 7B's shapes."""
    output = files / "smallest"
    shutil.rmtree(output, ignore_errors=True)
    command = ["export", str(files / run_name("r8", 8, 0)), "--keep", "0.99", "--output", str(output)]
    found: dict[str, Any] = {"MiniLM": cost_of(*command)}
    config = LlamaConfig(num_hidden_layers=1, dtype=torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)
    layer, rotary = LlamaDecoderLayer(config, 0), LlamaRotaryEmbedding(config)
    torch.set_default_dtype(torch.float32)
    model = get_peft_model(layer, LoraConfig(r=16, target_modules=list(_PROJECTIONS), init_lora_weights=False))
    whole, x = factorize(model, energy=1.0), torch.randn(1, 512, config.hidden_size, dtype=torch.bfloat16)
    positions = rotary(x, torch.arange(512)[None])

    def loss(layer: Any, batch: Any) -> tuple[Any, Any]:
        output = layer(batch.requires_grad_(), position_embeddings=positions)
        return (output[0] if isinstance(output, tuple) else output).float().square().sum(), torch.tensor(512)

    seconds: dict[str, list[float]] = {"step": [], "moments": []}
    for _ in range(3):
        start = time.perf_counter()
        loss(layer, x.clone())[0].backward()
        seconds["step"].append(time.perf_counter() - start)
        start = time.perf_counter()
        collect_moments(model, whole, [x.clone()], loss)
        seconds["moments"].append(time.perf_counter() - start)
    moments, terms = collect_moments(model, whole, [x.clone()], loss)
    start = time.perf_counter()
    for part in whole:
        directions(part, moments[part.module], terms)
    found["layer"] = {name: sorted(values)[1] for name, values in seconds.items()} | {
        "directions": time.perf_counter() - start,
        "megabytes of all 32 layers": 32 * len(whole) * 2 * 16**2 * 8 / 1e6,
    }
    return found


_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def sampled(causal: bool) -> Any:
    """Loss of labels sampled from the model; its moments are the Fisher matrix's."""

    def loss(model: Any, batch: Any) -> tuple[Any, Any]:
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits.float()
        is_counted = batch["labels"][:, 1:] != -100 if causal else torch.ones(len(logits), 1, dtype=torch.bool)
        logits = logits[:, :-1] if causal else logits[:, None]
        drawn = torch.distributions.Categorical(logits=logits.detach()).sample()
        terms = F.cross_entropy(logits.transpose(1, 2), drawn, reduction="none")
        return (terms * is_counted).sum(1), is_counted.sum(1)

    return loss


def _train(name: str, rank: int, seed: int) -> Job:
    said = TASKS[name].settings["data"]
    return Job(partial(trained, name, rank, seed), (f"data--{said}",) if said in DATA else ())


def _jobs() -> dict[str, Job]:
    jobs = {f"data--{name}": Job(partial(data, name)) for name in DATA}
    for seed in SEEDS:
        runs = {rank: f"train--bytes-{rank}-{seed}" for rank in BYTE_RATES}
        jobs |= {run: Job(partial(bytes_trained, rank, seed)) for rank, run in runs.items()}
        jobs[f"cut--bytes--{seed}"] = Job(partial(cut, BYTES, seed), tuple(runs.values()))
        jobs[f"own--bytes--{seed}"] = Job(partial(own, BYTES, seed), (runs[16],))
        for name, task in TASKS.items():
            whole = f"train--{run_name(name, 8, seed)}"
            rivals = [f"train--{run_name(name, rank, seed, rival=True)}" for rank in task.ranks]
            jobs[whole] = _train(name, 8, seed)
            if "cut" in task.stages:
                like = task.like or name
                jobs |= {run: _train(like, rank, seed) for rank, run in zip(task.ranks, rivals, strict=True)}
                jobs[f"cut--{name}--{seed}"] = Job(partial(cut, name, seed), (whole, *rivals))
            jobs[f"keep--{name}--{seed}"] = Job(partial(keep, name, seed), (whole,))
            if "own" in task.stages:
                jobs[f"own--{name}--{seed}"] = Job(partial(own, name, seed), (whole,))
    return jobs | {"costs": Job(costs, (f"train--{run_name('r8', 8, 0)}",), is_timed=True)}


MEASUREMENT = Measurement("lab/studies/loss.md", _jobs(), sections)
