"""Ways to lose a value through a job, or to run code with another's rights, that were found and closed."""

from __future__ import annotations

import threading

import psycopg
import pytest

from helpers import add_local_key, one
from jobs import call, job_errors, last_job, migrate, notices, role, wait_until
from jobs import TABLE, make_tokens
from sqlstate import INVALID_PARAMETER, NOT_READY, fails

NOT_IMMUTABLE = "42P17"
NOT_SUPPORTED = "0A000"
EVIL = """CREATE FUNCTION hers.evil(text) RETURNS text LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS
          $$ BEGIN RAISE NOTICE 'evil as %', current_user; RETURN $1; END $$"""


@pytest.fixture
def hers(database, connection):
    """A session of a plain role with a schema of its own, which may run jobs."""
    with role(database) as name:
        connection.execute(f"CREATE SCHEMA hers AUTHORIZATION {name}")
        with database.connect(user=name) as session:
            session.execute(EVIL)
            yield session


def evil(heard) -> "set[str]":
    """As whom her function ran."""
    return {text for _, text in heard if text.startswith("evil as")}


def v1(connection, text: str) -> str:
    """A value in the legacy format."""
    with connection.transaction():
        connection.execute("SET LOCAL vod_tender_crypto.write_format = 'direct'")
        return one(connection, "SELECT envelope_encrypt(%s)", text)


# -- values ------------------------------------------------------------------------------------------------------


def test_ciphertext_is_not_taken_for_the_plaintext_that_its_row_states(connection):
    connection.execute("CREATE TABLE t (id int PRIMARY KEY, token text, v int)")
    stored = v1(connection, "secret")
    connection.execute("INSERT INTO t VALUES (1, %s, 0), (2, 'plain', 0)", [stored])
    job = call(connection, "migrate", "t", columns=["token"], version="v", set_columns={"v": 2})
    assert (job.rows_done, job.rows_failed) == (1, 1)
    assert job_errors(connection, job.job) == [({"id": 1}, "token", INVALID_PARAMETER)]
    assert one(connection, "SELECT token FROM t WHERE id = 1") == stored
    with fails(INVALID_PARAMETER, "direct ciphertext"):
        one(connection, "SELECT envelope_upgrade(%s, version => 0)", stored)


def test_there_and_back_and_there_without_bookkeeping(connection):
    connection.execute("CREATE TABLE t (id int PRIMARY KEY, token text, v int)")
    connection.execute("INSERT INTO t VALUES (1, 'secret', 0)")
    for procedure in ["migrate", "downgrade", "migrate"]:
        arguments = {"columns": ["token"], "version": "v"} if procedure == "migrate" else {}
        with fails(INVALID_PARAMETER, 'column v notes'):
            call(connection, procedure, "t", **arguments)
        call(connection, procedure, "t", **arguments, set_columns={})
    # The second migration stated version 0 of what was version 1 by then.
    assert last_job(connection).rows_failed == 1
    assert one(connection, "SELECT envelope_decrypt(token, version => 1) FROM t") == "secret"


def test_each_column_has_a_version_of_its_own(connection):
    connection.execute("CREATE TABLE t (id int PRIMARY KEY, a text, b text, va int, vb int)")
    call(connection, "migrate", "t", columns=["a"], version="va", set_columns={"va": 2})
    call(connection, "migrate", "t", columns=["b"], version="vb", set_columns={"vb": 2})
    connection.execute("INSERT INTO t VALUES (1, 'plain', %s, 0, 1)", [v1(connection, "direct")])
    assert call(connection, "migrate", "t", set_columns={"va": 2, "vb": 2}).rows_done == 1
    assert connection.execute("SELECT envelope_decrypt(a), envelope_decrypt(b) FROM t").fetchone() == ("plain", "direct")
    assert connection.execute("""SELECT column_name, version FROM vod_tender_crypto.protected_column
                                 ORDER BY 1""").fetchall() == [("a", "va"), ("b", "vb")]
    assert connection.execute("SELECT * FROM vod_tender_crypto.verify('t')").fetchall() == []


