"""What goes in comes out: every version, both types, and nothing that was changed."""

from __future__ import annotations

import base64

import pytest

from helpers import add_local_key, armor, binary, new_key, one, v1_vectors
from sqlstate import INVALID_PARAMETER, MALFORMED_BYTEA, MALFORMED_TEXT, NOT_READY, NOT_TEXT, UNVERIFIED, fails


@pytest.fixture
def session(cluster):
    """A session with a local KEK as default key."""
    connection = cluster.connect()
    add_local_key(cluster, connection)
    yield connection
    connection.close()


@pytest.fixture
def legacy(cluster):
    """A session with a local KEK and the vectors' legacy key in a file."""
    connection = cluster.connect()
    add_local_key(cluster, connection)
    path = cluster.server_file("legacy.b64", v1_vectors()["encryption_key"] + "\n")
    connection.execute("SELECT envelope_cache_clear()")  # loads the library, which defines the settings
    connection.execute(f"SET vod_tender_crypto.legacy_key_file = '{path}'")
    yield connection
    connection.close()


def test_every_v1_vector_decrypts_and_upgrades(legacy):
    for vector in v1_vectors()["values"]:
        stored, plaintext = vector["stored"], vector["plaintext"]
        assert one(legacy, "SELECT envelope_decrypt(%s)", stored) == plaintext
        assert one(legacy, "SELECT envelope_decrypt(%s, version => 1)", stored) == plaintext
        upgraded = one(legacy, "SELECT envelope_upgrade(%s, aad => 'row')", stored)
        assert upgraded.startswith("kms:v2:")
        assert one(legacy, "SELECT envelope_decrypt(%s, aad => 'row', version => 2)", upgraded) == plaintext
        assert one(legacy, "SELECT envelope_upgrade(%s)", upgraded) == upgraded
        raw = base64.b64decode(stored)
        assert one(legacy, "SELECT envelope_decrypt(%s::bytea, version => 1)", raw) == plaintext.encode()
        assert one(legacy, "SELECT envelope_version(%s)", stored) == 1


def test_v1_values_that_must_fail(legacy):
    expected = {"tag flipped": UNVERIFIED, "shorter than nonce and tag": MALFORMED_TEXT, "not base64": MALFORMED_TEXT}
    vectors = v1_vectors()["must_fail"]
    assert {vector["why"] for vector in vectors} == set(expected)
    for vector in vectors:
        with fails(expected[vector["why"]]):
            one(legacy, "SELECT envelope_decrypt(%s, version => 1)", vector["stored"])
        with fails(INVALID_PARAMETER):
            one(legacy, "SELECT envelope_decrypt(%s)", vector["stored"])


def test_downgrade_is_the_way_back(legacy):
    envelope = one(legacy, "SELECT envelope_encrypt('token', aad => 'row')")
    direct = one(legacy, "SELECT envelope_downgrade(%s, aad => 'row')", envelope)
    assert one(legacy, "SELECT envelope_decrypt(%s, version => 1)", direct) == "token"
    assert one(legacy, "SELECT envelope_downgrade(%s)", direct) == direct
    again = one(legacy, "SELECT envelope_upgrade(%s, aad => 'row')", direct)
    assert one(legacy, "SELECT envelope_decrypt(%s, aad => 'row')", again) == "token"
    plain = one(legacy, "SELECT envelope_downgrade('plain', version => 0)")
    assert one(legacy, "SELECT envelope_decrypt(%s, version => 1)", plain) == "plain"
    raw = one(legacy, "SELECT envelope_downgrade('\\x00ff'::bytea, version => 0)")
    assert len(raw) == 30 and one(legacy, "SELECT envelope_decrypt(%s, version => 1)", raw) == b"\x00\xff"


def test_downgrade_without_a_legacy_key(session):
    envelope = one(session, "SELECT envelope_encrypt('token')")
    with fails(NOT_READY, "no legacy key"):
        one(session, "SELECT envelope_downgrade(%s)", envelope)


@pytest.mark.parametrize("plaintext", ["", "x", "contraseña-ключ-鍵-🔑", "kms:v2:no envelope", "t" * 300_000])
def test_text_and_bytea_come_back(session, plaintext):
    text = one(session, "SELECT envelope_encrypt(%s::text)", plaintext)
    assert one(session, "SELECT envelope_decrypt(%s)", text) == plaintext
    assert one(session, "SELECT envelope_decrypt(%s)", base64.b64encode(text.encode()).decode()) == plaintext
    data = one(session, "SELECT envelope_encrypt(%s::bytea)", plaintext.encode())
    assert data[:4] == b"\x8fVT2"
    assert one(session, "SELECT envelope_decrypt(%s::bytea)", data) == plaintext.encode()
    assert one(session, "SELECT is_envelope(%s) AND is_envelope(%s::bytea)", text, data)


