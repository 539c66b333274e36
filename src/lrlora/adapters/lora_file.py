"""LoRAs in single safetensors files: read and write keys of kohya and ComfyUI, LyCORIS, and diffusers."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import readable, replacing, require_writable
from ..lora.factors import Factors, require_finite
from ..naming import PEFT_PREFIX, natural_order
from .products import rank_of, scaling_of, update_from_tensors
from .update import MAGNITUDES_NOTE, Updates, as_stored, common_dtype

_EXPECTED = "Expected a single-file safetensors LoRA, as written by kohya, ComfyUI, LyCORIS or diffusers."
# Key suffixes of the two factors; the prefix is the module.
KOHYA_STYLE = (".lora_down.weight", ".lora_up.weight")
_STYLES = (
    KOHYA_STYLE,
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
)
_NAMES = {suffix: name for style in _STYLES for suffix, name in zip(style, ("lora_A", "lora_B"), strict=True)} | {
    ".lora_mid.weight": "lora_mid",
    ".diff": "diff",
    **{f".hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
_KEY = re.compile(rf"(.+?)({'|'.join(sorted(map(re.escape, _NAMES), key=len, reverse=True))})")
_MAGNITUDES = re.compile(r"\.(dora_scale|lora_magnitude_vector(\.\w+)*)$")
_BIAS = re.compile(r"\.lora(_B|_up|\.up)(\.\w+)?\.bias$")
_UNREADABLE = re.compile(r"\.(oft_\w+|boft_\w+|a1\.weight|b1\.weight|glora_\w+|on_input)(\.|$)")
METADATA_KEY = "lora_adapter_metadata"  # diffusers' key for PEFT's configuration, as JSON


@dataclass(frozen=True)
class SingleFile:
    """Contents of a single-file LoRA.

    Attributes:
        name: path of the file.
        metadata: string metadata.
        modules: module → its tensors, by PEFT's names.
        styles: module → key suffixes of its factors, if it has them.
        alphas: module → key and value of its α, if it has one.
        other_tensors: all other tensors, by key.

    """

    name: str
    metadata: dict[str, str]
    modules: dict[str, dict[str, Tensor]]
    styles: dict[str, tuple[str, str]]
    alphas: dict[str, tuple[str, float]]
    other_tensors: dict[str, Tensor]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> SingleFile:
        """Read the keys and memory-map the tensors.

        Raises:
            ValueError: the file is damaged, contains no LoRA, or uses an unsupported method.

        """
        name = os.fspath(path)
        with readable(name, _EXPECTED), safe_open(name, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in list(file.keys())}
            contents = cls(name, dict(file.metadata() or {}), {}, {}, {}, {})
        if any(key.startswith(PEFT_PREFIX) for key in tensors):
            raise ValueError(
                f"{name} is a file of a PEFT adapter, whose scaling is stored in its folder. Pass the folder."
            )
        for key, tensor in tensors.items():
            match = _KEY.fullmatch(key)
            if match and (match[2] != ".diff" or tensor.dim() > 1):  # norms and biases have no rank
                contents._add(match[1], match[2], tensor)
            else:
                contents.other_tensors[key] = tensor
        for module in contents.modules:
            contents._take_alpha(module)
        if unreadable := sorted(key for key in contents.other_tensors if _UNREADABLE.search(key)):
            raise ValueError(
                f"{name} contains updates that depend on the base weight, such as those of OFT ({unreadable[0]}), "
                "which cannot be read from this file alone."
            )
        if not contents.modules:
            names = ", ".join(sorted(tensors)[:3]) or "none"
            raise ValueError(f"{name} contains no LoRA. Tensors found: {names}. {_EXPECTED}")
        return contents

    def _add(self, module: str, suffix: str, tensor: Tensor) -> None:
        """Add a tensor to those of its module, which must be of one kind."""
        peft_name, tensors = _NAMES[suffix], self.modules.setdefault(module, {})
        kinds = sorted({name.partition("_")[0] for name in (*tensors, peft_name)})
        if peft_name in tensors:
            raise ValueError(f"{self.name} contains two tensors for {peft_name} of {module}. Remove one of them.")
        if len(kinds) > 1:
            raise ValueError(
                f"{self.name} contains {' and '.join(kinds)} tensors for {module}. Only one kind can be read."
            )
        if not tensor.dim():
            raise ValueError(f"{module}{suffix} in {self.name} must be a matrix, got a single number.")
        tensors[peft_name] = tensor
        if style := next((style for style in _STYLES if suffix in style), None):
            self.styles[module] = style

    def _take_alpha(self, module: str) -> None:
        for key in [key for key in (f"{module}.alpha", f"{module}.lora.alpha") if key in self.other_tensors]:
            if self.other_tensors[key].numel() != 1:
                shape = tuple(self.other_tensors[key].shape)
                raise ValueError(f"{key} in {self.name} must be a single number, got shape {shape}.")
            self.alphas[module] = key, self.other_tensors.pop(key).item()

    @property
    def method(self) -> str:
        kinds = {next(iter(tensors)).partition("_")[0] for tensors in self.modules.values()}
        names = {"lora": "LoRA", "hada": "LoHa", "lokr": "LoKr", "diff": "difference"}
        method = " and ".join(name for kind, name in names.items() if kind in kinds)
        return method.replace("LoRA", "DoRA") if self.has_magnitudes else method

    @property
    def stored_dtype(self) -> torch.dtype:
        """Dtype of the factors."""
        return common_dtype(tensor for tensors in self.modules.values() for tensor in tensors.values())

    @property
    def parameters(self) -> int:
        """Number of parameters in the factors."""
        return sum(tensor.numel() for tensors in self.modules.values() for tensor in tensors.values())

    @property
    def config(self) -> Any:
        raise ValueError(f"{self.name} is a single file. Use save_single_file to write it.")

    def other_weights(self, *, with_magnitudes: bool) -> dict[str, Tensor]:
        return self.other_tensors

    @property
    def has_magnitudes(self) -> bool:
        return any(_MAGNITUDES.search(key) for key in self.other_tensors)

    def scaling(self, module: str) -> float:
        """Scaling of a module: α/r with kohya's α; else from diffusers' metadata; else 1."""
        tensors = self.modules[module]
        r = rank_of(tensors)
        if r is None:
            return 1.0
        if r == 0:
            raise ValueError(f"{self.name} is damaged: the factors of {module} have no rows.")
        if module in self.alphas:
            return self.alphas[module][1] / r
        component = next((prefix for prefix in self._configs if module.startswith(prefix)), None)
        return 1.0 if component is None else scaling_of(self._configs[component], module.removeprefix(component), r)

    @functools.cached_property
    def _configs(self) -> dict[str, Mapping[str, Any]]:
        """Module name prefix → adapter configuration."""
        with readable(self.name, _EXPECTED):
            content = json.loads(self.metadata.get(METADATA_KEY, "{}"))
            components = {key.removesuffix("lora_alpha") for key in content if key.endswith("lora_alpha")}
            nearest_first = sorted(components, key=len, reverse=True)
            return {
                component: {key.removeprefix(component): content[key] for key in content if key.startswith(component)}
                for component in nearest_first
            }

    def updates(self) -> Updates:
        """Updates of all modules, in natural order of their names."""
        updates = [
            update_from_tensors(module, self.modules[module], self.scaling(module))
            for module in sorted(self.modules, key=natural_order)
        ]
        return Updates(self.name, self.method, updates, self, (MAGNITUDES_NOTE,) if self.has_magnitudes else ())


_CONVOLUTION = re.compile(r"conv|shortcut|sampler|proj_(in|out)$")


def save_single_file(
    factors: Sequence[Factors],
    updates: Updates,
    output: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    pad: bool = False,
) -> None:
    """Write a single-file LoRA; LoHa and LoKr become LoRA with kohya's keys.

    If the format has an α, it is 1 and B is multiplied by the rank that a reader divides by. Other contents (DoRA
    magnitudes, text embeddings, training metadata) are kept, except hashes of the original file.

    Args:
        factors: result of `factorize`.
        updates: updates read from the file.
        output: `.safetensors` file to write, atomically.
        dtype: dtype of the factors; default: that of the file.
        pad: zero-pad all modules to the largest rank.

    Raises:
        FileExistsError: the file exists.
        ValueError: no module has a rank; or a LoHa or LoKr may belong to a convolution with an unknown kernel.

    """
    file = updates.origin
    assert isinstance(file, SingleFile)
    path = free_file(output)
    if pad:  # with what was left out, or the next adapter could not take its place
        largest = max((pair.rank for pair in factors), default=0)
        factors = [pair.padded(largest) for pair in factors]
    exported = [pair for pair in factors if pair.rank]
    if not exported:
        raise ValueError("No module has a rank, so there is nothing to export.")
    if ambiguous := [pair.module for pair in exported if not pair.layout.is_known and _CONVOLUTION.search(pair.module)]:
        raise ValueError(
            f"{ambiguous[0]} may be a convolution, but {updates.method} does not store its kernel size, so it cannot "
            "be saved as LoRA."
        )
    dtype = dtype or file.stored_dtype
    tensors = dict(file.other_tensors)
    if bias_key := next((key for key in tensors if _BIAS.search(key)), None):
        raise ValueError(f"{file.name} has a bias on B ({bias_key}), which is scaled with B, and cannot be exported.")
    for key, value in tensors.items():
        require_finite(key, value)
    for pair in exported:
        file_tensors = _file_tensors(file, pair.module, *pair.weights, pair.rank)
        tensors |= {
            name: as_stored(pair.module, tensor, dtype) if tensor.dim() else tensor
            for name, tensor in file_tensors.items()
        }
    with replacing(path) as partial:
        save_file(tensors, partial, metadata=_metadata(file, exported))


def free_file(output: str | os.PathLike[str]) -> Path:
    """Check that a LoRA file can be written.

    Raises:
        ValueError: wrong suffix; see also `require_writable`.

    """
    path = Path(output)
    if path.suffix != ".safetensors":
        raise ValueError(f"The source is a single file, so output must end in .safetensors, got {output}.")
    require_writable(path)
    return path


def _file_tensors(file: SingleFile, module: str, A: Tensor, B: Tensor, rank: int) -> dict[str, Tensor]:
    down, up = file.styles.get(module, KOHYA_STYLE)
    if module not in file.alphas and (down, up) != KOHYA_STYLE:
        return {f"{module}{down}": A, f"{module}{up}": B}
    # Same α for all modules: diffusers loses per-module values.
    key = file.alphas[module][0] if module in file.alphas else f"{module}.alpha"
    return {f"{module}{down}": A, f"{module}{up}": rank * B, key: torch.tensor(1.0)}


def _metadata(file: SingleFile, exported: Sequence[Factors]) -> dict[str, str]:
    stale_keys = ("sshs_model_hash", "sshs_legacy_hash", METADATA_KEY)
    metadata = {key: value for key, value in file.metadata.items() if key not in stale_keys}
    ranks = {pair.rank for pair in exported}
    rank = str(*ranks) if len(ranks) == 1 else "Dynamic"  # as in kohya's own tool
    values = {"ss_network_dim": rank, "ss_network_alpha": "1.0"}
    return metadata | {key: value for key, value in values.items() if key in metadata}