def test_a_stated_version_of_one_run_is_not_registered(connection):
    connection.execute("CREATE TABLE t (id int PRIMARY KEY, token text)")
    connection.execute("INSERT INTO t VALUES (1, 'plain')")
    assert call(connection, "migrate", "t", columns=["token"], version="0").rows_done == 1
    assert one(connection, "SELECT version FROM vod_tender_crypto.protected_column") is None
    assert connection.execute("SELECT * FROM vod_tender_crypto.verify('t')").fetchall() == []
    connection.execute("INSERT INTO t VALUES (2, %s)", [v1(connection, "direct")])
    assert call(connection, "migrate", "t").rows_done == 1
    assert one(connection, "SELECT envelope_decrypt(token) FROM t WHERE id = 2") == "direct"


def test_the_registered_key_and_context_are_used(database, connection):
    add_local_key(database, connection, "next", default=False)
    connection.execute("CREATE TABLE t (id int PRIMARY KEY, token text)")
    call(connection, "migrate", "t", columns=["token"], key="next", context={"tenant": "x"})
    connection.execute("INSERT INTO t VALUES (1, %s)", [v1(connection, "direct")])
    call(connection, "migrate", "t")
    info = one(connection, "SELECT envelope_info(token) FROM t")
    assert (info["key"], info["context"]) == ("next", {"tenant": "x"})


def test_an_aad_may_be_corrected_while_nothing_is_bound_to_it(connection):
    connection.execute("CREATE TABLE t (id int PRIMARY KEY, token text)")
    call(connection, "migrate", "t", columns=["token"])
    connection.execute("INSERT INTO t VALUES (1, %s)", [v1(connection, "direct")])
    call(connection, "migrate", "t", columns=["token"], aad="id::text")
    assert one(connection, "SELECT envelope_decrypt(token, aad => '1') FROM t") == "direct"
    call(connection, "migrate", "t", columns=["token"], aad="(id)::text")
    with fails(INVALID_PARAMETER, "another aad"):
        call(connection, "migrate", "t", columns=["token"], aad="'x' || id::text")


def test_a_job_of_another_aad_is_not_resumed(connection):
    connection.execute("CREATE TABLE t (id int PRIMARY KEY, token text)")
    old = call(connection, "migrate", "t", columns=["token"], aad="id::text").job
    connection.execute("DELETE FROM vod_tender_crypto.protected_column")
    call(connection, "migrate", "t", columns=["token"], aad="'x' || id::text")
    connection.execute("INSERT INTO t VALUES (1, %s)", [v1(connection, "direct")])
    with fails(NOT_READY, "another aad"):
        call(connection, "resume", old)
    assert one(connection, "SELECT envelope_version(token) FROM t") == 1


@pytest.mark.parametrize("arguments", [
    {"columns": ["b"], "aad": "id::text", "set_columns": {"kind": "new"}}, {"columns": ["kind"]},
])
def test_what_identifies_another_columns_values_stays(connection, arguments):
    connection.execute("CREATE TABLE t (id int PRIMARY KEY, a text, b text, kind text)")
    call(connection, "migrate", "t", columns=["a"], aad="kind || id::text")
    with fails(NOT_IMMUTABLE, "kind"):
        call(connection, "migrate", "t", **arguments)


@pytest.mark.parametrize("aad", ["raw::text", "f::text", "'x' || p::text", "f::float4::text", "(raw)::text || id::text"])
def test_an_aad_that_a_setting_changes(connection, aad):
    connection.execute("CREATE TABLE t (id int PRIMARY KEY, token text, raw bytea, f float8, p point)")
    with fails(NOT_IMMUTABLE):
        call(connection, "migrate", "t", columns=["token"], aad=aad)
    call(connection, "migrate", "t", columns=["token"], aad="encode(raw, 'hex')")


