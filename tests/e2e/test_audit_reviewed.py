"""Ways in which records of the audit could once be lost, forged, held up or multiplied. Each stays as a test."""

from __future__ import annotations

import contextlib
import resource
import threading
import time

import psycopg
import pytest

from helpers import one
from jobs import role, wait_until
from test_audit import SECRET, make_database, records, server, session  # noqa: F401 (fixtures)

CONTEXTS = """SELECT count(envelope_encrypt('x', context => jsonb_build_object('n', repeat('c', {length}) || g)))
              FROM generate_series(1, {count}) g"""
PATIENCE_S = 10


def queue_of(server, session):
    """The database's queue."""
    return server.data / "vod_tender_crypto" / "audit" / one(
        session, "SELECT oid::text FROM pg_database WHERE datname = current_database()")


def stored(session) -> int:
    return one(session, "SELECT count(*) FROM vod_tender_crypto.audit_record")


def make_honey(session) -> str:
    return one(session, "SELECT vod_tender_crypto.watch_honey(envelope_encrypt('bait'))")


@contextlib.contextmanager
def open_files(most: int):
    """What starts in this block may open so many files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_file_that_cannot_be_read_holds_up_no_other(server, session):
    session.execute("SET vod_tender_crypto.audit_required = on")
    one(session, "SELECT envelope_encrypt('x')")
    records(session)
    blocked = queue_of(server, session) / "zzz.audit"
    blocked.mkdir()
    with server.connect("audited") as other:
        for _ in range(20):
            one(other, "SELECT envelope_encrypt('x')")
    wait_until(lambda: stored(session) == 21)
    assert stored(session) == 21
    blocked.rmdir()
    assert len(records(session)) == 21


def test_more_files_than_a_process_may_open(make_cluster, extension):
    server = make_cluster({"vod_tender_crypto.audit": "table", "max_worker_processes": 0})
    with make_database(server) as session:
        for _ in range(150):
            with server.connect("audited") as other:
                one(other, "SELECT envelope_encrypt('x')")
        assert len(list(queue_of(server, session).glob("*.audit"))) == 150
    server.settings["max_worker_processes"] = 4
    server.stop()
    with open_files(100):
        server.start()
    with server.connect("audited") as session:
        assert len(records(session)) == 150


def test_a_flush_waits_for_all_of_a_large_queue(server, session):
    session.execute(CONTEXTS.format(length=2000, count=4000))
    assert sum(r["value_count"] for r in records(session)) == 4000


def test_very_many_contexts_in_one_transaction_are_written_as_they_come(server, session):
    session.execute("SET vod_tender_crypto.audit_required = on")
    with session.transaction():
        session.execute(CONTEXTS.format(length=10, count=2500))
        one(session, "SELECT vod_tender_crypto.flush_audit()")
        assert stored(session) >= 2000, "memory holds a bounded number"
    found = records(session)
    assert len(found) == 2500 and {r["outcome"] for r in found} == {"ok"}
    assert {r["committed"] for r in found} == {None, True}


def test_a_transaction_cannot_write_more_than_the_queue_may_hold(make_cluster, extension):
    server = make_cluster({"vod_tender_crypto.audit": "table", "vod_tender_crypto.audit_required": "on",
                           "vod_tender_crypto.audit_queue_limit": "1MB", "max_worker_processes": 0})
    with make_database(server) as session:
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
            session.execute(CONTEXTS.format(length=20000, count=2000))
        size = sum(path.stat().st_size for path in queue_of(server, session).glob("*.audit"))
        assert size < 12 << 20, f"{size} bytes"


def test_an_interrupt_during_an_alarm_costs_nothing(server, session):
    """PostgreSQL looks for interrupts when it has written a line into its log."""
    honey = make_honey(session)
    value = one(session, "SELECT envelope_encrypt(%s)", SECRET)
    for milliseconds in range(20, 140, 20):
        before = sum(r["value_count"] for r in records(session, "operation = 'decrypt' AND outcome = 'ok'"))
        session.execute("BEGIN")
        session.execute("SELECT envelope_decrypt(%s) FROM generate_series(1, 500)", [value])
        session.execute(f"SET LOCAL statement_timeout = {milliseconds}")
        with pytest.raises(psycopg.errors.QueryCanceled):
            session.execute("SET LOCAL vod_tender_crypto.audit = log; "
                            "SELECT envelope_decrypt(%s) FROM generate_series(1, 100000000)" .replace("%s", f"'{honey}'"))
        session.execute("ROLLBACK")
        assert one(session, "SHOW client_min_messages") == "notice"
        assert one(session, "SELECT envelope_decrypt(%s)", value) == SECRET
        after = sum(r["value_count"] for r in records(session, "operation = 'decrypt' AND outcome = 'ok'"))
        assert after - before >= 501 or after - before == 1, "the transaction's own setting sent its record to the log"


def test_an_interrupt_among_announcements_in_the_log_costs_nothing(server, session):
    session.execute("SET vod_tender_crypto.audit = log; SET vod_tender_crypto.audit_required = on")
    for milliseconds in (30, 60, 90, 120):
        session.execute(f"SET statement_timeout = {milliseconds}")
        with contextlib.suppress(psycopg.errors.QueryCanceled):
            session.execute(CONTEXTS.format(length=10, count=100000))
        session.execute("RESET statement_timeout")
        assert one(session, "SELECT is_envelope(envelope_encrypt('x'))")
        assert one(session, "SHOW client_min_messages") == "notice"


def test_an_alarm_ends_nothing_that_was_announced(server, session):
    session.execute("SET vod_tender_crypto.audit_required = on")
    honey = make_honey(session)
    with session.transaction():
        session.execute(CONTEXTS.format(length=200, count=300))
        for _ in range(3):
            one(session, "SELECT envelope_decrypt(%s)", honey)
        one(session, "SELECT vod_tender_crypto.flush_audit()")
    found = records(session, "context ? 'n'")
    assert [r["outcome"] for r in found] == ["ok"] * 300


def test_what_was_announced_in_the_queue_ends_there(server, session):
    session.execute("SET vod_tender_crypto.audit_required = on")
    with session.transaction():
        one(session, "SELECT envelope_encrypt('x')")
        session.execute("SET LOCAL vod_tender_crypto.audit_required = off; SET LOCAL vod_tender_crypto.audit = off")
    assert [r["outcome"] for r in records(session)] == ["ok"]


def test_an_announced_failure_is_one_record(session):
    session.execute("SET vod_tender_crypto.audit_required = on")
    value = one(session, "SELECT envelope_encrypt('x', aad => 'row')")
    with pytest.raises(psycopg.errors.ExternalRoutineInvocationException):
        one(session, "SELECT envelope_decrypt(%s, aad => 'other')", value)
    assert [(r["operation"], r["outcome"]) for r in records(session)] == [("encrypt", "ok"), ("decrypt", "failed")]


def test_required_and_off_contradict_each_other(session):
    session.execute("SET vod_tender_crypto.audit_required = on; SET vod_tender_crypto.audit = off")
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState) as refused:
        one(session, "SELECT envelope_encrypt('x')")
    assert "audit is off" in refused.value.diag.message_detail


def test_what_nobody_decides_yet_is_not_called_committed(server):
    server.settings["max_prepared_transactions"] = 2
    server.restart()
    with make_database(server) as session:
        session.execute("CREATE TABLE t (v text); BEGIN; INSERT INTO t VALUES (envelope_encrypt('x')); PREPARE TRANSACTION 'one'")
        assert [r["committed"] for r in records(session)] == [None]
        session.execute("ROLLBACK PREPARED 'one'")


def test_many_questions_for_honey_are_one_record_and_few_lines(session, server):
    honey = make_honey(session)
    since = server.log_size()
    session.execute("SELECT envelope_decrypt(%s) FROM generate_series(1, 300)", [honey])
    assert [r["value_count"] for r in records(session, "outcome = 'honey'")] == [300]
    assert server.log_text(since).count("honey value was asked for") == 3, "the 1st, the 10th and the 100th"


def test_what_is_open_to_everybody_makes_no_record(session):
    session.execute("CREATE ROLE anybody; SET ROLE anybody")
    with pytest.raises(psycopg.errors.InvalidTextRepresentation):
        one(session, "SELECT envelope_info('kms:v2:x')")
    session.execute("RESET ROLE")
    assert records(session) == []


def test_names_that_are_not_configured_make_one_record(session):
    value = one(session, "SELECT envelope_encrypt('x')")
    one(session, "SELECT vod_tender_crypto.drop_key('default')")
    session.execute(f"""
        DO $$ BEGIN FOR i IN 1..20 LOOP
            BEGIN PERFORM envelope_decrypt('{value}'); EXCEPTION WHEN OTHERS THEN NULL; END;
        END LOOP; END $$""")
    found = records(session, "outcome = 'failed'")
    assert [(r["key"], r["sqlstate"], r["value_count"]) for r in found] == [("", "42704", 20)]


@pytest.mark.parametrize("setting", ["default_transaction_read_only = on", "default_transaction_isolation = serializable",
                                     "lock_timeout = 1", "statement_timeout = 1", "role = bystander", "search_path = ''",
                                     "session_replication_role = replica"])
def test_a_database_s_settings_do_not_stop_the_worker(server, setting):
    with make_database(server) as session:
        session.execute("CREATE ROLE bystander")
        session.execute(f"ALTER DATABASE audited SET {setting}")
        one(session, "SELECT envelope_encrypt('x')")
        assert len(records(session)) == 1


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_record_that_the_encoding_cannot_hold_holds_nothing_up(server, encoding):
    server.createdb("other", "-E", encoding, "-T", "template0", "--locale=C")
    server.psql("CREATE EXTENSION vod_tender_crypto", "other")
    with server.connect("other", client_encoding="utf8") as session:
        path = server.server_file("kek.b64", "A" * 43 + "=\n")
        session.execute("SELECT vod_tender_crypto.add_key('default', %s)", [f"local://{path}"])
        value = one(session, "SELECT envelope_encrypt('x', context => '{\"name\": \"123\"}')").removeprefix("kms:v2:")
        # Three bytes for three: the context's length stays, and the value does not verify any more.
        forged = one(session, """SELECT 'kms:v2:' || replace(encode(overlay(h PLACING '\\xe4b8ad'::bytea
                FROM position('123'::bytea IN h)), 'base64'), E'\\n', '') || %s
            FROM decode(%s, 'base64') h""", ":" + value.split(":")[1], value.split(":")[0])
        with pytest.raises(psycopg.Error):
            one(session, "SELECT envelope_decrypt(%s)", forged)
        one(session, "SELECT envelope_encrypt('x')")
        found = records(session)
        assert [(r["operation"], r["outcome"]) for r in found] == [("encrypt", "ok"), ("decrypt", "failed"), ("encrypt", "ok")]
        assert "4e2d" in str(found[1]["context"])
        assert session.execute("SELECT * FROM vod_tender_crypto.verify_audit()").fetchall() == []


def test_a_record_that_comes_as_the_worker_goes_is_stored(server):
    """The worker ends two seconds after the last record. Nobody may have to use a key again for the next one."""
    names = [f"late_{n}" for n in range(6)]
    missing = []

    def write_late(name: str, after_s: float) -> None:
        with server.connect(name) as session:
            one(session, "SELECT envelope_encrypt('x')")
            time.sleep(after_s)  # to meet the worker's end, not to wait for something
            one(session, "SELECT envelope_encrypt('x')")
            deadline = time.monotonic() + PATIENCE_S
            while stored(session) < 2 and time.monotonic() < deadline:
                pass
            if stored(session) < 2:
                missing.append(after_s)

    with make_database(server, "late") as session:
        records(session)
    server.settings["max_worker_processes"] = 16
    server.restart()
    for name in names:
        server.createdb(name, "-T", "late")
    threads = [threading.Thread(target=write_late, args=(name, 1.95 + 0.05 * n)) for n, name in enumerate(names)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert missing == []


def test_a_flush_gives_up(make_cluster, extension):
    server = make_cluster({"vod_tender_crypto.audit": "table", "max_worker_processes": 0})
    with make_database(server) as session:
        notices = []
        session.add_notice_handler(lambda notice: notices.append(notice.message_primary))
        one(session, "SELECT envelope_encrypt('x')")
        session.execute("SET statement_timeout = '8s'")
        with pytest.raises(psycopg.errors.QueryCanceled):
            one(session, "SELECT vod_tender_crypto.flush_audit()")
        assert any("max_worker_processes" in notice for notice in notices)


@pytest.mark.parametrize(("call", "state"), [
    ("prune_audit(NULL)", "22004"), ("grant_audit(NULL)", "22004"),
])
def test_null_is_no_argument(session, call, state):
    with pytest.raises(psycopg.Error) as refused:
        session.execute(f"SELECT vod_tender_crypto.{call}")
    assert refused.value.sqlstate == state


def test_what_cannot_be_checked_is_said(session):
    for _ in range(3):
        one(session, "SELECT envelope_encrypt('x')")
    records(session)
    noted = one(session, "SELECT hash FROM vod_tender_crypto.audit_record WHERE seq = 1")
    one(session, "SELECT vod_tender_crypto.prune_audit((SELECT at FROM vod_tender_crypto.audit_record WHERE seq = 3))")
    for arguments, said in (((1, noted), "pruned"), ((3, None), "no hash"), ((None, noted), "no number")):
        problem = one(session, "SELECT problem FROM vod_tender_crypto.verify_audit(%s, %s)", *arguments)
        assert "not checked" in problem and said in problem


# -- honey ---------------------------------------------------------------------------------------------------------


def test_honey_is_bound_like_its_neighbours(session):
    session.execute("CREATE TABLE t (id serial PRIMARY KEY, v text); INSERT INTO t (v) VALUES ('x')")
    session.execute("CALL vod_tender_crypto.migrate('t', '{v}', version => '0', aad => 'id::text')")
    with pytest.raises(psycopg.errors.NullValueNotAllowed):
        session.execute("SELECT vod_tender_crypto.plant_honey('t', '{}')")
    session.execute("""SELECT vod_tender_crypto.plant_honey('t', '{"id": 77, "v": "ignored"}')""")
    assert session.execute("SELECT * FROM vod_tender_crypto.verify('t')").fetchall() == []


def test_a_row_of_honey_may_consist_of_defaults(session):
    session.execute("CREATE TABLE t (id serial PRIMARY KEY, v text); INSERT INTO t (v) VALUES ('x')")
    session.execute("CALL vod_tender_crypto.migrate('t', '{v}', version => '0')")
    session.execute("SELECT vod_tender_crypto.plant_honey('t', '{}')")
    assert one(session, "SELECT count(*) FROM t WHERE is_envelope(v)") == 2
    assert one(session, "SELECT vod_tender_crypto.watch_honey(NULL::text)") is None


def test_counting_a_table_runs_nothing_of_its_owner_s(database, connection):
    """What a superuser counts without being asked to: census() and doctor() look at every table."""
    with role(database, may_run_jobs=False) as mallory:
        connection.execute(f"CREATE SCHEMA mallory AUTHORIZATION {mallory}")
        with database.connect(user=mallory) as session:
            session.execute(f"""
                CREATE FUNCTION mallory.rise() RETURNS void LANGUAGE plpgsql AS $f$
                    BEGIN
                        IF current_setting('is_superuser') = 'on' THEN EXECUTE 'ALTER ROLE {mallory} SUPERUSER'; END IF;
                    END $f$;
                CREATE FUNCTION mallory.evil() RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS $f$
                    BEGIN PERFORM mallory.rise(); RETURN true; END $f$;
                CREATE TABLE mallory.t (id int, token text);
                INSERT INTO mallory.t VALUES (1, 'x');
                CREATE INDEX ON mallory.t (id) WHERE mallory.evil();
                CREATE STATISTICS mallory.s ON (mallory.evil()::int + id), token FROM mallory.t""")
        connection.execute("SELECT * FROM vod_tender_crypto.census()")
        connection.execute("SELECT * FROM vod_tender_crypto.doctor()")
        assert one(connection, "SELECT rolsuper FROM pg_roles WHERE rolname = %s", mallory) is False
        # The same statement would be enough, without the function that looks.
        with connection.transaction(force_rollback=True):
            connection.execute("SELECT count(*) FROM mallory.t WHERE id > 0 AND token > ''")
            assert one(connection, "SELECT rolsuper FROM pg_roles WHERE rolname = %s", mallory) is True


# -- a second look -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("required", ["off", "on"])
def test_verify_s_failures_are_recorded(session, required):
    session.execute(f"SET vod_tender_crypto.audit_required = {required}")
    session.execute("CREATE TABLE t (id int PRIMARY KEY, v bytea)")
    session.execute("INSERT INTO t SELECT g, envelope_encrypt('x'::bytea) FROM generate_series(1, 10) g")
    session.execute("UPDATE t SET v = set_byte(v, length(v) - 1, get_byte(v, length(v) - 1) # 1) WHERE id <= 4")
    assert one(session, "SELECT count(*) FROM vod_tender_crypto.verify('t', '{v}')") == 4
    found = records(session, "function = 'verify' AND value_count > 0")
    assert sorted((r["outcome"], r["sqlstate"], r["value_count"]) for r in found) == [("failed", "39000", 4), ("ok", None, 6)]


def test_a_job_s_failures_are_recorded_under_their_key(session):
    session.execute("CREATE TABLE t (id int PRIMARY KEY, v bytea)")
    session.execute("INSERT INTO t SELECT g, envelope_encrypt('x'::bytea, context => jsonb_build_object('n', g::text)) "
                    "FROM generate_series(1, 20) g")
    session.execute("UPDATE t SET v = set_byte(v, length(v) - 1, get_byte(v, length(v) - 1) # 1) WHERE id = 3")
    session.execute("SET vod_tender_crypto.legacy_key_file = ''")
    assert one(session, "SELECT count(*) FROM vod_tender_crypto.verify('t', '{v}')") == 1
    found = records(session, "outcome = 'failed'")
    assert [(r["key"], r["context"], r["value_count"]) for r in found] == [("default", {"n": "3"}, 1)]


def test_somebody_else_s_view_is_not_adopted(database, connection):
    with role(database, may_run_jobs=False) as mallory:
        connection.execute(f"CREATE SCHEMA app; GRANT USAGE, CREATE ON SCHEMA app TO {mallory}")
        connection.execute("CREATE TABLE app.users (id int PRIMARY KEY, token text, is_admin boolean DEFAULT false)")
        connection.execute(f"GRANT SELECT ON app.users TO {mallory}")
        with database.connect(user=mallory) as session:
            session.execute("""
                CREATE VIEW app.users_view AS SELECT * FROM app.users;
                CREATE FUNCTION app.users_view_write() RETURNS trigger LANGUAGE plpgsql AS $f$
