"""Chats in all formats: read in one way by training, evaluation and prediction, whatever they come in."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from lrlora.train.chat import (
    SIMPLE_TEMPLATE,
    answer_of,
    as_trl_reads,
    choose_template,
    render_chat,
    rendering_of,
    shown_tokens,
)
from lrlora.train.inference import evaluate, predict, predict_texts
from lrlora.train.loaded import LoadedRun
from lrlora.train.run import train
from lrlora.train.settings import TrainConfig
from lrlora.train.tasks.causal_lm import CausalLm

from ..cli import run
from .small import CHAT as TEMPLATE
from .small import reviews, save_decoder, tokenizer


@pytest.fixture
def decoder(tmp_path: Path) -> str:
    """One that a test may take the template from."""
    return save_decoder(tmp_path / "own-decoder")


def rows(format_: str, count: int = 48) -> list[dict[str, Any]]:
    """Reviews as questions, verdicts as answers, in one of the formats."""
    return [
        in_format(format_, review, "good" if verdict == "fresh" else "bad")
        for review, verdict in reviews(count).itertuples(index=False)
    ]


def in_format(format_: str, question: str, answer: str) -> dict[str, Any]:
    """One row of a format."""
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    rows: dict[str, dict[str, Any]] = {
        "messages": {"messages": chat},
        "prompt": {"prompt": question, "completion": answer},
        "text": {"text": f"{question} {answer}"},
    }
    return rows[format_]


CHATS = ("messages", "prompt")
# With marks, TRL finds the answers within a chat.
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[USER] {{ m['content'] }} {% else %}[BOT] "
    "{% generation %}{{ m['content'] }} [EOS]{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[BOT] {% endif %}"
)


def write(path: Path, content: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


@pytest.fixture(scope="module")
def run_on(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run trained on a format until it knows the answers, which no test may change."""

    @functools.cache
    def run_on(format_: str) -> Path:
        folder = tmp_path_factory.mktemp(format_)
        return trained(save_decoder(folder / "decoder"), folder, format_)

    return run_on


def trained(decoder: str, folder: Path, format_: str, steps: int = 150, **settings: Any) -> Path:
    data = write(folder / f"{format_}.jsonl", rows(format_))
    arguments = {"max_steps": steps, "per_device_train_batch_size": 8, "learning_rate": 0.02}
    given = {"model": decoder, "data": data, "task": "causal-lm", "method": "lora", "output": str(folder / "run")}
    train(TrainConfig(**{**given, "training": arguments, **settings}), announce=lambda line: None)
    return folder / "run"


@pytest.mark.parametrize("format_", CHATS)
def test_trained_on_one_format_it_answers_in_all(format_: str, run_on: Callable[[str], Path], tmp_path: Path) -> None:
    folder = run_on(format_)
    questions = [row["prompt"] for row in rows("prompt", 12)]
    right = [row["completion"] for row in rows("prompt", 12)]
    answers: dict[str, list[str]] = {}
    for other in CHATS:
        data = write(tmp_path / f"other-{other}.jsonl", rows(other, 12))
        answers[other] = [line["completion"].strip() for line in predict(folder, data)]
        assert evaluate(folder, data)["exact_match"] == sum(map(str.__eq__, answers[other], right)) / len(right)
    assert len({tuple(said) for said in answers.values()}) == 1
    assert sum(map(str.__eq__, answers["prompt"], right)) >= 10
    assert next(predict_texts(folder, questions[:1]))["completion"].strip() == answers["prompt"][0]
    with pytest.raises(ValueError, match=r" text .*prompt=text"):
        evaluate(folder, write(tmp_path / "text.jsonl", rows("text")))


