"""A throw-away PostgreSQL cluster: made, started, stopped, killed and removed by one object."""

from __future__ import annotations

import atexit
import os
import pwd
import re
import select
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Mapping, Optional

import psycopg

SUPERUSER = "postgres"
SOCKET_SUFFIX = 5432  # without TCP only the name of the socket file, in a directory of the cluster's own
START_SECONDS = 60

# Settings of every cluster; a test's own settings come after these and win.
BASE_SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "max_connections": "60",
    "log_line_prefix": "%m [%p] %q%u@%d ",
    "timezone": "UTC",
}


def bin_dir() -> Path:
    """The directory of the PostgreSQL programs that `PG_CONFIG` (or pg_config on the PATH) names."""
    pg_config = os.environ.get("PG_CONFIG", "pg_config")
    return Path(subprocess.check_output([pg_config, "--bindir"], text=True).strip())


def extension_available(name: str) -> bool:
    """Whether the extension's control file is installed where the server looks for it."""
    pg_config = os.environ.get("PG_CONFIG", "pg_config")
    share = subprocess.check_output([pg_config, "--sharedir"], text=True).strip()
    return (Path(share) / "extension" / f"{name}.control").exists()


class Cluster:
    """A cluster in a temporary directory; use it as a context manager, or call start() and close().

    `settings` go to postgresql.conf. `environment` is what the postmaster gets beyond a minimal clean
    environment; a value of None removes a variable (for example AWS_EC2_METADATA_DISABLED). Both are
    plain dicts on the object: change them and restart().
    """

    def __init__(
        self,
        settings: Optional[Mapping[str, object]] = None,
        environment: Optional[Mapping[str, Optional[str]]] = None,
    ):
        self.settings = dict(settings or {})
        self.environment = dict(environment or {})
        self.bin = bin_dir()
        self.owner = _server_account()
        # A short path: a socket's whole name must stay under 108 bytes.
        self.root = Path(tempfile.mkdtemp(prefix="pg-e2e-", dir="/tmp"))
        self.data = self.root / "data"
        self.log_path = self.root / "server.log"
        self._closed = False
        atexit.register(self.close)
        try:
            self._initialise()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Cluster":
        try:
            self.start()
        except BaseException:
            # __exit__ is not called when __enter__ raises.
            self.close()
            raise
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    @property
    def port(self) -> int:
        """The port; clusters listen on TCP only where their settings say so."""
        return int(self.settings.get("port", SOCKET_SUFFIX))

    # -- life cycle ---------------------------------------------------------------------------------

    def start(self) -> "Cluster":
        """Start with the present settings and environment; returns when connections are accepted."""
        self._write_settings()
        self._pg_ctl("start", "-l", str(self.log_path), "-t", str(START_SECONDS))
        return self

    def stop(self, mode: str = "fast") -> None:
        """Stop in mode smart, fast or immediate; returns when the server is gone."""
        self._pg_ctl("stop", "-m", mode)

    def restart(self, mode: str = "fast") -> None:
        """Stop and start, so that changed settings and a changed environment take effect."""
        self.stop(mode)
        self.start()

    def reload(self) -> None:
        """Write the present settings and have the server read them. Sessions see them a moment later."""
        self._write_settings()
        self._pg_ctl("reload")

    def kill9(self) -> None:
        """SIGKILL to the postmaster and every child, as a power cut; returns when all are gone."""
        postmaster = self.postmaster_pid()
        if postmaster is None:
            raise RuntimeError("the cluster is not running")
        # The postmaster first and stopped, so that it starts no child while they are being listed.
        os.kill(postmaster, signal.SIGSTOP)
        pids = [postmaster, *_children(postmaster)]
        watched = [fd for fd in map(_pidfd, pids) if fd is not None]
        for pid in pids:
            _kill(pid)
        _wait_gone(watched)
        # Where process 1 is slow to reap, the dead postmaster's number still answers kill(pid, 0), and
        # a server started now would take the lock files for a live one's. We know that it is dead.
        (self.data / "postmaster.pid").unlink()
        (self.root / f".s.PGSQL.{self.port}.lock").unlink(missing_ok=True)

    def close(self) -> None:
        """Stop the server, by force if need be, and remove the directory. May be called twice."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        try:
            if self.running():
                self._stop_hard()
        finally:
            shutil.rmtree(self.root, ignore_errors=True)

    def postmaster_pid(self) -> Optional[int]:
        """The postmaster's process id, or None when no server runs."""
        try:
            pid = int((self.data / "postmaster.pid").read_text().split("\n", 1)[0])
        except (OSError, ValueError):
            return None
        return pid if process_lives(pid) else None

    def running(self) -> bool:
        """Whether the postmaster lives."""
        return self.postmaster_pid() is not None

    # -- the server's log and files -----------------------------------------------------------------

    def log_size(self) -> int:
        """The log's present length in bytes: a mark for log_text(since)."""
        return self.log_path.stat().st_size if self.log_path.exists() else 0

    def log_text(self, since: int = 0) -> str:
        """The server log, from the byte `since` on."""
        if not self.log_path.exists():
            return ""
        return self.log_path.read_bytes()[since:].decode("utf-8", "replace")

    def server_file(self, name: str, content: "str | bytes", mode: int = 0o600) -> str:
        """Write a file owned by the server's user into the cluster's directory; returns its path."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        path.chmod(mode)
        self._give(path)
        self._give(path.parent)
        return str(path)

    # -- clients ------------------------------------------------------------------------------------

    def connect(
        self, dbname: str = "postgres", user: str = SUPERUSER, autocommit: bool = True, **kw
    ) -> psycopg.Connection:
        """A psycopg connection over the cluster's socket."""
        return psycopg.connect(
            host=str(self.root), port=self.port, dbname=dbname, user=user, autocommit=autocommit, **kw
        )

    def run(self, tool: str, *args: str, input: Optional[str] = None, check: bool = True):
        """Run a PostgreSQL client program against the cluster; returns the CompletedProcess (text)."""
        done = subprocess.run(
            [str(self.bin / tool), *args], input=input, env=self._client_environment(),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/",
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{tool} failed with {done.returncode}: {done.stderr or done.stdout}")
        return done

    def psql(self, sql: str, dbname: str = "postgres", user: str = SUPERUSER) -> str:
        """What psql prints for the SQL, unaligned and without headers; an error raises."""
        args = ("-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", dbname, "-U", user, "-f", "-")
        return self.run("psql", *args, input=sql).stdout.rstrip("\n")

    def pg_dump(self, dbname: str, *args: str) -> str:
        """A plain-format dump as text."""
        return self.run("pg_dump", *args, "-U", SUPERUSER, "-d", dbname).stdout

    def createdb(self, dbname: str, *args: str) -> None:
        """Create a database."""
        self.run("createdb", *args, "-U", SUPERUSER, dbname)

    def dropdb(self, dbname: str) -> None:
        """Drop a database together with the sessions still in it."""
        self.run("dropdb", "--force", "--if-exists", "-U", SUPERUSER, dbname)

    # -- inside -------------------------------------------------------------------------------------

    def _initialise(self) -> None:
        self._give(self.root)
        # The log exists before the server so that its owner is right whoever starts pg_ctl.
        self.server_file("server.log", "")
        options = ("-D", str(self.data), "-U", SUPERUSER, "-A", "trust", "-E", "UTF8",
                   "--locale=C.UTF-8", "--no-sync", "--no-instructions")
        self._as_server("initdb", *options)
        with open(self.data / "postgresql.conf", "a", encoding="utf-8") as conf:
            conf.write("\ninclude '../test.conf'\n")

    def _write_settings(self) -> None:
        chosen = {**BASE_SETTINGS, "unix_socket_directories": str(self.root), "port": SOCKET_SUFFIX}
        chosen.update(self.settings)
        lines = (f"{name} = {_quoted(value)}\n" for name, value in chosen.items())
        self.server_file("test.conf", "".join(lines))

    def _server_environment(self) -> "dict[str, str]":
        # HOME is the cluster's own directory, so that nobody's ~/.aws is ever read.
        clean = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(self.root),
            "LC_ALL": "C.UTF-8",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        merged = {**clean, **self.environment}
        return {name: value for name, value in merged.items() if value is not None}

    def _client_environment(self) -> "dict[str, str]":
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        return {**clean, "PGHOST": str(self.root), "PGPORT": str(self.port), "LC_ALL": "C.UTF-8"}

    def _as_server(self, tool: str, *args: str) -> None:
        """Run a server program as the server's user; its output appears in the error, if any."""
        command = [*_drop_root(self.owner), str(self.bin / tool), *args]
        done = subprocess.run(
            command, env=self._server_environment(), cwd="/", text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{tool} {args[0]} failed: {done.stdout}\n{self.log_text()[-4000:]}")

    def _pg_ctl(self, action: str, *args: str) -> None:
        self._as_server("pg_ctl", action, "-D", str(self.data), "-w", *args)

    def _stop_hard(self) -> None:
        try:
            self._pg_ctl("stop", "-m", "immediate", "-t", "20")
        except RuntimeError:
            if self.running():
                self.kill9()

    def _give(self, path: Path) -> None:
        if os.geteuid() == 0:
            os.chown(path, self.owner.pw_uid, self.owner.pw_gid)


class Database:
    """One database of a cluster, with the cluster's methods that concern a database."""

    def __init__(self, cluster: Cluster, name: str):
        self.cluster = cluster
        self.name = name
        self._log_start = cluster.log_size()

    def connect(self, user: str = SUPERUSER, autocommit: bool = True, **kw) -> psycopg.Connection:
        """A psycopg connection to this database."""
        return self.cluster.connect(self.name, user, autocommit, **kw)

    def psql(self, sql: str, user: str = SUPERUSER) -> str:
        """What psql prints for the SQL in this database."""
        return self.cluster.psql(sql, self.name, user)

    def pg_dump(self, *args: str) -> str:
        """A plain-format dump of this database."""
        return self.cluster.pg_dump(self.name, *args)

    def server_file(self, name: str, content: "str | bytes", mode: int = 0o600) -> str:
        """A file of the server's user, in a directory named after the database."""
        return self.cluster.server_file(f"{self.name}/{name}", content, mode)

    def log_text(self) -> str:
        """What the server logged since this database was made."""
        return self.cluster.log_text(self._log_start)


def process_lives(pid: int) -> bool:
    """Whether the process exists and has not ended: one that only waits to be reaped has."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return re.search(r"^State:\t[ZX]", status, re.M) is None


def _server_account() -> pwd.struct_passwd:
    """Whom the server runs as: PostgreSQL refuses root, so root's clusters are postgres's."""
    return pwd.getpwnam("postgres") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())


def as_owner(cluster: Cluster) -> "list[str]":
    """What a command begins with that shall run as the server's user."""
    return _drop_root(cluster.owner)


def _drop_root(owner: pwd.struct_passwd) -> "list[str]":
    if os.geteuid() != 0:
        return []
    return ["setpriv", f"--reuid={owner.pw_name}", f"--regid={owner.pw_gid}", "--clear-groups", "--"]


def _quoted(value: object) -> str:
    text = {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
    return "'" + str(text).replace("'", "''") + "'"


def _children(parent: int) -> "list[int]":
    """The direct children of a process, from /proc."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            status = (entry / "status").read_text()
        except OSError:
            continue  # it ended while we looked
        if re.search(rf"^PPid:\t{parent}$", status, re.M):
            found.append(int(entry.name))
    return found


def _pidfd(pid: int) -> Optional[int]:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _wait_gone(pidfds: "list[int]", seconds: float = 20) -> None:
    """Wait until every process ended; they are not our children, so waitpid cannot."""
    try:
        for fd in pidfds:
            if not select.select([fd], [], [], seconds)[0]:
                raise RuntimeError("a killed server process did not end")
    finally:
        for fd in pidfds:
            os.close(fd)
