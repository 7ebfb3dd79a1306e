"""The audit: who used which key for what, one record for each transaction, caller, function, key, context and outcome."""

from __future__ import annotations

import json
import socket
from contextlib import closing

import psycopg
import pytest
from psycopg.rows import dict_row

from helpers import one
from jobs import wait_until

SECRET = "token-that-no-log-may-show"


@pytest.fixture
def server(make_cluster, extension):
    """A cluster that audits into the table."""
    return make_cluster({"vod_tender_crypto.audit": "table"})


def make_database(server, name: str = "audited"):
    """A database with a KEK named default, and a superuser's session in it."""
    server.createdb(name)
    server.psql("CREATE EXTENSION vod_tender_crypto", name)
    session = server.connect(name)
    path = server.server_file("kek.b64", "A" * 43 + "=\n")
    session.execute("SELECT vod_tender_crypto.add_key('default', %s)", [f"local://{path}"])
    return session


@pytest.fixture
def session(server):
    """A superuser's session in an audited database."""
    with make_database(server) as connection:
        yield connection


def records(session, where: str = "true") -> "list[dict]":
    """The audit's records, after all that has ended is in it."""
    one(session, "SELECT vod_tender_crypto.flush_audit()")
    with session.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(f"SELECT * FROM vod_tender_crypto.audit WHERE {where} ORDER BY seq").fetchall()


def decrypts(session) -> "list[dict]":
    return records(session, "operation = 'decrypt'")


def logged(server, since: int = 0) -> "list[dict]":
    """The audit records in the server's log."""
    lines = [line for line in server.log_text(since).splitlines() if "vod_tender_crypto audit: " in line]
    return [json.loads(line.split("vod_tender_crypto audit: ", 1)[1]) for line in lines]


def test_a_hundred_thousand_values_make_one_record(session):
    value = one(session, "SELECT envelope_encrypt(%s)", SECRET)
    session.execute("SELECT count(envelope_decrypt(%s)) FROM generate_series(1, 100000)", [value])
    found = decrypts(session)
    assert [record["value_count"] for record in found] == [100_000]
    assert found[0]["function"] == "envelope_decrypt" and found[0]["key"] == "default"
    assert found[0]["outcome"] == "ok" and found[0]["committed"] is True and found[0]["sqlstate"] is None


def test_a_value_whose_data_key_is_cached_is_recorded_like_any_other(session):
    value = one(session, "SELECT envelope_encrypt(%s)", SECRET)
    for _ in range(3):
        one(session, "SELECT envelope_decrypt(%s)", value)
    assert [record["value_count"] for record in decrypts(session)] == [1, 1, 1]


def test_what_a_transaction_that_is_rolled_back_has_seen_is_recorded(session):
    value = one(session, "SELECT envelope_encrypt(%s)", SECRET)
    with session.transaction(force_rollback=True):
        one(session, "SELECT envelope_decrypt(%s)", value)
        with session.transaction(force_rollback=True):
            one(session, "SELECT envelope_decrypt(%s)", value)
    found = decrypts(session)
    assert [(record["value_count"], record["committed"]) for record in found] == [(2, False)]


def test_a_read_only_transaction_is_recorded(session):
    value = one(session, "SELECT envelope_encrypt(%s)", SECRET)
    session.execute("BEGIN READ ONLY")
    one(session, "SELECT envelope_decrypt(%s)", value)
    session.execute("COMMIT")
    assert len(decrypts(session)) == 1


def test_a_prepared_transaction_is_recorded(server):
    server.settings["max_prepared_transactions"] = 2
    server.restart()
    with make_database(server) as session:
        session.execute("CREATE TABLE t (v text)")
        session.execute("BEGIN")
        session.execute("INSERT INTO t VALUES (envelope_encrypt('x'))")
        session.execute("PREPARE TRANSACTION 'one'")
        assert [record["operation"] for record in records(session)] == ["encrypt"]
        session.execute("ROLLBACK PREPARED 'one'")


