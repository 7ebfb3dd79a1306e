"""Taking an envelope apart and putting it together as somebody would who holds no key (docs/FORMAT.md)."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from helpers import armor, binary

COMMITMENT_BYTES = 32
NONCE_AND_TAG_BYTES = 28


@dataclass(frozen=True)
class Wrap:
    """One wrapped data key."""

    name: str
    kek_id: str
    wrapped: bytes


@dataclass(frozen=True)
class Envelope:
    """An envelope's parts. `with_(...)` gives a changed one, `text()` the stored form."""

    start: bytes
    context: "tuple[tuple[str, str], ...]"
    wraps: "tuple[Wrap, ...]"
    commitment: bytes
    payload: bytes

    @classmethod
    def of(cls, armored: str) -> "Envelope":
        data = binary(armored)
        at = 6
        length, = struct.unpack_from(">H", data, at)
        at, end, strings = at + 2, at + 2 + length, []
        while at < end:
            piece, at = _take(data, at, ">H")
            strings.append(piece.decode())
        count, at, wraps = data[at], at + 1, []
        for _ in range(count):
            name, at = _take(data, at, ">B")
            kek_id, at = _take(data, at, ">H")
            wrapped, at = _take(data, at, ">H")
            wraps.append(Wrap(name.decode(), kek_id.decode(), wrapped))
        context = tuple(zip(strings[::2], strings[1::2]))
        return cls(data[:6], context, tuple(wraps), data[at:at + COMMITMENT_BYTES], data[at + COMMITMENT_BYTES:])

    def with_(self, **changes) -> "Envelope":
        """The same with other parts."""
        return replace(self, **changes)

    def wrap(self, **changes) -> Wrap:
        """Its first wrap with other parts."""
        return replace(self.wraps[0], **changes)

    def named(self, key: str) -> "Envelope":
        """The same, said to be under another key."""
        return self.with_(wraps=(self.wrap(name=key),))

    def text(self) -> str:
        """The stored form."""
        context = b"".join(_put(string, ">H") for pair in self.context for string in pair)
        wraps = b"".join(_put(w.name, ">B") + _put(w.kek_id, ">H") + _put(w.wrapped, ">H") for w in self.wraps)
        head = self.start + struct.pack(">H", len(context)) + context + bytes([len(self.wraps)]) + wraps
        return armor(head + self.commitment + self.payload, len(self.payload))


def _take(data: bytes, at: int, form: str) -> "tuple[bytes, int]":
    length, = struct.unpack_from(form, data, at)
    at += struct.calcsize(form)
    return data[at:at + length], at + length


def _put(piece: "str | bytes", form: str) -> bytes:
    piece = piece.encode() if isinstance(piece, str) else piece
    return struct.pack(form, len(piece)) + piece
