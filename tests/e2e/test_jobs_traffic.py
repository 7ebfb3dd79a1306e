"""Clients read and write tokens while everything moves: four phases, a rotation, the rollback, and forward again.

No read fails, no write is lost. VTC_TRAFFIC_SECONDS (2) is how long each stretch without a job lasts, and makes
the table larger, so that the jobs last longer too. VTC_SEED repeats what the clients choose.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import secrets
import signal
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest

from cluster import SOCKET_SUFFIX, SUPERUSER
from helpers import new_key, one
from jobs import MIGRATION, TABLE, Background, aad_of, make_tokens, plaintext, versions, wait_until, wrong_tokens
from sqlstate import NOT_READY, fails

SECONDS = float(os.environ.get("VTC_TRAFFIC_SECONDS", "2"))
ROWS = int(max(SECONDS, 2) * 10_000)
CLIENTS = 5  # each owns a tenth of the rows; the rest is written by jobs alone
PAUSE = 0.01  # between two turns of a client, on average
BENCH_CLIENTS = 2
BENCH_RATE = 150  # transactions a second
BENCH_OWNER = 10
SLOWEST_P99_MS = 250
DOWNGRADED = {"encryption_version": 1, "encryption_key_id": None}

# One token is read as the row's bookkeeping says, the other as dual mode finds out.
ACCESS = f"envelope_decrypt(access_token, aad => {aad_of('access_token')}, version => encryption_version)"
REFRESH = f"envelope_decrypt(refresh_token, aad => {aad_of('refresh_token')})"
READS_RIGHT = f"sha256(convert_to({ACCESS} || '/' || {REFRESH}, 'UTF8')) = digest"
# Their tokens are known without asking the table.
IDLE = f"(SELECT * FROM {TABLE} WHERE owner BETWEEN {CLIENTS} AND 9) idle"


def write_sql(owner: str, provider: str, channel: str, access: str, refresh: str) -> str:
    """The application's upsert of a row and its bookkeeping, out of SQL expressions for its values."""
    return f"""
        INSERT INTO {TABLE} AS t (owner, provider, channel, access_token, refresh_token, encryption_version,
                                  encryption_key_id, digest)
        SELECT s.owner, s.provider, s.channel, s.access, s.refresh, envelope_version(s.access),
               envelope_info(s.access) ->> 'kek_id', s.digest
        FROM (SELECT owner, provider, channel, sha256(convert_to(access || '/' || refresh, 'UTF8')) AS digest,
                     envelope_encrypt(access, aad => {aad_of('access_token')}) AS access,
                     envelope_encrypt(refresh, aad => {aad_of('refresh_token')}) AS refresh
              FROM (VALUES ({owner}, {provider}, {channel}, {access}, {refresh}))
                   g (owner, provider, channel, access, refresh)
              OFFSET 0) s
        ON CONFLICT (provider, channel) DO UPDATE SET access_token = excluded.access_token,
            refresh_token = excluded.refresh_token, encryption_version = excluded.encryption_version,
            encryption_key_id = excluded.encryption_key_id, digest = excluded.digest
        RETURNING t.encryption_version, t.encryption_key_id"""


THIS_ROW = "provider = %s AND channel = %s"
WRITE = write_sql("%s::int", "%s::text", "%s::text", "%s::text", "%s::text")
WRITE_SCOPE = f"UPDATE {TABLE} SET scope = %s WHERE {THIS_ROW}"
READ_OWN = f"SELECT {ACCESS}, {REFRESH}, scope FROM {TABLE} WHERE {THIS_ROW}"
READ_ALL_OWN = f"SELECT provider, channel, {ACCESS}, {REFRESH}, scope FROM {TABLE} WHERE owner = %s"
READ_ANY = f"SELECT {READS_RIGHT} FROM {TABLE} WHERE {THIS_ROW}"
# A client's rows that the job comes to next.
IN_THE_WAY = f"""SELECT provider, channel FROM {TABLE} WHERE owner = %s
                 AND ctid >= (SELECT next_row FROM vod_tender_crypto.job WHERE state = 'running') LIMIT 40"""

