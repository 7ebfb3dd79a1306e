"""doctor(): nothing on a cluster that is set up as the README says; each seeded fault is found, and only that."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource

import psycopg
import pytest

from cluster import Cluster, Database, extension_available
from dead_ends import closed_port
from helpers import add_local_key, new_key, one
from skips import cannot_run
from sqlstate import NO_RIGHT, fails

SECRET = "ya29.A-TOKEN-THAT-NO-FINDING-MAY-SHOW"

# README, "Set up".
SET_UP = {
    "log_statement": "none",
    "log_min_duration_statement": "-1",
    "log_parameter_max_length": "0",
    "log_parameter_max_length_on_error": "0",
    "max_worker_processes": "10",
    "vod_tender_crypto.audit": "table",
    "vod_tender_crypto.audit_required": "on",
}

_numbers = itertools.count(1)


@contextlib.contextmanager
def limits(core: int = 0, memlock: "int | None" = None):
    """What starts in this block has these limits: the server inherits them, and its backends from it."""
    wanted = {resource.RLIMIT_CORE: core}
    if memlock is not None:
        wanted[resource.RLIMIT_MEMLOCK] = memlock
    before = {what: resource.getrlimit(what) for what in wanted}
    for what, soft in wanted.items():
        hard = before[what][1]
        if hard != resource.RLIM_INFINITY and soft > hard:
            cannot_run(f"this user's limits do not allow {soft} bytes")
    try:
        for what, soft in wanted.items():
            resource.setrlimit(what, (soft, before[what][1]))
        yield
    finally:
        for what, limit in before.items():
            resource.setrlimit(what, limit)


def findings(session, scan: bool = True) -> "list[tuple[str, str, str]]":
    """(severity, finding, subject) of all that the doctor finds."""
    rows = session.execute("SELECT * FROM vod_tender_crypto.doctor(%s)", [scan]).fetchall()
    assert all(all(row) for row in rows), "every finding says what, where, what it saw and what to do"
    assert SECRET not in str(rows)
    return [row[:3] for row in rows]


def saw(session, finding: str) -> str:
    """What the doctor saw of one finding."""
    return one(session, "SELECT saw FROM vod_tender_crypto.doctor() WHERE finding = %s", finding)


def set_up(database, role: str) -> None:
    """A KEK in a file, a role that may encrypt and decrypt, and a table that was migrated."""
    with database.connect() as admin:
        admin.execute("CREATE EXTENSION vod_tender_crypto")
        path = database.server_file("default.b64", new_key() + "\n")
        admin.execute("SELECT vod_tender_crypto.add_key('default', %s)", [f"local://{path}"])
        admin.execute(f"""
            SELECT vod_tender_crypto.grant_key('default', '{role}', ARRAY['encrypt', 'decrypt']);
            CREATE TABLE tokens (id text PRIMARY KEY, token text);
            GRANT SELECT, INSERT ON tokens TO {role};
            INSERT INTO tokens VALUES (1, '{SECRET}'), (2, 'b')""")
        migrate(admin)


def migrate(session, table: str = "tokens") -> None:
    """Encrypts the table's tokens, which are plaintext."""
    psycopg.ClientCursor(session).execute(
        f"CALL vod_tender_crypto.migrate('{table}', ARRAY['token'], aad => 'id', version => '0')")


@pytest.fixture(scope="module")
def well(_neutral_environment):
    """A cluster set up as the README says."""
    if not extension_available("vod_tender_crypto"):
        cannot_run("the extension vod_tender_crypto is not installed in this PostgreSQL (cargo pgrx install)")
    with limits(), Cluster(SET_UP) as running:
        yield running


@pytest.fixture
def app(well):
    """A role that may encrypt and decrypt in `db`."""
    name = f"app_{next(_numbers)}"
    with well.connect() as admin:
        admin.execute(f"CREATE ROLE {name} LOGIN")
    yield name
    with well.connect() as admin:
        admin.execute(f"DROP ROLE {name}")


@pytest.fixture
def db(well, app):
    """A database that the doctor finds nothing in."""
    database = Database(well, f"doctor_{next(_numbers)}")
    well.createdb(database.name)
    try:
        set_up(database, app)
        yield database
    finally:
        well.dropdb(database.name)


@pytest.fixture(scope="module")
def quiet(well):
    """Such a database for tests that change nothing in it but its settings."""
    database = Database(well, "quiet")
    well.createdb(database.name)
    with database.connect() as admin:
        admin.execute("CREATE ROLE quiet LOGIN")
    set_up(database, "quiet")
    return database


