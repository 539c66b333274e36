"""`LrLoraConfig`: PEFT's LoRA fields, with the same names, and the fields of φ."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig, PeftConfig, PeftType

from ..checks import is_type
from ..ops.expansion import Expansion
from ..ops.form import Form
from ..ops.phi import TransferSpec
from ..ops.phi_forms import FORMS
from ..ops.transfer import Transfer

FORMAT_VERSION = 2
EXPANSION = "expansion"  # the form with fixed signs in place of φ
SHARING = ("module", "global")
_REMEDIES = {
    "init_lora_weights": "use `init_weights`",
    "use_dora": "remove it, or use `peft.LoraConfig` for DoRA",
    "target_parameters": "use `peft.LoraConfig`",
    "lora_bias": "remove it, or train the layers' own biases with `bias='lora_only'`",
}

# Values set by `LrLoraConfig.paper`.
PUBLISHED = {
    "form": "sinc",
    "num_basis": 50,
    "interval": 3.0,
    "input_gain": 1.0,
    "sharing": "module",
    "phi_lr_multiplier": 1.0,
}

CARD_SECTION = """## Loading this LR-LoRA adapter

The method is not part of PEFT: install lrlora (`pip install .` in a clone of it), and `import lrlora` before loading.
Without the import, PEFT stops with `KeyError: 'LRLORA'`. `lrlora export` makes it a plain LoRA, which PEFT loads alone.

