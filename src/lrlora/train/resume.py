"""Resuming a run: fingerprints of its inputs, saved with it and its checkpoints, and checks that they are the same."""

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
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from .. import fingerprint
from ..files import write_json
from ..run_folder import RECORD_FILE, RunRecord, last_whole_checkpoint, read_record, require_readable, resumed_from
from .progress import Announce
from .sharding import require_same_sharding

_ADAPTER_CONFIG = "adapter_config.json"
# Record fields, besides settings and fingerprints, that depend on the inputs.
_NAMES = {
    "labels": "the classes of the data",
    "max_length": "the maximum length of examples",
    "rendering": "the rendering of prompts and chats",
    "loss_on": "the part of a chat used for the loss",
    "chat_template": "the chat template",
}


def fingerprints(splits: Mapping[str, Dataset], processor: Any, source: str, start: str | None) -> dict[str, str]:
    """Hashes of a run's inputs, by display name: of content only, and machine-independent."""
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
    """Hash an undecoded image, whose file may have moved."""
    content = Path(cell["path"]).read_bytes() if cell["bytes"] is None else cell["bytes"]
    return hashlib.sha256(content).hexdigest()


def _of_processor(processor: Any) -> dict[str, str]:
    if isinstance(processor, BaseImageProcessor):
        return {"the image processor": fingerprint.digest(processor.to_dict())}
    return {"the tokenizer": _of_tokenizer(processor)}


def _of_tokenizer(tokenizer: Any) -> str:
    """Hash everything that affects tokenization; the chat template is a separate record field."""
    tokens = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
    sides = (tokenizer.padding_side, tokenizer.truncation_side)
    return fingerprint.digest([tokens, tokenizer.special_tokens_map, sides, tokenizer.model_max_length])


class KeepRecord(TrainerCallback):
    """Saves the run's record in every checkpoint, with the hash of its adapter configuration.

    Also recomputes the step intervals from the settings, overriding a resumed checkpoint's.
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


def last_checkpoint(output: Path, trainer: Trainer, record: RunRecord, announce: Announce) -> Path | None:
    """Checkpoint to resume from; None: from the start.

    Raises:
        ValueError: it is damaged, or the run's inputs or sharding have changed.

    """
    last = last_whole_checkpoint(output)
    if last is not None:
        require_same_sharding(last, trainer)
        require_readable(last)
        if trainer.args.save_only_model:
            announce(
                "Warning: checkpoints have no state of the optimizer (save_only_model), so the results will differ "
                "from those of an uninterrupted run."
            )
    if warning := _check_same_run(output, last, record):
        announce(warning)
    return last


def _check_same_run(output: Path, last: Path | None, now: RunRecord) -> str | None:
    """Check that a resumed run is unchanged; values that were not recorded are not compared.

    Args:
        output: its folder.
        last: checkpoint to resume from.
        now: new record.

    Returns:
        A warning if versions differ.

    Raises:
        ValueError: its inputs have changed; the message names each one.

    """
    began = read_record(output)
    changed = _differences(began, now)
    for checkpoint in [] if last is None else resumed_from(last):
        if not (checkpoint / RECORD_FILE).exists():
            continue
        then = read_record(checkpoint, RECORD_FILE)
        if None not in (then.run_id, began.run_id) and then.run_id != began.run_id:
            raise ValueError(
                f"{checkpoint} belongs to another run than the one in {output}. Remove it to resume from the previous "
                "checkpoint."
            )
        changed += _differences(then, _with_adapter(now, checkpoint))
    if changed:
        raise ValueError(
            f"The run in {output} cannot be resumed, because its inputs changed: {'; '.join(dict.fromkeys(changed))}. "
            "Restore them, or start a new run with another --output."
        )
    newer = fingerprint.differing(began.versions, now.versions)
    if not newer:
        return None
    told = ", ".join(f"{name} {began.versions[name]}, now {now.versions[name]}" for name in newer)
    return f"Warning: the run started with other versions ({told}), so its results may differ slightly."


def _with_adapter(record: RunRecord, checkpoint: Path) -> RunRecord:
    """Record with the hash of the checkpoint's adapter configuration, by which PEFT loads its weights."""
    path = checkpoint / _ADAPTER_CONFIG
    if not path.exists():
        return record
    content = {"the configuration of the adapter in the checkpoint": hashlib.sha256(path.read_bytes()).hexdigest()}
    return replace(record, fingerprints={**(record.fingerprints or {}), **content})


def _differences(then: RunRecord, now: RunRecord) -> list[str]:
    settings, mine = (json.loads(json.dumps(record.config | {"output": None})) for record in (then, now))
    found = [
        f"the setting {name} ({settings[name]!r} before, {mine[name]!r} now)"
        for name in fingerprint.differing(settings, mine)
    ]
    for name, words in _NAMES.items():
        before, after = getattr(then, name), getattr(now, name)
        if before is not None and before != after:
            found.append(words)
    return [*found, *fingerprint.differing(then.fingerprints or {}, now.fingerprints or {})]
