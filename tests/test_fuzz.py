"""A thousand generated adapters and data files, sound or bent: the right result, or one clear error.

    pytest -m slow tests/test_fuzz.py            FUZZ_CASES=10000 for more

The reference for adapters is PEFT: outputs of the original adapter as PEFT loads and merges it. The reference for
data is what was written.
"""

from __future__ import annotations

import json
import math
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import peft
import pytest
import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from lrlora import LrLoraConfig
from lrlora.adapters import factorize, read_updates, save, save_as_lora

from .conftest import TinyModel
from .train.small import read

pytestmark = pytest.mark.slow
CASES = int(os.environ.get("FUZZ_CASES", "1000"))


def cases(share: float) -> Any:
    """Settings of a test with a share of all cases."""
    quiet = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
    return settings(max_examples=round(share * CASES), **quiet)  # type: ignore[arg-type]


TASKS = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
TARGETS = {
    "bert": ("query", "value", "dense"),
    "llama": ("q_proj", "v_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "t5": ("q", "v", "wo"),
}


def of_lycoris(config: Any, lora_alpha: int, init_lora_weights: bool, **fields: Any) -> Any:
    return config(alpha=lora_alpha, init_weights=init_lora_weights, **fields)


METHODS: dict[str, Callable[..., Any]] = {
    "lora": peft.LoraConfig,
    "dora": lambda **fields: peft.LoraConfig(use_dora=True, **fields),
    "rslora": lambda **fields: peft.LoraConfig(use_rslora=True, **fields),
    "loha": lambda **fields: of_lycoris(peft.LoHaConfig, **fields),
    "lokr": lambda **fields: of_lycoris(peft.LoKrConfig, **fields),
    "expansion": lambda init_lora_weights, **fields: LrLoraConfig(form="expansion", **fields),
    "phi": lambda init_lora_weights, **fields: LrLoraConfig(**fields),
}
BENDS = ("nothing",) * 5 + ("key", "nan", "shape", "dtype", "field", "rank", "bytes")


def refusal(call: Callable[..., Any], *arguments: Any) -> str | None:
    """Message of a clear error; None if there is none."""
    try:
        call(*arguments)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        return str(error) or type(error).__name__
    return None


def outputs(folder: Path, base: Path, tiny: TinyModel) -> Tensor:
    model = type(tiny.build()).from_pretrained(base)
    return tiny.logits(PeftModel.from_pretrained(model, folder).eval().float())


def bent(folder: Path, how: str, chance: random.Random) -> None:
    """Change one thing of a saved adapter."""
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, fields = load_file(file), json.loads(config.read_text())
    key = chance.choice(sorted(tensors))
    if how == "key":
        del tensors[key]
    elif how == "nan":
        tensors[key].flatten()[0] = chance.choice([math.nan, math.inf])
    elif how == "shape":
        value = tensors[key]
        turned = value.permute(*reversed(range(value.dim()))).contiguous()
        tensors[key] = turned if chance.random() < 0.5 else value[:-1].clone()
    elif how == "dtype":
        tensors = {k: v.to(chance.choice([torch.float16, torch.bfloat16, torch.float64])) for k, v in tensors.items()}
    elif how == "field":
        fields[chance.choice(sorted(fields))] = chance.choice([None, -1, "text", [], {}, 1e30])
    elif how == "rank":
        fields["r"] = chance.randint(0, 9)
    if how == "bytes":
        content = bytearray(file.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
        return
    save_file(tensors, file, {"format": "pt"})
    config.write_text(json.dumps(fields))


@pytest.mark.filterwarnings("ignore:The model is saved without a tokenizer")
@cases(0.5)
@given(
    family=st.sampled_from(sorted(TARGETS)),
    method=st.sampled_from(sorted(METHODS)),
    r=st.integers(1, 5),
    alpha=st.integers(1, 16),
    pattern=st.booleans(),
    head=st.booleans(),
    how=st.sampled_from(BENDS),
    seed=st.integers(0, 10**6),
)
def test_adapters_are_exported_and_merged_as_peft_reads_them(
    family: str, method: str, r: int, alpha: int, pattern: bool, head: bool, how: str, seed: int
) -> None:
    assume(family != "gpt2" or method not in ("loha", "lokr"))  # PEFT has no Conv1D for them
    tiny, chance = TinyModel(family), random.Random(seed)
    targets = chance.sample(TARGETS[family], chance.randint(1, 3))
    fields: dict[str, Any] = {"r": r, "target_modules": targets, "init_lora_weights": False, "lora_alpha": alpha}
    fields |= {"task_type": TASKS[family]}
    if pattern:
        fields |= {"rank_pattern": {targets[0]: 2 * r}, "alpha_pattern": {targets[-1]: 3}}
    if head and family == "bert":
        fields |= {"modules_to_save": ["classifier"]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = tiny.build()
        base.save_pretrained(folder / "base")
        torch.manual_seed(seed)
        model = get_peft_model(type(base).from_pretrained(folder / "base"), METHODS[method](**fields))
        if method in ("phi", "expansion"):
            tiny.train(model, 3)
        model.save_pretrained(folder / "adapter")
        bent(folder / "adapter", how, chance)
        try:
            expected = outputs(folder / "adapter", folder / "base", tiny)
        except Exception:
            expected = None  # PEFT does not take it
        out = folder / "exported"
        said = refusal(export_exactly, folder / "adapter", out)
        event(f"{how}: {'written' if said is None else 'refused'}")
        if said is not None:
            assert how != "nothing", said
            assert not out.exists()
        # PEFT starts a missing tensor at random; a flipped exponent is beyond what an SVD resolves beside the rest.
        elif expected is not None and how not in ("key", "bytes"):
            found = outputs(out, folder / "base", tiny)
            assert found.isfinite().all()
            assert (found - expected).norm() <= 2e-3 * expected.norm(), (method, how)


def compress_exactly(file: Path, out: Path) -> None:
    updates = read_updates(str(file))
    save(factorize(updates, energy=1.0), updates, out)


def export_exactly(adapter: Path, out: Path) -> None:
    updates = read_updates(adapter)
    save_as_lora(factorize(updates, energy=1.0), updates, out, dtype=torch.float32)


@cases(0.2)
@given(
    style=st.sampled_from([("lora_down", "lora_up"), ("lora_A", "lora_B"), ("lora.down", "lora.up")]),
    count=st.integers(1, 4),
    r=st.integers(1, 5),
    with_alpha=st.booleans(),
    how=st.sampled_from(("nothing", "nothing", "nan", "shape", "name", "bytes")),
    seed=st.integers(0, 10**6),
)
def test_single_files_keep_their_update(
    style: tuple[str, str], count: int, r: int, with_alpha: bool, how: str, seed: int
) -> None:
    chance, dot = random.Random(seed), torch.Generator().manual_seed(seed)
    tensors, expected = {}, {}
    for index in range(count):
        module, rank = f"lora_unet_blocks_{index}_proj", r + index % 2
        A, B = torch.randn(rank, 6, generator=dot), torch.randn(5, rank, generator=dot)
        tensors |= {f"{module}.{style[0]}.weight": A, f"{module}.{style[1]}.weight": B}
        scaling = 1.0
        if with_alpha and style[0] == "lora_down":
            tensors[f"{module}.alpha"], scaling = torch.tensor(3.0), 3.0 / rank
        expected[module] = scaling * B @ A
    key = chance.choice(sorted(k for k in tensors if not k.endswith("alpha")))
    if how == "nan":
        tensors[key][0, 0] = math.nan
    elif how == "shape":
        tensors[key] = tensors[key][:-1].clone()
    elif how == "name":
        tensors[key.replace("lora", "lore")] = tensors.pop(key)
    with tempfile.TemporaryDirectory() as name:
        file, out = Path(name) / "in.safetensors", Path(name) / "out.safetensors"
        save_file(tensors, file)
        if how == "bytes":
            content = bytearray(file.read_bytes())
            content[chance.randrange(8, len(content) // 2)] ^= 1 << chance.randrange(8)
            file.write_bytes(content)
        said = refusal(compress_exactly, file, out)
        if said is not None:
            assert how != "nothing", said
            assert not out.exists()
            return
        found = {update.module: update.matrix() for update in read_updates(str(out))}
        if how == "nothing":
            assert found.keys() == expected.keys()
            for module, matrix in expected.items():
                assert (found[module] - matrix).norm() <= 1e-5 * matrix.norm()


CELLS = st.one_of(
    st.text(min_size=1, max_size=20).filter(str.strip),
    st.sampled_from(["007", "1e3", "None", "NA", "true", '"', "a,b", "a\nb", "=1+1", " x ", "é", "\u2028", "0x1F"]),
)


@cases(0.3)
@given(
    rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=8),
    kind=st.sampled_from(["csv", "tsv", "jsonl", "json", "parquet"]),
    how=st.sampled_from(("nothing", "nothing", "byte", "cut", "line")),
    seed=st.integers(0, 10**6),
)
def test_data_is_read_as_it_was_written(rows: list[tuple[str, str]], kind: str, how: str, seed: int) -> None:
    frame, chance = pd.DataFrame(rows, columns=["text", "label"]), random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / f"data.{kind}"
        write: dict[str, Callable[[], Any]] = {
            "csv": lambda: frame.to_csv(file, index=False),
            "tsv": lambda: frame.to_csv(file, index=False, sep="\t"),
            "jsonl": lambda: frame.to_json(file, orient="records", lines=True),
            "json": lambda: frame.to_json(file, orient="records"),
            "parquet": lambda: frame.to_parquet(file),
        }
        write[kind]()
        content = bytearray(file.read_bytes())
        if how == "byte":
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        elif how == "cut":
            content = content[: chance.randrange(len(content))]
        elif how == "line":
            lines = content.splitlines(keepends=True)
            lines.insert(chance.randrange(len(lines) + 1), chance.choice([b"\n", b"{}\n", b"x,y,z\n", b"\0\n", b'"\n']))
            content = bytearray(b"".join(lines))
        file.write_bytes(content)
        said = refusal(read, str(file))
        assert how != "nothing" or said is None, said
        if how == "nothing":
            found = read(str(file))["train"]
            assert list(zip(found["text"], found["label"], strict=True)) == rows
