"""Sources of models and adapters, by name: a folder, a file, or a repository on the hub. Nothing is loaded."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path

_NEAR = 0.8  # least likeness of a name to one that may be meant
ADAPTER_EXPECTED = "Expected adapter_config.json and adapter_model.safetensors, as written by save_pretrained."


def is_hub_name(name: str | os.PathLike[str]) -> bool:
    """Whether a name could be a hub repository: NAME or OWNER/NAME, where OWNER is not a local folder.

    Without this, a mistyped path is searched for on the hub, which takes a minute of retries without a network.
    """
    text = os.fspath(name)
    owner = text.rpartition("/")[0]
    return re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", text) is not None and not (owner and Path(owner).is_dir())


def near_files(name: str | os.PathLike[str]) -> list[str]:
    """Files and folders, where a path would be, with nearly its name, with or without their suffix."""
    path = Path(name)
    if not path.parent.is_dir():
        return []
    beside = {each.name: path.parent / each.name for each in path.parent.iterdir()}
    names = {_folded(form): each for each in beside for form in (Path(each).stem, each)}
    near = difflib.get_close_matches(_folded(path.name), names, 3, _NEAR)
    return list(dict.fromkeys(str(beside[names[form]]) for form in near))


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """Names that are spelled nearly as a name."""
    names = {_folded(each): each for each in known}
    return [names[form] for form in difflib.get_close_matches(_folded(name), names, 3, _NEAR)]


def _folded(name: str) -> str:
    """A name without what differs in spelling: case, and the characters between words."""
    return re.sub(r"[-_. ]+", "-", name.casefold())


def require_present(name: str | os.PathLike[str]) -> None:
    """Check that a path exists or may be a hub name.

    Raises:
        FileNotFoundError: neither.

    """
    if not Path(name).exists() and not is_hub_name(name):
        raise FileNotFoundError("The folder does not exist.")


def require_adapter(name: str | os.PathLike[str]) -> None:
    """Check for an adapter without using the hub: in a folder, or a name that cannot be a hub name.

    Raises:
        ValueError: it is missing.

    """
    path, reason = Path(name), None
    if path.is_dir():
        if not is_adapter(path):
            paths = [file.parent for file in path.glob("*/adapter_config.json")] + [*path.glob("*lora*.safetensors")]
            suggestion = f"; pass one of {', '.join(sorted(map(str, paths)))}" if paths else ""
            reason = f"it has no adapter_config.json{suggestion}"
    else:
        # On the hub, every adapter has an owner.
        reason = None if is_hub_name(name) and "/" in os.fspath(name) else "the folder does not exist"
    if reason is not None:
        raise ValueError(f"{name} does not contain a readable adapter: {reason}. {ADAPTER_EXPECTED}")


def is_adapter(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter."""
    return (Path(folder) / "adapter_config.json").is_file()


def is_full_model(name: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a model and no adapter."""
    path = Path(name)
    return (path / "config.json").is_file() and not is_adapter(path)


def require_source(name: str) -> None:
    """Check for an adapter in a folder or file.

    Raises:
        FileNotFoundError: the named file is missing.
        ValueError: none is found.

    """
    is_file = Path(name).is_file()
    if name.endswith(".safetensors") and not is_file:
        raise FileNotFoundError(f"There is no file {name}.")
    if is_full_model(name):
        raise ValueError(f"{name} is a full model, not an adapter. Make a LoRA of it first: mergekit-extract-lora.")
    if is_file and Path(name).suffix != ".safetensors":
        raise ValueError(f"{name} is not a .safetensors file, the only supported file type.")
    if not is_file:
        require_adapter(name)
