"""Kinds of tables, names and expressions that jobs meet; census, retiring keys, verify, and who may run what."""

from __future__ import annotations

import re

import psycopg
import pytest

from cluster import Cluster
from helpers import add_local_key, one
from jobs import (AAD, COLUMNS, MIGRATION, TABLE, call, contents, job_errors, last_job,
                  make_tokens, migrate, notices, role, versions, wait_until, wrong_tokens)
from sqlstate import INVALID_PARAMETER, MALFORMED_BYTEA, NO_RIGHT, NOT_READY, UNKNOWN_KEY, UNVERIFIED, detail, fails

WRONG_KIND = "42809"
WRONG_TYPE = "42804"
NO_COLUMN = "42703"
NOT_SUPPORTED = "0A000"
TOO_LONG = "22001"
CHECK_VIOLATED = "23514"
STILL_NEEDED = "2BP01"
IN_USE = "55006"


@pytest.fixture
def connection(database):
    """A session in it, which takes plaintext for what it is."""
    with database.connect() as session:
        session.execute("SET vod_tender_crypto.plaintext_reads = 'allow'")
        yield session


def direct(connection, statements: str) -> None:
    """Runs statements whose envelope_encrypt() gives the legacy format."""
    with connection.transaction():
        connection.execute("SET LOCAL vod_tender_crypto.write_format = 'direct'")
        connection.execute(statements)


def jobs(connection) -> int:
    """How many jobs were noted."""
    return one(connection, "SELECT count(*) FROM vod_tender_crypto.job")


def count(connection, condition: str, table: str = "t") -> int:
    """Rows for which the condition holds."""
    return connection.execute(f"SELECT count(*) FROM {table} WHERE {condition}").fetchone()[0]


# -- kinds of tables ---------------------------------------------------------------------------------------------


def test_partitions_of_any_layout(connection):
    """By range and by hash, with columns in another order, dropped ones, and a default partition."""
    connection.execute("""
        CREATE TABLE t (id int, kind text, token text, PRIMARY KEY (id, kind)) PARTITION BY RANGE (id);
        CREATE TABLE t_low PARTITION OF t FOR VALUES FROM (0) TO (100) PARTITION BY HASH (kind);
        CREATE TABLE t_low_0 PARTITION OF t_low FOR VALUES WITH (MODULUS 2, REMAINDER 0);
        CREATE TABLE t_low_1 (gone int, token text, kind text NOT NULL, gone_too text, id int NOT NULL);
        ALTER TABLE t_low_1 DROP gone, DROP gone_too;
        ALTER TABLE t_low ATTACH PARTITION t_low_1 FOR VALUES WITH (MODULUS 2, REMAINDER 1);
        CREATE TABLE t_rest PARTITION OF t DEFAULT""")
    direct(connection, """INSERT INTO t SELECT g, 'kind' || g % 7, envelope_encrypt('token' || g)
                          FROM generate_series(1, 200) g""")
    connection.execute("UPDATE t SET token = overlay(token PLACING '!' FROM 3) WHERE id IN (50, 150)")
    spread = connection.execute("SELECT tableoid::regclass::text, id, kind FROM t ORDER BY id").fetchall()
    assert {name for name, _, _ in spread} == {"t_low_0", "t_low_1", "t_rest"}
    job = call(connection, "migrate", "t", columns=["token"], aad="id::text || '/' || kind", version="1", percent=60)
    part = job.rows_done
    assert job.state == "done" and 80 < part < 150 and count(connection, "envelope_version(token) = 2") == part
    job = call(connection, "migrate", "t", version="1")
    assert (job.state, job.rows_done + part, job.rows_left, job.target) == ("done", 198, 2, "t")
    assert count(connection, "envelope_decrypt(token, aad => id || '/' || kind) = 'token' || id") == 198
    assert connection.execute("SELECT tableoid::regclass::text, id, kind FROM t ORDER BY id").fetchall() == spread
    failed = connection.execute("""SELECT relation::text, row_key->'id' FROM vod_tender_crypto.job_error
                                   WHERE job = %s ORDER BY 2""", [job.job]).fetchall()
    assert failed == [(spread[49][0], 50), ("t_rest", 150)]
    rows = connection.execute("""SELECT relation::text, registered, sum(value_count)::int
                                 FROM vod_tender_crypto.census('t') WHERE version = 2 GROUP BY 1, 2""").fetchall()
    assert len(rows) == 3 and all(registered for _, registered, _ in rows) and sum(n for _, _, n in rows) == 198


def test_a_single_partition(connection):
    connection.execute("""
        CREATE TABLE t (id int PRIMARY KEY, token text) PARTITION BY LIST (id);
        CREATE TABLE t1 PARTITION OF t FOR VALUES IN (1);
        CREATE TABLE t2 PARTITION OF t FOR VALUES IN (2)""")
    direct(connection, "INSERT INTO t SELECT g, envelope_encrypt('token' || g) FROM generate_series(1, 2) g")
    assert call(connection, "migrate", "t1", columns=["token"], aad="id::text").rows_done == 1
    assert call(connection, "migrate", "t", columns=["token"], aad="id::text").rows_done == 1
    assert count(connection, "envelope_decrypt(token, aad => id::text) = 'token' || id") == 2


def test_children_by_inheritance(connection):
    connection.execute("""
        CREATE TABLE t (id int PRIMARY KEY, token text);
        CREATE TABLE u (more text, id int NOT NULL, token text NOT NULL);
        ALTER TABLE u INHERIT t;
        CREATE TABLE v (PRIMARY KEY (id)) INHERITS (t)""")
    direct(connection, """INSERT INTO t SELECT g, envelope_encrypt('token' || g) FROM generate_series(1, 10) g;
        INSERT INTO u SELECT 'x', g, envelope_encrypt('token' || g) FROM generate_series(11, 30) g;
        INSERT INTO v SELECT g, envelope_encrypt('token' || g) FROM generate_series(31, 60) g""")
    job = call(connection, "migrate", "t", columns=["token"], aad="id::text")
    assert (job.state, job.rows_done, job.rows_left) == ("done", 60, 0)
    assert count(connection, "envelope_version(token) = 2") == 60
    assert count(connection, "envelope_decrypt(token, aad => id::text) = 'token' || id") == 60
    assert connection.execute("SELECT * FROM vod_tender_crypto.verify('t')").fetchall() == []


@pytest.mark.parametrize("definition, key", [
    ("tenant int, id uuid, PRIMARY KEY (tenant, id)", ["tenant", "id"]),
    ("id uuid PRIMARY KEY, tenant int", ["id"]),
    ("id uuid, tenant int, at timestamptz DEFAULT '2020-01-01', PRIMARY KEY (at, id) INCLUDE (tenant)", ["at", "id"]),
])
def test_primary_keys_of_any_kind(connection, definition, key):
    connection.execute(f"CREATE TABLE t ({definition}, token text)")
    direct(connection, """INSERT INTO t (tenant, id, token) SELECT g, gen_random_uuid(), envelope_encrypt('token' || g)
                          FROM generate_series(1, 200) g""")
    connection.execute("UPDATE t SET token = 'kms:v2:not an envelope' WHERE tenant = 7")
    half = call(connection, "migrate", "t", columns=["token"], aad="id::text || '/' || tenant::text", percent=50)
    assert 70 < half.rows_done < 130
    job = call(connection, "migrate", "t")
    assert (job.state, job.rows_done + half.rows_done, job.rows_failed) == ("done", 199, 1)
    (row_key, column, state), = job_errors(connection, job.job)
    expected = one(connection, f"SELECT to_jsonb(k) FROM (SELECT {', '.join(key)} FROM t WHERE tenant = 7) k")
    assert row_key == expected and (column, state) == ("token", "22P02")
    opened = "envelope_decrypt(token, aad => id || '/' || tenant) = 'token' || tenant"
    assert count(connection, f"tenant <> 7 AND {opened}") == 199


