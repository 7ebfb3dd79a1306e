"""Parallel queries: the functions stay in the leader, and keep every promise where an administrator lets them into workers."""

from __future__ import annotations

import psycopg
import pytest

from helpers import one

ROWS, DEKS = 20_000, 5

# Workers for every scan, however small.
PARALLEL = (
    "SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0; SET min_parallel_table_scan_size = 0;"
    "SET max_parallel_workers_per_gather = 2; SET parallel_leader_participation = on"
)
SAFE = "ALTER FUNCTION envelope_decrypt(bytea, text, jsonb, integer) PARALLEL {}"
QUERY = "SELECT count(*), sum(length(envelope_decrypt(v))) FROM parallel_values"
# With every argument type: one of two functions of the same name may be safe.
SAFE_FUNCTIONS = """
SELECT p.oid::regprocedure::text
FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid JOIN pg_proc p ON p.oid = d.objid
WHERE e.extname = 'vod_tender_crypto' AND d.refclassid = 'pg_extension'::regclass AND d.classid = 'pg_proc'::regclass
  AND d.deptype = 'e' AND p.proparallel = 's'
"""


@pytest.fixture
def server(make_cluster, extension, kms):
    """A database of a cluster with room for workers, a KEK in the KMS, and a table of values under five data keys."""
    cluster = make_cluster({"vod_tender_crypto.audit": "table", "max_worker_processes": 12}, kms.environment())
    cluster.createdb("parallel")
    cluster.psql("CREATE EXTENSION vod_tender_crypto", "parallel")
    with cluster.connect("parallel") as session:
        session.execute(f"SET vod_tender_crypto.dek_max_uses = {ROWS // DEKS}")
        session.execute("CREATE TABLE parallel_values AS SELECT envelope_encrypt(convert_to(md5(n::text), 'UTF8')) AS v "
                        f"FROM generate_series(1, {ROWS}) n; ANALYZE parallel_values")
        session.execute("SELECT vod_tender_crypto.flush_audit()")
    return cluster


def nodes(session, query: str) -> "list[str]":
    """The plan, a line for each node."""
    return [line for (line,) in session.execute(f"EXPLAIN (VERBOSE, COSTS off) {query}").fetchall()]


def audited(session) -> "list[tuple]":
    session.execute("SELECT vod_tender_crypto.flush_audit()")
    return session.execute("SELECT value_count, outer_user_name, outcome, sqlstate FROM vod_tender_crypto.audit "
                           "WHERE operation = 'decrypt' ORDER BY seq").fetchall()


def test_only_what_uses_no_key_and_no_session_is_parallel_safe(connection):
    # Each looks at its arguments and at nothing else. Whoever adds one has to make sure of that.
    assert {name for (name,) in connection.execute(SAFE_FUNCTIONS).fetchall()} == {
        "is_envelope(text)",
        "is_envelope(bytea)",
        "vod_tender_crypto.check_key(text,text,jsonb)",
        "vod_tender_crypto.honey_mark(text)",
        "vod_tender_crypto.honey_mark(bytea)",
        "vod_tender_crypto.job_lock_class()",
    }


def test_a_parallel_scan_is_decrypted_by_the_leader_which_makes_one_record(server, kms):
    with server.connect("parallel") as session:
        session.execute(PARALLEL)
        plan = nodes(session, QUERY)
        scan = next(at for at, line in enumerate(plan) if "Parallel Seq Scan" in line)
        assert any("envelope_decrypt" in line for line in plan[:scan]), plan
        assert not any("envelope_decrypt" in line for line in plan[scan:]), plan
        before = len(kms.requests)
        assert session.execute(QUERY).fetchone() == (ROWS, 32 * ROWS)
        assert len(kms.requests) - before == DEKS
        assert audited(session) == [(ROWS, "postgres", "ok", None)]


def test_where_it_is_declared_safe_workers_give_the_same_and_every_value_is_recorded(server, kms):
    with server.connect("parallel") as session:
        session.execute(SAFE.format("SAFE"))
        session.execute(PARALLEL)
        plan = nodes(session, QUERY)
        scan = next(at for at, line in enumerate(plan) if "Parallel Seq Scan" in line)
        gather = next(at for at, line in enumerate(plan) if "Gather" in line)
        assert gather < scan and any("envelope_decrypt" in line for line in plan[gather:]), plan
        before = len(kms.requests)
        assert session.execute(QUERY).fetchone() == (ROWS, 32 * ROWS)
        # The leader and each of two workers ask for a data key once at most.
        assert DEKS <= len(kms.requests) - before <= 3 * DEKS
        records = audited(session)
        assert sum(record[0] for record in records) == ROWS and len(records) <= 3
        assert {record[1:] for record in records} == {("postgres", "ok", None)}


def test_a_worker_refuses_who_has_no_right_and_asks_nobody(server, kms):
    with server.connect("parallel") as session:
        session.execute(SAFE.format("SAFE"))
        session.execute("CREATE ROLE parallel_mallory; GRANT SELECT ON parallel_values TO parallel_mallory;"
                        "CREATE ROLE parallel_reader; GRANT SELECT ON parallel_values TO parallel_reader;"
                        "SELECT vod_tender_crypto.grant_key('default', 'parallel_reader', '{decrypt}')")
        # So that it is the extension that refuses, and not PostgreSQL.
        session.execute("GRANT EXECUTE ON FUNCTION envelope_decrypt(bytea, text, jsonb, integer) TO parallel_mallory")
        session.execute(PARALLEL + "; SET parallel_leader_participation = off")
        before = len(kms.requests)
        session.execute("SET ROLE parallel_mallory")
        with pytest.raises(psycopg.errors.InsufficientPrivilege) as refused:
            session.execute(QUERY)
        assert refused.value.sqlstate == "42501"
        assert len(kms.requests) == before
        session.execute("SET ROLE parallel_reader")
        assert session.execute(QUERY).fetchone() == (ROWS, 32 * ROWS)
        session.execute("RESET ROLE")
        records = audited(session)
        read = [record for record in records if record[1] == "parallel_reader"]
        assert sum(record[0] for record in read) == ROWS and all(record[2] == "ok" for record in read)
        refusals = [record for record in records if record[1] == "parallel_mallory"]
        assert refusals and {record[3] for record in refusals} == {"42501"}


def test_where_the_audit_is_required_workers_announce_first(server):
    with server.connect("parallel") as session:
        session.execute(SAFE.format("SAFE"))
        session.execute(PARALLEL + "; SET parallel_leader_participation = off; SET vod_tender_crypto.audit_required = on")
        assert session.execute(QUERY).fetchone() == (ROWS, 32 * ROWS)
        records = audited(session)
        assert sum(record[0] for record in records) == ROWS
        assert one(session, "SELECT count(*) FROM vod_tender_crypto.audit WHERE value_count IS NULL") == 0
