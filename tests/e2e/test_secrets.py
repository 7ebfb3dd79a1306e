"""No secret in any log line, and none in memory once the cache is cleared."""

from __future__ import annotations

import base64

import psycopg
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

import kms_faults as faults
import procmem
from helpers import add_local_key, armor, binary, calls, new_key, one, v1_vectors
from skips import cannot_run
from strict_kms import ACCESS_KEY, SECRET_KEY

TOKEN = "ya29.SECRET-TOKEN-THAT-NO-LOG-MAY-SHOW"

LOUD = {
    "log_statement": "all",
    "log_min_duration_statement": "0",
    "log_error_verbosity": "verbose",
    # Not lower: from debug3 on, PostgreSQL itself writes its whole environment into the log when it starts.
    "log_min_messages": "debug2",
    "log_min_error_statement": "debug5",
    "log_parameter_max_length": "0",
    "log_parameter_max_length_on_error": "0",
    "client_min_messages": "debug5",
}


def payload_key(dek: bytes) -> bytes:
    """What FORMAT.md derives from a DEK to encrypt payloads with."""
    return HKDF(SHA256(), 32, None, b"vod_tender_crypto/v2/payload-key\x01").derive(dek)


def tag_keys(key: bytes) -> "dict[str, bytes]":
    """What AES-GCM makes tags with, in the forms that AWS-LC has at hand, by the processor: whoever has it can forge."""
    encryptor = Cipher(AES(key), ECB()).encryptor()
    h = int.from_bytes(encryptor.update(bytes(16)), "big")
    doubled = (h << 1) % (1 << 128) ^ (0xC2000000000000000000000000000001 if h >> 127 else 0)
    kept = doubled.to_bytes(16, "little")
    return {"tag key": kept, "tag key, halves swapped": kept[8:] + kept[:8], "tag key, plain": h.to_bytes(16, "big")}


def forms(secret: bytes) -> "list[bytes]":
    """A secret as a log might show it."""
    return [secret, base64.b64encode(secret), secret.hex().encode(), secret.hex().upper().encode()]


def attempt(connection, query, *parameters):
    """Runs a statement whose failure is the point; gives its value or the error."""
    try:
        return one(connection, query, *parameters)
    except psycopg.Error as error:
        return error


def exercise_every_path(own, connection, kms, stored):
    """Each function on good and bad values, and each way in which the key service fails."""
    value = one(connection, "SELECT envelope_encrypt(%s, aad => 'row')", TOKEN)
    data = one(connection, "SELECT envelope_encrypt(%s::bytea)", TOKEN.encode())
    assert one(connection, "SELECT envelope_decrypt(%s, aad => 'row')", value) == TOKEN
    assert one(connection, "SELECT envelope_decrypt(%s::bytea)", data) == TOKEN.encode()
    direct = one(connection, "SELECT envelope_downgrade(%s, aad => 'row')", value)
    broken = value[:-8] + ("A" if value[-8] != "A" else "B") + value[-7:]
    other = binary(value)
    errors = []
    for query, parameters in [
        ("SELECT envelope_decrypt(%s)", [value]),
        ("SELECT envelope_decrypt(%s, aad => 'other')", [value]),
        ("SELECT envelope_decrypt(%s, aad => 'row')", [broken]),
        ("SELECT envelope_decrypt(%s, aad => 'row', context => '{\"a\": \"b\"}')", [value]),
        ("SELECT envelope_decrypt(%s, aad => 'row')", [value[:-5]]),
        ("SELECT envelope_decrypt(%s::bytea, aad => 'row')", [other[:-40]]),
        ("SELECT envelope_decrypt(%s)", [TOKEN]),
        ("SELECT envelope_decrypt(%s, version => 0)", [TOKEN]),
        ("SELECT envelope_decrypt(%s, version => 1)", [TOKEN]),
        ("SELECT envelope_decrypt(%s, version => 2)", [TOKEN]),
        ("SELECT envelope_decrypt(%s, version => 7)", [TOKEN]),
        ("SELECT envelope_decrypt(%s, version => 1)", [direct[:-6] + "AAAA=="]),
        ("SELECT envelope_upgrade(%s)", [TOKEN]),
        ("SELECT envelope_upgrade(%s, key => 'nope', version => 0)", [TOKEN]),
        ("SELECT envelope_downgrade(%s, version => 1)", [TOKEN]),
        ("SELECT envelope_encrypt(%s, key => 'nope')", [TOKEN]),
        ("SELECT envelope_encrypt(%s, key => 'off')", [TOKEN]),
        ("SELECT envelope_encrypt(%s, key => 'file')", [TOKEN]),
        ("SELECT envelope_encrypt(%s, context => '{\"a\": 1}')", [TOKEN]),
        ("SELECT envelope_encrypt(%s)", [value]),
        ("SELECT rewrap(%s)", [TOKEN]),
        ("SELECT rewrap(%s, 'off')", [value]),
        ("SELECT envelope_decrypt(%s)", [armor(one(connection, "SELECT envelope_encrypt('\\xff'::bytea)"), 29)]),
    ]:
        ended = attempt(connection, query, *parameters)
        assert isinstance(ended, psycopg.Error), query
        errors.append(ended)
    connection.execute("SET vod_tender_crypto.plaintext_reads = 'warn'")
    assert one(connection, "SELECT envelope_decrypt(%s)", TOKEN) == TOKEN
    connection.execute("RESET vod_tender_crypto.plaintext_reads")
    connection.execute("SET vod_tender_crypto.kms_retry_backoff = '1ms'")
    connection.execute("SET vod_tender_crypto.kms_attempt_timeout = '100ms'")
    connection.execute("SET vod_tender_crypto.kms_max_attempts = 2")
    for fault in [faults.deny(), faults.throttle(), faults.server_error(), faults.expired_token(),
                  faults.unrecognized_client(), faults.garbage(), faults.cut(), faults.never_answer(),
                  faults.wrong_key_id(kms.create_key()), faults.wrong_dek_length(16),
                  faults.error("InvalidSignatureException", f"canonical string: x-amz-security-token:{SECRET_KEY}")]:
        connection.execute("SELECT envelope_cache_clear()")
        kms.inject(fault)
        for query, parameters in [("SELECT envelope_decrypt(%s, aad => 'row')", [value]),
                                  ("SELECT envelope_encrypt(%s)", [TOKEN])]:
            ended = attempt(connection, query, *parameters)
            assert isinstance(ended, psycopg.Error), (query, fault)
            errors.append(ended)
        kms.clear_faults()
    assert one(connection, "SELECT envelope_decrypt(%s)", stored["stored"]) == stored["plaintext"]
    return errors