def test_the_loss_of_a_chat_is_taken_of_its_answers(decoder: str, tmp_path: Path) -> None:
    said = [("user", "is it good ?"), ("assistant", "good film"), ("user", "and the plot ?"), ("assistant", "bad")]
    turns = [{"role": role, "content": content} for role, content in said]
    data = write(tmp_path / "chats.jsonl", [{"messages": turns}] * 24)
    asked = ("train", "--model", decoder, "--data", data, "--task", "causal-lm", "--dry-run")
    refused = " ".join(run(*asked).output.split())
    assert re.search(r"answers within .*--chat-template.*assistant_only_loss=false", refused)
    (tmp_path / "marked.jinja").write_text(MARKED)
    shown = " ".join(run(*asked, "--chat-template", tmp_path / "marked.jinja").output.split())
    assert "⟦good film [EOS]⟧[USER] and the plot ? [BOT]⟦bad [EOS]⟧" in shown.replace(" ⟦", "⟦").replace("⟧ ", "⟧")
    assert re.search(r"Format: .*\bmarked\.jinja, [^.]*\banswers\.", shown)
    whole = " ".join(run(*asked, "--training", "assistant_only_loss=false").output.split())
    assert "⟦[USER] is it good ? [BOT] good film [EOS] [USER]" in whole
    assert not re.search(r"Format: [^.]*\banswers\b", whole)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 / 0 }}", r"chat template .*division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", r"chat template .*recursion"),
        (" ", r"own\.jinja is empty"),
    ],
)
def test_templates_that_fail(decoder: str, tmp_path: Path, template: str, message: str) -> None:
    (tmp_path / "own.jinja").write_text(template)
    data = write(tmp_path / "chats.jsonl", rows("messages"))
    asked = ("train", "--model", decoder, "--data", data, "--task", "causal-lm", "--dry-run", "--chat-template")
    said = " ".join(run(*asked, tmp_path / "own.jinja").output.split())
    assert re.search(message, said)
    assert "unexpected" not in said


def test_roles_and_chats_without_an_answer(decoder: str, tmp_path: Path) -> None:
    asked = {"role": "user", "content": "is it good ?"}
    answered = [asked, {"role": "assistant", "content": "good film"}]
    command = ("train", "--model", decoder, "--task", "causal-lm", "--dry-run", "--chat-template", "simple", "--data")
    data = write(tmp_path / "open.jsonl", [{"messages": answered}] * 20 + [{"messages": [*answered, asked]}] * 4)
    said = " ".join(run(*command, data, "--validation-share", "0.5").output.split())
    assert re.search(r"Warning: \d of 12 chats ", said)
    chats = [{"messages": answered}] * 20 + [{"messages": [asked, {"role": "bot", "content": "yes"}]}]
    said = " ".join(run(*command, write(tmp_path / "bot.jsonl", chats)).output.split())
    assert re.search(r"messages .*\bsystem, developer, user, assistant\b.*: 20\)\. Row 20 is 'bot'\.", said)


def test_messages_in_every_column(decoder: str, tmp_path: Path) -> None:
    asked, answered = {"role": "user", "content": "is it good ?"}, {"role": "assistant", "content": "good film"}
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in (asked, answered)]
    image = [{"role": "user", "content": [{"type": "image", "text": None}]}, parts[1]]
    cases = [
        (
            {"prompt": [{**asked, "role": "Human"}], "completion": [answered]},
            r"roles .*\bprompt .*\bsystem, .* 'Human'",
        ),
        ({"prompt": [asked], "completion": [asked]}, r"roles .*\bcompletion .*\bassistant, tool\b.* 'user'"),
        ({"messages": image}, r"content .*\btype text\b"),
        ({"messages": [{"from": "human", "value": "x"}]}, r"messages, with role and content, .*'from': 'human'"),
        ({"messages": json.dumps([asked, answered])}, r"messages .*lists"),
        ({"instruction": "do", "output": "o"}, r"TRL's formats: .*messages .*Alpaca"),
        ({"conversations": [{"from": "human", "value": "x"}]}, r"TRL's formats: .*messages .*ShareGPT"),
        ({"messages": [asked, {**answered, "content": " "}]}, r"Warning: 18 of 18 chats "),
    ]
    for index, (row, said) in enumerate(cases):
        data = write(tmp_path / f"{index}.jsonl", [row] * 20)
        output = run("train", "--model", decoder, "--task", "causal-lm", "--dry-run", "--data", data).output
        assert re.search(said, " ".join(output.split()))
    shown = []
    for name, chat in (("plain", [asked, answered]), ("parts", parts)):
        data = write(tmp_path / f"{name}.jsonl", [{"messages": chat}] * 20)
        output = run("train", "--model", decoder, "--task", "causal-lm", "--dry-run", "--data", data).output
        shown.append(next(line for line in output.splitlines() if line.startswith("Example")))
    assert shown[0] == shown[1]


@pytest.mark.parametrize(
    ("columns", "hint"),
    [
        (("chat", "id"), "--column messages=chat"),
        (("question", "answer"), "--column prompt=question --column completion=answer"),
        (("a", "b"), "--column prompt=NAME"),
    ],
)
def test_a_hint_names_the_column(decoder: str, tmp_path: Path, columns: tuple[str, ...], hint: str) -> None:
    data = write(tmp_path / "own.jsonl", [dict.fromkeys(columns, "some text")] * 20)
    said = run("train", "--model", decoder, "--task", "causal-lm", "--data", data, "--dry-run").output
    assert f"Map them: {hint}" in " ".join(said.split())


