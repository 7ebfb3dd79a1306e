"""Data keys that are fetched together before values are read or rewrapped: how many calls, for whom, and what is left."""

from __future__ import annotations

import base64
import os
import time

import psycopg
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from psycopg.rows import dict_row

import kms_faults as faults
from helpers import add_local_key, binary, calls, lengthened, one
from jobs import add_legacy_key
from roles import People, direct, execute_on_all
from sqlstate import CANCELED, DENIED, INVALID_PARAMETER, NO_RIGHT, THROTTLED, UNREACHABLE, UNVERIFIED, fails
from test_interrupts import SLACK, in_background

ROWS = 40


@pytest.fixture
def made(cluster, kms):
    """A database with the key main in the strict KMS as every session's default key, and the table t of values, each under
    a data key of its own."""
    with cluster.connect() as admin:
        admin.execute("SELECT vod_tender_crypto.add_key('main', %s)", [kms.kek_uri()])
        for setting in ("default_key = 'main'", "kms_concurrency = 8"):
            admin.execute(f"ALTER DATABASE {cluster.name} SET vod_tender_crypto.{setting}")
    with cluster.connect() as writer:
        writer.execute("SET vod_tender_crypto.dek_max_uses = 1")
        writer.execute(f"CREATE TABLE t AS SELECT n, envelope_encrypt('value ' || n) AS v FROM generate_series(1, {ROWS}) n")
    kms.reset_record()
    return cluster


@pytest.fixture
def reader(made):
    """A session that knows none of the data keys."""
    with made.connect() as session:
        yield session


@pytest.fixture
def roles(made):
    """Makes roles in that database."""
    people = People(made)
    yield people
    people.close()


ALL_VALUES = "SELECT envelope_prefetch(array_agg(v)) FROM t"


def prefetch(connection, **arguments) -> int:
    """vod_tender_crypto.prefetch() of the column v of t, or as the arguments say."""
    given = {"target": "t", "column": "v", **arguments}
    casts = {"target": "::regclass", "column": "::name"}
    named = ", ".join(f'"{name}" => %s{casts.get(name, "")}' for name in given)
    return one(connection, f"SELECT vod_tender_crypto.prefetch({named})", *given.values())


def stats(connection) -> dict:
    """The session's counters."""
    return one(connection, "SELECT vod_tender_crypto.session_stats()")


def heard(connection) -> "list[tuple]":
    """A list that fills with (severity, SQLSTATE, hint) of what the server says to the session."""
    said: "list[tuple]" = []
    connection.add_notice_handler(lambda each: said.append((each.severity, each.sqlstate, each.message_hint)))
    return said


def reads_all(connection, rows: int = ROWS) -> bool:
    """Whether all values open to what they were made from."""
    return one(connection, "SELECT count(*) FROM t WHERE envelope_decrypt(v) = 'value ' || n") == rows


# -- how many calls ---------------------------------------------------------------------------------


@pytest.mark.parametrize("statement", [ALL_VALUES, "SELECT vod_tender_crypto.prefetch('t', 'v')"])
def test_each_data_key_is_fetched_once_and_many_at_a_time(reader, kms, statement):
    kms.inject(faults.delay(0.03))
    reader.execute("INSERT INTO t SELECT n, v FROM t")
    assert one(reader, statement) == ROWS
    assert kms.counts == {"Decrypt": ROWS} and 2 <= kms.peak_in_flight <= 8
    assert not kms.doubled
    assert reads_all(reader, 2 * ROWS)
    assert calls(reader) == {"Decrypt": ROWS}, "what was fetched is not asked for again"
    assert one(reader, statement) == 0
    assert (stats(reader)["cache_misses"], stats(reader)["cached_deks"]) == (0, ROWS)


def test_before_rows_are_locked(made, reader, kms):
    """What the functions are for: no call while locks are held."""
    prefetch(reader)
    asked = kms.count("Decrypt")
    with reader.transaction():
        rows = reader.execute("SELECT envelope_decrypt(v) FROM t ORDER BY n FOR UPDATE").fetchall()
    assert len(rows) == ROWS and kms.count("Decrypt") == asked