```python
import lrlora
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder or hub name")
```
"""


@dataclass
class LrLoraConfig(PeftConfig):
    """Configuration of an LR-LoRA adapter: ΔW = (s/g)·φ(g·BA), φ learned (arXiv:2606.04325), or s·M ∘ BA, M fixed.

    Args:
        r: rank of the product BA, ≥ 1. The rank of ΔW is learned and may exceed it.
        lora_alpha: α; the scaling s is α/r, or α/√r with `use_rslora`.
        lora_dropout: dropout probability on the adapter's input. Values above 0 use a slower training path: a second
            matmul per layer.
        use_rslora: use rank-stabilized scaling.
        bias: biases of the base model to train: "none", "all", or "lora_only" (those of adapted layers).
        target_modules: names or regular expression of the modules to adapt, or "all-linear". Default: PEFT's choice for
            LoRA on this architecture.
        exclude_modules: names or regular expression of the modules to exclude.
        layers_to_transform: indices of the layers to adapt (requires `target_modules` as a list).
        layers_pattern: name of the `nn.ModuleList` that these indices refer to.
        rank_pattern: module name or regular expression → r, overriding `r`.
        alpha_pattern: module name or regular expression → α, overriding `lora_alpha`.
        modules_to_save: modules trained in full and saved with the adapter, such as a new classification head.
        trainable_token_indices: token ids of the embedding to train in full, or layer name → token ids.
        fan_in_fan_out: accepted for PEFT compatibility; the layer type determines whether a weight is transposed.
        init_weights: True starts at ΔW = 0. False initializes B randomly, for debugging.
        num_basis: N ≥ 2, number of terms of ψ.
        interval: I > 0, half-width of the grid of φ.
        input_gain: g > 0. Default: c / rms(BA) with c = 0.5, so that the input of φ has the same size in every module.
        form: form of φ: "residual" or "sinc" (see `lrlora.ops.phi_forms`). Or "expansion", fixed signs that
            multiply BA in place of φ (see `lrlora.ops.expansion`).
        num_terms: Q ≥ 1, terms of the expansion; the rank of ΔW is at most r·Q.
        pattern_seed: seed of the expansion's random signs.
        sharing: one φ per "module", or one "global" φ.
        phi_lr_multiplier: > 0, learning rate of φ relative to A and B. At LoRA's learning rates, 1 leaves φ straight
            and the rank at r; 10 lets both move.
        format_version: version of the saved format; set by lrlora.

    Raises:
        ValueError: a value is out of range, or a field exists only in `peft.LoraConfig`. The message names the field,
            the value and the remedy.

    Examples:
        >>> from lrlora import LrLoraConfig
        >>> config = LrLoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        >>> config.form, config.num_basis
        ('residual', 8)

    """

    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True
    num_basis: int = 8
    interval: float = 3.0
    input_gain: float | None = None
    form: str = "residual"
    num_terms: int = 16
    pattern_seed: int = 0
    sharing: Literal["module", "global"] = "module"
    phi_lr_multiplier: float = 10.0
    format_version: int = FORMAT_VERSION

    def __new__(cls, *args: Any, **kwargs: Any) -> LrLoraConfig:
        """Reject LoRA-only fields with a remedy; the generated `__init__` would only call them unexpected."""
        lora_only = {f.name for f in fields(LoraConfig)} - {f.name for f in fields(cls)}
        names = sorted(lora_only & kwargs.keys())
        if names:
            advice = "; ".join(f"`{name}`: {_REMEDIES.get(name, 'remove it')}" for name in names)
            raise ValueError(f"LrLoraConfig does not support the LoRA-only field(s) {', '.join(names)}. {advice}.")
        return super().__new__(cls)

    @classmethod
    def paper(cls, **overrides: Any) -> LrLoraConfig:
        """Configuration of the published method (arXiv:2606.04325): N = 50, I = 3, one φ per module.

        From the paper: φ as a plain sum of 50 sincs, N, I, one φ per module, α/r outside φ, and a zero update at the
        start. From another implementation of the paper: BA enters φ unscaled, and φ learns at the rate of A and B.
        Specific to lrlora: amplitudes start where φ(z) ≈ z, because with zero amplitudes and B = 0 nothing would
        receive a gradient, and the first step is nearly LoRA's; bandwidths start at the spacing of the centers (ω =
        π/h) and stay below twice that.

        Args:
            overrides: fields that override the published values.

        Raises:
            ValueError: see the class.

        """
        return cls(**{**PUBLISHED, **overrides})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("LRLORA")
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        self._check()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.lora_dropout > 0:
            warnings.warn(
                f"lora_dropout={self.lora_dropout} slows down training: every adapted layer needs a second matmul. "
                "Set lora_dropout=0 for full speed.",
                stacklevel=3,
            )

    def _check(self) -> None:
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"The adapter has format_version={self.format_version}, but this version of lrlora supports up to "
                f"{FORMAT_VERSION}. Update your clone of lrlora and run `pip install .` again."
            )
        for name, r in [("r", self.r), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())]:
            _require(is_type(r, int) and r >= 1, name, r, "an integer ≥ 1")
        _require(is_type(self.num_basis, int) and self.num_basis >= 2, "num_basis", self.num_basis, "an integer ≥ 2")
        _require(is_type(self.num_terms, int) and self.num_terms >= 1, "num_terms", self.num_terms, "an integer ≥ 1")
        _require(is_type(self.pattern_seed, int), "pattern_seed", self.pattern_seed, "an integer")
        positive = [(name, getattr(self, name)) for name in ("lora_alpha", "interval", "phi_lr_multiplier")]
        if self.input_gain is not None:
            positive.append(("input_gain", self.input_gain))
        for name, value in [*positive, *((f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern.items())]:
            _require(is_type(value, float) and 0 < value < float("inf"), name, value, "a finite number > 0")
        dropout = self.lora_dropout
        _require(is_type(dropout, float) and 0 <= dropout < 1, "lora_dropout", dropout, "a number in [0, 1)")
        _require(self.form in (*FORMS, EXPANSION), "form", self.form, f"one of {', '.join((*FORMS, EXPANSION))}")
        _require(self.sharing in SHARING, "sharing", self.sharing, f"one of {', '.join(SHARING)}")
        _require(self.bias in ("none", "all", "lora_only"), "bias", self.bias, "one of none, all, lora_only")
        _require(isinstance(self.init_weights, bool), "init_weights", self.init_weights, "True or False")
        require_module_names(vars(self))
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} requires target_modules to be a list, got the string "
                    f"{self.target_modules!r}. Pass a list, or select the layers in the regular expression."
                )

        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} requires layers_to_transform, which is None. Set both or "
                "neither."
            )

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and with an adapter, add loading instructions to PEFT's model card."""
        is_with_adapter = "auto_mapping_dict" in kwargs  # from PeftModel.save_pretrained, which has written the card
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory) / "README.md"
        if is_with_adapter and card.exists() and CARD_SECTION.strip() not in (text := card.read_text(encoding="utf-8")):
            card.write_text(text.rstrip() + "\n\n" + CARD_SECTION, encoding="utf-8")

    def new_phi(self) -> Form:
        """Create the configured φ or expansion."""
        if self.form == EXPANSION:
            return Expansion(self.num_terms, self.pattern_seed)
        return Transfer(TransferSpec(self.form, self.num_basis, self.interval, self.phi_lr_multiplier))


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {value!r}.")


def require_module_names(options: Mapping[str, Any]) -> None:
    """Raise ValueError if a field that names modules has another type, as can happen with YAML."""
    for name in ("target_modules", "exclude_modules", "target_parameters", "modules_to_save"):
        names = options.get(name) or ()
        are_names = isinstance(names, (str, list, set, tuple)) and all(isinstance(module, str) for module in names)
        _require(are_names, name, names, "a list of module names or a regular expression")
