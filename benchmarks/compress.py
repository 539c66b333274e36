"""Cost and quality of compression: a large LoRA, comparison with kohya's tool and PEFT, and a fine-tuned model.

python benchmarks/compress.py                        # about 40 minutes; --only large|tools|checkpoints for a part
python benchmarks/compress.py --only tools --kohya FOLDER    # with a clone of kohya-ss/sd-scripts
python benchmarks/compress.py --report               # only render docs/compress.md from the stored results
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))

from sections import table, with_section  # noqa: E402

PAGE, RESULTS = DOCS / "compress.md", DOCS / "compress"
SCRATCH = Path("lrlora-compress")
STEPS, BATCH, CONTEXT = 150, 8, 64
TEST_WINDOWS = 256
ENERGIES = (0.5, 0.9, 0.99)
# Shapes (m, n) of a layer of Llama 2 7B, which has 32.
LARGE_LAYERS, LARGE_RANK = 32, 64
LARGE_SHAPES = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (4096, 4096)) | {
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}


def run(*arguments: str) -> dict[str, float]:
    """Seconds and peak memory (GiB) of an lrlora command in a separate process."""
    watch = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [str(Path(sys.executable).parent / "lrlora"), *arguments]
    start = time.perf_counter()
    peak = subprocess.run([sys.executable, "-c", watch, *command], check=True, capture_output=True, text=True).stdout
    return {"seconds": time.perf_counter() - start, "gibibytes": int(peak) / 2**20}


def large() -> dict[str, Any]:
    """Ranks and compression of a random bfloat16 LoRA of rank 64 on all linear layers of a 7B model."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    folder = SCRATCH / "large"
    if not folder.exists():
        folder.mkdir(parents=True)
        generator = torch.Generator().manual_seed(0)
        weights = {}
        for layer in range(LARGE_LAYERS):
            for name, (m, n) in LARGE_SHAPES.items():
                key = f"base_model.model.model.layers.{layer}.{name}.lora_"
                # Decaying singular values, like those of a trained LoRA.
                fall = torch.arange(1, LARGE_RANK + 1).pow(-0.7)[:, None]
                weights[f"{key}A.weight"] = (torch.randn(LARGE_RANK, n, generator=generator) * fall).bfloat16()
                weights[f"{key}B.weight"] = torch.randn(m, LARGE_RANK, generator=generator).bfloat16()
        save_file(weights, folder / "adapter_model.safetensors")
        targets = [name.partition(".")[2] for name in LARGE_SHAPES]
        LoraConfig(r=LARGE_RANK, lora_alpha=LARGE_RANK, target_modules=targets).save_pretrained(str(folder))
    found: dict[str, Any] = {"ranks": run("ranks", str(folder))}
    for name, how in (("energy", ["--energy", "0.9"]), ("budget", ["--size", "r16"])):
        output = SCRATCH / f"large-{name}"
        subprocess.run(["rm", "-rf", str(output)], check=True)
        found[name] = run("export", str(folder), *how, "--no-check", "--output", str(output))
    seconds = []
    for shape in ((4096, 4096), (11008, 4096)):
        B, A = torch.randn(shape[0], LARGE_RANK), torch.randn(LARGE_RANK, shape[1])
        start = time.perf_counter()
        torch.linalg.svd(B @ A, full_matrices=False)
        seconds.append(time.perf_counter() - start)
    found["full_svd_seconds"] = seconds
    found["full_svd_hours"] = LARGE_LAYERS * (4 * seconds[0] + 3 * seconds[1]) / 3600
    return found


def german() -> tuple[Any, Any]:
    """Token ids of German speeches, for training and test."""
    import torch
    from transformers import AutoTokenizer

    from lrlora.train.packages import SMOLLM2, checkpoint
    from lrlora_lab.byte_model import load_corpus

    tokenizer = AutoTokenizer.from_pretrained(checkpoint(SMOLLM2))
    corpus = load_corpus("german")
    return tuple(
        torch.tensor(tokenizer(part.numpy().tobytes().decode(errors="replace"), verbose=False)["input_ids"])
        for part in (corpus.train, corpus.test)
    )


