"""A real `mlflow server` on loopback, with SQLite behind it, and other servers that a test starts as processes.

with tracking_server(folder) as address:     # http://127.0.0.1:PORT
    ...
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

SECONDS = 300


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def serving(command: list[str], ready: str, environment: Mapping[str, str], log: Path) -> Iterator[None]:
    """Runs a server until the block ends; the block begins when `ready`, an address, answers."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", *command],
            env={**os.environ, **environment},
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + SECONDS
        while True:
            try:
                urllib.request.urlopen(ready, timeout=10).close()
                break
            except OSError as error:
                assert process.poll() is None and time.monotonic() < end, f"{error}\n{log.read_text()}"
                time.sleep(0.5)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def tracking_server(folder: Path, port: int | None = None) -> Iterator[str]:
    """The address of a tracking server whose database and artifacts are in `folder`."""
    port = port or free_port()
    address = f"http://127.0.0.1:{port}"
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/server.db",
        "--artifacts-destination",
        f"{folder}/artifacts",
    ]
    with serving(command, f"{address}/health", {"MLFLOW_DISABLE_TELEMETRY": "true"}, folder / "server.log"):
        yield address
