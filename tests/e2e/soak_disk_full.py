"""The audit's queue on a file system that is too small. It takes the right to mount one, so that scripts/soak runs it and
scripts/test does not.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess

import psycopg

from helpers import one
from skips import cannot_run
from test_audit import make_database, records
from test_audit_reviewed import CONTEXTS


def test_a_disk_that_is_full_loses_and_garbles_nothing(make_cluster, extension):
    """The queue on a file system of its own, which is too small."""
    if not can_mount():
        cannot_run("mounting a file system takes root")
    server = make_cluster({"vod_tender_crypto.audit": "table", "vod_tender_crypto.audit_required": "on"})
    with make_database(server) as session:
        records(session)
        directory = server.data / "vod_tender_crypto"
        with small_file_system(server, directory):
            refused = used = 0
            for number in range(60):
                try:
                    with session.transaction():
                        session.execute(CONTEXTS.format(length=2000, count=60).replace("|| g", f"|| g || 'r{number}'"))
                    used += 60
                except psycopg.errors.ObjectNotInPrerequisiteState:
                    refused += 1
            assert used and refused, "it must have been too small, and not always"
            one(session, "SELECT vod_tender_crypto.flush_audit()")
            found = records(session, "operation = 'encrypt'")
            assert {r["outcome"] for r in found} == {"ok"}
            in_log = server.log_text().count('vod_tender_crypto audit: {')
            assert sum(r["value_count"] for r in found) + in_log >= used
            assert session.execute("SELECT * FROM vod_tender_crypto.verify_audit()").fetchall() == []


def can_mount() -> bool:
    return os.geteuid() == 0 and shutil.which("mount") is not None


@contextlib.contextmanager
def small_file_system(server, directory):
    """A file system of 400 kB at a directory of the server's."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k,mode=0777", "none", str(directory)], capture_output=True)
    if mounted.returncode:
        cannot_run("this machine lets nobody mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)