def train(model: Any, rate: float, data: Any) -> None:
    """Train for `STEPS` steps of AdamW with linear decay."""
    import torch

    from lrlora_lab.byte_model import sample_batch

    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 10) * (1 - step / STEPS))
    for step in range(STEPS):
        windows = sample_batch(data, generator, BATCH, CONTEXT)
        loss = model(input_ids=windows, labels=windows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0:
            print(f"step {step}: {loss.item():.3f}", flush=True)


def test_loss(model: Any, data: Any) -> float:
    """Mean loss on test windows, in nats per token."""
    import torch

    held = len(data) // CONTEXT
    windows = data[: held * CONTEXT].view(held, CONTEXT)[torch.arange(TEST_WINDOWS) * held // TEST_WINDOWS]
    with torch.no_grad():
        return sum(model(input_ids=some, labels=some).loss.item() for some in windows.split(16)) / (TEST_WINDOWS // 16)


def base_folder() -> Path:
    """SmolLM2, saved in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lrlora.train.packages import SMOLLM2, checkpoint

    folder = SCRATCH / "base"
    if not folder.exists():
        AutoModelForCausalLM.from_pretrained(checkpoint(SMOLLM2)).float().save_pretrained(folder)
        AutoTokenizer.from_pretrained(checkpoint(SMOLLM2)).save_pretrained(folder)
    return folder


def checkpoints() -> dict[str, Any]:
    """Fine-tune all weights of SmolLM2 on German; quality of extracted LoRAs of several sizes."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lrlora import rank_report
    from lrlora.adapters import factorize, read_updates, save_as_lora
    from lrlora.adapters.factorize import parameters_of_rank

    base, tuned = base_folder(), SCRATCH / "tuned"
    train_data, test_data = german()
    if not tuned.exists():
        model = AutoModelForCausalLM.from_pretrained(base)
        train(model, 1e-4, train_data)
        model.save_pretrained(tuned)
    losses = {name: test_loss(AutoModelForCausalLM.from_pretrained(name), test_data) for name in (base, tuned)}
    records = [{"what": "base model", "loss": losses[base]}, {"what": "full fine-tuning", "loss": losses[tuned]}]
    updates = read_updates(tuned, base=base)
    report = rank_report(updates)
    kept: dict[str, dict[str, Any]] = {f"energy {energy}": {"energy": energy} for energy in ENERGIES}
    kept |= {f"as LoRA r = {r}": {"budget": parameters_of_rank(updates, r)} for r in (8, 32)}
    for name, truncation in kept.items():
        factors = factorize(updates, **truncation)
        output = SCRATCH / name.replace(" ", "-")
        if not output.exists():
            save_as_lora(factors, updates, output)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), output)
        ranks = [part.rank for part in factors]
        records.append(
            {
                "what": f"LoRA, {name}",
                "loss": test_loss(model, test_data),
                "parameters": sum(part.parameters for part in factors),
                "energy": sum(part.kept * part.energy for part in factors) / sum(part.energy for part in factors),
                "ranks": [min(ranks), sum(ranks) / len(ranks), max(ranks)],
            }
        )
    records.append({"what": "all linear layers, whole", "loss": loss_of_linear_layers(updates, test_data)})
    stable = [row.stable_rank for row in report.rows]
    ranks = [row.energy90_rank for row in report.rows]
    return {
        "records": records,
        "stable_ranks": [min(stable), sum(stable) / len(stable), max(stable)],
        "energy90_ranks": [min(ranks), sum(ranks) / len(ranks), max(ranks)],
    }


def loss_of_linear_layers(updates: Any, test_data: Any) -> float:
    """Loss of the base model with only the fine-tuned linear layers: a lower bound for their LoRAs."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(updates.origin.base.name)
    weights = {f"{update.module}.weight": updates.origin.tuned.read(f"{update.module}.weight") for update in updates}
    model.load_state_dict(weights, strict=False)
    return test_loss(model, test_data)


def lora_file() -> tuple[Path, Path]:
    """LoRA of rank 32 trained on German, as a PEFT folder and as a file with kohya's keys."""
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    folder, file = SCRATCH / "lora", SCRATCH / "lora.safetensors"
    if not file.exists():
        config = LoraConfig(r=32, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder()), config)
        train(model, 1e-3, german()[0])
        model.save_pretrained(str(folder))
        state = {
            key.removeprefix("base_model.model."): value for key, value in get_peft_model_state_dict(model).items()
        }
        tensors = convert_state_dict_to_kohya({f"unet.{key}": value for key, value in state.items()})
        save_file({key: value.half().contiguous() for key, value in tensors.items()}, file)
    return folder, file