@pytest.mark.parametrize("unique", ["", "; CREATE UNIQUE INDEX ON t (id)"])
def test_no_primary_key(connection, unique):
    connection.execute(f"CREATE TABLE t (id int, token text){unique}")
    direct(connection, "INSERT INTO t SELECT g, envelope_encrypt('token' || g) FROM generate_series(1, 100) g")
    connection.execute("UPDATE t SET token = 'plaintext' WHERE id = 5")
    connection.execute("INSERT INTO t SELECT 200, token FROM t WHERE id = 6")
    with fails(NOT_READY, "no primary key"):
        call(connection, "migrate", "t", columns=["token"], percent=50)
    assert jobs(connection) == 0
    job = call(connection, "migrate", "t", columns=["token"], aad="id::text", version="1")
    assert (job.state, job.rows_done, job.rows_failed) == ("done", 100, 1)
    place = one(connection, "SELECT ctid::text FROM t WHERE id = 5")
    assert [key for key, _, _ in job_errors(connection, job.job)] == [{"ctid": place}]
    assert count(connection, "id <> 5 AND envelope_decrypt(token, aad => id::text) = 'token' || least(id, 6 + 94 * "
                             "(id <> 200)::int)") == 100


def test_temporary_and_unlogged_tables(connection):
    for kind in ["TEMP", "UNLOGGED"]:
        connection.execute(f"CREATE {kind} TABLE t (id int PRIMARY KEY, token text)")
        direct(connection, "INSERT INTO t SELECT g, envelope_encrypt('token' || g) FROM generate_series(1, 20) g")
        assert call(connection, "migrate", "t", columns=["token"]).rows_done == 20
        assert count(connection, "envelope_version(token) = 2") == 20
        connection.execute("DROP TABLE t")


# The function of a trigger that changes nothing: a table with one is watched for changes by triggers.
SAME = "CREATE FUNCTION public.same() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'"

ODD_NAMES = ['To"k en', "{column}", "it's", "select", "%s%I$1", "tid", "t", "n0", "{kek_id}", "ünï"]


@pytest.mark.parametrize("guarded", [False, True])
def test_odd_names(connection, guarded):
    schema, table = '"Odd ""schema"" {column}"', '"Ta\'ble; %I {column} --"'
    name = f"{schema}.{table}"
    quoted = ['"' + odd.replace('"', '""') + '"' for odd in ODD_NAMES]
    connection.execute(f"""CREATE SCHEMA {schema};
        CREATE TABLE {name} ("Key col'" int PRIMARY KEY, "l" text DEFAULT 'l', "KEK id {{kek_id}}" text,
                             {", ".join(f"{column} text" for column in quoted)})""")
    if guarded:
        connection.execute(f"""{SAME}; CREATE TRIGGER "t" BEFORE UPDATE ON {name}
                                       FOR EACH ROW EXECUTE FUNCTION public.same()""")
    direct(connection, f"""INSERT INTO {name} ("Key col'", {", ".join(quoted)})
        SELECT g, {", ".join(f"envelope_encrypt('token {at} ' || g)" for at in range(len(quoted)))}
        FROM generate_series(1, 30) g""")
    connection.execute(f"""INSERT INTO {name} ("Key col'", "t") VALUES (31, 'kms:v2:broken')""")
    job = call(connection, "migrate", name, columns=ODD_NAMES, aad="""l || "Key col'"::text || '/{column}'""",
               where_clause="""l = 'l' AND "Key col'" > 0""", percent=99.9999,
               set_columns={"KEK id {kek_id}": "it's \\ {kek_id}"})
    assert (job.state, job.rows_done, job.rows_failed) == ("done", 30, 1), job.message
    assert job_errors(connection, job.job) == [({"Key col'": 31}, "t", "22P02")]
    for at, (odd, column) in enumerate(zip(ODD_NAMES, quoted)):
        aad = f"""'l' || "Key col'" || '/' || '{odd.replace("'", "''")}'"""
        opened = f"""envelope_version({column}) = 2
                     AND envelope_decrypt({column}, aad => {aad}) = 'token {at} ' || "Key col'" """
        assert count(connection, f""" "Key col'" < 31 AND {opened}""", name) == 30, odd
    noted = f""""KEK id {{kek_id}}" = 'it''s \\ ' || (envelope_info("select")->>'kek_id')"""
    assert count(connection, noted, name) == 30
    assert verified(connection, name) == [({"Key col'": 31}, "t", "22P02")]
    assert one(connection, "SELECT sum(value_count) FROM vod_tender_crypto.census() WHERE version = 2") == 300
    call(connection, "downgrade", name, where_clause="""not "t" like '%broken'""")
    assert count(connection, """envelope_version("it's") = 1""", name) == 30


def test_generated_columns_follow(connection):
    connection.execute("""CREATE TABLE t (id int PRIMARY KEY, token text,
        size int GENERATED ALWAYS AS (length(token)) STORED, head text GENERATED ALWAYS AS (left(token, 7)) STORED)""")
    direct(connection, "INSERT INTO t SELECT g, envelope_encrypt('token' || g) FROM generate_series(1, 20) g")
    assert call(connection, "migrate", "t", columns=["token"], aad="id::text").rows_done == 20
    assert count(connection, "head = 'kms:v2:' AND size = length(token)") == 20
    connection.execute(f"{SAME}; CREATE TRIGGER same BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION same()")
    assert call(connection, "downgrade", "t").rows_done == 20
    assert count(connection, "head <> 'kms:v2:' AND size = length(token)") == 20


