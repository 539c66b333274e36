"""A limit of time for code that a stranger wrote in Jinja."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Context that raises TimeoutError in this thread after a time, in Python code of any kind.

    A signal would only reach the main thread, and a thread cannot be stopped from outside in another way.
    """
    thread = ctypes.c_ulong(threading.get_ident())
    timer = threading.Timer(seconds, lambda: _raise_in(thread, ctypes.py_object(TimeoutError)))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        _raise_in(thread, None)  # what is still pending
