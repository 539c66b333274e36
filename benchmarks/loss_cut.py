"""Loss of compressed adapters: cut by loss and by other rules, compared with LoRA trained at that size.

python benchmarks/loss_cut.py                      # about 3 hours on two cores; resumes
python benchmarks/loss_cut.py --only news,german   # some of the tasks
python benchmarks/loss_cut.py --stage train        # or cut: a part of the work, also in parallel
python benchmarks/loss_cut.py --report             # only render docs/loss.md from the stored results
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))

from sections import table, with_section  # noqa: E402

PAGE, RESULTS = DOCS / "loss.md", DOCS / "loss" / "results.jsonl"
COSTS = DOCS / "loss" / "costs.json"
KEPT = DOCS / "loss" / "kept.jsonl"
OWN = DOCS / "loss" / "own.jsonl"
SCRATCH = Path("lrlora-compress") / "loss"
SEEDS = (0, 1, 2)
SHARES = {0.5: 4, 0.25: 2}  # share of the size of r = 8 → r of the LoRA trained at that size
KEEPS = (0.95, 0.99)
MOMENTS = (256, 4_096)  # examples and loss terms for the moments


@dataclass(frozen=True)
class Task:
    """A run of `lrlora train`, and its test data.

    Args:
        settings: of the run, without rank, rate, seed and output.
        test: data with a split `test`, or a file.
        rate: peak learning rate; for tuned tasks, the first seed's best.
        method, like: method of the adapter to cut, and the task with the LoRAs for comparison.
        healing: number of steps.
        tests: number of examples.
        ranks: of the LoRAs trained at smaller sizes.

    """

    settings: dict[str, Any]
    test: str
    rate: float
    method: str = "lora"
    like: str | None = None
    healing: int = 40
    tests: int = 384
    ranks: tuple[int, ...] = (4, 2)


_MINILM = {
    "model": "embedded:minilm", "task": "classify", "max_length": 48, "validation_examples": 512,
    "head_learning_rate": 1e-3, "training": {"eval_strategy": "no"},
}  # fmt: skip
_SMOLLM2 = {"model": "embedded:smollm2", "task": "causal-lm", "batch_size": 4, "max_length": 64, "steps": 40}
_SMOLLM2 |= {"training": {"eval_strategy": "no"}, "validation_examples": 128}
TASKS = {
    "news": Task(_MINILM | {"data": "embedded:20-newsgroups", "steps": 150}, "embedded:20-newsgroups", 4e-3),
    "r8": Task(_MINILM | {"data": "embedded:r8", "steps": 100}, "embedded:r8", 2e-3, tests=256),
    "animals": Task(
        {
            "model": "embedded:vit", "task": "image-classify", "data": "embedded:animals", "steps": 150,
            "validation_examples": 512, "training": {"eval_strategy": "no"},
        },
        "embedded:animals",
        1e-3,
        tests=256,
    ),
}  # fmt: skip
TASKS |= {
    name: Task(_SMOLLM2 | {"data": str(SCRATCH / name)}, str(SCRATCH / name), 2e-3, healing=12, tests=48, ranks=(4,))
    for name in ("german", "chat")
}
TASKS["news-phi"] = replace(TASKS["news"], method="lr-lora", like="news")
TASKS["news-full"] = replace(TASKS["news"], method="full", like="news", rate=1e-4, tests=256)
BYTES = "byte model"
ALL = (BYTES, *TASKS)
# Adapters that gain nothing, and little, for --stage keep.
TASKS["r8-nothing"] = replace(TASKS["r8"], rate=1e-8)
TASKS["r8-little"] = replace(TASKS["r8"], settings=TASKS["r8"].settings | {"steps": 40})
TUNED = {"german": (1e-3, 2e-3, 4e-3, 8e-3)}


def german() -> None:
    """Speeches in pieces of about 64 tokens, in disjoint splits."""
    from datasets import Dataset, DatasetDict

    from lrlora_lab.byte_model import load_corpus

    parts = {}
    for name, data, count in zip(("train", "validation", "test"), load_corpus("german"), (800, 128, 200), strict=True):
        text, piece = data.numpy().tobytes().decode(errors="replace"), 200
        starts = [len(text) * i // count for i in range(count)]
        parts[name] = Dataset.from_dict({"text": [text[start : start + piece].strip() for start in starts]})
    DatasetDict(parts).save_to_disk(str(SCRATCH / "german"))


def chat() -> None:
    """Questions on numpy, scipy and scikit-learn functions, answered by the start of their docstrings."""
    import hashlib
    import importlib
    import warnings

    from datasets import Dataset, DatasetDict

    warnings.simplefilter("ignore")
    names = ("numpy", "numpy.linalg", "numpy.fft", "numpy.random", "scipy.linalg", "scipy.stats", "scipy.signal")
    names += ("scipy.special", "scipy.ndimage", "scipy.optimize", "scipy.sparse", "scipy.spatial", "sklearn.metrics")
    names += ("sklearn.linear_model", "sklearn.preprocessing", "sklearn.ensemble", "sklearn.model_selection")
    rows: dict[str, list[Any]] = {"train": [], "validation": [], "test": []}
    known: set[str] = set()
    for name in names:
        module = importlib.import_module(name)
        for each in sorted(dir(module)):
            said = inspect.getdoc(getattr(module, each)) or ""
            answer = " ".join(said.split("\n\n")[0].split())
            if each.startswith("_") or not 20 < len(answer) < 200 or answer in known or "(" in answer[:40]:
                continue
            known.add(answer)
            place = hashlib.sha256(answer.encode()).digest()[0] % 8
            part = "test" if place == 0 else "validation" if place == 1 else "train"
            question = {"role": "user", "content": f"What does {name}.{each} do?"}
            rows[part].append([question, {"role": "assistant", "content": answer}])
    DatasetDict({n: Dataset.from_dict({"messages": r}) for n, r in rows.items()}).save_to_disk(str(SCRATCH / "chat"))


def run_folder(name: str, method: str, rank: int, rate: float, seed: int) -> Path:
    """Train a run, unless it exists."""
    from lrlora.train.run import train
    from lrlora.train.settings import TrainConfig
    from lrlora_lab.inputs import located

    for make in (german, chat):
        if not (SCRATCH / make.__name__).exists():
            make()
    rank = 0 if method == "full" else rank
    folder = SCRATCH / f"{TASKS[name].like or name}-{method}-{rank}-{rate:g}-{seed}"
    if not (folder / "metrics.json").exists():
        start = time.perf_counter()
        settings = TASKS[name].settings | ({"rank": rank} if rank else {})
        settings |= {name: located(settings[name]) for name in ("model", "data")}
        config = TrainConfig(**settings, method=method, learning_rate=rate, seed=seed, output=str(folder))
        found = train(config, overwrite=(folder / "run.json").exists(), announce=lambda line: None)
        print(f"{folder.name}: {found.metrics} in {time.perf_counter() - start:.0f} s", flush=True)
    return folder


def validation_loss(folder: Path) -> float:
    """Of a finished run."""
    return float(json.loads((folder / "metrics.json").read_text())["loss"])


def rate_of(name: str) -> float:
    """Peak learning rate of a task: the best of the first seed's, on validation data."""
    task = TASKS[name]
    rates = TUNED.get(name, (task.rate,))
    if len(rates) == 1:
        return rates[0]
    return min(rates, key=lambda rate: validation_loss(run_folder(name, task.method, 8, rate, 0)))


