"""What the number of DEKs costs: a token column whose rows are under 1 to 10,000 of them, in random order."""

from __future__ import annotations

from typing import Dict, Tuple

from bench_server import ONE_DEK, server, session
from helpers import one
from interleaved import Times, interleaved, query_run
from tables import Shape, envelopes, make_envelopes, make_plain

SIZE = 200
COUNTS = (1, 10, 100, 1000, 10_000)
# Room for all of them, and the extension's default, which 10,000 exceed: then most are opened anew, here out of a file.
ROOMS = (20_000, 1000)
Counted = Dict[Tuple[int, int], Times]


def measure(rows: int, repeats: int) -> Counted:
    """Seconds a row, by the room in the cache and the number of DEKs."""
    runs = {}
    with server() as cluster:
        with session(cluster) as connection:
            make_plain(connection, Shape(SIZE, rows, 1))
        for count in COUNTS:
            if count > rows:
                continue
            make_envelopes(cluster, Shape(SIZE, rows, count), "bytea", count, False)
            for room in ROOMS:
                connection = session(cluster, *ONE_DEK, f"dek_cache_entries = {room}")
                query = f"SELECT sum(octet_length(envelope_decrypt(v))) FROM {envelopes('bytea', count, False)}"
                runs[room, count] = query_run(connection, query, rows, SIZE * rows)
                runs[room, count]()
                cached = one(connection, "SELECT vod_tender_crypto.session_stats() -> 'cached_deks'")
                expected = min(-(-rows // -(-rows // count)), room)
                assert cached == expected, f"{cached} DEKs are cached instead of {expected}"
        return interleaved(runs, repeats)


def text(counted: Counted, rows: int) -> str:
    """The result, as docs/BENCHMARKS.md shows it."""
    counts = sorted({count for _, count in counted})
    lines = [f"Nanoseconds a row, whole query, {rows:,} values of {SIZE} bytes; in brackets how many times one DEK.", "",
             "| `dek_cache_entries` | " + " | ".join(f"{count:,} DEK{'s' if count > 1 else ''}" for count in counts) + " |",
             "| --- |" + " --- |" * len(counts)]
    for room in ROOMS:
        one = counted[room, 1].median
        cells = (f"{1e9 * counted[room, count].median:,.0f} ({counted[room, count].median / one:.2f})" for count in counts)
        lines.append(f"| {room:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
