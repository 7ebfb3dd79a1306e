"""Attacks through settings: what chooses keys, files, formats and the audit is a superuser's to set, by whatever way, also
before the library is loaded and PostgreSQL knows of no such setting (42501, or a value that is dropped on loading)."""

from __future__ import annotations

import psycopg
import pytest

from helpers import one
from roles import ALL, decrypted, encrypted
from sqlstate import INVALID_PARAMETER, NO_RIGHT, fails

# What an attacker would like them to be; none is the default.
WANTED = {
    "default_key": "mine",
    "encryption_context": "{}",
    "legacy_key_file": "/tmp/mine",
    "write_format": "direct",
    "plaintext_reads": "allow",
    "audit": "table",
    "audit_required": "on",
    "audit_queue_limit": "2GB",
    "dek_max_uses": "2147483647",
    "dek_max_age": "86400s",
    "dek_max_bytes": "1TB",
    "dek_cache_entries": "1000000",
}
# There is no setting for these: a KEK's URI and the server's environment say them.
UNKNOWN = ["endpoint", "region", "key_file", "legacy_key", "kms_key_id"]
LOAD = "SELECT envelope_version('')"


@pytest.fixture
def values(database):
    """What the settings are for everybody in this database."""
    with database.connect() as admin:
        admin.execute(LOAD)
        return current(admin)


@pytest.fixture
def role(people):
    """An ordinary role that may use the key named default."""
    return people.may("default", *ALL, what="tuner")


def current(connection) -> "dict[str, str]":
    """The settings as the session has them; legacy_key_file is shown to superusers only, and tells by what it does."""
    return {name: one(connection, f"SELECT current_setting('vod_tender_crypto.{name}')")
            for name in WANTED if name != "legacy_key_file"}


def untouched(connection, values) -> None:
    """Every setting is the administrator's, seen in what it says and in what it does."""
    connection.execute(LOAD)
    assert current(connection) == values
    with fails(INVALID_PARAMETER):
        decrypted(connection, "plaintext")
    value = encrypted(connection)
    assert one(connection, "SELECT envelope_info(%s)->>'key'", value) == "default"
    assert decrypted(connection, value) == "token"


def settings() -> "list[tuple[str, str]]":
    """Full names and wanted values."""
    return [(f"vod_tender_crypto.{name}", value) for name, value in WANTED.items()]


def test_setting_them(database, role, values):
    """From: every privilege on a key. Tries: SET, SET LOCAL and set_config(). Ends in: 42501."""
    with database.connect(role) as user:
        user.execute(LOAD)
        for name, value in settings():
            for statement in (f"SET {name} = '{value}'", f"SELECT set_config('{name}', '{value}', false)",
                              f"BEGIN; SET LOCAL {name} = '{value}'",
                              f"UPDATE pg_settings SET setting = '{value}' WHERE name = '{name}'"):
                if statement.startswith("UPDATE") and name.endswith("legacy_key_file"):
                    continue  # a row that only superusers see
                with fails(NO_RIGHT, "permission denied to set parameter"):
                    user.execute(statement)
                user.execute("ROLLBACK")
        untouched(user, values)


def test_settings_that_do_not_exist(database, role, values):
    """From: the same. Tries: settings for an endpoint, a region, a key or its file. Ends in: an error where the library is
    loaded; before, in a placeholder that nobody reads and that loading removes."""
    with database.connect(role) as user:
        for name in UNKNOWN:
            user.execute(f"SET vod_tender_crypto.{name} = 'http://127.0.0.1:1'")
        untouched(user, values)
        for name in UNKNOWN:
            with fails("42704"):
                one(user, f"SELECT current_setting('vod_tender_crypto.{name}')")
            with pytest.raises(psycopg.Error):
                user.execute(f"SET vod_tender_crypto.{name} = 'http://127.0.0.1:1'")


@pytest.mark.parametrize("how", ["SET", "set_config", "in a transaction", "in savepoints"])
def test_setting_them_before_the_library_is_loaded(database, role, values, how):
    """From: the same, in a fresh session. Tries: placeholders of the settings' names, which everybody may set. Ends in: the
    administrator's values once the library is loaded, with a warning, also after the transaction's end."""
    with database.connect(role) as user:
        if how.startswith("in"):
            user.execute("BEGIN")
        for name, value in settings():
            if how == "set_config":
                one(user, "SELECT set_config(%s, %s, false)", name, value)
            elif how == "in savepoints":
                user.execute(f"SET LOCAL {name} = 'x'; SAVEPOINT s; SET {name} = '{value}'; SAVEPOINT t; SET LOCAL {name} = 'y'")
                user.execute("ROLLBACK TO t")
            else:
                user.execute(f"SET {name} = '{value}'")
            assert one(user, f"SELECT current_setting('{name}')") == value
        if how.startswith("in"):
            user.execute(LOAD)
            assert current(user) == values
            user.execute("COMMIT")
        untouched(user, values)
        user.execute("DISCARD ALL")
        untouched(user, values)


