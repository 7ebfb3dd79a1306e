"""What tests of bulk jobs share: a table of tokens whose plaintexts are known, and ways to run and watch jobs."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import threading
import time
from types import SimpleNamespace

import psycopg
from psycopg.rows import dict_row

from helpers import add_local_key, new_key, one

TABLE = "oauth_tokens"
COLUMNS = ["access_token", "refresh_token"]
AAD = "provider || '/' || channel || '/{column}'"
VERSION = "encryption_version"
SET_COLUMNS = {"encryption_version": 2, "encryption_key_id": "{kek_id}"}
MIGRATION = {"columns": COLUMNS, "aad": AAD, "version": VERSION, "set_columns": SET_COLUMNS}


def add_legacy_key(database) -> str:
    """A legacy key for every later session of the database; gives its file's path."""
    path = database.server_file("legacy.b64", new_key() + "\n")
    with database.connect() as admin:
        admin.execute("SELECT envelope_version('')")  # loads the library: its settings are known then
        admin.execute(f"ALTER DATABASE {database.name} SET vod_tender_crypto.legacy_key_file = '{path}'")
    return path


def add_keys(database) -> None:
    """A legacy key, and a local KEK named default."""
    add_legacy_key(database)
    with database.connect() as admin:
        add_local_key(database, admin, "default")


def may_use(admin, name: str) -> None:
    """What jobs take, with every key that is configured by now and with the legacy keys: no right to see a plaintext."""
    admin.execute("""
        SELECT vod_tender_crypto.grant_key(k, %s::regrole, '{encrypt,rewrap}')
        FROM (SELECT name FROM vod_tender_crypto.kek UNION SELECT unnest(ARRAY['default', 'legacy'])) keys(k)""", [name])


_roles = itertools.count(1)


@contextlib.contextmanager
def role(database, may_run_jobs: bool = True):
    """A plain role's name; what it owns goes with it."""
    name = f"jobs_{os.getpid()}_{next(_roles)}"
    with database.connect() as admin:
        admin.execute(f"CREATE ROLE {name} LOGIN")
        if may_run_jobs:
            admin.execute("SELECT vod_tender_crypto.grant_jobs(%s::regrole)", [name])
            may_use(admin, name)
    try:
        yield name
    finally:
        with database.connect() as admin:
            admin.execute(f"DROP OWNED BY {name} CASCADE")
            admin.execute(f"DROP ROLE {name}")


def plaintext(column: str) -> str:
    """The SQL expression over a row that gives what its token was made from."""
    return f"'{column}_' || md5(provider || '/' || channel)"


def make_tokens(connection, rows: int, direct: str = "g % 3 > 0", table: str = TABLE) -> None:
    """A table of `rows` rows: version 1 where `direct` holds of their number g (1 to rows), else version 0."""
    connection.execute(f"""
        CREATE TABLE {table} (provider text, channel text, access_token text, refresh_token text,
            updated_at timestamptz NOT NULL DEFAULT '2020-01-01', encryption_version integer NOT NULL,
            encryption_key_id text, PRIMARY KEY (provider, channel))""")
    add_tokens(connection, 1, rows, direct, table)


def add_tokens(connection, first: int, last: int, direct: str = "g % 3 > 0", table: str = TABLE) -> None:
    """More rows of the same kind, with the numbers `first` to `last`."""
    tokens = ", ".join(f"CASE WHEN r.direct THEN envelope_encrypt({plaintext(column)}) ELSE {plaintext(column)} END"
                       for column in COLUMNS)
    with connection.transaction():
        connection.execute("SET LOCAL vod_tender_crypto.write_format = 'direct'")
        connection.execute(f"""
            INSERT INTO {table} (provider, channel, access_token, refresh_token, encryption_version, encryption_key_id)
            SELECT r.provider, r.channel, {tokens}, r.direct::integer, CASE WHEN r.direct THEN 'legacy' END
            FROM (SELECT CASE g % 2 WHEN 0 THEN 'twitch' ELSE 'youtube' END AS provider, 'channel' || g AS channel,
                         ({direct}) AS direct
                  FROM generate_series({first}, {last}) g) r""")


def aad_of(column: str) -> str:
    """The SQL expression of AAD for one column."""
    return AAD.replace("{column}", column)


def wrong_tokens(connection, table: str = TABLE) -> int:
    """How many tokens are not what they were made from, whatever version they are; what does not open raises."""
    wrong = " + ".join(
        f"""count(*) FILTER (WHERE {plaintext(column)} IS DISTINCT FROM CASE envelope_version({column})
                WHEN 0 THEN {column} ELSE envelope_decrypt({column}, aad => {aad_of(column)}) END)"""
        for column in COLUMNS)
    return one(connection, f"SELECT {wrong} FROM {table}")


