"""How fast `migrate` is beside a plain batched UPDATE that writes the same bytes, in one run; and whether it stays small.

The server has PostgreSQL's default settings (fsync on), the KEK is in an emulated AWS KMS.
"""

from __future__ import annotations

import argparse
import base64
import secrets
import statistics
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "e2e"))

import emulators  # noqa: E402
import report  # noqa: E402
from cluster import Cluster  # noqa: E402

DEFAULTS = {"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on"}
BATCH = 2000

SETUP = """
CREATE EXTENSION vod_tender_crypto;
CREATE TABLE oauth_tokens (
    provider text, channel text, access_token text, refresh_token text, expires_at timestamptz, scope text,
    updated_at timestamptz, encryption_version integer, encryption_key_id text, PRIMARY KEY (provider, channel));
CREATE PROCEDURE plain_update(batch_size integer) LANGUAGE plpgsql AS $$
DECLARE
    lo integer := 0;
BEGIN
    WHILE lo < (SELECT max(n) FROM same) LOOP
        UPDATE oauth_tokens t SET access_token = s.access_token, refresh_token = s.refresh_token,
            encryption_version = 2, encryption_key_id = s.encryption_key_id
        FROM same s
        WHERE s.n > lo AND s.n <= lo + batch_size AND t.provider = s.provider AND t.channel = s.channel;
        COMMIT;
        lo := lo + batch_size;
    END LOOP;
END
$$;
CREATE TABLE original AS
SELECT n, 'twitch' AS provider, 'channel_' || n AS channel,
       envelope_encrypt(md5(n::text) || md5(n::text || 'a')) AS access_token,
       envelope_encrypt(md5(n::text || 'r') || md5(n::text || 'b')) AS refresh_token
FROM generate_series(1, %(rows)s) n;
"""

MIGRATE = """CALL vod_tender_crypto.migrate('oauth_tokens', ARRAY['access_token', 'refresh_token'], key => 'kms',
    aad => $$provider || '/' || channel || '/{column}'$$, version => 'encryption_version',
    set_columns => '{"encryption_version": 2, "encryption_key_id": "{kek_id}"}')"""


def load(connection) -> None:
    """The table as it was: version 1, freshly loaded."""
    connection.execute("TRUNCATE oauth_tokens")
    connection.execute(
        """INSERT INTO oauth_tokens SELECT provider, channel, access_token, refresh_token, now() + interval '4 hours',
               'chat:read', now(), 1, NULL FROM original ORDER BY n"""
    )
    connection.execute("VACUUM (ANALYZE) oauth_tokens")
    connection.execute("CHECKPOINT")


def timed(connection, statement: str) -> float:
    """Seconds that a statement takes."""
    began = time.monotonic()
    connection.execute(statement)
    return time.monotonic() - began


class PrivateMemory:
    """Private memory of a backend, sampled while a statement runs: MB at a quarter, and at most after that."""

    def __init__(self, pid: int):
        self.samples: "list[float]" = []
        self._pid = pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "PrivateMemory":
        self._thread.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(0.1):
            for line in Path(f"/proc/{self._pid}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    self.samples.append(int(line.split()[1]) / 1024)

    @property
    def early(self) -> float:
        return max(self.samples[: max(1, len(self.samples) // 4)])

    @property
    def late(self) -> float:
        return max(self.samples[len(self.samples) // 4:])


def measure(rows: int, repeats: int) -> dict:
    """Both ways, interleaved; medians."""
    with emulators.ministack() as service:
        client = service.client("kms")
        arn = client.create_key()["KeyMetadata"]["Arn"]
        environment = {**service.environment(), "ENCRYPTION_KEY": base64.b64encode(secrets.token_bytes(32)).decode()}
        with Cluster(DEFAULTS, environment) as cluster, cluster.connect() as connection:
            connection.execute(SETUP % {"rows": rows})
            uri = f"aws-kms://{arn}?region={service.region}&endpoint={service.endpoint}"
            connection.execute("SELECT vod_tender_crypto.add_key('kms', %s)", [uri])
            plain, migrated, early, late = [], [], [], []
            for repeat in range(repeats):
                load(connection)
                with PrivateMemory(connection.info.backend_pid) as memory:
                    migrated.append(timed(connection, MIGRATE))
                early.append(memory.early)
                late.append(memory.late)
                left = connection.execute("SELECT count(*) FROM oauth_tokens WHERE NOT is_envelope(access_token)").fetchone()
                assert left == (0,), left
                if repeat == 0:
                    connection.execute(
                        """CREATE TABLE same AS SELECT o.n, t.provider, t.channel, t.access_token, t.refresh_token,
                               t.encryption_key_id FROM original o JOIN oauth_tokens t USING (provider, channel) ORDER BY n"""
                    )
                    connection.execute("CREATE INDEX ON same (n)")
                    connection.execute("VACUUM (ANALYZE) same")
                load(connection)
                plain.append(timed(connection, f"CALL plain_update({BATCH})"))
            calls = connection.execute("SELECT vod_tender_crypto.session_stats() -> 'calls'").fetchone()[0]
            return {
                "rows": rows, "plain_s": statistics.median(plain), "migrate_s": statistics.median(migrated),
                "memory_early_mb": max(early), "memory_late_mb": max(late), "calls": calls,
                "plain": plain, "migrated": migrated, "repeats": repeats,
            }


def text(found: dict) -> str:
    """The result, as docs/BENCHMARKS.md shows it."""
    rows, plain, migrate = found["rows"], found["plain_s"], found["migrate_s"]
    calls = {operation: sum(outcome["calls"] for outcome in outcomes.values()) // found["repeats"]
             for operation, outcomes in found["calls"]["aws-kms"].items()}
    lines = [
        f"{rows:,} rows with two token columns, medians of {found['repeats']} interleaved runs:",
        "",
        "| | seconds | rows a second | of the plain UPDATE's speed |",
        "| --- | --- | --- | --- |",
        f"| plain batched UPDATE, the same bytes | {plain:.1f} | {rows / plain:,.0f} | |",
        f"| `migrate`, defaults | {migrate:.1f} | {rows / migrate:,.0f} | {100 * plain / migrate:.0f} % |",
        "",
        f"All runs: plain {', '.join(f'{each:.1f}' for each in found['plain'])} s; "
        f"migrate {', '.join(f'{each:.1f}' for each in found['migrated'])} s. "
        f"Calls to AWS KMS in one migration: {', '.join(f'{count:,} {name}' for name, count in sorted(calls.items()))}. "
        f"Private memory of the backend: at most {found['memory_early_mb']:.0f} MB in the first quarter of a run, "
        f"{found['memory_late_mb']:.0f} MB after it.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="put the result into docs/BENCHMARKS.md")
    arguments = parser.parse_args()
    found = measure(arguments.rows, arguments.repeats)
    report.show("migrate", text(found), write=arguments.write)
    # Flat: what a batch takes, not what a table takes. A short run's first quarter is over before all of it is in use.
    if arguments.rows >= 200_000 and found["memory_late_mb"] > found["memory_early_mb"] + 8:
        sys.exit("the backend's memory grew with the table")


if __name__ == "__main__":
    main()
