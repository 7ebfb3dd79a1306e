"""A wait for a key service ends when PostgreSQL says so, and the session works on."""

from __future__ import annotations

import threading
import time

import psycopg
import pytest

from cluster import process_lives
from helpers import add_local_key, calls, one
from sqlstate import CANCELED, UNREACHABLE, fails

SLACK = 0.2


@pytest.fixture
def stuck(cluster, black_hole):
    """A session whose key service accepts and never answers."""
    connection = cluster.connect()
    uri = f"aws-kms://alias/x?region=eu-west-1&endpoint={black_hole.url}"
    connection.execute("SELECT vod_tender_crypto.add_key('stuck', %s)", [uri])
    yield connection
    connection.close()


def encrypt(connection):
    return one(connection, "SELECT envelope_encrypt('token', key => 'stuck')")


def wait_for_event(watcher, pid) -> None:
    """Until the backend shows that it waits for a key service."""
    query = "SELECT wait_event_type = 'Extension' FROM pg_stat_activity WHERE pid = %s"
    deadline = time.monotonic() + 10
    while not one(watcher, query, pid):
        assert time.monotonic() < deadline, "the backend never waited"
        time.sleep(0.01)


def in_background(work):
    """Runs `work` in a thread; gives the thread and a list that its exception and end time go to."""
    ended = []

    def run():
        try:
            work()
        except psycopg.Error as error:
            ended.append((error, time.monotonic()))
        else:
            ended.append((None, time.monotonic()))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, ended


def test_statement_timeout_ends_it(stuck):
    stuck.execute("SET statement_timeout = '200ms'")
    began = time.monotonic()
    with fails(CANCELED):
        encrypt(stuck)
    took = time.monotonic() - began
    assert 0.19 <= took <= 0.4, took


def works_on(cluster, connection):
    """The session still encrypts, with a key that answers."""
    add_local_key(cluster, connection, "fine", default=False)
    value = one(connection, "SELECT envelope_encrypt('token', key => 'fine')")
    return one(connection, "SELECT envelope_decrypt(%s)", value) == "token"


@pytest.mark.parametrize("times", [1, 5])
def test_a_cancel_ends_it_and_the_session_works_on(cluster, stuck, times):
    pid = stuck.info.backend_pid
    with cluster.connect() as watcher:
        for _ in range(times):
            thread, ended = in_background(lambda: encrypt(stuck))
            wait_for_event(watcher, pid)
            began = time.monotonic()
            assert one(watcher, "SELECT pg_cancel_backend(%s)", pid)
            thread.join(10)
            (error, at), = ended
            assert error.sqlstate == CANCELED
            assert at - began <= SLACK, at - began
    assert works_on(cluster, stuck)
    outcomes = one(stuck, "SELECT vod_tender_crypto.session_stats()")["calls"]["aws-kms"]["GenerateDataKey"]
    assert outcomes["cancelled"]["calls"] == times


def test_a_termination_ends_the_session(cluster, stuck):
    pid = stuck.info.backend_pid
    with cluster.connect() as watcher:
        thread, ended = in_background(lambda: encrypt(stuck))
        wait_for_event(watcher, pid)
        began = time.monotonic()
        assert one(watcher, "SELECT pg_terminate_backend(%s)", pid)
        thread.join(10)
        (error, at), = ended
        assert error is not None and at - began <= SLACK, at - began
        deadline = time.monotonic() + 10
        while one(watcher, "SELECT count(*) FROM pg_stat_activity WHERE pid = %s", pid):
            assert time.monotonic() < deadline, "the backend lives on"
            time.sleep(0.01)
        assert not process_lives(pid)
        # Nothing else was disturbed: a crash would have ended this session too.
        assert one(watcher, "SELECT 1") == 1
    assert "server process" not in cluster.log_text()


