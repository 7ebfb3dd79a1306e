"""tools/vod_tender_decrypt.py opens what the server has written, without the server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from helpers import add_local_key, binary, new_key, one

DECODER = Path(__file__).resolve().parents[2] / "tools" / "vod_tender_decrypt.py"
PLAINTEXT = "contraseña-ключ-🔑"


def decode(stored: str, *arguments: str, environment=None) -> "subprocess.CompletedProcess[bytes]":
    """The decoder's run on a stored value."""
    environment = {**os.environ, **(environment or {})}
    command = [sys.executable, str(DECODER), *arguments]
    return subprocess.run(command, input=stored.encode(), capture_output=True, env=environment, check=False)


def test_values_under_a_local_kek(cluster, tmp_path):
    with cluster.connect() as connection:
        path = add_local_key(cluster, connection, "main")
        kek = tmp_path / "kek.b64"
        kek.write_text(Path(path).read_text())
        kek.chmod(0o600)
        context = '{"tenant": "a"}'
        text = one(connection, "SELECT envelope_encrypt(%s::text, context => %s::jsonb, aad => 'row')", PLAINTEXT, context)
        data = one(connection, "SELECT envelope_encrypt(%s::bytea)", PLAINTEXT.encode())
    opened = decode(text, "--kek", f"main={kek}", "--aad", "row")
    assert (opened.returncode, opened.stdout) == (0, PLAINTEXT.encode()), opened.stderr
    opened = decode("\\x" + bytes(data).hex(), "--binary", "--kek", f"main={kek}")
    assert (opened.returncode, opened.stdout) == (0, PLAINTEXT.encode()), opened.stderr
    refused = decode(text, "--kek", f"main={kek}", "--aad", "other")
    assert refused.returncode == 2 and refused.stdout == b""
    assert binary(text)[:4] == b"\x8fVT2"


def test_values_under_aws_kms(cluster, kms):
    with cluster.connect() as connection:
        connection.execute("SELECT vod_tender_crypto.add_key('main', %s)", [kms.kek_uri()])
        stored = one(connection, "SELECT envelope_encrypt(%s::text, key => 'main', aad => 'row')", PLAINTEXT)
    arguments = ["--aws", "main", "--endpoint-url", kms.endpoint, "--region", kms.region, "--aad", "row"]
    opened = decode(stored, *arguments, environment=kms.server.environment())
    assert (opened.returncode, opened.stdout) == (0, PLAINTEXT.encode()), opened.stderr


def test_version_1(cluster, tmp_path):
    content = new_key()
    keys = tmp_path / "legacy.b64"
    keys.write_text(content)
    keys.chmod(0o600)
    with cluster.connect() as connection:
        connection.execute("SELECT envelope_cache_clear()")
        path = cluster.server_file("legacy.b64", content)
        connection.execute(f"SET vod_tender_crypto.legacy_key_file = '{path}'")
        stored = one(connection, "SELECT envelope_encrypt(%s::text)", PLAINTEXT)
    opened = decode(stored, "--legacy-key-file", str(keys))
    assert (opened.returncode, opened.stdout) == (0, PLAINTEXT.encode()), opened.stderr
