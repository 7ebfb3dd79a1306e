"""Calls that go together: data keys that a statement fetches ahead, what jobs and verify() ask for, and how much time it saves."""

from __future__ import annotations

import base64
import sys
import time
from pathlib import Path

import pytest

import kms_faults as faults
from helpers import binary, calls, lengthened, one
from jobs import call, job_errors
from sqlstate import CANCELED, THROTTLED, UNREACHABLE, fails
from test_interrupts import SLACK, in_background

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import calls as bench  # noqa: E402


@pytest.fixture
def session(database, kms):
    """A session in a database whose key main is in the strict KMS: a data key for every value, eight calls at a time."""
    with database.connect() as connection:
        connection.execute("SELECT vod_tender_crypto.add_key('main', %s)", [kms.kek_uri()])
        connection.execute("""SET vod_tender_crypto.default_key = 'main'; SET vod_tender_crypto.dek_max_uses = 1;
                              SET vod_tender_crypto.kms_concurrency = 8""")
        yield connection


def stats(connection) -> dict:
    """The session's counters."""
    return one(connection, "SELECT vod_tender_crypto.session_stats()")


def unused(connection) -> int:
    """Data keys that were made ahead and wiped."""
    return stats(connection)["deks_unused"]


def encrypt(connection, values: int) -> None:
    """Encrypts so many values in one statement."""
    connection.execute(f"SELECT envelope_encrypt('value ' || n) FROM generate_series(1, {values}) n")


# -- data keys that a statement fetches ahead -----------------------------------------------------------


def test_a_bulk_statement_fetches_growing_groups(session, kms):
    kms.inject(faults.delay(0.02))
    session.execute("CREATE TABLE t AS SELECT n, envelope_encrypt('value ' || n) AS v FROM generate_series(1, 100) n")
    made = kms.count("GenerateDataKey")
    assert made == 128 and kms.peak_in_flight == 8, "1, 1, 2, 4, 8, 16, 32, 32, 32"
    assert (stats(session)["deks_made"], unused(session)) == (made, made - 100)
    assert stats(session)["cached_deks"] == 100, "what was not used opens nothing"
    assert one(session, "SELECT count(DISTINCT split_part(v, ':', 3)) FROM t") == 100
    assert one(session, "SELECT count(*) FROM t WHERE envelope_decrypt(v) = 'value ' || n") == 100
    assert calls(session) == {"GenerateDataKey": made}


