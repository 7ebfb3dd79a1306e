"""Endpoints that are of no use: one that accepts and never answers, one that nobody listens on."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Iterator


class BlackHole:
    """A listening socket that accepts every connection, reads nothing and answers nothing."""

    def __init__(self):
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._held: "list[socket.socket]" = []
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._accept, name="black-hole", daemon=True)
        self._thread.start()

    def __enter__(self) -> "BlackHole":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    @property
    def accepted(self) -> int:
        """How many connections were accepted so far."""
        return len(self._held)

    def wait_for_connection(self, count: int = 1, timeout: float = 10) -> None:
        """Return once `count` connections came in: the caller is stuck in here now."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._held) >= count, timeout):
                raise TimeoutError(f"{len(self._held)} of {count} connections after {timeout} s")

    def close(self) -> None:
        """Stop accepting and drop every connection."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept(), which close() would not
        self._thread.join(5)
        self._listener.close()
        for connection in self._held:
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._changed:
                self._held.append(connection)
                self._changed.notify_all()


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    """A loopback port that refuses connections for as long as the block lasts.

    The port stays bound without listening: nobody else can be given it meanwhile.
    """
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def free_port() -> int:
    """A port that was free a moment ago, for a server that cannot choose one itself."""
    with closed_port() as port:
        return port