def test_null_gives_null(session):
    for call in ["envelope_encrypt(NULL::text)", "envelope_encrypt(NULL::bytea)", "envelope_decrypt(NULL::text)",
                 "envelope_decrypt(NULL::bytea)", "rewrap(NULL::text)", "rewrap(NULL::bytea)",
                 "envelope_upgrade(NULL::text)", "envelope_upgrade(NULL::bytea)", "envelope_downgrade(NULL::text)",
                 "envelope_downgrade(NULL::bytea)", "envelope_version(NULL::text)", "envelope_info(NULL::bytea)",
                 "is_envelope(NULL::text)"]:
        assert one(session, f"SELECT {call} IS NULL"), call


def test_a_stored_empty_string_reads_as_empty(session):
    assert one(session, "SELECT envelope_decrypt('')") == ""
    for version in (0, 1, 2):
        assert one(session, "SELECT envelope_decrypt('', version => %s)", version) == ""
    assert one(session, "SELECT envelope_version('')") == 0
    upgraded = one(session, "SELECT envelope_upgrade('')")
    assert upgraded.startswith("kms:v2:") and one(session, "SELECT envelope_decrypt(%s)", upgraded) == ""


def test_aad_binds_a_value_to_its_row(session):
    value = one(session, "SELECT envelope_encrypt('token', aad => 'row 1')")
    assert one(session, "SELECT envelope_decrypt(%s, aad => 'row 1')", value) == "token"
    with fails(UNVERIFIED):
        one(session, "SELECT envelope_decrypt(%s, aad => 'row 2')", value)
    with fails(UNVERIFIED, "none was given"):
        one(session, "SELECT envelope_decrypt(%s)", value)
    with fails(UNVERIFIED):
        one(session, "SELECT envelope_decrypt(envelope_encrypt('token'), aad => 'row 1')")


def test_contexts_keep_values_apart(session):
    encrypt = "SELECT envelope_encrypt('token', context => %s::jsonb)"
    of_a, of_b = one(session, encrypt, '{"tenant": "a"}'), one(session, encrypt, '{"tenant": "b"}')
    decrypt = "SELECT envelope_decrypt(%s, context => %s::jsonb)"
    assert one(session, decrypt, of_a, '{"tenant": "a"}') == "token"
    with fails(UNVERIFIED):
        one(session, decrypt, of_b, '{"tenant": "a"}')
    renamed = binary(of_b).replace(b"\x00\x06tenant\x00\x01b", b"\x00\x06tenant\x00\x01a")
    for forged in (renamed, renamed[: -5 - 28] + binary(of_a)[-5 - 28:]):
        assert forged != binary(of_b)
        for _ in range(2):
            with fails(UNVERIFIED):
                one(session, "SELECT envelope_decrypt(%s::bytea)", forged)
            session.execute("SELECT envelope_cache_clear()")
    moved = binary(of_a)[: -5 - 28] + binary(of_b)[-5 - 28:]
    with fails(UNVERIFIED):
        one(session, "SELECT envelope_decrypt(%s::bytea)", moved)


ATTEMPT = """
CREATE OR REPLACE FUNCTION pg_temp.attempt(value {type}) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    PERFORM envelope_decrypt(value, aad => 'row');
    RETURN 'opened';
EXCEPTION WHEN OTHERS THEN
    RETURN SQLSTATE;
END $$
"""


def refusals(connection, kind: str, values: list) -> "list[str]":
    """How decrypting each value ends: an SQLSTATE, or `opened`."""
    connection.execute(ATTEMPT.format(type=kind))
    query = f"SELECT pg_temp.attempt(v) FROM unnest(%s::{kind}[]) WITH ORDINALITY AS u(v, n) ORDER BY n"
    return [row[0] for row in connection.execute(query, [values]).fetchall()]


