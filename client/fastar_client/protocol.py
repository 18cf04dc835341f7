"""The wire contract: tensor names, limits, and what travels in each direction. One request per chunk of video.

Every request has three BYTES inputs, and every reply two UINT8 outputs:

ACTIONS  BYTES [1, n]   n = 1 (held for the whole chunk) or n = latent frames per chunk; "" or "forward+turn_left"
PROMPT   BYTES [1, 1]   UTF-8; required at the start, later "" = unchanged
OPTIONS  BYTES [1, 1]   JSON object, read at the start only
FRAMES   UINT8 [1, frames, height, width, 3]   RGB
STATS    UINT8 [1, bytes]                      UTF-8 JSON, one `ChunkStats`
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastar_client.errors import ServerError, invalid

MODEL = "fastar"
ACTIONS, PROMPT, OPTIONS = INPUTS = ("ACTIONS", "PROMPT", "OPTIONS")
FRAMES, STATS = OUTPUTS = ("FRAMES", "STATS")
END_ACTION = "end"  # alone in the request that ends a sequence: generate nothing
MAX_PROMPT_BYTES = 4096
MAX_ACTION_BYTES = 256
MAX_SEED = 2**63 - 1
IN_FLIGHT = 2  # requests per stream: one being computed, one waiting, so that the server never waits for the network


@dataclasses.dataclass(frozen=True)
class World:
    """What the server generates; sent with a stream's first chunk."""

    name: str
    height: int  # pixels
    width: int  # pixels
    chunk_frames: int  # video frames per chunk
    latent_frames_per_chunk: int  # actions per chunk
    buttons: tuple[str, ...]  # what an action may combine with "+"
    starts: tuple[str, ...]  # allowed values of `start`, besides "auto" and "nothing"
    scenarios: tuple[str, ...]  # words that a prompt may name
    native_fps: float  # frames per second at which the world looks natural