def test_bytea_and_text_side_by_side(database, connection):
    connection.execute("CREATE TABLE t (id int PRIMARY KEY, b1 bytea, a text, b2 bytea, c varchar, kek text)")
    direct(connection, """INSERT INTO t SELECT g, envelope_encrypt(('b1-' || g)::bytea), envelope_encrypt('a-' || g),
        envelope_encrypt(('b2-' || g)::bytea), envelope_encrypt('c-' || g)
        FROM generate_series(1, 50) g""")
    connection.execute(r"UPDATE t SET b1 = '\x8f565431ff' WHERE id = 9")
    connection.execute("UPDATE t SET b2 = NULL, c = '' WHERE id = 10")
    connection.execute(r"UPDATE t SET b2 = substr(envelope_encrypt('\x00'::bytea), 1, 60) WHERE id = 11")
    job = call(connection, "migrate", "t", columns=["b1", "a", "b2", "c"], aad="id::text || '{column}'", version="1",
               set_columns={"kek": "{kek_id}"})
    assert (job.state, job.rows_done, job.rows_failed) == ("done", 48, 2)
    assert {(key["id"], column) for key, column, _ in job_errors(connection, job.job)} == {(9, "b1"), (11, "b2")}
    assert dict((key["id"], state) for key, _, state in job_errors(connection, job.job))[11] == MALFORMED_BYTEA
    opened = " AND ".join([f"envelope_decrypt({c}, aad => id || '{c}') = ('{c}-' || id)::bytea" for c in ["b1", "b2"]]
                          + [f"envelope_decrypt({c}, aad => id || '{c}') = '{c}-' || id" for c in ["a", "c"]])
    assert count(connection, f"id NOT IN (9, 10, 11) AND {opened} AND kek = envelope_info(b1)->>'kek_id'") == 47
    assert count(connection, "id = 10 AND b2 IS NULL AND c = '' AND envelope_version(a) = 2") == 1
    add_local_key(database, connection, "second", default=False)
    payloads = "SELECT id, substr(b1, length(b1) - 20), split_part(a, ':', 4) FROM t ORDER BY id"
    before = connection.execute(payloads).fetchall()
    job = call(connection, "rewrap_table", "t", key="second", set_columns={"kek": "{kek_id}"},
               where_clause="id NOT IN (9, 11)")
    assert job.rows_done == 48 and connection.execute(payloads).fetchall() == before
    assert count(connection, f"id NOT IN (9, 10, 11) AND {opened} AND kek = envelope_info(b1)->>'kek_id'") == 47
    assert call(connection, "downgrade", "t", where_clause="id NOT IN (9, 11)").rows_done == 48
    assert count(connection, f"id NOT IN (9, 10, 11) AND envelope_version(b2) = 1 AND {opened}") == 47


def test_a_column_too_short_for_some_values(connection):
    connection.execute("CREATE TABLE t (id int PRIMARY KEY, token varchar(400))")
    direct(connection, """INSERT INTO t SELECT g, envelope_encrypt(repeat('x', CASE g % 10 WHEN 0 THEN 180 ELSE 5 END))
                          FROM generate_series(1, 100) g""")
    before = connection.execute("SELECT ctid, * FROM t WHERE id % 10 = 0 ORDER BY id").fetchall()
    job = call(connection, "migrate", "t", columns=["token"])
    assert (job.state, job.rows_done, job.rows_failed, job.rows_left) == ("done", 90, 10, 10)
    errors = job_errors(connection, job.job)
    assert {(column, state) for _, column, state in errors} == {("*", TOO_LONG)}
    assert {key["id"] for key, _, _ in errors} == set(range(10, 101, 10))
    assert connection.execute("SELECT ctid, * FROM t WHERE id % 10 = 0 ORDER BY id").fetchall() == before
    assert count(connection, "id % 10 > 0 AND envelope_decrypt(token) = 'xxxxx'") == 90
    connection.execute("ALTER TABLE t ALTER token TYPE text")
    assert call(connection, "resume", job.job).rows_done == 100


def test_a_constraint_that_one_row_breaks(connection):
    connection.execute("""CREATE TABLE t (id int PRIMARY KEY, token text, b bytea, note int,
                                          CHECK (id <> 42 OR token NOT LIKE 'kms:v2:%'))""")
    direct(connection, """INSERT INTO t SELECT g, envelope_encrypt('token' || g), envelope_encrypt(('b' || g)::bytea)
                          FROM generate_series(1, 100) g""")
    job = call(connection, "migrate", "t", columns=["b", "token"], aad="id::text", set_columns={"note": 2})
    assert (job.state, job.rows_done, job.rows_failed) == ("done", 99, 1)
    assert job_errors(connection, job.job) == [({"id": 42}, "*", CHECK_VIOLATED)]
    assert count(connection, "id <> 42 AND envelope_decrypt(token, aad => id::text) = 'token' || id AND note = 2"
                             " AND envelope_decrypt(b, aad => id::text) = ('b' || id)::bytea") == 99
    assert count(connection, "id = 42 AND note IS NULL AND envelope_version(b) + envelope_version(token) = 2") == 1


def test_large_values(connection):
    connection.execute("""CREATE TABLE t (id int PRIMARY KEY, token text, b bytea, note text);
                          ALTER TABLE t ALTER note SET STORAGE EXTERNAL""")
    direct(connection, """INSERT INTO t SELECT g, envelope_encrypt(string), envelope_encrypt(string::bytea), string
        FROM generate_series(1, 12) g, LATERAL (SELECT repeat(md5(g::text), 100000 / g) AS string) s""")
    assert count(connection, "oid = 't'::regclass AND pg_relation_size(reltoastrelid) > 10000000", "pg_class") == 1
    assert call(connection, "migrate", "t", columns=["token", "b"], aad="id::text || '{column}'").rows_done == 12
    opened = """envelope_decrypt(token, aad => id || 'token') = note
                AND envelope_decrypt(b, aad => id || 'b') = note::bytea AND length(note) = 32 * (100000 / id)"""
    assert count(connection, f"{opened} AND envelope_version(b) = 2") == 12
    assert call(connection, "downgrade", "t").rows_done == 12
    assert count(connection, f"{opened} AND envelope_version(b) = 1") == 12


def test_row_level_security(database, connection, owner):
    make_tokens(connection, 20)
    connection.execute(f"""ALTER TABLE {TABLE} OWNER TO {owner}; ALTER TABLE {TABLE} ENABLE ROW LEVEL SECURITY;
                           CREATE POLICY half ON {TABLE} USING (provider = 'twitch')""")
    with database.connect(user=owner) as session:
        assert migrate(session).rows_done == 20
        connection.execute(f"ALTER TABLE {TABLE} FORCE ROW LEVEL SECURITY")
        for procedure, arguments in [("migrate", MIGRATION), ("downgrade", {}), ("rewrap_table", {})]:
            with fails(NO_RIGHT, "row-level security"):
                call(session, procedure, TABLE, **arguments)
        with fails(NO_RIGHT, "row-level security"):
            session.execute(f"SELECT * FROM vod_tender_crypto.verify('{TABLE}')")
        heard = notices(session)
        assert session.execute(f"SELECT * FROM vod_tender_crypto.census('{TABLE}')").fetchall() == []
        assert any("not read" in text for severity, text in heard if severity == "WARNING")
    assert jobs(connection) == 1
    assert wrong_tokens(connection) == 0 and versions(connection) == {2: 40}
    assert call(connection, "downgrade", TABLE, set_columns={"encryption_version": 1}).rows_done == 20


def test_what_is_no_local_table(connection):
    connection.execute("""
        CREATE TABLE t (id int, token text);
        CREATE VIEW v AS TABLE t;
        CREATE MATERIALIZED VIEW m AS TABLE t;
        CREATE SEQUENCE s;
        CREATE INDEX i ON t (id);
        CREATE TYPE c AS (id int, token text);
        CREATE FOREIGN DATA WRAPPER dummy;
        CREATE SERVER nowhere FOREIGN DATA WRAPPER dummy;
        CREATE FOREIGN TABLE f (id int, token text) SERVER nowhere;
        CREATE TABLE p (id int, token text) PARTITION BY LIST (id);
        CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1);
        CREATE FOREIGN TABLE p2 PARTITION OF p FOR VALUES IN (2) SERVER nowhere;
        CREATE TABLE h (id int, token text);
        CREATE FOREIGN TABLE h2 () INHERITS (h) SERVER nowhere""")
    for name, saying in [*((name, f"{name} is not a table") for name in "vmsicf"),
                         ("p", "partition p2 is a foreign table"), ("h", "h2 is a foreign table")]:
        for procedure in ["migrate", "rewrap_table", "downgrade"]:
            with fails(WRONG_KIND):
                call(connection, procedure, name, columns=["token"])
        with fails(WRONG_KIND) as caught:
            connection.execute("SELECT * FROM vod_tender_crypto.verify(%s, ARRAY['token']::name[])", [name])
        assert re.sub(r"public\.", "", caught.value.diag.message_primary).endswith(saying), caught.value
    with fails("42P01"):
        call(connection, "migrate", "nothing", columns=["token"])
    assert jobs(connection) == 0
    assert call(connection, "migrate", "p1", columns=["token"]).state == "done"


