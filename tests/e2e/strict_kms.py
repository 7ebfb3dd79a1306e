"""An AWS KMS of the tests' own: strict as the real service, and able to fail on request.

The emulators of emulators.py are other people's reading of the API; each is lax somewhere. This one
binds the encryption context, refuses what the service refuses, verifies signatures, records every
request, remembers every data key it issued, and deals out the faults of kms_faults.py.
"""

from __future__ import annotations

import collections
import contextlib
import json
import socket
import socketserver
import threading
import traceback
import uuid
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Optional
from urllib.parse import urlencode

import kms_faults as faults
from dead_ends import BlackHole, closed_port
from kms_faults import ANY, Fault, FaultPlan
from kms_keyring import KmsError, Keyring
from kms_operations import Operations
from sigv4 import Credential, verify, without_signature

__all__ = ["ANY", "BlackHole", "Credential", "Request", "StrictKms", "closed_port", "faults"]

REGION = "eu-west-1"
ACCOUNT = "111122223333"
ACCESS_KEY = "AKIDE2EEXAMPLE"
SECRET_KEY = "e2e/secret+access+key+known+to+the+strict+kms"

_TARGET = "TrentService."


@dataclass
class Request:
    """One recorded request. `error` is the type it was answered with, None for success or no answer."""

    operation: str
    body: dict
    headers: "dict[str, str]"
    request_id: str
    error: Optional[str] = None
    faults: "tuple[str, ...]" = ()


@dataclass(frozen=True)
class _Answer:
    status: int
    payload: bytes
    request_id: str
    wire: Optional[str] = None
    keep: int = 0


class StrictKms:
    """The server, listening on a free loopback port from construction to close()."""

    def __init__(self, region: str = REGION, account: str = ACCOUNT):
        self.region = region
        self.credentials = {ACCESS_KEY: Credential(ACCESS_KEY, SECRET_KEY)}
        self.keyring = Keyring(region, account)
        self.deks: "list[bytes]" = []
        self.requests: "list[Request]" = []
        self.internal_errors: "list[str]" = []
        self.peak_in_flight = 0
        # Operations on wrapped data keys that were asked about twice at a time.
        self.doubled: "list[str]" = []
        self._in_flight = 0
        self._blobs: "collections.Counter[str]" = collections.Counter()
        self._plan = FaultPlan()
        self._operations = Operations(self.keyring, self.deks.append)
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._server = _Server(self)
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="strict-kms", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> "StrictKms":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def close(self) -> None:
        """Stop at once, whatever clients or delays are pending. May be called twice."""
        self._closing.set()
        self._server.shutdown()
        self._server.drop_connections()
        self._server.server_close()
        self._thread.join(5)

    # -- what a client needs ------------------------------------------------------------------------

    def environment(self, key: Optional[str] = None) -> "dict[str, str]":
        """A postmaster's environment that points here; with `key`, that is its KMS_KEY_ID."""
        env = {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": self.region,
            "AWS_ENDPOINT_URL_KMS": self.endpoint,
        }
        return {**env, "KMS_KEY_ID": key} if key else env

    def kek_uri(self, key: str) -> str:
        """The KEK URI of a key ARN, key id or alias name on this server."""
        return f"aws-kms://{key}?" + urlencode({"region": self.region, "endpoint": self.endpoint}, safe=":/")

    # -- keys, without a request --------------------------------------------------------------------

    def create_key(self, alias: Optional[str] = None) -> str:
        """A new key, with an alias (`alias/NAME`) if wanted; returns its ARN."""
        arn = self.keyring.create_key().arn
        if alias:
            self.keyring.create_alias(alias, arn)
        return arn

    def point_alias(self, alias: str, key: str) -> None:
        """Point an existing alias to another key."""
        self.keyring.update_alias(alias, key)

    def disable(self, key: str) -> None:
        """Disable a key."""
        self.keyring.set_enabled(key, False)

    def enable(self, key: str) -> None:
        """Enable a disabled key."""
        self.keyring.set_enabled(key, True)

    def schedule_deletion(self, key: str) -> None:
        """Make a key pending deletion."""
        self.keyring.schedule_deletion(key)

    # -- faults -------------------------------------------------------------------------------------

    def inject(
        self, fault: Fault, operation: str = ANY, times: Optional[int] = None, seconds: Optional[float] = None
    ) -> None:
        """Queue a fault: for the next `times` requests of the operation, for `seconds` from the first
        one on, or (neither given) until clear_faults()."""
        self._plan.add(operation, fault, times, seconds)

    def clear_faults(self) -> None:
        """Forget all faults."""
        self._plan.clear()

    # -- the record ---------------------------------------------------------------------------------

    @property
    def counts(self) -> "collections.Counter[str]":
        """How many requests came in, by operation, refused ones included."""
        with self._changed:
            return collections.Counter(request.operation for request in self.requests)

    def count(self, operation: str) -> int:
        """How many requests of one operation came in."""
        return self.counts[operation]

    def reset_record(self) -> None:
        """Forget the recorded requests and the peak of concurrency; keys, DEKs and faults stay."""
        with self._changed:
            self.requests.clear()
            self.peak_in_flight = self._in_flight

    def wait_for(self, operation: str, count: int = 1, timeout: float = 10) -> None:
        """Return once `count` requests of the operation came in (answered or not)."""

        def arrived() -> bool:
            return sum(request.operation == operation for request in self.requests) >= count

        with self._changed:
            if not self._changed.wait_for(arrived, timeout):
                raise TimeoutError(f"no {count} requests of {operation} within {timeout} s")

    # -- answering (called on the connections' threads) ---------------------------------------------

    def answer(self, headers: "dict[str, str]", raw: bytes) -> _Answer:
        """What to send for one request; `headers` has lower-case names."""
        request = self._record(headers, raw)
        due = self._plan.take(request.operation)
        request.faults = tuple(fault.name for fault in due)
        try:
            body = self._carry_out(request, headers, raw, due)
            return _reply(request, 200, body, due)
        except KmsError as refused:
            request.error = refused.type
            body = {"__type": refused.type}
            if refused.message is not None:
                body["message"] = refused.message
            return _reply(request, refused.status, body, due)
        except Exception:  # a defect of the test's own server: tell the test, not only the client
            self.internal_errors.append(traceback.format_exc())
            return _reply(request, 500, {"__type": "KMSInternalException"}, due)
        finally:
            with self._changed:
                self._in_flight -= 1
                self._blobs[_blob_of(request)] -= 1

    def _record(self, headers: "dict[str, str]", raw: bytes) -> Request:
        kept = {**headers, "authorization": without_signature(headers.get("authorization", ""))}
        operation = headers.get("x-amz-target", "").removeprefix(_TARGET)
        request = Request(operation, _parsed(raw), kept, str(uuid.uuid4()))
        with self._changed:
            self.requests.append(request)
            self._in_flight += 1
            self.peak_in_flight = max(self.peak_in_flight, self._in_flight)
            blob = _blob_of(request)
            self._blobs[blob] += 1
            if blob and self._blobs[blob] > 1:
                self.doubled.append(request.operation)
            self._changed.notify_all()
        return request

    def _carry_out(
        self, request: Request, headers: "dict[str, str]", raw: bytes, due: "list[Fault]"
    ) -> dict:
        self._closing.wait(sum(fault.delay for fault in due))
        verify(headers, raw, self.region, self.credentials)
        _check_protocol(headers, request.body)
        for fault in due:
            if fault.error:
                raise fault.error(request.operation, self._arn_of(request.body))
        if any(fault.wire == "silence" for fault in due):
            return {}
        body = self._operations.perform(request.operation, request.body)
        for fault in due:
            body = fault.mutate(body) if fault.mutate else body
        return body

    def _arn_of(self, body: dict) -> str:
        reference = body.get("KeyId") or body.get("DestinationKeyId") or "*"
        with contextlib.suppress(KmsError):
            return self.keyring.resolve(reference).arn
        return reference


