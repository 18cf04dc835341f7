"""Wire protocol 2: tensor names, limits, and what travels in each direction. One request per chunk, or per control.

Every request has the first three inputs, a control all four; every reply has three outputs:

ACTIONS  BYTES [1, n]   n = 1 (held for the whole chunk) or n = latent frames per chunk; "" or "forward+turn_left"
PROMPT   BYTES [1, 1]   UTF-8; required at the start, later "" = unchanged
OPTIONS  BYTES [1, 1]   JSON object, read at the start only
CONTROL  BYTES [1, 1]   JSON object: a keepalive ({}) or a change of the running stream; ACTIONS is then "control"
FRAMES   UINT8 [1, frames, height, width, 3]   RGB; no frames in replies to controls and with encodings but raw
VIDEO    UINT8 [1, bytes]                      the packets of an encoding other than raw, one after the other
STATS    UINT8 [1, bytes]                      UTF-8 JSON, one `ChunkStats`, or the receipt of a control

A control is answered at once, so its reply may overtake those of chunks; it is told by the `control` in its STATS.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastar_client.errors import ServerError, ServerUnavailable, invalid

MODEL = "fastar"
ACTIONS, PROMPT, OPTIONS, CONTROL = INPUTS = ("ACTIONS", "PROMPT", "OPTIONS", "CONTROL")
FRAMES, VIDEO, STATS = OUTPUTS = ("FRAMES", "VIDEO", "STATS")
END_ACTION = "end"  # alone in the request that ends a sequence: generate nothing
CONTROL_ACTION = "control"  # alone in a request that is a control
ENCODINGS = ("raw", "jpeg", "h264")
TENANT_HEADER = "x-fastar-tenant"
MIGRATE_HEADER = "x-fastar-migrate"  # "1": we know what `migrate` in STATS asks of us
POD_HEADER = "x-fastar-pod"  # the pin: what a gateway's reply has under this name; sent again it leads back there
MAX_BLEND_CHUNKS = 64
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
    scenarios: Mapping[str, str]  # what it knows -> a prompt for it
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
    phases: Mapping[str, float] = dataclasses.field(default_factory=dict)  # seconds of the step by name
    guard_recall: float | None = None  # of dense attention over the kept keys, sampled, 0..1; None: the guard is off
    guard_error: float | None = None  # ||sparse - dense|| / ||dense|| of the attention's output, sampled; likewise
    sparse_density: float | None = None  # share of cached keys attended to by AnnSA, 0..1; likewise
    received: int = 0  # highest control id that the server has taken
    applied: tuple[int, ...] = ()  # ids of the controls that took effect with this chunk
    actions: tuple[str, ...] = ()  # as executed
    encoding: str = "raw"
    packets: tuple[int, ...] = ()  # bytes of each packet in VIDEO
    queue_seconds: float = 0.0  # from the request's arrival at the server to the begin of its chunk
    encode_seconds: float = 0.0
    late: Mapping[str, Any] | None = None  # {"seconds", "reason"} where the chunk was ready after the viewer needed it
    snapshot_chunk: int | None = None  # the newest safely stored snapshot was taken before this chunk
    world: World | None = None  # with the first chunk
    token: str | None = None  # likewise: the stream's secret, to resume or fork it


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One chunk of video, as the caller gets it."""

    frames: np.ndarray  # uint8 [n, height, width, 3], RGB, read-only; n < stats.frames where the last chunk is trimmed
    stats: ChunkStats
    actions: tuple[str, ...]  # as executed, which may differ from what was asked with the request
    sent_at: float  # seconds on this process's monotonic clock (time.monotonic): request handed to gRPC
    received_at: float  # seconds, same clock: reply complete
    controls: tuple[Mapping[str, Any], ...] = ()  # that took effect with this chunk, e.g. {"id": 1, "prompt": "a maze"}
    packets: tuple[bytes, ...] | None = None  # as they came, of the whole chunk; None for raw


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
    control: str | None = None  # JSON; `actions` is then ("control",)


@dataclasses.dataclass(frozen=True)
class Reply:
    """One reply, as it travels: the outputs with their batch dimension."""

    frames: np.ndarray  # uint8 [1, frames, height, width, 3]
    stats: np.ndarray  # uint8 [1, bytes]
    video: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((1, 0), np.uint8))  # uint8 [1, bytes]


