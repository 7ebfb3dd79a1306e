"""The decoder against the vectors, and its command line."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS, VECTORS = ROOT / "tools", ROOT / "tests" / "vectors"
sys.path.insert(0, str(TOOLS))
sys.dont_write_bytecode = True

import make_vectors  # noqa: E402
import vod_tender_decrypt as decoder  # noqa: E402


def load(name: str) -> dict:
    """A vector file."""
    return json.loads((VECTORS / name).read_text(encoding="utf-8"))


POSITIVE, NEGATIVE, V1 = load("envelope.json"), load("envelope_negative.json"), load("v1.json")
KEKS = {name: base64.b64decode(kek) for name, kek in POSITIVE["keks"].items()}
UNWRAP = {name: lambda wrap, it, kek=kek: decoder.unwrap_local(kek, wrap, it) for name, kek in KEKS.items()}
SAMPLE = next(vector for vector in POSITIVE["vectors"] if vector["name"] == "token")


def names(vectors):
    """Test ids."""
    return [vector["name"] for vector in vectors]


def opened(value, aad):
    """The plaintext of an envelope under the vectors' KEKs."""
    parsed = decoder.parse(value)
    return decoder.open_envelope(parsed, decoder.find_dek(parsed, UNWRAP), aad)


@pytest.mark.parametrize("vector", POSITIVE["vectors"], ids=names(POSITIVE["vectors"]))
def test_positive_vectors(vector):
    plaintext = bytes.fromhex(vector["plaintext_hex"])
    parsed = decoder.parse(vector["armored"])
    if vector["form"] == "literal":
        assert decoder.open_payload(bytes.fromhex(vector["dek_hex"]), parsed.payload) == plaintext
        return
    assert decoder.find_dek(parsed, UNWRAP).hex() == vector["dek_hex"]
    assert (parsed.context, parsed.commitment.hex()) == (vector["context"], vector["commitment_hex"])
    assert opened(vector["armored"], vector["aad"]) == plaintext
    assert opened(bytes.fromhex(vector["binary_hex"]), vector["aad"]) == plaintext


@pytest.mark.parametrize("vector", NEGATIVE["vectors"], ids=names(NEGATIVE["vectors"]))
def test_negative_vectors(vector):
    value = vector["value"] if vector["form"] == "text" else bytes.fromhex(vector["value_hex"])
    if vector["kind"] == "malformed":
        with pytest.raises(decoder.Malformed):
            decoder.parse(value)
    elif vector["kind"] == "other":
        assert decoder.parse(value) is None
    else:
        with pytest.raises(decoder.Unverified):
            opened(value, vector["aad"])


REFUSALS = (decoder.Malformed, decoder.Unverified, decoder.KeyUnavailable)


def assert_refused(value):
    """The value does not open. Without its prefix or magic it is no envelope; with another magic in armor, literal."""
    with pytest.raises(REFUSALS):
        parsed = decoder.parse(value)
        if parsed is None:
            assert not value.startswith(decoder.MAGIC if isinstance(value, bytes) else decoder.PREFIX)
            raise decoder.KeyUnavailable("not an envelope")
        if isinstance(parsed, decoder.Literal):
            decoder.open_payload(bytes.fromhex(SAMPLE["dek_hex"]), parsed.payload)
        opened(value, SAMPLE["aad"])


