"""A pgbouncer of a test's own, in front of a cluster."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

import psycopg

from cluster import SOCKET_SUFFIX, Cluster, as_owner
from skips import cannot_run

PROGRAM = "pgbouncer"
READY_SECONDS = 20


class PgBouncer:
    """Pools transactions: `pool_size` server sessions for the database and the user that it logs in as, whoever the clients
    say they are. Listens on a socket in the cluster's directory only."""

    def __init__(self, cluster: Cluster, dbname: str, user: str, pool_size: int):
        self.program = shutil.which(PROGRAM) or shutil.which(PROGRAM, path="/usr/sbin:/usr/local/sbin")
        if self.program is None:
            cannot_run("pgbouncer is not installed (scripts/setup test)")
        self.cluster, self.dbname, self.user = cluster, dbname, user
        directory = f"pgbouncer-{dbname}"
        users = cluster.server_file(f"{directory}/users.txt", f'"{user}" ""\n')
        self.directory = Path(users).parent
        self._settings = cluster.server_file(f"{directory}/pgbouncer.ini", f"""
[databases]
{dbname} = host={cluster.root} port={SOCKET_SUFFIX} dbname={dbname} user={user}
[pgbouncer]
listen_addr =
listen_port = {SOCKET_SUFFIX}
unix_socket_dir = {self.directory}
auth_type = trust
auth_file = {users}
pool_mode = transaction
default_pool_size = {pool_size}
max_client_conn = 50
server_round_robin = 1
logfile = {self.directory}/pgbouncer.log
""")
        self._process: "subprocess.Popen | None" = None

    def __enter__(self) -> "PgBouncer":
        self._process = subprocess.Popen([*as_owner(self.cluster), self.program, self._settings], cwd="/",
                                         stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def connect(self, **kw) -> psycopg.Connection:
        """A client's connection. Without prepared statements of the protocol's: a transaction's session is anybody's next."""
        return psycopg.connect(host=str(self.directory), port=SOCKET_SUFFIX, dbname=self.dbname, user=self.user,
                               prepare_threshold=None, connect_timeout=10, **kw)

    def close(self) -> None:
        """Stops it at once; returns when it is gone."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        self._process = None

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                self.connect().close()
                return
            except psycopg.OperationalError as error:
                ended = self._process.poll()
                if ended is not None or time.monotonic() > deadline:
                    log = self.directory / "pgbouncer.log"
                    said = log.read_text()[-2000:] if log.exists() else ""
                    raise RuntimeError(f"pgbouncer does not answer (exit {ended}): {error}\n{said}") from error
                time.sleep(0.05)