def test_columns_that_cannot_be_protected(connection):
    connection.execute("""CREATE DOMAIN d AS text;
        CREATE TABLE t (id text PRIMARY KEY, n int, j jsonb, c char(9), d d, a text[], dropped text, token text,
                        g text GENERATED ALWAYS AS (token || '!') STORED);
        ALTER TABLE t DROP dropped; CREATE TABLE empty ()""")
    for columns, state in [(["nope"], NO_COLUMN), (["ctid"], NO_COLUMN), (["dropped"], NO_COLUMN),
                           (["........pg.dropped.7........"], NO_COLUMN), (["token", "TOKEN"], NO_COLUMN),
                           (["n"], WRONG_TYPE), (["j"], WRONG_TYPE), (["c"], WRONG_TYPE), (["d"], WRONG_TYPE),
                           (["a"], WRONG_TYPE), (["id"], NOT_SUPPORTED), (["token", "id"], NOT_SUPPORTED),
                           (["g"], NOT_SUPPORTED), ([], INVALID_PARAMETER), (["token", None], INVALID_PARAMETER)]:
        for procedure in ["migrate", "rewrap_table", "downgrade"]:
            with fails(state):
                call(connection, procedure, "t", columns=columns)
    for procedure in ["migrate", "rewrap_table", "downgrade"]:
        with fails(INVALID_PARAMETER, "no columns"):
            call(connection, procedure, "t")
    assert jobs(connection) == 0
    assert one(connection, "SELECT count(*) FROM vod_tender_crypto.protected_column") == 0


# -- expressions -------------------------------------------------------------------------------------------------


# A function of a user's that says when it is called, and types whose input calls it.
TRAPS = """
    CREATE FUNCTION {schema}.trap(text) RETURNS boolean LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS
        $$ BEGIN RAISE NOTICE 'trap runs as %', current_user; RETURN true; END $$;
    CREATE FUNCTION {schema}.trap(text, text) RETURNS boolean LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS
        $$ BEGIN RETURN {schema}.trap($1); END $$;
    CREATE DOMAIN {schema}.trapped AS text CHECK ({schema}.trap(VALUE));
    CREATE TYPE {schema}.holder AS (what {schema}.trapped);
    CREATE OPERATOR {schema}.=== (LEFTARG = text, RIGHTARG = text, FUNCTION = {schema}.trap);
    CREATE FUNCTION {schema}.takes({schema}.trapped[]) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT true';
    CREATE FUNCTION {schema}.takes({schema}.trapped[], text) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT true';
    CREATE FUNCTION {schema}.gives() RETURNS {schema}.trapped[] LANGUAGE sql IMMUTABLE AS
        'SELECT NULL::{schema}.trapped[]';
    CREATE OPERATOR {schema}.=~= (LEFTARG = {schema}.trapped[], RIGHTARG = text, FUNCTION = {schema}.takes)"""


def sprung(heard) -> "set[str]":
    """What the traps said."""
    return {text for _, text in heard if text.startswith("trap runs")}


@pytest.fixture
def guinea_pig(connection):
    """A table that must stay as it is, and traps."""
    connection.execute(TRAPS.replace("{schema}", "public") + """;
        CREATE TABLE t (id int PRIMARY KEY, provider text, token text, note text, noted timestamptz, old varchar(9),
                        g text GENERATED ALWAYS AS (left(token, 3)) STORED);
        CREATE SEQUENCE counter""")
    direct(connection, "INSERT INTO t SELECT g, 'p', envelope_encrypt('token'), '' FROM generate_series(1, 3) g")
    before = contents_of(connection)
    yield connection
    assert contents_of(connection) == before and jobs(connection) == 0
    assert one(connection, "SELECT count(*) FROM vod_tender_crypto.protected_column") == 0


def contents_of(connection):
    """The guinea pig's rows."""
    return connection.execute("SELECT ctid, xmin::text, * FROM t ORDER BY ctid").fetchall()


def refused(connection, **expression) -> str:
    """The SQLSTATE with which migrate() refuses an expression."""
    with pytest.raises(psycopg.Error) as caught:
        call(connection, "migrate", "t", **{"columns": ["token"], "set_columns": {"note": "x"}, **expression})
        pytest.fail(f"accepted: {expression}")
    return caught.value.sqlstate


NO_EXPRESSION = "42601"
NOT_IMMUTABLE = "42P17"
UNDEFINED_FUNCTION = "42883"

EVERYWHERE = [
    ("id::text) FROM pg_authid --", NO_EXPRESSION),
    ("id::text); DROP TABLE t; SELECT (1", NO_EXPRESSION),
    ("id::text; SELECT 1", NO_EXPRESSION),
    (";", NO_EXPRESSION),
    ("", NO_EXPRESSION),
    ("--", NO_EXPRESSION),
    ("/*", NO_EXPRESSION),
    ("id::text) AS x, (provider", NO_EXPRESSION),
    ("id::text) UNION SELECT (rolname", NO_EXPRESSION),
    ("id::text) WHERE (true", NO_EXPRESSION),
    ("*", NO_EXPRESSION),
    ("'unterminated", NO_EXPRESSION),
    ("(SELECT rolpassword FROM pg_authid LIMIT 1)", NOT_SUPPORTED),
    ("EXISTS (SELECT FROM pg_authid)", NOT_SUPPORTED),
    ("id IN (SELECT 1)", NOT_SUPPORTED),
    ("ARRAY(SELECT 1)::text", NOT_SUPPORTED),
    ("count(*)", "42803"),
    ("row_number() OVER ()", "42P20"),
    ("generate_series(1, 2)", NOT_SUPPORTED),
    ("$1", None),
    ("random()", NOT_IMMUTABLE),
    ("pg_read_file('/etc/passwd')", NOT_IMMUTABLE),
    ("nextval('public.counter')", NOT_IMMUTABLE),
    ("set_config('role', 'x', false)", NOT_IMMUTABLE),
    ("query_to_xml('DROP TABLE t', true, true, '')::text", NOT_IMMUTABLE),
    ("table_to_xml('pg_authid', true, true, '')::text", NOT_IMMUTABLE),
    ("ts_rewrite('a'::tsquery, 'SELECT 1, 2')::text", NOT_IMMUTABLE),
    ("trap(provider)", UNDEFINED_FUNCTION),
    ("public.trap(provider)", NO_RIGHT),
    ("public.trap(provider)::text", NO_RIGHT),
    ("public.envelope_decrypt(token)", NO_RIGHT),
    ("provider OPERATOR(public.===) 'x'", NO_RIGHT),
    ("provider::public.trapped", NOT_SUPPORTED),
    ("ROW('x')::public.holder IS NULL", NOT_SUPPORTED),
    ("ctid::text", "42P10"),
    ("xmin::text", "42P10"),
    ("tableoid::regclass::text", NOT_SUPPORTED),
    ("t::text", NOT_SUPPORTED),
    ("t.*::text", NOT_SUPPORTED),
    ("nope", NO_COLUMN),
    ("other.provider", "42P01"),
    ("DEFAULT", None),
]