@pytest.mark.parametrize("encoding", ["LATIN1", "UTF8"])
def test_an_aad_in_the_databases_encoding(database, connection, encoding):
    name = f"{database.name}_{encoding.lower()}"
    connection.execute(f"CREATE DATABASE {name} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0")
    with database.cluster.connect(name) as session:
        session.execute("CREATE EXTENSION vod_tender_crypto")
        add_local_key(database.cluster, session, "default")
        session.execute("""CREATE TABLE t ("clé" int PRIMARY KEY, "jeton é" text); INSERT INTO t VALUES (1, 'token')""")
        call(session, "migrate", "t", columns=["jeton é"], aad="""'é/' || "clé"::text || '/{column}'""", version="0")
        assert one(session, """SELECT envelope_decrypt("jeton é", aad => 'é/1/jeton é') FROM t""") == "token"
        assert session.execute("SELECT * FROM vod_tender_crypto.verify('t')").fetchall() == []
    connection.execute(f"DROP DATABASE {name}")


def test_a_temporary_table_is_not_its_namesake(connection):
    connection.execute("SET search_path = public, pg_temp")
    connection.execute("CREATE TABLE t (id int PRIMARY KEY, token text); INSERT INTO t VALUES (1, 'permanent')")
    connection.execute("CREATE TEMP TABLE t (id int PRIMARY KEY, token text); INSERT INTO pg_temp.t VALUES (1, 'temporary')")
    assert call(connection, "migrate", "pg_temp.t", columns=["token"], version="0").rows_done == 1
    assert one(connection, "SELECT token FROM public.t") == "permanent"
    assert one(connection, "SELECT envelope_decrypt(token) FROM pg_temp.t") == "temporary"


def test_done_means_that_no_row_is_left_but_failures(database, connection):
    """One row fails and goes, another is locked: as many are left as failed, and yet the job is not done."""
    connection.execute("CREATE TABLE t (id int PRIMARY KEY, token text)")
    connection.execute("INSERT INTO t SELECT g, %s FROM generate_series(1, 4) g", [v1(connection, "direct")])
    connection.execute("UPDATE t SET token = 'kms:v2:broken' WHERE id = 1")
    with database.connect(autocommit=False) as blocker, database.connect() as runner:
        blocker.execute("SELECT * FROM t WHERE id = 4 FOR UPDATE")
        thread = threading.Thread(target=call, args=(runner, "migrate", "t"), kwargs={"columns": ["token"], "batch_size": 1})
        thread.start()
        wait_until(lambda: one(connection, "SELECT max(pass) FROM vod_tender_crypto.job") or 0 > 1)
        connection.execute("DELETE FROM t WHERE id = 1")
        blocker.rollback()
        thread.join()
    job = last_job(connection)
    assert job.state == "done" and job.rows_done == 3
    assert one(connection, "SELECT count(*) FROM t WHERE envelope_version(token) = 2") == 3


def test_a_trigger_that_comes_while_the_job_runs(database, connection):
    make_tokens(connection, 400, direct="true")
    with database.connect() as runner:
        failure = []

        def run():
            try:
                migrate(runner, batch_size=10, max_rows_per_second=200)
            except psycopg.Error as error:
                failure.append(error.sqlstate)

        thread = threading.Thread(target=run)
        thread.start()
        wait_until(lambda: (one(connection, "SELECT max(rows_done) FROM vod_tender_crypto.job") or 0) > 20)
        connection.execute(f"""
            CREATE FUNCTION lower_it() RETURNS trigger LANGUAGE plpgsql AS
                $$ BEGIN NEW.access_token := lower(NEW.access_token); RETURN NEW; END $$;
            CREATE TRIGGER lower_it BEFORE UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION lower_it()""")
        thread.join()
    assert failure == ["09000"]
    connection.execute(f"DROP TRIGGER lower_it ON {TABLE}")
    assert connection.execute(f"SELECT * FROM vod_tender_crypto.verify('{TABLE}')").fetchall() == []