def runs_of(name: str) -> Iterator[Path]:
    """All runs of a task."""
    task, rate = TASKS[name], rate_of(name)
    for seed in SEEDS:
        for rank in (8,) if task.like else (8, *task.ranks):
            yield run_folder(name, task.method, rank, rate, seed)


@dataclass
class Case:
    """An adapter to cut: the inputs of `lrlora export`, and unseen examples."""

    whole: list[Any]
    curve: Any
    moments: dict[str, Any]
    terms: int
    updates: Any
    parameters_of_rank: Callable[[int], int]
    test: Callable[[Any], float]
    as_it_is: float  # test loss
    heal: Callable[[Any], float]  # factors → test loss


def loaded(name: str, folder: Path) -> tuple[Any, list[Any]]:
    """A run of `lrlora train` with its examples, and test batches."""
    from datasets import load_from_disk

    from lrlora.train.cut import Subject
    from lrlora.train.models import model_source
    from lrlora_lab.inputs import located

    task = TASKS[name]
    base = model_source(located(task.settings["model"])) if task.method == "full" else None
    subject = Subject.read(str(folder), base=base, announce=lambda line: None)
    test = located(task.test)
    said = load_from_disk(test)["test"] if Path(test).exists() else test
    examples = subject.run.examples(said, "test", lambda line: None, with_label=True)
    examples = examples.shuffle(seed=1).select(range(min(task.tests, len(examples))))
    return subject, list(subject.run.trainer(subject.run.encoded(examples)).get_eval_dataloader())


