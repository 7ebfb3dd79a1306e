"""What bulk jobs do: migrate, rewrap_table, downgrade; how they go on, stop, and keep out of others' way."""

from __future__ import annotations

import base64
import os
import time

import psycopg
import pytest

import kms_faults as faults
from helpers import add_local_key, one
from jobs import (AAD, COLUMNS, MIGRATION, TABLE, Background, aad_of, add_legacy_key, add_tokens,
                  begin_migration, call, contents, fingerprint, job_errors, last_job, make_tokens, migrate, notices,
                  plaintext, progress, versions, wait_until, wrong_tokens)
from sqlstate import CANCELED, INVALID_PARAMETER, NO_RIGHT, NOT_READY, UNKNOWN_KEY, UNREACHABLE, UNVERIFIED, fails

TRIGGERED = "09000"
IN_TRANSACTION = "25001"
IN_USE = "55006"
TOO_MANY_FAILED = "22000"
NO_AAD = "22004"
TERMINATED = "57P01"

ROLLBACK_COLUMNS = {"encryption_version": 1, "encryption_key_id": "legacy"}
UNTOUCHED = "provider, channel, updated_at"

@pytest.fixture
def aws(cluster, kms):
    """A database with a legacy key whose default KEK is the strict KMS's; gives both."""
    add_legacy_key(cluster)
    with cluster.connect() as session:
        session.execute("SELECT vod_tender_crypto.add_key('default', %s)", [kms.kek_uri()])
    return cluster, kms


def all_is_well(connection, rows: int, version: int = 2) -> bool:
    """Every token of the table opens to what it was, and all are of one version."""
    assert versions(connection) == {version: 2 * rows}
    assert wrong_tokens(connection) == 0
    return True


def corrupted(connection, column: str, where: str) -> "list[str]":
    """Changes one character of the ciphertexts in `column`; gives what is stored there now."""
    other = f"CASE substr({column}, 30, 1) WHEN 'A' THEN 'B' ELSE 'A' END"
    return [value for value, in connection.execute(f"""
        UPDATE {TABLE} SET {column} = overlay({column} PLACING {other} FROM 30)
        WHERE {where} RETURNING {column}""").fetchall()]


# -- migrate -----------------------------------------------------------------------------------------------------


def test_both_old_versions_become_envelopes(connection):
    make_tokens(connection, 1000)
    assert set(versions(connection)) == {0, 1}
    untouched = fingerprint(connection, UNTOUCHED)
    job = migrate(connection)
    assert (job.state, job.rows_done, job.rows_failed, job.rows_left) == ("done", 1000, 0, 0)
    assert all_is_well(connection, 1000)
    assert fingerprint(connection, UNTOUCHED) == untouched
    assert one(connection, f"""SELECT count(*) FROM {TABLE} WHERE encryption_version = 2
                               AND encryption_key_id = envelope_info(access_token)->>'kek_id'""") == 1000
    rows = connection.execute("""SELECT schema_name, table_name, column_name, key, aad, version
                                 FROM vod_tender_crypto.protected_column ORDER BY column_name""").fetchall()
    assert rows == [("public", TABLE, column, None, AAD, "encryption_version") for column in COLUMNS], "it follows the default key"


def test_an_application_calls_it_with_parameters(connection):
    """Parameters sent apart from the statement, the extended protocol, as drivers of applications do."""
    make_tokens(connection, 10, direct="true")
    connection.execute("CALL vod_tender_crypto.migrate(%s, %s::name[], aad => %s)", [TABLE, COLUMNS, AAD])
    assert all_is_well(connection, 10)
    job = last_job(connection).job
    connection.execute("CALL vod_tender_crypto.resume(%s)", [job])


def test_running_it_twice_changes_nothing(connection):
    make_tokens(connection, 200)
    migrate(connection)
    before = contents(connection)
    again = migrate(connection)
    assert (again.state, again.rows_done) == ("done", 0)
    assert contents(connection) == before


def test_envelopes_are_never_encrypted_again(connection):
    make_tokens(connection, 100)
    connection.execute(f"""UPDATE {TABLE} SET access_token = envelope_encrypt({plaintext('access_token')},
                           aad => {aad_of('access_token')})""")
    # Twice in base64, as the legacy application's helper stores it.
    connection.execute(f"""UPDATE {TABLE} SET access_token = replace(encode(convert_to(access_token, 'UTF8'), 'base64'),
                           E'\\n', '') WHERE channel = 'channel7'""")
    before = fingerprint(connection, "access_token")
    job = migrate(connection)
    assert job.rows_done == 100 and fingerprint(connection, "access_token") == before
    assert all_is_well(connection, 100)


def test_empty_strings_and_nulls_stay(connection):
    make_tokens(connection, 9)
    connection.execute(f"""UPDATE {TABLE} SET access_token = '', refresh_token = NULL
                           WHERE channel IN ('channel1', 'channel2')""")
    connection.execute(f"UPDATE {TABLE} SET access_token = '' WHERE channel = 'channel3'")
    nothing = f"SELECT xmin::text, * FROM {TABLE} WHERE channel IN ('channel1', 'channel2') ORDER BY channel"
    before = connection.execute(nothing).fetchall()
    assert migrate(connection).rows_done == 7
    assert connection.execute(nothing).fetchall() == before
    empty, opened = connection.execute(f"""SELECT access_token, envelope_decrypt(refresh_token,
        aad => provider || '/' || channel || '/refresh_token') FROM {TABLE} WHERE channel = 'channel3'""").fetchone()
    assert empty == "" and opened.startswith("refresh_token_")


def test_registered_columns_need_no_arguments(connection):
    make_tokens(connection, 30)
    migrate(connection)
    add_tokens(connection, 31, 60)
    with fails(INVALID_PARAMETER, "encryption_version"):
        call(connection, "migrate", TABLE)
    job = call(connection, "migrate", TABLE, set_columns={"encryption_version": 2})
    assert (job.rows_done, job.aads, job.versions) == (30, [AAD, AAD], ["encryption_version"] * 2)
    assert all_is_well(connection, 60)
    with fails(INVALID_PARAMETER, "another aad"):
        call(connection, "migrate", TABLE, aad="provider", set_columns={})
    assert last_job(connection).job == job.job


