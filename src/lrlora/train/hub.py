"""Upload of a finished run to the hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import create_repo, upload_folder

from .progress import Announce
from .settings import TrainConfig


def require_hub(config: TrainConfig) -> None:
    """Create the repository to push to, if the Trainer arguments say `push_to_hub`.

    Raises:
        ValueError: the hub cannot be reached, or refuses.

    """
    if not config.training.get("push_to_hub"):
        return
    try:
        _create(config)
    except Exception as error:  # of huggingface_hub, its HTTP client, or a socket
        raise ValueError(
            f"training: push_to_hub=True, but the hub does not take {_name(config)}: {error} Log in with `hf auth "
            "login`, set hub_model_id, or remove push_to_hub."
        ) from None


def _create(config: TrainConfig) -> str:
    """Create the repository, if there is none, and return its full name."""
    return create_repo(_name(config), private=config.training.get("hub_private_repo"), exist_ok=True).repo_id


def _name(config: TrainConfig) -> str:
    return str(config.training.get("hub_model_id") or Path(config.output).name)


def push(config: TrainConfig, announce: Announce) -> None:
    """Upload a finished run to the hub, if its Trainer arguments say `push_to_hub`."""
    if not config.training.get("push_to_hub"):
        return
    name = _name(config)
    try:
        name = _create(config)
        upload_folder(repo_id=name, folder_path=config.output, commit_message="End of training")
    except Exception as error:  # the run is finished, whatever comes of it
        announce(f"Warning: the run was not pushed ({error}). Push it with: hf upload {name} {config.output}")
    else:
        announce(f"Pushed: {name}")
