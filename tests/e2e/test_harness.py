"""Tests of the harness itself: the cluster, the memory search, the dead ends, the emulators."""

from __future__ import annotations

import base64
import os
import socket
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psycopg
import pytest

import cluster as cluster_module
import procmem
from cluster import Cluster, process_lives
from skips import cannot_run
from strict_kms import SECRET_KEY


def postmaster_environment(cluster: Cluster) -> "dict[str, str]":
    with open(f"/proc/{cluster.postmaster_pid()}/environ", "rb") as environ:
        pairs = environ.read().decode().rstrip("\0").split("\0")
    return dict(pair.split("=", 1) for pair in pairs)


# -- the cluster -----------------------------------------------------------------------------------


def test_cluster_listens_on_its_own_socket_only(shared_cluster):
    assert shared_cluster.psql("SHOW listen_addresses") == ""
    assert shared_cluster.psql("SHOW unix_socket_directories") == str(shared_cluster.root)
    assert shared_cluster.psql("SELECT datcollate, pg_encoding_to_char(encoding) FROM pg_database "
                               "WHERE datname = 'postgres'") == "C.UTF-8|UTF8"


def test_cluster_does_not_inherit_keys_or_credentials(monkeypatch, make_cluster):
    for name in ("AWS_PROFILE", "KMS_KEY_ID", "ENCRYPTION_KEY", "RUST_BACKTRACE", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "inherited")
    environment = postmaster_environment(make_cluster(environment={"ENCRYPTION_KEY": "given"}))
    assert environment["ENCRYPTION_KEY"] == "given"
    assert "inherited" not in environment.values()
    assert environment["AWS_EC2_METADATA_DISABLED"] == "true"


def test_cluster_takes_settings_and_a_changed_environment_at_restart(make_cluster):
    own = make_cluster({"work_mem": "7MB"}, {"AWS_EC2_METADATA_DISABLED": None, "RUST_BACKTRACE": "1"})
    assert own.psql("SHOW work_mem") == "7MB"
    assert "AWS_EC2_METADATA_DISABLED" not in postmaster_environment(own)
    own.settings.update(log_statement="all", jit=False)
    own.environment["RUST_BACKTRACE"] = None
    own.restart()
    assert own.psql("SHOW log_statement; SHOW jit") == "all\noff"
    assert "RUST_BACKTRACE" not in postmaster_environment(own)


def test_cluster_survives_kill9(make_cluster):
    own = make_cluster({"synchronous_commit": "on"})
    own.psql("CREATE TABLE t AS SELECT 42 AS n")
    with own.connect() as held:
        pid = held.info.backend_pid
        own.kill9()
        assert not own.running()
        assert not process_lives(pid)
        with pytest.raises(psycopg.OperationalError):
            held.execute("SELECT 1")
    own.start()
    assert own.psql("SELECT n FROM t") == "42"
    assert "not properly shut down" in own.log_text()


def test_cluster_removes_itself_after_an_error():
    with pytest.raises(ZeroDivisionError):
        with Cluster() as own:
            root, pid = own.root, own.postmaster_pid()
            raise ZeroDivisionError
    assert not root.exists()
    assert not process_lives(pid)


def test_cluster_that_cannot_start_says_why_and_removes_itself():
    own = Cluster({"shared_preload_libraries": "no_such_library"})
    with pytest.raises(RuntimeError, match="no_such_library"):
        with own:
            pytest.fail("started")
    assert not own.root.exists()


def test_server_file_belongs_to_the_server(bare_database):
    path = bare_database.server_file("kek.b64", "secret", 0o640)
    found = os.stat(path)
    assert stat.S_IMODE(found.st_mode) == 0o640
    assert found.st_uid == bare_database.cluster.owner.pw_uid
    assert bare_database.psql(f"SELECT pg_read_file('{path}')") == "secret"


def test_database_is_fresh_and_dumps(bare_database):
    bare_database.psql("CREATE TABLE t (a text); INSERT INTO t VALUES ('x')")
    dump = bare_database.pg_dump("--inserts")
    assert "INSERT INTO public.t VALUES ('x')" in dump
    bare_database.cluster.createdb(f"{bare_database.name}_copy")
    bare_database.cluster.psql(dump, f"{bare_database.name}_copy")
    assert bare_database.cluster.psql("SELECT a FROM t", f"{bare_database.name}_copy") == "x"
    bare_database.cluster.dropdb(f"{bare_database.name}_copy")


def test_log_is_of_this_database_alone(bare_database):
    with bare_database.connect() as session, pytest.raises(psycopg.Error):
        session.execute("SELECT no_such_column_a")
    assert "no_such_column_a" in bare_database.log_text()
    marker = bare_database.cluster.log_size()
    assert bare_database.cluster.log_text(marker) == ""


