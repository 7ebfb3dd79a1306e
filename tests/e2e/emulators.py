"""AWS emulators as child processes, and boto3 clients for them (and for the strict server)."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Mapping, Optional

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from dead_ends import free_port

REGION = "eu-west-1"
# What both emulators take for root's credentials.
ACCESS_KEY = SECRET_KEY = "test"

_START_SECONDS = 60
_START_TRIES = 3


def aws_client(
    service: str,
    endpoint: str,
    region: str = REGION,
    access_key: str = ACCESS_KEY,
    secret_key: str = SECRET_KEY,
    attempts: int = 1,
    read_timeout: float = 10,
):
    """A boto3 client for a loopback endpoint: no proxy, no retries unless asked for, short timeouts."""
    config = Config(
        retries={"total_max_attempts": attempts, "mode": "standard"},
        connect_timeout=5, read_timeout=read_timeout, proxies={}, max_pool_connections=64,
    )
    session = boto3.session.Session(
        aws_access_key_id=access_key, aws_secret_access_key=secret_key, region_name=region
    )
    return session.client(service, endpoint_url=endpoint, config=config)


class Emulator:
    """A running emulator; use it as a context manager or call close()."""

    def __init__(self, name: str, command: "list[str]", environment: Callable[[int], Mapping[str, str]]):
        self.name = name
        self.region = REGION
        self._command = command
        self._environment = environment
        # Everything the emulator writes, also what it keeps in the temporary directory, goes in here.
        self._directory = Path(tempfile.mkdtemp(prefix=f"{name}-"))
        self._process: Optional[subprocess.Popen] = None
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Emulator":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def close(self) -> None:
        """End the process, with whatever it started, and remove its files. May be called twice."""
        self._end_process()
        shutil.rmtree(self._directory, ignore_errors=True)

    def client(self, service: str = "kms", **kw):
        """A boto3 client of this emulator; see aws_client for the options."""
        return aws_client(service, self.endpoint, **{"region": self.region, **kw})

    def environment(self, key: Optional[str] = None) -> "dict[str, str]":
        """A postmaster's environment that points here; with `key`, that is its KMS_KEY_ID."""
        env = {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": self.region,
            "AWS_ENDPOINT_URL_KMS": self.endpoint,
        }
        return {**env, "KMS_KEY_ID": key} if key else env

    def kek_uri(self, key: str) -> str:
        """The KEK URI of a key ARN, key id or alias name on this emulator."""
        return f"aws-kms://{key}?region={self.region}&endpoint={self.endpoint}"

    def create_key(self, alias: Optional[str] = None) -> str:
        """A new key, with an alias (`alias/NAME`) if wanted; returns its ARN."""
        kms = self.client()
        arn = kms.create_key()["KeyMetadata"]["Arn"]
        if alias:
            kms.create_alias(AliasName=alias, TargetKeyId=arn)
        return arn

    def point_alias(self, alias: str, key: str) -> None:
        """Point an existing alias to another key."""
        self.client().update_alias(AliasName=alias, TargetKeyId=key)

    def log_text(self) -> str:
        """What the emulator printed."""
        return self._log_path.read_text(errors="replace")

    # -- inside -------------------------------------------------------------------------------------

    @property
    def _log_path(self) -> Path:
        return self._directory / "emulator.log"

    def _start(self) -> None:
        # Another process may take the port between our look and the emulator's bind: then once more.
        for _ in range(_START_TRIES):
            self._launch(free_port())
            if self._became_ready():
                return
            self._end_process()
        raise RuntimeError(f"{self.name} did not start:\n{self.log_text()[-4000:]}")

    def _launch(self, port: int) -> None:
        self.port = port
        self.endpoint = f"http://127.0.0.1:{port}"
        base = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"}
        own = {"HOME": str(self._directory), "TMPDIR": str(self._directory)}
        command = [part.format(port=port) for part in self._command]
        with open(self._log_path, "ab") as log:
            self._process = subprocess.Popen(
                command, env={**base, **own, **self._environment(port)}, cwd=self._directory,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )

    def _became_ready(self) -> bool:
        """Ask for the keys until an answer comes; False when the process ended or time is up."""
        kms = self.client(read_timeout=5)
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            try:
                kms.list_keys()
                return self._process.poll() is None
            except (BotoCoreError, ClientError):
                pass
            try:
                # The pause between two questions, cut short if the process ends.
                self._process.wait(0.1)
                return False
            except subprocess.TimeoutExpired:
                pass
        return False

    def _end_process(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)  # its own session, hence its own group
            except ProcessLookupError:
                pass
            try:
                process.wait(5)
                return
            except subprocess.TimeoutExpired:
                pass


def moto() -> Emulator:
    """moto's server: the encryption context is bound, ReEncrypt works; key states are not enforced."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "{port}"]
    return Emulator("moto", command, lambda port: {})


def ministack() -> Emulator:
    """ministack: key states, IAM and signatures are enforced; ciphertexts are not authenticated."""
    command = [sys.executable, "-m", "ministack"]
    settings = {
        "BIND_HOST": "127.0.0.1",
        "CLOUDTRAIL_RECORDING": "1",
        "IOT_MTLS_ENABLED": "0",
        "SFTP_ENABLED": "0",
        "AUTH": "true",
    }
    return Emulator("ministack", command, lambda port: {**settings, "GATEWAY_PORT": str(port)})