def kohya_resize(clone: Path) -> Callable[..., Any]:
    """Import kohya's `resize_lora_model` without the trainer modules that it imports."""
    stubs = {name: types.ModuleType(name) for name in ("library", "library.train_util", "library.model_util")}
    stubs["library.utils"] = types.ModuleType("library.utils")
    stubs["library.utils"].setup_logging = lambda: None  # type: ignore[attr-defined]
    for name in ("train_util", "model_util", "utils"):
        setattr(stubs["library"], name, stubs[f"library.{name}"])
    sys.modules |= stubs
    sys.path.insert(0, str(clone))
    return importlib.import_module("networks.resize_lora").resize_lora_model


def tools(clone: Path | None) -> dict[str, Any]:
    """Compress one file with kohya's tool and lrlora, and one adapter with PEFT."""
    import torch
    from safetensors.torch import load_file, save_file

    from lrlora.adapters import factorize, read_updates, save_single_file

    folder, file = lora_file()
    updates = read_updates(file)
    whole = {update.module: update.matrix().double() for update in updates}

    def measured(path: Path, seconds: float) -> dict[str, Any]:
        errors = [(update.matrix().double() - whole[update.module]).norm().item() ** 2 for update in read_updates(path)]
        total = sum(matrix.norm().item() ** 2 for matrix in whole.values())
        return {"mebibytes": path.stat().st_size / 2**20, "lost": sum(errors) / total, "seconds": seconds}

    def ours(**truncation: Any) -> dict[str, Any]:
        path = SCRATCH / "ours.safetensors"
        path.unlink(missing_ok=True)
        start = time.perf_counter()
        save_single_file(factorize(updates, **truncation), updates, path)
        return measured(path, time.perf_counter() - start)

    records = [{"tool": "–", "options": "the file itself", **measured(file, 0.0)}]
    resize = None if clone is None else kohya_resize(clone)
    for theirs in (("sv_fro", 0.9), ("sv_ratio", 10.0), (None, 8)):
        if resize is not None:
            start = time.perf_counter()
            state = {key: value.float() for key, value in load_file(file).items()}
            method, parameter = theirs
            rank = 32 if method else int(parameter)
            resized, _, _ = resize(state, rank, rank, torch.float16, None, method, parameter, False)
            path = SCRATCH / "theirs.safetensors"
            save_file({key: value.half().contiguous() for key, value in resized.items()}, path)
            record = measured(path, time.perf_counter() - start)
            options = f"--dynamic_method {method} --dynamic_param {parameter:g}" if method else f"--new_rank {rank}"
            records.append({"tool": "kohya", "options": f"`{options}`", **record})
            factors = sum(t.numel() for key, t in resized.items() if not key.endswith(".alpha"))
            options = f"`--size {factors}`, as large"
            records.append({"tool": "lrlora", "options": options, **ours(budget=factors)})
    for energy in (0.81, 0.9):
        records.append({"tool": "lrlora", "options": f"`--energy {energy}`", **ours(energy=energy)})
    records.append({"tool": "lrlora", "options": "`--max-rank 8`", **ours(max_rank=8)})
    return {"records": records, "peft": list(beside_peft(folder))}


