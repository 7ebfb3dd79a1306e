"""Roles of a test's own, what they are granted, and how to see whether a key serves them."""

from __future__ import annotations

import itertools
import os

from helpers import one

ALL = ("encrypt", "decrypt", "rewrap")
_numbers = itertools.count(1)


class People:
    """Makes roles for one test and drops them, with all they own in the test's database."""

    def __init__(self, database):
        self.database = database
        self._made: "list[str]" = []

    def make(self, what: str, options: str = "LOGIN", own_schema: bool = False) -> str:
        """A new role whose name begins with `what`; on request with a schema of its name, where it may make things."""
        name = f"{what}_{os.getpid()}_{next(_numbers)}"
        with self.database.connect() as admin:
            admin.execute(f"CREATE ROLE {name} {options}")
            if own_schema:
                admin.execute(f"CREATE SCHEMA {name} AUTHORIZATION {name}")
        self._made.append(name)
        return name

    def attacker(self, what: str = "mallory") -> str:
        """A role that may log in and make things in a schema of its own, and may use no key."""
        return self.make(what, own_schema=True)

    def may(self, key: str, *privileges: str, what: str = "reader", options: str = "LOGIN") -> str:
        """A new role with these privileges on a key."""
        name = self.make(what, options)
        self.grant(key, name, *privileges)
        return name

    def grant(self, key: str, role: str, *privileges: str) -> None:
        """grant_key() in a transaction of its own."""
        self._call("grant_key", key, role, privileges)

    def revoke(self, key: str, role: str, *privileges: str) -> None:
        """revoke_key() in a transaction of its own; of everything where no privilege is named."""
        self._call("revoke_key", key, role, privileges or ALL)

    def admin(self, statement: str) -> None:
        """A statement of the superuser's, in a transaction of its own."""
        with self.database.connect() as admin:
            admin.execute(statement)

    def forget(self, name: str) -> None:
        """The test has dropped or renamed the role itself."""
        self._made.remove(name)

    def watch(self, name: str) -> None:
        """Drops this role too."""
        self._made.append(name)

    def close(self) -> None:
        """Drops them all, and ends their sessions."""
        with self.database.connect() as admin:
            for name in reversed(self._made):
                admin.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = %s", [name])
                admin.execute(f'DROP OWNED BY "{name}" CASCADE')
                admin.execute(f'DROP ROLE "{name}"')

    def _call(self, function: str, key: str, role: str, privileges) -> None:
        with self.database.connect() as admin:
            admin.execute(f"SELECT vod_tender_crypto.{function}(%s, %s::regrole, %s)",
                          [key, f'"{role}"', list(privileges)])


def execute_on_all(people: People, role: str) -> None:
    """EXECUTE on every data-path function, and no right on any key that exists."""
    people.grant("default", role, *ALL)
    people.admin("DELETE FROM vod_tender_crypto.key_grant g WHERE g.role = '" + role + "'::regrole")


def encrypted(connection, plaintext: str = "token", **arguments) -> str:
    """envelope_encrypt() of a text with these named arguments."""
    named = "".join(f", {name} => %s{'::jsonb' if name == 'context' else ''}" for name in arguments)
    return one(connection, f"SELECT envelope_encrypt(%s{named})", plaintext, *arguments.values())


def direct(connection, plaintext: str = "token") -> str:
    """The plaintext under the legacy key."""
    with connection.transaction():
        connection.execute("SET LOCAL vod_tender_crypto.write_format = 'direct'")
        return one(connection, "SELECT envelope_encrypt(%s::text)", plaintext)


def decrypted(connection, value: str) -> str:
    """envelope_decrypt() of a text."""
    return one(connection, "SELECT envelope_decrypt(%s)", value)


def call_count(connection) -> int:
    """How many calls to key services the session has made."""
    return one(connection, "SELECT (vod_tender_crypto.session_stats()->>'call_count')::int")
