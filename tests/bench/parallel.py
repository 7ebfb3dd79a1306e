"""What PARALLEL SAFE would give and cost. The functions are PARALLEL RESTRICTED; a database of its own declares one SAFE.

Workers are processes of their own with caches of their own: what a warm leader has at hand they ask the key service for.
"""

from __future__ import annotations

import argparse
import time
from typing import Dict

import report
from bench_server import ONE_DEK, server, session
from helpers import one
from interleaved import Times, interleaved, query_run
from strict_kms import StrictKms, faults
from tables import plaintext

SIZE = 200
WORKERS = 2
KMS_DEKS = 10
LATENCY = 0.05
SAFE = "ALTER FUNCTION envelope_decrypt(bytea, text, jsonb, integer) PARALLEL SAFE"
# A plan with workers whatever the planner thinks of it.
EAGER = ("parallel_setup_cost = 0", "parallel_tuple_cost = 0", "min_parallel_table_scan_size = 0")
QUERY = "SELECT sum(octet_length(envelope_decrypt(v))) FROM {table}"


def measure(rows: int, repeats: int) -> dict:
    """Seconds a row without and with workers; calls and seconds against a key service that takes its time."""
    with StrictKms() as kms, server(environment=kms.environment()) as cluster:
        with session(cluster, *ONE_DEK) as connection:
            connection.execute(SAFE)
            connection.execute("SELECT vod_tender_crypto.add_key('kms', %s)", [kms.kek_uri(kms.create_key())])
            value = f"convert_to({plaintext(SIZE)}, 'UTF8')"
            numbers = f"FROM generate_series(1, {rows}) n"
            connection.execute(f"CREATE TABLE t AS SELECT envelope_encrypt({value}) AS v {numbers}")
            connection.execute(f"SET vod_tender_crypto.dek_max_uses = {-(-rows // KMS_DEKS)}")
            connection.execute(f"CREATE TABLE k AS SELECT envelope_encrypt({value}, 'kms') AS v {numbers}")
            for table in ("t", "k"):
                connection.execute(f"ALTER TABLE {table} SET (parallel_workers = {WORKERS})")
                connection.execute(f"VACUUM (FREEZE, ANALYZE) {table}")
        kms.inject(faults.delay(LATENCY))
        runs = {ways(workers): query_run(_session(cluster, "t", workers), QUERY.format(table="t"), rows, SIZE * rows)
                for workers in (0, WORKERS)}
        return {"rows": rows, "repeats": repeats, "times": interleaved(runs, repeats),
                "kms": {ways(workers): _calls(cluster, kms, workers, SIZE * rows) for workers in (0, WORKERS)}}


def ways(workers: int) -> str:
    return f"{workers} workers" if workers else "no workers"


def _session(cluster, table: str, workers: int):
    connection = session(cluster, *ONE_DEK)
    for setting in (*EAGER, f"max_parallel_workers_per_gather = {workers}"):
        connection.execute(f"SET {setting}")
    plan = "\n".join(line for line, in connection.execute("EXPLAIN " + QUERY.format(table=table)))
    assert ("Workers Planned" in plan) == bool(workers), plan
    return connection


def _calls(cluster, kms: StrictKms, workers: int, expected: int) -> "Dict[str, float]":
    """Calls of a query in a cold session, and of the next one, whose leader is warm."""
    with _session(cluster, "k", workers) as connection:
        found = {}
        for state in ("cold", "warm"):
            kms.reset_record()
            began = time.perf_counter()
            assert one(connection, QUERY.format(table="k")) == expected
            found[f"{state}_s"] = time.perf_counter() - began
            found[f"{state}_calls"] = kms.count("Decrypt")
        return found


def text(found: dict) -> str:
    """The result, as docs/BENCHMARKS.md shows it."""
    times: "Dict[str, Times]" = found["times"]
    alone, together = (times[ways(workers)].median for workers in (0, WORKERS))
    lines = [f"{found['rows']:,} values of {SIZE} bytes; one DEK under a local key, medians of {found['repeats']} interleaved "
             f"runs; and {KMS_DEKS} DEKs under an AWS KMS that takes {1e3 * LATENCY:.0f} ms a call.", "",
             "| | ns a row | first query: Decrypt calls | ms | next query, warm leader: Decrypt calls | ms |",
             "| --- | --- | --- | --- | --- | --- |"]
    for name, each in times.items():
        kms = found["kms"][name]
        lines.append(f"| {name} | {1e9 * each.median:,.0f} | {kms['cold_calls']} | {1e3 * kms['cold_s']:,.0f} | "
                     f"{kms['warm_calls']} | {1e3 * kms['warm_s']:,.0f} |")
    return "\n".join([*lines, "", f"With {WORKERS} workers and the leader the query is {alone / together:.2f} times as fast."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--write", action="store_true", help="put the result into docs/BENCHMARKS.md")
    arguments = parser.parse_args()
    report.show("parallel", text(measure(arguments.rows, arguments.repeats)), write=arguments.write)


if __name__ == "__main__":
    main()