def case_of(name: str, folder: Path) -> Case:
    """A run of `lrlora train`."""
    from lrlora.adapters import save_as_lora
    from lrlora.adapters.factorize import parameters_of_rank
    from lrlora.learned import mean_loss
    from lrlora.learned.directions import LossCurve, directions
    from lrlora.learned.gain import mean_of
    from lrlora.learned.moments import collect_moments
    from lrlora.train.cut import Part, heal

    subject, test = loaded(name, folder)
    training = subject.batches(subject.training, *MOMENTS)
    unseen = Part(subject, test, training)
    model, whole = subject.on_base, [part for part in subject.whole if part.rank]
    moments, terms = collect_moments(model, whole, training, subject.loss)
    curve = LossCurve([directions(part, moments[part.module], terms) for part in whole])

    def healed(factors: Any) -> float:
        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch) / "healed"
            save_as_lora(factors, subject.updates, output)
            heal(subject, output, TASKS[name].healing, lambda line: None)
            return mean_of(unseen.losses_of(subject.with_lora(output)))

    return Case(
        whole=whole,
        curve=curve,
        moments=moments,
        terms=terms,
        updates=subject.updates,
        parameters_of_rank=lambda rank: parameters_of_rank(subject.updates, rank),
        test=lambda factors: mean_loss(model, factors, test, subject.loss),
        as_it_is=mean_of(unseen.whole),
        heal=healed,
    )


