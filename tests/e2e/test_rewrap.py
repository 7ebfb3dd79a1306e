"""Rewrapping: payloads stay, KEK ids move, and AWS moves the DEK by itself."""

from __future__ import annotations

import pytest

from helpers import add_local_key, binary, calls, one, payload
from sqlstate import INVALID_PARAMETER, MALFORMED_TEXT, UNVERIFIED, fails


def kek_id(connection, value: str) -> str:
    """The KEK id that an envelope records."""
    return one(connection, "SELECT envelope_info(%s)->>'kek_id'", value)


def test_between_local_keys(cluster):
    with cluster.connect() as connection:
        add_local_key(cluster, connection, "first")
        add_local_key(cluster, connection, "second", default=False)
        value = one(connection, "SELECT envelope_encrypt('token', aad => 'row')")
        moved = one(connection, "SELECT rewrap(%s, 'second')", value)
        assert payload(moved) == payload(value) and kek_id(connection, moved) != kek_id(connection, value)
        assert one(connection, "SELECT envelope_decrypt(%s, aad => 'row')", moved) == "token"
        before = calls(connection, "local")
        assert one(connection, "SELECT rewrap(%s, 'second')", moved) == moved
        assert one(connection, "SELECT rewrap(%s)", value) == value
        assert calls(connection, "local") == before
        data = one(connection, "SELECT rewrap(%s::bytea, 'second')", binary(value))
        assert data[-33:] == binary(value)[-33:] and data != binary(value)


def test_what_is_no_envelope(cluster):
    with cluster.connect() as connection:
        add_local_key(cluster, connection)
        with fails(MALFORMED_TEXT):
            one(connection, "SELECT rewrap('plain')")


def test_under_a_key_whose_context_differs(cluster):
    with cluster.connect() as connection:
        add_local_key(cluster, connection, "a", '{"tenant": "a"}')
        add_local_key(cluster, connection, "b", '{"tenant": "b"}', default=False)
        value = one(connection, "SELECT envelope_encrypt('token')")
        with fails(INVALID_PARAMETER, '"b"'):
            one(connection, "SELECT rewrap(%s, 'b')", value)


def dek_never_came(connection) -> bool:
    """No operation of this session's brought a plaintext DEK from AWS."""
    made = calls(connection)
    return set(made) <= {"ReEncrypt", "DescribeKey"}


@pytest.fixture(params=["strict", "moto"])
def service(request):
    """Two implementations of AWS KMS, so that neither's quirks pass for the real thing."""
    if request.param == "strict":
        kms = request.getfixturevalue("kms")
        return kms, kms.environment()
    moto = request.getfixturevalue("moto")
    return moto, moto.environment(None)


def key_in(service, alias=None) -> str:
    """A new key's ARN."""
    return service.create_key(alias)


def test_to_another_aws_key(make_cluster, extension, service):
    kms, environment = service
    one_arn, two_arn = key_in(kms), key_in(kms)
    own = make_cluster(environment={**environment, "KMS_KEY_ID": None})
    with own.connect() as writer:
        writer.execute(f"CREATE EXTENSION {extension}")
        writer.execute("SELECT vod_tender_crypto.add_key('one', %s)", [kms.kek_uri(one_arn)])
        writer.execute("SELECT vod_tender_crypto.add_key('two', %s)", [kms.kek_uri(two_arn)])
        writer.execute("""CREATE TABLE t AS SELECT envelope_encrypt('v' || g, key => 'one', aad => g::text) AS v, g
                          FROM generate_series(1, 2500) g""")
        writer.execute("CREATE TABLE before AS TABLE t")
        assert calls(writer) == {"GenerateDataKey": 3}
    with own.connect() as mover:
        mover.execute("UPDATE t SET v = rewrap(v, 'two')")
        assert dek_never_came(mover) and calls(mover) == {"ReEncrypt": 3}, "each distinct wrapped DEK once"
        assert one(mover, "SELECT count(*) FROM t WHERE envelope_info(v)->>'kek_id' = %s", two_arn) == 2500
        assert one(mover, """SELECT count(*) FROM t JOIN before b USING (g)
                             WHERE split_part(t.v, ':', 4) = split_part(b.v, ':', 4) AND t.v <> b.v""") == 2500
    with own.connect() as again:
        assert one(again, "SELECT count(*) FROM t WHERE rewrap(v, 'two') = v") == 2500
        assert calls(again) == {}
        assert one(again, "SELECT count(*) FROM t WHERE envelope_decrypt(v, aad => g::text) = 'v' || g") == 2500
        assert calls(again) == {"Decrypt": 3}


