"""Upload of a finished run to the hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import create_repo, upload_folder

from .progress import Announce
from .settings import TrainConfig


def push(config: TrainConfig, announce: Announce) -> None:
    """Upload a finished run to the hub, if its Trainer arguments say `push_to_hub`."""
    if not config.training.get("push_to_hub"):
        return
    token, name = config.training.get("hub_token"), config.training.get("hub_model_id") or Path(config.output).name
    try:
        name = create_repo(name, token=token, exist_ok=True).repo_id
        upload_folder(repo_id=name, folder_path=config.output, token=token, commit_message="End of training")
    except OSError as error:
        announce(f"Warning: the run was not pushed ({error}). Push it with: hf upload {name} {config.output}")
    else:
        announce(f"Pushed: {name}")