def test_generation_settings(run_on: Callable[[str], Path], tmp_path: Path) -> None:
    folder = run_on("prompt")
    question = reviews(1)["review"][0]
    one = run("predict", folder, "--text", question, "--generation", "max_new_tokens=1").output.strip()
    three = run(
        "predict", folder, "--text", question, "--generation", "max_new_tokens=3", "--generation", "min_new_tokens=3"
    )
    assert len(three.output.split()) > len(one.split()) == 1
    hot = {run("predict", folder, "--text", question, "--generation", "temperature=9.0").output for _ in range(5)}
    assert len(hot) > 1  # drawn, not chosen
    said = " ".join(run("predict", folder, "--text", question, "--generation", "max_token=3").output.split())
    assert re.search(r"'max_token'.*\bmax_\w+\?", said)
    for setting, message in (
        ("num_beams=0", "settings num_beams=0 "),
        ("max_time=abc", "settings max_time='abc' "),
        ("max_new_tokens=100000", "lower max_new_tokens"),
    ):
        said = " ".join(run("predict", folder, "--text", question, "--generation", setting).output.split())
        assert message in said
        assert "unexpected" not in said
    loaded = LoadedRun.read(folder)
    prompt = loaded.prompt(question, {})
    length = prompt["input_ids"].shape[1] + 2
    tokens = loaded.generating({"max_length": length, "min_length": length}).generate(prompt)
    assert tokens.shape[1] == length
    with pytest.raises(ValueError, match=rf"\b{length - 2} .*\bmax_length\b"):
        loaded.generating({"max_length": length - 2}).generate(prompt)


@pytest.mark.refused
def test_a_prompt_that_is_too_long_is_refused_before_any_answer(
    run_on: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, answered = run_on("prompt"), []
    long = {"prompt": "film " * 2_000, "completion": "good"}
    data = write(tmp_path / "long.jsonl", [*rows("prompt", 4), long])
    monkeypatch.setattr(LoadedRun, "generate", lambda *given, **options: answered.append(given))
    for way in (lambda: evaluate(folder, data), lambda: list(predict(folder, data))):
        with pytest.raises(ValueError, match="Shorten the prompt"):
            way()
    assert not answered


def test_a_base_model_that_has_moved_is_named(decoder: str, tmp_path: Path) -> None:
    folder = trained(decoder, tmp_path, "prompt", 2)
    Path(decoder).rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="own-decoder") as missing:
        evaluate(folder, write(tmp_path / "data.jsonl", rows("prompt", 4)))
    assert "damaged" not in str(missing.value)


CALL = {"type": "function", "function": {"name": "find", "arguments": {"film": "it"}}}
TURNS = {
    "a call": [
        {"role": "user", "content": "which?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "find", "content": "found"},
        {"role": "assistant", "content": "it is good"},
    ],
    "words of the question": [
        {"role": "user", "content": "is it A or a ?"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "A ?"},
        {"role": "assistant", "content": "a"},
    ],
    "from the assistant": [
        {"role": "assistant", "content": "clever"},
        {"role": "user", "content": "which?"},
        {"role": "assistant", "content": "film"},
    ],
}


@pytest.mark.parametrize("chat", TURNS)
def test_every_answer_is_in_the_loss_with_a_template_that_trl_knows(chat: str, decoder: str, tmp_path: Path) -> None:
    letters = Tokenizer(WordLevel({chr(code): code for code in range(0xD800)}, "?"))
    letters.pre_tokenizer = Split("", "isolated")
    words = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="^", pad_token="~")
    choose_template(words, "qwen3")
    turns = TURNS[chat]
    data = Dataset.from_list([{"messages": turns}])
    arguments = SFTConfig(output_dir=str(tmp_path), assistant_only_loss=True, max_length=None, bf16=False, use_cpu=True)
    model = AutoModelForCausalLM.from_pretrained(decoder)
    trainer = CausalLm().trainer(words, model=model, args=arguments, train_dataset=data, eval_dataset=data)
    (row,) = trainer.train_dataset
    pairs = zip(words.convert_ids_to_tokens(row["input_ids"]), row["labels"], strict=True)
    answers = "".join(token for token, label in pairs if label != -100).split("<|im_end|>")
    assert answers.pop().strip() == ""
    expected = ["find" if "tool_calls" in turn else turn["content"] for turn in turns if turn["role"] == "assistant"]
    for answer, said in zip(answers, expected, strict=True):
        assert str(said) in answer
        assert not any(str(turn["content"]) in answer for turn in turns if turn["role"] in ("user", "tool"))