@pytest.fixture
def setting_session(quiet):
    """A superuser's session in it; the database's settings go with the test."""
    with quiet.connect() as connection:
        assert findings(connection) == []
        yield connection
        connection.execute(f"ALTER DATABASE {quiet.name} RESET ALL")


@pytest.fixture
def session(db):
    """A superuser's session in it."""
    with db.connect() as connection:
        assert findings(connection) == []
        yield connection


@contextlib.contextmanager
def own_set_up(make_cluster, settings=None, environment=None, **given):
    """A session in a cluster of the test's own, set up as `db` is."""
    with limits(**given):
        own = make_cluster({**SET_UP, **(settings or {})}, environment)
    database = Database(own, "postgres")
    with database.connect() as connection:
        connection.execute("CREATE ROLE app LOGIN")
        set_up(database, "app")
        yield own, connection


def test_nothing_is_found_where_all_is_well(db, app):
    with db.connect() as admin, db.connect(user=app) as user:
        value = one(user, "SELECT envelope_encrypt(%s, aad => '3')", SECRET)
        user.execute("INSERT INTO tokens VALUES (3, %s)", [value])
        assert findings(admin) == []
        assert findings(admin, scan=False) == []
        with fails(NO_RIGHT):
            user.execute("SELECT * FROM vod_tender_crypto.doctor()")


# -- settings ----------------------------------------------------------------------------------------------------


WITH_BINDS = {"log_parameter_max_length": "-1"}
LOGGING = [
    ({"log_statement": "all"}, "warning", "statement_logging"),
    ({"log_statement": "mod", **WITH_BINDS}, "critical", "statement_logging"),
    ({"log_min_duration_statement": "0"}, "warning", "duration_logging"),
    ({"log_min_duration_statement": "1s", **WITH_BINDS}, "critical", "duration_logging"),
    ({"log_min_duration_sample": "10ms"}, "warning", "duration_sampling"),
    ({"log_min_duration_sample": "10ms", **WITH_BINDS}, "critical", "duration_sampling"),
    ({"log_transaction_sample_rate": "0.01"}, "warning", "transaction_sampling"),
    ({"log_transaction_sample_rate": "0.01", **WITH_BINDS}, "critical", "transaction_sampling"),
    ({"log_parameter_max_length_on_error": "-1"}, "critical", "error_parameter_logging"),
    ({"log_min_error_statement": "notice"}, "warning", "error_statement_logging"),
    ({"log_min_messages": "debug2"}, "warning", "debug_messages"),
    ({"debug_print_parse": "on"}, "warning", "plan_printing"),
    ({"debug_print_rewritten": "on"}, "warning", "plan_printing"),
    ({"debug_print_plan": "on"}, "critical", "plan_printing"),
    ({"auto_explain.log_min_duration": "0", "auto_explain.log_parameter_max_length": "0"}, "warning", "auto_explain"),
    ({"auto_explain.log_min_duration": "0", "auto_explain.log_parameter_max_length": "-1"}, "critical", "auto_explain"),
    ({"auto_explain.log_min_duration": "0", "auto_explain.log_parameter_max_length": "0",
      "auto_explain.log_verbose": "on"}, "critical", "auto_explain"),
    ({"pgaudit.log": "ddl, write"}, "warning", "pgaudit"),
    ({"pgaudit.log": "all, -ddl", "pgaudit.log_parameter": "on"}, "critical", "pgaudit"),
]
LOGGING_NAMES = [f"{finding}-{severity}-{number}" for number, (_, severity, finding) in enumerate(LOGGING)]


@pytest.mark.parametrize("settings, severity, finding", LOGGING, ids=LOGGING_NAMES)
def test_logging_that_a_database_is_set_to(quiet, setting_session, settings, severity, finding):
    for name, value in settings.items():
        setting_session.execute(f"ALTER DATABASE {quiet.name} SET {name} = '{value}'")
    expected = [(severity, finding, f"{next(iter(settings))} (database {quiet.name})")]
    assert findings(setting_session) == expected
    with quiet.connect() as later:
        assert findings(later) == expected, "and once only where it holds for the doctor's session too"


@pytest.mark.parametrize("settings, severity, finding", LOGGING, ids=LOGGING_NAMES)
def test_logging_that_the_session_is_set_to(setting_session, settings, severity, finding):
    for name, value in settings.items():
        setting_session.execute(f"SET {name} = '{value}'")
    assert findings(setting_session) == [(severity, finding, f"{next(iter(settings))} (this session)")]