def test_every_flipped_bit_is_refused(session):
    """All positions of a sample, in both forms; what is refused is refused for one of three reasons."""
    session.execute("SET vod_tender_crypto.plaintext_reads = 'allow'")
    value = one(session, "SELECT envelope_encrypt('secret', context => '{\"a\": \"b\"}', aad => 'row')")
    data = binary(value)
    flipped = [bytes(data[:at]) + bytes([data[at] ^ 1 << bit]) + bytes(data[at + 1:])
               for at in range(4, len(data)) for bit in range(8)]
    ends = refusals(session, "bytea", flipped)
    assert len(ends) == (len(data) - 4) * 8 and set(ends) <= {MALFORMED_BYTEA, UNVERIFIED, "42704"}
    armored = [armor(each, 28 + len("secret")) for each in flipped]
    assert set(refusals(session, "text", armored)) <= {MALFORMED_TEXT, UNVERIFIED, "42704"}
    # The magic's own bits: what no longer begins as an envelope is not one, and is no plaintext by default.
    session.execute("SET vod_tender_crypto.plaintext_reads = 'refuse'")
    magic = [bytes([*data[:at], data[at] ^ 1 << bit, *data[at + 1:]]) for at in range(4) for bit in range(8)]
    assert set(refusals(session, "bytea", magic)) == {INVALID_PARAMETER}


def test_every_flipped_bit_of_the_armored_text_is_refused(session):
    value = one(session, "SELECT envelope_encrypt('secret', aad => 'row')").encode()
    flipped = [value[:at] + bytes([value[at] ^ 1 << bit]) + value[at + 1:]
               for at in range(len(value)) for bit in range(7)]
    texts = [each.decode() for each in flipped if 0 not in each]
    assert "opened" not in refusals(session, "text", texts)


def test_truncations_and_trailing_bytes_are_refused(session):
    value = one(session, "SELECT envelope_encrypt('secret', aad => 'row')")
    data = binary(value)
    assert set(refusals(session, "text", [value[:length] for length in range(1, len(value))])) <= {
        MALFORMED_TEXT, UNVERIFIED, INVALID_PARAMETER}
    assert set(refusals(session, "bytea", [data[:length] for length in range(1, len(data))])) <= {
        MALFORMED_BYTEA, UNVERIFIED, INVALID_PARAMETER}
    trailing = [value + "A", value + "AAAA", value + ":", value + "=", value + "\n", value + " "]
    assert set(refusals(session, "text", trailing)) <= {MALFORMED_TEXT, UNVERIFIED}
    assert set(refusals(session, "bytea", [data + b"\0", data + b"\0" * 16, data + data])) == {UNVERIFIED}


def test_plaintext_is_refused_unless_allowed(legacy):
    with fails(INVALID_PARAMETER, "not encrypted"):
        one(legacy, "SELECT envelope_decrypt('plain')")
    legacy.execute("SET vod_tender_crypto.plaintext_reads = 'warn'")
    notices = []
    legacy.add_notice_handler(lambda notice: notices.append(notice.message_primary))
    assert one(legacy, "SELECT envelope_decrypt('plain')") == "plain"
    assert notices == ["a value that is not encrypted was read"]
    legacy.execute("SET vod_tender_crypto.plaintext_reads = 'allow'")
    assert one(legacy, "SELECT envelope_decrypt('plain')") == "plain"
    assert one(legacy, "SELECT envelope_decrypt('plain', version => 0)") == "plain"
    with fails(MALFORMED_TEXT):
        one(legacy, "SELECT envelope_decrypt('plain', version => 1)")
    with fails(MALFORMED_TEXT):
        one(legacy, "SELECT envelope_decrypt('plain', version => 2)")
    with fails(MALFORMED_TEXT):
        one(legacy, "SELECT envelope_decrypt('kms:v2:damaged')")
    assert len(notices) == 1


def test_envelopes_are_not_encrypted_twice(session):
    text = one(session, "SELECT envelope_encrypt('token')")
    with fails(INVALID_PARAMETER, "envelope already"):
        one(session, "SELECT envelope_encrypt(%s)", text)
    with fails(INVALID_PARAMETER):
        one(session, "SELECT envelope_encrypt(%s::bytea)", binary(text))


def test_a_legacy_value_without_its_key_is_not_called_plaintext(legacy):
    """The hint must not lead to encrypting ciphertext."""
    stored = v1_vectors()["values"][0]["stored"]
    legacy.execute("SET vod_tender_crypto.legacy_key_file = ''")
    with fails(INVALID_PARAMETER, "no configured legacy key opens it") as caught:
        one(legacy, "SELECT envelope_decrypt(%s)", stored)
    assert "version => 0" not in caught.value.diag.message_hint


def test_conversions_count_once(legacy):
    count = "SELECT (vod_tender_crypto.session_stats()->>'values_decrypted')::int"
    before = one(legacy, count)
    one(legacy, "SELECT envelope_upgrade(%s)", v1_vectors()["values"][0]["stored"])
    assert one(legacy, count) == before + 1