def test_the_log_shows_no_secret(make_cluster, extension, kms):
    vectors = v1_vectors()
    stored = vectors["values"][0]
    own = make_cluster(settings=LOUD, environment={
        **kms.environment(), "ENCRYPTION_KEY": vectors["encryption_key"], "RUST_BACKTRACE": "1"})
    with own.connect() as connection:
        connection.execute(f"CREATE EXTENSION {extension}")
        loose = own.server_file("loose.b64", new_key(), 0o644)
        connection.execute("SELECT vod_tender_crypto.add_key('file', %s)", [f"local://{loose}"])
        connection.execute("SELECT vod_tender_crypto.add_key('off', 'local:///x')")
        connection.execute("SELECT vod_tender_crypto.set_key_state('off', 'disabled')")
        errors = exercise_every_path(own, connection, kms, stored)
        kek = open(loose).read().encode()
    own.stop("fast")
    log = own.log_path.read_bytes()
    said = log + "\n".join(str(error) for error in errors).encode()
    assert b"envelope_decrypt($1" in log and len(errors) > 40, "the log is as loud as it should be"
    secrets = [TOKEN.encode(), stored["plaintext"].encode(), SECRET_KEY.encode(), kek,
               base64.b64decode(vectors["encryption_key"])]
    secrets += kms.deks + [payload_key(dek) for dek in kms.deks]
    assert len(kms.deks) > 5
    for number, secret in enumerate(secrets):
        for form in forms(secret):
            assert form not in said, f"secret {number} is in the log"


def test_the_log_names_no_access_key(make_cluster, extension, kms):
    """Not secret, but nothing of the credentials belongs there."""
    own = make_cluster(settings=LOUD, environment=kms.environment())
    with own.connect() as connection:
        connection.execute(f"CREATE EXTENSION {extension}")
        kms.inject(faults.deny())
        attempt(connection, "SELECT envelope_encrypt('x')")
    own.stop("fast")
    assert ACCESS_KEY.encode() not in own.log_path.read_bytes()


@pytest.fixture
def readable(make_cluster, extension, kms):
    """A session whose memory the test may read, and its process id."""
    own = make_cluster(environment=kms.environment())
    connection = own.connect()
    connection.execute(f"CREATE EXTENSION {extension}")
    if not procmem.can_read(connection.info.backend_pid):
        cannot_run("this user may not read another process's memory (/proc/PID/mem)")
    yield own, connection
    connection.close()


