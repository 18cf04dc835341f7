"""The canary: a real inference through gRPC, whose bytes are looked at. "Ready" from Triton alone proves nothing:
with its model process dead, or its outputs silently empty, Triton goes on saying that it is ready."""

from __future__ import annotations

import contextlib
import json
import queue
import secrets
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from fastar_backend.serve.settings import ServerError, ServeSettings


class Probe:
    """Holds one sequence of its own, whose only action is "end": it generates nothing and opens no stream, but its
    reply comes from the thread that makes the chunks.

    One sequence for all checks, so that a check needs no free place among Triton's sequences.
    """

    def __init__(self, url: str, settings: ServeSettings) -> None:
        tls: dict[str, Any] = {}
        if settings.tls_key:
            own = {"private_key": str(settings.tls_key), "certificate_chain": str(settings.tls_certificate)}
            tls = {
                "ssl": True,
                "root_certificates": str(settings.tls_certificate),
                # One's own address need not be in the certificate.
                "channel_args": [("grpc.ssl_target_name_override", settings.tls_name)],
            } | (own if settings.tls_client_ca else {})
        self.client = triton.InferenceServerClient(url, **tls)
        self.sequence = 0  # none
        self.replies: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()

    def check(self, timeout: float) -> dict[str, Any]:
        """The reply's STATS; raises ServerError with what is wrong, after `timeout` seconds at most."""
        try:
            return self._ask(timeout, end=False)
        except ServerError:
            self._forget()
            raise

    def close(self) -> None:
        """Ends the sequence: a server that drains would wait for it."""
        if self.sequence:
            with contextlib.suppress(ServerError):
                self._ask(5.0, end=True)
        self._forget()
        self.client.close()

    def _forget(self) -> None:
        self.sequence = 0
        with contextlib.suppress(InferenceServerException):
            self.client.stop_stream(cancel_requests=True)

    def _ask(self, timeout: float, end: bool) -> dict[str, Any]:
        inputs = []
        for name, value in {"ACTIONS": b"end", "PROMPT": b"", "OPTIONS": b""}.items():
            tensor = triton.InferInput(name, [1, 1], "BYTES")
            tensor.set_data_from_numpy(np.array([[value]], dtype=np.object_))
            inputs.append(tensor)
        start = not self.sequence
        try:
            if start:
                self.sequence, self.replies = secrets.randbits(62) + 1, queue.Queue()
                replies = self.replies
                self.client.start_stream(lambda result, error: replies.put((result, error)))
            self.client.async_stream_infer(
                "fastar", inputs, sequence_id=self.sequence, sequence_start=start, sequence_end=end
            )
            reply, error = self.replies.get(timeout=timeout)
            if error is not None:
                raise error
            frames, stats = reply.as_numpy("FRAMES"), reply.as_numpy("STATS")
        except queue.Empty:
            raise ServerError(f"the health check failed: Deadline Exceeded, no answer in {timeout:g} s") from None
        except InferenceServerException as error:
            raise ServerError(f"the health check failed: {error.message()}") from None
        if frames is None or stats is None or frames.ndim != 5:
            raise ServerError("the health check's reply lacks FRAMES or STATS")
        try:
            values = json.loads(stats.tobytes())
            if not isinstance(values["process_bytes"], int) or (start and not values["world"]["name"]):
                raise ValueError("not STATS")
        except (ValueError, KeyError, TypeError):
            raise ServerError(
                "the server returns wrong bytes: its STATS is not what the model wrote "
                "(known of older Triton servers with numpy 2 in the model's environment)"
            ) from None
        return values