def test_one_call_at_a_time_where_that_is_wanted(reader, kms):
    kms.inject(faults.delay(0.005))
    reader.execute("SET vod_tender_crypto.kms_concurrency = 1")
    assert one(reader, ALL_VALUES) == ROWS
    assert kms.peak_in_flight == 1


def test_what_needs_no_data_key_is_passed_by(made, kms):
    add_legacy_key(made)
    with made.connect() as session:
        envelope = one(session, "SELECT v FROM t LIMIT 1")
        old = direct(session)
        mixed = [None, "plain", "", old, envelope, envelope[:-4], "kms:v2:x", envelope]
        assert one(session, "SELECT envelope_prefetch(%s::text[])", mixed) == 1
        assert one(session, "SELECT envelope_prefetch(%s::bytea[])", [None, b"", b"plain", binary(envelope)]) == 0
        assert one(session, "SELECT envelope_prefetch(NULL::text[])") is None
        assert one(session, "SELECT envelope_prefetch('{}'::bytea[])") == 0
        assert kms.count("Decrypt") == 1


def test_values_with_and_without_aad_share_a_data_key(made, kms):
    with made.connect() as writer:
        writer.execute("CREATE TABLE two_kinds AS SELECT envelope_encrypt('x') AS v UNION ALL SELECT envelope_encrypt('y', aad => 'row')")
        assert one(writer, "SELECT count(DISTINCT split_part(v, ':', 3)) FROM two_kinds") == 2
    kms.reset_record()
    with made.connect() as session:
        assert prefetch(session, target="two_kinds") == 1
        assert kms.counts == {"Decrypt": 1}


def test_the_literal_form_is_fetched_too(made, reader, kms):
    fresh = kms.client().generate_data_key(KeyId=kms.arn, KeySpec="AES_256")
    nonce = os.urandom(12)
    payload = nonce + AESGCM(fresh["Plaintext"]).encrypt(nonce, b"token", None)
    value = ":".join(["kms:v2", base64.b64encode(fresh["CiphertextBlob"]).decode(), base64.b64encode(payload).decode()])
    kms.reset_record()
    assert one(reader, "SELECT envelope_prefetch(ARRAY[%s, %s])", value, value) == 1
    assert one(reader, "SELECT envelope_decrypt(%s)", value) == "token"
    assert kms.counts == {"Decrypt": 1}
    assert one(reader, "SELECT envelope_prefetch(ARRAY[%s], 'rewrap', 'main')", value) == 0, "it cannot be rewrapped"


# -- which relations, and whose SQL -------------------------------------------------------------------


