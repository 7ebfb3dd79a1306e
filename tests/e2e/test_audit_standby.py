"""The audit on a standby, whose tables cannot be written, and after it was promoted."""

from __future__ import annotations

import shutil

import pytest

from cluster import Cluster
from helpers import one
from test_audit import logged, make_database, records


@pytest.fixture
def primary(make_cluster, extension):
    """An audited cluster that others can follow."""
    return make_cluster({"vod_tender_crypto.audit": "table", "vod_tender_crypto.audit_required": "on"})


@pytest.fixture
def standby(primary):
    """A standby of `primary` that has a value's row; gives the standby and the value."""
    with make_database(primary) as session:
        session.execute("CREATE TABLE t AS SELECT envelope_encrypt('token') AS v")
        one(session, "SELECT vod_tender_crypto.flush_audit()")
        copy = Cluster(primary.settings)
        try:
            shutil.rmtree(copy.data)
            copy._as_server("pg_basebackup", "-D", str(copy.data), "-R", "-h", str(primary.root), "-p", str(primary.port),
                            "-U", "postgres", "--checkpoint=fast")
            yield copy.start()
        finally:
            copy.close()


def test_a_standby_reads_and_its_log_has_the_record(standby):
    since = standby.log_size()
    with standby.connect("audited") as session:
        assert one(session, "SELECT pg_is_in_recovery()")
        assert one(session, "SELECT envelope_decrypt(v) FROM t") == "token"
        assert one(session, "SELECT vod_tender_crypto.flush_audit()") is False, "there is no worker"
    assert [(r["operation"], r["outcome"], r["value_count"]) for r in logged(standby, since)] == [("decrypt", "ok", 1)]
    assert "vod_tender_crypto audit begins: " in standby.log_text(since), "where it is required, it is announced"


def test_a_promoted_standby_goes_on_with_the_chain(standby):
    standby.psql("SELECT pg_promote()")
    with standby.connect("audited") as session:
        assert not one(session, "SELECT pg_is_in_recovery()")
        assert one(session, "SELECT envelope_decrypt(v) FROM t") == "token"
        found = records(session)
        assert [r["operation"] for r in found] == ["encrypt", "decrypt"], "what the copy's queue held is not stored twice"
        assert session.execute("SELECT * FROM vod_tender_crypto.verify_audit()").fetchall() == []