@pytest.mark.parametrize("settings", [
    {"log_statement": "ddl"},
    {"log_min_duration_statement": "-1"},
    {"log_min_duration_sample": "0", "log_statement_sample_rate": "0"},
    {"log_parameter_max_length": "-1"},
    {"log_min_error_statement": "error"},
    {"log_min_messages": "debug1"},
    {"auto_explain.log_min_duration": "-1", "auto_explain.log_parameter_max_length": "-1"},
    {"auto_explain.log_min_duration": "0", "auto_explain.sample_rate": "0"},
    {"pgaudit.log": "all, -read, -write, -function"},
    {"pgaudit.log": "ddl, role", "pgaudit.log_parameter": "on"},
    {"pgaudit.log": "all", "pgaudit.log_statement": "off"},
])
def test_logging_that_shows_no_value(setting_session, settings):
    for name, value in settings.items():
        setting_session.execute(f"SET {name} = '{value}'")
    assert findings(setting_session) == []


def test_settings_of_a_role_and_of_a_role_in_a_database(db, session, app):
    session.execute(f"ALTER ROLE {app} SET log_statement = 'all'")
    session.execute(f"ALTER ROLE {app} IN DATABASE {db.name} SET log_parameter_max_length_on_error = 10")
    session.execute("ALTER DATABASE postgres SET log_statement = 'all'")
    try:
        assert findings(session) == [
            ("critical", "error_parameter_logging", f"log_parameter_max_length_on_error (role {app} in database {db.name})"),
            ("warning", "statement_logging", f"log_statement (role {app})")]
    finally:
        session.execute("ALTER DATABASE postgres RESET log_statement")


def test_a_role_that_prints_parameters_where_the_server_logs_statements(make_cluster, extension):
    with own_set_up(make_cluster, {"log_statement": "mod"}) as (_, session):
        session.execute("ALTER ROLE app SET log_parameter_max_length = -1")
        session.execute("ALTER ROLE postgres SET log_statement = 'none'")
        expected = [("critical", "statement_logging", "log_statement (role app)"),
                    ("warning", "statement_logging", "log_statement")]
        assert findings(session) == expected
        with psycopg.connect(session.info.dsn) as quieter:
            assert one(quieter, "SHOW log_statement") == "none"
            assert findings(quieter) == expected, "the server's own value, whatever the doctor's role has"


def test_what_the_server_is_set_to(make_cluster, extension):
    """From the files, also for libraries that are not loaded."""
    noisy = {"log_statement": "mod", "log_min_duration_statement": "5s", "auto_explain.log_min_duration": "1s",
             "auto_explain.log_verbose": "on", "pgaudit.log": "read", "vod_tender_crypto.plaintext_reads": "warn",
             "vod_tender_crypto.write_format": "direct", "log_parameter_max_length": "-1"}
    with own_set_up(make_cluster) as (own, session):
        own.settings.update(noisy)
        with limits():
            own.restart()
        with own.connect() as connection:
            assert findings(connection) == [
                ("critical", "auto_explain", "auto_explain.log_min_duration"),
                ("critical", "duration_logging", "log_min_duration_statement"),
                ("critical", "statement_logging", "log_statement"),
                ("warning", "pgaudit", "pgaudit.log"),
                ("warning", "plaintext_reads", "vod_tender_crypto.plaintext_reads"),
                ("warning", "write_format_direct", "vod_tender_crypto.write_format")]


def test_the_environment_in_the_log(make_cluster, extension):
    key = new_key()
    with own_set_up(make_cluster) as (own, _):
        for environment, severity in [({}, "warning"), ({"AWS_SECRET_ACCESS_KEY": key}, "critical")]:
            own.settings["log_min_messages"] = "debug3"
            own.environment.update(environment)
            with limits():
                own.restart()
            with own.connect() as session:
                assert findings(session) == [(severity, "environment_logging", "log_min_messages")]
                assert key not in saw(session, "environment_logging")
        assert key in own.log_text(), "and that is where it stands"


def test_auto_explain_that_is_loaded(session):
    try:
        session.execute("LOAD 'auto_explain'")
    except psycopg.errors.UndefinedFile:
        cannot_run("this PostgreSQL has no auto_explain")
    assert findings(session) == []
    session.execute("SET auto_explain.log_min_duration = 0")
    session.execute("SET auto_explain.log_verbose = on")
    assert findings(session) == [("critical", "auto_explain", "auto_explain.log_min_duration (this session)")]