def test_bookkeeping_may_name_the_key(connection, database):
    add_local_key(database, connection, "blue", default=False)
    make_tokens(connection, 20)
    connection.execute(f"ALTER TABLE {TABLE} ADD method text, ADD noted date, ADD old text DEFAULT 'old'")
    migrate(connection, key="blue", set_columns={"encryption_key_id": "{key}: {kek_id}", "method": "it's {key}",
                                                 "encryption_version": 2, "noted": "2024-01-31", "old": None})
    assert one(connection, f"""SELECT count(*) FROM {TABLE} WHERE encryption_version = 2 AND method = 'it''s blue'
        AND encryption_key_id = 'blue: ' || (envelope_info(access_token)->>'kek_id') AND noted = '2024-01-31'
        AND old IS NULL""") == 20


def test_context_beside_the_keys_own(connection):
    make_tokens(connection, 5)
    migrate(connection, context={"tenant": "a"})
    assert one(connection, f"SELECT count(*) FROM {TABLE} WHERE envelope_info(access_token)->'context' "
                           "@> '{\"tenant\": \"a\"}'") == 5
    assert all_is_well(connection, 5)


def test_where_clause_chooses_rows(connection):
    make_tokens(connection, 100)
    others = f"SELECT ctid, xmin::text, * FROM {TABLE} WHERE provider <> 'twitch' ORDER BY channel"
    before = connection.execute(others).fetchall()
    job = migrate(connection, where_clause="provider = 'twitch' AND length(channel) > 0")
    assert (job.state, job.rows_done, job.rows_left) == ("done", 50, 0)
    assert connection.execute(others).fetchall() == before
    assert versions(connection)[2] == 100 and wrong_tokens(connection) == 0


def test_a_growing_share_of_the_rows(connection):
    make_tokens(connection, 2000)
    migrated = f"SELECT provider, channel FROM {TABLE} WHERE encryption_version = 2"
    shares = []
    for percent in [10, 10, 50, 100]:
        job = migrate(connection, percent=percent)
        assert (job.state, job.rows_left) == ("done", 0)
        shares.append(set(connection.execute(migrated).fetchall()))
    tenth, tenth_again, half, whole = shares
    assert 120 < len(tenth) < 280 and 850 < len(half) < 1150 and len(whole) == 2000
    assert tenth_again == tenth and tenth < half < whole
    assert all_is_well(connection, 2000)


def test_a_batch_is_a_transaction_of_at_most_its_size(connection):
    make_tokens(connection, 100)
    migrate(connection, batch_size=7)
    sizes = [size for size, in connection.execute(f"SELECT count(*) FROM {TABLE} GROUP BY xmin::text")]
    assert max(sizes) == 7 and len(sizes) >= 100 / 7
    assert all_is_well(connection, 100)


def test_a_limited_speed_is_kept(connection):
    make_tokens(connection, 150)
    for arguments in [{}, {"batch_size": 10}]:
        began = time.monotonic()
        job = migrate(connection, max_rows_per_second=100, **arguments)
        took = time.monotonic() - began
        assert job.rows_done == 150 and 0.9 <= took <= 5, took
        call(connection, "downgrade", TABLE, set_columns=ROLLBACK_COLUMNS)


def test_a_dry_run_writes_nothing_and_says_what_would_happen(connection):
    make_tokens(connection, 300)
    corrupted(connection, "access_token", "channel = 'channel4'")
    connection.execute(f"VACUUM (FREEZE) {TABLE}")
    heard = notices(connection)

    def pages():
        connection.execute("CHECKPOINT")
        return one(connection, f"SELECT pg_read_binary_file(pg_relation_filepath('{TABLE}'))")

    before, rows = pages(), contents(connection)
    job = migrate(connection, dry_run=True)
    assert pages() == before and contents(connection) == rows
    assert (job.state, job.rows_done, job.rows_failed, job.rows_left) == ("done", 299, 1, 300)
    assert [(key["channel"], code) for key, _, code in job_errors(connection, job.job)] == [("channel4", UNVERIFIED)]
    assert one(connection, "SELECT count(*) FROM vod_tender_crypto.protected_column") == 0
    assert ("NOTICE", f"job {job.job} done: 299 rows would be done (dry run), 1 failed, 300 left") in heard


def test_notices_say_how_it_goes(connection):
    make_tokens(connection, 50)
    heard = notices(connection)
    job = migrate(connection)
    assert heard == [("NOTICE", f"job {job.job}: migrate of public.{TABLE}"),
                     ("NOTICE", f"job {job.job} done: 50 rows done, 0 failed, 0 left")]


def test_whatever_the_sessions_isolation_and_path(connection):
    make_tokens(connection, 50)
    connection.execute("SET default_transaction_isolation = 'serializable'")
    connection.execute("SET search_path = 'public'")
    migrate(connection)
    call(connection, "downgrade", TABLE, set_columns=ROLLBACK_COLUMNS)
    connection.execute(f"ALTER TABLE {TABLE} ADD CHECK (access_token NOT LIKE 'kms:v2:%')")
    with fails(TOO_MANY_FAILED):
        migrate(connection, max_errors=0)
    assert one(connection, "SHOW default_transaction_isolation") == "serializable"
    assert one(connection, "SHOW search_path") == "public"
    connection.execute("RESET default_transaction_isolation")
    assert all_is_well(connection, 50, version=1)


# -- triggers ----------------------------------------------------------------------------------------------------

TOUCH = f"""
    CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN NEW.updated_at := now(); RETURN NEW; END $$;
    CREATE TRIGGER touch BEFORE UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION touch()"""


