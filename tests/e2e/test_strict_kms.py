"""Tests of the strict KMS server: that it is the service's equal, and that each fault works."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import threading
import time

import botocore.exceptions
import pytest
from botocore.exceptions import ClientError

from strict_kms import ACCESS_KEY, Credential, StrictKms, faults

CONTEXT = {"Application": "harness", "Purpose": "test"}


def refusal(call, *args, **kw) -> "tuple[str, str, dict]":
    """The type, the message and the whole answer of a call that must be refused."""
    with pytest.raises(ClientError) as raised:
        call(*args, **kw)
    answer = raised.value.response
    assert answer["ResponseMetadata"]["RequestId"]
    return answer["Error"]["Code"], answer["Error"]["Message"], answer


@pytest.fixture
def client(kms):
    return kms.client()


@pytest.fixture
def made(kms, client):
    """A data key made under the fixture's key in CONTEXT."""
    return client.generate_data_key(KeyId=kms.arn, KeySpec="AES_256", EncryptionContext=CONTEXT)


# -- as the service ---------------------------------------------------------------------------------


def test_data_key_round_trip(kms, client, made):
    assert made["KeyId"] == kms.arn
    assert len(made["Plaintext"]) == 32
    assert made["CiphertextBlob"].startswith(bytes.fromhex("0102020078"))
    assert len(made["CiphertextBlob"]) == 184
    assert kms.deks == [made["Plaintext"]]
    opened = client.decrypt(CiphertextBlob=made["CiphertextBlob"], EncryptionContext=CONTEXT, KeyId=kms.arn)
    assert opened["Plaintext"] == made["Plaintext"]
    assert opened["KeyId"] == kms.arn


def test_every_kind_of_key_reference_works(kms, client):
    prefix, key_id = kms.arn.split("key/")
    for reference in (key_id, kms.arn, kms.alias, prefix + kms.alias):
        assert client.encrypt(KeyId=reference, Plaintext=b"x")["KeyId"] == kms.arn
        assert client.describe_key(KeyId=reference)["KeyMetadata"]["Arn"] == kms.arn


def test_context_is_bound(client, made):
    blob = made["CiphertextBlob"]
    for context in ({}, {**CONTEXT, "more": "x"}, {"Application": "harness"}, {**CONTEXT, "Purpose": "TEST"}):
        code, message, _ = refusal(client.decrypt, CiphertextBlob=blob, EncryptionContext=context)
        assert (code, message) == ("InvalidCiphertextException", "")
    reordered = dict(reversed(CONTEXT.items()))
    assert client.decrypt(CiphertextBlob=blob, EncryptionContext=reordered)["Plaintext"]


def test_every_byte_of_a_blob_is_authenticated(kms, made):
    blob = made["CiphertextBlob"]
    tampered = [blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :] for at in range(len(blob))]
    for each in tampered + [blob[:-1], blob + b"x", blob[:100]]:
        with pytest.raises(Exception, match="InvalidCiphertextException"):
            kms.keyring.open(each, CONTEXT, None)


def test_decrypt_is_pinned_to_the_key(kms, client, made):
    other = kms.create_key()
    code, message, _ = refusal(
        client.decrypt, CiphertextBlob=made["CiphertextBlob"], EncryptionContext=CONTEXT, KeyId=other
    )
    assert code == "IncorrectKeyException"
    assert message.startswith("The key ID in the request does not identify")


def test_alias_can_be_pointed_elsewhere(kms, client, made):
    second = kms.create_key()
    client.update_alias(AliasName=kms.alias, TargetKeyId=second)
    assert client.encrypt(KeyId=kms.alias, Plaintext=b"x")["KeyId"] == second
    decrypt = {"CiphertextBlob": made["CiphertextBlob"], "EncryptionContext": CONTEXT}
    assert refusal(client.decrypt, KeyId=kms.alias, **decrypt)[0] == "IncorrectKeyException"
    assert client.decrypt(KeyId=kms.arn, **decrypt)["Plaintext"] == made["Plaintext"]
    kms.point_alias(kms.alias, kms.arn)
    assert client.decrypt(KeyId=kms.alias, **decrypt)["KeyId"] == kms.arn


