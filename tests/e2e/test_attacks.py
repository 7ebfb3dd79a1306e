"""What reviewers broke once: each attack must end in the error that its test names."""

from __future__ import annotations

from helpers import add_local_key, armor, binary, new_key, one
from sqlstate import NOT_READY, UNVERIFIED, fails


def test_parallel_mode_does_not_keep_a_disabled_key(cluster):
    """A parallel statement under an old snapshot must not make the session miss the change for good."""
    with cluster.connect() as admin, cluster.connect() as user:
        add_local_key(cluster, admin, "default")
        admin.execute("CREATE TABLE t AS SELECT envelope_encrypt('token') AS v")
        user.execute("SET force_parallel_mode = on")
        user.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        assert one(user, "SELECT envelope_decrypt(v) FROM t") == "token"
        admin.execute("SELECT vod_tender_crypto.set_key_state('default', 'disabled')")
        with fails(NOT_READY, "disabled"):
            one(user, "SELECT envelope_decrypt(v) FROM t")
        user.execute("ROLLBACK")
        with fails(NOT_READY, "disabled"):
            one(user, "SELECT envelope_decrypt(v) FROM t")


def test_changes_that_fire_only_row_triggers_are_noticed(cluster):
    """As a logical replication's apply worker makes them: session_replication_role is replica there."""
    with cluster.connect() as admin, cluster.connect() as user:
        add_local_key(cluster, admin, "default")
        value = one(user, "SELECT envelope_encrypt('token')")
        admin.execute("ALTER TABLE vod_tender_crypto.kek DISABLE TRIGGER kek_changed")
        admin.execute("SET session_replication_role = replica")
        admin.execute("UPDATE vod_tender_crypto.kek SET state = 'disabled'")
        with fails(NOT_READY, "disabled"):
            one(user, "SELECT envelope_decrypt(%s)", value)


def test_a_key_beyond_ascii_closes_no_other(shared_cluster, extension):
    shared_cluster.run("createdb", "-U", "postgres", "-T", "template0", "-E", "LATIN1", "--locale=C", "e2e_latin_keys")
    try:
        shared_cluster.psql(f"CREATE EXTENSION {extension}", dbname="e2e_latin_keys")
        with shared_cluster.connect("e2e_latin_keys") as latin:
            path = shared_cluster.server_file("latin-keys.b64", new_key())
            latin.execute("SELECT vod_tender_crypto.add_key('default', %s)", [f"local://{path}"])
            value = one(latin, "SELECT envelope_encrypt('token')")
            latin.execute("SELECT vod_tender_crypto.add_key('two', %s, '{\"tenant\": \"café\"}')", [f"local://{path}"])
            latin.execute("SELECT vod_tender_crypto.add_key('three', 'local:///café')")
            assert one(latin, "SELECT envelope_decrypt(%s)", value) == "token"
            other = one(latin, "SELECT envelope_encrypt('token', key => 'two')")
            assert one(latin, "SELECT envelope_decrypt(%s, context => '{\"tenant\": \"café\"}')", other) == "token"
            with fails(NOT_READY):
                one(latin, "SELECT envelope_encrypt('token', key => 'three')")
    finally:
        shared_cluster.dropdb("e2e_latin_keys")


def test_the_environments_key_does_not_stand_in_for_a_disabled_one(make_cluster, extension):
    """Both are one KEK; the key name in an envelope is not authenticated."""
    own = make_cluster()
    path = own.server_file("shared.b64", new_key())
    own.environment["KMS_KEY_ID"] = f"local://{path}"
    own.restart()
    with own.connect() as connection:
        connection.execute(f"CREATE EXTENSION {extension}")
        connection.execute("SELECT vod_tender_crypto.add_key('tenant', %s, '{\"tenant\": \"b\"}')", [f"local://{path}"])
        value = one(connection, "SELECT envelope_encrypt('token', key => 'tenant')")
        connection.execute("SELECT vod_tender_crypto.set_key_state('tenant', 'disabled')")
        forged = binary(value).replace(b"\x06tenant\x00\x16", b"\x07default\x00\x16")
        assert forged != binary(value)
        with fails(UNVERIFIED, "key requires"):
            one(connection, "SELECT envelope_decrypt(%s)", armor(forged, 28 + 5))


def test_a_rewrap_after_the_targets_file_was_replaced_is_readable(cluster):
    with cluster.connect() as connection:
        add_local_key(cluster, connection, "a")
        path = add_local_key(cluster, connection, "b", default=False)
        values = [one(connection, "SELECT envelope_encrypt('token')") for _ in range(2)]
        one(connection, "SELECT rewrap(%s, 'b')", values[0])
        cluster.server_file(path.rsplit("/", 1)[1], new_key())
        moved = one(connection, "SELECT rewrap(%s, 'b')", values[1])
    with cluster.connect() as fresh:
        assert one(fresh, "SELECT envelope_decrypt(%s)", moved) == "token"


def test_the_words_of_encrypt_are_not_passed_on(cluster, kms):
    """Its request holds a DEK, and a service may quote it."""
    import kms_faults as faults

    with cluster.connect() as connection:
        add_local_key(cluster, connection, "file")
        connection.execute("SELECT vod_tender_crypto.add_key('aws', %s)", [kms.kek_uri()])
        value = one(connection, "SELECT envelope_encrypt('token')")
        kms.inject(faults.error("ValidationException", "Value 'QUOTED-DEK' at 'plaintext' failed"), "Encrypt")
        with fails(NOT_READY, "Encrypt") as caught:
            one(connection, "SELECT rewrap(%s, 'aws')", value)
        assert "QUOTED" not in str(caught.value)