def test_a_trigger_that_touches_the_row_fails_the_job(connection):
    make_tokens(connection, 50)
    connection.execute(TOUCH)
    before = contents(connection)
    with fails(TRIGGERED, "trigger"):
        migrate(connection)
    job = last_job(connection)
    assert (job.state, job.sqlstate, job.rows_done) == ("failed", TRIGGERED, 0)
    assert contents(connection) == before
    connection.execute(f"DROP TRIGGER touch ON {TABLE}")
    assert call(connection, "resume", job.job).state == "done"
    assert all_is_well(connection, 50)


def test_triggers_can_be_skipped(connection):
    make_tokens(connection, 50)
    connection.execute(TOUCH)
    untouched = fingerprint(connection, UNTOUCHED)
    assert migrate(connection, triggers="skip").rows_done == 50
    assert fingerprint(connection, UNTOUCHED) == untouched and all_is_well(connection, 50)
    assert one(connection, "SHOW session_replication_role") == "origin"
    connection.execute(f"UPDATE {TABLE} SET provider = provider")
    assert fingerprint(connection, UNTOUCHED) != untouched


def test_skipping_triggers_takes_the_right_to(database, connection, owner):
    make_tokens(connection, 5)
    connection.execute(f"ALTER TABLE {TABLE} OWNER TO {owner}")
    with database.connect(user=owner) as session, fails(NO_RIGHT):
        migrate(session, triggers="skip")
    assert one(connection, "SELECT count(*) FROM vod_tender_crypto.job") == 0


@pytest.mark.parametrize("change", [
    "NEW.access_token := OLD.access_token",
    "NEW.access_token := NEW.refresh_token",
    "NEW.refresh_token := NULL",
    "NEW.channel := NEW.channel || 'x'",
    "NEW.encryption_version := 1",
])
def test_a_trigger_that_changes_what_is_written_fails_it(connection, change):
    make_tokens(connection, 5)
    connection.execute(TOUCH.replace("NEW.updated_at := now()", change))
    before = contents(connection)
    with fails(TRIGGERED):
        migrate(connection)
    assert contents(connection) == before


def test_triggers_that_leave_the_row_alone_fire(connection):
    make_tokens(connection, 50)
    connection.execute("CREATE TABLE seen (channel text, version int)")
    connection.execute(TOUCH.replace("NEW.updated_at := now()",
                                     "INSERT INTO seen VALUES (NEW.channel, NEW.encryption_version)"))
    migrate(connection)
    assert one(connection, "SELECT count(DISTINCT channel) FROM seen WHERE version = 2") == 50
    assert all_is_well(connection, 50)


# -- rewrap_table and downgrade ----------------------------------------------------------------------------------


def test_rewrap_under_another_local_key(database, connection):
    make_tokens(connection, 300)
    migrate(connection)
    add_local_key(database, connection, "second", default=False)
    payloads = "split_part(access_token, ':', 4), split_part(refresh_token, ':', 4), updated_at"
    before = fingerprint(connection, payloads)
    job = call(connection, "rewrap_table", TABLE, key="second", set_columns={"encryption_key_id": "{kek_id}"})
    assert (job.state, job.rows_done, job.rows_left) == ("done", 300, 0)
    assert fingerprint(connection, payloads) == before and all_is_well(connection, 300)
    assert one(connection, f"""SELECT count(*) FROM {TABLE} WHERE envelope_info(access_token)->>'key' = 'second'
                               AND envelope_info(refresh_token)->>'key' = 'second'
                               AND encryption_key_id = envelope_info(access_token)->>'kek_id'""") == 300
    keys = connection.execute("SELECT DISTINCT key FROM vod_tender_crypto.protected_column").fetchall()
    assert keys == [("second",)]
    rows = contents(connection)
    assert call(connection, "rewrap_table", TABLE, key="second").rows_done == 0
    assert contents(connection) == rows


def wraps(connection) -> int:
    """How many different wrapped DEKs the table holds."""
    return one(connection, f"""SELECT count(DISTINCT head) FROM {TABLE},
        unnest(ARRAY[split_part(access_token, ':', 3), split_part(refresh_token, ':', 3)]) head""")


@pytest.mark.parametrize("check_wraps", [True, False])
def test_rewrap_asks_once_for_each_wrapped_dek(aws, check_wraps):
    database, kms = aws
    with database.connect() as connection:
        connection.execute("SET vod_tender_crypto.dek_max_uses = 100")
        make_tokens(connection, 1000)
        migrate(connection, batch_size=100)
        deks = wraps(connection)
        assert 20 <= deks <= 60
    with database.connect() as connection:
        connection.execute("SELECT vod_tender_crypto.add_key('second', %s)", [kms.kek_uri(kms.create_key())])
        payloads = "split_part(access_token, ':', 4), split_part(refresh_token, ':', 4), updated_at"
        before = fingerprint(connection, payloads)
        kms.reset_record()
        job = call(connection, "rewrap_table", TABLE, key="second", check_wraps=check_wraps, batch_size=100)
        assert (job.state, job.rows_done) == ("done", 1000)
        assert kms.counts == {"ReEncrypt": deks, **({"Decrypt": deks} if check_wraps else {})}
        assert fingerprint(connection, payloads) == before and wraps(connection) == deks
        assert all_is_well(connection, 1000)
        kms.reset_record()
        assert call(connection, "rewrap_table", TABLE, key="second").rows_done == 0
        assert not kms.counts


def test_migrate_without_checking_wraps_opens_none(aws):
    database, kms = aws
    with database.connect() as connection:
        make_tokens(connection, 100)
        migrate(connection, check_wraps=False)
        assert kms.count("Decrypt") == 0 and kms.count("GenerateDataKey") >= 1
        call(connection, "downgrade", TABLE, set_columns=ROLLBACK_COLUMNS)
        kms.reset_record()
        migrate(connection)
        assert kms.count("Decrypt") >= 1
    with database.connect() as connection:
        assert all_is_well(connection, 100)


