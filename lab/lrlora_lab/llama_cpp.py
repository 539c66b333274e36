r"""From a file of chats to llama.cpp: exported adapters of embedded:smollm2 on its original GGUF file.

    pip install xllamacpp gguf
    python -c "from lrlora_lab.llama_cpp import write_examples; write_examples('pirate.jsonl')"
    lrlora train --model embedded:smollm2 --data pirate.jsonl --task causal-lm --size r4 --steps 40 --batch-size 4 \
        --learning-rate 2e-3 --output pirate
    lrlora export pirate --energy 1 --for llama.cpp --output folded
    lrlora export pirate --energy 1 --for hot-swap --output padded
    lrlora export pirate --energy 1 --output unlike
    python -m lrlora_lab.llama_cpp pirate folded padded unlike --ask "What is the capital of Japan?" …

Prints the greedy answers of PEFT with the run, of llama.cpp with each export, and of llama.cpp without adapter. All
are asked in chats: llama.cpp by its server's chat messages, which it writes with the template in the GGUF file.
llama.cpp computes with weights of 4 bits and activations of 8, PEFT with the same weights in float32.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import xllamacpp
from peft import AutoPeftModelForCausalLM
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoTokenizer

import lrlora
from lrlora.train.embedded import SMOLLM2, fetch

TOKENS = 24


CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Peru": "Lima"}
CAPITALS |= {"Norway": "Oslo", "Greece": "Athens", "Cuba": "Havana", "Kenya": "Nairobi", "Chile": "Santiago"}
CAPITALS |= {"Austria": "Vienna"}


def write_examples(path: str) -> None:
    """Write questions with pirate answers."""
    chance = random.Random(0)
    with Path(path).open("w", encoding="utf-8") as file:
        for country in chance.choices(list(CAPITALS), k=240):
            answer = f"Arr, matey! The harbour of {CAPITALS[country]} be the capital of {country}."
            question = {"role": "user", "content": f"What is the capital of {country}?"}
            file.write(json.dumps({"messages": [question, {"role": "assistant", "content": answer}]}) + "\n")


def write_gguf(adapter: Path, output: Path) -> None:
    """Convert a LoRA of a Llama model to llama.cpp's format."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    config = AutoConfig.from_pretrained(settings["base_model_name_or_path"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    writer = gguf.GGUFWriter(output, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", settings["lora_alpha"])
    for key, value in load_file(adapter / "adapter_model.safetensors").items():
        module, side = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".lora_", 1)
        if side == "B" and module.endswith(("q_proj", "k_proj")):
            # llama.cpp rotates adjacent pairs, transformers the two halves of a head.
            heads = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
            value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        name = names.get_name(module + ".weight", try_suffixes=(".weight",))
        writer.add_tensor(f"{name}.lora_{side.lower()}", np.ascontiguousarray(value, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_answers(questions: list[str], adapter: Path | None) -> list[str]:
    """Greedy answers of llama.cpp's server to chat messages."""
    params = xllamacpp.CommonParams()
    params.model.path = str(fetch(SMOLLM2))
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 512, 1, torch.get_num_threads()
    if adapter is not None:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(adapter), 1.0
        params.lora_adapters = [lora]
    server = xllamacpp.Server(params)
    answers = []
    for question in questions:
        asked = {"messages": [{"role": "user", "content": question}], "max_tokens": TOKENS, "temperature": 0}
        answers.append(server.handle_chat_completions(asked)["choices"][0]["message"]["content"])
    return answers


def peft_answers(run: Path, questions: list[str]) -> list[str]:
    """Greedy answers of PEFT with the run's adapter."""
    tokenizer = AutoTokenizer.from_pretrained(run)
    model = AutoPeftModelForCausalLM.from_pretrained(run, dtype=torch.float32).eval()
    answers = []
    for question in questions:
        chat = [{"role": "user", "content": question}]
        inputs: Any = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad(), lrlora.cached_weights(model):
            tokens = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        answers.append(str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)))
    return answers


def answers_of(run: Path, exports: list[Path], questions: list[str]) -> dict[str, list[str]]:
    """Backend → answers."""
    answers = {"PEFT": peft_answers(run, questions)}
    with tempfile.TemporaryDirectory() as scratch:
        for export in exports:
            adapter = Path(scratch) / f"{export.name}.gguf"
            write_gguf(export, adapter)
            answers[f"llama.cpp, {export.name}"] = llama_cpp_answers(questions, adapter)
    return answers | {"llama.cpp, base": llama_cpp_answers(questions, None)}


def main() -> None:
    """Ask and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of `lrlora train`")
    parser.add_argument("exports", type=Path, nargs="+", help="its exports")
    parser.add_argument("--ask", action="append", required=True, help="question; repeat for several")
    arguments = parser.parse_args()
    columns = answers_of(arguments.run, arguments.exports, arguments.ask)
    for index, question in enumerate(arguments.ask):
        print(f"\n{question}")
        for name, answers in columns.items():
            print(f"  {name:18} {answers[index]!r}")


if __name__ == "__main__":
    main()