# pgbench keeps a variable from one transaction to the next: what it wrote last. Division by zero ends a client.
BENCH_WRITE = f"""
SELECT 1 / count(*) FROM {TABLE}
    WHERE provider = 'bench' AND channel = :client_id::text AND {READS_RIGHT} AND {ACCESS} = 'bench ' || :last::text;
\\set next random(1, 1000000000)
{write_sql(f"{BENCH_OWNER}", "'bench'", ":client_id::text", "'bench ' || :next::text", "'refresh ' || :next::text")};
\\set last :next
"""
BENCH_READ = f"""
\\set row random(1, {ROWS})
SELECT 1 / count(*) FROM {TABLE}
    WHERE provider = CASE :row::int % 2 WHEN 0 THEN 'twitch' ELSE 'youtube' END
      AND channel = 'channel' || :row::text AND {READS_RIGHT};
"""


class Client(threading.Thread):
    """A client that owns some rows: it knows what it wrote there last, and reads everybody's."""

    def __init__(self, cluster, number: int, seed: int):
        super().__init__(name=f"client {number}", daemon=True)
        self.number = number
        self.connection = cluster.connect()
        self.random = random.Random(seed + number)
        tokens = ", ".join(plaintext(column) for column in MIGRATION["columns"])
        made = f"SELECT provider, channel, {tokens}, scope FROM {TABLE} WHERE owner = %s"
        self.written = {tuple(row[:2]): tuple(row[2:]) for row in self.connection.execute(made, [number])}
        self.keys = list(self.written)
        self.form: "tuple[int, str | None] | None" = None  # version and KEK id of what it wrote last
        self.timings: "list[tuple[float, str, float]]" = []  # when it ended, what it was, how many ms it took
        self.error: "BaseException | None" = None
        self.ending = threading.Event()

    def run(self) -> None:
        writes = [self.write, self.write, self.write, self.write_scope, self.write_locked]
        try:
            while not self.ending.wait(self.random.uniform(0, 2 * PAUSE)):
                key = self.some_key()
                self.check(key)
                self.random.choice(writes)(key)
                self.read_another()
        except BaseException as error:
            self.error = error

    def some_key(self) -> "tuple[str, str]":
        """A row of its own: any, a new one, or often one that a job is about to write."""
        if self.random.random() < 0.05:
            key = ("client", f"{self.number}_{len(self.keys)}")
            self.write(key)
            self.keys.append(key)
            return key
        in_the_way = self.connection.execute(IN_THE_WAY, [self.number]).fetchall()
        return self.random.choice(in_the_way if in_the_way and self.random.random() < 0.7 else self.keys)

    def check(self, key) -> None:
        """The row is what this client committed there last."""
        with self.timed("read"):
            found = self.connection.execute(READ_OWN, key).fetchall()
        assert found == [self.written[key]], f"{self.name} reads {key}: {found}, wrote {self.written[key]}"

    def write(self, key) -> None:
        """New tokens; the row's other column stays."""
        tokens = secrets.token_urlsafe(30), secrets.token_urlsafe(45)
        with self.timed("write"):
            self.form = self.connection.execute(WRITE, [self.number, *key, *tokens]).fetchone()
        self.written[key] = (*tokens, self.written[key][2] if key in self.written else None)

    def write_scope(self, key) -> None:
        """A write that leaves the tokens alone."""
        scope = secrets.token_hex(4)
        with self.timed("write"):
            self.connection.execute(WRITE_SCOPE, [scope, *key])
        self.written[key] = (*self.written[key][:2], scope)

    def write_locked(self, key) -> None:
        """Two rows in one transaction: locked, read, thought about and written, as a token refresh does."""
        with self.connection.transaction():
            for each in (key, self.random.choice(self.keys)):
                found = self.connection.execute(READ_OWN + " FOR UPDATE", each).fetchall()
                assert found == [self.written[each]], f"{self.name} locks {each}: {found}, wrote {self.written[each]}"
                time.sleep(self.random.uniform(0, PAUSE))
                self.write(each)

    def read_another(self) -> None:
        """Any row, which reads as its last writer meant it."""
        row = self.random.randint(1, ROWS)
        with self.timed("read"):
            found = self.connection.execute(READ_ANY, ["youtube" if row % 2 else "twitch", f"channel{row}"]).fetchall()
        assert found == [(True,)], f"{self.name} reads row {row}: {found}"

    def check_all(self) -> None:
        """Every row of its own is as it wrote it, and no other is there."""
        found = {tuple(row[:2]): tuple(row[2:]) for row in self.connection.execute(READ_ALL_OWN, [self.number])}
        wrong = [key for key in {*found, *self.written} if found.get(key) != self.written.get(key)]
        assert not wrong, f"{self.name}: {len(wrong)} of {len(self.written)} rows, for example {wrong[:5]}"

    @contextlib.contextmanager
    def timed(self, what: str):
        began = time.perf_counter()
        yield
        self.timings.append((time.time(), what, (time.perf_counter() - began) * 1000))


