"""What can be made to go wrong on the strict KMS server: the faults, and the plan that deals them out."""

from __future__ import annotations

import base64
import os
import threading
import time
from dataclasses import dataclass
from typing import Callable, Optional

from kms_keyring import KmsError

ANY = "*"


@dataclass(frozen=True)
class Fault:
    """One way to go wrong. Use the functions below to make one; at most one field beside delay is set."""

    name: str
    delay: float = 0.0
    # (operation, the request's key or key id) -> the error to answer with.
    error: Optional[Callable[[str, str], KmsError]] = None
    # The right answer's body -> a wrong one.
    mutate: Optional[Callable[[dict], dict]] = None
    # What happens to the connection: "silence", "cut" or "garbage".
    wire: Optional[str] = None
    keep: int = 0


def delay(seconds: float) -> Fault:
    """Answer rightly, but late. Combines with the next fault in the plan."""
    return Fault("delay", delay=seconds)


def error(type_: str, message: Optional[str] = None, status: int = 400) -> Fault:
    """Answer with any service error."""
    return Fault(type_, error=lambda _operation, _key: KmsError(type_, message, status))


def throttle() -> Fault:
    """ThrottlingException."""
    return error(
        "ThrottlingException",
        "You have exceeded the rate at which you may call KMS. Reduce the frequency of your calls.",
    )


def server_error() -> Fault:
    """KMSInternalException with HTTP 500: the service's own trouble, worth another attempt."""
    return error("KMSInternalException", "An internal failure occurred. You can retry the request.", 500)


def deny(user: str = "e2e") -> Fault:
    """AccessDeniedException, worded as IAM words it."""

    def denied(operation: str, key: str) -> KmsError:
        return KmsError(
            "AccessDeniedException",
            f"User: arn:aws:iam::111122223333:user/{user} is not authorized to perform: kms:{operation} on "
            f"resource: {key} because no identity-based policy allows the kms:{operation} action",
        )

    return Fault("AccessDeniedException", error=denied)


def expired_token() -> Fault:
    """ExpiredTokenException: temporary credentials ran out."""
    return error("ExpiredTokenException", "The security token included in the request is expired")


def unrecognized_client() -> Fault:
    """UnrecognizedClientException: the access key is not known."""
    return error("UnrecognizedClientException", "The security token included in the request is invalid.")


def cut(keep: int = 20) -> Fault:
    """Close the connection after `keep` bytes of the answer's body; a negative number: before its head."""
    return Fault("cut", wire="cut", keep=keep)


def never_answer() -> Fault:
    """Read the request and say nothing until the client goes away."""
    return Fault("never_answer", wire="silence")


def garbage() -> Fault:
    """HTTP 200 with a body that is no JSON."""
    return Fault("garbage", wire="garbage")


def wrong_key_id(arn: str) -> Fault:
    """Claim in the answer that another key did the work."""
    return Fault("wrong_key_id", mutate=lambda body: {**body, "KeyId": arn})


def wrong_dek_length(length: int) -> Fault:
    """Hand out a plaintext of another length."""
    made_up = base64.b64encode(os.urandom(length)).decode()
    return Fault("wrong_dek_length", mutate=lambda body: {**body, "Plaintext": made_up})


class FaultPlan:
    """The faults that are due, in order. A request takes the first that concerns its operation."""

    def __init__(self):
        self._entries: "list[_Entry]" = []
        self._lock = threading.Lock()

    def add(self, operation: str, fault: Fault, times: Optional[int], seconds: Optional[float]) -> None:
        """Let the next `times` requests fail, or those within `seconds` of the first, or (both None) all."""
        with self._lock:
            self._entries.append(_Entry(operation, fault, times, seconds))

    def clear(self) -> None:
        """Behave again."""
        with self._lock:
            self._entries.clear()

    def take(self, operation: str) -> "list[Fault]":
        """What this request suffers: any delays that are due, and at most one other fault."""
        taken = []
        with self._lock:
            for entry in self._entries:
                if not entry.concerns(operation):
                    continue
                entry.use()
                taken.append(entry.fault)
                if entry.fault.name != "delay":
                    break
            self._entries = [entry for entry in self._entries if not entry.spent()]
        return taken


@dataclass
class _Entry:
    operation: str
    fault: Fault
    times: Optional[int]
    seconds: Optional[float]
    ends: Optional[float] = None

    def concerns(self, operation: str) -> bool:
        return self.operation in (ANY, operation) and not self.spent()

    def use(self) -> None:
        if self.times is not None:
            self.times -= 1
        # The period begins with the first request it hits, so that a slow start does not use it up.
        if self.seconds is not None and self.ends is None:
            self.ends = time.monotonic() + self.seconds

    def spent(self) -> bool:
        over = self.ends is not None and time.monotonic() >= self.ends
        return over or self.times == 0
