"""`fastar serve`: starts, watches, restarts and drains one tritonserver that serves the `fastar` model."""

from fastar_backend.serve.server import Server
from fastar_backend.serve.settings import ServerError, ServeSettings

__all__ = ["ServeSettings", "Server", "ServerError"]
