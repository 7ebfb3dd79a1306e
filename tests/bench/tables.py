"""The tables of one size of value: plaintext, envelopes of every kind, and what they are compared with.

All have the same two columns, an aad and a value, so that their scans cost the same where their values are as long.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench_server import ONE_DEK, session
from cluster import Cluster
from helpers import one

KINDS = ("bytea", "text")
PGCRYPTO_KEY = r"'\x000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f'::bytea"
PASSPHRASE = "'a passphrase'"


@dataclass(frozen=True)
class Shape:
    """What is in the tables: so many values of so many bytes, the envelopes under 1 or `deks` DEKs."""

    size: int
    rows: int
    deks: int

    @property
    def sample(self) -> int:
        """Rows for `pgp_sym_decrypt()`, which takes a thousand times longer."""
        return max(1, min(self.rows, 1000))


def envelopes(kind: str, deks: int, aad: bool) -> str:
    """Name of a table of envelopes."""
    return f"e_{kind}_{deks}{'_aad' if aad else ''}"


def make(cluster: Cluster, shape: Shape, extensions: "dict[str, bool]") -> None:
    """Make the tables and views of one size."""
    with session(cluster, *ONE_DEK) as connection:
        make_plain(connection, shape)
        for kind in KINDS:
            for deks in (1, shape.deks):
                for aad in (False, True):
                    make_envelopes(cluster, shape, kind, deks, aad)
            connection.execute("SELECT vod_tender_crypto.create_decrypting_view(%s, %s, columns => ARRAY['v'], aad => 'a')",
                               [envelopes(kind, 1, True), f"v_{kind}"])
        if extensions["vod_tender_floor"]:
            padding = header_length(connection, shape)
            fill(connection, "floor", "bytea", f"SELECT a, floor_seal(v, {padding}) FROM plain_bytea")
        if extensions["pgcrypto"]:
            fill(connection, "pgc", "bytea", f"SELECT a, encrypt(v, {PGCRYPTO_KEY}, 'aes') FROM plain_bytea")
            fill(connection, "pgp", "bytea",
                 f"SELECT a, pgp_sym_encrypt(v, {PASSPHRASE}) FROM plain_text LIMIT {shape.sample}")


def plaintext(size: int) -> str:
    """An expression over the row's number n: a text of so many bytes, another one in each row."""
    return f"substr(repeat(md5(n::text), {size // 32 + 1}), 1, {size})"


def make_plain(connection, shape: Shape) -> None:
    """The plaintext, as text and as the same bytes."""
    fill(connection, "plain_text", "text",
         f"SELECT 'row-' || n, {plaintext(shape.size)} FROM generate_series(1, {shape.rows}) n")
    fill(connection, "plain_bytea", "bytea", "SELECT a, convert_to(v, 'UTF8') FROM plain_text")


def make_envelopes(cluster: Cluster, shape: Shape, kind: str, deks: int, aad: bool) -> None:
    """Envelopes in random order, so that rows side by side have different DEKs where there are several."""
    uses = -(-shape.rows // deks)
    with session(cluster, *ONE_DEK, f"dek_max_uses = {uses}") as connection:
        value = "envelope_encrypt(v, aad => a)" if aad else "envelope_encrypt(v)"
        fill(connection, envelopes(kind, deks, aad), kind,
             f"SELECT a, v FROM (SELECT a, {value} AS v FROM plain_{kind}) s ORDER BY random()")


def fill(connection, table: str, kind: str, query: str) -> None:
    """Make a table and fill it. Values stay uncompressed: ciphertext does not compress, and trying takes time."""
    connection.execute(f"CREATE TABLE {table} (a text NOT NULL, v {kind})")
    connection.execute(f"ALTER TABLE {table} ALTER v SET STORAGE EXTERNAL")
    connection.execute(f"INSERT INTO {table} {query}")
    connection.execute(f"VACUUM (FREEZE, ANALYZE) {table}")


def header_length(connection, shape: Shape) -> int:
    """Bytes of an envelope before its payload."""
    return one(connection, f"SELECT max(octet_length(v)) FROM {envelopes('bytea', 1, False)}") - shape.size - 28