def test_functions_keys_contexts_and_outcomes_are_told_apart(session, server):
    path = server.server_file("other.b64", "B" * 42 + "A=\n")
    session.execute("SELECT vod_tender_crypto.add_key('other', %s)", [f"local://{path}"])
    with session.transaction():
        a = one(session, "SELECT envelope_encrypt('x', context => '{\"tenant\": \"a\"}')")
        one(session, "SELECT envelope_encrypt('x', context => '{\"tenant\": \"b\"}')")
        one(session, "SELECT envelope_upgrade('x', version => 0)")
        one(session, "SELECT rewrap(%s, 'other')", a)
    with pytest.raises(psycopg.errors.ExternalRoutineInvocationException):
        one(session, "SELECT envelope_decrypt(%s, aad => 'row')", a)
    with pytest.raises(psycopg.errors.InvalidTextRepresentation):
        one(session, "SELECT envelope_decrypt('kms:v2:nothing')")
    found = [(record["function"], record["operation"], record["key"], record["context"], record["sqlstate"])
             for record in records(session)]
    assert found == [
        ("envelope_encrypt", "encrypt", "default", {"tenant": "a"}, None),
        ("envelope_encrypt", "encrypt", "default", {"tenant": "b"}, None),
        ("envelope_upgrade", "encrypt", "default", {}, None),
        ("rewrap", "rewrap", "other", {"tenant": "a"}, None),
        ("rewrap", "rewrap", "default", {"tenant": "a"}, None),
        ("envelope_decrypt", "decrypt", "default", {"tenant": "a"}, "39000"),
        ("envelope_decrypt", "decrypt", "", {}, "22P02"),
    ]


def test_a_record_says_who(session, server):
    session.execute("CREATE ROLE alice LOGIN; CREATE ROLE bob; GRANT bob TO alice")
    for role in ("alice", "bob"):
        session.execute("SELECT vod_tender_crypto.grant_key('default', %s::regrole, '{decrypt}')", [role])
    value = one(session, "SELECT envelope_encrypt(%s)", SECRET)
    session.execute(f"""
        CREATE FUNCTION as_bob() RETURNS text LANGUAGE sql SECURITY DEFINER
            RETURN public.envelope_decrypt('{value}');
        ALTER FUNCTION as_bob() OWNER TO bob""")
    with server.connect("audited", "alice", application_name="the \"app\"\nné") as alice:
        one(alice, "SELECT as_bob()")
        alice.execute("SET ROLE bob")
        one(alice, "SELECT envelope_decrypt(%s)", value)
        pid = alice.info.backend_pid
    found = decrypts(session)
    assert [(r["session_user_name"], r["outer_user_name"], r["current_user_name"]) for r in found] == [
        ("alice", "alice", "bob"), ("alice", "bob", "bob")]
    # PostgreSQL itself writes ? for what is not ASCII in an application's name.
    assert found[0]["application_name"].startswith('the "app"?n')
    assert found[0]["client"] is None and found[0]["pid"] == pid
    assert found[0]["transaction_start"] <= found[0]["at"]


def test_a_record_has_the_client_s_address_and_the_query_s_id(make_cluster, extension):
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = make_cluster({"vod_tender_crypto.audit": "table", "compute_query_id": "on",
                           "listen_addresses": "127.0.0.1", "port": port})
    with make_database(server) as session:
        with psycopg.connect(host="127.0.0.1", port=port, dbname="audited", user="postgres", autocommit=True) as remote:
            one(remote, "SELECT envelope_encrypt('x')")
            address = remote.pgconn.socket
            own = socket.fromfd(address, socket.AF_INET, socket.SOCK_STREAM)
            client = "{}:{}".format(*own.getsockname())
            own.close()
        found = records(session)
        assert found[0]["client"] == client and found[0]["query_id"] is not None


