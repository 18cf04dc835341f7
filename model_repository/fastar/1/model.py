"""The Triton edge: requests -> the service's `Request`s; `Reply`s -> responses. Protocol: docs/structure.md."""

from __future__ import annotations

import functools
import json
import logging
import os
import threading
from typing import Any

import torch
import triton_python_backend_utils as pb_utils

from fastar_backend.config import AttentionConfig, ExecutionConfig, parse
from fastar_backend.engine.engine import StreamEngine
from fastar_backend.errors import InvalidInput
from fastar_backend.service.config import ServiceConfig
from fastar_backend.service.report import as_fastar_error
from fastar_backend.service.service import Service
from fastar_backend.service.session import Reply, Request, json_object
from fastar_backend.service.store import open_store
from fastar_backend.service.telemetry import Metrics, Tracing, triton_factory

LIMITS = {"ACTIONS": (64, 256), "PROMPT": (1, 4096), "OPTIONS": (1, 8192), "CONTROL": (1, 8192)}  # elements, bytes each
WATCH_SECONDS = 0.1
DRAIN = "FASTAR_DRAIN_FILE"  # in the environment: a file that `fastar serve` makes to have us drain; we remove it then
MOVE = "FASTAR_MOVE_FILE"  # likewise: it holds how many streams are to go on elsewhere
HEADER = 64  # bytes of a request header that we read
STATUS = {  # names in pb_utils.TritonError, which knows no RESOURCE_EXHAUSTED; the rest is INTERNAL
    "INVALID_ARGUMENT": "INVALID_ARG",
    "NOT_FOUND": "NOT_FOUND",
    "RESOURCE_EXHAUSTED": "UNAVAILABLE",
    "UNAVAILABLE": "UNAVAILABLE",
    "CANCELLED": "CANCELLED",
}
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        """Loads, warms up and measures, so that the model is not ready before; raises TritonModelException."""
        log = logging.getLogger("fastar")
        log.setLevel(logging.INFO)  # a drain's progress
        log.addHandler(logging.StreamHandler())
        log.propagate = False
        config = json.loads(args["model_config"])
        settings = {key: value["string_value"] for key, value in config["parameters"].items()}
        settings = {key: os.environ.get(f"FASTAR_{key.upper()}", value) for key, value in settings.items()}
        if settings["device"] == "auto":
            settings["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            text = settings["attention"]
            values = json_object(text, "attention") if text.startswith("{") else {"kind": text}
            attention = parse(AttentionConfig, values, "attention")
            limits = parse(ServiceConfig, json_object(settings["service"], "service"), "service")
            execution = {name: settings[name] for name in ExecutionConfig.model_fields}
            load = functools.partial(
                StreamEngine.load, settings["world"], settings["device"], attention, limits.max_streams,
                deterministic=limits.deterministic, execution=parse(ExecutionConfig, execution, "execution"),
            )  # fmt: skip
            url = os.environ.get("FASTAR_SNAPSHOTS") or limits.snapshots or "memory://fastar"
            store = open_store(url, limits.snapshots_kept, limits.snapshot_ttl)
            self.service = Service(load, limits, Metrics(triton_factory(pb_utils)), store, Tracing.from_environment())
        except Exception as error:
            reason = as_fastar_error(error)
            pb_utils.Logger.log_error(f"fastar: cannot load: {reason}")
            raise pb_utils.TritonModelException(str(reason)) from None
        world, seconds = self.service.world, self.service.cost(1)
        self.shape = (0, world["height"], world["width"], 3)
        self.server = os.getppid()
        self.stopping = threading.Event()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        pb_utils.Logger.log_info(f"fastar: world {world['name']} on {settings['device']}, {seconds:.2f} s a chunk")

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self.service.submit(self._read(request, sender))
            except Exception as error:
                self._answer(sender, Reply(error=as_fastar_error(error)))

    def finalize(self) -> None:
        self.stopping.set()
        self.service.close()

    def _read(self, request: Any, sender: Any) -> Request:
        """Raises InvalidInput."""
        if not isinstance(request.correlation_id(), int):
            raise InvalidInput("sequence_id", "is text", "an integer, 1..2^63-1")
        flags, headers = request.flags(), json.loads(request.parameters() or "{}")
        headers = {key.lower(): value for key, value in headers.items() if isinstance(value, str)}
        result = Request(
            request.correlation_id(),
            lambda reply: self._answer(sender, reply),
            starts=bool(flags & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START),
            ends=bool(flags & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END),
            tenant=headers.get("x-fastar-tenant", "default"),
            traceparent=triton_span(request) or headers.get("traceparent", "")[:HEADER] or None,
            cancelled=sender.is_cancelled,
            migrates=headers.get("x-fastar-migrate") == "1",
        )
        try:
            result.actions = texts(request, "ACTIONS")
            (result.prompt,), (result.options,) = texts(request, "PROMPT"), texts(request, "OPTIONS")
            if result.actions == ("control",):
                (result.control,) = texts(request, "CONTROL") or ("",)
            elif texts(request, "CONTROL"):
                raise InvalidInput("CONTROL", "came with a chunk's request", 'with ACTIONS "control" only')
            if result.control is not None and (result.starts or result.ends):
                raise InvalidInput("CONTROL", "came with START or END", "between them")
        except InvalidInput as error:
            self.service.fail(result, error)
            raise
        return result

    def _answer(self, sender: Any, reply: Reply) -> None:
        if reply.error:
            status = getattr(pb_utils.TritonError, STATUS.get(reply.error.code, "INTERNAL"))
            error = pb_utils.TritonError(f"{reply.error.code}: {reply.error}", status)
            sender.send(pb_utils.InferenceResponse(error=error), flags=FINAL)
            return
        frames = torch.zeros(self.shape, dtype=torch.uint8)
        if reply.frames is not None:
            frames = torch.from_numpy(reply.frames).contiguous()
        # By DLPack: numpy >= 2 arrays come out of older Triton servers as zero bytes, without an error.
        outputs = {
            "FRAMES": frames,
            "VIDEO": as_bytes(reply.video),
            "STATS": as_bytes(json.dumps(reply.stats).encode()),
        }
        tensors = [pb_utils.Tensor.from_dlpack(name, value[None]) for name, value in outputs.items()]
        sender.send(pb_utils.InferenceResponse(tensors), flags=FINAL)

    def _watch(self) -> None:
        drain, file, move = self.service.drain, os.environ.get(DRAIN), os.environ.get(MOVE)
        while not self.stopping.wait(WATCH_SECONDS):
            if os.getppid() != self.server:  # tritonserver was killed: it takes its model process with it
                os._exit(1)
            if move and os.path.exists(move):
                with open(move) as text:
                    drain.shed(int(text.read()))
                os.unlink(move)
            if file and os.path.exists(file):
                drain.begin()
                if drain.over.is_set():
                    os.unlink(file)


def triton_span(request: Any) -> str | None:
    """W3C context of Triton's own span of the request, where it is traced (`fastar serve --trace-rate`)."""
    context = request.trace().get_context()
    return json.loads(context).get("traceparent") if context else None


def as_bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


def texts(request: Any, name: str) -> tuple[str, ...]:
    """One BYTES [1, n] input, decoded; () where it is absent. Raises InvalidInput where it is larger than LIMITS or
    not UTF-8."""
    count, size = LIMITS[name]
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return ()
    values = tensor.as_numpy().reshape(-1).tolist()
    if not 1 <= len(values) <= count:
        raise InvalidInput(name, f"{len(values)} elements", f"1..{count}")
    if (largest := max(map(len, values))) > size:
        raise InvalidInput(name, f"{largest} bytes", f"at most {size} bytes of UTF-8")
    try:
        return tuple(value.decode() for value in values)
    except UnicodeDecodeError as error:
        raise InvalidInput(name, f"byte {error.start} is not UTF-8", f"at most {size} bytes of UTF-8") from None