@pytest.mark.parametrize("uses", [1, 3, 10])
def test_never_more_stay_unused_than_were_used(session, kms, uses):
    session.execute(f"SET vod_tender_crypto.dek_max_uses = {uses}")
    made_before = unused_before = 0
    for values in (1, 2, 5, 17, 64):
        session.execute("SELECT envelope_cache_clear()")
        encrypt(session, values)
        used = -(-values // uses)
        made_now, unused_now = kms.count("GenerateDataKey"), unused(session)
        assert made_now - made_before == used + unused_now - unused_before
        assert unused_now - unused_before < used
        made_before, unused_before = made_now, unused_now


def test_statements_of_one_value_fetch_nothing_ahead(session, kms):
    for _ in range(5):
        encrypt(session, 1)
    assert kms.counts == {"GenerateDataKey": 5} and unused(session) == 0


def test_what_is_left_goes_with_the_statement_and_with_the_transaction(session, kms):
    with session.transaction():
        encrypt(session, 9)  # 1, 1, 2, 4, 8
        encrypt(session, 1)
        assert unused(session) == 7, "the next statement wiped them"
        encrypt(session, 6)  # 1, 1, 2, 4
        assert kms.count("GenerateDataKey") == 16 + 1 + 8
    assert unused(session) == 9
    with session.transaction(force_rollback=True):
        encrypt(session, 9)
    assert unused(session) == 16


def test_values_that_share_many_a_key_make_none_ahead(session, kms):
    session.execute("SET vod_tender_crypto.dek_max_uses = 500")
    encrypt(session, 2500)
    assert kms.counts == {"GenerateDataKey": 5} and unused(session) == 0


@pytest.mark.parametrize("fault, state", [(faults.throttle(), THROTTLED), (faults.server_error(), UNREACHABLE)])
def test_a_service_that_fails_ends_the_statement_and_not_the_session(session, kms, fault, state):
    session.execute("SET vod_tender_crypto.kms_max_attempts = 1")
    kms.inject(fault)
    with fails(state):
        encrypt(session, 100)
    assert kms.count("GenerateDataKey") == 1
    kms.clear_faults()
    encrypt(session, 10)


def test_one_failure_in_a_group_fails_nothing(session, kms):
    """A service that refuses now and then: what came is used, and the next group is small again."""
    session.execute("SET vod_tender_crypto.kms_max_attempts = 1; SET vod_tender_crypto.kms_concurrency = 32")
    # Each takes its time, so that a group is under way when the fault begins, and one of it is hit.
    kms.inject(faults.delay(0.1))
    thread, ended = in_background(lambda: encrypt(session, 60))
    kms.wait_for("GenerateDataKey", 17)
    kms.clear_faults()
    kms.inject(faults.delay(0.1), times=3)
    kms.inject(faults.throttle(), times=1)
    thread.join(30)
    assert ended[0][0] is None
    outcomes = stats(session)["calls"]["aws-kms"]["GenerateDataKey"]
    assert outcomes["throttled"]["calls"] == 1
    assert stats(session)["values_encrypted"] == 60


def test_a_cancel_loses_nothing_and_the_session_works_on(database, session, kms):
    kms.inject(faults.delay(0.2))
    with database.connect() as watcher:
        thread, ended = in_background(lambda: encrypt(session, 1000))
        kms.wait_for("GenerateDataKey", 26)  # the group of 16 is complete, and the one of 32 under way
        began = time.monotonic()
        one(watcher, "SELECT pg_cancel_backend(%s)", session.info.backend_pid)
        thread.join(10)
        (error, at), = ended
        assert error.sqlstate == CANCELED and at - began <= SLACK, at - began
    kms.clear_faults()
    now = stats(session)
    assert now["deks_unused"] == now["deks_made"] - now["values_encrypted"], "the transaction is over"
    encrypt(session, 50)


# -- jobs -------------------------------------------------------------------------------------------


ROWS = 60


@pytest.fixture
def table(session, kms):
    """A table of values, each under a data key of its own, that the session has forgotten."""
    session.execute(f"""CREATE TABLE t (n int PRIMARY KEY, v text);
                        INSERT INTO t SELECT n, envelope_encrypt('value ' || n) FROM generate_series(1, {ROWS}) n""")
    session.execute("SELECT vod_tender_crypto.add_key('next', %s)", [kms.kek_uri(kms.create_key())])
    session.execute("SELECT envelope_cache_clear()")
    kms.reset_record()
    kms.inject(faults.delay(0.02))
    return session


def together(kms) -> bool:
    """Whether many calls were under way at a time, and no more than the setting says; none for one wrapped key twice."""
    return 2 <= kms.peak_in_flight <= 8 and not kms.doubled


def damage(connection, n: int) -> None:
    """Puts the header of another value before a payload, which that data key does not open."""
    connection.execute("""UPDATE t SET v = 'kms:v2:' || split_part(o.v, ':', 3) || ':' || split_part(t.v, ':', 4)
                          FROM t o WHERE t.n = %s AND o.n = %s + 1""", [n, n])


def test_a_job_moves_data_keys_together(table, kms):
    job = call(table, "rewrap_table", "t", columns=["v"], key="next")
    assert (job.state, job.rows_done) == ("done", ROWS)
    assert kms.counts == {"ReEncrypt": ROWS, "Decrypt": ROWS} and together(kms)
    assert one(table, "SELECT count(*) FROM t WHERE envelope_decrypt(v) = 'value ' || n") == ROWS


def test_a_job_goes_back_with_data_keys_fetched_together(table, kms):
    job = call(table, "downgrade", "t", columns=["v"])
    assert (job.state, job.rows_done) == ("done", ROWS)
    assert kms.counts == {"Decrypt": ROWS} and together(kms)
    assert one(table, "SELECT count(*) FROM t WHERE envelope_decrypt(v, version => 1) = 'value ' || n") == ROWS


def test_verify_fetches_data_keys_together(table, kms):
    table.execute("INSERT INTO t SELECT n + 1000, v FROM t")
    damage(table, 7)
    found = table.execute("SELECT row_key, sqlstate FROM vod_tender_crypto.verify('t', '{v}')").fetchall()
    assert found == [({"n": 7}, "39000")]
    assert kms.counts == {"Decrypt": ROWS} and together(kms)


def test_verify_with_more_data_keys_than_the_session_keeps(table, kms):
    table.execute("SET vod_tender_crypto.dek_cache_entries = 10")
    assert table.execute("SELECT * FROM vod_tender_crypto.verify('t', '{v}')").fetchall() == []
    assert ROWS <= kms.count("Decrypt") <= 2 * ROWS


def test_one_that_cannot_be_moved_fails_alone(table, kms):
    other = kms.create_key()
    table.execute("SELECT vod_tender_crypto.add_key('other', %s)", [kms.kek_uri(other)])
    # A data key that claims to be under another key of the service.
    table.execute("""UPDATE t SET v = 'kms:v2:' || encode(overlay(decode(split_part(v, ':', 3), 'base64') PLACING %s
                         FROM position(%s in decode(split_part(v, ':', 3), 'base64'))), 'base64') || ':' || split_part(v, ':', 4)
                     WHERE n = 7""", [other.encode(), kms.arn.encode()])
    table.execute("UPDATE t SET v = replace(v, E'\\n', '')")
    job = call(table, "rewrap_table", "t", columns=["v"], key="next")
    assert (job.state, job.rows_done, job.rows_failed) == ("done", ROWS - 1, 1)
    assert job_errors(table, job.job) == [({"n": 7}, "v", "39000")]
    assert together(kms)


@pytest.mark.parametrize("operation", ["rewrap_table", "downgrade"])
def test_a_job_takes_very_long_headers_one_by_one(table, kms, operation):
    """So that a batch of them does not fill the memory."""
    table.execute("CREATE TABLE b (n int PRIMARY KEY, v bytea)")
    for n, value in table.execute("SELECT n, v FROM t").fetchall():
        value = binary(value)
        header = one(table, "SELECT vod_tender_crypto.stored_head(%s::bytea)", value)
        longer = lengthened(header) if n % 10 == 0 else header
        table.execute("INSERT INTO b VALUES (%s, %s)", [n, longer + value[len(header):]])
    table.execute("SELECT envelope_cache_clear()")
    kms.reset_record()
    job = call(table, operation, "b", columns=["v"], **({"key": "next"} if operation == "rewrap_table" else {}))
    assert (job.state, job.rows_done, job.rows_failed) == ("done", ROWS, 0)
    asked = {"ReEncrypt": ROWS, "Decrypt": ROWS} if operation == "rewrap_table" else {"Decrypt": ROWS}
    assert kms.counts == asked and not kms.doubled
    assert one(table, "SELECT count(*) FROM b WHERE convert_from(envelope_decrypt(v), 'UTF8') = 'value ' || n") == ROWS


def test_a_job_gets_past_a_wrap_of_its_own_that_is_broken(table, kms):
    """A second wrap serves, in the preparation and in the writing."""
    value = binary(one(table, "SELECT v FROM t WHERE n = 1"))
    header = one(table, "SELECT vod_tender_crypto.stored_head(%s::bytea)", value)
    at = 6 + 2 + int.from_bytes(header[6:8], "big")
    wrap = header[at + 1:-32]
    own = bytes([4]) + b"next" + wrap[1 + 4:]
    both = header[:at] + bytes([2]) + own + wrap + header[-32:] + value[len(header):]
    table.execute("CREATE TABLE b AS SELECT 1 AS n, %s::bytea AS v", [both])
    job = call(table, "rewrap_table", "b", columns=["v"], key="next")
    assert (job.state, job.rows_done, job.rows_failed) == ("done", 1, 0)
    assert one(table, "SELECT convert_from(envelope_decrypt(v), 'UTF8') FROM b") == "value 1"


def test_what_verify_is_refused_is_recorded_under_its_key(table, kms):
    table.execute("SET vod_tender_crypto.audit = 'table'")
    table.execute("SELECT vod_tender_crypto.add_key('last', %s)", [kms.kek_uri(kms.create_key())])
    for n in (ROWS - 1, ROWS):
        table.execute("UPDATE t SET v = rewrap(v, 'last') WHERE n = %s", [n])
    other = kms.create_key()
    for n in (7, 8):
        value = binary(one(table, "SELECT v FROM t WHERE n = %s", n)).replace(kms.arn.encode(), other.encode())
        header = one(table, "SELECT vod_tender_crypto.stored_head(%s::bytea)", value)
        armored = f"kms:v2:{base64.b64encode(header).decode()}:{base64.b64encode(value[len(header):]).decode()}"
        table.execute("UPDATE t SET v = %s WHERE n = %s", [armored, n])
    table.execute("SELECT envelope_cache_clear()")
    assert len(table.execute("SELECT * FROM vod_tender_crypto.verify('t', '{v}')").fetchall()) == 2
    one(table, "SELECT vod_tender_crypto.flush_audit()")
    failed = table.execute("""SELECT key, sqlstate, sum(value_count) FROM vod_tender_crypto.audit
                              WHERE function = 'verify' AND outcome = 'failed' GROUP BY 1, 2""").fetchall()
    assert failed == [("main", "39000", 2)]


def test_an_alias_is_asked_once_in_a_job(table, kms):
    alias = "alias/rotating"
    kms.create_key(alias)
    table.execute("SELECT vod_tender_crypto.add_key('alias', %s)", [kms.kek_uri(alias)])
    table.execute("UPDATE t SET v = envelope_encrypt('value ' || n, key => 'alias')")
    table.execute("SELECT envelope_cache_clear()")
    kms.reset_record()
    call(table, "rewrap_table", "t", columns=["v"], key="alias")
    assert kms.counts == {"GenerateDataKey": kms.count("GenerateDataKey")}, "all of it is up to date"
    assert 1 <= kms.count("GenerateDataKey") <= 2, "when it is created and when it is run"
    kms.point_alias(alias, kms.create_key())
    kms.reset_record()
    call(table, "rewrap_table", "t", columns=["v"], key="alias")
    assert kms.count("ReEncrypt") == ROWS and together(kms)


def test_what_a_job_makes_ahead_survives_its_commits(table, kms):
    table.execute("UPDATE t SET v = 'value ' || n")
    kms.reset_record()
    before = unused(table)
    job = call(table, "migrate", "t", columns=["v"], version="0", batch_size=5)
    assert (job.state, job.rows_done) == ("done", ROWS)
    assert kms.counts == {"GenerateDataKey": ROWS, "Decrypt": ROWS} and together(kms)
    assert unused(table) == before


# -- time -------------------------------------------------------------------------------------------


def test_calls_that_go_together_save_the_time(extension):
    """The benchmark's three ratios (its target is 30), with room for a machine that does other things as well."""
    found = bench.measure(rows=1000)
    for part, each in found["parts"].items():
        assert bench.ratio(each) >= 15, (part, each)
        assert each["peak"] <= bench.CONCURRENCY