class Bench:
    """pgbench, from construction to end()."""

    def __init__(self, cluster, directory):
        self.log_prefix = directory / "bench"
        for name, script in ("read", BENCH_READ), ("write", BENCH_WRITE):
            (directory / f"{name}.sql").write_text(script)
        with cluster.connect() as connection:
            for client in range(BENCH_CLIENTS):
                connection.execute(WRITE, [BENCH_OWNER, "bench", str(client), "bench 0", "refresh 0"])
        command = [cluster.bin / "pgbench", "-h", cluster.root, "-p", str(SOCKET_SUFFIX), "-U", SUPERUSER, "-n",
                   "-M", "prepared", "-c", str(BENCH_CLIENTS), "-j", "1", "-R", str(BENCH_RATE), "-T", "86400",
                   "-D", "last=0", "-f", f"{directory / 'read.sql'}@2", "-f", f"{directory / 'write.sql'}@1",
                   "-l", f"--log-prefix={self.log_prefix}", "postgres"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/")

    def check(self) -> None:
        """It still runs."""
        assert self.process.poll() is None, f"pgbench ended: {self.process.communicate()}"

    def end(self) -> None:
        """Ends it as its time limit would; every transaction must have gone well."""
        self.check()
        self.process.send_signal(signal.SIGALRM)
        out, err = self.process.communicate(timeout=30)
        assert self.process.returncode == 0 and "error" not in err, f"{out}\n{err}"
        assert "number of failed transactions: 0 " in out, out
        assert int(re.search(r"actually processed: (\d+)", out).group(1)) > 100

    def timings(self) -> "list[tuple[float, str, float]]":
        """Its log, in the form of the clients' own; a late transaction's wait for its turn counts."""
        log, = self.log_prefix.parent.glob("bench.*")
        lines = (line.split() for line in log.read_text().splitlines())
        return [(int(at[4]) + int(at[5]) / 1e6, "pgbench " + ("read", "write")[int(at[3])], int(at[2]) / 1000)
                for at in lines]


class Load:
    """All clients, and what went on in which stretch of time."""

    def __init__(self, cluster, directory, seed: int):
        self.cluster = cluster
        self.admin = cluster.connect()
        self.stretches: "list[tuple[str, bool, float, float]]" = []  # name, whether a job ran, begin and end
        self.clients = [Client(cluster, number, seed) for number in range(CLIENTS)]
        self.bench = Bench(cluster, directory)
        for client in self.clients:
            client.start()

    def __enter__(self) -> "Load":
        return self

    def __exit__(self, *exc_info) -> None:
        self.end_clients()
        for client in self.clients:
            client.connection.close()
        self.admin.close()
        if self.bench.process.poll() is None:
            self.bench.process.kill()
            self.bench.process.communicate()

    def check(self) -> None:
        """No client has failed so far."""
        for client in self.clients:
            if client.error:
                raise AssertionError(f"{client.name} failed: {client.error}") from client.error
        self.bench.check()

    def wait_until(self, holds, what: str) -> None:
        """Until something holds; a client that fails ends the wait."""

        def checked():
            self.check()
            return holds()

        wait_until(checked, what)

    def all_write(self, version: int, kek_id: "str | None" = None) -> None:
        """Until every client's last write is in this form: its session knows what changed."""
        bench = f"SELECT bool_and((encryption_version, encryption_key_id) IS NOT DISTINCT FROM (%s, %s)) FROM {TABLE}"
        self.wait_until(lambda: all(client.form == (version, kek_id) for client in self.clients)
                        and one(self.admin, f"{bench} WHERE owner = {BENCH_OWNER}", version, kek_id),
                        f"for every client to write version {version} under {kek_id}")

    def goes_on(self) -> None:
        """Until every client has done some more."""
        before = [len(client.timings) for client in self.clients]
        self.wait_until(lambda: all(len(client.timings) >= count + 50 for client, count in zip(self.clients, before)),
                        "for the clients to go on")

    def without_job(self, name: str) -> None:
        """The load alone, for a while."""
        began = time.time()
        while time.time() < began + SECONDS:
            self.check()
            time.sleep(0.05)
        self.stretches.append((name, False, began, time.time()))

    def with_job(self, name: str, procedure: str, **arguments) -> SimpleNamespace:
        """The load beside a job, which must do all that it was given."""
        began = time.time()
        with Background(self.cluster, procedure, TABLE, **arguments) as running:
            job = running.join(60 + 30 * SECONDS)
        ended = time.time()
        self.stretches.append((name, True, began, ended))
        self.check()
        print(f"{name}: {job.rows_done} rows in {ended - began:.1f} s; "
              f"{job.rows_skipped} were locked or changed, in {vars(job)['pass']} passes")
        assert (job.state, job.rows_failed, job.rows_left) == ("done", 0, 0), job
        return job

    def end(self) -> None:
        """Ends all clients. Each finds every row as it left it."""
        self.end_clients()
        self.check()
        self.bench.end()
        for client in self.clients:
            client.check_all()

    def end_clients(self) -> None:
        for client in self.clients:
            client.ending.set()
        for client in self.clients:
            client.join(10)
            assert not client.is_alive(), client.name

    def latencies(self) -> "dict[tuple[str, str, bool], list[float]]":
        """Milliseconds by stretch, kind of operation, and whether a job ran."""
        found: "dict[tuple[str, str, bool], list[float]]" = {}
        for ended, what, took in itertools.chain(self.bench.timings(), *(client.timings for client in self.clients)):
            for name, job, began, until in self.stretches:
                if began <= ended - took / 1000 and ended <= until:
                    found.setdefault((name, what, job), []).append(took)
        return found


@pytest.fixture
def server(make_cluster, extension, kms):
    """A server with a legacy key and tokens of versions 0 and 1; it can reach KMS and has no KEK yet."""
    own = make_cluster(environment={**kms.environment(), "KMS_KEY_ID": None})
    own.legacy_key_file = own.server_file("legacy.b64", new_key())
    change_settings(own, legacy_key_file=own.legacy_key_file, plaintext_reads="allow")
    own.restart()
    with own.connect() as admin:
        admin.execute(f"CREATE EXTENSION {extension}")
        make_tokens(admin, ROWS)
        tokens = " || '/' || ".join(plaintext(column) for column in MIGRATION["columns"])
        admin.execute(f"ALTER TABLE {TABLE} ADD owner int, ADD scope text, ADD digest bytea")
        admin.execute(f"""UPDATE {TABLE} SET owner = substr(channel, 8)::int % 10,
                          digest = sha256(convert_to({tokens}, 'UTF8'))""")
        admin.execute(f"VACUUM FULL ANALYZE {TABLE}")
    return own


def change_settings(cluster, **settings) -> None:
    """Changes settings of the extension for every session, all at once; None takes a setting back."""
    for name, value in settings.items():
        cluster.settings[f"vod_tender_crypto.{name}"] = value
    cluster.settings = {name: value for name, value in cluster.settings.items() if value is not None}
    cluster.reload()


def all_read_right(connection) -> bool:
    """Every row of the table reads as its last writer meant it."""
    return one(connection, f"SELECT bool_and(coalesce({READS_RIGHT}, false)) FROM {TABLE}")


def remove_legacy_key(cluster, admin) -> None:
    """Phase 4: once nothing needs it, the legacy key goes, and plaintext is not read any more."""
    assert one(admin, "SELECT vod_tender_crypto.legacy_key_unused()")
    direct = one(admin, f"SELECT envelope_downgrade({ACCESS}, version => 0) FROM {TABLE} LIMIT 1")
    change_settings(cluster, legacy_key_file=None, plaintext_reads=None)
    wait_until(lambda: not one(admin, "SELECT current_setting('vod_tender_crypto.legacy_key_file')"))
    with fails(NOT_READY):
        one(admin, "SELECT envelope_decrypt(%s, version => 1)", direct)


def test_no_read_fails_and_no_write_is_lost(server, kms, tmp_path):
    second = kms.create_key()
    seed = int(os.environ.get("VTC_SEED") or secrets.randbits(32))
    print(f"VTC_SEED={seed}")
    jobs = []
    with Load(server, tmp_path, seed) as load:
        admin = load.admin

        # Phase 1: the legacy key alone.
        load.all_write(1)
        load.without_job("1 legacy key")
        assert set(versions(admin)) == {0, 1} and not one(admin, "SELECT vod_tender_crypto.legacy_key_unused()")

        # Phase 2: a KEK; new tokens are envelopes, the others stay.
        admin.execute("SELECT vod_tender_crypto.add_key('default', %s)", [kms.kek_uri()])
        load.all_write(2, kms.arn)
        load.without_job("2, 3 migration")
        assert set(versions(admin, IDLE)) == {0, 1} and versions(admin)[2] > 0

        # Phase 3, in three steps.
        for percent in (10, 50, 100):
            jobs.append(load.with_job("2, 3 migration", "migrate", **MIGRATION, percent=percent))
            share = versions(admin, IDLE)[2] / ROWS * 100  # half of the rows, and two tokens in each
            assert abs(share - percent) < 3, f"{share} % after {percent} %"
        assert set(versions(admin)) == {2} and all_read_right(admin)

        # Phase 4.
        remove_legacy_key(server, admin)
        load.without_job("4, rotation")
        assert all_read_right(admin)

        # Rotation: new tokens go under the second KEK, then the others, then the first is retired.
        admin.execute("SELECT vod_tender_crypto.add_key('second', %s)", [kms.kek_uri(second)])
        change_settings(server, default_key="second")
        load.all_write(2, second)
        admin.execute("SELECT vod_tender_crypto.set_key_state('default', 'decrypt_only')")
        jobs.append(load.with_job("4, rotation", "rewrap_table", set_columns={"encryption_key_id": "{kek_id}"}))
        admin.execute("SELECT vod_tender_crypto.retire_key('default')")
        kms.disable(kms.arn)
        load.goes_on()
        assert all_read_right(admin)

        # Rollback: the legacy key is back, clients write with it, and at the end nothing needs a KEK.
        change_settings(server, legacy_key_file=server.legacy_key_file, write_format="direct")
        load.all_write(1)
        load.without_job("rollback")
        jobs.append(load.with_job("rollback", "downgrade", set_columns=DOWNGRADED))
        assert set(versions(admin)) == {1}
        admin.execute("SELECT vod_tender_crypto.set_key_state('second', 'disabled')")
        load.goes_on()
        assert all_read_right(admin)

        # Forward again: how the columns are protected is registered since the first migration.
        admin.execute("SELECT vod_tender_crypto.set_key_state('second', 'active')")
        change_settings(server, write_format=None)
        load.all_write(2, second)
        load.without_job("forward again")
        jobs.append(load.with_job("forward again", "migrate", set_columns=MIGRATION["set_columns"]))
        remove_legacy_key(server, admin)
        load.goes_on()
        load.end()

        assert set(versions(admin)) == {2} and all_read_right(admin) and wrong_tokens(admin, IDLE) == 0
        assert one(admin, f"SELECT count(*) FROM {IDLE}") == ROWS // 2
        assert admin.execute("SELECT * FROM vod_tender_crypto.verify(%s)", [TABLE]).fetchall() == []
    assert sum(job.rows_skipped for job in jobs) > 0, "no job ever met a client: that proves little"
    report(load.latencies())


def percentile(sample: "list[float]", share: float) -> float:
    """The value that this share of the sample does not exceed."""
    return sorted(sample)[min(int(len(sample) * share), len(sample) - 1)]


def report(latencies: "dict[tuple[str, str, bool], list[float]]") -> None:
    """Prints p50 and p99 of every stretch, without a job and beside one, and holds p99 against a loose bound."""

    def shown(sample: "list[float]") -> str:
        if not sample:
            return "-"
        return f"p50 {percentile(sample, 0.5):6.2f}  p99 {percentile(sample, 0.99):6.2f}  of {len(sample)}"

    print(f"{'ms':16}{'':15}{'without a job':36}beside a job")
    beside_jobs: "dict[str, list[float]]" = {}
    for name, what in sorted({(name, what) for name, what, _ in latencies}):
        quiet, beside = (latencies.get((name, what, job), []) for job in (False, True))
        beside_jobs.setdefault(what, []).extend(beside)
        print(f"{name:16}{what:15}{shown(quiet):36}{shown(beside)}")
    assert set(beside_jobs) == {"read", "write", "pgbench read", "pgbench write"}
    for what, sample in beside_jobs.items():
        assert len(sample) >= 100, f"only {len(sample)} of {what} beside a job"
        assert percentile(sample, 0.99) < SLOWEST_P99_MS, what