@pytest.mark.parametrize("argument", ["aad", "where_clause", "version"])
def test_expressions_that_are_refused_everywhere(guinea_pig, argument):
    """Whatever its type: it is put where a value of any type may stand, unless it is no single expression."""
    around = {"aad": "CASE WHEN ({}\n) IS NULL THEN '' ELSE '' END", "where_clause": "({}\n) IS NOT NULL",
              "version": "CASE WHEN ({}\n) IS NULL THEN 1 ELSE 2 END"}[argument]
    heard = notices(guinea_pig)
    for expression, state in EVERYWHERE:
        found = refused(guinea_pig, **{argument: around.format(expression)})
        assert jobs(guinea_pig) == 0, expression
        assert state in (None, found), (expression, found)
        assert refused(guinea_pig, **{argument: expression}) in (state, found, WRONG_TYPE), expression
    assert not sprung(heard)


@pytest.mark.parametrize("expression", [
    "'{x}'::public.trapped[] IS NOT NULL",
    "'(x)'::public.holder IS NOT NULL",
    "'{(x)}'::public.holder[] IS NOT NULL",
    "ARRAY[provider]::public.trapped[] IS NOT NULL",
    "('{' || provider || '}')::public.trapped[] IS NOT NULL",
    "CAST(CAST('{x}' AS text) AS public.trapped[]) IS NOT NULL",
])
def test_literals_and_casts_that_would_call_a_users_function(guinea_pig, expression):
    """A type's input runs the check of a domain inside it, already while the expression is parsed."""
    heard = notices(guinea_pig)
    assert refused(guinea_pig, where_clause=expression) == NOT_SUPPORTED
    assert refused(guinea_pig, aad=f"CASE WHEN {expression} THEN provider ELSE provider END") == NOT_SUPPORTED
    assert not sprung(heard)


def test_aads_that_would_not_stay_the_same(guinea_pig):
    for expression in ["token", "provider || note", "g", "provider || id", "now()::text", "concat(provider, id)",
                       "id::text || current_date::text", "noted::text", "format('%s', id)", "current_user::text",
                       "to_char(id, '9')", "current_setting('work_mem')", "to_jsonb(noted)::text"]:
        assert refused(guinea_pig, aad=expression) == NOT_IMMUTABLE, expression
    for expression in ["id", "id > 0", "provider::bytea", "ARRAY[provider]"]:
        assert refused(guinea_pig, aad=expression) == WRONG_TYPE, expression


def test_expressions_of_the_wrong_type(guinea_pig):
    for argument, expressions in [("where_clause", ["id", "provider", "NULL::int"]),
                                  ("version", ["provider", "true", "noted"])]:
        for expression in expressions:
            assert refused(guinea_pig, **{argument: expression}) == WRONG_TYPE, (argument, expression)


@pytest.mark.parametrize("aad, where", [
    ("id::text -- the key", "at < now() -- old"),
    ("provider || '/' || id::text || '/{column}'", "provider ~ '^p' AND id > 0"),
    ("CASE WHEN id > 5 THEN 'a' ELSE provider END", "coalesce(at IS NOT NULL, false)"),
    ("provider", "true"),
    ("'{column}'", "id IN (1, 2, 3)"),
    ("extract(epoch FROM at AT TIME ZONE 'UTC')::text || lower(provider)", "token <> ''"),
    ("NULLIF(provider, '')", "length(token) BETWEEN 1 AND 1000"),
    ("(id % 7)::text COLLATE \"C\"", "id = ANY ('{1,2,3}')"),
])
def test_expressions_that_are_fine(connection, aad, where):
    connection.execute("""CREATE TABLE t (id bigint PRIMARY KEY, provider varchar(20), at timestamptz, v smallint,
                                          token text)""")
    direct(connection, """INSERT INTO t SELECT g, 'p', '2020-01-01', 1, envelope_encrypt('x')
                          FROM generate_series(1, 3) g""")
    job = call(connection, "migrate", "t", columns=["token"], aad=aad, where_clause=where, version="v")
    assert (job.state, job.rows_done) == ("done", 3)
    assert count(connection, f"envelope_decrypt(token, aad => {aad.replace('{column}', 'token')}\n) = 'x'") == 3


@pytest.fixture
def author(database, owner):
    """A session of a role that may run jobs, with traps of its own."""
    with database.connect() as admin:
        admin.execute(f"CREATE SCHEMA hers AUTHORIZATION {owner}")
    with database.connect(user=owner) as session:
        session.execute(TRAPS.replace("{schema}", "hers"))
        yield session


TRAPPED_AADS = [f"CASE WHEN {condition} THEN '' ELSE '' END" for condition in [
    "hers.trap(provider)", "'{x}'::hers.trapped[] IS NULL", "'(x)'::hers.holder IS NULL", "hers.takes('{x}')",
    "'{x}' OPERATOR(hers.=~=) provider", "coalesce(hers.gives(), '{x}') IS NULL", "special = '{x}'"]]


@pytest.mark.parametrize("aad", TRAPPED_AADS)
def test_a_registered_aad_runs_nothing_as_who_verifies(connection, author, aad):
    """Whoever owns a table writes its registration; whoever verifies the table may have more rights."""
    author.execute("CREATE TABLE hers.t (id int PRIMARY KEY, provider text, token text, special hers.trapped[])")
    author.execute("INSERT INTO hers.t VALUES (1, 'p', 'plaintext')")
    author.execute("""INSERT INTO vod_tender_crypto.protected_column (schema_name, table_name, column_name, aad)
                      VALUES ('hers', 't', 'token', %s)""", [aad])
    heard = notices(connection)
    for statement in ["SELECT * FROM vod_tender_crypto.verify('hers.t')", "CALL vod_tender_crypto.migrate('hers.t')",
                      "CALL vod_tender_crypto.rewrap_table('hers.t')", "CALL vod_tender_crypto.downgrade('hers.t')"]:
        with pytest.raises(psycopg.Error):
            connection.execute(statement)
            pytest.fail(f"accepted: {statement}")
    assert "trap runs as postgres" not in sprung(heard)


@pytest.mark.parametrize("aad", TRAPPED_AADS[:-1])
def test_an_expression_runs_nothing_as_the_tables_owner(connection, author, aad):
    """Whoever calls verify() on a table writes the aad; the table may be somebody's with more rights."""
    connection.execute("CREATE TABLE t (id int PRIMARY KEY, provider text, token text); GRANT SELECT ON t TO PUBLIC")
    heard = notices(author)
    for statement in ["SELECT * FROM vod_tender_crypto.verify('t', '{token}', aad => %s)",
                      "SELECT vod_tender_crypto.row_expression('t'::regclass, %s, 'aad', 'token', '{}')",
                      "SELECT vod_tender_crypto.row_expression('pg_authid'::regclass, %s, 'aad', '', '{}')"]:
        with pytest.raises(psycopg.Error):
            author.execute(statement, [aad])
            pytest.fail(f"accepted: {statement}")
    assert "trap runs as postgres" not in sprung(heard)


