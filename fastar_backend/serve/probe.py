"""The canary: a real inference through gRPC, whose bytes are looked at. "Ready" from Triton alone proves nothing:
with its model process dead, or its outputs silently empty, Triton goes on saying that it is ready."""

from __future__ import annotations

import contextlib
import json
import secrets
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from fastar_backend.serve.settings import ServerError


class Probe:
    """Holds one sequence of its own, whose only action is "end": it generates nothing and opens no stream.

    One sequence for all checks, so that a check needs no free place among Triton's sequences.
    """

    def __init__(self, url: str) -> None:
        self.client = triton.InferenceServerClient(url)
        self.sequence = secrets.randbits(62) + 1
        self.started = False

    def check(self, timeout: float) -> dict[str, Any]:
        """The reply's STATS; raises ServerError with what is wrong, after `timeout` seconds at most."""
        try:
            return self._ask(timeout, end=False)
        except ServerError:
            self.started = False
            raise

    def close(self) -> None:
        """Ends the sequence: a server that drains would wait for it."""
        if self.started:
            with contextlib.suppress(ServerError):
                self._ask(5.0, end=True)
        self.client.close()

    def _ask(self, timeout: float, end: bool) -> dict[str, Any]:
        start, self.started = not self.started, True
        inputs = []
        for name, value in {"ACTIONS": b"end", "PROMPT": b"", "OPTIONS": b""}.items():
            tensor = triton.InferInput(name, [1, 1], "BYTES")
            tensor.set_data_from_numpy(np.array([[value]], dtype=np.object_))
            inputs.append(tensor)
        try:
            reply = self.client.infer(
                "fastar",
                inputs,
                sequence_id=self.sequence,
                sequence_start=start,
                sequence_end=end,
                client_timeout=timeout,
            )
            frames, stats = reply.as_numpy("FRAMES"), reply.as_numpy("STATS")
        except InferenceServerException as error:
            raise ServerError(f"the health check failed: {error.message()}") from None
        if frames is None or stats is None or frames.ndim != 5:
            raise ServerError("the health check's reply lacks FRAMES or STATS")
        try:
            values = json.loads(stats.tobytes())
            if not isinstance(values["process_bytes"], int) or (start and not values["world"]["name"]):
                raise ValueError("not ChunkStats")
        except (ValueError, KeyError, TypeError):
            raise ServerError(
                "the server returns wrong bytes: its STATS is not what the model wrote "
                "(known of older Triton servers with numpy 2 in the model's environment)"
            ) from None
        return values
