"""LoRA that learns its ranks: it starts wide, is cut once to a size, and trains on.

At the cut, the loss decides how much rank each module keeps, by the quadratic model of `lrlora.ranks`. Its moments come
from the ordinary steps before the cut, so that no extra pass over data is needed. What remains is a plain LoRA with a
`rank_pattern`, which PEFT loads without lrlora; modules of rank 0 leave the adapter.

The learning rate of the factors is halved before the cut, and warms up again after it: they start with a new state of
the optimizer. Other parameters, such as heads, keep theirs.
"""

from __future__ import annotations

import json
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..adapters.resize import fit_to_checkpoint, lora_factors, lora_layers, lora_weights, require_plain_lora, resize
from ..checks import parse_size
from ..files import replacing
from .cut import LossCurve, directions
from .moments import Moments

CUT_AT = 0.3  # share of the steps
WIDTH = 4  # rank at the start, as a multiple of that of the size
_WIDE = 16  # rank at the start for a size in parameters or bytes
_WINDOW = 32  # steps that give moments
_WIDE_RATE = 0.5  # share of the learning rate before the cut
_WARM_UP = 20  # steps after the cut, at most a twentieth of all
_FEWEST_STEPS = 10
_STATE_FILE = "learned_ranks.safetensors"
# Model → what learns its ranks now.
_LEARNING: weakref.WeakKeyDictionary[PeftModel, weakref.ref[LearnedRanks]] = weakref.WeakKeyDictionary()