def test_literals_in_pg_stat_statements(make_cluster, extension):
    """Utility statements are kept as they are, others with parameters in the place of their literals."""
    if not extension_available("pg_stat_statements"):
        cannot_run("this PostgreSQL has no pg_stat_statements")
    with own_set_up(make_cluster, {"shared_preload_libraries": "pg_stat_statements"}) as (_, session):
        session.execute("CREATE SCHEMA stats; CREATE EXTENSION pg_stat_statements SCHEMA stats")
        for number, (call, kept) in enumerate([
            (f"public.envelope_encrypt('{SECRET}')", True),
            (f'"envelope_encrypt" ( E\'{SECRET}\')', True),
            (f"envelope_encrypt(aad => 'x', plaintext => $a${SECRET}$a$)", True),
            (f"envelope_encrypt(bytea '{SECRET}', key => 'default')", True),
            (f"envelope_upgrade(CAST ('{SECRET}' AS text), version => 0)", True),
            (f"envelope_encrypt((('{SECRET}'))::text)", True),
            ("envelope_encrypt(token, 'default', aad => 'x')", False),
            ("envelope_decrypt(token, context => '{}')", False),
        ]):
            session.execute("SELECT stats.pg_stat_statements_reset()")
            session.execute(f"CREATE TABLE kept_{number} AS SELECT {call} AS v FROM tokens WITH NO DATA")
            session.execute(f"SELECT {call} AS v FROM tokens LIMIT 0")
            assert findings(session, scan=False) == [("critical", "statement_kept", "pg_stat_statements")] * kept, call
            if kept:
                assert saw(session, "statement_kept").startswith("1 ")


# -- the server process ------------------------------------------------------------------------------------------


def test_core_dumps(make_cluster, extension):
    with own_set_up(make_cluster, core=4096) as (_, session):
        assert findings(session) == [("warning", "core_dumps", "RLIMIT_CORE")]


def test_too_little_memory_may_be_locked(make_cluster, extension):
    found = [("warning", "locked_memory", "RLIMIT_MEMLOCK")]
    with own_set_up(make_cluster, memlock=512 * 1024) as (_, session):
        assert findings(session) == found, "the default number of keys needs more"
        session.execute("SET vod_tender_crypto.dek_cache_entries = 100")
        assert findings(session) == []


def test_connections_without_ssl(make_cluster, extension):
    with closed_port() as port:
        listening = {"listen_addresses": "localhost, 0.0.0.0", "port": port}
        own = Cluster({**SET_UP, **listening})
    try:
        with limits():
            own.start()
        with psycopg.connect(host=str(own.root), port=port, user="postgres", autocommit=True) as session:
            session.execute("CREATE EXTENSION vod_tender_crypto")
            assert findings(session) == [("warning", "unencrypted_connections", "ssl")]
    finally:
        own.close()


# -- keys --------------------------------------------------------------------------------------------------------


def rewrite(path: str, content: str, mode: int = 0o600) -> None:
    """Another content and mode for a file, whose owner stays."""
    with open(path, "w", encoding="ascii") as file:
        file.write(content)
    os.chmod(path, mode)


FILE_FAULTS = {
    "key_file_missing": os.unlink,
    "key_file_exposed": lambda path: os.chmod(path, 0o640),
    "key_file_owner": lambda path: os.chown(path, 1, 1),
    "key_file_unusable": lambda path: rewrite(path, SECRET),
    "key_directory_open": lambda path: os.chmod(os.path.dirname(path), 0o777),
}


@pytest.mark.parametrize("finding", FILE_FAULTS)
def test_key_files(db, session, finding):
    path = one(session, "SELECT substr(uri, 9) FROM vod_tender_crypto.kek")
    if finding == "key_file_owner" and os.geteuid() != 0:
        cannot_run("this user may not give files away")
    FILE_FAULTS[finding](path)
    assert findings(session) == [("critical", finding, 'key "default"')]


@pytest.mark.parametrize("finding", FILE_FAULTS)
def test_the_legacy_key_file(db, session, finding):
    if finding == "key_file_owner" and os.geteuid() != 0:
        cannot_run("this user may not give files away")
    path = db.server_file("legacy/keys.b64", new_key() + "\n" + new_key() + "\n")
    session.execute(f"ALTER DATABASE {db.name} SET vod_tender_crypto.legacy_key_file = '{path}'")
    assert findings(session) == []
    FILE_FAULTS[finding](path)
    with db.connect() as later:
        for scan in [False, True]:
            found = findings(later, scan)
            assert found[0] == ("critical", finding, f"vod_tender_crypto.legacy_key_file (database {db.name})")
            # Without the legacy key that is configured nothing can be told to be plaintext, so nothing is counted.
            assert [row[1] for row in found[1:]] in [[], ["not_looked_at"]]
        assert findings(later, scan=False) == found[:1]


