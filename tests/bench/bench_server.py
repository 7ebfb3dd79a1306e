"""The server that the hot path's benchmarks run on: one process a query, everything in memory."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Mapping, Optional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "e2e"))

import psycopg  # noqa: E402
from cluster import Cluster, extension_available  # noqa: E402
from helpers import new_key  # noqa: E402

SETTINGS = {
    "shared_buffers": "2GB",
    "max_parallel_workers_per_gather": 0,
    "jit": "off",
    "autovacuum": "off",
    "checkpoint_timeout": "1h",
    "max_wal_size": "16GB",
}
# One DEK for a whole table; nothing expires while it is measured.
ONE_DEK = ("dek_max_uses = 2000000000", "dek_max_bytes = 2000000000", "dek_max_age = 86400")


def have(extension: str) -> bool:
    """Whether this PostgreSQL has the extension; says so where it has not."""
    found = extension_available(extension)
    if not found:
        print(f"{extension} is not installed in this PostgreSQL: what needs it is not measured")
    return found


@contextmanager
def server(settings: Optional[Mapping[str, object]] = None, environment: Optional[Mapping[str, str]] = None) -> Iterator[Cluster]:
    """A cluster with the extensions that are there, and a KEK named default in a file."""
    with Cluster({**SETTINGS, **(settings or {})}, environment or {}) as cluster:
        path = cluster.server_file("kek.b64", new_key() + "\n")
        with cluster.connect() as connection:
            for extension in ("vod_tender_crypto", "vod_tender_floor", "pgcrypto"):
                if extension_available(extension):
                    connection.execute(f"CREATE EXTENSION {extension}")
            connection.execute("SELECT vod_tender_crypto.add_key('default', %s)", [f"local://{path}"])
        yield cluster


def session(cluster: Cluster, *settings: str) -> psycopg.Connection:
    """A session with these settings of the extension's. Statements are not prepared: each run is planned alike."""
    connection = cluster.connect(prepare_threshold=None)
    connection.execute("LOAD 'vod_tender_crypto'")
    set_all(connection, *settings)
    return connection


def set_all(connection: psycopg.Connection, *settings: str) -> None:
    """Set settings of the extension's, given as `name = value`."""
    for setting in settings:
        connection.execute(f"SET vod_tender_crypto.{setting}")
