"""Small things that many tests need."""

from __future__ import annotations

import base64
import json
import secrets
from pathlib import Path

VECTORS = Path(__file__).resolve().parent.parent / "vectors"


def v1_vectors() -> dict:
    """The legacy format's vectors."""
    return json.loads((VECTORS / "v1.json").read_text())


def new_key() -> str:
    """base64 of 32 random bytes: a KEK file's or a legacy key's content."""
    return base64.b64encode(secrets.token_bytes(32)).decode()


def add_local_key(database, connection, name: str = "main", context: str = "{}", default: bool = True) -> str:
    """Configure a KEK in a file of its own; gives the file's path."""
    path = database.server_file(f"{name}-{secrets.token_hex(4)}.b64", new_key() + "\n")
    connection.execute("SELECT vod_tender_crypto.add_key(%s, %s, %s::jsonb)", [name, f"local://{path}", context])
    if default:
        connection.execute(f"SET vod_tender_crypto.default_key = '{name}'")
    return path


def one(connection, query: str, *parameters):
    """The single value of a query."""
    row = connection.execute(query, list(parameters)).fetchone()
    return row[0]


def calls(connection, service: str = "aws-kms") -> "dict[str, int]":
    """This session's calls by operation, whatever their outcome."""
    stats = one(connection, "SELECT vod_tender_crypto.session_stats()")
    operations = stats["calls"].get(service, {})
    return {name: sum(each["calls"] for each in outcomes.values()) for name, outcomes in operations.items()}


def payload(armored: str) -> str:
    """The payload part of an armored envelope."""
    return armored.rsplit(":", 1)[1]


def binary(armored: str) -> bytes:
    """An armored envelope in binary form."""
    head, body = armored[len("kms:v2:"):].split(":")
    return base64.b64decode(head) + base64.b64decode(body)


def armor(envelope: bytes, payload_bytes: int) -> str:
    """A binary envelope, whose payload has so many bytes, in armored form."""
    cut = len(envelope) - payload_bytes
    head, body = envelope[:cut], envelope[cut:]
    return f"kms:v2:{base64.b64encode(head).decode()}:{base64.b64encode(body).decode()}"


def lengthened(header: bytes, wraps: int = 5) -> bytes:
    """The header of an envelope with one wrap, and behind that as many more of 4,000 bytes under names of no key."""
    at = 6 + 2 + int.from_bytes(header[6:8], "big")
    assert header[at] == 1
    more = b"".join(bytes([4]) + b"w%03d" % n + (1).to_bytes(2, "big") + b"k" + (4000).to_bytes(2, "big") + bytes(4000)
                    for n in range(wraps))
    return header[:at] + bytes([1 + wraps]) + header[at + 1:-32] + more + header[-32:]