@pytest.mark.parametrize("before", [
    "SELECT envelope_encrypt('x')",
    "SET vod_tender_crypto.dek_max_uses = 999",
    "SELECT vod_tender_crypto.set_key_state('default', 'active')",
])
def test_a_session_that_has_a_data_key_already(connection, before):
    make_tokens(connection, 10)
    connection.execute(before)
    migrate(connection, where_clause="provider = 'twitch'")
    connection.execute(before)
    assert migrate(connection).rows_done == 5 and all_is_well(connection, 10)


def test_rewrap_to_what_an_alias_points_to_now(aws):
    database, kms = aws
    with database.connect() as connection:
        connection.execute("SELECT vod_tender_crypto.drop_key('default')")
        connection.execute("SELECT vod_tender_crypto.add_key('default', %s)", [kms.kek_uri(kms.alias)])
        make_tokens(connection, 50)
        migrate(connection)
        new = kms.create_key()
        kms.point_alias(kms.alias, new)
        assert call(connection, "rewrap_table", TABLE).rows_done == 50
        under_new = f"SELECT count(*) FROM {TABLE} WHERE envelope_info(access_token)->>'kek_id' = %s"
        assert one(connection, under_new, new) == 50
        assert call(connection, "rewrap_table", TABLE).rows_done == 0
    with database.connect() as connection:
        assert all_is_well(connection, 50)


def test_back_to_the_old_format_and_forward_again(connection):
    make_tokens(connection, 300, direct="true")
    untouched = fingerprint(connection, UNTOUCHED)
    migrate(connection)
    job = call(connection, "downgrade", TABLE, set_columns=ROLLBACK_COLUMNS)
    assert (job.state, job.rows_done) == ("done", 300) and all_is_well(connection, 300, version=1)
    assert one(connection, f"""SELECT count(*) FROM {TABLE}
                               WHERE (encryption_version, encryption_key_id) = (1, 'legacy')""") == 300
    assert migrate(connection).rows_done == 300
    assert all_is_well(connection, 300) and fingerprint(connection, UNTOUCHED) == untouched


# -- what fails --------------------------------------------------------------------------------------------------


def test_one_damaged_row_among_ten_thousand(database, connection):
    make_tokens(connection, 10_000, direct="true")
    damaged, = corrupted(connection, "access_token", "channel = 'channel4711'")
    job = migrate(connection)
    assert (job.state, job.rows_done, job.rows_failed, job.rows_left) == ("done", 9_999, 1, 1)
    key = {"provider": "youtube", "channel": "channel4711"}
    assert job_errors(connection, job.job) == [(key, "access_token", UNVERIFIED)]
    row = connection.execute(f"SELECT access_token, encryption_version FROM {TABLE} WHERE channel = 'channel4711'")
    assert row.fetchone() == (damaged, 1)
    census = connection.execute("SELECT column_name, version, key, value_count FROM vod_tender_crypto.census(%s)",
                                [TABLE]).fetchall()
    assert sorted(census, key=str) == sorted([
        ("access_token", 2, "default", 9_999), ("access_token", 0, None, 1),
        ("refresh_token", 2, "default", 9_999), ("refresh_token", 1, None, 1)], key=str)
    plain = one(connection, "SELECT md5('youtube/channel4711')")
    said = one(connection, """SELECT string_agg(j::text, '') || (SELECT string_agg(e::text, '')
        FROM vod_tender_crypto.job_error e) FROM vod_tender_crypto.job j""") + database.log_text()
    assert "channel4711" in said and damaged[:20] not in said and plain not in said
    connection.execute(f"DELETE FROM {TABLE} WHERE channel = 'channel4711'")
    assert all_is_well(connection, 9_999)
    resumed = call(connection, "resume", job.job)
    assert (resumed.state, resumed.rows_failed, resumed.rows_left) == ("done", 0, 0)
    assert job_errors(connection, job.job) == []


def test_too_many_failures_stop_it(connection):
    make_tokens(connection, 200, direct="true")
    bad = corrupted(connection, "refresh_token", "channel LIKE 'channel1_'")
    add_tokens(connection, 201, 300, direct="true")
    with fails(TOO_MANY_FAILED, "more than 9 rows") as caught:
        migrate(connection, max_errors=9, batch_size=20)
    assert UNVERIFIED in caught.value.diag.message_detail
    job = last_job(connection)
    assert (job.state, job.sqlstate) == ("failed", TOO_MANY_FAILED) and len(bad) == 10
    assert job.rows_failed == 10 and 0 < job.rows_done < 290 and len(job_errors(connection, job.job)) == 10
    assert versions(connection)[2] == 2 * job.rows_done
    connection.execute(f"DELETE FROM {TABLE} WHERE channel LIKE 'channel1_'")
    job = call(connection, "resume", job.job)
    assert (job.state, job.rows_done, job.rows_failed) == ("done", 290, 0) and all_is_well(connection, 290)


def test_as_many_failures_as_allowed_do_not(connection):
    make_tokens(connection, 50, direct="true")
    corrupted(connection, "refresh_token", "channel LIKE 'channel1_'")
    job = migrate(connection, max_errors=10)
    assert (job.state, job.rows_done, job.rows_failed, job.rows_left) == ("done", 40, 10, 10)


def test_no_aad_no_envelope(connection):
    """What an aad expression gives NULL for is left as it is: it would be bound to no row."""
    make_tokens(connection, 90)
    aad = "encryption_key_id || '/' || channel || '/{column}'"
    job = migrate(connection, aad=aad, set_columns={"encryption_version": 2})
    assert (job.state, job.rows_done, job.rows_failed) == ("done", 60, 30)
    errors = job_errors(connection, job.job)
    assert {code for _, _, code in errors} == {NO_AAD} and len(errors) == 60
    assert versions(connection) == {2: 120, 0: 60}
    assert one(connection, f"SELECT count(*) FROM {TABLE} WHERE encryption_version = 0 AND encryption_key_id IS NULL "
                           "AND access_token = 'access_token_' || md5(provider || '/' || channel)") == 30