def test_keys_and_aliases_through_the_api(client):
    arn = client.create_key(Description="second")["KeyMetadata"]["Arn"]
    client.create_alias(AliasName="alias/second", TargetKeyId=arn)
    assert client.describe_key(KeyId="alias/second")["KeyMetadata"]["Description"] == "second"
    again = refusal(client.create_alias, AliasName="alias/second", TargetKeyId=arn)
    assert again[0] == "AlreadyExistsException"


def test_reencrypt_moves_between_keys_and_contexts(kms, client, made):
    target = kms.create_key()
    moved = client.re_encrypt(
        CiphertextBlob=made["CiphertextBlob"], SourceEncryptionContext=CONTEXT, SourceKeyId=kms.arn,
        DestinationKeyId=target, DestinationEncryptionContext={"new": "one"},
    )
    assert (moved["SourceKeyId"], moved["KeyId"]) == (kms.arn, target)
    opened = client.decrypt(CiphertextBlob=moved["CiphertextBlob"], EncryptionContext={"new": "one"})
    assert opened["Plaintext"] == made["Plaintext"]
    assert len(kms.deks) == 1


def test_disabled_key_refuses_until_enabled(kms, client, made):
    decrypt = {"CiphertextBlob": made["CiphertextBlob"], "EncryptionContext": CONTEXT}
    client.disable_key(KeyId=kms.arn)
    code, message, _ = refusal(client.decrypt, **decrypt)
    assert (code, message) == ("DisabledException", f"{kms.arn} is disabled.")
    assert refusal(client.generate_data_key, KeyId=kms.arn, KeySpec="AES_256")[0] == "DisabledException"
    client.enable_key(KeyId=kms.arn)
    assert client.decrypt(**decrypt)["Plaintext"] == made["Plaintext"]


def test_key_pending_deletion_refuses(kms, client, made):
    client.schedule_key_deletion(KeyId=kms.arn, PendingWindowInDays=7)
    code, message, _ = refusal(
        client.decrypt, CiphertextBlob=made["CiphertextBlob"], EncryptionContext=CONTEXT
    )
    assert (code, message) == ("KMSInvalidStateException", f"{kms.arn} is pending deletion.")
    assert client.describe_key(KeyId=kms.arn)["KeyMetadata"]["KeyState"] == "PendingDeletion"


@pytest.mark.parametrize(
    "reference, message",
    [
        ("alias/nobody", "Alias arn:aws:kms:eu-west-1:111122223333:alias/nobody is not found."),
        ("nonsense", "Invalid keyId 'nonsense'"),
        ("arn:aws:kms:us-east-1:111122223333:key/1", "Invalid arn us-east-1"),
        (
            "00000000-0000-4000-8000-000000000000",
            "Key 'arn:aws:kms:eu-west-1:111122223333:key/00000000-0000-4000-8000-000000000000' does not exist",
        ),
    ],
)
def test_unknown_keys_are_not_found(client, reference, message):
    found = refusal(client.generate_data_key, KeyId=reference, KeySpec="AES_256")
    assert found[:2] == ("NotFoundException", message)


def test_data_key_needs_one_size(kms, client):
    assert refusal(client.generate_data_key, KeyId=kms.arn)[0] == "ValidationException"
    assert len(client.generate_data_key(KeyId=kms.arn, NumberOfBytes=64)["Plaintext"]) == 64


# -- who may call -----------------------------------------------------------------------------------


def test_unknown_access_key_is_refused(kms):
    stranger = kms.client(access_key="AKIDSTRANGER")
    assert refusal(stranger.describe_key, KeyId=kms.arn)[0] == "UnrecognizedClientException"


