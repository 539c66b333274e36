"""LoRA that learns its ranks: it starts wide, is cut once to a size, and trains on.

At the cut, the loss decides how much rank each module keeps, by the quadratic model of `lrlora.ranks`. Its moments come
from the ordinary steps before the cut, so that no extra pass over data is needed. What remains is a plain LoRA with a
`rank_pattern`, which PEFT loads without lrlora; modules of rank 0 leave the adapter.

The learning rate of the factors is halved before the cut, and warms up again after it: they start with a new state of
the optimizer. Other parameters, such as heads, keep theirs.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .adapters import Factors, Layout, lora_config
from .adapters.peft_methods import CHANGING_STARTS
from .files import replacing
from .naming import PEFT_PREFIX
from .ranks.cut import LossCurve, directions
from .ranks.moments import Moments
from .sizes import parse_size

CUT_AT = 0.3  # share of the steps
WIDTH = 4  # rank at the start, as a multiple of that of the size
_WIDE = 16  # rank at the start for a size in parameters or bytes
_WINDOW = 32  # steps that give moments
_WIDE_RATE = 0.5  # share of the learning rate before the cut
_WARM_UP = 20  # steps after the cut, at most a twentieth of all
_FEWEST_STEPS = 10
_STATE_FILE = "learned_ranks.safetensors"
_DOWN = (nn.Linear, _ConvNd)  # supported as lora_A
# Fields of LoraConfig that the cut does not support, with the values it does.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "lora_bias": (False,),
    "bias": ("none",),
    "use_qalora": (False,),
    "use_bdlora": (None,),
    "alora_invocation_tokens": (None,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
}


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
        ValueError: the adapter is no plain LoRA, not larger than the size, or there are too few steps.

    """

    def __init__(
        self,
        model: PeftModel,
        optimizer: Any,
        *,
        size: str,
        steps: int,
        at: float = CUT_AT,
        resume: Path | None = None,
    ) -> None:
        self._model, self._optimizer = model, _unwrapped(optimizer)
        self._adapter = _require_plain_lora(model)
        if not isinstance(at, float) or not 0 < at < 1:
            raise ValueError(f"at must be a share of the steps between 0 and 1, got {at!r}.")
        _require_steps(steps)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            _refuse({"more than one process": torch.distributed.get_world_size() > 1})
        self.ranks: dict[str, int] | None = None
        self.cut_step = _cut_step(at, steps)
        self._steps, self._done = steps, 0
        self._groups: list[dict[str, Any]] = []
        self._split: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._moments: dict[str, Moments] = {}
        if resume is not None:
            self._load_state(resume)
        self._hooks: list[Any] = []
        if self.ranks is None:
            self._budget = _parameters_in(size, model, self._adapter)
            for path, layer in _layers(model, self._adapter).items():
                self._hooks.append(layer.lora_A[self._adapter].register_forward_hook(self._watch(path)))
        trained = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        self._factors = _ids(model, self._adapter)
        if not trained >= self._factors:
            raise ValueError("The optimizer must have all LoRA parameters of the model. Create it from this model.")
        self._optimizer.register_step_pre_hook(self._before_step)
        self._optimizer.register_step_post_hook(self._after_step)
        self._warns = True
        model.register_state_dict_pre_hook(self._before_saving)

    def save_state(self, folder: Path) -> None:
        """Save steps, ranks and moments, to resume from."""
        tensors = {
            f"{module}.{name}": getattr(of, name)
            for module, of in self._moments.items()
            for name in ("inputs", "gradients", "tokens")
        }
        with replacing(folder / _STATE_FILE) as partial:
            steps = {"steps": torch.tensor(self._done)}  # old versions of safetensors read no empty file
            save_file(tensors | steps, partial, {"ranks": json.dumps(self.ranks)})

    def _load_state(self, folder: Path) -> None:
        path = folder / _STATE_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {_STATE_FILE}. Resume from another checkpoint.")
        with safe_open(path, "pt") as file:
            self._done, self.ranks = int(file.get_tensor("steps")), json.loads(file.metadata()["ranks"])
            layers = _layers(self._model, self._adapter)
            for module in {key.rpartition(".")[0] for key in file.keys() if key != "steps"}:  # noqa: SIM118 (no mapping)
                device = layers[module].lora_A[self._adapter].weight.device
                z, h, tokens = (file.get_tensor(f"{module}.{name}") for name in ("inputs", "gradients", "tokens"))
                self._moments[module] = Moments(z.to(device), h.to(device), tokens.to(device))

    def _watch(self, path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def watch(down: Any, inputs: Any, z: Tensor) -> None:
            if self._done < self.cut_step - _WINDOW or not z.requires_grad:
                return
            if path not in self._moments:
                self._moments[path] = Moments.zeros(len(down.weight), z.device)
            moments, values = self._moments[path], z.detach()
            channels = 1 if isinstance(down, _ConvNd) else -1
            z.register_hook(lambda h: moments.add(values.movedim(channels, -1), h.movedim(channels, -1)))

        return watch

    def _before_saving(self, *args: Any) -> None:
        if self._warns and self.ranks is None:
            warnings.warn(
                f"The adapter is saved after {self._done} optimizer steps, before the cut after {self.cut_step}: it is "
                "wide, not of the size asked for.",
                stacklevel=2,
            )

    def _before_step(self, optimizer: Any, *args: Any) -> None:
        warm_up = max(1, min(_WARM_UP, self._steps // 20))
        share = _WIDE_RATE if self.ranks is None else min(1.0, (self._done - self.cut_step + 1) / warm_up)
        self._groups = optimizer.param_groups
        if share == 1:
            return
        # For this step only, in groups of their own: heads, which share a group with the factors, keep their rate.
        self._split = []
        for group in self._groups:
            for is_factor, rate in ((True, group["lr"] * share), (False, group["lr"])):
                params = [p for p in group["params"] if (id(p) in self._factors) == is_factor]
                if params:
                    self._split.append((group, {**group, "params": params, "lr": rate}))
        optimizer.param_groups = [part for _, part in self._split]

    def _after_step(self, optimizer: Any, *args: Any) -> None:
        for group, part in self._split:  # some optimizers count steps in their groups
            group |= {name: value for name, value in part.items() if name not in ("params", "lr")}
        self._split = []
        optimizer.param_groups = self._groups
        self._done += 1
        if self.ranks is None and self._done >= self.cut_step:
            self._cut()

    @torch.no_grad()
    def _cut(self) -> None:
        whole = [_factors(path, layer, self._adapter) for path, layer in _layers(self._model, self._adapter).items()]
        if not all(part.A.isfinite().all() and part.B.isfinite().all() for part in whole):
            raise ValueError(f"The LoRA weights at step {self._done} are not finite. Lower the learning rate.")
        idle = [part.module for part in whole if part.energy and part.module not in self._moments]
        if idle:
            raise ValueError(
                f"No gradient passed through lora_A of {idle[0]} ({len(idle)} of {len(whole)} modules). Learned ranks "
                "need PEFT's own forward, without kernels or layers that bypass it."
            )
        curve = LossCurve([directions(p, self._moments.get(p.module, Moments.zeros(p.rank)).cpu(), 1) for p in whole])
        factors = curve.within(self._budget)
        _resize(self._model, self._adapter, factors, self._optimizer)
        self._factors = _ids(self._model, self._adapter)
        self.ranks = {part.module: part.rank for part in factors}
        self._moments.clear()
        for hook in self._hooks:
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

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model = kwargs["model"]
        _require_one_device(args)
        _require_plain_lora(model)
        model.register_load_state_dict_pre_hook(_fit_to_checkpoint)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _require_one_device(args)
        resume = _checkpoint(args, state) if state.global_step else None
        self.learned = LearnedRanks(
            kwargs["model"], kwargs["optimizer"], size=self._size, steps=state.max_steps, at=self._at, resume=resume
        )
        self.learned._warns = False  # checkpoints may be wide

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.learned is not None and state.global_step == self.learned.cut_step:
            # A better one from before the cut would be larger than asked for.
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
    if steps < _FEWEST_STEPS:
        raise ValueError(f"steps must be at least {_FEWEST_STEPS} for ranks to be learned, got {steps!r}.")


def _require_plain_lora(model: Any) -> str:
    """Name of the adapter to cut.

    Raises:
        ValueError: the model has no adapter, or one that cannot be cut.

    """
    if not isinstance(model, PeftModel):
        raise ValueError("Learned ranks need a PEFT model with LoRA. Wrap the model with get_peft_model.")
    (adapter, *others) = model.active_adapters
    config = model.peft_config[adapter]
    if others or type(config) is not LoraConfig:
        raise ValueError(f"Learned ranks need one active LoRA adapter, got {', '.join(model.active_adapters)}.")
    for name, supported in _PLAIN.items():
        if (value := getattr(config, name, supported[0])) not in supported:
            raise ValueError(f"Learned ranks do not support {name}={value!r}. Remove it.")
    if str(config.init_lora_weights).startswith(CHANGING_STARTS):
        raise ValueError(
            f"Learned ranks do not support init_lora_weights={config.init_lora_weights!r}, which changes the base "
            "weights. Remove it."
        )
    for path, layer in _layers(model, adapter).items():
        if layer.merged or not isinstance(dict(layer.lora_A.items()).get(adapter), _DOWN):
            raise ValueError(
                f"Learned ranks need an unmerged LoRA on linear layers and convolutions, but {path} has another. "
                "Leave it out of target_modules."
            )
    return adapter


def _layers(model: PeftModel, adapter: str) -> dict[str, LoraLayer]:
    """Layers with the adapter, by their path in the base model."""
    base = model.get_base_model()
    layers = {path: layer for path, layer in base.named_modules() if isinstance(layer, LoraLayer)}
    return {path: layer for path, layer in layers.items() if adapter in layer.r}


def _ids(model: PeftModel, adapter: str) -> set[int]:
    return {id(p) for layer in _layers(model, adapter).values() for p in _weights(layer, adapter)}


def _weights(layer: Any, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def _factors(path: str, layer: Any, adapter: str) -> Factors:
    """ΔW of a layer as its own factors, s·B and A, on the CPU."""
    down, up, scaling = layer.lora_A[adapter], layer.lora_B[adapter], layer.scaling[adapter]
    A, B = (part.weight.detach().float().cpu().flatten(1) for part in (down, up))
    B = scaling * B
    energy = ((B.double().T @ B.double()) * (A.double() @ A.double().T)).sum().item()
    layout = Layout(kernel=tuple(down.kernel_size)) if isinstance(down, _ConvNd) else Layout()
    return Factors(path, A, B, len(A), scaling, layout, energy, stable_rank=math.nan, kept=1.0)


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
    return _parameters_in(size, model, _require_plain_lora(model)), _cut_step(CUT_AT, args.max_steps)


def _cut_step(at: float, steps: int) -> int:
    return max(1, round(at * steps))


def _parameters_in(size: str, model: PeftModel, adapter: str) -> int:
    """Number of parameters of a size.

    Raises:
        ValueError: it is not below that of the adapter, or below one rank of its smallest module.

    """
    weights = [_weights(layer, adapter) for layer in _layers(model, adapter).values()]
    costs = [(A.numel() + B.numel()) // len(A) for A, B in weights]
    whole = sum(A.numel() + B.numel() for A, B in weights)
    number = parse_size(size, "size").parameters(sum(costs), weights[0][0].element_size())
    if not min(costs) <= number < whole:
        raise ValueError(
            f"size={size} is {number:,} parameters, but must be below the adapter's {whole:,} and at least "
            f"{min(costs):,}. Change it, or raise r of LoraConfig: {WIDTH} times the rank of the size is usual."
        )
    return number


def _resize(model: PeftModel, adapter: str, factors: Sequence[Factors], optimizer: Any = None) -> None:
    """Replace a LoRA by these factors in place, in model, configuration and optimizer, with the same scaling.

    Modules of rank 0 leave the adapter. The optimizer begins with no state for the new parameters.
    """
    config: Any = model.peft_config[adapter]
    tuner: Any = model.base_model
    layers, base = _layers(model, adapter), model.get_base_model()
    new = lora_config(factors, like=config, keep_scaling=True)
    replaced: dict[Tensor, nn.Parameter | None] = {}
    for part in factors:
        layer: Any = layers[part.module]
        down, up = layer.lora_A[adapter], layer.lora_B[adapter]
        if not part.rank:
            replaced |= {down.weight: None, up.weight: None}
            tuner.targeted_module_names.remove(part.module)
            if len(layer.r) > 1:
                layer.delete_adapter(adapter)
            else:
                parent, _, name = part.module.rpartition(".")
                setattr(base.get_submodule(parent), name, layer.get_base_layer())
            continue
        for module, value in zip((down, up), part.padded(part.rank), strict=True):
            weight = (value / part.scaling**0.5).to(module.weight).contiguous()
            replaced[module.weight] = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
            module.weight = replaced[module.weight]
        is_conv = isinstance(down, _ConvNd)
        setattr(down, "out_channels" if is_conv else "out_features", part.rank)
        setattr(up, "in_channels" if is_conv else "in_features", part.rank)
        layer.r[adapter], layer.lora_alpha[adapter] = part.rank, part.scaling * part.rank
    for name in ("r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        setattr(config, name, getattr(new, name))
    config.use_rslora, config.layers_to_transform, config.layers_pattern = False, None, None
    for group in () if optimizer is None else optimizer.param_groups:
        group["params"] = [q for p in group["params"] if (q := replaced.get(p, p)) is not None]
    for parameter in replaced:
        optimizer and optimizer.state.pop(parameter, None)


def _fit_to_checkpoint(model: Any, state: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
    """Resize the adapter to a checkpoint from after the cut, before PEFT loads it.

    Raises:
        ValueError: the checkpoint is from before the cut, and the adapter is cut.

    """
    adapter = model.active_adapters[0]
    key = f"{prefix}{PEFT_PREFIX}{{}}.lora_A.{adapter}.weight"
    ending = f".lora_A.{adapter}.weight"
    if not any(name.endswith(ending) for name in state):
        return
    whole = [_factors(path, layer, adapter) for path, layer in _layers(model, adapter).items()]
    ranks = {part.module: len(state.get(key.format(part.module), ())) for part in whole}
    known = sum(name.endswith(ending) for name in state)
    if known > sum(map(bool, ranks.values())) or any(ranks[part.module] > part.rank for part in whole):
        raise ValueError("The checkpoint is from before the cut, and cannot be loaded after it.")
    if any(ranks[part.module] != part.rank for part in whole):
        cut = [replace(p, A=p.A[: ranks[p.module]], B=p.B[:, : ranks[p.module]]) for p in whole]
        _resize(model, adapter, cut)


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer inside of accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


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
