"""The connection of one viewer: closed at once when its viewer leaves, and through a relay where it is to break."""

from __future__ import annotations

from collections.abc import Mapping

from tritonclient.grpc.aio import InferenceServerClient

from fastar_client.load.relay import Relay
from fastar_client.transport import CHANNEL, Call, GrpcCall, GrpcTransport, TlsFiles


class ViewerTransport(GrpcTransport):
    """gRPC to `url`; where `relay` is given through it, with TLS as if it went to the relay's target itself."""

    def __init__(self, url: str, tls: bool | TlsFiles = False, relay: Relay | None = None) -> None:
        super().__init__(url if relay is None else relay.url, tls)
        self._relay = relay

    def open(self, metadata: Mapping[str, str] | None = None, fresh: bool = False) -> Call:
        client = self._new_client() if fresh else self._connected()
        return ViewerCall(client, self, metadata or {}, own=fresh)

    def _new_client(self) -> InferenceServerClient:
        if self._relay is None:
            return super()._new_client()
        names = [
            ("grpc.ssl_target_name_override", self._relay.host),
            ("grpc.default_authority", self._relay.target),
        ]
        return InferenceServerClient(self.url, creds=self._credentials, channel_args=[*CHANNEL, *names])


class ViewerCall(GrpcCall):
    """Lets go of gRPC's call when it is closed. A stream and its call refer to each other, so they would live on until
    Python collects its garbage; and as long as the call lives, gRPC keeps the TCP connection open: viewers who have
    left would use up the sockets."""

    async def close(self) -> None:
        await super().close()
        self._replies = Over()


class Over:
    def cancel(self) -> None:
        pass
