#!/usr/bin/env python3
"""Makes the vectors in tests/vectors/ from docs/FORMAT.md: always the same bytes.

Keys, salts and nonces come from hashes of labels, so that the files can be made again and compared. Real ones are
random; nothing here is fit for sealing a value.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from pathlib import Path
from typing import Dict, List, Optional

from cryptography.hazmat.primitives.ciphers.aead import AESGCM


MAGIC, PREFIX = bytes.fromhex("8f565432"), "kms:v2:"
VECTORS = Path(__file__).resolve().parent.parent / "tests" / "vectors"
KEKS = {name: hashlib.sha256(f"kek {name}".encode()).digest() for name in ("main", "spare")}


def fixed(label: str, length: int) -> bytes:
    """`length` bytes that depend on the label only."""
    return hashlib.sha512(label.encode()).digest()[:length]


def b64(data: bytes) -> str:
    """Standard base64."""
    return base64.b64encode(data).decode()


def counted(data: bytes, width: int = 2) -> bytes:
    """A field behind its length."""
    return len(data).to_bytes(width, "big") + data


def derive(key: bytes, info: bytes, length: int, salt: bytes = bytes(32)) -> bytes:
    """HKDF-SHA-256 from RFC 5869's own words: the decoder uses a library's, so each checks the other."""
    extracted, block, output = hmac.digest(salt, key, "sha256"), b"", b""
    for number in range(1, -(-length // 32) + 1):
        block = hmac.digest(extracted, block + info + bytes([number]), "sha256")
        output += block
    return output[:length]


def encode_context(context: Dict[str, str]) -> bytes:
    """Context length and pairs, ordered by the names' bytes."""
    pairs = sorted((name.encode(), value.encode()) for name, value in context.items())
    return counted(b"".join(counted(name) + counted(value) for name, value in pairs))


def local_wrap(name: str, label: str, dek: bytes, context: bytes) -> "tuple[str, str, bytes]":
    """Key name, KEK id and wrapped DEK under a local KEK; `context` in its encoding."""
    kek, salt = KEKS[name], fixed(f"salt {label} {name}", 32)
    material = derive(kek, b"vod_tender_crypto/local-kek/wrap", 44, salt)
    sealed = AESGCM(material[:32]).encrypt(material[32:], dek, context)
    return name, "local:" + derive(kek, b"vod_tender_crypto/local-kek/id", 8).hex(), b"\x01" + salt + sealed


def bound_prefix(aad: Optional[str], context: bytes, suite: int = 1, flags: Optional[int] = None) -> bytes:
    """Magic to context."""
    flags = int(aad is not None) if flags is None else flags
    return MAGIC + bytes([suite, flags]) + context


def header(bound: bytes, wraps, commitment: bytes, count: Optional[int] = None) -> bytes:
    """A whole header; nothing is checked, so that wrong ones can be made."""
    encoded = b"".join(counted(name.encode("latin-1"), 1) + counted(kek_id.encode("latin-1")) + counted(wrapped)
                       for name, kek_id, wrapped in wraps)
    return bound + bytes([len(wraps) if count is None else count]) + encoded + commitment


def armor(head: bytes, payload: bytes) -> str:
    """The armored form."""
    return f"{PREFIX}{b64(head)}:{b64(payload)}"


class Sample:
    """One envelope and its parts."""

    def __init__(self, label: str, plaintext: bytes, context: Dict[str, str], aad: Optional[str] = None,
                 under=("main",)):
        self.label, self.plaintext, self.context, self.aad = label, plaintext, context, aad
        self.dek, self.nonce = fixed(f"dek {label}", 32), fixed(f"nonce {label}", 12)
        encoded = encode_context(context)
        self.wraps = [local_wrap(name, label, self.dek, encoded) if name in KEKS else
                      (name, "arn:aws:kms:eu-west-1:111122223333:key/0a1b2c3d-0000-4000-8000-000000000000",
                       fixed(f"blob {label}", 64) * 2) for name in under]
        self.bound = bound_prefix(aad, encoded)
        self.commitment = derive(self.dek, b"vod_tender_crypto/v2/commitment\x01", 32)
        self.header = header(self.bound, self.wraps, self.commitment)
        key = derive(self.dek, b"vod_tender_crypto/v2/payload-key\x01", 32)
        self.payload = self.nonce + AESGCM(key).encrypt(self.nonce, plaintext, self.bound + (aad or "").encode())

    def vector(self, why: str, form: str = "envelope") -> dict:
        """The sample as an entry of envelope.json."""
        armored = armor(self.header, self.payload)
        return {
            "name": self.label, "why": why, "form": form, "context": self.context, "aad": self.aad,
            "wraps": [{"key": name, "kek_id": kek_id, "wrapped_dek_hex": wrapped.hex()}
                      for name, kek_id, wrapped in self.wraps],
            "dek_hex": self.dek.hex(), "commitment_hex": self.commitment.hex(), **_plaintext(self.plaintext),
            "armored": b64(armored.encode()) if form == "base64-wrapped" else armored,
            "binary_hex": (self.header + self.payload).hex(),
        }