def test_tables_views_and_domains(made, reader, kms):
    reader.execute("""
        CREATE SCHEMA "Odd; schema";
        CREATE DOMAIN token AS text; CREATE DOMAIN strict_token AS token CHECK (VALUE <> ''); CREATE DOMAIN raw AS bytea;
        CREATE TABLE "Odd; schema"."a ""table" (n int, "the ""column" strict_token, "select" varchar(2000), b raw)
            PARTITION BY RANGE (n);
        CREATE TABLE p1 PARTITION OF "Odd; schema"."a ""table" FOR VALUES FROM (1) TO (20);
        CREATE TABLE p2 PARTITION OF "Odd; schema"."a ""table" FOR VALUES FROM (20) TO (100);
        INSERT INTO "Odd; schema"."a ""table" SELECT n, v, v, decode(split_part(v, ':', 3) || split_part(v, ':', 4), 'base64')
            FROM t WHERE split_part(v, ':', 3) NOT LIKE '%=';
        CREATE VIEW shown AS SELECT n, v AS stored FROM t WHERE n <= 10;
        CREATE MATERIALIZED VIEW kept AS SELECT n, v FROM t WHERE n <= 5;
        CREATE EXTENSION file_fdw; CREATE SERVER files FOREIGN DATA WRAPPER file_fdw""")
    path = made.server_file("rows.csv", "\n".join(v for v, in reader.execute("SELECT v FROM t WHERE n <= 7")))
    reader.execute(f"CREATE FOREIGN TABLE elsewhere (v text) SERVER files OPTIONS (filename '{path}')")
    odd = '"Odd; schema"."a ""table"'
    inside = one(reader, f"SELECT count(*) FROM {odd}")
    for target, column, count in ((odd, 'the "column', inside), (odd, "select", inside), (odd, "b", inside), ("p2", "b", None),
                                  ("shown", "stored", 10), ("kept", "v", 5), ("elsewhere", "v", 7), ("t", "v", ROWS)):
        reader.execute("SELECT envelope_cache_clear()")
        fetched = prefetch(reader, target=target, column=column)
        assert fetched == count or (count is None and 0 < fetched < inside), (target, column, fetched)
    for target, column, state in (("t", "nothing", "42703"), ("t", "ctid", "42703"), ("t", "n", "42804"), ("t", None, "42703"),
                                  (None, "v", "42809")):
        with fails(state):
            prefetch(reader, target=target, column=column)
    reader.execute("CREATE INDEX some_index ON t (n)")
    with fails("42809"):
        prefetch(reader, target="some_index")


def test_where_clause(reader, kms):
    assert prefetch(reader, where_clause="n <= 5 OR n = 40") == 6
    assert prefetch(reader, where_clause="t.n <= 7 -- and no more") == 2
    reader.execute("CREATE SCHEMA own; CREATE FUNCTION own.wanted(n int) RETURNS boolean LANGUAGE sql RETURN n > 30")
    with fails("42883"):
        prefetch(reader, where_clause="wanted(n)")
    reader.execute("SET search_path = own, public")
    assert prefetch(reader, target="public.t", where_clause="wanted(n)") == 9, "the caller's own path"
    assert one(reader, "SHOW search_path") == "own, public"
    asked = kms.count("Decrypt")
    for wrong, state in (("n <", "42601"), ("nothing = 1", "42703"), ("true); DROP TABLE public.t; SELECT (1", None),
                         ("true) h; DROP TABLE public.t; --", None)):
        with pytest.raises(psycopg.Error) as caught:
            prefetch(reader, target="public.t", where_clause=wrong)
        assert state in (None, caught.value.sqlstate), caught.value
    assert one(reader, "SELECT count(*) FROM public.t") == ROWS and kms.count("Decrypt") == asked
    assert one(reader, "SHOW search_path") == "own, public"