def test_a_row_that_cannot_be_locked_enough_is_skipped(database, connection):
    connection.execute("CREATE TABLE t (id int PRIMARY KEY, token text UNIQUE)")
    connection.execute("INSERT INTO t VALUES (1, %s), (2, %s)", [v1(connection, "one"), v1(connection, "two")])
    with database.connect(autocommit=False) as reader, database.connect() as runner:
        reader.execute("SELECT * FROM t WHERE id = 1 FOR KEY SHARE")
        thread = threading.Thread(target=call, args=(runner, "migrate", "t"), kwargs={"columns": ["token"]})
        thread.start()
        wait_until(lambda: (one(connection, "SELECT max(rows_done) FROM vod_tender_crypto.job") or 0) == 1)
        reader.rollback()
        thread.join()
    assert (last_job(connection).state, last_job(connection).rows_done) == ("done", 2)


def test_a_partition_whose_key_is_the_column_is_refused(connection):
    connection.execute("""CREATE TABLE p (token text, id int); CREATE TABLE c (PRIMARY KEY (token)) INHERITS (p);
                          INSERT INTO c VALUES ('plaintext', 1)""")
    with fails(NOT_SUPPORTED, "token"):
        call(connection, "migrate", "p", columns=["token"], version="0")


@pytest.mark.parametrize("setting", [
    "dek_cache_entries = 1; SET vod_tender_crypto.dek_max_uses = 10", "dek_max_bytes = '1kB'", "dek_max_uses = 1",
])
def test_tight_limits_slow_a_job_and_fail_no_row(connection, setting):
    connection.execute(f"SET vod_tender_crypto.{setting}")
    connection.execute("CREATE TABLE t (id int PRIMARY KEY, token text)")
    connection.execute("INSERT INTO t SELECT g, repeat('x', 3000) || g FROM generate_series(1, 300) g")
    for procedure, arguments in [("migrate", {"columns": ["token"], "version": "0"}), ("downgrade", {}), ("migrate", {})]:
        job = call(connection, procedure, "t", **arguments)
        assert (job.state, job.rows_done, job.rows_failed) == ("done", 300, 0), procedure
    assert one(connection, "SELECT count(*) FROM t WHERE envelope_decrypt(token) = repeat('x', 3000) || id") == 300


@pytest.mark.parametrize("rule", ["INSTEAD NOTHING", "INSTEAD UPDATE u SET token = NEW.token", "ALSO DELETE FROM u"])
def test_a_table_with_a_rule_is_refused(connection, rule):
    connection.execute("CREATE TABLE t (id int PRIMARY KEY, token text); CREATE TABLE u (LIKE t)")
    connection.execute(f"CREATE RULE r AS ON UPDATE TO t DO {rule}")
    with fails(NOT_SUPPORTED, "rule"):
        call(connection, "migrate", "t", columns=["token"])


# -- rights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statement", [
    "SELECT * FROM vod_tender_crypto.census()", "SELECT * FROM vod_tender_crypto.legacy_key_unused()",
    "SELECT * FROM vod_tender_crypto.verify('hers.a', '{token}')",
    "CALL vod_tender_crypto.migrate('hers.a', '{token}', dry_run => true)",
])
def test_a_view_put_in_the_place_of_a_table(database, connection, hers, statement):
    """The superuser's statement waits for her lock; when she lets go, a view has the table's name."""
    hers.execute("CREATE TABLE hers.a (id int PRIMARY KEY, token text); INSERT INTO hers.a VALUES (1, 'plain')")
    hers.execute("BEGIN; ALTER TABLE hers.a RENAME TO b; CREATE VIEW hers.a AS SELECT 1 AS id, hers.evil('x') AS token")
    heard = notices(connection)

    def run():
        try:
            connection.execute(statement)
        except psycopg.Error:
            pass

    thread = threading.Thread(target=run)
    thread.start()
    with database.connect() as watching:
        wait_until(lambda: one(watching, """SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'
                                            AND pid = %s""", connection.info.backend_pid))
    hers.execute("COMMIT")
    thread.join()
    assert evil(heard) == set()


