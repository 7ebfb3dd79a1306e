"""Configured keys: table, functions, environment, files; who may use and change them; dump and restore."""

from __future__ import annotations

import base64
import os

import pytest

from helpers import add_local_key, new_key, one, v1_vectors
from sqlstate import INVALID_PARAMETER, NO_RIGHT, NOT_READY, UNKNOWN_KEY, UNVERIFIED, fails


def test_a_change_is_seen_by_every_sessions_next_statement(cluster):
    with cluster.connect() as admin, cluster.connect() as user:
        path = cluster.server_file("kek.b64", new_key())
        with fails(NOT_READY, "no key is configured"):
            one(user, "SELECT envelope_encrypt('token')")
        admin.execute("SELECT vod_tender_crypto.add_key('default', %s)", [f"local://{path}"])
        value = one(user, "SELECT envelope_encrypt('token')")
        admin.execute("SELECT vod_tender_crypto.set_key_state('default', 'decrypt_only')")
        with fails(NOT_READY, "decrypt_only"):
            one(user, "SELECT envelope_encrypt('token')")
        assert one(user, "SELECT envelope_decrypt(%s)", value) == "token"
        admin.execute("SELECT vod_tender_crypto.set_key_state('default', 'disabled')")
        with fails(NOT_READY, "disabled"):
            one(user, "SELECT envelope_decrypt(%s)", value)
        admin.execute("SELECT vod_tender_crypto.drop_key('default')")
        with fails(UNKNOWN_KEY):
            one(user, "SELECT envelope_decrypt(%s)", value)
        admin.execute("SELECT vod_tender_crypto.add_key('default', %s)", [f"local://{path}"])
        assert one(user, "SELECT envelope_decrypt(%s)", value) == "token"


def test_a_disabled_key_counts_within_a_transaction_too(cluster):
    """Also under REPEATABLE READ, whose snapshot is older than the change."""
    with cluster.connect() as admin, cluster.connect(autocommit=False) as user:
        path = add_local_key(cluster, admin, "default")
        assert path
        user.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        value = one(user, "SELECT envelope_encrypt('token')")
        admin.execute("SELECT vod_tender_crypto.set_key_state('default', 'disabled')")
        with fails(NOT_READY, "disabled"):
            one(user, "SELECT envelope_decrypt(%s)", value)


def test_a_change_that_is_rolled_back_leaves_nothing(cluster):
    with cluster.connect() as connection:
        path = add_local_key(cluster, connection, "default")
        value = one(connection, "SELECT envelope_encrypt('token')")
        connection.execute("BEGIN")
        connection.execute("SELECT vod_tender_crypto.drop_key('default')")
        connection.execute("SAVEPOINT s")
        with fails(UNKNOWN_KEY):
            one(connection, "SELECT envelope_decrypt(%s)", value)
        connection.execute("ROLLBACK")
        assert one(connection, "SELECT envelope_decrypt(%s)", value) == "token"
        assert os.path.exists(path)


def test_key_files(cluster):
    with cluster.connect() as connection:
        for content, mode, saying in [
            (new_key(), 0o644, "accessible to group or others (mode 0644)"),
            (new_key(), 0o640, "mode 0640"),
            (base64.b64encode(b"x" * 31).decode(), 0o600, "base64 of 32 bytes"),
            (base64.b64encode(b"x" * 33).decode(), 0o600, "base64 of 32 bytes"),
            ("", 0o600, "base64 of 32 bytes"),
            (new_key() + "\n" + new_key(), 0o600, "base64 of 32 bytes"),
        ]:
            path = cluster.server_file("odd.b64", content, mode)
            connection.execute("DELETE FROM vod_tender_crypto.kek")
            connection.execute("SELECT vod_tender_crypto.add_key('default', %s)", [f"local://{path}"])
            with fails(NOT_READY, saying) as caught:
                one(connection, "SELECT envelope_encrypt('token')")
            assert not content or content not in str(caught.value)
        connection.execute("SELECT vod_tender_crypto.add_key('gone', 'local:///nonexistent/kek')")
        with fails(NOT_READY, "could not be opened"):
            one(connection, "SELECT envelope_encrypt('token', key => 'gone')")


