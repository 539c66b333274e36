"""What a cut by loss measures is the loss of the training, at rest, and nothing else has changed afterwards."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from scipy.optimize import minimize
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from lrlora import FittedRanks, FittedRanksCallback, shrink
from lrlora.learned.held_out import LiveLosses, at_rest

CLASSES, WEIGHTS = 4, torch.tensor([0.2, 1.0, 3.0, 12.0])
STEPS = 40


class Classifier(nn.Module):
    """Classifier with dropout; `inner` is the name of its first submodule."""

    def __init__(self, inner: str = "body") -> None:
        super().__init__()
        self.inner, self.config = inner, PretrainedConfig()
        setattr(self, inner, nn.Sequential(nn.Linear(8, 24), nn.Tanh()))
        self.drop, self.last = nn.Dropout(0.2), nn.Linear(24, CLASSES)

    def forward(
        self, x: Tensor, labels: Tensor | None = None, num_items_in_batch: Any = None
    ) -> SequenceClassifierOutput:
        logits = self.last(self.drop(getattr(self, self.inner)(x)))
        return SequenceClassifierOutput(None if labels is None else F.cross_entropy(logits, labels), logits)


class Around(nn.Module):
    """A PEFT model inside of another, with running means, dropout and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PretrainedConfig()
        self.encoder = lora(nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 24)), ["0", "2"])
        self.norm, self.drop, self.head = nn.BatchNorm1d(24), nn.Dropout(0.2), nn.Linear(24, CLASSES)

    def forward(
        self, x: Tensor, labels: Tensor | None = None, num_items_in_batch: Any = None
    ) -> SequenceClassifierOutput:
        logits = self.head(self.drop(self.norm(self.encoder(x))))
        return SequenceClassifierOutput(None if labels is None else F.cross_entropy(logits, labels), logits)


def lora(base: nn.Module, targets: list[str]) -> Any:
    return get_peft_model(base, LoraConfig(r=6, lora_alpha=12, target_modules=targets))


MODELS: dict[str, Callable[[], Any]] = {
    "plain": lambda: lora(Classifier(), ["body.0", "last"]),
    "wrapped": Around,
    "compiled": lambda: lora(torch.compile(Classifier(), backend="eager"), ["body.0", "last"]),  # type: ignore[arg-type]
    "submodule called module": lambda: lora(Classifier("module"), ["module.0", "last"]),
    "submodule called _orig_mod": lambda: lora(Classifier("_orig_mod"), ["_orig_mod.0", "last"]),
}


def model_of(kind: str) -> Any:
    torch.manual_seed(1)
    return MODELS[kind]()


def rows(count: int, seed: int, *, is_sorted: bool) -> list[dict[str, Tensor]]:
    """Examples of four classes, the rarest of 5 %."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(torch.tensor([0.55, 0.25, 0.15, 0.05]), count, replacement=True, generator=generator)
    centers = 3 * torch.randn(CLASSES, 8, generator=torch.Generator().manual_seed(9))
    x = centers[labels] + 1.5 * torch.randn(count, 8, generator=generator)
    order = labels.argsort(stable=True) if is_sorted else torch.arange(count)
    return [{"x": x[at], "labels": labels[at]} for at in order.tolist()]


def weighted(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, weight=WEIGHTS)


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, label_smoothing=0.1)


# Own loss → of a batch, by own code.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "own": F.cross_entropy,
    "weights": weighted,
    "smoothing": smoothed,
    "function": F.cross_entropy,
    "weighted function": weighted,
}


class Weighted(Trainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        loss = weighted(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


def summed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def weighted_mean(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return weighted(outputs.logits, labels)


def trainer_of(folder: Path, kind: str, loss: str, *, is_sorted: bool) -> Any:
    arguments = TrainingArguments(
        str(folder),
        **{"max_steps": STEPS, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 4},
        **{"learning_rate": 2e-2, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"},
        **{"label_smoothing_factor": 0.1 if loss == "smoothing" else 0.0, "seed": 3, "remove_unused_columns": False},
    )
    cls = Weighted if loss == "weights" else Trainer
    function = {"function": summed, "weighted function": weighted_mean}.get(loss)
    data = [rows(count, seed, is_sorted=is_sorted) for count, seed in ((320, 0), (400, 1))]
    model = model_of(kind)
    return cls(model, arguments, train_dataset=data[0], eval_dataset=data[1], compute_loss_func=function)  # type: ignore[arg-type]


def train(trainer: Any) -> None:
    torch.manual_seed(5)
    trainer.train()


def random_states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]


def state_of(model: nn.Module) -> list[Any]:
    """All that a measurement must leave as it was, but for the factors, which it cuts."""
    kept = {n: v.tolist() for n, v in [*model.named_buffers(), *model.named_parameters()] if "lora_" not in n}
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters() if "lora_" not in name}
    return [kept, modes, flags, *random_states()]


def best_constant(labels: Sequence[Tensor], loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Logarithms of the shares of the least loss, with one label added to each class."""
    count = sum(map(len, labels))

    def value(logits: Any) -> tuple[float, Any]:
        answer = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
        total = torch.stack([loss(answer.expand(len(part), -1), part) * len(part) / count for part in labels]).sum()
        (gradient,) = torch.autograd.grad(total, answer)
        return total.item(), gradient.double().numpy()

    best = minimize(value, np.zeros(CLASSES), jac=True, options={"gtol": 1e-7}).x
    counts = count * torch.tensor(best).softmax(0) + 1
    return (counts / counts.sum()).log().float()


