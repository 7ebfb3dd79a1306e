"""The keys, aliases and ciphertext blobs of the strict KMS server; no network in here."""

from __future__ import annotations

import datetime
import hashlib
import os
import re
import threading
import uuid
from dataclasses import dataclass, field
from typing import Mapping, Optional

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

# A blob is: MAGIC | SHA-256 of the key's ARN (32) | filler (51) | key id (36) | nonce (12) | sealed.
# Magic and total length (184 bytes for a 32-byte data key) are those of the real service's blobs; the
# layout behind the magic is undocumented there, so nothing may depend on it.
MAGIC = bytes.fromhex("0102020078")
_FILLER = 51
_KEY_ID_AT = len(MAGIC) + 32 + _FILLER
_NONCE_AT = _KEY_ID_AT + 36
_SEALED_AT = _NONCE_AT + 12
_TAG = 16

MAX_CONTEXT = 8192


class KmsError(Exception):
    """An error answer: the exception's type, its message (None: the answer has none), HTTP status."""

    def __init__(self, type_: str, message: Optional[str] = None, status: int = 400):
        super().__init__(f"{type_}: {message}")
        self.type = type_
        self.message = message
        self.status = status


@dataclass
class Key:
    """One symmetric KMS key."""

    id: str
    arn: str
    description: str = ""
    state: str = "Enabled"
    created: float = 0.0
    deletion: Optional[float] = None
    material: bytes = field(default_factory=lambda: os.urandom(32), repr=False)

    def require_usable(self) -> None:
        """Refuse a disabled key, and one that waits for its deletion, in the service's words."""
        if self.state == "Disabled":
            raise KmsError("DisabledException", f"{self.arn} is disabled.")
        self.require_kept()

    def require_kept(self) -> None:
        """Refuse a key that waits for its deletion."""
        if self.state == "PendingDeletion":
            raise KmsError("KMSInvalidStateException", f"{self.arn} is pending deletion.")

    def metadata(self) -> dict:
        """The KeyMetadata structure of CreateKey and DescribeKey."""
        described = {
            "AWSAccountId": self.arn.split(":")[4],
            "KeyId": self.id,
            "Arn": self.arn,
            "CreationDate": self.created,
            "Enabled": self.state == "Enabled",
            "Description": self.description,
            "KeyUsage": "ENCRYPT_DECRYPT",
            "KeyState": self.state,
            "Origin": "AWS_KMS",
            "KeyManager": "CUSTOMER",
            "CustomerMasterKeySpec": "SYMMETRIC_DEFAULT",
            "KeySpec": "SYMMETRIC_DEFAULT",
            "EncryptionAlgorithms": ["SYMMETRIC_DEFAULT"],
            "MultiRegion": False,
        }
        if self.deletion is not None:
            described["DeletionDate"] = self.deletion
        return described