def test_what_looks_encrypted_is_never_taken_for_plaintext(connection):
    make_tokens(connection, 10, direct="false")
    looks = base64.b64encode(b"made by a legacy key that is gone").decode()
    connection.execute(f"UPDATE {TABLE} SET access_token = %s WHERE channel = 'channel3'", [looks])
    connection.execute("SET vod_tender_crypto.plaintext_reads = 'allow'")
    job = migrate(connection, version=None)
    assert (job.state, job.rows_done, job.rows_failed) == ("done", 9, 1)
    assert [(key["channel"], *rest) for key, *rest in job_errors(connection, job.job)] \
        == [("channel3", "access_token", INVALID_PARAMETER)]
    assert one(connection, f"SELECT access_token FROM {TABLE} WHERE channel = 'channel3'") == looks
    # The application's own word for it is taken.
    assert migrate(connection).rows_done == 1
    assert one(connection, f"""SELECT envelope_decrypt(access_token, aad => 'youtube/channel3/access_token')
                               FROM {TABLE} WHERE channel = 'channel3'""") == looks


def test_plaintext_that_is_not_stated_is_refused(connection):
    make_tokens(connection, 10, direct="false")
    before = contents(connection)
    job = migrate(connection, version=None)
    assert (job.rows_done, job.rows_failed) == (0, 10)
    assert {code for _, _, code in job_errors(connection, job.job)} == {INVALID_PARAMETER}
    assert contents(connection) == before


def test_unusable_arguments(connection):
    make_tokens(connection, 5)
    before = contents(connection)
    for arguments in [{"batch_size": 0}, {"batch_size": 1_000_001}, {"max_rows_per_second": 0}, {"percent": 0},
                      {"percent": 100.5}, {"percent": -1}, {"max_errors": -1}, {"triggers": "maybe"},
                      {"columns": []}, {"columns": ["access_token", "access_token"]}]:
        with fails(INVALID_PARAMETER):
            migrate(connection, **arguments)
    with fails(UNKNOWN_KEY):
        migrate(connection, key="nope")
    for name in ["batch_size", "percent", "max_errors", "triggers", "check_wraps", "dry_run"]:
        with pytest.raises(psycopg.Error):
            migrate(connection, **{name: None})
    with pytest.raises(psycopg.Error):
        call(connection, "migrate", None)
    assert one(connection, "SELECT count(*) FROM vod_tender_crypto.job") == 0 and contents(connection) == before


def test_without_the_keys_it_needs(cluster):
    with cluster.connect() as connection:
        connection.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
        with fails(NOT_READY):
            call(connection, "migrate", "t", columns=["v"])
        with fails(NOT_READY, "legacy"):
            call(connection, "downgrade", "t", columns=["v"])
        with fails(NOT_READY):
            call(connection, "rewrap_table", "t", columns=["v"])
        assert one(connection, "SELECT count(*) FROM vod_tender_crypto.job") == 0


# -- watching, stopping, resuming --------------------------------------------------------------------------------


def rows_done(connection) -> int:
    """Rows that jobs have done so far."""
    return one(connection, "SELECT coalesce(max(rows_done), 0) FROM vod_tender_crypto.job")


def half_done(database, rows: int = 400, **arguments) -> Background:
    """A slow migration of which something is done and something is left."""
    with database.connect() as watcher:
        make_tokens(watcher, rows)
        slow = begin_migration(database, max_rows_per_second=100, batch_size=50, **arguments)
        wait_until(lambda: rows_done(watcher), "for a batch")
    return slow


def test_progress_stop_and_resume(database, connection):
    with half_done(database) as slow:
        job = last_job(connection).job
        shown = progress(connection, job)
        assert shown.operation == "migrate" and shown.columns == COLUMNS and shown.target == TABLE
        assert (shown.state, shown.run_by, shown.rows_failed) == ("running", "postgres", 0)
        assert shown.rows_done > 0 and shown.rows_done + shown.rows_left == 400
        assert shown.rows_per_second > 0 and shown.estimated_end > shown.updated_at
        call(connection, "stop", job)
        assert slow.join().state == "stopped"
    stopped = progress(connection, job)
    assert stopped.state == "stopped" and 0 < stopped.rows_done < 400 and stopped.estimated_end is None
    assert versions(connection)[2] == 2 * stopped.rows_done and wrong_tokens(connection) == 0
    with fails(NOT_READY, "not running"):
        call(connection, "stop", job)
    connection.execute(f"UPDATE vod_tender_crypto.job SET max_rows_per_second = NULL WHERE job = {job}")
    done = call(connection, "resume", job)
    assert (done.state, done.rows_done, done.rows_left, done.run) == ("done", 400, 0, 2)
    assert all_is_well(connection, 400)


def test_a_notice_every_ten_seconds(connection):
    make_tokens(connection, 230)
    heard = notices(connection)
    migrate(connection, max_rows_per_second=20)
    between = [text for _, text in heard[1:-1]]
    assert len(between) == 1 and "rows done, about" in between[0] and "rows a second" in between[0], heard


def test_resume_goes_over_a_finished_job_again(connection):
    make_tokens(connection, 40)
    job = migrate(connection)
    add_tokens(connection, 41, 50)
    again = call(connection, "resume", job.job)
    assert (again.state, again.rows_done, again.run, again.run_rows_done) == ("done", 50, 2, 10)
    assert all_is_well(connection, 50)


def test_jobs_that_do_not_exist(connection):
    with fails(UNKNOWN_KEY, "no job"):
        call(connection, "resume", 999)
    with fails(NOT_READY):
        call(connection, "stop", 999)


def test_not_inside_a_transaction_block(database):
    with database.connect(autocommit=False) as connection:
        make_tokens(connection, 5)
        connection.commit()
        for procedure, what, arguments in [("migrate", TABLE, MIGRATION), ("rewrap_table", TABLE, {"columns": COLUMNS}),
                                           ("downgrade", TABLE, {"columns": COLUMNS}), ("resume", 1, {})]:
            with fails(IN_TRANSACTION):
                call(connection, procedure, what, **arguments)
            connection.rollback()
        assert one(connection, "SELECT count(*) FROM vod_tender_crypto.job") == 0