def losses_by_own_code(
    model: Any, batches: Sequence[Any], known: Sequence[Any], loss: Callable[[Tensor, Tensor], Tensor]
) -> tuple[float, float]:
    """Mean loss of the batches, and without the adapter, or of the best constant answer if a third is better by it."""
    model.eval()
    count = sum(len(batch["labels"]) for batch in batches)

    def of_thirds(answer: Callable[[Any], Tensor]) -> list[float]:
        """Share of each third in the mean loss."""
        terms = [loss(answer(batch), batch["labels"]).item() * len(batch["labels"]) / count for batch in batches]
        return [sum(terms[start::3]) for start in range(3)]

    def answers(batch: Any) -> Tensor:
        return model(x=batch["x"]).logits

    with torch.no_grad():
        whole = sum(of_thirds(answers))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
        without = of_thirds(answers)
    guess = best_constant([batch["labels"] for batch in known], loss)
    guessed = of_thirds(lambda batch: guess.expand(len(batch["labels"]), -1))
    return whole, sum(map(min, without, guessed))


def batches_of(trainer: Any) -> tuple[list[Any], list[Any]]:
    """Held-out batches, and those of the gradients."""
    with at_rest(trainer.model, trainer):
        losses = LiveLosses.of_trainer(trainer)
    return list(losses.held_out), list(losses.training)


