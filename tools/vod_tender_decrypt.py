#!/usr/bin/env python3
"""Opens values that vod_tender_crypto has stored, without PostgreSQL.

For disaster recovery, and as an independent reading of docs/FORMAT.md, whose words it uses. Needs Python 3.9 and
`cryptography`; for AWS KMS also `boto3`, with its own credential chain.

    vod_tender_decrypt.py --kek main=/path/kek.b64 --aad twitch/chan1/access_token < stored
    vod_tender_decrypt.py --aws prod --region eu-west-1 < stored
    vod_tender_decrypt.py --info < stored

The plaintext goes to standard output as it is. Exit codes: 1 malformed, 2 does not verify, 3 a key is missing.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import hmac
import json
import os
import re
import stat
import sys
from dataclasses import dataclass, field
from typing import Callable, Dict, List, Optional, Tuple, Union

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

MAGIC = b"\x8fVT2"
SUITE = 1
FLAG_AAD = 1
PREFIX = "kms:v2:"
NONCE, TAG, COMMITMENT, KEY = 12, 16, 32, 32
PAYLOAD_MIN = NONCE + TAG
MAX_KEK_ID, MAX_WRAPPED, MAX_BLOB = 2048, 4096, 6144
KEY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
KEK_ID = re.compile(r"[\x21-\x7e]{1,%d}" % MAX_KEK_ID)


class Malformed(Exception):
    """The value is no valid encoding."""


class Unverified(Exception):
    """A tag, a commitment or an aad does not fit."""


class KeyUnavailable(Exception):
    """No key was given, or it cannot be used."""


@dataclass(frozen=True)
class Wrap:
    """One wrapped DEK."""

    key: str
    kek_id: str
    wrapped_dek: bytes = field(repr=False)


@dataclass(frozen=True)
class Envelope:
    """A parsed envelope; `bound` is the header from magic to the last context pair."""

    has_aad: bool
    context: Dict[str, str]
    wraps: List[Wrap]
    commitment: bytes
    payload: bytes
    bound: bytes


@dataclass(frozen=True)
class Literal:
    """The literal form: an AWS blob, whose DEK is the payload's key."""

    blob: bytes
    payload: bytes


# -- parsing ----------------------------------------------------------------------------------------------------


def parse(value: Union[str, bytes]) -> Union[Envelope, Literal, None]:
    """Parses a `text` (str) or `bytea` (bytes) value; None when it is not version 2."""
    if isinstance(value, bytes):
        return _parse_binary(value) if value.startswith(MAGIC) else None
    if value.startswith(PREFIX):
        return _parse_text(value)
    try:
        inner = decode_base64(value).decode("utf-8")
    except (Malformed, UnicodeDecodeError):
        return None
    return _parse_text(inner) if inner.startswith(PREFIX) else None


def decode_base64(text: str) -> bytes:
    """Canonical base64 only: standard alphabet, padding, zero trailing bits, no white space."""
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError, ValueError):
        raise Malformed("not base64") from None
    if base64.b64encode(data).decode() != text:
        raise Malformed("not canonical base64")
    return data


def _parse_text(text: str) -> Union[Envelope, Literal]:
    parts = text[len(PREFIX):].split(":")
    if len(parts) != 2:
        raise Malformed("not two parts")
    head, payload = (decode_base64(part) for part in parts)
    if len(payload) < PAYLOAD_MIN:
        raise Malformed("payload is cut off")
    if head.startswith(MAGIC):
        envelope, rest = _parse_header(head)
        if rest:
            raise Malformed("bytes behind the header")
        return Envelope(payload=payload, **envelope)
    if not 1 <= len(head) <= MAX_BLOB:
        raise Malformed("bad length of the blob")
    return Literal(head, payload)


def _parse_binary(data: bytes) -> Envelope:
    envelope, payload = _parse_header(data)
    if len(payload) < PAYLOAD_MIN:
        raise Malformed("payload is cut off")
    return Envelope(payload=payload, **envelope)


