"""Sessions share nothing secret or random, with and without shared_preload_libraries."""

from __future__ import annotations


from pathlib import Path

import pytest

from helpers import binary, new_key, one


@pytest.mark.parametrize("preloaded", [False, True], ids=["loaded on use", "preloaded"])
def test_sessions_share_no_randomness_and_no_deks(make_cluster, extension, kms, preloaded):
    settings = {"shared_preload_libraries": extension} if preloaded else {}
    own = make_cluster(settings=settings, environment=kms.environment())
    own.psql(f"CREATE EXTENSION {extension}")
    nonces, headers = [], []
    for _ in range(8):
        with own.connect() as session:
            for _ in range(3):
                value = one(session, "SELECT envelope_encrypt('x')")
                data = binary(value)
                nonces.append(data[-29:-17])
                headers.append(data[:-29])
    assert len(set(nonces)) == 24
    assert len(set(headers)) == 8, "a DEK for each session"
    assert len(set(kms.deks)) == len(kms.deks) == 8


@pytest.mark.parametrize("preloaded", [False, True], ids=["loaded on use", "preloaded"])
def test_local_deks_differ_too(make_cluster, extension, preloaded):
    settings = {"shared_preload_libraries": extension} if preloaded else {}
    own = make_cluster(settings=settings)
    own.psql(f"CREATE EXTENSION {extension}")
    path = own.server_file("kek.b64", new_key())
    own.psql(f"SELECT vod_tender_crypto.add_key('default', 'local://{path}')")
    values = []
    for _ in range(8):
        with own.connect() as session:
            values.append(binary(one(session, "SELECT envelope_encrypt('x'::text)")))
    assert len({value[:-29] for value in values}) == 8
    assert len({value[-29:-17] for value in values}) == 8


def test_the_preloaded_postmaster_holds_no_thread_and_no_session(make_cluster, extension):
    own = make_cluster(settings={"shared_preload_libraries": extension})
    threads = len(list(Path(f"/proc/{own.postmaster_pid()}/task").iterdir()))
    assert threads == 1
    with own.connect() as session:
        assert one(session, "SHOW vod_tender_crypto.write_format") == "auto"
