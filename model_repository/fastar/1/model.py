"""The Triton edge: requests -> `ChunkRequest`s -> one engine step -> responses. Protocol: docs/structure.md."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import threading
import traceback
from typing import Any

import psutil
import torch
import triton_python_backend_utils as pb_utils

from fastar_backend.config import AttentionConfig, parse
from fastar_backend.engine.engine import StreamEngine
from fastar_backend.engine.stream import Chunk, ChunkRequest, ChunkStats, StreamOptions
from fastar_backend.errors import FastarError, InvalidInput

LIMITS = {"ACTIONS": (64, 256), "PROMPT": (1, 4096), "OPTIONS": (1, 8192)}  # elements, bytes of each
IDLE_MARGIN = 5.0  # seconds that a stream outlives Triton's idle limit, so that Triton is the first to forget it
STATUS = {  # names in pb_utils.TritonError, which knows no RESOURCE_EXHAUSTED; the rest is INTERNAL
    "INVALID_ARGUMENT": "INVALID_ARG",
    "NOT_FOUND": "NOT_FOUND",
    "RESOURCE_EXHAUSTED": "UNAVAILABLE",
}
NOTHING = ChunkStats(-1, 0, 0, 0.0, 0, 0.0, None, 0.0, 0.0, 0.0, 0, False)  # of a request that generates no chunk


@dataclasses.dataclass(frozen=True)
class Call:
    """One request, read. `chunk` is None where nothing is to be generated."""

    stream_id: int
    starts: bool
    ends: bool
    chunk: ChunkRequest | None = None
    error: FastarError | None = None


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        """Loads and warms the engine up, so that the model is not ready before; raises TritonModelException."""
        config = json.loads(args["model_config"])
        settings = {key: value["string_value"] for key, value in config["parameters"].items()}
        settings = {key: os.environ.get(f"FASTAR_{key.upper()}", value) for key, value in settings.items()}
        if settings["device"] == "auto":
            settings["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            text = settings["attention"]
            values = json_object(text, "attention") if text.startswith("{") else {"kind": text}
            attention = parse(AttentionConfig, values, "attention")
            streams = int(settings["max_streams"])
            self.engine = StreamEngine.load(settings["world"], settings["device"], attention, streams)
            seconds = self.engine.warm_up()
        except Exception as error:
            reason = as_fastar_error(error)
            pb_utils.Logger.log_error(f"fastar: cannot load: {reason}")
            raise pb_utils.TritonModelException(str(reason)) from None
        self.world = self.engine.world_info()
        self.idle_seconds = config["sequence_batching"]["max_sequence_idle_microseconds"] / 1e6 + IDLE_MARGIN
        self.process = psutil.Process()
        self.server = os.getppid()
        self.active = Gauge("fastar_streams_active", "Streams that hold state in this process", 0)
        self.capacity = Gauge("fastar_streams_capacity", "Streams that this process admits", streams)
        self.lock = threading.Lock()  # the engine is stepped by Triton's thread and swept by ours
        self.stopping = threading.Event()
        self.sweeper = threading.Thread(target=self._sweep, name="sweep", daemon=True)
        self.sweeper.start()
        pb_utils.Logger.log_info(f"fastar: world {self.world['name']} on {settings['device']}, {seconds:.2f} s a chunk")

    def execute(self, requests: list[Any]) -> list[Any]:
        with self.lock:
            calls = [self._admit(request) for request in requests]
            asked = [call.chunk for call in calls if call.chunk]
            try:
                assert len({chunk.stream_id for chunk in asked}) == len(asked), "one stream twice in a batch"
                done = iter(self.engine.step(asked) if asked else [])
            except Exception as error:  # a bug, or no memory: what these streams hold is not to be trusted any more
                done = iter([as_fastar_error(error)] * len(asked))
            results = [call.error or (next(done) if call.chunk else None) for call in calls]
            over = [c for c, result in zip(calls, results, strict=True) if c.ends or isinstance(result, FastarError)]
            self._freed([self.engine.close(call.stream_id) for call in over])
        return [self._response(call, result) for call, result in zip(calls, results, strict=True)]

    def finalize(self) -> None:
        self.stopping.set()
        self.sweeper.join()

    def _admit(self, request: Any) -> Call:
        """Reads one request; START opens its stream, anew if the id is live. Failures are in the result."""
        flags = request.flags()
        starts = bool(flags & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START)
        call = Call(request.correlation_id(), starts, bool(flags & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END))
        try:
            if not isinstance(call.stream_id, int):
                raise InvalidInput("sequence_id", "is text", "an integer, 1..2^63-1")
            actions, prompts, options = (texts(request, name) for name in LIMITS)
            if starts:
                self.engine.close(call.stream_id)
            if actions == ("end",):
                return call
            if starts:
                values = parse(StreamOptions, json_object(options[0], "OPTIONS"), "OPTIONS")
                self.engine.open(call.stream_id, prompts[0], values)
            prompt = None if starts else prompts[0] or None
            return dataclasses.replace(call, chunk=ChunkRequest(call.stream_id, actions, prompt))
        except Exception as error:
            return dataclasses.replace(call, error=as_fastar_error(error))

    def _response(self, call: Call, result: Chunk | FastarError | None) -> Any:
        if isinstance(result, FastarError):
            status = getattr(pb_utils.TritonError, STATUS.get(result.code, "INTERNAL"))
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{result.code}: {result}", status))
        stats = (result.stats if result else NOTHING).as_json()
        stats["process_bytes"] = self.process.memory_info().rss
        if call.starts:
            stats["world"] = self.world
        frames = torch.zeros((0, self.world["height"], self.world["width"], 3), dtype=torch.uint8)
        if result:
            frames = torch.from_numpy(result.frames)
        encoded = torch.frombuffer(bytearray(json.dumps(stats).encode()), dtype=torch.uint8)
        # By DLPack: numpy >= 2 arrays come out of older Triton servers as zero bytes, without an error.
        outputs = {"FRAMES": frames.contiguous(), "STATS": encoded}
        return pb_utils.InferenceResponse([pb_utils.Tensor.from_dlpack(k, v[None]) for k, v in outputs.items()])

    def _sweep(self) -> None:
        """Frees streams whose client vanished: of a cancelled or idle sequence Triton tells the model nothing."""
        while not self.stopping.wait(1.0):
            if os.getppid() != self.server:  # tritonserver was killed: it takes its model process with it
                os._exit(1)
            with self.lock:
                self._freed(self.engine.sweep(self.idle_seconds))

    def _freed(self, closed: list[Any]) -> None:
        self.active.set(len(self.engine.stream_ids))
        if any(closed):
            ctypes.CDLL(None).malloc_trim(0)  # glibc would keep the freed cache for itself


def texts(request: Any, name: str) -> tuple[str, ...]:
    """One BYTES [1, n] input, decoded; raises InvalidInput where it is larger than LIMITS or not UTF-8."""
    count, size = LIMITS[name]
    values = pb_utils.get_input_tensor_by_name(request, name).as_numpy().reshape(-1).tolist()
    if not 1 <= len(values) <= count:
        raise InvalidInput(name, f"{len(values)} elements", f"1..{count}")
    if (largest := max(map(len, values))) > size:
        raise InvalidInput(name, f"{largest} bytes", f"at most {size} bytes of UTF-8")
    try:
        return tuple(value.decode() for value in values)
    except UnicodeDecodeError as error:
        raise InvalidInput(name, f"byte {error.start} is not UTF-8", f"at most {size} bytes of UTF-8") from None


def json_object(text: str, field: str) -> dict[str, Any]:
    """`text` as a JSON object ("" = {}); raises InvalidInput."""
    try:
        values = json.loads(text or "{}")
    except (ValueError, RecursionError):
        raise InvalidInput(field, "not JSON", "a JSON object, or an empty string for the defaults") from None
    if not isinstance(values, dict):
        raise InvalidInput(field, f"JSON {type(values).__name__}", "a JSON object") from None
    return values


def as_fastar_error(error: Exception) -> FastarError:
    """`error` itself if we raised it on purpose; else one line without details: they are in the server's log."""
    if isinstance(error, FastarError):
        return error
    # Torch and CUDA speak in RuntimeErrors; the message of any other might quote a prompt, which no log may hold.
    what = f": {error}" if isinstance(error, RuntimeError | OSError | ImportError) else ""
    frames = "".join(traceback.format_tb(error.__traceback__))
    pb_utils.Logger.log_error(f"{type(error).__name__}{what}\n{frames}")
    return FastarError(f"server: {type(error).__name__}, see the server's log; allowed: a new stream")


class Gauge:
    """One number on the metrics port."""

    def __init__(self, name: str, description: str, value: float) -> None:
        # The family must live as long as its metric.
        self.family = pb_utils.MetricFamily(name=name, description=description, kind=pb_utils.MetricFamily.GAUGE)
        self.metric = self.family.Metric(labels={})
        self.set = self.metric.set
        self.set(value)