def test_nothing_of_the_extensions_is_found_on_the_callers_path(reader):
    """Functions and operators that fit the extension's SQL better than PostgreSQL's own: each raises if it is called."""
    reader.execute("""
        CREATE SCHEMA trap;
        CREATE FUNCTION trap.sprung() RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN RAISE 'sprung'; END $$;
        CREATE FUNCTION trap.current_setting(text) RETURNS text LANGUAGE sql AS $$ SELECT trap.sprung()::text $$;
        CREATE FUNCTION trap.set_config(text, text, boolean) RETURNS text LANGUAGE sql AS $$ SELECT trap.sprung()::text $$;
        CREATE FUNCTION trap.format(text, VARIADIC text[]) RETURNS text LANGUAGE sql AS $$ SELECT trap.sprung()::text $$;
        CREATE FUNCTION trap.quote_ident(name) RETURNS text LANGUAGE sql AS $$ SELECT trap.sprung()::text $$;
        CREATE FUNCTION trap.append(bytea[], bytea) RETURNS bytea[] LANGUAGE plpgsql AS $$ BEGIN RAISE 'sprung'; END $$;
        CREATE AGGREGATE trap.array_agg(bytea) (SFUNC = trap.append, STYPE = bytea[]);
        CREATE FUNCTION trap.equal(oid, oid) RETURNS boolean LANGUAGE sql AS $$ SELECT trap.sprung() $$;
        CREATE OPERATOR trap.= (LEFTARG = oid, RIGHTARG = oid, PROCEDURE = trap.equal);
        CREATE FUNCTION trap.same(bytea, bytea) RETURNS boolean LANGUAGE sql AS $$ SELECT trap.sprung() $$;
        CREATE OPERATOR trap.= (LEFTARG = bytea, RIGHTARG = bytea, PROCEDURE = trap.same);
        CREATE FUNCTION trap.joined(text, text) RETURNS text LANGUAGE sql AS $$ SELECT trap.sprung()::text $$;
        CREATE OPERATOR trap.|| (LEFTARG = text, RIGHTARG = text, PROCEDURE = trap.joined);
        CREATE DOMAIN trap.text AS pg_catalog.text CHECK (trap.sprung());
        CREATE DOMAIN trap.bytea AS pg_catalog.bytea CHECK (trap.sprung());
        CREATE TYPE trap.regclass AS ENUM ('x')""")
    reader.execute("SET search_path = trap, pg_catalog, public")
    with pytest.raises(psycopg.Error, match="sprung"):
        reader.execute("SELECT current_setting('x'::pg_catalog.text)")
    call = "SELECT vod_tender_crypto.prefetch('public.t'::pg_catalog.regclass, 'v', 'n <= 3'::pg_catalog.text)"
    assert one(reader, call) == 3
    reader.execute("SELECT public.envelope_prefetch(pg_catalog.array_agg(v)) FROM public.t")


# -- rights -----------------------------------------------------------------------------------------


def test_without_the_right_nothing_is_asked(made, roles, kms):
    role = roles.make("reader")
    roles.admin(f"GRANT SELECT ON t TO {role}")
    with made.connect(role) as session:
        for statement in (ALL_VALUES, "SELECT vod_tender_crypto.prefetch('t', 'v')"):
            with fails(NO_RIGHT, "permission denied for function"):
                session.execute(statement)
        execute_on_all(roles, role)
        for rewrap in ("", ", 'rewrap'"):
            with fails(NO_RIGHT, 'with key "main"'):
                session.execute(f"SELECT envelope_prefetch(array_agg(v){rewrap}) FROM t")
        with fails(NO_RIGHT, 'permission denied to decrypt with key "main"'):
            prefetch(session)
        assert kms.count("Decrypt") == 0 and stats(session)["cached_deks"] == 0
        roles.grant("main", role, "rewrap")
        with fails(NO_RIGHT, "permission denied to decrypt"):
            prefetch(session)
        roles.grant("main", role, "decrypt")
        assert prefetch(session) == ROWS
        roles.revoke("main", role, "decrypt")
        with fails(NO_RIGHT):
            one(session, ALL_VALUES)
    assert kms.count("Decrypt") == ROWS


def test_a_grant_is_all_it_takes_and_is_taken_back_whole(made, roles):
    role = roles.may("main", "decrypt")
    jobs = roles.may("main", "rewrap", what="runner")
    with made.connect() as admin:
        admin.execute("SELECT vod_tender_crypto.grant_jobs(%s::regrole)", [jobs])
    with made.connect(role) as session:
        with fails(NO_RIGHT, "permission denied"):
            prefetch(session)  # of the table
        roles.admin(f"GRANT SELECT (v, n) ON t TO {role}")
        assert prefetch(session, where_clause="n <= 3") == 3
        roles.revoke("main", role)
        with fails(NO_RIGHT, "permission denied for function"):
            prefetch(session)
        with fails(NO_RIGHT, "permission denied for function"):
            one(session, "SELECT envelope_prefetch(ARRAY['x'])")
    roles.revoke("main", jobs)
    with made.connect(jobs) as session:
        assert one(session, "SELECT vod_tender_crypto.needed_head('x'::text)") is None, "what jobs need stays"