@dataclasses.dataclass(frozen=True)
class ChunkStats:
    """The server's figures of one chunk."""

    chunk: int  # 0, 1, ... within the stream
    first_frame: int  # index within the stream of this chunk's first frame
    frames: int
    cache_tokens: float  # attended history per head, mean over layers
    cache_bytes: int
    density: float  # executed / dense query-key pairs, 0..1
    recall: float | None  # attention mass of the whole history that was kept, 0..1; None unless measured
    merged_tokens: float  # history tokens folded into others, mean over layers
    text_tokens: float  # prompt tokens attended to, mean over layers and heads
    step_seconds: float
    batch: int  # streams computed in the same step
    prompt_applied: bool  # a new prompt took effect with this chunk
    process_bytes: int  # resident memory of the server's model process
    world: World | None = None  # with chunk 0


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One chunk of video, as the caller gets it."""

    frames: np.ndarray  # uint8 [n, height, width, 3], RGB, read-only; n < stats.frames where the last chunk is trimmed
    stats: ChunkStats
    actions: tuple[str, ...]  # what was asked of this chunk
    sent_at: float  # seconds on this process's monotonic clock (time.monotonic): request handed to gRPC
    received_at: float  # seconds, same clock: reply complete


@dataclasses.dataclass(frozen=True)
class ChunkRequest:
    """One request, as it travels."""

    sequence_id: int  # 1..2^63-1, chosen by the client
    actions: tuple[str, ...]
    prompt: str = ""
    options: str = ""
    start: bool = False
    end: bool = False
    queue_seconds: float | None = None  # with `start`: give up when no slot has become free by then


@dataclasses.dataclass(frozen=True)
class Reply:
    """One reply, as it travels: the two outputs with their batch dimension."""

    frames: np.ndarray  # uint8 [1, frames, height, width, 3]
    stats: np.ndarray  # uint8 [1, bytes]


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """What is fixed when a stream opens. Raises InvalidArgument on construction, naming field, value and allowed."""

    prompt: str
    frames: int | None = None  # stop after exactly this many frames; None: endless
    seed: int | None = None  # 0..2^63-1; None: the server's default
    start: str | None = None  # a start of the world, "auto" or "nothing"; None: the server's default
    attention: Mapping[str, Any] | None = None  # the server's attention settings, e.g. {"kind": "dense"}
    measure_recall: bool = False
    fps: float | None = None  # pace the requests to this many frames per second; None: as fast as possible

    def __post_init__(self) -> None:
        check_prompt(self.prompt)
        if self.frames is not None and not (is_int(self.frames) and self.frames >= 1):
            raise invalid("frames", self.frames, "an integer >= 1, or None for an endless stream")
        if self.seed is not None and not (is_int(self.seed) and 0 <= self.seed <= MAX_SEED):
            raise invalid("seed", self.seed, "an integer 0..2^63-1")
        if self.start is not None and not (isinstance(self.start, str) and self.start):
            raise invalid("start", self.start, 'a start name of the world, "auto" or "nothing"')
        if self.fps is not None and not (isinstance(self.fps, int | float) and 0 < self.fps <= 1000):
            raise invalid("fps", self.fps, "a number > 0 and <= 1000, or None for as fast as possible")
        if self.attention is not None and not isinstance(self.attention, Mapping):
            raise invalid("attention", self.attention, 'a JSON object such as {"kind": "dense"}')
        try:
            self.as_json()
        except (TypeError, ValueError):
            raise invalid("attention", self.attention, "JSON values only") from None

    def as_json(self) -> str:
        """The OPTIONS input; what is None is left to the server."""
        values: dict[str, Any] = {"seed": None if self.seed is None else int(self.seed), "start": self.start}
        if self.attention is not None:
            values["attention"] = dict(self.attention)
        if self.measure_recall:
            values["measure_recall"] = True
        return json.dumps({key: value for key, value in values.items() if value is not None}, allow_nan=False)


def is_int(value: object) -> bool:
    """An integer (numpy's too), but not a bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_prompt(prompt: str) -> str:
    """`prompt` itself; raises InvalidArgument where it is empty, too long, or not text."""
    allowed = f"non-empty text of at most {MAX_PROMPT_BYTES} bytes of UTF-8"
    if not isinstance(prompt, str) or not prompt.strip():
        raise invalid("prompt", prompt, allowed)
    if (size := utf8_bytes("prompt", prompt)) > MAX_PROMPT_BYTES:
        raise invalid("prompt", prompt, f"{allowed} (this one has {size})")
    return prompt


def check_action(action: str) -> str:
    """`action` itself; raises InvalidArgument. Which buttons exist is for the server to say."""
    allowed = (
        f'"+"-joined buttons such as "forward+turn_left", or "" for none, at most {MAX_ACTION_BYTES} bytes of UTF-8'
    )
    if not isinstance(action, str) or utf8_bytes("actions", action) > MAX_ACTION_BYTES:
        raise invalid("actions", action, allowed)
    return action


def utf8_bytes(field: str, text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:  # lone surrogates, e.g. of undecodable command-line bytes
        raise invalid(field, text, "text that can be encoded as UTF-8") from None


def parse_reply(reply: Reply) -> tuple[np.ndarray, ChunkStats]:
    """Frames (uint8 [n, height, width, 3]) and stats of a reply; raises ServerError where it breaks the contract."""
    frames, stats = reply.frames, parse_stats(reply.stats.tobytes())
    if frames.dtype != np.uint8 or frames.ndim != 5 or frames.shape[0] != 1 or frames.shape[-1] != 3:
        raise ServerError(
            f"{FRAMES}: got {frames.dtype} {list(frames.shape)}; expected uint8 [1, frames, height, width, 3]"
        )
    if frames.shape[1] != stats.frames:
        raise ServerError(f"{FRAMES}: {frames.shape[1]} frames arrived; the stats of the chunk say {stats.frames}")
    return frames[0], stats


def parse_stats(text: bytes) -> ChunkStats:
    """`ChunkStats` of the STATS output. Unknown fields are ignored; raises ServerError for missing ones."""
    try:
        values = json.loads(text)
        world = values.get("world")
        world = None if world is None else known_fields(World, world)
        return known_fields(ChunkStats, values | {"world": world})
    except (ValueError, TypeError, AttributeError) as error:
        raise ServerError(f"{STATS}: not the JSON of a chunk's stats ({error}); got {text[:60]!r}") from None


def known_fields(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """`kind` from those of `values` that it knows; JSON arrays become tuples. Raises TypeError for missing fields."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names})