def test_wrong_secret_is_refused_unless_unverified(kms):
    liar = kms.client(secret_key="wrong")
    assert refusal(liar.describe_key, KeyId=kms.arn)[0] == "InvalidSignatureException"
    kms.credentials[ACCESS_KEY] = Credential(ACCESS_KEY)
    assert liar.describe_key(KeyId=kms.arn)


def test_wrong_region_is_refused(kms):
    astray = kms.client(region="us-east-1")
    assert refusal(astray.describe_key, KeyId=kms.arn)[0] == "InvalidSignatureException"


def test_unsigned_request_is_refused(kms):
    connection = http.client.HTTPConnection("127.0.0.1", kms.port, timeout=5)
    connection.request("POST", "/", "{}", {"X-Amz-Target": "TrentService.DescribeKey"})
    answer = connection.getresponse()
    assert answer.status == 400
    assert json.loads(answer.read())["__type"] == "MissingAuthenticationTokenException"
    assert answer.headers["x-amzn-RequestId"]
    connection.close()


# -- the record -------------------------------------------------------------------------------------


def test_requests_are_recorded_without_signatures(kms, client, made):
    (request,) = kms.requests
    assert request.operation == "GenerateDataKey"
    assert request.body == {"KeyId": kms.arn, "KeySpec": "AES_256", "EncryptionContext": CONTEXT}
    assert request.request_id == made["ResponseMetadata"]["RequestId"]
    assert ACCESS_KEY in request.headers["authorization"]
    assert request.headers["authorization"].endswith("Signature=(removed)")
    refusal(client.decrypt, CiphertextBlob=made["CiphertextBlob"])
    assert kms.counts == {"GenerateDataKey": 1, "Decrypt": 1}
    assert kms.requests[-1].error == "InvalidCiphertextException"
    kms.reset_record()
    assert kms.count("Decrypt") == 0


def test_concurrency_is_measured(kms):
    kms.inject(faults.delay(0.5))
    client = kms.client()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: client.describe_key(KeyId=kms.arn), range(8)))
    assert 2 <= kms.peak_in_flight <= 8


# -- faults -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault, code, status",
    [
        (faults.throttle(), "ThrottlingException", 400),
        (faults.server_error(), "KMSInternalException", 500),
        (faults.expired_token(), "ExpiredTokenException", 400),
        (faults.unrecognized_client(), "UnrecognizedClientException", 400),
        (faults.error("KeyUnavailableException", "later", 500), "KeyUnavailableException", 500),
    ],
)
def test_error_faults_last_as_many_times_as_told(kms, client, fault, code, status):
    kms.inject(fault, "DescribeKey", times=2)
    for _ in range(2):
        found, _, answer = refusal(client.describe_key, KeyId=kms.arn)
        assert (found, answer["ResponseMetadata"]["HTTPStatusCode"]) == (code, status)
    assert client.describe_key(KeyId=kms.arn)


def test_fault_can_last_for_a_period(kms, client):
    kms.inject(faults.throttle(), seconds=0.2)
    refused = 0
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            client.describe_key(KeyId=kms.arn)
            break
        except ClientError:
            refused += 1
    assert refused >= 1
    assert client.describe_key(KeyId=kms.arn)


def test_fault_concerns_its_operation_and_can_be_cleared(kms, client):
    kms.inject(faults.throttle(), "Decrypt")
    assert client.describe_key(KeyId=kms.arn)
    assert refusal(client.decrypt, CiphertextBlob=b"x")[0] == "ThrottlingException"
    kms.clear_faults()
    assert refusal(client.decrypt, CiphertextBlob=b"x")[0] == "InvalidCiphertextException"


def test_denial_names_operation_and_key(kms, client):
    kms.inject(faults.deny("reader"))
    code, message, _ = refusal(client.generate_data_key, KeyId=kms.alias, KeySpec="AES_256")
    assert code == "AccessDeniedException"
    assert "user/reader is not authorized to perform: kms:GenerateDataKey" in message
    assert kms.arn in message
    assert kms.deks == []