def test_a_replaced_key_file_is_another_key(cluster):
    with cluster.connect() as connection:
        path = add_local_key(cluster, connection, "default")
        value = one(connection, "SELECT envelope_encrypt('token')")
        connection.execute("SELECT envelope_cache_clear()")
        name = os.path.basename(path)
        kept = open(path).read()
        cluster.server_file(name, new_key())
        with fails(UNVERIFIED, "holds local:"):
            one(connection, "SELECT envelope_decrypt(%s)", value)
        cluster.server_file(name, kept)
        assert one(connection, "SELECT envelope_decrypt(%s)", value) == "token"


@pytest.mark.parametrize("name, uri, context", [
    ("", "local:///x", "{}"),
    ("a b", "local:///x", "{}"),
    ("-a", "local:///x", "{}"),
    ("x" * 64, "local:///x", "{}"),
    ("ñ", "local:///x", "{}"),
    ("a", "x", "{}"),
    ("a", "local://relative", "{}"),
    ("a", "nope:///x", "{}"),
    ("a", "aws-kms://alias/x?endpoint=http://kms.example.com", "{}"),
    ("a", "local:///x", "[]"),
    ("a", "local:///x", '{"a": 1}'),
    (None, "local:///x", "{}"),
    ("a", None, "{}"),
    ("a", "local:///x", None),
])
def test_rows_that_cannot_be_keys(cluster, name, uri, context):
    with cluster.connect() as connection:
        with fails(INVALID_PARAMETER):
            connection.execute("SELECT vod_tender_crypto.add_key(%s, %s, %s::jsonb)", [name, uri, context])
        if None not in (name, uri, context):
            with fails(INVALID_PARAMETER):
                connection.execute("INSERT INTO vod_tender_crypto.kek (name, uri, context) VALUES (%s, %s, %s)",
                                   [name, uri, context])
        assert one(connection, "SELECT count(*) FROM vod_tender_crypto.kek") == 0


def test_a_keys_own_context_is_added_and_cannot_be_overridden(cluster):
    with cluster.connect() as connection:
        add_local_key(cluster, connection, "main", '{"tenant": "a"}')
        value = one(connection, "SELECT envelope_encrypt('token', context => '{\"purpose\": \"oauth\"}')")
        assert one(connection, "SELECT envelope_info(%s)->'context'", value) == {"tenant": "a", "purpose": "oauth"}
        with fails(INVALID_PARAMETER, "contradicts"):
            one(connection, "SELECT envelope_encrypt('token', context => '{\"tenant\": \"b\"}')")


# -- environment -------------------------------------------------------------------------------------------------


def test_the_environments_keys_serve_the_four_phases(make_cluster, extension, kms):
    """ENCRYPTION_KEY alone, then with KMS_KEY_ID, then KMS_KEY_ID alone: nothing ever becomes unreadable."""
    vectors = v1_vectors()
    own = make_cluster(environment={**kms.environment(), "KMS_KEY_ID": None,
                                    "ENCRYPTION_KEY": vectors["encryption_key"]})
    with own.connect() as connection:
        connection.execute(f"CREATE EXTENSION {extension}")
        direct = one(connection, "SELECT envelope_encrypt('token')")
        assert one(connection, "SELECT envelope_version(%s)", direct) == 1
        assert one(connection, "SELECT envelope_decrypt(%s)", vectors["values"][0]["stored"]) \
            == vectors["values"][0]["plaintext"]
    own.environment["KMS_KEY_ID"] = "alias/e2e"
    own.restart()
    with own.connect() as connection:
        envelope = one(connection, "SELECT envelope_encrypt('token')")
        info = one(connection, "SELECT envelope_info(%s)", envelope)
        assert (info["version"], info["key"], info["kek_id"]) == (2, "default", kms.arn)
        assert info["context"] == {"Application": "vod-tender", "Purpose": "oauth-token"}
        assert kms.requests[0].body["EncryptionContext"] == info["context"]
        assert one(connection, "SELECT envelope_decrypt(%s)", direct) == "token"
        upgraded = one(connection, "SELECT envelope_upgrade(%s)", direct)
    own.environment["ENCRYPTION_KEY"] = None
    own.restart()
    with own.connect() as connection:
        for value in (envelope, upgraded):
            assert one(connection, "SELECT envelope_decrypt(%s)", value) == "token"
        with fails(INVALID_PARAMETER):
            one(connection, "SELECT envelope_decrypt(%s)", direct)
        with fails(NOT_READY):
            one(connection, "SELECT envelope_decrypt(%s, version => 1)", direct)
        # The first key in the table must not close what the environment's key has written.
        path = own.server_file("kek.b64", new_key())
        connection.execute("SELECT vod_tender_crypto.add_key('other', %s)", [f"local://{path}"])
        assert one(connection, "SELECT envelope_decrypt(%s)", envelope) == "token"