def test_a_refusal_is_recorded(session):
    session.execute("CREATE ROLE eve LOGIN")
    session.execute("GRANT EXECUTE ON FUNCTION envelope_decrypt(text, text, jsonb, integer) TO eve")
    value = one(session, "SELECT envelope_encrypt(%s)", SECRET)
    session.execute("SET ROLE eve")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        one(session, "SELECT envelope_decrypt(%s)", value)
    session.execute("RESET ROLE")
    found = decrypts(session)
    assert [(r["outer_user_name"], r["key"], r["outcome"], r["sqlstate"], r["value_count"]) for r in found] == [
        ("eve", "default", "failed", "42501", 1)]


def test_a_loop_that_swallows_errors_makes_one_record_of_them(session):
    one(session, "SELECT envelope_encrypt('x')")
    session.execute("""
        DO $$ BEGIN
            FOR i IN 1..50 LOOP
                BEGIN PERFORM envelope_decrypt('kms:v2:x'); EXCEPTION WHEN OTHERS THEN NULL; END;
            END LOOP;
        END $$""")
    assert [(r["outcome"], r["value_count"]) for r in decrypts(session)] == [("failed", 50)]


def test_off_records_nothing(session):
    one(session, "SELECT envelope_encrypt('x')")
    before = len(records(session))
    session.execute("SET vod_tender_crypto.audit = off")
    one(session, "SELECT envelope_encrypt('x')")
    assert len(records(session)) == before


def test_the_log_gets_one_line_of_json_without_the_statement(session, server):
    session.execute("SET vod_tender_crypto.audit = log")
    session.execute("SET client_min_messages = debug5")
    notices = []
    session.add_notice_handler(lambda notice: notices.append(notice.message_primary))
    since = server.log_size()
    value = one(session, f"SELECT envelope_encrypt('{SECRET}', context => '{{\"tenant\": \"né \U0001f511\"}}')")
    session.execute(f"SELECT envelope_decrypt('{value}') FROM generate_series(1, 10)")
    found = logged(server, since)
    assert [(r["operation"], r["value_count"], r["context"]["tenant"]) for r in found] == [
        ("encrypt", 1, "né \U0001f511"), ("decrypt", 10, "né \U0001f511")]
    assert SECRET not in server.log_text(since) and value not in server.log_text(since)
    assert not any("audit" in (notice or "") for notice in notices), "nothing of it goes to the client"


def test_a_job_is_recorded(session):
    session.execute("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t SELECT g, 'x' FROM generate_series(1, 10) g")
    session.execute("CALL vod_tender_crypto.migrate('t', '{v}', version => '0')")
    found = records(session, "function = 'migrate'")
    assert sum(r["value_count"] for r in found if r["operation"] == "encrypt") == 10
    assert {r["operation"] for r in found} == {"encrypt"}, "its own checks are no use of the key"
    assert decrypts(session) == []
    session.execute("SELECT * FROM vod_tender_crypto.verify('t')")
    assert sum(r["value_count"] for r in records(session, "function = 'verify'")) == 10


def test_key_service_request_ids_are_in_the_record(make_cluster, extension, kms):
    server = make_cluster({"vod_tender_crypto.audit": "table"}, kms.environment())
    with make_database(server) as session:
        session.execute("SELECT vod_tender_crypto.drop_key('default')")
        value = one(session, "SELECT envelope_encrypt('x')")
        one(session, "SELECT envelope_cache_clear()")
        session.execute("SELECT envelope_decrypt(%s) FROM generate_series(1, 3)", [value])
        made, read = records(session)
        assert len(made["key_service_requests"]) == 1 and len(read["key_service_requests"]) == 1
        assert made["key_service_requests"] != read["key_service_requests"]


# -- when it is required -------------------------------------------------------------------------------------------


def block_queue(server) -> "object":
    """Puts a file where the queue's directory is to be; gives it."""
    path = server.data / "vod_tender_crypto"
    assert not path.exists()
    path.write_text("")
    return path