def test_tools_are_those_of_their_own_row() -> None:
    words = tokenizer()
    words.chat_template = "{{ tools | tojson if tools is not none else 'none' }}"

    def tool(*names: str) -> str:
        properties = {name: {"type": "string"} for name in names}
        return json.dumps(
            [{"type": "function", "function": {"name": "find", "parameters": {"properties": properties}}}]
        )

    asked = [{"role": "user", "content": "find it"}, {"role": "assistant", "content": "good"}]
    rows = [{"messages": asked, "tools": tools} for tools in (tool("city"), tool("query"), "[]", "")]
    shown = [render_chat(words, row["messages"], row) for row in as_trl_reads(Dataset.from_list(rows), "chat")]
    assert [json.loads(text) for text in shown[:2]] == [json.loads(tool("city")), json.loads(tool("query"))]
    assert shown[2:] == ["none", "none"]


def test_a_call_is_no_answer() -> None:
    turns = TURNS["a call"]
    assert answer_of({"messages": turns[:2]}) is None
    assert answer_of({"prompt": turns[:1], "completion": turns[1:2]}) is None
    assert answer_of({"messages": turns}) == "it is good"


def test_a_run_from_before_goes_on_with_the_loss_of_the_whole_chat(decoder: str, tmp_path: Path) -> None:
    folder = trained(decoder, tmp_path, "messages", 2)
    record = json.loads((folder / "run.json").read_text())
    assert record["loss_on"] == "answers"
    data = write(tmp_path / "few.jsonl", rows("messages", 6))
    before = evaluate(folder, data)["loss"]
    del record["loss_on"]
    (folder / "run.json").write_text(json.dumps(record))
    assert evaluate(folder, data)["loss"] != pytest.approx(before, rel=0.01)


def test_a_model_without_a_template(decoder: str, tmp_path: Path) -> None:
    plain = tokenizer()
    plain.chat_template = None
    plain.save_pretrained(decoder)
    (Path(decoder) / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"chats \(messages\).*--chat-template"):
        trained(decoder, tmp_path, "messages")
    data = write(tmp_path / "data.jsonl", [{**row, "completion": f" {row['completion']}"} for row in rows("prompt")])
    folder = trained(decoder, tmp_path, "prompt", data=data)
    assert json.loads((folder / "run.json").read_text())["rendering"] == "plain"
    answers = [line["completion"].strip() for line in predict(folder, data)]
    assert sum(map(str.__eq__, answers, [row["completion"] for row in rows("prompt")])) > 40
    with pytest.raises(ValueError, match=r"\(messages\), .*\bplain\b"):
        next(predict(folder, write(tmp_path / "messages.jsonl", rows("messages"))))


def test_a_template_by_name(decoder: str, tmp_path: Path) -> None:
    own = TEMPLATE.replace("[USER]", "film")
    (tmp_path / "own.jinja").write_text(own)
    for name, template in (("simple", SIMPLE_TEMPLATE), (str(tmp_path / "own.jinja"), own)):
        words = tokenizer()
        choose_template(words, name)
        assert words.chat_template == template
    choose_template(words, "qwen3")
    assert "<|im_start|>" in str(words.chat_template)
    choose_template(words, "none")
    assert words.chat_template is None
    choose_template(words, None)
    with pytest.raises(ValueError, match=r"template 'qwen33'.* qwen3\?"):
        choose_template(words, "qwen33")
    with pytest.raises(FileNotFoundError, match=r"nothing\.jinja .*template"):
        choose_template(words, "nothing.jinja")
    folder = trained(decoder, tmp_path, "prompt", 2, chat_template=str(tmp_path / "own.jinja"))
    assert AutoTokenizer.from_pretrained(folder).chat_template == own


def test_another_template_than_that_of_the_training_is_refused(decoder: str, tmp_path: Path) -> None:
    folder = trained(decoder, tmp_path, "messages", 2)
    words = AutoTokenizer.from_pretrained(folder)
    words.chat_template = SIMPLE_TEMPLATE
    words.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"chat template .*run\.json"):
        next(predict(folder, str(tmp_path / "messages.jsonl")))