def _parse_header(data: bytes) -> Tuple[dict, bytes]:
    """The header's fields and the bytes behind it."""
    rest = data[len(MAGIC):]
    (suite, flags), rest = _take(rest, 2)
    if suite != SUITE:
        raise Malformed("unknown suite")
    if flags & ~FLAG_AAD:
        raise Malformed("unknown flags")
    pairs, rest = _take_counted(rest, 2)
    context = _parse_context(pairs)
    bound = data[: len(data) - len(rest)]
    wraps, rest = _parse_wraps(rest)
    commitment, rest = _take(rest, COMMITMENT)
    fields = {"has_aad": bool(flags & FLAG_AAD), "context": context, "wraps": wraps, "commitment": commitment,
              "bound": bound}
    return fields, rest


def _parse_context(pairs: bytes) -> Dict[str, str]:
    context: Dict[str, str] = {}
    last = None
    while pairs:
        name, pairs = _take_counted(pairs, 2)
        value, pairs = _take_counted(pairs, 2)
        if not name or (last is not None and last >= name):
            raise Malformed("context names are empty or out of order")
        last = name
        context[_text(name)] = _text(value)
    return context


def _parse_wraps(rest: bytes) -> Tuple[List[Wrap], bytes]:
    (count,), rest = _take(rest, 1)
    wraps: List[Wrap] = []
    for _ in range(count):
        name, rest = _take_counted(rest, 1)
        kek_id, rest = _take_counted(rest, 2)
        wrapped, rest = _take_counted(rest, 2)
        wraps.append(_wrap(name, kek_id, wrapped))
    if not wraps:
        raise Malformed("no wraps")
    if len({wrap.key for wrap in wraps}) != len(wraps):
        raise Malformed("a key name occurs twice")
    return wraps, rest


def _wrap(name: bytes, kek_id: bytes, wrapped: bytes) -> Wrap:
    key, kek = name.decode("latin-1"), kek_id.decode("latin-1")
    if not KEY_NAME.fullmatch(key) or not key.isascii():
        raise Malformed("bad key name")
    if not KEK_ID.fullmatch(kek):
        raise Malformed("bad KEK id")
    if not 1 <= len(wrapped) <= MAX_WRAPPED:
        raise Malformed("bad length of a wrapped DEK")
    return Wrap(key, kek, wrapped)


def _take(data: bytes, length: int) -> Tuple[bytes, bytes]:
    if len(data) < length:
        raise Malformed("cut off")
    return data[:length], data[length:]


def _take_counted(data: bytes, width: int) -> Tuple[bytes, bytes]:
    """A field that begins with its length in `width` bytes."""
    length, rest = _take(data, width)
    return _take(rest, int.from_bytes(length, "big"))


def _text(data: bytes) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise Malformed("context is not UTF-8") from None
    if "\0" in text:
        raise Malformed("context contains U+0000")
    return text


# -- cryptography -----------------------------------------------------------------------------------------------


def derive(key: bytes, info: bytes, length: int, salt: Optional[bytes] = None) -> bytes:
    """HKDF-SHA-256."""
    return HKDF(SHA256(), length, salt, info).derive(key)


def open_envelope(envelope: Envelope, dek: bytes, aad: Optional[str]) -> bytes:
    """The plaintext, when DEK, context and aad are the ones it was sealed with."""
    suite = bytes([SUITE])
    commitment = derive(dek, b"vod_tender_crypto/v2/commitment" + suite, COMMITMENT)
    if not hmac.compare_digest(commitment, envelope.commitment):
        raise Unverified("the data key is not the one that the envelope commits to")
    if envelope.has_aad != (aad is not None):
        raise Unverified("an aad is needed" if envelope.has_aad else "the value is not bound to an aad")
    key = derive(dek, b"vod_tender_crypto/v2/payload-key" + suite, KEY)
    return open_payload(key, envelope.payload, envelope.bound + (aad or "").encode())


def open_payload(key: bytes, payload: bytes, associated: bytes = b"") -> bytes:
    """Opens nonce || ciphertext || tag."""
    try:
        return AESGCM(key).decrypt(payload[:NONCE], payload[NONCE:], associated)
    except InvalidTag:
        raise Unverified("the tag does not fit") from None