-- Made by vod_tender_crypto.create_decrypting_view()
                    BEGIN RETURN NEW; END $f$;
                CREATE TRIGGER vod_tender_crypto_write INSTEAD OF INSERT ON app.users_view
                    FOR EACH ROW EXECUTE FUNCTION app.users_view_write();
                COMMENT ON FUNCTION app.users_view_write() IS 'Internal. set_columns {"is_admin": true}'""")
        for _ in ("the view", "the function that it left"):
            with pytest.raises(psycopg.Error) as refused:
                connection.execute("SELECT vod_tender_crypto.create_decrypting_view('app.users', 'users_view', '{token}')")
            assert refused.value.sqlstate in ("42P07", "42723")
            connection.execute("DROP VIEW IF EXISTS app.users_view")


def test_making_a_view_runs_nothing_of_the_table_s_owner_s(database, connection):
    with role(database, may_run_jobs=False) as mallory:
        connection.execute(f"CREATE SCHEMA hers AUTHORIZATION {mallory}")
        with database.connect(user=mallory) as session:
            session.execute(f"""
                CREATE FUNCTION hers.evil() RETURNS boolean LANGUAGE plpgsql IMMUTABLE AS $f$
                    BEGIN
                        IF current_user = 'postgres' THEN RAISE EXCEPTION 'this ran as a superuser'; END IF;
                        RETURN true;
                    END $f$;
                CREATE TABLE hers.t (id int PRIMARY KEY, token text);
                INSERT INTO hers.t VALUES (1, 'x');
                CREATE INDEX ON hers.t (token) WHERE hers.evil()""")
        with pytest.raises(psycopg.errors.RaiseException):
            connection.execute("SELECT count(*) FROM hers.t WHERE token > ''")
        connection.execute("SELECT vod_tender_crypto.create_decrypting_view('hers.t', 'v', '{token}')")
