"""What the extension costs a session before it is used, with the first call to a key service, and when it is idle."""

from __future__ import annotations

import argparse
import re
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Callable, Dict, List

import report
import targets
from bench_server import server, session, set_all
from helpers import one
from strict_kms import StrictKms, faults

LIBRARY = "vod_tender_crypto"
LATENCY = 0.05
DEKS = 1000


def private_mb(connection) -> float:
    """Private memory of a session's process, in MB."""
    return _rollup(connection, "Private_Clean") + _rollup(connection, "Private_Dirty")


def _rollup(connection, field: str) -> float:
    page = Path(f"/proc/{connection.info.backend_pid}/smaps_rollup").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", page, re.MULTILINE).group(1)) / 1024


def timed(connection, statement: str) -> float:
    """Milliseconds of a statement, as the client sees it."""
    began = time.perf_counter()
    connection.execute(statement)
    return 1e3 * (time.perf_counter() - began)


def fresh(cluster, work: "Callable[[object], float]", repeats: int) -> float:
    """Median of what `work` gives in sessions that have done nothing but say hello."""
    found: "List[float]" = []
    for _ in range(repeats):
        with cluster.connect(prepare_threshold=None) as connection:
            connection.execute("SELECT 1")
            found.append(work(connection))
    return statistics.median(found)


def loading(repeats: int) -> "Dict[str, float]":
    """LOAD in a session, where the library is preloaded and where it is not."""
    def loaded(connection) -> float:
        connection.execute(f"LOAD '{LIBRARY}'")
        return private_mb(connection)

    def load_ms(connection) -> float:
        """Of two equal statements only the first one loads it."""
        return timed(connection, f"LOAD '{LIBRARY}'") - timed(connection, f"LOAD '{LIBRARY}'")

    with server() as cluster:
        found = {"load_alone_mb": fresh(cluster, loaded, repeats) - fresh(cluster, private_mb, repeats)}
        with session(cluster):
            found["plain_mb"] = plain = fresh(cluster, private_mb, repeats)
            found["load_mb"] = fresh(cluster, loaded, repeats) - plain
            # Most of it is page faults, whose cost changes from one second to the next: more sessions, not a luckier few.
            found["load_ms"] = fresh(cluster, load_ms, 20 * repeats)
    with server({"shared_preload_libraries": LIBRARY}) as cluster, session(cluster):
        found["preloaded_mb"] = fresh(cluster, loaded, repeats) - plain
        found["preloaded_load_ms"] = fresh(cluster, load_ms, repeats)
    return found


def calling(repeats: int) -> "Dict[str, float]":
    """A session that opens values whose DEKs are under AWS KMS, and one whose DEKs are under a local key."""
    with StrictKms() as kms, server(environment=kms.environment()) as cluster:
        with session(cluster, "dek_max_uses = 1") as connection:
            connection.execute("SELECT vod_tender_crypto.add_key('kms', %s)", [kms.kek_uri(kms.create_key())])
            connection.execute("CREATE TABLE t AS SELECT k, n, envelope_encrypt('token', k) AS v "
                               "FROM generate_series(1, 2) n, unnest(ARRAY['default', 'kms']) k")

        def opened(key: str, n: int) -> str:
            return f"SELECT envelope_decrypt(v) FROM t WHERE k = '{key}' AND n = {n}"

        def holds(*statements: str) -> "Callable[[object], float]":
            def run(connection) -> float:
                for statement in statements:
                    connection.execute(statement)
                return private_mb(connection)
            return run

        def first(connection) -> float:
            """How much longer the first call takes than the one after it."""
            return timed(connection, opened("kms", 1)) - timed(connection, opened("kms", 2))

        plain = holds("SELECT count(octet_length(v)) FROM t")
        called = holds(opened("kms", 1), opened("kms", 2))
        found = {"kms_alone_mb": fresh(cluster, called, repeats) - fresh(cluster, plain, repeats)}
        with session(cluster) as companion:
            called(companion)
            nothing = fresh(cluster, plain, repeats)
            found["local_mb"] = fresh(cluster, holds(opened("default", 1)), repeats) - nothing
            found["kms_mb"] = fresh(cluster, called, repeats) - nothing
            kms.inject(faults.delay(LATENCY))
            found["first_call_ms"] = fresh(cluster, first, repeats)
        return found


