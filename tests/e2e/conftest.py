"""Fixtures of the end-to-end tests.

`cluster` is what most tests want: a fresh database with the extension. `make_cluster` is for tests that
need an environment, settings or restarts of their own. `kms` is a strict KMS with one key.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass

import pytest

import emulators
from cluster import Cluster, Database, extension_available
from dead_ends import BlackHole, closed_port
from jobs import add_keys, role
from roles import People
from skips import cannot_run, in_ci
from strict_kms import ACCESS_KEY, REGION, SECRET_KEY, StrictKms

EXTENSION = "vod_tender_crypto"

# The shared cluster can sign for any strict KMS, but has no KEK and no endpoint: a KEK's URI brings its
# endpoint (kms.kek_uri()), so that each test's own server serves it without a restart.
SHARED_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_REGION": REGION,
}

_numbers = itertools.count(1)


@dataclass
class KmsWithKey:
    """A strict KMS and the key it was started with; everything else is the server's."""

    server: StrictKms
    arn: str
    alias: str = "alias/e2e"

    def __getattr__(self, name: str):
        return getattr(self.server, name)

    def environment(self, key: "str | None" = None) -> "dict[str, str]":
        """A postmaster's environment whose KMS_KEY_ID is this key (or the one given)."""
        return self.server.environment(key or self.arn)

    def kek_uri(self, key: "str | None" = None) -> str:
        """The KEK URI of this key (or the one given)."""
        return self.server.kek_uri(key or self.arn)

    def client(self, **kw):
        """A boto3 client for the server, with the credentials it knows."""
        known = {"region": self.server.region, "access_key": ACCESS_KEY, "secret_key": SECRET_KEY}
        return emulators.aws_client("kms", self.server.endpoint, **{**known, **kw})


@pytest.fixture(scope="session", autouse=True)
def _neutral_environment():
    """libpq and botocore read the tests' own environment too: nothing of the caller's may leak in."""
    kept = {"PG_CONFIG"}
    for name in list(os.environ):
        if name.startswith(("PG", "AWS_")) and name not in kept:
            del os.environ[name]
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    os.environ["AWS_CONFIG_FILE"] = os.environ["AWS_SHARED_CREDENTIALS_FILE"] = os.devnull


@pytest.fixture(scope="session")
def shared_cluster(_neutral_environment):
    """The session's cluster. Tests use databases in it and leave its settings alone."""
    with Cluster(environment=SHARED_ENVIRONMENT) as running:
        yield running


@pytest.fixture
def bare_database(shared_cluster):
    """A fresh database without the extension in the session's cluster."""
    name = f"e2e_{next(_numbers)}"
    shared_cluster.createdb(name)
    yield Database(shared_cluster, name)
    shared_cluster.dropdb(name)


@pytest.fixture
def extension():
    """The extension's name, for tests that create it themselves."""
    if not extension_available(EXTENSION):
        cannot_run(f"the extension {EXTENSION} is not installed in this PostgreSQL (cargo pgrx install)")
    return EXTENSION


@pytest.fixture
def cluster(extension, bare_database):
    """A fresh database with the extension in the session's cluster."""
    bare_database.psql(f"CREATE EXTENSION {extension}")
    return bare_database


@pytest.fixture
def database(cluster):
    """A database with a legacy key and a local KEK named default."""
    add_keys(cluster)
    return cluster


@pytest.fixture
def connection(database):
    """A session in it."""
    with database.connect() as session:
        yield session


@pytest.fixture
def owner(database):
    """A plain role that may run jobs; give it a table."""
    with role(database) as name:
        yield name


@pytest.fixture
def people(database):
    """Makes roles in that database."""
    made = People(database)
    yield made
    made.close()


@pytest.fixture
def make_cluster(_neutral_environment):
    """Makes started clusters of the test's own: make_cluster(settings={...}, environment={...})."""
    made = []

    def make(settings=None, environment=None) -> Cluster:
        made.append(Cluster(settings, environment))
        return made[-1].start()

    yield make
    for each in made:
        each.close()


@pytest.fixture
def kms():
    """A strict KMS with one key (`.arn`, `.alias`)."""
    with StrictKms() as server:
        alias = "alias/e2e"
        yield KmsWithKey(server, server.create_key(alias), alias)
        assert not server.internal_errors, server.internal_errors[0]


@pytest.fixture(scope="session")
def moto(_neutral_environment):
    """A moto server, shared by the session: make keys of your own."""
    with emulators.moto() as running:
        yield running


@pytest.fixture(scope="session")
def ministack(_neutral_environment):
    """A ministack, shared by the session: make keys of your own."""
    with emulators.ministack() as running:
        yield running


@pytest.fixture
def black_hole():
    """An endpoint that accepts and never answers."""
    with BlackHole() as hole:
        yield hole


@pytest.fixture
def refused_port():
    """A port that refuses connections."""
    with closed_port() as port:
        yield port


def pytest_terminal_summary(terminalreporter):
    """Name every test that did not run, with its reason."""
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        terminalreporter.section("not run on this machine")
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        terminalreporter.line(f"{report.nodeid}: {reason.removeprefix('Skipped: ')}")


def pytest_sessionfinish(session):
    """A skip that went past cannot_run() fails a CI run as well."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if in_ci() and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
