"""The operations of the strict KMS server: from a request's parsed body to the answer's."""

from __future__ import annotations

import base64
import binascii
import os
from typing import Callable, Optional

from kms_keyring import Key, KmsError, Keyring

SYMMETRIC = "SYMMETRIC_DEFAULT"
_KEY_SPECS = {"AES_256": 32, "AES_128": 16}


class Operations:
    """Carries out operations on a keyring; `on_dek` hears of every data key issued."""

    def __init__(self, keyring: Keyring, on_dek: Callable[[bytes], None]):
        self._keyring = keyring
        self._on_dek = on_dek
        self._by_name = {
            "CreateKey": self._create_key,
            "DescribeKey": self._describe_key,
            "CreateAlias": self._create_alias,
            "UpdateAlias": self._update_alias,
            "EnableKey": lambda body: self._set_enabled(body, True),
            "DisableKey": lambda body: self._set_enabled(body, False),
            "ScheduleKeyDeletion": self._schedule_deletion,
            "GenerateDataKey": self._generate_data_key,
            "Encrypt": self._encrypt,
            "Decrypt": self._decrypt,
            "ReEncrypt": self._re_encrypt,
        }

    def perform(self, operation: str, body: dict) -> dict:
        """The answer's body; a refusal raises KmsError."""
        if operation not in self._by_name:
            raise KmsError("UnknownOperationException", None, 404)
        return self._by_name[operation](body)

    # -- data ---------------------------------------------------------------------------------------

    def _generate_data_key(self, body: dict) -> dict:
        key = self._keyring.resolve(_text(body, "KeyId"))
        dek = os.urandom(_dek_length(body))
        blob = self._keyring.seal(key, dek, _context(body, "EncryptionContext"))
        self._on_dek(dek)
        return {"CiphertextBlob": _b64(blob), "Plaintext": _b64(dek), "KeyId": key.arn}

    def _encrypt(self, body: dict) -> dict:
        key = self._keyring.resolve(_text(body, "KeyId"))
        plaintext = _blob(body, "Plaintext", 4096)
        blob = self._keyring.seal(key, plaintext, _context(body, "EncryptionContext"))
        return {"CiphertextBlob": _b64(blob), "KeyId": key.arn, "EncryptionAlgorithm": SYMMETRIC}

    def _decrypt(self, body: dict) -> dict:
        key, plaintext = self._open(body, "EncryptionContext", "KeyId")
        return {"KeyId": key.arn, "Plaintext": _b64(plaintext), "EncryptionAlgorithm": SYMMETRIC}

    def _re_encrypt(self, body: dict) -> dict:
        target = self._keyring.resolve(_text(body, "DestinationKeyId"))
        source, plaintext = self._open(body, "SourceEncryptionContext", "SourceKeyId")
        blob = self._keyring.seal(target, plaintext, _context(body, "DestinationEncryptionContext"))
        return {
            "CiphertextBlob": _b64(blob),
            "SourceKeyId": source.arn,
            "KeyId": target.arn,
            "SourceEncryptionAlgorithm": SYMMETRIC,
            "DestinationEncryptionAlgorithm": SYMMETRIC,
        }

    def _open(self, body: dict, context_name: str, key_name: str) -> "tuple[Key, bytes]":
        blob = _blob(body, "CiphertextBlob", 6144)
        key_id = _text(body, key_name) if key_name in body else None
        return self._keyring.open(blob, _context(body, context_name), key_id)

    # -- keys ---------------------------------------------------------------------------------------

    def _create_key(self, body: dict) -> dict:
        return {"KeyMetadata": self._keyring.create_key(body.get("Description", "")).metadata()}

    def _describe_key(self, body: dict) -> dict:
        return {"KeyMetadata": self._keyring.resolve(_text(body, "KeyId")).metadata()}

    def _create_alias(self, body: dict) -> dict:
        self._keyring.create_alias(_text(body, "AliasName"), _text(body, "TargetKeyId"))
        return {}

    def _update_alias(self, body: dict) -> dict:
        self._keyring.update_alias(_text(body, "AliasName"), _text(body, "TargetKeyId"))
        return {}

    def _set_enabled(self, body: dict, enabled: bool) -> dict:
        self._keyring.set_enabled(_text(body, "KeyId"), enabled)
        return {}

    def _schedule_deletion(self, body: dict) -> dict:
        days = body.get("PendingWindowInDays", 30)
        key = self._keyring.schedule_deletion(_text(body, "KeyId"), days)
        return {
            "KeyId": key.arn,
            "DeletionDate": key.deletion,
            "KeyState": key.state,
            "PendingWindowInDays": days,
        }


def _text(body: dict, name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise _invalid(name, value)
    return value


def _blob(body: dict, name: str, longest: int) -> bytes:
    try:
        raw = base64.b64decode(_text(body, name), validate=True)
    except binascii.Error:
        raise KmsError("SerializationException") from None
    if not 1 <= len(raw) <= longest:
        raise _invalid(name, "(binary)")
    return raw


def _context(body: dict, name: str) -> "dict[str, str]":
    context = body.get(name) or {}
    if not isinstance(context, dict) or not all(isinstance(v, str) for v in context.values()):
        raise KmsError("SerializationException")
    return context


def _dek_length(body: dict) -> int:
    spec: Optional[str] = body.get("KeySpec")
    number: Optional[int] = body.get("NumberOfBytes")
    if (spec is None) == (number is None):
        raise KmsError("ValidationException", "Please specify either number of bytes or key spec.")
    if spec is not None:
        if spec not in _KEY_SPECS:
            raise _invalid("KeySpec", spec)
        return _KEY_SPECS[spec]
    if not 1 <= number <= 1024:
        raise _invalid("NumberOfBytes", number)
    return number


def _invalid(name: str, value: object) -> KmsError:
    where = name[0].lower() + name[1:]
    return KmsError(
        "ValidationException",
        f"1 validation error detected: Value '{value}' at '{where}' failed to satisfy constraint",
    )


def _b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