@pytest.mark.parametrize("set_columns, state", [
    ({"nope": 1}, NO_COLUMN), ({"g": "x"}, INVALID_PARAMETER), ({"id": 1}, INVALID_PARAMETER),
    ({"token": "x"}, INVALID_PARAMETER), ({"ctid": "(0,1)"}, NO_COLUMN), ({'note" = NULL, "id': "x"}, NO_COLUMN),
    ({"noted": "not a date"}, "22007"), ("[]", INVALID_PARAMETER), ("1", INVALID_PARAMETER), ('"x"', INVALID_PARAMETER),
    ("{", "22P02"),
])
def test_set_columns_that_are_refused(guinea_pig, set_columns, state):
    assert refused(guinea_pig, set_columns=set_columns) == state


def test_bookkeeping_is_never_cut_short(connection):
    connection.execute("CREATE TABLE t (id int PRIMARY KEY, token text, kek varchar(9))")
    direct(connection, "INSERT INTO t VALUES (1, envelope_encrypt('token'))")
    try:
        job = call(connection, "migrate", "t", columns=["token"], set_columns={"kek": "{kek_id}"})
        assert [state for _, _, state in job_errors(connection, job.job)] == [TOO_LONG]
    except psycopg.Error as error:
        assert error.sqlstate == TOO_LONG
    assert count(connection, "kek IS NULL AND envelope_version(token) = 1") == 1


def test_set_columns_are_values_never_sql(connection):
    connection.execute("CREATE TABLE t (id int PRIMARY KEY, token text, note text, n int, j jsonb, a int[], b boolean)")
    connection.execute("INSERT INTO t VALUES (1, 'plaintext')")
    note = "'; DROP TABLE t; -- {nope} coalesce({kek_ids}) \\ $1 %s"
    job = call(connection, "migrate", "t", columns=["token"], version="0",
               set_columns={"note": note, "n": "7", "j": {"a": ["{key}"]}, "a": "{1,2}", "b": True})
    assert job.rows_done == 1
    written = connection.execute("SELECT note, n, j, a, b FROM t").fetchone()
    assert written == (note, 7, {"a": ["default"]}, [1, 2], True)


# -- census, and keys that are no longer needed ------------------------------------------------------------------


def census(connection, target: str = "") -> "set[tuple]":
    """The census of a table or of all."""
    rows = connection.execute(f"SELECT relation::text, column_name, registered, version, key, value_count "
                              f"FROM vod_tender_crypto.census({target})").fetchall()
    assert len(rows) == len(set(rows))
    return set(rows)


def test_census_counts_all_of_the_database(database, connection):
    add_local_key(database, connection, "blue", default=False)
    connection.execute("""
        CREATE DOMAIN token AS text; CREATE SCHEMA other;
        CREATE TABLE t (id int PRIMARY KEY, v text, b bytea, words text);
        CREATE TABLE other."Hid den" (n int, "Tok en" varchar, d token, c char(600));
        CREATE TABLE plain (a text, b bytea); INSERT INTO plain VALUES ('a', 'b'), ('', ''), (NULL, NULL)""")
    direct(connection, "INSERT INTO t SELECT g, envelope_encrypt('v' || g) FROM generate_series(1, 10) g")
    connection.execute("INSERT INTO t SELECT g, 'x', envelope_encrypt('b'::bytea), 'x' FROM generate_series(11, 13) g")
    connection.execute("INSERT INTO t VALUES (21, 'kms:v2:broken'), (22, ''), (23, NULL)")
    connection.execute("""INSERT INTO other."Hid den" SELECT g, envelope_encrypt('x', 'blue'), envelope_encrypt('y'),
                                                            envelope_encrypt('z') FROM generate_series(1, 4) g""")
    connection.execute("CREATE MATERIALIZED VIEW m AS SELECT v FROM t WHERE id < 3")
    hidden = {('other."Hid den"', "Tok en", False, 2, "blue", 4), ('other."Hid den"', "d", False, 2, "default", 4),
              ('other."Hid den"', "c", False, 2, "default", 4)}
    in_t = {("t", "v", 1, None, 10), ("t", "v", 0, None, 3), ("t", "v", None, None, 1), ("t", "b", 2, "default", 3)}
    expected = {(name, column, False, *rest) for name, column, *rest in in_t} | hidden | {("m", "v", False, 1, None, 2)}
    assert census(connection) == expected
    call(connection, "migrate", "t", columns=["v"], version="(id < 11)::int", where_clause="id < 13", key="blue")
    after = {("t", "v", True, 2, "blue", 12), ("t", "v", True, 0, None, 1), ("t", "v", True, None, None, 1),
             ("t", "b", False, 2, "default", 3)}
    assert census(connection, "'t'") == after
    assert census(connection) == after | hidden | {("m", "v", False, 1, None, 2)}
    kek_ids = connection.execute("SELECT DISTINCT kek_id FROM vod_tender_crypto.census() WHERE key = 'blue'").fetchall()
    assert kek_ids == connection.execute("SELECT envelope_info(v)->>'kek_id' FROM t WHERE id = 1").fetchall()


def test_census_of_one_key_whose_ids_differ(cluster, kms):
    """An alias that was moved: values of one key, counted for each key id."""
    with cluster.connect() as connection:
        connection.execute("SELECT vod_tender_crypto.add_key('default', %s)", [kms.kek_uri(kms.alias)])
        connection.execute("CREATE TABLE t AS SELECT g, envelope_encrypt('x') AS v FROM generate_series(1, 3) g")
    kms.point_alias(kms.alias, new := kms.create_key())
    with cluster.connect() as connection:
        connection.execute("INSERT INTO t SELECT g, envelope_encrypt('x') AS v FROM generate_series(1, 2) g")
        rows = connection.execute("SELECT key, kek_id, value_count FROM vod_tender_crypto.census('t')").fetchall()
        assert sorted(rows) == sorted([("default", kms.arn, 3), ("default", new, 2)])


def test_census_says_what_it_could_not_read(database, connection, owner):
    make_tokens(connection, 5)
    connection.execute(f"""CREATE TABLE mine (v text); ALTER TABLE mine OWNER TO {owner};
        CREATE MATERIALIZED VIEW unfilled AS TABLE {TABLE} WITH NO DATA;
        INSERT INTO vod_tender_crypto.protected_column (schema_name, table_name, column_name)
        VALUES ('gone', 't', 'v')""")
    connection.execute("INSERT INTO mine VALUES (envelope_encrypt('x'))")
    with database.connect(user=owner) as session:
        heard = notices(session)
        assert census(session) == {("mine", "v", False, 2, "default", 1)}
        warned = [text for severity, text in heard if severity == "WARNING"]
        assert len(warned) == 1 and "columns were not read" in warned[0] and f"{TABLE}.access_token" in warned[0]
    heard = notices(connection)
    census(connection)
    assert any("unfilled" in text for _, text in heard) and any("gone.t.v does not exist" in text for _, text in heard)