@pytest.mark.parametrize("format_", [*CHATS, "text"])
@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_tokens_and_loss_are_trl_s(format_: str, template: str | None, decoder: str, tmp_path: Path) -> None:
    if template is None and format_ == "messages":
        pytest.skip("refused")
    words = tokenizer()
    words.chat_template = template
    data = Dataset.from_list(rows(format_, 6))
    ours = as_trl_reads(data, rendering_of(data, words))
    # What a user would hand to TRL by hand.
    plain = data
    if format_ == "prompt" and template is not None:
        plain = Dataset.from_list(
            [
                {
                    "prompt": [{"role": "user", "content": row["prompt"]}],
                    "completion": [{"role": "assistant", "content": row["completion"]}],
                }
                for row in data
            ]
        )
    arguments = SFTConfig(output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True, max_length=40, bf16=False)
    encoded = [
        SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(decoder),
            args=arguments,
            train_dataset=part,
            processing_class=words,
        ).train_dataset
        for part in (ours, plain)
    ]
    for ours_row, their_row in zip(*encoded, strict=True):
        assert ours_row["input_ids"] == their_row["input_ids"]
        assert ours_row["labels"] == their_row["labels"]
        assert "⟦" in shown_tokens(ours_row, words, marked=True)


def test_a_prompt_of_messages_has_an_answer_in_either_form(decoder: str, tmp_path: Path) -> None:
    asked, answer = [{"role": "user", "content": "a film"}], [{"role": "assistant", "content": "good"}]
    for prompt, completion in ((asked, "good"), (asked, answer), ("a film", answer), ("a film", "good")):
        (read,) = as_trl_reads(Dataset.from_list([{"prompt": prompt, "completion": completion}]), "chat")
        assert read == {"prompt": asked, "completion": answer}
    mixed = [{"prompt": asked, "completion": "good"}, {"prompt": asked, "completion": "bad"}]
    data = write(tmp_path / "mixed.jsonl", 24 * mixed)
    assert "exact_match" in evaluate(trained(decoder, tmp_path, "prompt", 2, data=data), data)