def test_functions_that_run_as_their_owner_lend_no_key(made, roles, kms):
    owner, caller = roles.may("main", "decrypt", what="owner"), roles.make("caller")
    with made.connect() as admin:
        admin.execute(f"""
            GRANT SELECT ON t TO {owner};
            CREATE FUNCTION lent() RETURNS bigint LANGUAGE sql SECURITY DEFINER SET search_path = public, pg_temp
                AS $$ SELECT vod_tender_crypto.prefetch('t', 'v') $$;
            ALTER FUNCTION lent() OWNER TO {owner}; GRANT EXECUTE ON FUNCTION lent() TO PUBLIC""")
    with made.connect(caller) as session, fails(NO_RIGHT, 'with key "main"'):
        session.execute("SELECT lent()")
    assert kms.count("Decrypt") == 0
    roles.grant("main", caller, "decrypt")
    with made.connect(caller) as session:
        assert one(session, "SELECT lent()") == ROWS


def test_rows_that_are_hidden_are_not_looked_at(made, roles, kms):
    role = roles.may("main", "decrypt")
    roles.admin(f"GRANT SELECT ON t TO {role}; ALTER TABLE t ENABLE ROW LEVEL SECURITY; "
                f"CREATE POLICY few ON t FOR SELECT TO {role} USING (n <= 4)")
    with made.connect(role) as session:
        assert prefetch(session) == 4
    assert kms.count("Decrypt") == 4


# -- the audit --------------------------------------------------------------------------------------


def audited(connection) -> "list[dict]":
    """The records of prefetches."""
    one(connection, "SELECT vod_tender_crypto.flush_audit()")
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute("SELECT * FROM vod_tender_crypto.audit WHERE function = 'envelope_prefetch' ORDER BY seq").fetchall()


def test_each_data_key_is_recorded_as_a_use(made, roles, kms):
    role = roles.make("reader")
    execute_on_all(roles, role)
    roles.admin(f"GRANT SELECT ON t TO {role}")
    with made.connect() as session:
        session.execute("SET vod_tender_crypto.audit = 'table'; SET vod_tender_crypto.audit_required = on")
        session.execute("SELECT vod_tender_crypto.add_key('next', %s)", [kms.kek_uri(kms.create_key())])
        prefetch(session)
        prefetch(session)
        prefetch(session, where_clause="n <= 5", operation="rewrap", key="next")
        session.execute(f"SET ROLE {role}")
        with fails(NO_RIGHT):
            prefetch(session)
        session.execute("RESET ROLE")
        records = audited(session)
        found = [(each["operation"], each["key"], each["outcome"], each["sqlstate"], each["value_count"]) for each in records]
        assert sorted(found, key=str) == [
            ("decrypt", "main", "failed", NO_RIGHT, 1), ("decrypt", "main", "ok", None, ROWS),
            ("rewrap", "main", "ok", None, 5), ("rewrap", "next", "ok", None, 5)]
        assert records[0]["key_service_requests"], "they lead to the service's own log"


def test_headers_that_are_very_long_are_read_and_not_fetched_ahead(made, kms):
    with made.connect() as session:
        value = binary(one(session, "SELECT v FROM t WHERE n = 1"))
        header = one(session, "SELECT vod_tender_crypto.stored_head(%s::bytea)", value)
        longer = lengthened(header) + value[len(header):]
        assert one(session, "SELECT vod_tender_crypto.stored_head(%s::bytea)", longer) is None
        assert one(session, "SELECT envelope_prefetch(ARRAY[%s::bytea])", longer) == 0
        assert kms.count("Decrypt") == 0
        assert one(session, "SELECT convert_from(envelope_decrypt(%s::bytea), 'UTF8')", longer) == "value 1"