def idle(sessions: int) -> "Dict[str, float]":
    """So many sessions at once, each with 1,000 DEKs."""
    settings = {"max_connections": sessions + 20, "shared_buffers": "128MB"}
    with server(settings) as cluster, ExitStack() as stack:
        with session(cluster, "dek_max_uses = 1") as connection:
            connection.execute(f"CREATE TABLE t AS SELECT envelope_encrypt('token') AS v FROM generate_series(1, {DEKS})")
            connection.execute("VACUUM (FREEZE, ANALYZE) t")
        plain = stack.enter_context(cluster.connect())
        plain.execute("SELECT count(octet_length(v)) FROM t")
        opened = [stack.enter_context(session(cluster)) for _ in range(sessions)]
        for connection in opened:
            set_all(connection, f"dek_cache_entries = {DEKS}", "dek_max_age = 86400")
            connection.execute("SELECT count(envelope_decrypt(v)) FROM t")
        for connection in opened:
            cached = one(connection, "SELECT vod_tender_crypto.session_stats() -> 'cached_deks'")
            assert cached == DEKS, f"a session holds {cached} DEKs"
        total = sum(_rollup(connection, "Pss") for connection in opened)
        return {"sessions": sessions, "total_pss_mb": total, "session_mb": total / sessions,
                "session_private_mb": statistics.median(map(private_mb, opened)),
                "session_locked_mb": statistics.median(_rollup(connection, "Locked") for connection in opened),
                "plain_pss_mb": _rollup(plain, "Pss")}


def text(found: "Dict[str, float]", repeats: int) -> str:
    """The result, as docs/BENCHMARKS.md shows it."""
    return "\n".join([
        f"Medians of {repeats} fresh sessions. Private memory is private clean and dirty pages, beyond the "
        f"{found['plain_mb']:.1f} MB of a session that has loaded nothing. Pages of the library itself are private only as "
        "long as one session has it: *alone*.",
        "",
        "| a session | takes | private memory, MB | alone |",
        "| --- | --- | --- | --- |",
        f"| `LOAD 'vod_tender_crypto'` | {found['load_ms']:.2f} ms | {found['load_mb']:.2f} | {found['load_alone_mb']:.2f} |",
        f"| the same, with `shared_preload_libraries` | {found['preloaded_load_ms']:.2f} ms | {found['preloaded_mb']:.2f} | |",
        f"| opened a value under a local key | | {found['local_mb']:.2f} | |",
        f"| opened two values under AWS KMS | the first call adds {found['first_call_ms']:.1f} ms | {found['kms_mb']:.2f} | "
        f"{found['kms_alone_mb']:.2f} |",
        "",
        f"{found['sessions']:.0f} idle sessions that hold {DEKS:,} DEKs each: {found['total_pss_mb']:,.0f} MB in all (Pss), "
        f"{found['session_mb']:.2f} MB a session; {found['session_private_mb']:.2f} MB of it private, "
        f"{found['session_locked_mb']:.2f} MB locked. One that holds none: {found['plain_pss_mb']:.2f} MB.",
    ])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--write", action="store_true", help="put the result into docs/BENCHMARKS.md")
    arguments = parser.parse_args()
    found = {**loading(arguments.repeats), **calling(arguments.repeats), **idle(arguments.sessions)}
    report.show("memory", text(found, arguments.repeats), write=arguments.write)
    targets.note("memory", found)


if __name__ == "__main__":
    main()
