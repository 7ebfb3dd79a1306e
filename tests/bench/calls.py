"""How much sooner calls to a key service are done that go together: encrypting with a fresh data key for every value,
decrypting after a prefetch, and rewrapping after one. The service answers each call after the same time.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "e2e"))

import kms_faults  # noqa: E402
import report  # noqa: E402
import targets  # noqa: E402
from cluster import Cluster  # noqa: E402
from helpers import calls  # noqa: E402
from strict_kms import StrictKms  # noqa: E402

LATENCY_S = 0.05
CONCURRENCY = 64
# How many calls are made one after the other to see what one takes.
ALONE = 40

SETUP = """
CREATE EXTENSION vod_tender_crypto;
SET vod_tender_crypto.default_key = 'one';
SET vod_tender_crypto.dek_max_uses = 1;
SET vod_tender_crypto.dek_cache_entries = {entries};
CREATE TABLE made (n integer, v text);
"""

PARTS = {
    "encrypt": ("encrypting, a fresh data key for every value", "INSERT INTO made SELECT n, envelope_encrypt('value ' || n) "
                "FROM generate_series(1, {rows}) n"),
    "decrypt": ("decrypting after `prefetch`", """
        SELECT vod_tender_crypto.prefetch('made', 'v', 'n <= {rows}');
        DO $$ BEGIN
            ASSERT (SELECT count(*) FROM made WHERE n <= {rows} AND envelope_decrypt(v) = 'value ' || n) = {rows};
        END $$"""),
    "rewrap": ("rewrapping after `prefetch` for that", """
        SELECT vod_tender_crypto.prefetch('made', 'v', 'n <= {rows}', operation => 'rewrap', key => 'two');
        CREATE TABLE {part} AS SELECT n, rewrap(v, 'two') AS v FROM made WHERE n <= {rows}"""),
}


def run(connection, part: str, rows: int, concurrency: int) -> "tuple[float, int]":
    """Seconds that a part takes with nothing in the cache, and the calls it makes."""
    connection.execute("SELECT envelope_cache_clear()")
    connection.execute(f"SET vod_tender_crypto.kms_concurrency = {concurrency}")
    # A connection is made with the first call; that is no part of what the calls take.
    connection.execute("SELECT envelope_encrypt('x', key => 'two')")
    before = sum(calls(connection).values())
    began = time.perf_counter()
    connection.execute(PARTS[part][1].format(rows=rows, part=f"moved_{concurrency}"))
    return time.perf_counter() - began, sum(calls(connection).values()) - before


def measure(rows: int = 2000) -> dict:
    """Seconds of each part, together and one after the other."""
    with StrictKms() as kms, Cluster(environment=kms.environment()) as cluster, cluster.connect() as connection:
        connection.execute(SETUP.format(entries=rows + ALONE + 100))
        for name in ("one", "two"):
            connection.execute("SELECT vod_tender_crypto.add_key(%s, %s)", [name, kms.kek_uri(kms.create_key())])
        kms.inject(kms_faults.delay(LATENCY_S))
        found: dict = {"rows": rows, "parts": {}}
        for part in PARTS:
            kms.reset_record()
            seconds, made = run(connection, part, rows, CONCURRENCY)
            peak = kms.peak_in_flight
            alone, made_alone = run(connection, part, ALONE, 1) if part != "encrypt" else alone_encrypting(connection)
            # Of more data keys than values some stay unused; what one call takes is what counts.
            found["parts"][part] = {"seconds": seconds, "calls": made, "peak": peak, "alone": alone / made_alone * rows}
        stats = connection.execute("SELECT vod_tender_crypto.session_stats()").fetchone()[0]
        found["unused"] = stats["deks_unused"]
        assert not kms.internal_errors, kms.internal_errors[0]
        return found


def alone_encrypting(connection) -> "tuple[float, int]":
    """The same for encrypting, into a table that is thrown away."""
    with connection.transaction(force_rollback=True):
        return run(connection, "encrypt", ALONE, 1)


def ratio(each: dict) -> float:
    """How many times faster together."""
    return each["alone"] / each["seconds"]


def text(found: dict) -> str:
    """The result, as docs/BENCHMARKS.md shows it."""
    lines = [f"{found['rows']:,} values, each with a data key of its own; {1e3 * LATENCY_S:.0f} ms a call, "
             f"`kms_concurrency = {CONCURRENCY}`, everything on one machine:", "",
             "| | calls | most at a time | seconds | one after the other | times faster |", "| --- | --- | --- | --- | --- | --- |"]
    for part, each in found["parts"].items():
        lines.append(f"| {PARTS[part][0]} | {each['calls']:,} | {each['peak']} | {each['seconds']:.2f} | "
                     f"{each['alone']:.0f} | {ratio(each):.0f} |")
    lines += ["", f"One after the other: {ALONE} calls with `kms_concurrency = 1` in the same run, taken for {found['rows']:,}. "
                  f"Data keys that encrypting made and did not use: {found['unused']}."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--write", action="store_true", help="put the result into docs/BENCHMARKS.md")
    arguments = parser.parse_args()
    found = measure(arguments.rows)
    report.show("calls", text(found), write=arguments.write)
    targets.note("calls", {part: ratio(each) for part, each in found["parts"].items()})


if __name__ == "__main__":
    main()