def test_what_a_service_refused_or_opened_in_vain_is_recorded_too(made, kms):
    with made.connect() as session:
        session.execute("SET vod_tender_crypto.audit = 'table'")
        values = [value for (value,) in session.execute("SELECT v FROM t ORDER BY n LIMIT 2").fetchall()]
        # The last bytes before the payload are the commitment; the wrapped DEK comes before them.
        ends = [len(head) for (head,) in (session.execute("SELECT vod_tender_crypto.stored_head(%s::text)", [value]).fetchone()
                                          for value in values)]
        binaries = [bytearray(binary(value)) for value in values]
        binaries[0][ends[0] - 1] ^= 1
        binaries[1][ends[1] - 33] ^= 1
        assert one(session, "SELECT envelope_prefetch(%s::bytea[])", [bytes(each) for each in binaries]) == 0
        assert kms.count("Decrypt") == 2
        records = audited(session)
        assert [(each["outcome"], each["sqlstate"], each["value_count"]) for each in records] == [("failed", "39000", 2)]


def test_what_was_refused_is_recorded_beside_an_error(made, kms):
    with made.connect() as session:
        session.execute("""SET vod_tender_crypto.audit = 'table'; SET vod_tender_crypto.kms_concurrency = 1;
                           SET vod_tender_crypto.kms_max_attempts = 1""")
        values = [value for value, in session.execute("SELECT v FROM t ORDER BY n LIMIT 6").fetchall()]
        kms.inject(faults.deny(), "Decrypt", times=2)
        kms.inject(faults.throttle(), "Decrypt")
        with fails(THROTTLED):
            one(session, "SELECT envelope_prefetch(%s::text[])", values)
        assert kms.count("Decrypt") == 3
        found = [(each["key"], each["outcome"], each["sqlstate"], each["value_count"]) for each in audited(session)]
        assert sorted(found) == [("main", "failed", DENIED, 2), ("main", "failed", THROTTLED, 1)]


def test_a_refused_prefetch_of_rewraps_is_recorded_as_one(made, roles):
    role = roles.make("mover")
    execute_on_all(roles, role)
    roles.admin(f"GRANT SELECT ON t TO {role}")
    with made.connect() as session:
        session.execute(f"SET vod_tender_crypto.audit = 'table'; SET ROLE {role}")
        with fails(NO_RIGHT):
            one(session, "SELECT envelope_prefetch(array_agg(v), 'rewrap', 'main') FROM t")
        session.execute("RESET ROLE")
        found = [(each["operation"], each["key"], each["outcome"], each["sqlstate"]) for each in audited(session)]
        assert found == [("rewrap", "main", "failed", NO_RIGHT)]


def test_a_refusal_is_recorded_under_the_key_that_it_names(mover, roles):
    """And not under the target, which was for the caller."""
    role = roles.may("next", "rewrap", what="mover")
    roles.admin(f"GRANT SELECT ON t TO {role}")
    mover.execute(f"SET vod_tender_crypto.audit = 'table'; SET ROLE {role}")
    with fails(NO_RIGHT, 'with key "main"'):
        one(mover, "SELECT rewrap(v, 'next') FROM t WHERE n = 1")
    mover.execute("RESET ROLE")
    one(mover, "SELECT vod_tender_crypto.flush_audit()")
    failed = mover.execute("SELECT operation, key, sqlstate FROM vod_tender_crypto.audit WHERE outcome = 'failed'").fetchall()
    assert failed == [("rewrap", "main", NO_RIGHT)]


def test_what_cannot_be_recorded_is_not_fetched(made, kms):
    with made.connect() as session:
        session.execute("SET vod_tender_crypto.audit_required = on")
        with fails("55000"):
            prefetch(session)
        assert kms.count("Decrypt") == 0


# -- what goes wrong ----------------------------------------------------------------------------------