def test_the_literal_form_of_the_application(make_cluster, extension, kms):
    """`kms:v2:<blob>:<payload>`, whose DEK is the payload's key, under the configured default context."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    context = {"Application": "vod-tender", "Purpose": "oauth-token"}
    made = kms.client().generate_data_key(KeyId=kms.arn, NumberOfBytes=32, EncryptionContext=context)
    nonce = os.urandom(12)
    sealed = nonce + AESGCM(made["Plaintext"]).encrypt(nonce, b"token", None)
    b64 = lambda data: base64.b64encode(data).decode()  # noqa: E731
    literal = f"kms:v2:{b64(made['CiphertextBlob'])}:{b64(sealed)}"
    with make_cluster(environment=kms.environment()).connect() as connection:
        connection.execute(f"CREATE EXTENSION {extension}")
        for stored in (literal, b64(literal.encode())):
            assert one(connection, "SELECT envelope_decrypt(%s)", stored) == "token"
            assert one(connection, "SELECT envelope_version(%s)", stored) == 2
        assert one(connection, "SELECT envelope_upgrade(%s)", literal) == literal
        with fails(INVALID_PARAMETER, "cannot be rewrapped"):
            one(connection, "SELECT rewrap(%s)", literal)
        broken = f"kms:v2:{b64(made['CiphertextBlob'])}:{b64(sealed[:-1] + bytes([sealed[-1] ^ 1]))}"
        with fails(UNVERIFIED):
            one(connection, "SELECT envelope_decrypt(%s)", broken)


@pytest.mark.parametrize("environment, saying", [
    ({"KMS_KEY_ID": "not a key"}, "URI cannot be used"),
    ({"KMS_KEY_ID": "vault://x"}, "URI cannot be used"),
    ({"ENCRYPTION_KEY": "c2hvcnQ="}, "ENCRYPTION_KEY"),
])
def test_an_environment_that_cannot_be_used(make_cluster, extension, environment, saying):
    with make_cluster(environment=environment).connect() as connection:
        connection.execute(f"CREATE EXTENSION {extension}")
        with fails(NOT_READY, saying) as caught:
            one(connection, "SELECT envelope_encrypt('token')")
        assert "c2hvcnQ=" not in str(caught.value)


def test_a_file_of_legacy_keys(cluster):
    old, new = new_key(), new_key()
    with cluster.connect() as connection:
        connection.execute("SELECT envelope_cache_clear()")
        path = cluster.server_file("legacy.b64", old + "\n")
        connection.execute(f"SET vod_tender_crypto.legacy_key_file = '{path}'")
        value = one(connection, "SELECT envelope_encrypt('token')")
        cluster.server_file("legacy.b64", f"{new}\n{old}\n")
        assert one(connection, "SELECT envelope_decrypt(%s)", value) == "token"
        newer = one(connection, "SELECT envelope_encrypt('token')")
        cluster.server_file("legacy.b64", f"{new}\n")
        assert one(connection, "SELECT envelope_decrypt(%s, version => 1)", newer) == "token"
        with fails(UNVERIFIED):
            one(connection, "SELECT envelope_decrypt(%s, version => 1)", value)
        cluster.server_file("legacy.b64", "\n")
        with fails(NOT_READY, "legacy key file"):
            one(connection, "SELECT envelope_decrypt(%s)", newer)
        cluster.server_file("legacy.b64", f"{new}\n", 0o644)
        with fails(NOT_READY, "legacy key file"):
            one(connection, "SELECT envelope_decrypt(%s)", newer)


def test_settings_that_would_close_values_are_refused(cluster):
    with cluster.connect() as connection:
        connection.execute("SELECT envelope_cache_clear()")
        for setting, value in [("encryption_context", "not json"), ("encryption_context", '{"a": 1}'),
                               ("default_key", ""), ("default_key", "a b")]:
            with fails(INVALID_PARAMETER):
                connection.execute(f"SET vod_tender_crypto.{setting} = '{value}'")


# -- rights ------------------------------------------------------------------------------------------------------


def test_a_role_without_rights(cluster):
    with cluster.connect() as admin:
        add_local_key(cluster, admin, "default")
        admin.execute("CREATE ROLE nobody_e2e LOGIN")
    try:
        with cluster.connect(user="nobody_e2e") as user:
            for call in ["envelope_encrypt('x')", "envelope_encrypt('x'::bytea)", "envelope_decrypt('x')",
                         "envelope_decrypt('x'::bytea)", "rewrap('x')", "rewrap('x'::bytea)", "envelope_upgrade('x')",
                         "envelope_upgrade('x'::bytea)", "envelope_downgrade('x')", "envelope_downgrade('x'::bytea)",
                         "vod_tender_crypto.add_key('a', 'local:///x')", "vod_tender_crypto.drop_key('default')",
                         "vod_tender_crypto.set_key_state('default', 'active')",
                         "vod_tender_crypto.check_key('a', 'local:///x', '{}')"]:
                with fails(NO_RIGHT):
                    one(user, f"SELECT {call}")
            for query in ["TABLE vod_tender_crypto.kek", "DELETE FROM vod_tender_crypto.kek"]:
                with fails(NO_RIGHT):
                    user.execute(query)
            assert one(user, "SELECT NOT is_envelope('x') AND envelope_version('x') = 0")
            for setting in ["default_key", "encryption_context", "legacy_key_file", "write_format", "plaintext_reads",
                            "dek_max_uses", "dek_max_age", "dek_max_bytes", "dek_cache_entries", "audit",
                            "audit_required", "audit_queue_limit"]:
                with fails(NO_RIGHT):
                    user.execute(f"SET vod_tender_crypto.{setting} = '1'")
            user.execute("SET vod_tender_crypto.kms_timeout = '1s'")
            with cluster.connect() as admin:
                admin.execute("GRANT EXECUTE ON FUNCTION envelope_encrypt(text, text, jsonb, text) TO nobody_e2e")
            with fails(NO_RIGHT, "permission denied to encrypt with key"):
                one(user, "SELECT envelope_encrypt('x')")
            with cluster.connect() as admin:
                admin.execute("SELECT vod_tender_crypto.grant_key('default', 'nobody_e2e', '{encrypt}')")
            assert one(user, "SELECT envelope_encrypt('x')").startswith("kms:v2:")
            with fails(NO_RIGHT):
                one(user, "SELECT envelope_decrypt('x')")
    finally:
        with cluster.connect() as admin:
            admin.execute("DROP OWNED BY nobody_e2e")
            admin.execute("DROP ROLE nobody_e2e")


def test_no_function_that_handles_values_is_public(cluster):
    public = {"is_envelope", "envelope_version", "envelope_info", "envelope_cache_clear", "session_stats"}
    with cluster.connect() as connection:
        rows = connection.execute("""
            SELECT p.proname, has_function_privilege('public', p.oid, 'EXECUTE'), p.provolatile, p.proleakproof
            FROM pg_depend d JOIN pg_proc p ON p.oid = d.objid JOIN pg_extension e ON e.oid = d.refobjid
            WHERE d.classid = 'pg_proc'::regclass AND d.deptype = 'e' AND e.extname = 'vod_tender_crypto'""").fetchall()
    assert {name for name, open_to_all, _, _ in rows if open_to_all} == public
    volatility = {name: kind for name, _, kind, _ in rows}
    assert volatility["envelope_encrypt"] == "v" and volatility["envelope_decrypt"] == "s"
    assert volatility["is_envelope"] == "i"
    assert not any(leakproof for _, _, _, leakproof in rows)


def test_shadowing_objects_see_nothing(cluster):
    """Functions, operators and tables of the caller's, first on its search path, are not what administration uses."""
    with cluster.connect() as connection:
        connection.execute("""
            CREATE SCHEMA evil;
            CREATE TABLE evil.seen (what text);
            CREATE FUNCTION evil.note(a text, b text) RETURNS boolean LANGUAGE plpgsql AS
                $$ BEGIN INSERT INTO evil.seen VALUES (a || b); RETURN true; END $$;
            CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.note);
            CREATE FUNCTION evil.format(text, text) RETURNS text LANGUAGE plpgsql AS
                $$ BEGIN INSERT INTO evil.seen VALUES ($1); RETURN $1; END $$;
            CREATE FUNCTION evil.check_key(text, text, jsonb) RETURNS boolean LANGUAGE sql AS 'SELECT true';
            CREATE TEMP TABLE kek (name text, uri text, context jsonb, state text);
            INSERT INTO kek VALUES ('default', 'local:///forged', '{}', 'active');
            SET search_path = evil, pg_temp, public, pg_catalog""")
        path = add_local_key(cluster, connection, "default")
        connection.execute("SELECT vod_tender_crypto.set_key_state('default', 'decrypt_only')")
        connection.execute("SELECT vod_tender_crypto.set_key_state('default', 'active')")
        value = one(connection, "SELECT envelope_encrypt('token', aad => 'row')")
        assert one(connection, "SELECT envelope_decrypt(%s, aad => 'row')", value) == "token"
        with fails(UNKNOWN_KEY):
            connection.execute("SELECT vod_tender_crypto.drop_key('nope')")
        rows = connection.execute("SELECT name, uri FROM vod_tender_crypto.kek").fetchall()
        assert rows == [("default", f"local://{path}")]
        assert one(connection, "SELECT count(*) FROM evil.seen") == 0