def test_without_a_queue_nothing_is_decrypted_where_it_is_required(session, server):
    session.execute("SET vod_tender_crypto.audit = off")
    value = one(session, "SELECT envelope_encrypt(%s)", SECRET)
    session.execute("SET vod_tender_crypto.audit = 'table'")
    session.execute("SET vod_tender_crypto.audit_required = on")
    block = block_queue(server)
    for statement, argument in (("SELECT envelope_decrypt(%s)", value), ("SELECT envelope_downgrade(%s)", value),
                                ("SELECT envelope_encrypt(%s)", "x"), ("SELECT envelope_upgrade(%s, version => 0)", "x")):
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState) as refused:
            one(session, statement, argument)
        assert "could not be recorded" in str(refused.value) and SECRET not in str(refused.value)
    block.unlink()
    assert one(session, "SELECT envelope_decrypt(%s)", value) == SECRET
    assert [r["value_count"] for r in decrypts(session)] == [1]


def test_without_a_queue_the_log_gets_the_record_where_it_is_not_required(session, server):
    block_queue(server)
    since = server.log_size()
    value = one(session, "SELECT envelope_encrypt(%s)", SECRET)
    assert one(session, "SELECT envelope_decrypt(%s)", value) == SECRET
    assert [r["operation"] for r in logged(server, since)] == ["encrypt", "decrypt"]
    assert "WARNING:  vod_tender_crypto audit could not be queued" in server.log_text(since)


def test_a_full_queue_refuses(session, server):
    session.execute("SET vod_tender_crypto.audit_required = on; SET vod_tender_crypto.audit_queue_limit = 1")
    one(session, "SELECT envelope_encrypt('x')")
    session.execute("SELECT vod_tender_crypto.flush_audit()")
    queue = next((server.data / "vod_tender_crypto" / "audit").iterdir())
    (queue / "left-behind").write_bytes(b"x" * (2 << 20))
    with server.connect("audited") as other:
        other.execute("SET vod_tender_crypto.audit_required = on; SET vod_tender_crypto.audit_queue_limit = 1")
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState) as refused:
            one(other, "SELECT envelope_encrypt('x')")
        assert "full" in refused.value.diag.message_detail


def test_required_and_logged_begins_before_it_ends(session, server):
    session.execute("SET vod_tender_crypto.audit = log; SET vod_tender_crypto.audit_required = on")
    since = server.log_size()
    session.execute("BEGIN")
    one(session, "SELECT envelope_encrypt('x')")
    assert "vod_tender_crypto audit begins: " in server.log_text(since) and not logged(server, since)
    session.execute("COMMIT")
    assert [r["outcome"] for r in logged(server, since)] == ["ok"]


# -- the chain -----------------------------------------------------------------------------------------------------


@pytest.fixture
def chain(session):
    """A session in a database whose audit has five records."""
    for _ in range(5):
        one(session, "SELECT envelope_encrypt('x')")
    assert len(records(session)) == 5 and problems(session) == []
    session.execute("SET vod_tender_crypto.audit = off")
    return session


def problems(session, *anchor) -> "list[tuple]":
    arguments = ", ".join(["%s"] * len(anchor))
    return session.execute(f"SELECT * FROM vod_tender_crypto.verify_audit({arguments})", anchor).fetchall()