def test_one_damaged_value_of_many_is_left_for_its_reader(reader, kms):
    other = kms.create_key()
    reader.execute("SELECT vod_tender_crypto.add_key('other', %s)", [kms.kek_uri(other)])
    # The header claims another key of the service than the one that wrapped its data key.
    value = binary(one(reader, "SELECT v FROM t WHERE n = 7"))
    broken = value.replace(kms.arn.encode(), other.encode()).replace(b"\x04main", b"\x05other")
    good = [binary(v) for v, in reader.execute("SELECT v FROM t WHERE n <> 7").fetchall()]
    assert one(reader, "SELECT envelope_prefetch(%s::bytea[])", [*good[:20], broken, *good[20:]]) == ROWS - 1
    assert kms.count("Decrypt") == ROWS
    for each in good:
        one(reader, "SELECT envelope_decrypt(%s::bytea)", each)
    assert kms.count("Decrypt") == ROWS
    with fails(UNVERIFIED):
        one(reader, "SELECT envelope_decrypt(%s::bytea)", broken)


@pytest.mark.parametrize("fault, state", [(faults.throttle(), THROTTLED), (faults.server_error(), UNREACHABLE)])
def test_a_service_that_does_not_answer_is_asked_no_further(reader, kms, fault, state):
    reader.execute("SET vod_tender_crypto.kms_max_attempts = 1; SET vod_tender_crypto.kms_concurrency = 4")
    kms.inject(faults.delay(0.02))
    assert prefetch(reader, where_clause="n <= 10") == 10
    kms.clear_faults()
    kms.reset_record()
    kms.inject(fault)
    with fails(state):
        prefetch(reader)
    assert kms.count("Decrypt") <= 8, "those that were under way, and perhaps the next ones"
    kms.clear_faults()
    assert prefetch(reader) == ROWS - 10, "what came before stays"
    assert reads_all(reader)


def test_a_key_that_refuses_leaves_the_others(reader, kms):
    kms.inject(faults.deny(), "Decrypt")
    assert prefetch(reader, where_clause="n <= 3") == 0
    with fails(DENIED):
        one(reader, "SELECT envelope_decrypt(v) FROM t WHERE n = 1")


def test_no_more_is_fetched_than_the_session_keeps(reader, kms):
    reader.execute("SET vod_tender_crypto.dek_cache_entries = 15")
    said = heard(reader)
    values = [v for v, in reader.execute("SELECT v FROM t ORDER BY n").fetchall()]
    assert one(reader, "SELECT envelope_prefetch(%s::text[])", values) == 15
    (severity, state, hint), = said
    assert (severity, state) == ("WARNING", "01000") and "dek_cache_entries" in hint
    for value in values[:15]:
        one(reader, "SELECT envelope_decrypt(%s)", value)
    assert kms.count("Decrypt") == 15 and stats(reader)["cache_evictions"] == 0, "the first ones are there"
    reader.execute("SELECT envelope_cache_clear()")
    assert prefetch(reader) == 15 and len(said) == 2
    assert prefetch(reader, where_clause="n <= 15") <= 15 and len(said) == 2


def test_unusable_arguments(reader):
    for arguments in ("'verify'", "NULL", "'decrypt', 'main'"):
        with fails(INVALID_PARAMETER):
            one(reader, f"SELECT envelope_prefetch(ARRAY['x'], {arguments})")
    with fails("42704"):
        one(reader, "SELECT envelope_prefetch(ARRAY['x'], 'rewrap', 'nobody')")


def test_a_cancel_loses_nothing_and_the_session_works_on(made, kms):
    kms.inject(faults.delay(0.25))
    with made.connect() as session, made.connect() as watcher:
        session.execute("SET vod_tender_crypto.kms_concurrency = 4")
        thread, ended = in_background(lambda: prefetch(session))
        kms.wait_for("Decrypt", 9)
        began = time.monotonic()
        assert one(watcher, "SELECT pg_cancel_backend(%s)", session.info.backend_pid)
        thread.join(10)
        (error, at), = ended
        assert error.sqlstate == CANCELED
        assert at - began <= SLACK, at - began
        kms.clear_faults()
        kept = stats(session)["cached_deks"]
        assert 5 <= kept < ROWS, "what made room for the ninth request"
        assert prefetch(session) == ROWS - kept
        assert reads_all(session)


# -- before a rewrap ----------------------------------------------------------------------------------