def test_a_key_is_retired_when_nothing_needs_it(database, connection):
    add_local_key(database, connection, "old", default=False)
    connection.execute("SET vod_tender_crypto.default_key = 'default'")
    make_tokens(connection, 20)
    migrate(connection, key="old")
    connection.execute("""CREATE TABLE odd ("Bi n" bytea);
                          INSERT INTO odd SELECT envelope_encrypt('x'::bytea, 'old') FROM generate_series(1, 3)""")
    retire = "SELECT vod_tender_crypto.retire_key('old')"
    with fails(UNKNOWN_KEY):
        connection.execute("SELECT vod_tender_crypto.retire_key('nope')")
    with fails(NOT_READY, "active"):
        connection.execute(retire)
    connection.execute("SELECT vod_tender_crypto.set_key_state('old', 'decrypt_only')")
    with fails(STILL_NEEDED) as caught:
        connection.execute(retire)
    assert "20 values in oauth_tokens.access_token" in detail(caught).replace("public.", "")
    assert '3 values in odd."Bi n"' in detail(caught).replace("public.", "")
    call(connection, "rewrap_table", TABLE, key="default")
    with fails(STILL_NEEDED) as caught:
        connection.execute(retire)
    assert TABLE not in detail(caught)
    call(connection, "rewrap_table", "odd", columns=["Bi n"], key="default")
    connection.execute(retire)
    assert one(connection, "SELECT state FROM vod_tender_crypto.kek WHERE name = 'old'") == "disabled"
    with database.connect() as fresh:
        assert wrong_tokens(fresh) == 0
        with fails(NOT_READY):
            one(fresh, "SELECT envelope_encrypt('x', 'old')")


def test_the_default_key_is_needed_by_what_names_none(database, connection):
    """The form kms:v2:BLOB:PAYLOAD records no key."""
    add_local_key(database, connection, "other", default=False)
    connection.execute("CREATE TABLE t AS SELECT 'kms:v2:' || repeat('QUJD', 60) || ':' || repeat('QUJD', 20) AS v")
    assert census(connection) == {("t", "v", False, 2, None, 1)}
    connection.execute("SELECT vod_tender_crypto.set_key_state(name, 'decrypt_only') FROM vod_tender_crypto.kek")
    with fails(STILL_NEEDED, "default"):
        connection.execute("SELECT vod_tender_crypto.retire_key('default')")
    connection.execute("SELECT vod_tender_crypto.retire_key('other')")


@pytest.mark.parametrize("begin", ["BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1",
                                   "BEGIN; INSERT INTO t VALUES (envelope_encrypt('unseen', 'old'))"])
def test_a_key_is_not_retired_while_older_transactions_are_open(database, connection, begin):
    add_local_key(database, connection, "old", default=False)
    connection.execute("CREATE TABLE t (v text)")
    with database.connect() as other:
        for statement in begin.split(";"):
            other.execute(statement)
        connection.execute("SELECT vod_tender_crypto.set_key_state('old', 'decrypt_only')")
        with fails(IN_USE) as caught:
            connection.execute("SELECT vod_tender_crypto.retire_key('old')")
        assert str(other.info.backend_pid) in detail(caught)
        other.execute("COMMIT")
    if "INSERT" in begin:
        with fails(STILL_NEEDED):
            connection.execute("SELECT vod_tender_crypto.retire_key('old')")
        connection.execute("TRUNCATE t")
    connection.execute("SELECT vod_tender_crypto.retire_key('old')")


def test_a_key_is_not_retired_on_half_the_picture(connection):
    connection.execute("SELECT vod_tender_crypto.set_key_state('default', 'decrypt_only')")
    connection.execute("CREATE TABLE t (v text); CREATE MATERIALIZED VIEW m AS TABLE t WITH NO DATA")
    with fails(NO_RIGHT, "m.v"):
        connection.execute("SELECT vod_tender_crypto.retire_key('default')")
    with fails(NO_RIGHT, "m.v"):
        connection.execute("SELECT vod_tender_crypto.legacy_key_unused()")
    connection.execute("REFRESH MATERIALIZED VIEW m")
    connection.execute("SELECT vod_tender_crypto.retire_key('default')")


def test_whether_the_legacy_key_is_needed(connection):
    make_tokens(connection, 30)
    unused = "SELECT vod_tender_crypto.legacy_key_unused()"
    heard = notices(connection)
    assert one(connection, unused) is False
    assert heard == [("NOTICE", f"20 values of public.{TABLE}.{column} need the legacy key") for column in COLUMNS]
    migrate(connection, where_clause="channel <> 'channel3'")
    heard.clear()
    assert one(connection, unused) is True
    assert len(heard) == 2 and all("1 values of" in text and "not encrypted" in text for _, text in heard), heard
    migrate(connection)
    heard.clear()
    assert one(connection, unused) is True and heard == []
    connection.execute("CREATE TABLE copy (v bytea)")
    direct(connection, "INSERT INTO copy SELECT envelope_encrypt('x'::bytea)")
    assert one(connection, unused) is False


def test_without_a_legacy_key_nothing_can_be_said_of_it(cluster):
    with cluster.connect() as connection:
        with fails(NOT_READY, "legacy"):
            connection.execute("SELECT vod_tender_crypto.legacy_key_unused()")


# -- verify ------------------------------------------------------------------------------------------------------


def verified(connection, target: str = TABLE) -> list:
    """What does not open: key, column and SQLSTATE."""
    query = "SELECT row_key, column_name, sqlstate FROM vod_tender_crypto.verify(%s)"
    return connection.execute(query, [target]).fetchall()


def test_verify_names_what_does_not_open(database, connection):
    make_tokens(connection, 500)
    heard = notices(connection)
    migrate(connection)
    assert verified(connection) == []
    assert heard[-1] == ("NOTICE", f"public.{TABLE}: 0 values do not open")
    for change, channel in [
        ("access_token = overlay(access_token PLACING '!' FROM 400)", 1),
        (f"refresh_token = (SELECT refresh_token FROM {TABLE} WHERE channel = 'channel2')", 3),
        ("refresh_token = access_token", 4),
        ("refresh_token = 'a token in clear'", 5),
        ("channel = 'renamed'", 6),
        ("access_token = NULL, refresh_token = ''", 7),
    ]:
        connection.execute(f"UPDATE {TABLE} SET {change} WHERE channel = 'channel{channel}'")
    connection.execute("RESET vod_tender_crypto.plaintext_reads")
    heard.clear()
    bad = verified(connection)
    assert sorted((key["channel"], column, state) for key, column, state in bad) == sorted([
        ("channel1", "access_token", "22P02"), ("channel3", "refresh_token", UNVERIFIED),
        ("channel4", "refresh_token", UNVERIFIED), ("channel5", "refresh_token", "22P02"),
        ("renamed", "access_token", UNVERIFIED), ("renamed", "refresh_token", UNVERIFIED)])
    assert all(set(key) == {"provider", "channel"} for key, _, _ in bad)
    assert heard == [("NOTICE", f"public.{TABLE}: 6 values do not open")]
    assert "in clear" not in database.log_text() + str(bad) + str(heard)


def test_verify_before_anything_was_migrated(connection):
    make_tokens(connection, 30)
    with fails(INVALID_PARAMETER, "no columns"):
        verified(connection)
    query = "SELECT count(*) FROM vod_tender_crypto.verify(%s, %s::name[], version => %s)"
    assert one(connection, query, TABLE, COLUMNS, "encryption_version") == 0
    connection.execute(f"UPDATE {TABLE} SET encryption_version = 1")
    assert one(connection, query, TABLE, COLUMNS, "encryption_version") == 20


