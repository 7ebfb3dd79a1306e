"""The decoder against the vectors, and its command line."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
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
UNWRAP = {name: lambda wrap, context, kek=kek: decoder.unwrap_local(kek, wrap, context) for name, kek in KEKS.items()}
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


def test_every_flipped_bit_and_truncation_is_refused():
    data = bytes.fromhex(SAMPLE["binary_hex"])
    cut = len(data) - 28 - len(bytes.fromhex(SAMPLE["plaintext_hex"]))
    refusals = (decoder.Malformed, decoder.Unverified, decoder.KeyUnavailable)
    for at in range(4, len(data)):
        for bit in range(8):
            flipped = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1:]
            with pytest.raises(refusals):
                opened(flipped, SAMPLE["aad"])
            armored = f"kms:v2:{make_vectors.b64(flipped[:cut])}:{make_vectors.b64(flipped[cut:])}"
            with pytest.raises(refusals):
                opened(armored, SAMPLE["aad"])
    for length in range(4, len(data)):
        with pytest.raises(refusals):
            opened(data[:length], SAMPLE["aad"])
    for length in range(7, len(SAMPLE["armored"])):
        with pytest.raises(refusals):
            opened(SAMPLE["armored"][:length], SAMPLE["aad"])


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


def test_the_vectors_can_be_made_again():
    for name, content in make_vectors.files().items():
        assert (VECTORS / name).read_text(encoding="utf-8") == content, name


# -- command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def kek_file(tmp_path):
    """The main KEK in a private file."""
    path = tmp_path / "main.b64"
    path.write_text(POSITIVE["keks"]["main"] + "\n")
    path.chmod(0o600)
    return path


def run(stored, *arguments):
    """The program on a stored value."""
    command = [sys.executable, "-B", str(TOOLS / "vod_tender_decrypt.py"), *map(str, arguments)]
    data = stored if isinstance(stored, bytes) else stored.encode()
    return subprocess.run(command, input=data, capture_output=True, check=False)


def test_the_plaintext_goes_to_standard_output(kek_file):
    plaintext = bytes.fromhex(SAMPLE["plaintext_hex"])
    arguments = ("--kek", f"main={kek_file}", "--aad", SAMPLE["aad"])
    for stored in (SAMPLE["armored"], SAMPLE["armored"] + "\n"):
        assert run(stored, *arguments).stdout == plaintext
    for stored in (bytes.fromhex(SAMPLE["binary_hex"]), "\\x" + SAMPLE["binary_hex"]):
        assert run(stored, "--binary", *arguments).stdout == plaintext


@pytest.mark.parametrize("case, code", [("malformed", 1), ("another aad", 2), ("no key", 3), ("loose file", 3)])
def test_failures_have_their_codes_and_show_nothing(kek_file, case, code):
    stored, aad, kek = SAMPLE["armored"], SAMPLE["aad"], ["--kek", f"main={kek_file}"]
    if case == "malformed":
        stored = stored[:-3]
    elif case == "another aad":
        aad = "another"
    elif case == "no key":
        kek = []
    else:
        kek_file.chmod(0o640)
    done = run(stored, *kek, "--aad", aad)
    assert (done.returncode, done.stdout) == (code, b""), done.stderr
    said = done.stderr.decode()
    assert said.count("\n") == 1
    assert SAMPLE["plaintext"] not in said and POSITIVE["keks"]["main"] not in said and "Traceback" not in said


def test_info_shows_what_is_not_secret():
    info = json.loads(run(SAMPLE["armored"], "--info").stdout)
    assert (info["version"], info["aad"], info["context"]) == (2, True, SAMPLE["context"])
    assert SAMPLE["dek_hex"] not in json.dumps(info)
