"""Verification of AWS Signature Version 4 on the strict KMS server's requests."""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass, field
from typing import Mapping, Optional

from kms_keyring import KmsError

_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=(?P<access_key>[^/]+)/(?P<date>\d{8})/(?P<region>[^/]+)/(?P<service>[^/]+)"
    r"/aws4_request,\s*SignedHeaders=(?P<signed>[^,]+),\s*Signature=(?P<signature>[0-9a-f]{64})"
)


@dataclass(frozen=True)
class Credential:
    """What the service knows about an access key; a secret of None leaves its signatures unverified."""

    access_key: str
    secret: Optional[str] = field(default=None, repr=False)
    session_token: Optional[str] = field(default=None, repr=False)


def verify(
    headers: Mapping[str, str], body: bytes, region: str, known: Mapping[str, Credential]
) -> None:
    """Refuse, in the service's words, a request that no known access key signed for this region.

    `headers` has lower-case names.
    """
    if "authorization" not in headers:
        raise KmsError("MissingAuthenticationTokenException", "Missing Authentication Token")
    claim = _AUTHORIZATION.fullmatch(headers["authorization"])
    if claim is None:
        raise KmsError("IncompleteSignatureException", "Authorization header is not a valid SigV4 one.")
    credential = known.get(claim["access_key"])
    if credential is None or headers.get("x-amz-security-token") != credential.session_token:
        raise KmsError("UnrecognizedClientException", "The security token included in the request is invalid.")
    _check_scope(claim, region)
    if credential.secret is not None:
        _check_signature(claim, headers, body, credential.secret)


def without_signature(authorization: str) -> str:
    """An Authorization header fit for a record: all but the signature."""
    return re.sub(r"Signature=[0-9a-f]+", "Signature=(removed)", authorization)


def _check_scope(claim: "re.Match[str]", region: str) -> None:
    if claim["region"] != region:
        raise KmsError("InvalidSignatureException", "Credential should be scoped to a valid region. ")
    if claim["service"] != "kms":
        raise KmsError("InvalidSignatureException", "Credential should be scoped to correct service: 'kms'. ")


def _check_signature(claim: "re.Match[str]", headers: Mapping[str, str], body: bytes, secret: str) -> None:
    scope = f"{claim['date']}/{claim['region']}/{claim['service']}/aws4_request"
    request = hashlib.sha256(_canonical_request(claim["signed"], headers, body)).hexdigest()
    to_sign = f"AWS4-HMAC-SHA256\n{headers.get('x-amz-date', '')}\n{scope}\n{request}"
    key = b"AWS4" + secret.encode()
    for part in scope.split("/"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    expected = hmac.new(key, to_sign.encode(), hashlib.sha256).hexdigest()
    if not hmac.compare_digest(expected, claim["signature"]):
        raise KmsError(
            "InvalidSignatureException",
            "The request signature we calculated does not match the signature you provided. Check your "
            "AWS Secret Access Key and signing method. Consult the service documentation for details.",
        )


def _canonical_request(signed: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """Every KMS request is a POST to / without a query."""
    lines = "".join(f"{name}:{' '.join(headers.get(name, '').split())}\n" for name in signed.split(";"))
    digest = hashlib.sha256(body).hexdigest()
    return f"POST\n/\n\n{lines}\n{signed}\n{digest}".encode()