def ended(connection, job: int):
    """What job_progress shows of a job that does not run any more; None of one that runs."""
    shown = progress(connection, job)
    return None if shown.state == "running" else shown


def interrupted_by_a_cancel(database, slow):
    with database.connect() as watcher:
        watcher.execute("SELECT pg_cancel_backend(%s)", [slow.pid])


def interrupted_by_a_termination(database, slow):
    with database.connect() as watcher:
        watcher.execute("SELECT pg_terminate_backend(%s)", [slow.pid])


def interrupted_by_its_client(database, slow):
    slow.connection.cancel_safe()


@pytest.mark.parametrize("interrupt, state", [(interrupted_by_a_cancel, CANCELED),
                                              (interrupted_by_a_termination, TERMINATED),
                                              (interrupted_by_its_client, CANCELED)])
def test_an_interrupted_job_is_shown_and_resumed(database, connection, interrupt, state):
    with half_done(database) as slow:
        interrupt(database, slow)
        assert slow.wait().sqlstate == state
        if state == CANCELED:
            assert one(slow.connection, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0
    job = last_job(connection)
    shown = wait_until(lambda: ended(connection, job.job), "for the session to go")
    assert shown.state == "interrupted" or (state, shown.state, shown.sqlstate) == (CANCELED, "failed", CANCELED)
    assert 0 < job.rows_done < 400 and versions(connection)[2] == 2 * job.rows_done
    connection.execute("UPDATE vod_tender_crypto.job SET max_rows_per_second = NULL")
    done = call(connection, "resume", job.job)
    assert (done.state, done.rows_done) == ("done", 400) and all_is_well(connection, 400)


def test_a_statement_timeout_interrupts_it(database, connection):
    with half_done(database, settings="SET statement_timeout = '1s'") as slow:
        assert slow.wait().sqlstate == CANCELED
        job = last_job(connection)
        assert ended(connection, job.job) and 0 < job.rows_done < 400
        # The session goes on, each time for a second.
        with fails(CANCELED):
            call(slow.connection, "resume", job.job)
    assert job.rows_done < last_job(connection).rows_done < 400
    assert versions(connection)[2] == 2 * last_job(connection).rows_done and wrong_tokens(connection) == 0


def test_an_interrupted_job_that_nobody_runs_is_stopped_at_once(database, connection):
    with half_done(database) as slow:
        interrupted_by_a_termination(database, slow)
        slow.wait()
    job = last_job(connection).job
    assert wait_until(lambda: ended(connection, job), "for the session to go").state == "interrupted"
    call(connection, "stop", job)
    assert progress(connection, job).state == "stopped"


def test_the_tables_owner_resumes_what_another_began(database, connection, owner):
    with half_done(database) as slow:
        interrupted_by_a_cancel(database, slow)
        slow.wait()
    job = last_job(connection).job
    connection.execute("UPDATE vod_tender_crypto.job SET max_rows_per_second = NULL")
    with database.connect(user=owner) as session:
        with fails(UNKNOWN_KEY, "no job"):
            call(session, "resume", job)
        connection.execute(f"ALTER TABLE {TABLE} OWNER TO {owner}")
        done = call(session, "resume", job)
        assert (done.state, done.rows_done, done.run_by) == ("done", 400, owner)
    assert all_is_well(connection, 400)


# -- beside others -----------------------------------------------------------------------------------------------


def test_a_running_job_stays_its_sessions_own(database, connection):
    """Between its transactions too: it is never shown as interrupted, and nobody takes it over."""
    make_tokens(connection, 3000)
    with begin_migration(database, batch_size=10) as running:
        job = wait_until(lambda: rows_done(connection) and last_job(connection).job)
        shown, refused = set(), []
        while len(refused) < 20 and running.running():
            shown |= {progress(connection, job).state for _ in range(30)}
            try:
                call(connection, "resume", job)
            except psycopg.Error as error:
                refused.append(error.sqlstate)
        assert running.join().rows_done == 3000
    assert refused and set(refused) == {IN_USE} and shown <= {"running", "done"}, shown


@pytest.fixture
def waiting(aws):
    """A migration of 100 rows that waits for its key service, the service, and a session beside it."""
    database, kms = aws
    with database.connect() as beside:
        make_tokens(beside, 100)
        kms.inject(faults.delay(1.2), "GenerateDataKey", times=1)
        beside.execute("SET lock_timeout = '500ms'")
        with begin_migration(database) as job:
            kms.wait_for("GenerateDataKey")
            yield job, kms, beside


def test_a_job_is_run_by_one_session_only(waiting):
    job, kms, beside = waiting
    running = last_job(beside).job
    assert progress(beside, running).state == "running"
    with fails(IN_USE, "another session"):
        call(beside, "resume", running)
    assert job.running() and job.join().rows_done == 100
    assert all_is_well(beside, 100)


def test_no_lock_on_the_table_while_it_waits_for_the_key_service(waiting):
    job, _, beside = waiting
    locks = beside.execute("""SELECT c.oid::regclass::text, l.mode FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
        LEFT JOIN pg_index i ON i.indexrelid = c.oid
        WHERE l.pid = %s AND %s::regclass IN (c.oid, i.indrelid)""", [job.pid, TABLE]).fetchall()
    assert locks == []
    beside.execute(f"ALTER TABLE {TABLE} ADD COLUMN note text DEFAULT 'new'")
    assert job.running()
    assert job.join().rows_done == 100 and all_is_well(beside, 100)
    assert one(beside, f"SELECT count(*) FROM {TABLE} WHERE note = 'new'") == 100


def test_what_an_application_writes_meanwhile_is_never_overwritten(waiting):
    job, _, beside = waiting
    with beside.transaction():
        beside.execute("SET LOCAL vod_tender_crypto.write_format = 'direct'")
        beside.execute(f"""UPDATE {TABLE} SET access_token = envelope_encrypt('new token'), updated_at = '2021-01-01',
                           encryption_version = 1 WHERE channel = 'channel2'""")
    beside.execute(f"UPDATE {TABLE} SET updated_at = '2022-02-02' WHERE channel = 'channel4'")
    beside.execute(f"DELETE FROM {TABLE} WHERE channel = 'channel5'")
    beside.execute(f"UPDATE {TABLE} SET channel = 'renamed' WHERE channel = 'channel6'")
    add_tokens(beside, 101, 110)
    assert job.running()
    done = job.join()
    assert (done.state, done.rows_done, done.rows_left) == ("done", 109, 0) and done.rows_skipped == 4
    assert versions(beside) == {2: 218}
    changed = f"""SELECT envelope_decrypt(access_token, aad => {aad_of('access_token')}), updated_at::date::text
                  FROM {TABLE} WHERE channel = 'channel2'"""
    assert beside.execute(changed).fetchone() == ("new token", "2021-01-01")
    assert one(beside, f"SELECT updated_at::date::text FROM {TABLE} WHERE channel = 'channel4'") == "2022-02-02"
    old = "'access_token_' || md5('twitch/channel6')"
    assert one(beside, f"""SELECT envelope_decrypt(access_token, aad => 'twitch/renamed/access_token') = {old}
                           FROM {TABLE} WHERE channel = 'renamed'""")
    beside.execute(f"DELETE FROM {TABLE} WHERE channel IN ('channel2', 'renamed')")
    assert all_is_well(beside, 107)


@pytest.mark.parametrize("rewrite", [
    f"VACUUM FULL {TABLE}",
    f"DELETE FROM {TABLE} WHERE provider = 'twitch'; VACUUM FULL {TABLE}",
    f"CLUSTER {TABLE} USING {TABLE}_pkey",
    f"CREATE TABLE kept AS TABLE {TABLE}; TRUNCATE {TABLE}; INSERT INTO {TABLE} SELECT * FROM kept ORDER BY 2 DESC",
    f"ALTER TABLE {TABLE} ALTER channel TYPE varchar(40)",
])
def test_a_table_that_is_rewritten_meanwhile(waiting, rewrite):
    job, _, beside = waiting
    for statement in rewrite.split(";"):
        beside.execute(statement)
    assert job.running()
    rows = one(beside, f"SELECT count(*) FROM {TABLE}")
    assert job.join().rows_done == rows and all_is_well(beside, rows)


def test_a_table_that_is_dropped_meanwhile(waiting):
    job, _, beside = waiting
    beside.execute(f"DROP TABLE {TABLE}")
    assert job.wait() is not None and last_job(beside).state == "failed"


def test_another_table_that_takes_the_name_meanwhile(waiting):
    """A row is known by place and writer; the table that has the name now is another one with rows like these."""
    job, _, beside = waiting
    beside.execute(f"CREATE TABLE other (LIKE {TABLE} INCLUDING ALL)")
    beside.execute(f"INSERT INTO other SELECT * FROM {TABLE}")
    before = contents(beside, "other")
    with beside.transaction():
        beside.execute(f"ALTER TABLE {TABLE} RENAME TO old")
        beside.execute(f"ALTER TABLE other RENAME TO {TABLE}")
    assert job.running()
    job.wait()
    assert contents(beside) == before
    assert wrong_tokens(beside, "old") == 0 and set(versions(beside, "old")) == {2}


def test_a_locked_row_is_passed_by_and_come_back_to(database, connection):
    make_tokens(connection, 100)
    with database.connect(autocommit=False) as holder:
        holder.execute(f"SELECT FROM {TABLE} WHERE channel = 'channel42' FOR UPDATE")
        with begin_migration(database, batch_size=30) as running:
            wait_until(lambda: rows_done(connection) == 99, "for the others")
            assert running.running() and versions(connection)[2] == 198
            holder.rollback()
            job = running.join()
    assert (job.state, job.rows_done, job.rows_left) == ("done", 100, 0) and job.rows_skipped > 0 and job.pass_ > 1
    assert all_is_well(connection, 100)


def test_a_row_with_uncommitted_changes_is_waited_out(database, connection):
    make_tokens(connection, 100)
    with database.connect(autocommit=False) as holder:
        holder.execute(f"UPDATE {TABLE} SET updated_at = '2023-03-03' WHERE channel = 'channel42'")
        holder.execute(f"DELETE FROM {TABLE} WHERE channel = 'channel43'")
        with begin_migration(database) as running:
            wait_until(lambda: rows_done(connection) == 98, "for the others")
            holder.commit()
            job = running.join()
    assert (job.state, job.rows_done) == ("done", 99) and all_is_well(connection, 99)
    assert one(connection, f"SELECT updated_at::date::text FROM {TABLE} WHERE channel = 'channel42'") == "2023-03-03"


def test_applications_read_and_write_while_it_runs(database, connection):
    """Read committed updates of rows that the job rewrites wait for a batch at most and lose nothing."""
    make_tokens(connection, 2000)
    connection.execute("SET vod_tender_crypto.plaintext_reads = 'allow'")
    writes = 0
    with begin_migration(database, max_rows_per_second=2000, batch_size=100) as running:
        while running.running():
            number = writes % 2000 + 1
            writes += 1
            connection.execute(f"UPDATE {TABLE} SET updated_at = updated_at + interval '1 second' WHERE channel = %s",
                               [f"channel{number}"])
        assert running.join().rows_done == 2000
    assert all_is_well(connection, 2000)
    assert one(connection, f"""SELECT sum(extract(epoch FROM updated_at - '2020-01-01'))::int FROM {TABLE}""") == writes


# -- the key service ---------------------------------------------------------------------------------------------

QUICK = """SET vod_tender_crypto.kms_max_attempts = 2; SET vod_tender_crypto.kms_retry_backoff = '10ms';
           SET vod_tender_crypto.kms_attempt_timeout = '500ms'"""


def test_a_service_that_throttles_slows_it_and_fails_no_row(aws):
    database, kms = aws
    with database.connect() as connection:
        connection.execute(QUICK)
        make_tokens(connection, 200)
        kms.inject(faults.throttle(), seconds=30)
        began = time.monotonic()
        job = migrate(connection)
        took = time.monotonic() - began
        assert (job.state, job.rows_done, job.rows_failed) == ("done", 200, 0) and 30 <= took <= 100, took
        assert job_errors(connection, job.job) == []
        # Asked again at growing intervals, and not all the time.
        assert 5 <= sum(request.error == "ThrottlingException" for request in kms.requests) <= 60
        assert all_is_well(connection, 200)


@pytest.mark.parametrize("fault", [faults.cut(-1), faults.never_answer()])
def test_a_service_out_of_reach_stops_it_where_it_is(aws, fault):
    database, kms = aws
    with database.connect() as connection:
        # A DEK serves for a second only: the job needs the service again and again.
        settings = QUICK + "; SET vod_tender_crypto.dek_max_age = '1s'"
        with half_done(database, 600, settings=settings) as slow:
            kms.inject(fault)
            assert slow.wait().sqlstate == UNREACHABLE
            assert "resume(" in slow.error.diag.message_hint
        job = last_job(connection)
        assert (job.state, job.sqlstate, job.rows_failed) == ("failed", UNREACHABLE, 0)
        assert 0 < job.rows_done < 600 and job.next_row != "(0,0)"
        shown = progress(connection, job.job)
        assert (shown.state, shown.sqlstate) == ("failed", UNREACHABLE) and "default" in shown.message
        with fails(UNREACHABLE):
            connection.execute(QUICK)
            call(connection, "resume", job.job)
        assert last_job(connection).rows_done == job.rows_done
        kms.clear_faults()
        connection.execute("UPDATE vod_tender_crypto.job SET max_rows_per_second = NULL")
        done = call(connection, "resume", job.job)
        assert (done.state, done.rows_done, done.pass_) == ("done", 600, 1) and all_is_well(connection, 600)


def test_a_service_that_refuses_stops_it(aws):
    database, kms = aws
    with database.connect() as connection:
        make_tokens(connection, 50)
        before = contents(connection)
        kms.inject(faults.deny())
        with fails("28000"):
            migrate(connection)
        kms.clear_faults()
        kms.disable(kms.arn)
        with fails(NOT_READY):
            call(connection, "resume", last_job(connection).job)
        assert contents(connection) == before and last_job(connection).rows_failed == 0
        kms.enable(kms.arn)
        assert call(connection, "resume", last_job(connection).job).rows_done == 50


def wrong_blob():
    """A wrapped DEK that nobody can open, beside a plaintext that is fine."""
    made_up = base64.b64encode(os.urandom(184)).decode()
    return faults.Fault("wrong_blob", mutate=lambda body: {**body, "CiphertextBlob": made_up})


def test_a_wrapped_dek_that_cannot_be_opened_is_never_stored(aws):
    database, kms = aws
    with database.connect() as connection:
        make_tokens(connection, 50)
        before = contents(connection)
        kms.inject(wrong_blob(), "GenerateDataKey")
        with pytest.raises(psycopg.Error) as caught:
            migrate(connection)
        assert caught.value.sqlstate == UNVERIFIED
        assert contents(connection) == before and last_job(connection).state == "failed"
        assert kms.count("Decrypt") >= 1
        kms.clear_faults()
    with database.connect() as connection:
        assert call(connection, "resume", last_job(connection).job).rows_done == 50
        assert all_is_well(connection, 50)


def test_a_rewrapped_dek_that_cannot_be_opened_is_never_stored(aws):
    database, kms = aws
    with database.connect() as connection:
        make_tokens(connection, 50)
        migrate(connection)
        connection.execute("SELECT vod_tender_crypto.add_key('second', %s)", [kms.kek_uri(kms.create_key())])
        before = contents(connection)
        kms.inject(wrong_blob(), "ReEncrypt")
        try:
            assert call(connection, "rewrap_table", TABLE, key="second").rows_failed == 50
        except psycopg.Error as error:
            assert error.sqlstate == UNVERIFIED
        assert contents(connection) == before
        assert one(connection, "SELECT DISTINCT key FROM vod_tender_crypto.protected_column") is None


def test_a_values_own_key_that_is_gone_is_that_values_error(aws):
    """Each wrapped DEK that its service refuses costs a call or two a batch, not one a row."""
    database, kms = aws
    with database.connect() as connection:
        old = kms.create_key()
        connection.execute("SELECT vod_tender_crypto.add_key('old', %s)", [kms.kek_uri(old)])
        make_tokens(connection, 60, direct="true")
        migrate(connection, key="old", where_clause="provider = 'twitch'")
        migrate(connection, key="default")
    kms.disable(old)
    with database.connect() as connection:
        kms.reset_record()
        job = call(connection, "downgrade", TABLE, set_columns=ROLLBACK_COLUMNS)
        assert (job.state, job.rows_done, job.rows_failed) == ("done", 30, 30)
        assert {code for _, _, code in job_errors(connection, job.job)} == {NOT_READY}
        assert kms.count("Decrypt") <= 12
        kms.enable(old)
        assert call(connection, "resume", job.job).rows_done == 60
        assert all_is_well(connection, 60, version=1)


def test_a_kek_that_is_replaced_by_name_only_fails_cleanly(database, connection):
    """Values under a key that is no longer configured are errors, and stay."""
    add_local_key(database, connection, "gone", default=False)
    connection.execute("SET vod_tender_crypto.default_key = 'default'")
    make_tokens(connection, 10)
    migrate(connection, key="gone")
    connection.execute("SELECT vod_tender_crypto.drop_key('gone')")
    before = contents(connection)
    job = call(connection, "rewrap_table", TABLE)
    assert (job.rows_done, job.rows_failed, job.rows_left) == (0, 10, 10)
    assert {code for _, _, code in job_errors(connection, job.job)} == {UNKNOWN_KEY}
    assert contents(connection) == before