def open_v1(value: Union[str, bytes], keys: List[bytes]) -> bytes:
    """Opens a version 1 value with whichever legacy key fits."""
    sealed = value if isinstance(value, bytes) else decode_base64(value)
    if len(sealed) < PAYLOAD_MIN:
        raise Malformed("shorter than nonce and tag")
    for key in keys:
        try:
            return open_payload(key, sealed)
        except Unverified:
            continue
    raise Unverified("the tag fits none of the legacy keys")


def unwrap_local(kek: bytes, wrap: Wrap, context: Dict[str, str]) -> bytes:
    """The DEK of a wrap under a local KEK."""
    kek_id = "local:" + derive(kek, b"vod_tender_crypto/local-kek/id", 8).hex()
    if wrap.kek_id != kek_id:
        raise Unverified(f"the data key was wrapped under {wrap.kek_id}, and the file holds {kek_id}")
    layout, salt, sealed = wrap.wrapped_dek[:1], wrap.wrapped_dek[1:33], wrap.wrapped_dek[33:]
    if layout != b"\x01" or len(sealed) != KEY + TAG:
        raise Unverified("the wrapped data key does not verify")
    material = derive(kek, b"vod_tender_crypto/local-kek/wrap", KEY + NONCE, salt)
    return open_payload(material[:KEY], material[KEY:] + sealed, encode_context(context))


def encode_context(context: Dict[str, str]) -> bytes:
    """Context length and pairs, as in a header."""
    counted = lambda data: len(data).to_bytes(2, "big") + data  # noqa: E731
    names = sorted((name.encode(), value.encode()) for name, value in context.items())
    return counted(b"".join(counted(name) + counted(value) for name, value in names))


def unwrap_aws(client, blob: bytes, context: Dict[str, str], kek_id: Optional[str]) -> bytes:
    """The DEK of an AWS KMS blob; pinned to `kek_id` where the envelope records one."""
    request = {"CiphertextBlob": blob}
    if context:
        request["EncryptionContext"] = context
    if kek_id is not None:
        request["KeyId"] = kek_id
    try:
        dek = client.decrypt(**request)["Plaintext"]
    except Exception as error:  # boto3's classes exist only with boto3
        code = getattr(error, "response", {}).get("Error", {}).get("Code", type(error).__name__)
        if code in ("InvalidCiphertextException", "IncorrectKeyException"):
            raise Unverified(f"AWS KMS: {code}") from None
        raise KeyUnavailable(f"AWS KMS: {code}") from None
    if len(dek) != KEY:
        raise Unverified("AWS KMS sent a data key that is not 32 bytes long")
    return dek


# -- command line -----------------------------------------------------------------------------------------------