class LearnedRanks:
    """Cuts a LoRA while it trains, and thereby learns its ranks.

    It needs no call in the training loop: it acts after `optimizer.step()`. Create it after the optimizer:

        model = get_peft_model(base, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        ranks = LearnedRanks(model, optimizer, size="r4", steps=1000)
        ...                          # an ordinary training loop of 1000 steps
        model.save_pretrained("out")  # a plain LoRA, with the parameters of r = 4

    Args:
        model: PEFT model with a plain LoRA on linear layers and convolutions.
        optimizer: optimizer of its parameters.
        size: of the adapter after the cut: r4 (that of LoRA r = 4 on the same modules), 200k parameters, or 4MiB.
        steps: total number of optimizer steps.
        at: share of the steps after which the adapter is cut, in (0, 1).
        resume: folder of `save_state` to continue from, after model and optimizer were loaded.

    Attributes:
        ranks: module → rank after the cut; None before it.
        cut_step: optimizer step after which the adapter is cut.

    Raises:
        FileNotFoundError: the folder to resume from has no state.
        ValueError: the adapter is no plain LoRA, not larger than the size, or not that of the state; there are too few
            steps; or the optimizer cannot change its parameters.

    """

    def __init__(
        self,
        model: PeftModel,
        optimizer: Any,
        *,
        size: str,
        steps: int,
        at: float = CUT_AT,
        resume: str | Path | None = None,
    ) -> None:
        self._model, self._optimizer = model, _unwrapped(optimizer)
        self._adapter = require_plain_lora(model)
        parse_size(size, "size")
        if not isinstance(at, float) or not 0 < at < 1:
            raise ValueError(f"at must be a share of the steps between 0 and 1, got {at!r}.")
        _require_steps(steps)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            _refuse({"more than one process": torch.distributed.get_world_size() > 1})
        self.ranks: dict[str, int] | None = None
        self.cut_step = _cut_step(at, steps)
        self._size, self._steps, self._done = size, steps, 0
        self._groups: list[dict[str, Any]] = []
        self._split: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._moments: dict[str, Moments] = {}
        self._watchers: list[Any] = []  # until the cut
        self._warns = True
        if resume is not None:
            self._load_state(Path(resume))
        self._factors = self._ids()
        _require_suitable(self._optimizer, self._factors)
        if (other := _LEARNING.get(model, lambda: None)()) is not None:
            other._stop()
        _LEARNING[model] = weakref.ref(self)
        if self.ranks is None:
            self._budget = _parameters_in(size, model, self._adapter)
            for path, layer in lora_layers(model, self._adapter).items():
                down: Any = layer.lora_A[self._adapter]
                self._watchers.append(down.register_forward_hook(self._watch(path, down)))
            self._watchers.append(model.register_state_dict_pre_hook(self._before_saving))
        self._steppers = (
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        )

    def save_state(self, folder: str | Path) -> None:
        """Save steps, ranks and moments, to resume from."""
        tensors = {
            f"{module}.{name}": getattr(of, name)
            for module, of in self._moments.items()
            for name in ("inputs", "gradients", "tokens")
        }
        with replacing(Path(folder) / _STATE_FILE) as partial:
            steps = {"steps": torch.tensor(self._done)}  # old versions of safetensors read no empty file
            about = {"ranks": json.dumps(self.ranks), "cut": json.dumps(self.cut_step), "size": self._size}
            save_file(tensors | steps, partial, about)

    def _load_state(self, folder: Path) -> None:
        path = folder / _STATE_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {_STATE_FILE}. Resume from another checkpoint.")
        layers = lora_layers(self._model, self._adapter)
        with safe_open(path, "pt") as file:
            about = file.metadata()
            self._done, self.ranks = int(file.get_tensor("steps")), json.loads(about["ranks"])
            if about.get("size", self._size) != self._size:
                raise ValueError(f"The run has size={about['size']!r}, got {self._size!r}. Pass the same.")
            for module in {key.rpartition(".")[0] for key in file.keys() if key != "steps"}:  # noqa: SIM118 (no mapping)
                device = layers[module].lora_A[self._adapter].weight.device
                z, h, tokens = (file.get_tensor(f"{module}.{name}") for name in ("inputs", "gradients", "tokens"))
                self._moments[module] = Moments(z.to(device), h.to(device), tokens.to(device))
        if self.ranks is None:  # perhaps with other steps than before
            self.cut_step = max(self.cut_step, self._done + (1 if self._moments else _WINDOW))
            return
        self.cut_step = json.loads(about.get("cut", str(min(self.cut_step, self._done))))
        found = {path: layer.r[self._adapter] for path, layer in layers.items()}
        if found != {module: rank for module, rank in self.ranks.items() if rank}:
            raise ValueError(f"The adapter does not have the ranks in {path}. Load the adapter saved with it first.")

    def _stop(self) -> None:
        """Do nothing any more."""
        self._restore_groups()
        for hook in (*self._watchers, *self._steppers):
            hook.remove()

    def _ids(self) -> set[int]:
        layers = lora_layers(self._model, self._adapter).values()
        return {id(weight) for layer in layers for weight in lora_weights(layer, self._adapter)}

    def _watch(self, path: str, own: Any) -> Callable[[nn.Module, Any, Tensor], None]:
        def watch(down: Any, inputs: Any, z: Tensor) -> None:
            # A copy of the model has the same hooks.
            if down is not own or self._done < self.cut_step - _WINDOW or not z.requires_grad:
                return
            if path not in self._moments:
                self._moments[path] = Moments.zeros(len(down.weight), z.device)
            moments, values = self._moments[path], z.detach()
            # A convolution may have no batch.
            channels = z.dim() - 1 - len(down.kernel_size) if isinstance(down, _ConvNd) else -1
            z.register_hook(lambda h: moments.add(values.movedim(channels, -1), h.detach().movedim(channels, -1)))

        return watch

    def _before_saving(self, *args: Any) -> None:
        if self._warns:
            warnings.warn(
                f"The adapter is saved after {self._done} optimizer steps, before the cut after {self.cut_step}: it is "
                "wide, not of the size asked for.",
                stacklevel=2,
            )

    def _before_step(self, optimizer: Any, *args: Any) -> None:
        self._restore_groups()  # a step may have failed
        warm_up = max(1, min(_WARM_UP, self._steps // 20))
        share = _WIDE_RATE if self.ranks is None else min(1.0, (self._done - self.cut_step + 1) / warm_up)
        if share == 1:
            return
        # For this step only, in groups of their own: heads, which share a group with the factors, keep their rate.
        self._groups = optimizer.param_groups
        for group in self._groups:
            for is_factor, rate in ((True, group["lr"] * share), (False, group["lr"])):
                params = [p for p in group["params"] if (id(p) in self._factors) == is_factor]
                if params:
                    self._split.append((group, {**group, "params": params, "lr": rate}))
        optimizer.param_groups = [part for _, part in self._split]

    def _restore_groups(self) -> None:
        if not self._split:
            return
        for group, part in self._split:  # some optimizers count steps in their groups
            group |= {name: value for name, value in part.items() if name not in ("params", "lr")}
        self._optimizer.param_groups, self._split = self._groups, []

    def _after_step(self, optimizer: Any, *args: Any) -> None:
        self._restore_groups()
        overflow = getattr(optimizer, "found_inf", None)  # of a fused optimizer, which then skips the step itself
        if overflow is not None and overflow.item():
            return
        self._done += 1
        if self.ranks is None and self._done >= self.cut_step:
            self._cut()

    @torch.no_grad()
    def _cut(self) -> None:
        whole = lora_factors(self._model, self._adapter)
        if not all(part.A.isfinite().all() and part.B.isfinite().all() for part in whole):
            raise ValueError(f"The LoRA weights at step {self._done} are not finite. Lower the learning rate.")
        idle = [part.module for part in whole if part.energy and part.module not in self._moments]
        if idle:
            raise ValueError(
                f"No gradient passed through lora_A of {idle[0]} ({len(idle)} of {len(whole)} modules) in the last "
                f"{_WINDOW} steps before the cut: it was not used, or a layer or kernel bypasses PEFT's forward. Leave "
                "it out of target_modules."
            )
        curve = LossCurve([directions(p, self._moments.get(p.module, Moments.zeros(p.rank)).cpu(), 1) for p in whole])
        factors = curve.within(self._budget)
        resize(self._model, self._adapter, factors, self._optimizer)
        self._factors = self._ids()
        self.ranks, self.cut_step = {part.module: part.rank for part in factors}, self._done
        self._moments.clear()
        for hook in self._watchers:
            hook.remove()


class LearnedRanksCallback(TrainerCallback):
    """`LearnedRanks` for a transformers or TRL Trainer with a plain `peft.LoraConfig`.

        trainer = SFTTrainer(..., peft_config=LoraConfig(r=16, target_modules="all-linear"),
                             callbacks=[LearnedRanksCallback("r4")])

    Pass it to the Trainer when it is created, so that checkpoints from after the cut can be resumed. The best
    checkpoint (`load_best_model_at_end`) is one from after the cut.

    Args:
        size: of the adapter after the cut: r4 (that of LoRA r = 4 on the same modules), 200k parameters, or 4MiB.
        at: share of the steps after which the adapter is cut, in (0, 1).

    Attributes:
        learned: `LearnedRanks` with the ranks; None before training.

    Raises:
        ValueError: `size` is no size; when training begins: see `LearnedRanks`.

    """

    def __init__(self, size: str, *, at: float = CUT_AT) -> None:
        parse_size(size, "size")
        self._size, self._at = size, at
        self.learned: LearnedRanks | None = None
        self._is_cut = False

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model = kwargs["model"]
        _require_one_device(args)
        require_plain_lora(model)
        model.register_load_state_dict_pre_hook(fit_to_checkpoint)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _require_one_device(args)
        resume = _checkpoint(args, state) if state.global_step else None
        model = kwargs["model"]
        known = self.learned
        if resume is None and known is not None and known.ranks is not None and known._model is model:
            return  # a further `train()`, with the ranks learned before
        self.learned = LearnedRanks(
            model, kwargs["optimizer"], size=self._size, steps=state.max_steps, at=self._at, resume=resume
        )
        self.learned._warns = False  # checkpoints may be wide
        self._is_cut = self.learned.ranks is not None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.learned is not None and self.learned.ranks is not None and not self._is_cut:
            # A better one from before the cut would be larger than asked for.
            self._is_cut = True
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.learned is not None:
            self.learned.save_state(_checkpoint(args, state))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.learned is not None and self.learned.ranks is None:
            warnings.warn(
                f"Training ended at step {state.global_step}, before the cut at step {self.learned.cut_step}: the "
                f"adapter is wide, not of size {self._size}.",
                stacklevel=2,
            )


def _require_steps(steps: int) -> None:
    """Raise ValueError if there are too few steps to learn ranks in."""
    if not isinstance(steps, int) or steps < _FEWEST_STEPS:
        raise ValueError(f"steps must be at least {_FEWEST_STEPS} for ranks to be learned, got {steps!r}.")


def _require_suitable(optimizer: Any, factors: set[int]) -> None:
    """Raise ValueError for an optimizer whose steps the cut cannot take part in."""
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not trained >= factors:
        raise ValueError("The optimizer must have all LoRA parameters of the model. Create it from this model.")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("Learned ranks do not support LBFGS, whose state spans all parameters. Use AdamW.")
    if any(group.get("lr") is None for group in optimizer.param_groups):
        raise ValueError(f"Learned ranks need a learning rate, but {type(optimizer).__name__} has lr=None. Set it.")


def wide_rank(size: str) -> int:
    """Usual rank to start from."""
    number, unit = parse_size(size, "size")
    return WIDTH * int(number) if unit == "ranks" else _WIDE


def planned_cut(size: str, model: Any, args: TrainingArguments) -> tuple[int, int]:
    """Number of parameters after the cut, and its step, for `LearnedRanksCallback` with its defaults.

    Raises:
        ValueError: see `LearnedRanks`; or the Trainer is set up in a way that the cut does not support.

    """
    _require_one_device(args)
    _require_steps(args.max_steps)
    return _parameters_in(size, model, require_plain_lora(model)), _cut_step(CUT_AT, args.max_steps)


def _cut_step(at: float, steps: int) -> int:
    return max(1, round(at * steps))


def _parameters_in(size: str, model: PeftModel, adapter: str) -> int:
    """Number of parameters of a size.

    Raises:
        ValueError: it is not below that of the adapter, or below one rank of its smallest module.

    """
    weights = [lora_weights(layer, adapter) for layer in lora_layers(model, adapter).values()]
    costs = [(A.numel() + B.numel()) // len(A) for A, B in weights]
    whole = sum(A.numel() + B.numel() for A, B in weights)
    number = parse_size(size, "size").parameters(sum(costs), weights[0][0].element_size())
    if not min(costs) <= number < whole:
        raise ValueError(
            f"size={size} is {number:,} parameters, but must be below the adapter's {whole:,} and at least "
            f"{min(costs):,}. Change it, or raise r of LoraConfig: {WIDTH} times the rank of the size is usual."
        )
    return number


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer inside of a wrapper, such as accelerate's or SAM's."""
    for name in ("optimizer", "base_optimizer"):
        optimizer = getattr(optimizer, name, optimizer)
    return optimizer


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _require_one_device(args: TrainingArguments) -> None:
    """Raise ValueError for ways to train whose parameters cannot change their shape."""
    _refuse(
        {
            "more than one process": args.world_size > 1,
            "more than one GPU": args.n_gpu > 1,
            "torch_compile": args.torch_compile,
            "deepspeed": args.deepspeed,
            "fsdp": args.fsdp,
        }
    )


def _refuse(given: Mapping[str, Any]) -> None:
    if found := next((name for name, is_given in given.items() if is_given), None):
        raise ValueError(f"Learned ranks do not support {found}. Train on one device, without it.")
