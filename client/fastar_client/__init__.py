"""Client of FAST-AR Serve: live generated video from NVIDIA Triton, steered while it plays."""

import os

# Read when gRPC is imported. Its log lines on stderr say nothing that our exceptions do not; set the variable for more.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from fastar_client.blocking import BlockingConnection, BlockingReceipt, BlockingStream, connect_blocking
from fastar_client.controls import Receipt
from fastar_client.errors import (
    FastarError,
    InvalidArgument,
    NotFound,
    OutputError,
    ResourceExhausted,
    ServerError,
    ServerUnavailable,
    StreamLost,
    TakenOver,
    TimedOut,
)
from fastar_client.protocol import Chunk, ChunkStats, StreamOptions, World
from fastar_client.session import Connection, connect
from fastar_client.stream import Stream
from fastar_client.transport import TlsFiles

__all__ = [
    "BlockingConnection",
    "BlockingReceipt",
    "BlockingStream",
    "Chunk",
    "ChunkStats",
    "Connection",
    "FastarError",
    "InvalidArgument",
    "NotFound",
    "OutputError",
    "Receipt",
    "ResourceExhausted",
    "ServerError",
    "ServerUnavailable",
    "Stream",
    "StreamLost",
    "StreamOptions",
    "TakenOver",
    "TimedOut",
    "TlsFiles",
    "World",
    "connect",
    "connect_blocking",
]
__version__ = "0.1.0"
