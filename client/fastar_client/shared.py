"""Frames through system shared memory, for a server on the same host: the server writes them where the client reads.

Each stream has a few regions. A request names the one for its FRAMES; its reply's id says which it was. Frames are
copied out at once, so that a region is free again as soon as its reply has been read.
"""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import socket
from collections import deque

import numpy as np
from tritonclient.grpc import InferRequestedOutput, InferResult
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException, shared_memory

from fastar_client.errors import InvalidArgument, ServerError, ServerUnavailable, invalid
from fastar_client.protocol import FRAMES, OUTPUTS

REGIONS = 3  # two requests in flight, and one more while a stream is being taken up again
CALL_SECONDS = 5.0  # (un)registering a region


def check_same_host(url: str) -> None:
    """Raises InvalidArgument where `url` (host:port) is not this host by its name or address."""
    host = url.rpartition(":")[0].strip("[]")
    if host in ("localhost", socket.gethostname()):
        return
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return
    raise invalid("shared_memory", url, "a server on this host (localhost or a loopback address)")


class Ring:
    """The regions of one stream, registered with the server. `close` unregisters and unlinks them."""

    def __init__(self, client: InferenceServerClient, size: int) -> None:
        self._client, self._size = client, size
        self._regions: dict[str, shared_memory.SharedMemoryRegion] = {}
        self._registered: list[str] = []
        self._free: deque[str] = deque()
        self.used = 0  # chunks whose frames came through here

    async def open(self) -> None:
        """Raises InvalidArgument where memory cannot be shared, also with a server that sees other memory."""
        try:
            for _ in range(REGIONS):
                name = f"fastarclient_{secrets.token_hex(8)}"
                region = shared_memory.create_shared_memory_region(name, name, self._size, create_only=True)
                self._regions[name] = region
                register = self._client.register_system_shared_memory
                await register(name, f"/{name}", self._size, client_timeout=CALL_SECONDS)
                self._registered.append(name)
                self._free.append(name)
        except (InferenceServerException, shared_memory.SharedMemoryException, OSError) as error:
            await self.close()
            if isinstance(error, InferenceServerException) and "UNAVAILABLE" in str(error.status()):
                raise ServerUnavailable(f"shared_memory: the server is gone ({error.message()})") from None
            what = error.message() if isinstance(error, InferenceServerException) else error
            why = f"shared_memory: the server does not share this host's memory ({what})"
            raise InvalidArgument(f"{why}; allowed: a server on this host and in its IPC namespace") from None

    def outputs(self) -> tuple[str, list[InferRequestedOutput]] | None:
        """Request id and outputs of the next chunk request; None: no region is free, let frames travel as usual."""
        if not self._free:
            return None
        name = self._free.popleft()
        outputs = [InferRequestedOutput(output) for output in OUTPUTS]
        outputs[OUTPUTS.index(FRAMES)].set_shared_memory(name, self._size)
        return name, outputs

    def frames(self, result: InferResult) -> np.ndarray | None:
        """A copy of the frames that the server wrote (uint8 [1, frames, height, width, 3]); None: not through here."""
        response = result.get_response()
        name = response.id
        if name not in self._regions:
            return None
        if name not in self._free:
            self._free.append(name)
        # Triton does not say where it wrote; an output in shared memory has a shape, and no bytes in the reply.
        outputs = zip(response.outputs, response.raw_output_contents, strict=False)
        shape = next((list(output.shape) for output, raw in outputs if output.name == FRAMES and not raw), [0])
        if not all(size > 0 for size in shape):
            return None
        if np.prod(shape) > self._size:
            raise ServerError(f"{FRAMES}: got {shape} in {self._size} bytes of shared memory")
        self.used += 1
        return shared_memory.get_contents_as_numpy(self._regions[name], np.uint8, shape).copy()

    async def close(self) -> None:
        """May be called again; never raises."""
        registered, self._registered = self._registered, []
        self._free.clear()
        for name in registered:
            with contextlib.suppress(Exception):  # a server that is gone has forgotten them anyway
                await self._client.unregister_system_shared_memory(name, client_timeout=CALL_SECONDS)
        while self._regions:
            with contextlib.suppress(OSError, shared_memory.SharedMemoryException):
                shared_memory.destroy_shared_memory_region(self._regions.popitem()[1])
