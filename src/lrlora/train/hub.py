"""Upload of a finished run to the hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import create_repo, upload_folder

from .progress import Announce


def create_repository(output: str, training: Mapping[str, Any]) -> None:
    """Create the repository for a run, in the first process, if its Trainer arguments say `push_to_hub`.

    Args:
        output: output folder of the run.
        training: its Trainer arguments.

    Raises:
        ValueError: the hub cannot be reached, or refuses.

    """
    if not training.get("push_to_hub") or os.environ.get("RANK", "0") != "0":
        return
    try:
        _create(output, training)
    except Exception as error:  # of huggingface_hub, its HTTP client, or a socket
        raise ValueError(
            f"training: push_to_hub=True, but the hub does not take {_name(output, training)}: {error} Log in with "
            "`hf auth login`, set hub_model_id, or remove push_to_hub."
        ) from None


def push(output: str, training: Mapping[str, Any], announce: Announce) -> None:
    """Upload a finished run to the hub, if its Trainer arguments say `push_to_hub`."""
    if not training.get("push_to_hub"):
        return
    name = _name(output, training)
    try:
        name = _create(output, training)
        upload_folder(repo_id=name, folder_path=output, commit_message="End of training")
    except Exception as error:  # the run is saved already
        announce(f"Warning: the run was not pushed ({error}). Push it with: hf upload {name} {output}")
    else:
        announce(f"Pushed: {name}")


def _create(output: str, training: Mapping[str, Any]) -> str:
    """Create the repository, if there is none, and return its full name."""
    return create_repo(_name(output, training), private=training.get("hub_private_repo"), exist_ok=True).repo_id


def _name(output: str, training: Mapping[str, Any]) -> str:
    return str(training.get("hub_model_id") or Path(output).name)