def byte_case(folder: Path, seed: int) -> Case:
    """Byte model on German, adapted by LoRA of r = 8."""
    import torch
    from peft import PeftModel

    from lrlora.adapters import factorize
    from lrlora.adapters.factorize import parameters_of_rank
    from lrlora.learned import mean_loss
    from lrlora.learned.directions import LossCurve, directions
    from lrlora.learned.moments import collect_moments
    from lrlora_lab.byte_model import CONTEXT, load_corpus, sample_batch
    from lrlora_lab.capacity_tasks import TEST_WINDOWS, transfer

    corpus, setting = load_corpus("german"), transfer("german", 16, seed)
    model = PeftModel.from_pretrained(setting.model, folder)
    whole, generator = factorize(model, energy=1.0), torch.Generator().manual_seed(seed)

    def windows(data: Any, count: int) -> list[dict[str, Any]]:
        held = len(data) // CONTEXT
        chosen = data[: held * CONTEXT].view(held, CONTEXT)[torch.arange(count) * held // count].long()
        return [{"input_ids": some, "labels": some} for some in chosen.split(64)]

    training = [{"input_ids": b, "labels": b} for b in (sample_batch(corpus.train, generator, 16) for _ in range(2))]
    test = windows(corpus.test, TEST_WINDOWS)
    moments, terms = collect_moments(model, whole, training)
    curve = LossCurve([directions(part, moments[part.module], terms) for part in whole])
    as_it_is = mean_loss(model, whole, test)

    def healed(factors: Any) -> float:
        return heal_bytes(factors, seed, test)

    return Case(
        whole=whole,
        curve=curve,
        moments=moments,
        terms=terms,
        updates=model,
        parameters_of_rank=lambda rank: parameters_of_rank(model, rank),
        test=lambda factors: mean_loss(model, factors, test),
        as_it_is=as_it_is,
        heal=healed,
    )


def heal_bytes(factors: Any, seed: int, test: Any) -> float:
    """100 steps of LoRA from these factors, at a quarter of the rate for its scale."""
    from peft import LoraConfig, get_peft_model

    from lrlora.adapters import lora_config
    from lrlora.learned import mean_loss
    from lrlora_lab.capacity_tasks import transfer

    setting = transfer("german", 16, seed + 100)
    model = get_peft_model(setting.model, lora_config(factors, LoraConfig()))
    for part in factors:
        if part.rank:
            layer = model.base_model.model.get_submodule(part.module)
            layer.lora_A["default"].weight.data.copy_(part.A)
            layer.lora_B["default"].weight.data.copy_(part.B)
    optimise(model, setting, 2 * 0.25 * BYTE_RATES[8], BYTE_HEALING)
    from lrlora.adapters import factorize

    return mean_loss(model, factorize(model, energy=1.0), test)


def optimise(model: Any, setting: Any, rate: float, steps: int) -> None:
    """AdamW with warm-up over a twentieth of the steps and linear decay."""
    import torch

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


BYTE_RATES = {16: 5e-3, 8: 5e-3, 4: 1e-2, 2: 1e-2}  # from docs/capacity.md, with α = 4r
BYTE_STEPS, BYTE_HEALING = 500, 100
BYTE_WINDOWS = 32  # windows of 128 bytes, 4,096 loss terms, for `byte_own`


def byte_folder(rank: int, seed: int) -> Path:
    """Train a LoRA on the byte model, unless it exists."""
    import torch
    from peft import LoraConfig, get_peft_model

    from lrlora_lab.capacity_tasks import transfer

    folder = SCRATCH / f"bytes-{rank}-{seed}"
    if not (folder / "adapter_config.json").exists():
        setting = transfer("german", 16, seed)
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=4 * rank, target_modules=setting.targets)
        model = get_peft_model(setting.model, config)
        optimise(model, setting, BYTE_RATES[rank], BYTE_STEPS)
        model.save_pretrained(folder)
    return folder


def by_scalar(case: Case, budget: int) -> list[Any]:
    """SVD directions, with energies scaled by one scalar per module: the product of the means of both moments."""
    from lrlora.adapters.factorize import best_per_parameter

    worth = []
    for part in case.whole:
        moments, sigma = case.moments[part.module], part.A.double().square().sum(1)
        # In orthonormal bases of the update's span.
        inputs = (moments.inputs.diagonal() / sigma).mean() / moments.weight
        gradients = (moments.gradients.diagonal() / sigma).mean() / case.terms
        worth.append(sigma.square() * inputs * gradients)
    costs = [part.parameters_per_rank for part in case.whole]
    ranks = best_per_parameter(worth, costs, budget)
    return [replace(p, A=p.A[:rank], B=p.B[:, :rank]) for p, rank in zip(case.whole, ranks, strict=True)]


def by_share(case: Case, budget: int) -> list[Any]:
    """One share of ‖ΔW‖ for all modules, as kohya's `sv_fro`: the largest within the budget."""
    from lrlora.adapters import factorize

    low, high, best = 0.0, 1.0, None
    for _ in range(6):
        share = (low + high) / 2
        factors = factorize(case.updates, energy=share)
        if sum(part.parameters for part in factors) <= budget:
            low, best = share, factors
        else:
            high = share
    assert best is not None
    return best