def test_psql_errors_raise(bare_database):
    with pytest.raises(RuntimeError, match="division by zero"):
        bare_database.psql("SELECT 1/0")


def test_extension_lookup():
    assert cluster_module.extension_available("plpgsql")
    assert not cluster_module.extension_available("no_such_extension")


# -- memory ----------------------------------------------------------------------------------------


def test_memory_search_finds_what_a_backend_holds(bare_database):
    secret = os.urandom(32)
    with bare_database.connect() as session:
        pid = session.info.backend_pid
        if not procmem.can_read(pid):
            cannot_run("this user may not read the memory of server processes (ptrace restrictions)")
        assert procmem.find_any(pid, [secret]) == []
        session.execute("SELECT set_config('e2e.raw', %s, false)", [secret.hex()])
        found = procmem.find_any(pid, {"dek": secret})
        assert {hit.form for hit in found} >= {"hex"}
        assert all(hit.needle == "dek" and hit.mapping for hit in found)
        session.execute("SELECT set_config('e2e.raw', %s, false)",
                        [base64.b64encode(b"xy" + secret).decode()])
        assert "base64+2" in {hit.form for hit in procmem.find_any(pid, [secret])}


def test_memory_search_tells_wholes_from_halves():
    program = ("import sys, ctypes\n"
               "s = bytes.fromhex(sys.stdin.readline())\n"
               "held = {}\n"
               "sys.stdin = None\n"
               "{hold}\n"
               "s = None\n"
               "print('ready', flush=True)\n"
               "import signal; signal.pause()\n")
    secret = os.urandom(32)
    for hold, expected in (("held = ctypes.create_string_buffer(s)", "raw"),
                           ("held = ctypes.create_string_buffer(s[16:])", "second half")):
        child = subprocess.Popen([sys.executable, "-c", program.replace("{hold}", hold)], text=True,
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with child:
            try:
                print(secret.hex(), file=child.stdin, flush=True)
                assert child.stdout.readline() == "ready\n"
                assert expected in {hit.form for hit in procmem.find_any(child.pid, [secret])}
            finally:
                child.kill()


def test_memory_search_refuses_needles_found_by_chance():
    with pytest.raises(ValueError):
        procmem.forms(b"short")


@pytest.mark.parametrize("shift", range(6))
def test_base64_is_found_at_every_alignment(shift):
    secret = os.urandom(32)
    text = base64.b64encode(os.urandom(shift) + secret + os.urandom(7))
    assert any(form.startswith("base64") and core in text for form, core in procmem.forms(secret))


# -- dead ends -------------------------------------------------------------------------------------


def test_black_hole_accepts_and_is_silent(black_hole):
    with socket.create_connection(("127.0.0.1", black_hole.port)) as client:
        black_hole.wait_for_connection()
        client.sendall(b"POST / HTTP/1.1\r\n\r\n")
        client.settimeout(0.1)
        with pytest.raises(socket.timeout):
            client.recv(1)


def test_closed_port_refuses(refused_port):
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", refused_port))


# -- skipping --------------------------------------------------------------------------------------


def test_cannot_run_skips_at_home_and_fails_in_ci(monkeypatch):
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no such device"):
        cannot_run("no such device")
    monkeypatch.setenv("CI", "false")
    with pytest.raises(pytest.skip.Exception, match="no such device"):
        cannot_run("no such device")


# -- emulators -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["moto", "ministack"])
def test_emulator_serves_keys_and_aliases(name, request):
    emulator = request.getfixturevalue(name)
    first = emulator.create_key(f"alias/harness-{name}")
    second = emulator.create_key()
    client = emulator.client()
    context = {"Application": "harness"}
    made = client.generate_data_key(KeyId=first, KeySpec="AES_256", EncryptionContext=context)
    opened = client.decrypt(CiphertextBlob=made["CiphertextBlob"], EncryptionContext=context)
    assert opened["Plaintext"] == made["Plaintext"]
    emulator.point_alias(f"alias/harness-{name}", second)
    described = client.describe_key(KeyId=f"alias/harness-{name}")
    assert described["KeyMetadata"]["Arn"] == second
    assert emulator.environment(first)["KMS_KEY_ID"] == first


def test_emulators_listen_on_loopback_only(moto, ministack):
    table = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    local = [line.split()[1] for line in table.splitlines() if ":" in line.split()[1]]
    for emulator in (moto, ministack):
        port = f":{emulator.port:04X}"
        assert {address for address in local if address.endswith(port)} == {"0100007F" + port}


# -- the strict KMS's manners ----------------------------------------------------------------------


def test_strict_kms_does_not_show_its_secrets(kms):
    assert SECRET_KEY not in repr(kms.server.credentials)
    assert "material" not in repr(kms.keyring.key(kms.arn))


def test_strict_kms_serves_nothing_but_post(kms):
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(kms.server.endpoint)
