"""Methods of a comparison. To add one, add an entry: its `lrlora train` settings at rank r."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from lrlora.checks import require_known
from lrlora.learned.cut import WIDTH
from lrlora.train.methods import METHODS as PEFT_METHODS
from lrlora.train.methods import PeftMethod
from lrlora.train.yaml import parse_assignments
from lrlora.tuner.config import PUBLISHED, LrLoraConfig

from .adalora import AdaLora

# Runs go through `lrlora train`, which does not offer these rivals itself.
OTHER_METHODS = {
    "full": PeftMethod(None),
    "adalora": AdaLora("peft.AdaLoraConfig", rank="target_r", alpha="lora_alpha"),
    "hira": PeftMethod("peft.HiraConfig"),
    "randlora": PeftMethod("peft.RandLoraConfig", alpha="randlora_alpha"),
    "loha": PeftMethod("peft.LoHaConfig", alpha="alpha"),
    "vera": PeftMethod("peft.VeraConfig"),
    "peanut": PeftMethod("peft.PeanutConfig", alpha="scaling"),  # which no rank divides: it is s·r
}
PEFT_METHODS.update(OTHER_METHODS)

# Initial learning rates; the grid is extended while the best is at its edge.
_ADAPTER_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
_FULL_RATES = (5e-5, 1e-4, 2e-4, 4e-4)
# Options of learned ranks: the largest rank, the share of the steps before the cut, the factor of the learning rate
# after it, and a criterion of `rivals.CRITERIA`.
CUT = ("max_rank", "at", "rate", "by")


@dataclass(frozen=True)
class Method:
    """A fine-tuning method.

    Args:
        name: name in tables.
        train: name in `PEFT_METHODS`.
        options: fields of its PEFT configuration, besides the rank.
        rank_factor: ratio of its rank to r; 0 for methods without one.
        rates: learning rates to try.
        learns_ranks: whether it starts at its rank, and ends at the size of LoRA with rank r; its option `r` is that of
            the size.
        tunes_scale: whether s is tuned, if it has one.

    On tasks on which rank binds, methods that learn ranks also have the options of `CUT`.

    """

    name: str
    train: str
    options: dict[str, Any] = field(default_factory=dict)
    rank_factor: int = 1
    rates: tuple[float, ...] = _ADAPTER_RATES
    learns_ranks: bool = False
    tunes_scale: bool = True

    def size(self, r: int) -> str | None:
        """Size to which its ranks are fitted in a comparison of rank r; None without."""
        return f"r{self.options.get('r', r)}" if self.learns_ranks else None

    @property
    def cut(self) -> dict[str, Any]:
        """Options of `CUT`."""
        return {name: self.options[name] for name in CUT if name in self.options} if self.learns_ranks else {}

    @property
    def has_ranks(self) -> bool:
        """Whether the ranks of its update can be measured. PiSSA's BA is not its update, but starts from part of W."""
        return PEFT_METHODS[self.train].has_ranks and self.options.get("init_lora_weights") != "pissa"

    @property
    def has_scale(self) -> bool:
        """Whether s is tuned."""
        alpha = PEFT_METHODS[self.train].alpha
        return self.tunes_scale and alpha is not None and alpha not in self.options

    def adapter(self, r: int, scale: float | None = None, *, ratio: float = 1.0) -> dict[str, Any]:
        """Fields of its PEFT configuration; its own options take precedence.

        Args:
            r: rank of the comparison.
            scale: s, if tuned; None: determined by `ratio`.
            ratio: α/r, equal to s except for rsLoRA, whose s is α/√r, its difference from LoRA.

        """
        if not self.rank_factor:
            return dict(self.options)
        own = {name: value for name, value in self.options.items() if name not in self.cut}
        if self.learns_ranks:
            r = own.pop("r", r)
        options = {PEFT_METHODS[self.train].rank: r * self.rank_factor, **own}
        alpha = PEFT_METHODS[self.train].alpha if self.tunes_scale else None
        if alpha is None or (scale is None and ratio == 1):  # α defaults to r
            return options
        if scale is None:
            return {alpha: ratio * options["r"], **options}
        divisor = math.sqrt(options["r"]) if options.get("use_rslora") else options["r"]
        return {alpha: scale * divisor, **options}

    def facts(self, r: int) -> dict[str, Any]:
        """Facts that reports need, in a comparison of rank r. Each job stores them, so that results outlive the method.

        Returns:
            `label`: name in tables; `train` and `learns_ranks`; `r`: rank of BA, of learned ranks that of their size,
                None without; `terms` of an expansion, or None; `is_plain_lora`: whether its rank alone differs from
                LoRA's.

        """
        adapter = self.adapter(r)
        is_expansion = adapter.get("form") == "expansion"
        return {
            "label": self.name,
            "train": self.train,
            "learns_ranks": self.learns_ranks,
            "r": self.options.get("r", r) if self.learns_ranks else adapter.get("r"),
            "terms": adapter.get("num_terms", LrLoraConfig.num_terms) if is_expansion else None,
            "is_plain_lora": self.train == "lora" and not self.learns_ranks and self.options.keys() <= {"r"},
        }