def test_a_key_in_the_place_of_a_file_name_is_not_shown(db, session):
    session.execute(f"ALTER DATABASE {db.name} SET vod_tender_crypto.legacy_key_file = '{SECRET}'")
    with db.connect() as later:
        assert ("critical", "key_file_missing", f"vod_tender_crypto.legacy_key_file (database {db.name})") in findings(later)


def test_the_file_of_a_disabled_key_may_be_gone_but_not_open(db, session):
    path = add_local_key(db, session, "old", default=False)
    session.execute("SELECT vod_tender_crypto.set_key_state('old', 'disabled')")
    os.chmod(path, 0o644)
    assert findings(session) == [("critical", "key_file_exposed", 'key "old"')]
    os.unlink(path)
    assert findings(session) == []


def test_the_environments_legacy_key(make_cluster, extension):
    with own_set_up(make_cluster, environment={"ENCRYPTION_KEY": new_key()}) as (own, session):
        unneeded = ("warning", "legacy_key_unneeded", "ENCRYPTION_KEY")
        assert findings(session) == [unneeded]
        assert findings(session, scan=False) == []
        path = own.server_file("keys/legacy.b64", new_key())
        session.execute(f"SET vod_tender_crypto.legacy_key_file = '{path}'")
        assert findings(session) == [unneeded, ("notice", "legacy_key_twice", "ENCRYPTION_KEY")]
        session.execute("RESET vod_tender_crypto.legacy_key_file")
        session.execute("SET vod_tender_crypto.write_format = 'direct'")
        session.execute("CREATE TABLE direct AS SELECT envelope_encrypt('x') AS v")
        assert findings(session) == [("warning", "write_format_direct", "vod_tender_crypto.write_format (this session)")]
        session.execute("RESET vod_tender_crypto.write_format")
        assert findings(session) == [], "a value needs it"


def test_a_key_in_the_environment_that_cannot_be_used(make_cluster, extension):
    with limits():
        own = make_cluster(SET_UP, {"ENCRYPTION_KEY": SECRET, "KMS_KEY_ID": "nope:///x"})
    with own.connect() as session:
        session.execute("CREATE EXTENSION vod_tender_crypto")
        assert findings(session, scan=False) == [("critical", "key_unusable", "ENCRYPTION_KEY"),
                                                 ("critical", "key_unusable", "KMS_KEY_ID")]


# -- rights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grant, subject", [
    ("GRANT EXECUTE ON FUNCTION envelope_decrypt(text, text, jsonb, integer) TO PUBLIC",
     "public.envelope_decrypt(text,text,jsonb,integer)"),
    ("GRANT EXECUTE ON FUNCTION rewrap(bytea, text) TO PUBLIC", "public.rewrap(bytea,text)"),
    ("UPDATE pg_proc SET proacl = NULL WHERE oid = 'envelope_encrypt(text, text, jsonb, text)'::regprocedure",
     "public.envelope_encrypt(text,text,jsonb,text)"),
    ("GRANT EXECUTE ON FUNCTION vod_tender_crypto.set_key_state(text, text) TO PUBLIC",
     "vod_tender_crypto.set_key_state(text,text)"),
    ("CREATE FUNCTION vod_tender_crypto.more() RETURNS int LANGUAGE sql RETURN 1", "vod_tender_crypto.more()"),
])
def test_execute_for_public(session, grant, subject):
    session.execute(grant)
    assert findings(session) == [("critical", "public_execute", subject)]


@pytest.mark.parametrize("grant, severity, subject", [
    ("GRANT SELECT ON vod_tender_crypto.kek TO PUBLIC", "warning", "vod_tender_crypto.kek"),
    ("GRANT SELECT, INSERT ON vod_tender_crypto.protected_column TO PUBLIC", "critical", "vod_tender_crypto.protected_column"),
    ("GRANT UPDATE (uri) ON vod_tender_crypto.kek TO PUBLIC", "critical", "vod_tender_crypto.kek"),
])
def test_tables_for_public(session, grant, severity, subject):
    session.execute(grant)
    assert findings(session) == [(severity, "public_table", subject)]


# -- views and functions -----------------------------------------------------------------------------------------


SEEN = "SELECT id, envelope_decrypt(token, aad => id::text) AS token FROM tokens"
WRAPPER = "CREATE FUNCTION opened(value text) RETURNS text LANGUAGE {language} STABLE {rights} {body}"
ATOMIC = {"language": "sql", "body": "RETURN envelope_decrypt(value)"}
QUOTED = {"language": "plpgsql", "body": "AS 'BEGIN RETURN envelope_decrypt(value); END'"}