def _plaintext(data: bytes) -> dict:
    try:
        return {"plaintext_hex": data.hex(), "plaintext": data.decode()}
    except UnicodeDecodeError:
        return {"plaintext_hex": data.hex(), "plaintext": None}


APP = {"Application": "vod-tender", "Purpose": "oauth-token"}


def positive() -> List[dict]:
    """Envelopes that open."""
    unicode_context = {"tenant": "", "назначение": "ключ", "zz": "last", "A": "first"}
    # U+FF5E sorts before U+1F511 by bytes and behind it by UTF-16 units; a prefix sorts first; \u00e9 is not e\u0301.
    order_context = {"\U0001f511": "1", "\uff5e": "2", "aa": "3", "a": "4", "e\u0301": "5", "\u00e9": "6"}
    return [
        Sample("empty", b"", APP).vector("an empty plaintext"),
        Sample("one byte", b"x", APP).vector("the shortest plaintext with a byte"),
        Sample("token", b"ya29.a0AfH6SMBx-example", APP, "twitch/chan1/access_token").vector("as applications do"),
        Sample("unicode", "contraseña-ключ-鍵-🔑".encode(), APP, "ряд/1").vector("beyond ASCII"),
        Sample("4 KiB", b"t" * 4096, APP).vector("many blocks"),
        Sample("bytes", bytes(range(128, 256)), APP).vector("bytes that are no text"),
        Sample("no context", b"x", {}).vector("no context pairs"),
        Sample("many pairs", b"x", unicode_context).vector("pairs are ordered by bytes; a value may be empty"),
        Sample("order of names", b"x", order_context).vector("bytes, not characters or UTF-16 units, order the names"),
        Sample("U+0000", b"a\0b\n", APP, "a\nb").vector("nothing is trimmed or ends early"),
        Sample("empty aad", b"x", APP, "").vector("an aad of no bytes is an aad"),
        Sample("no aad", b"x", APP).vector("the flag is clear without an aad"),
        Sample("two wraps", b"x", APP, "row", ("elsewhere", "spare")).vector("the first KEK is not configured"),
        Sample("three wraps", b"x", APP, None, ("main", "elsewhere", "spare")).vector("any order"),
        Sample("wrapped once more", b"x", APP, "row").vector("base64 of an armored envelope", "base64-wrapped"),
        literal("literal", b"token"),
    ]


def literal(label: str, plaintext: bytes) -> dict:
    """The literal form, whose DEK is the payload's key."""
    dek, nonce, blob = fixed(f"dek {label}", 32), fixed(f"nonce {label}", 12), b"\x01\x02\x02\x00" + fixed(label, 60)
    payload = nonce + AESGCM(dek).encrypt(nonce, plaintext, b"")
    return {"name": label, "why": "an AWS blob in place of a header", "form": "literal", "context": APP, "aad": None,
            "wraps": [], "dek_hex": dek.hex(), "commitment_hex": None, **_plaintext(plaintext),
            "armored": armor(blob, payload), "binary_hex": None}


def negative() -> List[dict]:
    """Values that are refused, and how."""
    good = Sample("token", b"ya29.a0AfH6SMBx-example", APP, "twitch/chan1/access_token")
    other = Sample("no aad", b"x", APP)
    return _malformed_headers(good) + _malformed_texts(good) + _malformed_binaries(good) + _unverified(good, other)


def _entry(name: str, why: str, value, kind: str = "malformed", aad: Optional[str] = None) -> dict:
    stored = {"form": "text", "value": value} if isinstance(value, str) else {"form": "bytea", "value_hex": value.hex()}
    return {"name": name, "why": why, **stored, "aad": aad, "kind": kind}


def _both(name: str, why: str, head: bytes, payload: bytes) -> List[dict]:
    return [_entry(f"{name} (bytea)", why, head + payload), _entry(f"{name} (text)", why, armor(head, payload))]


