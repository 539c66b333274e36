"""Progress bar of long work: in a terminal or notebook; a line a minute in a file."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from tqdm import tqdm

_APART = 60  # seconds between lines in a file


def is_live() -> bool:
    """Whether standard error can redraw a line."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


class _Lines(tqdm):
    """Writes lines instead of redrawing one."""

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        def write(line: str) -> None:
            file.write(f"{line}\n")
            file.flush()

        return write

    def close(self) -> None:
        if not self.disable:
            if self.n != self.last_print_n and time.time() >= self.start_t + self.delay:
                self.display()
            self.fp = io.StringIO()  # closing ends the redrawn line
            self.sp = lambda line: None
        super().close()


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
    """A `tqdm`, with its arguments; with `leave=False`, a file gets only what takes longer than a minute."""
    if is_live():
        return tqdm(iterable, **options)
    delay = 0 if options.get("leave", True) else _APART
    return _Lines(iterable, mininterval=_APART, miniters=1, ncols=0, delay=delay, **options)
