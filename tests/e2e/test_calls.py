"""How many calls the key service gets: counted by the session and by the service."""

from __future__ import annotations

from helpers import calls, one


def configure(connection, kms):
    """The strict KMS's key as default key."""
    connection.execute("SELECT vod_tender_crypto.add_key('main', %s)", [kms.kek_uri()])
    connection.execute("SET vod_tender_crypto.default_key = 'main'")


def test_ten_thousand_values_make_ten_calls(cluster, kms):
    with cluster.connect() as writer:
        configure(writer, kms)
        writer.execute("CREATE TABLE t AS SELECT g, envelope_encrypt('value ' || g) AS v FROM generate_series(1, 10000) g")
        assert calls(writer) == {"GenerateDataKey": 10}
    with cluster.connect() as reader:
        right = "SELECT count(*) FROM t WHERE envelope_decrypt(v) = 'value ' || g"
        assert one(reader, right) == 10_000
        assert calls(reader) == {"Decrypt": 10}
        assert one(reader, right) == 10_000
        stats = one(reader, "SELECT vod_tender_crypto.session_stats()")
        assert (stats["cache_misses"], stats["cache_hits"], stats["values_decrypted"]) == (10, 19_990, 20_000)
    assert kms.counts == {"GenerateDataKey": 10, "Decrypt": 10}


def test_a_fresh_dek_for_every_value(cluster, kms):
    with cluster.connect() as connection:
        configure(connection, kms)
        connection.execute("SET vod_tender_crypto.dek_max_uses = 1")
        connection.execute("CREATE TABLE t AS SELECT envelope_encrypt('v' || g) AS v FROM generate_series(1, 100) g")
        stats = one(connection, "SELECT vod_tender_crypto.session_stats()")
        assert calls(connection) == {"GenerateDataKey": 100 + stats["deks_unused"]}, "some are made ahead: see test_calls_together.py"
        assert stats["deks_unused"] < 100
        assert one(connection, "SELECT count(DISTINCT split_part(v, ':', 3)) FROM t") == 100
    assert len(set(kms.deks)) == kms.count("GenerateDataKey")


def test_bytes_and_entries_limit_too(cluster, kms):
    with cluster.connect() as connection:
        configure(connection, kms)
        connection.execute("SET vod_tender_crypto.dek_max_bytes = '1kB'")
        connection.execute("SELECT envelope_encrypt(repeat('x', 512)) FROM generate_series(1, 10)")
        assert calls(connection) == {"GenerateDataKey": 5}
        connection.execute("SET vod_tender_crypto.dek_cache_entries = 2")
        connection.execute("SELECT envelope_encrypt(repeat('x', 512)) FROM generate_series(1, 10)")
        stats = one(connection, "SELECT vod_tender_crypto.session_stats()")
        assert stats["cached_deks"] == 2 and stats["cache_evictions"] >= 5


def test_nonces_of_a_million_values_are_distinct(cluster):
    from helpers import add_local_key

    with cluster.connect() as connection:
        add_local_key(cluster, connection)
        distinct = one(connection, """
            WITH made AS MATERIALIZED (SELECT envelope_encrypt('x'::bytea) AS v FROM generate_series(1, 1000000))
            SELECT count(DISTINCT substring(v FROM length(v) - 28 FOR 12)) FROM made""")
        assert distinct == 1_000_000


def test_a_key_that_is_not_configured_is_never_called(cluster, kms):
    from sqlstate import UNKNOWN_KEY, UNVERIFIED, fails
    from helpers import add_local_key, armor, binary

    other = kms.create_key()
    with cluster.connect() as connection:
        configure(connection, kms)
        value = one(connection, "SELECT envelope_encrypt('token')")
    with cluster.connect() as connection:
        connection.execute("SELECT vod_tender_crypto.drop_key('main')")
        add_local_key(cluster, connection, "local")
        kms.reset_record()
        with fails(UNKNOWN_KEY, "main"):
            one(connection, "SELECT envelope_decrypt(%s)", value)
        # The header claims the local key: its file is asked, the ARN beside it is not.
        renamed = binary(value).replace(b"\x04main", b"\x05local")
        with fails(UNVERIFIED):
            one(connection, "SELECT envelope_decrypt(%s)", armor(renamed, 28 + 5))
        connection.execute("SELECT vod_tender_crypto.add_key('main', %s)", [kms.kek_uri(other)])
        with fails(UNVERIFIED):
            one(connection, "SELECT envelope_decrypt(%s)", value)
        assert kms.count("Decrypt") == 0, "the recorded ARN is not the configured key's: nobody is asked"


def test_another_account_in_the_header_is_not_asked(cluster, kms):
    from sqlstate import UNVERIFIED, fails
    from helpers import armor, binary

    with cluster.connect() as connection:
        configure(connection, kms)
        value = one(connection, "SELECT envelope_encrypt('token')")
        arn = kms.arn.encode()
        forged = binary(value).replace(arn, arn.replace(b"111122223333", b"444455556666"))
        assert forged != binary(value)
        with fails(UNVERIFIED):
            one(connection, "SELECT envelope_decrypt(%s)", armor(forged, 28 + 5))
        assert calls(connection) == {"GenerateDataKey": 1}
