"""What the gateway sees of a server, small: gRPC streams and health checks, and an admin port that tells of room."""

from __future__ import annotations

import concurrent.futures
import secrets

import grpc
from fake_api import Quiet, Served

STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
SERVING = b"\x08\x01"  # grpc.health.v1.HealthCheckResponse


class SmallServer:
    """Answers each message of a stream with its own name. state: what its admin port says, as the real one does."""

    def __init__(self, name: str, host: str = "127.0.0.1", grpc_port: int = 0, admin_port: int = 0) -> None:
        self.name, self.state = name, "open"
        self.server = grpc.server(concurrent.futures.ThreadPoolExecutor(16))
        streams = {"ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self._answer)}
        health = {"Check": grpc.unary_unary_rpc_method_handler(lambda request, context: SERVING)}
        self.server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler("inference.GRPCInferenceService", streams),
                grpc.method_handlers_generic_handler("grpc.health.v1.Health", health),
            )
        )
        self.port = self.server.add_insecure_port(f"{host}:{grpc_port}")
        outer = self

        class Handler(Quiet):
            protocol_version = "HTTP/1.0"

            def do_GET(self) -> None:
                degraded = {"x-envoy-degraded": "true"} if outer.state in ("full", "closed") else {}
                self.reply(200 if self.path == "/placement" else 404, outer.state.encode(), "text/plain", degraded)

        self.admin = Served(Handler, host, admin_port)
        self.server.start()

    @property
    def ports(self) -> tuple[int, int]:
        """For streams; of the admin port."""
        return self.port, self.admin.port

    def _answer(self, messages, context):
        for _ in messages:
            yield self.name.encode()

    def stop(self) -> None:
        self.admin.stop()
        self.server.stop(None).wait()


def ask(channel: grpc.Channel, **headers: str) -> tuple[str, str]:
    """One short stream -> name of its server; the pin that came back, "" where it is the one that was sent."""
    metadata = [(f"x-fastar-{name}", value) for name, value in headers.items()]
    call = channel.stream_stream(STREAM)(iter([b"1", b"2"]), metadata=metadata, timeout=10)
    answers = {answer.decode() for answer in call}
    assert len(answers) == 1, "one call, one server"
    return answers.pop(), dict(call.initial_metadata()).get("x-fastar-pod", "")


def pins(channel: grpc.Channel, count: int) -> dict[str, str]:
    """Name of each of so many servers -> its pin. By ids: those reach closed ones, too."""
    found: dict[str, str] = {}
    while len(found) < count:
        found.update([ask(channel, stream=secrets.token_hex(8))])
    return found