@pytest.mark.parametrize("statements, found", [
    ([f"CREATE VIEW seen AS {SEEN}"], [("warning", "view_without_barrier", "public.seen")]),
    ([f"CREATE VIEW seen WITH (security_barrier) AS {SEEN}"], []),
    ([f"CREATE VIEW seen WITH (security_barrier = off) AS {SEEN}"], [("warning", "view_without_barrier", "public.seen")]),
    ([WRAPPER.format(**QUOTED, rights=""), "CREATE VIEW seen AS SELECT opened(token) FROM tokens"],
     [("warning", "view_without_barrier", "public.seen")]),
    ([f"CREATE MATERIALIZED VIEW stored AS {SEEN} WITH NO DATA", "REFRESH MATERIALIZED VIEW stored"],
     [("critical", "plaintext_stored", "public.stored")]),
    (["CREATE VIEW encrypted AS SELECT envelope_version(token), envelope_info(token) FROM tokens"], []),
    ([WRAPPER.format(**ATOMIC, rights="SECURITY DEFINER")], [("critical", "definer_decrypts", "public.opened(text)")]),
    ([WRAPPER.format(**QUOTED, rights="SECURITY DEFINER")], [("critical", "definer_decrypts", "public.opened(text)")]),
    ([WRAPPER.format(**QUOTED, rights="")], []),
    ([WRAPPER.format(**ATOMIC, rights="SECURITY DEFINER"), "REVOKE EXECUTE ON FUNCTION opened FROM PUBLIC"], []),
])
def test_views_and_functions_that_decrypt(session, statements, found):
    for statement in statements:
        session.execute(statement)
    assert findings(session) == found


ANY = "LANGUAGE sql AS 'SELECT NULL::text'"
SAME = f"envelope_encrypt(plaintext text, key text, context jsonb, aad text) RETURNS text {ANY}"
BETTER = f"envelope_encrypt(plaintext varchar) RETURNS text {ANY}"


@pytest.mark.parametrize("shadow, path, severity", [
    (SAME, "other, public", "critical"),
    (SAME, '"$user", OTHER', "critical"),
    (SAME, "public, other", "warning"),
    (BETTER, "public, other", "critical"),
    (SAME, "public, othe, r", None),
])
def test_functions_in_the_way(db, session, app, shadow, path, severity):
    session.execute(f"CREATE SCHEMA other; GRANT USAGE ON SCHEMA other TO PUBLIC; CREATE FUNCTION other.{shadow}")
    assert findings(session) == []
    session.execute(f"ALTER ROLE {app} IN DATABASE {db.name} SET search_path = {path}")
    arguments = "character varying" if shadow == BETTER else "text,text,jsonb,text"
    expected = [(severity, "shadowing_function", f"other.envelope_encrypt({arguments})")] if severity else []
    assert findings(session) == expected
    if severity:
        assert app in saw(session, "shadowing_function")


def test_quoted_names_on_the_path(session, app):
    session.execute('CREATE SCHEMA "Odd, ""one"; GRANT USAGE ON SCHEMA "Odd, ""one" TO PUBLIC')
    session.execute(f'CREATE FUNCTION "Odd, ""one".{SAME}')
    session.execute(f'ALTER ROLE {app} SET search_path = "Odd, ""one", public')
    found = '"Odd, ""one".envelope_encrypt(text,text,jsonb,text)'
    assert findings(session) == [("critical", "shadowing_function", found)]


def test_functions_in_the_way_in_a_users_own_schema_or_ours(session, app):
    session.execute(f"CREATE SCHEMA {app} AUTHORIZATION {app}; CREATE FUNCTION {app}.rewrap(value text) RETURNS text {ANY}")
    session.execute(f"CREATE FUNCTION public.{BETTER}")
    assert findings(session) == [
        ("critical", "shadowing_function", f"{app}.rewrap(text)"),
        ("critical", "shadowing_function", "public.envelope_encrypt(character varying)")]


def test_the_extension_off_the_path(db, session, app):
    session.execute(f"CREATE SCHEMA other; GRANT USAGE ON SCHEMA other TO PUBLIC; CREATE FUNCTION other.{SAME}")
    session.execute(f"ALTER DATABASE {db.name} SET search_path = other")
    assert findings(session) == [("critical", "shadowing_function", "other.envelope_encrypt(text,text,jsonb,text)")]