def beside_peft(folder: Path) -> Iterator[dict[str, Any]]:
    """One adapter at equal rank with PEFT's `convert_to_lora` and with lrlora: seconds and loss of energy."""
    from peft import PeftModel, convert_to_lora
    from transformers import AutoModelForCausalLM

    from lrlora.adapters import factorize, read_updates

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder()), folder)
    updates = read_updates(folder)
    whole = {update.module: update.matrix().double() for update in updates}
    total = sum(matrix.norm().item() ** 2 for matrix in whole.values())
    for rank in (4, 16):
        start = time.perf_counter()
        _, state = convert_to_lora(model, rank)
        theirs = time.perf_counter() - start
        start = time.perf_counter()
        factors = factorize(updates, max_rank=rank)
        ours = time.perf_counter() - start
        lost = {"peft": 0.0, "lrlora": 0.0}
        for part in factors:
            A, B = (state[f"base_model.model.{part.module}.lora_{side}.weight"].double() for side in "AB")
            lost["peft"] += (B @ A - whole[part.module]).norm().item() ** 2 / total
            lost["lrlora"] += (part.B.double() @ part.A.double() - whole[part.module]).norm().item() ** 2 / total
        yield {"rank": rank, "seconds": {"peft": theirs, "lrlora": ours}, "lost": lost}


def updated(page: str) -> str:
    """Page with tables of the stored results."""
    for path in sorted(RESULTS.glob("*.json")):
        page = with_section(page, path.stem, RENDERERS[path.stem](json.loads(path.read_text())))
    return page


def render_large(found: dict[str, Any]) -> str:
    """Table of a large LoRA."""
    labels = {
        "ranks": "`lrlora ranks`",
        "energy": "`lrlora export --energy 0.9`",
        "budget": "`lrlora export --size r16`",
    }
    rows = [[label, f"{found[n]['seconds']:.0f} s", f"{found[n]['gibibytes']:.1f} GiB"] for n, label in labels.items()]
    rows.append(["SVD of every m × n matrix, from one of each shape", f"{found['full_svd_hours']:.1f} hours", ""])
    return table(["", "time", "peak memory"], rows)


def render_tools(found: dict[str, Any]) -> str:
    """Tables of kohya's tool and PEFT."""
    header = ["tool", "options", "MiB", "‖ΔW‖² lost", "time, s"]
    rows = []
    for r in found["records"]:
        seconds = f"{r['seconds']:.1f}" if r["seconds"] else ""
        rows.append([r["tool"], r["options"], f"{r['mebibytes']:.2f}", f"{r['lost']:.2%}", seconds])
    peft = [
        [
            str(r["rank"]),
            *(f"{r['lost'][tool]:.6%}" for tool in ("peft", "lrlora")),
            *(f"{r['seconds'][tool]:.1f}" for tool in ("peft", "lrlora")),
        ]
        for r in found["peft"]
    ]
    beside = table(["rank", "‖ΔW‖² lost, PEFT", "‖ΔW‖² lost, lrlora", "time, s, PEFT", "time, s, lrlora"], peft)
    return f"{table(header, rows)}\n{beside}"


def render_checkpoints(found: dict[str, Any]) -> str:
    """Table of a fine-tuned model."""
    rows = [
        [
            r["what"],
            f"{r['loss']:.3f}",
            f"{r['parameters']:,}" if "parameters" in r else "",
            f"{r['energy']:.1%}" if "energy" in r else "",
            "{} / {:.0f} / {}".format(*r["ranks"]) if "ranks" in r else "",
        ]
        for r in found["records"]
    ]
    return table(["", "loss, nats a token", "parameters", "‖ΔW‖² kept", "ranks: min / mean / max"], rows)


RENDERERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "large": render_large,
    "tools": render_tools,
    "checkpoints": render_checkpoints,
}


def main() -> None:
    """Measure and render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=RENDERERS, help="one part")
    parser.add_argument("--kohya", type=Path, help="clone of kohya-ss/sd-scripts")
    parser.add_argument("--report", action="store_true", help="render what is stored")
    arguments = parser.parse_args()
    if not arguments.report:
        SCRATCH.mkdir(exist_ok=True)
        RESULTS.mkdir(exist_ok=True)
        parts = {"large": large, "tools": lambda: tools(arguments.kohya), "checkpoints": checkpoints}
        for name, measure in parts.items():
            if arguments.only in (None, name):
                (RESULTS / f"{name}.json").write_text(json.dumps(measure(), indent=1) + "\n")
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