def flips(data):
    """The bytes with each of their bits changed in turn."""
    for at in range(len(data) * 8):
        changed = bytearray(data)
        changed[at // 8] ^= 1 << at % 8
        yield bytes(changed)


def test_every_flipped_bit_is_refused():
    data = bytes.fromhex(SAMPLE["binary_hex"])
    cut = len(data) - 28 - len(SAMPLE["plaintext_hex"]) // 2
    for changed in flips(data):
        assert_refused(changed)
        assert_refused(make_vectors.armor(changed[:cut], changed[cut:]))
    for changed in flips(SAMPLE["armored"].encode()):
        assert_refused(changed.decode("latin-1"))


def test_every_truncation_is_refused():
    for value in (bytes.fromhex(SAMPLE["binary_hex"]), SAMPLE["armored"]):
        for length in range(len(value)):
            assert_refused(value[:length])


def test_the_wrapped_form_is_as_strict():
    stored = next(vector for vector in POSITIVE["vectors"] if vector["form"] == "base64-wrapped")
    text = base64.b64decode(stored["armored"])
    for inner in (text + b"\n", text + b"\xff", text[:-1], text.replace(b"=", b"", 1)):
        with pytest.raises(decoder.Malformed):
            decoder.parse(base64.b64encode(inner).decode())
    for outer in (stored["armored"] + "\n", stored["armored"].rstrip("=") + "x"):
        assert decoder.parse(outer) is None


def test_another_magic_in_armor_is_the_literal_form():
    parsed = decoder.parse(make_vectors.armor(b"\x8fVT3" + bytes(60), bytes(28)))
    assert isinstance(parsed, decoder.Literal) and len(parsed.blob) == 64
    assert len(decoder.parse(make_vectors.armor(b"x" * 6144, bytes(28))).blob) == 6144


def test_the_largest_parts_are_accepted():
    context = {"n": "v" * (65535 - 5)}
    bound = make_vectors.bound_prefix(None, make_vectors.encode_context(context))
    wraps = [(f"k{number}".ljust(63, "_"), "~" * 2048, b"w" * 4096) for number in range(255)]
    parsed = decoder.parse(make_vectors.header(bound, wraps, bytes(32)) + bytes(28))
    assert parsed.context == context and parsed.payload == bytes(28)
    assert [(wrap.key, wrap.kek_id, wrap.wrapped_dek) for wrap in parsed.wraps] == wraps


@pytest.mark.parametrize("value", V1["values"], ids=[str(n) for n in range(len(V1["values"]))])
def test_version_1(value):
    key = base64.b64decode(V1["encryption_key"])
    assert decoder.open_v1(value["stored"], [bytes(32), key]) == value["plaintext"].encode()
    assert decoder.open_v1(base64.b64decode(value["stored"]), [key]) == value["plaintext"].encode()


@pytest.mark.parametrize("value", V1["must_fail"], ids=[value["why"] for value in V1["must_fail"]])
def test_version_1_that_must_fail(value):
    with pytest.raises((decoder.Malformed, decoder.Unverified)):
        decoder.open_v1(value["stored"], [base64.b64decode(V1["encryption_key"])])


def test_aws_is_asked_for_the_recorded_key_only():
    class Client:
        asked: list = []

        def decrypt(self, **request):
            self.asked.append(request)
            return {"Plaintext": b"k" * 32}

    client = Client()
    assert decoder.unwrap_aws(client, b"blob", {"a": "b"}, "arn") == b"k" * 32
    decoder.unwrap_aws(client, b"blob", {}, None)
    assert client.asked == [{"CiphertextBlob": b"blob", "EncryptionContext": {"a": "b"}, "KeyId": "arn"},
                            {"CiphertextBlob": b"blob"}]


@pytest.mark.parametrize("code, failure", [
    ("InvalidCiphertextException", decoder.Unverified), ("IncorrectKeyException", decoder.Unverified),
    ("AccessDeniedException", decoder.KeyUnavailable), ("DisabledException", decoder.KeyUnavailable)])
def test_aws_refusals(code, failure):
    class Refused(Exception):
        response = {"Error": {"Code": code, "Message": "not shown"}}

    class Client:
        def decrypt(self, **_request):
            raise Refused("not shown")

    with pytest.raises(failure) as caught:
        decoder.unwrap_aws(Client(), b"blob", {}, "arn")
    assert str(caught.value) == f"AWS KMS: {code}"


@pytest.mark.parametrize("dek", [b"", b"k" * 16, b"k" * 33])
def test_aws_data_keys_have_32_bytes(dek):
    class Client:
        def decrypt(self, **_request):
            return {"Plaintext": dek}

    with pytest.raises(decoder.Unverified):
        decoder.unwrap_aws(Client(), b"blob", {}, None)


def test_the_vectors_can_be_made_again():
    for name, content in make_vectors.files().items():
        assert (VECTORS / name).read_text(encoding="utf-8") == content, name


# -- command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def kek_file(tmp_path):
    """The main KEK in a private file."""
    return private(tmp_path / "main.b64", POSITIVE["keks"]["main"] + "\n")


def private(path, content):
    """A file that only its owner can read."""
    path.write_bytes(content.encode())
    path.chmod(0o600)
    return path


def run(stored, *arguments, **variables):
    """The program on a stored value, without anyone's AWS configuration."""
    command = [sys.executable, "-B", str(TOOLS / "vod_tender_decrypt.py"), *map(str, arguments)]
    data = stored if isinstance(stored, bytes) else stored.encode()
    environment = {"PATH": "/usr/bin:/bin", "AWS_EC2_METADATA_DISABLED": "true", "HOME": "/nonexistent", **variables}
    return subprocess.run(command, input=data, capture_output=True, check=False, env=environment)


def assert_fails(done, code, *secrets):
    """The exit code, nothing on standard output, and one line that holds none of the secrets."""
    said = done.stderr.decode()
    assert (done.returncode, done.stdout, said.count("\n")) == (code, b"", 1), said
    for secret in (SAMPLE["plaintext"], SAMPLE["dek_hex"], *POSITIVE["keks"].values(), "Traceback", *secrets):
        assert secret not in said


CLI_NAMES = ("empty", "unicode", "bytes", "empty aad", "two wraps", "wrapped once more", "U+0000")


@pytest.mark.parametrize("name", CLI_NAMES)
def test_the_program_opens_vectors(tmp_path, name):
    vector = next(vector for vector in POSITIVE["vectors"] if vector["name"] == name)
    arguments = [] if vector["aad"] is None else [f"--aad={vector['aad']}"]
    for key, kek in POSITIVE["keks"].items():
        arguments += ["--kek", f"{key}={private(tmp_path / key, kek)}"]
    for done in (run(vector["armored"], *arguments), run(bytes.fromhex(vector["binary_hex"]), "--binary", *arguments)):
        assert (done.returncode, done.stdout.hex(), done.stderr) == (0, vector["plaintext_hex"], b"")


def test_the_ways_to_give_a_value(kek_file, tmp_path):
    plaintext, file = SAMPLE["plaintext"].encode(), private(tmp_path / "stored", SAMPLE["armored"])
    arguments = ("--kek", f"main={kek_file}", "--aad", SAMPLE["aad"])
    assert run(SAMPLE["armored"] + "\n", *arguments).stdout == plaintext
    assert run("", file, *arguments).stdout == plaintext
    for written in ("\\x" + SAMPLE["binary_hex"], "\\x" + SAMPLE["binary_hex"].upper() + "\n"):
        assert run(written, "--binary", *arguments).stdout == plaintext


FAILURES = [("malformed", 1), ("two newlines", 1), ("bytes as text", 1), ("another aad", 2), ("another KEK", 2),
            ("no key", 3), ("no file", 3), ("directory", 3), ("carriage return", 3), ("two keys", 3), ("short key", 3)]


@pytest.mark.parametrize("case, code", FAILURES, ids=[case for case, _ in FAILURES])
def test_failures_have_their_codes_and_show_nothing(kek_file, tmp_path, case, code):
    kek = POSITIVE["keks"]["main"]
    contents = {"another KEK": POSITIVE["keks"]["spare"], "carriage return": kek + "\r\n",
                "two keys": f"{kek}\n{kek}\n", "short key": "c2hvcnQ="}
    values = {"malformed": SAMPLE["armored"][:-3], "two newlines": SAMPLE["armored"] + "\n\n",
              "bytes as text": bytes.fromhex(SAMPLE["binary_hex"])}
    private(kek_file, contents.get(case, kek))
    path = {"no file": tmp_path / "nothing", "directory": tmp_path}.get(case, kek_file)
    tmp_path.chmod(0o700)
    arguments = [] if case == "no key" else ["--kek", f"main={path}"]
    aad = "another" if case == "another aad" else SAMPLE["aad"]
    assert_fails(run(values.get(case, SAMPLE["armored"]), *arguments, "--aad", aad), code)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o777], ids=oct)
