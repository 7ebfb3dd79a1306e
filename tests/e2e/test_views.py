"""Decrypting views: an application reads and writes plaintext through them as if they were the table."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import psycopg
import pytest

from helpers import add_local_key, one
from jobs import AAD, COLUMNS, SET_COLUMNS, aad_of, call, make_tokens, notices, plaintext, role, versions, wait_until
from jobs import wrong_tokens
from sqlstate import CANCELED, INVALID_PARAMETER, NO_RIGHT, NOT_READY, UNVERIFIED, fails

CHANGED_MEANWHILE = "40001"
CHANGED_TWICE = "21000"
TRIGGER_CHANGES = "09000"
GENERATED_ALWAYS = "428C9"


def may_use(database, grantee: str) -> None:
    """Lets a role encrypt and decrypt."""
    with database.connect() as admin:
        admin.execute("""
            SELECT vod_tender_crypto.grant_key(k, %s::regrole, '{encrypt,decrypt}')
            FROM (SELECT name FROM vod_tender_crypto.kek UNION SELECT unnest(ARRAY['default', 'legacy'])) keys(k)""", [grantee])


def make_view(connection, table: str = "t", view: str = "v", **arguments) -> str:
    """A decrypting view; gives its name."""
    casts = {"columns": "::name[]", "readers": "::regrole[]", "context": "::jsonb", "set_columns": "::jsonb"}
    given = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in arguments.items()}
    named = "".join(f", {name} => %s{casts.get(name, '')}" for name in given)
    return one(connection, f"SELECT vod_tender_crypto.create_decrypting_view(%s::regclass, %s{named})::text",
               table, view, *given.values())


def make_table(connection, definition: str = "id int PRIMARY KEY, token text, note text", **arguments) -> None:
    """A table t with a token, bound to its id, and its view v."""
    connection.execute(f"CREATE TABLE t ({definition})")
    make_view(connection, **{"columns": ["token"], "aad": "id::text", **arguments})


def rows(connection, query: str, *parameters) -> list:
    """All rows of a query."""
    return connection.execute(query, parameters or None).fetchall()


def decrypted(connection) -> int:
    """Values that this session has decrypted so far."""
    return one(connection, "SELECT vod_tender_crypto.session_stats()")["values_decrypted"]


def stored(connection, where: str = "true", column: str = "token", table: str = "t"):
    """What the table holds in the place of a token."""
    return one(connection, f"SELECT {column} FROM {table} WHERE {where}")


def plan_of(connection, query: str) -> str:
    """EXPLAIN of a query."""
    return "\n".join(line for line, in rows(connection, f"EXPLAIN (COSTS OFF) {query}"))


@pytest.fixture
def tokens(connection):
    """A session with a table of make_tokens(), versions 0, 1 and 2 in it, and its view v."""
    make_tokens(connection, 30)
    call(connection, "migrate", "oauth_tokens", columns=COLUMNS, aad=AAD, version="encryption_version",
         set_columns=SET_COLUMNS, where_clause="channel IN ('channel1', 'channel2', 'channel3')")
    connection.execute("SET vod_tender_crypto.plaintext_reads = 'allow'")
    make_view(connection, "oauth_tokens", set_columns=SET_COLUMNS)
    return connection


# -- reading -----------------------------------------------------------------------------------------------------


def test_values_of_all_versions_are_read_and_written_back_as_envelopes(tokens):
    assert sorted(versions(tokens)) == [0, 1, 2]
    wrong = " OR ".join(f"{column} IS DISTINCT FROM {plaintext(column)}" for column in COLUMNS)
    assert one(tokens, f"SELECT count(*) FROM v WHERE {wrong}") == 0
    assert one(tokens, "SELECT count(*) FROM v") == 30
    # The row's note is about both of its values: the one that stays as it was is encrypted too.
    assert tokens.execute("UPDATE v SET access_token = access_token || '!'").rowcount == 30
    assert versions(tokens) == {2: 60}
    assert one(tokens, "SELECT count(*) FROM v WHERE access_token = 'access_token_' || md5(provider || '/' || channel) || '!'"
                       f" AND refresh_token = {plaintext('refresh_token')}") == 30
    assert rows(tokens, "SELECT DISTINCT encryption_version, encryption_key_id = envelope_info(refresh_token) ->> 'kek_id'"
                        " FROM oauth_tokens") == [(2, True)]


def test_plaintext_is_refused_where_the_policy_does(tokens):
    tokens.execute("RESET vod_tender_crypto.plaintext_reads")
    with fails(INVALID_PARAMETER):
        rows(tokens, "SELECT access_token FROM v")
    assert len(rows(tokens, "SELECT channel FROM v")) == 30


def test_the_view_has_the_columns_of_the_table(connection):
    connection.execute("""CREATE TABLE t (token varchar(400) COLLATE "C", id int PRIMARY KEY, raw bytea, kind char(3),
                                          amount numeric(8, 2) DEFAULT 1, at timestamptz DEFAULT now())""")
    make_view(connection, columns=["token", "raw"], aad="id::text || '{column}'")
    shape = """SELECT attname, format_type(atttypid, atttypmod), attcollation FROM pg_attribute
               WHERE attrelid = %s::regclass AND attnum > 0 ORDER BY attnum"""
    assert rows(connection, shape, "v") == rows(connection, shape, "t")
    connection.execute("INSERT INTO v (id, token, raw, kind) VALUES (1, 'secret', '\\x00ff', 'ab')")
    assert rows(connection, "SELECT token, id, raw, kind, amount FROM v") == [("secret", 1, b"\x00\xff", "ab ", 1)]
    assert rows(connection, """SELECT envelope_version(token), envelope_version(raw), envelope_decrypt(token, aad => '1token'),
                               envelope_decrypt(raw, aad => '1raw') FROM t""") == [(2, 2, "secret", b"\x00\xff")]
    connection.execute("UPDATE v SET raw = '\\x01', token = 'other'")
    assert rows(connection, "SELECT token, raw FROM v") == [("other", b"\x01")]
    with fails("22001"):
        connection.execute("UPDATE v SET token = repeat('x', 399)")


def test_columns_that_are_not_selected_are_not_decrypted(tokens):
    before = decrypted(tokens)
    assert len(rows(tokens, "SELECT provider, channel, updated_at FROM v WHERE encryption_version >= 0")) == 30
    assert one(tokens, "SELECT count(*) FROM v") == 30
    assert decrypted(tokens) == before
    rows(tokens, "SELECT access_token FROM v WHERE channel = 'channel1'")
    assert decrypted(tokens) == before + 1


def test_an_index_of_the_table_is_used(connection):
    make_table(connection)
    connection.execute("CREATE INDEX ON t (note)")
    connection.execute("INSERT INTO v SELECT g, 'token' || g, 'note' || g FROM generate_series(1, 200) g")
    connection.execute("ANALYZE t")
    connection.execute("SET enable_seqscan = off")
    for condition in ["id = 7", "note = 'note7'"]:
        assert "Index" in plan_of(connection, f"SELECT token FROM v WHERE {condition}")
    before = decrypted(connection)
    assert one(connection, "SELECT token FROM v WHERE note = 'note7'") == "token7"
    assert decrypted(connection) == before + 1


def test_a_value_that_was_moved_to_another_row_does_not_open(connection):
    make_table(connection)
    connection.execute("INSERT INTO v VALUES (1, 'one'), (2, 'two')")
    connection.execute("UPDATE t SET token = (SELECT token FROM t WHERE id = 1) WHERE id = 2")
    assert one(connection, "SELECT token FROM v WHERE id = 1") == "one"
    with fails(UNVERIFIED):
        rows(connection, "SELECT token FROM v WHERE id = 2")


def test_key_and_context_are_used_for_writing_and_expected_when_reading(database, connection):
    add_local_key(database, connection, "other", default=False)
    make_table(connection, key="other", context={"tenant": "a"})
    connection.execute("INSERT INTO v VALUES (1, 'one')")
    info = one(connection, "SELECT envelope_info(token) FROM t")
    assert (info["key"], info["context"], info["aad"]) == ("other", {"tenant": "a"}, True)
    assert one(connection, "SELECT token FROM v") == "one"
    connection.execute("UPDATE t SET token = envelope_encrypt('one', aad => '1', context => '{\"tenant\": \"b\"}')")
    with fails(UNVERIFIED):
        rows(connection, "SELECT token FROM v")


# -- writing -----------------------------------------------------------------------------------------------------


def test_insert_update_delete_and_returning(connection):
    make_table(connection)
    assert rows(connection, "INSERT INTO v VALUES (1, 'one', 'n'), (2, NULL, 'n') RETURNING *, token || '!'") == [
        (1, "one", "n", "one!"), (2, None, "n", None)]
    assert stored(connection, "id = 2") is None
    assert rows(connection, "UPDATE v SET token = token || id, note = 'm' WHERE id = 1 RETURNING *") == [(1, "one1", "m")]
    assert rows(connection, "UPDATE v SET token = NULL WHERE id = 1 RETURNING *") == [(1, None, "m")]
    assert stored(connection, "id = 1") is None
    connection.execute("UPDATE v SET token = '' WHERE id = 1")
    assert one(connection, "SELECT envelope_version(token) FROM t WHERE id = 1") == 2
    assert rows(connection, "DELETE FROM v WHERE token = '' RETURNING *") == [(1, "", "m")]
    assert rows(connection, "TABLE t") == [(2, None, "n")]
    assert connection.execute("DELETE FROM v WHERE id = 3").rowcount == 0


def test_what_is_stored_already_is_not_encrypted_again(connection):
    make_table(connection)
    connection.execute("INSERT INTO v VALUES (1, 'one')")
    with fails(INVALID_PARAMETER):
        connection.execute("INSERT INTO v SELECT 2, token FROM t")


def test_stored_bytes_stay_where_nothing_changed(connection):
    make_table(connection)
    connection.execute("INSERT INTO v VALUES (1, 'one', 'a')")
    before = stored(connection)
    for change in ["note = 'b'", "token = token", "token = 'one', note = 'c'", "id = id"]:
        assert connection.execute(f"UPDATE v SET {change}").rowcount == 1
        assert stored(connection) == before
    connection.execute("UPDATE v SET token = 'One'")
    assert stored(connection) != before


def test_a_collation_that_ignores_case_does_not_hide_a_change(connection):
    connection.execute("CREATE COLLATION ci (provider = icu, locale = 'und-u-ks-level2', deterministic = false)")
    make_table(connection, "id int PRIMARY KEY, token text COLLATE ci, note text COLLATE ci")
    connection.execute("INSERT INTO v VALUES (1, 'token', 'note')")
    connection.execute("UPDATE v SET token = 'TOKEN', note = 'NOTE'")
    assert rows(connection, "TABLE v") == [(1, "TOKEN", "NOTE")]


def test_a_changed_aad_encrypts_again(connection):
    make_table(connection, "id int PRIMARY KEY, token text, other text", columns=["token", "other"])
    connection.execute("INSERT INTO v VALUES (1, 'one', NULL)")
    before = stored(connection)
    assert rows(connection, "UPDATE v SET id = 2 RETURNING *") == [(2, "one", None)]
    assert stored(connection) != before
    assert rows(connection, "TABLE v") == [(2, "one", None)]
    assert one(connection, "SELECT envelope_decrypt(token, aad => '2') FROM t") == "one"


def test_a_null_aad_is_an_error_and_no_unbound_value(connection):
    make_table(connection, "id int PRIMARY KEY, token text, channel text", aad="channel")
    with fails("22004", "aad of column token"):
        connection.execute("INSERT INTO v VALUES (1, 'one')")
    connection.execute("INSERT INTO v VALUES (1, NULL, NULL), (2, 'two', 'x')")
    with fails("22004"):
        connection.execute("UPDATE v SET token = 'one' WHERE id = 1")
    with fails("22004"):
        connection.execute("UPDATE v SET channel = NULL WHERE id = 2")
    assert rows(connection, "SELECT * FROM v ORDER BY id") == [(1, None, None), (2, "two", "x")]


def test_an_error_in_the_middle_leaves_nothing(connection):
    make_table(connection, "id int PRIMARY KEY, token text, CHECK (id < 50)")
    with fails("23514"):
        connection.execute("INSERT INTO v SELECT g, 'x' FROM generate_series(40, 60) g")
    assert rows(connection, "TABLE t") == []
    connection.execute("INSERT INTO v SELECT g, 'x' FROM generate_series(40, 49) g")
    before = rows(connection, "SELECT ctid, * FROM t ORDER BY id")
    with fails("23514"):
        connection.execute("UPDATE v SET id = CASE WHEN id > 45 THEN 60 ELSE id END, token = 'y'")
    assert rows(connection, "SELECT ctid, * FROM t ORDER BY id") == before


def test_copy_into_the_view(connection):
    make_table(connection, "id serial PRIMARY KEY, token text, note text DEFAULT 'none'")
    with connection.cursor().copy("COPY v (token) FROM STDIN") as copy:
        for number in range(100):
            copy.write_row([f"token{number}"])
    assert one(connection, "SELECT count(*) FROM v WHERE token = 'token' || id - 1 AND note = 'none'") == 100
    assert one(connection, "SELECT count(*) FROM t WHERE is_envelope(token)") == 100


def test_on_conflict_is_for_the_table(connection):
    make_table(connection)
    connection.execute("INSERT INTO v VALUES (1, 'one')")
    with fails("42P10"):
        connection.execute("INSERT INTO v VALUES (1, 'two') ON CONFLICT (id) DO UPDATE SET token = EXCLUDED.token")
    # PostgreSQL does not hand it to the trigger: the conflict is an error and nothing is lost.
    with fails("23505"):
        connection.execute("INSERT INTO v VALUES (1, 'two') ON CONFLICT DO NOTHING")
    connection.execute("""INSERT INTO t (id, token) VALUES (1, envelope_encrypt('two', aad => '1'))
                          ON CONFLICT (id) DO UPDATE SET token = EXCLUDED.token""")
    assert rows(connection, "TABLE v") == [(1, "two", None)]


def test_set_columns_note_what_was_encrypted(database, connection):
    connection.execute("CREATE TABLE t (id int PRIMARY KEY, token text, version int, kek text, key varchar(20), label text)")
    note = {"version": "{version}", "kek": "{kek_id}", "key": "{key}", "label": "v{version} of {key}"}
    make_view(connection, columns=["token"], set_columns=note)
    connection.execute("INSERT INTO v (id, token, version) VALUES (1, 'one', 0), (2, NULL, 0)")
    kek_id = one(connection, "SELECT envelope_info(token) ->> 'kek_id' FROM t WHERE id = 1")
    assert rows(connection, "SELECT * FROM v ORDER BY id") == [
        (1, "one", 2, kek_id, "default", "v2 of default"), (2, None, 0, None, None, None)]
    connection.execute("UPDATE v SET version = 7, label = 'mine' WHERE id = 1")
    assert rows(connection, "SELECT version, label FROM v WHERE id = 1") == [(7, "mine")]
    connection.execute("SET vod_tender_crypto.write_format = 'direct'")
    assert rows(connection, "UPDATE v SET token = 'two', version = 9 WHERE id = 1 RETURNING token, version, kek, label") == [
        ("two", 1, None, None)]


@pytest.mark.parametrize("note, state", [
    ({"nope": 1}, "42703"), ({"version": "x"}, "22P02"), ({"version": "{kek_id}"}, "42804"), ({"id": 2}, INVALID_PARAMETER),
    ({"token": "x"}, INVALID_PARAMETER), ({"channel": "x"}, "42P17"), ([1], INVALID_PARAMETER)])
def test_unusable_set_columns(connection, note, state):
    connection.execute("CREATE TABLE t (id int PRIMARY KEY, token text, version int, channel text)")
    with fails(state):
        make_view(connection, columns=["token"], aad="channel", set_columns=json.dumps(note))
    assert rows(connection, "SELECT FROM vod_tender_crypto.protected_column") == []


# -- defaults, identity, generated columns -----------------------------------------------------------------------


def test_defaults_are_the_tables(connection):
    connection.execute("CREATE SCHEMA app; CREATE FUNCTION app.a() RETURNS text RETURN 'from a function'")
    make_table(connection, """id serial PRIMARY KEY, token text DEFAULT 'initial', a text DEFAULT app.a(),
                              b int NOT NULL DEFAULT 5""")
    row = (1, "initial", "from a function", 5)
    assert rows(connection, "INSERT INTO v DEFAULT VALUES RETURNING *") == [row]
    assert rows(connection, "TABLE v") == [row]
    assert one(connection, "SELECT is_envelope(token) FROM t")
    with fails("23502"):
        connection.execute("INSERT INTO v (b) VALUES (NULL)")
    connection.execute("ALTER TABLE t ALTER a SET DEFAULT 'new', ALTER b DROP DEFAULT, ALTER token DROP DEFAULT")
    make_view(connection)
    assert rows(connection, "INSERT INTO v (b) VALUES (6) RETURNING token, a, b") == [(None, "new", 6)]


@pytest.mark.parametrize("kind", ["ALWAYS", "BY DEFAULT"])
@pytest.mark.parametrize("aad", ["channel", "id::text || channel"])
def test_identity_columns(connection, kind, aad):
    connection.execute(f"CREATE TABLE t (id bigint GENERATED {kind} AS IDENTITY PRIMARY KEY, channel text, token text)")
    make_view(connection, columns=["token"], aad=aad)
    assert rows(connection, "INSERT INTO v (channel, token) VALUES ('a', 'one'), ('b', 'two') RETURNING id") == [(1,), (2,)]
    if kind == "ALWAYS":
        with fails(GENERATED_ALWAYS, "non-DEFAULT value") as of_view:
            connection.execute("INSERT INTO v VALUES (7, 'c', 'three')")
        with fails(GENERATED_ALWAYS) as of_table:
            connection.execute("INSERT INTO t VALUES (7, 'c', 'three')")
        assert of_view.value.diag.message_primary == of_table.value.diag.message_primary
        with fails(GENERATED_ALWAYS) as of_view:
            connection.execute("UPDATE v SET id = 7 WHERE id = 1")
        with fails(GENERATED_ALWAYS) as of_table:
            connection.execute("UPDATE t SET id = 7 WHERE id = 1")
        assert of_view.value.diag.message_primary == of_table.value.diag.message_primary
        assert of_view.value.diag.message_detail == of_table.value.diag.message_detail
    else:
        assert rows(connection, "INSERT INTO v VALUES (7, 'c', 'three') RETURNING id, token") == [(7, "three")]
        connection.execute("UPDATE v SET id = 8 WHERE id = 7")
    connection.execute("UPDATE v SET token = token || '!' WHERE id <= 2")
    assert rows(connection, "SELECT id, token FROM v WHERE id <= 2 ORDER BY id") == [(1, "one!"), (2, "two!")]
    assert one(connection, "SELECT count(*) FROM v") == (2 if kind == "ALWAYS" else 3)


def test_generated_columns(connection):
    make_table(connection, "id int PRIMARY KEY, token text, twice int GENERATED ALWAYS AS (id * 2) STORED")
    assert rows(connection, "INSERT INTO v (id, token) VALUES (1, 'one') RETURNING *") == [(1, "one", 2)]
    assert rows(connection, "UPDATE v SET id = 2 RETURNING *") == [(2, "one", 4)]
    for statement in ["INSERT INTO {} VALUES (3, 'x', 5)", "UPDATE {} SET twice = 7"]:
        with fails(GENERATED_ALWAYS) as of_view:
            connection.execute(statement.format("v"))
        with fails(GENERATED_ALWAYS) as of_table:
            connection.execute(statement.format("t"))
        assert of_view.value.diag.message_primary == of_table.value.diag.message_primary
        assert of_view.value.diag.message_detail == of_table.value.diag.message_detail
    with fails("42P17"):
        make_view(connection, view="w", columns=["token"], aad="twice::text")


# -- tables ------------------------------------------------------------------------------------------------------


def test_a_partitioned_table(connection):
    connection.execute("""CREATE TABLE t (region text, id int, token text, PRIMARY KEY (region, id)) PARTITION BY LIST (region);
                          CREATE TABLE t_eu PARTITION OF t FOR VALUES IN ('eu');
                          CREATE TABLE t_us (token text, gone int, id int NOT NULL, region text NOT NULL);
                          ALTER TABLE t_us DROP gone;
                          ALTER TABLE t ATTACH PARTITION t_us FOR VALUES IN ('us')""")
    make_view(connection, columns=["token"], aad="region || '/' || id::text")
    connection.execute("""INSERT INTO v SELECT CASE g % 2 WHEN 0 THEN 'eu' ELSE 'us' END, g, 'token' || g
                          FROM generate_series(1, 10) g""")
    assert rows(connection, "UPDATE v SET region = 'us', token = 'moved' WHERE id = 2 RETURNING *") == [("us", 2, "moved")]
    assert connection.execute("UPDATE v SET region = 'eu' WHERE id = 3").rowcount == 1
    assert (one(connection, "SELECT count(*) FROM t_eu"), one(connection, "SELECT count(*) FROM t_us")) == (5, 5)
    assert rows(connection, "SELECT region, token FROM v WHERE id <= 3 ORDER BY id") == [
        ("us", "token1"), ("us", "moved"), ("eu", "token3")]
    assert connection.execute("DELETE FROM v WHERE region = 'us'").rowcount == 5
    assert one(connection, "SELECT count(*) FROM v") == 5


def test_odd_names(connection):
    schema, table, view, key, token = 'my "schema"', "t'a %s \"b\"", "v 'x' \"y\" %I", 'the "id"', "a 'token' % $1"

    def quoted(*names: str) -> str:
        return ".".join('"' + name.replace('"', '""') + '"' for name in names)

    the_key, the_token, of_table = quoted(key), quoted(token), quoted(schema, table)
    connection.execute(f"CREATE SCHEMA {quoted(schema)}")
    connection.execute(f"""CREATE TABLE {of_table} ({the_key} int PRIMARY KEY, {the_token} text, "new" text,
                           "old" text DEFAULT 'o', "t" text, "cur" int, "items" text, "$1" text)""")
    name = make_view(connection, of_table, view, columns=[token], aad=f"{the_key}::text || \"t\" || '{{column}}'",
                     set_columns={"items": "it's {version}"})
    assert name == quoted(schema, view)
    connection.execute(f"INSERT INTO {name} ({the_key}, {the_token}, t, new) VALUES (1, 'one', 'a', 'n')")
    connection.execute(f"UPDATE {name} SET {the_token} = 'two', t = 'b', \"$1\" = 'x', cur = 3")
    assert rows(connection, f"SELECT * FROM {name}") == [(1, "two", "n", "o", "b", 3, "it's 2", "x")]
    assert rows(connection, "SELECT schema_name, table_name, column_name FROM vod_tender_crypto.protected_column") == [
        (schema, table, token)]
    connection.execute(f"DELETE FROM {name}")
    connection.execute("SELECT vod_tender_crypto.drop_decrypting_view(%s::regclass)", [name])


def test_long_names_do_not_meet(connection):
    make_table(connection, view="x" * 63)
    make_view(connection, view="x" * 62 + "y")
    make_view(connection, view="ü" * 31)
    names = [name for name, in rows(connection, "SELECT proname FROM pg_proc WHERE prorettype = 'trigger'::regtype"
                                                " AND pronamespace = 'public'::regnamespace")]
    assert len(set(names)) == 3 and all(len(name.encode()) <= 63 for name in names)
    connection.execute(f"INSERT INTO {'x' * 63} VALUES (1, 'one')")
    assert one(connection, f"SELECT token FROM {'ü' * 31}") == "one"


def test_the_extension_in_another_schema(bare_database, extension):
    with bare_database.connect() as session:
        session.execute("CREATE SCHEMA \"the crypto\"")
        session.execute(f"CREATE EXTENSION {extension} SCHEMA \"the crypto\"")
        add_local_key(bare_database, session, "default")
        make_table(session, set_columns={"note": "{version}"})
        session.execute("INSERT INTO v VALUES (1, 'one')")
        session.execute("UPDATE v SET token = 'two'")
        assert rows(session, "TABLE v") == [(1, "two", "2")]
        assert one(session, "SELECT \"the crypto\".is_envelope(token) FROM t")


def test_without_a_primary_key(connection):
    connection.execute("CREATE TABLE t (id int, token text, note text)")
    make_view(connection, columns=["token"])
    assert rows(connection, "INSERT INTO v VALUES (1, 'one') RETURNING token") == [("one",)]
    assert rows(connection, "TABLE v") == [(1, "one", None)]
    for statement in ["UPDATE v SET note = 'x'", "DELETE FROM v"]:
        with fails(NOT_READY, "has no primary key"):
            connection.execute(statement)
    for index in ["(id) WHERE id > 0", "((id + 1))", "(id)", "(token)"]:
        connection.execute(f"CREATE UNIQUE INDEX i ON t {index}")
        make_view(connection)
        with fails(NOT_READY):
            connection.execute("DELETE FROM v")
        connection.execute("DROP INDEX i")
    connection.execute("ALTER TABLE t ALTER id SET NOT NULL; ALTER TABLE t ADD UNIQUE (id) DEFERRABLE")
    make_view(connection)
    with fails(NOT_READY):
        connection.execute("DELETE FROM v")
    connection.execute("CREATE UNIQUE INDEX ON t (id)")
    make_view(connection)
    assert rows(connection, "UPDATE v SET note = 'x' RETURNING *") == [(1, "one", "x")]
    assert connection.execute("DELETE FROM v").rowcount == 1


def test_keys_of_types_with_operators_of_their_own(connection):
    connection.execute("""CREATE TYPE mood AS ENUM ('good', 'bad'); CREATE DOMAIN code AS varchar(9);
                          CREATE COLLATION ci (provider = icu, locale = 'und-u-ks-level2', deterministic = false)""")
    make_table(connection, """a mood, b code, c numeric, d int[], e text COLLATE ci, f uuid, g char(4), token text,
                              PRIMARY KEY (a, b, c, d, e, f, g)""", aad="e || c::text")
    connection.execute("INSERT INTO v VALUES ('good', 'x', 1.50, '{1,2}', 'E', gen_random_uuid(), 'g', 'one')")
    assert connection.execute("UPDATE v SET token = 'two', e = 'e', c = 1.500").rowcount == 1
    assert rows(connection, "SELECT token, e FROM v") == [("two", "e")]
    assert connection.execute("DELETE FROM v").rowcount == 1


def test_rows_are_told_apart_as_the_index_does(connection):
    connection.execute("""CREATE COLLATION ci (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
                          CREATE TABLE t (name text COLLATE ci NOT NULL, token text);
                          CREATE UNIQUE INDEX ON t (name COLLATE "C")""")
    make_view(connection, columns=["token"], aad="name")
    connection.execute("INSERT INTO v VALUES ('a', 'one'), ('A', 'two')")
    assert rows(connection, """UPDATE v SET token = token || '!' WHERE name COLLATE "C" = 'A' RETURNING *""") == [("A", "two!")]
    assert rows(connection, """DELETE FROM v WHERE name COLLATE "C" = 'a' RETURNING *""") == [("a", "one")]
    assert rows(connection, "TABLE v") == [("A", "two!")]


def test_triggers_and_foreign_keys_of_the_table(connection):
    connection.execute("""
        CREATE TABLE log (what text, path text);
        CREATE TABLE t (id int PRIMARY KEY, token text, note text, updated int DEFAULT 0,
                        parent int REFERENCES t ON DELETE CASCADE);
        CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO log VALUES (TG_WHEN || ' ' || TG_OP || ' ' || TG_ARGV[0], current_setting('search_path'));
            IF TG_WHEN = 'BEFORE' AND TG_OP = 'UPDATE' THEN NEW.updated := OLD.updated + 1; END IF;
            RETURN NEW; END $$;
        CREATE TRIGGER a BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION note('any');
        CREATE TRIGGER b AFTER UPDATE OF note ON t FOR EACH ROW EXECUTE FUNCTION note('note');
        CREATE TRIGGER c AFTER UPDATE OF token ON t FOR EACH ROW EXECUTE FUNCTION note('token');
        CREATE TRIGGER d AFTER INSERT ON t FOR EACH ROW EXECUTE FUNCTION note('new')""")
    make_view(connection, columns=["token"], aad="id::text")
    connection.execute("SET search_path = public, pg_temp")

    def logged() -> list:
        return [what for what, in rows(connection, "DELETE FROM log WHERE path = 'public, pg_temp' RETURNING what")]

    connection.execute("INSERT INTO v (id, token, parent) VALUES (1, 'one', NULL), (2, 'two', 1), (3, 'three', 2)")
    assert logged() == ["AFTER INSERT new"] * 3
    assert rows(connection, "UPDATE v SET token = 'x' WHERE id = 1 RETURNING token, updated") == [("x", 1)]
    assert logged() == ["BEFORE UPDATE any", "AFTER UPDATE token"]
    assert rows(connection, "UPDATE v SET note = 'x' WHERE id = 1 RETURNING note, updated") == [("x", 2)]
    assert logged() == ["BEFORE UPDATE any", "AFTER UPDATE note"]
    assert rows(connection, "UPDATE v SET updated = updated WHERE id = 1 RETURNING updated") == [(3,)]
    with fails("23503"):
        connection.execute("INSERT INTO v (id, token, parent) VALUES (4, 'four', 77)")
    connection.execute("DELETE FROM v WHERE id = 1")
    assert rows(connection, "TABLE t") == []


def test_a_trigger_that_skips_or_replaces_what_is_written(connection):
    connection.execute("""
        CREATE TABLE t (id int PRIMARY KEY, token text, note text);
        CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF NEW.note = 'skip' THEN RETURN NULL; ELSIF NEW.note = 'clear' THEN NEW.token := NULL;
            ELSIF NEW.note = 'swap' THEN NEW.token := envelope_encrypt('swapped', aad => NEW.id::text);
            ELSIF NEW.note = 'move' THEN NEW.id := NEW.id + 100; END IF;
            RETURN NEW; END $$;
        CREATE TRIGGER f BEFORE INSERT OR UPDATE ON t FOR EACH ROW EXECUTE FUNCTION f()""")
    make_view(connection, columns=["token"], aad="id::text")
    assert rows(connection, "INSERT INTO v VALUES (1, 'one', 'skip'), (2, 'two', 'clear'), (3, 'three', 'swap') RETURNING *") == [
        (2, None, "clear"), (3, "swapped", "swap")]
    with fails(TRIGGER_CHANGES):
        connection.execute("INSERT INTO v VALUES (4, 'four', 'move')")
    with fails(TRIGGER_CHANGES):
        connection.execute("UPDATE v SET note = 'move' WHERE id = 3")
    assert rows(connection, "INSERT INTO v VALUES (4, NULL, 'move') RETURNING *") == [(104, None, "move")]
    assert connection.execute("UPDATE v SET note = 'skip' WHERE id = 3").rowcount == 0
    assert rows(connection, "UPDATE v SET token = 'x', note = 'clear' WHERE id = 3 RETURNING *") == [(3, None, "clear")]
    assert rows(connection, "SELECT * FROM v ORDER BY id") == [(2, None, "clear"), (3, None, "clear"), (104, None, "move")]


# -- writers beside each other -----------------------------------------------------------------------------------


def in_background(database, statement: str, user: str = "postgres"):
    """Begins a statement in another session; gives the session's process id and a function that gives its outcome."""
    session = database.connect(user=user)
    outcome = []

    def run() -> None:
        try:
            outcome.append(session.execute(statement).rowcount)
        except psycopg.Error as error:
            outcome.append(error.sqlstate)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result():
        thread.join(30)
        session.close()
        return outcome[0]
    return session.info.backend_pid, result


def waits(connection, pid: int) -> bool:
    """Whether a session waits for a lock."""
    return one(connection, "SELECT count(*) FROM pg_locks WHERE pid = %s AND NOT granted", pid) > 0


@pytest.mark.parametrize("first, second, outcome", [
    ("UPDATE v SET token = 'first'", "UPDATE v SET note = 'second'", CHANGED_MEANWHILE),
    ("UPDATE t SET note = 'first'", "UPDATE v SET token = 'second'", CHANGED_MEANWHILE),
    ("UPDATE v SET token = 'first'", "DELETE FROM v", CHANGED_MEANWHILE),
    ("DELETE FROM v", "UPDATE v SET token = 'second'", CHANGED_MEANWHILE),
    ("UPDATE v SET id = 2", "UPDATE v SET token = 'second'", CHANGED_MEANWHILE),
    ("DELETE FROM v; INSERT INTO v VALUES (1, 'again')", "UPDATE v SET token = 'second'", CHANGED_MEANWHILE),
    ("DELETE FROM v", "DELETE FROM v", 0),
    ("UPDATE t SET token = token", "UPDATE v SET token = 'second'", 1),
])
def test_an_update_is_never_lost(database, connection, first, second, outcome):
    make_table(connection)
    connection.execute("INSERT INTO v VALUES (1, 'one', 'note')")
    with database.connect() as other:
        with other.transaction():
            other.execute(first)
            after_first = rows(other, "TABLE v")
            pid, result = in_background(database, second)
            wait_until(lambda: waits(connection, pid), "for the second writer")
        assert result() == outcome
    after = [(1, "second", "note")] if outcome == 1 else after_first
    assert rows(connection, "TABLE v") == after


def test_under_repeatable_read(database, connection):
    make_table(connection)
    connection.execute("INSERT INTO v VALUES (1, 'one')")
    with database.connect() as other:
        with fails(CHANGED_MEANWHILE), other.transaction():
            other.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            rows(other, "TABLE v")
            connection.execute("UPDATE v SET token = 'two'")
            other.execute("UPDATE v SET note = 'x'")
    assert rows(connection, "TABLE v") == [(1, "two", None)]


def test_a_row_that_was_locked_through_the_view_is_changed(database, connection):
    make_table(connection)
    connection.execute("INSERT INTO v VALUES (1, 'one')")
    with database.connect() as other:
        with other.transaction():
            other.execute("UPDATE v SET note = 'first'")
            pid, result = in_background(database, "SELECT FROM v FOR UPDATE; UPDATE v SET token = 'second'")
            wait_until(lambda: waits(connection, pid), "for the second writer")
        assert result() is not None
    assert rows(connection, "TABLE v") == [(1, "second", "first")]


def test_one_transaction_may_change_a_row_again_and_one_statement_may_not(connection):
    make_table(connection)
    connection.execute("INSERT INTO v VALUES (1, 'one')")
    with connection.transaction():
        connection.execute("UPDATE v SET token = 'two'")
        with connection.transaction():
            connection.execute("UPDATE v SET note = 'n'")
        connection.execute("UPDATE t SET note = note || '!'")
        connection.execute("UPDATE v SET token = token || '!'")
    assert rows(connection, "TABLE v") == [(1, "two!", "n!")]
    twice = ["UPDATE v SET token = x FROM (VALUES ('a'), ('b')) j(x)",
             "WITH w AS (UPDATE v SET token = 'a' RETURNING id) UPDATE v SET note = 'b' FROM w WHERE v.id = w.id",
             "WITH w AS (UPDATE t SET note = 'a' RETURNING id) DELETE FROM v USING w WHERE v.id = w.id"]
    for statement in twice:
        with fails(CHANGED_TWICE):
            connection.execute(statement)
        with fails(CHANGED_TWICE), connection.transaction(), connection.transaction():
            connection.execute("SELECT pg_current_xact_id()")
            connection.execute(statement)
    assert rows(connection, "TABLE v") == [(1, "two!", "n!")]
    assert connection.execute("DELETE FROM v USING (VALUES (1), (2)) j").rowcount == 1


def test_an_update_beside_a_foreign_key_check_does_not_wait(database, connection):
    make_table(connection)
    connection.execute("INSERT INTO v VALUES (1, 'one'); CREATE TABLE child (t int REFERENCES t)")
    with database.connect() as other, other.transaction():
        other.execute("INSERT INTO child VALUES (1)")
        connection.execute("SET lock_timeout = '5s'")
        connection.execute("UPDATE v SET token = 'two'")
    assert rows(connection, "SELECT token FROM v") == [("two",)]


def test_a_key_service_is_waited_for_before_the_row_is_locked(database, connection, black_hole):
    uri = f"aws-kms://alias/x?region=eu-west-1&endpoint={black_hole.url}"
    connection.execute("SELECT vod_tender_crypto.add_key('deaf', %s)", [uri])
    make_table(connection, key="deaf")
    connection.execute("INSERT INTO t VALUES (1, envelope_encrypt('one', key => 'default', aad => '1'))")
    pid, result = in_background(database, "UPDATE v SET token = 'two'")
    black_hole.wait_for_connection()
    rows(connection, "SELECT FROM t FOR UPDATE NOWAIT")
    connection.execute("SELECT pg_cancel_backend(%s)", [pid])
    assert result() == CANCELED
    assert rows(connection, "SELECT token FROM v") == [("one",)]


# -- rights ------------------------------------------------------------------------------------------------------


@pytest.fixture
def reader(database):
    """A plain role that may encrypt and decrypt."""
    with role(database, may_run_jobs=False) as name:
        may_use(database, name)
        yield name


def test_readers_and_writers(database, connection, reader):
    make_table(connection, readers=[reader])
    connection.execute("INSERT INTO v VALUES (1, 'one')")
    with database.connect(user=reader) as session:
        assert rows(session, "TABLE v") == [(1, "one", None)]
        for statement in ["INSERT INTO v VALUES (2, 'two')", "UPDATE v SET token = 'x'", "DELETE FROM v"]:
            with fails(NO_RIGHT):
                session.execute(statement)
        connection.execute(f"GRANT INSERT, UPDATE, DELETE ON v TO {reader}")
        for statement in ["INSERT INTO v VALUES (2, 'two')", "UPDATE v SET token = 'x'", "DELETE FROM v"]:
            with fails(NO_RIGHT, "table t"):
                session.execute(statement)
        connection.execute(f"GRANT INSERT, UPDATE (token), DELETE ON t TO {reader}")
        session.execute("INSERT INTO v VALUES (2, 'two')")
        session.execute("UPDATE v SET token = token || '!'")
        with fails(NO_RIGHT):
            session.execute("UPDATE v SET note = 'x'")
        assert session.execute("DELETE FROM v WHERE id = 1").rowcount == 1
        assert rows(session, "TABLE v") == [(2, "two!", None)]
        with fails(NO_RIGHT):
            session.execute("SELECT v_write()")
        connection.execute(f"REVOKE SELECT ON t FROM {reader}")
        with fails(NO_RIGHT, "table t"):
            rows(session, "TABLE v")


def test_without_the_right_to_decrypt_the_other_columns_are_read(database, connection):
    with role(database, may_run_jobs=False) as name:
        make_table(connection, readers=[name])
        connection.execute("INSERT INTO v VALUES (1, 'one', 'n')")
        with database.connect(user=name) as session:
            assert rows(session, "SELECT id, note FROM v") == [(1, "n")]
            with fails(NO_RIGHT, "envelope_decrypt"):
                rows(session, "SELECT token FROM v")


def test_row_level_security_of_the_table_is_the_readers(database, connection, reader):
    make_table(connection, "id int PRIMARY KEY, token text, tenant name", readers=[reader])
    connection.execute(f"INSERT INTO v VALUES (1, 'hers', '{reader}'), (2, 'secret of another', 'other'), (3, 'seen', 'seen')")
    connection.execute(f"""ALTER TABLE t ENABLE ROW LEVEL SECURITY;
                           CREATE POLICY s ON t FOR SELECT USING (tenant IN (current_user, 'seen'));
                           CREATE POLICY u ON t FOR UPDATE USING (tenant = current_user);
                           CREATE POLICY d ON t FOR DELETE USING (tenant = current_user);
                           CREATE POLICY i ON t FOR INSERT WITH CHECK (tenant = current_user);
                           GRANT INSERT, UPDATE, DELETE ON v, t TO {reader}""")
    with database.connect(user=reader) as session:
        session.execute("""CREATE FUNCTION pg_temp.leak(text) RETURNS boolean LANGUAGE plpgsql COST 0.0000001 AS
                           $$ BEGIN RAISE NOTICE 'leak %', $1; RETURN true; END $$""")
        heard = notices(session)
        assert rows(session, "SELECT id FROM v WHERE pg_temp.leak(token) ORDER BY id") == [(1,), (3,)]
        assert {text for _, text in heard} == {"leak hers", "leak seen"}
        assert session.execute("UPDATE v SET token = 'new'").rowcount == 1
        assert session.execute("DELETE FROM v WHERE id > 1").rowcount == 0
        with fails(NO_RIGHT):
            session.execute("INSERT INTO v VALUES (4, 'x', 'other')")
        with fails(NO_RIGHT):
            session.execute("UPDATE v SET tenant = 'other'")
    assert rows(connection, "SELECT id, token FROM v ORDER BY id") == [(1, "new"), (2, "secret of another"), (3, "seen")]


def test_an_update_is_not_lost_under_row_level_security(database, connection, reader):
    make_table(connection, readers=[reader])
    connection.execute(f"""INSERT INTO v VALUES (1, 'one'); GRANT UPDATE ON v, t TO {reader};
                           ALTER TABLE t ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON t USING (true)""")
    with database.connect() as other:
        with other.transaction():
            other.execute("DELETE FROM v; INSERT INTO v VALUES (1, 'again')")
            pid, result = in_background(database, "UPDATE v SET token = 'second'", reader)
            wait_until(lambda: waits(connection, pid), "for the second writer")
        assert result() == CHANGED_MEANWHILE
    assert rows(connection, "TABLE v") == [(1, "again", None)]


def test_the_owner_of_a_table_makes_views_of_it(database, connection, owner):
    connection.execute(f"CREATE SCHEMA hers AUTHORIZATION {owner}")
    with database.connect(user=owner) as session:
        session.execute("CREATE TABLE hers.t (id int PRIMARY KEY, token text)")
        make_view(session, "hers.t", columns=["token"], aad="id::text", set_columns={})
        connection.execute("SELECT vod_tender_crypto.revoke_key(k, %s::regrole) FROM unnest(ARRAY['default', 'legacy']) k", [owner])
        with fails(NO_RIGHT, "envelope_encrypt"):
            session.execute("INSERT INTO hers.v VALUES (1, 'one')")
        may_use(database, owner)
        session.execute("INSERT INTO hers.v VALUES (1, 'one')")
        session.execute("SELECT vod_tender_crypto.drop_decrypting_view('hers.v')")
        connection.execute("CREATE TABLE t (id int PRIMARY KEY, token text)")
        with fails(NO_RIGHT, "must be owner"):
            make_view(session, columns=["token"])
        # One that a superuser makes is hers as well.
        make_view(connection, "hers.t")
        make_view(session, "hers.t")
        assert rows(session, "SELECT token FROM hers.v") == [("one",)]
        session.execute("SELECT vod_tender_crypto.drop_decrypting_view('hers.v')")
        with fails(NO_RIGHT):
            make_view(connection, columns=["token"])
            session.execute("SELECT vod_tender_crypto.drop_decrypting_view('v')")


EVIL = "LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'evil'; END $$"
EVIL_TYPES = ["pg_catalog.text", "integer", "bigint", "bytea", "record", "name", "oid", "varchar"]
EVIL_FUNCTIONS = ["lower(pg_catalog.text)", "concat(pg_catalog.text)", "textcat(pg_catalog.text, pg_catalog.text)",
                  "replace(pg_catalog.text, pg_catalog.text, pg_catalog.text)", "record_image_ne(record, record)",
                  "int4ne(integer, integer)",
                  "envelope_encrypt(pg_catalog.text, pg_catalog.text, pg_catalog.jsonb, pg_catalog.text)",
                  "envelope_decrypt(pg_catalog.text, pg_catalog.text, pg_catalog.jsonb, integer)"]


def test_nothing_is_looked_up_through_the_writers_path(database, connection, reader):
    make_table(connection, "id int PRIMARY KEY, channel varchar(20), token text, raw bytea", columns=["token", "raw"],
               aad="lower(channel) || '/' || id::text", set_columns={}, readers=[reader])
    connection.execute(f"""GRANT INSERT, UPDATE, DELETE ON v, t TO {reader};
                           CREATE SCHEMA evil; GRANT USAGE ON SCHEMA evil TO public""")
    for base in ["text", "jsonb", "int4", "record", "regclass"]:
        connection.execute(f"CREATE DOMAIN evil.{base} AS pg_catalog.text CHECK (false)")
    for each in EVIL_TYPES:
        connection.execute(f"CREATE FUNCTION evil.f({each}, {each}) RETURNS boolean {EVIL}")
        for operator in ["=", "<>", "<", ">", "||", "-", "+", "&"]:
            connection.execute(f"CREATE OPERATOR evil.{operator} (FUNCTION = evil.f, LEFTARG = {each}, RIGHTARG = {each})")
    for function in EVIL_FUNCTIONS:
        connection.execute(f"CREATE FUNCTION evil.{function} RETURNS pg_catalog.text {EVIL}")
    with database.connect(user=reader) as session:
        for path in ["evil, public, pg_catalog", "''"]:
            session.execute(f"SET search_path = {path}")
            assert session.execute("INSERT INTO public.v VALUES (1, 'Channel', 'one', '\\x01')").rowcount == 1
            assert session.execute("UPDATE public.v SET token = 'two', channel = 'x'").rowcount == 1
            assert session.execute("SELECT token FROM public.v").fetchall() == [("two",)]
            assert session.execute("DELETE FROM public.v").rowcount == 1
        session.execute("SET search_path = evil, public, pg_catalog")
        with fails("P0001", "evil"):
            session.execute("SELECT lower(channel) FROM (VALUES ('x'::pg_catalog.text)) j(channel) WHERE channel = 'x'")


# -- making and dropping -----------------------------------------------------------------------------------------


def test_made_again_it_is_the_same_view(connection, reader):
    make_table(connection, readers=[reader])
    connection.execute(f"GRANT UPDATE ON v TO {reader}")
    state = "SELECT oid, relacl::text, reloptions FROM pg_class WHERE oid = 'v'::regclass"
    before = rows(connection, state)
    assert set(before[0][2]) == {"security_barrier=true", "security_invoker=true"}
    make_view(connection)
    make_view(connection, columns=["token"], aad="(id)::text")
    assert rows(connection, state) == before
    connection.execute("ALTER TABLE t ADD extra int NOT NULL DEFAULT 4, ADD secret text")
    connection.execute("INSERT INTO v VALUES (1, 'one')")
    with fails("42703"):
        connection.execute("UPDATE v SET extra = 1")
    make_view(connection, columns=["token", "secret"], aad="id::text")
    connection.execute("UPDATE v SET extra = 1, secret = 'two'")
    assert rows(connection, "TABLE v") == [(1, "one", None, 1, "two")]
    assert one(connection, "SELECT is_envelope(secret) FROM t")
    assert rows(connection, state) == before


def test_registration(connection):
    make_table(connection, "id int PRIMARY KEY, token text, other text", context={"tenant": "a"})
    registered = "SELECT column_name, aad, context, key FROM vod_tender_crypto.protected_column ORDER BY 1"
    assert rows(connection, registered) == [("token", "id::text", {"tenant": "a"}, None)]
    connection.execute("INSERT INTO v VALUES (1, 'one')")
    assert rows(connection, "SELECT * FROM vod_tender_crypto.verify('t')") == []
    for wrong in [{"aad": "'x' || id::text"}, {"context": {"tenant": "b"}}]:
        with fails(INVALID_PARAMETER, "registered with another"):
            make_view(connection, view="w", **wrong)
    # One column is registered and has an aad, the other gets none.
    make_view(connection, view="w", columns=["other", "token"])
    connection.execute("INSERT INTO w VALUES (2, 'two', 'free')")
    assert one(connection, "SELECT envelope_decrypt(other) FROM t WHERE id = 2") == "free"
    assert rows(connection, "SELECT token, other FROM v WHERE id = 2")[0][0] == "two"
    with fails("42704"):
        make_view(connection, view="w", key="nope")
    connection.execute("ALTER TABLE t ADD third text")
    with fails("42P17", '"other" may change'):
        make_view(connection, view="w", columns=["third"], aad="other")


@pytest.mark.parametrize("arguments, state", [
    ({}, INVALID_PARAMETER), ({"columns": []}, INVALID_PARAMETER), ({"columns": ["nope"]}, "42703"),
    ({"columns": ["id"]}, "42804"), ({"columns": ["name"]}, "0A000"), ({"columns": ["gen"]}, "0A000"),
    ({"columns": ["token", "token"]}, INVALID_PARAMETER), ({"columns": ["token"], "aad": "token"}, "42P17"),
    ({"columns": ["token"], "aad": "gen"}, "42P17"), ({"columns": ["token"], "aad": "now()::text"}, "42P17"),
    ({"columns": ["token"], "aad": "(SELECT 'x')"}, "0A000"), ({"columns": ["token"], "readers": [None]}, "22004"),
    ({"columns": ["token"], "context": ["x"]}, INVALID_PARAMETER),
    ({"columns": ["token"], "context": {"x": 1}}, INVALID_PARAMETER),
])
def test_what_is_refused(connection, arguments, state):
    connection.execute("""CREATE TABLE t (id int, name text PRIMARY KEY, token text,
                                          gen text GENERATED ALWAYS AS ('g' || name) STORED)""")
    given = {name: json.dumps(value) if name == "context" else value for name, value in arguments.items()}
    with fails(state):
        make_view(connection, **given)
    assert one(connection, "SELECT to_regclass('v') IS NULL")
    assert rows(connection, "SELECT FROM vod_tender_crypto.protected_column") == []


def test_relations_that_it_cannot_be_made_of_or_in_the_place_of(connection):
    make_table(connection)
    for relation in ["v", "t_pkey"]:
        with fails("42809"):
            make_view(connection, relation, "w", columns=["token"])
    connection.execute("""CREATE VIEW plain AS SELECT 1; CREATE TABLE u (id int PRIMARY KEY, token text);
                          CREATE FUNCTION mine_write() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'""")
    for name in ["plain", "t", "u", "t_pkey"]:
        with fails("42P07"):
            make_view(connection, view=name)
    with fails("42P07", "no decrypting view of public.u"):
        make_view(connection, "u", columns=["token"])
    with fails("42723"):
        make_view(connection, view="mine")
    connection.execute("CREATE RULE r AS ON INSERT TO u DO ALSO NOTIFY x")
    with fails("0A000", "has a rule"):
        make_view(connection, "u", "w", columns=["token"])


def test_dropping(connection):
    make_table(connection)
    connection.execute("CREATE VIEW plain AS SELECT 1; CREATE VIEW above AS SELECT id FROM v")
    for relation in ["plain", "t", None]:
        with fails("42809"):
            connection.execute("SELECT vod_tender_crypto.drop_decrypting_view(%s::regclass)", [relation])
    with fails("2BP01"):
        connection.execute("SELECT vod_tender_crypto.drop_decrypting_view('v')")
    assert rows(connection, "INSERT INTO v VALUES (1, 'one') RETURNING token") == [("one",)]
    connection.execute("DROP VIEW above; SELECT vod_tender_crypto.drop_decrypting_view('v')")
    assert one(connection, "SELECT count(*) FROM pg_proc WHERE proname IN ('v_write', 'v_aad')") == 0
    assert one(connection, "SELECT count(*) FROM vod_tender_crypto.protected_column") == 1
    make_view(connection)
    assert rows(connection, "SELECT token FROM v") == [("one",)]


def test_what_a_dropped_table_leaves_behind_is_used_again(connection):
    make_table(connection)
    connection.execute("DROP TABLE t CASCADE")
    make_table(connection)
    connection.execute("INSERT INTO v VALUES (1, 'one')")
    assert rows(connection, "SELECT token FROM v") == [("one",)]


def test_a_table_that_took_the_name_is_not_written(connection):
    make_table(connection)
    connection.execute("INSERT INTO v VALUES (1, 'one')")
    connection.execute("ALTER TABLE t RENAME TO u; CREATE TABLE t (LIKE u INCLUDING ALL)")
    for statement in ["INSERT INTO v VALUES (2, 'two')", "UPDATE v SET token = 'x'", "DELETE FROM v"]:
        with fails(NOT_READY, "does not show"):
            connection.execute(statement)
    make_view(connection, "u", columns=["token"], aad="id::text")
    connection.execute("UPDATE v SET token = 'two'")
    assert rows(connection, "TABLE v") == [(1, "two", None)]


def test_a_view_that_was_renamed_works_and_is_dropped(connection):
    make_table(connection)
    connection.execute("ALTER VIEW v RENAME TO w")
    connection.execute("INSERT INTO w VALUES (1, 'one')")
    make_view(connection, view="w")
    connection.execute("UPDATE w SET token = 'two'")
    assert rows(connection, "TABLE w") == [(1, "two", None)]
    connection.execute("SELECT vod_tender_crypto.drop_decrypting_view('w')")
    assert one(connection, "SELECT count(*) FROM pg_proc WHERE proname IN ('v_write', 'v_aad')") == 0


def test_dump_and_restore(database, connection, reader):
    connection.execute("CREATE SCHEMA app")
    connection.execute("""CREATE TABLE app.t (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, token text,
                                              note text DEFAULT 'none')""")
    make_view(connection, "app.t", columns=["token"], aad="id::text || '{column}'", set_columns={"note": "{version}"},
              readers=[reader])
    connection.execute("INSERT INTO app.v (token) VALUES ('one'), ('two')")
    stored_rows = rows(connection, "TABLE app.t")
    restored = database.name + "_restored"
    database.cluster.createdb(restored)
    try:
        database.cluster.psql(database.pg_dump(), dbname=restored)
        with database.cluster.connect(restored) as session:
            assert rows(session, "TABLE app.t") == stored_rows
            assert rows(session, "TABLE app.v") == [(1, "one", "2"), (2, "two", "2")]
            assert rows(session, "INSERT INTO app.v (token) VALUES ('three') RETURNING *") == [(3, "three", "2")]
            session.execute("UPDATE app.v SET token = 'x' WHERE id = 1")
            session.execute("DELETE FROM app.v WHERE id = 2")
            assert rows(session, "SELECT id, token FROM app.v ORDER BY id") == [(1, "x"), (3, "three")]
            oid = one(session, "SELECT 'app.v'::regclass::oid")
            make_view(session, "app.t")
            assert one(session, "SELECT 'app.v'::regclass::oid") == oid
            session.execute("SELECT vod_tender_crypto.drop_decrypting_view('app.v')")
        with database.cluster.connect(restored, user=reader) as session:
            with fails(NO_RIGHT):
                rows(session, "TABLE app.t")
    finally:
        database.cluster.dropdb(restored)


def test_jobs_and_the_view_go_together(tokens):
    assert call(tokens, "migrate", "oauth_tokens", version="encryption_version", set_columns=SET_COLUMNS).state == "done"
    tokens.execute("RESET vod_tender_crypto.plaintext_reads")
    assert wrong_tokens(tokens) == 0
    tokens.execute("UPDATE v SET access_token = 'x', channel = channel || '/new' WHERE channel = 'channel7'")
    assert one(tokens, f"SELECT envelope_decrypt(refresh_token, aad => {aad_of('refresh_token')}) = "
                       "(SELECT refresh_token FROM v WHERE channel = 'channel7/new') FROM oauth_tokens"
                       " WHERE channel = 'channel7/new'")
    assert rows(tokens, "SELECT * FROM vod_tender_crypto.verify('oauth_tokens')") == []


def test_the_examples_of_the_page(connection, reader):
    page = (Path(__file__).resolve().parents[2] / "docs" / "VIEWS.md").read_text()
    examples = re.findall(r"^```sql\n(.*?)^```", page, re.M | re.S)
    make_tokens(connection, 0)
    connection.execute("ALTER TABLE oauth_tokens ALTER encryption_version SET DEFAULT 0")
    for example in examples[:2]:
        connection.execute(example)
    assert rows(connection, "SELECT channel, access_token FROM tokens") == [("chan2", "token")]
    for example in examples[1:]:
        connection.execute(example.replace("app_writer", reader))
    assert len(examples) == 4 and one(connection, "SELECT to_regclass('tokens') IS NULL")


# -- what was found by review --------------------------------------------------------------------------------------


def test_a_column_of_bound_values_is_not_taken_for_an_unbound_one(connection):
    connection.execute("CREATE TABLE t (id int PRIMARY KEY, token text)")
    connection.execute("INSERT INTO t VALUES (1, envelope_encrypt('one', aad => '1')), (2, NULL)")
    with fails(NOT_READY, "bound to an aad"):
        make_view(connection, columns=["token"])
    make_view(connection, columns=["token"], aad="id::text")
    assert rows(connection, "SELECT token FROM v WHERE id = 1") == [("one",)]
    connection.execute("CREATE TABLE u (id int PRIMARY KEY, token text); INSERT INTO u VALUES (1, envelope_encrypt('one'))")
    with fails(NOT_READY, "not bound to an aad"):
        make_view(connection, "u", "w", columns=["token"], aad="id::text")


def test_a_renamed_column_is_found_again_through_its_registration(connection):
    connection.execute("CREATE TABLE t (id int PRIMARY KEY, token text)")
    make_view(connection, columns=["token"], aad="id::text")
    connection.execute("INSERT INTO v VALUES (1, 'one'); SELECT vod_tender_crypto.drop_decrypting_view('v')")
    connection.execute("ALTER TABLE t RENAME token TO access")
    with fails(NOT_READY, "bound to an aad"):
        make_view(connection, columns=["access"])
    connection.execute("UPDATE vod_tender_crypto.protected_column SET column_name = 'access'")
    make_view(connection)
    assert rows(connection, "TABLE v") == [(1, "one")]


def test_a_view_keeps_its_set_columns(connection):
    connection.execute("CREATE TABLE t (id int PRIMARY KEY, token text, note text DEFAULT 'none')")
    make_view(connection, columns=["token"], set_columns={"note": "version {version}"})
    make_view(connection)
    connection.execute("INSERT INTO v (id, token) VALUES (1, 'one')")
    make_view(connection, set_columns={})
    connection.execute("INSERT INTO v (id, token) VALUES (2, 'two')")
    assert rows(connection, "SELECT note FROM t ORDER BY id") == [("version 2",), ("none",)]
