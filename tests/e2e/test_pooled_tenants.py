"""Two tenants in one table, behind a pooler that hands their transactions to the same few sessions: what one tenant's role
has just opened is in the memory that the other one's next statement runs in."""

from __future__ import annotations

import threading

import psycopg
import pytest

from helpers import add_local_key, one
from pgbouncer import PgBouncer
from sqlstate import NO_RIGHT, fails

ROWS = 100_000
POOL = 2
CLIENTS_OF_EACH = 3
ROUNDS = 150
PAGE = 50


@pytest.fixture
def tenants(cluster, people):
    """Keys a and b, roles for them, and a table that holds both tenants' values in turn: odd rows are a's, even ones b's."""
    with cluster.connect() as admin:
        for name in "ab":
            add_local_key(cluster, admin, name, f'{{"tenant": "{name}"}}', default=False)
        roles = {name: people.may(name, "encrypt", "decrypt", what=f"tenant_{name}", options="NOLOGIN") for name in "ab"}
        login = people.make("application", f"LOGIN NOINHERIT IN ROLE {roles['a']}, {roles['b']}")
        admin.execute("""
            CREATE TABLE tokens (id int PRIMARY KEY, tenant text NOT NULL, v text NOT NULL);
            INSERT INTO tokens
            SELECT g, t, envelope_encrypt('secret of ' || t || ' ' || g, key => t, aad => g::text)
            FROM (SELECT g, CASE g % 2 WHEN 1 THEN 'a' ELSE 'b' END AS t FROM generate_series(1, 100000) g) r""")
        admin.execute(f"GRANT SELECT ON tokens TO {roles['a']}, {roles['b']}")
        assert admin.execute("SELECT tenant, count(*) FROM tokens GROUP BY 1 ORDER BY 1").fetchall() == [
            ("a", ROWS // 2), ("b", ROWS // 2)]
    return roles, login


@pytest.fixture
def pooler(cluster, tenants):
    """The pooler in front of the database."""
    with PgBouncer(cluster.cluster, cluster.name, tenants[1], POOL) as running:
        yield running


class Tenant(threading.Thread):
    """One client of a tenant's: reads its own rows and tries the other's, each time in a transaction of its own."""

    def __init__(self, pooler, name: str, role: str, first: int):
        super().__init__(daemon=True)
        self.name_of_tenant, self.role, self.first = name, role, first
        self.pooler = pooler
        self.sessions: "set[tuple[int, str]]" = set()
        self.read = self.refused = 0
        self.error: "BaseException | None" = None

    def run(self) -> None:
        try:
            with self.pooler.connect() as connection:
                for at in range(ROUNDS):
                    at = (self.first + at * PAGE * 7) % (ROWS - 2 * PAGE) + 1
                    self.read_own(connection, at)
                    self.try_others(connection, at)
        except BaseException as error:
            self.error = error

    def transaction(self, connection):
        """Becomes the tenant's role for a transaction, as an application with a pooler does."""
        connection.rollback()
        connection.execute(f"SET LOCAL ROLE {self.role}")
        self.sessions.add((one(connection, "SELECT pg_backend_pid()"), self.name_of_tenant))

    def read_own(self, connection, first: int) -> None:
        self.transaction(connection)
        rows = connection.execute("""
            SELECT id, envelope_decrypt(v, aad => id::text) FROM tokens
            WHERE tenant = %s AND id BETWEEN %s AND %s""", [self.name_of_tenant, first, first + 2 * PAGE - 1]).fetchall()
        connection.commit()
        assert len(rows) == PAGE
        for id, token in rows:
            assert token == f"secret of {self.name_of_tenant} {id}"
            self.read += 1

    def try_others(self, connection, first: int) -> None:
        self.transaction(connection)
        # One row of the other tenant's, then a page of both tenants', where the first of the other's ends it.
        for condition in ("tenant <> %s AND id BETWEEN %s AND %s", "tenant <> '' AND %s <> '' AND id BETWEEN %s AND %s"):
            connection.execute("SAVEPOINT s")
            try:
                seen = connection.execute(f"SELECT envelope_decrypt(v, aad => id::text) FROM tokens WHERE {condition}",
                                          [self.name_of_tenant, first, first + 3]).fetchall()
            except psycopg.Error as error:
                assert error.sqlstate == NO_RIGHT, error
                assert "secret" not in str(error)
                self.refused += 1
            else:
                raise AssertionError(f"{self.name_of_tenant} was given {len(seen)} values of both tenants")
            connection.execute("ROLLBACK TO s")
        connection.commit()


def test_tenants_in_the_same_sessions_never_see_each_other(pooler, tenants):
    roles, _ = tenants
    clients = [Tenant(pooler, name, roles[name], 1 + 20_000 * number)
               for number in range(CLIENTS_OF_EACH) for name in "ab"]
    for client in clients:
        client.start()
    for client in clients:
        client.join(60)
        assert not client.is_alive()
        if client.error:
            raise client.error
        assert client.read == ROUNDS * PAGE and client.refused == ROUNDS * 2
    used = set().union(*(client.sessions for client in clients))
    pids = {pid for pid, _ in used}
    assert len(pids) <= POOL and len(used) == 2 * len(pids), "each session served both tenants"


def test_revoking_during_traffic(pooler, tenants, people):
    """revoke_key() ends a tenant's reading with its next statement, in the pool's sessions that have its data keys, and
    the other tenant's not; grant_key() begins it again. A transaction under way is no exception."""
    roles, _ = tenants
    query = "SELECT envelope_decrypt(v, aad => id::text) FROM tokens WHERE id = %s"
    others = [Tenant(pooler, "b", roles["b"], 1 + 10_000 * number) for number in range(2)]
    with pooler.connect() as connection:
        def read() -> str:
            connection.rollback()
            connection.execute(f"SET LOCAL ROLE {roles['a']}")
            return one(connection, query, 1)

        def refused(saying: str) -> None:
            with fails(NO_RIGHT, saying):
                read()
            connection.rollback()

        for other in others:
            other.start()
        for at in range(10):
            assert read() == "secret of a 1"
            if at % 2:
                people.revoke("a", roles["a"], "decrypt")
                saying = "permission denied for function envelope_decrypt"
            else:
                # The key's grant alone, as where the role may decrypt with another key.
                people.admin("DELETE FROM vod_tender_crypto.key_grant WHERE key = 'a' AND privilege = 'decrypt'")
                saying = 'with key "a"'
            with fails(NO_RIGHT, saying):
                one(connection, query, 3)
            refused(saying)
            people.grant("a", roles["a"], "decrypt")
            assert read() == "secret of a 1"
        connection.rollback()
        for other in others:
            other.join(60)
            assert not other.is_alive()
            if other.error:
                raise other.error
            assert other.read == ROUNDS * PAGE


def test_encrypting_in_the_same_sessions(pooler, tenants):
    """A tenant's data key for sealing is the session's, and not the other tenant's: in either order, many times."""
    roles, _ = tenants
    with pooler.connect() as connection:
        for at in range(40):
            name, other = ("a", "b") if at % 2 else ("b", "a")
            connection.execute(f"SET LOCAL ROLE {roles[name]}")
            value = one(connection, "SELECT envelope_encrypt('mine', key => %s)", name)
            info = one(connection, "SELECT envelope_info(%s)", value)
            assert (info["key"], info["context"]) == (name, {"tenant": name})
            with fails(NO_RIGHT, f'with key "{other}"'):
                one(connection, "SELECT envelope_encrypt('theirs', key => %s)", other)
            connection.rollback()
            connection.execute(f"SET LOCAL ROLE {roles[other]}")
            with fails(NO_RIGHT, f'with key "{name}"'):
                one(connection, "SELECT envelope_decrypt(%s)", value)
            connection.rollback()