@pytest.mark.parametrize("grant, severity, subject", [
    ("GRANT CREATE ON SCHEMA public TO PUBLIC", "critical", "public"),
    ("GRANT CREATE ON SCHEMA public TO {app}", "warning", "public"),
    ("GRANT CREATE ON SCHEMA vod_tender_crypto TO {app}", "warning", "vod_tender_crypto"),
    ("CREATE SCHEMA elsewhere; GRANT CREATE ON SCHEMA elsewhere TO PUBLIC", None, ""),
])
def test_schemas_in_which_others_create(session, app, grant, severity, subject):
    session.execute(grant.format(app=app))
    assert findings(session) == ([(severity, "schema_open", subject)] if severity else [])


# -- values ------------------------------------------------------------------------------------------------------


def test_values_that_are_not_envelopes(db, session):
    path = db.server_file("legacy.b64", new_key())
    session.execute(f"SET vod_tender_crypto.legacy_key_file = '{path}'")
    session.execute("INSERT INTO tokens VALUES (3, %s), (4, '')", [SECRET])
    assert findings(session) == [("critical", "plaintext_left", "public.tokens.token")]
    assert findings(session, scan=False) == []
    session.execute("UPDATE tokens SET token = envelope_downgrade(%s, version => 0) WHERE id = '3'", [SECRET])
    assert findings(session) == [("warning", "direct_left", "public.tokens.token")]
    session.execute("UPDATE tokens SET token = 'kms:v2:AAAA:AAAA' WHERE id = '3'")
    assert findings(session) == [("critical", "values_malformed", "public.tokens.token")]


def test_keys_and_what_is_under_them(db, session):
    session.execute("CREATE TABLE elsewhere (v bytea)")
    add_local_key(db, session, "other", default=False)
    assert findings(session) == [("notice", "key_unused", 'key "other"')]
    session.execute("INSERT INTO elsewhere VALUES (envelope_encrypt('x'::bytea, key => 'other'))")
    assert findings(session) == []
    session.execute("SELECT vod_tender_crypto.set_key_state('other', 'decrypt_only')")
    assert findings(session) == []
    session.execute("SELECT vod_tender_crypto.set_key_state('other', 'disabled')")
    assert findings(session) == [("critical", "key_disabled", 'key "other"')]
    session.execute("SELECT vod_tender_crypto.drop_key('other')")
    assert findings(session) == [("critical", "key_not_configured", 'key "other"')]
    assert findings(session, scan=False) == []


def test_the_default_key_of_a_role_is_in_use(db, session, app):
    add_local_key(db, session, "other", default=False)
    session.execute(f"ALTER ROLE {app} SET vod_tender_crypto.default_key = 'other'")
    assert findings(session) == []


# -- registered columns, jobs, clock -----------------------------------------------------------------------------


@pytest.mark.parametrize("change, severity, finding", [
    ("ALTER TABLE tokens RENAME TO renamed", "warning", "registered_column_gone"),
    ("ALTER TABLE tokens DROP COLUMN token", "warning", "registered_column_gone"),
    ("ALTER TABLE tokens ALTER COLUMN token TYPE jsonb USING to_jsonb(token)", "warning", "registered_column_type"),
    ("ALTER TABLE tokens RENAME COLUMN id TO number", "critical", "expression_unusable"),
    ("UPDATE vod_tender_crypto.protected_column SET version = 'no such column'", "critical", "expression_unusable"),
])
def test_registered_columns(session, change, severity, finding):
    session.execute(change)
    assert findings(session) == [(severity, finding, "public.tokens.token")]


def test_jobs_that_did_not_finish(session):
    session.execute("CREATE TABLE more (id text PRIMARY KEY, token text CONSTRAINT short CHECK (length(token) < 9))")
    session.execute("INSERT INTO more VALUES (1, 'token')")
    migrate(session, "more")
    job = one(session, "SELECT max(job) FROM vod_tender_crypto.job")
    unfinished = ("notice", "job_unfinished", f"job {job}")
    assert findings(session, scan=False) == [unfinished]
    session.execute("UPDATE vod_tender_crypto.job SET state = 'running' WHERE job = %s", [job])
    assert findings(session, scan=False) == [unfinished], "its session is gone"
    session.execute("UPDATE vod_tender_crypto.job SET state = 'failed' WHERE job = %s", [job])
    assert findings(session, scan=False) == [unfinished]
    session.execute("ALTER TABLE more DROP CONSTRAINT short")
    migrate(session, "more")
    assert findings(session) == [], "another job has done it"