class Keyring:
    """Keys and aliases of one account in one region. Every method may be called from any thread."""

    def __init__(self, region: str, account: str):
        self._prefix = f"arn:aws:kms:{region}:{account}:"
        self._keys: "dict[str, Key]" = {}
        self._aliases: "dict[str, str]" = {}
        self._lock = threading.RLock()

    # -- keys and aliases ---------------------------------------------------------------------------

    def create_key(self, description: str = "") -> Key:
        """A new enabled key."""
        key_id = str(uuid.uuid4())
        key = Key(key_id, f"{self._prefix}key/{key_id}", description, created=_now())
        with self._lock:
            self._keys[key_id] = key
        return key

    def create_alias(self, alias: str, key: str) -> None:
        """A new alias; the name must be free."""
        with self._lock:
            target = self.key(key)
            _check_alias_name(alias)
            if alias in self._aliases:
                arn = self._prefix + alias
                raise KmsError("AlreadyExistsException", f"An alias with the name {arn} already exists")
            self._aliases[alias] = target.id

    def update_alias(self, alias: str, key: str) -> None:
        """Point an alias that exists to another key."""
        with self._lock:
            target = self.key(key)
            if alias not in self._aliases:
                raise self._alias_not_found(alias)
            self._aliases[alias] = target.id

    def set_enabled(self, key: str, enabled: bool) -> None:
        """Enable or disable a key."""
        found = self.key(key)
        found.require_kept()
        found.state = "Enabled" if enabled else "Disabled"

    def schedule_deletion(self, key: str, days: int = 30) -> Key:
        """Mark a key for deletion, which makes it unusable at once."""
        found = self.key(key)
        found.require_kept()
        found.state = "PendingDeletion"
        found.deletion = _now() + days * 86400
        return found

    def key(self, reference: str) -> Key:
        """The key that a key id or key ARN names."""
        with self._lock:
            found = self._keys.get(reference.removeprefix(self._prefix + "key/"))
        if found is None:
            raise self._key_not_found(reference)
        return found

    def resolve(self, reference: str) -> Key:
        """The key that a key id, key ARN, alias name or alias ARN names."""
        name = reference.removeprefix(self._prefix) if "alias/" in reference else reference
        if not name.startswith("alias/"):
            return self.key(reference)
        with self._lock:
            if name not in self._aliases:
                raise self._alias_not_found(name)
            return self._keys[self._aliases[name]]

    # -- ciphertext blobs ---------------------------------------------------------------------------

    def seal(self, key: Key, plaintext: bytes, context: Mapping[str, str]) -> bytes:
        """Encrypt under a usable key; the blob's header and the context are bound into its tag."""
        key.require_usable()
        header = MAGIC + _fingerprint(key) + os.urandom(_FILLER) + key.id.encode()
        nonce = os.urandom(12)
        bound = header + canonical_context(context)
        return header + nonce + AESGCM(key.material).encrypt(nonce, plaintext, bound)

    def open(self, blob: bytes, context: Mapping[str, str], key_id: Optional[str]) -> "tuple[Key, bytes]":
        """Decrypt a blob; `key_id`, when given, must name the key that made it."""
        key = self._key_of(blob)
        if key_id is not None and self.resolve(key_id) is not key:
            raise KmsError(
                "IncorrectKeyException",
                "The key ID in the request does not identify a CMK that can perform this operation.",
            )
        key.require_usable()
        bound = blob[:_NONCE_AT] + canonical_context(context)
        try:
            return key, AESGCM(key.material).decrypt(blob[_NONCE_AT:_SEALED_AT], blob[_SEALED_AT:], bound)
        except InvalidTag:
            raise KmsError("InvalidCiphertextException") from None

    def _key_of(self, blob: bytes) -> Key:
        with self._lock:
            key = self._keys.get(blob[_KEY_ID_AT:_NONCE_AT].decode("latin-1"))
        shaped = blob.startswith(MAGIC) and len(blob) >= _SEALED_AT + _TAG
        if key is None or not shaped or blob[len(MAGIC) : len(MAGIC) + 32] != _fingerprint(key):
            raise KmsError("InvalidCiphertextException")
        return key

    def _key_not_found(self, reference: str) -> KmsError:
        if reference.startswith("arn:") and not reference.startswith(self._prefix):
            return KmsError("NotFoundException", f"Invalid arn {reference.split(':')[3]}")
        if not reference.startswith("arn:") and not _is_uuid(reference):
            return KmsError("NotFoundException", f"Invalid keyId '{reference}'")
        arn = reference if reference.startswith("arn:") else f"{self._prefix}key/{reference}"
        return KmsError("NotFoundException", f"Key '{arn}' does not exist")

    def _alias_not_found(self, alias: str) -> KmsError:
        return KmsError("NotFoundException", f"Alias {self._prefix}{alias} is not found.")


def canonical_context(context: Mapping[str, str]) -> bytes:
    """The context's one encoding: sorted by name, every string behind its length."""
    out = bytearray()
    for pair in sorted(context.items()):
        for text in pair:
            raw = text.encode()
            out += len(raw).to_bytes(4, "big") + raw
    if len(out) > MAX_CONTEXT:
        raise KmsError("ValidationException", "The encryption context is too long.")
    return bytes(out)


def _check_alias_name(alias: str) -> None:
    if not re.fullmatch(r"alias/[a-zA-Z0-9/_-]+", alias) or alias.startswith("alias/aws/"):
        raise KmsError("InvalidAliasNameException", "Alias must start with the prefix \"alias/\" "
                       "and may not start with \"alias/aws/\".")


def _fingerprint(key: Key) -> bytes:
    return hashlib.sha256(key.arn.encode()).digest()


def _is_uuid(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", text) is not None


def _now() -> float:
    return datetime.datetime.now(datetime.timezone.utc).timestamp()
