"""Triton's log, made readable: what the model says and what is wrong; the rest only at debug level."""

from __future__ import annotations

import json
import logging
import re

TRITON = re.compile(r"^(?P<level>[IWEF])\d{4} [\d:.]+ \d+ (?P<file>[\w.]+):\d+\] ?(?P<text>.*)$")
LEVELS = {"I": logging.INFO, "W": logging.WARNING, "E": logging.ERROR, "F": logging.CRITICAL}
NO_GPU = re.compile("pinned (system )?memory|CudaDriverHelper|DCGM|NVML")  # said on every machine without a GPU
CANNOT_LOAD = re.compile(r"^fastar: cannot load: (?P<reason>.*)", re.DOTALL)
FAILED_TO_LOAD = re.compile(r"^failed to load 'fastar' version 1: (?P<reason>[^\n]*)")


class ServerLog:
    """Reads a server's output line by line. `failure` is why the model could not be loaded, once that is known."""

    def __init__(self, logger: logging.Logger) -> None:
        self.logger = logger
        self.failure: str | None = None

    def line(self, line: str) -> None:
        level, text = self._judge(line.rstrip())
        if text:
            self.logger.log(level, "%s", text)

    def _judge(self, line: str) -> tuple[int, str]:
        match = TRITON.match(line)
        if not match:  # Triton's tables and the model process's own standard output
            noise = line.startswith(("+-", "| ", "Signal (15)", "error: creating server")) or NO_GPU.search(line)
            return (logging.DEBUG if noise else logging.INFO), line
        level, file, text = LEVELS[match["level"]], match["file"], match["text"]
        try:
            text = str(json.loads(text, strict=False))
        except ValueError:
            text = text.strip('"')
        if reason := CANNOT_LOAD.match(text):
            self.failure = reason["reason"]
            return logging.DEBUG, text  # the supervisor says it
        if reason := FAILED_TO_LOAD.match(text):
            self.failure = self.failure or reason["reason"]
        if file == "model.py":
            return level, text.removeprefix("fastar: ").rstrip()
        quiet = level < logging.WARNING or NO_GPU.search(text) or (self.failure and file.endswith(".cc"))
        return (logging.DEBUG if quiet else level), text
