"""The audit when something is killed between decrypting and writing it down.

Where `audit_required` is on, nothing a client has received is without a record.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import psycopg
import pytest

from helpers import one
from jobs import wait_until
from test_audit import make_database, records

WORKER = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'vod_tender_crypto audit'"


@pytest.fixture
def server(make_cluster, extension):
    """A cluster in which nothing is read or written without a record."""
    return make_cluster({"vod_tender_crypto.audit": "table", "vod_tender_crypto.audit_required": "on",
                         "restart_after_crash": "on"})


def wait_until_ended(connection) -> None:
    """Returns when the server has ended this session, as it does with all when one is killed."""
    def has_ended() -> bool:
        try:
            connection.execute("SELECT 1")
        except psycopg.OperationalError:
            return True
        return False

    wait_until(has_ended)


def wait_until_accepting(server) -> psycopg.Connection:
    """A session after the server's recovery: a connection that is refused meanwhile is tried again."""
    sessions = []

    def accepts() -> bool:
        with contextlib.suppress(psycopg.OperationalError):
            sessions.append(server.connect("audited", connect_timeout=10))
        return bool(sessions)

    wait_until(accepts)
    return sessions[0]


def read_in_transaction(connection, value: str) -> str:
    connection.execute("BEGIN")
    return one(connection, "SELECT envelope_decrypt(%s)", value)


def kill(pid: int, sig=signal.SIGKILL) -> None:
    os.kill(pid, sig)


def by_outcome(found) -> "list[tuple]":
    return [(r["operation"], r["outcome"], r["value_count"]) for r in found]


@pytest.mark.parametrize("victim", ["backend", "worker", "server"])
def test_what_was_returned_before_a_kill_is_recorded(server, victim):
    session = make_database(server)
    value = one(session, "SELECT envelope_encrypt('token')")
    assert by_outcome(records(session)) == [("encrypt", "ok", 1)]
    assert read_in_transaction(session, value) == "token"
    with server.connect("audited") as watcher:
        if victim == "backend":
            kill(session.info.backend_pid)
        elif victim == "worker":
            # There is one while the queue is not empty; it has not ended since it stored the first record, or is called again.
            with server.connect("audited") as other:
                one(other, "SELECT envelope_encrypt('x')")
                wait_until(lambda: one(other, "SELECT envelope_encrypt('x')") and watcher.execute(WORKER).fetchone() is not None)
                kill(watcher.execute(WORKER).fetchone()[0])
        else:
            server.kill9()
            server.start()
        wait_until_ended(watcher)
    with wait_until_accepting(server) as after:
        found = [r for r in records(after) if r["operation"] == "decrypt"]
        # A backend that sees the server's end before its own still counts.
        may_count = [[("decrypt", "ok", 1)]] if victim == "server" else []
        assert by_outcome(found) in [[("decrypt", "interrupted", None)], *may_count]
        assert found[0]["key"] == "default" and found[0]["outer_user_name"] == "postgres"
        assert after.execute("SELECT * FROM vod_tender_crypto.verify_audit()").fetchall() == []


def test_a_terminated_session_s_record_has_its_count(server):
    session = make_database(server)
    value = one(session, "SELECT envelope_encrypt('token')")
    read_in_transaction(session, value)
    session.execute("SELECT envelope_decrypt(%s) FROM generate_series(1, 9)", [value])
    with server.connect("audited") as watcher:
        one(watcher, "SELECT pg_terminate_backend(%s, 10000)", session.info.backend_pid)
        found = [r for r in records(watcher) if r["operation"] == "decrypt"]
        assert [(r["outcome"], r["value_count"], r["committed"]) for r in found] == [("ok", 10, False)]


def test_a_session_that_is_terminated_while_it_waits_for_a_key_service_has_its_record(make_cluster, extension, black_hole):
    server = make_cluster({"vod_tender_crypto.audit": "table"},
                          {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "eu-west-1"})
    session = make_database(server)
    value = one(session, "SELECT envelope_encrypt('token')")
    session.execute("SELECT vod_tender_crypto.add_key('gone', %s)",
                    [f"aws-kms://alias/x?region=eu-west-1&endpoint={black_hole.url}"])
    read_in_transaction(session, value)
    waiting = threading.Thread(target=lambda: pytest.raises(psycopg.Error, session.execute, "SELECT envelope_encrypt('x', 'gone')"))
    waiting.start()
    with server.connect("audited") as watcher:
        wait_until(lambda: one(watcher, "SELECT count(*) FROM pg_stat_activity WHERE pid = %s AND wait_event_type = 'Extension'",
                               session.info.backend_pid) == 1)
        one(watcher, "SELECT pg_terminate_backend(%s, 10000)", session.info.backend_pid)
        waiting.join()
        found = [r for r in records(watcher) if r["operation"] == "decrypt"]
        assert by_outcome(found) == [("decrypt", "ok", 1)]


def test_under_kills_everything_that_was_returned_has_a_record(server):
    """Sessions read values of their own contexts; whatever arrived at a client before a kill must be in the audit."""
    rounds, received = 4, set()
    with make_database(server) as session:
        values = {f"r{n}w{w}v{i}": one(session, "SELECT envelope_encrypt('token', context => jsonb_build_object('id', %s::text))",
                                       f"r{n}w{w}v{i}") for n in range(rounds) for w in range(2) for i in range(40)}

    def read(connection, own) -> None:
        try:
            for name in own:
                assert one(connection, "SELECT envelope_decrypt(%s)", values[name]) == "token"
                received.add(name)
        except psycopg.Error:
            pass

    for number in range(rounds):
        connections = [wait_until_accepting(server) for _ in range(2)]
        readers = [threading.Thread(target=read, args=(c, [v for v in values if v.startswith(f"r{number}w{w}v")]))
                   for w, c in enumerate(connections)]
        before = len(received)
        for reader in readers:
            reader.start()
        wait_until(lambda: len(received) >= before + 10)
        if number % 2:
            server.kill9()
        else:
            kill(connections[0].info.backend_pid)
        for reader in readers:
            reader.join()
        for connection in connections:
            wait_until_ended(connection)
        if number % 2:
            server.start()
    with wait_until_accepting(server) as after:
        recorded = {r["context"]["id"] for r in records(after) if r["operation"] == "decrypt"}
        assert len(received) >= rounds * 10
        assert received <= recorded, received - recorded
        assert after.execute("SELECT * FROM vod_tender_crypto.verify_audit()").fetchall() == []
