"""A scripted server whose streams live on: controls, snapshots, resume, fork, encodings; it fails as told."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import hashlib
import io
import json
from collections.abc import AsyncIterator
from fractions import Fraction

import av
import numpy as np
from fastar_client.protocol import ChunkRequest, Reply
from PIL import Image
from scripted import Died, ScriptedServer

FIELDS = ("action", "prompt", "fps", "density", "seed", "encoding", "pause", "snapshot", "rewind")


@dataclasses.dataclass
class State:
    """What a snapshot holds. `digest` sums up all that was ever executed."""

    chunk: int = 0
    digest: str = ""
    received: int = 0
    waiting: list[dict] = dataclasses.field(default_factory=list)

    def feed(self, *what: object) -> None:
        self.digest = hashlib.sha256((self.digest + json.dumps(what)).encode()).hexdigest()


@dataclasses.dataclass
class Session:
    token: str
    state: State
    encoding: str
    encoder: object = None
    paused: bool = False
    go: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    over: str | None = None


@dataclasses.dataclass
class LiveServer(ScriptedServer):
    """As ScriptedServer, and the frames' last row tells all that was ever executed in the stream.

    cuts: chunk number -> how the connection is lost, once, when that chunk is due: "before" it is made, "after" (its
    reply is lost, the stream's state is beyond it), "restart" (all but stored snapshots is lost), "drain" (the server
    stops, and stores the state before), "migrate" (it says so in STATS, and where to go on).
    """

    snapshot_every: int = 4
    cuts: dict[int, str] = dataclasses.field(default_factory=dict)
    refuse_resume: str | None = None
    live: dict[str, Session] = dataclasses.field(default_factory=dict)
    stored: dict[tuple[str, int], State] = dataclasses.field(default_factory=dict)
    resumed: list[dict] = dataclasses.field(default_factory=list)
    made: list[int] = dataclasses.field(default_factory=list)
    down: int = 0  # resumes that are met by a broken connection

    async def serve(self, requests: AsyncIterator[ChunkRequest]) -> AsyncIterator[Reply | str]:
        out: asyncio.Queue[Reply | str | Exception | None] = asyncio.Queue()
        queue: asyncio.Queue[ChunkRequest | None] = asyncio.Queue()
        session: Session | None = None

        async def read() -> None:
            nonlocal session
            async for request in requests:
                self.requests.append(request)
                if request.start and request.actions != ("end",):
                    opened = self.open(request)
                    if not isinstance(opened, Session):
                        out.put_nowait(opened)
                        continue
                    session = opened
                if request.control is not None:
                    out.put_nowait(self.take(session, request.control))
                else:
                    queue.put_nowait(request)
            queue.put_nowait(None)

        async def work() -> None:
            while (request := await queue.get()) is not None:
                if request.actions == ("end",):
                    out.put_nowait(self.reply(0, 0, world=request.start))
                    continue
                while session.paused:
                    session.go.clear()
                    await session.go.wait()
                if self.gate:
                    await self.gate.acquire()
                await asyncio.sleep(self.step_seconds)
                if session.over:
                    out.put_nowait(session.over)
                    continue
                state = session.state
                cut = self.cuts.pop(state.chunk, None)
                if cut == "drain":
                    self.stored[session.token, state.chunk] = copy.deepcopy(state)
                    out.put_nowait("UNAVAILABLE: server: it is stopping; allowed: resume by the stream's token")
                if cut == "migrate":
                    self.stored[session.token, state.chunk] = copy.deepcopy(state)
                    at = {"chunk": state.chunk, "frame": state.chunk * self.chunk_frames, "token": session.token}
                    out.put_nowait(self.reply(-1, 0, migrate=at))
                if cut in ("drain", "restart", "migrate"):
                    del self.live[session.token]
                if cut in ("before", "restart"):
                    out.put_nowait(Died("gone"))
                if cut in ("drain", "before", "restart", "migrate"):
                    return
                reply = self.make(session, request)
                out.put_nowait(Died("gone") if cut == "after" else reply)
            out.put_nowait(None)

        async def guarded(task) -> None:
            try:
                await task
            except Exception as error:  # a bug of this server
                out.put_nowait(error)

        tasks = [asyncio.create_task(guarded(read())), asyncio.create_task(guarded(work()))]
        try:
            while (item := await out.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def open(self, request: ChunkRequest) -> Session | str | Exception:
        options = json.loads(request.options)
        source = options.get("resume") or options.get("fork")
        encoding = options.get("encoding", "raw")
        if source is None:
            session = Session(f"token-{len(self.live)}", State(), encoding)
            session.state.feed("start", request.prompt, options.get("seed"))
        else:
            self.resumed.append(source)
            if self.down:
                self.down -= 1
                return Died("still down")
            if self.refuse_resume:
                return self.refuse_resume
            token, chunk = source["token"], source.get("chunk", 10**9)
            old = self.live.get(token)
            if old and old.state.chunk <= chunk:
                state = copy.deepcopy(old.state)
            else:
                there = [n for t, n in self.stored if t == token and n <= chunk]
                if not there:
                    return "NOT_FOUND: OPTIONS.token: unknown or expired; allowed: a stream's token"
                state = copy.deepcopy(self.stored[token, max(there)])
            if "fork" in options:
                token, state.received = f"fork-{len(self.live)}", 0
                if "seed" in options:
                    state.feed("seed", options["seed"])
            else:
                self.abandon(token, state.chunk)
            if old and "resume" in options:
                old.over = "CANCELLED: stream: resumed by another sequence"
                old.go.set()
            session = Session(token, state, encoding)
        self.live[session.token] = session
        return session

    def abandon(self, token: str, chunk: int) -> None:
        """What comes after `chunk` will be another: it must not be resumed."""
        for later in [key for key in self.stored if key[0] == token and key[1] > chunk]:
            del self.stored[later]

    def take(self, session: Session, text: str) -> Reply:
        control, error = json.loads(text), None
        number = control.pop("id", None)
        if number is not None:
            if number > session.state.received + 1:
                error = f"INVALID_ARGUMENT: CONTROL.id: got {number}; allowed: {session.state.received + 1}"
            elif number == session.state.received + 1:
                session.state.received = number
                error = self.check(session, control)
                if error is None:
                    session.state.waiting.append({"id": number} | control)
                    if "pause" in control:
                        session.paused = control["pause"]
                        session.go.set()
        return self.reply(-1, 0, control={"id": number, "error": error}, received=session.state.received)

    def check(self, session: Session, control: dict) -> str | None:
        ((kind, value),) = [(k, v) for k, v in control.items() if k in FIELDS]
        refused = {
            "snapshot": value is not True,
            "rewind": (session.token, value) not in self.stored,
            "density": value == 0.123,
            "action": value == "fly",
        }
        return f"INVALID_ARGUMENT: CONTROL.{kind}: got {value!r}; allowed: another" if refused.get(kind) else None

    def make(self, session: Session, request: ChunkRequest) -> Reply:
        state, actions, applied = session.state, request.actions, []
        while session.state.waiting:
            control = session.state.waiting.pop(0)
            kind = next(kind for kind in FIELDS if kind in control)
            applied.append(control["id"])
            if kind == "rewind":
                received, waiting = state.received, state.waiting
                state = session.state = copy.deepcopy(self.stored[session.token, control["rewind"]])
                state.received, state.waiting, session.encoder = received, waiting, None
                self.abandon(session.token, state.chunk)
            elif kind == "encoding":
                session.encoding, session.encoder = control["encoding"], None
            elif kind == "snapshot":
                self.stored[session.token, state.chunk] = copy.deepcopy(state)
            elif kind == "action":
                actions = (control["action"],)
            elif kind in ("prompt", "density", "seed"):
                state.feed(kind, control[kind], control.get("blend_chunks"))
        if self.snapshot_every and state.chunk and state.chunk % self.snapshot_every == 0:
            self.stored[session.token, state.chunk] = copy.deepcopy(state)
        state.feed("actions", list(actions) * (self.latent_frames // len(actions)))  # one is held for all
        chunk = state.chunk
        state.chunk += 1
        self.made.append(chunk)
        kept = [n for t, n in self.stored if t == session.token and n <= chunk]
        stats = {
            "actions": list(actions),
            "applied": applied,
            "received": state.received,
            "snapshot_chunk": max(kept, default=None),
            "encoding": session.encoding,
        }
        reply = self.reply(chunk, self.chunk_frames, world=request.start, token=session.token, **stats)
        if session.encoding == "raw":
            frames = reply.frames.copy()
            frames[:, :, -1, :, 0] = np.frombuffer(bytes.fromhex(state.digest), np.uint8)[: self.width]
            return dataclasses.replace(reply, frames=frames)
        if session.encoder is None:
            session.encoder = Encoder(session.encoding, self.height, self.width)
        packets = [session.encoder(frame) for frame in reply.frames[0]]
        told = self.reply(chunk, self.chunk_frames, world=request.start, token=session.token, **stats,
                          packets=[len(packet) for packet in packets])  # fmt: skip
        video = np.frombuffer(b"".join(packets), np.uint8)[None]
        return Reply(np.zeros((1, 0, self.height, self.width, 3), np.uint8), told.stats, video)


class Encoder:
    def __init__(self, encoding: str, height: int, width: int) -> None:
        self.codec = None
        if encoding == "h264":
            self.codec = av.CodecContext.create("libx264", "w")
            self.codec.height, self.codec.width, self.codec.pix_fmt = height, width, "yuv420p"
            self.codec.time_base = Fraction(1, 24)
            self.codec.options = {
                "preset": "ultrafast",
                "tune": "zerolatency",
                "crf": "10",
                "x264-params": "keyint=9999",
            }
            self.frames = 0

    def __call__(self, frame: np.ndarray) -> bytes:
        if self.codec is None:
            file = io.BytesIO()
            Image.fromarray(frame).save(file, "JPEG", quality=95)
            return file.getvalue()
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture.pts, self.frames = self.frames, self.frames + 1
        (packet,) = self.codec.encode(picture)
        return bytes(packet)