def test_placeholders_when_a_superusers_function_loads_the_library(database, people, role, values):
    """From: EXECUTE on a SECURITY DEFINER function of a superuser's. Tries: having it load the library, so that the
    placeholders are taken over with the superuser's rights. Ends in: the administrator's values."""
    people.admin(f"""
        CREATE FUNCTION load_it() RETURNS int LANGUAGE sql SECURITY DEFINER SET search_path = public, pg_temp
            AS 'SELECT envelope_version('''')';
        GRANT EXECUTE ON FUNCTION load_it() TO {role}""")
    with database.connect(role) as user:
        for name, value in settings():
            user.execute(f"SET {name} = '{value}'")
        assert one(user, "SELECT load_it()") == 0
        untouched(user, values)


def test_placeholders_when_one_becomes_somebody_else(database, people, values):
    """From: SET ROLE to a superuser's role after the placeholders were set without it. Tries: loading the library as a
    superuser. Ends in: the administrator's values; a superuser who sets them means it."""
    root = people.make("root", "NOLOGIN SUPERUSER")
    login = people.make("login", f"LOGIN NOINHERIT IN ROLE {root}")
    with database.connect(login) as user:
        for name, value in settings():
            user.execute(f"SET {name} = '{value}'")
        user.execute(f"SET ROLE {root}")
        untouched(user, values)
        user.execute("SET vod_tender_crypto.plaintext_reads = 'allow'")
        assert decrypted(user, "plaintext") == "plaintext"


def test_options_at_connect(database, role, values):
    """From: the connection's options (PGOPTIONS). Tries: all of the settings. Ends in: the administrator's values."""
    options = " ".join(f"-c {name}={value}" for name, value in settings())
    with database.connect(role, options=options) as user:
        untouched(user, values)


def test_options_at_connect_to_a_server_that_has_the_library_loaded(make_cluster, extension):
    """From: the same, under shared_preload_libraries. Tries: each of the settings. Ends in: no connection (42501)."""
    own = make_cluster({"shared_preload_libraries": extension})
    own.psql("CREATE ROLE tuner LOGIN")
    own.connect(user="tuner").close()
    for name, value in settings():
        own.connect(options=f"-c {name}={value}").close()
        with pytest.raises(psycopg.OperationalError, match="permission denied to set parameter"):
            own.connect(user="tuner", options=f"-c {name}={value}")


@pytest.mark.parametrize("loaded", [False, True], ids=["before it is loaded", "loaded"])
def test_keeping_them_for_later(database, people, role, values, loaded):
    """From: being the role, owning the database, owning a function. Tries: ALTER ROLE, ALTER DATABASE and a function's SET
    clause, which others' sessions would take over. Ends in: 42501."""
    people.admin(f"ALTER DATABASE {database.name} OWNER TO {role}")
    try:
        with database.connect(role) as user:
            user.execute(f"CREATE SCHEMA {role}")
            user.execute(f"CREATE FUNCTION {role}.f() RETURNS int LANGUAGE sql AS 'SELECT 1'")
            if loaded:
                user.execute(LOAD)
            for name, value in settings():
                for statement in (f"ALTER ROLE {role} SET {name} = '{value}'",
                                  f"ALTER ROLE {role} IN DATABASE {database.name} SET {name} = '{value}'",
                                  f"ALTER DATABASE {database.name} SET {name} = '{value}'",
                                  f"ALTER FUNCTION {role}.f() SET {name} = '{value}'",
                                  f"ALTER ROLE ALL SET {name} = '{value}'", f"ALTER SYSTEM SET {name} = '{value}'"):
                    with fails(NO_RIGHT):
                        user.execute(statement)
            with fails(NO_RIGHT):
                user.execute(f"CREATE FUNCTION {role}.g() RETURNS text LANGUAGE sql SET vod_tender_crypto.plaintext_reads = "
                             "'allow' AS $$ SELECT envelope_decrypt('plaintext') $$")
            untouched(user, values)
        with database.connect(role) as user:
            untouched(user, values)
    finally:
        people.admin(f"ALTER DATABASE {database.name} OWNER TO postgres; DROP SCHEMA {role} CASCADE")


def test_loading_the_library_oneself(database, role):
    """From: a login. Tries: LOAD, and functions of one's own in the library. Ends in: 42501."""
    with database.connect(role) as user:
        with fails(NO_RIGHT):
            user.execute("LOAD 'vod_tender_crypto'")
        with fails(NO_RIGHT):
            user.execute("CREATE FUNCTION pg_temp.f(text) RETURNS text LANGUAGE c AS "
                         "'$libdir/vod_tender_crypto', 'envelope_decrypt_text_wrapper'")


def test_settings_that_are_everybodys_only_bound_the_wait(database, role):
    """From: a login. Tries: the settings that everybody may set. Ends in: nothing but one's own wait; the list is short."""
    with database.connect(role) as user:
        user.execute(LOAD)
        names = user.execute("SELECT name FROM pg_settings WHERE name LIKE 'vod\\_tender\\_crypto.%' AND context = 'user'")
        assert {name.removeprefix("vod_tender_crypto.") for name, in names} == {
            "kms_connect_timeout", "kms_attempt_timeout", "kms_timeout", "kms_max_attempts", "kms_concurrency",
            "kms_retry_backoff"}
        others = {name.removeprefix("vod_tender_crypto.") for name, in user.execute(
            "SELECT name FROM pg_settings WHERE name LIKE 'vod\\_tender\\_crypto.%' AND context <> 'user'")}
        assert others == set(WANTED) - {"legacy_key_file"}, "legacy_key_file is not shown; a new setting belongs in WANTED"
