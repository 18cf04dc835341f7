"""The wire protocol by hand: tritonclient alone, so that these tests do not depend on the client package."""

from __future__ import annotations

import contextlib
import json
import queue
import re
import secrets
import time
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import psutil
import tritonclient.grpc as triton

MODEL_PROCESS = "triton_python_backend_stub"
CODES = "INVALID_ARGUMENT|NOT_FOUND|RESOURCE_EXHAUSTED|FAILED_PRECONDITION|UNAVAILABLE|CANCELLED|INTERNAL"


class Refused(Exception):
    """A reply that is an error. The message is as it came."""

    @property
    def code(self) -> str:
        match = re.search(rf"\b({CODES}): ", str(self))
        return match[1] if match else ""


class Stream:
    """One sequence on one gRPC stream."""

    def __init__(self, url: str, sequence: int | str | None = None, headers: dict[str, str] | None = None) -> None:
        self.client = triton.InferenceServerClient(url)
        self.sequence = secrets.randbits(62) + 1 if sequence is None else sequence
        self.replies: queue.Queue = queue.Queue()
        self.client.start_stream(lambda result, error: self.replies.put((result, error)), headers=headers)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Half-closes; `vanish` is the rude way."""
        self.client.stop_stream()
        self.client.close()

    def vanish(self) -> None:
        self.client.stop_stream(cancel_requests=True)
        self.client.close()

    def send(
        self,
        actions: Sequence[str | bytes] = ("",),
        prompt: str | bytes = "",
        options: Any = "",
        start: bool = False,
        end: bool = False,
        inputs: Sequence[Any] | None = None,
    ) -> None:
        if inputs is None:
            text = options if isinstance(options, str) else json.dumps(options)
            inputs = [tensor("ACTIONS", actions), tensor("PROMPT", [prompt]), tensor("OPTIONS", [text])]
        self.client.async_stream_infer(
            "fastar", inputs, sequence_id=self.sequence, sequence_start=start, sequence_end=end
        )

    def reply(self, timeout: float = 120) -> tuple[np.ndarray, dict[str, Any]]:
        """Frames [n, height, width, 3] and stats; raises Refused."""
        result, error = self.replies.get(timeout=timeout)
        if error is not None:
            raise Refused(error.message())
        frames, self.video = result.as_numpy("FRAMES"), result.as_numpy("VIDEO").tobytes()
        assert frames.shape[0] == 1
        return frames[0], json.loads(result.as_numpy("STATS").tobytes())

    def control(self, **values: Any) -> dict[str, Any]:
        """Sends a control; its receipt, while no chunk's reply is due."""
        texts = {"ACTIONS": "control", "PROMPT": "", "OPTIONS": "", "CONTROL": json.dumps(values)}
        self.send(inputs=[tensor(name, [text]) for name, text in texts.items()])
        return self.reply()[1]

    def chunk(self, *args: Any, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        self.send(*args, **kwargs)
        return self.reply()


def tensor(name: str, values: Sequence[str | bytes]) -> triton.InferInput:
    encoded = [value.encode() if isinstance(value, str) else value for value in values]
    result = triton.InferInput(name, [1, len(encoded)], "BYTES")
    result.set_data_from_numpy(np.array([encoded], dtype=np.object_))
    return result


def solo(url: str, chunks: int, prompt: str, seed: int, actions: Sequence[str] = ("",)) -> list[np.ndarray]:
    """A whole stream alone: its chunks' frames."""
    with Stream(url) as stream:
        sent = [
            {"prompt": prompt if i == 0 else "", "options": {"seed": seed}, "start": i == 0, "end": i == chunks - 1}
            for i in range(chunks)
        ]
        return [stream.chunk(actions, **kwargs)[0] for kwargs in sent]


def metric(server: Any, name: str) -> float:
    with urllib.request.urlopen(server.metrics_url, timeout=10) as reply:
        return float(re.search(rf"^{name}(?:{{.*}})? (\S+)$", reply.read().decode(), re.MULTILINE)[1])


def until(condition: Callable[[], Any], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False


def descendants(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def gone(processes: Sequence[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)