def _malformed_headers(good: Sample) -> List[dict]:
    context, wrap = encode_context(APP), good.wraps[0]
    pair = lambda name, value: counted(name) + counted(value)  # noqa: E731
    contexts = [
        ("context out of order", counted(pair(b"b", b"") + pair(b"a", b""))),
        ("context name twice", counted(pair(b"a", b"1") + pair(b"a", b"2"))),
        ("context name empty", counted(pair(b"", b"x"))),
        ("NUL in a context name", counted(pair(b"a\0", b"x"))),
        ("NUL in a context value", counted(pair(b"a", b"\0"))),
        ("context not UTF-8", counted(pair(b"a", b"\xff"))),
        ("context pair cut off", counted(pair(b"a", b"x")[:-1])),
        ("context value of a surrogate", counted(pair(b"a", b"\xed\xa0\x80"))),
        ("context value with an overlong NUL", counted(pair(b"a", b"\xc0\x80"))),
        ("context length one too short", (len(context) - 3).to_bytes(2, "big") + context[2:]),
        ("context length one too long", (len(context) - 1).to_bytes(2, "big") + context[2:]),
        ("context length too long", (len(context) + 5000).to_bytes(2, "big") + context[2:]),
    ]
    wraps = [
        ("no wraps", []), ("key name twice", [wrap, wrap]), ("key name empty", [("", *wrap[1:])]),
        ("key name begins with a dash", [("-main", *wrap[1:])]), ("key name begins with a dot", [(".main", *wrap[1:])]),
        ("key name with a space", [("ma in", *wrap[1:])]),
        ("key name of 64 bytes", [("k" * 64, *wrap[1:])]), ("key name beyond ASCII", [("ma\xefn", *wrap[1:])]),
        ("KEK id empty", [(wrap[0], "", wrap[2])]), ("KEK id of 2049 bytes", [(wrap[0], "x" * 2049, wrap[2])]),
        ("KEK id with a space", [(wrap[0], "a b", wrap[2])]), ("KEK id beyond ASCII", [(wrap[0], "\xe9", wrap[2])]),
        ("KEK id with DEL", [(wrap[0], "a\x7f", wrap[2])]),
        ("KEK id with a newline", [(wrap[0], "a\n", wrap[2])]),
        ("wrapped DEK empty", [(*wrap[:2], b"")]), ("wrapped DEK of 4097 bytes", [(*wrap[:2], b"x" * 4097)]),
    ]
    made = [(name, header(bound_prefix(good.aad, encoded), [wrap], good.commitment)) for name, encoded in contexts]
    made += [(name, header(good.bound, each, good.commitment)) for name, each in wraps]
    made += [
        ("unknown suite", header(bound_prefix(good.aad, context, suite=2), [wrap], good.commitment)),
        ("suite zero", header(bound_prefix(good.aad, context, suite=0), [wrap], good.commitment)),
        ("reserved flag", header(bound_prefix(good.aad, context, flags=3), [wrap], good.commitment)),
        ("highest flag", header(bound_prefix(good.aad, context, flags=0x81), [wrap], good.commitment)),
        ("wrap count too high", header(good.bound, [wrap], good.commitment, count=2)),
    ]
    return [entry for name, head in made for entry in _both(name, name, head, good.payload)]


def _malformed_texts(good: Sample) -> List[dict]:
    text, head, payload = armor(good.header, good.payload), b64(good.header), b64(good.payload)
    # A payload whose base64 ends in two pads: its last character has four bits that must be zero.
    loose = b64(good.payload + bytes((1 - len(good.payload)) % 3))
    whole, loose_head = good.header + good.payload, head.rstrip("=")
    loose_head = loose_head[:-1] + chr(ord(loose_head[-1]) + 1) + head[len(loose_head):]
    trailing_bits = loose[:-3] + chr(ord(loose[-3]) + 1) + "=="
    texts = [
        ("header without commitment", armor(good.header[:-32], good.payload)),
        ("bytes behind the header", armor(good.header + b"\0", good.payload)),
        ("payload of 27 bytes", armor(good.header, good.payload[:27])),
        ("payload empty", f"{PREFIX}{head}:"), ("head empty", f"{PREFIX}:{payload}"),
        ("no colon", f"{PREFIX}{head}"), ("prefix alone", PREFIX), ("one colon too many", text + ":"),
        ("a third part", f"{text}:{payload}"), ("padding missing", f"{PREFIX}{head}:{loose.rstrip('=')}"),
        ("trailing bits", f"{PREFIX}{head}:{trailing_bits}"),
        ("newline behind", text + "\n"), ("space behind", text + " "),
        ("trailing bits in the header", f"{PREFIX}{loose_head}:{payload}"),
        ("padding missing in the header", f"{PREFIX}{head.rstrip('=')}:{payload}"),
        ("padding too long", f"{PREFIX}{head}:{loose}===="), ("payload in the header's part", armor(whole, b"")),
        ("space before the payload", f"{PREFIX}{head}: {payload}"),
        ("newline inside", f"{PREFIX}{head[:8]}\n{head[8:]}:{payload}"),
        ("URL alphabet", f"{PREFIX}{head}:-_{payload[2:]}"),
        ("blob of 6145 bytes", armor(b"\x01" * 6145, good.payload)),
        ("blob with a payload of 27 bytes", armor(b"\x01" * 8, good.payload[:27])),
        ("malformed inside base64", b64(f"{PREFIX}{head}".encode())),
    ]
    others = [("wrapped twice more", b64(b64(text.encode()).encode())), ("capital prefix", text.replace("kms", "KMS")),
              ("space before the prefix", " " + text)]
    return [_entry(name, name, value) for name, value in texts] + \
        [_entry(name, name, value, "other") for name, value in others]


