"""Errors nobody foresaw: told to the log without what users wrote, and to users without what the log says."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from typing import Any

from fastar_backend.errors import FastarError

log = logging.getLogger("fastar")


def report(error: BaseException) -> None:
    """To the log: where, not what, as the message of an unforeseen error might quote a prompt. Torch and CUDA, and
    the operating system, speak of themselves only."""
    what = f": {error}" if isinstance(error, FastarError | RuntimeError | OSError | ImportError) else ""
    log.error("%s%s\n%s", type(error).__name__, what, "".join(traceback.format_tb(error.__traceback__)))


def as_fastar_error(error: BaseException) -> FastarError:
    """`error` itself if we raised it on purpose; else one line without details: they are in the server's log."""
    if isinstance(error, FastarError):
        return error
    report(error)
    return FastarError(f"server: {type(error).__name__}, see the server's log; allowed: a new stream")


def quietly(act: Callable[..., Any], *args: Any) -> bool:
    """Whether it worked; what went wrong is in the log."""
    try:
        act(*args)
    except Exception as error:
        report(error)
        return False
    return True