def test_key_files_are_private(kek_file, mode):
    kek_file.chmod(mode)
    arguments = ("--aad", SAMPLE["aad"])
    assert_fails(run(SAMPLE["armored"], "--kek", f"main={kek_file}", *arguments), 3)
    assert_fails(run(V1["values"][0]["stored"], "--legacy-key-file", kek_file), 3)


def test_a_key_in_place_of_its_file_is_not_shown():
    key = POSITIVE["keks"]["main"]
    assert_fails(run(SAMPLE["armored"], "--kek", f"main={key}"), 3)
    for wrong in (["--kek", key.rstrip("=")], ["stored", key], ["--key", key], ["--kek"]):
        assert_fails(run(SAMPLE["armored"], *wrong), 64)
    assert_fails(run("", "/nonexistent"), 64)


def test_an_aad_that_is_not_utf8_does_not_verify(kek_file):
    assert_fails(run(SAMPLE["armored"], "--kek", f"main={kek_file}", "--aad", "\udcff"), 2)


def test_the_program_opens_version_1(tmp_path):
    keys = private(tmp_path / "legacy", base64.b64encode(bytes(32)).decode() + "\n" + V1["encryption_key"] + "\n")
    value = V1["values"][0]
    assert run(value["stored"], "--legacy-key-file", keys).stdout == value["plaintext"].encode()
    binary = base64.b64decode(value["stored"])
    assert run(binary, "--binary", "--legacy-key-file", keys).stdout == value["plaintext"].encode()
    assert_fails(run(value["stored"]), 3, value["plaintext"])
    assert_fails(run("plaintext as it is", "--legacy-key-file", keys), 1, "plaintext as it is")


