"""What a stream executed, as JSON lines: enough to run it again and to tell whether it came out the same.

The first line has the options; each further one a chunk: its executed actions, the controls that took effect with it,
and the SHA-256 of its frames. The prompt is written as it is.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Self

from fastar_client.errors import FastarError, InvalidArgument, invalid
from fastar_client.protocol import Chunk, StreamOptions
from fastar_client.session import Connection
from fastar_client.stream import Stream
from fastar_client.video import output_errors

VERSION = 1
STORE_SECONDS = 10.0  # how long a replayed rewind waits for its snapshot to be stored


class EventLog:
    """Writes the log of one stream, which must not be a resumed or forked one. Raises OutputError, InvalidArgument."""

    def __init__(self, path: str | os.PathLike[str], options: StreamOptions) -> None:
        if options.origin is not None:
            raise invalid("event_log", str(path), "a stream that starts anew, neither resumed nor forked")
        self.path = Path(path)
        with output_errors(self.path):
            self._file = self.path.open("w", encoding="utf-8")
        self._write({"event": "open", "version": VERSION, "options": dataclasses.asdict(options)})

    def add(self, chunk: Chunk) -> None:
        self._write(
            {
                "event": "chunk",
                "chunk": chunk.stats.chunk,
                "actions": chunk.actions,
                "controls": chunk.controls,
                "frames": len(chunk.frames),
                "sha256": digest(chunk),
            }
        )

    def close(self) -> None:
        with output_errors(self.path):
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _write(self, event: Mapping[str, Any]) -> None:
        with output_errors(self.path):
            self._file.write(json.dumps(event, allow_nan=False) + "\n")
            self._file.flush()


def digest(chunk: Chunk) -> str:
    return hashlib.sha256(chunk.frames.tobytes()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Recorded:
    """One chunk of a log."""

    chunk: int
    actions: tuple[str, ...]
    controls: tuple[Mapping[str, Any], ...]
    frames: int
    sha256: str


def read(path: str | os.PathLike[str]) -> tuple[StreamOptions, list[Recorded]]:
    """Raises InvalidArgument where the file cannot be read or is no event log. A last line cut short is left out."""
    allowed = "a file written by `fastar-client stream --event-log`"
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
        head = json.loads(lines[0])
        if head["event"] != "open" or head["version"] != VERSION:
            raise ValueError(f"version {head['version']}")
        options = StreamOptions(**head["options"])
        chunks = []
        for line in lines[1:-1]:  # a whole line ends in a new line
            event = json.loads(line)
            fields = {field.name: event[field.name] for field in dataclasses.fields(Recorded)}
            chunks.append(Recorded(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}))
    except (OSError, ValueError, KeyError, TypeError, FastarError) as error:
        raise invalid("event_log", str(path), f"{allowed} ({type(error).__name__}: {error})") from None
    if not chunks:
        raise invalid("event_log", str(path), f"{allowed} with a chunk in it")
    return options, chunks


@dataclasses.dataclass
class Comparison:
    chunks: int  # recorded
    identical: int = 0
    first_difference: int | None = None  # index in the log


async def replay(connection: Connection, options: StreamOptions, recorded: list[Recorded]) -> Comparison:
    """Runs the recorded stream again, one chunk at a time, and compares its frames. Raises as a stream does."""
    result = Comparison(len(recorded))
    # H.264 is encoded for a rate; else there is no reason to wait.
    fps = options.fps if options.encoding == "h264" else None
    options = dataclasses.replace(options, fps=fps, frames=sum(chunk.frames for chunk in recorded))
    latent_frames = (await connection.world()).latent_frames_per_chunk

    # The snapshots that rewinds went back to may have been taken at times of the server's own.
    rewound = {control.get("rewind") for chunk in recorded for control in chunk.controls}

    async def player() -> AsyncIterator[str]:
        for index, chunk in enumerate(recorded):
            for control in chunk.controls if index else ():
                await steer(stream, control)
            if index and chunk.chunk in rewound and not any("snapshot" in control for control in chunk.controls):
                await steer(stream, {"snapshot": True})
            for action in chunk.actions * (latent_frames if len(chunk.actions) == 1 else 1):
                yield action

    stream = connection.open(options, player(), in_flight=1)
    for control in recorded[0].controls:  # before it is opened: what the start can carry, it carries
        await steer(stream, control, wait=False)
    index = 0
    async for chunk in stream:
        theirs = recorded[index] if index < len(recorded) else None
        if theirs is not None and (chunk.stats.chunk, digest(chunk)) == (theirs.chunk, theirs.sha256):
            result.identical += 1
        elif result.first_difference is None:
            result.first_difference = index
        index += 1
    return result


async def steer(stream: Stream, control: Mapping[str, Any], wait: bool = True) -> None:
    """Sends a recorded control again. Actions are in the chunks' requests; pauses and rates change no frame."""
    changes = {
        "prompt": lambda value: stream.prompt(value, control.get("blend_chunks")),
        "density": stream.set_density,
        "seed": stream.set_seed,
        "encoding": stream.set_encoding,
        "snapshot": lambda _: stream.snapshot(),
        "rewind": stream.rewind,
    }
    deadline = time.monotonic() + STORE_SECONDS
    for kind in changes.keys() & control.keys():
        while True:
            receipt = await changes[kind](control[kind])
            if not wait:
                break
            try:
                await receipt.received()
                break
            except InvalidArgument:
                if kind != "rewind" or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.1)  # its snapshot is still being stored