# Module names of RoBERTa, DeBERTa, Llama, Qwen, ViT and similar models.
_LINEAR = r"\.(query|key|value|dense|(q|k|v|o|query|key|value|gate|up|down)_proj|fc1|fc2)"
_IN_ATTENTION = rf".*att.*{_LINEAR}"
_IN_MLP = rf".*layers?\.\d+(?!.*att).*{_LINEAR}"

METHODS = {
    "full": Method("full fine-tuning", "full", rank_factor=0, rates=_FULL_RATES),
    "lora": Method("LoRA", "lora"),
    "learned": Method("learned ranks", "lora", rank_factor=WIDTH, learns_ranks=True),
    "lora-2r": Method("LoRA at 2r", "lora", rank_factor=2),
    "lora-4r": Method("LoRA at 4r", "lora", rank_factor=4),
    "rslora": Method("rsLoRA", "lora", {"use_rslora": True}),
    "dora": Method("DoRA", "dora"),
    "adalora": Method("AdaLoRA", "adalora", tunes_scale=False),
    "pissa": Method("PiSSA", "lora", {"init_lora_weights": "pissa"}),
    "hira": Method("HiRA", "hira"),
    "randlora": Method("RandLoRA", "randlora"),
    "loha": Method("LoHa", "loha"),
    "vera": Method("VeRA", "vera"),
    "peanut": Method("PEANuT", "peanut"),
    "lr-lora": Method("LR-LoRA", "lr-lora"),
    "lr-lora-shared": Method("LR-LoRA, one φ for all", "lr-lora", {"sharing": "global"}),
    "lr-lora-frozen": Method("LR-LoRA, φ frozen", "lr-lora", {"phi_lr_multiplier": 1e-9}),
    "paper": Method("the paper's form", "lr-lora", PUBLISHED),
    "lora-attention": Method("LoRA on attention", "lora", {"target_modules": _IN_ATTENTION}),
    "lora-mlp": Method("LoRA on MLPs", "lora", {"target_modules": _IN_MLP}),
    "lr-lora-attention": Method("LR-LoRA on attention", "lr-lora", {"target_modules": _IN_ATTENTION}),
    "lr-lora-mlp": Method("LR-LoRA on MLPs", "lr-lora", {"target_modules": _IN_MLP}),
    "expansion": Method("expansion", "lr-lora", {"form": "expansion"}),
}
MAIN_METHODS = ("lora", "learned", "lora-2r", "dora", "adalora", "lr-lora")


def _with(option: str, *values: Any) -> tuple[str, ...]:
    return tuple(f"lr-lora+{option}={value}" for value in values)


# Ablation → its methods.
ABLATIONS: dict[str, tuple[str, ...]] = {
    "sharing": ("lr-lora", "lora", "lr-lora-shared"),
    "frozen": ("lr-lora", "lora", "lr-lora-frozen"),
    "num-basis": ("lr-lora", "lora", *_with("num_basis", 2, 4, 16, 50)),
    "interval": ("lr-lora", "lora", *_with("interval", 1, 2, 5, 10)),
    "gain": ("lr-lora", "lora", *_with("input_gain", 1, 30, 100, 300, 1000)),
    "rank": tuple(f"{method}+r={r}" for r in (1, 2, 4, 8, 16) for method in ("lora", "lr-lora")),
    "targets": ("lora", "lr-lora", "lora-attention", "lr-lora-attention", "lora-mlp", "lr-lora-mlp"),
}


def find_method(key: str) -> Method:
    """A method of `METHODS`, optionally with other options: `lr-lora+num_basis=50+interval=2`.

    Raises:
        ValueError: unknown method, or an option is not name=value.

    """
    name, *assignments = key.split("+")
    require_known("method", name, METHODS)
    options = parse_assignments(assignments, f"the method {key}")
    if not options:
        return METHODS[name]
    method = METHODS[name]
    return replace(method, name=", ".join([method.name, *assignments]), options={**method.options, **options})