def test_from_the_command_line(decoder: str, run_on: Callable[[str], Path], tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", rows("prompt"))
    shown = run(
        *("train", "--model", decoder, "--data", data, "--task", "causal-lm", "--output", tmp_path / "run"),
        *("--steps", "2", "--method", "lora", "--no-measure"),
    )
    assert shown.exit_code == 0, shown.output
    said = " ".join(shown.output.split())
    assert re.search(r"Format: prompt and completion, [^.]*chats, [^.]*own chat template, [^.]*answers\.", said)
    first = rows("prompt")[0]
    assert f"[USER] {first['prompt']}" in said
    assert "⟦" in said
    folder = run_on("prompt")
    asked = run("predict", folder, "--text", first["prompt"])
    assert asked.output.strip().splitlines()[-1] == first["completion"]
    assert run("predict", tmp_path / "run").exit_code == 1
    wrong = write(tmp_path / "wrong.jsonl", [{"prompt": "it", "answer": "good"}])
    refused = run("train", "--model", decoder, "--data", wrong, "--task", "causal-lm", "--output", tmp_path / "2")
    assert re.search(r"no completion, .*--column completion=NAME", " ".join(refused.output.split()))


def test_how_many_examples_are_cut_away_is_said(decoder: str, tmp_path: Path) -> None:
    content = [*rows("prompt", 20), {"prompt": " ".join(40 * ["film"]), "completion": "bad"}]
    lines: list[str] = []
    config = TrainConfig(
        model=decoder,
        data=write(tmp_path / "data.jsonl", content),
        validation=write(tmp_path / "more.jsonl", rows("prompt", 4)),
        task="causal-lm",
        output=str(tmp_path / "run"),
        max_length=16,
        training={"max_steps": 1},
    )
    train(config, announce=lines.append)
    assert any(re.search(r"\b1 training .*truncated to 16\b", line) for line in lines)
    assert any(re.match(r"Skipped 1 of 21 .*\b16 tokens", line) for line in lines)


def test_answers_that_are_empty_are_told(decoder: str, tmp_path: Path) -> None:
    folder = trained(decoder, tmp_path, "messages", 2)
    base = AutoModelForCausalLM.from_pretrained(decoder)
    torch.nn.init.zeros_(base.model.norm.weight)  # it says nothing but its first token, the padding
    base.save_pretrained(decoder)
    data = write(tmp_path / "few.jsonl", rows("messages", 6))
    result = run("predict", folder, "--data", data, "--output", tmp_path / "out.jsonl")
    assert result.exit_code == 0
    assert re.search(r"Warning: 6 of 6 .*empty", " ".join(result.output.split()))
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 6


def test_every_token_counts_alike_in_whatever_batch(decoder: str, tmp_path: Path) -> None:
    folder = trained(decoder, tmp_path, "text", 2)
    texts = ["a film", "good plot"] * 40 + ["the plot is it with the film"] * 9  # alone in their batch
    found = evaluate(folder, write(tmp_path / "texts.jsonl", [{"text": text} for text in texts]))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(decoder), folder).eval()
    words, losses, right = AutoTokenizer.from_pretrained(folder), [], []
    for text in texts:
        tokens = torch.tensor([words(text + " [EOS]")["input_ids"]])
        with torch.no_grad():
            logits = model(tokens).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none"))
        right.append(logits.argmax(-1) == tokens[0, 1:])
    assert found["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
    assert found["mean_token_accuracy"] == pytest.approx(torch.cat(right).double().mean().item(), rel=1e-4)


def test_exact_match_is_of_the_chats_that_end_with_an_answer(decoder: str, tmp_path: Path) -> None:
    folder, chats = trained(decoder, tmp_path, "messages", 2), rows("messages", 6)
    whole = list(predict(folder, write(tmp_path / "all.jsonl", chats)))
    for chat, said in zip(chats[:4], whole, strict=False):
        chat["messages"][-1]["content"] = said["completion"]
    for chat in chats[4:]:
        chat["messages"][-1]["content"] = "the plot is it"
    chats[0]["messages"] = chats[0]["messages"][:-1]  # the first ends with a question
    chats[1]["messages"] = chats[1]["messages"][:-1]
    assert evaluate(folder, write(tmp_path / "mixed.jsonl", chats))["exact_match"] == 0.5


PIRATE = "Arr, matey! The harbour of {} be the capital of {}."
CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Peru": "Lima"}


def pirate(format_: str) -> list[dict[str, Any]]:
    """Questions with the answers of a pirate, in one of the formats."""
    return [
        in_format(format_, f"What is the capital of {country}?", PIRATE.format(capital, country))
        for country, capital in CAPITALS.items()
    ]


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("format_", CHATS)
def test_a_real_chat_model_learns_from_each_format_and_answers_in_all(format_: str, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", 40 * pirate(format_))
    settings: dict[str, Any] = {"max_steps": 40, "per_device_train_batch_size": 4, "learning_rate": 2e-3}
    settings |= {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    train(
        TrainConfig(
            model="embedded:smollm2", data=data, task="causal-lm", output=str(tmp_path / "run"), training=settings
        )
    )
    for other in CHATS:
        asked = write(tmp_path / f"{other}.jsonl", pirate(other)[:3])
        assert evaluate(tmp_path / "run", asked)["exact_match"] == 1.0
    (said,) = predict_texts(tmp_path / "run", ["What is the capital of Peru?"])
    assert said["completion"] == PIRATE.format("Lima", "Peru")


@pytest.mark.real
@pytest.mark.slow
def test_the_export_answers_chat_messages_in_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of docs/export.md."""
    pytest.importorskip("xllamacpp")
    monkeypatch.chdir(tmp_path)
    from lrlora_lab.llama_cpp import answers_of, write_examples

    write_examples("pirate.jsonl")
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    (commands,) = re.findall(r"<!-- llama.cpp -->\n```sh\n(.*?)```", page, re.DOTALL)
    for command in commands.replace("\\\n", " ").splitlines():
        if command.startswith("lrlora"):
            result = run(*command.split()[1:])
            assert result.exit_code == 0, result.output
    questions = [f"What is the capital of {country}?" for country in ("Japan", "Kenya", "Norway")]
    answers = answers_of(Path("pirate"), [Path("folded"), Path("padded")], questions)
    assert answers["llama.cpp, folded"] == answers["llama.cpp, padded"] == answers["PEFT"]
    assert all(answer.startswith("Arr, matey!") for answer in answers["llama.cpp, folded"])
    assert not any("matey" in answer for answer in answers["llama.cpp, base"])


def test_tools_must_be_json() -> None:
    row = {"messages": [{"role": "user", "content": "a"}], "tools": "{"}
    with pytest.raises(ValueError, match=r"column tools .*JSON.* '\{'"):
        as_trl_reads(Dataset.from_list([row]), "chat")