def test_verify_writes_nothing(connection):
    make_tokens(connection, 30)
    migrate(connection)
    connection.execute("SET default_transaction_read_only = on")
    assert verified(connection) == []


def test_a_restored_dump_verifies(database, connection):
    make_tokens(connection, 100)
    migrate(connection)
    dump = database.pg_dump()
    restored = database.name + "_restored"
    database.cluster.createdb(restored)
    try:
        database.cluster.psql(dump, dbname=restored)
        with database.cluster.connect(restored) as session:
            heard = notices(session)
            assert verified(session) == [] and heard[-1][1].endswith(": 0 values do not open")
            assert jobs(session) == 0
            session.execute(f"UPDATE {TABLE} SET channel = channel || 'x' WHERE channel = 'channel9'")
            assert len(verified(session)) == 2
            assert one(session, "SELECT aad FROM vod_tender_crypto.protected_column LIMIT 1") == AAD
    finally:
        database.cluster.dropdb(restored)


class Standby(Cluster):
    """A hot standby of another cluster."""

    def __init__(self, primary: Cluster):
        self.primary = primary
        super().__init__(primary.settings, primary.environment)

    def _initialise(self) -> None:
        self._give(self.root)
        self.server_file("server.log", "")
        self._as_server("pg_basebackup", "-D", str(self.data), "-h", str(self.primary.root), "-U", "postgres",
                        "-R", "-X", "stream", "-c", "fast", "--no-sync")


def test_verify_and_census_on_a_standby(database, connection):
    make_tokens(connection, 100)
    migrate(connection)
    with Standby(database.cluster) as standby, standby.connect(database.name) as session:
        connection.execute(f"UPDATE {TABLE} SET channel = channel || 'x' WHERE channel = 'channel9'")
        moved = f"SELECT count(*) FROM {TABLE} WHERE channel = 'channel9x'"
        wait_until(lambda: one(session, moved), "for the standby")
        assert one(session, "SELECT pg_is_in_recovery()")
        assert sorted((key["channel"], column) for key, column, _ in verified(session)) \
            == [("channel9x", "access_token"), ("channel9x", "refresh_token")]
        assert census(session) == census(connection) and census(session)
        with fails("25006"):
            migrate(session)


# -- who may -----------------------------------------------------------------------------------------------------


def test_whom_jobs_are_granted_runs_them_on_its_own_tables(database, connection, owner):
    make_tokens(connection, 20)
    make_tokens(connection, 20, table="others")
    migrate(connection, "others")
    others_job = last_job(connection).job
    before = contents(connection, "others")
    connection.execute(f"ALTER TABLE {TABLE} OWNER TO {owner}")
    with database.connect(user=owner) as session:
        assert migrate(session).rows_done == 20
        assert call(session, "rewrap_table", TABLE).rows_done == 0
        assert verified(session) == []
        assert census(session, f"'{TABLE}'") == {(TABLE, column, True, 2, "default", 20) for column in COLUMNS}
        assert call(session, "downgrade", TABLE, set_columns={"encryption_version": 1}).rows_done == 20
        for procedure in ["migrate", "rewrap_table", "downgrade"]:
            with fails(NO_RIGHT):
                call(session, procedure, "others", columns=COLUMNS)
        with fails(NO_RIGHT):
            session.execute("SELECT * FROM vod_tender_crypto.verify('others', '{access_token}')")
        with fails(UNKNOWN_KEY):
            call(session, "resume", others_job)
        with fails(NOT_READY):
            call(session, "stop", others_job)
        for table in ["job", "job_progress"]:
            targets = session.execute(f"SELECT DISTINCT target::text FROM vod_tender_crypto.{table}").fetchall()
            assert targets == [(TABLE,)]
        assert one(session, "SELECT count(*) FROM vod_tender_crypto.protected_column WHERE table_name = 'others'") == 0
        touched = session.execute("UPDATE vod_tender_crypto.job SET stop_requested = true WHERE job = %s", [others_job])
        assert touched.rowcount == 0
        for forged in ["UPDATE vod_tender_crypto.job SET target = 'others'",
                       "INSERT INTO vod_tender_crypto.protected_column (schema_name, table_name, column_name, aad) "
                       "VALUES ('public', 'others', 'provider', '''x''')"]:
            with fails(NO_RIGHT, "row-level security"):
                session.execute(forged)
        for administration in ["add_key('a', 'local:///x')", "set_key_state('default', 'disabled')",
                               "drop_key('default')", "retire_key('default')", "check_key('a', 'local:///x', '{}')",
                               f"grant_jobs('{owner}')"]:
            with fails(NO_RIGHT):
                session.execute(f"SELECT vod_tender_crypto.{administration}")
        for query in ["SELECT envelope_decrypt(access_token) FROM oauth_tokens", "TABLE vod_tender_crypto.kek"]:
            with fails(NO_RIGHT):
                session.execute(query)
    assert contents(connection, "others") == before


def test_the_rights_of_the_owner_come_by_membership(database, connection, owner):
    make_tokens(connection, 10)
    with role(database, may_run_jobs=False) as group:
        connection.execute(f"ALTER TABLE {TABLE} OWNER TO {group}; GRANT {group} TO {owner}")
        with database.connect(user=owner) as session:
            assert migrate(session).rows_done == 10
            connection.execute(f"ALTER ROLE {owner} NOINHERIT")
            with fails(NO_RIGHT):
                call(session, "downgrade", TABLE, columns=COLUMNS)


def test_a_plain_role_can_do_nothing(database, connection):
    make_tokens(connection, 5)
    migrate(connection)
    with role(database, may_run_jobs=False) as nobody:
        connection.execute(f"ALTER TABLE {TABLE} OWNER TO {nobody}")
        with database.connect(user=nobody) as session:
            for statement in [
                "CALL vod_tender_crypto.migrate('oauth_tokens')", "CALL vod_tender_crypto.downgrade('oauth_tokens')",
                "CALL vod_tender_crypto.rewrap_table('oauth_tokens')", "CALL vod_tender_crypto.resume(1)",
                "CALL vod_tender_crypto.stop(1)", "SELECT vod_tender_crypto.verify('oauth_tokens')",
                "SELECT vod_tender_crypto.census('oauth_tokens')", "SELECT vod_tender_crypto.census()",
                "SELECT vod_tender_crypto.legacy_key_unused()", "SELECT vod_tender_crypto.retire_key('default')",
                "TABLE vod_tender_crypto.job", "TABLE vod_tender_crypto.job_error",
                "TABLE vod_tender_crypto.job_progress", "TABLE vod_tender_crypto.protected_column",
            ]:
                with fails(NO_RIGHT):
                    session.execute(statement)
    assert jobs(connection) == 1


def test_nothing_of_the_jobs_is_public(connection):
    public = connection.execute("""SELECT p.proname FROM pg_proc p
        WHERE p.pronamespace = 'vod_tender_crypto'::regnamespace
          AND has_function_privilege('public', p.oid, 'EXECUTE')""").fetchall()
    assert public == [("session_stats",)]
    definers = connection.execute("""SELECT p.proname FROM pg_proc p
        WHERE p.pronamespace = 'vod_tender_crypto'::regnamespace AND p.prosecdef
          AND NOT coalesce(p.proconfig::text LIKE '%pg_temp%', false)""").fetchall()
    assert definers == []