def read_keys(path: str) -> List[bytes]:
    """Keys in a file, base64 of 32 bytes a line; only its owner may have access to it."""
    try:
        with open(path, "rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise KeyUnavailable(f"{path} is accessible to group or others; its mode must be 0600 or 0400")
            lines = file.read().decode("ascii").splitlines()
        keys = [decode_base64(line) for line in lines]
    except (OSError, UnicodeDecodeError, Malformed) as error:
        raise KeyUnavailable(f"{path} cannot be used: {type(error).__name__}") from None
    if not keys or any(len(key) != KEY for key in keys):
        raise KeyUnavailable(f"{path} does not hold base64 of 32 bytes")
    return keys


def find_dek(envelope: Envelope, unwrap: Dict[str, Callable[[Wrap, Dict[str, str]], bytes]]) -> bytes:
    """The DEK through the first wrap that opens, in order."""
    problem: Exception = KeyUnavailable("no key given for " + ", ".join(wrap.key for wrap in envelope.wraps))
    for wrap in envelope.wraps:
        if wrap.key in unwrap:
            try:
                return unwrap[wrap.key](wrap, envelope.context)
            except (Unverified, KeyUnavailable) as error:
                problem = error
    raise problem


def describe(value: Union[str, bytes], parsed: Union[Envelope, Literal, None]) -> dict:
    """What is not secret."""
    if isinstance(parsed, Envelope):
        wraps = [{"key": w.key, "kek_id": w.kek_id, "wrapped_dek_bytes": len(w.wrapped_dek)} for w in parsed.wraps]
        return {"version": 2, "form": "envelope", "context": parsed.context, "aad": parsed.has_aad, "wraps": wraps,
                "plaintext_bytes": len(parsed.payload) - PAYLOAD_MIN}
    if isinstance(parsed, Literal):
        return {"version": 2, "form": "literal", "plaintext_bytes": len(parsed.payload) - PAYLOAD_MIN}
    return {"version": None, "stored_bytes": len(value)}


def decrypt(value: Union[str, bytes], options: argparse.Namespace) -> bytes:
    """The plaintext of a stored value, with the keys that the options name."""
    parsed = parse(value)
    if parsed is None:
        if options.legacy_key_file is None:
            raise KeyUnavailable("the value is not an envelope; --legacy-key-file opens version 1")
        return open_v1(value, read_keys(options.legacy_key_file))
    client = aws_client(options) if options.aws else None
    if isinstance(parsed, Literal):
        if client is None:
            raise KeyUnavailable("the literal form needs --aws and its --context")
        return open_payload(unwrap_aws(client, parsed.blob, dict(options.context), None), parsed.payload)
    unwrap: Dict[str, Callable[[Wrap, Dict[str, str]], bytes]] = {}
    for name in options.aws:
        unwrap[name] = lambda wrap, context: unwrap_aws(client, wrap.wrapped_dek, context, wrap.kek_id)
    for name, path in options.kek:
        unwrap[name] = lambda wrap, context, path=path: unwrap_local(read_keys(path)[0], wrap, context)
    return open_envelope(parsed, find_dek(parsed, unwrap), options.aad)


def aws_client(options: argparse.Namespace):
    """A boto3 client with the standard credential chain."""
    try:
        import boto3
    except ImportError:
        raise KeyUnavailable("boto3 is not installed") from None
    return boto3.client("kms", region_name=options.region, endpoint_url=options.endpoint_url)


def _pair(text: str) -> Tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError("expected NAME=VALUE")
    return name, value


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Opens values stored by vod_tender_crypto, without PostgreSQL.")
    parser.add_argument("file", nargs="?", help="file with the stored value (standard input)")
    parser.add_argument("--binary", action="store_true", help="the value is bytea: raw bytes, or \\x and hexadecimal")
    parser.add_argument("--kek", type=_pair, action="append", default=[], metavar="NAME=FILE", help="a local KEK")
    parser.add_argument("--aws", action="append", default=[], metavar="NAME", help="a KEK in AWS KMS")
    parser.add_argument("--region", help="AWS region")
    parser.add_argument("--endpoint-url", help="AWS KMS endpoint")
    parser.add_argument("--aad", help="the aad that the value is bound to")
    parser.add_argument("--context", type=_pair, action="append", default=[], metavar="NAME=VALUE",
                        help="a pair of the literal form's encryption context")
    parser.add_argument("--legacy-key-file", metavar="FILE", help="legacy keys, for version 1")
    parser.add_argument("--info", action="store_true", help="print what is not secret, as JSON")
    return parser


def _read_value(options: argparse.Namespace) -> Union[str, bytes]:
    if options.file:
        with open(options.file, "rb") as file:
            data = file.read()
    else:
        data = sys.stdin.buffer.read()
    if options.binary:
        return bytes.fromhex(data[2:].decode().strip()) if data.startswith(b"\\x") else data
    # One newline is the shell's or the editor's, not the value's.
    return data.decode("utf-8").removesuffix("\n")


def main() -> int:
    """Runs the command line; gives the exit code."""
    options = _arguments().parse_args()
    try:
        value = _read_value(options)
        if options.info:
            print(json.dumps(describe(value, parse(value)), indent=2, ensure_ascii=False))
        else:
            sys.stdout.buffer.write(decrypt(value, options))
        return 0
    except (Malformed, UnicodeDecodeError, ValueError) as error:
        print(f"malformed: {error if isinstance(error, Malformed) else 'not a stored value'}", file=sys.stderr)
        return 1
    except Unverified as error:
        print(f"does not verify: {error}", file=sys.stderr)
        return 2
    except (KeyUnavailable, OSError) as error:
        print(f"key unavailable: {error}", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main())