def test_a_cancel_holds_no_lock_longer(cluster, stuck):
    """What a stuck statement had locked is free as soon as it is cancelled."""
    with cluster.connect() as watcher:
        watcher.execute("CREATE TABLE t AS SELECT 'x'::text AS v")
        update = lambda: stuck.execute("UPDATE t SET v = envelope_encrypt(v, key => 'stuck')")  # noqa: E731
        thread, ended = in_background(update)
        wait_for_event(watcher, stuck.info.backend_pid)
        one(watcher, "SELECT pg_cancel_backend(%s)", stuck.info.backend_pid)
        thread.join(10)
        assert ended[0][0].sqlstate == CANCELED
        watcher.execute("SET lock_timeout = '1s'")
        watcher.execute("UPDATE t SET v = 'y'")


def test_no_answer_within_the_time(stuck):
    stuck.execute("SET vod_tender_crypto.kms_timeout = '300ms'")
    began = time.monotonic()
    with fails(UNREACHABLE):
        encrypt(stuck)
    assert 0.25 <= time.monotonic() - began <= 1.0
    stuck.execute("SET vod_tender_crypto.kms_timeout = '10s'")
    stuck.execute("SET vod_tender_crypto.kms_attempt_timeout = '100ms'")
    stuck.execute("SET vod_tender_crypto.kms_max_attempts = 2")
    stuck.execute("SET vod_tender_crypto.kms_retry_backoff = '10ms'")
    began = time.monotonic()
    with fails(UNREACHABLE):
        encrypt(stuck)
    assert 0.15 <= time.monotonic() - began <= 1.5


def test_a_closed_port(cluster, refused_port):
    with cluster.connect() as connection:
        uri = f"aws-kms://alias/x?region=eu-west-1&endpoint=http://127.0.0.1:{refused_port}"
        connection.execute("SELECT vod_tender_crypto.add_key('closed', %s)", [uri])
        connection.execute("SET vod_tender_crypto.kms_timeout = '2s'")
        began = time.monotonic()
        with fails(UNREACHABLE) as caught:
            one(connection, "SELECT envelope_encrypt('token', key => 'closed')")
        assert time.monotonic() - began <= 2.5
        assert "refused" in (caught.value.diag.message_detail or "").lower()
        assert calls(connection) == {"GenerateDataKey": 1}
        assert works_on(cluster, connection)


def test_a_connection_that_breaks_is_made_again(cluster, kms):
    """The service goes away and comes back under the same session."""
    from kms_faults import cut

    with cluster.connect() as connection:
        connection.execute("SELECT vod_tender_crypto.add_key('main', %s)", [kms.kek_uri()])
        connection.execute("SET vod_tender_crypto.dek_max_uses = 1")
        connection.execute("SET vod_tender_crypto.kms_retry_backoff = '10ms'")
        encrypt_main = "SELECT envelope_encrypt('token', key => 'main')"
        one(connection, encrypt_main)
        kms.inject(cut(-1), times=2)
        one(connection, encrypt_main)
        kms.inject(cut(10), times=1)
        assert one(connection, encrypt_main).startswith("kms:v2:")


def test_other_signals_do_not_end_a_wait(cluster, stuck):
    """A configuration reload and a catalog change arrive while the session waits; the wait goes on."""
    pid = stuck.info.backend_pid
    with cluster.connect() as watcher:
        thread, ended = in_background(lambda: encrypt(stuck))
        wait_for_event(watcher, pid)
        watcher.execute("SELECT pg_reload_conf()")
        watcher.execute("SELECT pg_log_backend_memory_contexts(%s)", [pid])
        watcher.execute("CREATE TABLE noise ()")
        watcher.execute("DROP TABLE noise")
        deadline = time.monotonic() + 10
        while f"logging memory contexts of PID {pid}" not in cluster.log_text():
            assert time.monotonic() < deadline, "the interrupt was not processed during the wait"
            time.sleep(0.01)
        assert not ended
        one(watcher, "SELECT pg_cancel_backend(%s)", pid)
        thread.join(10)
        assert ended[0][0].sqlstate == CANCELED