@pytest.mark.parametrize("expression", [
    "domain_in('x', 'hers.d'::regtype, -1) IS NULL", "record_in('(x)', 0::oid, -1) IS NULL",
    "array_in('{x}', 0::oid, -1) IS NULL", "fmgr_sql_validator(0::oid) IS NULL", "to_jsonb(e) IS NULL",
    "json_build_array(e) IS NULL", "enum_in('a', 0::oid) IS NULL", "to_jsonb(token) = '1'", "tags && '{a}'",
    "pg_input_is_valid('x', 'hers.d')", "row_to_json(ROW(token)) IS NULL", "jsonb_populate_record(NULL, '{}') IS NULL",
])
def test_functions_that_call_a_types_own(connection, hers, expression):
    hers.execute("""CREATE DOMAIN hers.d AS text CHECK (hers.evil(VALUE) IS NOT NULL); CREATE TYPE hers.e AS ENUM ('a');
        CREATE FUNCTION hers.evil_json(hers.e) RETURNS json LANGUAGE sql AS $$ SELECT to_json(hers.evil('x')) $$;
        CREATE CAST (hers.e AS json) WITH FUNCTION hers.evil_json(hers.e);
        CREATE TABLE hers.t (id hers.e PRIMARY KEY, token text, e hers.e, tags text[]); INSERT INTO hers.t VALUES ('a', 'x', 'a')""")
    heard = notices(connection)
    with pytest.raises(psycopg.Error):
        call(connection, "migrate", "hers.t", columns=["token"], where_clause=expression)
    # The row's key is of such a type too.
    call(connection, "migrate", "hers.t", columns=["token"], dry_run=True)
    assert last_job(connection).rows_failed == 1
    connection.execute("SELECT * FROM vod_tender_crypto.verify('hers.t', '{token}')")
    assert evil(heard) == set()


def test_the_callers_path_gives_a_job_nothing_to_call(connection, hers):
    hers.execute("""
        CREATE FUNCTION hers.format(text, bigint, text) RETURNS text LANGUAGE sql AS 'SELECT hers.evil($1)';
        CREATE FUNCTION hers.format(text, bigint) RETURNS text LANGUAGE sql AS 'SELECT hers.evil($1)';
        CREATE FUNCTION hers.to_jsonb(text) RETURNS jsonb LANGUAGE sql AS 'SELECT pg_catalog.to_jsonb(hers.evil($1))';
        CREATE FUNCTION hers.cat(varchar, text) RETURNS text LANGUAGE sql AS 'SELECT hers.evil($2)';
        CREATE OPERATOR hers.|| (LEFTARG = varchar, RIGHTARG = text, FUNCTION = hers.cat);
        CREATE TABLE hers.t (id int PRIMARY KEY, name varchar(10), token text); INSERT INTO hers.t VALUES (1, 'n', 'plain')""")
    connection.execute("SET search_path = hers, public")
    heard = notices(connection)
    aad = "name || 'x' || '/' || id::text"
    call(connection, "migrate", "hers.t", columns=["token"], aad=aad, where_clause="name || 'x' = 'nx'", version="0")
    assert one(connection, "SELECT envelope_decrypt(token, aad => 'nx/1') FROM t") == "plain"
    connection.execute("INSERT INTO t VALUES (2, 'n', 'plain')")
    with pytest.raises(psycopg.Error):
        call(connection, "migrate", "hers.t", columns=["token"], max_errors=0)
    assert evil(heard) == set()


def test_what_a_failed_expression_says_shows_no_value(connection):
    connection.execute("CREATE TABLE t (id int PRIMARY KEY, token text); INSERT INTO t VALUES (1, 'SEKRIT')")
    for expression in ["token::jsonb IS NULL", "token::int = 1"]:
        with pytest.raises(psycopg.Error) as caught:
            call(connection, "migrate", "t", columns=["token"], where_clause=expression, version="0")
        assert "SEKRIT" not in str(caught.value) + str(caught.value.diag.message_detail)
    assert "SEKRIT" not in str(connection.execute("SELECT message FROM vod_tender_crypto.job").fetchall())


def test_a_short_head_is_an_error_and_no_panic(connection):
    task = '{"operation": "downgrade", "check_wraps": true, "aad_given": false}'
    for head in [b"\x8fVT2", b"", b"x", b"\x8fVT2" + bytes(300)]:
        connection.execute("SELECT vod_tender_crypto.prepare_batch(%s, ARRAY[%s::bytea], 0, 0)", [task, head])
