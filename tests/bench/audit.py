"""What the audit and the check of key grants cost a query that decrypts, in one run."""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "e2e"))

import report  # noqa: E402
import targets  # noqa: E402
from cluster import Cluster  # noqa: E402
from helpers import new_key  # noqa: E402

DEFAULTS = {"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on", "max_parallel_workers_per_gather": 0}
VARIANTS = {
    "off": "SET vod_tender_crypto.audit = off; SET vod_tender_crypto.audit_required = off",
    "log": "SET vod_tender_crypto.audit = log; SET vod_tender_crypto.audit_required = off",
    "table": "SET vod_tender_crypto.audit = 'table'; SET vod_tender_crypto.audit_required = off",
    "table, required": "SET vod_tender_crypto.audit = 'table'; SET vod_tender_crypto.audit_required = on",
}
SMALL_TRANSACTIONS = 50
QUERY = "SELECT sum(length(envelope_decrypt(v))) FROM t"


def gate_nanoseconds() -> float:
    """What the check and the count take for one value, without the query around them."""
    root = Path(__file__).resolve().parent.parent.parent
    out = subprocess.check_output(["cargo", "bench", "-q", "-p", "vod_tender_core", "--bench", "gate"], cwd=root, text=True)
    return float(re.search(r"gate ([\d.]+) ns", out).group(1))


def measure(rows: int, repeats: int) -> dict:
    """Seconds of the query, by variant and by role, interleaved."""
    with Cluster(DEFAULTS) as cluster, cluster.connect() as connection:
        connection.execute("CREATE EXTENSION vod_tender_crypto")
        path = cluster.server_file("kek.b64", new_key() + "\n")
        connection.execute("SELECT vod_tender_crypto.add_key('default', %s)", [f"local://{path}"])
        connection.execute("SET vod_tender_crypto.dek_max_uses = 1000000000; SET vod_tender_crypto.dek_max_bytes = 1000000000")
        connection.execute("CREATE TABLE t AS SELECT envelope_encrypt(convert_to(repeat(md5(n::text), 7), 'UTF8')) AS v "
                           f"FROM generate_series(1, {rows}) n")
        connection.execute("VACUUM (ANALYZE, FREEZE) t")
        connection.execute("CREATE ROLE reader; GRANT SELECT ON t TO reader; "
                           "SELECT vod_tender_crypto.grant_key('default', 'reader', '{decrypt}')")
        times: "dict[str, list[float]]" = {name: [] for name in [*VARIANTS, "reader"]}
        for repeat in range(repeats + 1):
            for name in times:
                connection.execute(VARIANTS.get(name, VARIANTS["off"]))
                if name == "reader":
                    connection.execute("SET ROLE reader")
                began = time.perf_counter()
                connection.execute(QUERY)
                if repeat:  # the first one warms up
                    times[name].append(time.perf_counter() - began)
                connection.execute("RESET ROLE")
        small = {name: [] for name in VARIANTS}
        for _ in range(repeats):
            for name in VARIANTS:
                connection.execute(VARIANTS[name])
                began = time.perf_counter()
                for _ in range(SMALL_TRANSACTIONS):
                    connection.execute("SELECT length(envelope_decrypt(v)) FROM t LIMIT 1")
                small[name].append((time.perf_counter() - began) / SMALL_TRANSACTIONS)
        connection.execute("SELECT vod_tender_crypto.flush_audit()")
        counts = connection.execute("SELECT DISTINCT value_count FROM vod_tender_crypto.audit WHERE value_count > 1 AND operation = 'decrypt'")
        assert counts.fetchall() == [(rows,)], "each query must have made one record"
        return {"rows": rows, "repeats": repeats, "gate_ns": gate_nanoseconds(),
                "small": {name: statistics.median(each) for name, each in small.items()},
                "medians": {name: statistics.median(each) for name, each in times.items()}}


def text(found: dict) -> str:
    """The result, as docs/BENCHMARKS.md shows it."""
    rows, medians = found["rows"], found["medians"]
    lines = [f"{rows:,} values of 224 bytes under one cached data key, medians of {found['repeats']} interleaved runs:", "",
             "| audit | milliseconds | ns a value | cost |", "| --- | --- | --- | --- |"]
    for name in [*VARIANTS, "reader"]:
        cost = "" if name == "off" else f"{100 * (medians[name] / medians['off'] - 1):+.1f} %"
        label = "off, as a role with a grant" if name == "reader" else name
        lines.append(f"| {label} | {1e3 * medians[name]:.1f} | {1e9 * medians[name] / rows:.0f} | {cost} |")
    lines += ["", f"Asking for the caller's right and counting the use: {found['gate_ns']:.1f} ns a value, "
                  f"{share(found):.1f} % of the query."]
    lines += ["", "A transaction that decrypts one value, from the client's side, microseconds: "
              + ", ".join(f"{name} {1e6 * each:.0f}" for name, each in found["small"].items())
              + ". Where it is required, the announcement is flushed to disk before the value is returned."]
    return "\n".join(lines)


def share(found: dict) -> float:
    """Part of the query that the check is, in per cent."""
    return 100 * found["gate_ns"] * found["rows"] / (found["medians"]["off"] * 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--write", action="store_true", help="put the result into docs/BENCHMARKS.md")
    arguments = parser.parse_args()
    found = measure(arguments.rows, arguments.repeats)
    report.show("audit", text(found), write=arguments.write)
    worst = max(found["medians"].values()) / found["medians"]["off"] - 1
    targets.note("audit", {"audit_percent": 100 * worst, "gate_percent": share(found)})


if __name__ == "__main__":
    main()