@pytest.mark.parametrize(("change", "found"), [
    ("UPDATE vod_tender_crypto.audit_record SET entry = json_build_object('at_us', 0, 'outcome', 'ok') WHERE seq = 3", [3, 3]),
    ("UPDATE vod_tender_crypto.audit_record SET at = at + interval '1 hour' WHERE seq = 3", [3]),
    ("UPDATE vod_tender_crypto.audit_record SET source = 'x' WHERE seq = 3", [3]),
    ("UPDATE vod_tender_crypto.audit_record SET hash = sha256('x') WHERE seq = 3", [3, 4]),
    ("DELETE FROM vod_tender_crypto.audit_record WHERE seq = 1", [2]),
    ("DELETE FROM vod_tender_crypto.audit_record WHERE seq = 3", [4]),
    ("DELETE FROM vod_tender_crypto.audit_record WHERE seq = 5", [5]),
    ("TRUNCATE vod_tender_crypto.audit_record", [5]),
    ("DELETE FROM vod_tender_crypto.audit_chain", [1, 5]),
    ("""UPDATE vod_tender_crypto.audit_record r SET entry = json_build_object('at_us', (r.entry ->> 'at_us')::bigint, 'key', 'y'),
        hash = vod_tender_crypto.audit_hash(p.hash, r.seq, vod_tender_crypto.unix_us(r.at), r.source, r.number,
                                            json_build_object('at_us', (r.entry ->> 'at_us')::bigint, 'key', 'y'))
        FROM vod_tender_crypto.audit_record p WHERE r.seq = 3 AND p.seq = 2""", [4]),
])
def test_what_was_changed_or_removed_is_found(chain, change, found):
    chain.execute(change)
    seqs = [seq for seq, _ in problems(chain)]
    if "audit_chain" in change:
        assert seqs, "without its ends the chain cannot be right"
    else:
        assert set(seqs) == set(found), problems(chain)


def test_a_chain_written_anew_does_not_fit_what_was_noted(chain):
    noted = chain.execute("SELECT last_seq, last_hash FROM vod_tender_crypto.audit_chain").fetchone()
    assert problems(chain, *noted) == []
    chain.execute("""
        DO $$
        DECLARE r record; h bytea := '';
        BEGIN
            UPDATE vod_tender_crypto.audit_record SET entry = json_build_object('at_us', (entry ->> 'at_us')::bigint) WHERE seq = 2;
            FOR r IN SELECT * FROM vod_tender_crypto.audit_record ORDER BY seq LOOP
                h := vod_tender_crypto.audit_hash(h, r.seq, vod_tender_crypto.unix_us(r.at), r.source, r.number, r.entry);
                UPDATE vod_tender_crypto.audit_record SET hash = h WHERE seq = r.seq;
            END LOOP;
            UPDATE vod_tender_crypto.audit_chain SET last_hash = h;
        END $$""")
    assert problems(chain) == [], "whoever can write the tables can write the whole chain"
    assert [seq for seq, _ in problems(chain, *noted)] == [5]


def test_pruning_leaves_a_chain_that_verifies_and_goes_on(chain):
    at = one(chain, "SELECT at FROM vod_tender_crypto.audit_record WHERE seq = 3")
    assert one(chain, "SELECT vod_tender_crypto.prune_audit(%s)", at) == 2
    assert problems(chain) == []
    chain.execute("SET vod_tender_crypto.audit = 'table'")
    one(chain, "SELECT envelope_encrypt('x')")
    assert [r["seq"] for r in records(chain)] == [3, 4, 5, 6] and problems(chain) == []
    chain.execute("DELETE FROM vod_tender_crypto.audit_record WHERE seq = 3")
    assert [seq for seq, _ in problems(chain)] == [4]