def test_after_an_alias_was_pointed_to_a_new_key(make_cluster, extension, service):
    kms, environment = service
    alias = "alias/rotating"
    old = key_in(kms, alias)
    own = make_cluster(environment={**environment, "KMS_KEY_ID": None})
    with own.connect() as writer:
        writer.execute(f"CREATE EXTENSION {extension}")
        writer.execute("SELECT vod_tender_crypto.add_key('default', %s)", [kms.kek_uri(alias)])
        value = one(writer, "SELECT envelope_encrypt('token')")
        other = one(writer, "SELECT envelope_encrypt('other', context => '{\"tenant\": \"a\"}')")
        assert kek_id(writer, value) == old
        new = key_in(kms)
        kms.point_alias(alias, new)
        # The same session, which encrypted under the old key: a rewrap asks, whatever it remembers of that.
        moved = one(writer, "SELECT rewrap(%s)", value)
        assert payload(moved) == payload(value) and kek_id(writer, moved) == new
        assert "Decrypt" not in calls(writer)
    with own.connect() as mover:
        # What was written before the alias moved still opens, in a session that knows nothing yet.
        assert one(mover, "SELECT envelope_decrypt(%s)", value) == "token"
        assert one(mover, "SELECT envelope_decrypt(%s)", moved) == "token"
    with own.connect() as mover:
        assert one(mover, "SELECT envelope_decrypt(%s)", moved) == "token"
    with own.connect() as mover:
        again = one(mover, "SELECT rewrap(%s)", other)
        assert payload(again) == payload(other) and kek_id(mover, again) == new
        assert dek_never_came(mover)
        made = calls(mover)
        for fresh in (again, moved):
            assert one(mover, "SELECT rewrap(%s)", fresh) == fresh
        assert calls(mover) == made, "running it again calls nothing"


def test_an_alias_does_not_open_what_another_account_wrapped(make_cluster, extension, kms):
    """The recorded ARN is asked only in the alias's own account and region, whatever the envelope says."""
    own = make_cluster(environment=kms.environment("alias/e2e"))
    with own.connect() as connection:
        connection.execute(f"CREATE EXTENSION {extension}")
        value = binary(one(connection, "SELECT envelope_encrypt('token')"))
        foreign = kms.arn.replace("111122223333", "444455556666")
        forged = value.replace(kms.arn.encode(), foreign.encode())
        connection.execute("SELECT envelope_cache_clear()")
        with fails(UNVERIFIED):
            one(connection, "SELECT envelope_decrypt(%s::bytea)", forged)
        asked = {request.body.get("KeyId") for request in kms.requests if request.operation == "Decrypt"}
        assert foreign not in asked


def test_regions_that_come_from_different_places_are_one_region(make_cluster, extension, kms):
    """An alias takes its region from the environment, an ARN states it: AWS still moves the DEK by itself."""
    own = make_cluster(environment=kms.environment("alias/e2e"))
    with own.connect() as connection:
        connection.execute(f"CREATE EXTENSION {extension}")
        connection.execute("SELECT vod_tender_crypto.add_key('arn', %s)", [f"aws-kms://{kms.create_key()}"])
        value = one(connection, "SELECT envelope_encrypt('token')")
        moved = one(connection, "SELECT rewrap(%s, 'arn')", value)
        assert payload(moved) == payload(value) and kek_id(connection, moved) != kms.arn
        assert calls(connection) == {"GenerateDataKey": 1, "ReEncrypt": 1}


def test_from_local_to_aws_and_back(cluster, kms):
    with cluster.connect() as connection:
        add_local_key(cluster, connection, "file")
        connection.execute("SELECT vod_tender_crypto.add_key('aws', %s)", [kms.kek_uri()])
        value = one(connection, "SELECT envelope_encrypt('token', context => '{\"a\": \"b\"}', aad => 'row')")
        moved = one(connection, "SELECT rewrap(%s, 'aws')", value)
        assert kek_id(connection, moved) == kms.arn and payload(moved) == payload(value)
        back = one(connection, "SELECT rewrap(%s, 'file')", moved)
        assert kek_id(connection, back) == kek_id(connection, value)
        for each in (moved, back):
            assert one(connection, "SELECT envelope_decrypt(%s, aad => 'row')", each) == "token"
        assert kms.count("Encrypt") == 1 and kms.requests[0].body["EncryptionContext"] == {"a": "b"}