class Copies(TrainerCallback):
    """Copies the model after the optimizer's step of a number, before anything is cut."""

    def __init__(self, step: int) -> None:
        self.step, self.done, self.state = step, 0, {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def copied(*given: Any) -> None:
            self.done += 1
            if self.done == self.step:
                self.state = copy.deepcopy(kwargs["model"].state_dict())

        kwargs["optimizer"].optimizer.register_step_post_hook(copied)


def of_callback(folder: Path, kind: str, loss: str, is_sorted: bool) -> tuple[Any, Any, Any]:
    plain = trainer_of(folder / "plain", kind, loss, is_sorted=is_sorted)
    train(plain)
    after = random_states()
    copies = Copies(24)
    trainer = trainer_of(folder, kind, loss, is_sorted=is_sorted)
    trainer.add_callback(copies)
    callback = FittedRanksCallback(keep=0.8, at=0.6, trainer=trainer)
    trainer.add_callback(callback)
    batches, _ = batches_of(trainer)
    train(trainer)
    assert random_states() == after  # of a training that measures nothing
    counts = [[b for n, b in t.model.named_buffers() if n.endswith("tracked")] for t in (plain, trainer)]
    assert counts[0] == counts[1]
    assert all(module.training for module in trainer.model.modules())
    assert callback.learned is not None
    assert callback.shrunk is not None, callback.learned.summary
    model = model_of(kind)
    model.load_state_dict(copies.state)
    return callback.shrunk, model, (batches, batches)


def at_the_end(folder: Path, kind: str, loss: str, is_sorted: bool) -> tuple[Any, Any, Any]:
    trainer = trainer_of(folder, kind, loss, is_sorted=is_sorted)
    callback = FittedRanksCallback(keep=0.8, trainer=trainer)
    trainer.add_callback(callback)
    plain = trainer_of(folder / "plain", kind, loss, is_sorted=is_sorted)
    train(plain)
    after = state_of(plain.model)[1:]
    train(trainer)
    assert callback.shrunk is not None
    assert state_of(trainer.model)[-3:] == after[-3:]
    return callback.shrunk, plain.model, batches_of(plain)


def by_shrink(folder: Path, kind: str, loss: str, is_sorted: bool) -> tuple[Any, Any, Any]:
    trainer = trainer_of(folder, kind, loss, is_sorted=is_sorted)
    train(trainer)
    whole = model_of(kind)
    whole.load_state_dict(trainer.model.state_dict())
    trainer.model.train()
    batches, before = batches_of(trainer), state_of(trainer.model)
    found = shrink(trainer, keep=0.8)
    after = state_of(trainer.model)
    assert after[0] == before[0]
    assert after[3:] == before[3:]
    assert all(after[1][name] == mode for name, mode in before[1].items() if name in after[1])
    assert after[2] == before[2]
    return found, whole, batches


def in_a_loop(folder: Path, kind: str, loss: str, is_sorted: bool) -> tuple[Any, Any, Any]:
    function, model = LOSSES[loss], model_of(kind)
    data = rows(320, 0, is_sorted=False)
    held_out = rows(400, 1, is_sorted=is_sorted)
    batches = [
        {name: torch.stack([row[name] for row in held_out[at::100]]) for name in ("x", "labels")} for at in range(100)
    ]
    x, labels = (torch.stack([row[name] for row in data]) for name in ("x", "labels"))

    def terms(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """A batch is one example, as its mean is no sum over examples."""
        size = len(batch["labels"])
        return (function(model(**batch).logits, batch["labels"]) * size)[None], torch.tensor([size])

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    copied: list[Any] = []

    def keep_state(*given: Any) -> None:
        copied.append(copy.deepcopy(model.state_dict()))

    optimizer.register_step_post_hook(keep_state)
    options = {} if loss == "own" and kind != "wrapped" else {"loss": terms}
    before = state_of(model)
    learned = FittedRanks(model, optimizer, keep=0.8, held_out=batches, at=0.6, steps=STEPS, **options)  # type: ignore[arg-type]
    assert state_of(model) == before
    for step in range(STEPS):
        at = slice(16 * step % 320, 16 * step % 320 + 16)
        function(model(x=x[at], labels=labels[at]).logits, labels[at]).backward()
        state = state_of(model)
        optimizer.step()
        if step + 1 == learned.cut_step:
            assert state_of(model)[1:] == state[1:]
        optimizer.zero_grad()
    assert learned.shrunk is not None, learned.summary
    whole = model_of(kind)
    whole.load_state_dict(copied[learned.cut_step - 1])
    return learned.shrunk, whole, (batches, batches)


WAYS = {"callback": of_callback, "at the end": at_the_end, "shrink": by_shrink, "loop": in_a_loop}


def cells() -> Iterator[Any]:
    """All combinations; one way for each model and loss, with sorted examples, in the first tier."""
    for (i, kind), (j, loss), (k, way) in itertools.product(*map(enumerate, (MODELS, LOSSES, WAYS))):
        for is_sorted in (True, False):
            is_quick = is_sorted and (i + j) % len(WAYS) == k
            marks = () if is_quick else pytest.mark.integration
            yield pytest.param(kind, loss, way, is_sorted, marks=marks)


@pytest.mark.parametrize(("kind", "loss", "way", "is_sorted"), [*cells()])
def test_the_loss_of_the_training_at_rest(kind: str, loss: str, way: str, is_sorted: bool, tmp_path: Path) -> None:
    found, whole, batches = WAYS[way](tmp_path, kind, loss, is_sorted)
    whole_loss, base = losses_by_own_code(whole, *batches, LOSSES[loss])
    assert found.loss == pytest.approx(whole_loss, rel=1e-5)
    assert found.base == pytest.approx(base, rel=1e-4)  # of an optimum in float32
    is_known_by_example = LOSSES[loss] is F.cross_entropy
    assert found.unit == ("held-out examples" if is_known_by_example or way == "loop" else "held-out batches")


def tenfold(logits: Tensor, labels: Tensor) -> Tensor:
    return 10 * F.cross_entropy(logits, labels)


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(logits, labels, reduction="none")
    return ((1 - (-losses).exp()) ** 2 * losses).mean()


@pytest.mark.parametrize("loss", [tenfold, focal])
def test_guessing_is_the_best_constant_answer_of_any_loss(
    loss: Callable[[Tensor, Tensor], Tensor], tmp_path: Path
) -> None:
    """Its shares are no label shares for a focal loss, and have no unit."""
    trainer = trainer_of(tmp_path, "plain", "function", is_sorted=False)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: loss(outputs.logits, labels)
    before = state_of(trainer.model)
    with at_rest(trainer.model, trainer):
        losses = LiveLosses.of_trainer(trainer)
        guessed = losses.guess()(losses.held_out)
    assert state_of(trainer.model) == before
    assert guessed is not None
    held_out = [batch["labels"] for batch in losses.held_out]
    answer = best_constant([batch["labels"] for batch in losses.training], loss)
    expected = sum(loss(answer.expand(len(labels), -1), labels).item() * len(labels) for labels in held_out)
    assert guessed.sum().item() == pytest.approx(expected, rel=1e-4)


def test_a_dynamic_rotary_embedding_stays_as_it_was() -> None:
    """Longer held-out sequences replace its frequencies, and the length that they are for."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=40, max_position_embeddings=8, rope_parameters=rope, **sizes)
    model = LlamaForCausalLM(config).eval()
    shorter, longer = torch.arange(12)[None], torch.arange(36)[None]
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        with at_rest(model, None):
            model(longer)
        assert torch.equal(model(shorter).logits, fresh(shorter).logits)