def keep(name: str, seed: int) -> list[dict[str, Any]]:
    """What `lrlora export --keep` keeps of a run on test data that it never saw."""
    from lrlora.adapters import save_as_lora
    from lrlora.learned.gain import mean_of
    from lrlora.train.cut import EXAMPLES, TERMS, Cut, Part
    from lrlora.train.inference import evaluate
    from lrlora_lab.inputs import located

    task = TASKS[name]
    folder = run_folder(name, task.method, 8, rate_of(name), seed)
    subject, test = loaded(name, folder)
    unseen = Part(subject, test, subject.batches(subject.training, EXAMPLES, TERMS))
    cut = Cut(subject, announce=lambda line: None)
    metric = subject.run.kind.metrics[0]
    metric = "mean_token_accuracy" if metric == "loss" else metric
    whole = sum(part.parameters for part in subject.whole)
    rows = []
    for share in KEEPS:
        try:
            factors = cut.smallest(share, announce=lambda line: print(f"{name}, seed {seed}: {line}", flush=True))
        except ValueError as error:
            rows.append({"task": name, "seed": seed, "keep": share, "refused": str(error)})
            continue
        with tempfile.TemporaryDirectory() as scratch:
            save_as_lora(factors, subject.updates, Path(scratch) / "lora")
            how: dict[str, Any] = {"split": "test", "limit": task.tests, "answers": False}
            scores = [
                evaluate(each, located(task.test), announce=lambda line: None, **how)[metric]
                for each in (folder, Path(scratch) / "lora")
            ]
        rows.append(
            {
                "task": name, "seed": seed, "keep": share,
                "size": sum(part.parameters for part in factors) / whole,
                "confirmed": cut.confirm.kept(factors).share, "test": unseen.kept(factors)._asdict(),
                "without": mean_of(unseen.without), "whole": mean_of(unseen.whole),
                "cut": mean_of(unseen.losses(factors)), "metric": metric, "before": scores[0], "after": scores[1],
            }
        )  # fmt: skip
    return rows


def own(name: str, seed: int) -> dict[str, Any]:
    """Cuts by text or labels of the adapted model, measured on real test data."""
    from lrlora.learned import example_losses, loss_curve
    from lrlora.learned.gain import mean_of
    from lrlora.train.cut import EXAMPLES, TERMS, Cut, Part

    if name == BYTES:
        return byte_own(seed)
    task = TASKS[name]
    subject, test = loaded(name, run_folder(name, task.method, 8, rate_of(name), seed))
    kind = subject.run.kind
    unseen = Part(subject, test, subject.batches(subject.training, EXAMPLES, TERMS))
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
    if task.settings["task"] != "image-classify":
        alone = subject.on_own_text()
        sources["own" if kind.generates else "fixed"] = alone, alone.loss
        factors = Cut(alone, announce=lambda line: None).smallest(KEEPS[0], announce=lambda line: None)
        row |= {"size": sum(part.parameters for part in factors) / whole, "kept": unseen.kept(factors)._asdict()}
    for source, (examples, loss) in sources.items():
        batches = examples.batches(examples.training, EXAMPLES, TERMS)
        curve = loss_curve(subject.on_base, subject.whole, batches, loss)
        for share in SHARES:
            cut = curve.within(int(share * whole))
            row[f"{source}, {share}"] = mean_of(example_losses(subject.on_base, cut, test, subject.loss))
    return row


def byte_own(seed: int) -> dict[str, Any]:
    """`own` for the byte model, whose own text begins with a random byte."""
    import torch

    from lrlora.learned import loss_curve, model_loss
    from lrlora.train.own_text import fixed_texts
    from lrlora_lab.byte_model import CONTEXT, load_corpus, sample_batch

    case, generator = byte_case(byte_folder(16, seed), seed), torch.Generator().manual_seed(seed)
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
        batches = [{"input_ids": some, "labels": some} for some in windows.split(16)]
        curve = loss_curve(model, case.whole, batches, loss)
        for share, rank in BYTE_SHARES.items():
            row[f"{source}, {share}"] = case.test(curve.within(case.parameters_of_rank(rank)))
    return row


def fixed_pieces(tokenizer: Any) -> Any:
    """Python's documentation in pieces of 64 tokens."""
    from datasets import Dataset

    from lrlora.train.own_text import fixed_texts

    tokens = tokenizer(" ".join(fixed_texts()))["input_ids"]
    rows = [tokens[start : start + 64] for start in range(0, len(tokens) - 64, 64)]
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * 64] * len(rows), "labels": rows})