def test_the_literal_form_needs_aws():
    stored = next(vector for vector in POSITIVE["vectors"] if vector["form"] == "literal")["armored"]
    assert_fails(run(stored), 3)
    # Without boto3 as well as without a region.
    assert_fails(run(stored, "--aws", "main", "--context", "Application=vod-tender"), 3)
    assert json.loads(run(stored, "--info").stdout)["form"] == "literal"


@pytest.fixture
def key_service():
    """An AWS KMS that knows one answer, and what it has been asked; `dek` is the answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            answer = json.dumps({"Plaintext": base64.b64encode(server.dek).decode()}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("name", ["two wraps", "literal"])
def test_the_program_asks_aws(key_service, name):
    pytest.importorskip("boto3")
    vector = next(vector for vector in POSITIVE["vectors"] if vector["name"] == name)
    key_service.dek = bytes.fromhex(vector["dek_hex"])
    arguments = ["--aws", "elsewhere", "--region", "eu-west-1"]
    arguments += ["--endpoint-url", f"http://127.0.0.1:{key_service.server_port}"]
    arguments += [part for pair in vector["context"].items() for part in ("--context", "=".join(pair))]
    arguments += [] if vector["aad"] is None else ["--aad", vector["aad"]]
    done = run(vector["armored"], *arguments, AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test")
    assert (done.returncode, done.stdout.hex(), done.stderr) == (0, vector["plaintext_hex"], b"")
    (asked,) = key_service.asked
    assert asked["EncryptionContext"] == vector["context"]
    assert asked.get("KeyId") == (vector["wraps"][0]["kek_id"] if vector["wraps"] else None)


def test_info_shows_what_is_not_secret():
    info = json.loads(run(SAMPLE["armored"], "--info").stdout)
    assert (info["version"], info["aad"], info["context"]) == (2, True, SAMPLE["context"])
    assert [wrap["key"] for wrap in info["wraps"]] == ["main"]
    assert SAMPLE["dek_hex"] not in json.dumps(info)
    assert json.loads(run(V1["values"][0]["stored"], "--info").stdout)["version"] is None


def test_a_key_file_that_is_gone_does_not_stand_in_the_way(tmp_path):
    vector = next(each for each in POSITIVE["vectors"] if each["name"] == "three wraps")
    path = tmp_path / "main.b64"
    path.write_text(POSITIVE["keks"]["main"])
    path.chmod(0o600)
    done = subprocess.run(
        [sys.executable, "-B", str(TOOLS / "vod_tender_decrypt.py"), "--kek", f"main={path}",
         "--kek", "spare=/nonexistent"], input=vector["armored"].encode(), capture_output=True, check=False)
    assert (done.returncode, done.stdout.hex()) == (0, vector["plaintext_hex"]), done.stderr
