"""Every way in which AWS KMS says no has its SQLSTATE, and DETAIL names the request."""

from __future__ import annotations

import pytest

import kms_faults as faults
from helpers import one
from sqlstate import DENIED, NOT_READY, THROTTLED, UNKNOWN_KEY, UNREACHABLE, UNVERIFIED, detail, fails

ENCRYPT = "SELECT envelope_encrypt('token', key => 'main')"


@pytest.fixture
def session(cluster, kms):
    """A session with the strict KMS's key, and short pauses between attempts."""
    with cluster.connect() as connection:
        connection.execute("SELECT vod_tender_crypto.add_key('main', %s)", [kms.kek_uri()])
        connection.execute("SET vod_tender_crypto.kms_retry_backoff = '5ms'")
        connection.execute("SET vod_tender_crypto.dek_max_uses = 1")
        yield connection


def last_request(kms) -> str:
    """The id of the last request that the service answered."""
    return kms.requests[-1].request_id


@pytest.mark.parametrize("fault, state, attempts", [
    (faults.deny(), DENIED, 1),
    (faults.expired_token(), DENIED, 1),
    (faults.unrecognized_client(), DENIED, 1),
    (faults.throttle(), THROTTLED, 4),
    (faults.server_error(), UNREACHABLE, 4),
    (faults.error("DependencyTimeoutException", "slow", 500), UNREACHABLE, 4),
    (faults.error("KMSInvalidStateException", "arn is pending deletion."), NOT_READY, 1),
    (faults.error("NotFoundException", "no such key"), UNKNOWN_KEY, 1),
    (faults.error("BrandNewException", "no"), NOT_READY, 1),
], ids=lambda value: getattr(value, "kind", None) or str(value)[:40])
def test_errors_of_the_service(session, kms, fault, state, attempts):
    kms.inject(fault)
    with fails(state) as caught:
        one(session, ENCRYPT)
    assert last_request(kms) in detail(caught), detail(caught)
    assert kms.count("GenerateDataKey") == attempts
    assert 'key "main"' in caught.value.diag.message_primary
    kms.clear_faults()
    assert one(session, ENCRYPT).startswith("kms:v2:"), "the session works on"


def test_disabled_and_pending_deletion(session, kms):
    value = one(session, ENCRYPT)
    session.execute("SELECT envelope_cache_clear()")
    kms.disable(kms.arn)
    for query, parameters in ((ENCRYPT, []), ("SELECT envelope_decrypt(%s)", [value])):
        with fails(NOT_READY, "disabled") as caught:
            one(session, query, *parameters)
        assert last_request(kms) in detail(caught)
    kms.enable(kms.arn)
    assert one(session, "SELECT envelope_decrypt(%s)", value) == "token"
    session.execute("SELECT envelope_cache_clear()")
    kms.schedule_deletion(kms.arn)
    with fails(NOT_READY, "state") as caught:
        one(session, "SELECT envelope_decrypt(%s)", value)
    assert "pending deletion" in detail(caught)


def test_attempts_do_not_run_out_in_a_long_session(session, kms):
    """Sixty throttled calls in a row make four attempts each, the last as the first."""
    session.execute("SET vod_tender_crypto.kms_retry_backoff = '1ms'")
    kms.inject(faults.throttle())
    for _ in range(60):
        with fails(THROTTLED):
            one(session, ENCRYPT)
    assert kms.count("GenerateDataKey") == 240


def test_a_call_has_one_time_limit_for_all_that_it_takes(session, kms):
    """An alias that moved takes three requests; together they have kms_timeout."""
    import time

    session.execute("SELECT vod_tender_crypto.add_key('alias', %s)", [kms.kek_uri(kms.alias)])
    value = one(session, "SELECT envelope_encrypt('token', key => 'alias')")
    kms.point_alias(kms.alias, kms.create_key())
    session.execute("SELECT envelope_cache_clear()")
    session.execute("SET vod_tender_crypto.kms_timeout = '1s'")
    kms.inject(faults.delay(0.4))
    began = time.monotonic()
    with fails(UNREACHABLE):
        one(session, "SELECT envelope_decrypt(%s)", value)
    assert time.monotonic() - began < 1.4


def test_throttling_that_passes_is_survived(session, kms):
    kms.inject(faults.throttle(), times=2)
    assert one(session, ENCRYPT).startswith("kms:v2:")
    assert kms.count("GenerateDataKey") == 3
    outcomes = one(session, "SELECT vod_tender_crypto.session_stats()")["calls"]["aws-kms"]["GenerateDataKey"]
    assert outcomes["ok"]["calls"] == 1


@pytest.mark.parametrize("fault", [
    faults.wrong_key_id("arn:aws:kms:eu-west-1:111122223333:key/00000000-0000-4000-8000-000000000000"),
    faults.wrong_dek_length(16),
    faults.wrong_dek_length(64),
], ids=["key id", "short DEK", "long DEK"])
def test_answers_that_must_not_be_trusted(session, kms, fault):
    value = one(session, ENCRYPT)
    session.execute("SELECT envelope_cache_clear()")
    kms.inject(fault)
    with fails(UNVERIFIED, "refused"):
        one(session, ENCRYPT)
    with fails(UNVERIFIED, "refused"):
        one(session, "SELECT envelope_decrypt(%s)", value)


def test_answers_that_cannot_be_read(session, kms):
    kms.inject(faults.garbage())
    with fails(UNREACHABLE):
        one(session, ENCRYPT)


def test_a_wrapped_dek_under_another_context_does_not_open(session, kms):
    from helpers import armor, binary

    value = one(session, "SELECT envelope_encrypt('token', key => 'main', context => '{\"tenant\": \"a\"}')")
    session.execute("SELECT envelope_cache_clear()")
    forged = binary(value).replace(b"\x00\x01a", b"\x00\x01b", 1)
    with fails(UNVERIFIED, "could not verify") as caught:
        one(session, "SELECT envelope_decrypt(%s)", armor(forged, 28 + 5))
    assert last_request(kms) in detail(caught)
    assert kms.requests[-1].body["EncryptionContext"] == {"tenant": "b"}


def test_no_credentials(make_cluster, extension, kms):
    with make_cluster(environment={"HOME": "/nonexistent"}).connect() as connection:
        connection.execute(f"CREATE EXTENSION {extension}")
        connection.execute("SELECT vod_tender_crypto.add_key('main', %s)", [kms.kek_uri()])
        with fails(DENIED, "credentials"):
            one(connection, ENCRYPT)
    assert kms.count("GenerateDataKey") == 0


def test_requests_are_pinned_to_the_key_and_carry_the_context(session, kms):
    value = one(session, "SELECT envelope_encrypt('token', key => 'main', context => '{\"tenant\": \"a\"}')")
    session.execute("SELECT envelope_cache_clear()")
    one(session, "SELECT envelope_decrypt(%s)", value)
    generate, decrypt = kms.requests
    assert generate.body == {"KeyId": kms.arn, "NumberOfBytes": 32, "EncryptionContext": {"tenant": "a"}}
    assert decrypt.body["KeyId"] == kms.arn and decrypt.body["EncryptionContext"] == {"tenant": "a"}
