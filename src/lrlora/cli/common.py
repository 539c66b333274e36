"""Application, console, and errors as one message, for all commands."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import __version__
from ..checks import printable

ASSISTANT_ONLY_LOSS = Annotated[
    bool,
    typer.Option(
        "--assistant-only-loss",
        help="For chats and an adapter that is not a run, take the loss of the assistant's turns only; default: of all "
        "tokens, as TRL trains.",
    ),
]
CONTEXT = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    help="LoRA gives every layer the same rank; lrlora learns it.",
    no_args_is_help=True,
    add_completion=False,
    context_settings=CONTEXT,
    pretty_exceptions_enable=False,
)
# Output piped into a file has no terminal width.
console = Console() if Console().is_terminal else Console(width=120)


@contextmanager
def one_clear_error(after_interrupt: str = "Run the same command again to resume.") -> Iterator[None]:
    """Print an error as one message, without a traceback; `LRLORA_DEBUG=1` in the environment raises it."""
    try:
        yield
    except (typer.Exit, BrokenPipeError):  # Typer handles a pipe that its reader, such as head, has closed
        raise
    except Exception as error:
        if os.environ.get("LRLORA_DEBUG") == "1":
            raise
        remedy, is_foreseen = "", isinstance(error, (ValueError, OSError, RuntimeError, ImportError, MemoryError))
        if isinstance(error, ImportError) and "pip install" not in str(error):
            missing = {"altair|vl_convert": "plots", "bitsandbytes|torchao": "integrations"}
            extra = next((extra for names, extra in missing.items() if re.search(names, str(error))), "train")
            remedy = f". Install the missing dependencies: pip install 'lrlora[{extra}]'"
        what = (str(error) or type(error).__name__) if is_foreseen else f"{type(error).__name__}: {error}"
        remedy += "" if is_foreseen else ". This error is unexpected. Set LRLORA_DEBUG=1 to show its traceback."
        Console(stderr=True).print(f"[bold red]Error:[/] {as_text(f'{what}{remedy}')}", highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        note(f"Interrupted. {after_interrupt}")
        raise typer.Exit(130) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"lrlora {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of all commands."""
    # SIGTERM cleans up like Ctrl-C. Processes that train together are ended by their launcher, and may be waiting for
    # each other in native code, where Python cannot handle the signal.
    if "RANK" not in os.environ:
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def announce(line: str) -> None:
    """Print a line as it is."""
    console.print(as_text(line), highlight=False)


def new_table(title: str, *headings: str) -> Table:
    """Empty table of a text column and columns of numbers."""
    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    return table


def note(line: str) -> None:
    """Print a line to stderr; results go to stdout."""
    Console(stderr=True).print(as_text(line), highlight=False)


def as_text(lines: str) -> str:
    """Escape text for the console: no markup or control character in it is interpreted."""
    return escape("\n".join(map(printable, lines.split("\n"))))


# These log while they are imported.
for _name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def quiet() -> None:
    """Silence messages, deprecation warnings and progress bars of the libraries."""
    warnings.formatwarning = lambda message, *where, **more: f"Warning: {message}\n"
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # Custom code of models is never run, so never wait for an answer to the question whether to run it.
    transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    if importlib.util.find_spec("datasets"):
        from datasets.utils.logging import disable_progress_bar

        disable_progress_bar()