def _blob_of(request: Request) -> str:
    return str(request.body.get("CiphertextBlob", "")) if isinstance(request.body, dict) else ""


def _check_protocol(headers: "dict[str, str]", body: object) -> None:
    if not headers.get("x-amz-target", "").startswith(_TARGET):
        raise KmsError("UnknownOperationException", None, 404)
    if headers.get("content-type") != "application/x-amz-json-1.1" or not isinstance(body, dict):
        raise KmsError("SerializationException")


def _parsed(raw: bytes) -> "dict | None":
    with contextlib.suppress(ValueError):
        return json.loads(raw)
    return None


def _reply(request: Request, status: int, body: dict, due: "list[Fault]") -> _Answer:
    wire = next((fault for fault in due if fault.wire), Fault("none"))
    payload = json.dumps(body, separators=(",", ":")).encode()
    if wire.wire == "garbage":
        status, payload = 200, b"<html><body>it works</body>"
    return _Answer(status, payload, request.request_id, wire.wire, wire.keep)


class _Server(socketserver.ThreadingTCPServer):
    """One thread a connection; open connections are known, so that close() can end them."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, kms: StrictKms):
        self.kms = kms
        self._open: "set[socket.socket]" = set()
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request(self, request, client_address) -> None:
        with self._lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def drop_connections(self) -> None:
        """Wake every thread that waits for its client."""
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address) -> None:
        """A client that went away is no news; answer() has kept whatever else went wrong."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 65536  # head and body leave together

    def do_POST(self) -> None:  # noqa: N802 (the base class's naming)
        length = int(self.headers.get("content-length", "0"))
        headers = {name.lower(): value for name, value in self.headers.items()}
        answer = self.server.kms.answer(headers, self.rfile.read(length))
        if answer.wire == "silence":
            self._be_silent()
        elif answer.wire == "cut":
            self._send(answer, answer.payload[: max(answer.keep, 0)], head=answer.keep >= 0)
            self.close_connection = True
        else:
            self._send(answer, answer.payload)

    def _send(self, answer: _Answer, payload: bytes, head: bool = True) -> None:
        if not head:
            return
        self.send_response(answer.status)
        self.send_header("x-amzn-RequestId", answer.request_id)
        self.send_header("Content-Type", "application/x-amz-json-1.1")
        self.send_header("Content-Length", str(len(answer.payload)))
        self.end_headers()
        self.wfile.write(payload)
        self.wfile.flush()

    def _be_silent(self) -> None:
        """Hold the connection until the client closes it or the server does."""
        while self.connection.recv(65536):
            pass
        self.close_connection = True

    def log_message(self, format, *args) -> None:  # noqa: A002
        """Requests are recorded, not printed."""