@dataclasses.dataclass(frozen=True)
class ControlReply:
    """What STATS says in reply to a control."""

    id: int | None  # None: a keepalive
    error: str | None  # "CODE: field: what" where it was refused
    received: int


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a stream comes from that does not start anew: the newest state of the stream of that token whose next chunk
    is not later than `chunk` (None: the newest)."""

    token: str
    chunk: int | None = None
    fork: bool = False  # a new stream that begins as a copy; else the stream itself goes on

    def __post_init__(self) -> None:
        if not isinstance(self.token, str) or not 1 <= utf8_bytes("token", self.token) <= 256:
            raise invalid("token", "(hidden)", "the `token` of a stream")
        if self.chunk is not None and not (is_int(self.chunk) and 0 <= self.chunk < 2**53):
            raise invalid("chunk", self.chunk, "an integer >= 0, or None for the newest")

    def as_json(self) -> dict[str, Any]:
        at = {"token": self.token} | ({} if self.chunk is None else {"chunk": int(self.chunk)})
        return {"fork" if self.fork else "resume": at}


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
    encoding: str = "raw"  # how frames travel: "raw", "jpeg" or "h264"
    origin: Origin | None = None  # what to resume or fork; `prompt`, `start` and `attention` are then its own

    def __post_init__(self) -> None:
        if self.origin is None:
            check_prompt(self.prompt)
        if self.frames is not None and not (is_int(self.frames) and self.frames >= 1):
            raise invalid("frames", self.frames, "an integer >= 1, or None for an endless stream")
        if self.seed is not None and not (is_int(self.seed) and 0 <= self.seed <= MAX_SEED):
            raise invalid("seed", self.seed, "an integer 0..2^63-1")
        if self.start is not None and not (isinstance(self.start, str) and self.start):
            raise invalid("start", self.start, 'a start name of the world, "auto" or "nothing"')
        check_fps(self.fps)
        check_encoding(self.encoding)
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
        if self.encoding != "raw":
            values["encoding"] = self.encoding
        values |= {"fps": self.fps} | (self.origin.as_json() if self.origin else {})
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


def check_fps(fps: float | None) -> float | None:
    """`fps` itself; raises InvalidArgument."""
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps <= 1000):
        raise invalid("fps", fps, "a number > 0 and <= 1000, or None for as fast as possible")
    return fps


def check_encoding(encoding: str) -> str:
    """`encoding` itself; raises InvalidArgument."""
    if encoding not in ENCODINGS:
        raise invalid("encoding", encoding, ", ".join(ENCODINGS))
    return encoding


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


def parse_reply(reply: Reply) -> ChunkStats | ControlReply:
    """What a reply says; its video is still to be decoded. Raises ServerError where it breaks the contract,
    and ServerUnavailable where the server drains: it has stored the stream, which is to be resumed elsewhere."""
    text = reply.stats.tobytes()
    values = parse_json(text)
    if values.get("migrate") is not None:
        raise ServerUnavailable("server: it drains; the stream goes on by its token, on another server")
    try:
        if (control := values.get("control")) is not None:
            return ControlReply(control["id"], control["error"], int(values["received"]))
        return parse_stats(text, values)
    except (KeyError, ValueError, TypeError) as error:
        raise ServerError(f"{STATS}: not the receipt of a control ({error!r}); got {text[:60]!r}") from None


def parse_stats(text: bytes, values: Mapping[str, Any] | None = None) -> ChunkStats:
    """`ChunkStats` of the STATS output. Unknown fields are ignored; raises ServerError for missing ones."""
    values = parse_json(text) if values is None else values
    try:
        return known_fields(ChunkStats, {**values, "world": parse_world(values)})
    except (ValueError, TypeError, AttributeError) as error:
        raise ServerError(f"{STATS}: not the JSON of a chunk's stats ({error}); got {text[:60]!r}") from None


def parse_world(values: Mapping[str, Any]) -> World | None:
    """The world in a reply's STATS. Raises TypeError, AttributeError."""
    world = values.get("world")
    if world is None:
        return None
    scenarios = world.get("scenarios", {})
    if not isinstance(scenarios, Mapping):  # of an older server: the names alone
        world = world | {"scenarios": {name: name for name in scenarios}}
    return known_fields(World, world)


def parse_json(text: bytes) -> dict[str, Any]:
    """A JSON object; raises ServerError."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ServerError(f"{STATS}: not JSON ({error}); got {text[:60]!r}") from None
    if not isinstance(values, dict):
        raise ServerError(f"{STATS}: not a JSON object; got {text[:60]!r}")
    return values


def known_fields(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """`kind` from those of `values` that it knows; JSON arrays become tuples. Raises TypeError for missing fields."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names})