def test_an_auditor_reads_and_verifies_and_nobody_else_does(chain, server):
    chain.execute("CREATE ROLE auditor LOGIN; CREATE ROLE nobody LOGIN; SELECT vod_tender_crypto.grant_audit('auditor')")
    with server.connect("audited", "auditor") as auditor:
        assert len(records(auditor)) == 5 and problems(auditor) == []
        for statement in ("DELETE FROM vod_tender_crypto.audit_record", "UPDATE vod_tender_crypto.audit_chain SET last_seq = 1",
                          "SELECT vod_tender_crypto.prune_audit(now())", "SELECT envelope_decrypt('x')",
                          "SELECT vod_tender_crypto.store_audit('{a}', '{1}', '{1}', '{\"{}\"}')"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                auditor.execute(statement)
    with server.connect("audited", "nobody") as nobody:
        for statement in ("SELECT * FROM vod_tender_crypto.audit", "SELECT * FROM vod_tender_crypto.audit_record",
                          "SELECT vod_tender_crypto.verify_audit()", "SELECT vod_tender_crypto.flush_audit()"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                nobody.execute(statement)


def test_a_dump_has_the_audit_and_it_verifies(chain, server):
    dump = server.pg_dump("audited")
    server.createdb("restored")
    server.psql(dump, "restored")
    with server.connect("restored") as restored:
        assert one(restored, "SELECT count(*) FROM vod_tender_crypto.audit_record") == 5
        assert problems(restored) == []


# -- the worker ----------------------------------------------------------------------------------------------------


def test_the_worker_does_not_keep_anybody_from_dropping_the_database(server):
    with make_database(server) as session:
        one(session, "SELECT envelope_encrypt('x')")
        assert len(records(session)) == 1
    # Without --force PostgreSQL waits five seconds for others to go.
    server.run("dropdb", "-U", "postgres", "audited")


def test_records_wait_where_there_is_no_room_for_a_worker(make_cluster, extension):
    server = make_cluster({"vod_tender_crypto.audit": "table", "max_worker_processes": 0})
    with make_database(server) as session:
        one(session, "SELECT envelope_encrypt('x')")
        session.execute("SET statement_timeout = '300ms'")
        with pytest.raises(psycopg.errors.QueryCanceled):
            session.execute("SELECT vod_tender_crypto.flush_audit()")
    server.settings["max_worker_processes"] = 4
    server.restart()
    with server.connect("audited") as session:
        found = records(session)
        assert [(r["operation"], r["outcome"]) for r in found] == [("encrypt", "ok")]


def test_a_worker_that_is_ended_loses_and_repeats_nothing(session):
    written = 0

    def write_and_end_the_worker() -> bool:
        nonlocal written
        one(session, "SELECT envelope_encrypt('x')")
        written += 1
        ended = session.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                                "WHERE backend_type = 'vod_tender_crypto audit'").fetchone()
        return ended == (True,)

    for _ in range(3):
        wait_until(write_and_end_the_worker)
    found = records(session)
    assert len(found) == written and sum(r["value_count"] for r in found) == written and problems(session) == []


def test_damaged_lines_are_records_too_and_hold_nothing_up(session, server):
    one(session, "SELECT envelope_encrypt('x')")
    records(session)
    queue = next((server.data / "vod_tender_crypto" / "audit").iterdir())
    damaged = queue / "1-1-1.audit"
    damaged.write_bytes(b"end 1 {not json}\nend x {}\n\xff\xfe\nend 2 {\"outcome\":\"ok\"}\nend 3 {\"cut")
    server._give(damaged)
    found = records(session, "outcome <> 'ok' OR pid IS NULL")
    assert sorted(r["outcome"] for r in found) == ["ok"] + ["unreadable"] * 4
    assert not damaged.exists()


def test_files_of_ended_sessions_go(server, session):
    for _ in range(5):
        with server.connect("audited") as other:
            one(other, "SELECT envelope_encrypt('x')")
    assert len(records(session)) == 5
    records(session)
    queue = next((server.data / "vod_tender_crypto" / "audit").iterdir())
    assert [path.name for path in queue.iterdir() if path.suffix != ".lock"] == []


def test_many_transactions_use_more_than_one_file(server, session):
    session.execute("CREATE PROCEDURE many() LANGUAGE plpgsql AS $$ BEGIN FOR i IN 1..400 LOOP "
                    "PERFORM envelope_encrypt('x'); COMMIT; END LOOP; END $$")
    session.execute("CALL many()")
    found = records(session)
    assert len(found) == 400 and problems(session) == []
    assert one(session, "SELECT count(DISTINCT source) FROM vod_tender_crypto.audit_record") > 1


# -- honey ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def honey(session):
    """A session in a database whose table `tokens` has a row of honey, with the channel 'archive'."""
    session.execute("""
        CREATE TABLE tokens (provider text, channel text, token text, blob bytea, PRIMARY KEY (provider, channel));
        INSERT INTO tokens VALUES ('twitch', 'one', 'a', 'b')""")
    session.execute("CALL vod_tender_crypto.migrate('tokens', '{token, blob}', version => '0', "
                    "aad => $$provider || '/' || channel || '/{column}'$$)")
    session.execute("""SELECT vod_tender_crypto.plant_honey('tokens', '{"provider": "twitch", "channel": "archive"}')""")
    return session


def read(session, channel: str, column: str = "token"):
    return session.execute(f"SELECT envelope_decrypt({column}, aad => provider || '/' || channel || '/{column}') FROM tokens "
                           "WHERE channel = %s", [channel]).fetchone()[0]


def alarms(session) -> "list[dict]":
    return records(session, "outcome = 'honey'")


@pytest.mark.parametrize("column", ["token", "blob"])
def test_asking_for_honey_raises_the_alarm(honey, server, column):
    assert one(honey, "SELECT is_envelope(token) AND is_envelope(blob) FROM tokens WHERE channel = 'archive'")
    notices = []
    honey.add_notice_handler(lambda notice: notices.append(notice.message_primary))
    since = server.log_size()
    assert read(honey, "one", column) in ("a", b"b")
    assert alarms(honey) == [] and "honey" not in server.log_text(since)
    assert len(read(honey, "archive", column)) == 32
    found = alarms(honey)
    assert [(r["outer_user_name"], r["key"], r["value_count"]) for r in found] == [("postgres", "default", 1)]
    assert one(honey, "SELECT every(mark IS NOT NULL) FROM vod_tender_crypto.honey")
    assert "WARNING:  vod_tender_crypto honey value was asked for: {" in server.log_text(since)
    assert notices == [], "whoever asks is not told"


def test_honey_that_does_not_open_raises_the_alarm_too(honey):
    with pytest.raises(psycopg.errors.ExternalRoutineInvocationException):
        honey.execute("SELECT envelope_decrypt(token) FROM tokens WHERE channel = 'archive'")
    honey.execute("CREATE ROLE eve; GRANT SELECT ON tokens TO eve")
    honey.execute("GRANT EXECUTE ON FUNCTION envelope_decrypt(text, text, jsonb, integer) TO eve; SET ROLE eve")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        read(honey, "archive")
    honey.execute("RESET ROLE")
    assert [r["outer_user_name"] for r in alarms(honey)] == ["postgres", "eve"]


def test_the_alarm_is_raised_with_the_audit_off_and_in_every_session(honey, server):
    since = server.log_size()
    with server.connect("audited") as other:
        other.execute("SET vod_tender_crypto.audit = off")
        with other.transaction(force_rollback=True):
            read(other, "archive")
    assert "honey value was asked for" in server.log_text(since)


def test_verifying_and_rewrapping_leave_honey_alone(honey, server):
    path = server.server_file("next.b64", "C" * 42 + "A=\n")
    honey.execute("SELECT vod_tender_crypto.add_key('next', %s)", [f"local://{path}"])
    honey.execute("SELECT * FROM vod_tender_crypto.verify('tokens')")
    honey.execute("CALL vod_tender_crypto.rewrap_table('tokens', key => 'next')")
    assert alarms(honey) == []
    read(honey, "archive")
    assert [r["key"] for r in alarms(honey)] == ["next"]


def test_honey_is_planted_by_label_and_by_hand(honey):
    value = one(honey, "SELECT vod_tender_crypto.watch_honey(envelope_encrypt('bait'), label => 'backup')")
    assert one(honey, "SELECT label FROM vod_tender_crypto.honey WHERE mark = vod_tender_crypto.honey_mark(%s::text)", value) == "backup"
    assert one(honey, "SELECT envelope_decrypt(%s)", value) == "bait"
    assert len(alarms(honey)) == 1


@pytest.mark.parametrize("row", ["[]", "null", "1"])
def test_a_row_of_honey_is_a_json_object(honey, row):
    with pytest.raises(psycopg.errors.InvalidParameterValue):
        honey.execute("SELECT vod_tender_crypto.plant_honey('tokens', %s)", [row])
