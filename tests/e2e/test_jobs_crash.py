"""Bulk jobs under kill -9, of their backend and of the whole server: nothing lost, done twice or counted wrongly.

VTC_KILLS sets how often (10), VTC_SEED repeats a run's random moments.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import signal
import time

import psycopg
import pytest

from helpers import new_key, one
from jobs import (MIGRATION, TABLE, Background, aad_of, call, fingerprint, job_row, make_tokens, migrate, progress,
                  versions, wait_until, wrong_tokens)
from sqlstate import fails

KILLS = int(os.environ.get("VTC_KILLS", "10"))
FEWER_KILLS = max(3, KILLS // 5)
ROWS_A_KILL = 2000
BATCH = 50
LAST_KILL_AT = 0.8  # of the rows: a job must not be done before it is killed
OTHER_COLUMNS = "provider, channel, updated_at, scope, digest"
PAYLOADS = "split_part(access_token, ':', 4), split_part(refresh_token, ':', 4)"
BEING_RUN = "55006"


@pytest.fixture
def moments():
    """The source of random moments; its seed is in the output of a test that fails."""
    seed = int(os.environ.get("VTC_SEED") or secrets.randbits(32))
    print(f"VTC_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def server(make_cluster, extension, kms):
    """A server that keeps what it committed, with a KEK in KMS and a legacy key."""
    own = make_cluster(settings={"synchronous_commit": "on"},
                       environment={**kms.environment(), "ENCRYPTION_KEY": new_key()})
    with own.connect() as admin:
        admin.execute(f"CREATE EXTENSION {extension}")
    return own


def make_table(connection, rows: int) -> None:
    """Tokens of versions 0 and 1, and columns that are none of a job's business."""
    make_tokens(connection, rows)
    connection.execute(f"ALTER TABLE {TABLE} ADD scope text, ADD digest bytea")
    connection.execute(f"""UPDATE {TABLE} SET scope = 'chat:' || channel, digest = sha256(channel::bytea),
                           updated_at = updated_at + length(channel) * interval '1 hour'""")
    connection.execute(f"VACUUM {TABLE}")


def all_rows(connection, condition: str = "true") -> int:
    """How many rows there are, or how many of them meet a condition."""
    return one(connection, f"SELECT count(*) FROM {TABLE} WHERE {condition}")


def is_lost(connection) -> bool:
    """Whether the server has ended the session."""
    try:
        connection.execute("SELECT 1")
    except psycopg.OperationalError:
        return True
    return False


def kill_backend(cluster, pid: int, watcher) -> None:
    """SIGKILL to one backend, upon which the server ends all others and recovers."""
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: is_lost(watcher), "for the server to notice that a backend died")


def kill_server(cluster, pid: int, watcher) -> None:
    """SIGKILL to everything, and a new start."""
    cluster.kill9()
    cluster.start()


def next_session(cluster):
    """A session, as soon as the server takes one."""

    def connect():
        with contextlib.suppress(psycopg.OperationalError):
            return cluster.connect()

    return wait_until(connect, "for the server to recover")


def kill_and_resume(cluster, moments, kills: int, done: str, procedure: str, **arguments):
    """Starts a job, kills it at random moments of its progress, resumes it each time, and gives its row at the end.

    Between a kill and the next run, what the job says must be so: `done` is the condition of a row that it has done.
    """
    with cluster.connect() as connection:
        rows = all_rows(connection)
        newest = one(connection, "SELECT coalesce(max(job), 0) FROM vod_tender_crypto.job")
    step = rows * LAST_KILL_AT / kills
    what, job, done_before = TABLE, None, 0
    for number in range(kills):
        threshold = moments.uniform(step * number, step * (number + 1))
        kill = (kill_backend, kill_server)[number % 2]
        with cluster.connect() as watcher, Background(cluster, procedure, what, **arguments) as running:
            job = wait_until(lambda: one(watcher, "SELECT max(job) FROM vod_tender_crypto.job WHERE job > %s", newest))
            wait_until(lambda: job_row(watcher, job).rows_done >= threshold or not running.running(),
                       f"for row {threshold:.0f} of {rows}")
            time.sleep(moments.uniform(0, 0.01))
            assert running.running(), f"the job ended before kill {number + 1}: {running.error}"
            kill(cluster, running.pid, watcher)
            assert isinstance(running.wait(), psycopg.OperationalError)
        with next_session(cluster) as after:
            now = progress(after, job)
            assert now.state == "interrupted", f"{now.state} after kill {number + 1}"
            assert now.rows_done == all_rows(after, done) >= done_before, f"after kill {number + 1}"
            assert all_rows(after) == rows
            done_before = now.rows_done
        print(f"{kill.__name__} at {done_before} of {rows} rows")
        procedure, what, arguments = "resume", job, {}
    with cluster.connect() as last:
        return call(last, "resume", job)


