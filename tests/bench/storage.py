"""Whether a column's storage matters: PostgreSQL tries to compress values above 2 kB, and ciphertext does not compress."""

from __future__ import annotations

from typing import Dict, Tuple

from bench_server import ONE_DEK, server, session
from interleaved import Times, interleaved, query_run
from tables import KINDS, Shape, envelopes, make_envelopes, make_plain

SIZES = (200, 3000, 16_384)
STORAGES = ("EXTENDED", "EXTERNAL")
Stored = Dict[Tuple[str, int], Dict[str, Times]]


def measure(rows: int, repeats: int) -> Stored:
    """Seconds a row of writing and of decrypting, by type and size."""
    found: Stored = {}
    with server() as cluster, session(cluster, *ONE_DEK) as connection:
        for size in SIZES:
            shape = Shape(size, max(rows // (10 if size < 1000 else 40), 100), 1)
            make_plain(connection, shape)
            for kind in KINDS:
                make_envelopes(cluster, shape, kind, 1, False)
                found[kind, size] = interleaved(_runs(connection, shape, kind), repeats)
                for table in (*(f"s_{storage}" for storage in STORAGES), envelopes(kind, 1, False)):
                    connection.execute(f"DROP TABLE {table}")
            connection.execute("DROP TABLE plain_text, plain_bytea")
    return found


def _runs(connection, shape: Shape, kind: str) -> dict:
    # What is written comes out of an expression, as a function's result does: a stored value would keep its form.
    source = f"SELECT v || ''::{kind} FROM {envelopes(kind, 1, False)}"
    runs = {}
    for storage in STORAGES:
        connection.execute(f"CREATE TABLE s_{storage} (v {kind})")
        connection.execute(f"ALTER TABLE s_{storage} ALTER v SET STORAGE {storage}")
        write = f"WITH written AS (INSERT INTO s_{storage} {source} RETURNING 1) SELECT count(*) FROM written"
        runs[f"write {storage}"] = _emptied(connection, storage, query_run(connection, write, shape.rows, shape.rows))
        read = f"SELECT sum(octet_length(envelope_decrypt(v))) FROM s_{storage}"
        runs[f"decrypt {storage}"] = query_run(connection, read, shape.rows, shape.rows * shape.size)
    return runs


def _emptied(connection, storage: str, run):
    """A run into an empty table. What it wrote stays, to be read by the one after it, in whichever order they come."""

    def emptied() -> float:
        connection.execute(f"TRUNCATE s_{storage}")
        return run()

    return emptied


def text(stored: Stored) -> str:
    """The result, as docs/BENCHMARKS.md shows it."""
    names = list(next(iter(stored.values())))
    lines = ["Microseconds a row:", "", "| values | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for (kind, size), times in stored.items():
        cells = (f"{1e6 * times[name].median:.1f}" for name in names)
        lines.append(f"| {kind}, {size:,} bytes of plaintext | " + " | ".join(cells) + " |")
    return "\n".join(lines)