def test_memory_holds_no_dek_after_the_cache_is_cleared(readable, kms):
    _, connection = readable
    pid = connection.info.backend_pid
    connection.execute("SET vod_tender_crypto.dek_max_uses = 1")
    connection.execute("CREATE TABLE t AS SELECT envelope_encrypt('v' || g) AS v FROM generate_series(1, 20) g")
    connection.execute("SELECT envelope_cache_clear()")
    assert one(connection, "SELECT count(envelope_decrypt(v)) FROM t") == 20
    assert calls(connection) == {"GenerateDataKey": 32, "Decrypt": 20}
    deks = list(dict.fromkeys(kms.deks))
    keys = [payload_key(dek) for dek in deks]
    assert len(deks) == 32
    held = procmem.find_any(pid, {f"payload key {n}": key for n, key in enumerate(keys)})
    assert len({hit.needle for hit in held}) == 20, "the search finds what is there, and nothing of the 12 that were made ahead and not used"
    connection.execute("SELECT envelope_cache_clear()")
    needles = {f"DEK {n}": dek for n, dek in enumerate(deks)} | {f"key {n}": key for n, key in enumerate(keys)}
    assert procmem.find_any(pid, needles) == []
    assert one(connection, "SELECT count(envelope_decrypt(v)) FROM t") == 20, "and it works on"


def test_memory_holds_no_dek_after_failures_and_cancels(readable, kms):
    own, connection = readable
    pid = connection.info.backend_pid
    value = one(connection, "SELECT envelope_encrypt('token')")
    wrong = binary(value)
    connection.execute("SELECT envelope_cache_clear()")
    for query, parameters in [
        ("SELECT envelope_decrypt(%s, aad => 'wrong')", [value]),
        ("SELECT envelope_decrypt(%s::bytea)", [wrong[:-1] + bytes([wrong[-1] ^ 1])]),
    ]:
        assert isinstance(attempt(connection, query, *parameters), psycopg.Error)
    kms.inject(faults.delay(2.0), "Decrypt")
    connection.execute("SELECT envelope_cache_clear()")
    connection.execute("SET statement_timeout = '300ms'")
    assert attempt(connection, "SELECT envelope_decrypt(%s)", value).sqlstate == "57014"
    connection.execute("SET statement_timeout = 0")
    kms.clear_faults()
    connection.execute("SELECT envelope_cache_clear()")
    needles = {"DEK": kms.deks[0], "payload key": payload_key(kms.deks[0])}
    assert procmem.find_any(pid, needles) == []


def test_memory_holds_no_local_kek(cluster):
    with cluster.connect() as connection:
        path = add_local_key(cluster, connection, "default")
        kek = base64.b64decode(open(path).read())
        pid = connection.info.backend_pid
        if not procmem.can_read(pid):
            cannot_run("this user may not read another process's memory (/proc/PID/mem)")
        value = one(connection, "SELECT envelope_encrypt('token')")
        connection.execute("SELECT envelope_cache_clear()")
        assert one(connection, "SELECT envelope_decrypt(%s)", value) == "token"
        assert procmem.find_any(pid, {"KEK": kek}) == [], "not even while its DEKs are cached"


@pytest.mark.parametrize("kind", ["text", "bytea"])
def test_expired_deks_leave_memory(readable, kms, kind):
    """What is too old goes with the next statement that uses the extension, whatever that statement is."""
    import time

    _, connection = readable
    value = one(connection, f"SELECT envelope_encrypt('token'::{kind})")
    payload = payload_key(kms.deks[0])
    secrets = {"payload key": payload, "DEK": kms.deks[0], **tag_keys(payload)}
    assert one(connection, f"SELECT envelope_decrypt(%s::{kind}) = 'token'::{kind}", value)
    pid = connection.info.backend_pid
    assert "payload key" in {hit.needle for hit in procmem.find_any(pid, secrets)}
    connection.execute("SET vod_tender_crypto.dek_max_age = '1s'")
    deadline = time.monotonic() + 10
    while one(connection, f"SELECT envelope_version('x'::{kind}) + (vod_tender_crypto.session_stats()->>'cached_deks')::int"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # A DEK may be in what its answer was read into, until the connection is closed: envelope_cache_clear() does that.
    assert [hit for hit in procmem.find_any(pid, secrets) if hit.needle != "DEK"] == []