def test_write_format(legacy):
    legacy.execute("SET vod_tender_crypto.write_format = 'direct'")
    assert one(legacy, "SELECT envelope_version(envelope_encrypt('token', aad => 'row'))") == 1
    with fails("42704"):
        one(legacy, "SELECT envelope_encrypt('token', key => 'nope')")
    legacy.execute("SET vod_tender_crypto.write_format = 'envelope'")
    assert one(legacy, "SELECT envelope_version(envelope_encrypt('token', aad => 'row'))") == 2
    legacy.execute("SET vod_tender_crypto.write_format = 'auto'")
    assert one(legacy, "SELECT envelope_version(envelope_encrypt('token'))") == 2
    legacy.execute("SELECT vod_tender_crypto.drop_key('main')")
    assert one(legacy, "SELECT envelope_version(envelope_encrypt('token'))") == 1
    legacy.execute("SET vod_tender_crypto.legacy_key_file = ''")
    with fails(NOT_READY, "no key is configured"):
        one(legacy, "SELECT envelope_encrypt('token')")


def test_bytes_that_are_no_text_are_not_returned_as_text(session):
    data = one(session, "SELECT envelope_encrypt('\\xfffe'::bytea)")
    with fails(NOT_TEXT):
        one(session, "SELECT envelope_decrypt(%s)", armor(data, 28 + 2))


def test_info_shows_nothing_secret_and_calls_nothing(session):
    value = one(session, "SELECT envelope_encrypt('token', context => '{\"tenant\": \"a\"}', aad => 'row')")
    before = one(session, "SELECT vod_tender_crypto.session_stats()")["calls"]
    info = one(session, "SELECT envelope_info(%s)", value)
    assert (info["version"], info["key"], info["aad"], info["plaintext_bytes"]) == (2, "main", True, 5)
    assert info["context"] == {"tenant": "a"} and info["kek_id"].startswith("local:")
    assert one(session, "SELECT envelope_info('plain')")["form"] == "plaintext"
    assert one(session, "SELECT envelope_version(%s)", value) == 2
    assert one(session, "SELECT vod_tender_crypto.session_stats()")["calls"] == before


def test_another_server_encoding_stores_the_same_envelopes(shared_cluster, extension):
    """Text is sealed as UTF-8 whatever the database's encoding, so values move between databases."""
    shared_cluster.run("createdb", "-U", "postgres", "-T", "template0", "-E", "LATIN1", "--locale=C", "e2e_latin1")
    try:
        shared_cluster.psql(f"CREATE EXTENSION {extension}", dbname="e2e_latin1")
        with shared_cluster.connect("e2e_latin1") as latin:
            path = shared_cluster.server_file("latin.b64", new_key())
            latin.execute("SELECT vod_tender_crypto.add_key('default', %s)", [f"local://{path}"])
            value = one(latin, "SELECT envelope_encrypt('contraseña', aad => 'ñ')")
            assert one(latin, "SELECT envelope_decrypt(%s, aad => 'ñ')", value) == "contraseña"
            assert one(latin, "SELECT envelope_info(%s)", value)["plaintext_bytes"] == len("contraseña".encode())
            data = one(latin, "SELECT envelope_encrypt(%s::bytea)", "secret🔑".encode())
            with fails(NOT_TEXT) as caught:
                one(latin, "SELECT envelope_decrypt(%s)", armor(data, 28 + len("secret🔑".encode())))
            assert "f0" not in str(caught.value) and "secret" not in str(caught.value)
    finally:
        shared_cluster.dropdb("e2e_latin1")


def test_a_database_without_an_encoding(shared_cluster, extension):
    """is_envelope answers for whatever is stored; the others say that the argument is no text."""
    shared_cluster.run("createdb", "-U", "postgres", "-T", "template0", "-E", "SQL_ASCII", "--locale=C", "e2e_ascii")
    try:
        shared_cluster.psql(f"CREATE EXTENSION {extension}", dbname="e2e_ascii")
        with shared_cluster.connect("e2e_ascii") as ascii_only:
            assert one(ascii_only, "SELECT is_envelope(E'\\xff')") is False
            with fails(NOT_TEXT, "argument"):
                one(ascii_only, "SELECT envelope_encrypt(E'\\xff'::text)")
    finally:
        shared_cluster.dropdb("e2e_ascii")


def test_null_gives_null_whatever_else_is_given(session):
    assert one(session, "SELECT envelope_encrypt(NULL::text, key => 'nope', context => '[]', aad => 'x') IS NULL")
    assert one(session, "SELECT envelope_decrypt(NULL::text, context => '[]', version => 9) IS NULL")