def kept_table() -> str:
    """Shares that were kept, over seeds."""
    rows = [json.loads(line) for line in KEPT.read_text().splitlines()]
    lines = []
    for name in dict.fromkeys(row["task"] for row in rows):
        for share in KEEPS:
            group = [row for row in rows if row["task"] == name and row["keep"] == share]
            if refused := [row["refused"] for row in group if "refused" in row]:
                most = [float(kept) for kept in re.findall(r"all directions, ([\d.]+)%", " ".join(refused))]
                why = f"{statistics.mean(most):.1f}% with all directions" if most else "no measurable gain"
                lines.append([name, f"{share:g}", str(len(group)), "not cut", why, "–", "–"])
                continue
            tests = [row["test"]["share"] for row in group]
            nats = [statistics.mean(row[key] for row in group) for key in ("without", "whole", "cut")]
            metrics = [statistics.mean(row[key] for row in group) for key in ("before", "after")]
            lines.append(
                [
                    name, f"{share:g}", str(len(group)), f"{statistics.mean(row['size'] for row in group):.0%}",
                    f"{statistics.mean(tests):.1%} ({min(tests):.1%} to {max(tests):.1%})",
                    "{:.3f}, {:.3f}, {:.3f}".format(*nats),
                    "{}: {:.3f}, {:.3f}".format(group[0]["metric"].replace("_", " "), *metrics),
                ]
            )  # fmt: skip
    heads = ["adapter", "asked", "seeds", "size", "kept on test data", "nats without, whole, cut", "metric whole, cut"]
    return table(heads, lines)


def own_table() -> str:
    """Cuts without data, over seeds."""
    rows, cuts = ([json.loads(line) for line in path.read_text().splitlines()] for path in (OWN, RESULTS))
    sources = {"real": "its own data", "sampled": "with sampled labels", "fixed": "a fixed text", "own": "own text"}
    lines = []
    for name in dict.fromkeys(row["task"] for row in rows):
        group = [row for row in rows if row["task"] == name]
        others = [row for row in cuts if row["task"] == name]
        found = [
            [[row.get(f"{each}, {s}", math.nan) - row["whole"] for row in group] for s in SHARES] for each in sources
        ]
        found += [[[added(row, method, s) for row in others] for s in SHARES] for method in ("by energy", "every k")]
        line = [name, str(len(group)), *(", ".join(shown(statistics.mean(part)) for part in cell) for cell in found)]
        kept = [row["kept"]["share"] for row in group if "kept" in row]
        if kept:
            size = statistics.mean(row["size"] for row in group)
            line += [f"{size:.0%}", f"{statistics.mean(kept):.1%} ({min(kept):.1%} to {max(kept):.1%})"]
        lines.append(line if kept else [*line, "–", "–"])
    heads = ["adapter", "seeds", *sources.values(), "by energy", "every module k", "size for 0.95", "kept"]
    return table(heads, lines)


METHODS: dict[str, Callable[[Case, int, int], list[Any]]] = {
    "by loss": lambda case, budget, rank: case.curve.within(budget),
    "by scalar": lambda case, budget, rank: by_scalar(case, budget),
    "by energy": lambda case, budget, rank: factorized(case, budget=budget),
    "every k": lambda case, budget, rank: factorized(case, max_rank=rank),
    "sv_fro": lambda case, budget, rank: by_share(case, budget),
}


def factorized(case: Case, **how: int) -> list[Any]:
    """By energy alone."""
    from lrlora.adapters import factorize

    return factorize(case.updates, **how)


