"""Golden outputs: what a user gets from one commit, compared with what another gives.

PYTHONPATH=BEFORE/src python -m tests.golden make before
PYTHONPATH=AFTER/src python -m tests.golden make after --reading before
python -m tests.golden compare before after

`made` holds adapters, runs, an interrupted run, comparisons, exports, merged models, pages and messages. `read` is a
copy of `made`, by default the commit's own, with which the commit goes on: it resumes, evaluates, exports and reports.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from . import processes

STOPPED = (
    """
import transformers
step, trained = transformers.Trainer.training_step, []
def stopping(*args, **kwargs):
    trained.append(None)
    if len(trained) == 6:
        raise KeyboardInterrupt
    return step(*args, **kwargs)
transformers.Trainer.training_step = stopping
"""
    + processes.LRLORA
)
ADAPTERS = """
import torch
import transformers
from peft import LoraConfig, get_peft_model
from lrlora import LrLoraConfig, rank_report
from tests.conftest import TinyModel
import sys
configs = {
    "phi": LrLoraConfig(r=2, target_modules="all-linear"),
    "paper": LrLoraConfig.paper(r=2, lora_alpha=4, target_modules="all-linear"),
    "sine": LrLoraConfig(r=2, form="sine", target_modules="all-linear"),
    "global": LrLoraConfig(r=3, sharing="global", use_rslora=True, target_modules="all-linear"),
    "expansion": LrLoraConfig(r=2, form="expansion", num_terms=4, target_modules="all-linear"),
    "pattern": LrLoraConfig(r=2, rank_pattern={"layer.0.attention.self.query": 3}, target_modules="all-linear"),
}
for family in ("bert", "gpt2", "t5", "mlp", "mixtral", "vit"):
    for name, config in configs.items():
        if family != "bert" and name not in ("phi", "expansion"):
            continue
        tiny, folder = TinyModel(family), f"adapters/{family}-{name}"
        base = tiny.build()
        if hasattr(base, "save_pretrained"):
            base.save_pretrained(f"bases/{family}")
            base = type(base).from_pretrained(f"bases/{family}")
        vars(config).update(tiny.targets)
        torch.manual_seed(0)
        model = get_peft_model(base, config)
        tiny.train(model, 4)
        model.save_pretrained(folder)
        from safetensors.torch import save_file
        kept = {"logits": tiny.logits(model).contiguous()}
        tiny.loss(model).backward()
        kept |= {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
        save_file(kept, f"{folder}/outputs.safetensors")
        rank_report(model).to_json(f"{folder}/ranks.json")
    print(family)
"""
TRAIN = "train run.yaml --output"
MAKE = [
    f"{TRAIN} phi",
    f"{TRAIN} plan --dry-run",
    f"{TRAIN} lora --method lora --size r1 --rank 4",
    f"{TRAIN} small --keep 0.95",
    "train full.yaml --output full",
    f"{TRAIN} expansion --adapter form=expansion --adapter num_terms=4",
    f"{TRAIN} ratings --task regress --data ratings.csv",
    f"{TRAIN} further --start-from phi",
    "train chat.yaml --output chat",
    "train chat.yaml --dry-run",
    "train images.yaml --output images",
    "compare suite.yaml --methods lora,lr-lora,full --rates 1e-2,1e-3 --seeds 2 --output compared",
    "compare suite.yaml --methods lora --dry-run",
    "compare capacity --methods lora,lr-lora --tasks labels-512 --rates 1e-2 --seeds 1 --steps 20 --output capacity",
    "init settings.yaml",
    "export phi --output phi-99",
    "export phi --energy 0.9 --output phi-90 --for llama.cpp",
    "export phi --size r1 --output phi-r1",
    "export phi --size r1 --by energy --output phi-energy --dtype bfloat16",
    "export phi --keep 0.8 --heal 2 --output phi-loss",
    "export lora --max-rank 1 --config-only --output lora-config",
    "export full --base base --max-rank 2 --output full-lora",
    "export kohya.safetensors --max-rank 1 --output kohya-small.safetensors",
    "merge phi --output merged",
    "export adapters/bert-phi --energy 0.95 --output exported/bert-phi",
    "export adapters/gpt2-phi --energy 0.95 --output exported/gpt2-phi",
    "export adapters/t5-expansion --energy 0.95 --output exported/t5-expansion",
    "export adapters/mixtral-phi --energy 0.95 --output exported/mixtral-phi",
    "merge adapters/gpt2-phi --output merged-gpt2",
]  # fmt: skip
READ = [
    "train --resume stopped",
    "ranks phi --json ranks.json --all",
    "ranks adapters/gpt2-phi",
    "ranks adapters/t5-expansion --all",
    "ranks full --base base",
    "ranks kohya.safetensors --all",
    "ranks chat",
    "report phi lora stopped --output page.html",
    "report adapters/bert-phi kohya.safetensors --output adapters.html",
    "evaluate phi --data reviews.csv --split train --json evaluated.json",
    "evaluate chat --data chats.jsonl --split train",
    "evaluate images --data pictures --split train",
    "predict phi --data reviews.csv --split train --output predicted.jsonl",
    "predict ratings --text 'splendid film with good actors'",
    "predict chat --text 'is the film good ?'",
    "export small --size r1 --output small-r1",
    "export adapters/bert-sine --energy 0.95 --output bert-sine-lora",
    "export adapters/bert-global --max-rank 2 --output bert-global-lora",
    "merge small --output merged-small",
    "compare suite.yaml --report --output compared",
    "compare suite.yaml --methods lora,lr-lora,full --rates 1e-2,1e-3 --seeds 2 --output compared",
    # What goes wrong.
    "train run.yaml --rank 0",
    "train run.yaml --rnak 3",
    "train run.yaml --task clasify",
    "train run.yaml --method loar",
    "train run.yaml --output phi",
    "train run.yaml --data nothing.csv",
    "train run.yaml --model nowhere",
    "train run.yaml --columns text=none",
    "train run.yaml --adapter use_dora=true",
    "train run.yaml --training learning_rat=1",
    "train --resume phi",
    "train --resume nowhere",
    "train missing.yaml",
    "train broken.yaml",
    "train run.yaml --data holes.csv",
    "ranks nowhere",
    "ranks broken.yaml",
    "ranks full",
    "export phi --output phi-99",
    "export phi --energy 2 --output x",
    "export phi --keep 0.9 --size r1 --output x",
    "export phi --size 1KB --output x",
    "export phi --size 3 --output x",
    "export kohya.safetensors --keep 0.9 --output x",
    "export kohya.safetensors --max-rank 1 --output reviews.csv",
    "merge kohya.safetensors --output x",
    "merge phi --output merged",
    "evaluate phi --data nothing.csv",
    "evaluate lora-config --data reviews.csv",
    "predict phi",
    "chat phi",
    "report phi --output page.html",
    "report nowhere --output other.html",
    "compare suite.yaml --methods loar",
    "compare nothing.yaml",
    "compare suite.yaml --tasks none",
    "compare",
    "trian",
    *(f"{command} --help" for command in ("train", "export", "ranks", "compare", "merge")),
]  # fmt: skip
RUN = """
model: base
data: reviews.csv
task: classify
columns: {text: review, label: verdict}
rank: 2
steps: 12
batch_size: 4
learning_rate: 0.02
rank_every: 4
training: {save_steps: 4, eval_steps: 4, eval_strategy: steps, use_cpu: true}
"""
FULL = RUN.replace("rank: 2\n", "method: full\n")
CHAT = """
model: decoder
data: chats.jsonl
task: causal-lm
rank: 2
steps: 8
batch_size: 2
learning_rate: 0.02
training: {use_cpu: true}
"""
IMAGES = (
    "model: vit\ndata: pictures\ntask: image-classify\nrank: 2\nsteps: 8\nbatch_size: 4\ntraining: {use_cpu: true}\n"
)
SUITE = """
model: base
rank: 2
tasks:
  reviews: {data: reviews.csv, task: classify, metric: accuracy, steps: 6, batch_size: 4, test: train,
            columns: {text: review, label: verdict}}
training: {use_cpu: true}
"""


def inputs() -> None:
    """Models and data as a user would have them, in the current folder."""
    from safetensors.torch import save_file

    from .train.small import GOOD, reviews, save_decoder, save_encoder, save_image_model, save_pictures

    save_encoder(Path("base"))
    save_decoder(Path("decoder"))
    save_image_model(Path("vit"))
    save_pictures(Path("pictures"))
    rows = reviews()
    rows.to_csv("reviews.csv", index=False)
    holes = rows.copy()
    holes.loc[3, "review"] = ""
    holes.to_csv("holes.csv", index=False)
    rows["verdict"] = [len(text) / 10 for text in rows["review"]]
    rows.to_csv("ratings.csv", index=False)
    with Path("chats.jsonl").open("w") as file:
        for index in range(40):
            asked = {"role": "user", "content": "is the film good ?"}
            answer = {"role": "assistant", "content": f"it is {GOOD[index % 3]}"}
            file.write(json.dumps({"messages": [asked, answer]}) + "\n")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for index in range(3):
        name = f"lora_unet_blocks_{index}_to_q"
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, 24, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(16, 4, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, "kohya.safetensors", metadata={"ss_network_dim": "4"})
    for name, text in {
        "run": RUN,
        "full": FULL,
        "chat": CHAT,
        "images": IMAGES,
        "suite": SUITE,
        "broken": "a: [1",
    }.items():
        Path(f"{name}.yaml").write_text(text.lstrip())


def call(folder: Path, code: str, command: str, said: dict[str, Any]) -> None:
    """Run a command in a folder, and keep what it said."""
    environment = {**os.environ, "COLUMNS": "160", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = processes.Process(code, *shlex.split(command), cwd=folder, env=environment)
    text = process.communicate()
    said[command or code[:40]] = {"exit": process.returncode, "said": text.splitlines()}
    (folder / "said.json").write_text(json.dumps(said, indent=1, ensure_ascii=False))
    print(process.returncode, command, flush=True)


def make(folder: Path, reading: Path | None) -> None:
    """Make everything with the lrlora that is imported."""
    made, read = folder / "made", folder / "read"
    made.mkdir(parents=True)
    here = Path.cwd()
    os.chdir(made)
    inputs()
    os.chdir(here)
    said: dict[str, Any] = {}
    call(made, ADAPTERS, "", said)
    for command in MAKE:
        call(made, processes.LAB if command.startswith("compare") else processes.LRLORA, command, said)
    call(made, STOPPED, f"{TRAIN} stopped", said)
    shutil.copytree((reading or folder) / "made", read)
    said = {}
    for command in READ:
        call(read, processes.LAB if command.startswith("compare") else processes.LRLORA, command, said)


PASSING = re.compile(r"second|time|date|memory|flos|hours|version|wall|peak")
MEASURED = re.compile(
    r"\d[\d.,:]*\s?(ms|s|min|h|seconds?|minutes?|hours?|it/s|s/it|steps/s|MiB/s)\b|\d\d:\d\d(:\d\d)?|\d+%\||[━╸╺█▏▎▍▌▋▊▉]+"
    r"|20\d\d-\d\d-\d\d|\.py:\d+|\[W?\d{4} .*?\]"
)
PROGRESS = re.compile(r"\d%\|")


def comparable(value: Any) -> Any:
    """JSON without what differs between two runs of one commit."""
    if isinstance(value, dict):
        return {key: comparable(each) for key, each in value.items() if not PASSING.search(key)}
    if isinstance(value, list):
        return [comparable(each) for each in value]
    return value.rstrip() if isinstance(value, str) else value


def lines_of(path: Path) -> list[str]:
    """A file as lines of text, without what differs between two runs of one commit."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            found = [f"metadata {file.metadata()}"]
            for key in sorted(file.keys()):
                tensor = file.get_tensor(key)
                values = tensor.double()
                found.append(f"{key} {tensor.shape} {tensor.dtype} {values.flatten()[:8].tolist()} {values.sum()}")
            return found
    if path.suffix in (".pt", ".pth", ".bin", ".png", ".svg", ".lock") or path.name.startswith("events.out"):
        return []
    text = re.sub(r"/\S*/(?=(made|read|src)/)", "", path.read_text(errors="replace"))
    if path.suffix in (".csv", ".md"):
        return [re.sub(r"\d+\.\d+", "…", line) for line in text.splitlines()]
    if path.suffix == ".json":
        text = json.dumps(comparable(json.loads(text)), indent=1, ensure_ascii=False)
    elif path.suffix == ".jsonl":
        text = "\n".join(json.dumps(comparable(json.loads(line)), ensure_ascii=False) for line in text.splitlines())
    elif path.suffix == ".html":
        text = text.replace(",", ",\n").replace(">", ">\n")
    return [MEASURED.sub("…", line).rstrip() for line in text.splitlines() if not PROGRESS.search(line)]


def differences(before: Path, after: Path) -> Iterator[str]:
    """A paragraph for each file that differs, or is only on one side."""
    sides = [{str(path.relative_to(side)) for path in side.rglob("*") if path.is_file()} for side in (before, after)]
    for name in sorted(sides[0] ^ sides[1]):
        yield f"only {'before' if name in sides[0] else 'after'}: {name}"
    for name in sorted(sides[0] & sides[1]):
        old, new = lines_of(before / name), lines_of(after / name)
        if old != new:
            changes = [
                line for line in difflib.unified_diff(old, new, lineterm="", n=0) if line[:2] not in ("--", "++", "@@")
            ]
            yield "\n  ".join([f"{name}: {len(changes)} lines", *(line[:300] for line in changes[:8])])


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="make everything with the lrlora that is imported")
    making.add_argument("folder", type=Path)
    making.add_argument("--reading", type=Path, help="go on with what another commit has made")
    comparing = commands.add_parser("compare", help="say what differs; exit 1 if anything does")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    options = parser.parse_args()
    os.environ["PYTHONHASHSEED"] = "0"  # sets of modules are written in the order in which they are held
    if options.command == "make":
        make(options.folder.absolute(), options.reading and options.reading.absolute())
        return
    found = list(differences(options.before, options.after))
    print(*found, f"{len(found)} files differ", sep="\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
