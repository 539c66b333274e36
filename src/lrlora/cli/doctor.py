"""Command doctor: installed versions, kernels and devices, and incompatible versions."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING

from rich.table import Table

from ..files import cache_folder
from .common import app, as_text, console, one_clear_error, quiet

if TYPE_CHECKING:
    import torch

_PACKAGES = ("lrlora", "torch", "transformers", "peft", "safetensors", "numpy")
_OPTIONAL = (
    "accelerate",
    "datasets",
    "trl",
    "scikit-learn",
    "scipy",
    "altair",
    "bitsandbytes",
    "torchao",
)


@app.command()
def doctor() -> None:
    """Print versions, kernels, GPUs, the cache, and incompatible versions."""
    with one_clear_error():
        quiet()
        table = Table(show_header=False)
        for name, fact in (*_versions(), *_hardware(), ("cache", _cache())):
            table.add_row(name, as_text(fact))
        console.print(table)
        for conflict in _conflicts():
            console.print(f"[bold yellow]Warning:[/] {as_text(conflict)}", highlight=False)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for package in _PACKAGES:
        yield package, _installed(package) or "not installed as a package"
    versions = {package: _installed(package) for package in _OPTIONAL}
    yield "optional", ", ".join(f"{name} {installed}" for name, installed in versions.items() if installed) or "none"
    if missing := [name for name, installed in versions.items() if not installed]:
        yield (
            "not installed",
            f"{', '.join(missing)} (pip install 'lrlora[train]' or 'lrlora[integrations]')",
        )


def _hardware() -> Iterator[tuple[str, str]]:
    import torch

    yield "processor", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    yield "kernels", _kernels()
    cards = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    yield "GPU", "; ".join(map(_card, cards)) or "none available to PyTorch"


def _card(device: torch.device) -> str:
    """Name of a GPU, and whether the Triton kernels are right on it."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from ..ops.gpu import is_sound

            kernels = "pass" if is_sound(device) else "fail"
        except ImportError:
            return f"{torch.cuda.get_device_name(device)}, without Triton"
    return f"{torch.cuda.get_device_name(device)}, whose Triton kernels {kernels} their self-test"


def _kernels() -> str:
    """Kernels that form ΔW on the processor, or why there are none."""
    import torch

    from ..ops.phi import TransferSpec
    from ..ops.transfer import Transfer

    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        Transfer(TransferSpec()).delta(torch.randn(1, 8), torch.randn(8, 1), scaling=1.0, gain=1.0)
    if caught:
        return f"none, plain PyTorch is used. {caught[0].message}"
    return os.environ.get("LRLORA_KERNELS") or "native"


def _cache() -> str:
    folder = cache_folder()
    if not folder.is_dir():
        return f"{folder}, not created yet"
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return f"{folder}, {size / 2**20:.0f} MiB"


def _conflicts() -> Iterator[str]:
    """Installed packages that are too old for lrlora, or for each other."""
    from packaging.requirements import Requirement
    from transformers.integrations.peft import MIN_PEFT_VERSION

    for text in requires("lrlora") or ():
        requirement = Requirement(text)
        installed = _installed(requirement.name)
        is_wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if installed and not requirement.specifier.contains(installed, prereleases=True):
            yield f"{requirement.name} {installed} is installed, but lrlora needs {requirement.specifier}."
        elif is_wanted and not installed:
            yield f"{requirement.name} is not installed, but lrlora needs it."
    peft = _installed("peft")
    if peft and not Requirement(f"peft>={MIN_PEFT_VERSION}").specifier.contains(peft, prereleases=True):
        yield (
            f"transformers {_installed('transformers')} requires PEFT {MIN_PEFT_VERSION} for its own add_adapter and "
            f"active_adapters, but PEFT {peft} is installed. get_peft_model and all of lrlora still work."
        )