def assert_complete(job, rows: int) -> None:
    """The job's row says that it has done every row, each once."""
    assert (job.state, job.rows_done, job.rows_failed, job.rows_left) == ("done", rows, 0, 0)


def nested(connection) -> int:
    """How many envelopes hold an envelope."""
    inside = " + ".join(f"count(*) FILTER (WHERE is_envelope(envelope_decrypt({column}, aad => {aad_of(column)})))"
                        for column in MIGRATION["columns"])
    return one(connection, f"SELECT {inside} FROM {TABLE}")


def test_a_migration(server, kms, moments):
    rows = ROWS_A_KILL * KILLS
    with server.connect() as connection:
        make_table(connection, rows)
        before = fingerprint(connection, OTHER_COLUMNS)
        assert versions(connection) == {0: rows // 3 * 2, 1: 2 * (rows - rows // 3)}
    job = kill_and_resume(server, moments, KILLS, "encryption_version = 2", "migrate", **MIGRATION, batch_size=BATCH)
    assert_complete(job, rows)
    with server.connect() as connection:
        assert all_rows(connection) == rows
        assert versions(connection) == {2: 2 * rows}
        assert wrong_tokens(connection) == 0 and nested(connection) == 0
        assert fingerprint(connection, OTHER_COLUMNS) == before
        # The application's own columns moved with the values.
        wrong = f"encryption_version <> 2 OR encryption_key_id IS DISTINCT FROM '{kms.arn}'"
        assert all_rows(connection, wrong) == 0


def test_a_rewrap(server, kms, moments):
    rows = ROWS_A_KILL * FEWER_KILLS
    second = kms.create_key()
    with server.connect() as connection:
        make_table(connection, rows)
        migrate(connection)
        connection.execute("SELECT vod_tender_crypto.add_key('second', %s)", [kms.kek_uri(second)])
        before = fingerprint(connection, f"{OTHER_COLUMNS}, encryption_version, {PAYLOADS}")
    job = kill_and_resume(server, moments, FEWER_KILLS, f"encryption_key_id = '{second}'", "rewrap_table", key="second",
                          set_columns={"encryption_key_id": "{kek_id}"}, batch_size=BATCH)
    assert_complete(job, rows)
    with server.connect() as connection:
        under = " AND ".join(f"envelope_info({column})->>'kek_id' = '{second}'" for column in MIGRATION["columns"])
        assert all_rows(connection, under) == all_rows(connection) == rows
        assert fingerprint(connection, f"{OTHER_COLUMNS}, encryption_version, {PAYLOADS}") == before
        # Nothing needs the first key any more.
        kms.disable(kms.arn)
        assert wrong_tokens(connection) == 0 and nested(connection) == 0


def test_a_downgrade(server, kms, moments):
    rows = ROWS_A_KILL * FEWER_KILLS
    with server.connect() as connection:
        make_table(connection, rows)
        migrate(connection)
        before = fingerprint(connection, OTHER_COLUMNS)
    job = kill_and_resume(server, moments, FEWER_KILLS, "encryption_version = 1", "downgrade",
                          set_columns={"encryption_version": 1, "encryption_key_id": None}, batch_size=BATCH)
    assert_complete(job, rows)
    kms.disable(kms.arn)
    with server.connect() as connection:
        assert versions(connection) == {1: 2 * rows} and all_rows(connection) == rows
        assert wrong_tokens(connection) == 0
        assert fingerprint(connection, OTHER_COLUMNS) == before
        assert all_rows(connection, "encryption_version <> 1 OR encryption_key_id IS NOT NULL") == 0


def test_a_job_that_runs_is_not_called_interrupted(server):
    """Only when its session is gone: whoever sees the word resumes the job."""
    with server.connect() as connection:
        make_table(connection, 6000)
        with Background(server, "migrate", TABLE, **MIGRATION, batch_size=BATCH) as running:
            seen = []
            while running.running():
                seen += connection.execute("SELECT state FROM vod_tender_crypto.job_progress").fetchall()
            running.join()
    states = {state for state, in seen}
    assert "running" in states and states <= {"running", "done"}, {state: seen.count((state,)) for state in states}


def test_a_job_that_runs_is_not_taken_over(server):
    """resume() of another session's job is refused at every moment of its run, and does not disturb it."""
    with server.connect() as connection:
        make_table(connection, 6000)
        with Background(server, "migrate", TABLE, **MIGRATION, batch_size=BATCH) as running:
            job = wait_until(lambda: one(connection, "SELECT max(job) FROM vod_tender_crypto.job WHERE run > 0"))
            tries = 0
            while running.running() and job_row(connection, job).rows_done < 4000:
                with fails(BEING_RUN):
                    call(connection, "resume", job)
                tries += 1
            assert tries > 10
            assert_complete(running.join(), 6000)