def _malformed_binaries(good: Sample) -> List[dict]:
    whole = good.header + good.payload
    return [
        _entry("payload of 27 bytes (bytea)", "payload cut off", good.header + good.payload[:27]),
        _entry("header without commitment (bytea)", "the payload would be short", good.header[:-32] + good.payload),
        _entry("magic alone", "cut off", MAGIC), _entry("header alone", "no payload", good.header),
        _entry("a byte before the magic", "not version 2", b"\0" + whole, "other"),
        _entry("another magic", "not version 2", b"\x8fVT3" + whole[4:], "other"),
    ]


def _unverified(good: Sample, other: Sample) -> List[dict]:
    flip = lambda data, at: data[:at] + bytes([data[at] ^ 1]) + data[at + 1:]  # noqa: E731
    whole, aad = good.header + good.payload, good.aad
    blank, two = Sample("empty aad", b"x", APP, ""), Sample("token", good.plaintext, APP, aad, ("main", "spare"))
    renamed = good.header.replace(b"vod-tender", b"vod-tendeR") + good.payload
    changed = {**APP, "Purpose": "another"}
    anew = [local_wrap("main", "anew", good.dek, encode_context(changed))]
    cases = [
        ("another aad", whole, "twitch/chan2/access_token"),
        ("no aad given", whole, None), ("empty aad given", whole, ""),
        ("an aad given and none bound", other.header + other.payload, "row"),
        ("empty aad bound and none given", blank.header + blank.payload, None),
        ("no aad bound and an empty one given", other.header + other.payload, ""),
        ("tag changed", flip(whole, len(whole) - 1), aad), ("ciphertext changed", flip(whole, len(whole) - 20), aad),
        ("nonce changed", flip(whole, len(good.header)), aad),
        ("commitment changed", flip(whole, len(good.header) - 1), aad), ("context changed", renamed, aad),
        ("context changed and the DEK wrapped for it",
         header(bound_prefix(aad, encode_context(changed)), anew, good.commitment) + good.payload, aad),
        ("wrap count too low", header(good.bound, two.wraps, good.commitment, count=1) + good.payload, aad),
        ("aad flag cleared", flip(whole, 5), None), ("another payload", good.header + other.payload, aad),
        ("trailing byte", whole + b"\0", aad),
    ]
    made = [_entry(name, name, value, "unverified", with_aad) for name, value, with_aad in cases]
    name, kek_id, sealed = good.wraps[0]
    wraps = [
        ("another envelope's wrap", "its DEK is not the one committed to", other.wraps),
        ("a wrap for another context", "the context is bound to the wrap", anew),
        ("wrapped DEK changed", "its tag does not fit", [(name, kek_id, flip(sealed, 80))]),
        ("salt of the wrap changed", "another key comes from it", [(name, kek_id, flip(sealed, 1))]),
    ]
    return made + [_entry(title, why, header(good.bound, each, good.commitment) + good.payload, "unopenable", aad)
                   for title, why, each in wraps]


def files() -> Dict[str, str]:
    """Name and content of every file."""
    keks = {name: b64(kek) for name, kek in KEKS.items()}
    about = "Made by tools/make_vectors.py from docs/FORMAT.md. Keys and nonces are fixed for this purpose only."
    dump = lambda vectors: json.dumps({"about": about, "keks": keks, "vectors": vectors},  # noqa: E731
                                      indent=1, ensure_ascii=False) + "\n"
    return {"envelope.json": dump(positive()), "envelope_negative.json": dump(negative())}


if __name__ == "__main__":
    for file_name, content in files().items():
        (VECTORS / file_name).write_text(content, encoding="utf-8")
