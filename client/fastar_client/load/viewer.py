"""The connection of one viewer: through a relay where it is to break."""

from __future__ import annotations

from tritonclient.grpc.aio import InferenceServerClient

from fastar_client.load.relay import Relay
from fastar_client.transport import CHANNEL, GrpcTransport, TlsFiles


class ViewerTransport(GrpcTransport):
    """gRPC to `url`; where `relay` is given through it, with TLS as if it went to the relay's target itself."""

    def __init__(self, url: str, tls: bool | TlsFiles = False, relay: Relay | None = None) -> None:
        super().__init__(url if relay is None else relay.url, tls)
        self._relay = relay

    def _new_client(self) -> InferenceServerClient:
        if self._relay is None:
            return super()._new_client()
        names = [
            ("grpc.ssl_target_name_override", self._relay.host),
            ("grpc.default_authority", self._relay.target),
        ]
        return InferenceServerClient(self.url, creds=self._credentials, channel_args=[*CHANNEL, *names])