@pytest.fixture
def mover(made, kms):
    """A session with a second key, next, in the same service."""
    with made.connect() as session:
        session.execute("SELECT vod_tender_crypto.add_key('next', %s)", [kms.kek_uri(kms.create_key())])
        yield session


def test_a_rewrap_of_many_asks_once_for_each_and_many_at_a_time(mover, kms):
    kms.inject(faults.delay(0.03))
    mover.execute("INSERT INTO t SELECT n, v FROM t")
    assert prefetch(mover, operation="rewrap", key="next") == ROWS
    assert kms.counts == {"ReEncrypt": ROWS} and 2 <= kms.peak_in_flight <= 8 and not kms.doubled
    mover.execute("UPDATE t SET v = rewrap(v, 'next')")
    assert kms.counts == {"ReEncrypt": ROWS}
    assert one(mover, "SELECT count(*) FROM t WHERE envelope_info(v)->>'key' = 'next'") == 2 * ROWS
    assert prefetch(mover, operation="rewrap", key="next") == 0
    assert one(mover, "SELECT envelope_prefetch(array_agg(v), 'rewrap', 'next') FROM t") == 0
    assert reads_all(mover, 2 * ROWS)


def test_a_key_that_takes_nothing_is_the_one_that_failed(mover, kms):
    mover.execute("SET vod_tender_crypto.audit = 'table'")
    kms.inject(faults.deny(), "ReEncrypt")
    with fails(DENIED):
        one(mover, "SELECT rewrap(v, 'next') FROM t WHERE n = 1")
    with fails(DENIED):
        prefetch(mover, operation="rewrap", key="next", where_clause="n <= 3")
    one(mover, "SELECT vod_tender_crypto.flush_audit()")
    failed = mover.execute("""SELECT function, operation, key, sqlstate FROM vod_tender_crypto.audit
                              WHERE outcome = 'failed' ORDER BY function""").fetchall()
    assert failed == [(function, "rewrap", "next", DENIED) for function in ("envelope_prefetch", "rewrap")]


def test_to_a_key_in_a_file_it_unwraps_and_wraps(made, mover, kms):
    add_local_key(made, mover, "file", default=False)
    assert one(mover, "SELECT envelope_prefetch(array_agg(v), 'rewrap', 'file') FROM t") == ROWS
    assert kms.counts == {"Decrypt": ROWS}
    mover.execute("UPDATE t SET v = rewrap(v, 'file')")
    assert kms.counts == {"Decrypt": ROWS} and reads_all(mover)
    assert kms.counts == {"Decrypt": ROWS}


def test_behind_an_alias_what_is_up_to_date_is_not_asked_about(made, mover, kms):
    """One call tells what the alias stands for by now; then only what is under the old key is moved."""
    alias = "alias/rotating"
    kms.create_key(alias)
    mover.execute("SELECT vod_tender_crypto.add_key('alias', %s)", [kms.kek_uri(alias)])
    mover.execute("SET vod_tender_crypto.dek_max_uses = 1")
    mover.execute("CREATE TABLE r AS SELECT envelope_encrypt('old', key => 'alias') AS v FROM generate_series(1, 10)")
    mover.execute("SELECT envelope_cache_clear()")
    kms.point_alias(alias, kms.create_key())
    mover.execute("INSERT INTO r SELECT envelope_encrypt('new', key => 'alias') FROM generate_series(1, 10)")
    mover.execute("SELECT envelope_cache_clear()")
    assert prefetch(mover, target="r", operation="rewrap", key="alias") == 10
    assert kms.count("ReEncrypt") in (10, 11), "one may have been up to date: it was asked to learn that"
    asked = kms.count("ReEncrypt")
    mover.execute("UPDATE r SET v = rewrap(v, 'alias')")
    assert kms.count("ReEncrypt") == asked
    assert one(mover, "SELECT count(DISTINCT envelope_info(v)->>'kek_id') FROM r") == 1