def cut(name: str, seed: int) -> dict[str, Any]:
    """All cuts of one adapter, with their test losses."""
    from lrlora.learned.gain import losses_of, mean_of

    if name == BYTES:
        case = byte_case(byte_folder(16, seed), seed)
        trained = {rank: byte_case(byte_folder(rank, seed), seed).as_it_is for rank in BYTE_SHARES.values()}
    else:
        task = TASKS[name]
        case = case_of(name, run_folder(name, task.method, 8, rate_of(name), seed))
        like = task.like or name
        others = {rank: run_folder(like, "lora", rank, rate_of(like), seed) for rank in task.ranks}
        trained = {}
        for rank, folder in others.items():
            subject, test = loaded(like, folder)
            trained[rank] = mean_of(losses_of(subject.run.model.get_base_model(), test, subject.loss))
    found: dict[str, Any] = {"task": name, "seed": seed, "test": case.as_it_is}
    to_heal = {}
    for share, rank in (BYTE_SHARES if name == BYTES else SHARES).items():
        budget = case.parameters_of_rank(rank)
        for method, choose in METHODS.items():
            factors = choose(case, budget, rank)
            found[f"{method}, {share}"] = case.test(factors)
            if method == "by loss":
                found[f"predicted, {share}"] = case.curve.predicted_rise(factors)
                if share == max(SHARES) or name == BYTES:
                    to_heal[share] = factors
        found[f"trained, {share}"] = trained.get(rank)
        found[f"parameters, {share}"] = budget
    for share, factors in to_heal.items():  # at the end: it trains the case's own heads
        found[f"healed, {share}"] = case.heal(factors)
    return found


BYTE_SHARES = {0.5: 8, 0.25: 4}


def stored() -> list[dict[str, Any]]:
    """Results so far, one per adapter."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def costs() -> dict[str, Any]:
    """Time and memory of the command, and of the moments in one layer with Llama 2 7B's shapes."""
    import torch
    from compress import run
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    from lrlora.adapters import factorize
    from lrlora.learned.moments import collect_moments

    found: dict[str, Any] = {}
    output = SCRATCH / "smallest"
    shutil.rmtree(output, ignore_errors=True)
    folder = run_folder("r8", "lora", 8, rate_of("r8"), 0)
    found["MiniLM"] = run("export", str(folder), "--keep", "0.99", "--output", str(output))
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
    start = time.perf_counter()
    moments, terms = collect_moments(model, whole, [x.clone()], loss)
    from lrlora.learned.directions import directions

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
    import torch
    import torch.nn.functional as F

    def loss(model: Any, batch: Any) -> tuple[Any, Any]:
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits.float()
        is_counted = batch["labels"][:, 1:] != -100 if causal else torch.ones(len(logits), 1, dtype=torch.bool)
        logits = logits[:, :-1] if causal else logits[:, None]
        drawn = torch.distributions.Categorical(logits=logits.detach()).sample()
        terms = F.cross_entropy(logits.transpose(1, 2), drawn, reduction="none")
        return (terms * is_counted).sum(1), is_counted.sum(1)

    return loss


COLUMNS = {
    "by loss": "by loss", "by scalar": "one scalar a module", "by energy": "by energy", "every k": "every module k",
    "trained": "LoRA trained", "healed": "by loss, healed",
}  # fmt: skip
LANGUAGE = (BYTES, "german", "chat")


def added(row: dict[str, Any], method: str, share: float) -> float:
    """Test loss added by a cut to the uncut adapter's; NaN if not measured."""
    loss = row.get(f"{method}, {share}")
    return math.nan if loss is None else float(loss - row["test"])


def shown(value: float) -> str:
    """Added loss."""
    return "–" if math.isnan(value) else f"{value:+.3f}"


def ratio(rows: list[dict[str, Any]], method: str, rival: str, share: float) -> str:
    """Ratio of the losses added by two methods, in units of the adapter's loss, over all rows.

    With the 95 % bootstrap interval of 10,000 draws of adapters.
    """
    import numpy as np

    values = np.array([[added(row, name, share) / row["test"] for name in (method, rival)] for row in rows])
    draws = np.random.default_rng(0).integers(len(rows), size=(10_000, len(rows)))
    drawn = values[draws].sum(1)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
    mean = values.sum(0)
    return f"{mean[0] / mean[1]:.2f} ({low:.2f} to {high:.2f})"