@pytest.mark.parametrize("change", [
    "UPDATE vod_tender_crypto.kek SET created_at = now() + interval '2 minutes'",
    "UPDATE vod_tender_crypto.protected_column SET registered_at = now() + interval '2 minutes'",
    "UPDATE vod_tender_crypto.job SET updated_at = now() + interval '2 minutes'",
])
def test_a_clock_that_went_back(session, change):
    session.execute(change.replace("2 minutes", "30 seconds"))
    assert findings(session) == []
    session.execute(change)
    assert [row[:2] for row in findings(session)] == [("warning", "clock_went_back")]


@pytest.mark.parametrize("setting, value, finding, severity", [
    ("plaintext_reads", "allow", "plaintext_reads", "warning"),
    ("plaintext_reads", "warn", "plaintext_reads", "warning"),
    ("write_format", "direct", "write_format_direct", "warning"),
    ("audit", "off", "audit_off", "notice"),
])
def test_settings_of_the_extension(db, session, app, setting, value, finding, severity):
    name = f"vod_tender_crypto.{setting}"
    for scope in [f"role {app}", f"database {db.name}"]:
        session.execute(f"ALTER {scope} SET {name} = '{value}'")
        with db.connect() as later:
            assert findings(later) == [(severity, finding, f"{name} ({scope})")]
        session.execute(f"ALTER {scope} RESET {name}")


def test_alarms_that_would_not_be_logged(db, session, app):
    for level in ("error", "panic"):
        session.execute(f"ALTER ROLE {app} SET log_min_messages = {level}")
        assert findings(session) == [("warning", "alarms_unlogged", f"log_min_messages (role {app})")]


# -- access and audit ----------------------------------------------------------------------------------------------


def test_a_grant_to_a_role_that_is_gone(well, db, session):
    session.execute("CREATE ROLE gone; INSERT INTO vod_tender_crypto.key_grant (key, role, privilege) "
                    "VALUES ('default', 'gone', 'decrypt'); ")
    oid = one(session, "SELECT oid FROM pg_roles WHERE rolname = 'gone'")
    session.execute("DROP ROLE gone")
    assert findings(session) == [("notice", "grant_left_over", f"default ({oid})")]


def test_a_grant_of_a_key_that_is_not_configured(db, session, app):
    session.execute("INSERT INTO vod_tender_crypto.key_grant (key, role, privilege) VALUES ('absent', %s::regrole, 'decrypt')", [app])
    assert findings(session) == [("notice", "grant_left_over", f"absent ({app})")]


def test_records_that_no_worker_stores(_neutral_environment, extension):
    with limits(), Cluster({**SET_UP, "max_worker_processes": 0}) as cluster:
        cluster.createdb("crowded")
        database = Database(cluster, "crowded")
        cluster.psql("CREATE ROLE crowded LOGIN")
        set_up(database, "crowded")
        with database.connect() as session:
            no_room = ("notice", "worker_room", "max_worker_processes")
            assert findings(session) == [no_room], "what was just written may wait"
            queue = next((cluster.data / "vod_tender_crypto" / "audit").iterdir())
            for waiting in queue.glob("*.audit"):
                os.utime(waiting, (2, 2))
            os.utime(queue / "worker.lock", (1, 1))  # when a worker has read everything
            assert findings(session) == [("warning", "audit_waits", "vod_tender_crypto.audit"), no_room]


# -- what it cannot look at --------------------------------------------------------------------------------------


def test_a_part_that_cannot_look_is_a_finding(session):
    if not extension_available("pg_stat_statements"):
        cannot_run("this PostgreSQL has no pg_stat_statements")
    session.execute("CREATE EXTENSION pg_stat_statements")  # its library is not loaded: its view raises
    session.execute("ALTER DATABASE postgres SET log_statement = 'all'")
    try:
        assert findings(session) == [("notice", "not_looked_at", "doctor_statements")]
    finally:
        session.execute("ALTER DATABASE postgres RESET log_statement")


def test_a_column_that_cannot_be_read_is_a_finding(session):
    session.execute("CREATE MATERIALIZED VIEW empty AS SELECT token FROM tokens WITH NO DATA")
    assert findings(session) == [("notice", "not_looked_at", "public.empty.token")]
    session.execute("CREATE MATERIALIZED VIEW emptier AS SELECT token FROM tokens WITH NO DATA")
    assert findings(session) == [("notice", "not_looked_at", "2 columns")]
    assert findings(session, scan=False) == []


def test_a_role_that_is_no_superuser_sees_less_and_is_told(db, session, app):
    session.execute(f"GRANT EXECUTE ON FUNCTION vod_tender_crypto.doctor(boolean) TO {app}")
    with db.connect(user=app) as user:
        found = findings(user)
        assert ("notice", "not_looked_at", "doctor") in found
        assert {row[:2] for row in found} == {("notice", "not_looked_at")}