def versions(connection, table: str = TABLE) -> "dict[int, int]":
    """How many tokens of both columns are of which version."""
    values = " UNION ALL ".join(f"SELECT {column} AS v FROM {table}" for column in COLUMNS)
    return dict(connection.execute(f"SELECT envelope_version(v), count(*) FROM ({values}) a GROUP BY 1").fetchall())


def contents(connection, table: str = TABLE) -> list:
    """All rows with their system columns: the same again means that nobody wrote anything."""
    return connection.execute(f"SELECT tableoid, ctid, xmin::text, * FROM {table} ORDER BY ctid").fetchall()


def fingerprint(connection, columns: str, table: str = TABLE) -> str:
    """One hash over the given columns of all rows."""
    query = f"SELECT md5(string_agg(ROW({columns})::text, ';' ORDER BY provider, channel)) FROM {table}"
    return one(connection, query)


def call(connection, procedure: str, what, **arguments) -> SimpleNamespace:
    """CALLs migrate, rewrap_table or downgrade on a table, or resume or stop on a job; gives the job's row."""
    given = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in arguments.items()}
    named = "".join(f", {name} => %s{'::name[]' if name == 'columns' else ''}" for name in given)
    # Parameters written into the statement: the simple protocol, as psql sends it.
    cursor = psycopg.ClientCursor(connection)
    cursor.execute(f"CALL vod_tender_crypto.{procedure}(%s{named})", [what, *given.values()])
    return job_row(connection, cursor.fetchone()[0] if cursor.description else what)


def migrate(connection, table: str = TABLE, **arguments) -> SimpleNamespace:
    """Migrates a table of make_tokens() as the application would: aad, version and its own columns included."""
    return call(connection, "migrate", table, **{**MIGRATION, **arguments})


def job_row(connection, job: int) -> SimpleNamespace:
    """A job's row; `pass` is a word of Python's, so that is `pass_`."""
    query = "SELECT *, pass AS pass_ FROM vod_tender_crypto.job WHERE job = %s"
    with connection.cursor(row_factory=dict_row) as cursor:
        return SimpleNamespace(**cursor.execute(query, [job]).fetchone())


def last_job(connection) -> SimpleNamespace:
    """The newest job's row."""
    return job_row(connection, one(connection, "SELECT max(job) FROM vod_tender_crypto.job"))


def progress(connection, job: int) -> SimpleNamespace:
    """A job's row of job_progress."""
    query = "SELECT * FROM vod_tender_crypto.job_progress WHERE job = %s"
    with connection.cursor(row_factory=dict_row) as cursor:
        return SimpleNamespace(**cursor.execute(query, [job]).fetchone())


def job_errors(connection, job: int) -> list:
    """(row_key, column_name, sqlstate) of what a job could not handle."""
    return connection.execute("""SELECT row_key, column_name, sqlstate FROM vod_tender_crypto.job_error
                                 WHERE job = %s ORDER BY row_key::text, column_name""", [job]).fetchall()


def notices(connection) -> "list[tuple[str, str]]":
    """A list that fills with (severity, message) of what the server says to the session from now on."""
    heard = []
    connection.add_notice_handler(lambda said: heard.append((said.severity, said.message_primary)))
    return heard


def wait_until(holds, what: str = "", seconds: float = 20):
    """Polls until `holds()` gives something true, and gives that."""
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, f"waited in vain {what}"
        time.sleep(0.01)
    return found


class Background:
    """A call that runs in a session of its own while the test does something else."""

    def __init__(self, database, procedure: str, what=TABLE, user: str = "postgres", settings: str = "", **arguments):
        self.connection = database.connect(user=user)
        if settings:
            self.connection.execute(settings)
        self.pid = self.connection.info.backend_pid
        self.job: "SimpleNamespace | None" = None
        self.error: "psycopg.Error | None" = None
        self._call = (procedure, what, arguments)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, *exc_info) -> None:
        if self.running():
            self.connection.cancel_safe()
            self._thread.join(10)
        self.connection.close()

    def running(self) -> bool:
        """Whether the call has not come back yet."""
        return self._thread.is_alive()

    def join(self, seconds: float = 30) -> SimpleNamespace:
        """Waits for the call's end and gives the job's row; raises what it raised."""
        self.wait(seconds)
        if self.error:
            raise self.error
        return self.job

    def wait(self, seconds: float = 30) -> "psycopg.Error | None":
        """Waits for the call's end and gives its error, if any."""
        self._thread.join(seconds)
        assert not self.running(), "the job did not end"
        return self.error

    def _run(self) -> None:
        procedure, what, arguments = self._call
        try:
            self.job = call(self.connection, procedure, what, **arguments)
        except psycopg.Error as error:
            self.error = error


def begin_migration(database, user: str = "postgres", settings: str = "", **arguments) -> Background:
    """migrate() of make_tokens()'s table in a session of its own."""
    return Background(database, "migrate", TABLE, user, settings, **{**MIGRATION, **arguments})