def updated(page: str) -> str:
    """Page with tables of the stored results."""
    rows = stored()
    groups = {name: [row for row in rows if row["task"] == name] for name in (BYTES, *TASKS)}
    groups = {name: group for name, group in groups.items() if group}
    parts = []
    for share in SHARES:
        lines = []
        for name, group in groups.items():
            cells = [statistics.mean(added(row, method, share) for row in group) for method in COLUMNS]
            test = statistics.mean(row["test"] for row in group)
            lines.append([name, str(len(group)), f"{test:.3f}", *map(shown, cells)])
        title = {0.5: "At half the parameters", 0.25: "At a quarter of them"}[share]
        parts.append(f"{title}:\n\n" + table(["adapter", "seeds", "test loss", *COLUMNS.values()], lines))
    page = with_section(page, "cuts", "\n".join(parts))
    adapters = [row for row in rows if row["task"] != "news-full"]
    pools = {
        "byte model": [row for row in rows if row["task"] == BYTES],
        "SmolLM2": [row for row in rows if row["task"] in ("german", "chat")],
        "language models": [row for row in rows if row["task"] in LANGUAGE],
        "classifiers": [row for row in adapters if row["task"] not in LANGUAGE],
        "all of these": adapters,
        "full fine-tuning": [row for row in rows if row["task"] == "news-full"],
    }
    lines = [
        [
            name,
            f"{share:g}",
            *(ratio(pool, "by loss", rival, share) for rival in ("by energy", "every k", "sv_fro", "by scalar")),
        ]
        for name, pool in pools.items()
        if pool
        for share in SHARES
    ]
    heads = ["adapters", "size", "over by energy", "over every module k", "over one share", "over one scalar"]
    page = with_section(page, "ratios", table(heads, lines))
    lines = []
    for name, group in groups.items():
        predicted = [statistics.mean(row[f"predicted, {share}"] for row in group) for share in SHARES]
        actual = [statistics.mean(added(row, "by loss", share) for row in group) for share in SHARES]
        said = [f"{one:.3f} / {two:.3f}" for one, two in zip(predicted, actual, strict=True)]
        lines.append([name, *said])
    page = with_section(page, "predicted", table(["adapter", "at 1/2", "at 1/4"], lines))
    page = with_section(page, "kept", kept_table())
    page = with_section(page, "own", own_table())
    if COSTS.exists():
        known = json.loads(COSTS.read_text())
        lines = [
            [
                f"`lrlora export --keep 0.99`, {name}, LoRA r = 8",
                f"{known[name]['seconds']:.0f} s",
                f"{known[name]['gibibytes']:.1f} GiB",
            ]
            for name in known
            if name != "layer"
        ]
        layer = known["layer"]
        lines += [
            ["forward and backward of one layer of 7B shapes, 512 tokens, bfloat16", f"{layer['step']:.2f} s", ""],
            ["the same with the moments of its 7 modules, LoRA r = 16", f"{layer['moments']:.2f} s", ""],
            ["the directions of these modules", f"{layer['directions']:.3f} s", ""],
            ["the moments of all 32 layers, counted", "", f"{layer['megabytes of all 32 layers']:.1f} MB"],
        ]
        page = with_section(page, "costs", table(["what", "time", "memory"], lines))
    return page


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="tasks, with commas between", default=",".join(ALL))
    parser.add_argument("--stage", choices=("train", "cut", "keep", "own", "costs"))
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if options.report:
        PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return
    if options.stage == "costs":
        COSTS.write_text(json.dumps(costs(), indent=1) + "\n")
        return
    if options.stage in ("keep", "own"):
        path = {"keep": KEPT, "own": OWN}[options.stage]
        for name in options.only.split(","):
            for seed in SEEDS:
                known = path.read_text().splitlines() if path.exists() else []
                if not any((row := json.loads(line))["task"] == name and row["seed"] == seed for line in known):
                    found = keep(name, seed) if options.stage == "keep" else [own(name, seed)]
                    with path.open("a") as file:
                        file.writelines(json.dumps(row) + "\n" for row in found)
        return
    for name in options.only.split(","):
        if options.stage != "cut":
            folders = (byte_folder(r, s) for s in SEEDS for r in (16, 8, 4)) if name == BYTES else runs_of(name)
            list(folders)
        for seed in SEEDS if options.stage != "train" else ():
            if not any(row["task"] == name and row["seed"] == seed for row in stored()):
                start = time.perf_counter()
                row = cut(name, seed)
                RESULTS.parent.mkdir(parents=True, exist_ok=True)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{name}, seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
