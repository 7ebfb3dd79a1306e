#!/usr/bin/env python3
"""Opens values that vod_tender_crypto has stored, without PostgreSQL.

For disaster recovery; an independent reading of docs/FORMAT.md. Needs Python 3.9, `cryptography`, for AWS KMS `boto3`.

    vod_tender_decrypt.py --kek main=/path/kek.b64 --aad twitch/chan1/access_token < stored
    vod_tender_decrypt.py --aws prod --region eu-west-1 < stored
    vod_tender_decrypt.py --info < stored

The plaintext goes to standard output as it is. Exit codes: 1 malformed, 2 does not verify, 3 a key is missing; and
64 wrong usage or no input. Errors are one line and name no plaintext and no key.
"""

import argparse
import base64
import hmac
import json
import os
import re
import stat
import sys
from dataclasses import dataclass, field
from io import BytesIO
from typing import Callable, Dict, List, Optional, Tuple, Union

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

MAGIC = b"\x8fVT2"
SUITE, FLAG_AAD = 1, 1
PREFIX = "kms:v2:"
NONCE, TAG, COMMITMENT, KEY = 12, 16, 32, 32
PAYLOAD_MIN = NONCE + TAG
MAX_KEK_ID, MAX_WRAPPED, MAX_BLOB, MAX_LEGACY = 2048, 4096, 6144, 64
KEY_NAME = re.compile(rb"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
KEK_ID = re.compile(rb"[\x21-\x7e]{1,%d}" % MAX_KEK_ID)
HEX = re.compile(rb"\\x((?:[0-9a-fA-F]{2})*)\n?")  # how psql writes bytea


class Failure(Exception):
    """Why there is no plaintext; shown as it is, so it names no secret."""
    code, title = 64, "usage"


class Malformed(Failure):
    """The value is no valid encoding."""
    code, title = 1, "malformed"


class Unverified(Failure):
    """A tag, a commitment or an aad does not fit."""
    code, title = 2, "does not verify"


class KeyUnavailable(Failure):
    """No key was given, or it cannot be used."""
    code, title = 3, "key unavailable"


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


# Gives the DEK of an envelope's wrap.
Unwrap = Callable[[Wrap, Envelope], bytes]


def parse(value: Union[str, bytes]) -> Union[Envelope, Literal, None]:
    """Parses a `text` (str) or `bytea` (bytes) value; None when it is not version 2. Raises Malformed."""
    if isinstance(value, bytes):
        return _parse_envelope(value) if value.startswith(MAGIC) else None
    if value.startswith(PREFIX):
        return _parse_text(value)
    try:
        inner = decode_base64(value)
    except Malformed:
        return None
    # Latin-1 keeps every byte; one beyond ASCII is then refused as base64.
    return _parse_text(inner.decode("latin-1")) if inner.startswith(PREFIX.encode()) else None


def decode_base64(text: str) -> bytes:
    """Canonical base64 only: standard alphabet, padding, zero trailing bits, no white space."""
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except ValueError:
        raise Malformed("not base64") from None
    if base64.b64encode(data).decode() != text:
        raise Malformed("not canonical base64")
    return data


def _parse_text(text: str) -> Union[Envelope, Literal]:
    parts = [decode_base64(part) for part in text[len(PREFIX):].split(":")]
    if len(parts) != 2:
        raise Malformed("not two parts")
    if parts[0].startswith(MAGIC):
        return _parse_envelope(parts[0], _payload(parts[1]))
    if not 1 <= len(parts[0]) <= MAX_BLOB:
        raise Malformed("bad length of the blob")
    return Literal(parts[0], _payload(parts[1]))


def _payload(data: bytes) -> bytes:
    if len(data) < PAYLOAD_MIN:
        raise Malformed("payload is cut off")
    return data


def _take(data: BytesIO, length: int) -> bytes:
    taken = data.read(length)
    if len(taken) < length:
        raise Malformed("cut off")
    return taken


def _counted(data: BytesIO, width: int) -> bytes:
    """A field that begins with its length in `width` bytes."""
    return _take(data, int.from_bytes(_take(data, width), "big"))


def _parse_envelope(value: bytes, payload: Optional[bytes] = None) -> Envelope:
    """An envelope from its binary form, or from header and payload; `value` begins with the magic."""
    data = BytesIO(value)
    suite, flags = _take(data, len(MAGIC) + 2)[len(MAGIC):]
    if suite != SUITE or flags & ~FLAG_AAD:
        raise Malformed("unknown suite or flags")
    context = _parse_context(_counted(data, 2))
    bound = value[:data.tell()]
    wraps, commitment, rest = _parse_wraps(data), _take(data, COMMITMENT), data.read()
    if payload is not None and rest:
        raise Malformed("bytes behind the header")
    return Envelope(flags == FLAG_AAD, context, wraps, commitment, payload or _payload(rest), bound)


def _parse_context(pairs: bytes) -> Dict[str, str]:
    context: Dict[str, str] = {}
    data, last = BytesIO(pairs), b""
    while data.tell() < len(pairs):
        name, value = _counted(data, 2), _counted(data, 2)
        # No name sorts before the empty one, so this refuses an empty name too.
        if name <= last:
            raise Malformed("context names are empty or out of order")
        last = name
        context[_text(name)] = _text(value)
    return context


def _parse_wraps(data: BytesIO) -> List[Wrap]:
    (count,) = _take(data, 1)
    wraps = [_wrap(_counted(data, 1), _counted(data, 2), _counted(data, 2)) for _ in range(count)]
    if not wraps or len({wrap.key for wrap in wraps}) != len(wraps):
        raise Malformed("no wraps, or a key name twice")
    return wraps


def _wrap(name: bytes, kek_id: bytes, wrapped: bytes) -> Wrap:
    if not KEY_NAME.fullmatch(name) or not KEK_ID.fullmatch(kek_id) or not 1 <= len(wrapped) <= MAX_WRAPPED:
        raise Malformed("bad key name, KEK id or length of a wrapped DEK")
    return Wrap(name.decode(), kek_id.decode(), wrapped)


def _text(data: bytes) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise Malformed("context is not UTF-8") from None
    if "\0" in text:
        raise Malformed("context contains U+0000")
    return text


def derive(key: bytes, info: bytes, length: int, salt: Optional[bytes] = None) -> bytes:
    """HKDF-SHA-256."""
    return HKDF(SHA256(), length, salt, info).derive(key)


def open_envelope(envelope: Envelope, dek: bytes, aad: Optional[str]) -> bytes:
    """The plaintext, when DEK, context and aad are the ones it was sealed with. Raises Unverified."""
    check_commitment(envelope, dek)
    if envelope.has_aad != (aad is not None):
        raise Unverified("an aad is needed" if envelope.has_aad else "the value is not bound to an aad")
    # Lone surrogates, which is how Python shows arguments that are not UTF-8, then fit no tag.
    key = derive(dek, b"vod_tender_crypto/v2/payload-key\x01", KEY)
    return open_payload(key, envelope.payload, envelope.bound + (aad or "").encode(errors="surrogatepass"))


def check_commitment(envelope: Envelope, dek: bytes) -> None:
    """Raises Unverified when a DEK is not the one that the envelope commits to."""
    commitment = derive(dek, b"vod_tender_crypto/v2/commitment\x01", COMMITMENT)
    if len(dek) != KEY or not hmac.compare_digest(commitment, envelope.commitment):
        raise Unverified("the data key is not the one that the envelope commits to")


def open_payload(key: bytes, payload: bytes, associated: bytes = b"") -> bytes:
    """Opens nonce || ciphertext || tag."""
    try:
        return AESGCM(key).decrypt(payload[:NONCE], payload[NONCE:], associated)
    except InvalidTag:
        raise Unverified("the tag does not fit") from None


def open_v1(value: Union[str, bytes], keys: List[bytes]) -> bytes:
    """Opens a version 1 value with whichever legacy key fits. Raises Malformed, Unverified."""
    if value[:len(MAGIC)] == MAGIC:
        raise Malformed("an envelope is not version 1")
    sealed = value if isinstance(value, bytes) else decode_base64(value)
    if len(sealed) < PAYLOAD_MIN:
        raise Malformed("shorter than nonce and tag")
    for key in keys:
        try:
            return open_payload(key, sealed)
        except Unverified:
            continue
    raise Unverified("the tag fits none of the legacy keys")


def unwrap_local(kek: bytes, wrap: Wrap, envelope: Envelope) -> bytes:
    """The DEK (32 bytes) of a wrap under a local KEK of 32 bytes. Raises Unverified."""
    kek_id = "local:" + derive(kek, b"vod_tender_crypto/local-kek/id", 8).hex()
    if wrap.kek_id != kek_id:
        raise Unverified(f"the data key was wrapped under {wrap.kek_id}, and the file holds {kek_id}")
    layout, salt, sealed = wrap.wrapped_dek[:1], wrap.wrapped_dek[1:33], wrap.wrapped_dek[33:]
    if layout != b"\x01" or len(sealed) != KEY + TAG:
        raise Unverified("the wrapped data key does not verify")
    material = derive(kek, b"vod_tender_crypto/local-kek/wrap", KEY + NONCE, salt)
    return open_payload(material[:KEY], material[KEY:] + sealed, envelope.bound[len(MAGIC) + 2:])


def unwrap_aws(client, blob: bytes, context: Dict[str, str], kek_id: Optional[str]) -> bytes:
    """The DEK (32 bytes) of a blob, under the key `kek_id` unless that is None. Raises Unverified, KeyUnavailable."""
    request = {"CiphertextBlob": blob}
    if context:
        request["EncryptionContext"] = context
    if kek_id is not None:
        request["KeyId"] = kek_id
    try:
        dek = client.decrypt(**request)["Plaintext"]
    except Exception as error:  # boto3's classes exist only with boto3
        code = getattr(error, "response", {}).get("Error", {}).get("Code", type(error).__name__)
        refused = code in ("InvalidCiphertextException", "IncorrectKeyException")
        raise (Unverified if refused else KeyUnavailable)(f"AWS KMS: {code}") from None
    if len(dek) != KEY:
        raise Unverified("AWS KMS sent a data key that is not 32 bytes long")
    return dek


def read_keys(path: str, most: int) -> List[bytes]:
    """Keys in a file, base64 of 32 bytes a line; only its owner may have access to it. Raises KeyUnavailable.

    No error names the path: it may be a key that was given in place of one.
    """
    try:
        with open(path, "rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise KeyUnavailable("the key file is accessible to group or others; its mode must be 0600 or 0400")
            lines = file.read().decode("latin-1").removesuffix("\n").split("\n")
        keys = [decode_base64(line) for line in lines]
    except OSError as error:
        raise KeyUnavailable(f"the key file cannot be read: {error.strerror}") from None
    except Malformed:
        keys = []
    if not 1 <= len(keys) <= most or any(len(key) != KEY for key in keys):
        raise KeyUnavailable(f"the key file does not hold {'one key' if most == 1 else 'keys'}: base64 of 32 bytes")
    return keys


def find_dek(envelope: Envelope, unwrap: Dict[str, Unwrap]) -> bytes:
    """The DEK through the first wrap that opens, in order. Raises what the last of them raised."""
    problem: Exception = KeyUnavailable("no key given for " + ", ".join(wrap.key for wrap in envelope.wraps))
    for wrap in envelope.wraps:
        if wrap.key in unwrap:
            try:
                dek = unwrap[wrap.key](wrap, envelope)
                check_commitment(envelope, dek)
                return dek
            except (Unverified, KeyUnavailable) as error:
                problem = type(error)(f"{wrap.key}: {error}")
    raise problem


def describe(value: Union[str, bytes], parsed: Union[Envelope, Literal, None]) -> dict:
    """What is not secret."""
    if parsed is None:
        return {"version": None, "form": "version 1 or plaintext", "stored_length": len(value)}
    info = {"version": 2, "form": type(parsed).__name__.lower(), "plaintext_bytes": len(parsed.payload) - PAYLOAD_MIN}
    if isinstance(parsed, Envelope):
        wraps = [{"key": wrap.key, "kek_id": wrap.kek_id} for wrap in parsed.wraps]
        info.update(context=parsed.context, aad=parsed.has_aad, wraps=wraps)
    return info


def decrypt(value: Union[str, bytes], options: argparse.Namespace) -> bytes:
    """The plaintext of a stored value, with the keys that the options name."""
    parsed = parse(value)
    if parsed is None:
        if options.legacy_key_file is None:
            raise KeyUnavailable("the value is not an envelope; --legacy-key-file opens version 1")
        return open_v1(value, read_keys(options.legacy_key_file, MAX_LEGACY))
    if isinstance(parsed, Literal):
        if not options.aws:
            raise KeyUnavailable("the literal form needs --aws and its --context")
        return open_payload(unwrap_aws(aws_client(options), parsed.blob, dict(options.context), None), parsed.payload)
    ask = lambda wrap, it: unwrap_aws(aws_client(options), wrap.wrapped_dek, it.context, wrap.kek_id)  # noqa: E731
    unwrap: Dict[str, Unwrap] = dict.fromkeys(options.aws, ask)
    for name, path in options.kek:
        # Read when its turn comes: a file that is gone must not stand in the way of one that opens the value.
        unwrap[name] = lambda wrap, it, path=path: unwrap_local(read_keys(path, 1)[0], wrap, it)
    return open_envelope(parsed, find_dek(parsed, unwrap), options.aad)


def aws_client(options: argparse.Namespace):
    """A boto3 client with the standard credential chain. Raises KeyUnavailable."""
    try:
        import boto3
        return boto3.client("kms", region_name=options.region, endpoint_url=options.endpoint_url)
    except Exception as error:  # not installed, no region, a profile that is not there
        raise KeyUnavailable(f"boto3: {type(error).__name__}") from None


class _Parser(argparse.ArgumentParser):
    """Wrong usage has its own exit code and one line; what was given may be secret and is not repeated."""

    def error(self, message: str):
        self.exit(64, f"usage: {'unrecognized arguments' if message.startswith('unrecognized') else message}\n")


def _pair(text: str) -> Tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError("expected NAME=VALUE")
    return name, value


def _arguments() -> argparse.ArgumentParser:
    parser = _Parser(allow_abbrev=False, description="Opens values stored by vod_tender_crypto, without PostgreSQL.")
    parser.add_argument("file", nargs="?", help="file with the stored value (standard input)")
    parser.add_argument("--binary", action="store_true", help="the value is bytea: raw bytes, or \\x and hexadecimal")
    parser.add_argument("--kek", type=_pair, action="append", default=[], metavar="NAME=FILE", help="a local KEK")
    parser.add_argument("--aws", action="append", default=[], metavar="NAME", help="a KEK in AWS KMS")
    parser.add_argument("--region", help="AWS region")
    parser.add_argument("--endpoint-url", help="AWS KMS endpoint")
    parser.add_argument("--aad", help="the aad that the value is bound to")
    parser.add_argument("--context", type=_pair, action="append", default=[], metavar="K=V", help="for literal forms")
    parser.add_argument("--legacy-key-file", metavar="FILE", help="legacy keys, for version 1")
    parser.add_argument("--info", action="store_true", help="print what is not secret, as JSON")
    return parser


def _read_value(options: argparse.Namespace) -> Union[str, bytes]:
    try:
        with (open(options.file, "rb") if options.file else sys.stdin.buffer) as file:
            data = file.read()
    except OSError as error:
        raise Failure(f"the value cannot be read: {error.strerror}") from None
    if options.binary:
        written = HEX.fullmatch(data)
        return bytes.fromhex(written[1].decode()) if written else data
    try:
        # One newline is the shell's or the editor's, not the value's.
        return data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError:
        raise Malformed("not text; --binary reads bytea") from None


def main() -> int:
    """Runs the command line; gives the exit code."""
    options = _arguments().parse_args()
    try:
        value = _read_value(options)
        if options.info:
            output = json.dumps(describe(value, parse(value)), indent=2).encode() + b"\n"
        else:
            output = decrypt(value, options)
    except Failure as failure:
        print(f"{failure.title}: {failure}", file=sys.stderr)
        return failure.code
    try:
        sys.stdout.buffer.write(output)
        sys.stdout.buffer.flush()
    except OSError as error:
        print(f"the result cannot be written: {error.strerror}", file=sys.stderr)
        return Failure.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