def test_delay_combines_with_another_fault(kms, client):
    kms.inject(faults.delay(0.2), times=1)
    kms.inject(faults.throttle(), times=1)
    started = time.monotonic()
    assert refusal(client.describe_key, KeyId=kms.arn)[0] == "ThrottlingException"
    assert time.monotonic() - started >= 0.2
    assert kms.requests[-1].faults == ("delay", "ThrottlingException")


@pytest.mark.parametrize("keep", [20, 0, -1])
def test_cut_connection(kms, client, keep):
    kms.inject(faults.cut(keep), times=1)
    with pytest.raises((botocore.exceptions.HTTPClientError, botocore.exceptions.ConnectionError)):
        client.describe_key(KeyId=kms.arn)
    assert client.describe_key(KeyId=kms.arn)


def test_never_answering(kms):
    kms.inject(faults.never_answer(), "GenerateDataKey", times=1)
    with pytest.raises(botocore.exceptions.ReadTimeoutError):
        kms.client(read_timeout=0.2).generate_data_key(KeyId=kms.arn, KeySpec="AES_256")
    assert kms.count("GenerateDataKey") == 1
    assert kms.deks == []


def test_garbage(kms, client):
    kms.inject(faults.garbage(), times=1)
    # boto3 makes the best of it: an answer without content. Others fail, as they should.
    assert "KeyMetadata" not in client.describe_key(KeyId=kms.arn)
    assert client.describe_key(KeyId=kms.arn)["KeyMetadata"]


def test_wrong_key_id_and_wrong_dek_length(kms, client):
    other = kms.create_key()
    kms.inject(faults.wrong_key_id(other), "GenerateDataKey", times=1)
    kms.inject(faults.wrong_dek_length(16), "GenerateDataKey", times=1)
    first = client.generate_data_key(KeyId=kms.arn, KeySpec="AES_256")
    second = client.generate_data_key(KeyId=kms.arn, KeySpec="AES_256")
    assert (first["KeyId"], len(first["Plaintext"])) == (other, 32)
    assert (second["KeyId"], len(second["Plaintext"])) == (kms.arn, 16)


def test_wait_for_sees_a_request_that_is_not_answered(kms):
    kms.inject(faults.never_answer())
    asked = threading.Thread(target=_ask_and_fail, args=(kms.client(read_timeout=1), kms.arn))
    asked.start()
    kms.wait_for("DescribeKey")
    asked.join()
    with pytest.raises(TimeoutError):
        kms.wait_for("DescribeKey", 2, timeout=0.01)


def _ask_and_fail(client, arn: str) -> None:
    with pytest.raises(botocore.exceptions.ReadTimeoutError):
        client.describe_key(KeyId=arn)


def test_close_does_not_wait_for_anybody():
    server = StrictKms()
    server.inject(faults.delay(60), times=1)
    server.inject(faults.never_answer())
    connections = [http.client.HTTPConnection("127.0.0.1", server.port, timeout=5) for _ in range(2)]
    for connection in connections:
        connection.request("POST", "/", "{}", {"X-Amz-Target": "TrentService.DescribeKey"})
    server.wait_for("DescribeKey", 2)
    started = time.monotonic()
    server.close()
    server.close()
    assert time.monotonic() - started < 2
    for connection in connections:
        connection.close()


def test_environment_and_uri_point_here(kms):
    assert kms.environment()["AWS_ENDPOINT_URL_KMS"] == kms.endpoint
    assert kms.environment()["KMS_KEY_ID"] == kms.arn
    assert "KMS_KEY_ID" not in kms.server.environment()
    assert kms.kek_uri(kms.alias) == f"aws-kms://alias/e2e?region=eu-west-1&endpoint={kms.endpoint}"