# -- dump and restore --------------------------------------------------------------------------------------------


def test_dump_and_restore_keep_every_byte_and_the_keys(cluster, kms):
    with cluster.connect() as connection:
        add_local_key(cluster, connection, "file", '{"tenant": "a"}')
        connection.execute("SELECT vod_tender_crypto.add_key('aws', %s)", [kms.kek_uri()])
        connection.execute("SELECT vod_tender_crypto.add_key('old', 'local:///gone')")
        connection.execute("SELECT vod_tender_crypto.set_key_state('old', 'decrypt_only')")
        connection.execute("""
            CREATE TABLE t (id int PRIMARY KEY, v text CHECK (is_envelope(v)), b bytea CHECK (is_envelope(b)));
            INSERT INTO t SELECT g, envelope_encrypt('v' || g, key => CASE g % 2 WHEN 0 THEN 'file' ELSE 'aws' END),
                                 envelope_encrypt(('b' || g)::bytea, key => 'file') FROM generate_series(1, 100) g""")
        keys = connection.execute("TABLE vod_tender_crypto.kek").fetchall()
        rows = connection.execute("TABLE t").fetchall()
    dump = cluster.pg_dump()
    restored = cluster.name + "_restored"
    cluster.cluster.createdb(restored)
    try:
        cluster.cluster.psql(dump, dbname=restored)
        with cluster.cluster.connect(restored) as connection:
            assert connection.execute("TABLE vod_tender_crypto.kek").fetchall() == keys and len(keys) == 3
            assert connection.execute("TABLE t").fetchall() == rows
            assert one(connection, """SELECT count(*) FROM t WHERE envelope_decrypt(v) = 'v' || id
                                      AND envelope_decrypt(b) = ('b' || id)::bytea""") == 100
            assert not one(connection, "SELECT has_function_privilege('public', "
                                       "'envelope_decrypt(text, text, jsonb, int)', 'EXECUTE')")
    finally:
        cluster.cluster.dropdb(restored)


def test_the_extension_in_another_schema(bare_database, extension):
    with bare_database.connect() as connection:
        connection.execute("CREATE SCHEMA crypto")
        connection.execute(f"CREATE EXTENSION {extension} SCHEMA crypto")
        add_local_key(bare_database, connection, "default")
        value = one(connection, "SELECT crypto.envelope_encrypt('token')")
        assert one(connection, "SELECT crypto.envelope_decrypt(%s)", value) == "token"
        with fails("0A000"):
            connection.execute(f"ALTER EXTENSION {extension} SET SCHEMA public")
        connection.execute(f"DROP EXTENSION {extension}")
        assert one(connection, "SELECT to_regnamespace('vod_tender_crypto') IS NULL")
        connection.execute(f"CREATE EXTENSION {extension}")
        with fails(NOT_READY):
            one(connection, "SELECT envelope_encrypt('token')")
