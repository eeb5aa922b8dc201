"""The server of `retro serve`: a socket, the application behind its guard, and how it ends."""

import socket
from collections.abc import Sequence

import uvicorn

from retro_model.core.errors import ConfigError
from retro_model.serving.application import create_application
from retro_model.serving.guard import Guard
from retro_model.serving.service import Service

MOST_CONNECTIONS = 256  # more get 503
ENDING_SECONDS = 1  # how long answers may take to leave after Ctrl-C


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on the address; port 0 takes a free one. Raises ConfigError if that is not possible."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"--host, --port: cannot listen on {host}, port {port} ({error.strerror}); expected an address of this "
            "machine and a free port: name another one, or end the program that uses it"
        ) from error


class Server(uvicorn.Server):
    """Serves until Ctrl-C or SIGTERM; then what runs is ended at once, and not waited for."""

    def __init__(self, service: Service, host: str, allowed_hosts: Sequence[str] = ()) -> None:
        config = uvicorn.Config(
            Guard(create_application(service), host, allowed_hosts),
            http="h11",
            ws="none",
            lifespan="off",
            proxy_headers=False,
            server_header=False,
            access_log=False,
            log_level="error",
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=ENDING_SECONDS,
        )
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the work first, so that no answer waits for it."""
        self._service.worker.stop()
        await super().shutdown(sockets)


def serve(service: Service, listening: socket.socket, host: str, allowed_hosts: Sequence[str] = ()) -> None:
    """Serve on the socket until Ctrl-C, which raises KeyboardInterrupt."""
    try:
        Server(service, host, allowed_hosts).run(sockets=[listening])
    finally:
        service.worker.close()
