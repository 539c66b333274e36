"""What a run is made from, written down with it and in its checkpoints, so that it goes on with nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, Image
from transformers import (
    BaseImageProcessor,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from .. import fingerprint
from ..files import write_json
from ..run_folder import RECORD_FILE, RunRecord, read_record, resumed_from

_ADAPTER_CONFIG = "adapter_config.json"
# Fields of a record, beside its settings and fingerprints, that follow from what a run is made from.
_NAMES = {
    "labels": "the classes of the data",
    "max_length": "the length at which examples are cut",
    "rendering": "how prompts and chats are read",
    "loss_on": "the part of a chat that the loss is taken of",
    "chat_template": "the chat template",
}


def fingerprints(splits: Mapping[str, Dataset], processor: Any, source: str, start: str | None) -> dict[str, str]:
    """Hashes of what a run is made from, by what to call it: of content alone, and the same on every machine."""
    started = None if start is None else [fingerprint.of_model(start), fingerprint.of_adapter(Path(start))]
    return {
        "the training data": _of_data(splits["train"]),
        "the validation data": _of_data(splits["validation"]),
        **_of_processor(processor),
        **fingerprint.of_model(source),
        **({} if started is None else {"the run that it starts from": fingerprint.digest(started)}),
    }


def _of_data(data: Dataset) -> str:
    found = hashlib.sha256()
    images = [name for name, feature in data.features.items() if isinstance(feature, Image)]
    for batch in data.iter(batch_size=1000):
        for name in images:
            batch[name] = [None if cell is None else _of_image(cell) for cell in batch[name]]
        found.update(fingerprint.digest(batch).encode())
    return found.hexdigest()


def _of_image(cell: dict[str, Any]) -> str:
    """Of an image that is not decoded: its file may have moved."""
    content = Path(cell["path"]).read_bytes() if cell["bytes"] is None else cell["bytes"]
    return hashlib.sha256(content).hexdigest()


def _of_processor(processor: Any) -> dict[str, str]:
    if isinstance(processor, BaseImageProcessor):
        return {"the image processor": fingerprint.digest(processor.to_dict())}
    return {"the tokenizer": _of_tokenizer(processor)}


def _of_tokenizer(tokenizer: Any) -> str:
    """Of what makes tokens of a text; the chat template is a field of the record of its own."""
    tokens = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
    sides = (tokenizer.padding_side, tokenizer.truncation_side)
    return fingerprint.digest([tokens, tokenizer.special_tokens_map, sides, tokenizer.model_max_length])


class KeepRecord(TrainerCallback):
    """Puts the record of the run into every checkpoint, with the hash of the adapter's configuration there.

    And the steps at which things are done follow from the settings, whatever a checkpoint says that is gone on from.
    """

    def __init__(self, record: RunRecord) -> None:
        self._record = record

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            write_json(checkpoint / RECORD_FILE, asdict(_with_adapter(self._record, checkpoint)))


def require_same_run(output: Path, last: Path | None, now: RunRecord) -> str | None:
    """Compare a run that is to be resumed with what it was; what was not recorded is not compared.

    Args:
        output: its folder.
        last: the checkpoint that it goes on from.
        now: its record, made anew.

    Returns:
        A warning, if versions are others.

    Raises:
        ValueError: it would go on with something else; the message names each thing.

    """
    began = read_record(output)
    changed = _differences(began, now)
    for checkpoint in [] if last is None else resumed_from(last):
        if not (checkpoint / RECORD_FILE).exists():
            continue
        then = read_record(checkpoint, RECORD_FILE)
        if None not in (then.run_id, began.run_id) and then.run_id != began.run_id:
            raise ValueError(
                f"{checkpoint} is a checkpoint of another run than the one in {output}. Remove it, to go on from the "
                "one before it."
            )
        changed += _differences(then, _with_adapter(now, checkpoint))
    if changed:
        raise ValueError(
            f"The run in {output} cannot be resumed: it would go on with something else than it began with. What "
            f"differs: {'; '.join(dict.fromkeys(changed))}. Put it back, or start a new run with another --output."
        )
    newer = fingerprint.differing(began.versions, now.versions)
    if not newer:
        return None
    told = ", ".join(f"{name} {began.versions[name]}, now {now.versions[name]}" for name in newer)
    return f"Warning: the run began with other versions ({told}), and may end a little differently for it."


def _with_adapter(record: RunRecord, checkpoint: Path) -> RunRecord:
    """The record with the hash of the adapter's configuration in a checkpoint, of which training takes the weights."""
    path = checkpoint / _ADAPTER_CONFIG
    if not path.exists():
        return record
    content = {"the configuration of the adapter in the checkpoint": hashlib.sha256(path.read_bytes()).hexdigest()}
    return replace(record, fingerprints={**(record.fingerprints or {}), **content})


def _differences(then: RunRecord, now: RunRecord) -> list[str]:
    settings, mine = (json.loads(json.dumps(record.config | {"output": None})) for record in (then, now))
    found = [
        f"the setting {name}, {settings[name]!r} before and {mine[name]!r} now"
        for name in fingerprint.differing(settings, mine)
    ]
    for name, words in _NAMES.items():
        before, after = getattr(then, name), getattr(now, name)
        if before is not None and before != after:
            found.append(words)
    return [*found, *fingerprint.differing(then.fingerprints or {}, now.fingerprints or {})]
